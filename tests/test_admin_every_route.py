"""ADMIN, whatever the route: who may call it, what a change writes down, hostile names, races, big tables."""

import re
import threading
from urllib.parse import quote

import appliance.upkeep as upkeep_room
import microauthd as m
import msgspec
import pyotp
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.settings import Options
from appliance.base.database import Unavailable
from appliance.base.store import MAD_ADMIN_ROLE_ID, SCATTERED, SLICE
from appliance.base.wire import HttpRefusal, _path_info
from appliance.base.openapi import FORM, may_be_empty
from appliance.base.objects import ChangeSecret, CreateRole, CreateUser, PurgeTokens, UpdateUser

PROTECTED = [
    (method, path, route.takes)
    for route in m.ADMIN.routes
    if route.guard is m.by_admin
    for method in route.methods
    for path in route.paths
]

ONLY_JSON = [
    (method, path)
    for route in m.ADMIN.routes
    if route.takes and FORM not in route.media and route.guard is m.by_admin
    for method in route.methods
    for path in route.paths
]

WITHOUT_BODY = [
    (method, path)
    for route in m.ADMIN.routes
    if route.takes is None and route.form is None and route.guard is m.by_admin
    for method in route.methods
    for path in route.paths
    if path != "/sessions/revoke-all"  # it ends the token that asks
]

# (media type, octets): what a client may send along where nothing is taken
NEEDLESS = [
    ("application/json", b"{}"), ("application/json", b"null"), ("application/json", b"{not json"),
    (FORM, b"a=1&a=2"), (FORM, b"%zz"), ("text/plain", b"\xff"), ("", b"x"),
]

OTHER, CHOSEN = "another battery staple", "a secret somebody chose"

HOSTILE = [
    "x' OR '1'='1", '"; DROP TABLE account; --', "%", "_", "ünï-名前", "a b+c&d=e", "<script>", "{{7*7}}", "id-by-name",
    "user", "retrieve", "all", "..x", "-", "null", "0", "\u202ename"[1:] + "ß",
]


NAMED = [
    ("/users", {"username": "someone", "email": "someone@example.org", "password": OTHER}), ("/roles", {"name": "some"}),
    ("/permissions", {"name": "some"}), ("/scopes", {"name": "some"}), ("/clients", {"client_id": "some"}),
]


def member_of(body):
    """Return the member that names what the body makes."""
    return next(iter(body))


def path_of(path):
    return re.sub("<[a-z_]+>", "x", path)


@pytest.fixture
def options(tmp_path):
    return Options(
        **CHEAP, enable_token_refresh=True, oidc_issuer="https://idp.example", admin_domain="localhost",
        totp_qr_output_root=str(tmp_path), token_signing_key_file=str(tmp_path / "token.pem"),
        admin_token_signing_key_file=str(tmp_path / "admin_token.pem"),
    )


def wire(path):
    """Return a path as the connection hands it to the application."""
    return _path_info(quote(path, safe="/").encode())


def wire_segments(*segments):
    """Return a path of these segments, each encoded as a whole, as a connection of ADMIN hands it to the application."""
    return _path_info("".join("/" + quote(segment, safe="") for segment in segments).encode(), m.SLASH.encode())


def forget_the_bug(idp):
    """The traceback in the log is the one this test made."""
    idp.stream.seek(0)
    idp.stream.truncate()


class TestEveryProtectedRoute:
    @pytest.mark.parametrize("method, path, takes", PROTECTED)
    def test_refuses_strangers_and_tells_them_nothing(
        self, admin, auth, log_in, root, admin_token, change, clock, method, path, takes
    ):
        def ask(token):
            return admin(method, path_of(path), bearer=token, json_body=b"{not json" if takes else None)

        user = log_in(root, scope="openid")
        for token in (None, "x.y.z", user["access_token"], user["id_token"], user["refresh_token"]):
            answer = ask(token)
            # A token of AUTH is one to the metrics alone, where it lacks the scope.
            assert (
                answer.status == (403 if path == "/metrics" and token == user["access_token"] else 401)
                and answer.headers["www-authenticate"].startswith("Bearer")
                and "errors" not in answer.json
            )
        change("UPDATE account SET is_active = 0 WHERE id = :id", id=root.id)
        assert ask(admin_token).status == 401, "a deactivated administrator"
        change("UPDATE account SET is_active = 1 WHERE id = :id", id=root.id)
        clock.pass_(3600)
        assert ask(admin_token).status == 401, "an expired token"

    @pytest.mark.parametrize("method, path, takes", PROTECTED)
    def test_refuses_a_demoted_administrator(self, admin, root, admin_token, change, method, path, takes):
        change("DELETE FROM user_role WHERE user_id = :id", id=root.id)
        assert admin(method, path_of(path), bearer=admin_token, json_body={} if takes else None).status == 401

    @pytest.mark.parametrize("method, path", ONLY_JSON)
    def test_that_takes_json_takes_nothing_else(self, admin, admin_token, method, path):
        for headers in (
            [("CONTENT_TYPE", "text/plain")], [("CONTENT_TYPE", "")],
            [("CONTENT_TYPE", "application/x-www-form-urlencoded")],
        ):
            answer = admin(method, path_of(path), bearer=admin_token, json_body={"name": "x"}, headers=headers)
            assert (answer.status, answer.json["error"]) == (415, "unsupported_media_type")

    @pytest.mark.parametrize("method, path, takes", [row for row in PROTECTED if row[2]])
    def test_refuses_a_bad_body_without_a_word_of_it(self, idp, call, service, root, method, path, takes):
        path = path_of(path.replace("/clients/<id>", "/clients/service").replace("/users/<id>", "/users/root"))
        # An empty list is a list of roles; no body and an empty object are one where nothing is required.
        empty = () if may_be_empty(takes) else (b"",)
        for body in (*empty, b"5", b"{", b"null", b"[5]", b"[" * 60_000, b'{"' + b"x" * 60_000):
            answer = call(method, path, body)
            assert answer.status == 400 and answer.json["error"] == "invalid_request" and b"xxx" not in answer.body


    @pytest.mark.parametrize("method, path", WITHOUT_BODY)
    def test_that_takes_no_body_ignores_one(self, admin, admin_token, method, path):
        without = admin(method, path_of(path), bearer=admin_token)
        assert without.status in (200, 400, 404, 503), "the keys of this server are in no file: 503"
        for media, body in NEEDLESS:
            answer = admin(method, path_of(path), body, bearer=admin_token, headers=[("CONTENT_TYPE", media)])
            assert answer.status == without.status, (media, body)
            assert admin(method, path_of(path), body, headers=[("CONTENT_TYPE", media)]).status == 401

    @pytest.mark.parametrize("media, body", NEEDLESS)
    def test_a_needless_body_changes_nothing_about_what_is_done(self, admin, admin_token, alice, media, body):
        more = {"bearer": admin_token, "headers": [("CONTENT_TYPE", media)]}
        assert admin.post("/users/alice/deactivate", body, **more).status == 200
        assert admin.get("/users/alice", bearer=admin_token).json["is_active"] is False
        if media != FORM:
            assert admin.post("/logout", body, **more).status == 200
            assert admin.get("/users", bearer=admin_token).status == 401

    def test_that_takes_no_body_takes_no_token_from_one(self, admin, admin_token, alice):
        assert admin.post("/users/alice/deactivate", {"access_token": admin_token}).status == 401

    @pytest.mark.parametrize("media", ["application/json", FORM, "text/plain", ""])
    @pytest.mark.parametrize(
        "method, path, status",
        [
            ("POST", "/sessions/purge", 200), ("POST", "/tokens/purge", 200), ("POST", "/refresh-tokens/purge", 200),
            ("POST", "/users/alice/totp/enroll", 200), ("POST", "/users/alice/totp/generate", 200),
            ("PUT", "/users/alice", 200), ("PUT", "/clients/service", 200), ("PUT", "/scopes/api:read", 200),
            ("POST", "/users/alice/reset", 400), ("POST", "/client/options/ENABLE_TOTP", 400),
        ],
    )
    def test_whose_members_are_all_optional_takes_an_empty_body(
        self, admin, admin_token, alice, service, method, path, status, media
    ):
        as_object = admin(method, path, bearer=admin_token, json_body={})
        answer = admin(method, path, b"", bearer=admin_token, headers=[("CONTENT_TYPE", media)])
        assert answer.status == as_object.status == status
        for one in (as_object, answer):
            SECRETS.update({one.json["secret"]} if "secret" in one.json else ())
        assert admin(method, path, b"", headers=[("CONTENT_TYPE", media)]).status == 401

    @pytest.mark.parametrize("method, path, takes", [row for row in PROTECTED if row[2] and not may_be_empty(row[2])])
    def test_that_needs_a_member_refuses_an_empty_body(self, admin, admin_token, method, path, takes):
        for media, status in (("application/json", 400), ("text/plain", 415), ("", 415)):
            answer = admin(method, path_of(path), b"", bearer=admin_token, headers=[("CONTENT_TYPE", media)])
            assert answer.status == status


class TestEveryChangeLeavesARow:
    """In the same transaction, with who did it, and never with a secret."""

    # path as declared: (path as called, body, what has to be there before)
    CHANGES = {
        "POST /logout": ("/logout", None),
        "POST /users": ("/users", {"username": "bob", "email": "bob@example.org", "password": OTHER}),
        "PUT /users/<id>": ("/users/alice", {"email": "new@example.org"}),
        "DELETE /users/<id>": ("/users/alice", None),
        "POST /users/<id>/invitations": ("/users/alice/invitations", {"purpose": "reset"}),
        "DELETE /invitations/<id>": ("/invitations/{invitation}", None),
        "POST /users/<id>/verify-email": ("/users/alice/verify-email", None),
        "POST /users/deactivate/<id>": ("/users/deactivate/alice", None),
        "POST /users/<id>/deactivate": ("/users/alice/deactivate", None),
        "POST /users/<id>/activate": ("/users/carol/activate", None),
        "POST /users/<id>/reset": ("/users/alice/reset", {"new_password": OTHER}),
        "POST /users/<id>/set-lockout": ("/users/alice/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"}),
        "POST /users/<id>/clear-lockout": ("/users/alice/clear-lockout", None),
        "POST /users/<id>/revoke": ("/users/alice/revoke", None),
        "POST /users/<id>/totp/enroll": ("/users/alice/totp/enroll", {}),
        "POST /users/<id>/totp/generate": ("/users/alice/totp/generate", {}),
        "POST /users/<id>/totp/verify": ("/users/carol/totp/verify", {"code": "code"}),
        "POST /users/totp/verify": ("/users/totp/verify", {"user_id": "carol", "code": "code"}),
        "POST /users/<id>/recovery-codes": ("/users/dora/recovery-codes", None),
        "POST /users/<id>/disable-totp": ("/users/carol/disable-totp", None),
        "POST /users/<id>/<client_id>/disable-totp": ("/users/carol/service/disable-totp", None),
        "POST /roles": ("/roles", {"name": "new"}), "PUT /roles/<id>": ("/roles/ops", {"name": "renamed"}),
        "DELETE /roles/<id>": ("/roles/ops", None),
        "PUT /brand": ("/brand", {"name": "North box"}), "DELETE /brand": ("/brand", None),
        "POST /roles/assign": ("/roles/assign", {"user_id": "carol", "role_id": "ops"}),
        "POST /roles/unassign": ("/roles/unassign", {"user_id": "alice", "role_id": "ops"}),
        "POST /roles/remove": ("/roles/remove", {"user_id": "alice", "role_id": "ops"}),
        "PUT /users/<id>/roles": ("/users/carol/roles", [{"id": "ops"}]),
        "POST /permissions": ("/permissions", {"name": "new"}),
        "PUT /permissions/<id>": ("/permissions/doc", {"name": "renamed"}),
        "DELETE /permissions/<id>": ("/permissions/doc", None),
        "POST /permissions/assign": ("/permissions/assign", {"role_id": "ops", "permission_id": "page"}),
        "POST /roles/<id>/permissions": ("/roles/ops/permissions", {"permission_id": "page"}),
        "POST /permissions/remove": ("/permissions/remove", {"role_id": "ops", "permission_id": "doc"}),
        "DELETE /roles/<id>/permissions/<permission_id>": ("/roles/ops/permissions/doc", None),
        "POST /scopes": ("/scopes", {"name": "new"}), "PUT /scopes/<id>": ("/scopes/api:read", {"desc": "d"}),
        "DELETE /scopes/<id>": ("/scopes/api:read", None),
        "PUT /users/<id>/scopes": ("/users/carol/scopes", {"scope_ids": ["api:read"]}),
        "PUT /clients/<id>/scopes": ("/clients/service/scopes", {"scope_ids": []}),
        "POST /users/<id>/scopes": ("/users/carol/scopes", {"scope_ids": ["api:read"]}),
        "DELETE /users/<id>/scopes/<scope_id>": ("/users/alice/scopes/api:read", None),
        "DELETE /users/<id>/consents/<client_id>": ("/users/alice/consents/spa", None),
        "DELETE /clients/<id>/consents": ("/clients/spa/consents", None), "DELETE /consents": ("/consents", None),
        "POST /clients/<id>/scopes": ("/clients/service/scopes", {"scope_ids": ["api:secret"]}),
        "DELETE /clients/<id>/scopes/<scope_id>": ("/clients/service/scopes/api:read", None),
        "POST /scopes/assign-to-user": ("/scopes/assign-to-user", {"user_id": "carol", "scope_id": "api:read"}),
        "POST /scopes/assign-to-client": (
            "/scopes/assign-to-client", {"client_id": "service", "scope_id": "api:secret"},
        ),
        "POST /scopes/remove-from-user": ("/scopes/remove-from-user", {"user_id": "alice", "scope_id": "api:read"}),
        "POST /scopes/remove-from-client": (
            "/scopes/remove-from-client", {"client_id": "service", "scope_id": "api:read"},
        ),
        "POST /clients": ("/clients", {"client_id": "new", "client_secret": CHOSEN}),
        "PUT /clients/<id>": ("/clients/service", {"display_name": "S"}),
        "POST /clients/<id>/preview": ("/clients/service/preview", {"user_id": "alice"}),
        "DELETE /clients/<id>": ("/clients/service", None),
        "POST /clients/<id>/revoke": ("/clients/service/revoke", None),
        "POST /clients/secret": ("/clients/secret", {"client_id": "service", "new_secret": CHOSEN}),
        "DELETE /clients/<id>/secrets/<secret_id>": ("/clients/service/secrets/{secret}", None),
        "DELETE /clients/redirect-uris": ("/clients/redirect-uris", "{redirect}"),
        "DELETE /clients/redirect-uris/<record_id>": ("/clients/redirect-uris/{redirect}", None),
        "POST /clients/<id>/redirect-uris": ("/clients/spa/redirect-uris", "https://app.example/other"),
        "DELETE /clients/<id>/redirect-uris/<record_id>": ("/clients/spa/redirect-uris/{redirect}", None),
        "POST /clients/<id>/post-logout-redirect-uris": (
            "/clients/spa/post-logout-redirect-uris", "https://app.example/other",
        ),
        "DELETE /clients/<id>/post-logout-redirect-uris/<record_id>": (
            "/clients/spa/post-logout-redirect-uris/{post_logout}", None,
        ),
        "POST /clients/<id>/cors-origins": ("/clients/spa/cors-origins", "https://other.example"),
        "DELETE /clients/<id>/cors-origins/<record_id>": ("/clients/spa/cors-origins/{cors_origin}", None),
        "POST /client/options/<flag>": ("/client/options/ENABLE_TOTP?client_id=spa", {"enabled": True}),
        "POST /client/options/<flag>/ext": ("/client/options/TOTP_ISSUER/ext?client_id=spa", {"options": "x"}),
        "POST /clients/<id>/idp": ("/clients/service/idp", {"provider_key": "new"}),
        "POST /admin/clients/<id>/idp": ("/admin/clients/service/idp", {"provider_key": "new"}),
        "PUT /clients/<id>/idp/<idp_id>": ("/clients/service/idp/{idp}", {"provider_key": "x"}),
        "PUT /admin/clients/<id>/idp/<idp_id>": ("/admin/clients/service/idp/{idp}", {"provider_key": "x"}),
        "DELETE /clients/<id>/idp/<idp_id>": ("/clients/service/idp/{idp}", None),
        "DELETE /admin/clients/<id>/idp/<idp_id>": ("/admin/clients/service/idp/{idp}", None),
        "DELETE /browser-sessions/<id>": ("/browser-sessions/{browser}", None),
        "POST /sessions/revoke-all": ("/sessions/revoke-all", None),
        "DELETE /sessions/<jti>": ("/sessions/{jti}", None), "POST /revoke": ("/revoke", {"token": "{token}"}),
        "POST /introspect": ("/introspect", {"token": "{token}"}),
        "DELETE /refresh-tokens/<id>": ("/refresh-tokens/{refresh}", None),
        "POST /sessions/purge": ("/sessions/purge", {}), "POST /tokens/purge": ("/tokens/purge", {}),
        "POST /refresh-tokens/purge": ("/refresh-tokens/purge", {}),
        "POST /audit-logs/purge": ("/audit-logs/purge", {"older_than_days": 1}),
    }
    # test_backup and test_rings hold them to the same
    WITH_FILES = {"POST /backup", "DELETE /backup/<name>", "POST /keys/rotate", "POST /keys/<kid>/revoke"}
    READ_ONLY = {
        "POST /users/verify-password", "POST /check-access", "POST /clients/<id>/uris/check", "POST /token",
    }  # the first and the last write down what fails, the last what succeeds

    def test_the_table_has_every_route_that_changes_something(self):
        declared = {
            f"{method} {path}"
            for route in m.ADMIN.routes
            for method in route.methods
            for path in route.paths
            if method != "GET" and not path.startswith("/dashboard/session")  # test_console.py has their rows
        }
        assert declared == set(self.CHANGES) | self.READ_ONLY | self.WITH_FILES

    @pytest.fixture
    def furnished(self, idp, call, auth, service, public, alice, new_user, log_in):
        """Things of every kind, and the ids of those that have no name."""
        new_user("carol")
        seed = call("POST", "/users/carol/totp/enroll", {}).json["secret"]
        SECRETS.add(seed)
        call("POST", "/users/deactivate/carol")
        call("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": True})
        for path, body in (
            ("/roles", {"name": "ops"}), ("/permissions", {"name": "doc"}), ("/permissions", {"name": "page"}),
            ("/roles/ops/permissions", {"permission_id": "doc"}),
            ("/roles/assign", {"user_id": "alice", "role_id": "ops"}),
        ):
            assert call("POST", path, body).status == 200
        made = {
            kind: call("POST", f"/clients/spa/{path}", uri).json["id"]
            for kind, path, uri in (
                ("redirect", "redirect-uris", "https://app.example/cb"),
                ("post_logout", "post-logout-redirect-uris", "https://app.example/"),
                ("cors_origin", "cors-origins", "https://app.example"),
            )
        }
        made["idp"] = call("POST", "/clients/service/idp", {"provider_key": "x"}).json["id"]
        made["invitation"] = call("POST", "/users/alice/invitations", {}).json["id"]
        new_user("dora")
        idp.store.set_totp(idp.store.find_account_by_name("dora").id, "sealed", idp.now())
        made["secret"] = call("GET", "/clients/service/secrets").json[0]["id"]
        m.give_consent(idp, m.LOCAL, idp.store.find_account(alice.id), m.get_client(idp, "spa"), ["openid"])
        m.begin_browser_session(idp, m.LOCAL, idp.store.find_account(alice.id), ["pwd"], idp.now(), None)
        made["browser"] = call("GET", "/browser-sessions").json[0]["id"]
        token = log_in(alice, public)
        made |= {
            "token": token["access_token"], "jti": token["jti"],
            "refresh": call("GET", "/refresh-tokens/user/alice").json[0]["id"], "code": pyotp.TOTP(seed).at(idp.now()),
        }
        return made, seed

    @pytest.mark.parametrize("route", CHANGES)
    def test_with_who_did_it_and_no_secret(self, idp, call, admin, admin_token, root, furnished, change, route):
        made, seed = furnished
        path, body = self.CHANGES[route]
        if route == "POST /audit-logs/purge":
            change("UPDATE audit SET at = at - 1000000 WHERE seq < 5")
        if route == "DELETE /brand":
            call("PUT", "/brand", {"name": "North box"})
        fill = lambda word: re.sub(r"\{(\w+)\}", lambda found: made[found[1]], word)  # noqa: E731
        body = (
            {
                name: made["code"]
                if (name, value) == ("code", "code")
                else fill(value)
                if isinstance(value, str)
                else value
                for name, value in body.items()
            }
            if isinstance(body, dict)
            else fill(body)
            if isinstance(body, str)
            else body
        )
        before = idp.store.list_audit(limit=1)[0].seq
        answer = call(route.split()[0], fill(path), body)
        is_part = route.startswith("POST ") and path.endswith(("-uris", "-origins", "/idp"))
        assert answer.status == (201 if is_part else 200), answer
        rows = idp.store.list_audit(limit=100, after=before)
        assert (
            rows and {row.actor_id for row in rows} == {root.id} and {row.ip_address for row in rows} == {"192.0.2.7"}
        )
        written = " ".join(str(value) for row in rows for value in (row.target, row.secondary))
        shown = answer.json
        for secret in (
            PASSWORD, OTHER, CHOSEN, seed, made["token"], made["code"],
            *(shown.get(name, "") for name in ("secret", "client_secret", "otpauth_uri") if isinstance(shown, dict)),
        ):
            assert not secret or secret not in written, route

    def test_reading_leaves_none(self, idp, call, furnished):
        before = idp.store.list_audit(limit=1)[0].seq
        for path in (
            "/users", "/users/alice", "/clients/service/secrets", "/sessions", "/refresh-tokens", "/audit-logs",
            "/audit-logs/verify", "/audit-logs/export",
        ):
            assert call("GET", path).status == 200
        assert idp.store.list_audit(limit=1)[0].seq == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda *who: m.create_role(*who, CreateRole("x")),
            lambda *who: m.update_user(*who, "alice", UpdateUser(email="new@example.org")),
            lambda *who: m.delete_user(*who, "alice"), lambda *who: m.reset_password(*who, "alice", OTHER),
            lambda *who: m.begin_totp(*who, m.get_user(who[0], "alice")),
            lambda *who: m.change_secret(*who, ChangeSecret("service")),
            lambda *who: m.delete_client(*who, "service"),
            lambda *who: m.purge_tokens(*who, PurgeTokens(0), ("session",)), lambda *who: m.purge_audit_log(*who, 1),
        ],
    )
    def test_where_the_row_cannot_be_written_nothing_is_changed(
        self, idp, alice, service, machine, clock, monkeypatch, change
    ):
        """The row and the change are one transaction."""
        idp.store.flush()
        clock.pass_(5 * 86400)

        def gone(*row):
            raise Unavailable("the disk is gone", 5)

        tables = ("account", "role", "client", "client_secret", "session", "audit")
        shown = lambda: [
            idp.store.connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables
        ]  # noqa: E731
        before = shown()
        monkeypatch.setattr(idp.store, "append_audit", gone)
        with pytest.raises(Unavailable, match="the disk is gone"):
            change(idp, m.LOCAL.acting_as("test"))
        assert shown() == before


class TestWhoAsksIsWrittenDown:
    def test_an_introspection_names_the_administrator_not_the_token(self, idp, call, root, machine):
        call("POST", "/introspect", {"token": machine["access_token"]})
        row = idp.store.list_audit("admin.auth.token.introspect")[0]
        assert (row.actor_id, row.target) == (root.id, "service")

    def test_a_purge_that_dies_on_the_way_has_said_who_began_it(self, idp, root, change, monkeypatch):
        now = idp.now()
        change(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200) INSERT INTO session SELECT printf('%032x', i), NULL, 'app', NULL, '', 'access', 'auth', 'client_credentials', 1, 2, NULL FROM n"
        )
        idp.store.append_audit([(now - 10 * 86400, "app", "old", "", "", "", "", "", "success")] * 1200)

        def die(seconds):
            raise RuntimeError("power")

        for purge in (
            lambda: m.purge_tokens(idp, m.LOCAL.acting_as(root.id), PurgeTokens(0), ("session",), die),
            lambda: m.purge_audit_log(idp, m.LOCAL.acting_as(root.id), 3, die),
        ):
            with pytest.raises(RuntimeError):
                purge()
        assert [(row.action, row.actor_id) for row in idp.store.list_audit(limit=2)] == [
            ("audit_purge_begun", root.id), ("purge_begun", root.id),
        ]


class TestHostileNames:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_name_is_only_a_name(self, idp, call, name):
        """Whatever it says, it is stored, found by path, query and body, and deleted; its neighbours stay."""
        for kind, member in (("roles", "name"), ("permissions", "name"), ("users", "username")):
            neighbour = call(
                "POST", f"/{kind}", {member: "neighbour", "email": "n@example.org", "password": OTHER}
            ).json["id"]
            made = call("POST", f"/{kind}", {member: name, "email": "x@example.org", "password": OTHER})
            assert made.status == 200, made
            id, stored = made.json["id"], made.json[member]
            assert call("GET", wire(f"/{kind}/id-by-name/{name}")).json == {"result": id}
            if not (kind, name) in (("permissions", "retrieve"), ("roles", "user")):
                assert call("GET", wire(f"/{kind}/{name}")).json["id"] == id
            assert [
                row[member] for row in call("GET", f"/{kind}?q={quote(stored, safe='')}").json if row["id"] == id
            ] == [stored]
            assert call("DELETE", f"/{kind}/{id}").status == 200 and call("GET", f"/{kind}/{id}").status == 404
            assert call("DELETE", f"/{kind}/{neighbour}").status == 200

    @pytest.mark.parametrize("name", ["a\r\nSet-Cookie: x=1", "a\0b", "\u202eevil", "a\nb", "\x7f", "\u2028"])
    def test_what_could_end_a_line_or_turn_it_round_is_no_name(self, call, alice, service, name):
        for method, path, body in (
            ("POST", "/users", {"username": name, "email": "x@example.org", "password": OTHER}),
            ("POST", "/roles", {"name": "a" + name + "b"}),
            ("POST", "/roles", {"name": "ok", "description": "a" + name + "b"}),
            ("POST", "/permissions", {"name": "a" + name + "b"}), ("POST", "/scopes", {"name": "a" + name + "b"}),
            ("POST", "/scopes", {"name": "ok", "desc": "a" + name + "b"}),
            ("POST", "/clients", {"client_id": "a" + name + "b"}),
            ("POST", "/clients", {"client_id": "ok", "display_name": "a" + name + "b"}),
            ("PUT", "/clients/service", {"audience": "a" + name + "b"}),
            ("POST", "/clients/service/redirect-uris", "https://a.example/" + name + "b"),
            ("POST", "/clients/service/idp", {"provider_key": "k", "display_name": "a" + name + "b"}),
        ):
            answer = call(method, path, body)
            assert answer.status == 400 and answer.json["errors"], (path, body)

    def test_no_header_is_made_by_a_query(self, call, new_user):
        for name in ("a1", "a2", "a3"):
            new_user(name)
        answer = call("GET", "/users?q=a%0d%0aX-Evil:%201&limit=1&is_active=all%0d%0a")
        assert answer.status == 400
        answer = call("GET", "/users?q=a&limit=1&%0d%0aX-Evil=%3E%3B%20rel%3D%22prev%22")
        assert (
            "\r" not in answer.headers["link"]
            and "\n" not in answer.headers["link"]
            and answer.headers["link"].count(">") == 1
            and "x-evil" not in answer.headers
        )

    @pytest.mark.parametrize(
        "name", [MAD_ADMIN_ROLE_ID, MAD_ADMIN_ROLE_ID.upper(), "\uff13" + MAD_ADMIN_ROLE_ID[1:]]
    )
    def test_no_name_is_the_identifier_of_another(self, call, name):
        """Fullwidth digits become digits; what they spell then counts."""
        for path, body in (
            ("/users", {"username": name, "email": "x@example.org", "password": OTHER}), ("/roles", {"name": name}),
            ("/permissions", {"name": name}), ("/scopes", {"name": name}), ("/clients", {"client_id": name}),
        ):
            assert call("POST", path, body).status == 400, path

    def test_two_spellings_of_a_name_are_one(self, call):
        made = call("POST", "/users", {"username": " \uff21nn ", "email": "Ann@Example.org", "password": OTHER}).json
        assert made["username"] == "ann" and call("GET", wire("/users/\uff21NN")).json["id"] == made["id"]
        assert (
            call("POST", "/users", {"username": "ANN", "email": "other@example.org", "password": OTHER}).status == 409
        )

    @pytest.mark.parametrize(
        "name", ["a/b", "/", "//a//", "a/../b", "../a", "a/.", "a%2fb", "https://api.example/read", "a\\b", "\\", "..\\a"]
    )
    def test_a_name_with_a_slash_is_one_segment_of_a_path(self, call, name):
        """RFC 3986 §2.2: an encoded slash is data, and parts no segments."""
        for path, body in NAMED:
            kind, member = path[1:], member_of(body)
            if (kind == "scopes" and "\\" in name) or (kind == "clients" and ":" in name):
                assert call("POST", path, body | {member: name}).status == 400  # RFC 6749 §3.3, RFC 7617 §2
                continue
            made = call("POST", path, body | {member: name})
            assert made.status in (200, 201), made
            id, itself = made.json["id"], wire_segments(kind, name)
            assert call("GET", wire_segments(kind, "id-by-name", name)).json == {"result": id}
            assert call("GET", itself).json[member] == name
            assert call("PUT", itself, {member: "x/" + name}).status == 200 and call("GET", itself).status == 404
            assert call("PUT", f"/{kind}/{id}", {member: name}).status == 200
            assert [row["id"] for row in call("GET", f"{path}?q={quote(name, safe='')}").json if row[member] == name]
            assert call("DELETE", itself).status == 200 and call("GET", f"/{kind}/{id}").status == 404

    def test_a_slash_within_a_name_parts_nothing(self, call, alice):
        """What names alice's roles, or her, when its slash is decoded too early."""
        role = call("POST", "/roles", {"name": "a/b"}).json["id"]
        user = call("POST", "/users", {"username": "alice/roles", "email": "x@example.org", "password": OTHER}).json
        assert call("GET", wire_segments("users", "alice/roles")).json["id"] == user["id"]
        assert call("PUT", wire_segments("users", "alice/roles", "roles"), [{"id": role}]).status == 200
        assert [row["name"] for row in call("GET", wire_segments("users", "alice/roles", "roles")).json] == ["a/b"]
        assert call("GET", "/users/alice/roles").json == []
        assert call("GET", wire_segments("users/alice")).status == 404
        assert call("DELETE", wire_segments("users", "alice/roles", "roles", "a/b")).status in (200, 404, 405)
        assert call("GET", wire_segments("users", "../users/alice")).status == 404

    def test_the_log_shows_an_encoded_slash_as_it_came(self, call, idp):
        assert call("GET", wire_segments("users", "no/body")).status == 404
        assert "/users/no%2Fbody" in idp.stream.getvalue()

    @pytest.mark.parametrize(
        "name", [".", "..", "\uff0e\uff0e", "\u2025"]
    )
    def test_a_name_that_no_path_carries_is_not_taken(self, call, name):
        """Clients remove dot segments before they send a path. RFC 3986 §5.2.4"""
        for path, body in NAMED:
            assert call("POST", path, body | {member_of(body): name}).status == 400, path
            made = call("POST", path, body)
            assert made.status in (200, 201), (path, made.json)
            assert call("PUT", f"{path}/{made.json['id']}", {member_of(body): name}).status == 400, path

    @pytest.mark.parametrize("name", ["...", ".a", "a.b", "a..", "a:b", "ann@example.org"])
    def test_dots_and_marks_within_a_name_are_taken(self, call, name):
        for path, body in NAMED:
            if path == "/clients" and ":" in name:
                continue  # RFC 7617 §2
            made = call("POST", path, body | {member_of(body): name})
            assert made.status in (200, 201), (path, made.json)
            assert call("GET", f"{path}/{name}").json["id"] == made.json["id"]

    @pytest.mark.parametrize("name", [".", ".."])
    def test_a_name_of_an_older_release_stays_and_is_reached_by_its_id_and_a_query(self, call, change, name):
        for path, body in NAMED:
            id = call("POST", path, body).json["id"]
            table = {"/users": "account"}.get(path, path[1:-1])
            column = "username" if table == "account" else member_of(body)
            change(f"UPDATE {table} SET {column} = :name WHERE id = :id", name=name, id=id)
            assert [row["id"] for row in call("GET", f"{path}?q={quote(name, safe='')}").json if row[column] == name]
            assert call("GET", f"{path}/{id}").json[column] == name
            assert call("PUT", f"{path}/{id}", {member_of(body): name}).status == 200, path
            assert call("DELETE", f"{path}/{id}").status == 200

    @pytest.mark.parametrize("path", [b"/users/%ffalice", b"/users/al%c0%afice", b"/users/%ed%a0%80alice"])
    def test_octets_that_are_no_text_name_nobody(self, path):
        """The router would leave them out, and alice would be deleted."""
        with pytest.raises(HttpRefusal):
            _path_info(path)


class TestHugeInputs:
    @pytest.mark.parametrize(
        "method, path, body",
        [
            ("POST", "/users", {"username": "x" * 101, "email": "x@example.org", "password": OTHER}),
            ("POST", "/users", {"username": "x", "email": "x" * 250 + "@example.org", "password": OTHER}),
            ("POST", "/users", {"username": "x", "email": "x@example.org", "password": "x" * 60_000}),
            ("POST", "/roles", {"name": "x" * 256}), ("POST", "/roles", {"name": "x", "description": "x" * 60_000}),
            ("POST", "/clients", {"client_id": "x" * 256}),
            ("POST", "/clients", {"client_id": "x", "client_secret": "x" * 256}),
            ("POST", "/clients", {"client_id": "x", "scopes": ["nonsense"] * 5000}),
            ("POST", "/clients", {"client_id": "x", "grant_types": ["x"] * 5000}),
            ("POST", "/clients/service/redirect-uris", "https://a.example/" + "x" * 2000),
            ("POST", "/users/alice/scopes", {"scope_ids": ["nonsense"] * 5000}),
            ("POST", "/sessions/purge", {"older_than_seconds": 10**30}),
            ("POST", "/audit-logs/purge", {"older_than_days": 10**30}),
            ("POST", "/clients/secret", {"client_id": "service", "overlap_seconds": 10**30}),
            ("PUT", "/users/alice", {"lockout_until": -(10**30)}), ("GET", "/users?limit=99999999999999999999", None),
            ("GET", "/users?offset=99999999999999999999", None),
            ("GET", "/audit-logs?after=99999999999999999999", None), ("GET", "/users?q=" + "x" * 300, None),
        ],
    )
    def test_are_refused_by_name_and_nothing_breaks(self, call, alice, service, method, path, body):
        answer = call(method, path, body)
        assert answer.status == 400 and answer.json["errors"] and len(answer.body) < 1000

    @pytest.mark.parametrize(
        "path",
        [
            "/users/" + "x" * 5000, "/clients/" + "x" * 5000, "/sessions/" + "f" * 5000, "/audit-logs/" + "9" * 5000,
            "/refresh-tokens/" + "x" * 5000, "/roles/" + "\xe2\x80\xae" * 100,
        ],
    )
    def test_a_huge_path_is_nothing(self, call, path):
        assert call("GET", path).status == 404


class TestRightsTakenAway:
    """What is taken counts at once, whatever a token says."""

    @pytest.mark.parametrize(
        "take",
        [
            lambda call: call("DELETE", "/clients/provisioner/scopes/admin:list_users"),
            lambda call: call(
                "POST", "/scopes/remove-from-client", {"client_id": "provisioner", "scope_id": "admin:list_users"}
            ),
        ],
    )
    def test_a_machine_that_lost_a_scope_over_users_uses_it_no_more(self, call, auth, new_client, take):
        client = new_client("provisioner", scopes=["admin:list_users", "api:read"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        assert take(call).status == 200
        answer = auth.get("/users", bearer=token)
        assert (answer.status, answer.json["error"]) == (403, "insufficient_scope")

    @pytest.mark.parametrize("path", ["/users/helper/scopes/admin:list_users", "/clients/desk/scopes/admin:list_users"])
    def test_nor_does_a_user_who_or_whose_client_lost_it(self, call, auth, new_client, new_user, log_in, path):
        client, helper = (
            new_client("desk", scopes=["admin:list_users", "api:read"]),
            new_user("helper", ["admin:list_users", "api:read"]),
        )
        token = log_in(helper, client)["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        assert call("DELETE", path).status == 200 and auth.get("/users", bearer=token).status == 403

    def test_a_name_that_comes_back_brings_nothing_back(self, call, auth, new_client, new_user, log_in):
        """Neither a client nor a user made anew under an old name has what the old one had."""
        client, helper = new_client("desk"), new_user("helper", ["api:read"])
        token = log_in(helper, client)
        call("DELETE", "/users/helper")
        new_user("helper", ["api:read"])
        assert auth.get("/me", bearer=token["access_token"]).status == 401
        again = log_in(new_user("other"), client)
        call("DELETE", "/clients/desk")
        new_client("desk", client_secret=client[1])
        assert auth.get("/me", bearer=again["access_token"]).status == 401
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": again["refresh_token"]}, auth=client
            ).status
            == 400
        )


class TestBetweenReadAndWrite:
    """Who comes between must be seen: a service decides inside its transaction."""

    @pytest.fixture
    def during_hash(self, idp, monkeypatch):
        """Do something while a password or secret is hashed, which takes long."""

        def arrange(deed):
            honest = idp.hasher.hash

            def hash(word, *beside):
                monkeypatch.setattr(idp.hasher, "hash", honest)
                deed()
                return honest(word, *beside)

            monkeypatch.setattr(idp.hasher, "hash", hash)

        return arrange

    @pytest.mark.parametrize(
        "deed", [("DELETE", "/clients/service", None), ("PUT", "/clients/service", {"is_active": False})]
    )
    def test_a_client_that_went_gets_no_new_secret(self, idp, call, service, during_hash, deed):
        during_hash(lambda: call(*deed))
        assert call("POST", "/clients/secret", {"client_id": "service"}).status == 404
        assert not idp.store.list_audit("client_secret_changed")

    @pytest.mark.parametrize("deed", ["/users/alice"])
    def test_a_user_who_went_gets_no_new_password(self, idp, call, alice, during_hash, deed):
        during_hash(lambda: call("DELETE", deed))
        assert call("POST", "/users/alice/reset", {"new_password": OTHER}).status == 404 and not idp.store.list_audit(
            "user_password_reset"
        )

    def test_a_user_who_went_gets_no_second_factor(self, idp, alice):
        m.delete_user(idp, m.LOCAL.acting_as("test"), alice.id)
        with pytest.raises(m.Problem, match="not_found"):
            m.begin_totp(idp, m.LOCAL.acting_as("test"), alice.account)
        assert not idp.store.list_audit("totp_generated")

    def test_two_who_write_the_same_version_do_not_both(self, idp, admin_token, alice, admin):
        """RFC 9110 §13.1.1"""
        apps = [Caller(m.App(idp, m.ADMIN)) for _ in range(4)]
        for _ in range(5):
            tag = apps[0].get("/users/alice", bearer=admin_token).headers["etag"]
            go, found = threading.Barrier(4), []

            def write(number, app):
                go.wait()
                found.append(
                    app(
                        "PUT", "/users/alice", bearer=admin_token,
                        json_body={"email": f"{tag[1:9]}{number}@example.org"}, headers=[("If-Match", tag)],
                    ).status
                )

            threads = [threading.Thread(target=write, args=pair) for pair in enumerate(apps)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert sorted(found) == [200, 412, 412, 412]

    @pytest.mark.parametrize(
        "tag, status",
        [('"other"', 412), ("W/{tag}", 412), ("{bare}", 412), ('"other", {tag}', 200), ("*", 200), ("", 412)],
    )
    def test_only_the_whole_tag_matches(self, call, alice, tag, status):
        shown = call("GET", "/users/alice").headers["etag"]
        assert (
            call(
                "PUT", "/users/alice", {"email": "new@example.org"},
                headers=[("If-Match", tag.format(tag=shown, bare=shown.strip('"')))],
            ).status
            == status
        )


class TestBigTables:
    """Work over many rows is cut so that nobody waits for it. What is counted is work, not time."""

    MANY = 3 * SLICE

    @pytest.fixture
    def crowded(self, idp, change, alice):
        """Refresh tokens that live, and among them some that are over."""
        change(
            "INSERT INTO family (sid, user_id, client_id, scope, amr, auth_time, nonce, created_ms, expires_at) VALUES ('f', :id, 'app', '', 'pwd', 1, '', 1, 99999999999)",
            id=alice.id,
        )
        change(
            f"WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {self.MANY}) INSERT INTO refresh_token SELECT printf('%032x', i), printf('%064x', i), 'f', :id, 'app', 'x', 1, CASE WHEN i % 10 = 0 THEN 2 ELSE 99999999999 END, NULL, NULL FROM n",
            id=alice.id,
        )

    def count(self, idp):
        return idp.store.connection.execute(
            "SELECT count(*), count(*) FILTER (WHERE expires_at = 2) FROM refresh_token"
        ).fetchone()

    def test_a_purge_takes_all_that_is_over_and_nothing_else(self, idp, crowded):
        assert self.count(idp) == (self.MANY, self.MANY // 10)
        assert m.purge_tokens(idp, m.LOCAL.acting_as("test"), PurgeTokens(0), ("refresh_token",)) == self.MANY // 10
        assert self.count(idp) == (self.MANY - self.MANY // 10, 0)

    def test_it_holds_the_turn_to_write_only_for_a_few_rows_that_are_over(self, idp, crowded, monkeypatch):
        """A million that live must not be looked at while others wait."""
        turns, honest = [], idp.store.taking_turns

        def taking_turns():
            turns.append(idp.store.connection.total_changes)
            return honest()

        monkeypatch.setattr(idp.store, "taking_turns", taking_turns)
        m.purge_tokens(idp, m.LOCAL.acting_as("test"), PurgeTokens(0), ("refresh_token",))
        changed = [after - before for before, after in zip(turns, turns[1:])]
        assert len(changed) >= self.MANY // 10 // SCATTERED and max(changed) <= SCATTERED + 5
        del turns[:]
        m.purge_tokens(idp, m.LOCAL.acting_as("test"), PurgeTokens(0), ("refresh_token",))
        assert len(turns) == 2, "two rows of the log, and no turn for those that live"

    def test_a_row_that_came_to_life_meanwhile_stays(self, idp, crowded, change, monkeypatch):
        honest = idp.store.transaction
        seen = []

        def transaction(identity=False):
            if not seen:
                seen.append(1)
                with honest():
                    idp.store.connection.execute(
                        "UPDATE refresh_token SET expires_at = 99999999999 WHERE expires_at = 2"
                    )
            return honest(identity)

        monkeypatch.setattr(idp.store, "transaction", transaction)
        assert idp.store.purge_refresh_tokens(10, "", 100) == (f"{100:032x}", 0) and self.count(idp) == (self.MANY, 0)

    def test_upkeep_walks_every_table_to_its_end(self, idp, change, crowded, clock):
        change(
            f"WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {self.MANY}) INSERT INTO revoked_token SELECT printf('%032x', i), CASE WHEN i > {self.MANY} - 60 THEN 2 ELSE 99999999999 END, 1 FROM n"
        )
        upkeep_room.purge(idp, lambda seconds: None)
        assert idp.store.connection.execute("SELECT count(*) FROM revoked_token").fetchone() == (self.MANY - 60,)

    def test_a_search_through_many_users_finds_the_same_as_through_few(self, idp, call, change):
        change(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) INSERT INTO account (id, username, email, password_hash, created_at, modified_at) SELECT printf('%08x-0000-4000-8000-000000000000', i), printf('u%05d', (i * 7919) % 2500), printf('e%05d@example.org', i), 'x', i, i FROM n"
        )
        found, offset = [], 0
        while offset is not None:
            page = call("GET", f"/users?q=u0&limit=700&offset={offset}&sort=-username")
            found += [user["username"] for user in page.json]
            link = re.search(r'offset=(\d+)>; rel="next"', page.headers.get("link", ""))
            offset = int(link[1]) if link else None
        assert found == sorted(found, reverse=True) and len(found) == len(set(found)) == 2500 == int(
            page.headers["x-total-count"]
        )
        assert call("GET", "/users?limit=1&offset=2000").json[0]["username"] == "u01999"  # root stands before, with r


class TestAudit:
    def test_an_introspection_names_the_administrator_who_asked(self, idp, call, root, machine):
        assert call("POST", "/introspect", {"token": machine["access_token"]}).status == 200
        row = idp.store.list_audit("admin.auth.token.introspect")[0]
        assert (row.actor_id, row.target) == (root.id, "service")

    def test_a_purge_is_written_down_before_its_first_row_goes(self, idp, call, root, monkeypatch):
        monkeypatch.setattr(idp.store, "purge_sessions", lambda *words, **more: 1 / 0)
        assert call("POST", "/sessions/purge", {"older_than_seconds": 0}).status == 500
        assert idp.store.list_audit(limit=1)[0].action == "purge_begun"
        forget_the_bug(idp)

    @pytest.mark.parametrize(
        "method, path, body",
        [
            ("POST", "/users", {"username": "new", "email": "new@example.org", "password": PASSWORD}),
            ("PUT", "/users/alice", {"email": "x@example.org"}), ("POST", "/users/alice/verify-email", None),
            ("POST", "/users/alice/deactivate", None),
            ("POST", "/users/alice/reset", {"new_password": "another battery staple"}),
            ("POST", "/users/alice/set-lockout", {"lockout_until": None}), ("POST", "/users/alice/revoke", None),
            ("POST", "/users/alice/totp/enroll", {}), ("DELETE", "/users/alice", None),
            ("POST", "/roles", {"name": "x"}), ("POST", "/permissions", {"name": "x"}),
            ("POST", "/scopes", {"name": "x"}), ("PUT", "/scopes/api:read", {"desc": "x"}),
            ("DELETE", "/scopes/api:read", None),
            ("POST", "/clients", {"client_id": "x", "client_secret": "sixteen characters"}),
            ("PUT", "/clients/service", {"display_name": "x"}),
            ("POST", "/clients/secret", {"client_id": "service", "new_secret": "sixteen characters"}),
            ("POST", "/clients/service/revoke", None), ("POST", "/clients/service/redirect-uris", "https://a.example/"),
            ("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": True}),
            ("POST", "/client/options/TOTP_ISSUER/ext", {"client_id": "service", "options": "x"}),
            ("POST", "/clients/service/idp", {"provider_key": "x"}), ("DELETE", "/clients/service", None),
            ("POST", "/clients/service/scopes", {"scope_ids": ["api:read"]}),
            ("DELETE", "/clients/service/scopes/api:read", None),
            ("POST", "/users/alice/scopes", {"scope_ids": ["api:write"]}), ("POST", "/logout", None),
        ],
    )
    def test_every_change_leaves_a_row_in_its_own_transaction(
        self, idp, call, root, alice, service, monkeypatch, method, path, body
    ):
        before = idp.store.list_audit(limit=1)[0].seq
        table = idp.store.connection.execute("SELECT count(*), max(modified_at) FROM account").fetchone()
        append = idp.store.append_audit
        monkeypatch.setattr(idp.store, "append_audit", lambda *words: 1 / 0)
        assert call(method, path, body).status == 500, "a change that cannot be written down is none"
        assert idp.store.connection.execute("SELECT count(*), max(modified_at) FROM account").fetchone() == table
        forget_the_bug(idp)
        monkeypatch.setattr(idp.store, "append_audit", append)
        made = method == "POST" and path.endswith(("/redirect-uris", "/idp"))
        assert call(method, path, body).status == (201 if made else 200)
        rows = [row for row in idp.store.list_audit(limit=10) if row.seq > before]
        assert (
            rows
            and {row.actor_id for row in rows} == {root.id}
            and not any("another battery" in str(row) or "sixteen" in str(row) for row in rows)
        )


class TestLostUpdates:
    """RFC 9110 §13.1.1"""

    @pytest.mark.parametrize(
        "path, body",
        [
            ("/users/alice", {"email": "x@example.org"}), ("/roles/ops", {"description": "x"}),
            ("/permissions/open", {"name": "close"}), ("/scopes/api:read", {"desc": "x"}),
            ("/clients/service", {"display_name": "x"}),
        ],
    )
    def test_a_change_that_was_not_seen_is_not_overwritten(self, call, alice, service, path, body):
        call("POST", "/roles", {"name": "ops"})
        call("POST", "/permissions", {"name": "open"})
        seen = call("GET", path).headers["etag"]
        assert call("PUT", path, body, headers=[("If-Match", '"other"')]).json["error"] == "precondition_failed"
        changed = call("PUT", path, body, headers=[("If-Match", f'"x", {seen}')])
        assert changed.status == 200 and changed.headers["etag"] != seen
        path = path.replace("open", "close")
        assert (
            call("PUT", path, body, headers=[("If-Match", seen)]).status == 412
            and call("DELETE", path, headers=[("If-Match", seen)]).status == 412
        )
        assert (
            call("PUT", path, body, headers=[("If-Match", "*")]).status == 200 and call("PUT", path, body).status == 200
        )
        assert (
            call("DELETE", path, headers=[("If-Match", call("GET", path).headers["etag"])]).status == 200
            and call("GET", path).status == 404
        )

    @pytest.mark.parametrize(
        "path, body",
        [
            ("/users", {"username": "new", "email": "new@example.org", "password": PASSWORD}),
            ("/roles", {"name": "new"}), ("/permissions", {"name": "new"}), ("/scopes", {"name": "new"}),
            ("/clients", {"client_id": "new", "client_secret": "sixteen characters"}),
        ],
    )
    def test_of_two_who_create_the_same_at_once_one_does(self, call, path, body):
        barrier, answers = threading.Barrier(2), []

        def create():
            barrier.wait()
            answers.append(call("POST", path, body))

        threads = [threading.Thread(target=create) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200, 409]


class TestMassAssignment:
    """Members that are not for the caller to set do nothing, on every route that takes an object."""

    @pytest.mark.parametrize(
        "body, named",
        [
            (b'{"username": "ann", "username": "bob"}', "username"), (b'{"username": "ann", "username": "ann"}', "username"),
            (b'{"username": "ann", "x": 1, "x": 2}', "body"), (b'{"username": "ann", "x": [{"y": 1, "y": 2}]}', "body"),
        ],
    )
    def test_a_member_that_stands_twice_is_refused(self, call, body, named):
        """RFC 8259 §4: which of the two counts is not defined, and another program may take the other."""
        answer = call("POST", "/users", body)
        assert (answer.status, answer.json["errors"]) == (400, {named: "is there twice"})

    def test_the_same_name_in_two_objects_is_no_repetition(self):
        assert m.decode_body(b'{"username": "ann", "x": {"username": 1}, "y": {"x": 1}}', CreateUser).username == "ann"

    def test_a_member_that_stands_twice_in_another_case_is_refused(self, call):
        body = b'{"username": "bob", "Username": "eve", "email": "b@example.org", "password": "%s"}' % PASSWORD.encode()
        answer = call("POST", "/users", body)
        assert (answer.status, answer.json["errors"]) == (400, {"username": "is there twice"})

    def test_no_object_has_a_member_of_the_store_it_should_not(self):
        hidden = {
            "password_hash", "secret_hash", "revoked_before", "is_protected", "failed_logins", "lockouts",
            "totp_sealed", "totp_pending_sealed", "created_at", "row_sha256", "seq", "modified_at",
        }
        for routes in (m.AUTH, m.ADMIN):
            for route in routes.routes:
                assert not hidden & set(m.members_of(route.takes) if route.takes else ()), route.paths

    def test_no_answer_has_a_hash_or_a_seed(self):
        for struct in vars(m).values():
            if (
                isinstance(struct, type)
                and issubclass(struct, msgspec.Struct)
                and any(
                    route.gives in (struct, list[struct]) for routes in (m.AUTH, m.ADMIN) for route in routes.routes
                )
            ):
                assert not {"password_hash", "secret_hash", "totp_sealed", "token_sha256"} & set(
                    struct.__struct_fields__
                ), struct


class TestLastAdministrator:
    """Nobody who administers can be taken away when nobody else could log in."""

    AWAY = [
        ("DELETE", "/users/root", None), ("POST", "/users/deactivate/root", None),
        ("PUT", "/users/root", {"is_active": False}),
        ("POST", "/users/root/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"}),
        ("PUT", "/users/root", {"lockout_until": "9999-12-31T23:59:59Z"}),
        ("POST", "/roles/unassign", {"user_id": "root", "role_id": "MadAdmin"}),
        ("POST", "/roles/remove", {"user_id": "root", "role_id": MAD_ADMIN_ROLE_ID}),
        ("PUT", "/users/root/roles", []),
    ]

    @pytest.mark.parametrize("method, path, body", AWAY)
    def test_the_last_one_stays(self, call, new_user, method, path, body):
        new_user("locked", admin=True)
        assert call("POST", "/users/locked/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"}).status == 200
        answer = call(method, path, body)
        assert (answer.status, answer.json["error"]) == (409, "last_administrator") and call(
            "GET", "/users"
        ).status == 200

    @pytest.mark.parametrize("method, path, body", AWAY)
    def test_one_of_two_goes_and_its_token_at_once(self, call, admin, new_user, method, path, body):
        new_user("other", admin=True)
        other = admin.post("/token", {"username": "other", "password": PASSWORD}).json["access_token"]
        assert call(method, path, body).status == 200 and call("GET", "/users").status == 401
        assert admin.get("/users", bearer=other).status == 200

    def test_two_who_take_the_right_from_each_other_leave_one(self, idp, admin, new_user):
        tokens = {}
        for name in ("ann", "ben"):
            new_user(name, admin=True)
            tokens[name] = admin.post("/token", {"username": name, "password": PASSWORD}).json["access_token"]
        for _ in range(5):
            barrier, statuses = threading.Barrier(2), []

            def demote(actor, victim):
                barrier.wait()
                statuses.append(
                    admin(
                        "POST", "/roles/unassign", bearer=tokens[actor],
                        json_body={"user_id": victim, "role_id": "MadAdmin"},
                    ).status
                )

            threads = [threading.Thread(target=demote, args=pair) for pair in (("ann", "ben"), ("ben", "ann"))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(m.is_admin(idp, m.get_user(idp, name).id) for name in tokens) == 1, statuses
            for name in tokens:
                idp.store.assign_role(m.get_user(idp, name).id, MAD_ADMIN_ROLE_ID, idp.now())
                tokens[name] = admin.post("/token", {"username": name, "password": PASSWORD}).json["access_token"]
