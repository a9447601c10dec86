"""Rotation and revocation: no client that heeds max-age ever fails, and nothing half done is left by a kill."""

import json
import os
import signal
import threading
import time

import jwt
import microauthd as m
import pytest
from box import Box
from conftest import CHEAP, Caller, die, in_child
from appliance.base import StartupError
from appliance.base.clock import RELEASED_AT
from appliance.base.settings import Options
from appliance.base.keys import make_key, read_ring
from appliance.upkeep import advance_key_states
from appliance.recovery import describe_keys, open_idp, revoke_key, rotate_keys


def rows(options, port="auth"):
    return [(row["alg"], row["state"], row["kid"]) for row in describe_keys(options) if row["port"] == port]


class TestKeySet:
    """RFC 7517 §5"""

    @pytest.mark.parametrize(
        "overlap, told",
        [
            (900, "public, max-age=300"), (302, "public, max-age=300"), (100, "public, max-age=98"), (2, "no-store"),
            (1, "no-store"),
        ],
    )
    def test_caches_keep_it_for_less_than_a_new_key_waits(self, make_idp, overlap, told):
        auth = Caller(m.build_app(make_idp(Options(**CHEAP, key_overlap=overlap)), m.AUTH))
        assert auth.get("/jwks.json").headers["cache-control"] == told

    def test_one_made_while_the_keys_changed_does_not_stay(self, idp):
        """A thread that read the old ring answers once with it, and leaves it nowhere."""

        def make():
            idp.rings["auth"] = m.KeyRing([make_key("ES256", 2048, 0)])  # what follow_rings does, in the middle
            idp.pages = {}
            return b"of before"

        assert m.prebuilt(idp, "jwks", make).content == b"of before"
        assert m.prebuilt(idp, "jwks", idp.auth_ring.jwks).content == idp.auth_ring.jwks()


class TestRotation:
    def test_it_is_all_rings_or_none(self, house):
        rotate_keys(house, ["admin"])
        before = rows(house)
        with pytest.raises(StartupError, match="waits to sign"):
            rotate_keys(house, ["auth", "admin"])
        assert rows(house) == before

    def test_an_algorithm_that_does_not_sign_is_refused(self, house):
        with pytest.raises(StartupError, match="no key of admin signs with RS256"):
            rotate_keys(house, ["admin"], ["RS256"])

    def test_a_clock_behind_the_times_is_put_right_first(self, house, monkeypatch):
        """Once it is, the new key would sign at once, and no cache would know it."""
        before = rows(house)
        with monkeypatch.context() as patched:
            patched.setattr(m.Idp, "now", lambda idp: RELEASED_AT - 86400)
            with pytest.raises(StartupError, match="clock"):
                rotate_keys(house, ["auth"])
        assert rows(house) == before

    @pytest.mark.parametrize("act", ["rotate", "revoke"])
    @pytest.mark.parametrize("step", ["os.fsync", "os.replace", "after os.replace"])
    @pytest.mark.parametrize("nth", [1, 2])
    def test_killed_at_any_point_a_ring_is_whole_and_the_command_can_be_repeated(
        self, house, monkeypatch, act, step, nth
    ):
        before = rows(house)
        name = step.split(".")[-1]

        def work():
            real, calls = getattr(os, name), []

            def deadly(*words):
                calls.append(1)
                if len(calls) == nth and not step.startswith("after"):
                    die()
                real(*words)
                if len(calls) == nth:
                    die()

            setattr(os, name, deadly)
            rotate_keys(house, ["auth", "admin"]) if act == "rotate" else revoke_key(house, before[0][2])

        assert in_child(work) == (0 if act == "revoke" and name == "replace" and nth == 2 else signal.SIGKILL), (
            "a revocation replaces one file"
        )
        for port in ("auth", "admin"):
            states = [state for _, state, _ in rows(house, port)]
            assert states.count("active") == (2 if port == "auth" else 1) and len(states) - states.count("active") in (
                0, states.count("next"),
            )
        if act == "revoke" and before[0] in rows(house):
            revoke_key(house, before[0][2])
        if act == "revoke":
            assert before[0][2] not in [kid for _, _, kid in rows(house)]
        for port in ("auth", "admin"):
            if "next" not in [state for _, state, _ in rows(house, port)]:
                rotate_keys(house, [port])

    def test_what_time_has_done_is_seen_after_a_restart_and_written_by_the_upkeep(self, house, monkeypatch):
        (new,) = rotate_keys(house, ["auth"], ["ES256"])
        later = time.time() + 901
        monkeypatch.setattr(time, "time", lambda: later)
        assert ("ES256", "active", new) in rows(house) and b"state=next" in open(
            house.token_signing_key_file, "rb"
        ).read()
        idp = open_idp(house)
        idp.clock = lambda: later
        idp.ring_files = {"auth": (None, None), "admin": (None, None)}
        advance_key_states(idp)
        idp.store.close()
        content = open(house.token_signing_key_file, "rb").read()
        assert b"state=next" not in content and b"state=retired" in content


    @pytest.mark.parametrize("what", ["a pipe", "a folder"])
    def test_what_is_no_file_is_no_ring_and_keeps_nobody_waiting(self, tmp_path, what):
        path = tmp_path / "token.pem"
        os.mkfifo(path, 0o600) if what == "a pipe" else path.mkdir(0o700)
        with pytest.raises(StartupError, match="cannot be read"):
            read_ring(str(path), "")


class TestUnderLoad:
    def test_no_verification_fails_while_both_rings_rotate_and_a_stolen_key_goes(self, tmp_path):
        """Clients of a serving box that keep the key set exactly as long as they are told."""
        with Box(tmp_path / "data", workers="2", key_overlap="4") as box:
            stop, failures, seen, counts = threading.Event(), [], set(), [0, 0]

            def client(number):
                cached, until = {}, 0
                while not stop.is_set():
                    token = box.token().json["access_token"]
                    kid = jwt.get_unverified_header(token)["kid"]
                    if time.monotonic() >= until:
                        asked = time.monotonic()  # an answer that was long under way is as old as that. RFC 9111 §4.2.3
                        answer = box.auth("/jwks.json")
                        control = answer.headers["Cache-Control"]
                        until = asked + int(control.partition("max-age=")[2] or 0)
                        cached = {key["kid"]: jwt.PyJWK(key).key for key in answer.json["keys"]}
                    try:
                        jwt.decode(token, cached[kid], algorithms=["ES256"], audience="api")
                    except (KeyError, jwt.PyJWTError) as error:
                        failures.append(repr(error))
                    seen.add(kid)
                    counts[number] += 1

            # One process made its first key set before the new key was there, and says max-age=2.
            assert box.auth("/jwks.json").headers["Cache-Control"] == "public, max-age=2"
            threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            try:
                end = time.monotonic() + 60
                while not all(counts):
                    assert time.monotonic() < end
                admin_token = box.admin_token()
                done = box.run("keys", "rotate")
                assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stderr
                while len(seen) < 2:
                    assert time.monotonic() < end and not failures, failures
                sofar = list(counts)
                while any(count < before + 50 for count, before in zip(counts, sofar)):
                    assert time.monotonic() < end and not failures, failures
                assert box.admin("GET", "/users", bearer=admin_token).status == 200, (
                    "the old ADMIN key is good until its last token is dead"
                )
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert failures == [] and len(seen) == 2
            said = json.loads(box.run("keys", "list", "--json").stdout)
            assert sorted(row["state"] for row in said) == ["active"] * 3 + ["retired"] * 3
            assert box.admin("GET", "/audit-logs/verify", bearer=box.admin_token()).json["valid"] is True
