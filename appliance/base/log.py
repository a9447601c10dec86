"""One line an event, to the console or a rotating file."""

import contextlib
import fcntl
import json
import logging
import os
import re
import select
import socket
import stat
import struct
import sys
import time
import traceback
from types import MappingProxyType
from typing import Any

from appliance.base.files import current_identity, other_writer
from appliance.base.settings import Options

# == Log =======================================================================
# One line an event, to the console or a rotating file. It is never given a secret, a code or a token.


class LogFile(logging.Handler):
    """A log file that several processes append to and that is rotated by whichever finds it too long.

    A line is one write() on an O_APPEND descriptor, so lines do not mix. Rotation happens under a
    lock file; the others notice that the path names another inode.
    """

    def __init__(self, path, max_bytes=10_000_000, keep=10):
        super().__init__()
        self.path, self.max_bytes, self.keep = str(path), max_bytes, keep
        self.descriptor: int | None = None
        self.inode = 0

    def shut(self):
        """Close once only: another thread may reuse the descriptor number at once."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def open(self) -> int:
        self.shut()
        # Non-blocking: the path may be a pipe that nobody reads, which would block here or at a line. fifo(7).
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        with contextlib.suppress(FileNotFoundError):
            info = os.lstat(self.path)
            if stat.S_ISLNK(info.st_mode) and other_writer(info, current_identity()):
                flags |= os.O_NOFOLLOW  # whoever made the link chose a file of ours for the lines. symlink(7)
        descriptor = os.open(self.path, flags, 0o600)
        self.descriptor, self.inode = descriptor, os.fstat(descriptor).st_ino
        return descriptor

    def emit(self, record):
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            descriptor = self.descriptor
            if descriptor is None or not self.same_file():
                descriptor = self.open()
            if os.fstat(descriptor).st_size > self.max_bytes:
                descriptor = self.rotate()
            os.write(descriptor, line)
        except OSError:
            pass  # a full disk must not stop the server; the console still has the line

    def same_file(self):
        try:
            return os.stat(self.path).st_ino == self.inode
        except FileNotFoundError:
            return False

    def rotate(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.path + ".lock", flags, 0o600), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.same_file():
                for number in range(self.keep - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
                os.replace(self.path, f"{self.path}.1")
        return self.open()


def escape(value) -> str:
    """Return a value as it may stand in a log line or on a terminal: control characters shown, not sent."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(value)
    )


class Console(logging.StreamHandler):
    """A stream that the caller opened. A line is dropped if writing it would block: a stopped terminal, a full pipe.
    """

    def emit(self, record):
        try:
            events = select.poll()
            events.register(self.stream.fileno(), select.POLLOUT)
            if not events.poll(0):
                return
        except (OSError, ValueError, AttributeError):
            pass  # a stream without a descriptor, as in tests
        super().emit(record)


class Journal(logging.Handler):
    """The journal of systemd: an event is a datagram with its level and each of its fields.

    `journalctl -u microauthd MICROAUTHD_PEER=192.0.2.1` finds by a field; MESSAGE has them all as text. What does not
    fit, or comes while nobody listens, goes to stderr, which leads to the journal as well, with its level in front.
    systemd.journal-fields(7), sd-daemon(3), https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
    """

    PRIORITIES = MappingProxyType({"error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7})

    def __init__(self, path: str, stream):
        super().__init__()
        self.path, self.stream = path, stream
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def encode(self, record) -> bytes:
        fields = {
            "PRIORITY": str(self.PRIORITIES[record.event_level]), "SYSLOG_IDENTIFIER": "microauthd",
            "MESSAGE": record.message_only, "MICROAUTHD_EVENT": record.event,
        }
        for key, value in record.fields.items():
            name = "MICROAUTHD_" + re.sub("[^A-Z0-9_]", "_", key.upper())
            lines = str(value).split("\n") if key == "traceback" else [str(value)]
            fields[name] = "\n".join(map(escape, lines))
        datagram = b""
        for name, value in fields.items():
            octets = value.encode("utf-8", "backslashreplace")
            # With its length, a value may hold line feeds.
            datagram += name.encode() + b"\n" + struct.pack("<Q", len(octets)) + octets + b"\n"
        return datagram

    def emit(self, record):
        try:
            self.channel.sendto(self.encode(record), self.path)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                Console(self.stream).emit(
                    logging.makeLogRecord({"msg": f"<{self.PRIORITIES[record.event_level]}>{record.message_only}"})
                )


class Log:
    """`log(event, key=value, …)`: one line. `level` is a name of the logging module, lower case, or `notice`, which is
    written whatever `log-level` says.

    Anybody can cause lines of level info, so these are limited to LINES and OCTETS a second and process, or requests
    could wear the flash out, and long lines displace the history. A bug that requests reach is logged BUGS times in
    BUG_SECONDS for each place in the code where it happens. The next line counts what was left out.
    """

    LINES, OCTETS = 200, 60_000
    BUGS, BUG_SECONDS = 5, 60

    def __init__(self, options: Options | None = None, stream=None, journal=""):
        """`stream` is where lines go in place of the console, `journal` the socket of systemd's journal.

        Lines go to the file and to a console that somebody looks at. Where nobody chose the file, they go to the
        console even if it is no terminal: what a service manager or a container collects there is what its operator
        reads first.
        """
        self.json = options is not None and options.log_format == "json"
        self.second, self.lines, self.octets, self.left_out = 0, 0, 0, 0
        self.bugs: dict[str, tuple[float, int]] = {}  # place in the code: when its window began, how many since
        self.logger = logging.Logger(
            "microauthd", getattr(logging, options.log_level.upper()) if options else logging.INFO
        )
        handlers: list[logging.Handler] = []
        is_chosen = options is not None and "log-file" in options.origins
        in_container = options is not None and options.docker
        if options and options.log_file and (is_chosen or not in_container):
            handlers.append(LogFile(options.log_file))
        if stream or not (handlers and is_chosen) or sys.stderr.isatty():
            stream = stream or (sys.stdout if in_container else sys.stderr)
            handlers.append(Journal(journal, stream) if journal else Console(stream))
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(message)s"))
            self.logger.addHandler(handler)

    def __call__(self, event: str, level: str = "info", exc_info: Any = None, **fields: Any):
        with contextlib.suppress(MemoryError):  # out of memory: drop the line; the caller continues
            self.write(event, level, exc_info, fields)

    def count_bug(self, error: BaseException, now: float) -> int | None:
        """Return how many lines of a bug at this place were left out before, or None if this one is to be."""
        frames = traceback.extract_tb(error.__traceback__, limit=-1)
        place = f"{frames[0].filename}:{frames[0].lineno}" if frames else type(error).__name__
        began, count = self.bugs.get(place, (now, 0))
        if not 0 <= now - began < self.BUG_SECONDS:
            left_out = max(0, count - self.BUGS)
            began, count = now, 0
        else:
            left_out = 0
        self.bugs[place] = began, count + 1
        return left_out if count < self.BUGS else None

    def write(self, event, level, exc_info, fields):
        number = logging.CRITICAL if level == "notice" else getattr(logging, level.upper())
        if not self.logger.isEnabledFor(number):
            return
        now = time.time()
        if int(now) != self.second:
            if self.left_out:
                fields["left_out_before"] = self.left_out
            self.second, self.lines, self.octets, self.left_out = int(now), 0, 0, 0
        self.lines += 1
        if level == "info" and (self.lines > self.LINES or self.octets > self.OCTETS):
            self.left_out += 1
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        if exc_info:
            error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
            left_out = self.count_bug(error, now)
            if left_out is None:
                return
            if left_out:
                fields["left_out_before"] = left_out
            fields["traceback"] = "".join(traceback.format_exception(error))
        if self.json:
            line = json.dumps({"at": stamp, "level": level, "event": event, "pid": os.getpid(), **fields}, default=str)
            message = line
        else:
            words = " ".join(
                f"{key}={json.dumps(escape(value))}" if re.search(r'[\s"=]', str(value)) else f"{key}={escape(value)}"
                for key, value in fields.items()
                if value not in ("", None)
            )
            message = f"{event} {words}".rstrip()  # the journal has time and level of its own
            line = f"{stamp} {level.upper():7} {message}"
        self.octets += len(line)
        told = {"event": event, "event_level": level, "fields": fields, "message_only": message}
        self.logger.log(number, "%s", line, extra=told)
