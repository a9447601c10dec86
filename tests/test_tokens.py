"""JWTs, and the rings that sign and verify them."""

import hmac
import json

import jwt
import microauthd as m
import pytest
from conftest import CLAIMS
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from appliance.base.keys import Key, b64url, b64url_bytes, make_key, unb64url


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

    def test_a_signature_of_es256_has_64_octets(self, ring):
        """RFC 7518 §3.4: with a zero between its halves it would be the same two numbers."""
        signed, _, signature = ring.mint(ring.access, m.AT_JWT, CLAIMS).rpartition(".")
        raw = unb64url(signature)
        with pytest.raises(m.Problem, match="invalid_token"):
            ring.verify(f"{signed}.{b64url(raw[:32] + bytes(1) + raw[32:])}", m.AT_JWT)

    def test_a_signed_token_that_is_too_long_is_none(self, rings):
        ring = m.KeyRing(rings[0])
        with pytest.raises(m.Problem):
            ring.mint(ring.access, m.AT_JWT, CLAIMS | {"x": "y" * 9000})
        header, body, _ = ring.mint(ring.access, m.AT_JWT, CLAIMS).split(".")
        signed = f"{header}.{b64url(json.dumps(CLAIMS | {'x': 'y' * 9000}).encode())}"
        with pytest.raises(m.Problem, match="invalid_token"):
            ring.verify(f"{signed}.{b64url(ring.access.sign(signed.encode()))}", m.AT_JWT)

    @pytest.mark.parametrize("name", ["iss", "sub", "aud", "iat", "exp", "jti", "mad", "token_use"])
    @pytest.mark.parametrize("value", [None, 1.5, [], {"a": {}}, True, ...])
    def test_claims_that_are_missing_or_of_another_type_are_an_invalid_token(self, ring, name, value):
        claims = {key: other for key, other in CLAIMS.items() if key != name}
        if value is not ...:
            claims[name] = value
        with pytest.raises(m.Problem, match="invalid_token"):
            ring.verify(ring.mint(ring.access, m.AT_JWT, claims), m.AT_JWT)

    @pytest.mark.parametrize(
        "other",
        [
            {"scope": ["a"]}, {"client_id": 1}, {"sid": {}}, {"amr": "pwd"}, {"role": [1]}, {"roles": "x"},
            {"nbf": "soon"}, {"auth_time": "x"}, {"jti": "x"}, {"jti": "0" * 31}, {"jti": "G" * 32}, {"mad": "other"},
            {"token_use": "id"}, {"token_use": "refresh"}, {"client_id": ""}, {"sub": "a user, without sid"},
            {"mad": "admin", "client_id": ""}, {"mad": "admin", "sub": "a user, without sid"},
        ],
    )
    def test_a_claim_that_the_program_would_misread_is_an_invalid_token(self, ring, other):
        with pytest.raises(m.Problem, match="invalid_token"):
            ring.verify(ring.mint(ring.access, m.AT_JWT, CLAIMS | other), m.AT_JWT)

    @pytest.mark.parametrize("payload", [b"[]", b"1", b"{", b"[" * 2000, b"\xff"])
    def test_a_payload_that_is_no_object_is_an_invalid_token(self, ring, payload):
        header = ring.mint(ring.access, m.AT_JWT, CLAIMS).partition(".")[0]
        signed = f"{header}.{b64url(payload)}"
        with pytest.raises(m.Problem, match="invalid_token"):
            ring.verify(f"{signed}.{b64url(ring.access.sign(signed.encode()))}", m.AT_JWT)

    def test_what_is_there_beside_is_let_in(self, ring):
        claims = CLAIMS | {"nbf": 1, "scope": "", "urn:example": {"nested": [1]}}
        assert ring.verify(ring.mint(ring.access, m.AT_JWT, claims), m.AT_JWT) == claims


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
