"""Backup: what a copy of the box is, and how it is made and fetched over ADMIN."""

import dataclasses
import errno
import fcntl
import hashlib
import io
import os
import re
import resource
import signal
import stat
import subprocess
import threading
import time

import jwt
import microauthd as m
import msgspec
import pytest
from box import Box
from conftest import DAY, FILES, PASSWORD, Caller, die, fresh_machine, in_child, kids, made, opened, states
from appliance import backup
from appliance.base import StartupError
from appliance.base.clock import RELEASED_AT
from appliance.base.log import Log
from appliance.base.database import read_database_key
from appliance.base.store import Store
from appliance.base.objects import CreateUser
from appliance.backup import (
    Schedule, check_copy, delete_backup, hold_backup_folder, is_due, make_backup, read_backup_piece, read_schedule,
    run_schedule, scheduled_prefix, write_backup,
)
from appliance.machine import MACHINE
from appliance.base.metrics import show_metrics
from appliance.status import gather_status
from appliance.upkeep import BackupThread
from appliance.recovery import back_up, describe_keys, open_idp, restore


class TestWhatABackupIs:
    def test_it_tells_of_the_copy_and_not_of_the_database(self, house, monkeypatch):
        """Whoever reads "up to" must find it in there."""
        real = Store.copy_to

        def copy_then_write(store, *words):
            real(store, *words)
            idp = open_idp(house)
            m.create_user(idp, m.LOCAL.acting_as("t"), CreateUser("late", "late@example.org", PASSWORD))
            idp.store.close()

        monkeypatch.setattr(Store, "copy_to", copy_then_write)
        assert back_up(house, "b")["users"] == 1

    def test_a_kill_in_the_middle_leaves_no_backup_and_the_next_one_is_good(self, house, tmp_path):
        for name in ("check_copy", "sync_directory"):

            def work():
                setattr(backup, name, die)
                back_up(house, "b", force=True)

            assert in_child(work) == signal.SIGKILL
            assert (tmp_path / "b").exists() is (name == "sync_directory")
        (tmp_path / "b.backing-up-journal").write_bytes(os.urandom(5000))
        assert back_up(house, "b", force=True)["users"] == 1
        assert not list(tmp_path.glob("*.backing-up*"))

    def test_a_full_disk_leaves_no_half_file_and_a_sentence(self, house, tmp_path):
        """The limit of a file's size: the same error on the way, at many places of it."""
        whole = back_up(house, "whole")["bytes"]
        for room in (40_000, 80_000, whole // 2, whole - 4096):

            def work():
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                with pytest.raises(StartupError, match="cannot be written"):
                    back_up(house, "b")

            assert in_child(work) == 0
            assert not (tmp_path / "b").exists() and not list(tmp_path.glob("b*"))
        assert check_copy(house.db_file, read_database_key(house.db_file, "a phrase", False))["users"] == 1

    @pytest.mark.parametrize("name", FILES)
    def test_it_never_writes_over_what_it_reads(self, house, tmp_path, name):
        before = states(tmp_path)
        with pytest.raises(StartupError, match="what is to be backed up"):
            back_up(house, name, force=True)
        assert states(tmp_path) == before

    def test_without_a_passphrase_keys_stay_out_of_it_and_are_needed_beside_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = made(tmp_path, db_pass="", no_db_pass=True)
        with pytest.raises(StartupError, match="--without-keys"):
            back_up(options, "b")
        back_up(options, "b", without_keys=True)
        content = (tmp_path / "b").read_bytes()
        assert (
            b"PRIVATE KEY" not in content
            and b"oidc-issuer" not in content
            and (tmp_path / "seal.key").read_bytes().strip() not in content
        )
        before = kids(options)
        restore(options, "b")
        assert kids(options) == before
        folder, other = fresh_machine(tmp_path, monkeypatch, no_db_pass=True)
        with pytest.raises(StartupError, match="without keys"):
            restore(other, str(tmp_path / "b"))
        assert states(folder) == {}


    @pytest.mark.parametrize("name", ["seal.key", "token.pem", "admin_token.pem"])
    def test_with_a_key_missing_it_is_refused(self, house, tmp_path, name):
        """A backup that cannot restore the box is none."""
        idp = open_idp(house)
        os.unlink(name)
        with pytest.raises(StartupError, match=name):
            write_backup(idp, m.LOCAL.acting_as("t"), str(tmp_path / "b"))
        idp.store.close()
        assert not list(tmp_path.glob("b*"))


class TestBesideARunningServer:
    def test_every_change_that_was_acknowledged_is_in_the_backup(self, tmp_path):
        """Users made over ADMIN and tokens issued by two workers, while the backup is made."""
        with Box(tmp_path / "data", workers="2") as box:
            stop, users, tokens = threading.Event(), [], []
            bearer = box.admin_token()

            def make_users():
                while not stop.is_set():
                    name = f"user{len(users)}"
                    answer = box.admin(
                        "POST", "/users",
                        json_body={"username": name, "email": f"{name}@example.org", "password": PASSWORD},
                        bearer=bearer,
                    )
                    assert answer.status == 200, answer
                    users.append(name)

            def make_tokens():
                while not stop.is_set():
                    tokens.append(box.token().json["access_token"])

            threads = [threading.Thread(target=make_users), threading.Thread(target=make_tokens)]
            for thread in threads:
                thread.start()
            try:
                while len(users) < 5 or len(tokens) < 20:
                    assert all(thread.is_alive() for thread in threads)
                promised = []
                for number in range(2):
                    promised.append(list(users))
                    done = box.run("backup", f"{number}.backup")
                    assert done.returncode == 0, done.stderr
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            key = read_database_key(str(box.folder / "1.backup"), "a database phrase", False)
            for number, names in enumerate(promised):
                copy = Store(box.folder / f"{number}.backup", key)
                assert names and all(copy.find_account_by_name(name) for name in names) and copy.verify_audit()["valid"]
                copy.close()
            last = tokens[-1]
            box.stop()
            done = box.run("restore", "1.backup")
            assert done.returncode == 0 and "up to" in done.stdout, done.stderr
            box.start()
            assert (
                box.auth("/me", bearer=last).status == 401 and box.admin("GET", "/users", bearer=bearer).status == 401
            )
            assert (
                jwt.get_unverified_header(box.token().json["access_token"])["kid"]
                == jwt.get_unverified_header(last)["kid"]
            )
            answer = box.admin("GET", "/users?limit=1000", bearer=box.admin_token())
            assert answer.status == 200 and all(f'"{name}"'.encode() in answer.body for name in promised[1])

    def test_one_made_over_admin_comes_whole_through_the_network(self, tmp_path):
        folder = tmp_path / "data" / "backups"
        with Box(tmp_path / "data", workers="2") as box:
            bearer = box.admin_token()
            made = box.admin("POST", "/backup", json_body={}, bearer=bearer)
            assert made.status == 200, made
            large = folder / "microauthd-20260101T000000Z-00000000.backup"
            large.write_bytes(os.urandom(2_500_000))
            for path in (folder / made.json["name"], large):
                content, offset = b"", "0"
                while offset:
                    piece = box.admin("GET", f"/backup/{path.name}?offset={offset}", bearer=bearer)
                    assert piece.status == 200, piece
                    content, offset = content + piece.body, piece.headers.get("X-Next-Offset")
                assert content == path.read_bytes()
            fetched = box.mad("backup", "fetched", MAD_ADMIN_TOKEN=bearer)
            assert fetched.returncode == 0 and "1 users, 1 clients" in fetched.stdout, fetched
            assert sorted(path.name for path in folder.iterdir()) == sorted((made.json["name"], large.name)), (
                "what was fetched is not kept"
            )
            box.stop()
            done = box.run("restore", "fetched")
            assert done.returncode == 0, done.stderr


class TestOverAdmin:
    """POST /backup: into a folder the operator chose, fetched in pieces."""

    @pytest.fixture
    def call(self, house, tmp_path):
        (tmp_path / "backups").mkdir()
        options = dataclasses.replace(house, backup_folder=str(tmp_path / "backups"), admin_domain="localhost")
        idp = open_idp(options)
        admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp))
        bearer = admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "t"}).json["access_token"]

        def call(method, path):
            return admin(method, path, json_body={} if method == "POST" else None, bearer=bearer)

        call.idp = idp
        yield call
        idp.store.close()

    def test_it_is_made_fetched_in_pieces_restored_and_removed(self, house, call, tmp_path, monkeypatch):
        monkeypatch.setattr("appliance.backup.BACKUP_PIECE", 50_000)
        made = call("POST", "/backup")
        assert made.status == 200 and made.json["users"] == 1, made
        (path,) = (tmp_path / "backups").iterdir()
        assert path.name == made.json["name"] and path.stat().st_mode & 0o777 == 0o600
        content, offset, pieces = b"", 0, 0
        while offset is not None:
            piece = call("GET", f"/backup/{path.name}?offset={offset}")
            assert piece.status == 200 and len(piece.body) <= 50_000 and piece.headers["cache-control"] == "no-store"
            content, pieces = content + piece.body, pieces + 1
            offset = int(piece.headers["x-next-offset"]) if "x-next-offset" in piece.headers else None
        assert (
            pieces > 2
            and hashlib.sha256(content).hexdigest() == made.json["sha256"]
            and len(content) == made.json["bytes"]
        )
        (path.parent / "another.file").write_bytes(b"x")
        (path.parent / "microauthd-20260101T000000Z-0000000a.backup").symlink_to(tmp_path / "token.pem")
        (path.parent / "microauthd-20250101T000000Z-00000001.backup").write_bytes(b"1234")
        listed = call("GET", "/backup").json
        assert listed == [
            {"name": path.name, "created_at": listed[0]["created_at"], "bytes": made.json["bytes"],
             "sha256": made.json["sha256"], "kind": "admin"},
            {"name": "microauthd-20250101T000000Z-00000001.backup", "created_at": "2025-01-01T00:00:00Z", "bytes": 4,
             "sha256": None, "kind": "admin"},
        ]
        assert abs(m.read_time(listed[0]["created_at"]) - call.idp.now()) < 60
        assert call("DELETE", f"/backup/{path.name}").status == 200 and not path.exists()
        assert path.name not in {row["name"] for row in call("GET", "/backup").json}
        assert [row.action for row in call.idp.store.list_audit(limit=2)] == [
            "backup_deleted", "backup_made",
        ] and call.idp.store.list_audit("backup_made", 1)[0].actor_id == m.get_user(call.idp, "root").id
        call.idp.store.close()
        (tmp_path / "fetched").write_bytes(content)
        restore(house, "fetched")
        assert [row["state"] for row in describe_keys(house)] == ["active"] * 3

    @pytest.mark.parametrize(
        "name", ["mad.db3", "..%2Fmad.db3", "microauthd-20260101T000000Z-00000000.backup", "linked", "x" * 300]
    )
    def test_nothing_else_is_read_or_removed(self, call, tmp_path, name):
        if name == "linked":
            name = "microauthd-20260101T000000Z-0000000a.backup"
            (tmp_path / "backups" / name).symlink_to(tmp_path / "token.pem")
            assert call("GET", f"/backup/{name}").status == 404
            return
        (tmp_path / "backups" / "mad.db3").write_text("x")
        assert call("GET", f"/backup/{name}").status == call("DELETE", f"/backup/{name}").status == 404

    def test_one_at_a_time_and_with_room_to_spare(self, call, tmp_path, monkeypatch):
        with hold_backup_folder(call.idp.options):
            answer = call("POST", "/backup")
            assert answer.status == 503 and answer.headers["retry-after"] == "5"
        real = os.fstatvfs
        with monkeypatch.context() as patched:
            patched.setattr(
                os, "fstatvfs", lambda descriptor: os.statvfs_result((*real(descriptor)[:4], 1, *real(descriptor)[5:]))
            )
            assert call("POST", "/backup").status == 503
        (tmp_path / "seal.key").unlink()
        answer = call("POST", "/backup")
        assert (
            answer.status == 503
            and str(tmp_path) not in str(answer.json)
            and not list((tmp_path / "backups").iterdir())
        )

    def test_nobody_else_can_keep_it_from_being_made(self, call, tmp_path):
        """flock(2): whoever can read a folder can lock it, and that of a mounted disk is there for all to read."""
        (tmp_path / "backups").mkdir(exist_ok=True)
        (tmp_path / "backups").chmod(0o755)
        descriptor = os.open(tmp_path / "backups", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            assert call("POST", "/backup").status == 200
            with hold_backup_folder(call.idp.options):
                (lock,) = (tmp_path / "backups").glob(".*")
                assert stat.S_IMODE(lock.stat().st_mode) == 0o600
            assert not lock.exists()
        finally:
            os.close(descriptor)

    def test_where_no_lock_can_be_made_backups_are_read_all_the_same(self, call, monkeypatch):
        name = call("POST", "/backup").json["name"]

        def refuse(path, shared):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(backup, "open_lock", refuse)
        assert call("GET", f"/backup/{name}").status == 200

    def test_what_a_kill_left_is_cleared_away(self, call, tmp_path):
        left = [
            tmp_path / "backups" / f"microauthd-20260101T000000Z-00000000.backup.backing-up{suffix}"
            for suffix in ("", "-journal")
        ]
        kept = tmp_path / "backups" / "mine.backup.backing-up"
        for path in (*left, kept):
            path.write_text("x")
        assert call("POST", "/backup").status == 200 and not any(path.exists() for path in left) and kept.exists()

    def test_an_unencrypted_one_holds_no_keys(self, options, rings, clock, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        idp = m.Idp(
            options, Store.make(tmp_path / "plain.db3", "", RELEASED_AT), m.KeyRing(rings[0]), m.KeyRing(rings[1]),
            m.Seal(bytes(32)), clock, None, MACHINE,
        )
        try:
            with pytest.raises(m.Problem) as refused:
                make_backup(idp, m.LOCAL.acting_as("test"))
            assert "without_keys" in refused.value.errors and not (tmp_path / "backups").exists()
            made = make_backup(idp, m.LOCAL.acting_as("test"), without_keys=True)
            assert (tmp_path / "backups" / made.name).stat().st_size == made.bytes and (
                tmp_path / "backups"
            ).stat().st_mode & 0o777 == 0o700
        finally:
            idp.store.close()

    def test_without_a_folder_there_is_nothing_there(self, make_idp, options):
        idp = make_idp(dataclasses.replace(options, backup_folder=""))
        for call in (
            lambda: make_backup(idp, m.LOCAL.acting_as("test")), lambda: read_backup_piece(idp, "x", 0),
            lambda: delete_backup(idp, m.LOCAL.acting_as("test"), "x"),
        ):
            with pytest.raises(m.Problem, match="not_found"):
                call()


class TestBackupsByThemselves:
    """backup-every and backup-keep: made by the server, verified, and only then are older ones removed."""

    @pytest.fixture
    def idp(self, house, tmp_path, clock):
        options = dataclasses.replace(
            house, backup_folder=str(tmp_path / "backups"), backup_every=DAY, backup_keep=3, token_purge_days=0
        )
        clock.now = float(int(time.time()))
        idp = opened(options, clock)
        idp.log = Log(stream=io.StringIO())
        yield idp
        idp.store.close()

    @pytest.fixture
    def run(self, idp):
        """Make the backup that is due, if one is."""

        def call(pause=lambda: False):
            schedule = read_schedule(idp)
            if is_due(schedule, idp.now(), idp.options.backup_every):
                run_schedule(idp, schedule, pause)
            return read_schedule(idp)

        return call

    def names(self, idp):
        return sorted(os.listdir(idp.options.backup_folder))

    def said(self, idp):
        return idp.log.logger.handlers[0].stream.getvalue()

    def test_one_is_made_a_day_and_restores(self, idp, run, clock, tmp_path, house):
        times = []
        for _ in range(5):
            times.append(run().made_at)
            clock.pass_(DAY / 2)
        assert times[0] == times[1] and times[2] == times[3] == times[0] + DAY and times[4] == times[0] + 2 * DAY
        assert len(self.names(idp)) == 3 and self.said(idp).count("backup.made") == 3
        status = gather_status(idp, 0, {})
        assert status.last_backup.kind == "schedule" and status.last_backup.name == self.names(idp)[-1]
        assert status.backups.next_at == m.iso(times[0] + 3 * DAY) and not status.attention
        idp.store.close()
        restore(house, str(tmp_path / "backups" / self.names(idp)[0]))
        assert [row["state"] for row in describe_keys(house)] == ["active"] * 3

    def test_one_is_made_up_of_those_that_were_missed(self, idp, run, clock):
        due = run().next_at
        clock.now = due + 9 * DAY + 5  # the box was off
        assert run().next_at == clock.now + DAY and len(self.names(idp)) == 2
        run()
        assert len(self.names(idp)) == 2

    def test_a_late_one_does_not_shift_the_next(self, idp, run, clock):
        due = run().next_at
        clock.now = due + 600.0
        assert run().next_at == due + DAY

    @pytest.mark.parametrize("change", [-400 * DAY, 0])
    def test_a_plan_of_a_clock_that_ran_ahead_does_not_hold(self, idp, run, clock, change):
        run()
        clock.pass_(change)
        run()
        assert len(self.names(idp)) == (2 if change else 1)

    def test_the_oldest_go_when_the_new_one_stands_and_nobody_elses(self, idp, run, clock, tmp_path):
        folder = tmp_path / "backups"
        folder.mkdir(mode=0o700)
        others = [
            "microauthd-scheduled-ffffffff-000001-20200101T000000Z.backup",  # another box's
            "microauthd-20200101T000000Z-00000000.backup",  # asked for over ADMIN
            "microauthd-scheduled-ffffffff-000002-20200102T000000Z.backup.backing-up",  # which it is writing
            scheduled_prefix(idp) + "000001-20200101T000000Z.backup.old", "box.backup", "notes.txt",
        ]
        for name in others:
            (folder / name).write_text("x")
        made = []
        for _ in range(6):
            run()
            (new,) = set(self.names(idp)) - set(made) - set(others)
            made.append(new)
            clock.pass_(DAY)
            assert set(self.names(idp)) == {*made[-3:], *others}
        assert made == sorted(made)
        assert [row.target for row in idp.store.list_audit("backup_deleted", 9)] == made[2::-1]

    def test_the_number_and_not_the_clock_says_which_is_old(self, idp, run, clock):
        for _ in range(3):
            run()
            clock.pass_(DAY)
        before = self.names(idp)
        clock.pass_(-300 * DAY)
        run()
        assert self.names(idp)[:2] == before[1:] and len(self.names(idp)) == 3

    @pytest.mark.parametrize(
        "case, reason",
        [
            ("others can write", "can be written by others"), ("a file", "Not a directory|File exists"),
            ("no parent", "not there"), ("full", "no room"), ("no key", "seal.key"), ("a damaged key", "token.pem"),
            ("unplugged", "nothing is mounted"), ("no folder", "not set"),
        ],
    )
    def test_what_fails_is_said_and_leaves_nothing(self, idp, run, clock, tmp_path, monkeypatch, case, reason):
        folder = tmp_path / "backups"
        run()
        before = states(folder)
        clock.pass_(DAY)
        if case == "others can write":
            folder.chmod(0o777)
        elif case == "a file":
            idp.options = dataclasses.replace(idp.options, backup_folder=str(tmp_path / "mad.conf"))
        elif case == "no parent":
            idp.options = dataclasses.replace(idp.options, backup_folder=str(tmp_path / "gone" / "backups"))
        elif case == "no folder":
            idp.options = dataclasses.replace(idp.options, backup_folder="")
        elif case == "full":
            real = os.fstatvfs
            monkeypatch.setattr(
                os, "fstatvfs", lambda fd: os.statvfs_result((*real(fd)[:4], 1, *real(fd)[5:]))
            )
        elif case == "no key":
            (tmp_path / "seal.key").unlink()
        elif case == "a damaged key":
            (tmp_path / "token.pem").write_bytes((tmp_path / "token.pem").read_bytes()[:-40])
        else:
            schedule = read_schedule(idp)
            schedule.mount = str(tmp_path)  # which nothing is mounted on
            idp.store.put_meta("backup_schedule", msgspec.json.encode(schedule).decode())
        after = run()
        assert re.search(reason, after.failure) and (after.tries, after.failures) == (1, 1), after
        assert states(folder) == before and not (tmp_path / "gone").exists()
        (found,) = gather_status(idp, 0, {}).attention
        assert found.code == "backup_failed" and after.failure in found.text and "backup.failed" in self.said(idp)
        counted = show_metrics(idp.counters.totals())
        for outcome in ("success", "failure"):
            assert re.search(f'^microauthd_backups_total{{.*"{outcome}".*}} 1$', counted, re.M), counted

    def test_a_full_disk_leaves_no_half_file_and_the_older_ones(self, idp, tmp_path, run, clock):
        run()
        clock.pass_(DAY)
        before = states(tmp_path / "backups")
        size = len(next(iter(before.values())))

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 4096, size - 4096))
            run()

        assert in_child(work) == 0
        assert states(tmp_path / "backups") == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
    def test_a_disk_that_fills_while_one_is_written_is_said_and_the_next_try_succeeds(
        self, idp, run, clock, tmp_path, monkeypatch
    ):
        folder, real = tmp_path / "backups", Store.copy_to
        folder.mkdir(mode=0o700)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("nothing can be mounted here")
        try:
            run()
            before = states(folder)
            clock.pass_(DAY)

            def fill_and_copy(store, *words):
                """There was room when it began: something else takes it, all but 100 kB."""
                room = os.statvfs(folder)
                (folder / "of-others").write_bytes(bytes(room.f_bavail * room.f_frsize - 102_400))
                real(store, *words)

            monkeypatch.setattr(Store, "copy_to", fill_and_copy)
            failed = run()
            monkeypatch.setattr(Store, "copy_to", real)
            assert re.search("cannot be written: .*full", failed.failure) and failed.next_at == idp.now() + 60
            (folder / "of-others").unlink()
            assert states(folder) == before, "nothing half-written, and no older one less"
            (found,) = gather_status(idp, 0, {}).attention
            assert (found.code, found.severity) == ("backup_failed", "error") and failed.failure in found.text
            assert failed.failure in self.said(idp)
            assert re.search('^microauthd_backups_total{.*"failure".*} 1$', show_metrics(idp.counters.totals()), re.M)
            clock.pass_(60)
            assert run().failure == "" and gather_status(idp, 0, {}).attention == []
            assert len(self.names(idp)) == 2 and states(folder).items() > before.items()
        finally:
            subprocess.run(["umount", "-l", folder], check=True)

    def test_it_is_tried_again_later_and_later_and_well_again_nothing_is_left_of_it(self, idp, run, clock, tmp_path):
        (tmp_path / "seal.key").rename(tmp_path / "away")
        waits = []
        for _ in range(9):
            waits.append(run().next_at - idp.now())
            clock.now = read_schedule(idp).next_at - 1.0
            assert run().tries == len(waits)
            clock.pass_(1)
        assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
        (tmp_path / "away").rename(tmp_path / "seal.key")
        after = run()
        assert (after.failure, after.tries, after.failed_at, after.failures) == ("", 0, 0, 9)
        assert gather_status(idp, 0, {}).attention == []

    def test_of_a_broken_audit_log_one_stands_and_the_older_ones_too(self, idp, run, clock):
        for _ in range(3):
            run()
            clock.pass_(DAY)
        before = self.names(idp)
        idp.store.connection.execute("UPDATE audit SET target = 'forged' WHERE seq = 2")
        after = run()
        assert "row 2 was altered" in after.failure and after.next_at > idp.now() + DAY / 2
        assert len(self.names(idp)) == 4 and self.names(idp)[:3] == before

    @pytest.mark.parametrize("name", ["check_copy", "check_restorable", "sync_directory", "remove_old_backups"])
    def test_a_kill_in_the_middle_leaves_no_rubbish_after_the_next_start(self, idp, run, clock, tmp_path, name):
        for _ in range(3):
            run()
            clock.pass_(DAY)
        before = self.names(idp)
        idp.store.close()  # a child must not inherit a connection

        def work():
            child = opened(idp.options, clock)
            setattr(backup, name, die)
            run_schedule(child, read_schedule(child), lambda: False)

        assert in_child(work) == signal.SIGKILL
        again = opened(idp.options, clock)
        again.log = idp.log
        try:
            BackupThread(again).begin()
            stands = name in ("sync_directory", "remove_old_backups")
            assert self.names(again)[:3] == before and len(self.names(again)) == 3 + stands
            run_schedule(again, read_schedule(again), lambda: False)
            assert len(self.names(again)) == 3 and not {before[0]} & {*self.names(again)}
        finally:
            again.store.close()

    def test_one_that_a_stop_cuts_off_is_no_failure(self, idp, run, tmp_path):
        (tmp_path / "seal.key").unlink()
        assert run(pause=lambda: True) == Schedule() and "backup.failed" not in self.said(idp)

    def test_of_a_database_without_encryption_it_holds_no_keys(self, tmp_path, monkeypatch, clock):
        monkeypatch.chdir(tmp_path)
        options = dataclasses.replace(
            made(tmp_path, db_pass="", no_db_pass=True), backup_folder=str(tmp_path / "b"), backup_every=DAY
        )
        idp = opened(options)
        run_schedule(idp, Schedule(), lambda: False)
        idp.store.close()
        (path,) = (tmp_path / "b").iterdir()
        assert b"PRIVATE KEY" not in path.read_bytes()

    def test_the_server_makes_them(self, tmp_path):
        with Box(tmp_path / "data", workers="1", backup_every="hourly", backup_keep="2") as box:
            folder, end = tmp_path / "data" / "backups", time.monotonic() + 30
            while not (folder.exists() and list(folder.glob("*.backup"))) and time.monotonic() < end:
                time.sleep(0.05)
            (path,) = folder.iterdir()
            assert path.stat().st_mode & 0o777 == 0o600
            status = box.admin("GET", "/status", bearer=box.admin_token()).json
            assert status["last_backup"]["name"] == path.name and status["backups"]["every"] == 3600
            assert box.admin("GET", f"/backup/{path.name}", bearer=box.admin_token()).body[:16]


class TestBackup:
    def test_it_is_one_private_encrypted_file(self, backup, tmp_path):
        assert os.listdir(tmp_path / "out") == ["box.backup"] and backup.stat().st_mode & 0o777 == 0o600
        content = backup.read_bytes()
        for word in (b"root", b"PRIVATE KEY", b"SQLite format", b"a phrase"):
            assert word not in content

    def test_it_does_not_write_over_what_is_there(self, house, backup):
        before = backup.read_bytes()
        with pytest.raises(StartupError, match="--force"):
            back_up(house, str(backup))
        assert backup.read_bytes() == before
        back_up(house, str(backup), force=True)

    def test_it_is_written_down(self, house, backup):
        idp = opened(house)
        assert idp.store.list_audit(limit=1)[0].action == "backup_made"
        idp.store.close()

    @pytest.mark.parametrize("where", ["file/x", "/dev/null", "/proc/x", "/"])
    def test_where_it_cannot_be_written_it_says_so(self, house, tmp_path, where):
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(StartupError):
            back_up(house, str(tmp_path / where), force=True)

    def test_what_was_acknowledged_before_it_is_in_it_while_others_write(self, house, tmp_path):
        stop, done = threading.Event(), []

        def write():
            idp = opened(house)
            while not stop.is_set():
                m.audit(idp, m.LOCAL.acting_as("test"), "write", str(len(done)))
                done.append(1)
                time.sleep(0.001)  # within one process writers have no turns
            idp.store.close()

        thread = threading.Thread(target=write)
        thread.start()
        while len(done) < 20:
            time.sleep(0.001)
        counts = []
        for number in range(3):
            counts.append(len(done))
            back_up(house, str(tmp_path / f"{number}.backup"))
        stop.set()
        thread.join()
        for number, count in enumerate(counts):
            copy = Store(
                tmp_path / f"{number}.backup",
                read_database_key(str(tmp_path / f"{number}.backup"), "a phrase", False),
            )
            assert len(copy.list_audit("write", 100_000)) >= count and copy.verify_audit()["valid"]
            copy.close()
