"""Every setting, declared once as a field of Options, and what loads, checks, describes and writes them."""

import collections
import contextlib
import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from appliance.base import StartupError
from appliance.base.files import guard_private, open_owned, read_secret_file, show_path

# == Options ===================================================================
# Every setting, declared once. Default < file < environment < flag.

Value = TypeVar("Value")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def text(value: str) -> str:
    return value


def boolean(value: str) -> bool:
    word = value.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers within the bounds."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value.strip()) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return parse


def octets(value: str) -> int:
    """Parse a number of octets, which may have a unit; -1 is "auto"."""
    if value.strip().lower() == "auto":
        return -1
    found = re.fullmatch(r"([0-9]{1,13}) ?(|k|m|g)b?", value.strip().lower())
    size = int(found[1]) * {"": 1, "k": 1000, "m": 1000_000, "g": 1000_000_000}[found[2]] if found else 0
    if not 1000_000 <= size <= 1000_000_000_000:
        raise ValueError("must be auto, or a size of 1 MB to 1000 GB, such as 64 MB or 64000000")
    return size


def period(value: str) -> int:
    """Parse how often something is done: off, hourly, daily, weekly, or a number of hours or days; 0 is "off"."""
    words = {"off": "0", "never": "0", "hourly": "1 h", "daily": "1 d", "weekly": "1 w"}
    word = value.strip().lower()
    found = re.fullmatch(r"([0-9]{1,8}) ?(|s|m|h|d|w|hours?|days?|weeks?)", words.get(word, word))
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    length = int(found[1]) * units[found[2][:1]] if found else -1
    if length and not 900 <= length <= 31622400:
        raise ValueError("must be off, hourly, daily, weekly, or a time from 15 m to a year, such as 6 h or 2 days")
    return length


port = whole(1, 65535)
seconds = whole(1, 315360000)
days = whole(0, 9999)


def address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value.strip()))
    except ValueError:
        raise ValueError("must be an IP address") from None


def networks(value: str) -> tuple[Network, ...]:
    """Parse `10.0.0.1, 192.168.7.0/24`."""
    try:
        return tuple(ipaddress.ip_network(part) for part in re.split(r"[,\s]+", value.strip()) if part)
    except ValueError:
        raise ValueError("must be IP addresses or networks, separated by commas") from None


def domain(value: str) -> str:
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?", value.strip()):
        raise ValueError("must be a host name, with a port where the public address has one")
    return value.strip().lower()


def host_names(value: str) -> str:
    """Parse `box.lan, 192.168.7.20`: names and addresses, in the form in which a certificate has them."""
    names = []
    for word in filter(None, re.split(r"[,\s]+", value.strip().lower())):
        try:
            names.append(str(ipaddress.ip_address(word.strip("[]"))))
        except ValueError:
            labels = word.split(".")
            if len(word) > 253 or not all(re.fullmatch(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", label) for label in labels):
                raise ValueError("must be host names and IP addresses, separated by commas") from None
            names.append(word)
    return ",".join(dict.fromkeys(names))


def certificate_source(value: str) -> str:
    if value.strip().lower() not in ("", "self"):
        raise ValueError("must be self, or empty")
    return value.strip().lower()


def issuer(value: str) -> str:
    if value in ("", "microauthd"):  # the original's placeholder, which it never read
        return ""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("must be an http(s) URL without query or fragment (RFC 8414 §2)")
    if not re.fullmatch(r"[A-Za-z0-9._~/-]*", parts.path):
        raise ValueError("must have a path of letters, digits, and . _ ~ - only")
    return value.rstrip("/")


def one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip().lower() not in words:
            raise ValueError("must be one of: " + ", ".join(words))
        return value.strip().lower()

    return parse


def label(value: str) -> str:
    if len(value) > 80 or not value.isprintable():
        raise ValueError("must be at most 80 printable characters")
    return value


def sentence(value: str) -> str:
    if len(value) > 300 or not value.isprintable():
        raise ValueError("must be at most 300 printable characters")
    return value.strip()


def color(value: str) -> str:
    found = re.fullmatch(r"#?([0-9a-fA-F]{6})", value.strip())
    if not found:
        raise ValueError("must be a colour such as 1f5fbf; in a file a # needs quotes around the value")
    return "#" + found[1].lower()


def absolute(value: str) -> str:
    if value and not os.path.isabs(value):
        raise ValueError("must be an absolute path")
    return value


def content_policy(value: str) -> str:
    """Parse a Content-Security-Policy; empty is none. CSP Level 3 §2.2.1: ASCII; a comma would begin another policy."""
    directives = [directive.split() for directive in value.strip().split(";")]
    if not re.fullmatch(r"[ -+\--~]{0,4096}", value.strip()) or not all(
        re.fullmatch("[A-Za-z0-9-]+", words[0]) for words in directives if words
    ):
        raise ValueError(
            "must be directives such as default-src 'self', separated by semicolons, in ASCII without commas"
        )
    return value.strip()


def users(value: str) -> str:
    """Parse names or numbers of users of this machine, separated by commas."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,255}\$?", word) for word in words):
        raise ValueError("must be names or numbers of users of this machine, separated by commas")
    return ",".join(words)


def worker_count(value: str) -> int:
    return -1 if value.strip().lower() == "auto" else whole(0, 64)(value)


def option(
    default: Value, parse: Callable[[str], Value], help: str, ask: str = "", *, group: str, secret: bool = False,
    aliases: tuple[str, ...] = (),
) -> Value:
    """Declare an option as a field of Options: its row of OPTIONS is the field's name, default and metadata."""
    row = {"parse": parse, "help": help, "ask": ask, "group": group, "secret": secret, "aliases": aliases}
    return dataclasses.field(default=default, metadata=row)


# A dataclass, because its fields carry metadata: a row is written once, and the type checker compares what its parser
# returns with the attribute. Without a repr: it would print the secrets.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Options:
    """The settings in force, an attribute an option. `origins` says where each came from."""

    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    # -- files --
    log_file: str = option(
        "microauthd.log", text, "Log file; empty logs to the console only. Where nothing sets it, the console has each "
        "line too.", "Log file?", group="Files"
    )
    log_format: str = option("text", one_of("text", "json"), "One line an event, as text or as JSON.", group="Files")
    log_level: str = option(
        "info", one_of("debug", "info", "warning", "error"), "The least severe event that is logged.", group="Files"
    )
    db_file: str = option("mad.db3", text, "The database.", "Database file?", group="Files")
    db_pass: str = option(
        "", text, "Passphrase of the database (SQLCipher).", "Database passphrase?", secret=True, group="Files"
    )
    db_key_file: str = option(
        "", text, "File of the key of the database in place of a passphrase: 32 octets, or 64 hexadecimal digits.",
        group="Files",
    )
    no_db_pass: bool = option(False, boolean, "Keep the database unencrypted, knowingly.", group="Files")
    backup_folder: str = option(
        "backups", text, "Folder where backups asked for over ADMIN lie until they are fetched, and where those of "
        "backup-every stay; empty: none are made.", group="Files",
    )
    backup_every: int = option(
        0, period, "How often the server makes a backup by itself: off, hourly, daily, weekly, or a time such as 6 h.",
        group="Files",
    )
    backup_keep: int = option(
        7, whole(1, 1000), "How many of the backups made by itself are kept.", group="Files"
    )
    seal_key_file: str = option("seal.key", text, "Key that seals TOTP seeds in the database.", group="Files")
    docker: bool = option(
        False, boolean, "Container: log to standard output, and set up from the environment, never by questions.",
        group="Files",
    )
    # -- certificates --
    tls: str = option(
        "", certificate_source, "self: a port without a certificate of its own serves HTTPS with one that the box "
        "makes and renews.", "A certificate that the box makes itself (self; empty: no)?", group="Certificates",
    )
    tls_names: str = option(
        "", host_names, "Names and addresses that this certificate has besides those of the issuer and of the machine, "
        "separated by commas.", group="Certificates",
    )
    # -- AUTH --
    auth_ip: str = option(
        "127.0.0.1", address, "Address the AUTH server listens on.", "AUTH address?", group="AUTH server"
    )
    auth_port: int = option(9040, port, "TCP port of the AUTH server.", "AUTH port?", group="AUTH server")
    auth_domain: str = option(
        "localhost", domain, "Public host name of AUTH; the issuer is made of it.", "Public host name of AUTH?",
        group="AUTH server",
    )
    auth_domain_no_ssl: bool = option(
        False, boolean, "The issuer made of auth-domain is http, not https.", group="AUTH server"
    )
    oidc_issuer: str = option(
        "", issuer, "The issuer URL, where it is not made of auth-domain; it may have a path.", group="AUTH server"
    )
    auth_ssl_cert_file: str = option(
        "", text, "Certificate (PEM chain or PKCS#12): serve HTTPS.", "AUTH certificate (empty: plain HTTP)?",
        aliases=("auth-ssl-cert",), group="AUTH server",
    )
    auth_ssl_key_file: str = option(
        "", text, "Its private key, where the certificate file does not hold it.", group="AUTH server"
    )
    auth_ssl_cert_pass: str = option(
        "", text, "Passphrase of that key.", "Passphrase of the certificate's key?", secret=True,
        aliases=("auth-ssl-pass",), group="AUTH server",
    )
    auth_insecure_http: bool = option(
        False, boolean, "Allow plain HTTP on an address other than loopback.", group="AUTH server"
    )
    serve_public_auth_files: bool = option(
        False, boolean, "Serve the folder public/ on AUTH.", "Serve the example pages on AUTH?", group="AUTH server"
    )
    public_csp: str = option(
        "default-src 'self' 'unsafe-inline' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'self'",
        content_policy, "Content-Security-Policy of the files of your own public/, in quotes; empty sends none.",
        group="AUTH server",
    )
    enable_auth_swagger: bool = option(False, boolean, "Serve the API description of AUTH.", group="AUTH server")
    workers: int = option(
        -1, worker_count, "AUTH processes; auto is one a core, at most four; 0 serves all in one process.",
        group="AUTH server",
    )
    # -- ADMIN --
    admin_ip: str = option(
        "127.0.0.1", address, "Address the ADMIN server listens on.", "ADMIN address?", group="ADMIN server"
    )
    admin_port: int = option(9041, port, "TCP port of the ADMIN server.", "ADMIN port?", group="ADMIN server")
    admin_domain: str = option(
        "localhost", domain, "Host name of ADMIN; other Host headers are refused.", "Host name of ADMIN?",
        group="ADMIN server",
    )
    admin_domain_no_ssl: bool = option(False, boolean, "ADMIN is reached by http, not https.", group="ADMIN server")
    admin_ssl_cert_file: str = option(
        "", text, "Certificate (PEM chain or PKCS#12): serve HTTPS.", "ADMIN certificate (empty: plain HTTP)?",
        aliases=("admin-ssl-cert",), group="ADMIN server",
    )
    admin_ssl_key_file: str = option(
        "", text, "Its private key, where the certificate file does not hold it.", group="ADMIN server"
    )
    admin_ssl_cert_pass: str = option(
        "", text, "Passphrase of that key.", "Passphrase of the certificate's key?", secret=True,
        aliases=("admin-ssl-pass",), group="ADMIN server",
    )
    admin_insecure_http: bool = option(
        False, boolean, "Allow plain HTTP on an address other than loopback.", group="ADMIN server"
    )
    enable_admin_swagger: bool = option(False, boolean, "Serve the API description of ADMIN.", group="ADMIN server")
    admin_socket_users: str = option(
        "", users, "Users of this machine who may use admin.sock as root and the server's own user do, separated by "
        "commas.", group="ADMIN server",
    )
    metrics_allow: tuple[Network, ...] = option(
        (), networks,
        "Addresses that may read /metrics without a token, if they connect themselves: not through a proxy.",
        group="ADMIN server",
    )
    metrics_on_auth: bool = option(
        False, boolean, "Serve /metrics on AUTH too, without the names of clients.", group="AUTH server"
    )
    trusted_proxies: tuple[Network, ...] = option(
        (), networks, "Peers whose X-Forwarded-For and -Proto are believed.", "Trusted proxies, separated by commas?",
        group="ADMIN server",
    )
    # -- Argon2id --
    argon2id_time: int = option(
        2, whole(1, 100), "Argon2id passes.", "Argon2id passes?", aliases=("argon2-time",), group="Argon2id"
    )
    argon2id_memory: int = option(
        32768, whole(8192, 1048576), "Argon2id memory, KiB.", "Argon2id memory, KiB?",
        aliases=("argon2-memory", "argon2-mem"), group="Argon2id",
    )
    argon2id_parallelism: int = option(
        2, whole(1, 64), "Argon2id lanes.", "Argon2id lanes?", aliases=("argon2-parallelism", "argon2-parallel"),
        group="Argon2id",
    )
    argon2id_hash_length: int = option(
        32, whole(16, 1024), "Length of a hash, bytes.", "Hash length, bytes?", aliases=("argon2-hash-length",),
        group="Argon2id",
    )
    argon2id_salt_length: int = option(
        16, whole(8, 1024), "Length of a salt, bytes.", "Salt length, bytes?", aliases=("argon2-salt-length",),
        group="Argon2id",
    )
    # -- keys and tokens --
    token_signing_key_file: str = option(
        "token.pem", text, "Key ring of AUTH.", "AUTH key file?", aliases=("auth-token-key-path",),
        group="Keys and tokens",
    )
    prefer_ec_token_signer: bool = option(
        True, boolean, "Sign access tokens with ES256 rather than RS256.",
        "Sign AUTH tokens with ES256 (fast) rather than RS256?", aliases=("use-ec-auth-signer",),
        group="Keys and tokens",
    )
    token_signing_key_length_rsa: int = option(
        2048, whole(2048, 16384), "Bits of an RSA key when one is made.", "RSA bits of AUTH?",
        aliases=("token-signing-key-length", "auth-token-key-length-rsa"), group="Keys and tokens",
    )
    token_signing_key_pass: str = option(
        "", text, "Passphrase of the AUTH key ring.", "Passphrase of the AUTH keys?", secret=True,
        aliases=("auth-token-key-pass",), group="Keys and tokens",
    )
    token_expiration: int = option(
        3600, seconds, "Lifetime of an access token, seconds.", "Lifetime of an access token, seconds?",
        aliases=("auth-token-expiration",), group="Keys and tokens",
    )
    token_purge_days: int = option(
        7, days, "Days an expired session stays listed; 0 keeps it.", "Days to keep expired sessions?",
        group="Keys and tokens",
    )
    enable_token_revocation: bool = option(
        True, boolean, "Ask the database whether a presented token was revoked.",
        "Check revocation of presented tokens?", aliases=("enable-revocation",), group="Keys and tokens",
    )
    enable_token_refresh: bool = option(
        False, boolean, "Issue refresh tokens.", "Issue refresh tokens?", aliases=("enable-refresh",),
        group="Keys and tokens",
    )
    refresh_token_expiration: int = option(
        259200, seconds, "Lifetime of a refresh token, seconds.", "Lifetime of a refresh token, seconds?",
        aliases=("token-refresh-expiration",), group="Keys and tokens",
    )
    refresh_token_absolute_expiration: int = option(
        2592000, seconds, "Seconds after the login when no refresh works any more.", group="Keys and tokens"
    )
    refresh_token_grace: int = option(
        30, whole(0, 3600),
        "Seconds in which a refresh token just used may be sent again, if its successor was not used; 0 never.",
        group="Keys and tokens",
    )
    refresh_token_purge_days: int = option(
        7, days, "Days an expired refresh token stays listed; 0 keeps it.", "Days to keep expired refresh tokens?",
        group="Keys and tokens",
    )
    admin_token_signing_key_file: str = option(
        "admin_token.pem", text, "Key ring of ADMIN.", "ADMIN key file?", aliases=("admin-token-key-path",),
        group="Keys and tokens",
    )
    prefer_ec_admin_token_signer: bool = option(
        True, boolean, "Sign ADMIN tokens with ES256 rather than RS256.", "Sign ADMIN tokens with ES256?",
        aliases=("use-ec-admin-signer",), group="Keys and tokens",
    )
    admin_token_signing_key_length_rsa: int = option(
        2048, whole(2048, 16384), "Bits of an RSA key when one is made.", "RSA bits of ADMIN?",
        aliases=("admin-token-signing-key-length", "admin-token-key-length-rsa"), group="Keys and tokens",
    )
    admin_token_signing_key_pass: str = option(
        "", text, "Passphrase of the ADMIN key ring.", "Passphrase of the ADMIN keys?", secret=True,
        group="Keys and tokens",
    )
    key_overlap: int = option(
        900, whole(1, 604800),
        "Seconds a new signing key is published before it signs; below 302, caches are told to keep the key set "
        "shorter.", group="Keys and tokens",
    )
    admin_token_expiration: int = option(
        3600, seconds, "Lifetime of an ADMIN token, seconds.", "Lifetime of an ADMIN token, seconds?",
        group="Keys and tokens",
    )
    # -- login, audit, flows --
    password_min_length: int = option(8, whole(8, 128), "Least length of a new password.", group="Login")
    max_login_failures: int = option(
        5, whole(0, 100), "Failures before a lockout; 0 never locks.", "Failed logins before a lockout?", group="Login"
    )
    seconds_to_reset_login_failures: int = option(
        300, whole(0, 86400), "A longer pause restarts the count.", "Seconds after which the count restarts?",
        group="Login",
    )
    failed_password_lockout_duration: int = option(
        300, whole(0, 86400), "Seconds of the first lockout; each next one doubles, up to an hour.",
        "Seconds of a lockout?", group="Login",
    )
    enable_pass_cache: bool = option(
        True, boolean, "Remember verified passwords in memory, as keyed digests.",
        "Remember verified passwords in memory?", group="Login",
    )
    pass_cache_duration: int = option(
        300, whole(1, 600), "Seconds a verified password is remembered.", "Seconds to remember them?", group="Login"
    )
    enable_audit_logging: bool = option(True, boolean, "Write the audit log.", "Write an audit log?", group="Login")
    audit_log_retention_days: int = option(
        30, days, "Days an audit row is kept; 0 keeps it.", "Days to keep it?", group="Login"
    )
    audit_max_size: int = option(
        -1, octets, "Octets the audit log may take, such as 64 MB; beyond it refusals go first, then the oldest rows. "
        "auto is 1 GB, or a quarter of the free disk if that is less.", group="Login"
    )
    enable_pkce: bool = option(
        True, boolean, "Serve the authorization code flow.", "Serve the authorization code flow (PKCE)?", group="Login"
    )
    pkce_code_lifetime: int = option(
        120, whole(1, 600), "Longest life of an authorization code, seconds.",
        "Life of an authorization code, seconds?", group="Login",
    )
    allow_plain_pkce: bool = option(
        False, boolean, "Accept the PKCE method plain; S256 protects more. RFC 7636 §7.2.", group="Login"
    )
    session_idle_expiration: int = option(
        28800, seconds, "Seconds without use after which a browser has to log in again.", group="Login"
    )
    session_absolute_expiration: int = option(
        86400, seconds, "Seconds after the login when a browser has to log in again.", group="Login"
    )
    console_idle_expiration: int = option(
        1800, seconds, "Seconds without use after which an administrator has to sign in at the console again.",
        group="Login",
    )
    console_absolute_expiration: int = option(
        28800, seconds, "Seconds after the sign-in when an administrator has to sign in at the console again.",
        group="Login",
    )
    brand_name: str = option(
        "", label,
        "Name on the login pages and in authenticators, unless `mad brand` sets one; empty is the issuer's host.",
        group="Pages",
    )
    brand_logo: str = option(
        "", text, "Picture on the login pages, unless `mad brand` sets one: a PNG, SVG, JPEG or WebP file.",
        group="Pages",
    )
    brand_color: str = option(
        "#1f5fbf", color, "Colour of the login pages, rrggbb, unless `mad brand` sets one.", group="Pages"
    )
    login_help: str = option(
        "", sentence, "What the sign-in page answers to Forgotten?: a sentence, or an http, https, mailto or tel URI.",
        group="Pages",
    )
    pages_folder: str = option(
        "", text, "Folder whose templates, styles and languages replace the bundled login pages.", group="Pages"
    )
    totp_qr_output_root: str = option(
        "", absolute, "The only folder QR files may be written to.", "Absolute folder for TOTP QR files (empty: none)?",
        group="Login",
    )
    oidc_client_id: str = option(
        "app", text, "client_id of the first client, made by setup.", "client_id of the first client?", group="Login"
    )
    oidc_client_secret: str = option(
        "", text, "Secret of the first client; empty makes one.", secret=True, group="Login"
    )

    @property
    def config_file(self) -> str:
        """The path of the config file, whether it is there or not."""
        return self.origins.get("config", "mad.conf")

    @property
    def auth_issuer(self) -> str:
        """The `iss` of AUTH tokens and the base of every published URL. RFC 8414 §2."""
        scheme = "http" if self.auth_domain_no_ssl else "https"
        return self.oidc_issuer or f"{scheme}://{self.auth_domain}"

    @property
    def admin_issuer(self) -> str:
        """The `iss` and `aud` of ADMIN tokens."""
        scheme = "http" if self.admin_domain_no_ssl else "https"
        host = self.admin_domain
        return f"{scheme}://{host}" if re.search(r":[0-9]+$", host) else f"{scheme}://{host}:{self.admin_port}"

    @property
    def self_made_file(self) -> str:
        """The file of the certificate that the box makes, with its chain and its key."""
        return os.path.join(os.path.dirname(os.path.abspath(self.db_file)), "tls-self.pem")

    @property
    def ca_file(self) -> str:
        """The file of the root that clients of such a box trust."""
        return os.path.join(os.path.dirname(os.path.abspath(self.db_file)), "ca.pem")

    def tls_files(self, side: str) -> tuple[str, str, str]:
        """Return certificate file, key file and passphrase of a port. The first is empty where it speaks plain HTTP."""
        cert_file = getattr(self, f"{side}_ssl_cert_file")
        if not cert_file and self.tls == "self":
            return self.self_made_file, "", ""
        return cert_file, getattr(self, f"{side}_ssl_key_file"), getattr(self, f"{side}_ssl_cert_pass")

    @property
    def worker_processes(self) -> int:
        return min(4, len(os.sched_getaffinity(0))) if self.workers < 0 else self.workers


class Option(msgspec.Struct, frozen=True):
    """One setting. From it come the file key, the variable, the flag, the help line, the README row and the question.
    """

    attribute: str
    default: Any
    parse: Callable[[str], Any]
    help: str
    ask: str  # the wizard's question, where it has one
    group: str
    secret: bool  # never a flag, never printed
    aliases: tuple[str, ...]  # other names the documentation or the environment files of the original use

    @property
    def name(self) -> str:
        return self.attribute.replace("_", "-")


OPTIONS = tuple(
    Option(field.name, field.default, **field.metadata) for field in dataclasses.fields(Options) if field.metadata
)
OPTION_NAMES = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}
# Names that configuration files of the original may have and that never had an effect: accepted and ignored.
IGNORED_NAMES = ("env-var-prefix", "auth-use-ssl", "admin-use-ssl", "enable-otp-auth", "otp-issuer")
# The variables of mad, which have the same prefix.
MAD_VARIABLES = (
    "CONFIG", "ADMIN_URL", "ADMIN_SOCKET", "ADMIN_TOKEN", "AUTH_URL", "CLIENT_ID", "CLIENT_SECRET", "CA_FILE",
    "ADMIN_TOKEN_FILE", "CLIENT_SECRET_FILE",
)
# The variables that answer the questions of a set-up which nobody is there to be asked.
SETUP_VARIABLES = ("SETUP_ANSWERS", "SETUP_USERNAME", "SETUP_EMAIL", "SETUP_PASSWORD", "SETUP_PASSWORD_FILE")


CONFIG_HEAD = "# microauthd. One key = value a line; # and ; begin comments; quote what contains them. Ends with # end."
CONFIG_END = "# end"


def did_you_mean(key: str) -> str:
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(key, OPTION_NAMES, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse_config(content: str, where: str) -> dict:
    """Return `{option name: (text value, "file:line")}` of an INI file.

    `key = value` a line; `#` and `;` begin comments; a value in double quotes is literal.
    Raises StartupError naming file and line, and if a file that this program wrote is cut off: what is
    missing would silently be a default.
    """
    if content.startswith(CONFIG_HEAD) and CONFIG_END not in content.split("\n"):
        raise StartupError(
            f"{where}: half of it is missing: its first line promises a line {CONFIG_END!r}, and there is none; "
            "restore it, or check it and add that line"
        )
    found: dict[str, tuple[str, str]] = {}
    where = show_path(where)  # it becomes part of answers of ADMIN
    for number, line in enumerate(content.split("\n"), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        at = f"{where}:{number}"
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise StartupError(f"{at}: not a line of the form key = value")
        key, value = key.strip().lower(), value.strip()
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        elif value[:1] == '"':
            value, quote, rest = value[1:].partition('"')
            if not quote or rest.strip()[:1] not in ("", "#", ";"):
                raise StartupError(f"{at}: the value of {key} has a quote that does not close")
        else:
            if key == "public-csp" and ";" in value:  # the rest of the policy would be lost in silence
                raise StartupError(f"{at}: put the value of {key} in double quotes: a semicolon begins a comment")
            value = re.split("[#;]", value, maxsplit=1)[0].strip()
        if key in IGNORED_NAMES:
            continue
        if key not in OPTION_NAMES:
            raise StartupError(f"{at}: unknown option {key!r}{did_you_mean(key)}")
        name = OPTION_NAMES[key].name
        if name in found:
            raise StartupError(f"{at}: {name} is set twice, first at {found[name][1]}")
        found[name] = (value, at)
    return found


def parse_flags(argv: list[str]) -> tuple[dict, list[str]]:
    """Return `{option name: (text value, "flag --name")}` and the arguments that are no flags."""
    found, args, rest = {}, [], collections.deque(argv)
    while rest:
        word = rest.popleft()
        if not word.startswith("--") or word == "--":
            args.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if key in ("config", "env-var-prefix"):
            name = key
        elif key == "print-effective-config":
            found[key] = ("true", "flag")
            continue
        elif key not in OPTION_NAMES:
            raise StartupError(f"unknown flag --{key}{did_you_mean(key)}")
        else:
            option = OPTION_NAMES[key]
            name = option.name
            if option.secret:
                raise StartupError(
                    f"--{key} is a secret and cannot be a flag: put it into the config file or the environment"
                )
            if option.parse is boolean and not equals:
                value, equals = rest.popleft() if rest and rest[0].lower() in ("true", "false") else "true", "="
        if not equals:
            if not rest:
                raise StartupError(f"--{key} needs a value")
            value = rest.popleft()
        if name in found and name != "trusted-proxies":
            raise StartupError(f"--{key} is given twice")
        found[name] = (f"{found[name][0]},{value}" if name in found else value, f"flag --{key}")
    return found, args


def check_text(value: str, origin: str, name: str):
    """Raise StartupError unless a setting is text: octets that are not UTF-8 arrive as lone surrogates. PEP 383.

    The config file that it is written to, the answers of ADMIN and the passphrases of the files are UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise StartupError(f"{origin}: {name} is not valid UTF-8") from None


def config_path(flags: dict, environ: Mapping[str, str]) -> str:
    """Return the path of the config file, whether it is there or not."""
    prefix = flags.get("env-var-prefix", ("MAD_",))[0]
    return flags.get("config", ("",))[0] or environ.get(prefix + "CONFIG", "") or "mad.conf"


def check_options(options: Options):
    """Raise StartupError where settings contradict each other."""
    files = [
        os.path.abspath(path)
        for path in (
            options.db_file, options.seal_key_file, options.token_signing_key_file,
            options.admin_token_signing_key_file, options.db_key_file,
        )
        if path
    ]
    if len(set(files)) < len(files):
        raise StartupError(
            "db-file, seal-key-file, token-signing-key-file, admin-token-signing-key-file and db-key-file cannot be "
            "the same file"
        )
    if options.db_key_file and (options.db_pass or options.no_db_pass):
        other = "db-pass" if options.db_pass else "no-db-pass"
        raise StartupError(f"db-key-file and {other} are both set: unset the one that is not true of the database")
    if (options.auth_ip, options.auth_port) == (options.admin_ip, options.admin_port):
        raise StartupError("AUTH and ADMIN cannot listen on the same address and port")
    for side in ("auth", "admin"):
        ip = ipaddress.ip_address(getattr(options, f"{side}_ip"))
        if not ip.is_loopback and not options.tls_files(side)[0] and not getattr(options, f"{side}_insecure_http"):
            raise StartupError(
                f"{side}-ip {ip} is not loopback and {side}-ssl-cert-file is not set: "
                f"tokens would travel in clear; set tls = self for a certificate that the box makes, or "
                f"{side}-insecure-http = true, only behind a TLS proxy"
            )
    if options.argon2id_memory < 8 * options.argon2id_parallelism:
        raise StartupError("argon2id-memory must be at least eight times argon2id-parallelism")


def issuer_obstacle(options: Options) -> str:
    """Return why other machines cannot use the issuer at which AUTH answers them, as a sentence, or "".

    In a container the address is one of the container: who reaches it, its host decides.
    """
    host = urlsplit(options.auth_issuer).hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            host = "localhost"
    is_elsewhere = host != "localhost" and not host.endswith(".localhost")
    if is_elsewhere or options.docker or ipaddress.ip_address(options.auth_ip).is_loopback:
        return ""
    return (
        f"auth-ip {options.auth_ip} is for other machines, and the issuer {options.auth_issuer} is itself for each of "
        "them: set auth-domain, or oidc-issuer, to a name by which they reach this one"
    )


def read_config(path: str) -> dict:
    """Return what parse_config() finds in a config file. Raises StartupError, and FileNotFoundError if there is none.
    """
    try:
        with os.fdopen(open_owned(path), "rb") as file:
            found = parse_config(file.read().decode("utf-8", "surrogateescape"), path)
            if any(OPTION_NAMES[name].secret for name in found):
                guard_private(file.fileno(), path, "it holds secrets")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StartupError(f"the config file {path} cannot be read: {error.strerror}") from None
    return found


def take_secrets(environ: MutableMapping[str, str], prefix: str) -> dict[str, str]:
    """Return a copy of the environment, and take the secrets among its variables out of it."""
    copy = dict(environ)
    for variable in copy:
        key = variable[len(prefix) :].lower().replace("_", "-")
        if variable.upper().startswith(prefix.upper()) and (
            (key in OPTION_NAMES and OPTION_NAMES[key].secret)
            or key in ("client-secret", "admin-token", "setup-password")  # of mad, and of a set-up
        ):
            del environ[variable]
    return copy


def setup_variables(prefix: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return those of SETUP_VARIABLES that are set and not empty, by their names without the prefix."""
    wanted = {(prefix + name).upper(): name for name in SETUP_VARIABLES}
    return {wanted[name.upper()]: value for name, value in environ.items() if value and name.upper() in wanted}


def read_variables(prefix: str, environ: Mapping[str, str]) -> dict:
    """Return `{option name: (text value, "environment VARIABLE")}` of the variables with our prefix.

    A secret may also stand in a file that `VARIABLE_FILE` names; its value is then the path.
    """
    given: dict[str, tuple[str, str]] = {}
    named: dict[str, str] = {}
    for variable, value in environ.items():
        if not variable.upper().startswith(prefix.upper()):
            continue
        key = variable[len(prefix) :].lower().replace("_", "-")
        if key.upper().replace("-", "_") in (*MAD_VARIABLES, *SETUP_VARIABLES) or key in IGNORED_NAMES:
            continue
        option = OPTION_NAMES.get(key)
        if option is None:
            option = OPTION_NAMES.get(key.removesuffix("-file"))
            if option is None or not option.secret:
                raise StartupError(f"unknown environment variable {variable}{did_you_mean(key)}")
        other = named.setdefault(option.name, variable)
        if other != variable:
            raise StartupError(f"the environment variables {other} and {variable} set the same option")
        given[option.name] = (value, f"environment {variable}")
    return given


def is_in_file(origin: str) -> bool:
    """Return whether an option came from a file of its own: a credential of systemd, or one that a variable names."""
    return origin.startswith("credential ") or (origin.startswith("environment ") and origin.upper().endswith("_FILE"))


def read_secrets(given: dict, environ: Mapping[str, str], in_container: bool) -> dict:
    """Return the secrets among what is given that stand in files of their own, those of systemd and those that a
    variable names, and where each came from. `LoadCredential=` of systemd.exec(5).
    """
    found = {}
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    for option in OPTIONS:
        value, origin = given.get(option.name, ("", ""))
        if not option.secret:
            continue
        path = value if is_in_file(origin) else ""
        if not origin.startswith("environment ") and folder and os.path.exists(os.path.join(folder, option.name)):
            path, origin = os.path.join(folder, option.name), f"credential {option.name}"
        if path:
            try:
                found[option.name] = (read_secret_file(path, origin, in_container), origin)
            except ValueError as error:
                raise StartupError(str(error)) from None
    return found


def load_options(flags: dict, environ: Mapping[str, str]) -> Options:
    """Return the settings in force: default < file < credential < environment < flag.

    `flags` is what parse_flags() found. An unknown key or variable of our prefix raises StartupError:
    a mistyped security setting must not pass in silence.
    """
    prefix = flags.get("env-var-prefix", ("MAD_",))[0]
    path = config_path(flags, environ)
    may_be_missing = path == "mad.conf" or "config-may-be-missing" in flags
    given = {}
    try:
        given.update(read_config(path))
    except FileNotFoundError:
        if not may_be_missing:
            raise StartupError(f"the config file {path} does not exist") from None
    given.update(read_variables(prefix, environ))
    given.update({name: found for name, found in flags.items() if name in OPTION_NAMES})
    in_container = given.get("docker", ("",))[0].strip().lower() in ("1", "true", "yes", "on")
    given.update(read_secrets(given, environ, in_container))
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY", ""), "db-key-file")
    is_overridden = given.get("db-key-file", ("", ""))[1].startswith(("environment ", "flag "))
    if os.path.isabs(credential) and os.path.exists(credential) and not is_overridden:
        given["db-key-file"] = (credential, "credential db-key-file")
    values, origins = {}, {"config": path}
    for name, (value, origin) in given.items():
        option = OPTION_NAMES[name]
        check_text(value, origin, name)
        try:
            values[option.attribute] = option.parse(value)
        except ValueError as error:
            raise StartupError(f"{origin}: {name} {error}") from None
        origins[name] = origin
    for attribute in ("db_file", "seal_key_file", "token_signing_key_file", "admin_token_signing_key_file"):
        if os.path.islink(path := values.get(attribute, OPTION_NAMES[attribute.replace("_", "-")].default)):
            # The file itself: its locks, its WAL and what replaces it lie beside it.
            values[attribute] = os.path.realpath(path)
    options = Options(origins, **values)
    check_options(options)
    return options


def show_value(option: Option, value):
    """Return the value of an option as JSON can hold it; a secret as set or unset."""
    if option.secret:
        return "(set)" if value else ""
    if option.parse is networks:
        return [str(network) for network in value]
    return "auto" if option.parse in (worker_count, octets) and value < 0 else value


def describe_options(options: Options) -> dict:
    """Return `{name: {"value": ..., "origin": ...}}`; secrets are shown as set or unset."""
    return {
        option.name: {
            "value": show_value(option, getattr(options, option.attribute)),
            "origin": options.origins.get(option.name, "default"),
        }
        for option in OPTIONS
    }


def write_config(options: Options) -> str:
    """Return the text of a config file: what differs from the defaults in force, the rest as comments."""
    lines, group = [CONFIG_HEAD, ""], ""
    for option in OPTIONS:
        if option.group != group:
            group = option.group
            lines += ["", f"# -- {group} --"]
        value = getattr(options, option.attribute)
        if option.parse is networks:
            word = ", ".join(map(str, value))
        elif option.parse in (worker_count, octets) and value < 0:
            word = "auto"
        elif option.parse is period and not value:
            word = "off"
        else:
            word = str(value).lower() if isinstance(value, bool) else str(value)
        if any(ord(letter) < 32 or letter == "\x7f" for letter in word) or len(word.splitlines()) > 1:
            raise StartupError(f"{option.name} contains a control character, which a config file cannot hold")
        if word != word.strip() or re.search('[#;"]', word):
            word = f'"{word}"'
        lines.append(f"# {option.help}")
        origin = options.origins.get(option.name, "")
        mark = "" if origin or value != option.default else "# "
        if (option.secret and is_in_file(origin)) or origin.startswith("credential "):
            # It stays the only copy, so that a new one takes effect.
            word, mark = "", "# "
        lines.append(f"{mark}{option.name} = {word}".rstrip())
    return "\n".join([*lines, "", CONFIG_END]) + "\n"
