"""The certificates that the ports serve: read, described, and taken up by every process when their files change."""

import contextlib
import hashlib
import os
import ssl
import time
from collections.abc import Callable

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from appliance.base.clock import sleep
from appliance.base.files import file_fingerprint
from appliance.base.shared import Numbers, Shared

# == Contexts ==================================================================
# A certificate and its key, as the ssl module takes them. Knows nothing of connections.


class Pair(msgspec.Struct, frozen=True):
    """A certificate with its chain, and its private key, as PEM. `key` is empty if `certificate` has it too."""

    certificate: bytes
    key: bytes = b""


def read_pkcs12(content: bytes, password: str) -> Pair:
    from cryptography.hazmat.primitives.serialization import (
        pkcs12,
    )  # seldom needed, and it has its share of the start-up

    key, certificate, chain = pkcs12.load_key_and_certificates(content, password.encode() or None)
    if key is None or certificate is None:
        raise ValueError("no key or no certificate")
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem += b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (certificate, *chain))
    return Pair(pem)


MOST_OCTETS = 1 << 19  # of a file


def read_pair(cert_file: str, key_file: str = "", password: str = "") -> Pair:
    """Read `cert_file`, PEM or PKCS#12, told apart by content, and `key_file`, if the first does not hold the key.

    Raises ValueError with a sentence for the operator.
    """
    contents = []
    for name in filter(None, (cert_file, key_file)):
        try:
            with open(name, "rb") as file:
                contents.append(file.read(MOST_OCTETS + 1))
        except OSError as error:
            raise ValueError(f"The TLS file {name} cannot be read: {error.strerror}.") from None
        if len(contents[-1]) > MOST_OCTETS:
            raise ValueError(f"The TLS file {name} is larger than {MOST_OCTETS} octets.")
    if b"-----BEGIN " in contents[0]:
        return Pair(*contents)
    try:
        return read_pkcs12(contents[0], password)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"The TLS file {cert_file} cannot be used: it is neither PEM nor PKCS#12, or its passphrase is wrong."
        ) from error


@contextlib.contextmanager
def file_in_memory(content: bytes):
    """Yield a path of this content, which is never on a disk: the ssl module loads from files only. memfd_create(2)."""
    with os.fdopen(os.memfd_create("tls", os.MFD_CLOEXEC), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def context_of(pair: Pair, password: str, cert_file: str, key_file: str = "") -> ssl.SSLContext:
    """Return a server context for TLS 1.2 and later. The files are named in the sentence of a ValueError.

    RFC 9325 §3.1, §4.2.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2: forward secrecy and AEAD only
    context.set_alpn_protocols(["http/1.1"])
    try:
        with contextlib.ExitStack() as stack:
            certificate = stack.enter_context(file_in_memory(pair.certificate))
            key = stack.enter_context(file_in_memory(pair.key)) if pair.key else None
            # A passphrase that is empty, never None: OpenSSL would ask the terminal.
            context.load_cert_chain(certificate, key, lambda: password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"The TLS key does not belong to the certificate {cert_file}.") from None
        if (
            error.reason == "NO_START_LINE"
            or (error.reason is None
            and not pair.key
            and b"PRIVATE KEY-----" not in pair.certificate)
        ):
            raise ValueError(
                f"The TLS file {key_file or cert_file} has no private key or no certificate in it."
            ) from None
        raise ValueError(
            f"The TLS key of {cert_file} cannot be opened: the passphrase is wrong or missing, or the file is damaged."
        ) from None
    except OSError as error:
        raise ValueError(f"The TLS file {cert_file} cannot be used: {error.strerror}.") from error
    return context


def tls_context(cert_file: str, key_file: str = "", password: str = "") -> ssl.SSLContext:
    """Return a server context of files: see read_pair() and context_of(). Raises ValueError."""
    return context_of(read_pair(cert_file, key_file, password), password, cert_file, key_file)


# == Descriptions ==============================================================


class Description(msgspec.Struct, frozen=True):
    """What a certificate says of itself. Times are Unix seconds; `sha256` is its fingerprint, upper-case hex."""

    sha256: str
    not_before: int
    not_after: int
    names: list[str]

    def is_valid_at(self, now: float) -> bool:
        return self.not_before <= now <= self.not_after


def fingerprint_of(der: bytes) -> str:
    """Return the SHA-256 fingerprint of a certificate as browsers and `openssl x509 -fingerprint` show it."""
    return hashlib.sha256(der).digest().hex(":").upper()


def describe_certificate(pem: bytes) -> Description | None:
    """Describe the first certificate in PEM; None if it is one that OpenSSL takes and this parser does not."""
    from cryptography import x509  # 16 ms of a start, and 0.8 MB, which a box without TLS does without

    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            shown = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        except x509.ExtensionNotFound:
            shown = []
        return Description(
            fingerprint_of(certificate.public_bytes(serialization.Encoding.DER)),
            int(certificate.not_valid_before_utc.timestamp()), int(certificate.not_valid_after_utc.timestamp()), shown,
        )
    except Exception:  # whatever the parser finds wrong with somebody's file, it must not stop the supervisor
        return None


# == Ports =====================================================================
# The process that forks the others reads the files, and puts what it has checked into shared memory; every process
# serves what stands there. So a worker that is replaced serves the same as its neighbours, whatever the files hold by
# then.


class SharedPair(Shared):
    """A Pair, for all processes of a server. One process writes it."""

    SIZE = 2 * MOST_OCTETS  # pages that are not used take no memory
    lengths = Numbers("Q", 2)  # of certificate and key
    digest = Numbers("B", 32)  # of lengths and octets: it tells versions apart, and one that is half written
    octets = Numbers("B", SIZE)

    def put(self, pair: Pair):
        content = pair.certificate + pair.key
        self.lengths[0], self.lengths[1] = len(pair.certificate), len(pair.key)
        self.octets[: len(content)] = content
        self.digest[:] = self.digest_of(content)

    def digest_of(self, content: bytes) -> bytes:
        return hashlib.sha256(bytes(self.lengths) + content).digest()

    def get(self) -> Pair | None:
        """Return the pair, None while it is being written."""
        split, length = self.lengths[0], self.lengths[0] + self.lengths[1]
        content = bytes(self.octets[:length])
        if self.digest_of(content) != self.digest:
            return None
        return Pair(content[:split], content[split:])


def show_time(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


WARNING_DAYS = (1, 7, 21)  # before the end of a certificate


class PortCertificate:
    """The certificate that a port serves. `port_name` is auth or admin."""

    CHECK_SECONDS = 2  # between two looks at the files
    RETRY_SECONDS = 8  # after files that do not fit

    def __init__(self, port_name: str, cert_file: str, key_file: str = "", password: str = ""):
        self.port_name, self.cert_file, self.key_file, self.password = port_name, cert_file, key_file, password
        self.shared = SharedPair()
        self.seen = b""  # the digest of what this process serves
        self.retry_at = 0.0  # after it could not be taken up, for want of memory
        self.described: tuple[bytes, Description | None] = (b"", None)
        # Of the process that reads the files:
        self.in_force: tuple | None = None  # fingerprints of the files that were taken up
        self.last_found: tuple | None = None  # and of those that the last check found
        self.check_at = 0.0
        self.refused = ""  # why the last ones were not
        self.warned: tuple[bytes, int] = (b"", -1)  # digest, and the days before its end of the last warning

    # -- every process --

    def pair(self) -> Pair:
        while (pair := self.shared.get()) is None:  # another process is writing it at this moment
            sleep(0.001)
        return pair

    def context(self) -> ssl.SSLContext:
        """Return a context of the certificate in force."""
        digest = bytes(self.shared.digest)
        context = context_of(self.pair(), self.password, self.cert_file, self.key_file)
        self.seen = digest
        return context

    def changed_context(self) -> ssl.SSLContext | None:
        """Return a context of the certificate in force if it is not the one that this process serves.

        Connections that are open keep the context they began with.
        """
        if self.shared.digest == self.seen or time.monotonic() < self.retry_at:
            return None
        self.retry_at = time.monotonic() + self.RETRY_SECONDS
        context = self.context()
        self.retry_at = 0.0
        return context

    def describe(self) -> Description | None:
        """Describe the certificate in force."""
        digest = bytes(self.shared.digest)
        if self.described[0] != digest:
            self.described = digest, describe_certificate(self.pair().certificate)
        return self.described[1]

    def problem(self, now: float) -> str:
        """Return why the files are not in force, as a sentence, or ""."""
        try:
            self.read(now)
        except ValueError as error:
            return str(error)
        return ""

    # -- the process that reads the files --

    def find(self) -> tuple | None:
        """Return the fingerprints of the files, None if one is missing."""
        try:
            return tuple(file_fingerprint(path) for path in (self.cert_file, self.key_file) if path)
        except OSError:
            return None

    def read(self, now: float) -> Pair:
        """Return the pair of the files, if it can be served from now on. Raises ValueError with a sentence."""
        pair = read_pair(self.cert_file, self.key_file, self.password)
        context_of(pair, self.password, self.cert_file, self.key_file)
        old, new = self.describe() if self.in_force else None, describe_certificate(pair.certificate)
        if old and new and old.is_valid_at(now) and not new.is_valid_at(now):
            when = f"ended at {show_time(new.not_after)}" if new.not_after < now else (
                f"begins only at {show_time(new.not_before)}")
            raise ValueError(f"The certificate {self.cert_file} {when}.")
        return pair

    def load(self):
        """Read the files before anything is served. An expired certificate is served all the same: a client that goes
        by it decides. Raises ValueError with a sentence."""
        found = self.find()
        self.shared.put(self.read(0))
        self.in_force = self.last_found = found

    def check(self, now: float, log: Callable, at_once=False):
        """Take the files up if they have changed, and warn of the end of the certificate.

        Files that have just changed are left for the next look: the key may follow its certificate. What does not fit
        leaves the old pair in force, and is tried again.
        """
        if time.monotonic() < self.check_at and not at_once:
            return
        self.check_at = time.monotonic() + self.CHECK_SECONDS
        found = self.find()
        is_settled, self.last_found = found == self.last_found, found
        if at_once or (is_settled and found != self.in_force):
            self.take_up(now, found, log)
        elif found == self.in_force:
            self.refused = ""
        self.warn(now, log)

    def take_up(self, now: float, found: tuple | None, log: Callable):
        try:
            pair = self.read(now)
            if pair != self.pair():
                self.shared.put(pair)
                log("certificate.changed", "notice", server=self.port_name, **self.summary())
            self.in_force, self.refused = found, ""
        except Exception as error:  # whatever stands in the files, it must not stop the supervisor
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            if reason != self.refused:
                log("certificate.refused", "error", server=self.port_name, reason=reason)
            self.refused = reason
            self.check_at = time.monotonic() + self.RETRY_SECONDS

    def summary(self) -> dict:
        described = self.describe()
        return {"sha256": described.sha256, "ends": show_time(described.not_after)} if described else {}

    def warn(self, now: float, log: Callable):
        """Log that the certificate ends: once for each of WARNING_DAYS, and once when it has ended."""
        described = self.describe()
        if described is None:
            return
        left = described.not_after - now
        days = 0 if left <= 0 else next((days for days in WARNING_DAYS if left <= days * 86400), -1)
        if days >= 0 and self.warned != (self.described[0], days):
            log(
                "certificate.ends" if days else "certificate.ended", "warning" if days else "error",
                server=self.port_name, file=self.cert_file, at=show_time(described.not_after),
            )
            self.warned = self.described[0], days


def certificate_not_after(certificates: dict[str, PortCertificate]) -> dict[str, int]:
    """Return when the certificate of each port that speaks TLS ends, in Unix seconds."""
    described = {name: certificate.describe() for name, certificate in certificates.items()}
    return {name: one.not_after for name, one in described.items() if one}


def certificate_warnings(certificates: dict[str, PortCertificate], now: float) -> list[str]:
    """Return a sentence for each port whose certificate ends within WARNING_DAYS, for anyone to read."""
    return [
        f"The certificate of {name} {'ends' if not_after > now else 'ended'} at {show_time(not_after)}."
        for name, not_after in certificate_not_after(certificates).items()
        if not_after - now <= max(WARNING_DAYS) * 86400
    ]
