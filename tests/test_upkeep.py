"""Upkeep: what is over goes, the rest stays."""

import time
from types import SimpleNamespace

import jwt
import appliance.upkeep as upkeep_room
import microauthd as m
import msgspec
import pytest
from conftest import CHEAP, CLAIMS, DAY, Machine, NOON, PASSWORD, YEARS, kids, left, made, opened, under_way
from appliance.base import StartupError
from appliance.base.clock import IAT_SKEW, RELEASED_AT
from appliance.base.settings import Options
from appliance.base.database import Unavailable
from appliance.base.store import Family, RetiredKey, Session, Store, chain
from appliance.base.objects import ChangeSecret, CreateUser
from appliance.upkeep import ClockThread, Upkeep, advance_key_states, audit_limit, log_audit_head
from appliance.recovery import back_up, describe_keys, restore, revoke_key, rotate_keys


def purge(idp, pause=lambda seconds: None):
    upkeep_room.purge(idp, pause)


def hinted(idp, token):
    """The claims that an id_token_hint is read with, or None."""
    return m.read_hints(idp, m.LOCAL, token).id_token


def count(idp, table):
    return idp.store.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


class TestPurge:
    def test_a_session_goes_a_week_after_its_end(self, idp, machine, log_in, alice, clock):
        answer = log_in(alice)
        idp.store.flush()
        for seconds, there in ((3600 + 7 * DAY, True), (2, False)):
            clock.pass_(seconds)
            purge(idp)
            assert bool(idp.store.find_session(answer["jti"])) is bool(idp.store.find_session(machine["jti"])) is there

    def test_a_tombstone_outlives_its_token(self, idp, auth, service, machine, clock):
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        for seconds, there in ((3600, True), (IAT_SKEW + 1, False)):
            clock.pass_(seconds)
            purge(idp)
            assert idp.store.is_revoked(machine["jti"]) is there
            assert auth.get("/me", bearer=machine["access_token"]).status == 401

    def test_a_login_goes_when_nothing_can_hang_on_it_any_more(self, idp, log_in, alice, clock):
        log_in(alice)
        clock.pass_(2592000 + 7 * DAY)
        purge(idp)
        assert count(idp, "family") == 1
        clock.pass_(1)
        purge(idp)
        assert count(idp, "family") == count(idp, "refresh_token") == 0

    def test_a_code_is_remembered_for_a_day_after_its_end(self, idp, alice, clock):
        """So that its reuse ends its login."""
        under_way(idp, alice.id)
        for seconds, there in ((60 + DAY, 1), (1, 0)):
            clock.pass_(seconds)
            purge(idp)
            assert left(idp)[0] == there

    def test_hints_go_when_their_handle_has_expired(self, idp, clock):
        m.park_hints(idp, m.LOCAL, m.Hints("alice"))
        purge(idp)
        assert count(idp, "parked_hints") == 1
        clock.pass_(m.HINTS_TTL + 1)
        purge(idp)
        assert count(idp, "parked_hints") == 0

    def test_a_login_under_way_and_a_browser_session_go_when_they_are_over(self, idp, alice, clock):
        under_way(idp, alice.id)
        m.begin_browser_session(idp, m.LOCAL, alice.account, ["pwd"], idp.now(), None)
        for seconds, rows in ((60, (1, 1)), (1, (0, 1)), (DAY - 61, (0, 1)), (1, (0, 0))):
            clock.pass_(seconds)
            purge(idp)
            assert (count(idp, "login_transaction"), count(idp, "browser_session")) == rows

    def test_a_session_at_the_console_goes_when_it_is_over(self, idp, root, clock):
        m.begin_console(idp, m.LOCAL, root.account, ["pwd"], None)
        for seconds, there in ((idp.options.console_absolute_expiration, 1), (1, 0)):
            clock.pass_(seconds)
            purge(idp)
            assert count(idp, "admin_session") == there

    def test_failures_in_a_browser_are_remembered_for_a_day_and_an_hour(self, idp, alice, clock):
        idp.store.count_failed_device("d", alice.id, idp.now(), 300, 5, 300, 3600)
        for seconds, there in ((DAY + 3600, 1), (1, 0)):
            clock.pass_(seconds)
            purge(idp)
            assert count(idp, "device_failure") == there

    def test_a_living_login_keeps_its_refresh_tokens_working(self, idp, auth, service, log_in, alice, clock):
        """Purging sessions once took the refresh tokens along."""
        token = log_in(alice)["refresh_token"]
        for _ in range(4):
            clock.pass_(2 * DAY)
            purge(idp)
            answer = auth.post("/token", {"grant_type": "refresh_token", "refresh_token": token}, auth=service)
            assert answer.status == 200
            token = answer.json["refresh_token"]

    def test_a_retired_secret_goes_and_the_living_stays(self, idp, auth, service, clock):
        second = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60))
        for seconds, secrets in ((60, 2), (1, 1)):
            clock.pass_(seconds)
            purge(idp)
            assert count(idp, "client_secret") == secrets
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=("service", second)).status == 200

    def test_nothing_a_person_made_is_purged(self, idp, service, alice, root, clock):
        before = {
            table: count(idp, table)
            for table in (
                "account", "client", "client_secret", "scope", "user_scope", "client_scope", "user_role", "role",
            )
        }
        clock.pass_(3000 * DAY)
        purge(idp)
        assert {table: count(idp, table) for table in before} == before

    def test_zero_days_keep_everything(self, make_idp, clock):
        idp = make_idp(Options(**CHEAP, token_purge_days=0, refresh_token_purge_days=0, audit_log_retention_days=0))
        account = m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser("bob", "bob@example.org", PASSWORD))
        with idp.store.transaction():
            idp.store.insert(Family("s", account.id, "c", "", "pwd", 0, "", 1, idp.now(), None))
            idp.store.insert(
                Session(
                    m.new_jti(idp.now_ms()), account.id, "c", "s", "", "access", "auth", "pwd", idp.now(), idp.now(),
                    None,
                )
            )
        clock.pass_(3000 * DAY)
        purge(idp)
        assert count(idp, "family") == count(idp, "session") == 1 and count(idp, "audit") >= 1

    def test_the_size_of_the_audit_log_is_looked_at_every_minute(self, idp):
        with idp.store.transaction():
            row = (idp.now(), "x", "act", "", "s" * 200, "", "", "", "failure")
            idp.store.append_refusals([row] * 1200)
        upkeep = Upkeep(idp)
        assert upkeep.audit_limit == audit_limit(idp.options, idp.store.path)
        upkeep.audit_limit, waits = 1_000_000, []
        upkeep.ending = SimpleNamespace(wait=lambda seconds: waits.append(seconds) or len(waits) > 30)
        upkeep.run()
        assert idp.store.list_audit("audit_purged") and idp.store.count_audit("act") < 500

    def test_audit_rows_go_by_age_and_the_chain_goes_on(self, idp, service, alice, clock):
        last = idp.store.list_audit(limit=1)[0]
        clock.pass_(31 * DAY)
        purge(idp)
        rows = list(reversed(idp.store.list_audit(limit=1000)))
        assert rows[0].seq == last.seq, "the newest stays: the next continues its hash"
        digest = rows[0].row_sha256
        for row in rows[1:]:
            digest = chain(digest, row.seq, (*msgspec.structs.astuple(row)[1:9], row.result))
            assert digest == row.row_sha256
        assert rows[-1].action == "purged" and "audit=" in rows[-1].secondary

    def test_it_goes_in_slices_and_lets_writers_between(self, idp, monkeypatch, clock):
        monkeypatch.setattr("appliance.base.store.SLICE", 10)
        for number in range(35):
            idp.store.enqueue((m.new_jti(idp.now_ms()), "service", "", idp.now(), idp.now() + number), None)
        idp.store.flush()
        clock.pass_(8 * DAY)
        pauses = []
        upkeep_room.purge(idp, pauses.append)
        assert count(idp, "session") == 0 and len(pauses) > 4

    def test_what_expires_late_does_not_keep_what_expired_early(self, idp, monkeypatch, clock):
        monkeypatch.setattr("appliance.base.store.SLICE", 5)
        for number in range(23):
            idp.store.enqueue(
                (m.new_jti(idp.now_ms()), "service", "", idp.now(), idp.now() + (3600 if number % 2 else 3000 * DAY)),
                None,
            )
        idp.store.flush()
        clock.pass_(9 * DAY)
        purge(idp)
        assert count(idp, "session") == 12

    def test_a_clock_that_cannot_be_right_purges_nothing(self, idp, machine, clock):
        idp.store.flush()
        before = idp.store.list_audit(limit=1000)
        clock.now = 86400.0
        purge(idp)
        assert idp.store.list_audit(limit=1000) == before and "clock.behind" in idp.stream.getvalue()
        clock.now = RELEASED_AT + 2000.0
        purge(idp)
        assert "clock.right" in idp.stream.getvalue()

    def test_a_tombstone_stays_as_long_as_a_clock_may_be_behind(self, idp, auth, service, machine, clock):
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        clock.pass_(3600 + IAT_SKEW - 1)
        purge(idp, lambda seconds: None)
        assert idp.store.is_revoked(machine["jti"])


class TestTheHeadOfTheAuditLog:
    def test_it_is_written_down_once_an_hour(self, idp, monkeypatch):
        done, turns = [], iter(range(1 + 3 * 3600 // Upkeep.INTERVAL))
        monkeypatch.setattr(Upkeep, "attempt", lambda self, work, *words: done.append((work, words)))
        upkeep = Upkeep(idp)
        monkeypatch.setattr(upkeep.ending, "wait", lambda seconds: next(turns, None) is None)
        upkeep.run()
        assert [words for work, words in done if work is log_audit_head] == [(idp.store, idp.log)] * 3


class TestThread:
    def test_a_failure_is_said_and_the_next_one_comes(self, idp, monkeypatch):
        calls = []

        def fail(idp, pause):  # a name of its own: it is in the log
            calls.append(1)
            raise Unavailable("disk full", 5)

        monkeypatch.setattr("appliance.upkeep.purge", fail)
        upkeep = Upkeep(idp)
        wait = upkeep.ending.wait
        upkeep.ending.wait = lambda seconds: wait(min(seconds, 0.001))
        upkeep.start()
        deadline = time.monotonic() + 60
        while len(calls) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        upkeep.ending.set()
        upkeep.join(60)
        assert not upkeep.is_alive() and "disk full" in idp.stream.getvalue()


def refuse(*words):
    raise Unavailable("the disk is full", 5)


class TestClockwork:
    @pytest.fixture
    def box(self, idp):
        machine = Machine(float(idp.now()))
        idp.clock = machine.keeper
        return machine

    def test_what_was_done_at_times_that_are_not_yet_is_ended(self, idp, box, service, alice, log_in, auth):
        kept = log_in(alice)
        clock_thread = ClockThread(idp)
        box.wall += YEARS
        box.pass_(601)
        token = log_in(alice)
        assert auth.get("/me", bearer=token["access_token"]).status == 200 and idp.now() > NOON + YEARS - DAY
        clock_thread.step()
        assert "clock.probation" in idp.stream.getvalue() and idp.store.meta("clock") == ""
        box.wall -= YEARS
        clock_thread.step()
        said = idp.store.list_audit("clock_went_back", 1)[0]
        assert said.secondary != "ended=0" and said.at == idp.now()
        assert auth.get("/me", bearer=token["access_token"]).status == 401
        refused = auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": token["refresh_token"]}, auth=service
        )
        assert refused.json["error"] == "invalid_grant"
        good = auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": kept["refresh_token"]}, auth=service
        )
        assert good.status == 200, good
        assert log_in(alice)["access_token"] and idp.store.clock_floor() <= idp.now() + 60

    def test_it_says_what_is_wrong_and_notes_what_time_it_is(self, idp, box):
        clock_thread = ClockThread(idp)
        clock_thread.step()
        assert idp.store.meta("clock") == str(idp.now())
        box.wall -= 5000
        clock_thread.step()
        clock_thread.step()
        assert (
            idp.stream.getvalue().count("clock.behind") == 1
            and not idp.check_clock()
            and not idp.check_clock(irreversible=False)
        )
        for seconds, said in ((3540, 1), (60, 2)):
            box.pass_(seconds, 60)
            clock_thread.step()
            assert idp.stream.getvalue().count("clock.behind") == said, "and again every hour"

    def test_an_operator_is_believed(self, idp, box):
        clock_thread = ClockThread(idp)
        box.wall -= 30 * DAY
        clock_thread.step()
        assert idp.now() > box.wall + 29 * DAY
        idp.store.put_meta("clock_accepted", "1")
        clock_thread.step()
        assert idp.now() == int(box.wall) and idp.check_clock()
        assert len(idp.store.list_audit("clock_went_back", 5)) == 1, "what was done at later times is ended"

    def test_what_an_operator_said_of_a_clock_that_was_right_is_not_said_of_a_later_one(self, idp, box):
        clock_thread = ClockThread(idp)
        clock_thread.step()
        idp.store.put_meta("clock_accepted", "1")
        for _ in range(3):
            box.pass_(3600, 60)
            clock_thread.step()
        box.wall += YEARS
        for _ in range(3):
            box.pass_(1)
            clock_thread.step()
        assert box.keeper.state == "ahead" and idp.now() < NOON + DAY
        idp.store.put_meta("clock_accepted", "2")
        clock_thread.step()
        assert idp.now() == int(box.wall)

    def test_what_could_not_be_ended_at_once_is_ended_later(self, idp, box, service, alice, log_in, auth, monkeypatch):
        clock_thread = ClockThread(idp)
        clock_thread.step()
        box.wall += YEARS
        box.pass_(601)
        token = log_in(alice)
        box.wall -= YEARS
        with monkeypatch.context() as patched:
            patched.setattr(Store, "revoke_future_rows", refuse)
            with pytest.raises(Unavailable):
                clock_thread.step()
        box.pass_(1)
        clock_thread.step()
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": token["refresh_token"]}, auth=service
            ).json["error"]
            == "invalid_grant"
        )
        assert len(idp.store.list_audit("clock_went_back", 5)) == 1

    def test_nobody_stays_locked_out_until_a_time_that_was_wrong(
        self, idp, box, service, alice, new_user, log_in, auth
    ):
        clock_thread, bob = ClockThread(idp), new_user("bob")
        clock_thread.step()
        box.wall += YEARS
        box.pass_(601)
        for username in ("alice", "bob"):
            for _ in range(6):
                auth.post("/token", {"grant_type": "password", "username": username, "password": "wrong"}, auth=service)
        m.set_lockout(idp, m.LOCAL.acting_as("test"), bob.id, idp.now() + 7 * DAY)
        idp.store.run("UPDATE account SET totp_locked_until = :until WHERE username = 'alice'", until=idp.now() + 600)
        left, until = (
            idp.store.find_account(alice.id).lockout_until - idp.now(), idp.store.find_account(bob.id).lockout_until,
        )
        assert left > 0
        box.wall -= YEARS
        clock_thread.step()
        found = idp.store.find_account(alice.id)
        assert 0 < found.lockout_until - idp.now() <= left and found.totp_locked_until <= idp.now() + 3600, (
            "as long to go as before, and no longer"
        )
        assert idp.store.find_account(bob.id).lockout_until == until, "what an administrator said stays"
        box.pass_(3700, 60)
        assert log_in(alice)

    def test_a_secret_that_was_replaced_at_a_wrong_time_ends(self, idp, box, service, auth):
        clock_thread = ClockThread(idp)
        clock_thread.step()
        box.wall += YEARS
        box.pass_(601)
        m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60))
        box.wall -= YEARS
        clock_thread.step()
        box.pass_(32 * DAY, 600)
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 401

    def test_a_brake_on_guessing_lets_go_in_time_that_never_goes_back(self, make_idp, options, alice, auth):
        machine = Machine(RELEASED_AT + 1000.0)
        throttle = m.Idp(options, None, None, None, None, machine.keeper).throttle
        machine.wall += YEARS
        machine.pass_(601)
        for _ in range(25):
            throttle.spend("192.0.2.7", "nobody")
        machine.wall -= YEARS
        machine.pass_(1)
        with pytest.raises(m.Problem):
            throttle.check("192.0.2.7", "nobody")
        machine.pass_(60, 1)
        throttle.check("192.0.2.7", "nobody")

    @pytest.mark.parametrize("state", ["probation", "ahead", "behind"])
    @pytest.mark.parametrize(
        "path, body",
        [
            ("/audit-logs/purge", {"older_than_days": 90}), ("/refresh-tokens/purge", {}), ("/sessions/purge", {}),
            ("/tokens/purge", {}),
        ],
    )
    def test_nor_does_any_other_purge_when_an_administrator_asks(
        self, idp, box, admin, root, alice, log_in, auth, service, state, path, body
    ):
        kept = log_in(alice)
        box.pass_(2 * DAY, 60)
        box.wall += {"behind": -5000}.get(state, YEARS)
        box.pass_(700 if state == "probation" else 1)
        assert box.keeper.state == state
        bearer = admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "test"}).json[
            "access_token"
        ]
        before = [count(idp, table) for table in ("session", "refresh_token")], idp.store.list_audit(limit=1000)[-3:]
        refused = admin.post(path, json_body=body, bearer=bearer)
        assert refused.status == 503 and refused.headers["retry-after"], refused
        assert before == (
            [count(idp, table) for table in ("session", "refresh_token")], idp.store.list_audit(limit=1000)[-3:],
        )
        box.wall += {"behind": 5000}.get(state, -YEARS)
        ClockThread(idp).step()
        box.pass_(1)
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": kept["refresh_token"]}, auth=service
            ).status
            == 200
        )

    @pytest.mark.parametrize(
        "state, purged", [("right", True), ("probation", False), ("ahead", False), ("behind", False)]
    )
    def test_only_a_trusted_clock_purges(self, idp, box, state, purged, alice, log_in):
        log_in(alice)
        idp.store.flush()
        box.pass_(20 * DAY, 60)
        if state == "probation":
            box.wall += YEARS
            box.pass_(700)
        elif state != "right":
            box.wall += {"ahead": YEARS, "behind": -5000}[state]
            box.pass_(1)
        assert box.keeper.state == state
        purge(idp)
        assert (count(idp, "session") == 0) is purged


class TestKeys:
    def test_the_next_key_is_published_before_it_signs_and_the_old_one_until_its_last_token_is_dead(
        self, house, monkeypatch
    ):
        """A client that caches the key set for its max-age never meets a kid it does not know."""
        start = time.time()
        now = [start]
        idp = opened(house, lambda: now[0])
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        cached, cached_at, tokens, signed_by = jwt.PyJWKSet.from_json(idp.auth_ring.jwks().decode()), now[0], [], set()
        rotated = False
        for _ in range(120):
            now[0] += 60
            idp.next_ring_check = 0
            if now[0] >= cached_at + 300:
                cached, cached_at = jwt.PyJWKSet.from_json(idp.auth_ring.jwks().decode()), now[0]
            if not rotated and now[0] > start + 1000:
                with monkeypatch.context() as patched:
                    patched.setattr("appliance.recovery.open_idp", lambda options: opened(options, lambda: now[0]))
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

    @pytest.mark.parametrize(
        "port, options, flag, longest",
        [
            ("auth", {}, "7200", 7200), ("auth", {}, "60", 3600), ("auth", {"token_expiration": 60}, "", 600),
            ("admin", {"admin_token_expiration": 1200}, "7200", 1200),
        ],
    )
    def test_a_retired_key_stays_as_long_as_a_token_that_it_signed_may_live(
        self, tmp_path, monkeypatch, port, options, flag, longest
    ):
        """The longest TOKEN_EXPIRATION of any client, an ID token's 600 seconds, and the skew of a reader's clock."""
        monkeypatch.chdir(tmp_path)
        house = made(tmp_path, **options)
        old = next(row["kid"] for row in describe_keys(house) if row["port"] == port and row["alg"] == "ES256")
        (kid,) = rotate_keys(house, [port], ["ES256"])
        now = [next(row["since"] for row in describe_keys(house) if row["kid"] == kid) + house.key_overlap]
        idp = opened(house, lambda: now[0])
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        if flag:
            m.set_flag(idp, m.LOCAL.acting_as("test"), "app", "TOKEN_EXPIRATION", True)
            m.set_flag_option(idp, m.LOCAL.acting_as("test"), "app", "TOKEN_EXPIRATION", flag)
        for passed, stays in ((longest + IAT_SKEW - 1, True), (1, False)):
            now[0] += passed
            advance_key_states(idp)
            assert (old in kids(house)) is stays
        idp.store.close()

    def test_no_key_changes_its_state_by_a_clock_on_probation(self, house):
        rotate_keys(house, ["auth"], ["ES256"])
        idp, machine = opened(house), Machine(float(int(time.time())))
        idp.clock, idp.ring_versions = machine.keeper, {"auth": (None, None), "admin": (None, None)}
        machine.wall += YEARS
        machine.pass_(700)
        before = {path: open(path).read() for path, _, _ in m.ring_files(house).values()}
        assert machine.keeper.state == "probation"
        advance_key_states(idp)
        assert {path: open(path).read() for path in before} == before
        idp.store.close()

    def test_a_clock_set_back_undoes_nothing(self, house):
        rotate_keys(house, ["auth"], ["ES256"])
        now = [time.time()]
        idp = opened(house, lambda: now[0])
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        before = idp.auth_ring.access.kid
        now[0] += 901
        advance_key_states(idp)
        idp.next_ring_check = 0
        after = idp.auth_ring.access.kid
        now[0] -= 5000
        idp.next_ring_check = 0
        advance_key_states(idp)
        assert before != after == idp.auth_ring.access.kid
        idp.store.close()


class TestRetiredKeys:
    """OpenID Connect RP-Initiated Logout §2: an id_token_hint is welcome when its token has long expired."""

    @pytest.fixture
    def retire(self, house, monkeypatch):
        """Rotate the keys of AUTH and let the old ones leave the ring: the Idp, its time, a token of each type."""
        now = [time.time()]
        idp = opened(house, lambda: now[0])
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        monkeypatch.setattr("appliance.recovery.open_idp", lambda options: opened(options, lambda: now[0]))

        def mint(typ):
            claims = CLAIMS | {"aud": "app", "sid": "x", "exp": int(now[0]) + 600}
            return [idp.auth_ring.mint(key, typ, claims) for key in idp.auth_ring.active.values()]

        def advance(seconds):
            now[0] += seconds
            idp.next_ring_check = 0
            advance_key_states(idp)
            idp.next_ring_check = 0

        def call(*pauses):
            tokens = mint(m.JWT), mint(m.AT_JWT)
            rotate_keys(house, ["auth"])
            for seconds in pauses or (901, 3700):
                advance(seconds)
            return idp, now, *tokens

        yield call
        idp.store.close()

    @pytest.mark.parametrize("pauses", [(901, 3700), (5000,)], ids=["step by step", "a box that was off"])
    def test_their_public_halves_verify_hints_and_nothing_else(self, house, retire, pauses):
        idp, _, id_tokens, access_tokens = retire(*pauses)
        assert len(id_tokens) == len(access_tokens) == count(idp, "retired_key") == 2
        for token in id_tokens:
            assert hinted(idp, token)["aud"] == "app"
            assert hinted(idp, token[:-6] + "AAAAAA") is None and hinted(idp, token + "." + token) is None
            assert jwt.get_unverified_header(token)["kid"] not in idp.auth_ring.jwks().decode()
            assert m.introspect_token(idp, m.find_client(idp, "app"), token) == {"active": False}
        for token in (*id_tokens, *access_tokens):
            with pytest.raises(m.Problem, match="invalid_token"):
                m.verify_access_token(idp, idp.auth_ring, idp.options.auth_issuer, token)
        assert [hinted(idp, token) for token in access_tokens] == [None, None]
        stored = "".join(row[0] for row in idp.store.connection.execute("SELECT public_key FROM retired_key"))
        assert stored.count("BEGIN PUBLIC KEY") == 2 and "PRIVATE" not in stored

    def test_they_are_kept_as_long_as_a_login_lasts(self, house, retire):
        idp, now, id_tokens, _ = retire()
        longest = max(house.session_absolute_expiration, house.refresh_token_absolute_expiration)
        retired_at = now[0] - 3701  # a key signs `key-overlap` seconds after it was made, a second before the first turn
        now[0] = int(retired_at) + longest - 1
        assert all(hinted(idp, token) for token in id_tokens)
        now[0] += 1
        assert not any(hinted(idp, token) for token in id_tokens)
        idp.store.put_meta("clock", now[0])
        now[0] += 1
        purge(idp)
        assert count(idp, "retired_key") == 0

    def test_a_process_that_dies_before_it_writes_the_ring_loses_no_key(self, house, retire, monkeypatch):
        with monkeypatch.context() as broken:
            broken.setattr(upkeep_room, "write_durably", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                retire(5000)
        idp, _, id_tokens, _ = retire(5000)
        assert all(hinted(idp, token) for token in id_tokens)

    def test_a_revoked_one_verifies_nothing(self, house, retire):
        idp, _, id_tokens, _ = retire()
        back_up(house, "b")
        stolen, other = id_tokens
        assert revoke_key(house, jwt.get_unverified_header(stolen)["kid"]) == "auth"
        assert hinted(idp, stolen) is None and hinted(idp, other)
        with pytest.raises(StartupError, match="there is no key"):
            revoke_key(house, jwt.get_unverified_header(stolen)["kid"])
        idp.store.close()
        restore(house, "b")
        idp = opened(house)
        assert hinted(idp, stolen) is None and hinted(idp, other), "nor after a restore"
        idp.store.close()

    def test_one_that_is_revoked_in_the_ring_is_not_kept(self, house, retire):
        idp, _, id_tokens, _ = retire(901)
        assert all(hinted(idp, token) for token in id_tokens), "the ring still has them"
        stolen, other = id_tokens
        kid = jwt.get_unverified_header(stolen)["kid"]
        key = next(key for key in idp.auth_ring.keys if key.kid == kid)
        revoke_key(house, kid)
        idp.store.put_retired_key(RetiredKey(kid, key.header(m.JWT).decode(), key.as_pem(), 9_000_000_000))
        idp.next_ring_check = 0
        assert hinted(idp, stolen) is None and hinted(idp, other)
