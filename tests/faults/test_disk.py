"""Disks that are full, read-only or broken, a database that others lock, no descriptors and no memory: what cannot be stored is
answered 503 and is not done, the rest goes on, and when the fault is gone the box is whole, without a restart."""

import concurrent.futures
import contextlib
import errno
import http.client
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import jwt
import pytest
from box import Box
from browser import CALLBACK
from crowd import await_true, pss, threads
from failing import DATABASE, LOG, OTHER, FailingBox
from ledger import PHRASE, SETTINGS, THRESHOLD, Line
from losing import Disk, RecordedBox, compile_layer, read_record
from appliance.base.database import LOCK_SECONDS, read_database_key
from appliance.base.store import Store

LONG = pytest.mark.long
UNTIL_WELL = 30  # seconds: it takes some two where nothing else runs
FAULTS = {
    "full": {"write": errno.ENOSPC},
    "over its quota": {"write": errno.EDQUOT},
    "read-only": {"write": errno.EROFS, "create": errno.EROFS},
    "writes fail": {"write": errno.EIO},
    "syncs fail": {"sync": errno.EIO},
}


class Stock:
    """What the clients of a box have in hand when a fault comes."""

    numbers = itertools.count()

    def __init__(self, box, many=3):
        self.box, self.line, self.bearer, self.prefix = box, Line(box), box.admin_token(), f"n{next(self.numbers)}"
        self.ids, self.made = {}, itertools.count()
        for name in ("ann", "bob", "cid"):
            answer = self.line.admin(
                "POST", "/users",
                {"username": self.name(name), "email": f"{self.name(name)}@example.org", "password": PHRASE},
                bearer=self.bearer,
            )
            assert answer.status == 200, answer
            self.ids[name] = answer.json["id"]
        uris = f"/clients/{box.client[0]}/redirect-uris"
        is_there = CALLBACK in str(self.line.admin("GET", uris, bearer=self.bearer).json)  # of an earlier stock
        added = self.line.admin("POST", uris, {"uri": CALLBACK}, bearer=self.bearer)
        assert added.status == (409 if is_there else 201), added
        self.refresh, self.to_end = ([self.log_in("ann").json["refresh_token"] for _ in range(many)] for _ in range(2))
        self.codes = [self.line.code(self.name("ann")) for _ in range(many)]
        self.machine = [box.token().json["access_token"] for _ in range(many)]
        self.living, self.person, self.dead = (
            box.token().json["access_token"], self.log_in("ann").json["access_token"],
            self.log_in("ann").json["access_token"],
        )
        assert self.line.auth("/revoke", {"token": self.dead}, client=box.client).status == 200

    def name(self, name):
        return f"{name}-{self.prefix}"

    def log_in(self, name, password=PHRASE):
        return self.line.log_in(self.name(name), password)

    def durable(self, number=0):
        """{name: ask} of what needs a durable write."""
        client, new = self.box.client, f"new{next(self.made)}-{self.prefix}"
        return {
            "refresh": lambda line: line.refresh(self.refresh[number]),
            "revoke a refresh token": lambda line: line.auth("/revoke", {"token": self.to_end[number]}, client=client),
            "exchange a code": lambda line: line.exchange(self.codes[number]),
            "revoke": lambda line: line.auth("/revoke", {"token": self.machine[number]}, client=client),
            "log in": lambda line: line.log_in(self.name("bob")),
            "log in at ADMIN": lambda line: line(
                self.box.admin_port, "POST", "/token",
                {"username": "root", "password": self.box.PASSWORD, "client_id": "test"},
            ),
            "make a user": lambda line: line.admin(
                "POST", "/users", {"username": new, "email": f"{new}@example.org", "password": PHRASE},
                bearer=self.bearer,
            ),
            "change a user": lambda line: line.admin(
                "POST", f"/users/{self.ids['cid']}/reset", {"new_password": PHRASE}, bearer=self.bearer
            ),
        }

    def keeps(self, line=None, is_locked=False):
        """What needs no write goes on, and says the truth. That a dead token was presented is written down, and waits for a lock."""
        line = line or self.line
        keys = jwt.PyJWKSet.from_json(line.auth("/jwks.json").body.decode())
        key = next(key for key in keys.keys if key.key_id == jwt.get_unverified_header(self.living)["kid"])
        assert jwt.decode(self.living, key, algorithms=["ES256"], audience="api")["client_id"] == self.box.client[0]
        assert line.auth("/.well-known/openid-configuration").json["token_endpoint"]
        assert line.is_active(self.living) and line.is_active(self.person)
        assert line.auth("/introspect", {"token": self.dead}, client=self.box.client).json == {"active": False}
        assert line.auth("/me", bearer=self.living).status == 200
        assert is_locked or line.auth("/me", bearer=self.dead).status == 401
        assert line.admin("GET", f"/users/{self.ids['ann']}", bearer=self.bearer).status == 200
        return True


def refused(answer, what=""):
    """It says in the form of its port that it cannot just now, and when to come again."""
    assert (
        answer.status == 503
        and answer.json["error"] == "temporarily_unavailable"
        and int(answer.headers["Retry-After"]) > 0
    ), (what, answer)
    return True


def done_or_refused(answer, what="", done=200):
    """Both are right where it depends on the process that answers, its memory and the room left whether a fault is met."""
    return answer.status == done or refused(answer, what)


def good(answer, what=""):
    assert answer.status == 200, (what, answer)
    return True


def ready(box):
    """What /health/ready of either port says, of as many processes as answer."""
    return {box.call(port, "GET", "/health/ready").status for port in (box.auth_port, box.admin_port) for _ in range(8)}


def open_store(box):
    path = str(box.folder / "mad.db3")
    return Store(path, read_database_key(path, "a database phrase", False))


def whole(box, stock):
    """The database is whole, the audit log unbroken, and every user has the row that says it was made."""
    with contextlib.closing(open_store(box)) as store:
        assert (
            store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            and not store.connection.execute("PRAGMA cipher_integrity_check").fetchall()
        )
        users = sorted(name for (name,) in store.connection.execute("SELECT username FROM account").fetchall())
        assert users == sorted(row.target for row in store.list_audit("user_created", 10_000))
    assert stock.line.admin("GET", "/audit-logs/verify", bearer=stock.bearer).json["valid"]
    return True


@contextlib.contextmanager
def outlived(box):
    """No process dies of what happens meanwhile, none says that it does not understand, and none keeps what it took for it."""
    pids = box.pids()
    (files, others), memory, said = held_by(pids), sum(map(pss, pids)), len(box.said())
    yield
    assert box.pids() == pids
    assert "Traceback" not in box.said()[said:], box.said()[said:]
    # How many threads come to open the database is up to the machine: each may have one connection, of two files.
    most = files + 60 + 2 * sum(map(threads, pids))
    await_true(
        lambda: held_by(pids)[0] < most and held_by(pids)[1] < others + 60, UNTIL_WELL, "descriptors are not given back"
    )
    assert sum(map(pss, pids)) < memory + 80_000


def held_by(pids):
    """How many descriptors these processes have: (of the database, of all else)."""
    names = []
    for pid in pids:
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    files = sum(".db3" in name for name in names)
    return files, len(names) - files


def well(box, stock, number=0):
    """Within seconds of the end of a fault everything works again, in every process and thread; what was refused is done now."""

    def healthy():
        with contextlib.suppress(OSError, http.client.HTTPException):
            return {box.token().status for _ in range(8)} == {200} and ready(box) == {200}

    await_true(healthy, UNTIL_WELL, "it does not recover")
    begun = time.monotonic()
    assert good(box.log_in(stock.name("ann")))
    pace = time.monotonic() - begun  # of one login, which is a hash: a machine that others use is slow, and not unwell
    end = time.monotonic() + UNTIL_WELL + 36 * pace
    for name, ask in stock.durable(number).items():
        assert good(ask(stock.line), name)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda number: (
                    box.log_in(stock.name("ann"))
                    if number % 2
                    else box.admin(
                        "POST", "/token", {"username": "root", "password": box.PASSWORD, "client_id": "test"}
                    )
                ),
                range(36),
            )
        )
    assert all(map(good, answers)) and time.monotonic() < end
    assert not stock.line.is_active(stock.machine[number]) and not stock.line.is_active(stock.to_end[number])
    assert stock.keeps() and whole(box, stock)
    return True


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    return compile_layer(tmp_path_factory.mktemp("layer"), "failing")


@pytest.fixture(scope="module")
def boxes(layer, tmp_path_factory):
    """One with two workers and one that is a single process, made when they are asked for."""
    with contextlib.ExitStack() as stack:
        made = {}

        def call(workers="2"):
            if workers not in made:
                made[workers] = stack.enter_context(
                    FailingBox(tmp_path_factory.mktemp("disk") / "data", layer, workers=workers, **SETTINGS)
                )
            return made[workers]

        yield call


class TestWrites:
    """SQLITE_FULL, SQLITE_READONLY, SQLITE_IOERR"""

    @pytest.mark.parametrize(
        "workers, fault",
        [
            pytest.param(
                workers, fault,
                marks=() if workers == "2" and fault != "over its quota" or fault == "syncs fail" else LONG,
            )
            for workers in ("2", "0")
            for fault in FAULTS
        ],
    )
    def test_what_cannot_be_stored_is_refused_and_not_done(self, boxes, workers, fault):
        box = boxes(workers)
        stock = Stock(box)
        with outlived(box):
            with box.faults.on(**FAULTS[fault]):
                for _ in range(3):  # by other processes and threads
                    for name, ask in stock.durable().items():
                        assert refused(ask(Line(box)), name)
                for _ in range(THRESHOLD + 1):
                    assert refused(stock.log_in("bob", "not the horse"))
                assert all(stock.keeps(Line(box)) for _ in range(3))
                for _ in range(20):
                    answer = box.token()
                    assert done_or_refused(answer)
                await_true(lambda: ready(box) == {503}, UNTIL_WELL, "it says that it is ready")
                assert box.faults["met"] > 10
                assert all(
                    stock.line.is_active(token) for token in (stock.refresh[0], stock.to_end[0], stock.machine[0])
                )
            assert well(box, stock)

    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_a_sync_that_fails_refuses_all_whose_changes_it_was_for(self, boxes, workers):
        box = boxes(workers)
        stock = Stock(box, many=40)
        lines = [Line(box) for _ in stock.refresh]
        with outlived(box), concurrent.futures.ThreadPoolExecutor(len(lines)) as pool:

            def refresh_all():
                return list(pool.map(Line.refresh, lines, stock.refresh))

            with box.faults.on(sync=errno.EIO):
                assert all(map(refused, refresh_all()))
            await_true(lambda: ready(box) == {200} and good(stock.log_in("bob")), UNTIL_WELL, "it does not recover")
            assert all(map(good, refresh_all())), "what was refused was not done"
            assert {answer.status for answer in refresh_all()} == {400}, "each is spent once"
            assert well(box, stock := Stock(box))

    def test_a_write_that_failed_in_one_process_is_known_to_all(self, boxes):
        box = boxes()
        stock = Stock(box)
        assert all(good(box.log_in(stock.name("ann"))) for _ in range(12))  # no probe has to write
        time.sleep(0.1)  # nor a batch
        with outlived(box):
            with box.faults.on(write=errno.ENOSPC):
                assert refused(stock.durable()["make a user"](stock.line))
                await_true(lambda: ready(box) == {503}, UNTIL_WELL, "others say that they are ready")
            assert well(box, stock)

    def test_whatever_room_is_left_nothing_is_half_done(self, boxes):
        """The disk is full in the middle of whatever it is: it was done, or it was not and works when there is room."""
        # What is put last is room for a checkpoint too, which may fall into any of these moments.
        rooms = [0, 24, 4000, 4120, 8240, 12360, 16480, 20600, 24720, 28840, 40000, 80000, 400000, 40_000_000]
        box = boxes()
        stock, done = Stock(box, many=len(rooms) + 1), {}
        with outlived(box):
            for number, room in enumerate(rooms):
                for name, ask in stock.durable(number).items():
                    with box.faults.on(write=errno.ENOSPC, room=room):
                        answer = ask(stock.line)
                        done.setdefault(name, []).append(answer.status)
                        assert done_or_refused(answer, name)
                    if answer.status != 200:
                        assert good(ask(stock.line), (name, room))
            assert well(box, stock, len(rooms))
        wrong = {name: found for name, found in done.items() if (found[0], found[-1]) != (503, 200)}
        assert not wrong, wrong

    def test_reads_that_fail_open_nothing(self, boxes):
        """What memory has goes on; nobody is told that a dead token lives, and no connection stays blind."""
        box = boxes()
        stock = Stock(box)
        with outlived(box):
            with box.faults.on(read=errno.EIO, files=DATABASE):
                for _ in range(4):
                    line = Line(box)
                    assert (
                        line.auth("/jwks.json").status == 200
                        and line.auth("/.well-known/openid-configuration").status == 200
                    )
                    answer = line.auth("/introspect", {"token": stock.dead}, client=box.client)
                    assert done_or_refused(answer) and (answer.status != 200 or answer.json == {"active": False})
                    answer = line.auth("/me", bearer=stock.dead)
                    assert done_or_refused(answer, done=401)
                answers = {name: ask(Line(box)) for name, ask in stock.durable(0).items()}
                answers |= {f"{name} {number}": box.token() for name in "ab" for number in range(12)}
                assert all(done_or_refused(answer, name) for name, answer in answers.items())
                assert box.faults["met"]
            assert well(box, stock, 1)

    def test_what_is_opened_while_the_disk_is_read_only_can_be_written_afterwards(self, layer, tmp_path):
        """SQLite opens for reading what it cannot open for writing, and stays at that."""
        with FailingBox(tmp_path / "data", layer, workers="2", **SETTINGS) as box:
            line, bearer = Line(box), box.admin_token()
            assert (
                line.admin(
                    "POST", "/users", {"username": "ann", "email": "ann@example.org", "password": PHRASE}, bearer=bearer
                ).status
                == 200
            )
            with outlived(box):
                with box.faults.on(**FAULTS["read-only"]), concurrent.futures.ThreadPoolExecutor(16) as pool:
                    assert all(map(refused, pool.map(lambda _: box.log_in("ann"), range(64))))
                await_true(lambda: box.log_in("ann").status == 200, UNTIL_WELL, "it does not recover")
                await_true(lambda: ready(box) == {200}, UNTIL_WELL, "it does not recover")
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    assert all(map(good, pool.map(lambda _: box.log_in("ann"), range(64))))


@pytest.fixture
def small(tmp_path):
    """A disk of six megabytes that is really one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("nothing can be mounted here: only the disks of the layer are tested")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class TestMounted:
    """The same of a disk that is really full. One that is written to cannot be made read-only, so that is up to the layer."""

    def test_what_cannot_be_stored_is_refused_and_not_done(self, small, tmp_path):
        with Box(tmp_path / "data", db_file=small / "mad.db3", workers="2", **SETTINGS) as box:
            stock = Stock(box)
            with outlived(box):
                with contextlib.suppress(OSError), open(small / "filler", "wb", buffering=0) as filler:
                    while filler.write(bytes(4096)):
                        pass
                # The log is written over where it has room of its own; then it needs more.
                assert any(box.log_in(stock.name("ann")).status == 503 for _ in range(1000))
                answers = {name: ask(Line(box)) for name, ask in stock.durable().items()}
                assert all(done_or_refused(answer, name) for name, answer in answers.items())
                assert stock.keeps(Line(box))
                await_true(lambda: ready(box) == {503}, UNTIL_WELL, "it says that it is ready")
                (small / "filler").unlink()
                await_true(lambda: ready(box) == {200}, UNTIL_WELL, "it does not recover")
                assert all(
                    good(ask(stock.line), name) for name, ask in stock.durable().items() if answers[name].status == 503
                )
                assert all(good(ask(stock.line), name) for name, ask in stock.durable(1).items()) and stock.keeps()


class GateBox(RecordedBox):
    """A box that is recorded, on a machine that fails. The layer that fails stands in front: a sync that failed is none."""

    def __init__(self, folder, layers, record, **settings):
        super().__init__(folder, layers[1], record, **settings)
        failing = FailingBox(folder, layers[0])
        self.faults, self.environ = (
            failing.faults, failing.environ | self.environ | {"LD_PRELOAD": " ".join(map(str, layers))},
        )


class TestSync:
    """What a sync has failed to write counts as clean: no later sync writes it. https://www.usenix.org/conference/atc20/presentation/rebello"""

    def test_what_is_acknowledged_after_a_sync_has_failed_survives_a_power_cut(self, layer, tmp_path):
        box = GateBox(tmp_path / "data", (layer, compile_layer(tmp_path)), tmp_path / "record", workers="2", **SETTINGS)
        with box:
            stock = Stock(box)
            for number in range(30):  # written and never synced: what stands before all that comes
                assert box.token().status == 200
                time.sleep(0.03 if number % 10 == 0 else 0)
            time.sleep(0.1)
            with box.faults.on(sync=errno.EIO):
                for name, ask in stock.durable(0).items():
                    assert refused(ask(stock.line), name)
                thrown = box.mark()
            names, end = [], time.monotonic() + UNTIL_WELL
            while len(names) < 5:
                name = f"after{len(names)}-{random.randrange(10**9)}"
                answer = stock.line.admin(
                    "POST", "/users", {"username": name, "email": f"{name}@example.org", "password": PHRASE},
                    bearer=stock.bearer,
                )
                assert done_or_refused(answer) and time.monotonic() < end
                names += [name] * (answer.status == 200)
            assert good(stock.line.auth("/revoke", {"token": stock.machine[1]}, client=box.client))
            spent = stock.line.refresh(stock.refresh[1])
            assert good(spent)
            os.killpg(box.process.pid, signal.SIGKILL)
            box.process.wait(60)
        disk, is_lost = Disk(box.folder, box.base), False
        for entry in read_record(box.record):
            if entry.end > thrown and not is_lost:
                for file in {id(file): file for file in (*disk.names.values(), *disk.files.values())}.values():
                    file.done = [it for it in file.done if it[0] <= file.synced]
                is_lost = True
            disk.apply(entry)
        assert is_lost
        box.folder.rename(tmp_path / "before")
        disk.cut(random.Random(0), box.folder, keep=0)
        again = Box(box.folder, **box.settings)
        again.settings, again.client, again.auth_port, again.admin_port = (
            box.settings, box.client, box.auth_port, box.admin_port,
        )
        again.start()
        try:
            stock.box, stock.line = again, Line(again)
            with contextlib.closing(open_store(again)) as store:
                users = {name for (name,) in store.connection.execute("SELECT username FROM account").fetchall()}
            assert set(names) <= users, "what was acknowledged is lost"
            assert not stock.line.is_active(stock.machine[1])
            assert stock.line.refresh(spent.json["refresh_token"]).status == 200 and whole(again, stock)
        finally:
            again.__exit__()


class TestLock:
    @pytest.mark.parametrize(
        "workers, seconds", [("2", 7), ("0", 7), pytest.param("2", 30, marks=LONG), pytest.param("0", 30, marks=LONG)]
    )
    def test_a_database_that_others_lock_keeps_only_writers_waiting(self, boxes, workers, seconds):
        box = boxes(workers)
        stock = Stock(box, many=4)
        with (
            outlived(box), contextlib.closing(open_store(box)) as store,
            concurrent.futures.ThreadPoolExecutor(40) as pool,
        ):
            store.connection.execute("BEGIN EXCLUSIVE")
            began = time.monotonic()

            def ask(name, ask):
                at = time.monotonic()
                return name, ask(Line(box)), time.monotonic() - at

            asked = [pool.submit(ask, name, one) for number in range(3) for name, one in stock.durable(number).items()]
            slowest = 0
            while time.monotonic() < began + max(seconds, 60 * (sum(one.done() for one in asked) < 24)):
                at = time.monotonic()
                assert stock.keeps(Line(box), is_locked=True)
                slowest = max(slowest, time.monotonic() - at)
                if all(one.done() for one in asked):
                    asked += [pool.submit(ask, "again " + name, one) for name, one in stock.durable(0).items()]
                time.sleep(0.1)
            said = [one.result() for one in asked if one.done()]
            store.connection.execute("ROLLBACK")
            assert len(said) >= 24 and all(refused(answer, name) for name, answer, _ in said)
            # Two that wait one after the other take twice LOCK_SECONDS; a reader that waits for a writer takes it once.
            spare = 1 if seconds > 20 else 4  # the long run measures, with nothing beside it
            assert max(took for _, _, took in said) < LOCK_SECONDS + 4 * spare, "one waits for all"
            assert slowest < min(2 * spare, LOCK_SECONDS), "readers wait"
            concurrent.futures.wait(asked)
            assert well(box, stock, 3)


class TestPlace:
    """What goes into a file that has lost its name is gone at the next start."""

    @pytest.mark.parametrize(
        "workers, name",
        [("2", "mad.db3"), ("2", "mad.db3-wal"), ("2", "mad.db3-shm"), ("0", "mad.db3"), ("0", "mad.db3-shm")],
    )
    def test_a_database_that_was_moved_takes_no_more_changes(self, boxes, workers, name):
        box = boxes(workers)
        stock, path = Stock(box), box.folder / name
        with outlived(box):
            path.rename(path.with_name("aside"))
            try:
                for _ in range(3):
                    for what, ask in stock.durable().items():
                        assert refused(ask(Line(box)), what)
                assert stock.line.auth("/jwks.json").status == 200
                await_true(lambda: ready(box) == {503}, UNTIL_WELL, "it says that it is ready")
            finally:
                path.with_name("aside").rename(path)
            assert well(box, stock)

    @pytest.mark.parametrize("name", ["mad.db3", "mad.db3-wal", "mad.db3-shm"])
    def test_nor_does_one_that_was_replaced(self, boxes, name):
        box = boxes()
        stock, path = Stock(box), box.folder / name
        with outlived(box):
            path.rename(path.with_name("aside"))
            shutil.copy(path.with_name("aside"), path)
            assert all(refused(ask(Line(box)), what) for what, ask in stock.durable().items())
            path.with_name("aside").rename(path)
            assert well(box, stock)


    @pytest.mark.parametrize(
        "again, name",
        [
            (False, "mad.db3"), (True, "mad.db3"), (True, "mad.db3-wal"), pytest.param(False, "mad.db3-wal", marks=LONG),
            *(pytest.param(again, "mad.db3-shm", marks=LONG) for again in (False, True)),
        ],
    )
    def test_a_process_that_begins_meanwhile_opens_nothing_else(self, layer, tmp_path, name, again):
        """With an index of its own, one process would write over what the others acknowledged."""
        with FailingBox(tmp_path / "data", layer, workers="2", **SETTINGS) as box:
            stock, path = Stock(box), box.folder / name
            path.rename(path.with_name("aside"))
            if again:
                shutil.copy(path.with_name("aside"), path)
            pids = box.pids()
            for pid in (pids[1], pids[3]):
                os.kill(pid, signal.SIGKILL)
            await_true(lambda: len(set(box.pids()) - set(pids)) == 2, UNTIL_WELL, "nobody is in their place")
            for _ in range(12):
                line = Line(box)
                assert refused(line.log_in(stock.name("ann")))
                assert line.auth("/jwks.json").status == line.auth("/.well-known/openid-configuration").status == 200
            await_true(lambda: ready(box) == {503}, UNTIL_WELL, "some say that they are ready")
            assert again or name == "mad.db3-wal" or not path.exists()
            path.with_name("aside").rename(path)
            stock.line = Line(box)
            assert well(box, stock)

    def test_who_begins_after_all_have_ended_opens_what_is_there(self, tmp_path):
        """As at a start: the log that a kill left is taken in."""
        with Box(tmp_path / "data", workers="1") as box:
            box.new_user("ann")
            refresh = box.log_in("ann")
            (box.folder / "mad.db3-shm").unlink()
            for pid in box.pids()[1:]:
                os.kill(pid, signal.SIGSTOP)
            for pid in box.pids()[1:]:
                os.kill(pid, signal.SIGKILL)
            await_true(lambda: ready(box) == {200}, UNTIL_WELL, "it does not recover")
            assert refresh.status == box.log_in("ann").status == 200


class TestMachine:
    @pytest.mark.parametrize("which", [1, 3], ids=["AUTH", "ADMIN"])
    def test_a_process_that_begins_on_a_disk_that_cannot_be_read_serves_what_it_can(self, tmp_path, layer, which):
        with FailingBox(tmp_path / "data", layer, workers="2", **SETTINGS) as box:
            stock, pids = Stock(box), box.pids()
            with box.faults.on(read=errno.EIO, files=DATABASE):
                os.kill(pids[which], signal.SIGKILL)
                await_true(lambda: set(box.pids()) - set(pids), UNTIL_WELL, "nobody is in its place")
                now = box.pids()
                for _ in range(12):
                    line = Line(box)
                    assert line.auth("/jwks.json").status == line.admin("GET", "/ping").status == 200
                    answer = line.log_in(stock.name("ann"))
                    assert done_or_refused(answer)
                await_true(lambda: "store.unwritable" in box.said(), UNTIL_WELL, "nobody says why")
            assert box.pids() == now
            stock.line = Line(box)  # what it held to the one that died has ended
            assert well(box, stock)

    @pytest.mark.parametrize(
        "error",
        [errno.ENFILE, errno.ENOMEM, pytest.param(errno.EMFILE, marks=LONG), pytest.param(errno.ENOBUFS, marks=LONG)],
    )
    def test_connections_that_cannot_be_accepted_wait(self, boxes, error):
        box = boxes()
        stock, line = Stock(box), Line(box)
        assert line.auth("/jwks.json").status == line.admin("GET", "/ping").status == 200
        with outlived(box), concurrent.futures.ThreadPoolExecutor(20) as pool:
            with box.faults.on(accept=error):
                waiting = [pool.submit(box.token) for _ in range(20)]
                spent = sum(map(cpu, box.pids()))
                time.sleep(1)
                assert not any(one.done() for one in waiting) and box.faults["met"]
                assert (
                    line.auth("/jwks.json").status
                    == line.refresh(stock.refresh[0]).status
                    == line.admin("GET", "/users", bearer=stock.bearer).status
                    == 200
                )
                assert sum(map(cpu, box.pids())) - spent < 0.5, "it spins"
            assert all(good(one.result()) for one in waiting)
            assert well(box, stock, 1)

    @pytest.mark.parametrize("which", [1, 3], ids=["AUTH", "ADMIN"])
    def test_a_process_that_cannot_be_replaced_yet_is_replaced_later(self, tmp_path, layer, which):
        with FailingBox(tmp_path / "data", layer, workers="2", **SETTINGS) as box:
            stock, pids = Stock(box), box.pids()
            with box.faults.on(fork=errno.EAGAIN):
                os.kill(pids[which], signal.SIGKILL)
                await_true(lambda: box.faults["met"] > 10, UNTIL_WELL, "no fork is tried")
                assert len(box.pids()) == 3 and box.process.poll() is None
                for _ in range(24 if which == 1 else 0):  # nobody waits for it
                    assert box.call(box.auth_port, "GET", "/ping", timeout=UNTIL_WELL).status == 200
            await_true(lambda: len(box.pids()) == 4, UNTIL_WELL, "it stays away")
            assert box.log().count("worker.owed") == 1
            stock.line = Line(box)  # what it held to the one that died has ended
            assert well(box, stock)

    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_without_descriptors_who_is_connected_goes_on(self, boxes, workers):
        box = boxes(workers)
        stock, lines = Stock(box), [Line(box) for _ in range(6)]
        assert all(line.auth("/jwks.json").status == line.admin("GET", "/ping").status == 200 for line in lines)
        time.sleep(0.1)
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in box.pids()}
        with outlived(box), concurrent.futures.ThreadPoolExecutor(20) as pool:
            try:
                for pid, (_, hard) in limits.items():
                    resource.prlimit(
                        pid, resource.RLIMIT_NOFILE,
                        (max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1, hard),
                    )
                    fill(pid)
                waiting = [pool.submit(box.token) for _ in range(20)]
                time.sleep(0.7)
                for line in lines:
                    assert (
                        line.auth("/jwks.json").status == 200
                        and line.is_active(stock.living)
                        and not line.is_active(stock.dead)
                    )
                    for number, name in ((0, "log in"), (0, "make a user")):
                        answer = stock.durable(number)[name](line)
                        assert done_or_refused(answer, name)
            finally:
                for pid, limit in limits.items():
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
            assert all(good(one.result()) for one in waiting)
            assert well(box, stock, 1)

    def test_without_memory_to_hash_a_login_is_refused_and_not_counted(self, boxes):
        box = boxes()
        stock = Stock(box)
        with outlived(box):
            with box.faults.on(memory=8 << 20):  # what one hash takes here
                for _ in range(2 * THRESHOLD):
                    assert refused(stock.log_in("bob", "not the horse"))
                    assert refused(stock.line.log_in("nobody at all"))
                assert refused(stock.log_in("bob"))
                assert refused(
                    stock.line.token({"grant_type": "client_credentials"}, client=(box.client[0], "another secret"))
                )
                assert refused(stock.durable()["make a user"](stock.line))
                assert all(good(box.token()) for _ in range(16))
                assert good(stock.line.refresh(stock.refresh[1])) and stock.keeps() and ready(box) == {200}
                assert box.faults["met"]
            assert good(stock.log_in("bob"))  # nothing was counted, so it is not locked
            assert well(box, stock)

    def test_without_memory_for_threads_answers_are_503_at_worst(self, boxes):
        box = boxes()
        stock = Stock(box)
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_AS) for pid in box.pids()}
        with outlived(box):
            try:
                for pid in box.pids()[1:]:
                    size = next(int(row.split()[1]) for row in open(f"/proc/{pid}/status") if row.startswith("VmSize"))
                    resource.prlimit(pid, resource.RLIMIT_AS, (1024 * size + (4 << 20), limits[pid][1]))
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    asks = [one for number in range(2) for one in stock.durable(number).items()]
                    answers = list(pool.map(lambda named: (named[0], named[1](Line(box))), asks))
                    assert all(done_or_refused(answer, name) for name, answer in answers)
                    assert all(
                        done_or_refused(answer, done=403)
                        for answer in pool.map(lambda number: box.log_in(f"nobody{number}"), range(32))
                    )
            finally:
                for pid, limit in limits.items():
                    resource.prlimit(pid, resource.RLIMIT_AS, limit)
            assert well(box, stock, 2)

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
    def test_a_log_that_cannot_be_written_stops_nobody(self, boxes, error):
        box = boxes()
        stock = Stock(box)
        with outlived(box):
            with box.faults.on(write=error, files=LOG):
                for name, ask in stock.durable(0).items():
                    assert good(ask(stock.line), name)
                assert stock.log_in("ann", "not the horse").status == 403 and stock.keeps() and ready(box) == {200}
                assert box.faults["met"]
                before = len(box.log())
            assert stock.line.auth("/me", bearer=stock.dead).status == 401
            await_true(lambda: len(box.log()) > before, UNTIL_WELL, "nothing is logged any more")
            assert well(box, stock, 1)


def cpu(pid):
    """Seconds of processor time a process has taken."""
    words = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def fill(pid):
    """Lower the limit below every number that is free, so that none can be taken."""
    used, (soft, hard) = (
        {int(name) for name in os.listdir(f"/proc/{pid}/fd")}, resource.prlimit(pid, resource.RLIMIT_NOFILE),
    )
    resource.prlimit(
        pid, resource.RLIMIT_NOFILE, (next(number for number in itertools.count() if number not in used), hard)
    )


ALL = DATABASE | LOG | OTHER
PASSING = (".lock", ".log", "-shm", "output.txt", "answers.toml")  # hold nothing


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.endswith(PASSING)
        and not (path.name.endswith("-wal") and path.stat().st_size == 0)
    }


def sentence(done, *words):
    """A command ended with one sentence that has these words, and status 1."""
    assert (
        done.returncode == 1
        and done.stderr.startswith("microauthd: ")
        and done.stderr.count("\n") == 1
        and "Traceback" not in done.stdout
    ), (done.returncode, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr
    return True


class TestCommands:
    """What is done at the machine is done, or it is not and says why."""

    @pytest.mark.parametrize(
        "fault",
        [
            {"write": errno.ENOSPC}, {"write": errno.ENOSPC, "room": 9000}, FAULTS["read-only"],
            pytest.param({"write": errno.EIO}, marks=LONG), pytest.param({"sync": errno.EIO}, marks=LONG),
            *(
                pytest.param({"write": errno.ENOSPC, "room": room}, marks=LONG)
                for room in (100, 3000, 6000, 12000, 50_000, 100_000, 200_000, 300_000)
            ),
        ],
    )
    def test_a_set_up_that_cannot_be_stored_leaves_nothing(self, layer, tmp_path, fault):
        box = FailingBox(tmp_path / "data", layer)
        fault = {"files": ALL} | fault
        real, before = box.run, {}

        def run(*words, **more):
            before.update(files_of(box.folder))
            with box.faults.on(**fault):
                done = real(*words, **more)
            assert box.faults["met"] or done.returncode == 0
            return done

        box.run = run
        try:
            box.set_up()
        except AssertionError as error:
            assert (
                str(error).startswith("microauthd: ")
                and str(error).partition("\nassert")[0].count("\n") <= 1
                and "Traceback" not in str(error)
            ), error
            assert files_of(box.folder) == before
        else:
            assert fault.get("room", 0) > 200_000
            return
        box.run = real
        with started(box.set_up()):
            assert box.token().status == 200

    @pytest.mark.parametrize("files", [ALL, DATABASE, LOG])
    def test_a_start_that_cannot_write_is_one_sentence_or_serves(self, layer, tmp_path, files):
        """Where the database alone is read-only, there is still somebody who verifies tokens."""
        box = FailingBox(tmp_path / "data", layer, workers="2").set_up()
        before = files_of(box.folder)
        for name in ("full", "read-only"):
            with box.faults.on(files=files, **FAULTS[name]):
                if files == ALL:
                    assert sentence(box.run("serve"), "mad.db3") and files_of(box.folder) == before
                    continue
                box.start(wait=False)
                try:
                    await_true(
                        lambda: answers(box, "/jwks.json") == 200 or box.process.poll() is not None, UNTIL_WELL,
                        "it neither serves nor ends",
                    )
                    if files == LOG:
                        assert good(box.token()) and answers(box, "/health/ready") == 200
                    else:  # it ends, or it serves and refuses: that depends on what it reads first
                        assert (
                            box.process.poll() == 1
                            and box.said().startswith("microauthd: ")
                            and "db-pass" not in box.said()
                            and files_of(box.folder) == before
                            or refused(
                                box.auth(
                                    "/revoke", {"token": box.token().json.get("access_token", "x")}, client=box.client
                                )
                            )
                        )
                finally:
                    if box.process.poll() is None:
                        assert box.stop() == 0
                assert "Traceback" not in box.said()
        with started(box):
            assert good(box.token())

    @pytest.mark.parametrize(
        "what, names",
        [(("backup", "box.backup"), {"box.backup"}), (("keys", "rotate"), {"token.pem", "admin_token.pem"})],
    )
    def test_a_command_on_a_failing_disk_leaves_what_was(self, layer, tmp_path, what, names):
        box = FailingBox(tmp_path / "data", layer).set_up()
        failed = 0
        for files in (OTHER, DATABASE):
            between = 2 * (box.folder / "token.pem").stat().st_size + 150  # one ring, and not the other
            for fault in (
                {"write": errno.ENOSPC}, {"write": errno.ENOSPC, "room": 700}, {"write": errno.ENOSPC, "room": between},
                FAULTS["read-only"], FAULTS["syncs fail"], FAULTS["writes fail"],
            ):
                if names == {"box.backup"} and fault.get("room"):
                    fault = {**fault, "room": 50 * fault["room"]}
                before = files_of(box.folder)
                with box.faults.on(files=files, **fault):
                    done = box.run(*what)
                assert done.returncode == 0 or sentence(done), (files, fault)
                after = files_of(box.folder)
                changed = {
                    name for name in {*before, *after} if before.get(name) != after.get(name) and ".db3" not in name
                }
                assert changed == (names if done.returncode == 0 else set()), (files, fault, changed, done.stderr)
                failed += done.returncode
                if done.returncode == 0:
                    break
        assert failed >= 4
        with started(box):
            assert box.token().status == 200

    def test_a_backup_over_ADMIN_on_a_failing_disk_leaves_nothing(self, boxes):
        box = boxes()
        stock = Stock(box)
        with outlived(box):
            for files in (OTHER, DATABASE):
                for fault in ({"write": errno.ENOSPC}, {"write": errno.ENOSPC, "room": 200_000}, FAULTS["syncs fail"]):
                    with box.faults.on(files=files, **fault):
                        answer = stock.line.admin("POST", "/backup", {}, bearer=stock.bearer)
                        assert answer.status == 200 and files == DATABASE and fault.get("room") or refused(answer)
                    if answer.status == 200:
                        assert (
                            stock.line.admin("DELETE", "/backup/" + answer.json["name"], bearer=stock.bearer).status
                            == 200
                        )
                    assert not list(box.folder.glob("backups/*"))
            assert well(box, stock)


@contextlib.contextmanager
def started(box):
    try:
        yield box.start()
    finally:
        box.__exit__()


def answers(box, path):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return box.auth(path).status
    return None
