"""How the box is, and what needs attention: one source for `microauthd status`, GET /status and `mad status`."""

import contextlib
import os
import ssl
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec
import sqlcipher3

from appliance.base.clock import RELEASED_AT, Timekeeper
from appliance.base.settings import Options, issuer_obstacle
from appliance.base.store import FOREVER, MIGRATIONS
from appliance.base.tls import PortCertificate, WARNING_DAYS
from appliance.base.objects import (
    Attention, BackupPlan, CertificateObject, ClockObject, Disk, Endpoint, LastBackup, Severity, StatusObject,
    Workers, iso, read_time,
)
from microauthd import Idp, VERSION, check_readiness
from appliance.backup import read_schedule
from appliance.authority import CA_WARNING_DAYS, describe_authority

# == Gathering =================================================================
# What is read from the machine and the database.


def read_start(pid: int, now: float) -> int | None:
    """Return the Unix seconds when a process began, by the time that the server goes by. proc_pid_stat(5)"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        with open("/proc/uptime", "rb") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return int(now - (uptime - ticks / os.sysconf("SC_CLK_TCK")))


def list_children(pid: int) -> list[int]:
    """Return the pids of the children of a process that has one thread; none if it has ended. proc_pid_children(5)"""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return []


def certificates_of(idp: Idp) -> dict[str, PortCertificate]:
    """Return the certificate of each port that speaks TLS: what the server has in force, else what stands in files."""
    if idp.certificates:
        return idp.certificates
    files = {side: idp.options.tls_files(side) for side in ("auth", "admin")}
    found = {side: PortCertificate(side, *names) for side, names in files.items() if names[0]}
    for certificate in found.values():
        with contextlib.suppress(ValueError):  # attend_certificates() says why
            certificate.load()
    return found


def describe_served(certificates: dict[str, PortCertificate], side: str) -> CertificateObject | None:
    """Return what the certificate of a port says, or None where there is none or it cannot be read."""
    certificate = certificates.get(side)
    described = certificate.describe() if certificate and certificate.in_force else None
    if described is None:
        return None
    fingerprint = described.sha256.replace(":", "").lower()
    return CertificateObject(iso(described.not_before), iso(described.not_after), fingerprint, described.names)


def size_of(path: str) -> int:
    """Return the size of a file in octets, 0 if there is none."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def measure_disk(options: Options, path: str) -> Disk:
    room = os.statvfs(os.path.dirname(os.path.abspath(path)))
    logs = [options.log_file, *(f"{options.log_file}.{number}" for number in range(1, 11))] if options.log_file else []
    return Disk(
        room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize, size_of(path), size_of(path + "-wal"),
        sum(map(size_of, logs)),
    )


def read_record(idp: Idp, name: str) -> dict:
    """Return the JSON object that the database holds under a name, empty if there is none."""
    found = idp.store.meta(name)
    return msgspec.json.decode(found, type=dict) if found else {}


def read_last_backup(idp: Idp) -> LastBackup | None:
    known, restored_at = read_record(idp, "last_backup"), int(idp.store.meta("backed_up_at", "0"))
    if known and known["at"] >= restored_at:
        return LastBackup(iso(known["at"]), known["name"], known["bytes"], known["kind"])
    # This database came out of a backup: that one stands somewhere.
    return LastBackup(iso(restored_at), "", 0, "restored") if restored_at else None


def read_backup_plan(idp: Idp) -> BackupPlan:
    options, known = idp.options, read_schedule(idp)
    next_at = min(known.next_at, idp.now() + options.backup_every) if options.backup_every else 0
    return BackupPlan(
        options.backup_every, options.backup_keep, os.path.abspath(options.backup_folder), iso(next_at),
        iso(known.failed_at), known.failure, known.failures,
    )


def list_endpoints(options: Options, local: str) -> list[Endpoint]:
    ports = [
        Endpoint(
            side, getattr(options, f"{side}_ip"), getattr(options, f"{side}_port"),
            bool(options.tls_files(side)[0]),
        )
        for side in ("auth", "admin")
    ]
    return [*ports, Endpoint("local", path=local)] if local else ports


def clock_state(idp: Idp) -> str:
    """Return the state of the server's timekeeper, or what one that begins now would say."""
    if isinstance(idp.clock, Timekeeper):
        return idp.clock.state
    return Timekeeper(max(RELEASED_AT, idp.store.clock_floor()), wall=idp.clock).state_at_start


# == Attention =================================================================
# What an operator has to settle. Each function looks at one thing and yields what is wrong with it: a new one is a
# function and a line of ATTENTION.


def attend_readiness(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    texts = {
        "database": "the database cannot be written, and every change is refused",
        "keys": "no signing key could be loaded",
        "answer": "the server runs, and does not answer",
    }
    for name, text in texts.items():
        if not status.checks.get(name, True):
            yield Attention("not_ready", "error", None, text, "microauthd help faults")


def attend_processes(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    workers = status.workers
    if status.pid and workers.running < workers.expected:
        text = f"{workers.running} of {workers.expected} processes run; the log says why others do not start"
        yield Attention("processes_missing", "error", None, text, "microauthd help faults")


def attend_log(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    if status.log_damaged:
        yield Attention(
            "log_damaged", "error", None,
            "the write-ahead log was damaged: everything issued before is revoked, and changes made last may be undone",
            "microauthd log status",
        )


def attend_clock(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    texts = {
        "guessed": "the clock of the machine is behind what is known to have been; time goes on from there",
        "behind": "the clock of the machine went back by more than a day, and is not followed",
        "ahead": "the clock of the machine leapt ahead, and is not followed yet",
        "probation": "the clock of the machine leapt ahead by weeks; nothing is purged for a day",
    }
    if text := texts.get(status.clock.state):
        severity: Severity = "warning" if status.clock.state == "probation" else "error"
        yield Attention("clock_wrong", severity, None, text, "microauthd clock accept")


DISK_LEAST = 64_000_000  # octets: with less, a backup or a restore of a small box may fail


def attend_disk(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    needed = DISK_LEAST + 2 * status.disk.database
    if status.disk.free < needed:
        severity: Severity = "error" if status.disk.free < DISK_LEAST // 4 else "warning"
        free, least = status.disk.free // 1_000_000, needed // 1_000_000
        text = f"{free} MB are free where the database lies; there should be {least} MB"
        yield Attention("disk_low", severity, None, text)


BACKUP_SECONDS = 7 * 86400  # a box whose newest backup is older needs attention, where nothing else is set


def attend_backups(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    last, plan = status.last_backup, status.backups
    if plan.every and plan.failure:
        text = f"the last backup by itself failed: {plan.failure}"
        yield Attention("backup_failed", "error", plan.failed_at, text, "microauthd backup FILE")
    known = read_time(last.at) if last else int(idp.store.meta("created_at", "0"))
    due = (known or 0) + (2 * plan.every + 3600 if plan.every else BACKUP_SECONDS)
    if idp.now() > due:
        text = f"the last backup was made at {last.at}" if last else "there is no backup of this box"
        yield Attention("backup_old", "warning", iso(due), text, "microauthd backup FILE")


def attend_certificates(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    now, command = idp.now(), "microauthd certificate show"
    for side, certificate in certificates_of(idp).items():
        if problem := certificate.problem(now):
            text = f"new files of the certificate of {side} are not served: {problem}"
            yield Attention("certificate_refused", "error", None, text if idp.certificates else problem, command)
        described = certificate.describe() if certificate.in_force else None
        left = described.not_after - now if described else FOREVER
        if described and left <= max(WARNING_DAYS) * 86400:
            text = f"the certificate of {side} {'ends' if left > 0 else 'ended'} at {iso(described.not_after)}"
            severity: Severity = "error" if left <= min(WARNING_DAYS) * 86400 else "warning"
            since = iso(described.not_after - max(WARNING_DAYS) * 86400)
            yield Attention("certificate_ending", severity, since, text, command)


def attend_authority(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    ca, missing = describe_authority(idp.options, idp.store)
    command = "microauthd certificate new"
    if ca and missing:
        text = f"the certificate of the box is not for {', '.join(missing)}, which it has since its CA was made"
        yield Attention("certificate_names", "warning", None, text, command)
    if ca and ca.not_after and ca.not_after - idp.now() <= CA_WARNING_DAYS * 86400:
        severity: Severity = "error" if ca.not_after <= idp.now() else "warning"
        since = iso(ca.not_after - CA_WARNING_DAYS * 86400)
        yield Attention("ca_ending", severity, since, f"the CA of the box ends at {iso(ca.not_after)}", command)


def attend_issuer(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    if text := issuer_obstacle(idp.options):
        yield Attention("issuer_unreachable", "warning", None, text, "microauthd help mad.conf")


TRIAL_SUFFIX = ".upgrading"  # of the database: the file with the state of an upgrade, locked as long as that runs


def attend_upgrade(idp: Idp, status: StatusObject) -> Iterator[Attention]:
    if os.path.exists(idp.store.path + TRIAL_SUFFIX):
        text = "an upgrade was interrupted; the next one finishes it, or takes it back"
        yield Attention("upgrade_unfinished", "warning", None, text, "microauthd upgrade FILE")


ATTENTION: tuple[Callable[[Idp, StatusObject], Iterator[Attention]], ...] = (
    attend_readiness, attend_processes, attend_log, attend_clock, attend_disk, attend_backups,
    attend_certificates, attend_authority, attend_issuer,
    attend_upgrade,
)


# == Status ====================================================================


def versions_of(idp: Idp) -> dict[str, str]:
    with idp.store.guard:
        (cipher,) = idp.store.connection.execute("PRAGMA cipher_version").fetchone()
    return {
        "microauthd": VERSION, "schema": str(len(MIGRATIONS)), "python": sys.version.split()[0],
        "sqlite": sqlcipher3.sqlite_version, "sqlcipher": cipher, "openssl": ssl.OPENSSL_VERSION,
    }


def gather_status(idp: Idp, pid: int, checks: dict[str, bool], local: str = "") -> StatusObject:
    """Return how the box is. `pid` is that of the supervisor, 0 if no server runs; `checks` are those of /health/ready.

    `local` is the path of the Unix socket. Raises Unavailable if the database cannot be read.
    """
    options, now, certificates = idp.options, idp.clock(), certificates_of(idp)
    children = list_children(pid) if pid and options.worker_processes else []
    expected = options.worker_processes + 1 if options.worker_processes else 0  # ADMIN is a process of its own then
    status = StatusObject(
        "stopped", VERSION, versions_of(idp), iso(int(now)), iso(read_start(pid, now)) if pid else None, pid or None,
        [pid, *children] if pid else [], Workers(expected, len(children)), list_endpoints(options, local),
        options.auth_issuer, options.admin_issuer,
        urlsplit(options.auth_issuer).hostname == urlsplit(options.admin_issuer).hostname, checks,
        ClockObject(clock_state(idp), iso(int(now))), describe_served(certificates, "auth"),
        describe_served(certificates, "admin"), read_last_backup(idp), read_backup_plan(idp),
        measure_disk(options, idp.store.path), idp.store.meta("log_damaged"), [],
    )
    status.attention = [found for attend in ATTENTION for found in attend(idp, status)]
    status.attention.sort(key=lambda found: found.severity)  # errors first
    if pid:
        status.state = "attention" if status.attention else "well"
    return status


def read_status(idp: Idp, local: str = "") -> StatusObject:
    """Return how the box is, in the process of it that serves ADMIN. See gather_status()."""
    pid = os.getppid() if idp.options.worker_processes else os.getpid()
    return gather_status(idp, pid, check_readiness(idp), local)
