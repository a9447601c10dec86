"""HTTP: Params, guards, answers."""

import json
import re
from urllib.parse import parse_qsl, quote, urlencode

import microauthd as m
import pytest
from conftest import CHEAP, Caller
from hypothesis import given
from hypothesis import strategies as st
from appliance.base.headers import security_headers
from appliance.base.openapi import FORM
from appliance.base.objects import AssignScopes, ChangeSecret, CreateClient, CreateUser
from appliance.base.settings import Options

MACHINE = {"grant_type": "client_credentials"}


class TestForms:
    """application/x-www-form-urlencoded, read once and strictly."""

    clean = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)

    @given(st.dictionaries(clean, clean, max_size=10))
    def test_what_was_encoded_is_what_is_read(self, values):
        for encoded in (urlencode(values), urlencode(values, quote_via=quote)):
            assert m.parse_form(encoded.encode()) == list(values.items())

    @given(st.text("ab=&+%20;\u00e4", max_size=30).map(str.encode))
    def test_what_is_read_is_what_the_standard_library_reads(self, body):
        try:
            found = m.parse_form(body)
        except m.Problem:
            return
        assert found == parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=False)

    @given(st.binary(max_size=80))
    def test_any_octets_are_read_or_refused(self, octets):
        try:
            assert all(
                isinstance(word, str) and "\0" not in word for pair in m.parse_form(octets) for word in pair
            )
        except m.Problem as problem:
            assert problem.code == "invalid_request"

    @pytest.mark.parametrize(
        "body",
        [
            "scope=1&scope=2", "scope=1&%73cope=2",
            "a=%", "a=%4", "a=%zz", "a=%ff", "a=%c0%80", "a=%ed%a0%80", "a=%00", "%00=a",
            "&".join(f"a{n}=1" for n in range(65)), "&".join(["resource=x"] * 65),
        ],
    )
    def test_what_could_be_misread_is_refused(self, auth, service, body):
        answer = auth.post("/token", "grant_type=client_credentials&" + body, auth=service)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        "name", ["grant_type", "scope", "client_id", "client_secret", "username", "password", "refresh_token"]
    )
    def test_a_repeated_parameter_is_refused(self, auth, service, name):
        """RFC 6749 §3.2"""
        reads = {"username": "password", "password": "password", "refresh_token": "refresh_token"}
        form = {"grant_type": reads.get(name, "client_credentials"), "username": "x", "password": "x"}
        answer = auth.post("/token", [*form.items(), (name, "x"), (name, "x")], auth=service)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        "empty", ["client_id", "client_secret", "scope", "resource", "totp", "code_verifier", "access_token", "form"]
    )
    def test_a_parameter_without_a_value_is_as_if_omitted(self, auth, service, log_in, alice, empty):
        """RFC 6749 §3.2. Dovecot introspects with an empty client_id and client_secret beside Basic."""
        token = log_in(alice, scope="openid")["access_token"]
        for form in (f"{empty}=", empty, f"&{empty}=&"):
            answer = auth.post("/token", f"grant_type=client_credentials&{form}", auth=service)
            assert (answer.status, answer.json["scope"]) == (200, "api:read api:write")
            assert auth.post("/introspect", f"token={token}&{form}", auth=service).json["active"] is True
            assert auth.post("/userinfo", form, bearer=token).status == 200
        assert auth.post("/revoke", "token=x&client_id=&client_secret=", auth=service).status == 200

    @pytest.mark.parametrize(
        "form", ["grant_type=", "grant_type", "grant_type=password&username=alice&password=", "grant_type=password&="]
    )
    def test_a_parameter_that_is_needed_needs_a_value(self, auth, service, form):
        answer = auth.post("/token", form, auth=service)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("more, status", [(63, 200), (64, 400)])
    def test_there_may_be_64_parameters(self, auth, service, more, status):
        form = "&".join(["grant_type=client_credentials", *(f"p{n}=x" for n in range(more))])
        assert auth.post("/token", form, auth=service).status == status

    def test_an_empty_secret_authenticates_nobody(self, auth, service):
        for form in ("client_id=service&client_secret=", "client_id=service", "client_id=&client_secret=" + service[1]):
            answer = auth.post("/token", "grant_type=client_credentials&" + form)
            assert (answer.status, answer.json["error"]) == (401, "invalid_client")

    def test_two_ways_of_authentication_stay_refused(self, auth, service):
        """RFC 6749 §2.3"""
        for form in ({"client_secret": service[1]}, {"client_id": "another"}):
            assert auth.post("/token", MACHINE | form, auth=service).json["error"] == "invalid_request"

    @pytest.mark.parametrize(
        "unread", ["token", "token_type_hint", "username", "password", "totp", "refresh_token", "code", "redirect_uri"]
    )
    def test_a_repeated_parameter_that_is_not_read_is_ignored(self, auth, service, unread):
        assert auth.post("/token", [*MACHINE.items(), (unread, "x"), (unread, "y")], auth=service).status == 200

    def test_parameters_nobody_knows_are_ignored_however_often(self, auth, service, bearer):
        """RFC 6749 §3.2; `resource` may be repeated. RFC 8707 §2."""
        unknown = [("resource", "https://a.example"), ("resource", "https://b.example"), ("is_active", "1")]
        assert auth.post("/token", [*MACHINE.items(), *unknown], auth=service).status == 200
        assert auth.post("/introspect", [("token", bearer), *unknown], auth=service).json["active"] is True
        assert auth.post("/revoke", [("token", "x"), *unknown], auth=service).status == 200
        assert auth.get("/jwks.json?v=1&v=2").status == auth.get("/me?v=1&v=2", bearer=bearer).status == 200

    def test_an_empty_repetition_counts_as_omitted(self, auth, service):
        for form in ("scope=&scope=", "scope=api:read&scope=", "scope=&scope=api:read"):
            assert auth.post("/token", "grant_type=client_credentials&" + form, auth=service).status == 200

    @pytest.mark.parametrize("name", ["client_id", "client_secret", "token"])
    def test_a_repeated_credential_is_refused_wherever_it_is_read(self, auth, service, name):
        form = [("token", "x"), ("client_id", service[0]), ("client_secret", service[1])]
        twice = form + [pair for pair in form if pair[0] == name]
        for path in ("/introspect", "/revoke"):
            assert auth.post(path, form).status == 200
            answer = auth.post(path, twice)
            assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    def test_a_repeated_access_token_is_refused(self, auth, bearer):
        for more in ({}, {"bearer": bearer}):
            answer = auth.post("/userinfo", [("access_token", bearer)] * 2, **more)
            assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    def test_the_record_of_a_refusal_survives_a_repeated_grant_type(self, idp, auth, service):
        assert auth.post("/token", [*MACHINE.items()] * 2, auth=service).json["error"] == "invalid_request"
        assert idp.store.list_audit("token_refused")[0].target == "service"

    @pytest.mark.parametrize(
        "query", ["grant_type=client_credentials", "grant_type=password&username=x", "a=1&a=2", "%zz"]
    )
    def test_a_post_reads_its_body_never_its_query(self, auth, service, query):
        assert auth.post(f"/token?{query}", "", auth=service).json["error"] == "invalid_request"
        assert auth.post(f"/token?{query}", MACHINE, auth=service).status == 200
        assert auth.post(f"/token?{query}&client_id=service&client_secret={service[1]}", MACHINE).status == 401

    @pytest.mark.parametrize(
        "media",
        ["application/json", "text/plain", "multipart/form-data; boundary=x", "", "application/x-www-form-urlencoded2"],
    )
    def test_another_content_type_is_refused(self, auth, service, media):
        answer = auth.post("/token", MACHINE, auth=service, headers=[("CONTENT_TYPE", media)])
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        "media", ["application/x-www-form-urlencoded; charset=UTF-8", "Application/X-WWW-Form-Urlencoded"]
    )
    def test_the_content_type_is_compared_as_its_standard_says(self, auth, service, media):
        assert auth.post("/token", MACHINE, auth=service, headers=[("CONTENT_TYPE", media)]).status == 200


PROTECTED = [
    (routes, route, method, path)
    for routes in (m.AUTH, m.ADMIN)
    for route in routes.routes
    if route.guard is not m.anyone and route.guard is not m.by_console  # whose refusals test_console has
    for method in route.methods
    for path in route.paths
]
GARBAGE = [
    ("application/json", b"{not json"), ("application/json", b"[]"), ("application/json", b"[" * 60_000),
    ("text/plain", b"\xff\0"), ("multipart/form-data", b"--x"), ("", b"\xff"),
]
MALFORMED = [(FORM, b"%zz"), (FORM, b"a=%ff"), (FORM, b"&" * 70)]


class TestGuardsComeFirst:
    """Whoever may not call a route hears so, whatever the request holds."""

    @pytest.mark.parametrize(
        "routes, route, method, path", PROTECTED, ids=[f"{row[0].name} {row[2]} {row[3]}" for row in PROTECTED]
    )
    def test_of_every_protected_route(self, auth, admin, service, routes, route, method, path):
        app, path = auth if routes is m.AUTH else admin, re.sub("<[a-z_]+>", "x", path)
        reads_form = route.form is not None and method == "POST"
        for media, body in GARBAGE + ([] if reads_form else MALFORMED):
            for more in ({}, {"bearer": "x.y.z"}, {"auth": ("service", "wrong")}):
                answer = app(method, path, body, headers=[("CONTENT_TYPE", media)], **more)
                assert answer.status == 401 and answer.headers["www-authenticate"], (media, body, more)
                assert "errors" not in answer.json
        assert app(method, path + "?%zz&limit=x&limit=y").status == 401, "nor is a query"

    @pytest.mark.parametrize("media, body", MALFORMED)
    @pytest.mark.parametrize(
        "routes, path",
        [(row[0], row[3]) for row in PROTECTED if row[1].form is not None and row[2] == "POST"],
    )
    def test_a_malformed_form_that_the_guard_reads_is_refused(self, auth, admin, routes, path, media, body):
        answer = (auth if routes is m.AUTH else admin).post(path, body)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("media, body", GARBAGE)
    def test_a_machine_where_a_user_is_needed_and_a_scope_that_is_missing(self, auth, service, media, body):
        machine = auth.post("/token", MACHINE, auth=service).json["access_token"]
        for path in ("/userinfo", "/logout", "/logout-all", "/user", "/user/alice/reset", "/user/alice/deactivate"):
            assert auth.post(path, body, bearer=machine, headers=[("CONTENT_TYPE", media)]).status == 403

    def test_a_malformed_query_is_refused_afterwards(self, auth, bearer, admin, admin_token):
        for answer in (
            auth.get("/me?%zz", bearer=bearer), auth.get("/jwks.json?%zz"), auth.get("/ping?a=%ff"),
            admin.get("/users/root?%zz", bearer=admin_token), admin.get("/users?limit=%00", bearer=admin_token),
        ):
            assert (answer.status, answer.json["error"]) == (400, "invalid_request")


class TestJson:
    """An object of the wire, read tolerantly; what is at fault is named."""

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff", b"{}{}", b"[" * 60_000, b'{"a":' * 10_000,
            b'{"username":"\\ud800"}', b'{"username":1e999}', b"NaN",
        ],
        ids=lambda body: repr(body[:12]),
    )
    def test_what_is_no_object_is_invalid_request(self, body):
        with pytest.raises(m.Problem) as caught:
            m.decode_body(body, CreateUser)
        assert caught.value.code == "invalid_request"

    @pytest.mark.parametrize(
        "body, member",
        [
            ({}, "username"), ({"username": None}, "username"), ({"username": 5}, "username"),
            ({"username": ["x"]}, "username"), ({"username": {"a": 1}}, "username"),
            ({"username": "x", "EMAIL": 5}, "email"), ({"username": "x", "password": True}, "password"),
        ],
    )
    def test_the_member_at_fault_is_named(self, body, member):
        with pytest.raises(m.Problem) as caught:
            m.decode_body(json.dumps(body).encode(), CreateUser)
        assert list(caught.value.errors) == [member]

    def test_a_bad_item_of_a_list_is_named_by_its_list(self):
        with pytest.raises(m.Problem) as caught:
            m.decode_body(b'{"client_id": "x", "scopes": ["a", 5]}', CreateClient)
        assert list(caught.value.errors) == ["scopes"]

    def test_names_match_in_any_case_and_unknown_ones_are_ignored(self):
        assert m.decode_body(
            b'{"UserName": "x", "is_admin": true, "id": 5, "__class__": "y"}', CreateUser
        ) == CreateUser("x")

    @given(
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["client_id", "SCOPES", "x", "overlap_seconds", "new_secret"]), inner, max_size=4
                )
            ),
        )
    )
    def test_anything_is_read_or_refused(self, value):
        for kind in (CreateClient, ChangeSecret, AssignScopes):
            try:
                m.decode_body(json.dumps(value).encode(), kind)
            except m.Problem as problem:
                assert problem.code == "invalid_request"


class TestBearer:
    """RFC 6750 §2 and §3"""

    def test_no_token_hears_how_and_no_error(self, auth):
        for _ in range(2):
            answer = auth.get("/me")
            assert (answer.status, answer.headers["www-authenticate"], answer.json["success"]) == (
                401, 'Bearer realm="microauthd"', False,
            )

    @pytest.mark.parametrize("word", ["a.b.c", "", " ", "x y", "\xe4"])
    def test_a_bad_token_hears_invalid_token(self, auth, word):
        answer = auth.get("/me", headers=[("Authorization", f"Bearer {word}")])
        assert (
            answer.status == 401
            and 'error="invalid_token"' in answer.headers["www-authenticate"]
            and answer.json["error"] == "invalid_token"
        )

    def test_the_scheme_is_known_in_any_case(self, auth, bearer):
        for scheme in ("bearer", "BEARER"):
            assert auth.get("/me", headers=[("Authorization", f"{scheme} {bearer}")]).status == 200

    @pytest.mark.parametrize("scheme", ["Basic", "Token", "Bearer,"])
    def test_another_scheme_is_no_token(self, auth, bearer, scheme):
        assert auth.get("/me", headers=[("Authorization", f"{scheme} {bearer}")]).status == 401

    def test_a_token_comes_by_header_or_form_never_both_never_by_query(self, auth, log_in, alice):
        token = log_in(alice, scope="openid")["access_token"]
        assert auth.post("/userinfo", {"access_token": token}).status == 200
        assert auth.post("/userinfo", {"access_token": token}, bearer=token).status == 400
        for answer in (
            auth.get(f"/userinfo?access_token={token}"), auth.post(f"/userinfo?access_token={token}", ""),
            auth.get(f"/me?access_token={token}"),
        ):
            assert answer.status == 401

    def test_a_scope_that_is_missing_is_named(self, auth, bearer):
        answer = auth.get("/userinfo", bearer=bearer)
        assert (answer.status, answer.json["error"]) == (403, "insufficient_scope")
        assert (
            answer.headers["www-authenticate"]
            == 'Bearer realm="microauthd", error="insufficient_scope", scope="openid"'
        )


class TestProblem:
    @pytest.mark.parametrize("code", sorted(m.ERRORS))
    def test_each_has_two_forms_and_keeps_what_is_for_the_operator(self, code):
        problem = m.Problem(code, log="only for the operator")
        assert problem.as_oauth() == {"error": code, "error_description": m.ERRORS[code][1]}
        assert problem.as_err() == {"success": False, "message": m.ERRORS[code][1], "error": code}

    def test_nothing_at_fault_is_no_problem(self):
        m.reject(a="", b=None)
        with pytest.raises(m.Problem) as caught:
            m.reject(a="", b="wrong")
        assert caught.value.errors == {"b": "wrong"}


class TestAnswers:
    @pytest.mark.parametrize("path", ["/nowhere", "/token/", "/PING", "//ping", "/\xe4", "/\xff", "/%00", "/a\0b"])
    def test_unknown_paths_speak_err(self, auth, admin, path):
        for app in (auth, admin):
            missing = app.get(path)
            assert (missing.status, missing.json) == (
                404, {"success": False, "message": m.ERRORS["not_found"][1], "error": "not_found", "request_id": "r1"},
            )

    NAVIGATION = [("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")]
    PAGES = [
        (NAVIGATION, True), ([*NAVIGATION, ("Sec-Fetch-Mode", "navigate")], True),
        ([*NAVIGATION, ("Sec-Fetch-Mode", "cors")], False), ([("Accept", "application/json, text/html;q=0.9")], False),
        ([("Accept", "*/*"), ("Sec-Fetch-Mode", "navigate")], False), ([], False),
    ]

    @pytest.mark.parametrize("path, status", [("/nowhere", 404), ("/login/consent", 405), ("/nowhere.html", 404)])
    @pytest.mark.parametrize("headers, is_page", PAGES)
    @pytest.mark.parametrize("has_files", [False, True])
    def test_a_browser_that_was_led_nowhere_is_shown_a_way_on(
        self, make_idp, path, status, headers, is_page, has_files,
    ):
        idp = make_idp(Options(**CHEAP, serve_public_auth_files=has_files))
        answer = Caller(m.App(idp, m.AUTH)).get(path, headers=headers)
        assert answer.status == status and answer.headers["content-type"].startswith("text/html") is is_page
        if not is_page:
            return
        assert "allow" in answer.headers if status == 405 else answer.headers.get("x-not-found", "route") == "route"
        page = answer.body.decode()
        assert "/account" in page and "<code>r1</code>" in page and path not in page
        assert "This login is over" not in page and idp.pages.texts["en"]["error_how"] not in page
        assert "request_id=r1" in idp.stream.getvalue(), "the page says that the log has the cause under this number"

    def test_without_pages_there_is_no_page_of_errors(self, make_idp):
        served = Caller(m.App(make_idp(Options(**CHEAP, enable_pkce=False, serve_public_auth_files=True)), m.AUTH))
        assert served.get("/nowhere", headers=self.NAVIGATION).json["error"] == "not_found"

    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "POST", "TRACE", "QUERY"])
    def test_wrong_methods_speak_err_and_say_which(self, auth, admin, method):
        for app in (auth, admin):
            wrong = app(method, "/ping")
            assert (
                wrong.status == 405 and wrong.json["error"] == "method_not_allowed" and "GET" in wrong.headers["allow"]
            )
        assert auth.get("/token").headers["allow"] == "POST"

    def test_a_head_is_a_get(self, auth):
        answer = auth("HEAD", "/jwks.json")
        assert answer.status == 200 and answer.headers["etag"]

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_security_headers_are_on_what_is_answered_before_a_route(self, idp, auth, admin, public, scheme):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", "https://spa.example")

        def over(app, host="localhost"):
            return Caller(lambda environ, start: app(environ | {"wsgi.url_scheme": scheme}, start), host)

        origin = {"Origin": "https://spa.example", "Access-Control-Request-Method": "POST"}
        for answer, status in (
            (over(admin.app, "evil.example").get("/ping"), 421),
            (over(auth.app)("OPTIONS", "/token", headers=origin.items()), 204), (over(auth.app).get("/nowhere"), 404),
            (over(auth.app)("PUT", "/token"), 405), (over(auth.app)("HEAD", "/jwks.json"), 200),
        ):
            assert answer.status == status
            expected = {name.lower(): value for name, value in security_headers(scheme=scheme)}
            assert len(expected) == 4 + (scheme == "https") and expected.items() <= answer.headers.items()
            assert ("strict-transport-security" in answer.headers) == (scheme == "https")

    @pytest.mark.parametrize(
        "policy, framing",
        [
            ("frame-ancestors 'none'", "DENY"), ("default-src 'self'; FRAME-ANCESTORS 'SELF'", "SAMEORIGIN"),
            ("frame-ancestors", "DENY"), ("frame-ancestors  'self'  'self' ;", "SAMEORIGIN"),
            ("frame-ancestors 'none'; frame-ancestors *", "DENY"), ("frame-ancestors *; frame-ancestors 'none'", None),
            ("frame-ancestors https://portal.example", None), ("frame-ancestors 'self' https://portal.example", None),
            ("frame-ancestors *", None), ("default-src 'none'", None), ("", None), ("frame-src 'none'", None),
        ],
    )
    def test_x_frame_options_says_what_frame_ancestors_says_or_is_not_there(
        self, make_idp, tmp_path, monkeypatch, policy, framing
    ):
        """RFC 7034 §2.1, CSP Level 3 §6.4.2.1"""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "index.html").write_text("page")
        served = Caller(m.App(make_idp(Options(**CHEAP, serve_public_auth_files=True, public_csp=policy)), m.AUTH))
        assert served.get("/").headers.get("x-frame-options") == framing

    def test_security_headers_are_on_all(self, auth, admin, service):
        for answer in (
            auth.get("/ping"), auth.get("/nowhere"), auth.get("/jwks.json"), auth.post("/token", {}, auth=service),
            auth.post("/token", MACHINE, auth=service), auth.get("/me"), auth("PUT", "/ping"), admin.get("/users"),
            admin.get("/nowhere"),
        ):
            headers = answer.headers
            assert (
                headers["x-content-type-options"] == "nosniff"
                and headers["referrer-policy"] == "no-referrer"
                and headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
                and headers["x-frame-options"] == "DENY"
            )
            assert (
                headers["content-type"] == "application/json"
                and "set-cookie" not in headers
                and "strict-transport-security" not in headers
            )

    def test_https_is_remembered_by_browsers(self, idp):
        app = m.App(idp, m.AUTH)
        secure = Caller(lambda environ, start: app(environ | {"wsgi.url_scheme": "https"}, start))
        assert secure.get("/ping").headers["strict-transport-security"] == "max-age=31536000"

    def test_only_what_is_public_may_be_stored(self, auth, service, bearer):
        for answer in (
            auth.post("/token", MACHINE, auth=service), auth.post("/token", {}), auth.get("/me", bearer=bearer),
            auth.get("/me"), auth.get("/nowhere"), auth.post("/introspect", {"token": "x"}, auth=service),
        ):
            assert answer.headers["cache-control"] == "no-store"

    def test_a_bug_is_a_bare_server_error(self, idp, auth, service, monkeypatch):
        def fail(*_):
            raise ValueError("the secret of the universe")

        monkeypatch.setattr(m, "issue", fail)
        answer = auth.post("/token", MACHINE, auth=service)
        assert (answer.status, answer.json) == (
            500, {"error": "server_error", "error_description": m.ERRORS["server_error"][1]},
        )
        assert (
            b"universe" not in answer.body
            and "ValueError" in idp.stream.getvalue()
            and "request_id=r1" in idp.stream.getvalue()
        )
        idp.stream.seek(0)
        idp.stream.truncate()

    def test_what_is_refused_is_in_the_log_with_peer_and_reason(self, idp, auth):
        auth.post("/token", MACHINE, auth=("nobody", "wrong"))
        (line,) = [line for line in idp.stream.getvalue().splitlines() if " refused " in line]
        assert all(
            word in line
            for word in (
                "peer=192.0.2.7", "method=POST", "path=/token", "status=401", "error=invalid_client", "request_id=r1",
                "reason=",
            )
        )

    def test_the_log_holds_no_form_header_or_query(self, idp, auth, service):
        auth.post(
            "/token?hidden=1", MACHINE | {"scope": "hidden"}, auth=("service", "hidden"),
            headers=[("X-Hidden", "hidden"), ("User-Agent", "hidden"), ("Cookie", "hidden")],
        )
        assert "hidden" not in idp.stream.getvalue()

    @pytest.mark.parametrize("etag, status", [("same", 304), ('"other"', 200), ("", 200)])
    def test_what_does_not_change_is_revalidated(self, auth, etag, status):
        first = auth.get("/jwks.json")
        assert first.headers["cache-control"] == "public, max-age=300"
        again = auth.get("/jwks.json", headers=[("If-None-Match", first.headers["etag"] if etag == "same" else etag)])
        assert (
            again.status == status
            and (again.body == b"") is (status == 304)
            and again.headers["etag"] == first.headers["etag"]
        )

    @pytest.mark.parametrize("word", ["-1", "1.5", "x", "", " 5", "\u0665", "9999999999"])
    def test_a_number_that_is_none_is_named(self, admin, admin_token, word):
        answer = admin.get("/users?" + urlencode({"limit": word}), bearer=admin_token)
        assert (answer.status, list(answer.json["errors"])) == (400, ["limit"])
