"""One verified file that restores the box, and the backups made over ADMIN."""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import time

import sqlcipher3

from appliance.base import StartupError
from appliance.base.settings import Options
from appliance.base.files import read_owned, show_path, sync_directory
from appliance.base.database import Unavailable
from appliance.base.store import Store
from appliance.base.objects import BackupObject, iso
from microauthd import Caller, Idp, Problem, audit, reject

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


def write_backup(idp: Idp, caller: Caller, path: str, force=False, without_keys=False) -> dict:
    """Write one file that restores the box: the database as of now, key rings, seal key and settings within it.

    Beside a server that writes. Encrypted as the database is; read through after writing, from the disk and not from
    memory; in place at once or not at all. Return `bytes`, `users`, `clients` and `newest_at` of the copy. Raises
    StartupError.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise StartupError(f"{path} is there already, and is no file")
    if os.path.exists(path) and not force:
        raise StartupError(f"{path} is there already: --force writes over it")
    if os.path.exists(path) and any(
        os.path.exists(file) and os.path.samefile(path, file)
        for file in (idp.store.path, *backup_files(idp.options).values())
    ):
        raise StartupError(f"{path} is what is to be backed up")
    if not idp.store.key and not without_keys:
        raise StartupError(
            "the database is not encrypted, so a backup would hold its keys for all to read: "
            "--without-keys leaves keys and settings out"
        )
    files = {}
    for name, file in {} if without_keys else backup_files(idp.options).items():
        try:
            files[name] = read_owned(file)
        except OSError as error:
            if name != "config" or not isinstance(error, FileNotFoundError):  # settings may come from the environment
                raise StartupError(f"{file} cannot be backed up: {error.strerror}") from None
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
    return {"bytes": os.path.getsize(path), **contents}


BACKUP_NAME = re.compile(r"microauthd-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}\.backup")
BACKUP_PIECE = 1 << 20


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
        descriptor = os.open(options.backup_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Problem("not_found", log="backup-folder is not there") from None
    except OSError as error:
        raise Problem("temporarily_unavailable", log=f"backup-folder: {error.strerror}", retry_after=60) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(
                "temporarily_unavailable", log="another backup is being made or read", retry_after=5
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def make_backup(idp: Idp, caller: Caller, without_keys=False) -> BackupObject:
    """Write a backup into `backup-folder`, if the file system has room for it and for more."""
    if idp.options.backup_folder and not idp.store.key and not without_keys:
        reject(
            without_keys="the database is not encrypted, so its backup would hold the keys for all to read: "
            "true leaves them out"
        )
    with hold_backup_folder(idp.options, make=True) as folder:
        for name in os.listdir(folder):  # left by a backup that was killed
            if BACKUP_NAME.fullmatch(name.partition(".backup")[0] + ".backup") and ".backing-up" in name:
                os.unlink(name, dir_fd=folder)
        room = os.fstatvfs(folder)
        if room.f_bavail * room.f_frsize < 2 * os.path.getsize(idp.store.path) + 16_000_000:
            raise Problem(
                "temporarily_unavailable", log="backup-folder has no room for another backup", retry_after=3600
            )
        name = time.strftime("microauthd-%Y%m%dT%H%M%SZ-", time.gmtime(idp.now())) + secrets.token_hex(4) + ".backup"
        path = os.path.join(idp.options.backup_folder, name)
        try:
            done = write_backup(idp, caller, path, without_keys=without_keys)
        except StartupError as refusal:
            raise Problem("temporarily_unavailable", log=str(refusal), retry_after=60) from None
        with open(path, "rb") as file:
            return BackupObject(
                name, done["bytes"], hashlib.file_digest(file, "sha256").hexdigest(), done["users"], done["clients"],
                iso(done["newest_at"]),
            )


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
            os.unlink(name, dir_fd=folder)
        except OSError:
            raise Problem("not_found", log="there is no such backup, or it cannot be removed") from None
