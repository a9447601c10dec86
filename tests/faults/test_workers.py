"""A process that dies is replaced within a second and nobody else fails; a stop under load answers every request that was read."""

import contextlib
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types

import box as box_module
import pytest
from box import PROGRAM, ROOT, Box, runs, state_of
from crowd import Administrator, Crowd, Patron, Service, await_true, basic, request, sockets_of
from test_flows import make_certificate
from appliance.base.metrics import Counters
from appliance.base.database import Generation, read_database_key
from appliance.base.store import Store
from appliance.processes import START_SECONDS, STUCK_SECONDS, Supervisor

LONG = pytest.mark.long
PATIENCE = 30  # seconds: whatever is awaited comes at once, but on a machine that is busy


@pytest.fixture
def box(tmp_path):
    with Box(tmp_path / "data", workers="2") as box:
        for _ in range(24):  # every worker knows the client
            assert box.token().status == 200
        yield box
        assert "Traceback" not in box.said()


@contextlib.contextmanager
def hasty(folder, change, **settings):
    """A box that serves from the source, with a constant of appliance.processes changed so that it waits less."""
    program = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom appliance import commands, processes\n{change}\n"
        "sys.exit(commands.main())"
    )
    box = Box(folder, **settings).set_up()
    with contextlib.ExitStack() as stack:
        stack.callback(box.__exit__)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(box_module, "PROGRAM", [sys.executable, "-I", "-c", program])
            box.start()
        yield box
    assert "Traceback" not in box.said()


def stop(pid):
    """SIGSTOP, and wait for it."""
    os.kill(pid, signal.SIGSTOP)
    await_true(lambda: state_of(pid) == "T", PATIENCE, "it does not stop")


def kill(box, pid):
    """kill -9, when what it holds is known: the local ports of its clients' connections, and when it died."""
    stop(pid)
    held = sockets_of(pid)
    os.kill(pid, signal.SIGKILL)
    # Until then a request can still be sent to it.
    await_true(lambda: not runs(pid), PATIENCE, "it does not die")
    return held, time.monotonic()


def links_of(pid):
    """How many sockets a process holds: the one it listens on, and those it has taken."""
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count


def replaced(box, dead, role, known):
    """Wait for the process in its place, and for the first connection it takes. How long it took is not looked at here."""
    (new,) = await_true(lambda: set(box.pids()) - known, PATIENCE, "nobody is in its place")
    with contextlib.ExitStack() as stack:

        def takes():
            sock = stack.enter_context(
                socket.create_connection(("127.0.0.1", box.auth_port if role == "auth" else box.admin_port), PATIENCE)
            )
            sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in sock.recv(65536)
            return (
                links_of(new) > 1
            )  # it has taken one; /proc/net/tcp takes long to read where thousands have been closed

        await_true(takes, PATIENCE, "the new one takes no connection")
    assert dead not in box.pids()
    return new


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=LONG)])
def test_each_process_in_turn_is_replaced_within_a_second_and_only_its_own_connections_end(box, kills):
    patrons = [
        *(Service(box) for _ in range(4)), *(Service(box, fresh=True) for _ in range(3)), Administrator(box),
        Administrator(box, fresh=False, pause=0.01),
    ]
    deaths, slots = [], box.pids()[1:]  # two workers and ADMIN
    with contextlib.ExitStack() as stack:
        for patron in patrons:
            stack.enter_context(patron)
        for number in range(kills):
            time.sleep(0.3 if kills < 10 else 2.2)  # one that dies young ten times over is tried less often
            slot = number % 3
            known = set(box.pids())
            held, died = kill(box, slots[slot])
            slots[slot] = replaced(box, slots[slot], "auth" if slot < 2 else "admin", known)
            deaths.append((died, time.monotonic() - died, held))
        time.sleep(0.3)
        await_true(
            lambda: all(len(patron.times) > 20 * kills / 3 for patron in patrons), 60, "somebody is not served any more"
        )
    for patron in patrons:
        for port, connected, error in patron.bad:
            # A connection ended, nothing else; it was in the hands of one that died, and begun before. A client that
            # was between two requests at that moment meets the end at its next one.
            assert any(port in held and connected < died for died, _, held in deaths), (
                type(patron).__name__, error, [(port in held, connected - died) for died, _, held in deaths],
            )
            assert "answered" not in error, error
        assert len(patron.bad) <= kills
        # The long run measures, with nothing beside it; here others have the processors as well.
        assert max(patron.times) < (3 if kills > 10 else PATIENCE), "who came while nobody was there was served"
    assert max(took for _, took, _ in deaths) < (1 if kills > 10 else PATIENCE), [took for _, took, _ in deaths]


@pytest.mark.parametrize("kills", [4, pytest.param(9, marks=LONG)])
def test_deaths_in_quick_succession_do_not_end_the_service(box, kills):
    with Service(box, fresh=True, pause=0.01) as patron:
        for _ in range(kills):
            known = set(box.pids())
            victim = box.pids()[-1]
            role = "admin" if sockets_listening(victim) == {box.admin_port} else "auth"
            kill(box, victim)
            replaced(box, victim, role, known)
    assert len(patron.bad) <= kills and max(patron.times) < (2 if kills > 4 else PATIENCE), patron.bad
    assert box.stop() == 0


@pytest.mark.parametrize("more", [0, pytest.param(2, marks=LONG)])
def test_one_that_cannot_start_is_tried_again_for_ever_and_the_others_serve(tmp_path, more):
    """A limit that was set too low, a folder that is gone: whatever it is, it may pass."""
    with Box(tmp_path / "data", workers="2") as box:
        await_true(lambda: " serving " in box.log(), PATIENCE, "it has no log")
        assert count_listening(box.auth_port) == 2
        # Inherited by each child, which opens the lock file before it raises its soft limit to the hard one.
        soft, hard = resource.prlimit(box.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(box.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.kill(box.pids()[1], signal.SIGKILL)
# After the eleventh it is tried every five seconds, and until then nobody listens on its socket.
        await_true(lambda: count_listening(box.auth_port) == 1, 2 * PATIENCE, "connections are sent to it")
        many = box.log().count("worker.died") + more
        await_true(lambda: box.log().count("worker.died") >= max(many, 11), PATIENCE, "it is not tried again")
        assert box.process.poll() is None and "status=0" not in box.log() and box.admin_token()
        for _ in range(24):  # none of which waits for it
            assert box.call(box.auth_port, "GET", "/ping", timeout=PATIENCE).status == 200
        resource.prlimit(box.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        await_true(lambda: len(box.pids()) == 4, PATIENCE, "it stays away")
        for _ in range(12):
            assert box.token().status == 200
        assert box.stop() == 0


def test_a_child_that_ends_is_replaced_by_whomever_we_were_started(tmp_path):
    """Whoever ignores SIGCHLD hands that on."""
    box = Box(tmp_path / "data", workers="2").set_up()
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        box.start()
    finally:
        signal.signal(signal.SIGCHLD, before)
    with contextlib.closing(box.output):
        pids = box.pids()
        os.kill(pids[1], signal.SIGKILL)
        await_true(lambda: len(set(box.pids()) - set(pids)) == 1, PATIENCE, "nobody is in its place")
        assert box.token().status == 200 and box.stop() == 0


def test_one_that_is_stopped_does_not_outlive_its_supervisor(tmp_path):
    """Its socket would share the port with the next start, and take half of the connections with it."""
    with Box(tmp_path / "data", workers="2") as box:
        stop(box.pids()[1])
        assert box.kill(), "somebody is left"
        box.start()
        for _ in range(24):
            assert box.call(box.auth_port, "GET", "/ping", timeout=PATIENCE).status == 200


def test_after_thousands_of_replacements_one_still_begins(monkeypatch):
    """Each says that it is ready in a pipe, which has to be read."""
    startup = types.SimpleNamespace(generation=Generation(), counters=Counters(), certificates={}, auth_sockets=[], log=lambda *_, **__: None)
    supervisor = Supervisor(startup)
    supervisor.children[1] = (0, 0.0)
    monkeypatch.setattr(os, "waitpid", lambda pid, flags: (0, 0))
    os.set_blocking(supervisor.ready_in, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(supervisor.ready_in, bytes(4096))
    supervisor.check_children(False)
    assert os.write(supervisor.ready_in, b"\0") == 1


class TestReplacing:
    @pytest.fixture
    def supervisor(self, monkeypatch):
        """One that forks only on paper, with a clock moved by hand: `at`."""
        startup = types.SimpleNamespace(
            generation=Generation(), auth_sockets=[socket.socket(), socket.socket()], admin_socket=socket.socket(),
            local=None, log=lambda *_, **__: None, counters=Counters(), certificates={}, handed=frozenset(),
        )
        supervisor, pids = Supervisor(startup), iter(range(100, 1000))
        supervisor.at = time.monotonic()
        monkeypatch.setattr(os, "fork", lambda: next(pids))
        monkeypatch.setattr(time, "monotonic", lambda: supervisor.at)
        yield supervisor
        for sock in (*startup.auth_sockets, startup.admin_socket):
            sock.close()

    def dies(self, supervisor, pid, lived):
        supervisor.at += lived
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "waitpid", lambda one, flags: (one, 256) if one == pid else (0, 0))
            supervisor.check_children(False)

    def pid_of(self, supervisor, number):
        return next((pid for pid, (role, _) in supervisor.children.items() if role == number), None)

    def test_one_that_dies_young_again_and_again_is_tried_less_often_and_one_that_lived_at_once(self, supervisor):
        for number in range(3):
            supervisor.fork(number)
        waits = []
        for _ in range(12):
            self.dies(supervisor, self.pid_of(supervisor, 0), 0.1)
            assert self.pid_of(supervisor, 0) is None and self.pid_of(supervisor, 1)
            waits.append(supervisor.pending[0] - supervisor.at)
            supervisor.at = supervisor.pending[0]
            supervisor.restart_due()
        assert all(wait < 0.3 for wait in waits[:10]) and all(4 < wait < 6 for wait in waits[10:]), waits
        self.dies(supervisor, self.pid_of(supervisor, 0), 60)
        assert self.pid_of(supervisor, 0), "at once"
        self.dies(supervisor, self.pid_of(supervisor, 0), 0.1)
        assert supervisor.pending[0] - supervisor.at < 0.3, "what was before is forgotten"

    def test_a_new_one_has_not_begun_whatever_the_one_before_counted(self, supervisor):
        generation = supervisor.startup.generation
        generation.beats[1] = 7
        supervisor.fork(0)
        assert generation.beats[1] == 0

    def test_none_is_forgotten_for_whom_there_was_no_memory(self, supervisor, monkeypatch):
        for number in range(3):
            supervisor.fork(number)
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(supervisor, "fork", no_memory)
            self.dies(supervisor, self.pid_of(supervisor, 1), 60)
        assert self.pid_of(supervisor, 1) is None
        self.dies(supervisor, 0, 1)
        assert self.pid_of(supervisor, 1)


def no_memory(*words):
    raise MemoryError


def test_a_child_listens_on_its_own_socket_alone(box):
    roles = [sockets_listening(pid) for pid in box.pids()[1:]]
    assert sorted(map(list, roles)) == sorted([[box.auth_port], [box.auth_port], [box.admin_port]])
    for pid, ports in zip(box.pids()[1:], roles, strict=True):
        own = 2 if box.admin_port in ports else 1  # ADMIN listens on a Unix socket as well
        await_true(lambda: links_of(pid) == own, PATIENCE, "more than the one it listens on")


def test_what_was_queued_when_the_supervisor_was_killed_is_written(box):
    def rows():
        with contextlib.closing(
            Store(box.folder / "mad.db3", read_database_key(box.folder / "mad.db3", "a database phrase", False))
        ) as store:
            return store.connection.execute("SELECT count(*) FROM session").fetchone()[0]

    time.sleep(0.2)
    before = rows()
    done = sum(box.token().status == 200 for _ in range(30))
    assert box.kill() and rows() == before + done


def test_a_stall_of_the_whole_process_fails_no_request_that_had_come(tmp_path):
    """The time in which nobody could be heard does not count."""
    seconds = 4
    change = f"import functools\nprocesses.Limits = functools.partial(processes.Limits, request_seconds={seconds})"
    with hasty(tmp_path / "data", change, workers="1") as box:
        (pid,) = box.pids()[1:2]
        with socket.create_connection(("127.0.0.1", box.auth_port), PATIENCE) as sock:
            sock.sendall(b"GET /ping HTTP/1.1\r\nHo")
            time.sleep(0.3)
            stop(pid)
            sock.sendall(b"st: localhost\r\n\r\n")
            time.sleep(seconds + 1)
            os.kill(pid, signal.SIGCONT)
            assert b" 200 " in sock.recv(65536)


class TestLog:
    """A log that blocks keeps nobody from serving."""

    def refused(self, box, many):
        for _ in range(many):
            with socket.create_connection(("127.0.0.1", box.auth_port), PATIENCE) as sock:
                sock.sendall(b"GET /" + b"x" * 900 + b"\r\n\r\n")
                sock.recv(100)

    def serves(self, box):
        for port in (box.auth_port, box.admin_port):
            for _ in range(12):
                assert box.call(port, "GET", "/ping", timeout=PATIENCE).status == 200

    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_a_console_that_nobody_reads(self, tmp_path, workers):
        box = Box(tmp_path / "data", workers=workers, log_file="").set_up()
        reads, box_writes = os.pipe()
        box.process = subprocess.Popen(
            [*PROGRAM, "serve"], cwd=box.folder, env=box.environ, stdout=box_writes, stderr=box_writes,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
        box.output = open(os.devnull)
        try:
            box.await_ready()
            os.set_blocking(box_writes, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(box_writes, bytes(4096))
            os.set_blocking(box_writes, True)  # shared with them: what they meet is a pipe that is full
            self.refused(box, 40)
            self.serves(box)
            known = set(box.pids())
            if workers == "2":
                os.kill(box.pids()[1], signal.SIGKILL)
                await_true(lambda: set(box.pids()) - known, PATIENCE, "the supervisor waits, too")
            assert box.stop() == 0
        finally:
            if box.process.poll() is None:
                os.killpg(box.process.pid, signal.SIGKILL)
            os.close(reads)
            os.close(box_writes)

    def test_a_pipe_in_its_place(self, box):
        path = box.folder / "microauthd.log"
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self.refused(box, 12)
        self.serves(box)
        assert box.stop() == 0
        path.unlink()


def test_a_process_that_hangs_is_replaced_and_those_that_go_on_are_not(tmp_path):
    with hasty(tmp_path / "data", f"processes.STUCK_SECONDS = {STUCK_SECONDS // 4}", workers="2") as box:
        supervisor, *children = box.pids()
        stopped = {children[0], children[-1]}  # a worker and ADMIN
        for pid in stopped:
            stop(pid)
        # Four of which, most likely, some wait at the one that hangs: they are served by the one in its place.
        with contextlib.ExitStack() as stack:
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                for port in (box.auth_port,) * 4 + (box.admin_port,)
            ]
            for sock in waiting:
                sock.settimeout(2 * STUCK_SECONDS)
                sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for sock in waiting:
                assert b" 200 " in sock.recv(65536)
        await_true(
            lambda: box.log().count("worker.stuck") == 2 and len(box.pids()) == 4, PATIENCE, "one of them is left"
        )
        now = box.pids()
        assert now[0] == supervisor and not stopped & set(now) and children[1] in now


def test_what_one_changed_that_died_before_it_could_say_so_is_known_to_all():
    """The supervisor says it: that something may have changed. Between a commit and the word of it may lie a checkpoint."""
    startup = types.SimpleNamespace(generation=Generation(), counters=Counters(), certificates={}, auth_sockets=[None], log=lambda *_, **__: None)
    supervisor, before = Supervisor(startup), startup.generation.read()
    pid = os.fork()
    if not pid:
        os._exit(0)
    supervisor.children[pid] = (0, time.monotonic())
    assert await_true(lambda: list(supervisor.reap()), PATIENCE, "it is not reaped")
    assert startup.generation.read() != before


def test_what_has_not_begun_or_was_stopped_with_its_supervisor_does_not_hang():
    startup = types.SimpleNamespace(
        generation=Generation(), counters=Counters(), certificates={}, auth_sockets=[None, None],
        log=lambda *_, **__: None,
    )
    supervisor, generation, killed, now = Supervisor(startup), startup.generation, [], time.monotonic()

    def look(after):
        nonlocal now
        now += after
        supervisor.end_stuck()

    supervisor.children = {101: (0, 0.0), 102: (1, 0.0), 103: (2, 0.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
        patch.setattr(time, "monotonic", lambda: now)
        for second in range(STUCK_SECONDS * 2):
            for slot in (1, 2):  # 103 is still at its start
                if slot == 1 or second < 5:
                    generation.slot = slot
                    generation.beat()
            look(after=1.0)
            assert killed == ([(102, signal.SIGKILL)] if second >= STUCK_SECONDS + 5 else []), second
            if killed:
                break
        supervisor.children[104] = supervisor.children.pop(102)  # in its place, at its start
        generation.beats[2] = 0
        for _ in range(STUCK_SECONDS * 2):
            generation.slot = 1
            generation.beat()
            look(after=1.0)
        look(after=3600.0)  # the machine slept: nobody has gone on, and nobody hung
        assert len(killed) == 1
        for _ in range(START_SECONDS):
            generation.slot = 1
            generation.beat()
            look(after=1.0)
    assert killed[1:] == [(103, signal.SIGKILL), (104, signal.SIGKILL)], "one that never begins hangs, too"


def count_listening(port):
    rows = (line.split() for line in open("/proc/net/tcp").read().splitlines()[1:])
    return sum(row[3] == "0A" and row[1].endswith(f":{port:04X}") for row in rows)


def sockets_listening(pid):
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    rows = (line.split() for line in open(f"/proc/{pid}/net/tcp").read().splitlines()[1:])
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


# -- SIGTERM --


class Last(Patron):
    """Asks for tokens until its connection is the last one that was served; counts what was answered.

    `doubt` are requests that got not one octet of an answer on a connection that was good until then.
    """

    def __init__(self, box, **more):
        super().__init__(box, pause=0, **more)
        self.answered, self.jtis, self.refused = 0, [], []

    def run(self):
        octets = request("POST", "/token", self.form(), Authorization=basic(self.box.client))
        while not self.ending.is_set():
            try:
                sock = socket.create_connection(("127.0.0.1", self.port), 10)
            except OSError:
                break  # nobody listens any more
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not self.use(sock, octets):
                    break

    def form(self):
        return "grant_type=client_credentials"

    def use(self, sock, octets):
        """Go on until the server says that it was the last answer, or ends the connection; false when it went wrong."""
        served = 0
        while True:
            said = b""
            try:
                sock.sendall(octets)
                while b"\r\n\r\n" not in said or len(said) < self.length(said):
                    more = sock.recv(65536)
                    if not more:
                        break
                    said += more
            except OSError:
                pass
            if not said.startswith(b"HTTP/1.1 "):
                # One that came while the port was closing was never accepted; one that had been served was.
                if served or said:
                    self.bad.append((sock.fileno(), served, said[:100]))
                return False
            if said.startswith(b"HTTP/1.1 200 "):
                if len(said) != self.length(said):
                    self.bad.append((sock.fileno(), served, said[-100:]))
                self.answered += 1
            else:
                self.refused.append(said[:200])
            served += 1
            if b"\r\nConnection: close\r\n" in said:
                with contextlib.suppress(OSError):
                    assert sock.recv(1) == b""  # not a reset: the answer is never eaten
                return True

    @staticmethod
    def length(said):
        head, _, _ = said.partition(b"\r\n\r\n")
        return (
            len(head)
            + 4
            + int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))[15:])
        )


class Person(Last):
    """Logs in, with a password that is hashed each time."""

    def form(self):
        return f"grant_type=password&username=ann&password={'correct horse battery'.replace(' ', '+')}"


def rows(box):
    """How many tokens of machines and of people are stored."""
    path = str(box.folder / "mad.db3")
    store = Store(path, read_database_key(path, "a database phrase", False))
    try:
        return tuple(
            store.connection.execute(f"SELECT count(*) FROM session WHERE user_id IS {word} NULL").fetchone()[0]
            for word in ("", "NOT")
        )
    finally:
        store.close()


@pytest.mark.parametrize("workers", ["2", "0"])
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=LONG)])
def test_sigterm_under_load_answers_every_request_that_was_read(tmp_path, workers, rounds):
    """What is stored is what was answered, to the token: nothing was done for an answer that was not given, and nothing answered is lost."""
    box = Box(tmp_path / "data", workers=workers, enable_pass_cache="false")
    box.set_up()
    with contextlib.ExitStack() as stack:
        stack.callback(box.__exit__)
        for number in range(rounds):
            box.start()
            if not number:
                box.new_user("ann")
            before = rows(box)
            machines, people = [Last(box) for _ in range(10)], [Person(box) for _ in range(4)]
            crowd = stack.enter_context(Crowd(box.auth_port, ["127.0.0.1"]))
            crowd.hold(20, b"")                         # connections that were never used
            crowd.hold(5, b"POST /token HTTP/1.1\r\nHo")  # requests whose rest comes while the stop is under way
            idle = stack.enter_context(Crowd(box.auth_port, ["127.0.0.1"]))
            idle.hold(10, b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for sock in idle.sockets:
                assert b" 200 " in sock.recv(65536)
            for patron in (*machines, *people):
                stack.enter_context(patron)  # is joined however this test ends: its rows would be in what others count
            stack.callback(box.__exit__)  # first of all: it ends with its box
            time.sleep(0.3 + 0.01 * number)
            for patrons, least in ((machines, 50), (people, 4)):
                await_true(lambda: sum(patron.answered for patron in patrons) >= least, 60, "they are not served")  # noqa: B023
            stopping = threading.Timer(0, box.process.send_signal, [signal.SIGTERM])
            began = time.monotonic()
            stopping.start()
            time.sleep(0.1)
            rest = request(
                "POST", "/token", "grant_type=client_credentials", Authorization=basic(box.client)
            ).removeprefix(b"POST /token HTTP/1.1\r\nHo")
            for sock in crowd.sockets[20:]:
                sock.sendall(
                    rest + b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
                )  # what follows is not read, and must not eat the answer
            late = [read_to_end(sock) for sock in crowd.sockets[20:]]
            assert [said[:13] for said in late] == [b"HTTP/1.1 200 "] * 5, late
            # Who had nothing to ask is told by an end, not by a reset.
            assert [read_to_end(sock) for sock in (*crowd.sockets[:20], *idle.sockets)] == [b""] * 30
            assert box.process.wait(60) == 0 and time.monotonic() - began < (5 if rounds > 1 else PATIENCE)
            for patron in (*machines, *people):
                patron.join()
                assert not patron.bad and not patron.refused, (type(patron).__name__, patron.bad, patron.refused[:2])
            crowd.__exit__()
            idle.__exit__()
            box.output.close()
            after = rows(box)
            answered = (
                sum(patron.answered for patron in machines) + len(late), sum(patron.answered for patron in people),
            )
            assert (after[0] - before[0], after[1] - before[1]) == answered
        assert "Traceback" not in box.said()


@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=LONG)])
def test_who_has_connected_before_the_stop_is_served(box, rounds):
    """Its requests wait in the kernel, where nobody has taken them yet."""
    for number in range(rounds):
        if number:
            box.start()
        workers, before = box.pids()[1:-1], rows(box)[0]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        with Crowd(box.auth_port, ["127.0.0.1"]) as crowd:
            crowd.hold(400, request("POST", "/token", "grant_type=client_credentials", Authorization=basic(box.client)))
            box.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            said = []
            for sock in crowd.sockets:
                said.append(read_to_end(sock)[:13])
                sock.close()
        assert said == [b"HTTP/1.1 200 "] * 400, said.count(b"HTTP/1.1 200 ")
        assert box.process.wait(60) == 0
        box.output.close()
        assert rows(box)[0] == before + 400


def read_to_end(sock):
    """All that the server says. Raises ConnectionResetError when it ends by a reset."""
    sock.settimeout(PATIENCE)
    said = b""
    while more := sock.recv(65536):
        said += more
    return said
