"""Upkeep: what is over goes, the rest stays."""

import time

import microauthd as m
from conftest import CHEAP, PASSWORD

DAY = 86400


def purge(idp):
    m.purge(idp, lambda seconds: None)


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
        for seconds, there in ((3600, True), (m.IAT_SKEW + 1, False)):
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

    def test_a_living_login_keeps_its_refresh_tokens_working(self, idp, auth, service, log_in, alice, clock):
        """contract/auth B-12: purging sessions took the refresh tokens along."""
        token = log_in(alice)["refresh_token"]
        for _ in range(4):
            clock.pass_(2 * DAY)
            purge(idp)
            answer = auth.post("/token", {"grant_type": "refresh_token", "refresh_token": token}, auth=service)
            assert answer.status == 200
            token = answer.json["refresh_token"]

    def test_a_retired_secret_goes_and_the_living_stays(self, idp, auth, service, clock):
        second = m.change_secret(idp, m.LOCAL, "test", m.ChangeSecret("service", overlap_seconds=60))
        clock.pass_(61)
        purge(idp)
        assert count(idp, "client_secret") == 1
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=("service", second)).status == 200

    def test_nothing_a_person_made_is_purged(self, idp, service, alice, root, clock):
        before = {table: count(idp, table) for table in ("account", "client", "client_secret", "scope", "user_scope", "client_scope", "user_role", "role")}
        clock.pass_(3000 * DAY)
        purge(idp)
        assert {table: count(idp, table) for table in before} == before

    def test_zero_days_keep_everything(self, make_idp, clock):
        idp = make_idp(m.Options(**CHEAP, token_purge_days=0, refresh_token_purge_days=0, audit_log_retention_days=0))
        account = m.create_user(idp, m.LOCAL, "test", m.CreateUser("bob", "bob@example.org", PASSWORD))
        with idp.store.transaction():
            idp.store.add_family(m.Family("s", account.id, "c", "", "pwd", 0, "", 1, idp.now(), None))
            idp.store.add_session(m.Session(m.new_jti(idp.now_ms()), account.id, "c", "s", "", "access", "auth", "pwd", idp.now(), idp.now(), None))
        clock.pass_(3000 * DAY)
        purge(idp)
        assert count(idp, "family") == count(idp, "session") == 1 and count(idp, "audit") >= 1

    def test_audit_rows_go_by_age_and_the_chain_goes_on(self, idp, service, alice, clock):
        last = idp.store.list_audit(limit=1)[0]
        clock.pass_(31 * DAY)
        purge(idp)
        rows = list(reversed(idp.store.list_audit(limit=1000)))
        assert rows[0].seq == last.seq, "the newest stays: the next continues its hash"
        digest = rows[0].row_sha256
        for row in rows[1:]:
            digest = m.chain(digest, row.seq, (*m.msgspec.structs.astuple(row)[1:9], row.result))
            assert digest == row.row_sha256
        assert rows[-1].action == "purged" and "audit=" in rows[-1].secondary

    def test_it_goes_in_slices_and_lets_writers_between(self, idp, monkeypatch, clock):
        monkeypatch.setattr(m, "SLICE", 10)
        for number in range(35):
            idp.store.enqueue((m.new_jti(idp.now_ms()), "service", "", idp.now(), idp.now() + number), None)
        idp.store.flush()
        clock.pass_(8 * DAY)
        pauses = []
        m.purge(idp, pauses.append)
        assert count(idp, "session") == 0 and len(pauses) > 4

    def test_what_expires_late_does_not_keep_what_expired_early(self, idp, monkeypatch, clock):
        monkeypatch.setattr(m, "SLICE", 5)
        for number in range(23):
            idp.store.enqueue((m.new_jti(idp.now_ms()), "service", "", idp.now(), idp.now() + (3600 if number % 2 else 3000 * DAY)), None)
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
        clock.now = m.RELEASED_AT + 2000.0
        purge(idp)
        assert "clock.sane" in idp.stream.getvalue()


class TestThread:
    def test_a_failure_is_said_and_the_next_one_comes(self, idp, monkeypatch):
        calls = []

        def fail(idp, pause):  # a name of its own: it is in the log
            calls.append(1)
            raise m.Problem("temporarily_unavailable", log="disk full")

        monkeypatch.setattr(m, "purge", fail)
        upkeep = m.Upkeep(idp)
        wait = upkeep.ending.wait
        upkeep.ending.wait = lambda seconds: wait(min(seconds, 0.001))
        upkeep.start()
        deadline = time.monotonic() + 5
        while len(calls) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        upkeep.ending.set()
        upkeep.join(5)
        assert not upkeep.is_alive() and "disk full" in idp.stream.getvalue()
