"""Log: one line an event, to one file for all processes."""

import io
import json
import logging
import os
import re
import shutil
import socket
import struct

import time
import pytest
from hypothesis import given
from hypothesis import strategies as st
from appliance.base.files import Identity
from appliance.base.settings import Options
from appliance.base.log import Log, LogFile

ANYTHING = st.one_of(st.text(max_size=30), st.integers(), st.none(), st.binary(max_size=10))


def lines(stream):
    return stream.getvalue().split("\n")[:-1]


def said(*events, **options):
    """What a Log writes when it is told events: (name, level, fields)."""
    stream = io.StringIO()
    log = Log(Options(log_file="", **options), stream)
    for event, level, fields in events:
        log(event, level, **fields)
    return stream


@pytest.fixture
def second(monkeypatch):
    """A second that does not pass, and a way to the next."""
    now = [1795392000.25]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return lambda: now.__setitem__(0, now[0] + 1)


class TestLine:
    def test_text(self, second):
        stream = said(
            ("refused", "info", {"peer": "192.0.2.1", "reason": 'two "words"', "user": "", "no": None, "count": 0})
        )
        assert lines(stream) == [
            '2026-11-23T00:00:00.250Z INFO    refused peer=192.0.2.1 reason="two \\"words\\"" count=0'
        ]

    def test_json(self, second):
        stream = said(("refused", "error", {"reason": "a\nb", "path": os}), log_format="json")
        (line,) = map(json.loads, lines(stream))
        assert line["at"] == "2026-11-23T00:00:00.250Z" and (
            line["level"], line["event"], line["pid"], line["reason"],
        ) == ("error", "refused", os.getpid(), "a\nb")

    @given(st.dictionaries(st.sampled_from(["peer", "reason", "path"]), ANYTHING), st.sampled_from(["text", "json"]))
    def test_whatever_is_said_is_one_line_without_control_characters(self, fields, log_format):
        (line,) = lines(said(("event", "info", fields), log_format=log_format))
        assert line.isprintable() and line.splitlines() == [line]

    @given(st.text(max_size=30))
    def test_no_value_looks_like_another_field(self, value):
        (line,) = lines(said(("event", "info", {"reason": value, "peer": "192.0.2.1"})))
        rest = line.partition(" event ")[2]
        assert len(re.findall(r"(?:^| )(?:reason|peer)=", re.sub(r'"(?:[^"\\]|\\.)*"', "", rest))) == (
            2 if value else 1
        )

    def test_a_traceback_is_part_of_the_line(self):
        stream = io.StringIO()
        try:
            1 / 0
        except ZeroDivisionError as error:
            Log(stream=stream)("bug", "error", exc_info=error)
        assert len(lines(stream)) == 1 and "ZeroDivisionError" in stream.getvalue()

    @pytest.mark.parametrize("least, heard", [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
    def test_the_least_severe_level_is_an_option(self, least, heard):
        assert (
            len(lines(said(*((level, level, {}) for level in ("debug", "info", "warning", "error")), log_level=least)))
            == heard
        )


def entry(datagram):
    """What the journal makes of a datagram. https://systemd.io/JOURNAL_NATIVE_PROTOCOL/"""
    fields = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (length,) = struct.unpack("<Q", rest[:8])
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name) and rest[8 + length : 9 + length] == b"\n"
        fields[name.decode()] = rest[8 : 8 + length].decode()
        datagram = rest[9 + length :]
    return fields


class TestJournal:
    """systemd.journal-fields(7)"""

    @pytest.fixture
    def journal(self, tmp_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind(str(tmp_path / "journal"))
            journal.settimeout(30)
            yield journal

    @pytest.mark.parametrize(
        "level, priority", [("debug", 7), ("info", 6), ("notice", 5), ("warning", 4), ("error", 3)]
    )
    def test_an_event_has_its_level_and_its_fields(self, journal, level, priority):
        log = Log(Options(log_file="", log_level="debug"), journal=journal.getsockname())
        log("refused", level, peer="192.0.2.1", reason="two words\nPRIORITY=0", kid=None)
        assert entry(journal.recv(9000)) == {
            "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": "microauthd", "MICROAUTHD_EVENT": "refused",
            "MICROAUTHD_PEER": "192.0.2.1", "MICROAUTHD_REASON": "two words\\nPRIORITY=0", "MICROAUTHD_KID": "None",
            "MESSAGE": 'refused peer=192.0.2.1 reason="two words\\\\nPRIORITY=0"',
        }

    def test_a_traceback_has_its_lines(self, journal):
        try:
            1 / 0
        except ZeroDivisionError as error:
            Log(Options(log_file=""), journal=journal.getsockname())("bug", "error", exc_info=error)
        told = entry(journal.recv(90000))
        assert told["MICROAUTHD_TRACEBACK"].split("\n")[0].startswith("Traceback") and "\n" not in told["MESSAGE"]

    @pytest.mark.parametrize("case", ["nobody listens", "too long"])
    def test_what_it_does_not_take_goes_to_stderr_with_its_level(self, journal, tmp_path, capsys, case):
        path = journal.getsockname() if case == "too long" else str(tmp_path / "nobody")
        Log(Options(log_file=""), journal=path)("disk", "error", reason="x" * (500_000 if case == "too long" else 1))
        assert capsys.readouterr().err.startswith("<3>disk reason=x")


class TestWhere:
    """Where a line goes: to the file, to the console, to the journal."""

    @pytest.mark.parametrize(
        "chosen, options, file, out, err",
        [
            (False, {}, 1, 0, 1),  # nothing said: what collects the output has the lines too
            (True, {}, 1, 0, 0), (True, {"log_file": ""}, 0, 0, 1),
            (False, {"docker": True}, 0, 1, 0), (True, {"docker": True}, 1, 0, 0),
            (True, {"docker": True, "log_file": ""}, 0, 1, 0),
        ],
    )
    def test_without_a_terminal(self, tmp_path, monkeypatch, capsys, chosen, options, file, out, err):
        monkeypatch.chdir(tmp_path)
        Log(Options({"log-file": "mad.conf:1"} if chosen else {}, **options))("event")
        path = tmp_path / "microauthd.log"
        told = capsys.readouterr()
        written = path.read_text() if path.exists() else ""
        assert [text.count(" event") for text in (written, told.out, told.err)] == [file, out, err]

    def test_a_terminal_has_them_too(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        Log(Options({"log-file": "mad.conf:1"}, log_file=str(tmp_path / "log")))("event")
        assert " event" in capsys.readouterr().err


class TestFlood:
    """What strangers can cause at will does not wear the flash out."""

    def test_lines_of_a_second_are_limited_and_the_rest_is_counted(self, second):
        stream = io.StringIO()
        log = Log(stream=stream)
        for number in range(Log.LINES + 50):
            log("refused", number=number)
        assert len(lines(stream)) == Log.LINES
        second()
        log("refused")
        assert lines(stream)[-1].endswith("left_out_before=50")

    def test_long_lines_count_by_their_length(self, second):
        stream = io.StringIO()
        log = Log(stream=stream)
        for _ in range(Log.LINES):
            log("refused", reason="x" * 2000)
        written = len(lines(stream))
        assert Log.OCTETS < len(stream.getvalue()) < Log.OCTETS + 2200
        second()
        log("refused")
        assert lines(stream)[-1].endswith(f"left_out_before={Log.LINES - written}")

    @staticmethod
    def fail(place):
        try:
            if place == "one":
                raise KeyError("one")
            raise KeyError("other")
        except KeyError as error:
            return error

    @pytest.mark.parametrize("as_tuple", [False, True])
    def test_a_bug_is_logged_some_times_for_each_place_and_the_rest_is_counted(self, monkeypatch, as_tuple):
        now, stream = [1000.0], io.StringIO()
        monkeypatch.setattr("appliance.base.log.time.time", lambda: now[0])
        log = Log(stream=stream)

        def bug(place):
            error = self.fail(place)
            log("bug", "error", exc_info=(type(error), error, error.__traceback__) if as_tuple else error)

        for _ in range(Log.BUGS + 7):
            bug("one")
        assert len(lines(stream)) == Log.BUGS and "KeyError: 'one'" in stream.getvalue()
        bug("other")
        log("start.failed", "error")
        assert len(lines(stream)) == Log.BUGS + 2, "another place, and an error that is no bug"
        now[0] += Log.BUG_SECONDS
        bug("one"), bug("one"), bug("other")
        assert ["left_out_before=7" in line for line in lines(stream)[-3:]] == [True, False, False]
        now[0] -= 500
        bug("one")
        assert len(lines(stream)) == Log.BUGS + 6, "also if the clock goes back"

    def test_errors_are_always_said(self, second):
        stream = said(*[("refused", "info", {})] * (Log.LINES + 1), ("bug", "error", {}))
        assert lines(stream)[-1].endswith("bug")


def record(message):
    return logging.LogRecord("microauthd", logging.INFO, "", 1, message, (), None)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "log").mkdir()
        return tmp_path / "log" / "microauthd.log"

    def test_it_is_its_owners_alone(self, path):
        LogFile(path).emit(record("hello"))
        assert path.read_text() == "hello\n" and path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("is_ours, content", [(True, "of somebody\nhello\n"), (False, "of somebody\n")])
    def test_a_link_of_somebody_else_does_not_lead_it_astray(self, path, monkeypatch, is_ours, content):
        """Ours may lead to /dev/stdout of a container."""
        path.with_name("victim").write_text("of somebody\n")
        path.symlink_to("victim")
        if not is_ours and os.geteuid():
            monkeypatch.setattr("appliance.base.log.current_identity", lambda: Identity(12345, frozenset()))
        elif not is_ours:
            os.lchown(path, 12345, -1)
        LogFile(path).emit(record("hello"))
        assert path.with_name("victim").read_text() == content

    def test_it_is_rotated_and_a_few_are_kept(self, path):
        handler = LogFile(path, max_bytes=40, keep=3)
        for number in range(100):
            handler.emit(record(f"line {number:03d} of a hundred"))
        kept = sorted(name.name for name in path.parent.iterdir() if not name.name.endswith(".lock"))
        assert kept == ["microauthd.log", "microauthd.log.1", "microauthd.log.2", "microauthd.log.3"]
        assert "line 099" in path.read_text()

    def test_another_process_notices_the_rotation(self, path):
        one, other = LogFile(path, max_bytes=40), LogFile(path, max_bytes=40)
        for number in range(10):
            one.emit(record(f"one {number} xxxxxxxxxxxxxxxx"))
            other.emit(record(f"other {number} xxxxxxxxxxxxxx"))
        everything = "".join(name.read_text() for name in path.parent.glob("microauthd.log*") if name.suffix != ".lock")
        assert all(f"{who} {number} " in everything for who in ("one", "other") for number in range(10))

    def test_lines_of_several_processes_do_not_mix(self, path):
        children = []
        for who in "abc":
            pid = os.fork()
            if pid == 0:
                handler = LogFile(path, max_bytes=20_000)
                for _ in range(200):
                    handler.emit(record(who * 100))
                os._exit(0)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
        found = [
            line
            for name in path.parent.glob("microauthd.log*")
            if name.suffix != ".lock"
            for line in name.read_text().splitlines()
        ]
        assert sorted(found) == ["a" * 100] * 200 + ["b" * 100] * 200 + ["c" * 100] * 200

    def test_a_file_that_was_taken_away_is_made_anew(self, path):
        handler = LogFile(path)
        handler.emit(record("before"))
        path.unlink()
        handler.emit(record("after"))
        assert path.read_text() == "after\n"

    def test_a_log_that_cannot_be_opened_again_closes_nobody_elses_file(self, path):
        handler = LogFile(path)
        handler.emit(record("before"))
        shutil.rmtree(path.parent)
        handler.emit(record("lost"))
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]  # take the number that became free
        handler.emit(record("lost too"))
        try:
            for descriptor in others:
                os.fstat(descriptor)
        finally:
            for descriptor in others:
                try:
                    os.close(descriptor)
                except OSError:
                    pass
        path.parent.mkdir()
        handler.emit(record("back"))
        assert path.read_text() == "back\n", "it goes on when the folder is back"

    def test_a_log_that_cannot_be_written_stops_nobody(self, tmp_path):
        log = Log(Options(log_file=str(tmp_path / "no" / "such" / "folder.log")))
        log("event")
