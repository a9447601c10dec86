"""The service: sockets that are handed in, readiness and watchdog, the journal, installation."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
import yaml
from box import ANSWERS, ARCHIVE, CHEAP, PROGRAM, ROOT, Box, free_port, runs
from conftest import in_child
from appliance.base import StartupError
from appliance.base.settings import (
    OPTION_NAMES, OPTIONS, Options, is_in_file, load_options, read_variables, setup_variables,
)
from appliance.commands import COMMANDS
from appliance.base.store import MIGRATIONS
from appliance.help import completion_script, manual_page, roff_text
from appliance.base.metrics import Counters
from appliance.processes import STUCK_SECONDS, Supervisor, Watchdog, journal_socket, reap_orphans, take_sockets, use_addresses

from appliance.recovery import Answers, recover_setup, set_up
from appliance.release import MEMBER
from appliance.service import (
    UNITS, Layout, Request, check_layout, credential_lines, fill, first_settings, install, plan, read_answers, removal,
    say_how_to_start, uninstall, unit_files, write_file,
)
from microauthd import VERSION


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
        "count, refusal", [("", ""), ("-1", ""), ("²", ""), ("9" * 5000, ""), ("999999999", "LISTEN_FDS: descriptor 3")]
    )
    def test_a_count_that_is_none_is_no_socket_and_one_too_large_names_what_is_missing(self, count, refusal):
        def take():
            os.closerange(3, 16)
            os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "auth"}
            if refusal:
                with pytest.raises(StartupError, match=refusal):
                    take_sockets()
            else:
                assert take_sockets() == {}

        assert in_child(take) == 0

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
        startup = SimpleNamespace(auth_sockets=[auth], admin_socket=admin, handed=handed, counters=Counters())
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
                end = time.monotonic() + 60
                while "serving" not in box.log():  # all processes; one answers already
                    assert time.monotonic() < end, box.said()
                    time.sleep(0.02)
                assert box.token().status == 200 and box.stop() == 0
                assert f"auth=127.0.0.1:{box.auth_port} admin=127.0.0.1:{box.admin_port}" in box.log()
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
        supervisor = Supervisor(SimpleNamespace(auth_sockets=[None, None], counters=Counters()))
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

    @pytest.mark.parametrize("variable, value", [("WATCHDOG_PID", "1"), ("WATCHDOG_USEC", ""), ("WATCHDOG_USEC", "x"), ("WATCHDOG_USEC", "²")])
    def test_nothing_is_told_that_was_not_asked(self, channel, monkeypatch, variable, value):
        monkeypatch.setenv(variable, value)
        Watchdog().tell(True)
        assert self.told(channel) == []

    @pytest.mark.parametrize("workers", ["1", "0"])
    def test_a_server_says_when_it_is_ready_alive_and_stopping(self, channel, tmp_path, workers):
        box = Box(tmp_path / "data", workers=workers).set_up()
        box.environ |= {"NOTIFY_SOCKET": os.environ["NOTIFY_SOCKET"], "WATCHDOG_USEC": "200000"}
        channel.settimeout(60)
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
        terminal = pexpect.spawn("/bin/sh", words, cwd=str(box.folder), env=box.environ, timeout=60)
        terminal.expect("serving")
        return terminal

    def ends(self, pid, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not runs(pid):
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
        assert self.ends(terminal.pid, 60) and "stopped" in box.log()
        assert terminal.wait() == 0, terminal.signalstatus  # Python exits with 120 where it cannot flush its streams

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
        assert self.ends(pid, 60)


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
        assert child.wait(60) == 0 and child.returncode == 0


# -- installing --


def run_archive(*words, **more):
    cache = {"MICROAUTHD_CACHE": str(ROOT / "build" / "out" / "cache")}
    return subprocess.run([*PROGRAM, *map(str, words)], env=os.environ | cache, capture_output=True, text=True, **more)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
COMMAND_WORDS = {"serve": ["--config", "--help"], "backup": ["--force", "--help"]}


@pytest.fixture
def tree(tmp_path):
    """The file system of another machine, as far as an installation looks at it."""
    root = tmp_path / "tree"
    for folder in ("usr/bin", "usr/lib/systemd/system", "etc"):
        (root / folder).mkdir(parents=True)
    (root / "usr/lib/systemd/systemd").touch()
    root.chmod(0o755)
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    return root


def contents(root):
    """{path: (mode, uid, content or target)} of a tree, but locks and backups of the user database."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode, path.lstat().st_uid,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
        if not path.name.endswith(("-", ".lock"))
    }


class TestLayout:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"prefix": "opt/microauthd"}, "absolute"), ({"prefix": "/opt/with blank"}, "letters"),
            ({"data": "/srv/%h"}, "letters"), ({"data": "/srv/../etc"}, "letters"), ({"data": "/"}, "letters"),
            ({"data": "/home/mad"}, "does not see"), ({"prefix": "/tmp/mad"}, "does not see"),
            ({"python": "/root/venv/bin/python"}, "does not see.*; run this command by another Python"),
            ({"python": "/root/.venv/bin/python"}, "does not see.*; run this command by another Python"),
            ({"python": "/srv/.venv/bin/python"}, "begins with.*; run this command by another Python"),
            ({"data": "/srv/.mad"}, "begins with"), ({"data": "/run/mad"}, "does not see"),
            ({"data": "/opt/microauthd/data"}, "in each other"), ({"data": "/opt/microauthd"}, "in each other"),
            ({"prefix": "/var/lib/microauthd/code"}, "in each other"),
            ({"user": "root"}, "--user"), ({"user": "Mad"}, "--user"), ({"user": "x\nUser=root"}, "--user"),
        ],
    )
    def test_what_a_unit_cannot_name_or_the_server_not_see_is_refused(self, changes, said):
        with pytest.raises(StartupError, match=said):
            check_layout(Layout(**changes))

    @pytest.mark.parametrize(
        "changes", [{}, {"prefix": "/srv/programs/mad-1.2"}, {"data": "/mnt/flash/mad_data"}, {"user": "_mad"}]
    )
    def test_others_are_taken(self, changes):
        check_layout(Layout(**changes))

    @pytest.mark.parametrize(
        "content, said",
        [
            ('[admin]\npassword_file = "pass"', "password_file must be an absolute path"),
            ('[[client]]\nsecret_file = "s"', "secret_file must be an absolute path"),
            ('[options]\ndb-pass-file = "s"', "db-pass-file must be an absolute path"), ("[admin", "answers"),
        ],
    )
    def test_answers_that_the_first_start_could_not_read_are_refused_at_once(self, tmp_path, content, said):
        path = tmp_path / "answers.toml"
        path.write_text(content)
        with pytest.raises(StartupError, match=said):
            read_answers(str(path))
        path.write_text(content.replace('= "', '= "/run/secrets/'))
        assert said == "answers" or read_answers(str(path))


class TestTexts:
    def test_every_template_is_filled(self):
        layout = Layout()
        for path in UNITS.rglob("*"):
            if path.is_file():
                text = fill(layout, path.relative_to(UNITS), CREDENTIALS="", ADDRESS="127.0.0.1:9040", V6ONLY="both")
                assert b"Written by microauthd install" in text and not re.search(rb"@[A-Z0-9]+@", text), path

    @pytest.mark.parametrize("name", ["microauthd.sh", "mad.sh", "openrc/microauthd", "runit/run"])
    def test_scripts_are_shell(self, name):
        done = subprocess.run(["sh", "-n"], input=fill(Layout(), name), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("topic, section", [("microauthd", 1), ("mad", 1), ("mad.conf", 5)])
    def test_a_page_for_man_has_what_the_manual_has(self, topic, section):
        page = manual_page(topic, section)
        first, name, told, *lines = page.splitlines()
        assert first.startswith(f".TH {topic.upper()} {section} ") and name == ".SH NAME" and f"{topic} \\- " in told
        macros = {line.split()[0] for line in lines if line[:1] == "."}
        assert macros <= {".SH", ".SS", ".PP", ".TP", ".IP", ".EX", ".EE"} and page.isascii()
        assert not [line for line in lines if line[:1] == "'"] and page.count(".EX") == page.count(".EE")
        assert "<!--" not in page and "](" not in page and "| ---" not in page
        plain = re.sub(r"\\f[BRI]|\\&", "", page).replace("\\-", "-")
        for option in OPTIONS if topic == "mad.conf" else ():
            assert option.name in plain
        for command in COMMANDS.values() if topic == "microauthd" else ():
            assert f"\n{command.title}\n" in plain

    def test_the_text_of_roff_is_escaped(self):
        assert roff_text(r"a\b `-x` 'q' ~^") == r"a\eb \fB\-x\fR \(aqq\(aq \(ti\(ha"
        assert roff_text(".TH is text").startswith(r"\&.") and roff_text("`.x`").startswith(r"\fB.x")

    @pytest.mark.parametrize(
        "typed, offered",
        [
            (["microauthd", ""], ["serve", "backup", "--help", "--version"]), (["microauthd", "se"], ["serve"]),
            (["microauthd", "backup", "--"], ["--force", "--help"]), (["microauthd", "other", ""], []),
        ],
    )
    def test_bash_completes_commands_and_their_flags(self, typed, offered):
        words = " ".join(f"'{word}'" for word in typed)
        script = (
            completion_script("bash", COMMAND_WORDS)
            + f"\nCOMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _microauthd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.split() == offered, done.stderr

    @pytest.mark.parametrize("shell, said", [("zsh", "'backup') found=(--force --help)"), ("fish", "-l force")])
    def test_other_shells_know_them_too(self, shell, said):
        assert said in completion_script(shell, COMMAND_WORDS)

    def test_a_secret_that_lies_in_a_file_is_handed_to_the_service(self, tmp_path):
        folder = tmp_path / "etc/microauthd/credentials"
        folder.mkdir(parents=True)
        layout = Layout(root=str(tmp_path))
        assert credential_lines(layout, False) == ""
        assert credential_lines(layout, True) == "LoadCredential=db-pass:/etc/microauthd/credentials/db-pass\n"
        (folder / "db-pass.cred").touch()
        (folder / "auth-ssl-cert-pass").touch()
        (folder / "auth-port").touch()  # no secret
        assert credential_lines(layout, False).splitlines() == [
            "LoadCredentialEncrypted=db-pass:/etc/microauthd/credentials/db-pass.cred",
            "LoadCredential=auth-ssl-cert-pass:/etc/microauthd/credentials/auth-ssl-cert-pass",
        ]


class TestInstall:
    """Into the tree of another machine, with its own user database: nothing of this one is touched."""

    def install(self, tree, *words):
        return run_archive("install", "--root", tree, *words, stdin=subprocess.DEVNULL)

    def test_it_says_what_it_would_do_and_does_nothing(self, tree):
        before = contents(tree)
        done = self.install(tree, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "make the system user microauthd" in done.stdout and contents(tree) == before
        refused = self.install(tree)  # nobody can be asked
        assert refused.returncode == 1 and contents(tree) == before

    @needs_root
    def test_what_is_there_belongs_to_root_and_the_data_to_the_server(self, tree):
        done = self.install(tree, "--yes", "--sockets")
        assert (done.returncode, done.stderr) == (0, ""), done
        row = next(line.split(":") for line in (tree / "etc/passwd").read_text().splitlines() if "microauthd" in line)
        uid = int(row[2])
        found = contents(tree)

        def stands(path):
            mode, owner, _ = found[path]
            return f"{mode & 0o777:o}", {0: "root", uid: "server"}[owner], (tree / path).lstat().st_gid == int(row[3])

        for path, wanted in {
            "opt/microauthd/microauthd.pyz": ("755", "root", False), "opt/microauthd/code": ("755", "root", True),
            "opt/microauthd/microauthd": ("755", "root", False), "usr/local/bin/mad": ("755", "root", False),
            "etc/microauthd": ("755", "root", False), "etc/microauthd/mad.conf": ("640", "root", True),
            "etc/microauthd/credentials": ("750", "root", True), "var/lib/microauthd": ("700", "server", True),
            "etc/microauthd/credentials/db-pass": ("640", "root", True),
            "etc/systemd/system/microauthd.service": ("644", "root", False),
            "usr/local/share/man/man5/mad.conf.5": ("644", "root", False),
        }.items():
            assert stands(path) == wanted, path
        assert found["opt/microauthd/microauthd.pyz"][2] == ARCHIVE.read_bytes()
        conf = (tree / "etc/microauthd/mad.conf").read_text()
        assert "\ndb-file = /var/lib/microauthd/mad.db3\n" in conf and "\nlog-file =\n" in conf
        listen = (tree / "etc/systemd/system/microauthd-auth.socket").read_text()
        assert "ListenStream=127.0.0.1:9040\n" in listen
        enabled = tree / "etc/systemd/system/multi-user.target.wants/microauthd.service"
        assert os.readlink(enabled) == "/etc/systemd/system/microauthd.service"

    @needs_root
    def test_to_do_it_again_repairs_and_leaves_settings_alone(self, tree):
        assert self.install(tree, "--yes").returncode == 0
        conf = tree / "etc/microauthd/mad.conf"
        conf.write_text(conf.read_text().replace("# auth-port = 9040", "auth-port = 443"))
        before = contents(tree)
        again = self.install(tree, "--yes")
        assert again.stdout.startswith("installed into") and contents(tree) == before
        (tree / "usr/local/bin/mad").unlink()
        (tree / "opt/microauthd/microauthd.pyz").write_bytes(b"an older release")
        (tree / "etc/systemd/system/microauthd.service").write_text("# Written by microauthd install, long ago")
        (tree / "var/lib/microauthd").chmod(0o777)
        conf.chmod(0o644)
        repaired = self.install(tree, "--yes", "--sockets")
        assert repaired.returncode == 0, repaired.stderr
        after = contents(tree)
        unit = "etc/systemd/system/microauthd.service"
        changed = {"etc/microauthd/install.json", unit}  # which tell of the sockets
        assert {name: after[name] for name in before if name not in changed} == {
            name: before[name] for name in before if name not in changed
        }
        assert after[unit][2] == before[unit][2].replace(
            b"SyslogIdentifier", b"Sockets=microauthd-auth.socket microauthd-admin.socket\nSyslogIdentifier"
        )
        assert "ListenStream=127.0.0.1:443\n" in (tree / "etc/systemd/system/microauthd-auth.socket").read_text()

    @pytest.mark.parametrize(
        "installed, is_meant, said",
        [
            (("0.0.1", 0), False, ""), ((VERSION, 0), False, ""), (("99.0", 0), False, "older than 99.0.*--downgrade"),
            (("99.0", 0), True, ""), (("99.0", 1), False, "an older release: it knows schema"),
            (("99.0", 1), True, "an older release: it knows schema"), (("0.0.1", -1), False, ""), (None, False, ""),
        ],
    )
    def test_an_older_program_does_not_take_the_place_of_a_newer_one_unless_that_is_meant(
        self, tree, tmp_path, installed, is_meant, said
    ):
        layout = Layout(root=str(tree))
        target = Path(layout.at(layout.archive))
        target.parent.mkdir(parents=True)
        with zipfile.ZipFile(target, "w") as archive:
            if installed:
                release = {"version": installed[0], "schema": len(MIGRATIONS) + installed[1]}
                archive.writestr(MEMBER, json.dumps(release))
        before = contents(tree)
        if said:
            with pytest.raises(StartupError, match=said):
                install(Request(layout, yes=True, downgrade=is_meant), str(ARCHIVE), COMMAND_WORDS)
            assert contents(tree) == before
            return
        steps = [step.text for step in plan(layout, str(ARCHIVE), "", COMMAND_WORDS, is_meant)]
        assert f"copy {ARCHIVE} to /opt/microauthd/microauthd.pyz" in steps

    @needs_root
    @pytest.mark.parametrize("path", ["usr/local/bin/mad", "usr/local/bin/microauthd", "etc/systemd/system/microauthd.service"])
    def test_a_file_of_somebody_else_stops_it_before_anything_is_done(self, tree, path):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("somebody else's")
        before = contents(tree)
        done = self.install(tree, "--yes")
        assert done.returncode == 1 and path in done.stderr and contents(tree) == before

    @needs_root
    def test_uninstall_leaves_the_data_and_purge_nothing(self, tree):
        bare = contents(tree)
        where = ("--prefix", "/srv/mad", "--data", "/srv/data", "--user", "keeper")
        assert self.install(tree, "--yes", "--sockets", *where).returncode == 0
        (tree / "srv/data/mad.db3").write_text("every account")
        for left_by_an_upgrade in ("previous", "new", "upgrade", "lock"):
            (tree / f"srv/mad/microauthd.pyz.{left_by_an_upgrade}").touch()
        (tree / "usr/local/bin/mad").write_text("somebody else's")
        done = run_archive("uninstall", "--root", tree, "--yes")
        assert done.returncode == 0, done.stderr
        left = {path for path, (_, _, content) in contents(tree).items() if content is not None} - bare.keys()
        assert left - {"etc/.pwd.lock", "etc/shadow", "etc/gshadow"} == {
            "srv/data/mad.db3", "usr/local/bin/mad", "etc/microauthd/mad.conf", "etc/microauthd/credentials/db-pass",
        }
        assert self.install(tree, "--yes", *where).returncode == 1  # the other mad
        (tree / "usr/local/bin/mad").unlink()
        assert self.install(tree, "--yes", *where).returncode == 0
        assert "every account" in (tree / "srv/data/mad.db3").read_text()
        (tree / "var/log").mkdir(parents=True)
        (tree / "var/log/microauthd.err").touch()
        assert run_archive("uninstall", "--root", tree, "--yes", "--purge").returncode == 0
        assert not (tree / "var/log/microauthd.err").exists()
        assert not (tree / "srv/data").exists() and not (tree / "etc/microauthd").exists()
        assert "keeper" not in (tree / "etc/passwd").read_text()

    @needs_root
    @pytest.mark.parametrize(
        "owner, inside, is_taken",
        [
            (0, ["www"], False), (33, ["base"], False), (0, [], True), (33, [], True), (0, ["lost+found"], True),
            (990, ["mad.db3"], True), (990, [], True),
        ],
    )
    def test_a_folder_that_is_in_use_is_not_given_to_the_server(self, tree, owner, inside, is_taken):
        self.add_user(tree)
        (tree / "srv").mkdir()
        for name in inside:
            (tree / "srv" / name).touch()
        os.chown(tree / "srv", owner, owner)
        before, layout = contents(tree), Layout(root=str(tree), data="/srv")
        if is_taken:
            assert any("/srv" in step.text for step in plan(layout, str(ARCHIVE), "", COMMAND_WORDS))
            return
        with pytest.raises(StartupError, match=f"srv belongs to user {owner} and is not empty"):
            install(Request(layout, yes=True), str(ARCHIVE), COMMAND_WORDS)
        with pytest.raises(StartupError, match="srv does not belong to the user microauthd"):
            uninstall(Request(layout, yes=True, purge=True), COMMAND_WORDS)
        assert contents(tree) == before

    def add_user(self, tree, home="/var/lib/microauthd"):
        with open(tree / "etc/passwd", "a") as passwd, open(tree / "etc/group", "a") as group:
            passwd.write(f"microauthd:x:990:990::{home}:/usr/sbin/nologin\n")
            group.write("microauthd:x:990:\n")

    @pytest.mark.parametrize("home, goes", [("/var/lib/microauthd", True), ("/var/www", False)])
    def test_purge_leaves_a_user_that_was_there_before(self, tree, home, goes):
        self.add_user(tree, home)
        steps = [step.text for step in removal(Layout(root=str(tree)), True, COMMAND_WORDS)]
        assert ("remove the user microauthd" in steps) is goes

    def test_only_unpacked_programs_are_removed_from_their_folder(self, tree):
        code = tree / "opt/microauthd/code"
        for name in ("tree.1.cpython-311", "tmp.x", "src"):
            (code / name).mkdir(parents=True)
        (code / ".lock").touch()
        for step in removal(Layout(root=str(tree)), False, COMMAND_WORDS):
            step.do()
        assert [path.name for path in code.iterdir()] == ["src"]
        (code / "src").rmdir()
        (step,) = removal(Layout(root=str(tree)), False, COMMAND_WORDS)
        step.do()
        assert not code.exists()

    @needs_root
    def test_what_a_user_may_not_see_is_said_in_a_sentence(self, tree):
        self.add_user(tree)
        (tree / "etc/microauthd/credentials").mkdir(parents=True)
        (tree / "etc/microauthd/credentials").chmod(0o700)
        with tempfile.TemporaryDirectory() as folder:  # that another user can enter
            os.chmod(folder, 0o755)
            shutil.copytree(tree, f"{folder}/tree", symlinks=True)

            def look():
                os.setuid(65534)
                with pytest.raises(StartupError, match="only root can see it"):
                    install(Request(Layout(root=f"{folder}/tree"), dry_run=True), str(ARCHIVE), COMMAND_WORDS)

            assert in_child(look) == 0

    @needs_root
    def test_a_full_disk_leaves_no_half_file(self, tmp_path):
        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with pytest.raises(OSError):
                write_file(str(tmp_path / "program"), bytes(8192), 0o755, (0, 0))

        (tmp_path / "program").write_text("the one before")
        assert in_child(work) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["program"]
        assert (tmp_path / "program").read_text() == "the one before"

    @pytest.mark.parametrize(
        "there, files, said",
        [
            ("sbin/openrc-run", {"etc/init.d/microauthd"}, "installed into"), ("etc/sv/", {"etc/sv/microauthd/run"}, ""),
            ("", set(), ""),
        ],
    )
    def test_without_systemd_it_is_what_the_machine_has(self, tree, there, files, said):
        (tree / "usr/lib/systemd/systemd").unlink()
        (tree / "usr/lib/systemd/system/dbus.service").touch()  # of a package, which knows of systemd
        path = tree / there
        (path if there.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if there and not there.endswith("/"):
            path.touch()
        layout = Layout(root=str(tree))
        assert {name.lstrip("/") for name in unit_files(layout, {})} == files
        assert b"/var/lib/microauthd/microauthd.log" in first_settings(layout)

    def test_where_nothing_starts_services_it_says_the_two_commands_that_set_up_and_serve(self, monkeypatch, capsys):
        monkeypatch.setattr("appliance.service.has_systemd", lambda layout: False)
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        monkeypatch.setattr(os.path, "isdir", lambda path: False)
        say_how_to_start(Layout(prefix="/srv/mad"))
        script = fill(Layout(prefix="/srv/mad"), "runit/run").decode()
        (first,) = re.findall(r"^(/srv/mad/microauthd setup .*) \|\| exit 1$", script, re.M)
        assert f"{first} && /srv/mad/microauthd serve" in capsys.readouterr().out

    @needs_root
    def test_the_table_of_the_manual_names_every_file_with_its_owner_group_and_mode(self, tree, tmp_path):
        text = (ROOT / "appliance/manual/microauthd.md").read_text()
        table = re.search(r"^\| Path \| Owner:group, mode .*?\n\n", text, re.M | re.S)[0]
        rows, links, made = {}, [], set()
        for paths, owner, group, mode, told in re.findall(r"^\| (`/.*?) \| (\w+):(\w+) (\d{4}) \| (.*) \|$", table, re.M):
            rows |= {path.lstrip("/"): (owner, group, int(mode, 8)) for path in re.findall("`(.*?)`", paths)}
            links += [path.lstrip("/") for path in re.findall("`(/.*?)`", told)]
        assert len(rows) == table.count("`/") - len(links) > 20
        (tmp_path / "answers.toml").write_text(ANSWERS)
        for there in ("usr/lib/systemd/systemd", "sbin/openrc-run", "etc/sv"):
            shutil.rmtree(tree)
            for path in ("usr/bin/python3", "etc/passwd", there):
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).mkdir() if path.endswith("sv") else (tree / path).touch()
            (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nmicroauthd:x:990:991::/var/lib/microauthd:/bin/false\n")
            (tree / "etc/group").write_text("root:x:0:\nmicroauthd:x:991:\n")
            bare = {*tree.rglob("*")}
            done = self.install(tree, "--yes", "--sockets", "--answers", tmp_path / "answers.toml")
            assert done.returncode == 0, done.stderr
            for path in sorted({*tree.rglob("*")} - bare):
                name = str(path.relative_to(tree))
                if path.is_symlink():
                    assert name in links or f"{os.path.dirname(name)}/" in links, name
                    continue
                row = name if path.is_dir() or name in rows else os.path.dirname(name) + "/"
                if path.is_dir() and row not in rows:  # one above what it names
                    assert [wanted for wanted in (*rows, *links) if wanted.startswith(f"{name}/")], name
                info = path.stat()
                stands = ({0: "root", 990: "microauthd"}[info.st_uid], {0: "root", 991: "microauthd"}[info.st_gid])
                assert (*stands, stat.S_IMODE(info.st_mode)) == rows.get(row, ("root", "root", 0o755)), name
                assert path.is_dir() or row in rows, name
                made.add(row)
        assert {*rows} - made == {  # what comes later
            "etc/microauthd/first-clients.txt", "etc/microauthd/trusted-keys", "run/microauthd", "run/microauthd/admin.sock",
        }

    def test_from_a_folder_there_is_nothing_to_install(self):
        done = subprocess.run(
            [sys.executable, ROOT / "microauthd.py", "install", "--dry-run"], capture_output=True, text=True
        )
        assert done.returncode == 1 and "build/pyz makes it" in done.stderr


class TestUnit:
    """systemd.exec(5)"""

    @pytest.fixture
    def unit(self, tmp_path):
        path = tmp_path / "microauthd.service"
        path.write_bytes(fill(Layout(user="daemon", python=sys.executable), "microauthd.service", CREDENTIALS=""))
        return path

    def test_what_it_may_do_is_little(self, unit):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", unit],
            capture_output=True, text=True,
        )
        assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("\u2713"))

    def test_systemd_understands_every_line(self, unit, tmp_path):
        root = tmp_path / "root"
        shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
        for path in ("/usr/bin/env", "/bin/sh", sys.executable, "/opt/microauthd/microauthd"):
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch(0o755)
        (root / "etc/systemd/system").mkdir(parents=True)
        names = []
        unit.write_bytes(fill(Layout(user="daemon", python=sys.executable, sockets=True), unit.name, CREDENTIALS=""))
        assert "\nSockets=microauthd-auth.socket microauthd-admin.socket\n" in unit.read_text()
        for side in ("auth", "admin"):
            names.append(f"microauthd-{side}.socket")
            text = fill(Layout(), names[-1], ADDRESS="127.0.0.1:443", V6ONLY="ipv6-only")
            (root / "etc/systemd/system" / names[-1]).write_bytes(text)
        shutil.copy(unit, root / "etc/systemd/system")
        done = subprocess.run(
            ["systemd-analyze", "verify", f"--root={root}", "--man=no", unit.name, *names], capture_output=True, text=True
        )
        assert [line for line in (done.stdout + done.stderr).splitlines() if "microauthd" in line] == []

    def test_the_server_sees_who_is_there(self, unit):
        text = unit.read_text()
        assert "\nPrivateUsers=no\n" in text and "\nProtectProc=default\n" in text and "\nType=notify\n" in text


# -- settings of root, data of the server --

SERVER = 12345  # a uid that nobody has


class House:
    """A service as install makes it, in a folder that its user can reach: settings of root, data of the server."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.chmod(0o755)
        self.ports = free_port(), free_port()
        for name, mode, ids in (("etc", 0o755, (0, 0)), ("secrets", 0o750, (0, SERVER)), ("data", 0o700, (SERVER, SERVER))):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(mode)
            os.chown(self.folder / name, *ids)
        self.conf, self.answers = self.folder / "etc/mad.conf", self.folder / "etc/answers.toml"
        files = {"db-file": "mad.db3", "seal-key-file": "seal.key", "token-signing-key-file": "token.pem",
                 "admin-token-signing-key-file": "admin.pem"}  # fmt: skip
        lines = [f"{name} = {self.folder}/data/{file}\n" for name, file in files.items()]
        lines += [f"auth-port = {self.ports[0]}\n", f"admin-port = {self.ports[1]}\n", "log-file =\n", "workers = 1\n"]
        for path, text in ((self.conf, "".join(lines)), (self.folder / "secrets/db-pass", "a database phrase\n")):
            path.write_text(text)
            path.chmod(0o640)
            os.chown(path, 0, SERVER)
        self.answers.write_text(ANSWERS)
        self.answers.chmod(0o600)
        self.environ = os.environ | CHEAP | {
            "CREDENTIALS_DIRECTORY": str(self.folder / "secrets"), "MAD_CONFIG": str(self.conf), "HOME": "/root",
            "MICROAUTHD_CACHE": str(self.folder / "code"),
        }  # fmt: skip
        (self.folder / "code").mkdir()
        (self.folder / "code").chmod(0o755)

    def run(self, *words):
        return subprocess.run([*PROGRAM, *map(str, words)], cwd="/", env=self.environ, capture_output=True, text=True)

    def set_up(self):
        return self.run("setup", "--first-start", "--answers", self.answers)


@pytest.fixture
def house():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield House(folder)


@needs_root
class TestRootsSettings:
    """What root runs before the first start of a service, and what that service's user runs beside it."""

    @pytest.mark.parametrize("name, path", [("db-file", "data/other.db3"), ("seal-key-file", "data/other.key")])
    def test_answers_may_name_other_files_of_the_user(self, house, name, path):
        house.answers.write_text(f'{name} = "{house.folder / path}"\n' + ANSWERS)
        done = house.set_up()
        assert done.returncode == 0 and (house.folder / path).stat().st_uid == SERVER, done.stderr

    def test_a_first_start_sets_up_once_and_the_server_reads_what_is_roots(self, house, tmp_path):
        done = house.set_up()
        assert done.returncode == 0, done.stderr
        secret = re.fullmatch(r"client_id=app\nclient_secret=(\S+)\n", (house.folder / "etc/first-clients.txt").read_text())
        assert secret[1] not in done.stdout and not house.answers.exists()
        for path in (house.folder / "data").iterdir():
            assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (SERVER, 0o600), path
        info = house.conf.stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (0, SERVER, 0o640)
        assert "a database phrase" not in house.conf.read_text() and "\noidc-issuer = " in house.conf.read_text()
        before = contents(house.folder / "data")
        house.answers.write_text(ANSWERS)
        house.answers.chmod(0o600)
        assert house.set_up().returncode == 0 and contents(house.folder / "data") == before  # nothing, again
        # Started by root, as OpenRC's and runit's scripts could, it becomes the user of the data.
        process = subprocess.Popen(
            [*PROGRAM, "serve"], cwd="/", env=house.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert "going on as that user" in process.stderr.readline() and " serving " in process.stderr.readline()
            assert f"\nUid:\t{SERVER}\t" in Path(f"/proc/{process.pid}/status").read_text()
            box = Box(tmp_path / "nothing")
            answer = box.call(house.ports[0], "POST", "/token", {"grant_type": "client_credentials"}, client=("app", secret[1]))
            assert answer.status == 200 and os.listdir(house.folder / "code") != []
        finally:
            process.terminate()
            assert process.wait(60) == 0
            process.stderr.close()

    def test_a_set_up_that_was_killed_is_repeated(self, house):
        for number in range(1, 12, 3):
            script = (
                "import os, sys\nsys.path.insert(0, sys.argv[1])\nfrom appliance import recovery\nfrom appliance.commands import main\n"
                "real, count, parent = os.replace, [0], os.getpid()\n"
                "def replace(*words):\n    real(*words)\n    count[0] += 1\n    if count[0] == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
                "os.replace = replace\n"
                "main(['setup', '--first-start', '--answers', sys.argv[3]])\n"
            )
            words = [sys.executable, "-c", script, ROOT, number, house.answers]
            subprocess.run(list(map(str, words)), cwd="/", env=house.environ, capture_output=True)
        done = house.set_up()
        assert done.returncode == 0, done.stderr
        (database,) = (house.folder / "data").glob("*.db3")
        assert house.run("keys", "list").returncode == 0 and database.stat().st_uid == SERVER
        assert not list(house.folder.rglob("*.setup")) and not list(house.folder.rglob("*.setting-up"))

    def test_backup_restore_and_reset_work_as_the_user_and_leave_the_settings(self, house):
        assert house.set_up().returncode == 0
        conf, backup = house.conf.read_text(), house.folder / "data/box.backup"
        assert house.run("backup", backup).returncode == 0
        done = house.run("restore", backup)
        assert done.returncode == 0, done.stderr
        assert house.run("factory-reset", "--yes").returncode == 0
        assert not (house.folder / "data/mad.db3").exists() and house.conf.read_text() == conf
        done = house.run("restore", backup)
        assert done.returncode == 0 and house.run("keys", "list").returncode == 0, done.stderr
        house.conf.unlink()
        environ = {f"MAD_{name.upper().replace('-', '_')}": value for name, value in re.findall("(?m)^(db-file|[a-z-]*key-file) = (.*)$", conf)}
        house.environ |= environ
        (house.folder / "data/mad.db3").unlink()
        done = house.run("restore", backup, "--config", house.conf)
        assert done.returncode == 1 and "as root" in done.stderr, done


class TestSettingsOfOthers:
    """A set-up whose config file this user cannot write: it is there already, or mounted read-only."""

    @pytest.fixture
    def options(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        tmp_path.chmod(0o700)
        monkeypatch.setattr("appliance.recovery.is_writable", lambda config: False)
        (tmp_path / "mad.conf").write_text("db-pass = a database phrase\nargon2id-memory = 8192\nargon2id-time = 1\n")
        (tmp_path / "mad.conf").chmod(0o600)
        return load_options({}, {})

    def test_it_stays_as_it_is_and_the_journal_lies_beside_the_database(self, options, tmp_path):
        before = (tmp_path / "mad.conf").read_text()
        names = []
        set_up(options, Answers("root", "root@example.org", "an administrator's phrase"),
               lambda name: names.append((name, (tmp_path / "mad.db3.setting-up").exists())))  # fmt: skip
        assert ("config", True) not in names and ("staged", True) in names and ("committed", True) in names
        assert (tmp_path / "mad.conf").read_text() == before
        assert (tmp_path / "mad.db3").exists() and not list(tmp_path.glob("*.setup"))

    @pytest.mark.parametrize("step, is_set_up", [("journal", False), ("staged", False), ("committed", True)])
    def test_killed_anywhere_it_is_done_or_undone(self, options, tmp_path, step, is_set_up):
        def kill(name):
            if name == step:
                os.kill(os.getpid(), signal.SIGKILL)

        answers = Answers("root", "root@example.org", "an administrator's phrase")
        assert in_child(lambda: set_up(options, answers, kill)) == signal.SIGKILL
        recover_setup("mad.conf")
        assert (tmp_path / "mad.db3").exists() is is_set_up and (tmp_path / "token.pem").exists() is is_set_up
        assert not list(tmp_path.glob("*.setup")) and not list(tmp_path.glob("*.setting-up"))

    def test_settings_that_would_be_lost_are_refused(self, options, tmp_path):
        changed = dataclasses.replace(options, token_expiration=60)
        with pytest.raises(StartupError, match=r"not in it: token-expiration$"):
            set_up(changed, Answers("root", "root@example.org", "an administrator's phrase"))
        assert not (tmp_path / "mad.db3").exists()
        kept = dataclasses.replace(changed, origins=options.origins | {"token-expiration": "environment MAD_TOKEN_EXPIRATION"})
        assert set_up(kept, Answers("root", "root@example.org", "an administrator's phrase")) == []


# -- containers --


class TestContainer:
    """docker = true"""

    @pytest.fixture
    def box(self, tmp_path):
        """A container with an empty volume."""
        box = Box(tmp_path / "data", workers="1")
        box.folder.mkdir(mode=0o700)
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        for name, secret in (("db-pass", "a database phrase"), ("admin-password", Box.PASSWORD)):
            (secrets / name).write_text(secret + "\n")
            (secrets / name).chmod(0o444)  # as Docker mounts them
        box.environ |= {
            "MAD_DOCKER": "true", "MAD_AUTH_PORT": str(box.auth_port), "MAD_ADMIN_PORT": str(box.admin_port),
            "MAD_WORKERS": "1", "MAD_DB_PASS_FILE": str(secrets / "db-pass"), "MAD_SETUP_USERNAME": "root",
            "MAD_SETUP_EMAIL": "root@example.org", "MAD_SETUP_PASSWORD_FILE": str(secrets / "admin-password"),
            "MAD_OIDC_CLIENT_ID": "app",
        }  # fmt: skip
        yield box
        box.__exit__()

    def test_an_empty_volume_is_set_up_from_the_environment_and_served(self, box):
        box.start(wait=False)
        box.await_ready(30)
        assert box.admin_token()
        told = dict(line.split("=", 1) for line in (box.folder / "first-clients.txt").read_text().splitlines())
        box.client = told["client_id"], told["client_secret"]
        assert box.token().status == 200
        conf = (box.folder / "mad.conf").read_text()
        assert "a database phrase" not in conf and Box.PASSWORD not in conf
        end = time.monotonic() + 60
        while " serving " not in (box.folder / "output.txt").read_text() and time.monotonic() < end:
            time.sleep(0.05)  # the processes serve before the line says so
        assert box.stop() == 0
        output = (box.folder / "output.txt").read_text()
        assert " serving " in output and told["client_secret"] not in output and not box.log()  # it is stdout's
        box.start()  # now it is set up
        assert box.token().status == 200 and box.stop() == 0

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"MAD_SETUP_USERNAME": ""}, "needs MAD_SETUP_USERNAME"), ({"MAD_SETUP_EMAIL": ""}, "needs MAD_SETUP_EMAIL"),
            ({"MAD_SETUP_PASSWORD_FILE": ""}, "needs MAD_SETUP_PASSWORD_FILE"),
            ({"MAD_SETUP_PASSWORD_FILE": "/nowhere"}, "/nowhere cannot be read"),
            ({"MAD_SETUP_PASSWORD": "one"}, "MAD_SETUP_PASSWORD and MAD_SETUP_PASSWORD_FILE"),
            ({"MAD_SETUP_PASSWORD_FILE": "", "MAD_SETUP_PASSWORD": "short"}, "password"),
            ({"MAD_SETUP_ANSWERS": "/answers.toml"}, "MAD_SETUP_ANSWERS goes with no other"),
            ({"MAD_SETUP_EMAIL": "nobody"}, "the environment: "), ({"MAD_SETUP_NAME": "x"}, "unknown environment variable"),
            ({"MAD_DB_PASS_FILE": ""}, "db-pass"),
            ({name: "" for name in ("MAD_SETUP_USERNAME", "MAD_SETUP_EMAIL", "MAD_SETUP_PASSWORD_FILE")}, "or MAD_SETUP_ANSWERS"),
        ],
    )  # fmt: skip
    def test_what_is_missing_or_wrong_is_said_and_nothing_is_made(self, box, changes, said):
        box.environ = {name: value for name, value in (box.environ | changes).items() if value}
        done = box.run("serve")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not [name for name in os.listdir(box.folder) if not name.endswith(".lock")]

    def test_the_container_files_name_options_and_paths_that_exist(self):
        folder = ROOT / "appliance" / "container"
        compose = yaml.safe_load((folder / "compose.yaml").read_text())
        service = compose["services"]["microauthd"]
        assert set(service["secrets"]) == set(compose["secrets"]) and list(compose["volumes"]) == ["data"]
        lines = (folder / "Containerfile").read_text()
        environ = dict(re.findall(r"^ENV (MAD_\w+)=(\S+)$", lines, re.M)) | service["environment"]
        found = read_variables("MAD_", environ)
        for name, (value, origin) in found.items():
            if not is_in_file(origin):
                OPTION_NAMES[name].parse(value)
        assert found["docker"][0] == "true" and set(setup_variables("MAD_", environ)) == {
            "SETUP_USERNAME", "SETUP_EMAIL", "SETUP_PASSWORD_FILE",
        }
        steps = re.findall(r"^([A-Z]+) ", lines, re.M)
        assert steps[0] == "FROM" and "\nUSER 10001:10001\n" in lines and "\nSTOPSIGNAL SIGTERM\n" in lines
        assert (folder / service["build"]["dockerfile"]).exists()

    def test_the_health_check_asks_over_the_unix_socket(self, box):
        (line,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", (ROOT / "appliance/container/Containerfile").read_text(), re.M)
        _, _, _, program = json.loads(line)
        program = program.replace("/data/admin.sock", str(box.folder / "admin.sock"))
        assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 1
        box.start(wait=False)
        box.await_ready(30)
        assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
