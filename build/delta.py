"""Store a native module as its difference from that of another Python version.

The builds of sqlcipher3 for four Pythons hold the same SQLite and OpenSSL, at other addresses: as differences three of
them take 0.7 MB each instead of 3.3, and the archive 24 MB instead of 40. build/main.py, restore_block(), puts
them together again; without this file the archive would hold all of them whole.
"""

from collections import Counter

BLOCK = 4096  # bytes; as in build/main.py
WINDOW = 16  # bytes that must be equal for a place in both to be taken for the same
ENOUGH = 24  # equal windows that settle where a block comes from


def xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def index_windows(base: bytes) -> dict[bytes, int]:
    """Return where each window stands in the base, for those that occur once among the aligned ones."""
    index: dict[bytes, int] = {}
    for at in range(0, len(base) - WINDOW, WINDOW):
        window = base[at : at + WINDOW]
        index[window] = -1 if window in index else at
    return {window: at for window, at in index.items() if at >= 0}


def find_shifts(block: bytes, at: int, index: dict[bytes, int]) -> list[int]:
    """Return how far away in the base the bytes of a block stand, the likeliest first."""
    votes: Counter[int] = Counter()
    for place in range(len(block) - WINDOW):
        found = index.get(block[place : place + WINDOW])
        if found is not None:
            shift = found - at - place
            votes[shift] += 1
            if votes[shift] == ENOUGH:
                break
    return [shift for shift, _ in votes.most_common(3)]


def make_delta(base: bytes, content: bytes) -> tuple[list[int | None], bytes]:
    """Return (shifts, difference): for each block how far away its like is in the base, None if it is stored whole."""
    index = index_windows(base)
    shifts: list[int | None] = []
    difference = bytearray()
    last = 0
    for at in range(0, len(content), BLOCK):
        block = content[at : at + BLOCK]
        best, stored = None, block
        for shift in [*find_shifts(block, at, index), last]:
            start = at + shift
            if 0 <= start <= len(base) - len(block):
                changed = xor(block, base[start : start + len(block)])
                if changed.count(0) > stored.count(0):
                    best, stored = shift, changed
        shifts.append(best)
        difference += stored
        last = last if best is None else best
    return shifts, bytes(difference)
