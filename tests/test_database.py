"""The engine under the store: opening a file, connections, transactions, durability, generations."""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import threading
import time

import microauthd as m
import pytest
import sqlcipher3
from appliance.base import StartupError
from appliance.base.database import Conflict, Generation, SQLITE_IOERR, Unavailable, derive_key, read_database_key
from appliance.base.store import MAD_ADMIN_ROLE_ID, Store


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

    def test_who_knows_that_it_is_unencrypted_opens_it_whatever_passphrase_is_set(self, tmp_path):
        path = tmp_path / "plain.db3"
        Store.make(str(path), "", 0).close()
        path.chmod(0o600)
        assert read_database_key(str(path), "", False) == read_database_key(str(path), "a phrase", True) == ""
        with pytest.raises(StartupError, match="is not encrypted, but db-pass is set"):
            read_database_key(str(path), "a phrase", False)

    def test_the_tools_of_sqlcipher_open_it_with_the_passphrase(self, encrypted):
        connection = sqlcipher3.connect(str(encrypted))
        connection.execute("PRAGMA key = 'right phrase'")
        assert connection.execute("SELECT count(*) FROM scope").fetchone() == (6,)
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
            m.audit(idp, m.LOCAL.acting_as("test"), "half")
            1 / 0
        assert idp.store.meta("half") == "" and "half" not in {row.action for row in idp.store.list_audit()}

    def test_a_durable_write_that_fails_says_so(self, idp, auth, service, machine):
        idp.store.connection.execute("PRAGMA query_only = ON")
        answer = auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        idp.store.connection.execute("PRAGMA query_only = OFF")
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable")
        assert auth.post("/introspect", {"token": machine["access_token"]}, auth=service).json["active"] is True

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
        connect, said = store.connect, []

        def traced(*words, **more):
            connection = connect(*words, **more)
            connection.set_trace_callback(said.append)
            return connection

        monkeypatch.setattr(store, "connect", traced)
        for waits in ([], ["PRAGMA busy_timeout = 50", "PRAGMA busy_timeout = 300"]):
            said.clear()
            with pytest.raises(Unavailable):
                store.put_meta("x", 1)
            assert [line for line in said if "busy_timeout" in line] == waits and "BEGIN IMMEDIATE" in said
        other.execute("ROLLBACK")
        other.close()
        store.put_meta("x", 1)
        assert not store.generation.locked and store.connection.execute(
            "PRAGMA busy_timeout"
        ).fetchone() == (300,)
        store.close()

    def test_a_change_is_seen_by_the_other_process(self, idp, make_idp, service):
        other = make_idp(idp.options)
        other.store.generation = idp.store.generation
        assert m.find_client(other, "service").scopes == {"api:read", "api:write"}
        m.assign_scopes(idp, m.LOCAL.acting_as("test"), m.get_client(idp, "service"), ["api:secret"])
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

    def test_after_a_failed_sync_nothing_is_acknowledged_while_a_reader_keeps_the_log(self, idp, monkeypatch):
        monkeypatch.setattr("appliance.base.database.LOCK_SECONDS", 0.2)
        store = Store(idp.store.path, idp.store.key)
        store.put_meta("x", 1)
        reader = idp.store.connection
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM meta").fetchone()
        store.put_meta("x", 2)
        store.generation.unsynced = 1
        with pytest.raises(Unavailable):
            store.put_meta("x", 3)
        assert store.generation.unsynced == 1
        reader.execute("ROLLBACK")
        store.put_meta("x", 4)
        assert not store.generation.unsynced and store.meta("x") == "4"
        store.close()

    def test_where_nobody_is_left_to_serve_a_writer_does_not_wait(self, idp):
        store, entered = idp.store, []

        @contextlib.contextmanager
        def last():
            yield False

        store.blocking = last
        store.write_lock.acquire()
        try:

            def write():
                try:
                    store.put_meta("x", 1)
                except Unavailable as problem:
                    entered.append(problem.log)

            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            thread.join(30)
        finally:
            store.write_lock.release()
        assert entered == ["too many wait to write"]

    def test_writers_of_all_processes_wait_for_their_turn(self, idp):
        idp.store.open_process_write_lock()
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            fcntl.lockf(os.open(idp.store.path + ".lock", os.O_RDWR), fcntl.LOCK_EX)
            os.write(writing, b"x")
            time.sleep(0.3)
            os.write(writing, b"y")
            os._exit(0)
        assert os.read(reading, 1) == b"x"
        idp.store.put_meta("x", 1)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b"y", "the other was done first"
        os.waitpid(pid, 0)


class DiskError(sqlcipher3.OperationalError):
    """What SQLite raises when a sync fails."""

    sqlite_errorcode = SQLITE_IOERR


class TestGroups:
    """Group commit: transactions of several threads share one COMMIT."""

    @pytest.fixture
    def store(self, idp, monkeypatch):
        """A store of which `said` has every statement, and whose groups end only when nobody waits."""
        monkeypatch.setattr("appliance.base.database.GROUP_SECONDS", 60)
        monkeypatch.setattr("appliance.base.database.SLOW_SECONDS", 60)
        store, said = Store(idp.store.path, idp.store.key), []
        connect = store.connect

        def traced(*args, **more):
            connection = connect(*args, **more)
            connection.set_trace_callback(said.append)
            return connection

        monkeypatch.setattr(store, "connect", traced)
        store.said = said
        store.put_meta("first", 1)
        said.clear()
        yield store
        store.close()

    def at_once(self, store, blocks):
        """Run each block in a thread and a transaction of its own, all waiting before the first begins.

        Return what each raised, or None.
        """
        raised = [None] * len(blocks)

        def work(number, block):
            try:
                with store.transaction():
                    block()
            except BaseException as error:
                raised[number] = error

        threads = [threading.Thread(target=work, args=one, daemon=True) for one in enumerate(blocks)]
        with store.write_lock:
            for thread in threads:
                thread.start()
            while len(store.waiters) < len(blocks):
                time.sleep(0.001)
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads) and store.group is None and not store.waiters
        return raised

    def writers(self, store, count):
        return [functools.partial(store.put_meta, f"name{number}", number) for number in range(count)]

    def written(self, idp):
        """The values that another connection sees."""
        return sorted(int(value) for value in idp.store.values("SELECT value FROM meta WHERE name LIKE 'name%'"))

    def test_fifty_that_wait_share_one_commit(self, idp, store):
        assert self.at_once(store, self.writers(store, 50)) == [None] * 50
        assert store.said.count("COMMIT") == store.said.count("BEGIN IMMEDIATE") == 1
        assert self.written(idp) == list(range(50))

    def test_who_writes_alone_commits_at_once(self, idp, store):
        store.blocking = None  # it is called by who waits
        store.put_meta("name", 1)
        said = [line for line in store.said if not line.startswith("PRAGMA wal_checkpoint(NOOP)")]  # the mark of the log
        assert [line.split()[0] for line in said] == ["BEGIN", "INSERT", "COMMIT"]

    @pytest.mark.parametrize(
        "error", [m.Problem("invalid_grant"), Conflict("twice"), MemoryError(), KeyboardInterrupt(), ZeroDivisionError()],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("place", [0, 1, 25, 49])
    def test_one_that_fails_takes_none_along_and_tells_its_caller_alone(self, idp, store, error, place):
        def fail():
            store.put_meta("name99", 99)
            raise error

        blocks = self.writers(store, 49)
        blocks.insert(place, fail)
        raised = self.at_once(store, blocks)
        assert raised.pop(place) is error and raised == [None] * 49
        assert self.written(idp) == list(range(49)) and store.said.count("COMMIT") <= 2
        store.put_meta("name50", 50)
        assert 50 in self.written(idp)

    def test_a_statement_that_conflicts_leaves_its_block_and_the_others_as_they_are(self, idp, store):
        def conflict():
            with pytest.raises(Conflict):
                store.run("UPDATE role SET name = NULL")
            store.put_meta("name99", 99)

        assert self.at_once(store, [*self.writers(store, 5), conflict, lambda: store.run("UPDATE role SET name = NULL")])[
            :6
        ] == [None] * 6
        assert self.written(idp) == [0, 1, 2, 3, 4, 99]

    def test_functions_that_run_together_share_one_commit_and_are_told_when_it_is_on_the_disk(self, idp, store):
        works = [*self.writers(store, 50), lambda: early.append(self.written(idp))]
        early = []
        assert store.run_together(works) == [None] * 51
        assert early == [[]] and self.written(idp) == list(range(50))
        assert store.said.count("COMMIT") == store.said.count("BEGIN IMMEDIATE") == 1
        assert store.group is None and not store.in_transaction

    @pytest.mark.parametrize("place", [0, 1, 4])
    def test_one_that_fails_among_those_that_run_together_hears_it_at_once_and_takes_none_along(self, idp, store, place):
        def fail():
            with pytest.raises(ZeroDivisionError), store.transaction():
                store.put_meta("name99", 99)
                raise ZeroDivisionError

        works = self.writers(store, 4)
        works.insert(place, fail)
        assert store.run_together(works) == [None] * 5
        assert self.written(idp) == [0, 1, 2, 3]

    def test_of_those_that_run_together_only_the_first_waits_for_a_lock_and_who_comes_after_it_is_stored(self, idp, store):
        def write(number):
            if number == 3:
                other.execute("ROLLBACK")
            try:
                store.put_meta(f"name{number}", number)
            except Unavailable:
                refused.append(number)

        refused, other = [], idp.store.connect()
        store.connection.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN IMMEDIATE")
        assert store.run_together([functools.partial(write, number) for number in range(5)]) == [None] * 5
        assert refused == [0, 1, 2] and self.written(idp) == [3, 4]
        waits = [line for line in store.said if "busy_timeout" in line]
        assert waits[1::2] == ["PRAGMA busy_timeout = 0"] * 3 and waits[2::2] == ["PRAGMA busy_timeout = 5000"] * 3
        other.execute("BEGIN IMMEDIATE")
        store.said.clear()
        store.generation.locked = 1
        for number in (5, 6):  # alone again
            write(number)
        assert refused[3:] == [5, 6] and store.said.count("PRAGMA busy_timeout = 50") == 2
        other.execute("ROLLBACK")

    def test_threads_join_the_group_of_functions_that_run_together(self, idp, store):
        def join():
            thread = threading.Thread(target=store.put_meta, args=("name9", 9), daemon=True)
            thread.start()
            thread.join(30)
            assert self.written(idp) == [0, 9]

        works = [*self.writers(store, 1), join, functools.partial(store.put_meta, "name10", 10)]
        assert store.run_together(works) == [None] * 3
        assert self.written(idp) == [0, 9, 10] and store.said.count("BEGIN IMMEDIATE") == 2

    def test_if_the_sync_fails_all_that_wrote_or_were_refused_together_are_told(self, idp, store, monkeypatch):
        def refuse():
            with pytest.raises(m.Problem), store.transaction():
                raise m.Problem("invalid_grant")  # for what another has written, which will not be in force

        self.fail_to_commit(store, monkeypatch)
        outcomes = store.run_together([*self.writers(store, 3), refuse, lambda: None])
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4 + [type(None)]
        monkeypatch.undo()
        assert self.written(idp) == []

    def test_those_that_run_together_take_no_connection_that_another_thread_still_has(self, store, monkeypatch):
        monkeypatch.setattr("appliance.base.database.GROUP_MAX", 2)
        began, mine, theirs = threading.Event(), [], []

        def begin():
            with store.transaction():
                store.put_meta("name1", 1)
                began.set()
                while not store.waiters:
                    time.sleep(0.001)
            mine.append(store.connection)

        def run():
            store.run_together(self.writers(store, 1))
            theirs.append(store.connection)
            done.wait(30)

        done = threading.Event()
        threads = [threading.Thread(target=target, daemon=True) for target in (begin, run)]
        threads[0].start()
        assert began.wait(30)
        threads[1].start()
        threads[0].join(30)
        done.set()
        threads[1].join(30)
        assert len(mine) == len(theirs) == 1 and mine[0] is not theirs[0]

    def test_what_those_that_run_together_have_raised_keeps_no_connection(self, store):
        raised = []

        def refuse():
            with store.transaction():
                raise m.Problem("invalid_grant")

        def work():
            try:
                refuse()
            except m.Problem as problem:
                raised.append(problem)

        for _ in range(20):
            store.run_together([*self.writers(store, 1), work])
        assert len(raised) == 20 and len(store.connections) <= 3

    def test_those_that_run_together_do_not_wait_for_a_thread_that_waits_for_others(self, idp, store, monkeypatch):
        went, go, ended = threading.Event(), threading.Event(), []

        @contextlib.contextmanager
        def blocking():
            go.set()
            yield

        def join():
            with store.transaction():
                store.put_meta("name9", 9)
                went.set()
                go.wait(30)

        def begin():
            thread.start()
            assert went.wait(30)

        thread = threading.Thread(target=join, daemon=True)
        works = [*self.writers(store, 1), begin]
        runner = threading.Thread(target=lambda: ended.append(store.run_together(works)), daemon=True)
        monkeypatch.setattr(store, "blocking", blocking)
        monkeypatch.setattr(store, "expecting", lambda: True)
        runner.start()
        for each in (runner, thread):
            each.join(60)
        assert ended == [[None] * 2] and self.written(idp) == [0, 9]

    @pytest.mark.parametrize("where", ["join", "finish_group"])
    def test_no_group_is_left_open_if_there_is_no_memory_in_those_that_run_together(
        self, idp, store, monkeypatch, where
    ):
        """An open one keeps the turn to write from all other processes."""
        original, failed = getattr(store, where), []

        def fail(group, *more):
            if not failed:
                failed.append(group)
                raise MemoryError
            return original(group, *more)

        def write(number):
            with contextlib.suppress(MemoryError):
                store.put_meta(f"name{number}", number)

        def end():
            with store.writing():
                pass

        monkeypatch.setattr(store, where, fail)
        works = [functools.partial(write, 0), end, functools.partial(write, 1)]
        assert store.run_together(works[2:] if where == "join" else works)[-1] is None
        assert failed and store.group is None and self.written(idp)[-1] == 1

    def fail_to_commit(self, store, monkeypatch):
        def fail(connection):
            store.generation.unsynced = 1
            raise DiskError("disk I/O error")

        monkeypatch.setattr(store, "end", fail)

    def test_if_the_sync_fails_all_hear_it_and_nothing_is_in_force(self, idp, store, monkeypatch):
        before = store.connection
        with monkeypatch.context() as patch:
            self.fail_to_commit(store, patch)
            raised = self.at_once(store, self.writers(store, 20))
        assert [type(error) for error in raised] == [Unavailable] * 20 and len({id(error) for error in raised}) == 20
        assert {error.log for error in raised} == {"database: disk I/O error"} and store.generation.failed
        assert self.written(idp) == []
        assert self.at_once(store, self.writers(store, 20)) == [None] * 20 and self.written(idp) == list(range(20))
        assert not store.generation.failed and store.connection is not before

    def test_the_connection_of_a_group_that_failed_is_not_used_again(self, store, monkeypatch):
        used = []

        def fail(connection):
            used.append(connection)
            raise DiskError("disk I/O error")

        monkeypatch.setattr(store, "end", fail)
        for _ in range(2):
            with pytest.raises(Unavailable):
                store.put_meta("name1", 1)
        assert used[0] is not used[1] and used[0] not in store.connections

    def test_who_was_refused_by_what_is_not_in_force_hears_that_it_failed(self, idp, store, monkeypatch):
        """Its refusal may rest on what another has written: a token that is spent after all is not."""
        self.fail_to_commit(store, monkeypatch)

        def spend():
            if store.meta("name0"):
                raise m.Problem("invalid_grant")
            store.put_meta("name0", 1)

        assert [type(error) for error in self.at_once(store, [spend] * 5)] == [Unavailable] * 5

    def test_if_sqlite_undoes_the_whole_transaction_all_hear_it(self, idp, store, monkeypatch):
        monkeypatch.setattr("appliance.base.database.GATHER_SECONDS", 60)
        store.expecting, raised = lambda: True, []

        def write(number):
            try:
                store.put_meta(f"name{number}", number)
            except Unavailable as problem:
                raised.append(problem)

        threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(5)]
        for thread in threads:
            thread.start()
        while store.group is None or store.group.size < 5:
            time.sleep(0.001)
        with pytest.raises(Unavailable), store.transaction():
            store.put_meta("name98", 98)
            store.connection.execute("ROLLBACK")  # as SQLITE_FULL may do
            assert store.meta("name98") == ""
            with pytest.raises(Unavailable):
                store.value("SELECT * FROM nothing")
            with pytest.raises(Unavailable):
                store.put_meta("name99", 99)  # it would be a transaction of its own
        for thread in threads:
            thread.join(30)
        assert len(raised) == 5 and store.group is None and self.written(idp) == []
        store.expecting = lambda: False
        store.put_meta("name1", 1)
        assert self.written(idp) == [1]

    def test_a_group_that_nobody_joins_is_committed(self, store):
        store.expecting = lambda: True
        thread = threading.Thread(target=store.put_meta, args=("name", 1), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive() and store.said.count("COMMIT") == 1 and store.group is None

    def test_whatever_ends_the_wait_the_group_is_committed(self, idp, store):
        @contextlib.contextmanager
        def blocking():
            raise MemoryError
            yield

        store.expecting, store.blocking = lambda: True, blocking
        with pytest.raises(MemoryError):
            store.put_meta("name1", 1)
        assert store.group is None and store.said.count("COMMIT") == 1 and self.written(idp) == [1]

    @pytest.mark.parametrize("name, value, most", [("GROUP_MAX", 5, 5), ("GROUP_SECONDS", -1, 1)])
    def test_a_group_has_bounds(self, idp, store, monkeypatch, name, value, most):
        monkeypatch.setattr(f"appliance.base.database.{name}", value)
        assert self.at_once(store, self.writers(store, 20)) == [None] * 20
        assert store.said.count("COMMIT") >= 20 / most and self.written(idp) == list(range(20))

    def test_nothing_is_seen_before_the_commit(self, idp, store, monkeypatch):
        seen, end = [], store.end

        def look(connection):
            seen.append(self.written(idp))
            end(connection)

        monkeypatch.setattr(store, "end", look)
        self.at_once(store, self.writers(store, 10))
        assert seen == [[]] and self.written(idp) == list(range(10))

    def test_each_sees_what_those_before_it_in_the_group_have_done(self, idp, store):
        store.put_meta("count", 0)

        def add():
            store.put_meta("count", int(store.meta("count")) + 1)

        assert self.at_once(store, [add] * 32) == [None] * 32 and idp.store.meta("count") == "32"

    def test_a_thread_reads_its_own_connection_after_its_block(self, idp, store):
        def write():
            store.put_meta("name1", 1)
            assert store.in_transaction and store.connection is store.group.connection

        assert self.at_once(store, [write] * 4) == [None] * 4
        assert not store.in_transaction and store.meta("name1") == "1"

    def test_a_change_of_identity_is_told_after_the_commit_and_before_anybody_returns(self, idp, store, monkeypatch):
        before, end, seen = store.generation.read(), store.end, []

        def look(connection):
            seen.append(store.generation.read())
            end(connection)

        def change():
            with store.transaction(identity=True):
                store.put_meta("name1", 1)

        monkeypatch.setattr(store, "end", look)
        assert self.at_once(store, [*self.writers(store, 3), change]) == [None] * 4
        assert seen == [before] and store.generation.read() != before

    def test_what_a_block_reads_is_not_cached(self, idp, service):
        client = m.find_client(idp, "service")
        with pytest.raises(ZeroDivisionError), idp.store.transaction():
            m.assign_scopes(idp, m.LOCAL.acting_as("test"), m.get_client(idp, "service"), ["api:secret"])
            assert "api:secret" in m.find_client(idp, "service").scopes
            1 / 0
        assert m.find_client(idp, "service").scopes == client.scopes

    def test_the_audit_chain_is_whole_after_groups_of_which_some_fail(self, idp):
        def change(number):
            m.audit(idp, m.LOCAL.acting_as("test"), "changed", str(number))
            if number % 3 == 0:
                raise m.Problem("invalid_grant")

        self.at_once(idp.store, [functools.partial(change, number) for number in range(30)])
        rows = [row.target for row in idp.store.list_audit(action="changed")]
        assert sorted(map(int, rows)) == [number for number in range(30) if number % 3]
        assert idp.store.verify_audit()["valid"]

    def test_a_batch_of_machine_tokens_ends_the_group_that_is_open(self, idp, store, monkeypatch):
        monkeypatch.setattr("appliance.base.database.GATHER_SECONDS", 60)
        store.expecting = lambda: True
        thread = threading.Thread(target=store.put_meta, args=("name1", 1), daemon=True)
        thread.start()
        while store.group is None or not store.group.size:
            time.sleep(0.001)
        store.enqueue(("0" * 32, "service", "", 1, 2), None)
        store.flush()
        thread.join(60)
        assert self.written(idp) == [1] and idp.store.value("SELECT count(*) FROM session") == 1 and store.writable

    def test_a_process_that_waits_for_its_turn_is_next(self, idp):
        """The turn is octet 0 of the lock file; nobody passes the one that holds octet 1."""
        idp.store.open_process_write_lock()
        (held, hold), (asked, ask) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            lock = os.open(idp.store.path + ".lock", os.O_RDWR)
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
            os.write(hold, b"x")
            os.read(asked, 1)
            end = time.monotonic() + 10
            try:
                while time.monotonic() < end:  # until the other waits
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
                    fcntl.lockf(lock, fcntl.LOCK_UN, 1, 1)
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.read(held, 1) == b"x"
        os.write(ask, b"x")
        idp.store.put_meta("x", 1)
        assert os.waitpid(pid, 0)[1] == 0 and idp.store.meta("x") == "1"
