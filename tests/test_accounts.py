"""Users: who may in, lockout, second factor."""

import threading

import microauthd as m
import msgspec
import pyotp
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.settings import Options
from appliance.base.store import FOREVER, LOCKOUT_MAX
from appliance.base.objects import CreateUser

GOOD = {"grant_type": "password", "username": "alice", "password": PASSWORD}

NEW_PASSWORD = "another battery staple"

PEER = m.Caller("192.0.2.1", is_local=False)


def fail(auth, service, **more):
    return auth.post("/token", GOOD | {"password": "wrong wrong"} | more, auth=service)


def commits(idp, work):
    """How many transactions that changed a row were committed while it worked, and what it returned."""
    connection, found = idp.store.connection, []
    changed = [connection.total_changes]

    def trace(sql):
        if sql.strip() == "COMMIT":
            found.append(connection.total_changes > changed[0])
            changed[0] = connection.total_changes

    connection.set_trace_callback(trace)
    try:
        answer = work()
    finally:
        connection.set_trace_callback(None)
    return found.count(True), answer


HTTP_REFUSALS = [
    "wrong password", "inactive", "locked", "locked for ever", "one-time code missing", "one-time code wrong",
    "one-time code used", "one-time code locked",
]


def guess(idp, alice, code="000000"):
    with pytest.raises(m.Problem) as caught:
        m.check_second_factor(idp, PEER, alice.id, idp.now_ms() + 1, code)
    return caught.value.code


class TestOneAnswer:
    """Whatever is wrong, an attacker hears the same, after the same work, on both ports."""

    @pytest.fixture
    def spoil(self, idp, give_totp, change):
        """Make something wrong with a user; the form that then must be refused."""

        def call(case, username):
            account, now = idp.store.find_account_by_name(username), idp.now()
            form = {"username": username, "password": PASSWORD}
            if case == "wrong password":
                return form | {"password": "wrong wrong"}
            if case == "inactive":
                change("UPDATE account SET is_active = 0 WHERE id = :id", id=account.id)
            if case.startswith("locked"):
                change(
                    "UPDATE account SET lockout_until = :until WHERE id = :id", id=account.id,
                    until=FOREVER if "ever" in case else now + 60,
                )
            if case == "client demands a second factor":
                with idp.store.transaction(identity=True):
                    idp.store.put_feature(idp.store.find_client("service").id, "ENABLE_TOTP", True, "")
            if case == "not an administrator":
                change("DELETE FROM user_role WHERE user_id = :id", id=account.id)
            if case.startswith("one-time code"):
                seed = give_totp(idp, account)
                used, wrong = pyotp.TOTP(seed).at(now), "000000"
                while wrong in {pyotp.TOTP(seed).at(now + offset) for offset in (-30, 0, 30)}:
                    wrong = f"{int(wrong) + 1:06d}"
                if case.endswith("locked"):
                    change(
                        "UPDATE account SET totp_locked_until = :until, totp_last_step = 0 WHERE id = :id",
                        id=account.id, until=now + 60,
                    )
                return (
                    form
                    | {
                        "one-time code missing": {}, "one-time code wrong": {"totp": wrong},
                        "one-time code used": {"totp": used}, "one-time code locked": {"totp": used},
                    }[case]
                )
            return form

        return call

    @pytest.fixture
    def hashes(self, idp, monkeypatch):
        done, verify = [], idp.hasher.verify
        monkeypatch.setattr(idp.hasher, "verify", lambda *words: done.append(words) or verify(*words))
        return done

    @pytest.mark.parametrize("case", [*HTTP_REFUSALS, "client demands a second factor"])
    def test_of_the_password_grant(self, auth, service, alice, spoil, hashes, case):
        unknown = auth.post("/token", GOOD | {"username": "nobody"}, auth=service)
        assert unknown.status == 403 and unknown.json["error"] == "invalid_grant"
        form = spoil(case, "alice")
        hashes.clear()
        refused = auth.post("/token", GOOD | form, auth=service)
        assert (refused.status, refused.body, refused.headers) == (unknown.status, unknown.body, unknown.headers)
        assert len(hashes) == 1, "the same Argon2 work"

    @pytest.mark.parametrize("case", [*HTTP_REFUSALS, "not an administrator"])
    def test_of_the_admin_port(self, admin, root, new_user, spoil, hashes, case):
        new_user("second", admin=True)
        unknown = admin.post("/token", {"username": "nobody", "password": PASSWORD})
        assert unknown.status == 403 and unknown.json["success"] is False and "errors" not in unknown.json
        form = spoil(case, "root")
        hashes.clear()
        refused = admin.post("/token", form)
        assert (refused.status, refused.body, refused.headers) == (unknown.status, unknown.body, unknown.headers)
        assert len(hashes) == 1

    @pytest.mark.parametrize("audited", [True, False])
    @pytest.mark.parametrize("case", ["unknown user", *HTTP_REFUSALS])
    def test_every_refusal_is_one_durable_write(self, make_idp, service, alice, spoil, case, audited):
        """A commit waits for the flash: one more or one less tells by time what was wrong."""
        idp = make_idp(Options(**CHEAP, enable_audit_logging=audited))
        auth = Caller(m.App(idp, m.AUTH))
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        form = {"username": "nobody", "password": PASSWORD} if case == "unknown user" else spoil(case, "alice")
        count, refused = commits(idp, lambda: auth.post("/token", GOOD | form, auth=service))
        assert refused.status == 403 and count == 1

    @pytest.mark.parametrize("case", ["locked", "inactive", "one-time code missing"])
    def test_a_remembered_password_does_not_tell_that_it_is_right(
        self, auth, service, alice, log_in, spoil, hashes, case
    ):
        log_in(alice)
        form = spoil(case, "alice")
        hashes.clear()
        assert auth.post("/token", GOOD | form, auth=service).status == 403
        assert len(hashes) == 1

    @pytest.mark.parametrize("case", ["unknown user", *HTTP_REFUSALS, "client demands a second factor"])
    @pytest.mark.parametrize("password", [PASSWORD, "wrong wrong"])
    def test_a_password_that_is_no_normal_form_costs_the_same_for_everybody(
        self, auth, service, alice, spoil, hashes, case, password
    ):
        """Its normal form may be right: if only what fails were verified twice, time would tell."""
        form = {"username": "nobody"} if case == "unknown user" else spoil(case, "alice")
        if case == "wrong password":
            password = "wrong wrong"
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        hashes.clear()
        refused = auth.post("/token", GOOD | form | {"password": password.replace(" ", "\u00a0")}, auth=service)
        assert (refused.status, len(hashes)) == (403, 2)

    def test_the_log_says_what_was_wrong_and_not_who_tried_what(self, idp, auth, service, alice):
        auth.post("/token", GOOD | {"username": "my password by mistake", "password": "wrong wrong"}, auth=service)
        auth.post("/token", GOOD | {"password": "wrong wrong"}, auth=service)
        said = idp.stream.getvalue()
        assert (
            "unknown user" in said
            and "wrong password" in said
            and "by mistake" not in said
            and "wrong wrong" not in said
        )
        assert not any("by mistake" in str(row) for row in idp.store.list_audit(limit=100))


class TestRemembered:
    """Good passwords are remembered as digests, for a while."""

    def counted(self, idp, monkeypatch):
        done, verify = [], idp.hasher.verify
        monkeypatch.setattr(idp.hasher, "verify", lambda *words: done.append(1) or verify(*words))
        return done

    def test_the_second_login_needs_no_argon2_and_a_pause_ends_that(self, idp, alice, clock, monkeypatch):
        done = self.counted(idp, monkeypatch)
        for pause, hashes in ((0, 1), (0, 1), (299, 1), (301, 2)):
            clock.pass_(pause)
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
            assert len(done) == hashes

    def test_it_is_an_option(self, make_idp, idp, alice, monkeypatch):
        other = make_idp(Options(**CHEAP, enable_pass_cache=False))
        done = self.counted(other, monkeypatch)
        for _ in range(2):
            m.authenticate_user(other, m.LOCAL, "alice", PASSWORD)
        assert len(done) == 2

    def test_a_user_with_a_second_factor_is_never_remembered(self, idp, alice, clock, give_totp, monkeypatch):
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        seed, done = give_totp(idp, alice.account), self.counted(idp, monkeypatch)
        for number in (1, 2):
            clock.pass_(60)
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, pyotp.TOTP(seed).at(idp.now()))
            assert len(done) == number

    def test_a_changed_password_is_forgotten(self, idp, alice):
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        idp.store.set_password_hash(alice.id, idp.hasher.hash("another good one"), idp.now())
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)


COMPOSED = "Gr\u00fc\u00dfe aus K\u00f6ln"
DECOMPOSED = "Gru\u0308\u00dfe\u00a0aus\u3000Ko\u0308ln"


class TestNormalForm:
    """RFC 8265 §4.2: a password is the same, whichever keyboard composes its characters and its blanks."""

    @pytest.fixture(params=[COMPOSED, DECOMPOSED])
    def typed(self, request):
        return request.param

    @pytest.fixture(params=["create", "reset", "change"])
    def set_password(self, idp, alice, request):
        def call(password):
            if request.param == "create":
                return m.create_user(idp, m.LOCAL, CreateUser("bob", "bob@example.org", password)).username
            if request.param == "reset":
                m.reset_password(idp, m.LOCAL, alice.id, password)
            else:
                idp.store.set_password_hash(alice.id, m.hash_password(idp, password), idp.now())
            return "alice"

        return call

    def test_it_is_verified_however_it_is_typed(self, idp, set_password, typed):
        name = set_password(typed)
        stored = idp.store.find_account_by_name(name).password_hash
        for password in (COMPOSED, DECOMPOSED):
            assert m.authenticate_user(idp, m.LOCAL, name, password)[1] == ["pwd"]
        for other in (COMPOSED.upper(), COMPOSED.replace("\u00df", "ss"), " " + COMPOSED, COMPOSED.replace(" ", "")):
            with pytest.raises(m.Problem, match="invalid_grant"):
                m.authenticate_user(idp, m.LOCAL, name, other)
        assert idp.store.find_account_by_name(name).password_hash == stored, "nothing was hashed again"

    def test_every_route_that_takes_one_takes_each_form(self, auth, admin, service, root, idp):
        m.reset_password(idp, m.LOCAL, root.id, DECOMPOSED)
        for password in (COMPOSED, DECOMPOSED):
            form = {"grant_type": "password", "username": "root", "password": password}
            assert auth.post("/token", form, auth=service).status == 200
            answer = admin.post("/token", {"username": "root", "password": password})
            assert answer.status == 200
            asked = {"username": "root", "password": password}
            token = answer.json["access_token"]
            assert admin.post("/users/verify-password", bearer=token, json_body=asked).status == 200

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_hash_of_the_raw_form_is_verified_and_replaced(self, make_idp, idp, alice, cached):
        """Releases before this hashed what was typed."""
        idp = make_idp(Options(**CHEAP, enable_pass_cache=cached))
        old = idp.hasher.hash(DECOMPOSED)
        idp.store.set_password_hash(alice.id, old, idp.now())
        with pytest.raises(m.Problem, match="invalid_grant"):
            m.authenticate_user(idp, m.LOCAL, "alice", COMPOSED)
        assert idp.store.find_account(alice.id).password_hash == old
        assert m.authenticate_user(idp, m.LOCAL, "alice", DECOMPOSED)
        assert idp.hasher.verify(idp.store.find_account(alice.id).password_hash, COMPOSED)
        assert idp.store.find_account(alice.id).revoked_before == alice.account.revoked_before, "nothing is revoked"
        for password in (COMPOSED, DECOMPOSED):
            assert m.authenticate_user(idp, m.LOCAL, "alice", password)

    def test_two_forms_of_a_wrong_password_are_one_failure(self, idp, alice):
        with pytest.raises(m.Problem, match="invalid_grant"):
            m.authenticate_user(idp, m.LOCAL, "alice", DECOMPOSED)
        assert idp.store.find_account(alice.id).failed_logins == 1

    def test_a_form_that_is_remembered_is_so_for_each(self, idp, alice, monkeypatch):
        m.reset_password(idp, m.LOCAL, alice.id, COMPOSED)
        m.authenticate_user(idp, m.LOCAL, "alice", DECOMPOSED)
        monkeypatch.setattr(idp.hasher, "verify", None)
        for password in (COMPOSED, DECOMPOSED):
            assert m.authenticate_user(idp, m.LOCAL, "alice", password)


class TestRehash:
    def test_a_login_brings_the_hash_up_to_the_parameters_in_force(self, idp, make_idp, alice):
        other = make_idp(Options(**CHEAP | {"argon2id_time": 2}))
        m.authenticate_user(other, m.LOCAL, "alice", PASSWORD)
        assert "t=2" in idp.store.find_account(alice.id).password_hash
        assert m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)

    def test_a_rehash_never_overwrites_a_newer_password(self, idp, make_idp, alice, monkeypatch):
        other = make_idp(Options(**CHEAP | {"argon2id_time": 2}))
        new, hash_ = other.hasher.hash("the new password"), other.hasher.hash

        def while_an_operator_resets(password, beside=None):
            hashed = hash_(password)
            idp.store.set_password_hash(alice.id, new, idp.now())
            return hashed

        monkeypatch.setattr(other.hasher, "hash", while_an_operator_resets)
        m.authenticate_user(other, m.LOCAL, "alice", PASSWORD)
        assert idp.store.find_account(alice.id).password_hash == new

    @pytest.mark.parametrize(
        "statement",
        ["UPDATE account SET password_hash = 'another'", "UPDATE account SET is_active = 0", "DELETE FROM account"],
    )
    def test_an_account_that_changes_while_it_is_verified_is_refused(self, idp, alice, change, monkeypatch, statement):
        verify = idp.hasher.verify

        def slowly(phc, password):
            right = verify(phc, password)
            change(statement)
            return right

        monkeypatch.setattr(idp.hasher, "verify", slowly)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)


class TestLockout:
    def test_five_failures_lock_the_right_password_out(self, auth, service, alice):
        for _ in range(5):
            assert fail(auth, service).status == 403
        assert auth.post("/token", GOOD, auth=service).status == 403

    def test_it_ends_by_itself_and_doubles(self, idp, auth, service, alice, clock):
        for duration in (300, 600, 1200, 2400, 3600, 3600):
            for _ in range(5):
                fail(auth, service)
            assert idp.store.find_account(alice.id).lockout_until == idp.now() + duration
            clock.pass_(duration + 1)
        assert auth.post("/token", GOOD, auth=service).status == 200
        assert idp.store.find_account(alice.id).lockouts == 0

    def test_it_holds_on_the_admin_port_and_after_a_restart(self, make_idp, idp, auth, admin, service, root, new_user):
        new_user("second", admin=True)
        for _ in range(5):
            admin.post("/token", {"username": "root", "password": "wrong wrong"})
        again = make_idp(idp.options)
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(again, m.LOCAL, "root", PASSWORD)
        assert "locked" in caught.value.log
        assert auth.post("/token", GOOD | {"username": "root"}, auth=service).status == 403

    @pytest.mark.parametrize("pause, status", [(300, 403), (301, 200)])
    def test_a_pause_longer_than_the_window_restarts_the_count(self, auth, service, alice, clock, pause, status):
        for _ in range(4):
            fail(auth, service)
        clock.pass_(pause)
        fail(auth, service)
        assert auth.post("/token", GOOD, auth=service).status == status

    def test_a_longer_lockout_set_by_an_administrator_stays(self, idp, auth, service, alice):
        with idp.store.transaction():
            idp.store.run("UPDATE account SET lockout_until = :until WHERE id = :id", until=FOREVER, id=alice.id)
        for _ in range(6):
            fail(auth, service)
        assert idp.store.find_account(alice.id).lockout_until == FOREVER

    def test_a_count_that_locks_leaves_a_longer_lockout(self, idp, alice, change):
        for until in (idp.now() + 90_000, FOREVER):
            change(
                "UPDATE account SET failed_logins = 4, last_failed_at = :now, lockout_until = :until WHERE id = :id",
                now=idp.now(), until=until, id=alice.id,
            )
            with idp.store.transaction():
                assert (
                    idp.store.count_failed_login(alice.id, idp.now(), 300, 5, 300, LOCKOUT_MAX).lockout_until == until
                )

    def test_parallel_failures_are_all_counted(self, idp, alice):
        def attempt(number):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.Caller(f"198.51.100.{number}"), "alice", "wrong wrong")

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert idp.store.find_account(alice.id).lockout_until > idp.now()
        actions = [row.action for row in idp.store.list_audit(limit=50)]
        assert actions.count("user_locked_out") == 1 and actions.count("user_login_failed") == 8

    def test_a_success_resets_the_count(self, auth, service, alice, idp):
        for _ in range(3):
            for _ in range(4):
                fail(auth, service)
            assert auth.post("/token", GOOD, auth=service).status == 200
        assert idp.store.find_account(alice.id).failed_logins == 0

    def test_failures_on_both_ports_count_together(self, auth, admin, service, root, new_user):
        new_user("second", admin=True)
        for _ in range(3):
            admin.post("/token", {"username": "root", "password": "wrong wrong"})
        for _ in range(2):
            fail(auth, service, username="ROOT")
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403

    def test_a_long_first_lockout_is_not_cut_to_the_cap(self, make_idp, idp, alice):
        other = make_idp(Options(**CHEAP, failed_password_lockout_duration=86400))
        for _ in range(5):
            with pytest.raises(m.Problem):
                m.authenticate_user(other, m.LOCAL, "alice", "wrong wrong")
        assert idp.store.find_account(alice.id).lockout_until == idp.now() + 86400

    def test_zero_failures_never_lock(self, make_idp, idp, alice):
        other = make_idp(Options(**CHEAP, max_login_failures=0))
        for number in range(30):
            with pytest.raises(m.Problem):
                m.authenticate_user(other, m.Caller(f"198.51.100.{number}"), "alice", "wrong wrong")
        assert m.authenticate_user(other, m.LOCAL, "alice", PASSWORD)

    def test_trying_while_locked_does_not_prolong_it(self, idp, auth, service, alice):
        for _ in range(12):
            fail(auth, service)
        assert idp.store.find_account(alice.id).lockout_until == idp.now() + 300

    def test_no_stranger_can_lock_every_administrator_out_of_the_machine(self, idp, root, new_user):
        second, remote = new_user("second", admin=True), m.Caller("203.0.113.9", is_local=False)
        for name in ("root", "second"):
            for _ in range(5):
                with pytest.raises(m.Problem):
                    m.authenticate_user(idp, remote, name, "wrong wrong", admin=True)
        for someone in (root, second):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, remote, someone.username, PASSWORD, admin=True)
        entered = []
        for someone in (root, second):
            try:
                entered.append(m.authenticate_user(idp, m.LOCAL, someone.username, PASSWORD, admin=True))
            except m.Problem:
                pass
        assert entered

    def test_who_is_no_administrator_is_not_the_last_one(self, idp, alice, root, change):
        change("UPDATE account SET lockout_until = :until", until=idp.now() + 600)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)

    def test_what_an_administrator_locked_for_ever_is_locked_at_the_machine_too(self, idp, root, change):
        change("UPDATE account SET lockout_until = :until WHERE id = :id", until=FOREVER, id=root.id)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)

    UNIX = {"REMOTE_ADDR": "unix:uid=0", "microauthd.peer": "unix:uid=0", "microauthd.uid": 0}  # noqa: RUF012

    @pytest.mark.parametrize(
        "more, status",
        [
            (UNIX, 200), (UNIX | {"microauthd.uid": 1000}, 200), ({}, 403), ({"microauthd.peer": "unix:uid=0"}, 403),
            ({"REMOTE_ADDR": "127.0.0.1", "microauthd.peer": "127.0.0.1"}, 403),
            ({"REMOTE_ADDR": "::1", "microauthd.peer": "::1"}, 403), (UNIX | {"microauthd.proxied": True}, 403),
        ],
    )
    def test_only_the_unix_socket_is_at_the_machine(self, idp, admin, root, change, more, status):
        """A proxy on the machine that nobody declared has a loopback address, and says nothing of whom it serves."""
        change("UPDATE account SET lockout_until = :until", until=idp.now() + 600)
        app = admin.app
        admin.app = lambda environ, start: app(environ | more, start)
        assert admin.post("/token", {"username": "root", "password": PASSWORD}, peer="127.0.0.1").status == status

    def test_the_last_administrator_can_try_at_the_machine_itself(self, idp, root):
        remote = m.Caller("203.0.113.9", is_local=False)
        for _ in range(6):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, remote, "root", "wrong wrong", admin=True)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, remote, "root", PASSWORD, admin=True)
        assert m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)[0].id == root.id

    def test_names_are_one_account_however_they_are_written(self, idp, alice):
        for name in ("ALICE", " alice ", "\uff41lice"):
            assert m.authenticate_user(idp, m.LOCAL, name, PASSWORD)[0].id == alice.id


class TestSecondFactor:
    """RFC 6238, on every path that takes the password."""

    def test_it_is_asked_and_a_code_works_once(self, idp, auth, admin, service, root, clock, give_totp):
        seed = give_totp(idp, root.account)
        clock.pass_(90)
        code = pyotp.TOTP(seed).at(idp.now())
        form = GOOD | {"username": "root"}
        assert auth.post("/token", form, auth=service).status == 403
        assert auth.post("/token", form | {"totp": code}, auth=service).status == 200
        assert auth.post("/token", form | {"totp": code}, auth=service).status == 403
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403
        clock.pass_(30)
        assert (
            admin.post(
                "/token", {"username": "root", "password": PASSWORD, "totp": pyotp.TOTP(seed).at(idp.now())}
            ).status
            == 200
        )

    def test_guessing_codes_locks_it(self, idp, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        code = pyotp.TOTP(seed).at(idp.now())
        for number in range(m.TOTP_TRIES):
            with pytest.raises(m.Problem):
                m.authenticate_user(
                    idp, m.Caller(f"198.51.100.{number}"), "alice", PASSWORD, "000000" if code != "000000" else "000001"
                )
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(idp, m.Caller("198.51.100.99"), "alice", PASSWORD, code)
        assert "second factor locked" in caught.value.log

    def test_its_lock_ends_and_doubles_and_is_not_that_of_the_password(self, idp, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        for duration in (300, 600, 1200):
            clock.pass_(90)
            for number in range(m.TOTP_TRIES):
                with pytest.raises(m.Problem):
                    m.authenticate_user(idp, m.Caller(f"198.51.100.{number}"), "alice", PASSWORD, "12345x")
            account = idp.store.find_account(alice.id)
            assert account.totp_locked_until == idp.now() + duration and account.failed_logins == 0
            clock.pass_(duration)
        clock.pass_(90)
        assert m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, pyotp.TOTP(seed).at(idp.now()))
        assert idp.store.find_account(alice.id).totp_failures == 0

    def test_guesses_are_bounded_whatever_the_lockout_of_passwords(self, make_idp, idp, alice, give_totp):
        give_totp(idp, alice.account)
        other = make_idp(Options(**CHEAP, failed_password_lockout_duration=0, max_login_failures=0))
        for number in range(m.TOTP_TRIES):
            with pytest.raises(m.Problem):
                m.authenticate_user(other, m.Caller(f"198.51.100.{number}"), "alice", PASSWORD, "12345x")
        assert idp.store.find_account(alice.id).totp_locked_until > idp.now()

    def test_one_code_lets_one_of_many_in(self, idp, make_idp, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        code, entered = pyotp.TOTP(seed).at(idp.now()), []
        idps = [idp, make_idp(idp.options)]

        def enter(number):
            try:
                entered.append(
                    m.authenticate_user(idps[number % 2], m.Caller(f"198.51.100.{number}"), "alice", PASSWORD, code)
                )
            except m.Problem:
                pass

        threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(entered) == 1

    def test_an_earlier_code_is_dead_once_a_later_was_used(self, idp, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        earlier = pyotp.TOTP(seed).at(idp.now() - 30)
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, pyotp.TOTP(seed).at(idp.now()))
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, earlier)

    def test_the_original_calls_it_totp_code(self, idp, auth, service, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        assert auth.post("/token", GOOD | {"totp_code": pyotp.TOTP(seed).at(idp.now())}, auth=service).status == 200

    def test_a_code_may_be_sent_as_it_is_shown(self, idp, auth, service, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        for name, between in (("totp", " "), ("totp_code", "-")):
            clock.pass_(90)
            code = pyotp.TOTP(seed).at(idp.now())
            assert auth.post("/token", GOOD | {name: code[:3] + between + code[3:5]}, auth=service).status == 403
            assert auth.post("/token", GOOD | {name: code[:3] + between + code[3:]}, auth=service).status == 200

    def test_it_is_turned_on_only_by_who_holds_the_seed(self, idp, alice):
        with pytest.raises(m.Problem):
            m.enable_totp(idp, alice.account, m.new_totp_seed(), "12345x")
        assert idp.store.find_account(alice.id).totp_sealed == ""

    def test_the_seed_is_sealed(self, idp, alice, give_totp):
        seed = give_totp(idp, alice.account)
        sealed = idp.store.find_account(alice.id).totp_sealed
        assert seed not in sealed and idp.seal.open(sealed, alice.id) == seed
        with pytest.raises(m.Problem):
            m.Seal(bytes(31) + b"1").open(sealed, alice.id)

    def test_amr_tells_it(self, idp, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        assert m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, pyotp.TOTP(seed).at(idp.now()))[1] == [
            "pwd", "otp", "mfa",
        ]

    def test_guesses_of_the_second_step_are_slowed_as_those_of_the_first(self, idp, alice, give_totp):
        give_totp(idp, idp.store.find_account(alice.id))
        said = [guess(idp, alice) for _ in range(22)]
        assert said[0] == "invalid_grant" and said[-1] == "slow_down", said

    def test_a_locked_second_factor_takes_no_recovery_code_and_spends_none(self, idp, alice, give_totp):
        give_totp(idp, idp.store.find_account(alice.id))
        codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
        for _ in range(m.TOTP_TRIES):
            guess(idp, alice)
        assert guess(idp, alice, codes[0]) == "invalid_grant" and idp.store.count_recovery_codes(alice.id) == 10

    def test_who_is_locked_out_between_the_steps_stays_out(self, idp, alice, give_totp, clock):
        seed = give_totp(idp, idp.store.find_account(alice.id))
        clock.pass_(60)
        idp.store.set_lockout(alice.id, idp.now() + 600, idp.now())
        assert guess(idp, alice, pyotp.TOTP(seed).at(idp.now())) == "invalid_grant"

    def test_one_that_is_taken_away_between_the_steps_opens_nothing(self, idp, alice, give_totp, clock):
        """Not even by its last code: the login begins anew, by the password alone."""
        seed = give_totp(idp, idp.store.find_account(alice.id))
        clock.pass_(60)
        m.disable_totp(idp, m.LOCAL.acting_as("t"), idp.store.find_account(alice.id))
        assert guess(idp, alice, pyotp.TOTP(seed).at(idp.now())) == "invalid_grant"
        assert guess(idp, alice, "aaaa-bbbb-cccc-dddd") == "invalid_grant"

    @pytest.mark.parametrize("column", ["totp_locked_until", "lockout_until"])
    def test_its_lock_and_that_of_the_account_end_in_their_second(
        self, idp, alice, give_totp, clock, change, column
    ):
        seed = give_totp(idp, idp.store.find_account(alice.id))
        clock.pass_(60)
        change(f"UPDATE account SET {column} = :until WHERE id = :id", until=idp.now() + 1, id=alice.id)
        assert guess(idp, alice, pyotp.TOTP(seed).at(idp.now())) == "invalid_grant"
        clock.pass_(1)
        _, amr = m.check_second_factor(idp, PEER, alice.id, idp.now_ms() + 1, pyotp.TOTP(seed).at(idp.now()))
        assert amr == ["pwd", "otp", "mfa"]

    def test_a_code_of_a_seed_that_was_replaced_meanwhile_turns_nothing_on(self, idp, alice):
        stale = []
        for _ in range(2):
            seed = m.begin_totp(idp, m.LOCAL.acting_as("t"), alice.account)
            SECRETS.add(seed)
            stale.append((idp.store.find_account(alice.id), seed))
        account, seed = stale[0]
        with pytest.raises(m.Problem, match="^invalid_grant"):
            m.confirm_totp(idp, m.LOCAL.acting_as("t"), account, pyotp.TOTP(seed).at(idp.now()))
        assert not idp.store.find_account(alice.id).totp_sealed

    def test_a_recovery_code_opens_its_own_users_account_only(self, idp, alice, new_user, give_totp):
        bob = new_user("bob")
        for one in (alice, bob):
            give_totp(idp, idp.store.find_account(one.id))
        codes = m.make_recovery_codes(idp, m.LOCAL, bob.id)
        assert guess(idp, alice, codes[0]) == "invalid_grant" and idp.store.count_recovery_codes(bob.id) == 10

    def test_its_recovery_codes_go_with_it(self, idp, alice, give_totp):
        give_totp(idp, idp.store.find_account(alice.id))
        m.make_recovery_codes(idp, m.LOCAL, alice.id)
        m.disable_totp(idp, m.LOCAL.acting_as("t"), idp.store.find_account(alice.id))
        assert idp.store.count_recovery_codes(alice.id) == 0

    def test_a_revocation_between_the_steps_spends_nothing(self, idp, alice, give_totp, clock):
        give_totp(idp, idp.store.find_account(alice.id))
        codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
        proven = idp.now_ms()
        clock.pass_(1)
        m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "x")
        with pytest.raises(m.Problem):
            m.check_second_factor(idp, PEER, alice.id, proven, codes[0])
        assert idp.store.count_recovery_codes(alice.id) == 10


class TestThrottle:
    def test_names_that_do_not_exist_are_counted_like_those_that_do(self, idp, alice):
        for name in ("alice", "nobody"):
            for count in range(21):
                with pytest.raises(m.Problem) as caught:
                    m.authenticate_user(idp, m.Caller("198.51.100.1"), name, "wrong wrong")
                assert caught.value.code == ("invalid_grant" if count < 20 else "slow_down")
            assert int(dict(caught.value.headers)["Retry-After"]) >= 1

    def test_a_full_gate_says_so_and_lets_the_remembered_through(self, idp, alice, clock):
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        idp.hasher.gate.capacity = 0
        assert m.authenticate_user(idp, PEER, "alice", PASSWORD)
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(idp, PEER, "alice", "wrong wrong")
        assert caught.value.code == "slow_down" and caught.value.status == 429

    def test_logins_of_a_peer_that_holds_half_the_gate_are_told_to_come_back(self, idp, alice):
        gate = idp.hasher.gate
        gate.in_use, gate.per_peer["192.0.2.1"] = gate.capacity // 2, 1
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(idp, m.Caller("192.0.2.1", is_local=False), "alice", PASSWORD)
        assert caught.value.code == "slow_down"
        assert m.authenticate_user(idp, m.Caller("192.0.2.2", is_local=False), "alice", PASSWORD)


class TestAtTheMachine:
    """Whatever others do, the right password of the last administrator gets in on the Unix socket of ADMIN."""

    HERE = m.Caller("unix:uid=0", is_local=True)

    def test_no_failure_of_others_counts_there(self, idp, root):
        for peer in ("127.0.0.1", "::1", "203.0.113.9"):
            for _ in range(40):
                with pytest.raises(m.Problem):
                    m.authenticate_user(idp, m.Caller(peer), "root", "wrong wrong", admin=True)
        assert m.authenticate_user(idp, self.HERE, "root", PASSWORD, admin=True)[0].id == root.id

    def test_tries_there_are_limited_too_by_user_of_the_machine(self, idp, root):
        for count in range(21):
            with pytest.raises(m.Problem) as caught:
                m.authenticate_user(idp, self.HERE, "root", "wrong wrong", admin=True)
            assert caught.value.code == ("invalid_grant" if count < 20 else "slow_down")
        assert m.authenticate_user(idp, m.Caller("unix:uid=33", is_local=True), "root", PASSWORD, admin=True)

    def test_a_full_gate_and_a_crowd_at_the_name_hold_up_nobody_there(self, idp, root):
        gate, locks = idp.hasher.gate, idp.hasher.name_locks
        gate.in_use = gate.capacity
        with locks.hold("user", "root", "127.0.0.1") as name_lock:
            locks.blame(name_lock, "127.0.0.1")
            name_lock.users = locks.MAX_WAITERS + 1
            with pytest.raises(m.Problem) as caught:
                m.authenticate_user(idp, m.Caller("127.0.0.1"), "root", PASSWORD, admin=True)
            assert caught.value.code == "slow_down"
            assert m.authenticate_user(idp, self.HERE, "root", PASSWORD, admin=True)[0].id == root.id

    def test_who_is_not_the_last_administrator_is_locked_out_there_as_well(self, idp, root, alice, change):
        change("UPDATE account SET lockout_until = :until WHERE id = :id", until=idp.now() + 600, id=alice.id)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, self.HERE, "alice", PASSWORD)

    def test_the_audit_log_names_the_user_of_the_machine(self, idp, root):
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, self.HERE, "root", "wrong wrong", admin=True)
        assert idp.store.value("SELECT ip_address FROM audit ORDER BY seq DESC LIMIT 1") == "unix:uid=0"


class TestKnownBrowsers:
    """OWASP, Slow Down Online Guessing Attacks with Device Cookies"""

    def known(self, idp, someone, peer="203.0.113.9", before=""):
        """A caller from a browser in which somebody has just logged in."""
        account = idp.store.find_account(someone.id)
        return m.Caller(peer, is_local=False, device=m.sign_device(idp, m.Caller(device=before), account))

    def guess(self, idp, caller, name, times, code="invalid_grant"):
        for _ in range(times):
            with pytest.raises(m.Problem) as caught:
                m.authenticate_user(idp, caller, name, "wrong wrong")
            assert caught.value.code == code

    def test_no_stranger_shuts_the_user_out_of_one(self, idp, alice):
        caller = self.known(idp, alice)
        self.guess(idp, PEER, "alice", 20)
        self.guess(idp, m.Caller(caller.peer), "alice", 20)
        self.guess(idp, m.Caller(caller.peer), "alice", 1, "slow_down")
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.Caller("203.0.113.10"), "alice", PASSWORD)
        assert m.authenticate_user(idp, caller, "alice", PASSWORD)[0].id == alice.id

    def test_five_failures_lock_one_and_nobody_else_out(self, idp, alice, clock):
        caller, other = self.known(idp, alice), self.known(idp, alice)
        self.guess(idp, caller, "alice", 5)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, caller, "alice", PASSWORD)
        assert idp.store.find_account(alice.id).failed_logins == 0
        assert m.authenticate_user(idp, PEER, "alice", PASSWORD)
        assert m.authenticate_user(idp, other, "alice", PASSWORD)
        row = idp.store.value("SELECT secondary FROM audit WHERE action = 'user_locked_out'")
        assert row == f"until={m.iso(idp.now() + 300)};browser=known"
        clock.pass_(299)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, caller, "alice", PASSWORD)
        clock.pass_(1)
        assert m.authenticate_user(idp, caller, "alice", PASSWORD)

    def test_tries_in_one_are_throttled_and_counted_for_the_box(self, make_idp, options, idp, alice):
        caller, worker = self.known(idp, alice), make_idp(options)
        self.guess(idp, caller, "alice", 3)
        self.guess(worker, caller, "alice", 2)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, caller, "alice", PASSWORD)
        self.guess(idp, caller, "alice", 16)
        self.guess(idp, caller, "alice", 1, "slow_down")
        self.guess(idp, msgspec.structs.replace(caller, peer="198.51.100.1"), "alice", 1, "slow_down")

    def test_the_right_password_begins_the_count_anew(self, idp, alice):
        caller = self.known(idp, alice)
        for _ in range(3):
            self.guess(idp, caller, "alice", 4)
            assert m.authenticate_user(idp, caller, "alice", PASSWORD)

    @pytest.mark.parametrize(
        "forge",
        [
            lambda device, nonce, ms, tag: "", lambda device, nonce, ms, tag: nonce,
            lambda device, nonce, ms, tag: f"{nonce}~{ms}.{tag[::-1]}",
            lambda device, nonce, ms, tag: f"{nonce}~{int(ms) + 1}.{tag}",
            lambda device, nonce, ms, tag: f"{nonce[::-1]}~{ms}.{tag}",
            lambda device, nonce, ms, tag: f"{nonce}~{ms}", lambda device, nonce, ms, tag: f"~{ms}.{tag}",
            lambda device, nonce, ms, tag: f"{nonce}~\xb2.{tag}", lambda device, nonce, ms, tag: "~" * 4000,
            lambda device, nonce, ms, tag: "\xff" * 50,
            lambda device, nonce, ms, tag: nonce + f"~{ms}.{'A' * 22}" * 9 + f"~{ms}.{tag}",
        ],
    )
    def test_what_nobody_signed_is_a_stranger(self, idp, alice, forge):
        caller = self.known(idp, alice)
        forged = forge(caller.device, *caller.device.replace(".", "~").split("~"))
        assert forged != caller.device and m.find_device(idp, caller, alice.account)
        assert not m.find_device(idp, m.Caller(device=forged), alice.account)
        self.guess(idp, m.Caller(device=forged), "alice", 5)
        assert idp.store.find_account(alice.id).lockout_until > idp.now()

    def test_one_user_is_no_other(self, idp, alice, root):
        self.guess(idp, self.known(idp, alice), "root", 5)
        assert idp.store.find_account(root.id).lockout_until > idp.now()
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, self.known(idp, alice), "root", PASSWORD)

    def test_a_browser_knows_the_last_four_users(self, idp, new_user):
        users, device = [new_user(f"user{number}") for number in range(5)], ""
        for someone in (*users, users[1]):
            device = self.known(idp, someone, before=device).device
        known = [bool(m.find_device(idp, m.Caller(device=device), someone.account)) for someone in users]
        assert known == [False, True, True, True, True] and len(device) < 200

    @pytest.mark.parametrize(
        "change",
        [
            lambda idp, id: m.reset_password(idp, m.LOCAL.acting_as("t"), id, NEW_PASSWORD),
            lambda idp, id: m.revoke_user(idp, m.LOCAL.acting_as("t"), id, "logout_all"),
            lambda idp, id: m.set_lockout(idp, m.LOCAL.acting_as("t"), id, idp.now() + 600),
            lambda idp, id: m.set_user_active(idp, m.LOCAL.acting_as("t"), id, False),
            lambda idp, id: idp.store.put_meta("revoked_before", idp.now_ms()),
        ],
    )
    def test_what_ends_every_session_ends_it(self, idp, alice, root, change):
        caller = self.known(idp, alice)
        with idp.store.transaction(identity=True):
            change(idp, alice.id)
        assert not m.find_device(idp, caller, idp.store.find_account(alice.id))

    def test_it_ends_ninety_days_after_the_last_login(self, idp, alice, clock):
        caller = self.known(idp, alice)
        clock.pass_(m.DEVICE_TTL - 1)
        assert m.find_device(idp, caller, alice.account)
        clock.pass_(1)
        assert not m.find_device(idp, caller, alice.account)

    def test_a_second_factor_is_asked_for_there_as_well_and_is_throttled_there(self, idp, alice, give_totp, clock):
        seed, caller = give_totp(idp, alice.account), self.known(idp, alice)
        self.guess(idp, PEER, "alice", 5)
        for _ in range(2):
            with pytest.raises(m.Problem):
                m.check_second_factor(idp, caller, alice.id, idp.now_ms(), "000000")
        for _ in range(40):
            with pytest.raises(m.Problem):
                m.check_second_factor(idp, m.Caller(caller.peer), alice.id, idp.now_ms(), "000000")
        clock.pass_(30)
        code = pyotp.TOTP(seed).at(idp.now())
        assert m.check_second_factor(idp, caller, alice.id, idp.now_ms(), code)[1] == ["pwd", "otp", "mfa"]

    def test_what_an_administrator_locked_for_ever_is_locked_there_too(self, idp, alice, change):
        caller = self.known(idp, alice)
        change("UPDATE account SET lockout_until = :until WHERE id = :id", until=FOREVER, id=alice.id)
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, caller, "alice", PASSWORD)

    def test_an_administrator_clears_what_is_locked_there(self, idp, alice):
        caller = self.known(idp, alice)
        self.guess(idp, caller, "alice", 5)
        m.set_lockout(idp, m.LOCAL.acting_as("t"), alice.id, None)
        assert m.authenticate_user(idp, caller, "alice", PASSWORD)


class TestNewUsers:
    def test_a_name_is_folded_once_and_can_log_in(self, idp):
        made = m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser(" \uff21nn\u00c4 ", "Ann@Example.ORG", PASSWORD))
        assert (made.username, made.email) == ("ann\u00e4", "ann@example.org")
        assert m.authenticate_user(idp, m.LOCAL, "ANNA\u0308", PASSWORD)[0].id == made.id

    @pytest.mark.parametrize("username, email", [("ALICE", "other@example.org"), ("other", "Alice@Example.org")])
    def test_names_and_addresses_are_taken_once(self, idp, alice, username, email):
        with pytest.raises(m.Problem) as caught:
            m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser(username, email, PASSWORD))
        assert caught.value.code == "conflict" and "alice" not in str(caught.value.as_err())

    def test_each_leaves_a_row_with_its_maker(self, idp, alice):
        row = idp.store.list_audit("user_created")[0]
        assert (row.actor_id, row.target, row.secondary) == ("test", "alice", alice.id)

    @pytest.mark.parametrize(
        "member, value",
        [
            ("username", ""), ("username", "x" * 101), ("username", "a\x07b"),
            ("username", "3855db1d-465e-412b-b1f4-b5cd78b4ae9f"), ("email", "nobody"), ("email", "a b@c"),
            ("password", "short"), ("password", "password1"), ("password", "newcomer"), ("password", "x" * 256),
        ],
    )
    def test_what_is_refused_names_the_member(self, idp, member, value):
        good = {"username": "newcomer", "email": "new@example.org", "password": PASSWORD}
        with pytest.raises(m.Problem) as caught:
            m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser(**(good | {member: value})))
        assert list(caught.value.errors) == [member]
