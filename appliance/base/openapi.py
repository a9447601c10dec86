"""The declaration of routes, and the OpenAPI 3.1 document generated from it."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

JSON, FORM = "application/json", "application/x-www-form-urlencoded"


class Route(msgspec.Struct, frozen=True):
    """The declaration of a route: who may call it, what it takes, what it answers, what it implements."""

    methods: tuple
    paths: tuple
    guard: Any
    spec: str
    handler: Callable
    takes: Any = None  # type of the body, decoded before the handler runs
    media: tuple = (JSON,)  # media types accepted for that body
    # Struct with the members of a form, or of a GET's query, that the handler reads itself
    form: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None  # Struct of the query, decoded before the handler runs
    gives: Any = dict  # type of the answer
    gives_media: str = JSON
    status: int = 200
    versioned: bool = False  # GET returns an ETag, the other methods accept If-Match
    oauth: bool = False  # failures are JSON as in RFC 6749 §5.2
    html: bool = False  # failures are an HTML page
    redirects: bool = False  # answers with 302; pages redirect with 303
    leads: bool = False  # leads a browser elsewhere with 303; 404 for others
    tagged: bool = False  # has an ETag and answers If-None-Match with 304
    cors: bool = False  # allows the origins that public clients have registered
    option: str = ""  # served only if this option is on
    unless: str = ""  # served only if this option is off
    # Function (idp, params): whether a session at the console needs a fresh proof; None never does.
    proof: Callable | None = None
    secret_path: bool = False  # a variable of the path is a secret, which the log must not have


class Routes:
    """The routes of one port, declared by decorating their handlers. `guard` has no default."""

    def __init__(self, name):
        self.name, self.routes = name, []

    def __call__(self, methods, paths, *, guard, spec, **more):
        paths = (paths,) if isinstance(paths, str) else tuple(paths)

        if more.get("cors") and any("<" in path for path in paths):
            raise TypeError(f"{paths}: only a path without variables can be shared with other origins")

        def declare(handler):
            self.routes.append(Route(tuple(methods.split()), paths, guard, spec, handler, **more))
            return handler

        return declare


REF = "#/components/schemas/{name}"
FRAMING = (400, 408, 413, 414, 417, 431, 500, 501, 503, 505)  # possible for every request
SECURITY = {
    "client_basic": {
        "type": "http", "scheme": "basic",
        "description": "client_id and client_secret, each form-encoded; or as members of the form; "
        "a public client sends its client_id alone. RFC 6749 §2.3.1.",
    },
    "bearer": {
        "type": "http", "scheme": "bearer", "bearerFormat": "JWT",
        "description": "An access token of this port. RFC 6750, RFC 9068.",
    },
    "console": {
        "type": "apiKey", "in": "cookie", "name": "mad-admin",
        "description": "A session at the console, with its form token; the name begins with __Host- under https.",
    },
    "form_token": {
        "type": "apiKey", "in": "header", "name": "X-Form-Token",
        "description": "The form token of that session, which the answer of POST /dashboard/session gives.",
    },
}


def schema_of(type_) -> dict:
    """Return the schema of a type, in which structs are `$ref`s."""
    if type_ is bytes:
        return {}
    (schema,), _ = msgspec.json.schema_components([type_], ref_template=REF)
    return schema


def may_be_empty(declared) -> bool:
    """Tell whether a body of this type may be empty: it is a Struct whose members are all optional."""
    is_struct = isinstance(declared, type) and issubclass(declared, msgspec.Struct)
    return is_struct and not any(field.required for field in msgspec.structs.fields(declared))


def guard_name(route: Route) -> str:
    return getattr(route.guard, "__qualname__", "").split(".")[0]


def possible_statuses(route: Route, method: str, path: str, port_name: str) -> set:
    """Return the statuses with which a route may refuse a request."""
    guard, statuses = guard_name(route), set(FRAMING)
    if guard != "anyone":
        statuses |= {401, 403}
    if "<" in path or route.takes is not None or (route.query is not None and guard != "anyone"):
        statuses.add(404)
    if route.takes is not None:
        statuses.add(415)
    if method in ("POST", "PUT", "DELETE") and guard != "anyone":
        statuses.add(409)
    if route.form is not None or route.takes is not None:
        statuses |= {403, 429}
    if route.versioned and method != "GET":
        statuses.add(412)
    if route.gives_media == "*/*" and method == "GET":
        statuses.add(404)  # the file does not exist
    if route.html:
        statuses |= {403, 404, 409, 429}
    if route.leads:
        statuses.add(404)
    if port_name == "admin":
        statuses.add(421)
    return statuses


def describe_parameters(route: Route, method: str, path: str) -> list[dict]:
    """Return the parameter objects of one method at one path. OpenAPI 3.1 §4.8.12."""
    rows = [("path", name, True, {"type": "string", "minLength": 1}) for name in re.findall(r"<(\w+)(?::\w+)?>", path)]
    # A bearer token may be in a form but never in a query. RFC 9700 §4.3.2.
    query = route.query or (route.form if method == "GET" and guard_name(route) == "anyone" else None)
    if query is not None:
        (_,), components = msgspec.json.schema_components([query], ref_template=REF)
        described = components[query.__name__]
        rows += [
            ("query", name, name in described["required"], schema) for name, schema in described["properties"].items()
        ]
    if route.versioned and method != "GET":
        rows.append(("header", "If-Match", False, {"type": "string"}))
    if route.tagged:
        rows.append(("header", "If-None-Match", False, {"type": "string"}))
    return [
        {"name": name, "in": where, "required": required, "schema": schema} for where, name, required, schema in rows
    ]


def describe_body(route: Route, method: str) -> dict | None:
    """Return the request body object of one method, or None if it takes no body. OpenAPI 3.1 §4.8.13."""
    if route.takes is not None:
        return {
            "required": not may_be_empty(route.takes),
            "content": {media: {"schema": schema_of(route.takes)} for media in route.media},
        }
    if route.form is not None and method == "POST":
        return {
            "required": not may_be_empty(route.form),
            "content": {FORM: {"schema": schema_of(route.form)}},
        }
    return None


def describe_responses(route: Route, method: str, path: str, port_name: str) -> dict:
    """Return the responses object of one method at one path. OpenAPI 3.1 §4.8.16."""
    headers: dict[str, dict] = {}
    responses: dict[str, dict] = {}
    text = {"schema": {"type": "string"}}
    if (
        route.query is not None
        and "offset" in route.query.__struct_fields__
        and getattr(route.gives, "__origin__", None) is list
    ):
        link = {"description": "RFC 8288; rel=next where there is more.", **text}
        headers |= {"X-Total-Count": text, "Link": link}
    is_message = getattr(route.gives, "__name__", "") == "Msg"  # of a change; it says nothing of what was changed
    if route.tagged or (route.versioned and method != "DELETE" and not is_message):
        headers["ETag"] = text
    if route.tagged:
        responses["304"] = {"description": "As you have it.", "headers": {"ETag": text}}
    content = {route.gives_media: {"schema": schema_of(route.gives)}}
    responses[str(route.status)] = {"description": "As asked.", "content": content}
    if headers:
        responses[str(route.status)]["headers"] = headers
    if route.html and route.gives is not bytes:
        responses["200"]["content"] = {"text/html": {"schema": {}}, JSON: {"schema": schema_of(route.gives)}}
    if route.html or route.redirects or route.leads:
        responses["303" if route.html or route.leads else "302"] = {
            "description": "To be fetched by GET.", "headers": {"Location": text},
        }
    if route.gives_media == "*/*" and "<" in path:
        responses["308"] = {"description": "A folder, whose path ends with a slash.", "headers": {"Location": text}}
    for status in sorted(possible_statuses(route, method, path, port_name)):
        of_the_wire = status >= 500 or status in (408, 413, 414, 417, 431)
        form = "page" if route.html else "oauth" if route.oauth and not of_the_wire else "err"
        responses[str(status)] = {"$ref": f"#/components/responses/{form}"}
    if path.startswith("/health/ready"):
        responses["503"] = {"description": "Not ready.", "content": {JSON: {"schema": schema_of(route.gives)}}}
    return responses


def describe_operation(route: Route, method: str, path: str, port_name: str, number: int) -> dict:
    """Return the operation object of one method at one path. OpenAPI 3.1 §4.8.10."""
    doc = " ".join((route.handler.__doc__ or "").split())
    operation = {
        "operationId": route.handler.__name__ + (f"_{number}" if number else ""),
        "summary": doc.partition(".")[0] + ".", "description": doc,
        "tags": [(path.strip("/").split("/")[0] or "files").strip("<>.")], "x-specification": route.spec,
        "parameters": describe_parameters(route, method, path),
        "responses": describe_responses(route, method, path, port_name),
    }
    guard, body = guard_name(route), describe_body(route, method)
    if guard in ("by_client_or_token", "by_confidential_client"):
        operation["security"] = [{"client_basic": []}, {}]  # or by form members, which OpenAPI cannot express
    elif guard == "by_console":
        operation["security"] = [{"console": [], "form_token": []}]
    elif guard == "by_admin":
        operation["security"] = [{"bearer": []}, {"console": [], "form_token": []}]
    elif guard != "anyone":
        operation["security"] = [{"bearer": [route.guard.scope] if hasattr(route.guard, "scope") else []}]
    if body:
        operation["requestBody"] = body
    return operation


def describe_api(port_name: str, version: str, server: str, routes, err, oauth_error) -> dict:
    """Return the OpenAPI 3.1 document of a port, whose base URL is `server`.

    `routes` are pairs of a Route and one of its paths; `err` and `oauth_error` are the Structs of refusals.
    """
    paths: dict[str, dict] = {}
    numbers: dict[str, int] = {}
    used = [err, oauth_error]
    for route, path in routes:
        shown = paths.setdefault(re.sub(r"<(\w+)(:\w+)?>", r"{\1}", path), {})
        for method in route.methods:
            number = numbers[route.handler.__name__] = numbers.get(route.handler.__name__, -1) + 1
            shown[method.lower()] = describe_operation(route, method, path, port_name, number)
        used += [part for part in (route.takes, route.form, route.gives) if part not in (None, bytes)]
    _, schemas = msgspec.json.schema_components(used, ref_template=REF)
    either = {"anyOf": [schema_of(oauth_error), schema_of(err)]}  # refusals of base.wire have the members of both
    return {
        "openapi": "3.1.0",
        "info": {"title": f"microauthd {port_name} API", "version": version},
        "servers": [{"url": server}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "err": {"description": "Refused.", "content": {JSON: {"schema": schema_of(err)}}},
                "oauth": {"description": "Refused. RFC 6749 §5.2.", "content": {JSON: {"schema": either}}},
                "page": {
                    "description": "Refused, in words for people.",
                    "content": {"text/html": {"schema": {}}, JSON: {"schema": schema_of(err)}},
                },
            },
            "securitySchemes": SECURITY,
        },
    }
