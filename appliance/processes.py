"""What a start reads and checks before the first fork; a server process; the supervisor of all of them."""

import base64
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import ipaddress
import math
import mmap
import os
import pwd
import re
import resource
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from appliance.base import StartupError
from appliance.base.clock import IAT_SKEW, RELEASED_AT, Timekeeper, sleep
from appliance.base.settings import Options, check_options, issuer_obstacle
from appliance.base.log import Log
from appliance.base.files import check_folder, file_fingerprint, guard_private, open_owned
from appliance.base.shared import Buckets, ChangeMarks
from appliance.base.metrics import (
    Counters, HTTP_REFUSALS, History, START_AT, WORKER_RESTARTS, WORKERS_ALIVE, WORKERS_CONFIGURED,
)
from appliance.base.database import Generation, Unavailable, database_key
from appliance.base.store import Store
from appliance.base.keys import next_promotion_at, read_ring
from appliance.base.tls import PortCertificate
from appliance.base.wire import (
    Limits, MAX_THREADS, Server, find_listener, listen, listen_at_machine, listen_shared, pause_listening,
)
from microauthd import (
    ADMIN, AUTH, App, HERE, Idp, KeyRing, Problem, SLASH, Seal, VERSION, guard_admin, refuse_early, ring_files,
)
from appliance.authority import keep_certificate, needs_work
from appliance.machine import MACHINE
from appliance.status import TRIAL_SUFFIX, list_children, read_status
from appliance.upkeep import BackupThread, ClockThread, RefusalThread, Upkeep, log_audit_head, log_log_damage
from appliance.figures import FigureThread

# == Processes =================================================================
# A supervisor without threads forks everything that serves, so a child can be replaced at any time
# by forking again: one process for ADMIN and upkeep, `workers` for AUTH. Listening sockets are made
# before the first fork and stay open here, so while a child is replaced its connections wait.


class LocalSocket(msgspec.Struct):
    """The Unix socket of ADMIN, for whoever is at the machine."""

    sock: socket.socket
    path: str
    file_id: tuple[int, int] | None  # device and inode; None once the file was removed
    users: frozenset[int]  # uids that it serves


class StartupState(msgspec.Struct):
    """What a start makes before the first fork: plain data and listening sockets; no thread, key or database handle."""

    options: Options
    database_key: str
    ring_marks: dict
    auth_entries: list
    admin_entries: list
    seal_key: bytes
    auth_sockets: list
    admin_socket: socket.socket
    handed: frozenset[socket.socket]  # those that the service manager made, and keeps
    local: LocalSocket | None
    generation: Generation
    buckets: Buckets
    counters: Counters
    history: History
    clock: Timekeeper
    log: Log
    certificates: dict[str, PortCertificate] = {}


def start_clock(store: Store, log: Log) -> Timekeeper:
    """Return the timekeeper. What was issued at times that it cannot vouch for is revoked."""
    clock = Timekeeper(max(RELEASED_AT, store.clock_floor()))
    now = int(clock())
    if clock.state != "right":
        log(
            "clock." + clock.state, "warning" if clock.state == "probation" else "error", now=now,
            clock=int(time.time()),
        )
    try:
        if clock.state == "guessed":  # the box may have been off for longer than an authorization code lives
            store.delete_logins()
        elif store.newest_at() > now + IAT_SKEW:
            store.revoke_future_rows(now, int(clock() * 1000), now // 30)
    except Unavailable as problem:  # the server can still start, and read
        log("clock.failed", "error", reason=problem.log)
    return clock


def read_certificates(options: Options, self_made: bool) -> dict[str, PortCertificate]:
    """Return the certificate of each port that speaks TLS, of those that the box makes or of the others. Raises
    StartupError.
    """
    certificates = {}
    for side in ("auth", "admin"):
        cert_file, *rest = options.tls_files(side)
        if cert_file and self_made == (cert_file == options.self_made_file):
            certificates[side] = PortCertificate(side, cert_file, *rest)
            try:
                certificates[side].load()
            except ValueError as error:
                raise StartupError(f"{'tls' if self_made else side + '-ssl-cert-file'}: {error}") from None
    return certificates


def prepare_certificate(idp: Idp):
    """Make the certificate of a box with `tls = self` if it is missing or ends soon: see keep_certificate().

    Where one is there and can be served, what keeps it from being renewed does not keep the box from starting.
    """
    try:
        if needs_work(idp.options, idp.store, idp.now(), idp.check_clock()):
            keep_certificate(idp)
    except (OSError, StartupError, Unavailable) as error:
        reason = error.log if isinstance(error, Unavailable) else str(error)
        if not os.path.exists(idp.options.self_made_file):
            raise StartupError(f"tls = self: {reason}") from None
        idp.log("certificate.failed", "error", reason=reason)


def check_certificates(startup: StartupState, at_once=False):
    """Take up certificates whose files have changed. Called every second, and by SIGHUP at once."""
    for certificate in startup.certificates.values():
        certificate.check(startup.clock(), startup.log, at_once)


def read_seal_key(path: str) -> bytes:
    try:
        with os.fdopen(open_owned(path), "rb") as file:
            key = base64.b64decode(file.read().strip(), validate=True)
            guard_private(file.fileno(), path, "it is a key")
    except (OSError, ValueError):
        key = b""
    if len(key) != 32:
        raise StartupError(f"the seal key {path} is missing or damaged: restore a backup")
    return key


# -- sockets of a service manager --

LISTEN_FDS_START = 3  # <systemd/sd-daemon.h>


def take_sockets() -> dict[str, socket.socket]:
    """Return the listening sockets that the service manager has made for this process: auth, admin, local.

    Their names are those of the units, microauthd-auth.socket, or FileDescriptorName=auth; a Unix socket of admin is
    `local`. Raises StartupError: connections to a socket that nobody serves would wait for ever. sd_listen_fds(3)
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    found: dict[str, socket.socket] = {}
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,9}", count):
        return found  # they are another process's
    named = dict(enumerate(names.split(":"), LISTEN_FDS_START))
    for number in range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)):  # the first that is not open ends it
        name = named.get(number, "")
        matched = re.fullmatch(r"(?:microauthd-)?(auth|admin)(?:\.socket)?", name)
        try:
            sock = socket.socket(fileno=number)
            listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise StartupError(f"LISTEN_FDS: descriptor {number}, {name!r}: {error.strerror}") from None
        side = matched[1] if matched else ""
        if sock.family == socket.AF_UNIX and side:
            side = {"admin": "local"}.get(side, "")
        if not side or not listens or side in found:
            raise StartupError(
                f"LISTEN_FDS: descriptor {number}, {name!r}, is not one of what is served: a TCP socket auth, one "
                "admin, and a Unix socket admin, each of them listening (Accept=no)"
            )
        sock.set_inheritable(False)
        sock.setblocking(False)
        found[side] = sock
    return found


def use_addresses(options: Options, handed: Mapping[str, socket.socket]) -> Options:
    """Return the options with the addresses that handed sockets listen on, checked as those of mad.conf are."""
    changes: dict[str, Any] = {}
    for side in {"auth", "admin"} & handed.keys():
        changes[f"{side}_ip"], changes[f"{side}_port"] = handed[side].getsockname()[:2]
    if not changes:
        return options
    origins = dict.fromkeys((name.replace("_", "-") for name in changes), "the socket of the service manager")
    changed = dataclasses.replace(options, origins=options.origins | origins, **changes)
    check_options(changed)
    return changed


PORT_SECONDS = 3  # workers outlive a supervisor that was killed by at most two seconds: run_child()


def bind_ports(
    options: Options, workers: int, handed: Mapping[str, socket.socket]
) -> tuple[list[socket.socket], socket.socket]:
    """Return the sockets of the AUTH workers, and that of ADMIN. Raises StartupError naming a port that is taken.

    Of a socket that was handed in there is one: each worker accepts from it.
    """
    auth_sockets: list[socket.socket] = [handed["auth"]] * workers if "auth" in handed else []
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        try:
            side, ip, port = "auth", options.auth_ip, options.auth_port
            if not auth_sockets:
                auth_sockets = listen_shared(ip, port, workers) if workers > 1 else [listen(ip, port)]
            side, ip, port = "admin", options.admin_ip, options.admin_port
            return auth_sockets, handed.get("admin") or listen(ip, port)
        except OSError as error:
            holder = find_listener(port) if error.errno == errno.EADDRINUSE else 0
            if error.errno == errno.EADDRINUSE and holder != os.getpid() and time.monotonic() < deadline:
                sleep(0.05)
                continue
            for sock in auth_sockets:
                sock.close()
            by = f" by process {holder}" if holder else ""
            hint = f": choose another {side}-port" if error.errno == errno.EADDRINUSE else ""
            raise StartupError(f"cannot listen on {ip} port {port}: {error.strerror}{by}{hint}") from None


LOCAL_SOCKET, MARKS = "admin.sock", "tokens.marks"


def local_socket_folder(options: Options) -> str:
    """Return where the Unix socket of ADMIN lies: RuntimeDirectory= of the service, else beside the database.

    systemd.exec(5)
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return runtime or os.path.dirname(os.path.abspath(options.db_file))


RUNTIME_FOLDER = "/run/microauthd"  # RuntimeDirectory= of the service, which a command does not hear of


def touch_marks(options: Options):
    """Have the programs of this machine ask anew for every token that they keep, after a command that ended some."""
    for folder in {local_socket_folder(options), RUNTIME_FOLDER}:
        ChangeMarks.touch_file(os.path.join(folder, MARKS), options.auth_port)


def find_local_users(options: Options) -> frozenset[int]:
    """Return the uids that are at the machine: root, our own, those that the option names. Raises StartupError."""
    found = {0, os.geteuid()}
    for word in filter(None, options.admin_socket_users.split(",")):
        try:
            found.add(int(word) if word.isdecimal() else pwd.getpwnam(word).pw_uid)
        except KeyError:
            raise StartupError(f"admin-socket-users: this machine has no user {word}") from None
    return frozenset(found)


def bind_local_socket(options: Options, users: frozenset[int], log: Log) -> LocalSocket | None:
    """Return the Unix socket of ADMIN, or None with a warning where there can be none: TCP serves all the same.

    Its mode keeps everybody else out. With admin-socket-users what the kernel says of the peer does that alone, since
    a mode cannot name them.
    """
    folder, deadline = local_socket_folder(options), time.monotonic() + PORT_SECONDS
    path = os.path.join(folder, LOCAL_SOCKET)
    while True:
        try:
            sock = listen_at_machine(folder, LOCAL_SOCKET, 0o666 if options.admin_socket_users else 0o600)
            info = os.lstat(path)
            return LocalSocket(sock, path, (info.st_dev, info.st_ino), users)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                sleep(0.05)  # processes of a server that was killed end within two seconds
                continue
            log("local.unavailable", "warning", path=path, reason=error.strerror)
            return None


def remove_local_socket(local: LocalSocket | None):
    """Remove the file of the Unix socket once, unless another server has replaced it.

    Done before the socket is closed: until then no other file can get its inode.
    """
    with contextlib.suppress(OSError):
        if local:
            info = os.lstat(local.path)
            if local.file_id == (info.st_dev, info.st_ino):
                os.unlink(local.path)
            local.file_id = None


# -- on trial --
# `microauthd upgrade` starts a new release, and goes back to the old one, and to its database, if that does not become
# ready. So that nothing is lost then, the new one answers nothing that it could lose until the upgrade has decided.

TRIED, ACCEPTED, GOING_BACK = b"T", b"A", b"B"  # the first octet of the file: what the upgrade does
READY = b"R"  # the second one: every process of the program on trial serves
OPEN_WHILE_HELD = (
    "/ping", "/version", "/health", "/health/ready", "/jwks.json", "/.well-known/jwks.json",
    "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server",
)


def is_on_trial(path: str, is_ready=False) -> bool:
    """Return whether an upgrade tries this program on a database. If the upgrade has died, the program is accepted.

    `is_ready` tells the upgrade that every process serves.
    """
    try:
        descriptor = open_owned(path + TRIAL_SUFFIX, os.O_RDWR)
    except (OSError, StartupError):
        return False
    try:
        if os.pread(descriptor, 1, 0) != TRIED:
            return False
        if is_ready and os.pread(descriptor, 1, 1) != READY:
            os.pwrite(descriptor, READY, 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(descriptor, ACCEPTED, 0)  # before anything is answered: after that nothing may go back
        os.fsync(descriptor)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def hold_requests(app: Callable, idp: Idp, generation: Generation) -> Callable:
    """Wrap the application of a port so that it refuses what it could lose, as long as this program is on trial."""

    def held(environ, start_response):
        if not generation.held or environ["PATH_INFO"] in OPEN_WHILE_HELD:
            return app(environ, start_response)
        problem = Problem("temporarily_unavailable", log="an upgrade is being tried", retry_after=2)
        return refuse_early(idp, environ, start_response, problem)

    return held


def end_trial(startup: StartupState):
    """Tell the upgrade that every process serves; answer everything once it has accepted this program."""
    generation = startup.generation
    if generation.held and not is_on_trial(startup.options.db_file, is_ready=True):
        generation.held = 0
        startup.log("upgrade.accepted", "notice", version=VERSION)


def journal_socket() -> str:
    """Return the path of the journal's socket if stderr is a stream to the journal of systemd, else "".

    systemd.exec(5): JOURNAL_STREAM names the device and inode of that stream, which may have been redirected since.
    """
    with contextlib.suppress(OSError):
        info = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}":
            return "/run/systemd/journal/socket"
    return ""


def prepare(options: Options, handed: Mapping[str, socket.socket] = MappingProxyType({})) -> StartupState:
    """Check everything a start needs, and bind both ports. Raises StartupError with one sentence.

    `handed` is what take_sockets() found.
    """
    options = use_addresses(options, handed)
    log = Log(options, journal=journal_socket())
    key = database_key(options)
    if options.serve_public_auth_files and os.path.isdir("public"):
        check_folder("public")  # pages that replace the bundled ones
    marks = {
        port_name: file_fingerprint(path) if os.path.exists(path) else None
        for port_name, (path, _, _) in ring_files(options).items()
    }
    auth_entries = read_ring(options.token_signing_key_file, options.token_signing_key_pass)
    admin_entries = read_ring(options.admin_token_signing_key_file, options.admin_token_signing_key_pass)
    seal_key = read_seal_key(options.seal_key_file)
    certificates = read_certificates(options, self_made=False)
    local_users = find_local_users(options)
    # Last of what is read: opening the database recovers its WAL, which writes to it.
    store = Store(options.db_file, key, log=log)
    try:
        store.open(is_audited=options.enable_audit_logging)
        log_log_damage(store, log)
        clock = start_clock(store, log)
        if options.tls == "self":
            rings = (KeyRing(auth_entries), KeyRing(admin_entries))
            prepare_certificate(Idp(options, store, *rings, Seal(seal_key), clock, log))
            certificates |= read_certificates(options, self_made=True)
    finally:
        store.close()
    auth_sockets, admin_socket = bind_ports(options, max(1, options.worker_processes), handed)
    if "local" in handed:
        local: LocalSocket | None = LocalSocket(handed["local"], handed["local"].getsockname(), None, local_users)
    else:
        local = bind_local_socket(options, local_users, log)
    generation = Generation()
    generation.held = is_on_trial(options.db_file)
    # Once the ports are ours: the marks of another server that runs must stay its own.
    mode = 0o644 if os.environ.get("RUNTIME_DIRECTORY") else 0o600  # beside the database every file is ours alone
    generation.marks = ChangeMarks(os.path.join(local_socket_folder(options), MARKS), options.auth_port, mode)
    return StartupState(
        options, key, marks, auth_entries, admin_entries, seal_key, auth_sockets, admin_socket,
        frozenset(handed.values()), local, generation, Buckets(), Counters(len(auth_sockets) + 2), History(), clock,
        log, certificates,
    )


# Whoever is at the machine has threads and connections that no crowd on the network can take.
LOCAL_LIMITS, LOCAL_THREADS = Limits(connections=32), 8
LOCAL_DESCRIPTORS = LOCAL_LIMITS.connections + 2 * LOCAL_THREADS
# For database connections, the log, pipes and the Unix socket: network connections must not take these.
DESCRIPTORS_KEPT = 256 + LOCAL_DESCRIPTORS
# What a process has open besides: the log, locks, pipes and listeners, and the database connections of its own threads.
OTHER_DESCRIPTORS = 48
# What each port has where there are few. A thread has a connection to the database, which is the file and its WAL.
LEAST_CONNECTIONS, LEAST_THREADS = 64, 8
# What a thread takes of the address space: its stack of 8 MB, and some of what it works with.
THREAD_ADDRESS_SPACE = 9 << 20


# With fewer, network connections take those of the database: requests wait for seconds, and some are answered 503.
LEAST_DESCRIPTORS = 2 * (LEAST_CONNECTIONS + 2 * LEAST_THREADS) + LOCAL_DESCRIPTORS + OTHER_DESCRIPTORS
# With less, threads find no room for their stacks, and Argon2 none for its work: the program and the least of threads
# take 370 MB, and hashes that run at once 34 MB each.
LEAST_ADDRESS_SPACE = 512 << 20


def check_limits():
    """Raise StartupError if this process may have too few descriptors or too little memory to serve. getrlimit(2)."""
    limits = (
        # The hard limit: grant_connections() raises the soft one to it.
        (resource.RLIMIT_NOFILE, 1, LEAST_DESCRIPTORS, 1, "open files (ulimit -n, LimitNOFILE=)", ""),
        (resource.RLIMIT_AS, 0, LEAST_ADDRESS_SPACE, 1 << 20, "address space (ulimit -v, LimitAS=)", " MB"),
    )
    for limit, which, least, unit, name, suffix in limits:
        allowed = resource.getrlimit(limit)[which]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise StartupError(
                f"the limit of {name} is {allowed // unit}{suffix}, and the server needs {least // unit}{suffix}"
            )


# What an idle connection takes: measured with 10,000 of TLS 18.5 KB of the process, and 5 KB of the kernel.
CONNECTION_BYTES = 24 << 10
# All ports of all processes together may keep connections in this part of the memory; each has Limits.connections at
# least, and at most so many that the sweep of their deadlines, every half second, takes 20 ms.
CONNECTIONS_SHARE, MOST_CONNECTIONS = 1 / 4, 16384


def memory_bytes() -> int:
    """Return how much memory this process may take: the machine's, or that of its control group if that is less.

    Each group above limits it too; in a container the path is below a root that is not shown. cgroups(7)
    """
    found, path = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), ""
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        path = next((line[3:].strip().rstrip("/") for line in file if line.startswith("0::")), "")
    while True:
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup{path}/memory.max") as limit:
            found = min(found, int(limit.read()))  # or the word max
        if not path:
            return found
        path = path.rpartition("/")[0]


def grant_connections(servers: int, ports: int) -> Limits:
    """Return the limits of each server of this process: as many connections as there are memory and descriptors for.

    `ports` is how many servers all processes have together. The usual soft limit of 1024 descriptors protects programs
    that use select(). It is raised as far as it helps and the hard limit allows. getrlimit(2).
    """
    many = 1 << 20
    affordable = int(memory_bytes() * CONNECTIONS_SHARE) // CONNECTION_BYTES // ports
    most = max(Limits().connections, min(MOST_CONNECTIONS, affordable))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed, target = (many if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    target = min(target, servers * (most + 2 * MAX_THREADS) + DESCRIPTORS_KEPT)
    if allowed < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        allowed = target
    return Limits(connections=max(LEAST_CONNECTIONS, min(most, (allowed - DESCRIPTORS_KEPT) // servers)))


def grant_threads(servers: int, limits: Limits) -> int:
    """Return how many threads each server may have: as many as there is address space for, and descriptors for the
    database, two a thread. getrlimit(2).
    """
    threads = MAX_THREADS
    descriptors, space = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS))
    if descriptors != resource.RLIM_INFINITY:
        left = descriptors - servers * limits.connections - LOCAL_DESCRIPTORS - OTHER_DESCRIPTORS
        threads = min(threads, left // (2 * servers))
    if space != resource.RLIM_INFINITY:
        left = space - LEAST_ADDRESS_SPACE
        threads = min(threads, LEAST_THREADS + left // (THREAD_ADDRESS_SPACE * servers))
    return max(LEAST_THREADS, threads)


class ServerProcess:
    """The servers of one process, with the store, keys and log that they share."""

    def __init__(self, startup: StartupState, slot: int, auth_socket=None, admin_socket=None):
        self.startup, options = startup, startup.options
        startup.generation.slot = slot
        startup.counters.enter(slot)
        self.generation, self.log, self.counters = startup.generation, startup.log, startup.counters
        self.store = Store(options.db_file, startup.database_key, startup.generation, startup.log)
        self.store.clock, self.store.counters = startup.clock, startup.counters
        if options.worker_processes:
            self.store.open_process_write_lock()
        self.store.start_flusher()
        self.upkeep: Upkeep | None = None
        self.clock_thread: ClockThread | None = None
        self.backup_thread: BackupThread | None = None
        self.figure_thread: FigureThread | None = None
        self.servers: list[Server] = []
        self.refusal_thread = RefusalThread([])
        count = sum(listening is not None for listening in (auth_socket, admin_socket))
        limits = grant_connections(count, len(startup.auth_sockets) + 1)
        for name, routes, listening in (("auth", AUTH, auth_socket), ("admin", ADMIN, admin_socket)):
            if listening is None:
                continue
            idp = self.make_idp()
            self.refusal_thread.idps.append(idp)
            app: Callable = App(idp, routes)
            if name == "admin":
                app = guard_admin(app, idp)
                self.upkeep, self.clock_thread = Upkeep(idp), ClockThread(idp)
                self.backup_thread, self.figure_thread = BackupThread(idp), FigureThread(idp)
            if startup.generation.held:
                app = hold_requests(app, idp, startup.generation)
            certificate = startup.certificates.get(name)
            server = Server(
                name, [listening], app, limits=limits, tls=certificate and certificate.context(),
                trusted_proxies=options.trusted_proxies, log=self.refused, max_threads=grant_threads(count, limits),
                slash=SLASH.encode() if name == "admin" else b"",
            )
            server.beat = functools.partial(self.beat, server, certificate)
            self.add_server(server)
            idp.hasher.gate.blocking = server.blocking
            if name == "admin" and startup.local:
                self.add_server(
                    Server(
                        "admin-local", [startup.local.sock], app, limits=LOCAL_LIMITS, log=self.refused, threads=2,
                        max_threads=LOCAL_THREADS, slash=SLASH.encode(), users=startup.local.users,
                    )
                )
                idp.hasher.gate.blocking = self.blocking
        self.store.blocking, self.store.expecting = self.blocking, self.has_queued_requests

    def make_idp(self) -> Idp:
        """Return the Idp of a port: caches and Argon2 gate of one cannot be filled by the other. The throttle is that
        of the box.
        """
        startup, options = self.startup, self.startup.options
        entries = {"auth": startup.auth_entries, "admin": startup.admin_entries}
        local = startup.local.path if startup.local else ""
        machine = msgspec.structs.replace(MACHINE, read_status=functools.partial(read_status, local=local))
        idp = Idp(
            options, self.store, KeyRing(entries["auth"], options.prefer_ec_token_signer),
            KeyRing(entries["admin"], options.prefer_ec_admin_token_signer), Seal(startup.seal_key), startup.clock,
            startup.log, machine, startup.buckets, startup.counters, startup.history,
        )
        idp.certificates = startup.certificates
        # A ring file that changed since it was read has another fingerprint: the first request reads it again.
        idp.ring_versions = {
            port_name: (startup.ring_marks[port_name], next_promotion_at(entries[port_name], options.key_overlap))
            for port_name in entries
        }
        return idp

    def beat(self, server: Server, certificate: PortCertificate | None):
        """Report this process alive, and take up a certificate that has changed. Called at every sweep of a server."""
        self.generation.beat()
        if certificate and (context := certificate.changed_context()):
            server.tls = context

    def add_server(self, server: Server):
        # Each thread opens its connection at once: later, there may be no descriptor left for one.
        server.prepare_thread = lambda: self.store.connection
        server.run_together = self.store.run_together
        self.servers.append(server)

    @contextlib.contextmanager
    def blocking(self):
        """Context manager entered by a thread that is about to wait: its server then starts another, if needed."""
        with contextlib.ExitStack() as stack:
            yield all([stack.enter_context(server.blocking()) for server in self.servers])  # noqa: C419 - each is entered

    def has_queued_requests(self):
        return any(server.requests.has_queued_requests() for server in self.servers)

    def refused(self, event, **fields):
        if event == "refused":
            status = str(fields["status"] or "closed")
            self.counters.add(HTTP_REFUSALS, fields["server"], status, by=fields.get("count", 1))
        self.log(event, "error" if event == "error" else "info", **fields)

    def start(self):
        for server in self.servers:
            server.start()
        self.refusal_thread.start()
        if self.upkeep and self.clock_thread and self.backup_thread and self.figure_thread:
            self.upkeep.start()
            self.clock_thread.start()
            self.backup_thread.start()
            self.figure_thread.start()

    def stop(self):
        """Answer the requests in flight, then write the queued rows."""
        if self.upkeep and self.backup_thread:
            self.upkeep.ending.set()
            self.backup_thread.ending.set()
        stopping = [threading.Thread(target=server.stop, args=(4,)) for server in self.servers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        self.refusal_thread.ending.set()
        self.refusal_thread.write(everything=True)
        if self.clock_thread:
            self.clock_thread.ending.set()
            if self.figure_thread:
                self.figure_thread.ending.set()
            with contextlib.suppress(Unavailable):
                self.clock_thread.save_time()
        self.store.close()


def log_last_audit_head(startup: StartupState):
    """Write the head of the audit log into the log file, after the last process has written its last row."""
    store = Store(startup.options.db_file, startup.database_key, log=startup.log)
    try:
        log_audit_head(store, startup.log)
    except Unavailable as problem:
        startup.log("audit.head", "error", reason=problem.log)
    finally:
        store.close()


STOPPING = {signal.SIGTERM, signal.SIGINT}


def libc(name, *types):
    """Return a function of the C library that takes these types and returns an int.

    cffi is loaded already, by Argon2; ctypes would cost 4 MB. Raises ImportError, AttributeError or OSError elsewhere.
    """
    import _cffi_backend as c

    return c.load_library(None, 0).load_function(
        c.new_function_type(tuple(map(c.new_primitive_type, types)), c.new_primitive_type("int"), False), name
    )


# -- another user --


def change_user(uid: int, gid: int) -> tuple[str, str]:
    """Become another user for good, as root. Return its name and home folder, "" if it has none. Raises OSError."""
    name, home = str(uid), ""
    try:
        found = pwd.getpwuid(uid)
        name, home, gid = found.pw_name, found.pw_dir, found.pw_gid
        os.initgroups(name, gid)
    except KeyError:
        os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)  # last: without root's rights the others would fail
    return name, home


def run_as(uid: int, gid: int, work: Callable[[], bytes]) -> bytes:
    """Run something as another user, in a process of its own, and return what it returns. Raises StartupError.

    For root, where what is made is to belong to that user.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            try:
                change_user(uid, gid)
                if not os.access(HERE / "appliance", os.R_OK | os.X_OK):
                    raise StartupError(f"user {uid} cannot read this program: put it where that user can")
                told = b"+" + work()
            except Exception as error:
                told = b"-" + str(error if isinstance(error, StartupError) else repr(error)).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(told)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    if told[:1] != b"+":
        raise StartupError(told[1:].decode() or "the process that did this was killed; do it again")
    return told[1:]


def fork_as(owner: tuple[int, int] | None, work: Callable[[], None]) -> int:
    """Run something beside this process, as a user and group if there are any. Return the id of the new process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if owner:
            change_user(*owner)
        work()
        status = 0
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C reaches every process of the terminal
        pass
    except BaseException as error:
        print(f"microauthd: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


# -- less memory --
# 10 MB and 5 MB less, as measured below; without these calls, or where one is missing, everything works as well.


def share_one_arena():
    """Keep glibc from giving each thread a heap of its own: with two workers, 5 MB less after load.

    The GIL lets one thread allocate at a time anyway. With another C library nothing changes. mallopt(3).
    """
    with contextlib.suppress(ImportError, AttributeError, OSError):
        libc("mallopt", "int", "int")(-8, 1)  # M_ARENA_MAX of <malloc.h>


def drop_startup_pages():
    """Drop clean pages of the program's files that only the start has read, such as relocations: 10 MB less.

    A mapping without a private page equals the file, so a page that is needed again faults back in. madvise(2).
    """
    with contextlib.suppress(ImportError, AttributeError, OSError), open("/proc/self/smaps", errors="replace") as smaps:
        madvise, begin = libc("madvise", "size_t", "size_t", "int"), 0  # smaps names files, in whatever encoding
        for line in smaps:
            if re.match("[0-9a-f]+-", line):
                address, mode, _, _, inode, *_ = line.split()
                begin, end = (
                    int(word, 16) if mode in ("r-xp", "r--p") and inode != "0" else 0 for word in address.split("-")
                )
            elif begin and line.startswith("Anonymous:") and line.split()[1] == "0":
                madvise(begin, end - begin, mmap.MADV_DONTNEED)


def run_child(startup: StartupState, slot: int, auth_socket, admin_socket, ready: int, lifeline: int):
    """Serve in a forked process until SIGTERM, or until the supervisor dies. Never returns."""
    status = 1
    with contextlib.suppress(ImportError, AttributeError, OSError):
        # Wake a child that SIGSTOP holds when the supervisor dies, so that it ends: otherwise its socket would share
        # the port with the next start. This comes first, for a child can be stopped before it serves.
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        libc("prctl", "int", "long", "long", "long", "long")(pr_set_pdeathsig, signal.SIGCONT, 0, 0, 0)
    try:
        process = ServerProcess(startup, slot, auth_socket, admin_socket)

        def watch():
            os.read(lifeline, 1)  # returns when the supervisor, the only writer, has died
            signal.alarm(2)  # ends this process even if the disk hangs
            process.store.flush()
            os._exit(1)

        threading.Thread(target=watch, name="lifeline", daemon=True).start()
        process.start()
        os.write(ready, bytes([slot - 1]))
        drop_startup_pages()
        # Ctrl-C reaches every process of the terminal; only the supervisor acts on it.
        signal.sigwait({signal.SIGTERM})
        process.stop()
        status = 0
    except StartupError as refusal:
        startup.log("start.failed", "error", reason=refusal)
    except BaseException as error:
        startup.log("start.failed", "error", exc_info=error)
    finally:
        os._exit(status)


STUCK_SECONDS = 20
START_SECONDS = 120  # enough to recover a large WAL on a slow disk


def notify(state: str):
    """Send a state to systemd, if it started this service. sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect("\0" + path[1:] if path[0] == "@" else path)
            channel.send(state.encode())


class Watchdog:
    """Tells systemd that the server is alive, as long as it answers: twice in WatchdogSec= of the service.

    Without a word in that time systemd kills the server and starts it anew. sd_watchdog_enabled(3)
    """

    def __init__(self):
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        is_meant = re.fullmatch("[0-9]{1,18}", usec) and pid in ("", str(os.getpid()))
        self.interval = int(usec) / 2_000_000 if is_meant else 0.0
        self.due = 0.0

    def tell(self, is_answering: bool):
        now = time.monotonic()
        if self.interval and is_answering and now >= self.due:
            notify("WATCHDOG=1")
            self.due = now + self.interval


def is_hung_up(descriptor: int) -> bool:
    """Return whether an open file is a terminal that is gone. poll(2)"""
    events = select.poll()
    events.register(descriptor, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in events.poll(0))


class Terminal:
    """The terminal that this server was started on, if there is one, and whether SIGHUP tells that it has closed.

    A service has none: SIGHUP is reload there, as it is on a terminal that is open. A shell whose window closes may
    send it a moment before the kernel takes the terminal away. Where the signal is ignored, as below nohup(1), the
    server outlives its terminal. termios(3), setsid(2)
    """

    CLOSING_SECONDS = 5

    def __init__(self):
        self.descriptor, self.hung_up_at = -1, -math.inf
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            with contextlib.suppress(OSError):  # there is none
                self.descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)

    def hang_up(self):
        """Note that SIGHUP came."""
        self.hung_up_at = time.monotonic()

    def has_closed(self) -> bool:
        """Return whether SIGHUP came, and the terminal is gone."""
        if self.descriptor < 0 or time.monotonic() - self.hung_up_at > self.CLOSING_SECONDS:
            return False
        return is_hung_up(self.descriptor)


def leave_closed_streams():
    """Lead standard streams whose terminal or reader is gone to /dev/null.

    What is written there would fail, and Python, which flushes its streams at the end, would exit with status 120.
    """
    with open(os.devnull, "r+b", buffering=0) as nothing:
        for number in filter(is_hung_up, range(3)):
            os.dup2(nothing.fileno(), number)


def announce(startup: StartupState):
    options = startup.options
    startup.counters.set(START_AT, startup.clock())
    notify("READY=1")
    startup.log(
        "serving", version=VERSION, pid=os.getpid(), issuer=options.auth_issuer,
        auth=f"{options.auth_ip}:{options.auth_port}", admin=f"{options.admin_ip}:{options.admin_port}",
        local=startup.local.path if startup.local else "", workers=options.worker_processes,
    )
    for side in ("auth", "admin"):
        if side not in startup.certificates and not ipaddress.ip_address(getattr(options, f"{side}_ip")).is_loopback:
            startup.log(
                "insecure", "warning",
                reason=f"{side} speaks plain HTTP beyond this machine, as {side}-insecure-http allows",
            )
    if reason := issuer_obstacle(options):
        startup.log("issuer.unreachable", "warning", reason=reason)


def reap_orphans(children: Container[int], seen: int | None = None) -> int:
    """As the first process of a container, reap what others have left behind: nobody else does. wait(2)

    Return the pid of a zombie that was left alone, or 0. With `seen`, what the last call returned, only that one is
    reaped: a younger one may be a child that one of our threads is about to wait for.
    """
    while os.getpid() == 1:
        try:  # only looked at: the status of a child of ours is for whom it concerns
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return 0
        if found is None or found.si_pid in children or seen not in (None, found.si_pid):
            return found.si_pid if found else 0
        os.waitpid(found.si_pid, os.WNOHANG)
    return 0


class Supervisor:
    """Forks the children, replaces one that dies or hangs, ends them all.

    It never gives up: a child that cannot start is tried again, while the others serve.
    """

    def __init__(self, startup: StartupState, close_in_child=()):
        self.startup, self.close_in_child = startup, close_in_child
        self.watchdog, self.terminal = Watchdog(), Terminal()
        self.children: dict[int, tuple[int, float]] = {}  # pid -> (role number, started)
        startup.counters.set(WORKERS_CONFIGURED, self.roles())
        self.beats: dict[int, tuple[int, float]] = {}  # pid -> its last heartbeat, and seconds since it changed
        self.beats_at = time.monotonic()  # when end_stuck() last compared them
        self.pending: dict[int, float] = {}  # role number -> when to fork it again, monotonic seconds
        self.tries: collections.Counter[int] = collections.Counter()  # role number -> starts that failed in a row
        self.without_memory: set[int] = set()  # role numbers for which fork() failed
        self.lifeline, self.keep = os.pipe()
        self.ready, self.ready_in = os.pipe()

    def roles(self):
        return len(self.startup.auth_sockets) + 1  # AUTH workers, then ADMIN

    def fork(self, number):
        if not self.children:
            self.startup.generation.file_ids = (0,) * 6  # nobody has the database open
        self.startup.generation.beats[number + 1] = 0
        try:
            pid = os.fork()
        except OSError as error:  # no memory, or as many processes as are allowed
            if number not in self.without_memory:
                self.startup.log("worker.owed", "error", reason=error.strerror)
                self.without_memory.add(number)
            self.schedule_restart(number)
            return
        if pid == 0:
            # No exception may leave the child's code: it would run the supervisor's.
            try:
                os.close(self.keep)
                for descriptor in self.close_in_child:
                    os.close(descriptor)
                startup = self.startup
                auth = startup.auth_sockets[number] if number < len(startup.auth_sockets) else None
                # Close the other sockets: a copy here would keep a port open that its own process has closed.
                for other in (*startup.auth_sockets, startup.admin_socket):
                    if other is not (auth or startup.admin_socket):
                        other.close()
                if auth and startup.local:
                    startup.local.sock.close()
                admin = None if auth else startup.admin_socket
                run_child(startup, number + 1, auth, admin, self.ready_in, self.lifeline)
            finally:
                os._exit(1)
        self.children[pid] = (number, time.monotonic())
        self.pending.pop(number, None)
        self.without_memory.discard(number)

    def schedule_restart(self, number):
        """Fork it again in 0.2 s, after ten failures every 5 s; until then other workers take its connections."""
        self.tries[number] += 1
        often = self.tries[number] <= 10
        self.pending[number] = time.monotonic() + (0.2 if often else 5)
        sock = (*self.startup.auth_sockets, self.startup.admin_socket)[number]
        # A socket of the service manager is that of all workers, and its connections wait for the next start too.
        if not often and sock not in self.startup.handed:
            pause_listening(sock)  # it listens again when a child serves it

    def restart_due(self):
        """Fork what is due."""
        for number, due in list(self.pending.items()):
            if due <= time.monotonic():
                self.fork(number)

    def run(self) -> int:
        import gc

        gc.collect()
        gc.freeze()  # the collector would write to shared pages, and so copy them
        for number in range(self.roles()):
            self.fork(number)
        reported: set[int] = set()
        while len(reported) < self.roles():
            dead = list(self.reap())  # before the pipe is read, so that a report of a dead child has arrived
            # Not once more when all have reported: the start would take 50 ms longer, for nothing.
            while len(reported) < self.roles() and select.select([self.ready], [], [], 0 if dead else 0.05)[0]:
                reported |= set(os.read(self.ready, 64))
            for number, _, _, status in dead:
                if number not in reported and os.WIFEXITED(status):  # it could not start, and has logged why
                    self.end()
                    return 1
                reported.discard(number)
                self.fork(number)
            self.restart_due()
            if signal.sigtimedwait(STOPPING, 0):
                return self.end()
        announce(self.startup)
        drop_startup_pages()
        return self.watch()

    def reap(self):
        """Yield (role number, seconds it lived, pid, status) of each child that has died."""
        for pid in list(self.children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.startup.generation.bump()  # it may have died after COMMIT and before bump()
                number, started = self.children.pop(pid)
                yield number, time.monotonic() - started, pid, status
        reap_orphans(self.children)

    def end_stuck(self):
        """Kill a child whose heartbeat has stood still for STUCK_SECONDS, or has not begun within START_SECONDS.

        It is stopped or hangs, and its connections would wait for ever.
        """
        generation, known, now = self.startup.generation, self.beats, time.monotonic()
        # At most two seconds count: if every process was stopped, or the machine slept, no child hung.
        passed = min(2.0, now - self.beats_at)
        self.beats, self.beats_at = {}, now
        for pid, (number, _) in self.children.items():
            count = generation.beats[number + 1]
            before, still = known.get(pid, (count, 0.0))
            still = still + passed if count == before else 0.0
            if still > (STUCK_SECONDS if count else START_SECONDS):
                os.kill(pid, signal.SIGKILL)
                self.startup.log("worker.stuck", "error", pid=pid, seconds=round(still))
                still = 0.0
            self.beats[pid] = count, still

    def is_answering(self) -> bool:
        """Return whether ADMIN and at least one AUTH worker live and serve: their heartbeats go on.

        A single worker that hangs is replaced here, and is no matter for systemd.
        """
        well = {
            self.children[pid][0]
            for pid, (count, still) in self.beats.items()
            if count and still < STUCK_SECONDS and pid in self.children
        }
        admin = self.roles() - 1
        return admin in well and bool(well - {admin})

    def watch(self) -> int:
        while True:
            # The time-out guards against a SIGCHLD that came between reap() and here.
            is_brisk = self.pending or self.startup.generation.held
            info = signal.sigtimedwait(STOPPING | {signal.SIGCHLD, signal.SIGHUP}, 0.1 if is_brisk else 1.0)
            hung_up = info is not None and info.si_signo == signal.SIGHUP
            if hung_up:
                self.terminal.hang_up()
            if self.terminal.has_closed() or (info and info.si_signo in STOPPING):
                leave_closed_streams()
                return self.end()
            with contextlib.suppress(MemoryError):  # the next turn finds what this one could not do
                self.check_children(hung_up)
                self.watchdog.tell(self.is_answering())

    def check_children(self, reload):
        """One turn of the watch: replace children that died, kill those that hang, fork what is due."""
        end_trial(self.startup)
        if reload:
            self.startup.generation.bump()
            self.startup.log("caches.dropped")
        check_certificates(self.startup, reload)
        for number, lived, pid, status in self.reap():
            if lived < 2:
                self.schedule_restart(number)
            else:
                self.tries[number] = 0
                self.fork(number)
            exit_code = os.waitstatus_to_exitcode(status)
            self.startup.counters.add(WORKER_RESTARTS)
            self.startup.log("worker.died", "error", pid=pid, status=exit_code, lived=round(lived))
        while select.select([self.ready], [], [], 0)[0]:
            os.read(self.ready, 4096)  # a full pipe, after 65,536 starts, would block the next child
        alive = {number for number, _ in self.children.values()}
        for number in range(self.roles()):  # also those that a MemoryError kept from being scheduled
            if number not in alive and number not in self.pending:
                self.pending[number] = 0.0
        self.restart_due()
        self.end_stuck()
        beats = self.startup.generation.beats
        self.startup.counters.set(
            WORKERS_ALIVE, sum(beats[number + 1] > 0 for number, _ in self.children.values())
        )

    def end(self) -> int:
        """Send SIGTERM to all, and SIGKILL after five seconds to those that are left."""
        notify("STOPPING=1")
        for server_socket in (*self.startup.auth_sockets, self.startup.admin_socket):
            server_socket.close()
        remove_local_socket(self.startup.local)
        if self.startup.local:
            self.startup.local.sock.close()
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline, status = time.monotonic() + 4.7, 0
        while self.children and time.monotonic() < deadline:
            for _ in self.reap():
                pass
            sleep(0.005)
        for pid in self.children:
            self.startup.log("worker.killed", "error", pid=pid)
            os.kill(pid, signal.SIGKILL)
            status = 1
        log_last_audit_head(self.startup)
        self.startup.log("stopped")
        return status


@contextlib.contextmanager
def hold_database(path: str):
    """Hold the lock of a database while it is served or set up. Raises StartupError naming the pid that holds it."""
    try:
        check_folder(os.path.dirname(os.path.abspath(path)))  # before anything is made there
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"the folder of the database {path} cannot be written: {error.strerror}") from None
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sleep(0.02)  # find_server() may have it for a moment
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise StartupError(f"microauthd is running on {path} already, as process {pid}: stop it first") from None
        try:
            os.pwrite(descriptor, (b"%d" % os.getpid()).ljust(20, b"\n"), 0)  # the mark of the log stands behind it
        except OSError as error:
            raise StartupError(f"the folder of the database {path} cannot be written: {error.strerror}") from None
        yield descriptor
    finally:
        os.close(descriptor)


def find_server(path: str) -> int:
    """Return the pid of the server that holds the lock of a database, -1 if it cannot be told, 0 if none does.

    It takes the lock itself for a moment: hold_database() tries twice. A process that has the database open must not
    call this, because closing the file drops its fcntl locks. fcntl(2)
    """
    try:
        descriptor = os.open(path + ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return 0
    except BlockingIOError:
        word = os.read(descriptor, 20).split()
        return int(word[0]) if word and word[0].isdigit() else -1
    finally:
        os.close(descriptor)


ANSWER_SECONDS = 5


def connect_local(options: Options, pid: int) -> tuple[socket.socket | None, str]:
    """Return a connection to the Unix socket on which a server listens, and its path; None and "" if there is none."""
    for folder in dict.fromkeys((local_socket_folder(options), RUNTIME_FOLDER, os.path.dirname(options.db_file))):
        path = os.path.join(os.path.abspath(folder), LOCAL_SOCKET)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):
            sock.settimeout(ANSWER_SECONDS)
            sock.connect(path)
            # Another box of this machine may have a socket there. Process 1 has made it if systemd listens. unix(7)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[0] in (pid, *list_children(pid), 1):
                return sock, path
        sock.close()
    return None, ""


def connect_admin(options: Options) -> socket.socket:
    """Return a connection to the TCP port of ADMIN. Nothing secret may be sent: its certificate is not verified."""
    ip = ipaddress.ip_address(options.admin_ip)
    host = ("::1" if ip.version == 6 else "127.0.0.1") if ip.is_unspecified else str(ip)
    sock = socket.create_connection((host, options.admin_port), ANSWER_SECONDS)
    if not options.tls_files("admin")[0]:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(sock)


def ask_ready(options: Options, pid: int) -> tuple[dict[str, bool], str]:
    """Return the checks of GET /health/ready as a running server answers, and the path of its Unix socket.

    A server that does not answer has failed the check `answer`, which is in no other result.
    """
    path = ""
    try:
        sock, path = connect_local(options, pid)
        with sock or connect_admin(options) as connection:
            host = options.admin_domain if sock is None else "localhost"
            connection.sendall(f"GET /health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=dict)["checks"], path
    except (OSError, ValueError, KeyError, msgspec.MsgspecError):
        return {"answer": False}, path


def serve_prepared(startup: StartupState, lock: int) -> int:
    """Serve in this process, or in those that it forks, until SIGTERM or Ctrl-C. Returns the exit status."""
    if startup.options.worker_processes:
        return Supervisor(startup, [lock]).run()
    watchdog, terminal = Watchdog(), Terminal()
    process = ServerProcess(startup, 0, startup.auth_sockets[0], startup.admin_socket)
    process.start()
    for gauge in (WORKERS_CONFIGURED, WORKERS_ALIVE):
        startup.counters.set(gauge, 1)
    announce(startup)
    drop_startup_pages()
    beat = zombie = 0
    while not terminal.has_closed():
        seconds = 0.1 if startup.generation.held else 1.0
        info = signal.sigtimedwait(STOPPING | {signal.SIGHUP, signal.SIGCHLD}, seconds)
        if info and info.si_signo in STOPPING:
            break
        end_trial(startup)
        is_reload = info is not None and info.si_signo == signal.SIGHUP
        if is_reload:
            terminal.hang_up()
            startup.generation.bump()
        with contextlib.suppress(MemoryError):
            check_certificates(startup, at_once=is_reload)
        zombie = reap_orphans((), zombie)
        beat, before = startup.generation.beats[0], beat
        watchdog.tell(beat != before)
    leave_closed_streams()
    notify("STOPPING=1")
    remove_local_socket(startup.local)
    process.stop()
    log_last_audit_head(startup)
    startup.log("stopped")
    return 0


def serve(options: Options) -> int:
    """Serve both ports until SIGTERM or Ctrl-C. Returns the exit status."""
    check_limits()
    handed = take_sockets()
    # Block the signals before the first thread and wait for them: a handler could run just before the wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING | {signal.SIGHUP, signal.SIGCHLD})
    # If the parent ignored SIGCHLD, so does this process, and the end of a child would be lost. wait(2).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    share_one_arena()
    with hold_database(options.db_file) as lock:
        startup = prepare(options, handed)
        try:
            return serve_prepared(startup, lock)
        finally:
            remove_local_socket(startup.local)
