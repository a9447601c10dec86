"""Files that a power cut leaves whole, the old or the new, and paths that stay below a root."""

import contextlib
import errno
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


def write_below(root: str, folder: str, name: str, content: bytes) -> str:
    """Create a private file in a folder below a root, and the folders that are missing; follow no symbolic link.

    Return its path below the root. Raises ValueError with a sentence about `folder`, or OSError.
    """
    root = os.path.normpath(root)
    path = os.path.normpath(os.path.join(root, folder))
    if (path != root and not path.startswith(root.rstrip("/") + "/")) or not folder.strip() or "\0" in folder:
        raise ValueError("must lie below totp-qr-output-root")
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in [part for part in os.path.relpath(path, root).split("/") if part != "."]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=directory)
            child = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = child
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
        return os.path.normpath(os.path.join(os.path.relpath(path, root), name))
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise ValueError("must be folders, and no symbolic link") from None
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("has a name that is too long") from None
        raise
    finally:
        os.close(directory)


def remove_below(root: str, path: str):
    """Remove a file that write_below() created, if it is still there; follow no symbolic link. Raises OSError."""
    *folders, name = path.split("/")
    directory = -1
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in folders:
            child = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = child
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    finally:
        if directory >= 0:
            os.close(directory)


def is_visible_below(root: str, path: str) -> bool:
    """Tell whether a path stays below a root whatever symbolic links it holds, and names no hidden file or folder."""
    real = os.path.realpath(os.path.join(root, path.lstrip("/"))) if "\0" not in path else root
    return real.startswith(root + os.sep) and not path.endswith("/") and "/." not in "/" + path
