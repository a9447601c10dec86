"""SQLite's write-ahead log (WAL): its header and frames, and the mark outside it of what in it was acknowledged."""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator

import msgspec

from appliance.base import StartupError
from appliance.base.files import sync_directory

# == Frames ====================================================================
# A header, then frames of a head and a page. Every checksum continues that of the frame before it, so the one of a
# frame stands for the whole log up to there. https://www.sqlite.org/fileformat2.html#walformat

HEAD_SIZE, FRAME_HEAD_SIZE = 32, 24


def checksum(content: bytes, magic: int, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Return the checksum of a log up to the end of `content`, where `before` is that up to its beginning."""
    one, two = before
    for word, other in struct.iter_unpack(">II" if magic & 1 else "<II", content):
        one = one + word + two & 0xFFFFFFFF
        two = two + other + one & 0xFFFFFFFF
    return one, two


def read_head(path: str) -> bytes:
    """Return the header of the log of a database: shorter than HEAD_SIZE if it is cut, empty if there is no log."""
    try:
        with open(path + "-wal", "rb") as file:
            return file.read(HEAD_SIZE)
    except FileNotFoundError:
        return b""


def check_log(path: str) -> None:
    """Raise StartupError if the header of the database's write-ahead log is damaged.

    SQLite would treat such a WAL as empty and overwrite it, silently losing the last acknowledged
    transactions. A power cut cannot cause this: SQLite syncs the header before it writes any frame.
    """
    for _ in range(3):  # a running server may be rewriting the header while we read it
        head = read_head(path)
        magic = int.from_bytes(head[:4], "big")
        if not head or (
            magic | 1 == 0x377F0683 and head[24:] == struct.pack(">II", *checksum(head[:24].ljust(24), magic))
        ):
            return
    raise StartupError(
        f"the write-ahead log {path}-wal is damaged, and holds what was done last: restore a backup, or move it "
        "away to go on without; it is left as it is"
    )


class Frame(msgspec.Struct, frozen=True):
    """The head of a frame. `is_commit` says that it ends a transaction; `checksum` is the eight octets stored in it."""

    is_commit: bool
    salt: bytes
    checksum: bytes
    is_valid: bool | None = None  # whether its page fits the checksum, given that stored in the frame before


def read_frame(path: str, number: int) -> Frame | None:
    """Return the head of a frame, counted from 1, or None where the log ends before it. Its page is not read."""
    descriptor = os.open(path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
    try:
        page_size = int.from_bytes(os.pread(descriptor, 4, 8), "big")
        at = HEAD_SIZE + (number - 1) * (page_size + FRAME_HEAD_SIZE)
        head = os.pread(descriptor, FRAME_HEAD_SIZE, at)
    finally:
        os.close(descriptor)
    return None if len(head) < FRAME_HEAD_SIZE else Frame(head[4:8] != bytes(4), head[8:16], head[16:])


def read_frames(path: str, after: int) -> Iterator[Frame]:
    """Yield the frames behind the first `after` ones, each checked against the one before it."""
    with open(path + "-wal", "rb") as file:
        head = file.read(HEAD_SIZE)
        magic, _, page_size = struct.unpack_from(">III", head)
        before, size = struct.unpack_from(">II", head, 24), page_size + FRAME_HEAD_SIZE
        if after:
            file.seek(HEAD_SIZE + (after - 1) * size)
            before = struct.unpack_from(">II", file.read(FRAME_HEAD_SIZE), 16)
            file.seek(page_size, os.SEEK_CUR)
        while len(content := file.read(size)) == size:
            salt, stored, is_valid = content[8:16], content[16:24], False
            if salt == head[16:24]:
                covered = content[:8] + content[FRAME_HEAD_SIZE:]
                is_valid = checksum(covered, magic, before) == struct.unpack(">II", stored)
            yield Frame(content[4:8] != bytes(4), salt, stored, is_valid)
            before = struct.unpack(">II", stored)


# == The mark ==================================================================
# SQLite ends its recovery at the first frame that does not fit, and takes what stands before it for the whole: so a
# flipped bit would undo, in silence, what was acknowledged behind it. The mark says how far the log was acknowledged.
# It is written after the sync of a commit and never synced for its own sake, so after a power cut it may be older
# than the log, which it then still fits, and never newer. It stands in the lock file of the database, which every
# start of a release that knows no mark truncates: so it is never older than what such a release has done.


class Mark(msgspec.Struct, frozen=True):
    """What is known of the log. Of the log with this salt, the first `frames` are on the disk, up to `checksum`."""

    salt: bytes = bytes(8)
    frames: int = 0  # 0: nothing in it has been acknowledged
    checksum: bytes = bytes(8)
    seen: int = 0  # frames of it when the mark was written, those of commits without a sync among them
    may_be_gone: bool = True  # written before the log is removed or emptied: then the database holds all of it
    at_ms: int = 0  # Unix milliseconds, when it was written


MARK = struct.Struct(">4s8sI8sI?3xQ")
MARK_MAGIC = b"wal1"
MARK_AT = 64  # in the lock file, behind the pid; with its CRC within one sector, which a disk writes whole or not
MARK_SIZE = MARK.size + 4
RESTARTS = 1 << 16  # how far the log may be ahead of a mark that a power cut or a full disk left behind


class MarkFile:
    """Reads and writes the mark of one database. Without a lock file, as for a copy, there is none.

    The descriptor stays open until close(): closing any of the file drops this process's fcntl locks on it, among them
    the lock on which writers queue. fcntl(2).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor: int | None = None  # -1: there is no lock file

    def open(self) -> int:
        """Return the descriptor of the lock file. Raises OSError."""
        if self.descriptor is None:
            self.descriptor = -1
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.path + ".lock", flags)
        if self.descriptor < 0:
            raise FileNotFoundError
        return self.descriptor

    def close(self) -> None:
        if self.descriptor is not None and self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = None

    def read(self) -> Mark | None:
        """Return the mark; None if none was ever written here. One that is damaged promises nothing."""
        try:
            content = os.pread(self.open(), MARK_SIZE, MARK_AT)
        except OSError:
            return None
        if not content.strip(b"\0"):
            return None
        if len(content) < MARK_SIZE or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "big"):
            return Mark()
        magic, *fields = MARK.unpack(content[:-4])
        return Mark(*fields) if magic == MARK_MAGIC else Mark()

    def write(self, mark: Mark, sync: bool = False) -> None:
        """Write the mark, and with `sync` wait for the disk. Raises OSError."""
        content = MARK.pack(MARK_MAGIC, *msgspec.structs.astuple(mark))
        os.pwrite(self.open(), content + zlib.crc32(content).to_bytes(4, "big"), MARK_AT)
        if sync:
            os.fsync(self.open())

    def adopt(self, was_damaged: bool, frames: int, at_ms: int) -> None:
        """Go on from the mark that is there, at a start that found so many frames valid.

        Where there is none, and where the log did not fit it, it becomes one that promises nothing, durably.
        """
        with contextlib.suppress(OSError):
            known = self.read()
            if known is None or was_damaged:
                self.write(Mark(at_ms=at_ms), sync=True)
                sync_directory(os.path.dirname(os.path.abspath(self.path)))
            elif known.seen > frames:  # a power cut has taken what a batch wrote
                self.write(msgspec.structs.replace(known, seen=frames))

    def note_commit(self, frames: int, is_synced: bool, at_ms: int) -> None:
        """Note a commit, after which the log has so many valid frames. The caller holds the write lock.

        A failure is not the commit's: the mark stays behind, as after a power cut.
        """
        with contextlib.suppress(OSError):
            known = self.read()
            frame = read_frame(self.path, frames) if frames > 0 else None
            if frame is None:
                return
            synced, checksum = 0, bytes(8)
            if known is not None and known.salt == frame.salt:
                if frames <= known.seen:
                    return  # nothing was written, so nothing was synced either: not what a batch wrote before
                synced, checksum = known.frames, known.checksum
            if is_synced:
                synced, checksum = frames, frame.checksum
            self.write(Mark(frame.salt, synced, checksum, frames, False, at_ms))

    def allow_removal(self) -> None:
        """Note, durably, that the log is about to be removed or emptied, once all of it is in the database."""
        with contextlib.suppress(OSError):
            mark = self.read()
            if mark is not None and not mark.may_be_gone:
                self.write(msgspec.structs.replace(mark, may_be_gone=True), sync=True)


def forget_mark(path: str) -> None:
    """Remove the mark of a database that is about to be replaced, durably."""
    file = MarkFile(path)
    try:
        if file.read() is not None:
            os.pwrite(file.open(), bytes(MARK_SIZE), MARK_AT)
            os.fsync(file.open())
    finally:
        file.close()


# == Damage ====================================================================


def is_damaged_behind(path: str, frames: int) -> bool:
    """Return whether a bad frame is followed by two commits of the same log. This needs no mark.

    `frames` is the end that SQLite has found. A bad frame alone is a torn tail: a disk may persist the frames of a
    transaction in any order before their sync returns, so even its last one may be whole behind a bad one. The next
    transaction begins only when that sync has returned. So behind a bad frame there may be the commit of its own
    transaction, but a second one proves that the bad frame was on the disk, unless its transaction was a batch, which
    is not synced: a power cut between two batches of machine tokens can raise a false alarm. Therefore this is asked
    only where there is no mark: once, at the first start of a release that writes one.
    """
    found, commits = False, 0
    for frame in read_frames(path, frames):
        found |= not frame.is_valid
        commits += found and bool(frame.is_valid) and frame.is_commit
        if commits == 2:
            return True
    return False


def find_damage(path: str, mark: Mark | None, frames: int) -> str:
    """Return a sentence if the log lacks what was acknowledged, "" otherwise; its header is good: see check_log().

    `frames` is how many of it are valid up to its last commit, as SQLite's recovery has found.
    """
    head = read_head(path)
    if mark is None:
        damaged = len(head) == HEAD_SIZE and is_damaged_behind(path, frames)
        return f"frame {frames + 1} or one soon behind it is damaged, and commits follow it" if damaged else ""
    if not mark.frames:
        return ""
    if not head:
        return "" if mark.may_be_gone else f"it is gone or empty, and held {mark.frames} frames that were acknowledged"
    if (salt := head[16:24]) != mark.salt:
        # SQLite adds one to the first half of the salt when it begins the log again, after all of it was put into the
        # database and synced; a log that is made anew has a random one.
        restarts = int.from_bytes(salt[:4], "big") - int.from_bytes(mark.salt[:4], "big") & 0xFFFFFFFF
        was_restarted = 0 < restarts <= RESTARTS
        return "" if was_restarted or mark.may_be_gone else "it is another one than was written to last"
    if frames < mark.frames:
        return f"{frames} of its frames are whole, and {mark.frames} were acknowledged"
    frame = read_frame(path, mark.frames)
    if frame is None or frame.checksum != mark.checksum:
        return f"its frame {mark.frames} is another one than was acknowledged"
    return ""
