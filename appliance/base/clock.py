"""The time, as far as the machine's clock can be believed."""

import functools
import select
import time

from appliance.base.shared import Byte, Real, Shared

# A clock that shows an earlier time than this is wrong, whatever it says. Unix seconds.
RELEASED_AT = 1795392000  # 2026-11-23
CLOCK_FAR = 45 * 86400    # seconds: a clock that leaps further is not trusted with what cannot be undone, for a day
IAT_SKEW = 60  # seconds a token's `iat` may lie in the future: two cores, two readings of a stepping clock


def sleep(seconds: float):
    """Sleep by select(): time.sleep() waits for an absolute time, and raises if a clock of the process is set."""
    select.select([], [], [], seconds)


class ClockState(Shared):
    """What the processes know of the clock. Offsets are Unix seconds less seconds since boot; times are the latter."""

    offset = Real()  # what is added to the seconds since boot
    trusted = Real()  # the offset before a leap that is on probation
    candidate = Real()  # the offset that the clock shows
    steady_since = Real()  # since when the clock has shown it
    since = Real()  # when a probation began; 0: there is none
    updated_at = Real()
    uptime = Real()  # seconds since boot less /proc/uptime, which no debugger sets
    guessed = Byte()  # the time was guessed, because the clock is behind what is known to have been


class Timekeeper:
    """The time, as far as the machine's clock can be believed; one for all processes of a server.

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

    def __init__(self, floor: int, wall=time.time, monotonic=None, uptime=None):
        self.shared = ClockState()
        since_boot = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
        self.wall, self.monotonic, self.uptime = wall, monotonic or since_boot, uptime or self.read_uptime
        monotonic, wall = self.monotonic(), self.wall()
        state = self.shared
        state.offset = state.trusted = state.candidate = wall - monotonic
        state.steady_since = state.updated_at = monotonic
        state.uptime = monotonic - self.uptime()
        if wall < floor - IAT_SKEW:
            state.offset = state.trusted = floor - monotonic
            state.guessed = True
        elif wall > floor + CLOCK_FAR and floor > RELEASED_AT:
            state.trusted, state.since = floor - monotonic, monotonic
        self.state_at_start = self.state

    def read_uptime(self) -> float:
        try:
            with open("/proc/uptime", "rb") as file:
                return float(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return self.monotonic()

    def __call__(self) -> float:
        """Unix seconds. Called several times a request."""
        return self.monotonic() + self.shared.offset

    @property
    def state(self) -> str:
        """`right`; `guessed` or `behind` where the clock is behind; `ahead`; `probation`."""
        ahead = self.shared.candidate - self.shared.offset
        if self.shared.guessed:
            return "guessed"
        if abs(ahead) > self.NEAR:
            return "ahead" if ahead > 0 else "behind"
        return "probation" if self.shared.since else "right"

    def update(self) -> bool:
        """Follow the clock by the table above. One process calls it twice a second. Return whether time went back."""
        state, monotonic = self.shared, self.monotonic()
        slip = monotonic - self.uptime() - state.uptime
        if abs(slip) > 5:  # even the seconds since boot were set, as a debugger or an emulator can
            state.uptime += slip
            state.offset, state.trusted, state.candidate = (
                state.offset - slip, state.trusted - slip, state.candidate - slip,
            )
            state.since = state.since and state.since + slip
            state.steady_since = state.steady_since and state.steady_since + slip
            state.updated_at = state.updated_at and state.updated_at + slip
        offset, at = self.wall() - monotonic, state.offset
        passed = min(60.0, max(0.0, monotonic - state.updated_at))
        if abs(offset - state.candidate) > 2:
            state.steady_since = monotonic
        state.candidate, state.updated_at = offset, monotonic
        went_back = False
        if state.since and state.trusted - self.NEAR <= offset < at - self.NEAR:
            state.offset, state.since = max(offset, state.trusted), 0.0
            went_back = True
        elif offset < at:
            if at - offset <= 86400:
                state.offset, state.guessed = max(offset, at - passed / 2), False
        elif offset - at <= self.NEAR or state.guessed or monotonic - state.steady_since >= self.STEADY:
            if offset - at > CLOCK_FAR:
                state.since = monotonic
            state.offset, state.guessed = offset, False
        if state.since and monotonic - state.since >= self.PROBATION:
            state.since = 0.0
        if not state.since:
            state.trusted = state.offset
        return went_back

    def accept(self):
        """Follow the clock as it stands: an operator has declared it right."""
        state = self.shared
        state.offset = state.trusted = state.candidate = self.wall() - self.monotonic()
        state.since, state.guessed = 0.0, False
