"""Params, guards, answers; the two apps in process."""

import json
from urllib.parse import urlencode

import microauthd as m
import pytest
from conftest import PASSWORD, Caller
from hypothesis import given
from hypothesis import strategies as st


class TestForms:
    """application/x-www-form-urlencoded, read once and strictly."""

    clean = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)

    @given(st.dictionaries(clean, clean, max_size=10))
    def test_what_was_encoded_is_what_is_read(self, values):
        assert m.parse_form(urlencode(values).encode()) == values

    @given(st.binary(max_size=80))
    def test_any_octets_are_read_or_refused(self, octets):
        try:
            assert all(isinstance(word, str) and "\0" not in word for pair in m.parse_form(octets).items() for word in pair)
        except m.Problem as problem:
            assert problem.code == "invalid_request"

    @pytest.mark.parametrize("body", ["a=1&a=2", "a=%", "a=%4", "a=%zz", "a=%ff", "a=%00", "&".join(f"a{n}=1" for n in range(65))])
    def test_what_could_be_misread_is_refused(self, auth, service, body):
        answer = auth.post("/token", "grant_type=client_credentials&" + body, auth=service)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    def test_a_post_reads_its_body_never_its_query(self, auth, service):
        assert auth.post("/token?grant_type=client_credentials", "", auth=service).json["error"] == "invalid_request"

    def test_another_content_type_is_refused(self, auth, service):
        assert auth("POST", "/token", json_body={"grant_type": "client_credentials"}, auth=service).json["error"] == "invalid_request"


class TestBearer:
    """RFC 6750 §3"""

    def test_no_token_hears_how_and_no_error(self, auth):
        answer = auth.get("/me")
        assert answer.status == 401 and answer.headers["www-authenticate"] == 'Bearer realm="microauthd"'

    def test_a_bad_token_hears_invalid_token(self, auth):
        answer = auth.get("/me", bearer="a.b.c")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"] and answer.json["success"] is False

    def test_userinfo_needs_openid(self, auth, log_in, alice):
        answer = auth.get("/userinfo", bearer=log_in(alice)["access_token"])
        assert answer.status == 403 and 'error="insufficient_scope"' in answer.headers["www-authenticate"]

    def test_userinfo_by_get_and_post_and_by_scope(self, auth, log_in, alice):
        token = log_in(alice, scope="openid email")["access_token"]
        wanted = {"sub": alice.id, "email": "alice@example.org", "email_verified": False}
        assert auth.get("/userinfo", bearer=token).json == wanted
        assert auth.post("/userinfo", bearer=token).json == wanted
        assert auth.post("/userinfo", {"access_token": token}).json == wanted
        assert auth.post("/userinfo", {"access_token": token}, bearer=token).status == 400
        assert auth.get(f"/userinfo?access_token={token}").status == 401

    def test_a_machine_is_no_user(self, auth, machine):
        for path in ("/me/sessions", "/me/refresh-tokens"):
            assert auth.get(path, bearer=machine["access_token"]).status == 403
        assert auth.post("/logout", bearer=machine["access_token"]).status == 403
        assert auth.get("/me", bearer=machine["access_token"]).json["sub"] == "service"
        assert auth.get("/whoami", bearer=machine["access_token"]).json == {"message": "Hello, service"}


    def test_an_empty_client_id_is_no_client(self, auth, machine):
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=("", "x")).status == 401

    def test_a_tower_of_brackets_is_not_json(self, admin, admin_token):
        assert admin("POST", "/users", bearer=admin_token, json_body=b"[" * 60_000).status == 400


class TestSelf:
    def test_own_sessions_and_refresh_tokens(self, auth, log_in, alice):
        answer = log_in(alice)
        (session,) = auth.get("/me/sessions", bearer=answer["access_token"]).json
        assert session["id"] == answer["jti"] and session["username"] == "alice" and session["client_id"] == "service" and not session["is_revoked"]
        (refresh,) = auth.get("/me/refresh-tokens", bearer=answer["access_token"]).json
        assert refresh["session_id"] == answer["jti"] and answer["refresh_token"] not in json.dumps(refresh)

    def test_logout_ends_this_client_only(self, auth, log_in, new_client, alice):
        other = log_in(alice, client=new_client("other"))
        here = log_in(alice)
        assert auth.post("/logout", bearer=here["access_token"]).json["success"] is True
        assert auth.get("/me", bearer=here["access_token"]).status == 401
        assert auth.get("/me", bearer=other["access_token"]).status == 200

    def test_logout_all_ends_everything_on_both_ports(self, auth, admin, log_in, root, admin_token):
        user = log_in(root)
        assert auth.post("/logout-all", bearer=user["access_token"]).status == 200
        assert auth.get("/me", bearer=user["access_token"]).status == 401
        assert admin.get("/users", bearer=admin_token).status == 401


class TestDiscovery:
    """RFC 8414 §3"""

    def test_every_url_is_built_from_the_issuer(self, make_idp, tmp_path):
        from conftest import CHEAP

        auth = Caller(m.build_app(make_idp(m.Options(**CHEAP, oidc_issuer="https://box.example/auth")), m.AUTH), host="evil.example")
        metadata = auth.get("/.well-known/openid-configuration").json
        assert metadata["issuer"] == "https://box.example/auth"
        assert all(value.startswith("https://box.example/auth/") for name, value in metadata.items() if name.endswith(("_endpoint", "_uri")))

    def test_what_it_lists_is_there(self, idp, auth):
        metadata = auth.get("/.well-known/oauth-authorization-server").json
        for name, value in metadata.items():
            if name.endswith(("_endpoint", "_uri")):
                path = value.removeprefix(idp.options.auth_issuer)
                assert auth.get(path).status != 404 or auth.post(path).status != 404
        assert set(metadata["grant_types_supported"]) == set(m.GRANTS)
        assert "authorization_endpoint" not in metadata

    def test_it_is_cached_and_revalidated(self, auth):
        answer = auth.get("/jwks.json")
        assert answer.headers["cache-control"] == "public, max-age=300"
        again = auth.get("/jwks.json", headers=[("If-None-Match", answer.headers["etag"])])
        assert (again.status, again.body) == (304, b"")
        assert auth.get("/.well-known/jwks.json").body == answer.body


class TestAnswers:
    def test_unknown_paths_and_methods_speak_err(self, auth, admin):
        for app in (auth, admin):
            missing = app.get("/nowhere")
            assert (missing.status, missing.json) == (404, {"success": False, "message": m.ERRORS["not_found"][1], "error": "not_found"})
            wrong = app("PUT", "/ping")
            assert wrong.status == 405 and wrong.json["error"] == "method_not_allowed" and "GET" in wrong.headers["allow"]

    def test_security_headers_are_on_all(self, auth, service):
        for answer in (auth.get("/ping"), auth.get("/nowhere"), auth.get("/jwks.json"), auth.post("/token", {}, auth=service)):
            assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in answer.headers["content-security-policy"]

    def test_a_bug_is_a_bare_server_error(self, idp, auth, service, monkeypatch):
        monkeypatch.setattr(m, "issue", lambda *words: 1 / 0)
        answer = auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        assert (answer.status, answer.json["error"]) == (500, "server_error")
        assert b"Zero" not in answer.body and "ZeroDivisionError" in idp.stream.getvalue()
        idp.stream.truncate(0)

    def test_health(self, auth, idp, clock):
        assert auth.get("/health").json == {"status": "ok"}
        assert auth.get("/health/ready").status == 200
        clock.now = 1000.0
        idp.readiness = (0.0, {})
        answer = auth.get("/health/ready")
        assert answer.status == 503 and answer.json["checks"]["clock"] is False and answer.headers["retry-after"]


class TestPublicFiles:
    def test_they_are_off_unless_turned_on(self, auth, make_idp):
        from conftest import CHEAP

        assert auth.get("/login.html").status == 404
        served = Caller(m.build_app(make_idp(m.Options(**CHEAP, serve_public_auth_files=True)), m.AUTH))
        page = served.get("/login.html")
        assert page.status == 200 and b"Sign in" in page.body and "default-src 'self'" in page.headers["content-security-policy"]
        for path in ("/../microauthd.py", "/..%2fmicroauthd.py", "//etc/passwd", "/.ssh"):
            assert served.get(path).status == 404
        assert served.get("/jwks.json").json["keys"]


class TestAdmin:
    """contract/admin"""

    @pytest.mark.parametrize("route", [route for route in m.ADMIN.routes if route.guard is not m.anyone], ids=lambda route: f"{route.methods[0]} {route.paths[0]}")
    def test_every_route_refuses_strangers(self, admin, auth, log_in, root, alice, admin_token, idp, clock, route):
        path = route.paths[0].replace("<id>", "x").replace("<name>", "x")

        def status(token):
            return admin(route.methods[0], path, bearer=token, json_body={} if route.takes else None).status

        assert status(None) == 401 and status("x.y.z") == 401
        assert status(log_in(root)["access_token"]) == 401, "an AUTH token means nothing here"
        with idp.store.transaction():
            idp.store.run("DELETE FROM user_role WHERE user_id = :id", id=root.id)
        assert status(admin_token) == 401, "a demoted administrator"

    def test_an_admin_token_means_nothing_on_auth(self, auth, admin_token):
        assert auth.get("/me", bearer=admin_token).status == 401

    def test_only_administrators_log_in(self, admin, alice, root):
        refused = admin.post("/token", {"username": "alice", "password": PASSWORD})
        wrong = admin.post("/token", {"username": "root", "password": "wrong wrong"})
        assert (refused.status, refused.body) == (wrong.status, wrong.body) == (403, refused.body)

    @pytest.mark.parametrize("host, status", [("localhost:9041", 200), ("127.0.0.1", 200), ("[::1]:9041", 200), ("LOCALHOST", 200), ("evil.example", 421), ("", 421), ("localhost.evil.example:9041", 421)])
    def test_it_answers_only_to_its_own_names(self, idp, admin, host, status):
        assert Caller(admin.app, host).get("/ping").status == status

    def test_users(self, admin, admin_token):
        made = admin("POST", "/users", bearer=admin_token, json_body={"username": "Bob", "email": "Bob@Example.org", "password": PASSWORD, "is_active": False, "id": "mine"})
        assert made.status == 200 and made.json["username"] == "bob" and made.json["is_active"] is True and made.json["id"] != "mine"
        assert set(made.json) == {"id", "username", "email", "created_at", "lockout_until", "is_active", "email_verified", "totp_enabled"}
        assert admin.get("/users/id-by-name/BOB", bearer=admin_token).json == {"result": made.json["id"]}
        assert admin.get(f"/users/{made.json['id']}", bearer=admin_token).json == made.json
        listed = admin.get("/users?q=bo%25", bearer=admin_token)
        assert listed.json == [] and listed.headers["x-total-count"] == "0"
        again = admin("POST", "/users", bearer=admin_token, json_body={"user_email": "x@example.org", "USERNAME": "bob", "user_password": PASSWORD})
        assert again.status == 409

    @pytest.mark.parametrize("body, member", [
        ({"email": "a@b", "password": PASSWORD}, "username"), ({"username": 5}, "username"), ({"username": "x", "email": ["a"]}, "email"),
        (b"[]", None), (b"{", None), (b"", None), (b'"x"', None), ({"username": "new", "email": "a@b", "password": "short"}, "password"),
    ])
    def test_a_bad_body_names_its_member(self, admin, admin_token, body, member):
        answer = admin("POST", "/users", bearer=admin_token, json_body=body)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")
        assert list(answer.json.get("errors", {None: 0})) == [member]

    def test_a_body_of_another_type_is_415(self, admin, admin_token):
        assert admin.post("/users", {"username": "x"}, bearer=admin_token).status == 415

    def test_clients_and_scopes(self, admin, auth, admin_token):
        scope = admin("POST", "/scopes", bearer=admin_token, json_body={"name": "door:open", "desc": None}).json
        made = admin("POST", "/clients", bearer=admin_token, json_body={"client_id": "door", "audience": None}).json
        assert made["audience"] == "microauthd"
        assert admin("POST", "/clients/door/scopes", bearer=admin_token, json_body={"scope_ids": [scope["id"]]}).json["success"] is True
        assert admin("POST", "/clients/door/scopes", bearer=admin_token, json_body={"scope_ids": ["nonsense"]}).status == 400
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=("door", made["client_secret"]))
        assert token.json["scope"] == "door:open"
        secret = admin("POST", "/clients/secret", bearer=admin_token, json_body={"client_id": made["id"]}).json["message"]
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=("door", secret)).status == 200
        assert made["client_secret"] not in admin.get("/clients", bearer=admin_token).body.decode()

    def test_logout_ends_the_token(self, admin, admin_token):
        assert admin.post("/logout", bearer=admin_token).status == 200
        assert admin.get("/users", bearer=admin_token).status == 401
