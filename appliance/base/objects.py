"""The objects of the wire: bodies, forms, queries and answers. `_at` is integer Unix seconds."""

import datetime
import re
import time
from typing import Annotated, Literal, overload

import msgspec

from appliance.base.store import FOREVER, OVERLAP_MAX

# -- request bodies and forms --
# A caller may set the declared members and no others. UNSET marks a member that was not sent: it stays unchanged.
# Alternative spellings exist because the published clients of the original work send them.

UNSET = msgspec.UNSET
Maybe = msgspec.UnsetType

# -- limits --
# The checks of microauthd use these numbers, and answer with a sentence that names the member. The schemas tell them:
# `extra_json_schema` describes, and validates nothing. All are counted after blanks at the ends are removed.

GRANT_TYPES = ("authorization_code", "client_credentials", "password", "refresh_token")  # RFC 6749 §4, §6
USERNAME_MAX, EMAIL_MAX, PASSWORD_MAX, LABEL_MAX, URI_MAX, PROVIDER_KEY_MAX = 100, 254, 255, 255, 2000, 50
SECRET_MIN, SECRET_MAX = 8, 255
REASON_MAX = 200
LOGO_SIZE = 40960  # octets of the picture of the brand: in base64 it fits into a request


def limited(schema: dict) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema=schema)


Username = Annotated[str, limited({"maxLength": USERNAME_MAX})]
Email = Annotated[str, limited({"maxLength": EMAIL_MAX})]
NewPassword = Annotated[str, limited({
    "maxLength": PASSWORD_MAX, "description": "At least `password-min-length` characters, and no common password.",
})]
Label = Annotated[str, limited({"maxLength": LABEL_MAX})]  # for people, and an audience
Name = Annotated[str, limited({"minLength": 1, "maxLength": LABEL_MAX})]  # of a role, permission, scope or client
NewName = Annotated[str, limited({"maxLength": LABEL_MAX})]  # a blank one changes nothing
NewSecret = Annotated[str, limited({
    "maxLength": SECRET_MAX, "pattern": f"^(.{{{SECRET_MIN},{SECRET_MAX}}})?$",
    "description": "Blank makes one. Printable, without a blank at its ends, and no common password.",
})]
Uri = Annotated[str, limited({"minLength": 1, "maxLength": URI_MAX})]
ProviderKey = Annotated[str, limited({"minLength": 1, "maxLength": PROVIDER_KEY_MAX, "pattern": "^[A-Za-z0-9._-]+$"})]
ClientType = Annotated[str, limited({"enum": ["confidential", "public"]})]  # RFC 6749 §2.1
GrantType = Annotated[str, limited({"enum": list(GRANT_TYPES)})]
BrandName = Annotated[str, limited({"maxLength": 80, "description": "Blank is the issuer's host."})]
BrandColor = Annotated[str, limited({"pattern": "^#?[0-9A-Fa-f]{6}$"})]
BrandPicture = Annotated[str, limited({
    "contentEncoding": "base64", "maxLength": 56000,
    "description": f"A PNG, JPEG, WebP or SVG picture of at most {LOGO_SIZE} octets; blank is none.",
})]
Overlap = Annotated[int, limited({"minimum": 0, "maximum": OVERLAP_MAX})]


class ProvisionUser(msgspec.Struct):
    """POST /user of AUTH. `user_email` null creates a user without an e-mail address."""

    username: Username
    email: Email = ""
    password: NewPassword = ""
    user_email: Email | None = ""
    user_password: NewPassword = ""


class CreateUser(ProvisionUser):
    """POST /users. Only an administrator says that an address is verified: clients link accounts by it."""

    email_verified: bool = False
    without_password: bool = False  # nobody knows its password: an invitation lets the user choose one


class Invite(msgspec.Struct):
    """POST /users/{id}/invitations."""

    purpose: Literal["invite", "reset"] = "invite"


class UpdateUser(msgspec.Struct):
    """PUT /users/{id}. `lockout_until` null clears a lockout."""

    username: Username | Maybe = UNSET
    email: Email | Maybe = UNSET
    is_active: bool | Maybe = UNSET
    email_verified: bool | Maybe = UNSET
    lockout_until: str | int | None | Maybe = UNSET


class ResetPassword(msgspec.Struct):
    """POST /users/{id}/reset."""

    new_password: NewPassword = ""
    password: NewPassword = ""


class SetLockout(msgspec.Struct):
    """POST /users/{id}/set-lockout.

    ISO 8601 in UTC, or Unix seconds; the year 9999 never ends, null and the year 1 clear the lockout.
    """

    lockout_until: str | int | None
    reason: Annotated[str, limited({"maxLength": REASON_MAX})] = ""


class VerifyPassword(msgspec.Struct):
    """POST /users/verify-password. Names the user by id or by username."""

    password: str
    user_id: str = ""
    username: str = ""
    totp: str = ""


class EnrolTotp(msgspec.Struct):
    """POST /users/{id}/totp/enroll. The issuer is TOTP_ISSUER of the client, `brand-name` or the issuer's host."""

    client_id: str = ""


class GenerateTotp(msgspec.Struct):
    """POST /users/{id}/totp/generate. The path is relative to `totp-qr-output-root`."""

    client_id: str = ""
    qr_output_path: str = "."


class ConfirmTotp(msgspec.Struct):
    """POST /users/{id}/totp/verify."""

    code: str


class VerifyTotp(msgspec.Struct):
    """POST /users/totp/verify."""

    user_id: str
    code: str
    client_id: str | None = ""


class RoleMember(msgspec.Struct):
    """POST /roles/assign and /roles/unassign."""

    user_id: str
    role_id: str


class RoleRef(msgspec.Struct):
    """One role of the list that replaces a user's roles."""

    id: str = ""
    name: str | None = None


class SetRoles(msgspec.Struct):
    """PUT /users/{id}/roles, unless the body is a bare array."""

    roles: list[RoleRef]


class CreateRole(msgspec.Struct):
    """POST /roles."""

    name: Name
    description: Label | None = None
    is_privileged: bool | None = None


class UpdateRole(msgspec.Struct):
    """PUT /roles/{id}."""

    name: NewName | None | Maybe = UNSET
    description: Label | None | Maybe = UNSET
    is_privileged: bool | None | Maybe = UNSET


class CreatePermission(msgspec.Struct):
    """POST /permissions."""

    name: Name


class UpdatePermission(msgspec.Struct):
    """PUT /permissions/{id}."""

    name: Name | Maybe = UNSET


class AssignPermission(msgspec.Struct):
    """POST /roles/{id}/permissions."""

    permission_id: str


class PermissionMember(msgspec.Struct):
    """POST /permissions/assign and /permissions/remove."""

    role_id: str
    permission_id: str


class CheckAccess(msgspec.Struct):
    """POST /check-access. Names a permission by id or name, or a scope by name."""

    user_id: str
    permission_id: str = ""
    permission: str = ""
    scope: str = ""
    explain: bool = False


class NewFlag(msgspec.Struct):
    """A feature flag of a new client; `options` is its option, where it takes one."""

    is_enabled: bool = True
    options: Label = ""


class CreateClient(msgspec.Struct):
    """POST /clients. The server generates a secret if a confidential client comes without one.

    `flags` are by name, such as TOKEN_EXPIRATION. Nothing is registered if a part is refused.
    """

    client_id: Name
    client_secret: NewSecret | None = None
    secret: NewSecret | None = None
    display_name: Label | None = None
    audience: Label | None = None
    client_type: ClientType = "confidential"
    grant_types: list[GrantType] | None = None
    scopes: list[Name] | None = None
    may_introspect: bool = False
    is_first_party: bool = True
    allow_http_redirects: bool = False
    allow_short_schemes: bool = False
    redirect_uris: list[Uri] | None = None
    post_logout_redirect_uris: list[Uri] | None = None
    cors_origins: list[Uri] | None = None
    flags: dict[str, NewFlag] | None = None

    def uris(self) -> tuple[tuple[str, str, list[str] | None], ...]:
        """Return (member, kind, URIs) of each kind."""
        return (
            ("redirect_uris", "redirect", self.redirect_uris),
            ("post_logout_redirect_uris", "post_logout", self.post_logout_redirect_uris),
            ("cors_origins", "cors_origin", self.cors_origins),
        )


class UpdateClient(msgspec.Struct):
    """PUT /clients/{id}. A blank audience and nulls change nothing."""

    client_id: Name | Maybe = UNSET
    display_name: Label | None | Maybe = UNSET
    audience: Label | None | Maybe = UNSET
    is_active: bool | Maybe = UNSET
    grant_types: list[GrantType] | Maybe = UNSET
    may_introspect: bool | Maybe = UNSET
    is_first_party: bool | Maybe = UNSET
    allow_http_redirects: bool | Maybe = UNSET
    allow_short_schemes: bool | Maybe = UNSET
    access_token_signed_alg: Literal["", "ES256", "RS256"] | Maybe = UNSET
    id_token_signed_response_alg: Literal["ES256", "RS256"] | Maybe = UNSET


class ChangeSecret(msgspec.Struct):
    """POST /clients/secret. `client_id` is the client's identifier or the id of its record."""

    client_id: str
    new_secret: NewSecret | None = None
    overlap_seconds: Overlap = 0


class AddUri(msgspec.Struct):
    """POST /clients/{id}/redirect-uris, unless the body is a bare string."""

    uri: Uri


class TryUri(msgspec.Struct):
    """POST /clients/{id}/uris/check. `uri` has no limits: the answer says what is wrong with one that is too long."""

    kind: Annotated[str, limited({"enum": ["redirect", "post_logout", "cors_origin"]})]
    uri: str


class PreviewTokens(msgspec.Struct):
    """POST /clients/{id}/preview: without `user_id`, of the client's own token.

    `claims` is the parameter of OpenID Connect Core §5.5.
    """

    user_id: str = ""
    scope: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    claims: dict | None = None


class SetFlag(msgspec.Struct):
    """POST /client/options/{flag}. `client_id` may be in the query instead."""

    client_id: str = ""
    enabled: bool | str | Maybe = UNSET
    is_enabled: bool | Maybe = UNSET


class SetFlagOption(msgspec.Struct):
    """POST /client/options/{flag}/ext. `client_id` may be in the query instead."""

    client_id: str = ""
    options: Label = ""


class PutIdp(msgspec.Struct):
    """POST and PUT of /clients/{id}/idp."""

    provider_key: ProviderKey
    display_name: Label = ""
    issuer: Label = ""
    client_identifier: Label = ""
    scopes: Label = "openid email profile"


class CreateScope(msgspec.Struct):
    """POST /scopes."""

    name: Name
    desc: Label | None = None
    description: Label | None = None


class UpdateScope(msgspec.Struct):
    """PUT /scopes/{id}."""

    name: Name | Maybe = UNSET
    desc: Label | None | Maybe = UNSET
    description: Label | None | Maybe = UNSET


class AssignScopes(msgspec.Struct):
    """POST /clients/{id}/scopes and /users/{id}/scopes. Names scopes by id or name."""

    scope_ids: list[str] | None = None
    scopeIds: list[str] | None = None
    scope_id: str | None = None

    @property
    def ids(self):
        return self.scope_ids or self.scopeIds or ([self.scope_id] if self.scope_id else [])


class SetScopes(msgspec.Struct):
    """PUT /clients/{id}/scopes and /users/{id}/scopes: all the scopes there are to be, by id or name."""

    scope_ids: list[str]


class ScopeMember(msgspec.Struct):
    """POST /scopes/assign-to-user, /scopes/remove-from-user, and the same for clients."""

    scope_id: str
    user_id: str = ""
    client_id: str = ""


class TokenIn(msgspec.Struct):
    """POST /revoke and /introspect of ADMIN."""

    token: str


class PurgeTokens(msgspec.Struct):
    """POST /sessions/purge, /refresh-tokens/purge and /tokens/purge: of all, or of one user or client."""

    older_than_seconds: Annotated[int, msgspec.Meta(ge=0, le=10**10)] = 86400
    purge_expired: bool = True
    purge_revoked: bool = False
    user_id: str | None = None
    client_id: str | None = None


class PurgeAudit(msgspec.Struct):
    """POST /audit-logs/purge."""

    older_than_days: Annotated[int, msgspec.Meta(gt=0, le=36500)]


class TokenForm(msgspec.Struct):
    """RFC 6749 §4: the members needed depend on `grant_type`.

    A client authenticates by HTTP Basic, or by the last two members. A public client needs none of them to refresh.
    """

    grant_type: str
    scope: str = ""
    username: str = ""
    password: str = ""
    totp: str = ""
    totp_code: str = ""
    refresh_token: str = ""
    token: str = ""
    code: str = ""
    redirect_uri: str = ""
    code_verifier: str = ""
    client_id: str = ""
    client_secret: str = ""


class TokenHintForm(msgspec.Struct):
    """RFC 7662 §2.1, RFC 7009 §2.1."""

    token: str
    token_type_hint: str = ""
    client_id: str = ""
    client_secret: str = ""


class BearerForm(msgspec.Struct):
    """RFC 6750 §2.2: the access token, unless it is in the header."""

    access_token: str = ""


class AuthorizeForm(msgspec.Struct):
    """RFC 6749 §4.1.1, RFC 7636 §4.3, OpenID Connect Core §3.1.2.1. Other parameters are ignored.

    `hint_handle` is the server's own: it stands for the hints of a POST that became a GET.
    """

    client_id: str
    redirect_uri: str
    response_type: str = "code"
    response_mode: str = "query"
    scope: str = ""
    state: str = ""
    nonce: str = ""
    code_challenge: str = ""
    code_challenge_method: str = ""
    prompt: str = ""
    max_age: str = ""
    login_hint: str = ""
    id_token_hint: str = ""
    ui_locales: str = ""
    acr_values: str = ""
    claims: str = ""
    display: str = ""
    hint_handle: str = ""


class LoginPageForm(msgspec.Struct):
    """`tx` or `jti` names a pending login; only the browser that began it sees its page.

    Without either, the page shows the account of the user who is logged in.
    """

    tx: str = ""
    jti: str = ""


class StepForm(msgspec.Struct):
    """`tx` names a pending login; `form` is the token that protects our page's form from forgery (CSRF)."""

    tx: str
    form: str


class PasswordForm(StepForm):
    username: str
    password: str


class CodeForm(StepForm):
    totp: str


class EnrolForm(StepForm):
    """`skip` leaves out a second factor that is offered and not demanded."""

    totp: str = ""
    skip: str = ""


class SelectForm(StepForm):
    """`username` has the user that the page showed."""

    choice: str = ""
    username: str = ""


class ConsentForm(StepForm):
    """`scope` has the scopes that the page showed."""

    decision: str = ""
    scope: str = ""


class HeadlessForm(msgspec.Struct):
    jti: str


class HeadlessLastForm(HeadlessForm):
    redirect_uri: str = ""


class HeadlessPasswordForm(HeadlessForm):
    username: str
    password: str
    redirect_uri: str = ""


class HeadlessCodeForm(HeadlessForm):
    totp_code: str
    redirect_uri: str = ""


class EndSessionForm(msgspec.Struct):
    """OpenID Connect RP-Initiated Logout §2. `hint_handle` is as in AuthorizeForm."""

    id_token_hint: str = ""
    client_id: str = ""
    post_logout_redirect_uri: str = ""
    state: str = ""
    logout_hint: str = ""
    ui_locales: str = ""
    form: str = ""
    hint_handle: str = ""


class InvitePageForm(msgspec.Struct):
    """`code` is the secret of an invitation."""

    code: str = ""


class InviteForm(InvitePageForm):
    form: str = ""
    new_password: NewPassword = ""


class AccountForm(msgspec.Struct):
    action: str
    form: str
    id: str = ""
    password: str = ""
    new_password: NewPassword = ""
    totp: str = ""


class LogoutForm(BearerForm):
    form: str = ""


class SignIn(msgspec.Struct):
    """POST /dashboard/session. `totp` is for an administrator with a second factor."""

    username: str
    password: str
    totp: str = ""


class Proof(msgspec.Struct):
    """POST /dashboard/session/proof. `totp` is for an administrator with a second factor."""

    password: str
    totp: str = ""


class AdminTokenForm(msgspec.Struct):
    """`client_id` is recorded only; `totp` is for a user with a second factor."""

    username: str
    password: str
    client_id: str = ""
    totp: str = ""
    totp_code: str = ""
    grant_type: str = ""


# -- queries --

Limit = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class ListUsers(msgspec.Struct):
    q: Annotated[str, msgspec.Meta(max_length=255)] = ""
    is_active: Literal["true", "false", "all"] = "true"
    sort: Literal[
        "username", "-username", "email", "-email", "created_at", "-created_at", "last_login_at", "-last_login_at"
    ] = "username"
    limit: Limit = 1000
    offset: Offset = 0


class SearchUsers(ListUsers):
    """`role` is an id or a name; `unused_since` selects users who did not log in since then."""

    is_admin: bool | None = None
    locked: bool | None = None
    totp: bool | None = None
    role: str | None = None
    unused_since: str | int | None = None


class ListNamed(msgspec.Struct):
    q: Annotated[str, msgspec.Meta(max_length=255)] = ""
    sort: Literal["name", "-name", "created_at", "-created_at"] = "name"
    limit: Limit = 1000
    offset: Offset = 0


class ListRoleMatrix(ListNamed):
    """`with` names what is shown besides: permissions, user_count, or both, separated by a comma."""

    more: Annotated[
        str, limited({"enum": ["", "permissions", "user_count", "permissions,user_count"]})
    ] = msgspec.field(default="", name="with")


class ListClients(msgspec.Struct):
    q: Annotated[str, msgspec.Meta(max_length=255)] = ""
    sort: Literal["display_name", "-display_name", "client_id", "-client_id", "created_at", "-created_at"] = (
        "display_name"
    )
    client_type: Literal["confidential", "public"] | None = None
    is_active: bool | None = None
    grant_type: Literal["authorization_code", "client_credentials", "password", "refresh_token"] | None = None
    limit: Limit = 1000
    offset: Offset = 0


class Paged(msgspec.Struct):
    limit: Limit = 1000
    offset: Offset = 0


AfterId = Annotated[str, msgspec.Meta(max_length=64)]


class PagedById(Paged):
    """`after` is the id of the last row of the page before, in place of `offset`: Link says it."""

    after: AfterId | None = None


class ListSessions(msgspec.Struct):
    """`living` selects the tokens that are alive; `sid` is that of a login.

    `after` is the id of the last row of the page before, in place of `offset`, where they are sorted by id.
    """

    user_id: str | None = None
    client_id: str | None = None
    living: bool = False
    ip_address: str | None = None
    mad_use: Literal["auth", "admin"] | None = None
    sid: str | None = None
    sort: Literal["id", "-id", "expires_at", "-expires_at"] = "-id"
    after: AfterId | None = None
    limit: Limit = 1000
    offset: Offset = 0


class ListBrowserSessions(msgspec.Struct):
    """`after` is that of the `next` in Link, in place of `offset`: when the last row was used, and its id."""

    user_id: str | None = None
    ip_address: str | None = None
    after: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,15}-.{1,64}$")] | None = None
    limit: Limit = 1000
    offset: Offset = 0


class ListRoles(msgspec.Struct):
    """GET /users/{id}/roles: the roles of the user, or every role."""

    all: bool = False


class AuditFilter(msgspec.Struct):
    """`userId` is the actor; `target` matches target or secondary.

    `about` is a user, by id or name: the rows of what the user did, and of what was done to the user.
    """

    userId: str | None = None
    user_id: str | None = None
    action: str | None = None
    target: str | None = None
    since: str | int | None = None
    until: str | int | None = None
    result: Literal["success", "failure"] | None = None
    ip_address: str | None = None
    request_id: str | None = None
    about: str | None = None


class ListAudit(AuditFilter):
    """A page of the audit log; `before` is an id: earlier rows. So is `after`: later rows, oldest first."""

    after: Annotated[int, msgspec.Meta(ge=0, le=10**15)] | None = None
    before: Annotated[int, msgspec.Meta(ge=0, le=10**15)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=-(10**9), le=10**9)] = 100
    offset: Offset = 0


class ReadHistory(msgspec.Struct):
    """`series` are names separated by commas, without it all; `range` is 1h, 1d or 7d."""

    series: str | None = None
    range: str = "1d"


class ExportAudit(AuditFilter):
    """The rows of the audit log that follow the id `after`."""

    after: Annotated[int, msgspec.Meta(ge=0, le=10**15)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10_000


class OfClient(msgspec.Struct):
    """The client of a flag, by its identifier or the id of its record."""

    client_id: str = ""


# -- answers --
# Members are sent in the order of their declaration. Times are ISO 8601 in UTC.


class Err(msgspec.Struct):
    """`request_id` is that of the log and the audit log."""

    success: bool
    message: str
    error: str
    errors: dict[str, str] | Maybe = UNSET
    request_id: str | Maybe = UNSET


class OAuthError(msgspec.Struct):
    """RFC 6749 §5.2."""

    error: str
    error_description: str


class Msg(msgspec.Struct):
    success: bool
    message: str


class Ping(msgspec.Struct):
    message: str


class Version(msgspec.Struct):
    name: str
    version: str


class Health(msgspec.Struct):
    status: str
    checks: dict[str, bool] | Maybe = UNSET
    warnings: list[str] | Maybe = UNSET  # what does not keep it from serving, and an operator has to settle


class Found(msgspec.Struct):
    """The id that belongs to a name."""

    result: str


class UserObject(msgspec.Struct):
    id: str
    username: str
    email: str
    created_at: str
    lockout_until: str | None
    is_active: bool
    email_verified: bool
    totp_enabled: bool


class UserDetails(UserObject):
    """A user as ADMIN shows it. `roles` are names; `lockout_by` is the user name, or the component, that locked it."""

    last_login_at: str | None
    is_admin: bool
    roles: list[str]
    totp_locked_until: str | None
    lockout_reason: str
    lockout_by: str
    recovery_codes_left: int


class TotpConfirmed(Msg):
    """`recovery_codes` are shown once, for a lost authenticator."""

    recovery_codes: list[str]


class RecoveryCodes(msgspec.Struct):
    """Shown once. Each works once, in place of a one-time code."""

    recovery_codes: list[str]


class InvitationObject(msgspec.Struct):
    """A living invitation, described without its link."""

    id: str
    user_id: str
    purpose: str
    created_by: str
    created_at: str
    expires_at: str


class NewInvitation(InvitationObject):
    """`url` is shown once: whoever has it chooses the password of the user."""

    url: str


class PasswordVerdict(msgspec.Struct):
    valid: bool
    user_id: str
    email: str
    totp_required: bool


class TotpEnrolment(msgspec.Struct):
    """Shown once: `otpauth_uri`, `secret` and `svg` all contain the seed."""

    success: bool
    otpauth_uri: str
    secret: str
    svg: str


class TotpQr(msgspec.Struct):
    success: bool
    filename: str
    qr_code_filename: str


class RoleObject(msgspec.Struct):
    id: str
    name: str
    description: str
    is_protected: bool
    is_active: bool
    is_privileged: bool


class NameRef(msgspec.Struct):
    id: str
    name: str


class RoleWithMore(RoleObject):
    """A role of a list, with what `with` asked for."""

    permissions: list[NameRef] | Maybe = UNSET
    user_count: int | Maybe = UNSET


class AccessVerdict(msgspec.Struct):
    access: bool
    user_id: str | Maybe = UNSET
    permission_id: str | Maybe = UNSET
    allowed: bool | Maybe = UNSET
    reason: str | Maybe = UNSET  # with `explain`
    by_roles: list[str] | Maybe = UNSET


class ScopeObject(msgspec.Struct):
    id: str
    name: str
    desc: str
    is_active: bool
    is_protected: bool
    created_at: str
    description: str


class ConsentObject(msgspec.Struct):
    """What a user allowed a client: scopes, and since when."""

    client_id: str
    display_name: str
    scopes: list[str]
    given_at: str


class UserConsentObject(msgspec.Struct):
    """What a user allowed one client: scopes, and since when."""

    user_id: str
    username: str
    scopes: list[str]
    given_at: str


class ClientObject(msgspec.Struct):
    """`client_secret` is present only if the server has just generated it."""

    id: str
    client_id: str
    display_name: str
    is_active: bool
    created_at: str
    audience: str
    client_type: str
    grant_types: list[str]
    may_introspect: bool
    is_first_party: bool
    allow_http_redirects: bool
    allow_short_schemes: bool
    access_token_signed_alg: str
    id_token_signed_response_alg: str
    scopes: list[str]
    last_token_at: str | None
    client_secret: str | Maybe = UNSET


class SecretObject(msgspec.Struct):
    """An unexpired secret of a client, described without the secret itself.

    `last_used_at` is exact to a minute, and null if it was not used since this is recorded.
    """

    id: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class UriObject(msgspec.Struct):
    id: str
    client_id: str
    uri: str
    redirect_uri: str | Maybe = UNSET


class UriVerdict(msgspec.Struct):
    """Whether a client could be given a URI. `reason` is empty if it could; `nearest` is its most similar URI."""

    ok: bool
    reason: str
    nearest: str | None


class PreviewedScopes(msgspec.Struct):
    """`left_out` says of each scope that was requested and would not be granted why."""

    granted: list[str]
    left_out: dict[str, str]


class PreviewedToken(msgspec.Struct):
    header: dict
    claims: dict


class Preview(msgspec.Struct):
    """What a client would get. `refused` is the error that it would get instead, or empty.

    `obstacles` keep the user from logging in; `consent` has the scopes for which the user would be asked first.
    """

    refused: str
    obstacles: list[str]
    scopes: PreviewedScopes
    consent: list[str]
    access_token: PreviewedToken | None = None
    id_token: PreviewedToken | None = None
    userinfo: dict | None = None


class FlagObject(msgspec.Struct):
    is_enabled: bool
    options: str


class IdpObject(msgspec.Struct):
    id: str
    client_id: str
    provider_key: str
    display_name: str
    issuer: str
    client_identifier: str
    scopes: str
    created_at: str
    modified_at: str


class SessionObject(msgspec.Struct):
    """`user_id` is null for a client's own token; published bindings read `client_identifier` and `created_at`."""

    id: str
    user_id: str | None
    username: str
    client_id: str
    issued_at: str
    expires_at: str
    is_revoked: bool
    token_use: str
    mad_use: str
    login_method: str
    is_session_based: bool
    session_max_age: int
    session_expires_at: str | None
    client_identifier: str
    created_at: str


class SessionDetails(SessionObject):
    """`sid` is null for a client's own token. Address and browser are those of the login, empty where unknown."""

    sid: str | None
    scope: str
    ip_address: str
    user_agent: str


class BrowserSessionObject(msgspec.Struct):
    """A user who is logged in at a browser; `id` is a hash of its cookie."""

    id: str
    user_id: str
    username: str
    amr: list[str]
    authenticated_at: str
    last_seen_at: str
    expires_at: str
    ip_address: str
    user_agent: str


class RefreshTokenObject(msgspec.Struct):
    id: str
    user_id: str
    username: str
    session_id: str
    client_id: str
    issued_at: str
    expires_at: str
    is_revoked: bool
    is_openid_token: bool
    client_identifier: str


class Revoked(msgspec.Struct):
    jti: str
    status: str
    message: str


class AuditObject(msgspec.Struct):
    id: str
    actor_id: str
    action: str
    secondary: str
    target: str
    timestamp: str
    ip_address: str
    user_agent: str
    request_id: str
    result: str
    row_sha256: str
    user_id: str
    ip: str


class MakeBackup(msgspec.Struct):
    """`without_keys` leaves keys and settings out, as a database without encryption requires."""

    without_keys: bool = False


class BackupPiece(msgspec.Struct):
    """`offset` is where the requested piece of a backup begins, in octets."""

    offset: Annotated[int, msgspec.Meta(ge=0, le=10**15)] = 0


class BackupObject(msgspec.Struct):
    """A backup in `backup-folder`; `newest_at` is the time of its latest record."""

    name: str
    bytes: int
    sha256: str
    users: int
    clients: int
    newest_at: str | None


Severity = Literal["error", "warning"]


class Attention(msgspec.Struct, frozen=True):
    """Something that an operator has to settle; `command` is what to run, or what to read, if there is such a thing."""

    code: str
    severity: Severity
    since: str | None
    text: str
    command: str = ""


class Workers(msgspec.Struct):
    """How many processes there should be besides the supervisor, and how many there are."""

    expected: int
    running: int


class Endpoint(msgspec.Struct):
    """Where a port listens. `path` is that of a Unix socket."""

    name: str
    address: str = ""
    port: int = 0
    tls: bool = False
    path: str = ""


class CertificateObject(msgspec.Struct):
    """The certificate of a port as its file holds it; `fingerprint` is the SHA-256 of its DER encoding."""

    not_before: str
    not_after: str
    fingerprint: str
    names: list[str]


class ClockObject(msgspec.Struct):
    """`state` is right, probation, guessed, behind or ahead; `now` is the time that the server goes by."""

    state: str
    now: str


class LastBackup(msgspec.Struct):
    """The latest backup that stands, of whatever kind: command, admin, schedule or upgrade."""

    at: str
    name: str
    bytes: int
    kind: str


class BackupPlan(msgspec.Struct):
    """Backups by themselves: seconds between two, how many are kept, the next try, what the last one failed of."""

    every: int
    keep: int
    folder: str
    next_at: str | None = None
    failed_at: str | None = None
    failure: str = ""
    failures: int = 0  # in all


class Disk(msgspec.Struct):
    """Octets: what is free and in all where the database lies, and what the database, its WAL and the log take."""

    free: int
    total: int
    database: int
    wal: int
    log: int


class StatusObject(msgspec.Struct):
    """How the box is. `state` is well, attention or stopped; `since` and `pid` are null while no server runs."""

    state: str
    version: str
    versions: dict[str, str]
    now: str
    since: str | None
    pid: int | None
    pids: list[int]
    workers: Workers
    endpoints: list[Endpoint]
    issuer: str
    admin_issuer: str
    shares_host_with_auth: bool
    checks: dict[str, bool]
    clock: ClockObject
    certificate: CertificateObject | None
    admin_certificate: CertificateObject | None
    last_backup: LastBackup | None
    backups: BackupPlan
    disk: Disk
    log_damaged: str
    attention: list[Attention]


class HistoryObject(msgspec.Struct):
    """Figures over time. `from` is the beginning of the first point, `step` the seconds of each; null is a gap."""

    from_: str = msgspec.field(name="from")
    step: int
    series: dict[str, list[int | None]]


class ListedBackup(msgspec.Struct):
    """A file in `backup-folder`; `sha256` is null for one that another database made."""

    name: str
    created_at: str
    bytes: int
    sha256: str | None
    kind: str


class OptionObject(msgspec.Struct):
    """A setting: its value and where it is from. Of a secret, `value` and `default` tell only whether it is set."""

    name: str
    value: bool | int | str | list[str]
    origin: str
    default: bool | int | str | list[str]
    group: str
    meaning: str
    is_secret: bool
    needs_restart: bool


class PreviewPage(msgspec.Struct):
    """GET /dashboard/preview: in a language of the pages, such as `de`."""

    lang: str = ""


class ChangeBrand(msgspec.Struct):
    """PUT /brand. What is not sent stays unchanged; null is what the option says."""

    name: BrandName | None | Maybe = UNSET
    color: BrandColor | None | Maybe = UNSET
    logo: BrandPicture | None | Maybe = UNSET


class BrandLogo(msgspec.Struct):
    """The picture of the brand, and where AUTH serves it."""

    uri: str
    media_type: str
    bytes: int
    sha256: str


class BrandOrigins(msgspec.Struct):
    """Where each part of the brand is from: it was set by PUT /brand, or it is the option's."""

    name: Literal["set", "option"]
    color: Literal["set", "option"]
    logo: Literal["set", "option"]


class BrandObject(msgspec.Struct):
    """The brand of the pages. `host` is shown where `name` is blank.

    `contrast` is that of `text_color` on `color`, 1 to 21. WCAG 2.2 §1.4.3
    """

    name: str
    host: str
    color: str
    text_color: str
    contrast: float
    logo: BrandLogo | None
    origins: BrandOrigins
    modified_at: str | None


class RotateKeys(msgspec.Struct):
    """POST /keys/rotate: of one ring and algorithm, or of all that sign."""

    ring: Literal["", "auth", "admin"] = ""
    alg: Literal["", "ES256", "RS256"] = ""


class KeyObject(msgspec.Struct):
    """A key of a ring. `signs` is what it signs unless a client chose another algorithm.

    `signs_from` is when it begins to sign, or began; `gone_after` when the last token of a retired key is dead.
    """

    kid: str
    ring: str
    alg: str
    state: str  # next | active | retired
    since: str | None
    signs: list[str]
    signs_from: str | None
    gone_after: str | None


class KeyImpact(msgspec.Struct):
    """What ends if a key is revoked: at most so many living access tokens, of so many users and clients.

    `is_lower_bound` says that there are more than were counted. Who has cached the key set accepts the tokens for
    `cached_seconds` more.
    """

    kid: str
    ring: str
    state: str
    tokens: int
    is_lower_bound: bool
    users: int
    clients: int
    cached_seconds: int


class AuditVerdict(msgspec.Struct):
    """`head` is the hash of the last row that is no refusal, `last_seq` its number: store both elsewhere to detect a
    rewrite of the rows that it covers.
    """

    valid: bool
    rows: int
    first_seq: int | None
    last_seq: int | None
    head: str
    reason: str


class TokenObject(msgspec.Struct):
    """RFC 6749 §5.1. Members that do not apply are absent."""

    access_token: str
    token_type: str
    expires_in: int
    jti: str
    aud: str
    audience: str
    scope: str | Maybe = UNSET
    refresh_token: str | Maybe = UNSET
    id_token: str | Maybe = UNSET


class PkceStep(msgspec.Struct):
    """The state of a login at an application with its own pages; `jti` is the secret that identifies it."""

    jti: str
    client_id: str
    redirect_uri: str
    requires_totp: bool
    is_session_based: bool


class ConsoleUser(msgspec.Struct):
    id: str
    username: str
    email: str


class ConsoleObject(msgspec.Struct):
    """An administrator's session at the console. X-Form-Token carries `form_token` in every other request.

    `proven_until` is the time up to which what asks for a fresh proof is done without one. It is null if the request
    comes from another browser or another network than the last proof: until the next proof, nothing is done.
    """

    user: ConsoleUser
    form_token: str
    expires_at: str | None
    idle_at: str | None
    proven_until: str | None
    totp_enabled: bool
    now: str | None
    password_min_length: int  # characters of a new password of anybody


class ConsoleSession(msgspec.Struct):
    """A session of the caller at the console (`kind` is console), or a login for an ADMIN token (token).

    Of a login neither browser, address nor last use is stored. `is_current` marks that of this request.
    """

    id: str
    kind: str
    is_current: bool
    created_at: str | None
    last_seen_at: str | None
    expires_at: str | None
    ip_address: str
    user_agent: str


class AuthSession(msgspec.Struct):
    jti: str
    client_id: str
    redirect_uri: str
    totp_required: bool
    nonce: str
    scope: str
    state: str | None
    code_challenge: str
    code_challenge_method: str
    created_at_utc: str
    expires_at_utc: str
    login_state: str
    max_age: int | None


class Jwk(msgspec.Struct):
    """RFC 7517 §4, RFC 7518 §6: `n` and `e` of an RSA key, `crv`, `x` and `y` of an EC key."""

    kty: str
    kid: str
    use: str
    alg: str
    n: str | Maybe = UNSET
    e: str | Maybe = UNSET
    crv: str | Maybe = UNSET
    x: str | Maybe = UNSET
    y: str | Maybe = UNSET


class Jwks(msgspec.Struct):
    keys: list[Jwk]


class Introspection(msgspec.Struct):
    """RFC 7662 §2.2. For a token that is inactive or hidden from the caller, only `active` is present."""

    active: bool
    token_type: str | Maybe = UNSET
    iss: str | Maybe = UNSET
    sub: str | Maybe = UNSET
    aud: str | Maybe = UNSET
    client_id: str | Maybe = UNSET
    scope: str | Maybe = UNSET
    exp: int | Maybe = UNSET
    iat: int | Maybe = UNSET
    nbf: int | Maybe = UNSET
    jti: str | Maybe = UNSET
    mad: str | Maybe = UNSET
    token_use: str | Maybe = UNSET
    username: str | Maybe = UNSET
    preferred_username: str | Maybe = UNSET
    amr: list[str] | Maybe = UNSET
    auth_time: int | Maybe = UNSET
    sid: str | Maybe = UNSET
    role: list[str] | Maybe = UNSET
    roles: list[str] | Maybe = UNSET
    groups: list[str] | Maybe = UNSET
    roles_omitted: bool | Maybe = UNSET


class AccessClaims(msgspec.Struct):
    """The types of the claims of an access token, of which the program reads some without another check. RFC 9068."""

    iss: str
    sub: str
    aud: str
    iat: int
    exp: int
    jti: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    mad: Literal["auth", "admin"]
    token_use: Literal["access"]
    client_id: str = ""
    nbf: int = 0
    scope: str = ""
    sid: str = ""
    username: str = ""
    preferred_username: str = ""
    amr: list[str] = []
    auth_time: int = 0
    role: list[str] = []
    roles: list[str] = []
    groups: list[str] = []
    roles_omitted: bool = False

    def __post_init__(self):
        if self.mad == "auth" and not self.client_id:
            raise ValueError("a token of AUTH without client_id")
        if self.sub != self.client_id and not self.sid:
            raise ValueError("the token of a user without sid")


class IdTokenClaims(msgspec.Struct):
    """The types of the claims of an ID token that the program reads when it comes back as a hint."""

    iss: str
    sub: str
    aud: str
    iat: int
    exp: int
    sid: str = ""


class UserInfo(msgspec.Struct):
    """OpenID Connect Core §5.1: the claims that the token's scope covers."""

    sub: str
    name: str | Maybe = UNSET
    nickname: str | Maybe = UNSET
    preferred_username: str | Maybe = UNSET
    updated_at: int | Maybe = UNSET
    email: str | Maybe = UNSET
    email_verified: bool | Maybe = UNSET
    roles: list[str] | Maybe = UNSET
    groups: list[str] | Maybe = UNSET


class Me(msgspec.Struct):
    sub: str
    email: str | None
    roles: list[str]
    role_names: list[str]
    scopes: list[str]


@overload
def iso(at: int) -> str: ...


@overload
def iso(at: int | None) -> str | None: ...


def iso(at: int | None) -> str | None:
    """Return Unix seconds as ISO 8601 in UTC, or None for None and 0."""
    if not at:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def read_time(value: str | int) -> int | None:
    """Return the Unix seconds of an ISO 8601 date-time or of a number, or None.

    A date-time without an offset is in UTC.
    """
    if isinstance(value, int) or re.fullmatch(r"[0-9]{1,12}", value):
        return min(int(value), FOREVER) if int(value) >= 0 else None
    try:
        parsed = datetime.datetime.fromisoformat(re.sub(r"(\.[0-9]{6})[0-9]+", r"\1", value.strip()))
    except ValueError:
        return None
    if parsed.year == 9999:
        return FOREVER
    if parsed.year == 1:
        return 0
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp())
