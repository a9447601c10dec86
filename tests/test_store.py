"""The database: opening it, writing it, what stands in it."""

import os
import re
import shutil
import threading
import time

import json
import msgspec
import appliance.base.store as rows
import microauthd as m
import pytest
import sqlcipher3
from conftest import PASSWORD
from appliance.base import StartupError
from appliance.base.settings import Options
from appliance.base.database import Conflict, Generation, Unavailable, derive_key, read_database_key
from appliance.base.store import (
    Account, AuditRow, ClientRow, Family, MAD_ADMIN_ROLE_ID, MIGRATIONS, RefreshToken, Role, SEEDED_SCOPES, Scope,
    Secret, Session, Store, chain,
)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mad.db3"
    Store.make(path, derive_key("right phrase", os.urandom(16)), 1).close()
    return path


def open_it(path, passphrase="right phrase", unencrypted=False):
    store = Store(path, read_database_key(str(path), passphrase, unencrypted))
    try:
        store.open()
        return store.meta("created_at")
    finally:
        store.close()


class TestOpening:
    def spoil(self, path, case):
        if case == "truncated":
            os.truncate(path, 300)
        elif case == "zero length":
            os.truncate(path, 0)
        elif case == "garbage":
            path.write_bytes(os.urandom(50_000))
        elif case == "header":
            self.flip(path, 5)
        elif case == "middle page":
            self.flip(path, 4096 * 3 + 100)
        elif case == "newer":
            store = Store(path, read_database_key(str(path), "right phrase", False))
            store.connection.execute("PRAGMA user_version = 99")
            store.close()
        elif case == "not ours":
            path.unlink()
            connection = sqlcipher3.connect(str(path))
            connection.execute("CREATE TABLE x (y)")
            connection.close()

    def flip(self, path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(bytes(content))

    @pytest.mark.parametrize(
        "case, passphrase, unencrypted, word",
        [
            ("wrong", "wrong phrase", False, "db-pass is wrong"), ("missing", "", False, "no db-pass"),
            ("missing", "right phrase", True, "no db-pass"), ("truncated", "right phrase", False, "truncated"),
            ("zero length", "right phrase", False, "truncated"), ("garbage", "right phrase", False, "damaged"),
            ("header", "right phrase", False, "damaged"), ("middle page", "right phrase", False, ""),
            ("newer", "right phrase", False, "newer"), ("not ours", "", False, "not a microauthd database"),
            ("not ours", "right phrase", False, "not encrypted"),
        ],
    )
    def test_what_is_wrong_is_one_sentence_and_the_file_stays(
        self, tmp_path, encrypted, case, passphrase, unencrypted, word
    ):
        path = tmp_path / "mad.db3"
        shutil.copyfile(encrypted, path)
        self.spoil(path, case)
        before = path.read_bytes()
        with pytest.raises(StartupError) as caught:
            open_it(path, passphrase, unencrypted)
        assert word in str(caught.value) and "\n" not in str(caught.value)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["mad.db3"]

    def test_it_opens_with_its_passphrase(self, encrypted):
        assert open_it(encrypted) == "1"

    def test_the_tools_of_sqlcipher_open_it_with_the_passphrase(self, encrypted):
        connection = sqlcipher3.connect(str(encrypted))
        connection.execute("PRAGMA key = 'right phrase'")
        assert connection.execute("SELECT count(*) FROM scope").fetchone() == (5,)
        connection.close()

    def test_nothing_of_it_is_readable(self, encrypted):
        assert b"CREATE TABLE" not in encrypted.read_bytes() and not encrypted.read_bytes().startswith(b"SQLite")


    def test_a_path_may_hold_any_character(self, tmp_path):
        path = tmp_path / "a?b=c&d%41#e \xe4.db3"
        Store.make(path, "", 1).close()
        assert path.exists() and sorted(os.listdir(tmp_path)) == [path.name] and open_it(path, "") == "1"

    def test_a_database_is_never_made_over_another(self, encrypted):
        before = encrypted.read_bytes()
        with pytest.raises(FileExistsError):
            Store.make(encrypted, "", 1)
        assert encrypted.read_bytes() == before

    def test_it_is_its_owners_alone_whatever_the_umask(self, tmp_path):
        mask = os.umask(0)
        try:
            Store.make(tmp_path / "mad.db3", "", 1).close()
        finally:
            os.umask(mask)
        assert (tmp_path / "mad.db3").stat().st_mode & 0o777 == 0o600


class TestSchema:
    @pytest.mark.parametrize(
        "record, table",
        [
            (Account, "account"), (Role, "role"), (Scope, "scope"), (ClientRow, "client"),
            (Secret, "client_secret"), (Session, "session"), (Family, "family"),
            (RefreshToken, "refresh_token"), (AuditRow, "audit"),
        ],
    )
    def test_a_record_has_the_columns_of_its_table_in_order(self, idp, record, table):
        columns = [row[1] for row in idp.store.connection.execute(f"PRAGMA table_info({table})")]
        assert list(record.__struct_fields__) == columns

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

    def test_a_step_that_fails_leaves_nothing(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.store.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE new_one (x TEXT) STRICT;\n CREATE TABLE account (x TEXT);\n")
        )
        with pytest.raises((Unavailable, Conflict)):
            idp.store.migrate()
        assert idp.store.connection.execute("PRAGMA user_version").fetchone() == (len(rows.MIGRATIONS) - 1,)
        assert not idp.store.connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'new_one'").fetchone()


class TestWriting:
    def test_two_durabilities(self, idp, machine):
        idp.store.flush()
        assert idp.store.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert idp.store.batch_connection.execute("PRAGMA synchronous").fetchone() == (1,)

    def test_every_thread_is_durable(self, idp):
        found = []
        thread = threading.Thread(
            target=lambda: found.append(idp.store.connection.execute("PRAGMA synchronous").fetchone())
        )
        thread.start()
        thread.join()
        assert found == [(2,)]

    def test_an_inner_transaction_joins_the_outer(self, idp):
        with pytest.raises(ZeroDivisionError), idp.store.transaction():
            with idp.store.transaction(identity=True):
                idp.store.put_meta("inner", 1)
            1 / 0
        assert idp.store.meta("inner") == ""

    def test_a_conflict_is_one_at_its_statement_in_a_joined_transaction_too(self, idp):
        with idp.store.transaction():
            with pytest.raises(Conflict):
                idp.store.run("UPDATE role SET name = NULL")
        assert m.get_role(idp, MAD_ADMIN_ROLE_ID).name

    def test_only_a_change_of_identity_bumps_the_generation_and_only_when_committed(self, idp):
        before = idp.store.generation.read()
        idp.store.put_meta("x", 1)
        with pytest.raises(ZeroDivisionError), idp.store.transaction(identity=True):
            1 / 0
        assert idp.store.generation.read() == before
        with idp.store.transaction():
            with idp.store.transaction(identity=True):
                pass
            assert idp.store.generation.read() == before, "not before the commit"
        assert idp.store.generation.read() != before

    def test_threads_write_one_after_the_other(self, idp):
        idp.store.put_meta("count", 0)

        def add():
            for _ in range(20):
                with idp.store.transaction():
                    idp.store.put_meta("count", int(idp.store.meta("count")) + 1)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert idp.store.meta("count") == "80"

    def test_a_transaction_is_all_or_nothing(self, idp):
        with pytest.raises(ZeroDivisionError), idp.store.transaction():
            idp.store.put_meta("half", 1)
            m.audit(idp, m.LOCAL, "test", "half")
            1 / 0
        assert idp.store.meta("half") == "" and "half" not in {row.action for row in idp.store.list_audit()}

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

    def test_a_durable_write_that_fails_says_so(self, idp, auth, service, machine):
        idp.store.connection.execute("PRAGMA query_only = ON")
        answer = auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        idp.store.connection.execute("PRAGMA query_only = OFF")
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable")
        assert auth.post("/introspect", {"token": machine["access_token"]}, auth=service).json["active"] is True

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

    def test_without_memory_the_answer_is_503_and_a_line_of_the_log_is_left_out(
        self, idp, auth, service, machine, monkeypatch
    ):
        def fail(*_, **__):
            raise MemoryError

        monkeypatch.setattr(idp.store, "is_revoked", fail)
        answer = auth.post("/introspect", {"token": machine["access_token"]}, auth=service)
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable") and answer.headers[
            "retry-after"
        ]
        monkeypatch.setattr(json, "dumps", fail)
        monkeypatch.setattr("appliance.base.log.escape", fail)
        idp.log("refused", reason="two words")

    def test_connections_of_a_failure_and_of_before_are_not_used_again(self, idp):
        store = idp.store
        first = store.connection
        first.execute("PRAGMA query_only = ON")
        with pytest.raises(Unavailable):
            store.put_meta("x", 1)
        second = store.connection
        assert second is not first and first not in store.connections
        store.put_meta("x", 1)
        assert store.connection is not second and second not in store.connections, (
            "it may have been opened while the disk was read-only"
        )
        third = store.connection
        store.put_meta("x", 2)
        assert store.connection is third

    def test_one_waits_for_a_lock_of_others_and_the_rest_ask(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.database.LOCK_SECONDS", 0.3)
        store, other = Store(idp.store.path, idp.store.key), sqlcipher3.connect(idp.store.path, isolation_level=None)
        other.execute(f"PRAGMA key = \"x'{idp.store.key}'\"")
        other.execute("BEGIN IMMEDIATE")
        times = []
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                store.put_meta("x", 1)
            times.append(time.monotonic() - began)
        assert times[0] > 0.25 and max(times[1:]) < 0.2, times
        other.execute("ROLLBACK")
        other.close()
        store.put_meta("x", 1)
        assert not store.generation.map[store.generation.LOCKED] and store.connection.execute(
            "PRAGMA busy_timeout"
        ).fetchone() == (300,)
        store.close()

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
            append(*words)

        monkeypatch.setattr(store, "append_audit", fail_once)
        store.start_flusher()
        store.enqueue((m.new_jti(5), "service", "", 1, 2), ("service", "192.0.2.1", "", ""))
        store.wake.set()
        deadline = time.monotonic() + 5
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

    def test_a_change_is_seen_by_the_other_process(self, idp, make_idp, service):
        other = make_idp(idp.options)
        other.store.generation = idp.store.generation
        assert m.find_client(other, "service").scopes == {"api:read", "api:write"}
        m.assign_scopes(idp, m.LOCAL, "test", m.get_client(idp, "service"), ["api:secret"])
        assert "api:secret" in m.find_client(other, "service").scopes

    def test_generations_of_processes_do_not_lose_each_other(self):
        generation = Generation()
        before = generation.read()
        children = []
        for slot in (1, 2, 3):
            pid = os.fork()
            if pid == 0:
                generation.slot = slot
                for _ in range(1000):
                    generation.bump()
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        after = generation.read()
        assert (
            after != before
            and [int.from_bytes(after[8 * slot : 8 * slot + 8], "little") for slot in (1, 2, 3)] == [1000] * 3
        )


class TestSecrecy:
    def test_no_secret_stands_in_any_table(
        self, idp, auth, admin, service, alice, log_in, machine, give_totp, admin_token
    ):
        answer = log_in(alice, scope="openid")
        seed = give_totp(idp, alice.account)
        changed = m.change_secret(idp, m.LOCAL, "test", m.ChangeSecret("service", overlap_seconds=60))
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
        m.audit(idp, m.LOCAL, "test", "last")
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
                m.audit(one, m.LOCAL, "test", "parallel")

        threads = [threading.Thread(target=write, args=(one,)) for one in (idp, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.broken_at(self.rows(idp)) is None and len(self.rows(idp)) >= 40

    def test_it_is_written_only_when_wanted(self, make_idp):
        from conftest import CHEAP

        idp = make_idp(Options(**CHEAP, enable_audit_logging=False))
        m.create_user(idp, m.LOCAL, "test", m.CreateUser("bob", "bob@example.org", PASSWORD))
        assert self.rows(idp) == []


class TestConnections:
    def test_a_thread_that_ends_gives_its_connection_back(self, idp):
        import threading

        from appliance.base.database import SPARE_CONNECTIONS

        idp.store.meta("created_at")
        before = len(idp.store.connections)
        for _ in range(5):
            gate = threading.Barrier(20)

            def read(gate=gate):
                gate.wait()
                assert idp.store.meta("created_at")
                gate.wait()

            threads = [threading.Thread(target=read) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(idp.store.connections) <= before + SPARE_CONNECTIONS
