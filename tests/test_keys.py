"""Signing keys and the files they stand in."""

import base64
import os

import microauthd as m
import msgspec
import pytest
from conftest import CLAIMS
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from appliance.base import StartupError
from appliance.base.files import write_durably
from appliance.base.keys import make_key, next_promotion_at, promote, read_ring, write_ring


class TestKeys:
    @pytest.mark.parametrize("passphrase", ["", "phrase \u00e4"])
    def test_a_ring_survives_its_file(self, tmp_path, passphrase):
        entries = [make_key("ES256", 2048, 5), make_key("RS256", 2048, 6)]
        path = tmp_path / "token.pem"
        path.write_bytes(write_ring(entries, passphrase))
        path.chmod(0o600)
        assert read_ring(str(path), passphrase) == entries
        assert passphrase == "" or b"BEGIN PRIVATE KEY" not in path.read_bytes()

    @pytest.mark.parametrize("now, states", [(999, ["active", "next"]), (1000, ["retired", "active"])])
    def test_a_next_key_signs_from_the_second_in_which_it_has_been_published_long_enough(self, now, states):
        first, following = make_key("ES256", 2048, 0), make_key("ES256", 2048, 0)
        entries = promote([first, msgspec.structs.replace(following, state="next", since=100)], now, 900)
        assert [entry.state for entry in entries] == states
        assert {entry.since for entry in entries} == ({1000} if now == 1000 else {0, 100})
        assert next_promotion_at(entries, 900) == (None if now == 1000 else 1000)

    def test_a_next_key_replaces_that_of_its_algorithm_only(self):
        entries = [make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)]
        entries.append(msgspec.structs.replace(make_key("ES256", 2048, 0), state="next", since=100))
        assert [entry.state for entry in promote(entries, 1000, 900)] == ["retired", "active", "active"]

    @pytest.mark.parametrize(
        "kind, form", [("ec", "TraditionalOpenSSL"), ("ec", "PKCS8"), ("rsa", "TraditionalOpenSSL"), ("rsa", "PKCS8")]
    )
    @pytest.mark.parametrize("passphrase", ["", "phrase"])
    def test_a_single_key_of_the_original_is_a_ring(self, tmp_path, kind, form, passphrase):
        key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
        encryption = (
            serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
        )
        path = tmp_path / "token.pem"
        path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, getattr(serialization.PrivateFormat, form), encryption)
        )
        path.chmod(0o600)
        ring = m.KeyRing(read_ring(str(path), passphrase))
        assert ring.verify(ring.mint(ring.access, m.AT_JWT, CLAIMS), m.AT_JWT) == CLAIMS

    def test_a_ring_that_lost_a_key_stops_the_start(self, tmp_path):
        path = tmp_path / "token.pem"
        whole = write_ring([make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)], "")
        second = whole.index(b"# state", 10)
        for content in (
            whole[:-40], whole[: second + 60], whole[: second + 30],
            whole.replace(b"-----END PRIVATE KEY-----", b"-----END", 1),
            whole.replace(b"state=active", b"state=activ", 1),
        ):
            path.write_bytes(content)
            path.chmod(0o600)
            with pytest.raises(StartupError):
                read_ring(str(path), "")
            assert path.read_bytes() == content

    def test_a_ring_file_may_have_been_edited_on_windows(self, tmp_path):
        path = tmp_path / "token.pem"
        entries = [make_key("ES256", 2048, 7), make_key("RS256", 2048, 8)]
        path.write_bytes(write_ring(entries, "").replace(b"\n", b"\r\n"))
        path.chmod(0o600)
        assert read_ring(str(path), "") == entries

    def test_a_readable_key_becomes_its_owners_alone_and_that_is_said(self, tmp_path, capsys):
        path = tmp_path / "token.pem"
        path.write_bytes(write_ring([make_key("ES256", 2048, 0)], ""))
        path.chmod(0o644)
        read_ring(str(path), "")
        assert path.stat().st_mode & 0o777 == 0o600 and "readable by others" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "case",
        [
            "missing", "empty", "garbage", "truncated", "wrong passphrase", "no passphrase", "another curve",
            "a short RSA key",
        ],
    )
    def test_a_bad_file_stops_the_start_and_stays(self, tmp_path, case):
        path = tmp_path / "token.pem"
        content = write_ring([make_key("ES256", 2048, 0)], "phrase" if "passphrase" in case else "")
        if case == "another curve":
            content = ec.generate_private_key(ec.SECP384R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        if case == "a short RSA key":
            content = rsa.generate_private_key(65537, 1024).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        content = {"empty": b"", "garbage": b"\0" * 100, "truncated": content[:120]}.get(case, content)
        if case != "missing":
            path.write_bytes(content)
            path.chmod(0o600)
        with pytest.raises(StartupError) as caught:
            read_ring(str(path), {"wrong passphrase": "other"}.get(case, ""))
        assert "\n" not in str(caught.value)
        assert not path.exists() if case == "missing" else path.read_bytes() == content


class TestDamagedKeys:
    """RFC 8017 §3.2"""

    def test_whichever_bit_is_flipped_the_key_is_refused(self, tmp_path):
        """A key that is off by one signs wrongly, slowly, or so that its factors can be computed."""
        entry = make_key("RS256", 2048, 0)
        path = tmp_path / "token.pem"
        for bit in range(0, len(entry.der) * 8, 37):
            der = bytearray(entry.der)
            der[bit // 8] ^= 1 << bit % 8
            write_durably(
                str(path),
                b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(bytes(der)) + b"-----END PRIVATE KEY-----\n",
            )
            with pytest.raises(StartupError):
                read_ring(str(path), "")
        write_durably(str(path), write_ring([entry], ""))
        assert read_ring(str(path), "") == [entry]

    def test_a_ring_without_states_that_lost_a_key_stops_the_start(self, tmp_path):
        path = tmp_path / "token.pem"
        whole = write_ring([make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)], "")
        path.write_bytes(b"".join(line for line in whole.splitlines(True) if not line.startswith(b"#"))[:-40])
        path.chmod(0o600)
        with pytest.raises(StartupError):
            read_ring(str(path), "")

    @pytest.mark.parametrize("what", ["a pipe", "a folder"])
    def test_what_is_no_file_is_no_ring_and_keeps_nobody_waiting(self, tmp_path, what):
        path = tmp_path / "token.pem"
        os.mkfifo(path, 0o600) if what == "a pipe" else path.mkdir(0o700)
        with pytest.raises(StartupError, match="cannot be read"):
            read_ring(str(path), "")
