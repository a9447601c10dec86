"""At the machine: back up, restore, begin anew, rotate keys, let an administrator in again."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jwt
import microauthd as m
import pyotp
import pytest
from box import Box
from conftest import CHEAP, PASSWORD, die, in_child
from appliance.base import StartupError
from appliance.base.settings import Options, check_options, load_options, parse_flags
from appliance.base.database import read_database_key
from appliance.base.store import FOREVER, MAD_ADMIN_ROLE_ID, MIGRATIONS, Store
from appliance.base.keys import Key, read_ring
from appliance.upkeep import advance_key_states
from appliance.processes import hold_database
from appliance.recovery import (
    Answers, accept_clock, back_up, describe_keys, factory_reset, hold_folder, open_idp, recover_admin, recover_setup,
    restore, revoke_key, rotate_keys, set_up,
)

YEAR = 365 * 86400


def opened(options, clock=None):
    idp = open_idp(options)
    if clock:
        idp.clock = clock
    return idp


def digest_of(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith((".lock", "-wal", "-shm"))
    }


@pytest.fixture
def backup(house, tmp_path):
    (tmp_path / "out").mkdir()
    back_up(house, str(tmp_path / "out" / "box.backup"))
    return tmp_path / "out" / "box.backup"


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
                m.audit(idp, m.LOCAL, "test", "write", str(len(done)))
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
        m.create_user(idp, m.LOCAL, "t", m.CreateUser("late", "late@example.org", PASSWORD))
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
        before = digest_of(tmp_path)
        with pytest.raises(StartupError):
            restore(Options(house.origins, **CHEAP, db_pass="another"), str(backup))
        assert digest_of(tmp_path) == before

    @pytest.mark.parametrize("at", [0, 20, 100, 4095, 4096, 5000, 20_000, 70_000, 150_000, -4096, -100, -1])
    def test_a_flipped_byte_is_refused_and_everything_stays(self, house, backup, tmp_path, at):
        content = bytearray(backup.read_bytes())
        content[at] ^= 1
        bad = tmp_path / "bad"
        bad.write_bytes(content)
        before = digest_of(tmp_path)
        with pytest.raises(StartupError):
            restore(house, str(bad))
        assert digest_of(tmp_path) == before

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
        m.create_user(idp, m.LOCAL, "t", m.CreateUser("late", "late@example.org", PASSWORD))
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
        before = digest_of(tmp_path)
        monkeypatch.setattr(m.Idp.__init__, "__defaults__", (lambda: 1000.0, *m.Idp.__init__.__defaults__[1:]))
        with pytest.raises(StartupError, match="clock of this machine is behind"):
            restore(house, str(tmp_path / "good"))
        assert digest_of(tmp_path) == before

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
        with hold_database(linked.db_file), pytest.raises(StartupError, match="is running on"):
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
    def test_the_next_key_is_published_before_it_signs_and_the_old_one_until_its_last_token_is_dead(
        self, house, monkeypatch
    ):
        """A client that caches the key set for its max-age never meets a kid it does not know."""
        start = time.time()
        now = [start]
        idp = opened(house, lambda: now[0])
        idp.ring_files = {"auth": (None, None), "admin": (None, None)}
        cached, cached_at, tokens, signed_by = jwt.PyJWKSet.from_json(idp.auth_ring.jwks().decode()), now[0], [], set()
        rotated = False
        for _ in range(120):
            now[0] += 60
            idp.rings_until = 0
            if now[0] >= cached_at + 300:
                cached, cached_at = jwt.PyJWKSet.from_json(idp.auth_ring.jwks().decode()), now[0]
            if not rotated and now[0] > start + 1000:
                with monkeypatch.context() as patched:
                    patched.setattr("appliance.recovery.open_idp", lambda options: opened_with(open_idp, options, now))
                    rotate_keys(house, ["auth"])
                rotated = True
            token = m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)[
                "access_token"
            ]
            tokens.append((token, now[0]))
            signed_by.add(jwt.get_unverified_header(token)["kid"])
            for old, at in tokens:
                if at + 3600 > now[0]:
                    jwt.decode(
                        old, cached[jwt.get_unverified_header(old)["kid"]].key, algorithms=["ES256"],
                        options={"verify_exp": False, "verify_aud": False, "verify_iat": False, "verify_nbf": False},
                    )
            advance_key_states(idp)
        assert len(signed_by) == 2 and [row["state"] for row in describe_keys(house) if row["port"] == "auth"] == [
            "active", "active",
        ], "the retired ones are gone"
        idp.store.close()

    def test_a_clock_set_back_undoes_nothing(self, house):
        now = [time.time()]
        rotate_keys(house, ["auth"], ["ES256"])
        idp = opened(house, lambda: now[0])
        idp.ring_files = {"auth": (None, None), "admin": (None, None)}
        before = idp.auth_ring.access.kid
        now[0] += 901
        advance_key_states(idp)
        idp.rings_until = 0
        after = idp.auth_ring.access.kid
        now[0] -= 5000
        idp.rings_until = 0
        advance_key_states(idp)
        assert before != after == idp.auth_ring.access.kid
        idp.store.close()

    def test_two_rotations_at_once_are_one(self, house):
        rotate_keys(house, ["auth"])
        with pytest.raises(StartupError, match="waits to sign"):
            rotate_keys(house, ["auth"])

    @pytest.mark.parametrize("waiting", [False, True])
    def test_a_revoked_key_signs_and_verifies_nothing_any_more(self, house, waiting):
        idp = opened(house)
        idp.ring_files = {"auth": (None, None), "admin": (None, None)}
        token = m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)[
            "access_token"
        ]
        if waiting:
            rotate_keys(house, ["auth"], ["ES256"])
        kid = jwt.get_unverified_header(token)["kid"]
        assert revoke_key(house, kid) == "auth"
        idp.rings_until = 0
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

    def test_a_ring_that_cannot_be_read_leaves_the_keys_at_work(self, house, tmp_path):
        idp = opened(house)
        idp.ring_files = {"auth": (None, None), "admin": (None, None)}
        kid = idp.auth_ring.access.kid
        (tmp_path / "token.pem").write_text("nonsense")
        idp.rings_until = 0
        assert idp.auth_ring.access.kid == kid
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
        assert recover_admin(house, "ROOT", "another battery staple", drop_totp=True) == "recovered"
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

    def test_a_weak_password_is_refused_and_changes_nothing(self, house):
        with pytest.raises(m.Problem):
            recover_admin(house, "root", "short")

    def test_it_is_for_the_user_whose_server_it_is(self, house, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        for act in (
            lambda: recover_admin(house, "root", "another battery staple"), lambda: back_up(house, "x"),
            lambda: factory_reset(house), lambda: rotate_keys(house, ["auth"]),
        ):
            with pytest.raises(StartupError, match="belongs to user"):
                act()


class TestFactoryReset:
    def test_nothing_of_before_is_left(self, house, tmp_path):
        gone = factory_reset(house)
        assert (
            {os.path.basename(path) for path in gone} >= {"mad.db3", "token.pem", "admin_token.pem", "seal.key"}
            and not (tmp_path / "mad.db3").exists()
            and (tmp_path / "mad.conf").exists()
        )
        set_up(house, Answers("root", "root@example.org", PASSWORD))


def opened_with(real, options, now):
    idp = real(options)
    idp.clock = lambda: now[0]
    return idp


    def test_what_a_rotation_that_was_killed_left_goes_too(self, house, tmp_path):
        def work():
            os.replace = die
            rotate_keys(house, ["auth"])

        in_child(work)
        assert list(tmp_path.glob("*.new"))
        factory_reset(house)
        assert not list(tmp_path.glob("*.new"))


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
            end = time.monotonic() + 15
            while jwt.get_unverified_header(box.token().json["access_token"])["kid"] == kid:
                assert time.monotonic() < end, "every worker takes the new key up"
                time.sleep(0.05)
            assert box.auth("/me", bearer=old).status == 200 and kid in box.auth("/jwks.json").body.decode()
            assert box.run("keys", "revoke", "--kid", kid).returncode == 0
            end = time.monotonic() + 15
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

    @pytest.mark.parametrize(
        "words",
        [
            ["backup"], ["backup", "a", "b"], ["restore"], ["keys"], ["keys", "turn"], ["keys", "revoke"],
            ["keys", "rotate", "--ring", "x"], ["admin"], ["admin", "recover"], ["admin", "destroy", "--username", "x"],
        ],
    )
    def test_bad_usage_is_two(self, tmp_path, words):
        box = Box(tmp_path / "data").set_up()
        assert box.run(*words).returncode == 2
