"""A new release in place of the old one: what is checked before, and what is left whenever it ends."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from _imp import extension_suffixes
from pathlib import Path
from types import SimpleNamespace

import box as box_module
import msgspec
import pytest
from box import ARCHIVE, ROOT, Box
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from conftest import PASSWORD, die, in_child, opened
from appliance import upgrade as room
from appliance.base import StartupError
from appliance.base.store import MIGRATIONS
from appliance.processes import ACCEPTED, GOING_BACK, find_server, hold_database, is_on_trial
from appliance.recovery import hold_setup
from appliance.release import MEMBER
from appliance.upgrade import (
    DataSide, Running, check_signature, copy_archive, find_running, parse_trusted_keys, read_environ, read_trusted_keys,
    recover_upgrade,
)
from microauthd import VERSION

LONG = pytest.mark.long
NEW = "99.1"
SUFFIX = extension_suffixes()[0]
PLATFORM = SUFFIX[1:-3].split("-", 2)[2]
MIGRATION = '\nMIGRATIONS += ("CREATE TABLE upgraded (x TEXT) STRICT;",)\n'
CHANGES = {  # of a release: {name: {member: (pattern, replacement), "version": and "schema": how much newer that is}}
    "good": {"appliance/base/store.py": (r"\Z", MIGRATION), "schema": 1},
    "a downgrade": {"version": "0.0.9"},
    "no selftest": {"appliance/commands.py": (r"(?m)^    failed = 0$", "    failed = 1")},
    "older": {"appliance/base/store.py": (r"\Z", "\nMIGRATIONS = MIGRATIONS[:-1]\n"), "schema": -1},
    "not ready": {
        "appliance/base/store.py": (r"\Z", MIGRATION), "microauthd.py": ('"database": True}', '"database": False}'),
        "schema": 1,
    },
    "no start": {
        "appliance/base/store.py": (r"\Z", MIGRATION),
        "appliance/processes.py": (r"(?m)^    auth_sockets, admin_socket = bind_ports", "    raise StartupError('no')\n    x, y = z"),
        "schema": 1,
    },
}


def repack(target, changes):
    """Write a release that differs from the built one in its version and in these members.

    What other processors and other Pythons need, four fifths of it, is left out: each upgrade copies all.
    """
    listing, version = "", changes.get("version", NEW)
    with zipfile.ZipFile(ARCHIVE) as old, open(target, "wb") as file:
        file.write(b"#!/usr/bin/python3 -I\n")
        with zipfile.ZipFile(file, "w") as new:
            for info in old.infolist():
                is_native = info.filename.startswith("native/")
                if is_native and not info.filename.startswith(f"native/{PLATFORM}/"):
                    continue
                if is_native and ".cpython-" in info.filename and not info.filename.endswith(SUFFIX):
                    continue
                content, name = old.read(info), info.filename.removeprefix("site-packages/")
                if name in changes:
                    pattern, replacement = changes[name]
                    text = re.sub(pattern, lambda _: replacement, content.decode(), count=1)  # noqa: B023 - used at once
                    assert text != content.decode(), (name, pattern)
                    content = text.encode()
                if name == "microauthd.py":
                    content = content.replace(f'VERSION = "{VERSION}"'.encode(), f'VERSION = "{version}"'.encode())
                if name == MEMBER:
                    release = {"version": version, "schema": len(MIGRATIONS) + changes.get("schema", 0)}
                    content = json.dumps(release).encode()
                if name == "build-id":
                    content = hashlib.sha256(repr(changes).encode()).hexdigest()[:20].encode()
                copy = zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0))
                copy.external_attr = info.external_attr
                new.writestr(copy, content)
            for info in new.infolist():
                listing += f"{info.filename} {info.file_size} {info.CRC}\n"
            new.comment = hashlib.sha256(listing.encode()).hexdigest().encode()
    os.chmod(target, 0o755)
    return target


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Return the path of a release by its name, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("releases")

    def path(name):
        target = folder / f"{name.replace(' ', '-')}.pyz"
        return target if target.exists() else repack(target, CHANGES[name])

    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@contextlib.contextmanager
def box_of_its_own(folder, cache):
    """A box that runs from an archive of its own, in a folder that holds nothing else."""
    (folder / "bin").mkdir(mode=0o755)
    archive = folder / "bin" / "microauthd.pyz"
    shutil.copy(ARCHIVE, archive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_module, "PROGRAM", [sys.executable, "-I", str(archive)])
        made = Box(folder / "data", workers="1")
        made.archive = archive
        made.environ["MICROAUTHD_CACHE"] = str(cache)
        yield made.set_up()


@pytest.fixture
def box(tmp_path, cache):
    with box_of_its_own(tmp_path, cache) as made:
        yield made
        if (pid := find_server(str(made.folder / "mad.db3"))) > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 60
            while find_server(str(made.folder / "mad.db3")) and time.monotonic() < end:
                time.sleep(0.05)
        if made.process:
            made.process.wait(60)


def upgrade(box, archive, *flags):
    return box.run("upgrade", str(archive), "--yes", "--wait", "90", *flags, timeout=300)


def version(box):
    return box.admin("GET", "/version").json["version"]


def left_over(box):
    """What an upgrade has left in both folders."""
    return sorted(
        path.name
        for folder in (box.folder, box.archive.parent)
        for path in folder.iterdir()
        if re.search(r"upgrad|\.new$|unpacked", path.name) and not path.name.endswith(".lock")
    )


class TestTheSignature:
    """RFC 8032: Ed25519 of one line with the digest of the archive."""

    KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    DIGEST = hashlib.sha256(b"an archive").hexdigest()

    def signed(self, key, digest=DIGEST, form="microauthd-archive-v1 {}\n"):
        return base64.b64encode(key.sign(form.format(digest).encode())) + b"\n"

    def raw(self, *keys):
        return [key.public_key().public_bytes_raw() for key in keys]

    def test_one_of_the_trusted_keys_is_enough(self):
        check_signature(self.DIGEST, self.signed(self.KEY), self.raw(self.OTHER, self.KEY))

    @pytest.mark.parametrize(
        "case, reason",
        [
            ("a stranger", "none of the keys"), ("another archive", "none of the keys"), ("no line", "none of the keys"),
            ("no key", "no key is trusted"), ("half", "damaged"), ("no base64", "damaged"), ("empty", "damaged"),
        ],
    )
    def test_nothing_else_is_taken(self, case, reason):
        signature, keys = self.signed(self.KEY), self.raw(self.KEY)
        if case == "a stranger":
            keys = self.raw(self.OTHER)
        elif case == "another archive":
            signature = self.signed(self.KEY, hashlib.sha256(b"another").hexdigest())
        elif case == "no line":
            signature = self.signed(self.KEY, form="{}")
        elif case == "no key":
            keys = []
        else:
            signature = {"half": signature[:40], "no base64": b"\xff" * 88, "empty": b""}[case]
        with pytest.raises(StartupError, match=reason):
            check_signature(self.DIGEST, signature, keys)

    def test_the_keys_are_lines_of_a_file(self, tmp_path):
        line = b"ed25519 " + base64.b64encode(self.raw(self.KEY)[0]) + b" the builder\n"
        (tmp_path / "keys").write_bytes(b"# who builds\n\n" + line)
        assert read_trusted_keys(str(tmp_path / "keys")) == self.raw(self.KEY)

    @pytest.mark.parametrize("line", ["ed25519", "ed25519 AAAA x", "rsa AAAA", "ed25519 ****", "AAAA"])
    def test_a_line_that_is_none_is_refused(self, line):
        with pytest.raises(StartupError, match="keys:2: not a line of the form"):
            parse_trusted_keys("# first\n" + line, "keys")

    def test_a_file_that_others_can_write_is_not_believed(self, tmp_path):
        (tmp_path / "keys").write_text("")
        (tmp_path / "keys").chmod(0o666)
        with pytest.raises(StartupError, match="can be written by others"):
            read_trusted_keys(str(tmp_path / "keys"))

    def test_a_named_file_must_be_there(self, tmp_path):
        with pytest.raises(StartupError, match="are not there"):
            read_trusted_keys(str(tmp_path / "keys"))


class TestTheCopy:
    def test_what_is_checked_is_a_private_copy_and_its_digest(self, tmp_path):
        (tmp_path / "new").write_bytes(b"x" * 3_000_000)
        (tmp_path / "copy").symlink_to(tmp_path / "victim")  # an old one is not written through
        digest = copy_archive(str(tmp_path / "new"), str(tmp_path / "copy"))
        assert digest == hashlib.sha256(b"x" * 3_000_000).hexdigest()
        info = (tmp_path / "copy").lstat()
        assert info.st_size == 3_000_000 and info.st_mode & 0o777 == 0o600 and not (tmp_path / "victim").exists()


    def test_a_full_disk_is_said(self, tmp_path):
        (tmp_path / "new").write_bytes(b"x" * 3_000_000)

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
            with pytest.raises(StartupError, match="cannot be copied to .*copy: File too large"):
                copy_archive(str(tmp_path / "new"), str(tmp_path / "copy"))

        assert in_child(work) == 0


class TestOneAtATime:
    """All have one copy: it must be the checked one that is installed, and one journal, which each would go back by."""

    def other(self, archive):
        """What another call is told."""
        with pytest.raises(StartupError) as refused, room.hold_archive(archive, 0.2):
            pass
        return str(refused.value)

    def test_another_waits_and_is_refused(self, tmp_path):
        archive = str(tmp_path / "microauthd.pyz")
        with room.hold_archive(archive):
            assert "another upgrade" in self.other(archive)
            assert stat.S_IMODE(os.stat(archive + ".lock").st_mode) == 0o600  # nobody else can hold it: flock(2)
        with room.hold_archive(archive, 0.2):
            pass
        assert os.listdir(tmp_path) == []

    def test_what_a_killed_one_has_left_to_finish_it_keeps_others_off(self, tmp_path):
        archive = str(tmp_path / "microauthd.pyz")
        reading, writing = os.pipe()

        def work():
            with room.hold_archive(archive):
                if not os.fork():
                    os.close(writing)
                    os.read(reading, 1)
                    os._exit(0)
                die()

        assert in_child(work) == signal.SIGKILL
        assert "another upgrade" in self.other(archive)
        os.close(writing)
        with room.hold_archive(archive, 20):
            pass

    def test_the_command_touches_nothing_of_the_one_that_runs(self, tmp_path, monkeypatch):
        archive, ended = str(tmp_path / "microauthd.pyz"), []
        for name in ("", ".new", ".upgrade"):
            Path(archive + name).write_text(name)
        monkeypatch.setattr(room, "STOP_SECONDS", 0.2)
        monkeypatch.setattr(room, "DataProcess", lambda *words: SimpleNamespace(end=lambda: ended.append(1)))
        work = room.Upgrade(archive, archive, [], {}, 1)
        with room.hold_archive(archive), pytest.raises(StartupError, match="another upgrade"):
            room.upgrade(work, archive, [], "")
        assert ended and {path.name for path in tmp_path.iterdir()} == {
            f"microauthd.pyz{name}" for name in ("", ".new", ".upgrade")
        }


class TestASlowStart:
    """A new release may take longer than --wait to open the database. Nobody who looks there finds its process."""

    @pytest.mark.parametrize("is_resumed", [False, True])
    def test_it_is_ended_before_the_old_data_are_put_back(self, tmp_path, monkeypatch, is_resumed):
        archive, steps = tmp_path / "microauthd.pyz", []
        archive.write_text("new")
        Path(f"{archive}.previous").write_text("old")
        started = []

        def start_server(running, environ):
            started.append(subprocess.Popen(["/bin/sh", "-c", 'exec "$@"', "sh", *running.argv]))
            return started[-1]

        def call(step, **more):
            steps.append((step, started[0].poll() is None))
            if step == "stop":
                room.stop_process(more["pid"])
            return {"pid": 0, "state": "T", "reason": "no server has started"}

        monkeypatch.setattr(room, "start_server", start_server)
        monkeypatch.setattr(room, "DataProcess", lambda *words: SimpleNamespace(call=call))
        journal = room.Journal("1", "2", Running("process", argv=["sleep", "47"]))
        try:
            assert room.Upgrade(str(archive), str(archive), [], {}, 0).start(journal) == "no server has started"
            if is_resumed:
                journal = msgspec.json.decode(Path(f"{archive}.upgrade").read_bytes(), type=room.Journal)
            room.Upgrade(str(archive), str(archive), [], {}, 0).take_back(journal)
            assert archive.read_text() == "old" and len(started) == 2 and started[1].poll() is None
            assert ("stop", True) in steps and ("go_back", False) in steps and ("go_back", True) not in steps
        finally:
            for process in started:
                process.kill()
                process.wait()

    def test_another_process_that_got_its_id_is_left_alone(self):
        assert not room.is_started(room.Journal("1", "2", Running("process", argv=["sleep", "47"]), os.getpid()))
        assert not room.is_started(room.Journal("1", "2", Running("unit"), os.getpid()))


class TestTheData:
    """The steps on the data, each by itself."""

    @pytest.fixture
    def side(self, house):
        side = DataSide(house)
        yield side
        side.clear()

    def rows(self, house):
        idp = opened(house)
        found = idp.store.meta("row")
        idp.store.close()
        return found

    def put(self, house, value):
        idp = opened(house)
        idp.store.put_meta("row", value)
        idp.store.close()

    def test_what_was_there_at_the_stop_is_put_back_and_no_login_ends(self, house, side, tmp_path):
        self.put(house, "old")
        ring = (tmp_path / "token.pem").read_bytes()
        side.hold()
        side.release()
        self.put(house, "new")
        (tmp_path / "token.pem").write_bytes(ring + b"# later\n")
        side.go_back()
        side.clear()
        assert self.rows(house) == "old" and (tmp_path / "token.pem").read_bytes() == ring
        assert not list(tmp_path.glob("*before-upgrade*")) and not (tmp_path / "mad.db3.upgrading").exists()
        idp = opened(house)
        assert idp.revoked_before == 0
        idp.store.close()

    def test_nothing_of_the_new_release_stays_not_even_in_the_log(self, house, side, tmp_path):
        self.put(house, "old")
        side.hold()
        side.release()

        def work():
            opened(house).store.put_meta("row", "new")
            die()

        in_child(work)
        assert (tmp_path / "mad.db3-wal").stat().st_size
        side.go_back()
        side.clear()
        assert self.rows(house) == "old"

    def test_what_a_killed_server_left_in_the_log_is_put_back_too(self, house, side, tmp_path):
        def work():
            opened(house).store.put_meta("row", "in the log")
            die()

        in_child(work)
        assert (tmp_path / "mad.db3-wal").stat().st_size
        side.hold()
        side.release()
        self.put(house, "new")
        side.go_back()
        side.clear()
        assert self.rows(house) == "in the log"

    def test_others_are_kept_off_until_it_is_over(self, house, side):
        side.hold()
        with pytest.raises(StartupError, match="is running"), hold_database(house.db_file):
            pass
        side.release()
        with hold_database(house.db_file):
            pass
        with pytest.raises(StartupError, match="at work"), hold_setup(house.config_file, shared=True):
            pass
        side.clear()
        with hold_setup(house.config_file):
            pass

    def test_a_program_is_on_trial_as_long_as_the_upgrade_runs(self, house, side, tmp_path):
        assert not is_on_trial(house.db_file)
        side.hold()
        assert is_on_trial(house.db_file)
        side.accept()
        assert not is_on_trial(house.db_file)

    def test_of_an_upgrade_that_died_the_program_is_accepted_before_it_answers(self, house, side, tmp_path):
        side.hold()
        os.close(side.state)
        side.state = -1
        side.release()
        side.locks.close()
        assert not is_on_trial(house.db_file)
        assert (tmp_path / "mad.db3.upgrading").read_bytes() == ACCEPTED
        with pytest.raises(StartupError, match="answered already"):
            side.go_back()

    def test_an_upgrade_that_died_on_the_way_back_is_finished_by_the_next_start(self, house, side, tmp_path):
        self.put(house, "old")
        side.hold()
        side.release()
        self.put(house, "new")
        side.note(GOING_BACK)
        os.close(side.state)
        side.state = -1
        side.locks.close()
        assert not is_on_trial(house.db_file)
        recover_upgrade(house)
        assert self.rows(house) == "old" and (tmp_path / "mad.db3.upgrading").read_bytes() == ACCEPTED
        with pytest.raises(StartupError, match="answered already"):
            side.go_back()

    def test_a_full_disk_leaves_the_data_as_they_are(self, house, side, tmp_path):
        before = (tmp_path / "mad.db3").read_bytes()

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
            child = DataSide(house)
            with pytest.raises(OSError, match="too large"):
                child.hold()
            assert child.describe()["state"] == ""
            child.clear()

        assert in_child(work) == 0
        assert (tmp_path / "mad.db3").read_bytes() == before and not list(tmp_path.glob("*before-upgrade*"))


class TestHowTheServerRuns:
    def test_a_secret_that_only_its_environment_had_must_be_given_again(self, monkeypatch):
        child = subprocess.Popen(
            ["sleep", "60"], env={"MAD_DB_PASS": "", "MAD_AUTH_PORT": "9040", "PATH": os.environ["PATH"]}
        )
        try:
            time.sleep(0.2)
            with pytest.raises(StartupError, match="was given MAD_DB_PASS"):
                read_environ(child.pid, {})
            assert read_environ(child.pid, {"MAD_DB_PASS": "x"}) == {
                "MAD_AUTH_PORT": "9040", "PATH": os.environ["PATH"],
            }
        finally:
            child.kill()
            child.wait()

    def test_one_of_another_file_is_refused(self, tmp_path):
        (tmp_path / "microauthd.pyz").write_text("")
        with pytest.raises(StartupError, match="was not started from"):
            find_running(os.getpid(), os.geteuid(), str(tmp_path / "microauthd.pyz"), {})

    def test_one_of_another_user_is_refused(self, tmp_path, monkeypatch):
        """The number of the process stands in a file of the data's owner, who could name any."""
        monkeypatch.setattr(room, "runs_from", lambda *_: True)
        with pytest.raises(StartupError, match="runs as user"):
            find_running(os.getpid(), os.geteuid() + 1, "x", {})

    def test_none_runs(self):
        assert find_running(0, 0, "x", {}) == Running("none")

    def test_a_unit_is_stopped_with_its_sockets_and_started_with_them(self, tmp_path, monkeypatch):
        """As systemctl(1) is called; there is no systemd here."""
        script = tmp_path / "systemctl"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n'
            f'case $1 in show) echo MainPID={os.getpid()}; echo TriggeredBy=box-auth.socket box.timer;; esac\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        real = open

        def fake(path, *words, **more):
            if path == f"/proc/{os.getpid()}/cgroup":
                (tmp_path / "cgroup").write_text("0::/system.slice/box.service\n")
                path = tmp_path / "cgroup"
            return real(path, *words, **more)

        monkeypatch.setattr(room, "open", fake, raising=False)
        running = room.find_unit(os.getpid())
        assert (running.kind, running.unit, running.sockets) == ("unit", "box.service", ["box-auth.socket"])
        room.stop_unit(running)
        assert room.start_server(running, {}) is None
        assert (tmp_path / "called").read_text().splitlines()[1:] == [
            "stop box-auth.socket box.service", "reset-failed box.service", "start box-auth.socket box.service",
        ]


class TestRefused:
    """Before anything changes."""

    @pytest.fixture(scope="class")
    def box(self, tmp_path_factory, cache):
        """One for all of them, as each leaves it as it was."""
        with box_of_its_own(tmp_path_factory.mktemp("refused"), cache) as made:
            yield made

    @pytest.mark.parametrize(
        "case, reason",
        [
            ("unsigned", "cannot be read.*--unsigned does without"), ("a stranger's", "none of the keys"),
            ("no selftest", "selftest of the new archive fails"), ("older", "of an older release"),
            ("damaged", "selftest of the new archive fails"), ("missing", "there is no file"),
            ("a dry run", ""), ("nobody to ask", "--yes says"),
            ("a downgrade", "0.0.9 is older than .*--downgrade says"),
        ],
    )
    def test_it_is_said_and_nothing_changes(self, box, releases, tmp_path, case, reason):
        archive, flags = tmp_path / "new.pyz", ["--yes", "--unsigned"]
        if case != "missing":
            shutil.copy(releases(case if case in CHANGES else "good"), archive)
        if case in ("unsigned", "a stranger's"):
            flags = ["--yes", "--trusted-keys", str(tmp_path / "keys")]
            key = TestTheSignature.KEY.public_key().public_bytes_raw()
            (tmp_path / "keys").write_bytes(b"ed25519 " + base64.b64encode(key) + b" builder\n")
        if case == "a stranger's":
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            (tmp_path / "new.pyz.sig").write_bytes(TestTheSignature().signed(TestTheSignature.OTHER, digest))
        if case == "damaged":
            content = bytearray(archive.read_bytes())
            content[len(content) // 2] ^= 1
            archive.write_bytes(content)
        if case == "a dry run":
            flags = ["--dry-run", "--unsigned"]
        if case == "nobody to ask":
            flags = ["--unsigned"]
        before, data = box.archive.read_bytes(), (box.folder / "mad.db3").read_bytes()
        done = box.run("upgrade", str(archive), *flags, timeout=300)
        if case == "a dry run":
            assert done.returncode == 0 and "Nothing was done" in done.stdout and NEW in done.stdout, done
        else:
            assert done.returncode == 1 and re.search(reason, done.stderr), done
        assert box.archive.read_bytes() == before and (box.folder / "mad.db3").read_bytes() == data
        assert left_over(box) == [] and os.listdir(box.archive.parent) == ["microauthd.pyz"]


class TestUpgrade:
    def test_a_good_one_is_in_place_and_nobodys_login_ends(self, box, releases, tmp_path):
        archive = releases("good")
        key = TestTheSignature.KEY
        (tmp_path / "keys").write_bytes(b"ed25519 " + base64.b64encode(key.public_key().public_bytes_raw()) + b" x\n")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        Path(f"{archive}.sig").write_bytes(TestTheSignature().signed(key, digest))
        box.start()
        bearer, token, old = box.admin_token(), box.token().json["access_token"], box.archive.read_bytes()
        done = upgrade(box, archive, "--trusted-keys", str(tmp_path / "keys"))
        assert done.returncode == 0 and f"{NEW} is in place and ready" in done.stdout, done
        assert version(box) == NEW and box.archive.read_bytes() == archive.read_bytes()
        assert box.admin("GET", "/users", bearer=bearer).status == 200
        assert box.auth("/introspect", {"token": token}, client=box.client).json["active"] is True
        assert box.token().status == 200 and left_over(box) == []
        assert (tmp_path / "bin" / "microauthd.pyz.previous").read_bytes() == old
        (backup,) = (box.folder / "backups").iterdir()
        assert backup.name.startswith(f"microauthd-before-upgrade-{VERSION}-") and str(backup) in done.stdout
        status = box.admin("GET", "/status", bearer=bearer).json
        assert status["versions"]["schema"] == str(len(MIGRATIONS) + 1) and status["last_backup"]["kind"] == "upgrade"
        assert box.process.wait(60) == 0, "the old one ended by itself"

    @pytest.mark.parametrize("case", ["not ready", "no start"])
    def test_one_that_does_not_become_ready_is_taken_back_and_nothing_answered_is_lost(self, box, releases, case):
        box.start()
        bearer, made, statuses, stop = box.admin_token(), [], set(), threading.Event()

        def make_users():
            while not stop.is_set():
                name = f"user{len(made)}x{time.monotonic_ns()}"
                with contextlib.suppress(OSError, ValueError):
                    answer = box.admin(
                        "POST", "/users",
                        json_body={"username": name, "email": f"{name}@example.org", "password": PASSWORD}, bearer=bearer,
                    )
                    statuses.add(answer.status)
                    made.extend([name] if answer.status == 200 else [])
                time.sleep(0.02)

        thread = threading.Thread(target=make_users)
        thread.start()
        try:
            done = box.run("upgrade", str(releases(case)), "--yes", "--unsigned", "--wait", "15", timeout=300)
        finally:
            stop.set()
            thread.join()
        assert done.returncode == 3 and f"{VERSION} is in place" in done.stderr, done
        assert version(box) == VERSION and left_over(box) == []
        assert statuses == ({200, 503} if case == "not ready" else {200}), "the new one answered, and nothing it could lose"
        there = box.admin("GET", "/users?limit=1000", bearer=bearer).body.decode()
        assert len(made) > 5 and not [name for name in made if f'"{name}"' not in there]
        if case == "no start":  # and another one can be installed
            assert upgrade(box, releases("good"), "--unsigned", "--no-backup").returncode == 0 and version(box) == NEW

    def test_a_server_of_one_process_is_upgraded_too(self, box, releases):
        conf = box.folder / "mad.conf"
        conf.write_text(re.sub(r"(?m)^workers = 1$", "workers = 0", conf.read_text()))
        box.start()
        assert len(box.pids()) == 1
        bearer = box.admin_token()
        done = upgrade(box, releases("good"), "--unsigned", "--no-backup")
        assert done.returncode == 0 and version(box) == NEW, done
        assert box.admin("GET", "/users", bearer=bearer).status == 200 and left_over(box) == []

    def test_an_older_one_is_taken_where_it_is_meant_and_the_database_stays(self, box, releases):
        box.start()
        bearer, archive = box.admin_token(), releases("a downgrade")
        key = TestTheSignature.KEY
        keys = box.folder / "keys"
        keys.write_bytes(b"ed25519 " + base64.b64encode(key.public_key().public_bytes_raw()) + b" x\n")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        Path(f"{archive}.sig").write_bytes(TestTheSignature().signed(key, digest))
        refused = upgrade(box, archive, "--no-backup", "--trusted-keys", str(keys))
        assert refused.returncode == 1 and "0.0.9 is older" in refused.stderr and version(box) == VERSION, refused
        done = upgrade(box, archive, "--no-backup", "--trusted-keys", str(keys), "--downgrade")
        assert done.returncode == 0 and version(box) == "0.0.9", done
        assert box.admin("GET", "/users", bearer=bearer).status == 200 and left_over(box) == []
        back = upgrade(box, f"{box.archive}.previous", "--no-backup", "--unsigned")
        assert back.returncode == 0 and version(box) == VERSION, back

    def test_without_a_server_the_file_is_replaced(self, box, releases):
        done = upgrade(box, releases("good"), "--unsigned")
        assert done.returncode == 0 and "start the server" in done.stdout and left_over(box) == [], done
        box.start()
        assert version(box) == NEW


DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from appliance import upgrade
upgrade.check_program = lambda *_: {version!r}  # seconds, before anything changes: TestRefused
def die(name):
    # A new release that never becomes ready is given up soon; the old one has the time that a busy machine takes.
    work.wait = 90 if name in ("stopped again", "data back", "archive back", "cleared") else {wait}
    if name == {step!r}:
        if not {is_guarded}:
            os.kill(work.guard_pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
work = upgrade.Upgrade({archive!r}, {archive!r}, [], dict(os.environ), 90, die)
sys.exit(upgrade.upgrade(work, {source!r}, ["--yes", "--unsigned", "--no-backup"], ""))
"""


class TestAKillInTheMiddle:
    """Whenever it comes, the box starts, and the next call finishes what was begun or takes it back."""

    @pytest.mark.parametrize(
        "release, step, is_started",
        [
            # The data are kept; the file is new and nothing runs; the new one answers; the old data are back.
            ("good", "held", True), ("good", "replaced", False), ("good", "accepted", True), ("not ready", "data back", True),
            *(
                pytest.param("good", step, True, marks=LONG)
                for step in ("journal", "stopped", "replaced", "released", "started", "done")
            ),
            pytest.param("good", "held", False, marks=LONG),
            *(
                pytest.param("not ready", step, True, marks=LONG)
                for step in ("stopped again", "archive back", "cleared")
            ),
        ],
    )
    def test_at_each_step(self, box, releases, release, step, is_started):
        box.start()
        bearer = box.admin_token()
        self.kill(box, releases(release), step, is_guarded=False)
        self.await_unlocked(box)
        if is_started and not find_server(str(box.folder / "mad.db3")):
            box.start(wait=False)
        if is_started:
            self.await_answer(box, bearer)
        again = self.drive(box, releases("good"))
        if "run this again" in again.stdout:
            self.await_answer(box, bearer)
            assert version(box) in (VERSION, NEW)
            again = self.drive(box, releases("good"))
        assert again.returncode == 0 and version(box) == NEW and left_over(box) == [], again
        assert box.admin("GET", "/users", bearer=bearer).status == 200

    @pytest.mark.parametrize(
        "release, step, said, in_place",
        [
            ("good", "stopped", "interrupted, and .* is back", VERSION),
            ("good", "replaced", "interrupted, and .* is back", VERSION),
            ("good", "released", "interrupted, and .* is back", VERSION),
            ("good", "accepted", "interrupted, and is finished", NEW),
            ("not ready", "data back", "interrupted, and .* is back", VERSION),
        ],
    )
    def test_what_it_leaves_behind_brings_the_server_back_by_itself(self, box, releases, release, step, said, in_place):
        box.start()
        bearer = box.admin_token()
        done = self.kill(box, releases(release), step, is_guarded=True)
        assert re.search(said, done.stderr), done
        assert find_server(str(box.folder / "mad.db3")) and version(box) == in_place and left_over(box) == []
        assert box.admin("GET", "/users", bearer=bearer).status == 200

    def kill(self, box, source, step, is_guarded):
        """Kill an upgrade at a step. Its output ends with what it has left behind."""
        done = self.drive(box, source, step, is_guarded)
        assert done.returncode == -signal.SIGKILL, done
        return done

    def drive(self, box, source, step="", is_guarded=True):
        driver = DRIVER.format(
            root=str(ROOT), step=step, archive=str(box.archive), source=str(source), is_guarded=is_guarded, version=NEW,
            wait=4 if "not-ready" in source.name else 90,
        )
        return subprocess.run(
            [sys.executable, "-c", driver], cwd=box.folder, env=box.environ, capture_output=True, text=True,
            timeout=300,
        )

    def await_unlocked(self, box):
        """Wait until what worked on the data has ended with the upgrade."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                with contextlib.suppress(FileNotFoundError), open(box.folder / "mad.db3.upgrading") as state:
                    fcntl.flock(state, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            time.sleep(0.05)
        raise AssertionError("the state is still locked")

    def await_answer(self, box, bearer):
        """Wait until the box answers what it answered before."""
        end, answer = time.monotonic() + 60, None
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                answer = box.admin("GET", "/users", bearer=bearer)
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"{answer}: {box.said()[-2000:]}")
