"""ADMIN endpoints: who may, what is made of what, and what strangers hear."""

import re

import jwt
import microauthd as m
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.settings import Options
from appliance.base.store import MAD_ADMIN_ROLE_ID
from appliance.base.openapi import FORM

PROTECTED = [
    (method, path, route.takes)
    for route in m.ADMIN.routes
    if route.guard is not m.anyone
    for method in route.methods
    for path in route.paths
]
ONLY_JSON = [
    (method, path)
    for route in m.ADMIN.routes
    if route.takes and FORM not in route.media
    for method in route.methods
    for path in route.paths
]


def path_of(path):
    return re.sub("<[a-z_]+>", "x", path)


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
            assert (
                answer.status == 401
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
        # An empty list is a list of roles; an empty object may be one where nothing is required.
        for body in (b"", b"5", b"{", b"null", b"[5]", b"[" * 60_000, b'{"' + b"x" * 60_000):
            answer = call(method, path, body)
            assert answer.status == 400 and answer.json["error"] == "invalid_request" and b"xxx" not in answer.body


class TestToken:
    """contract/admin §3.1"""

    def test_its_claims(self, idp, admin, root):
        answer = admin.post("/token", {"username": "Root", "password": PASSWORD}).json
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        assert jwt.get_unverified_header(answer["access_token"])["kid"] == idp.admin_ring.access.kid
        assert (
            claims["sub"] == root.id
            and claims["iss"] == claims["aud"] == "https://localhost:9041"
            and claims["mad"] == "admin"
            and claims["jti"] == answer["jti"]
        )
        assert (
            "client_id" not in claims
            and claims["role"] == [MAD_ADMIN_ROLE_ID]
            and claims["exp"] - claims["iat"] == answer["expires_in"] == 3600
        )
        assert None not in answer.values() and "refresh_token" not in answer

    def test_it_means_nothing_on_auth(self, auth, service, admin_token):
        for path in ("/me", "/userinfo", "/me/sessions"):
            assert auth.get(path, bearer=admin_token).status == 401
        assert auth.post("/introspect", {"token": admin_token}, auth=service).body == b'{"active":false}'

    def test_a_token_of_auth_with_every_claim_of_admin_is_none(self, idp, admin, admin_token):
        claims = jwt.decode(admin_token, options={"verify_signature": False})
        assert admin.get("/users", bearer=idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims)).status == 401

    def test_a_token_of_admin_that_says_auth_is_none(self, idp, admin, admin_token):
        claims = jwt.decode(admin_token, options={"verify_signature": False})
        for other in ({"mad": "auth", "client_id": "x"}, {"iss": idp.options.auth_issuer}, {"sub": "nobody"}):
            assert (
                admin.get("/users", bearer=idp.admin_ring.mint(idp.admin_ring.access, m.AT_JWT, claims | other)).status
                == 401
            )

    @pytest.mark.parametrize("form", [{}, {"username": "root"}, {"password": "x"}, {"username": "", "password": ""}])
    def test_what_is_missing_is_invalid_request(self, admin, root, form):
        assert (admin.post("/token", form).status, admin.post("/token", form).json["error"]) == (400, "invalid_request")

    def test_a_client_id_of_any_length_is_for_the_record_only(self, idp, admin, root):
        assert admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "x" * 50_000}).status == 200
        row = idp.store.list_audit("admin_token_issued")[0]
        assert len(row.target) <= 255 and row.ip_address == "192.0.2.7"

    def test_who_was_ended_between_password_and_token_gets_none(self, idp, admin, root, clock, monkeypatch):
        authenticate = m.authenticate_user

        def slowly(*words, **more):
            found = authenticate(*words, **more)
            clock.pass_(1)
            m.end_user(idp, m.LOCAL, "test", root.id, "reset")
            clock.pass_(1)
            return found

        monkeypatch.setattr(m, "authenticate_user", slowly)
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403

    @pytest.mark.parametrize("revocation", [True, False])
    def test_logout_ends_this_login_and_no_other(self, make_idp, root, revocation):
        idp = make_idp(Options(**CHEAP, enable_token_revocation=revocation, admin_domain="localhost"))
        admin = Caller(m.admit_hosts(m.build_app(idp, m.ADMIN), idp))
        one, other = (
            admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"] for _ in range(2)
        )
        assert admin.post("/logout", bearer=one).json["success"] is True
        assert admin.get("/users", bearer=one).status == 401 and admin.get("/users", bearer=other).status == 200


class TestHost:
    """A page that rebinds its name to us gets nothing."""

    @pytest.mark.parametrize(
        "host, status",
        [
            ("localhost:9041", 200), ("127.0.0.1", 200), ("[::1]:9041", 200), ("LOCALHOST", 200), ("localhost.", 200),
            ("evil.example", 421), ("", 421), ("localhost.evil.example:9041", 421), ("evil.example:localhost", 421),
            ("localhost@evil.example", 421), ("[::1].evil.example", 421), ("127.0.0.1.nip.io", 421),
            ("2130706433", 421), ("0", 421),
        ],
    )
    def test_it_answers_only_to_its_own_names(self, admin, root, host, status):
        caller = Caller(admin.app, host)
        assert caller.get("/ping").status == status
        login = caller.post("/token", {"username": "root", "password": PASSWORD})
        assert login.status == status and (status == 200 or login.json["error"] == "misdirected_request")

    def test_its_own_name_is_an_option(self, make_idp):
        idp = make_idp(Options(**CHEAP, admin_domain="box.example:8443", admin_ip="192.0.2.1"))
        app = m.admit_hosts(m.build_app(idp, m.ADMIN), idp)
        assert [
            Caller(app, host).get("/ping").status
            for host in ("box.example", "box.example:8443", "192.0.2.1:9041", "other.example")
        ] == [200, 200, 200, 421]


class TestUsers:
    """contract/admin §3.2"""

    def test_one_is_made_as_asked_and_no_more(self, idp, call):
        """Members that are not for the caller to set do nothing."""
        body = {
            "username": "Bob", "email": "Bob@Example.org", "password": PASSWORD, "id": "mine", "is_active": False,
            "is_admin": True, "role": [MAD_ADMIN_ROLE_ID], "roles": ["MadAdmin"], "email_verified": True,
            "password_hash": "x", "lockout_until": 1, "created_at": 1, "totp_sealed": "x",
            "scopes": ["admin:provision_users"], "revoked_before": 1,
        }
        made = call("POST", "/users", body)
        assert made.status == 200 and made.json == call("GET", f"/users/{made.json['id']}").json
        assert set(made.json) == {
            "id", "username", "email", "created_at", "lockout_until", "is_active", "email_verified", "totp_enabled",
        }
        assert (
            made.json["username"], made.json["email"], made.json["is_active"], made.json["email_verified"],
            made.json["totp_enabled"], made.json["lockout_until"],
        ) == ("bob", "bob@example.org", True, False, False, None)
        account = idp.store.find_account(made.json["id"])
        assert (
            account.created_at == idp.now()
            and account.revoked_before == 0
            and account.password_hash.startswith("$argon2id$")
        )
        assert not m.is_admin(idp, account.id) and idp.store.list_scopes_of_user(account.id) == []

    def test_the_names_of_the_bindings_are_known(self, call):
        made = call("POST", "/users", {"USERNAME": "bob", "user_email": "bob@example.org", "User_Password": PASSWORD})
        assert made.status == 200

    @pytest.mark.parametrize(
        "body, members",
        [
            ({"email": "a@b", "password": PASSWORD}, ["username"]), ({"username": 5}, ["username"]),
            ({"username": "x", "email": ["a"]}, ["email"]),
            ({"username": "new", "email": "a@b", "password": "short"}, ["password"]),
            ({"username": "", "email": "", "password": ""}, ["username", "email", "password"]),
        ],
    )
    def test_what_is_refused_names_each_member(self, call, body, members):
        answer = call("POST", "/users", body)
        assert (answer.status, answer.json["error"], list(answer.json["errors"])) == (400, "invalid_request", members)

    def test_a_taken_name_is_a_conflict(self, call, root):
        answer = call("POST", "/users", {"username": "ROOT", "email": "x@example.org", "password": PASSWORD})
        assert (answer.status, answer.json["error"]) == (409, "conflict")

    def test_they_are_found_by_id_and_name(self, call, alice):
        for key in (alice.id, "alice", "ALICE"):
            assert call("GET", f"/users/{key}").json["id"] == alice.id
        assert call("GET", "/users/id-by-name/Alice").json == {"result": alice.id}

    def test_they_are_listed_by_name_in_pages(self, call, new_user, root, change):
        for name in ("carl", "bert", "idle"):
            new_user(name)
        change("UPDATE account SET is_active = 0 WHERE username = 'idle'")
        answer = call("GET", "/users")
        assert [user["username"] for user in answer.json] == ["bert", "carl", "root"] and answer.headers[
            "x-total-count"
        ] == "3"
        page = call("GET", "/users?limit=1&offset=1")
        assert [user["username"] for user in page.json] == ["carl"] and page.headers["x-total-count"] == "3"
        assert [user["username"] for user in call("GET", "/users?q=BER").json] == ["bert"]

    @pytest.mark.parametrize("q", ["%25", "_", "%5C", "'", "%22", "%27%20OR%201=1--", "ber%25"])
    def test_a_search_is_for_letters(self, call, new_user, q):
        new_user("bert")
        answer = call("GET", f"/users?q={q}")
        assert answer.status == 200 and answer.json == []


class TestClients:
    """contract/admin §3.9"""

    def test_one_is_made_as_asked_and_no_more(self, idp, call, scopes):
        made = call(
            "POST", "/clients",
            {
                "client_id": "door", "id": "mine", "is_active": False, "is_first_party": False, "revoked_before": 5,
                "secret_hash": "x", "audience": None, "scopes": None,
            },
        )
        SECRETS.add(made.json["client_secret"])
        assert (
            made.status == 200
            and made.json["id"] != "mine"
            and made.json["is_active"] is True
            and made.json["audience"] == "microauthd"
            and made.json["scopes"] == []
        )
        assert (
            idp.store.find_client("door").revoked_before == idp.now_ms()
            and idp.store.find_client("door").may_introspect == 0
        )
        assert (
            {name: value for name, value in made.json.items() if name != "client_secret"}
            == call("GET", "/clients/door").json
            == call("GET", f"/clients/{made.json['id']}").json
        )
        assert call("GET", "/clients/id-by-name/door").json == {"result": made.json["id"]}

    def test_a_secret_is_told_once(self, auth, call):
        made = call("POST", "/clients", {"client_id": "door"}).json
        given = call("POST", "/clients", {"client_id": "gate", "client_secret": "sixteen characters"}).json
        assert "client_secret" not in given
        for path in ("/clients", "/clients/door", "/clients/gate"):
            said = call("GET", path).body.decode()
            assert made["client_secret"] not in said and "sixteen" not in said and "argon2" not in said
        for client in (("door", made["client_secret"]), ("gate", "sixteen+characters")):
            assert auth.post("/token", {"grant_type": "client_credentials"}, auth=client).status == 200

    def test_a_secret_is_changed_by_id_or_name(self, auth, call, service, idp):
        for key in (idp.store.find_client("service").id, "service"):
            answer = call("POST", "/clients/secret", {"client_id": key})
            assert set(answer.json) == {"success", "message"}
            SECRETS.add(answer.json["message"])
            assert (
                auth.post(
                    "/token", {"grant_type": "client_credentials"}, auth=("service", answer.json["message"])
                ).status
                == 200
            )
        assert call("POST", "/clients/secret", {"client_id": "nobody"}).status == 404

    def test_scopes_and_rights_count_at_once(self, auth, call):
        scope = call("POST", "/scopes", {"name": "door:open", "desc": None}).json
        made = call("POST", "/clients", {"client_id": "door"}).json
        client = ("door", made["client_secret"])
        assert "scope" not in auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json
        for body in ({"scope_ids": [scope["id"]]}, {"scopeIds": ["door:open"]}, {"scope_id": "door:open"}):
            assert call("POST", "/clients/door/scopes", body).json["success"] is True
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["scope"] == "door:open"
        assert [scope["name"] for scope in call("GET", "/clients/door/scopes").json] == ["door:open"]
        assert call("POST", "/clients/door/scopes", {"scope_ids": ["nonsense"]}).status == 400

    def test_scopes_of_users(self, call, alice):
        assert call("POST", f"/users/{alice.id}/scopes", {"scope_ids": ["api:write"]}).json == {
            "success": True, "message": "1 scopes assigned.",
        }
        assert [scope["name"] for scope in call("GET", "/users/alice/scopes").json] == ["api:read", "api:write"]

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"name": "a b"}, "name"), ({}, "name"), ({"name": "x", "description": "a" * 5000}, "description"),
            ({"name": "x", "description": "\x1b[31m"}, "description"),
        ],
    )
    def test_what_is_refused_of_a_scope_names_the_member(self, call, body, member):
        answer = call("POST", "/scopes", body)
        assert (answer.status, list(answer.json["errors"])) == (400, [member])

    @pytest.mark.parametrize(
        "path",
        [
            "/users/x", "/users/id-by-name/x", "/clients/x", "/clients/id-by-name/x", "/scopes/x",
            "/scopes/id-by-name/x", "/clients/x/scopes", "/users/x/scopes",
        ],
    )
    def test_what_is_not_there_is_404(self, call, path):
        answer = call("GET", path)
        assert (answer.status, answer.json) == (
            404, {"success": False, "message": m.ERRORS["not_found"][1], "error": "not_found"},
        )

    def test_every_change_leaves_a_row_that_names_who_and_from_where(self, idp, call, root, service, alice):
        call("POST", "/users", {"username": "bob", "email": "bob@example.org", "password": PASSWORD})
        call("POST", "/clients", {"client_id": "door"})
        call("POST", "/clients/secret", {"client_id": "door"})
        call("POST", "/scopes", {"name": "door:open"})
        call("POST", "/clients/door/scopes", {"scope_ids": ["door:open"]})
        call("POST", "/users/bob/scopes", {"scope_ids": ["door:open"]})
        rows = idp.store.list_audit(limit=6)
        assert [row.action for row in rows] == [
            "assign_scope_to_user", "assign_scope_to_client", "create_scope", "client_secret_changed", "create_client",
            "user_created",
        ]
        assert {(row.actor_id, row.ip_address, row.request_id) for row in rows} == {(root.id, "192.0.2.7", "r1")}


class TestHealth:
    def test_plain_answers(self, admin):
        assert (
            admin.get("/ping").json == {"message": "pong from admin"}
            and admin.get("/version").json["version"] == m.VERSION
        )
        assert admin.get("/health").json == {"status": "ok"} and admin.get("/health/ready").status == 200
