"""Hashing: Argon2id and its memory, what bounds it, what remembers it."""

import base64
import concurrent.futures
import errno
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import microauthd as m
import pytest
from argon2.exceptions import Argon2Error, VerificationError
from argon2.low_level import Type, hash_secret_raw
from conftest import CHEAP, PASSWORD
from hypothesis import given, settings
from hypothesis import strategies as st
from appliance.base.hashing import (
    BLAME_SECONDS, MAX_WAIT, Argon2Memory, Busy, HashGate, Hasher, NameLock, NameLocks, VerifiedSecrets,
)
from appliance.base.settings import Options


@pytest.fixture
def hasher():
    return Hasher(Options(**CHEAP))


def is_slow_down(caught):
    """As a client is told of it."""
    with pytest.raises(m.Problem) as told, m.hash_problems():
        raise caught.value
    return (
        told.value.code == "slow_down"
        and told.value.status == 429
        and int(dict(told.value.headers)["Retry-After"]) >= 1
    )


class TestArgon2:
    """RFC 9106"""

    @pytest.mark.parametrize(
        "memory, time, lanes, length, salt", [(64, 1, 1, 32, 16), (128, 3, 2, 16, 8), (256, 2, 4, 64, 32)]
    )
    def test_a_hash_carries_the_parameters_in_force(self, memory, time, lanes, length, salt):
        hasher = Hasher(
            Options(
                argon2id_memory=memory, argon2id_time=time, argon2id_parallelism=lanes, argon2id_hash_length=length,
                argon2id_salt_length=salt,
            )
        )
        phc = hasher.hash("x")
        _, kind, version, parameters, salted, hashed = phc.split("$")
        assert (kind, version, parameters) == ("argon2id", "v=19", f"m={memory},t={time},p={lanes}") and phc.startswith(
            hasher.parameters()
        )
        assert len(base64.b64decode(salted + "==")) == salt and len(base64.b64decode(hashed + "==")) == length
        assert hasher.verify(phc, "x") and not hasher.verify(phc, "y")

    def test_two_hashes_of_one_password_differ(self, hasher):
        assert hasher.hash("x") != hasher.hash("x")

    @settings(deadline=None, max_examples=30)
    @given(st.text(max_size=30), st.text(max_size=30))
    def test_only_the_same_word_verifies(self, one, other):
        hasher = Hasher(Options(**CHEAP))
        assert hasher.verify(hasher.hash(one), other) == (one == other)

    @pytest.mark.parametrize("known", [True, False])
    def test_nobody_costs_what_somebody_costs(self, hasher, monkeypatch, known):
        phc, calls = hasher.hash("right"), []
        compute = hasher.memory.compute
        monkeypatch.setattr(
            hasher.memory, "compute",
            lambda password, salt, *cost: calls.append((password, len(salt), *cost)) or compute(password, salt, *cost),
        )
        assert hasher.verify(phc if known else None, "wrong") is False
        assert calls == [(b"wrong", 16, 1, 64, 1, 32)]

    def test_nobody_has_no_password(self, hasher, monkeypatch):
        monkeypatch.setattr(hasher, "match_group", lambda group, _: group[0])
        assert hasher.verify(None, "any") is False

    @settings(deadline=None, max_examples=100)
    @given(
        st.binary(max_size=300), st.binary(min_size=8, max_size=64), st.integers(1, 3), st.integers(1, 4),
        st.integers(0, 3000), st.integers(4, 64),
    )
    def test_it_computes_what_the_library_computes(self, password, salt, passes, lanes, more, length):
        computed = Hasher(Options(**CHEAP)).memory.compute(password, salt, passes, 8 * lanes + more, lanes, length)
        assert computed == hash_secret_raw(password, salt, passes, 8 * lanes + more, lanes, length, Type.ID)

    def test_where_nothing_may_be_written_and_executed_it_works_as_well(self):
        """As systemd's MemoryDenyWriteExecute has it: prctl(2), PR_SET_MDWE."""
        script = (
            "import sys; sys.path[:0] = sys.argv[1:]\n"
            "import _cffi_backend as c\nfrom appliance.base.hashing import Hasher\nfrom appliance.base.settings import Options\n"
            "library = c.load_library(None)\n"
            "kind = c.new_primitive_type('int')\n"
            "prctl = library.load_function(c.new_function_type((kind,) * 5, kind), 'prctl')\n"
            "refused = prctl(65, 1, 0, 0, 0)\n"
            "hasher = Hasher(Options(argon2id_memory=64, argon2id_time=1, argon2id_parallelism=1))\n"
            "stored = hasher.hash('x')\n"
            "print(refused, hasher.memory.allocate is None, hasher.verify(stored, 'x'), hasher.verify(stored, 'y'))"
        )
        done = subprocess.run([sys.executable, "-c", script, *sys.path], capture_output=True, text=True, timeout=60)
        refused, without, right, wrong = done.stdout.split()
        assert (right, wrong) == ("True", "False") and (refused != "0" or without == "True"), (
            done
        )  # a kernel before 6.3 knows no such prctl

    def test_many_threads_do_not_meet_in_its_memory(self):
        memory = Argon2Memory()
        words = [b"%d" % number for number in range(200)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            computed = list(pool.map(lambda word: memory.compute(word, b"saltsalt", 1, 1024, 2, 32), words))
        assert computed == [hash_secret_raw(word, b"saltsalt", 1, 1024, 2, 32, Type.ID) for word in words]

    def test_its_memory_goes_back(self, hasher):
        def mapped():
            return int(re.search(r"VmSize:\s+([0-9]+)", Path("/proc/self/status").read_text())[1])

        hasher.memory.compute(b"x", b"saltsalt", 1, 65536, 1, 32)
        before = mapped()
        for _ in range(5):
            hasher.memory.compute(b"x", b"saltsalt", 1, 65536, 1, 32)
        assert mapped() < before + 65536

    @pytest.mark.parametrize(
        "parameters", ["m=64,t=0,p=1", "m=7,t=1,p=1", "m=64,t=1,p=0", "m=64,t=1,p=64", "m=0,t=1,p=1"]
    )
    def test_parameters_that_cannot_be_verify_nothing(self, hasher, parameters):
        assert hasher.verify(f"$argon2id$v=19${parameters}$c2FsdHNhbHQ$aGFzaGhhc2g", "x") is False

    @pytest.mark.parametrize(
        "phc",
        [
            "", "x", "$argon2id$v=19$m=64,t=1,p=1$$", "$argon2id$v=19$m=64,t=1,p=1$c2FsdHNhbHQ$a",
            "$argon2id$v=19$m=64,t=1,p=1$c2Fs$aGFzaGhhc2g", "plain text",
        ],
    )
    def test_a_hash_that_is_none_verifies_nothing(self, hasher, phc):
        assert hasher.verify(phc, "x") is False

    @pytest.mark.parametrize(
        "error",
        [
            VerificationError("Memory allocation error"), VerificationError("Threading failure"),
            Argon2Error("Memory allocation error"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
        ],
    )
    def test_a_machine_that_fails_is_no_wrong_password(self, hasher, monkeypatch, error):
        def fail(*_):
            raise error

        phc = hasher.hash("x")
        monkeypatch.setattr(hasher.memory, "compute", fail)
        monkeypatch.setattr("appliance.base.hashing.argon2_hash", fail)
        for work in (lambda: hasher.hash("x"), lambda: hasher.verify(phc, "x")):
            with pytest.raises(m.Problem) as caught, m.hash_problems():
                work()
            assert caught.value.code == "temporarily_unavailable"


class TestGate:
    def test_those_who_find_no_place_are_told_to_come_back(self):
        gate, entered, leave = HashGate(1, 2), threading.Semaphore(0), threading.Event()

        def stay():
            with gate.slot():
                entered.release()
                leave.wait(60)

        threads = [threading.Thread(target=stay) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in threads:
            entered.acquire(timeout=60)
        with pytest.raises(Busy) as caught, gate.slot():
            pass
        assert is_slow_down(caught)
        leave.set()
        for thread in threads:
            thread.join()
        with gate.slot():
            pass

    def test_the_second_half_is_for_peers_that_hold_none(self):
        gate, entered, leave = HashGate(1, 7), threading.Semaphore(0), threading.Event()

        def stay():
            with gate.slot("192.0.2.1"):
                entered.release()
                leave.wait(60)

        threads = [threading.Thread(target=stay) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            entered.acquire(timeout=60)
        with pytest.raises(Busy) as caught, gate.slot("192.0.2.1"):
            pass
        assert is_slow_down(caught)
        with gate.slot("192.0.2.2"):
            pass
        leave.set()
        for thread in threads:
            thread.join()
        assert not gate.per_peer and not gate.in_use

    def test_a_thread_needs_one_place_only(self):
        gate = HashGate(1, 0)
        with gate.slot(), gate.slot(), gate.slot():
            pass
        with gate.slot():
            pass

    def test_a_failure_gives_the_place_back(self, hasher):
        hasher.gate = HashGate(1, 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), hasher.gate.slot():
                1 / 0
        assert hasher.verify(hasher.hash("x"), "x")

    def test_no_more_run_at_once_than_there_are_cores(self, monkeypatch):
        hasher, running, most = Hasher(Options(**CHEAP)), [], []
        hasher.gate = HashGate(2, 60)

        def slow(*_):
            running.append(1)
            most.append(len(running))
            threading.Event().wait(0.005)
            running.pop()
            return b"$argon2id$"

        monkeypatch.setattr("appliance.base.hashing.argon2_hash", slow)
        threads = [threading.Thread(target=hasher.hash, args=("x",)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(most) == 16 and max(most) <= 2


    def test_who_guessed_has_half_of_few_places_and_who_did_not_half_of_many(self):
        gate = HashGate(1, 319, 59)
        gate.blame("192.0.2.1")
        for peer, most in (("192.0.2.1", 30), ("192.0.2.2", 160)):
            gate.per_peer[peer] = 1
            gate.in_use = most - 1
            assert not gate.is_full(peer)
            gate.in_use = most
            assert gate.is_full(peer) and not gate.is_full("192.0.2.3")

    def test_blame_is_forgotten_and_does_not_grow_without_bound(self, monkeypatch):
        gate, now = HashGate(1), [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        for number in range(10_000):
            gate.blame(str(number))
            assert gate.is_blamed(str(number)) and len(gate.blamed) <= 4096
        now[0] += BLAME_SECONDS
        assert not gate.is_blamed("9999")

    def test_peers_take_turns_at_hashing(self):
        gate, order, come, leave = HashGate(1), [], threading.Semaphore(0), threading.Event()

        def hash_once(peer):
            with gate.slot(peer), gate.hashing():
                order.append(peer)
                come.release()
                leave.wait(60)

        threads = []
        for count, peer in enumerate(["crowd", "crowd", "crowd", "crowd", "other", "third", "other"]):
            threads.append(threading.Thread(target=hash_once, args=(peer,)))
            threads[-1].start()
            if not count:
                come.acquire(timeout=60)
            while gate.in_use <= count or sum(map(len, list(gate.queues.values()))) < count:
                time.sleep(0.001)
        gate.mean_seconds = 1.0
        assert (gate.expected_wait("crowd"), gate.expected_wait("other"), gate.expected_wait("new")) == (7.0, 6.0, 3.0)
        leave.set()
        for thread in threads:
            thread.join(60)
        assert order == ["crowd", "crowd", "other", "third", "crowd", "other", "crowd"]
        assert (gate.running, gate.in_use, gate.queues) == (0, 0, {})

    def test_who_is_at_the_machine_is_never_refused_and_goes_first(self):
        gate, order, come, leave = HashGate(1, 2), [], threading.Semaphore(0), threading.Event()

        def hash_once(peer, goes_first):
            with gate.slot(peer, goes_first=goes_first), gate.hashing():
                order.append(peer)
                come.release()
                leave.wait(60)

        threads = []
        for count, peer in enumerate(["one", "two", "three", "here", "here"]):
            threads.append(threading.Thread(target=hash_once, args=(peer, peer == "here")))
            threads[-1].start()
            if not count:
                come.acquire(timeout=60)
            while gate.in_use <= count or len(gate.queues) + len(gate.going_first) < count:
                time.sleep(0.001)
        with pytest.raises(Busy), gate.slot("four"):
            pass
        leave.set()
        for thread in threads:
            thread.join(60)
        assert order == ["one", "here", "here", "two", "three"]
        assert (gate.running, gate.in_use, gate.queues, list(gate.going_first)) == (0, 0, {}, [])

    def test_who_goes_first_waits_no_longer_than_said_either(self, monkeypatch):
        monkeypatch.setattr("appliance.base.hashing.MAX_WAIT", 1)
        gate = HashGate(1)
        gate.running = 1
        with pytest.raises(Busy), gate.slot("here", goes_first=True), gate.hashing():
            pass
        assert not gate.going_first and not gate.queues and not gate.in_use

    def test_nobody_waits_longer_than_said(self, monkeypatch):
        monkeypatch.setattr("appliance.base.hashing.MAX_WAIT", 1)
        gate = HashGate(1)
        gate.running = 1
        with pytest.raises(Busy) as caught, gate.slot("192.0.2.1"), gate.hashing():
            pass
        assert is_slow_down(caught) and not gate.queues and not gate.in_use
        gate.mean_seconds, gate.per_peer["192.0.2.2"] = 2.0, 1
        with pytest.raises(Busy) as caught, gate.slot("192.0.2.1"):
            pass
        assert is_slow_down(caught)


class TestNameLocks:
    """One verification of a name at a time."""

    def test_waiters_of_one_name_are_bounded_once_a_secret_was_wrong(self):
        name_locks, heard = NameLocks(HashGate(1)), []

        def come():
            try:
                with name_locks.hold("client", "app", "192.0.2.1"):
                    heard.append("turn")
            except Busy:
                heard.append("busy")

        with name_locks.hold("client", "app", "192.0.2.1") as name_lock:
            name_locks.blame(name_lock, "192.0.2.1")
            threads = [threading.Thread(target=come) for _ in range(50)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + 60
            while heard.count("busy") < 50 - name_locks.MAX_WAITERS and time.monotonic() < end:
                time.sleep(0.001)
            with name_locks.hold("client", "another", "192.0.2.1"), name_locks.hold("user", "app", "192.0.2.1"):
                pass
        for thread in threads:
            thread.join(60)
        most = name_locks.MAX_WAITERS
        assert (heard.count("turn"), heard.count("busy")) == (most, 50 - most) and not name_locks.names

    @pytest.mark.parametrize(
        "users, threads_left, failed, blamed, seconds",
        [
            (32, None, True, True, MAX_WAIT), (32, True, False, False, MAX_WAIT),
            (33, True, False, False, NameLocks.ONE_HASH), (33, True, True, False, 0), (33, True, False, True, 0),
            (0, False, False, False, NameLocks.ONE_HASH), (0, False, False, True, 0), (0, False, True, False, 0),
        ],
    )
    def test_a_good_crowd_is_granted_a_moment_and_the_last_thread_waits_for_nobody_who_guesses(
        self, users, threads_left, failed, blamed, seconds
    ):
        name_locks, name_lock = NameLocks(HashGate(1)), NameLock()
        name_lock.users, name_lock.failed = users, failed
        if blamed:
            name_locks.gate.blame("192.0.2.1")
        assert name_locks.timeout(name_lock, "192.0.2.1", threads_left) == seconds

    def test_a_moment_ends(self, monkeypatch):
        monkeypatch.setattr(NameLocks, "ONE_HASH", 0.01)
        monkeypatch.setattr(NameLocks, "MAX_WAITERS", 0)
        name_locks = NameLocks(HashGate(1))
        with name_locks.hold("client", "app", ""), pytest.raises(Busy) as caught, name_locks.hold("client", "app", ""):
            pass
        assert is_slow_down(caught) and not name_locks.names


class TestVerifiedSecrets:
    def test_what_was_learned_is_known_for_a_while(self):
        verified = VerifiedSecrets(300, 10)
        assert not verified.contains("hash", "secret", 0)
        verified.add("hash", "secret", 0)
        assert verified.contains("hash", "secret", 300) and not verified.contains("hash", "secret", 601)

    @pytest.mark.parametrize("more, seconds", [(0, 300), (3600, 3900), (10**9, 86400)])
    def test_some_are_known_for_longer_but_never_for_more_than_a_day(self, more, seconds):
        verified = VerifiedSecrets(300, 10)
        verified.add("hash", "secret", 0, more)
        assert verified.contains("hash", "secret", seconds) and verified.contains("hash", "secret", 2 * seconds)
        assert not verified.contains("hash", "secret", 3 * seconds + 1)

    def test_a_changed_secret_is_forgotten_by_itself(self):
        verified = VerifiedSecrets(300, 10)
        verified.add("hash", "secret", 0)
        assert not verified.contains("another hash", "secret", 0) and not verified.contains("hash", "another", 0)

    def test_hash_and_secret_do_not_run_into_each_other(self):
        verified = VerifiedSecrets(300, 10)
        verified.add("hash", "a\0b", 0)
        assert not verified.contains("hash\0a", "b", 0) or "\0" in "hash\0a", "a stored hash never holds a NUL"

    def test_nothing_is_remembered_in_clear_and_each_process_has_its_key(self):
        one, other = VerifiedSecrets(300, 10), VerifiedSecrets(300, 10)
        one.add("hash", PASSWORD, 0)
        other.add("hash", PASSWORD, 0)
        assert PASSWORD not in repr(vars(one)) and one.entries.keys().isdisjoint(other.entries)

    def test_it_does_not_grow_without_bound(self):
        verified = VerifiedSecrets(300, 10)
        for number in range(100):
            verified.add("hash", str(number), number)
            assert len(verified.entries) <= 10 and verified.contains("hash", str(number), number)

    def test_threads_may_learn_at_once(self):
        verified, errors = VerifiedSecrets(300, 50), []

        def learn(who):
            try:
                for number in range(400):
                    verified.add("hash", f"{who} {number}", 0)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=learn, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
