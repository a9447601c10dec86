"""What metrics tell of the machine, and the figures over time."""

import contextlib
import math
import os
import sys
import threading

from appliance.base.clock import Timekeeper
from appliance.base.metrics import (
    BUILD, CERTIFICATE_END, CLOCK, DATABASE_SIZE, DISK_FREE, KEY_AGE, LOG_SIZE, SESSIONS, WAL_SIZE, WRITABLE,
    figures_of,
)
from appliance.base.database import Unavailable
from appliance.base.tls import certificate_not_after
from microauthd import Idp, VERSION

# == Gauges ====================================================================
# They are put into the counters by the process of ADMIN: every minute, and before it answers a scraper.

CLOCK_STATES = ("right", "probation", "guessed", "behind", "ahead")
KEY_STATES = ("next", "active", "retired")
SESSIONS_MAX = 100_000  # of a kind that are counted: more would keep the database busy
LOG_FILES = 10  # that a rotation keeps


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def measure_certificates(idp: Idp) -> None:
    for side, not_after in certificate_not_after(idp.certificates).items():
        idp.counters.set(CERTIFICATE_END, not_after, side)


def measure_keys(idp: Idp) -> None:
    now = idp.now()
    for side, ring in (("auth", idp.auth_ring), ("admin", idp.admin_ring)):
        since: dict[tuple[str, str], int] = {}
        for key in ring.keys:
            since[key.alg, key.state] = min(key.since, since.get((key.alg, key.state), now))
        for alg in {key.alg for key in ring.keys} | {"ES256", "RS256"}:
            for state in KEY_STATES:
                age = now - since[alg, state] if (alg, state) in since else math.nan
                if (alg, state) in since or (KEY_AGE.name, side, alg, state) in idp.counters.entries:
                    idp.counters.set(KEY_AGE, age, side, alg, state)


def measure(idp: Idp) -> None:
    """Put what is true at the moment into the counters, but what reads the database: see FigureThread."""
    counters, options, path = idp.counters, idp.options, idp.store.path
    counters.set(BUILD, 1, VERSION, ".".join(map(str, sys.version_info[:3])))
    counters.set(WRITABLE, 0 if idp.store.generation.failed else 1)
    counters.set(DATABASE_SIZE, size_of(path))
    counters.set(WAL_SIZE, size_of(path + "-wal"))
    if options.log_file:
        ends = ("", *(f".{number}" for number in range(1, LOG_FILES + 1)))
        counters.set(LOG_SIZE, sum(size_of(options.log_file + end) for end in ends))
    with contextlib.suppress(OSError):
        room = os.statvfs(os.path.dirname(os.path.abspath(path)))
        counters.set(DISK_FREE, room.f_bavail * room.f_frsize)
    if isinstance(idp.clock, Timekeeper):
        for state in CLOCK_STATES:
            counters.set(CLOCK, state == idp.clock.state, state)
    measure_certificates(idp)
    measure_keys(idp)


# == Figures over time =========================================================


class FigureThread(threading.Thread):
    """Counts the sessions and notes the figures of a minute, shortly after it has ended."""

    def __init__(self, idp: Idp):
        super().__init__(name="figures", daemon=True)
        self.idp, self.ending = idp, threading.Event()

    def run(self) -> None:
        while True:
            self.step()
            if self.ending.wait(60 - self.idp.clock() % 60 + 0.5):
                return

    def step(self) -> None:
        idp = self.idp
        try:
            measure(idp)
            idp.history.note(idp.clock(), figures_of(idp.counters.totals()))
            lives = (int(option) for option in idp.store.list_token_lifetimes() if option.isdigit())
            longest = max(idp.options.token_expiration, idp.options.admin_token_expiration, *lives)
            for kind, count in idp.store.count_living(idp.now(), longest, SESSIONS_MAX).items():
                idp.counters.set(SESSIONS, count, kind)
        except Exception as error:
            idp.log("figures.failed", "error", reason=error.log if isinstance(error, Unavailable) else repr(error))
