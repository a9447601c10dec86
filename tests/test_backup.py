"""Backup: what a copy of the box is, and how it is made and fetched over ADMIN."""

import dataclasses
import hashlib
import os
import resource
import signal
import threading
import time

import jwt
import microauthd as m
import pytest
from box import Box
from conftest import FILES, PASSWORD, Caller, die, fresh_machine, in_child, kids, made, opened, states
from appliance import backup
from appliance.base import StartupError
from appliance.base.clock import RELEASED_AT
from appliance.base.database import read_database_key
from appliance.base.store import Store
from appliance.base.objects import CreateUser
from appliance.backup import (
    check_copy, delete_backup, hold_backup_folder, make_backup, read_backup_piece, write_backup,
)
from appliance.machine import MACHINE
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
        assert call("DELETE", f"/backup/{path.name}").status == 200 and not path.exists()
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
