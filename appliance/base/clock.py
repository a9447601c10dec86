"""What time it is, as far as the clock of the machine can be believed."""

import functools
import mmap
import select
import struct
import time


# A clock that shows an earlier time than this is wrong, whatever it says. Unix seconds.
RELEASED_AT = 1795392000  # 2026-11-23
CLOCK_FAR = 45 * 86400    # seconds: a clock that leaps further is not trusted with what cannot be undone, for a day
IAT_SKEW = 60  # seconds a token's `iat` may lie in the future: two cores, two readings of a stepping clock


def sleep(seconds: float):
    """Sleep. Not by time.sleep, which counts in absolute time: it raises where something sets the clocks of this
    process.
    """
    select.select([], [], [], seconds)


class Timekeeper:
    """What time it is, as far as the machine's clock can be believed. One for all processes of a server.

    now = seconds since boot, which nobody can set, + an offset that follows the clock:

        the clock is                        the offset
        up to two minutes ahead             follows at once
        further ahead                       follows when the clock has kept that time for ten minutes
        up to a day behind                  goes back at half speed, so that time never does
        further behind                      stays, at the pace of the seconds since boot
        ahead after a time that was guessed follows at once: a start without a clock, before NTP

    After a leap of more than CLOCK_FAR comes a day of probation: nothing is purged, no key retires, and
    the clock may still go back to where it was; what was done in between is ended then. At a start whose
    clock is behind what is known to have been, time goes on from there, and what was under way is over.
    """

    NEAR, STEADY, PROBATION = 120, 600, 86400  # seconds
    FIELDS = "offset", "trusted", "since", "candidate", "steady_since", "looked", "uptime", "guessed"
    OFFSET = struct.Struct("<d")  # the first field

    def __init__(self, floor: int, wall=time.time, monotonic=None, uptime=None):
        self.shared = mmap.mmap(-1, 8 * len(self.FIELDS))
        since_boot = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
        self.wall, self.monotonic, self.uptime = wall, monotonic or since_boot, uptime or self.read_uptime
        monotonic, wall = self.monotonic(), self.wall()
        offset = wall - monotonic
        self.put(
            offset=offset, trusted=offset, candidate=offset, steady_since=monotonic, looked=monotonic,
            uptime=monotonic - self.uptime(), since=0.0, guessed=0.0,
        )
        if wall < floor - IAT_SKEW:
            self.put(offset=floor - monotonic, trusted=floor - monotonic, guessed=1.0)
        elif wall > floor + CLOCK_FAR and floor > RELEASED_AT:
            self.put(trusted=floor - monotonic, since=monotonic)
        self.began = self.state

    def read_uptime(self) -> float:
        try:
            with open("/proc/uptime", "rb") as file:
                return float(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return self.monotonic()

    def get(self, name) -> float:
        return struct.unpack_from("<d", self.shared, 8 * self.FIELDS.index(name))[0]

    def put(self, **values):
        for name, value in values.items():
            struct.pack_into("<d", self.shared, 8 * self.FIELDS.index(name), value)

    def __call__(self) -> float:
        """Unix seconds. Called several times a request."""
        return self.monotonic() + self.OFFSET.unpack_from(self.shared)[0]

    @property
    def state(self) -> str:
        """`right`; `guessed` or `behind` where the clock is behind; `ahead`; `probation`."""
        off = self.get("candidate") - self.get("offset")
        if self.get("guessed"):
            return "guessed"
        if abs(off) > self.NEAR:
            return "ahead" if off > 0 else "behind"
        return "probation" if self.get("since") else "right"

    def look(self) -> bool:
        """Follow the clock as the table says; one process does, twice a second. Return whether time went back."""
        monotonic = self.monotonic()
        slip = monotonic - self.uptime() - self.get("uptime")
        if abs(slip) > 5:  # even the seconds since boot were set, as a debugger or an emulator can
            self.put(
                uptime=self.get("uptime") + slip,
                **{name: self.get(name) - slip for name in ("offset", "trusted", "candidate")},
            )
            self.put(**{name: self.get(name) + slip for name in ("since", "steady_since", "looked") if self.get(name)})
        offset, at = self.wall() - monotonic, self.get("offset")
        passed = min(60.0, max(0.0, monotonic - self.get("looked")))
        if abs(offset - self.get("candidate")) > 2:
            self.put(steady_since=monotonic)
        self.put(candidate=offset, looked=monotonic)
        went_back = False
        if self.get("since") and self.get("trusted") - self.NEAR <= offset < at - self.NEAR:
            self.put(offset=max(offset, self.get("trusted")), since=0.0)
            went_back = True
        elif offset < at:
            if at - offset <= 86400:
                self.put(offset=max(offset, at - passed / 2), guessed=0.0)
        elif offset - at <= self.NEAR or self.get("guessed") or monotonic - self.get("steady_since") >= self.STEADY:
            if offset - at > CLOCK_FAR:
                self.put(since=monotonic)
            self.put(offset=offset, guessed=0.0)
        if self.get("since") and monotonic - self.get("since") >= self.PROBATION:
            self.put(since=0.0)
        if not self.get("since"):
            self.put(trusted=self.get("offset"))
        return went_back

    def accept(self):
        """Take the clock as it stands: an operator says that it is right."""
        offset = self.wall() - self.monotonic()
        self.put(offset=offset, trusted=offset, candidate=offset, since=0.0, guessed=0.0)
