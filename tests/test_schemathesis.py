"""Both ports under a property-based tester that knows nothing but their own description of themselves.

No answer is a 5xx, none has a status, content type or body that the description does not have.
SCHEMATHESIS_EXAMPLES and SCHEMATHESIS_SEED run it longer and elsewhere.
"""

import base64
import os

import hypothesis
import microauthd as m
import openapi_spec_validator
import pytest
import schemathesis
from conftest import CHEAP, PASSWORD
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_headers_conformance, response_schema_conformance, status_code_conformance

EXAMPLES, SEED = int(os.environ.get("SCHEMATHESIS_EXAMPLES", 4)), int(os.environ.get("SCHEMATHESIS_SEED", 20261123))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
# They would end the administrator whose token makes every other call; each has tests of its own.
SPARED = {("admin", "POST", "/logout")}
KNOWN = {"id": ["alice", "ops", "door.open", "api:read", "service", "nobody", "1"], "flag": list(m.FLAGS), "name": ["alice", "service", "pages.css", "form_post.js"], "client_id": ["service", "spa"], "scope_id": ["api:read"], "permission_id": ["door.open"]}


@pytest.fixture
def options():
    return m.Options(**CHEAP, enable_token_refresh=True, enable_auth_swagger=True, enable_admin_swagger=True, admin_domain="localhost", oidc_issuer="http://localhost")


@pytest.fixture
def world(idp, auth, admin, service, alice, root, public):
    """Something of everything, so that not every identifier is unknown."""
    m.create_role(idp, m.LOCAL, "test", m.CreateRole("ops"))
    m.create_permission(idp, m.LOCAL, "test", m.CreatePermission("door.open"))
    m.add_uri(idp, m.LOCAL, "test", "service", "redirect", "https://app.example/cb")
    m.put_idp(idp, m.LOCAL, "test", "service", m.PutIdp("google"))
    m.reset_password(idp, m.LOCAL, "test", "root", PASSWORD)
    return service


def tokens_of(auth, admin, service):
    for scope in (None, "openid profile email roles"):
        answer = auth.post("/token", {"grant_type": "password", "username": "alice", "password": PASSWORD} | ({"scope": scope} if scope else {}), auth=service)
    access = answer.json.get("access_token", "") if answer.status == 200 else ""
    return access, admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]


def probe(operation, headers, seed):
    """Call one operation with what its description allows, now and then without a right to."""

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate])
    @hypothesis.given(case=operation.as_strategy(), dice=hypothesis.strategies.randoms(use_true_random=False))
    def call(case, dice):
        for name in case.path_parameters or {}:
            if name in KNOWN and dice.random() < 0.7:
                case.path_parameters[name] = dice.choice(KNOWN[name])
        response = case.call(headers=headers if dice.random() < 0.85 else {"Authorization": "Bearer x"})
        case.validate_response(response, checks=CHECKS)

    call()


@pytest.mark.parametrize("port", ["auth", "admin"])
def test_the_document_is_valid(world, auth, admin, port):
    openapi_spec_validator.validate({"auth": auth, "admin": admin}[port].get("/openapi.json").json)


@pytest.mark.parametrize("port", ["auth", "admin"])
def test_no_answer_is_a_server_error_or_undocumented(idp, world, auth, admin, port):
    app = m.build_app(idp, {"auth": m.AUTH, "admin": m.ADMIN}[port])
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if (port, operation.method.upper(), operation.path) in SPARED:
            continue
        access, token = tokens_of(auth, admin, world)
        headers = {"Authorization": f"Bearer {token if port == 'admin' else access}"}
        if "client_basic" in str(operation.definition.raw.get("security")):
            headers = {"Authorization": "Basic " + base64.b64encode(":".join(world).encode()).decode()}

        probe(operation, headers, SEED + asked)
        asked += 1
    assert asked > (30 if port == "auth" else 100)
