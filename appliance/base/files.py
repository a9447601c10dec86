"""Files that are whole after a power cut."""

import contextlib
import os


def file_fingerprint(path: str) -> tuple:
    """Return what tells one version of a file from another."""
    info = os.stat(path)
    return info.st_mtime_ns, info.st_ino, info.st_size


def sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(path: str, content: bytes) -> str:
    """Write what is to take the place of a private file, synced, beside it, and return its path.

    Nothing is left where that fails.
    """
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
    """Put a private file in place at once or not at all."""
    os.replace(write_beside(path, content), path)
    sync_directory(os.path.dirname(os.path.abspath(path)))
