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
