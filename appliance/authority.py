"""The box's own CA, and the certificate that it makes for the ports of a box with `tls = self`."""

import datetime
import ipaddress
import os
import re
import secrets
import socket
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.base import StartupError
from appliance.base.files import read_owned, write_durably
from appliance.base.keys import lock_ring
from appliance.base.settings import Options
from appliance.base.store import Store
from appliance.base.tls import Description, Pair, context_of, describe_certificate, read_pair
from microauthd import Caller, Idp, LOCAL, Problem, Seal, audit

# == Names =====================================================================
# What the box is called, and where it is reached. The certificate is for these, and the CA for nothing else.

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Links of containers and virtual machines: networks within this machine, which come and go.
INNER_LINK = re.compile(r"docker\d|br-[0-9a-f]{12}|veth|virbr|cni|flannel|cali|podman|lxc|lxdbr|vnet")
TEMPORARY, DEPRECATED, TENTATIVE = 0x01, 0x20, 0x40  # IFA_F_… of <linux/if_addr.h>


def read_lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def ipv4_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine's links, loopback and those of containers apart. proc_pid_net(5)."""
    inner = []
    for fields in map(str.split, read_lines("/proc/net/route")[1:]):
        destination, mask = (int.from_bytes(bytes.fromhex(fields[column]), "little") for column in (1, 7))
        if mask and INNER_LINK.match(fields[0]):
            inner.append((destination, mask))
    found, last = [], ""
    for line in read_lines("/proc/net/fib_trie"):
        if match := re.fullmatch(r"\s*\|-- ([0-9.]+)", line):
            last = match[1]
        elif line.strip() == "/32 host LOCAL":
            address = ipaddress.IPv4Address(last)
            if not address.is_loopback and not any(int(address) & mask == network for network, mask in inner):
                found.append(last)
    return list(dict.fromkeys(found))


def ipv6_addresses() -> list[str]:
    """Return the IPv6 addresses of this machine that last: none of a link alone (RFC 4291 §2.5.6), none of those that
    change every day (RFC 8981).
    """
    found = []
    for fields in map(str.split, read_lines("/proc/net/if_inet6")):
        address = ipaddress.IPv6Address(bytes.fromhex(fields[0]))
        passing = int(fields[4], 16) & (TEMPORARY | DEPRECATED | TENTATIVE)
        if not (address.is_loopback or address.is_link_local or passing or INNER_LINK.match(fields[5])):
            found.append(str(address))
    return found


def machine_names() -> list[str]:
    """Return the host name, and the one by which multicast DNS finds it (RFC 6762 §3)."""
    name = socket.gethostname().lower().rstrip(".")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) or name.partition(".")[0] == "localhost":
        return []
    return list(dict.fromkeys((name, name.partition(".")[0] + ".local")))


def listening_addresses(options: Options) -> list[str]:
    """Return the addresses of this machine at which a port listens."""
    found = []
    for ip in {options.auth_ip, options.admin_ip}:
        if ip in ("0.0.0.0", "::"):  # noqa: S104 - it is compared, not bound
            found += ipv4_addresses() + (ipv6_addresses() if ip == "::" else [])
        else:
            found.append(ip)
    return found


def proposed_name() -> str:
    """Return the name to propose for the box: what other machines of a network without a name server find it by."""
    return (machine_names() or ["localhost"])[-1]


def wanted_names(options: Options) -> list[str]:
    """Return the names and addresses that the certificate of the box must have, those of loopback last.

    In a container the machine's own are not asked: they change with each container, and nobody outside knows them.
    """
    hosts = [urlsplit(issuer).hostname or "" for issuer in (options.auth_issuer, options.admin_issuer)]
    hosts += [host for host in options.tls_names.split(",") if host]
    if not options.docker:
        hosts += machine_names() + listening_addresses(options)
    return [*dict.fromkeys(host for host in hosts if host and host not in LOOPBACK_NAMES), *LOOPBACK_NAMES]


def general_name(name: str, is_constraint=False):
    """Return a name or an address as a certificate has it; in a constraint an address is a network. RFC 5280 §4.2.1.10.
    """
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_network(name) if is_constraint else ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# == Certificates ==============================================================

DAY = 86400
CA_DAYS, LEAF_DAYS = 3650, 90
RENEW_DAYS = 30  # before its end: at two thirds of its life
CA_WARNING_DAYS = 90
PEM = serialization.Encoding.PEM
KEY_OWNER = "authority"  # what the sealed key is bound to


class Authority(msgspec.Struct, frozen=True):
    """The CA of the box, as the database has it.

    The root's key was destroyed when it had signed the intermediate; the key of the intermediate is sealed.
    """

    intermediate: str  # PEM
    sealed_key: str
    names: list[str]  # that it may sign for, and that every certificate has
    root: str = ""  # PEM; the database has it in a row of its own too, which a route answers with


def key_as_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def begin_certificate(common_name: str, key, issuer, issuer_key, now: int, end: int):
    """Return a builder with what every certificate has. It begins a day before now: clocks of clients may be behind."""
    from cryptography import x509

    at = datetime.datetime.fromtimestamp
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name[:64])])
    return (
        x509.CertificateBuilder(issuer or subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(at(now - DAY, datetime.UTC)).not_valid_after(at(end, datetime.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )


def key_usage(*uses: str):
    from cryptography import x509

    fields = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )
    return x509.KeyUsage(**{field: field in uses for field in fields})


def make_authority(seal: Seal, names: list[str], now: int) -> Authority:
    """Make a root and the only certificate it ever signs: an intermediate for these names and addresses alone.

    RFC 5280 §4.2.1.9, §4.2.1.10. The root's key is in memory only, and gone when this returns: nobody, with whatever of
    this box in hand, can make a certificate for another name that a client of the root would take.
    """
    from cryptography import x509

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    end, title = now + CA_DAYS * DAY, f"{names[0][:32]} {secrets.token_hex(3)}"  # no two roots have the same name
    root = (
        begin_certificate(f"microauthd root {title}", root_key, None, root_key, now, end)
        .add_extension(x509.BasicConstraints(True, 1), True)
        .add_extension(key_usage("key_cert_sign", "crl_sign"), True).sign(root_key, hashes.SHA256())
    )
    permitted = [general_name(name, is_constraint=True) for name in names]
    intermediate = (
        begin_certificate(f"microauthd {title}", key, root.subject, root_key, now, end)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(key_usage("key_cert_sign", "crl_sign"), True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.NameConstraints(permitted, None), True).sign(root_key, hashes.SHA256())
    )
    sealed = seal.close(key_as_pem(key).decode(), KEY_OWNER)
    return Authority(intermediate.public_bytes(PEM).decode(), sealed, names, root.public_bytes(PEM).decode())


def make_certificate(seal: Seal, authority: Authority, now: int) -> bytes:
    """Make a key and a certificate for all names of the box. Return key, certificate and intermediate, as one PEM file:
    what is one file is never half replaced. Raises StartupError if the seal key is another.
    """
    from cryptography import x509

    issuer = x509.load_pem_x509_certificate(authority.intermediate.encode())
    try:
        opened = seal.open(authority.sealed_key, KEY_OWNER)
    except Problem:
        raise StartupError(
            "the key of the box's CA does not open: the seal key is not the one it was sealed with; restore a backup, "
            "or make a new CA with microauthd certificate new"
        ) from None
    issuer_key = serialization.load_pem_private_key(opened.encode(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + LEAF_DAYS * DAY, int(issuer.not_valid_after_utc.timestamp()))
    certificate = (
        begin_certificate(authority.names[0], key, issuer.subject, issuer_key, now, end)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(key_usage("digital_signature"), True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in authority.names]), False)
        .sign(issuer_key, hashes.SHA256())
    )
    return key_as_pem(key) + certificate.public_bytes(PEM) + authority.intermediate.encode()


# == Life ======================================================================
# The database has the CA: a backup takes it along, and where the database is encrypted, so is its key. The files ca.pem
# and tls-self.pem are made of it, so whatever a crash leaves of them is made again.


def describe(pem: str) -> Description:
    described = describe_certificate(pem.encode())
    assert described, "a certificate of our own"
    return described


def find_authority(store: Store) -> Authority | None:
    known = store.meta("authority")
    return msgspec.json.decode(known, type=Authority) if known else None


class PreparedAuthority(msgspec.Struct, frozen=True):
    """A CA that was made before the set-up, for a page that it is done at; `seal` is of the memory alone."""

    authority: Authority
    seal: Seal


def put_authority(idp: Idp, caller: Caller, prepared: PreparedAuthority | None = None) -> Authority:
    """Make a CA for the names that the box has now, and store it in place of the one before. Return it.

    One that was prepared for all of these names is taken instead: somebody may trust it already.
    """
    names = wanted_names(idp.options)
    if prepared and all(name in prepared.authority.names for name in names):
        key = prepared.seal.open(prepared.authority.sealed_key, KEY_OWNER)
        authority = msgspec.structs.replace(prepared.authority, sealed_key=idp.seal.close(key, KEY_OWNER))
    else:
        authority = make_authority(idp.seal, names, idp.now())
    with idp.store.transaction():
        idp.store.put_meta("authority", msgspec.json.encode(authority).decode())
        idp.store.put_meta("authority_root", authority.root)
        audit(idp, caller, "authority_made", "", f"sha256={describe(authority.root).sha256}")
    return authority


def read_file(path: str) -> bytes:
    """Return the content of a file of ours, empty where there is none. Raises StartupError if it is not believed."""
    try:
        return read_owned(path)
    except FileNotFoundError:
        return b""


def is_due(content: bytes, authority: Authority, now: int, is_believed=True) -> bool:
    """Return whether a certificate file is to be made anew: it is damaged, of another CA, or in its last third.

    While the clock cannot be believed one that has not ended by it stays: another could begin in the future.
    """
    try:
        context_of(Pair(content), "", "")
    except ValueError:
        return True
    described = describe_certificate(content)
    if not described or authority.intermediate.encode() not in content:
        return True
    if not is_believed:
        return now >= described.not_after
    if now < described.not_before:
        return True
    end = min(now + LEAF_DAYS * DAY, describe(authority.intermediate).not_after)
    # Near the end of the CA another one would hardly last longer.
    return now >= described.not_after - RENEW_DAYS * DAY and end >= described.not_after + DAY


def forbid_found_ca(options: Options):
    """Raise StartupError if files are there that a first CA of the box would replace."""
    for path in (options.ca_file, options.self_made_file):
        if os.path.lexists(path):
            raise StartupError(f"{path} is there already, and is not of a CA of this box: move it away")


def needs_work(options: Options, store: Store, now: int, is_believed=True) -> bool:
    """Return whether keep_certificate() would write anything."""
    authority = find_authority(store)
    return (
        authority is None
        or read_file(options.ca_file) != authority.root.encode()
        or is_due(read_file(options.self_made_file), authority, now, is_believed)
    )


def keep_certificate(idp: Idp, caller: Caller = LOCAL, renew=False) -> Description | None:
    """Make what a box with `tls = self` is to have and has not: the CA, its root's file, a certificate that lasts.

    Return the certificate if one was made; `renew` makes one in any case. Processes that serve see the new file. To
    repeat it does no harm. Raises StartupError if a file is not believed, OSError if one cannot be written.
    """
    options = idp.options
    with lock_ring(options.self_made_file):
        authority = find_authority(idp.store)
        if authority is None:
            forbid_found_ca(options)
            authority = put_authority(idp, caller.acting_as("system"))
        if read_file(options.ca_file) != authority.root.encode():
            write_durably(options.ca_file, authority.root.encode())
        if not renew and not is_due(read_file(options.self_made_file), authority, idp.now(), idp.check_clock()):
            return None
        content = make_certificate(idp.seal, authority, idp.now())
        write_durably(options.self_made_file, content)
        return describe(content.decode())


def renew_certificate(idp: Idp):
    """Keep the certificate of a running box."""
    if idp.options.tls == "self" and (made := keep_certificate(idp)):
        idp.log("certificate.renewed", "notice", file=idp.options.self_made_file, sha256=made.sha256)


def replace_authority(idp: Idp, caller: Caller):
    """Make a new CA, for the names that the box has now, and a certificate of it. Clients must trust the new root.

    If it is interrupted once the CA is stored, the running server or the next start makes the files of it.
    """
    with lock_ring(idp.options.self_made_file):
        put_authority(idp, caller)
    keep_certificate(idp, caller)


def missing_names(options: Options, authority: Authority) -> list[str]:
    """Return the names and addresses of the box that its CA may not sign for: it has them since."""
    return [name for name in wanted_names(options) if name not in authority.names]


class CertificateFile(msgspec.Struct):
    """A certificate in a file: that of a port, `auth` or `admin`, or the root of the box, `ca`. Times are Unix seconds.
    """

    use: str
    file: str
    sha256: str | None = None
    not_after: int | None = None
    names: list[str] = []  # those that a CA may sign for
    problem: str = ""  # a sentence, where it cannot be served


def describe_ports(options: Options) -> list[CertificateFile]:
    """Describe the files that the ports serve."""
    ports = []
    for side in ("auth", "admin"):
        cert_file, key_file, password = options.tls_files(side)
        if not cert_file:
            continue
        port = CertificateFile(side, cert_file)
        ports.append(port)
        try:
            pair = read_pair(cert_file, key_file, password)
            context_of(pair, password, cert_file, key_file)
        except ValueError as error:
            port.problem = str(error)
            continue
        if described := describe_certificate(pair.certificate):
            port.sha256, port.not_after, port.names = described.sha256, described.not_after, described.names
    return ports


def describe_root(options: Options) -> CertificateFile | None:
    """Describe the file of the root that clients of a box with `tls = self` trust, None where there is none."""
    described = describe_certificate(read_file(options.ca_file)) if options.tls == "self" else None
    return CertificateFile("ca", options.ca_file, described.sha256, described.not_after) if described else None


def describe_authority(options: Options, store: Store) -> tuple[CertificateFile | None, list[str]]:
    """Describe the CA of a box with `tls = self`, None where there is none; and the names that it is missing."""
    authority = find_authority(store) if options.tls == "self" else None
    if authority is None:
        return None, []
    root = describe(authority.root)
    shown = CertificateFile("ca", options.ca_file, root.sha256, root.not_after, authority.names)
    return shown, missing_names(options, authority)
