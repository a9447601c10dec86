"""The audit log: what is written down, by whom, and that nothing is done which cannot be."""

import contextlib
import functools
import io
import os
import re
from types import SimpleNamespace

import microauthd as m
import msgspec
import pytest
import sqlcipher3
from conftest import CHEAP, DATABASE_KEY, PASSWORD
from appliance.base.log import Log
from appliance.base.settings import Options
from appliance.base.store import AuthorizationCode, FOREVER, MAD_ADMIN_ROLE_ID, MIGRATIONS, Store
from microauthd import TOTP_TRIES, sha256
from appliance.upkeep import audit_limit, log_audit_head
from appliance.base.database import Unavailable

MACHINE = {"grant_type": "client_credentials"}

REFRESH = {"grant_type": "refresh_token"}


class TestAuditRows:
    def test_tokens_failures_and_lockouts_leave_one(self, idp, auth, service, machine, log_in, alice):
        answer = log_in(alice)
        auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service)
        auth.post("/token", MACHINE, auth=("service", "wrong"))
        for _ in range(5):
            auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": "wrong wrong"}, auth=service
            )
        idp.store.flush()
        rows = idp.store.list_audit(limit=100)
        assert {
            "oidc_token_issued", "user_token_issued", "refresh_token_used", "client_authentication_failed",
            "user_login_failed", "user_locked_out",
        } <= {row.action for row in rows}
        (issued,) = [row for row in rows if row.action == "oidc_token_issued"]
        assert (issued.ip_address, issued.request_id, issued.actor_id, issued.at) == (
            "192.0.2.7", "r1", "service", idp.now(),
        ) and machine["jti"] in issued.secondary

    def test_a_user_agent_is_cut_and_cannot_forge(self, idp, auth, service):
        auth.post("/token", MACHINE, auth=service, headers=[("User-Agent", "a\x1b[31m\nb" + "x" * 5000)])
        idp.store.flush()
        row = idp.store.list_audit(limit=1)[0]
        assert len(row.user_agent) == 200 and row.user_agent.isprintable()

    def test_who_began_a_purge_of_many_slices_is_known(self, idp, monkeypatch, clock, service, alice):
        monkeypatch.setattr("microauthd.SLICE", 2)
        clock.pass_(40 * 86400)
        m.audit(idp, m.LOCAL.acting_as("test"), "now")
        m.purge_audit_log(idp, m.LOCAL.acting_as("system"), 30)
        assert idp.store.list_audit("audit_purge_begun", 1)

    @pytest.mark.parametrize("act", ["access", "refresh", "user"])
    def test_what_cannot_be_written_down_is_not_done(self, idp, auth, service, alice, log_in, monkeypatch, act):
        issued = log_in(alice)

        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(idp.store, "append_audit", fail)
            with contextlib.suppress(Unavailable):
                if act == "user":
                    m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "user_revoked")
                else:
                    auth.post("/revoke", {"token": issued[f"{act}_token"]}, auth=service)
        for name in ("access_token", "refresh_token"):
            assert auth.post("/introspect", {"token": issued[name]}, auth=service).json["active"] is True


class TestRowsOfAGroup:
    """Members of a group append one after the other: the end of the chain is looked up and stored once for all."""

    def append(self, idp, number):
        m.audit(idp, m.LOCAL.acting_as("test"), "act", str(number))

    def refuse(self, idp, number):
        with idp.store.transaction():
            idp.store.append_refusals([(idp.now(), "test", "refused", str(number), "", "", "", "", "failure")])

    def fail(self, idp, number, append):
        """A member that is undone, when it has appended a row."""
        with pytest.raises(ZeroDivisionError), idp.store.transaction():
            append(idp, number)
            raise ZeroDivisionError

    def go_on(self, idp, number, append):
        """A member that goes on although its row is in and its end is not known."""
        extend = idp.store.extend_chain

        def fail(*words):
            extend(*words)
            raise sqlcipher3.OperationalError("out of memory")

        with idp.store.transaction():
            idp.store.extend_chain = fail
            try:
                with pytest.raises(sqlcipher3.OperationalError):
                    append(idp, number)
            finally:
                del idp.store.extend_chain

    @pytest.mark.parametrize("place", range(6))
    @pytest.mark.parametrize(("way", "kind"), [
        ("fail", "append"), ("fail", "refuse"), ("go_on", "append"), ("succeed", "refuse"),
    ])
    def test_whatever_becomes_of_a_member_the_chain_is_whole_and_its_end_is_noted(self, idp, place, way, kind):
        works = [functools.partial(self.append, idp, number) for number in range(5)]
        append = getattr(self, kind)
        works.insert(place, functools.partial(*(
            (append, idp, 9) if way == "succeed" else (getattr(self, way), idp, 9, append)
        )))
        for count in (1, 2):
            assert idp.store.run_together(works) == [None] * 6
            found = idp.store.verify_audit()
            assert found["valid"] and (found["last_seq"], found["head"]) == idp.store.audit_head()
            assert idp.store.meta("audit_head") == f"{found['last_seq']}:{found['head']}"
            assert idp.store.count_audit("act") == count * (6 if way == "go_on" else 5)
            assert idp.store.count_audit("refused") == count * (way == "succeed")
        self.append(idp, 6)
        assert idp.store.meta("audit_head") == "{}:{}".format(*idp.store.audit_head())
        assert idp.store.verify_audit()["valid"] and not idp.store.list_audit("audit_log_cut")

    def test_no_number_is_given_twice_when_a_row_of_a_refusal_is_in_and_its_end_is_not(self, idp):
        works = [functools.partial(self.append, idp, number) for number in range(3)]
        works.insert(1, functools.partial(self.go_on, idp, 9, self.refuse))
        assert idp.store.run_together(works) == [None] * 4
        numbers = [row.seq for row in idp.store.list_audit()]
        assert len(numbers) == len(set(numbers)) == 4

    def test_the_end_is_looked_up_and_stored_once(self, idp):
        self.append(idp, 0)
        said = []
        idp.store.connection.set_trace_callback(said.append)
        idp.store.run_together([functools.partial(self.append, idp, number) for number in range(20)])
        assert len([line for line in said if line.startswith("INSERT INTO audit ")]) == 20
        for words in ("SELECT seq, row_sha256", "INSERT INTO meta"):  # once for each group, which ends when it is old
            assert len([line for line in said if line.startswith(words)]) == said.count("COMMIT")

    def test_if_its_end_cannot_be_noted_none_of_it_is_in_force(self, idp, monkeypatch):
        before = idp.store.count_audit()

        def fail(*words):
            raise sqlcipher3.OperationalError("database or disk is full")

        def append():
            with contextlib.suppress(Unavailable):  # the group may be too old for another member
                self.append(idp, 1)

        with monkeypatch.context() as broken:
            broken.setattr(idp.store, "note_audit", fail)
            assert [type(outcome) for outcome in idp.store.run_together([append] * 3)] == [Unavailable] * 3
        assert idp.store.count_audit() == before and idp.store.group is None
        self.append(idp, 1)
        assert idp.store.verify_audit()["valid"] and idp.store.count_audit() == before + 1

    def test_what_was_cut_off_before_is_said_once(self, idp):
        self.append(idp, 0)
        self.append(idp, 1)
        idp.store.connection.execute("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)")
        idp.store.run_together([functools.partial(self.append, idp, number) for number in range(5)])
        assert [row.target for row in idp.store.list_audit("act", 5)] == ["4", "3", "2", "1", "0"]
        assert len(idp.store.list_audit("audit_log_cut")) == 1
        assert idp.store.meta("audit_head") == "{}:{}".format(*idp.store.audit_head())


class TestRowsThatWereCutOff:
    """Who can write the database can cut rows off the end of the chain: the next row tells, for as long as it stays."""

    def write(self, idp, count):
        for number in range(count):
            m.audit(idp, m.LOCAL.acting_as("test"), "act", str(number))

    def cut(self, idp, above):
        idp.store.connection.execute("DELETE FROM audit WHERE seq > ?", (above,))

    def test_the_next_row_covers_them_and_says_so(self, idp):
        self.write(idp, 5)
        seq, digest = idp.store.audit_head()
        self.cut(idp, seq - 2)
        assert idp.store.verify_audit()["reason"] == f"rows up to {seq} were written, and the chain ends before"
        self.write(idp, 3)
        (mark,) = idp.store.list_audit("audit_log_cut")
        assert (mark.seq, mark.actor_id, mark.result) == (seq + 1, "system", "failure")
        assert f"noted={seq}:{digest} found={seq - 2}:" in mark.secondary
        found = idp.store.verify_audit()
        assert not found["valid"] and found["reason"] == f"rows {seq - 1} to {seq} are missing"
        assert "audit.cut" in idp.stream.getvalue()

    def test_the_mark_lasts_after_a_restart_and_a_second_cut_is_marked_too(self, idp, make_idp, options):
        self.write(idp, 3)
        self.cut(idp, 1)
        self.write(idp, 2)
        again = make_idp(options)
        self.write(again, 2)
        assert len(again.store.list_audit("audit_log_cut")) == 1 and not again.store.verify_audit()["valid"]
        self.cut(again, 1)
        self.write(again, 1)
        assert len(again.store.list_audit("audit_log_cut")) == 1 and not again.store.verify_audit()["valid"]

    def test_it_is_said_once_also_by_batches(self, idp, auth, service):
        self.write(idp, 3)
        idp.store.flush()
        self.cut(idp, 1)
        for _ in range(3):
            auth.post("/token", MACHINE, auth=service)
            idp.store.flush()
        assert len(idp.store.list_audit("audit_log_cut")) == 1

    def test_all_rows_gone_are_noticed(self, idp):
        self.write(idp, 3)
        self.cut(idp, 0)
        self.write(idp, 1)
        assert [row.action for row in idp.store.list_audit()] == ["act", "audit_log_cut"]

    def test_rows_that_were_written_anew_do_not_take_the_place_of_those(self, idp):
        """With the right hashes, of a chain of another hand."""
        self.write(idp, 3)
        head = idp.store.meta("audit_head")
        self.cut(idp, 1)
        forger = Store(idp.store.path, idp.store.key)
        forger.put_meta("audit_head", "0:")
        forger.open()
        with forger.transaction():
            forger.append_audit([(idp.now(), "x", "forged", "", "", "", "", "", "success")] * 4)
        forger.put_meta("audit_head", head)
        forger.close()
        self.write(idp, 1)
        assert idp.store.list_audit("audit_log_cut") and "was altered" in idp.store.verify_audit()["reason"]

    def test_the_rows_of_a_batch_count_while_the_process_that_wrote_them_runs(self, idp, auth, service):
        """Their head is not stored: that would cost a page of flash for each batch."""
        for _ in range(3):
            auth.post("/token", MACHINE, auth=service)
            idp.store.flush()
        seq, _ = idp.store.audit_head()
        assert int(idp.store.meta("audit_head").partition(":")[0]) < seq - 1
        self.cut(idp, seq - 1)
        auth.post("/token", MACHINE, auth=service)
        idp.store.flush()
        assert len(idp.store.list_audit("audit_log_cut")) == 1
        assert idp.store.verify_audit()["reason"] == f"rows {seq} to {seq} are missing"

    def test_a_log_that_nobody_cut_has_no_mark(self, idp, auth, service, clock, make_idp, options):
        for _ in range(2):
            auth.post("/token", MACHINE, auth=service)
            idp.store.flush()
            self.write(idp, 2)
            with contextlib.suppress(ZeroDivisionError), idp.store.transaction():
                self.write(idp, 1)
                raise ZeroDivisionError
        clock.pass_(40 * 86400)
        m.purge_audit_log(idp, m.LOCAL.acting_as("system"), 30)
        auth.post("/token", MACHINE, auth=service)
        idp.store.flush()
        again = make_idp(options)
        self.write(again, 1)
        assert not again.store.list_audit("audit_log_cut") and again.store.verify_audit()["valid"]

    def test_a_purge_beyond_what_a_process_noted_is_no_cut(self, idp, auth, service, clock, make_idp, options):
        auth.post("/token", MACHINE, auth=service)
        idp.store.flush()
        other = make_idp(options)
        clock.pass_(40 * 86400)
        self.write(other, 1)
        m.purge_audit_log(other, m.LOCAL.acting_as("system"), 30)
        self.write(idp, 1)
        assert not idp.store.list_audit("audit_log_cut") and idp.store.verify_audit()["valid"]


class TestTheHeadElsewhere:
    """In the log file, which a log collector takes away: a verifier there compares it."""

    @pytest.mark.parametrize("level", ["info", "error"])
    def test_it_is_written_with_its_count_whatever_is_logged_else(self, idp, level):
        m.audit(idp, m.LOCAL.acting_as("test"), "act")
        stream = io.StringIO()
        log = Log(Options(log_file="", log_level=level), stream)
        for _ in range(log.LINES + 5):
            log("flood")
        log_audit_head(idp.store, log)
        seq, digest = idp.store.audit_head()
        row = idp.store.list_audit(limit=1)[0]
        assert (row.seq, row.row_sha256) == (seq, digest)
        assert f"NOTICE  audit.head seq={seq} rows={idp.store.count_audit()} head={digest}" in stream.getvalue()


class TestTheChainOfRefusals:
    """Refusals share the numbers of the log and have a hash chain of their own, so they can be purged out of it."""

    def write(self, idp, kinds):
        """Append a row for each letter: `c` a change, `r` a refusal."""
        for number, kind in enumerate(kinds):
            row = (idp.now(), "test", "act", f"{kind}{number}", "", "192.0.2.7", "agent", "", "failure")
            with idp.store.transaction():
                (idp.store.append_audit if kind == "c" else idp.store.append_refusals)([row])

    def log(self, idp):
        return [row.target[0] for row in idp.store.list_audit("act", after=0, limit=1000)]

    def test_both_are_one_log_in_the_order_of_their_numbers(self, idp, call):
        self.write(idp, "rrcrccr")
        rows = idp.store.list_audit(limit=1000)
        numbers = [row.seq for row in rows]
        assert numbers == list(range(len(rows), 0, -1)) and self.log(idp) == list("rrcrccr")
        assert idp.store.count_audit() == len(rows) and idp.store.count_audit("act") == 7
        assert [row.target for row in idp.store.list_audit("act", 3, offset=1)] == ["c5", "c4", "r3"]
        assert [row.seq for row in idp.store.list_audit(after=len(rows) - 2)] == [len(rows) - 1, len(rows)]
        assert [idp.store.find_audit(row.seq) for row in rows] == rows
        verdict = idp.store.verify_audit()
        assert (verdict["valid"], verdict["rows"], verdict["last_seq"]) == (True, len(rows), len(rows) - 1)
        assert (verdict["last_seq"], verdict["head"]) == idp.store.audit_head()
        exported = call("GET", "/audit-logs/export").body.splitlines()
        assert [int(msgspec.json.decode(line)["id"]) for line in exported] == numbers[::-1]

    @pytest.mark.parametrize("kinds", ["rrcrccr", "rrrrr", "cccrrr", "rcrcrcrcrc", "ccc"])
    @pytest.mark.parametrize("purges", ["r", "c", "rc", "cr", "crcrcr", "rrrrrr"])
    def test_a_purge_of_either_leaves_the_rest_linked_and_counted(self, idp, kinds, purges):
        self.write(idp, kinds)
        for kind in purges:
            (idp.store.purge_audit if kind == "c" else idp.store.purge_refusals)(FOREVER, 2)
            assert idp.store.verify_audit()["valid"] and idp.store.count_audit() == len(idp.store.list_audit(limit=99))
        self.write(idp, "rc")
        last = idp.store.list_audit(limit=2)
        assert [row.target[0] for row in last] == ["c", "r"] and last[0].seq == last[1].seq + 1
        verdict = idp.store.verify_audit()
        assert verdict["valid"] and verdict["rows"] == len(idp.store.list_audit(limit=99)) == idp.store.count_audit()

    @pytest.mark.parametrize(
        "attack, says",
        [
            ("DELETE FROM audit WHERE target = 'c2'", "was altered, or rows between"),
            ("DELETE FROM audit WHERE target = 'c4'", "are missing"),
            ("DELETE FROM audit WHERE target IN ('c2', 'c4')", "are missing"),
            ("DELETE FROM audit_refusal WHERE target = 'r5'", "are missing"),
            ("DELETE FROM audit_refusal WHERE target = 'r7'", "the chain ends before"),
            ("DELETE FROM audit_refusal", "are missing"),
            ("UPDATE audit_refusal SET secondary = 'x' WHERE target = 'r5'", "was altered"),
            ("UPDATE meta SET value = '999:x:9' WHERE name = 'audit_refusal_anchor'", "was altered"),
            ("DELETE FROM meta WHERE name = 'audit_refusal_anchor'", "are missing"),
            ("INSERT INTO audit_refusal SELECT * FROM audit WHERE target = 'c4'", "was given twice"),
            (
                "UPDATE meta SET value = (SELECT seq FROM audit WHERE target = 'c4') || substr(value, instr(value, ':')) "
                "WHERE name = 'audit_refusal_anchor'; DELETE FROM audit WHERE target = 'c4'", "was altered",
            ),
        ],
    )
    def test_a_change_that_was_deleted_among_purged_refusals_is_found(self, idp, attack, says):
        self.write(idp, "rrcrcrcr")
        assert idp.store.purge_refusals(FOREVER, 3) == 3
        assert idp.store.verify_audit()["valid"] and self.log(idp) == list("ccrcr")
        idp.store.connection.executescript(attack)
        verdict = idp.store.verify_audit()
        assert not verdict["valid"] and says in verdict["reason"]

    def test_refusals_that_were_cut_off_stay_missing(self, idp):
        self.write(idp, "crr")
        idp.store.connection.execute("DELETE FROM audit_refusal WHERE target = 'r2'")
        self.write(idp, "rc")
        assert "are missing" in idp.store.verify_audit()["reason"]

    def test_changes_that_were_cut_off_between_refusals_are_marked(self, idp):
        self.write(idp, "ccrr")
        idp.store.connection.execute("DELETE FROM audit WHERE target = 'c1'")
        self.write(idp, "rc")
        assert idp.store.list_audit("audit_log_cut") and not idp.store.verify_audit()["valid"]

    def test_a_log_of_before_has_no_refusals_and_takes_them(self, tmp_path, monkeypatch):
        number = next(number for number, step in enumerate(MIGRATIONS) if "TABLE audit_refusal" in step)
        with monkeypatch.context() as before:
            before.setattr("appliance.base.store.MIGRATIONS", MIGRATIONS[:number])
            store = Store.make(tmp_path / "old.db3", DATABASE_KEY, 1)
            store.run("CREATE TABLE audit_action (action TEXT PRIMARY KEY)")  # which a later step makes
            before.setattr(store, "last_audit_seq", lambda connection: store.value("SELECT max(seq) FROM audit") or 0)
            for _ in range(3):
                with store.transaction():
                    store.append_audit([(1, "x", "old", "", "", "", "", "", "success")])
            # The anchor of a purge of before.
            digest = store.value("SELECT row_sha256 FROM audit WHERE seq = 1")
            store.run("DELETE FROM audit WHERE seq = 1")
            store.put_meta("audit_anchor", f"1:{digest}")
            store.run("DROP TABLE audit_action")
            store.close()
        store = Store(tmp_path / "old.db3", DATABASE_KEY)
        store.open()
        assert store.verify_audit() | {"head": ""} == {
            "valid": True, "rows": 2, "first_seq": 2, "last_seq": 3, "head": "", "reason": "",
        }
        with store.transaction():
            store.append_refusals([(2, "x", "new", "", "", "", "", "", "failure")])
        assert [row.seq for row in store.list_audit()] == [4, 3, 2] and store.count_audit() == 3
        assert store.purge_audit(FOREVER, 9) == 1 and store.purge_refusals(FOREVER, 9) == 1
        assert store.verify_audit()["valid"] and store.count_audit() == 1
        store.close()

    def test_the_size_is_estimated(self, idp):
        """Within a quarter of what the pages take: there is no cheap exact measure of a table."""

        def pages():
            return 4096 * idp.store.value("SELECT * FROM pragma_page_count()")

        for table, append in ((0, idp.store.append_audit), (1, idp.store.append_refusals)):
            before, size = pages(), idp.store.measure_audit()[table].octets
            with idp.store.transaction():
                append([
                    (idp.now(), "a" * 36, "act", "t" * (number % 60), "s" * (number % 90), "192.0.2.7", "u" * 80, "r" * 9,
                     "failure") for number in range(4000)
                ])
            grown = idp.store.measure_audit()[table]
            assert grown.rows >= 4000 and 0.75 < (grown.octets - size) / (pages() - before) < 1.25


def counted(rows):
    """Return how many refusals rows of the audit log tell of: of a count, or of one each."""
    return sum(int(re.search("count=([0-9]+)", row.secondary)[1]) if "count=" in row.secondary else 1 for row in rows)


def size_of(idp):
    idp.store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return os.path.getsize(idp.store.path)


NONSENSE = {"client_id": "spa", "grant_type": "x"}
LOGIN = {"client_id": "spa", "grant_type": "password", "username": "alice", "password": PASSWORD}


class TestRefusalsAreCounted:
    """Anybody can cause them: a flood is a few rows, of which the first is there at once, and all of it is counted."""

    def test_a_flood_is_two_rows_and_an_honest_login_is_not_lost_in_it(self, idp, auth, public, alice):
        before, last = size_of(idp), idp.store.audit_head()[0]
        for number in range(20_000):
            assert auth.post("/token", NONSENSE, peer="127.0.0.1").status == 400
            if number == 10_000:
                assert auth.post("/token", LOGIN, peer="127.0.0.1").status == 200
        assert [row.action for row in idp.store.list_audit(after=last)] == ["token_refused", "user_token_issued"]
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("token_refused")
        assert len(rows) == 2 and counted(rows) == 20_000
        assert (rows[0].actor_id, rows[0].target, rows[0].ip_address, rows[0].result) == (
            "spa", "spa", "127.0.0.1", "failure",
        )
        assert rows[0].secondary == (
            f"grant_type=unknown error=unsupported_grant_type;count=19999;since={m.iso(idp.now())}"
        )
        assert size_of(idp) - before < 200_000 and idp.store.verify_audit()["valid"]

    def test_a_flood_of_many_kinds_is_no_more(self, idp, auth, public, alice):
        """From a network each, with a client each, for as long as an hour."""
        before, last = size_of(idp), idp.store.audit_head()[0]
        for number in range(20_000):
            caller = m.Caller(f"2001:db8:{number:x}::1").acting_as(f"client-{number % 7}")
            m.audit_refusal(idp, caller, ("token_refused", "client_authentication_failed")[number % 2], "spa", "x")
            idp.clock.pass_(0.18)
            if number % 200 == 0:
                m.write_refusal_counts(idp)
        assert auth.post("/token", LOGIN).status == 200
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit(after=last, limit=1000)
        begun = [row for row in rows if row.action == "refusals_flood"]
        assert len(begun) == 1 and begun[0].ip_address and begun[0].secondary == "action=token_refused"
        assert [row.action for row in rows].count("user_token_issued") == 1 and len(rows) < 450
        refusals = [row for row in rows if row.result == "failure" and row not in begun]
        assert counted(refusals) == 20_000
        excess = [row for row in rows if row.action == "refusals_counted"]
        assert 5 < len(excess) < 9 and "client_authentication_failed=" in excess[0].secondary
        assert size_of(idp) - before < 200_000 and idp.store.verify_audit()["valid"]

    def test_the_first_of_a_kind_is_a_row_and_the_rest_of_ten_minutes_one_more(self, idp, clock):
        refuse = lambda *who: m.audit_refusal(idp, m.Caller(*who), "act", "t", "why")  # noqa: E731
        written = lambda: [row.secondary for row in idp.store.list_audit("act", after=0)]  # noqa: E731
        began = m.iso(idp.now())
        for _ in range(4):
            refuse("192.0.2.1")
        assert written() == ["why"]
        clock.pass_(599)
        m.write_refusal_counts(idp)
        refuse("192.0.2.1")
        assert written() == ["why"]
        clock.pass_(1)
        m.write_refusal_counts(idp)
        assert written()[1:] == [f"why;count=4;since={began}"]
        again = m.iso(idp.now())
        refuse("192.0.2.1")
        assert len(written()) == 2, "the flood goes on: it is counted"
        clock.pass_(600)
        m.write_refusal_counts(idp)
        assert written()[2:] == [f"why;count=1;since={again}"]
        clock.pass_(600)
        m.write_refusal_counts(idp)
        refuse("192.0.2.1")
        assert written()[3:] == ["why"], "after a quiet window the next one is a first one"

    def test_what_differs_is_told_apart(self, idp):
        peers = ["192.0.2.1", "192.0.2.2", "::1", "2001:db8::1", "2001:db8:0:1::1"]
        for _ in range(2):
            for peer in [*peers, "2001:db8::ffff:1"]:  # the last is of the same /64 as the fourth
                m.audit_refusal(idp, m.Caller(peer), "act")
            for change in ({"action": "other"}, {"target": "t"}, {"secondary": "s"}):
                m.audit_refusal(idp, m.Caller(peers[0]), **{"action": "act"} | change)
            m.audit_refusal(idp, m.Caller(peers[0], actor="somebody"), "act")
        rows = idp.store.list_audit("act", after=0)
        assert [row.ip_address for row in rows[:5]] == peers and len(rows) == 8

    def test_strangers_do_not_take_the_budget_of_those_who_proved_something(self, idp):
        for number in range(500):
            m.audit_refusal(idp, m.LOCAL, "strange", str(number))
        m.audit_refusal(idp, m.LOCAL.acting_as("known"), "act", proven=True)
        assert len(idp.store.list_audit("act")) == 1 and len(idp.store.list_audit("strange")) == 30
        for number in range(500):
            m.audit_refusal(idp, m.LOCAL.acting_as("known"), "act", str(number), proven=True)
        assert len(idp.store.list_audit("act")) == 60

    def test_kinds_that_somebody_keeps_alive_are_a_hundred_rows_a_window_at_most(self, idp, clock):
        for turn in range(20):
            for number in range(300):
                m.audit_refusal(idp, m.LOCAL, "act", str(number))
            clock.pass_(300)
            m.write_refusal_counts(idp)
            if turn == 14:
                last = idp.store.list_audit(limit=1)[0].seq
        rows = idp.store.list_audit(after=last, limit=1000)
        assert {row.action for row in rows} == {"act", "refusals_counted"} and 200 <= len(rows) <= 3 * 102

    def test_a_kill_loses_counts_and_no_first_row(self, idp, make_idp, options):
        for _ in range(9):
            m.audit_refusal(idp, m.LOCAL, "act")
        again = make_idp(options)  # what was in memory is gone
        assert [row.action for row in again.store.list_audit(limit=1)] == ["act"] and again.store.verify_audit()["valid"]

    def test_a_row_that_cannot_be_written_is_counted_and_changes_no_answer(self, idp, auth, public, monkeypatch):
        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(idp.store, "append_refusals", fail)
            assert auth.post("/token", NONSENSE).json["error"] == "unsupported_grant_type"
            with pytest.raises(Unavailable):
                m.write_refusal_counts(idp, everything=True)
        m.write_refusal_counts(idp, everything=True)
        assert counted(idp.store.list_audit("token_refused")) == 1

    def test_nothing_is_counted_where_nothing_is_audited(self, make_idp, public):
        idp = make_idp(Options(enable_audit_logging=False))
        m.audit_refusal(idp, m.LOCAL, "act")
        m.write_refusal_counts(idp, everything=True)
        assert not idp.store.list_audit("act")


class TestRefusalsAreThrottled:
    """By peer; no answer that somebody else would have got depends on it."""

    STRANGER, LOOPBACK = "198.51.100.9", "127.0.0.1"

    def flood(self, auth, peer, count=150, **form):
        return [auth.post("/token", NONSENSE | form, peer=peer) for _ in range(count)]

    def test_a_stranger_hears_slow_down(self, auth, public):
        answers = self.flood(auth, self.STRANGER)
        assert [answer.status for answer in answers] == [400] * 120 + [429] * 30
        assert answers[-1].json["error"] == "slow_down" and int(answers[-1].headers["retry-after"]) >= 1
        assert auth.post("/token", NONSENSE, peer="198.51.100.10").status == 400

    def test_of_ipv6_by_network_and_by_site(self, auth, public):
        assert self.flood(auth, "2001:db8::1")[-1].status == 429
        assert auth.post("/token", NONSENSE, peer="2001:db8::2").status == 429
        assert auth.post("/token", NONSENSE, peer="2001:db8:0:1::1").status == 400

    def test_who_shares_the_address_gets_tokens_and_is_told_the_truth(self, auth, public, service, alice, log_in):
        login = auth.post("/token", LOGIN, peer=self.STRANGER).json
        spent = login["refresh_token"]
        assert self.flood(auth, self.STRANGER)[-1].status == 429
        refresh = {"client_id": "spa", "grant_type": "refresh_token"}
        renewed = auth.post("/token", refresh | {"refresh_token": spent}, peer=self.STRANGER)
        assert renewed.status == 200
        assert auth.post("/token", LOGIN, peer=self.STRANGER).status == 200
        assert auth.post("/token", MACHINE, auth=service, peer=self.STRANGER).status == 200
        dead = renewed.json["refresh_token"]
        assert auth.post("/revoke", {"client_id": "spa", "token": dead}, peer=self.STRANGER).status == 200
        for name in ("refresh_token", "token"):
            told = auth.post("/token", refresh | {name: dead}, peer=self.STRANGER)
            assert (told.status, told.json["error"]) == (400, "invalid_grant")
        unknown = auth.post("/token", refresh | {"refresh_token": "x"}, peer=self.STRANGER)
        assert unknown.status == 429

    def test_a_confidential_client_never_does(self, auth, service):
        assert {
            auth.post("/token", {"grant_type": "x"}, auth=service, peer=self.STRANGER).status for _ in range(150)
        } == {400}

    def test_nobody_at_the_machine_does(self, auth, public):
        """All its services share the address: they are counted only."""
        assert {answer.status for answer in self.flood(auth, self.LOOPBACK, 300)} == {400}


class TestWhatIsCountedAndWhatIsAChange:
    PASSWORD_GRANT = {"grant_type": "password", "username": "alice", "password": "wrong wrong"}

    def test_wrong_passwords_up_to_the_lockout_are_changes_and_the_rest_is_counted(self, idp, auth, service, alice):
        for _ in range(12):
            assert auth.post("/token", self.PASSWORD_GRANT, auth=service, peer="127.0.0.1").status == 403
        changes = idp.store.values("SELECT action FROM audit ORDER BY seq DESC LIMIT 6")
        assert changes == ["user_login_failed", "user_locked_out"] + ["user_login_failed"] * 4
        m.write_refusal_counts(idp, everything=True)
        rows = [row for row in idp.store.list_audit("user_login_failed") if row.secondary.startswith("reason=locked")]
        assert counted(rows) == 7 and {row.actor_id for row in rows} == {alice.id}

    @pytest.mark.parametrize("option", ["max_login_failures", "failed_password_lockout_duration"])
    def test_without_lockouts_they_are_counted(self, make_idp, alice, option):
        idp = make_idp(Options(**CHEAP, **{option: 0}))
        for _ in range(9):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.LOCAL, "alice", "wrong wrong")
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("user_login_failed")
        assert len(rows) == 2 and counted(rows) == 9

    def test_unknown_names_are_counted(self, idp, auth, service):
        for number in range(9):
            form = self.PASSWORD_GRANT | {"username": f"nobody{number}"}
            assert auth.post("/token", form, auth=service).status == 403
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("user_login_failed")
        assert len(rows) == 2 and counted(rows) == 9 and rows[0].secondary.startswith("reason=unknown user")

    @pytest.mark.parametrize("name", ["alice", "nobody"])
    def test_each_failure_is_one_durable_write(self, idp, auth, service, alice, name, monkeypatch):
        commits, end, last = [], idp.store.end, -1

        def commit(connection):
            commits.append(connection.total_changes)
            return end(connection)

        monkeypatch.setattr(idp.store, "end", commit)
        for _ in range(9):  # wrong, locked, or nobody
            commits.clear()
            auth.post("/token", self.PASSWORD_GRANT | {"username": name}, auth=service)
            assert len(commits) == 1 and commits[0] > last
            last = commits[0]

    def test_what_the_last_administrator_may_try_while_it_is_locked_is_counted(self, idp, root):
        for _ in range(15):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.LOCAL, "root", "wrong wrong", admin=True)
        assert idp.store.value("SELECT count(*) FROM audit WHERE action = 'user_login_failed'") == 5
        m.write_refusal_counts(idp, everything=True)
        assert counted(idp.store.list_audit("user_login_failed")) == 15

    def test_only_the_first_revocation_is_a_change(self, idp, auth, public, alice):
        login = auth.post("/token", LOGIN).json
        for kind, action in (("access_token", "token_revoked"), ("refresh_token", "refresh_token_revoked")):
            for _ in range(50):
                assert auth.post("/revoke", {"client_id": "spa", "token": login[kind]}).status == 200
            m.write_refusal_counts(idp, everything=True)
            rows = idp.store.list_audit(action)
            assert len(rows) == 3 and counted(rows) == 50 and {row.result for row in rows} == {"success"}
            assert idp.store.value("SELECT count(*) FROM audit WHERE action = :action", action=action) == 1

    def test_only_the_first_reuse_ends_a_login(self, idp, auth, alice, public):
        code = AuthorizationCode(
            sha256("the code"), "spa", alice.id, "sid", "https://spa.example", "", "", "", "S256", "", "pwd", idp.now(),
            idp.now_ms(), idp.now() + 60, idp.now(), "", 0,
        )
        idp.store.insert(code)
        idp.store.run("UPDATE client SET grant_types = 'authorization_code'")
        idp.store.generation.bump()
        form = {"client_id": "spa", "grant_type": "authorization_code", "code": "the code"}
        for _ in range(50):
            assert auth.post("/token", form).json["error"] == "invalid_grant"
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("authorization_code_reused")
        assert len(rows) == 3 and counted(rows) == 50
        assert idp.store.value("SELECT count(*) FROM audit WHERE action = 'authorization_code_reused'") == 1
        assert idp.store.find_family("sid").revoked_at

    def test_dead_tokens_are_counted_each(self, idp, auth, service, machine, alice, log_in):
        tokens = [machine["access_token"], log_in(alice)["access_token"]]
        for token in tokens:
            auth.post("/revoke", {"token": token}, auth=service)
            for _ in range(20):
                assert auth.get("/me", bearer=token).status == 401
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("auth.token.replay_detected")
        assert len(rows) == 4 and counted(rows) == 40


class TestPrivilegedRequestsThatAreRefused:
    def refused(self, idp):
        return [
            (row.actor_id, row.target, row.secondary, row.result)
            for row in idp.store.list_audit("privileged_request_refused", after=0)
        ]

    def test_at_admin(self, idp, call, root):
        assert call("DELETE", f"/users/{root.id}").status == 409
        assert call("DELETE", f"/roles/{MAD_ADMIN_ROLE_ID}").status == 403
        for _ in range(3):
            assert call("POST", "/scopes", {"name": "admin:read_user"}).status == 409
        assert call("GET", "/users/nobody").status == 404 and call("POST", "/roles", {}).status == 400
        assert call("GET", "/users").status == 200
        m.write_refusal_counts(idp, everything=True)
        counts = f"error=conflict;count=2;since={m.iso(idp.now())}"
        assert self.refused(idp) == [
            (root.id, "DELETE /users/<id>", f"error=last_administrator;{root.id}", "failure"),
            (root.id, "DELETE /roles/<id>", f"error=protected;{MAD_ADMIN_ROLE_ID}", "failure"),
            (root.id, "POST /scopes", "error=conflict", "failure"), (root.id, "POST /scopes", counts, "failure"),
        ]

    def test_by_whom_who_is_no_administrator_any_more(self, idp, call, root, new_user, change):
        new_user("second", admin=True)
        change("DELETE FROM user_role WHERE user_id = :id", id=root.id)
        assert call("GET", "/users").status == 401
        assert self.refused(idp) == [(root.id, "GET /users", "error=invalid_token", "failure")]

    def test_by_a_delegated_scope(self, idp, auth, root, alice, new_client):
        client = new_client("desk", scopes=["admin:reset_passwords"])
        token = auth.post("/token", MACHINE, auth=client).json["access_token"]
        new = {"new_password": "another battery staple"}
        assert auth("POST", "/user/root/reset", bearer=token, json_body=new).status == 403
        assert auth.get("/users", bearer=token).status == 403
        assert auth("POST", "/user/alice/reset", bearer=token, json_body=new).status == 200
        assert [(actor, secondary) for actor, _, secondary, _ in self.refused(idp)] == [
            ("desk", "error=access_denied;root"), ("desk", "error=insufficient_scope"),
        ]

    def test_no_stranger_and_nobody_at_other_routes(self, idp, auth, admin, machine):
        for token in (None, "x", machine["access_token"]):
            assert admin.get("/users", bearer=token).status == 401
        assert auth.get("/users", bearer="x").status == 401
        assert auth.get("/me/sessions", bearer=machine["access_token"]).status == 403
        assert admin.post("/token", {"username": "nobody", "password": "wrong wrong"}).status == 403
        assert self.refused(idp) == []


class TestWrongFirstCodes:
    """They are no attempt to enable a second factor that failed, but a guess: with an action of their own."""

    def actions(self, idp):
        return [(row.action, row.actor_id, row.target, row.result) for row in idp.store.list_audit(limit=2)]

    def test_at_admin_and_while_it_is_locked(self, idp, call, alice, root):
        m.begin_totp(idp, m.LOCAL, idp.store.find_account(alice.id))
        for _ in range(TOTP_TRIES):
            assert call("POST", "/users/alice/totp/verify", {"code": "000000"}).status == 403
        assert self.actions(idp) == [("totp_first_code_wrong", root.id, alice.id, "failure")] * 2
        assert idp.store.find_account(alice.id).totp_locked_until > idp.now()
        for _ in range(9):
            assert call("POST", "/users/alice/totp/verify", {"code": "000000"}).status == 403
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("totp_first_code_wrong")
        assert len(rows) == TOTP_TRIES + 2 and counted(rows) == TOTP_TRIES + 9
        assert rows[1].secondary == "second factor locked"
        assert not idp.store.list_audit("totp_enabled") and not idp.store.list_audit("privileged_request_refused")


class TestTheSizeOfTheLog:
    """No flood displaces a change: refusals have a tenth of the log, and only they go when they exceed it."""

    LIMIT = 1_000_000
    SYSTEM = m.LOCAL.acting_as("system")

    def write(self, idp, append, count):
        with idp.store.transaction():
            append([
                (idp.now(), "anonymous", "act", str(number), "s" * 100, "192.0.2.7", "u" * 100, "r", "failure")
                for number in range(count)
            ])

    def test_a_flood_displaces_its_oldest_refusals_and_no_change(self, idp):
        self.write(idp, idp.store.append_audit, 300)
        changes = idp.store.values("SELECT row_sha256 FROM audit ORDER BY seq")
        for _ in range(3):
            self.write(idp, idp.store.append_refusals, 1200)
            deleted = m.bound_audit_log(idp, self.SYSTEM, self.LIMIT)
            sizes = idp.store.measure_audit()
            assert deleted > 500 and 80_000 < sizes[1].octets <= 100_000
            assert idp.store.verify_audit()["valid"]
        assert idp.store.values("SELECT row_sha256 FROM audit ORDER BY seq")[: len(changes)] == changes
        assert idp.store.list_audit("act", 1)[0].target == "1199", "the newest are there"
        row = idp.store.list_audit("audit_purged", 1)[0]
        assert (row.actor_id, row.secondary) == ("system", f"purged={deleted};refusals_larger_than=100000")
        assert idp.store.find_audit(row.seq).result == "success"

    def test_a_flood_does_not_displace_its_own_beginning(self, idp):
        for number in range(500):
            m.audit_refusal(idp, m.LOCAL, "act", str(number))
        self.write(idp, idp.store.append_refusals, 4000)
        assert m.bound_audit_log(idp, self.SYSTEM, self.LIMIT) > 0
        assert len(idp.store.list_audit("refusals_flood")) == 1

    def test_changes_have_the_rest_and_the_oldest_go(self, idp):
        self.write(idp, idp.store.append_refusals, 100)
        self.write(idp, idp.store.append_audit, 5000)
        before = idp.store.measure_audit()
        assert m.bound_audit_log(idp, self.SYSTEM, self.LIMIT) > 500
        after = idp.store.measure_audit()
        assert 0.8 * self.LIMIT < sum(size.octets for size in after) <= self.LIMIT and after[1] == before[1]
        assert idp.store.verify_audit()["valid"] and idp.store.count_audit() == len(idp.store.list_audit(limit=9999))
        assert [row.secondary.partition(";")[2][:17] for row in idp.store.list_audit("audit_purged")] == [
            "rows_larger_than="
        ]

    def test_what_is_within_it_stays(self, idp, clock):
        self.write(idp, idp.store.append_refusals, 200)
        self.write(idp, idp.store.append_audit, 2000)
        before = idp.store.count_audit()
        assert m.bound_audit_log(idp, self.SYSTEM, self.LIMIT) == 0 and idp.store.count_audit() == before
        assert m.bound_audit_log(idp, self.SYSTEM, 10**12) == 0

    def test_a_clock_that_nobody_believes_is_no_reason_to_fill_the_disk(self, idp, clock):
        clock.now = 1000
        self.write(idp, idp.store.append_refusals, 1200)
        assert m.bound_audit_log(idp, self.SYSTEM, self.LIMIT) > 500

    def test_age_takes_refusals_too(self, idp, clock):
        self.write(idp, idp.store.append_refusals, 700)
        self.write(idp, idp.store.append_audit, 700)
        clock.pass_(20 * 86400)
        self.write(idp, idp.store.append_refusals, 3)
        self.write(idp, idp.store.append_audit, 3)
        m.purge_audit_log(idp, self.SYSTEM, 10)
        assert len(idp.store.list_audit("act")) == 6 and idp.store.verify_audit()["valid"]
        assert len(idp.store.list_audit("audit_purge_begun")) == len(idp.store.list_audit("audit_purged")) == 1

    @pytest.mark.parametrize(
        "option, free, limit",
        [
            (-1, 40_000_000_000, 1_000_000_000), (-1, 64_000_000, 17_000_000), (-1, 0, 1_000_000),
            (64_000_000, 100, 64_000_000),
        ],
    )
    def test_its_size_is_the_option_or_a_quarter_of_the_free_disk(self, tmp_path, monkeypatch, option, free, limit):
        path = tmp_path / "mad.db3"
        path.write_bytes(b"")
        os.truncate(path, 4_000_000 if free else 0)
        monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=free // 1000, f_frsize=1000))
        assert audit_limit(Options(audit_max_size=option), str(path)) == limit
