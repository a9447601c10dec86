"""AUTH endpoints: what each tells, to whom."""

import json
import os
import re

import jwt
import microauthd as m
import pytest
from conftest import CHEAP, PASSWORD, Caller
from appliance.base.clock import RELEASED_AT
from appliance.base.settings import Options
from appliance.base.database import PROBE_SECONDS
from appliance.base.openapi import guard_name
from appliance.base.store import MAD_ADMIN_ROLE_ID, SEEDED_SCOPES
from appliance.base.keys import make_key
from appliance.base.objects import CreateRole, UpdateClient, UpdateRole

PROTECTED = [
    (method, route.paths[0])
    for route in m.AUTH.routes
    if guard_name(route) not in ("anyone", "by_client_or_token", "by_confidential_client")
    for method in route.methods
]
SCOPED = {path for route in m.AUTH.routes if getattr(route.guard, "scope", "") for path in route.paths}


def metadata_of(auth):
    return auth.get("/.well-known/openid-configuration").json


class TestEveryBearerRoute:
    @pytest.mark.parametrize("method, path", PROTECTED)
    def test_refuses_whatever_is_not_a_living_token_of_this_port(
        self, auth, log_in, alice, admin_token, change, method, path
    ):
        answer = log_in(alice, scope="openid")

        def status(token):
            return auth(method, path, bearer=token).status

        for token in (None, "x.y.z", answer["id_token"], answer["refresh_token"], admin_token):
            assert status(token) == 401
        change("UPDATE account SET is_active = 0 WHERE id = :id", id=alice.id)
        assert status(answer["access_token"]) == 401
        change("UPDATE account SET is_active = 1 WHERE id = :id", id=alice.id)
        change("UPDATE client SET is_active = 0")
        assert status(answer["access_token"]) == 401
        change("UPDATE client SET is_active = 1")
        assert status(answer["access_token"]) == (200 if path not in SCOPED else 403)

    @pytest.mark.parametrize("method, path", [row for row in PROTECTED if row[1] not in SCOPED])
    def test_a_machine_is_no_user(self, auth, machine, method, path):
        assert auth(method, path, bearer=machine["access_token"]).status == (200 if path in ("/me", "/whoami") else 403)


class TestClaimsThatAreMissing:
    """RFC 6750 §3.1: a token of our own key without a claim that it needs is no token, and never a fault."""

    @pytest.mark.parametrize("missing", [["client_id"], ["sid"], ["client_id", "sid"], ["scope"], ["iss"]])
    @pytest.mark.parametrize("other", [{}, {"mad": "admin"}])
    def test_is_answered_in_the_documented_form(self, idp, auth, log_in, alice, service, missing, other):
        token = log_in(alice, scope="openid")["access_token"]
        claims = {name: value for name, value in idp.auth_ring.verify(token, m.AT_JWT).items() if name not in missing}
        forged = idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims | other)
        answers = [
            auth.get("/userinfo", bearer=forged), auth.get("/me", bearer=forged),
            auth.post("/introspect", {"token": forged}, auth=service), auth.post("/revoke", {"token": forged}),
            auth.post("/token", {"grant_type": "refresh_token", "refresh_token": forged}),
        ]
        assert all(answer.status < 500 for answer in answers)
        if other or "client_id" in missing or "iss" in missing:
            assert [answer.status for answer in answers] == [401, 401, 200, 401, 401]
            assert answers[2].json == {"active": False}


class TestDiscovery:
    """RFC 8414 §2 and §3, OpenID Connect Discovery §3"""

    def test_both_addresses_say_the_same(self, auth):
        assert (
            auth.get("/.well-known/openid-configuration").body
            == auth.get("/.well-known/oauth-authorization-server").body
        )

    def test_what_must_be_there_is_there(self, auth):
        metadata = metadata_of(auth)
        assert (
            metadata["issuer"] == "https://idp.example"
            and metadata["subject_types_supported"] == ["public"]
            and isinstance(metadata["response_types_supported"], list)
        )
        assert "RS256" in metadata["id_token_signing_alg_values_supported"] and None not in metadata.values()

    @pytest.mark.parametrize("host", ["evil.example", "localhost", ""])
    def test_every_url_is_built_from_the_issuer_and_never_from_the_request(self, make_idp, host):
        auth = Caller(
            m.App(make_idp(Options(**CHEAP, oidc_issuer="https://box.example/auth")), m.AUTH), host=host
        )
        answer = auth.get(
            "/.well-known/openid-configuration",
            headers=[("X-Forwarded-Host", "evil.example"), ("X-Forwarded-Proto", "http")],
        )
        assert "evil" not in answer.body.decode() and answer.json["issuer"] == "https://box.example/auth"
        assert all(
            value.startswith("https://box.example/auth/")
            for name, value in answer.json.items()
            if name.endswith(("_endpoint", "_uri"))
        )

    def test_an_issuer_with_a_path_is_found_where_its_standard_says(self, make_idp):
        """RFC 8414 §3.1: the well-known part stands before the path."""
        auth = Caller(m.App(make_idp(Options(**CHEAP, oidc_issuer="https://box.example/auth")), m.AUTH))
        found = auth.get("/.well-known/oauth-authorization-server/auth")
        assert found.status == 200 and found.json["issuer"] == "https://box.example/auth"

    @pytest.mark.parametrize("issuer", ["https://box.example/auth", "http://localhost:9040"])
    def test_the_issuer_of_a_token_is_the_issuer_of_the_metadata(self, make_idp, service, alice, issuer):
        auth = Caller(m.App(make_idp(Options(**CHEAP, oidc_issuer=issuer)), m.AUTH))
        answer = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": "openid"},
            auth=service,
        ).json
        assert (
            {
                jwt.decode(answer[name], options={"verify_signature": False})["iss"]
                for name in ("access_token", "id_token")
            }
            == {metadata_of(auth)["issuer"]}
            == {issuer}
        )

    def test_every_endpoint_it_lists_answers(self, idp, auth):
        for name, value in metadata_of(auth).items():
            if name.endswith(("_endpoint", "_uri")):
                path = value.removeprefix(idp.options.auth_issuer)
                assert {auth.get(path).status, auth.post(path).status} & {200, 400, 401}, name

    @pytest.mark.parametrize("refresh", [True, False])
    def test_every_grant_it_lists_works_and_no_other(self, make_idp, service, alice, refresh):
        auth = Caller(m.App(make_idp(Options(**CHEAP, enable_token_refresh=refresh)), m.AUTH))
        listed = set(metadata_of(auth)["grant_types_supported"])
        for grant in (
            "authorization_code", "client_credentials", "password", "refresh_token", "implicit",
            "urn:ietf:params:oauth:grant-type:device_code",
        ):
            answer = auth.post(
                "/token", {"grant_type": grant, "username": "alice", "password": PASSWORD, "refresh_token": "x"},
                auth=service,
            )
            assert (answer.json.get("error") == "unsupported_grant_type") == (grant not in listed)

    @pytest.mark.parametrize(
        "endpoint, path", [("token", "/token"), ("introspection", "/introspect"), ("revocation", "/revoke")]
    )
    def test_every_way_to_authenticate_it_lists_works_and_no_other(self, auth, service, public, alice, endpoint, path):
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD, "token": "x"}
        ways = {
            "client_secret_basic": auth.post(path, form, auth=service),
            "client_secret_post": auth.post(path, form | {"client_id": "service", "client_secret": service[1]}),
            "none": auth.post(path, form | {"client_id": "spa"}),
        }
        assert {way for way, answer in ways.items() if answer.status == 200} == set(
            metadata_of(auth)[f"{endpoint}_endpoint_auth_methods_supported"]
        )

    def test_scopes_and_claims_it_lists_are_given(self, auth, log_in, alice):
        metadata = metadata_of(auth)
        answer = log_in(alice, scope=" ".join(metadata["scopes_supported"]))
        assert set(metadata["claims_supported"]) == set(
            jwt.decode(answer["id_token"], options={"verify_signature": False})
        ) - {"token_use"} | {"nonce"}, "a nonce needs the code flow"
        assert jwt.get_unverified_header(answer["id_token"])["alg"] in metadata["id_token_signing_alg_values_supported"]

    def test_its_keys_verify_every_kind_of_token(self, auth, machine, log_in, alice):
        keys = jwt.PyJWKSet.from_dict(auth.get("/jwks.json").json)
        answer = log_in(alice, scope="openid")
        for token, audience in (
            (machine["access_token"], "microauthd"), (answer["access_token"], "microauthd"),
            (answer["id_token"], "service"),
        ):
            header = jwt.get_unverified_header(token)
            assert jwt.decode(
                token, keys[header["kid"]].key, algorithms=[header["alg"]], audience=audience,
                issuer="https://idp.example", options={"verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )

    def test_the_keys_stand_at_both_addresses_and_hold_none_of_admin(self, auth, idp):
        answer = auth.get("/jwks.json")
        assert answer.body == auth.get("/.well-known/jwks.json").body
        kids = {key["kid"] for key in answer.json["keys"]}
        assert kids == {key.kid for key in idp.auth_ring.keys} and not {key.kid for key in idp.admin_ring.keys} & kids


class TestUserinfo:
    """OpenID Connect Core §5.3"""

    @pytest.mark.parametrize(
        "scope, more",
        [
            ("openid", {}), ("openid email", {"email": "alice@example.org", "email_verified": False}),
            ("openid roles", {"roles": []}), ("openid groups", {"groups": []}),
            ("openid profile", {
                "name": "alice", "nickname": "alice", "preferred_username": "alice", "updated_at": RELEASED_AT + 1000,
            }),
            ("openid api:read", {}),
        ],
    )
    def test_by_get_and_post_and_by_scope(self, auth, log_in, alice, scope, more):
        token = log_in(alice, scope=scope)["access_token"]
        for answer in (
            auth.get("/userinfo", bearer=token), auth.post("/userinfo", bearer=token),
            auth.post("/userinfo", {"access_token": token}),
        ):
            assert (answer.status, answer.json) == (200, {"sub": alice.id} | more)

    def test_groups_are_the_names_of_the_roles(self, auth, log_in, root):
        answer = log_in(root, scope="openid groups")
        told = [jwt.decode(answer[name], options={"verify_signature": False}) for name in ("id_token", "access_token")]
        told.append(auth.get("/userinfo", bearer=answer["access_token"]).json)
        assert [claims["groups"] for claims in told] == [["MadAdmin"]] * 3
        assert "roles" not in told[0] and "roles" not in told[2]
        for scope in ("openid roles", "openid", "openid profile email"):
            answer = log_in(root, scope=scope)
            assert "groups" not in auth.get("/userinfo", bearer=answer["access_token"]).json and not any(
                "groups" in jwt.decode(answer[name], options={"verify_signature": False})
                for name in ("id_token", "access_token")
            )

    def test_it_tells_what_is_true_now(self, auth, log_in, alice, change):
        token = log_in(alice, scope="openid email")["access_token"]
        change("UPDATE account SET email = 'new@example.org', email_verified = 1 WHERE id = :id", id=alice.id)
        assert auth.get("/userinfo", bearer=token).json == {
            "sub": alice.id, "email": "new@example.org", "email_verified": True,
        }


class TestSelf:
    def test_me(self, auth, log_in, alice, root, machine):
        assert auth.get("/me", bearer=log_in(root)["access_token"]).json == {
            "sub": root.id, "email": "root@example.org", "roles": [MAD_ADMIN_ROLE_ID], "role_names": ["MadAdmin"],
            "scopes": [],
        }
        assert auth.get("/me", bearer=log_in(alice)["access_token"]).json["scopes"] == ["api:read"]
        assert auth.get("/me", bearer=machine["access_token"]).json == {
            "sub": "service", "email": None, "roles": [], "role_names": [], "scopes": ["api:read", "api:write"],
        }

    def test_whoami(self, auth, machine):
        assert auth.get("/whoami", bearer=machine["access_token"]).json == {"message": "Hello, service"}

    def test_own_sessions_and_refresh_tokens_and_nobody_elses(self, auth, log_in, alice, new_user):
        log_in(new_user("bob"))
        answer = log_in(alice)
        (session,) = auth.get("/me/sessions", bearer=answer["access_token"]).json
        assert (
            session["id"], session["username"], session["client_id"], session["user_id"], session["is_revoked"],
        ) == (answer["jti"], "alice", "service", alice.id, False)
        (refresh,) = auth.get("/me/refresh-tokens", bearer=answer["access_token"]).json
        assert (
            refresh["session_id"] == answer["jti"]
            and refresh["username"] == "alice"
            and answer["refresh_token"] not in json.dumps(refresh)
        )
        assert all(
            re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", word[name])
            for word in (session, refresh)
            for name in ("issued_at", "expires_at")
        )

    def test_what_is_spent_or_ended_is_shown_as_such(self, auth, service, log_in, alice):
        answer = log_in(alice)
        auth.post("/token", {"grant_type": "refresh_token", "refresh_token": answer["refresh_token"]}, auth=service)
        other = log_in(alice)
        auth.post("/revoke", {"token": other["access_token"]}, auth=service)
        bearer = log_in(alice)["access_token"]
        assert {row["id"] for row in auth.get("/me/sessions", bearer=bearer).json if row["is_revoked"]} == {
            other["jti"]
        }
        assert {
            row["session_id"] for row in auth.get("/me/refresh-tokens", bearer=bearer).json if row["is_revoked"]
        } == {answer["jti"]}

    def test_refresh_tokens_are_not_listed_where_there_are_none(self, make_idp, alice, service):
        auth = Caller(m.App(make_idp(Options(**CHEAP)), m.AUTH))
        token = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service
        ).json["access_token"]
        assert (
            auth.get("/me/refresh-tokens", bearer=token).status == 404
            and auth.get("/me/sessions", bearer=token).status == 200
        )


class TestLogout:
    def test_it_ends_every_login_at_this_client_and_no_other(self, auth, log_in, new_client, service, alice):
        other, first, here = log_in(alice, client=new_client("other")), log_in(alice), log_in(alice)
        done = auth.post("/logout", bearer=here["access_token"])
        assert (done.status, set(done.json)) == (200, {"success", "message"})
        for dead in (first, here):
            assert auth.get("/me", bearer=dead["access_token"]).status == 401
            assert (
                auth.post(
                    "/token", {"grant_type": "refresh_token", "refresh_token": dead["refresh_token"]}, auth=service
                ).json["error"]
                == "invalid_grant"
            )
        assert auth.get("/me", bearer=other["access_token"]).status == 200

    def test_it_ends_nobody_elses(self, auth, log_in, alice, new_user):
        bob = log_in(new_user("bob"))
        auth.post("/logout", bearer=log_in(alice)["access_token"])
        assert auth.get("/me", bearer=bob["access_token"]).status == 200

    def test_logout_all_ends_everything_on_both_ports(self, auth, admin, log_in, new_client, root, admin_token):
        user, other = log_in(root), log_in(root, client=new_client("other"))
        assert auth.post("/logout-all", bearer=user["access_token"]).status == 200
        for dead in (user, other):
            assert auth.get("/me", bearer=dead["access_token"]).status == 401
        assert admin.get("/users", bearer=admin_token).status == 401

    def test_each_leaves_a_row(self, idp, auth, log_in, alice):
        auth.post("/logout", bearer=log_in(alice)["access_token"])
        auth.post("/logout-all", bearer=log_in(alice)["access_token"])
        assert {"logout", "logout_all"} <= {row.action for row in idp.store.list_audit(limit=6)}

    @pytest.mark.parametrize("path", ["/logout", "/logout-all"])
    def test_a_link_cannot_do_it(self, auth, bearer, path):
        assert auth.get(path, bearer=bearer).status == (200 if path == "/logout" else 405), "a page that asks, at most"
        assert auth.get("/me", bearer=bearer).status == 200


class TestBodies:
    """A body that a route does not take, and one that it needs."""

    @pytest.mark.parametrize(
        "media, body", [("application/json", b"{}"), ("application/json", b"null"), ("text/plain", b"\xff"), ("", b"x")]
    )
    @pytest.mark.parametrize("path", ["/userinfo", "/logout", "/logout-all"])
    def test_a_route_that_takes_at_most_a_token_ignores_any_other_body(self, auth, log_in, alice, path, media, body):
        token = log_in(alice, scope="openid")["access_token"]
        assert auth.post(path, body, bearer=token, headers=[("CONTENT_TYPE", media)]).status == 200
        assert auth.get("/me", bearer=token).status == (200 if path == "/userinfo" else 401)

    @pytest.mark.parametrize("body", ["access_token=x", "access_token=%zz", "access_token=x&access_token=x"])
    @pytest.mark.parametrize("path", ["/userinfo", "/logout", "/logout-all"])
    def test_a_form_is_read_where_it_may_hold_the_token(self, auth, bearer, path, body):
        answer = auth.post(path, body, bearer=bearer)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("path", ["/token", "/introspect", "/revoke"])
    def test_a_route_that_needs_a_form_takes_nothing_else(self, auth, service, path):
        for media, body in (("application/json", b"{}"), ("application/json", b"null"), ("", b"x"), ("", b"")):
            answer = auth.post(path, body, auth=service, headers=[("CONTENT_TYPE", media)])
            assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("path", ["/authorize", "/end-session", "/login", "/login/password", "/account"])
    def test_a_page_does_not_take_json_for_its_form(self, auth, path):
        assert auth.post(path, json_body={"client_id": "x"}).status == 400

    @pytest.mark.parametrize("body", ["a=1&a=2", "%zz", "access_token=x", "{}"])
    def test_a_route_that_takes_no_body_ignores_one(self, idp, auth, service, alice, body):
        client = m.find_client(idp, "service")
        m.assign_scopes(idp, m.LOCAL.acting_as("test"), client, ["admin:deactivate_users"])
        machine = auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["access_token"]
        assert auth.post("/user/alice/deactivate", body).status == 401
        assert auth.post("/user/alice/deactivate", body, bearer=machine).status == 200


class TestHealth:
    def test_plain_answers(self, auth):
        assert (
            auth.get("/ping").json == {"message": "pong from auth"}
            and auth.get("/version").json == {"name": "microauthd", "version": m.VERSION}
            and auth.get("/health").json == {"status": "ok"}
        )

    @pytest.mark.parametrize("case", ["clock", "database"])
    def test_ready_says_what_is_not(self, auth, idp, clock, case):
        assert auth.get("/health/ready").json == {
            "status": "ok", "checks": {"keys": True, "clock": True, "database": True},
        }
        idp.readiness = (0.0, {})
        if case == "clock":
            clock.now = 1000.0
        else:
            idp.store.written_at -= PROBE_SECONDS  # long ago: the probe writes
            idp.store.connection.execute("PRAGMA query_only = ON")
        answer = auth.get("/health/ready")
        idp.store.connection.execute("PRAGMA query_only = OFF")
        assert (
            answer.status == 503
            and answer.json["checks"] == {"keys": True, "clock": True, "database": True} | {case: False}
            and answer.headers["retry-after"]
        )
        assert auth.get("/health").status == 200, "alive all the same"

    def test_the_probe_runs_once_a_second_however_often_it_is_asked(self, auth, idp, monkeypatch):
        calls, probe = [], idp.store.probe
        monkeypatch.setattr(idp.store, "probe", lambda: calls.append(1) or probe())
        for _ in range(20):
            auth.get("/health/ready")
        assert len(calls) <= 2


class TestPublicFiles:
    @pytest.fixture
    def served(self, make_idp, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        return Caller(m.App(make_idp(Options(**CHEAP, serve_public_auth_files=True)), m.AUTH))

    def test_they_are_off_unless_turned_on(self, auth):
        assert auth.get("/login.html").status == auth.get("/").status == 404

    def test_a_browser_is_led_to_its_account_unless_a_file_is_there(self, auth, served, tmp_path):
        html = [("Accept", "text/html,application/xhtml+xml")]
        for port in (auth, served):
            answer = port.get("/", headers=html)
            assert answer.status == 303 and answer.headers["location"].endswith("/account")
            for accept in ("", "*/*", "application/json"):
                assert port.get("/", headers=[("Accept", accept)]).status == 404
            assert port.get("/nowhere", headers=html).status == 404
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "index.html").write_text("mine")
        assert served.get("/", headers=html).body == b"mine"

    def test_without_pages_there_is_no_account_to_lead_to(self, make_idp):
        port = Caller(m.App(make_idp(Options(**CHEAP, enable_pkce=False)), m.AUTH))
        assert port.get("/", headers=[("Accept", "text/html")]).status == 404

    def test_the_bundled_examples_are_served(self, served):
        page = served.get("/login.html")
        assert (
            page.status == 200
            and b"Sign in" in page.body
            and "default-src 'self'" in page.headers["content-security-policy"]
            and "unsafe-inline" not in page.headers["content-security-policy"]
        )
        assert (
            page.headers["x-content-type-options"] == "nosniff"
            and page.headers["referrer-policy"] == "no-referrer"
            and page.headers["cache-control"] == "no-cache"
        )
        assert served.get("/jwks.json").json["keys"]

    def test_the_operators_own_folder_has_a_policy_of_its_own_and_our_pages_keep_theirs(self, served, tmp_path):
        def policy(path):
            headers = served.get(path).headers
            own = "frame-ancestors 'self'" in headers["content-security-policy"]
            assert headers["x-frame-options"] == ("SAMEORIGIN" if own else "DENY")
            return headers["content-security-policy"]

        examples, login, missing = policy("/login.html"), policy("/authorize"), policy("/nowhere")
        assert examples == m.PAGE_POLICY
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "login.html").write_text("<form onsubmit='event.preventDefault()'><script>1</script>")
        assert policy("/login.html") == (
            "default-src 'self' 'unsafe-inline' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'self'"
        )
        assert (policy("/authorize"), policy("/nowhere")) == (login, missing)
        assert "unsafe-inline" not in login + missing

    @pytest.mark.parametrize("policy", ["script-src 'self' https://cdn.example", ""])
    def test_public_csp_is_sent_as_it_is_set_and_none_if_empty(self, make_idp, tmp_path, monkeypatch, policy):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "index.html").write_text("page")
        served = Caller(m.App(make_idp(Options(**CHEAP, serve_public_auth_files=True, public_csp=policy)), m.AUTH))
        assert served.get("/").status == 200
        assert served.get("/").headers.get("content-security-policy", "") == policy

    def test_the_examples_in_a_checkout_are_not_the_operators_own(self, served, monkeypatch):
        monkeypatch.chdir(m.HERE)
        assert served.get("/login.html").headers["content-security-policy"] == m.PAGE_POLICY

    @pytest.mark.parametrize(
        "path",
        [
            "/../microauthd.py", "/..%2fmicroauthd.py", "//etc/passwd", "/.ssh", "/pkce_demo/../../microauthd.py",
            "/\0", "/login.html\0", "/login.html/", "/..\\..\\etc\\passwd", "/" + "a" * 5000,
            "/nowhere/", "/pkce_demo//../", "/pkce_demo/.", "/pkce_demo/./", "/..", "/../", "/.",
        ],
        ids=lambda path: repr(path[:30]),
    )
    def test_nothing_else_is(self, served, path):
        answer = served.get(path)
        assert answer.status == 404 and answer.json["error"] == "not_found"

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_folder_is_its_index_html_at_its_path_with_a_slash(self, served, method):
        page, index = served(method, "/pkce_demo/"), served(method, "/pkce_demo/index.html")
        assert (page.status, page.headers["content-type"]) == (200, index.headers["content-type"])
        assert page.body == index.body and page.headers["content-security-policy"].startswith("default-src 'self'")
        there = served(method, "/pkce_demo")
        assert (there.status, there.headers["location"]) == (308, "./pkce_demo/")
        assert served(method, "/pkce_demo?code=a&state=b%26c").headers["location"] == "./pkce_demo/?code=a&state=b%26c"

    def test_a_folder_below_an_issuers_path_redirects_whether_or_not_a_proxy_removes_it(self, make_idp, tmp_path):
        options = Options(**CHEAP, serve_public_auth_files=True, oidc_issuer="https://box.example/auth")
        served = Caller(m.App(make_idp(options), m.AUTH))
        assert served.get("/auth/pkce_demo").headers["location"] == "./pkce_demo/"
        assert served.get("/pkce_demo").headers["location"] == "./pkce_demo/"
        assert served.get("/auth/pkce_demo/").status == 200

    def test_only_folders_with_a_page_that_are_below_and_not_hidden_are_served(self, served, tmp_path):
        public, outside = tmp_path / "public", tmp_path / "outside"
        for folder in (public / "a" / "b", public / "empty", public / ".hidden", public / "x:y z", outside):
            folder.mkdir(parents=True)
            if folder.name != "empty":
                (folder / "index.html").write_text("page")
        os.symlink(outside, public / "link")
        for path in ("/a", "/a/", "/empty", "/empty/", "/.hidden", "/.hidden/", "/link", "/link/", "/a/b/index.html/"):
            assert served.get(path).status == 404, path
        assert served.get("/a/b/").body == b"page"
        assert served.get("/x:y z").headers["location"] == "./x%3Ay%20z/", "no scheme"
        assert served.get("/a/b").headers["location"] == "./b/"
        assert served.get("//evil.example").status == 404
        assert served.get("//a/b").headers["location"] == "./b/", "never the name of another host"

    @pytest.mark.parametrize(
        "method, path, allow",
        [
            ("GET", "/token", "POST"), ("HEAD", "/token", "POST"), ("GET", "/login/password", "POST"),
            ("PUT", "/authorize", "GET,POST"), ("POST", "/auth-session/x", "GET"), ("POST", "/jwks.json", "GET"),
            ("POST", "/login.html", "GET"), ("DELETE", "/pkce_demo/index.html", "GET"),
            ("POST", "/pkce_demo/", "GET"), ("POST", "/pkce_demo", "GET"),
        ],
    )
    def test_a_wrong_method_is_405_with_allow(self, served, method, path, allow):
        answer = served(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        assert method == "HEAD" or answer.json["error"] == "method_not_allowed"

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "TRACE"])
    @pytest.mark.parametrize("path", ["/nowhere", "/token/", "/token/x", "/", "/.ssh", "/login.htm"])
    def test_an_unknown_path_is_404_for_every_method(self, served, method, path):
        assert served(method, path).status == 404

    def test_a_file_cannot_take_the_path_of_an_endpoint(self, served, tmp_path):
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "token").write_text("mine")
        (tmp_path / "public" / "index.html").write_text("mine")
        assert served.get("/token").status == 405 and served.post("/").headers["allow"] == "GET"

    def test_a_folder_beside_replaces_them(self, served, tmp_path):
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "index.html").write_text("mine")
        assert served.get("/").body == b"mine" and served.get("/login.html").status == 404

    @pytest.mark.parametrize("path", ["/.env", "/.git/config", "/link.html"])
    def test_hidden_files_and_links_out_of_it_are_not_served(self, served, tmp_path, path):
        folder = tmp_path / "public"
        (folder / ".git").mkdir(parents=True)
        for name in (".env", ".git/config"):
            (folder / name).write_text("secret")
        (tmp_path / "outside").write_text("secret")
        os.symlink(tmp_path / "outside", folder / "link.html")
        assert served.get(path).status == 404


class TestScopedAdministration:
    NEEDS = {
        "admin:provision_users": ("POST", "/user"), "admin:list_users": ("GET", "/users"),
        "admin:read_user": ("GET", "/user/alice"), "admin:reset_passwords": ("POST", "/user/alice/reset"),
        "admin:deactivate_users": ("POST", "/user/alice/deactivate"),
    }
    BODIES = {
        "/user": {"username": "bob", "email": "bob@example.org", "password": PASSWORD},
        "/user/alice/reset": {"new_password": "another battery staple"},
    }

    def ask(self, auth, scope, token):
        method, path = self.NEEDS[scope]
        return auth(method, path, bearer=token, json_body=self.BODIES.get(path))

    @pytest.fixture
    def holder(self, idp, auth, new_client, new_user):
        """A token with a seeded scope, of a machine or of a user."""

        def token(scope, kind):
            client = new_client("provisioner", scopes=[scope, "api:read"])
            if kind == "machine":
                return auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
            new_user("clerk", [scope])
            return auth.post(
                "/token", {"grant_type": "password", "username": "clerk", "password": PASSWORD}, auth=client
            ).json["access_token"]

        return token

    @pytest.mark.parametrize("kind", ["machine", "user"])
    @pytest.mark.parametrize("scope", NEEDS)
    def test_each_route_needs_its_scope_and_no_other_will_do(self, auth, alice, holder, scope, kind):
        token = holder(scope, kind)
        for other in self.NEEDS:
            if other != scope:
                answer = self.ask(auth, other, token)
                assert (
                    answer.status == 403
                    and answer.json["error"] == "insufficient_scope"
                    and f'scope="{other}"' in answer.headers["www-authenticate"]
                )
        assert self.ask(auth, scope, token).status == 200

    @pytest.mark.parametrize("id, name", [(id, name) for id, name, _ in SEEDED_SCOPES if not name.endswith("metrics")])
    def test_the_id_of_a_scope_stands_for_its_name(self, idp, auth, alice, holder, id, name):
        claims = jwt.decode(holder(name, "machine"), options={"verify_signature": False})
        assert (
            self.ask(
                auth, name, idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims | {"scope": f"x {id}"})
            ).status
            == 200
        )

    def test_what_they_do(self, idp, auth, service, alice, log_in, holder, new_client):
        token = holder("admin:provision_users", "machine")
        made = auth(
            "POST", "/user", bearer=token,
            json_body=self.BODIES["/user"]
            | {"is_active": False, "roles": [MAD_ADMIN_ROLE_ID], "email_verified": True, "id": "x"},
        ).json
        assert made == {
            "id": made["id"], "username": "bob", "email": "bob@example.org", "created_at": made["created_at"],
            "lockout_until": None, "is_active": True, "email_verified": False, "totp_enabled": False,
        }
        assert not m.is_admin(idp, made["id"]) and idp.store.list_audit("user_created")[0].actor_id == "provisioner"
        assert auth("POST", "/user", bearer=token, json_body=self.BODIES["/user"]).status == 409

    def test_a_reset_and_a_deactivation_end_what_the_user_had(self, auth, alice, log_in, holder):
        before = log_in(alice)["access_token"]
        token = holder("admin:reset_passwords", "machine")
        assert (
            self.ask(auth, "admin:reset_passwords", token).json["success"] is True
            and auth.get("/me", bearer=before).status == 401
        )
        assert (
            auth(
                "POST", "/user/nobody/reset", bearer=token, json_body={"new_password": "another battery staple"}
            ).status
            == 404
        )
        assert auth("POST", "/user/alice/reset", bearer=token, json_body={}).json["errors"].keys() == {"new_password"}

    def test_a_deactivated_user_is_out(self, auth, service, alice, log_in, holder):
        before = log_in(alice)["access_token"]
        token = holder("admin:deactivate_users", "machine")
        assert (
            self.ask(auth, "admin:deactivate_users", token).json["success"] is True
            and auth.get("/me", bearer=before).status == 401
        )
        assert (
            self.ask(auth, "admin:deactivate_users", token).status == 400
            and auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service
            ).status
            == 403
        )

    @pytest.mark.parametrize(
        "scope, path", [("admin:reset_passwords", "reset"), ("admin:deactivate_users", "deactivate")]
    )
    def test_administrators_are_out_of_reach(self, idp, admin, auth, root, new_user, holder, scope, path):
        new_user("second", admin=True)
        token = holder(scope, "machine")
        for key in (root.id, "root", "ROOT"):
            answer = auth(
                "POST", f"/user/{key}/{path}", bearer=token,
                json_body={"new_password": "another battery staple"} if path == "reset" else None,
            )
            assert (answer.status, answer.json["error"]) == (403, "access_denied")
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 200

    REACH = ("admin:reset_passwords", "admin:deactivate_users")

    @pytest.mark.parametrize("kind", ["machine", "user"])
    @pytest.mark.parametrize("scope", REACH)
    @pytest.mark.parametrize(
        "held, asked, theirs, status",
        [
            (REACH, "", (), 200), (REACH, "", ("api:read",), 200), (REACH, "", REACH[:1], 200), (REACH, "", REACH, 200),
            (REACH, "", ("admin:list_users",), 403), (REACH, "", (*REACH, "admin:read_user"), 403),
            (REACH, "one", REACH, 403), (REACH, "one", (), 200),
        ],
    )
    def test_a_right_is_no_ladder_to_a_user_with_more(
        self, idp, auth, new_client, new_user, alice, scope, kind, held, asked, theirs, status
    ):
        """Whoever could set the password of a user with more rights could log in as that user."""
        client = new_client("desk", scopes=[*self.REACH, "admin:list_users"] if kind == "user" else held)
        new_user("clerk", held)
        login = {"grant_type": "password", "username": "clerk", "password": PASSWORD}
        form = (login if kind == "user" else {"grant_type": "client_credentials"}) | {"scope": scope if asked else ""}
        token = auth.post("/token", form, auth=client).json["access_token"]
        for name in theirs:
            m.assign_scopes(idp, m.LOCAL.acting_as("test"), m.get_user(idp, "alice"), [name])
        answer = self.ask(auth, scope, token)
        assert answer.status == status and (status == 200 or answer.json["error"] == "access_denied")

    @pytest.mark.parametrize("shared, status", [(True, 200), (False, 403)])
    def test_a_privileged_role_is_a_right(self, idp, auth, admin, new_client, new_user, alice, root, shared, status):
        caller = m.LOCAL.acting_as("test")
        role = m.create_role(idp, caller, CreateRole("Treasurer", None, True))
        plain = m.create_role(idp, caller, CreateRole("Reader"))
        client = new_client("desk", scopes=["admin:reset_passwords"])
        new_user("clerk", ["admin:reset_passwords"])
        for user in ("alice", *(["clerk"] if shared else [])):
            m.assign_role(idp, caller, user, role.id)
        login = {"grant_type": "password", "username": "clerk", "password": PASSWORD}
        token = auth.post("/token", login, auth=client).json["access_token"]
        assert self.ask(auth, "admin:reset_passwords", token).status == status
        new_user("carol")
        m.assign_role(idp, caller, "carol", plain.id)
        body = {"new_password": "another battery staple"}
        assert auth("POST", "/user/carol/reset", bearer=token, json_body=body).status == 200
        m.update_role(idp, caller, plain.id, UpdateRole(is_privileged=True))
        assert auth("POST", "/user/carol/reset", bearer=token, json_body=body).status == 403
        m.update_role(idp, caller, plain.id, UpdateRole(description="x"))
        assert m.get_role(idp, "Reader").is_privileged, "what is not sent stays"
        with pytest.raises(m.Problem, match="protected"):
            m.update_role(idp, caller, MAD_ADMIN_ROLE_ID, UpdateRole(is_privileged=False))

    @pytest.mark.parametrize(
        "take, status",
        [
            (lambda idp: m.remove_scope(idp, m.LOCAL.acting_as("t"), m.get_client(idp, "clerk"), "admin:list_users"), 403),
            (lambda idp: m.delete_client(idp, m.LOCAL.acting_as("t"), "clerk"), 401),
        ],
    )
    def test_a_right_that_was_taken_away_is_gone_before_its_token_is(self, idp, auth, new_client, take, status):
        client = new_client("clerk", scopes=["admin:list_users"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        take(idp)
        assert auth.get("/users", bearer=token).status == status

    def test_of_a_user_too(self, idp, auth, new_client, new_user):
        client = new_client("desk", scopes=["admin:list_users"])
        new_user("clerk", ["admin:list_users"])
        token = auth.post(
            "/token", {"grant_type": "password", "username": "clerk", "password": PASSWORD}, auth=client
        ).json["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        m.remove_scope(idp, m.LOCAL.acting_as("t"), m.get_user(idp, "clerk"), "admin:list_users")
        assert auth.get("/users", bearer=token).status == 403


class TestKeySet:
    """RFC 7517 §5"""

    @pytest.mark.parametrize(
        "overlap, told",
        [
            (900, "public, max-age=300"), (302, "public, max-age=300"), (100, "public, max-age=98"), (2, "no-store"),
            (1, "no-store"),
        ],
    )
    def test_caches_keep_it_for_less_than_a_new_key_waits(self, make_idp, overlap, told):
        auth = Caller(m.App(make_idp(Options(**CHEAP, key_overlap=overlap)), m.AUTH))
        assert auth.get("/jwks.json").headers["cache-control"] == told

    def test_one_made_while_the_keys_changed_does_not_stay(self, idp):
        """A thread that read the old ring answers once with it, and leaves it nowhere."""

        def make():
            idp.rings["auth"] = m.KeyRing([make_key("ES256", 2048, 0)])  # what reload_rings does, in the middle
            idp.answers = {}
            return b"of before"

        assert m.cached_page(idp, "jwks", make).content == b"of before"
        assert m.cached_page(idp, "jwks", idp.auth_ring.jwks).content == idp.auth_ring.jwks()


class TestThirdParty:
    """A third party's access token reaches what its scope opens, and its own logins. RFC 6749 §3.3, §10.3"""

    GRANTS = ["client_credentials", "password", "refresh_token"]

    @pytest.fixture
    def third(self, new_client):
        return new_client("third", is_first_party=False, grant_types=self.GRANTS)

    @pytest.fixture
    def person(self, idp, new_user, scopes):
        """Somebody with a role."""
        someone = new_user("ann", ["api:read"])
        m.create_role(idp, m.LOCAL, CreateRole("Pilot"))
        m.assign_role(idp, m.LOCAL, someone.id, m.get_role(idp, "Pilot").id)
        return someone

    OPENED = [
        ("api:read", set()), ("openid", set()), ("openid email", set()),
        ("openid profile", {"username", "preferred_username"}), ("openid roles", {"role", "roles"}),
        ("openid groups", {"groups"}),
    ]

    @pytest.mark.parametrize("scope, names", OPENED)
    def test_name_and_roles_are_in_the_token_by_scope(self, auth, third, service, person, log_in, scope, names):
        of_user = {"username", "preferred_username", "role", "roles", "groups"}
        answer = log_in(person, third, scope=scope)
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        assert set(claims) & of_user == names and {"amr", "auth_time", "sid"} <= set(claims)
        form = {"grant_type": "refresh_token", "refresh_token": answer["refresh_token"]}
        again = auth.post("/token", form, auth=third)
        claims = jwt.decode(again.json["access_token"], options={"verify_signature": False})
        assert set(claims) & of_user == names, "after a refresh too"
        introspected = auth.post("/introspect", {"token": answer["access_token"]}, auth=third).json
        assert set(introspected) & of_user == names
        ours = jwt.decode(log_in(person, service, scope=scope)["access_token"], options={"verify_signature": False})
        assert of_user - {"groups"} <= set(ours) and ours["roles"] == ["Pilot"], "a first party has them as ever"

    @pytest.mark.parametrize("scope, names", OPENED)
    def test_me_shows_what_the_scope_opens(self, idp, auth, third, service, person, log_in, scope, names):
        seen = auth.get("/me", bearer=log_in(person, third, scope=scope)["access_token"]).json
        role = m.get_role(idp, "Pilot").id
        assert seen == {
            "sub": person.id, "email": "ann@example.org" if "email" in scope else None,
            "roles": [role] if "roles" in scope else [],
            "role_names": ["Pilot"] if names & {"roles", "groups"} else [], "scopes": sorted(scope.split()),
        }
        ours = auth.get("/me", bearer=log_in(person, service, scope=scope)["access_token"]).json
        assert (ours["email"], ours["roles"], ours["role_names"]) == ("ann@example.org", [role], ["Pilot"])

    def test_me_hides_what_a_token_of_before_it_was_a_third_party_carries(self, idp, auth, service, person, log_in):
        bearer = log_in(person, service, scope="api:read")["access_token"]
        m.update_client(idp, m.LOCAL, "service", UpdateClient(is_first_party=False))
        seen = auth.get("/me", bearer=bearer).json
        assert (seen["email"], seen["roles"], seen["role_names"]) == (None, [], [])

    @pytest.mark.parametrize("scope, names", [*OPENED, ("openid roles groups", {"role", "roles", "groups"})])
    def test_what_did_not_fit_into_its_token_is_told_by_scope(
        self, idp, auth, third, service, person, log_in, scope, names
    ):
        for number in range(150):
            role = m.create_role(idp, m.LOCAL, CreateRole(f"a role of some length {number:05}"))
            m.assign_role(idp, m.LOCAL, person.id, role.id)
        token, of_roles = log_in(person, third, scope=scope)["access_token"], {"role", "roles", "groups"}
        is_omitted = bool(names & of_roles)
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims.get("roles_omitted", False) is is_omitted and not set(claims) & of_roles
        introspected = auth.post("/introspect", {"token": token}, auth=third).json
        assert set(introspected) & of_roles == names & of_roles
        shown = introspected.get("roles", introspected.get("groups", []))
        assert auth.get("/me", bearer=token).json["role_names"] == shown
        if "openid" in scope:
            told = auth.get("/userinfo", bearer=token).json
            assert set(told) & of_roles == names & {"roles", "groups"}
            ours = auth.get("/userinfo", bearer=log_in(person, service, scope=scope)["access_token"]).json
            assert len(ours["roles"]) == 151, "a first party has them whatever its scope"

    def test_who_has_no_address_has_no_claim_of_one(self, idp, auth, third, new_user, log_in):
        """OpenID Connect Core §5.3.2: a claim without a value is left out, not empty."""
        person = new_user("eve")
        idp.store.run("UPDATE account SET email = '' WHERE id = :id", id=person.id)
        token = log_in(person, third, scope="openid email")["access_token"]
        assert auth.get("/userinfo", bearer=token).json == {"sub": person.id}

    @pytest.mark.parametrize("path", ["/me/sessions", "/me/refresh-tokens"])
    def test_lists_are_of_its_own_logins(self, auth, third, service, person, log_in, path):
        log_in(person, service), log_in(person, third)
        bearer = log_in(person, third, scope="openid")["access_token"]
        answer = auth.get(path, bearer=bearer)
        assert [row["client_id"] for row in answer.json] == ["third", "third"]
        assert answer.headers["x-total-count"] == "2" and {row["username"] for row in answer.json} == {""}
        named = auth.get(path, bearer=log_in(person, third, scope="openid profile")["access_token"]).json
        assert {row["username"] for row in named} == {"ann"}
        ours = auth.get(path, bearer=log_in(person, service)["access_token"]).json
        assert {(row["client_id"], row["username"]) for row in ours} == {("third", "ann"), ("service", "ann")}

    @pytest.mark.parametrize("path", ["/logout", "/logout-all"])
    def test_it_logs_out_of_itself(self, idp, auth, third, service, person, log_in, clock, path):
        elsewhere, other, mine = (log_in(person, client)["access_token"] for client in (service, third, third))
        clock.pass_(1)
        assert auth.post(path, bearer=mine).json["message"] == "Logged out of this client."
        assert auth.get("/me", bearer=elsewhere).status == 200
        assert auth.get("/me", bearer=mine).status == auth.get("/me", bearer=other).status == 401
        assert auth.post("/logout-all", bearer=elsewhere).status == 200
        assert auth.get("/me", bearer=elsewhere).status == 401, "a first party ends everything"

    def test_no_other_route_takes_a_users_token_for_more_than_its_scope(self):
        """Each route of a bearer is stated above, or demands a scope."""
        bearers = {
            route.paths[0] for route in m.AUTH.routes
            if route.guard is not m.anyone and not route.oauth and not getattr(route.guard, "scope", "")
        }
        assert bearers == {
            "/userinfo", "/me", "/whoami", "/me/sessions", "/me/refresh-tokens", "/logout", "/logout-all",
        }
