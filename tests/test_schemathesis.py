"""Both ports under a property-based tester that knows nothing but their own description of themselves.

No answer is a 5xx, none has a status, content type or body that the description does not have.
SCHEMATHESIS_EXAMPLES and SCHEMATHESIS_SEED run it longer and elsewhere.
"""

import base64
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import microauthd as m
import openapi_spec_validator
import pytest
import schemathesis
from box import Box
from conftest import CHEAP, PASSWORD, Caller
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance, negative_data_rejection, response_headers_conformance, response_schema_conformance,
    status_code_conformance,
)
from appliance.base.files import write_durably
from appliance.base.keys import Key, write_ring
from appliance.base.settings import Options
from appliance.base.store import SEEDED_SCOPES
from appliance.base.objects import CreatePermission, CreateRole, PutIdp

EXAMPLES, SEED = int(os.environ.get("SCHEMATHESIS_EXAMPLES", 4)), int(os.environ.get("SCHEMATHESIS_SEED", 20261123))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# What is there in `world`, so that not every call is about something unknown. Never root: its token makes the calls.
KNOWN = {
    "flag": list(m.FLAGS), "email": ["new@example.org"], "new_password": ["another battery staple"],
    "lockout_until": ["9999-12-31T23:59:59Z"], "client_id": ["service", "spa"], "user_id": ["alice"],
    "role_id": ["ops"], "permission_id": ["door.open"], "scope_id": ["api:read"], "idp_id": ["google"],
    "path": ["login.html"], "username": ["alice"], "password": [PASSWORD],
    "grant_type": ["client_credentials", "password", "refresh_token"], "redirect_uri": ["https://app.example/cb"],
    "response_type": ["code"], "scope_ids": [["api:read"]], "role_ids": [["ops"]],
    "record_id": ["https://app.example/cb"], "uri": ["https://app.example/cb"],
}
NAMED = {
    "user": "alice", "role": "ops", "permission": "door.open", "scope": "api:read", "client": "service", "audit": "1",
    "page": "form_post.js",
}  # the {id} or {name} behind it in a path
# Whoever is not logged in is asked to log in, whatever was sent: no way of refusing what does not fit.
ASKS_FIRST = {("auth", "POST", "/account")}


@pytest.fixture
def options(tmp_path):
    return Options(
        **CHEAP, backup_folder="", enable_token_refresh=True, enable_auth_swagger=True, enable_admin_swagger=True,
        serve_public_auth_files=True, admin_domain="localhost", oidc_issuer="http://localhost",
        totp_qr_output_root=str(tmp_path), token_signing_key_file=str(tmp_path / "token.pem"),
        admin_token_signing_key_file=str(tmp_path / "admin_token.pem"),
    )


@pytest.fixture
def world(idp, make_idp, options, rings, service, alice, root, public, tmp_path, monkeypatch):
    """Something of everything, so that not every identifier is unknown. Call it for a copy: what one operation ends, the next has again."""
    m.create_role(idp, m.LOCAL.acting_as("test"), CreateRole("ops"))
    m.create_permission(idp, m.LOCAL.acting_as("test"), CreatePermission("door.open"))
    m.add_uri(idp, m.LOCAL.acting_as("test"), "service", "redirect", "https://app.example/cb")
    m.put_idp(idp, m.LOCAL.acting_as("test"), "service", PutIdp("google"))
    m.assign_scopes(idp, m.LOCAL.acting_as("test"), m.find_client(idp, "service"), [name for _, name, _ in SEEDED_SCOPES])
    idp.store.close()
    filled, copies = (tmp_path / "mad.db3").read_bytes(), itertools.count()
    monkeypatch.setitem(KNOWN, "kid", [Key(entry).kid for ring in rings for entry in ring])

    def call():
        path = tmp_path / f"{next(copies)}.db3"
        path.write_bytes(filled)
        for file, ring in zip((options.token_signing_key_file, options.admin_token_signing_key_file), rings, strict=True):
            write_durably(file, write_ring(ring, ""))
        idp = make_idp(options, path)
        idp.ring_versions = {port: (b"", None) for port in ("auth", "admin")}  # as a server: reload what changed
        return {"auth": m.App(idp, m.AUTH), "admin": m.App(idp, m.ADMIN)}

    call.service = service
    return call


def credentials(operation, apps, port, service):
    """Return the header of somebody who may call this: an administrator, a client, a machine with the scope, a user."""
    wanted, auth, admin = operation.definition.raw.get("security", []), Caller(apps["auth"]), Caller(apps["admin"])
    if {"client_basic": []} in wanted:
        return {"Authorization": "Basic " + base64.b64encode(":".join(service).encode()).decode()}
    if port == "admin":
        answer = admin.post("/token", {"username": "root", "password": PASSWORD})
    elif any(part.get("bearer") for part in wanted):
        answer = auth.post(
            "/token", {"grant_type": "client_credentials", "scope": wanted[0]["bearer"][0]}, auth=service
        )
    else:
        answer = auth.post(
            "/token",
            {
                "grant_type": "password", "username": "alice", "password": PASSWORD,
                "scope": "openid profile email roles",
            },
            auth=service,
        )
    assert answer.status == 200, answer
    return {"Authorization": f"Bearer {answer.json['access_token']}"}


def make_known(case, dice):
    """Let what is asked for be there, mostly."""
    before = reversed(re.split(r"\{(?:id|name)\}", case.path)[0].split("/"))
    named = [NAMED[word] for part in before for word in NAMED if part.startswith(word)][:1]
    for found in (case.path_parameters, case.query, case.body):
        if isinstance(found, dict):
            for name in found:
                known = named if found is case.path_parameters and name in ("id", "name") else KNOWN.get(name)
                if known and dice.random() < 0.8:
                    found[name] = dice.choice(known)


def probe(operation, headers, seed, mode, rejects=True):
    """Call one operation with what its description allows or forbids, now and then without a right to. Return the statuses."""
    found = set()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(
        case=operation.as_strategy(generation_mode=mode), dice=hypothesis.strategies.randoms(use_true_random=False)
    )
    def call(case, dice):
        hypothesis.assume(
            PASSWORD not in str(case.path_parameters)
        )  # it picks words out of this folder, and a path is logged
        if mode is POSITIVE:
            make_known(case, dice)
        response = case.call(headers=headers if dice.random() < 0.85 else {"Authorization": "Bearer x"})
        found.add(response.status_code)
        part = case.meta.components.get(ParameterLocation.BODY)
        # Members of a query that nobody knows are ignored: RFC 6749 §3.1. So only a body that does not fit must be refused.
        refused = rejects and mode is NEGATIVE and part is not None and part.mode is NEGATIVE
        case.validate_response(response, checks=CHECKS + [negative_data_rejection] * refused)

    call()
    return found


@pytest.mark.parametrize("port", ["auth", "admin"])
def test_the_document_is_valid(world, port):
    openapi_spec_validator.validate(Caller(world()[port]).get("/openapi.json").json)


@pytest.mark.parametrize("port", ["auth", "admin"])
def test_no_answer_is_a_server_error_or_undocumented(world, port):
    apps = world()
    schema = schemathesis.openapi.from_wsgi(
        "/openapi.json", lambda environ, start_response: apps[port](environ, start_response)
    )
    asked, never = 0, []
    for found in schema.get_all_operations():
        operation, apps = found.ok(), world()
        name, headers = (
            (port, operation.method.upper(), operation.path), credentials(operation, apps, port, world.service),
        )
        asked += 1
        if operation.body:
            probe(operation, headers, SEED - asked, NEGATIVE, name not in ASKS_FIRST)
        if not any(status < 400 for status in probe(operation, headers, SEED + asked, POSITIVE)):
            never.append(name)
    assert asked > (45 if port == "auth" else 125)
    assert len(never) < asked / 2, ("hardly anything was answered but refusals", never)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schemathesis")
    (folder / "qr").mkdir()
    settings = {
        "enable_auth_swagger": "true", "enable_admin_swagger": "true", "enable_token_refresh": "true",
        "serve_public_auth_files": "true", "totp_qr_output_root": folder / "qr",
    }
    with Box(folder / "data", workers="1", **settings) as box:
        box.new_user("ann")
        yield box


@pytest.mark.parametrize("port", ["auth", "admin"])
def test_every_corner_of_the_description_holds_on_sockets(box, port, tmp_path):
    """Each value at its limits, each member missing, methods that are not offered: through the whole server.

    Left out are what ends the login that asks (above, they are not), and what asks whoever comes to log in first.
    """
    number, path = (box.auth_port, "/me") if port == "auth" else (box.admin_port, "/users")
    bearer = (
        box.admin_token() if port == "admin" else box.log_in("ann", scope="openid profile email").json["access_token"]
    )
    claims = json.loads(base64.urlsafe_b64decode(bearer.split(".")[1] + "=="))
    words = [
        "--phases", "coverage", "--seed", str(SEED), "--no-color", "--checks",
        ",".join(check.__name__ for check in [*CHECKS, negative_data_rejection]), "--exclude-path-regex",
        r"^/(logout|logout-all|account|dashboard/sessions/\{id\}|sessions/revoke-all)$",
    ]
    # A request with an If-Match that names no version is 412 before its body is looked at. RFC 9110 §13.2.2.
    refusals = [400, 401, 403, 404, 405, 406, 409, 412, 415, 422, 428, 429, "5xx"]
    (tmp_path / "schemathesis.toml").write_text(
        f"[checks]\nnegative_data_rejection.expected-statuses = {json.dumps([str(status) for status in refusals])}\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{number}/openapi.json", "--url",
            f"http://127.0.0.1:{number}", "-H", f"Authorization: Bearer {bearer}", *words,
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ
        | {
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent),
            "SCHEMATHESIS_SPARE": f"root {claims['sub']} {claims['jti']}",
        },
    )
    assert done.returncode == 0 and int(re.search(r"Tested: (\d+)", done.stdout)[1]) > (
        40 if port == "auth" else 125
    ), done.stdout + done.stderr
    assert box.call(number, "GET", path, bearer=bearer).status == 200, "whoever asked was let in to the end"
    assert 'traceback="Traceback' not in box.said()
