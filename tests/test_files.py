"""Files that are believed only from their owner, whoever else can write beside them."""

import contextlib
import os
import stat

import pytest
from appliance.base import StartupError
from appliance.base.files import (
    Identity, Walk, check_folder, existing_folder, guard_private, is_private, make_folder, open_owned, other_writer,
    read_owned, read_secret_file,
)

US = Identity(1000, frozenset({1000, 50}))
ROOT = Identity(0, frozenset({0}))
DIRECTORY, FILE, LINK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK


def info(mode, uid=0, gid=0):
    """What stat(2) would say of a file of somebody."""
    return os.stat_result((mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


class TestOtherWriter:
    """inode(7): who could have written it."""

    @pytest.mark.parametrize(
        "found, who",
        [
            (info(FILE | 0o600, 1000), US), (info(FILE | 0o640, 0, 1000), US), (info(FILE | 0o644, 0, 0), US),
            (info(FILE | 0o664, 1000, 1000), US), (info(FILE | 0o660, 0, 50), US), (info(FILE | 0o660, 1000, 0), US),
            (info(DIRECTORY | 0o755), US), (info(DIRECTORY | 0o2775, 0, 50), US), (info(LINK | 0o777, 1000, 7), US),
            (info(LINK | 0o777), US), (info(FILE | 0o600), ROOT), (info(FILE | 0o640, 0, 1000), ROOT),
        ],
    )
    def test_nobody_but_root_us_and_our_groups(self, found, who):
        assert other_writer(found, who) == ""

    @pytest.mark.parametrize(
        "found, who, why",
        [
            (info(FILE | 0o600, 1001), US, "belongs to user 1001"), (info(FILE | 0o400, 1001), US, "belongs to user"),
            (info(LINK | 0o777, 1001), US, "belongs to user 1001"), (info(FILE | 0o602, 1000), US, "by others"),
            (info(FILE | 0o666, 0), US, "by others"), (info(FILE | 0o660, 1000, 7), US, "by group 7"),
            (info(DIRECTORY | 0o777, 1000), US, "by others"), (info(DIRECTORY | 0o1777), US, "by others"),
            (info(DIRECTORY | 0o775, 0, 7), US, "by group 7"), (info(FILE | 0o600, 1000), ROOT, "belongs to user 1000"),
            (info(FILE | 0o664, 0, 7), ROOT, "by group 7"),
        ],
    )
    def test_somebody_else(self, found, who, why):
        assert why in other_writer(found, who)


class TestPrivate:
    @pytest.mark.parametrize(
        "found, who, private",
        [
            (info(FILE | 0o600, 1000), US, True), (info(FILE | 0o400), US, True),
            (info(FILE | 0o640, 0, 1000), US, True), (info(FILE | 0o440, 0, 0), US, True),
            (info(FILE | 0o640, 0, 50), US, True), (info(FILE | 0o640, 0, 1000), ROOT, True),
            (info(FILE | 0o640, 0, 1000), Identity(0, frozenset((0, 1000))), True),  # ExecStartPre=+ of systemd
            (info(FILE | 0o640, 0, 7), US, False), (info(FILE | 0o644, 0, 1000), US, False),
            (info(FILE | 0o660, 0, 1000), US, False), (info(FILE | 0o640, 1000, 1000), US, False),
            (info(FILE | 0o604, 1000), US, False), (info(FILE | 0o644), ROOT, False),
            (info(FILE | 0o640), ROOT, False),
        ],
    )
    def test_only_its_owner_reads_it_and_whom_root_gave_it_to(self, found, who, private):
        """A package installs mad.conf as root:service 0640; an ACL shows as a group of root's with 0440."""
        assert is_private(found, who) is private

    def test_root_does_not_take_from_the_service_what_it_was_given(self, tmp_path):
        path = tmp_path / "mad.conf"
        path.touch()
        if not os.geteuid():
            os.chown(path, 0, 12345)
        path.chmod(0o640)
        descriptor = os.open(path, os.O_RDONLY)
        guard_private(descriptor, str(path), "it holds secrets", Identity(0, frozenset({0})))
        assert path.stat().st_mode & 0o777 == (0o640 if path.stat().st_uid == 0 else 0o600)
        os.close(descriptor)


def identity():
    return Identity(os.geteuid(), frozenset((os.getegid(), *os.getgroups())))


@pytest.fixture
def place(tmp_path):
    """A folder of ours with a file of ours."""
    folder = tmp_path / "place"
    folder.mkdir(mode=0o700)
    (folder / "file").write_text("ours")
    (folder / "file").chmod(0o600)
    return folder


class TestOpenOwned:
    def test_what_only_we_can_write_is_read(self, place, monkeypatch):
        assert read_owned(str(place / "file")) == b"ours"
        monkeypatch.chdir(place)
        assert read_owned("file") == read_owned("./../place//file") == b"ours"

    def test_what_is_missing_is_missing_also_where_others_write(self, place):
        place.chmod(0o1777)
        with pytest.raises(FileNotFoundError):
            open_owned(str(place / "nothing"))

    @pytest.mark.parametrize("mode", [0o777, 0o1777, 0o703])
    def test_the_folder_of_a_file_is_ours_alone(self, place, mode):
        place.chmod(mode)
        with pytest.raises(StartupError, match=f"{place} can be written by others"):
            open_owned(str(place / "file"))

    def test_a_group_of_ours_is_a_warning(self, place, capsys):
        place.chmod(0o775)
        (place / "file").chmod(0o664)
        assert read_owned(str(place / "file")) == b"ours"
        said = capsys.readouterr().err
        assert f"{place} can be written by group" in said and f"{place}/file can be written by group" in said

    @pytest.mark.parametrize("mode, allowed", [(0o755, True), (0o1777, True), (0o777, False), (0o1757, True)])
    def test_a_folder_above_may_have_the_sticky_bit(self, place, mode, allowed):
        above = place / "above"
        (above / "folder").mkdir(parents=True)
        (above / "folder" / "file").touch(0o600)
        above.chmod(mode)
        with contextlib.nullcontext() if allowed else pytest.raises(StartupError, match="above can be written"):
            os.close(open_owned(str(above / "folder" / "file")))

    @pytest.mark.parametrize("mode", [0o602, 0o666])
    def test_a_file_that_others_can_write_is_theirs(self, place, mode):
        (place / "file").chmod(mode)
        with pytest.raises(StartupError, match="can be written by others"):
            open_owned(str(place / "file"))

    @pytest.mark.parametrize("target", ["file", "../place/file", "{}/file", "over/file"])
    def test_our_links_are_followed(self, place, target):
        (place / "over").symlink_to(place)
        (place / "link").symlink_to(target.format(place))
        assert read_owned(str(place / "link")) == b"ours"

    def test_a_link_into_a_folder_of_others_leads_nowhere(self, place):
        shared = place / "shared"
        shared.mkdir()
        (shared / "file").touch(0o600)
        shared.chmod(0o777)
        (place / "link").symlink_to(shared / "file")
        with pytest.raises(StartupError, match="shared can be written"):
            open_owned(str(place / "link"))

    def test_a_link_within_a_folder_of_others_leads_nowhere(self, place):
        shared = place / "shared"
        shared.mkdir()
        (shared / "link").symlink_to(place / "file")
        shared.chmod(0o777)
        with pytest.raises(StartupError, match="shared can be written"):
            open_owned(str(shared / "link"))

    def test_a_link_of_somebody_else_leads_nowhere(self, place, monkeypatch):
        """Also in a folder that is ours by now."""
        (place / "link").symlink_to("file")
        real = os.fstat

        def fstat(descriptor):
            found = real(descriptor)
            return info(found.st_mode, 23456) if stat.S_ISLNK(found.st_mode) else found

        monkeypatch.setattr(os, "fstat", fstat)
        with pytest.raises(StartupError, match=f"{place}/link belongs to user 23456"):
            open_owned(str(place / "link"))

    def test_links_that_lead_in_a_circle_end(self, place):
        (place / "one").symlink_to("two")
        (place / "two").symlink_to("one")
        with pytest.raises(OSError, match="symbolic links"):
            open_owned(str(place / "one"))

    def test_a_pipe_of_the_shell_is_what_we_were_given(self, place):
        reader, writer = os.pipe()
        os.write(writer, b"given")
        os.close(writer)
        assert read_owned(f"/dev/fd/{reader}") == b"given"
        os.close(reader)

    def test_nobody_is_waited_for(self, place):
        os.mkfifo(place / "pipe", 0o600)
        os.close(open_owned(str(place / "pipe")))

    @pytest.mark.parametrize("whose", ["file", "folder", "above"])
    def test_what_is_somebody_elses_is_not_believed(self, place, whose):
        """Seen by another user, to whom everything here is somebody else's but what belongs to root."""
        if not os.geteuid():
            os.chown({"file": place / "file", "folder": place, "above": place.parent}[whose], 23456, -1)
        other = Identity(os.geteuid() + 12345, frozenset())
        with pytest.raises(StartupError, match=f"belongs to user [0-9]+, and this runs as user {other.uid}, so"):
            open_owned(str(place / "file"), who=other)

    def test_in_a_sticky_folder_a_link_or_a_folder_of_somebody_else_is_refused(self, place):
        """As in /tmp: the entry that leads on must be ours or root's."""
        who = identity()
        sticky = info(DIRECTORY | 0o1777)
        walk = Walk(str(place), who)
        walk.close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fstat", lambda descriptor: sticky)
            patch.setattr(os, "fstatvfs", lambda descriptor: os.statvfs("/tmp"))
            walk.name = "/sticky"
            walk.check_parent("child", info(DIRECTORY | 0o700, who.uid))
            walk.check_parent("child", info(LINK | 0o777))
            for child in (info(DIRECTORY | 0o755, 23456), info(LINK | 0o777, 23456)):
                with pytest.raises(StartupError, match="/sticky/child belongs to user 23456"):
                    walk.check_parent("child", child)

    def test_nobody_can_write_what_is_mounted_read_only(self, place, monkeypatch):
        """Kubernetes mounts settings in a folder of mode 1777."""
        place.chmod(0o1777)
        real = os.statvfs(place)
        mounted = os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real.f_namemax))
        monkeypatch.setattr(os, "fstatvfs", lambda descriptor: mounted)
        assert read_owned(str(place / "file")) == b"ours"


class TestFolders:
    def test_a_folder_is_made_private_in_one_that_is_ours(self, place):
        make_folder(str(place / "a" / "b" / "file"))
        assert stat.S_IMODE((place / "a" / "b").stat().st_mode) == 0o700
        assert existing_folder(str(place / "a" / "c" / "file")) == str(place / "a")

    def test_nothing_is_made_where_others_write(self, place):
        place.chmod(0o777)
        with pytest.raises(StartupError, match="can be written by others"):
            make_folder(str(place / "a" / "file"))
        assert not (place / "a").exists()

    def test_a_folder_whose_files_are_to_be_ours(self, place):
        check_folder(str(place))
        place.chmod(0o1777)
        with pytest.raises(StartupError, match="use a folder of your own"):
            check_folder(str(place))


class TestSecretFiles:
    @pytest.mark.parametrize("mode", [0o644, 0o604, 0o666])
    def test_one_that_others_can_read_is_refused(self, place, mode):
        (place / "file").chmod(mode)
        with pytest.raises(ValueError, match="password_file: .* can be read by others"):
            read_secret_file(str(place / "file"), "password_file")

    def test_the_first_line_is_the_secret(self, place):
        (place / "file").write_bytes(b"a phrase \r\nmore")
        assert read_secret_file(str(place / "file"), "x") == "a phrase "

    @pytest.mark.parametrize("mode, allowed", [(0o444, True), (0o644, True), (0o666, False)])
    def test_in_a_container_there_are_no_others(self, place, mode, allowed):
        (place / "file").chmod(mode)
        with contextlib.nullcontext() if allowed else pytest.raises(ValueError, match="read by others"):
            assert read_secret_file(str(place / "file"), "x", in_container=True) == "ours"

    @pytest.mark.parametrize("content, why", [(b"", "is empty"), (b"\nx", "is empty"), (b"\xff", "not UTF-8")])
    def test_what_is_no_secret_is_said(self, place, content, why):
        (place / "file").write_bytes(content)
        with pytest.raises(ValueError, match=why):
            read_secret_file(str(place / "file"), "x")
