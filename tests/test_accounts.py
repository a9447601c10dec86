"""Users: who may in, lockout, second factor."""

import threading

import microauthd as m
import pyotp
import pytest
from conftest import PASSWORD

GOOD = {"grant_type": "password", "username": "alice", "password": PASSWORD}


def give_totp(idp, someone):
    seed = m.new_totp_seed()
    m.enable_totp(idp, someone.account, seed, pyotp.TOTP(seed).at(idp.now()))
    return seed


def fail(auth, service, **more):
    return auth.post("/token", GOOD | {"password": "wrong wrong"} | more, auth=service)


class TestOneAnswer:
    """Whatever is wrong, an attacker hears the same."""

    def refusals(self, idp, auth, service, new_client, new_user, case):
        store, now = idp.store, idp.now()
        if case == "unknown user":
            return GOOD | {"username": "nobody"}, service
        if case == "wrong password":
            return GOOD | {"password": "wrong wrong"}, service
        alice = store.find_account_by_name("alice")
        with store.transaction():
            if case == "inactive":
                store.run("UPDATE account SET is_active = 0 WHERE id = :id", id=alice.id)
            if case == "locked":
                store.run("UPDATE account SET lockout_until = :until WHERE id = :id", id=alice.id, until=now + 60)
            if case == "client demands a second factor":
                store.put_feature(store.find_client("service").id, "ENABLE_TOTP", True, "")
        idp.store.generation.bump()
        if case.startswith("one-time code"):
            seed = m.new_totp_seed()
            code = pyotp.TOTP(seed).at(now)
            m.enable_totp(idp, alice, seed, code)
            return GOOD | {"one-time code missing": {}, "one-time code wrong": {"totp": "000000" if code != "000000" else "000001"}, "one-time code used": {"totp": code}}[case], service
        return GOOD, service

    @pytest.mark.parametrize("case", [
        "wrong password", "inactive", "locked", "client demands a second factor",
        "one-time code missing", "one-time code wrong", "one-time code used",
    ])
    def test_every_refusal_is_that_of_an_unknown_user(self, idp, auth, service, alice, new_client, new_user, case, monkeypatch):
        unknown = auth.post("/token", GOOD | {"username": "nobody"}, auth=service)
        assert unknown.status == 403 and unknown.json["error"] == "invalid_grant"
        form, client = self.refusals(idp, auth, service, new_client, new_user, case)
        hashes = []
        verify = idp.hasher.verify
        monkeypatch.setattr(idp.hasher, "verify", lambda phc, password: hashes.append(phc) or verify(phc, password))
        refused = auth.post("/token", form, auth=client)
        assert (refused.status, refused.body, refused.headers) == (unknown.status, unknown.body, unknown.headers)
        assert len(hashes) == 1, "the same Argon2 work"

    def test_an_unknown_user_costs_a_hash_too(self, idp, auth, service, monkeypatch):
        auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        calls = []
        monkeypatch.setattr(m, "argon2_verify", lambda *words: calls.append(words) or m.argon2_hash and (_ for _ in ()).throw(m.Argon2Error("does not match")))
        auth.post("/token", GOOD | {"username": "nobody"}, auth=service)
        assert len(calls) == 1

    def test_a_remembered_password_does_not_tell_that_it_is_right(self, idp, auth, service, alice, log_in, monkeypatch):
        log_in(alice)
        with idp.store.transaction():
            idp.store.run("UPDATE account SET lockout_until = :until WHERE id = :id", id=alice.id, until=idp.now() + 60)
        hashes = []
        verify = idp.hasher.verify
        monkeypatch.setattr(idp.hasher, "verify", lambda *words: hashes.append(1) or verify(*words))
        assert auth.post("/token", GOOD, auth=service).status == 403
        assert hashes


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

    def test_a_pause_restarts_the_count(self, idp, auth, service, alice, clock):
        for _ in range(4):
            fail(auth, service)
        clock.pass_(301)
        fail(auth, service)
        assert auth.post("/token", GOOD, auth=service).status == 200

    def test_a_longer_lockout_set_by_an_administrator_stays(self, idp, auth, service, alice):
        with idp.store.transaction():
            idp.store.run("UPDATE account SET lockout_until = :until WHERE id = :id", until=m.FOREVER, id=alice.id)
        for _ in range(6):
            fail(auth, service)
        assert idp.store.find_account(alice.id).lockout_until == m.FOREVER

    def test_parallel_failures_are_all_counted(self, idp, alice):
        def attempt(number):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.Origin(f"198.51.100.{number}"), "alice", "wrong wrong")

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert idp.store.find_account(alice.id).lockout_until > idp.now()
        actions = [row.action for row in idp.store.list_audit(limit=50)]
        assert actions.count("user_locked_out") == 1 and actions.count("user_login_failed") == 8

    def test_the_last_administrator_can_try_at_the_machine_itself(self, idp, root):
        remote = m.Origin("203.0.113.9", is_local=False)
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

    def test_it_is_asked_and_a_code_works_once(self, idp, auth, admin, service, root, clock):
        seed = give_totp(idp, root)
        clock.pass_(90)
        code = pyotp.TOTP(seed).at(idp.now())
        form = GOOD | {"username": "root"}
        assert auth.post("/token", form, auth=service).status == 403
        assert auth.post("/token", form | {"totp": code}, auth=service).status == 200
        assert auth.post("/token", form | {"totp": code}, auth=service).status == 403
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403
        clock.pass_(30)
        assert admin.post("/token", {"username": "root", "password": PASSWORD, "totp": pyotp.TOTP(seed).at(idp.now())}).status == 200

    def test_guessing_codes_locks_it(self, idp, alice, clock):
        seed = give_totp(idp, alice)
        clock.pass_(90)
        code = pyotp.TOTP(seed).at(idp.now())
        for number in range(m.TOTP_TRIES):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.Origin(f"198.51.100.{number}"), "alice", PASSWORD, "000000" if code != "000000" else "000001")
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(idp, m.Origin("198.51.100.99"), "alice", PASSWORD, code)
        assert "second factor locked" in caught.value.log

    def test_the_seed_is_sealed(self, idp, alice):
        seed = give_totp(idp, alice)
        sealed = idp.store.find_account(alice.id).totp_sealed
        assert seed not in sealed and idp.seal.open(sealed, alice.id) == seed
        with pytest.raises(m.Problem):
            m.Seal(bytes(31) + b"1").open(sealed, alice.id)

    def test_amr_tells_it(self, idp, alice, clock):
        seed = give_totp(idp, alice)
        clock.pass_(90)
        assert m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD, pyotp.TOTP(seed).at(idp.now()))[1] == ["pwd", "otp", "mfa"]


class TestThrottle:
    def test_names_that_do_not_exist_are_counted_like_those_that_do(self, idp, alice):
        for name in ("alice", "nobody"):
            for count in range(21):
                with pytest.raises(m.Problem) as caught:
                    m.authenticate_user(idp, m.Origin("198.51.100.1"), name, "wrong wrong")
                assert caught.value.code == ("invalid_grant" if count < 20 else "slow_down")
            assert int(dict(caught.value.headers)["Retry-After"]) >= 1

    def test_a_full_gate_says_so_and_lets_the_remembered_through(self, idp, alice, clock):
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        idp.hasher.gate.places = threading.Semaphore(0)
        assert m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        with pytest.raises(m.Problem) as caught:
            m.authenticate_user(idp, m.LOCAL, "alice", "wrong wrong")
        assert caught.value.code == "slow_down" and caught.value.status == 429


class TestNewUsers:
    @pytest.mark.parametrize("member, value", [
        ("username", ""), ("username", "x" * 101), ("username", "a\x07b"), ("username", "3855db1d-465e-412b-b1f4-b5cd78b4ae9f"),
        ("email", "nobody"), ("email", "a b@c"), ("password", "short"), ("password", "password1"), ("password", "newcomer"), ("password", "x" * 256),
    ])
    def test_what_is_refused_names_the_member(self, idp, member, value):
        good = {"username": "newcomer", "email": "new@example.org", "password": PASSWORD}
        with pytest.raises(m.Problem) as caught:
            m.create_user(idp, m.LOCAL, "test", m.CreateUser(**(good | {member: value})))
        assert list(caught.value.errors) == [member]

    def test_a_changed_password_is_forgotten_by_the_cache(self, idp, alice):
        m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)
        idp.store.set_password_hash(alice.id, idp.hasher.hash("another good one"), idp.now())
        with pytest.raises(m.Problem):
            m.authenticate_user(idp, m.LOCAL, "alice", PASSWORD)


class TestFailures:
    """What a failure writes, and what it must not undo."""

    @pytest.mark.parametrize("audited", [True, False])
    @pytest.mark.parametrize("case", ["unknown user", "wrong password", "wrong code", "inactive"])
    def test_every_refusal_is_one_durable_write(self, make_idp, idp, alice, case, audited):
        if case == "wrong code":
            give_totp(idp, alice)
        if case == "inactive":
            with idp.store.transaction():
                idp.store.run("UPDATE account SET is_active = 0 WHERE id = :id", id=alice.id)
        from conftest import CHEAP

        other = make_idp(m.Options(**CHEAP, enable_audit_logging=audited))
        commits = []
        other.store.connection.set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
        before = other.store.connection.total_changes
        with pytest.raises(m.Problem):
            m.authenticate_user(other, m.LOCAL, "nobody" if case == "unknown user" else "alice", "wrong wrong" if case == "wrong password" else PASSWORD, "12345x")
        assert len(commits) == 1 and other.store.connection.total_changes > before

    def test_a_rehash_never_undoes_a_newer_password(self, idp, alice, monkeypatch):
        newer = idp.hasher.hash("a newer password")
        idp.store.set_password_hash(alice.id, idp.hasher.hash(PASSWORD), idp.now())
        account = idp.store.find_account(alice.id)
        idp.store.set_password_hash(alice.id, newer, idp.now())
        m.rehash(idp, account, PASSWORD)
        assert idp.store.find_account(alice.id).password_hash == newer

    def test_what_was_ended_between_password_and_token_is_not_reborn(self, idp, auth, admin, service, root, monkeypatch):
        authenticate = m.authenticate_user

        def slow(*words, **more):
            found = authenticate(*words, **more)
            m.end_user(idp, m.LOCAL, "test", root.id, "logout_all")
            return found

        monkeypatch.setattr(m, "authenticate_user", slow)
        assert auth.post("/token", GOOD | {"username": "root"}, auth=service).status == 403
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403

    def test_two_locked_administrators_can_still_try_at_the_machine(self, idp, root, new_user):
        other = new_user("second", admin=True)
        with idp.store.transaction():
            idp.store.run("UPDATE account SET lockout_until = :until", until=idp.now() + 600)
        for someone in (root, other):
            assert m.authenticate_user(idp, m.LOCAL, someone.username, PASSWORD, admin=True)

    def test_what_a_proxy_brings_is_not_the_machine_itself(self, idp, admin, root):
        with idp.store.transaction():
            idp.store.run("UPDATE account SET lockout_until = :until", until=idp.now() + 600)
        form = {"username": "root", "password": PASSWORD}
        app = admin.app

        def proxied(environ, start_response):
            return app(environ | {"microauthd.proxied": True}, start_response)

        admin.app = proxied
        assert admin.post("/token", form, peer="127.0.0.1").status == 403
        admin.app = app
        assert admin.post("/token", form, peer="127.0.0.1").status == 200

    def test_names_of_any_length_cost_the_throttle_nothing(self):
        throttle = m.Throttle(lambda: 0.0)
        throttle.spend("192.0.2.1", "x" * 60_000)
        assert all(len(part) < 40 for key in throttle.buckets for part in key)
        for number in range(1, 122):
            throttle.spend(f"2001:db8::{number:x}", f"name{number}")
        with pytest.raises(m.Problem):
            throttle.check("2001:db8::ffff", "another")
