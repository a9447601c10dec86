"""A box whose machine fails when a test says so: the disk, the memory, accept(). See failing.c."""

import contextlib
import mmap
import struct

from box import Box

WORDS = ("files", "write", "room", "create", "sync", "read", "accept", "fork", "memory", "met")
DATABASE, LOG, OTHER = 1, 2, 4


class Faults:
    """The faults of a machine, shared with every process below the layer."""

    def __init__(self, path):
        path.write_bytes(bytes(8 * len(WORDS)))
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, word):
        return struct.unpack_from("=q", self.map, 8 * WORDS.index(word))[0]

    def __setitem__(self, word, value):
        struct.pack_into("=q", self.map, 8 * WORDS.index(word), value)

    def set(self, **words):
        """These faults and no others, of the database where nothing else is said. A fault is on when all that tells its kind is there."""
        for word in ("write", "create", "sync", "read", "accept", "fork", "memory"):
            self[word] = 0
        self["files"], self["room"], self["met"] = words.pop("files", DATABASE), words.pop("room", -1), 0
        for word, value in words.items():
            self[word] = value

    @contextlib.contextmanager
    def on(self, **words):
        self.set(**words)
        try:
            yield self
        finally:
            met = self["met"]
            self.set()
            self["met"] = met


class FailingBox(Box):
    """A box on a machine that fails: `faults` says how."""

    def __init__(self, folder, layer, **settings):
        super().__init__(folder, **settings)
        control = self.folder.with_name(self.folder.name + ".faults")
        self.faults = Faults(control)
        self.environ |= {"LD_PRELOAD": str(layer), "FAILING_FOLDER": str(self.folder), "FAILING_CONTROL": str(control)}
