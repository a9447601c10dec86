"""Numbers in memory that the processes of a server share."""

import mmap
import struct
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
