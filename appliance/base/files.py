"""Files that are believed only from their owner, that a power cut leaves whole, and paths that stay below a root."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from appliance.base import StartupError
from appliance.base.clock import sleep

# == Ownership =================================================================
# Journal, configuration, keys and database decide what this program does, perhaps as root. They are believed only
# where nobody but root and the user that it runs as could have put them.


class Identity(NamedTuple):
    """A user and its groups, as the kernel compares them with the owner of a file. credentials(7)."""

    uid: int
    gids: frozenset[int]


def current_identity() -> Identity:
    return Identity(os.geteuid(), frozenset((os.getegid(), *os.getgroups())))


@functools.cache
def warn(sentence: str):
    """Print a warning, once a process."""
    print(f"microauthd: warning: {sentence}", file=sys.stderr)


def other_writer(info: os.stat_result, who: Identity) -> str:
    """Return who else could have written a file, folder or symbolic link, as the end of a sentence about it, or "".

    The groups of ours and the group of root may. Everybody may write a symbolic link by its mode, and nobody can.
    """
    if info.st_uid not in (0, who.uid):
        return f"belongs to user {info.st_uid}, and this runs as user {who.uid}"
    if stat.S_ISLNK(info.st_mode):
        return ""
    if info.st_mode & stat.S_IWOTH:
        return "can be written by others"
    if info.st_mode & stat.S_IWGRP and info.st_gid not in (0, *who.gids):
        return f"can be written by group {info.st_gid}"
    return ""


def refuse(name: str, info: os.stat_result, who: Identity):
    """Raise StartupError: what this file or folder says may be somebody else's work."""
    if info.st_uid not in (0, who.uid):
        remedy = f"run this as that user, as by sudo -u '#{info.st_uid}', or chown it"
    elif stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX:
        remedy = "use a folder of your own"
    else:
        remedy = f"look at what is in it, then chmod go-w {name}"
    raise StartupError(f"{name} {other_writer(info, who)}, so it is not believed: {remedy}")


class Walk:
    """The way from / to a path, each component looked up in the open folder before it: nothing can be exchanged between
    the check and the use. `folder` is the descriptor of the folder that was reached, `name` its path.
    """

    def __init__(self, path: str, who: Identity):
        self.path, self.who, self.links, self.folder = path, who, 0, -1
        self.parts: list[str] = []
        self.put(os.path.join(os.getcwd(), path))

    def put(self, path: str):
        """Put a path in front of what is left of the way."""
        if path.startswith("/"):
            self.enter("/", os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self.parts += [part for part in reversed(path.split("/")) if part not in ("", ".")]

    def enter(self, name: str, descriptor: int):
        self.close()
        self.folder, self.name = descriptor, name

    def close(self):
        if self.folder >= 0:
            os.close(self.folder)
            self.folder = -1

    def check_last(self):
        """Raise StartupError if others can put files into the folder that was reached."""
        info = os.fstat(self.folder)
        if not other_writer(info, self.who):
            if info.st_mode & stat.S_IWGRP:
                warn(f"{self.name} can be written by group {info.st_gid}: its members can replace what is in it")
        # Nobody can write to what is mounted read-only: container platforms mount settings so, in a folder 1777.
        elif info.st_uid not in (0, self.who.uid) or not os.fstatvfs(self.folder).f_flag & os.ST_RDONLY:
            refuse(self.name, info, self.who)

    def check_parent(self, name: str, child: os.stat_result):
        """Raise StartupError if others can replace an entry of the folder that was reached.

        The sticky bit allows that only to the owners of the entry and of the folder. inode(7), unlink(2).
        """
        info = os.fstat(self.folder)
        if not other_writer(info, self.who):
            return
        if info.st_uid in (0, self.who.uid):
            if os.fstatvfs(self.folder).f_flag & os.ST_RDONLY:
                return
            if info.st_mode & stat.S_ISVTX:
                if child.st_uid not in (0, self.who.uid):
                    refuse(os.path.join(self.name, name), child, self.who)
                return
        refuse(self.name, info, self.who)

    def go(self, is_folder=False) -> str:
        """Go to the last component, which is not entered unless `is_folder`, and return its name. Raises StartupError.
        """
        while self.parts:
            name = self.parts.pop()
            place = os.path.normpath(os.path.join(self.name, name))
            if not self.parts and not is_folder and re.fullmatch("/proc/[0-9]+/fd", self.name):
                return name  # a descriptor that was opened for us, by what started this: /dev/stdin, <(…) of a shell
            child = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder)
            try:
                info = os.fstat(child)
                if name != "..":
                    if self.parts or is_folder or stat.S_ISLNK(info.st_mode):
                        self.check_parent(name, info)
                    else:
                        self.check_last()
                if stat.S_ISLNK(info.st_mode):
                    self.links += 1
                    if self.links > 40:  # as many as Linux follows: path_resolution(7)
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
                    if other_writer(info, self.who):
                        refuse(place, info, self.who)
                    self.put(os.readlink(name, dir_fd=self.folder))
                elif self.parts or is_folder:
                    self.enter(place, child)
                    child = -1
                else:
                    return name
            finally:
                if child >= 0:
                    os.close(child)
        self.check_last()
        return "."


def open_owned(path: str, flags: int = os.O_RDONLY, who: Identity | None = None) -> int:
    """Open a file that only root and the user this runs as could have written or replaced; return its descriptor.

    It belongs to one of the two, and so does its folder, which nobody else can write; a group of ours may, with a
    warning. A folder further up that others can write has the sticky bit, and what follows it belongs to root or us.
    Symbolic links that root or we made are followed. `who` is the identity of this process unless a test says
    otherwise. Raises StartupError with a sentence, and OSError if there is no such file or it does not open.
    """
    who = who or current_identity()
    os.close(os.open(path, os.O_PATH | os.O_CLOEXEC))  # what is missing is missing, wherever it is
    walk = Walk(path, who)
    try:
        name = walk.go()
        if name == ".":
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if re.fullmatch("/proc/[0-9]+/fd", walk.name):
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=walk.folder)
        # Without O_NONBLOCK, open(2) of a FIFO would wait for a writer.
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=walk.folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        walk.close()
    try:
        info = os.fstat(descriptor)
        if other_writer(info, who):
            refuse(path, info, who)
        if info.st_mode & stat.S_IWGRP:
            warn(f"{path} can be written by group {info.st_gid}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_owned(path: str) -> bytes:
    """Return the content of a file that open_owned() opens. Raises StartupError and OSError as that does."""
    with os.fdopen(open_owned(path), "rb") as file:
        return file.read()


def check_folder(path: str, who: Identity | None = None):
    """Raise StartupError unless files of ours may lie in this folder: see open_owned(). Raises OSError if it is none.
    """
    walk = Walk(path, who or current_identity())
    try:
        walk.go(is_folder=True)
    finally:
        walk.close()


def existing_folder(path: str) -> str:
    """Return the folder of a path, or the nearest one above that exists."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder) and folder != "/":
        folder = os.path.dirname(folder)
    return folder


def make_folder(path: str):
    """Make the folder of a file, private, where it is missing, and check it and those above it: see check_folder()."""
    check_folder(existing_folder(path))
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    check_folder(folder)


def is_private(info: os.stat_result, who: Identity) -> bool:
    """Return whether a file is readable by nobody but its owner and those whom root has given it to.

    Packages install settings as root:service 0640, and systemd and Kubernetes hand out secrets so, by an ACL or a group
    of the service: root's decision, and not others.
    """
    if not info.st_mode & 0o077:
        return True
    if info.st_uid or info.st_mode & 0o037:
        return False
    # Root's own group is the default of what root makes, and no decision. systemd has root enter the service's.
    return info.st_gid in (0, *who.gids) if who.uid else info.st_gid != 0


def guard_private(descriptor: int, path: str, why: str, who: Identity | None = None):
    """Make an open file of secrets private, with a warning. Raises StartupError if that is not ours to do."""
    who, info = who or current_identity(), os.fstat(descriptor)
    if is_private(info, who):
        return
    try:
        if info.st_uid != who.uid:
            raise PermissionError
        os.fchmod(descriptor, info.st_mode & 0o700)
    except OSError:
        raise StartupError(f"{path} is readable by others, and {why}: its owner must chmod 600 it") from None
    warn(f"{path} was readable by others, and {why}; it is now yours alone")


@contextlib.contextmanager
def open_secret(path: str, name: str, in_container=False) -> Iterator[BinaryIO]:
    """Open a file of secrets. `name` is for the message. Raises ValueError.

    Refuses one that others can read, but `in_container`: there are no others, and Docker mounts secrets with 0444.
    """
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            is_read_by_others = stat.S_ISREG(info.st_mode) and not is_private(info, current_identity())
            if is_read_by_others and (not in_container or info.st_mode & 0o022):
                raise ValueError(f"{name}: {path} can be read by others: chmod 600 {path}")
            yield file
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error.strerror}") from None


def read_secret_file(path: str, name: str, in_container=False) -> str:
    """Return the secret in the first line of a file that open_secret() opens. Raises ValueError."""
    try:
        with open_secret(path, name, in_container) as file:
            line = file.readline().decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: {path} cannot be read: it is not UTF-8") from None
    if not line:
        raise ValueError(f"{name}: the first line of {path} is empty")
    return line


# == Names and standard input =================================================
# Octets of a file name or of what is typed that are not UTF-8.


def show_path(path: str) -> str:
    """Return a path as text: octets that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def read_stdin_secret(flag: str) -> str:
    """Return the first line of standard input. `flag` is for the message. Raises StartupError."""
    try:
        return sys.stdin.buffer.readline().decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise StartupError(f"{flag}: what came from standard input is not valid UTF-8") from None


# == Writing ===================================================================


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


# == Locks =====================================================================
# Files that are there as long as somebody holds them. Others cannot open them, and so cannot lock them: flock(2).

LOCK_TRIES = 10  # to take a lock that another process is just releasing


def open_lock(path: str, shared: bool) -> int:
    """Return a descriptor of the lock file, locked. Raises BlockingIOError if somebody else holds it, and OSError.

    Whoever held it last removes the file: a lock on a file that no longer has the name excludes nobody.
    """
    for left in reversed(range(LOCK_TRIES)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if not left:
                raise
            sleep(0.01)  # whoever removes the file holds it alone for an instant
        except BaseException:
            os.close(descriptor)
            raise
    raise BlockingIOError


def close_lock(path: str, descriptor: int):
    """Release the lock. The last holder removes the file while nobody can lock it; what a crash left does no harm."""
    try:
        with contextlib.suppress(OSError):  # another command shares it, or the folder has become read-only
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It lost the lock for a moment if it was shared: the file of that name may be another's by now.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.unlink(path)
    finally:
        os.close(descriptor)
