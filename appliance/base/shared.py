"""Numbers in memory that the processes of a server share."""

import contextlib
import hashlib
import mmap
import os
import struct
import zlib
from typing import ClassVar, Generic, Literal, TypeVar

# == Shared ====================================================================
# Anonymous shared memory, mapped before the first fork: each process sees what the others write. mmap(2).

N = TypeVar("N", int, float)
Form = Literal["B", "Q", "d"]  # formats of the struct module, native: octet, 64-bit count, float


class Number(Generic[N]):
    """A field of Shared: one number. A read or a write is one instruction; read-modify-write needs a lock."""

    form: ClassVar[Form]
    count = 1

    def __set_name__(self, owner, name: str):
        self.view = "_" + name

    def __get__(self, shared: "Shared", owner=None) -> N:
        return getattr(shared, self.view)[0]

    def __set__(self, shared: "Shared", value: N):
        getattr(shared, self.view)[0] = value


class Byte(Number[int]):
    form = "B"


class Real(Number[float]):
    form = "d"


class Numbers:
    """A field of Shared: several numbers, as a writable memoryview."""

    def __init__(self, form: Form, count: int):
        self.form, self.count = form, count

    def __set_name__(self, owner, name: str):
        self.view = "_" + name

    def __get__(self, shared: "Shared", owner=None) -> memoryview:
        return getattr(shared, self.view)


class Shared:
    """Numbers that this process shares with every process forked from it. A subclass declares them; all start at 0."""

    def __init__(self):
        fields = [field for field in vars(type(self)).values() if isinstance(field, (Number, Numbers))]
        sizes = [field.count * struct.calcsize(field.form) for field in fields]
        memory = memoryview(mmap.mmap(-1, sum(sizes) + 8 * len(sizes)))
        at = 0
        for field, size in zip(fields, sizes, strict=True):
            setattr(self, field.view, memory[at : at + size].cast(field.form))
            at += size + -size % 8  # aligned to 8 octets, whatever its size


# == Buckets ===================================================================
# So that a limit is that of the box: with a table in each process, four workers would allow four times as much.


class Buckets(Shared):
    """The levels of token buckets, by key, for all processes of a server: a table that does not grow.

    A key may stand in any of the WAYS places of its set, and takes the one that was used least recently. The hash has a
    secret, so that nobody can choose keys of one set. No lock: of two writes in the same instant one may be lost.
    """

    SETS, WAYS = 4096, 8  # 768 KB, of which only pages with a bucket in them take memory
    hashes = Numbers("Q", SETS * WAYS)  # 0: free
    levels = Numbers("d", SETS * WAYS)
    times = Numbers("d", SETS * WAYS)  # when the level was that

    def __init__(self) -> None:
        super().__init__()
        self.secret = os.urandom(16)

    def places(self, key: tuple) -> tuple[int, range]:
        """Return the hash of a key, and the places where it may stand."""
        digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8, key=self.secret).digest()
        hashed = int.from_bytes(digest, "big") or 1
        start = hashed % self.SETS * self.WAYS
        return hashed, range(start, start + self.WAYS)

    def get(self, key: tuple, default: tuple[float, float]) -> tuple[float, float]:
        """Return a level and when it was that."""
        hashed, places = self.places(key)
        for place in places:
            if self.hashes[place] == hashed:
                return self.levels[place], self.times[place]
        return default

    def put(self, key: tuple, level: float, at: float) -> None:
        hashed, places = self.places(key)
        known = [place for place in places if self.hashes[place] == hashed]
        free = [place for place in places if not self.hashes[place]]
        place = (known or free or [min(places, key=lambda place: self.times[place])])[0]
        self.hashes[place] = hashed
        self.levels[place], self.times[place] = level, at  # type: ignore[call-overload] # a memoryview of floats


# == Marks =====================================================================
# So that a program of this machine can tell, without a request, whether what it keeps a copy of may have ended since.


class ChangeMarks:
    """A file of marks that readers compare with those they saw before: a mark that has changed says "ask again".

    It holds MAGIC, 8 random octets of this start, 8 octets of the `number` that says which server it is, and CELLS
    cells of 8 octets, of which the first stands for everything and each other one for the keys whose CRC-32 leads to
    it. A cell is given random octets, so two processes that change it at once need no lock. All processes map the file.
    It tells nothing but that something has ended, so its `mode` may let others read it.
    """

    MAGIC, HEAD, CELLS = b"madmark1", 24, 4096

    def __init__(self, path: str = "", number: int = 0, mode: int = 0o600) -> None:
        """Make the file anew. Without a path, or where it cannot be made, there is none, and nothing is marked."""
        self.path, self.cells = path, None
        content = self.MAGIC + os.urandom(8) + number.to_bytes(8, "big") + bytes(8 * self.CELLS)
        with contextlib.suppress(OSError):
            if path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + ".new")
                descriptor = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                try:
                    os.fchmod(descriptor, mode)
                    os.write(descriptor, content)
                    self.cells = memoryview(mmap.mmap(descriptor, len(content)))[self.HEAD :]
                finally:
                    os.close(descriptor)
                os.replace(path + ".new", path)

    @classmethod
    def touch_file(cls, path: str, number: int) -> None:
        """Say that everything may have ended, beside a server that has the file mapped. Do nothing without one."""
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                head = os.pread(descriptor, cls.HEAD, 0)
                if head[:8] == cls.MAGIC and int.from_bytes(head[16:], "big") == number:
                    os.pwrite(descriptor, os.urandom(8), cls.HEAD)
            finally:
                os.close(descriptor)

    def touch(self, key: str = "") -> None:
        """Say that what has this key may have ended; without one, everything."""
        if self.cells is not None:
            place = 8 * (zlib.crc32(key.encode()) % (self.CELLS - 1) + 1 if key else 0)
            self.cells[place : place + 8] = os.urandom(8)
