"""Counters that all processes of a server share, and the text that Prometheus reads."""

import bisect
import fcntl
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from appliance.base.shared import Numbers, Real, Shared

# == Metrics ===================================================================
# Every metric, declared once: the exposition, the table of the manual and the checks of its names come from here.
# By hand: prometheus_client takes 14 MB, and its multi-process mode keeps a file of each process that ever was.

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
OTHER = "other"  # the label of what is beyond the bound of a metric
NO_ROUTE = "none"  # the label of a request that no route answers
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metric(msgspec.Struct, frozen=True):
    """A metric. `bounds` are the buckets of a histogram; `most` is how many values its last label may have."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    most: int = 0
    is_momentary: bool = False  # a gauge of what a process has under way: 0 when it begins


def counter(name: str, help: str, *labels: str, most: int = 0) -> Metric:
    return Metric(f"microauthd_{name}", "counter", help, labels, most=most)


def gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"microauthd_{name}", "gauge", help, labels)


def histogram(name: str, help: str, *labels: str, bounds: tuple[float, ...] = FAST) -> Metric:
    return Metric(f"microauthd_{name}", "histogram", help, labels, bounds)


MAX_CLIENTS = 200  # of which a metric tells by name; the rest is "other"

REQUESTS = counter(
    "http_requests_total", "Requests that were answered, by the template of their route.", "server", "route", "method",
    "status",
)
REQUEST_SECONDS = histogram(
    "http_request_duration_seconds", "Time from a whole request to its response.", "server", "route"
)
HTTP_REFUSALS = counter(
    "http_refusals_total", "Requests that were refused before any route: malformed, too large or too slow.", "server",
    "status",
)
TOKENS = counter(
    "tokens_issued_total", "Token responses, by grant and client.", "grant", "client", most=MAX_CLIENTS
)
LOGINS = counter("logins_total", "Verifications of a person's credentials, by outcome.", "outcome")
LOCKOUTS = counter("lockouts_total", "Lockouts that began, by what is locked.", "kind")
ARGON2_SECONDS = histogram("argon2_duration_seconds", "Time that one computation of Argon2id takes.")
ARGON2_WAIT_SECONDS = histogram("argon2_wait_seconds", "Time that a request waits for its turn to compute Argon2id.")
ARGON2_REFUSALS = counter("argon2_refusals_total", "Requests that were refused because too many wait for Argon2id.")
ARGON2_QUEUE = msgspec.structs.replace(
    gauge("argon2_queue_length", "Requests that wait for Argon2id or compute it."), is_momentary=True
)
COMMIT_SECONDS = histogram(
    "database_commit_duration_seconds",
    "Time that a commit takes: a group of changes, synced, or a batch of rows of machine tokens, not synced.", "kind",
)
COMMIT_SIZE = histogram(
    "database_commit_transactions", "Transactions of a group, or rows of a batch, that one commit covers.", "kind",
    bounds=(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 500.0, 5000.0),
)
COMMIT_FAILURES = counter("database_commit_failures_total", "Writes that failed.")
WRITABLE = gauge("database_writable", "Whether the last write succeeded: 1 or 0.")
SESSIONS = gauge(
    "sessions", "Tokens, and logins of browsers, that have not expired and are not revoked one by one; counted once a "
    "minute, up to 100,000.", "kind"
)
DATABASE_SIZE = gauge("database_size_bytes", "Size of the database.")
WAL_SIZE = gauge("database_wal_size_bytes", "Size of the write-ahead log of the database.")
LOG_SIZE = gauge("log_size_bytes", "Size of the log file.")
DISK_FREE = gauge("disk_free_bytes", "Space that is left where the database lies.")
CERTIFICATE_END = gauge(
    "certificate_not_after_timestamp_seconds", "When the certificate of a port ends; absent without TLS.", "server"
)
KEY_AGE = gauge(
    "signing_key_age_seconds", "Time since a signing key has its state; of several, the longest.", "server", "alg",
    "state",
)
CLOCK = gauge("clock_state", "The state of the clock, which is the one with the value 1.", "state")
WORKERS_CONFIGURED = gauge("workers_configured", "Processes that should serve.")
WORKERS_ALIVE = gauge("workers_alive", "Processes that serve.")
WORKER_RESTARTS = counter("worker_restarts_total", "Processes that ended unasked and were replaced.")
BACKUPS = counter("backups_total", "Backups asked for over ADMIN or made by schedule, by outcome.", "outcome")
BACKUP_AT = gauge("backup_success_timestamp_seconds", "When a backup last succeeded since the start; absent before.")
START_AT = gauge("start_timestamp_seconds", "When the server started.")
BUILD = gauge("build_info", "The version of microauthd and of Python, as labels; always 1.", "version", "python")

METRICS = (
    REQUESTS, REQUEST_SECONDS, HTTP_REFUSALS, TOKENS, LOGINS, LOCKOUTS, ARGON2_SECONDS, ARGON2_WAIT_SECONDS,
    ARGON2_REFUSALS, ARGON2_QUEUE, COMMIT_SECONDS, COMMIT_SIZE, COMMIT_FAILURES, WRITABLE, SESSIONS, DATABASE_SIZE,
    WAL_SIZE, LOG_SIZE, DISK_FREE, CERTIFICATE_END, KEY_AGE, CLOCK, WORKERS_CONFIGURED, WORKERS_ALIVE, WORKER_RESTARTS,
    BACKUPS, BACKUP_AT, START_AT, BUILD,
)
BY_NAME = {metric.name: metric for metric in METRICS}


# == Counters ==================================================================

Labels = tuple[str, ...]
Totals = dict[tuple[str, Labels], list[float]]  # (name, labels): the numbers of a series


def width_of(metric: Metric) -> int:
    """Return how many numbers a series has: a counter one, a histogram its buckets, that of +Inf, and the sum."""
    return len(metric.bounds) + 2 if metric.kind == "histogram" else 1


class Counters:
    """The series of all processes, in memory that is mapped before the first fork.

    A directory, which all share, says which series stands where: an entry is made once, under a lock that the kernel
    releases if its holder dies, and is never changed. Each process adds to numbers of its own, so that none is lost
    without a lock between processes; a process that replaces another goes on with the numbers of its place.
    """

    SIZE, ENTRY = 8192, 256  # numbers of a process; octets of an entry, of which only pages in use take memory
    KEY_MAX = ENTRY - 2

    def __init__(self, processes: int = 1) -> None:
        self.processes, self.slot = processes, 0
        size = 8 + self.SIZE * self.ENTRY + 8 * self.SIZE * processes
        self.descriptor = os.memfd_create("metrics", os.MFD_CLOEXEC) if processes > 1 else -1
        if processes > 1:
            os.ftruncate(self.descriptor, size)
        memory = memoryview(mmap.mmap(self.descriptor, size))
        self.used = memory[:8].cast("Q")  # numbers that have an entry
        self.directory = memory[8 : 8 + self.SIZE * self.ENTRY]
        self.all_values: Any = memory[8 + self.SIZE * self.ENTRY :].cast("d")  # Any: a memoryview of floats
        self.values: Any = self.all_values[: self.SIZE]
        self.lock = threading.Lock()
        self.entries: dict[tuple[str, ...], int] = {}  # of the directory: (name, *labels), and its first number
        self.places: dict[tuple[str, ...], int] = {}  # where to count what; -1: there is no room for it
        self.last_labels: dict[str, set[str]] = {}  # of metrics with a bound: the values of their last label
        self.seen = 0  # numbers whose entries this process knows
        self.requests: dict[tuple[str, str, str, int], tuple[int, int]] = {}  # see count_request()

    def enter(self, slot: int) -> None:
        """Make this the process with that number, which has nothing under way yet."""
        self.slot, self.lock = slot, threading.Lock()
        self.values = self.all_values[slot * self.SIZE : (slot + 1) * self.SIZE]
        self.read_directory()
        for (name, *_), place in self.entries.items():
            if BY_NAME[name].is_momentary:
                self.values[place] = 0.0

    # -- the directory --

    def read_directory(self) -> None:
        """Learn the series that other processes have added."""
        end = self.used[0]
        while self.seen < end:
            start = self.seen * self.ENTRY
            size = int.from_bytes(self.directory[start : start + 2], "big")
            name, *labels = bytes(self.directory[start + 2 : start + 2 + size]).decode().split("\0")
            self.entries[(name, *labels)] = self.seen
            metric = BY_NAME[name]
            if metric.most:
                self.last_labels.setdefault(name, set()).add(labels[-1])
            self.seen += width_of(metric)

    def add_entry(self, metric: Metric, labels: Labels) -> int:
        """Return where a series stands, after adding it if no process has. The caller holds both locks."""
        self.read_directory()
        key = (metric.name, *labels)
        if (place := self.entries.get(key)) is not None:
            return place
        known = self.last_labels.get(metric.name, set())
        if metric.most and labels[-1] != OTHER and labels[-1] not in known and len(known - {OTHER}) >= metric.most:
            return self.add_entry(metric, (*labels[:-1], OTHER))
        place = self.used[0]
        if place + width_of(metric) > self.SIZE:
            return -1
        content = "\0".join(key).encode()
        start = place * self.ENTRY
        self.directory[start : start + 2 + len(content)] = struct.pack(">H", len(content)) + content
        self.used[0] = place + width_of(metric)  # last: a process that dies before has added nothing
        self.read_directory()
        return place

    def find_place(self, metric: Metric, labels: Labels) -> int:
        """Return where a series stands, -1 if there is no room for it. The caller holds the lock of this process."""
        limit = self.KEY_MAX - len(metric.name) - 8
        if len("\0".join(labels).encode()) > limit or any("\0" in label for label in labels):
            labels = tuple(
                label.replace("\0", "").encode()[: limit // len(labels)].decode(errors="ignore") for label in labels
            )
        if self.descriptor >= 0:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            place = self.add_entry(metric, labels)
        finally:
            if self.descriptor >= 0:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        return place

    def place_of(self, metric: Metric, labels: Labels) -> int:
        """Return where a series stands, -1 if there is no room for it. The caller holds the lock of this process."""
        key = (metric.name, *labels)
        place = self.places.get(key)
        if place is None:
            if len(self.places) >= 2 * self.SIZE:
                self.places = {}  # names beyond the bound of a metric can be any number
            place = self.places[key] = self.find_place(metric, labels)
        return place

    # -- counting --

    def add(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add to a counter, or to a gauge of this process."""
        with self.lock:
            place = self.place_of(metric, labels)
            if place >= 0:
                self.values[place] += by

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge of this process; NaN removes it."""
        with self.lock:
            place = self.place_of(metric, labels)
            if place >= 0:
                self.values[place] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        with self.lock:
            place = self.place_of(metric, labels)
            if place >= 0:
                self.put(place, metric.bounds, value)

    def put(self, place: int, bounds: tuple[float, ...], value: float) -> None:
        self.values[place + bisect.bisect_left(bounds, value)] += 1.0
        self.values[place + len(bounds) + 1] += value

    def count_request(self, server: str, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered, and its time: add() and observe() in half of their time.

        What a request makes up itself is no label: `route` is a template or NO_ROUTE, and an unknown method is OTHER.
        """
        values = self.values
        with self.lock:
            count, place = self.requests.get((server, route, method, status)) or self.places_of_request(
                server, route, method, status
            )
            if count >= 0:
                values[count] += 1.0
            if place >= 0:
                values[place + bisect.bisect_left(FAST, seconds)] += 1.0
                values[place + len(FAST) + 1] += seconds

    def places_of_request(self, server: str, route: str, method: str, status: int) -> tuple[int, int]:
        """Return where a request and its time are counted. The caller holds the lock of this process."""
        method = method if method in METHODS else OTHER
        places = self.requests[server, route, method, status] = (
            self.place_of(REQUESTS, (server, route, method, str(status))),
            self.place_of(REQUEST_SECONDS, (server, route)),
        )
        return places

    # -- reading --

    def totals(self) -> Totals:
        """Return the numbers of every series, summed over all processes, without gauges that were removed."""
        with self.lock:
            self.read_directory()
            entries = list(self.entries.items())
        found: Totals = {}
        for (name, *labels), place in entries:
            width = width_of(BY_NAME[name])
            starts = range(place, place + self.SIZE * self.processes, self.SIZE)
            found[name, tuple(labels)] = [
                math.fsum(self.all_values[start + number] for start in starts) for number in range(width)
            ]
        return {key: numbers for key, numbers in found.items() if not math.isnan(numbers[0])}


# == Exposition ================================================================
# https://prometheus.io/docs/instrumenting/exposition_formats/ and OpenMetrics 1.0, which differs by the names of
# counters in # TYPE and by its end.

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def show_number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def escape_label(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def show_labels(names: Iterable[str], values: Iterable[str]) -> str:
    pairs = ",".join(f'{name}="{escape_label(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def show_series(metric: Metric, labels: Labels, numbers: list[float]) -> Iterable[str]:
    """Yield the lines of a series. A bucket counts what is at most its bound, so it includes those before it."""
    if metric.kind != "histogram":
        yield f"{metric.name}{show_labels(metric.labels, labels)} {show_number(numbers[0])}"
        return
    count = 0.0
    for bound, number in zip((*map(repr, metric.bounds), "+Inf"), numbers[:-1], strict=True):
        count += number
        shown = show_labels((*metric.labels, "le"), (*labels, bound))
        yield f"{metric.name}_bucket{shown} {show_number(count)}"
    shown = show_labels(metric.labels, labels)
    yield f"{metric.name}_sum{shown} {show_number(numbers[-1])}"
    yield f"{metric.name}_count{shown} {show_number(count)}"


def without_label(totals: Totals, name: str) -> tuple[tuple[Metric, ...], Totals]:
    """Return all metrics without a label, and their numbers summed over its values."""
    metrics: list[Metric] = []
    summed: Totals = {}
    for metric in METRICS:
        left = tuple(label for label in metric.labels if label != name)
        metrics.append(msgspec.structs.replace(metric, labels=left))
        for (other, labels), numbers in totals.items():
            if other == metric.name:
                pairs = zip(metric.labels, labels, strict=True)
                key = other, tuple(value for label, value in pairs if label != name)
                before = summed.get(key, [0.0] * len(numbers))
                summed[key] = [one + two for one, two in zip(before, numbers, strict=True)]
    return tuple(metrics), summed


def show_metrics(totals: Totals, openmetrics: bool = False, client_names: bool = True) -> str:
    """Return the exposition of the metrics, in the order of their declaration. `client_names` keeps that label."""
    metrics: tuple[Metric, ...] = METRICS
    if not client_names:
        metrics, totals = without_label(totals, "client")
    by_name: dict[str, list[tuple[Labels, list[float]]]] = {}
    for (name, labels), numbers in sorted(totals.items()):
        by_name.setdefault(name, []).append((labels, numbers))
    lines = []
    for metric in metrics:
        name = metric.name.removesuffix("_total") if openmetrics else metric.name
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for labels, numbers in by_name.get(metric.name, ()):
            lines += show_series(metric, labels, numbers)
    return "\n".join([*lines, "# EOF"] if openmetrics else lines) + "\n"


# == History ===================================================================
# Figures over time for people who have no Prometheus. In shared memory, so that they survive the process that notes
# them.

FIGURES = {  # name: the metric of which it is the increase, and which labels count
    "requests": (REQUESTS.name, lambda labels: True),
    "tokens": (TOKENS.name, lambda labels: True),
    "logins": (LOGINS.name, lambda labels: labels == ("success",)),
    "failures": (LOGINS.name, lambda labels: labels != ("success",)),
    "lockouts": (LOCKOUTS.name, lambda labels: True),
}
RANGES = {"1h": (60, 60), "1d": (60, 1440), "7d": (600, 1008)}  # seconds of a point, and how many there are


def figures_of(totals: Totals) -> list[float]:
    """Return the total of each figure, in the order of FIGURES."""
    return [
        math.fsum(numbers[0] for (name, labels), numbers in totals.items() if name == metric and counts(labels))
        for metric, counts in FIGURES.values()
    ]


class History(Shared):
    """Rings of points: of a minute for a day, of ten minutes for a week.

    A point stands at the number of its time modulo the size of the ring, beside that number: one that was not noted
    still has that of a turn before, and is a gap.
    """

    WIDTH = len(FIGURES)
    minutes = Numbers("Q", 1440)
    minute_values = Numbers("d", 1440 * WIDTH)
    tens = Numbers("Q", 1008)
    ten_values = Numbers("d", 1008 * WIDTH)
    last = Numbers("d", WIDTH)  # the totals at the end of the last minute that was noted
    last_minute = Real()

    def note(self, now: float, totals: list[float]) -> None:
        """Note the figures of the minute that has just ended: the increase since the last note, if it is a minute old.

        After a longer pause nobody knows in which minute something happened: those minutes stay a gap.
        """
        minute = int(now // 60) - 1
        if minute == int(self.last_minute):
            return
        if minute == int(self.last_minute) + 1:
            increase = [max(0.0, total - before) for total, before in zip(totals, self.last, strict=True)]
            self.put(self.minutes, self.minute_values, minute, increase)
            ten = minute // 10
            was_begun = self.tens[ten % len(self.tens)] == ten
            before = self.point(self.tens, self.ten_values, ten) if was_begun else None
            self.put(
                self.tens, self.ten_values, ten,
                [one + two for one, two in zip(before, increase, strict=True)] if before else increase,
            )
        last: Any = self.last
        for place, total in enumerate(totals):
            last[place] = total
        self.last_minute = float(minute)

    def put(self, stamps: memoryview, values: Any, number: int, point: list[float]) -> None:
        place = number % len(stamps)
        for figure, value in enumerate(point):
            values[place * self.WIDTH + figure] = value
        stamps[place] = number

    def point(self, stamps: memoryview, values: Any, number: int) -> list[float] | None:
        place = number % len(stamps)
        if stamps[place] != number:
            return None
        return list(values[place * self.WIDTH : (place + 1) * self.WIDTH])

    def read(self, now: float, range_name: str, names: list[str]) -> tuple[int, int, dict[str, list[int | None]]]:
        """Return the Unix seconds of the first point, the seconds of a point, and the points of each figure."""
        step, count = RANGES[range_name]
        end = int(now // step) if step == 60 else int((now + step - 60) // step)  # the ten minutes that are under way
        stamps, values = (self.minutes, self.minute_values) if step == 60 else (self.tens, self.ten_values)
        points = [self.point(stamps, values, number) for number in range(end - count, end)]
        places = {name: list(FIGURES).index(name) for name in names}
        return (end - count) * step, step, {
            name: [None if point is None else int(point[place]) for point in points] for name, place in places.items()
        }
