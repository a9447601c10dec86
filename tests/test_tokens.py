"""Keys and JWTs."""

import base64
import hmac
import json
import os

import jwt
import microauthd as m
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from appliance.base import StartupError
from appliance.base.files import write_durably
from appliance.base.keys import Key, b64url, b64url_bytes, make_key, read_ring, unb64url, write_ring

CLAIMS = {"iss": "https://idp.example", "sub": "s", "aud": "api", "exp": 4102444800, "iat": 1, "jti": "0" * 32}


@pytest.fixture(scope="module")
def ring():
    return m.KeyRing([make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)])


@pytest.fixture(scope="module")
def token(ring):
    return ring.mint(ring.access, m.AT_JWT, CLAIMS)


def encode(value):
    return b64url(json.dumps(value).encode() if isinstance(value, dict) else value)


class TestVerifying:
    """RFC 8725 §3"""

    def forge(self, ring, token, case):
        header, body, signature = token.split(".")
        key = ring.access
        pem = key.public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        if case == "alg none":
            return f"{encode({'alg': 'none', 'typ': 'at+jwt', 'kid': key.kid})}.{body}."
        if case == "HS256 with the public key":
            head = encode({"alg": "HS256", "typ": "at+jwt", "kid": key.kid})
            return f"{head}.{body}.{encode(hmac.digest(pem, f'{head}.{body}'.encode(), 'sha256'))}"
        if case == "another key":
            other = m.KeyRing([make_key("ES256", 2048, 0)])
            return other.mint(other.access, m.AT_JWT, CLAIMS)
        if case == "our kid, another key":
            other = m.KeyRing([make_key("ES256", 2048, 0)])
            return f"{header}.{body}." + b64url(other.access.sign(f"{header}.{body}".encode()))
        if case == "an ID token":
            return ring.mint(key, m.JWT, CLAIMS)
        if case == "the same header, spelled otherwise":
            head = encode({"kid": key.kid, "typ": "at+jwt", "alg": "ES256"})
            return f"{head}.{body}." + b64url(key.sign(f"{head}.{body}".encode()))
        if case == "another body":
            return f"{header}.{encode(CLAIMS | {'sub': 'root'})}.{signature}"
        if case == "padding":
            return token + "="
        if case == "a DER signature":
            from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

            raw = unb64url(signature)
            der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
            return f"{header}.{body}.{b64url(der)}"
        if case == "line break":
            return token + "\n"
        return {
            "empty": "", "two parts": f"{header}.{body}", "four parts": token + ".x", "too long": token + "A" * 9000,
        }[case]

    @pytest.mark.parametrize(
        "case",
        [
            "alg none", "HS256 with the public key", "another key", "our kid, another key", "an ID token",
            "the same header, spelled otherwise", "another body", "padding", "a DER signature", "line break", "empty",
            "two parts", "four parts", "too long",
        ],
    )
    def test_a_forgery_is_an_invalid_token(self, ring, token, case):
        with pytest.raises(m.Problem) as caught:
            ring.verify(self.forge(ring, token, case), m.AT_JWT)
        assert caught.value.code == "invalid_token"
        assert ring.verify(token, m.AT_JWT) == CLAIMS

    @settings(max_examples=300)
    @given(at=st.integers(0, 10_000), to=st.characters(min_codepoint=32, max_codepoint=126))
    def test_no_changed_character_verifies(self, ring, token, at, to):
        at %= len(token)
        changed = token[:at] + to + token[at + 1 :]
        if changed != token:
            with pytest.raises(m.Problem):
                ring.verify(changed, m.AT_JWT)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), alg=st.sampled_from(["ES256", "RS256"]))
    def test_no_flipped_bit_verifies(self, ring, data, alg):
        token = ring.mint(ring.signer(alg), m.AT_JWT, CLAIMS)
        parts = [bytearray(unb64url(part)) for part in token.split(".")]
        part = data.draw(st.integers(0, 2))
        bit = data.draw(st.integers(0, 8 * len(parts[part]) - 1))
        parts[part][bit // 8] ^= 1 << bit % 8
        with pytest.raises(m.Problem) as caught:
            ring.verify(".".join(b64url(bytes(part)) for part in parts), m.AT_JWT)
        assert caught.value.code == "invalid_token"

    @pytest.mark.parametrize("alg", ["ES256", "RS256"])
    def test_one_signature_has_one_spelling(self, ring, alg):
        """The last letter of base64url has unused bits; only zeros are canonical. RFC 4648 §3.5"""
        token = ring.mint(ring.signer(alg), m.AT_JWT, CLAIMS)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        for letter in letters.replace(token[-1], "") + "=+/ \n":
            with pytest.raises(m.Problem):
                ring.verify(token[:-1] + letter, m.AT_JWT)

    @given(st.text(max_size=60))
    def test_any_text_is_an_invalid_token(self, ring, word):
        with pytest.raises(m.Problem) as caught:
            ring.verify(word, m.AT_JWT)
        assert caught.value.code == "invalid_token"

    @given(st.binary(max_size=40))
    def test_base64url_is_what_its_standard_says(self, raw):
        assert unb64url(b64url(raw)) == raw and b64url_bytes(raw).decode() == b64url(raw)

    def test_what_is_remembered_is_bounded(self):
        ring = m.KeyRing([make_key("ES256", 2048, 0)])
        for number in range(4100):
            ring.verified[str(number)] = ("", {})
        ring.verify(ring.mint(ring.access, m.AT_JWT, CLAIMS), m.AT_JWT)
        assert len(ring.verified) <= 1024

    def test_a_signature_of_zeros_is_none(self, ring):
        """The "psychic" signature of ECDSA: r = s = 0."""
        header, body, _ = ring.mint(ring.signer("ES256"), m.AT_JWT, CLAIMS).split(".")
        with pytest.raises(m.Problem):
            ring.verify(f"{header}.{body}.{b64url(bytes(64))}", m.AT_JWT)

    def test_a_remembered_signature_does_not_change_the_type(self, ring):
        token = ring.mint(ring.access, m.JWT, CLAIMS)
        ring.verify(token, m.JWT)
        with pytest.raises(m.Problem):
            ring.verify(token, m.AT_JWT)

    def test_a_signed_token_that_is_too_long_is_none(self, rings):
        ring = m.KeyRing(rings[0])
        with pytest.raises(m.Problem):
            ring.verify(ring.mint(ring.access, m.AT_JWT, {"x": "y" * 9000}), m.AT_JWT)


class TestKeys:
    def test_a_kid_is_the_thumbprint(self, ring):
        """RFC 7638 §3"""
        from joserfc.jwk import import_key

        for jwk in json.loads(ring.jwks())["keys"]:
            assert import_key(jwk).thumbprint() == jwk["kid"]
            assert not any(value in ("", None) for value in jwk.values()) and "d" not in jwk

    @pytest.mark.parametrize("alg", ["ES256", "RS256"])
    def test_strangers_verify_our_tokens(self, ring, alg):
        from jose import jwt as jose
        from joserfc import jwt as joserfc
        from joserfc.jwk import KeySet

        token = ring.mint(ring.signer(alg), m.AT_JWT, CLAIMS)
        keys = json.loads(ring.jwks())
        kid = jwt.get_unverified_header(token)["kid"]
        assert (
            jwt.decode(
                token, jwt.PyJWKSet.from_dict(keys)[kid].key, algorithms=[alg], audience="api", issuer=CLAIMS["iss"]
            )
            == CLAIMS
        )
        assert (
            jose.decode(token, next(key for key in keys["keys"] if key["kid"] == kid), algorithms=[alg], audience="api")
            == CLAIMS
        )
        assert joserfc.decode(token, KeySet.import_key_set(keys), algorithms=[alg]).claims == CLAIMS

    @pytest.mark.parametrize("passphrase", ["", "phrase \u00e4"])
    def test_a_ring_survives_its_file(self, tmp_path, passphrase):
        entries = [make_key("ES256", 2048, 5), make_key("RS256", 2048, 6)]
        path = tmp_path / "token.pem"
        path.write_bytes(write_ring(entries, passphrase))
        path.chmod(0o600)
        assert read_ring(str(path), passphrase) == entries
        assert passphrase == "" or b"BEGIN PRIVATE KEY" not in path.read_bytes()

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

    def test_the_next_and_the_retired_key_are_published_and_sign_nothing(self):
        import msgspec

        old, now, new = (
            msgspec.structs.replace(make_key("ES256", 2048, 0), state=state)
            for state in ("retired", "active", "next")
        )
        ring, before = m.KeyRing([old, now, new]), m.KeyRing([msgspec.structs.replace(old, state="active")])
        assert len(json.loads(ring.jwks())["keys"]) == 3
        assert ring.access.kid == ring.signer("ES256").kid == Key(now).kid
        assert ring.verify(before.mint(before.access, m.AT_JWT, CLAIMS), m.AT_JWT) == CLAIMS

    @pytest.mark.parametrize("prefer_ec, alg", [(True, "ES256"), (False, "RS256")])
    def test_which_key_signs_access_tokens_is_an_option(self, prefer_ec, alg):
        entries = [make_key("RS256", 2048, 0), make_key("ES256", 2048, 0)]
        assert m.KeyRing(entries, prefer_ec).access.alg == alg
        assert (
            m.KeyRing(entries[:1], True).access.alg == "RS256" and m.KeyRing(entries[:1]).signer("ES256").alg == "RS256"
        )

    def test_a_token_of_the_other_port_is_no_token(self, rings):
        auth, admin = m.KeyRing(rings[0]), m.KeyRing(rings[1])
        for one, other in ((auth, admin), (admin, auth)):
            with pytest.raises(m.Problem):
                other.verify(one.mint(one.access, m.AT_JWT, CLAIMS), m.AT_JWT)

    def test_a_private_number_is_never_published(self, ring):
        for jwk in json.loads(ring.jwks())["keys"]:
            assert set(jwk) == ({"kty", "crv", "x", "y"} if jwk["kty"] == "EC" else {"kty", "n", "e"}) | {
                "kid", "use", "alg",
            }

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
