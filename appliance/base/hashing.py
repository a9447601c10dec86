"""Argon2id: a bound on the hashes that run and wait, the memory they work in, and a cache of verified secrets."""

import base64
import collections
import contextlib
import hmac
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Sequence

from argon2.exceptions import Argon2Error, VerificationError
from argon2.low_level import (
    Type as Argon2Type, core as argon2_core, error_to_str as argon2_error, ffi as argon2_ffi,
    hash_secret as argon2_hash, hash_secret_raw as argon2_raw, verify_secret as argon2_verify,
)

from appliance.base.metrics import ARGON2_QUEUE, ARGON2_REFUSALS, ARGON2_SECONDS, ARGON2_WAIT_SECONDS, Counters
from appliance.base.settings import Options


class Busy(Exception):
    """Too many requests wait for Argon2. `log` is for the operator; `retry_after` is seconds."""

    def __init__(self, log: str, retry_after=1):
        super().__init__(log)
        self.log, self.retry_after = log, retry_after


class HashFailed(Exception):
    """Argon2 could not be computed: the machine lacks memory or threads."""


MAX_WAIT = 10  # seconds a request waits for Argon2 at most
BLAME_SECONDS = 60  # seconds a peer stays blamed for a wrong secret

# -- the gate --
# Its reserved half keeps 400 guesses a second from locking out other peers: without it, a client with the right
# secret was refused 21 times in 20 s. Without a gate, every login under way takes argon2id-memory (32 MiB) at once.


class HashGate:
    """Bounds the Argon2 work of a process: at most `max_running` hashes run, others wait, the rest raise Busy.

    All services of a box are one peer, and all of them reconnect at once after a power cut. So a peer
    without failures may use up to half of `capacity`, a peer that sent a wrong secret half of `blamed_capacity`.
    Whoever is at the machine goes first and is never refused, or strangers could keep the gate full.
    The server sets `blocking`, which keeps threads free for requests that need no hashing, and `counters`.
    """

    def __init__(self, max_running, max_waiting=320, max_waiting_blamed=60):
        self.max_running, self.running = max_running, 0
        self.capacity, self.blamed_capacity = max_running + max_waiting, max_running + max_waiting_blamed
        self.in_use = 0  # slots, of all peers
        self.per_peer: collections.Counter[str] = collections.Counter()  # slots in use, by peer
        self.mean_seconds = 0.0  # moving average of a hash; starts at 0, since the first hashes are not typical
        self.queues = {}  # peer: locks of its waiting threads; the gate releases one of the first peer's next
        self.going_first: collections.deque[threading.Lock] = collections.deque()  # released before any of `queues`
        self.blamed = {}  # peer: monotonic seconds at which the blame ends
        self.lock = threading.Lock()
        self.thread = threading.local()
        self.blocking: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.counters = Counters()

    def blame(self, peer: str):
        """Record that this peer sent a wrong secret, for BLAME_SECONDS."""
        now = time.monotonic()
        with self.lock:
            if len(self.blamed) >= 4096:
                self.blamed = {other: until for other, until in self.blamed.items() if until > now}
                if len(self.blamed) >= 4096:
                    self.blamed = {}
            self.blamed[peer] = now + BLAME_SECONDS

    def is_blamed(self, peer: str) -> bool:
        return self.blamed.get(peer, 0) > time.monotonic()

    def is_full(self, peer: str) -> bool:
        """Return whether this peer may take no further slot.

        Half of the slots are reserved for peers that hold none, so one fast guesser cannot fill the gate.
        """
        capacity = min(self.capacity, self.blamed_capacity) if self.is_blamed(peer) else self.capacity
        return self.in_use >= (capacity // 2 if peer and self.per_peer[peer] else capacity)

    def expected_wait(self, peer: str) -> float:
        """Return how many seconds a new request of this peer would wait: the gate serves peers round robin."""
        before = self.per_peer[peer] + 1
        return sum(min(count, before) for count in self.per_peer.values()) * self.mean_seconds / self.max_running

    @contextlib.contextmanager
    def slot(self, peer="", goes_first=False):
        """Hold a slot while waiting and hashing; nested calls of a thread share one. Raises Busy if none is free.

        With `goes_first` there always is one, and its hash runs as soon as one that runs has ended.
        """
        if getattr(self.thread, "has_slot", False):
            yield
            return
        with self.lock:
            wait = self.expected_wait(peer)
            if not goes_first and (self.is_full(peer) or wait > MAX_WAIT):
                self.counters.add(ARGON2_REFUSALS)
                raise Busy("the Argon2 gate is full", min(MAX_WAIT, int(wait) + 1))
            self.in_use += 1
            self.counters.add(ARGON2_QUEUE)
            self.per_peer[peer] += 1
        self.thread.has_slot, self.thread.peer, self.thread.goes_first = True, peer, goes_first
        try:
            with self.blocking():
                yield
        finally:
            self.thread.has_slot = False
            with self.lock:
                self.in_use -= 1
                self.counters.add(ARGON2_QUEUE, by=-1)
                self.per_peer[peer] -= 1
                if not self.per_peer[peer]:
                    del self.per_peer[peer]

    @contextlib.contextmanager
    def hashing(self):
        """Wait until one of `max_running` may run; the thread holds a slot. Raises Busy after MAX_WAIT.

        The gate serves peers round robin, so a peer with many requests does not delay the others.
        """
        waiter, peer, goes_first = threading.Lock(), self.thread.peer, self.thread.goes_first
        queued_at = time.monotonic()
        with self.lock:
            if self.running < self.max_running:
                self.running += 1
            else:
                waiter.acquire()
                (self.going_first if goes_first else self.queues.setdefault(peer, collections.deque())).append(waiter)
        if not waiter.acquire(timeout=MAX_WAIT):
            with self.lock:
                if not waiter.acquire(blocking=False):  # it may have been released since the timeout
                    (self.going_first if goes_first else self.queues[peer]).remove(waiter)
                    if not goes_first and not self.queues[peer]:
                        del self.queues[peer]
                    self.counters.add(ARGON2_REFUSALS)
                    raise Busy("the wait for Argon2 was too long", MAX_WAIT)
        started = time.monotonic()
        self.counters.observe(ARGON2_WAIT_SECONDS, started - queued_at)
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.counters.observe(ARGON2_SECONDS, seconds)
            with self.lock:
                self.mean_seconds += (seconds - self.mean_seconds) / 8
                self.release_next()

    def release_next(self):
        """Let the next hash run, or count one less. The caller holds the lock."""
        if self.going_first:
            self.going_first.popleft().release()
        elif not self.queues:
            self.running -= 1
        else:
            next_peer = next(iter(self.queues))
            queue = self.queues.pop(next_peer)
            queue.popleft().release()
            if queue:
                self.queues[next_peer] = queue


# -- one verification of a name at a time --
# It serves 100 concurrent requests of one client with one hash; without it, each of them would compute its own.


class NameLock:
    """The lock that a thread holds while it verifies the secret of one name."""

    __slots__ = ("lock", "users", "failed")

    def __init__(self):
        self.lock, self.users, self.failed = threading.Lock(), 0, False  # users: threads that hold it or wait


class NameLocks:
    """One verification of a name at a time: other requests wait for it, then find the secret in VerifiedSecrets.

    A waiter occupies no slot of the gate, but it does occupy a thread, so their number has a bound of its own.
    """

    MAX_WAITERS = 32  # of one name that may wait for MAX_WAIT
    ONE_HASH = 1.0  # seconds within which a hash completes

    def __init__(self, gate: HashGate):
        self.gate, self.lock = gate, threading.Lock()
        self.names: dict[tuple[str, str], NameLock] = {}

    def timeout(self, name_lock: NameLock, peer: str, threads_left: bool | None) -> float:
        """Return how many seconds one more thread may wait; `threads_left` is False if no other could serve.

        Requests with the right secret all wait for the same hash, so any number may wait for ONE_HASH. After a
        wrong secret each needs a hash of its own: then only MAX_WAITERS may wait, which leaves other threads free.
        """
        if name_lock.users <= self.MAX_WAITERS and threads_left is not False:
            return MAX_WAIT
        return 0 if name_lock.failed or self.gate.is_blamed(peer) else self.ONE_HASH

    @contextlib.contextmanager
    def hold(self, kind: str, name: str, peer: str):
        """Hold the lock of a name. Raises Busy if too many threads wait for it."""
        with self.gate.blocking() as threads_left:
            with self.lock:
                name_lock = self.names.setdefault((kind, name), NameLock())
                seconds = self.timeout(name_lock, peer, threads_left)
                name_lock.users += 1
            try:
                if not name_lock.lock.acquire(timeout=seconds):
                    raise Busy("too many wait for the verification of one name")
                try:
                    yield name_lock
                finally:
                    name_lock.lock.release()
            finally:
                with self.lock:
                    name_lock.users -= 1
                    if not name_lock.users:
                        del self.names[(kind, name)]

    def blame(self, name_lock: NameLock, peer: str):
        """Record a wrong secret of this name and peer: further requests of either wait under the stricter bound."""
        name_lock.failed = True
        self.gate.blame(peer)


# -- Argon2 in huge pages --
# It saves a quarter of the CPU time of a hash: 16 page faults instead of 8192. Without it, first logins are slower
# than Argon2id alone; with it, both reach 37 a second.

PHC = re.compile(r"\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,3})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
HUGE_PAGE = 2 << 20  # bytes


class Argon2Memory:
    """Computes Argon2 in memory that we map, in huge pages if the kernel provides them."""

    def __init__(self):
        self.local, self.allocate, self.free = threading.local(), None, None
        # Argon2 calls `allocate` once a hash, in the thread that runs compute(). A cffi callback needs memory that
        # is both writable and executable; under systemd's MemoryDenyWriteExecute= Argon2 allocates for itself.
        with contextlib.suppress(MemoryError, SystemError):
            self.free = argon2_ffi.callback("void(uint8_t *, size_t)", lambda address, size: None)
            self.allocate = argon2_ffi.callback("int(uint8_t **, size_t)", self.lend, error=-1)

    def lend(self, address, size):
        """Give Argon2 the area of this thread: the allocate_cbk of argon2_context, 0 for success."""
        start, available = self.local.area
        if size > available:
            return -1
        address[0] = start
        return 0

    def compute(self, password: bytes, salt: bytes, passes, memory, lanes, length) -> bytes:
        """Return Argon2id of a password; `memory` in KiB. RFC 9106 §3.1. Raises Argon2Error, MemoryError, OSError."""
        if self.allocate is None:
            return argon2_raw(password, salt, passes, memory, lanes, length, Argon2Type.ID)
        hash_buffer, password_buffer, salt_buffer = (
            argon2_ffi.new("uint8_t[]", length), argon2_ffi.new("uint8_t[]", password),
            argon2_ffi.new("uint8_t[]", salt),
        )
        context = argon2_ffi.new(
            "argon2_context *",
            {
                "out": hash_buffer, "outlen": length, "pwd": password_buffer, "pwdlen": len(password),
                "salt": salt_buffer, "saltlen": len(salt),
                "t_cost": passes, "m_cost": memory, "lanes": lanes, "threads": lanes, "version": 0x13,
                "allocate_cbk": self.allocate, "free_cbk": self.free,
            },
        )
        size = 1024 * memory
        # Aligned to a huge page by hand: kernels before 6.7 do not align anonymous mappings.
        with mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            with contextlib.suppress(OSError):
                area.madvise(mmap.MADV_HUGEPAGE)
            with argon2_ffi.from_buffer("uint8_t[]", area) as start:
                self.local.area = start + -int(argon2_ffi.cast("uintptr_t", start)) % HUGE_PAGE, size
                status = argon2_core(context, Argon2Type.ID.value)  # it wipes the area
        if status:
            raise VerificationError(argon2_error(status))
        return bytes(argon2_ffi.buffer(hash_buffer))


# -- hashing and verifying --


def parse_phc(phc: str) -> tuple[int, int, int, bytes, bytes] | None:
    """Return memory in KiB, passes, lanes, salt and hash of an Argon2id PHC string of version 19, or None."""
    match = PHC.fullmatch(phc)
    if not match:
        return None
    memory, passes, lanes = map(int, match.groups()[:3])
    try:
        salt, stored = (base64.b64decode(part + "=" * (-len(part) % 4)) for part in match.groups()[3:])
    except ValueError:
        return None
    return memory, passes, lanes, salt, stored


def salt_of(phc: str) -> str | None:
    """Return all that Argon2 takes besides the password - parameters, salt, length - or None if it is not ours."""
    parsed = parse_phc(phc)
    return f"{phc.rpartition('$')[0]}${len(parsed[-1])}" if parsed else None


class Hasher:
    """Argon2id with the configured parameters, behind the gate. RFC 9106."""

    def __init__(self, options: Options):
        self.options = options
        max_running = max(1, len(os.sched_getaffinity(0)) // options.argon2id_parallelism)
        self.gate, self.memory = HashGate(max_running), Argon2Memory()
        self.name_locks = NameLocks(self.gate)

    def parameters(self):
        options = self.options
        return (
            f"$argon2id$v=19$m={options.argon2id_memory},t={options.argon2id_time},p={options.argon2id_parallelism}$"
        )

    def hash(self, password: str, beside: str | None = None) -> str:
        """Return the PHC string of a password or client secret. Raises Busy, HashFailed.

        It has the salt and the parameters of the PHC string `beside` if that is one of ours, so that one computation
        serves to compare a secret with both.
        """
        options = self.options
        salt, passes, memory, lanes, length = (
            os.urandom(options.argon2id_salt_length), options.argon2id_time, options.argon2id_memory,
            options.argon2id_parallelism, options.argon2id_hash_length,
        )
        if beside and (parsed := parse_phc(beside)):
            memory, passes, lanes, salt, stored = parsed
            length = len(stored)
        with self.gate.slot(), self.gate.hashing():
            try:
                return argon2_hash(password.encode(), salt, passes, memory, lanes, length, Argon2Type.ID).decode()
            except (Argon2Error, MemoryError, OSError) as error:
                raise HashFailed(f"Argon2: {error}") from None

    def verify(self, phc: str | None, password: str) -> bool:
        """Return whether a password has this hash. Raises Busy, HashFailed.

        None stands for an account that does not exist: the work is the same, and the result False.
        """
        return self.find_match([phc] if phc is not None else [], password) is not None

    def unknown_hash(self) -> str:
        """Return a PHC string that stands for one that does not exist: no password has it."""
        hashed = base64.b64encode(bytes(self.options.argon2id_hash_length)).rstrip(b"=").decode()
        salt = base64.b64encode(os.urandom(self.options.argon2id_salt_length)).rstrip(b"=").decode()
        return f"{self.parameters()}{salt}${hashed}"

    def find_match(self, hashes: Sequence[str], password: str) -> str | None:
        """Return which of some PHC strings is that of a password, or None. Raises Busy, HashFailed.

        Argon2 is computed once for all that share salt and parameters, and once if there is none.
        """
        if not hashes:
            self.match_group([self.unknown_hash()], password)
            return None
        groups: dict[str, list[str]] = {}
        for phc in hashes:
            groups.setdefault(salt_of(phc) or phc, []).append(phc)
        for group in groups.values():
            found = self.match_group(group, password)
            if found is not None:
                return found
        return None

    def match_group(self, group: Sequence[str], password: str) -> str | None:
        """Return which PHC string, of some that share salt and parameters, is that of a password, or None."""
        parsed = parse_phc(group[0])
        with self.gate.slot(), self.gate.hashing():
            try:
                if parsed is None:  # another variant or version of Argon2, or malformed: the library decides
                    return group[0] if argon2_verify(group[0].encode(), password.encode(), Argon2Type.ID) else None
                memory, passes, lanes, salt, stored = parsed
                computed = self.memory.compute(password.encode(), salt, passes, memory, lanes, len(stored))
            except (Argon2Error, MemoryError, OSError) as error:
                # VerificationError: the password is wrong or the stored hash malformed. All else is lack of resources.
                if isinstance(error, VerificationError) and not re.search("allocation|threading", str(error), re.I):
                    return None
                raise HashFailed(f"Argon2: {error}") from None
        stored_hashes = [(phc, parsed[-1]) for phc in group if (parsed := parse_phc(phc))]
        matching = [phc for phc, stored in stored_hashes if hmac.compare_digest(computed, stored)]
        return matching[0] if matching else None


# -- verified secrets --
# They save a client that comes back its Argon2: 2 µs of HMAC-SHA-256. Without them, a box verifies 37 secrets a second.


class VerifiedSecrets:
    """A cache of secrets that Argon2 has accepted, as HMAC digests under a key that only this process has.

    The digest covers the stored hash, so changing a secret invalidates its entry. Each use renews an entry
    for `ttl` + `extra_ttl` seconds, at most a day.
    """

    def __init__(self, ttl, size):
        self.key, self.ttl, self.size = os.urandom(32), ttl, size
        self.entries = {}  # digest: (expires_at, ttl)

    def digest(self, stored_hash, secret):
        return hmac.digest(self.key, stored_hash.encode() + b"\0" + secret.encode(), "sha256")

    def contains(self, stored_hash, secret, now) -> bool:
        digest = self.digest(stored_hash, secret)
        expires_at, ttl = self.entries.get(digest, (now - 1, 0))
        if expires_at < now:
            return False
        self.entries[digest] = now + ttl, ttl
        return True

    def add(self, stored_hash, secret, now, extra_ttl=0):
        if len(self.entries) >= self.size:
            self.entries = {digest: entry for digest, entry in list(self.entries.items()) if entry[0] >= now}
            if len(self.entries) >= self.size:
                self.entries = {}
        ttl = min(self.ttl + extra_ttl, 86400)
        self.entries[self.digest(stored_hash, secret)] = now + ttl, ttl
