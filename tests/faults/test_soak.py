"""An hour of everything at half the rate that is possible: nothing grows, nothing fails."""

import itertools
import json
import os
import random
import statistics
import threading
import time

import pytest
from box import Box
from crowd import Patron, await_true, basic, descriptors, pss, threads

LONG = pytest.mark.long
PHRASE = "correct horse battery"
WAL = 64 << 20  # a checkpoint comes every 1,000 pages of 4 KiB; readers may hold one up


class Mixed(Patron):
    """One of everything in turn, mostly tokens of machines; `rate` rounds a second, as fast as it can without."""

    def __init__(self, box, number, rate=None):
        super().__init__(box, pause=0)
        self.own, self.rate, self.number = basic(box.client), rate, number
        self.dice, self.refresh, self.machine, self.rounds = random.Random(number), "", "", itertools.count()
        self.done = 0

    def once(self):
        if self.rate:
            self.ending.wait(max(0, self.began + self.done / self.rate - time.monotonic()))
        if not self.dice.randrange(400):
            self.drop()  # clients come and go
            self.connection = self.connect()
        self.done += 1
        lot = self.dice.random()
        if lot < 0.55 or not self.machine:
            self.machine = json.loads(self.token(grant_type="client_credentials"))["access_token"]
        elif lot < 0.70:
            assert json.loads(self.ask("POST", "/introspect", {"token": self.machine}, authorization=self.own))[
                "active"
            ]
        elif lot < 0.85:
            self.rotate()
        elif lot < 0.90:
            self.ask(
                "GET", self.dice.choice(["/.well-known/openid-configuration", "/jwks.json", "/ping", "/health/ready"])
            )
        elif lot < 0.95:
            self.ask("GET", "/me", authorization=f"Bearer {self.machine}")
        elif lot < 0.99:
            self.ask("POST", "/revoke", {"token": self.machine}, authorization=self.own)
            assert not json.loads(self.ask("POST", "/introspect", {"token": self.machine}, authorization=self.own))[
                "active"
            ]
            self.machine = ""
        else:
            self.refresh = ""  # this one logs out by forgetting

    def token(self, **form):
        return self.ask("POST", "/token", form, authorization=self.own)

    def rotate(self):
        """A chain of refresh tokens, begun by a login; after some tens of links a new one."""
        grant = (
            {"grant_type": "refresh_token", "refresh_token": self.refresh}
            if self.refresh
            else {"grant_type": "password", "username": f"user{self.number}", "password": PHRASE}
        )
        self.refresh = json.loads(self.token(**grant))["refresh_token"]

    def run(self):
        self.began = time.monotonic()
        super().run()


class Changes(Patron):
    """Administrative changes, which also make every worker forget what it remembers of accounts and clients."""

    def __init__(self, box):
        super().__init__(box, port=box.admin_port, pause=0.1)
        self.bearer, self.count, self.until = "", itertools.count(), 0

    def once(self):
        if time.monotonic() > self.until:
            form = {"username": "root", "password": self.box.PASSWORD, "client_id": "test"}
            self.bearer, self.until = (
                "Bearer " + json.loads(self.ask("POST", "/token", form))["access_token"], time.monotonic() + 60,
            )
        name = f"guest{next(self.count)}"
        user = json.loads(
            self.ask(
                "POST", "/users", json_body={"username": name, "email": f"{name}@example.org", "password": PHRASE},
                authorization=self.bearer,
            )
        )
        self.ask("GET", "/users?limit=10", authorization=self.bearer)
        self.ask("GET", "/audit-logs?limit=10", authorization=self.bearer)
        self.ask("POST", f"/users/{user['id']}/deactivate", authorization=self.bearer)
        self.ending.wait(1)


def load(box, number, rate, seconds):
    """Run so many clients, at this rate together; how many rounds they did a second."""
    clients = [Mixed(box, one, rate and rate / number) for one in range(number)]
    for client in clients:
        client.start()
    time.sleep(seconds)
    for client in clients:
        client.ending.set()
    for client in clients:
        client.join()
    assert not any(client.bad for client in clients), [client.bad[:2] for client in clients]
    return sum(client.done for client in clients) / seconds


def sample(box):
    """(memory KiB, descriptors, threads) of each process, and the size of the write-ahead log."""
    wal = box.folder / "mad.db3-wal"
    return [(pss(pid), descriptors(pid), threads(pid)) for pid in box.pids()], wal.stat().st_size if wal.exists() else 0


@pytest.mark.parametrize(
    "seconds", [6, pytest.param(int(os.environ.get("SOAK_SECONDS", "3600")), marks=LONG, id="long")]
)
def test_nothing_grows_and_nothing_fails(tmp_path, seconds):
    clients = 8
    with Box(
        tmp_path / "data", workers="2", enable_token_refresh="true", token_expiration="60",
        refresh_token_expiration="120",
    ) as box:
        for number in range(clients):
            box.new_user(f"user{number}")
        calm, _ = sample(box)
        temporary = set(os.listdir("/tmp"))
        files = {path.name for path in box.folder.iterdir()}
        most = load(box, clients, None, 2)
        load(box, clients, most / 2, 1 if seconds < 60 else 60)  # caches are full, threads hired
        samples, ending = [], threading.Event()

        def watch():
            while not ending.wait(min(5, seconds / 40)):
                samples.append(sample(box))

        watching, changes = threading.Thread(target=watch), Changes(box)
        watching.start()
        changes.start()
        pids = box.pids()
        rate = load(box, clients, most / 2, seconds)
        ending.set()
        watching.join()
        changes.ending.set()
        changes.join()
        assert not changes.bad, changes.bad[:3]
        print(f"{most:.0f} rounds a second at most, {rate:.0f} for {seconds} s; first {samples[0]}, last {samples[-1]}")
        assert rate > most / 4
        assert box.pids() == pids, "a process was replaced"
        fifth = len(samples) // 5
        first, last = samples[:fifth], samples[-fifth:]
        for slot in range(len(pids)):
            memory, fds, running = (
                [statistics.median(one[0][slot][what] for one in part) for part in (first, last)] for what in range(3)
            )
            assert memory[1] < memory[0] * (1.2 if seconds >= 60 else 1.5), (slot, memory)
            assert fds[1] <= fds[0] + 4 and running[1] <= running[0] + 2, (slot, fds, running)
        assert max(wal for _, wal in samples) < WAL, max(wal for _, wal in samples)
        # With the load gone, its connections and what was hired for it are gone.
        await_true(
            lambda: all(found <= before + 2 for (_, _, found), (_, _, before) in zip(sample(box)[0], calm)), 5,
            "threads stay",
        )
        made = {path.name for path in box.folder.iterdir()} - files
        assert not {
            name
            for name in made
            if not name.endswith((".lock", "-wal", "-shm")) and not name.startswith(("microauthd.log", "output"))
        }, made
        assert not {name for name in set(os.listdir("/tmp")) - temporary if "microauthd" in name or "etilqs" in name}
        said = box.said()
        assert (
            "Traceback" not in said
            and "worker.died" not in said
            and "error" not in {word for line in said.splitlines() for word in line.split()[1:3]}
        ), said[-2000:]
