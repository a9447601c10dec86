"""The engine under the store: SQLite (SQLCipher) in WAL mode; connections, transactions, durability, generations."""

import collections
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import msgspec
import sqlcipher3

from appliance.base import StartupError
from appliance.base.files import guard_private, open_owned, open_secret
from appliance.base.settings import Options
from appliance.base.log import Log
from appliance.base.shared import Byte, ChangeMarks, Numbers, Shared
from appliance.base.metrics import COMMIT_FAILURES, COMMIT_SECONDS, COMMIT_SIZE, Counters
from appliance.base.wal import MarkFile, find_damage


BATCH_SECONDS = 0.02
BATCH_MAX = 50_000  # token rows queued in memory; beyond that no token is issued
LOCK_SECONDS = 5  # SQLite's busy timeout: how long a write waits for another process's lock
PROBE_SECONDS = 30  # a readiness probe writes only if no write succeeded for so long: writes wear out flash
SQLITE_MAGIC = b"SQLite format 3\0"
GROUP_MAX = 100  # transactions that one COMMIT puts on the disk
GROUP_SECONDS = 0.02  # a transaction joins no group that began longer ago: a change by the operator waits for it
GATHER_SECONDS = 0.004  # how long a group is kept open for requests that are queued but may not write
SLOW_SECONDS = 0.001  # a sync that takes longer leaves the requests that are queued to another thread
SPARE_CONNECTIONS = 4  # idle connections kept for reuse; each has a page cache of up to a megabyte
NOTHING = contextlib.nullcontext()
NEVER = -1  # no number of recoveries: the connection that has it is not used again
KDF_ROUNDS = 256_000  # SQLCipher 4's default, so that its own tools open the file with the passphrase


SQLITE_BUSY, SQLITE_READONLY, SQLITE_IOERR, SQLITE_FULL, SQLITE_CANTOPEN = 5, 8, 10, 13, 14


def result_code(error: sqlcipher3.Error) -> int:
    """Return the primary result code of an error of SQLite, or 0 if it has none. https://www.sqlite.org/rescode.html"""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error: sqlcipher3.Error) -> bool:
    """Return whether this is SQLITE_BUSY: another connection holds a lock, and nothing is broken."""
    return result_code(error) == SQLITE_BUSY


class Unavailable(Exception):
    """The database cannot be read or written at the moment. `log` is for the operator; `retry_after` is seconds."""

    def __init__(self, log: str, retry_after: int):
        super().__init__(log)
        self.log, self.retry_after = log, retry_after


class Conflict(Exception):
    """A UNIQUE or FOREIGN KEY constraint failed: the name or id exists already, or the row referred to does not."""


def disk_error(error: BaseException | None) -> sqlcipher3.Error | None:
    """Return the error of SQLite that an exception is, or tells of, unless it is that of a constraint."""
    cause = error.__cause__ if isinstance(error, Unavailable) else error
    return cause if isinstance(cause, sqlcipher3.Error) and not isinstance(cause, sqlcipher3.IntegrityError) else None


class Record(msgspec.Struct, frozen=True):
    """A row of `table`: its fields are the columns, in their order."""

    table: ClassVar[str] = ""


Row = TypeVar("Row", bound=Record)


@functools.cache
def insert_statement(record: type[Record]) -> str:
    """Return the INSERT statement of a whole row, its values in the order of the fields."""
    columns = record.__struct_fields__
    # Names of a class and its fields, which are constants: nothing of a request is formatted into SQL.
    return f"INSERT INTO {record.table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608


class Generation(Shared):
    """A counter in shared memory. When it changes, every process drops its cached identity data.

    Each process increments a slot of its own, so no bump is lost without a lock between processes; the
    value is all slots together. The same memory tells all processes the state of the database.
    """

    SLOTS = 66
    counts = Numbers("Q", SLOTS)
    beats = Numbers("B", SLOTS)  # a heartbeat of each process, watched by the supervisor; 0 until the process serves
    failed = Byte()  # a write has failed, and no write has succeeded since
    locked = Byte()  # another process has held the database lock for at least LOCK_SECONDS
    unsynced = Byte()  # an fsync of the WAL has failed: the kernel may have dropped the dirty pages
    held = Byte()  # an upgrade tries this program, and may still go back: nothing is answered but its health
    healed = Byte()  # counts recoveries after a failure; connections opened before the last one are closed, not reused
    files = Numbers("Q", 6)  # device and inode of the database, its -wal and its -shm, as all processes have them open

    def __init__(self) -> None:
        super().__init__()
        self.slot = 0
        self.lock = threading.Lock()
        self.marks = ChangeMarks()  # set by the server

    def read(self) -> bytes:
        return self.counts.tobytes()

    def bump(self) -> None:
        with self.lock:
            self.counts[self.slot] += 1
        self.marks.touch()

    def beat(self) -> None:
        self.beats[self.slot] = self.beats[self.slot] % 255 + 1

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The six numbers of `files`; zeros while no server has the database open."""
        return tuple(self.files)

    @file_ids.setter
    def file_ids(self, numbers: tuple[int, ...]) -> None:
        for place, number in enumerate(numbers):
            self.files[place] = number


def derive_key(passphrase: str, salt: bytes) -> str:
    """Return SQLCipher's raw key for a passphrase: hex of the 32-byte key and the 16-byte salt.

    PBKDF2 takes a tenth of a second, so it runs once at start-up, not for every connection.
    """
    key = hashlib.pbkdf2_hmac("sha512", passphrase.encode(), salt, KDF_ROUNDS, 32)
    return (key + salt).hex()


def read_key_file(path: str, in_container=False) -> bytes:
    """Return the 256-bit key in a file: 32 octets, or 64 hexadecimal digits and perhaps a line end.

    Raises StartupError.
    """
    try:
        with open_secret(path, "db-key-file", in_container) as file:
            content = file.read(100)
    except ValueError as error:
        raise StartupError(str(error)) from None
    if len(content) == 32:
        return content
    if re.fullmatch(rb"[0-9A-Fa-f]{64}\r?\n?", content):
        return bytes.fromhex(content.decode())
    raise StartupError(f"db-key-file: {path} holds neither 32 octets nor 64 hexadecimal digits")


def read_database_key(path: str, passphrase: str, unencrypted: bool, is_ours=True, raw=b"") -> str:
    """Return the raw key of an existing database, or "" if it is unencrypted. Raises StartupError with a sentence.

    Whoever opens the database asks for its key first, and here it is checked that nobody else could have put it there.
    A backup that somebody names may be anybody's: `is_ours` is false. `raw` is the content of db-key-file: with it
    there is nothing to derive.
    """
    try:
        with os.fdopen(open_owned(path) if is_ours else os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
            head = file.read(16)
            size = os.fstat(file.fileno()).st_size
            if is_ours:
                guard_private(file.fileno(), path, "it is the database")
    except OSError as error:
        raise StartupError(f"the database {path} cannot be read: {error.strerror}") from None
    if size < 512 or len(head) < 16:
        raise StartupError(f"the database {path} is truncated ({size} bytes): restore a backup; it is left as it is")
    if head == SQLITE_MAGIC:
        if (passphrase or raw) and not unencrypted:
            name = "db-key-file" if raw else "db-pass"
            raise StartupError(
                f"the database {path} is not encrypted, but {name} is set: unset it, or set no-db-pass = true"
            )
        return ""
    if raw:
        return (raw + head).hex()
    if unencrypted or not passphrase:
        raise StartupError(f"the database {path} is encrypted or damaged, and no db-pass or db-key-file is given")
    return derive_key(passphrase, head)


def database_key(options: Options, path: str = "", is_ours=True) -> str:
    """Return what read_database_key() does, for the database of these options or another one."""
    raw = read_key_file(options.db_key_file, options.docker) if options.db_key_file else b""
    return read_database_key(path or options.db_file, options.db_pass, options.no_db_pass, is_ours, raw)


def new_database_key(options: Options) -> str:
    """Return the raw key for a database that is to be made, or "" for one that is not to be encrypted."""
    salt = os.urandom(16)
    if options.db_key_file:
        return (read_key_file(options.db_key_file, options.docker) + salt).hex()
    return derive_key(options.db_pass, salt) if options.db_pass else ""


class PooledConnection:
    """The connection of one thread. When the thread ends or waits to write, it returns to the pool in `store.spare`.

    `since` is the number of recoveries when it was opened: Generation.healed.
    """

    __slots__ = ("store", "connection", "since")

    def __init__(self, store: "Database") -> None:
        # Read before connecting: if writing recovers meanwhile, this connection counts as one of before.
        self.store, self.since = store, store.generation.healed
        while store.spare:
            with contextlib.suppress(IndexError):
                since, self.connection = store.spare.pop()
                if since == self.since:
                    return
                store.drop(self.connection)
        self.connection = store.connect()

    def __del__(self) -> None:
        store, connection = self.store, getattr(self, "connection", None)
        if connection is None or store.closing:
            return  # close() closes it
        if len(store.spare) < SPARE_CONNECTIONS and not connection.in_transaction:
            store.spare.append((self.since, connection))
        else:
            store.drop(connection)


class Group:
    """Transactions of several threads that one COMMIT puts on the disk together: a group commit.

    It is open in the connection of the thread that began it; the holder of the write lock changes it. `size` counts
    the blocks that have run. `done` is held until `over`; `committed` is the outcome, and `error` its cause if known.
    `left` says that the thread that began it goes on with another connection. `kept` is what the store remembers of
    the transaction: it never changes, but is replaced, and is put back when a block is undone, from `kept_before`.
    """

    __slots__ = (
        "pooled", "began", "size", "identity", "left", "over", "committed", "error", "done", "kept", "kept_before",
    )

    def __init__(self, pooled: PooledConnection) -> None:
        self.pooled: Any = pooled  # None when it is over
        self.began, self.size, self.identity = time.monotonic(), 0, False
        self.left, self.over, self.committed = False, False, False
        self.error: BaseException | None = None
        self.kept: Any = None
        self.kept_before: Any = None
        self.done = threading.Lock()
        self.done.acquire()

    @property
    def connection(self) -> sqlcipher3.Connection:
        return self.pooled.connection

    def check(self) -> None:
        """Raise Unavailable if SQLite has rolled back the whole transaction. https://www.sqlite.org/lang_transaction.html"""
        if not self.connection.in_transaction:
            raise Unavailable("the transaction was rolled back", 5)


class Guard:
    """Translates SQLite's exceptions: IntegrityError becomes Conflict, any other becomes Unavailable.

    Every statement runs in it. It has no state, so all threads share one object, which takes a quarter of the time of
    a generator: 0.4 microseconds instead of 1.7, where a query takes 4.
    """

    __slots__ = ("database",)

    def __init__(self, database: "Database") -> None:
        self.database = database

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, sqlcipher3.IntegrityError):
            raise Conflict(str(error)) from None
        if isinstance(error, sqlcipher3.Error):
            local = self.database.local.__dict__
            pooled = local.get("pooled")
            if pooled is None or local.get("group") or is_busy(error):
                pass  # in a transaction leave_group() has its connection closed, once it is rolled back
            elif not pooled.connection.in_transaction:
                self.database.discard()
            raise Unavailable(f"database: {error}", 5) from error


class Database:
    """Connections and transactions for the store.

    Each thread has its own connection. Writing threads of one process queue on a lock, writing processes on an fcntl
    lock or on SQLite's busy timeout. Every transaction is on the disk before it returns: synchronous=FULL.

    Transactions of threads that write at the same time share one COMMIT and its sync, as a group: each runs in a
    savepoint of the transaction that the first one began, and waits until the group is committed. The last one for
    which no other waits commits. So the next group gathers while a sync lasts, and a thread that writes alone commits
    at once. What a member reads in its block may be another's that is not on the disk yet: no member returns, or
    raises what its block raised, before the group is; all raise Unavailable if it cannot be committed. The server
    runs many in one thread, and holds back the answers instead of the threads: run_together().
    """

    def __init__(
        self, path: str | os.PathLike, key: str = "", generation: Generation | None = None, log: Log | None = None,
        mode: str = "rw",
    ) -> None:
        self.path, self.key, self.mode = str(path), key, mode
        self.generation = generation or Generation()
        self.log = log or Log()
        # Set by the server. Context manager entered before waiting for the write lock; yields False if no other
        # thread could serve.
        self.blocking: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        # Set by the server. Whether requests are queued, which may write soon.
        self.expecting: Callable[[], bool] = lambda: False
        self.counters: Counters | None = None  # set by the server
        self.written_at = -float(PROBE_SECONDS)  # monotonic seconds
        self.clock: Callable[[], float] = time.time  # Unix seconds; set by the server
        self.mark = MarkFile(self.path)  # of the write-ahead log
        self.batch_connection: sqlcipher3.Connection | None = None  # the one whose commits are not synced
        self.group: Group | None = None  # the open one, which the holder of the write lock may join or end
        self.waiters: set[int] = set()  # idents of the threads that wait for the write lock
        self.sync_seconds, self.last_size = 0.0, 0  # what the last COMMIT took, and how many transactions it covered
        self.guard = Guard(self)
        self.local = threading.local()
        self.write_lock = threading.RLock()
        self.process_write_lock: int | None = None  # descriptor of the lock file, if several processes write
        self.closing = False
        self.connections: set[sqlcipher3.Connection] = set()
        # (healed, connection) for threads that have none. The last one used comes first: what it has cached is newest.
        self.spare: collections.deque[tuple[int, sqlcipher3.Connection]] = collections.deque()

    # -- connections --

    def stat_files(self) -> tuple[int, ...] | None:
        """Return device and inode of the database, -wal and -shm now at their paths, or None if one is missing."""
        try:
            return tuple(
                number
                for end in ("", "-wal", "-shm")
                for info in [os.stat(self.path + end)]
                for number in (info.st_dev, info.st_ino)
            )
        except OSError:
            return None

    def check_files_unchanged(self) -> None:
        """Raise Unavailable if the open database, -wal or -shm is not the file at its path any more.

        One was moved, removed or replaced, so the next start would not find what is written now.
        """
        if any(file_ids := self.generation.file_ids) and file_ids != self.stat_files():
            raise Unavailable(f"{self.path}, its -wal or its -shm was moved, removed or replaced", LOCK_SECONDS)

    def connect(self, synchronous: str = "FULL", mode: str = "") -> sqlcipher3.Connection:
        """Open a connection with our settings. What it runs in a transaction is on the disk at COMMIT if it is FULL.

        https://www.sqlite.org/pragma.html#pragma_synchronous
        """
        self.check_files_unchanged()  # two processes with different -shm files for one WAL would overwrite each other
        connection = sqlcipher3.connect(
            f"file:{quote(os.fsencode(self.path))}?mode={mode or self.mode}", uri=True, isolation_level=None,
            check_same_thread=False, timeout=LOCK_SECONDS, cached_statements=256,
        )
        connection.execute("PRAGMA cipher_log_level = NONE")  # SQLCipher logs to stderr; failures raise anyway
        if self.key:
            connection.execute(f"PRAGMA key = \"x'{self.key}'\"")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA cache_size = -1024")
        self.connections.add(connection)
        return connection

    def drop(self, connection: sqlcipher3.Connection) -> None:
        """Close a connection that connect() opened."""
        self.connections.discard(connection)
        with contextlib.suppress(sqlcipher3.Error):
            connection.close()

    def discard(self) -> None:
        """Close this thread's connection.

        A connection that met a disk error, or was opened during one, may stay read-only or without its key.
        """
        pooled = self.local.__dict__.pop("pooled", None)
        if pooled is not None:
            connection, pooled.connection = pooled.connection, None
            self.drop(connection)

    def lend(self) -> None:
        """Let other threads use this thread's connection while it waits.

        Every commit makes the page cache of all other connections stale. Those that read for the next group so share
        one cache, instead of decrypting the same pages in a connection each: a seventh less work for a refresh.
        """
        if len(self.spare) < SPARE_CONNECTIONS:
            self.local.__dict__.pop("pooled", None)

    @property
    def connection(self) -> sqlcipher3.Connection:
        """The connection of this thread: a new one at its first use, and after a recovery from a failure."""
        try:
            pooled = self.local.pooled
            if pooled.since == self.generation.healed or pooled.connection.in_transaction or self.in_transaction:
                return pooled.connection
            self.discard()
        except AttributeError:
            pass
        self.local.pooled = PooledConnection(self)
        return self.local.pooled.connection

    def close(self) -> None:
        self.closing = True
        if self.mode == "rw" and self.connections:
            self.mark.allow_removal()  # by the last connection of all processes, which may be one of these
        for connection in list(self.connections):
            with contextlib.suppress(sqlcipher3.Error):
                connection.close()
        self.connections.clear()
        self.spare.clear()
        self.local = threading.local()
        self.mark.close()

    # -- transactions --

    def open_process_write_lock(self) -> None:
        """Open the lock file on which writing processes queue in the kernel. Call this after a fork, never before.

        SQLite's busy handler polls its lock, sleeping up to 100 ms between attempts. A blocking fcntl lock
        on the `.lock` file wakes the next writer at once. It is independent of the flock on the
        same file, which marks the server that owns the database. The kernel releases it if a process dies.
        """
        self.process_write_lock = os.open(
            self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )

    def lock_octet(self, lock: int, octet: int) -> None:
        """Lock an octet of the lock file. Other threads serve while this one has to wait for another process."""
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, octet)
        except OSError:
            with self.blocking():
                fcntl.lockf(lock, fcntl.LOCK_EX, 1, octet)

    def acquire_process_lock(self) -> None:
        """Wait for the turn of this process to write. The caller holds the write lock.

        The kernel does not queue: a process that releases the lock and wants it again is faster than one it wakes. So
        the lock is octet 0, and octet 1 is held by the one process that is next, from which nobody can take the turn.
        """
        if (lock := self.process_write_lock) is None:
            return
        self.lock_octet(lock, 1)
        try:
            self.lock_octet(lock, 0)
        finally:
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, 1)

    def release_process_lock(self) -> None:
        if self.process_write_lock is not None:
            fcntl.lockf(self.process_write_lock, fcntl.LOCK_UN, 1, 0)

    @contextlib.contextmanager
    def taking_turns(self) -> Iterator[None]:
        """Hold the write lock of this process. Raises Unavailable if no thread would be left to serve others."""
        acquired = self.write_lock.acquire(blocking=False)
        try:
            if not acquired:
                me = threading.get_ident()
                self.waiters.add(me)
                self.lend()
                try:
                    with self.blocking() as others:  # a write is slow: threads must remain for requests that only read
                        acquired = self.write_lock.acquire(timeout=0.05 if others is False else -1)
                finally:
                    self.waiters.discard(me)
                if not acquired:
                    raise Unavailable("too many wait to write", LOCK_SECONDS)
            yield
        finally:
            if acquired:
                self.write_lock.release()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock of this process, then the one between processes, with no group open.

        A thread must not enter this twice.
        """
        with self.taking_turns():
            if self.group:
                self.commit(self.group)
            self.acquire_process_lock()
            try:
                yield
            finally:
                self.release_process_lock()

    def begin(self, connection: sqlcipher3.Connection) -> None:
        """BEGIN. The caller holds both write locks, and rolls back if this raises."""
        shared = self.generation
        if shared.unsynced:
            # After a failed fsync Linux marks the pages clean and never retries them, so a WAL frame may be missing
            # on the disk. After a power cut, recovery would stop at that frame and lose the commits behind it.
            # Checkpoint and truncate the WAL before the next commit; this also drops the frames of the refused
            # transaction behind its end. https://www.sqlite.org/wal.html
            self.mark.allow_removal()
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise sqlcipher3.OperationalError("the write-ahead log cannot be begun anew while somebody reads")
            shared.unsynced = 0
        # One writer has already waited the full busy timeout; until the lock is free, others fail after 50 ms. Those
        # that run_together() runs behind one that has waited fail at once: they would wait one after the other.
        if was_locked := shared.locked:
            connection.execute(f"PRAGMA busy_timeout = {0 if self.local.__dict__.get('has_waited') else 50}")
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlcipher3.OperationalError as error:
            if is_busy(error):
                shared.locked, self.local.has_waited = 1, self.joined is not None
            raise
        finally:
            if was_locked:
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * LOCK_SECONDS)}")
        shared.locked = 0
        self.check_files_unchanged()

    def end(self, connection: sqlcipher3.Connection) -> None:
        """COMMIT. What failed to be synced is noted: see begin()."""
        try:
            connection.execute("COMMIT")
        except sqlcipher3.OperationalError as error:
            if result_code(error) == SQLITE_IOERR:
                self.generation.unsynced = 1
            raise
        self.note_commit(connection)

    @contextlib.contextmanager
    def committing(self, connection: sqlcipher3.Connection) -> Iterator[None]:
        """BEGIN, and COMMIT or ROLLBACK. The caller holds both write locks: see writing()."""
        try:
            self.begin(connection)
            yield
            self.end(connection)
        except BaseException:
            with contextlib.suppress(sqlcipher3.Error):
                connection.execute("ROLLBACK")
            raise

    # -- the write-ahead log --

    def count_frames(self, connection: sqlcipher3.Connection) -> int:
        """Return how many valid frames the log has, up to its last commit.

        NOOP checkpoints nothing; before SQLite 3.51, which does not know it, it is a passive checkpoint.
        https://www.sqlite.org/pragma.html#pragma_wal_checkpoint
        """
        return connection.execute("PRAGMA wal_checkpoint(NOOP)").fetchone()[1]

    def note_commit(self, connection: sqlcipher3.Connection) -> None:
        """Mark how far the log is acknowledged, after a COMMIT of this connection that succeeded.

        The caller holds the write lock, so that no other process has written behind it. Once close() has begun, the
        log may be removed at any moment, and is not marked any more.
        """
        if self.closing:
            return
        with contextlib.suppress(sqlcipher3.Error, MemoryError):  # it is committed, whatever fails here
            self.mark.note_commit(
                self.count_frames(connection), connection is not self.batch_connection, int(self.clock() * 1000)
            )

    def find_log_damage(self, connection: sqlcipher3.Connection) -> str:
        """Return a sentence if the log lacks what was acknowledged, "" otherwise. See wal.find_damage().

        The connection has read something already, and so recovered the log, and keeps it from being removed.
        """
        for _ in range(3):  # a running server may begin the log anew while we look
            known = self.mark.read()  # before the frames, which a running server goes on to write
            damage = find_damage(self.path, known, self.count_frames(connection))
            if not damage:
                return ""
        return f"the write-ahead log {self.path}-wal is damaged: {damage}"

    def note_failure(self, error: Exception) -> None:
        """Let all processes know that a write has failed."""
        self.generation.failed = 1
        if self.counters:
            self.counters.add(COMMIT_FAILURES)

    def count_commit(self, kind: str, size: int, seconds: float) -> None:
        if self.counters:
            self.counters.observe(COMMIT_SECONDS, seconds, kind)
            self.counters.observe(COMMIT_SIZE, size, kind)

    # -- groups --

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is in a block of transaction(), and may read what is not committed."""
        return self.local.__dict__.get("group") is not None

    def enter_group(self) -> Group:
        """Begin a group in this thread's connection, or a savepoint in the open one, with the write lock held."""
        group = self.group
        if group is not None:
            try:
                group.connection.execute("SAVEPOINT member")
                group.kept_before = group.kept
            except BaseException:
                self.leave_group(group, None, False)
                raise
            return group
        self.acquire_process_lock()
        try:
            connection = self.connection
            try:
                self.begin(connection)
                self.group = Group(self.local.pooled)
            except BaseException:
                with contextlib.suppress(sqlcipher3.Error):
                    connection.execute("ROLLBACK")
                raise
        except BaseException as error:
            self.release_process_lock()
            if cause := disk_error(error):
                self.note_failure(cause)
                if not is_busy(cause):
                    self.discard()
            raise
        return self.group

    @contextlib.contextmanager
    def using(self, group: Group) -> Iterator[None]:
        """Make the group's connection the one of this thread."""
        own = self.local.__dict__.get("pooled")
        try:
            self.local.group, self.local.pooled = group, group.pooled
            yield
        finally:
            self.local.group = None
            if own is None:
                self.local.__dict__.pop("pooled", None)
            else:
                self.local.pooled = own
            own = None  # an exception refers to this frame: see lend()

    def leave_group(self, group: Group, error: BaseException | None, entered: bool = True) -> None:
        """Keep what a block has done, or undo it because of its `error`. Commit the group if no thread would join it.

        However this ends, the group is closed or one of its members waits in await_group().
        """
        try:
            if entered and error is None:
                if group.size:
                    group.connection.execute("RELEASE member")
                group.size += 1
                group.identity = group.identity or self.local.identity
            elif entered:
                if cause := disk_error(error):
                    self.note_failure(cause)
                    group.error = cause
                    if not is_busy(cause):
                        group.pooled.since = NEVER
                if group.size and group.connection.in_transaction:
                    group.connection.execute("ROLLBACK TO member")
                    group.kept = group.kept_before
                    group.connection.execute("RELEASE member")
            if not group.size or not group.connection.in_transaction:
                self.close_group(group)
            elif not self.is_gathering(group):
                self.commit(group)
        except BaseException as problem:
            if self.group is group:
                group.error = problem
                self.close_group(group)
            if not isinstance(problem, sqlcipher3.Error):
                raise

    def complete(self, connection: sqlcipher3.Connection, kept: Any) -> None:
        """Write what a group has left to its end, from what the store keeps of it. Called once, before its COMMIT."""

    def is_gathering(self, group: Group) -> bool:
        """Return whether a group is to stay open because others are about to join it."""
        age, sync = time.monotonic() - group.began, self.sync_seconds
        if group.size >= GROUP_MAX or age > GROUP_SECONDS + 2 * min(sync, GROUP_SECONDS):
            return False
        if self.joined is not None:
            return True  # run_together() commits it
        # Those of the last group are about to come again: on a slow disk it is worth waiting for them.
        returning = sync > SLOW_SECONDS and age < sync / 4 and 2 * group.size < self.last_size
        return bool(self.waiters) or returning or self.expecting()

    def commit(self, group: Group) -> None:
        """Put a group on the disk, and let its members know the outcome. The caller holds the write lock."""
        began, shared = time.monotonic(), self.generation
        try:
            # Requests that are queued are left to other threads: so the next group gathers while this one is synced.
            with self.blocking() if self.sync_seconds > SLOW_SECONDS else contextlib.nullcontext():
                self.complete(group.connection, group.kept)
                self.end(group.connection)
                group.committed = True
            self.written_at = time.monotonic()
            self.sync_seconds, self.last_size = self.written_at - began, group.size
            self.count_commit("group", group.size, self.sync_seconds)
            if shared.failed:
                shared.failed, shared.healed = 0, shared.healed + 1 & 0xFF
        except sqlcipher3.Error as error:
            group.error = error
            if not is_busy(error):
                group.pooled.since = NEVER
            self.note_failure(error)
        finally:
            if group.identity:
                shared.bump()  # whatever the outcome: a member may have read what was never committed
            self.close_group(group)

    def close_group(self, group: Group) -> None:
        """End a group: roll it back if it is not committed, pass on the turn to write, and wake its members."""
        self.group = None
        try:
            if not group.committed:
                with contextlib.suppress(sqlcipher3.Error):
                    group.connection.execute("ROLLBACK")
        finally:
            group.over = True
            if self.joined is not None and group.left and "pooled" not in self.local.__dict__:
                self.local.pooled = group.pooled  # its cache is newest, and no other thread has it
            group.pooled = None  # what a block has raised refers to the group: see lend()
            try:
                self.release_process_lock()
            finally:
                group.done.release()

    def await_group(self, group: Group, goes_first: bool = False) -> None:
        """Wait until a group is committed or has failed. Commit it if no other thread does.

        The thread that began it does so soon, as does one that `goes_first`; the others long after it.
        """
        founded = self.local.__dict__.get("pooled") is group.pooled
        seconds = GATHER_SECONDS if founded or goes_first else 10 * GROUP_SECONDS
        try:
            if not founded:
                self.lend()
            with self.blocking():
                while not group.over:
                    # Each that wakes lets the next one wake: all at once they would only contend for the GIL.
                    if group.done.acquire(timeout=seconds):
                        group.done.release()
                    else:
                        self.commit_overdue(group)
        except BaseException:
            # Whatever ended the wait: there may be no other thread that commits.
            with self.write_lock:
                if self.group is group:
                    self.commit(group)
            raise

    def commit_overdue(self, group: Group) -> None:
        """Commit a group for which the threads that were expected have not come."""
        if self.write_lock.acquire(blocking=False):
            try:
                if self.group is group and not (self.waiters and self.is_gathering(group)):
                    self.commit(group)
            finally:
                self.write_lock.release()

    @property
    def joined(self) -> "list[Group] | None":
        """The groups that the function which run_together() runs in this thread has taken part in."""
        return self.local.__dict__.get("joined")

    def join(self, group: Group, failure: Exception | None) -> None:
        """End a transaction of run_together(), which waits for the group: raise what its block raised."""
        if self.local.__dict__.get("pooled") is group.pooled and not group.over:
            del self.local.pooled  # the group's, while it is open: this thread goes on to read what is committed
            group.left = True  # not before: a thread that closes the group takes the connection then
        if failure and not group.size:
            self.local.joined.remove(group)  # it ended with this block, which has read nothing of others
        if failure:
            raise failure
        if group.over and not group.committed:
            raise Unavailable(f"database: {group.error}", 5) from group.error

    def run_together(self, works: Iterable[Callable[[], None]]) -> list[Unavailable | None]:
        """Run functions one after the other, whose transactions do not wait for their groups.

        When all that they wrote, and all of others that they may have read, is on the disk, return for each None, or
        why it is not. So the caller must not let anything out before that a function has found out or done. This
        saves two thread switches for each transaction.
        """
        local, joined = self.local, []
        try:
            for work in works:
                local.joined = []
                joined.append(local.joined)
                work()
        finally:
            local.joined, local.has_waited = None, False
            for group in {id(group): group for groups in joined for group in groups}.values():
                try:
                    self.finish_group(group)
                except Exception as error:  # the group is over: whether it is committed says its member below
                    group.error = group.error or error
        failed = [next((group for group in groups if not group.committed), None) for groups in joined]
        return [group and Unavailable(f"database: {group.error}", 5) for group in failed]

    def finish_group(self, group: Group) -> None:
        """Commit a group unless another thread does, and wait until it is over."""
        if not group.over and self.write_lock.acquire(blocking=False):
            try:
                if self.group is group:
                    self.commit(group)
            finally:
                self.write_lock.release()
        if not group.over:
            self.await_group(group, True)

    @contextlib.contextmanager
    def transaction(self, identity: bool = False) -> Iterator[None]:
        """Run the block atomically; it is on the disk when this returns. Joins a transaction open on this thread.

        `identity` says that the block changes data that other processes cache (clients, scopes).
        """
        local = self.local.__dict__
        if group := local.get("group"):
            group.check()
        if group or ((pooled := local.get("pooled")) and pooled.connection.in_transaction):
            if identity:
                self.local.identity = True
            yield
            return
        pooled = None  # another thread may have it while this one waits
        self.local.identity, failure = identity, None
        with self.guard:
            with self.taking_turns():
                group = self.enter_group()
                try:
                    if self.joined is not None:
                        self.joined.append(group)
                    with self.using(group):
                        yield
                except BaseException as error:
                    failure = error
                self.leave_group(group, failure)
            try:
                if self.joined is not None and isinstance(failure, Exception | None):
                    self.join(group, failure)
                    return
                if not group.over and (failure is None or isinstance(failure, Exception)):
                    self.await_group(group)
                if failure and (group.committed or not group.size or not isinstance(failure, Exception)):
                    raise failure
                if not group.committed:
                    raise Unavailable(f"database: {group.error}", 5) from group.error
            finally:
                failure = None  # its traceback refers to this frame

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Run the block on one state of the database, or on that of a transaction open on this thread."""
        with self.guard:
            connection = self.connection
            if connection.in_transaction:
                yield
                return
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    def joining(self) -> contextlib.AbstractContextManager:
        """Return transaction(), or in an open block what joins it without the work of a generator, as most do."""
        if group := self.local.__dict__.get("group"):
            group.check()
            return NOTHING
        return self.transaction()

    # -- statements --

    def one(self, record: type[Row], sql: str, **parameters: object) -> Row | None:
        """Return the first row a statement finds, or None."""
        with self.guard:
            row = self.connection.execute(sql, parameters).fetchone()
        return None if row is None else record(*row)

    def all(self, record: type[Row], sql: str, **parameters: object) -> list[Row]:
        """Return every row a statement finds."""
        with self.guard:
            return [record(*row) for row in self.connection.execute(sql, parameters)]

    def value(self, sql: str, **parameters: object) -> Any:
        """Return the first column of the first row a statement finds, or None."""
        with self.guard:
            row = self.connection.execute(sql, parameters).fetchone()
        return None if row is None else row[0]

    def values(self, sql: str, **parameters: object) -> list:
        """Return the first column of every row a statement finds."""
        with self.guard:
            return [row[0] for row in self.connection.execute(sql, parameters)]

    def exists(self, sql: str, **parameters: object) -> bool:
        """Return whether a statement finds any row."""
        with self.guard:
            return self.connection.execute(sql, parameters).fetchone() is not None

    def run(self, sql: str, **parameters: object) -> int:
        """Run a writing statement in transaction(). Return the number of rows it changed.

        The guard is entered here too, so that a caller inside a longer transaction can catch Conflict
        at this statement and not only when that transaction ends.
        """
        with self.joining(), self.guard:
            return self.connection.execute(sql, parameters).rowcount

    def changed(self, sql: str, **parameters: object) -> bool:
        """Run a statement that changes one row at most. Return whether it changed one."""
        return self.run(sql, **parameters) == 1

    def insert(self, row: Row) -> Row:
        """Insert a whole row in transaction(), and return it."""
        with self.joining(), self.guard:
            self.connection.execute(insert_statement(type(row)), msgspec.structs.astuple(row))
        return row
