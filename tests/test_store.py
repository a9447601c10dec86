"""The database: opening it, writing it, what stands in it."""

import os
import re
import shutil

import microauthd as m
import pytest
import pyotp
import sqlcipher3
from conftest import PASSWORD


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mad.db3"
    m.Store.make(path, m.derive_key("right phrase", os.urandom(16)), 1).close()
    return path


def open_it(path, passphrase="right phrase", unencrypted=False):
    store = m.Store(path, m.read_database_key(str(path), passphrase, unencrypted))
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
            store = m.Store(path, m.read_database_key(str(path), "right phrase", False))
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

    @pytest.mark.parametrize("case, passphrase, unencrypted, word", [
        ("wrong", "wrong phrase", False, "db-pass is wrong"), ("missing", "", False, "no db-pass"), ("missing", "right phrase", True, "no db-pass"),
        ("truncated", "right phrase", False, "truncated"), ("zero length", "right phrase", False, "truncated"), ("garbage", "right phrase", False, "damaged"),
        ("header", "right phrase", False, "damaged"), ("middle page", "right phrase", False, ""), ("newer", "right phrase", False, "newer"), ("not ours", "", False, "not a microauthd database"),
        ("not ours", "right phrase", False, "not encrypted"),
    ])
    def test_what_is_wrong_is_one_sentence_and_the_file_stays(self, tmp_path, encrypted, case, passphrase, unencrypted, word):
        path = tmp_path / "mad.db3"
        shutil.copyfile(encrypted, path)
        self.spoil(path, case)
        before = path.read_bytes()
        with pytest.raises(m.Refusal) as caught:
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


class TestSchema:
    @pytest.mark.parametrize("record, table", [
        (m.Account, "account"), (m.Role, "role"), (m.Scope, "scope"), (m.ClientRow, "client"), (m.Secret, "client_secret"), (m.Session, "session"),
        (m.Family, "family"), (m.RefreshToken, "refresh_token"), (m.AuditRow, "audit"),
    ])
    def test_a_record_has_the_columns_of_its_table_in_order(self, idp, record, table):
        columns = [row[1] for row in idp.store.connection.execute(f"PRAGMA table_info({table})")]
        assert list(record.__struct_fields__) == columns

    def test_every_table_is_strict(self, idp):
        for name, strict in idp.store.connection.execute("SELECT name, strict FROM pragma_table_list WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
            assert strict, name

    def test_a_step_that_fails_leaves_nothing(self, idp, monkeypatch):
        monkeypatch.setattr(m, "MIGRATIONS", (*m.MIGRATIONS, "CREATE TABLE new_one (x TEXT) STRICT;\n CREATE TABLE account (x TEXT);\n"))
        with pytest.raises((m.Problem, m.Conflict)):
            idp.store.migrate()
        assert idp.store.connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert not idp.store.connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'new_one'").fetchone()


class TestWriting:
    def test_two_durabilities(self, idp, machine):
        idp.store.flush()
        assert idp.store.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert idp.store.batch_connection.execute("PRAGMA synchronous").fetchone() == (1,)

    def test_a_transaction_is_all_or_nothing(self, idp):
        with pytest.raises(ZeroDivisionError), idp.store.transaction():
            idp.store.put_meta("half", 1)
            m.audit(idp, m.LOCAL, "test", "half")
            1 / 0
        assert idp.store.meta("half") == "" and "half" not in {row.action for row in idp.store.list_audit()}

    def test_a_batch_writes_its_sessions_and_one_row_a_client_and_peer(self, idp, auth, service):
        idp.store.flush()
        before = len(idp.store.list_audit(limit=1000))
        answers = [auth.post("/token", {"grant_type": "client_credentials"}, auth=service, peer=peer).json for peer in ("192.0.2.1", "192.0.2.1", "192.0.2.2")]
        idp.store.flush()
        assert all(idp.store.find_session(answer["jti"]) for answer in answers)
        rows = idp.store.list_audit(limit=1000)[: len(idp.store.list_audit(limit=1000)) - before]
        assert sorted((row.ip_address, row.secondary.partition(" ")[0]) for row in rows) == [("192.0.2.1", "count=2"), ("192.0.2.2", f"jti={answers[2]['jti']}")]

    def test_what_cannot_be_recorded_is_not_issued(self, idp, auth, service, machine):
        store = idp.store
        store.flush()
        store.batch_connection.execute("PRAGMA query_only = ON")
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        store.flush()
        refused = auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        assert (refused.status, refused.json["error"]) == (503, "temporarily_unavailable") and refused.headers["retry-after"]
        assert auth.get("/jwks.json").status == 200 and auth.get("/me", bearer=machine["access_token"]).status == 200
        assert auth.get("/health/ready").status == 503
        store.batch_connection.execute("PRAGMA query_only = OFF")
        store.flush()
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 200
        assert len(store.queue) == 1

    def test_closing_writes_all_that_waits(self, make_idp, idp, service):
        for number in range(12_000):
            idp.store.queue.append(((f"{number:032x}", "service", "", 1, 2), None))
        idp.store.close()
        again = make_idp(idp.options)
        assert again.store.connection.execute("SELECT count(*) FROM session").fetchone() == (12_000,)

    def test_no_error_loses_a_batch(self, idp, auth, service, machine, monkeypatch):
        monkeypatch.setattr(m, "batch_audit", lambda batch: 1 / 0)
        auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        waiting = len(idp.store.queue)
        idp.store.flush()
        assert len(idp.store.queue) == waiting and not idp.store.writable

    def test_a_durable_write_that_fails_says_so(self, idp, auth, service, machine):
        idp.store.connection.execute("PRAGMA query_only = ON")
        answer = auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        idp.store.connection.execute("PRAGMA query_only = OFF")
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable")
        assert auth.post("/introspect", {"token": machine["access_token"]}, auth=service).json["active"] is True

    def test_a_change_is_seen_by_the_other_process(self, idp, make_idp, service):
        other = make_idp(idp.options)
        other.store.generation = idp.store.generation
        assert m.find_client(other, "service").scopes == {"api:read", "api:write"}
        m.assign_scopes(idp, m.LOCAL, "test", m.get_client(idp, "service"), ["api:secret"])
        assert "api:secret" in m.find_client(other, "service").scopes

    def test_generations_of_processes_do_not_lose_each_other(self):
        generation = m.Generation()
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
        assert after != before and [int.from_bytes(after[8 * slot : 8 * slot + 8], "little") for slot in (1, 2, 3)] == [1000] * 3


class TestSecrecy:
    def test_no_secret_stands_in_any_table(self, idp, auth, service, alice, log_in, machine):
        seed = m.new_totp_seed()
        answer = log_in(alice)
        m.enable_totp(idp, alice.account, seed, pyotp.TOTP(seed).at(idp.now()))
        idp.store.flush()
        dump = []
        for (table,) in idp.store.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
            dump += [str(row) for row in idp.store.connection.execute(f"SELECT * FROM {table}").fetchall()]
        dump = "\n".join(dump)
        for secret in (PASSWORD, service[1], seed, answer["access_token"], answer["refresh_token"], machine["access_token"]):
            assert secret not in dump
        assert not re.search(r"eyJ[A-Za-z0-9_-]+\.", dump)


class TestPurge:
    def test_what_is_over_goes_and_the_rest_stays(self, idp, auth, service, machine, log_in, alice, clock):
        answer = log_in(alice)
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        idp.store.flush()
        m.purge(idp, lambda seconds: None)
        assert idp.store.find_session(answer["jti"]) and idp.store.is_revoked(machine["jti"])
        clock.pass_(3600 + 8 * 86400)
        m.purge(idp, lambda seconds: None)
        assert idp.store.find_session(answer["jti"]) is None and not idp.store.is_revoked(machine["jti"])
        assert idp.store.find_session(machine["jti"]) is None
        clock.pass_(40 * 86400)
        m.purge(idp, lambda seconds: None)
        assert idp.store.list_refresh_tokens_of(alice.id) == []

    def test_a_clock_that_cannot_be_right_purges_nothing(self, idp, machine, clock):
        idp.store.flush()
        before = idp.store.list_audit(limit=1000)
        clock.now = 86400.0
        m.purge(idp, lambda seconds: None)
        assert idp.store.list_audit(limit=1000) == before and "clock.behind" in idp.stream.getvalue()
