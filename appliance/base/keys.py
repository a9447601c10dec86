"""Key rings in files, and signing and verifying with their keys. RFC 7515, 7517, 7518, 7638."""

import base64
import binascii
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from typing import cast

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from appliance.base import StartupError
from appliance.base.files import guard_private, open_owned


SHA256 = hashes.SHA256()
PKCS1 = padding.PKCS1v15()
ECDSA_SHA256 = ec.ECDSA(SHA256)
B64URL = bytes.maketrans(b"+/", b"-_")
PEM_BLOCK = re.compile(
    rb"(?:^# state=(\w+) since=(\d+)[^\n]*\n)?^-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?^-----END \3-----", re.S | re.M
)


class KeyEntry(msgspec.Struct, frozen=True):
    """A private key of a ring file: unencrypted PKCS#8 DER, its state, and Unix seconds since when it has it."""

    der: bytes
    state: str  # next | active | retired
    since: int


def b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def b64url_bytes(raw: bytes) -> bytes:
    """Return what b64url() does, as bytes and in half the time: every token needs two."""
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(B64URL)


def unb64url(text: str) -> bytes:
    """Decode unpadded base64url. Raises ValueError if it is not in canonical form. RFC 7515 §2."""
    raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if b64url(raw) != text:
        raise ValueError("not canonical base64url")
    return raw


def make_key(alg, rsa_bits, now) -> KeyEntry:
    key = ec.generate_private_key(ec.SECP256R1()) if alg == "ES256" else rsa.generate_private_key(65537, rsa_bits)
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return KeyEntry(der, "active", now)


def write_ring(entries, passphrase: str) -> bytes:
    """Return the content of a ring file: one PEM block per key, with its state in the comment line above."""
    blocks = []
    for entry in entries:
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase:
            encryption = serialization.BestAvailableEncryption(passphrase.encode())
        key = serialization.load_der_private_key(entry.der, None)
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        blocks.append(b"# state=%s since=%d\n" % (entry.state.encode(), entry.since) + pem)
    return b"".join(blocks)


def is_consistent(key) -> bool:
    """Return whether the numbers of an RSA key satisfy RFC 8017 §3.2; no key with a flipped bit does.

    OpenSSL also tests the primality of two numbers, which would add 45 ms to every start.
    """
    private = key.private_numbers()
    n, e, d, p, q = private.public_numbers.n, private.public_numbers.e, private.d, private.p, private.q
    return (
        p * q == n
        and p > 1
        and q > 1
        and all(
            e * d % (prime - 1) == 1 and part == d % (prime - 1)
            for prime, part in ((p, private.dmp1), (q, private.dmq1))
        )
        and private.iqmp * q % p == 1
    )


def read_ring_file(path: str) -> bytes:
    """Return the content of a ring file. Raises StartupError if it is missing, no file, or not to be believed: see
    open_owned().
    """
    try:
        with os.fdopen(open_owned(path), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a file")
            content = file.read()
            guard_private(file.fileno(), path, "it is a private key")
    except FileNotFoundError:
        raise StartupError(
            f"the signing key {path} is missing: restore it, or run setup anew without the database"
        ) from None
    except OSError as error:
        raise StartupError(f"the signing key {path} cannot be read: {error.strerror}") from None
    return content


def open_key(path: str, pem: bytes, encrypted: bool, passphrase: str) -> bytes:
    """Return a private key of a ring file as unencrypted PKCS#8 DER. Raises StartupError."""
    if encrypted and not passphrase:
        raise StartupError(f"the signing key {path} is encrypted, and no passphrase for it is given")
    try:
        key = serialization.load_pem_private_key(
            pem, passphrase.encode() if encrypted else None, unsafe_skip_rsa_key_validation=True
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the last if the algorithm's identifier is damaged
        raise StartupError(
            f"the signing key {path} does not open: its passphrase is wrong, or the file is damaged"
        ) from None
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < 2048:
            raise StartupError(
                f"the signing key {path} is an RSA key of {key.key_size} bits; RFC 7518 §3.3 asks for 2048"
            )
        if not is_consistent(key):
            raise StartupError(
                f"the signing key {path} is damaged: its numbers do not belong together; restore a backup"
            )
    elif not (isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1"):
        raise StartupError(f"the signing key {path} is neither RSA nor P-256")
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def parse_ring(content: bytes, path: str, passphrase: str) -> list[KeyEntry]:
    """Return the keys in the content of a ring file. `path` is for the messages. See read_ring()."""
    entries = []
    for match in PEM_BLOCK.finditer(content):
        state, since, kind = match.groups()
        encrypted = kind == b"ENCRYPTED PRIVATE KEY" or b"Proc-Type: 4,ENCRYPTED" in match.group()
        der = open_key(path, match.group()[match.group().index(b"-----BEGIN") :], encrypted, passphrase)
        entries.append(KeyEntry(der, (state or b"active").decode(), int(since or 0)))
    begun = len(re.findall(rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----", content, re.M))
    stated = len(re.findall(rb"^# state=", content, re.M))
    if (
        begun != len(entries)
        or stated not in (0, len(entries))
        or any(entry.state not in ("next", "active", "retired") for entry in entries)
    ):
        raise StartupError(f"the signing key {path} is damaged: a part of it is missing; restore a backup")
    if not any(entry.state == "active" for entry in entries):
        raise StartupError(f"the signing key {path} holds no usable key: it is empty or damaged; restore a backup")
    return entries


def read_ring(path: str, passphrase: str) -> list[KeyEntry]:
    """Return the keys of a ring file; a single PEM key without a comment is a ring too.

    Raises StartupError: a bad key stops the start and is never replaced by a new one.
    """
    return parse_ring(read_ring_file(path), path, passphrase)


def alg_of(entry: KeyEntry) -> str:
    key = serialization.load_der_private_key(entry.der, None, unsafe_skip_rsa_key_validation=True)
    return "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"


def promote(entries, now: int, overlap: int) -> list[KeyEntry]:
    """Return a ring as of `now`: a next key published for `overlap` seconds turns active, its predecessor retired."""
    entries = list(entries)
    for entry in [entry for entry in entries if entry.state == "next" and entry.since + overlap <= now]:
        alg, at = alg_of(entry), entry.since + overlap
        entries = [
            msgspec.structs.replace(other, state="retired", since=at)
            if other.state == "active" and alg_of(other) == alg
            else msgspec.structs.replace(other, state="active", since=at)
            if other is entry
            else other
            for other in entries
        ]
    return entries


def next_promotion_at(entries, overlap: int) -> int | None:
    """Return the Unix seconds at which the first next key turns active, or None if there is none."""
    return min((entry.since + overlap for entry in entries if entry.state == "next"), default=None)


class PublicKey:
    """A loaded public key: it verifies."""

    def __init__(self, public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        self.public = public
        if isinstance(self.public, rsa.RSAPublicKey):
            self.alg = "RS256"
            numbers = self.public.public_numbers()
            size = (numbers.n.bit_length() + 7) // 8
            self.jwk = {
                "e": b64url(numbers.e.to_bytes(3, "big").lstrip(b"\0")), "kty": "RSA",
                "n": b64url(numbers.n.to_bytes(size, "big")),
            }
        else:
            self.alg = "ES256"
            point = self.public.public_numbers()
            self.jwk = {
                "crv": "P-256", "kty": "EC", "x": b64url(point.x.to_bytes(32, "big")),
                "y": b64url(point.y.to_bytes(32, "big")),
            }
        # RFC 7638 §3: the required members in lexicographic order, no white space.
        self.kid = b64url(hashlib.sha256(json.dumps(self.jwk, separators=(",", ":"), sort_keys=True).encode()).digest())

    def header(self, typ: str) -> bytes:
        """Return the encoded JOSE header of a token that this key signs. RFC 7515 §4.1."""
        return b64url_bytes(msgspec.json.encode({"alg": self.alg, "typ": typ, "kid": self.kid}))

    def public_jwk(self):
        return {**self.jwk, "kid": self.kid, "use": "sig", "alg": self.alg}

    def as_pem(self) -> str:
        return self.public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    @staticmethod
    def from_pem(pem: str) -> "PublicKey":
        key = serialization.load_pem_public_key(pem.encode())
        return PublicKey(cast(rsa.RSAPublicKey | ec.EllipticCurvePublicKey, key))  # as_pem() writes no other

    def verify(self, signature: bytes, message: bytes):
        """Raise InvalidSignature or ValueError if the signature is wrong."""
        if isinstance(self.public, rsa.RSAPublicKey):
            self.public.verify(signature, message, PKCS1, SHA256)
        else:
            if len(signature) != 64:
                raise InvalidSignature
            r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            self.public.verify(encode_dss_signature(r, s), message, ECDSA_SHA256)


class Key(PublicKey):
    """A loaded key: it signs and verifies."""

    def __init__(self, entry: KeyEntry):
        self.state, self.since = entry.state, entry.since
        key = serialization.load_der_private_key(entry.der, None, unsafe_skip_rsa_key_validation=True)
        self.private = cast(rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, key)  # read_ring() accepts no other
        super().__init__(self.private.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return a signature; of ECDSA it is r and s, 32 bytes each. RFC 7518 §3.3, §3.4."""
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(message, PKCS1, SHA256)
        r, s = decode_dss_signature(self.private.sign(message, ECDSA_SHA256))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def replace_keys(entries, kids, rsa_bits: int, now: int) -> list[KeyEntry]:
    """Return a ring without these keys. An active key is replaced by the next one of its `alg`, or by a new one."""
    gone = [entry for entry in entries if Key(entry).kid in kids]
    rest = [entry for entry in entries if entry not in gone]
    for alg in sorted({alg_of(entry) for entry in gone if entry.state == "active"}):
        waiting = next((entry for entry in rest if entry.state == "next" and alg_of(entry) == alg), None)
        fresh = msgspec.structs.replace(waiting, state="active", since=now) if waiting else make_key(alg, rsa_bits, now)
        rest = [entry for entry in rest if entry is not waiting] + [fresh]
    return rest


@contextlib.contextmanager
def lock_ring(path: str):
    """Hold the lock under which a local command or a server's upkeep changes a ring. flock(2)."""
    descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
