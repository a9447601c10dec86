"""Writing files so that a power cut leaves either the old or the new content."""

import contextlib
import os


def file_fingerprint(path: str) -> tuple:
    """Return the modification time, inode and size of a file: its versions differ in at least one of them."""
    info = os.stat(path)
    return info.st_mtime_ns, info.st_ino, info.st_size


def sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(path: str, content: bytes) -> str:
    """Write and sync the next version of a private file as PATH.new and return that path. On failure, remove it."""
    temporary = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None
    return temporary


def write_durably(path: str, content: bytes):
    """Replace a private file atomically and durably. rename(2), fsync(2)."""
    os.replace(write_beside(path, content), path)
    sync_directory(os.path.dirname(os.path.abspath(path)))
