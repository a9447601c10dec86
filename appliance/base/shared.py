"""Memory that the processes of a server share."""

import mmap
import struct
from typing import ClassVar, Generic, Literal, TypeVar

# == Shared ====================================================================
# Anonymous memory that is mapped before the first fork: each process sees what the others write.

N = TypeVar("N", int, float)
Form = Literal["B", "Q", "d"]  # formats of the struct module, native: octet, 64-bit count, float


class Number(Generic[N]):
    """A field of Shared: one number. To read or write it is one instruction; to do both takes a lock."""

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
    """A field of Shared: several numbers, as a memoryview that can be written."""

    def __init__(self, form: Form, count: int):
        self.form, self.count = form, count

    def __set_name__(self, owner, name: str):
        self.view = "_" + name

    def __get__(self, shared: "Shared", owner=None) -> memoryview:
        return getattr(shared, self.view)


class Shared:
    """Numbers that every process forked from this one shares. A subclass names its fields; all begin as zero."""

    def __init__(self):
        fields = [field for field in vars(type(self)).values() if isinstance(field, (Number, Numbers))]
        sizes = [field.count * struct.calcsize(field.form) for field in fields]
        memory = memoryview(mmap.mmap(-1, sum(sizes) + 8 * len(sizes)))
        at = 0
        for field, size in zip(fields, sizes, strict=True):
            setattr(self, field.view, memory[at : at + size].cast(field.form))
            at += size + -size % 8  # each is aligned, whatever its size
