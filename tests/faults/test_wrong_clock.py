"""The machine's clock leaps, under a server that runs: libfaketime sets it, for the server alone."""

import glob
import json
import time
from base64 import urlsafe_b64decode

import pytest
from box import Box

DAY, YEARS = 86400, 3652 * 86400
NEAR = 60  # seconds, of clocks that are otherwise an hour apart: an answer may take some on a busy machine


def claims_of(token):
    body = token.split(".")[1]
    return json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))


class Shifted:
    """A box whose clock is so many seconds off, and can be set while it runs."""

    def __init__(self, tmp_path, **settings):
        (layer,) = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
        self.file = tmp_path / "faketime"
        self.shift(0)
        self.box = Box(
            tmp_path / "data", workers="2", enable_token_refresh="true", refresh_token_grace="0", key_overlap="1",
            **settings,
        )
        self.box.set_up()
        self.box.environ |= {
            "LD_PRELOAD": layer, "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
        }

    def shift(self, seconds):
        """Set the clock so far off. The file is replaced at once: a half-written one would be another time."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self.file)

    def issued(self):
        """When the server says it is, by a token."""
        answer = self.box.token()
        assert answer.status == 200, answer
        return claims_of(answer.json["access_token"])["iat"]

    def start(self, wait=True):
        self.heard = len(self.box.said())
        return self.box.start(wait)

    def await_said(self, word, seconds=30):
        """Wait for a word in what is logged since the last start."""
        end = time.monotonic() + seconds
        while word not in self.box.said()[self.heard :]:
            assert time.monotonic() < end, self.box.said()
            time.sleep(0.05)

    def await_ready(self):
        end = time.monotonic() + 30  # asked anew once a second
        while (answer := self.box.auth("/health/ready")).status != 200:
            assert time.monotonic() < end, answer
            time.sleep(0.1)

    def refresh(self, token):
        return self.box.auth("/token", {"grant_type": "refresh_token", "refresh_token": token}, client=self.box.client)


@pytest.fixture
def shifted(tmp_path):
    made = Shifted(tmp_path)
    yield made
    made.box.__exit__()


def rings_of(box):
    return {name: (box.folder / name).read_bytes() for name in ("token.pem", "admin_token.pem")}


def test_the_layer_sets_the_clock_of_the_server(shifted):
    """Or the tests below would prove nothing: its log is stamped by the machine's clock."""
    shifted.shift(3 * DAY)
    shifted.start()
    shifted.await_said("serving")
    tomorrow = time.strftime("%Y-%m-%dT", time.gmtime(time.time() + 3 * DAY))
    assert tomorrow in shifted.box.said() and abs(shifted.issued() - time.time() - 3 * DAY) < NEAR


@pytest.mark.parametrize(
    "leap, held",
    [
        (YEARS, 2), (-3600, 2),
        *(pytest.param(leap, held, marks=pytest.mark.long) for leap, held in ((YEARS, 60), (3600, 2))),
    ],
)
def test_a_leap_and_back_changes_nothing(shifted, leap, held):
    """Nothing expires, is purged, comes back to life or rotates away, and tokens keep the right time."""
    box = shifted.start()
    box.new_user("ann")
    box.new_user("eve")
    good, spent, dead = box.log_in("ann").json, box.log_in("ann").json, box.token().json["access_token"]
    renewed = shifted.refresh(spent["refresh_token"]).json
    assert box.auth("/revoke", {"token": dead}, client=box.client).status == 200
    for _ in range(5):
        assert box.log_in("eve", "wrong").status == 403
    assert box.log_in("eve").status == 403, "locked out"
    bearer, rings = box.admin_token(), rings_of(box)
    rows = box.admin("GET", "/audit-logs?limit=1000", bearer=bearer).json
    shifted.shift(leap)
    shifted.await_said("clock.ahead" if leap > 0 else "clock.behind")
    end = time.monotonic() + held
    while time.monotonic() < end:
        assert abs(shifted.issued() - time.time()) < NEAR
        assert box.auth("/introspect", {"token": good["access_token"]}, client=box.client).json["active"] is True
        assert box.auth("/introspect", {"token": dead}, client=box.client).json == {"active": False}
        assert box.log_in("eve").status == 403, "a lockout is over before its time"
        time.sleep(held / 8)  # more tries would be told to slow down
    assert box.auth("/health/ready").status == 503 and box.auth("/jwks.json").status == 200
    shifted.shift(0)
    if leap > 0:
        shifted.await_said("clock.right")
        shifted.await_ready()
    assert abs(shifted.issued() - time.time()) < NEAR and rings_of(box) == rings
    assert box.auth("/introspect", {"token": dead}, client=box.client).json == {"active": False}
    assert box.log_in("eve").status == 403
    now = {row["id"] for row in box.admin("GET", "/audit-logs?limit=1000", bearer=bearer).json}
    assert {row["id"] for row in rows} <= now, "rows are gone"
    assert (
        shifted.refresh(good["refresh_token"]).status == 200 and shifted.refresh(spent["refresh_token"]).status == 400
    )
    assert shifted.refresh(renewed["refresh_token"]).status == 400, "the family of a token spent twice lives"


def test_a_start_in_1970_goes_on_from_what_is_known(shifted):
    box = shifted.start()
    box.new_user("ann")
    refresh_token, token = box.log_in("ann").json["refresh_token"], box.token().json["access_token"]
    assert box.auth("/revoke", {"token": token}, client=box.client).status == 200
    box.stop()
    rings = rings_of(box)
    shifted.shift(-int(time.time()) + 100)
    shifted.start(wait=False)
    shifted.await_said("clock.guessed")
    shifted.await_said("serving")
    assert abs(shifted.issued() - time.time()) < NEAR and box.auth("/health/ready").status == 503
    assert box.auth("/introspect", {"token": token}, client=box.client).json == {"active": False}
    shifted.shift(0)
    shifted.await_said("clock.right")
    shifted.await_ready()
    assert abs(shifted.issued() - time.time()) < NEAR and rings_of(box) == rings
    assert shifted.refresh(refresh_token).status == 200


def test_a_start_ten_years_ahead_does_no_harm_that_lasts(shifted):
    """What is done meanwhile is ended when the clock is set; the box is neither unready nor locked for ten years."""
    box = shifted.start()
    box.new_user("ann")
    before = box.log_in("ann").json["refresh_token"]
    box.stop()
    rings = rings_of(box)
    shifted.shift(YEARS)
    shifted.start(wait=False)
    shifted.await_said("clock.probation")
    shifted.await_said("serving")
    late = box.log_in("ann").json
    box.kill()
    shifted.shift(0)
    shifted.start()
    assert abs(shifted.issued() - time.time()) < NEAR and rings_of(box) == rings
    assert box.auth("/introspect", {"token": late["access_token"]}, client=box.client).json == {"active": False}
    assert shifted.refresh(late["refresh_token"]).status == 400 and shifted.refresh(before).status == 200
    assert (
        box.log_in("ann").status == 200
        and box.admin("GET", "/audit-logs/verify", bearer=box.admin_token()).json["valid"] is True
    )


def test_an_operator_has_the_last_word(shifted):
    """A clock that was believed ahead, and is set right by a month: nothing but a person can know that."""
    shifted.shift(30 * DAY)
    box = shifted.start()
    ahead = shifted.issued()
    shifted.shift(0)
    shifted.await_said("clock.behind")
    assert shifted.issued() >= ahead
    done = box.run("clock", "accept")
    assert done.returncode == 0 and "ended" in done.stdout, done
    shifted.await_said("clock.right")
    shifted.await_ready()
    assert abs(shifted.issued() - time.time()) < NEAR
    box.stop()
    shifted.start()
    assert abs(shifted.issued() - time.time()) < NEAR
