"""What a power cut leaves: a folder put together from the record that losing.c kept of everything done to its files.

What was synced before the cut is there. Of what was not, each write is there, not there, or torn
between 512-byte sectors, whatever was written before or after it; of creations, renames and removals
that no sync of their folder covered, a part from the first on is there, as a journalling file system
keeps them. SQLite's shared memory is memory, and gone.
"""

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from box import Box

HEAD = struct.Struct("=7q")
MAGIC = 0x4C4F53494E47
SECTOR = 512
NOT_KEPT = (".log", "output.txt", ".log.lock")  # nothing is promised of them


def compile_layer(folder, name="losing"):
    """Compile a layer for LD_PRELOAD: its path. Without a compiler this fails; it is never left out."""
    target = Path(folder) / f"{name}.so"
    done = subprocess.run(
        [
            "cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(target),
            str(Path(__file__).with_name(f"{name}.c")), "-ldl",
        ],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, (
        "the fault tests need a C compiler (on Debian: apt install gcc libc6-dev): " + done.stderr
    )
    return target


class RecordedBox(Box):
    """A box below which every write is recorded. `base` is what its folder held before."""

    def __init__(self, folder, layer, record, **settings):
        super().__init__(folder, **settings)
        self.record, self.base = Path(record), {}
        self.environ |= {"LD_PRELOAD": str(layer), "LOSING_FOLDER": str(self.folder), "LOSING_RECORD": str(record)}

    def run(self, *words, **more):
        if words[0] == "setup":
            self.base = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        return super().run(*words, **more)

    def mark(self):
        return self.record.stat().st_size if self.record.exists() else 0


@dataclass
class File:
    content: bytes = b""
    done: list = field(default_factory=list)  # (end of its record, offset, bytes), or (…, size, None) for a truncation
    synced: int = 0  # what was recorded before this is on the disk


class Entry:
    """One thing that was done, and where its record ends."""

    __slots__ = ("end", "kind", "key", "one", "two", "path", "other")

    def __init__(self, end, kind, key, one, two, path, other):
        self.end, self.kind, self.key, self.one, self.two, self.path, self.other = end, kind, key, one, two, path, other


def read_record(path):
    content, at, found = Path(path).read_bytes(), 0, []
    while at < len(content):
        kind, key, one, two, length, more, magic = HEAD.unpack_from(content, at)
        assert magic == MAGIC, f"the record is damaged at {at}"
        at += HEAD.size
        found.append(
            Entry(
                at + length + more, chr(kind), key, one, two, content[at : at + length],
                content[at + length : at + length + more],
            )
        )
        at += length + more
    return found


class Disk:
    """The folder as far as the record goes."""

    def __init__(self, folder, base):
        self.folder = str(folder)
        self.base = {f"{self.folder}/{name}": File(content) for name, content in base.items()}
        self.names, self.files = dict(self.base), {}
        self.folders, self.moves, self.synced = set(), [], 0

    def apply(self, entry):
        path = entry.path.decode() if entry.kind in "OUR" else ""
        if entry.kind == "O":
            if path == self.folder:
                self.folders.add(entry.key)
                return
            if path not in self.names:
                self.names[path] = File()
                self.moves.append((entry.end, "new", path, self.names[path]))
            self.files[entry.key] = self.names[path]
            if entry.two:
                self.names[path].done.append((entry.end, 0, None))
        elif entry.kind == "W":
            self.files[entry.key].done.append((entry.end, entry.one, entry.path))
        elif entry.kind == "T":
            self.files[entry.key].done.append((entry.end, entry.one, None))
        elif entry.kind == "S" and entry.key in self.folders:
            self.synced = max(self.synced, entry.one)
        elif entry.kind == "S":
            self.files[entry.key].synced = max(self.files[entry.key].synced, entry.one)
        elif entry.kind == "U":
            self.names.pop(path, None)
            self.moves.append((entry.end, "gone", path, None))
        elif entry.kind == "R":
            other = entry.other.decode()
            self.names[other] = self.names.pop(path)
            self.moves.append((entry.end, "moved", path, other))

    def cut(self, dice, target, keep=None):
        """Write the folder into `target` as a cut now leaves it; `keep` is how much of what is not synced is there."""
        keep = dice.choice([0, 0, 0.5, 0.5, 1]) if keep is None else keep
        loose = [move for move in self.moves if move[0] > self.synced]
        left = [move for move in self.moves if move[0] <= self.synced] + loose[
            : dice.randint(0, len(loose)) if keep else 0
        ]
        names = dict(self.base)
        for _, what, path, other in left:
            if what == "new":
                names[path] = other
            elif what == "gone":
                names.pop(path, None)
            else:
                names[other] = names.pop(path)
        os.makedirs(target, mode=0o700)
        for path, file in names.items():
            if not path.endswith(NOT_KEPT):
                with open(
                    Path(target) / os.path.basename(path), "wb", opener=lambda path, flags: os.open(path, flags, 0o600)
                ) as out:
                    out.write(self.content_of(file, dice, keep))

    def content_of(self, file, dice, keep):
        content = bytearray(file.content)
        for end, offset, data in file.done:
            is_synced = end <= file.synced
            if not is_synced and dice.random() >= keep:
                continue
            if data is None:
                if len(content) > offset:
                    del content[offset:]
                else:
                    content.extend(bytes(offset - len(content)))
                continue
            for at, piece in [(offset, data)] if is_synced or keep == 1 else torn(offset, data, dice):
                if len(content) < at:
                    content.extend(bytes(at - len(content)))
                content[at : at + len(piece)] = piece
        return bytes(content)


def torn(offset, data, dice):
    """The sectors of a write that reached the disk: all, the first, the last, or any."""
    bounds = [0, *range(SECTOR - offset % SECTOR, len(data), SECTOR), len(data)]
    pieces = [(offset + a, data[a:b]) for a, b in zip(bounds, bounds[1:])]
    how, at = dice.choice(["whole", "first", "last", "any"]), dice.randint(0, len(pieces))
    return {
        "whole": pieces, "first": pieces[:at], "last": pieces[at:],
        "any": [piece for piece in pieces if dice.random() < 0.5],
    }[how]


class Cuts:
    """Folders as cuts at growing places of a record leave them."""

    def __init__(self, entries, folder, base):
        self.entries, self.disk, self.at = entries, Disk(folder, base), 0

    def cut(self, place, dice, target, keep=None):
        """Everything whose record ends by `place` was done; what is left of it."""
        shutil.rmtree(target, ignore_errors=True)
        while self.at < len(self.entries) and self.entries[self.at].end <= place:
            self.disk.apply(self.entries[self.at])
            self.at += 1
        self.disk.cut(dice, target, keep)
