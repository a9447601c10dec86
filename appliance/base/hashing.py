"""Argon2id: the memory it works in, a bound on how many hashes run and wait, and what it has accepted."""

import base64
import collections
import contextlib
import hmac
import mmap
import os
import re
import threading
import time
from collections.abc import Callable

from argon2.exceptions import Argon2Error, VerificationError
from argon2.low_level import (
    Type as Argon2Type, core as argon2_core, error_to_str as argon2_error, ffi as argon2_ffi,
    hash_secret as argon2_hash, hash_secret_raw as argon2_raw, verify_secret as argon2_verify,
)

from appliance.base.settings import Options


class Busy(Exception):
    """Too many wait for Argon2. `log` is for the operator; `retry_after` is seconds."""

    def __init__(self, log: str, retry_after=1):
        super().__init__(log)
        self.log, self.retry_after = log, retry_after


class HashFailed(Exception):
    """Argon2 could not be computed: the machine lacks memory or threads."""


MAX_WAIT = 10  # seconds anybody is kept waiting for Argon2
BLAME_SECONDS = 60    # seconds a peer is remembered to have sent a wrong secret


class HashGate:
    """Bounds the Argon2 work of a process: some run, some wait, the rest are told to come back.

    Each hash takes tens of megabytes and milliseconds, so an unbounded number of logins would be
    a way to exhaust the box. All services of a box are one peer, and after a power cut all of them
    come at once: a crowd that sent nothing wrong gets many places, whoever guesses gets few.
    `blocking` is set by the server: it keeps threads free for those who need no hashing.
    """

    def __init__(self, max_running, max_waiting=320, max_waiting_blamed=60):
        self.max_running, self.running = max_running, 0
        self.capacity, self.blamed_capacity = max_running + max_waiting, max_running + max_waiting_blamed
        self.in_use = 0  # places, in all
        self.per_peer: collections.Counter[str] = collections.Counter()  # and by peer
        self.mean_seconds = 0.0  # a hash takes, as it was of late; from below, as the first ones after a start say little
        self.queues = {}  # peer: who waits to hash, each a lock its turn will open; the peer at the front is next
        self.blamed = {}  # peer: monotonic seconds until it is forgotten
        self.lock = threading.Lock()
        self.thread = threading.local()
        self.blocking: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def blame(self, peer: str):
        """Remember for a while that a secret from this peer was wrong."""
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
        """Is there no place for one more of this peer?

        The second half is for peers that hold none: whoever guesses as fast as it can leaves places to the others.
        """
        capacity = min(self.capacity, self.blamed_capacity) if self.is_blamed(peer) else self.capacity
        return self.in_use >= (capacity // 2 if peer and self.per_peer[peer] else capacity)

    def expected_wait(self, peer: str) -> float:
        """Return how many seconds one more of this peer would wait: peers take turns, the biggest crowd ends last."""
        before = self.per_peer[peer] + 1
        return sum(min(count, before) for count in self.per_peer.values()) * self.mean_seconds / self.max_running

    @contextlib.contextmanager
    def slot(self, peer=""):
        """Hold one of the places while waiting or hashing; a thread needs one only. Raises Busy when there is none."""
        if getattr(self.thread, "has_slot", False):
            yield
            return
        with self.lock:
            wait = self.expected_wait(peer)
            if self.is_full(peer) or wait > MAX_WAIT:
                raise Busy("the Argon2 gate is full", min(MAX_WAIT, int(wait) + 1))
            self.in_use += 1
            self.per_peer[peer] += 1
        self.thread.has_slot, self.thread.peer = True, peer
        try:
            with self.blocking():
                yield
        finally:
            self.thread.has_slot = False
            with self.lock:
                self.in_use -= 1
                self.per_peer[peer] -= 1
                if not self.per_peer[peer]:
                    del self.per_peer[peer]

    @contextlib.contextmanager
    def hashing(self):
        """Be one of those that run; a place is held. Raises Busy where that takes too long.

        Peers take turns: the crowd of one keeps no other waiting.
        """
        waiter, peer = threading.Lock(), self.thread.peer
        with self.lock:
            if self.running < self.max_running:
                self.running += 1
            else:
                waiter.acquire()
                self.queues.setdefault(peer, collections.deque()).append(waiter)
        if not waiter.acquire(timeout=MAX_WAIT):
            with self.lock:
                if not waiter.acquire(blocking=False):  # it has not come in this very moment
                    self.queues[peer].remove(waiter)
                    if not self.queues[peer]:
                        del self.queues[peer]
                    raise Busy("the wait for Argon2 was too long", MAX_WAIT)
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            with self.lock:
                self.mean_seconds += (seconds - self.mean_seconds) / 8
                if not self.queues:
                    self.running -= 1
                else:
                    next_peer = next(iter(self.queues))
                    queue = self.queues.pop(next_peer)
                    queue.popleft().release()
                    if queue:
                        self.queues[next_peer] = queue


class NameLock:
    """The verification of one name that is under way."""

    __slots__ = ("lock", "users", "failed")

    def __init__(self):
        self.lock, self.users, self.failed = threading.Lock(), 0, False  # count: of who verifies or waits


class NameLocks:
    """One verification of a name at a time: whoever comes meanwhile waits, and finds the secret remembered.

    Who waits takes no place at the gate, but a thread; hence a bound of its own.
    """

    MAX_WAITERS = 32  # of one name, for as long as anybody is kept waiting
    ONE_HASH = 1.0  # seconds, enough for a hash

    def __init__(self, gate: HashGate):
        self.gate, self.lock = gate, threading.Lock()
        self.names: dict[tuple[str, str], NameLock] = {}

    def timeout(self, name_lock: NameLock, peer: str, threads_left: bool | None) -> float:
        """Return how many seconds one more may wait for this name; `threads_left` is False where no thread would be left.

        A crowd with the right secret waits for one hash, so a moment is granted to all of it. Once a secret of it was
        wrong, that is for each of them: then only so many wait as leave threads to the others.
        """
        if name_lock.users <= self.MAX_WAITERS and threads_left is not False:
            return MAX_WAIT
        return 0 if name_lock.failed or self.gate.is_blamed(peer) else self.ONE_HASH

    @contextlib.contextmanager
    def hold(self, kind: str, name: str, peer: str):
        """Hold the turn of a name. Raises Busy where too many wait for it."""
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
        """A secret was wrong, in the turn that is held: neither its name nor its peer is taken for a good crowd."""
        name_lock.failed = True
        self.gate.blame(peer)


PHC = re.compile(r"\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,3})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
HUGE_PAGE = 2 << 20  # bytes


class Argon2Memory:
    """Memory for Argon2 in huge pages, where the kernel gives them: 16 page faults a hash instead of 8192, a quarter
    less CPU.
    """

    def __init__(self):
        self.local, self.allocate, self.free = threading.local(), None, None
        # Argon2 asks in the thread that called it, once a hash, for what compute() has made. Where memory is never
        # written and executed both (systemd's MemoryDenyWriteExecute), there is no asking back: it takes its own.
        with contextlib.suppress(MemoryError, SystemError):
            self.free = argon2_ffi.callback("void(uint8_t *, size_t)", lambda address, size: None)
            self.allocate = argon2_ffi.callback("int(uint8_t **, size_t)", self.lend, error=-1)

    def lend(self, address, size):
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
        # Begun at a huge page; kernels before 6.7 do not see to that.
        with mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            with contextlib.suppress(OSError):
                area.madvise(mmap.MADV_HUGEPAGE)
            with argon2_ffi.from_buffer("uint8_t[]", area) as start:
                self.local.area = start + -int(argon2_ffi.cast("uintptr_t", start)) % HUGE_PAGE, size
                status = argon2_core(context, Argon2Type.ID.value)  # which wipes the area
        if status:
            raise VerificationError(argon2_error(status))
        return bytes(argon2_ffi.buffer(hash_buffer))


class Hasher:
    """Argon2id with the parameters in force, behind the gate. RFC 9106."""

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

    def hash(self, password: str) -> str:
        """Return the PHC string of a password or client secret."""
        options = self.options
        with self.gate.slot(), self.gate.hashing():
            try:
                return argon2_hash(
                    password.encode(), os.urandom(options.argon2id_salt_length), options.argon2id_time,
                    options.argon2id_memory, options.argon2id_parallelism, options.argon2id_hash_length, Argon2Type.ID,
                ).decode()
            except (Argon2Error, MemoryError, OSError) as error:
                raise HashFailed(f"Argon2: {error}") from None

    def verify(self, phc: str | None, password: str) -> bool:
        """Compare in constant time. None stands for an account that does not exist: the same work, and False."""
        exists = phc is not None
        if phc is None:
            unknown = base64.b64encode(bytes(self.options.argon2id_hash_length)).rstrip(b"=").decode()
            salt = base64.b64encode(os.urandom(self.options.argon2id_salt_length)).rstrip(b"=").decode()
            phc = f"{self.parameters()}{salt}${unknown}"
        with self.gate.slot(), self.gate.hashing():
            try:
                return self.matches(phc, password.encode()) and exists
            except (Argon2Error, MemoryError, OSError) as error:
                # A wrong password, or a stored hash that is none; what else fails is the machine.
                if isinstance(error, VerificationError) and not re.search("allocation|threading", str(error), re.I):
                    return False
                raise HashFailed(f"Argon2: {error}") from None

    def matches(self, phc: str, password: bytes) -> bool:
        match = PHC.fullmatch(phc)
        if not match:  # of another version or kind: the library knows what to say
            return argon2_verify(phc.encode(), password, Argon2Type.ID)
        memory, passes, lanes = map(int, match.groups()[:3])
        try:
            salt, stored = (base64.b64decode(part + "=" * (-len(part) % 4)) for part in match.groups()[3:])
        except ValueError:
            return False
        return hmac.compare_digest(self.memory.compute(password, salt, passes, memory, lanes, len(stored)), stored)


class VerifiedSecrets:
    """Remembers for a while which secrets Argon2 has accepted, as digests under a key only this process has.

    The stored hash is part of what is digested, so a changed secret is forgotten by itself. Each use
    begins the while anew: `ttl` seconds, and as many `extra_ttl` as it was learned with, at most a day in all.
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
