"""Processes: start, stop, kill -9, races. Against the built archive."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlencode

import pytest
from box import PROGRAM, Box, runs
from conftest import in_child, left, under_way
from appliance.base import StartupError
from appliance.base.clock import Timekeeper
from appliance.base.settings import Options
from appliance.base.database import read_database_key
from appliance.base.store import Store
from appliance.base.wire import Limits
from appliance.processes import (
    DESCRIPTORS_KEPT, LEAST_ADDRESS_SPACE, LEAST_CONNECTIONS, LEAST_DESCRIPTORS, LEAST_THREADS, LOCAL_DESCRIPTORS,
    MOST_CONNECTIONS, OTHER_DESCRIPTORS, THREAD_ADDRESS_SPACE, bind_local_socket, find_local_users, grant_connections,
    grant_threads, memory_bytes, remove_local_socket, start_clock,
)

REFRESH = {"grant_type": "refresh_token"}


@pytest.fixture
def box(tmp_path):
    with Box(tmp_path / "data", workers="2") as box:
        yield box


class Load:
    """Fetches machine tokens over kept connections until stopped; remembers what was not a 200."""

    def __init__(self, box, threads=4):
        self.box, self.bad, self.good, self.ending, self.stopping = box, [], 0, threading.Event(), False
        self.threads = [threading.Thread(target=self.run) for _ in range(threads)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        end = time.monotonic() + 60
        while self.good <= 100 and not self.bad:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def run(self):
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Authorization": "Basic " + b64encode(":".join(self.box.client).encode()).decode(),
        }
        connection, used = None, False
        while not self.ending.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.box.auth_port, timeout=60)
                    connection.connect()
                    used = False
            except OSError:
                return  # nobody listens any more
            try:
                connection.request("POST", "/token", "grant_type=client_credentials", headers)
                response = connection.getresponse()
                response.read()
                used = True
                if response.status == 200:
                    self.good += 1
                else:
                    self.bad.append(response.status)
                if response.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as error:
                # A connection that came while the port was closing was never accepted.
                if used or not self.stopping:
                    self.bad.append(repr(error))
                connection.close()
                connection = None


class TestStarting:
    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_closed_streams_are_opened_on_nothing(self, tmp_path, workers):
        """Else the database would be number 1 or 2, and what a library says there would be written into it."""
        box = Box(tmp_path / "data", workers=workers).set_up()
        box.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *PROGRAM, "serve"], cwd=box.folder, env=box.environ,
            start_new_session=True,
        )
        box.output = open(os.devnull)
        box.await_ready()
        for pid in box.pids():
            opened = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)}
            assert all(path == os.devnull or path.endswith("/.lock") for path in opened.values()), opened
        box.new_user("ann")
        assert box.log_in("ann").status == box.token().status == 200
        assert box.stop() == 0

    def test_secrets_of_the_environment_are_in_no_process_and_the_head_of_the_audit_log_in_the_log(self, tmp_path):
        box = Box(tmp_path / "data", workers="2").set_up()
        conf = box.folder / "mad.conf"
        conf.write_text(re.sub("(?m)^db-pass.*", "", conf.read_text()))
        box.environ |= {"MAD_DB_PASS": "a database phrase", "OTHER": "kept"}
        box.start()
        shown = [Path(f"/proc/{pid}/environ").read_bytes() for pid in box.pids()]
        assert len(shown) == 4 and all(b"OTHER=kept" in one and b"a database phrase" not in one for one in shown)
        box.token()
        assert box.stop() == 0
        store = Store(box.folder / "mad.db3", read_database_key(str(box.folder / "mad.db3"), "a database phrase", False))
        seq, digest = store.audit_head()
        store.close()
        lines = box.log().splitlines()
        assert f"audit.head seq={seq} rows={seq} head={digest}" in lines[-2] and " stopped" in lines[-1]

    def test_a_second_start_is_refused_with_the_pid(self, box):
        done = box.run("serve")
        assert done.returncode == 1 and str(box.process.pid) in done.stderr and box.token().status == 200

    def test_a_taken_port_is_a_sentence_and_nothing_serves(self, tmp_path):
        box = Box(tmp_path / "data").set_up()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", box.admin_port))
            taken.listen()
            done = box.run("serve")
        assert done.returncode == 1 and f"port {box.admin_port}" in done.stderr and done.stderr.count("\n") == 1
        with pytest.raises(OSError):
            box.token()

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_a_second_box_on_the_port_of_the_first_is_refused(self, box, tmp_path, workers):
        other = Box(tmp_path / "other", workers=workers).set_up()
        done = other.run("serve", MAD_AUTH_PORT=str(box.auth_port))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"port {box.auth_port}" in done.stderr and f"process {box.process.pid}" in done.stderr
        assert {box.token().status for _ in range(20)} == {200}

    def test_a_start_at_once_after_kill_9_waits_for_the_last_workers(self, box):
        for _ in range(3):
            os.kill(box.process.pid, signal.SIGKILL)
            box.process.wait(60)
            box.start()
        assert {box.token().status for _ in range(20)} == {200}

    @pytest.mark.parametrize(
        "case, word",
        [
            ("wrong passphrase", "db-pass"), ("flipped header", "damaged"), ("truncated", "truncated"),
            ("no key", "missing"), ("empty key", "empty or damaged"), ("no database", "missing"),
            ("no seal key", "seal key"), ("bad config", "mad.conf:1"),
        ],
    )
    def test_what_is_damaged_is_a_sentence_and_stays(self, tmp_path, case, word):
        box = Box(tmp_path / "data").set_up()
        database, key, seal, conf = (box.folder / name for name in ("mad.db3", "token.pem", "seal.key", "mad.conf"))
        if case == "wrong passphrase":
            conf.write_text(conf.read_text().replace("a database phrase", "another phrase"))
        elif case == "flipped header":
            content = bytearray(database.read_bytes())
            content[20] ^= 255
            database.write_bytes(content)
        elif case == "truncated":
            os.truncate(database, 100)
        elif case in ("no key", "empty key"):
            key.unlink() if case == "no key" else key.write_bytes(b"")
        elif case == "no database":
            database.unlink()
        elif case == "no seal key":
            seal.unlink()
        else:
            conf.write_text("auth-prot = 1\n")
        before = {
            path.name: path.read_bytes()
            for path in box.folder.iterdir()
            if path.is_file() and path.suffix in (".db3", ".pem", ".key", ".conf")
        }
        done = box.run("serve")
        assert (
            done.returncode == 1
            and word in done.stderr
            and "Traceback" not in done.stderr
            and done.stderr.count("\n") == 1
        ), done.stderr
        after = {
            path.name: path.read_bytes()
            for path in box.folder.iterdir()
            if path.is_file() and path.suffix in (".db3", ".pem", ".key", ".conf")
        }
        assert after == before

    def test_readable_secrets_are_repaired_with_a_warning(self, tmp_path):
        box = Box(tmp_path / "data").set_up()
        for name in ("mad.conf", "token.pem"):
            (box.folder / name).chmod(0o644)
        box.start()
        try:
            assert box.said().count("readable by others") >= 2
            assert all((box.folder / name).stat().st_mode & 0o077 == 0 for name in ("mad.conf", "token.pem"))
        finally:
            box.stop()

    @pytest.mark.parametrize("servers, most", [(1, 512), (2, 512), (2, LEAST_DESCRIPTORS), (1, LEAST_DESCRIPTORS)])
    def test_no_more_connections_than_descriptors(self, servers, most):

        def work():
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            limits = grant_connections(servers, 3)
            assert limits.connections == max(LEAST_CONNECTIONS, (most - DESCRIPTORS_KEPT) // servers)
            taken = servers * (limits.connections + 2 * grant_threads(servers, limits))
            assert taken <= most - LOCAL_DESCRIPTORS - OTHER_DESCRIPTORS

        assert in_child(work) == 0

    @pytest.mark.parametrize("megabytes, most", [
        (256, 4096), (2048, 7281), (8192, MOST_CONNECTIONS),
    ])  # fmt: skip
    def test_as_many_connections_as_a_quarter_of_the_memory_keeps(self, megabytes, most, monkeypatch):
        monkeypatch.setattr("appliance.processes.memory_bytes", lambda: megabytes << 20)
        monkeypatch.setattr(resource, "getrlimit", lambda limit: (1 << 20, 1 << 20))
        assert grant_connections(1, 3).connections == most

    def test_the_memory_is_that_of_the_control_group_if_that_has_less(self, tmp_path, monkeypatch):
        files = {
            "/proc/self/cgroup": "1:name=systemd:/\n0::/system.slice/microauthd.service\n",
            "/sys/fs/cgroup/system.slice/microauthd.service/memory.max": "max\n",
            "/sys/fs/cgroup/system.slice/memory.max": "67108864\n",
        }

        def read(path):
            if path not in files:
                raise FileNotFoundError(path)
            return io.StringIO(files[path])

        machine = memory_bytes()
        monkeypatch.setattr("builtins.open", read)
        assert memory_bytes() == 64 << 20
        files["/sys/fs/cgroup/system.slice/memory.max"] = "max\n"
        assert memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >= machine
        files["/sys/fs/cgroup/memory.max"] = "33554432\n"
        assert memory_bytes() == 32 << 20, "that of a container, whose path is its own root"

    @pytest.mark.parametrize("more", [0, 20])
    def test_no_more_threads_than_address_space(self, more):

        def work():
            space = LEAST_ADDRESS_SPACE + 2 * more * THREAD_ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            resource.setrlimit(resource.RLIMIT_AS, (space, space))
            assert grant_threads(2, Limits(connections=64)) == LEAST_THREADS + more

        assert in_child(work) == 0

    def test_a_start_that_has_to_guess_the_time_forgets_what_was_under_way(self, idp, alice, service, monkeypatch):
        under_way(idp, alice.id)
        idp.store.put_meta("clock", idp.now())
        monkeypatch.setattr(Timekeeper.__init__, "__defaults__", (lambda: 1000.0, None, None))
        assert start_clock(idp.store, idp.log).state == "guessed" and left(idp) == [0, 0]


class TestAtTheMachine:
    """The Unix socket of ADMIN."""

    def test_the_last_administrator_gets_in_whatever_a_local_program_tries(self, box):
        login = ("session", "login", "--username", "root", "--password-stdin")
        for _ in range(30):
            box.admin("POST", "/token", {"username": "root", "password": "wrong wrong"})
        right = {"username": "root", "password": box.PASSWORD}
        assert box.admin("POST", "/token", right).status == 429
        assert box.mad(*login, input=box.PASSWORD).returncode == 0
        assert box.mad(*login, input=box.PASSWORD, MAD_ADMIN_SOCKET="").returncode == 1
        assert box.kill()
        box.start()
        assert box.admin("POST", "/token", right).status == 403, "locked still"
        assert box.mad(*login, input=box.PASSWORD).returncode == 0
        rows = json.loads(box.mad("audit", "list", "--action", "admin_token_issued", "--json").stdout)
        assert {row["ip_address"] for row in rows} == {f"unix:uid={os.getuid()}"}
        assert box.stop() == 0 and not (box.folder / "admin.sock").exists()

    def test_a_guessing_crowd_holds_nobody_up(self, box):
        stop, login = threading.Event(), ("session", "login", "--username", "root", "--password-stdin")

        def guess():
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    box.admin("POST", "/token", {"username": "root", "password": "wrong wrong"})

        threads = [threading.Thread(target=guess) for _ in range(30)]
        for thread in threads:
            thread.start()
        try:
            entered = [box.mad(*login, input=box.PASSWORD).returncode for _ in range(3)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert entered == [0, 0, 0]

    def local(self, options, log):
        return bind_local_socket(options, frozenset(), lambda *words, **more: log.append(more))

    def test_it_lies_beside_the_database_or_in_the_folder_of_the_service(self, tmp_path, monkeypatch):
        (tmp_path / "run").mkdir()
        for users, mode in (("", 0o600), ("nobody", 0o666)):
            options = Options(db_file=str(tmp_path / "mad.db3"), admin_socket_users=users)
            for runtime, folder in (("", tmp_path), (f"{tmp_path}/run:/elsewhere", tmp_path / "run")):
                monkeypatch.setenv("RUNTIME_DIRECTORY", runtime)
                found = self.local(options, [])
                assert found.path == str(folder / "admin.sock")
                assert stat.S_IMODE(os.lstat(found.path).st_mode) == mode
                remove_local_socket(found)
                assert not os.path.exists(found.path)
                found.sock.close()

    def test_where_there_can_be_none_a_warning_says_why(self, tmp_path, monkeypatch):
        monkeypatch.setattr("appliance.processes.PORT_SECONDS", 0.1)
        log, options = [], Options(db_file=str(tmp_path / "mad.db3"))
        found = self.local(options, log)
        assert self.local(options, log) is None and "in use" in log[-1]["reason"]
        os.unlink(found.path)
        (tmp_path / "admin.sock").write_text("mine")
        assert self.local(options, log) is None and "no socket" in log[-1]["reason"]
        remove_local_socket(found)
        assert (tmp_path / "admin.sock").read_text() == "mine", "it is another's by now"
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "missing"))
        assert self.local(options, log) is None and log[-1]["path"] == f"{tmp_path}/missing/admin.sock"
        found.sock.close()

    def test_root_the_servers_user_and_those_named_are_at_the_machine(self):
        assert find_local_users(Options()) == {0, os.geteuid()}
        assert find_local_users(Options(admin_socket_users="root,4242")) == {0, os.geteuid(), 4242}
        with pytest.raises(StartupError, match="no user nobody-of-that-name"):
            find_local_users(Options(admin_socket_users="nobody-of-that-name"))


class TestStopping:
    def test_under_load_every_accepted_request_is_answered(self, box):
        with Load(box) as load:
            load.stopping = True
            assert box.stop() == 0, "no process had to be killed: each stops in time, or cuts off whom it serves"
        assert load.good > 100 and not load.bad
        listed = open_store(box)
        tokens = listed.connection.execute("SELECT count(*) FROM session WHERE user_id IS NULL").fetchone()[0]
        listed.close()
        assert tokens >= load.good, "every token that was answered is on the disk"

    def test_ctrl_c_ends_all_of_the_terminals_group(self, box):
        pids = box.pids()
        os.killpg(box.process.pid, signal.SIGINT)
        assert box.process.wait(30) == 0
        assert not any(map(runs, pids))


def open_store(box):
    path = str(box.folder / "mad.db3")
    return Store(path, read_database_key(path, "a database phrase", False))


class TestRefusals:
    def test_a_stop_writes_their_counts_and_kill_9_keeps_the_first_of_each_process(self, box):
        def refuse(count):
            for _ in range(count):
                answer = box.call(box.auth_port, "POST", "/token", {"grant_type": "x"}, client=box.client)
                assert answer.status == 400

        def told():
            store = open_store(box)
            rows = [row.secondary for row in store.list_audit("token_refused")]
            assert store.verify_audit()["valid"]
            store.close()
            return [int(row.partition(";count=")[2].partition(";")[0] or 1) for row in rows]

        refuse(40)
        assert box.stop() == 0
        before = told()
        assert sum(before) == 40 and 2 <= len(before) <= 4, "a first row and a count of each worker"
        box.start()
        refuse(40)
        box.kill()
        assert 1 <= len(told()) - len(before) <= 2 and set(told()[: -len(before)]) == {1}


class TestKilling:
    def test_a_worker_is_replaced_and_others_notice_nothing(self, box):
        with Load(box) as load:
            victim = box.pids()[1]
            os.kill(victim, signal.SIGKILL)
            end = time.monotonic() + 30
            while len(box.pids()) < 4 or victim in box.pids():
                assert time.monotonic() < end
                time.sleep(0.01)
            served, end = load.good, time.monotonic() + 60
            while load.good <= served + 100:
                assert time.monotonic() < end
                time.sleep(0.01)
        # Only what the victim had in hand can fail: at most one request a connection.
        assert len(load.bad) <= 4 and load.good > 100
        assert all(box.token().status == 200 for _ in range(20))

    def test_a_dead_supervisor_leaves_nobody_and_a_restart_works(self, box):
        assert box.kill() is True
        box.start()
        assert box.token().status == 200

    def test_what_was_acknowledged_survives(self, box):
        acknowledged, revoked, spent = [], [], []
        box.environ |= {"MAD_REFRESH_TOKEN_GRACE": "0"}  # from the next start on: a spent token is dead at once
        box.new_user("ann")
        for number in range(8):
            bearer = box.admin_token()
            stop = threading.Event()

            def change(bearer=bearer, stop=stop, number=number):
                count = 0
                while not stop.is_set():
                    with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                        name = f"user{number}x{count}"
                        count += 1
                        if (
                            box.admin(
                                "POST", "/users",
                                json_body={
                                    "username": name, "email": f"{name}@example.org",
                                    "password": "correct horse battery",
                                },
                                bearer=bearer,
                            ).status
                            == 200
                        ):
                            acknowledged.append(name)

            def turn(stop=stop):
                with contextlib.suppress(OSError, http.client.HTTPException, KeyError, ValueError):
                    token = box.log_in("ann").json["refresh_token"]
                    while not stop.is_set():
                        answer = box.auth("/token", REFRESH | {"refresh_token": token}, client=box.client)
                        if answer.status == 200:
                            spent.append(token)
                            token = answer.json["refresh_token"]
                        machine = box.token().json["access_token"]
                        if box.auth("/revoke", {"token": machine}, client=box.client).status == 200:
                            revoked.append(machine)

            threads = [threading.Thread(target=change), threading.Thread(target=turn)]
            for thread in threads:
                thread.start()
            time.sleep(0.15 + 0.05 * number)
            assert box.kill()
            stop.set()
            for thread in threads:
                thread.join()
            box.start()
        store = open_store(box)
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        created = {row.target for row in store.list_audit("user_created", 10_000)}
        assert len(acknowledged) > 20 and all(
            store.find_account_by_name(name) and name in created for name in acknowledged
        )
        store.close()
        assert len(revoked) > 10 and all(
            box.auth("/introspect", {"token": token}, client=box.client).json == {"active": False} for token in revoked
        )
        assert len(spent) > 10 and all(
            box.auth("/token", REFRESH | {"refresh_token": token}, client=box.client).status == 400
            for token in spent[-50:]
        )


class TestRaces:
    @pytest.mark.parametrize("rounds", [40, pytest.param(400, marks=pytest.mark.long)])
    @pytest.mark.parametrize("grace, beside", [(0, False), (30, False), (30, True)])
    def test_one_refresh_token_is_spent_once_by_two_processes(self, tmp_path, grace, beside, rounds):
        """Rounds of 32 at once. Without a grace one wins and the login ends; with one, all get its successor.

        If half of them present the successor, the login lives exactly if every retry came before its first use.
        """
        with (
            Box(tmp_path / "data", workers="2", max_login_failures="0", refresh_token_grace=str(grace)) as box,
            concurrent.futures.ThreadPoolExecutor(32) as pool,
        ):
            box.new_user("ann")
            local = threading.local()

            def ask(path, form):
                if not hasattr(local, "connection"):
                    local.connection = http.client.HTTPConnection("127.0.0.1", box.auth_port, timeout=60)
                body = urlencode(form | {"client_id": box.client[0], "client_secret": box.client[1]})
                local.connection.request("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded"})
                response = local.connection.getresponse()
                return response.status, json.loads(response.read())

            def spend(token):
                return ask("/token", REFRESH | {"refresh_token": token})

            def is_active(answer):
                return ask("/introspect", {"token": answer[1]["access_token"]})[1]["active"]

            token = box.log_in("ann").json["refresh_token"]
            for _ in range(rounds):
                if beside or not grace:
                    token = box.log_in("ann").json["refresh_token"]
                crowd = [token] * 32
                if beside:
                    crowd[1::2] = [spend(token)[1]["refresh_token"]] * 16
                answers = list(pool.map(spend, crowd))
                if beside:
                    assert {body["error"] for status, body in answers if status != 200} <= {"invalid_grant"}
                    good = [answer for answer in answers if answer[0] == 200]
                    assert set(map(is_active, good)) == {len(good) == 32}
                    for half in (0, 1):
                        successors = {body["refresh_token"] for status, body in answers[half::2] if status == 200}
                        assert len(successors) <= 1
                    continue
                if grace:
                    assert {status for status, _ in answers} == {200}, answers
                    assert len({body["access_token"] for _, body in answers}) == 32
                    assert all(pool.map(is_active, answers))
                    (token,) = {body["refresh_token"] for _, body in answers}
                    continue
                statuses = [status for status, _ in answers]
                assert statuses.count(200) == 1 and statuses.count(400) == 31, statuses
                (winner,) = [body for status, body in answers if status == 200]
                assert box.auth("/me", bearer=winner["access_token"]).status == 401, "its reuse ended the family"

    def test_the_same_name_is_made_once(self, box):
        bearer = box.admin_token()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            make = lambda _: (
                box.admin(
                    "POST", "/users",
                    json_body={"username": "twin", "email": "twin@example.org", "password": "correct horse battery"},
                    bearer=bearer,
                ).status
            )  # noqa: E731
            assert sorted(pool.map(make, range(8))) == [200] + [409] * 7

    def test_parallel_wrong_passwords_lock(self, box):
        box.new_user("ann")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            # Fewer than the throttle of a process lets pass for one name: it would answer before the lock does.
            statuses = list(pool.map(lambda _: box.log_in("ann", "wrong wrong").status, range(16)))
        assert set(statuses) <= {403, 429}
        assert box.log_in("ann").status == 403


class TestOneProcess:
    def test_workers_0_does_all_of_it(self, tmp_path):
        with Box(tmp_path / "data", workers="0", log_format="json") as box:
            assert len(box.pids()) == 1
            box.new_user("ann")
            assert box.token().status == box.log_in("ann").status == 200
            assert box.auth("/nowhere").status == 404
            box.auth("/me")
            assert box.stop() == 0
            lines = [json.loads(line) for line in box.log().splitlines()]
            assert {"serving", "stopped", "refused"} <= {line["event"] for line in lines} and all(
                line["at"].endswith("Z") for line in lines
            )


class TestTrouble:
    def test_a_full_disk_is_a_503_and_heals(self, tmp_path):
        folder = tmp_path / "small"
        folder.mkdir()
        if (
            os.geteuid()
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", str(folder)], capture_output=True
            ).returncode
        ):
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            outside = tmp_path / "data"
            with Box(outside, db_file=folder / "mad.db3", workers="1") as box:
                token = box.token().json["access_token"]
                with contextlib.suppress(OSError), open(folder / "filler", "wb") as filler:
                    while True:
                        filler.write(bytes(4096))
                        filler.flush()
                statuses = []
                for _ in range(400):
                    statuses.append(box.token().status)
                    if statuses[-1] == 503:
                        break
                answer = box.token()
                assert answer.status == 503 and answer.headers["Retry-After"]
                assert box.auth("/revoke", {"token": token}, client=box.client).status == 503
                assert box.auth("/jwks.json").status == 200 and box.auth("/me", bearer=token).status == 200
                (folder / "filler").unlink()
                end = time.monotonic() + 30
                while box.token().status != 200:
                    assert time.monotonic() < end
                    time.sleep(0.1)
                assert box.auth("/revoke", {"token": token}, client=box.client).status == 200
        finally:
            subprocess.run(["umount", str(folder)], check=True)
