"""The database: opening it, writing it, what stands in it."""

import contextlib
import os
import re
import threading
import time

import microauthd as m
import msgspec
import pytest
import sqlcipher3
import appliance.base.store as rows
from conftest import DATABASE_KEY, PASSWORD, YEARS
from appliance.base.clock import IAT_SKEW
from appliance.base.settings import Options
from appliance.base.shared import ChangeMarks
from appliance.base.database import Conflict, Record, Unavailable
from appliance.base.objects import ChangeSecret, CreateClient, CreatePermission, CreateRole, CreateScope, CreateUser
from appliance.base.store import (
    AdminSession, AtLeast, AuthorizationCode, BrandRow, BrowserSession, DEPENDENTS, Family, Invitation, LoginTransaction,
    MAD_ADMIN_ROLE_ID, MIGRATIONS, ParkedHints, RefreshToken, RetiredKey, Role, SCATTERED, SEEDED_SCOPES, SLICE,
    Session, Store, chain, lockout_seconds,
)
from appliance.upkeep import finish_deletions


def tombs(idp, many):
    with idp.store.transaction():
        for number in range(many):
            idp.store.run("INSERT INTO revoked_token VALUES (:jti, 5, 5)", jti=f"{number:032x}")


class TestSchema:
    def test_a_record_has_the_columns_of_its_table_in_order(self, idp):
        records = [kind for kind in vars(rows).values() if isinstance(kind, type) and issubclass(kind, Record)]
        written = [record for record in records if record.table and record.__base__ is Record]
        assert len(written) == len({record.table for record in written}) == 20
        for record in written:
            columns = [row[1] for row in idp.store.connection.execute(f"PRAGMA table_info({record.table})")]
            assert list(record.__struct_fields__) == columns, record

    def test_a_row_is_inserted_as_its_record_says(self, idp):
        role = Role("r", "auditor", "Reads the log.", 0, 0, 5, 7)
        assert idp.store.insert(role) is role and idp.store.find_role("auditor") == role
        with pytest.raises(Conflict):
            idp.store.insert(role)

    def test_a_statement_that_finds_nothing_has_no_value(self, idp):
        store, nothing = idp.store, "SELECT name FROM role WHERE id = :id"
        assert (store.value(nothing, id="?"), store.values(nothing, id="?")) == (None, [])
        assert not store.exists(nothing, id="?") and store.exists(nothing, id=MAD_ADMIN_ROLE_ID)
        assert store.value(nothing, id=MAD_ADMIN_ROLE_ID) == "MadAdmin"
        assert store.exists("SELECT NULL"), "a row without a value is a row"

    def test_every_table_is_strict(self, idp):
        for name, strict in idp.store.connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ):
            assert strict, name

    def test_the_rows_every_database_begins_with_have_their_identifiers(self, idp):
        assert {scope.id: scope.name for scope in idp.store.list_scopes()[0]} == {
            id: name for id, name, _ in SEEDED_SCOPES
        }
        assert idp.store.connection.execute("SELECT id, name, is_protected FROM role").fetchall() == [
            (MAD_ADMIN_ROLE_ID, "MadAdmin", 1)
        ]
        assert len(idp.store.meta("instance_id")) == 36

    def test_foreign_keys_are_on_and_time_is_whole_seconds(self, idp, alice):
        assert idp.store.connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
        with pytest.raises(Conflict):
            idp.store.assign_role("nobody", MAD_ADMIN_ROLE_ID, 1)
        with pytest.raises((Unavailable, Conflict)):
            idp.store.run("UPDATE account SET created_at = 'now' WHERE id = :id", id=alice.id)

    def test_steps_that_are_missing_are_run_and_the_rest_is_not(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.store.MIGRATIONS",
            (
                *MIGRATIONS, "CREATE TABLE second_step (x TEXT) STRICT;",
                "INSERT INTO second_step VALUES ('a;b');\nINSERT INTO second_step VALUES ('c');",
            ),
        )
        idp.store.migrate()
        idp.store.migrate()
        assert idp.store.connection.execute("PRAGMA user_version").fetchone() == (len(rows.MIGRATIONS),)
        assert idp.store.connection.execute("SELECT x FROM second_step").fetchall() == [("a;b",), ("c",)]

    @pytest.fixture
    def from_before(self, tmp_path, monkeypatch):
        """Make the database of a release without a step of the schema, and open it with this program."""
        opened = []

        def make(text, *statements):
            number = next(number for number, step in enumerate(MIGRATIONS) if text in step)
            with monkeypatch.context() as before:
                before.setattr("appliance.base.store.MIGRATIONS", MIGRATIONS[:number])
                before.setattr(Store, "seed", lambda store, now: None)
                store = Store.make(tmp_path / "old.db3", DATABASE_KEY, 1)
                assert store.connection.execute("PRAGMA user_version").fetchone() == (number,)
                for statement in statements:
                    store.run(statement)
                store.close()
            opened.append(Store(tmp_path / "old.db3", DATABASE_KEY))
            opened[0].open()
            return opened[0]

        yield make
        opened[0].close()

    CLIENT = (
        "INSERT INTO client (id, client_id, client_type, display_name, audience, grant_types, created_at, modified_at) "
        "VALUES ('1', 'old', 'confidential', 'Old', 'api', '{}', 7, 8)"
    )
    ROLE = (
        "INSERT INTO role (id, name, description, is_protected, created_at, modified_at) "
        "VALUES ('{}', '{}', 'Reads the log.', {}, 5, 7)"
    )

    def test_a_database_without_the_table_of_qr_files_gets_it(self, from_before):
        store = from_before(
            "CREATE TABLE totp_qr_file",
            "INSERT INTO account (id, username, email, password_hash, created_at, modified_at) "
            "VALUES ('u', 'ann', 'ann@example.org', 'x', 1, 1)",
        )
        with store.transaction():
            store.add_qr_file("u", "a/b.svg")
            assert store.list_due_qr_files() == []
            store.delete_account("u")
        assert store.list_due_qr_files() == ["a/b.svg"]

    @pytest.mark.parametrize("known, id", [((), SEEDED_SCOPES[-1][0]), (("mine",), "mine")])
    def test_a_database_of_before_gets_the_scope_of_metrics_unless_it_has_one(self, from_before, known, id):
        store = from_before(
            "admin:read_metrics",
            *(
                f"INSERT INTO scope (id, name, created_at, modified_at) VALUES ('{id}', 'admin:read_metrics', 1, 1)"
                for id in known
            ),
        )
        found, total = store.list_scopes()
        assert [(scope.id, scope.name, scope.created_at) for scope in found] == [(id, "admin:read_metrics", 1)]

    def test_a_database_without_the_table_of_browsers_gets_it(self, from_before):
        store = from_before(
            "CREATE TABLE device_failure",
            "INSERT INTO account (id, username, email, password_hash, created_at, modified_at) "
            "VALUES ('u', 'ann', 'ann@example.org', 'x', 1, 1)",
        )
        assert store.count_failed_device("d", "u", 50, 300, 1, 300, 3600) == store.find_device_lockout("d") == 350
        store.delete_account("u")
        assert store.find_device_lockout("d") == 0

    def test_a_database_without_invitations_gets_their_table_and_its_logins_are_from_nowhere(self, from_before):
        store = from_before(
            "CREATE TABLE invitation",
            "INSERT INTO account (id, username, email, password_hash, created_at, modified_at) "
            "VALUES ('u', 'ann', 'ann@example.org', 'x', 1, 1)",
            "INSERT INTO family VALUES ('s', 'u', 'app', '', 'pwd', 5, '', 5000, 90, NULL, '', '')",
        )
        assert (store.find_family("s").ip_address, store.find_family("s").user_agent) == ("", "")
        store.put_invitation(Invitation("u", "i", "h", "invite", "", "root", 5, 90))
        assert store.spend_invitation("h", 90) is None and store.spend_invitation("h", 89).user_id == "u"
        assert store.spend_invitation("h", 89) is None

    def test_clients_of_before_have_no_switches(self, from_before):
        store = from_before("allow_http_redirects", self.CLIENT.format("password"))
        row = store.find_client("old")
        assert (row.allow_http_redirects, row.allow_short_schemes) == (0, 0)
        assert (row.id, row.is_first_party, row.created_at, row.modified_at) == ("1", 1, 7, 8)

    def test_clients_of_before_keep_their_grants_as_if_named(self, from_before):
        store = from_before("are_grants_named", self.CLIENT.format("client_credentials password"))
        row = store.find_client("old")
        assert (row.grant_types, row.are_grants_named) == ("client_credentials password", 1)

    def test_of_the_roles_of_before_mad_admin_is_privileged(self, from_before):
        store = from_before(
            "is_privileged", self.ROLE.format(MAD_ADMIN_ROLE_ID, "MadAdmin", 1), self.ROLE.format("r", "auditor", 0)
        )
        assert store.find_role(MAD_ADMIN_ROLE_ID).is_privileged and not store.find_role("auditor").is_privileged

    def test_a_database_of_before_keeps_its_rows_and_gains_what_is_new(self, from_before):
        store = from_before(
            "CREATE TABLE retired_key", self.ROLE.format("r", "auditor", 0),
            """
            INSERT INTO login_transaction (id, binding_sha256, client_id, state, request, amr, auth_time, failures,
                created_at, expires_at)
            VALUES ('l', 'b', 'app', 'password', 'null', '', 0, 0, 5, 60)
            """,
        )
        assert store.find_role("auditor").created_at == 5 and store.find_login("l", "b", 5).client_id == "app"
        store.put_retired_key(RetiredKey("kid", "header", "pem", 50))
        store.park_hints(ParkedHints("handle", "binding", "{}", 5, 50))
        assert store.find_retired_key("header", 49) and store.find_retired_key("header", 50) is None
        assert store.spend_hints("handle", "binding", 49) and store.spend_hints("handle", "binding", 49) is None

    def test_logins_of_before_live_on_or_stay_dead_and_no_statement_lost_its_index(self, from_before):
        family = """
            INSERT INTO family (sid, user_id, client_id, scope, amr, auth_time, nonce, created_ms, expires_at, revoked_at,
                browser)
            VALUES ('{}', 'u', 'app', '', 'pwd', 5, '', 5000, 90, {}, 'b')
        """
        store = from_before(
            "TABLE ended_login",
            """
            INSERT INTO account (id, username, email, password_hash, created_at, modified_at)
            VALUES ('u', 'ann', '', 'x', 5, 5)
            """,
            family.format("alive", "NULL"), family.format("dead", "6"),
            *(
                f"INSERT INTO refresh_token VALUES ('{sid}', '{sid}', '{sid}', 'u', 'app', 's', 5, 90, NULL, NULL)"
                for sid in ("alive", "dead")
            ),
        )
        assert [store.is_family_revoked(sid) for sid in ("alive", "dead", "unknown")] == [False, True, True]
        assert store.rotate_refresh_token("alive", "app", 7).sid == "alive"
        assert store.rotate_refresh_token("dead", "app", 7) is None
        store.revoke_logins("u", "app", 5000)
        assert store.is_family_revoked("alive") and store.logins_revoked_before("u", "app") == 5000

    def test_a_browser_session_of_before_lives_on_and_has_confirmed_no_client(self, idp, alice, service, monkeypatch):
        number = next(number for number, step in enumerate(MIGRATIONS) if "TABLE browser_session_client" in step)
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", MIGRATIONS[: number + 1])
        idp.store.run("DROP TABLE browser_session_client")
        idp.store.run(f"PRAGMA user_version = {number}")
        before = idp.store.insert(
            BrowserSession("b", alice.id, "pwd", 1, 1, 1, 9_000_000_000, None, "192.0.2.7", "a browser")
        )
        idp.store.migrate()
        client = m.get_client(idp, "service").row.id
        assert idp.store.find_browser_session("b") == before and not idp.store.is_confirmed("b", client)
        idp.store.confirm_client("b", client, 5)
        idp.store.confirm_client("gone", client, 5)
        assert idp.store.is_confirmed("b", client) and not idp.store.is_confirmed("gone", client)

    def test_a_database_of_before_has_no_brand_and_takes_one(self, from_before):
        store = from_before("CREATE TABLE brand", self.CLIENT)
        assert store.find_brand() is None and store.meta("created_at") == "1"
        assert store.exists("SELECT 1 FROM client WHERE client_id = 'old'")
        store.put_brand(BrandRow("New", None, "aa", "image/png", 0, 7), b"png")
        store.put_brand(BrandRow("Newer", "#000000", "aa", "image/png", 0, 8), None)
        assert store.find_brand() == BrandRow("Newer", "#000000", "aa", "image/png", 3, 8), "in the same row"
        assert store.find_brand_logo("aa") == b"png" and store.find_brand_logo("bb") is None
        assert store.delete_brand() and not store.delete_brand() and store.find_brand() is None

    def test_a_secret_of_before_was_not_used_yet_and_can_be(self, from_before):
        store = from_before(
            "ADD COLUMN last_used_at", self.CLIENT, "INSERT INTO client_secret VALUES ('s', '1', 'hash', 7, 9000)"
        )
        used = lambda: [row.last_used_at for row in store.list_secrets("1", 8)]  # noqa: E731
        assert used() == [0]
        store.note_secret_use("s", 100)
        assert used() == [0], "it waits for the next batch"
        store.flush()
        assert used() == [100]

    def test_the_actions_of_a_log_of_before_are_listed_and_new_ones(self, from_before):
        row = "INSERT INTO {} VALUES ({}, 1, 'a', '{}', '', '', '', '', '', 'x', '')"
        store = from_before(
            "CREATE TABLE audit_action", row.format("audit", 1, "user_created"),
            row.format("audit", 2, "user_created"), row.format("audit_refusal", 3, "token_refused"),
        )
        assert store.list_audit_actions() == ["token_refused", "user_created"]
        with store.transaction():
            store.append_audit([(1, "a", "act", "", "", "", "", "", "")] * 2)
            store.append_refusals([(1, "a", "another", "", "", "", "", "", "")])
        assert store.list_audit_actions() == ["act", "another", "token_refused", "user_created"]
        with contextlib.suppress(ValueError), store.transaction():
            store.append_audit([(1, "a", "undone", "", "", "", "", "", "")])
            raise ValueError
        assert "undone" not in store.list_audit_actions()

    def test_an_administrator_of_before_is_signed_in_at_no_console_and_can_be(self, idp, root, monkeypatch):
        number = next(number for number, step in enumerate(MIGRATIONS) if "TABLE admin_session" in step)
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", MIGRATIONS[: number + 1])
        idp.store.run("DROP TABLE admin_session")
        idp.store.run(f"PRAGMA user_version = {number}")
        idp.store.migrate()
        assert idp.store.list_admin_sessions(root.id, idp.now(), 60) == []
        _, console = m.begin_console(idp, m.LOCAL, idp.store.find_account(root.id), ["pwd"], None)
        assert idp.store.list_admin_sessions(root.id, idp.now(), 60) == [console]

    def test_users_of_before_are_found_by_the_indexes_of_their_lists(self, idp, root, monkeypatch):
        number = next(number for number, step in enumerate(MIGRATIONS) if "INDEX account_list" in step)
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", MIGRATIONS[: number + 1])
        for index in ("account_list", "account_totp", "account_locked"):
            idp.store.run(f"DROP INDEX {index}")
        idp.store.run(f"PRAGMA user_version = {number}")
        idp.store.run("UPDATE account SET totp_sealed = 's', lockout_until = 9 WHERE id = :id", id=root.id)
        idp.store.migrate()
        for filters in ({"locked": True, "now": 8}, {"totp": True}, {"is_admin": True}, {"q": root.username}):
            assert [row.id for row in idp.store.list_accounts(**filters)[0]] == [root.id]
        assert idp.store.list_accounts(locked=True, now=9)[0] == []

    def test_a_step_that_fails_leaves_nothing(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE new_one (x TEXT) STRICT;\n CREATE TABLE account (x TEXT);\n")
        )
        with pytest.raises((Unavailable, Conflict)):
            idp.store.migrate()
        assert idp.store.connection.execute("PRAGMA user_version").fetchone() == (len(rows.MIGRATIONS) - 1,)
        assert not idp.store.connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'new_one'").fetchone()


class TestWriting:
    def test_a_batch_writes_its_sessions_and_one_row_a_client_and_peer(self, idp, auth, service):
        idp.store.flush()
        before = len(idp.store.list_audit(limit=1000))
        answers = [
            auth.post("/token", {"grant_type": "client_credentials"}, auth=service, peer=peer).json
            for peer in ("192.0.2.1", "192.0.2.1", "192.0.2.2")
        ]
        idp.store.flush()
        assert all(idp.store.find_session(answer["jti"]) for answer in answers)
        rows = idp.store.list_audit(limit=1000)[: len(idp.store.list_audit(limit=1000)) - before]
        assert sorted((row.ip_address, row.secondary.partition(" ")[0]) for row in rows) == [
            ("192.0.2.1", "count=2"), ("192.0.2.2", f"jti={answers[2]['jti']}"),
        ]

    def test_what_cannot_be_recorded_is_not_issued(self, idp, auth, service, machine, monkeypatch):
        store, append = idp.store, idp.store.append_audit
        store.flush()

        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        monkeypatch.setattr(store, "append_audit", fail)
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        store.flush()
        refused = auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        assert (refused.status, refused.json["error"]) == (503, "temporarily_unavailable") and refused.headers[
            "retry-after"
        ]
        assert auth.get("/jwks.json").status == 200 and auth.get("/me", bearer=machine["access_token"]).status == 200
        assert auth.get("/health/ready").status == 503
        monkeypatch.setattr(store, "append_audit", append)
        store.flush()
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        assert len(store.queue) == 1

    def test_a_probe_writes_where_nothing_was_written_lately(self, idp, auth, monkeypatch):
        store, written = idp.store, []
        write = store.write_something
        monkeypatch.setattr(store, "write_something", lambda: written.append(write()))
        store.probe()
        store.put_meta("x", 1)
        store.probe()
        assert len(written) <= 1, "flash wears out"
        store.written_at = -1e9
        store.connection.execute("PRAGMA query_only = ON")
        with pytest.raises(Unavailable):
            store.probe()
        assert auth.get("/health/ready").status == 503
        with pytest.raises(Unavailable):
            store.enqueue((m.new_jti(5), "service", "", 1, 2), None)
        store.flush()
        store.probe()

    def test_what_waits_at_the_end_is_written_however_much_it_is(self, make_idp, options):
        idp = make_idp(options)
        for number in range(5001):
            idp.store.enqueue((m.new_jti(number), "service", "", 1, 2), None)
        idp.store.close()
        assert make_idp(options).store.connection.execute("SELECT count(*) FROM session").fetchone() == (5001,)

    @pytest.mark.parametrize(
        "error",
        [
            sqlcipher3.OperationalError("disk I/O error"), MemoryError(), OSError("no room"),
            UnicodeEncodeError("utf-8", "", 0, 0, ""),
        ],
    )
    def test_a_batch_is_never_dropped(self, idp, monkeypatch, error):
        store = idp.store
        store.enqueue((m.new_jti(5), "service", "", 1, 2), ("service", "192.0.2.1", "", ""))

        def fail(*_):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(store, "append_audit", fail)
            try:
                store.flush()
            except Exception:
                pass
            assert len(store.queue) == 1 and not store.writable
        store.flush()
        assert (
            not store.queue
            and store.writable
            and store.connection.execute("SELECT count(*) FROM session").fetchone() == (1,)
        )

    def test_the_flusher_outlives_a_failure(self, idp, monkeypatch):
        store, calls = idp.store, []
        append = store.append_audit
        monkeypatch.setattr("appliance.base.store.BATCH_SECONDS", 0.001)

        def fail_once(*words):
            calls.append(1)
            if len(calls) == 1:
                raise sqlcipher3.OperationalError("database or disk is full")
            return append(*words)

        monkeypatch.setattr(store, "append_audit", fail_once)
        store.start_flusher()
        store.enqueue((m.new_jti(5), "service", "", 1, 2), ("service", "192.0.2.1", "", ""))
        store.wake.set()
        deadline = time.monotonic() + 60
        while store.queue or not store.writable or not calls:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "store.unwritable" in idp.stream.getvalue() and "store.writable" in idp.stream.getvalue()

    def test_a_queue_that_grows_too_long_stops_the_issuing(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.store.BATCH_MAX", 1)
        idp.store.enqueue((m.new_jti(5), "c", "", 1, 2), None)
        idp.store.enqueue((m.new_jti(5), "c", "", 1, 2), None)
        with pytest.raises(Unavailable) as caught:
            idp.store.enqueue((m.new_jti(5), "c", "", 1, 2), None)
        problem = m.as_problem(caught.value)
        assert (problem.code, problem.status) == ("temporarily_unavailable", 503)

    def test_a_batch_is_not_longer_than_5000(self, idp):
        for number in range(5001):
            idp.store.enqueue((m.new_jti(number), "service", "", 1, 2), None)
        idp.store.flush()
        assert len(idp.store.queue) == 1 and idp.store.wake.is_set()

    def test_a_disk_with_no_room_is_not_ready(self, idp, monkeypatch):
        idp.store.put_meta("x", 1)
        real = os.statvfs
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:4], 1, *real(path)[5:])))
        with pytest.raises(Unavailable):
            idp.store.probe()


class TestCounting:
    """What is counted or used once is one conditional statement."""

    def test_failures_count_together_within_their_window_to_its_last_second(self, idp, alice):
        fail = lambda now: idp.store.count_failed_login(alice.id, now, 60, 9, 10, 3600).failed_logins  # noqa: E731
        assert [fail(1000), fail(1060), fail(1121)] == [1, 2, 1]

    def test_a_lockout_doubles_up_to_its_bound_and_an_administrators_stays(self, idp, alice):
        fail = lambda now: idp.store.count_failed_login(alice.id, now, 60, 1, 1000, 3600).lockout_until - now  # noqa: E731
        assert [fail(10_000), fail(20_000), fail(30_000)] == [1000, 2000, 3600]
        idp.store.set_lockout(alice.id, 90_000, 40_000)
        assert fail(40_000) == 50_000

    def test_every_lockout_lasts_as_long_as_the_one_rule_says(self, idp, alice):
        """Of an account, of a browser that is known, and of the second factor."""
        store, now = idp.store, 10_000
        for earlier, lasts in enumerate((7200, 7200)):
            account = store.count_failed_login(alice.id, now, 60, 1, 7200, 3600)
            store.count_failed_totp(alice.id, now, 1, 7200)
            untils = (
                account.lockout_until, store.count_failed_device("d", alice.id, now, 60, 1, 7200, 3600),
                store.find_account(alice.id).totp_locked_until,
            )
            assert {until - now for until in untils} == {lockout_seconds(7200, earlier)} == {lasts}
            now += 20_000
        doubled = [lockout_seconds(300, earlier) for earlier in range(6)]
        assert doubled == [300, 600, 1200, 2400, 3600, 3600] and lockout_seconds(1, 10**9) == 3600

    def test_new_recovery_codes_replace_the_old_ones(self, idp, alice, give_totp):
        give_totp(idp, alice.account)
        old, new = m.make_recovery_codes(idp, m.LOCAL, alice.id), m.make_recovery_codes(idp, m.LOCAL, alice.id)
        assert idp.store.count_recovery_codes(alice.id) == len(new)
        spends = [idp.store.spend_recovery_code(alice.id, m.sha256(m.fold_recovery_code(code)), 1) for code in (*old, *new)]
        assert spends == [False] * len(old) + [True] * len(new)

    def test_taking_the_second_factor_away_destroys_its_recovery_codes(self, idp, alice, give_totp):
        give_totp(idp, alice.account)
        m.make_recovery_codes(idp, m.LOCAL, alice.id)
        assert idp.store.clear_totp(alice.id, idp.now()) and idp.store.count_recovery_codes(alice.id) == 0
        assert not idp.store.clear_totp(alice.id, idp.now())

    def test_a_recovery_code_is_of_its_user_alone_and_works_once(self, idp, alice, new_user):
        bob, hashed = new_user("bob"), m.sha256("code")
        idp.store.replace_recovery_codes(alice.id, [hashed], 1)
        assert not idp.store.spend_recovery_code(bob.id, hashed, 2)
        assert idp.store.spend_recovery_code(alice.id, hashed, 2)
        assert not idp.store.spend_recovery_code(alice.id, hashed, 2)

    def test_a_refresh_token_rotates_once_for_its_client_up_to_its_last_second(self, idp, alice):
        store, rotate = idp.store, idp.store.rotate_refresh_token
        store.insert(Family("s", alice.id, "c", "", "pwd", 1, "", 1, 100, None))
        for name in ("first", "second"):
            store.insert(RefreshToken(name, name, "s", alice.id, "c", "j", 1, 100, None, None))
        assert rotate("first", "another", 5) is rotate("first", "c", 100) is rotate("nothing", "c", 5) is None
        assert rotate("first", "c", 99).rotated_at == 99 and rotate("first", "c", 99) is None
        store.revoke_family("s", 50)
        assert rotate("second", "c", 60) is None

    def test_a_successor_is_found_within_the_grace_until_it_is_used(self, idp, alice, change):
        """The statement asks everything, whatever was read before it."""
        store = idp.store
        for sid in ("s", "other"):
            store.insert(Family(sid, alice.id, "c", "", "pwd", 1, "", 1, 100, None))
        for name, sid, rotated_at in (("first", "s", 50), ("second", "s", None), ("third", "other", None)):
            store.insert(RefreshToken(name, name, sid, alice.id, "c", "j", 1, 90, rotated_at, None))

        def find(spent="first", client_id="c", now=55, grace=30):
            return store.find_unused_successor(spent, client_id, now, grace)

        assert find().id == find(now=49).id == find(now=80).id == "second"
        assert find(client_id="another") is find(now=48) is find(now=81) is None
        assert find("second") is find("nothing") is find(now=90, grace=60) is None
        for column in ("rotated_at", "revoked_at"):
            change(f"UPDATE refresh_token SET {column} = 54 WHERE id = 'second'")
            assert find() is None
            change(f"UPDATE refresh_token SET {column} = NULL WHERE id = 'second'")
        change("UPDATE refresh_token SET revoked_at = 54 WHERE id = 'first'")
        assert find() is None

    def test_a_login_advances_once_from_the_state_in_which_it_was_read(self, idp, alice):
        store = idp.store
        read = store.insert(LoginTransaction("l", "b", "c", "password", "null", None, "", 0, 0, 1, 100, 0, ""))
        totp = msgspec.structs.replace(read, state="totp", user_id=alice.id, amr="pwd", auth_time=5, proven_ms=5)
        assert store.advance_login(read, totp, 100) is None, "it has expired"
        assert store.advance_login(read, totp, 99) == totp
        assert store.advance_login(read, totp, 99) is None
        for failures in (1, 2, 3):
            assert store.find_login("l", "b", 99).failures == failures - 1
            store.count_failed_step("l", 3)
        assert store.find_login("l", "b", 99) is None

    def test_a_browser_is_locked_for_twice_as_long_each_time_up_to_an_hour(self, idp, alice):
        store, now, lasted = idp.store, 1000, []
        for _ in range(6):
            for count in range(5):
                until = store.count_failed_device("d", alice.id, now, 300, 5, 300, 3600)
                assert (until > 0) is (count == 4)
            assert store.find_device_lockout("d") == until
            lasted.append(until - now)
            now = until
        assert lasted == [300, 600, 1200, 2400, 3600, 3600]

    def test_a_pause_restarts_the_count_in_a_browser_and_zero_never_locks(self, idp, alice):
        store = idp.store
        counted = [store.count_failed_device("d", alice.id, at, 300, 2, 300, 3600) for at in (0, 301, 602, 603, 1300, 1301)]
        assert counted == [0, 0, 0, 903, 0, 1901]
        assert [store.count_failed_device("e", alice.id, at, 300, 0, 300, 3600) for at in range(20)] == [0] * 20

    def test_of_the_secrets_of_a_client_the_newest_outlives_a_change_and_the_others_end(self, idp, service):
        id, now = m.get_client(idp, "service").row.id, idp.now()
        idp.store.add_secret("second", id, "hash", now)
        idp.store.retire_secrets(id, now + 60, now)
        assert [secret.id for secret in idp.store.list_secrets(id, now)] == ["second"]
        assert idp.store.list_secrets(id, now + 60) == []


class TestSecrecy:
    def test_no_secret_stands_in_any_table(
        self, idp, auth, admin, service, alice, log_in, machine, give_totp, admin_token
    ):
        answer = log_in(alice, scope="openid")
        seed = give_totp(idp, alice.account)
        changed = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60))
        auth.post("/token", {"grant_type": "refresh_token", "refresh_token": answer["refresh_token"]}, auth=service)
        auth.post("/token", {"grant_type": "password", "username": PASSWORD, "password": PASSWORD}, auth=service)
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        idp.store.flush()
        dump = []
        for (table,) in idp.store.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
            dump += [str(row) for row in idp.store.connection.execute(f"SELECT * FROM {table}").fetchall()]
        dump = "\n".join(dump)
        for secret in (
            PASSWORD, service[1], changed, seed, answer["access_token"], answer["refresh_token"], answer["id_token"],
            machine["access_token"], admin_token,
        ):
            assert secret not in dump
        assert not re.search(r"eyJ[A-Za-z0-9_-]+\.", dump)


class TestLists:
    @pytest.fixture
    def long(self, idp, alice, service, monkeypatch):
        """Store 30 logins with a session and a refresh token each, where 20 rows are counted at most."""
        monkeypatch.setattr("appliance.base.store.COUNT_MAX", 20)
        store, now = idp.store, idp.now()
        with store.transaction():
            store.insert(Family("s", alice.id, "service", "", "pwd", now, "", idp.now_ms() + 1, now + 60, None))
            for number in range(30):
                jti = f"{idp.now_ms() + number:012x}7{number:019x}"
                store.insert(Session(jti, alice.id, "service", "s", "", "access", "auth", "code", now, now + 60, None))
                store.insert(
                    RefreshToken(jti, m.sha256(jti), "s", alice.id, "service", jti, now, now + 60, None, None)
                )
        return store

    @pytest.mark.parametrize("dense", [0, 2000])
    def test_the_holders_of_a_role_are_the_same_whether_they_are_many_or_few(self, idp, alice, new_user, monkeypatch, dense):
        monkeypatch.setattr("appliance.base.store.DENSE", dense)
        store, now = idp.store, idp.now()
        new_user("bob"), new_user("carl")
        bob = store.find_account_by_name("bob")
        store.insert(Role("r", "r", "", 0, 1, now, now, 0))
        for id in (bob.id, alice.id):
            store.run("INSERT INTO user_role VALUES (:id, 'r', 1)", id=id)
            store.run("INSERT INTO user_role VALUES (:id, :admin, 1)", id=id, admin=MAD_ADMIN_ROLE_ID)
        names = lambda **filters: [row.username for row in store.list_accounts(**filters)[0]]  # noqa: E731
        assert names(role_id="r") == ["alice", "bob"] and names(role_id="r", sort="-username") == ["bob", "alice"]
        assert names(role_id="r", is_admin=True, q="bo") == ["bob"] and names(role_id="r", limit=1, offset=1) == ["bob"]
        assert names(is_admin=False) == ["carl"] and names(role_id="none") == [] == names(scope_id="none")

    @pytest.mark.parametrize("sql", [
        "SELECT id, username, email, is_active FROM account WHERE is_active = 1 ORDER BY username LIMIT 50 OFFSET 5000",
        "SELECT id, username FROM account WHERE username LIKE '%x%' OR email LIKE '%x%' ORDER BY username LIMIT 50",
    ])  # fmt: skip
    def test_a_page_and_a_search_of_users_read_no_rows_of_users(self, idp, sql):
        plan = [row[3] for row in idp.store.connection.execute("EXPLAIN QUERY PLAN " + sql)]
        assert plan == ["SCAN account USING COVERING INDEX account_list"]

    def test_the_statement_of_a_page_is_one_that_the_index_covers(self, idp, alice):
        said = []
        idp.store.connection.set_trace_callback(said.append)
        idp.store.list_accounts(limit=1, offset=2000)
        idp.store.list_accounts(q="ali", limit=1)
        idp.store.connection.set_trace_callback(None)
        for sql in said:
            plan = " ".join(row[3] for row in idp.store.connection.execute("EXPLAIN QUERY PLAN " + sql))
            assert "COVERING INDEX account_list" in plan and "SCAN account USING INDEX" not in plan

    def test_a_crowded_address_has_the_same_sessions(self, long, monkeypatch):
        monkeypatch.setattr("appliance.base.store.DENSE", 0)
        long.run("UPDATE family SET ip_address = '192.0.2.1'")
        assert len(long.list_sessions(ip_address="192.0.2.1")[0]) == 30
        assert long.list_sessions(ip_address="192.0.2.2")[0] == []

    def test_what_expired_long_ago_is_not_read_to_count_what_is_alive(self, idp, long):
        said = []
        long.connection.set_trace_callback(said.append)
        long.list_sessions(limit=5, living=True, now=idp.now())
        long.list_sessions(limit=5, living=True, now=idp.now(), after="f" * 32)
        long.connection.set_trace_callback(None)
        counts = [sql for sql in said if "count(*)" in sql]
        assert len(counts) == 2 and all("ORDER BY id DESC" in sql for sql in counts), "the newest first, once a page"

    def test_living_sessions_are_counted_less_far(self, idp, long, monkeypatch):
        monkeypatch.setattr("appliance.base.store.COUNT_LIVING_MAX", 10)
        for living, counted in ((True, 11), (False, 21)):
            total = long.list_sessions(limit=5, living=living, now=idp.now())[1]
            assert (total, isinstance(total, AtLeast)) == (counted, True)

    @pytest.mark.parametrize("listing", ["list_sessions", "list_refresh_tokens"])
    @pytest.mark.parametrize(
        ("limit", "offset", "rows", "total", "exact"),
        [
            (5, 0, 5, 21, False), (5, 22, 5, 28, False), (5, 25, 5, 30, True), (50, 0, 30, 30, True),
            (50, 25, 5, 30, True), (5, 90, 0, 21, False), (0, 0, 0, 21, False),
        ],
    )
    def test_a_total_is_exact_or_a_lower_bound_that_says_so(self, long, listing, limit, offset, rows, total, exact):
        found, counted = getattr(long, listing)(limit=limit, offset=offset)
        assert (len(found), counted, not isinstance(counted, AtLeast)) == (rows, total, exact)

    def test_a_page_goes_on_where_the_one_before_ends(self, long, alice):
        ids = [
            row.id for offset in range(0, 35, 7)
            for row in long.list_sessions(user_id=alice.id, limit=7, offset=offset)[0]
        ]
        assert ids == sorted(ids, reverse=True) and len(ids) == 30

    def test_a_lower_bound_is_named_in_the_answer(self, long, auth, bearer):
        short = auth.get("/me/sessions", bearer=bearer)
        answer = auth.get("/me/sessions?limit=5", bearer=bearer)
        assert answer.headers["x-total-count"] == "21" and answer.headers["x-total-count-relation"] == "gte"
        assert "offset=5" in answer.headers["link"]
        assert "x-total-count-relation" not in short.headers

    def test_the_audit_log_is_counted_whole_without_reading_it(self, long, idp):
        for number in range(30):
            m.audit(idp, m.LOCAL.acting_as("me"), f"act{number % 2}")
        assert long.count_audit() == long.audit_head()[0] and not isinstance(long.count_audit(), AtLeast)
        assert long.count_audit("act0") == 15 and isinstance(long.count_audit(actor_id="me"), AtLeast)


class TestAuditChain:
    """Append-only; each row carries the hash of the row before."""

    def rows(self, idp):
        return list(reversed(idp.store.list_audit(limit=10_000)))

    def broken_at(self, rows):
        digest = ""
        for row in rows:
            digest = chain(digest, row.seq, (*msgspec.structs.astuple(row)[1:9], row.result))
            if digest != row.row_sha256:
                return row.seq
        return None

    def test_every_way_of_writing_continues_it(self, idp, auth, service, alice, machine, log_in):
        log_in(alice)
        idp.store.flush()
        m.audit(idp, m.LOCAL.acting_as("test"), "last")
        rows = self.rows(idp)
        assert self.broken_at(rows) is None and [row.seq for row in rows] == list(range(1, len(rows) + 1))

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit SET actor_id = 'somebody else' WHERE seq = 3", "UPDATE audit SET at = at + 1 WHERE seq = 3",
            "UPDATE audit SET secondary = 'x' WHERE seq = 3", "DELETE FROM audit WHERE seq = 2",
        ],
    )
    def test_a_change_shows(self, idp, service, alice, change, statement):
        change(statement)
        assert self.broken_at(self.rows(idp)) == 3

    def test_columns_do_not_run_into_each_other(self):
        assert chain("", 1, (0, "a", "bc", "")) != chain("", 1, (0, "ab", "c", "")) and chain(
            "", 1, (0, "1", "")
        ) != chain("", 10, (0, "", ""))

    def test_rows_of_before_there_was_a_result_are_covered_as_they_were(self):
        assert chain("", 1, (0, "a", "")) != chain("", 1, (0, "a", "success")) == chain(
            "", 1, (0, "a", "success")
        ) and chain("", 1, (0, "a", "")) == chain("", 1, (0, "a", None))

    def test_two_processes_write_one_chain(self, idp, make_idp):
        other = make_idp(idp.options)

        def write(one):
            for _ in range(20):
                m.audit(one, m.LOCAL.acting_as("test"), "parallel")

        threads = [threading.Thread(target=write, args=(one,)) for one in (idp, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.broken_at(self.rows(idp)) is None and len(self.rows(idp)) >= 40

    def test_it_is_written_only_when_wanted(self, make_idp):
        from conftest import CHEAP

        idp = make_idp(Options(**CHEAP, enable_audit_logging=False))
        m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser("bob", "bob@example.org", PASSWORD))
        assert self.rows(idp) == []


class TestPurging:
    def test_what_lies_scattered_goes_a_few_rows_at_a_time(self, idp):
        tombs(idp, 60)
        after, deleted = idp.store.purge_expired("revoked_token", "jti", 10, "", 500)
        assert deleted <= 25 and after
        assert SLICE <= 1000

    def test_what_lives_again_when_its_turn_comes_stays(self, idp, monkeypatch):
        tombs(idp, 3)
        real = idp.store.transaction

        @contextlib.contextmanager
        def meanwhile(*words, **more):
            with real(*words, **more):
                idp.store.connection.execute("UPDATE revoked_token SET expires_at = 9000000000")
                yield

        monkeypatch.setattr(idp.store, "transaction", meanwhile)
        assert idp.store.purge_expired("revoked_token", "jti", 10, "", 500)[1] == 0


class TestRevoking:
    def test_all_that_was_done_at_times_that_are_not_yet_is_ended(self, idp, alice, service):
        store, now, late = idp.store, idp.now(), idp.now() + YEARS
        with store.transaction():
            store.insert(
                BrowserSession("b", alice.id, "pwd", late, 1000 * late, late, late + 60, None, "", "")
            )
            store.insert(AdminSession("a", alice.id, "pwd", late, late, 1000 * late, late, late + 60, "", ""))
            store.insert(
                AuthorizationCode(
                    "c", "service", alice.id, "s", "https://x", "", "", "", "", "", "pwd", late, 1000 * late, late + 60,
                    None, "", 0,
                )
            )
            store.insert(
                LoginTransaction("l", "b", "service", "password", "null", None, "", 0, 0, late, late + 60, 0, "")
            )
            store.run(
                "UPDATE account SET totp_last_step = :step, revoked_before = :ms", step=late // 30, ms=1000 * late
            )
            store.run("UPDATE client SET revoked_before = :ms", ms=1000 * late)
            store.count_failed_device("d", alice.id, late, 300, 1, 300, 3600)
            store.put_meta("revoked_before", 1000 * late)
            store.revoke_logins(alice.id, "service", 1000 * late)
        store.revoke_future_rows(now, 1000 * now, now // 30)
        account = store.find_account(alice.id)
        assert store.find_browser_session("b").revoked_at == now and store.find_code("c") is None
        assert store.find_admin_session("a") is None
        assert not store.connection.execute("SELECT 1 FROM login_transaction").fetchone()
        assert store.find_device_lockout("d") == 0
        assert account.totp_last_step == now // 30
        # Not less: what was issued within the minute that a clock may run ahead would live again.
        later = 1000 * (now + IAT_SKEW)
        assert account.revoked_before == later and m.find_client(idp, "service").row.revoked_before == later
        assert idp.revoked_before == later and store.logins_revoked_before(alice.id, "service") == later

    def test_the_epoch_of_role_holders_grows_too(self, idp, alice):
        epochs = [0]
        for name in ("first", "second"):
            role = m.create_role(idp, m.LOCAL, CreateRole(name=name))
            m.assign_role(idp, m.LOCAL, alice.id, role.id)
            m.delete_role(idp, m.LOCAL, role.id)
            epochs.append(idp.store.find_account(alice.id).revoked_before)
        assert epochs[0] < epochs[1] < epochs[2]

    @pytest.fixture
    def logins(self, idp, alice, service):
        """Store 40 logins of a user in one browser, each with a session and two refresh tokens. Return their `sid`."""
        store, now, ms = idp.store, idp.now(), idp.now_ms() + 1
        sids = [f"login{number}" for number in range(40)]
        with store.transaction():
            store.insert(BrowserSession("b", alice.id, "pwd", now, ms, now, now + 60, None, "", ""))
            for sid in sids:
                store.insert(Family(sid, alice.id, "service", "", "pwd", now, "", ms, now + 60, None, "b"))
                jti = m.new_jti(ms)
                store.insert(Session(jti, alice.id, "service", sid, "", "access", "auth", "code", now, now + 60, None))
                for rotated_at in (now, None):
                    id = m.new_jti(ms)
                    store.insert(
                        RefreshToken(
                            id, m.sha256(id), sid, alice.id, "service", jti, now, now + 60, rotated_at, None
                        )
                    )
        return sids

    REVOCATIONS = {
        "a client": lambda idp, alice: m.revoke_client(
            idp, m.LOCAL, m.get_client(idp, "service").row, "client_revoked"
        ),
        "a user": lambda idp, alice: m.revoke_user(idp, m.LOCAL, alice.id, "revoked"),
        "a user at a client": lambda idp, alice: m.revoke_families(idp, m.LOCAL, alice.id, "service"),
    }

    @pytest.mark.parametrize("what", REVOCATIONS)
    def test_an_epoch_ends_every_login_and_changes_as_many_rows_however_many_there_are(
        self, idp, alice, logins, what
    ):
        store = idp.store
        assert len(store.list_families_of(alice.id)) == 40
        before = store.connection.total_changes
        self.REVOCATIONS[what](idp, alice)
        assert store.connection.total_changes - before <= 4  # the epoch, the audit row, the head of its chain; once, the action
        assert store.list_families_of(alice.id) == []
        assert not any(m.active_family(idp, sid) for sid in logins)
        assert all(m.is_session_revoked(row) for row in store.list_sessions()[0])
        assert all(m.refresh_token_object(row).is_revoked for row in store.list_refresh_tokens()[0])

    def test_a_login_ends_by_its_own_row_and_no_other_one_does(self, idp, alice, logins):
        store = idp.store
        living = {row.sid: row for row in store.list_refresh_tokens()[0] if row.rotated_at is None}
        before = store.connection.total_changes
        store.revoke_family(logins[0], idp.now())
        assert store.connection.total_changes - before == 1
        assert m.active_family(idp, logins[0]) is None and m.active_family(idp, logins[1])
        assert {row.sid for row in store.list_sessions()[0] if m.is_session_revoked(row)} == {logins[0]}
        dead = {row.sid for row in store.list_refresh_tokens()[0] if m.refresh_token_object(row).is_revoked}
        assert dead == set(logins)  # one token of each was rotated
        rotated = [
            store.rotate_refresh_token(living[sid].token_sha256, "service", idp.now()) for sid in logins[:2]
        ]
        assert [token is not None for token in rotated] == [False, True]

    def test_a_browser_that_logs_out_changes_its_logins_alone(self, idp, alice, logins):
        before = idp.store.connection.total_changes
        assert idp.store.revoke_browser_session("b", idp.now())
        assert idp.store.connection.total_changes - before == 41
        assert idp.store.list_families_of(alice.id) == []

    def test_a_login_that_a_clock_ahead_of_now_began_is_ended_too(self, idp, alice, logins):
        """A clock is set back by seconds when it is corrected: what was issued in those seconds is newer than now."""
        store, ms = idp.store, idp.now_ms() + 30_000
        with store.transaction():
            store.insert(Family("ahead", alice.id, "service", "", "pwd", 0, "", ms, idp.now() + 60, None))
            store.insert(
                Session(m.new_jti(ms), alice.id, "service", "ahead", "", "access", "auth", "code", 0, 9_000_000_000, None)
            )
        assert m.active_family(idp, "ahead")
        m.revoke_user(idp, m.LOCAL, alice.id, "revoked")
        assert m.active_family(idp, "ahead") is None
        assert store.epoch(idp.now_ms() - YEARS * 1000) == idp.now_ms() - YEARS * 1000 + 1000 * IAT_SKEW

    def test_who_logs_in_again_at_once_is_let_in(self, idp, auth, alice, service, log_in):
        """Even within the millisecond of the logout."""
        log_in(alice)
        m.revoke_families(idp, m.LOCAL, alice.id, "service")
        assert log_in(alice)["access_token"]
        (family,) = idp.store.list_families_of(alice.id)
        assert m.active_family(idp, family.sid)

    def test_what_ended_counts_as_revoked_where_only_that_is_purged(self, idp, alice, logins):
        store, later = idp.store, idp.now() + 61
        store.revoke_family(logins[0], idp.now())
        assert store.purge_sessions("f", later, "", 500, revoked=True)[1] == 1
        m.revoke_user(idp, m.LOCAL, alice.id, "revoked")
        assert store.purge_sessions("f", later, "", 500, revoked=True)[1] == 39
        store.run("UPDATE refresh_token SET rotated_at = NULL")
        assert store.purge_refresh_tokens(later, "", 500, revoked=True)[1] == SCATTERED

    def test_every_table_that_refers_to_what_is_deleted_in_slices_is_among_them_and_has_an_index(self, idp):
        for kind, dependents in DEPENDENTS.items():
            refers = {
                (table, key[3])
                for (table,) in idp.store.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
                for key in idp.store.connection.execute(f"PRAGMA foreign_key_list({table})") if key[2] == kind
            }
            few = {
                (table, "client_id") for table in
                ("client_secret", "client_uri", "client_feature", "external_idp_provider", "client_scope")
            }
            assert refers == {(table, column) for table, column, _ in dependents} | (few if kind == "client" else set())
            for table, column in refers:
                (plan,) = idp.store.connection.execute(f"EXPLAIN QUERY PLAN SELECT 1 FROM {table} WHERE {column} = ?", "x")
                assert "SEARCH" in plan[3], (table, column, plan)

    @pytest.fixture
    def few(self, monkeypatch):
        monkeypatch.setattr("appliance.base.store.SLICE", 30)
        monkeypatch.setattr("appliance.upkeep.SCATTERED", 7)

    def slices(self, idp, monkeypatch):
        """Run upkeep; return how many rows each of its transactions changed."""
        changes, seen = [], [idp.store.connection.total_changes]

        def count(seconds):
            changes.append(idp.store.connection.total_changes - seen[0])
            seen[0] += changes[-1]

        finish_deletions(idp, count)
        return changes

    def test_a_user_with_many_rows_is_gone_at_once_and_its_rows_go_in_slices(
        self, idp, auth, alice, service, logins, few, monkeypatch, new_user
    ):
        store, before = idp.store, idp.store.connection.total_changes
        m.delete_user(idp, m.LOCAL, alice.id)
        assert store.connection.total_changes - before <= 5
        assert store.find_account(alice.id) is None and store.find_account_by_name("alice") is None
        assert "alice" not in [account.username for account in store.list_accounts(is_active=None)[0]]
        assert all(account.username[:8] != "deleted:" for account in store.list_accounts(is_active=None)[0])
        assert not any(m.active_family(idp, sid) for sid in logins)
        assert all(m.is_session_revoked(row) for row in store.list_sessions()[0])
        again = new_user("alice")
        assert again.id != alice.id
        assert max(self.slices(idp, monkeypatch)) <= 7
        assert store.value("SELECT count(*) FROM refresh_token") == store.value("SELECT count(*) FROM family") == 0
        assert store.list_deletions() == [] and store.find_account_by_name("alice").id == again.id
        assert not store.exists("SELECT 1 FROM account WHERE id = :id", id=alice.id)

    def test_a_deletion_that_a_stop_interrupts_is_gone_on_with(self, idp, alice, logins, few):
        m.delete_user(idp, m.LOCAL, alice.id)
        finish_deletions(idp, lambda seconds: True)
        assert idp.store.list_deletions() == [("account", alice.id)]
        finish_deletions(idp, lambda seconds: None)
        assert idp.store.list_deletions() == []

    def test_a_client_to_which_many_users_consented_is_gone_at_once(self, idp, auth, service, few, monkeypatch):
        store, client = idp.store, m.get_client(idp, "service")
        for number in range(40):
            store.add_account(f"u{number}", f"user{number}", "", 0, "x", 0)
            store.put_consent(f"u{number}", client.row.id, "openid", 0)
        before = store.connection.total_changes
        m.delete_client(idp, m.LOCAL, "service")
        assert store.connection.total_changes - before < 30
        assert m.find_client(idp, "service") is None and store.find_client(client.row.id) is None
        assert store.list_clients()[0] == [] and store.list_consents("u1") == []
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 401
        new = m.create_client(idp, m.LOCAL, CreateClient(client_id="service", audience="a"))[0]
        assert max(self.slices(idp, monkeypatch)) <= 7
        assert store.find_client("service").id == new.row.id and not store.exists("SELECT 1 FROM consent")

    def test_a_scope_that_many_have_is_gone_at_once(self, idp, few, monkeypatch):
        store, scope = idp.store, m.create_scope(idp, m.LOCAL, CreateScope(name="big"))
        for number in range(40):
            store.add_account(f"u{number}", f"user{number}", "", 0, "x", 0)
            store.assign_scope_to_user(f"u{number}", scope.id, 0)
        before = store.connection.total_changes
        m.delete_scope(idp, m.LOCAL, "big")
        assert store.connection.total_changes - before <= 5
        assert store.find_scope("big") is None and store.list_scopes_of_user("u1") == []
        assert m.create_scope(idp, m.LOCAL, CreateScope(name="big")).id != scope.id
        assert max(self.slices(idp, monkeypatch)) <= 7
        assert not store.exists("SELECT 1 FROM user_scope") and store.find_scope("big")

    @pytest.fixture
    def big_role(self, idp, few):
        """A role with 40 holders."""
        store, role = idp.store, m.create_role(idp, m.LOCAL, CreateRole(name="big"))
        for number in range(40):
            store.add_account(f"u{number}", f"user{number}", "", 0, "x", 0)
            store.assign_role(f"u{number}", role.id, 0)
        return role

    def test_a_role_that_many_have_is_deleted_once_all_holders_are_revoked(self, idp, big_role, monkeypatch):
        store, slices, delete_slice = idp.store, [], idp.store.delete_slice

        def count(*args):
            before = store.connection.total_changes
            more = delete_slice(*args)
            slices.append(store.connection.total_changes - before)
            return more

        monkeypatch.setattr(store, "delete_slice", count)
        monkeypatch.setattr("microauthd.SLICE", 7)
        m.delete_role(idp, m.LOCAL, "big")
        assert all(store.find_account(f"u{number}").revoked_before for number in range(40))
        assert len(slices) == 7 and max(slices) <= 14, "seven accounts and what gave them the role"
        assert not store.exists("SELECT 1 FROM user_role") and store.list_deletions() == []
        assert m.create_role(idp, m.LOCAL, CreateRole(name="big")).id != big_role.id

    def test_a_deletion_of_a_role_that_a_crash_interrupts_is_gone_on_with(self, idp, big_role, monkeypatch):
        """Nobody has the role any more, and nobody can be given it; what was issued ends when upkeep comes to it."""
        store, permission = idp.store, m.create_permission(idp, m.LOCAL, CreatePermission(name="p"))
        store.assign_permission(big_role.id, permission.id, 0)
        monkeypatch.setattr(store, "delete_slice", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.delete_role(idp, m.LOCAL, "big")
        assert store.find_role("big") is store.find_role(big_role.id) is store.find_role("deleted:" + big_role.id) is None
        assert "big" not in str(store.list_roles()) and store.list_roles_of("u1") == []
        assert store.list_roles_with(permission.id) == [] and store.list_permissions_of_user("u1") == []
        monkeypatch.undo()
        finish_deletions(idp, lambda seconds: None)
        assert all(store.find_account(f"u{number}").revoked_before for number in range(40))
        assert store.list_deletions() == [] and not store.exists("SELECT 1 FROM role_permission")

    PLANS = {
        "revoke_family": lambda store: store.revoke_family("s", 1),
        "revoke_account": lambda store: store.revoke_account("u", 1),
        "revoke_client": lambda store: store.revoke_client("c", 1),
        "delete_role": lambda store: store.delete_role("r", 1),
        "revoke_browser_session": lambda store: store.revoke_browser_session("b", 1),
        "revoke_jti": lambda store: store.revoke_jti("j", 1, 1),
        "rotate_refresh_token": lambda store: store.rotate_refresh_token("t", "c", 1),
        "find_unused_successor": lambda store: store.find_unused_successor("t", "c", 1, 1),
        "spend_code": lambda store: store.spend_code("c", "c", 1),
        "delete_codes": lambda store: store.delete_codes("u", "c"),
        "delete_consent": lambda store: store.delete_consent("u", "c"),
        "list_families_of": lambda store: store.list_families_of("u"),
        "keep_admin_session": lambda store: store.keep_admin_session("s", "u"),
        "delete_admin_session": lambda store: store.delete_admin_session("s"),
        "list_admin_sessions": lambda store: store.list_admin_sessions("u", 1, 1),
        "list_admin_logins": lambda store: store.list_admin_logins("u", "c", 1),
        "list_browser_sessions": lambda store: store.list_browser_sessions("u", 1),
        "is_family_revoked": lambda store: store.is_family_revoked("s"),
        "find_unrevoked_family": lambda store: store.find_unrevoked_family("s"),
        "sessions of a user": lambda store: store.list_sessions(user_id="u", limit=1),
        "refresh tokens of a user": lambda store: store.list_refresh_tokens(user_id="u", limit=1),
        "delete_account": lambda store: store.delete_account("u"),
        "delete_client": lambda store: store.delete_client("c"),
        "delete_scope": lambda store: store.delete_scope("s"),
    }

    @pytest.mark.parametrize("what", PLANS)
    def test_no_statement_that_revokes_spends_or_deletes_reads_a_whole_table(self, idp, what):
        """By the query plan, so that it holds however many rows there are."""
        store, statements = idp.store, set()
        store.add_account("u", "ann", "", 0, "x", 0)
        store.connection.set_trace_callback(statements.add)
        try:
            self.PLANS[what](store)
        finally:
            store.connection.set_trace_callback(None)
        plans = [
            step[3]
            for statement in statements if statement.lstrip()[:6].upper() in ("SELECT", "UPDATE", "DELETE", "INSERT")
            and statement != "SELECT id FROM session ORDER BY id DESC LIMIT 1"  # reads the last row
            for step in store.connection.execute("EXPLAIN QUERY PLAN " + statement)
        ]
        few = ("SCAN totp_qr_file", "SCAN CONSTANT ROW")  # files of QR codes are few
        read = [plan for plan in plans if plan.startswith("SCAN") and not plan.startswith((*few, "SCAN (subquery"))]
        assert plans and not read, read


class TestMarksOfWhatEnded:
    """What programs of the machine compare, instead of asking whether a token of theirs is still good."""

    @pytest.fixture
    def changed(self, idp, tmp_path):
        idp.store.generation.marks = ChangeMarks(str(tmp_path / "marks"), 1)

        def call(work):
            """Return which cells change: everything's, others'."""
            before = (tmp_path / "marks").read_bytes()
            work()
            after = (tmp_path / "marks").read_bytes()
            return before[24:32] != after[24:32], before[32:] != after[32:]

        return call

    def test_a_revoked_token_has_a_mark_of_its_own(self, idp, changed, machine):
        assert changed(lambda: idp.store.revoke_jti(machine["jti"], 9, 1)) == (False, True)

    def test_whatever_clients_may_changes_the_mark_of_everything(self, idp, changed, service):
        caller, client = m.LOCAL.acting_as("t"), m.get_client(idp, service[0])
        for work in (
            lambda: m.revoke_client(idp, caller, client.row, "client_revoked"),
            lambda: m.remove_scope(idp, caller, client, "api:read"), lambda: m.delete_client(idp, caller, service[0]),
        ):
            assert changed(work) == (True, False)

    def test_a_token_that_is_issued_changes_none(self, changed, auth, service, alice, log_in):
        assert changed(lambda: auth.post("/token", {"grant_type": "client_credentials"}, auth=service)) == (False, False)
        assert changed(lambda: log_in(alice)) == (False, False)
