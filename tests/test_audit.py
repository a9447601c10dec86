"""The audit log: what is written down, by whom, and that nothing is done which cannot be."""

import contextlib
import io

import microauthd as m
import msgspec
import pytest
import sqlcipher3
from conftest import DATABASE_KEY
from appliance.base.log import Log
from appliance.base.settings import Options
from appliance.base.store import FOREVER, MIGRATIONS, Store
from appliance.upkeep import log_audit_head
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
            before.setattr(store, "last_audit_seq", lambda connection: store.value("SELECT max(seq) FROM audit") or 0)
            for _ in range(3):
                with store.transaction():
                    store.append_audit([(1, "x", "old", "", "", "", "", "", "success")])
            # The anchor of a purge of before.
            digest = store.value("SELECT row_sha256 FROM audit WHERE seq = 1")
            store.run("DELETE FROM audit WHERE seq = 1")
            store.put_meta("audit_anchor", f"1:{digest}")
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
