"""The service: sockets that are handed in, readiness and watchdog, the journal, installation."""

import ast
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
from box import PROGRAM, ROOT, Box
from appliance.base import StartupError
from appliance.base.settings import Options
from appliance.processes import STUCK_SECONDS, Supervisor, Watchdog, journal_socket, reap_orphans, take_sockets, use_addresses


def listener(family=socket.AF_INET, kind=socket.SOCK_STREAM, address=("127.0.0.1", 0), listening=True):
    sock = socket.socket(family, kind)
    sock.bind(address)
    if listening:
        sock.listen()
    return sock


def as_service(sockets, names, *command, **more):
    """Start a command as a service manager does: it has these sockets as descriptors from 3 on, and their names."""
    # bash passes descriptors on under other numbers, and its process becomes the command's.
    moves = " ".join(f"{number}<&{sock.fileno()}" for number, sock in enumerate(sockets, 3))
    script = f'export LISTEN_PID=$$ LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names}; exec "$@" {moves}'
    return subprocess.Popen(
        ["bash", "-c", script, "bash", *map(str, command)], pass_fds=[sock.fileno() for sock in sockets], **more
    )


TAKE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from appliance.base import StartupError
from appliance.processes import take_sockets
os.environ |= {"LISTEN_PID": sys.argv[2]} if sys.argv[2] else {}
try:
    print({side: sock.getsockname() for side, sock in take_sockets().items()})
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
except StartupError as refusal:
    print(repr(str(refusal)))
"""


def taken(sockets, names, pid=""):
    """What take_sockets() finds, as {side: address}, or its refusal."""
    process = as_service(sockets, names, sys.executable, "-c", TAKE, ROOT, pid, stdout=subprocess.PIPE, text=True)
    return ast.literal_eval(process.communicate(timeout=30)[0])


class TestSocketsHandedIn:
    """sd_listen_fds(3): the service manager listens, so that ports below 1024 need no rights."""

    def test_they_are_taken_by_their_names(self, tmp_path):
        auth, admin = listener(), listener()
        local = listener(socket.AF_UNIX, address=str(tmp_path / "admin.sock"))
        for names in ("auth:admin:admin", "microauthd-auth.socket:microauthd-admin.socket:microauthd-admin.socket"):
            assert taken([auth, admin, local], names) == {
                "auth": auth.getsockname(), "admin": admin.getsockname(), "local": str(tmp_path / "admin.sock"),
            }
        assert taken([admin], "admin") == {"admin": admin.getsockname()}

    def test_those_of_another_process_are_left_alone(self):
        assert taken([listener()], "auth", pid="1") == {}

    @pytest.mark.parametrize(
        "sockets, names",
        [
            (lambda path: [listener()], "metrics"), (lambda path: [listener()], ""),
            (lambda path: [listener(), listener()], "auth:auth"), (lambda path: [listener(), listener()], "auth"),
            (lambda path: [listener(kind=socket.SOCK_DGRAM, listening=False)], "auth"),
            (lambda path: [listener(listening=False)], "admin"),
            (lambda path: [listener(socket.AF_UNIX, address=path)], "auth"),
        ],
        ids=["unknown name", "no name", "twice", "one name missing", "datagrams", "not listening", "AUTH on a Unix socket"],
    )  # fmt: skip
    def test_one_that_nobody_would_serve_is_refused(self, tmp_path, sockets, names):
        assert "LISTEN_FDS: descriptor" in taken(sockets(str(tmp_path / "sock")), names)

    def test_the_address_counts_as_one_of_mad_conf_does(self):
        anywhere = listener(address=("0.0.0.0", 0))
        with pytest.raises(StartupError, match="auth-ip 0.0.0.0 is not loopback"):
            use_addresses(Options(), {"auth": anywhere})
        options = use_addresses(Options(auth_insecure_http=True), {"auth": anywhere})
        assert (options.auth_ip, options.auth_port) == anywhere.getsockname()
        assert "service manager" in options.origins["auth-port"] and options.admin_port == Options().admin_port

    @pytest.mark.parametrize("is_handed", [True, False])
    def test_it_goes_on_listening_while_no_worker_can_start(self, is_handed):
        auth, admin = listener(), listener()
        handed = frozenset([auth] if is_handed else [])
        startup = SimpleNamespace(auth_sockets=[auth], admin_socket=admin, handed=handed)
        supervisor = Supervisor(startup)
        for _ in range(11):
            supervisor.schedule_restart(0)
        assert auth.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == is_handed

    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_every_worker_serves_it_and_the_next_start_answers_what_came_between(self, tmp_path, workers):
        auth, admin = listener(), listener()
        box = Box(tmp_path / "data", workers=workers).set_up()
        box.auth_port, box.admin_port = auth.getsockname()[1], admin.getsockname()[1]

        def start():
            box.output = open(box.folder / "output.txt", "ab")
            box.process = as_service(
                [auth, admin], "auth:admin", *PROGRAM, "serve", cwd=box.folder, env=box.environ, stdout=box.output,
                stderr=box.output, start_new_session=True,
            )

        with contextlib.closing(auth), contextlib.closing(admin):
            start()
            try:
                box.await_ready()
                assert box.token().status == 200 and f"auth=127.0.0.1:{box.auth_port}" in box.log()
                assert box.stop() == 0
                between = socket.create_connection(auth.getsockname())
                between.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                start()
                box.await_ready()
                assert between.makefile("rb").read().startswith(b"HTTP/1.1 200")
                assert box.stop() == 0
            finally:
                box.__exit__()


class TestWatchdog:
    """sd_watchdog_enabled(3): systemd starts a server anew that does not answer."""

    @pytest.fixture
    def channel(self, tmp_path, monkeypatch):
        """The socket of systemd."""
        path = str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind(path)
            channel.setblocking(False)
            monkeypatch.setenv("NOTIFY_SOCKET", path)
            monkeypatch.setenv("WATCHDOG_USEC", "4000000")
            yield channel

    def told(self, channel):
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(channel.recv(100))
        return found

    @pytest.mark.parametrize(
        "beats, is_answering",
        [
            ({11: (5, 0.0), 12: (5, 0.0), 13: (5, 0.0)}, True),  # two workers and ADMIN
            ({11: (5, STUCK_SECONDS), 12: (5, 0.0), 13: (5, 0.0)}, True),  # one worker hangs: it is replaced
            ({12: (5, 0.0), 13: (5, 0.0)}, True),  # one has died
            ({11: (0, 0.0), 12: (5, STUCK_SECONDS), 13: (5, 0.0)}, False),  # one has not begun, one hangs
            ({11: (5, 0.0), 12: (5, 0.0), 13: (5, STUCK_SECONDS)}, False),  # ADMIN hangs
            ({11: (5, 0.0), 12: (5, 0.0)}, False), ({13: (5, 0.0)}, False), ({}, False),
        ],
    )
    def test_it_answers_while_admin_and_a_worker_do(self, beats, is_answering):
        supervisor = Supervisor(SimpleNamespace(auth_sockets=[None, None]))
        roles = {11: 0, 12: 1, 13: 2}
        supervisor.children = {pid: (roles[pid], 0.0) for pid in beats}
        supervisor.beats = beats | {14: (9, 0.0)}  # of one that is gone
        assert supervisor.is_answering() is is_answering

    def test_it_is_told_twice_in_the_time_and_only_while_the_server_answers(self, channel, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        watchdog = Watchdog()
        for _ in range(9):  # nine seconds
            watchdog.tell(True)
            clock[0] += 1
        assert self.told(channel) == [b"WATCHDOG=1"] * 5
        for _ in range(9):
            watchdog.tell(False)
            clock[0] += 1
        assert self.told(channel) == []

    @pytest.mark.parametrize("variable, value", [("WATCHDOG_PID", "1"), ("WATCHDOG_USEC", ""), ("WATCHDOG_USEC", "x")])
    def test_nothing_is_told_that_was_not_asked(self, channel, monkeypatch, variable, value):
        monkeypatch.setenv(variable, value)
        Watchdog().tell(True)
        assert self.told(channel) == []

    @pytest.mark.parametrize("workers", ["1", "0"])
    def test_a_server_says_when_it_is_ready_alive_and_stopping(self, channel, tmp_path, workers):
        box = Box(tmp_path / "data", workers=workers).set_up()
        box.environ |= {"NOTIFY_SOCKET": os.environ["NOTIFY_SOCKET"], "WATCHDOG_USEC": "200000"}
        channel.settimeout(20)
        box.start(wait=False)
        try:
            assert channel.recv(100) == b"READY=1" and box.token().status == 200
            assert channel.recv(100) == channel.recv(100) == b"WATCHDOG=1"
            assert box.stop() == 0
            channel.settimeout(0)
            assert self.told(channel)[-1] == b"STOPPING=1"
        finally:
            box.__exit__()


class TestJournal:
    """systemd.exec(5): JOURNAL_STREAM"""

    @pytest.mark.parametrize("stream, is_journal", [("stderr", True), ("other", False), (None, False)])
    def test_the_journal_gets_events_while_stderr_leads_there(self, monkeypatch, stream, is_journal):
        info = os.fstat(2)
        named = {"stderr": f"{info.st_dev}:{info.st_ino}", "other": f"{info.st_dev}:{info.st_ino + 1}"}
        monkeypatch.setenv("JOURNAL_STREAM", named.get(stream, ""))
        assert journal_socket() == ("/run/systemd/journal/socket" if is_journal else "")


class TestHangUp:
    """SIGHUP: reload, and the end of a server whose terminal has closed. termios(3), signal(7)"""

    def serve(self, box, script='exec "$@"'):
        """The server as a shell on a terminal of its own starts it, as soon as it is ready."""
        words = ["-c", script, "sh", *PROGRAM, "serve"]
        terminal = pexpect.spawn("/bin/sh", words, cwd=str(box.folder), env=box.environ, timeout=20)
        terminal.expect("serving")
        return terminal

    def ends(self, pid, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return True
            time.sleep(0.05)
        return False

    @pytest.mark.parametrize("workers", ["1", "0"])
    def test_it_reloads_while_the_terminal_is_there_and_ends_with_it(self, tmp_path, workers):
        box = Box(tmp_path / "data", workers=workers).set_up()
        terminal = self.serve(box)
        os.kill(terminal.pid, signal.SIGHUP)
        assert not self.ends(terminal.pid, 1.5) and box.token().status == 200
        os.close(terminal.child_fd)  # the window closes
        assert self.ends(terminal.pid, 10) and "stopped" in box.log()

    @pytest.mark.parametrize("script", ['trap "" HUP; exec "$@"', 'setsid "$@" & wait'])
    def test_below_nohup_and_as_a_service_it_outlives_the_terminal(self, tmp_path, script):
        box = Box(tmp_path / "data", workers="1").set_up()
        terminal = self.serve(box, script)
        pid = int(re.search(r"serving .*pid=(\d+)", box.log())[1])
        os.close(terminal.child_fd)
        os.kill(pid, signal.SIGHUP)
        try:
            assert not self.ends(pid, 2) and box.token().status == 200
        finally:
            os.kill(pid, signal.SIGTERM)
        assert self.ends(pid, 10)


FIRST = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from appliance.processes import reap_orphans
assert os.getpid() == 1
def zombies():
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and ") Z" in open(f"/proc/{pid}/stat").read()]
if not (ours := os.fork()):
    os._exit(7)
while not zombies():
    time.sleep(0.01)
assert reap_orphans({ours}) == ours and os.waitpid(ours, 0)[1] == 7 << 8
if not (stranger := os.fork()):
    os._exit(0)
while not zombies():
    time.sleep(0.01)
assert reap_orphans((), 0) == stranger and zombies()
assert reap_orphans((), stranger) == 0 and not zombies()
if not os.fork():
    if os.fork():
        os._exit(0)
    os._exit(0)
for _ in range(500):
    time.sleep(0.01)
    reap_orphans(())
    if [pid for pid in os.listdir("/proc") if pid.isdigit()] == ["1"]:
        break
else:
    raise AssertionError(zombies())
"""


class TestFirstProcess:
    """PID 1 of a container adopts every orphan. pid_namespaces(7), wait(2)"""

    def test_it_reaps_what_others_left_and_leaves_its_own_to_whom_they_concern(self):
        words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", FIRST, ROOT]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def test_no_other_process_reaps_anything(self):
        child = subprocess.Popen(["true"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        reap_orphans(())
        assert child.wait(10) == 0 and child.returncode == 0
