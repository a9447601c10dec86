"""What runs beside the requests: purging, key states, the thread of the clock."""

import contextlib
import fcntl
import itertools
import os
import sys
import threading
import time
from typing import Any

import msgspec

from appliance.base.clock import IAT_SKEW, sleep
from appliance.base.settings import OPTIONS, Options
from appliance.base.files import write_durably
from appliance.base.log import Log
from appliance.base.database import Unavailable
from appliance.base.store import RetiredKey, SCATTERED, SLICE, Store
from appliance.base.keys import Key, KeyEntry, lock_ring, promote, read_ring, write_ring
from appliance.base.pages import PAGES
from appliance.backup import (
    Schedule, clear_leftovers, hold_backup_folder, is_due, read_schedule, run_schedule, scheduled_prefix,
)
from appliance.authority import renew_certificate
from microauthd import (
    HERE, Idp, JWT, LOCAL, Problem, VERSION, audit, bound_audit_log, purge_audit_log, remove_qr_files,
    ring_files, write_refusal_counts,
)
from appliance.rings import longest_life

# == Upkeep ====================================================================
# Purging what has expired, in slices small enough that no writer waits for them.

UPKEEP_SECONDS = 3600


def purge(idp: Idp, pause=sleep):
    """Delete expired rows. Nothing is purged while the clock cannot be believed."""
    options, store, now = idp.options, idp.store, idp.now()
    if not idp.check_clock():
        return
    counts: dict[str, Any] = {}
    after: str | None
    if options.token_purge_days:
        before, after, done = now - options.token_purge_days * 86400, "", 0
        while after is not None:
            after, deleted = store.purge_sessions(f"{before * 1000:012x}", before, after, SLICE)
            done += deleted
            pause(0.01)
        counts["session"] = done
    cutoffs = [
        ("revoked_token", "jti", now - IAT_SKEW), ("login_transaction", "id", now),
        ("authorization_code", "code_sha256", now - 86400), ("client_secret", "id", now),
        ("browser_session", "id_sha256", now), ("admin_session", "id_sha256", now), ("retired_key", "kid", now),
        ("parked_hints", "handle_sha256", now), ("device_failure", "device_sha256", now),
        ("invitation", "user_id", now),
    ]
    if options.refresh_token_purge_days:
        before = now - options.refresh_token_purge_days * 86400
        cutoffs += [("refresh_token", "id", before), ("family", "sid", before)]
    for table, key, before in cutoffs:
        after = ""
        while after is not None:
            after, done = store.purge_expired(table, key, before, after, SLICE)
            counts[table] = counts.get(table, 0) + done
            pause(0.01)
    if options.audit_log_retention_days:
        counts["audit"] = purge_audit_log(idp, LOCAL.acting_as("system"), options.audit_log_retention_days, pause)
    if any(counts.values()):
        audit(
            idp, LOCAL.acting_as("system"), "purged", "",
            " ".join(f"{table}={count}" for table, count in counts.items() if count),
        )
    idp.log("upkeep", **counts)


AUDIT_MOST, AUDIT_LEAST = 1_000_000_000, 1_000_000  # octets: the bounds of the automatic `audit-max-size`


def audit_limit(options: Options, path: str) -> int:
    """Return how many octets the audit log may take: `audit-max-size`, or a quarter of the free disk.

    `path` is the file of the database, which counts as free, because SQLite fills it again: so the log itself does not
    lower its bound.
    """
    if options.audit_max_size >= 0:
        return options.audit_max_size
    room = os.statvfs(os.path.dirname(os.path.abspath(path)))
    free = room.f_bavail * room.f_frsize
    with contextlib.suppress(FileNotFoundError):  # a process that begins while the file is moved away still serves keys
        free += os.path.getsize(path)
    return max(AUDIT_LEAST, min(AUDIT_MOST, free // 4))


def finish_deletions(idp: Idp, pause=sleep):
    """Delete what belongs to deleted users, clients, scopes and roles, where it was too much for one transaction.

    `pause` waits between slices, and returns whether the server stops: the next one goes on.
    """
    for kind, id in idp.store.list_deletions():
        slices = 1
        while idp.store.delete_slice(kind, id, SCATTERED, idp.now_ms()):
            slices += 1
            if pause(0.01):
                return
        idp.log("upkeep.deleted", kind=kind, id=id, slices=slices)


def log_audit_head(store: Store, log: Log):
    """Write the head of the audit log into the log file. There whoever can change the database cannot change it, and a
    verifier elsewhere can compare it: a log that was cut or written anew has no row of this number and hash.
    """
    seq, digest = store.audit_head()
    log("audit.head", "notice", seq=seq, rows=store.count_audit(), head=digest)


def log_log_damage(store: Store, log: Log):
    """Report that the write-ahead log was found damaged, until an operator has settled it."""
    if damage := store.meta("log_damaged"):
        log("log.damaged", "error", reason=damage, settle="microauthd log accept")


def note_configuration(idp: Idp):
    """Audit the start of the server, and which options have changed since the last one. Secrets are left out."""
    shown = {option.name: str(getattr(idp.options, option.attribute)) for option in OPTIONS if not option.secret}
    known = idp.store.meta("options")
    with idp.store.transaction():
        before = msgspec.json.decode(known) if known else shown
        changed = [f"{name}={value}" for name, value in shown.items() if before.get(name) != value]
        if changed:
            audit(idp, LOCAL.acting_as("system"), "configuration_changed", "", "; ".join(changed)[:2000])
        if shown != before or not known:
            idp.store.put_meta("options", msgspec.json.encode(shown).decode())
        audit(idp, LOCAL.acting_as("system"), "server_started", f"version={VERSION}")


def keep_for_hints(idp: Idp, entry: KeyEntry):
    """Store the public half of a key that leaves the AUTH ring, as long as a login may last that it signed.

    An id_token_hint is welcome long after its token has expired. OpenID Connect RP-Initiated Logout §2.
    """
    key, options = Key(entry), idp.options
    longest = max(options.session_absolute_expiration, options.refresh_token_absolute_expiration)
    idp.store.put_retired_key(RetiredKey(key.kid, key.header(JWT).decode(), key.as_pem(), entry.since + longest))


def advance_key_states(idp: Idp):
    """Bring the ring files up to date: promote a next key that is due, drop a retired one whose tokens have expired.

    The public half of one that AUTH drops is stored first: if the process dies in between, the next turn repeats it.
    """
    options, now = idp.options, idp.now()
    if not idp.ring_versions or not idp.check_clock():
        return
    for port_name, (path, passphrase, _) in ring_files(options).items():
        longest = longest_life(options, idp.store, port_name)
        with lock_ring(path):
            before = read_ring(path, passphrase)
            promoted = promote(before, now, options.key_overlap)
            after = [
                entry for entry in promoted if entry.state != "retired" or entry.since + longest + IAT_SKEW > now
            ]
            if after == before:
                continue
            for entry in promoted:
                if port_name == "auth" and entry not in after:
                    keep_for_hints(idp, entry)
            write_durably(path, write_ring(after, passphrase))
            idp.log("keys.tended", port=port_name, before=len(before), after=len(after))


class UnpackedProgram:
    """The unpacked program. Parts of it are read on first use, and it lies in a cache that something may clean."""

    def __init__(self, log):
        archive = getattr(sys.modules["__main__"], "ARCHIVE", None)  # of the archive's own start
        self.archive, self.log, self.lock, self.again = archive and os.path.abspath(archive), log, None, 0.0

    def keep(self):
        """If files of it were removed, have the archive unpack itself again; if that fails, again in ten minutes."""
        if (
            not self.archive
            or time.monotonic() < self.again
            or all(path.exists() for path in (HERE / ".lock", PAGES / "en.json"))
        ):
            return
        import subprocess

        done = subprocess.run(
            [sys.executable, "-I", self.archive, "version"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=120,
        )
        if done.returncode == 0 and (HERE / ".lock").exists():
            with contextlib.suppress(PermissionError):  # it is root's, and of no group of ours
                self.lock = open(HERE / ".lock", "rb")
                fcntl.flock(self.lock, fcntl.LOCK_SH)  # without it, the next release would remove the folder as unused
            self.log("code.unpacked_again", "warning", folder=str(HERE))
            return
        self.log(
            "code.lost", "error", folder=str(HERE),
            reason=done.stderr.strip()[-300:] or "the archive is another release: restart",
        )
        self.again = time.monotonic() + 600


class Upkeep(threading.Thread):
    """Checks the unpacked program every few seconds, the key rings, the certificate and the size of the audit log every
    minute; purges every hour.

    What fails is logged and tried again.
    """

    INTERVAL = 5

    def __init__(self, idp):
        super().__init__(name="upkeep", daemon=True)
        self.idp, self.program, self.ending = idp, UnpackedProgram(idp.log), threading.Event()
        # Once, at the start: a disk that something else fills later must not cost rows of the log.
        self.audit_limit = audit_limit(idp.options, idp.store.path)

    def run(self):
        if not self.ending.wait(1):  # let the start write first
            self.attempt(note_configuration, self.idp)
        for turn in itertools.count(1):
            if self.ending.wait(self.INTERVAL):
                return
            self.attempt(self.program.keep)
            if turn * self.INTERVAL % 60 == 0:
                self.attempt(advance_key_states, self.idp)
                self.attempt(renew_certificate, self.idp)
                self.attempt(remove_qr_files, self.idp)
                if self.idp.options.enable_audit_logging:
                    system = LOCAL.acting_as("system")
                    self.attempt(bound_audit_log, self.idp, system, self.audit_limit, self.ending.wait)
                self.attempt(finish_deletions, self.idp, self.ending.wait)
            if turn * self.INTERVAL % UPKEEP_SECONDS == 60:
                self.attempt(purge, self.idp, self.ending.wait)
                self.attempt(log_audit_head, self.idp.store, self.idp.log)
                self.attempt(log_log_damage, self.idp.store, self.idp.log)

    def attempt(self, work, *args):
        try:
            work(*args)
        except Exception as error:
            reason = error.log if isinstance(error, (Problem, Unavailable)) else repr(error)
            self.idp.log("upkeep.failed", "error", what=work.__name__, reason=reason)


class BackupThread(threading.Thread):
    """Makes a backup each `backup-every`, by the time that the server believes. Its work would keep upkeep waiting."""

    INTERVAL = 5

    def __init__(self, idp: Idp):
        super().__init__(name="backups", daemon=True)
        self.idp, self.ending = idp, threading.Event()

    def run(self):
        idp = self.idp
        if not idp.options.backup_every or self.ending.wait(self.INTERVAL):  # let the start write first
            return
        schedule = None
        while True:
            try:
                schedule = schedule or self.begin()
                if is_due(schedule, idp.now(), idp.options.backup_every):
                    schedule = run_schedule(idp, schedule, lambda: self.ending.wait(0.01))
            except Exception as error:
                if self.ending.is_set():
                    return  # stop() has closed the database: the next start makes it up
                reason = error.log if isinstance(error, (Problem, Unavailable)) else repr(error)
                idp.log("backup.failed", "error", reason=reason)
                self.ending.wait(60)
            if self.ending.wait(self.INTERVAL):
                return

    def begin(self) -> Schedule:
        """Remove what a backup that was killed has left. Return what is known of the earlier ones."""
        with contextlib.suppress(Problem, OSError), hold_backup_folder(self.idp.options) as folder:
            clear_leftovers(folder, scheduled_prefix(self.idp))
        return read_schedule(self.idp)


class RefusalThread(threading.Thread):
    """Writes the counted refusals of a process into the audit log when they are due, and at the end all of them."""

    INTERVAL = 30

    def __init__(self, idps: list[Idp]):
        super().__init__(name="refusals", daemon=True)
        self.idps, self.ending = idps, threading.Event()

    def run(self):
        while not self.ending.wait(self.INTERVAL):
            self.write()

    def write(self, everything=False):
        for idp in self.idps:
            try:
                write_refusal_counts(idp, everything)
            except Exception as error:
                reason = error.log if isinstance(error, Unavailable) else repr(error)
                idp.log("refusals.failed", "error", reason=reason)


def revoke_future(idp: Idp):
    """Revoke what was issued at later times than now: the clock ran ahead, and has gone back."""
    ended = idp.store.revoke_future_rows(idp.now(), idp.now_ms(), idp.now() // 30)
    audit(idp, LOCAL.acting_as("system"), "clock_went_back", "", f"ended={ended}")
    idp.log("clock.went_back", "warning", now=idp.now(), ended=ended)


class ClockThread(threading.Thread):
    """Follows the machine's clock twice a second, logs what is wrong with it, and saves the time every hour."""

    INTERVAL, SAVE_SECONDS = 0.5, 3600

    def __init__(self, idp):
        super().__init__(name="clock", daemon=True)
        self.idp, self.keeper, self.ending = idp, idp.clock, threading.Event()
        self.last_logged_state, self.logged_at = self.keeper.state_at_start, self.keeper.monotonic()
        self.last_saved_at = -float(self.SAVE_SECONDS)
        self.accepted = None  # the stamp of `clock accept`, as it was when the clock became wrong
        self.must_revoke = False  # time went back, and rows of later times are not revoked yet

    def run(self):
        while not self.ending.wait(self.INTERVAL):
            try:
                self.step()
            except Exception as error:
                reason = error.log if isinstance(error, Unavailable) else repr(error)
                self.idp.log("clock.failed", "error", reason=reason)
                self.ending.wait(5)

    def step(self):
        idp, keeper = self.idp, self.keeper
        self.must_revoke |= keeper.update()
        if keeper.state == "right":
            self.accepted = None
        else:
            stamp = idp.store.meta("clock_accepted")
            if self.accepted is None:
                self.accepted = stamp  # given before the clock became wrong, so it does not count
            elif stamp != self.accepted:
                keeper.accept()
                self.accepted, self.must_revoke = stamp, True
        if self.must_revoke:
            revoke_future(idp)
            self.must_revoke = False
        state, monotonic = keeper.state, keeper.monotonic()
        if state != self.last_logged_state or (state != "right" and monotonic - self.logged_at >= 3600):
            idp.log(
                "clock." + state, "info" if state == "right" else "warning" if state == "probation" else "error",
                now=idp.now(), clock=int(keeper.wall()),
            )
            self.last_logged_state, self.logged_at = state, monotonic
        if state == "right" and monotonic - self.last_saved_at >= self.SAVE_SECONDS:
            self.save_time()

    def save_time(self):
        """Save the time, for a start whose clock has lost it."""
        if self.keeper.state == "right":
            self.idp.store.put_meta("clock", self.idp.now())
            self.last_saved_at = self.keeper.monotonic()
