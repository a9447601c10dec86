"""What a box looks like from outside, and clients of both kinds: patrons, who are measured, and a crowd that means harm."""

import contextlib
import http.client
import itertools
import json
import os
import resource
import select
import socket
import threading
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlencode

FORM = "application/x-www-form-urlencoded"
HERE, ELSEWHERE = (
    ["127.0.0.1"], [f"127.0.0.{number}" for number in range(2, 51)],
)  # the patrons' address, and those of others


def basic(client):
    return "Basic " + b64encode(":".join(client).encode()).decode()


# -- a box from outside --


def pss(pid):
    """Memory of a process in KiB, what it shares divided among those who share it; 0 when it is gone."""
    with contextlib.suppress(OSError, StopIteration):
        return next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        )
    return 0


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def sockets_of(pid):
    """The local ports of the other ends of the TCP connections that a process holds."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return {int(row[2].rpartition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in inodes} - {0}


def await_true(check, seconds, what):
    """Wait until something holds. Fails the test when it does not in time."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, what
        time.sleep(0.01)
    return found


class Memory(threading.Thread):
    """The most that all processes of a box took together, KiB."""

    def __init__(self, box):
        super().__init__()
        self.box, self.most, self.ending = box, 0, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.join()

    def run(self):
        while not self.ending.wait(0.05):
            with contextlib.suppress(OSError):
                self.most = max(self.most, sum(map(pss, self.box.pids())))


def many_descriptors():
    """Let this process hold a crowd of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000) if hard != resource.RLIM_INFINITY else 20000, hard))


# -- patrons --


class Patron(threading.Thread):
    """Does its `once` again and again, over one kept connection or a fresh one each time, and notes what was not a 200.

    `bad` has of each failure the local port of the connection, when that was begun, and the error.
    """

    def __init__(self, box, fresh=False, source="127.0.0.1", port=None, pause=0.002, most=None):
        super().__init__(daemon=True)
        self.box, self.fresh, self.source, self.port, self.pause, self.most = (
            box, fresh, source, port or box.auth_port, pause, most,
        )
        self.times, self.bad, self.ending = [], [], threading.Event()
        self.connection, self.used, self.connected = None, False, 0.0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.join()

    def connect(self):
        # A crowd's limits are per address; the port tells whose connection it is.
        kind, more = (
            (http.client.HTTPSConnection, {"context": self.box.tls})
            if self.box.tls
            else (http.client.HTTPConnection, {})
        )
        connection = kind(
            "localhost" if self.box.tls else "127.0.0.1", self.port, timeout=60, source_address=(self.source, 0), **more
        )
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def run(self):
        for _ in range(self.most) if self.most else itertools.count():
            if self.ending.is_set():
                break
            began, local = time.monotonic(), 0
            try:
                if self.connection is None:
                    self.connection, self.used, self.connected = self.connect(), False, began
                local = self.connection.sock.getsockname()[1]
                self.once()
                self.used = True
            except (OSError, http.client.HTTPException, ValueError, AssertionError) as error:
                self.bad.append((local, self.connected, repr(error)))
                self.drop()
            self.times.append(time.monotonic() - began)
            if self.fresh:
                self.drop()
            self.ending.wait(self.pause)
        self.drop()

    def drop(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(self, method, path, form=None, *, authorization="", json_body=None, good=200):
        headers, body = {"Authorization": authorization} if authorization else {}, None
        if form is not None:
            body, headers["Content-Type"] = urlencode(form), FORM
        if json_body is not None:
            body, headers["Content-Type"] = json.dumps(json_body), "application/json"
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        said = response.read()
        if response.will_close:
            self.drop()
        assert response.status == good, f"{method} {path} was answered {response.status} {said[:200]}"
        return said

    def p99(self):
        assert len(self.times) >= 10, f"only {len(self.times)} answers, and {self.bad}"
        return sorted(self.times)[int(0.99 * len(self.times))]

    def once(self):
        raise NotImplementedError


class Service(Patron):
    """A program of the box that fetches machine tokens."""

    def __init__(self, box, client=None, **more):
        super().__init__(box, **more)
        self.authorization = basic(client or box.client)

    def once(self):
        self.ask("POST", "/token", {"grant_type": "client_credentials"}, authorization=self.authorization)


class Administrator(Patron):
    """Logs in on ADMIN and looks at the users."""

    def __init__(self, box, **more):
        super().__init__(box, **{"port": box.admin_port, "fresh": True, "pause": 0.05} | more)

    def once(self):
        token = json.loads(
            self.ask("POST", "/token", {"username": "root", "password": self.box.PASSWORD, "client_id": "test"})
        )["access_token"]
        self.ask("GET", "/users", authorization=f"Bearer {token}")


# -- the crowd --


class Crowd:
    """Clients that mean harm, from these addresses in turn. What they hold is closed at the end."""

    def __init__(self, port, sources, tls=None):
        self.port, self.sources, self.tls = port, itertools.cycle(sources), tls
        self.lock, self.ending = threading.Lock(), threading.Event()
        self.sockets, self.threads, self.answers, self.lost = [], [], [], []
        self.sent = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join()
        for sock in self.sockets:
            sock.close()

    def connect(self, timeout=30):
        with self.lock:
            source = next(self.sources)
        return socket.create_connection(("127.0.0.1", self.port), timeout, source_address=(source, 0))

    def hold(self, number, octets):
        """Open so many connections, say this on each, and wait."""
        for _ in range(number):
            sock = self.connect()
            self.sockets.append(sock)
            if octets:
                sock.sendall(octets)

    def living(self):
        """How many of the held connections the server has not ended."""
        count = 0
        for sock in self.sockets:
            sock.setblocking(False)
            try:
                while sock.recv(65536):
                    pass
            except BlockingIOError:
                count += 1
            except OSError:
                pass
        return count

    def drip(self, octets, every):
        """Say these octets on all held connections, one after another, one each so many seconds."""

        def run():
            for octet in itertools.cycle(octets):
                for sock in self.sockets:
                    sock.setblocking(False)
                    with contextlib.suppress(OSError):
                        sock.send(bytes([octet]))
                if self.ending.wait(every):
                    break

        self.go(run)

    def go(self, run):
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def send(self, octets, timeout=30):
        """Send a request, as far as the server lets it be sent. The answer's status, None when there was none."""
        said = b""
        with self.connect(timeout) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(octets)
            with contextlib.suppress(ConnectionError):
                while b"\r\n" not in said and (more := sock.recv(65536)):
                    said += more
        return int(said[9:12]) if said else None

    def keep_sending(self, requests, threads):
        """Send these again and again (they have no end) from so many threads, each waiting for its answer."""

        def run():
            while not self.ending.is_set():
                with self.lock:
                    octets = next(requests)
                try:
                    self.answers.append(self.send(octets))
                except OSError as error:
                    self.lost.append(repr(error))

        for _ in range(threads):
            self.go(run)

    def fire(self, requests, rate):
        """Send so many of these a second, whether they are answered or not; answers are taken as they come."""

        def run():
            waiting, events, began = {}, select.poll(), time.monotonic()
            while waiting or not self.ending.is_set():
                while not self.ending.is_set() and self.sent < rate * (time.monotonic() - began):
                    sock = self.connect()
                    sock.sendall(next(requests))
                    waiting[sock.fileno()] = sock
                    events.register(sock, select.POLLIN)
                    self.sent += 1
                found = events.poll(5)
                for fd, _ in found:
                    events.unregister(fd)
                    with waiting.pop(fd) as sock:
                        try:
                            said = sock.recv(65536)
                            self.answers.append(int(said[9:12]) if said else None)
                        except OSError as error:
                            self.lost.append(repr(error))

        self.go(run)


def request(method, path, body=b"", *, content_type=FORM, **headers):
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    body = body.encode() if isinstance(body, str) else body
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode()
        + body
    )
