"""People log in: authorization code, the pages, sessions, consent, logout. RFC 6749 §4.1, OpenID Connect Core §3.1."""

import html
import json
import re
import threading
from base64 import b64decode
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlencode

import jwt
import microauthd as m
import pyotp
import pytest
import sqlcipher3
from browser import CALLBACK, CHALLENGE, VERIFIER, Browser, request, sent_back, title
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.settings import Options
from appliance.base.database import Unavailable
from appliance.base.keys import make_key
from appliance.base.objects import UpdateClient
from appliance.base.pages import PAGES, describe_age, describe_browser

NEW_PASSWORD = "another battery staple"
UNMET = "unmet_authentication_requirements"
OFFLINE = "openid offline_access"


@pytest.fixture
def options():
    return Options(**CHEAP, enable_token_refresh=True, oidc_issuer="https://idp.example", admin_domain="localhost")


@pytest.fixture
def register(idp, new_client):
    """Make a client for people; public unless it says otherwise."""

    def make(client_id="spa", uris=(CALLBACK,), flags=(), **more):
        kind = (
            {"client_type": "public", "grant_types": ["authorization_code", "refresh_token"]}
            if more.get("client_type", "public") == "public"
            else {}
        )
        new_client(client_id, **kind | more)
        for uri in uris:
            m.add_uri(idp, m.LOCAL.acting_as("test"), client_id, "redirect", uri)
        for flag, option in dict(flags).items():
            m.set_flag(idp, m.LOCAL.acting_as("test"), client_id, flag, True)
            if option:
                m.set_flag_option(idp, m.LOCAL.acting_as("test"), client_id, flag, option)
        return client_id

    return make


@pytest.fixture
def spa(register):
    return register()


@pytest.fixture
def browser(auth):
    return Browser(auth.app)


@pytest.fixture
def other(auth):
    """A second browser: an attacker's, or a friend's."""
    return Browser(auth.app)


@pytest.fixture
def exchange(auth):
    """Give a code for tokens: the answer."""

    def call(code, client="spa", secret=None, **more):
        form = (
            {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER}
            | ({} if secret else {"client_id": client})
            | more
        )
        return auth.post(
            "/token", {name: value for name, value in form.items() if value is not None},
            auth=(client, secret) if secret else None,
        )

    return call


ALLOWED = {
    "html", "head", "meta", "title", "link", "script", "body", "header", "img", "span", "main", "h1", "p", "strong",
    "form", "input", "label", "button", "ul", "li", "code", "div", "section", "a", "br", "time", "details", "summary",
}


class Markup(HTMLParser):
    """Every tag of a page, as a browser sees it."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def sign_in(browser, path=None, username="alice", password=PASSWORD):
    browser.open(path or request())
    return browser.submit(username=username, password=password)


def code_of(answer):
    uri, members = sent_back(answer)
    assert "code" in members, members
    SECRETS.add(members["code"])
    return members["code"]


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def as_shown(code, between=" "):
    """Return a one-time code in two groups, as an authenticator shows it."""
    return code[:3] + between + code[3:]


def second_factor(idp, alice, give_totp, clock):
    seed = give_totp(idp, idp.store.find_account(alice.id))
    clock.pass_(60)
    return lambda: pyotp.TOTP(seed).at(idp.now())


class TestAuthorizationCode:
    """RFC 6749 §4.1, OpenID Connect Core §3.1"""

    def test_the_whole_way(self, idp, auth, spa, alice, browser, exchange):
        uri, members = sent_back(sign_in(browser))
        assert (
            uri == CALLBACK
            and members["state"] == "st&te"
            and members["iss"] == "https://idp.example"
            and set(members) == {"code", "state", "iss"}
        )
        answer = exchange(members["code"])
        assert (
            answer.status == 200
            and answer.headers["cache-control"] == "no-store"
            and answer.json["scope"] == "email openid profile"
            and "refresh_token" not in answer.json
        )
        claims = claims_of(answer.json["id_token"])
        assert (
            claims["nonce"] == "n0nce"
            and claims["aud"] == claims["azp"] == "spa"
            and claims["sub"] == alice.id
            and claims["auth_time"] == idp.now()
            and claims["amr"] == ["pwd"]
            and claims["email"] == "alice@example.org"
        )
        assert auth.get("/userinfo", bearer=answer.json["access_token"]).json["preferred_username"] == "alice"
        assert {"user_logged_in", "authorization_code_issued", "user_token_issued"} <= {
            row.action for row in idp.store.list_audit(limit=10)
        }

    def test_a_code_is_spent_once_and_its_second_use_ends_what_the_first_bought(
        self, auth, spa, alice, browser, exchange
    ):
        code = code_of(sign_in(browser, request(scope="openid offline_access")))
        bought = exchange(code).json
        assert exchange(code).json["error"] == "invalid_grant"
        assert auth.get("/me", bearer=bought["access_token"]).status == 401
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "spa"}
            ).json["error"]
            == "invalid_grant"
        )

    @pytest.mark.parametrize(
        "take, scope",
        [
            (lambda *who: m.remove_scope(who[0], who[1], m.get_client(who[0], "spa"), "api:read"), "api:write"),
            (lambda *who: m.remove_scope(who[0], who[1], m.get_user(who[0], "alice"), "api:read"), "api:write"),
            (lambda *who: m.delete_scope(who[0], who[1], "api:read"), "api:write"),
            (lambda *who: None, "api:read api:write"),
        ],
    )
    def test_a_scope_that_was_taken_away_after_the_code_does_not_arrive(
        self, idp, register, new_user, browser, exchange, take, scope
    ):
        register(scopes=["api:read", "api:write"])
        new_user("alice", ["api:read", "api:write"])
        code = code_of(sign_in(browser, request(scope="api:read api:write")))
        take(idp, m.LOCAL.acting_as("test"))
        answer = exchange(code).json
        assert answer["scope"] == claims_of(answer["access_token"])["scope"] == scope

    def test_a_code_of_which_no_scope_is_left_buys_nothing(self, idp, register, new_user, browser, exchange):
        register(scopes=["api:read"])
        new_user("alice", ["api:read"])
        code = code_of(sign_in(browser, request(scope="api:read")))
        m.delete_scope(idp, m.LOCAL.acting_as("test"), "api:read")
        assert exchange(code).json["error"] == "invalid_grant"

    def test_a_redirect_uri_that_was_removed_after_the_code_buys_nothing(self, idp, spa, alice, browser, exchange):
        code = code_of(sign_in(browser))
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "redirect", "https://app.example/other")
        (old,) = [uri for uri in idp.store.list_uris(m.get_client(idp, "spa").row.id, "redirect") if uri.uri == CALLBACK]
        m.delete_uri(idp, m.LOCAL.acting_as("test"), old.id, "redirect")
        assert exchange(code).json["error"] == "invalid_grant"

    def test_a_second_use_while_the_first_is_under_way_leaves_nothing(
        self, idp, auth, spa, alice, browser, exchange, monkeypatch
    ):
        code, issue, within = code_of(sign_in(browser)), m.issue, []

        def slowly(idp, client, granted, origin):
            if not within:
                within.append(None)
                within[0] = exchange(code)
            return issue(idp, client, granted, origin)

        monkeypatch.setattr(m, "issue", slowly)
        assert exchange(code).status == 400 and within[0].status == 200
        assert auth.get("/me", bearer=within[0].json["access_token"]).status == 401
        assert exchange(code).status == 400

    def test_it_is_not_spent_where_nothing_can_be_issued(self, idp, auth, spa, alice, browser, exchange, monkeypatch):
        code = code_of(sign_in(browser))

        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(idp.store, "insert", fail)
            assert exchange(code).status == 503
        idp.store.flush()
        with monkeypatch.context() as broken:
            broken.setattr(idp.auth_ring, "mint", fail)
            assert exchange(code).status == 503
        assert exchange(code).status == 200 and exchange(code).status == 400

    @pytest.mark.parametrize(
        "change",
        [
            {"redirect_uri": "https://app.example/other"}, {"redirect_uri": None}, {"code_verifier": "w" * 43},
            {"code_verifier": None}, {"code_verifier": "v" * 42}, {"code_verifier": "v" * 129},
            {"code_verifier": CHALLENGE}, {"code_verifier": "ü" * 43},
        ],
    )
    def test_whatever_does_not_match_spends_it_for_nothing(self, spa, alice, browser, exchange, change):
        code = code_of(sign_in(browser))
        assert (
            exchange(code, **change).json["error"] == "invalid_grant"
            and exchange(code).json["error"] == "invalid_grant"
        )

    def test_another_client_gets_nothing_and_spends_nothing(self, register, spa, alice, browser, exchange, service):
        register("other")
        code = code_of(sign_in(browser))
        assert (
            exchange(code, "other").json["error"] == "invalid_grant"
            and exchange(code, *service).json["error"] == "invalid_grant"
        )
        assert exchange(code).status == 200

    def test_it_lives_a_minute(self, spa, alice, browser, exchange, clock):
        code = code_of(sign_in(browser))
        clock.pass_(60)
        assert exchange(code).json["error"] == "invalid_grant"

    @pytest.mark.parametrize("lifetime, lives", [(10, 10), (60, 60), (600, 60)])
    def test_it_lives_as_long_as_the_option_says_and_a_minute_at_most(
        self, make_idp, spa, alice, exchange, clock, lifetime, lives
    ):
        idp = make_idp(Options(**CHEAP, oidc_issuer="https://idp.example", pkce_code_lifetime=lifetime))
        browser = Browser(m.App(idp, m.AUTH))
        first = code_of(sign_in(browser))
        clock.pass_(lives - 1)
        second = code_of(browser.open(request()))
        assert exchange(first).status == 200
        clock.pass_(lives)
        assert exchange(second).json["error"] == "invalid_grant"

    @pytest.mark.parametrize("ended", [False, True])
    def test_the_client_hears_of_it_after_the_commit_that_it_shares(
        self, idp, spa, alice, browser, monkeypatch, ended
    ):
        sign_in(browser)
        refused, refuse = [], m.refuse_client
        monkeypatch.setattr(m, "refuse_client", lambda *arguments: refused.append(arguments) or refuse(*arguments))

        def app(environ, start_response):
            steps = m.App(idp, m.AUTH)(environ, start_response)
            assert next(steps) == b""
            if ended:
                m.revoke_user(idp, m.LOCAL.acting_as("test"), alice.id, "logout_all")
            assert next(steps) == b"" and not refused
            return [steps.throw(Unavailable("the disk", 5))]

        again = Browser(app)
        again.cookies = browser.cookies
        answer = again("GET", request(prompt="none"))
        assert answer.status == 503 and "location" not in answer.headers and not refused

    def test_none_is_issued_for_who_was_ended_since_the_session_was_looked_up(
        self, idp, spa, alice, browser, clock, monkeypatch
    ):
        sign_in(browser)
        scope_for = m.scope_for

        def late(*arguments):
            m.revoke_user(idp, m.LOCAL.acting_as("test"), alice.id, "logout_all")
            clock.pass_(1)
            return scope_for(*arguments)

        monkeypatch.setattr(m, "scope_for", late)
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "invalid_grant"
        assert len(idp.store.list_audit("authorization_code_issued")) == 1

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE account SET is_active = 0", "UPDATE account SET revoked_before = 9999999999999",
            "UPDATE client SET revoked_before = 9999999999999", "DELETE FROM account",
            "UPDATE meta SET value = '9999999999999' WHERE name = 'revoked_before'",
        ],
    )
    def test_it_dies_with_its_user_and_client(self, spa, alice, browser, exchange, change, statement):
        code = code_of(sign_in(browser))
        change(statement)
        assert exchange(code).json["error"] == "invalid_grant"

    def test_a_confidential_client_authenticates_and_may_leave_pkce_out(
        self, idp, register, new_client, alice, browser, exchange, auth
    ):
        name, secret = new_client("web")
        m.add_uri(idp, m.LOCAL.acting_as("test"), "web", "redirect", CALLBACK)
        path = request("web", code_challenge=None, code_challenge_method=None, nonce=None, state=None)
        uri, members = sent_back(sign_in(browser, path))
        assert set(members) == {"code", "iss"}
        assert exchange(members["code"], "web", "wrong secret").status == 401
        assert exchange(members["code"], "web", secret, code_verifier=None).status == 200
        code = code_of(browser.open(path))
        assert exchange(code, "web", secret).json["error"] == "invalid_grant", (
            "a verifier without a challenge is a downgrade somebody tried"
        )

    def test_a_client_without_the_grant_cannot(self, register, alice, browser):
        register("machine", client_type="confidential", grant_types=["client_credentials"])
        _, members = sent_back(browser.open(request("machine")))
        assert (
            members["error"] == "unauthorized_client"
            and members["state"] == "st&te"
            and members["iss"] == "https://idp.example"
        )

    def test_the_refresh_token_is_what_offline_access_is_for(
        self, auth, register, spa, alice, browser, exchange, new_user, idp
    ):
        assert "refresh_token" not in exchange(code_of(sign_in(browser))).json
        bought = exchange(code_of(browser.open(request(scope="openid offline_access")))).json
        assert "offline_access" in bought["scope"] and bought["refresh_token"]
        again = auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "spa"}
        ).json
        first, second = claims_of(bought["id_token"]), claims_of(again["id_token"])
        assert first["auth_time"] == second["auth_time"] and first["sid"] == second["sid"] and "nonce" not in second
        assert "refresh_token" in exchange(code_of(browser.open(request(scope="api:read")))).json, (
            "plain OAuth: by the grant"
        )

    def test_discovery_says_what_works(self, auth):
        found = auth.get("/.well-known/openid-configuration").json
        assert (
            found["authorization_endpoint"] == "https://idp.example/authorize"
            and found["end_session_endpoint"] == "https://idp.example/end-session"
            and found["response_types_supported"] == ["code"]
        )
        assert (
            found["code_challenge_methods_supported"] == ["S256"]
            and found["authorization_response_iss_parameter_supported"] is True
            and "authorization_code" in found["grant_types_supported"]
            and {"de", "en"} <= set(found["ui_locales_supported"])
        )

    def test_switched_off_it_is_not_there(self, make_idp):
        auth = Caller(m.App(make_idp(Options(**CHEAP, enable_pkce=False)), m.AUTH))
        assert {auth.get(path).status for path in ("/authorize", "/login", "/account", "/end-session")} == {
            404
        } and "authorization_endpoint" not in auth.get("/.well-known/openid-configuration").json

    @pytest.mark.parametrize(
        "what", ["the browser is logged out", "the client is revoked", "the client is switched off"]
    )
    def test_it_buys_nothing_once_what_it_hangs_on_was_ended(
        self, idp, spa, auth, alice, browser, exchange, clock, monkeypatch, what
    ):
        """Between the look at it and the transaction that issues, which may wait for others to write."""
        code, issue = code_of(sign_in(browser, request(scope="openid offline_access"))), m.issue

        def late(idp, client, granted, origin):
            monkeypatch.setattr(m, "issue", issue)
            clock.pass_(1)
            if "browser" in what:
                browser.open("/logout")
                browser.submit()
            elif "revoked" in what:
                m.revoke_client(idp, m.LOCAL.acting_as("test"), client.row, "revoked")
            else:
                with idp.store.transaction(identity=True):
                    idp.store.run("UPDATE client SET is_active = 0 WHERE id = :id", id=client.row.id)
            clock.pass_(1)
            return issue(idp, client, granted, origin)

        monkeypatch.setattr(m, "issue", late)
        assert exchange(code).json["error"] == "invalid_grant"
        assert not idp.store.connection.execute("SELECT count(*) FROM refresh_token").fetchone()[0]


class TestRequest:
    """RFC 6749 §4.1.2.1, OpenID Connect Core §3.1.2.2"""

    @pytest.mark.parametrize(
        "change",
        [
            {"client_id": None}, {"client_id": "nobody"}, {"client_id": ""}, {"redirect_uri": None},
            {"redirect_uri": ""}, {"redirect_uri": "https://evil.example/cb"}, {"redirect_uri": CALLBACK + "/"},
            {"redirect_uri": CALLBACK + "?x"}, {"redirect_uri": CALLBACK + "#x"},
            {"redirect_uri": "https://app.example.evil.example/cb"},
            {"redirect_uri": "https://app.example@evil.example/cb"}, {"redirect_uri": "javascript:alert(1)"},
            {"redirect_uri": "//app.example/cb"}, {"redirect_uri": "https://app.example/%63b"},
        ],
    )
    def test_until_client_and_redirect_uri_are_proven_nobody_is_redirected(self, spa, browser, change):
        answer = browser("GET", request(**change))
        assert (
            answer.status == 400
            and "location" not in answer.headers
            and answer.headers["content-type"].startswith("text/html")
            and b"evil" not in answer.body
            and b"javascript:" not in answer.body
        )

    def test_an_inactive_client_is_none(self, spa, browser, change):
        change("UPDATE client SET is_active = 0")
        assert browser("GET", request()).status == 400

    @pytest.mark.parametrize(
        "change, error",
        [
            ({"response_type": None}, "invalid_request"), ({"response_type": "token"}, "unsupported_response_type"),
            ({"response_type": "code id_token"}, "unsupported_response_type"),
            ({"response_type": "none"}, "unsupported_response_type"),
            ({"response_mode": "jwt"}, "invalid_request"), ({"request": "eyJ"}, "request_not_supported"),
            ({"request_uri": "https://x.example/"}, "request_uri_not_supported"),
            ({"registration": "{}"}, "registration_not_supported"), ({"code_challenge": None}, "invalid_request"),
            ({"code_challenge": None, "code_challenge_method": None}, "invalid_request"),
            ({"code_challenge_method": "plain"}, "invalid_request"),
            ({"code_challenge_method": None}, "invalid_request"),
            ({"code_challenge_method": "s256"}, "invalid_request"), ({"code_challenge": "short"}, "invalid_request"),
            ({"code_challenge": "v" * 44}, "invalid_request"),
            ({"code_challenge": CHALLENGE[:-1] + "!"}, "invalid_request"),
            ({"scope": "nonsense"}, "invalid_scope"), ({"scope": 'open"id'}, "invalid_scope"),
            ({"scope": 'openid nons"nse'}, "invalid_scope"), ({"scope": "openid,profile"}, "invalid_scope"),
            ({"scope": "api:secret"}, "invalid_scope"), ({"scope": "email"}, "invalid_scope"),
            ({"prompt": "none login"}, "invalid_request"), ({"prompt": "create"}, "invalid_request"),
            ({"max_age": "-1"}, "invalid_request"), ({"max_age": "x"}, "invalid_request"),
            ({"claims": "{"}, "invalid_request"),
            ({"claims": "[]"}, "invalid_request"), ({"claims": '{"id_token": 5}'}, "invalid_request"),
            ({"nonce": "x" * 3000}, "invalid_request"), ({"prompt": "none"}, "login_required"),
        ],
    )
    def test_afterwards_the_client_is_told(self, spa, browser, change, error):
        uri, members = sent_back(browser("GET", request(**change)))
        assert (
            uri == CALLBACK
            and members["error"] == error
            and members["state"] == "st&te"
            and members["iss"] == "https://idp.example"
            and members["error_description"].isascii()
            and "code" not in members
        )

    def test_who_names_a_method_brings_a_challenge(self, register, browser):
        """Also a client that may leave PKCE out: it meant to have it. RFC 7636 §4.3"""
        register("web", client_type="confidential")
        assert sent_back(browser("GET", request("web", code_challenge=None)))[1]["error"] == "invalid_request"

    def test_repeated_parameters_are_refused_and_unknown_ones_ignored(self, spa, browser):
        for repeated in ("&client_id=spa", "&redirect_uri=" + CALLBACK):
            answer = browser("GET", request() + repeated)
            assert answer.status == 400 and "location" not in answer.headers, "neither is proven"
        more = request(unknown="x", display="popup", acr_values="gold", ui_locales="xx")
        assert browser.open(more).status == 200
        assert browser.open(more + "&resource=a&resource=b&unknown=y&display=page").status == 200

    @pytest.mark.parametrize(
        "name",
        [
            "response_type", "scope", "state", "nonce", "code_challenge", "code_challenge_method", "prompt", "max_age",
            "login_hint", "claims", "response_mode", "id_token_hint", "ui_locales", "request", "request_uri",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_of_a_repeated_parameter_that_is_read_the_client_is_told(self, spa, browser, method, name):
        query = request().partition("?")[2] + f"&{name}=x&{name}=y"
        answer = (
            browser("GET", "/authorize?" + query)
            if method == "GET"
            else browser("POST", "/authorize", query, headers=[("Accept", "text/html")])
        )
        uri, members = sent_back(answer)
        assert (uri, members["error"]) == (CALLBACK, "invalid_request")
        assert members.get("state") == (None if name == "state" else "st&te")

    def test_a_posted_request_keeps_what_is_repeated(self, spa, browser):
        query = request().partition("?")[2] + "&resource=a&resource=b"
        answer = browser("POST", "/authorize", query, headers=[("Accept", "text/html")])
        assert answer.status == 303 and answer.headers["location"].endswith("&resource=a&resource=b")
        assert browser.open(answer.headers["location"].removeprefix("https://idp.example")).status == 200

    def test_without_pages_a_repeated_parameter_is_refused(self, register, auth):
        register("first", is_first_party=True)
        query = request("first").partition("?")[2]
        as_json = {"headers": [("Accept", "application/json")]}
        assert auth.post("/authorize", query + "&resource=a&resource=b", **as_json).status == 200
        for name in ("client_id", "response_type", "state"):
            answer = auth.post("/authorize", query + f"&{name}=x&{name}=y", **as_json)
            assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("name", ["id_token_hint", "client_id", "post_logout_redirect_uri", "state", "ui_locales"])
    def test_a_logout_with_a_repeated_parameter_ends_nothing(self, spa, alice, browser, name):
        sign_in(browser, request())
        assert browser.open(f"/end-session?{name}=x&{name}=y").status == 400
        assert title(browser.open("/end-session?logout_hint=x&logout_hint=y")) == "Sign out"

    def test_parameters_without_a_value_are_as_if_omitted(self, spa, alice, browser, exchange):
        """RFC 6749 §3.1, §3.2"""
        names = (
            "state", "nonce", "prompt", "max_age", "login_hint", "id_token_hint", "claims", "ui_locales",
            "response_mode", "request", "request_uri", "registration", "resource",
        )
        code = code_of(sign_in(browser, request(**dict.fromkeys(names, ""))))
        assert exchange(code, client_secret="", scope="", resource="").status == 200
        _, members = sent_back(browser.open(request(state="", prompt="none")))
        assert set(members) == {"code", "iss"}
        query = "id_token_hint=&client_id=&post_logout_redirect_uri=&state=&form="
        assert title(browser.open(f"/end-session?{query}")) == "Sign out"

    def test_a_state_is_given_back_to_the_octet(self, spa, alice, browser):
        for state in ("a b+c&d=e#f", "ü€😀", "<script>", "%00".replace("%00", "%2500"), ""):
            _, members = sent_back(browser.open(request(state=state, prompt="none")))
            assert members.get("state", "") == state

    def test_a_registered_query_stays(self, register, alice, browser):
        register("q", uris=["https://app.example/cb?tenant=1"])
        answer = browser("GET", request("q", redirect_uri="https://app.example/cb?tenant=1", prompt="none"))
        assert answer.headers["location"].startswith("https://app.example/cb?tenant=1&error=login_required")

    def test_a_loopback_port_may_be_any(self, register, alice, browser, exchange):
        register("native", uris=["http://127.0.0.1/cb", "http://localhost/cb", "com.example.app:/cb"])
        code = code_of(sign_in(browser, request("native", redirect_uri="http://127.0.0.1:51004/cb")))
        assert exchange(code, "native", redirect_uri="http://127.0.0.1/cb").status == 400
        code = code_of(browser.open(request("native", redirect_uri="http://localhost:51005/cb")))
        assert exchange(code, "native", redirect_uri="http://localhost:51005/cb").status == 200
        assert (
            browser.open(request("native", redirect_uri="com.example.app:/cb"))
            .headers["location"]
            .startswith("com.example.app:/cb?code=")
        )

    @pytest.mark.parametrize("uri", ["http://nas.lan:3000/cb", CALLBACK])
    def test_a_client_with_http_redirects_sends_s256(self, make_idp, register, alice, browser, exchange, uri):
        """RFC 7636 §7.2: with `plain`, whoever reads the request has all that a stolen code needs."""
        idp = make_idp(Options(**CHEAP, allow_plain_pkce=True, oidc_issuer="https://idp.example"))
        lax = Browser(m.App(idp, m.AUTH))
        register("lan", uris=[CALLBACK], client_type="confidential", client_secret="a secret of the lan")
        assert code_of(sign_in(lax, request("lan", code_challenge=None, code_challenge_method=None)))
        m.update_client(idp, m.LOCAL.acting_as("test"), "lan", UpdateClient(allow_http_redirects=True))
        m.add_uri(idp, m.LOCAL.acting_as("test"), "lan", "redirect", "http://nas.lan:3000/cb")
        for weak in (
            {"code_challenge": None, "code_challenge_method": None}, {"code_challenge": None},
            {"code_challenge": VERIFIER, "code_challenge_method": "plain"},
            {"code_challenge": VERIFIER, "code_challenge_method": None},
        ):
            at, members = sent_back(lax.open(request("lan", redirect_uri=uri, **weak)))
            assert (at, members["error"]) == (uri, "invalid_request")
        code = code_of(lax.open(request("lan", redirect_uri=uri)))
        assert exchange(code, "lan", "a secret of the lan", redirect_uri=uri).status == 200

    def test_an_http_redirect_is_matched_octet_by_octet(self, idp, register, browser):
        register("lan", uris=["http://nas.lan:3000/cb"], client_type="confidential", allow_http_redirects=True)
        assert "location" in browser("GET", request("lan", redirect_uri="http://nas.lan:3000/cb")).headers
        for other in ("http://nas.lan/cb", "http://nas.lan:3001/cb", "http://NAS.lan:3000/cb", "https://nas.lan:3000/cb"):
            assert browser("GET", request("lan", redirect_uri=other)).status == 400

    def test_a_short_scheme_is_redirected_to(self, register, alice, browser, exchange):
        register("shelf", uris=["audiobookshelf://oauth"], allow_short_schemes=True)
        page = browser.open(request("shelf", redirect_uri="audiobookshelf://oauth"))
        assert "form-action 'self' audiobookshelf:" in page.headers["content-security-policy"]
        code = code_of(browser.submit(username="alice", password=PASSWORD))
        assert browser.answer.headers["location"].startswith("audiobookshelf://oauth?code=")
        assert exchange(code, "shelf", redirect_uri="audiobookshelf://oauth").status == 200

    def test_plain_is_for_whoever_allows_it(self, make_idp, register, spa, alice, exchange):
        idp = make_idp(Options(**CHEAP, allow_plain_pkce=True, oidc_issuer="https://idp.example"))
        browser = Browser(m.App(idp, m.AUTH))
        assert (
            exchange(code_of(sign_in(browser, request(code_challenge=VERIFIER, code_challenge_method="plain")))).status
            == 200
        )
        assert (
            idp
            and "plain" in browser("GET", "/.well-known/openid-configuration").json["code_challenge_methods_supported"]
        )

    def test_a_post_becomes_a_get_that_finds_the_session(self, spa, alice, browser):
        sign_in(browser)
        cookies, browser.cookies = browser.cookies, {}  # from another site: no cookies
        answer = browser("POST", "/authorize", request().partition("?")[2])
        assert answer.status == 303 and answer.headers["location"].startswith("https://idp.example/authorize?")
        browser.cookies = cookies
        assert code_of(browser.follow())

    def test_form_post(self, spa, alice, browser, exchange):
        answer = sign_in(browser, request(response_mode="form_post", state='<&">'))
        assert (
            answer.status == 200
            and "form-action 'self' https:;" in answer.headers["content-security-policy"] + ";"
            and "script-src 'self'" in answer.headers["content-security-policy"]
        )
        form = browser.forms().forms[0]
        assert (
            form["action"] == CALLBACK
            and form["fields"]["state"] == '<&">'
            and form["fields"]["iss"] == "https://idp.example"
            and exchange(form["fields"]["code"]).status == 200
        )
        assert b'document.getElementById("answer").submit' in browser("GET", "/pages/form_post.js").body
        refused = browser.open(request(response_mode="form_post", scope="nonsense"))
        assert browser.forms().forms[0]["fields"]["error"] == "invalid_scope" and refused.status == 200

    @pytest.mark.parametrize("query", ["", "?mode=fragment"])
    def test_fragment(self, auth, register, alice, browser, exchange, query):
        """Single-page applications take the answer there unless told otherwise: keycloak-js, @azure/msal-browser."""
        register(uris=[CALLBACK + query])
        more = {"redirect_uri": CALLBACK + query, "response_mode": "fragment"}
        location = sign_in(browser, request(**more)).headers["location"]
        uri, _, answer = location.partition("#")
        members = dict(parse_qsl(answer, strict_parsing=True))
        assert uri == CALLBACK + query and members["state"] == "st&te" and members["iss"] == "https://idp.example"
        assert exchange(members["code"], redirect_uri=CALLBACK + query).status == 200
        refused = browser("GET", request(**more, scope="nonsense")).headers["location"]
        assert refused.startswith(CALLBACK + query + "#error=invalid_scope&")
        modes = auth.get("/.well-known/openid-configuration").json["response_modes_supported"]
        assert modes == ["query", "fragment", "form_post"]

    def test_what_the_claims_parameter_asks_for_is_given(self, auth, spa, alice, browser, exchange):
        claims = json.dumps(
            {"id_token": {"email": {"essential": True}, "nonsense": None}, "userinfo": {"preferred_username": None}}
        )
        bought = exchange(code_of(sign_in(browser, request(scope="openid", claims=claims)))).json
        token, info = claims_of(bought["id_token"]), auth.get("/userinfo", bearer=bought["access_token"]).json
        assert token["email"] == "alice@example.org" and "email_verified" not in token and "name" not in token
        assert info == {"sub": alice.id, "preferred_username": "alice"}

    def test_a_scope_that_does_not_exist_is_ignored(self, idp, auth, spa, alice, browser, exchange):
        bought = exchange(code_of(sign_in(browser, request(scope="openid nonsense email x:y,z address phone")))).json
        assert bought["scope"] == claims_of(bought["access_token"])["scope"] == "email openid"
        assert set(auth.get("/userinfo", bearer=bought["access_token"]).json) == {"sub", "email", "email_verified"}
        (line,) = [line for line in idp.stream.getvalue().splitlines() if " scope.ignored " in line]
        assert "address nonsense phone x:y,z" in line and "not by commas" in line

    def test_what_a_proxy_requests_of_every_provider_is_granted(self, idp, auth, spa, root, browser, exchange):
        answer = sign_in(browser, request(scope="openid profile email groups"), username="root")
        bought = exchange(code_of(answer)).json
        assert bought["scope"] == "email groups openid profile"
        assert claims_of(bought["id_token"])["groups"] == ["MadAdmin"] and claims_of(bought["id_token"])["nickname"]

    def test_the_claims_parameter_may_ask_for_groups(self, spa, root, browser, exchange):
        claims = json.dumps({"id_token": {"groups": None}})
        bought = exchange(code_of(sign_in(browser, request(scope="openid", claims=claims), username="root"))).json
        token = claims_of(bought["id_token"])
        assert token["groups"] == ["MadAdmin"] and "roles" not in token

    def test_a_scope_that_the_user_does_not_have_is_left_out(self, register, alice, browser, exchange):
        register("wide", scopes=["api:read", "api:write"])
        for scope, granted in (
            ("openid api:write", "openid"), ("openid api:write api:read", "api:read openid"),
            ("api:read api:write", "api:read"), (None, "api:read"), ("", "api:read"),
        ):
            answer = browser.open(request("wide", scope=scope))
            answer = answer if "location" in answer.headers else browser.submit(username="alice", password=PASSWORD)
            assert exchange(code_of(answer), "wide").json["scope"] == granted

    @pytest.mark.parametrize("scope", ["api:secret", "openid api:secret", "api:read openid nonsense api:secret"])
    def test_a_scope_that_the_client_may_not_request_is_refused(self, spa, alice, browser, scope):
        assert sent_back(browser.open(request(scope=scope)))[1]["error"] == "invalid_scope"
        assert title(browser.open(request(scope="openid api:read"))) == "Sign in"

    def test_where_nothing_is_left_there_is_no_default(self, register, alice, browser):
        register("wide", scopes=["api:read", "api:write"])
        register("third", is_first_party=False, scopes=["api:read", "api:write"])
        assert sent_back(browser.open(request("wide", scope="nonsense")))[1]["error"] == "invalid_scope"
        for client in ("wide", "third"):
            for prompt in (None, "none", "consent"):
                answer = browser.open(request(client, scope="api:write nonsense", prompt=prompt))
                if answer.status == 200:
                    answer = browser.submit(username="alice", password=PASSWORD)
                uri, members = sent_back(answer)
                assert (members["error"] == "invalid_scope" or prompt == "none") and "code" not in members

    def test_a_user_is_never_granted_more_than_it_has(self, register, idp, alice, browser):
        register("wide", scopes=["api:read", "api:write"])
        assert sent_back(sign_in(browser, request("wide", scope="api:write")))[1]["error"] == "invalid_scope"
        assert "code" in sent_back(browser.open(request("wide", scope="openid api:read")))[1]


class TestSession:
    """Single sign-on, and when it does not do. OpenID Connect Core §3.1.2.1"""

    def test_one_login_serves_every_client(self, register, spa, alice, browser, exchange):
        sign_in(browser)
        register("second")
        assert (
            claims_of(exchange(code_of(browser.open(request("second"))), "second").json["id_token"])["sub"] == alice.id
        )
        assert code_of(browser.open(request(prompt="none")))

    def test_prompt_login_and_max_age_ask_again(self, spa, alice, browser, clock, exchange):
        first = claims_of(exchange(code_of(sign_in(browser))).json["id_token"])
        clock.pass_(100)
        assert (
            title(browser.open(request(prompt="login")))
            == title(browser.open(request(max_age="99")))
            == title(browser.open(request(max_age="0")))
            == "Sign in"
        )
        assert (
            claims_of(exchange(code_of(browser.open(request(max_age="100")))).json["id_token"])["auth_time"]
            == first["auth_time"]
        )
        again = claims_of(exchange(code_of(sign_in(browser, request(prompt="login")))).json["id_token"])
        assert again["auth_time"] == first["auth_time"] + 100
        assert sent_back(browser.open(request(prompt="none", max_age="0")))[1]["error"] == "login_required"

    def test_a_hint_names_whom_is_meant(self, spa, alice, new_user, browser, other, exchange, clock):
        hint = exchange(code_of(sign_in(browser))).json["id_token"]
        clock.pass_(3600)
        assert code_of(browser.open(request(prompt="none", id_token_hint=hint))), "an expired one will do"
        new_user("bob")
        sign_in(other, username="bob")
        assert sent_back(other.open(request(prompt="none", id_token_hint=hint)))[1]["error"] == "login_required"
        assert title(other.open(request(id_token_hint=hint))) == "Sign in"

    def test_who_is_meant_and_nobody_else_gets_in(self, spa, alice, new_user, browser, other, exchange):
        hint = exchange(code_of(sign_in(browser))).json["id_token"]
        new_user("bob")
        assert sent_back(sign_in(other, request(id_token_hint=hint), "bob"))[1]["error"] == "login_required"
        claims = json.dumps({"id_token": {"sub": {"value": alice.id}}})
        assert sent_back(other.open(request(prompt="none", claims=claims)))[1]["error"] == "login_required" and code_of(
            browser.open(request(prompt="none", claims=claims))
        )

    def test_logging_in_again_ends_nothing_of_the_same_user(self, auth, spa, alice, new_user, browser, exchange):
        bought = exchange(code_of(sign_in(browser))).json["access_token"]
        unspent = code_of(browser.open(request()))
        sign_in(browser, request(prompt="login"))
        assert auth.get("/me", bearer=bought).status == 200 and exchange(unspent).status == 200
        new_user("bob")
        sign_in(browser, request(prompt="login"), "bob")
        assert auth.get("/me", bearer=bought).status == 401, "of another, everything"

    @pytest.mark.parametrize("silent", [False, True])
    def test_a_code_dies_with_the_logout(self, spa, alice, browser, exchange, silent):
        """That of the login, and one that the session brought later."""
        code = code_of(sign_in(browser))
        if silent:
            code = code_of(browser.open(request(prompt="none")))
        browser.open("/logout")
        browser.submit()
        assert exchange(code).json["error"] == "invalid_grant"

    def test_a_login_hint_is_written_into_the_form(self, spa, browser):
        browser.open(request(login_hint='al"><b>'))
        assert browser.forms().forms[0]["fields"]["username"] == 'al"><b>' and b"<b>" not in browser.answer.body

    def test_it_ends_by_idleness_age_and_revocation(self, idp, spa, alice, browser, clock, change):
        sign_in(browser)
        clock.pass_(28000)
        assert code_of(browser.open(request(prompt="none")))
        clock.pass_(28000)
        assert code_of(browser.open(request(prompt="none"))), "seen in between"
        clock.pass_(28801)
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"
        sign_in(browser)
        for _ in range(5):
            clock.pass_(20000)
            last = sent_back(browser.open(request(prompt="none")))[1]
        assert last["error"] == "login_required", "a day is the end"

    @pytest.mark.parametrize("idle, error", [(28799, None), (28800, "login_required")])
    def test_it_is_over_in_the_second_in_which_it_has_been_idle_long_enough(
        self, spa, alice, browser, clock, idle, error
    ):
        sign_in(browser)
        clock.pass_(idle)
        assert sent_back(browser.open(request(prompt="none")))[1].get("error") == error

    @pytest.mark.parametrize("last, error", [(6399, None), (6400, "login_required")])
    def test_it_is_over_in_the_second_of_its_absolute_end(self, spa, alice, browser, clock, last, error):
        sign_in(browser)
        for seconds in (20000, 20000, 20000, 20000, last):
            clock.pass_(seconds)
            browser.open(request(prompt="none"))
        assert sent_back(browser.answer)[1].get("error") == error

    @pytest.mark.parametrize("back, error", [(60, None), (61, "login_required")])
    def test_one_of_a_time_that_is_not_yet_is_none(self, spa, alice, browser, clock, back, error):
        """The clock was ahead when it began, by more than the skew between two processes."""
        sign_in(browser)
        clock.pass_(-back)
        assert sent_back(browser.open(request(prompt="none")))[1].get("error") == error

    @pytest.mark.parametrize("seen_after, error", [(59, "login_required"), (60, None)])
    def test_it_is_seen_once_a_minute(self, spa, alice, browser, clock, seen_after, error):
        """So that a page with a hundred pictures is one write."""
        sign_in(browser)
        clock.pass_(seen_after)
        browser.open(request(prompt="none"))
        clock.pass_(28800 - 1)
        assert sent_back(browser.open(request(prompt="none")))[1].get("error") == error

    @pytest.mark.parametrize(
        "end",
        [
            lambda idp, alice: m.set_user_active(idp, m.LOCAL.acting_as("t"), alice.id, False),
            lambda idp, alice: m.reset_password(idp, m.LOCAL.acting_as("t"), alice.id, NEW_PASSWORD),
            lambda idp, alice: m.set_lockout(idp, m.LOCAL.acting_as("t"), alice.id, "9999-12-31T00:00:00Z"),
            lambda idp, alice: m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "x"),
            lambda idp, alice: m.delete_user(idp, m.LOCAL.acting_as("t"), alice.id),
        ],
    )
    def test_it_ends_with_what_its_user_loses(self, idp, spa, alice, browser, end):
        sign_in(browser)
        end(idp, alice)
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"

    def test_a_client_may_want_a_younger_one(self, idp, register, spa, alice, browser, clock):
        register("bank", flags={"SESSION_BASED_AUTH": "", "SESSION_BASED_MAX_AGE": "60"})
        sign_in(browser)
        clock.pass_(60)
        assert code_of(browser.open(request("bank", prompt="none"))), "not older than that"
        clock.pass_(1)
        assert (
            code_of(browser.open(request(prompt="none")))
            and sent_back(browser.open(request("bank", prompt="none")))[1]["error"] == "login_required"
        )

    def test_each_login_is_a_fresh_session_and_the_old_one_ends(self, idp, spa, alice, browser):
        sign_in(browser)
        before = dict(browser.cookies)
        sign_in(browser, request(prompt="login"))
        assert browser.cookies["__Host-mad-session"] != before["__Host-mad-session"]
        browser.cookies = before
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"

    def test_no_secret_of_it_stands_in_the_database_or_a_url(self, idp, spa, alice, browser):
        sign_in(browser)
        stored = str(idp.store.connection.execute("SELECT * FROM browser_session").fetchall()) + str(
            idp.store.connection.execute("SELECT * FROM login_transaction").fetchall()
        )
        assert browser.cookies["__Host-mad-session"] not in stored and browser.cookies["__Host-mad-login"] not in stored
        browser.open(request(prompt="login"))
        assert (
            browser.cookies["__Host-mad-login"].encode() not in browser.answer.body
            and browser.cookies["__Host-mad-session"].encode() not in browser.answer.body
        )

    def test_select_account(self, spa, alice, new_user, browser):
        assert title(browser.open(request(prompt="select_account"))) == "Sign in"
        browser.submit(username="alice", password=PASSWORD)
        assert (
            title(browser.open(request(prompt="select_account"))) == "Choose an account"
            and b"alice" in browser.answer.body
        )
        assert code_of(browser.submit(button=("choice", "same")))
        new_user("bob")
        browser.open(request(prompt="select_account"))
        assert title(browser.submit(button=("choice", "other"))) == "Sign in"
        assert code_of(browser.submit(username="bob", password=PASSWORD)) and b"bob" in browser.open("/account").body

    @pytest.mark.parametrize("asked", [{"max_age": "10"}, {"prompt": "select_account login"}], ids=" ".join)
    def test_who_goes_on_as_who_is_in_is_asked_anew_where_the_client_wants_that(
        self, spa, alice, browser, clock, asked
    ):
        """The choice of an account is no proof of it. OpenID Connect Core §3.1.2.1"""
        sign_in(browser)
        clock.pass_(11)
        assert title(browser.open(request(**{"prompt": "select_account"} | asked))) == "Choose an account"
        assert title(browser.submit(button=("choice", "same"))) == "Sign in"

    @pytest.mark.parametrize("has_one", [False, True])
    def test_who_goes_on_as_who_is_in_is_asked_for_the_factor_that_a_client_demands(
        self, idp, register, spa, alice, browser, give_totp, clock, has_one
    ):
        register("bank", flags={"ENABLE_TOTP": ""})
        sign_in(browser)
        if has_one:
            second_factor(idp, alice, give_totp, clock)
        assert title(browser.open(request("bank", prompt="select_account"))) == "Choose an account"
        asked = title(browser.submit(button=("choice", "same")))
        assert asked == ("Second factor" if has_one else "Sign in"), "the password comes before an enrolment"

    def test_one_begun_before_a_restore_is_over(self, idp, spa, alice, browser, change):
        sign_in(browser)
        assert code_of(browser.open(request(prompt="none")))
        change("UPDATE meta SET value = :ms WHERE name = 'revoked_before'", ms=str(idp.now_ms()))
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"

    def test_it_is_looked_up_once_a_request(self, register, spa, alice, browser, monkeypatch):
        register("third", is_first_party=False)
        sign_in(browser)
        find, lookups = m.find_browser_session, []
        monkeypatch.setattr(m, "find_browser_session", lambda *args: lookups.append(args) or find(*args))
        assert code_of(browser("GET", request())) and len(lookups) == 1
        browser.open(request("third"))
        lookups.clear()
        assert code_of(browser.submit(button=("decision", "allow"))) and len(lookups) == 1, "POST /login/consent"
        form = browser.open("/account") and browser.forms().forms[-1]["fields"]["form"]
        lookups.clear()
        assert title(browser("POST", "/logout-all", {"form": form})) == "Signed out" and len(lookups) == 1

    def test_none_begins_for_who_was_ended_since_the_last_factor(self, idp, alice, clock):
        account = idp.store.find_account(alice.id)
        clock.pass_(1)
        m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "logout_all")
        clock.pass_(1)
        with pytest.raises(m.Problem, match="invalid_grant"):
            m.begin_browser_session(idp, m.LOCAL, account, ["pwd"], idp.now(), None)
        assert not idp.store.list_browser_sessions(alice.id, idp.now())

    def test_two_tabs_do_not_mix(self, register, spa, alice, browser, exchange):
        register("second")
        browser.open(request())
        one = browser.forms()
        browser.open(request("second", state="two"))
        two = browser.answer
        browser.answer.body, saved = browser.answer.body, browser.answer.body
        form = one.forms[0]
        _, members = sent_back(
            browser.follow(browser("POST", "/login", form["fields"] | {"username": "alice", "password": PASSWORD}))
        )
        assert members["state"] == "st&te" and exchange(members["code"]).status == 200
        browser.answer = two
        two.body = saved
        assert sent_back(browser.submit(username="alice", password=PASSWORD))[1]["state"] == "two"


class TestImpersonation:
    """A program that any other could pose as gets no code in silence. RFC 6749 §10.2, RFC 8252 §8.6"""

    NATIVE = "com.example.app:/cb"
    URIS = (NATIVE, "http://127.0.0.1/cb", "http://localhost:5000/cb", CALLBACK)

    @pytest.fixture
    def ask(self, register, spa, browser):
        """Open an authorization request of the native client."""
        register("native", uris=self.URIS)
        return lambda uri=self.NATIVE, to=browser, **more: to.open(request("native", redirect_uri=uri, **more))

    @pytest.mark.parametrize("uri", URIS[:3])
    def test_the_user_agrees_once_a_session(self, ask, alice, browser, exchange, uri):
        sign_in(browser)
        assert sent_back(ask(uri, prompt="none"))[1]["error"] == "interaction_required"
        page = ask(uri)
        assert title(page) == "Continue as alice?" and b"native" in page.body and b"Use another account" in page.body
        assert exchange(code_of(browser.submit(button=("choice", "same"))), "native", redirect_uri=uri).status == 200
        assert code_of(ask(uri, prompt="none")) and code_of(ask(uri)), "silent renewal works from here"

    @pytest.mark.parametrize("language, name", [("en", "Continue as alice?"), ("de", "Weiter als alice?")])
    def test_it_is_asked_in_every_language(self, ask, alice, browser, language, name):
        sign_in(browser)
        page = ask(ui_locales=language)
        assert title(page) == name and browser.forms().forms[0]["action"].endswith("/login/select")

    def test_a_login_just_done_is_the_users_word(self, ask, alice, browser):
        ask()
        assert code_of(browser.submit(username="alice", password=PASSWORD)) and code_of(ask(prompt="none"))

    def test_so_is_a_second_factor_or_a_consent_just_given(
        self, idp, register, spa, alice, browser, give_totp, clock
    ):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        browser.submit(totp=code())
        register("third", uris=[self.NATIVE], is_first_party=False)
        path = request("third", redirect_uri=self.NATIVE)
        assert title(browser.open(path)) == "Permission"
        assert code_of(browser.submit(button=("decision", "allow"))) and code_of(browser.open(path + "&prompt=none"))

    def test_a_consent_of_another_session_is_not(self, register, spa, alice, browser, other):
        register("third", uris=[self.NATIVE], is_first_party=False)
        path = request("third", redirect_uri=self.NATIVE)
        sign_in(browser, path)
        assert code_of(browser.submit(button=("decision", "allow")))
        sign_in(other)
        assert title(other.open(path)) == "Continue as alice?"
        assert sent_back(other.open(path + "&prompt=none"))[1]["error"] == "interaction_required"

    def test_a_login_at_its_https_address_is_no_word_for_another_program(self, ask, alice, browser):
        ask(CALLBACK)
        assert code_of(browser.submit(username="alice", password=PASSWORD)) and code_of(ask(CALLBACK, prompt="none"))
        assert sent_back(ask(prompt="none"))[1]["error"] == "interaction_required"

    def test_a_confidential_client_and_https_prove_who_they_are(self, idp, new_client, spa, alice, browser):
        new_client("web")
        for uri in self.URIS:
            m.add_uri(idp, m.LOCAL.acting_as("test"), "web", "redirect", uri)
        sign_in(browser)
        assert all(code_of(browser.open(request("web", redirect_uri=uri, prompt="none"))) for uri in self.URIS)
        assert code_of(browser.open(request(prompt="none"))), "a public client at https"

    def test_another_account_is_one_button_away(self, ask, alice, new_user, browser):
        sign_in(browser)
        new_user("bob")
        ask()
        assert title(browser.submit(button=("choice", "other"))) == "Sign in"
        assert code_of(browser.submit(username="bob", password=PASSWORD)) and b"bob" in browser.open("/account").body

    @pytest.mark.parametrize(
        "ends", ["logout", "everywhere", "elsewhere", "idle"],
    )
    def test_the_word_ends_with_the_session(self, idp, ask, alice, browser, other, clock, ends):
        sign_in(browser)
        ask()
        assert code_of(browser.submit(button=("choice", "same")))
        if ends == "logout":
            browser.open("/logout"), browser.submit()
        elif ends == "everywhere":
            m.revoke_user(idp, m.LOCAL, alice.id, "logout_all")
        elif ends == "idle":
            clock.pass_(idp.options.session_idle_expiration)
        clock.pass_(1)
        here = other if ends == "elsewhere" else browser
        sign_in(here)
        assert title(ask(to=here)) == "Continue as alice?"
        assert sent_back(ask(to=here, prompt="none"))[1]["error"] == "interaction_required"

    def test_it_outlives_a_login_of_the_same_user_and_no_other(self, ask, alice, new_user, browser):
        ask()
        browser.submit(username="alice", password=PASSWORD)
        sign_in(browser, request(prompt="login"))
        assert code_of(ask(prompt="none"))
        new_user("bob")
        sign_in(browser, request(prompt="login"), "bob")
        assert sent_back(ask(prompt="none"))[1]["error"] == "interaction_required"

    def test_it_is_of_one_client(self, register, ask, alice, browser):
        register("second", uris=[self.NATIVE])
        ask()
        browser.submit(username="alice", password=PASSWORD)
        members = sent_back(browser.open(request("second", redirect_uri=self.NATIVE, prompt="none")))[1]
        assert members["error"] == "interaction_required"

    def test_a_client_made_again_under_the_same_name_is_another(self, idp, register, spa, alice, browser):
        for _ in range(2):
            register("native", uris=[self.NATIVE])
            if not _:
                sign_in(browser, request("native", redirect_uri=self.NATIVE))
                m.delete_client(idp, m.LOCAL, "native")
        path = request("native", redirect_uri=self.NATIVE, prompt="none")
        assert sent_back(browser.open(path))[1]["error"] == "interaction_required"

    def test_it_is_durable(self, idp, make_idp, ask, alice, browser):
        ask()
        browser.submit(username="alice", password=PASSWORD)
        browser.caller = Caller(m.App(make_idp(idp.options), m.AUTH), "idp.example")
        assert code_of(ask(prompt="none"))

    @pytest.mark.parametrize("asked", [{"max_age": "10"}, {"prompt": "login"}, {"claims": True}], ids=" ".join)
    def test_it_does_not_replace_a_login_that_is_asked_for(self, ask, alice, new_user, browser, clock, asked):
        bob = new_user("bob")
        if "claims" in asked:
            asked = {"claims": json.dumps({"id_token": {"sub": {"value": bob.id}}})}
        sign_in(browser)
        clock.pass_(11)
        assert title(ask(**asked)) == "Sign in"
        ask()
        assert code_of(browser.submit(button=("choice", "same")))
        assert title(ask(**asked)) == "Sign in", "nor where the word was given before"

    def test_a_page_left_open_does_not_replace_it_either(self, ask, alice, browser, clock):
        sign_in(browser)
        assert title(ask(max_age="10")) == "Continue as alice?"
        clock.pass_(11)
        assert title(browser.submit(button=("choice", "same"))) == "Sign in"

    def test_the_word_is_for_the_user_who_was_shown(self, ask, alice, new_user, browser):
        sign_in(browser)
        ask()
        form = browser.forms().forms[0]["fields"]
        new_user("bob")
        sign_in(browser, request(prompt="login"), "bob")  # in another tab
        page = browser("POST", "/login/select", form | {"choice": "same"})
        assert page.status == 200 and title(page) == "Continue as bob?"
        assert sent_back(ask(prompt="none"))[1]["error"] == "interaction_required"
        browser.answer = page
        assert code_of(browser.submit(button=("choice", "same")))

    def test_without_the_token_of_the_form_no_word_is_given(self, ask, alice, browser):
        sign_in(browser)
        ask()
        form = browser.forms().forms[0]["fields"] | {"choice": "same"}
        for wrong in ({"form": ""}, {"form": form["form"][::-1]}):
            assert browser("POST", "/login/select", form | wrong).status == 403
        assert sent_back(ask(prompt="none"))[1]["error"] == "interaction_required"


class TestFirstFactor:
    def test_whatever_is_wrong_the_words_are_the_same(self, idp, spa, alice, new_user, browser, change):
        new_user("idle"), new_user("locked")
        change("UPDATE account SET is_active = 0 WHERE username = 'idle'")
        m.set_lockout(idp, m.LOCAL.acting_as("t"), "locked", "9999-12-31T00:00:00Z")
        pages = set()
        for username, password in (("alice", "wrong"), ("nobody", PASSWORD), ("idle", PASSWORD), ("locked", PASSWORD)):
            browser.open(request())
            answer = browser.submit(username=username, password=password)
            assert answer.status == 403
            pages.add(re.sub(rb'value="[^"]*"', b"", answer.body))
        assert (
            len(pages) == 1
            and PASSWORD.encode() not in browser.answer.body
            and browser.forms().forms[0]["fields"]["password"] == ""
        )

    def test_guesses_lock_the_account_for_every_path(self, spa, alice, browser, auth, service):
        browser.open(request())
        for _ in range(5):
            browser.submit(username="alice", password="wrong password")
        assert browser.submit(username="alice", password=PASSWORD).status == 403
        assert (
            auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service
            ).status
            == 403
        )

    def test_too_many_failures_end_the_transaction(self, spa, alice, browser):
        browser.open(request())
        for _ in range(m.LOGIN_TRIES - 1):
            assert browser.submit(username="nobody", password="x").status == 403
        assert browser.submit(username="nobody", password="x").status == 404

    def test_after_a_wrong_password_the_right_one_goes_on(self, spa, alice, browser):
        browser.open(request())
        browser.submit(username="alice", password="wrong")
        assert code_of(browser.submit(username="Alice ", password=PASSWORD))

    def test_the_old_paths_lead_into_the_pages(self, spa, alice, browser):
        browser.open(request())
        tx = browser.forms().forms[0]["fields"]["tx"]
        for path in (f"/login?jti={tx}", f"/totp?tx={tx}"):
            assert title(browser("GET", path)) == "Sign in"
        assert browser("GET", "/login?tx=x").status == 404
        assert (
            title(browser.open("/login")) == "Sign in"
            and title(browser.submit(username="alice", password=PASSWORD)) == "Your account"
        ), "by itself it leads to the account page"


class TestSecondFactor:
    """RFC 6238; what it cannot be: skipped."""

    def test_a_user_who_has_one_is_asked(self, idp, spa, alice, browser, exchange, give_totp, clock):
        code = second_factor(idp, alice, give_totp, clock)
        assert title(sign_in(browser)) == "Second factor" and "__Host-mad-session" not in browser.cookies
        assert browser.submit(totp="000000").status == 403
        claims = claims_of(exchange(code_of(browser.submit(totp=code()))).json["id_token"])
        assert claims["amr"] == ["pwd", "otp", "mfa"]

    @pytest.mark.parametrize("between", [" ", "-", "\u00a0", "\u202f"])
    def test_a_code_may_be_typed_as_it_is_shown(self, idp, spa, alice, browser, exchange, give_totp, clock, between):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        assert browser.submit(totp=as_shown(code(), between)[:-1]).status == 403
        claims = claims_of(exchange(code_of(browser.submit(totp=as_shown(code(), between)))).json["id_token"])
        assert claims["amr"] == ["pwd", "otp", "mfa"]

    def test_a_code_spent_in_one_form_is_spent_in_every_form(
        self, idp, spa, alice, browser, other, give_totp, clock
    ):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        assert code_of(browser.submit(totp=code()))
        sign_in(other)
        assert other.submit(totp=as_shown(code())).status == 403

    def test_no_way_leads_around_it(self, idp, auth, spa, alice, browser, give_totp, clock):
        second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        form = browser.forms().forms[0]["fields"]
        for path in ("/login", "/login/consent", "/login/codes", "/login/select", "/login/enrol"):
            answer = browser(
                "POST", path,
                form
                | {"username": "alice", "password": PASSWORD, "decision": "allow", "choice": "same", "totp": "000000"},
            )
            assert answer.status == 409 and "location" not in answer.headers
        assert (
            auth.post("/login/finalize", {"jti": form["tx"]}).status == 400
            and sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"
        )

    def test_a_code_works_once_and_guesses_lock_it(self, idp, spa, alice, browser, other, give_totp, clock):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        used = code()
        assert code_of(browser.submit(totp=used))
        sign_in(other)
        assert other.submit(totp=used).status == 403
        clock.pass_(30)
        for _ in range(m.TOTP_TRIES):
            other.submit(totp="000000")
        assert other.submit(totp=code()).status == 403, "locked"

    @pytest.mark.parametrize(
        "end",
        [
            lambda idp, id: m.set_user_active(idp, m.LOCAL.acting_as("t"), id, False),
            lambda idp, id: m.reset_password(idp, m.LOCAL.acting_as("t"), id, NEW_PASSWORD),
            lambda idp, id: m.revoke_user(idp, m.LOCAL.acting_as("t"), id, "x"),
        ],
    )
    def test_what_the_user_loses_between_the_steps_counts(self, idp, spa, alice, browser, give_totp, clock, end):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        clock.pass_(1)
        end(idp, alice.id)
        assert browser.submit(totp=code()).status == 403

    def test_a_recovery_code_stands_for_it_once(self, idp, spa, alice, browser, other, exchange, give_totp, clock):
        second_factor(idp, alice, give_totp, clock)
        codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
        assert len(set(codes)) == 10 and not any(
            code.replace("-", "") in str(idp.store.connection.execute("SELECT * FROM recovery_code").fetchall())
            for code in codes
        )
        sign_in(browser)
        claims = claims_of(
            exchange(code_of(browser.submit(totp=" " + codes[0].upper().replace("-", " ")))).json["id_token"]
        )
        assert claims["amr"] == ["pwd", "mfa"]
        sign_in(other)
        assert other.submit(totp=codes[0]).status == 403 and code_of(other.submit(totp=codes[1]))
        assert idp.store.count_recovery_codes(alice.id) == 8

    def test_a_client_that_demands_one_has_it_set_up(self, idp, register, alice, browser, exchange):
        register("bank", flags={"ENABLE_TOTP": "", "TOTP_ISSUER": "The Bank"})
        assert (
            title(sign_in(browser, request("bank"))) == "Set up a second factor"
            and "__Host-mad-session" not in browser.cookies
        )
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        assert b"data:image/svg+xml;base64," in browser.answer.body and browser.submit(totp="000000").status == 403
        page = browser.submit(totp=as_shown(pyotp.TOTP(seed).at(idp.now())))
        codes = re.findall(rb"<code>([a-z2-9-]{19})</code>", page.body)
        assert title(page) == "Recovery codes" and len(codes) == 10
        claims = claims_of(exchange(code_of(browser.submit()), "bank").json["id_token"])
        assert claims["amr"] == ["pwd", "otp", "mfa"] and idp.store.find_account(alice.id).totp_sealed

    def enrolling(self, register, browser):
        """Give the password to a client that demands a second factor: its seed."""
        register("bank", flags={"ENABLE_TOTP": ""})
        assert title(sign_in(browser, request("bank"))) == "Set up a second factor"
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        return seed

    @pytest.mark.parametrize("prompt", ["", "select_account"])
    def test_a_session_enrols_one_only_after_the_password(self, idp, register, spa, alice, browser, prompt):
        register("bank", flags={"ENABLE_TOTP": ""})
        sign_in(browser)
        page = browser.open(request("bank", **({"prompt": prompt} if prompt else {})))
        if prompt:
            page = browser.submit(button=("choice", "same"))
        assert title(page) == "Sign in" and b"secret" not in page.body
        form = browser.forms().forms[0]["fields"]
        assert form["username"] == ("" if prompt else "alice")
        assert browser("POST", "/login/enrol", form | {"totp": "000000"}).status == 409
        browser.open("/login?tx=" + form["tx"])
        assert title(browser.submit(username="alice", password=PASSWORD)) == "Set up a second factor"
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        assert title(browser.submit(totp=pyotp.TOTP(seed).at(idp.now()))) == "Recovery codes"
        assert code_of(browser.submit()) and idp.store.find_account(alice.id).totp_sealed

    @pytest.mark.parametrize(
        "end",
        [
            lambda idp, id: m.reset_password(idp, m.LOCAL.acting_as("t"), id, NEW_PASSWORD),
            lambda idp, id: m.revoke_user(idp, m.LOCAL.acting_as("t"), id, "logout_all"),
        ],
    )
    def test_who_was_ended_before_the_first_code_of_an_enrolment_enrols_nothing(
        self, idp, register, alice, browser, clock, end
    ):
        seed = self.enrolling(register, browser)
        clock.pass_(1)
        end(idp, alice.id)
        assert browser.submit(totp=pyotp.TOTP(seed).at(idp.now())).status == 403
        assert not idp.store.find_account(alice.id).totp_sealed

    def test_a_wrong_first_code_is_a_row_of_the_audit_log(self, idp, register, alice, browser, clock):
        seed = self.enrolling(register, browser)
        assert browser.submit(totp="000000").status == 403
        (row,) = idp.store.list_audit("totp_first_code_wrong")
        assert (row.actor_id, row.target, row.result) == (alice.id, alice.id, "failure")
        assert idp.store.find_account(alice.id).totp_failures == 1
        assert browser.submit(totp=pyotp.TOTP(seed).at(idp.now())).status == 200
        assert len(idp.store.list_audit("totp_first_code_wrong")) == len(idp.store.list_audit("totp_enabled")) == 1

    @pytest.mark.parametrize("what", ["totp_locked_until", "lockout_until"])
    def test_while_it_or_the_account_is_locked_the_first_code_of_an_enrolment_is_refused(
        self, idp, register, alice, browser, change, what
    ):
        seed = self.enrolling(register, browser)
        change(f"UPDATE account SET {what} = :until WHERE id = :id", until=idp.now() + 60, id=alice.id)
        assert browser.submit(totp=pyotp.TOTP(seed).at(idp.now())).status == 403
        assert not idp.store.find_account(alice.id).totp_sealed

    def test_guesses_at_the_first_code_of_an_enrolment_are_counted(self, idp, register, alice, browser):
        self.enrolling(register, browser)
        for _ in range(m.TOTP_TRIES):
            assert browser.submit(totp="000000").status == 403
        assert idp.store.find_account(alice.id).totp_locked_until > idp.now()
        for _ in range(m.LOGIN_TRIES - m.TOTP_TRIES - 1):
            assert browser.submit(totp="000000").status == 403
        assert browser.submit(totp="000000").status == 404

    def test_too_many_wrong_codes_end_the_transaction(self, idp, spa, alice, browser, give_totp, clock):
        second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        for _ in range(m.LOGIN_TRIES - 1):
            assert browser.submit(totp="000000").status == 403
        assert browser.submit(totp="000000").status == 404

    def test_an_enrolment_never_replaces_one_that_was_set_up_meanwhile(
        self, idp, register, alice, browser, give_totp
    ):
        seed = self.enrolling(register, browser)
        give_totp(idp, idp.store.find_account(alice.id))
        before = idp.store.find_account(alice.id).totp_sealed
        assert browser.submit(totp=pyotp.TOTP(seed).at(idp.now())).status == 403
        assert idp.store.find_account(alice.id).totp_sealed == before

    def test_the_first_code_of_an_enrolment_is_spent_by_it(self, idp, register, spa, alice, browser, other):
        """RFC 6238 §5.2"""
        seed = self.enrolling(register, browser)
        code = pyotp.TOTP(seed).at(idp.now())
        assert browser.submit(totp=code).status == 200
        assert title(sign_in(other)) == "Second factor" and other.submit(totp=code).status == 403

    def test_a_logout_ends_the_login_that_shows_recovery_codes(self, idp, register, alice, browser):
        seed = self.enrolling(register, browser)
        browser.submit(totp=pyotp.TOTP(seed).at(idp.now()))
        shown = browser.forms().forms[0]
        assert shown["action"].endswith("/login/codes")
        browser.open("/logout")
        browser.submit()
        answer = browser("POST", "/login/codes", shown["fields"])
        assert answer.status == 404 and "location" not in answer.headers

    def test_a_session_without_one_is_not_enough_for_a_client_that_demands_one(
        self, idp, register, spa, alice, browser, give_totp, clock
    ):
        register("bank", flags={"ENABLE_TOTP": ""})
        sign_in(browser)
        assert sent_back(browser.open(request("bank", prompt="none")))[1]["error"] == "interaction_required"
        code = second_factor(idp, alice, give_totp, clock)
        assert title(browser.open(request("bank"))) == "Second factor"
        assert code_of(browser.submit(totp=code())) and code_of(browser.open(request("bank", prompt="none")))


class TestConsent:
    @pytest.fixture
    def third(self, register):
        return register("third", is_first_party=False, display_name="Third & Co")

    def test_only_what_is_granted_is_shown_and_agreed_to(self, idp, register, alice, browser, exchange):
        register("third", is_first_party=False, scopes=["api:read", "api:write"])
        page = sign_in(browser, request("third", scope="openid api:read api:write groupies")).body.decode()
        assert "know who you are" in page and "api:read" in page and "api:write" not in page and "groupies" not in page
        bought = exchange(code_of(browser.submit(button=("decision", "allow"))), "third").json
        assert bought["scope"] == "api:read openid"
        agreed = idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id)
        assert agreed == "api:read openid"
        m.assign_scopes(idp, m.LOCAL, idp.store.find_account(alice.id), ["api:write"])
        assert title(browser.open(request("third", scope="openid api:read api:write"))) == "Permission"

    def test_what_the_user_gains_meanwhile_is_asked_for_again(self, idp, register, alice, browser, exchange):
        register("third", is_first_party=False, scopes=["api:read", "api:write"])
        sign_in(browser, request("third", scope="openid api:write"))
        m.assign_scopes(idp, m.LOCAL, idp.store.find_account(alice.id), ["api:write"])
        page = browser.submit(button=("decision", "allow"))
        assert title(page) == "Permission" and "api:write" in page.body.decode()
        bought = exchange(code_of(browser.submit(button=("decision", "allow"))), "third").json
        assert bought["scope"] == "api:write openid"

    def test_groups_are_named_in_every_language(self, idp, register, alice, browser):
        register("third", is_first_party=False)
        assert "read the groups you belong to" in sign_in(
            browser, request("third", scope="openid groups", ui_locales="en")
        ).body.decode()
        assert all("scope_" + name in texts for texts in idp.pages.texts.values() for name in m.OIDC_SCOPES)

    def test_a_request_without_scope_is_shown_what_it_is_granted(self, register, alice, browser):
        register("third", is_first_party=False, scopes=["api:read", "api:write"])
        for scope in (None, ""):
            page = sign_in(browser, request("third", scope=scope))
            assert title(page) == "Permission" and "api:read" in page.body.decode()
            assert "api:write" not in page.body.decode()
            browser.cookies = {}

    def test_a_third_party_asks_once(self, idp, third, alice, browser, exchange):
        page = sign_in(browser, request("third"))
        assert (
            title(page) == "Permission"
            and "Third &amp; Co" in page.body.decode()
            and "read your e-mail address" in page.body.decode()
            and sent_back(browser.open(request("third", prompt="none")))[1]["error"] == "consent_required"
        )
        browser.open(request("third"))
        assert exchange(code_of(browser.submit(button=("decision", "allow"))), "third").status == 200
        assert code_of(browser.open(request("third", prompt="none"))) and title(
            browser.open(request("third", scope="openid roles"))
        ) == "Permission" == title(browser.open(request("third", prompt="consent")))

    def test_who_asks_for_nothing_asks_once_too(self, register, alice, browser):
        register("bare", is_first_party=False, scopes=[])
        assert title(sign_in(browser, request("bare", scope=None))) == "Permission"
        assert code_of(browser.submit(button=("decision", "allow"))) and code_of(
            browser.open(request("bare", scope=None))
        )

    def test_no_is_an_answer(self, idp, third, alice, browser):
        sign_in(browser, request("third"))
        _, members = sent_back(browser.submit(button=("decision", "deny")))
        assert (
            members["error"] == "access_denied"
            and members["state"] == "st&te"
            and idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id) is None
        )
        browser.open(request("third"))
        assert sent_back(browser.submit())[1]["error"] == "access_denied", "no button is no yes"

    def test_a_first_party_does_not_ask(self, spa, alice, browser):
        assert code_of(sign_in(browser))

    OPENS = {
        "name": "profile", "nickname": "profile", "preferred_username": "profile", "updated_at": "profile",
        "email": "email", "email_verified": "email", "roles": "roles", "groups": "groups",
    }

    @pytest.mark.parametrize("of", ["id_token", "userinfo"])
    @pytest.mark.parametrize("name, scope", OPENS.items())
    def test_a_claim_asked_for_by_name_counts_as_the_scope_that_opens_it(
        self, idp, auth, third, root, browser, exchange, of, name, scope
    ):
        """OpenID Connect Core §5.5"""
        sign_in(browser, username="root", path=request("third", scope="openid"))
        assert code_of(browser.submit(button=("decision", "allow")))
        path = request("third", scope="openid", claims=json.dumps({of: {name: None}}))
        assert sent_back(browser.open(path + "&prompt=none"))[1]["error"] == "consent_required"
        page = browser.open(path)
        assert title(page) == "Permission" and idp.pages.texts["en"]["scope_" + scope] in page.body.decode()
        bought = exchange(code_of(browser.submit(button=("decision", "allow"))), "third").json
        assert idp.store.find_consent(root.id, m.get_client(idp, "third").row.id) == " ".join(sorted(["openid", scope]))
        claims = claims_of(bought["id_token"])
        userinfo = auth.get("/userinfo", bearer=bought["access_token"]).json
        assert (name in claims, name in userinfo) == (of == "id_token", of == "userinfo")
        assert bought["scope"] == "openid" and not {*claims, *userinfo} & {*self.OPENS} - {name}
        assert code_of(browser.open(path + "&prompt=none")), "and once is enough"
        assert code_of(browser.open(request("third", scope=f"openid {scope}", prompt="none"))), "as is the scope"

    def test_without_openid_no_claim_is_released_and_none_is_asked_for(self, register, idp, alice, browser, exchange):
        register("plain", is_first_party=False)
        claims = json.dumps({"userinfo": {"email": None}, "id_token": {"name": None}})
        page = sign_in(browser, request("plain", scope="api:read", claims=claims))
        assert "e-mail" not in page.body.decode() and "your name" not in page.body.decode()
        assert exchange(code_of(browser.submit(button=("decision", "allow"))), "plain").json["scope"] == "api:read"
        assert idp.store.find_consent(alice.id, m.get_client(idp, "plain").row.id) == "api:read"

    def test_a_first_party_gets_claims_by_name_without_a_question(self, auth, spa, alice, browser, exchange):
        claims = json.dumps({"userinfo": {"email": None}, "id_token": {"name": None}})
        bought = exchange(code_of(sign_in(browser, request(scope="openid", claims=claims)))).json
        assert claims_of(bought["id_token"])["name"] == "alice"
        assert auth.get("/userinfo", bearer=bought["access_token"]).json["email"] == "alice@example.org"

    def test_what_a_login_was_promised_before_is_released_by_consent_alone(
        self, idp, auth, spa, alice, browser, exchange
    ):
        """A login of a client that became a third party, or of before claims were asked for."""
        claims = json.dumps({"userinfo": {"email": None, "name": None}, "id_token": {"name": None}})
        path = request(scope="openid offline_access", claims=claims)
        bought = exchange(code_of(sign_in(browser, path))).json
        m.update_client(idp, m.LOCAL, "spa", UpdateClient(is_first_party=False))
        account, client = idp.store.find_account(alice.id), m.get_client(idp, "spa")
        m.give_consent(idp, m.LOCAL, account, client, ["openid", "email"])
        userinfo = auth.get("/userinfo", bearer=bought["access_token"]).json
        assert userinfo["email"] == "alice@example.org" and "name" not in userinfo
        again = auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "spa"}
        ).json
        assert "name" in claims_of(bought["id_token"]) and "name" not in claims_of(again["id_token"])

    def test_consent_to_less_does_not_forget_what_was_agreed_to_before(self, idp, third, alice, browser):
        sign_in(browser, request("third", scope="openid email"))
        browser.submit(button=("decision", "allow"))
        browser.open(request("third", scope="openid", prompt="consent"))
        assert code_of(browser.submit(button=("decision", "allow")))
        assert code_of(browser.open(request("third", scope="openid email", prompt="none")))
        assert idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id) == "email openid"

    def test_of_two_consents_at_once_neither_loses_what_the_other_adds(self, idp, make_idp, third, alice):
        account, idps = idp.store.find_account(alice.id), [idp, make_idp(idp.options)]
        scopes = [[f"s{number}" for number in range(half, 20, 2)] for half in (0, 1)]

        def consent(one, mine):
            for scope in mine:
                m.give_consent(one, m.LOCAL, account, m.get_client(one, "third"), [scope])

        threads = [threading.Thread(target=consent, args=pair) for pair in zip(idps, scopes, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        agreed = idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id).split()
        assert set(agreed) == {f"s{number}" for number in range(20)}

    def test_no_code_is_issued_to_a_third_party_without_consent(self, idp, third, alice, clock):
        """Whichever page or route asks for the code."""
        client, account = m.get_client(idp, "third"), idp.store.find_account(alice.id)
        asked = m.AuthorizeRequest("third", CALLBACK, scope="openid", claims='{"userinfo":["email"]}')
        for scopes in ((), ("openid",), ("email",)):
            if scopes:
                m.give_consent(idp, m.LOCAL, account, client, list(scopes))
            if scopes != ("email",):
                with pytest.raises(m.Problem, match="consent_required"):
                    m.issue_code(idp, m.LOCAL, client, asked, account, ["pwd"], idp.now())
        assert m.issue_code(idp, m.LOCAL, client, asked, account, ["pwd"], idp.now())


class TestWaysOut:
    """Cancel, "not you?" and "forgotten?"; RFC 6749 §4.1.2.1, OpenID Connect Core §3.1.2.1."""

    @pytest.fixture
    def third(self, register):
        return register("third", is_first_party=False, display_name="Third & Co")

    def way(self, browser, path):
        """The number of the form of the page that leads there."""
        actions = [form["action"] for form in browser.forms().forms]
        return actions.index("https://idp.example" + path)

    @pytest.fixture
    def at(self, idp, third, register, alice, browser):
        """A browser at a step of a login."""
        register("bank", flags={"ENABLE_TOTP": ""})

        def call(step):
            if step == "totp":
                seed = m.begin_totp(idp, m.LOCAL, idp.store.find_account(alice.id))
                SECRETS.add(seed)
                account = idp.store.find_account(alice.id)
                m.confirm_totp(idp, m.LOCAL, account, pyotp.TOTP(seed).at(idp.now()))
            browser.open(request("bank" if step == "enrol" else "third", state="st&te"))
            if step == "select":
                browser.submit(username="alice", password=PASSWORD)
                browser.open(request("third", state="st&te", prompt="select_account"))
            elif step != "password":
                browser.submit(username="alice", password=PASSWORD)
            return {
                "password": "Sign in", "totp": "Second factor", "enrol": "Set up a second factor",
                "consent": "Permission", "select": "Choose an account",
            }[step] == title(browser.answer)

        return call

    @pytest.mark.parametrize("step", ["password", "totp", "enrol", "select"])
    def test_cancel_sends_back_to_the_client_each_time(self, at, browser, idp, step):
        assert at(step)
        number = self.way(browser, "/login/cancel")
        page = browser.answer
        for _ in range(2):  # a double click, or "back" and once more
            browser.answer = page
            location, members = sent_back(browser.submit(number))
            assert location == CALLBACK and members["iss"] == "https://idp.example"
            assert (members["error"], members["state"]) == ("access_denied", "st&te")
        logged = [line for line in idp.stream.getvalue().splitlines() if "path=/login/cancel" in line]
        assert len(logged) == 2 and all(" status=303 " in line for line in logged), "as on the wire"

    def test_after_cancel_the_browsers_back_leads_to_the_login_again(self, at, browser):
        assert at("password")
        page = browser.answer
        browser.submit(self.way(browser, "/login/cancel"))
        browser.answer = page
        assert title(browser.submit(username="alice", password=PASSWORD)) == "Permission"

    @pytest.mark.parametrize("step", ["totp", "enrol", "consent"])
    def test_not_you_leads_back_to_the_password_and_nothing_proven_stays(self, at, browser, exchange, idp, step):
        assert at(step) and "alice" in browser.answer.body.decode()
        number, page = self.way(browser, "/login/other"), browser.answer
        for _ in range(2):
            browser.answer = page
            assert title(browser.submit(number)) == "Sign in" and b'value="alice"' not in browser.answer.body
        tx = browser.forms().forms[0]["fields"]["tx"]
        login = idp.store.find_login(tx, m.sha256(browser.cookies["__Host-mad-login"]), idp.now())
        assert (login.state, login.user_id, login.amr, login.auth_time, login.proven_ms) == ("password", None, "", 0, 0)

    def test_another_account_gets_the_code(self, at, browser, exchange, new_user):
        bob = new_user("bob")
        assert at("consent")
        browser.submit(self.way(browser, "/login/other"))
        assert title(browser.submit(username="bob", password=PASSWORD)) == "Permission"
        assert b"<strong>bob</strong>" in browser.answer.body
        bought = exchange(code_of(browser.submit(button=("decision", "allow"))), "third").json
        assert jwt.decode(bought["id_token"], options={"verify_signature": False})["sub"] == bob.id

    @pytest.mark.parametrize("path", ["/login/other", "/login/cancel"])
    def test_neither_is_done_without_the_forms_token_or_in_another_browser(self, at, browser, other, path):
        assert at("totp")
        fields = browser.forms().forms[self.way(browser, path)]["fields"]
        for form in ("", "x", fields["form"][:-1] + "~"):
            assert browser("POST", path, fields | {"form": form}).status == 403
        assert other("POST", path, fields).status == 404
        assert title(browser.open("/totp?tx=" + fields["tx"])) == "Second factor"

    def test_the_login_of_the_account_page_has_no_client_to_cancel_to(self, alice, browser):
        browser.open("/account")
        fields = browser.forms().forms[0]["fields"]
        assert b"/login/cancel" not in browser.answer.body
        assert browser("POST", "/login/cancel", {"tx": fields["tx"], "form": fields["form"]}).status == 400

    @pytest.mark.parametrize(
        "uri, shown",
        [
            ("https://app.example/cb", "app.example"), ("https://app.example:8443/cb", "app.example:8443"),
            ("http://127.0.0.1/cb", "an application on this device"), ("http://[::1]/cb", "an application on this device"),
            ("com.example.app:/cb", "an application on this device"),
        ],
    )
    def test_consent_names_the_application_and_its_host(self, register, alice, browser, uri, shown):
        register("there", is_first_party=False, display_name="Third & Co", uris=[uri])
        for page in (
            browser.open(request("there", redirect_uri=uri)), browser.submit(username="alice", password=PASSWORD)
        ):
            assert f'<span class="hint">{shown}</span>' in page.body.decode()
            assert "<strong>Third &amp; Co</strong>" in page.body.decode()

    @pytest.mark.parametrize(
        "answer, shown",
        [
            ("Call 4711 & ask.", "<p>Call 4711 &amp; ask.</p>"), ("mailto:help@example.org", 'href="mailto:help@example.org"'),
            ("https://help.example/?a=1&b=2", 'href="https://help.example/?a=1&amp;b=2"'),
            ("javascript:alert(1)", "<p>javascript:alert(1)</p>"), ("", ""),
        ],
    )
    def test_forgotten_is_answered_as_the_operator_says(self, make_idp, answer, shown):
        browser = Browser(
            m.App(make_idp(Options(**CHEAP, oidc_issuer="https://idp.example", login_help=answer)), m.AUTH)
        )
        page = browser.open("/account").body.decode()
        assert shown in page and ("Forgotten?" in page) is bool(answer)

    def test_the_picture_of_an_application_is_the_operators_file(self, make_idp, tmp_path, new_client):
        (tmp_path / "logos").mkdir()
        (tmp_path / "logos" / "a%2Fb.svg").write_text("<svg/>")
        (tmp_path / "secret.png").write_text("secret")
        (tmp_path / "logos" / "large.png").write_bytes(b"x" * 65537)
        pages = make_idp(Options(**CHEAP, oidc_issuer="https://idp.example", pages_folder=str(tmp_path))).pages
        assert pages.picture("a/b") == "data:image/svg+xml;base64,PHN2Zy8+"
        assert pages.picture("../secret") == pages.picture("large") == pages.picture("none") == ""

    def test_what_pages_share_is_the_operators_file_too(self, make_idp, tmp_path):
        (tmp_path / "part_cancel.html").write_text("<p>{{client}}: ring 42</p>")
        options = Options(**CHEAP, oidc_issuer="https://idp.example", pages_folder=str(tmp_path))
        words = make_idp(options).pages.texts["en"]
        for pages_options, shown in ((options, True), (Options(**CHEAP, oidc_issuer="https://idp.example"), False)):
            page = make_idp(pages_options).pages.render(
                "sign_in", text=words, language="en", base="", script="", style="", logo="", brand="Box", error="",
                client="A & B", picture="", host="", tx="t", form="f", username="", help="", help_link=False,
            )
            assert (b"A &amp; B: ring 42" in page) is shown and (b"/login/cancel" in page) is not shown


class TestConsentRevoked:
    """A consent can be taken back, and what was issued on it ends with it. RFC 6749 §1.4, §10.3; RFC 7009 §2"""

    @pytest.fixture
    def third(self, register):
        return register("third", is_first_party=False, display_name="Third & Co")

    @pytest.fixture
    def agree(self, third, browser):
        def call(scope="openid email offline_access", username="alice"):
            page = browser.open(request("third", scope=scope))
            if title(page) == "Sign in":
                browser.submit(username=username, password=PASSWORD)
            return code_of(browser.submit(button=("decision", "allow")))

        return call

    @pytest.fixture(params=["account", "ADMIN"])
    def take_back(self, request, idp, browser, alice, call):
        def by_account(client_id="third"):
            browser.open("/account")
            number = next(
                number for number, form in enumerate(browser.forms().forms)
                if (form["fields"].get("action"), form["fields"].get("id")) == ("revoke_consent", client_id)
            )
            assert title(browser.submit(number)) == "Your account"

        def by_admin(client_id="third"):
            assert call("DELETE", f"/users/alice/consents/{client_id}").status == 200

        return by_account if request.param == "account" else by_admin

    def test_it_ends_what_was_issued_and_is_asked_for_again(
        self, idp, auth, agree, take_back, alice, browser, exchange, clock
    ):
        bought, unspent = exchange(agree(), "third").json, agree("openid email api:read")
        clock.pass_(1)
        take_back()
        assert auth.get("/userinfo", bearer=bought["access_token"]).status == 401
        form = {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "third"}
        assert auth.post("/token", form).json["error"] == "invalid_grant"
        assert exchange(unspent, "third").json["error"] == "invalid_grant"
        assert idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id) is None
        members = sent_back(browser.open(request("third", prompt="none")))[1]
        assert members["error"] == "consent_required", "the browser is logged in, and asked again"
        assert exchange(agree("openid"), "third").json["scope"] == "openid", "less than before"
        assert idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id) == "openid"

    def test_it_ends_nothing_else(
        self, idp, auth, spa, register, agree, take_back, alice, new_user, browser, other, exchange, clock
    ):
        register("fourth", is_first_party=False)
        new_user("bob")
        sign_in(other, request("third"), "bob")
        of_bob = exchange(code_of(other.submit(button=("decision", "allow"))), "third").json["access_token"]
        agree()
        browser.open(request("fourth"))
        fourth = exchange(code_of(browser.submit(button=("decision", "allow"))), "fourth").json["access_token"]
        ours = exchange(code_of(browser.open(request()))).json["access_token"]
        clock.pass_(1)
        take_back()
        assert all(auth.get("/userinfo", bearer=token).status == 200 for token in (of_bob, fourth, ours))
        assert code_of(browser.open(request("fourth", prompt="none"))) and code_of(browser.open(request(prompt="none")))
        assert code_of(other.open(request("third", prompt="none"))), "nor the consent of another user"

    def test_it_is_in_the_audit_log(self, idp, agree, take_back, alice):
        agree()
        take_back()
        row = next(row for row in idp.store.list_audit(limit=10) if row.action == "consent_revoked")
        assert (row.target, row.secondary) == ("third", f"user_id={alice.id}")

    def test_without_its_audit_row_it_is_not_taken_back(self, idp, agree, alice, exchange, auth, monkeypatch):
        token = exchange(agree(), "third").json["access_token"]

        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        account = idp.store.find_account(alice.id)
        with monkeypatch.context() as broken, pytest.raises(Unavailable):
            broken.setattr(idp.store, "append_audit", fail)
            m.revoke_consent(idp, m.LOCAL, account, "third")
        idp.store.flush()
        assert auth.get("/userinfo", bearer=token).status == 200
        assert idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id)

    def test_a_code_being_exchanged_meanwhile_buys_nothing(
        self, idp, agree, alice, auth, exchange, monkeypatch
    ):
        code, issue = agree(), m.issue

        def late(idp, client, granted, origin):
            monkeypatch.setattr(m, "issue", issue)
            m.revoke_consent(idp, m.LOCAL, idp.store.find_account(alice.id), "third")
            return issue(idp, client, granted, origin)

        monkeypatch.setattr(m, "issue", late)
        assert exchange(code, "third").json["error"] == "invalid_grant"

    def test_a_page_that_waits_for_consent_issues_nothing_on_the_old_one(
        self, idp, agree, alice, browser, monkeypatch
    ):
        agree()
        issue_code = m.issue_code

        def late(idp, *words):
            m.revoke_consent(idp, m.LOCAL, idp.store.find_account(alice.id), "third")
            return issue_code(idp, *words)

        monkeypatch.setattr(m, "issue_code", late)
        members = sent_back(browser.open(request("third", scope="openid email")))[1]
        assert members["error"] == "consent_required"

    def test_the_account_page_says_who_what_and_since_when(self, idp, agree, alice, browser, clock):
        since = m.iso(idp.now())
        agree("openid email api:read")
        page = browser.open("/account").body.decode()
        assert "What you allowed applications" in page and "Third &amp; Co" in page and since in page
        assert "know who you are" in page and "read your e-mail address" in page and "api:read" in page
        page = browser("GET", "/account", headers=[("Accept-Language", "de")]).body.decode()
        assert "Was Sie Anwendungen erlaubt haben" in page and "Zurücknehmen" in page

    def test_nobody_takes_back_what_is_somebody_elses(self, idp, agree, alice, new_user, other):
        agree()
        new_user("bob")
        sign_in(other, "/account", "bob")
        assert b"Third" not in other.answer.body
        form = other.forms().forms[0]["fields"]["form"]
        asked = {"form": form, "action": "revoke_consent", "id": "third"}
        assert other("POST", "/account", asked).status == 404
        assert other("POST", "/account", asked | {"form": ""}).status == 403
        assert idp.store.find_consent(alice.id, m.get_client(idp, "third").row.id)

    def test_administrators_list_and_take_back(self, idp, agree, alice, call, admin, bearer):
        assert call("GET", "/users/alice/consents").json == []
        since = m.iso(idp.now())
        agree()
        assert call("GET", f"/users/{alice.id}/consents").json == [
            {
                "client_id": "third", "display_name": "Third & Co",
                "scopes": ["email", "offline_access", "openid"], "given_at": since,
            }
        ]
        for path in ("/users/nobody/consents/third", "/users/alice/consents/nobody", "/users/root/consents/third"):
            assert call("DELETE", path).json["error"] == "not_found"
        assert call("GET", "/users/nobody/consents").status == 404
        assert admin("DELETE", "/users/alice/consents/third", bearer=bearer).status == 401
        id = m.get_client(idp, "third").row.id
        assert call("DELETE", f"/users/alice/consents/{id}").status == 200, "by the client's id too"
        assert call("DELETE", "/users/alice/consents/third").status == 404, "once"
        assert call("GET", "/users/alice/consents").json == []

    def test_of_a_client_that_is_switched_off_it_is_taken_back_too(self, idp, agree, take_back, alice, change):
        agree()
        change("UPDATE client SET is_active = 0 WHERE client_id = 'third'")
        take_back()
        assert idp.store.list_consents(alice.id) == []


class TestAttacks:
    """design: a transaction is bound to the browser that began it."""

    def test_a_login_under_way_is_nobody_elses(self, spa, alice, browser, other):
        browser.open(request())
        form = browser.forms().forms[0]["fields"]
        assert (
            other("GET", f"/login?tx={form['tx']}").status == 404
            and other("POST", "/login", form | {"username": "alice", "password": PASSWORD}).status == 404
        )
        other.open(request())
        assert other("POST", "/login", form | {"username": "alice", "password": PASSWORD}).status == 404, (
            "with a login cookie of its own"
        )

    def test_a_form_of_another_site_does_nothing(self, spa, alice, new_user, browser, other):
        """Login CSRF: the attacker knows everything but the victim's cookie."""
        other.open(request())
        theirs = other.forms().forms[0]["fields"]
        browser.open(request())
        mine = browser.forms().forms[0]["fields"]
        for form, status in (
            ({}, 404), ({"tx": mine["tx"]}, 403), ({"tx": mine["tx"], "form": ""}, 403),
            ({"tx": mine["tx"], "form": theirs["form"]}, 403), (theirs, 404),
        ):
            answer = browser("POST", "/login", form | {"username": "alice", "password": PASSWORD})
            assert answer.status == status and answer.cookies == []

    @pytest.mark.parametrize("begun", ["password", "session"])
    def test_a_logout_ends_the_login_that_waits_for_consent(self, register, spa, alice, browser, clock, begun):
        register("third", is_first_party=False)
        if begun == "session":
            sign_in(browser)
            clock.pass_(5)
            browser.open(request("third"))
        else:
            sign_in(browser, request("third"))
        consent = browser.forms().forms[0]["fields"]
        browser.open("/logout")
        browser.submit()
        answer = browser("POST", "/login/consent", consent | {"decision": "allow"})
        assert answer.status == 404 and "location" not in answer.headers

    def test_the_cookie_of_a_login_alone_does_not_finish_it(self, register, alice, new_user, browser, other):
        register("third", is_first_party=False)
        new_user("mallory")
        sign_in(browser, request("third"))
        consent = browser.forms().forms[0]["fields"]
        other.cookies["__Host-mad-login"] = browser.cookies["__Host-mad-login"]
        assert other("POST", "/login/consent", consent | {"decision": "allow"}).status == 404, "without a session"
        sign_in(other, "/account", username="mallory")
        assert other("POST", "/login/consent", consent | {"decision": "allow"}).status == 404, (
            "in a session of somebody else"
        )
        assert code_of(browser.submit(button=("decision", "allow")))

    def test_a_second_factor_asked_for_by_a_session_ends_with_it(
        self, idp, register, spa, alice, browser, give_totp, clock
    ):
        register("bank", flags={"ENABLE_TOTP": ""})
        sign_in(browser)
        code = second_factor(idp, alice, give_totp, clock)
        browser.open(request("bank"))
        form = browser.forms().forms[0]["fields"]
        browser.open("/logout")
        browser.submit()
        assert browser("POST", "/totp", form | {"totp": code()}).status == 404

    @pytest.mark.parametrize("factor", ["password", "totp", "enrol"])
    def test_who_planted_the_cookie_of_a_login_does_not_gain_it(
        self, idp, register, alice, browser, other, give_totp, clock, factor
    ):
        """Cookies ignore ports, and over http every page of the host can set them."""
        register("third", is_first_party=False)
        register("bank", flags={"ENABLE_TOTP": ""}, is_first_party=False)
        code = second_factor(idp, alice, give_totp, clock) if factor == "totp" else None
        other.open(request("bank" if factor == "enrol" else "third"))
        page, planted = other.forms().forms[0]["fields"], other.cookies["__Host-mad-login"]
        browser.cookies["__Host-mad-login"] = planted
        browser.open("/login?tx=" + page["tx"])
        browser.submit(username="alice", password=PASSWORD)
        proven = [browser.cookies["__Host-mad-login"]]
        if factor == "totp":
            browser.submit(totp=code())
            proven.append(browser.cookies["__Host-mad-login"])
        if factor == "enrol":
            seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
            SECRETS.add(seed)
            browser.submit(totp=pyotp.TOTP(seed).at(idp.now()))
            proven.append(browser.cookies["__Host-mad-login"])
        assert len({planted, *proven}) == 1 + len(proven), "a new secret after each factor"
        for cookie in {planted, *proven[:-1]}:
            other.cookies["__Host-mad-login"] = cookie
            assert other("GET", "/login?tx=" + page["tx"]).status == 404
        if factor == "enrol":
            browser.submit()
        assert code_of(browser.submit(button=("decision", "allow")))

    def test_a_login_that_waits_for_a_second_factor_stays_with_its_secret(
        self, idp, register, alice, new_user, browser, other, give_totp, clock
    ):
        register("third")
        second_factor(idp, alice, give_totp, clock)
        sign_in(browser, request("third"))
        waiting, bound = browser.forms().forms[0]["fields"]["tx"], browser.cookies["__Host-mad-login"]
        new_user("mallory")
        other.open(request("third"))
        mallory = other.forms().forms[0]["fields"]
        other.cookies["__Host-mad-login"] = bound
        assert other("POST", "/login", mallory | {"username": "mallory", "password": PASSWORD}).status == 404
        other.open(request("third", state="two"))
        assert code_of(other.submit(username="mallory", password=PASSWORD))
        assert other("GET", "/login?tx=" + waiting).status == 404
        assert browser("GET", "/login?tx=" + waiting).status == 200

    @pytest.mark.parametrize("form", ["\u00e9", "\U0001f511", "x" * 1000])
    def test_a_form_with_any_other_token_is_refused(self, idp, register, alice, browser, form):
        register("third", is_first_party=False)
        sign_in(browser, request("third"))
        consent = browser.forms().forms[0]["fields"]
        for path in ("/login/consent", "/logout", "/logout-all", "/account"):
            assert browser("POST", path, consent | {"form": form}).status in (401, 403), path
        assert browser("POST", "/end-session", {"form": form}).status == 403
        assert code_of(browser("POST", "/login/consent", consent | {"decision": "allow"}))

    def test_no_session_is_fixed(self, idp, spa, alice, browser):
        browser.cookies["__Host-mad-session"] = browser.cookies["__Host-mad-login"] = "a" * 43
        sign_in(browser)
        assert browser.cookies["__Host-mad-session"] != "a" * 43

    def test_a_cookie_that_is_there_twice_is_none(self, idp, spa, alice, browser, auth):
        sign_in(browser)
        good = browser.cookies["__Host-mad-session"]
        for cookie in (
            f"__Host-mad-session={good}; __Host-mad-session=evil",
            f"__Host-mad-session=evil; __Host-mad-session={good}", f"mad-session={good}",
        ):
            answer = Caller(auth.app)("GET", request(prompt="none"), headers=[("Cookie", cookie)])
            assert sent_back(answer)[1]["error"] == "login_required"

    def test_each_step_is_taken_once(self, idp, spa, alice, browser, give_totp, clock):
        code = second_factor(idp, alice, give_totp, clock)
        browser.open(request())
        first = browser.forms().forms[0]["fields"] | {"username": "alice", "password": PASSWORD}
        browser.follow(browser("POST", "/login", first))
        second = browser.forms().forms[0]["fields"] | {"totp": code()}
        clock.pass_(31)
        assert browser("POST", "/login", first).status == 403
        assert code_of(browser("POST", "/totp", second | {"totp": code()}))
        clock.pass_(31)
        assert (
            browser("POST", "/totp", second | {"totp": code()}).status == 404
            and browser("POST", "/login", first).status == 404
        )

    @pytest.mark.parametrize("end", ["the redirect URI is taken away", "the client is switched off"])
    def test_a_login_under_way_leads_nowhere_once_its_client_has_lost_the_uri(
        self, idp, spa, alice, browser, change, end
    ):
        browser.open(request())
        if "URI" in end:
            change("DELETE FROM client_uri")
        else:
            change("UPDATE client SET is_active = 0")
        answer = browser.submit(username="alice", password=PASSWORD)
        assert answer.status == 404 and "location" not in answer.headers
        assert idp.store.list_audit("authorization_code_issued") == []

    def test_an_expired_login_is_over(self, spa, alice, browser, clock):
        browser.open(request())
        clock.pass_(m.LOGIN_TTL)
        assert browser.submit(username="alice", password=PASSWORD).status == 404

    def test_a_code_of_an_attacker_does_not_fit_a_victims_verifier(self, spa, alice, new_user, other, exchange):
        """Code injection: RFC 9700 §2.1.1."""
        new_user("mallory")
        assert (
            exchange(code_of(sign_in(other, username="mallory")), code_verifier="x" * 43).json["error"]
            == "invalid_grant"
        )

    @pytest.mark.parametrize(
        "word",
        [
            '"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", "{{7*7}}", "</title><script>x</script>",
            "javascript:alert(1)",
        ],
    )
    def test_nothing_reflected_is_markup(self, register, alice, browser, word):
        register("odd", display_name=word[:255], is_first_party=False)
        pages = [
            browser.open(request("odd", login_hint=word, state=word, nonce=word, ui_locales=word[:80])),
            browser.submit(username=word, password=word),
            browser("GET", f"/login?tx={word.replace(' ', '+').replace('&', '')}"),
            browser("GET", request("odd", redirect_uri=word)),
        ]
        pages += [
            sign_in(browser, request("odd", state=word)),
            browser.open(request("odd", response_mode="form_post", state=word, prompt="none")),
        ]
        for page in pages:
            for tag, attributes in Markup(page.body.decode()).tags:
                assert tag in ALLOWED and not any(name.startswith("on") or name == "style" for name in attributes), (
                    tag, attributes,
                )
                assert (attributes.get("src") or "https://idp.example/").startswith(
                    ("https://idp.example/", "data:image/")
                ) and (tag != "script" or attributes["src"])

    @pytest.mark.parametrize("path", ["/login", "/account", "/logout", "/end-session", "/authorize", "/login?tx=x"])
    def test_every_page_carries_its_armour(self, spa, alice, browser, path):
        for answer in (browser("GET", path), browser.open(request())):
            policy = answer.headers.get("content-security-policy", "")
            assert (
                "frame-ancestors 'none'" in policy
                and "default-src 'none'" in policy
                and "unsafe" not in policy
                and answer.headers["referrer-policy"] == "no-referrer"
                and answer.headers["cache-control"] == "no-store"
                and answer.headers["x-content-type-options"] == "nosniff"
            )

    def test_pages_have_no_inline_script_or_style(self):
        for path in (PAGES).glob("*.html"):
            page = path.read_text()
            assert not re.search(r"<script(?! src)|\sstyle=|\son[a-z]+=|<style", page), path
            assert "{{!" not in page or path.name == "layout.html", "only the layout takes what is markup already"

    def test_prompt_none_never_shows_a_page(self, register, spa, alice, browser):
        register("third", is_first_party=False)
        register("bank", flags={"ENABLE_TOTP": ""})
        for _ in range(2):
            for client in ("spa", "third", "bank"):
                assert browser("GET", request(client, prompt="none")).status == 303
            browser.open(request()).status == 200 and browser.submit(username="alice", password=PASSWORD)

    def test_logins_under_way_are_bounded(self, idp, spa, browser, other, clock):
        for _ in range(50):
            browser("GET", request())
        assert browser("GET", request()).status == 429, "in one browser"
        statuses = [other("GET", request()).status for _ in range(20) if other.cookies.clear() is None]
        assert statuses[0] == 303 and statuses[-1] == 429 and int(other.answer.headers["retry-after"]) >= 1, (
            "from one address"
        )
        clock.pass_(m.LOGIN_TTL + 1)
        for _ in range(10):
            other("GET", request())
        assert idp.store.connection.execute("SELECT count(*) FROM login_transaction").fetchone()[0] <= 10, (
            "what is over makes room"
        )

    def test_a_lockout_keeps_guesses_out_and_not_who_is_in(self, auth, service, spa, alice, browser):
        sign_in(browser)
        for _ in range(5):
            auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": "wrong password"}, auth=service
            )
        assert code_of(browser.open(request(prompt="none")))


def acr_claim(*values, essential=True, of="id_token"):
    """The claims parameter that requests an acr."""
    return json.dumps({of: {"acr": {"essential": essential, "values": list(values)}}})


class TestSize:
    def test_a_login_counts_for_what_it_keeps(self, auth, spa):
        """Each request keeps up to 8 KB for ten minutes, of whoever sends it."""
        began = 0
        while auth.get(request(state="x" * 4000)).status == 303:
            began += 1
        assert began == 60 // 5


class TestSentTwice:
    """A double click: the browser shows what the second copy of a form gets, and may have dropped the first response."""

    @pytest.fixture(params=["dropped", "kept"])
    def twice(self, request, browser, clock):
        """Send the form of the page twice: (first answer, second answer). The second copy has the old cookies or the new."""

        def call(wait=0, again=None, **fields):
            form = browser.forms().forms[0]
            path, data = form["action"].removeprefix(browser.issuer), form["fields"] | fields
            before = dict(browser.cookies)
            first = browser("POST", path, data)
            if request.param == "dropped":
                browser.cookies = before
            clock.pass_(wait)
            return first, browser("POST", path, data | (again or {}))

        return call

    def test_the_password(self, spa, alice, browser, exchange, twice):
        browser.open(request())
        first, second = twice(username="alice", password=PASSWORD)
        assert sent_back(second)[0] == sent_back(first)[0] == CALLBACK
        assert exchange(code_of(second)).status == 200
        assert code_of(browser.open(request(prompt="none"))), "and the browser has a session"

    def test_the_password_at_the_account_page(self, idp, spa, alice, browser, twice):
        browser.open("/account")
        first, second = twice(username="alice", password=PASSWORD)
        assert first.headers["location"] == second.headers["location"] == "https://idp.example/account"
        assert b"alice" in browser.follow(second).body

    def test_the_password_before_a_consent(self, register, alice, browser, exchange, twice):
        register("third", is_first_party=False)
        browser.open(request("third"))
        first, second = twice(username="alice", password=PASSWORD)
        assert first.headers["location"] == second.headers["location"]
        browser.follow(second)
        first, second = twice(decision="allow")
        assert sent_back(second)[0] == sent_back(first)[0] and exchange(code_of(second), client="third").status == 200

    def test_a_denial(self, register, alice, browser, twice):
        register("third", is_first_party=False)
        sign_in(browser, request("third"))
        first, second = twice(decision="deny")
        assert sent_back(first) == sent_back(second) and sent_back(first)[1]["error"] == "access_denied"

    @pytest.mark.parametrize("decisions", [("deny", "allow"), ("allow", "deny")])
    def test_another_button_is_another_form(self, register, alice, browser, twice, decisions):
        register("third", is_first_party=False)
        sign_in(browser, request("third"))
        first, second = twice(again={"decision": decisions[1]}, decision=decisions[0])
        assert first.status == 303 and second.status == 404

    def test_the_second_factor(self, idp, spa, alice, browser, exchange, give_totp, clock, twice):
        code = second_factor(idp, alice, give_totp, clock)
        browser.open(request())
        first, second = twice(username="alice", password=PASSWORD)
        assert first.headers["location"] == second.headers["location"]
        assert title(browser.follow(second)) == "Second factor"
        first, second = twice(totp=code())
        claims = claims_of(exchange(code_of(second)).json["id_token"])
        assert claims["amr"] == ["pwd", "otp", "mfa"] and idp.store.find_account(alice.id).totp_failures == 0
        assert code_of(browser.open(request(prompt="none")))

    def test_a_recovery_code(self, idp, spa, alice, browser, exchange, give_totp, clock, twice):
        second_factor(idp, alice, give_totp, clock)
        codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
        sign_in(browser)
        assert exchange(code_of(twice(totp=codes[0])[1])).status == 200
        assert idp.store.count_recovery_codes(alice.id) == len(codes) - 1

    def test_an_enrolment_shows_recovery_codes_that_work(self, idp, register, alice, browser, twice):
        register("bank", flags={"ENABLE_TOTP": ""})
        sign_in(browser, request("bank"))
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        _, second = twice(totp=pyotp.TOTP(seed).at(idp.now()))
        shown = re.findall(r"(?:[a-z2-9]{4}-){3}[a-z2-9]{4}", second.body.decode())
        assert second.status == 200 and len(shown) == m.RECOVERY_CODES
        assert idp.store.spend_recovery_code(alice.id, m.sha256(shown[0].replace("-", "")), idp.now())
        assert code_of(twice()[1])

    def test_continue_as(self, spa, alice, browser, exchange, twice):
        sign_in(browser)
        browser.open(request(prompt="select_account"))
        assert exchange(code_of(twice(choice="same")[1])).status == 200
        browser.open(request(prompt="select_account"))
        first, second = twice(choice="other")
        assert first.headers["location"] == second.headers["location"]
        assert title(browser.follow(second)) == "Sign in"

    def test_both_at_once(self, spa, alice, browser, other, exchange, monkeypatch):
        """One moves the login on while the password of the other is being verified."""
        browser.open(request())
        form = browser.forms().forms[0]["fields"] | {"username": "alice", "password": PASSWORD}
        other.cookies, verify, begun = dict(browser.cookies), m.authenticate_user, []

        def late(*words, **more):
            found = verify(*words, **more)
            if not begun:
                begun.append(None)
                begun[0] = other("POST", "/login", form)
            return found

        monkeypatch.setattr(m, "authenticate_user", late)
        assert exchange(code_of(browser("POST", "/login", form))).status == 200
        assert code_of(begun[0]) and code_of(browser.open(request(prompt="none")))

    @pytest.mark.parametrize("wait, status", [(30, 303), (31, 404)])
    def test_is_within_seconds(self, spa, alice, browser, twice, wait, status):
        browser.open(request())
        assert twice(wait, username="alice", password=PASSWORD)[1].status == status

    @pytest.mark.parametrize("again", [{"password": "wrong wrong"}, {"username": "bob"}, {"form": "x"}, {"form": ""}])
    def test_is_the_same_form(self, spa, alice, new_user, browser, twice, again):
        new_user("bob")
        browser.open(request())
        answer = twice(again=again, username="alice", password=PASSWORD)[1]
        assert answer.status == 404 and "location" not in answer.headers and not answer.cookies

    @pytest.mark.parametrize("which", ["another", "the next"])
    def test_is_the_same_code(self, idp, spa, alice, browser, give_totp, clock, twice, which):
        totp = pyotp.TOTP(give_totp(idp, alice.account))
        clock.pass_(60)
        sign_in(browser)
        answer = twice(again={"totp": totp.at(idp.now() + 30) if which == "the next" else "000000"}, totp=totp.at(idp.now()))[1]
        assert answer.status == 404 and not answer.cookies

    def test_is_of_the_same_browser(self, spa, alice, browser, other):
        browser.open(request())
        form = browser.forms().forms[0]["fields"] | {"username": "alice", "password": PASSWORD}
        assert code_of(browser("POST", "/login", form))
        other.open(request())
        assert other("POST", "/login", form).status == 404
        other.cookies.pop("__Host-mad-login")
        assert other("POST", "/login", form).status == 404

    def test_who_planted_the_first_secret_needs_the_password(self, register, alice, new_user, browser, other):
        register("third", is_first_party=False)
        new_user("mallory")
        other.open(request("third"))
        page, planted = other.forms().forms[0]["fields"], other.cookies["__Host-mad-login"]
        browser.cookies["__Host-mad-login"] = planted
        browser.open("/login?tx=" + page["tx"])
        browser.submit(username="alice", password=PASSWORD)
        for words in ({"username": "alice", "password": "guess"}, {"username": "mallory", "password": PASSWORD}):
            answer = other("POST", "/login", page | words)
            assert answer.status == 404 and not answer.cookies
        consent = browser.forms().forms[0]["fields"] | {"decision": "allow"}
        assert code_of(browser("POST", "/login/consent", consent))
        assert other("POST", "/login/consent", consent).status == 404

    @pytest.mark.parametrize("first_party", [True, False])
    def test_a_user_who_was_ended_meanwhile_gets_nothing(
        self, idp, register, alice, browser, clock, give_totp, first_party
    ):
        register("app", is_first_party=first_party)
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser, request("app"))
        form = browser.forms().forms[0]["fields"] | {"totp": code()}
        before = dict(browser.cookies)
        assert browser("POST", "/totp", form).status == 303
        browser.cookies = before
        m.revoke_user(idp, m.LOCAL, alice.id, "user_revoked")
        answer = browser("POST", "/totp", form)
        assert answer.status == 404 and not answer.cookies

    def test_a_consent_needs_its_session_again(self, register, alice, browser, other):
        register("third", is_first_party=False)
        sign_in(browser, request("third"))
        form = browser.forms().forms[0]["fields"] | {"decision": "allow"}
        assert code_of(browser("POST", "/login/consent", form))
        other.cookies["__Host-mad-login"] = browser.cookies["__Host-mad-login"]
        assert other("POST", "/login/consent", form).status == 404
        assert code_of(browser("POST", "/login/consent", form))

    def test_the_login_of_an_application_with_its_own_screens_has_no_pages(self, idp, auth, spa, alice, browser):
        jti = auth("POST", "/authorize", request().partition("?")[2]).json["jti"]
        form = {"jti": jti, "username": "alice", "password": PASSWORD}
        assert auth.post("/login/password", form).status == 200
        (id,) = idp.store.values("SELECT id FROM login_transaction")
        browser.cookies["__Host-mad-login"] = jti
        form |= {"tx": id, "form": m.form_token(idp.seal.form_key, f"{id} password")}
        assert browser("POST", "/login", form).status == 404

    def test_a_guess_is_counted_like_any_other(self, idp, spa, alice, browser):
        browser.open(request())
        form, before = browser.forms().forms[0]["fields"] | {"username": "alice"}, dict(browser.cookies)
        assert code_of(browser("POST", "/login", form | {"password": PASSWORD}))
        browser.cookies = before
        assert browser("POST", "/login", form | {"password": "a guess"}).status == 404
        assert idp.store.find_account(alice.id).failed_logins == 1


class TestAcr:
    """OpenID Connect Core §2, §3.1.2.1, §5.5.1.1"""

    ONE, TWO = "urn:microauthd:acr:1fa", "urn:microauthd:acr:2fa"

    @pytest.fixture
    def code(self, idp, alice, give_totp, clock):
        """Alice has a second factor: its next code."""
        return second_factor(idp, alice, give_totp, clock)

    @staticmethod
    def acr_of(bought):
        return claims_of(bought.json["id_token"])["acr"]

    def test_it_says_how_many_factors_there_were(self, auth, spa, alice, browser, exchange, idp, give_totp, clock):
        assert self.acr_of(exchange(code_of(sign_in(browser)))) == self.ONE
        code = second_factor(idp, alice, give_totp, clock)
        assert self.acr_of(exchange(code_of(browser.open(request())))) == self.ONE, "the session is of before"
        sign_in(browser, request(prompt="login"))
        assert self.acr_of(exchange(code_of(browser.submit(totp=code())))) == self.TWO
        assert self.acr_of(exchange(code_of(browser.open(request())))) == self.TWO
        metadata = auth.get("/.well-known/openid-configuration").json
        assert metadata["acr_values_supported"] == [self.ONE, self.TWO] and "acr" in metadata["claims_supported"]

    @pytest.mark.parametrize(
        "more",
        [
            {"acr_values": "urn:microauthd:acr:2fa"}, {"acr_values": "gold silver"}, {"acr_values": "x" * 4000},
            {"claims": acr_claim("urn:microauthd:acr:2fa", essential=False)}, {"claims": acr_claim("gold", essential=False)},
            {"claims": '{"id_token": {"acr": null}}'}, {"claims": '{"id_token": {"acr": {"values": ["gold"]}}}'},
            {"claims": '{"id_token": {"acr": {"essential": true}}}'},
            {"claims": '{"id_token": {"acr": {"essential": true, "values": []}}}'},
            {"claims": acr_claim("gold", of="userinfo")}, {"claims": "{}"},
        ],
    )
    @pytest.mark.parametrize("enrolled", [False, True])
    def test_a_voluntary_request_steps_nothing_up_and_is_no_error(
        self, idp, spa, alice, browser, exchange, give_totp, clock, more, enrolled
    ):
        sign_in(browser)
        if enrolled:
            second_factor(idp, alice, give_totp, clock)
        for prompt in ("", "none"):
            assert self.acr_of(exchange(code_of(browser.open(request(prompt=prompt, **more))))) == self.ONE

    def test_an_essential_one_asks_a_session_for_the_second_factor(
        self, auth, spa, alice, browser, exchange, idp, give_totp, clock
    ):
        first = exchange(code_of(sign_in(browser)))
        code = second_factor(idp, alice, give_totp, clock)
        path = request(claims=acr_claim(self.TWO), scope=OFFLINE)
        refused = sent_back(browser.open(path + "&prompt=none"))[1]
        assert refused["error"] == "interaction_required", "it can be met, but not without a page"
        assert title(browser.open(path)) == "Second factor"
        bought = exchange(code_of(browser.submit(totp=code())))
        assert self.acr_of(bought) == self.TWO and claims_of(bought.json["id_token"])["amr"] == ["pwd", "otp", "mfa"]
        assert claims_of(bought.json["id_token"])["auth_time"] == claims_of(first.json["id_token"])["auth_time"]
        assert self.acr_of(exchange(code_of(browser.open(path + "&prompt=none")))) == self.TWO
        form = {"grant_type": "refresh_token", "refresh_token": bought.json["refresh_token"], "client_id": "spa"}
        assert self.acr_of(auth.post("/token", form)) == self.TWO

    def test_it_asks_it_of_the_account_that_is_chosen(self, spa, alice, browser, exchange, idp, give_totp, clock):
        sign_in(browser)
        code = second_factor(idp, alice, give_totp, clock)
        browser.open(request(claims=acr_claim(self.TWO), prompt="select_account"))
        assert title(browser.submit()) == "Second factor"
        assert self.acr_of(exchange(code_of(browser.submit(totp=code())))) == self.TWO

    @pytest.mark.parametrize("prompt", ["", "none", "select_account", "consent"])
    def test_who_has_no_second_factor_cannot_meet_it(self, idp, spa, alice, browser, prompt):
        path = request(claims=acr_claim(self.TWO), prompt=prompt)
        if prompt != "none":
            assert sent_back(sign_in(browser, request(claims=acr_claim(self.TWO))))[1]["error"] == UNMET
        else:
            assert sent_back(browser.open(path))[1]["error"] == "login_required", "nobody is known yet"
            sign_in(browser)
        answer = browser.open(path)
        if prompt == "select_account":
            answer = browser.submit()
        uri, members = sent_back(answer)
        assert (uri, members["error"], members["state"]) == (CALLBACK, UNMET, "st&te") and "code" not in members

    def test_a_client_that_makes_its_users_enrol_can_have_it_met(self, idp, register, alice, browser, exchange):
        register("strict", flags={"ENABLE_TOTP": ""})
        sign_in(browser, request("strict", claims=acr_claim(self.TWO)))
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        browser.submit(totp=pyotp.TOTP(seed).at(idp.now()))
        assert self.acr_of(exchange(code_of(browser.submit()), "strict")) == self.TWO

    def test_nobody_consents_to_what_cannot_be_granted(self, register, alice, browser):
        register("third", is_first_party=False)
        assert sent_back(sign_in(browser, request("third", claims=acr_claim(self.TWO))))[1]["error"] == UNMET
        assert title(browser.open(request("third"))) != "Sign in"

    def test_without_pages_it_holds_too(self, register, auth, alice):
        register("app", is_first_party=True)
        query = request("app", claims=acr_claim(self.TWO)).partition("?")[2]
        jti = auth.post("/authorize", query, headers=[("Accept", "application/json")]).json["jti"]
        form = {"jti": jti, "redirect_uri": CALLBACK}
        assert auth.post("/login/password", form | {"username": "alice", "password": PASSWORD}).status == 200
        answer = auth.post("/login/finalize", form)
        assert (answer.status, answer.json["error"]) == (400, UNMET)

    @pytest.mark.parametrize("values, acr", [(("1fa",), "1fa"), (("2fa", "1fa"), "1fa"), (("gold", "1fa"), "1fa")])
    def test_one_factor_is_enough_where_it_is_among_what_is_demanded(self, spa, alice, browser, exchange, values, acr):
        claims = acr_claim(*("urn:microauthd:acr:" + value for value in values))
        assert self.acr_of(exchange(code_of(sign_in(browser, request(claims=claims))))) == "urn:microauthd:acr:" + acr

    @pytest.mark.parametrize("values, acr", [(("1fa",), "1fa"), (("1fa", "2fa"), "2fa"), (("2fa",), "2fa")])
    def test_two_factors_satisfy_who_demands_one(self, spa, code, browser, exchange, values, acr):
        claims = acr_claim(*("urn:microauthd:acr:" + value for value in values))
        sign_in(browser, request(claims=claims, scope=OFFLINE))
        assert self.acr_of(exchange(code_of(browser.submit(totp=code())))) == "urn:microauthd:acr:" + acr

    @pytest.mark.parametrize(
        "acr, error",
        [
            ({"essential": True, "values": ["gold"]}, "unmet_authentication_requirements"),
            ({"essential": True, "value": "gold"}, "unmet_authentication_requirements"),
            ({"essential": True, "values": [""]}, "unmet_authentication_requirements"),
            ({"essential": "true", "values": ["gold"]}, "invalid_request"),
            ({"essential": True, "values": "gold"}, "invalid_request"),
            ({"essential": True, "values": [1]}, "invalid_request"),
        ],
    )
    def test_what_nobody_reaches_is_refused_before_anybody_logs_in(self, spa, browser, acr, error):
        uri, members = sent_back(browser("GET", request(claims=json.dumps({"id_token": {"acr": acr}}))))
        assert (uri, members["error"], members["state"]) == (CALLBACK, error, "st&te")


BYE = "https://app.example/bye"


def broken(kind, bought):
    """An id_token_hint that nobody can verify, of the tokens that a login bought."""
    header, body, signature = bought["id_token"].split(".")
    foreign = m.KeyRing([make_key("RS256", 2048, 0)])
    return {
        "nonsense": "nonsense",
        "another signature": f"{header}.{body}.{signature[:-8]}AAAAAAAA",
        "another body": f"{header}.{body[:-4]}.{signature}",
        "no signature": f"{header}.{body}.",
        "another key": foreign.mint(foreign.access, m.JWT, claims_of(bought["id_token"])),
        "alg none": jwt.encode(claims_of(bought["id_token"]), "", algorithm="none"),
        "an access token": bought["access_token"],
        "very long": bought["id_token"] + "A" * 8192,
    }[kind]


BROKEN = (
    "nonsense", "another signature", "another body", "no signature", "another key", "alg none", "an access token",
    "very long",
)


@pytest.fixture
def bye(idp, spa, register):
    """Let two clients have people come back after a logout."""
    register("second")
    for client_id in ("spa", "second"):
        m.add_uri(idp, m.LOCAL.acting_as("test"), client_id, "post_logout", BYE)


class TestHints:
    """OpenID Connect Core §3.1.2.1, RP-Initiated Logout §2: a hint is never worse than none."""

    @pytest.fixture
    def lives(self, auth):
        """Whether the login that bought a refresh token goes on. It rotates the token."""

        def call(bought, client="spa"):
            form = {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": client}
            return auth.post("/token", form).status == 200

        return call

    @staticmethod
    def end(hint, **more):
        return "/end-session?" + urlencode({"id_token_hint": hint} | more)

    @pytest.mark.parametrize("kind", BROKEN)
    def test_one_that_nobody_can_verify_is_none(self, idp, spa, alice, browser, other, exchange, kind):
        hint = broken(kind, exchange(code_of(sign_in(browser))).json)
        assert code_of(browser.open(request(id_token_hint=hint)))
        refused = sent_back(browser.open(request(id_token_hint=hint, prompt="none")))[1]
        assert refused["error"] == "login_required", "nobody knows who is meant, and nobody may be asked"
        assert code_of(sign_in(other, request(id_token_hint=hint)))
        logged = [line for line in idp.stream.getvalue().splitlines() if " hint.ignored " in line]
        assert len(logged) == 3 and "reason=" in logged[0] and not any(hint[-20:] in line for line in logged[:1])

    @pytest.mark.parametrize("kind", BROKEN)
    @pytest.mark.parametrize(
        "more",
        [
            {}, {"post_logout_redirect_uri": BYE, "state": "s"}, {"post_logout_redirect_uri": BYE, "client_id": "spa"},
            {"post_logout_redirect_uri": BYE, "client_id": "second"}, {"post_logout_redirect_uri": "https://evil.example/"},
            {"client_id": "nobody"},
        ],
    )
    def test_with_such_a_one_a_logout_asks_and_leads_nowhere(
        self, bye, alice, browser, other, exchange, lives, kind, more
    ):
        bought = exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json
        hint = broken(kind, bought)
        assert title(browser.open(self.end(hint, **more))) == "Sign out"
        assert code_of(browser.open(request(prompt="none"))), "nobody is logged out unasked"
        assert title(other.open(self.end(hint, **more))) == "Signed out" and lives(bought), "nothing is read in it"
        browser.open(self.end(hint, **more))
        assert title(browser.submit()) == "Signed out"
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"

    @pytest.mark.parametrize("prompt", ["", "none", "login"])
    def test_a_good_one_is_of_the_client_that_asks(self, bye, alice, browser, exchange, prompt):
        hint = exchange(code_of(sign_in(browser))).json["id_token"]
        own = browser.open(request("spa", id_token_hint=hint, prompt=prompt))
        assert title(own) == "Sign in" if prompt == "login" else code_of(own)
        refused = sent_back(browser.open(request("second", id_token_hint=hint, prompt=prompt)))[1]
        assert refused["error"] == "invalid_request" and "code" not in refused

    @pytest.mark.parametrize("age", [0, 3600])
    def test_a_client_id_that_disagrees_with_it_ends_nothing(
        self, bye, alice, browser, exchange, lives, clock, age
    ):
        bought = exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json
        clock.pass_(age)
        for client_id in ("second", "nobody", "SPA"):
            answer = browser.open(self.end(bought["id_token"], client_id=client_id, post_logout_redirect_uri=BYE))
            assert answer.status == 400 and "location" not in answer.headers
        assert code_of(browser.open(request(prompt="none"))) and lives(bought)
        answer = browser.open(self.end(bought["id_token"], client_id="spa", post_logout_redirect_uri=BYE))
        assert answer.headers["location"] == BYE

    def test_without_the_session_a_good_one_ends_the_one_login_it_names(
        self, bye, alice, browser, other, exchange, lives, change
    ):
        named = exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json
        beside = exchange(code_of(browser.open(request("second", scope=OFFLINE))), "second").json
        change("UPDATE browser_session SET last_seen_at = 0")
        answer = other.open(self.end(named["id_token"], post_logout_redirect_uri=BYE))
        assert answer.headers["location"] == BYE and not lives(named) and lives(beside, "second")

    @pytest.mark.parametrize("age, ended", [(m.ID_TOKEN_TTL - 1, True), (m.ID_TOKEN_TTL, False)])
    def test_without_the_session_an_expired_one_ends_nothing(
        self, bye, alice, browser, other, exchange, lives, clock, age, ended
    ):
        bought = exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json
        clock.pass_(age)
        answer = other.open(self.end(bought["id_token"], post_logout_redirect_uri=BYE))
        assert answer.headers["location"] == BYE, "the client is known, and its user was logged out there"
        assert lives(bought) is not ended

    def test_an_expired_one_ends_its_login_in_a_later_session_of_the_same_user(
        self, bye, alice, new_user, browser, other, exchange, lives, clock
    ):
        bought = exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json
        clock.pass_(3600)
        new_user("bob")
        sign_in(other, username="bob")
        assert title(other.open(self.end(bought["id_token"]))) == "Sign out"
        other.submit()
        assert lives(bought), "bob's word is not alice's"
        bought = exchange(code_of(browser.open(request(scope=OFFLINE)))).json
        clock.pass_(3600)
        sign_in(other)
        assert title(other.open(self.end(bought["id_token"]))) == "Signed out" and not lives(bought)


class TestPostedHints:
    """RFC 9700 §4.3: what names a person or ends a login is not put into a URL."""

    @pytest.fixture
    def bought(self, spa, alice, browser, exchange):
        return exchange(code_of(sign_in(browser, request(scope=OFFLINE)))).json

    @staticmethod
    def post(browser, path, form):
        """Post as a page of another site does: without cookies, but those of the answer stay. The location."""
        held, browser.cookies = browser.cookies, {}
        answer = browser("POST", path, form)
        browser.cookies = held | browser.cookies
        assert answer.status == 303, answer
        location = answer.headers["location"].removeprefix("https://idp.example")
        names = {name for name, _ in parse_qsl(location.partition("?")[2])}
        assert location.startswith(path + "?") and not names & {"id_token_hint", "login_hint"}
        for value in (form.get("id_token_hint"), form.get("login_hint")):
            assert not value or value not in location and value not in "".join(answer.cookies)
        return location

    def ask(self, browser, client_id="spa", **more):
        return self.post(browser, "/authorize", dict(parse_qsl(request(client_id, **more).partition("?")[2])))

    def test_a_login_finds_them_where_the_browser_comes_back(self, idp, spa, alice, new_user, browser, other, bought):
        location = self.ask(browser, id_token_hint=bought["id_token"], login_hint="alice", prompt="none")
        row = idp.store.connection.execute("SELECT * FROM parked_hints").fetchone()
        handle = dict(parse_qsl(location.partition("?")[2]))["hint_handle"]
        assert handle not in str(row) and m.sha256(handle) == row[0] and bought["id_token"] not in str(row)
        assert len(handle) == 43 and not set(browser.cookies.values()) & set(row)
        assert code_of(browser.open(location))
        new_user("bob")
        sign_in(other, username="bob")
        location = self.ask(other, id_token_hint=bought["id_token"], prompt="none")
        assert sent_back(other.open(location))[1]["error"] == "login_required"
        assert title(other.open(self.ask(other, id_token_hint=bought["id_token"], login_hint="alice"))) == "Sign in"
        assert other.forms().forms[0]["fields"]["username"] == "alice"
        assert sent_back(other.submit(username="bob", password=PASSWORD))[1]["error"] == "login_required"

    def test_nothing_waits_where_nothing_is_hinted_at(self, idp, spa, browser):
        location = self.ask(browser)
        assert "hint_handle" not in location and not browser.cookies
        assert idp.store.connection.execute("SELECT count(*) FROM parked_hints").fetchone() == (0,)

    @pytest.mark.parametrize("case", ["used", "expired", "of another browser", "unknown", "long"])
    def test_a_handle_is_good_once_soon_and_in_its_browser(self, spa, alice, browser, other, bought, clock, case):
        for number, more in enumerate(({"prompt": "none"}, {"login_hint": "alice"})):
            location = self.ask(browser, id_token_hint=bought["id_token"], **more)
            if case == "used":
                browser.open(location)
            elif case == "expired":
                clock.pass_(m.HINTS_TTL)
            elif case == "unknown":
                location = re.sub("hint_handle=.*", "hint_handle=x", location)
            elif case == "long":
                location += "x" * 4000
            here = other if case == "of another browser" else browser
            if here is other:
                other.cookies |= {name: "x" * 43 for name in browser.cookies if "mad-hint" in name}
            if number:
                here.cookies.pop("__Host-mad-session", None)
                assert title(here.open(location)) == "Sign in", "it goes on without"
                assert here.forms().forms[0]["fields"]["username"] == ""
            else:
                assert sent_back(here.open(location))[1]["error"] == "login_required"

    def test_a_handle_lives_until_it_expires(self, spa, browser, bought, clock):
        location = self.ask(browser, id_token_hint=bought["id_token"], prompt="none")
        clock.pass_(m.HINTS_TTL - 1)
        assert code_of(browser.open(location))

    def test_another_client_cannot_use_a_handle(self, bye, browser, bought):
        location = self.ask(browser, id_token_hint=bought["id_token"], prompt="none")
        answer = browser.open(location.replace("client_id=spa", "client_id=second"))
        assert sent_back(answer)[1]["error"] == "invalid_request"

    def test_what_is_refused_is_refused_at_once(self, bye, browser, bought):
        for hint, error in ((bought["id_token"], "invalid_request"), ("nonsense", "login_required")):
            form = dict(parse_qsl(request("second", id_token_hint=hint, prompt="none").partition("?")[2]))
            assert sent_back(browser("POST", "/authorize", form))[1]["error"] == error

    def test_a_logout_finds_them(self, auth, bye, browser, bought):
        form = {"id_token_hint": bought["id_token"], "post_logout_redirect_uri": BYE, "state": "s&t"}
        location = self.post(browser, "/end-session", form)
        assert browser.open(location).headers["location"] == f"{BYE}?state=s%26t"
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"
        assert title(browser.open(location)) == "Signed out", "once"

    def test_one_of_somebody_else_waits_for_the_answer_of_the_person(self, bye, new_user, other, bought):
        new_user("bob")
        sign_in(other, username="bob")
        form = {"id_token_hint": bought["id_token"], "post_logout_redirect_uri": BYE}
        assert title(other.open(self.post(other, "/end-session", form))) == "Sign out"
        assert bought["id_token"].encode() not in other.answer.body
        assert other.submit().headers["location"] == BYE
        assert sent_back(other.open(request(prompt="none")))[1]["error"] == "login_required"

    def test_one_that_nobody_can_verify_asks_and_leads_nowhere(self, bye, browser, bought):
        form = {"id_token_hint": "nonsense", "post_logout_redirect_uri": BYE, "client_id": "spa"}
        assert title(browser.open(self.post(browser, "/end-session", form))) == "Sign out"
        assert title(browser.submit()) == "Signed out"

    @pytest.mark.parametrize("age, ended", [(0, True), (m.ID_TOKEN_TTL, False)])
    def test_a_program_without_cookies_ends_the_login_that_it_names(self, auth, bye, bought, clock, age, ended):
        clock.pass_(age)
        answer = auth.post("/end-session", {"id_token_hint": bought["id_token"]})
        assert answer.status == 303
        form = {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "spa"}
        assert (auth.post("/token", form).status == 400) is ended

    def test_they_are_bounded_as_logins_are_and_do_not_stay(self, idp, auth, spa, clock):
        form = request(login_hint="alice").partition("?")[2]
        page = {"headers": [("Accept", "text/html")]}
        statuses = [auth.post("/authorize", form, **page).status for _ in range(70)]
        assert statuses == [303] * 60 + [429] * 10
        assert auth.post("/authorize", form, peer="192.0.2.99", **page).status == 303
        assert auth.get("/authorize?" + request().partition("?")[2], **page).status == 303, "a login is another matter"
        clock.pass_(m.HINTS_TTL)
        for _ in range(4):
            auth.post("/authorize", form, **page)
        assert idp.store.connection.execute("SELECT count(*) FROM parked_hints").fetchone() == (4,)
        idp.store.revoke_future_rows(idp.now() - 3600, idp.now_ms() - 3_600_000, 0)
        assert idp.store.connection.execute("SELECT count(*) FROM parked_hints").fetchone() == (0,)

    def test_other_sites_can_set_only_so_many_cookies(self, spa, browser, auth):
        names = set()
        for number in range(300):
            form = request(login_hint="alice").partition("?")[2]
            answer = auth.post("/authorize", form, headers=[("Accept", "text/html")], peer=f"192.0.2.{number % 250}")
            names |= {line.partition("=")[0] for line in answer.cookies}
        assert 32 < len(names) <= 64


class TestLogout:
    """OpenID Connect RP-Initiated Logout 1.0"""

    @pytest.fixture
    def bye(self, idp, spa):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "post_logout", "https://app.example/bye")

    def test_with_a_hint_it_is_at_once(self, auth, bye, alice, browser, exchange, clock):
        bought = exchange(code_of(sign_in(browser, request(scope="openid offline_access")))).json
        clock.pass_(1000)
        answer = browser(
            "GET",
            f"/end-session?id_token_hint={bought['id_token']}&post_logout_redirect_uri=https://app.example/bye&state=x%26y",
        )
        assert (
            answer.headers["location"] == "https://app.example/bye?state=x%26y"
            and "__Host-mad-session" not in browser.cookies
        )
        assert auth.get("/me", bearer=bought["access_token"]).status == 401, "what began in this browser ends with it"
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": bought["refresh_token"], "client_id": "spa"}
            ).status
            == 400
        )
        assert sent_back(browser.open(request(prompt="none")))[1]["error"] == "login_required"

    def test_without_one_it_asks(self, bye, alice, browser):
        sign_in(browser)
        page = browser.open("/end-session?client_id=spa&post_logout_redirect_uri=https://app.example/bye&state=s")
        assert title(page) == "Sign out" and code_of(browser.open(request(prompt="none")))
        browser.open("/end-session?client_id=spa&post_logout_redirect_uri=https://app.example/bye&state=s")
        assert browser.submit().headers["location"] == "https://app.example/bye?state=s"
        assert title(browser.open("/end-session")) == "Signed out"

    def test_a_hint_of_somebody_else_asks(self, bye, alice, new_user, browser, other, exchange):
        new_user("bob")
        hint = exchange(code_of(sign_in(other, username="bob"))).json["id_token"]
        sign_in(browser)
        assert title(browser.open(f"/end-session?id_token_hint={hint}")) == "Sign out"

    @pytest.mark.parametrize(
        "query",
        [
            "post_logout_redirect_uri=https://evil.example/",
            "client_id=spa&post_logout_redirect_uri=https://evil.example/",
            "client_id=spa&post_logout_redirect_uri=https://app.example/cb",
            "client_id=nobody&post_logout_redirect_uri=https://app.example/bye",
            "post_logout_redirect_uri=https://app.example/bye",
            "client_id=spa&post_logout_redirect_uri=https://app.example/bye%3Fx",
        ],
    )
    def test_nobody_is_sent_where_it_is_not_registered(self, bye, alice, browser, query):
        sign_in(browser)
        answer = browser("GET", f"/end-session?{query}")
        assert (
            answer.status == 400 and "location" not in answer.headers and code_of(browser.open(request(prompt="none")))
        )

    def test_a_form_of_another_site_does_not_log_out(self, bye, alice, browser):
        sign_in(browser)
        for path in ("/end-session", "/logout", "/logout-all", "/account"):
            assert browser("POST", path, {"form": "wrong", "action": "end_all"}).status == 403
        assert code_of(browser.open(request(prompt="none")))

    @pytest.mark.parametrize("path", ["/end-session", "/logout", "/logout-all", "/account"])
    def test_a_form_of_another_site_comes_without_cookies_and_takes_none_away(self, bye, alice, browser, path):
        sign_in(browser)
        held = dict(browser.cookies)
        browser.cookies.clear()
        browser("POST", path, {"form": "x", "action": "end_all"})
        assert "__Host-mad-session" not in "".join(browser.answer.cookies)
        browser.cookies.update(held)
        assert code_of(browser.open(request(prompt="none")))

    def test_a_post_of_the_client_becomes_a_get_that_finds_the_session(self, auth, bye, alice, browser, exchange):
        bought = exchange(code_of(sign_in(browser))).json
        held = dict(browser.cookies)
        browser.cookies.clear()
        answer = browser(
            "POST", "/end-session",
            {
                "id_token_hint": bought["id_token"], "post_logout_redirect_uri": "https://app.example/bye",
                "state": "s&t",
            },
        )
        assert answer.status == 303 and answer.headers["location"].startswith("https://idp.example/end-session?")
        browser.cookies.update(held)
        assert (
            browser.follow(answer).headers["location"] == "https://app.example/bye?state=s%26t"
            and auth.get("/me", bearer=bought["access_token"]).status == 401
        )

    def test_the_page_and_everywhere(self, auth, bye, alice, browser, other, exchange):
        bought = exchange(code_of(sign_in(browser))).json
        sign_in(other)
        assert (
            title(browser.open("/logout")) == "Sign out"
            and title(browser.submit()) == "Signed out"
            and title(browser.open("/logout")) == "Signed out"
        )
        assert auth.get("/me", bearer=bought["access_token"]).status == 401 and code_of(
            other.open(request(prompt="none"))
        )
        sign_in(browser)
        form = browser.open("/account") and browser.forms().forms[-1]["fields"]["form"]
        assert (
            title(browser("POST", "/logout-all", {"form": form})) == "Signed out"
            and sent_back(other.open(request(prompt="none")))[1]["error"] == "login_required"
        )


class TestSessionBased:
    """SESSION_BASED_AUTH: a script asks, and the browser's session or the page answers. The original's flow."""

    def ask(self, browser, client="web", **more):
        """What a script's POST of the client gets, with the cookies of its browser."""
        headers = [("Accept", "application/json"), ("Sec-Fetch-Mode", "cors"), ("Sec-Fetch-Site", "same-origin")]
        return browser("POST", "/authorize", request(client, **more).partition("?")[2], headers=headers)

    @pytest.fixture
    def web(self, register):
        return register("web", flags={"SESSION_BASED_AUTH": ""})

    def test_without_a_session_the_script_is_sent_to_the_page(self, web, alice, browser):
        answer = self.ask(browser)
        location = answer.headers["location"]
        assert answer.status == 302 and re.fullmatch(r"https://idp\.example/login\?jti=[A-Za-z0-9_-]+", location)
        assert title(browser.follow()) == "Sign in"
        assert code_of(browser.submit(username="alice", password=PASSWORD))

    def test_with_a_session_it_gets_a_code_at_once(self, web, spa, alice, browser, exchange):
        sign_in(browser)
        answer = self.ask(browser)
        assert answer.status == 302
        to, members = sent_back(answer, 302)
        assert to == CALLBACK and members["state"] == "st&te"
        assert exchange(members["code"], "web").status == 200

    def test_no_password_is_taken_without_the_page(self, auth, web, alice, browser):
        jti = self.ask(browser).headers["location"].partition("jti=")[2]
        form = {"jti": jti, "username": "alice", "password": PASSWORD}
        assert auth.post("/login/password", form).status == 400

    def test_what_is_wrong_is_said_to_the_script(self, web, browser):
        answer = self.ask(browser, redirect_uri="https://evil.example/")
        assert answer.status == 400 and answer.json["success"] is False
        answer = self.ask(browser, prompt="none")
        assert answer.status == 400 and answer.json["error"] == "login_required"

    def test_other_clients_keep_the_headless_flow(self, spa, browser):
        assert self.ask(browser, "spa").json["requires_totp"] is False


class TestHeadless:
    """An application with screens of its own."""

    def begin(self, auth, headers=(), **more):
        return auth("POST", "/authorize", request(**more).partition("?")[2], headers=headers)

    def test_the_whole_way(self, auth, spa, alice, exchange):
        step = self.begin(auth).json
        assert step == {
            "jti": step["jti"], "client_id": "spa", "redirect_uri": CALLBACK, "requires_totp": False,
            "is_session_based": False,
        }
        SECRETS.add(step["jti"])
        told = auth.get(f"/auth-session/{step['jti']}").json
        assert told["client_id"] == "spa" and told["state"] == "st&te" and told["login_state"] == "password"
        after = auth.post(
            "/login/password", {"jti": step["jti"], "username": "alice", "password": PASSWORD, "redirect_uri": CALLBACK}
        )
        assert after.json == step
        final = auth.post("/login/finalize", {"jti": step["jti"]})
        assert final.status == 302
        _, members = sent_back(final, 302)
        assert members["state"] == "st&te" and auth.post("/login/finalize", {"jti": step["jti"]}).status == 400
        bought = exchange(members["code"]).json
        assert bought["refresh_token"] and claims_of(bought["id_token"])["nonce"] == "n0nce"

    def test_the_second_factor_cannot_be_skipped(self, idp, auth, spa, alice, exchange, give_totp, clock):
        code = second_factor(idp, alice, give_totp, clock)
        jti = self.begin(auth).json["jti"]
        SECRETS.add(jti)
        assert auth.post("/login/finalize", {"jti": jti}).status == 400
        assert (
            auth.post("/login/password", {"jti": jti, "username": "alice", "password": PASSWORD}).json["requires_totp"]
            is True
        )
        assert (
            auth.post("/login/finalize", {"jti": jti}).status == 400
            and auth.post("/login/password", {"jti": jti, "username": "alice", "password": PASSWORD}).status == 400
        )
        assert (
            auth.post("/login/totp", {"jti": jti, "totp_code": "000000"}).status == 400
            and auth.post("/login/totp", {"jti": jti, "totp_code": as_shown(code())}).json["requires_totp"] is False
        )
        assert exchange(sent_back(auth.post("/login/finalize", {"jti": jti}), 302)[1]["code"]).status == 200

    def test_who_was_ended_after_the_factors_gets_no_code(self, idp, auth, spa, alice, clock):
        jti = self.begin(auth).json["jti"]
        SECRETS.add(jti)
        assert auth.post("/login/password", {"jti": jti, "username": "alice", "password": PASSWORD}).status == 200
        clock.pass_(1)
        m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "logout_all")
        assert auth.post("/login/finalize", {"jti": jti}).status == 400

    def test_whatever_is_wrong_is_one_answer(self, auth, spa, alice):
        jti = self.begin(auth).json["jti"]
        SECRETS.add(jti)
        answers = [
            auth.post("/login/password", {"jti": jti, "username": "alice", "password": "wrong"}),
            auth.post("/login/password", {"jti": jti, "username": "nobody", "password": PASSWORD}),
            auth.post("/login/password", {"jti": "x", "username": "alice", "password": PASSWORD}),
            auth.post(
                "/login/password",
                {"jti": jti, "username": "alice", "password": PASSWORD, "redirect_uri": "https://evil.example/"},
            ),
            auth.post("/login/totp", {"jti": jti, "totp_code": "000000"}),
        ]
        assert {(answer.status, answer.body) for answer in answers} == {(400, answers[0].body)} and answers[0].json[
            "success"
        ] is False

    def test_it_is_for_first_parties_with_pkce(self, auth, spa, register, service, idp):
        register("third", is_first_party=False)
        m.add_uri(idp, m.LOCAL.acting_as("test"), "service", "redirect", CALLBACK)
        headers, plain = [("Accept", "application/json")], {"code_challenge": None, "code_challenge_method": None}
        for answer in (
            self.begin(auth, headers, client_id="third"), self.begin(auth, headers, client_id="service", **plain),
            self.begin(auth, headers, client_id="nobody"),
        ):
            assert answer.status == 400 and answer.json["success"] is False
        assert self.begin(auth, redirect_uri="https://evil.example/").json["error"] == "invalid_request"

    # What genuine programs send.
    CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
    AXIOS = "application/json, text/plain, */*"
    JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"  # HttpURLConnection

    @pytest.mark.parametrize(
        "accept, mode",
        [
            (None, None), ("*/*", None), ("*/*", "cors"), ("*/*", "same-origin"), ("", None), ("*/*;q=0.5", None),
            (AXIOS, "cors"), (AXIOS, None), ("application/json", None), ("Application/JSON;charset=utf-8", None),
            ("application/json, text/html;q=0.9", None), ("application/*", None), ("text/html;q=0, */*", None),
        ],
    )
    def test_a_first_party_with_pkce_gets_json(self, auth, spa, accept, mode):
        headers = [(name, value) for name, value in (("Accept", accept), ("Sec-Fetch-Mode", mode)) if value is not None]
        step = self.begin(auth, headers)
        assert step.status == 200
        SECRETS.add(step.json["jti"])

    @pytest.mark.parametrize(
        "accept, mode",
        [
            (CHROMIUM, "navigate"), (CHROMIUM, None), (JAVA, None), ("text/html", None), ("text/*", None),
            ("*/*", "navigate"), (None, "navigate"), (AXIOS, "navigate"), ("application/json", "navigate"),
            ("text/html, application/json", None), ("application/json;q=0.5, text/html", None),
            ("application/json;q=0, */*", None), ("application/json;q=0.5, */*", None),
        ],
    )
    def test_who_prefers_html_or_navigates_gets_the_page(self, auth, spa, browser, accept, mode):
        headers = [(name, value) for name, value in (("Accept", accept), ("Sec-Fetch-Mode", mode)) if value is not None]
        answer = self.begin(auth, headers)
        assert answer.status == 303 and answer.headers["location"].startswith("https://idp.example/authorize?")
        assert title(browser.follow(browser.open(answer.headers["location"].removeprefix("https://idp.example"))))

    @pytest.mark.parametrize("headers", [(), [("Accept", "*/*")]])
    def test_an_openid_request_of_another_client_gets_the_page(self, auth, idp, register, service, headers):
        """A suite's browser and scripts send */*. OpenID Connect Core §3.1.2.1."""
        register("third", is_first_party=False)
        m.add_uri(idp, m.LOCAL.acting_as("test"), "service", "redirect", CALLBACK)
        for more in (
            {"client_id": "third"},
            {"client_id": "service", "code_challenge": None, "code_challenge_method": None},
        ):
            answer = self.begin(auth, headers, **more)
            assert answer.status == 303 and answer.headers["location"].startswith("https://idp.example/authorize?")
        unknown = self.begin(auth, headers, client_id="nobody")
        assert unknown.status == 400 and unknown.headers["content-type"].startswith("text/html")

    def test_who_has_no_second_factor_gets_no_further_where_a_client_demands_one(self, auth, register, alice):
        """It is set up at the pages, or by an administrator."""
        register("bank", flags={"ENABLE_TOTP": ""})
        jti = self.begin(auth, client_id="bank").json["jti"]
        SECRETS.add(jti)
        answer = auth.post("/login/password", {"jti": jti, "username": "alice", "password": PASSWORD})
        assert (answer.status, answer.json["error"]) == (400, "invalid_grant")
        assert auth.post("/login/finalize", {"jti": jti}).json["error"] == "invalid_grant"

    def test_its_secret_in_a_path_is_not_in_the_log(self, idp, auth, spa, clock):
        jti = self.begin(auth).json["jti"]
        SECRETS.add(jti)
        clock.pass_(601)
        for secret in (jti, jti[:30], "short"):
            assert auth.get(f"/auth-session/{secret}").status == 404
        said = [line for line in idp.stream.getvalue().splitlines() if " refused " in line][-3:]
        assert len(said) == 3 and all("path=/auth-session/<jti>" in line.replace('"', "") for line in said)
        assert jti[:30] not in "".join(said) and "short" not in "".join(said)

    @pytest.mark.parametrize(
        "path, said",
        [
            ("/auth-sessions/{}", "/auth-sessions/<secret>"), ("/auth-session/{}/more", "/auth-session/<secret>/more"),
            ("/sessions/{}.{}", "/sessions/<secret>.<secret>"),
            ("/users/0b9d6d7e-7f0d-4f0e-8f5c-3b1e0f3d9a11/x", "/users/0b9d6d7e-7f0d-4f0e-8f5c-3b1e0f3d9a11/x"),
            ("/sessions/" + "0af3" * 8, "/sessions/" + "0af3" * 8), ("/sensor-1/a.b", "/sensor-1/a.b"),
        ],
    )
    def test_a_secret_in_the_wrong_path_is_not_in_the_log_and_an_identifier_is(
        self, make_idp, tmp_path, monkeypatch, path, said
    ):
        monkeypatch.chdir(tmp_path)
        idp, handle = make_idp(Options(**CHEAP, serve_public_auth_files=True)), m.random_handle()
        for answer in (
            Caller(m.App(idp, m.AUTH)).get(path.format(handle, handle)),
            Caller(m.restrict_hosts(m.App(idp, m.ADMIN), idp), "evil.example").get(path.format(handle, handle)),
        ):
            line = idp.stream.getvalue().splitlines()[-1].replace('"', "")
            assert answer.status in (404, 421) and f" path={said} " in line and handle not in line

    def test_a_page_login_is_not_driven_by_it_nor_the_other_way_round(self, idp, auth, spa, alice, browser):
        browser.open(request())
        tx = browser.forms().forms[0]["fields"]["tx"]
        for jti in (tx, browser.cookies["__Host-mad-login"]):
            assert (
                auth.post("/login/password", {"jti": jti, "username": "alice", "password": PASSWORD}).status == 400
                and auth.get(f"/auth-session/{jti}").status == 404
            )
        jti = self.begin(auth).json["jti"]
        SECRETS.add(jti)
        browser.cookies["__Host-mad-login"] = jti
        row = idp.store.find_headless_login(m.sha256(jti), idp.now())
        assert {browser("GET", f"/login?tx={it}").status for it in (jti, row.id)} == {404}


class TestToldInTheLog:
    """RFC 6749 §4.1.2.1: the page is silent; the log has what came and the nearest that is registered."""

    CAME = (
        "https://app.example/cb/", "http://app.example/cb", "https://evil.example/?a=1", "javascript:alert(1)",
        "https://app.example/cb#x",
    )

    @pytest.fixture
    def line(self, idp):
        """The last line of the log."""
        return lambda: idp.stream.getvalue().splitlines()[-1]

    def is_silent(self, page, came):
        shown = html.unescape(page.body.decode())
        assert page.status == 400 and "location" not in page.headers and came not in shown and CALLBACK not in shown
        return True

    @pytest.mark.parametrize("came", CAME)
    def test_a_redirect_uri(self, spa, register, browser, line, came):
        register("other", uris=["https://other.example/cb"])
        page = browser("GET", request(redirect_uri=came))
        assert self.is_silent(page, came) and "has the cause: <code>r1</code>" in page.body.decode()
        assert f"<{came}>; the nearest is <{CALLBACK}>" in line() and "request_id=r1" in line() and "spa" in line()
        page = browser("GET", request(redirect_uri=came, ui_locales="de"), headers=[("Accept-Language", "de")])
        assert "die Ursache hat: <code>r1</code>" in page.body.decode()

    def test_it_is_escaped_and_cut(self, spa, browser, line):
        browser("GET", request(redirect_uri="https://app.example/ü\n2026 \x1b[2J>; the nearest is <https://x"))
        assert "<https://app.example/%C3%BC%0A2026%20%1B[2J%3E;%20the%20nearest%20is%20%3Chttps://x>; the" in line()
        browser("GET", request(redirect_uri="https://app.example/" + "x" * 5000))
        assert "<https://app.example/" + "x" * 277 + "...>;" in line() and len(line()) < 700

    def test_one_of_a_client_without_any(self, register, browser, line):
        register("none", uris=[])
        browser("GET", request("none"))
        assert f"<{CALLBACK}>; there is none" in line()

    @pytest.mark.parametrize("came", CAME)
    def test_a_post_logout_redirect_uri(self, idp, spa, alice, browser, line, came):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "post_logout", "https://app.example/bye")
        query = urlencode({"client_id": "spa", "post_logout_redirect_uri": came})
        page = browser("GET", "/end-session?" + query)
        assert self.is_silent(page, came) and "r1" in page.body.decode()
        assert f"<{came}>; the nearest is <https://app.example/bye>" in line() and "request_id=r1" in line()

    def test_a_redirect_uri_at_the_token_endpoint(self, spa, alice, browser, exchange, line):
        code = code_of(sign_in(browser))
        assert exchange(code, redirect_uri="https://app.example/other").status == 400
        assert f"<https://app.example/other>; the nearest is <{CALLBACK}>" in line()

    @pytest.mark.parametrize("scope", ["openid api:secret", "api:secret"])
    def test_a_scope_that_the_client_may_not(self, spa, browser, line, scope):
        _, members = sent_back(browser.open(request(scope=scope)))
        assert members["error"] == "invalid_scope" and "api:secret" not in str(members)
        assert "<api:secret>; the nearest is <api:read>" in line() and "request_id=r1" in line()

    def test_a_scope_that_is_unknown(self, spa, browser, line):
        browser.open(request(scope="openid api.write"))
        assert "scope.ignored" in line() and "<api.write>; the nearest is <api:write>" in line()
        browser.open(request(scope="api.write"))
        assert "<api.write>; the nearest is <api:write>" in line()
        browser.open(request(scope="ä"))
        assert "malformed scope: <%C3%A4>" in line()

    def test_a_scope_of_a_machine(self, auth, service, line):
        many = " ".join(f"api:{number}" for number in range(9))
        for scope, said in (("api.read", "<api.read>; the nearest is <api:read>"), (many, "6 more"), ("a,b", "commas")):
            answer = auth.post("/token", {"grant_type": "client_credentials", "scope": scope}, auth=service)
            assert answer.json["error"] == "invalid_scope" and said in line() and len(line()) < 600

    @pytest.mark.parametrize("origin", ["https://app.example.evil.example", "null", "http://app.example", "x" * 3000])
    @pytest.mark.parametrize("method", ["POST", "OPTIONS"])
    def test_an_origin(self, idp, spa, auth, line, origin, method):
        for registered in ("https://app.example", "capacitor://localhost"):
            m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", registered)
        auth(method, "/token", headers=[("Origin", origin)])
        assert "cors.refused" in line() and f"method={method}" in line() and "request_id=r1" in line()
        assert f"<{m.excerpt(origin)}>; the nearest is <{m.nearest(origin, m.find_client(idp, 'spa').cors_origins)}>" in line()

    @pytest.mark.parametrize(
        "origin", ["https://app.example", "https://idp.example", "http://localhost:9041", "https://localhost:9041", ""]
    )
    def test_of_a_registered_origin_and_of_our_own_nothing_is_said(self, idp, spa, auth, origin):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", "https://app.example")
        auth("OPTIONS", "/token", headers=[("Origin", origin)])
        auth("GET", "/jwks.json", headers=[("Origin", origin)])
        assert "cors.refused" not in idp.stream.getvalue()

    def test_a_uri_that_cannot_be_registered(self, idp, spa, line, call):
        assert call("POST", "/clients/spa/redirect-uris", "http://nas.lan/cb").status == 400
        assert "redirect URI of spa must be https" in line() and "<http://nas.lan/cb>" in line()


class TestCors:
    """Fetch Standard §3.3; only for origins that public clients have registered."""

    @pytest.fixture
    def origin(self, idp, spa):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", "https://app.example")

    @pytest.mark.parametrize(
        "method, path",
        [
            ("POST", "/token"), ("GET", "/userinfo"), ("POST", "/revoke"), ("GET", "/jwks.json"),
            ("GET", "/.well-known/openid-configuration"),
        ],
    )
    def test_a_registered_origin_may_read_and_no_other(self, auth, origin, method, path):
        preflight = auth(
            "OPTIONS", path,
            headers=[
                ("Origin", "https://app.example"), ("Access-Control-Request-Method", method),
                ("Access-Control-Request-Headers", "authorization"),
            ],
        )
        assert (
            preflight.status == 204
            and preflight.headers["access-control-allow-origin"] == "https://app.example"
            and "authorization" in preflight.headers["access-control-allow-headers"].lower()
            and method in preflight.headers["access-control-allow-methods"]
        )
        answer = auth(method, path, headers=[("Origin", "https://app.example")])
        assert (
            answer.headers["access-control-allow-origin"] == "https://app.example"
            and answer.headers["vary"] == "Origin"
            and answer.headers["access-control-allow-credentials"] == "true"
        )
        for other in (
            "https://evil.example", "https://app.example.evil.example", "null", "http://app.example",
            "https://app.example:8443", "",
        ):
            assert not {"access-control-allow-origin", "access-control-allow-credentials"} & set(
                auth(method, path, headers=[("Origin", other)]).headers
                | auth("OPTIONS", path, headers=[("Origin", other)]).headers
            )

    @pytest.mark.parametrize("origin", ["capacitor://localhost", "tauri://localhost", "http://tauri.localhost"])
    def test_a_packaged_application_reads_under_exactly_its_origin(self, idp, spa, auth, origin):
        row = m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", origin)
        for method in ("POST", "OPTIONS"):
            answer = auth(method, "/token", headers=[("Origin", origin)])
            assert answer.headers["access-control-allow-origin"] == origin
            for other in (origin + "/", origin + ":80", origin.upper(), "null", "https://localhost", "file://"):
                assert "access-control-allow-origin" not in auth(method, "/token", headers=[("Origin", other)]).headers
        m.delete_uri(idp, m.LOCAL.acting_as("test"), row.id, "cors_origin")
        assert "access-control-allow-origin" not in auth.post("/token", headers=[("Origin", origin)]).headers

    @pytest.mark.parametrize(
        "asked, allowed",
        [
            ("x-okta-user-agent-extended", None), ("authorization,baggage,content-type,sentry-trace,traceparent", None),
            ("authorization, content-type", None), ("", "Authorization, Content-Type"),
            ("a b", "Authorization, Content-Type"), ("a,", "Authorization, Content-Type"),
            ("a" + ",a" * 32, "Authorization, Content-Type"), ("é", "Authorization, Content-Type"),
        ],
    )
    def test_a_registered_origin_may_send_any_field(self, auth, origin, asked, allowed):
        """okta-auth-js adds its own to every request, tracing in a browser others."""
        fields = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", asked)]
        preflight = auth("OPTIONS", "/token", headers=[("Origin", "https://app.example"), *fields])
        assert preflight.headers["access-control-allow-headers"] == (allowed or asked)
        other = auth("OPTIONS", "/token", headers=[("Origin", "https://evil.example"), *fields])
        assert "access-control-allow-headers" not in other.headers

    @pytest.mark.parametrize(
        "method, path", [("POST", "/token"), ("GET", "/userinfo"), ("POST", "/revoke"), ("GET", "/jwks.json")]
    )
    def test_what_is_read_with_credentials_does_not_depend_on_cookies(
        self, auth, origin, alice, browser, method, path
    ):
        """keycloak-js fetches tokens with credentials, which a browser permits only where the answer does."""
        sign_in(browser)
        assert browser.cookies and browser("GET", "/account").status == 200
        signed_in = browser(method, path, headers=[("Origin", "https://app.example")])
        without = auth(method, path, headers=[("Origin", "https://app.example")])
        assert signed_in.headers["access-control-allow-credentials"] == "true" and not signed_in.cookies
        assert (signed_in.status, signed_in.body) == (without.status, without.body)

    @pytest.mark.parametrize("path", ["/authorize", "/login", "/introspect", "/account", "/users", "/me"])
    def test_nothing_else_is_shared(self, auth, origin, path):
        for method in ("GET", "POST", "OPTIONS"):
            assert (
                "access-control-allow-origin"
                not in auth(method, path, headers=[("Origin", "https://app.example")]).headers
            )

    def test_what_is_cached_varies(self, auth, origin):
        assert auth.get("/jwks.json").headers["vary"] == "Origin"

    @pytest.mark.parametrize("method, status", [("GET", 200), ("OPTIONS", 204)])
    def test_origins_that_cannot_be_read_keep_the_keys_from_nobody(
        self, idp, auth, origin, monkeypatch, method, status
    ):
        def fail():
            raise Unavailable("unable to open database file", 5)

        monkeypatch.setattr(idp.store, "list_cors_origins", fail)
        for headers in ((), [("Origin", "https://app.example")]):
            answer = auth(method, "/jwks.json", headers=headers)
            assert (
                answer.status == status
                and "access-control-allow-origin" not in answer.headers
                and answer.headers["vary"] == "Origin"
            )
        monkeypatch.undo()
        assert (
            "access-control-allow-origin"
            in auth(method, "/jwks.json", headers=[("Origin", "https://app.example")]).headers
        )

    def test_an_origin_counts_as_long_as_its_client(self, idp, auth, origin, change):
        m.update_client(idp, m.LOCAL.acting_as("t"), "spa", UpdateClient(is_active=False))
        assert (
            "access-control-allow-origin"
            not in auth("GET", "/jwks.json", headers=[("Origin", "https://app.example")]).headers
        )


class TestAccount:
    def test_who_is_not_logged_in_logs_in_first(self, spa, alice, browser):
        assert title(browser.open("/account")) == "Sign in"
        assert (
            title(browser.submit(username="alice", password=PASSWORD)) == "Your account"
            and b"alice@example.org" in browser.answer.body
        )

    def form(self, browser, action):
        return next(
            number
            for number, form in enumerate(browser.forms().forms)
            if form["fields"].get("action") == action or ("action", action) in form["buttons"]
        )

    def test_a_session_alone_does_not_see_the_seed_of_a_new_second_factor(self, idp, spa, alice, browser, clock):
        sign_in(browser)
        browser.open("/account")
        page = browser.submit(self.form(browser, "begin_totp"), password=PASSWORD)
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', page.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        page = browser.open("/account")
        assert b'class="secret"' not in page.body and b"<svg" not in page.body and b"data:image" not in page.body
        page = browser.submit(self.form(browser, "confirm_totp"), totp="000000")
        assert page.status == 403 and b'class="secret"' not in page.body
        assert browser.submit(self.form(browser, "begin_totp"), password="wrong").status == 403
        page = browser.submit(self.form(browser, "confirm_totp"), totp=pyotp.TOTP(seed).at(idp.now()))
        assert page.status == 200 and idp.store.find_account(alice.id).totp_sealed

    @pytest.mark.parametrize(
        "language, past, said",
        [
            ("en", 0, "just now"), ("en", -100, "just now"), ("en", 60, "a minute ago"), ("en", 3599, "59 minutes ago"),
            ("en", 7200, "2 hours ago"), ("de", 86400, "gestern"), ("de", 3 * 86400, "vor 3 Tagen"),
            ("en", 31 * 86400, "on 2026-"),
        ],
    )
    def test_moments_are_said_as_people_say_them(self, idp, language, past, said):
        at = 1_790_000_000
        assert describe_age(past, at - past, idp.pages.texts[language]).startswith(said)

    @pytest.mark.parametrize(
        "user_agent, said",
        [
            ("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36", "Chrome on Linux"),
            ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/142.0 Safari/537.36 Edg/142.0", "Edge on Windows"),
            ("Mozilla/5.0 (Android 15; Mobile; rv:144.0) Gecko/144.0 Firefox/144.0", "Firefox on Android"),
            ("Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit Version/18.0 Safari/604.1", "Safari on iPhone"),
            ("curl/8.14.1", "curl"), ("a browser", "a browser"), ("", "Unknown browser"), ("<b>" + "x" * 99, "<b>" + "x" * 37),
        ],
    )
    def test_a_user_agent_is_said_as_people_know_it(self, idp, user_agent, said):
        assert describe_browser(user_agent, idp.pages.texts["en"]) == said

    def test_sessions_say_when_and_an_error_stands_at_its_field(self, spa, alice, browser, clock, exchange):
        exchange(code_of(sign_in(browser)))
        clock.pass_(7200)
        page = browser.open("/account").body.decode()
        assert re.search(r'signed in <time datetime="[0-9TZ:-]+">2 hours ago</time>', page)
        assert "active <time" in page and "At least 8 characters" in page
        for fields, field in (({"password": "wrong"}, "password"), ({"password": PASSWORD}, "new_password")):
            page = browser.submit(self.form(browser, "password"), **{"new_password": "short"} | fields).body.decode()
            tied = re.findall(r'<input id="(\w+)"[^>]*aria-describedby="[^"]*password_error"[^>]*aria-invalid="true"', page)
            assert tied == [field] and page.count('id="password_error"') == page.count('role="alert"') == 1

    def test_recovery_codes_can_be_kept_without_a_script(self, idp, spa, alice, browser):
        sign_in(browser)
        browser.open("/account")
        page = browser.submit(self.form(browser, "begin_totp"), password=PASSWORD)
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', page.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        page = browser.submit(self.form(browser, "confirm_totp"), totp=pyotp.TOTP(seed).at(idp.now())).body.decode()
        codes = re.findall(r"<li><code>([^<]+)</code>", page)
        SECRETS.update(codes)
        file = re.search(r'href="data:text/plain;charset=utf-8;base64,([^"]+)" download="', page)[1]
        assert b64decode(html.unescape(file)).decode().split() == ["idp.example,", "alice", *codes]

    def test_sessions_and_logins_are_ended(self, auth, spa, alice, browser, other, exchange):
        bought = exchange(code_of(sign_in(browser))).json
        sign_in(other)
        browser.open("/account")
        browser.submit(self.form(browser, "end_session"))
        assert (
            sent_back(other.open(request(prompt="none")))[1]["error"] == "login_required"
            and auth.get("/me", bearer=bought["access_token"]).status == 200
        )
        browser.submit(self.form(browser, "end_login"))
        assert auth.get("/me", bearer=bought["access_token"]).status == 401
        sign_in(other)
        browser.open("/account")
        assert b"Everything else was ended" in browser.submit(self.form(browser, "end_all")).body
        assert sent_back(other.open(request(prompt="none")))[1]["error"] == "login_required" and code_of(
            browser.open(request(prompt="none"))
        )

    def test_nobody_ends_what_is_somebody_elses(self, idp, auth, spa, alice, new_user, browser, other, exchange):
        bob = new_user("bob")
        token = exchange(code_of(sign_in(other, username="bob"))).json["access_token"]
        session = idp.store.list_browser_sessions(bob.id, idp.now())[0].id_sha256
        (family,) = idp.store.list_families_of(bob.id)
        sign_in(browser)
        browser.open("/account")
        form = browser.forms().forms[-1]["fields"]["form"]
        for action, theirs in (("end_session", session), ("end_login", family.sid)):
            assert browser("POST", "/account", {"form": form, "action": action, "id": theirs}).status == 404
        assert code_of(other.open(request(prompt="none"))) and auth.get("/me", bearer=token).status == 200

    @pytest.mark.parametrize("action", sorted(m.ACCOUNT_CHANGES))
    def test_a_form_of_another_site_or_browser_changes_nothing(
        self, idp, spa, alice, new_user, browser, other, action
    ):
        new_user("bob")
        for browser_of, username in ((browser, "alice"), (other, "bob")):
            sign_in(browser_of, username=username)
            browser_of.open("/account")
        theirs = other.forms().forms[-1]["fields"]["form"]
        (session,) = idp.store.list_browser_sessions(alice.id, idp.now())
        fields = {"action": action, "id": session.id_sha256, "password": PASSWORD, "new_password": NEW_PASSWORD}
        before = idp.store.list_audit(limit=1000)
        for form in ({}, {"form": ""}, {"form": theirs}):
            assert browser("POST", "/account", fields | form).status == 403
        assert idp.store.list_audit(limit=1000) == before

    @pytest.mark.parametrize("action", ["begin_totp", "confirm_totp"])
    def test_a_second_factor_is_not_replaced_by_a_session(
        self, idp, spa, alice, browser, give_totp, clock, action
    ):
        """Also where an administrator began another: who has its seed has no more than that."""
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        browser.submit(totp=code())
        clock.pass_(60)
        seed = m.begin_totp(idp, m.LOCAL.acting_as("test"), idp.store.find_account(alice.id))
        SECRETS.add(seed)
        before = idp.store.find_account(alice.id)
        browser.open("/account")
        form = browser.forms().forms[-1]["fields"]["form"]
        proof = {"password": PASSWORD, "totp": code() if action == "begin_totp" else pyotp.TOTP(seed).at(idp.now())}
        assert browser("POST", "/account", {"form": form, "action": action} | proof).status == 400
        after = idp.store.find_account(alice.id)
        assert (after.totp_sealed, after.totp_pending_sealed) == (before.totp_sealed, before.totp_pending_sealed)

    def test_without_a_second_factor_there_are_no_recovery_codes(self, idp, spa, alice, browser):
        sign_in(browser)
        browser.open("/account")
        form = browser.forms().forms[-1]["fields"]["form"]
        answer = browser("POST", "/account", {"form": form, "action": "recovery_codes", "password": PASSWORD})
        assert answer.status == 400 and idp.store.count_recovery_codes(alice.id) == 0

    def test_the_password_is_changed_with_the_current_one(self, auth, service, spa, alice, browser, other):
        sign_in(browser), sign_in(other)
        browser.open("/account")
        number = self.form(browser, "password")
        assert (
            browser.submit(number, password="wrong", new_password=NEW_PASSWORD).status == 403
            and browser.submit(number, password=PASSWORD, new_password="short").status == 400
        )
        page = browser.submit(number, password=PASSWORD, new_password=NEW_PASSWORD)
        assert (
            page.status == 200
            and b"The password was changed" in page.body
            and code_of(browser.open(request(prompt="none")))
            and sent_back(other.open(request(prompt="none")))[1]["error"] == "login_required"
        )
        login = {"grant_type": "password", "username": "alice"}
        assert [
            auth.post("/token", login | {"password": word}, auth=service).status for word in (PASSWORD, NEW_PASSWORD)
        ] == [403, 200]

    def test_the_second_factor_on_and_off(self, idp, spa, alice, browser, clock):
        sign_in(browser)
        browser.open("/account")
        assert (
            browser.submit(self.form(browser, "begin_totp"), password="wrong").status == 403
            and not idp.store.find_account(alice.id).totp_pending_sealed
        )
        page = browser.submit(self.form(browser, "begin_totp"), password=PASSWORD)
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', page.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        assert (
            browser.submit(self.form(browser, "confirm_totp"), totp="000000").status == 403
            and not idp.store.find_account(alice.id).totp_sealed
        )
        page = browser.submit(self.form(browser, "confirm_totp"), totp=as_shown(pyotp.TOTP(seed).at(idp.now())))
        assert (
            len(re.findall(rb"<code>[a-z2-9-]{19}</code>", page.body)) == 10
            and idp.store.find_account(alice.id).totp_sealed
        )
        clock.pass_(60)
        browser.open("/account")
        number = self.form(browser, "disable_totp")
        assert browser.submit(number, ("action", "disable_totp"), password=PASSWORD, totp="000000").status == 403
        page = browser.submit(
            number, ("action", "recovery_codes"), password=PASSWORD, totp=as_shown(pyotp.TOTP(seed).at(idp.now()))
        )
        assert len(re.findall(rb"<code>[a-z2-9-]{19}</code>", page.body)) == 10
        clock.pass_(60)
        assert (
            browser.submit(
                number, ("action", "disable_totp"), password=PASSWORD, totp=pyotp.TOTP(seed).at(idp.now())
            ).status
            == 200
            and not idp.store.find_account(alice.id).totp_sealed
        )

    def test_new_recovery_codes_ask_for_the_password_and_a_code(self, idp, spa, alice, browser, give_totp, clock):
        code = second_factor(idp, alice, give_totp, clock)
        sign_in(browser)
        assert code_of(browser.submit(totp=code()))
        clock.pass_(60)
        browser.open("/account")
        number = self.form(browser, "recovery_codes")
        for proof in ({"password": "wrong", "totp": code()}, {"password": PASSWORD, "totp": "000000"}):
            assert browser.submit(number, ("action", "recovery_codes"), **proof).status == 403
        assert idp.store.count_recovery_codes(alice.id) == 0

    def test_a_lost_authenticator_is_replaced_by_recovery_codes(self, idp, spa, alice, browser, give_totp, clock):
        second_factor(idp, alice, give_totp, clock)
        codes = iter(m.make_recovery_codes(idp, m.LOCAL, alice.id))
        sign_in(browser)
        spent = next(codes)
        assert code_of(browser.submit(totp=spent))
        browser.open("/account")
        number = self.form(browser, "disable_totp")
        assert browser.submit(number, ("action", "disable_totp"), password=PASSWORD, totp=spent).status == 403
        assert browser.submit(number, ("action", "disable_totp"), password="wrong", totp=next(codes)).status == 403
        page = browser.submit(
            self.form(browser, "password"), password=PASSWORD, totp=next(codes), new_password=NEW_PASSWORD
        )
        assert b"The password was changed" in page.body
        assert (
            browser.submit(
                self.form(browser, "disable_totp"), ("action", "disable_totp"), password=NEW_PASSWORD, totp=next(codes)
            ).status
            == 200
        )
        assert not idp.store.find_account(alice.id).totp_sealed


class TestPages:
    def test_languages(self, spa, browser):
        pages = {
            accept: browser("GET", browser.open(request()) and "/logout", headers=[("Accept-Language", accept)])
            for accept in ("de-AT,de;q=0.9,en;q=0.5", "fr, en;q=0.5", "de;q=0, en", "", "x" * 5000)
        }
        assert [title(page) for page in pages.values()] == [
            "Abgemeldet", "Signed out", "Signed out", "Signed out", "Signed out",
        ] and b'lang="de"' in pages["de-AT,de;q=0.9,en;q=0.5"].body
        assert title(browser.open(request(ui_locales="fr de"))) == "Anmelden"

    def test_every_language_says_everything(self):
        texts = {path.stem: json.loads(path.read_text()) for path in PAGES.glob("*.json")}
        assert set(texts) >= {"en", "de"} and all(set(words) == set(texts["en"]) for words in texts.values())
        used = set(re.findall(r'text\["(\w+)"\]', "".join(path.read_text() for path in PAGES.glob("*.html"))))
        assert used <= set(texts["en"])

    def test_brand_and_files_of_ones_own(self, make_idp, tmp_path, register, spa):
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "fr.json").write_text('{"sign_in": "Se connecter"}')
        (tmp_path / "logo.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        idp = make_idp(
            Options(
                **CHEAP, oidc_issuer="https://box.example/auth", brand_name="Box & Co", brand_color="#ffee00",
                brand_logo=str(tmp_path / "logo.svg"), pages_folder=str(tmp_path / "own"),
            )
        )
        browser = Browser(m.App(idp, m.AUTH), "https://box.example/auth")
        page = browser.open(request(ui_locales="fr"))
        assert (
            title(page) == "Se connecter"
            and b"Box &amp; Co" in page.body
            and re.search(rb'src="https://box.example/auth/pages/logo\.[0-9a-f]{12}"', page.body)
            and browser.forms().forms[0]["action"] == "https://box.example/auth/login"
        )
        style = re.search(rb'href="https://box.example/auth(/pages/[^"]+)"', page.body)[1].decode()
        sheet = browser("GET", style)
        assert (
            sheet.headers["content-type"].startswith("text/css")
            and b"--brand: #ffee00; --on-brand: #000000" in sheet.body
            and "max-age=31536000" in sheet.headers["cache-control"]
        )
        logo = browser("GET", re.search(rb'src="https://box.example/auth(/pages/logo\.[^"]+)"', page.body)[1].decode())
        assert logo.status == 200 and "max-age=31536000" in logo.headers["cache-control"]
        assert (
            browser("GET", "/pages/logo").headers["content-type"] == "image/svg+xml"
            and browser("GET", "/pages/../en.json").status == 404
            and browser("GET", "/pages/en.json").status == 404
        )

    def test_under_a_path_every_address_is_made_of_the_issuer(self, make_idp, spa, alice):
        """The proxy in front takes the path away; what a browser is told carries it."""
        issuer = "https://idp.example/sso"
        browser = Browser(
            Caller(m.App(make_idp(Options(**CHEAP, oidc_issuer=issuer)), m.AUTH), "idp.example").app, issuer
        )
        assert sent_back(sign_in(browser))[1]["iss"] == issuer
        for path in ("/account", "/logout", "/end-session", "/login", "/authorize?client_id=nobody"):
            page = browser.open(path)
            addresses = re.findall(r' (?:action|href|src)="([^"]*)"', page.body.decode())
            assert addresses and all(address.startswith(issuer + "/") for address in addresses), path
        browser.open("/logout")
        assert title(browser.submit()) == "Signed out" and title(browser.open(request())) == "Sign in"

    def test_an_issuer_with_a_path_is_served_below_it_with_a_proxy_and_without(self, make_idp, spa, alice, exchange):
        app = m.App(make_idp(Options(**CHEAP, oidc_issuer="https://box.example/auth")), m.AUTH)
        code = code_of(
            sign_in(Browser(app, "https://box.example/auth"))
        )  # this browser strips the path, as a proxy may

        def direct(method, path, data=None, headers=()):
            return Caller(app, "box.example")(method, path.removeprefix("https://box.example"), data, headers=headers)

        found = direct("GET", "/auth/.well-known/openid-configuration").json
        assert found["issuer"] == "https://box.example/auth"
        assert {
            name: direct("GET", found[name]).status for name in found if name.endswith(("_endpoint", "_uri"))
        } == {
            "authorization_endpoint": 400, "end_session_endpoint": 200, "introspection_endpoint": 405, "jwks_uri": 200,
            "revocation_endpoint": 405, "token_endpoint": 405, "userinfo_endpoint": 401,
        }, "405: the route is there, for POST"
        answer = direct(
            "POST", found["token_endpoint"],
            {
                "grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER,
                "client_id": "spa",
            },
        )
        assert answer.status == 200 and claims_of(answer.json["id_token"])["iss"] == found["issuer"]
        assert (
            direct("GET", "/auth" + request()).headers["location"].startswith("https://box.example/auth/login?tx=")
            and direct("GET", "/authx/ping").status == 404
            and direct("GET", "/auth/auth/ping").status == 404
        )

    def test_a_browser_in_which_somebody_logged_in_before_is_not_shut_by_strangers(self, idp, browser, other, spa, alice):
        assert code_of(sign_in(browser))
        browser("POST", "/logout", {"form": m.session_form_token(browser.cookies["__Host-mad-session"])})
        assert set(browser.cookies) >= {"__Host-mad-device"} and "__Host-mad-session" not in browser.cookies
        for _ in range(8):
            sign_in(other, password="wrong wrong")
        assert sign_in(other).status == 403
        assert code_of(sign_in(browser))
        known = browser.cookies["__Host-mad-device"]
        other.cookies["__Host-mad-device"] = known[::-1]
        assert sign_in(other).status == 403
        other.cookies["__Host-mad-device"] = known
        assert code_of(sign_in(other))

    def test_at_admin_too_such_a_browser_counts_for_itself(self, idp, browser, admin, spa, root):
        assert code_of(sign_in(browser, username="root"))
        right = {"username": "root", "password": PASSWORD}
        for _ in range(5):
            admin.post("/token", right | {"password": "wrong wrong"})
        cookie = [("Cookie", f"__Host-mad-device={browser.cookies['__Host-mad-device']}")]
        assert [admin.post("/token", right, headers=headers).status for headers in ((), cookie)] == [403, 200]

    def test_the_account_page_knows_the_browser_and_renews_it_with_the_password(self, idp, browser, spa, alice):
        sign_in(browser)
        before = browser.cookies["__Host-mad-device"]
        for _ in range(5):
            with pytest.raises(m.Problem):
                m.authenticate_user(idp, m.Caller("203.0.113.9"), "alice", "wrong wrong")
        form = m.session_form_token(browser.cookies["__Host-mad-session"])
        asked = {"form": form, "action": "password", "password": PASSWORD, "new_password": NEW_PASSWORD}
        browser("POST", "/account", asked)
        after = browser.cookies["__Host-mad-device"]
        account = idp.store.find_account(alice.id)
        found = [m.find_device(idp, m.Caller(device=device), account) for device in (before, after)]
        assert not found[0] and found[1]

    def test_over_plain_http_the_cookies_have_plain_names(self, make_idp, spa, alice):
        browser = Browser(
            m.App(make_idp(Options(**CHEAP, oidc_issuer="http://localhost:9040")), m.AUTH),
            "http://localhost:9040", "localhost:9040",
        )
        assert code_of(sign_in(browser)) and set(browser.cookies) == {"mad-session", "mad-login", "mad-device"}
