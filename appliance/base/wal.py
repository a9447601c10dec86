"""SQLite's write-ahead log (WAL)."""

import struct

from appliance.base import StartupError


def check_log(path: str) -> None:
    """Raise StartupError if the header of the database's write-ahead log is damaged.

    SQLite would treat such a WAL as empty and overwrite it, silently losing the last acknowledged
    transactions. A power cut cannot cause this: SQLite syncs the header before it writes any frame.
    https://www.sqlite.org/fileformat2.html#walformat
    """
    for _ in range(3):  # a running server may be rewriting the header while we read it
        try:
            with open(path + "-wal", "rb") as file:
                head = file.read(32)
        except FileNotFoundError:
            return
        magic = int.from_bytes(head[:4], "big")
        one = two = 0
        for word, other in struct.iter_unpack(">II" if magic & 1 else "<II", head[:24].ljust(24)):
            one = one + word + two & 0xFFFFFFFF
            two = two + other + one & 0xFFFFFFFF
        if not head or (magic | 1 == 0x377F0683 and head[24:] == struct.pack(">II", one, two)):
            return
    raise StartupError(
        f"the write-ahead log {path}-wal is damaged, and holds what was done last: restore a backup, or move it "
        "away to go on without; it is left as it is"
    )
