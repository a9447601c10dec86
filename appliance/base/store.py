"""Rows, MIGRATIONS, and every SQL statement of the server."""

import base64
import collections
import contextlib
import hashlib
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import sqlcipher3

from appliance.base import StartupError
from appliance.base.clock import CLOCK_FAR, IAT_SKEW, sleep
from appliance.base.database import (
    BATCH_MAX, BATCH_SECONDS, Database, Generation, PROBE_SECONDS, Record, Row, SQLITE_BUSY, SQLITE_CANTOPEN,
    SQLITE_FULL, SQLITE_IOERR, SQLITE_READONLY, Unavailable, insert_statement, is_busy, result_code,
)
from appliance.base.log import Log
from appliance.base.wal import check_log


# Rows of a new database. Their identifiers are part of the wire contract.
MAD_ADMIN_ROLE_ID = "3855db1d-465e-412b-b1f4-b5cd78b4ae9f"
MAD_ADMIN_ROLE_NAME = "MadAdmin"
SEEDED_SCOPES = (
    ("d0955db1-67f7-4a7b-a9bb-ffbef4f0d2bd", "admin:provision_users", "Create users."),
    ("2192998b-c3d3-4274-9a25-4a4195ba2ec7", "admin:reset_passwords", "Reset the password of a user."),
    ("31c00aae-4136-4a8c-92a6-d2bbf4be2d35", "admin:deactivate_users", "Deactivate users."),
    ("1f4610fe-0cb2-4119-bd69-9b6033326998", "admin:read_user", "Read one user."),
    ("b6348575-83ec-4288-801b-e0d2da20569c", "admin:list_users", "List users."),
    ("5f0c2a7e-3b1d-4c86-9e54-6a2d8f71c903", "admin:read_metrics", "Read the metrics."),
)
FOREVER = 253402300799  # 9999-12-31T23:59:59Z: what the wire calls a permanent lockout
OVERLAP_MAX = 31 * 86400  # seconds: a replaced client secret stays valid for so long at most
LOCKOUT_MAX = 3600  # seconds: a lockout doubles up to this, or an attacker could close an account for days
SLICE = 500  # rows that a purge deletes in one transaction: more would keep other writers waiting
SCATTERED = 25  # the same for rows whose index entries are scattered: each of them costs pages of its own
USE_SECONDS = 60  # how exactly it is recorded when a client got a token, and when a secret was used
COUNT_MAX = 10_000  # rows of a list that are counted: a total beyond is a lower bound
COUNT_LIVING_MAX = 500  # the same where each row that is counted costs pages of other tables: whether it is alive
SCAN_MAX = 20_000  # rows that one request reads to find those that its filters let through: some 30 ms
NEWEST = " ORDER BY id DESC"  # what is alive stands behind what has expired: counted from there, the old is not read
DENSE = 2000  # holders of a role or scope from which on they are looked for in the order of the list
SUCCESS, FAILURE = "success", "failure"  # the results an audit row may tell of


# == Records ===================================================================
# One frozen Struct for each table, its fields in the order of the columns. `_at` is Unix seconds, `_ms` and
# `revoked_before` are Unix milliseconds. A flag is 0 or 1, lists are delimited by spaces. `_sha256` is the hex hash of
# a random handle, `_hash` is Argon2id, and what is sealed is encrypted with a key that is not in the database.


class Account(Record, frozen=True):
    """A user. What was issued to it up to `revoked_before` is dead. A seed that is pending has no first code yet."""

    table = "account"
    id: str
    username: str
    email: str
    password_hash: str
    is_active: int
    email_verified: int
    failed_logins: int
    last_failed_at: int
    lockouts: int
    lockout_until: int
    last_login_at: int
    totp_sealed: str
    totp_pending_sealed: str
    totp_last_step: int
    totp_failures: int
    totp_locked_until: int
    revoked_before: int
    created_at: int
    modified_at: int
    lockout_reason: str = ""  # of the lockout that an administrator set, and the actor who did
    lockout_by: str = ""


class UserDetail(Record, frozen=True):
    """What a list shows of a user beside its account: a role, or "" for the number of unspent recovery codes."""

    user_id: str
    role: str
    codes: int


class Role(Record, frozen=True):
    """A set of permissions that a user is given. A protected one can be neither changed nor deleted."""

    table = "role"
    id: str
    name: str
    description: str
    is_protected: int
    is_active: int
    created_at: int
    modified_at: int
    is_privileged: int = 0  # its holders are out of reach of a caller who acts by a delegated scope and lacks it


class Permission(Record, frozen=True):
    """A permission that roles are given."""

    table = "permission"
    id: str
    name: str
    is_active: int
    created_at: int
    modified_at: int


class ClientDetail(Record, frozen=True):
    """A scope of a client, by its internal id, or "" and when it got a token last."""

    id: str
    scope: str
    last_token_at: int


class RolePermission(Record, frozen=True):
    """A permission of a role."""

    role_id: str
    id: str
    name: str


class Scope(Record, frozen=True):
    """A scope that users and clients are given. A protected one can be neither renamed nor deleted."""

    table = "scope"
    id: str
    name: str
    description: str
    is_protected: int
    is_active: int
    created_at: int
    modified_at: int


class ClientRow(Record, frozen=True):
    """A client as stored. An empty `access_token_signed_alg` leaves the choice to the server."""

    table = "client"
    id: str
    client_id: str
    client_type: str  # confidential | public
    display_name: str
    audience: str
    grant_types: str
    may_introspect: int
    is_first_party: int
    access_token_signed_alg: str
    id_token_signed_response_alg: str
    is_active: int
    revoked_before: int
    created_at: int
    modified_at: int
    allow_http_redirects: int
    allow_short_schemes: int
    are_grants_named: int = 1  # 0 while its grant_types are those of a default


class Standing(Record, frozen=True):
    """The columns of a user or a client that say whether what was issued to it is still valid."""

    id: str
    is_active: int
    revoked_before: int


class Secret(Record, frozen=True):
    """A secret of a client, by the client's internal id. Two are valid while one replaces the other."""

    table = "client_secret"
    id: str
    client_id: str
    secret_hash: str
    created_at: int
    expires_at: int
    last_used_at: int  # within USE_SECONDS; 0 if never since it is recorded


class ClientUri(Record, frozen=True):
    """A URI of a client, by the client's internal id."""

    table = "client_uri"
    id: str
    client_id: str
    kind: str  # redirect | post_logout | cors_origin
    uri: str
    created_at: int


class Feature(Record, frozen=True):
    """A flag of a client, by the client's internal id, with its option."""

    table = "client_feature"
    client_id: str
    feature_flag: str
    is_enabled: int
    options: str


class ExternalIdp(Record, frozen=True):
    """An external identity provider of a client, by the client's internal id. No login uses one yet."""

    table = "external_idp_provider"
    id: str
    client_id: str
    provider_key: str
    display_name: str
    issuer: str
    client_identifier: str
    scopes: str
    created_at: int
    modified_at: int


class Family(Record, frozen=True):
    """A login of a user at a client: all its tokens carry its `sid` and die with it. RFC 9700 §4.14.2."""

    table = "family"
    sid: str
    user_id: str
    client_id: str
    scope: str
    amr: str
    auth_time: int
    nonce: str
    created_ms: int
    expires_at: int
    revoked_at: int | None
    browser: str = ""  # the `id_sha256` of the browser session it began in, if any
    claims: str = ""  # the claims parameter, JSON. OpenID Connect Core §5.5
    ip_address: str = ""  # of the browser it began in, or of whoever asked for its first token
    user_agent: str = ""


class Session(Record, frozen=True):
    """An access token that was issued; `id` is its `jti`. A token of a client alone has neither user nor `sid`."""

    table = "session"
    id: str
    user_id: str | None
    client_id: str
    sid: str | None
    scope: str
    token_use: str
    mad_use: str  # auth | admin: the port that issued it
    login_method: str
    issued_at: int
    expires_at: int
    revoked_at: int | None


class RefreshToken(Record, frozen=True):
    """A refresh token. It is kept until it expires, so that one that was used before is recognised."""

    table = "refresh_token"
    id: str
    token_sha256: str
    sid: str
    user_id: str
    client_id: str
    session_id: str  # the access token it was issued with
    issued_at: int
    expires_at: int
    rotated_at: int | None
    revoked_at: int | None


class ListedSession(Session, frozen=True):
    """A session with what decides whether it is alive: dead if it was issued up to `dead_before`, Unix milliseconds,
    which is the later `revoked_before` of its user and its client.
    """

    username: str
    dead_before: int
    family_revoked: int
    ip_address: str
    user_agent: str


class ListedRefreshToken(RefreshToken, frozen=True):
    """A refresh token with its login's scope and what decides whether it is alive, as for a session."""

    username: str
    scope: str
    dead_before: int
    family_created_ms: int
    family_revoked: int


class LoginTransaction(Record, frozen=True):
    """A login under way. Only the browser or application that began it holds the secret of `binding_sha256`."""

    table = "login_transaction"
    id: str
    binding_sha256: str
    client_id: str
    state: str  # select | password | totp | enrol | codes | consent | ready | done
    request: str  # the authorization request, JSON
    user_id: str | None
    amr: str
    auth_time: int
    failures: int
    created_at: int
    expires_at: int
    proven_ms: int  # when the password was proven
    pending: str  # a sealed seed that waits for its first code, else when and by which form it was moved on


class AuthorizationCode(Record, frozen=True):
    """An authorization code. One that is spent is kept, so that its second use ends the login. RFC 6749 §4.1.2."""

    table = "authorization_code"
    code_sha256: str
    client_id: str
    user_id: str
    sid: str
    redirect_uri: str
    scope: str
    nonce: str
    code_challenge: str
    code_challenge_method: str
    claims: str
    amr: str
    auth_time: int
    issued_ms: int
    expires_at: int
    spent_at: int | None
    browser: str
    offline: int  # whether a refresh token may be issued for it


class BrowserSession(Record, frozen=True):
    """A user who is logged in at a browser. `id_sha256` is the hash of the cookie's value."""

    table = "browser_session"
    id_sha256: str
    user_id: str
    amr: str
    auth_time: int
    created_ms: int
    last_seen_at: int
    expires_at: int
    revoked_at: int | None
    ip_address: str
    user_agent: str


class ListedBrowserSession(BrowserSession, frozen=True):
    """A browser session that is alive, with the name of its user. `id` is its `id_sha256`."""

    username: str
    id: str


class AdminSession(Record, frozen=True):
    """An administrator who is signed in at the console of ADMIN. `id_sha256` is the hash of the cookie's value.

    `ip_address` and `user_agent` are those of the last proof: a password, and a one-time code if there is a second
    factor, given at `proven_at`.
    """

    table = "admin_session"
    id_sha256: str
    user_id: str
    amr: str
    auth_time: int
    proven_at: int
    created_ms: int
    last_seen_at: int
    expires_at: int
    ip_address: str
    user_agent: str


class RetiredKey(Record, frozen=True):
    """The public half of an AUTH key that no longer signs and is no longer published. It verifies id_token_hints."""

    table = "retired_key"
    kid: str
    header: str  # the JOSE header of the ID tokens that it signed, base64url
    public_key: str  # PEM
    expires_at: int


class ParkedHints(Record, frozen=True):
    """What a POST of another site hinted at, while the browser repeats it as a GET, with its cookies."""

    table = "parked_hints"
    handle_sha256: str
    binding_sha256: str  # of the browser's cookie
    hints: str  # JSON, without any token
    created_at: int
    expires_at: int


class Invitation(Record, frozen=True):
    """A link by which a user may choose a password, once. `rights` are those of whoever made it, JSON; "" are all."""

    table = "invitation"
    user_id: str
    id: str
    handle_sha256: str
    purpose: str  # invite | reset
    rights: str
    created_by: str  # as the actor of an audit row
    created_ms: int
    expires_at: int


class BrandRow(Record, frozen=True):
    """The brand that an administrator chose, the only row of its table; None is left to the options.

    The picture itself is the column `logo`, which is read apart: pages need only its name. An empty `logo_sha256` is no
    picture.
    """

    name: str | None
    color: str | None
    logo_sha256: str | None
    logo_type: str
    logo_bytes: int
    modified_at: int


class ListedConsent(Record, frozen=True):
    """What a user allowed a client, with the names of the client."""

    client_id: str
    display_name: str
    scope: str
    given_at: int


class ClientConsent(Record, frozen=True):
    """What a user allowed one client. `id` is the id of the user."""

    id: str
    username: str
    scope: str
    given_at: int


class AuditRow(Record, frozen=True):
    """A row of the audit log. `row_sha256` is chain() over it and the row before it."""

    table = "audit"
    seq: int
    at: int
    actor_id: str
    action: str
    target: str
    secondary: str
    ip_address: str
    user_agent: str
    request_id: str
    row_sha256: str
    result: str


class AuditRefusal(AuditRow, frozen=True):
    """A row of the audit log about what was refused and changed nothing. These rows have a chain of their own."""

    table = "audit_refusal"


class AuditTail(msgspec.Struct, frozen=True):
    """The last row of the audit chain as the members of a group have left it, and the last number of either chain.

    All is 0 or "" while that has to be read again.
    """

    seq: int = 0
    digest: str = ""
    last_seq: int = 0


class AuditFilter(msgspec.Struct, frozen=True):
    """What a list of the audit log is narrowed to; None leaves a column open. `target` may be in secondary too.

    `about` is a user: as the actor or as whom a row is about. Times are Unix seconds.
    """

    action: str | None = None
    actor_id: str | None = None
    target: str | None = None
    since: int = 0
    until: int = FOREVER
    result: str | None = None
    ip_address: str | None = None
    request_id: str | None = None
    about: str | None = None


class SignedTokens(Record, frozen=True):
    """How many tokens a key may have signed, and of how many users and clients they are."""

    tokens: int
    users: int
    clients: int


class SessionPage(NamedTuple):
    """Sessions, how many the list has, and the id behind which it goes on: "" at its end, None if the total tells."""

    rows: list[ListedSession]
    total: int
    after: str | None


class AuditPage(NamedTuple):
    """Rows of the audit log, and where the list goes on: the `before` or `after` of the next page, and how many rows are
    to be skipped there. `is_last` says that nothing follows, until more is written.
    """

    rows: list[AuditRow]
    place: int
    skip: int
    is_last: bool


class AuditSize(NamedTuple):
    """How many rows of a table of the audit log there are, and about how many octets of the database they take."""

    rows: int
    octets: int


class Client(msgspec.Struct, frozen=True):
    """A client as the rules see it: its row and everything that belongs to it."""

    row: ClientRow
    secret_hashes: tuple[tuple[str, int], ...]  # (hash, expires_at) of each secret that was valid when it was read
    scopes: frozenset[str]
    flags: dict[str, str]  # enabled flag -> option
    redirect_uris: tuple[str, ...] = ()
    post_logout_redirect_uris: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    secret_ids: dict[str, str] = {}  # the id of each secret, by its hash

    @property
    def client_id(self) -> str:
        return self.row.client_id

    @property
    def grant_types(self) -> list[str]:
        return self.row.grant_types.split()


# == Store =====================================================================
# Every SQL statement of the server, in methods that take and return records. Nothing here knows of HTTP.
# Text that is formatted into a statement is a constant of this file, never part of a request.

# Append-only: a step that was released is never edited, and lines stay as long as they were released.
MIGRATIONS = (
    # Step 1. Only STRICT and WITHOUT ROWID are SQLite's own; everything else is portable SQL.
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

    CREATE TABLE account (
        id TEXT PRIMARY KEY, username TEXT NOT NULL UNIQUE, email TEXT NOT NULL, password_hash TEXT NOT NULL,
        is_active INTEGER NOT NULL DEFAULT 1, email_verified INTEGER NOT NULL DEFAULT 0,
        failed_logins INTEGER NOT NULL DEFAULT 0, last_failed_at INTEGER NOT NULL DEFAULT 0,
        lockouts INTEGER NOT NULL DEFAULT 0, lockout_until INTEGER NOT NULL DEFAULT 0,
        last_login_at INTEGER NOT NULL DEFAULT 0,
        totp_sealed TEXT NOT NULL DEFAULT '', totp_pending_sealed TEXT NOT NULL DEFAULT '',
        totp_last_step INTEGER NOT NULL DEFAULT 0, totp_failures INTEGER NOT NULL DEFAULT 0,
        totp_locked_until INTEGER NOT NULL DEFAULT 0,
        revoked_before INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL) STRICT;
    CREATE UNIQUE INDEX account_email ON account (email) WHERE email <> '';

    CREATE TABLE role (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL DEFAULT '',
        is_protected INTEGER NOT NULL DEFAULT 0, is_active INTEGER NOT NULL DEFAULT 1,
        created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL) STRICT;
    CREATE TABLE permission (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, is_active INTEGER NOT NULL DEFAULT 1,
        created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL) STRICT;
    CREATE TABLE role_permission (
        role_id TEXT NOT NULL REFERENCES role (id) ON DELETE CASCADE,
        permission_id TEXT NOT NULL REFERENCES permission (id) ON DELETE CASCADE,
        assigned_at INTEGER NOT NULL, PRIMARY KEY (role_id, permission_id)) STRICT, WITHOUT ROWID;
    CREATE INDEX role_permission_permission ON role_permission (permission_id);
    CREATE TABLE user_role (
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        role_id TEXT NOT NULL REFERENCES role (id) ON DELETE CASCADE,
        assigned_at INTEGER NOT NULL, PRIMARY KEY (user_id, role_id)) STRICT, WITHOUT ROWID;
    CREATE INDEX user_role_role ON user_role (role_id);

    CREATE TABLE client (
        id TEXT PRIMARY KEY, client_id TEXT NOT NULL UNIQUE,
        client_type TEXT NOT NULL CHECK (client_type IN ('confidential', 'public')),
        display_name TEXT NOT NULL DEFAULT '', audience TEXT NOT NULL, grant_types TEXT NOT NULL,
        may_introspect INTEGER NOT NULL DEFAULT 0, is_first_party INTEGER NOT NULL DEFAULT 1,
        access_token_signed_alg TEXT NOT NULL DEFAULT '', id_token_signed_response_alg TEXT NOT NULL DEFAULT 'RS256',
        is_active INTEGER NOT NULL DEFAULT 1, revoked_before INTEGER NOT NULL DEFAULT 0,
        created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL) STRICT;
    CREATE TABLE client_secret (
        id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        secret_hash TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT;
    CREATE INDEX client_secret_client ON client_secret (client_id);
    CREATE TABLE client_uri (
        id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        kind TEXT NOT NULL CHECK (kind IN ('redirect', 'post_logout', 'cors_origin')),
        uri TEXT NOT NULL, created_at INTEGER NOT NULL, UNIQUE (client_id, kind, uri)) STRICT;
    CREATE TABLE client_feature (
        client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE, feature_flag TEXT NOT NULL,
        is_enabled INTEGER NOT NULL DEFAULT 0, options TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (client_id, feature_flag)) STRICT, WITHOUT ROWID;
    CREATE TABLE external_idp_provider (
        id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        provider_key TEXT NOT NULL, display_name TEXT NOT NULL, issuer TEXT NOT NULL,
        client_identifier TEXT NOT NULL, scopes TEXT NOT NULL,
        created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL, UNIQUE (client_id, provider_key)) STRICT;

    CREATE TABLE scope (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL DEFAULT '',
        is_protected INTEGER NOT NULL DEFAULT 0, is_active INTEGER NOT NULL DEFAULT 1,
        created_at INTEGER NOT NULL, modified_at INTEGER NOT NULL) STRICT;
    CREATE TABLE user_scope (
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        scope_id TEXT NOT NULL REFERENCES scope (id) ON DELETE CASCADE,
        assigned_at INTEGER NOT NULL, PRIMARY KEY (user_id, scope_id)) STRICT, WITHOUT ROWID;
    CREATE INDEX user_scope_scope ON user_scope (scope_id);
    CREATE TABLE client_scope (
        client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        scope_id TEXT NOT NULL REFERENCES scope (id) ON DELETE CASCADE,
        assigned_at INTEGER NOT NULL, PRIMARY KEY (client_id, scope_id)) STRICT, WITHOUT ROWID;
    CREATE INDEX client_scope_scope ON client_scope (scope_id);

    CREATE TABLE family (
        sid TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        client_id TEXT NOT NULL, scope TEXT NOT NULL, amr TEXT NOT NULL, auth_time INTEGER NOT NULL,
        nonce TEXT NOT NULL, created_ms INTEGER NOT NULL, expires_at INTEGER NOT NULL,
        revoked_at INTEGER) STRICT, WITHOUT ROWID;
    CREATE INDEX family_user ON family (user_id);
    -- No index on the expiry: ids begin with their milliseconds, so what is old stands first.
    CREATE TABLE session (
        id TEXT PRIMARY KEY, user_id TEXT REFERENCES account (id) ON DELETE CASCADE, client_id TEXT NOT NULL,
        sid TEXT, scope TEXT NOT NULL, token_use TEXT NOT NULL, mad_use TEXT NOT NULL, login_method TEXT NOT NULL,
        issued_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, revoked_at INTEGER) STRICT, WITHOUT ROWID;
    CREATE INDEX session_user ON session (user_id) WHERE user_id IS NOT NULL;
    CREATE INDEX session_sid ON session (sid) WHERE sid IS NOT NULL;
    CREATE TABLE refresh_token (
        id TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE,
        sid TEXT NOT NULL REFERENCES family (sid) ON DELETE CASCADE,
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE, client_id TEXT NOT NULL,
        session_id TEXT NOT NULL, issued_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
        rotated_at INTEGER, revoked_at INTEGER) STRICT, WITHOUT ROWID;
    CREATE INDEX refresh_token_sid ON refresh_token (sid);
    CREATE INDEX refresh_token_user ON refresh_token (user_id);
    -- A tombstone outlives its token: `expires_at` is the token's own.
    CREATE TABLE revoked_token (jti TEXT PRIMARY KEY, expires_at INTEGER NOT NULL, revoked_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;

    CREATE TABLE login_transaction (
        id TEXT PRIMARY KEY, binding_sha256 TEXT NOT NULL, client_id TEXT NOT NULL, state TEXT NOT NULL,
        request TEXT NOT NULL, user_id TEXT REFERENCES account (id) ON DELETE CASCADE, amr TEXT NOT NULL,
        auth_time INTEGER NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
        created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT;
    CREATE TABLE browser_session (
        id_sha256 TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        amr TEXT NOT NULL, auth_time INTEGER NOT NULL, created_ms INTEGER NOT NULL, last_seen_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL, revoked_at INTEGER) STRICT;
    CREATE INDEX browser_session_user ON browser_session (user_id);
    CREATE TABLE authorization_code (
        code_sha256 TEXT PRIMARY KEY, client_id TEXT NOT NULL,
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE, sid TEXT NOT NULL, redirect_uri TEXT NOT NULL,
        scope TEXT NOT NULL, nonce TEXT NOT NULL, code_challenge TEXT NOT NULL, code_challenge_method TEXT NOT NULL,
        claims TEXT NOT NULL, amr TEXT NOT NULL, auth_time INTEGER NOT NULL,
        issued_ms INTEGER NOT NULL, expires_at INTEGER NOT NULL, spent_at INTEGER) STRICT;
    CREATE TABLE consent (
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        scope TEXT NOT NULL, given_at INTEGER NOT NULL, PRIMARY KEY (user_id, client_id)) STRICT, WITHOUT ROWID;
    CREATE TABLE recovery_code (
        code_sha256 TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        created_at INTEGER NOT NULL, spent_at INTEGER) STRICT;
    CREATE INDEX recovery_code_user ON recovery_code (user_id);

    -- Append-only. `row_sha256` covers the row and the hash of the row before it.
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, actor_id TEXT NOT NULL, action TEXT NOT NULL,
        target TEXT NOT NULL, secondary TEXT NOT NULL, ip_address TEXT NOT NULL, user_agent TEXT NOT NULL,
        request_id TEXT NOT NULL, row_sha256 TEXT NOT NULL) STRICT;
    """,
    # Step 2. Whether what an audit row tells of succeeded; empty in the rows of before.
    """
    ALTER TABLE audit ADD COLUMN result TEXT NOT NULL DEFAULT '';
    """,
    # Step 3. What logins at a browser leave behind.
    """
    ALTER TABLE family ADD COLUMN browser TEXT NOT NULL DEFAULT '';
    ALTER TABLE family ADD COLUMN claims TEXT NOT NULL DEFAULT '';
    ALTER TABLE login_transaction ADD COLUMN proven_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE login_transaction ADD COLUMN pending TEXT NOT NULL DEFAULT '';
    ALTER TABLE browser_session ADD COLUMN ip_address TEXT NOT NULL DEFAULT '';
    ALTER TABLE browser_session ADD COLUMN user_agent TEXT NOT NULL DEFAULT '';
    ALTER TABLE authorization_code ADD COLUMN browser TEXT NOT NULL DEFAULT '';
    ALTER TABLE authorization_code ADD COLUMN offline INTEGER NOT NULL DEFAULT 1;
    CREATE INDEX login_transaction_binding ON login_transaction (binding_sha256);
    CREATE INDEX authorization_code_user ON authorization_code (user_id);
    CREATE INDEX login_transaction_user ON login_transaction (user_id) WHERE user_id IS NOT NULL;
    """,
    # Step 4. Files of QR codes, to be removed once the second factor is confirmed or gone.
    """
    CREATE TABLE totp_qr_file (
        path TEXT PRIMARY KEY, user_id TEXT NOT NULL, is_due INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
    # Step 5. What redirect URIs a client may have besides those of everybody.
    """
    ALTER TABLE client ADD COLUMN allow_http_redirects INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE client ADD COLUMN allow_short_schemes INTEGER NOT NULL DEFAULT 0;
    """,
    # Step 6. Public keys that verify id_token_hints only; hints that wait for the browser to come back.
    """
    CREATE TABLE retired_key (
        kid TEXT PRIMARY KEY, header TEXT NOT NULL UNIQUE, public_key TEXT NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE parked_hints (
        handle_sha256 TEXT PRIMARY KEY, binding_sha256 TEXT NOT NULL, hints TEXT NOT NULL, created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX parked_hints_expires ON parked_hints (expires_at);
    """,
    # Step 7. The clients to which a user agreed to continue in a browser session. RFC 8252 §8.6.
    """
    CREATE TABLE browser_session_client (
        id_sha256 TEXT NOT NULL REFERENCES browser_session (id_sha256) ON DELETE CASCADE,
        client_id TEXT NOT NULL REFERENCES client (id) ON DELETE CASCADE,
        confirmed_at INTEGER NOT NULL, PRIMARY KEY (id_sha256, client_id)) STRICT, WITHOUT ROWID;
    CREATE INDEX browser_session_client_client ON browser_session_client (client_id);
    """,
    # Step 8. Roles that put their holders out of reach of delegated scopes. MadAdmin is one.
    """
    ALTER TABLE role ADD COLUMN is_privileged INTEGER NOT NULL DEFAULT 0;
    UPDATE role SET is_privileged = 1 WHERE is_protected = 1;
    """,
    # Step 9. Whether somebody chose the grant types of a client. Those of before keep what they have.
    """
    ALTER TABLE client ADD COLUMN are_grants_named INTEGER NOT NULL DEFAULT 1;
    """,
    # Step 10. Rows of the audit log about what was refused. They share the numbers of the table audit, and have a hash
    # chain of their own: so they can be purged before the rows between which they lie.
    """
    CREATE TABLE audit_refusal (
        seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, actor_id TEXT NOT NULL, action TEXT NOT NULL,
        target TEXT NOT NULL, secondary TEXT NOT NULL, ip_address TEXT NOT NULL, user_agent TEXT NOT NULL,
        request_id TEXT NOT NULL, row_sha256 TEXT NOT NULL, result TEXT NOT NULL) STRICT;
    """,
    # Step 11. Wrong passwords in browsers in which their user logged in before.
    """
    CREATE TABLE device_failure (
        device_sha256 TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        failures INTEGER NOT NULL, last_failed_at INTEGER NOT NULL, lockout_until INTEGER NOT NULL,
        expires_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX device_failure_user ON device_failure (user_id);
    """,
    # Step 12. What is deleted and still has rows that belong to it, for upkeep to remove. The epoch of a user's logins
    # at a client. Logins of a browser session are found without reading all logins of the user. Ending a login changes
    # its own row alone, so no statement asks for sessions by their `sid`.
    """
    CREATE TABLE ended_login (
        user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE, client_id TEXT NOT NULL,
        revoked_before INTEGER NOT NULL, PRIMARY KEY (user_id, client_id)) STRICT, WITHOUT ROWID;
    DROP INDEX session_sid;
    CREATE INDEX family_user_browser ON family (user_id, browser);
    DROP INDEX family_user;
    CREATE INDEX consent_client ON consent (client_id);
    CREATE TABLE deletion (kind TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID;
    """,
    # Step 13. The scope of whoever reads the metrics. A new database, which has no `created_at` yet, is seeded with it.
    """
    INSERT INTO scope
    SELECT '5f0c2a7e-3b1d-4c86-9e54-6a2d8f71c903', 'admin:read_metrics', 'Read the metrics.', 1, 1,
           CAST(value AS INTEGER), CAST(value AS INTEGER)
      FROM meta WHERE name = 'created_at'
        ON CONFLICT DO NOTHING;
    """,
    # Step 14. Links by which users choose a password: one of a user at a time. Where a login came from: of a login in a
    # browser, the browser's address and not that of the application that exchanged its code. Who locked an account, and
    # why. When a client got a token last.
    """
    CREATE TABLE invitation (
        user_id TEXT PRIMARY KEY REFERENCES account (id) ON DELETE CASCADE, id TEXT NOT NULL UNIQUE,
        handle_sha256 TEXT NOT NULL UNIQUE, purpose TEXT NOT NULL, rights TEXT NOT NULL, created_by TEXT NOT NULL,
        created_ms INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    ALTER TABLE family ADD COLUMN ip_address TEXT NOT NULL DEFAULT '';
    ALTER TABLE family ADD COLUMN user_agent TEXT NOT NULL DEFAULT '';
    ALTER TABLE account ADD COLUMN lockout_reason TEXT NOT NULL DEFAULT '';
    ALTER TABLE account ADD COLUMN lockout_by TEXT NOT NULL DEFAULT '';
    CREATE TABLE client_use (client_id TEXT PRIMARY KEY, last_token_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX family_address ON family (ip_address) WHERE ip_address <> '';
    """,
    # Step 15. The sessions of administrators at the console. One that ends is deleted.
    """
    CREATE TABLE admin_session (
        id_sha256 TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES account (id) ON DELETE CASCADE,
        amr TEXT NOT NULL, auth_time INTEGER NOT NULL, proven_at INTEGER NOT NULL, created_ms INTEGER NOT NULL,
        last_seen_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, ip_address TEXT NOT NULL, user_agent TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX admin_session_user ON admin_session (user_id);
    """,
    # Step 16. Lists of users, found and sorted without their rows. No login changes a column of these indexes, but one
    # that is locked out.
    """
    CREATE INDEX account_list ON account (username, is_active, email, created_at, id);
    CREATE INDEX account_totp ON account (username, is_active, email, created_at, id) WHERE totp_sealed <> '';
    CREATE INDEX account_locked ON account (id) WHERE lockout_until > 0 OR totp_locked_until > 0;
    """,
    # Step 17. The brand of the pages, in one row. What is NULL is left to the options.
    """
    CREATE TABLE brand (
        id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT, color TEXT, logo_sha256 TEXT, logo_type TEXT NOT NULL,
        modified_at INTEGER NOT NULL, logo BLOB) STRICT;
    """,
    # Step 18. When a secret of a client was used last: what one looks at before the old one of two is taken away. Every
    # action that the audit log ever had a row of.
    """
    ALTER TABLE client_secret ADD COLUMN last_used_at INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE audit_action (action TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
    INSERT INTO audit_action SELECT action FROM audit UNION SELECT action FROM audit_refusal;
    """,
)

# The tables whose rows go with a user, client, scope or role: the column that names it, and the primary key. What refers to
# another one comes first, so that a slice deletes as many rows as it says and no more by a cascade.
DEPENDENTS = {
    "account": (
        ("refresh_token", "user_id", ("id",)), ("session", "user_id", ("id",)), ("family", "user_id", ("sid",)),
        ("authorization_code", "user_id", ("code_sha256",)), ("browser_session", "user_id", ("id_sha256",)),
        ("admin_session", "user_id", ("id_sha256",)), ("login_transaction", "user_id", ("id",)),
        ("recovery_code", "user_id", ("code_sha256",)), ("consent", "user_id", ("user_id", "client_id")), ("ended_login", "user_id", ("user_id", "client_id")),
        ("user_role", "user_id", ("user_id", "role_id")), ("user_scope", "user_id", ("user_id", "scope_id")),
        ("device_failure", "user_id", ("device_sha256",)), ("invitation", "user_id", ("user_id",)),
    ),
    "client": (
        ("browser_session_client", "client_id", ("id_sha256", "client_id")),
        ("consent", "client_id", ("user_id", "client_id")),
    ),
    "scope": (
        ("user_scope", "scope_id", ("user_id", "scope_id")), ("client_scope", "scope_id", ("client_id", "scope_id")),
    ),
    "role": (
        ("user_role", "role_id", ("user_id", "role_id")), ("role_permission", "role_id", ("role_id", "permission_id")),
    ),
}
DELETED = "deleted:"  # begins the name of a row that upkeep is deleting; its id follows

BACKUP_SCHEMA = "CREATE TABLE backup (name TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT"


class AtLeast(int):
    """The total of a list that is longer than what is counted of it: so many rows there are, and perhaps more."""


def lockout_seconds(lockout: int, earlier: int, most: int = LOCKOUT_MAX) -> int:
    """Return how long a lockout lasts: twice as long for each earlier one since the last success, up to `most`, or as
    long as the first, `lockout`, where that is longer.
    """
    return min(max(most, lockout), lockout << min(earlier, 12))


def like(q: str) -> str:
    """Return the LIKE pattern of every text that contains `q`. Wildcards in `q` stand for themselves."""
    return "%" + q.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


# What the audit log may be narrowed by: member of AuditFilter -> condition. No column has an index, which each login
# would have to write: requests read the log in pieces.
AUDIT_FILTERS = {
    "action": "action = :action", "actor_id": "actor_id = :actor_id", "target": ":target IN (target, secondary)",
    "since": "at >= :since", "until": "at <= :until", "result": "result = :result",
    "ip_address": "ip_address = :ip_address", "request_id": "request_id = :request_id",
    "about": """
        (:about IN (actor_id, target, secondary)
         OR instr(';' || secondary || ';', ';user_id=' || :about || ';') > 0)
    """,
}
AUDIT_PLACES = 256  # of the log whose times are read to find where a time lies in it
CLOCK_SLACK = 3600  # seconds that the times of neighbouring rows may be out of order
AUDIT_TABLES = (AuditRow.table, AuditRefusal.table)
ROW_OVERHEAD, PAGE_OVERHEAD = 32, 1.05  # octets of a row besides its text, and pages besides their rows (measured)
# Whether a login was ended by itself, or with all logins of its user at its client. It also ends by an epoch of its user
# or client, which callers compare. No row of its tokens is changed when it ends: they may be a million.
FAMILY_REVOKED = """
    (family.revoked_at IS NOT NULL OR EXISTS (
        SELECT 1 FROM ended_login
         WHERE ended_login.user_id = family.user_id AND ended_login.client_id = family.client_id
           AND ended_login.revoked_before >= family.created_ms))
"""
# Whether the login of a session or refresh token is over, by itself or by an epoch.
LOGIN_IS_OVER = f"""
    EXISTS (
        SELECT 1 FROM family
          LEFT JOIN account ON account.id = family.user_id
          LEFT JOIN client ON client.client_id = family.client_id
         WHERE family.sid = {{table}}.sid
           AND (family.created_ms <= max(coalesce(account.revoked_before, 0), coalesce(client.revoked_before, 0))
                OR {FAMILY_REVOKED}))
"""
# A client that is gone ends all that was issued to it: 9223372036854775807 is the largest integer there is.
LISTED_SESSIONS = f"""
    SELECT session.*, coalesce(username, '') AS username,
           max(coalesce(account.revoked_before, 0),
               CASE WHEN mad_use = 'admin' THEN 0
                    ELSE coalesce(client.revoked_before, 9223372036854775807) END) AS dead_before,
           coalesce({FAMILY_REVOKED}, 0) AS family_revoked, coalesce(family.ip_address, '') AS ip_address,
           coalesce(family.user_agent, '') AS user_agent
      FROM session
      LEFT JOIN account ON account.id = session.user_id
      LEFT JOIN client ON client.client_id = session.client_id
      LEFT JOIN family ON family.sid = session.sid
"""
# The epoch of everything, in milliseconds, as Idp.revoked_before is in Python.
REVOKED_BEFORE = """
    coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'revoked_before'), 0)
"""
# Whether an access token is alive, as is_session_revoked() says of a listed one. An id begins with its milliseconds.
SESSION_IS_ALIVE = f"""
    session.expires_at > :now AND session.revoked_at IS NULL
    -- Implied by the maximum below: but as a range of ids it is not even read what an end of everything left behind.
    AND session.id > printf('%012x', {REVOKED_BEFORE})
    AND substr(session.id, 1, 12) > printf('%012x', max(
        coalesce((SELECT revoked_before FROM account WHERE account.id = session.user_id), 0),
        CASE WHEN mad_use = 'admin' THEN 0
             ELSE coalesce((SELECT revoked_before FROM client WHERE client.client_id = session.client_id),
                           9223372036854775807) END,
        {REVOKED_BEFORE}))
    AND (session.sid IS NULL
         OR EXISTS (SELECT 1 FROM family WHERE family.sid = session.sid AND NOT {FAMILY_REVOKED}))
"""
# What a list of sessions may be narrowed by, beside columns that have an index: parameter -> condition. That of the
# user lets the index of users find the rows.
SESSION_FILTERS = {
    "user_id": "user_id = :user_id", "client_id": "client_id = :client_id", "id": "id = :id",
    "mad_use": "mad_use = :mad_use",
    "sid": "sid = :sid AND user_id = (SELECT family.user_id FROM family WHERE family.sid = :sid)",
    "ip_address": """
        sid IN (SELECT family.sid FROM family WHERE family.ip_address = :ip_address AND family.ip_address <> '')
        AND user_id IN (SELECT family.user_id FROM family
                         WHERE family.ip_address = :ip_address AND family.ip_address <> '')
    """,
}
LISTED_REFRESH_TOKENS = f"""
    SELECT refresh_token.*, username, family.scope AS scope,
           max(account.revoked_before, coalesce(client.revoked_before, 9223372036854775807)) AS dead_before,
           created_ms AS family_created_ms, {FAMILY_REVOKED} AS family_revoked
      FROM refresh_token
      JOIN account ON account.id = refresh_token.user_id
      JOIN family ON family.sid = refresh_token.sid
      LEFT JOIN client ON client.client_id = refresh_token.client_id
"""
# The same as `ip_address`, for one from which very many logged in: read in the order of ids until a page is full.
OF_CROWDED_ADDRESS = """
    EXISTS (SELECT 1 FROM family WHERE family.sid = session.sid AND family.ip_address = :ip_address
               AND family.ip_address <> '')
"""
# Who has a role or scope, by the name of the parameter. Of few, their users are read; of many, the list is read in its
# order, and each user looked for among them.
HOLDERS = {
    "role_id": "SELECT user_id FROM user_role WHERE role_id = :role_id",
    "scope_id": "SELECT user_id FROM user_scope WHERE scope_id = :scope_id",
    "admin": "SELECT user_id FROM user_role WHERE role_id = :admin",
}
HELD_BY_FEW = {name: f"account.id IN ({holders})" for name, holders in HOLDERS.items()}
HELD_BY_MANY = {name: f"EXISTS ({holders} AND user_id = account.id)" for name, holders in HOLDERS.items()}
# The rows of client_credentials tokens have these values in common, so they need not be queued with each.
MACHINE_SESSION_INSERT = """
    INSERT INTO session (id, client_id, scope, token_use, mad_use, login_method, issued_at, expires_at)
    VALUES (?, ?, ?, 'access', 'auth', 'client_credentials', ?, ?)
"""
SECRET_USE_UPDATE = "UPDATE client_secret SET last_used_at = max(last_used_at, ?) WHERE id = ?"


LAST_AUDIT = "SELECT seq, row_sha256 FROM audit ORDER BY seq DESC LIMIT 1"


def chain(previous: str, seq: int, row: tuple) -> str:
    """Return the hash of an audit row: base64url SHA-256 of the previous row's hash and every column.

    The last column is the result. Rows of the first schema have none, and their hashes do not cover it.
    """
    digest = hashlib.sha256(msgspec.json.encode((previous, seq, *(row if row[-1] else row[:-1])))).digest()
    return base64.urlsafe_b64encode(digest)[:-1].decode()


def batch_audit(batch: list[tuple[tuple, tuple | None]]) -> list[tuple]:
    """Return the audit rows of a batch of machine tokens: one for each client, peer and user agent in it.

    At rest that is one row for each token. Under load a row counts the tokens of some milliseconds and
    names the first and the last `jti`; the sessions between them are the others. A row for every token
    would wear out the flash of a busy server.
    """
    groups: dict[tuple, list[tuple]] = {}
    for session, caller in batch:
        if caller is not None:
            groups.setdefault(caller[:3], []).append((session, caller))
    rows = []
    for (client_id, peer, user_agent), members in groups.items():
        first, last = members[0][0], members[-1][0]
        secondary = f"jti={first[0]}" if len(members) == 1 else f"count={len(members)} jti={first[0]}..{last[0]}"
        rows.append(
            (last[3], client_id, "oidc_token_issued", client_id, secondary, peer, user_agent, members[0][1][3], SUCCESS)
        )
    return rows


class Store(Database):
    """Every SQL statement of the server, in methods that take and return records.

    Every statement that writes is a transaction of its own, or joins the caller's: who calls a method of several
    statements does so within transaction(), so that all of them are done or none.

    A power cut may lose only what flush() wrote last, the rows of machine tokens, because they are written with
    synchronous=NORMAL. Their tokens stay valid: no check of a token needs its row.
    """

    def __init__(
        self, path: str | os.PathLike, key: str = "", generation: Generation | None = None, log: Log | None = None,
        mode: str = "rw"
    ) -> None:
        super().__init__(path, key, generation, log, mode)
        # The rows of machine tokens that wait for flush(): (session, caller) as enqueue() takes them.
        self.queue: collections.deque[tuple[tuple, tuple | None]] = collections.deque()
        self.wake = threading.Event()
        self.flush_lock = threading.Lock()
        self.writable = True  # False from a failed write until one has succeeded
        self.batch_head = (0, "")  # of the audit chain, as the last batch of this process left it
        self.flusher: threading.Thread | None = None
        self.used: dict[str, int] = {}  # when this process recorded last that a client got a token
        self.secrets_used: dict[str, int] = {}  # the same of secrets, by their ids
        self.secret_queue: collections.deque[tuple[int, str]] = collections.deque(maxlen=BATCH_MAX)  # for flush()

    # -- meta: one value for each name --

    def meta(self, name: str, default: str = "") -> str:
        """Return the value of a name, or `default`."""
        value = self.value("SELECT value FROM meta WHERE name = :name", name=name)
        return default if value is None else value

    def put_meta(self, name: str, value: object) -> None:
        self.run(
            "INSERT INTO meta VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            name=name, value=str(value),
        )

    def delete_meta(self, name: str) -> None:
        self.run("DELETE FROM meta WHERE name = :name", name=name)

    # -- the brand --

    def find_brand(self) -> BrandRow | None:
        """Return the brand that an administrator chose, or None."""
        return self.one(BrandRow, """
            SELECT name, color, logo_sha256, logo_type, coalesce(length(logo), 0), modified_at
              FROM brand
            """)

    def find_brand_logo(self, sha256: str) -> bytes | None:
        """Return the picture of the brand if it is still this one."""
        return self.value("SELECT logo FROM brand WHERE logo_sha256 = :sha256", sha256=sha256)

    def put_brand(self, row: BrandRow, logo: bytes | None) -> None:
        """Store the brand. `logo` is the octets of its picture; None leaves those that are stored."""
        self.run(
            """
            INSERT INTO brand (id, name, color, logo_sha256, logo_type, modified_at, logo)
            VALUES (1, :name, :color, :logo_sha256, :logo_type, :modified_at, :logo)
                ON CONFLICT (id) DO UPDATE
               SET name = excluded.name, color = excluded.color, logo_sha256 = excluded.logo_sha256,
                   logo_type = excluded.logo_type, modified_at = excluded.modified_at,
                   logo = coalesce(excluded.logo, logo)
            """,
            name=row.name, color=row.color, logo_sha256=row.logo_sha256, logo_type=row.logo_type,
            modified_at=row.modified_at, logo=logo,
        )

    def delete_brand(self) -> bool:
        """Leave the brand to the options. Return whether it was not."""
        return self.changed("DELETE FROM brand")

    # -- the schema --

    def migrate(self) -> None:
        """Run the migrations that are missing. Each commits together with its number."""
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        for number, step in enumerate(MIGRATIONS[version:], version + 1):
            with self.transaction():
                for statement in step.split(";\n"):
                    if statement.strip():
                        self.connection.execute(statement)
                self.connection.execute(f"PRAGMA user_version = {number:d}")

    def seed(self, now: int) -> None:
        """Insert the role and the scopes that every database has."""
        self.insert(Role(MAD_ADMIN_ROLE_ID, MAD_ADMIN_ROLE_NAME, "Administrator of this server.", 1, 1, now, now, 1))
        for id, name, description in SEEDED_SCOPES:
            self.insert(Scope(id, name, description, 1, 1, now, now))

    @staticmethod
    def make(path: str | os.PathLike, key: str, now: int) -> "Store":
        """Create a database at `path`, which must not exist, with the rows that every new one has."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
        store = Store(path, key)
        try:
            store.connection.execute("PRAGMA journal_mode = WAL")
            store.migrate()
            with store.transaction():
                store.put_meta("created_at", now)
                store.put_meta("instance_id", uuid.uuid4())
                store.put_meta("revoked_before", 0)
                store.seed(now)
        except BaseException:
            store.close()
            raise
        return store

    def open(
        self, alone: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext, is_audited: bool = True
    ) -> None:
        """Check that this is an intact database of ours, and run the migrations that are missing.

        `alone` makes the context in which they run. If the write-ahead log lacks what was acknowledged, everything
        issued before is revoked: see note_log_damage(); `is_audited` says whether that is audited. Raises
        StartupError with one sentence, and then leaves the files as they are.
        """
        check_log(self.path)
        # The last read-write connection to close checkpoints the WAL that a crash left behind. Open read-only until
        # both files are verified. https://www.sqlite.org/wal.html "Automatic Checkpoint"
        left = os.path.exists(self.path + "-wal") and os.path.getsize(self.path + "-wal") > 0
        try:
            connection = self.connect(mode="ro") if left else self.connection
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        except sqlcipher3.Error as error:
            if self.key and result_code(error) not in (
                SQLITE_BUSY, SQLITE_READONLY, SQLITE_IOERR, SQLITE_FULL, SQLITE_CANTOPEN,
            ):
                raise StartupError(
                    f"the database {self.path} does not open: db-pass is wrong (or db-key-file, if that is set), or the file is damaged"
                ) from None
            raise StartupError(f"the database {self.path} does not open: {error}") from None
        if version > len(MIGRATIONS):
            raise StartupError(
                f"the database {self.path} was written by a newer microauthd (schema {version}, this one knows "
                f"{len(MIGRATIONS)}): use that one"
            )
        try:
            if version == 0 or connection.execute("SELECT count(*) FROM meta").fetchone() is None:
                raise StartupError(f"the file {self.path} is not a microauthd database")
            # A large database would take too long at every start: its damaged pages fail when they are read.
            small = os.path.getsize(self.path) < 32_000_000
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone() if small else ("ok",)
            if verdict != "ok":
                raise StartupError(
                    f"the database {self.path} is damaged ({verdict.splitlines()[-1]}): restore a backup; it is "
                    "left as it is"
                )
            damage = self.find_log_damage(connection)
            frames = self.count_frames(connection)
            if left:
                self.drop(connection)
            if version < len(MIGRATIONS):
                with alone():
                    self.migrate()
            if damage:
                self.note_log_damage(damage, is_audited)
            self.mark.adopt(bool(damage), frames, int(self.clock() * 1000))
        except (sqlcipher3.Error, Unavailable) as error:
            reason = error.log if isinstance(error, Unavailable) else error
            raise StartupError(f"the database {self.path} cannot be used: {reason}") from None

    # -- a damaged write-ahead log --

    def last_issued_ms(self) -> int:
        """Return a time in milliseconds after which nothing in this database was issued.

        The clock may have been behind, so the epoch of the last revocation counts too: see issue().
        """
        return max(self.newest_at() * 1000 + 999, int(self.meta("revoked_before", "0")) + 1)

    def note_log_damage(self, damage: str, is_audited: bool) -> None:
        """Revoke everything issued before, as after a restore: what was revoked since may be valid again.

        `damage` is stored, and reported until an operator has settled it: see settle_log_damage().
        """
        now_ms, known = int(self.clock() * 1000), self.mark.read()
        # Where the clock is behind, the mark knows when something was issued last: a batch may have waited for it.
        issued_ms = known.at_ms + int(1000 * BATCH_SECONDS) if known else 0
        with self.transaction(identity=True):
            self.put_meta("revoked_before", max(now_ms, issued_ms, self.last_issued_ms()))
            self.delete_logins()
            self.put_meta("log_damaged", damage)
            if is_audited:
                now = max(now_ms // 1000, self.newest_at())
                self.append_audit([(now, "system", "log_damaged", "", damage, "", "", "", FAILURE)])

    def settle_log_damage(self) -> bool:
        """Report the damage of the log no longer. Return whether there was one."""
        return self.changed("DELETE FROM meta WHERE name = 'log_damaged'")

    # -- backups, and the integrity of a database --

    def copy_to(self, path: str | os.PathLike, files: dict, now: int) -> None:
        """Copy the database, as it is now, into an empty file, and these files into a table of the copy.

        Others may write meanwhile: in WAL mode a reader blocks no writer.
        """
        copy = Store(path, self.key)
        try:
            # All pages in one step: between steps a write of another connection would restart the copy.
            # https://www.sqlite.org/c3ref/backup_finish.html "sqlite3_backup_step()"
            self.connection.backup(copy.connection, pages=-1)
            # Without a WAL the copy is one file, and can be read on a read-only medium.
            copy.connection.execute("PRAGMA journal_mode = DELETE")
            with copy.transaction():
                copy.connection.execute(BACKUP_SCHEMA)
                copy.connection.executemany("INSERT INTO backup VALUES (?, ?)", list(files.items()))
                copy.put_meta("backed_up_at", now)
        finally:
            copy.close()

    def read_backup_files(self) -> dict[str, bytes] | None:
        """Return the files in a backup by their names, or None if this is no backup."""
        if not self.exists("SELECT 1 FROM sqlite_schema WHERE name = 'backup'"):
            return None
        with self.guard:
            return dict(self.connection.execute("SELECT name, content FROM backup").fetchall())

    def drop_backup_files(self) -> None:
        """Turn a backup into a database that can serve, which holds no keys and settings."""
        with self.transaction():
            self.connection.execute("DROP TABLE backup")

    def check_integrity(self) -> str:
        """Read every page and row. Return a description of the first damage, or "" if there is none."""
        try:
            if self.key:
                broken = self.connection.execute("PRAGMA cipher_integrity_check").fetchall()
                if broken:
                    return str(broken[0][0])
            (verdict,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
            return "" if verdict == "ok" else verdict.splitlines()[-1]
        except sqlcipher3.Error as error:
            return str(error)

    def checkpoint(self) -> None:
        """Write everything in the WAL into the database file, and sync that."""
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.execute("PRAGMA journal_mode = WAL")
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    # -- pages of a list --

    def count(self, sql: str, counted: int | None = None, **parameters: object) -> int:
        """Return how many rows a SELECT finds, counting up to `counted` of them, or COUNT_MAX."""
        most = COUNT_MAX if counted is None else min(counted, COUNT_MAX)
        found = self.value(f"SELECT count(*) FROM ({sql} LIMIT {most + 1})", **parameters)
        return found if found <= most else AtLeast(found)

    def page(
        self, record: type[Row], sql: str, sort: str, limit: int, offset: int, listed: str = "",
        counted: int | None = None, indexed: bool | None = None, **parameters: object
    ) -> tuple[list[Row], int]:
        """Return a page of the rows that a SELECT finds, and how many it finds in all: AtLeast beyond COUNT_MAX, or
        `counted` if that is less.

        `sort` is the name of a column, with a hyphen before it for descending order. `listed` is a SELECT that gives
        the rows of the page what other tables know of them: only these rows, and not all that are counted or skipped.
        `indexed` tells whether to read in the order of an index; None lets the page decide.
        """
        column = sort.removeprefix("-")
        if not column.isidentifier():
            raise ValueError(sort)
        # A search, and a page far behind, reads many rows: in the order of an index each would cost a page of the disk.
        # The unary plus makes the column an expression, for which there is no index. In that of ids rows are stored.
        if indexed is None:
            indexed = column == "id" or not (parameters.get("q") or offset > 1000)
        plus = "" if indexed else "+"
        direction = "DESC" if sort[0] == "-" else "ASC"
        # A name is unique: a second term would have SQLite read the index of the constraint and, for each of its entries,
        # the row, in place of account_list, which has all that is asked.
        order = f"{plus}{column} {direction}" + ("" if column in ("id", "username") else ", id")
        paged = f"SELECT * FROM ({sql}) ORDER BY {order} LIMIT :limit OFFSET :offset"
        if listed:
            table = record.table
            paged = f"""
                {listed} WHERE {table}.id IN (SELECT id FROM ({sql}) ORDER BY {order} LIMIT :limit OFFSET :offset)
                 ORDER BY {table}.{column} {direction}, {table}.id
            """
        rows = self.all(record, paged, limit=limit + 1, offset=offset, **parameters)
        if len(rows) <= limit and (rows or offset == 0):
            return rows, offset + len(rows)
        # One row more than the page tells that there is a next one, however many there are.
        if counted == 0:
            return rows[:limit], AtLeast(offset + len(rows))
        total = self.count(f"SELECT 1 FROM ({sql}){NEWEST if column == 'id' else ''}", counted, **parameters)
        if rows and total < offset + len(rows):
            total = AtLeast(offset + len(rows))
        return rows[:limit], total

    def page_after(
        self, record: type[Row], sql: str, sort: str, limit: int, offset: int, listed: str, after: str | None,
        counted: int | None = None, **parameters: Any
    ) -> tuple[list[Row], int]:
        """Return what page() does, of the rows that follow the id `after` in the order of ids, if that is given.

        Such a page costs the same however deep it lies: no rows are read to be skipped. The total is still that of all.
        """
        if after is None:
            return self.page(record, sql, sort, limit, offset, listed, counted, **parameters)
        follows = f"{sql} AND id {'<' if sort[0] == '-' else '>'} :after"
        rows, _ = self.page(record, follows, sort, limit, 0, listed, 0, after=after, **parameters)
        return rows, self.count(f"SELECT 1 FROM ({sql}){NEWEST}", counted, **parameters)

    def page_of(
        self, record: type[Row], listed: str, sort: str, limit: int, offset: int, after: str | None = None,
        **columns: Any
    ) -> tuple[list[Row], int]:
        """Return a page of the rows whose columns have these values. A column whose value is None may have any."""
        given = {name: value for name, value in columns.items() if value is not None}
        # No `:name IS NULL OR …`: SQLite would not use the index of that column.
        where = " AND ".join(["1 = 1", *(f"{name} = :{name}" for name in given)])
        rows_of = f"SELECT * FROM {record.table} WHERE {where}"
        return self.page_after(record, rows_of, sort, limit, offset, listed, after, **given)

    # -- account, recovery_code --

    def find_account(self, id: str) -> Account | None:
        return self.one(
            Account, "SELECT * FROM account WHERE id = :id AND username <> :deleted || id", id=id, deleted=DELETED
        )

    def find_standings(self, user_id: str, client_id: str) -> tuple[Standing | None, Standing | None]:
        """Return the standings of a user and of a client, each None if it does not exist; without a user neither."""
        with self.guard:
            row = self.connection.execute(
                """
                SELECT account.id, account.is_active, account.revoked_before,
                       client.id, client.is_active, client.revoked_before
                  FROM account LEFT JOIN client ON client.client_id = :client_id
                                               AND client.client_id <> :deleted || client.id
                 WHERE account.id = :user_id AND username <> :deleted || account.id
                """,
                {"user_id": user_id, "client_id": client_id, "deleted": DELETED},
            ).fetchone()
        if row is None:
            return None, None
        return Standing(*row[:3]), Standing(*row[3:]) if row[3] else None

    def find_account_by_name(self, username: str) -> Account | None:
        return self.one(
            Account, "SELECT * FROM account WHERE username = :username AND username <> :deleted || id",
            username=username, deleted=DELETED,
        )

    def has_few_holders(self, name: str, id: str) -> bool:
        """Return whether at most DENSE users have a role or scope: `name` is that of its parameter in HOLDERS."""
        return not isinstance(self.count(HOLDERS[name], DENSE, **{name: id}), AtLeast)

    def list_accounts(
        self, q: str = "", is_active: int | None = 1, sort: str = "username", limit: int = 1000, offset: int = 0,
        role_id: str | None = None, scope_id: str | None = None, is_admin: bool | None = None,
        locked: bool | None = None, totp: bool | None = None, unused_since: int | None = None, now: int = 0
    ) -> tuple[list[Account], int]:
        """Return users whose name or e-mail address contains `q`: active ones, inactive ones, or all for None.

        `locked` is about passwords or codes, `unused_since` selects those who did not log in since then.
        """
        held = {"role_id": role_id, "scope_id": scope_id, "admin": MAD_ADMIN_ROLE_ID if is_admin else None}
        few = {name: id is not None and self.has_few_holders(name, id) for name, id in held.items()}
        # Only what is asked for: SQLite finds no index by `:name IS NULL OR …`.
        conditions = {
            "username <> :deleted || id": True, "is_active = :is_active": is_active is not None,
            r"(username LIKE :like ESCAPE '\' OR email LIKE :like ESCAPE '\')": bool(q),
            "NOT EXISTS (SELECT 1 FROM user_role WHERE user_id = account.id AND role_id = :admin)": is_admin is False,
            # The first half names the partial index.
            "(lockout_until > 0 OR totp_locked_until > 0) AND (lockout_until > :now OR totp_locked_until > :now)": locked,
            "lockout_until <= :now AND totp_locked_until <= :now": locked is False,
            "totp_sealed <> ''": totp, "totp_sealed = ''": totp is False,
            "last_login_at < :unused_since": unused_since is not None,
        } | {
            (HELD_BY_FEW if few[name] else HELD_BY_MANY)[name]: id is not None for name, id in held.items()
        }
        where = " AND ".join(text for text, is_asked in conditions.items() if is_asked)
        # Not in the order of names where few are found, or where each row must be read to know: one by one, rows cost
        # more than the whole table.
        is_sparse = locked or totp is False or locked is False or unused_since is not None or any(few.values())
        # Each of many holders that is counted is looked for.
        counted = DENSE if any(held[name] and not few[name] for name in held) else None
        return self.page(
            Account, f"SELECT id, username, email, is_active, created_at, last_login_at FROM account WHERE {where}",
            sort, limit, offset, "SELECT account.* FROM account", counted, q=q, like=like(q), is_active=is_active,
            role_id=role_id, scope_id=scope_id, deleted=DELETED, admin=MAD_ADMIN_ROLE_ID, unused_since=unused_since,
            now=now, indexed=not is_sparse,
        )

    def describe_users(self, ids: Iterable[str]) -> list[UserDetail]:
        """Return the active roles of these users, and how many unspent recovery codes they have."""
        return self.all(
            UserDetail,
            """
            SELECT user_id, name, 0
              FROM user_role JOIN role ON role.id = role_id AND is_active = 1
             WHERE user_id IN (SELECT value FROM json_each(:ids))
             UNION ALL
            SELECT user_id, '', count(*)
              FROM recovery_code
             WHERE user_id IN (SELECT value FROM json_each(:ids)) AND spent_at IS NULL
             GROUP BY user_id
             ORDER BY 2
            """,
            ids=msgspec.json.encode(list(ids)).decode(),
        )

    def add_account(
        self, id: str, username: str, email: str, email_verified: int, password_hash: str, now: int
    ) -> Account | None:
        return self.one(
            Account,
            """
            INSERT INTO account (id, username, email, email_verified, password_hash, created_at, modified_at)
            VALUES (:id, :username, :email, :email_verified, :password_hash, :now, :now)
            RETURNING *
            """,
            id=id, username=username, email=email, email_verified=email_verified, password_hash=password_hash, now=now,
        )

    def update_account(
        self, id: str, username: str | None, email: str | None, email_verified: int | None, now: int
    ) -> Account | None:
        """Change those of the three that are not None."""
        return self.one(
            Account,
            """
            UPDATE account
               SET username = coalesce(:username, username), email = coalesce(:email, email),
                   email_verified = coalesce(:email_verified, email_verified), modified_at = :now
             WHERE id = :id
            RETURNING *
            """,
            id=id, username=username, email=email, email_verified=email_verified, now=now,
        )

    def set_account_active(self, id: str, is_active: int, now: int) -> bool:
        """Activate or deactivate an account. Return whether that changed anything."""
        return self.changed(
            """
            UPDATE account SET is_active = :is_active, modified_at = :now
             WHERE id = :id AND is_active <> :is_active
            """,
            id=id, is_active=is_active, now=now,
        )

    def delete_account(self, id: str) -> bool:
        self.mark_qr_files(id)
        if not self.has_many("account", id):
            return self.changed("DELETE FROM account WHERE id = :id", id=id)
        self.put_deletion("account", id)
        return self.changed(
            """
            UPDATE account
               SET username = :deleted || id, email = '', password_hash = '', totp_sealed = '',
                   totp_pending_sealed = '', is_active = 0, revoked_before = :forever
             WHERE id = :id
            """,
            id=id, deleted=DELETED, forever=1000 * FOREVER,
        )

    def set_password_hash(self, id: str, password_hash: str, now: int, instead_of: str | None = None) -> None:
        """Store a hash. With `instead_of`, only if that is the one stored: a newer password must not be undone."""
        self.run(
            """
            UPDATE account SET password_hash = :password_hash, modified_at = :now
             WHERE id = :id AND (:instead_of IS NULL OR password_hash = :instead_of)
            """,
            id=id, password_hash=password_hash, now=now, instead_of=instead_of,
        )
        if instead_of is None:
            self.delete_invitation(id)

    def set_lockout(self, id: str, until: int, now: int, reason: str = "", by: str = "") -> None:
        """Lock an account until then. 0 clears every lockout and every count of failures."""
        self.run(
            """
            UPDATE account
               SET lockout_until = :until, modified_at = :now, lockout_reason = :reason, lockout_by = :by,
                   failed_logins = CASE WHEN :until = 0 THEN 0 ELSE failed_logins END,
                   lockouts = CASE WHEN :until = 0 THEN 0 ELSE lockouts END,
                   totp_failures = CASE WHEN :until = 0 THEN 0 ELSE totp_failures END,
                   totp_locked_until = CASE WHEN :until = 0 THEN 0 ELSE totp_locked_until END
             WHERE id = :id
            """,
            id=id, until=until, now=now, reason=reason, by=by,
        )
        self.run("DELETE FROM device_failure WHERE user_id = :id AND :until = 0", id=id, until=until)

    def count_failed_login(
        self, id: str, now: int, window: int, threshold: int, lockout: int, most: int
    ) -> Account | None:
        """Count one failure within `window` seconds; at the threshold, lock the account: see lockout_seconds().

        In one transaction, so that concurrent failures are all counted. An administrator's later lockout stays.
        """
        with self.transaction():
            account = self.one(
                Account,
                """
                UPDATE account
                   SET failed_logins = CASE WHEN last_failed_at + :window < :now OR failed_logins >= :threshold
                                            THEN 1 ELSE failed_logins + 1 END,
                       last_failed_at = :now,
                       lockout_reason = CASE WHEN lockout_until > :now THEN lockout_reason ELSE '' END,
                       lockout_by = CASE WHEN lockout_until > :now THEN lockout_by ELSE '' END
                 WHERE id = :id
                RETURNING *
                """,
                id=id, now=now, window=window, threshold=threshold,
            )
            if account is None or not threshold or account.failed_logins < threshold:
                return account
            return self.one(
                Account,
                """
                UPDATE account
                   SET lockouts = lockouts + 1, lockout_until = max(lockout_until, :until)
                 WHERE id = :id
                RETURNING *
                """,
                id=id, until=now + lockout_seconds(lockout, account.lockouts, most),
            )

    def count_good_login(self, id: str, password_hash: str, now: int) -> bool:
        """Record a login. Return False if by now the account is inactive or has another password than was verified."""
        return self.changed(
            """
            UPDATE account SET failed_logins = 0, lockouts = 0, last_login_at = :now
             WHERE id = :id AND password_hash = :password_hash AND is_active = 1
            """,
            id=id, password_hash=password_hash, now=now,
        )

    def set_totp(self, id: str, sealed: str, now: int) -> None:
        self.run(
            """
            UPDATE account
               SET totp_sealed = :sealed, totp_pending_sealed = '', totp_failures = 0, modified_at = :now
             WHERE id = :id
            """,
            id=id, sealed=sealed, now=now,
        )
        self.delete_invitation(id)
        self.mark_qr_files(id)

    def set_pending_totp(self, id: str, sealed: str, now: int) -> None:
        """Store a seed that is not confirmed yet. The confirmed one stays in force."""
        self.mark_qr_files(id)
        self.run(
            "UPDATE account SET totp_pending_sealed = :sealed, modified_at = :now WHERE id = :id", id=id, sealed=sealed,
            now=now,
        )

    def clear_totp(self, id: str, now: int) -> bool:
        """Remove the second factor, a pending one and the recovery codes. Return whether there was a factor."""
        found = self.changed(
            """
            UPDATE account
               SET totp_sealed = '', totp_pending_sealed = '', totp_failures = 0, totp_locked_until = 0,
                   modified_at = :now
             WHERE id = :id AND (totp_sealed <> '' OR totp_pending_sealed <> '')
            """,
            id=id, now=now,
        )
        self.run("DELETE FROM recovery_code WHERE user_id = :id", id=id)
        self.delete_invitation(id)
        self.mark_qr_files(id)
        return found

    def add_qr_file(self, user_id: str, path: str) -> None:
        """Record the file that shows a user's pending seed. `path` is relative to `totp-qr-output-root`."""
        self.run("INSERT INTO totp_qr_file (path, user_id) VALUES (:path, :user_id)", path=path, user_id=user_id)

    def mark_qr_files(self, user_id: str) -> None:
        """Mark the files of a user as due to be removed. They are removed after the commit, again after a crash."""
        self.run("UPDATE totp_qr_file SET is_due = 1 WHERE user_id = :user_id", user_id=user_id)

    def list_due_qr_files(self) -> list[str]:
        return self.values("SELECT path FROM totp_qr_file WHERE is_due = 1")

    def forget_qr_file(self, path: str) -> None:
        self.run("DELETE FROM totp_qr_file WHERE path = :path", path=path)

    def spend_totp_step(self, id: str, step: int) -> bool:
        """Use a time step, once only. Return whether it was later than the last one used. RFC 6238 §5.2."""
        return self.changed(
            "UPDATE account SET totp_last_step = :step, totp_failures = 0 WHERE id = :id AND totp_last_step < :step",
            id=id, step=step,
        )

    def count_failed_totp(self, id: str, now: int, tries: int, lockout: int) -> None:
        """Count one failure of the second factor. Every `tries` of them lock it: see lockout_seconds()."""
        with self.transaction():
            failures = self.value(
                "UPDATE account SET totp_failures = totp_failures + 1 WHERE id = :id RETURNING totp_failures", id=id
            )
            if failures and failures % tries == 0:
                self.run(
                    "UPDATE account SET totp_locked_until = :until WHERE id = :id",
                    id=id, until=now + lockout_seconds(lockout, failures // tries - 1),
                )

    # -- invitation: a change of the credentials of its user ends it --

    def put_invitation(self, row: Invitation) -> None:
        """Store an invitation in place of the one that its user may have."""
        with self.transaction():
            self.delete_invitation(row.user_id)
            self.insert(row)

    def find_invitation(self, handle_sha256: str) -> Invitation | None:
        return self.one(
            Invitation, "SELECT * FROM invitation WHERE handle_sha256 = :handle_sha256", handle_sha256=handle_sha256
        )

    def find_invitation_by_id(self, id: str) -> Invitation | None:
        return self.one(Invitation, "SELECT * FROM invitation WHERE id = :id", id=id)

    def find_invitation_of(self, user_id: str) -> Invitation | None:
        return self.one(Invitation, "SELECT * FROM invitation WHERE user_id = :user_id", user_id=user_id)

    def spend_invitation(self, handle_sha256: str, now: int) -> Invitation | None:
        """Spend an invitation. Return it, or None if it is unknown, spent or expired."""
        return self.one(
            Invitation,
            "DELETE FROM invitation WHERE handle_sha256 = :handle_sha256 AND expires_at > :now RETURNING *",
            handle_sha256=handle_sha256, now=now,
        )

    def delete_invitation(self, user_id: str) -> bool:
        return self.changed("DELETE FROM invitation WHERE user_id = :user_id", user_id=user_id)

    # -- recovery_code --

    def replace_recovery_codes(self, user_id: str, hashes: Iterable[str], now: int) -> None:
        self.run("DELETE FROM recovery_code WHERE user_id = :user_id", user_id=user_id)
        self.delete_invitation(user_id)
        for code_sha256 in hashes:
            self.run(
                "INSERT INTO recovery_code VALUES (:code_sha256, :user_id, :now, NULL)", code_sha256=code_sha256,
                user_id=user_id, now=now,
            )

    def spend_recovery_code(self, user_id: str, code_sha256: str, now: int) -> bool:
        """Spend a recovery code. Return whether it was an unspent one of this user."""
        return self.changed(
            """
            UPDATE recovery_code
               SET spent_at = :now
             WHERE user_id = :user_id AND code_sha256 = :code_sha256 AND spent_at IS NULL
            """,
            user_id=user_id, code_sha256=code_sha256, now=now,
        )

    def count_recovery_codes(self, user_id: str) -> int:
        """Return how many unspent recovery codes a user has."""
        return self.value(
            "SELECT count(*) FROM recovery_code WHERE user_id = :user_id AND spent_at IS NULL", user_id=user_id
        )

    # -- device_failure --

    def count_failed_device(
        self, device_sha256: str, user_id: str, now: int, window: int, threshold: int, lockout: int, most: int
    ) -> int:
        """Count one wrong password in a browser known to its user; lock there as count_failed_login() does.

        Return when that lockout ends, 0 without one. A whole number of thresholds in `failures` is so many lockouts.
        """
        with self.transaction():
            failures: int = self.value(
                """
                INSERT INTO device_failure
                VALUES (:device_sha256, :user_id, 1, :now, 0, :now + :keep)
                    ON CONFLICT (device_sha256) DO UPDATE
                   SET failures = 1 + CASE WHEN last_failed_at + :window < :now AND :threshold > 0
                                           THEN failures - failures % :threshold ELSE failures END,
                       last_failed_at = :now, expires_at = :now + :keep
                RETURNING failures
                """,
                device_sha256=device_sha256, user_id=user_id, now=now, window=window, threshold=threshold,
                keep=max(window, most, lockout) + 86400,
            )
            if not threshold or failures % threshold:
                return 0
            until = now + lockout_seconds(lockout, failures // threshold - 1, most)
            self.run(
                "UPDATE device_failure SET lockout_until = :until WHERE device_sha256 = :device_sha256",
                until=until, device_sha256=device_sha256,
            )
            return until

    def find_device_lockout(self, device_sha256: str) -> int:
        """Return until when a browser is locked out, Unix seconds; 0 if nothing failed there."""
        found = self.value(
            "SELECT coalesce((SELECT lockout_until FROM device_failure WHERE device_sha256 = :device_sha256), 0)",
            device_sha256=device_sha256,
        )
        return int(found)

    def has_device_failures(self, device_sha256: str) -> bool:
        """Return whether a password was wrong in a browser since the last login there."""
        return self.exists(
            "SELECT 1 FROM device_failure WHERE device_sha256 = :device_sha256", device_sha256=device_sha256
        )

    def delete_device_failures(self, device_sha256: str) -> None:
        self.run("DELETE FROM device_failure WHERE device_sha256 = :device_sha256", device_sha256=device_sha256)

    # -- role, user_role --

    def find_role(self, id_or_name: str) -> Role | None:
        return self.one(
            Role, "SELECT * FROM role WHERE (id = :it OR name = :it) AND name <> :deleted || id", it=id_or_name,
            deleted=DELETED,
        )

    def list_roles(self, q: str = "", sort: str = "name", limit: int = 1000, offset: int = 0) -> tuple[list[Role], int]:
        return self.page(
            Role,
            r"""
            SELECT * FROM role
             WHERE (:q = '' OR name LIKE :like ESCAPE '\') AND name <> :deleted || id
            """,
            sort, limit, offset, q=q, like=like(q), deleted=DELETED,
        )

    def add_role(self, id: str, name: str, description: str, is_privileged: bool, now: int) -> Role:
        return self.insert(Role(id, name, description, 0, 1, now, now, int(is_privileged)))

    def update_role(
        self, id: str, name: str | None, description: str | None, is_privileged: bool | None, now: int
    ) -> Role | None:
        return self.one(
            Role,
            """
            UPDATE role
               SET name = coalesce(:name, name), description = coalesce(:description, description),
                   is_privileged = coalesce(:is_privileged, is_privileged), modified_at = :now
             WHERE id = :id
            RETURNING *
            """,
            id=id, name=name, description=description, is_privileged=is_privileged, now=now,
        )

    def delete_role(self, id: str, now_ms: int) -> bool:
        """Delete a role, and end everything that was issued to its holders.

        Where they are many, the role is hidden, and the caller does the rest by delete_slice(); if it does not, upkeep
        does. Return whether all is done.
        """
        if self.has_many("role", id):
            self.put_deletion("role", id)
            self.run("UPDATE role SET name = :deleted || id, is_active = 0 WHERE id = :id", id=id, deleted=DELETED)
            return False
        self.revoke_users("IN (SELECT user_id FROM user_role WHERE role_id = :role_id)", now_ms, role_id=id)
        self.run("DELETE FROM role WHERE id = :id", id=id)
        return True

    def list_roles_of(self, user_id: str) -> list[Role]:
        """Return the active roles of a user."""
        return self.all(
            Role,
            """
            SELECT role.* FROM role JOIN user_role ON role.id = role_id
             WHERE user_id = :user_id AND is_active = 1
             ORDER BY name
            """,
            user_id=user_id,
        )

    def has_role(self, user_id: str, role_id: str) -> bool:
        """Return whether a user has a role that is active."""
        return self.exists(
            """
            SELECT 1 FROM user_role JOIN role ON role.id = role_id
             WHERE user_id = :user_id AND role_id = :role_id AND is_active = 1
            """,
            user_id=user_id, role_id=role_id,
        )

    def has_able_admin(self, now: int, excluding: str) -> bool:
        """Return whether an administrator other than this one could log in now."""
        return self.exists(
            """
            SELECT 1 FROM user_role JOIN account ON account.id = user_id
             WHERE role_id = :role_id AND is_active = 1 AND lockout_until <= :now AND user_id <> :excluding
            """,
            role_id=MAD_ADMIN_ROLE_ID, now=now, excluding=excluding,
        )

    def assign_role(self, user_id: str, role_id: str, now: int) -> bool:
        """Return whether that changed anything."""
        return self.changed(
            "INSERT INTO user_role VALUES (:user_id, :role_id, :now) ON CONFLICT DO NOTHING", user_id=user_id,
            role_id=role_id, now=now,
        )

    def unassign_role(self, user_id: str, role_id: str) -> bool:
        return self.changed(
            "DELETE FROM user_role WHERE user_id = :user_id AND role_id = :role_id", user_id=user_id,
            role_id=role_id,
        )

    # -- permission, role_permission --

    def find_permission(self, id_or_name: str) -> Permission | None:
        return self.one(Permission, "SELECT * FROM permission WHERE id = :it OR name = :it", it=id_or_name)

    def list_permissions(
        self, q: str = "", sort: str = "name", limit: int = 1000, offset: int = 0
    ) -> tuple[list[Permission], int]:
        return self.page(
            Permission, r"SELECT * FROM permission WHERE :q = '' OR name LIKE :like ESCAPE '\'", sort, limit, offset,
            q=q, like=like(q),
        )

    def add_permission(self, id: str, name: str, now: int) -> Permission:
        return self.insert(Permission(id, name, 1, now, now))

    def update_permission(self, id: str, name: str | None, now: int) -> Permission | None:
        return self.one(
            Permission,
            "UPDATE permission SET name = coalesce(:name, name), modified_at = :now WHERE id = :id RETURNING *", id=id,
            name=name, now=now,
        )

    def delete_permission(self, id: str) -> None:
        self.run("DELETE FROM permission WHERE id = :id", id=id)

    def list_permissions_of_role(self, role_id: str) -> list[Permission]:
        return self.all(
            Permission,
            """
            SELECT permission.* FROM permission JOIN role_permission ON permission.id = permission_id
             WHERE role_id = :role_id
             ORDER BY name
            """,
            role_id=role_id,
        )

    def list_permissions_by_role(self) -> list[RolePermission]:
        """Return every permission of every role, by the name of the permission."""
        return self.all(
            RolePermission,
            """
            SELECT role_id, permission.id, name FROM permission JOIN role_permission ON permission.id = permission_id
             ORDER BY name
            """,
        )

    def count_users_by_role(self, ids: Iterable[str]) -> dict[str, int]:
        """Return how many users have each of these roles that any has, by the id of the role."""
        with self.guard:
            return dict(self.connection.execute(
                """
                SELECT role_id, count(*) FROM user_role
                 WHERE role_id IN (SELECT value FROM json_each(:ids))
                 GROUP BY role_id
                """,
                {"ids": msgspec.json.encode(list(ids)).decode()},
            ).fetchall())

    def list_roles_with(self, permission_id: str) -> list[Role]:
        """Return the roles that have a permission."""
        return self.all(
            Role,
            """
            SELECT role.* FROM role JOIN role_permission ON role.id = role_id
             WHERE permission_id = :permission_id AND name <> :deleted || id
             ORDER BY name
            """,
            permission_id=permission_id, deleted=DELETED,
        )

    def list_permissions_of_user(self, user_id: str) -> list[Permission]:
        """Return the active permissions of a user by its active roles; none if it is not active itself."""
        return self.all(
            Permission,
            """
            SELECT DISTINCT permission.* FROM permission
              JOIN role_permission ON permission.id = permission_id
              JOIN role ON role.id = role_permission.role_id
              JOIN user_role ON role.id = user_role.role_id
              JOIN account ON account.id = user_role.user_id
             WHERE user_id = :user_id AND role.is_active = 1 AND permission.is_active = 1 AND account.is_active = 1
             ORDER BY permission.name
            """,
            user_id=user_id,
        )

    def assign_permission(self, role_id: str, permission_id: str, now: int) -> bool:
        return self.changed(
            "INSERT INTO role_permission VALUES (:role_id, :permission_id, :now) ON CONFLICT DO NOTHING",
            role_id=role_id, permission_id=permission_id, now=now,
        )

    def remove_permission(self, role_id: str, permission_id: str) -> bool:
        return self.changed(
            "DELETE FROM role_permission WHERE role_id = :role_id AND permission_id = :permission_id",
            role_id=role_id, permission_id=permission_id,
        )

    # -- scope, user_scope, client_scope --

    def find_scope(self, name: str) -> Scope | None:
        """Find an active scope by its name or id."""
        return self.one(Scope, "SELECT * FROM scope WHERE (name = :name OR id = :name) AND is_active = 1", name=name)

    def find_scope_names(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that an active scope has."""
        names = list(names)
        if not names:
            return []
        return self.values(
            "SELECT name FROM scope WHERE is_active = 1 AND name IN (SELECT value FROM json_each(:names))",
            names=msgspec.json.encode(names).decode(),
        )

    def list_scopes(
        self, q: str = "", sort: str = "name", limit: int = 1000, offset: int = 0
    ) -> tuple[list[Scope], int]:
        return self.page(
            Scope, r"SELECT * FROM scope WHERE is_active = 1 AND (:q = '' OR name LIKE :like ESCAPE '\')", sort, limit,
            offset, q=q, like=like(q),
        )

    def add_scope(self, id: str, name: str, description: str, now: int) -> Scope:
        return self.insert(Scope(id, name, description, 0, 1, now, now))

    def update_scope(self, id: str, name: str | None, description: str | None, now: int) -> Scope | None:
        return self.one(
            Scope,
            """
            UPDATE scope
               SET name = coalesce(:name, name), description = coalesce(:description, description), modified_at = :now
             WHERE id = :id
            RETURNING *
            """,
            id=id, name=name, description=description, now=now,
        )

    def delete_scope(self, id: str) -> None:
        if not self.has_many("scope", id):
            self.run("DELETE FROM scope WHERE id = :id", id=id)
            return
        self.put_deletion("scope", id)
        self.run("UPDATE scope SET name = :deleted || id, is_active = 0 WHERE id = :id", id=id, deleted=DELETED)

    def list_scopes_of_user(self, user_id: str) -> list[Scope]:
        """Return the active scopes of a user."""
        return self.all(
            Scope,
            """
            SELECT scope.* FROM scope JOIN user_scope ON scope.id = scope_id
             WHERE user_id = :user_id AND is_active = 1
             ORDER BY name
            """,
            user_id=user_id,
        )

    def list_scope_names_of_user(self, user_id: str) -> list[str]:
        """Return the names of the active scopes of a user."""
        return self.values(
            "SELECT name FROM scope JOIN user_scope ON scope.id = scope_id WHERE user_id = :user_id AND is_active = 1",
            user_id=user_id,
        )

    def assign_scope_to_user(self, user_id: str, scope_id: str, now: int) -> int:
        return self.run(
            "INSERT INTO user_scope VALUES (:user_id, :scope_id, :now) ON CONFLICT DO NOTHING", user_id=user_id,
            scope_id=scope_id, now=now,
        )

    def remove_scope_from_user(self, user_id: str, scope_id: str) -> bool:
        return self.changed(
            "DELETE FROM user_scope WHERE user_id = :user_id AND scope_id = :scope_id", user_id=user_id,
            scope_id=scope_id,
        )

    def list_scopes_of_client(self, client_id: str) -> list[Scope]:
        """Return the active scopes of a client, by its internal id."""
        return self.all(
            Scope,
            """
            SELECT scope.* FROM scope JOIN client_scope ON scope.id = scope_id
             WHERE client_id = :client_id AND is_active = 1
             ORDER BY name
            """,
            client_id=client_id,
        )

    def assign_scope_to_client(self, client_id: str, scope_id: str, now: int) -> int:
        return self.run(
            "INSERT INTO client_scope VALUES (:client_id, :scope_id, :now) ON CONFLICT DO NOTHING", client_id=client_id,
            scope_id=scope_id, now=now,
        )

    def remove_scope_from_client(self, client_id: str, scope_id: str) -> bool:
        return self.changed(
            "DELETE FROM client_scope WHERE client_id = :client_id AND scope_id = :scope_id", client_id=client_id,
            scope_id=scope_id,
        )

    # -- client, client_secret --

    def find_client(self, client_id: str) -> ClientRow | None:
        """Find a client by its identifier or its internal id, which cannot collide."""
        return self.one(
            ClientRow,
            "SELECT * FROM client WHERE (client_id = :client_id OR id = :client_id) AND client_id <> :deleted || id",
            client_id=client_id, deleted=DELETED,
        )

    def list_clients(
        self, q: str = "", sort: str = "display_name", limit: int = 1000, offset: int = 0, scope_id: str | None = None,
        client_type: str | None = None, is_active: bool | None = None, grant_type: str | None = None
    ) -> tuple[list[ClientRow], int]:
        return self.page(
            ClientRow,
            r"""
            SELECT * FROM client
             WHERE client_id <> :deleted || id
               AND (:q = '' OR client_id LIKE :like ESCAPE '\' OR display_name LIKE :like ESCAPE '\')
               AND (:scope_id IS NULL OR id IN (SELECT client_id FROM client_scope WHERE scope_id = :scope_id))
               AND (:client_type IS NULL OR client_type = :client_type)
               AND (:is_active IS NULL OR is_active = :is_active)
               AND (:grant_type IS NULL OR instr(' ' || grant_types || ' ', ' ' || :grant_type || ' ') > 0)
            """,
            sort, limit, offset, q=q, like=like(q), scope_id=scope_id, deleted=DELETED, client_type=client_type,
            is_active=is_active, grant_type=grant_type,
        )

    def describe_clients(self, ids: Iterable[str]) -> list[ClientDetail]:
        """Return the active scopes of these clients by name, and when each got a token last, if it ever did."""
        return self.all(
            ClientDetail,
            """
            SELECT client_id, name, 0
              FROM client_scope JOIN scope ON scope.id = scope_id AND is_active = 1
             WHERE client_id IN (SELECT value FROM json_each(:ids))
             UNION ALL
            SELECT client.id, '', last_token_at
              FROM client JOIN client_use ON client_use.client_id = client.client_id
             WHERE client.id IN (SELECT value FROM json_each(:ids))
             ORDER BY 2
            """,
            ids=msgspec.json.encode(list(ids)).decode(),
        )

    def last_token_at(self, client_id: str) -> int:
        """Return when a client, by its identifier, got a token last, within a minute; 0 if never."""
        return self.value("SELECT last_token_at FROM client_use WHERE client_id = :client_id", client_id=client_id) or 0

    def forget_use(self, client_id: str) -> None:
        """Forget that an identifier was used: it belongs to no client any more."""
        self.run("DELETE FROM client_use WHERE client_id = :client_id", client_id=client_id)
        self.used.pop(client_id, None)

    def note_use(self, client_id: str, now: int, connection: sqlcipher3.Connection | None = None) -> None:
        """Record that a client gets a token, at most once a minute: a write for each would wear out the flash."""
        if 0 <= now - self.used.get(client_id, 0) < USE_SECONDS:
            return
        statement = """
            INSERT INTO client_use VALUES (:client_id, :now)
            ON CONFLICT (client_id) DO UPDATE SET last_token_at = max(last_token_at, :now)
        """
        if connection is None:
            self.run(statement, client_id=client_id, now=now)
        else:
            connection.execute(statement, {"client_id": client_id, "now": now})
        if len(self.used) > 10_000:  # no more clients than the cache holds
            self.used = {}
        self.used[client_id] = now

    def note_secret_use(self, id: str, now: int) -> None:
        """Queue that a secret of a client was used, at most once a minute. flush() writes it with the next batch, so a
        power cut may forget it.
        """
        if 0 <= now - self.secrets_used.get(id, 0) < USE_SECONDS:
            return
        if len(self.secrets_used) > 20_000:  # two for each client of the cache
            self.secrets_used = {}
        self.secrets_used[id] = now
        self.secret_queue.append((now, id))
        if not self.wake.is_set():
            self.wake.set()

    def update_client(self, row: ClientRow) -> None:
        """Replace what may change of a client."""
        self.run(
            """
            UPDATE client
               SET client_id = :client_id, display_name = :display_name, audience = :audience,
                   grant_types = :grant_types, may_introspect = :may_introspect, is_first_party = :is_first_party,
                   access_token_signed_alg = :access_token_signed_alg,
                   id_token_signed_response_alg = :id_token_signed_response_alg, is_active = :is_active,
                   modified_at = :modified_at, allow_http_redirects = :allow_http_redirects,
                   allow_short_schemes = :allow_short_schemes, are_grants_named = :are_grants_named
             WHERE id = :id
            """,
            **msgspec.structs.asdict(row),
        )

    def delete_client(self, id: str) -> None:
        if not self.has_many("client", id):
            self.run("DELETE FROM client WHERE id = :id", id=id)
            return
        self.put_deletion("client", id)
        for table in ("client_secret", "client_uri", "client_feature", "external_idp_provider", "client_scope"):
            self.run(f"DELETE FROM {table} WHERE client_id = :id", id=id)
        self.run(
            "UPDATE client SET client_id = :deleted || id, display_name = '', is_active = 0 WHERE id = :id", id=id,
            deleted=DELETED,
        )

    # -- deletion: what upkeep still has to delete --

    def has_many(self, kind: str, id: str) -> bool:
        """Return whether more rows belong to a user, client, scope or role than one transaction should delete."""
        found = sum(
            self.value(f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {column} = :id LIMIT {SLICE + 1})", id=id)
            for table, column, _ in DEPENDENTS[kind]
        )
        return found > SLICE

    def put_deletion(self, kind: str, id: str) -> None:
        """Note that upkeep has to delete a row and all that belong to it. The caller hides it under another name."""
        self.run("INSERT INTO deletion VALUES (:kind, :id)", kind=kind, id=id)

    def list_deletions(self) -> list[tuple[str, str]]:
        """Return (kind, id) of what is still to be deleted."""
        with self.guard:
            return self.connection.execute("SELECT kind, id FROM deletion").fetchall()

    def delete_slice(self, kind: str, id: str, limit: int, now_ms: int) -> bool:
        """Delete up to `limit` rows that belong to what put_deletion() noted, or, if none is left, that row itself.
        Return whether there is more to do. The rows are found before the write lock is taken. Who loses a role so loses
        all that was issued to them.
        """
        for table, column, keys in DEPENDENTS[kind]:
            with self.guard:
                found = self.connection.execute(
                    f"SELECT {', '.join(keys)} FROM {table} WHERE {column} = ? LIMIT ?", (id, limit)
                ).fetchall()
            if found:
                with self.transaction():
                    if (kind, table) == ("role", "user_role"):
                        holders = msgspec.json.encode([user_id for user_id, _ in found]).decode()
                        self.revoke_users("IN (SELECT value FROM json_each(:holders))", now_ms, holders=holders)
                    self.connection.executemany(
                        f"DELETE FROM {table} WHERE {' AND '.join(f'{key} = ?' for key in keys)}", found
                    )
                return True
        with self.transaction():
            self.run(f"DELETE FROM {kind} WHERE id = :id", id=id)
            self.run("DELETE FROM deletion WHERE kind = :kind AND id = :id", kind=kind, id=id)
        return False

    def list_secrets(self, client_id: str, now: int) -> list[Secret]:
        """Return the valid secrets of a client, by its internal id, the newest first."""
        return self.all(
            Secret,
            "SELECT * FROM client_secret WHERE client_id = :client_id AND expires_at > :now ORDER BY created_at DESC",
            client_id=client_id, now=now,
        )

    def add_secret(self, id: str, client_id: str, secret_hash: str, now: int) -> None:
        """Add a secret that never expires."""
        # At least a second newer than the newest one, so that two of one second keep their order.
        self.run(
            """
            INSERT INTO client_secret (id, client_id, secret_hash, created_at, expires_at)
            SELECT :id, :client_id, :secret_hash, max(:now, 1 + coalesce(max(created_at), 0)), :forever
              FROM client_secret WHERE client_id = :client_id
            """,
            id=id, client_id=client_id, secret_hash=secret_hash, now=now, forever=FOREVER,
        )

    def retire_secrets(self, client_id: str, expires_at: int, now: int) -> None:
        """Let the newest valid secret expire at `expires_at` and the others now: with its successor two are valid."""
        self.run(
            """
            UPDATE client_secret
               SET expires_at = CASE WHEN id = (SELECT id FROM client_secret
                                                 WHERE client_id = :client_id AND expires_at > :now
                                                 ORDER BY created_at DESC LIMIT 1)
                                     THEN min(expires_at, :expires_at) ELSE min(expires_at, :now) END
             WHERE client_id = :client_id
            """,
            client_id=client_id, expires_at=expires_at, now=now,
        )
        self.run(
            "DELETE FROM client_secret WHERE client_id = :client_id AND expires_at <= :now", client_id=client_id,
            now=now,
        )

    def delete_secret(self, client_id: str, id: str) -> bool:
        return self.changed(
            "DELETE FROM client_secret WHERE client_id = :client_id AND id = :id", client_id=client_id, id=id
        )

    # -- client_uri, client_feature, external_idp_provider --

    def list_uris(self, client_id: str, kind: str | None = None) -> list[ClientUri]:
        """Return the URIs of a client by its internal id: of one kind, or all."""
        return self.all(
            ClientUri,
            "SELECT * FROM client_uri WHERE client_id = :client_id AND (:kind IS NULL OR kind = :kind) ORDER BY uri",
            client_id=client_id, kind=kind,
        )

    def find_uri(self, id: str) -> ClientUri | None:
        return self.one(ClientUri, "SELECT * FROM client_uri WHERE id = :id", id=id)

    def add_uri(self, id: str, client_id: str, kind: str, uri: str, now: int) -> ClientUri:
        return self.insert(ClientUri(id, client_id, kind, uri, now))

    def delete_uri(self, id: str) -> ClientUri | None:
        return self.one(ClientUri, "DELETE FROM client_uri WHERE id = :id RETURNING *", id=id)

    def list_cors_origins(self) -> frozenset[str]:
        """Return the CORS origins of all active public clients."""
        return frozenset(
            self.values(
                """
                SELECT uri FROM client_uri JOIN client ON client.id = client_uri.client_id
                 WHERE kind = 'cors_origin' AND is_active = 1 AND client_type = 'public'
                """
            )
        )

    def list_all_features(self, client_id: str) -> list[Feature]:
        return self.all(Feature, "SELECT * FROM client_feature WHERE client_id = :client_id", client_id=client_id)

    def list_features(self, client_id: str) -> dict[str, str]:
        """Return the flags that are switched on, each with its option."""
        return {row.feature_flag: row.options for row in self.list_all_features(client_id) if row.is_enabled}

    def put_feature(
        self, client_id: str, flag: str, is_enabled: bool | None = None, options: str | None = None
    ) -> None:
        """Set a flag, its option, or both. What is None stays; a new flag is on unless `is_enabled` says otherwise."""
        self.run(
            """
            INSERT INTO client_feature VALUES (:client_id, :flag, coalesce(:is_enabled, 1), coalesce(:options, ''))
            ON CONFLICT (client_id, feature_flag) DO UPDATE
               SET is_enabled = coalesce(:is_enabled, is_enabled), options = coalesce(:options, options)
            """,
            client_id=client_id, flag=flag, is_enabled=None if is_enabled is None else int(is_enabled), options=options,
        )

    def list_token_lifetimes(self) -> list[str]:
        """Return the option of TOKEN_EXPIRATION of every client that has that flag, as text."""
        return self.values("SELECT options FROM client_feature WHERE feature_flag = 'TOKEN_EXPIRATION'")

    def list_idps(self, client_id: str) -> list[ExternalIdp]:
        return self.all(
            ExternalIdp, "SELECT * FROM external_idp_provider WHERE client_id = :client_id ORDER BY display_name, id",
            client_id=client_id,
        )

    def find_idp(self, client_id: str, id: str) -> ExternalIdp | None:
        return self.one(
            ExternalIdp, "SELECT * FROM external_idp_provider WHERE client_id = :client_id AND id = :id",
            client_id=client_id, id=id,
        )

    def put_idp(self, row: ExternalIdp) -> None:
        """Add a provider, or replace what may change of one."""
        self.run(
            """
            INSERT INTO external_idp_provider
            VALUES (:id, :client_id, :provider_key, :display_name, :issuer, :client_identifier, :scopes, :created_at,
                    :modified_at)
            ON CONFLICT (id) DO UPDATE
               SET provider_key = :provider_key, display_name = :display_name, issuer = :issuer,
                   client_identifier = :client_identifier, scopes = :scopes, modified_at = :modified_at
            """,
            **msgspec.structs.asdict(row),
        )

    def delete_idp(self, client_id: str, id: str) -> bool:
        return self.changed(
            "DELETE FROM external_idp_provider WHERE client_id = :client_id AND id = :id", client_id=client_id,
            id=id,
        )

    # -- family, session, refresh_token, revoked_token --

    def find_family(self, sid: str) -> Family | None:
        return self.one(Family, "SELECT * FROM family WHERE sid = :sid", sid=sid)

    def find_unrevoked_family(self, sid: str) -> Family | None:
        """Return a login that was not ended, neither by itself nor with all of its user at its client."""
        return self.one(Family, f"SELECT * FROM family WHERE sid = :sid AND NOT {FAMILY_REVOKED}", sid=sid)

    def is_family_revoked(self, sid: str) -> bool:
        """Return whether a login is unknown or was ended, by itself or with all of its user at its client."""
        return not self.exists(f"SELECT 1 FROM family WHERE sid = :sid AND NOT {FAMILY_REVOKED}", sid=sid)

    def list_families_of(self, user_id: str, client_id: str | None = None) -> list[Family]:
        """Return the logins of a user that were not revoked: those at a client, or at any that exists."""
        return self.all(
            Family,
            f"""
            SELECT family.*
              FROM family
              JOIN account ON account.id = family.user_id
              JOIN client ON client.client_id = family.client_id
             WHERE family.user_id = :user_id AND (:client_id IS NULL OR family.client_id = :client_id)
               AND NOT {FAMILY_REVOKED}
               AND family.created_ms > max(account.revoked_before, client.revoked_before)
            """,
            user_id=user_id, client_id=client_id,
        )

    def list_admin_logins(self, user_id: str, client_id: str, now: int) -> list[Family]:
        """Return the logins of an administrator that are alive at a client without a row: that of ADMIN tokens."""
        return self.all(
            Family,
            f"""
            SELECT family.*
              FROM family
              JOIN account ON account.id = family.user_id
             WHERE family.user_id = :user_id AND family.client_id = :client_id AND family.expires_at > :now
               AND NOT {FAMILY_REVOKED} AND family.created_ms > account.revoked_before
             ORDER BY family.created_ms DESC
            """,
            user_id=user_id, client_id=client_id, now=now,
        )

    def revoke_family(self, sid: str, now: int) -> bool:
        """Revoke a login at a client, and so its refresh tokens and access tokens, which name it.

        Return whether it was not revoked yet.
        """
        return self.changed(
            "UPDATE family SET revoked_at = :now WHERE sid = :sid AND revoked_at IS NULL", sid=sid, now=now
        )

    def revoke_logins(self, user_id: str, client_id: str, now_ms: int) -> None:
        """End every login of a user at a client, by an epoch."""
        self.run(
            """
            INSERT INTO ended_login VALUES (:user_id, :client_id, :epoch)
            ON CONFLICT (user_id, client_id) DO UPDATE SET revoked_before = max(revoked_before + 1, :epoch)
            """,
            user_id=user_id, client_id=client_id, epoch=self.epoch(now_ms),
        )

    def logins_revoked_before(self, user_id: str, client_id: str) -> int:
        """Return the millisecond up to which every login of a user at a client has ended."""
        return self.value(
            "SELECT revoked_before FROM ended_login WHERE user_id = :user_id AND client_id = :client_id",
            user_id=user_id, client_id=client_id,
        ) or 0

    def list_sessions(
        self, user_id: str | None = None, client_id: str | None = None, id: str | None = None, sort: str = "-id",
        limit: int = 1000, offset: int = 0, living: bool = False, now: int = 0, after: str | None = None,
        **more: str | None
    ) -> tuple[list[ListedSession], int]:
        """Return access tokens, the newest first: their ids begin with the time. RFC 9562 §5.7.

        `living` selects those that are alive at `now`; `more` are `sid`, `mad_use`, `ip_address`. `after` is an id: those that follow it in the order of `sort`, which is that of ids.
        """
        given = {"id": id, "user_id": user_id, "client_id": client_id} | more
        given = {name: value for name, value in given.items() if value is not None}
        where, _ = self.session_filters(given, living)
        return self.page_after(
            ListedSession, f"SELECT * FROM session WHERE {where}", sort, limit, offset, LISTED_SESSIONS, after, now=now,
            counted=COUNT_LIVING_MAX if living else None, **given,
        )

    def session_filters(self, given: Mapping[str, str | None], living: bool) -> tuple[str, bool]:
        """Return the condition of a list of sessions, and whether an index finds all that it lets through."""
        filters, is_indexed = SESSION_FILTERS, bool(given.keys() & {"id", "user_id", "sid", "ip_address"})
        if ip_address := given.get("ip_address"):
            of_address = "SELECT 1 FROM family WHERE ip_address = :ip_address AND ip_address <> ''"
            if isinstance(self.count(of_address, DENSE, ip_address=ip_address), AtLeast):
                filters, is_indexed = filters | {"ip_address": OF_CROWDED_ADDRESS}, bool(given.keys() & {"user_id", "sid"})
        alive = [SESSION_IS_ALIVE] if living else []
        return " AND ".join(["1 = 1", *(filters[name] for name in given), *alive]), is_indexed

    def scan_sessions(
        self, sort: str, limit: int, living: bool, now: int, after: str | None = None, offset: int = 0,
        **filters: str | None
    ) -> SessionPage:
        """Return what list_sessions() does, and where the list goes on.

        Where no index finds the rows, at most SCAN_MAX are searched: so there may be fewer than `limit`, or none, before
        the list ends. In the order of the expiry, the list consists of the newest of them. An `offset` in the order of
        ids is not bounded so.
        """
        given = {name: value for name, value in filters.items() if value is not None}
        where, is_indexed = self.session_filters(given, living)
        is_by_id = sort in ("id", "-id")
        if is_indexed or (is_by_id and (offset or not (given or living))):
            found = self.list_sessions(
                sort=sort, limit=limit, offset=offset, living=living, now=now, after=after, **given
            )
            return SessionPage(*found, None)
        column, direction = sort.removeprefix("-"), "DESC" if sort[0] == "-" else "ASC"
        order = direction if is_by_id else "DESC"
        # What an end of everything left behind is not even read.
        begins = [f"id > printf('%012x', {REVOKED_BEFORE})"] if living else []
        if after is not None:
            begins.append(f"id {'<' if order == 'DESC' else '>'} :after")
        part = f"SELECT * FROM session WHERE {' AND '.join(begins) or '1 = 1'} ORDER BY id {order} LIMIT {SCAN_MAX}"
        sorted_part = part if is_by_id else f"""
            SELECT * FROM ({part}) WHERE {'expires_at > :now' if living else '1 = 1'}
             ORDER BY {column} {direction}, id LIMIT -1
        """
        parameters = {"now": now, "after": after, **given}
        rows = self.all(
            ListedSession,
            f"""
            {LISTED_SESSIONS} WHERE session.id IN (
                SELECT id FROM ({sorted_part}) AS session WHERE {where} LIMIT :limit OFFSET :offset)
             ORDER BY session.{column} {direction}, session.id
            """,
            limit=limit + 1, offset=offset, **parameters,
        )
        is_more = len(rows) > limit
        end = self.value(f"SELECT id FROM ({part}) LIMIT 1 OFFSET {SCAN_MAX - 1}", **parameters)  # of a full part
        total: int = AtLeast(offset + len(rows) if rows else 0)
        if after is None:
            counted = self.count(
                f"SELECT 1 FROM ({part}) AS session WHERE {where}", COUNT_LIVING_MAX if living else None, **parameters
            )
            is_bound = end or isinstance(counted, AtLeast)
            total = AtLeast(max(total, counted)) if is_bound else counted
        if not is_by_id or not limit:
            return SessionPage(rows[:limit], total, None)
        return SessionPage(rows[:limit], total, rows[limit - 1].id if is_more else end or "")

    def count_living(self, now: int, longest: int, most: int) -> dict[str, int]:
        """Return how many tokens and logins of browsers have not expired and have no revocation of their own.

        At most `most` of each are counted. No token lives for more than `longest` seconds, so older ones are not read:
        the ids begin with the time.
        """
        tokens = self.value(
            """
            SELECT count(*)
              FROM (SELECT 1 FROM session
                     WHERE id >= :first AND expires_at > :now AND revoked_at IS NULL LIMIT :most)
            """,
            first=f"{max(0, now - longest) * 1000:012x}", now=now, most=most,
        )
        browsers = self.value(
            """
            SELECT count(*)
              FROM (SELECT 1 FROM browser_session WHERE expires_at > :now AND revoked_at IS NULL LIMIT :most)
            """,
            now=now, most=most,
        )
        return {"token": tokens, "browser": browsers}

    def count_signed(
        self, port_name: str, alg: str, default_alg: str, begins: int, ends: int, now: int
    ) -> tuple[int, int, int]:
        """Return how many access tokens of a port are alive that were issued from `begins` until `ends` for a client
        whose tokens have this algorithm, counting up to COUNT_MAX, and of how many users and clients they are.
        """
        row = self.one(
            SignedTokens,
            f"""
            SELECT count(*), count(DISTINCT user_id), count(DISTINCT client_id)
              FROM (SELECT user_id, client_id FROM session
                     WHERE mad_use = :port_name AND issued_at >= :begins AND issued_at < :ends AND {SESSION_IS_ALIVE}
                       AND coalesce((SELECT nullif(access_token_signed_alg, '') FROM client
                                      WHERE client.client_id = session.client_id), :default_alg) = :alg
                     LIMIT {COUNT_MAX + 1})
            """,
            port_name=port_name, alg=alg, default_alg=default_alg, begins=begins, ends=ends, now=now,
        )
        assert row
        return row.tokens if row.tokens <= COUNT_MAX else AtLeast(row.tokens), row.users, row.clients

    def find_session(self, id: str) -> ListedSession | None:
        return next(iter(self.list_sessions(id=id)[0]), None)

    def find_refresh_token(self, token_sha256: str) -> RefreshToken | None:
        return self.one(
            RefreshToken, "SELECT * FROM refresh_token WHERE token_sha256 = :token_sha256", token_sha256=token_sha256
        )

    def list_refresh_tokens(
        self, user_id: str | None = None, client_id: str | None = None, id: str | None = None, sort: str = "-id",
        limit: int = 1000, offset: int = 0, after: str | None = None
    ) -> tuple[list[ListedRefreshToken], int]:
        """Return refresh tokens, the newest first. `after` is as in list_sessions()."""
        return self.page_of(
            ListedRefreshToken, LISTED_REFRESH_TOKENS, sort, limit, offset, after, id=id, user_id=user_id,
            client_id=client_id,
        )

    def find_refresh_token_by_id(self, id: str) -> ListedRefreshToken | None:
        return next(iter(self.list_refresh_tokens(id=id)[0]), None)

    def rotate_refresh_token(self, token_sha256: str, client_id: str, now: int) -> RefreshToken | None:
        """Spend a refresh token. Return it, or None if unknown, of another client, spent, revoked, expired or of a login
        that was ended.
        """
        return self.one(
            RefreshToken,
            f"""
            UPDATE refresh_token
               SET rotated_at = :now
             WHERE token_sha256 = :token_sha256 AND client_id = :client_id
               AND rotated_at IS NULL AND revoked_at IS NULL AND expires_at > :now
               AND EXISTS (SELECT 1 FROM family WHERE sid = refresh_token.sid AND NOT {FAMILY_REVOKED})
            RETURNING *
            """,
            token_sha256=token_sha256, client_id=client_id, now=now,
        )

    def find_unused_successor(
        self, token_sha256: str, client_id: str, now: int, grace: int
    ) -> RefreshToken | None:
        """Return the unused token of the login whose refresh token this client spent within `grace` seconds, or None.

        A login has one at most. Asked in the transaction that acts on it.
        """
        # Times are whole seconds, so the grace lasts up to a second longer. A token spent in the future tells that the
        # clock went back, and nothing of how long ago that was: it is refused, or the grace would begin again. One
        # second is let pass, because the clock goes back by parts of a second when it is corrected.
        return self.one(
            RefreshToken,
            f"""
            SELECT successor.*
              FROM refresh_token AS spent
              JOIN refresh_token AS successor ON successor.sid = spent.sid
              JOIN family ON family.sid = spent.sid AND NOT {FAMILY_REVOKED}
             WHERE spent.token_sha256 = :token_sha256 AND spent.client_id = :client_id
               AND spent.rotated_at BETWEEN :now - :grace AND :now + 1 AND spent.revoked_at IS NULL
               AND successor.rotated_at IS NULL AND successor.revoked_at IS NULL AND successor.expires_at > :now
             ORDER BY successor.id DESC LIMIT 1
            """,
            token_sha256=token_sha256, client_id=client_id, now=now, grace=grace,
        )

    def revoke_jti(self, jti: str, expires_at: int, now: int) -> bool:
        """Revoke an access token. Its tombstone is what counts: the row of the token may not be stored yet.

        Return whether it had none before.
        """
        is_new = self.changed(
            "INSERT INTO revoked_token VALUES (:jti, :expires_at, :now) ON CONFLICT DO NOTHING", jti=jti,
            expires_at=expires_at, now=now,
        )
        self.run("UPDATE session SET revoked_at = :now WHERE id = :jti AND revoked_at IS NULL", jti=jti, now=now)
        # Before the commit: whoever asks again in between gets another token, which this does not end.
        self.generation.marks.touch(jti)
        return is_new

    def is_revoked(self, jti: str) -> bool:
        """Return whether an access token has a tombstone."""
        return self.exists("SELECT 1 FROM revoked_token WHERE jti = :jti", jti=jti)

    # -- login_transaction, authorization_code, consent --

    def find_login(self, id: str, binding_sha256: str, now: int) -> LoginTransaction | None:
        """Find a login under way. Only the browser or application that began it knows its secret."""
        return self.one(
            LoginTransaction,
            "SELECT * FROM login_transaction WHERE id = :id AND binding_sha256 = :binding_sha256 AND expires_at > :now",
            id=id, binding_sha256=binding_sha256, now=now,
        )

    def find_headless_login(self, binding_sha256: str, now: int) -> LoginTransaction | None:
        """Find the login of an application with screens of its own, which has a secret for each login."""
        return self.one(
            LoginTransaction,
            "SELECT * FROM login_transaction WHERE binding_sha256 = :binding_sha256 AND expires_at > :now LIMIT 1",
            binding_sha256=binding_sha256, now=now,
        )

    def count_logins(self, binding_sha256: str, now: int) -> int:
        """Return how many logins are under way that one secret began."""
        return self.value(
            "SELECT count(*) FROM login_transaction WHERE binding_sha256 = :binding_sha256 AND expires_at > :now",
            binding_sha256=binding_sha256, now=now,
        )

    def advance_login(self, was: LoginTransaction, login: LoginTransaction, now: int) -> LoginTransaction | None:
        """Write a login that was read as `was`. Return it, or None if another request has advanced it since."""
        return self.one(
            LoginTransaction,
            """
            UPDATE login_transaction
               SET state = :state, user_id = :user_id, amr = :amr, auth_time = :auth_time, proven_ms = :proven_ms,
                   pending = :pending, binding_sha256 = :binding_sha256
             WHERE id = :id AND binding_sha256 = :was_bound_to AND state = :was AND expires_at > :now
            RETURNING *
            """,
            id=login.id, binding_sha256=login.binding_sha256, was_bound_to=was.binding_sha256, was=was.state,
            state=login.state, user_id=login.user_id, amr=login.amr, auth_time=login.auth_time,
            proven_ms=login.proven_ms, pending=login.pending, now=now,
        )

    def rebind_logins(self, old_sha256: str, new_sha256: str) -> None:
        """Bind the logins of a browser in which nothing has been proven yet to another secret."""
        self.run(
            """
            UPDATE login_transaction
               SET binding_sha256 = :new_sha256
             WHERE binding_sha256 = :old_sha256 AND user_id IS NULL AND state IN ('select', 'password')
            """,
            old_sha256=old_sha256, new_sha256=new_sha256,
        )

    def count_failed_step(self, id: str, most: int) -> None:
        """Count a failure of a login under way. The last of `most` ends it."""
        self.run(
            """
            UPDATE login_transaction
               SET failures = failures + 1, expires_at = CASE WHEN failures + 1 >= :most THEN 0 ELSE expires_at END
             WHERE id = :id
            """,
            id=id, most=most,
        )

    def delete_logins(self) -> None:
        """Delete all logins under way, all authorization codes and all hints that wait."""
        with self.transaction():
            self.run("DELETE FROM parked_hints")
            self.run("DELETE FROM login_transaction")
            self.run("DELETE FROM authorization_code")

    def find_code(self, code_sha256: str) -> AuthorizationCode | None:
        return self.one(
            AuthorizationCode, "SELECT * FROM authorization_code WHERE code_sha256 = :code_sha256",
            code_sha256=code_sha256,
        )

    def spend_code(self, code_sha256: str, client_id: str, now: int) -> AuthorizationCode | None:
        """Spend a code. Return it, or None if unknown, of another client or spent before."""
        with self.transaction():
            return self.one(
                AuthorizationCode,
                """
                UPDATE authorization_code
                   SET spent_at = :now
                 WHERE code_sha256 = :code_sha256 AND client_id = :client_id AND spent_at IS NULL
                RETURNING *
                """,
                code_sha256=code_sha256, client_id=client_id, now=now,
            )

    def find_consent(self, user_id: str, client_id: str) -> str | None:
        """Return the scope to which a user consented for a client, by its internal id, or None."""
        return self.value(
            "SELECT scope FROM consent WHERE user_id = :user_id AND client_id = :client_id",
            user_id=user_id, client_id=client_id,
        )

    def put_consent(self, user_id: str, client_id: str, scope: str, now: int) -> None:
        self.run(
            """
            INSERT INTO consent VALUES (:user_id, :client_id, :scope, :now)
            ON CONFLICT (user_id, client_id) DO UPDATE SET scope = excluded.scope, given_at = excluded.given_at
            """,
            user_id=user_id, client_id=client_id, scope=scope, now=now,
        )

    def list_consents(self, user_id: str) -> list[ListedConsent]:
        """Return what a user consented to, by the name of the client."""
        return self.all(
            ListedConsent,
            """
            SELECT client.client_id, display_name, scope, given_at
              FROM consent JOIN client ON client.id = consent.client_id
             WHERE user_id = :user_id AND client.client_id <> :deleted || client.id
             ORDER BY client.client_id
            """,
            user_id=user_id, deleted=DELETED,
        )

    def list_consents_for(self, client_id: str, limit: int = 1000, offset: int = 0) -> tuple[list[ClientConsent], int]:
        """Return what users consented to for a client, by its internal id, in the order of their ids."""
        return self.page(
            ClientConsent,
            """
            SELECT user_id AS id, username, scope, given_at
              FROM consent JOIN account ON account.id = user_id
             WHERE client_id = :client_id AND username <> :deleted || account.id
            """,
            "id", limit, offset, client_id=client_id, deleted=DELETED,
        )

    def list_clients_with_consents(self) -> list[str]:
        """Return the internal ids of the clients for which a user has consented to anything."""
        return self.values("SELECT id FROM client WHERE id IN (SELECT client_id FROM consent)")

    def delete_consents(self, client_id: str, limit: int) -> int:
        """Delete up to `limit` consents for a client, by its internal id. Return how many."""
        return self.run(
            """
            DELETE FROM consent
             WHERE client_id = :client_id
               AND user_id IN (SELECT user_id FROM consent WHERE client_id = :client_id LIMIT :limit)
            """,
            client_id=client_id, limit=limit,
        )

    def delete_consent(self, user_id: str, client_id: str) -> bool:
        """Delete the consent of a user for a client, by its internal id. Return whether there was one."""
        return self.changed(
            "DELETE FROM consent WHERE user_id = :user_id AND client_id = :client_id", user_id=user_id,
            client_id=client_id,
        )

    def delete_codes(self, user_id: str, client_id: str) -> None:
        """Delete the codes of a user at a client that were not spent. A spent one is kept: see AuthorizationCode."""
        self.run(
            """
            DELETE FROM authorization_code
             WHERE user_id = :user_id AND client_id = :client_id AND spent_at IS NULL
            """,
            user_id=user_id, client_id=client_id,
        )

    # -- parked_hints --

    def park_hints(self, parked: ParkedHints) -> None:
        """Store hints, and delete up to 20 that expired, so that the table stays small."""
        with self.transaction():
            self.run(
                """
                DELETE FROM parked_hints
                 WHERE handle_sha256 IN (SELECT handle_sha256 FROM parked_hints WHERE expires_at <= :now LIMIT 20)
                """,
                now=parked.created_at,
            )
            self.insert(parked)

    def spend_hints(self, handle_sha256: str, binding_sha256: str, now: int) -> ParkedHints | None:
        """Spend a handle. Return its hints, or None if unknown, spent, expired or of another browser."""
        with self.transaction():
            return self.one(
                ParkedHints,
                """
                DELETE FROM parked_hints
                 WHERE handle_sha256 = :handle_sha256 AND binding_sha256 = :binding_sha256 AND expires_at > :now
                RETURNING *
                """,
                handle_sha256=handle_sha256, binding_sha256=binding_sha256, now=now,
            )

    # -- retired_key --

    def put_retired_key(self, key: RetiredKey) -> None:
        """Store a retired key, unless it was revoked."""
        with self.transaction():
            if key.kid not in self.revoked_kids():
                self.run("DELETE FROM retired_key WHERE kid = :kid", kid=key.kid)
                self.insert(key)

    def find_retired_key(self, header: str, now: int) -> RetiredKey | None:
        """Find a retired key by the header of a token that it signed, compared byte by byte. RFC 8725 §3.1."""
        return self.one(
            RetiredKey, "SELECT * FROM retired_key WHERE header = :header AND expires_at > :now", header=header, now=now
        )

    def has_retired_key(self, kid: str) -> bool:
        return self.exists("SELECT 1 FROM retired_key WHERE kid = :kid", kid=kid)

    def revoked_kids(self) -> set[str]:
        """Return the key identifiers that were revoked here, or before a backup that was restored here."""
        return set(self.meta("revoked_kids").split())

    def revoke_kids(self, kids: Collection[str]) -> None:
        """Remember keys as revoked, and delete those that are retired: a revoked key verifies nothing.

        They are remembered because a backup that was made before still holds them.
        """
        with self.transaction():
            self.put_meta("revoked_kids", " ".join(sorted({*self.revoked_kids(), *kids})))
            for kid in kids:
                self.run("DELETE FROM retired_key WHERE kid = :kid", kid=kid)

    # -- browser_session --

    def find_browser_session(self, id_sha256: str) -> BrowserSession | None:
        return self.one(
            BrowserSession, "SELECT * FROM browser_session WHERE id_sha256 = :id_sha256", id_sha256=id_sha256
        )

    def list_browser_sessions(self, user_id: str, now: int) -> list[BrowserSession]:
        """Return the browser sessions of a user that neither ended nor expired, the last used one first."""
        return self.all(
            BrowserSession,
            """
            SELECT browser_session.* FROM browser_session JOIN account ON account.id = user_id
             WHERE user_id = :user_id AND revoked_at IS NULL AND expires_at > :now AND created_ms > revoked_before
             ORDER BY last_seen_at DESC
            """,
            user_id=user_id, now=now,
        )

    def list_all_browser_sessions(
        self, now: int, idle: int, user_id: str | None = None, ip_address: str | None = None, limit: int = 1000,
        offset: int = 0, after: tuple[int, str] | None = None
    ) -> tuple[list[ListedBrowserSession], int]:
        """Return the living browser sessions, the last used one first. `idle` is how many seconds one may be unused.

        `after` is the `last_seen_at` and the id of a row: those that follow it. At most COUNT_LIVING_MAX are counted.
        Unless a user or an address is given, the list is of the SCAN_MAX that began last.
        """
        given = {"user_id": user_id, "ip_address": ip_address}
        where = " AND ".join(f"{name} = :{name}" for name, value in given.items() if value is not None) or "1 = 1"
        # Rows are numbered as they are written.
        newest = f"(SELECT * FROM browser_session ORDER BY rowid DESC LIMIT {SCAN_MAX})"
        is_part = where == "1 = 1" and self.exists(f"SELECT 1 FROM browser_session LIMIT 1 OFFSET {SCAN_MAX}")
        # The inner SELECT sorts, in columns of this table alone, and users are read one by one until a page is full.
        # There is no index of `last_seen_at`: it would cost pages whenever a browser is seen.
        living = f"""
            SELECT {{columns}}
              FROM (SELECT id_sha256 AS id, user_id, created_ms FROM {newest if is_part else 'browser_session'}
                     WHERE revoked_at IS NULL AND expires_at > :now AND last_seen_at + :idle > :now AND {where} {{follows}}
                     LIMIT -1) AS found
             CROSS JOIN account ON account.id = found.user_id
             WHERE is_active = 1 AND found.created_ms > max(account.revoked_before, {REVOKED_BEFORE})
        """
        parameters = {"now": now, "idle": idle} | {name: value for name, value in given.items() if value is not None}
        total = self.count(living.format(columns="1", follows=""), COUNT_LIVING_MAX, **parameters)
        seen, id = after or (0, "")
        follows = "AND (last_seen_at < :seen OR last_seen_at = :seen AND id_sha256 > :id)" if after else ""
        ids = living.format(
            columns="found.id", follows=follows + " ORDER BY last_seen_at DESC, id_sha256"
        ) + " LIMIT :limit OFFSET :offset"
        rows = self.all(
            ListedBrowserSession,
            f"""
            SELECT browser_session.*, username, id_sha256 AS id
              FROM browser_session JOIN account ON account.id = user_id
             WHERE id_sha256 IN ({ids})
             ORDER BY last_seen_at DESC, id_sha256
            """,
            **parameters, limit=limit, offset=offset, **({"seen": seen, "id": id} if after else {}),
        )
        is_short = is_part or (rows and total < offset + len(rows))
        return rows, AtLeast(max(total, offset + len(rows) if rows else 0)) if is_short else total

    def touch_browser_session(self, id_sha256: str, now: int) -> None:
        """Record that a browser session is in use."""
        self.run(
            "UPDATE browser_session SET last_seen_at = :now WHERE id_sha256 = :id_sha256 AND last_seen_at < :now",
            id_sha256=id_sha256, now=now,
        )

    def revoke_browser_session(self, id_sha256: str, now: int) -> bool:
        """End a browser session and every login that began in it. Return whether it was alive."""
        self.run(
            """
            UPDATE family SET revoked_at = :now
             WHERE user_id = (SELECT user_id FROM browser_session WHERE id_sha256 = :browser) AND browser = :browser
               AND revoked_at IS NULL
            """,
            browser=id_sha256, now=now,
        )
        return self.changed(
            "UPDATE browser_session SET revoked_at = :now WHERE id_sha256 = :id_sha256 AND revoked_at IS NULL",
            id_sha256=id_sha256, now=now,
        )

    def confirm_client(self, id_sha256: str, client_id: str, now: int) -> None:
        """Record that the user of a browser session agreed to continue to a client, given by its internal id."""
        self.run(
            """
            INSERT INTO browser_session_client
            SELECT id_sha256, client.id, :now
              FROM browser_session JOIN client ON client.id = :client_id
             WHERE id_sha256 = :id_sha256
            ON CONFLICT (id_sha256, client_id) DO NOTHING
            """,
            id_sha256=id_sha256, client_id=client_id, now=now,
        )

    def is_confirmed(self, id_sha256: str, client_id: str) -> bool:
        """Return whether the user of a browser session agreed to continue to a client, given by its internal id."""
        return self.exists(
            "SELECT 1 FROM browser_session_client WHERE id_sha256 = :id_sha256 AND client_id = :client_id",
            id_sha256=id_sha256, client_id=client_id,
        )

    def move_confirmations(self, old: str, new: str) -> None:
        """Let a browser session take over the clients that the user agreed to in another."""
        self.run("UPDATE browser_session_client SET id_sha256 = :new WHERE id_sha256 = :old", old=old, new=new)

    def replace_browser_session(self, old: str, new: str, user_id: str, now: int) -> None:
        """Let one browser session take the place of another: it takes over the logins of the same user, and ends those
        of another user.
        """
        found = self.find_browser_session(old)
        if found is None:
            return
        if found.user_id != user_id:
            self.revoke_browser_session(old, now)
            return
        self.run(
            "UPDATE family SET browser = :new WHERE browser = :old AND user_id = :user_id", new=new, old=old,
            user_id=user_id,
        )
        self.run(
            "UPDATE authorization_code SET browser = :new WHERE browser = :old AND user_id = :user_id", new=new,
            old=old, user_id=user_id,
        )
        self.run("DELETE FROM browser_session WHERE id_sha256 = :old", old=old)

    # -- admin_session --

    def find_admin_session(self, id_sha256: str) -> AdminSession | None:
        return self.one(
            AdminSession, "SELECT * FROM admin_session WHERE id_sha256 = :id_sha256", id_sha256=id_sha256
        )

    def list_admin_sessions(self, user_id: str, now: int, idle: int) -> list[AdminSession]:
        """Return the sessions of an administrator at the console that are alive, the last used one first.

        `idle` is after how many seconds without use one is over.
        """
        return self.all(
            AdminSession,
            """
            SELECT admin_session.* FROM admin_session JOIN account ON account.id = user_id
             WHERE user_id = :user_id AND expires_at > :now AND last_seen_at > :idle_since
               AND created_ms > revoked_before
             ORDER BY last_seen_at DESC
            """,
            user_id=user_id, now=now, idle_since=now - idle,
        )

    def touch_admin_session(self, id_sha256: str, now: int) -> None:
        """Record that a session at the console is in use."""
        self.run(
            "UPDATE admin_session SET last_seen_at = :now WHERE id_sha256 = :id_sha256 AND last_seen_at < :now",
            id_sha256=id_sha256, now=now,
        )

    def prove_admin_session(
        self, id_sha256: str, user_id: str, amr: str, now: int, ip_address: str, user_agent: str
    ) -> AdminSession | None:
        """Record a proof, and where it came from. Return the session, or None if it is over."""
        return self.one(
            AdminSession,
            """
            UPDATE admin_session
               SET proven_at = :now, last_seen_at = :now, amr = :amr, ip_address = :ip_address, user_agent = :user_agent
             WHERE id_sha256 = :id_sha256 AND user_id = :user_id
            RETURNING *
            """,
            id_sha256=id_sha256, user_id=user_id, amr=amr, now=now, ip_address=ip_address, user_agent=user_agent,
        )

    def keep_admin_session(self, id_sha256: str, user_id: str) -> None:
        """Let a session of this user outlive the revocation of everything that was issued to the user before."""
        self.run(
            """
            UPDATE admin_session
               SET created_ms = (SELECT revoked_before + 1 FROM account WHERE id = :user_id)
             WHERE id_sha256 = :id_sha256 AND user_id = :user_id
            """,
            id_sha256=id_sha256, user_id=user_id,
        )

    def delete_admin_session(self, id_sha256: str) -> bool:
        """End a session at the console. Return whether there was one."""
        return self.changed("DELETE FROM admin_session WHERE id_sha256 = :id_sha256", id_sha256=id_sha256)

    # -- revoking everything that was issued to a user or a client --

    def epoch(self, now_ms: int) -> int:
        """Return the millisecond up to which a revocation reaches: now, or the newest token's if the clock was set back.

        It looks ahead by IAT_SKEW at most: what is newer than that, revoke_future_rows() ends.
        """
        newest = self.value("SELECT id FROM session ORDER BY id DESC LIMIT 1") or "0"
        return max(now_ms, min(int(newest[:12], 16), now_ms + 1000 * IAT_SKEW))

    def revoke_users(self, condition: str, now_ms: int, **parameters: object) -> None:
        """End everything that was issued, on both ports, to the users whose id meets a condition in SQL.

        Its rows, which may be a million, are not rewritten: `revoked_before` ends them. That always grows, so that what
        was issued within the millisecond of the last call dies too.
        """
        self.run(
            f"UPDATE account SET revoked_before = max(revoked_before + 1, :epoch) WHERE id {condition}",
            epoch=self.epoch(now_ms), **parameters,
        )

    def revoke_account(self, user_id: str, now_ms: int) -> None:
        """End everything that was issued to a user."""
        self.revoke_users("= :user_id", now_ms, user_id=user_id)

    def revoke_client(self, id: str, now_ms: int) -> None:
        """End everything that was issued to a client, as revoke_users() does."""
        self.run(
            "UPDATE client SET revoked_before = max(revoked_before + 1, :epoch) WHERE id = :id", id=id,
            epoch=self.epoch(now_ms),
        )

    def revoke_everything(self, now_ms: int) -> None:
        """End everything that was ever issued, on both ports, and every login under way."""
        with self.transaction(identity=True):
            self.put_meta("revoked_before", max(self.epoch(now_ms), int(self.meta("revoked_before", "0")) + 1))
            self.delete_logins()

    # -- audit --

    def audit_mark(self, name: str, connection: sqlcipher3.Connection | None = None) -> tuple[int, str, int]:
        """Return a noted place of a chain: the number and hash of a row, and how many refusals there were up to it.

        `audit_head` and `audit_refusal_head` are the last rows; at `audit_anchor` and `audit_refusal_anchor`, the last
        rows that were purged, the chains begin. (0, "", 0) if there is none.
        """
        found = (connection or self.connection).execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        parts = found[0].split(":") if found else ["0", ""]
        return int(parts[0]), parts[1], int(parts[2]) if len(parts) > 2 else 0

    def last_audit_seq(self, connection: sqlcipher3.Connection) -> int:
        """Return the number of the last row of the audit log, of either chain, even if it was deleted."""
        last = connection.execute(
            """
            SELECT max(coalesce((SELECT max(seq) FROM audit), 0), coalesce((SELECT max(seq) FROM audit_refusal), 0))
            """
        ).fetchone()[0]
        return max(last, self.audit_mark("audit_refusal_head", connection)[0])

    def append_audit(self, rows: Iterable[tuple], connection: sqlcipher3.Connection | None = None) -> tuple[int, str]:
        """Append rows `(at, actor_id, action, target, secondary, ip_address, user_agent, request_id, result)` to the
        hash chain, and return its head: the number and the hash of the last row. The caller is in a transaction, so
        that no other writer extends the same hash.

        The head of the chain is stored too, so that verify_audit() notices if the last rows are deleted: once for all
        members of a group, before its commit. Batches do not store it, which would cost a page of flash for each;
        flush() remembers theirs in memory. Where the chain does not hold a head that was noted, the new rows go on
        from that head and not from what is left, with a row that says so: the numbers that are missing stay missing,
        and the next row covers what was cut off. Only the first member of a group that appends looks for that: nobody
        else writes until it is committed.
        """
        group = None if connection else self.local.__dict__.get("group")
        connection, rows = connection or self.connection, list(rows)
        if group and rows:
            kept = group.kept
            group.kept = kept and AuditTail()  # until all rows are in: a caller may go on without them
            if kept and kept.last_seq:
                seq, digest = self.extend_chain(connection, AuditRow, kept.last_seq, kept.digest, rows)
                group.kept = AuditTail(seq, digest, seq)
                return seq, digest
        last = connection.execute(LAST_AUDIT).fetchone() or (0, "")
        if not rows:
            return last
        seq, digest = self.last_audit_seq(connection), last[1]
        heads = [head for head in self.noted_heads(connection) if not self.is_in_chain(connection, head, last)]
        lost = max(heads, default=None)
        if lost:
            seq, digest = max(seq, lost[0]), lost[1]
            noted = f"noted={lost[0]}:{lost[1]} found={last[0]}:{last[1]}"
            rows.insert(0, (rows[0][0], "system", "audit_log_cut", "", noted, "", "", "", FAILURE))
            self.log("audit.cut", "error", noted=lost[0], found=last[0])
            self.batch_head = (0, "")
        head = self.extend_chain(connection, AuditRow, seq, digest, rows)
        if group:
            group.kept = AuditTail(*head, head[0])
        elif lost or connection is not self.batch_connection:
            self.note_audit(connection, "audit_head", f"{head[0]}:{head[1]}")
        return head

    def complete(self, connection: sqlcipher3.Connection, kept: AuditTail | None) -> None:
        """Store the head of the audit chain as the members of a group have left it."""
        if kept:
            last = (kept.seq, kept.digest) if kept.seq else connection.execute(LAST_AUDIT).fetchone()
            self.note_audit(connection, "audit_head", f"{last[0]}:{last[1]}")

    def append_refusals(self, rows: Iterable[tuple]) -> None:
        """Append rows about what was refused, as append_audit() does, to the chain of the refusals.

        It goes on from the head that was noted, so rows that were cut off leave their numbers missing.
        """
        connection, rows = self.connection, list(rows)
        if not rows:
            return
        group: Any = self.local.__dict__.get("group")
        kept = group and group.kept
        if kept:
            group.kept = AuditTail()
        _, digest, written = self.audit_mark("audit_refusal_head")
        seq, digest = self.extend_chain(connection, AuditRefusal, self.last_audit_seq(connection), digest, rows)
        self.note_audit(connection, "audit_refusal_head", f"{seq}:{digest}:{written + len(rows)}")
        if kept and kept.seq:
            group.kept = AuditTail(kept.seq, kept.digest, seq)

    def extend_chain(
        self, connection: sqlcipher3.Connection, record: type[AuditRow], seq: int, digest: str, rows: list[tuple]
    ) -> tuple[int, str]:
        """Insert rows after the number and the hash, and return the number and the hash of the last."""
        chained = []
        for row in rows:
            seq += 1
            digest = chain(digest, seq, row)
            chained.append((seq, *row[:-1], digest, row[-1]))
        connection.executemany(insert_statement(record), chained)
        # One that is there is not written again, so this costs no page of flash.
        actions = {(row[2],) for row in rows}
        connection.executemany("INSERT INTO audit_action VALUES (?) ON CONFLICT DO NOTHING", actions)
        return seq, digest

    def note_audit(self, connection: sqlcipher3.Connection, name: str, value: str) -> None:
        connection.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
        )

    def noted_heads(self, connection: sqlcipher3.Connection) -> list[tuple[int, str]]:
        """Return the heads of the audit chain that were noted: the one in the database, and that of the last batch."""
        return [self.audit_mark("audit_head", connection)[:2], self.batch_head]

    def is_in_chain(self, connection: sqlcipher3.Connection, head: tuple[int, str], last: tuple[int, str]) -> bool:
        """Return whether the chain that ends with `last` holds a head that was noted, or has been purged beyond it."""
        if head[0] == 0 or head == last:
            return True
        found = connection.execute("SELECT row_sha256 FROM audit WHERE seq = ?", (head[0],)).fetchone()
        if found:
            return found[0] == head[1]
        return self.audit_mark("audit_anchor", connection)[0] >= head[0]

    def audit_head(self) -> tuple[int, str]:
        """Return the number and the hash of the last row that is no refusal, (0, "") if there is none."""
        with self.guard:
            found = self.connection.execute(LAST_AUDIT).fetchone()
        return found or (0, "")

    def list_audit(
        self, action: str | None = None, limit: int = 100, after: int | None = None, offset: int = 0, **more: Any
    ) -> list[AuditRow]:
        """Return the rows of scan_audit()."""
        return self.scan_audit(AuditFilter(action, **more), limit, after, offset=offset).rows

    def scan_audit(
        self, wanted: AuditFilter, limit: int = 100, after: int | None = None, before: int | None = None,
        offset: int = 0
    ) -> AuditPage:
        """Return audit rows, the newest first, or those before a `seq`; those after a `seq` come oldest first, to
        follow the log.

        At most SCAN_MAX numbers of the log are searched, so there may be fewer rows than `limit`, or none, before the
        list ends.
        """
        first, last = self.audit_range(wanted)
        if after is None:
            last = last if before is None else min(last, before - 1)
            # Above the anchors no number is missing, so rows need not be read to be skipped.
            if wanted == AuditFilter():
                skipped = min(offset, max(0, last - max(self.audit_anchors())))
                last, offset = last - skipped, offset - skipped
            begin, end = max(first, last - SCAN_MAX + 1), last
        else:
            begin = max(first, after + 1)
            end = min(last, begin + SCAN_MAX - 1)
        both, parameters = self.audit_between(wanted, begin, end)
        rows = self.all(
            AuditRow, f"{both} ORDER BY seq {'DESC' if after is None else 'ASC'} LIMIT :limit OFFSET :offset",
            limit=limit + 1, offset=offset, **parameters,
        )
        if len(rows) > limit:
            return AuditPage(rows[:limit], rows[limit - 1].seq if limit else last, 0, not limit)
        place, is_last = (begin, begin <= first) if after is None else (max(after, end), end >= last)
        skipped = offset if rows or is_last else self.value(f"SELECT count(*) FROM ({both})", **parameters)
        return AuditPage(rows, place, max(0, offset - skipped), is_last)

    def audit_between(self, wanted: AuditFilter, begin: int, end: int) -> tuple[str, dict[str, Any]]:
        """Return a SELECT of the rows with these numbers that a filter lets through, and its parameters."""
        given = {
            name: value for name, value in msgspec.structs.asdict(wanted).items() if value != getattr(AuditFilter(), name)
        }
        where = " AND ".join(["seq BETWEEN :begin AND :end", *(AUDIT_FILTERS[name] for name in given)])
        both = " UNION ALL ".join(f"SELECT * FROM {table} WHERE {where}" for table in AUDIT_TABLES)
        return both, given | {"begin": begin, "end": end}

    def audit_anchors(self) -> tuple[int, int]:
        """Return the numbers of the last rows that were purged, of both chains."""
        changes, refusals = (self.audit_mark(f"{table}_anchor")[0] for table in AUDIT_TABLES)
        return changes, refusals

    def audit_range(self, wanted: AuditFilter) -> tuple[int, int]:
        """Return between which numbers the rows of a filter lie, both included.

        In a long log, some rows tell when those between them were written. Beyond the oldest of these that is not
        before `since`, and the newest that is not after `until`, nothing is looked for: so a clock that was wrong for
        a while hides at most rows that it gave a wrong time.
        """
        with self.reading():
            last = self.last_audit_seq(self.connection)
            first = min(self.value(f"SELECT min(seq) FROM {table}") or last + 1 for table in AUDIT_TABLES)
            if last - first < SCAN_MAX or (wanted.since <= 0 and wanted.until >= FOREVER):
                return first, last
            places = range(first, last, max(1, (last - first) // AUDIT_PLACES))
            if wanted.since > 0:
                early = (at for at in places if self.audit_time(at) >= wanted.since - CLOCK_SLACK)
                first = max(first, next(early, last) - places.step)
            if wanted.until < FOREVER:
                late = (at for at in reversed(places) if self.audit_time(at) <= wanted.until + CLOCK_SLACK)
                last = min(last, next(late, places[0]) + places.step)
        return first, last

    def audit_time(self, seq: int) -> int:
        """Return when the row with a number was written, or the one before if it is missing; 0 before the first."""
        nearest = " UNION ALL ".join(
            f"SELECT * FROM (SELECT seq, at FROM {table} WHERE seq <= :seq ORDER BY seq DESC LIMIT 1)"
            for table in AUDIT_TABLES
        )
        return self.value(f"SELECT at FROM ({nearest}) ORDER BY seq DESC LIMIT 1", seq=seq) or 0

    def list_audit_actions(self) -> list[str]:
        """Return every action that the audit log has rows of, or had before they were purged."""
        return self.values("SELECT action FROM audit_action ORDER BY action")

    def find_audit(self, seq: int) -> AuditRow | None:
        both = " UNION ALL ".join(f"SELECT * FROM {table} WHERE seq = :seq" for table in AUDIT_TABLES)
        return self.one(AuditRow, both, seq=seq)

    def count_audit(self, action: str | None = None, **more: Any) -> int:
        """Return how many rows a filter lets through: AtLeast beyond COUNT_MAX or the newest SCAN_MAX, but for all rows,
        which need no counting: their numbers tell.
        """
        wanted = AuditFilter(action, **more)
        if wanted == AuditFilter():
            return sum(self.count_audit_rows())
        first, last = self.audit_range(wanted)
        begin = max(first, last - SCAN_MAX + 1)
        both, parameters = self.audit_between(wanted, begin, last)
        found = self.count(both, **parameters)
        return found if begin == first else AtLeast(found)

    def count_audit_rows(self) -> tuple[int, int]:
        """Return how many rows that are no refusals there are, and how many refusals.

        Both share their numbers. Of those since the anchor, all are rows but those of the refusals written since.
        """
        with self.reading():
            begin, _, refusals_before = self.audit_mark("audit_anchor")
            written = self.audit_mark("audit_refusal_head")[2]
            purged = self.audit_mark("audit_refusal_anchor")[2]
            last = self.last_audit_seq(self.connection)
        return max(0, last - begin - (written - refusals_before)), written - purged

    def measure_audit(self) -> tuple[AuditSize, AuditSize]:
        """Estimate the sizes of the rows that are no refusals and of the refusals, by rows at 32 places of each."""
        sizes = []
        for table, rows in zip(AUDIT_TABLES, self.count_audit_rows(), strict=True):
            first, last = self.value(f"SELECT min(seq) FROM {table}"), self.value(f"SELECT max(seq) FROM {table}")
            mean = self.value(
                f"""
                WITH RECURSIVE place (at) AS (
                    SELECT :first UNION ALL SELECT at + :stride FROM place WHERE at + :stride <= :last)
                SELECT coalesce(avg(octet_length(actor_id) + octet_length(action) + octet_length(target)
                           + octet_length(secondary) + octet_length(ip_address) + octet_length(user_agent)
                           + octet_length(request_id) + octet_length(row_sha256) + octet_length(result)), 0)
                  FROM place JOIN {table} ON seq = (SELECT min(seq) FROM {table} WHERE seq >= place.at)
                """,
                first=first or 0, last=last or 0, stride=max(1, ((last or 0) - (first or 0)) // 32),
            ) if rows else 0
            sizes.append(AuditSize(rows, int(rows * (mean + ROW_OVERHEAD) * PAGE_OVERHEAD)))
        return sizes[0], sizes[1]

    def verify_audit(self, pause: Callable[[], object] = lambda: None) -> dict:
        """Walk the hash chains. Return `valid`, `rows`, `first_seq`, `last_seq`, `head` and, if one is broken, `reason`.
        `pause` is called after each thousand rows.

        One read transaction, so rows that are appended meanwhile are not seen. The chains begin at the anchors that
        purge_audit() and purge_refusals() stored. A number may be missing only up to an anchor: the rows of the other
        chain are still linked there. `last_seq` and `head` are of the last row that is no refusal.
        """
        with self.reading():
            anchors = [self.audit_mark(f"{table}_anchor")[:2] for table in AUDIT_TABLES]
            heads = [self.audit_mark(f"{table}_head")[:2] for table in AUDIT_TABLES]
            digests = [anchor[1] for anchor in anchors]
            seen = [head[0] < anchor[0] or head == anchor for head, anchor in zip(heads, anchors, strict=True)]
            seq, purged_up_to = anchors[0][0], max(anchor[0] for anchor in anchors)
            count, first = 0, None
            found = {"valid": True, "rows": 0, "first_seq": None, "last_seq": None, "head": "", "reason": ""}
            columns = "seq, at, actor_id, action, target, secondary, ip_address, user_agent, request_id, result"
            rows = self.connection.execute(
                " UNION ALL ".join(
                    f"SELECT {columns}, row_sha256, {kind} FROM {table}" for kind, table in enumerate(AUDIT_TABLES)
                ) + " ORDER BY 1"
            )
            for row in rows:
                kind, is_gap = row[11], row[0] > seq + 1
                if row[0] == seq:
                    return found | {"valid": False, "reason": f"number {seq} was given twice"}
                if is_gap and row[0] - 1 > purged_up_to:
                    return found | {"valid": False, "reason": f"rows {seq + 1} to {row[0] - 1} are missing"}
                seq_before, seq, digests[kind] = seq, row[0], chain(digests[kind], row[0], row[1:10])
                if digests[kind] != row[10]:
                    before = f", or rows between {seq_before} and {seq} are missing" if is_gap else ""
                    return found | {"valid": False, "reason": f"row {seq} was altered{before}"}
                seen[kind] = seen[kind] or heads[kind] == (seq, row[10])
                count, first = count + 1, first or seq
                if count % 1000 == 0:
                    pause()
                found |= {"rows": count, "first_seq": first}
                if kind == 0:
                    found |= {"last_seq": seq, "head": row[10]}
            for kind in (0, 1):
                if not seen[kind]:
                    return found | {
                        "valid": False, "reason": f"rows up to {heads[kind][0]} were written, and the chain ends before",
                    }
            return found

    # -- the newest time, and a clock that ran ahead --

    def newest_at(self) -> int:
        """Return the time of the newest row of the audit log or of a token, Unix seconds; 0 if there is none."""
        return self.value(
            """
            SELECT max(coalesce((SELECT at FROM audit ORDER BY seq DESC LIMIT 1), 0),
                       coalesce((SELECT issued_at FROM session ORDER BY id DESC LIMIT 1), 0))
            """
        )

    def describe_copy(self) -> dict[str, int]:
        """Return `users` and `clients`, the numbers of each, and `newest_at`."""
        return {
            "users": self.value("SELECT count(*) FROM account"), "clients": self.value("SELECT count(*) FROM client"),
            "newest_at": self.newest_at(),
        }

    def clock_floor(self) -> int:
        """Return the latest time that is known to have passed, Unix seconds: a clock before it is wrong.

        It is `clock` of meta, which is written only while the clock is trusted, or the time of a newer row. A row
        that is newer by more than CLOCK_FAR was written while the clock was wrong, and proves nothing.
        """
        known, newest = int(self.meta("clock", "0")), self.newest_at()
        return max(known, newest) if not known or newest <= known + CLOCK_FAR else known

    def revoke_future_rows(self, now: int, now_ms: int, step: int) -> int:
        """Revoke or delete what was written under a clock that ran ahead: it would be valid until that time comes.

        `step` is the TOTP time step of `now`. Return how many rows were changed.
        """
        later, later_ms = now + IAT_SKEW, now_ms + 1000 * IAT_SKEW
        done = 0
        with self.transaction(identity=True):
            done += self.run(
                "UPDATE family SET revoked_at = :now WHERE created_ms > :later_ms AND revoked_at IS NULL", now=now,
                later_ms=later_ms,
            )
            done += self.run(
                "UPDATE browser_session SET revoked_at = :now WHERE created_ms > :later_ms AND revoked_at IS NULL",
                now=now, later_ms=later_ms,
            )
            done += self.run("DELETE FROM admin_session WHERE created_ms > :later_ms", later_ms=later_ms)
            done += self.run("DELETE FROM authorization_code WHERE issued_ms > :later_ms", later_ms=later_ms)
            done += self.run("DELETE FROM login_transaction WHERE created_at > :later", later=later)
            done += self.run("DELETE FROM parked_hints WHERE created_at > :later", later=later)
            done += self.run("DELETE FROM device_failure WHERE last_failed_at > :later", later=later)
            done += self.run("DELETE FROM invitation WHERE created_ms > :later_ms", later_ms=later_ms)
            # An access token with an `iat` in the future is refused anyway, but its row would count as the newest.
            done += self.run("DELETE FROM session WHERE id > :id", id=f"{later_ms:012x}")
            # Failures in the future would lock accounts until then. A lockout keeps the time it had left; one that
            # an administrator set stays as it is.
            done += self.run(
                """
                UPDATE account
                   SET lockout_until = CASE WHEN lockout_until BETWEEN last_failed_at AND last_failed_at + :most
                                            THEN lockout_until - last_failed_at + :now ELSE lockout_until END,
                       last_failed_at = :now
                 WHERE last_failed_at > :later
                """,
                now=now, later=later, most=LOCKOUT_MAX,
            )
            done += self.run(
                "UPDATE account SET totp_locked_until = :until WHERE totp_locked_until > :until",
                until=now + LOCKOUT_MAX,
            )
            # A replaced secret stays valid no longer than one that is replaced now.
            done += self.run(
                "UPDATE client_secret SET expires_at = :until WHERE expires_at > :until AND expires_at <> :forever",
                until=now + OVERLAP_MAX, forever=FOREVER,
            )
            done += self.run("UPDATE account SET totp_last_step = :step WHERE totp_last_step > :step + 2", step=step)
            # Not lower: what was issued up to then lives again if no row of its own says that it was revoked.
            done += self.run(
                "UPDATE account SET revoked_before = :later_ms WHERE revoked_before > :later_ms", later_ms=later_ms,
            )
            done += self.run(
                "UPDATE client SET revoked_before = :later_ms WHERE revoked_before > :later_ms", later_ms=later_ms,
            )
            done += self.run(
                "UPDATE ended_login SET revoked_before = :later_ms WHERE revoked_before > :later_ms", later_ms=later_ms,
            )
            if int(self.meta("revoked_before", "0")) > later_ms:
                self.put_meta("revoked_before", later_ms)
        return done

    # -- batches: the rows of machine tokens --

    def note_failure(self, error: Exception) -> None:
        """Tell every process that a write has failed. Until flush() has written something, nothing is issued here that
        could not be recorded.
        """
        super().note_failure(error)
        was_writable, self.writable = self.writable, False
        if was_writable and self.flusher:  # without a flusher this is a command, which reports the error itself
            self.log(
                "store.unwritable", "error", reason=error.log if isinstance(error, Unavailable) else error,
                waiting=len(self.queue),
            )
            self.wake.set()

    def write_something(self) -> None:
        """Write a value to see that writing works: a new one each time, as SQLite may not write an equal page."""
        self.put_meta("written", secrets.token_hex(8))

    def probe(self) -> None:
        """Raise Unavailable unless a write would succeed now: one has succeeded lately, none has failed since, and the
        disk has room.
        """
        self.check_files_unchanged()
        if self.writable and time.monotonic() - self.written_at >= PROBE_SECONDS:
            self.write_something()
        room = os.statvfs(os.path.dirname(os.path.abspath(self.path)))
        if (
            not self.writable
            or self.generation.failed
            or room.f_flag & os.ST_RDONLY
            or room.f_bavail * room.f_frsize < 1_000_000
        ):
            raise Unavailable("the disk of the database is full or refuses writes", 5)

    def record_file_ids(self) -> None:
        """Let all processes know which files they have open, if none has yet.

        A first read opens the database in this thread and so creates the -wal and the -shm, which stay as long as
        its connection is open.
        """
        self.meta("created_at")
        if not any(self.generation.file_ids) and (files := self.stat_files()):
            self.generation.file_ids = files

    def enqueue(self, session: tuple, caller: tuple | None) -> None:
        """Queue the row of a machine token, to be written within BATCH_SECONDS.

        `session` has the five parameters of MACHINE_SESSION_INSERT, and `caller` is (actor_id, ip_address, user_agent,
        request_id) for the audit row, or None. Raises Unavailable while the disk refuses writes: a token that cannot
        be recorded is not issued.
        """
        if not self.writable or len(self.queue) > BATCH_MAX:
            raise Unavailable("token rows cannot be written", 5)
        self.queue.append((session, caller))
        if not self.wake.is_set():
            self.wake.set()

    def flush(self) -> None:
        """Write the queued rows, up to 5000 in one transaction. Rows that cannot be written stay queued."""
        with self.flush_lock:
            batch: list[tuple[tuple, tuple | None]] = []
            while self.queue and len(batch) < 5000:
                batch.append(self.queue.popleft())
            secrets_used = [self.secret_queue.popleft() for _ in range(len(self.secret_queue))]
            if not batch and not secrets_used and self.writable:
                return
            try:
                if not self.writable:
                    self.record_file_ids()
                    self.write_something()  # the batch proves nothing: it is not synced, and may be empty
                with self.writing():
                    began = time.monotonic()
                    connection = self.batch_connection = self.batch_connection or self.connect("NORMAL")
                    with self.committing(connection):
                        connection.executemany(MACHINE_SESSION_INSERT, [session for session, _ in batch])
                        for client_id, issued_at in {session[1]: session[3] for session, _ in batch}.items():
                            self.note_use(client_id, issued_at, connection)
                        connection.executemany(SECRET_USE_UPDATE, secrets_used)
                        head = self.append_audit(batch_audit(batch), connection)
                self.batch_head = head  # after the commit: one that was rolled back is in no chain
                self.count_commit("batch", len(batch), time.monotonic() - began)
            except Exception as error:  # whatever it is, keep the rows and the thread
                self.queue.extendleft(reversed(batch))
                self.secret_queue.extendleft(reversed(secrets_used))
                if isinstance(error, sqlcipher3.Error) and not is_busy(error) and self.batch_connection:
                    self.drop(self.batch_connection)  # as in discard()
                    self.batch_connection = None
                self.note_failure(error)
                return
            if not self.writable:
                self.log("store.writable", waiting=len(self.queue))
            self.writable = True
        if self.queue or self.secret_queue:
            self.wake.set()

    def flush_loop(self) -> None:
        while not self.closing:
            self.wake.wait(None if self.writable else 1)
            sleep(BATCH_SECONDS)
            self.wake.clear()
            self.flush()

    def start_flusher(self) -> None:
        """Start the thread that writes the batches. Call this after a fork, never before."""
        self.flusher = threading.Thread(target=self.flush_loop, name="flush", daemon=True)
        try:
            self.record_file_ids()
        except Unavailable as problem:  # serve the requests that need no database; the thread tries again
            self.note_failure(problem)
        self.flusher.start()

    def close(self) -> None:
        """Write the queued rows unless the disk refuses writes, and close every connection."""
        self.closing = True
        self.wake.set()
        if self.flusher:
            self.flusher.join(5)
        while (self.queue or self.secret_queue) and self.writable:
            self.flush()
        if self.queue:
            self.log("store.lost", "error", rows=len(self.queue))
        super().close()

    # -- purging, in small slices --

    def purge_sessions(
        self, older_than_id: str, before: int, after_id: str, limit: int, revoked: bool = False,
        user_id: str | None = None, client_id: str | None = None
    ) -> tuple[str | None, int]:
        """Delete those of the next `limit` sessions, in the order of their ids, that expired before `before`.

        With `revoked`, `user_id` or `client_id`, only revoked ones or those of that user or client. Return the id to
        continue after, or None at the end, and how many were deleted.
        """
        with self.guard:
            ids = self.connection.execute(
                f"""
                SELECT id, expires_at < :before
                       AND (:revoked = 0 OR revoked_at IS NOT NULL OR {LOGIN_IS_OVER.format(table="session")})
                       AND (:user_id IS NULL OR user_id = :user_id) AND (:client_id IS NULL OR client_id = :client_id)
                  FROM session WHERE id > :after AND id < :older ORDER BY id LIMIT :limit
                """,
                {
                    "before": before, "revoked": int(revoked), "user_id": user_id, "client_id": client_id,
                    "after": after_id, "older": older_than_id, "limit": limit,
                },
            ).fetchall()
        dead = [(id,) for id, is_dead in ids if is_dead]
        if dead:
            with self.transaction():
                self.connection.executemany("DELETE FROM session WHERE id = ?", dead)
        return (ids[-1][0] if len(ids) == limit else None), len(dead)

    def purge_walk(
        self, table: str, key: str, dead: str, after: str, limit: int, **parameters: object
    ) -> tuple[str | None, int]:
        """Delete the dead ones of the next `limit` rows of a table, in the order of their keys.

        `dead` is a condition in SQL. The rows are read before the write lock is taken, so that no writer waits while
        live ones are read, and the condition is checked again when they are deleted: SCATTERED at most, because
        their index entries may lie anywhere. Return the key to continue after, or None at the end, and how many rows
        were deleted.
        """
        with self.guard:
            rows = self.connection.execute(
                f"SELECT {key}, {dead} FROM {table} WHERE {key} > :after ORDER BY {key} LIMIT :limit",
                {"after": after, "limit": limit, **parameters},
            ).fetchall()
        found, deleted = [it for it, is_dead in rows if is_dead][:SCATTERED], 0
        if found:
            with self.transaction():
                deleted = self.connection.executemany(
                    f"DELETE FROM {table} WHERE {key} = :key AND {dead}", [{"key": it, **parameters} for it in found]
                ).rowcount
        if len(found) == SCATTERED:
            return found[-1], deleted
        return (rows[-1][0] if len(rows) == limit else None), deleted

    def purge_expired(self, table: str, key: str, before: int, after: str, limit: int) -> tuple[str | None, int]:
        """Delete the expired ones of the next `limit` rows of a table, as purge_walk() does."""
        return self.purge_walk(table, key, "expires_at < :before", after, limit, before=before)

    def purge_logins(self, before: int, limit: int) -> None:
        """Delete up to `limit` expired logins. They are found before the write lock is taken."""
        with self.guard:
            found = self.connection.execute(
                "SELECT id FROM login_transaction WHERE expires_at < ? LIMIT ?", (before, limit)
            ).fetchall()
        if found:
            with self.transaction():
                self.connection.executemany("DELETE FROM login_transaction WHERE id = ?", found)

    def purge_refresh_tokens(
        self, before: int, after: str, limit: int, revoked: bool = False, user_id: str | None = None,
        client_id: str | None = None
    ) -> tuple[str | None, int]:
        """Delete expired refresh tokens as purge_walk() does; with `revoked`, only those that were revoked or used.

        None is deleted before it expires: the reuse of a used one must be recognised, to end its login.
        RFC 9700 §4.14.2.
        """
        return self.purge_walk(
            "refresh_token", "id",
            f"""
            expires_at < :before
            AND (:revoked = 0 OR revoked_at IS NOT NULL OR rotated_at IS NOT NULL
                 OR {LOGIN_IS_OVER.format(table="refresh_token")})
            AND (:user_id IS NULL OR user_id = :user_id) AND (:client_id IS NULL OR client_id = :client_id)
            """,
            after, limit, before=before, revoked=int(revoked), user_id=user_id, client_id=client_id,
        )

    def purge_audit(self, before: int, limit: int) -> int:
        """Delete up to `limit` of the oldest audit rows that are no refusals, never the last one. Store the anchor,
        which is the number and the hash of the newest row that was deleted, and the number of refusals up to it: there
        verify_audit() begins. Return how many were deleted.
        """
        with self.transaction():
            last = self.connection.execute(
                """
                SELECT seq, row_sha256 FROM (SELECT seq, row_sha256, at FROM audit ORDER BY seq LIMIT :limit)
                 WHERE at < :before AND seq < (SELECT max(seq) FROM audit) ORDER BY seq DESC LIMIT 1
                """,
                {"before": before, "limit": limit},
            ).fetchone()
            if last is None:
                return 0
            begin, _, refusals = self.audit_mark("audit_anchor")
            deleted = self.run("DELETE FROM audit WHERE seq <= :seq", seq=last[0])
            self.put_meta("audit_anchor", f"{last[0]}:{last[1]}:{refusals + last[0] - begin - deleted}")
            return deleted

    def purge_refusals(self, before: int, limit: int) -> int:
        """Delete up to `limit` of the oldest refusals of the audit log, and store their anchor, as purge_audit() does."""
        with self.transaction():
            last = self.connection.execute(
                """
                SELECT seq, row_sha256 FROM (SELECT seq, row_sha256, at FROM audit_refusal ORDER BY seq LIMIT :limit)
                 WHERE at < :before ORDER BY seq DESC LIMIT 1
                """,
                {"before": before, "limit": limit},
            ).fetchone()
            if last is None:
                return 0
            purged = self.audit_mark("audit_refusal_anchor")[2]
            deleted = self.run("DELETE FROM audit_refusal WHERE seq <= :seq", seq=last[0])
            self.put_meta("audit_refusal_anchor", f"{last[0]}:{last[1]}:{purged + deleted}")
            return deleted
