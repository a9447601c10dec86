"""Secrets: what slows guessing, seals, one-time codes, new passwords, handles."""

import base64
import hashlib
import re
import unicodedata
import uuid
from urllib.parse import unquote

import microauthd as m
import pyotp
import pytest
from conftest import PASSWORD, Clock
from hypothesis import given
from hypothesis import strategies as st
from appliance.base.shared import Buckets
from appliance.base.settings import Options


class TestThrottle:
    @pytest.fixture
    def clock(self):
        return Clock(1000.0)

    @pytest.fixture
    def throttle(self, clock):
        return m.Throttle(clock, size=50)

    def spend(self, throttle, times, peer="192.0.2.1", name="alice"):
        for _ in range(times):
            throttle.check(peer, name)
            throttle.spend(peer, name)

    def is_spent(self, throttle, peer="192.0.2.1", name="alice"):
        try:
            throttle.check(peer, name)
        except m.Problem as problem:
            assert problem.code == "slow_down"
            return int(dict(problem.headers)["Retry-After"])
        return 0

    def test_a_name_of_a_peer_has_twenty_and_one_more_every_three_seconds(self, throttle, clock):
        self.spend(throttle, 20)
        wait = self.is_spent(throttle)
        assert 1 <= wait <= 4
        clock.pass_(wait)
        assert not self.is_spent(throttle)
        self.spend(throttle, 1)
        assert self.is_spent(throttle)

    def test_others_are_not_slowed(self, throttle):
        self.spend(throttle, 20)
        assert not self.is_spent(throttle, name="bob") and not self.is_spent(throttle, peer="192.0.2.2")

    def test_a_peer_that_tries_many_names_is_slowed(self, throttle):
        for number in range(120):
            self.spend(throttle, 1, name=f"user{number}")
        assert self.is_spent(throttle, name="another") and not self.is_spent(throttle, peer="192.0.2.2")

    @pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
    def test_loopback_is_everybody_and_has_no_bucket_of_its_own(self, throttle, peer):
        for number in range(200):
            self.spend(throttle, 1, peer, f"user{number}")
        assert not self.is_spent(throttle, peer, "another")

    def test_it_does_not_grow_without_bound(self, throttle):
        for number in range(500):
            throttle.spend(f"192.0.2.{number % 250}", f"user{number}")
        assert len(throttle.buckets) <= 50

    def test_the_limits_are_those_of_all_processes_together(self, clock):
        buckets = Buckets()
        throttles = [m.Throttle(clock, buckets=buckets) for _ in range(4)]
        for throttle in throttles:
            self.spend(throttle, 5)
        assert all(self.is_spent(throttle) for throttle in throttles)
        assert not self.is_spent(throttles[0], name="bob")
        clock.pass_(3)
        self.spend(throttles[1], 1)
        assert self.is_spent(throttles[0])
        assert self.begun(throttles[2], "192.0.2.9") == 60 and self.begun(throttles[3], "192.0.2.9") == 0

    def test_a_long_name_costs_no_memory(self, throttle):
        for number in range(20):
            throttle.spend("192.0.2.1", f"{number}" + "x" * 60_000)
        assert sum(len(str(key)) for key in throttle.buckets) < 20_000

    def test_a_network_of_ipv6_is_one_peer(self, throttle):
        """Whoever has one address of IPv6 has 2^64."""
        for number in range(120):
            self.spend(throttle, 1, f"2001:db8::{number:x}", f"user{number}")
        assert self.is_spent(throttle, "2001:db8::ffff", "another") and not self.is_spent(
            throttle, "2001:db8:0:1::1", "another"
        )

    def test_a_clock_that_goes_back_gives_and_takes_nothing(self, throttle, clock):
        self.spend(throttle, 20)
        clock.pass_(-500)
        assert self.is_spent(throttle)
        assert self.is_spent(throttle) <= 4

    def test_a_site_of_ipv6_has_what_16_of_its_networks_may_have(self, throttle):
        """RFC 6177 §2: a site may have a /48, which is 65,536 networks."""
        for number in range(16):
            for other in range(6):
                self.spend(throttle, 20, f"2001:db8:1:{number:x}::1", f"user{number}.{other}")
        assert self.is_spent(throttle, "2001:db8:1:ffff::1", "another")
        assert not self.is_spent(throttle, "2001:db8:2::1", "another")

    @staticmethod
    def begun(throttle, peer, octets=0, begun="login"):
        """How many logins a peer can begin at once."""
        for number in range(4000):
            try:
                throttle.begin(peer, begun, octets)
            except m.Problem as problem:
                assert problem.code == "slow_down"
                return number

    def test_logins_begun_are_bounded_for_each_peer_and_site_and_for_nobody_else(self):
        throttle = m.Throttle(Clock(1000.0))
        assert self.begun(throttle, "192.0.2.1") == 60
        assert [self.begun(throttle, f"2001:db8:1:{number:x}::1") for number in range(17)] == [60] * 16 + [0]
        assert self.begun(throttle, "2001:db8:2::1") == self.begun(throttle, "192.0.2.2") == 60
        throttle = m.Throttle(Clock(1000.0))
        for number in range(1500):
            throttle.begin(f"10.{number // 250}.{number % 250}.1", "login")

    @pytest.mark.parametrize("begun", ["login", "hint"])
    def test_all_of_loopback_begins_more_than_passwords_can_be_verified_and_no_more_than_fits(self, begun):
        """A program of the machine, or whoever comes through a proxy there: the rows would fill a small disk."""
        clock = Clock(1000.0)
        throttle = m.Throttle(clock)
        assert self.begun(throttle, "127.0.0.1", begun=begun) == 3000
        assert self.begun(throttle, "127.0.0.2", begun=begun) == self.begun(throttle, "::1", begun=begun) == 0
        clock.pass_(1)
        assert self.begun(throttle, "127.0.0.9", begun=begun) == 50 and self.begun(throttle, "192.0.2.1", begun=begun) == 60

    @pytest.mark.parametrize("octets, logins", [(0, 60), (1024, 60), (1025, 30), (8192, 8)])
    def test_a_large_login_counts_for_several(self, octets, logins):
        assert self.begun(m.Throttle(Clock(1000.0)), "192.0.2.1", octets) == logins

    def test_loopback_has_no_bound_on_refusals(self):
        assert self.begun(m.Throttle(Clock(1000.0)), "127.0.0.1", begun="refusal") is None

    def test_logins_begun_do_not_grow_the_throttle_without_bound(self):
        clock = Clock(1000.0)
        throttle = m.Throttle(clock, size=50)
        for number in range(500):
            clock.pass_(1)
            throttle.begin(f"10.{number // 250}.{number % 250}.1", "login")
        assert len(throttle.buckets) <= 50


class TestSeal:
    def test_what_is_sealed_opens_for_its_owner_only(self):
        seal = m.Seal(bytes(32))
        sealed = seal.close("seed", "alice")
        assert seal.open(sealed, "alice") == "seed" and "seed" not in sealed and seal.close("seed", "alice") != sealed
        for key, owner, word in (
            (bytes(32), "bob", sealed), (b"\1" * 32, "alice", sealed), (bytes(32), "alice", sealed[:-4] + "AAA="),
        ):
            with pytest.raises(m.Problem) as caught:
                m.Seal(key).open(word, owner)
            assert caught.value.code == "server_error" and "seed" not in str(caught.value)


class TestOneTimeCodes:
    """RFC 6238"""

    def test_the_vectors_of_the_standard(self):
        seed = base64.b32encode(b"12345678901234567890").decode()
        for now, code in ((59, "287082"), (1111111109, "081804"), (1234567890, "005924"), (2000000000, "279037")):
            assert m.totp_time_step(seed, code, now) == now // 30

    @pytest.mark.parametrize("offset, good", [(-61, False), (-30, True), (0, True), (30, True), (61, False)])
    def test_a_step_before_and_after_is_allowed(self, offset, good):
        seed, now = m.new_totp_seed(), 1795392015
        step = m.totp_time_step(seed, pyotp.TOTP(seed).at(now + offset), now)
        assert (step == (now + offset) // 30) if good else step is None

    @pytest.mark.parametrize(
        "code",
        [
            "", " ", "12345", "1234567", "12345a", "-12345", "123 4567", "123.456", "123_456", "+123456", "0x1234",
            "123456\0", "\u0661\u0662\u0663\u0664\u0665\u0666", "\u00bd23456", "\u2488123456",
        ],
    )
    def test_what_is_no_code(self, code):
        assert m.fold_one_time_code(code) == "" and m.totp_time_step(m.new_totp_seed(), code, 0) is None

    @pytest.mark.parametrize(
        "shown",
        [
            "123 456", "123-456", "123\u00a0456", "123\u202f456", "123\u2011456", " 123456", "123456\n", "12 34 56",
            "\uff11\uff12\uff13\uff14\uff15\uff16", "\uff11\uff12\uff13\u3000\uff14\uff15\uff16", "123\uff0d456",
        ],
    )
    def test_a_code_as_it_is_shown_or_typed(self, shown):
        assert m.fold_one_time_code(shown) == "123456"

    def test_seeds_have_160_bits_and_a_uri(self):
        seed = m.new_totp_seed()
        assert len(base64.b32decode(seed)) == 20
        assert m.totp_uri(seed, "alice", "My Box").startswith("otpauth://totp/My%20Box:alice?secret=" + seed)

    @pytest.mark.parametrize(
        "account, issuer, label",
        [
            ("alice", "Böx: & Co", "B%C3%B6x%20%26%20Co:alice"),
            ("a:b", "box.example:9040", "box.example%209040:a%20b"),
            ("ann\uff1ax", "::1", "1:ann%20x"), (":", ":", "microauthd:account"),
            ("ann@example.org", "B", "B:ann%40example.org"),
        ],
    )
    def test_one_colon_parts_issuer_and_account(self, account, issuer, label):
        uri = m.totp_uri(m.new_totp_seed(), account, issuer)
        path, query = uri.removeprefix("otpauth://totp/").split("?")
        assert path.replace("%40", "@") == label.replace("%40", "@") and path.count(":") == 1
        assert "%3a" not in uri.lower() and ":" not in query and "%ef%bc%9a" not in uri.lower()
        assert pyotp.parse_uri(uri).issuer == unquote(label.split(":")[0])

    def test_a_box_has_one_name(self):
        assert m.box_name(Options(oidc_issuer="https://idp.example:8443/x")) == "idp.example"
        assert m.box_name(Options(oidc_issuer="https://idp.example", brand_name="Our Box")) == "Our Box"


class TestNewPasswords:
    """NIST SP 800-63B §5.1.1.2"""

    @pytest.mark.parametrize(
        "password, word",
        [
            ("short", "at least 8"), ("x" * 256, "at most 255"), ("with\0nul and more", "NUL"), ("password", "common"),
            ("PassWord", "common"), ("12345678", "common"), ("newcomer", "user name"), ("NewComer", "user name"),
            ("new@example.org", "user name"), (PASSWORD, ""), ("x" * 255, ""),
            ("\u00e4\u00f6\u00fc\u20ac blanks too", ""),
        ],
    )
    def test_table(self, password, word):
        found = m.check_new_password(Options(), password, "newcomer", "new@example.org")
        assert word in found and bool(found) == bool(word)

    def test_they_are_held_against_the_normal_form(self):
        """RFC 8265 §4.2: what counts is what is hashed."""
        check = m.check_new_password
        assert "at least 12" in check(Options(password_min_length=12), "e\u0301" * 11)
        assert check(Options(), "e\u0301o\u0308" * 127) == "" and "at most 255" in check(Options(), "e\u0301" * 256)
        assert "user name" in check(Options(), "new\u3000comer", "new comer")

    def test_the_least_length_is_an_option(self):
        assert m.check_new_password(Options(password_min_length=20), "nineteen characters")


class TestNormalForm:
    """RFC 8265 §4.2.1"""

    @pytest.mark.parametrize(
        "password, normal",
        [
            ("", ""), (" \ta ", " \ta "), ("a\u00a0b\u3000c", "a b c"), ("e\u0301", "\u00e9"), ("\uff21", "\uff21"),
            ("\u212b", "\u00c5"), ("A\u00dfa", "A\u00dfa"), ("\u200b\ufeff\u00ad", "\u200b\ufeff\u00ad"),
            ("\U0001f511", "\U0001f511"), ("\ufb01", "\ufb01"), ("\u2028", "\u2028"),
        ],
    )
    def test_table(self, password, normal):
        assert m.normalise_password(password) == normal

    def test_every_other_blank_of_unicode_is_one(self):
        blanks = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Zs"]
        assert len(blanks) == 17 and {m.normalise_password(blank) for blank in blanks} == {" "}

    @given(st.text(max_size=10))
    def test_normalising_again_changes_nothing(self, password):
        normal = m.normalise_password(password)
        assert m.normalise_password(normal) == normal
        assert m.normalise_password(unicodedata.normalize("NFD", password)) == normal


class TestNames:
    @given(st.text(max_size=10))
    def test_folding_again_changes_nothing(self, name):
        assert m.fold(m.fold(name)) == m.fold(name) and m.normalise(m.normalise(name)) == m.normalise(name)

    @given(st.text("abcABC\u00e4\u00c4\u00df\uff21 ", max_size=10))
    def test_case_width_and_blanks_around_do_not_matter(self, name):
        assert m.fold(name) == m.fold(f"  {name.upper()}  ") == m.fold(unicodedata.normalize("NFD", name))

    @pytest.mark.parametrize("longest", [100, 254, 255])
    def test_what_may_be_long_enough_once_composed_is_composed(self, longest):
        letter = "\u1f82"  # four code points when decomposed, the most there are
        name = letter * longest
        assert m.fold("  " * 1000 + unicodedata.normalize("NFD", name)) == m.fold(name)

    def test_what_is_too_long_for_a_name_is_not_normalised(self):
        """unicodedata takes seconds to order the combining characters of a large request."""
        name = "a" + "\u0315\u0300" * 512
        assert m.normalise(name) == name != unicodedata.normalize("NFKC", name)
        assert m.fold(name) == name and m.fold_one_time_code(name) == ""


class TestHandles:
    def test_a_handle_has_256_bits_and_is_stored_as_sha256(self):
        handles = {m.random_handle() for _ in range(100)}
        assert len(handles) == 100 and all(re.fullmatch(r"[A-Za-z0-9_-]{43}", handle) for handle in handles)
        assert m.sha256("x") == hashlib.sha256(b"x").hexdigest()

    @given(st.integers(0, 2**48 - 1))
    def test_a_jti_is_a_uuid_of_version_7_and_keeps_its_milliseconds(self, ms):
        """RFC 9562 §5.7"""
        jti = m.new_jti(ms)
        assert (
            re.fullmatch("[0-9a-f]{32}", jti)
            and uuid.UUID(jti).version == 7
            and uuid.UUID(jti).variant == uuid.RFC_4122
            and m.jti_ms(jti) == ms
        )

    def test_those_of_one_millisecond_differ_and_later_ones_sort_after(self):
        assert len({m.new_jti(5) for _ in range(1000)}) == 1000
        assert m.new_jti(5) < m.new_jti(6) < m.new_jti(16**11)
