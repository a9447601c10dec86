"""One verified file that restores the box, and the backups made over ADMIN."""

import calendar
import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable

import msgspec
import sqlcipher3

from appliance.base import StartupError
from appliance.base.settings import Options
from appliance.base.files import (
    check_folder, close_lock, existing_folder, open_lock, read_owned, show_path, sync_directory,
)
from appliance.base.metrics import BACKUPS, BACKUP_AT
from appliance.base.database import Unavailable
from appliance.base.store import Store
from appliance.base.keys import parse_ring
from appliance.base.objects import BackupObject, ListedBackup, iso
from microauthd import Caller, Idp, LOCAL, Problem, audit, reject, ring_files

# == Backup ====================================================================
# One file that restores the box, made while the server writes. recovery.py restores it.


def check_copy(path: str, key: str) -> dict:
    """Read a whole database, page by page and row by row, and describe it. Raises StartupError if it is damaged."""
    copy = Store(path, key)
    try:
        damage = copy.check_integrity()
        if damage:
            raise StartupError(f"{path} is damaged: {damage}")
        return copy.describe_copy()
    except (Unavailable, sqlcipher3.Error) as error:
        raise StartupError(f"{path} is damaged: {error.log if isinstance(error, Unavailable) else error}") from None
    finally:
        copy.close()


def backup_files(options: Options) -> dict:
    return {
        "config": options.config_file, "seal": options.seal_key_file, "auth": options.token_signing_key_file,
        "admin": options.admin_token_signing_key_file,
    }


def note_backup(idp: Idp, name: str, size: int, kind: str):
    """Record the backup that was made last. It stands even if that fails."""
    record = {"at": idp.now(), "name": show_path(name), "bytes": size, "kind": kind}
    try:
        idp.store.put_meta("last_backup", msgspec.json.encode(record).decode())
    except Unavailable as problem:
        idp.log("backup.unrecorded", "warning", name=name, reason=problem.log)


def check_target(idp: Idp, path: str, force: bool):
    """Raise StartupError if a backup must not be written to a path."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise StartupError(f"{path} is there already, and is no file")
    if os.path.exists(path) and not force:
        raise StartupError(f"{path} is there already: --force writes over it")
    if os.path.exists(path) and any(
        os.path.exists(file) and os.path.samefile(path, file)
        for file in (idp.store.path, *backup_files(idp.options).values())
    ):
        raise StartupError(f"{path} is what is to be backed up")


def read_backed_up_files(idp: Idp, without_keys: bool) -> dict[str, bytes]:
    """Return the content of keys and settings by their names in a backup. Raises StartupError."""
    if not idp.store.key and not without_keys:
        raise StartupError(
            "the database is not encrypted, so a backup would hold its keys for all to read: "
            "--without-keys leaves keys and settings out"
        )
    files: dict[str, bytes] = {}
    for name, file in {} if without_keys else backup_files(idp.options).items():
        try:
            files[name] = read_owned(file)
        except OSError as error:
            if name != "config" or not isinstance(error, FileNotFoundError):  # settings may come from the environment
                raise StartupError(f"{file} cannot be backed up: {error.strerror}") from None
    return files


def write_backup(
    idp: Idp, caller: Caller, path: str, force=False, without_keys=False, kind="command",
    verify: Callable[[str], object] = lambda path: None,
) -> dict:
    """Write one file that restores the box: the database as of now, key rings, seal key and settings within it.

    Beside a server that writes. Encrypted as the database is; read through after writing, from the disk and not from
    memory; in place at once or not at all. `verify` is given the path of the copy before it takes its name. Return
    `bytes`, `users`, `clients` and `newest_at` of the copy. Raises StartupError.
    """
    path = os.path.abspath(path)
    check_target(idp, path, force)
    files = read_backed_up_files(idp, without_keys)
    temporary = path + ".backing-up"
    leftovers = [temporary + suffix for suffix in ("", "-journal", "-wal", "-shm")]
    try:
        for leftover in leftovers:  # of a backup that was killed: SQLite would roll its journal back into this one
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        idp.store.copy_to(temporary, files, idp.now())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        contents = check_copy(temporary, idp.store.key)
        verify(temporary)
        # The audit row first: no backup may exist that the audit log does not name.
        audit(idp, caller, "backup_made", show_path(os.path.basename(path)))
        os.replace(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        raise StartupError(f"the backup {path} cannot be written: {error.strerror}") from None
    except (sqlcipher3.Error, Unavailable) as error:
        raise StartupError(
            f"the backup {path} cannot be written: {error.log if isinstance(error, Unavailable) else error}"
        ) from None
    finally:
        for leftover in leftovers:
            with contextlib.suppress(OSError):
                os.unlink(leftover)
    size = os.path.getsize(path)
    note_backup(idp, os.path.basename(path), size, kind)
    return {"bytes": size, **contents}


# In backup-folder: those that ADMIN asked for, and those that the server makes by itself. The number of the latter
# tells which is newer, for a clock may have been wrong, and the id of the box, because boxes may share a folder.
BACKUP_NAME = re.compile(
    r"microauthd-(?:([0-9]{8}T[0-9]{6}Z)-[0-9a-f]{8}|scheduled-[0-9a-f]{8}-[0-9]{6,9}-([0-9]{8}T[0-9]{6}Z))\.backup"
)
BACKUP_DIGEST = "sha256 of "  # begins the name under which meta has the hash of a backup, whose name follows
BACKUP_PIECE = 1 << 20
LOCK_NAME = ".microauthd.lock"  # not the folder itself: whoever can read that can lock it, and hold it for ever


@contextlib.contextmanager
def hold_backup_folder(options: Options, make=False):
    """Lock the folder of the backups made over ADMIN, and yield its descriptor.

    One at a time, because each reads or writes the whole database. Raises not_found if no folder is set.
    """
    if not options.backup_folder:
        raise Problem("not_found", log="backup-folder is not set")
    try:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(options.backup_folder, 0o700)
            check_folder(options.backup_folder)  # who can write there could put a link in place of our file
        descriptor = os.open(options.backup_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Problem("not_found", log="backup-folder is not there") from None
    except OSError as error:
        raise Problem("temporarily_unavailable", log=f"backup-folder: {error.strerror}", retry_after=60) from None
    except StartupError as refusal:
        raise Problem("temporarily_unavailable", log=f"backup-folder: {refusal}", retry_after=3600) from None
    path = os.path.join(options.backup_folder, LOCK_NAME)
    try:
        lock = open_lock(path, shared=False)
    except BlockingIOError:
        os.close(descriptor)
        raise Problem("temporarily_unavailable", log="another backup is being made or read", retry_after=5) from None
    except OSError:  # a medium that is read-only or full, or takes no locks: the names differ anyhow
        lock = -1
    try:
        yield descriptor
    finally:
        if lock >= 0:
            close_lock(path, lock)
        os.close(descriptor)


def clear_leftovers(folder: int, prefix: str = "microauthd-"):
    """Remove what a backup that was killed has left in the folder."""
    for name in os.listdir(folder):
        whole, middle, _ = name.partition(".backup")
        if name.startswith(prefix) and BACKUP_NAME.fullmatch(whole + middle) and ".backing-up" in name:
            os.unlink(name, dir_fd=folder)


def check_room(idp: Idp, folder: int):
    """Raise temporarily_unavailable if the file system has no room for a backup and for more."""
    room = os.fstatvfs(folder)
    if room.f_bavail * room.f_frsize < 2 * os.path.getsize(idp.store.path) + 16_000_000:
        raise Problem("temporarily_unavailable", log="backup-folder has no room for another backup", retry_after=3600)


def note_digest(idp: Idp, folder: int, name: str) -> str:
    """Store the SHA-256 of a backup in this folder under its name, and return it in hex."""
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    idp.store.put_meta(BACKUP_DIGEST + name, digest)
    return digest


def write_into_folder(idp: Idp, caller: Caller, without_keys: bool) -> BackupObject:
    if idp.options.backup_folder and not idp.store.key and not without_keys:
        reject(
            without_keys="the database is not encrypted, so its backup would hold the keys for all to read: "
            "true leaves them out"
        )
    with hold_backup_folder(idp.options, make=True) as folder:
        clear_leftovers(folder)
        check_room(idp, folder)
        name = time.strftime("microauthd-%Y%m%dT%H%M%SZ-", time.gmtime(idp.now())) + secrets.token_hex(4) + ".backup"
        path = os.path.join(idp.options.backup_folder, name)
        try:
            done = write_backup(idp, caller, path, without_keys=without_keys, kind="admin")
        except StartupError as refusal:
            raise Problem("temporarily_unavailable", log=str(refusal), retry_after=60) from None
        digest = note_digest(idp, folder, name)
        return BackupObject(name, done["bytes"], digest, done["users"], done["clients"], iso(done["newest_at"]))


def list_backups(idp: Idp) -> list[ListedBackup]:
    """Return the backups in `backup-folder`, the newest first; none if no folder is set or it is not there yet."""
    folder, rows = idp.options.backup_folder, []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder) if folder else ():
            found = BACKUP_NAME.fullmatch(name)
            if not found:
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                info = os.stat(os.path.join(folder, name), follow_symlinks=False)
                if not stat.S_ISREG(info.st_mode):  # nor is it read
                    continue
                made_at = calendar.timegm(time.strptime(found[1] or found[2], "%Y%m%dT%H%M%SZ"))
                digest = idp.store.meta(BACKUP_DIGEST + name) or None
                kind = "admin" if found[1] else "schedule"
                rows.append(ListedBackup(name, iso(made_at) or "", info.st_size, digest, kind))
    return sorted(rows, key=lambda row: (row.created_at, row.name), reverse=True)


def count_backup(idp: Idp, outcome: str):
    idp.counters.add(BACKUPS, outcome)
    if outcome == "success":
        idp.counters.set(BACKUP_AT, idp.now())


def make_backup(idp: Idp, caller: Caller, without_keys=False) -> BackupObject:
    """Write a backup into `backup-folder`, if the file system has room for it and for more."""
    try:
        made = write_into_folder(idp, caller, without_keys)
    except BaseException as error:
        if not isinstance(error, Problem) or error.status >= 500:  # who may not or cannot ask for one fails nothing
            count_backup(idp, "failure")
        raise
    count_backup(idp, "success")
    return made


def read_backup_piece(idp: Idp, name: str, offset: int) -> tuple[bytes, int]:
    """Return a piece of a backup in `backup-folder`, and where the next begins, 0 after the last. Raises not_found."""
    with hold_backup_folder(idp.options) as folder:
        if not BACKUP_NAME.fullmatch(name):
            raise Problem("not_found")
        try:
            with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
                piece, size = os.pread(file.fileno(), BACKUP_PIECE, offset), os.fstat(file.fileno()).st_size
        except OSError:
            raise Problem("not_found") from None
    return piece, offset + len(piece) if piece and offset + len(piece) < size else 0


def delete_backup(idp: Idp, caller: Caller, name: str):
    """Remove a backup from `backup-folder`. Raises not_found."""
    with hold_backup_folder(idp.options) as folder:
        if not BACKUP_NAME.fullmatch(name):
            raise Problem("not_found")
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            audit(idp, caller, "backup_deleted", name)
            idp.store.delete_meta(BACKUP_DIGEST + name)
            os.unlink(name, dir_fd=folder)
        except OSError:
            raise Problem("not_found", log="there is no such backup, or it cannot be removed") from None


# == Schedule ==================================================================
# Backups that the server makes by itself. upkeep.py says when.


class Schedule(msgspec.Struct):
    """What is known of the backups made by themselves, kept in the database. Times are Unix seconds."""

    next_at: int = 0
    made_at: int = 0
    failed_at: int = 0  # 0: the last try did not fail
    failure: str = ""
    tries: int = 0  # failures in a row
    failures: int = 0  # in all
    folder: str = ""  # where the last one was made
    mount: str = ""  # and where the file system of that is mounted, if it is not that of the database


def read_schedule(idp: Idp) -> Schedule:
    found = idp.store.meta("backup_schedule")
    try:
        return msgspec.json.decode(found, type=Schedule) if found else Schedule()
    except msgspec.MsgspecError:  # of another release
        return Schedule()


def mount_of(path: str) -> str:
    """Return where the file system of a path is mounted; of a path that is missing, that of the folder above it."""
    place = os.path.realpath(path if os.path.isdir(path) else existing_folder(path))
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return place


def scheduled_prefix(idp: Idp) -> str:
    return f"microauthd-scheduled-{idp.store.meta('instance_id', '00000000')[:8]}-"


def list_scheduled(idp: Idp, folder: int) -> list[tuple[int, str]]:
    """Return (number, name) of each backup in a folder that this box has made by itself, the oldest first."""
    prefix = scheduled_prefix(idp)
    names = [name for name in os.listdir(folder) if name.startswith(prefix) and BACKUP_NAME.fullmatch(name)]
    return sorted((int(name[len(prefix) :].partition("-")[0]), name) for name in names)


def check_restorable(idp: Idp, path: str, pause: Callable[[], object]) -> str:
    """Open a copy as a restore would. Return what is wrong with the chain of its audit log, "" if that is whole.

    write_backup() has read all pages and rows already. `pause` is called between slices of the work. Raises
    StartupError if the copy or a key in it does not open.
    """
    copy = Store(path, idp.store.key)
    try:
        files = copy.read_backup_files() or {}
        for name, (ring, passphrase, _) in ring_files(idp.options).items():
            if name in files:
                parse_ring(files[name], ring, passphrase)
        return copy.verify_audit(pause)["reason"]
    except (Unavailable, sqlcipher3.Error) as error:
        raise StartupError(f"{path} does not open: {error.log if isinstance(error, Unavailable) else error}") from None
    finally:
        copy.close()


def remove_old_backups(idp: Idp, folder: int, newest: str):
    """Remove all but the newest `backup-keep` backups that this box has made by itself. `newest` stays anyhow."""
    older = [name for _, name in list_scheduled(idp, folder) if name != newest]
    for name in older[: max(0, len(older) + 1 - idp.options.backup_keep)]:
        audit(idp, LOCAL.acting_as("system"), "backup_deleted", name)
        idp.store.delete_meta(BACKUP_DIGEST + name)
        os.unlink(name, dir_fd=folder)
        idp.log("backup.removed", name=name)


def make_scheduled_backup(idp: Idp, pause: Callable[[], object]) -> tuple[str, str]:
    """Write a backup into `backup-folder`, verify that it restores, then remove those that are too many.

    Return its name, and what is wrong with the chain of the audit log: such a backup stands, and so do the older ones.
    Raises StartupError, Problem, Unavailable or OSError, and then nothing half-written and no older one less is there.
    """
    options, path, reasons = idp.options, os.path.abspath(idp.options.backup_folder), []
    known = read_schedule(idp)
    if options.backup_folder and known.folder == path and known.mount and not os.path.ismount(known.mount):
        raise StartupError(f"nothing is mounted on {known.mount} any more: mount it, or name another backup-folder")
    with hold_backup_folder(options, make=True) as folder:
        clear_leftovers(folder, scheduled_prefix(idp))
        check_room(idp, folder)
        number = max((number for number, _ in list_scheduled(idp, folder)), default=0) + 1
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(idp.now()))
        name = f"{scheduled_prefix(idp)}{number:06}-{stamp}.backup"
        done = write_backup(
            idp, LOCAL.acting_as("system"), os.path.join(path, name), without_keys=not idp.store.key, kind="schedule",
            verify=lambda copy: reasons.append(check_restorable(idp, copy, pause)),
        )
        note_digest(idp, folder, name)
        if not reasons[0]:
            remove_old_backups(idp, folder, name)
    idp.log("backup.made", name=name, bytes=done["bytes"], users=done["users"], clients=done["clients"])
    return name, reasons[0]


RETRY_SECONDS, RETRY_MOST = 60, 3600  # of a backup that failed: twice as long after each further failure


def is_due(schedule: Schedule, now: int, every: int) -> bool:
    """Return whether a backup is to be made. What is planned further ahead than a period is of a clock that ran ahead,
    or of a longer period.
    """
    return now >= schedule.next_at or schedule.next_at > now + every


def plan_next(schedule: Schedule, now: int, every: int) -> int:
    """Return when the next backup is due after one that stands: of times that were missed, one is made up."""
    return schedule.next_at + every if schedule.next_at <= now < schedule.next_at + every else now + every


def run_schedule(idp: Idp, schedule: Schedule, pause: Callable[[], bool]) -> Schedule:
    """Make the backup that is due. Return and store what is known then; a failure is logged, and tried again later.

    `pause` is called between slices of the work, and returns whether the server stops.
    """
    every, began = idp.options.backup_every, idp.now()
    try:
        _, doubt = make_scheduled_backup(idp, pause)
        count_backup(idp, "success")
        path = os.path.abspath(idp.options.backup_folder)
        mount = mount_of(path)
        after = Schedule(
            plan_next(schedule, began, every), began, failures=schedule.failures, folder=path,
            mount="" if mount in ("/", mount_of(idp.store.path)) else mount,
        )
        if doubt:
            after.failed_at, after.failures = began, schedule.failures + 1
            after.failure = f"the audit log in it is not whole, so older backups are kept: {doubt}"
            idp.log("backup.doubtful", "error", reason=doubt)
    except (StartupError, Problem, Unavailable, OSError) as error:
        if pause():
            return schedule  # the server stops, and closes the database: the next start makes this one up
        reason = error.log if isinstance(error, (Problem, Unavailable)) else str(error)
        tries = schedule.tries + 1
        retry = min(RETRY_MOST, every, RETRY_SECONDS << min(tries - 1, 10))
        after = msgspec.structs.replace(
            schedule, next_at=began + retry, failed_at=began, failure=show_path(reason)[:500], tries=tries,
            failures=schedule.failures + 1,
        )
        count_backup(idp, "failure")
        idp.log("backup.failed", "error", reason=reason, tries=tries, again_in=retry)
    try:
        idp.store.put_meta("backup_schedule", msgspec.json.encode(after).decode())
    except Unavailable as problem:
        idp.log("backup.unrecorded", "warning", reason=problem.log)
    return after
