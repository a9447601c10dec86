"""The API describes itself: the document is what is mounted, and the answers are what it says."""

import inspect
import json
import re

import microauthd as m
import msgspec
import pytest
from conftest import CHEAP, Caller
from appliance.base.settings import Options
from appliance.base.openapi import Routes
from appliance.base.objects import TokenForm

OPTIONS = {
    "enable_auth_swagger": True, "enable_admin_swagger": True, "enable_token_refresh": True,
    "admin_domain": "localhost", "oidc_issuer": "https://box.example/auth",
}


@pytest.fixture(
    params=[{}, {"enable_token_refresh": False, "enable_token_revocation": False}, {"serve_public_auth_files": True}],
    ids=["usual", "less", "files"],
)
def described(make_idp, request):
    return make_idp(Options(**CHEAP, **(OPTIONS | request.param)))


class TestDocument:
    @pytest.mark.parametrize("routes", [m.AUTH, m.ADMIN], ids=["auth", "admin"])
    def test_it_lists_exactly_the_mounted_routes(self, described, routes):
        """Asked of Bottle, which knows what it was given."""
        app = m.App(described, routes).bottle
        served = {(route.method, re.sub(r"<(\w+)(:\w+)?>", r"{\1}", route.rule)) for route in app.routes}
        document = m.describe_port(described, routes)
        assert {(method.upper(), path) for path, methods in document["paths"].items() for method in methods} == served
        ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize("routes", [m.AUTH, m.ADMIN], ids=["auth", "admin"])
    def test_every_reference_leads_somewhere(self, described, routes):
        document = m.describe_port(described, routes)
        for reference in re.findall(r'"#/([^"]+)"', json.dumps(document)):
            place = document
            for part in reference.split("/"):
                place = place[part]

    @pytest.mark.parametrize("routes", [m.AUTH, m.ADMIN], ids=["auth", "admin"])
    def test_allow_names_the_methods_that_it_lists(self, described, routes, tmp_path, monkeypatch):
        """RFC 9110 §10.2.1, §15.5.6; OpenAPI 3.1 §4.8.8.1"""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "index.html").write_text("page")
        (tmp_path / "public" / "x").write_text("file")
        call = Caller(m.App(described, routes))
        shared = {path for route in routes.routes if route.cors for path in route.paths}
        for path, operations in m.describe_port(described, routes)["paths"].items():
            methods = {method.upper() for method in operations}
            for method in {"PATCH", "OPTIONS", "PUT", "HEAD", "TRACE", "DELETE", "POST", "GET"} - methods:
                answer = call(method, re.sub(r"\{\w+\}", "x", path), headers=[("Origin", "https://app.example")])
                if method == "HEAD" and "GET" in methods:
                    assert answer.status != 405, path
                    continue
                is_preflight = method == "OPTIONS" and path.replace("/auth", "") in shared
                assert answer.status == (204 if is_preflight else 405), (method, path)
                assert set(answer.headers["allow"].split(",")) == methods, (method, path)

    def test_a_preflight_names_the_methods_that_it_lists(self, idp, auth, public):
        """Fetch Standard §3.3.3"""
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", "https://app.example")
        for path, methods in (("/token", "POST"), ("/jwks.json", "GET"), ("/userinfo", "GET, POST")):
            answer = auth("OPTIONS", path, headers=[("Origin", "https://app.example")])
            assert answer.headers["access-control-allow-methods"] == methods

    HOST = "https://app.example/"

    @pytest.mark.parametrize(
        "method, path, body, member, fill",
        [
            ("POST", "/users", {"email": "a@b.example", "password": "a long password"}, "username", "x" * 300),
            ("POST", "/users", {"username": "new", "password": "a long password"}, "email", "a@" + "x" * 300),
            ("POST", "/users", {"username": "new", "email": "a@b.example"}, "password", "xyz0" * 100),
            ("PUT", "/users/alice", {}, "username", "x" * 300), ("PUT", "/users/alice", {}, "email", "a@" + "x" * 300),
            ("POST", "/users/alice/reset", {}, "new_password", "xyz0" * 100),
            ("POST", "/roles", {}, "name", "x" * 300), ("POST", "/roles", {"name": "new"}, "description", "x" * 300),
            ("PUT", "/roles/Ops", {}, "name", "x" * 300), ("PUT", "/roles/Ops", {}, "description", "x" * 300),
            ("POST", "/permissions", {}, "name", "x" * 300), ("PUT", "/permissions/open", {}, "name", "x" * 300),
            ("POST", "/scopes", {}, "name", "x" * 300), ("POST", "/scopes", {"name": "new"}, "description", "x" * 300),
            ("PUT", "/scopes/api:read", {}, "name", "x" * 300), ("POST", "/clients", {}, "client_id", "x" * 300),
            ("POST", "/clients", {"client_id": "new"}, "client_secret", "xyz0" * 100),
            ("POST", "/clients", {"client_id": "new"}, "display_name", "x" * 300),
            ("POST", "/clients", {"client_id": "new"}, "audience", "x" * 300),
            ("PUT", "/clients/service", {}, "client_id", "x" * 300), ("PUT", "/clients/service", {}, "audience", "x" * 300),
            ("POST", "/clients/secret", {"client_id": "service"}, "new_secret", "xyz0" * 100),
            ("POST", "/clients/service/redirect-uris", {}, "uri", HOST + "x" * 3000),
            ("POST", "/clients/service/post-logout-redirect-uris", {}, "uri", HOST + "x" * 3000),
            ("POST", "/clients/spa/cors-origins", {}, "uri", "https://" + "x" * 3000),
            ("POST", "/clients/service/idp", {}, "provider_key", "x" * 300),
            ("POST", "/clients/service/idp", {"provider_key": "x"}, "issuer", HOST + "x" * 300),
            ("POST", "/clients/service/idp", {"provider_key": "x"}, "scopes", "x" * 300),
            ("POST", "/client/options/TOTP_ISSUER/ext", {"client_id": "service"}, "options", "x" * 300),
        ],
    )
    def test_the_longest_value_that_a_schema_names_is_taken_and_no_longer_one(
        self, idp, call, service, public, alice, method, path, body, member, fill
    ):
        call("POST", "/roles", {"name": "Ops"}), call("POST", "/permissions", {"name": "open"})
        document = m.describe_port(idp, m.ADMIN)
        template = next(
            each for each, methods in sorted(document["paths"].items(), key=lambda row: "{" in row[0])
            if method.lower() in methods and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", each), path)
        )
        schema = document["paths"][template][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
        reference = next(one["$ref"] for one in schema.get("anyOf", [schema]) if "$ref" in one)
        described = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"][member]
        longest = next(one["maxLength"] for one in described.get("anyOf", [described]) if "maxLength" in one)
        refused = call(method, path, body | {member: fill[: longest + 1]})
        assert refused.status == 400 and list(refused.json["errors"]) == [member], refused
        assert call(method, path, body | {member: fill[:longest]}).status in (200, 201)

    def test_the_schemas_of_a_client_name_what_may_be_chosen(self, idp, call, service):
        new = m.describe_port(idp, m.ADMIN)["components"]["schemas"]["CreateClient"]["properties"]
        grants = next(one for one in new["grant_types"]["anyOf"] if one["type"] == "array")["items"]["enum"]
        for grant in grants:
            assert call("PUT", "/clients/service", {"grant_types": [grant]}).status == 200
        assert set(grants) == set(m.GRANT_TYPES) and new["client_type"]["enum"] == ["confidential", "public"]
        secret = m.describe_port(idp, m.ADMIN)["components"]["schemas"]["ChangeSecret"]["properties"]
        most = secret["overlap_seconds"]["maximum"]
        for overlap, status in ((0, 200), (most, 200), (most + 1, 400), (-1, 400)):
            assert call("POST", "/clients/secret", {"client_id": "service", "overlap_seconds": overlap}).status == status
        pattern = next(one for one in secret["new_secret"]["anyOf"] if one["type"] == "string")["pattern"]
        for word, is_good in (("", True), ("1234xyz", False), ("1234xyz!", True), ("x" * 255, True), ("x" * 256, False)):
            assert bool(re.search(pattern, word)) == is_good
            answer = call("POST", "/clients/secret", {"client_id": "service", "new_secret": word})
            assert answer.status == (200 if is_good else 400)

    def test_it_is_served_only_where_it_is_switched_on(self, auth, admin, make_idp):
        for caller in (auth, admin):
            assert [caller.get(path).status for path in ("/openapi.json", "/swagger/v1/swagger.json", "/swagger")] == [
                404
            ] * 3
        idp = make_idp(Options(**CHEAP, **OPTIONS))
        for routes in (m.AUTH, m.ADMIN):
            answer = Caller(m.App(idp, routes)).get("/openapi.json")
            assert (
                answer.status == 200
                and answer.json["openapi"] == "3.1.0"
                and routes.name in answer.json["info"]["title"]
                and answer.headers["etag"]
            )

    def test_who_may_call_is_said(self, described):
        admin, auth = m.describe_port(described, m.ADMIN)["paths"], m.describe_port(described, m.AUTH)["paths"]
        assert (
            admin["/users"]["get"]["security"] == [{"bearer": []}, {"console": [], "form_token": []}]
            and "security" not in admin["/ping"]["get"]
            and auth["/users"]["get"]["security"] == [{"bearer": ["admin:list_users"]}]
        )
        assert auth["/token"]["post"]["security"] == [{"client_basic": []}, {}]


def conforms(document, schema, value):
    """Whether a value is of a schema: the part of JSON Schema that our types make."""
    if "$ref" in schema:
        return conforms(document, document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], value)
    if "anyOf" in schema:
        return any(conforms(document, part, value) for part in schema["anyOf"])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if "type" in schema and (
        not isinstance(value, kinds[schema["type"]]) or schema["type"] == "integer" and isinstance(value, bool)
    ):
        return False
    if schema.get("type") == "array":
        return all(conforms(document, schema["items"], item) for item in value)
    if schema.get("type") == "object" and "properties" in schema:
        return set(schema["required"]) <= set(value) <= set(schema["properties"]) and all(
            conforms(document, schema["properties"][name], item) for name, item in value.items()
        )
    return "enum" not in schema or value in schema["enum"]


class TestRequests:
    """What may be sent is described."""

    def test_every_member_a_handler_reads_is_described(self, described):
        """Of forms, and of queries that have no type of their own."""
        read = set(re.findall(r'params\.(?:get|need)\("(\w+)"\)', inspect.getsource(m)))
        described = {
            field.encode_name
            for routes in (m.AUTH, m.ADMIN)
            for route in routes.routes
            if route.form
            for field in msgspec.structs.fields(route.form)
        }
        assert len(read) > 20 and read <= described

    def test_every_member_of_every_grant_is_described(self):
        needed = {
            name
            for grant in m.GRANTS.values()
            for name in re.findall(r'params\.(?:get|need)\("(\w+)"\)', inspect.getsource(grant))
        }
        assert (
            {"code", "code_verifier", "redirect_uri", "refresh_token", "username"}
            <= needed
            <= set(TokenForm.__struct_fields__)
        )

    def test_what_a_get_reads_is_its_query_and_an_access_token_is_never_there(self, described):
        """RFC 9700 §4.3.2"""
        paths = m.describe_port(described, m.AUTH)["paths"]
        queries = {
            path: {part["name"]: part["required"] for part in methods["get"]["parameters"] if part["in"] == "query"}
            for path, methods in paths.items()
            if "get" in methods
        }
        assert (
            queries["/authorize"]["client_id"]
            and not queries["/authorize"]["state"]
            and queries["/login"] == {"tx": False, "jti": False}
            and "id_token_hint" in queries["/end-session"]
        )
        assert [path for path, query in queries.items() if "access_token" in query] == []


class TestAnswers:
    """No member is answered that is not described, and none is missing."""

    def test_of_admin(self, idp, admin, admin_token, alice, service, log_in):
        log_in(alice)
        document = m.describe_port(idp, m.ADMIN)
        for name, body, status in (
            ("roles", {"name": "x"}, 200), ("permissions", {"name": "x"}, 200),
            ("clients/service/redirect-uris", "https://app.example/", 201),
            ("clients/service/idp", {"provider_key": "x"}, 201),
        ):
            assert admin("POST", f"/{name}", bearer=admin_token, json_body=body).status == status
        ids = {
            "/users/{id}": "alice", "/roles/{id}": "x", "/permissions/{id}": "x", "/scopes/{id}": "api:read",
            "/clients/{id}": "service", "/sessions/user/{id}": "alice", "/refresh-tokens/user/{id}": "alice",
            "/permissions/user/{id}": "alice", "/roles/user/{id}": "alice", "/scopes/user/{id}": "alice",
            "/scopes/client/{id}": "service", "/permissions/retrieve/{id}": "x", "/audit-logs/{id}": "1",
        }
        asked = 0
        for path, methods in document["paths"].items():
            key = next((prefix for prefix in sorted(ids, key=len, reverse=True) if path.startswith(prefix)), "")
            concrete = path.replace("{id}", ids.get(key, "{id}"))
            if "get" not in methods or "{" in concrete or "client/options" in path:
                continue
            if path in ("/", "/dashboard", "/Dashboard", "/Login", "/dashboard/", "/dashboard/preview", "/dashboard/session"):
                continue  # for browsers: redirects, the document, and what only a cookie opens
            answer = admin("GET", concrete, bearer=admin_token)
            assert answer.status == 200, (path, answer)
            (media,) = methods["get"]["responses"]["200"]["content"].items()
            if media[0] == "text/plain":
                continue
            for value in (
                [json.loads(line) for line in answer.body.splitlines()] if "ndjson" in media[0] else [answer.json]
            ):
                assert conforms(document, media[1]["schema"], value), (path, value)
            assert answer.headers["content-type"] == media[0]
            asked += 1
        assert asked > 35

    def test_of_auth(self, idp, auth, service, alice, log_in, machine):
        document = m.describe_port(idp, m.AUTH)
        person = log_in(alice, scope="openid profile email roles")
        answers = {
            ("/token", "post"): person,
            ("/introspect", "post"): auth.post("/introspect", {"token": person["access_token"]}, auth=service).json,
            ("/jwks.json", "get"): auth.get("/jwks.json").json,
            ("/revoke", "post"): auth.post("/revoke", {"token": "x"}, auth=service).json,
            ("/.well-known/openid-configuration", "get"): auth.get("/.well-known/openid-configuration").json,
        } | {
            (path, "get"): auth.get(path, bearer=person["access_token"]).json
            for path in (
                "/userinfo", "/me", "/whoami", "/me/sessions", "/me/refresh-tokens", "/ping", "/version", "/health",
                "/health/ready",
            )
        }
        for (path, method), value in answers.items():
            (media,) = document["paths"][path][method]["responses"]["200"]["content"].values()
            assert conforms(document, media["schema"], value), (path, value)
        for token in (machine, ):
            assert conforms(document, {"$ref": "#/components/schemas/TokenObject"}, token)
        refused = auth.post("/token", {"grant_type": "x"}, auth=service).json
        assert conforms(document, {"$ref": "#/components/schemas/OAuthError"}, refused) and conforms(
            document, {"$ref": "#/components/schemas/Err"}, auth.get("/me").json
        )

    @pytest.mark.parametrize("routes", [m.AUTH, m.ADMIN], ids=["auth", "admin"])
    def test_exactly_what_has_a_lasting_tag_is_described_as_having_one(self, make_idp, routes):
        """RFC 9110 §15.4.5"""
        idp = make_idp(Options(**CHEAP, **OPTIONS))
        caller = Caller(m.App(idp, routes))
        for path, methods in m.describe_port(idp, routes)["paths"].items():
            if "get" in methods and "{" not in path:
                tag = caller.get(path).headers.get("etag")
                assert ("304" in methods["get"]["responses"]) == (tag is not None), path
                if tag:
                    assert caller.get(path, headers=[("If-None-Match", tag)]).status == 304

    def test_the_check_itself_can_fail(self, idp):
        document = m.describe_port(idp, m.ADMIN)
        assert not conforms(document, {"$ref": "#/components/schemas/Msg"}, {"success": True}) and not conforms(
            document, {"$ref": "#/components/schemas/Msg"}, {"success": True, "message": "x", "more": 1}
        )
        assert not conforms(document, {"$ref": "#/components/schemas/Msg"}, {"success": 1, "message": "x"})


class TestDeclarations:
    def test_a_path_with_a_variable_cannot_be_shared_with_other_origins(self):
        """Who asks before it sends is answered from a table of paths, which knows none with variables."""
        routes = Routes("test")
        with pytest.raises(TypeError, match="<id>"):
            routes("GET", ("/users", "/users/<id>"), guard=m.anyone, spec="none", cors=True)
        routes("GET", "/users", guard=m.anyone, spec="none", cors=True)(lambda idp, params: {})
        assert [route.cors for route in routes.routes] == [True]
