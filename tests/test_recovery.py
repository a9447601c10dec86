"""At the machine: restore, begin anew, rotate keys, let an administrator in again; on other machines and full disks,
and killed at any point."""

import dataclasses
import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jwt
import microauthd as m
import pyotp
import pytest
from box import ROOT, Box
from conftest import (
    CHEAP, FILES, PASSWORD, die, fresh_machine, in_child, kids, left, made, opened, states, under_way,
)
from appliance.base import StartupError
from appliance.base.clock import RELEASED_AT
from appliance.base.settings import Options, check_options, load_options, parse_flags
from appliance.base.database import read_database_key
from appliance.base.store import FOREVER, MAD_ADMIN_ROLE_ID, MIGRATIONS, Store
from appliance.base.keys import Key, lock_ring, read_ring
from appliance.base.objects import CreateUser
from appliance.backup import check_copy
from appliance.upkeep import advance_key_states
from appliance.processes import hold_database, prepare, read_seal_key
from appliance.recovery import (
    Answers, accept_clock, back_up, describe_keys, factory_reset, hold_folder, hold_setup, open_idp, recover_admin,
    demo_answers, finish_setup, merge_settings, recover_setup, restore, revoke_key, rotate_keys, set_up,
)
from appliance.commands import main

YEAR = 365 * 86400

NEW = "another battery staple"


def rows(options, port="auth"):
    return [(row["alg"], row["state"], row["kid"]) for row in describe_keys(options) if row["port"] == port]


def give_away(house, monkeypatch):
    """Let the database belong to somebody else than this process seems to run as."""
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        os.chown(house.db_file, 12345, -1)


class TestRestore:
    def everything(self, house):
        """What a box has issued, to look whether it lives on: (idp, access token, refresh token)."""
        idp = opened(house)
        account, client = m.get_user(idp, "root"), m.find_client(idp, "app")
        idp.options.__dict__["enable_token_refresh"] = True
        answer = m.issue(idp, client, m.Granted("api:read", "pwd", account, ["pwd"], idp.now()), m.LOCAL)
        return idp, answer

    def test_accounts_come_back_and_nothing_issued_lives_on(self, house, tmp_path):
        idp, before = self.everything(house)
        back_up(house, str(tmp_path / "b"))
        later = m.issue(
            idp, m.find_client(idp, "app"), m.Granted("api:read", "pwd", m.get_user(idp, "root"), ["pwd"], idp.now()),
            m.LOCAL,
        )
        m.create_user(idp, m.LOCAL.acting_as("t"), CreateUser("late", "late@example.org", PASSWORD))
        idp.store.close()
        time.sleep(0.002)
        restore(house, str(tmp_path / "b"))
        idp = opened(house)
        assert (
            m.get_user(idp, "root")
            and idp.store.find_account_by_name("late") is None
            and idp.store.list_audit(limit=1)[0].action == "restored"
            and idp.store.verify_audit()["valid"]
        )
        for answer in (before, later):
            with pytest.raises(m.Problem, match="invalid_token"):
                m.verify_access_token(idp, idp.auth_ring, idp.options.auth_issuer, answer["access_token"])
            assert m.introspect_refresh_token(idp, m.find_client(idp, "app"), answer["refresh_token"]) is None
        fresh = m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)
        assert m.verify_access_token(idp, idp.auth_ring, idp.options.auth_issuer, fresh["access_token"])
        idp.store.close()

    def test_on_a_new_box_one_file_is_enough(self, house, backup, tmp_path, monkeypatch):
        new = tmp_path / "new"
        new.mkdir()
        kids = [row["kid"] for row in describe_keys(house)]
        monkeypatch.chdir(new)
        restore(Options({"config": str(new / "mad.conf")}, **CHEAP, db_pass="a phrase"), str(backup))
        options = load_options(parse_flags(["--config", str(new / "mad.conf")])[0], {})
        assert [row["kid"] for row in describe_keys(options)] == kids and all(
            (new / name).stat().st_mode & 0o077 == 0
            for name in ("mad.conf", "mad.db3", "token.pem", "admin_token.pem", "seal.key")
        )
        idp = opened(options)
        assert m.get_user(idp, "root")
        idp.store.close()

    def test_a_wrong_passphrase_is_refused_and_everything_stays(self, house, backup, tmp_path):
        before = states(tmp_path)
        with pytest.raises(StartupError):
            restore(Options(house.origins, **CHEAP, db_pass="another"), str(backup))
        assert states(tmp_path) == before

    @pytest.mark.parametrize("at", [0, 20, 100, 4095, 4096, 5000, 20_000, 70_000, 150_000, -4096, -100, -1])
    def test_a_flipped_byte_is_refused_and_everything_stays(self, house, backup, tmp_path, at):
        content = bytearray(backup.read_bytes())
        content[at] ^= 1
        bad = tmp_path / "bad"
        bad.write_bytes(content)
        before = states(tmp_path)
        with pytest.raises(StartupError):
            restore(house, str(bad))
        assert states(tmp_path) == before

    @pytest.mark.parametrize("cut", [0, 100, 4096, 100_000])
    def test_a_cut_one_too(self, house, backup, tmp_path, cut):
        (tmp_path / "bad").write_bytes(backup.read_bytes()[:cut])
        with pytest.raises(StartupError):
            restore(house, str(tmp_path / "bad"))

    def test_a_database_is_no_backup(self, house, tmp_path):
        shutil.copy(house.db_file, tmp_path / "plain")
        with pytest.raises(StartupError, match="no backup"):
            restore(house, str(tmp_path / "plain"))

    @pytest.mark.parametrize("when", ["journal", "seal", "auth", "admin", "staged", "committed"])
    def test_killed_at_any_point_it_is_all_or_nothing(self, house, backup, tmp_path, when):
        idp = opened(house)
        m.create_user(idp, m.LOCAL.acting_as("t"), CreateUser("late", "late@example.org", PASSWORD))
        idp.store.close()
        pid = os.fork()
        if not pid:
            restore(house, str(backup), lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == when else None)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        recover_setup(house.origins["config"])
        idp = opened(house)
        assert (idp.store.find_account_by_name("late") is None) is (when == "committed") and m.get_user(idp, "root")
        assert not [path for path in tmp_path.iterdir() if path.name.endswith((".setup", ".new", ".setting-up"))]
        idp.store.close()


    def test_a_log_that_is_damaged_is_asked_nothing_and_left_where_the_backup_is_refused(self, house, tmp_path):
        """What stands in it alone may be which key was revoked: then that is not known, and said."""
        kid = describe_keys(house)[0]["kid"]
        back_up(house, str(tmp_path / "good"))

        def work():
            held = open_idp(house)
            revoke_key(house, kid)
            assert held
            die()

        in_child(work)
        log = Path(house.db_file + "-wal")
        content = bytearray(log.read_bytes())
        content[20] ^= 1
        log.write_bytes(content)
        Path(house.db_file + "-shm").unlink()
        bad = bytearray((tmp_path / "good").read_bytes())
        bad[30_000] ^= 1
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(StartupError):
            restore(house, str(tmp_path / "bad"))
        assert log.read_bytes() == content
        assert restore(house, str(tmp_path / "good"))["knows_revoked"] is False

    @pytest.mark.parametrize("damaged", [True, False], ids=["over a damaged database", "on an empty machine"])
    def test_a_clock_that_is_behind_is_put_right_first(self, house, tmp_path, monkeypatch, damaged):
        """Or what was issued after the backup would live on: nobody knows until when."""
        back_up(house, str(tmp_path / "good"))
        if damaged:
            Path(house.db_file).write_bytes(os.urandom(100_000))
        else:
            factory_reset(house)
        before = states(tmp_path)
        monkeypatch.setattr(m.Idp.__init__, "__defaults__", (lambda: 1000.0, *m.Idp.__init__.__defaults__[1:]))
        with pytest.raises(StartupError, match="clock of this machine is behind"):
            restore(house, str(tmp_path / "good"))
        assert states(tmp_path) == before

    def test_a_command_of_a_newer_release_does_not_change_the_schema_beneath_a_server(
        self, house, tmp_path, monkeypatch
    ):
        idp = opened(house)
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", (*MIGRATIONS, "ALTER TABLE account ADD COLUMN later INTEGER NOT NULL DEFAULT 0;\n")
        )
        with hold_database(house.db_file):
            with pytest.raises(StartupError, match="of an older release: restart it first"):
                back_up(house, str(tmp_path / "copy"))
            assert idp.store.find_account_by_name("root")
        idp.store.close()
        back_up(house, str(tmp_path / "copy"))

    def test_two_backups_under_one_name_do_not_take_each_others_file(self, house, tmp_path, monkeypatch):
        back_up(house, str(tmp_path / "copy"))
        with hold_folder(str(tmp_path)), pytest.raises(StartupError, match="another backup"):
            back_up(house, str(tmp_path / "copy"), force=True)
        back_up(house, str(tmp_path / "copy"), force=True)

    def test_on_a_new_machine_the_settings_within_it_say_where_and_open_the_keys(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = made(
            tmp_path, db_file="data/accounts.db3", token_signing_key_pass="ring phrase", seal_key_file="data/seal"
        )
        back_up(options, "b")
        folder, knows_only_the_passphrase = fresh_machine(tmp_path, monkeypatch)
        restore(knows_only_the_passphrase, str(tmp_path / "b"))
        assert {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(".lock")
        } == {"mad.conf", "data/accounts.db3", "data/seal", "token.pem", "admin_token.pem"}
        found = load_options({"config": (str(folder / "mad.conf"), "flag")}, {})
        idp = open_idp(found)
        assert found.oidc_issuer == "https://idp.example" and m.get_user(idp, "root")
        idp.store.close()

    def test_what_is_said_at_the_machine_goes_before_the_settings_within(self, house, tmp_path, monkeypatch):
        back_up(house, "b")
        folder, options = fresh_machine(tmp_path, monkeypatch)
        options = Options(
            options.origins | {"db-file": "flag --db-file"}, db_pass="a phrase", db_file="elsewhere.db3"
        )
        restore(options, str(tmp_path / "b"))
        assert (folder / "elsewhere.db3").exists() and not (folder / "mad.db3").exists()

    def test_a_revoked_key_does_not_come_back(self, house):
        """Whoever stole it could sign what is issued after the restore."""
        stolen = next(row["kid"] for row in describe_keys(house) if row["alg"] == "ES256" and row["port"] == "auth")
        back_up(house, "b")
        revoke_key(house, stolen)
        for _ in range(2):  # and the box that was restored still knows it
            assert restore(house, "b")["knows_revoked"] is True
            assert stolen not in kids(house)
            assert [row["state"] for row in describe_keys(house)] == ["active"] * 3
            idp = open_idp(house)
            assert f"still_revoked={stolen}" in idp.store.list_audit("restored", 1)[0].secondary
            idp.store.close()

    def test_where_what_was_here_cannot_be_read_it_says_so_and_restores(self, house, tmp_path):
        back_up(house, "b")
        content = bytearray((tmp_path / "mad.db3").read_bytes())
        content[100:200] = bytes(100)
        (tmp_path / "mad.db3").write_bytes(content)
        assert restore(house, "b")["knows_revoked"] is False
        idp = open_idp(house)
        assert m.get_user(idp, "root")
        idp.store.close()

    def test_what_a_killed_server_left_in_its_log_does_not_get_into_the_restored_database(self, house, tmp_path):
        back_up(house, "b")

        def write():
            idp = open_idp(house)
            m.create_user(idp, m.LOCAL.acting_as("t"), CreateUser("late", "late@example.org", PASSWORD))
            die()

        assert in_child(write) == signal.SIGKILL
        assert (tmp_path / "mad.db3-wal").stat().st_size
        for name in ("mad.db3", "mad.db3-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"{name}.kept")
        assert in_child(lambda: restore(house, "b", lambda name: name == "committed" and die())) == signal.SIGKILL
        shutil.copy(tmp_path / "mad.db3-wal.kept", tmp_path / "mad.db3-wal")
        recover_setup(house.origins["config"])
        idp = open_idp(house)
        assert (
            idp.store.find_account_by_name("late") is None
            and idp.store.verify_audit()["valid"]
            and idp.store.check_integrity() == ""
        )
        idp.store.close()

    def test_its_epoch_is_later_than_what_either_box_issued_whatever_the_clock_says(self, house):
        back_up(house, "b")
        idp = open_idp(house)
        idp.store.put_meta("revoked_before", 9_000_000_000_000)
        idp.store.close()
        restore(house, "b")
        idp = open_idp(house)
        answer = m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)
        assert idp.revoked_before > 9_000_000_000_000 and m.verify_access_token(
            idp, idp.auth_ring, house.auth_issuer, answer["access_token"]
        )
        idp.store.close()

    def test_a_flipped_byte_anywhere_is_refused(self, house, tmp_path):
        """Every page in order, a byte of it by chance."""
        back_up(house, "b")
        content, before = (tmp_path / "b").read_bytes(), None
        chance = random.Random(1)
        key = read_database_key("b", "a phrase", False)
        for page in range(0, len(content), 4096):
            at = page + chance.randrange(16 if page == 0 else 0, 4096)
            bad = bytearray(content)
            bad[at] ^= 1 << chance.randrange(8)
            (tmp_path / "bad").write_bytes(bad)
            with pytest.raises(StartupError):
                check_copy("bad", key)
        before = states(tmp_path)
        with pytest.raises(StartupError):
            restore(house, "bad")
        assert states(tmp_path) == before

    def test_a_full_disk_leaves_everything_as_it_was(self, house, tmp_path):
        back_up(house, "b")
        before = states(tmp_path)
        size = (tmp_path / "b").stat().st_size
        for room in (2000, 50_000, size - 1):

            def work():
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                assert main(["restore", "b", "--config", str(tmp_path / "mad.conf")]) == 1, "refused, with a sentence"

            assert in_child(work) == 0
            assert states(tmp_path) == before

    @pytest.mark.parametrize("when", ["journal", "database", "config", "seal", "auth", "admin", "staged", "committed"])
    def test_killed_on_a_new_machine_there_is_all_or_nothing(self, house, tmp_path, monkeypatch, when):
        back_up(house, "b")
        folder, options = fresh_machine(tmp_path, monkeypatch)
        assert (
            in_child(lambda: restore(options, str(tmp_path / "b"), lambda name: name == when and die()))
            == signal.SIGKILL
        )
        recover_setup(options.origins["config"])
        assert set(states(folder)) == (set(FILES) if when == "committed" else set())

    def test_it_waits_for_nobody_and_nobody_works_beside_it(self, house, tmp_path):
        back_up(house, "b")
        with (
            hold_setup(house.origins["config"], shared=True),
            hold_setup(house.origins["config"], shared=True),
        ):
            with pytest.raises(StartupError, match="at work"):
                restore(house, "b")
        with hold_setup(house.origins["config"]):
            for words in (["backup", "c"], ["keys", "list"], ["factory-reset", "--yes"]):
                assert main([*words, "--config", str(tmp_path / "mad.conf")]) == 1
        assert not (tmp_path / "c").exists() and (tmp_path / "mad.db3").exists()

    def test_root_leaves_no_file_that_the_user_of_the_server_could_not_read(self, house, monkeypatch):
        """It has become that user before; what of another is left is refused."""
        back_up(house, "b")
        give_away(house, monkeypatch)
        for act in (
            lambda: restore(house, "b"), lambda: back_up(house, "c"), lambda: rotate_keys(house, ["auth"]),
        ):
            with pytest.raises(StartupError, match="belongs to user"):
                act()

    def test_a_restore_forgets_what_was_under_way(self, house, tmp_path):
        idp = opened(house)
        under_way(idp, m.get_user(idp, "root").id)
        idp.store.close()
        back_up(house, str(tmp_path / "b"))
        restore(house, str(tmp_path / "b"))
        idp = opened(house)
        assert left(idp) == [0, 0]
        idp.store.close()

    def test_the_epoch_of_a_restore_on_a_new_machine_is_later_than_what_the_backup_knows(self, house, tmp_path):
        idp = opened(house)
        idp.store.put_meta("revoked_before", 9_000_000_000_000)
        idp.store.close()
        back_up(house, str(tmp_path / "b"))
        os.unlink(house.db_file)
        restore(house, str(tmp_path / "b"))
        idp = opened(house)
        assert idp.revoked_before > 9_000_000_000_000
        idp.store.close()

    def test_a_restore_waits_for_who_changes_a_ring(self, house, tmp_path):
        back_up(house, str(tmp_path / "b"))
        with lock_ring(house.token_signing_key_file):
            thread = threading.Thread(target=restore, args=(house, str(tmp_path / "b")))
            thread.start()
            thread.join(1.5)
            assert thread.is_alive()
        thread.join(60)
        assert not thread.is_alive()


class TestLinks:
    """A link is followed to the file: beside that lie its locks, its log and what is to take its place."""

    @pytest.fixture
    def linked(self, house, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        for name in ("mad.db3", "token.pem", "seal.key"):
            (tmp_path / name).rename(data / name)
            (tmp_path / name).symlink_to(data / name)
        return load_options({"config": [str(tmp_path / "mad.conf")]}, {})

    def test_a_damaged_log_is_found_beside_the_file(self, linked, tmp_path):
        def work():
            open_idp(linked).store.put_meta("x", "y")
            die()

        in_child(work)
        log = tmp_path / "data" / "mad.db3-wal"
        content = bytearray(log.read_bytes())
        content[20] ^= 1
        log.write_bytes(content)
        with pytest.raises(StartupError, match="write-ahead log"):
            open_idp(linked)
        assert log.read_bytes() == content

    def test_two_names_are_one_database(self, linked, tmp_path):
        with hold_database(linked.db_file), pytest.raises(StartupError, match="is running on .*: stop it first"):
            with hold_database(str(tmp_path / "data" / "mad.db3")):
                pass

    def test_a_stolen_key_goes_from_the_file_and_a_reset_takes_all(self, linked, tmp_path):
        kid = describe_keys(linked)[0]["kid"]
        revoke_key(linked, kid)
        assert (tmp_path / "token.pem").is_symlink() and kid not in [
            Key(entry).kid for entry in read_ring(str(tmp_path / "data" / "token.pem"), "")
        ]
        factory_reset(linked)
        assert not [path.name for path in (tmp_path / "data").iterdir() if not path.name.endswith(".lock")]


class TestKeys:
    def test_two_rotations_at_once_are_one(self, house):
        rotate_keys(house, ["auth"])
        with pytest.raises(StartupError, match="waits to sign"):
            rotate_keys(house, ["auth"])

    @pytest.mark.parametrize("waiting", [False, True])
    def test_a_revoked_key_signs_and_verifies_nothing_any_more(self, house, waiting):
        idp = opened(house)
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        token = m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)[
            "access_token"
        ]
        if waiting:
            rotate_keys(house, ["auth"], ["ES256"])
        kid = jwt.get_unverified_header(token)["kid"]
        assert revoke_key(house, kid) == "auth"
        idp.next_ring_check = 0
        with pytest.raises(m.Problem, match="invalid_token"):
            m.verify_access_token(idp, idp.auth_ring, idp.options.auth_issuer, token)
        assert (
            kid not in idp.auth_ring.jwks().decode()
            and idp.auth_ring.access.alg == "ES256"
            and idp.store.list_audit(limit=1)[0].action == "key_revoked"
        )
        with pytest.raises(StartupError):
            revoke_key(house, kid)
        idp.store.close()


    @pytest.fixture
    def at(self, monkeypatch):
        """Set the clock of the machine so many seconds off."""
        real, rest = time.time, m.Idp.__init__.__defaults__[1:]

        def call(seconds):
            monkeypatch.setattr(time, "time", lambda: real() + seconds)
            monkeypatch.setattr(m.Idp.__init__, "__defaults__", (time.time, *rest))

        return call

    def note_time(self, house):
        idp = opened(house)
        idp.store.put_meta("clock", int(time.time()))
        idp.store.close()

    def test_no_key_waits_for_a_time_that_a_wrong_clock_says(self, house, at):
        self.note_time(house)
        before = describe_keys(house)
        at(10 * YEAR)
        with pytest.raises(StartupError, match="days ahead"):
            rotate_keys(house, ["auth"])
        accept_clock(house)
        rotate_keys(house, ["auth"], ["ES256"])
        at(0)
        accept_clock(house)
        assert all(row["since"] <= time.time() for row in describe_keys(house))
        at(1000)
        assert [row["state"] for row in describe_keys(house) if row["kid"] == before[0]["kid"]] == ["retired"]
        rotate_keys(house, ["auth"])

    def test_who_accepts_the_clock_drops_what_is_under_way(self, house):
        """Its times were taken from a clock that was wrong, and nothing tells which of them are."""
        idp = opened(house)
        under_way(idp, m.get_user(idp, "root").id)
        assert left(idp) == [1, 1]
        accept_clock(house)
        assert left(idp) == [0, 0]
        idp.store.close()

    def test_each_acceptance_has_a_stamp_of_its_own(self, house, monkeypatch):
        """A running server compares it with the one it knows: two in one second must be two."""
        stamps, now = set(), time.time()
        monkeypatch.setattr(time, "time", lambda: now)
        monkeypatch.setattr(m.Idp.__init__, "__defaults__", (time.time, *m.Idp.__init__.__defaults__[1:]))
        for _ in range(2):
            accept_clock(house)
            idp = opened(house)
            stamps.add(idp.store.meta("clock_accepted"))
            idp.store.close()
        assert len(stamps) == 2 and "" not in stamps

    def test_a_clock_that_is_before_the_release_is_not_accepted(self, house, at):
        at(RELEASED_AT - time.time() - 10)
        with pytest.raises(StartupError, match="before this program was made"):
            accept_clock(house)
        idp = opened(house)
        assert idp.store.meta("clock_accepted") == ""
        idp.store.close()

    def test_a_revocation_under_a_wrong_clock_lets_no_other_key_sign_early(self, house, at):
        self.note_time(house)
        (waiting,) = rotate_keys(house, ["auth"], ["ES256"])
        (stolen,) = (row["kid"] for row in describe_keys(house) if row["port"] == "auth" and row["alg"] == "RS256")
        at(10 * YEAR)
        revoke_key(house, stolen)
        states = {Key(entry).kid: entry.state for entry in read_ring(house.token_signing_key_file, "")}
        assert states[waiting] == "next" and stolen not in states

    def test_the_rings_are_two_files(self, house):
        for name in ("admin_token_signing_key_file", "seal_key_file", "db_file"):
            with pytest.raises(StartupError, match="the same file"):
                check_options(Options(house.origins, **{name: os.path.abspath(house.token_signing_key_file)}))


class TestAdminRecovery:
    def test_a_locked_out_administrator_gets_in_again_and_nobody_elses_session_lives_on(self, house):
        idp = opened(house)
        account = m.get_user(idp, "root")
        seed = m.new_totp_seed()
        m.enable_totp(idp, account, seed, pyotp.TOTP(seed).now())
        idp.store.set_account_active(account.id, 0, idp.now())
        idp.store.set_lockout(account.id, FOREVER, idp.now())
        idp.store.unassign_role(account.id, MAD_ADMIN_ROLE_ID)
        before = idp.store.find_account(account.id).revoked_before
        assert recover_admin(house, "ROOT", "another\u00a0battery staple", drop_totp=True) == "recovered"
        found, amr = m.authenticate_user(idp, m.LOCAL, "root", "another battery staple", admin=True)
        assert (
            amr == ["pwd"]
            and found.revoked_before > before
            and idp.store.list_audit("admin_recovered")[0].actor_id == "machine"
        )
        idp.store.close()

    def test_one_is_made_where_there_is_none_of_that_name(self, house):
        assert recover_admin(house, "second", "another battery staple") == "made"
        idp = opened(house)
        assert m.authenticate_user(idp, m.LOCAL, "second", "another battery staple", admin=True)
        idp.store.close()

    def test_the_second_factor_stays_unless_its_removal_is_asked_for(self, house):
        idp, seed = opened(house), m.new_totp_seed()
        m.enable_totp(idp, m.get_user(idp, "root"), seed, pyotp.TOTP(seed).at(idp.now()))
        for drop_totp in (False, True):
            recover_admin(house, "root", NEW, drop_totp=drop_totp)
            assert bool(m.get_user(idp, "root").totp_sealed) is not drop_totp
        idp.store.close()

    def test_a_weak_password_is_refused_and_changes_nothing(self, house):
        with pytest.raises(m.Problem):
            recover_admin(house, "root", "short")

    def test_it_is_for_the_user_whose_server_it_is(self, house, monkeypatch):
        give_away(house, monkeypatch)
        for act in (
            lambda: recover_admin(house, "root", "another battery staple"), lambda: back_up(house, "x"),
            lambda: factory_reset(house), lambda: rotate_keys(house, ["auth"]),
        ):
            with pytest.raises(StartupError, match="belongs to user"):
                act()


class TestOwners:
    @pytest.mark.parametrize("name", FILES)
    def test_every_file_of_a_box_is_believed_only_if_nobody_else_can_write_it(self, house, tmp_path, name):
        readers = {
            "mad.conf": lambda: load_options({"config": (house.config_file, "flag")}, {}),
            "mad.db3": lambda: read_database_key(house.db_file, house.db_pass, False),
            "token.pem": lambda: read_ring(house.token_signing_key_file, ""),
            "admin_token.pem": lambda: read_ring(house.admin_token_signing_key_file, ""),
            "seal.key": lambda: read_seal_key(house.seal_key_file),
        }
        (tmp_path / name).chmod(0o602)
        for act in (readers[name], lambda: back_up(house, "b")):
            with pytest.raises(StartupError, match=f"{name} can be written by others"):
                act()
        assert not (tmp_path / "b").exists() and (tmp_path / name).stat().st_mode & 0o777 == 0o602

    @pytest.mark.parametrize(
        "act",
        [
            lambda house: prepare(house), lambda house: back_up(house, "b"), lambda house: factory_reset(house),
            lambda house: rotate_keys(house, ["auth"]), lambda house: restore(house, "out/box.backup"),
            lambda house: set_up(house, Answers("root", "root@example.org", PASSWORD, keep_keys=True)),
        ],
    )
    def test_nothing_is_done_in_a_folder_that_others_can_write(self, house, backup, tmp_path, act):
        tmp_path.chmod(0o1777)
        before = states(tmp_path)
        try:
            with pytest.raises(StartupError, match="can be written by others"):
                act(house)
            assert states(tmp_path) == before
        finally:
            tmp_path.chmod(0o700)


class TestFactoryReset:
    def test_a_link_of_somebody_else_is_not_followed(self, house, tmp_path):
        """What it leads to would be overwritten."""
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "victim").write_text("precious")
        (tmp_path / "shared").chmod(0o777)
        (tmp_path / "seal.key").unlink()
        (tmp_path / "seal.key").symlink_to(tmp_path / "shared" / "victim")
        with pytest.raises(StartupError, match="can be written by others"):
            factory_reset(house)
        assert (tmp_path / "shared" / "victim").read_text() == "precious"

    def test_nothing_of_before_is_left(self, house, tmp_path):
        gone = factory_reset(house)
        assert (
            {os.path.basename(path) for path in gone} >= {"mad.db3", "token.pem", "admin_token.pem", "seal.key"}
            and not (tmp_path / "mad.db3").exists()
            and (tmp_path / "mad.conf").exists()
        )
        set_up(house, Answers("root", "root@example.org", PASSWORD))

    def test_what_a_rotation_that_was_killed_left_goes_too(self, house, tmp_path):
        def work():
            os.replace = die
            rotate_keys(house, ["auth"])

        in_child(work)
        assert list(tmp_path.glob("*.new"))
        factory_reset(house)
        assert not list(tmp_path.glob("*.new"))

    @pytest.mark.parametrize("nth", range(1, 5))
    def test_cut_off_in_the_middle_it_is_done_by_doing_it_again(self, house, tmp_path, nth):

        def work():
            real, calls = os.unlink, []

            def deadly(path):
                real(path)
                calls.append(path)
                if len(calls) == nth:
                    die()

            os.unlink = deadly
            factory_reset(house)

        assert in_child(work) == signal.SIGKILL
        assert not (tmp_path / "seal.key").exists()
        factory_reset(house)
        assert set(states(tmp_path)) == {"mad.conf"}

    def test_what_lay_there_is_overwritten_before_it_goes(self, house, tmp_path):
        """A second name of the same file shows what is left on the disk."""
        before = {}
        for name in FILES[1:]:
            os.link(tmp_path / name, tmp_path / f"kept {name}")
            before[name] = (tmp_path / name).read_bytes()
        factory_reset(house)
        for name, content in before.items():
            left = (tmp_path / f"kept {name}").read_bytes()
            assert len(left) == len(content) and not any(
                content[at : at + 32] in left for at in range(0, len(content) - 31, 512)
            )


class TestBesideARunningServer:
    """The commands as an operator types them."""

    def test_back_up_rotate_recover_and_restore(self, tmp_path):
        with Box(tmp_path / "data", workers="2", key_overlap="1") as box:
            old = box.token().json["access_token"]
            assert box.run("backup", "box.backup").returncode == 0 and box.run("backup", "box.backup").returncode == 1
            assert (
                box.run("restore", "box.backup").returncode == 1
                and "running" in box.run("restore", "box.backup").stderr
            )
            assert box.run("factory-reset", "--yes").returncode == 1
            kid = jwt.get_unverified_header(old)["kid"]
            done = box.run("keys", "rotate", "--ring", "auth", "--alg", "ES256")
            assert done.returncode == 0, done.stderr
            end = time.monotonic() + 60
            while jwt.get_unverified_header(box.token().json["access_token"])["kid"] == kid:
                assert time.monotonic() < end, "every worker takes the new key up"
                time.sleep(0.05)
            assert box.auth("/me", bearer=old).status == 200 and kid in box.auth("/jwks.json").body.decode()
            assert box.run("keys", "revoke", "--kid", kid).returncode == 0
            end = time.monotonic() + 60
            while box.auth("/me", bearer=old).status == 200:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert {row["state"] for row in json.loads(box.run("keys", "list", "--json").stdout)} == {"active"}
            token = box.admin_token()
            done = box.run(
                "admin", "recover", "--username", "root", "--password-stdin", input="another battery staple\n"
            )
            assert done.returncode == 0 and box.admin("GET", "/users", bearer=token).status == 401, done.stderr
            box.PASSWORD = "another battery staple"
            fresh = box.token().json["access_token"]
            assert box.admin("GET", "/audit-logs/verify", bearer=box.admin_token()).json["valid"] is True
            box.stop()
            done = box.run("restore", "box.backup")
            assert done.returncode == 0, done.stderr
            box.PASSWORD = Box.PASSWORD
            box.start()
            assert (
                box.auth("/me", bearer=fresh).status == box.auth("/me", bearer=old).status == 401
                and box.token().status == 200
                and box.admin_token()
            )
            box.stop()
            assert box.run("factory-reset", "--yes").returncode == 0 and box.run("serve").returncode == 1

    def test_typed_wrongly_it_destroys_nothing(self, tmp_path):
        box = Box(tmp_path / "data").set_up()
        assert box.run("factory-reset").returncode == 1 and (box.folder / "mad.db3").exists()
        assert box.run("restore", "nothing").returncode == 1
        box.run("backup", "b")
        done = box.run("restore", "b", MAD_DB_PASS="another")
        assert done.returncode == 1 and "Traceback" not in done.stderr and "another" not in done.stderr

    def log_in(self, box, username, password, **more):
        return box.admin("POST", "/token", {"username": username, "password": password, "client_id": "test"} | more)

    def recover(self, box, username, *words):
        done = box.run("admin", "recover", "--username", username, "--password-stdin", *words, input=NEW + "\n")
        assert done.returncode == 0 and NEW not in done.stdout + done.stderr, done.stderr
        return done.stdout

    def test_one_of_a_new_name_is_made_and_one_who_lost_everything_gets_in_again(self, tmp_path):
        with Box(tmp_path / "data", workers="2") as box:
            root = box.admin_token()
            assert "administrator second made" in self.recover(box, "Second")
            second = self.log_in(box, "second", NEW).json["access_token"]
            (user,) = [user for user in box.admin("GET", "/users", bearer=root).json if user["username"] == "second"]

            # What can keep an administrator out: a second factor that is lost, a lockout, a role that is gone.
            seed = box.admin("POST", f"/users/{user['id']}/totp/enroll", json_body={}, bearer=root).json["secret"]
            assert (
                box.admin(
                    "POST", f"/users/{user['id']}/totp/verify", json_body={"code": pyotp.TOTP(seed).now()}, bearer=root
                ).status
                == 200
            )
            assert (
                box.admin(
                    "POST", f"/users/{user['id']}/set-lockout", json_body={"lockout_until": "9999-12-31T23:59:59Z"},
                    bearer=root,
                ).status
                == 200
            )
            assert (
                box.admin(
                    "POST", "/roles/unassign", json_body={"user_id": user["id"], "role_id": "MadAdmin"}, bearer=root
                ).status
                == 200
            )
            assert self.log_in(box, "second", NEW).status == 403

            said = self.recover(box, "second")
            assert "recovered" in said and "no lockout" in said and "second factor" not in said
            assert self.log_in(box, "second", NEW).status == 403, "the second factor stays unless it is to go"
            assert "no second factor" in self.recover(box, "second", "--disable-totp")
            fresh = self.log_in(box, "second", NEW)
            assert (
                fresh.status == 200
                and box.admin("GET", "/users", bearer=second).status == 401
                and box.admin("GET", "/users", bearer=root).status == 200
            )
            rows = box.admin("GET", "/audit-logs?action=admin_recovered", bearer=root).json
            assert [row["actor_id"] for row in rows] == ["machine"] * 3 and [row["target"] for row in rows] == [
                user["id"]
            ] * 3
            assert NEW not in box.said()

    def test_no_route_leads_to_any_of_this(self):
        """The network can neither recover an administrator, restore nor reset."""
        for routes in (m.AUTH, m.ADMIN):
            for route in routes.routes:
                assert not any(
                    word in path
                    for path in route.paths
                    for word in ("admin/recover", "/recover/", "restore", "factory", "reset-box")
                ), route.paths


class TestRotation:
    def test_it_is_all_rings_or_none(self, house):
        rotate_keys(house, ["admin"])
        before = rows(house)
        with pytest.raises(StartupError, match="waits to sign"):
            rotate_keys(house, ["auth", "admin"])
        assert rows(house) == before

    def test_an_algorithm_that_does_not_sign_is_refused(self, house):
        with pytest.raises(StartupError, match="no key of admin signs with RS256"):
            rotate_keys(house, ["admin"], ["RS256"])

    def test_a_clock_behind_the_times_is_put_right_first(self, house, monkeypatch):
        """Once it is, the new key would sign at once, and no cache would know it."""
        before = rows(house)
        with monkeypatch.context() as patched:
            patched.setattr(m.Idp, "now", lambda idp: RELEASED_AT - 86400)
            with pytest.raises(StartupError, match="clock"):
                rotate_keys(house, ["auth"])
        assert rows(house) == before

    @pytest.mark.parametrize("act", ["rotate", "revoke"])
    @pytest.mark.parametrize("step", ["os.fsync", "os.replace", "after os.replace"])
    @pytest.mark.parametrize("nth", [1, 2])
    def test_killed_at_any_point_a_ring_is_whole_and_the_command_can_be_repeated(
        self, house, monkeypatch, act, step, nth
    ):
        before = rows(house)
        name = step.split(".")[-1]

        def work():
            real, calls = getattr(os, name), []

            def deadly(*words):
                calls.append(1)
                if len(calls) == nth and not step.startswith("after"):
                    die()
                real(*words)
                if len(calls) == nth:
                    die()

            setattr(os, name, deadly)
            rotate_keys(house, ["auth", "admin"]) if act == "rotate" else revoke_key(house, before[0][2])

        assert in_child(work) == (0 if act == "revoke" and name == "replace" and nth == 2 else signal.SIGKILL), (
            "a revocation replaces one file"
        )
        for port in ("auth", "admin"):
            states = [state for _, state, _ in rows(house, port)]
            assert states.count("active") == (2 if port == "auth" else 1) and set(states) <= {"active", "next"}
        if act == "revoke" and before[0] in rows(house):
            revoke_key(house, before[0][2])
        if act == "revoke":
            assert before[0][2] not in [kid for _, _, kid in rows(house)]
        for port in ("auth", "admin"):
            if "next" not in [state for _, state, _ in rows(house, port)]:
                rotate_keys(house, [port])

    def test_what_time_has_done_is_seen_after_a_restart_and_written_by_the_upkeep(self, house, monkeypatch):
        (new,) = rotate_keys(house, ["auth"], ["ES256"])
        later = time.time() + 901
        monkeypatch.setattr(time, "time", lambda: later)
        assert ("ES256", "active", new) in rows(house) and b"state=next" in open(
            house.token_signing_key_file, "rb"
        ).read()
        idp = open_idp(house)
        idp.clock = lambda: later
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        advance_key_states(idp)
        idp.store.close()
        content = open(house.token_signing_key_file, "rb").read()
        assert b"state=next" not in content and b"state=retired" in content


class TestUnderLoad:
    def test_no_verification_fails_while_both_rings_rotate_and_a_stolen_key_goes(self, tmp_path):
        """Clients of a serving box that keep the key set exactly as long as they are told."""
        with Box(tmp_path / "data", workers="2", key_overlap="4") as box:
            stop, failures, seen, counts = threading.Event(), [], set(), [0, 0]

            def client(number):
                cached, until = {}, 0
                while not stop.is_set():
                    token = box.token().json["access_token"]
                    kid = jwt.get_unverified_header(token)["kid"]
                    if time.monotonic() >= until:
                        asked = time.monotonic()  # an answer that was long under way is as old as that. RFC 9111 §4.2.3
                        answer = box.auth("/jwks.json")
                        control = answer.headers["Cache-Control"]
                        until = asked + int(control.partition("max-age=")[2] or 0)
                        cached = {key["kid"]: jwt.PyJWK(key).key for key in answer.json["keys"]}
                    try:
                        jwt.decode(token, cached[kid], algorithms=["ES256"], audience="api")
                    except (KeyError, jwt.PyJWTError) as error:
                        failures.append(repr(error))
                    seen.add(kid)
                    counts[number] += 1

            # One process made its first key set before the new key was there, and says max-age=2.
            assert box.auth("/jwks.json").headers["Cache-Control"] == "public, max-age=2"
            threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            try:
                end = time.monotonic() + 60
                while not all(counts):
                    assert time.monotonic() < end
                admin_token = box.admin_token()
                done = box.run("keys", "rotate")
                assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stderr
                while len(seen) < 2:
                    assert time.monotonic() < end and not failures, failures
                sofar = list(counts)
                while any(count < before + 50 for count, before in zip(counts, sofar)):
                    assert time.monotonic() < end and not failures, failures
                assert box.admin("GET", "/users", bearer=admin_token).status == 200, (
                    "the old ADMIN key is good until its last token is dead"
                )
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert failures == [] and len(seen) == 2
            said = json.loads(box.run("keys", "list", "--json").stdout)
            assert sorted(row["state"] for row in said) == ["active"] * 3 + ["retired"] * 3
            assert box.admin("GET", "/audit-logs/verify", bearer=box.admin_token()).json["valid"] is True


class TestAtTheMachine:
    @pytest.mark.parametrize("step", ["set_password_hash", "assign_role", "clear_totp", "append_audit"])
    def test_killed_in_the_middle_it_has_done_nothing(self, house, step):
        def work():
            setattr(Store, step, die)
            recover_admin(house, "root", NEW, drop_totp=True)

        assert in_child(work) == signal.SIGKILL
        idp = open_idp(house)
        account, _ = m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)
        assert account.username == "root" and not idp.store.list_audit("admin_recovered")
        idp.store.close()

    def test_an_empty_answer_sets_no_password(self, house, tmp_path):
        with pytest.raises(m.Problem):
            recover_admin(house, "root", "")
        idp = open_idp(house)
        assert m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)
        idp.store.close()


class TestSetUp:
    def test_the_first_administrator_is_written_down(self, house):
        idp = opened(house)
        (row,) = idp.store.list_audit("role_assigned")
        assert (row.actor_id, row.target, row.secondary) == ("setup", m.get_user(idp, "root").id, MAD_ADMIN_ROLE_ID)
        idp.store.close()

    def test_a_database_is_encrypted_or_knowingly_not(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(StartupError, match="contradict each other"):
            made(tmp_path, no_db_pass=True)
        with pytest.raises(StartupError, match="needs db-pass"):
            made(tmp_path, db_pass="")
        assert not (tmp_path / "mad.db3").exists()

    def test_it_never_overwrites_an_identity(self, house, tmp_path):
        before = states(tmp_path)
        with pytest.raises(StartupError):
            made(tmp_path)
        assert states(tmp_path) == before

    @pytest.mark.parametrize("found", ["token.pem", "admin_token.pem", "seal.key"])
    def test_keys_that_are_there_are_not_taken_for_ours(self, house, tmp_path, found):
        """Whoever put them there could sign tokens of the box that is made."""
        for name in FILES:
            if name != found:
                (tmp_path / name).unlink()
        before = states(tmp_path)
        with pytest.raises(StartupError, match=f"{found} is there already: .* setup --keep-keys takes it over"):
            set_up(house, Answers("root", "root@example.org", PASSWORD))
        assert states(tmp_path) == before

    def test_signing_keys_that_are_there_are_kept_if_somebody_says_so(self, house, tmp_path):
        """Somebody relies on them; and the seal opens the second factors of a backup."""
        before, seal = kids(house), (tmp_path / "seal.key").read_bytes()
        for path in tmp_path.glob("mad.db3*"):
            path.unlink()
        set_up(house, Answers("root", "root@example.org", PASSWORD, keep_keys=True))
        assert kids(house) == before and (tmp_path / "seal.key").read_bytes() == seal

    def test_each_file_has_a_name_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("seal_key_file", "token_signing_key_file", "admin_token_signing_key_file", "db_file"):
            with pytest.raises(StartupError, match="different files"):
                made(tmp_path, **{name: "./mad.conf"})
        assert list(tmp_path.glob("*.pem")) == list(tmp_path.glob("mad.conf")) == []

    @pytest.mark.parametrize("named", ["db-file = mad.db3\n", "auth-port = 9140\n", "db-file = {}/mad.db3\n"])
    def test_a_box_is_not_set_up_a_second_time_with_another_database(self, house, tmp_path, named):
        """It would have a second administrator, and the first database no settings."""
        (tmp_path / "mad.conf").write_text(named.format(tmp_path))
        before = states(tmp_path)
        other = dataclasses.replace(
            house, db_file="other.db3", token_signing_key_file="a.pem", admin_token_signing_key_file="b.pem",
            seal_key_file="c",
        )
        with pytest.raises(StartupError, match="set up already: the database .*mad.db3 is there"):
            set_up(other, Answers("second", "second@example.org", PASSWORD))
        assert states(tmp_path) == before

    def test_settings_of_a_box_that_is_to_be_are_no_box(self, house, tmp_path):
        """Another box in this folder does not count where the settings lie elsewhere and name no database."""
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mad.conf").write_text("auth-port = 9140\n")
        names = {
            name: f"new/{name}"
            for name in ("db_file", "token_signing_key_file", "admin_token_signing_key_file", "seal_key_file")
        }
        made(tmp_path / "new", **names)
        assert (tmp_path / "new" / "db_file").exists()


class TestJournal:
    """It says what to remove and to replace, so it is believed only from its owner, about files that options name."""

    def leave(self, folder, committed, *files):
        path = folder / "mad.conf.setting-up"
        path.write_text(json.dumps({"committed": committed, "files": [[f"{file}.setup", str(file)] for file in files]}))
        path.chmod(0o600)
        return path

    @pytest.mark.parametrize("committed", [True, False])
    def test_no_file_that_no_option_names_is_touched(self, house, tmp_path, committed):
        precious = tmp_path / "precious"
        precious.write_text("of somebody")
        (tmp_path / "precious.setup").write_text("planted")
        journal = self.leave(tmp_path, committed, precious)
        with pytest.raises(StartupError, match="names .*precious, which no option names"):
            recover_setup(house.config_file)
        assert precious.read_text() == "of somebody" and (tmp_path / "precious.setup").exists() and journal.exists()

    @pytest.mark.parametrize("files", [[["{0}/elsewhere", "{0}/mad.db3"]], [["{0}/mad.db3", "{0}/mad.db3.setup"]]])
    def test_a_staged_file_lies_beside_what_it_is_for(self, house, tmp_path, files):
        (tmp_path / "elsewhere").write_text("x")
        journal = tmp_path / "mad.conf.setting-up"
        named = [[path.format(tmp_path) for path in pair] for pair in files]
        journal.write_text(json.dumps({"committed": False, "files": named}))
        before = states(tmp_path)
        with pytest.raises(StartupError, match="which no option names"):
            recover_setup(house.config_file)
        assert states(tmp_path) == before

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"committed": 1, "files": []}', '{"committed": true}'])
    def test_one_that_is_damaged_is_a_sentence(self, house, tmp_path, content):
        (tmp_path / "mad.conf.setting-up").write_text(content)
        with pytest.raises(StartupError, match="journal .* cannot be read"):
            recover_setup(house.config_file)

    @pytest.mark.parametrize("what", ["journal", "folder", "staged"])
    def test_one_that_others_could_write_is_not_obeyed(self, house, tmp_path, what):
        (tmp_path / "mad.db3.setup").write_text("planted")
        journal = self.leave(tmp_path, True, tmp_path / "mad.db3")
        {"journal": journal, "folder": tmp_path, "staged": tmp_path / "mad.db3.setup"}[what].chmod(0o777)
        before = (tmp_path / "mad.db3").read_bytes()
        try:
            with pytest.raises(StartupError, match="can be written by others"):
                recover_setup(house.config_file)
            assert (tmp_path / "mad.db3").read_bytes() == before and (tmp_path / "mad.db3.setup").exists()
        finally:
            tmp_path.chmod(0o700)

    def test_nothing_is_removed_in_a_folder_of_others(self, house, tmp_path):
        """Which the options name."""
        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / "mad.db3.setup").write_text("of somebody")
        shared.chmod(0o1777)
        self.leave(tmp_path, False, shared / "mad.db3")
        with pytest.raises(StartupError, match="shared can be written by others"):
            recover_setup(house.config_file, {"db-file": (str(shared / "mad.db3"), "flag")})
        assert (shared / "mad.db3.setup").exists()

    def test_the_settings_that_a_flag_or_variable_gives_name_files_too(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for settings, environ in (({"db-file": ("other", "flag")}, {}), ({}, {"MAD_DB_FILE": "other"})):
            (tmp_path / "other.setup").write_text("half")
            self.leave(tmp_path, False, tmp_path / "other")
            with pytest.raises(StartupError, match="no option names"):
                recover_setup("mad.conf")
            recover_setup("mad.conf", settings, environ)
            assert not list(tmp_path.glob("*.setup")) and not (tmp_path / "mad.conf.setting-up").exists()

    @pytest.mark.parametrize("when", ["config", "journal", "database", "staged", "committed"])
    def test_files_that_only_the_answers_named_are_made_or_removed(self, tmp_path, monkeypatch, when):
        """The next start does not know the answers: it finds them in the staged config file."""
        monkeypatch.chdir(tmp_path)
        names = dict(db_file="data/a.db3", token_signing_key_file="k/t", admin_token_signing_key_file="k/a", seal_key_file="s")

        def work():
            options = Options(
                {"config": "mad.conf"} | {name.replace("_", "-"): "setup" for name in names}, **CHEAP | names
                | {"argon2id_memory": 8192, "db_pass": "a phrase", "oidc_issuer": "https://idp.example"},
            )
            set_up(options, Answers("root", "root@example.org", PASSWORD), lambda step: step == when and die())

        in_child(work)
        recover_setup("mad.conf")
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        left = {name for name in left if not name.endswith(".lock")}
        assert left == ({"mad.conf", *names.values()} if when == "committed" else set())


SETS_UP = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from appliance.base import StartupError
from appliance.recovery import hold_setup
for _ in range(60):
    try:
        with hold_setup({config!r}):
            # Two that work at once both find the file of the other, or remove it.
            open({mark!r}, "x").close()
            time.sleep(0.002)
            __import__("os").unlink({mark!r})
    except StartupError:
        pass
"""


class TestSettingsOfABackup:
    """A box that has no settings takes those of the backup; what is set here wins, and what is wrong is named."""

    CONTENT = "auth-port = 9140\nbrand-name = Bücher\ndb-pass = of the backup\n".encode()

    def test_what_is_set_here_wins(self):
        here = load_options({"config-may-be-missing": True, "auth-port": ("9240", "flag")}, {})
        merged = merge_settings(here, self.CONTENT, "mad.conf in b")
        assert (merged.auth_port, merged.brand_name, merged.db_pass) == (9240, "Bücher", "of the backup")
        assert merge_settings(Options(), self.CONTENT, "mad.conf in b").auth_port == 9140

    @pytest.mark.parametrize(
        "line, said",
        [
            (b"auth-port = ninety", "mad.conf in b:1: auth-port"), (b"brand-name = B\xfccher", "mad.conf in b:1: brand-name is not valid UTF-8"),
            (b"no-such-option = 1", "no-such-option"),
        ],
    )
    def test_what_is_wrong_is_a_sentence_that_names_it(self, line, said):
        with pytest.raises(StartupError) as refusal:
            merge_settings(Options(), line + b"\n", "mad.conf in b")
        assert said in str(refusal.value)


class TestUnencrypted:
    """no-db-pass says that the database is kept unencrypted knowingly, beyond the set-up too."""

    def test_a_trial_makes_no_passphrase(self):
        options, _ = demo_answers(Options(no_db_pass=True))
        assert options.db_pass == "" and demo_answers(Options())[0].db_pass and demo_answers(Options(db_pass="p"))[0].db_pass == "p"

    def test_a_restore_asks_for_no_passphrase(self, house, tmp_path, capsys):
        back_up(house, "b")
        words = ["restore", str(tmp_path / "b"), "--config", str(tmp_path / "new" / "mad.conf")]
        for more, said in (([], "passphrase of the backup is needed"), (["--no-db-pass", "true"], "encrypted or damaged")):
            assert main([*words, *more]) == 1 and said in capsys.readouterr().err


class TestLockOfTheJournal:
    """It is there while a set-up, a restore or a command is at work, and not afterwards."""

    def lock_of(self, options):
        return Path(options.config_file + ".setting-up.lock")

    def test_nothing_is_left_of_it(self, house, tmp_path):
        lock = self.lock_of(house)
        assert not lock.exists(), "after a set-up"
        with hold_setup(house.config_file):
            assert lock.exists()
        assert not lock.exists()
        for words in (["backup", "c"], ["keys", "list"], ["audit", "verify"], ["restore", "nowhere"], ["setup"]):
            main([*words, "--config", str(tmp_path / "mad.conf")])
            assert not lock.exists(), words

    def test_nothing_is_left_of_it_after_a_refusal(self, house):
        with pytest.raises(StartupError, match="set up already"):
            set_up(house, Answers("root", "root@example.org", PASSWORD))
        assert not self.lock_of(house).exists()

    def test_the_last_of_those_who_share_it_removes_it(self, house):
        with hold_setup(house.config_file, shared=True):
            with hold_setup(house.config_file, shared=True):
                pass
            assert self.lock_of(house).exists()
            with pytest.raises(StartupError, match="at work"), hold_setup(house.config_file):
                pass
        assert not self.lock_of(house).exists()

    def test_what_a_killed_one_leaves_hinders_nobody_and_goes_with_the_next(self, house):
        def work():
            with hold_setup(house.config_file):
                die()

        assert in_child(work) == signal.SIGKILL and self.lock_of(house).exists()
        with hold_setup(house.config_file):
            pass
        assert not self.lock_of(house).exists()

    def test_a_lock_on_a_file_that_was_removed_is_none(self, house, monkeypatch):
        """Between its opening and its locking the last holder may remove it, and another make a new one."""
        lock, flock, seen = self.lock_of(house), fcntl.flock, []

        def late(descriptor, how):
            if not seen:
                seen.append(descriptor)
                lock.unlink()
                lock.touch(0o600)
            flock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with hold_setup(house.config_file), open(lock) as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_the_file_of_another_is_not_removed(self, house):
        lock = self.lock_of(house)
        with hold_setup(house.config_file):
            lock.unlink()
            lock.touch(0o600)
        assert lock.exists()

    def test_one_who_begins_while_another_ends_is_not_refused(self, house, monkeypatch):
        with open(self.lock_of(house), "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            monkeypatch.setattr("appliance.base.files.sleep", lambda seconds: other.close())
            with hold_setup(house.config_file, shared=True):
                pass

    def test_two_set_ups_exclude_each_other(self, tmp_path):
        tmp_path.chmod(0o700)
        words = {"root": str(ROOT), "tests": str(ROOT / "tests"), "config": str(tmp_path / "mad.conf"),
                 "mark": str(tmp_path / "mark")}  # fmt: skip
        workers = [
            subprocess.Popen([sys.executable, "-c", SETS_UP.format(**words)], stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        assert [worker.communicate(timeout=60)[1] for worker in workers] == ["", "", ""]
        assert os.listdir(tmp_path) == []


class TestTheKeyFile:
    """db-key-file: a raw key in place of a passphrase"""

    @pytest.fixture
    def keyed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def make(content=None):
            if content is not None:
                (tmp_path / "db.key").write_bytes(content)
                (tmp_path / "db.key").chmod(0o600)
            return made(tmp_path, db_pass="", db_key_file="db.key")

        return make

    def test_set_up_makes_one_where_there_is_none_and_never_another(self, keyed, tmp_path):
        options, path = keyed(), tmp_path / "db.key"
        assert path.stat().st_size == 32 and path.stat().st_mode & 0o077 == 0
        loaded = load_options(parse_flags(["--config", str(tmp_path / "mad.conf")])[0], {})
        assert loaded.db_key_file == "db.key" and not loaded.db_pass
        opened(loaded).store.close()
        assert (tmp_path / "mad.db3").read_bytes()[:16] != b"SQLite format 3\0"
        path.unlink()
        with pytest.raises(StartupError, match=r"db-key-file: db.key cannot be read: No such file"):
            opened(options)
        assert not path.exists()

    @pytest.mark.parametrize("content", [bytes(range(32)), b"0123456789abcdefABCDEF0123456789" * 2, b"ab" * 32 + b"\n"])
    def test_set_up_takes_one_that_is_there_as_octets_or_digits(self, keyed, tmp_path, content):
        options = keyed(content)
        raw = content if len(content) == 32 else bytes.fromhex(content.decode().strip())
        assert (tmp_path / "db.key").read_bytes() == content
        store = Store("mad.db3", (raw + (tmp_path / "mad.db3").read_bytes()[:16]).hex())
        store.open()
        store.close()
        opened(options).store.close()

    @pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), b"a" * 63, b"g" * 64, b"ab" * 33])
    def test_another_length_is_refused_and_nothing_is_made(self, keyed, tmp_path, content):
        with pytest.raises(StartupError, match="neither 32 octets nor 64 hexadecimal digits"):
            keyed(content)
        assert set(states(tmp_path)) == {"db.key"}

    def test_one_that_others_can_read_is_refused(self, keyed, tmp_path):
        options = keyed()
        (tmp_path / "db.key").chmod(0o644)
        with pytest.raises(StartupError, match="db.key can be read by others: chmod 600"):
            opened(options)

    def test_another_key_opens_nothing(self, keyed, tmp_path):
        options = keyed()
        (tmp_path / "db.key").write_bytes(bytes(32))
        with pytest.raises(StartupError, match="db-key-file"):
            opened(options)

    def test_a_set_up_that_is_killed_leaves_no_key_or_the_one_of_its_database(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = Options(
            {"config": str(tmp_path / "mad.conf")}, **CHEAP | {"argon2id_memory": 8192}, db_key_file="db.key",
            oidc_issuer="https://idp.example",
        )
        steps = []
        answers = Answers("root", "root@example.org", PASSWORD)
        for kill_at in itertools.count():
            def checkpoint(name, seen=iter(range(kill_at))):
                if next(seen, None) is None:
                    os.kill(os.getpid(), 9)

            status = in_child(lambda: set_up(options, answers, checkpoint))
            finish_setup(options.config_file, options)
            assert (tmp_path / "db.key").exists() == (tmp_path / "mad.db3").exists()
            steps.append((tmp_path / "db.key").exists())
            if steps[-1]:
                break
        assert len(steps) > 5 and not any(steps[:-1])
        opened(options).store.close()

    def test_a_backup_is_of_the_same_key_and_restores_on_a_new_box_that_has_it(self, keyed, tmp_path, monkeypatch):
        options, new = keyed(), tmp_path / "new"
        back_up(options, str(tmp_path / "b"))
        key = (tmp_path / "db.key").read_bytes()
        new.mkdir()
        monkeypatch.chdir(new)
        (new / "db.key").write_bytes(key)
        (new / "db.key").chmod(0o600)
        restore(Options({"config": str(new / "mad.conf")}, **CHEAP, db_key_file="db.key"), str(tmp_path / "b"))
        loaded = load_options(parse_flags(["--config", str(new / "mad.conf")])[0], {})
        idp = opened(loaded)
        assert loaded.db_key_file == "db.key" and m.get_user(idp, "root")
        idp.store.close()

    def test_a_reset_removes_it(self, keyed, tmp_path):
        options = keyed()
        assert factory_reset(options)[0] == "db.key" and not (tmp_path / "db.key").exists()
        keyed()
