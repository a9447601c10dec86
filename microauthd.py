"""microauthd: an OAuth 2.0 and OpenID Connect provider in one module, for one box.

Read downwards: a section uses only names defined above it.

Contents
    Vocabulary        names from the standards, constants of the program
    Errors            ERRORS, Problem, its renderings
    Secrets           random handles, sealing, TOTP, password rules, the throttle
    Tokens            key rings, JWKS, minting and verifying JWTs
    Idp               options, store, keys, clock: passed to every function below
    Audit             audit()
    Accounts          users, roles, lockout, second factor
    Clients           registration, authentication, scopes
    Sessions          refresh-token families, revocation, whether an access token is valid
    Grants            one function per grant_type; issue() mints and stores the tokens
    Login             authorization requests, browser sessions, login transactions, codes, consent
    HTTP              Params, guards, pages, Answer, cookies, the WSGI application of a port
    AUTH endpoints    the routes of the auth port
    ADMIN endpoints   the routes of the admin port

appliance/base is below this module, which imports it: the store, the objects of the wire, the two servers,
keys, Argon2, settings, clock and log. The rest of appliance is above this module and imports it: the command
line, the wizard, processes, upkeep and recovery.

The life of a request
    base.wire reads and parses it (llhttp) and calls the WSGI application of its port, an App. App finds the
    route; Answer reads the form or the query once (Params), asks the route's guard who is calling, decodes
    the body that the route declares, and calls the handler. It turns the result - a dict, a record, a Page,
    a Redirect, a Reply or a raised Problem - into status, headers and body. A handler calls one service or
    grant; services and grants hold the rules and call the Store; only the Store contains SQL. A handler that is
    a generator yields before its durable change: the changes of many then share a commit, in one thread.
"""

if __name__ == "__main__":  # before the imports: the command line imports this module under its own name
    import runpy

    runpy.run_module("appliance.commands", run_name="__main__")  # it stands above: nothing here imports it

import base64
import binascii
import collections
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from types import GeneratorType
from typing import Any, Literal, TypeGuard, TypeVar
from urllib.parse import quote, unquote_to_bytes, urlencode, urlsplit

import bottle
import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.base import StartupError
from appliance.base.clock import IAT_SKEW, RELEASED_AT, Timekeeper, sleep
from appliance.base.settings import OPTIONS, Options, color, describe_options, label, show_value
from appliance.base.shared import Buckets
from appliance.base.metrics import (
    Counters, FIGURES, History, LOCKOUTS, LOGINS, NO_ROUTE, OPENMETRICS, OTHER, RANGES, TEXT as METRICS_TEXT, TOKENS,
    show_metrics,
)
from appliance.base.log import Log, escape
from appliance.base.headers import HSTS, security_headers
from appliance.base.peers import networks_of
from appliance.base.files import file_fingerprint, is_visible_below, remove_below, write_below
from appliance.base.database import BATCH_SECONDS, Conflict, Unavailable
from appliance.base.store import (
    Account, AdminSession, AtLeast, AuditFilter, AuditRow, AuthorizationCode, BrandRow, BrowserSession, Client,
    ClientRow, ClientUri, ExternalIdp, FAILURE, FOREVER, Family, Invitation, LOCKOUT_MAX, ListedRefreshToken,
    ListedSession, LoginTransaction, MAD_ADMIN_ROLE_ID, MAD_ADMIN_ROLE_NAME, OVERLAP_MAX, ParkedHints, Permission,
    RefreshToken, Role, SEEDED_SCOPES, SLICE, SUCCESS, Scope, Session, Standing, Store,
)
from appliance.base.openapi import FORM, JSON, Route, Routes, describe_api, may_be_empty
from appliance.base.objects import (
    AccessClaims, AccessVerdict, AccountForm, AddUri, AdminTokenForm, AssignPermission, AssignScopes, AuditObject,
    AuditVerdict, AuthSession, AuthorizeForm, BackupObject, BackupPiece, BearerForm, BrandLogo, BrandObject,
    BrandOrigins, BrowserSessionObject, ChangeBrand, ChangeSecret, CheckAccess, ClientObject, CodeForm, ConfirmTotp,
    ConsentForm, ConsentObject, ConsoleObject, ConsoleSession, ConsoleUser, CreateClient, CreatePermission, CreateRole,
    CreateScope, CreateUser, EMAIL_MAX, EndSessionForm, EnrolForm, EnrolTotp, Err, ExportAudit, FlagObject, Found,
    GRANT_TYPES, GenerateTotp, HeadlessCodeForm, HeadlessLastForm, HeadlessPasswordForm, Health, HistoryObject,
    IdTokenClaims, IdpObject, Introspection, InvitationObject, Invite, InviteForm, InvitePageForm, Jwks, KeyImpact,
    KeyObject, LABEL_MAX, LOGO_SIZE, ListAudit, ListBrowserSessions, ListClients, ListNamed, ListRoleMatrix, ListRoles,
    ListSessions, ListUsers, ListedBackup, LoginPageForm, LogoutForm, MakeBackup, Me, Msg, NameRef, NewFlag,
    NewInvitation, OAuthError, OfClient, OptionObject, PASSWORD_MAX, PROVIDER_KEY_MAX, Paged, PagedById, PasswordForm,
    PasswordVerdict, PermissionMember, Ping, PkceStep, Preview, PreviewPage, PreviewTokens, PreviewedScopes,
    PreviewedToken, Proof, ProvisionUser, PurgeAudit, PurgeTokens, PutIdp, REASON_MAX, ReadHistory, RecoveryCodes,
    RefreshTokenObject, ResetPassword, Revoked, RoleMember, RoleObject, RoleRef, RoleWithMore, RotateKeys, SECRET_MAX,
    SECRET_MIN, ScopeMember, ScopeObject, SearchUsers, SecretObject, SelectForm, SessionDetails, SessionObject,
    SetFlag, SetFlagOption, SetLockout, SetRoles, SetScopes, SignIn, StatusObject, StepForm, TokenForm, TokenHintForm,
    TokenIn, TokenObject, TotpConfirmed, TotpEnrolment, TotpQr, TryUri, UNSET, URI_MAX, USERNAME_MAX, UpdateClient,
    UpdatePermission, UpdateRole, UpdateScope, UpdateUser, Uri, UriObject, UriVerdict, UserConsentObject, UserDetails,
    UserInfo, UserObject, VerifyPassword, VerifyTotp, Version, iso, read_time,
)
from appliance.base.hashing import Busy, HashFailed, Hasher, VerifiedSecrets, salt_of
from appliance.base.pages import (
    Brand, SCRIPTS, Pages, contrast, describe_age, describe_browser, draw_qr, logo_name, on_brand,
    picture_type, text_uri,
)
from appliance.base.console import Console
from appliance.base.keys import Key, PublicKey, b64url, b64url_bytes, next_promotion_at, promote, read_ring, unb64url
from appliance.base.tls import PortCertificate, certificate_warnings

# == Vocabulary ================================================================
# Names from the RFCs, and the constants of the program.

VERSION = "0.1.0"

HERE = Path(__file__).parent
PUBLIC = HERE / "public"
APPLIANCE = HERE / "appliance"

# grant_type values, RFC 6749 §4 and §6
AUTHORIZATION_CODE = "authorization_code"
CLIENT_CREDENTIALS = "client_credentials"
PASSWORD = "password"
REFRESH_TOKEN = "refresh_token"

# client types, RFC 6749 §2.1
CONFIDENTIAL = "confidential"
PUBLIC_CLIENT = "public"

# scope values, OpenID Connect Core §5.4 and §11; `roles` and `groups` are extensions of microauthd
OPENID = "openid"
OIDC_SCOPES = ("openid", "profile", "email", "roles", "groups", "offline_access")
UNSUPPORTED_OIDC_SCOPES = ("address", "phone")  # no account has their claims; nothing else may have their names

# `typ` header values: RFC 9068 §2.1, OpenID Connect Core §2
AT_JWT = "at+jwt"
JWT = "JWT"

SLASH = "\x1f"  # in PATH_INFO of ADMIN, a slash that was encoded: it is part of a name and parts no segments

# `acr` values: with the password alone, and with a second factor. OpenID Connect Core §2 asks for absolute URIs.
ONE_FACTOR = "urn:microauthd:acr:1fa"
TWO_FACTORS = "urn:microauthd:acr:2fa"

OWN = "its own"  # `spec` of a route that no standard defines: the manual describes it
FLAGS = {  # per-client feature flags: name -> takes an option
    "ENABLE_TOTP": False,
    "TOTP_ISSUER": True,
    "TOKEN_EXPIRATION": True,
    "REFRESH_TOKEN_EXPIRATION": True,
    "SESSION_BASED_AUTH": False,
    "SESSION_BASED_MAX_AGE": True,
}

URI_KINDS = ("redirect", "post_logout", "cors_origin")

ADMIN_CLIENT = "mad:admin"  # the client of a login at ADMIN; no real client_id contains a colon
ID_TOKEN_TTL = 600
TOTP_STEP = 30  # seconds, RFC 6238 §5.2
TOTP_TRIES = 5
CODE_TTL = 60  # seconds an authorization code lives, unless pkce-code-lifetime is less. RFC 6749 §4.1.2
LOGIN_TTL = 600  # seconds a login transaction lives
REPEAT_SECONDS = 30  # in which the same form, sent twice by a double click, leads where it led the first time
HINTS_TTL = 300  # seconds that the hints of a POST wait for the GET that it becomes, or for the answer of a person
LOGIN_TRIES = 10  # failures that end a login transaction
RECOVERY_CODES = 10
INVITATION_TTL = 86400  # seconds an invitation lives
INVITES = "admin:reset_passwords"  # the scope that lets others than administrators invite users

GROUPS_OF_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.I)
SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,255}")  # RFC 6749 §3.3
CLIENT_ID = re.compile(r"[\x21-\x39\x3b-\x7e]{1,255}")  # RFC 6749 §2.2 without the colon, RFC 7617 §2


def to_normal_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return a text in a Unicode normalisation form, such as NFC; one of more than 1024 characters as it is.

    No name, password or code has more: they have at most 255, and at most four characters compose to one. The bound is
    there because unicodedata needs quadratic time for combining characters: three seconds for a request of 64 KB.
    """
    return unicodedata.normalize(form, text) if len(text) <= 1024 else text


def normalise(name: str) -> str:
    """Return a name in the form that is compared: Unicode NFKC, trimmed."""
    return to_normal_form("NFKC", name.strip()).strip()


def fold(name: str) -> str:
    """Return a username or e-mail address in the form that is compared: normalised and case-folded."""
    return to_normal_form("NFKC", normalise(name).casefold())


# == Errors ====================================================================
# One exception, Problem. ERRORS has every message that a client may receive.

ERRORS = {  # code: (status, what the client is told, where the code is defined)
    "invalid_request": (
        400, "The request is malformed, or a parameter is missing, repeated or invalid.", "RFC 6749 §5.2",
    ),
    "invalid_client": (401, "Client authentication failed.", "RFC 6749 §5.2"),
    "invalid_grant": (400, "The grant is invalid, expired or revoked.", "RFC 6749 §5.2"),
    "unauthorized_client": (400, "This client may not do this.", "RFC 6749 §5.2"),
    "unsupported_grant_type": (400, "This grant type is not supported.", "RFC 6749 §5.2"),
    "invalid_scope": (400, "The scope is unknown, malformed or exceeds what may be granted.", "RFC 6749 §5.2"),
    "unsupported_response_type": (400, "This response type is not supported.", "RFC 6749 §4.1.2.1"),
    "login_required": (400, "The user has to log in.", "OpenID Connect Core §3.1.2.6"),
    "consent_required": (400, "The user has to consent.", "OpenID Connect Core §3.1.2.6"),
    "interaction_required": (400, "The user has to do something.", "OpenID Connect Core §3.1.2.6"),
    # The code is that of OpenID Connect Core Unmet Authentication Requirements 1.0.
    "unmet_authentication_requirements": (
        400, "The login does not reach the acr that is demanded.", "OpenID Connect Core §5.5.1.1",
    ),
    "account_selection_required": (400, "The user has to choose an account.", "OpenID Connect Core §3.1.2.6"),
    "request_not_supported": (400, "The request parameter is not supported.", "OpenID Connect Core §3.1.2.6"),
    "request_uri_not_supported": (400, "The request_uri parameter is not supported.", "OpenID Connect Core §3.1.2.6"),
    "registration_not_supported": (400, "The registration parameter is not supported.", "OpenID Connect Core §3.1.2.6"),
    "invalid_token": (401, "The access token is missing, malformed, expired or revoked.", "RFC 6750 §3.1"),
    "insufficient_scope": (403, "The access token does not carry the scope this needs.", "RFC 6750 §3.1"),
    "access_denied": (403, "This caller may not do this.", "RFC 6749 §4.1.2.1"),
    "reauthentication_required": (403, "This needs the password again.", "RFC 9470 §3"),
    "protected": (403, "This one cannot be renamed, deleted or switched off.", "RFC 9110 §15.5.4"),
    "not_found": (404, "There is no such thing here.", "RFC 9110 §15.5.5"),
    "method_not_allowed": (405, "This method is not allowed here.", "RFC 9110 §15.5.6"),
    "conflict": (409, "The name is taken.", "RFC 9110 §15.5.10"),
    "last_administrator": (409, "This is the last administrator who could log in.", "RFC 9110 §15.5.10"),
    "unchanged": (400, "It is so already.", "RFC 9110 §15.5.1"),
    "precondition_failed": (412, "It was changed meanwhile: read it again.", "RFC 9110 §15.5.13"),
    "unsupported_media_type": (415, "The content type is not the one this takes.", "RFC 9110 §15.5.16"),
    "misdirected_request": (421, "This host name is not served here.", "RFC 9110 §15.5.20"),
    "slow_down": (429, "Too many attempts; try again later.", "RFC 6585 §4"),
    "server_error": (500, "The server met an unexpected condition.", "RFC 6749 §4.1.2.1"),
    "temporarily_unavailable": (503, "The server cannot do this just now.", "RFC 6749 §4.1.2.1"),
}


class Problem(Exception):
    """A failure that a client is told about, by its code in ERRORS.

    `log` is for the operator and never leaves the server. `errors` describes each bad member of a
    request body. `status` overrides the status in ERRORS. `retry_after` is seconds. `audited` is true if
    the audit log already has the failure.
    """

    def __init__(self, code, *, log="", errors=None, status=0, retry_after=0, headers=(), audited=False):
        super().__init__(code)
        self.code, self.log, self.errors, self.headers, self.audited = code, log, errors, list(headers), audited
        self.status = status or ERRORS[code][0]
        self.message = ERRORS[code][1]
        if retry_after:
            self.headers.append(("Retry-After", str(retry_after)))

    def as_oauth(self) -> dict:
        """Return the JSON of RFC 6749 §5.2."""
        return {"error": self.code, "error_description": self.message}

    def as_err(self) -> dict:
        """Return the Err of ADMIN and of the rest of AUTH, with `errors` if there are any."""
        err = {"success": False, "message": self.message, "error": self.code}
        if self.errors:
            err["errors"] = self.errors
        return err


def reject(**errors):
    """Raise invalid_request with the sentences that are not empty, by member; if all are, do nothing."""
    errors = {member: wrong for member, wrong in errors.items() if wrong}
    if errors:
        raise Problem("invalid_request", errors=errors)


class RevokedToken(Problem):
    """invalid_token for a token that was revoked: its use may be a replay and is audited."""

    def __init__(self, claims, log):
        super().__init__("invalid_token", log=log)
        self.claims = claims


# == Secrets ===================================================================
# Random handles, sealing, TOTP, the rules for passwords, and the throttle of failed attempts.


def random_handle() -> str:
    """Return 256 random bits in base64url, for a refresh token, a code or a client secret."""
    return secrets.token_urlsafe(32)


def sha256(handle: str) -> str:
    """Return the stored form of a random handle. It has 256 bits, so a fast hash is enough."""
    return hashlib.sha256(handle.encode()).hexdigest()


def begin_with_time(handle: str, ms: int) -> str:
    """Return a handle with its time before it: 12 hex digits of Unix milliseconds.

    What is stored at the same time then stands together in an index, and shares its pages when it is written.
    """
    return f"{ms:012x}{handle}"


TIMED_TOKEN = re.compile(r"[0-9a-f]{12}[A-Za-z0-9_-]{43}")


def refresh_token_sha256(token: str) -> str:
    """Return the stored form of a refresh token: its SHA-256, after the time that it begins with.

    Those of an earlier release begin with none.
    """
    return (token[:12] if TIMED_TOKEN.fullmatch(token) else "") + sha256(token)


def new_sid(ms: int) -> str:
    """Return the identifier of a login: its Unix milliseconds and 96 random bits. It is no secret."""
    return begin_with_time(random_handle()[:16], ms)


def new_jti(ms: int) -> str:
    """Return a UUIDv7 as 32 hex digits: its first 12 are Unix milliseconds. RFC 9562 §5.7."""
    noise = int.from_bytes(os.urandom(10), "big")
    return f"{ms:012x}7{noise >> 68:03x}{0x8000 | (noise >> 52) & 0x3FFF:04x}{noise & 0xFFFFFFFFFFFF:012x}"


def jti_ms(jti: str) -> int:
    return int(jti[:12], 16)


@contextlib.contextmanager
def hash_problems():
    """Raise a Problem for Busy and HashFailed. The message for Busy does not blame the caller's attempts."""
    try:
        yield
    except Busy as busy:
        problem = Problem("slow_down", log=busy.log, retry_after=busy.retry_after)
        problem.message = "The server is busy; try again later."
        raise problem from None
    except HashFailed as error:
        raise Problem("temporarily_unavailable", log=str(error), retry_after=1) from None


UNIX, DEVICE = "unix:", "device:"  # of a peer on the Unix socket, which wire.py names; of a known browser
NO_ADDRESS = (UNIX, DEVICE)


def network_of(peer: str) -> str:
    """Return the network of a peer: of IPv6 its /64, which whoever has one address has; else the address itself."""
    return peer if peer.startswith(NO_ADDRESS) else networks_of(peer)[0]


def refill(level: float, at: float, now: float, burst: float, rate: float) -> float:
    """Return the level of a token bucket now, of one that had `level` at the time `at`."""
    return min(burst, level + max(0, now - at) * rate)


class LocalBuckets(collections.OrderedDict):
    """The levels of token buckets, by key, where no other process counts: (level, when it was that)."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def put(self, key: tuple, level: float, at: float):
        self[key] = (level, at)
        self.move_to_end(key)
        while len(self) > self.size:  # the least recently used one goes, since anybody can make buckets
            self.popitem(last=False)


class Throttle:
    """Token buckets per peer and per (peer, name), from which failed attempts take.

    They are in memory that the processes of a server share, so the limits are those of the box.

    Unknown names have buckets too, so that throttling does not reveal whether a name exists.
    Loopback has no bucket for failures, because all services of the box share that address. A user of the machine and
    a known browser (see find_source) have a bucket for each name and no other, which no stranger takes from.
    """

    RATES = {  # noqa: RUF012 - burst, refill a second; the peers of a site have together what 16 of them may have
        "name": (20, 20 / 60), "peer": (120, 2.0), "site": (16 * 120, 16 * 2.0),
        # Logins begun and hints that wait: anybody may make one, and each is a row.
        "login of peer": (60, 1.0), "login of site": (16 * 60, 16 * 1.0),
        "hint of peer": (60, 1.0), "hint of site": (16 * 60, 16 * 1.0),
        # All that comes over loopback, perhaps through a proxy: more than passwords can be verified, no more than fits.
        "login of machine": (3000, 50.0), "hint of machine": (3000, 50.0),
        # Refusals of whoever has proven nothing. Only the next refusal is another one for it, never an answer.
        "refusal of peer": (120, 2.0), "refusal of site": (16 * 120, 16 * 2.0),
    }

    def __init__(self, clock, size=20_000, buckets: Buckets | None = None):
        self.clock, self.lock = clock, threading.Lock()
        self.buckets: Buckets | LocalBuckets = LocalBuckets(size) if buckets is None else buckets

    def keys(self, peer, name):
        address = None if peer.startswith(NO_ADDRESS) else ipaddress.ip_address(peer)
        peer, *sites = networks_of(address) if address else (peer,)
        # Hashed, because the name may have any length.
        yield ("name", peer, hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16])
        if address and not address.is_loopback:
            yield ("peer", peer, b"")
        for site in sites:
            yield ("site", site, b"")

    def level(self, key, now):
        burst, rate = self.RATES[key[0]]
        level, at = self.buckets.get(key, (burst, now))
        return refill(level, at, now, burst, rate)

    def refuse_empty(self, key, level: float, reason: str):
        """Raise slow_down if a bucket with this level is empty."""
        if level < 1:
            wait = int((1 - level) / self.RATES[key[0]][1]) + 1
            raise Problem("slow_down", log=reason, retry_after=wait)

    def check(self, peer: str, name: str):
        """Raise slow_down if a bucket of this peer is empty."""
        now = self.clock()
        for key in self.keys(peer, name):
            self.refuse_empty(key, self.level(key, now), f"too many failures from {peer}")

    def begin(self, peer: str, begun: str, octets=0):
        """Count what anybody may cause, a `login`, a `hint` or a `refusal`. Raises slow_down after too many.

        One that keeps `octets` in the database counts once for each kilobyte.
        """
        now, weight = self.clock(), max(1, -(-octets // 1024))
        with self.lock:
            keys = [(f"{begun} of {kind}", found, b"") for kind, found, _ in self.keys(peer, "") if kind != "name"]
            if not keys and f"{begun} of machine" in self.RATES:
                keys = [(f"{begun} of machine", "loopback", b"")]
            levels = {key: self.level(key, now) for key in keys}
            for key, level in levels.items():
                self.refuse_empty(key, level, f"too many {begun}s of {key[1]}")
            for key, level in levels.items():
                self.buckets.put(key, level - weight, now)

    def spend(self, peer: str, name: str):
        now = self.clock()
        with self.lock:
            for key in self.keys(peer, name):
                self.buckets.put(key, self.level(key, now) - 1, now)


class CountedRefusal:
    """A refusal whose first row is in the audit log, and its repetitions, which are not yet."""

    def __init__(self, row: tuple, until: float, budget: str):
        self.row, self.since, self.until, self.budget, self.count = row, row[0], until, budget, 0


class RefusalCounter:
    """Bounds the rows of the audit log about refusals: anybody can cause them, and each would cost a durable write.

    Refusals are alike if actor, action, target, reason and the network of the peer are. The first of them is a row at
    once; those that follow are counted here, in memory, and are one row each WINDOW seconds. How many kinds there may
    be is limited by a budget, one for strangers and one for whoever has proven something, so that neither takes the
    other's; what exceeds it is counted in a row for all of them.
    """

    WINDOW = 600  # seconds, as all times here, of a clock that only moves forward
    QUIET = 3600  # after so long without a flood, the beginning of the next one is a row of its own
    # burst, refill a second, and how many kinds there may be at once: who repeats each of them keeps them all alive
    BUDGETS = {"stranger": (30, 6 / 60, 100), "known": (60, 30 / 60, 400)}  # noqa: RUF012

    def __init__(self, clock):
        self.clock, self.lock = clock, threading.Lock()
        self.kinds: dict[tuple, CountedRefusal] = {}
        self.levels: dict[str, tuple[float, float]] = {
            budget: (burst, clock()) for budget, (burst, *_) in self.BUDGETS.items()
        }
        self.excess: collections.Counter[str] = collections.Counter()  # what exceeded a budget, by action
        self.excess_since, self.excess_until, self.flood_seen_at = 0, 0.0, -math.inf

    def take(self, budget: str, now: float) -> bool:
        (level, at), (burst, rate, most) = self.levels[budget], self.BUDGETS[budget]
        level = refill(level, at, now, burst, rate)
        is_left = level >= 1 and sum(found.budget == budget for found in self.kinds.values()) < most
        self.levels[budget] = (level - is_left, now)
        return is_left

    def note(self, row: tuple, network: str, budget: str) -> tuple[bool, bool]:
        """Count a refusal, given as a row of the audit log. Return whether to write it now, as the first of its kind,
        and whether a flood begins with it.
        """
        kind, now = (*row[1:5], network), self.clock()
        with self.lock:
            found = self.kinds.get(kind)
            if found:
                found.count += 1
                return False, False
            if self.take(budget, now):
                self.kinds[kind] = CountedRefusal(row, now + self.WINDOW, budget)
                return True, False
            if not self.excess:
                self.excess_since, self.excess_until = row[0], now + self.WINDOW
            self.excess[row[2]] += 1
            begins = now - self.flood_seen_at > self.QUIET
            self.flood_seen_at = now
            return False, begins

    def forget(self, row: tuple, network: str) -> None:
        """Count a first row that could not be written like a repetition."""
        with self.lock:
            if found := self.kinds.get((*row[1:5], network)):
                found.count += 1

    def is_due(self, everything=False) -> bool:
        """Return whether collect() has anything to do."""
        now = self.clock()
        with self.lock:
            if everything:
                return bool(self.kinds or self.excess)
            return any(now >= found.until for found in self.kinds.values()) or (
                bool(self.excess) and now >= self.excess_until
            )

    def collect(self, now: int, everything=False) -> tuple[list[tuple], list[tuple]]:
        """Return the rows of the counts whose window has ended, or of all of them, and begin their next window.

        Also return what put_back() takes, if the rows cannot be written.
        """
        rows: list[tuple] = []
        taken: list[tuple] = []
        monotonic = self.clock()
        with self.lock:
            for kind, found in list(self.kinds.items()):
                if not everything and monotonic < found.until:
                    continue
                if not found.count:
                    del self.kinds[kind]  # quiet for a window: the next one is a first one
                    continue
                counted = f"count={found.count};since={iso(found.since)}"
                secondary = ";".join(part for part in (found.row[4], counted) if part)
                rows.append((now, *found.row[1:4], secondary, *found.row[5:]))
                taken.append((found, found.count, found.since))
                found.count, found.since, found.until = 0, now, monotonic + self.WINDOW
            if self.excess and (everything or monotonic >= self.excess_until):
                counts = ";".join(f"{action}={count}" for action, count in sorted(self.excess.items()))
                counted = f"count={self.excess.total()};since={iso(self.excess_since)};{counts}"
                rows.append((now, "anonymous", "refusals_counted", "", counted, "", "", "", FAILURE))
                taken.append((None, self.excess, self.excess_since))
                self.excess = collections.Counter()
        return rows, taken

    def put_back(self, taken: list[tuple]) -> None:
        """Count again what collect() returned."""
        with self.lock:
            for found, count, since in taken:
                if found is None:
                    self.excess += count
                    self.excess_since = since
                else:
                    found.count += count
                    found.since = since


class Seal:
    """Encrypts TOTP seeds with AES-256-GCM, so that even an unencrypted database does not reveal them.

    It also derives refresh tokens, the secrets of logins and the tokens of their forms, and signs the cookies of known
    browsers, each with a key of its own that is stored nowhere.
    """

    def __init__(self, key: bytes):
        self.cipher = AESGCM(key)
        self.successor_key = hmac.digest(key, b"refresh token successor", "sha256")
        self.form_key = hmac.digest(key, b"login form", "sha256")
        self.device_key = hmac.digest(key, b"device cookie", "sha256")
        self.binding_key = hmac.digest(key, b"login binding", "sha256")
        self.repeat_key = hmac.digest(key, b"repeated form", "sha256")

    def successor(self, refresh_token: str) -> str:
        """Return what the refresh token that replaces another ends with: 256 bits in base64url, the same each time."""
        return b64url(hmac.digest(self.successor_key, refresh_token.encode(), "sha256"))

    def renewed_binding(self, binding: str, login_id: str, state: str) -> str:
        """Return the secret that replaces that of a login when the factor of a state is proven: the same at every call,
        and known to nobody who only knows the old one.
        """
        return b64url(hmac.digest(self.binding_key, f"{login_id} {state} {binding}".encode(), "sha256"))

    def repeat_tag(self, login_id: str, state: str, answer: str) -> str:
        """Return what tells whether a form is the one that moved a login on: 144 bits in base64url."""
        return b64url(hmac.digest(self.repeat_key, f"{login_id} {state} {answer}".encode(), "sha256")[:18])

    def device_tag(self, nonce: str, user_id: str, issued_ms: str) -> str:
        """Return the signature in a device cookie: 128 bits in base64url."""
        message = f"{nonce} {user_id} {issued_ms}".encode()
        return b64url(hmac.digest(self.device_key, message, "sha256")[:16])

    def close(self, plain: str, owner: str) -> str:
        nonce = os.urandom(12)
        return base64.b64encode(nonce + self.cipher.encrypt(nonce, plain.encode(), owner.encode())).decode()

    def open(self, sealed: str, owner: str) -> str:
        raw = base64.b64decode(sealed)
        try:
            return self.cipher.decrypt(raw[:12], raw[12:], owner.encode()).decode()
        except InvalidTag:
            raise Problem(
                "server_error", log="a TOTP seed does not open: the seal key is not the one it was sealed with"
            ) from None


def new_totp_seed() -> str:
    """Return 160 random bits in base32. RFC 4226 §4."""
    return base64.b32encode(os.urandom(20)).decode()


def without_colon(name: str, default: str) -> str:
    """Return a name for the label of an otpauth URI, where one colon, also if encoded, parts issuer and account."""
    return re.sub(r"\s*[:\uff1a]+\s*", " ", name).strip() or default


def totp_uri(seed, username, issuer_name) -> str:
    """Return the otpauth URI of a seed, which a QR code shows to an authenticator."""
    import pyotp

    return pyotp.TOTP(seed).provisioning_uri(
        name=without_colon(username, "account"), issuer_name=without_colon(issuer_name, "microauthd")
    )


def box_name(options: Options, name: str | None = None) -> str:
    """Return the name that people know this server by: that of its brand or `brand-name`, else the issuer's host."""
    return (options.brand_name if name is None else name) or urlsplit(options.auth_issuer).hostname or "microauthd"


def fold_one_time_code(code: str) -> str:
    """Return a typed one-time code as six ASCII digits, or "" if it is none.

    Authenticators show codes in groups, and people copy them so, or type them with a full-width keyboard.
    """
    folded = re.sub(r"[\s\u2010-]", "", to_normal_form("NFKC", code))
    return folded if re.fullmatch(r"[0-9]{6}", folded) else ""


def totp_time_step(seed: str, code: str, now: int) -> int | None:
    """Return the time step of a typed code - the current, previous or next one - or None. RFC 6238 §5.2."""
    import pyotp

    code = fold_one_time_code(code)
    if not code:
        return None
    generator = pyotp.TOTP(seed)
    time_step = now // TOTP_STEP
    found = None
    for candidate in (time_step - 1, time_step, time_step + 1):
        if hmac.compare_digest(generator.generate_otp(candidate), code):
            found = candidate
    return found


@functools.cache
def common_passwords() -> bytes:
    """Return the list, each password between line feeds: a set would take 2 MB, and no lookup is urgent."""
    return b"\n" + (APPLIANCE / "common_passwords.txt").read_bytes()


def is_common(password: str) -> bool:
    """Return whether a password, in letters of any case, is among those that are guessed first."""
    folded = fold(password)
    return "\n" not in folded and b"\n%b\n" % folded.encode("utf-8", "surrogatepass") in common_passwords()


OTHER_BLANKS = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")  # category Zs without U+0020


def normalise_password(password: str) -> str:
    """Return a password in the form that is hashed, checked and verified: OpaqueString, RFC 8265 §4.2.

    Other blanks become U+0020, and characters are composed (NFC): keyboards differ in both. Case, width and blanks at
    the ends stay. The characters that RFC 8264 §4.3 disallows are let through, since passwords with them exist.
    """
    return password if password.isascii() else to_normal_form("NFC", OTHER_BLANKS.sub(" ", password))


def check_new_password(options: Options, password: str, *names: str) -> str:
    """Return what is wrong with a chosen password in its normal form, or "". NIST SP 800-63B §5.1.1.2."""
    password = normalise_password(password)
    if len(password) < options.password_min_length:
        return f"must have at least {options.password_min_length} characters"
    if len(password) > PASSWORD_MAX:
        return f"must have at most {PASSWORD_MAX} characters"
    if "\0" in password:
        return "must not contain a NUL"
    if is_common(password):
        return "is one of the most common passwords"
    if any(name and fold(password) == fold(name) for name in names):
        return "must not be the user name or e-mail address"
    return ""


# == Tokens ====================================================================
# Key rings, JWKS, minting and verifying JWTs. RFC 7515, 7517, 7519.

ENCODE = msgspec.json.Encoder().encode
TOKEN_LIMIT = 8192  # octets of a token, on every endpoint: proxies in front take header fields of 8 KB, hardly more
CLAIMS_LIMIT = 4096  # octets of a token's claims above which it names no roles: it has some 5,900 octets with them
ROLE_CLAIMS = ("role", "roles", "groups")


def fit_claims(claims: dict) -> dict:
    """Return the claims of a token, without the roles if all together would have more than CLAIMS_LIMIT octets.

    `roles_omitted` then says so, and introspection and userinfo return them.
    """
    if not any(claims.get(name) for name in ROLE_CLAIMS) or len(ENCODE(claims)) <= CLAIMS_LIMIT:
        return claims
    return {name: value for name, value in claims.items() if name not in ROLE_CLAIMS} | {"roles_omitted": True}


def verify_signature(key: PublicKey, token: str, shape: type[msgspec.Struct]) -> dict:
    """Return the claims of a compact JWS that a key signed, whose header was compared. Raises invalid_token.

    `shape` declares the types of the claims that are read without another check.
    """
    message, _, signature = token.rpartition(".")
    try:
        key.verify(unb64url(signature), message.encode())
    except (InvalidSignature, ValueError, binascii.Error):
        raise Problem("invalid_token", log="the signature is wrong") from None
    try:
        claims = msgspec.json.decode(unb64url(message.partition(".")[2]))
        msgspec.convert(claims, shape)
    except (ValueError, binascii.Error, RecursionError) as error:
        raise Problem("invalid_token", log=f"malformed claims: {error}"[:300]) from None
    return claims


class KeyRing:
    """The signing keys of one port."""

    def __init__(self, entries, prefer_ec=True):
        self.keys = [Key(entry) for entry in entries]
        active = {key.alg: key for key in self.keys if key.state == "active"}
        self.active = active
        self.access = active.get("ES256" if prefer_ec else "RS256") or next(iter(active.values()))
        # A token's header must equal one of ours byte by byte, so it cannot choose the algorithm. RFC 8725 §3.1.
        self.headers = {(key.kid, typ): key.header(typ) for key in self.keys for typ in (AT_JWT, JWT)}
        self.by_header = {self.headers[key.kid, typ].decode(): (key, typ) for key in self.keys for typ in (AT_JWT, JWT)}
        self.verified = {}

    def signer(self, alg) -> Key:
        return self.active.get(alg) or self.access

    def jwks(self) -> bytes:
        return msgspec.json.encode({"keys": [key.public_jwk() for key in self.keys]})

    def mint(self, key: Key, typ: str, claims: dict) -> str:
        """Return a compact JWS. Raises invalid_scope if it were too large for verify(). RFC 7515 §3.1."""
        message = self.headers[key.kid, typ] + b"." + b64url_bytes(ENCODE(claims))
        token = message + b"." + b64url_bytes(key.sign(message))
        if len(token) > TOKEN_LIMIT:
            raise Problem("invalid_scope", log=f"a token of {len(token)} octets, above {TOKEN_LIMIT}: too many scopes")
        return token.decode()

    def verify(self, token: str, typ: str) -> dict:
        """Return the claims of a token that a key of this ring signed as this type; it may be expired or revoked.

        Raises invalid_token. Valid signatures are cached, since they stay valid.
        """
        known = self.verified.get(token)
        if known is None:
            key, signed_as = self.by_header.get(token.partition(".")[0], (None, None))
            if key is None or signed_as is None or len(token) > TOKEN_LIMIT:
                raise Problem("invalid_token", log="not signed by a key of this port")
            known = (signed_as, verify_signature(key, token, AccessClaims if signed_as == AT_JWT else IdTokenClaims))
            if len(self.verified) >= 1024:  # 2.5 KB each, in every process
                self.verified = {}
            self.verified[token] = known
        if known[0] != typ:
            raise Problem("invalid_token", log=f"a token of type {known[0]} where {typ} is needed")
        return known[1]


# == Idp =======================================================================
# The object that every function below takes.


class Caller(msgspec.Struct, frozen=True):
    """The caller and its address, for the throttle and the audit log."""

    peer: str = "127.0.0.1"  # an IP address, or unix:uid=N on the Unix socket
    user_agent: str = ""
    request_id: str = ""
    is_local: bool = False  # at the machine: the kernel names the peer's user, who may use the Unix socket of ADMIN
    actor: str = "anonymous"  # a user's id, a client_id, or the name of a component
    device: str = ""  # the device cookie that a browser sent; find_device() verifies it
    console: str = ""  # `id_sha256` of the session at the console that the request belongs to

    def acting_as(self, actor: str) -> "Caller":
        """Return the same caller with an authenticated actor."""
        return msgspec.structs.replace(self, actor=actor)


LOCAL = Caller(is_local=True)


def ring_files(options: Options) -> dict:
    """Return {port: (path, passphrase, prefers ES256)} of the key rings."""
    return {
        "auth": (options.token_signing_key_file, options.token_signing_key_pass, options.prefer_ec_token_signer),
        "admin": (
            options.admin_token_signing_key_file, options.admin_token_signing_key_pass,
            options.prefer_ec_admin_token_signer,
        ),
    }


class Machine(msgspec.Struct, frozen=True):
    """Functions of the floor above that routes call; each takes the Idp first."""

    make_backup: Callable
    read_backup_piece: Callable
    delete_backup: Callable
    read_status: Callable
    measure: Callable  # puts what is true at the moment into the counters
    list_backups: Callable
    list_keys: Callable
    key_impact: Callable
    rotate_keys: Callable
    revoke_key: Callable


BRAND = ("brand",)  # its key in Idp.cache(); no client_id
NO_BRAND = BrandRow(None, None, None, "", 0, 0)


class Idp:
    """The state of one process: settings, store, keys and clock.

    Threads share it. Settings do not change; caches are bound to the store's generation.
    """

    def __init__(
        self, options: Options, store: Store, auth_ring: KeyRing, admin_ring: KeyRing, seal: Seal, clock=time.time,
        log=None, machine: Machine | None = None, buckets: Buckets | None = None, counters: Counters | None = None,
        history: History | None = None,
    ):
        self.options, self.store, self.seal, self.clock, self.machine = options, store, seal, clock, machine
        self.rings = {"auth": auth_ring, "admin": admin_ring}
        # port: (fingerprint of its file, Unix seconds of the next promotion); empty if rings are not from files
        self.ring_versions: dict[str, tuple] = {}
        self.logged_ring_errors: dict[str, str] = {}  # port: the last logged reason why its file cannot be read
        self.next_ring_check = 0.0  # monotonic seconds
        self.rings_lock = threading.Lock()
        self.log = log or Log()
        self.counters, self.history = counters or Counters(), history or History()
        self.hasher = Hasher(options)
        self.hasher.gate.counters = self.counters
        monotonic = getattr(clock, "monotonic", clock)  # if the clock is a Timekeeper
        self.throttle = Throttle(monotonic, buckets=buckets)
        self.verified_client_secrets = VerifiedSecrets(900, 4096)
        self.verified_passwords = VerifiedSecrets(options.pass_cache_duration, 4096)
        self.client_cache: tuple[bytes, dict] = (b"", {})
        self.account_locks = [threading.Lock() for _ in range(64)]  # one second factor of an account at a time
        self.pages = Pages(options)
        self.console = Console(self.pages)
        self.last_brand = Brand(box_name(options), options.brand_color, "")  # for pages without a database
        self.fetches: dict[str, tuple[str, int, int]] = {}  # of sessions at the console: see note_fetch()
        self.answers: dict = {}  # cached_page, by name
        self.refusals = RefusalCounter(getattr(clock, "monotonic", clock))
        self.clock_is_sane = True  # the last result of check_clock() without a Timekeeper
        self.readiness: tuple[float, dict] = (0.0, {})  # monotonic seconds of the next check, the last result
        self.log_was_damaged = False  # as the last check found: see ready()
        self.certificates: dict[str, PortCertificate] = {}  # of the ports that speak TLS, by name

    def reload_rings_if_due(self):
        """Reload changed key rings, if the last check was over a second ago."""
        if self.ring_versions and time.monotonic() >= self.next_ring_check:
            self.reload_rings()

    @property
    def auth_ring(self) -> KeyRing:
        """The current keys of AUTH."""
        self.reload_rings_if_due()
        return self.rings["auth"]

    @property
    def admin_ring(self) -> KeyRing:
        """The current keys of ADMIN."""
        self.reload_rings_if_due()
        return self.rings["admin"]

    def reload_rings(self):
        """Reload each ring whose file changed or whose next key is to turn active.

        If a file cannot be read, the loaded keys stay: a half-done manual rotation must not stop the server.
        """
        # One thread at a time: of two that read different versions, the slower one could install the older.
        if not self.rings_lock.acquire(blocking=False):
            return
        try:
            self.next_ring_check = time.monotonic() + 1
            self.reload_changed_rings()
        finally:
            self.rings_lock.release()

    def reload_changed_rings(self):
        for port_name, (path, passphrase, prefer_ec) in ring_files(self.options).items():
            try:
                known, next_at = self.ring_versions[port_name]
                fingerprint = file_fingerprint(path)
                if fingerprint == known and (next_at is None or self.now() < next_at):
                    continue
                entries = promote(read_ring(path, passphrase), self.now(), self.options.key_overlap)
            except (OSError, StartupError) as error:
                if str(error) != self.logged_ring_errors.get(port_name):
                    self.log("keys.unreadable", "error", path=path, reason=error)
                self.logged_ring_errors[port_name] = str(error)
                continue
            self.logged_ring_errors.pop(port_name, None)
            self.ring_versions[port_name] = (fingerprint, next_promotion_at(entries, self.options.key_overlap))
            self.rings[port_name] = KeyRing(entries, prefer_ec)
            self.store.generation.marks.touch()  # tokens of a key that was revoked are dead
            # Replaced after the ring: a thread with the old dict may add an answer built from the old ring to it.
            # See cached_page().
            self.answers = {name: page for name, page in self.answers.items() if name not in ("jwks", "discovery")}
            self.log(
                "keys.changed", port=port_name,
                kids=" ".join(f"{key.kid[:8]}={key.state}" for key in self.rings[port_name].keys),
            )

    def now(self) -> int:
        """Unix seconds."""
        return int(self.clock())

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return int(self.clock() * 1000)

    @property
    def revoked_before(self) -> int:
        """The millisecond up to which every token is revoked, as a restore sets it. Cached with the clients."""
        cache = self.cache()
        if None not in cache:  # None is no client_id
            cache[None] = int(self.store.meta("revoked_before", "0"))
        return cache[None]

    def cache(self) -> dict:
        """Return the cache of the current generation, a dict.

        The generation is read before the rows, so rows from before a change never enter the cache after it. Nor do
        rows that a transaction reads: they may never be committed.
        """
        if self.store.in_transaction:
            return {}
        generation = self.store.generation.read()
        cached_generation, cache = self.client_cache
        if cached_generation != generation:
            cache = {}
            self.client_cache = (generation, cache)
        return cache

    @property
    def brand(self) -> Brand:
        """The brand of the pages, cached with the clients; without a database the last that was known."""
        try:
            cache = self.cache()
            if BRAND not in cache:
                row = self.store.find_brand() or NO_BRAND
                cache[BRAND] = Brand(
                    box_name(self.options, row.name), row.color or self.options.brand_color, *self.brand_logo(row)
                )
            self.last_brand = cache[BRAND]
        except Unavailable:
            pass
        return self.last_brand

    def brand_logo(self, row: BrandRow) -> tuple[str, str]:
        """Return the file name and the media type of the picture of a brand; ("", "") if there is none."""
        if row.logo_sha256 is not None:
            return logo_name(row.logo_sha256), row.logo_type
        content, media_type = self.option_logo
        return logo_name(hashlib.sha256(content).hexdigest()) if content else "", media_type

    @functools.cached_property
    def option_logo(self) -> tuple[bytes, str]:
        """The picture that `brand-logo` names and its media type; (b"", "") if there is none or it cannot be read."""
        try:
            return self.pages.option_logo
        except OSError as error:
            self.log("brand.unreadable", "warning", path=self.options.brand_logo, reason=error.strerror)
            return b"", ""

    def check_clock(self, irreversible=True) -> bool:
        """Return whether the clock can be trusted; `irreversible` for a purge or the retirement of a key.

        In a server the Timekeeper decides. A local command has only the clock, which must not be before
        our release or the latest time in the database.
        """
        if isinstance(self.clock, Timekeeper):
            return self.clock.state in (("right",) if irreversible else ("right", "probation"))
        floor = max(RELEASED_AT, self.store.clock_floor() - IAT_SKEW)
        sane = self.now() >= floor
        if sane != self.clock_is_sane:
            self.log(
                "clock.right" if sane else "clock.behind", "info" if sane else "error", now=self.now(), floor=floor
            )
        self.clock_is_sane = sane
        return sane


def hash_secret(idp: Idp, secret: str, beside: str | None = None) -> str:
    """Return the PHC string of a client secret, with the salt of another if that is given.

    Raises slow_down or temporarily_unavailable.
    """
    with hash_problems():
        return idp.hasher.hash(secret, beside)


def hash_password(idp: Idp, password: str) -> str:
    """Return the PHC string of a user's password. Raises slow_down or temporarily_unavailable."""
    return hash_secret(idp, normalise_password(password))


def as_problem(error: "Problem | Unavailable") -> Problem:
    """Return the Problem of an error: a 503 if the database is unavailable."""
    if isinstance(error, Problem):
        return error
    return Problem("temporarily_unavailable", log=error.log, retry_after=error.retry_after)


# == Audit =====================================================================


def audit(idp: Idp, caller: Caller, action: str, target="", secondary="", result=SUCCESS):
    """Append a row to the audit log, in the transaction of the change that it records."""
    if idp.options.enable_audit_logging:
        with idp.store.transaction():
            user_agent, request_id = caller.user_agent[:200], caller.request_id
            row = (idp.now(), caller.actor, action, target, secondary, caller.peer, user_agent, request_id, result)
            idp.store.append_audit([row])


def audit_refusal(
    idp: Idp, caller: Caller, action: str, target="", secondary="", proven=False, strict=False, result=FAILURE
):
    """Record in the audit log that something was refused, or changed nothing: in a row, or counted for a later one.

    `proven` says that the caller has proven something: a secret, a token, a password. Call this outside the transaction
    that the refusal ends. A row that cannot be written is counted, and changes no answer; it raises Unavailable if
    `strict` is set, for a caller with a transaction of its own.
    """
    if not idp.options.enable_audit_logging:
        return
    user_agent, request_id = caller.user_agent[:200], caller.request_id
    row = (idp.now(), caller.actor, action, target, secondary, caller.peer, user_agent, request_id, result)
    network = network_of(caller.peer)
    is_first, begins_flood = idp.refusals.note(row, network, "known" if proven else "stranger")
    if not (is_first or begins_flood):
        return
    try:
        with idp.store.transaction():
            if is_first:
                idp.store.append_refusals([row])
            else:  # among the rows that no flood displaces
                audit(idp, caller, "refusals_flood", target, f"action={action}", result)
    except (Problem, Unavailable):
        idp.refusals.forget(row, network)
        if strict:
            raise


def write_refusal_counts(idp: Idp, everything=False):
    """Write the rows of counted refusals that are due, or of all. Raises Unavailable if the database cannot be written.

    Then they stay counted.
    """
    if not idp.refusals.is_due(everything):
        return
    rows, taken = idp.refusals.collect(idp.now(), everything)
    try:
        with idp.store.transaction():
            idp.store.append_refusals(rows)
    except Unavailable:
        idp.refusals.put_back(taken)
        raise


def require_clock(idp: Idp):
    """Raise temporarily_unavailable if the clock cannot be trusted: a purge by it could not be undone."""
    if not idp.check_clock():
        raise Problem(
            "temporarily_unavailable", log="nothing is purged by a clock that cannot be believed; see clock accept",
            retry_after=600,
        )


def purge_audit_rows(idp: Idp, caller: Caller, steps, reason: str, pause) -> int:
    """Delete and count rows of the audit log, in slices, and audit that. `pause` waits between slices.

    Each of `steps` deletes a slice and returns how many rows that were; it is called again while the slice was full.
    """
    done, has_begun = 0, False
    for index, delete in enumerate(steps):
        deleted = SLICE
        while deleted == SLICE:
            if done:
                pause(0.01)
            with idp.store.transaction():
                deleted = delete()
                done += deleted
                if deleted == SLICE and not has_begun:  # more follow: the actor is known even if a crash ends them
                    audit(idp, caller, "audit_purge_begun", "", reason)
                    has_begun = True
                if done and deleted < SLICE and index == len(steps) - 1:
                    audit(idp, caller, "audit_purged", "", f"purged={done};{reason}")
    return done


def purge_audit_log(idp: Idp, caller: Caller, days: int, pause=lambda seconds: None) -> int:
    """Delete and count the audit rows older than `days`, in slices, and audit that. `pause` waits between slices."""
    require_clock(idp)
    before, store = idp.now() - days * 86400, idp.store
    steps = [lambda: store.purge_refusals(before, SLICE), lambda: store.purge_audit(before, SLICE)]
    return purge_audit_rows(idp, caller, steps, f"older_than_days={days}", pause)


REFUSALS_SHARE = 10  # refusals may have this part of the audit log
PURGED_PART = 10  # a purge by size makes room for so much: without it, each new row would need one


def bound_audit_log(idp: Idp, caller: Caller, limit: int, pause=lambda seconds: None) -> int:
    """Keep the audit log within `limit` octets, as estimated; return how many rows were deleted.

    Refusals go first: beyond their share the oldest of them are deleted, so that no flood displaces another row. Only
    if the log is still too large, the oldest of the others follow. It depends on no clock.
    """
    total = 0
    changes, refusals = idp.store.measure_audit()
    share = limit // REFUSALS_SHARE
    for size, bound, delete in (
        (refusals, share, idp.store.purge_refusals),
        (changes, limit - min(refusals.octets, share), idp.store.purge_audit),
    ):
        if size.octets <= bound or not size.rows:
            continue
        left = size.rows - bound * (PURGED_PART - 1) // PURGED_PART * size.rows // size.octets

        def delete_slice(delete=delete):
            nonlocal left
            count = delete(FOREVER + 1, min(SLICE, left)) if left > 0 else 0
            left -= count
            return count

        reason = f"{'refusals' if size is refusals else 'rows'}_larger_than={bound}"
        total += purge_audit_rows(idp, caller, [delete_slice], reason, pause)
    return total


# == Accounts ==================================================================
# Users, their roles, lockout, second factor.


def is_admin(idp: Idp, user_id: str) -> bool:
    return idp.store.has_role(user_id, MAD_ADMIN_ROLE_ID)


def is_last_admin(idp: Idp, user_id: str) -> bool:
    """Return whether this is an administrator and no other administrator could log in now."""
    return is_admin(idp, user_id) and not idp.store.has_able_admin(idp.now(), user_id)


def forbid_removing_last_admin(idp: Idp, user_id: str):
    """Raise last_administrator for the last one who could log in. Called in the changing transaction."""
    if is_last_admin(idp, user_id):
        raise Problem("last_administrator")


def revoke_user(idp: Idp, caller: Caller, user_id: str, action: str, secondary=""):
    """Revoke everything ever issued to a user, on both ports.

    Each change that reduces the rights of a user calls this in its transaction.
    """
    with idp.store.transaction():
        idp.store.revoke_account(user_id, idp.now_ms())
        audit(idp, caller, action, user_id, secondary)


Standings = TypeVar("Standings", bound=Account | Standing)


def is_still_valid(account: Standings | None, issued_ms: int) -> TypeGuard[Standings]:
    """Return whether a user exists, is active, and was not revoked since that millisecond."""
    return account is not None and bool(account.is_active) and issued_ms > account.revoked_before


def console_user(idp: Idp, console: AdminSession | None) -> Account | None:
    """Return the user of a session at the console, or None if the session is over.

    It is over if its user may no longer log in as an administrator, or if anything revoked what was issued to the user.
    """
    now = idp.now()
    if (
        console is None or console.expires_at <= now
        or console.last_seen_at + idp.options.console_idle_expiration <= now
        or console.created_ms <= idp.revoked_before or console.auth_time > now + IAT_SKEW
    ):
        return None
    account = idp.store.find_account(console.user_id)
    return account if is_still_valid(account, console.created_ms) and is_admin(idp, console.user_id) else None


def revoke_for_new_credentials(idp: Idp, caller: Caller, user_id: str, action: str):
    """Revoke everything that was issued to a user whose credentials change.

    The session at the console in which administrators change their own outlives that, if it is alive until then: what
    has ended it since the request came must not be undone. Call it in the transaction of the change.
    """
    account = console_user(idp, idp.store.find_admin_session(caller.console)) if caller.console else None
    revoke_user(idp, caller, user_id, action)
    if account and account.id == user_id:
        idp.store.keep_admin_session(caller.console, user_id)


def verify_stored_password(idp: Idp, account: Account | None, password: str) -> tuple[bool, bool]:
    """Return whether this is the user's password, and whether its hash is that of the raw form.

    Releases before this normalised nothing, so the raw form is tried too if it differs. Both are always verified: the
    work depends on what was typed, never on whether the user exists or the password is right.
    """
    stored, normal = account.password_hash if account else None, normalise_password(password)
    is_right = idp.hasher.verify(stored, normal)
    is_raw = normal != password and idp.hasher.verify(stored, password)
    return is_right or is_raw, is_raw


def was_verified_recently(idp, source, account, password) -> bool:
    """Return whether Argon2 has verified this password recently.

    Only consulted when no other check can fail, or a fast refusal would reveal a correct password.
    """
    if not idp.options.enable_pass_cache or account.totp_sealed or account.failed_logins:
        return False
    if source.startswith(DEVICE) and idp.store.has_device_failures(source.removeprefix(DEVICE)):
        return False
    return idp.verified_passwords.contains(account.password_hash, normalise_password(password), idp.now())


# -- browsers in which a user logged in before --
# Anybody can lock an account by guessing. Its user is not locked out in a browser that has a device cookie: tries
# from there are counted by themselves. OWASP, Slow Down Online Guessing Attacks with Device Cookies.

DEVICE_TTL = 90 * 86400  # seconds since the last login in the browser
DEVICE_USERS = 4  # of one browser; the one who logged in least recently is forgotten
DEVICE_NONCE = re.compile(r"[A-Za-z0-9_-]{22}")


def read_device(device: str) -> tuple[str, list[list[str]]]:
    """Return the parts of a device cookie: a random value of the browser, and [issued_ms, signature] for each user."""
    nonce, *marks = device.split("~", DEVICE_USERS + 1)
    marks = [mark for mark in marks if re.fullmatch(r"[0-9]{1,15}\.[A-Za-z0-9_-]{22}", mark)]
    return (nonce, [mark.split(".") for mark in marks]) if DEVICE_NONCE.fullmatch(nonce) else ("", [])


def is_mark_of(idp: Idp, nonce: str, mark: list[str], user_id: str) -> bool:
    """Return whether a device cookie was signed for this user; it may have expired."""
    return hmac.compare_digest(mark[1], idp.seal.device_tag(nonce, user_id, mark[0]))


def find_device(idp: Idp, caller: Caller, account: Account | None) -> str:
    """Return the identifier of the browser that the request is from, if this user logged in there before, or "".

    What ends the sessions of a user ends this too, an administrator's lockout among it: otherwise whoever once knew
    the password could keep as many cookies, and so as many tries, as there were logins.
    """
    nonce, marks = read_device(caller.device) if caller.device and account else ("", [])
    oldest = max(idp.revoked_before, idp.now_ms() - 1000 * DEVICE_TTL) if marks else 0
    for mark in marks:
        is_current = oldest < int(mark[0]) <= idp.now_ms() + 1000 * IAT_SKEW and is_still_valid(account, int(mark[0]))
        if account and is_current and is_mark_of(idp, nonce, mark, account.id):
            return sha256(f"{nonce} {account.id}")
    return ""


def sign_device(idp: Idp, caller: Caller, account: Account) -> str:
    """Return the device cookie of a browser in which this user, just read, has logged in."""
    nonce, marks = read_device(caller.device)
    nonce = nonce or random_handle()[:22]
    others = [mark for mark in marks if not is_mark_of(idp, nonce, mark, account.id)]
    issued_ms = str(max(idp.now_ms(), idp.revoked_before + 1, account.revoked_before + 1))
    marks = [[issued_ms, idp.seal.device_tag(nonce, account.id, issued_ms)], *others[: DEVICE_USERS - 1]]
    return "~".join([nonce, *(".".join(mark) for mark in marks)])


def find_source(idp: Idp, caller: Caller, account: Account | None) -> str:
    """Return whose tries at an account count together: those of a browser known to its user, else of a peer."""
    device = find_device(idp, caller, account)
    return DEVICE + device if device else caller.peer


def find_lockout(idp: Idp, caller: Caller, account: Account) -> int:
    """Return until when wrong passwords or an administrator have closed an account to this caller, in Unix seconds.

    A browser in which the user logged in before has a lockout of its own, beside one for ever.
    """
    device = find_device(idp, caller, account) if account.lockout_until != FOREVER else ""
    return idp.store.find_device_lockout(device) if device else account.lockout_until


def is_locked_out(idp: Idp, caller: Caller, account: Account) -> bool:
    """Return whether an account is closed to this caller now.

    The last administrator may always try at the machine, where the throttle still counts.
    """
    until = find_lockout(idp, caller, account)
    return until > idp.now() and not (caller.is_local and until != FOREVER and is_last_admin(idp, account.id))


# -- logging in --


def login_obstacle(idp, caller, account, admin=False) -> str:
    """Return why this account may not log in even with the right password, for the log, or ""."""
    if account is None:
        return "unknown user"
    if not account.is_active:
        return "inactive"
    if is_locked_out(idp, caller, account):
        return "locked"
    if admin and not is_admin(idp, account.id):
        return "not an administrator"
    return ""


WRONG_PASSWORD = "wrong password"
WRONG_CODE = "one-time code missing, wrong or used"


OUTCOMES = {  # of a login that failed, as metrics name it
    "unknown user": "unknown_user", "inactive": "inactive", "locked": "locked", "second factor locked": "locked",
    "not an administrator": "not_admin", "changed meanwhile": "changed", WRONG_PASSWORD: "wrong_password",
    WRONG_CODE: "wrong_code",
}


def check_totp(idp, account, code) -> str:
    """Spend a one-time code. Return what is wrong, or ""; the caller counts failures. RFC 6238 §5.2."""
    now = idp.now()
    if account.totp_locked_until > now:
        return "second factor locked"
    time_step = totp_time_step(idp.seal.open(account.totp_sealed, account.id), code, now)
    if time_step is not None and idp.store.spend_totp_step(account.id, time_step):
        return ""
    return WRONG_CODE


def rehash(idp, account, password):
    """Replace a hash by one of the normal form, with the configured parameters. Nothing is revoked."""
    with contextlib.suppress(Problem, Unavailable):
        idp.store.set_password_hash(account.id, hash_password(idp, password), idp.now(), account.password_hash)


def count_failed_code(idp: Idp, account: Account):
    """Count a wrong one-time or recovery code; TOTP_TRIES of them lock the second factor. RFC 4226 §7.3."""
    lockout = max(TOTP_STEP, idp.options.failed_password_lockout_duration)
    if (account.totp_failures + 1) % TOTP_TRIES == 0:
        idp.counters.add(LOCKOUTS, "second_factor")
    idp.store.count_failed_totp(account.id, idp.now(), TOTP_TRIES, lockout)


def count_failed_password(idp: Idp, caller: Caller, account: Account):
    """Count a wrong password on the browser, if the user logged in there before, else on the account."""
    options, now, device = idp.options, idp.now(), find_device(idp, caller, account)
    limits = (
        options.seconds_to_reset_login_failures, options.max_login_failures, options.failed_password_lockout_duration,
        LOCKOUT_MAX,
    )
    if device:
        until = idp.store.count_failed_device(device, account.id, now, *limits)
        scope = ";browser=known"
    else:
        counted = idp.store.count_failed_login(account.id, now, *limits)
        until = counted.lockout_until if counted and counted.lockouts > account.lockouts else 0
        scope = ""
    if until > now:
        idp.counters.add(LOCKOUTS, "browser" if device else "account")
        audit(idp, caller, "user_locked_out", account.id, f"until={iso(until)}{scope}", FAILURE)


def record_failure(idp: Idp, caller: Caller, name: str, account: Account | None, client_id: str, failure: str):
    """Count a failed login against its source, the name and, if a secret was wrong, the account; audit it.

    Every failure costs one durable write, so that timing does not reveal what was wrong. A failure that brings an
    account nearer to a lockout is a row of the changes: the lockout bounds how many there can be. The others change
    nothing and are counted as refusals.
    """
    options, now = idp.options, idp.now()
    idp.counters.add(LOGINS, OUTCOMES.get(failure, OTHER))
    idp.throttle.spend(find_source(idp, caller, account), name)
    nears_lockout = account is not None and (
        failure == WRONG_CODE
        or (
            failure == WRONG_PASSWORD and find_lockout(idp, caller, account) <= now
            and bool(options.max_login_failures and options.failed_password_lockout_duration)
        )
    )
    with idp.store.transaction():
        if account and failure == WRONG_CODE:
            count_failed_code(idp, account)
        if account and failure == WRONG_PASSWORD:
            count_failed_password(idp, caller, account)
        if nears_lockout and options.enable_audit_logging:
            audit(idp, caller, "user_login_failed", client_id, f"reason={failure}", FAILURE)
        else:
            idp.store.put_meta("last_failure_at", now)
            audit_refusal(idp, caller, "user_login_failed", client_id, f"reason={failure}", strict=True)


def count_good_password(idp: Idp, source: str, account: Account) -> bool:
    """Reset the counts of wrong passwords. Return False if the account has changed since it was read."""
    with idp.store.transaction():
        if source.startswith(DEVICE):
            idp.store.delete_device_failures(source.removeprefix(DEVICE))
        return idp.store.count_good_login(account.id, account.password_hash, idp.now())


def count_login(idp: Idp, account: Account, amr: list):
    """Count a login, unless a second factor is still to be verified."""
    if not account.totp_sealed or len(amr) > 1:
        idp.counters.add(LOGINS, "success")


def check_throttle(idp: Idp, source: str, name: str):
    """Raise slow_down if this source has failed too often."""
    try:
        idp.throttle.check(source, name)
    except Problem:
        idp.counters.add(LOGINS, "throttled")
        raise


def authenticate_user(
    idp: Idp, caller: Caller, username: str, password: str, totp="", client: Client | None = None, admin=False,
    only_password=False,
) -> tuple[Account, list]:
    """Authenticate a user by password. Return the account and its `amr` (RFC 8176).

    Every path that takes a password calls this. Whatever is wrong - unknown user, wrong password,
    inactive, locked, a missing, wrong or used one-time code - the caller gets invalid_grant with
    status 403, after the same Argon2 work and one durable write. `admin` requires the MadAdmin role.
    `only_password` makes `totp` optional: for an administrator who verifies a password, and for the
    login pages, which call check_second_factor() next.
    """
    name = fold(username)
    account = idp.store.find_account_by_name(name)
    source = find_source(idp, caller, account)
    check_throttle(idp, source, name)
    totp_required = not only_password and client is not None and "ENABLE_TOTP" in client.flags
    if (
        not totp_required
        and not login_obstacle(idp, caller, account, admin)
        and was_verified_recently(idp, source, account, password)
    ):
        assert account
        count_login(idp, account, ["pwd"])
        return account, ["pwd"]
    # One verification of an account at a time, so that parallel guesses are counted one by one.
    # Strangers who keep the lock of a name do not keep its user at the machine, or in a known browser, waiting.
    lock_kind = source if source.startswith(NO_ADDRESS) else "user"
    with hash_problems(), idp.hasher.name_locks.hold(lock_kind, name, source) as name_lock:
        account = idp.store.find_account_by_name(name)
        obstacle = login_obstacle(idp, caller, account, admin)
        if account and not obstacle and totp_required and not account.totp_sealed:
            obstacle = "the client demands a second factor, and the user has none"
        if not obstacle and was_verified_recently(idp, source, account, password):
            assert account
            count_login(idp, account, ["pwd"])
            return account, ["pwd"]  # a concurrent request has just verified it
        second_factor = bool(account and account.totp_sealed) and not (only_password and not totp)
        with idp.hasher.gate.slot(source, goes_first=caller.is_local):
            is_right, is_raw = verify_stored_password(idp, account, password)
        failure = obstacle or ("" if is_right else WRONG_PASSWORD)
        amr = ["pwd"]
        if not failure and second_factor:
            failure = check_totp(idp, account, totp)
            amr = ["pwd", "otp", "mfa"]
        now = idp.now()
        if account and not failure and not count_good_password(idp, source, account):
            failure = "changed meanwhile"
        if failure:
            idp.hasher.name_locks.blame(name_lock, source)
            actor = caller.acting_as(account.id if account else "anonymous")
            record_failure(idp, actor, name, account, client.client_id if client else "", failure)
            raise Problem("invalid_grant", status=403, log=f"login failed: {failure}", audited=True)
        assert account  # None has an obstacle
        if idp.options.enable_pass_cache and not second_factor:
            idp.verified_passwords.add(account.password_hash, normalise_password(password), now)
        if is_raw or not account.password_hash.startswith(idp.hasher.parameters()):
            rehash(idp, account, password)
        count_login(idp, account, amr)
        return account, amr


def fold_recovery_code(code: str) -> str:
    """Return a typed recovery code without blanks and hyphens, in lower case."""
    return re.sub(r"[\s-]", "", code).lower()


def check_recovery_code(idp, account, code) -> str:
    """Spend a recovery code. Return what is wrong, or ""; the caller counts failures."""
    now = idp.now()
    if account.totp_locked_until > now:
        return "second factor locked"
    return "" if idp.store.spend_recovery_code(account.id, sha256(fold_recovery_code(code)), now) else WRONG_CODE


def check_second_factor(
    idp: Idp, caller: Caller, user_id: str, proven_ms: int, code: str, client_id=""
) -> tuple[Account, list]:
    """Verify the one-time or recovery code of a user whose password was verified at that millisecond.

    Return the account and its `amr` (RFC 8176). The account must still exist, be active, not locked and
    not revoked since. Failures count on the account across all logins. Raises invalid_grant with 403.
    """
    check_throttle(idp, find_source(idp, caller, idp.store.find_account(user_id) if caller.device else None), user_id)
    with idp.account_locks[hash(user_id) % len(idp.account_locks)]:
        account, method = idp.store.find_account(user_id), ""
        failure = login_obstacle(idp, caller, account)
        if not failure and (not is_still_valid(account, proven_ms) or not account.totp_sealed):
            failure = "changed meanwhile"
        if not failure and fold_one_time_code(code):
            failure = check_totp(idp, account, code)
            method = "otp"
        elif not failure:
            failure = check_recovery_code(idp, account, code)
        if failure:
            record_failure(idp, caller.acting_as(user_id), user_id, account, client_id, failure)
            raise Problem("invalid_grant", status=403, log=f"second factor: {failure}", audited=True)
        assert account  # None has an obstacle
        if not method:
            left = idp.store.count_recovery_codes(user_id)
            audit(idp, caller.acting_as(user_id), "recovery_code_used", user_id, f"left={left}")
    idp.counters.add(LOGINS, "success")
    return account, ["pwd", *([method] if method else []), "mfa"]


def make_recovery_codes(idp: Idp, caller: Caller, user_id: str) -> list[str]:
    """Return ten new single-use codes of 79 random bits, for a lost authenticator. They replace older ones."""
    letters = "abcdefghjkmnpqrstuvwxyz23456789"  # without i, l, o, 0 and 1, which look alike
    codes = ["".join(secrets.choice(letters) for _ in range(16)) for _ in range(RECOVERY_CODES)]
    with idp.store.transaction():
        idp.store.replace_recovery_codes(user_id, [sha256(code) for code in codes], idp.now())
        audit(idp, caller, "recovery_codes_made", user_id)
    return ["-".join(re.findall("....", code)) for code in codes]


def check_addressable(name: str) -> str:
    """Return what is wrong with a name that clients remove from a path, or "". RFC 3986 §5.2.4.

    A name with a slash is accepted, since scopes are often URLs; encoded, it is one segment of a path of ADMIN.
    """
    return "must not be . or .." if name in (".", "..") else ""


def check_username(username: str) -> str:
    """Return what is wrong with a folded username, or ""."""
    if not username or len(username) > USERNAME_MAX or not username.isprintable():
        return f"must be 1 to {USERNAME_MAX} printable characters"
    return "must not look like an identifier" if GROUPS_OF_UUID.fullmatch(username) else check_addressable(username)


def check_email(email: str) -> str:
    """Return what is wrong with a folded e-mail address, or ""."""
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", email) or len(email) > EMAIL_MAX or not email.isprintable():
        return "must be an e-mail address"
    return ""


def create_user(idp: Idp, caller: Caller, new_user: ProvisionUser) -> Account:
    """Create a user. Raises invalid_request or conflict."""
    username, password = fold(new_user.username), new_user.password or new_user.user_password
    email = fold(new_user.email or new_user.user_email or "")
    has_no_email = new_user.user_email is None and not email  # null, not forgotten
    verified = isinstance(new_user, CreateUser) and new_user.email_verified
    wrong_password = check_new_password(idp.options, password, username, email)
    if isinstance(new_user, CreateUser) and new_user.without_password:
        wrong_password, password = "is not to be there with without_password" if password else "", random_handle()
    reject(
        username=check_username(username), email="" if has_no_email else check_email(email),
        email_verified="the user has no address" if verified and has_no_email else "", password=wrong_password,
    )
    password_hash = hash_password(idp, password)
    try:
        with idp.store.transaction():
            account = idp.store.add_account(
                str(uuid.uuid4()), username, email, int(verified), password_hash, idp.now()
            )
            assert account
            audit(idp, caller, "user_created", account.username, account.id)
            if verified:
                audit(idp, caller, "user_email_verified", account.id)
    except Conflict:
        raise Problem("conflict", log="username or e-mail taken") from None
    return account


def get_user(idp: Idp, id_or_name: str) -> Account:
    account = idp.store.find_account(id_or_name.lower()) or idp.store.find_account_by_name(fold(id_or_name))
    if account is None:
        raise Problem("not_found")
    return account


def read_lockout(idp: Idp, value: str | int | None) -> int:
    """Return the Unix seconds at which a lockout ends, 0 for none. Raises invalid_request."""
    until = 0 if value is None else read_time(value)
    if until is None:
        reject(lockout_until="must be an ISO 8601 date-time, Unix seconds or null")
    if until and until <= idp.now():
        reject(lockout_until="must lie in the future; null clears a lockout")
    assert until is not None
    return until


def administrative(scopes) -> set[str]:
    return {scope for scope in scopes if scope.startswith("admin:")}


def rights_of_user(idp: Idp, user_id: str) -> set[str]:
    """Return the rights by which a user could act on others: names of `admin:` scopes, ids of privileged roles."""
    scopes = set(idp.store.list_scope_names_of_user(user_id))
    return administrative(scopes) | {role.id for role in idp.store.list_roles_of(user_id) if role.is_privileged}


def check_within_rights(idp: Idp, user_id: str, rights: set[str] | None):
    """Raise access_denied if a user has a right that its caller, who acts by a delegated scope, lacks.

    The caller could otherwise set the user's password, log in with it and gain that right. `rights` None stands for an
    administrator at ADMIN, who may change everybody. MadAdmin is a privileged role that no delegated scope reaches.
    """
    excess = set() if rights is None else rights_of_user(idp, user_id) - rights
    if excess:
        reason = "the user has rights that the caller lacks: " + " ".join(sorted(excess))
        raise Problem("access_denied", log=reason[:300])


def set_user_active(idp: Idp, caller: Caller, id: str, is_active: bool, rights: set[str] | None = None) -> Account:
    """Activate a user, or deactivate one and revoke everything issued to it.

    Raises unchanged, last_administrator, or access_denied as check_within_rights() does.
    """
    with idp.store.transaction():
        account = get_user(idp, id)
        check_within_rights(idp, account.id, rights)
        if bool(account.is_active) == is_active:
            raise Problem("unchanged")
        if is_active:
            idp.store.set_account_active(account.id, 1, idp.now())
            audit(idp, caller, "user_reactivated", account.id)
        else:
            forbid_removing_last_admin(idp, account.id)
            idp.store.set_account_active(account.id, 0, idp.now())
            revoke_user(idp, caller, account.id, "user_deactivated")
    return account


def set_lockout(idp: Idp, caller: Caller, id: str, value: str | int | None, reason=""):
    """Lock a user out until a time, for a reason, and revoke everything issued to it, or clear the lockout."""
    until, reason = read_lockout(idp, value), reason.strip()
    is_good = reason.isprintable() and len(reason) <= REASON_MAX
    reject(reason="" if is_good else f"must be at most {REASON_MAX} printable characters")
    with idp.store.transaction():
        account = get_user(idp, id)
        if until:
            forbid_removing_last_admin(idp, account.id)
            idp.store.set_lockout(account.id, until, idp.now(), reason, caller.actor)
            idp.counters.add(LOCKOUTS, "administrator")
            revoke_user(idp, caller, account.id, "admin.lockout.set", f"{iso(until)} {reason}".rstrip())
        else:
            idp.store.set_lockout(account.id, 0, idp.now())
            audit(idp, caller, "admin.lockout.clear", account.id)


def update_user(idp: Idp, caller: Caller, id: str, change: UpdateUser) -> Account:
    """Change the members that were sent, all or none.

    Raises invalid_request, not_found, conflict or last_administrator.
    """
    errors, username, email = {}, None, None
    if change.username is not UNSET:
        username = fold(change.username)
        kept = idp.store.find_account(id.lower()) or idp.store.find_account_by_name(fold(id))
        if kept is None or kept.username != username:  # accounts of older releases may have names that are refused now
            errors["username"] = check_username(username)
    if change.email is not UNSET:
        email = fold(change.email)
        errors["email"] = check_email(email)
    reject(**errors)
    try:
        with idp.store.transaction():
            account = get_user(idp, id)
            changes: dict[str, Any] = {
                "username": username, "email": email,
                "email_verified": None if change.email_verified is UNSET else int(change.email_verified),
            }
            changes = {
                name: value for name, value in changes.items() if value is not None and value != getattr(account, name)
            }
            if "email" in changes:  # only the old address was verified
                changes.setdefault("email_verified", 0)
            if changes:
                idp.store.update_account(
                    account.id, changes.get("username"), changes.get("email"), changes.get("email_verified"), idp.now()
                )
                audit(idp, caller, "user_updated", account.id, " ".join(sorted(changes)))
            if change.is_active is not UNSET and change.is_active != bool(account.is_active):
                set_user_active(idp, caller, account.id, change.is_active)
            if (
                change.lockout_until is not UNSET
                and (0 if change.lockout_until is None else read_time(change.lockout_until)) != account.lockout_until
            ):
                set_lockout(idp, caller, account.id, change.lockout_until)
    except Conflict:
        raise Problem("conflict", log="username or e-mail taken") from None
    return get_user(idp, account.id)


def remove_qr_files(idp: Idp):
    """Remove the QR files whose seed was confirmed, replaced, disabled or deleted. What fails, upkeep tries again."""
    root = idp.options.totp_qr_output_root
    with contextlib.suppress(Unavailable):  # what the caller committed is done
        for path in idp.store.list_due_qr_files() if root else ():
            try:
                remove_below(root, path)
                idp.store.forget_qr_file(path)
            except OSError as error:
                idp.log("totp.qr_left", "warning", path=path, reason=error.strerror)


def delete_user(idp: Idp, caller: Caller, id: str):
    """Delete a user and all its records, which invalidates its tokens."""
    with idp.store.transaction():
        account = get_user(idp, id)
        forbid_removing_last_admin(idp, account.id)
        idp.store.delete_account(account.id)
        audit(idp, caller, "delete_user", account.id, account.username)
    remove_qr_files(idp)


def verify_email(idp: Idp, caller: Caller, id: str):
    with idp.store.transaction():
        account = get_user(idp, id)
        if not account.email:
            reject(email="the user has none")
        idp.store.update_account(account.id, None, None, 1, idp.now())
        audit(idp, caller, "user_email_verified", account.id)


def reset_password(idp: Idp, caller: Caller, id: str, password: str, rights: set[str] | None = None):
    """Set the password of a user and revoke everything issued to it.

    Raises access_denied as check_within_rights() does.
    """
    account = get_user(idp, id)
    reject(new_password=check_new_password(idp.options, password, account.username, account.email))
    password_hash = hash_password(idp, password)
    with idp.store.transaction():
        account = get_user(idp, account.id)
        check_within_rights(idp, account.id, rights)
        idp.store.set_password_hash(account.id, password_hash, idp.now())
        revoke_for_new_credentials(idp, caller, account.id, "user_password_reset")


def rights_left(idp: Idp, found: Invitation) -> set[str] | None:
    """Return the rights by which an invitation was made, as far as whoever made it still has them.

    None stands for those of an administrator. Whoever may make none any more has no right at all.
    """
    maker = idp.store.find_account(found.created_by)
    if not found.rights:
        return None if maker and maker.is_active and is_admin(idp, maker.id) else set()
    client = None if maker else idp.store.find_client(found.created_by)
    if client and client.is_active and found.created_ms > client.revoked_before:
        current = administrative({scope.name for scope in idp.store.list_scopes_of_client(client.id)})
    else:
        current = rights_of_user(idp, maker.id) if maker and maker.is_active else set()
    return set(msgspec.json.decode(found.rights)) & current


def may_invite(idp: Idp, found: Invitation | None) -> Account | None:
    """Return the user of an invitation, if it is alive now, else None.

    A change of the user's credentials has deleted it; whatever revokes all that was issued to the user ends it too.
    Whoever made it must still be able to make it: a right that was taken away leaves no link behind.
    """
    account = idp.store.find_account(found.user_id) if found else None
    if found is None or found.expires_at <= idp.now() or found.created_ms <= idp.revoked_before:
        return None
    if not is_still_valid(account, found.created_ms):
        return None
    rights = rights_left(idp, found)
    may_make = rights is None or (INVITES in rights and not rights_of_user(idp, account.id) - rights)
    return account if may_make else None


def create_invitation(
    idp: Idp, caller: Caller, id: str, purpose: str, rights: set[str] | None = None
) -> tuple[Invitation, str]:
    """Make an invitation of a user, and return it with its secret. It replaces the one that the user may have.

    Raises not_found, invalid_request for an inactive user, or access_denied as check_within_rights() does.
    """
    handle, now = random_handle(), idp.now()
    with idp.store.transaction():
        account = get_user(idp, id)
        check_within_rights(idp, account.id, rights)
        reject(user_id="" if account.is_active else "is inactive: activate the user first")
        client = None if rights is None else idp.store.find_client(caller.actor)
        client_ended = client.revoked_before if client else 0
        row = Invitation(
            account.id, str(uuid.uuid4()), sha256(handle), purpose,
            "" if rights is None else msgspec.json.encode(sorted(rights)).decode(), caller.actor,
            max(idp.now_ms(), idp.revoked_before + 1, account.revoked_before + 1, client_ended + 1),
            now + INVITATION_TTL,
        )
        idp.store.put_invitation(row)
        audit(idp, caller, "invitation_created", account.id, f"purpose={purpose};id={row.id}")
    return row, handle


def delete_invitation(idp: Idp, caller: Caller, id: str):
    """End an invitation. Raises not_found if it is over."""
    with idp.store.transaction():
        found = idp.store.find_invitation_by_id(id.lower())
        if found is None or may_invite(idp, found) is None:
            raise Problem("not_found")
        idp.store.delete_invitation(found.user_id)
        audit(idp, caller, "invitation_deleted", found.user_id, f"id={found.id}")


def get_invited(idp: Idp, code: str) -> tuple[Invitation, Account]:
    """Return the living invitation of a secret and its user, and spend nothing. Raises not_found."""
    found = idp.store.find_invitation(sha256(code)) if code else None
    account = may_invite(idp, found)
    if found is None or account is None:
        raise Problem("not_found", log="an invitation that is unknown, used, replaced, expired or ended")
    return found, account


def accept_invitation(idp: Idp, caller: Caller, code: str, password: str) -> tuple[Invitation, Account]:
    """Spend an invitation: set the password of its user and revoke everything issued before. A second factor stays.

    Raises not_found if it is over, or invalid_request for a password that is refused, which spends nothing.
    """
    _, account = get_invited(idp, code)
    reject(new_password=check_new_password(idp.options, password, account.username, account.email))
    password_hash = hash_password(idp, password)
    with idp.store.transaction():
        found = idp.store.spend_invitation(sha256(code), idp.now())
        user = may_invite(idp, found)
        if found is None or user is None:
            raise Problem("not_found", log="the invitation was used or ended meanwhile")
        idp.store.set_password_hash(user.id, password_hash, idp.now())
        accepted = f"purpose={found.purpose};id={found.id}"
        revoke_user(idp, caller.acting_as(user.id), user.id, "invitation_accepted", accepted)
        return found, get_user(idp, user.id)


def verify_password(idp: Idp, caller: Caller, request: VerifyPassword) -> Account:
    """Return the user if this is its password and it could log in. Raises invalid_grant with 403, as a login."""
    if not (request.user_id or request.username):
        reject(user_id="is required, or username")
    account = idp.store.find_account(request.user_id.lower()) if request.user_id else None
    name = account.username if account else request.username or request.user_id
    return authenticate_user(idp, caller, name, request.password, request.totp, only_password=True)[0]


def enable_totp(idp: Idp, account: Account, seed: str, code: str):
    """Enable the second factor, if a code proves that the user has the seed."""
    time_step = totp_time_step(seed, code, idp.now())
    if time_step is None:
        raise Problem("invalid_grant", status=403, log="the one-time code is wrong")
    with idp.store.transaction():
        idp.store.set_totp(account.id, idp.seal.close(seed, account.id), idp.now())
        idp.store.spend_totp_step(account.id, time_step)
        audit(idp, LOCAL.acting_as(account.id), "totp_enabled", account.id)


def begin_totp(idp: Idp, caller: Caller, account: Account, seed="", qr_file="") -> str:
    """Store a pending seed and return it. The previous second factor stays enabled until confirm_totp().

    `qr_file`, if there is one, shows the seed: its path below `totp-qr-output-root`.
    """
    seed = seed or new_totp_seed()
    with idp.store.transaction():
        idp.store.set_pending_totp(get_user(idp, account.id).id, idp.seal.close(seed, account.id), idp.now())
        if qr_file:
            idp.store.add_qr_file(account.id, qr_file)
        audit(idp, caller, "totp_generated", account.id)
    remove_qr_files(idp)
    return seed


def record_totp_change(idp: Idp, caller: Caller, account: Account, action: str, revoke: bool):
    """Audit a change of the second factor, and revoke everything issued to the user before if `revoke` is true."""
    if revoke:
        revoke_for_new_credentials(idp, caller, account.id, action)
    else:
        audit(idp, caller, action, account.id)


def record_wrong_first_code(idp: Idp, caller: Caller, account: Account):
    """Count a wrong first code of a second factor, as a wrong code at a login; audit it.

    While the second factor is locked it changes nothing.
    """
    if account.totp_locked_until > idp.now():
        audit_refusal(idp, caller, "totp_first_code_wrong", account.id, "second factor locked", proven=True)
        return
    with idp.store.transaction():
        count_failed_code(idp, account)
        audit(idp, caller, "totp_first_code_wrong", account.id, "", FAILURE)


def confirm_totp(idp: Idp, caller: Caller, account: Account, code: str, revoke=True):
    """Enable the pending seed by its first code. Raises invalid_grant with 403; failures count as at a login.

    Unless the user does it in a session of its own, everything issued to the user before is revoked.
    """
    if not account.totp_pending_sealed:
        reject(code="no second factor waits for its first code: generate one")
    now = idp.now()
    seed = idp.seal.open(account.totp_pending_sealed, account.id)
    time_step = totp_time_step(seed, code, now) if account.totp_locked_until <= now else None
    with idp.store.transaction():
        fresh = get_user(idp, account.id)
        is_confirmed = time_step is not None and fresh.totp_pending_sealed == account.totp_pending_sealed
        if is_confirmed:
            assert time_step is not None
            idp.store.set_totp(account.id, fresh.totp_pending_sealed, now)
            idp.store.spend_totp_step(account.id, time_step)
            record_totp_change(idp, caller, account, "totp_enabled", revoke)
    if not is_confirmed:
        record_wrong_first_code(idp, caller, account)
        raise Problem("invalid_grant", status=403, log="the one-time code is wrong", audited=True)
    remove_qr_files(idp)


def disable_totp(idp: Idp, caller: Caller, account: Account, revoke=True):
    """Remove the second factor of a user. Raises not_found if there is none.

    Unless the user does it in a session of its own, everything issued to the user before is revoked.
    """
    with idp.store.transaction():
        if not idp.store.clear_totp(account.id, idp.now()):
            raise Problem("not_found", log="the user has no second factor")
        record_totp_change(idp, caller, account, "disable_totp", revoke)
    remove_qr_files(idp)


# -- roles and permissions --


def check_label(label: str) -> str:
    """Return what is wrong with a text for people, or ""."""
    is_good = label.isprintable() and len(label) <= LABEL_MAX
    return "" if is_good else f"must be at most {LABEL_MAX} printable characters"


def check_name(name: str) -> str:
    """Return what is wrong with the name of a role or permission, or ""."""
    if not name or GROUPS_OF_UUID.fullmatch(name):
        return "must not be blank, nor look like an identifier"
    return check_label(name) or check_addressable(name)


# What people take for a letter of MadAdmin, after NFKD and case folding: Cyrillic, Greek, Latin, Armenian, Cherokee,
# Lisu, Coptic. Unicode Technical Standard 39 §4 calls them confusable; its whole table has 6,000 rows.
CONFUSABLES = {
    "a": "\u0430\u03b1\u0251\u1d00\u13aa\ua4ee@", "d": "\u0501\u0257\u0111\u1d05\u13a0\ua4d3",
    "m": "\u043c\u03bc\u1d0d\u0271\u03fb\u13b7\ua4df\u2c99",
    "i": "\u0456\u0131\u03b9\u0269\u026a\u04cf\u13a5\ua4f2\u2c93l1|!",
    "n": "\u043f\u0578\u057c\u03b7\u03bd\u0274\u0272\u014b\ua4e0\u2c9b",
}
LETTERS = str.maketrans({like: letter for letter, likes in CONFUSABLES.items() for like in likes})


def skeleton(name: str) -> str:
    """Return a name as people see it: folded, confusable letters made one, without separators and what is invisible."""
    letters = unicodedata.normalize("NFKD", fold(name)).translate(LETTERS)
    return "".join(each for each in letters if unicodedata.category(each)[0] not in "ZPCM").replace("rn", "m")


def check_role_name(name: str) -> str:
    """Return what is wrong with the name of a role, or "". MadAdmin itself is for the store to call taken."""
    if wrong := check_name(name):
        return wrong
    is_alike = name != MAD_ADMIN_ROLE_NAME and skeleton(name) == skeleton(MAD_ADMIN_ROLE_NAME)
    return f"could be mistaken for {MAD_ADMIN_ROLE_NAME}" if is_alike else ""


def key_of(id_or_name: str) -> str:
    """Return an id or a name in its stored form. No name has the form of an id."""
    return id_or_name.lower() if GROUPS_OF_UUID.fullmatch(id_or_name) else normalise(id_or_name)


def get_role(idp: Idp, id_or_name: str) -> Role:
    role = idp.store.find_role(key_of(id_or_name))
    if role is None:
        raise Problem("not_found")
    return role


def create_role(idp: Idp, caller: Caller, new_role: CreateRole) -> Role:
    name, description = normalise(new_role.name), (new_role.description or "").strip()
    reject(name=check_role_name(name), description=check_label(description))
    try:
        with idp.store.transaction():
            is_privileged = bool(new_role.is_privileged)
            role = idp.store.add_role(str(uuid.uuid4()), name, description, is_privileged, idp.now())
            audit(idp, caller, "role_created", name, role.id)
    except Conflict:
        raise Problem("conflict") from None
    return role


def update_role(idp: Idp, caller: Caller, id: str, change: UpdateRole) -> Role:
    """Change the members that were sent, except a blank name and nulls. Raises protected, conflict."""
    name = normalise(change.name) if change.name else None
    description = change.description.strip() if isinstance(change.description, str) else None
    kept = idp.store.find_role(key_of(id))  # roles of older releases may have names that are refused now
    reject(
        name=check_role_name(name) if name and not (kept and kept.name == name) else "",
        description=check_label(description or ""),
    )
    try:
        with idp.store.transaction():
            role = get_role(idp, id)
            if role.is_protected and (name not in (None, role.name) or description not in (None, role.description)):
                raise Problem("protected")
            is_privileged = change.is_privileged if isinstance(change.is_privileged, bool) else None
            if role.is_protected and is_privileged is False:
                raise Problem("protected")
            changed = idp.store.update_role(role.id, name, description, is_privileged, idp.now())
            assert changed
            audit(idp, caller, "role_updated", changed.id, changed.name)
    except Conflict:
        raise Problem("conflict") from None
    return changed


def delete_role(idp: Idp, caller: Caller, id: str):
    """Delete a role and revoke everything issued to the users who had it.

    Many holders are revoked in slices, between which others write, before this returns. If it is interrupted, upkeep
    goes on.
    """
    with idp.store.transaction():
        role = get_role(idp, id)
        if role.is_protected:
            raise Problem("protected")
        is_done = idp.store.delete_role(role.id, idp.now_ms())
        audit(idp, caller, "delete_role", role.id, role.name)
    while not is_done:
        is_done = not idp.store.delete_slice("role", role.id, SLICE, idp.now_ms())


def assign_role(idp: Idp, caller: Caller, user_id: str, role_id: str) -> bool:
    """Assign a role to a user. Return whether the user did not have it before."""
    with idp.store.transaction():
        account, role = get_user(idp, user_id), get_role(idp, role_id)
        added = idp.store.assign_role(account.id, role.id, idp.now())
        if added:
            audit(idp, caller, "role_assigned", account.id, role.id)
    return added


def unassign_role(idp: Idp, caller: Caller, user_id: str, role_id: str):
    """Remove a role from a user and revoke everything issued to it. Raises not_found, last_administrator."""
    with idp.store.transaction():
        account, role = get_user(idp, user_id), get_role(idp, role_id)
        if not any(assigned.id == role.id for assigned in idp.store.list_roles_of(account.id)):
            raise Problem("not_found", log="the user does not have this role")
        if role.id == MAD_ADMIN_ROLE_ID:
            forbid_removing_last_admin(idp, account.id)
        idp.store.unassign_role(account.id, role.id)
        revoke_user(idp, caller, account.id, "role_unassigned", role.id)


def set_roles(idp: Idp, caller: Caller, user_id: str, role_ids):
    """Replace the roles of a user by these, all or none."""
    with idp.store.transaction():
        account = get_user(idp, user_id)
        new_ids = {get_role(idp, id).id for id in role_ids}
        old_ids = {role.id for role in idp.store.list_roles_of(account.id)}
        for role_id in sorted(new_ids - old_ids):
            assign_role(idp, caller, account.id, role_id)
        for role_id in sorted(old_ids - new_ids):
            unassign_role(idp, caller, account.id, role_id)


def get_permission(idp: Idp, id_or_name: str) -> Permission:
    permission = idp.store.find_permission(key_of(id_or_name))
    if permission is None:
        raise Problem("not_found")
    return permission


def create_permission(idp: Idp, caller: Caller, new_permission: CreatePermission) -> Permission:
    name = normalise(new_permission.name)
    reject(name=check_name(name))
    try:
        with idp.store.transaction():
            permission = idp.store.add_permission(str(uuid.uuid4()), name, idp.now())
            audit(idp, caller, "create_permission", name, permission.id)
    except Conflict:
        raise Problem("conflict") from None
    return permission


def update_permission(idp: Idp, caller: Caller, id: str, change: UpdatePermission) -> Permission:
    name = None if change.name is UNSET else normalise(change.name)
    kept = idp.store.find_permission(key_of(id))  # permissions of older releases may have names that are refused now
    reject(name=check_name(name) if name is not None and not (kept and kept.name == name) else "")
    try:
        with idp.store.transaction():
            permission = idp.store.update_permission(get_permission(idp, id).id, name, idp.now())
            assert permission
            audit(idp, caller, "permission_updated", permission.id, permission.name)
    except Conflict:
        raise Problem("conflict") from None
    return permission


def delete_permission(idp: Idp, caller: Caller, id: str):
    with idp.store.transaction():
        permission = get_permission(idp, id)
        idp.store.delete_permission(permission.id)
        audit(idp, caller, "delete_permission", permission.id, permission.name)


def assign_permission(idp: Idp, caller: Caller, role_id: str, permission_id: str) -> bool:
    """Assign a permission to a role. Return whether the role did not have it before."""
    with idp.store.transaction():
        role, permission = get_role(idp, role_id), get_permission(idp, permission_id)
        added = idp.store.assign_permission(role.id, permission.id, idp.now())
        if added:
            audit(idp, caller, "assigned_permission", permission.id, role.id)
    return added


def remove_permission(idp: Idp, caller: Caller, role_id: str, permission_id: str):
    with idp.store.transaction():
        role, permission = get_role(idp, role_id), get_permission(idp, permission_id)
        if not idp.store.remove_permission(role.id, permission.id):
            raise Problem("not_found", log="the role does not have this permission")
        audit(idp, caller, "permission_unassigned", role.id, permission.id)


def explain_access(
    idp: Idp, request: CheckAccess, account: Account | None, is_allowed: bool
) -> tuple[str, list[str]]:
    """Return why a user has a permission or scope, or lacks it, and the names of the roles by which it has it."""
    name = request.scope or request.permission_id or request.permission
    kind = "scope" if request.scope else "permission"
    found = idp.store.find_scope(name) if request.scope else idp.store.find_permission(key_of(name))
    if account is None:
        return "there is no such user", []
    if not account.is_active:
        return "the user is inactive", []
    if found is None:
        return f"there is no such {kind}", []
    if request.scope:
        return "the user has this scope" if is_allowed else "the user does not have this scope", []
    mine = {role.id for role in idp.store.list_roles_of(account.id)}
    roles = [role.name for role in idp.store.list_roles_with(found.id) if role.id in mine]
    return "a role of the user has this permission" if is_allowed else "no role of the user has this permission", roles


def check_access(idp: Idp, request: CheckAccess) -> AccessVerdict:
    """Return whether a user has a permission or scope; an unknown user, permission or scope is denied.

    Unless asked by `permission_id`, the answer has only the member `access`; with `explain` also why, and by which
    roles.
    """
    account = idp.store.find_account(request.user_id.lower()) or idp.store.find_account_by_name(fold(request.user_id))
    user_id = account.id if account else request.user_id
    if request.scope:
        scopes = idp.store.list_scopes_of_user(user_id) if account and account.is_active else ()
        verdict = AccessVerdict(any(request.scope in (scope.name, scope.id) for scope in scopes))
    else:
        asked = request.permission_id or request.permission
        reject(
            permission_id="" if asked.strip() else "is required",
            user_id="" if request.user_id.strip() else "is required",
        )
        permissions = idp.store.list_permissions_of_user(user_id)
        verdict = AccessVerdict(any(asked in (permission.id, permission.name) for permission in permissions))
        if request.permission_id:
            verdict = AccessVerdict(verdict.access, request.user_id, request.permission_id, verdict.access)
    if request.explain:
        verdict.reason, verdict.by_roles = explain_access(idp, request, account, verdict.access)
    return verdict


# -- the brand of the pages --


def read_logo(idp: Idp, name: str) -> tuple[bytes, str]:
    """Return the picture of the brand and its media type, if this is its file name. Raises not_found."""
    brand = idp.brand
    if not name or name != brand.logo:
        raise Problem("not_found")
    row = idp.store.find_brand() or NO_BRAND
    content = idp.option_logo[0] if row.logo_sha256 is None else idp.store.find_brand_logo(row.logo_sha256)
    if not content:  # it was replaced just now
        raise Problem("not_found")
    return content, brand.logo_type


def describe_brand(idp: Idp) -> BrandObject:
    """Return the brand of the pages, and where each part of it is from."""
    row, options = idp.store.find_brand() or NO_BRAND, idp.options
    name, shade = options.brand_name if row.name is None else row.name, row.color or options.brand_color
    file, media_type = idp.brand_logo(row)
    sha256, size = row.logo_sha256, row.logo_bytes
    if sha256 is None:
        content = idp.option_logo[0]
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    logo = BrandLogo(f"{options.auth_issuer}/pages/{file}", media_type, size, sha256) if file else None
    return BrandObject(
        name, box_name(options, ""), shade, on_brand(shade), round(contrast(on_brand(shade), shade), 2), logo,
        BrandOrigins(*("option" if part is None else "set" for part in (row.name, row.color, row.logo_sha256))),
        iso(row.modified_at) if row.modified_at else None,
    )


def read_picture(encoded: str) -> tuple[bytes, str]:
    """Return a picture and its media type; raise ValueError with a sentence if it is too large or none of ours."""
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except binascii.Error:
        raise ValueError("must be base64") from None
    if len(content) > LOGO_SIZE:
        raise ValueError(f"must have at most {LOGO_SIZE} octets")
    return content, picture_type(content)


def change_brand(idp: Idp, caller: Caller, change: ChangeBrand) -> BrandObject:
    """Change what is sent of the brand; None leaves a part to the options. Raises invalid_request."""
    parsed: dict[str, Any] = {}
    errors: dict[str, str] = {}
    readers: dict[str, Callable] = {
        "name": lambda name: label(name.strip()), "color": color,
        "logo": lambda logo: read_picture(logo) if logo.strip() else (b"", ""),
    }
    for member, read in readers.items():
        value = getattr(change, member)
        try:
            if value is not UNSET:
                parsed[member] = None if value is None else read(value)
        except ValueError as error:
            errors[member] = str(error).partition(";")[0]  # the rest is about the file of the options
    reject(**errors)
    logo = None
    if "logo" in parsed:
        logo, media_type = parsed.pop("logo") or (b"", "")
        sha256 = hashlib.sha256(logo).hexdigest() if logo else "" if change.logo is not None else None
        parsed |= {"logo_sha256": sha256, "logo_type": media_type}
    with idp.store.transaction(identity=True):
        row = idp.store.find_brand() or NO_BRAND
        changed = {member: value for member, value in parsed.items() if getattr(row, member) != value}
        if changed:
            row = msgspec.structs.replace(row, **changed, modified_at=idp.now())
            idp.store.put_brand(row, logo)
            shown = (
                f"{member}={'of the option' if value is None else value}"
                for member, value in changed.items() if member != "logo_type"
            )
            audit(idp, caller, "brand_changed", "brand", " ".join(shown))
        return describe_brand(idp)


def reset_brand(idp: Idp, caller: Caller) -> None:
    """Leave the brand to the options again."""
    with idp.store.transaction(identity=True):
        if idp.store.delete_brand():
            audit(idp, caller, "brand_reset", "brand")


# == Clients ===================================================================
# Registration, authentication, scopes.

def load_client(idp: Idp, id_or_client_id: str) -> Client | None:
    store = idp.store
    row = store.find_client(id_or_client_id)
    if row is None:
        return None
    secrets = store.list_secrets(row.id, idp.now())
    hashes = tuple((secret.secret_hash, secret.expires_at) for secret in secrets)
    scopes = frozenset(scope.name for scope in store.list_scopes_of_client(row.id))
    uris = store.list_uris(row.id)
    redirect, post_logout, origins = (tuple(uri.uri for uri in uris if uri.kind == kind) for kind in URI_KINDS)
    ids = {secret.secret_hash: secret.id for secret in secrets}
    return Client(row, hashes, scopes, store.list_features(row.id), redirect, post_logout, origins, ids)


def find_client(idp: Idp, client_id: str) -> Client | None:
    """Return an active client with its secrets, scopes, flags and URIs; cached until the cache generation changes."""
    cache = idp.cache()
    client = cache.get(client_id)
    if client is None:
        client = load_client(idp, client_id)
        if client is not None and client.client_id == client_id and len(cache) < 10_000:
            cache[client_id] = client
    return client if client is not None and client.row.is_active and client.client_id == client_id else None


def get_client(idp: Idp, id_or_client_id: str) -> Client:
    is_id = GROUPS_OF_UUID.fullmatch(id_or_client_id)
    client = load_client(idp, id_or_client_id.lower() if is_id else id_or_client_id.strip())
    if client is None:
        raise Problem("not_found")
    return client


def ttl(client: Client, flag: str, default: int) -> int:
    """Return a lifetime in seconds: the client's option if it is a positive number, else `default`."""
    option = client.flags.get(flag, "")
    return int(option) if re.fullmatch(r"[0-9]{1,9}", option) and int(option) else default


def token_lifetime(idp: Idp, client: Client) -> int:
    """Return how many seconds an access token of this client lives."""
    return ttl(client, "TOKEN_EXPIRATION", idp.options.token_expiration)


def unexpired_hashes(client: Client | None, now: int) -> list:
    return [stored for stored, expires_at in client.secret_hashes if expires_at > now] if client else []


def note_secret_use(idp: Idp, client: Client | None, stored: str, now: int):
    """Record that a secret of a client, given by its hash, was used now; written within 20 ms, not at once."""
    assert client
    idp.store.note_secret_use(client.secret_ids[stored], now)


def find_verified_client(idp: Idp, pairs) -> Client | None:
    """Return the client of the first (client_id, secret) whose secret Argon2 has accepted recently, or None."""
    now = idp.now()
    for client_id, secret in pairs:
        client = find_client(idp, client_id)
        for stored in unexpired_hashes(client, now):
            if idp.verified_client_secrets.contains(stored, secret, now):
                note_secret_use(idp, client, stored, now)
                return client
    return None


def verify_client_secret(idp: Idp, client_id: str, secret: str) -> Client | None:
    """Return the client if this is its secret, else None.

    Its secrets have one salt, so that Argon2 is computed once whether the client is unknown, has one secret, or is in
    the middle of a rotation: timing tells nothing. Two secrets of an earlier release cost two until one is replaced.
    """
    stored = idp.hasher.find_match(unexpired_hashes(find_client(idp, client_id), idp.now()), secret)
    if stored is None:
        return None
    client, now = find_client(idp, client_id), idp.now()  # it may have changed during the verification
    if client is None or stored not in unexpired_hashes(client, now):
        return None
    # Cached for longer than one token lifetime: the client returns when its token expires.
    idp.verified_client_secrets.add(stored, secret, now, token_lifetime(idp, client))
    note_secret_use(idp, client, stored, now)
    return client


def authenticate_client(
    idp: Idp, caller: Caller, client_id: str, secret: str | None, *raw: tuple[str, str | None]
) -> Client:
    """Authenticate a client and return it. RFC 6749 §2.3.

    `secret` is None if the request had none: correct for a public client only. `raw` is the pair as it came, if
    form-decoding has changed it: it is tried next. Raises invalid_client, after the same amount of hashing for an
    unknown client as for a wrong secret; whatever was tried counts as one failure.
    """
    candidates = ((client_id, secret), *raw)
    if secret is None:
        for name, _ in candidates:
            client = find_client(idp, name)
            if client is not None and client.row.client_type == PUBLIC_CLIENT:
                return client
        raise Problem("invalid_client", log="no client secret")
    pairs = [(name, word) for name, word in candidates if word is not None]
    client = find_verified_client(idp, pairs)
    if client is not None:
        return client
    idp.throttle.check(caller.peer, client_id)
    # One verification per client at a time: after a restart, the first request hashes and the waiting ones reuse it.
    with hash_problems(), idp.hasher.name_locks.hold("client", client_id, caller.peer) as name_lock:
        client = find_verified_client(idp, pairs)
        if client is not None:
            return client
        with idp.hasher.gate.slot(caller.peer):
            for pair in pairs:
                client = verify_client_secret(idp, *pair)
                if client is not None:
                    return client
        idp.hasher.name_locks.blame(name_lock, caller.peer)
    idp.throttle.spend(caller.peer, client_id)
    named = next((client.client_id for name, _ in pairs if (client := find_client(idp, name))), "")
    audit_refusal(idp, caller.acting_as(named or "anonymous"), "client_authentication_failed", named)
    raise Problem("invalid_client", log="unknown client, or wrong secret")


def excerpt(value: str) -> str:
    """Return a value of a request for the log: at most 300 octets, what no URI contains percent-encoded (RFC 3986 §2).

    So a log line delimits it by angle brackets (RFC 3986 Appendix C).
    """
    text = quote(value[:301], safe="!#$%&'()*+,/:;=?@[]", errors="replace")
    return text if len(text) <= 300 else text[:297] + "..."


def nearest(value: str, registered) -> str:
    """Return which of the first 100 registered values is most like a value that is not, or "".

    What differs is what remains between the beginning and the end that two have in common, in letters of any case.
    That takes linear time: anybody can have it computed.
    """
    came = value[:2000].casefold()

    def common(one: str, other: str) -> int:
        pairs = enumerate(zip(one, other, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))

    def difference(other: str) -> int:
        other = other.casefold()
        same = common(came, other) + common(came[::-1], other[::-1])
        return max(len(came), len(other)) - min(same, len(came), len(other))

    return min(sorted(registered)[:100], key=difference, default="")


def describe_unregistered(value: str, registered) -> str:
    """Return what the log says of a value that is not registered."""
    closest = nearest(value, registered)
    return f"<{excerpt(value)}>; " + (f"the nearest is <{excerpt(closest)}>" if closest else "there is none")


def describe_scopes(scopes, allowed) -> str:
    """Return what the log says of scopes that are not allowed, the first three one by one."""
    found = [describe_unregistered(scope, allowed) for scope in sorted(scopes)[:3]]
    if len(scopes) > 3:
        found.append(f"{len(scopes) - 3} more")
    if any("," in scope for scope in scopes):
        found.append("scopes are separated by blanks, not by commas")
    return "; ".join(found)


def allowed_to_user(scopes, client_scopes, user_scopes) -> frozenset:
    """Return what a user may be granted at a client where `scopes` are asked for.

    What both have, and with `openid` the OpenID Connect scopes.
    """
    return frozenset(client_scopes & user_scopes).union(OIDC_SCOPES if OPENID in scopes else ())


def decide_scopes(requested: str | None, client_scopes, user_scopes=None) -> str:
    """Return the scopes to grant, space-delimited and sorted by name. RFC 6749 §3.3.

    requested ∩ client's ∩ user's; a user who requests `openid` may also get the OpenID Connect scopes.
    `user_scopes` None means that there is no user. A request without scopes gets all that are allowed.
    Raises invalid_scope if a requested scope is unknown or not allowed.
    """
    allowed = client_scopes if user_scopes is None else client_scopes & user_scopes
    if requested is None or not requested.strip(" "):
        return " ".join(sorted(allowed))
    scopes = set(requested.split(" ")) - {""}
    if user_scopes is not None:
        allowed = allowed_to_user(scopes, client_scopes, user_scopes)
    if not scopes <= allowed:
        refused = describe_scopes(scopes - allowed, allowed)
        raise Problem("invalid_scope", log=f"asked for more than is allowed: {refused}")
    return " ".join(sorted(scopes))


def decide_login_scopes(idp: Idp, requested: str | None, client_scopes, user_scopes) -> str:
    """Return the scopes to grant where a person logs in, space-delimited and sorted by name. RFC 6749 §3.3.

    A scope that does not exist here is ignored, and one that the user does not have is left out, because clients
    request what other servers offer: OpenID Connect Core §3.1.2.1. The `scope` of the answer says what is granted.
    Raises invalid_scope if the client may not request a scope that exists, or if nothing of the request is left.
    """
    if requested is None or not requested.strip(" "):
        return decide_scopes(None, client_scopes, user_scopes)
    scopes = set(requested.split(" ")) - {""}
    of_openid = set(OIDC_SCOPES) if OPENID in scopes else set()
    unknown = scopes - client_scopes - of_openid
    if refused := unknown & {*OIDC_SCOPES, *idp.store.find_scope_names(unknown)}:
        came = describe_scopes(refused, client_scopes)
        raise Problem("invalid_scope", log=f"asked for more than the client may: {came}")
    allowed = allowed_to_user(scopes, client_scopes, user_scopes)
    granted = scopes & allowed
    if not granted:  # decide_scopes() would take it for a request without scopes
        raise Problem("invalid_scope", log=f"nothing of the scope can be granted: {describe_scopes(scopes, allowed)}")
    return decide_scopes(" ".join(granted), client_scopes, user_scopes)


def check_client_id(client_id: str) -> str:
    """Return what is wrong with a client_id, or "". A UUID is refused: it could be mistaken for a user's `sub`."""
    if not CLIENT_ID.fullmatch(client_id) or GROUPS_OF_UUID.fullmatch(client_id):
        return "must be 1 to 255 printable ASCII characters without blank or colon, and not look like a UUID"
    return check_addressable(client_id)


def check_scope_name(name: str) -> str:
    """Return what is wrong with the name of a scope, or "". RFC 6749 §3.3."""
    if not SCOPE_TOKEN.fullmatch(name) or GROUPS_OF_UUID.fullmatch(name):
        return "must be printable ASCII without blank, quote or backslash, and not look like a UUID"
    return check_addressable(name)


# No code is sent to these: they run script, open local files, or belong to other programs than a client, as the mail
# program or the browser itself. `localhost:8080/cb` lacks its http://, and would be a scheme otherwise.
NEVER_SCHEMES = re.compile(
    "about|afp|android-app|blob|brave|callto|chrome[^.]*|cid|content|data|edge|facetime|file|filesystem|firefox|ftps?|geo"
    "|gopher|hcp|help|imap|intent|ircs?|itms[^.]*|jar|javascript|ldaps?|livescript|localhost|magnet|mailto|market|mhtml"
    "|microsoft-edge|mid|mk|mms|mmsto|mocha|moz-extension|ms-[^.]*|news|nfs|nntp|opera|pop|res|resource|rtsp"
    "|safari-[^.]*|search|search-ms|sftp|shell|sips?|smb|sms|smsto|ssh|tel|telnet|tftp|urn|vbscript|view-source|vivaldi"
    "|vnc|wss?|xmpp"
)
LOOPBACK_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)*localhost|::1|127(?:\.[0-9]{1,3}){3}")


def is_loopback_host(host: str) -> bool:
    """Return whether a host is this machine: a literal, or `localhost` and the names below it. RFC 6761 §6.3."""
    return LOOPBACK_HOST.fullmatch(host) is not None


def check_redirect_uri(uri: str, allow_http=False, allow_short=False) -> str:
    """Return what is wrong with a redirect URI, or "". RFC 6749 §3.1.2, RFC 8252 §7, RFC 9700 §2.1.

    https for any host; http for loopback, or for any host with `allow_http`; the private-use scheme of a native app
    must be a reversed domain name, or may be short with `allow_short`.
    """
    if len(uri) > URI_MAX or not re.fullmatch(r"[\x21-\x7e]+", uri) or re.search(r'["<>\\^`{|}]', uri):
        return f"must be a URI of at most {URI_MAX} characters, everything else percent-encoded"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        return "is not a URI"
    if "#" in uri:
        return "must not have a fragment"
    if not parts.scheme or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri):
        return "must be an absolute URI"
    if NEVER_SCHEMES.fullmatch(parts.scheme):
        return f"must not have the scheme {parts.scheme}"
    if parts.scheme in ("http", "https"):
        if not parts.hostname or "@" in parts.netloc or not uri.lower().startswith(parts.scheme + "://"):
            return "must name a host, and no user"
        if parts.scheme == "http" and not allow_http and not is_loopback_host(parts.hostname):
            return (
                "must be https, or http to this machine (localhost, 127.0.0.1 or [::1]); allow_http_redirects lets a "
                "confidential client have others"
            )
        return ""
    if "." in parts.scheme:
        return ""
    if re.match("[^:]+:[0-9]+(/|$)", uri):
        return "must be an absolute URI: this is a host and its port"
    other = "must have the scheme https or a reversed domain name; allow_short_schemes lets a client have others"
    return "" if allow_short else other


def check_origin(uri: str) -> str:
    """Return what is wrong with a CORS origin, or "". RFC 6454 §6.1.

    The origin of a packaged application or a browser extension, as in capacitor://localhost, has a scheme of its own.
    """
    if len(uri) > URI_MAX:
        return f"must have at most {URI_MAX} characters"
    packaged = re.fullmatch(r"([a-z][a-z0-9+.-]*)://[A-Za-z0-9._-]+(?::[0-9]{1,5})?", uri)
    if packaged and packaged[1] not in ("http", "https"):
        has_pages = packaged[1].endswith("-extension") or not NEVER_SCHEMES.fullmatch(packaged[1])
        return "" if has_pages else f"no page that may read answers has the scheme {packaged[1]}"
    found = re.fullmatch(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::([0-9]{1,5}))?", uri)
    if not found:
        return "must be scheme, host and port in lower case, such as https://app.example, and nothing more"
    scheme, host, port = found.groups()
    if port == ("443" if scheme == "https" else "80"):
        return "must leave out the default port, as browsers do"
    return "" if scheme == "https" or is_loopback_host(host.strip("[]")) else "must be https, or http to this machine"


def is_registered_uri(uri: str, registered) -> bool:
    """Return whether a redirect URI is registered, compared octet by octet.

    The port of a loopback IP literal or of `localhost` may differ. RFC 9700 §2.1, RFC 8252 §7.3. Not that of a name
    below localhost, such as app.localhost: neither exempts it, and behind a local proxy its port is always the same.
    """
    if uri in registered:
        return True
    loopback = re.compile(r"http://(127\.0\.0\.1|\[::1\]|localhost)(?::([0-9]{1,5}))?((?:[/?].*)?)", re.S)
    found = loopback.fullmatch(uri)
    if not found or "#" in uri or (found[2] and not 0 < int(found[2]) < 65536):
        return False
    others = (loopback.fullmatch(other) for other in registered)
    return any(other and (other[1], other[3]) == (found[1], found[3]) for other in others)


def check_uri(kind: str, uri: str, row: ClientRow) -> str:
    """Return what is wrong with a URI of this kind for a client, or ""."""
    if kind == "cors_origin":
        is_public = row.client_type == PUBLIC_CLIENT
        return check_origin(uri) or ("" if is_public else "is for public clients: a confidential one is in no browser")
    allow_http = bool(row.allow_http_redirects) and row.client_type == CONFIDENTIAL
    return check_redirect_uri(uri, allow_http, bool(row.allow_short_schemes))


# A switch lets a client have more redirect and post-logout redirect URIs: name -> why to do without.
URI_SWITCHES = {
    "allow_http_redirects": "codes may travel in clear to http redirect URIs; use it in a trusted network only",
    "allow_short_schemes": "another program may register a short scheme and receive the codes; prefer one with a dot",
}


def check_switch(name: str, client_type: str) -> str:
    """Return why a client of this type cannot have a switch, or "". OpenID Connect Core §3.1.2.1."""
    return "is for confidential clients" if name == "allow_http_redirects" and client_type == PUBLIC_CLIENT else ""


def check_switches(row: ClientRow, uris: list[ClientUri], switches: dict[str, int]) -> dict[str, str]:
    """Return what is wrong with new values of the switches of a client, by switch.

    No URI that depends on a switch is registered while it is off, so that whoever matches a URI need not know of them.
    """
    errors = {}
    for name, value in switches.items():
        if value:
            errors[name] = check_switch(name, row.client_type)
        off = msgspec.structs.replace(row, **{name: 0})
        needed = [
            uri.uri for uri in uris
            if not value and not check_uri(uri.kind, uri.uri, row) and check_uri(uri.kind, uri.uri, off)
        ]
        if needed:
            errors[name] = f"is needed for {needed[0]}: remove that URI first"
    return errors


def audit_switches(idp: Idp, caller: Caller, row: ClientRow, names):
    for name in sorted(names):
        audit(idp, caller, "client_flag_set", row.client_id, f"{name}={'on' if getattr(row, name) else 'off'}")


def warn_about_switches(idp: Idp, row: ClientRow, names):
    for name in sorted(names):
        if getattr(row, name):
            idp.log("client.switch", "warning", client_id=row.client_id, switch=name, reason=URI_SWITCHES[name])


def add_uri(idp: Idp, caller: Caller, id_or_client_id: str, kind: str, uri: str) -> ClientUri:
    """Register a URI of a client. Raises invalid_request, not_found, or conflict if it is already registered.

    A redirect URI brings the grants of a login to a client for which none was ever named.
    """
    uri = uri.strip()
    try:
        with idp.store.transaction(identity=True):
            client = get_client(idp, id_or_client_id)
            if wrong := check_uri(kind, uri, client.row):
                refused = f"{kind} URI of {client.client_id} {wrong}: <{excerpt(uri)}>"
                raise Problem("invalid_request", log=refused, errors={"uri": wrong})
            row = idp.store.add_uri(str(uuid.uuid4()), client.row.id, kind, uri, idp.now())
            audit(idp, caller, f"{kind}_uri_added", client.client_id, uri)
            grant_types = {*client.grant_types, AUTHORIZATION_CODE, REFRESH_TOKEN}
            if kind == "redirect" and not client.row.are_grants_named and grant_types > set(client.grant_types):
                with_login = msgspec.structs.replace(client.row, grant_types=" ".join(sorted(grant_types)))
                idp.store.update_client(with_login)
                audit(idp, caller, "client_updated", client.client_id, "grant_types")
    except Conflict:
        raise Problem("conflict", log="the client has this URI") from None
    return row


def try_uri(idp: Idp, id_or_client_id: str, kind: str, uri: str) -> UriVerdict:
    """Return whether add_uri() would take a URI, and change nothing. Raises invalid_request, not_found.

    `reason` says why not. `nearest` is the registered URI of this kind that is most like it.
    """
    client, uri = get_client(idp, id_or_client_id), uri.strip()
    if kind not in URI_KINDS:
        reject(kind="must be one of " + ", ".join(URI_KINDS))
    registered = [row.uri for row in idp.store.list_uris(client.row.id, kind)]
    wrong = check_uri(kind, uri, client.row) or ("is registered already" if uri in registered else "")
    return UriVerdict(not wrong, wrong, nearest(uri, registered) or None)


def delete_uri(idp: Idp, caller: Caller, record_id: str, kind: str, id_or_client_id: str | None = None):
    """Remove a URI of a client by the id of its record. Raises not_found."""
    with idp.store.transaction(identity=True):
        found = idp.store.find_uri(record_id)
        owner = get_client(idp, id_or_client_id or found.client_id) if found else None
        if found is None or owner is None or found.kind != kind or owner.row.id != found.client_id:
            raise Problem("not_found")
        idp.store.delete_uri(record_id)
        audit(idp, caller, f"{kind}_uri_removed", owner.client_id, found.uri)


def check_grant_types(grant_types, client_type: str) -> str:
    """Return what is wrong with the grant types of a client, or ""."""
    possible = [grant for grant in GRANT_TYPES if client_type != PUBLIC_CLIENT or grant != CLIENT_CREDENTIALS]
    return "" if set(grant_types) <= set(possible) else "must be among " + ", ".join(possible)


def check_client_secret(secret: str) -> str:
    """Return what is wrong with a chosen client secret, or "".

    RFC 6749 §2.3.1 demands protection against guessing, but no particular length. Blanks at the ends are refused,
    because many programs remove them from what they read. Common passwords are refused as those of users are: NIST
    SP 800-63B §5.1.1.2.
    """
    if not (SECRET_MIN <= len(secret) <= SECRET_MAX and secret.isprintable()):
        return f"must have {SECRET_MIN} to {SECRET_MAX} printable characters"
    if is_common(secret):
        return "is one of the most common passwords"
    return "must not begin or end with a blank" if secret != secret.strip() else ""


def revoke_client(idp: Idp, caller: Caller, row: ClientRow, action: str, secondary=""):
    """Revoke everything ever issued to a client. Each change that reduces its rights calls this in its transaction."""
    with idp.store.transaction(identity=True):
        idp.store.revoke_client(row.id, idp.now_ms())
        audit(idp, caller, action, row.client_id, secondary)


def check_new_uris(new_client: CreateClient, row: ClientRow) -> dict[str, str]:
    """Return what is wrong with the URIs of a new client, by member; the first URI of each that is refused is named."""
    return {
        member: next(
            (f"{uri.strip()[:300]}: {wrong}" for uri in uris or () if (wrong := check_uri(kind, uri.strip(), row))), ""
        )
        for member, kind, uris in new_client.uris()
    }


def check_flag_option(flag: str, option: str) -> str:
    """Return what is wrong with the option of a feature that takes one, or ""."""
    if flag == "TOTP_ISSUER":
        return check_label(option)
    is_number = re.fullmatch(r"[0-9]{1,9}", option) and int(option)
    return "" if not option or is_number else "must be seconds, a whole number from 1 to 999999999, or blank"


def check_new_flags(flags: dict[str, NewFlag]) -> str:
    """Return what is wrong with the feature flags of a new client, or ""."""
    for name, flag in flags.items():
        if name not in FLAGS:
            return "must be among " + ", ".join(FLAGS)
        wrong = check_flag_option(name, flag.options.strip()) if FLAGS[name] else flag.options and "takes no option"
        if wrong:
            return f"{name}: {wrong}"
    return ""


def check_new_client(new_client: CreateClient, row: ClientRow) -> dict[str, str]:
    """Return what is wrong with a new client, by member. `row` is what would be stored."""
    public, secret, errors = row.client_type == PUBLIC_CLIENT, new_client.client_secret or new_client.secret, {}
    errors["client_id"] = check_client_id(row.client_id)
    if row.client_type not in (CONFIDENTIAL, PUBLIC_CLIENT):
        errors["client_type"] = "must be confidential or public"
    if secret:
        errors["client_secret"] = "a public client has none" if public else check_client_secret(secret)
    errors["grant_types"] = check_grant_types(row.grant_types.split(), row.client_type)
    errors["audience"], errors["display_name"] = check_label(row.audience), check_label(row.display_name)
    if public and row.may_introspect:
        errors["may_introspect"] = "a public client cannot have this right"
    errors |= {name: check_switch(name, row.client_type) for name in URI_SWITCHES if getattr(row, name)}
    return errors | check_new_uris(new_client, row) | {"flags": check_new_flags(new_client.flags or {})}


def row_of_new_client(idp: Idp, new_client: CreateClient) -> ClientRow:
    """Return the row of a new client, whose members may be wrong: see check_new_client().

    Where no grant type is named, a confidential client gets client_credentials, and a public one what a login takes;
    a redirect URI adds the latter to either. The password grant must be named: RFC 9700 §2.4 advises against it.
    """
    public, now = new_client.client_type == PUBLIC_CLIENT, idp.now()
    grant_types = new_client.grant_types
    if grant_types is None:
        grant_types = [] if public else [CLIENT_CREDENTIALS]
        grant_types += [AUTHORIZATION_CODE, REFRESH_TOKEN] if public or new_client.redirect_uris else []
    return ClientRow(
        id=str(uuid.uuid4()), client_id=new_client.client_id.strip(), client_type=new_client.client_type,
        display_name=(new_client.display_name or "").strip(), audience=(new_client.audience or "microauthd").strip(),
        grant_types=" ".join(sorted(set(grant_types))), may_introspect=int(new_client.may_introspect),
        is_first_party=int(new_client.is_first_party), access_token_signed_alg="", id_token_signed_response_alg="RS256",
        is_active=1,
        revoked_before=idp.store.epoch(idp.now_ms()),  # tokens of a deleted client of the same name stay invalid
        created_at=now, modified_at=now, allow_http_redirects=int(new_client.allow_http_redirects),
        allow_short_schemes=int(new_client.allow_short_schemes),
        are_grants_named=int(new_client.grant_types is not None),
    )


def add_parts(idp: Idp, caller: Caller, row: ClientRow, new_client: CreateClient):
    """Store the URIs and feature flags of a new client, which were checked, and audit them. A repeated URI is one."""
    for _, kind, uris in new_client.uris():
        for uri in dict.fromkeys(uri.strip() for uri in uris or ()):
            idp.store.add_uri(str(uuid.uuid4()), row.id, kind, uri, idp.now())
            audit(idp, caller, f"{kind}_uri_added", row.client_id, uri)
    for name, flag in (new_client.flags or {}).items():
        idp.store.put_feature(row.id, name, flag.is_enabled, flag.options.strip())
        audit(idp, caller, "client_flag_set", row.client_id, f"{name}={'on' if flag.is_enabled else 'off'}")
        if flag.options.strip():
            audit(idp, caller, "client_flag_option_set", row.client_id, f"{name}={flag.options.strip()}")


def create_client(idp: Idp, caller: Caller, new_client: CreateClient) -> tuple[Client, str]:
    """Register a client with its URIs and flags, all or nothing; return it and the secret, if one was generated.

    Raises invalid_request or conflict.
    """
    row = row_of_new_client(idp, new_client)
    found = [idp.store.find_scope(key_of(name)) for name in new_client.scopes or ()]
    scopes = [scope for scope in found if scope]
    reject(**check_new_client(new_client, row) | {"scopes": "must all exist" if None in found else ""})
    switches = [name for name in URI_SWITCHES if getattr(row, name)]
    public, secret = row.client_type == PUBLIC_CLIENT, new_client.client_secret or new_client.secret or ""
    made = "" if public or secret else random_handle()
    secret_hash = "" if public else hash_secret(idp, secret or made)
    try:
        with idp.store.transaction(identity=True):
            idp.store.insert(row)
            if secret_hash:
                idp.store.add_secret(str(uuid.uuid4()), row.id, secret_hash, row.created_at)
            for scope in scopes:
                idp.store.assign_scope_to_client(row.id, scope.id, row.created_at)
            audit(idp, caller, "create_client", row.client_id, row.id)
            audit_switches(idp, caller, row, switches)
            add_parts(idp, caller, row, new_client)
    except Conflict:
        raise Problem("conflict") from None
    warn_about_switches(idp, row, switches)
    return get_client(idp, row.id), made


def living_hash(client: Client, now: int, overlap_seconds: int) -> str | None:
    """Return the hash of the secret that a new one will live beside, or None."""
    living = unexpired_hashes(client, now) if overlap_seconds else []
    return living[0] if living else None


def change_secret(idp: Idp, caller: Caller, change: ChangeSecret) -> str:
    """Give a client a new secret and return it. The previous one stays valid for `overlap_seconds`, at most 31 days.

    If two are valid already, the older one ends. The new one has the salt and the Argon2 parameters of the one that it
    lives beside; without an overlap, both are new.
    """
    client = get_client(idp, change.client_id)
    if not client.row.is_active:
        raise Problem("not_found", log="the client is inactive")
    secret = change.new_secret or ""
    errors = {}
    if client.row.client_type == PUBLIC_CLIENT:
        errors["client_id"] = "a public client has no secret"
    elif secret:
        errors["new_secret"] = check_client_secret(secret)
    if not 0 <= change.overlap_seconds <= OVERLAP_MAX:
        errors["overlap_seconds"] = f"must be from 0 to {OVERLAP_MAX}"
    reject(**errors)
    secret = secret or random_handle()
    while True:
        beside = living_hash(client, idp.now(), change.overlap_seconds)
        secret_hash, now = hash_secret(idp, secret, beside), idp.now()
        with idp.store.transaction(identity=True):
            client = get_client(idp, client.row.id)  # hashing is slow: the client may have changed meanwhile
            if not client.row.is_active:
                raise Problem("not_found", log="the client is inactive")
            other = living_hash(client, now, change.overlap_seconds)
            if other and salt_of(other) not in (None, salt_of(secret_hash)):
                continue
            idp.store.retire_secrets(client.row.id, now + change.overlap_seconds, now)
            idp.store.add_secret(str(uuid.uuid4()), client.row.id, secret_hash, now)
            audit(idp, caller, "client_secret_changed", client.client_id, f"overlap={change.overlap_seconds}")
            return secret


def update_client(idp: Idp, caller: Caller, id: str, change: UpdateClient) -> Client:
    """Change the members that were sent, all or none. Raises invalid_request, not_found or conflict.

    Deactivating a client, renaming it or changing its audience revokes its tokens: their `client_id` or
    `aud` would belong to no client, or later to another one.
    """
    try:
        with idp.store.transaction(identity=True):
            client = get_client(idp, id)
            row, errors = client.row, {}
            changes: dict[str, Any] = {}
            if change.client_id is not UNSET:
                changes["client_id"] = change.client_id.strip()
                if changes["client_id"] != row.client_id:  # clients of older releases may have such names
                    errors["client_id"] = check_client_id(changes["client_id"])
            if isinstance(change.display_name, str):
                changes["display_name"] = change.display_name.strip()
                errors["display_name"] = check_label(changes["display_name"])
            if change.audience and change.audience.strip():
                changes["audience"] = change.audience.strip()
                errors["audience"] = check_label(changes["audience"])
            if change.grant_types is not UNSET:
                changes["grant_types"], changes["are_grants_named"] = " ".join(sorted(set(change.grant_types))), 1
                errors["grant_types"] = check_grant_types(change.grant_types, row.client_type)
            if change.may_introspect is True and row.client_type == PUBLIC_CLIENT:
                errors["may_introspect"] = "a public client cannot have this right"
            for name in ("is_active", "may_introspect", "is_first_party", *URI_SWITCHES):
                if getattr(change, name) is not UNSET:
                    changes[name] = int(getattr(change, name))
            switches = {name: changes[name] for name in URI_SWITCHES if name in changes}
            reject(**errors | check_switches(row, idp.store.list_uris(row.id), switches))
            for name in ("access_token_signed_alg", "id_token_signed_response_alg"):
                if getattr(change, name) is not UNSET:
                    changes[name] = getattr(change, name)
            changes = {name: value for name, value in changes.items() if value != getattr(row, name)}
            if changes:
                if {"client_id", "audience"} & changes.keys() or changes.get("is_active") == 0:
                    revoke_client(idp, caller, row, "client_revoked")
                if "client_id" in changes:
                    idp.store.forget_use(row.client_id)
                row = msgspec.structs.replace(row, **changes, modified_at=idp.now())
                idp.store.update_client(row)
                names = {"grant_types" if name == "are_grants_named" else name for name in changes}
                audit(idp, caller, "client_updated", row.client_id, " ".join(sorted(names)))
                audit_switches(idp, caller, row, URI_SWITCHES.keys() & changes.keys())
    except Conflict:
        raise Problem("conflict") from None
    warn_about_switches(idp, row, URI_SWITCHES.keys() & changes.keys())
    return get_client(idp, row.id)


def delete_client(idp: Idp, caller: Caller, id: str):
    """Delete a client and all its records, and revoke its tokens."""
    with idp.store.transaction(identity=True):
        row = get_client(idp, id).row
        revoke_client(idp, caller, row, "delete_client", row.id)
        idp.store.forget_use(row.client_id)
        idp.store.delete_client(row.id)


def delete_secret(idp: Idp, caller: Caller, id: str, secret_id: str):
    """Delete one secret of a client, even the last one."""
    with idp.store.transaction(identity=True):
        row = get_client(idp, id).row
        if not idp.store.delete_secret(row.id, secret_id):
            raise Problem("not_found")
        audit(idp, caller, "client_secret_deleted", row.client_id, secret_id)


def check_flag(flag: str) -> str:
    """Return the name of a feature flag in upper case. Raises invalid_request."""
    if flag.upper() not in FLAGS:
        reject(flag="must be one of " + ", ".join(FLAGS))
    return flag.upper()


def set_flag(idp: Idp, caller: Caller, id: str, flag: str, is_enabled: bool):
    """Switch a feature of a client on or off; its option is kept."""
    with idp.store.transaction(identity=True):
        row, flag = get_client(idp, id).row, check_flag(flag)
        idp.store.put_feature(row.id, flag, is_enabled=is_enabled)
        audit(idp, caller, "client_flag_set", row.client_id, f"{flag}={'on' if is_enabled else 'off'}")


def set_flag_option(idp: Idp, caller: Caller, id: str, flag: str, option: str):
    """Set the option of a feature: seconds, or the issuer that authenticator apps display."""
    flag, option = check_flag(flag), option.strip()
    if not FLAGS[flag]:
        reject(flag="takes no option")
    reject(options=check_flag_option(flag, option))
    with idp.store.transaction(identity=True):
        row = get_client(idp, id).row
        idp.store.put_feature(row.id, flag, options=option)
        audit(idp, caller, "client_flag_option_set", row.client_id, f"{flag}={option}")


def list_flags(idp: Idp, id: str) -> dict:
    """Return {flag: FlagObject} of a client, including flags that were never set."""
    features = idp.store.list_all_features(get_client(idp, id).row.id)
    stored = {feature.feature_flag: FlagObject(bool(feature.is_enabled), feature.options) for feature in features}
    return {flag: stored.get(flag, FlagObject(False, "")) for flag in FLAGS}


def totp_issuer(idp: Idp, client_id: str | None) -> str:
    """Return the issuer that authenticator apps display.

    Raises not_found, or invalid_request if the client does not demand a second factor.
    """
    if not client_id:
        return idp.brand.name
    client = get_client(idp, client_id)
    if "ENABLE_TOTP" not in client.flags:
        reject(client_id="this client does not demand a second factor: its ENABLE_TOTP is off")
    return client.flags.get("TOTP_ISSUER") or idp.brand.name


def check_idp(provider: PutIdp):
    key = provider.provider_key.strip().lower()
    errors = {
        "provider_key": ""
        if re.fullmatch(r"[a-z0-9._-]+", key) and len(key) <= PROVIDER_KEY_MAX
        else f"must be 1 to {PROVIDER_KEY_MAX} letters, digits, and . _ -"
    }
    for member in ("display_name", "issuer", "client_identifier", "scopes"):
        errors[member] = check_label(getattr(provider, member))
    if provider.issuer:
        parts = urlsplit(provider.issuer.strip())
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.query or parts.fragment:
            errors["issuer"] = "must be an http(s) URL without query or fragment"
    reject(**errors)
    return key


def put_idp(idp: Idp, caller: Caller, id: str, provider: PutIdp, idp_id: str | None = None) -> ExternalIdp:
    """Add an external identity provider to a client, or change one. Raises invalid_request, not_found or conflict."""
    key, now = check_idp(provider), idp.now()
    try:
        with idp.store.transaction():
            client = get_client(idp, id)
            found = idp.store.find_idp(client.row.id, idp_id) if idp_id else None
            if idp_id and found is None:
                raise Problem("not_found")
            row = ExternalIdp(
                found.id if found else str(uuid.uuid4()), client.row.id, key, provider.display_name.strip(),
                provider.issuer.strip(), provider.client_identifier.strip(), provider.scopes.strip(),
                found.created_at if found else now, now,
            )
            idp.store.put_idp(row)
            audit(idp, caller, "external_idp_updated" if found else "external_idp_added", client.client_id, key)
    except Conflict:
        raise Problem("conflict", log="the client has a provider of this key") from None
    return row


def delete_idp(idp: Idp, caller: Caller, id: str, idp_id: str):
    with idp.store.transaction():
        client = get_client(idp, id)
        if not idp.store.delete_idp(client.row.id, idp_id):
            raise Problem("not_found")
        audit(idp, caller, "external_idp_deleted", client.client_id, idp_id)


def create_scope(idp: Idp, caller: Caller, new_scope: CreateScope) -> Scope:
    name = normalise(new_scope.name)
    reject(name=check_scope_name(name), description=check_label(new_scope.desc or new_scope.description or ""))
    if name in OIDC_SCOPES + UNSUPPORTED_OIDC_SCOPES:
        raise Problem("conflict", log="a scope of OpenID Connect")
    try:
        with idp.store.transaction(identity=True):
            scope = idp.store.add_scope(
                str(uuid.uuid4()), name, (new_scope.desc or new_scope.description or "").strip(), idp.now()
            )
            audit(idp, caller, "create_scope", name, scope.id)
    except Conflict:
        raise Problem("conflict") from None
    return scope


def get_scope(idp: Idp, id_or_name: str) -> Scope:
    scope = idp.store.find_scope(key_of(id_or_name))
    if scope is None:
        raise Problem("not_found")
    return scope


def update_scope(idp: Idp, caller: Caller, id: str, change: UpdateScope) -> Scope:
    """Change the members that were sent. Raises invalid_request, not_found, protected or conflict."""
    name = None if change.name is UNSET else normalise(change.name)
    description = next((text.strip() for text in (change.desc, change.description) if isinstance(text, str)), None)
    kept = idp.store.find_scope(key_of(id))  # scopes of older releases may have names that are refused now
    reject(
        name=check_scope_name(name) if name is not None and not (kept and kept.name == name) else "",
        description=check_label(description or ""),
    )
    try:
        with idp.store.transaction(identity=True):
            scope = get_scope(idp, id)
            if name in OIDC_SCOPES + UNSUPPORTED_OIDC_SCOPES and name != scope.name:
                raise Problem("conflict", log="a scope of OpenID Connect")
            if scope.is_protected and name not in (None, scope.name):
                raise Problem("protected")
            changed = idp.store.update_scope(scope.id, name, description, idp.now())
            assert changed
            audit(idp, caller, "scope_updated", changed.id, changed.name)
    except Conflict:
        raise Problem("conflict") from None
    return changed


def delete_scope(idp: Idp, caller: Caller, id: str):
    """Delete a scope: new tokens cannot get it, and refreshed tokens lose it."""
    with idp.store.transaction(identity=True):
        scope = get_scope(idp, id)
        if scope.is_protected:
            raise Problem("protected")
        idp.store.delete_scope(scope.id)
        audit(idp, caller, "delete_scope", scope.id, scope.name)


def assign_scopes(idp: Idp, caller: Caller, holder: Client | Account, ids) -> int:
    """Assign scopes, by id or name, to a client or a user; all or none. Return how many were not assigned before."""
    found = [idp.store.find_scope(key_of(id)) for id in ids]
    scopes = [scope for scope in found if scope]
    if not found or None in found:
        raise Problem("invalid_request", errors={"scope_ids": "must name at least one scope, and each must exist"})
    kind, id, assign = (
        ("client", holder.row.id, idp.store.assign_scope_to_client)
        if isinstance(holder, Client)
        else ("user", holder.id, idp.store.assign_scope_to_user)
    )
    try:
        with idp.store.transaction(identity=True):
            added = sum(assign(id, scope.id, idp.now()) for scope in scopes)
            audit(idp, caller, f"assign_scope_to_{kind}", id, " ".join(scope.name for scope in scopes))
    except Conflict:
        raise Problem("not_found", log="deleted meanwhile") from None
    return added


def remove_scope(idp: Idp, caller: Caller, holder: Client | Account, scope_id: str):
    """Remove a scope from a client or a user. Raises not_found if it was not assigned."""
    kind, id, remove = (
        ("client", holder.row.id, idp.store.remove_scope_from_client)
        if isinstance(holder, Client)
        else ("user", holder.id, idp.store.remove_scope_from_user)
    )
    with idp.store.transaction(identity=True):
        scope = get_scope(idp, scope_id)
        if not remove(id, scope.id):
            raise Problem("not_found", log=f"the {kind} does not have this scope")
        audit(idp, caller, f"remove_scope_from_{kind}", scope.id, id)


def set_scopes(idp: Idp, caller: Caller, holder: Client | Account, ids: list[str]):
    """Replace the scopes of a client or a user by these, all or none. Raises invalid_request."""
    found = {key: idp.store.find_scope(key) for key in map(key_of, ids)}
    reject(scope_ids="must all exist" if None in found.values() else "")
    new = {scope.id for scope in found.values() if scope}
    with idp.store.transaction(identity=True):
        old = (
            idp.store.list_scopes_of_client(holder.row.id) if isinstance(holder, Client)
            else idp.store.list_scopes_of_user(holder.id)
        )
        old_ids = {scope.id for scope in old}
        if new - old_ids:
            assign_scopes(idp, caller, holder, sorted(new - old_ids))
        for id in sorted(old_ids - new):
            remove_scope(idp, caller, holder, id)


def opens(client: Client, scope: str, name: str) -> bool:
    """Return whether a client may learn what the scope `name` opens: a first party always, others as it is granted."""
    return bool(client.row.is_first_party) or name in scope.split()


def opened_role_claims(client: Client | None, scope: str) -> set[str]:
    """Return which claims about roles a client may learn with a scope; ADMIN's console, None, is a first party."""
    opened = {"role", "roles"} if client is None or opens(client, scope, "roles") else set()
    return opened | ({"groups"} & set(scope.split()))


def role_claims(idp: Idp, user_id: str, scope: str, client: Client | None = None) -> dict:
    """Return the claims of an access token that name the roles of a user: for a client, or for ADMIN if None.

    A third party gets what the scope opens. RFC 9068 §2.2.3.1.
    """
    opened = opened_role_claims(client, scope)
    roles = idp.store.list_roles_of(user_id) if opened else []
    names = [role.name for role in roles]
    claims = {"role": [role.id for role in roles], "roles": names, "groups": names}
    return {name: value for name, value in claims.items() if name in opened}


# == Sessions ==================================================================
# Refresh-token families, revocation, and the one check of whether a token is valid.


def verify_access_token(idp: Idp, ring: KeyRing, issuer: str, token: str, check_revocation=False) -> dict:
    """Return the claims of a valid access token. RFC 9068 §4, RFC 8725 §3.

    Valid means: signature, `typ`, `iss` and `exp` are right, `iat` is not in the future, the `jti` is not
    revoked, and it was issued after the revocation epochs of the server, its client, its user and its login.
    Tombstones of `jti` and logins are looked up with `check_revocation`, `enable-token-revocation` or for ADMIN.
    Raises invalid_token. Guards, introspection, userinfo and revocation all use this function.
    """
    claims = ring.verify(token, AT_JWT)
    now = idp.now()
    if claims["iss"] != issuer or claims["exp"] <= now or max(claims["iat"], claims.get("nbf", 0)) > now + IAT_SKEW:
        raise Problem("invalid_token", log="expired, or issued elsewhere or in the future")
    if claims["mad"] != ("admin" if ring is idp.admin_ring else "auth"):
        raise Problem("invalid_token", log="a token of the other port")
    issued_ms = jti_ms(claims["jti"])
    check_revocation = check_revocation or idp.options.enable_token_revocation or ring is idp.admin_ring
    if issued_ms <= idp.revoked_before or (check_revocation and idp.store.is_revoked(claims["jti"])):
        raise RevokedToken(claims, "revoked")
    if claims["mad"] == "auth":
        client = find_client(idp, claims["client_id"])
        if client is None or issued_ms <= client.row.revoked_before or claims["aud"] != client.row.audience:
            raise RevokedToken(claims, "its client is gone, inactive or was revoked")
    if claims["sub"] != claims.get("client_id"):
        if not is_still_valid(idp.store.find_account(claims["sub"]), issued_ms):
            raise RevokedToken(claims, "its user is gone, inactive or was revoked")
        if check_revocation and claims.get("sid") and idp.store.is_family_revoked(claims["sid"]):
            raise RevokedToken(claims, "its login was ended")
    return claims


def revoke_family(idp: Idp, caller: Caller, family_sid: str, action: str, target: str, result=SUCCESS):
    """Revoke a login at a client: its refresh tokens and the access tokens with its `sid`.

    Whoever has one of these may repeat that for ever: what was revoked before is counted, and changes nothing.
    """
    with idp.store.transaction():
        is_new = idp.store.revoke_family(family_sid, idp.now())
        if is_new:
            audit(idp, caller, action, target, f"sid={family_sid}", result)
    if not is_new:
        audit_refusal(idp, caller, action, target, f"sid={family_sid};unchanged", proven=True, result=result)


def revoke_everything(idp: Idp, caller: Caller):
    """End everything that was ever issued to anybody, on both ports."""
    with idp.store.transaction(identity=True):
        idp.store.revoke_everything(idp.now_ms())
        audit(idp, caller, "everything_revoked")


def revoke_families(idp: Idp, caller: Caller, user_id: str, client_id: str):
    """Log a user out of one client."""
    with idp.store.transaction():
        idp.store.revoke_logins(user_id, client_id, idp.now_ms())
        audit(idp, caller.acting_as(user_id), "logout", client_id)


def find_public_client(idp: Idp, token: str) -> Client | None:
    """Return the active public client that a refresh or access token was issued to; None for any other token."""
    refresh = idp.store.find_refresh_token(refresh_token_sha256(token))
    try:
        client_id = refresh.client_id if refresh else idp.auth_ring.verify(token, AT_JWT).get("client_id", "")
    except Problem:
        return None
    client = find_client(idp, client_id)
    return client if client is not None and client.row.client_type == PUBLIC_CLIENT else None


def revoke_token(idp: Idp, caller: Caller, client: Client, token: str) -> None:
    """Revoke an access or refresh token of this client. An invalid or unknown token is no error. RFC 7009 §2.2.

    Nor is the token of another client: it stays valid, and the answer does not tell that it is one. RFC 7009 §2.1.
    """

    def ignore(kind):
        reason = f"the {kind} token of another client"
        idp.log("revoke.ignored", client_id=client.client_id, reason=reason, request_id=caller.request_id)

    refresh = idp.store.find_refresh_token(refresh_token_sha256(token))
    if refresh is not None:
        if refresh.client_id != client.client_id:
            return ignore("refresh")
        revoke_family(idp, caller.acting_as(client.client_id), refresh.sid, "refresh_token_revoked", refresh.user_id)
        return
    try:
        claims = idp.auth_ring.verify(token, AT_JWT)
    except Problem:
        return
    if claims["client_id"] != client.client_id:
        return ignore("access")
    owner, named = caller.acting_as(client.client_id), f"jti={claims['jti']}"
    with idp.store.transaction():
        is_new = idp.store.revoke_jti(claims["jti"], claims["exp"], idp.now())
        if is_new:
            audit(idp, owner, "token_revoked", claims["sub"], named)
    if not is_new:
        audit_refusal(idp, owner, "token_revoked", claims["sub"], f"{named};unchanged", proven=True, result=SUCCESS)


def audit_replay(idp: Idp, caller: Caller, revoked: RevokedToken):
    """Audit the use of a revoked token."""
    claims = revoked.claims
    action, named = f"{claims['mad']}.token.replay_detected", f"jti={claims['jti']}"
    audit_refusal(idp, caller.acting_as(claims["sub"]), action, named, revoked.log)


def is_session_revoked(session: ListedSession) -> bool:
    """Return whether an access token was revoked: by itself, with its login, or by an epoch of its user or client."""
    return (
        session.revoked_at is not None
        or bool(session.family_revoked)
        or jti_ms(session.id) <= session.dead_before
    )


def is_refresh_token_revoked(row: ListedRefreshToken) -> bool:
    """Return whether a refresh token was used, or revoked: by itself, with its login, or by an epoch."""
    return (
        row.revoked_at is not None
        or row.rotated_at is not None
        or bool(row.family_revoked)
        or row.family_created_ms <= row.dead_before
    )


def get_session(idp: Idp, jti: str) -> ListedSession:
    jti = jti.strip().lower()
    session = idp.store.find_session(jti)
    if session is None and re.fullmatch(r"[0-9a-f]{32}", jti) and abs(idp.now_ms() - jti_ms(jti)) < 1000:
        # Sessions of machine tokens are written in batches (group commit): a row this young may not be stored yet.
        idp.store.flush()
        sleep(2 * BATCH_SECONDS)
        session = idp.store.find_session(jti)
    if session is None:
        raise Problem("not_found")
    return session


def revoke_session(idp: Idp, caller: Caller, jti: str) -> ListedSession:
    """Revoke an access token and its login, if it has one.

    Raises not_found, or unchanged if it has expired or was revoked before.
    """
    get_session(idp, jti)  # may wait for a pending batch, so outside the transaction
    with idp.store.transaction():
        session = get_session(idp, jti)
        if is_session_revoked(session) or session.expires_at <= idp.now():
            raise Problem("unchanged", log="revoked or expired already")
        idp.store.revoke_jti(session.id, session.expires_at, idp.now())
        if session.sid:
            idp.store.revoke_family(session.sid, idp.now())
        audit(idp, caller, "session_revoked", session.id, session.user_id or session.client_id)
    return session


def is_signed(ring: KeyRing, token: str, typ: str) -> bool:
    try:
        return bool(ring.verify(token, typ))
    except Problem:
        return False


def revoke_any_token(idp: Idp, caller: Caller, token: str):
    """Revoke an access, ADMIN or refresh token for an administrator.

    Raises invalid_request if this server did not issue it.
    """
    refresh = idp.store.find_refresh_token(refresh_token_sha256(token))
    if refresh is not None:
        revoke_family(idp, caller, refresh.sid, "refresh_token_revoked", refresh.user_id)
        return
    ring = next((ring for ring in (idp.auth_ring, idp.admin_ring) if is_signed(ring, token.strip(), AT_JWT)), None)
    if ring is None:
        reject(token="is not a token of this server")
    assert ring
    claims = ring.verify(token.strip(), AT_JWT)
    with idp.store.transaction():
        idp.store.revoke_jti(claims["jti"], claims["exp"], idp.now())
        if claims.get("sid"):
            idp.store.revoke_family(claims["sid"], idp.now())
        audit(idp, caller, "token_revoked", claims["sub"], f"jti={claims['jti']}")


def revoke_refresh_token(idp: Idp, caller: Caller, id: str):
    """Revoke the login of a refresh token, by the id of the token's row."""
    row = idp.store.find_refresh_token_by_id(id)
    if row is None:
        raise Problem("not_found")
    revoke_family(idp, caller, row.sid, "refresh_token_revoked", row.user_id)


def audit_purge(idp, caller, action, done, purge) -> int:
    audit(
        idp, caller, action, purge.user_id or purge.client_id or "",
        f"purged={done};expired={str(purge.purge_expired).lower()};revoked={str(purge.purge_revoked).lower()}",
    )
    return done


def purge_tokens(idp: Idp, caller: Caller, purge: PurgeTokens, kinds, pause=lambda seconds: None) -> int:
    """Delete the rows of expired or revoked sessions or refresh tokens; return how many.

    Only rows that expired at least `older_than_seconds` ago are deleted.
    """
    require_clock(idp)
    if purge.user_id:
        purge.user_id = get_user(idp, purge.user_id).id
    if purge.client_id:
        purge.client_id = get_client(idp, purge.client_id).client_id
    before, total = idp.now() - purge.older_than_seconds, 0
    after: str | None
    if not (purge.purge_expired or purge.purge_revoked):
        return 0
    narrowed: dict[str, Any] = {
        "revoked": not purge.purge_expired, "user_id": purge.user_id, "client_id": purge.client_id,
    }
    # Audited first, so that the actor is known even if the purge is interrupted between two slices.
    audit(
        idp, caller, "purge_begun", purge.user_id or purge.client_id or "",
        f"{'+'.join(kinds)};older_than_seconds={purge.older_than_seconds}",
    )
    if "session" in kinds:
        after, done = "", 0
        while after is not None:
            after, deleted = idp.store.purge_sessions(f"{max(0, before) * 1000:012x}", before, after, SLICE, **narrowed)
            done += deleted
            pause(0.001)
        total += audit_purge(idp, caller, "sessions_purged", done, purge)
    if "refresh_token" in kinds:
        after, done = "", 0
        while after is not None:
            after, deleted = idp.store.purge_refresh_tokens(before, after, SLICE, **narrowed)
            done += deleted
            pause(0.001)
        total += audit_purge(idp, caller, "refresh_tokens_purged", done, purge)
    return total


def active_login(idp: Idp, sid: str) -> tuple[Family, Account] | None:
    """Return a login that is neither revoked nor expired, and its user, if user and client are active; else None."""
    family = idp.store.find_unrevoked_family(sid)
    if family is None or family.expires_at <= idp.now() or family.created_ms <= idp.revoked_before:
        return None
    client = find_client(idp, family.client_id)
    if client is None or family.created_ms <= client.row.revoked_before:
        return None
    account = idp.store.find_account(family.user_id)
    return (family, account) if is_still_valid(account, family.created_ms) else None


def active_family(idp: Idp, sid: str) -> Family | None:
    """Return the login of active_login()."""
    found = active_login(idp, sid)
    return found[0] if found else None


def explain_unsigned(idp: Idp, token: str) -> str:
    """Return why a token that no key of this server verifies is none of its tokens."""
    header, _, rest = token.partition(".")
    try:
        kid = msgspec.json.decode(unb64url(header), type=dict).get("kid", "")
        issuer = msgspec.json.decode(unb64url(rest.partition(".")[0]), type=dict).get("iss", "")
    except (ValueError, binascii.Error, RecursionError, msgspec.MsgspecError):
        return "is not a token of this server"
    kid = kid if isinstance(kid, str) else ""
    if kid in idp.store.revoked_kids():
        return "was signed by a key that was revoked"
    if idp.store.has_retired_key(kid):
        return "was signed by a key that is gone"
    if issuer not in (idp.options.auth_issuer, idp.options.admin_issuer):
        return "was issued by another server"
    is_ours = any(key.kid == kid for ring in (idp.auth_ring, idp.admin_ring) for key in ring.keys)
    return "has a wrong signature" if is_ours else "was signed by a key that is not of this server"


def describe_refresh_token(idp: Idp, row: RefreshToken) -> dict:
    """Return what describe_token() does, of a refresh token."""
    family, now = idp.store.find_family(row.sid), idp.now()
    reason = (
        "rotated" if row.rotated_at is not None else "expired" if row.expires_at <= now
        else "revoked" if row.revoked_at is not None or active_family(idp, row.sid) is None else ""
    )
    return {
        "kind": "refresh", "sub": row.user_id, "client_id": row.client_id, "sid": row.sid, "iat": row.issued_at,
        "exp": row.expires_at, "scope": family.scope if family else "", "valid": True,
        "expired": row.expires_at <= now, "active": not reason, "reason": reason,
    }


def describe_token(idp: Idp, token: str) -> dict:
    """Return the claims of a token of this server of any kind, even an expired one, and its state.

    `kind` is access, id, admin or refresh; `valid`, `expired` and `active` are booleans, and `reason` says why it is
    not active. For administrators. Raises invalid_request with the reason if this server did not issue it.
    """
    token = token.strip()
    refresh = idp.store.find_refresh_token(refresh_token_sha256(token))
    if refresh is not None:
        return describe_refresh_token(idp, refresh)
    rings = ((idp.auth_ring, idp.options.auth_issuer), (idp.admin_ring, idp.options.admin_issuer))
    for (ring, issuer), typ in ((pair, typ) for pair in rings for typ in (AT_JWT, JWT)):
        if not is_signed(ring, token, typ):
            continue
        claims, reason = ring.verify(token, typ), ""
        is_expired = claims["exp"] <= idp.now()
        if typ == AT_JWT:
            try:
                verify_access_token(idp, ring, issuer, token, check_revocation=True)
            except (Problem, Unavailable) as problem:
                reason = "expired" if is_expired else problem.log
        else:
            reason = "expired" if is_expired else "an ID token opens nothing"
        kind = "id" if typ == JWT else "admin" if ring is idp.admin_ring else "access"
        state = {"valid": True, "expired": is_expired, "active": not reason, "reason": reason}
        return {**claims, "kind": kind, **state}
    raise Problem("invalid_request", errors={"token": explain_unsigned(idp, token)})


def introspect_refresh_token(idp, client, token) -> dict | None:
    refresh = idp.store.find_refresh_token(refresh_token_sha256(token))
    now = idp.now()
    if refresh is None or (refresh.client_id != client.client_id and not client.row.may_introspect):
        return None
    if refresh.rotated_at is not None or refresh.revoked_at is not None or refresh.expires_at <= now:
        return None
    family = active_family(idp, refresh.sid)
    if family is None:
        return None
    return {
        "active": True, "client_id": refresh.client_id, "sub": refresh.user_id, "iss": idp.options.auth_issuer,
        "exp": refresh.expires_at, "iat": refresh.issued_at, "token_use": "refresh", "sid": refresh.sid,
        **({"scope": family.scope} if family.scope else {}),
    }


def introspect_token(idp: Idp, client: Client, token: str) -> dict:
    """Return the RFC 7662 §2.2 claims of a token.

    Only the token's own client and clients with the introspect right see them; others get {"active": false}.
    """
    inactive = {"active": False}
    try:
        claims = verify_access_token(idp, idp.auth_ring, idp.options.auth_issuer, token, check_revocation=True)
    except Problem as problem:
        if problem.code != "invalid_token":
            raise
        return introspect_refresh_token(idp, client, token) or inactive
    if claims["client_id"] != client.client_id and not client.row.may_introspect:
        return inactive
    if claims.get("roles_omitted"):
        issued_to = find_client(idp, claims["client_id"])
        if issued_to is None:
            return inactive
        claims = claims | role_claims(idp, claims["sub"], claims.get("scope", ""), issued_to)
    return {"active": True, "token_type": "Bearer", **claims}


# == Grants ====================================================================
# One function per grant_type validates the request; issue() mints and stores the tokens.


class Granted(msgspec.Struct):
    """What a grant has validated. Without an account the subject is the client itself."""

    scope: str
    login_method: str
    account: Account | None = None
    amr: list = []
    auth_time: int = 0
    nonce: str = ""
    family: Family | None = None  # the login to continue; None begins a new one
    spends: str = ""  # SHA-256 of the refresh token to rotate within the issuing transaction
    successor: str = ""  # what the refresh token that replaces it ends with; "" for a random one
    code: AuthorizationCode | None = None  # the code to spend, if the login was at a browser


def client_credentials(idp: Idp, client: Client, params) -> Granted:
    """Grant a confidential client a token of its own. RFC 6749 §4.4."""
    if client.row.client_type != CONFIDENTIAL:
        raise Problem("unauthorized_client")
    return Granted(decide_scopes(params.get("scope"), client.scopes), CLIENT_CREDENTIALS)


def scopes_of_user(idp, user_id) -> frozenset:
    return frozenset(idp.store.list_scope_names_of_user(user_id))


def password_grant(idp: Idp, client: Client, params) -> Granted:
    """Verify a user's password and second factor (`totp`; older clients send `totp_code`). RFC 6749 §4.3."""
    username, password, requested = params.need("username"), params.need("password"), params.get("scope")
    account, amr = authenticate_user(
        idp, params.caller, username, password, params.get("totp") or params.get("totp_code") or "", client
    )
    scope = decide_scopes(requested, client.scopes, scopes_of_user(idp, account.id))
    return Granted(scope, "otp" if "otp" in amr else "pwd", account, amr, idp.now())


def revoke_reused(idp: Idp, caller: Caller, family: Family):
    """Revoke a login whose refresh token was used again: the holder of the newer one may be the thief.

    RFC 9700 §4.14.2.
    """
    owner = caller.acting_as(family.user_id)
    revoke_family(idp, owner, family.sid, "refresh_token_reused", family.client_id, FAILURE)


def read_refresh_token(params) -> str | None:
    """Return the refresh token of a request, if it is for that grant. Older clients send it as `token`."""
    is_refresh = params.get("grant_type") == REFRESH_TOKEN
    return params.get("refresh_token") or params.get("token") if is_refresh else None


def find_retry(idp: Idp, client: Client, spent_sha256: str, successor: str) -> str:
    """Return the successor of a refresh token just spent, which the client may not have received; "" if it has none.

    It is the answer to the retry of that refresh, so that a login never has two living refresh tokens. `successor` is
    what it ends with. RFC 9700 §4.14.2.
    """
    grace = idp.options.refresh_token_grace
    unused = idp.store.find_unused_successor(spent_sha256, client.client_id, idp.now(), grace) if successor else None
    if unused is None:
        return ""
    # A refresh token of an earlier release does not begin with the time.
    tokens = begin_with_time(successor, jti_ms(unused.id)), successor
    return next((token for token in tokens if refresh_token_sha256(token) == unused.token_sha256), "")


def scopes_left(idp: Idp, client: Client, account: Account, granted: str) -> frozenset:
    """Return the scopes of a login or code without those that client or user lost since it was granted."""
    scopes = frozenset(granted.split())
    return scopes & allowed_to_user(scopes, client.scopes, scopes_of_user(idp, account.id))


def refresh_grant(idp: Idp, client: Client, params) -> Granted:
    """Validate a refresh token; reuse of a spent one revokes its family. RFC 6749 §6, RFC 9700 §4.14.2."""
    refresh_token = read_refresh_token(params) or params.need("refresh_token")
    token_sha256 = refresh_token_sha256(refresh_token)
    successor = idp.seal.successor(refresh_token) if idp.options.refresh_token_grace else ""
    found = idp.store.find_refresh_token(token_sha256)
    if found is None or found.client_id != client.client_id:
        raise Problem("invalid_grant", log="unknown refresh token, or one of another client")
    login = active_login(idp, found.sid)
    if login is None:
        raise Problem("invalid_grant", log="the login of this refresh token is over")
    family, account = login
    # Checked before user and scope: reuse must revoke the family whatever else is wrong with the request. What is no
    # retry here never becomes one; what is one is asked again in the issuing transaction.
    if found.rotated_at is not None and not find_retry(idp, client, token_sha256, successor):
        revoke_reused(idp, params.caller, family)
        raise Problem("invalid_grant", log="refresh token used again; its login is ended", audited=True)
    # The request may narrow what is left of the login's scopes.
    scope = decide_scopes(params.get("scope"), scopes_left(idp, client, account, family.scope))
    return Granted(
        scope, "refresh", account, family.amr.split(), family.auth_time, "", family, token_sha256, successor
    )


CODE_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")  # RFC 7636 §4.1


def check_verifier(code: AuthorizationCode, verifier: str | None) -> str:
    """Return what is wrong with a code verifier, or "". RFC 7636 §4.6, RFC 9700 §2.1.1."""
    if not code.code_challenge:
        return "a verifier without a challenge" if verifier is not None else ""
    if verifier is None or not CODE_VERIFIER.fullmatch(verifier):
        return "no verifier, or a malformed one"
    expected = b64url(hashlib.sha256(verifier.encode()).digest()) if code.code_challenge_method == "S256" else verifier
    return "" if hmac.compare_digest(expected, code.code_challenge) else "the verifier does not match"


def is_logged_out(session: BrowserSession | None) -> bool:
    return session is None or session.revoked_at is not None


def end_code(idp: Idp, caller: Caller, code: AuthorizationCode):
    """Revoke the login of a code that was presented twice, even if that login is not stored yet. RFC 6749 §4.1.2."""
    with idp.store.transaction():
        if idp.store.find_family(code.sid) is None:
            # Another request has spent the code and not stored the login yet: store it revoked, so that request fails.
            now = idp.now()
            idp.store.insert(
                Family(
                    code.sid, code.user_id, code.client_id, code.scope, code.amr, code.auth_time, "", code.issued_ms,
                    now, None,
                )
            )
        owner = caller.acting_as(code.user_id)
        revoke_family(idp, owner, code.sid, "authorization_code_reused", code.client_id, FAILURE)


def code_grant(idp: Idp, client: Client, params) -> Granted:
    """Validate an authorization code. RFC 6749 §4.1.3.

    A failed attempt spends the code, so that it cannot be repeated (§10.5). Otherwise the transaction of issue()
    spends it: if that fails, the client may send the code again.
    """
    code_sha256, now = sha256(params.need("code")), idp.now()
    code = idp.store.find_code(code_sha256)
    if code is None or code.client_id != client.client_id or code.spent_at is not None:
        if code is not None and code.client_id == client.client_id:
            end_code(idp, params.caller, code)
        raise Problem("invalid_grant", log="unknown code, one of another client, or spent", audited=code is not None)
    account = idp.store.find_account(code.user_id)
    fault = (
        "expired" if code.expires_at <= now
        else "another redirect_uri: " + describe_unregistered(params.get("redirect_uri") or "", [code.redirect_uri])
        if params.get("redirect_uri") != code.redirect_uri
        else "its redirect_uri is not registered any more"
        if not is_registered_uri(code.redirect_uri, client.redirect_uris)
        else check_verifier(code, params.get("code_verifier"))
        or ("its user is gone, inactive or was revoked" if not is_still_valid(account, code.issued_ms) else "")
        or (
            "its browser was logged out"
            if code.browser and is_logged_out(idp.store.find_browser_session(code.browser)) else ""
        )
        or ("its client was revoked" if code.issued_ms <= max(client.row.revoked_before, idp.revoked_before) else "")
    )
    # Rights that client or user lost since the code was issued do not arrive.
    scope = " ".join(sorted(scopes_left(idp, client, account, code.scope))) if account else ""
    if not fault and code.scope and not scope:
        fault = "client or user lost all of its scopes"
    if fault:
        if idp.store.spend_code(code_sha256, client.client_id, now) is None:
            end_code(idp, params.caller, code)
        raise Problem("invalid_grant", log=f"code: {fault}")
    return Granted(scope, "code", account, code.amr.split(), code.auth_time, code.nonce, code=code)


GRANTS = {
    CLIENT_CREDENTIALS: client_credentials, PASSWORD: password_grant, REFRESH_TOKEN: refresh_grant,
    AUTHORIZATION_CODE: code_grant,
}


def issuing_ms(idp: Idp, *revocable: ClientRow | Account | None) -> int:
    """Return the time of issue in Unix milliseconds: now, but later than the last revocation of any of these rows.

    A token issued in the same millisecond as a revocation counts as revoked.
    """
    return max(idp.now_ms(), idp.revoked_before + 1, *(row.revoked_before + 1 for row in revocable if row))


def add_refresh_token(idp: Idp, client: Client, granted: Granted, family: Family, jti: str, ms: int) -> str:
    """Store a refresh token of a login and return it, or "" if the login may not have one. RFC 6749 §1.5."""
    may_refresh = granted.code is None or granted.code.offline
    if not (may_refresh and idp.options.enable_token_refresh and REFRESH_TOKEN in client.grant_types):
        return ""
    assert granted.account
    refresh_token, now = begin_with_time(granted.successor or random_handle(), ms), idp.now()
    lifetime = ttl(client, "REFRESH_TOKEN_EXPIRATION", idp.options.refresh_token_expiration)
    idp.store.insert(
        RefreshToken(
            new_jti(ms), refresh_token_sha256(refresh_token), family.sid, granted.account.id, client.client_id, jti,
            now, min(family.expires_at, now + lifetime), None, None,
        )
    )
    return refresh_token


def check_unchanged(idp: Idp, account: Account, ms: int, status=403, client: ClientRow | None = None):
    """Raise invalid_grant if the user or the client was deleted, revoked or deactivated since its row was read.

    Call it in the issuing transaction, where no concurrent write can follow the check.
    """
    fresh, after = idp.store.find_standings(account.id, client.client_id if client else "")
    if not is_still_valid(fresh, ms) or fresh.revoked_before != account.revoked_before:
        raise Problem("invalid_grant", status=status, log="the user was deactivated or revoked meanwhile")
    before = client and (client.id, client.revoked_before)
    if before and not (after and after.is_active and (after.id, after.revoked_before) == before):
        raise Problem("invalid_grant", log="the client was switched off or revoked meanwhile")


def continue_family(idp: Idp, client: Client, granted: Granted, caller: Caller) -> tuple[Family | None, str]:
    """Continue a login by spending its refresh token; return None if that cannot be spent.

    A retry gets the refresh token that was issued for it before, "" otherwise; see find_retry(). Other reuse of a spent
    refresh token revokes the family.
    """
    assert granted.family
    if idp.store.rotate_refresh_token(granted.spends, client.client_id, idp.now()):
        return granted.family, ""
    # Looked for only now: what could be spent has no successor.
    if retried := find_retry(idp, client, granted.spends, granted.successor):
        return granted.family, retried
    spent = idp.store.find_refresh_token(granted.spends)
    assert spent
    if spent.rotated_at is not None:
        revoke_reused(idp, caller, granted.family)
    return None, ""


def begin_family(
    idp: Idp, client: Client, granted: Granted, caller: Caller, ms: int, browser: BrowserSession | None
) -> Family | None:
    """Begin a login, by spending its code if it has one; return None if that cannot be spent.

    `browser` is the session of the browser that got the code.
    """
    now, code = idp.now(), granted.code
    assert granted.account
    ended_ms = idp.store.logins_revoked_before(granted.account.id, client.client_id)
    family = Family(
        sid=code.sid if code else new_sid(ms), user_id=granted.account.id, client_id=client.client_id,
        scope=granted.scope, amr=" ".join(granted.amr), auth_time=granted.auth_time, nonce=granted.nonce,
        created_ms=max(ms, ended_ms + 1),
        expires_at=now + idp.options.refresh_token_absolute_expiration, revoked_at=None,
        browser=code.browser if code else "", claims=code.claims if code else "",
        ip_address=browser.ip_address if browser else caller.peer,
        user_agent=browser.user_agent if browser else caller.user_agent[:200],
    )
    if code and not idp.store.spend_code(code.code_sha256, client.client_id, now):
        end_code(idp, caller, code)  # a concurrent request spent the code
        return None
    idp.store.insert(family)
    return family


USER_CLAIMS = {
    "name": "profile", "nickname": "profile", "preferred_username": "profile", "updated_at": "profile",
    "email": "email", "email_verified": "email", "roles": "roles", "groups": "groups",
}  # claim -> scope that releases it


def user_claims(idp: Idp, account: Account, scope: str, also=()) -> dict:
    """Return the user's claims that `scope` releases, and those named in `also`. OpenID Connect Core §5.4, §5.5."""
    if also:
        one_by_one = user_claims(idp, account, " ".join({USER_CLAIMS[name] for name in also if name in USER_CLAIMS}))
        return user_claims(idp, account, scope) | {name: value for name, value in one_by_one.items() if name in also}
    scopes = scope.split()
    claims: dict[str, Any] = {"sub": account.id}
    if "profile" in scopes:
        names = dict.fromkeys(("name", "nickname", "preferred_username"), account.username)
        claims |= names | {"updated_at": account.modified_at}
    if "email" in scopes and account.email:
        claims |= {"email": account.email, "email_verified": bool(account.email_verified)}
    if {"roles", "groups"} & set(scopes):
        roles = [role.name for role in idp.store.list_roles_of(account.id)]
        claims |= {name: roles for name in ("roles", "groups") if name in scopes}
    return claims


def requested_claims(claims: str, of: str) -> tuple:
    """Return the names that the claims parameter requests for `of`, either `id_token` or `userinfo`."""
    return tuple(msgspec.json.decode(claims).get(of) or ()) if claims else ()


def essential_acr(claims: str) -> list:
    """Return the `acr` values of which the claims parameter demands one, or [] if any will do."""
    return msgspec.json.decode(claims).get("acr", []) if claims else []


def acr_of(amr: list, claims: str) -> str:
    """Return the `acr` of a login: of the values that it reaches and the client demands the strongest, or "" if none.

    A second factor also satisfies who demands one factor. OpenID Connect Core §5.5.1.1.
    """
    demanded = essential_acr(claims)
    reached = (TWO_FACTORS, ONE_FACTOR) if "mfa" in amr else (ONE_FACTOR,)
    return next((value for value in reached if not demanded or value in demanded), "")


def released_claims(idp: Idp, client: Client, family: Family, of: str, agreed: str | None = None) -> tuple:
    """Return the names that the claims parameter requested for `of` and that may be released now.

    To a third party only those whose scope the user consented to, whatever was valid when the login began. `agreed`
    is that consent, where it is not the stored one.
    """
    names = requested_claims(family.claims, of)
    if not names or client.row.is_first_party:
        return names
    if agreed is None:
        agreed = idp.store.find_consent(family.user_id, client.row.id) or ""
    return tuple(name for name in names if USER_CLAIMS.get(name) in agreed.split())


def id_token_claims(
    idp: Idp, client: Client, granted: Granted, family: Family, access_token: str, agreed: str | None = None
) -> dict:
    """Return the claims of an ID token; `agreed` as in released_claims(). OpenID Connect Core §2, §3.1.3.6."""
    assert granted.account
    now = idp.now()
    also = released_claims(idp, client, family, "id_token", agreed)
    claims = user_claims(idp, granted.account, granted.scope, also) | {
        "iss": idp.options.auth_issuer, "aud": client.client_id, "azp": client.client_id, "iat": now,
        "exp": now + ID_TOKEN_TTL, "auth_time": granted.auth_time, "amr": granted.amr, "sid": family.sid,
        "acr": acr_of(granted.amr, family.claims), "token_use": "id",
        # at_hash is the left half of the signing algorithm's hash, which is SHA-256 for both supported algorithms.
        "at_hash": b64url(hashlib.sha256(access_token.encode()).digest()[:16]),
    }
    if granted.nonce:
        claims["nonce"] = granted.nonce
    return fit_claims(claims)


def id_token_key(idp: Idp, client: Client) -> Key:
    return idp.auth_ring.signer(client.row.id_token_signed_response_alg)


def mint_id_token(idp: Idp, client: Client, granted: Granted, family: Family, access_token: str) -> str:
    claims = id_token_claims(idp, client, granted, family, access_token)
    return idp.auth_ring.mint(id_token_key(idp, client), JWT, claims)


def userinfo_claims(
    idp: Idp, client: Client, family: Family | None, account: Account, claims: dict, agreed: str | None = None
) -> dict:
    """Return what the UserInfo endpoint answers to an access token with these claims; `agreed` as in released_claims().

    OpenID Connect Core §5.3.2.
    """
    also = released_claims(idp, client, family, "userinfo", agreed) if family else ()
    if claims.get("roles_omitted"):
        also += tuple(opened_role_claims(client, claims["scope"]))
    return user_claims(idp, account, claims["scope"], also)


def draft_token(idp: Idp, client: Client, granted: Granted, ms: int) -> tuple[dict, dict]:
    """Return the claims of an access token, and the response without it. RFC 9068 §2.2, RFC 6749 §5.1."""
    row, now, lifetime = client.row, idp.now(), token_lifetime(idp, client)
    subject, jti = granted.account.id if granted.account else row.client_id, new_jti(ms)
    claims = {
        "iss": idp.options.auth_issuer, "sub": subject, "aud": row.audience, "client_id": row.client_id, "iat": now,
        "nbf": now, "exp": now + lifetime, "jti": jti, "mad": "auth", "token_use": "access",
    }
    answer = {
        "access_token": "", "token_type": "Bearer", "expires_in": lifetime, "jti": jti, "aud": row.audience,
        "audience": row.audience,  # what most of the published bindings read
    }
    if granted.scope:
        claims["scope"] = answer["scope"] = granted.scope
    return claims, answer


def person_claims(idp: Idp, client: Client, granted: Granted, sid: str) -> dict:
    """Return the claims of an access token about its user and the login. RFC 9068 §2.2.1, §2.2.3.

    Name and roles are for the resource servers of a first party; a third party gets what the user agreed to.
    """
    account = granted.account
    assert account
    claims: dict[str, Any] = {"amr": granted.amr, "auth_time": granted.auth_time, "sid": sid}
    if opens(client, granted.scope, "profile"):
        claims |= {"username": account.username, "preferred_username": account.username}
    return claims | role_claims(idp, account.id, granted.scope, client)


def access_token_key(idp: Idp, client: Client) -> Key:
    return idp.auth_ring.signer(client.row.access_token_signed_alg or idp.auth_ring.access.alg)


def mint_access_token(idp: Idp, client: Client, claims: dict) -> str:
    return idp.auth_ring.mint(access_token_key(idp, client), AT_JWT, claims)


def issue_machine(idp: Idp, client: Client, granted: Granted, caller: Caller) -> dict:
    """Issue a client its own token. The row is stored after the answer, in a batch of them. RFC 6749 §4.4.3."""
    claims, answer = draft_token(idp, client, granted, issuing_ms(idp, client.row))
    answer["access_token"] = mint_access_token(idp, client, claims)
    actor = None
    if idp.options.enable_audit_logging:
        actor = client.client_id, caller.peer, caller.user_agent[:200], caller.request_id
    idp.store.enqueue((claims["jti"], client.client_id, granted.scope, claims["iat"], claims["exp"]), actor)
    return answer


def issue_user(idp: Idp, client: Client, granted: Granted, caller: Caller) -> dict:
    """Issue the tokens of a user, and spend the code or refresh token that the client presented.

    Raises invalid_grant if that is spent already, or if user, client or browser session was revoked meanwhile.
    """
    account, row, ms = granted.account, client.row, issuing_ms(idp, client.row, granted.account)
    assert account
    claims, answer = draft_token(idp, client, granted, ms)
    jti, now = claims["jti"], claims["iat"]
    with idp.store.transaction():
        # Checked inside the transaction: an earlier revocation is seen here, a later one covers the new rows.
        check_unchanged(idp, account, ms, 400 if granted.spends or granted.code else 403, row)
        code_browser = granted.code.browser if granted.code else ""
        browser = idp.store.find_browser_session(code_browser) if code_browser else None
        if code_browser and is_logged_out(browser):
            raise Problem("invalid_grant", log="its browser was logged out meanwhile")
        family, retried = (
            continue_family(idp, client, granted, caller) if granted.family
            else (begin_family(idp, client, granted, caller, ms, browser), "")
        )
        if family:
            refresh_token = retried or add_refresh_token(idp, client, granted, family, jti, ms)
            idp.store.insert(
                Session(
                    jti, account.id, row.client_id, family.sid, granted.scope, "access", "auth", granted.login_method,
                    now, claims["exp"], None,
                )
            )
            action = "refresh_token_used" if granted.spends else "user_token_issued"
            detail = f"jti={jti};retry=true" if retried else f"jti={jti}"
            audit(idp, caller.acting_as(account.id), action, row.client_id, detail)
            idp.store.note_use(row.client_id, now)
            # Mint inside the transaction: if signing failed after the commit, the client would have lost its
            # code or refresh token and got no token.
            claims |= person_claims(idp, client, granted, family.sid)
            answer["access_token"] = mint_access_token(idp, client, fit_claims(claims))
            if refresh_token:
                answer["refresh_token"] = refresh_token
            if OPENID in granted.scope.split():
                answer["id_token"] = mint_id_token(idp, client, granted, family, answer["access_token"])
    if family is None:  # raised after the commit: a rollback would undo the revocation of a reused family
        raise Problem("invalid_grant", log="code or refresh token spent, expired or revoked")
    return answer


def issue(idp: Idp, client: Client, granted: Granted, caller: Caller) -> dict:
    """Mint and store the granted tokens; return the token response. RFC 6749 §5.1."""
    if granted.account is None:
        return issue_machine(idp, client, granted, caller)
    return issue_user(idp, client, granted, caller)


def issue_admin(idp: Idp, caller: Caller, account: Account, amr: list, client_id: str) -> dict:
    """Begin a login at ADMIN and return its token response. `client_id` is recorded, not checked."""
    now, options, ms = idp.now(), idp.options, issuing_ms(idp, account)
    jti, lifetime, roles = new_jti(ms), options.admin_token_expiration, role_claims(idp, account.id, "")
    family = Family(
        new_sid(ms), account.id, ADMIN_CLIENT, "", " ".join(amr), now, "", ms, now + lifetime, None,
        ip_address=caller.peer, user_agent=caller.user_agent[:200],
    )
    with idp.store.transaction():
        check_unchanged(idp, account, ms)
        idp.store.insert(family)
        idp.store.insert(
            Session(
                jti, account.id, client_id, family.sid, "", "access", "admin", "otp" if "otp" in amr else "pwd", now,
                now + lifetime, None,
            )
        )
        audit(idp, caller.acting_as(account.id), "admin_token_issued", client_id or "(no client id)", f"jti={jti}")
    claims = {
        "iss": options.admin_issuer, "sub": account.id, "aud": options.admin_issuer, "iat": now, "nbf": now,
        "exp": now + lifetime, "jti": jti, "mad": "admin", "token_use": "access", "username": account.username,
        "preferred_username": account.username, **user_claims(idp, account, "email"),
        "amr": amr, "auth_time": now, "sid": family.sid, **roles,
    }
    ring = idp.admin_ring
    idp.counters.add(TOKENS, "admin", ADMIN_CLIENT)
    return {
        "access_token": ring.mint(ring.access, AT_JWT, fit_claims(claims)), "token_type": "Bearer",
        "expires_in": lifetime, "jti": jti, "aud": options.admin_issuer, "audience": options.admin_issuer,
    }


# == Login =====================================================================
# Users log in with a browser, or headless: in a native application that shows its own forms. A login
# transaction, bound to the browser or application that began it, passes through the states
#
#     select -> password -> totp | enrol -> codes -> consent -> ready -> done
#
# and cannot skip one: each transition is one conditional UPDATE. OpenID Connect Core §3.1.2.


class AuthorizeRequest(msgspec.Struct):
    """A validated authorization request. RFC 6749 §4.1.1, OpenID Connect Core §3.1.2.1."""

    client_id: str
    redirect_uri: str
    response_mode: str = "query"
    state: str | None = None
    scope: str | None = None
    nonce: str = ""
    code_challenge: str = ""
    code_challenge_method: str = ""
    prompt: list[str] = []
    max_age: int | None = None
    login_hint: str = ""
    hinted_sub: str = ""  # of the id_token_hint
    claims: str = ""
    ui_locales: str = ""
    headless: bool = False


class AcrRequest(msgspec.Struct):
    """The request for the `acr` of an ID token in the claims parameter. OpenID Connect Core §5.5.1, §5.5.1.1."""

    essential: bool = False
    value: str | None = None
    values: list[str] | None = None

    def demanded(self) -> list[str]:
        """Return the values of which one must be reached. A voluntary request demands nothing."""
        wanted = [*(self.values or ()), *([] if self.value is None else [self.value])]
        return wanted if self.essential else []


class Hints(msgspec.Struct):
    """Whom a request means. OpenID Connect Core §3.1.2.1, RP-Initiated Logout §2."""

    login_hint: str = ""
    id_token: dict | None = None  # the claims of the id_token_hint
    is_unverifiable: bool = False  # there is an id_token_hint, and it counts as none: nobody can verify it


class Login(msgspec.Struct):
    """A login transaction, its request and its client. Both are None for a login to the account page."""

    row: LoginTransaction
    request: AuthorizeRequest | None
    client: Client | None
    binding: str = ""  # the secret of row.binding_sha256; empty if headless


PROMPTS = ("none", "login", "consent", "select_account")
RESPONSE_MODES = ("query", "fragment", "form_post")


def validate_client(idp: Idp, params) -> tuple[Client, str]:
    """Return the client and the redirect URI of an authorization request.

    Until both are valid an error must not be sent to the redirect URI. RFC 6749 §4.1.2.1.
    """
    client = find_client(idp, params.need("client_id"))
    if client is None:
        raise Problem("invalid_request", log="authorize: unknown or inactive client")
    redirect_uri = params.need("redirect_uri")
    if not is_registered_uri(redirect_uri, client.redirect_uris):
        came = f"{client.client_id} has not registered: {describe_unregistered(redirect_uri, client.redirect_uris)}"
        raise Problem("invalid_request", log=f"authorize: a redirect_uri that {came}")
    return client, redirect_uri


def read_challenge(idp: Idp, client: Client, params) -> tuple[str, str]:
    """Return code_challenge and code_challenge_method, both empty without PKCE. RFC 7636 §4.3, §4.4.1."""
    challenge, method = params.get("code_challenge") or "", params.get("code_challenge_method") or ""
    in_clear = bool(client.row.allow_http_redirects)  # whoever listens has the code, but not what S256 hashed
    if not challenge and (method or in_clear or client.row.client_type == PUBLIC_CLIENT):
        raise Problem("invalid_request", log=f"PKCE is required{' with allow_http_redirects' if in_clear else ''}")
    if challenge:
        method = method or "plain"  # RFC 7636 §4.3
        if method != "S256" and (in_clear or method != "plain" or not idp.options.allow_plain_pkce):
            raise Problem("invalid_request", log="this code_challenge_method is not accepted")
        if not CODE_VERIFIER.fullmatch(challenge) or (method == "S256" and len(challenge) != 43):
            raise Problem("invalid_request", log="malformed code_challenge")
    return challenge, method


def verify_hint(idp: Idp, token: str) -> dict:
    """Return the claims of an ID token we signed, even if it expired and its key is retired. Raises invalid_token.

    OpenID Connect Core §3.1.2.1, RP-Initiated Logout §2.
    """
    try:
        return idp.auth_ring.verify(token, JWT)
    except Problem:
        retired = idp.store.find_retired_key(token.partition(".")[0], idp.now()) if len(token) <= TOKEN_LIMIT else None
        if retired is None:
            raise
    return verify_signature(PublicKey.from_pem(retired.public_key), token, IdTokenClaims)


def read_hints(idp: Idp, caller: Caller, token: str | None, login_hint="") -> Hints:
    """Return what a request hints at. Nothing is read in an id_token_hint that cannot be verified."""
    try:
        return Hints(login_hint, verify_hint(idp, token) if token else None)
    except Problem as problem:
        idp.log("hint.ignored", reason=problem.log, request_id=caller.request_id)
        return Hints(login_hint, is_unverifiable=True)


def park_hints(idp: Idp, caller: Caller, hints: Hints) -> tuple[str, str]:
    """Store hints for one request of the same browser; return their handle and the secret for its cookie.

    The claims of the ID token are stored, never the token.
    """
    idp.throttle.begin(caller.peer, "hint")
    handle, binding, now = random_handle(), random_handle(), idp.now()
    if hints.id_token:
        claims = {name: value for name, value in hints.id_token.items() if name in ("sub", "aud", "sid", "exp")}
        hints = msgspec.structs.replace(hints, id_token=claims)
    row = ParkedHints(sha256(handle), sha256(binding), msgspec.json.encode(hints).decode(), now, now + HINTS_TTL)
    idp.store.park_hints(row)
    return handle, binding


def take_hints(idp: Idp, caller: Caller, handle: str, binding: str | None) -> Hints:
    """Return parked hints, once. If there are none, nobody can tell any more who is meant."""
    parked = idp.store.spend_hints(sha256(handle), sha256(binding), idp.now()) if binding else None
    if parked is None:
        reason = "its handle is unknown, used, expired or of another browser"
        idp.log("hint.ignored", reason=reason, request_id=caller.request_id)
        return Hints(is_unverifiable=True)
    return msgspec.json.decode(parked.hints, type=Hints)


def read_claims_parameter(claims: str | None) -> str:
    """Return the claim names that the claims parameter requests, as JSON of bounded size. OpenID Connect Core §5.5.

    `sub` and `acr` of the ID token are kept with the values that the client demands.
    """
    if not claims:
        return ""
    try:
        found = msgspec.json.decode(claims, type=dict[str, dict[str, dict | None] | None])
        in_id_token = found.get("id_token") or {}
        acr = msgspec.convert(in_id_token.get("acr") or {}, AcrRequest)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        raise Problem("invalid_request", log="malformed claims parameter") from None
    asked = {of: [name for name in (found.get(of) or ()) if name in USER_CLAIMS] for of in ("id_token", "userinfo")}
    sub, demanded = (in_id_token.get("sub") or {}).get("value"), acr.demanded()
    known = [value for value in (ONE_FACTOR, TWO_FACTORS) if value in demanded]
    if demanded and not known:
        raise Problem("unmet_authentication_requirements", log=f"no login reaches acr {' '.join(demanded)[:300]}")
    more = ({"sub": sub} if isinstance(sub, str) else {}) | ({"acr": known} if known else {})
    return msgspec.json.encode(asked | more).decode()


def validate_scope(idp: Idp, client: Client, scope: str | None):
    """Refuse a scope of which no user could be granted anything, and log what is ignored. RFC 6749 §3.3."""
    requested = set((scope or "").split(" ")) - {""}
    if any(not SCOPE_TOKEN.fullmatch(token) for token in requested):
        raise Problem("invalid_scope", log=f"malformed scope: <{excerpt(scope or '')}>")
    possible = set(decide_login_scopes(idp, scope, client.scopes, client.scopes).split(" "))
    if ignored := requested - possible:
        idp.log(
            "scope.ignored", client_id=client.client_id, scope=" ".join(sorted(ignored))[:300],
            reason=f"no such scope: {describe_scopes(ignored, client.scopes)}",
        )


def read_request(idp: Idp, client: Client, redirect_uri: str, params, hints: Hints) -> AuthorizeRequest:
    """Validate the rest of the request. Raises the Problem to redirect with. OpenID Connect Core §3.1.2.2."""
    get = params.get
    response_mode = get("response_mode") or "query"
    if response_mode not in RESPONSE_MODES:
        raise Problem("invalid_request", log="unknown response_mode")
    for name in ("request", "request_uri", "registration"):
        if get(name):
            raise Problem(f"{name}_not_supported")
    if not get("response_type"):
        raise Problem("invalid_request", log="no response_type")
    if get("response_type") != "code":
        raise Problem("unsupported_response_type")
    if AUTHORIZATION_CODE not in client.grant_types:
        raise Problem("unauthorized_client", log="the client may not use codes")
    challenge, method = read_challenge(idp, client, params)
    prompt = (get("prompt") or "").split()
    if set(prompt) - set(PROMPTS) or ("none" in prompt and len(prompt) > 1):
        raise Problem("invalid_request", log="bad prompt")
    max_age = get("max_age")
    if max_age and not re.fullmatch(r"[0-9]{1,9}", max_age):
        raise Problem("invalid_request", log="bad max_age")
    lengths = {name: len(get(name) or "") for name in ("state", "nonce", "scope", "ui_locales")}
    lengths["login_hint"] = len(hints.login_hint)
    for name, limit in (("state", 4096), ("nonce", 2048), ("login_hint", 255), ("scope", 4096), ("ui_locales", 255)):
        if lengths[name] > limit:
            raise Problem("invalid_request", log=f"{name} is too long")
    validate_scope(idp, client, get("scope"))
    if hints.id_token and hints.id_token["aud"] != client.client_id:
        raise Problem("invalid_request", log="id_token_hint is an ID token of another client")
    if hints.is_unverifiable and "none" in prompt:
        raise Problem("login_required", log="id_token_hint cannot be verified, and nobody may be asked who is meant")
    return AuthorizeRequest(
        client.client_id, redirect_uri, response_mode, get("state"), get("scope"), get("nonce") or "", challenge,
        method, prompt, int(max_age) if max_age else None, hints.login_hint,
        hints.id_token["sub"] if hints.id_token else "", read_claims_parameter(get("claims")), get("ui_locales") or "",
    )


# -- browser sessions --


def find_browser_session(idp: Idp, handle: str | None) -> tuple[BrowserSession, Account] | None:
    """Return the session of a cookie and its user, or None if the session is over or the user is not active."""
    if not handle or len(handle) > 100:
        return None
    session, now = idp.store.find_browser_session(sha256(handle)), idp.now()
    if (
        session is None
        or session.revoked_at is not None
        or session.expires_at <= now
        or session.last_seen_at + idp.options.session_idle_expiration <= now
    ):
        return None
    if session.created_ms <= idp.revoked_before or session.auth_time > now + IAT_SKEW:
        return None
    account = idp.store.find_account(session.user_id)
    if not is_still_valid(account, session.created_ms):  # a lockout stops guesses, not sessions
        return None
    if now - session.last_seen_at >= 60:  # at most one write a minute
        idp.store.touch_browser_session(session.id_sha256, now)
    return session, account


def begin_browser_session(
    idp: Idp, caller: Caller, account: Account, amr: list, auth_time: int, replaces: str | None
) -> str:
    """Begin a browser session; return the handle for its cookie.

    The session named by the handle `replaces` ends. If the user is the same, logins that began in it continue, and a
    session that was alive hands on the clients to which the user agreed to continue.
    """
    handle, now = random_handle(), idp.now()
    ms = issuing_ms(idp, account)
    with idp.store.transaction():
        check_unchanged(idp, account, ms)
        idp.store.insert(
            BrowserSession(
                sha256(handle), account.id, " ".join(amr), auth_time, ms, now,
                now + idp.options.session_absolute_expiration, None, caller.peer, caller.user_agent[:200],
            )
        )
        if replaces:
            found = find_browser_session(idp, replaces)
            if found and found[1].id == account.id:
                idp.store.move_confirmations(sha256(replaces), sha256(handle))
            idp.store.replace_browser_session(sha256(replaces), sha256(handle), account.id, now)
        audit(idp, caller.acting_as(account.id), "user_logged_in", account.id, "amr=" + ",".join(amr))
    return handle


def end_browser_session(idp: Idp, caller: Caller, id_sha256: str, user_id: str = ""):
    """Revoke a browser session and every login at a client that began in it.

    `user_id` is its user, if that is not the caller.
    """
    with idp.store.transaction():
        if idp.store.revoke_browser_session(id_sha256, idp.now()):
            audit(idp, caller, "browser_logged_out", user_id or caller.actor)


# -- sessions at the console of ADMIN --

PROOF_TTL = 300  # seconds after a password for which what asks for a fresh proof is done without one


def is_at_its_place(caller: Caller, console: AdminSession) -> bool:
    """Return whether a request comes from the browser and the network of the last proof of its session.

    Cookies ignore ports: other services of the host receive the cookie too, and could use it from elsewhere.
    """
    return caller.user_agent[:200] == console.user_agent and network_of(caller.peer) == network_of(console.ip_address)


def find_console(idp: Idp, caller: Caller, handle: str | None, passive: bool) -> tuple[AdminSession, Account] | None:
    """Return the session at the console of a cookie and its user, or None if it is over: see console_user().

    Neither a passive request counts as use, nor one from elsewhere.
    """
    if not handle or len(handle) > 100:
        return None
    console, now = idp.store.find_admin_session(sha256(handle)), idp.now()
    account = console_user(idp, console)
    if console is None or account is None:
        return None
    is_use = not passive and is_at_its_place(caller, console)
    if is_use and now - console.last_seen_at >= 60:  # at most one write a minute
        idp.store.touch_admin_session(console.id_sha256, now)
        console = msgspec.structs.replace(console, last_seen_at=now)
    return console, account


def begin_console(
    idp: Idp, caller: Caller, account: Account, amr: list, replaces: str | None
) -> tuple[str, AdminSession]:
    """Begin a session at the console; return the handle for its cookie. The session of the handle `replaces` ends.

    The handle is always a new one, so that nobody can know it from before. OWASP Session Management, Session Fixation.
    """
    handle, now = random_handle(), idp.now()
    ms = issuing_ms(idp, account)
    console = AdminSession(
        sha256(handle), account.id, " ".join(amr), now, now, ms, now, now + idp.options.console_absolute_expiration,
        caller.peer, caller.user_agent[:200],
    )
    with idp.store.transaction():
        check_unchanged(idp, account, ms)
        if replaces:
            idp.store.delete_admin_session(sha256(replaces))
        idp.store.insert(console)
        audit(idp, caller.acting_as(account.id), "console_signed_in", account.id, "amr=" + ",".join(amr))
    return handle, console


def is_proof_fresh(idp: Idp, console: AdminSession) -> bool:
    return -IAT_SKEW <= idp.now() - console.proven_at < PROOF_TTL


def prove_console(idp: Idp, caller: Caller, console: AdminSession, account: Account, amr: list) -> AdminSession:
    """Record that the user of a session has just been authenticated again, in the browser of this caller.

    Raises invalid_token if the session ended meanwhile.
    """
    with idp.store.transaction():
        check_unchanged(idp, account, console.created_ms)
        proven = idp.store.prove_admin_session(
            console.id_sha256, account.id, " ".join(amr), idp.now(), caller.peer, caller.user_agent[:200]
        )
        if proven is None:
            raise Problem("invalid_token", log="the session at the console has just ended")
        moved = "" if is_at_its_place(caller, console) else f"moved_from={console.ip_address}"
        audit(idp, caller, "console_proven", account.id, moved)
    return proven


def end_console(idp: Idp, caller: Caller, console: AdminSession):
    with idp.store.transaction():
        if idp.store.delete_admin_session(console.id_sha256):
            audit(idp, caller, "console_signed_out", console.user_id)


def list_own_sessions(idp: Idp, user_id: str, current: str) -> list[ConsoleSession]:
    """Return the sessions of an administrator at the console and the logins for ADMIN tokens; `current` is an id."""
    now, least = idp.now(), idp.revoked_before
    consoles = idp.store.list_admin_sessions(user_id, now, idp.options.console_idle_expiration)
    return [
        ConsoleSession(
            row.id_sha256, "console", row.id_sha256 == current, iso(row.auth_time), iso(row.last_seen_at),
            iso(row.expires_at), row.ip_address, row.user_agent,
        )
        for row in consoles if row.created_ms > least
    ] + [
        ConsoleSession(
            row.sid, "token", row.sid == current, iso(row.created_ms // 1000), None, iso(row.expires_at), "", "",
        )
        for row in idp.store.list_admin_logins(user_id, ADMIN_CLIENT, now) if row.created_ms > least
    ]


def end_own_sessions(idp: Idp, caller: Caller, user_id: str, current: str, id: str = "") -> int:
    """End one of an administrator's own sessions at ADMIN, or all but `current`; return how many.

    Raises not_found if `id` is none of them.
    """
    with idp.store.transaction():
        rows = list_own_sessions(idp, user_id, current)
        ended = [row for row in rows if (row.id == id if id else not row.is_current)]
        if id and not ended:
            raise Problem("not_found")
        for row in ended:
            if row.kind == "console":
                idp.store.delete_admin_session(row.id)
                audit(idp, caller, "console_ended", user_id)
            else:
                revoke_family(idp, caller, row.id, "logout", "admin")
    return len(ended)


def demanded_sub(request: AuthorizeRequest) -> str:
    """Return the `sub` that id_token_hint or the claims parameter demands, or "". OpenID Connect Core §3.1.2.2."""
    return request.hinted_sub or (msgspec.json.decode(request.claims).get("sub", "") if request.claims else "")


def could_be_impersonated(client: Client, redirect_uri: str) -> bool:
    """Return whether any program of the user's device could pose as a client and receive its codes. RFC 8252 §8.6.

    A confidential client authenticates, and only the owner of a host receives what https sends there.
    """
    return client.row.client_type == PUBLIC_CLIENT and not redirect_uri.lower().startswith("https:")


def must_confirm(idp: Idp, session: BrowserSession, client: Client, request: AuthorizeRequest) -> bool:
    """Return whether a user has to agree, in this session, before its client gets a code without a login.

    RFC 6749 §10.2 and RFC 8252 §8.6 demand it of a client that could be impersonated, whoever made it.
    """
    return could_be_impersonated(client, request.redirect_uri) and not idp.store.is_confirmed(
        session.id_sha256, client.row.id
    )


def session_serves(idp: Idp, session: BrowserSession, client: Client, request: AuthorizeRequest) -> bool:
    """Return whether a session satisfies a request without a new login. OpenID Connect Core §3.1.2.3."""
    age, limit = idp.now() - session.auth_time, ttl(client, "SESSION_BASED_MAX_AGE", 0)
    if (request.max_age is not None and age > request.max_age) or request.max_age == 0 or (limit and age > limit):
        return False
    return "login" not in request.prompt and demanded_sub(request) in ("", session.user_id)


# -- login transactions --


def new_sealed_seed(idp, user_id, state) -> str:
    return idp.seal.close(new_totp_seed(), user_id) if state == "enrol" else ""


def begin_login(
    idp: Idp, caller: Caller, binding: str, request: AuthorizeRequest | None, state="password",
    session: BrowserSession | None = None,
) -> LoginTransaction:
    """Begin a login that only the holder of the secret `binding` can continue.

    With a session the password counts as verified; `state` is the first step that is left.
    """
    now, binding_sha256, kept = idp.now(), sha256(binding), msgspec.json.encode(request)
    idp.throttle.begin(caller.peer, "login", len(kept))
    idp.store.purge_logins(now, 20)  # each new login deletes up to 20 expired ones, so that the table stays small
    if idp.store.count_logins(binding_sha256, now) >= 50:
        raise Problem("slow_down", log="too many logins under way in one browser", retry_after=60)
    row = LoginTransaction(
        random_handle()[:22], binding_sha256, request.client_id if request else "", state,
        kept.decode(), session.user_id if session else None, session.amr if session else "",
        session.auth_time if session else 0, 0, now, now + LOGIN_TTL, session.created_ms if session else 0, "",
    )
    idp.store.insert(row)
    return row


def load_login(idp: Idp, row: LoginTransaction, binding="") -> Login:
    request = msgspec.json.decode(row.request, type=AuthorizeRequest | None)
    client = find_client(idp, row.client_id) if request else None
    if request and (client is None or not is_registered_uri(request.redirect_uri, client.redirect_uris)):
        raise Problem("not_found", log="the client of this login is gone, or its redirect URI")
    return Login(row, request, client, binding)


def get_login(idp: Idp, id: str, binding: str | None) -> Login:
    """Return the unfinished login `id` if `binding` is its secret. Raises not_found, whatever is wrong."""
    row = idp.store.find_login(id, sha256(binding), idp.now()) if binding and id and len(id) <= 100 else None
    if row is None or row.state == "done":
        raise Problem("not_found", log="no such login under way, or not in this browser")
    assert binding
    return load_login(idp, row, binding)


def mark_of(idp: Idp, row: LoginTransaction, answer="") -> str:
    """Return what a login keeps of the form that moves it on: when that was, and a tag of its answer, no password."""
    return f"{idp.now()} {idp.seal.repeat_tag(row.id, row.state, answer)}"


def find_repeated(idp: Idp, id: str, binding: str, state: str, answer="") -> Login | None:
    """Return a login that this very form has moved on from `state` a moment ago, in the browser that has `binding`.

    The browser has got the secret of the next state, or has dropped that response and kept the old one. A one-time
    code is not verified twice here: it must be the one that was accepted. The password is verified by the caller.
    """
    for secret in (binding, idp.seal.renewed_binding(binding, id, state)):
        row = idp.store.find_login(id, sha256(secret), idp.now())
        if row is None or row.state == state:
            continue
        passed_at, _, tag = row.pending.partition(" ")
        if state == "password":
            is_repeated, passed_at = True, str(row.auth_time)
        else:
            is_repeated = hmac.compare_digest(tag, idp.seal.repeat_tag(id, state, answer))
        if is_repeated and 0 <= idp.now() - int(passed_at) <= REPEAT_SECONDS:
            return load_login(idp, row, secret)
    return None


def advance(idp: Idp, login: Login, state: str, pending="", **changes) -> Login:
    """Move a login to its next state and change columns. Raises conflict if another request has already moved it."""
    row = msgspec.structs.replace(login.row, state=state, pending=pending, **changes)
    advanced = idp.store.advance_login(login.row, row, idp.now())
    if advanced is None:
        raise Problem("conflict", log="this step of the login was taken already")
    return load_login(idp, advanced, login.binding)


def advance_proven(idp: Idp, login: Login, state: str, pending="", **changes) -> Login:
    """Move a login on after a factor was verified, and bind it to a new secret unless it is headless.

    Cookies ignore ports, and over http any page of the host can set them: whoever put the old secret into this browser
    must not gain the login. The browser's other logins that wait for a password move to the new secret, so that they
    can be continued in their tabs.
    """
    if not login.binding:
        return advance(idp, login, state, pending, **changes)
    binding = idp.seal.renewed_binding(login.binding, login.row.id, login.row.state)
    with idp.store.transaction():
        advanced = advance(idp, login, state, pending, binding_sha256=sha256(binding), **changes)
        idp.store.rebind_logins(login.row.binding_sha256, sha256(binding))
    return msgspec.structs.replace(advanced, binding=binding)


def count_failed_step(idp: Idp, login: Login):
    idp.store.count_failed_step(login.row.id, LOGIN_TRIES)


def scope_for(idp: Idp, client: Client, account: Account, request: AuthorizeRequest) -> str:
    return decide_login_scopes(idp, request.scope, client.scopes, scopes_of_user(idp, account.id))


def grantable_scopes(idp: Idp, client: Client, account: Account, request: AuthorizeRequest) -> list[str] | None:
    """Return the scopes that issue_code() would grant now, or None if it would refuse the request."""
    try:
        return scope_for(idp, client, account, request).split()
    except Problem:
        return None


def demands_second_factor(request: AuthorizeRequest) -> bool:
    demanded = essential_acr(request.claims)
    return bool(demanded) and ONE_FACTOR not in demanded


def scopes_to_consent(idp: Idp, client: Client, account: Account, request: AuthorizeRequest) -> list[str] | None:
    """Return what a consent to a request covers, or None if issue_code() would refuse the request.

    These are the scopes that would be granted now, and those that open the claims requested one by one: OpenID
    Connect Core §5.5 releases them as the scope would. Without `openid` there is no endpoint that releases them.
    """
    granted = grantable_scopes(idp, client, account, request)
    if granted is None or (demands_second_factor(request) and not account.totp_sealed):
        return None
    names = requested_claims(request.claims, "id_token") + requested_claims(request.claims, "userinfo")
    opening = {USER_CLAIMS[name] for name in names if name in USER_CLAIMS} if OPENID in granted else set()
    return sorted(opening | set(granted))


def lacks_consent(idp: Idp, client: Client, account: Account, request: AuthorizeRequest) -> bool:
    """Return whether a third party requests what the user has not consented to."""
    scopes = None if client.row.is_first_party else scopes_to_consent(idp, client, account, request)
    if scopes is None:
        return False  # there is nothing to consent to: issue_code() tells the client
    agreed = idp.store.find_consent(account.id, client.row.id)
    return agreed is None or not set(scopes) <= set(agreed.split())


def needs_consent(idp: Idp, client: Client, account: Account, request: AuthorizeRequest) -> bool:
    """Return whether to ask for consent: by prompt=consent, or for a third party's first or wider request."""
    if "consent" in request.prompt:
        return scopes_to_consent(idp, client, account, request) is not None
    return lacks_consent(idp, client, account, request)


def state_after_factors(idp: Idp, login: Login, account: Account) -> str:
    """Return the state after the last factor: "ready" if headless, else "consent" if needed, else "done"."""
    if login.request and login.request.headless:
        return "ready"
    if login.request and login.client and needs_consent(idp, login.client, account, login.request):
        return "consent"
    return "done"


def advance_after_password(idp: Idp, login: Login, account: Account, offers_factor=False) -> Login:
    """Move a login on whose password was just proven. `offers_factor` lets a user set up a second factor, or not."""
    demanded = offers_factor or (login.client is not None and "ENABLE_TOTP" in login.client.flags)
    state = "totp" if account.totp_sealed else "enrol" if demanded else state_after_factors(idp, login, account)
    proven_ms = max(idp.now_ms(), account.revoked_before + 1)
    return advance_proven(
        idp, login, state, new_sealed_seed(idp, account.id, state), user_id=account.id, amr="pwd", auth_time=idp.now(),
        proven_ms=proven_ms,
    )


def submit_password(idp: Idp, caller: Caller, login: Login, username: str, password: str) -> Login:
    """Verify the password, the first step. Raises invalid_grant as authenticate_user does."""
    if login.row.state != "password":
        raise Problem("conflict", log="no password is asked for in this state")
    try:
        account, _ = authenticate_user(idp, caller, username, password, client=login.client, only_password=True)
    except Problem as problem:
        if problem.code == "invalid_grant":
            count_failed_step(idp, login)
        raise
    return advance_after_password(idp, login, account)


def submit_code(idp: Idp, caller: Caller, login: Login, code: str) -> Login:
    """Verify a one-time or recovery code, the second step of a user with a second factor. Raises invalid_grant."""
    if login.row.state != "totp":
        raise Problem("conflict", log="no code is asked for in this state")
    assert login.row.user_id
    try:
        account, amr = check_second_factor(
            idp, caller, login.row.user_id, login.row.proven_ms, code, login.row.client_id
        )
    except Problem as problem:
        if problem.code == "invalid_grant":
            count_failed_step(idp, login)
        raise
    auth_time = login.row.auth_time or idp.now()
    state = state_after_factors(idp, login, account)
    mark = mark_of(idp, login.row, code)
    return advance_proven(idp, login, state, mark, amr=" ".join(amr), auth_time=auth_time)


def skip_enrolment(idp: Idp, login: Login) -> Login:
    """Go on without the second factor that is offered. Raises access_denied where a client demands it."""
    if login.row.state != "enrol" or login.request is not None:
        raise Problem("access_denied", log="this second factor is demanded")
    account = idp.store.find_account(login.row.user_id or "")
    if not is_still_valid(account, login.row.proven_ms):
        raise Problem("not_found", log="the user changed meanwhile")
    return advance_proven(idp, login, state_after_factors(idp, login, account))


def enrol(idp: Idp, caller: Caller, login: Login, code: str) -> tuple[Login, list[str]]:
    """Set up a second factor by its first code, as the second step; return the recovery codes, to be shown once."""
    if login.row.state != "enrol":
        raise Problem("conflict", log="no second factor is set up in this state")
    assert login.row.user_id
    account = idp.store.find_account(login.row.user_id)
    if login_obstacle(idp, caller, account) or not is_still_valid(account, login.row.proven_ms) or account.totp_sealed:
        raise Problem("invalid_grant", status=403, log="the user changed meanwhile")
    seed = idp.seal.open(login.row.pending, account.id)
    found = totp_time_step(seed, code, idp.now()) if account.totp_locked_until <= idp.now() else None
    if found is None:
        count_failed_step(idp, login)
        record_wrong_first_code(idp, caller.acting_as(account.id), account)
        raise Problem("invalid_grant", status=403, log="wrong first code", audited=True)
    with idp.store.transaction():
        login = advance_proven(idp, login, "codes", mark_of(idp, login.row, code), amr="pwd otp mfa")
        idp.store.set_totp(account.id, idp.seal.close(seed, account.id), idp.now())
        idp.store.spend_totp_step(account.id, found)
        audit(idp, caller.acting_as(account.id), "totp_enabled", account.id)
        codes = make_recovery_codes(idp, caller.acting_as(account.id), account.id)
    remove_qr_files(idp)
    return login, codes


def issue_code(
    idp: Idp, caller: Caller, client: Client, request: AuthorizeRequest, account: Account, amr, auth_time: int,
    browser="",
) -> str:
    """Store and return an authorization code. Raises the Problem to redirect with. RFC 6749 §4.1.2.

    The user has just logged in, consented or agreed to continue for this client, or did so before in the session
    `browser`, where that is recorded.
    """
    if demanded_sub(request) not in ("", account.id):
        raise Problem("login_required", log="somebody else logged in than the client asked for")
    if not acr_of(amr, request.claims):
        demanded = " ".join(essential_acr(request.claims))
        raise Problem("unmet_authentication_requirements", log=f"the login does not reach acr {demanded}")
    scope = scope_for(idp, client, account, request)
    code, now = random_handle(), idp.now()
    ms = issuing_ms(idp, account, client.row)
    # An OpenID request needs offline_access for a refresh token (OpenID Connect Core §11). Plain OAuth requests and
    # headless logins only need the client's refresh_token grant.
    offline = OPENID not in scope.split() or "offline_access" in scope.split() or request.headless
    with idp.store.transaction():
        check_unchanged(idp, account, ms)
        if lacks_consent(idp, client, account, request):
            raise Problem("consent_required", log="without the user's consent, or it was taken back meanwhile")
        idp.store.insert(
            AuthorizationCode(
                sha256(code), client.client_id, account.id, new_sid(ms), request.redirect_uri, scope,
                request.nonce, request.code_challenge, request.code_challenge_method, request.claims, " ".join(amr),
                auth_time, ms, now + min(CODE_TTL, idp.options.pkce_code_lifetime), None, browser, int(offline),
            )
        )
        if browser and could_be_impersonated(client, request.redirect_uri):
            idp.store.confirm_client(browser, client.row.id, now)
        audit(idp, caller.acting_as(account.id), "authorization_code_issued", client.client_id)
    return code


def finish_login(idp: Idp, login: Login) -> Account:
    """Return the user of a login that has passed every state. Raises conflict or invalid_grant."""
    if login.row.state != "done" or not login.row.user_id:
        raise Problem("conflict", log="this login is not done")
    account = idp.store.find_account(login.row.user_id)
    if not is_still_valid(account, login.row.proven_ms):
        raise Problem("invalid_grant", status=403, log="the user changed meanwhile")
    return account


def second_factor_missing(
    client: Client, session: BrowserSession, account: Account, request: AuthorizeRequest
) -> str:
    """Return the login state that obtains the second factor that is demanded and a session lacks, or "".

    A client's flag makes a user without a second factor set one up; a request only asks for one that there is. A user
    proves the password before enrolling: whoever has no more than the cookie of the session could otherwise enrol an
    authenticator of its own, and lock the user out.
    """
    is_flagged = "ENABLE_TOTP" in client.flags
    if "mfa" in session.amr.split() or not (is_flagged or demands_second_factor(request)):
        return ""
    return "totp" if account.totp_sealed else "password" if is_flagged else ""


def give_consent(idp: Idp, caller: Caller, account: Account, client: Client, scopes: list[str]):
    """Record the consent of a user to `scopes` for a client, in addition to what the user consented to before."""
    with idp.store.transaction():  # the reading as well: of two consents at once neither loses what the other adds
        before = idp.store.find_consent(account.id, client.row.id) or ""
        scope = " ".join(sorted({*scopes, *before.split()}))
        idp.store.put_consent(account.id, client.row.id, scope, idp.now())
        audit(idp, caller.acting_as(account.id), "consent_given", client.client_id, scope)


def revoke_consent(idp: Idp, caller: Caller, account: Account, id_or_client_id: str):
    """Take back the consent of a user for a client, and end what was issued on it. Raises not_found without one.

    That is every login of the user at the client, with its access and refresh tokens, and every code that the client
    has not exchanged. The browser stays logged in, and the next authorization request asks for consent again.
    """
    with idp.store.transaction():
        client = get_client(idp, id_or_client_id)
        if not idp.store.delete_consent(account.id, client.row.id):
            raise Problem("not_found", log="the user has not consented to anything for this client")
        idp.store.delete_codes(account.id, client.client_id)
        idp.store.revoke_logins(account.id, client.client_id, idp.now_ms())
        audit(idp, caller, "consent_revoked", client.client_id, f"user_id={account.id}")


def revoke_consents(idp: Idp, caller: Caller, client: Client, pause) -> int:
    """Take back the consents of every user for a client, and end everything issued to it; return how many there were.

    What was issued ends first, at once. The consents go in slices: if that is interrupted, it is to be repeated. What
    was issued meanwhile on one that still stood ends with the last slice.
    """
    done, deleted = 0, SLICE
    while deleted == SLICE:
        with idp.store.transaction(identity=True):
            deleted = idp.store.delete_consents(client.row.id, SLICE)
            if not done or deleted < SLICE:
                revoke_client(idp, caller, client.row, "consents_revoked")
        done += deleted
        pause(0.001)
    return done


# -- previews --


def explain_left_out(idp: Idp, client: Client, requested: str | None, granted) -> dict[str, str]:
    """Return why scopes that were requested would not be granted, by their names."""
    asked = set((requested or "").split(" ")) - {""}

    def reason(scope):
        if scope in OIDC_SCOPES and OPENID not in asked:
            return "the client must ask for openid as well"
        if scope in client.scopes:
            return "the user does not have this scope"
        return "the client may not ask for this scope" if idp.store.find_scope(scope) else "there is no such scope"

    return {scope: reason(scope) for scope in sorted(asked - set(granted))}


def preview_token(idp: Idp, key: Key, typ: str, claims: dict) -> PreviewedToken:
    return PreviewedToken(msgspec.json.decode(unb64url(idp.auth_ring.headers[key.kid, typ].decode())), claims)


def preview_machine(idp: Idp, client: Client, request: PreviewTokens) -> Preview:
    """Return what a client would get for itself. RFC 6749 §4.4."""
    may = client.row.client_type == CONFIDENTIAL and CLIENT_CREDENTIALS in client.grant_types
    try:
        scope = decide_scopes(request.scope, client.scopes)
    except Problem as problem:
        granted = client.scopes & set((request.scope or "").split())
        left_out = explain_left_out(idp, client, request.scope, granted)
        return Preview(problem.code if may else "unauthorized_client", [], PreviewedScopes([], left_out), [])
    preview = Preview("" if may else "unauthorized_client", [], PreviewedScopes(scope.split(), {}), [])
    if may:
        claims, _ = draft_token(idp, client, Granted(scope, CLIENT_CREDENTIALS), issuing_ms(idp, client.row))
        preview.access_token = preview_token(idp, access_token_key(idp, client), AT_JWT, claims)
    return preview


def preview_user(idp: Idp, caller: Caller, client: Client, account: Account, request: PreviewTokens) -> Preview:
    """Return what a client would get if this user logged in there now, and agreed to all that the client asks for."""
    asked, refused = AuthorizeRequest(client.client_id, "", scope=request.scope), ""
    try:
        asked.claims = read_claims_parameter(ENCODE(request.claims).decode() if request.claims else None)
    except Problem as problem:
        reject(claims="is malformed" if problem.code == "invalid_request" else "")
        refused = problem.code
    amr = ["pwd", "otp", "mfa"] if account.totp_sealed or "ENABLE_TOTP" in client.flags else ["pwd"]
    scopes = grantable_scopes(idp, client, account, asked)
    if AUTHORIZATION_CODE not in client.grant_types:
        refused = "unauthorized_client"
    elif scopes is None:
        refused = "invalid_scope"
    elif not acr_of(amr, asked.claims):
        refused = "unmet_authentication_requirements"
    requested = set((request.scope or "").split())
    possible = allowed_to_user(requested, client.scopes, scopes_of_user(idp, account.id))
    left_out = explain_left_out(idp, client, request.scope, possible)
    preview = Preview(refused, [], PreviewedScopes([] if refused else scopes or [], left_out), [])
    preview.obstacles = [obstacle] if (obstacle := login_obstacle(idp, caller, account)) else []
    if refused or scopes is None:
        return preview
    consent = scopes_to_consent(idp, client, account, asked) or []
    preview.consent = consent if lacks_consent(idp, client, account, asked) else []
    ms, now, agreed = issuing_ms(idp, client.row, account), idp.now(), " ".join(consent)
    granted = Granted(" ".join(scopes), "code", account, amr, now)
    family = Family(
        random_handle()[:22], account.id, client.client_id, granted.scope, " ".join(amr), now, "", ms, now, None,
        claims=asked.claims,
    )
    claims = draft_token(idp, client, granted, ms)[0] | person_claims(idp, client, granted, family.sid)
    preview.access_token = preview_token(idp, access_token_key(idp, client), AT_JWT, fit_claims(claims))
    if OPENID in scopes:
        in_id_token = id_token_claims(idp, client, granted, family, "", agreed)
        preview.id_token = preview_token(idp, id_token_key(idp, client), JWT, in_id_token)
        preview.userinfo = userinfo_claims(idp, client, family, account, preview.access_token.claims, agreed)
    return preview


def preview_tokens(idp: Idp, caller: Caller, id_or_client_id: str, request: PreviewTokens) -> Preview:
    """Return the tokens that a client would get for a user, or for itself, as the functions that issue make them.

    Nothing is signed, so nothing of it is a token, and nothing is stored but the row of the audit log.
    Raises not_found, or invalid_request for a malformed claims parameter.
    """
    client = get_client(idp, id_or_client_id)
    if request.user_id:
        account = get_user(idp, request.user_id)
        # Nobody's device: a lockout is shown as a stranger meets it.
        preview = preview_user(idp, Caller(caller.peer), client, account, request)
    else:
        preview = preview_machine(idp, client, request)
    if not client.row.is_active:
        preview.obstacles.append("the client is inactive")
    audit(idp, caller, "tokens_previewed", client.client_id, f"user_id={account.id}" if request.user_id else "")
    return preview


# == HTTP ======================================================================
# Params, guards, pages, Answer, cookies and App: the only section that touches bottle.request.


BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Page(msgspec.Struct):
    """A response whose body is encoded already. `cache` is in seconds; 0 forbids storing."""

    content: bytes
    content_type: str = "application/json"
    cache: int = 0
    etag: str = ""
    status: int = 200
    headers: list = []
    policy: str = ""  # Content-Security-Policy; empty for that of BASE_HEADERS
    cache_control: str = ""  # Cache-Control, instead of that of `cache`


class Redirect(msgspec.Struct):
    """A redirect that is followed with GET, whatever the method of the request was. RFC 9110 §15.4.4."""

    location: str
    cookies: list = []
    status: int = 303


class Reply(msgspec.Struct):
    """A JSON body with additional headers and a status."""

    body: object
    headers: list = []
    status: int = 200


def decode_component(raw: bytes) -> str:
    """Decode one name or value of a form. WHATWG URL §5.1, but malformed input is refused."""
    if b"+" in raw:
        raw = raw.replace(b"+", b" ")
    if b"%" in raw:
        if BAD_PERCENT.search(raw):
            raise Problem("invalid_request", log="broken percent-encoding")
        raw = unquote_to_bytes(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Problem("invalid_request", log="not UTF-8") from None
    if "\0" in text:
        raise Problem("invalid_request", log="NUL in a parameter")
    return text


QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def media_preference(accept: str, media: str) -> tuple[float, int]:
    """Return the quality that an Accept field gives to a media type, and how exactly it names the type.

    The most exact range decides: 3 is the type itself, 2 its family, 1 is */*, 0 is no range. RFC 9110 §12.5.1
    """
    exactness = {media: 3, media.partition("/")[0] + "/*": 2, "*/*": 1}
    found = (0, 0.0)
    for part in accept.lower().split(","):
        name, *parameters = [piece.strip() for piece in part.split(";")]
        quality = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        if name in exactness and QUALITY.fullmatch(quality):
            found = max(found, (exactness[name], float(quality)))
    return found[1], found[0]


def prefers_page(environ) -> bool:
    """Return whether Accept prefers HTML to JSON."""
    accept = environ.get("HTTP_ACCEPT", "")
    return media_preference(accept, "text/html") > media_preference(accept, JSON)


def require_browser(params):
    """Raise not_found, as for an unknown route, unless Accept prefers HTML to JSON."""
    if not prefers_page(params.environ):
        raise Problem("not_found", headers=[("X-Not-Found", "route")])


def is_navigation(environ) -> bool:
    """Return whether a browser shows the answer as a page, and no script reads it.

    Browsers say so only to hosts they trust, which those by plain http are not, but for loopback. Fetch Metadata §2.3
    """
    return prefers_page(environ) and environ.get("HTTP_SEC_FETCH_MODE", "navigate") == "navigate"


def parse_form(body: bytes) -> list[tuple[str, str]]:
    """Return the parameters of an application/x-www-form-urlencoded body or query, in their order.

    Raises invalid_request for invalid UTF-8, broken percent-encoding and NUL, which another parser might read
    differently. Repeated parameters are for the reader to judge: a client may send what we do not know, also
    repeatedly (`resource`, RFC 8707 §2).
    """
    if not body:
        return []
    pairs = body.split(b"&")
    if len(pairs) > 64:
        raise Problem("invalid_request", log="too many parameters")
    parts = [pair.partition(b"=") for pair in pairs if pair]
    return [(decode_component(name), decode_component(value)) for name, _, value in parts]


def members_of(declared) -> dict:
    """Return {lower-case name: name} for the members of a Struct, or of all Structs in a union."""
    parts = getattr(declared, "__args__", (declared,))
    structs = [part for part in parts if isinstance(part, type) and issubclass(part, msgspec.Struct)]
    fields = [field for struct_type in structs for field in msgspec.structs.fields(struct_type)]
    return {field.encode_name.lower(): field.encode_name for field in fields}


def match_members(pairs, declared) -> dict:
    """Return the declared members among (name, value) pairs. Raises invalid_request if one is repeated."""
    names, found = members_of(declared), {}
    for key, value in pairs:
        name = names.get(key.lower())
        if name and name in found:
            reject(**{name: "is there twice"})
        if name:
            found[name] = value
    return found


def convert(found, declared, strict=True):
    """Convert decoded data to the declared type. Member names ignore case; unknown members are ignored.

    Raises invalid_request naming the bad member. With strict=False, text is accepted for numbers and booleans.
    """
    if isinstance(found, dict):
        found = match_members(found.items(), declared)
    try:
        return msgspec.convert(found, declared, strict=strict)
    except msgspec.ValidationError as error:
        sentence, _, where = str(error).partition(" - at `$.")
        member = re.search(r"required field `(\w+)`", sentence)
        name = re.split(r"[`.\[]", where)[0] or (member.group(1) if member else "body")
        errors = {name: "is required" if member else sentence.replace("`", "")}
        raise Problem("invalid_request", errors=errors) from None


def note_repeated(repeated: list[str], pairs: list[tuple[str, Any]]):
    """Note the names that stand more than once in a JSON object."""
    counts = collections.Counter(name for name, _ in pairs)
    repeated += [name for name, count in counts.items() if count > 1]


def decode_body(body: bytes, declared):
    """Decode a JSON body. Raises invalid_request, also for a member that is repeated: which of the two another program
    sees is not defined. RFC 8259 §4.
    """
    repeated: list[str] = []
    try:
        found = msgspec.json.decode(body)
        json.loads(body, object_pairs_hook=functools.partial(note_repeated, repeated))
    except (ValueError, RecursionError):  # of msgspec, of json, of what is not UTF-8
        raise Problem("invalid_request", log="not JSON") from None
    if repeated:
        reject(**{members_of(declared).get(repeated[0].lower(), "body"): "is there twice"})
    return convert(found, declared)


def decode_form(pairs: list[tuple[str, str]], declared):
    """Convert the parameters of a form or query to the declared Struct. Raises invalid_request."""
    return convert(match_members(pairs, declared), declared, strict=False)


QUERY_METHODS = ("GET", "HEAD", "DELETE")  # whose parameters stand in the query


class Params:
    """The parameters of a request, parsed once: the form of a POST or the query of a GET, never both.

    `pairs` holds all of them as they came. `values` holds those that get() returns: a parameter without a value counts
    as omitted, and `repeated` names those sent more than once, which are refused if they are read. RFC 6749 §3.1, §3.2.

    They are parsed when the guard reads one, else after it: whoever may not call the route hears 401 or 403, whatever
    the request holds.
    """

    __slots__ = (
        "environ", "path", "pairs", "values", "repeated", "is_parsed", "body", "query", "caller", "route", "session",
        "console",
    )

    def __init__(self, environ, path, route):
        self.environ, self.path, self.route, self.body, self.query = environ, path, route, None, None
        self.session: Any = UNSET  # what current_session() found
        self.console: AdminSession | None = None  # by_admin() sets it, unless the caller has an access token
        peer = environ.get("microauthd.peer") or environ.get("REMOTE_ADDR", "127.0.0.1")
        # The Unix socket alone proves who is at the machine: a proxy on it has a loopback address too. One that speaks
        # for others on the socket shows that by its header fields.
        self.caller = Caller(
            peer, escape(environ.get("HTTP_USER_AGENT", "")), environ.get("microauthd.request_id", ""),
            environ.get("microauthd.uid") is not None and not environ.get("microauthd.proxied"),
        )
        self.pairs: list[tuple[str, str]] = []
        self.values: dict[str, str] = {}
        self.repeated: set[str] = set()
        self.is_parsed = False

    def media(self) -> str:
        """Return the media type of the body, without its parameters."""
        return self.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()

    def read_body(self) -> bytes:
        return self.environ["wsgi.input"].read(int(self.environ.get("CONTENT_LENGTH") or 0))

    def query_pairs(self) -> list[tuple[str, str]]:
        return parse_form(self.environ.get("QUERY_STRING", "").encode("latin-1"))

    def parse(self):
        """Parse the query of a GET, or the form of a POST whose route takes one. Raises invalid_request."""
        self.is_parsed = True
        if self.environ["REQUEST_METHOD"] in QUERY_METHODS:
            self.pairs = self.query_pairs()
        elif self.route.form is not None and self.media() == FORM:
            self.pairs = parse_form(self.read_body())
        for name, value in self.pairs:
            if value and name in self.values:
                self.repeated.add(name)
            elif value:
                self.values[name] = value
        for name in self.repeated:
            del self.values[name]

    def decode(self):
        """Parse what the guard has not read, and decode body and query into the types that the route declares.

        Runs after the guard, so that the errors do not describe our objects to an unauthorized caller.
        """
        route = self.route
        if not self.is_parsed:
            self.parse()
        if route.query is not None:
            in_query = self.environ["REQUEST_METHOD"] in QUERY_METHODS
            self.query = decode_form(self.pairs if in_query else self.query_pairs(), route.query)
        if route.takes is not None:
            self.body = self.decode_body()
        elif route.form is not None and self.environ["REQUEST_METHOD"] == "POST" and self.media() != FORM:
            # A BearerForm is optional: the token may be in the header, and then any other body is ignored.
            is_needed = not issubclass(route.form, BearerForm)
            if is_needed and self.read_body():
                raise Problem("invalid_request", log="not a form")

    def decode_body(self):
        """Return the body as the type that the route takes. Raises unsupported_media_type or invalid_request."""
        route, media, body = self.route, self.media(), self.read_body()
        if not body and may_be_empty(route.takes):
            return convert({}, route.takes)
        if media not in route.media:
            raise Problem("unsupported_media_type")
        return decode_body(body, route.takes) if media == JSON else decode_form(parse_form(body), route.takes)

    def get(self, name: str) -> str | None:
        """Return a parameter, or None if it is missing or empty. Raises invalid_request if it is repeated."""
        if not self.is_parsed:
            self.parse()
        if name in self.repeated:
            raise Problem("invalid_request", log=f"{name} is repeated")
        return self.values.get(name)

    def cookie(self, name: str) -> str | None:
        """Return a cookie, or None if it is missing or sent twice: then one of the two is not ours. RFC 6265 §5.4."""
        pairs = [pair.strip().partition("=") for pair in self.environ.get("HTTP_COOKIE", "").split(";")]
        found = [value for key, _, value in pairs if key == name]
        return found[0] if len(found) == 1 else None

    def need(self, name: str) -> str:
        """Return a parameter. Raises invalid_request if it is missing, empty or repeated."""
        value = self.get(name)
        if not value:
            raise Problem("invalid_request", log=f"no {name}")
        return value


# -- guards: who is calling --


def anyone(idp, params):
    """The guard of a public route, whose handler gets no caller."""


def decode_credential(raw: str) -> str:
    """Form-decode one part of Basic credentials, or return it as it is if it was not encoded."""
    try:
        return decode_component(raw.encode())
    except Problem:
        return raw


def read_basic(header: str) -> list[tuple[str, str]]:
    """Return the pairs (client_id, secret) that Basic credentials may mean. Raises invalid_client.

    The first is form-decoded, as RFC 6749 §2.3.1 demands. The second, if it differs, is the raw pair of the many
    clients that do not encode: they send `+` and `%` as they are.
    """
    try:
        client_id, colon, secret = base64.b64decode(header[6:].strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise Problem("invalid_client", log="malformed Basic credentials") from None
    if not colon or not client_id:
        raise Problem("invalid_client", log="an empty client_id" if colon else "Basic credentials without a colon")
    return list(dict.fromkeys([(decode_credential(client_id), decode_credential(secret)), (client_id, secret)]))


def read_client_credentials(params) -> list[tuple[str, str | None]]:
    """Return the one or two (client_id, secret or None) that a request may mean, the likelier one first.

    Raises invalid_request for a request that uses two methods. RFC 6749 §2.3.
    """
    header = params.environ.get("HTTP_AUTHORIZATION", "")
    form_id, form_secret = params.get("client_id"), params.get("client_secret")
    if header[:6].lower() == "basic ":
        pairs = [pair for pair in read_basic(header) if form_id in (None, pair[0])]
        if form_secret is not None or not pairs:
            raise Problem("invalid_request", log="two ways of client authentication")
        return [(client_id, secret or None) for client_id, secret in pairs]
    if not form_id:
        is_form = params.media() in ("", FORM)
        raise Problem("invalid_client", log="no client_id" if is_form else "no client_id, and the body is not a form")
    return [(form_id, form_secret or None)]


def by_client(idp, params) -> Client:
    """A guard that authenticates the client; a public client only sends its client_id."""
    (client_id, secret), *raw = read_client_credentials(params)
    return authenticate_client(idp, params.caller, client_id, secret, *raw)


def by_client_or_token(read_token):
    """Return a guard like by_client; a request that names no client may be that of the public client of its token.

    A public client cannot authenticate, so its `client_id` proves nothing that the token does not. RFC 6749 §6 and
    RFC 7009 §2.1 demand that the token was issued to the client. A token of a confidential client, and one that
    nobody knows, are answered alike: invalid_client.
    """

    def guard(idp, params) -> Client:
        is_basic = params.environ.get("HTTP_AUTHORIZATION", "")[:6].lower() == "basic "
        is_named = is_basic or params.get("client_id") or params.get("client_secret")
        token = None if is_named else read_token(params)
        return (find_public_client(idp, token) if token else None) or by_client(idp, params)

    return guard


def by_confidential_client(idp, params) -> Client:
    """A guard that authenticates a confidential client and refuses a public one."""
    client = by_client(idp, params)
    if client.row.client_type != CONFIDENTIAL:
        raise Problem("invalid_client", log="a public client cannot authenticate")
    return client


def read_bearer(params) -> str:
    """Return the access token of a request, from its header or the form of a POST. RFC 6750 §2."""
    header = params.environ.get("HTTP_AUTHORIZATION", "")
    form = params.get("access_token") if params.environ["REQUEST_METHOD"] == "POST" else None
    if header[:7].lower() == "bearer ":
        if form is not None:
            raise Problem("invalid_request", log="two access tokens")
        return header[7:].strip()
    if form:
        return form
    # A challenge carries no error code if no token was sent. RFC 6750 §3.1.
    raise Problem("invalid_token", log="no access token", headers=[("WWW-Authenticate", 'Bearer realm="microauthd"')])


def read_claims(idp, ring, issuer, params) -> dict:
    """Return the claims of the request's access token, if valid, and make its subject the actor of params.caller."""
    try:
        claims = verify_access_token(idp, ring, issuer, read_bearer(params))
    except RevokedToken as revoked:
        audit_replay(idp, params.caller, revoked)
        raise
    params.caller = params.caller.acting_as(claims["sub"])
    return claims


def insufficient_scope(scope) -> Problem:
    return Problem(
        "insufficient_scope",
        headers=[("WWW-Authenticate", f'Bearer realm="microauthd", error="insufficient_scope", scope="{scope}"')],
    )


def by_bearer(scope="", user=False):
    """Return a guard that demands an access token of AUTH: with `scope` if given, of a user if `user` is set."""

    def guard(idp, params) -> dict:
        claims = read_claims(idp, idp.auth_ring, idp.options.auth_issuer, params)
        if scope and scope not in claims.get("scope", "").split():
            raise insufficient_scope(scope)
        if user and claims["sub"] == claims["client_id"]:
            raise Problem("access_denied", log="a machine token where a user's is needed")
        return claims

    return guard


def by_bearer_or_form():
    """Return a guard that demands a user's access token, or passes None for a form, which the handler checks."""
    bearer = by_bearer(user=True)

    def guard(idp, params):
        has_token = "HTTP_AUTHORIZATION" in params.environ or params.get("access_token") is not None
        return None if params.get("form") is not None and not has_token else bearer(idp, params)

    return guard


def client_of_token(idp: Idp, claims: dict) -> Client:
    """Return the client of a valid access token. Raises invalid_token if it has just been deleted or deactivated."""
    client = find_client(idp, claims["client_id"])
    if client is None:
        raise Problem("invalid_token", log="its client is gone or inactive")
    return client


def reach_of(idp: Idp, claims: dict) -> str | None:
    """Return the client to whose logins a user's access token is limited; None for a first party, which sees all.

    A third party's business with a user are the logins that the user began there.
    """
    return None if client_of_token(idp, claims).row.is_first_party else claims["client_id"]


def current_scopes(idp, claims) -> frozenset:
    """Return the scopes that the subject of a token could be granted now, whatever the token carries."""
    client = find_client(idp, claims["client_id"])
    scopes = client.scopes if client else frozenset()
    return scopes if claims["sub"] == claims["client_id"] else scopes & scopes_of_user(idp, claims["sub"])


def usable_scopes(idp: Idp, claims: dict) -> set[str]:
    """Return the scopes that a token carries, seeded ones by name or id, and that its subject still has."""
    names = {id: name for id, name, _ in SEEDED_SCOPES}
    return {names.get(scope, scope) for scope in claims.get("scope", "").split()} & current_scopes(idp, claims)


def delegated_rights(idp: Idp, claims: dict) -> set[str]:
    """Return the rights of whoever acts by a delegated scope: the token's own, and its user's privileged roles.

    A token with few of its user's scopes must not reach a user who has more of them. MadAdmin never counts: an
    administrator acts as such at ADMIN.
    """
    roles = {role.id for role in idp.store.list_roles_of(claims["sub"]) if role.is_privileged} - {MAD_ADMIN_ROLE_ID}
    return administrative(usable_scopes(idp, claims)) | roles


def by_scope(name):
    """Return a guard that demands a seeded scope: in the token, by name or id, and still granted to its subject."""

    def guard(idp, params) -> dict:
        claims = read_claims(idp, idp.auth_ring, idp.options.auth_issuer, params)
        if name not in usable_scopes(idp, claims):
            raise insufficient_scope(name)
        return claims

    vars(guard)["scope"] = name
    return guard


# -- the console: a cookie with a form token --

CONSOLE_COOKIE = "mad-admin"


def form_token(key: bytes, purpose: str) -> str:
    """Return a form's anti-CSRF token."""
    return b64url(hmac.digest(key, purpose.encode(), "sha256")[:18])


def host_without_port(authority: str) -> str:
    """Return the host of an authority, in lower case, an IPv6 address in its brackets. RFC 3986 §3.2.2."""
    host = authority[: authority.rindex(":")] if re.search(r":[0-9]*$", authority) else authority
    return host.lower().rstrip(".")


def is_https(environ) -> bool:
    """Return whether the browser came by https, as far as one can know: a proxy that ends TLS may be unknown to us."""
    return environ["wsgi.url_scheme"] == "https" or environ.get("HTTP_ORIGIN", "").lower().startswith("https://")


def make_console_cookie(environ, value: str, max_age: int) -> str:
    """Return the Set-Cookie value of a session at the console; under https no other host can set it.

    SameSite is Strict: the document needs no cookie, and what it fetches comes from its own site. RFC 6265bis §4.1.3.2
    """
    prefix, secure = ("__Host-", "; Secure") if is_https(environ) else ("", "")
    return f"{prefix}{CONSOLE_COOKIE}={value}; Path=/; HttpOnly; SameSite=Strict{secure}; Max-Age={max_age}"


def console_handle(params) -> str | None:
    """Return the cookie of the console: that which only https sets, else the other one where TLS is not ours."""
    handle = params.cookie("__Host-" + CONSOLE_COOKIE)
    return handle if handle or params.environ["wsgi.url_scheme"] == "https" else params.cookie(CONSOLE_COOKIE)


def own_origins(options: Options, environ) -> set[str]:
    """Return the origins, in lower case, that a page of ADMIN may have."""
    # A proxy that ends TLS need not be known to us, nor send on the Host that the browser sent.
    host, domain = environ.get("HTTP_HOST", ""), options.admin_domain
    own = {f"{environ['wsgi.url_scheme']}://{host}", f"https://{host}", options.admin_issuer}
    if not is_loopback_host(host_without_port(domain)):  # at https://localhost another server of the machine may be
        own.add(f"https://{domain}")
    return {name.lower() for name in own}


def check_own_page(idp: Idp, params):
    """Raise access_denied unless a page of ADMIN itself made the request. Fetch Metadata §2.1, Fetch Standard §3.2.

    Browsers send no Sec-Fetch-Site to an http URL of another machine; there, what changes something names its Origin.
    """
    environ = params.environ
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site is not None:
        is_own = site.lower() == "same-origin"
    elif origin is not None:
        is_own = origin.lower() in own_origins(idp.options, environ)
    else:
        is_own = environ["REQUEST_METHOD"] in ("GET", "HEAD")
    if not is_own:
        raise Problem("access_denied", log=f"no page of ours: {escape(f'{site} {origin}'[:200])}")


def console_form_token(idp: Idp, handle: str) -> str:
    """Return the form token of a session at the console: whoever has its cookie alone cannot make it."""
    return form_token(idp.seal.form_key, f"console {sha256(handle)}")


def by_console(idp: Idp, params) -> tuple[AdminSession, Account]:
    """A guard that demands a session at the console, from wherever it comes; its user becomes the actor.

    The cookie alone opens nothing, because other ports of this host receive it and can make a browser send it: a
    request has to carry the session's form token too, which the answer to the sign-in gave. Raises access_denied, or
    invalid_token if the session is over.
    """
    check_own_page(idp, params)
    handle = console_handle(params)
    if handle:
        expected, sent = console_form_token(idp, handle), params.environ.get("HTTP_X_FORM_TOKEN", "")
        if not hmac.compare_digest(expected.encode(), sent.encode("utf-8", "replace")):
            raise Problem("access_denied", log="a request of the console without its form token, or of another browser")
    is_passive = params.environ.get("HTTP_X_PASSIVE") == "1"
    found = find_console(idp, params.caller, handle, is_passive)
    if found is None:
        raise Problem("invalid_token", log="no session at the console, or it is over")
    params.caller = params.caller.acting_as(found[1].id)
    return found


def by_admin(idp: Idp, params) -> dict:
    """A guard that demands a user who is still an administrator: by an ADMIN token, or by a session at the console.

    A request without a token has the second if it carries X-Form-Token. Returns the claims of the token; of a session
    `sub` and `sid`. Raises reauthentication_required if a session is used from another browser or another network than
    that of its last proof.
    """
    if "HTTP_AUTHORIZATION" not in params.environ and "HTTP_X_FORM_TOKEN" in params.environ:
        console, account = by_console(idp, params)
        if not is_at_its_place(params.caller, console):
            log = f"a session at the console is used where it was not proven: that was at {console.ip_address}"
            raise Problem("reauthentication_required", log=log)
        params.console, id_sha256 = console, console.id_sha256
        params.caller = msgspec.structs.replace(params.caller, console=id_sha256)
        return {"sub": account.id, "sid": id_sha256}
    claims = read_claims(idp, idp.admin_ring, idp.options.admin_issuer, params)
    if claims["mad"] != "admin" or not is_admin(idp, claims["sub"]):
        raise Problem("invalid_token", log="not an administrator any more")
    return claims


def is_scraper(idp: Idp, environ) -> bool:
    """Return whether `metrics-allow` names who has connected. What a proxy sends on may come from anybody."""
    if environ.get("microauthd.proxied") or "microauthd.uid" in environ:
        return False
    try:
        ip = ipaddress.ip_address(environ.get("microauthd.socket", ""))
    except ValueError:
        return False
    return any(ip in network for network in idp.options.metrics_allow)


READ_METRICS = by_scope("admin:read_metrics")


def by_scraper(idp, params):
    """A guard of the metrics: an address of `metrics-allow`, or a token with the scope for it."""
    if not is_scraper(idp, params.environ):
        READ_METRICS(idp, params)


vars(by_scraper)["scope"] = vars(READ_METRICS)["scope"]


def by_scraper_or_admin(idp, params):
    """A guard of the metrics on ADMIN: by_scraper(), or an administrator."""
    try:
        by_scraper(idp, params)
    except Problem as problem:
        if problem.code != "invalid_token":
            raise
        by_admin(idp, params)


vars(by_scraper_or_admin)["scope"] = vars(READ_METRICS)["scope"]


# -- what asks for the password again --
# Functions (idp, params) for `proof` of a route. They bind sessions at the console: an ADMIN token has a short life.


def always(idp: Idp, params) -> bool:
    return True


def of_administrator(idp: Idp, params) -> bool:
    """Return whether the user of the path is an administrator."""
    return is_admin(idp, get_user(idp, params.path["id"]).id)


def of_administrators(idp: Idp, params) -> bool:
    """Return whether the roles of an administrator change, or somebody becomes one."""
    body = params.body
    user_id = params.path.get("id") or body.user_id
    roles = [role.id for role in getattr(body, "roles", body)] if "id" in params.path else [body.role_id]
    named = {get_role(idp, role).id for role in roles if role.strip()}
    return MAD_ADMIN_ROLE_ID in named or is_admin(idp, get_user(idp, user_id).id)


def of_named_administrator(idp: Idp, params) -> bool:
    """Return whether the body names an administrator."""
    return bool(params.body.user_id) and is_admin(idp, get_user(idp, params.body.user_id).id)


FETCHES_MAX = 100  # sessions at the console of which is known what they fetch


def of_piece_out_of_turn(idp: Idp, params) -> bool:
    """Return whether a piece of a backup does not follow what the session fetched last, nor is that once more.

    A fetch that began with a proof goes on without another, however long it takes; nothing else is read without one.
    """
    name, *in_turn = idp.fetches.get(params.console.id_sha256, ("",))
    return params.path["name"] != name or params.query.offset not in in_turn or params.query.offset == 0


def note_fetch(idp: Idp, console: AdminSession, name: str, offset: int, following: int):
    """Keep where the piece of a backup begins that a session has fetched, and the next: see of_piece_out_of_turn().

    It is kept by the process that serves ADMIN, which is one. After its end the password is asked for again.
    """
    idp.fetches.pop(console.id_sha256, None)
    idp.fetches[console.id_sha256] = (name, offset, following)
    for id_sha256 in list(idp.fetches)[:-FETCHES_MAX]:
        idp.fetches.pop(id_sha256, None)


def require_proof(idp: Idp, params):
    """Raise reauthentication_required if a session at the console does what needs a fresh proof, and has none."""
    proof, console = params.route.proof, params.console
    if console and proof and not is_proof_fresh(idp, console) and proof(idp, params):
        raise Problem("reauthentication_required", log="the last proof is too old", audited=True)


# -- entity tags and lists --


def etag(shown) -> str:
    """Return the entity tag of an object's representation. RFC 9110 §8.8.3."""
    return f'"{hashlib.sha256(ENCODE(shown)).hexdigest()[:32]}"'


@contextlib.contextmanager
def if_match(idp, params, show):
    """Open a write transaction if If-Match names the current version of what `show` returns. RFC 9110 §13.1.1.

    Raises precondition_failed if another request has changed it. Without the header nothing is compared.
    """
    with idp.store.transaction():
        expected = params.environ.get("HTTP_IF_MATCH")
        if expected is not None:
            shown = etag(show())
            if expected.strip() != "*" and shown not in [tag.strip() for tag in expected.split(",")]:
                raise Problem("precondition_failed")
        yield


def paged_reply(params, rows, total, last="", following: dict | None = None) -> Reply:
    """Return a page of a list, with the total in X-Total-Count, and in Link the pages around it. RFC 8288 §3.

    Long lists are not counted to their end: X-Total-Count-Relation says that the total is a lower bound. `last` says
    where the page ends, if the id of its last row does not. `following` is where a list goes on of which one request
    searches a part only: parameters, none at its end.
    """
    headers, query = [("X-Total-Count", str(total))], params.query
    if isinstance(total, AtLeast):
        headers.append(("X-Total-Count-Relation", "gte"))
    kept = [(name, value) for name, value in params.pairs if name.lower() not in ("limit", "offset", "after", "before")]
    kept.append(("limit", query.limit))
    # A page that begins behind an id costs the same however deep it lies. Rows that are sorted by another member have
    # offsets, and so has a caller who began with one.
    is_by_id = isinstance(query, (PagedById, ListBrowserSessions)) or (
        isinstance(query, ListSessions) and query.sort in ("id", "-id")
    )
    by_id = is_by_id and not query.offset
    targets: dict[str, tuple] = {}
    if following is None:
        following = {}
        if by_id and len(rows) == query.limit and (query.after is not None or len(rows) < total):
            following = {"after": last or rows[-1].id}
        elif not by_id and rows and query.offset + len(rows) < total:
            following = {"offset": query.offset + len(rows)}
    if following:
        targets["next"] = tuple(following.items())
    if query.offset:
        targets |= {"prev": (("offset", max(0, query.offset - query.limit)),), "first": (("offset", 0),)}
    elif (by_id and query.after is not None) or getattr(query, "before", None) is not None:
        targets["first"] = ()
    links = [f'<?{urlencode([*kept, *target])}>; rel="{rel}"' for rel, target in targets.items()]
    return Reply(rows, [*headers, ("Link", ", ".join(links))] if links else headers)


# -- HTML pages --


def words_of_time(idp: Idp, text: dict) -> dict:
    """Return the functions by which a template says moments, in Unix seconds, and browsers to people."""
    return {
        "ago": lambda at: describe_age(idp.now() - at, at, text),
        "browser": lambda user_agent: describe_browser(user_agent, text),
    }


def show_page(
    idp: Idp, environ, name: str, *, status=200, ui_locales="", target="", cookies=(), script="", **variables
) -> Page:
    """Return an HTML page. `target` is the URI outside this server to which its form may redirect."""
    language = idp.pages.choose_language(environ.get("HTTP_ACCEPT_LANGUAGE", ""), ui_locales)
    base, brand = idp.options.auth_issuer, idp.brand
    context = {
        "text": idp.pages.texts[language], "language": language, "base": base,
        "style": f"{base}/pages/{idp.pages.style_name(brand.color)}",
        "script": f"{base}/pages/{script}" if script else "",
        "brand": brand.name, "logo": f"{base}/pages/{brand.logo}" if brand.logo else "", "error": "",
    } | words_of_time(idp, idp.pages.texts[language]) | variables
    # Chromium applies form-action to every redirect that follows a form. A callback may redirect to another host of
    # its application (an authenticating proxy, a separate backend), so only the scheme is known here.
    target_scheme = f" {urlsplit(target).scheme}:" if target else ""
    policy = (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; "
        f"form-action 'self'{target_scheme}" + ("; script-src 'self'" if script else "")
    )
    return Page(
        idp.pages.render(name, **context), "text/html; charset=utf-8", status=status,
        headers=[("Set-Cookie", cookie) for cookie in cookies], policy=policy,
    )


# Of the picture of the brand, when its address is opened by itself: an SVG may have styles of its own, and no script of
# it runs. HTML §7.6 (sandboxing)
PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"


def show_logo(idp: Idp, name: str, cache: int) -> Page:
    """Return the picture of the brand, if this is its file name. Raises not_found."""
    content, media_type = read_logo(idp, name)
    return Page(content, media_type, policy=PICTURE_POLICY, cache=cache)


def show_problem(idp: Idp, problem: Problem, environ, why="") -> Page:
    """Return the error page. It never redirects and never repeats input: the log has that, under the request's id.

    `why` chooses the sentence, if it is not the code of the Problem.
    """
    page = show_page(
        idp, environ, "error", status=problem.status, code=problem.code, why=why or problem.code,
        request_id=environ.get("microauthd.request_id", ""),
    )
    page.headers.extend(header for header in problem.headers if header[0] in ("Retry-After", "X-Not-Found"))
    return page


# -- responses --

BASE_HEADERS = security_headers()
# The policy of the bundled examples; an operator's own files have `public-csp`. Pages may frame each other, for silent
# renewal.
PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"


def render_problem(problem: Problem, oauth: bool, environ) -> Reply:
    """Render a Problem as an OAuth error or an Err, which names the request. A 401 gets its challenge.

    RFC 9110 §15.5.2.
    """
    headers = list(problem.headers)
    if problem.status == 401 and not any(name == "WWW-Authenticate" for name, _ in headers):
        challenge = (
            'Basic realm="microauthd"'
            if problem.code == "invalid_client"
            else f'Bearer realm="microauthd", error="{problem.code}", error_description="{problem.message}"'
        )
        headers.append(("WWW-Authenticate", challenge))
    named = {"request_id": environ["microauthd.request_id"]} if environ.get("microauthd.request_id") else {}
    return Reply(problem.as_oauth() if oauth else problem.as_err() | named, headers, problem.status)


STATUS = {code: f"{code} {phrase}" for code, phrase in bottle.HTTP_CODES.items()}
NO_STORE = ("Cache-Control", "no-store")
JSON_HEADERS = (*BASE_HEADERS, ("Content-Type", "application/json"), NO_STORE, ("Pragma", "no-cache"))


LIKE_A_SECRET = re.compile(r"[A-Za-z0-9_-]{40,}")  # a handle (43 characters) or a part of a token; a UUID has 36


def describe_path(path: str, route: Route | None = None) -> str:
    """Return what the log says of the path of a request: without the secrets in it.

    A route that takes a secret in its path is named by its template. Elsewhere what is like a handle is left out,
    because somebody may have mistyped the path before it, or have put a token where its identifier belongs.
    """
    if route is not None and route.secret_path:
        return route.paths[0]
    return LIKE_A_SECRET.sub("<secret>", path)[:100].replace(SLASH, "%2F")


def audit_refused_privilege(idp: Idp, params, problem: Problem):
    """Audit that an administrator, or whoever acts by a delegated scope, was refused what a route does.

    A 401 is audited if the token proved who its subject is, as that of somebody who is no administrator any more.
    """
    is_privileged = params.route.guard is by_admin or "scope" in vars(params.route.guard)
    is_refused = problem.status in (403, 409) or (problem.status == 401 and params.caller.actor != LOCAL.actor)
    if is_privileged and is_refused and not problem.audited:
        named = " ".join(escape(value)[:100] for value in params.path.values())
        target = f"{params.environ['REQUEST_METHOD']} {params.route.paths[0]}"
        secondary = ";".join(part for part in (f"error={problem.code}", named) if part)
        audit_refusal(idp, params.caller, "privileged_request_refused", target, secondary, proven=True)


def run_to_end(steps: Generator):
    """Return the value of a generator, which waits for nobody."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def finish_durably(handler: Generator):
    """Return the result of a handler that is a generator, or raise what it raises.

    Waits where the handler does, and when its change is made until the commit: a refusal may rest on what others have
    written in it. A handler that yields once more goes on after the commit.
    """
    try:
        next(handler)
    except StopIteration as end:
        return end.value
    yield b""
    result, failure, has_ended = None, None, False
    try:
        next(handler)
    except StopIteration as end:
        result, has_ended = end.value, True
    except Exception as error:
        failure = error
    yield b""
    if failure:
        raise failure
    return result if has_ended else run_to_end(handler)


PUBLIC_PATH = "/<path:path>"  # of the route that serves public files


class Answer:
    """Runs the guard and the handler of a route and renders the result. Every response of a route is made here."""

    def __init__(self, idp):
        self.idp = idp

    def run(self, route, environ, path):
        """Return the result of the handler, or the rendered Problem that was raised: a generator.

        A handler may be a generator that yields before a durable change, which then shares its commit with those of
        others. This yields there, and again when the change is made: until the commit, or Unavailable is thrown.
        """
        params = Params(environ, path, route)
        try:
            caller = () if route.guard is anyone else (route.guard(self.idp, params),)
            params.decode()
            require_proof(self.idp, params)
            result = route.handler(self.idp, *caller, params)
            if isinstance(result, GeneratorType):
                result = yield from finish_durably(result)
            if route.versioned and environ["REQUEST_METHOD"] != "DELETE" and not isinstance(result, Msg):
                return Reply(result, [("ETag", etag(result))])
            return result if route.status == 200 else Reply(result, status=route.status)
        except (Problem, Unavailable) as error:
            problem = as_problem(error)
            self.log_refusal(environ, problem.code, problem.status, problem.log, route)
            audit_refused_privilege(self.idp, params, problem)
        except MemoryError as error:
            problem = Problem("temporarily_unavailable", retry_after=1)
            self.log_refusal(environ, problem.code, problem.status, f"no memory {error}".rstrip(), route)
        except Exception as error:
            problem = Problem("server_error")
            self.idp.log(
                "bug", "error", exc_info=error, path=route.paths[0], request_id=environ.get("microauthd.request_id", "")
            )
        if route.html:
            return show_problem(self.idp, problem, environ)
        if route.paths[0] == PUBLIC_PATH and problem.code == "not_found":
            return self.render_missing(environ, problem)
        return render_problem(problem, route.oauth, environ)

    def render_missing(self, environ, problem) -> Page | Reply:
        """Return the answer where no page is, or none for this method: the error page if a browser would show it."""
        if not (self.idp.options.enable_pkce and is_navigation(environ)):
            return render_problem(problem, False, environ)
        return show_problem(self.idp, problem, environ, "no_page" if problem.code == "not_found" else "")

    def log_refusal(self, environ, code, status, reason, route=None):
        self.idp.log(
            "refused", "error" if status >= 500 else "info", server=environ.get("microauthd.server", ""),
            peer=environ.get("microauthd.peer", ""), method=environ["REQUEST_METHOD"],
            path=describe_path(environ["PATH_INFO"], route),
            status=status, error=code, reason=reason, request_id=environ.get("microauthd.request_id", ""),
        )

    @staticmethod
    def render(result, environ):
        """Return the status, headers and body of a result."""
        status = 200
        headers: tuple[tuple[str, str], ...] = JSON_HEADERS
        if isinstance(result, Page):
            status, body = result.status, result.content
            headers = security_headers(result.policy) if result.policy else BASE_HEADERS
            cached = f"public, max-age={result.cache}" if result.cache else NO_STORE[1]
            headers += (("Cache-Control", result.cache_control or cached),)
            if result.etag:
                headers += (("ETag", result.etag),)
            if result.etag and environ.get("HTTP_IF_NONE_MATCH") == result.etag:
                status, body = 304, b""
            else:
                headers += (("Content-Type", result.content_type), *result.headers)
        elif isinstance(result, Redirect):
            status, body = result.status, b""
            headers = (
                *BASE_HEADERS, NO_STORE, ("Location", result.location),
                *(("Set-Cookie", cookie) for cookie in result.cookies),
            )
        elif isinstance(result, Reply):
            status, headers, body = result.status, JSON_HEADERS + tuple(result.headers), ENCODE(result.body)
        else:
            body = ENCODE(result)
        if environ.get("wsgi.url_scheme") == "https":
            headers += (HSTS,)
        return status, headers, body


def served_routes(idp: Idp, routes: Routes):
    """Yield each route that the options enable, with each of its paths."""
    issuer_path = urlsplit(idp.options.auth_issuer).path
    for route in routes.routes:
        if route.option and not getattr(idp.options, route.option):
            continue
        if route.unless and getattr(idp.options, route.unless):
            continue
        for path in route.paths:
            yield route, path
            if issuer_path and path == "/.well-known/oauth-authorization-server":
                yield route, path + issuer_path  # the issuer's path follows the well-known one. RFC 8414 §3.1


def log_origin(idp: Idp, environ, origin: str, known):
    """Log an origin that may not read a response, unless it is our own: a browser names it in every POST."""
    hosts = (environ.get("HTTP_HOST", ""), urlsplit(idp.options.auth_issuer).netloc)
    if origin.partition("://")[2] not in hosts:
        idp.log(
            "cors.refused", peer=environ.get("microauthd.peer", ""), method=environ["REQUEST_METHOD"],
            path=describe_path(environ["PATH_INFO"]),
            reason=f"an origin that no client has registered: {describe_unregistered(origin, known)}",
            request_id=environ.get("microauthd.request_id", ""),
        )


FIELD_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?: ?, ?[A-Za-z0-9!#$%&'*+.^_`|~-]+){0,31}")  # RFC 9110 §5.1


def allow_origin(idp: Idp, environ, methods="") -> tuple:
    """Return the CORS headers that let a registered origin read a response. Fetch Standard §3.3.

    `methods` are those of the path, for the answer to a preflight.
    """
    headers: tuple[tuple[str, str], ...] = (("Vary", "Origin"),)
    origin = environ.get("HTTP_ORIGIN")
    if not origin:
        return headers
    cache = idp.cache()
    try:
        if ("cors",) not in cache:
            cache[("cors",)] = idp.store.list_cors_origins()
        known = cache[("cors",)]
    except Unavailable as problem:  # only pages of other origins need the list
        idp.log("cors.unknown", "error", reason=problem.log)
        return headers
    if origin not in known:
        log_origin(idp, environ, origin, known)
        return headers
    headers += (
        ("Access-Control-Allow-Origin", origin),
        ("Access-Control-Expose-Headers", "WWW-Authenticate, Retry-After, X-Request-Id"),
        # Some clients always send credentials (keycloak-js). No route with `cors` reads a cookie.
        ("Access-Control-Allow-Credentials", "true"),
    )
    if methods:
        # Libraries and tracing add fields of their own (X-Okta-User-Agent-Extended, traceparent), ignored here:
        # a registered origin may send any. They are echoed, because "*" covers no Authorization. Fetch Standard §3.3.3
        asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        fields = asked if FIELD_NAMES.fullmatch(asked) else "Authorization, Content-Type"
        headers += (
            ("Access-Control-Allow-Methods", methods.replace(",", ", ")), ("Access-Control-Allow-Headers", fields),
            ("Access-Control-Max-Age", "600"),
        )
    return headers


# -- cookies and form tokens --


def cookie_name(idp: Idp, name: str) -> str:
    """Return the name of a cookie; under https no other host and no http page can set it. RFC 6265bis §4.1.3.2."""
    return ("__Host-" if idp.options.auth_issuer.startswith("https:") else "") + name


def make_cookie(idp: Idp, name: str, value: str, max_age: int | None = None) -> str:
    """Return a Set-Cookie value. SameSite is Lax, because a login begins with a link from another site."""
    secure = "; Secure" if idp.options.auth_issuer.startswith("https:") else ""
    return f"{cookie_name(idp, name)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}" + (
        f"; Max-Age={max_age}" if max_age is not None else ""
    )


SESSION_COOKIE, LOGIN_COOKIE, DEVICE_COOKIE = "mad-session", "mad-login", "mad-device"
HINT_COOKIE = "mad-hint-"  # and the first character of the handle, of which there are 64: other sites can set no more


def browser_caller(idp: Idp, params) -> Caller:
    """Return the caller with what its browser has from earlier logins."""
    device = params.cookie(cookie_name(idp, DEVICE_COOKIE)) or ""
    return msgspec.structs.replace(params.caller, device=device)


def cookies_after_login(idp: Idp, params, account: Account, handle: str) -> list[str]:
    """Return the cookies of a browser in which a session of this user has just begun."""
    device = sign_device(idp, browser_caller(idp, params), account)
    return [
        make_cookie(idp, SESSION_COOKIE, handle, idp.options.session_absolute_expiration),
        make_cookie(idp, DEVICE_COOKIE, device, DEVICE_TTL),
    ]


def session_handle(idp, params) -> str | None:
    return params.cookie(cookie_name(idp, SESSION_COOKIE))


def current_session(idp: Idp, params) -> tuple[BrowserSession, Account] | None:
    """Return the browser session of the request's cookie and its user, or None; look them up once a request."""
    if params.session is UNSET:
        params.session = find_browser_session(idp, session_handle(idp, params))
    return params.session


def login_binding(idp, params) -> str | None:
    return params.cookie(cookie_name(idp, LOGIN_COOKIE))


def session_form_token(handle: str | None) -> str:
    """Return the token of the forms of a browser session, keyed with its cookie; "" without one."""
    return form_token(handle.encode(), "session") if handle else ""


def login_form_token(idp: Idp, row: LoginTransaction, state="") -> str:
    """Return the token of the form for a state of a login: the one it is in, unless another is named.

    The box's own key makes it, because the login's secret may be renewed while the page waits in another tab. The
    login itself is found by that secret alone.
    """
    return form_token(idp.seal.form_key, f"{row.id} {state or row.state}")


def check_form(params, *expected: str):
    """Raise access_denied unless the form carries its token, or one of several."""
    given = (params.get("form") or "").encode()
    if not any(token and hmac.compare_digest(token.encode(), given) for token in expected):
        raise Problem("access_denied", log="a form without its token, or of another browser")


# -- the routes of a port --


def describe_port(idp: Idp, routes: Routes) -> dict:
    """Return the OpenAPI document of a port: exactly the routes that are served."""
    server = idp.options.auth_issuer if routes.name == "auth" else idp.options.admin_issuer
    return describe_api(routes.name, VERSION, server, served_routes(idp, routes), Err, OAuthError)


def find_public_file(path: str) -> tuple[str, str] | None:
    """Return the root of the public files and the path below it of the one that `path` names, or None.

    The root is public/ in the working directory, or the bundled examples if there is none. A folder, whose path ends
    with a slash, is its index.html.
    """
    path += "index.html" if path.endswith("/") or not path else ""
    root = os.path.realpath("public" if os.path.isdir("public") else PUBLIC)
    is_file = is_visible_below(root, path) and os.path.isfile(os.path.join(root, path.lstrip("/")))
    return (root, path) if is_file else None


class Router(bottle.Router):
    """Bottle's router with three differences.

    It compiles once, not after each of a hundred routes: that took a tenth of the start-up. The public files, whose
    route matches every path, come after all endpoints, so that a wrong method stays 405 and an unknown path 404. And a
    path without variables is one resource for every method, as in the OpenAPI document (OpenAPI 3.1 §4.8.8.1): a GET of
    /users/verify-password is 405 and not the user of that name.
    """

    public_target = None

    def __init__(self):
        super().__init__()
        self.methods: dict[str, set[str]] = {}  # of each path without variables

    def add(self, rule, method, target, name=None):
        if rule == PUBLIC_PATH:
            self.public_target = target
            return
        if "<" not in rule:
            self.methods.setdefault(rule, set()).add(method)
        super().add(rule, method, target, name)

    def allow(self, path: str) -> str:
        """Return the value of Allow for a path without variables. RFC 9110 §10.2.1."""
        return ",".join(sorted(self.methods[path]))

    def match(self, environ):
        """Return the target of a request and the variables of its path. Raises HTTPError 404 or 405."""
        method = "GET" if environ["REQUEST_METHOD"] == "HEAD" else environ["REQUEST_METHOD"]
        if method not in self.methods.get(environ["PATH_INFO"], (method,)):
            raise bottle.HTTPError(405, Allow=self.allow(environ["PATH_INFO"]))
        try:
            return super().match(environ)
        except bottle.HTTPError as error:
            path = environ["PATH_INFO"][1:]
            if error.status_code != 404 or self.public_target is None:
                raise
            if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
                return self.public_target, {"path": path}
            if find_public_file(path) or find_public_file(path + "/"):
                raise bottle.HTTPError(405, Allow="GET") from None
            raise

    def _compile(self, method):
        """Do nothing: compile_all() does it."""

    def compile_all(self):
        for method in self.dyna_routes:
            super()._compile(method)


SWAGGER = APPLIANCE / "swagger"
# Swagger UI sets styles from its script, which needs 'unsafe-inline' in style-src.
SWAGGER_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def swagger_file(name: str) -> Page:
    """Return the page of Swagger UI, or its only script."""
    if name == "index.html":
        return Page((SWAGGER / name).read_bytes(), "text/html; charset=utf-8", policy=SWAGGER_POLICY)
    return Page((SWAGGER / name).read_bytes(), "text/javascript; charset=utf-8", cache=300)


class App:
    """The WSGI application of a port.

    Paths without variables are looked up in a table, because Bottle takes a third of the time of a token request.
    Bottle serves the rest: paths with variables, HEAD, files and errors.
    """

    def __init__(self, idp: Idp, routes: Routes):
        self.idp, self.name, self.answer, self.bottle = idp, routes.name, Answer(idp), bottle.Bottle()
        self.table: dict = {}
        self.bottle.uninstall(True)  # its JSON and template plugins: Answer renders instead
        vars(self.bottle)["router"] = Router()  # Bottle forbids replacing an attribute
        for route, path in served_routes(idp, routes):
            self.bottle.route(path, list(route.methods), self.bottle_callback(route))
            if not any("<" in other for other in route.paths):
                self.table |= {(method, path): route for method in route.methods}
        self.bottle.router.compile_all()
        self.bottle.default_error_handler = self.answer_error
        self.cors_paths = {path for (_, path), route in self.table.items() if route.cors}
        # Requests may carry the issuer's path or not, depending on whether a proxy strips it.
        self.prefix = urlsplit(idp.options.auth_issuer).path if routes.name == "auth" else ""

    def bottle_callback(self, route: Route) -> Callable:
        """Return the callback of a route, which Bottle calls with the variables of the path."""

        def answer(**path):
            environ, started = bottle.request.environ, time.perf_counter()
            path = {name: value.replace(SLASH, "/") for name, value in path.items()}
            result = run_to_end(self.answer.run(route, environ, path))
            if not isinstance(result, bottle.HTTPResponse):
                content = self.to_bottle(result, environ)
                self.count(environ, route.paths[0], bottle.response.status_code, started)
                return content
            self.count(environ, route.paths[0], result.status_code, started)
            # Bottle itself sends a static file, whose handler has set its policy.
            policy = result.get_header("Content-Security-Policy", "")
            for header in (*security_headers(policy, environ["wsgi.url_scheme"]), ("Cache-Control", "no-cache")):
                result.set_header(*header)
            return result

        return answer

    def count(self, environ, path: str, status: int, started: float):
        """Count a request, by the first path of its route."""
        self.idp.counters.count_request(
            self.name, path, environ["REQUEST_METHOD"], status, time.perf_counter() - started
        )

    def to_bottle(self, result, environ) -> bytes:
        """Write the status and headers of a result into bottle.response; return its body."""
        bottle.response.status, headers, body = self.answer.render(result, environ)
        for name, value in headers:
            if name in ("WWW-Authenticate", "Set-Cookie"):
                bottle.response.add_header(name, value)
            else:
                bottle.response.set_header(name, value)
        return body

    def answer_error(self, error: bottle.HTTPError) -> bytes:
        """Answer an unknown path, a wrong method, or a failure of Bottle itself."""
        other = "invalid_request" if error.status_code < 500 else "server_error"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, other)
        if code == "server_error":
            self.idp.log("bug", "error", exc_info=error.exception, path=describe_path(bottle.request.path))
        # X-Not-Found tells a client an unknown route from an unknown object. Only Allow is taken from Bottle's error.
        problem = Problem(code, headers=[("X-Not-Found", "route")] if code == "not_found" else ())
        environ = bottle.request.environ
        is_missing = self.name == "auth" and code in ("not_found", "method_not_allowed")
        result = (
            self.answer.render_missing(environ, problem) if is_missing else render_problem(problem, False, environ)
        )
        if isinstance(result, Page):
            self.answer.log_refusal(environ, code, problem.status, "no page has this address")
        content = self.to_bottle(result, environ)
        self.count(environ, NO_ROUTE, bottle.response.status_code, time.perf_counter())
        if allow := error.get_header("Allow"):
            bottle.response.set_header("Allow", allow)
        return content

    def __call__(self, environ, start_response):
        started = time.perf_counter()
        if self.prefix and environ["PATH_INFO"].startswith(self.prefix + "/"):
            environ["SCRIPT_NAME"], environ["PATH_INFO"] = self.prefix, environ["PATH_INFO"][len(self.prefix) :]
        route = self.table.get((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if route is None:
            if environ["REQUEST_METHOD"] == "OPTIONS" and environ["PATH_INFO"] in self.cors_paths:
                allow = self.bottle.router.allow(environ["PATH_INFO"])
                headers = (*security_headers(scheme=environ["wsgi.url_scheme"]), ("Allow", allow))
                start_response("204 No Content", [*headers, *allow_origin(self.idp, environ, allow)])
                self.count(environ, environ["PATH_INFO"], 204, started)  # a path without variables is a route
                return [b""]
            return self.bottle(environ, start_response)
        steps = self.answer.run(route, environ, {})
        try:
            next(steps)
        except StopIteration as end:
            return self.finish(route, environ, start_response, started, end.value)
        return self.go_on(route, environ, start_response, started, steps)

    def go_on(self, route: Route, environ, start_response, started: float, steps: Generator[bytes, None, Any]):
        """Give an empty part whenever the answer waits: the server goes on with others first. PEP 3333."""
        yield b""
        result = yield from steps
        yield from self.finish(route, environ, start_response, started, result)

    def finish(self, route: Route, environ, start_response, started: float, result) -> list[bytes]:
        """Answer with the result of a route."""
        status, headers, body = self.answer.render(result, environ)
        if route.cors and ("HTTP_ORIGIN" in environ or status == 304 or NO_STORE not in headers):
            headers += allow_origin(self.idp, environ)
        start_response(STATUS[status], [*headers, ("Content-Length", str(len(body)))])
        self.count(environ, route.paths[0], status, started)
        return [body]


def refuse_early(idp: Idp, environ, start_response, problem: Problem) -> list[bytes]:
    """Answer a request to ADMIN that reaches no route, and log why."""
    answer = Answer(idp)
    answer.log_refusal(environ, problem.code, problem.status, problem.log)
    status, headers, content = answer.render(render_problem(problem, False, environ), environ)
    idp.counters.count_request("admin", NO_ROUTE, environ["REQUEST_METHOD"], status, 0.0)
    start_response(STATUS[status], [*headers, ("Content-Length", str(len(content)))])
    return [content]


def restrict_hosts(app, idp: Idp):
    """Wrap ADMIN so that it serves only requests for its own host names. This defeats DNS rebinding."""
    options = idp.options
    names = {"localhost", "127.0.0.1", "[::1]", urlsplit(f"//{options.admin_domain}").hostname}
    names.add(f"[{options.admin_ip}]" if ":" in options.admin_ip else options.admin_ip)

    def restricted(environ, start_response):
        host = environ.get("HTTP_HOST", "")
        name, port = host_without_port(host), re.search(r":([0-9]+)$", host)
        # On the Unix socket the port of a loopback name tells which box of the machine is meant: not the one whose
        # folder a command happens to run in. A program that names no port has chosen the socket itself.
        is_other_box = (
            "microauthd.uid" in environ and is_loopback_host(name.strip("[]"))
            and port is not None and int(port[1]) != options.admin_port
        )
        if name in names and not is_other_box:
            return app(environ, start_response)
        problem = Problem("misdirected_request", log="Host is not a name of ADMIN")
        return refuse_early(idp, environ, start_response, problem)

    return restricted


def cross_site_reason(options: Options, environ) -> str:
    """Return why a request to ADMIN may be the work of a page of another origin, for the log, or "".

    A browser says where a request comes from in Sec-Fetch-Site, and where it changes something also in Origin; a page
    can forge neither, and a program sends none. Same-site is another origin: AUTH is, on its own port of this host.
    Following a link is let pass: the page it comes from reads no answer. Fetch Metadata §2, Fetch Standard §3.2.
    """
    is_reading = environ["REQUEST_METHOD"] in ("GET", "HEAD")
    site = environ.get("HTTP_SEC_FETCH_SITE", "none").lower()
    is_navigation = is_reading and (
        environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
        and environ.get("HTTP_SEC_FETCH_DEST", "document") == "document"  # not into a frame, object or embed
    )
    if site not in ("none", "same-origin") and not is_navigation:
        return f"Sec-Fetch-Site is {escape(site[:20])}"
    origin = environ.get("HTTP_ORIGIN")
    if is_reading or origin is None:
        return ""
    return "" if origin.lower() in own_origins(options, environ) else f"Origin is {escape(origin[:200])}"


def refuse_cross_site(app, idp: Idp):
    """Wrap ADMIN so that no page of another origin has it do anything, whatever the browser sends along."""

    def guarded(environ, start_response):
        if reason := cross_site_reason(idp.options, environ):
            problem = Problem("access_denied", log=f"from a page of another origin: {reason}")
            return refuse_early(idp, environ, start_response, problem)
        return app(environ, start_response)

    return guarded


def guard_admin(app, idp: Idp) -> Callable:
    """Wrap the application of ADMIN in what is refused before any route is looked up."""
    return restrict_hosts(refuse_cross_site(app, idp), idp)


def msg(message: str) -> Msg:
    """Return a Msg that reports success."""
    return Msg(True, message)


def user_object(account: Account) -> UserObject:
    return UserObject(
        account.id, account.username, account.email, iso(account.created_at), iso(account.lockout_until),
        bool(account.is_active), bool(account.email_verified), bool(account.totp_sealed),
    )


def rows_of_users(idp: Idp, query: ListUsers, **more) -> tuple[list, int]:
    is_active = {"true": 1, "false": 0, "all": None}[query.is_active]
    return idp.store.list_accounts(fold(query.q), is_active, query.sort, query.limit, query.offset, **more)


# == AUTH endpoints ============================================================

AUTH = Routes("auth")


def cached_page(idp: Idp, name: str, make, cache=300) -> Page:
    """Return an answer that changes only with the keys, cacheable for five minutes.

    The dict is read before `make` runs: if the keys change meanwhile, the answer lands in the dict that they replace.
    """
    idp.reload_rings_if_due()
    answers = idp.answers
    page = answers.get(name)
    if page is None:
        content = make()
        page = answers[name] = Page(content, cache=cache, etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return page


@AUTH("GET", "/ping", guard=anyone, spec=OWN, gives=Ping)
def ping(idp, params):
    """Answer that the server is running."""
    return {"message": "pong from auth"}


@AUTH("GET", "/version", guard=anyone, spec=OWN, gives=Version)
def version(idp, params):
    """Return the name and version of the program."""
    return {"name": "microauthd", "version": VERSION}


@AUTH("GET", "/health", guard=anyone, spec="liveness", gives=Health)
def health(idp, params):
    """Answer that the process is alive."""
    return {"status": "ok"}


LOG_DAMAGED = (  # without what the operator finds in the log: anyone may ask
    "The write-ahead log was damaged: everything issued before is revoked, and changes made last may be undone; "
    "see microauthd log status."
)


def check_readiness(idp: Idp) -> dict[str, bool]:
    """Return whether the keys are loaded, the clock is plausible and the database can be written.

    One probe a second at most: it takes the write lock, and anyone may ask.
    """
    until, checks = idp.readiness
    if time.monotonic() >= until:
        checks = {"keys": bool(idp.auth_ring.keys), "clock": idp.check_clock(irreversible=False), "database": True}
        try:
            idp.store.probe()
        except Unavailable as problem:
            idp.log("not.ready", "error", reason=problem.log)
            checks["database"] = False
        # A damaged log keeps the box from nothing: what was issued before is dead, and the rest is the operator's.
        with contextlib.suppress(Unavailable):
            idp.log_was_damaged = bool(idp.store.meta("log_damaged"))
        idp.readiness = (time.monotonic() + 1, checks)
    return checks


@AUTH("GET", "/health/ready", guard=anyone, spec="readiness", gives=Health)
def ready(idp, params):
    """Tell whether the database can be written, the keys are loaded and the clock is plausible.

    `warnings` has what does not keep the server from serving, and is to be settled by an operator.
    """
    checks = check_readiness(idp)
    warnings = [LOG_DAMAGED] if idp.log_was_damaged else []
    warnings += certificate_warnings(idp.certificates, idp.now())
    more = {"warnings": warnings} if warnings else {}
    if all(checks.values()):
        return {"status": "ok", "checks": checks, **more}
    return Reply({"status": "unavailable", "checks": checks, **more}, [("Retry-After", "5")], 503)


@AUTH(
    "GET", ("/jwks.json", "/.well-known/jwks.json"), guard=anyone, spec="RFC 7517 §5", gives=Jwks, cors=True,
    tagged=True,
)
def jwks(idp, params):
    """Return the public keys that verify the tokens of this server."""
    # A cache this short has a new key before the key signs: processes load a ring within a second. RFC 7517 §5.
    cache = max(0, min(300, idp.options.key_overlap - 2))
    return cached_page(idp, "jwks", lambda: idp.auth_ring.jwks(), cache)


@AUTH(
    "GET", "/.well-known/microauthd/ca.pem", guard=anyone, spec=OWN, gives=bytes,
    gives_media="application/x-x509-ca-cert", tagged=True, option="tls",
)
def ca(idp, params):
    """Return the root of the box's own CA as PEM. Compare its fingerprint with what the box itself shows."""
    content = idp.store.meta("authority_root").encode()
    if not content:  # every port has a certificate of its own, and no start has made a CA yet
        raise Problem("not_found")
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return Page(content, "application/x-x509-ca-cert", cache=300, etag=etag)


def describe_server(idp: Idp) -> dict:
    """Return the metadata of RFC 8414 §2 and OpenID Connect Discovery §3, of what is enabled."""
    base, options = idp.options.auth_issuer, idp.options
    grants = [CLIENT_CREDENTIALS, PASSWORD] + ([REFRESH_TOKEN] if options.enable_token_refresh else [])
    methods = ["client_secret_basic", "client_secret_post"]
    metadata = {
        "issuer": base,
        "token_endpoint": base + "/token",
        "jwks_uri": base + "/jwks.json",
        "userinfo_endpoint": base + "/userinfo",
        "introspection_endpoint": base + "/introspect",
        "revocation_endpoint": base + "/revoke",
        "grant_types_supported": grants,
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "token_endpoint_auth_methods_supported": [*methods, "none"],
        "introspection_endpoint_auth_methods_supported": methods,
        "revocation_endpoint_auth_methods_supported": [*methods, "none"],
        "id_token_signing_alg_values_supported": sorted(idp.auth_ring.active, reverse=True),
        "scopes_supported": [
            "openid", "profile", "email", "roles", "groups",
            *(["offline_access"] if options.enable_token_refresh else []),
        ],
        "claims_supported": [
            "sub", "iss", "aud", "azp", "exp", "iat", "auth_time", "acr", "amr", "sid", "at_hash", "nonce", "name",
            "nickname", "preferred_username", "updated_at", "email", "email_verified", "roles", "groups",
        ],
        "claim_types_supported": ["normal"],
        "acr_values_supported": [ONE_FACTOR, TWO_FACTORS],
        "claims_parameter_supported": False,
        "request_parameter_supported": False,
        "request_uri_parameter_supported": False,
    }
    if not options.enable_pkce:
        return metadata
    return metadata | {
        "authorization_endpoint": base + "/authorize",
        "end_session_endpoint": base + "/end-session",
        "grant_types_supported": [AUTHORIZATION_CODE, *grants],
        "response_types_supported": ["code"],
        "response_modes_supported": list(RESPONSE_MODES),
        "code_challenge_methods_supported": ["S256", *(["plain"] if options.allow_plain_pkce else [])],
        "authorization_response_iss_parameter_supported": True,
        "prompt_values_supported": list(PROMPTS),
        "claims_parameter_supported": True,
        "ui_locales_supported": sorted(idp.pages.texts),
    }


@AUTH(
    "GET", ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"), guard=anyone,
    spec="RFC 8414 §3, OpenID Connect Discovery §4", cors=True, tagged=True,
)
def discovery(idp, params):
    """Return the metadata of this server: endpoints, grant types, algorithms, scopes and claims."""
    return cached_page(idp, "discovery", lambda: ENCODE(describe_server(idp)))


def has_credential_of_ours(idp: Idp, params) -> bool:
    """Return whether a request holds an authorization code or refresh token that this server has issued."""
    code, *tokens = (params.values.get(name) for name in ("code", "refresh_token", "token"))
    if code and idp.store.find_code(sha256(code)):
        return True
    return any(token and idp.store.find_refresh_token(refresh_token_sha256(token)) for token in tokens)


@AUTH(
    "POST", ("/token", "/oidc/token"), guard=by_client_or_token(read_refresh_token), spec="RFC 6749 §3.2",
    form=TokenForm, gives=TokenObject, oauth=True, cors=True,
)
def token(idp, client, params):
    """Exchange an authorization grant for tokens."""
    try:
        grant_type = params.need("grant_type")
        enabled = {REFRESH_TOKEN: idp.options.enable_token_refresh, AUTHORIZATION_CODE: idp.options.enable_pkce}
        if grant_type not in GRANTS or not enabled.get(grant_type, True):
            raise Problem("unsupported_grant_type")
        if grant_type not in client.grant_types:
            raise Problem("unauthorized_client")
        granted = GRANTS[grant_type](idp, client, params)
        if granted.account:
            yield
        answer = issue(idp, client, granted, params.caller)
        if granted.account:
            yield  # what is counted is on the disk
        idp.counters.add(TOKENS, grant_type, client.client_id)
        return answer
    except Problem as problem:
        if problem.status < 429 and not problem.audited:
            grant = params.values.get("grant_type")
            is_confidential = client.row.client_type == CONFIDENTIAL
            audit_refusal(
                idp, params.caller.acting_as(client.client_id), "token_refused", client.client_id,
                f"grant_type={grant if grant in GRANTS else 'unknown'} error={problem.code}", is_confidential,
            )
            # The work is done, so this refuses nobody who would have got a token, whatever its neighbours do. Whoever
            # has a code or token of ours is told what is wrong with it: an application must log in again then.
            if not is_confidential and not has_credential_of_ours(idp, params):
                idp.throttle.begin(params.caller.peer, "refusal")
        raise


@AUTH(
    "POST", "/introspect", guard=by_confidential_client, spec="RFC 7662 §2", form=TokenHintForm, gives=Introspection,
    oauth=True,
)
def introspect(idp, client, params):
    """Introspect a token of this client, or any token if the client has the right to."""
    return introspect_token(idp, client, params.need("token"))


@AUTH(
    "POST", "/revoke", guard=by_client_or_token(lambda params: params.get("token")), spec="RFC 7009 §2",
    form=TokenHintForm, gives=Msg, oauth=True, cors=True,
)
def revoke(idp, client, params):
    """Revoke a token of this client; with a refresh token, every token of its login. One of another client stays."""
    revoke_token(idp, params.caller, client, params.need("token"))
    return msg("Token revoked.")


@AUTH(
    "GET POST", "/userinfo", guard=by_bearer(OPENID, user=True), spec="OpenID Connect Core §5.3", form=BearerForm,
    gives=UserInfo, cors=True,
)
def userinfo(idp, claims, params):
    """Return the claims about the user that the scope of the token covers."""
    family, client = idp.store.find_family(claims["sid"]), client_of_token(idp, claims)
    return userinfo_claims(idp, client, family, get_user(idp, claims["sub"]), claims)


@AUTH("GET", "/me", guard=by_bearer(), spec=OWN, gives=Me)
def me(idp, claims, params):
    """Return the subject and scopes of the token, and of the e-mail address and roles what the client may learn."""
    account, scope = idp.store.find_account(claims["sub"]), claims.get("scope", "")
    client = client_of_token(idp, claims)
    if claims.get("roles_omitted"):
        claims = claims | role_claims(idp, claims["sub"], scope, client)
    may = functools.partial(opens, client, scope)
    return {
        "sub": claims["sub"], "email": account.email if account and may("email") else None,
        "roles": claims.get("role", []) if may("roles") else [],
        "role_names": claims.get("roles", []) if may("roles") else claims.get("groups", []),
        "scopes": scope.split(),
    }


@AUTH("GET", "/whoami", guard=by_bearer(), spec=OWN, gives=Ping)
def whoami(idp, claims, params):
    """Greet the subject of the token."""
    return {"message": f"Hello, {claims['sub']}"}


def session_object(session: ListedSession, kind: type[SessionObject] = SessionObject, *more) -> SessionObject:
    issued, expires = iso(session.issued_at), iso(session.expires_at)
    return kind(
        session.id, session.user_id, session.username, session.client_id, issued, expires, is_session_revoked(session),
        session.token_use, session.mad_use, session.login_method, False, 0, None, session.client_id, issued, *more,
    )


def refresh_token_object(row: ListedRefreshToken) -> RefreshTokenObject:
    return RefreshTokenObject(
        row.id, row.user_id, row.username, row.session_id, row.client_id, iso(row.issued_at), iso(row.expires_at),
        is_refresh_token_revoked(row), OPENID in row.scope.split(), row.client_id,
    )


def rows_of_bearer(idp: Idp, claims: dict, query: Paged, list_rows: Callable) -> tuple[list, int]:
    """Return a page of a user's sessions or refresh tokens, and the number of all, as far as the client may see them.

    A third party sees those of its own logins, and the user name if `profile` is granted to it.
    """
    rows, total = list_rows(
        user_id=claims["sub"], client_id=reach_of(idp, claims), limit=query.limit, offset=query.offset
    )
    if not opens(client_of_token(idp, claims), claims.get("scope", ""), "profile"):
        rows = [msgspec.structs.replace(row, username="") for row in rows]
    return rows, total


@AUTH("GET", "/me/sessions", guard=by_bearer(user=True), spec=OWN, query=Paged, gives=list[SessionObject])
def my_sessions(idp, claims, params):
    """List the access tokens of this user, newest first; for a third party, those of its own."""
    rows, total = rows_of_bearer(idp, claims, params.query, idp.store.list_sessions)
    return paged_reply(params, [session_object(row) for row in rows], total)


@AUTH(
    "GET", "/me/refresh-tokens", guard=by_bearer(user=True), spec=OWN, query=Paged,
    gives=list[RefreshTokenObject], option="enable_token_refresh",
)
def my_refresh_tokens(idp, claims, params):
    """List the refresh tokens of this user without the tokens, newest first; for a third party, those of its own."""
    rows, total = rows_of_bearer(idp, claims, params.query, idp.store.list_refresh_tokens)
    return paged_reply(params, [refresh_token_object(row) for row in rows], total)


def finish_logout(idp: Idp, params, handle: str | None, location: str):
    """End the session that a cookie names, delete the cookie, and redirect to `location` or show the sign-out page.

    Without the cookie there is nothing to delete: a form of another site brings none (SameSite), and must not log
    anyone out. A repeated `ui_locales` counts as none: an error now would hide that the session is over.
    """
    if handle:
        session, _ = current_session(idp, params) or (None, None)
        end_browser_session(idp, params.caller.acting_as(session.user_id if session else "anonymous"), sha256(handle))
    cookies = [make_cookie(idp, SESSION_COOKIE, "", 0)] if handle else []
    return (
        Redirect(location, cookies)
        if location
        else show_page(
            idp, params.environ, "signed_out", cookies=cookies, ui_locales=params.values.get("ui_locales", "")
        )
    )


def log_browser_out(idp: Idp, params, location=""):
    """End the session of this browser, after checking the token of the form."""
    handle = session_handle(idp, params)
    if handle:
        check_form(params, session_form_token(handle))
    return finish_logout(idp, params, handle, location)


@AUTH("POST", "/logout", guard=by_bearer_or_form(), spec=OWN, form=LogoutForm, gives=Msg)
def logout(idp, claims, params):
    """End every login of this user at the token's client; with a form token, the session of the browser."""
    if claims is None:
        return log_browser_out(idp, params)
    revoke_families(idp, params.caller, claims["sub"], claims["client_id"])
    return msg("Logged out of this client.")


@AUTH("POST", "/logout-all", guard=by_bearer_or_form(), spec=OWN, form=LogoutForm, gives=Msg)
def logout_all(idp, claims, params):
    """End every login and session of this user, at every client; for a third party, every login at itself."""
    if claims is None:
        session, _ = current_session(idp, params) or (None, None)
        check_form(params, session_form_token(session_handle(idp, params)))
        if session:
            revoke_user(idp, params.caller.acting_as(session.user_id), session.user_id, "logout_all")
        return log_browser_out(idp, params)
    if reach := reach_of(idp, claims):
        revoke_families(idp, params.caller, claims["sub"], reach)
        return msg("Logged out of this client.")
    revoke_user(idp, params.caller, claims["sub"], "logout_all")
    return msg("Logged out everywhere.")


# -- people: authorization --


def answer_client(
    idp: Idp, params, redirect_uri: str, response_mode: str, state: str | None, members: dict, cookies=()
):
    """Send a browser back to its client, with `state` and `iss`.

    RFC 6749 §4.1.2, RFC 9207 §2, OAuth 2.0 Multiple Response Type Encoding Practices §2.1, Form Post Response Mode.
    """
    members = members | ({"state": state} if state is not None else {}) | {"iss": idp.options.auth_issuer}
    if response_mode == "form_post":
        return show_page(
            idp, params.environ, "form_post", target=redirect_uri, script="form_post.js", action=redirect_uri,
            members=members, cookies=cookies,
        )
    # No registered URI has a fragment. RFC 6749 §3.1.2
    separator = "#" if response_mode == "fragment" else "&" if "?" in redirect_uri else "?"
    return Redirect(redirect_uri + separator + urlencode(members, quote_via=quote), list(cookies))


def refuse_client(
    idp: Idp, params, redirect_uri: str, response_mode: str, state: str | None, problem: Problem, cookies=()
):
    """Send a browser back to its client with an error. RFC 6749 §4.1.2.1."""
    members = {"error": problem.code, "error_description": problem.message}
    answer = answer_client(
        idp, params, redirect_uri, response_mode if response_mode in RESPONSE_MODES else "query", state, members,
        cookies,
    )
    Answer(idp).log_refusal(params.environ, problem.code, answer.status, problem.log)
    return answer


def find_or_make_binding(idp: Idp, params) -> tuple[str, list[str]]:
    """Return the secret of the logins of this browser, and the cookie for it if it is new."""
    binding = login_binding(idp, params)
    if binding and re.fullmatch(r"[A-Za-z0-9_-]{43}", binding):
        return binding, []
    binding = random_handle()
    return binding, [make_cookie(idp, LOGIN_COOKIE, binding)]


def open_login(idp: Idp, params, request, state="password", session=None) -> Redirect:
    """Begin a login in this browser, and redirect to its page."""
    binding, cookies = find_or_make_binding(idp, params)
    row = begin_login(idp, params.caller, binding, request, state, session)
    name = "jti" if params.environ["REQUEST_METHOD"] == "POST" else "tx"  # a script reads it by the original's name
    return Redirect(f"{idp.options.auth_issuer}/login?{name}={row.id}", cookies)


def authorize_with_session(idp: Idp, params, client: Client, request: AuthorizeRequest):
    """Issue a code if the browser's session suffices, else begin a login with the steps that are left.

    A generator: it yields before the code is stored, and when it is or is refused, until that is on the disk.
    """
    found = current_session(idp, params)
    if found is None or not session_serves(idp, found[0], client, request):
        if "none" in request.prompt:
            raise Problem("login_required")
        choose = found and "select_account" in request.prompt and not request.hinted_sub
        return open_login(idp, params, request, "select" if choose else "password")
    session, account = found
    missing = second_factor_missing(client, session, account, request)
    if missing and "none" in request.prompt:
        raise Problem("interaction_required")
    must_consent = not missing and needs_consent(idp, client, account, request)
    if must_consent and "none" in request.prompt:
        raise Problem("consent_required")
    if "select_account" in request.prompt:
        return open_login(idp, params, request, "select")
    if missing == "password":
        request.login_hint = request.login_hint or account.username
        return open_login(idp, params, request, "password")
    if missing or must_consent:
        return open_login(idp, params, request, missing or "consent", session)
    if must_confirm(idp, session, client, request):
        if "none" in request.prompt:
            raise Problem("interaction_required", log="the user has not agreed to continue to this client")
        return open_login(idp, params, request, "select")
    yield
    try:
        code = issue_code(
            idp, params.caller, client, request, account, session.amr.split(), session.auth_time, session.id_sha256
        )
    finally:
        yield  # a refusal too: it is logged, and may rest on what others have written in the same commit
    return answer_client(idp, params, request.redirect_uri, request.response_mode, request.state, {"code": code})


HINT_PARAMETERS = ("id_token_hint", "login_hint", "hint_handle")
LONGEST_QUERY = 6000  # a longer one may not get through every browser and proxy


def request_hints(idp: Idp, params, login_hint="") -> Hints:
    """Return what a request hints at, or what it did when it was a POST."""
    token, handle = params.get("id_token_hint"), params.get("hint_handle")
    if handle and not token and not login_hint:
        return take_hints(idp, params.caller, handle, params.cookie(cookie_name(idp, HINT_COOKIE + handle[:1])))
    return read_hints(idp, params.caller, token, login_hint)


def wait_with_hints(idp: Idp, params, hints: Hints) -> tuple[str, str]:
    """Park hints for the next request of this browser; return their handle and the cookie that it needs for them."""
    handle, binding = park_hints(idp, params.caller, hints)
    return handle, make_cookie(idp, HINT_COOKIE + handle[:1], binding, HINTS_TTL)


def repeat_as_get(idp: Idp, params, path: str, pairs: list, hints: Hints) -> Redirect | None:
    """Return the redirect that repeats a POST as a GET, or None if its URL would be too long.

    A cross-site POST brings no cookie (SameSite); the GET that it becomes does, and finds the session. URLs stay in
    logs and histories, so hints are not put there: they name a person, and an ID token ends a login. RFC 9700 §4.3
    """
    pairs, cookies = [(name, value) for name, value in pairs if name not in HINT_PARAMETERS], []
    if len(urlencode(pairs)) >= LONGEST_QUERY:
        return None
    if hints != Hints():
        handle, cookie = wait_with_hints(idp, params, hints)
        pairs.append(("hint_handle", handle))
        cookies.append(cookie)
    return Redirect(f"{idp.options.auth_issuer}/{path}?{urlencode(pairs, quote_via=quote)}", cookies)


def headless_step(login: Login, jti: str, requires_totp: bool) -> PkceStep:
    assert login.request
    return PkceStep(jti, login.row.client_id, login.request.redirect_uri, requires_totp, False)


def begin_headless(idp: Idp, params) -> Reply | Redirect | Page:
    """Begin a login for a first-party application, bound to the secret `jti` in the answer.

    With SESSION_BASED_AUTH the application has no password field: its script is redirected to the page, or to the
    application with a code where the browser's session suffices, and goes where its request ended.
    """
    try:
        client, redirect_uri = validate_client(idp, params)
        if not params.get("response_type"):
            params.values["response_type"] = "code"  # published clients leave it out
        hints = request_hints(idp, params, params.get("login_hint") or "")
        request = read_request(idp, client, redirect_uri, params, hints)
        if "SESSION_BASED_AUTH" in client.flags:
            answer = run_to_end(authorize_with_session(idp, params, client, request))
            return Redirect(answer.location, answer.cookies, 302) if isinstance(answer, Redirect) else answer
        if not client.row.is_first_party or not request.code_challenge:
            raise Problem("unauthorized_client", log="without pages only first-party clients, with PKCE")
        request.headless = True
        jti = random_handle()
        row = begin_login(idp, params.caller, jti, request)
        return Reply(headless_step(load_login(idp, row), jti, False))
    except (Problem, Unavailable) as error:
        return render_problem(as_problem(error), False, params.environ)


def is_headless(idp: Idp, params) -> bool:
    """Tell whether an authorization request comes from an application that has screens of its own.

    Its Accept prefers JSON to HTML, or names neither: the published clients of first-party applications send */* or
    nothing, with PKCE. So do scripts that follow OpenID Connect, for clients of any kind, and they expect the page.
    """
    environ = params.environ
    if environ["REQUEST_METHOD"] != "POST" or environ.get("HTTP_SEC_FETCH_MODE") == "navigate":
        return False
    accept = environ.get("HTTP_ACCEPT", "")
    json_preference, html_preference = (media_preference(accept, media) for media in (JSON, "text/html"))
    if json_preference != html_preference or json_preference[1] > 1:
        return json_preference > html_preference
    client = find_client(idp, params.get("client_id") or "")
    return bool(client and client.row.is_first_party and params.get("code_challenge"))


@AUTH(
    "GET POST", "/authorize", guard=anyone, spec="RFC 6749 §4.1.1, OpenID Connect Core §3.1.2", form=AuthorizeForm,
    gives=PkceStep, html=True, option="enable_pkce",
)
def authorize(idp, params):
    """Let a user log in for a client.

    A POST gets JSON where its Accept prefers JSON to HTML: it comes from an application with its own screens.
    """
    if is_headless(idp, params):
        return begin_headless(idp, params)
    client, redirect_uri = validate_client(idp, params)
    try:
        hints = request_hints(idp, params, params.get("login_hint") or "")
        request = read_request(idp, client, redirect_uri, params, hints)
        if params.environ["REQUEST_METHOD"] == "POST":
            redirect = repeat_as_get(idp, params, "authorize", params.pairs, hints)
            if redirect:
                return redirect
        return (yield from authorize_with_session(idp, params, client, request))
    except Problem as problem:
        if problem.status >= 429:
            raise
        # Not get(): the error may be that one of the two is repeated, and then the answer goes without it.
        mode, state = params.values.get("response_mode", ""), params.values.get("state")
        return refuse_client(idp, params, redirect_uri, mode, state, problem)


# -- people: the pages of a login --


def get_current_login(idp, params) -> Login:
    """Return the login that the request names and its cookie is bound to. Raises not_found."""
    login = get_login(idp, params.get("tx") or params.get("jti") or "", login_binding(idp, params))
    row = login.row
    if login.request and login.request.headless:
        raise Problem("not_found")
    # After the last factor, or if a session replaced the password, the login ends with the session: the cookie of the
    # login alone must not continue it.
    if row.user_id and (row.state in ("codes", "consent") or row.proven_ms // 1000 < row.created_at):
        session, _ = current_session(idp, params) or (None, None)
        if session is None or session.user_id != row.user_id:
            raise Problem("not_found", log="the browser session of this login is over")
    return login


def posted_login(idp, params, *states) -> Login:
    """Return the login of a posted form. Raises access_denied without its token, conflict in another state."""
    login = get_current_login(idp, params)
    check_form(params, login_form_token(idp, login.row))
    if login.row.state not in states:
        raise Problem("conflict", log="the form of another state")
    return login


def describe_scope(idp, name) -> dict:
    scope = idp.store.find_scope(name)
    return {"name": name, "description": scope.description if scope else ""}


def qr_uri(uri: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(draw_qr(uri)).decode()


def state_variables(idp: Idp, params, login: Login) -> dict:
    """Return the template variables that only the page of a login's state needs."""
    row, request, client = login.row, login.request, login.client
    if row.state == "password":
        return {}
    if row.state == "select":
        _, account = current_session(idp, params) or (None, None)
    else:
        assert row.user_id
        account = idp.store.find_account(row.user_id)
    if row.state == "enrol":
        assert row.pending
        if account is None:
            return {"secret": "", "qr": "", "may_skip": False, "username": ""}
        seed = idp.seal.open(row.pending, account.id)
        issuer_name = (client.flags.get("TOTP_ISSUER") if client else "") or idp.brand.name
        qr = qr_uri(totp_uri(seed, account.username, issuer_name))
        return {"secret": seed, "qr": qr, "may_skip": client is None, "username": account.username}
    variables: dict[str, Any] = {"username": account.username if account else ""}
    if row.state == "select":
        assert request and client
        variables["unproven"] = could_be_impersonated(client, request.redirect_uri)
    if row.state == "consent":
        assert request and client
        scope_names = scopes_to_consent(idp, client, account, request) if account else ()
        variables["scopes"] = [describe_scope(idp, name) for name in scope_names or ()]
    return variables


def host_of_application(redirect_uri: str) -> str:
    """Return the host, with its port, to which a login leads back; "" if that is a program on the user's device.

    Such a one has a loopback address or a scheme of its own, which any program can claim. RFC 8252 §7, §8.6
    """
    parts = urlsplit(redirect_uri)
    is_web = parts.scheme.lower() in ("http", "https") and not is_loopback_host(parts.hostname or "")
    return parts.netloc.rpartition("@")[2] if is_web else ""


HELP_LINK = re.compile(r"(https?://|mailto:|tel:)\S+", re.IGNORECASE)


def application_variables(idp: Idp, login: Login) -> dict:
    """Return the template variables that say to which application a login leads."""
    request, client = login.request, login.client
    if not request or not client:
        return {"client": "", "host": "", "picture": ""}
    return {
        "client": client.row.display_name or client.client_id, "host": host_of_application(request.redirect_uri),
        "picture": idp.pages.picture(client.client_id),
    }


def codes_file(idp: Idp, username: str, codes) -> str:
    """Return the address of a file with recovery codes, which the page itself carries."""
    return text_uri("\n".join([f"{idp.brand.name}, {username}", "", *codes, ""])) if codes else ""


def show_login(idp: Idp, params, login: Login, *, status=200, error="", **variables) -> Page:
    """Return the page for the state of a login."""
    request, row = login.request, login.row
    variables |= state_variables(idp, params, login)
    template = {
        "password": "sign_in", "totp": "second_factor", "enrol": "enrol", "codes": "codes", "consent": "consent",
        "select": "select",
    }[row.state]
    return show_page(
        idp, params.environ, template, status=status, error=error,
        ui_locales=request.ui_locales if request else "", target=request.redirect_uri if request else "", tx=row.id,
        form=login_form_token(idp, row), script="pages.js", help=idp.options.login_help,
        help_link=HELP_LINK.fullmatch(idp.options.login_help) is not None,
        codes_file=codes_file(idp, variables.get("username", ""), variables.get("recovery")),
        **application_variables(idp, login),
        **({"username": request.login_hint if request else "", "recovery": []} | variables),
    )


def send_code(idp: Idp, params, login: Login, account: Account, handle: str | None, cookies: list):
    """Issue the code of a finished login, and send the browser back to its client."""
    request, client, row = login.request, login.client, login.row
    assert request and client
    # The cookie of the request still names the session that a new one replaced.
    found = find_browser_session(idp, handle) if handle != session_handle(idp, params) else current_session(idp, params)
    session, _ = found or (None, None)
    browser = session.id_sha256 if session and session.user_id == account.id else ""
    target = request.redirect_uri, request.response_mode, request.state
    try:
        code = issue_code(idp, params.caller, client, request, account, row.amr.split(), row.auth_time, browser)
    except (Problem, Unavailable) as error:
        return refuse_client(idp, params, *target, as_problem(error), cookies)
    return answer_client(idp, params, *target, {"code": code}, cookies)


def continue_login(idp: Idp, params, login: Login, account: Account | None = None, recovery=()):
    """Redirect a login to its next page, or back to its client.

    With `account` its last factor was just verified: the browser gets a session.
    """
    cookies, handle, row = [], session_handle(idp, params), login.row
    if account is not None:
        handle = begin_browser_session(idp, params.caller, account, row.amr.split(), row.auth_time, handle)
        cookies += cookies_after_login(idp, params, account, handle)
    if login.binding != login_binding(idp, params):
        cookies.append(make_cookie(idp, LOGIN_COOKIE, login.binding))
    if recovery:
        page = show_login(idp, params, login, recovery=recovery)
        page.headers.extend(("Set-Cookie", cookie) for cookie in cookies)
        return page
    if row.state != "done":
        return Redirect(f"{idp.options.auth_issuer}/login?tx={row.id}", cookies)
    account = finish_login(idp, login)
    if login.request is None:
        return Redirect(f"{idp.options.auth_issuer}/account", cookies)
    return send_code(idp, params, login, account, handle, cookies)


def show_refusal(idp, params, login: Login, problem: Problem, error: str, **variables) -> Page:
    """Show the page again with the same error for every cause; raise the problem if the login is over."""
    if problem.code not in ("invalid_grant", "slow_down"):
        raise problem
    Answer(idp).log_refusal(params.environ, problem.code, problem.status, problem.log)
    again = get_login(idp, login.row.id, login_binding(idp, params))
    page = show_login(
        idp, params, again, status=problem.status, error="wait" if problem.code == "slow_down" else error, **variables
    )
    page.headers.extend(problem.headers)
    return page


def tell_denial(idp: Idp, params, request: AuthorizeRequest):
    problem = Problem("access_denied", log="the user said no")
    return refuse_client(idp, params, request.redirect_uri, request.response_mode, request.state, problem)


def land(idp: Idp, params, login: Login, account: Account | None, recovery=()):
    """Lead a form that was sent twice where it led the first time.

    With `account` its factor was the last: the browser gets a session again, if it has dropped the first response.
    """
    found = current_session(idp, params)
    if account is not None and not is_still_valid(account, login.row.proven_ms):
        raise Problem("not_found", log="the user changed meanwhile")
    has_session = found is not None and found[0].user_id == login.row.user_id
    return continue_login(idp, params, login, None if has_session else account, recovery)


def land_password(idp: Idp, params, login: Login):
    """The password is verified again: the login keeps nothing of it."""
    caller, row = browser_caller(idp, params), login.row
    account, _ = authenticate_user(
        idp, caller, params.get("username") or "", params.get("password") or "", client=login.client, only_password=True
    )
    if account.id != row.user_id:
        raise Problem("not_found", log="a form sent twice, of another user")
    return land(idp, params, login, account if row.state in ("done", "consent") else None)


def land_code(idp: Idp, params, login: Login):
    return land(idp, params, login, idp.store.find_account(login.row.user_id or ""))


def land_enrolment(idp: Idp, params, login: Login):
    """The recovery codes that the browser has not shown are replaced by others."""
    account = idp.store.find_account(login.row.user_id or "")
    if login.row.state != "codes" or not is_still_valid(account, login.row.proven_ms):
        raise Problem("not_found", log="a form sent twice, later than the next one")
    codes = make_recovery_codes(idp, browser_caller(idp, params), account.id)
    return land(idp, params, login, account, codes)


def land_step(idp: Idp, params, login: Login):
    """What proves nothing needs the browser session that it needed the first time."""
    found = current_session(idp, params)
    if login.row.user_id and (found is None or found[0].user_id != login.row.user_id):
        raise Problem("not_found", log="the browser session of this login is over")
    return continue_login(idp, params, login)


def land_consent(idp: Idp, params, login: Login):
    if params.get("decision") == "allow":
        return land_step(idp, params, login)
    assert login.request
    return tell_denial(idp, params, login.request)


def lands_once(state: str, land_again: Callable, field=""):
    """Let a form that is sent twice, by a double click or by "send again", lead where its first copy led.

    The browser shows only what the last copy gets, and may have dropped the cookies of the first response. `field` is
    the member of the form that was the answer to the state.
    """

    def decorate(handler):
        @functools.wraps(handler)
        def wrapped(idp, params):
            try:
                return handler(idp, params)
            except Problem as problem:
                if problem.code not in ("not_found", "access_denied", "conflict"):
                    raise
                tx, binding = params.values.get("tx") or "", login_binding(idp, params) or ""
                answer = (params.values.get(field) or "").strip()
                login = find_repeated(idp, tx, binding, state, answer) if 0 < len(tx) <= 100 and binding else None
                if login is None or (login.request and login.request.headless):
                    raise
                refusal = problem
            expected = form_token(idp.seal.form_key, f"{login.row.id} {state}")
            if not hmac.compare_digest(expected.encode(), (params.values.get("form") or "").encode()):
                raise refusal
            try:
                return land_again(idp, params, login)
            except Problem as problem:
                if problem.code in ("invalid_grant", "not_found"):
                    raise refusal from None
                raise

        return wrapped

    return decorate


@AUTH(
    "GET", ("/login", "/totp"), guard=anyone, spec=OWN, form=LoginPageForm, gives=bytes,
    gives_media="text/html", html=True, option="enable_pkce",
)
def login_page(idp, params):
    """Show the next page of a login: password, second factor, account selection or consent.

    Without a login, redirect to the account page.
    """
    if params.get("tx") is None and params.get("jti") is None:
        return Redirect(f"{idp.options.auth_issuer}/account")
    return show_login(idp, params, get_current_login(idp, params))


@AUTH(
    "POST", "/login", guard=anyone, spec=OWN, form=PasswordForm, gives=bytes, gives_media="text/html",
    html=True, option="enable_pkce",
)
@lands_once("password", land_password)
def login_password(idp, params):
    """Verify the user name and password of a login."""
    login = posted_login(idp, params, "password")
    try:
        caller = browser_caller(idp, params)
        after = submit_password(idp, caller, login, params.get("username") or "", params.get("password") or "")
    except Problem as problem:
        return show_refusal(
            idp, params, login, problem, "wrong_password", username=(params.get("username") or "")[:255]
        )
    return continue_login(
        idp, params, after,
        idp.store.find_account(after.row.user_id) if after.row.state in ("done", "consent") else None,
    )


@AUTH(
    "POST", "/totp", guard=anyone, spec=OWN, form=CodeForm, gives=bytes, gives_media="text/html",
    html=True, option="enable_pkce",
)
@lands_once("totp", land_code, "totp")
def login_totp(idp, params):
    """Verify the one-time code or the recovery code of a login."""
    login = posted_login(idp, params, "totp")
    try:
        after = submit_code(idp, browser_caller(idp, params), login, (params.get("totp") or "").strip())
    except Problem as problem:
        return show_refusal(idp, params, login, problem, "wrong_code")
    return continue_login(idp, params, after, idp.store.find_account(after.row.user_id))


@AUTH(
    "POST", "/login/enrol", guard=anyone, spec="RFC 6238", form=EnrolForm, gives=bytes, gives_media="text/html",
    html=True, option="enable_pkce",
)
@lands_once("enrol", land_enrolment, "totp")
def login_enrol(idp, params):
    """Enrol a second factor during a login by its first code, and show the recovery codes once.

    One that an invitation offers may be left out.
    """
    login = posted_login(idp, params, "enrol")
    try:
        if params.get("skip"):
            after = skip_enrolment(idp, login)
            return continue_login(idp, params, after, idp.store.find_account(after.row.user_id))
        after, recovery = enrol(idp, browser_caller(idp, params), login, (params.get("totp") or "").strip())
    except Problem as problem:
        return show_refusal(idp, params, login, problem, "wrong_code")
    return continue_login(idp, params, after, idp.store.find_account(after.row.user_id), recovery)


@AUTH(
    "POST", "/login/codes", guard=anyone, spec="recovery codes", form=StepForm, gives=bytes, gives_media="text/html",
    html=True, option="enable_pkce",
)
@lands_once("codes", land_step)
def login_codes(idp, params):
    """Continue a login after the recovery codes were shown."""
    login = posted_login(idp, params, "codes")
    row = login.row
    account = idp.store.find_account(row.user_id)
    if not is_still_valid(account, row.proven_ms):
        raise Problem("not_found", log="the user changed meanwhile")
    return continue_login(idp, params, advance(idp, login, state_after_factors(idp, login, account), mark_of(idp, row)))


@AUTH(
    "POST", "/login/select", guard=anyone, spec="OpenID Connect Core §3.1.2.1", form=SelectForm, gives=bytes,
    gives_media="text/html", html=True, option="enable_pkce",
)
@lands_once("select", land_step)
def login_select(idp, params):
    """Continue a login with the account of the session, or with another."""
    login = posted_login(idp, params, "select")
    assert login.client and login.request
    session, account = current_session(idp, params) or (None, None)
    if (
        params.get("choice") == "other"
        or session is None
        or account is None
        or not session_serves(idp, session, login.client, login.request)
        or (missing := second_factor_missing(login.client, session, account, login.request)) == "password"
    ):
        mark = mark_of(idp, login.row)
        return continue_login(
            idp, params, advance(idp, login, "password", mark, user_id=None, amr="", auth_time=0, proven_ms=0)
        )
    if params.get("username") not in (None, account.username):
        return show_login(idp, params, login)  # another tab logged somebody else in: the choice is of who was shown
    login = advance(
        idp, login, missing or state_after_factors(idp, login, account), mark_of(idp, login.row), user_id=account.id,
        amr=session.amr, auth_time=session.auth_time, proven_ms=session.created_ms,
    )
    return continue_login(idp, params, login)


@AUTH(
    "POST", "/login/consent", guard=anyone, spec="OpenID Connect Core §3.1.2.4", form=ConsentForm, gives=bytes,
    gives_media="text/html", html=True, option="enable_pkce",
)
@lands_once("consent", land_consent, "decision")
def login_consent(idp, params):
    """Give or deny consent to the scopes that a client requests."""
    login = posted_login(idp, params, "consent")
    row, request, client = login.row, login.request, login.client
    assert request and client  # only the login of a client asks for consent
    is_allowed = params.get("decision") == "allow"
    account = idp.store.find_account(row.user_id)
    scopes = scopes_to_consent(idp, client, account, request) if account else None
    if is_allowed and params.get("scope") not in (None, " ".join(scopes or ())):
        return show_login(idp, params, login)  # the user's scopes changed meanwhile: consent covers what was shown
    decided = advance(idp, login, "done", mark_of(idp, row, params.get("decision") or ""))
    if not is_allowed:
        audit(idp, params.caller.acting_as(row.user_id), "consent_denied", row.client_id, "", FAILURE)
        return tell_denial(idp, params, request)
    account = finish_login(idp, decided)
    if scopes is not None:
        give_consent(idp, params.caller, account, client, scopes)
    return continue_login(idp, params, decided)


STEPS_OF_A_USER = ("totp", "enrol", "select", "consent")


@AUTH(
    "POST", "/login/other", guard=anyone, spec="OpenID Connect Core §3.1.2.1", form=StepForm, gives=bytes,
    gives_media="text/html", html=True, option="enable_pkce",
)
def login_other(idp, params):
    """Continue a login with another account: what was proven so far is dropped.

    Any page of the login may send it, and twice: it only ever leads back to the password.
    """
    login = get_current_login(idp, params)
    check_form(params, *(login_form_token(idp, login.row, state) for state in STEPS_OF_A_USER))
    if login.row.state == "password":
        return continue_login(idp, params, login)
    if login.row.state not in STEPS_OF_A_USER:
        raise Problem("conflict", log="the form of another state")
    mark = mark_of(idp, login.row)
    return continue_login(
        idp, params, advance(idp, login, "password", mark, user_id=None, amr="", auth_time=0, proven_ms=0)
    )


@AUTH(
    "POST", "/login/cancel", guard=anyone, spec="RFC 6749 §4.1.2.1", form=StepForm, gives=bytes,
    gives_media="text/html", html=True, option="enable_pkce",
)
def login_cancel(idp, params):
    """Send the user back to the client with access_denied; the browser's "back" leads to the login again."""
    login = get_current_login(idp, params)
    check_form(params, *(login_form_token(idp, login.row, state) for state in ("password", *STEPS_OF_A_USER)))
    if login.request is None:
        raise Problem("invalid_request", log="no client to go back to")
    return tell_denial(idp, params, login.request)


@AUTH(
    "GET", "/pages/<name>", guard=anyone, spec="style of the pages", gives=bytes, gives_media="*/*", html=True,
    option="enable_pkce",
)
def page_asset(idp, params):
    """Return the style sheet, a script or the logo of the login pages."""
    name = params.path["name"]
    content = idp.pages.find_style(name)
    if content is not None:
        return Page(content, "text/css; charset=utf-8", cache=31536000)
    if name in SCRIPTS:
        return Page(idp.pages.file(name).read_bytes(), "text/javascript; charset=utf-8", cache=300)
    if name == "logo":
        return show_logo(idp, idp.brand.logo, cache=300)
    return show_logo(idp, name, cache=31536000)


# -- people: invitations --


def show_invitation(
    idp: Idp, params, found: Invitation, account: Account, binding: str, cookies=(), status=200, error=""
) -> Page:
    code = params.need("code")
    return show_page(
        idp, params.environ, "invite", status=status, error=error, cookies=cookies, state="open", code=code,
        form=form_token(idp.seal.form_key, f"invitation {sha256(code)} {binding}"), username=account.username,
        purpose=found.purpose, least=idp.options.password_min_length, script="pages.js",
    )


def show_invitation_over(idp: Idp, params, problem: Problem) -> Page:
    Answer(idp).log_refusal(params.environ, problem.code, problem.status, problem.log)
    return show_page(idp, params.environ, "invite", status=problem.status, state="over")


@AUTH(
    "GET", "/invite", guard=anyone, spec=OWN, form=InvitePageForm, gives=bytes, gives_media="text/html", html=True,
    option="enable_pkce",
)
def invitation_page(idp, params):
    """Show the form by which an invited user chooses a password; looking at it spends nothing."""
    try:
        found, account = get_invited(idp, params.get("code") or "")
    except Problem as problem:
        return show_invitation_over(idp, params, problem)
    binding, cookies = find_or_make_binding(idp, params)
    return show_invitation(idp, params, found, account, binding, cookies)


@AUTH(
    "POST", "/invite", guard=anyone, spec=OWN, form=InviteForm, gives=bytes, gives_media="text/html", html=True,
    option="enable_pkce",
)
def invitation_accept(idp, params):
    """Set the password that an invited user chose, once, and go on to the second factor.

    The form is bound to the browser that it was shown in: another site cannot log anybody in as somebody else by it.
    """
    code, binding = params.get("code") or "", login_binding(idp, params) or ""
    try:
        found, account = get_invited(idp, code)
        check_form(params, form_token(idp.seal.form_key, f"invitation {sha256(code)} {binding}") if binding else "")
        row = begin_login(idp, params.caller, binding, None)  # first: it may be refused, and must spend nothing then
        found, account = accept_invitation(idp, params.caller, code, params.get("new_password") or "")
    except Problem as problem:
        if problem.code == "not_found":
            return show_invitation_over(idp, params, problem)
        if problem.errors is None:
            raise
        return show_invitation(idp, params, found, account, binding, status=400, error="weak_password")
    if login_obstacle(idp, params.caller, account):  # a lockout of guesses may close the account for a while
        return show_page(idp, params.environ, "invite", state="done")
    login = advance_after_password(idp, load_login(idp, row, binding), account, found.purpose == "invite")
    return continue_login(idp, params, login, account if login.row.state == "done" else None)


# -- people: applications with their own screens --


def as_invalid_grant(handler):
    """Make a handler answer every failed login with the same invalid_grant."""

    @functools.wraps(handler)
    def wrapped(idp, params):
        try:
            return handler(idp, params)
        except Problem as problem:
            if problem.code in ("not_found", "conflict", "invalid_grant"):
                raise Problem("invalid_grant", log=problem.log, audited=problem.audited) from None
            raise

    return wrapped


def headless_login(idp, params) -> tuple[Login, str]:
    jti = params.need("jti")
    row = idp.store.find_headless_login(sha256(jti), idp.now())
    login = load_login(idp, row) if row else None
    if login is None or login.request is None or not login.request.headless or login.row.state == "done":
        raise Problem("invalid_grant", log="no such login under way")
    if params.get("redirect_uri") not in (None, login.request.redirect_uri):
        came = describe_unregistered(params.get("redirect_uri"), [login.request.redirect_uri])
        raise Problem("invalid_grant", log=f"another redirect_uri: {came}")
    return login, jti


@AUTH(
    "POST", "/login/password", guard=anyone, spec=OWN, form=HeadlessPasswordForm, gives=PkceStep,
    option="enable_pkce",
)
@as_invalid_grant
def headless_password(idp, params):
    """Verify the user name and password, for an application with its own screens."""
    username, password = params.need("username"), params.need("password")
    login, jti = headless_login(idp, params)
    after = submit_password(idp, params.caller, login, username, password)
    if after.row.state == "enrol":
        raise Problem("invalid_grant", log="the client demands a second factor, and the user has none")
    return headless_step(after, jti, after.row.state == "totp")


@AUTH("POST", "/login/totp", guard=anyone, spec=OWN, form=HeadlessCodeForm, gives=PkceStep, option="enable_pkce")
@as_invalid_grant
def headless_totp(idp, params):
    """Verify the one-time code, for an application with its own screens."""
    code = params.need("totp_code")
    login, jti = headless_login(idp, params)
    return headless_step(submit_code(idp, params.caller, login, code.strip()), jti, False)


@AUTH(
    "POST", "/login/finalize", guard=anyone, spec=OWN, form=HeadlessLastForm, gives=bytes,
    gives_media="*/*", redirects=True, option="enable_pkce",
)
@as_invalid_grant
def headless_finalize(idp, params):
    """Redirect with the authorization code, once, after every factor was verified."""
    login, _ = headless_login(idp, params)
    row, request, client = login.row, login.request, login.client
    if row.state != "ready":
        raise Problem("invalid_grant", log="finalize before every factor was proven")
    assert request and client  # only an application begins a login without pages
    done = advance(idp, login, "done")
    account = finish_login(idp, done)
    code = issue_code(idp, params.caller, client, request, account, row.amr.split(), row.auth_time)
    answer = answer_client(idp, params, request.redirect_uri, "query", request.state, {"code": code})
    answer.status = 302  # published clients expect it
    return answer


@AUTH(
    "GET", "/auth-session/<jti>", guard=anyone, spec=OWN, gives=AuthSession, option="enable_pkce", secret_path=True,
)
def auth_session(idp, params):
    """Return the state of a login to the holder of its secret `jti`."""
    row = idp.store.find_headless_login(sha256(params.path["jti"]), idp.now())
    login = load_login(idp, row) if row else None
    if login is None or login.request is None or not login.request.headless:
        raise Problem("not_found")
    request = login.request
    return AuthSession(
        params.path["jti"], request.client_id, request.redirect_uri, row.state == "totp", request.nonce,
        request.scope or "", request.state, request.code_challenge, request.code_challenge_method, iso(row.created_at),
        iso(row.expires_at), row.state, request.max_age,
    )


# -- people: logout --


def read_logout(idp: Idp, params, hints: Hints) -> str:
    """Return the registered URI to go to after a logout, or "". Raises invalid_request.

    An id_token_hint that cannot be verified leads nowhere, whatever else the request says: the hint is what confirms
    that the redirect is legitimate. OpenID Connect RP-Initiated Logout §3, §4.
    """
    hint, client_id = hints.id_token, params.get("client_id") or ""
    if hint and client_id not in ("", hint["aud"]):
        raise Problem("invalid_request", log="client_id and id_token_hint disagree")
    location, state = params.get("post_logout_redirect_uri") or "", params.get("state")
    if hints.is_unverifiable or not location:
        return ""
    client_id = client_id or (hint["aud"] if hint else "")
    client = find_client(idp, client_id) if client_id else None
    if client is None or location not in client.post_logout_redirect_uris:
        came = describe_unregistered(location, client.post_logout_redirect_uris if client else ())
        raise Problem("invalid_request", log=f"a post_logout_redirect_uri that is not registered: {came}")
    if state is not None:
        location += ("&" if "?" in location else "?") + urlencode({"state": state}, quote_via=quote)
    return location


def end_hinted_login(idp: Idp, params, hint: dict | None, account: Account | None):
    """End the login that an id_token_hint names, even if the browser session in which it began is over.

    Without a browser session of its user the ID token alone is the proof, and only until it expires: an old one may
    have been copied from a log or a history.
    """
    if hint is None or ((account is None or account.id != hint["sub"]) and hint["exp"] <= idp.now()):
        return
    family = idp.store.find_family(hint.get("sid", ""))
    if family and family.revoked_at is None and family.client_id == hint["aud"]:
        revoke_family(idp, params.caller.acting_as(family.user_id), family.sid, "logout", family.client_id)


@AUTH(
    "GET POST", "/end-session", guard=anyone, spec="OpenID Connect RP-Initiated Logout §2", form=EndSessionForm,
    gives=bytes, gives_media="text/html", html=True, option="enable_pkce",
)
def end_session(idp, params):
    """Log a user out for a client: at once if its ID token names the user of the session, else after asking."""
    names = ("id_token_hint", "client_id", "post_logout_redirect_uri", "state", "ui_locales")
    again = {name: value for name in names if (value := params.get(name)) is not None}
    hints = request_hints(idp, params)
    location, hint = read_logout(idp, params, hints), hints.id_token
    handle = session_handle(idp, params)
    _, account = current_session(idp, params) or (None, None)
    if handle is None and params.environ["REQUEST_METHOD"] == "POST":
        # Not left to the GET: a program that keeps no cookies does not find the hints there.
        end_hinted_login(idp, params, hint, None)
        redirect = repeat_as_get(idp, params, "end-session", list(again.items()), hints)
        if redirect:
            return redirect
    if account and params.get("form") is not None:
        check_form(params, session_form_token(handle))
    elif account and handle and not (hint and hint["sub"] == account.id):
        cookies = []
        if "id_token_hint" not in again and hints != Hints():
            again["hint_handle"], cookie = wait_with_hints(idp, params, hints)
            cookies.append(cookie)
        return show_page(
            idp, params.environ, "sign_out", username=account.username, form=session_form_token(handle), again=again,
            action="end-session", target=location, cookies=cookies, ui_locales=params.get("ui_locales") or "",
        )
    end_hinted_login(idp, params, hint, account)
    return finish_logout(idp, params, handle, location)


@AUTH("GET", "/logout", guard=anyone, spec=OWN, gives=bytes, gives_media="text/html", html=True, option="enable_pkce")
def logout_page(idp, params):
    """Ask whether to log this browser out."""
    handle = session_handle(idp, params)
    _, account = current_session(idp, params) or (None, None)
    if account is None or handle is None:
        return show_page(idp, params.environ, "signed_out")
    return show_page(
        idp, params.environ, "sign_out", username=account.username, form=session_form_token(handle), again={},
        action="logout",
    )


# -- people: their account --


def client_name(idp, client_id) -> str:
    client = find_client(idp, client_id)
    return (client.row.display_name if client else "") or client_id


def show_account(
    idp: Idp, params, session, account, *, handle="", status=200, notice="", error="", failed="", recovery=(), seed="",
    cookies=(),
) -> Page:
    """Return the account page of a user, in a session of its browser; `failed` is the action that `error` refused.

    The seed of a new second factor is shown in the answer to the password only, or a stolen session would show it.
    """
    account = idp.store.find_account(account.id)  # read again: the handler may just have changed it
    handle = handle or session_handle(idp, params)
    assert account and handle
    return show_page(
        idp, params.environ, "account", status=status, account=account,
        form=session_form_token(handle), notice=notice, error=error, failed=failed, script="pages.js",
        sessions=[
            (row, row.id_sha256 == session.id_sha256, iso(row.last_seen_at))
            for row in idp.store.list_browser_sessions(account.id, idp.now())
        ],
        logins=[
            (family, client_name(idp, family.client_id), iso(family.created_ms // 1000))
            for family in idp.store.list_families_of(account.id)
            if family.expires_at > idp.now() and family.client_id != ADMIN_CLIENT
        ],
        consents=[
            (row, [describe_scope(idp, name) for name in row.scope.split()], iso(row.given_at))
            for row in idp.store.list_consents(account.id)
        ],
        has_totp=bool(account.totp_sealed), left=idp.store.count_recovery_codes(account.id), recovery=recovery,
        codes_file=codes_file(idp, account.username, recovery), least=idp.options.password_min_length,
        is_pending=bool(account.totp_pending_sealed), secret=seed,
        qr=qr_uri(totp_uri(seed, account.username, idp.brand.name)) if seed else "",
        cookies=cookies,
    )


@AUTH(
    "GET", "/account", guard=anyone, spec="self-service", gives=bytes, gives_media="text/html", html=True,
    option="enable_pkce",
)
def account_page(idp, params):
    """Show a user its sessions, consents, password and second factor, after a login if there is no session."""
    found = current_session(idp, params)
    return show_account(idp, params, *found) if found else open_login(idp, params, None)


def end_own_session(idp, params, session, account):
    row = idp.store.find_browser_session(params.need("id"))
    if row is None or row.user_id != account.id:
        raise Problem("not_found")
    end_browser_session(idp, params.caller.acting_as(account.id), row.id_sha256)
    return Redirect(f"{idp.options.auth_issuer}/account")


def end_own_login(idp, params, session, account):
    family = idp.store.find_family(params.need("id"))
    if family is None or family.user_id != account.id:
        raise Problem("not_found")
    revoke_family(idp, params.caller.acting_as(account.id), family.sid, "logout", family.client_id)
    return Redirect(f"{idp.options.auth_issuer}/account")


def revoke_own_consent(idp, params, session, account):
    revoke_consent(idp, params.caller.acting_as(account.id), account, params.need("id"))
    return Redirect(f"{idp.options.auth_issuer}/account")


def show_account_in_new_session(idp, params, session, account, **variables) -> Page:
    """Return the account page in a new session, after every session and login of the user was ended."""
    account = idp.store.find_account(account.id)
    handle = begin_browser_session(idp, params.caller, account, session.amr.split(), session.auth_time, None)
    cookies = cookies_after_login(idp, params, account, handle)
    session = idp.store.find_browser_session(sha256(handle))
    return show_account(idp, params, session, account, handle=handle, cookies=cookies, **variables)


def end_all_others(idp, params, session, account):
    revoke_user(idp, params.caller.acting_as(account.id), account.id, "logout_all")
    return show_account_in_new_session(idp, params, session, account, notice="ended")


def reauthenticate(idp, params, account):
    """Verify the password, and the second factor if there is one.

    A recovery code is accepted, or a lost authenticator could never be replaced.
    """
    caller = browser_caller(idp, params)
    account, _ = authenticate_user(idp, caller, account.username, params.get("password") or "", only_password=True)
    if account.totp_sealed:
        check_second_factor(
            idp, caller, account.id, max(idp.now_ms(), account.revoked_before + 1),
            (params.get("totp") or "").strip(),
        )


def change_own_password(idp, params, session, account):
    new_password = params.get("new_password") or ""
    reauthenticate(idp, params, account)
    reset_password(idp, params.caller.acting_as(account.id), account.id, new_password)
    return show_account_in_new_session(idp, params, session, account, notice="password_changed")


def begin_own_totp(idp, params, session, account):
    if account.totp_sealed:
        raise Problem("invalid_request", log="there is a second factor already")
    reauthenticate(idp, params, account)  # an unattended browser must not suffice to lock its owner out
    seed = begin_totp(idp, params.caller.acting_as(account.id), account)
    return show_account(idp, params, session, account, seed=seed)


def confirm_own_totp(idp, params, session, account):
    if account.totp_sealed:
        raise Problem("invalid_request", log="there is a second factor already")
    confirm_totp(idp, params.caller.acting_as(account.id), account, (params.get("totp") or "").strip(), revoke=False)
    recovery = make_recovery_codes(idp, params.caller.acting_as(account.id), account.id)
    return show_account(idp, params, session, account, notice="totp_on", recovery=recovery)


def disable_own_totp(idp, params, session, account):
    reauthenticate(idp, params, account)
    disable_totp(idp, params.caller.acting_as(account.id), account, revoke=False)
    return show_account(idp, params, session, account, notice="totp_off")


def renew_own_codes(idp, params, session, account):
    if not account.totp_sealed:
        raise Problem("invalid_request", log="recovery codes without a second factor")
    reauthenticate(idp, params, account)
    recovery = make_recovery_codes(idp, params.caller.acting_as(account.id), account.id)
    return show_account(idp, params, session, account, recovery=recovery)


ACCOUNT_CHANGES = {
    "end_session": end_own_session, "end_login": end_own_login, "end_all": end_all_others,
    "revoke_consent": revoke_own_consent,
    "password": change_own_password, "begin_totp": begin_own_totp, "confirm_totp": confirm_own_totp,
    "disable_totp": disable_own_totp, "recovery_codes": renew_own_codes,
}


@AUTH(
    "POST", "/account", guard=anyone, spec="self-service", form=AccountForm, gives=bytes, gives_media="text/html",
    html=True, option="enable_pkce",
)
def account_change(idp, params):
    """End sessions, take consents back, change the password, or set up or remove the second factor.

    A change that weakens the account needs the password and the second factor.
    """
    handle = session_handle(idp, params)
    session, account = current_session(idp, params) or (None, None)
    if session is None or account is None:
        return open_login(idp, params, None)
    check_form(params, session_form_token(handle))
    try:
        return (
            ACCOUNT_CHANGES[params.need("action")](idp, params, session, account)
            if params.get("action") in ACCOUNT_CHANGES
            else show_account(idp, params, session, account, status=400, error="unknown")
        )
    except Problem as problem:
        if problem.code not in ("invalid_grant", "invalid_request", "slow_down"):
            raise
        Answer(idp).log_refusal(params.environ, problem.code, problem.status, problem.log)
        error = {"invalid_grant": "wrong_password", "slow_down": "wait"}.get(problem.code, "unknown")
        return show_account(
            idp, params, session, account, status=problem.status, failed=params.values.get("action", ""),
            error="weak_password" if "new_password" in (problem.errors or {}) else error,
        )


# -- administration by scope --


@AUTH("POST", "/user", guard=by_scope("admin:provision_users"), spec=OWN, takes=ProvisionUser, gives=UserObject)
def scoped_create_user(idp, claims, params):
    """Create a user."""
    return user_object(create_user(idp, params.caller, params.body))


@AUTH("GET", "/users", guard=by_scope("admin:list_users"), spec=OWN, query=ListUsers, gives=list[UserObject])
def scoped_list_users(idp, claims, params):
    """List the users by name, filtered by `q`, a page at a time."""
    rows, total = rows_of_users(idp, params.query)
    return paged_reply(params, [user_object(row) for row in rows], total)


@AUTH("GET", "/user/<id>", guard=by_scope("admin:read_user"), spec=OWN, gives=UserObject)
def scoped_get_user(idp, claims, params):
    """Return one user, by id or name."""
    return user_object(get_user(idp, params.path["id"]))


@AUTH("POST", "/user/<id>/reset", guard=by_scope("admin:reset_passwords"), spec=OWN, takes=ResetPassword, gives=Msg)
def scoped_reset_password(idp, claims, params):
    """Set a new password for a user who has no administrative right that the caller lacks."""
    reset_password(
        idp, params.caller, params.path["id"], params.body.new_password or params.body.password,
        delegated_rights(idp, claims),
    )
    return msg("Password reset; every login of the user is ended.")


def shown_invitation(row: Invitation) -> tuple[str, str, str, str, str, str]:
    return row.id, row.user_id, row.purpose, row.created_by, iso(row.created_ms // 1000), iso(row.expires_at)


def new_invitation(idp: Idp, row: Invitation, code: str) -> NewInvitation:
    return NewInvitation(*shown_invitation(row), f"{idp.options.auth_issuer}/invite?code={code}")


@AUTH(
    "POST", "/user/<id>/invitations", guard=by_scope(INVITES), spec=OWN, takes=Invite,
    gives=NewInvitation, option="enable_pkce",
)
def scoped_create_invitation(idp, claims, params):
    """Make a link by which a user, who has no administrative right that the caller lacks, chooses a password."""
    rights = delegated_rights(idp, claims)
    return new_invitation(
        idp, *create_invitation(idp, params.caller, params.path["id"], params.body.purpose, rights)
    )


@AUTH("POST", "/user/<id>/deactivate", guard=by_scope("admin:deactivate_users"), spec=OWN, gives=Msg)
def scoped_deactivate_user(idp, claims, params):
    """Deactivate a user who has no administrative right that the caller lacks, and end every login of the user."""
    set_user_active(idp, params.caller, params.path["id"], False, delegated_rights(idp, claims))
    return msg("User deactivated.")


# -- files --


@AUTH(
    "GET", ("/openapi.json", "/swagger/v1/swagger.json"), guard=anyone, spec="OpenAPI 3.1",
    option="enable_auth_swagger", tagged=True,
)
def auth_openapi(idp, params):
    """Return the OpenAPI description of this port."""
    return cached_page(idp, "auth_openapi", lambda: ENCODE(describe_port(idp, AUTH)))


@AUTH(
    "GET", "/swagger", guard=anyone, spec="OpenAPI 3.1", gives=bytes, gives_media="text/html",
    option="enable_auth_swagger",
)
def auth_swagger(idp, params):
    """Show the API description in a browser."""
    return swagger_file("index.html")


@AUTH(
    "GET", "/swagger/rapidoc-min.js", guard=anyone, spec="OpenAPI 3.1", gives=bytes, gives_media="text/javascript",
    option="enable_auth_swagger",
)
def auth_swagger_script(idp, params):
    """Return the script of that page."""
    return swagger_file("rapidoc-min.js")


@AUTH(
    "GET", "/", guard=anyone, spec=OWN, gives=bytes, leads=True, option="enable_pkce",
    unless="serve_public_auth_files",
)
def auth_root(idp, params):
    """Lead a browser to the account page, unless public files serve this path; 404 for whoever prefers no HTML."""
    require_browser(params)
    return Redirect(f"{idp.options.auth_issuer}/account")


@AUTH(
    "GET", PUBLIC_PATH, guard=anyone, spec=OWN, gives=bytes, gives_media="*/*",
    option="serve_public_auth_files",
)
def public_file(idp, params):
    """Return a file of public/ in the working directory, or of the bundled examples if there is none.

    A folder with an index.html is that page, at its path with a slash at the end; the path without it redirects there.
    """
    asked = params.path["path"]
    found = find_public_file(asked)
    if found is None:
        if not asked and idp.options.enable_pkce:
            return auth_root(idp, params)
        if not find_public_file(asked + "/"):
            raise Problem("not_found")
        # A page finds its neighbours by relative references, so it needs the slash. The Location is relative too,
        # because a proxy may have removed a part of the path; "./" makes it a path whatever the folder is called.
        query = params.environ.get("QUERY_STRING", "")
        return Redirect(f"./{quote(asked.rpartition('/')[2])}/" + (f"?{query}" if query else ""), status=308)
    root, path = found
    answer = bottle.static_file(path, root=root)
    if answer.status_code in (403, 404):
        raise Problem("not_found")
    policy = PAGE_POLICY if root == os.path.realpath(PUBLIC) else idp.options.public_csp
    if policy:
        answer.set_header("Content-Security-Policy", policy)
    return answer


# == ADMIN endpoints ===========================================================

ADMIN = Routes("admin")


@ADMIN("GET", "/ping", guard=anyone, spec=OWN, gives=Ping)
def admin_ping(idp, params):
    """Answer that the server is running."""
    return {"message": "pong from admin"}


@ADMIN("GET", "/version", guard=anyone, spec=OWN, gives=Version)
def admin_version(idp, params):
    """Return the name and version of the program."""
    return version(idp, params)


@ADMIN("GET", "/health", guard=anyone, spec="liveness", gives=Health)
def admin_health(idp, params):
    """Answer that the process is alive."""
    return {"status": "ok"}


@ADMIN("GET", "/health/ready", guard=anyone, spec="readiness", gives=Health)
def admin_ready(idp, params):
    """Tell whether the database can be written, the keys are loaded and the clock is plausible."""
    return ready(idp, params)


@ADMIN("GET", "/status", guard=by_admin, spec=OWN, gives=StatusObject)
def admin_status(idp, claims, params):
    """Tell how the box is: processes, ports, clock, certificates, backups, disk, and what needs attention."""
    return idp.machine.read_status(idp)


@ADMIN(
    "GET", "/.well-known/microauthd/ca.pem", guard=anyone, spec=OWN, gives=bytes,
    gives_media="application/x-x509-ca-cert", tagged=True, option="tls",
)
def admin_ca(idp, params):
    """Return the root of the box's own CA as PEM. Compare its fingerprint with what the box itself shows."""
    return ca(idp, params)


@ADMIN("POST", "/token", guard=anyone, spec=OWN, form=AdminTokenForm, gives=TokenObject)
def admin_token(idp, params):
    """Log an administrator in.

    `totp` is needed if the user has a second factor; `client_id` is recorded and not checked.
    """
    username, password, client_id = params.need("username"), params.need("password"), params.get("client_id") or ""
    totp = params.get("totp") or params.get("totp_code") or ""
    account, amr = authenticate_user(idp, browser_caller(idp, params), username, password, totp, admin=True)
    return issue_admin(idp, params.caller, account, amr, client_id[:255])


@ADMIN("POST", "/logout", guard=by_admin, spec="mad session logout", form=BearerForm, gives=Msg)
def admin_logout(idp, claims, params):
    """End the login that the token belongs to, or the session at the console."""
    if params.console:
        end_console(idp, params.caller, params.console)
    else:
        revoke_family(idp, params.caller, claims["sid"], "logout", "admin")
    return msg("Logged out.")


# -- the console --


def console_object(idp: Idp, params, console: AdminSession, account: Account, handle: str | None) -> ConsoleObject:
    assert handle
    is_known = is_at_its_place(params.caller, console)
    return ConsoleObject(
        ConsoleUser(account.id, account.username, account.email), console_form_token(idp, handle),
        iso(console.expires_at), iso(console.last_seen_at + idp.options.console_idle_expiration),
        iso(console.proven_at + PROOF_TTL) if is_known else None, bool(account.totp_sealed), iso(idp.now()),
        idp.options.password_min_length,
    )


@ADMIN("POST", "/dashboard/session", guard=anyone, spec=OWN, takes=SignIn, gives=ConsoleObject)
def admin_sign_in(idp, params):
    """Sign an administrator in at the console, which sets a cookie; 403 for every cause of failure."""
    check_own_page(idp, params)
    body, caller = params.body, browser_caller(idp, params)
    account, amr = authenticate_user(idp, caller, body.username, body.password, body.totp, admin=True)
    handle, console = begin_console(idp, params.caller, account, amr, console_handle(params))
    cookies = [
        make_console_cookie(params.environ, handle, idp.options.console_absolute_expiration),
        make_cookie(idp, DEVICE_COOKIE, sign_device(idp, caller, account), DEVICE_TTL),
    ]
    shown = console_object(idp, params, console, account, handle)
    return Reply(shown, [("Set-Cookie", cookie) for cookie in cookies])


@ADMIN("GET", "/dashboard/session", guard=by_console, spec=OWN, gives=ConsoleObject)
def admin_console_session(idp, found, params):
    """Return the caller's session at the console, with its form token."""
    console, account = found
    return console_object(idp, params, console, account, console_handle(params))


@ADMIN("POST", "/dashboard/session/proof", guard=by_console, spec=OWN, takes=Proof, gives=ConsoleObject)
def admin_prove(idp, found, params):
    """Take the password again, and the one-time code of whoever has a second factor; 403 for every cause of failure."""
    console, account = found
    account, amr = authenticate_user(
        idp, browser_caller(idp, params), account.username, params.body.password, params.body.totp, admin=True
    )
    console = prove_console(idp, params.caller, console, account, amr)
    return console_object(idp, params, console, account, console_handle(params))


@ADMIN("DELETE", "/dashboard/session", guard=by_console, spec=OWN, gives=Msg)
def admin_sign_out(idp, found, params):
    """Sign out of the console."""
    end_console(idp, params.caller, found[0])
    headers = [("Set-Cookie", make_console_cookie(params.environ, "", 0)), ("Clear-Site-Data", '"cache", "storage"')]
    return Reply(msg("Signed out."), headers)


@ADMIN("GET", "/dashboard/sessions", guard=by_admin, spec=OWN, gives=list[ConsoleSession])
def admin_list_own_sessions(idp, claims, params):
    """List the caller's own sessions at the console, and logins for ADMIN tokens."""
    return list_own_sessions(idp, claims["sub"], claims["sid"])


@ADMIN("DELETE", "/dashboard/sessions", guard=by_admin, spec=OWN, gives=Msg)
def admin_end_other_sessions(idp, claims, params):
    """End the caller's own sessions at the console and logins for ADMIN tokens, but for that of this request."""
    return msg(f"{end_own_sessions(idp, params.caller, claims['sub'], claims['sid'])} sessions ended.")


@ADMIN("DELETE", "/dashboard/sessions/<id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_end_own_session(idp, claims, params):
    """End one of the caller's own sessions at the console, or logins for ADMIN tokens."""
    end_own_sessions(idp, params.caller, claims["sub"], claims["sid"], params.path["id"])
    return msg("Session ended.")


CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
UNUSED_FEATURES = (
    "accelerometer", "autoplay", "camera", "display-capture", "encrypted-media", "fullscreen", "geolocation",
    "gyroscope", "hid", "idle-detection", "magnetometer", "microphone", "midi", "payment", "picture-in-picture",
    "publickey-credentials-create", "screen-wake-lock", "serial", "usb", "xr-spatial-tracking",
)
CONSOLE_HEADERS = (
    ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", ", ".join([
        *(f"{feature}=()" for feature in UNUSED_FEATURES), "clipboard-write=(self)", "publickey-credentials-get=(self)",
    ])),
)


@ADMIN("GET", "/dashboard/", guard=anyone, spec=OWN, gives=bytes, gives_media="text/html", tagged=True)
def admin_console(idp, params):
    """Return the document of the console, in the language of the browser; its files have a version in their path."""
    language = idp.pages.choose_language(params.environ.get("HTTP_ACCEPT_LANGUAGE", ""))
    content = idp.console.document(language, idp.brand)
    return Page(
        content, "text/html; charset=utf-8", etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        headers=[*CONSOLE_HEADERS, ("Vary", "Accept-Language")], policy=CONSOLE_POLICY, cache_control="no-cache",
    )


# The console fills in what it is to show: nothing of an address gets into the page. No script runs in it and no form of
# it is sent.
PREVIEW_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)
PREVIEW_NAME = "\ue000"  # where the console puts a name: a character for private use. Unicode §23.5


@ADMIN(
    "GET", "/dashboard/preview", guard=anyone, spec=OWN, query=PreviewPage, gives=bytes, gives_media="text/html",
    tagged=True,
)
def admin_preview(idp, params):
    """Return the sign-in page with gaps, for the console: it fills in a brand that is not saved yet, and shows it."""
    language = idp.pages.choose_language(params.environ.get("HTTP_ACCEPT_LANGUAGE", ""), params.query.lang[:35])
    files = f"files/{idp.console.version}"
    content = idp.pages.render(
        "sign_in", text=idp.pages.texts[language], language=language, base="", script="", brand=PREVIEW_NAME,
        style=f"{files}/login.{idp.brand.color[1:]}.light.css", logo=f"{files}/icon.svg", error="", client="",
        picture="", host="", tx="", form="", username="", help="", help_link=False,
    )
    content = re.sub(rb"\sautofocus\b", b"", content)  # a frame without scripts may not take the focus. HTML §6.6.7
    return Page(
        content, "text/html; charset=utf-8", etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        headers=[("Cross-Origin-Resource-Policy", "same-origin"), ("Vary", "Accept-Language")],
        policy=PREVIEW_POLICY, cache_control="no-cache",
    )


@ADMIN("GET", "/dashboard/files/<version>/<name:path>", guard=anyone, spec=OWN, gives=bytes, gives_media="*/*")
def admin_console_file(idp, params):
    """Return a file of the console, of this version of it."""
    if params.path["version"] != idp.console.version:
        raise Problem("not_found")
    file = idp.console.find(params.path["name"])
    if file is None:
        shown = show_logo(idp, params.path["name"], cache=31536000)
        shown.headers.append(("Cross-Origin-Resource-Policy", "same-origin"))
        return shown
    headers = [("Cross-Origin-Resource-Policy", "same-origin"), ("Vary", "Accept-Encoding")]
    accepted = params.environ.get("HTTP_ACCEPT_ENCODING", "").lower()
    is_packed = re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted) is not None
    if is_packed:
        headers.append(("Content-Encoding", "gzip"))
    return Page(
        file.packed if is_packed else file.content(), file.content_type, headers=headers,
        cache_control="public, max-age=31536000, immutable",
    )


@ADMIN(
    "GET", ("/", "/dashboard", "/Dashboard", "/Login"), guard=anyone, spec="addresses of the original", gives=bytes,
    leads=True,
)
def admin_to_console(idp, params):
    """Lead a browser to the console; 404 for whoever does not prefer HTML."""
    require_browser(params)
    return Redirect("dashboard/")


# -- resources --


class Resource(msgspec.Struct, frozen=True):
    """What the routes of one kind of record need: its representation and the services on it."""

    name: str  # singular; its plural is the path
    show: Callable  # (idp, records): their representations
    gives: Any  # the type of the representation
    query: type  # the parameters of the list
    rows: Callable  # (idp, query): the records of a page, and the number of all
    get: Callable  # (idp, id or name)
    update: Callable  # (idp, caller, id or name, body)
    changes: type
    delete: Callable  # (idp, caller, id or name)
    create: Callable | None = None  # (idp, caller, body); None if its route is declared separately
    listed: Any = None  # the type of the representation in a list, if that is another
    show_list: Callable | None = None  # (idp, query, records): their representations in a list, if these differ
    takes: type | None = None
    proof_of_update: Callable | None = None  # `proof` of the route
    proof_of_delete: Callable | None = None


def declare_resource(resource: Resource, *sentences: str):
    """Declare POST and GET of the collection, GET, PUT and DELETE of one by id or name, and the id of a name.

    `sentences` describe the routes, in this order: create, list, get, id of a name, update, delete.
    """
    kind, gives = resource.name, resource.gives
    page = list[resource.listed or gives]  # type: ignore[misc,valid-type]
    all_, one = f"/{kind}s", f"/{kind}s/<id>"

    def show(idp, record):
        return resource.show(idp, [record])[0]

    def shown(idp, params):
        return show(idp, resource.get(idp, params.path["id"]))

    def create(idp, claims, params):
        assert resource.create
        return show(idp, resource.create(idp, params.caller, params.body))

    def list_(idp, claims, params):
        rows, total = resource.rows(idp, params.query)
        show_list = resource.show_list or (lambda idp, query, rows: resource.show(idp, rows))
        return paged_reply(params, show_list(idp, params.query, rows), total)

    def get(idp, claims, params):
        return shown(idp, params)

    def id_(idp, claims, params):
        return Found(show(idp, resource.get(idp, params.path["name"])).id)

    def update(idp, claims, params):
        with if_match(idp, params, lambda: shown(idp, params)):
            return show(idp, resource.update(idp, params.caller, params.path["id"], params.body))

    def delete(idp, claims, params):
        with if_match(idp, params, lambda: shown(idp, params)):
            resource.delete(idp, params.caller, params.path["id"])
        return msg(f"{kind.capitalize()} deleted.")

    routes: list[tuple[Callable, str, str, str, dict[str, Any]]] = [
        (create, f"create_{kind}", "POST", all_, {"takes": resource.takes, "gives": gives}),
        (list_, f"list_{kind}s", "GET", all_, {"query": resource.query, "gives": page}),
        (get, f"get_{kind}", "GET", one, {"gives": gives, "versioned": True}),
        (id_, f"{kind}_id", "GET", f"{all_}/id-by-name/<name>", {"gives": Found}),
        (update, f"update_{kind}", "PUT", one, {
            "takes": resource.changes, "gives": gives, "versioned": True, "proof": resource.proof_of_update,
        }),
        (delete, f"delete_{kind}", "DELETE", one, {
            "gives": Msg, "versioned": True, "proof": resource.proof_of_delete,
        }),
    ]
    for (handler, name, method, path, more), sentence in zip(
        routes if resource.create else routes[1:], sentences, strict=True
    ):
        handler.__name__, handler.__doc__ = f"admin_{name}", sentence
        ADMIN(method, path, guard=by_admin, spec=OWN, **more)(handler)


def each(show: Callable) -> Callable:
    """Return the `show` of a resource whose records are represented one by one."""
    return lambda idp, records: [show(record) for record in records]


def rows_by_name(list_rows: str) -> Callable:
    """Return the `rows` of a resource whose list takes no parameters of its own."""
    return lambda idp, query: getattr(idp.store, list_rows)(query.q, query.sort, query.limit, query.offset)


# -- users --


def read_moment(value, member, default) -> int:
    moment = default if value in (None, "") else read_time(value)
    if moment is None:
        reject(**{member: "must be an ISO 8601 date-time or Unix seconds"})
    assert moment is not None
    return moment


def name_of_actor(idp: Idp, actor: str) -> str:
    """Return the user name of an actor of the audit log, or the actor itself if that is no user."""
    account = idp.store.find_account(actor) if actor else None
    return account.username if account else actor


def show_users(idp: Idp, accounts: list[Account]) -> list[UserDetails]:
    """Return users as ADMIN shows them, with their roles, by one query for all."""
    details: dict[str, list] = {account.id: [] for account in accounts}
    for row in idp.store.describe_users(details):
        details[row.user_id].append(row)
    shown = []
    for account in accounts:
        rows = details[account.id]
        roles = [row.role for row in rows if row.role]
        shown.append(
            UserDetails(
                **msgspec.structs.asdict(user_object(account)), last_login_at=iso(account.last_login_at),
                is_admin=MAD_ADMIN_ROLE_NAME in roles, roles=roles, totp_locked_until=iso(account.totp_locked_until),
                lockout_reason=account.lockout_reason, lockout_by=name_of_actor(idp, account.lockout_by),
                recovery_codes_left=sum(row.codes for row in rows),
            )
        )
    return shown


def search_users(idp: Idp, query: SearchUsers) -> tuple[list, int]:
    unused_since = read_moment(query.unused_since, "unused_since", 0) or None
    role_id = get_role(idp, query.role).id if query.role else None
    return rows_of_users(
        idp, query, is_admin=query.is_admin, locked=query.locked, totp=query.totp, role_id=role_id,
        unused_since=unused_since, now=idp.now(),
    )


declare_resource(
    Resource(
        "user", show=show_users, gives=UserDetails, query=SearchUsers, rows=search_users, get=get_user,
        create=create_user, takes=CreateUser, update=update_user, changes=UpdateUser, delete=delete_user,
        proof_of_update=of_administrator, proof_of_delete=always,
    ),
    "Create a user.",
    "List the active users, or those that `is_active` selects, filtered by `q` and what they have, a page at a time.",
    "Return one user, by id or name.",
    "Return the id of a user name.",
    "Change the members of a user that are sent; an id in the body is ignored. Honours If-Match.",
    "Delete a user and everything that belongs to it. Honours If-Match.",
)


@ADMIN("POST", "/users/<id>/verify-email", guard=by_admin, spec=OWN, gives=Msg, proof=of_administrator)
def admin_verify_email(idp, claims, params):
    """Mark the e-mail address of a user as verified."""
    verify_email(idp, params.caller, params.path["id"])
    return msg("E-mail address verified.")


@ADMIN(
    "POST", ("/users/deactivate/<id>", "/users/<id>/deactivate"), guard=by_admin, spec=OWN, gives=Msg,
    proof=of_administrator,
)
def admin_deactivate_user(idp, claims, params):
    """Deactivate a user, and end every login of the user."""
    set_user_active(idp, params.caller, params.path["id"], False)
    return msg("User deactivated.")


@ADMIN("POST", "/users/<id>/activate", guard=by_admin, spec=OWN, gives=Msg, proof=of_administrator)
def admin_activate_user(idp, claims, params):
    """Activate a user."""
    set_user_active(idp, params.caller, params.path["id"], True)
    return msg("User activated.")


@ADMIN("POST", "/users/<id>/reset", guard=by_admin, spec=OWN, takes=ResetPassword, gives=Msg, proof=of_administrator)
def admin_reset_password(idp, claims, params):
    """Set a new password for a user, and end every login of the user."""
    reset_password(idp, params.caller, params.path["id"], params.body.new_password or params.body.password)
    return msg("Password reset; every login of the user is ended.")


@ADMIN("POST", "/users/<id>/set-lockout", guard=by_admin, spec=OWN, takes=SetLockout, gives=Msg, proof=of_administrator)
def admin_set_lockout(idp, claims, params):
    """Lock a user out until a time, and end every login of the user; null or the year 1 clears every lockout."""
    set_lockout(idp, params.caller, params.path["id"], params.body.lockout_until, params.body.reason)
    return msg("Lockout set." if read_lockout(idp, params.body.lockout_until) else "Lockout cleared.")


@ADMIN("POST", "/users/<id>/clear-lockout", guard=by_admin, spec=OWN, gives=Msg, proof=of_administrator)
def admin_clear_lockout(idp, claims, params):
    """Clear every lockout of a user, of passwords and of one-time codes."""
    set_lockout(idp, params.caller, params.path["id"], None)
    return msg("Lockout cleared.")


@ADMIN("POST", "/users/<id>/revoke", guard=by_admin, spec=OWN, gives=Msg, proof=of_administrator)
def admin_revoke_user(idp, claims, params):
    """End every login, session and token of a user, on both ports."""
    with idp.store.transaction():
        revoke_user(idp, params.caller, get_user(idp, params.path["id"]).id, "user_revoked")
    return msg("Everything issued to the user is revoked.")


@ADMIN("GET", "/users/<id>/consents", guard=by_admin, spec=OWN, gives=list[ConsentObject])
def admin_list_consents_of_user(idp, claims, params):
    """List what a user consented to, by client."""
    return [
        ConsentObject(row.client_id, row.display_name, row.scope.split(), iso(row.given_at))
        for row in idp.store.list_consents(get_user(idp, params.path["id"]).id)
    ]


@ADMIN("DELETE", "/users/<id>/consents/<client_id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_revoke_consent(idp, claims, params):
    """Take back the consent of a user for a client, and end the logins of the user there."""
    revoke_consent(idp, params.caller, get_user(idp, params.path["id"]), params.path["client_id"])
    return msg("Consent revoked; every login of the user at the client is ended.")


@ADMIN(
    "POST", "/users/<id>/invitations", guard=by_admin, spec=OWN, takes=Invite, gives=NewInvitation,
    option="enable_pkce", proof=of_administrator,
)
def admin_create_invitation(idp, claims, params):
    """Make a link by which a user chooses a password, once within 24 hours; it replaces an earlier one."""
    return new_invitation(idp, *create_invitation(idp, params.caller, params.path["id"], params.body.purpose))


@ADMIN(
    "GET", "/users/<id>/invitations", guard=by_admin, spec=OWN, gives=list[InvitationObject], option="enable_pkce"
)
def admin_list_invitations(idp, claims, params):
    """List the living invitation of a user, if there is one, without its link."""
    found = idp.store.find_invitation_of(get_user(idp, params.path["id"]).id)
    return [InvitationObject(*shown_invitation(found))] if found and may_invite(idp, found) else []


@ADMIN("DELETE", "/invitations/<id>", guard=by_admin, spec=OWN, gives=Msg, option="enable_pkce")
def admin_delete_invitation(idp, claims, params):
    """End an invitation before it is used."""
    delete_invitation(idp, params.caller, params.path["id"])
    return msg("Invitation ended.")


@ADMIN(
    "GET", "/clients/<id>/consents", guard=by_admin, spec=OWN, query=Paged, gives=list[UserConsentObject]
)
def admin_list_consents_for_client(idp, claims, params):
    """List what users consented to for a client, a page at a time."""
    client = get_client(idp, params.path["id"])
    rows, total = idp.store.list_consents_for(client.row.id, params.query.limit, params.query.offset)
    shown = [UserConsentObject(row.id, row.username, row.scope.split(), iso(row.given_at)) for row in rows]
    return paged_reply(params, shown, total)


@ADMIN("DELETE", "/clients/<id>/consents", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_revoke_consents_for_client(idp, claims, params):
    """Take back the consents of every user for a client, and end every token and login of the client."""
    count = revoke_consents(idp, params.caller, get_client(idp, params.path["id"]), sleep)
    return msg(f"{count} consents revoked.")


@ADMIN("DELETE", "/consents", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_revoke_all_consents(idp, claims, params):
    """Take back every consent of every user, and end every token and login of the clients that had any."""
    clients = [load_client(idp, id) for id in idp.store.list_clients_with_consents()]
    # The consents for a client that is deleted go with it.
    count = sum(revoke_consents(idp, params.caller, client, sleep) for client in clients if client)
    return msg(f"{count} consents revoked.")


@ADMIN("POST", "/users/verify-password", guard=by_admin, spec=OWN, takes=VerifyPassword, gives=PasswordVerdict)
def admin_verify_password(idp, claims, params):
    """Verify the password of a user who could log in; 403 for every cause of failure."""
    account = verify_password(idp, params.caller, params.body)
    return PasswordVerdict(True, account.id, account.email, bool(account.totp_sealed))


# -- second factor --


@ADMIN("POST", "/users/<id>/totp/enroll", guard=by_admin, spec=OWN, takes=EnrolTotp, gives=TotpEnrolment, proof=always)
def admin_enrol_totp(idp, claims, params):
    """Make a second factor for a user, and return its otpauth URI, seed and QR code once.

    It is enabled when its first code is verified.
    """
    account, issuer_name = get_user(idp, params.path["id"]), totp_issuer(idp, params.body.client_id)
    seed = begin_totp(idp, params.caller, account)
    uri = totp_uri(seed, account.username, issuer_name)
    return TotpEnrolment(True, uri, seed, draw_qr(uri).decode())


@ADMIN("POST", "/users/<id>/totp/generate", guard=by_admin, spec=OWN, takes=GenerateTotp, gives=TotpQr, proof=always)
def admin_generate_totp(idp, claims, params):
    """Make a second factor for a user, and write its QR code to a file below totp-qr-output-root.

    The file is removed when the factor is confirmed, replaced or disabled, or its user deleted.
    """
    account, issuer_name = get_user(idp, params.path["id"]), totp_issuer(idp, params.body.client_id)
    root = idp.options.totp_qr_output_root
    if not account.is_active:
        raise Problem("not_found", log="the user is inactive")
    if not root:
        raise Problem("temporarily_unavailable", log="totp-qr-output-root is not set")
    name, seed = f"totp_qr_{secrets.token_hex(6)}.svg", new_totp_seed()
    qr_code = draw_qr(totp_uri(seed, account.username, issuer_name))
    try:
        path = write_below(root, params.body.qr_output_path, name, qr_code)
    except ValueError as error:
        reject(qr_output_path=str(error))
    except OSError as error:
        raise Problem("temporarily_unavailable", log=f"the QR file cannot be written: {error.strerror}") from None
    begin_totp(idp, params.caller, account, seed, path)
    return TotpQr(True, name, name)


@ADMIN(
    "POST", "/users/<id>/totp/verify", guard=by_admin, spec=OWN, takes=ConfirmTotp, gives=TotpConfirmed, proof=always
)
def admin_confirm_totp(idp, claims, params):
    """Enable a new second factor by its first code, and return recovery codes once; 403 if the code is wrong."""
    account = get_user(idp, params.path["id"])
    confirm_totp(idp, params.caller, account, params.body.code)
    return TotpConfirmed(True, "Second factor enabled.", make_recovery_codes(idp, params.caller, account.id))


@ADMIN(
    "POST", "/users/<id>/recovery-codes", guard=by_admin, spec="recovery codes", gives=RecoveryCodes, proof=always
)
def admin_make_recovery_codes(idp, claims, params):
    """Make new recovery codes for a user who has a second factor, and return them once; the earlier ones are void."""
    account = get_user(idp, params.path["id"])
    reject(id="" if account.totp_sealed else "has no second factor")
    return RecoveryCodes(make_recovery_codes(idp, params.caller, account.id))


@ADMIN("POST", "/users/totp/verify", guard=by_admin, spec=OWN, takes=VerifyTotp, gives=Msg, proof=always)
def admin_verify_totp(idp, claims, params):
    """Enable a new second factor by its first code, with the user in the body."""
    totp_issuer(idp, params.body.client_id)
    confirm_totp(idp, params.caller, get_user(idp, params.body.user_id), params.body.code)
    return msg("Second factor enabled.")


@ADMIN("POST", "/users/<id>/disable-totp", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_disable_totp(idp, claims, params):
    """Disable the second factor of a user."""
    disable_totp(idp, params.caller, get_user(idp, params.path["id"]))
    return msg("Second factor disabled.")


@ADMIN("POST", "/users/<id>/<client_id>/disable-totp", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_disable_client_totp(idp, claims, params):
    """Disable the second factor of a user, if the client demands one; it is the user's at every client."""
    totp_issuer(idp, params.path["client_id"])
    disable_totp(idp, params.caller, get_user(idp, params.path["id"]))
    return msg("Second factor disabled.")


# -- roles --


def role_object(role: Role) -> RoleObject:
    return RoleObject(
        role.id, role.name, role.description, bool(role.is_protected), bool(role.is_active), bool(role.is_privileged)
    )


def show_roles(idp: Idp, query: ListRoleMatrix, roles: list[Role]) -> list[RoleWithMore]:
    """Return the roles of a list with what the query asks for, by one query for all. Raises invalid_request."""
    more = {word.strip() for word in query.more.split(",")} - {""}
    if more - {"permissions", "user_count"}:
        reject(**{"with": "must be permissions, user_count or both"})
    shown = [RoleWithMore(**msgspec.structs.asdict(role_object(role))) for role in roles]
    if "permissions" in more:
        of_role: dict[str, list[NameRef]] = {}
        for row in idp.store.list_permissions_by_role():
            of_role.setdefault(row.role_id, []).append(NameRef(row.id, row.name))
        for role in shown:
            role.permissions = of_role.get(role.id, [])
    if "user_count" in more:
        counts = idp.store.count_users_by_role(role.id for role in shown)
        for role in shown:
            role.user_count = counts.get(role.id, 0)
    return shown


declare_resource(
    Resource(
        "role", show=each(role_object), gives=RoleObject, query=ListRoleMatrix, listed=RoleWithMore,
        show_list=show_roles, rows=rows_by_name("list_roles"), get=get_role,
        create=create_role, takes=CreateRole, update=update_role, changes=UpdateRole, delete=delete_role,
    ),
    "Create a role.",
    "List the roles by name, filtered by `q`, a page at a time, `with` their permissions and how many users have them.",
    "Return one role, by id or name.",
    "Return the id of a role name.",
    "Change the members of a role that are sent. Honours If-Match.",
    "Delete a role, and end the logins of the users who had it. Honours If-Match.",
)


@ADMIN("POST", "/roles/assign", guard=by_admin, spec=OWN, takes=RoleMember, gives=Msg, proof=of_administrators)
def admin_assign_role(idp, claims, params):
    """Assign a role to a user."""
    assign_role(idp, params.caller, params.body.user_id, params.body.role_id)
    return msg("Role assigned.")


@ADMIN(
    "POST", ("/roles/unassign", "/roles/remove"), guard=by_admin, spec=OWN, takes=RoleMember, gives=Msg,
    proof=of_administrators,
)
def admin_unassign_role(idp, claims, params):
    """Remove a role from a user, and end what was issued with it."""
    unassign_role(idp, params.caller, params.body.user_id, params.body.role_id)
    return msg("Role unassigned.")


@ADMIN("GET", "/roles/user/<id>", guard=by_admin, spec=OWN, gives=list[str])
def admin_list_role_ids_of_user(idp, claims, params):
    """List the ids of the roles of a user."""
    return [role.id for role in idp.store.list_roles_of(get_user(idp, params.path["id"]).id)]


def roles_of_user(idp: Idp, params) -> list[NameRef]:
    return [NameRef(role.id, role.name) for role in idp.store.list_roles_of(get_user(idp, params.path["id"]).id)]


@ADMIN(
    "GET", "/users/<id>/roles", guard=by_admin, spec=OWN, query=ListRoles, gives=list[NameRef], versioned=True
)
def admin_list_roles_of_user(idp, claims, params):
    """List the roles of a user, or with `all` every active role."""
    own = roles_of_user(idp, params)
    every = idp.store.list_roles()[0] if params.query.all else ()
    return [NameRef(role.id, role.name) for role in every if role.is_active] if params.query.all else own


@ADMIN(
    "PUT", "/users/<id>/roles", guard=by_admin, spec=OWN, takes=list[RoleRef] | SetRoles, gives=Msg,
    proof=of_administrators, versioned=True,
)
def admin_set_roles(idp, claims, params):
    """Replace the roles of a user, all or none. Honours If-Match."""
    roles = params.body.roles if isinstance(params.body, SetRoles) else params.body
    with if_match(idp, params, lambda: roles_of_user(idp, params)):
        set_roles(idp, params.caller, params.path["id"], [role.id for role in roles if role.id.strip()])
    return msg("Roles set.")


@ADMIN("GET", "/roles/<id>/users", guard=by_admin, spec=OWN, query=Paged, gives=list[UserDetails])
def admin_list_users_of_role(idp, claims, params):
    """List the users who have a role, a page at a time."""
    rows, total = idp.store.list_accounts(
        is_active=None, role_id=get_role(idp, params.path["id"]).id, limit=params.query.limit,
        offset=params.query.offset,
    )
    return paged_reply(params, show_users(idp, rows), total)


# -- permissions --


def name_ref(row: Permission) -> NameRef:
    return NameRef(row.id, row.name)


declare_resource(
    Resource(
        "permission", show=each(name_ref), gives=NameRef, query=ListNamed,
        rows=rows_by_name("list_permissions"), get=get_permission, create=create_permission,
        takes=CreatePermission, update=update_permission, changes=UpdatePermission, delete=delete_permission,
    ),
    "Create a permission.",
    "List the permissions by name, filtered by `q`, a page at a time.",
    "Return one permission, by id or name.",
    "Return the id of a permission name.",
    "Rename a permission. Honours If-Match.",
    "Delete a permission. Honours If-Match.",
)


@ADMIN("GET", "/permissions/retrieve/all", guard=by_admin, spec=OWN, gives=list[NameRef])
def admin_retrieve_permissions(idp, claims, params):
    """List every permission."""
    return [name_ref(row) for row in idp.store.list_permissions()[0]]


@ADMIN("POST", "/permissions/assign", guard=by_admin, spec=OWN, takes=PermissionMember, gives=Msg)
def admin_assign_permission_to(idp, claims, params):
    """Assign a permission to a role, both named in the body."""
    assign_permission(idp, params.caller, params.body.role_id, params.body.permission_id)
    return msg("Permission assigned.")


@ADMIN("POST", "/permissions/remove", guard=by_admin, spec=OWN, takes=PermissionMember, gives=Msg)
def admin_remove_permission_from(idp, claims, params):
    """Remove a permission from a role, both named in the body."""
    remove_permission(idp, params.caller, params.body.role_id, params.body.permission_id)
    return msg("Permission removed.")


@ADMIN("GET", ("/roles/<id>/permissions", "/permissions/retrieve/<id>"), guard=by_admin, spec=OWN, gives=list[NameRef])
def admin_list_permissions_of_role(idp, claims, params):
    """List the permissions of a role."""
    return [name_ref(row) for row in idp.store.list_permissions_of_role(get_role(idp, params.path["id"]).id)]


@ADMIN("POST", "/roles/<id>/permissions", guard=by_admin, spec=OWN, takes=AssignPermission, gives=Msg)
def admin_assign_permission(idp, claims, params):
    """Assign a permission to a role."""
    assign_permission(idp, params.caller, params.path["id"], params.body.permission_id)
    return msg("Permission assigned.")


@ADMIN("DELETE", "/roles/<id>/permissions/<permission_id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_remove_permission(idp, claims, params):
    """Remove a permission from a role."""
    remove_permission(idp, params.caller, params.path["id"], params.path["permission_id"])
    return msg("Permission removed.")


@ADMIN("GET", "/permissions/user/<id>", guard=by_admin, spec=OWN, gives=list[NameRef])
def admin_list_permissions_of_user(idp, claims, params):
    """List the permissions that a user has by its roles."""
    return [name_ref(row) for row in idp.store.list_permissions_of_user(get_user(idp, params.path["id"]).id)]


@ADMIN("GET", "/permissions/<id>/roles", guard=by_admin, spec=OWN, gives=list[RoleObject])
def admin_list_roles_with_permission(idp, claims, params):
    """List the roles that have a permission."""
    return [role_object(role) for role in idp.store.list_roles_with(get_permission(idp, params.path["id"]).id)]


@ADMIN("POST", "/check-access", guard=by_admin, spec=OWN, takes=CheckAccess, gives=AccessVerdict)
def admin_check_access(idp, claims, params):
    """Tell whether a user has a permission or may be granted a scope; no, if either is unknown."""
    return check_access(idp, params.body)


# -- scopes --


def scope_object(scope: Scope) -> ScopeObject:
    return ScopeObject(
        scope.id, scope.name, scope.description, bool(scope.is_active), bool(scope.is_protected), iso(scope.created_at),
        scope.description,
    )


declare_resource(
    Resource(
        "scope", show=each(scope_object), gives=ScopeObject, query=ListNamed,
        rows=rows_by_name("list_scopes"), get=get_scope,
        create=create_scope, takes=CreateScope, update=update_scope, changes=UpdateScope, delete=delete_scope,
    ),
    "Create a scope.",
    "List the scopes by name, filtered by `q`, a page at a time.",
    "Return one scope, by id or name.",
    "Return the id of a scope name.",
    "Change the members of a scope that are sent; a protected one keeps its name. Honours If-Match.",
    "Delete a scope. Honours If-Match.",
)


@ADMIN(
    "GET", ("/users/<id>/scopes", "/scopes/user/<id>"), guard=by_admin, spec=OWN, gives=list[ScopeObject],
    versioned=True,
)
def admin_list_scopes_of_user(idp, claims, params):
    """List the scopes that a user may be granted."""
    return [scope_object(scope) for scope in idp.store.list_scopes_of_user(get_user(idp, params.path["id"]).id)]


@ADMIN(
    "PUT", "/users/<id>/scopes", guard=by_admin, spec=OWN, takes=SetScopes, gives=list[ScopeObject], versioned=True,
    proof=of_administrator,
)
def admin_set_scopes_of_user(idp, claims, params):
    """Replace the scopes of a user, all or none. Honours If-Match."""
    with if_match(idp, params, lambda: admin_list_scopes_of_user(idp, claims, params)):
        set_scopes(idp, params.caller, get_user(idp, params.path["id"]), params.body.scope_ids)
        return admin_list_scopes_of_user(idp, claims, params)


@ADMIN("POST", "/users/<id>/scopes", guard=by_admin, spec=OWN, takes=AssignScopes, gives=Msg, proof=of_administrator)
def admin_assign_scopes_to_user(idp, claims, params):
    """Assign scopes to a user, all or none."""
    added = assign_scopes(idp, params.caller, get_user(idp, params.path["id"]), params.body.ids)
    return msg(f"{added} scopes assigned.")


@ADMIN("DELETE", "/users/<id>/scopes/<scope_id>", guard=by_admin, spec=OWN, gives=Msg, proof=of_administrator)
def admin_remove_scope_from_user(idp, claims, params):
    """Remove a scope from a user."""
    remove_scope(idp, params.caller, get_user(idp, params.path["id"]), params.path["scope_id"])
    return msg("Scope removed.")


@ADMIN(
    "GET", ("/clients/<id>/scopes", "/scopes/client/<id>"), guard=by_admin, spec=OWN, gives=list[ScopeObject],
    versioned=True,
)
def admin_list_scopes_of_client(idp, claims, params):
    """List the scopes that a client may request."""
    return [scope_object(scope) for scope in idp.store.list_scopes_of_client(get_client(idp, params.path["id"]).row.id)]


@ADMIN(
    "PUT", "/clients/<id>/scopes", guard=by_admin, spec=OWN, takes=SetScopes, gives=list[ScopeObject], versioned=True
)
def admin_set_scopes_of_client(idp, claims, params):
    """Replace the scopes of a client, all or none. Honours If-Match."""
    with if_match(idp, params, lambda: admin_list_scopes_of_client(idp, claims, params)):
        set_scopes(idp, params.caller, get_client(idp, params.path["id"]), params.body.scope_ids)
        return admin_list_scopes_of_client(idp, claims, params)


@ADMIN("POST", "/clients/<id>/scopes", guard=by_admin, spec=OWN, takes=AssignScopes, gives=Msg)
def admin_assign_scopes_to_client(idp, claims, params):
    """Assign scopes to a client, all or none."""
    added = assign_scopes(idp, params.caller, get_client(idp, params.path["id"]), params.body.ids)
    return msg(f"{added} scopes assigned.")


@ADMIN("DELETE", "/clients/<id>/scopes/<scope_id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_remove_scope_from_client(idp, claims, params):
    """Remove a scope from a client."""
    remove_scope(idp, params.caller, get_client(idp, params.path["id"]), params.path["scope_id"])
    return msg("Scope removed.")


def holder_of(idp, member: ScopeMember) -> Client | Account:
    """Return the user or client that a body names. Raises invalid_request if it names none or both."""
    if bool(member.user_id) == bool(member.client_id):
        reject(user_id="is required, or client_id")
    return get_user(idp, member.user_id) if member.user_id else get_client(idp, member.client_id)


@ADMIN(
    "POST", ("/scopes/assign-to-user", "/scopes/assign-to-client"), guard=by_admin, spec=OWN,
    takes=ScopeMember, gives=Msg, proof=of_named_administrator,
)
def admin_assign_scope_to(idp, claims, params):
    """Assign one scope to the user or client in the body."""
    assign_scopes(idp, params.caller, holder_of(idp, params.body), [params.body.scope_id])
    return msg("Scope assigned.")


@ADMIN(
    "POST", ("/scopes/remove-from-user", "/scopes/remove-from-client"), guard=by_admin, spec=OWN,
    takes=ScopeMember, gives=Msg, proof=of_named_administrator,
)
def admin_remove_scope_from(idp, claims, params):
    """Remove one scope from the user or client in the body."""
    remove_scope(idp, params.caller, holder_of(idp, params.body), params.body.scope_id)
    return msg("Scope removed.")


@ADMIN("GET", "/scopes/<id>/users", guard=by_admin, spec=OWN, query=Paged, gives=list[UserDetails])
def admin_list_users_with_scope(idp, claims, params):
    """List the users who may be granted a scope, a page at a time."""
    rows, total = idp.store.list_accounts(
        is_active=None, scope_id=get_scope(idp, params.path["id"]).id, limit=params.query.limit,
        offset=params.query.offset,
    )
    return paged_reply(params, show_users(idp, rows), total)


def client_object(row: ClientRow, scopes: list[str], last_token_at: int, secret="") -> ClientObject:
    return ClientObject(
        row.id, row.client_id, row.display_name, bool(row.is_active), iso(row.created_at), row.audience,
        row.client_type, row.grant_types.split(), bool(row.may_introspect), bool(row.is_first_party),
        bool(row.allow_http_redirects), bool(row.allow_short_schemes),
        row.access_token_signed_alg, row.id_token_signed_response_alg, scopes, iso(last_token_at), secret or UNSET,
    )


def show_client(idp: Idp, client: Client, secret="") -> ClientObject:
    return client_object(client.row, sorted(client.scopes), idp.store.last_token_at(client.client_id), secret)


def show_rows_of_clients(idp: Idp, rows: list[ClientRow]) -> list[ClientObject]:
    """Return clients as show_client() does, by one query for all."""
    scopes: dict[str, list[str]] = {row.id: [] for row in rows}
    last: dict[str, int] = {}
    for detail in idp.store.describe_clients(scopes):
        if detail.scope:
            scopes[detail.id].append(detail.scope)
        else:
            last[detail.id] = detail.last_token_at
    return [client_object(row, scopes[row.id], last.get(row.id, 0)) for row in rows]


@ADMIN("GET", "/scopes/<id>/clients", guard=by_admin, spec=OWN, query=Paged, gives=list[ClientObject])
def admin_list_clients_with_scope(idp, claims, params):
    """List the clients that may request a scope, a page at a time."""
    rows, total = idp.store.list_clients(
        scope_id=get_scope(idp, params.path["id"]).id, limit=params.query.limit, offset=params.query.offset
    )
    return paged_reply(params, show_rows_of_clients(idp, rows), total)


# -- clients --


def rows_of_clients(idp: Idp, query) -> tuple[list, int]:
    return idp.store.list_clients(
        query.q, query.sort, query.limit, query.offset, client_type=query.client_type, is_active=query.is_active,
        grant_type=query.grant_type,
    )


@ADMIN("POST", "/clients", guard=by_admin, spec=OWN, takes=CreateClient, gives=ClientObject)
def admin_create_client(idp, claims, params):
    """Register a client; only this answer shows a secret that was made for it."""
    return show_client(idp, *create_client(idp, params.caller, params.body))


declare_resource(
    Resource(
        "client", show=lambda idp, clients: [show_client(idp, client) for client in clients], gives=ClientObject,
        show_list=lambda idp, query, rows: show_rows_of_clients(idp, rows), query=ListClients, rows=rows_of_clients,
        get=get_client,
        update=update_client, changes=UpdateClient, delete=delete_client, proof_of_delete=always,
    ),
    "List the clients by display name, filtered by `q`, a page at a time.",
    "Return one client, by id or client_id.",
    "Return the internal id of a client_id.",
    "Change the members of a client that are sent; a new client_id or audience, or deactivation, ends its tokens. "
    "Honours If-Match.",
    "Delete a client, and end its tokens and logins. Honours If-Match.",
)


@ADMIN("POST", "/clients/<id>/revoke", guard=by_admin, spec=OWN, gives=Msg)
def admin_revoke_client(idp, claims, params):
    """End every token and login of a client."""
    with idp.store.transaction(identity=True):
        revoke_client(idp, params.caller, get_client(idp, params.path["id"]).row, "client_revoked")
    return msg("Everything issued to the client is revoked.")


@ADMIN("POST", "/clients/<id>/preview", guard=by_admin, spec=OWN, takes=PreviewTokens, gives=Preview)
def admin_preview_tokens(idp, claims, params):
    """Return the unsigned claims that a client would get for a user, or for itself, and why a scope would be left out.

    `jti`, `sid`, `at_hash` and the times are examples, because no token exists.
    """
    return preview_tokens(idp, params.caller, params.path["id"], params.body)


@ADMIN("POST", "/clients/secret", guard=by_admin, spec=OWN, takes=ChangeSecret, gives=Msg)
def admin_change_secret(idp, claims, params):
    """Set or make a new secret and return it as the message; the old one is valid for `overlap_seconds` more."""
    return msg(change_secret(idp, params.caller, params.body))


@ADMIN("GET", "/clients/<id>/secrets", guard=by_admin, spec=OWN, gives=list[SecretObject])
def admin_list_secrets(idp, claims, params):
    """List the valid secrets of a client, newest first, and when each was used last; not the secrets themselves."""
    rows = idp.store.list_secrets(get_client(idp, params.path["id"]).row.id, idp.now())
    return [
        SecretObject(
            row.id, iso(row.created_at), None if row.expires_at == FOREVER else iso(row.expires_at),
            iso(row.last_used_at),
        )
        for row in rows
    ]


@ADMIN("DELETE", "/clients/<id>/secrets/<secret_id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_delete_secret(idp, claims, params):
    """Delete one secret of a client."""
    delete_secret(idp, params.caller, params.path["id"], params.path["secret_id"])
    return msg("Secret deleted.")


# -- URIs of clients --


def uri_object(row: ClientUri) -> UriObject:
    return UriObject(row.id, row.client_id, row.uri, row.uri if row.kind == "redirect" else UNSET)


@ADMIN("DELETE", "/clients/redirect-uris", guard=by_admin, spec=OWN, takes=str, gives=Msg)
def admin_delete_redirect_uri_by_body(idp, claims, params):
    """Remove a redirect URI from a client, by the id of its record, a JSON string."""
    delete_uri(idp, params.caller, params.body.strip(), "redirect")
    return msg("Redirect URI removed.")


@ADMIN("DELETE", "/clients/redirect-uris/<record_id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_delete_redirect_uri_by_id(idp, claims, params):
    """Remove a redirect URI from a client, by the id of its record in the path."""
    delete_uri(idp, params.caller, params.path["record_id"], "redirect")
    return msg("Redirect URI removed.")


def declare_uris(path: str, kind: str, *sentences: str):
    """Declare POST, GET and DELETE of one kind of URI of a client; `sentences` describe them, in this order."""
    all_, name = f"/clients/<id>/{path}", path.replace("-", "_")

    def add(idp, claims, params):
        uri = params.body.uri if isinstance(params.body, AddUri) else params.body
        return uri_object(add_uri(idp, params.caller, params.path["id"], kind, uri))

    def list_(idp, claims, params):
        return [uri_object(row) for row in idp.store.list_uris(get_client(idp, params.path["id"]).row.id, kind)]

    def delete(idp, claims, params):
        delete_uri(idp, params.caller, params.path["record_id"], kind, params.path["id"])
        return msg("Removed.")

    for handler, verb, method, at, more, sentence in (
        (add, "add", "POST", all_, {"takes": Uri | AddUri, "gives": UriObject, "status": 201}, sentences[0]),
        (list_, "list", "GET", all_, {"gives": list[UriObject], "versioned": True}, sentences[1]),
        (delete, "delete", "DELETE", f"{all_}/<record_id>", {"gives": Msg}, sentences[2]),
    ):
        handler.__name__ = f"admin_{verb}_{name if verb == 'list' else name.removesuffix('s')}"
        handler.__doc__ = sentence
        ADMIN(method, at, guard=by_admin, spec=OWN, **more)(handler)


declare_uris(
    "redirect-uris", "redirect",
    "Add a redirect URI to a client: a JSON string, or an object with `uri`.",
    "List the redirect URIs of a client.",
    "Remove a redirect URI from a client.",
)
declare_uris(
    "post-logout-redirect-uris", "post_logout",
    "Add a post-logout redirect URI to a client: a JSON string, or an object with `uri`.",
    "List the post-logout redirect URIs of a client.",
    "Remove a post-logout redirect URI from a client.",
)
declare_uris(
    "cors-origins", "cors_origin",
    "Add a CORS origin to a public client: a JSON string, or an object with `uri`.",
    "List the CORS origins of a client.",
    "Remove a CORS origin from a client.",
)


@ADMIN("POST", "/clients/<id>/uris/check", guard=by_admin, spec=OWN, takes=TryUri, gives=UriVerdict)
def admin_try_uri(idp, claims, params):
    """Tell whether a client could be given a URI, and if not, why; nothing is changed."""
    return try_uri(idp, params.path["id"], params.body.kind, params.body.uri)


# -- feature flags of clients --


@ADMIN("GET", "/clients/<id>/options", guard=by_admin, spec=OWN, gives=dict[str, FlagObject])
def admin_list_flags(idp, claims, params):
    """List the feature flags of a client, each with its option."""
    return list_flags(idp, params.path["id"])


def client_of(params) -> str:
    """Return the client_id of the body or of the query. Raises invalid_request."""
    client_id = (params.body.client_id if params.body else "") or params.query.client_id
    if not client_id.strip():
        reject(client_id="is required")
    return client_id


@ADMIN(
    "POST", "/client/options/<flag>", guard=by_admin, spec=OWN, takes=SetFlag, media=(JSON, FORM),
    query=OfClient, gives=Msg,
)
def admin_set_flag(idp, claims, params):
    """Set a feature flag of a client, sent as form or JSON."""
    enabled = str(params.body.is_enabled if params.body.enabled is UNSET else params.body.enabled).lower()
    if enabled not in ("true", "false"):
        reject(enabled="must be true or false")
    flag = check_flag(params.path["flag"])
    set_flag(idp, params.caller, client_of(params), flag, enabled == "true")
    return msg(f"{flag} set.")


@ADMIN("GET", "/client/options/<flag>", guard=by_admin, spec=OWN, query=OfClient, gives=Msg)
def admin_get_flag(idp, claims, params):
    """Return a feature flag of a client: the message is True or False."""
    return msg(str(list_flags(idp, client_of(params))[check_flag(params.path["flag"])].is_enabled))


@ADMIN(
    "POST", "/client/options/<flag>/ext", guard=by_admin, spec=OWN, takes=SetFlagOption,
    media=(JSON, FORM), query=OfClient, gives=Msg,
)
def admin_set_flag_option(idp, claims, params):
    """Set the option of a feature flag, sent as form or JSON."""
    set_flag_option(idp, params.caller, client_of(params), params.path["flag"], params.body.options)
    return msg("Option set.")


@ADMIN("GET", "/client/options/<flag>/ext", guard=by_admin, spec=OWN, query=OfClient, gives=Msg)
def admin_get_flag_option(idp, claims, params):
    """Return the option of a feature flag as the message, empty if it is not set."""
    flag = check_flag(params.path["flag"])
    if not FLAGS[flag]:
        reject(flag="takes no option")
    return msg(list_flags(idp, client_of(params))[flag].options)


# -- external identity providers --


def idp_object(row: ExternalIdp) -> IdpObject:
    return IdpObject(
        row.id, row.client_id, row.provider_key, row.display_name, row.issuer, row.client_identifier, row.scopes,
        iso(row.created_at), iso(row.modified_at),
    )


@ADMIN("GET", ("/clients/<id>/idp", "/admin/clients/<id>/idp"), guard=by_admin, spec=OWN, gives=list[IdpObject])
def admin_list_idps(idp, claims, params):
    """List the external identity providers of a client."""
    return [idp_object(row) for row in idp.store.list_idps(get_client(idp, params.path["id"]).row.id)]


@ADMIN(
    "POST", ("/clients/<id>/idp", "/admin/clients/<id>/idp"), guard=by_admin, spec=OWN,
    takes=PutIdp, gives=IdpObject, status=201,
)
def admin_add_idp(idp, claims, params):
    """Add an external identity provider to a client."""
    return idp_object(put_idp(idp, params.caller, params.path["id"], params.body))


@ADMIN(
    "GET", ("/clients/<id>/idp/<idp_id>", "/admin/clients/<id>/idp/<idp_id>"), guard=by_admin,
    spec=OWN, gives=IdpObject,
)
def admin_get_idp(idp, claims, params):
    """Return one external identity provider of a client."""
    row = idp.store.find_idp(get_client(idp, params.path["id"]).row.id, params.path["idp_id"])
    if row is None:
        raise Problem("not_found")
    return idp_object(row)


@ADMIN(
    "PUT", ("/clients/<id>/idp/<idp_id>", "/admin/clients/<id>/idp/<idp_id>"), guard=by_admin,
    spec=OWN, takes=PutIdp, gives=IdpObject,
)
def admin_update_idp(idp, claims, params):
    """Change an external identity provider of a client."""
    return idp_object(put_idp(idp, params.caller, params.path["id"], params.body, params.path["idp_id"]))


@ADMIN(
    "DELETE", ("/clients/<id>/idp/<idp_id>", "/admin/clients/<id>/idp/<idp_id>"), guard=by_admin,
    spec=OWN, gives=Msg,
)
def admin_delete_idp(idp, claims, params):
    """Remove an external identity provider from a client."""
    delete_idp(idp, params.caller, params.path["id"], params.path["idp_id"])
    return msg("Removed.")


# -- sessions and tokens --


def session_details(session: ListedSession) -> SessionObject:
    """Return a session as ADMIN shows it: with where its login came from, which no client learns."""
    return session_object(
        session, SessionDetails, session.sid, session.scope, session.ip_address, session.user_agent
    )


@ADMIN("GET", "/sessions", guard=by_admin, spec=OWN, query=ListSessions, gives=list[SessionDetails])
def admin_list_sessions(idp, claims, params):
    """List the sessions, newest first, filtered by user, client, login, address or whether they live, page by page.

    One request searches 20,000 sessions. Where it ends before the list does, Link says where the search goes on. A list
    in the order of expiry is of the newest of them.
    """
    query = params.query
    if query.after is not None and (query.offset or query.sort not in ("id", "-id")):
        reject(after="takes the place of offset, in the order of ids only")
    user_id = get_user(idp, query.user_id).id if query.user_id else None
    client_id = get_client(idp, query.client_id).client_id if query.client_id else None
    page = idp.store.scan_sessions(
        query.sort, query.limit, query.living, idp.now(), query.after, query.offset, user_id=user_id,
        client_id=client_id, sid=query.sid, mad_use=query.mad_use, ip_address=query.ip_address,
    )
    following = None
    if page.after is not None:
        following = {"after": page.after} if page.after else {}
    return paged_reply(params, [session_details(row) for row in page.rows], page.total, following=following)


@ADMIN("POST", "/sessions/revoke-all", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_revoke_everything(idp, claims, params):
    """End every session, login and token of everybody, on both ports, the caller's own among them."""
    revoke_everything(idp, params.caller)
    return msg("Everything issued is revoked; log in again.")


@ADMIN("GET", "/sessions/<jti>", guard=by_admin, spec=OWN, gives=SessionDetails)
def admin_get_session(idp, claims, params):
    """Return one session, by the jti of its token."""
    return session_details(get_session(idp, params.path["jti"]))


@ADMIN("GET", "/sessions/user/<id>", guard=by_admin, spec=OWN, query=Paged, gives=list[SessionDetails])
def admin_list_sessions_of_user(idp, claims, params):
    """List the sessions of a user, newest first, a page at a time."""
    user = idp.store.find_account(params.path["id"].lower()) or idp.store.find_account_by_name(fold(params.path["id"]))
    rows, total = (
        idp.store.list_sessions(user_id=user.id, limit=params.query.limit, offset=params.query.offset)
        if user
        else ([], 0)
    )
    return paged_reply(params, [session_details(row) for row in rows], total)


@ADMIN(
    "GET", "/browser-sessions", guard=by_admin, spec=OWN, query=ListBrowserSessions, gives=list[BrowserSessionObject]
)
def admin_list_browser_sessions(idp, claims, params):
    """List the users who are logged in at a browser, the last used one first, a page at a time."""
    query = params.query
    reject(after="takes the place of offset" if query.after is not None and query.offset else "")
    user_id = get_user(idp, query.user_id).id if query.user_id else None
    seen, _, id_sha256 = (query.after or "").partition("-")
    rows, total = idp.store.list_all_browser_sessions(
        idp.now(), idp.options.session_idle_expiration, user_id, query.ip_address, query.limit, query.offset,
        (int(seen), id_sha256) if query.after is not None else None,
    )
    shown = [
        BrowserSessionObject(
            row.id_sha256, row.user_id, row.username, row.amr.split(), iso(row.auth_time), iso(row.last_seen_at),
            iso(row.expires_at), row.ip_address, row.user_agent,
        )
        for row in rows
    ]
    return paged_reply(params, shown, total, f"{rows[-1].last_seen_at}-{rows[-1].id_sha256}" if rows else "")


@ADMIN("DELETE", "/browser-sessions/<id>", guard=by_admin, spec=OWN, gives=Msg)
def admin_end_browser_session(idp, claims, params):
    """Log a browser out, and end every login at a client that began in it."""
    found = idp.store.find_browser_session(params.path["id"].lower())
    if found is None:
        raise Problem("not_found")
    end_browser_session(idp, params.caller, found.id_sha256, found.user_id)
    return msg("Browser logged out.")


@ADMIN("DELETE", "/sessions/<jti>", guard=by_admin, spec=OWN, gives=Revoked, option="enable_token_revocation")
def admin_revoke_session(idp, claims, params):
    """End a session, and the login that it belongs to."""
    session = revoke_session(idp, params.caller, params.path["jti"])
    return Revoked(session.id, "revoked", "Session revoked.")


@ADMIN("POST", ("/sessions/purge", "/tokens/purge"), guard=by_admin, spec=OWN, takes=PurgeTokens, gives=Msg)
def admin_purge_sessions(idp, claims, params):
    """Delete the rows of sessions that expired long enough ago; under /tokens/purge of refresh tokens too."""
    kinds = ("session", "refresh_token") if params.environ["PATH_INFO"] == "/tokens/purge" else ("session",)
    count = purge_tokens(idp, params.caller, params.body, kinds, sleep)
    return msg(f"{count} rows purged.")


@ADMIN(
    "POST", "/revoke", guard=by_admin, spec=OWN, takes=TokenIn, media=(JSON, FORM), gives=Msg,
    option="enable_token_revocation",
)
def admin_revoke_token(idp, claims, params):
    """Revoke any token of this server (access, ADMIN or refresh), sent as form or JSON."""
    revoke_any_token(idp, params.caller, params.body.token)
    return msg("Token revoked.")


@ADMIN("POST", "/introspect", guard=by_admin, spec=OWN, takes=TokenIn, media=(JSON, FORM), gives=dict)
def admin_introspect(idp, claims, params):
    """Return the claims and the state of a token of any kind, even an expired one, and why it is not active."""
    found = describe_token(idp, params.body.token)
    audit(idp, params.caller, "admin.auth.token.introspect", found["sub"], f"jti={found.get('jti', '')}")
    return found


@ADMIN(
    "GET", "/refresh-tokens", guard=by_admin, spec=OWN, query=PagedById, gives=list[RefreshTokenObject],
    option="enable_token_refresh",
)
def admin_list_refresh_tokens(idp, claims, params):
    """List the refresh tokens, newest first, a page at a time, without the tokens themselves."""
    query = params.query
    reject(after="takes the place of offset" if query.after is not None and query.offset else "")
    rows, total = idp.store.list_refresh_tokens(limit=query.limit, offset=query.offset, after=query.after)
    return paged_reply(params, [refresh_token_object(row) for row in rows], total)


@ADMIN("GET", "/refresh-tokens/<id>", guard=by_admin, spec=OWN, gives=RefreshTokenObject, option="enable_token_refresh")
def admin_get_refresh_token(idp, claims, params):
    """Return one refresh token, by the id of its row."""
    row = idp.store.find_refresh_token_by_id(params.path["id"])
    if row is None:
        raise Problem("not_found")
    return refresh_token_object(row)


@ADMIN(
    "GET", "/refresh-tokens/user/<id>", guard=by_admin, spec=OWN, query=Paged,
    gives=list[RefreshTokenObject], option="enable_token_refresh",
)
def admin_list_refresh_tokens_of_user(idp, claims, params):
    """List the refresh tokens of a user, newest first, a page at a time."""
    user = idp.store.find_account(params.path["id"].lower()) or idp.store.find_account_by_name(fold(params.path["id"]))
    rows, total = (
        idp.store.list_refresh_tokens(user.id, limit=params.query.limit, offset=params.query.offset)
        if user
        else ([], 0)
    )
    return paged_reply(params, [refresh_token_object(row) for row in rows], total)


@ADMIN("DELETE", "/refresh-tokens/<id>", guard=by_admin, spec=OWN, gives=Msg, option="enable_token_refresh")
def admin_revoke_refresh_token(idp, claims, params):
    """Revoke a refresh token, and the login that it belongs to."""
    revoke_refresh_token(idp, params.caller, params.path["id"])
    return msg("Refresh token revoked.")


@ADMIN(
    "POST", "/refresh-tokens/purge", guard=by_admin, spec=OWN, takes=PurgeTokens, gives=Msg,
    option="enable_token_refresh",
)
def admin_purge_refresh_tokens(idp, claims, params):
    """Delete the rows of refresh tokens that expired long enough ago."""
    count = purge_tokens(idp, params.caller, params.body, ('refresh_token',), sleep)
    return msg(f"{count} rows purged.")


# -- audit log --


def audit_object(row: AuditRow) -> AuditObject:
    return AuditObject(
        str(row.seq), row.actor_id, row.action, row.secondary, row.target, iso(row.at), row.ip_address, row.user_agent,
        row.request_id, row.result, row.row_sha256, row.actor_id, row.ip_address,
    )


def audit_filter(idp: Idp, query: ListAudit | ExportAudit) -> AuditFilter:
    """Return what a query narrows the audit log to. A user who is gone is found by id."""
    about = query.about
    if about:
        account = idp.store.find_account(about.lower()) or idp.store.find_account_by_name(fold(about))
        about = account.id if account else about
    return AuditFilter(
        query.action, query.userId or query.user_id, query.target, read_moment(query.since, "since", 0),
        read_moment(query.until, "until", FOREVER), query.result, query.ip_address, query.request_id, about or None,
    )


@ADMIN("GET", "/audit-logs", guard=by_admin, spec=OWN, query=ListAudit, gives=list[AuditObject])
def admin_list_audit(idp, claims, params):
    """List audit rows, newest first; with `after` the rows that follow it, oldest first.

    One request searches 20,000 rows. Where it ends before the log does, Link says where the search goes on.
    """
    query = params.query
    if query.after is not None and query.before is not None:
        reject(before="leads the other way than after")
    query.limit = query.limit if 0 <= query.limit <= 1000 else 1000
    wanted = audit_filter(idp, query)
    page = idp.store.scan_audit(wanted, query.limit, query.after, query.before, query.offset)
    is_following = query.after is not None
    following = {"after" if is_following else "before": page.place} | ({"offset": page.skip} if page.skip else {})
    rows = [audit_object(row) for row in page.rows]
    # Counting searches as much as the page: it is not done for each of a long search, nor for whoever follows the log.
    is_counted = (query.before is None and not is_following) or wanted == AuditFilter()
    total = idp.store.count_audit(**msgspec.structs.asdict(wanted)) if is_counted else AtLeast(len(rows))
    reply = paged_reply(params, rows, total, following={} if page.is_last else following)
    if is_following:
        reply.headers.append(("X-Next-After", str(page.place)))
    return reply


@ADMIN("GET", "/audit-logs/actions", guard=by_admin, spec=OWN, gives=list[str])
def admin_list_audit_actions(idp, claims, params):
    """List the actions of which the audit log has rows, or had before they were purged."""
    return idp.store.list_audit_actions()


@ADMIN("GET", "/audit-logs/verify", guard=by_admin, spec="append-only audit log", gives=AuditVerdict)
def admin_verify_audit(idp, claims, params):
    """Verify the hash chain of the audit log: tell whether a row was altered or is missing."""
    return AuditVerdict(**idp.store.verify_audit(lambda: sleep(0.001)))  # the other threads' turn


@ADMIN(
    "GET", "/audit-logs/export", guard=by_admin, spec="append-only audit log", query=ExportAudit, gives=AuditObject,
    gives_media="application/x-ndjson",
)
def admin_export_audit(idp, claims, params):
    """Return the audit log as JSON lines, oldest first, from `after` on; X-Next-After if there is more to search."""
    query = params.query
    found = idp.store.scan_audit(audit_filter(idp, query), query.limit, query.after)
    more = [] if found.is_last else [("X-Next-After", str(found.place))]
    return Page(b"".join(ENCODE(audit_object(row)) + b"\n" for row in found.rows), "application/x-ndjson", headers=more)


@ADMIN("GET", "/audit-logs/<id>", guard=by_admin, spec=OWN, gives=AuditObject)
def admin_get_audit(idp, claims, params):
    """Return one audit row."""
    row = idp.store.find_audit(int(params.path["id"])) if re.fullmatch(r"[0-9]{1,15}", params.path["id"]) else None
    if row is None:
        raise Problem("not_found")
    return audit_object(row)


@ADMIN("POST", "/audit-logs/purge", guard=by_admin, spec=OWN, takes=PurgeAudit, gives=Msg, proof=always)
def admin_purge_audit(idp, claims, params):
    """Delete the audit rows older than some days; the deletion is itself audited."""
    count = purge_audit_log(idp, params.caller, params.body.older_than_days, sleep)
    return msg(f"{count} rows purged.")


# -- figures --


def metrics_page(idp: Idp, params, client_names: bool) -> Page:
    """Return the metrics in the text format of Prometheus, or as OpenMetrics if that is asked for."""
    openmetrics = "application/openmetrics-text" in params.environ.get("HTTP_ACCEPT", "")
    content = show_metrics(idp.counters.totals(), openmetrics, client_names)
    return Page(content.encode(), OPENMETRICS if openmetrics else METRICS_TEXT)


@AUTH(
    "GET", "/metrics", guard=by_scraper, spec="OpenMetrics 1.0", gives=bytes, gives_media="text/plain",
    option="metrics_on_auth",
)
def metrics(idp, caller, params):
    """Return the metrics of all processes for Prometheus, without the names of clients."""
    return metrics_page(idp, params, client_names=False)


@ADMIN("GET", "/metrics", guard=by_scraper_or_admin, spec="OpenMetrics 1.0", gives=bytes, gives_media="text/plain")
def admin_metrics(idp, caller, params):
    """Return the metrics of all processes for Prometheus."""
    if idp.machine:
        idp.machine.measure(idp)
    return metrics_page(idp, params, client_names=True)


@ADMIN("GET", "/status/history", guard=by_admin, spec=OWN, query=ReadHistory, gives=HistoryObject)
def admin_history(idp, claims, params):
    """Return figures over time: how often each happened in each step, null where nobody counted."""
    query = params.query
    names = list(FIGURES) if query.series is None else query.series.split(",")
    reject(
        series="" if set(names) <= set(FIGURES) else f"must be some of {', '.join(FIGURES)}, separated by commas",
        range="" if query.range in RANGES else f"must be one of {', '.join(RANGES)}",
    )
    begin, step, series = idp.history.read(idp.now(), query.range, names)
    return HistoryObject(iso(begin), step, series)


# -- keys --


@ADMIN("GET", "/keys", guard=by_admin, spec="RFC 7517", gives=list[KeyObject])
def admin_list_keys(idp, claims, params):
    """List the keys of both rings: which signs, which waits, which retires, and until when."""
    return idp.machine.list_keys(idp)


@ADMIN("GET", "/keys/<kid>/impact", guard=by_admin, spec=OWN, gives=KeyImpact)
def admin_key_impact(idp, claims, params):
    """Tell what would end if a key were revoked."""
    return idp.machine.key_impact(idp, params.path["kid"])


@ADMIN("POST", "/keys/rotate", guard=by_admin, spec=OWN, takes=RotateKeys, gives=list[KeyObject], proof=always)
def admin_rotate_keys(idp, claims, params):
    """Publish a next key beside each that signs, or those of one ring or algorithm; it signs after `key-overlap`."""
    with idp.hasher.gate.blocking():
        return idp.machine.rotate_keys(idp, params.caller, params.body.ring, params.body.alg)


@ADMIN("POST", "/keys/<kid>/revoke", guard=by_admin, spec=OWN, gives=Msg, proof=always)
def admin_revoke_key(idp, claims, params):
    """Revoke a stolen key: no token that it signed is valid any more, and where it signed a new one does."""
    with idp.hasher.gate.blocking():
        ring = idp.machine.revoke_key(idp, params.caller, params.path["kid"])
    return msg(f"Key of {ring} revoked; caches forget it within 300 seconds.")


# -- settings --


@ADMIN("GET", "/options", guard=by_admin, spec=OWN, gives=list[OptionObject])
def admin_list_options(idp, claims, params):
    """List every setting with its value, origin, default and meaning; of secrets only whether they are set."""
    shown = describe_options(idp.options)
    return [
        OptionObject(
            option.name, shown[option.name]["value"], shown[option.name]["origin"],
            show_value(option, option.default), option.group, option.help, option.secret, True,
        )
        for option in OPTIONS
    ]


# -- the brand of the pages --


@ADMIN("GET", "/brand", guard=by_admin, spec=OWN, gives=BrandObject, versioned=True)
def admin_get_brand(idp, claims, params):
    """Return the name, colour and picture that the login pages and the console carry, and where each is from."""
    return describe_brand(idp)


@ADMIN("PUT", "/brand", guard=by_admin, spec=OWN, takes=ChangeBrand, gives=BrandObject, versioned=True)
def admin_change_brand(idp, claims, params):
    """Change the name, colour or picture of the login pages, at once; null leaves one to the options."""
    with if_match(idp, params, lambda: describe_brand(idp)):
        return change_brand(idp, params.caller, params.body)


@ADMIN("DELETE", "/brand", guard=by_admin, spec=OWN, gives=Msg, versioned=True)
def admin_reset_brand(idp, claims, params):
    """Leave name, colour and picture to the options again."""
    with if_match(idp, params, lambda: describe_brand(idp)):
        reset_brand(idp, params.caller)
    return msg("The brand is that of the options.")


# -- backup and description --


@ADMIN("POST", "/backup", guard=by_admin, spec="online backup", takes=MakeBackup, gives=BackupObject, proof=always)
def admin_make_backup(idp, claims, params):
    """Write a backup to `backup-folder`, encrypted like the database, and verify it; 404 if none is set."""
    with idp.hasher.gate.blocking():
        return idp.machine.make_backup(idp, params.caller, params.body.without_keys)


@ADMIN("GET", "/backup", guard=by_admin, spec="online backup", gives=list[ListedBackup])
def admin_list_backups(idp, claims, params):
    """List the backups in `backup-folder`, newest first."""
    return idp.machine.list_backups(idp)


@ADMIN(
    "GET", "/backup/<name>", guard=by_admin, spec="online backup", query=BackupPiece, gives=bytes,
    gives_media="application/octet-stream", proof=of_piece_out_of_turn,
)
def admin_read_backup(idp, claims, params):
    """Return a mebibyte of a backup, from `offset` on; X-Next-Offset if there is more."""
    name, offset = params.path["name"], params.query.offset
    piece, following = idp.machine.read_backup_piece(idp, name, offset)
    if params.console:
        note_fetch(idp, params.console, name, offset, following)
    return Page(piece, "application/octet-stream", headers=[("X-Next-Offset", str(following))] if following else [])


@ADMIN("DELETE", "/backup/<name>", guard=by_admin, spec="online backup", gives=Msg, proof=always)
def admin_delete_backup(idp, claims, params):
    """Delete a backup from `backup-folder`."""
    idp.machine.delete_backup(idp, params.caller, params.path["name"])
    return msg("Backup deleted.")


@ADMIN(
    "GET", ("/openapi.json", "/swagger/v1/swagger.json"), guard=anyone, spec="OpenAPI 3.1",
    option="enable_admin_swagger", tagged=True,
)
def admin_openapi(idp, params):
    """Return the OpenAPI description of this port."""
    return cached_page(idp, "admin_openapi", lambda: ENCODE(describe_port(idp, ADMIN)))


@ADMIN(
    "GET", "/swagger", guard=anyone, spec="OpenAPI 3.1", gives=bytes, gives_media="text/html",
    option="enable_admin_swagger",
)
def admin_swagger(idp, params):
    """Show the API description in a browser."""
    return swagger_file("index.html")


@ADMIN(
    "GET", "/swagger/rapidoc-min.js", guard=anyone, spec="OpenAPI 3.1", gives=bytes, gives_media="text/javascript",
    option="enable_admin_swagger",
)
def admin_swagger_script(idp, params):
    """Return the script of that page."""
    return swagger_file("rapidoc-min.js")
