"""What a console asks of ADMIN besides the nouns: checks before a change, previews, invitations, and what lists say."""

import microauthd as m
import pytest
from conftest import SECRETS


def errors_of(answer):
    assert answer.status == 400, answer
    return answer.json["errors"]


class TestWouldThisUriBeTaken:
    """POST /clients/{id}/uris/check says what adding it would say, and changes nothing."""

    @pytest.mark.parametrize(
        "client, kind, path, uri, ok",
        [
            ("service", "redirect", "redirect-uris", "https://app.example/cb", True),
            ("service", "redirect", "redirect-uris", "  https://app.example/blanks  ", True),
            ("service", "redirect", "redirect-uris", "http://127.0.0.1/cb", True),
            ("service", "redirect", "redirect-uris", "org.example.app:/cb", True),
            ("service", "redirect", "redirect-uris", "http://nas.lan/cb", False),
            ("service", "redirect", "redirect-uris", "https://app.example/#x", False),
            ("service", "redirect", "redirect-uris", "javascript:alert(1)", False),
            ("service", "redirect", "redirect-uris", "localhost:8080/cb", False),
            ("service", "redirect", "redirect-uris", "x" * 3000, False),
            ("service", "post_logout", "post-logout-redirect-uris", "https://app.example/bye", True),
            ("service", "post_logout", "post-logout-redirect-uris", "/bye", False),
            ("service", "cors_origin", "cors-origins", "https://app.example", False),
            ("spa", "cors_origin", "cors-origins", "https://app.example", True),
            ("spa", "cors_origin", "cors-origins", "https://app.example/", False),
        ],
    )
    def test_it_and_the_route_that_adds_agree(self, call, service, public, client, kind, path, uri, ok):
        verdict = call("POST", f"/clients/{client}/uris/check", {"kind": kind, "uri": uri})
        assert verdict.status == 200 and verdict.json["ok"] is ok
        assert call("GET", f"/clients/{client}/{path}").json == [], "nothing was added"
        added = call("POST", f"/clients/{client}/{path}", uri)
        assert added.status == (201 if ok else 400)
        assert verdict.json["reason"] == ("" if ok else added.json["errors"]["uri"])

    def test_one_that_is_there_is_said_to_be_and_a_similar_one_is_named(self, call, service):
        call("POST", "/clients/service/redirect-uris", "https://app.example/callback")
        ask = lambda uri: call("POST", "/clients/service/uris/check", {"kind": "redirect", "uri": uri}).json  # noqa: E731
        near = "https://app.example/callback"
        assert ask(near) == {"ok": False, "reason": "is registered already", "nearest": near}
        assert ask("https://app.example/callback/") == {"ok": True, "reason": "", "nearest": near}
        assert call("POST", "/clients/service/uris/check", {"kind": "post_logout", "uri": near}).json == {
            "ok": True, "reason": "", "nearest": None,
        }, "each kind has URIs of its own"

    def test_what_is_asked_about_must_exist(self, call, service):
        assert list(errors_of(call("POST", "/clients/service/uris/check", {"kind": "x", "uri": "https://a.example"}))) == [
            "kind"
        ]
        assert call("POST", "/clients/nobody/uris/check", {"kind": "redirect", "uri": "https://a.example"}).status == 404


class TestARegistrationInOneRequest:
    """POST /clients with URIs, origins and flags: all of it or nothing."""

    WHOLE = {
        "client_id": "web", "client_type": "public", "display_name": "Web", "scopes": ["api:read"],
        "redirect_uris": ["https://web.example/cb", " http://127.0.0.1/cb ", "https://web.example/cb"],
        "post_logout_redirect_uris": ["https://web.example/"], "cors_origins": ["https://web.example"],
        "flags": {"TOKEN_EXPIRATION": {"options": "600"}, "ENABLE_TOTP": {}, "SESSION_BASED_AUTH": {"is_enabled": False}},
    }

    def test_everything_named_is_there(self, call, scopes, idp):
        assert call("POST", "/clients", self.WHOLE).status == 200
        uris = {
            path: [row["uri"] for row in call("GET", f"/clients/web/{path}").json]
            for path in ("redirect-uris", "post-logout-redirect-uris", "cors-origins")
        }
        assert uris == {
            "redirect-uris": ["http://127.0.0.1/cb", "https://web.example/cb"],
            "post-logout-redirect-uris": ["https://web.example/"], "cors-origins": ["https://web.example"],
        }
        flags = call("GET", "/clients/web/options").json
        assert flags["TOKEN_EXPIRATION"] == {"is_enabled": True, "options": "600"}
        assert flags["ENABLE_TOTP"]["is_enabled"] and not flags["SESSION_BASED_AUTH"]["is_enabled"]
        actions = [row.action for row in idp.store.list_audit(limit=20)]
        assert actions.count("redirect_uri_added") == 2 and actions.count("client_flag_set") == 3
        assert {"create_client", "post_logout_uri_added", "cors_origin_uri_added", "client_flag_option_set"} <= set(actions)

    @pytest.mark.parametrize(
        "change, member, part",
        [
            ({"redirect_uris": ["https://web.example/cb", "http://web.example/cb"]}, "redirect_uris", "http://web.example"),
            ({"post_logout_redirect_uris": ["bye"]}, "post_logout_redirect_uris", "absolute"),
            ({"cors_origins": ["https://web.example/"]}, "cors_origins", "scheme, host and port"),
            ({"client_type": "confidential"}, "cors_origins", "public clients"),
            ({"flags": {"NONSENSE": {}}}, "flags", "among"),
            ({"flags": {"ENABLE_TOTP": {"options": "1"}}}, "flags", "no option"),
            ({"flags": {"TOKEN_EXPIRATION": {"options": "soon"}}}, "flags", "seconds"),
            ({"flags": {"TOTP_ISSUER": {"options": "x" * 300}}}, "flags", "printable"),
            ({"flags": ["ENABLE_TOTP"]}, "flags", "object"), ({"redirect_uris": "https://a.example"}, "redirect_uris", "array"),
            ({"scopes": ["nonsense"]}, "scopes", "exist"), ({"client_id": "a:b"}, "client_id", "printable"),
        ],
    )
    def test_if_a_part_is_refused_nothing_is_registered(self, call, scopes, idp, change, member, part):
        before = idp.store.list_audit(limit=1)[0].seq
        assert part in errors_of(call("POST", "/clients", self.WHOLE | change))[member]
        assert call("GET", "/clients/web").status == 404
        assert [row.action for row in idp.store.list_audit(after=before)] == []

    @pytest.mark.parametrize(
        "more, grants",
        [
            ({}, ["client_credentials"]),
            ({"redirect_uris": ["https://a.example/"]}, ["authorization_code", "client_credentials", "refresh_token"]),
            ({"redirect_uris": ["https://a.example/"], "grant_types": ["authorization_code"]}, ["authorization_code"]),
            ({"post_logout_redirect_uris": ["https://a.example/"]}, ["client_credentials"]),
        ],
    )
    def test_a_redirect_uri_brings_the_grants_of_a_login_as_it_does_later(self, call, more, grants):
        made = call("POST", "/clients", {"client_id": "app"} | more)
        assert made.status == 200 and made.json["grant_types"] == grants
        SECRETS.add(made.json["client_secret"])

    def test_the_switches_of_the_request_hold_for_its_uris(self, call):
        body = {"client_id": "nas", "allow_http_redirects": True, "redirect_uris": ["http://nas.lan/cb"]}
        made = call("POST", "/clients", body)
        assert made.status == 200
        SECRETS.add(made.json["client_secret"])

    def test_the_secret_is_hashed_only_when_all_is_right(self, call, monkeypatch, idp):
        monkeypatch.setattr(m, "hash_secret", lambda *_: pytest.fail("hashed"))
        assert call("POST", "/clients", {"client_id": "x", "redirect_uris": ["x"]}).status == 400


class TestPreview:
    """POST /clients/{id}/preview: what the functions that issue would put into tokens, and never a token."""

    @pytest.fixture
    def preview(self, call):
        def ask(client, **body):
            answer = call("POST", f"/clients/{client}/preview", body)
            assert answer.status == 200, answer
            return answer.json

        return ask

    EXAMPLES = ("jti", "sid", "at_hash", "iat", "nbf", "exp", "auth_time")

    def same(self, previewed, claims):
        assert previewed["claims"].keys() == claims.keys()
        return {name: value for name, value in previewed["claims"].items() if name not in self.EXAMPLES} == {
            name: value for name, value in claims.items() if name not in self.EXAMPLES
        }

    def test_it_is_what_a_login_then_gives(self, preview, call, log_in, alice, service, idp, auth):
        scope = "openid profile email roles api:read"
        seen = preview("service", user_id="alice", scope=scope)
        given = log_in(alice, scope=scope)
        access, in_id_token = (
            idp.auth_ring.verify(given["access_token"], m.AT_JWT), idp.auth_ring.verify(given["id_token"], m.JWT)
        )
        assert self.same(seen["access_token"], access) and self.same(seen["id_token"], in_id_token)
        assert seen["userinfo"] == auth.get("/userinfo", bearer=given["access_token"]).json
        for name in ("access_token", "id_token"):
            header = m.msgspec.json.decode(m.unb64url(given[name].partition(".")[0]))
            assert seen[name]["header"] == header
        assert seen["scopes"] == {"granted": sorted(scope.split()), "left_out": {}}
        assert (seen["refused"], seen["obstacles"], seen["consent"]) == ("", [], [])

    def test_a_machine_has_one_too(self, preview, machine, idp, service):
        seen = preview("service")
        assert self.same(seen["access_token"], idp.auth_ring.verify(machine["access_token"], m.AT_JWT))
        assert seen["id_token"] is None and seen["userinfo"] is None

    @pytest.mark.parametrize(
        "client, user, scope, refused, granted, left_out",
        [
            ("service", "alice", "api:read api:write", "", ["api:read"],
             {"api:write": "the user does not have this scope"}),
            ("service", "alice", "api:read nonsense", "", ["api:read"], {"nonsense": "there is no such scope"}),
            ("service", "alice", "openid api:secret", "invalid_scope", [],
             {"api:secret": "the client may not ask for this scope"}),
            ("service", "alice", "profile api:read", "invalid_scope", [],
             {"profile": "the client must ask for openid as well"}),
            ("service", "alice", "api:write", "invalid_scope", [], {"api:write": "the user does not have this scope"}),
            ("service", "alice", None, "", ["api:read"], {}), ("service", "alice", "", "", ["api:read"], {}),
            ("service", "", None, "", ["api:read", "api:write"], {}),
            ("service", "", "api:read nonsense", "invalid_scope", [], {"nonsense": "there is no such scope"}),
            ("service", "", "api:secret", "invalid_scope", [], {"api:secret": "the client may not ask for this scope"}),
            ("spa", "", None, "unauthorized_client", ["api:read", "api:write"], {}),
            ("spa", "alice", "api:read", "unauthorized_client", [], {}),
        ],
    )
    def test_says_what_is_granted_and_why_the_rest_is_not(
        self, preview, service, public, alice, client, user, scope, refused, granted, left_out
    ):
        seen = preview(client, scope=scope, **({"user_id": user} if user else {}))
        assert (seen["refused"], seen["scopes"]) == (refused, {"granted": granted, "left_out": left_out})
        assert (seen["access_token"] is None) is bool(refused)

    def test_a_third_party_is_shown_as_after_the_consent_that_it_lacks(self, preview, call, alice, new_client):
        new_client("third", is_first_party=False)
        claims = {"id_token": {"email": None}, "userinfo": {"name": None}}
        seen = preview("third", user_id="alice", scope="openid", claims=claims)
        assert seen["consent"] == ["email", "openid", "profile"]
        assert seen["id_token"]["claims"]["email"] == "alice@example.org" and seen["userinfo"]["name"] == "alice"
        assert "username" not in seen["access_token"]["claims"], "only what is agreed to"

    def test_what_keeps_the_user_from_logging_in_is_named(self, preview, call, alice, service):
        call("POST", "/users/alice/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"})
        call("PUT", "/clients/service", {"is_active": False})
        seen = preview("service", user_id="alice", scope="api:read")
        assert seen["obstacles"] == ["locked", "the client is inactive"] and seen["access_token"]

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"user_id": "alice", "claims": {"id_token": 5}}, "claims"), ({"user_id": "alice", "claims": "x"}, "claims"),
            ({"scope": "x" * 5000}, "scope"), ({"scope": 5}, "scope"), ({"user_id": None}, "user_id"),
        ],
    )
    def test_what_is_malformed_is_named(self, call, alice, service, body, member):
        assert list(errors_of(call("POST", "/clients/service/preview", body))) == [member]

    def test_an_acr_that_the_login_would_not_reach_refuses_it(self, preview, alice, service):
        for acr, refused in ((m.TWO_FACTORS, "unmet_authentication_requirements"), (m.ONE_FACTOR, "")):
            claims = {"id_token": {"acr": {"essential": True, "value": acr}}}
            assert preview("service", user_id="alice", scope="openid", claims=claims)["refused"] == refused

    def test_nothing_of_it_is_stored_or_is_a_token(self, preview, call, alice, service, idp):
        seen = preview("service", user_id="alice", scope="openid")
        assert call("GET", f"/sessions/{seen['access_token']['claims']['jti']}").status == 404
        assert idp.store.find_family(seen["id_token"]["claims"]["sid"]) is None
        assert b"eyJ" not in m.ENCODE(seen)
        assert idp.store.list_audit(limit=1)[0].action == "tokens_previewed"

    def test_who_is_unknown_is_not_found(self, call, alice, service):
        assert call("POST", "/clients/service/preview", {"user_id": "nobody"}).status == 404
        assert call("POST", "/clients/nobody/preview", {"user_id": "alice"}).status == 404
