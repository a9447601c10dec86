"""The engine under the store: SQLite (SQLCipher) in WAL mode; connections, transactions, durability, generations."""

import collections
import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from urllib.parse import quote

import sqlcipher3

from appliance.base import StartupError
from appliance.base.log import Log


BATCH_SECONDS = 0.02
BATCH_MAX = 50_000  # rows waiting for the disk before we stop issuing
LOCK_SECONDS = 5  # how long a write waits for a lock that others hold on the database
PROBE_SECONDS = 30  # a readiness probe writes something where nothing else was written for so long: flash wears out
SQLITE_MAGIC = b"SQLite format 3\0"
SPARE_CONNECTIONS = 4  # each holds up to a megabyte
KDF_ROUNDS = 256_000  # SQLCipher 4's own derivation, so that its tools open the file with the passphrase


SQLITE_BUSY, SQLITE_READONLY, SQLITE_IOERR, SQLITE_FULL, SQLITE_CANTOPEN = (
    5, 8, 10, 13, 14,
)  # https://www.sqlite.org/rescode.html


def is_busy(error: sqlcipher3.Error) -> bool:
    """Is somebody else at the database, and nothing wrong with it?"""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == SQLITE_BUSY


class Unavailable(Exception):
    """The database cannot be read or written just now. `log` is for the operator; `retry_after` is seconds."""

    def __init__(self, log: str, retry_after: int):
        super().__init__(log)
        self.log, self.retry_after = log, retry_after


class Conflict(Exception):
    """A row with this name or id is there already, or one it refers to is not."""


class Generation:
    """A counter in memory shared by all processes, which says that cached identity data may be stale.

    Each process adds to a slot of its own, so no bump is lost; all slots together are the value.
    Behind them stands what is wrong with the database, where whoever writes next has to know it:

        FAILED    a write has failed, and none has gone through since
        LOCKED    somebody else holds its lock, and has held it for LOCK_SECONDS
        UNSYNCED  a sync has failed: what the kernel was to write it may have thrown away
        HEALED    counts how often writes went through again; connections of before are not used any more
        BEATS     of each process a count of its own, by which the supervisor knows that it goes on; 0 until it serves
        PLACE     device and inode of the database, its log and the index of that, which all processes have open
    """

    SLOTS = 66
    FAILED, LOCKED, UNSYNCED, HEALED, BEATS = range(8 * SLOTS, 8 * SLOTS + 5)
    PLACE, FILES = BEATS + SLOTS, struct.Struct("<6Q")

    def __init__(self):
        self.map = mmap.mmap(-1, self.PLACE + self.FILES.size)
        self.slot = 0
        self.lock = threading.Lock()

    def read(self) -> bytes:
        return self.map[: 8 * self.SLOTS]

    def bump(self):
        with self.lock:
            at = 8 * self.slot
            (count,) = struct.unpack_from("<Q", self.map, at)
            struct.pack_into("<Q", self.map, at, count + 1)

    def beat(self):
        at = self.BEATS + self.slot
        self.map[at] = self.map[at] % 255 + 1

    @property
    def place(self) -> tuple:
        """What PLACE says, zeros while nobody serves the database."""
        return self.FILES.unpack_from(self.map, self.PLACE)

    @place.setter
    def place(self, files):
        self.FILES.pack_into(self.map, self.PLACE, *files)


def derive_key(passphrase: str, salt: bytes) -> str:
    """Return SQLCipher's raw key for a passphrase: hex of the 32-byte key and the 16-byte salt.

    Once a start rather than once a connection: the derivation takes a tenth of a second.
    """
    key = hashlib.pbkdf2_hmac("sha512", passphrase.encode(), salt, KDF_ROUNDS, 32)
    return (key + salt).hex()


def read_database_key(path: str, passphrase: str, unencrypted: bool) -> str:
    """Return the raw key of an existing database, empty where it has none. Raises StartupError with a sentence."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StartupError(f"the database {path} cannot be read: {error.strerror}") from None
    if size < 512 or len(head) < 16:
        raise StartupError(f"the database {path} is truncated ({size} bytes): restore a backup; it is left as it is")
    if head == SQLITE_MAGIC:
        if passphrase and not unencrypted:
            raise StartupError(
                f"the database {path} is not encrypted, but db-pass is set: unset it, or set no-db-pass = true"
            )
        return ""
    if unencrypted or not passphrase:
        raise StartupError(f"the database {path} is encrypted or damaged, and no db-pass is given")
    return derive_key(passphrase, head)


def check_log(path: str):
    """Raise StartupError where the write-ahead log beside a database begins with a damaged header.

    SQLite would take it for an empty one and begin it anew, and what was acknowledged last would be
    gone without a word. No power cut leaves one: the header is synced before anything follows it.
    https://www.sqlite.org/fileformat2.html#walformat
    """
    for _ in range(3):  # a server beside us may be writing it
        try:
            with open(path + "-wal", "rb") as file:
                head = file.read(32)
        except FileNotFoundError:
            return
        magic = int.from_bytes(head[:4], "big")
        one = two = 0
        for word, other in struct.iter_unpack(">II" if magic & 1 else "<II", head[:24].ljust(24)):
            one = one + word + two & 0xFFFFFFFF
            two = two + other + one & 0xFFFFFFFF
        if not head or magic | 1 == 0x377F0683 and head[24:] == struct.pack(">II", one, two):
            return
    raise StartupError(
        f"the write-ahead log {path}-wal is damaged, and holds what was done last: restore a backup, or move it away to go on without; it is left as it is"
    )


class PooledConnection:
    """A connection in the hands of a thread: it goes back to the store when the thread ends."""

    __slots__ = ("store", "connection", "since")

    def __init__(self, store):
        self.store, self.since = store, store.generation.map[store.generation.HEALED]
        while store.spare:
            with contextlib.suppress(IndexError):
                since, self.connection = store.spare.pop()
                if since == self.since:
                    return
                store.connections.discard(self.connection)
                self.connection.close()
        self.connection = store.connect()

    def __del__(self):
        store, connection = self.store, getattr(self, "connection", None)
        if connection is None or store.closing:
            return  # close() has it
        if len(store.spare) < SPARE_CONNECTIONS and not connection.in_transaction:
            store.spare.append((self.since, connection))
        else:
            store.connections.discard(connection)
            connection.close()


class Database:
    """The engine under the store. One connection a thread; writers of this process queue on a lock, processes on the busy timeout.

    Every transaction is on the disk before it returns: synchronous=FULL.
    """

    def __init__(self, path, key="", generation=None, log=None, mode="rw"):
        self.path, self.key, self.mode = str(path), key, mode
        self.generation = generation or Generation()
        self.log = log or Log()
        # Set by the server: entered by who is about to wait, gives whether somebody is left to serve.
        self.blocking = contextlib.nullcontext
        self.written_at = -float(PROBE_SECONDS)  # monotonic seconds
        self.local = threading.local()
        self.write_lock = threading.RLock()
        self.turns = None  # a descriptor, where several processes write
        self.closing = False
        self.connections = set()
        self.spare = collections.deque()  # connections of threads that have ended, for those to come

    # -- connections and transactions --

    def take_turns(self):
        """Let the writers of several processes queue in the kernel. After a fork, never before.

        SQLite's own lock makes a waiter sleep and try again, up to 100 ms apart. This one is on
        the `.lock` file, by fcntl, which knows nothing of the flock that says who serves it; it is
        gone with the process that held it.
        """
        self.turns = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def writing(self):
        """Hold the turn to write, of this process and of all. Not entered twice by a thread."""
        if not self.write_lock.acquire(timeout=0.05):
            with self.blocking() as others:  # a write hangs: who only reads needs threads
                if others is False:
                    raise Unavailable("too many wait to write", LOCK_SECONDS)
                self.write_lock.acquire()
        try:
            if self.turns is None:
                yield
                return
            fcntl.lockf(self.turns, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.turns, fcntl.LOCK_UN)
        finally:
            self.write_lock.release()

    @contextlib.contextmanager
    def committing(self, connection):
        """BEGIN, and COMMIT or ROLLBACK. The turn is held."""
        trouble, flags = self.generation, self.generation.map
        if flags[trouble.UNSYNCED]:
            # What the failed sync covered counts as clean now, so no later one writes it, and it may stand before what is
            # acknowledged next: after a power cut the log would end there. So it goes into the database, and the log begins
            # anew; what was refused and lies behind its end is gone with it. https://www.sqlite.org/wal.html
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise sqlcipher3.OperationalError("the write-ahead log cannot be begun anew while somebody reads")
            flags[trouble.UNSYNCED] = 0
        # One has waited for all: as long as the lock is held, nobody else waits as long.
        if was_locked := flags[trouble.LOCKED]:
            connection.execute("PRAGMA busy_timeout = 50")
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlcipher3.OperationalError as error:
            if is_busy(error):
                flags[trouble.LOCKED] = 1
            raise
        finally:
            if was_locked:
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * LOCK_SECONDS)}")
        flags[trouble.LOCKED] = 0
        try:
            self.check_files_unchanged()
            yield
            try:
                connection.execute("COMMIT")
            except sqlcipher3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == SQLITE_IOERR:
                    flags[trouble.UNSYNCED] = 1
                raise
        except BaseException:
            with contextlib.suppress(sqlcipher3.Error):
                connection.execute("ROLLBACK")
            raise

    def stat_files(self):
        """Return which files the database, its log and the index of that are, by their paths; None where one is gone."""
        try:
            return tuple(
                number
                for end in ("", "-wal", "-shm")
                for info in [os.stat(self.path + end)]
                for number in (info.st_dev, info.st_ino)
            )
        except OSError:
            return None

    def check_files_unchanged(self):
        """Raise Unavailable where the files that are open are not those that the next start would find: one was moved, removed or replaced."""
        if any(place := self.generation.place) and place != self.stat_files():
            raise Unavailable(f"{self.path}, its -wal or its -shm was moved, removed or replaced", LOCK_SECONDS)

    def connect(self, synchronous="FULL", mode=""):
        self.check_files_unchanged()  # two processes that have two indexes of one log would write over each other
        connection = sqlcipher3.connect(
            f"file:{quote(self.path)}?mode={mode or self.mode}", uri=True, isolation_level=None,
            check_same_thread=False, timeout=LOCK_SECONDS, cached_statements=256,
        )
        connection.execute("PRAGMA cipher_log_level = NONE")  # it would write to stderr; what fails raises
        if self.key:
            connection.execute(f"PRAGMA key = \"x'{self.key}'\"")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA cache_size = -1024")
        self.connections.add(connection)
        return connection

    @property
    def connection(self):
        try:
            borrowed = self.local.borrowed
            if borrowed.since == self.generation.map[self.generation.HEALED] or borrowed.connection.in_transaction:
                return borrowed.connection
            self.discard()
        except AttributeError:
            pass
        self.local.borrowed = PooledConnection(self)
        return self.local.borrowed.connection

    def discard(self):
        """Close the connection of this thread: one that has met an error of the disk, or was opened meanwhile, stays read-only or without its key."""
        borrowed = self.local.__dict__.pop("borrowed", None)
        if borrowed is not None:
            connection, borrowed.connection = borrowed.connection, None
            self.connections.discard(connection)
            with contextlib.suppress(sqlcipher3.Error):
                connection.close()

    def close(self):
        self.closing = True
        for connection in list(self.connections):
            with contextlib.suppress(sqlcipher3.Error):
                connection.close()
        self.connections.clear()
        self.spare.clear()
        self.local = threading.local()

    @contextlib.contextmanager
    def guard(self):
        """Turn what the engine raises into what callers expect."""
        try:
            yield
        except sqlcipher3.IntegrityError as error:
            raise Conflict(str(error)) from None
        except sqlcipher3.Error as error:
            borrowed = self.local.__dict__.get("borrowed")
            if not is_busy(error) and borrowed is not None and not borrowed.connection.in_transaction:
                self.discard()  # within a transaction, when that is rolled back
            raise Unavailable(f"database: {error}", 5) from error

    @contextlib.contextmanager
    def transaction(self, identity=False):
        """All or nothing, on the disk when it returns. Joins one that is open on this thread.

        `identity` says that data other processes cache (clients, scopes) is changed.
        """
        with self.guard():
            connection = self.connection
        if connection.in_transaction:
            if identity:
                self.local.identity = True
            yield
            return
        self.local.identity = identity
        with self.guard():
            try:
                with self.writing(), self.committing(connection):
                    yield
            except sqlcipher3.IntegrityError:
                raise
            except (sqlcipher3.Error, Unavailable) as error:
                cause = error.__cause__ if isinstance(error, Unavailable) else error  # of a statement within, or our own
                if isinstance(cause, sqlcipher3.Error):
                    self.note_failure(cause)
                    if not is_busy(cause):
                        self.discard()
                raise
        self.written_at, trouble, flags = time.monotonic(), self.generation, self.generation.map
        if flags[trouble.FAILED]:
            flags[trouble.FAILED], flags[trouble.HEALED] = 0, flags[trouble.HEALED] + 1 & 0xFF
        if self.local.identity:
            self.generation.bump()

    def note_failure(self, error: Exception):
        """Let every process know that a write has failed."""
        self.generation.map[self.generation.FAILED] = 1

    def one(self, record, sql, **parameters):
        with self.guard():
            row = self.connection.execute(sql, parameters).fetchone()
        return None if row is None else record(*row)

    def all(self, record, sql, **parameters):
        with self.guard():
            return [record(*row) for row in self.connection.execute(sql, parameters)]

    def run(self, sql, **parameters) -> int:
        """Run a writing statement; the number of rows it touched. Always inside transaction().

        Raises Conflict here too, not only at the end of the transaction it joins: whoever catches it is on the way.
        """
        with self.transaction(), self.guard():
            return self.connection.execute(sql, parameters).rowcount
