"""What a console asks of ADMIN besides the nouns: checks before a change, previews, invitations, and what lists say."""

import re

import microauthd as m
import pyotp
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.objects import ChangeSecret
from appliance.base.settings import OPTIONS, Options
from appliance.base.store import DELETED


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


class TestWhoIsIn:
    """GET /sessions and /browser-sessions: living ones by person, application, address and login; end one or all."""

    ELSEWHERE = "198.51.100.7"

    @pytest.fixture
    def ids(self, call):
        def ask(query=""):
            answer = call("GET", f"/sessions?{query}")
            assert answer.status == 200, answer
            return {row["id"] for row in answer.json}

        return ask

    @pytest.fixture
    def tokens(self, idp, auth, service, alice, new_user, log_in, machine):
        """Sessions of two people and a machine: {who: answer of the token endpoint}."""
        new_user("bob", ["api:read"])
        body = {"grant_type": "password", "username": "bob", "password": alice.password}
        bob = auth.post("/token", body, auth=service, peer=self.ELSEWHERE, headers=[("User-Agent", "a phone")])
        idp.store.flush()
        return {"alice": log_in(alice), "bob": bob.json, "machine": machine}

    def test_a_session_says_its_login_scope_address_and_browser(self, call, tokens, idp):
        row = call("GET", f"/sessions/{tokens['bob']['jti']}").json
        sid = idp.auth_ring.verify(tokens["bob"]["access_token"], m.AT_JWT)["sid"]
        assert (row["sid"], row["scope"], row["ip_address"], row["user_agent"]) == (
            sid, "api:read", self.ELSEWHERE, "a phone"
        )
        row = call("GET", f"/sessions/{tokens['machine']['jti']}").json
        assert (row["sid"], row["ip_address"], row["user_agent"]) == (None, "", "")

    def test_of_a_login_in_a_browser_it_is_that_browser_not_the_application(self, idp, call, alice, new_client):
        new_client("web")
        m.add_uri(idp, m.LOCAL.acting_as("test"), "web", "redirect", "https://app.example/cb")
        client = m.get_client(idp, "web")
        browser = m.Caller("203.0.113.9", "Firefox")
        handle = m.begin_browser_session(idp, browser, alice.account, ["pwd"], idp.now(), None)
        request = m.AuthorizeRequest("web", "https://app.example/cb", scope="api:read")
        code = m.issue_code(idp, browser, client, request, alice.account, ["pwd"], idp.now(), m.sha256(handle))
        auth = Caller(m.App(idp, m.AUTH))
        secret = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("web"))
        SECRETS.add(secret)
        answer = auth.post(
            "/token", {"grant_type": "authorization_code", "code": code, "redirect_uri": "https://app.example/cb"},
            auth=("web", secret),
        )
        row = call("GET", f"/sessions/{answer.json['jti']}").json
        assert (row["ip_address"], row["user_agent"]) == ("203.0.113.9", "Firefox")

    def test_an_application_learns_neither(self, auth, tokens):
        for row in auth.get("/me/sessions", bearer=tokens["alice"]["access_token"]).json:
            assert not {"ip_address", "user_agent", "sid"} & row.keys()

    def test_filters(self, ids, call, tokens, admin_token, idp):
        jti = {who: answer["jti"] for who, answer in tokens.items()}
        own = idp.admin_ring.verify(admin_token, m.AT_JWT)["jti"]
        sid = call("GET", f"/sessions/{jti['alice']}").json["sid"]
        assert ids() == {*jti.values(), own}
        assert ids("mad_use=admin") == {own} and ids("mad_use=auth") == set(jti.values())
        assert ids(f"ip_address={self.ELSEWHERE}") == {jti["bob"]} and ids("ip_address=203.0.113.1") == set()
        assert ids(f"sid={sid}") == {jti["alice"]} and ids("sid=x") == set() and ids("ip_address=") == set()
        assert ids(f"user_id=bob&ip_address={self.ELSEWHERE}&mad_use=auth&client_id=service") == {jti["bob"]}

    ENDS = (
        ("DELETE", "/sessions/{alice}"), ("POST", "/users/alice/revoke"), ("POST", "/clients/service/revoke"),
        ("POST", "/users/alice/deactivate"), ("DELETE", "/users/alice"), ("PUT", "/clients/service"),
        ("DELETE", "/clients/service"),
    )

    @pytest.mark.parametrize("method, path", ENDS)
    def test_living_is_what_a_guard_would_accept(self, ids, call, tokens, auth, method, path):
        assert ids("living=true") == ids()
        body = {"audience": "another"} if method == "PUT" else None
        path = path.format(alice=tokens["alice"]["jti"])
        assert call(method, path, body).status == 200
        alive = {who for who, answer in tokens.items() if answer["jti"] in ids("living=true")}
        accepted = {who for who, answer in tokens.items() if auth.get("/whoami", bearer=answer["access_token"]).status == 200}
        assert alive == accepted != set(tokens) and ids("living=false") == ids()

    def test_what_expired_does_not_live(self, ids, tokens, clock, call, idp):
        living = ids("living=true")
        clock.pass_(1700)
        assert ids("living=true") == living
        jti = {answer["jti"] for answer in tokens.values()}
        rows, _ = idp.store.list_sessions(living=True, now=idp.now() + 2000)
        assert jti.isdisjoint(row.id for row in rows)

    @pytest.mark.parametrize("query", ["living=x", "mad_use=x", "living=2"])
    def test_nonsense_is_refused_by_name(self, call, query):
        assert list(errors_of(call("GET", f"/sessions?{query}"))) == [query.partition("=")[0]]

    def test_ending_all_ends_everything_and_nothing_of_it_comes_back(self, idp, call, admin, auth, tokens, alice, service):
        handle = m.begin_browser_session(idp, m.LOCAL, alice.account, ["pwd"], idp.now(), None)
        assert call("POST", "/sessions/revoke-all").status == 200
        assert call("GET", "/sessions").status == 401, "the caller's own login too"
        for who in ("alice", "bob", "machine"):
            assert auth.get("/whoami", bearer=tokens[who]["access_token"]).status == 401
        refreshed = auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": tokens["alice"]["refresh_token"]}, auth=service
        )
        assert refreshed.status == 400 and m.find_browser_session(idp, handle) is None
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["access_token"]
        assert auth.get("/whoami", bearer=token).status == 200, "what is issued now lives"
        body = {"username": "root", "password": alice.password}
        again = admin.post("/token", body).json["access_token"]
        alive = admin.get("/sessions?living=true", bearer=again).json
        assert {row["id"] for row in alive}.isdisjoint(answer["jti"] for answer in tokens.values()) and len(alive) >= 1
        assert idp.store.list_audit("everything_revoked")[0].actor_id != "anonymous"

    def test_browsers_are_listed_and_ended(self, idp, call, alice, new_user, clock):
        new_user("bob")
        handles = [
            m.begin_browser_session(idp, m.Caller(peer, "Firefox"), m.get_user(idp, user), ["pwd"], idp.now(), None)
            for peer, user in (("203.0.113.9", "alice"), (self.ELSEWHERE, "bob"), (self.ELSEWHERE, "alice"))
        ]
        listed = call("GET", "/browser-sessions").json
        assert {row["id"] for row in listed} == {m.sha256(handle) for handle in handles}
        assert {row["username"] for row in listed} == {"alice", "bob"} and listed[0]["user_agent"] == "Firefox"
        page = call("GET", "/browser-sessions?limit=2")
        assert len(page.json) == 2 and page.headers["x-total-count"] == "3"
        by = lambda query: [row["username"] for row in call("GET", f"/browser-sessions?{query}").json]  # noqa: E731
        assert by("user_id=bob") == ["bob"] and sorted(by(f"ip_address={self.ELSEWHERE}")) == ["alice", "bob"]
        assert call("DELETE", f"/browser-sessions/{m.sha256(handles[1])}").status == 200
        assert by("user_id=bob") == [] and m.find_browser_session(idp, handles[1]) is None
        assert call("DELETE", "/browser-sessions/nonsense").status == 404
        assert call("GET", "/browser-sessions?user_id=nobody").status == 404
        call("POST", "/users/alice/revoke")
        assert by("") == []

    def test_of_very_many_browsers_those_that_began_last_are_listed_and_those_of_one_user_whole(
        self, idp, call, alice, new_user, monkeypatch
    ):
        monkeypatch.setattr("appliance.base.store.SCAN_MAX", 3)
        new_user("bob")
        ids = [
            m.sha256(m.begin_browser_session(idp, m.LOCAL, m.get_user(idp, user), ["pwd"], idp.now(), None))
            for user in ("bob", "bob", "alice", "alice", "bob")
        ]
        answer = call("GET", "/browser-sessions")
        assert {row["id"] for row in answer.json} == set(ids[2:])
        assert (answer.headers["x-total-count"], answer.headers["x-total-count-relation"]) == ("3", "gte")
        answer = call("GET", "/browser-sessions?user_id=bob")
        assert {row["id"] for row in answer.json} == {ids[0], ids[1], ids[4]}
        assert answer.headers["x-total-count"] == "3" and "x-total-count-relation" not in answer.headers

    def test_browsers_are_read_page_by_page_behind_the_last_row_though_others_are_used_meanwhile(
        self, idp, call, alice, new_user, clock
    ):
        new_user("bob")
        for number in range(7):  # two at a time are used in the same second
            m.begin_browser_session(
                idp, m.LOCAL, m.get_user(idp, "bob" if number == 3 else "alice"), ["pwd"], idp.now() - 20, None
            )
            idp.store.run("UPDATE browser_session SET last_seen_at = :seen WHERE last_seen_at > :seen",
                          seen=idp.now() - 100 + number // 2) if number else None
        expected = [row["id"] for row in call("GET", "/browser-sessions").json]
        idp.store.run("UPDATE account SET is_active = 0 WHERE username = 'bob'")  # whose row no page has to make up for
        expected = [id for id in expected if idp.store.find_browser_session(id).user_id == alice.id]
        path, found = "/browser-sessions?limit=2", []
        while path:
            page = call("GET", path)
            found += [row["id"] for row in page.json]
            assert page.headers["x-total-count"] == "6"
            following = re.search(r'<([^>]*)>; rel="next"', page.headers.get("link", ""))
            path = following and "/browser-sessions" + following[1]
            if path:
                assert "after=" in path and "offset" not in path
                idp.store.touch_browser_session(found[0], idp.now())  # moves to the front, which is behind us
        assert found == expected
        for wrong in ("after=5", "after=-x", "after=x-y"):
            assert list(errors_of(call("GET", f"/browser-sessions?{wrong}"))) == ["after"]
        assert list(errors_of(call("GET", "/browser-sessions?after=5-x&offset=1"))) == ["after"]

    def test_a_browser_that_was_not_used_for_long_is_not_listed(self, idp, call, alice, clock):
        m.begin_browser_session(idp, m.LOCAL, alice.account, ["pwd"], idp.now() - 1, None)
        idp.store.run("UPDATE browser_session SET last_seen_at = last_seen_at - :idle",
                      idle=idp.options.session_idle_expiration)
        assert call("GET", "/browser-sessions").json == []


class TestConsentsOfAll:
    @pytest.fixture
    def agreed(self, idp, alice, new_user, new_client):
        """Two third parties to which people agreed, and one to which nobody did."""
        bob = new_user("bob")
        for name, users in (("one", (alice, bob)), ("two", (alice,)), ("three", ())):
            new_client(name, is_first_party=False)
            for user in users:
                m.give_consent(idp, m.LOCAL, user.account, m.get_client(idp, name), ["openid", "email"])

    def consents(self, call):
        return {name: len(call("GET", f"/clients/{name}/consents").json) for name in ("one", "two", "three")}

    def test_those_for_a_client_are_listed_a_page_at_a_time(self, call, agreed, alice):
        rows = call("GET", "/clients/one/consents").json
        assert {row["username"] for row in rows} == {"alice", "bob"} and rows[0]["scopes"] == ["email", "openid"]
        page = call("GET", "/clients/one/consents?limit=1")
        assert len(page.json) == 1 and page.headers["x-total-count"] == "2" and "rel=\"next\"" in page.headers["link"]
        assert call("GET", "/clients/nobody/consents").status == 404

    def test_those_for_one_client_go_with_what_was_issued_to_it(self, idp, call, agreed, alice, monkeypatch):
        monkeypatch.setattr(m, "SLICE", 1)
        before = {name: m.get_client(idp, name).row.revoked_before for name in ("one", "two")}
        answer = call("DELETE", "/clients/one/consents")
        assert answer.json["message"] == "2 consents revoked." and self.consents(call) == {"one": 0, "two": 1, "three": 0}
        assert m.get_client(idp, "one").row.revoked_before > before["one"]
        assert m.get_client(idp, "two").row.revoked_before == before["two"]
        request = m.AuthorizeRequest("one", "", scope="openid email")
        assert m.lacks_consent(idp, m.get_client(idp, "one"), alice.account, request)

    def test_what_was_issued_meanwhile_ends_too(self, idp, call, auth, agreed, alice, log_in, monkeypatch):
        monkeypatch.setattr(m, "SLICE", 1)
        secret = call("POST", "/clients/secret", {"client_id": "one"}).json["message"]
        SECRETS.add(secret)
        issued = []

        def pause(seconds):
            if not issued:
                issued.append(log_in(alice, ("one", secret), scope="api:read")["access_token"])

        monkeypatch.setattr(m, "sleep", pause)
        assert call("DELETE", "/clients/one/consents").status == 200
        assert auth.get("/me", bearer=issued[0]).status == 401

    def test_those_for_a_client_that_is_being_deleted_are_in_nobodys_way(self, idp, call, agreed, change):
        change("UPDATE client SET client_id = :deleted || id WHERE client_id = 'two'", deleted=DELETED)
        assert call("DELETE", "/consents").json["message"] == "2 consents revoked."

    def test_those_for_every_client(self, idp, call, agreed):
        three = m.get_client(idp, "three").row.revoked_before
        assert call("DELETE", "/consents").json["message"] == "3 consents revoked."
        assert self.consents(call) == {"one": 0, "two": 0, "three": 0}
        assert m.get_client(idp, "three").row.revoked_before == three, "nothing was issued there on a consent"
        assert call("DELETE", "/consents").json["message"] == "0 consents revoked."


class TestWhatAListSaysOfUsers:
    @pytest.fixture
    def crowd(self, idp, call, new_user, give_totp, clock):
        """Users who differ in what the filters ask for."""
        for name in ("admin", "ops", "locked", "code", "factor", "asleep"):
            new_user(name)
        call("POST", "/roles", {"name": "operators"})
        call("POST", "/roles/assign", {"user_id": "admin", "role_id": "MadAdmin"})
        for name in ("ops", "admin"):
            call("POST", "/roles/assign", {"user_id": name, "role_id": "operators"})
        call("POST", "/users/locked/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z", "reason": " stolen phone "})
        account = m.get_user(idp, "factor")
        give_totp(idp, account)
        m.make_recovery_codes(idp, m.LOCAL, account.id)
        idp.store.run("UPDATE account SET last_login_at = :now WHERE username <> 'asleep'", now=idp.now())
        idp.store.run("UPDATE account SET totp_locked_until = :at WHERE username = 'code'", at=idp.now() + 60)

    def test_its_members(self, call, crowd, idp):
        factor, locked, admin = (call("GET", f"/users/{name}").json for name in ("factor", "locked", "admin"))
        assert (factor["recovery_codes_left"], factor["totp_enabled"], factor["roles"]) == (10, True, [])
        assert (locked["lockout_reason"], locked["lockout_by"]) == ("stolen phone", "root")
        assert (admin["is_admin"], admin["roles"]) == (True, ["MadAdmin", "operators"])
        assert admin["last_login_at"] == m.iso(idp.now()) and call("GET", "/users/asleep").json["last_login_at"] is None
        assert call("GET", "/users/code").json["totp_locked_until"] == m.iso(idp.now() + 60)
        assert {row["username"]: row for row in call("GET", "/users").json}["admin"] == admin
        assert call("GET", "/roles/operators/users").json[0] == admin

    @pytest.mark.parametrize(
        "query, names",
        [
            ("is_admin=true", "admin root"), ("is_admin=false", "asleep code factor locked ops"),
            ("locked=true", "code locked"), ("locked=false", "admin asleep factor ops root"),
            ("totp=true", "factor"), ("totp=false&is_admin=true", "admin root"), ("role=operators", "admin ops"),
            ("role=operators&q=op", "ops"), ("unused_since=2020-01-01", "asleep"),
            ("unused_since=2999-01-01T00:00:00Z", "admin asleep code factor locked ops root"), ("unused_since=", ""),
        ],
    )
    def test_its_filters(self, call, crowd, query, names):
        page = call("GET", f"/users?{query}")
        names = names or "admin asleep code factor locked ops root"
        assert page.status == 200 and [row["username"] for row in page.json] == names.split()
        assert page.headers["x-total-count"] == str(len(page.json))

    @pytest.mark.parametrize(
        "query, status", [("locked=2", 400), ("totp=x", 400), ("unused_since=soon", 400), ("role=nobody", 404)]
    )
    def test_nonsense_is_refused(self, call, query, status):
        assert call("GET", f"/users?{query}").status == status

    def test_a_delegated_caller_learns_none_of_it(self, auth, new_client, crowd):
        client = new_client("desk", scopes=["admin:list_users", "admin:read_user"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        for row in (*auth.get("/users?is_admin=true", bearer=token).json, auth.get("/user/ops", bearer=token).json):
            assert not {"roles", "is_admin", "lockout_reason", "last_login_at"} & row.keys()
        assert len(auth.get("/users?is_admin=true", bearer=token).json) == 7, "no such filter there"

    def test_a_lockout_has_a_reason_of_its_own_only(self, idp, call, crowd, clock, auth, service):
        assert call("POST", "/users/locked/clear-lockout").status == 200
        row = call("GET", "/users/locked").json
        assert (row["lockout_until"], row["lockout_reason"], row["lockout_by"]) == (None, "", "")
        call("POST", "/users/locked/set-lockout", {"lockout_until": idp.now() + 60, "reason": "for a minute"})
        clock.pass_(61)
        body = {"grant_type": "password", "username": "locked", "password": "wrong wrong"}
        for _ in range(idp.options.max_login_failures):
            auth.post("/token", body, auth=service)
        row = idp.store.find_account_by_name("locked")
        assert row.lockout_until > idp.now() and (row.lockout_reason, row.lockout_by) == ("", "")

    @pytest.mark.parametrize("reason", ["x" * 201, "a\nb", "\u202eabc"])
    def test_a_reason_that_could_not_be_shown_is_refused(self, call, alice, reason):
        body = {"lockout_until": "9999-12-31T23:59:59Z", "reason": reason}
        assert list(errors_of(call("POST", "/users/alice/set-lockout", body))) == ["reason"]


class TestRecoveryCodesByAnAdministrator:
    def test_confirming_a_second_factor_shows_codes_that_work(self, idp, call, alice):
        seed = call("POST", "/users/alice/totp/enroll", {}).json["secret"]
        SECRETS.add(seed)
        codes = call("POST", "/users/alice/totp/verify", {"code": pyotp.TOTP(seed).at(idp.now())}).json["recovery_codes"]
        SECRETS.update(codes)
        assert len(codes) == 10 and call("GET", "/users/alice").json["recovery_codes_left"] == 10
        assert idp.store.spend_recovery_code(alice.id, m.sha256(m.fold_recovery_code(codes[0])), idp.now())
        assert call("GET", "/users/alice").json["recovery_codes_left"] == 9
        again = call("POST", "/users/alice/recovery-codes").json["recovery_codes"]
        SECRETS.update(again)
        assert not idp.store.spend_recovery_code(alice.id, m.sha256(m.fold_recovery_code(codes[1])), idp.now())

    def test_without_a_second_factor_there_are_none(self, call, alice):
        assert list(errors_of(call("POST", "/users/alice/recovery-codes"))) == ["id"]
        assert call("POST", "/users/nobody/recovery-codes").status == 404


class TestWhatAListSaysOfClients:
    def test_when_a_client_got_a_token_last_is_known_within_a_minute(self, idp, call, auth, service, alice, log_in, clock):
        last = lambda: call("GET", "/clients/service").json["last_token_at"]  # noqa: E731
        assert last() is None
        auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        idp.store.flush()
        first = m.iso(idp.now())
        assert last() == first
        clock.pass_(59)
        log_in(alice)
        assert last() == first, "not a write for each token"
        clock.pass_(1)
        log_in(alice)
        assert last() == m.iso(idp.now())

    def test_when_a_secret_was_used_last_is_known_within_a_minute(self, idp, call, auth, service, alice, log_in, clock):
        made = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=600))
        SECRETS.add(made)

        def used():
            idp.store.flush()
            rows = call("GET", "/clients/service/secrets").json
            return [row["last_used_at"] for row in rows]

        assert used() == [None, None], "the new one first"
        auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        first = m.iso(idp.now())
        assert used() == [None, first]
        clock.pass_(59)
        auth.post("/introspect", {"token": "x"}, auth=service)
        assert used() == [None, first], "not a write for each use"
        clock.pass_(1)
        assert auth.post("/introspect", {"token": "x"}, auth=(service[0], "wrong")).status == 401
        assert used() == [None, first], "a wrong secret is no use of one"
        auth.post("/introspect", {"token": "x"}, auth=service)
        log_in(alice, (service[0], made))
        now = m.iso(idp.now())
        assert used() == [now, now], "in the order of the list, whatever it is used for"

    @pytest.mark.parametrize("method, path, body", [("DELETE", "", None), ("PUT", "", {"client_id": "renamed"})])
    def test_an_identifier_that_goes_is_forgotten(self, idp, call, service, alice, log_in, method, path, body):
        log_in(alice)
        assert call(method, f"/clients/service{path}", body).status == 200
        made = call("POST", "/clients", {"client_id": "service"}).json
        SECRETS.add(made["client_secret"])
        assert made["last_token_at"] is None and idp.store.last_token_at("service") == 0

    @pytest.mark.parametrize(
        "query, names",
        [
            ("client_type=public", "spa"), ("client_type=confidential", "off service"), ("is_active=false", "off"),
            ("is_active=true", "service spa"), ("grant_type=password", "service spa"),
            ("grant_type=client_credentials", "off service"), ("grant_type=client_credentials&is_active=true", "service"),
        ],
    )
    def test_its_filters(self, call, service, public, new_client, query, names):
        new_client("off", grant_types=["client_credentials"])
        call("PUT", "/clients/off", {"is_active": False})
        assert sorted(row["client_id"] for row in call("GET", f"/clients?{query}").json) == names.split()

    def test_a_list_says_of_each_what_the_client_itself_says(self, idp, call, auth, service, public, new_client):
        new_client("bare", scopes=[])
        scope = call("POST", "/scopes", {"name": "aaa"}).json["id"]
        assert call("POST", "/clients/service/scopes", {"scope_ids": [scope]}).status == 200
        auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
        idp.store.flush()
        rows = {row["client_id"]: row for row in call("GET", "/clients").json}
        assert rows == {name: call("GET", f"/clients/{name}").json for name in ("bare", "service", "spa")}
        assert rows["service"]["last_token_at"] and not rows["bare"]["scopes"] and len(rows["service"]["scopes"]) > 1
        assert call("GET", f"/scopes/{scope}/clients").json == [rows["service"]]

    def test_a_long_list_asks_no_question_for_each(self, idp, call, new_client):
        def asked():
            said = []
            idp.store.connection.set_trace_callback(said.append)
            call("GET", "/clients")
            idp.store.connection.set_trace_callback(None)
            return len(said)

        new_client("first")
        before = asked()
        for number in range(5):
            new_client(f"client{number}")
        assert asked() == before

    @pytest.mark.parametrize("query", ["client_type=x", "is_active=x", "grant_type=word"])
    def test_nonsense_is_refused(self, call, query):
        assert list(errors_of(call("GET", f"/clients?{query}"))) == [query.partition("=")[0]]


class TestTheAuditLogByWhatOneAsks:
    """GET /audit-logs and /export by result, address, request and person."""

    ELSEWHERE = "198.51.100.7"

    @pytest.fixture
    def events(self, idp, call, auth, alice, new_user, service):
        new_user("bob")
        call("POST", "/roles", {"name": "ops"})
        call("POST", "/roles/assign", {"user_id": "alice", "role_id": "ops"})
        call("POST", "/roles/assign", {"user_id": "bob", "role_id": "ops"})
        call("POST", "/clients/service/preview", {"user_id": "alice"})
        body = {"grant_type": "password", "username": "alice", "password": "wrong wrong"}
        auth.post("/token", body, auth=service, peer=self.ELSEWHERE)
        with idp.store.transaction():
            m.audit(idp, m.Caller(self.ELSEWHERE, "", "req-7"), "act", "x", "user_id=" + alice.id + "0")

    def actions(self, call, query):
        answer = call("GET", f"/audit-logs?{query}")
        exported = call("GET", f"/audit-logs/export?{query}")
        assert answer.status == exported.status == 200, answer
        lines = [m.msgspec.json.decode(line) for line in exported.body.splitlines()]
        assert [row["id"] for row in lines] == [row["id"] for row in reversed(answer.json)], "the export agrees"
        assert answer.headers["x-total-count"] == str(len(answer.json))
        return [row["action"] for row in answer.json]

    def test_filters(self, call, events, alice, root):
        assert set(self.actions(call, f"ip_address={self.ELSEWHERE}")) == {"act", "user_login_failed"}
        assert self.actions(call, "request_id=req-7") == ["act"] and self.actions(call, "request_id=x") == []
        failures = self.actions(call, "result=failure")
        assert "user_login_failed" in failures and "role_assigned" not in failures
        assert self.actions(call, "result=success&action=role_assigned") == ["role_assigned"] * 2
        about = self.actions(call, "about=alice")
        assert {"user_created", "role_assigned", "tokens_previewed", "user_login_failed"} <= set(about)
        assert about.count("role_assigned") == 1 and "act" not in about, "not one whose id only begins like it"
        assert about == self.actions(call, f"about={alice.id}")

    def test_a_user_who_is_gone_is_found_by_id(self, call, events, alice):
        call("DELETE", "/users/alice")
        assert self.actions(call, f"about={alice.id}")[0] == "delete_user"
        assert "role_assigned" not in self.actions(call, "about=alice"), "the name may be another's by now"

    @pytest.mark.parametrize("path", ["/audit-logs", "/audit-logs/export"])
    @pytest.mark.parametrize("query", ["result=x", "since=soon", "until=later"])
    def test_nonsense_is_refused_by_name(self, call, path, query):
        assert list(errors_of(call("GET", f"{path}?{query}"))) == [query.partition("=")[0]]

    def test_its_words_are_listed(self, call, events):
        words = call("GET", "/audit-logs/actions").json
        assert {"act", "role_assigned", "user_login_failed"} <= set(words) and words == sorted(set(words))


class TestManySessions:
    """A request searches some of them, and says where the search goes on."""

    PART = 15

    @pytest.fixture
    def many(self, idp, call, new_client, service, clock, monkeypatch):
        """120 tokens, one a second, each thirtieth of a client that seldom asks; the first 50 have expired."""
        new_client("rare")
        monkeypatch.setattr("appliance.base.store.SCAN_MAX", self.PART)
        for number in range(120):
            jti, now = m.new_jti(int(idp.now() * 1000) + number), idp.now()
            client_id = "rare" if number % 30 == 5 else "service"
            # Those in the middle live longest.
            idp.store.enqueue((jti, client_id, "", now, now + (1 if number < 50 else 4000 - abs(number - 80))), None)
        idp.store.flush()
        clock.pass_(2)
        return idp.store

    def follow(self, call, query):
        """The rows of all pages as Link leads on, and how many pages there were."""
        rows, pages, path = [], 0, f"/sessions?{query}"
        while path:
            answer = call("GET", path)
            assert answer.status == 200, answer
            rows, pages = rows + [row["id"] for row in answer.json], pages + 1
            link = answer.headers.get("link", "")
            path = "/sessions" + link.split("<")[1].split(">")[0] if link.startswith("<") and 'rel="next"' in link else ""
            assert pages < 100
        return rows, pages

    @pytest.mark.parametrize("limit", [1000, 4])
    @pytest.mark.parametrize("sort", ["-id", "id"])
    @pytest.mark.parametrize(
        "wanted",
        [{"client_id": "rare"}, {"client_id": "rare", "living": True}, {"living": True}, {"mad_use": "admin"}, {},
         {"mad_use": "auth", "living": True, "client_id": "service"}],
    )  # fmt: skip
    def test_every_one_is_found_once(self, idp, call, many, wanted, sort, limit):
        every, _ = many.list_sessions(sort=sort, now=idp.now(), **wanted)
        query = "&".join(f"{name}={str(value).replace('True', 'true')}" for name, value in wanted.items())
        found, pages = self.follow(call, f"limit={limit}&sort={sort}&{query}")
        assert found == [row.id for row in every] and every
        assert pages >= 8 or "client_id" not in wanted

    @pytest.mark.parametrize("query", ["client_id=rare", "living=true&client_id=rare", "mad_use=admin", "client_id=rare&sort=id"])
    def test_a_request_reads_no_more_than_some(self, call, many, query):
        said = []
        many.connection.set_trace_callback(said.append)
        answer = call("GET", f"/sessions?limit=50&{query}")
        many.connection.set_trace_callback(None)
        of_sessions = [sql for sql in said if "FROM session" in sql and "ORDER BY" in sql]
        assert of_sessions and all(f"LIMIT {self.PART}" in sql for sql in of_sessions)
        assert answer.headers["x-total-count-relation"] == "gte" and int(answer.headers["x-total-count"]) <= 1

    @pytest.mark.parametrize("sort", ["-id", "expires_at"])
    def test_what_is_counted_of_a_part_is_a_lower_bound(self, call, many, sort):
        headers = call("GET", f"/sessions?client_id=service&limit=2&sort={sort}").headers
        assert (headers["x-total-count"], headers["x-total-count-relation"]) == (str(self.PART), "gte")

    @pytest.mark.parametrize("sort", ["expires_at", "-expires_at"])
    @pytest.mark.parametrize("query", ["living=true", "client_id=service", ""])
    def test_in_the_order_of_expiry_are_the_newest(self, idp, call, many, sort, query):
        newest = many.list_sessions(limit=self.PART)[0]
        newest = [row for row in newest if row.client_id == "service" or "client_id" not in query]
        newest.sort(key=lambda row: (row.expires_at if sort == "expires_at" else -row.expires_at, row.id))
        found, _ = self.follow(call, f"limit=4&sort={sort}&{query}")
        assert found == [row.id for row in newest]
        answer = call("GET", f"/sessions?limit=50&sort={sort}&{query}")
        assert (answer.headers["x-total-count"], answer.headers["x-total-count-relation"]) == (str(len(newest)), "gte")

    def test_what_an_index_finds_is_found_whole(self, idp, call, many, alice, log_in):
        for _ in range(self.PART + 5):
            log_in(alice)
        for query in ("user_id=alice", "user_id=alice&living=true", "user_id=alice&sort=expires_at&client_id=service"):
            answer = call("GET", f"/sessions?{query}")
            assert len(answer.json) == self.PART + 5 == int(answer.headers["x-total-count"]), query

    def test_what_ended_with_everything_is_not_searched(self, idp, call, many, admin, auth, service, clock):
        assert call("POST", "/sessions/revoke-all").status == 200
        clock.pass_(1)
        token = admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "test"}).json["access_token"]
        answer = admin.get("/sessions?living=true&client_id=rare", bearer=token)
        assert answer.json == [] and "link" not in answer.headers, "at once"


class TestALongAuditLog:
    """A request searches a part of it, and says where the search goes on."""

    PART = 20

    @pytest.fixture(params=["", "purged"])
    def long(self, request, idp, call, clock, monkeypatch):
        """200 rows, ten seconds from one to the next: each third a refusal, each fiftieth rare."""
        monkeypatch.setattr("appliance.base.store.SCAN_MAX", self.PART)
        store = idp.store
        with store.transaction():
            for number in range(200):
                action = "rare" if number % 50 == 0 else "usual"
                row = (idp.now(), "test", action, f"n{number}", "", "192.0.2.7", "agent", f"r{number}", "success")
                (store.append_refusals if number % 3 == 0 else store.append_audit)([row])
                clock.pass_(10)
        if request.param:
            store.purge_refusals(2**40, 20)
            store.purge_audit(2**40, 5)
        return store

    def whole(self, store):
        """Every row, the oldest first."""
        both = " UNION ALL ".join(f"SELECT seq, target, action, at FROM {table}" for table in ("audit", "audit_refusal"))
        return store.connection.execute(f"SELECT seq, target, action, at FROM ({both}) ORDER BY seq").fetchall()

    def follow(self, call, path):
        """The rows of all pages as Link leads on, and how many pages there were."""
        rows, pages = [], 0
        while path:
            answer = call("GET", path)
            rows, pages = rows + [int(row["id"]) for row in answer.json], pages + 1
            link = answer.headers.get("link", "")
            path = "/audit-logs" + link.split("<")[1].split(">")[0] if link.startswith("<") and 'rel="next"' in link else ""
            assert pages < 100
        return rows, pages

    @pytest.mark.parametrize("limit", [1000, 7])
    @pytest.mark.parametrize("begin", ["", "before=100", "offset=30", "offset=190", "after=100"])
    @pytest.mark.parametrize("wanted", ["", "action=rare", "action=none"])
    def test_every_row_is_found_once(self, call, long, wanted, begin, limit):
        path = f"/audit-logs?limit={limit}&{wanted}&{begin}"
        rows = [
            seq for seq, _, action, _ in self.whole(long)
            if wanted in ("", f"action={action}")
        ]
        name, _, number = begin.partition("=")
        found, pages = self.follow(call, path)
        kept = {
            "": lambda: rows[::-1], "before": lambda: [seq for seq in rows if seq < 100][::-1],
            "offset": lambda: rows[::-1][int(number):], "after": lambda: [seq for seq in rows if seq > int(number)],
        }[name]()
        assert found == kept
        assert not wanted or pages > 3, "no request searches more than a part"

    def test_a_request_reads_no_more_than_a_part_of_it(self, call, long):
        for path in ("/audit-logs?action=none", "/audit-logs?after=0&action=none", "/audit-logs/export?action=none"):
            said = []
            long.connection.set_trace_callback(said.append)
            call("GET", path)
            long.connection.set_trace_callback(None)
            spans = [re.findall(r"seq BETWEEN ([0-9]+) AND ([0-9]+)", sql) for sql in said if "'none'" in sql]
            assert spans and all(int(end) - int(begin) < self.PART for span in spans for begin, end in span), path

    def test_a_total_of_more_than_a_part_is_a_lower_bound(self, call, long):
        for query, total in (("action=rare", "0"), ("action=usual", "20"), ("before=100&action=usual&limit=3", "3")):
            headers = call("GET", f"/audit-logs?{query}").headers
            assert (headers["x-total-count"], headers["x-total-count-relation"]) == (total, "gte")
        headers = call("GET", "/audit-logs?limit=1").headers
        assert headers["x-total-count"] == str(len(self.whole(long))) and "x-total-count-relation" not in headers

    def test_a_deep_offset_into_the_whole_log_reads_no_rows_to_skip_them(self, call, long):
        newest = self.whole(long)[::-1]
        said = []
        long.connection.set_trace_callback(said.append)
        answer = call("GET", "/audit-logs?limit=3&offset=120")
        long.connection.set_trace_callback(None)
        assert [int(row["id"]) for row in answer.json] == [row[0] for row in newest[120:123]]
        assert any("OFFSET 0" in sql for sql in said) and not any("OFFSET 120" in sql for sql in said)

    @pytest.mark.parametrize("places", [8, 256])
    @pytest.mark.parametrize("first, last", [(0, 50), (95, 105), (150, 199), (199, 300), (-9, -1), (300, 301)])
    def test_rows_of_a_time_are_found_without_reading_those_of_another(
        self, idp, call, long, clock, monkeypatch, places, first, last
    ):
        monkeypatch.setattr("appliance.base.store.AUDIT_PLACES", places)
        monkeypatch.setattr("appliance.base.store.CLOCK_SLACK", 30)
        begin = idp.now() - 2000
        since, until = begin + first * 10, begin + last * 10
        wanted = [row[0] for row in self.whole(long)[::-1] if since <= row[3] <= until]
        found, pages = self.follow(call, f"/audit-logs?since={since}&until={until}&action=usual&limit=1000")
        usual = {row[0] for row in self.whole(long) if row[2] == "usual"}
        assert found == [seq for seq in wanted if seq in usual]
        assert pages <= (last - first) // self.PART + 4

    def test_a_clock_that_ran_ahead_hides_nothing_that_came_later(self, idp, call, long, clock, monkeypatch):
        monkeypatch.setattr("appliance.base.store.AUDIT_PLACES", 8)
        now = idp.now()
        with long.transaction():
            long.run("UPDATE audit SET at = at + 1000000 WHERE seq BETWEEN 60 AND 120")
        for query, kept in (
            (f"until={now}", lambda at: at <= now), (f"since={now - 300}", lambda at: at >= now - 300),
        ):
            found, _ = self.follow(call, f"/audit-logs?{query}&limit=1000")
            assert found == [row[0] for row in self.whole(long)[::-1] if kept(row[3])]

    def test_whoever_follows_it_is_told_how_far_it_was_searched(self, idp, call, long):
        last = self.whole(long)[-1][0]
        part = call("GET", f"/audit-logs?after={last - 30}&action=none")
        assert part.json == [] and part.headers["x-next-after"] == str(last - 10)
        assert f"after={last - 10}" in part.headers["link"]
        rest = call("GET", f"/audit-logs?after={last - 10}&action=none")
        assert rest.headers["x-next-after"] == str(last) and "link" not in rest.headers
        assert call("GET", f"/audit-logs?after={last + 9}").headers["x-next-after"] == str(last + 9)

    def test_an_export_goes_on_where_a_part_ends(self, call, long):
        lines, after, parts = [], "0", 0
        while after:
            answer = call("GET", f"/audit-logs/export?action=rare&after={after}")
            lines += [m.msgspec.json.decode(line)["target"] for line in answer.body.splitlines()]
            after, parts = answer.headers.get("x-next-after"), parts + 1
        assert lines == [row[1] for row in self.whole(long) if row[2] == "rare"] and parts > 5

    def test_it_goes_one_way_at_a_time(self, call):
        assert list(errors_of(call("GET", "/audit-logs?before=5&after=1"))) == ["before"]
        assert list(errors_of(call("GET", "/audit-logs?before=-1"))) == ["before"]


class TestTheNameOfARequest:
    """request_id in every Err: as in the log and the audit log. Connections send it with every answer, in X-Request-Id."""

    @pytest.mark.parametrize(
        "method, path, status",
        [
            ("GET", "/users/nobody", 404), ("GET", "/nowhere", 404), ("PATCH", "/users", 405), ("POST", "/users", 415),
            ("POST", "/roles", 415), ("DELETE", "/users/root", 409),
        ],
    )
    def test_every_err_of_admin_carries_it(self, call, method, path, status):
        answer = call(method, path)
        assert (answer.status, answer.json["request_id"]) == (status, "r1")

    @pytest.mark.parametrize("headers", [[("Sec-Fetch-Site", "cross-site")], [("Host", "evil.example")]])
    def test_also_what_reaches_no_route(self, admin, headers):
        answer = admin.get("/users", headers=headers)
        assert answer.status in (403, 421) and answer.json["request_id"] == "r1"

    def test_an_error_of_oauth_has_it_in_the_header_alone(self, auth, service):
        """RFC 6749 §5.2"""
        answer = auth.post("/token", {"grant_type": "x"}, auth=service)
        assert answer.json.keys() == {"error", "error_description"}


class TestSettings:
    """GET /options: every setting, and no secret."""

    def test_each_says_value_origin_default_and_meaning(self, make_idp):
        secret = "a passphrase of the database"
        SECRETS.add(secret)
        options = Options({"db-pass": "environment MAD_DB_PASS"}, **CHEAP, db_pass=secret, token_expiration=77)
        shown = {row.name: row for row in m.admin_list_options(make_idp(options), {}, None)}
        assert shown.keys() == {option.name for option in OPTIONS}
        row = shown["token-expiration"]
        assert (row.value, row.default, row.is_secret) == (77, 3600, False) and "seconds" in row.meaning
        row = shown["db-pass"]
        assert (row.value, row.default, row.is_secret, row.origin) == ("(set)", "", True, "environment MAD_DB_PASS")
        assert secret not in str(shown)

    def test_they_are_json_as_described(self, call):
        rows = call("GET", "/options").json
        m.msgspec.convert(rows, list[m.OptionObject])
        assert {row["name"]: row["value"] for row in rows}["trusted-proxies"] == []


class TestTheMatrix:
    """GET /roles?with=, and POST /check-access with explain."""

    @pytest.fixture
    def matrix(self, call, alice, new_user):
        new_user("bob")
        for path, body in (
            ("/roles", {"name": "ops"}), ("/roles", {"name": "empty"}), ("/permissions", {"name": "door.open"}),
            ("/permissions", {"name": "alarm.off"}), ("/roles/ops/permissions", {"permission_id": "door.open"}),
            ("/roles/ops/permissions", {"permission_id": "alarm.off"}),
            ("/roles/assign", {"user_id": "alice", "role_id": "ops"}), ("/roles/assign", {"user_id": "bob", "role_id": "ops"}),
        ):
            assert call("POST", path, body).status == 200

    def test_a_list_of_roles_has_what_is_asked_for(self, call, matrix):
        def of(query):
            return {role["name"]: role for role in call("GET", f"/roles{query}").json}

        both = of("?with=permissions,user_count")
        assert [row["name"] for row in both["ops"]["permissions"]] == ["alarm.off", "door.open"]
        assert (both["ops"]["user_count"], both["empty"]["user_count"], both["MadAdmin"]["user_count"]) == (2, 0, 1)
        assert both["empty"]["permissions"] == [] and "user_count" not in of("?with=permissions")["ops"]
        assert of("")["ops"] == call("GET", "/roles/ops").json

    def test_nonsense_is_refused_by_name(self, call):
        assert list(errors_of(call("GET", "/roles?with=everything"))) == ["with"]

    @pytest.mark.parametrize(
        "body, access, reason, roles",
        [
            ({"user_id": "alice", "permission": "door.open"}, True, "a role of the user has this permission", ["ops"]),
            ({"user_id": "root", "permission": "door.open"}, False, "no role of the user has this permission", []),
            ({"user_id": "root", "permission": "x"}, False, "there is no such permission", []),
            ({"user_id": "nobody", "permission": "door.open"}, False, "there is no such user", []),
            ({"user_id": "asleep", "permission": "door.open"}, False, "the user is inactive", []),
            ({"user_id": "alice", "scope": "api:read"}, True, "the user has this scope", []),
            ({"user_id": "alice", "scope": "api:write"}, False, "the user does not have this scope", []),
            ({"user_id": "alice", "scope": "x"}, False, "there is no such scope", []),
        ],
    )
    def test_a_verdict_says_why(self, call, matrix, new_user, body, access, reason, roles):
        new_user("asleep")
        call("POST", "/users/asleep/deactivate")
        verdict = call("POST", "/check-access", body | {"explain": True}).json
        assert verdict == {"access": access, "reason": reason, "by_roles": roles}
        assert call("POST", "/check-access", body).json == {"access": access}, "only if it is asked to"


class TestTheInspectorOfTokens:
    """POST /introspect of ADMIN: tokens of every kind, and why one is not active."""

    @pytest.fixture
    def inspect(self, call):
        return lambda token: call("POST", "/introspect", {"token": token})

    def test_every_kind_is_known(self, inspect, log_in, alice, admin_token):
        given = log_in(alice, scope="openid")
        kinds = {
            "access": given["access_token"], "id": given["id_token"], "refresh": given["refresh_token"],
            "admin": admin_token,
        }
        told = {kind: inspect(token).json for kind, token in kinds.items()}
        assert all(told[kind]["kind"] == kind and told[kind]["valid"] for kind in kinds)
        active = {kind for kind in kinds if told[kind]["active"]}
        assert active == {"access", "refresh", "admin"} == {kind for kind in kinds if told[kind]["reason"] == ""}
        assert told["refresh"]["sub"] == alice.id and told["refresh"]["scope"] == "openid"

    def test_why_one_is_not_active(self, inspect, call, log_in, alice, auth, service, clock, admin):
        given = log_in(alice)
        body = {"grant_type": "refresh_token", "refresh_token": given["refresh_token"]}
        successor = auth.post("/token", body, auth=service).json["refresh_token"]
        assert inspect(given["refresh_token"]).json["reason"] == "rotated" and inspect(successor).json["active"]
        call("POST", "/users/alice/revoke")
        assert inspect(given["access_token"]).json["reason"] == "its user is gone, inactive or was revoked"
        assert inspect(successor).json["reason"] == "revoked"
        clock.pass_(3600)
        fresh = admin.post("/token", {"username": "root", "password": alice.password}).json["access_token"]
        told = admin.post("/introspect", bearer=fresh, json_body={"token": given["access_token"]}).json
        assert (told["reason"], told["expired"]) == ("expired", True)

    def test_why_one_is_none_of_ours(self, idp, inspect, machine, change):
        header, claims, signature = machine["access_token"].split(".")
        kid = m.msgspec.json.decode(m.unb64url(header))["kid"]
        part = lambda members: m.b64url(m.ENCODE(members))  # noqa: E731
        own = {"iss": "https://idp.example"}
        for token, reason in (
            (f"{header}.{claims}.{signature[:-4]}AAAA", "has a wrong signature"),
            (f"{part({'kid': 'x'})}.{part(own)}.x", "was signed by a key that is not of this server"),
            (f"{part({'kid': 'x'})}.{part({'iss': 'https://elsewhere.example'})}.x", "was issued by another server"),
            (f"{part({'alg': 'none'})}.{part(own)}.", "was signed by a key that is not of this server"),
            (f"{part({'kid': ['x']})}.{part(own)}.x", "was signed by a key that is not of this server"),
            ("nonsense", "is not a token of this server"), ("x" * 10_000, "is not a token of this server"),
            (f"{m.b64url(b'no JSON')}.x.x", "is not a token of this server"),
            (f"{part([1])}.{part(own)}.x", "is not a token of this server"), ("a.b.c", "is not a token of this server"), ("..", "is not a token of this server"),
        ):
            assert errors_of(inspect(token)) == {"token": reason}
        with idp.store.transaction():
            idp.store.revoke_kids(["x"])
        assert errors_of(inspect(f"{part({'kid': 'x'})}.{part(own)}.x")) == {"token": "was signed by a key that was revoked"}
        assert kid


class TestListsWithinAnObject:
    """RFC 9110 §13.1.1: of two who change the same list, the second is told."""

    @pytest.mark.parametrize(
        "path, body, other",
        [
            ("/users/alice/roles", {"roles": [{"id": "ops"}]}, {"roles": []}),
            ("/users/alice/scopes", {"scope_ids": ["api:write"]}, {"scope_ids": []}),
            ("/clients/service/scopes", {"scope_ids": ["api:secret"]}, {"scope_ids": ["api:read"]}),
        ],
    )
    def test_a_change_that_was_not_seen_is_not_overwritten(self, call, alice, service, path, body, other):
        call("POST", "/roles", {"name": "ops"})
        tag = call("GET", path).headers["etag"]
        assert call("PUT", path, body, headers=[("If-Match", tag)]).status == 200
        seen = call("GET", path)
        assert seen.headers["etag"] != tag
        assert call("PUT", path, other, headers=[("If-Match", tag)]).status == 412
        assert call("GET", path).json == seen.json
        assert call("PUT", path, other).status == 200, "without the field nothing is compared"

    def test_scopes_are_replaced_all_or_none(self, call, idp, alice, service):
        names = lambda path: [row["name"] for row in call("GET", path).json]  # noqa: E731
        answer = call("PUT", "/users/alice/scopes", {"scope_ids": ["api:write", "api:secret", "api:write"]})
        assert [row["name"] for row in answer.json] == names("/users/alice/scopes") == ["api:secret", "api:write"]
        assert answer.headers["etag"] == call("GET", "/users/alice/scopes").headers["etag"]
        assert list(errors_of(call("PUT", "/users/alice/scopes", {"scope_ids": ["api:read", "x"]}))) == ["scope_ids"]
        assert names("/users/alice/scopes") == ["api:secret", "api:write"]
        before = idp.store.list_audit(limit=1)[0].seq
        assert call("PUT", "/users/alice/scopes", {"scope_ids": ["api:write", "api:secret"]}).status == 200
        assert idp.store.list_audit(after=before) == [], "nothing was changed"
        assert call("PUT", "/clients/service/scopes", {"scope_ids": []}).json == []

    @pytest.mark.parametrize("path", ["redirect-uris", "post-logout-redirect-uris", "cors-origins"])
    def test_lists_of_uris_have_a_tag(self, call, public, path):
        tag = call("GET", f"/clients/spa/{path}").headers["etag"]
        call("POST", f"/clients/spa/{path}", "https://app.example")
        assert call("GET", f"/clients/spa/{path}").headers["etag"] != tag


class TestPages:
    def test_a_page_names_those_around_it(self, call, new_user):
        for number in range(6):
            new_user(f"user{number}")
        links = lambda query: dict(  # noqa: E731
            (rel, at) for at, rel in re.findall(r'offset=([0-9]+)>; rel="([a-z]+)"', call("GET", query).headers.get("link", ""))
        )
        assert links("/users?limit=3") == {"next": "3"}
        assert links("/users?limit=3&offset=3") == {"next": "6", "prev": "0", "first": "0"}
        assert links("/users?limit=3&offset=6") == {"prev": "3", "first": "0"}
        assert links("/users?limit=100") == {}
        page = call("GET", "/users?limit=2&offset=4&q=user&sort=-username").headers["link"]
        assert page.count("q=user&sort=-username&limit=2&offset=") == 2

    @pytest.mark.parametrize("path", ["/sessions", "/refresh-tokens"])
    @pytest.mark.parametrize("sort", ["", "&sort=id"])
    def test_what_is_sorted_by_id_is_paged_by_it(self, call, log_in, alice, path, sort):
        """A million rows lie before a page deep in the list: none of them is read."""
        for _ in range(5):
            log_in(alice)
        if path == "/refresh-tokens" and sort:
            return  # it is sorted in one way only
        every = [row["id"] for row in call("GET", f"{path}?limit=100{sort}").json]
        seen, query, hops = [], f"?limit=2{sort}", 0
        while query and hops < 9:
            page = call("GET", path + query)
            assert page.headers["x-total-count"] == str(len(every)) and "offset" not in page.headers.get("link", "")
            seen += [row["id"] for row in page.json]
            link = re.search(r'<(\?[^>]*)>; rel="next"', page.headers.get("link", ""))
            query, hops = link[1] if link else None, hops + 1
        assert seen == every and len(every) >= 5

    @pytest.mark.parametrize(
        "query", ["after=x&offset=1", "after=x&sort=expires_at", "after=" + "x" * 65]
    )
    def test_both_ways_at_once_are_refused(self, call, query):
        assert list(errors_of(call("GET", f"/sessions?{query}"))) == ["after"]

    def test_an_unknown_place_is_one_all_the_same(self, call, log_in, alice):
        log_in(alice)
        assert call("GET", "/sessions?after=0").json == [] and len(call("GET", "/sessions?after=zzz").json) == 2
