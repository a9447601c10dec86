#!/usr/bin/env python3
"""mad: the command line of microauthd, and the HTTP client it is made of.

`mad <noun> <verb> [options]` is one request to the ADMIN server (a name given for an id costs one look-up before).
Standard library only, and little of it: a command is to cost less than 35 ms of processor time, which is why there
is no argparse (7 ms), http.client (25 ms) or contextlib (2 ms), and why most imports stand where they are used.

Contents
  Vocabulary   names, limits, exit statuses
  Errors       MadError (the server's or the network's), Refusal (ours)
  Wire         one HTTP exchange on one connection
  Tokens       reading a JWT without verifying it
  Bindings     what the two classes below share: a request, a list in pages
  AuthClient   every request to AUTH as a method
  MadClient    every request to ADMIN as a method
  Profile      the saved login, the cached tokens
  Arguments    Option, Command, ArgumentReader, parse()
  Output       tables and lines that no server can use to drive a terminal
  Help         texts, rows for a README and completion scripts, all made from the table
  Shell        what a running command knows: options, environment, profile
  Verbs        the commands that are more than a request
  Commands     COMMANDS, the table of everything mad can do
  Main         main()
"""
from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # What typing says to those who check types; loading it costs 5 ms.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, ParamSpec, TypedDict, Unpack

    P = ParamSpec("P")

    class Limited(TypedDict, total=False):
        """What a list takes: `limit` rows in all."""
        limit: int | None

    class Paged(Limited, total=False):
        """What a list takes that may be long: `offset` rows are left out."""
        offset: int | None

    class Sorted(Paged, total=False):
        """`sort` is a member, `-` before it for descending."""
        sort: str | None

    class Search(Sorted, total=False):
        """`q` is text to look for."""
        q: str | None

# == Vocabulary ================================================================
# The constants the rest of the file speaks in.

VERSION = "0.1.0"
ADMIN_URL = "http://localhost:9041"
AUTH_URL = "http://localhost:9040"

DONE, REFUSED, USAGE, LOGIN, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_STATUSES = (
    (DONE, "done"),
    (REFUSED, "refused by the server, or found to be wrong by audit verify"),
    (USAGE, "bad usage; nothing was sent"),
    (LOGIN, "not logged in: no token, or it expired or was not accepted"),
    (UNREACHABLE, "no usable answer: connection, TLS, time-out, or not a microauthd"),
)
ENVIRONMENT = (
    ("MAD_ADMIN_URL", "address of the ADMIN server (" + ADMIN_URL + ")"),
    ("MAD_ADMIN_TOKEN", "admin token to use instead of the saved login"),
    ("MAD_AUTH_URL", "address of the AUTH server (" + AUTH_URL + ")"),
    ("MAD_CLIENT_ID", "client of mad token get"),
    ("MAD_CLIENT_SECRET", "its secret"),
    ("MAD_CA_FILE", "PEM file of the authorities to trust for https, instead of the system's"),
)

TIMEOUT = 30.0             # seconds for a whole exchange: a server that drips bytes gains nothing by it
MAX_HEAD = 64 * 1024
MAX_BODY = 16 * 1024 * 1024
MAX_SECRET = 64 * 1024     # of a file or a line that holds a secret
PAGE = 1000                # rows the server gives at most in one answer
EXPORT = 5000              # rows of an export to ask for at once: some 3 MB
CACHE_MARGIN = 30          # seconds of life a cached token must have left, so that it outlives the request it is for


# == Errors ====================================================================
# Two kinds: what came back (or did not), and what mad itself will not do.

class MadError(Exception):
    """A request that failed.

    `status` is the HTTP status, 0 when there was no answer. `error` is the machine-readable code (`http_<status>` when
    the server named none), `message` a sentence, `errors` maps bad members to sentences. `hint` may be empty.
    `retry_after` is the seconds the server asks to wait, 0 when it does not say.
    """

    def __init__(self, status: int, error: str, message: str, errors: dict | None = None, hint: str = "",
                 retry_after: int = 0):
        super().__init__(status, error, message)
        self.status, self.error, self.message, self.errors, self.hint = status, error, message, errors or {}, hint
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class Unreachable(MadError):
    """No usable answer: `error` is `unreachable`, `timeout`, `untrusted` or `bad_answer`."""


class NoRoute(MadError):
    """The server has no such route (404 with `X-Not-Found: route`), which says nothing about what was asked for."""


class BadValue(ValueError):
    """A value no request can carry: a blank id, an unusable URL, a token that is none."""


class Refusal(Exception):
    """What mad refuses by itself: `exit_status`, `error` code, `messages` (one or more), `hint`."""

    def __init__(self, exit_status: int, error: str, *messages: str, hint: str = ""):
        super().__init__(*messages)
        self.exit_status, self.error, self.messages, self.hint = exit_status, error, messages, hint


# == Wire ======================================================================
# HTTP/1.1 with one request a connection. Never follows a redirect and never asks a proxy: both would carry the
# token to somebody it was not meant for.

class Url:
    """A base URL taken apart: `scheme`, `host` (no brackets), `port`, `base` (path without the last slash), `text`."""

    def __init__(self, text: str):
        from urllib.parse import urlsplit
        text = text.strip()
        if not text.isascii() or not text.isprintable() or " " in text:
            raise BadValue("not a URL: only plain ASCII is taken")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise BadValue("not a URL: its host or port is malformed") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadValue("not a URL: it must begin with http:// or https:// and name a host")
        if parts.username is not None or parts.query or parts.fragment:
            raise BadValue("not a base URL: no user, query or fragment is allowed in it")
        self.scheme, self.host = parts.scheme, parts.hostname
        self.port = port if port is not None else 443 if self.scheme == "https" else 80
        self.base = parts.path.rstrip("/")
        name = f"[{self.host}]" if ":" in self.host else self.host
        default = self.port == (443 if self.scheme == "https" else 80)
        self.authority = name if default else f"{name}:{self.port}"
        self.text = f"{self.scheme}://{self.authority}{self.base}"

    @property
    def is_loopback(self) -> bool:
        parts = self.host.split(".")
        return self.host in ("localhost", "::1") or (
            len(parts) == 4 and parts[0] == "127" and all(part.isdigit() for part in parts))


def _bad_answer(why: str, hint: str = "is this the address of a microauthd?") -> Unreachable:
    return Unreachable(0, "bad_answer", why, hint=hint)


def _status_of(line: str) -> int:
    """Return the status of a status line. RFC 9112 §4."""
    version, _, rest = line.partition(" ")
    code = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isascii() and code.isdigit() and len(code) == 3):
        raise _bad_answer("not an HTTP answer")
    return int(code)


def _headers_of(lines: list[str]) -> dict[str, str]:
    """Return the header fields by lower-case name. Two lengths that differ are malformed. RFC 9112 §6.3."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or (name == "content-length" and headers.get(name, value) != value):
            raise _bad_answer("the head of the answer is malformed")
        headers[name] = value
    return headers


class AnswerReader:
    """Reads one HTTP answer from a connection. `left` returns the seconds that remain, or raises TimeoutError."""

    def __init__(self, connection, left: Callable[[], float]):
        self.connection, self.left, self.buffer = connection, left, bytearray()

    def more(self) -> bool:
        """Receive once. Return whether anything came before the end."""
        self.connection.settimeout(self.left())
        part = self.connection.recv(65536)
        self.buffer.extend(part)
        return bool(part)

    def fill(self, size: int) -> None:
        """Receive until the buffer has `size` bytes."""
        if size > MAX_BODY:
            raise _bad_answer(f"the answer is longer than {MAX_BODY >> 20} MiB")
        while len(self.buffer) < size:
            if not self.more():
                raise _bad_answer("the answer breaks off")

    def read_head(self) -> list[str]:
        """Take the lines before a blank line out of the buffer."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if len(self.buffer) > MAX_HEAD:
                raise _bad_answer("the head of the answer is too long")
            if not self.more():
                raise _bad_answer("not an HTTP answer" if self.buffer
                                  else "the connection was closed without an answer")
        head = self.buffer[:end].decode("latin-1").split("\r\n")
        del self.buffer[:end + 4]
        return head

    def read(self) -> tuple[int, dict, bytes]:
        """Return status, headers and body."""
        status = 0
        while status < 200:  # The ones below are interim: RFC 9110 §15.2.
            head = self.read_head()
            status = _status_of(head[0])
        headers = _headers_of(head[1:])
        return status, headers, b"" if status in (204, 304) else self.read_body(headers)

    def read_body(self, headers: dict) -> bytes:
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise _bad_answer("the answer has an unknown transfer encoding")
            return self.read_chunks()
        if (length := headers.get("content-length")) is not None:
            if not (length.isascii() and length.isdigit()) or len(length) > 18:
                raise _bad_answer("the head of the answer is malformed")
            self.fill(int(length))
            return bytes(self.buffer[:int(length)])
        while self.more():
            if len(self.buffer) > MAX_BODY:
                self.fill(len(self.buffer))
        return bytes(self.buffer)

    def read_chunks(self) -> bytes:
        """Return the body of a chunked answer. RFC 9112 §7.1."""
        body = bytearray()
        while True:
            while (end := self.buffer.find(b"\r\n")) < 0:
                if len(self.buffer) > 1024 or not self.more():
                    raise _bad_answer("the answer breaks off")
            digits = bytes(self.buffer[:end]).split(b";")[0].strip()
            if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdefABCDEF"):
                raise _bad_answer("the answer has a malformed chunk")
            size = int(digits, 16)
            del self.buffer[:end + 2]
            if size == 0:
                return bytes(body)
            self.fill(len(body) + size if len(body) + size > MAX_BODY else size + 2)
            body += self.buffer[:size]
            if self.buffer[size:size + 2] != b"\r\n":
                raise _bad_answer("the answer has a malformed chunk")
            del self.buffer[:size + 2]


def _tls(connection, host: str, ca_file: str | None, timeout: float):
    import ssl
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as problem:
        connection.close()
        raise Unreachable(
            0, "untrusted", f"cannot read the authorities in {ca_file}: {problem.strerror or problem}") from None
    connection.settimeout(timeout)
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def exchange(url: Url, method: str, target: str, headers: dict, body: bytes | None,
             timeout: float, ca_file: str | None) -> tuple[int, dict, bytes]:
    """Send one request. Return status, headers (lower-case names) and body.

    Raises Unreachable. Past `timeout` seconds in all, past MAX_HEAD or MAX_BODY bytes it gives up.
    RFC 9112 §6.3 decides where the body ends.
    """
    import socket
    from time import monotonic
    deadline = monotonic() + timeout

    def left() -> float:
        rest = deadline - monotonic()
        if rest <= 0:
            raise TimeoutError
        return rest

    lines = [f"{method} {target} HTTP/1.1", "Host: " + url.authority, "Connection: close",
             "Accept: application/json", "User-Agent: mad/" + VERSION]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None or method != "GET":
        lines.append(f"Content-Length: {len(body) if body else 0}")
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + (body or b"")

    where = url.text
    connection = None
    try:
        # Bytes, because a str is always run through the IDNA codec, whose tables cost 3 ms to load.
        address = url.host.encode("ascii"), url.port
        connection = socket.create_connection(address, left())  # type: ignore[arg-type]
        if url.scheme == "https":
            connection = _tls(connection, url.host, ca_file, left())
        connection.settimeout(left())
        try:
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # A server may refuse a request before it has read all of it; its answer is what counts.
        return AnswerReader(connection, left).read()
    except TimeoutError:
        raise Unreachable(0, "timeout", f"no answer from {where} within {timeout:g} seconds") from None
    except OSError as problem:
        if type(problem).__module__ == "ssl":
            reason = getattr(problem, "verify_message", "") or getattr(problem, "reason", "") or str(problem)
            raise Unreachable(0, "untrusted", f"no secure connection to {where}: {reason}", hint=(
                "name the authority that signed its certificate in MAD_CA_FILE" if hasattr(problem, "verify_message")
                else "does the server speak TLS on this port?")) from None
        raise Unreachable(0, "unreachable", f"cannot reach {where}: {problem.strerror or problem}",
                          hint="is the server running, and is this its address?") from None
    finally:
        if connection is not None:
            connection.close()


def read_json(body: bytes):
    """Return the value of a JSON text. Raises ValueError, also for NaN and for nesting without end."""
    import json

    def refuse(name):
        raise ValueError(name)
    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# == Tokens ====================================================================
# Reading only. Whether a token is good is for the server to say.

def is_token(text: str) -> bool:
    """Whether `text` can stand in an Authorization header. RFC 6750 §2.1 (b64token)."""
    return bool(text) and len(text) <= MAX_SECRET and text.isascii() and all(
        ch.isalnum() or ch in "-._~+/=" for ch in text)


def decode_jwt(token: str) -> tuple[dict, dict, str]:
    """Return header, claims and encoded signature of a compact JWS, unverified. Raises ValueError. RFC 7515 §3.1."""
    import binascii
    parts = token.split(".")
    if len(parts) != 3:
        raise ValueError(f"not a JWT: it has {len(parts)} parts instead of three")
    found = []
    for name, part in zip(("header", "payload"), parts[:2], strict=True):
        try:
            if not part or set(part) & set("+/="):
                raise ValueError
            octets = binascii.a2b_base64(part.replace("-", "+").replace("_", "/") + "=" * (-len(part) % 4),
                                         strict_mode=True)
        except ValueError:
            raise ValueError(f"not a JWT: its {name} is not base64url") from None
        try:
            value = read_json(octets)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"not a JWT: its {name} is not a JSON object")
        found.append(value)
    return found[0], found[1], parts[2]


def utc(seconds: float, mark: str = "Z") -> str:
    """Return Unix seconds as `YYYY-MM-DD HH:MM:SS` and `mark`, or as digits when no calendar holds them."""
    import time
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + mark
    except (OverflowError, ValueError, OSError):
        return str(seconds)


# == Bindings ==================================================================
# What MadClient and AuthClient share. Knows nothing of terminals, files or environment.

def _at(*parts: str) -> str:
    """Return a path of these segments. An empty one would turn 'one user' into 'all users', so it is an error."""
    from urllib.parse import quote
    for part in parts:
        if not isinstance(part, str) or not part.strip() or part in (".", ".."):
            raise BadValue(f"an id or a name is needed here, not {part!r}")
    return "".join("/" + quote(part, safe="") for part in parts)


def _given(**members) -> dict:
    """Return the members that were given: what is absent from a PUT stays as it is."""
    return {name: value for name, value in members.items() if value is not None}


def is_uuid(text: str) -> bool:
    """Whether `text` is an id as the server makes them, hence no name."""
    parts = text.split("-")
    return [len(part) for part in parts] == [8, 4, 4, 4, 12] and not "".join(parts).strip("0123456789abcdefABCDEF")


def next_query(link: str) -> str | None:
    """Return the query of the `rel="next"` of a Link header, None when there is no next page. RFC 8288 §3."""
    for part in link.split(","):
        target, _, parameters = part.strip().partition(">")
        names = [name.strip().lower().replace('"', "") for name in parameters.split(";")]
        if target.startswith("<") and "rel=next" in names and "?" in target:
            return target.partition("?")[2].partition("#")[0]
    return None


LIMITED = ("limit",)
PAGED = (*LIMITED, "offset")
SORTED = (*PAGED, "sort")
SEARCH = (*SORTED, "q")


def listing(*takes: str) -> Callable[[Callable[P, Iterator[list[dict]]]], Callable[P, list[dict]]]:
    """Make of a method that yields pages one that returns all rows in one list.

    `pages` stays the former; `takes` are the members of Search that the server heeds there.
    """
    def decorate(method):
        def whole(self, *args, **parameters):
            return [row for page in method(self, *args, **parameters) for row in page]
        whole.__name__, whole.__qualname__, whole.__doc__ = method.__name__, method.__qualname__, method.__doc__
        whole.__wrapped__ = whole.pages = method  # type: ignore[attr-defined]
        method.__annotations__["return"] = "list[dict]"  # What help() shows of a wrapped one.
        whole.takes = takes  # type: ignore[attr-defined]
        return whole
    return decorate


def _failure(status: int, fields: dict, value, with_token: bool) -> MadError:
    """Return the error an answer of 4xx or 5xx stands for: Err of ADMIN, or RFC 6749 §5.2."""
    if not isinstance(value, dict):
        if status in (502, 504):
            return Unreachable(status, "unreachable",
                               f"a gateway answers that the server cannot be reached ({status})")
        value = {}
    error = value.get("error")
    error = error if isinstance(error, str) and error else f"http_{status}"
    message = value.get("message") or value.get("error_description")
    if not isinstance(message, str):
        if status == 401 and with_token:
            message = "the token is not accepted"
        elif status == 429:
            message = "too many requests"
        else:
            message = f"the server answers {status} {'' if error.startswith('http_') else error}".strip()
    errors = value.get("errors")
    errors = {str(name): str(text) for name, text in errors.items()} if isinstance(errors, dict) else None
    wait = fields.get("retry-after", "")
    wait = wait if wait.isascii() and wait.isdigit() and len(wait) < 10 else ""
    return MadError(status, error, message, errors, f"try again in {wait} seconds" if wait else "", int(wait or 0))


def _checked_token(answer: dict) -> dict:
    token = answer.get("access_token")
    if not isinstance(token, str) or not is_token(token):
        raise _bad_answer("the answer has no access token")
    return answer


def _encode(path: str, json, form: dict | None, query: dict | str | None) -> tuple[str, dict, bytes | None]:
    """Return the request target, the Content-Type header if there is a body, and the body."""
    fields, body = {}, None
    if query or form is not None:
        from urllib.parse import urlencode
        if query:
            path += "?" + (query if isinstance(query, str) else urlencode(query))
        if form is not None:
            fields["Content-Type"] = "application/x-www-form-urlencoded"
            body = urlencode(form).encode("ascii")
    if json is not None:
        from json import dumps
        fields["Content-Type"] = "application/json"
        body = dumps(json, separators=(",", ":")).encode("ascii")
    return path, fields, body


def _decode(status: int, headers: dict, octets: bytes, want: type | tuple[type, ...], with_token: bool):
    """Return the value of an answer that is a success and a `want`. Raises MadError."""
    if want is bytes and status < 300:
        return octets
    try:
        value = read_json(octets) if octets else None
    except ValueError:
        value = octets  # No JSON value is bytes, so this is no `want`.
    if status >= 400:
        raise _failure(status, headers, value, with_token)
    if want is dict and status == 204:
        return {"success": True, "message": ""}
    if want is dict and isinstance(value, dict) and value.get("success") is False:
        raise _failure(status, headers, value, False)
    is_wanted = isinstance(value, want)
    if want is list:
        is_wanted = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if not is_wanted:
        raise _bad_answer("the answer is not the JSON it should be")
    return value


class Answer:
    """What came back: `status`, `headers` (lower-case names), `value` (of the JSON)."""
    __slots__ = ("headers", "status", "value")

    def __init__(self, status: int, headers: dict, value):
        self.status, self.headers, self.value = status, headers, value


class Binding:
    """A server at `url`, and the bearer `token` to show it. MadClient and AuthClient are the two there are."""

    def __init__(self, url: str, token: str | None, ca_file: str | None, timeout: float | None):
        self.url, self.token = url, token
        self.ca_file, self.timeout = ca_file, TIMEOUT if timeout is None else timeout

    def send(self, method: str, path: str, *, json=None, form: dict | None = None, query: dict | str | None = None,
             want: type | tuple[type, ...] = dict, anonymous: bool = False, headers: dict | None = None) -> Answer:
        """Send a request and return its Answer, whose JSON must be a `want` (bytes: whatever it is, unread).

        `path` is already escaped. The bearer goes along unless `anonymous`. For what no method does, such as
        a change that must not undo somebody else's:

            etag = admin.send("GET", "/users/" + id).headers["etag"]
            admin.send("PUT", "/users/" + id, json={"email": email}, headers={"If-Match": etag})  # or 412
        """
        url = Url(self.url)
        target, fields, body = _encode(path, json, form, query)
        fields = {**(headers or {}), **fields}
        with_token = bool(self.token) and not anonymous
        if with_token:
            if not is_token(self.token or ""):
                raise BadValue("the token has characters no token has")
            fields["Authorization"] = "Bearer " + (self.token or "")
        if any(not (text.isascii() and text.isprintable()) for item in fields.items() for text in item):
            raise BadValue("a header has characters no header has")
        status, received, octets = exchange(url, method, url.base + target, fields, body, self.timeout, self.ca_file)
        if 300 <= status < 400:
            raise Unreachable(status, "bad_answer", f"{url.text} redirects elsewhere, which is not followed",
                              hint="give the address it leads to, if you trust it")
        if status == 404 and received.get("x-not-found") == "route":
            raise NoRoute(404, "not_found", f"this server has no {method} {path}",
                          hint="is it older than this mad, or is the feature switched off there?")
        return Answer(status, received, _decode(status, received, octets, want, with_token))

    def request(self, method: str, path: str, **how):
        """Send a request as `send` does, and return the value of its JSON answer alone."""
        return self.send(method, path, **how).value

    def pages(self, path: str, query: dict | None = None, *, limit: int | None = None, offset: int | None = None,
              q: str | None = None, sort: str | None = None) -> Iterator[list[dict]]:
        """Yield a list of objects page by page, at most `limit` rows in all; a negative one, or none, means all."""
        if limit == 0:
            raise BadValue("a limit is at least 1; a negative one means all")
        left = limit if limit is not None and limit > 0 else None
        wanted: dict | str | None = _given(
            **(query or {}), limit=None if left is None else min(left, PAGE), offset=offset, q=q, sort=sort)
        asked = set()
        while True:
            answer = self.send("GET", path, query=wanted, want=list)
            rows = answer.value if left is None else answer.value[:left]
            # Only the query is taken: an address would send the token to wherever it says.
            wanted = next_query(answer.headers.get("link", ""))
            yield rows
            if left is not None:
                left -= len(rows)
            if not wanted or not rows or left == 0:
                return
            if wanted in asked:
                raise _bad_answer("the pages of the list go round in a circle", hint="")
            asked.add(wanted)

    def each(self, method, *args, **parameters) -> Iterator[dict]:
        """Yield the rows of a list one by one, so that only a page of them is in memory.

            for user in admin.each(admin.list_users, q="ann"): ...
        """
        for page in method.__func__.pages(self, *args, **parameters):
            yield from page


# == AuthClient ================================================================
# The requests of AUTH.

class AuthClient(Binding):
    """The AUTH API of a microauthd, as a client of it; the ADMIN API is MadClient.

        auth = AuthClient("http://localhost:9040", "app", secret)
        answer = auth.password_login("bob", password, scope="openid email")
        auth.token = answer["access_token"]     # the bearer of userinfo, me, sessions, logout …
        auth.userinfo()["email"]

    `client_id` and `client_secret` authenticate the client where AUTH requires it: with HTTP Basic, or as a public
    client without a secret. `token` is the bearer token of the other requests; only the caller sets it. Objects are
    those of MadClient, and Token: `access_token token_type expires_in scope jti`, with `refresh_token` and `id_token`
    when they exist. Methods raise as MadClient's do; `error` is a code of RFC 6749 §5.2 at the OAuth endpoints.
    """

    def __init__(self, auth_url: str = AUTH_URL, client_id: str | None = None, client_secret: str | None = None, *,
                 token: str | None = None, ca_file: str | None = None, timeout: float | None = None):
        super().__init__(auth_url, token, ca_file, timeout)
        self.client_id, self.client_secret = client_id, client_secret

    @property
    def auth_url(self) -> str:
        return self.url

    def _as_client(self, path: str, **form) -> dict:
        """POST a form as the client: Basic with a secret, `client_id` in the form without one. RFC 6749 §2.3.1."""
        form, headers = _given(**form), {}
        if not self.client_id:
            raise BadValue("a client_id is needed here")
        if self.client_secret is None:
            form["client_id"] = self.client_id
        else:
            from binascii import b2a_base64
            from urllib.parse import quote_plus
            # Both halves are form-encoded before they are joined, or a colon or an umlaut would change their meaning.
            pair = quote_plus(self.client_id) + ":" + quote_plus(self.client_secret)
            headers["Authorization"] = "Basic " + b2a_base64(pair.encode("ascii"), newline=False).decode("ascii")
        return self.request("POST", path, form=form, headers=headers, anonymous=True)

    # -- what anybody may ask --

    def discovery(self) -> dict:
        """GET /.well-known/openid-configuration. Return the metadata of OpenID Connect Discovery §3."""
        return self.request("GET", "/.well-known/openid-configuration", anonymous=True)

    def jwks(self) -> dict:
        """GET /jwks.json. Return {"keys": […]}, the public keys of AUTH. RFC 7517 §5."""
        return self.request("GET", "/jwks.json", anonymous=True)

    # -- tokens --

    def client_credentials(self, scope: str | None = None) -> dict:
        """POST /token. Return Token, for the client itself. RFC 6749 §4.4."""
        return _checked_token(self._as_client("/token", grant_type="client_credentials", scope=scope or None))

    def password_login(self, username: str, password: str, scope: str | None = None, totp: str | None = None) -> dict:
        """POST /token. Return Token, for a user. A failed login is 403, whatever was wrong. RFC 6749 §4.3."""
        return _checked_token(self._as_client("/token", grant_type="password", username=username, password=password,
                                              scope=scope, totp=totp))

    def exchange_code(self, code: str, redirect_uri: str, code_verifier: str | None = None) -> dict:
        """POST /token. Return Token, for the code that came to `redirect_uri`. RFC 6749 §4.1.3, RFC 7636 §4.5."""
        return _checked_token(self._as_client("/token", grant_type="authorization_code", code=code,
                                              redirect_uri=redirect_uri, code_verifier=code_verifier))

    def refresh(self, refresh_token: str, scope: str | None = None) -> dict:
        """POST /token. Return Token with a new `refresh_token`; the old one must not be sent again. RFC 6749 §6."""
        return _checked_token(self._as_client("/token", grant_type="refresh_token", refresh_token=refresh_token,
                                              scope=scope))

    def introspect(self, token: str) -> dict:
        """POST /introspect. Return the claims with `active` true, or {"active": false}. RFC 7662 §2."""
        answer = self._as_client("/introspect", token=token)
        if not isinstance(answer.get("active"), bool):
            raise _bad_answer("the answer is not the JSON it should be")
        return answer

    def revoke(self, token: str) -> dict:
        """POST /revoke. Return Msg, also for an unknown token. A refresh token's family ends too. RFC 7009 §2."""
        return self._as_client("/revoke", token=token)

    # -- whom the token speaks for --

    def userinfo(self) -> dict:
        """GET /userinfo. Return the claims the scopes of the token open. OpenID Connect Core §5.3."""
        return self.request("GET", "/userinfo")

    def me(self) -> dict:
        """GET /me. Return {sub, email, roles, scopes}."""
        return self.request("GET", "/me")

    @listing(*PAGED)
    def list_my_sessions(self, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /me/sessions. Return [Session], newest first."""
        return self.pages("/me/sessions", **search)

    @listing(*PAGED)
    def list_my_refresh_tokens(self, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /me/refresh-tokens. Return [RefreshToken], newest first; never the tokens themselves."""
        return self.pages("/me/refresh-tokens", **search)

    def logout(self) -> dict:
        """POST /logout. Return Msg. Ends every login of the user at the client of the token."""
        return self.request("POST", "/logout")

    def logout_all(self) -> dict:
        """POST /logout-all. Return Msg. Ends every login of the user, everywhere."""
        return self.request("POST", "/logout-all")

    # -- users, for a token with one of the admin: scopes --

    def create_user(self, username: str, email: str, password: str) -> dict:
        """POST /user. Return the new User. Scope admin:provision_users."""
        return self.request("POST", "/user", json={"username": username, "email": email, "password": password})

    @listing(*SEARCH)
    def list_users(self, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /users. Return [User]. Scope admin:list_users."""
        return self.pages("/users", **search)

    def get_user(self, id: str) -> dict:
        """GET /user/{id}. Return User. Scope admin:read_user."""
        return self.request("GET", _at("user", id))

    def reset_password(self, id: str, new_password: str) -> dict:
        """POST /user/{id}/reset. Return Msg. Scope admin:reset_passwords."""
        return self.request("POST", _at("user", id, "reset"), json={"new_password": new_password})

    def deactivate_user(self, id: str) -> dict:
        """POST /user/{id}/deactivate. Return Msg. Scope admin:deactivate_users."""
        return self.request("POST", _at("user", id, "deactivate"))


# == MadClient =================================================================
# The requests of ADMIN.

class MadClient(Binding):
    """The ADMIN API of a microauthd. Its AUTH API is AuthClient, which `auth` makes.

        admin = MadClient("http://localhost:9041")
        admin.token = admin.login("alice", password)["access_token"]
        admin.create_user("bob", "bob@example.org", "correct horse")
        token = admin.auth("sensor", secret).client_credentials()["access_token"]

    Every method is one request on a connection of its own (a list of more than 1,000 rows: one for each 1,000); an
    instance may be shared by threads. Objects are dicts with the members of the wire:

      User          id username email created_at lockout_until is_active email_verified totp_enabled
      Role          id name description is_protected is_active
      Permission    id name
      Scope         id name desc is_active is_protected created_at
      Client        id client_id display_name is_active created_at audience client_type grant_types …
      ClientUri     id client_id uri (redirect URIs: redirect_uri too)
      ExternalIdp   id client_id provider_key display_name issuer client_identifier scopes created_at modified_at
      Session       id user_id username client_id issued_at expires_at is_revoked token_use mad_use login_method …
      RefreshToken  id user_id username session_id client_id issued_at expires_at is_revoked is_openid_token
      AuditLog      id actor_id action secondary target timestamp ip_address user_agent
      Msg           success message

    Where an id is asked, the server takes a name too, except for what has none; `find_id` turns one into the other.
    Timestamps are ISO 8601 in UTC. Every `list_` takes `limit` (rows in all), long ones `offset`, those of the five
    nouns `q` (search text) and `sort` (a member, `-` before it for descending); it returns a list, and follows the
    pages of the server by itself. `each` yields the same rows without keeping them.
    Raises MadError when the server refuses, its subclass Unreachable when there is no usable answer, NoRoute when the
    server lacks the route, BadValue for a blank id or an unusable URL. Redirects are not followed, proxies not asked.
    """

    def __init__(self, admin_url: str = ADMIN_URL, token: str | None = None, *, auth_url: str = AUTH_URL,
                 ca_file: str | None = None, timeout: float | None = None):
        super().__init__(admin_url, token, ca_file, timeout)
        self.auth_url = auth_url

    @property
    def admin_url(self) -> str:
        return self.url

    def auth(self, client_id: str | None = None, client_secret: str | None = None,
             token: str | None = None) -> AuthClient:
        """Return an AuthClient for the AUTH server of this microauthd. Asks nobody."""
        return AuthClient(self.auth_url, client_id, client_secret, token=token, ca_file=self.ca_file,
                          timeout=self.timeout)

    # -- login --

    def login(self, username: str, password: str, totp: str | None = None) -> dict:
        """POST /token. Return Token: `access_token`, `token_type`, `expires_in`, `jti`. A failed login is 403."""
        form = _given(username=username, password=password, client_id="mad", totp=totp)
        token = self.request("POST", "/token", form=form, anonymous=True)
        return _checked_token(token)

    def logout(self) -> dict:
        """POST /logout. Return Msg. The token is revoked."""
        return self.request("POST", "/logout")

    def find_id(self, kind: str, name: str) -> str:
        """GET /{kind}/id-by-name/{name}. Return the id; an unknown name is 404.

        `kind` is one of users, roles, permissions, scopes and clients.
        """
        if "/" in name or "\\" in name:
            return self._search_id(kind, name.strip())
        answer = self.request("GET", _at(kind, "id-by-name", name), want=(dict, str))
        found = answer if isinstance(answer, str) else answer.get("result")
        if not isinstance(found, str) or not found:
            raise _bad_answer("the answer is not the JSON it should be")
        return found

    def _search_id(self, kind: str, name: str) -> str:
        """Search the list for a name with a slash, which the server refuses in a path even when it is encoded."""
        member = {"users": "username", "clients": "client_id"}.get(kind, "name")
        same = str.casefold if kind == "users" else str
        for rows in self.pages("/" + kind, {"is_active": "all"} if kind == "users" else None, q=name):
            for row in rows:
                if same(str(row.get(member))) == same(name) and isinstance(row.get("id"), str):
                    return row["id"]
        raise MadError(404, "not_found", "there is no such thing here")

    # -- users --

    def create_user(self, username: str, email: str, password: str) -> dict:
        """POST /users. Return the new User."""
        return self.request("POST", "/users", json={"username": username, "email": email, "password": password})

    @listing(*SEARCH)
    def list_users(self, is_active: str | None = None, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /users. Return [User]. `is_active`: "true" (when None), "false" or "all"."""
        return self.pages("/users", _given(is_active=is_active), **search)

    def get_user(self, id: str) -> dict:
        """GET /users/{id}. Return User."""
        return self.request("GET", _at("users", id))

    def update_user(self, id: str, username: str | None = None, email: str | None = None,
                    is_active: bool | None = None) -> dict:
        """PUT /users/{id}. Return User. What is None stays as it is."""
        return self.request("PUT", _at("users", id), json=_given(username=username, email=email, is_active=is_active))

    def verify_email(self, id: str) -> dict:
        """POST /users/{id}/verify-email. Return Msg."""
        return self.request("POST", _at("users", id, "verify-email"))

    def reset_password(self, id: str, new_password: str) -> dict:
        """POST /users/{id}/reset. Return Msg."""
        return self.request("POST", _at("users", id, "reset"), json={"new_password": new_password})

    def deactivate_user(self, id: str) -> dict:
        """POST /users/deactivate/{id}. Return Msg. Ends the sessions of the user."""
        return self.request("POST", _at("users", "deactivate", id))

    def activate_user(self, id: str) -> dict:
        """POST /users/{id}/activate. Return Msg."""
        return self.request("POST", _at("users", id, "activate"))

    def delete_user(self, id: str) -> dict:
        """DELETE /users/{id}. Return Msg. There is no way back."""
        return self.request("DELETE", _at("users", id))

    def set_lockout(self, id: str, lockout_until: str) -> dict:
        """POST /users/{id}/set-lockout. Return Msg. `lockout_until`: ISO 8601 in UTC; the year 9999 means for good."""
        return self.request("POST", _at("users", id, "set-lockout"), json={"lockout_until": lockout_until})

    def clear_lockout(self, id: str) -> dict:
        """POST /users/{id}/clear-lockout. Return Msg."""
        return self.request("POST", _at("users", id, "clear-lockout"))

    def verify_password(self, user: str, password: str, totp: str | None = None) -> dict:
        """POST /users/verify-password. Return {valid, user_id, email, totp_required}; a wrong one is 403.

        `user` is an id or a name. Nobody is logged in by it; a wrong password counts towards the lockout.
        """
        who = {"user_id" if is_uuid(user) else "username": user}
        return self.request("POST", "/users/verify-password", json=who | _given(password=password, totp=totp))

    def revoke_user(self, id: str) -> dict:
        """POST /users/{id}/revoke. Return Msg. Ends every session, token and login of the user."""
        return self.request("POST", _at("users", id, "revoke"))

    def generate_totp(self, id: str, client_id: str | None = None, qr_output_path: str = ".") -> dict:
        """POST /users/{id}/totp/generate. Return TotpQr: `success`, `filename`. The file is written by the server."""
        return self.request("POST", _at("users", id, "totp", "generate"),
                            json=_given(user_id=id, client_id=client_id, qr_output_path=qr_output_path))

    def enroll_totp(self, id: str, client_id: str | None = None) -> dict:
        """POST /users/{id}/totp/enroll. Return {success, otpauth_uri, secret, svg}: never told again.

        The second factor counts from the first code on that `verify_totp` is given.
        """
        return self.request("POST", _at("users", id, "totp", "enroll"), json=_given(client_id=client_id))

    def verify_totp(self, user_id: str, code: str, client_id: str | None = None) -> dict:
        """POST /users/totp/verify. Return Msg. A wrong code is 403."""
        return self.request("POST", "/users/totp/verify", json=_given(user_id=user_id, client_id=client_id, code=code))

    def disable_totp(self, user_id: str, client_id: str | None = None) -> dict:
        """POST /users/{user_id}/disable-totp. Return Msg."""
        client = [] if client_id is None else [client_id]
        return self.request("POST", _at("users", user_id, *client, "disable-totp"))

    # -- roles --

    def create_role(self, name: str, description: str = "") -> dict:
        """POST /roles. Return the new Role."""
        return self.request("POST", "/roles", json={"name": name, "description": description})

    def update_role(self, id: str, name: str | None = None, description: str | None = None) -> dict:
        """PUT /roles/{id}. Return Role. What is None stays as it is."""
        return self.request("PUT", _at("roles", id), json=_given(name=name, description=description))

    @listing(*SEARCH)
    def list_roles(self, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /roles. Return [Role]."""
        return self.pages("/roles", **search)

    def get_role(self, id: str) -> dict:
        """GET /roles/{id}. Return Role."""
        return self.request("GET", _at("roles", id))

    def delete_role(self, id: str) -> dict:
        """DELETE /roles/{id}. Return Msg."""
        return self.request("DELETE", _at("roles", id))

    def assign_role(self, user_id: str, role_id: str) -> dict:
        """POST /roles/assign. Return Msg."""
        return self.request("POST", "/roles/assign", json={"user_id": user_id, "role_id": role_id})

    def unassign_role(self, user_id: str, role_id: str) -> dict:
        """POST /roles/unassign. Return Msg."""
        return self.request("POST", "/roles/unassign", json={"user_id": user_id, "role_id": role_id})

    def set_roles_of_user(self, user_id: str, role_ids: list[str]) -> dict:
        """PUT /users/{user_id}/roles. Return Msg. These and no others are the roles of the user from now on."""
        return self.request("PUT", _at("users", user_id, "roles"), json=[{"id": role_id} for role_id in role_ids])

    @listing(*PAGED)
    def list_users_of_role(self, id: str, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /roles/{id}/users. Return [User]."""
        return self.pages(_at("roles", id, "users"), **search)

    @listing(*LIMITED)
    def list_roles_of_user(self, user_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /users/{user_id}/roles. Return [{id, name}]."""
        return self.pages(_at("users", user_id, "roles"), {"all": "false"}, **search)

    # -- permissions --

    def create_permission(self, name: str) -> dict:
        """POST /permissions. Return the new Permission."""
        return self.request("POST", "/permissions", json={"name": name})

    def update_permission(self, id: str, name: str) -> dict:
        """PUT /permissions/{id}. Return Permission."""
        return self.request("PUT", _at("permissions", id), json={"name": name})

    @listing(*SEARCH)
    def list_permissions(self, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /permissions. Return [Permission]."""
        return self.pages("/permissions", **search)

    def get_permission(self, id: str) -> dict:
        """GET /permissions/{id}. Return Permission."""
        return self.request("GET", _at("permissions", id))

    def delete_permission(self, id: str) -> dict:
        """DELETE /permissions/{id}. Return Msg."""
        return self.request("DELETE", _at("permissions", id))

    def assign_permission(self, role_id: str, permission_id: str) -> dict:
        """POST /roles/{role_id}/permissions. Return Msg."""
        return self.request("POST", _at("roles", role_id, "permissions"), json={"permission_id": permission_id})

    def remove_permission(self, role_id: str, permission_id: str) -> dict:
        """DELETE /roles/{role_id}/permissions/{permission_id}. Return Msg."""
        return self.request("DELETE", _at("roles", role_id, "permissions", permission_id))

    @listing(*LIMITED)
    def list_roles_of_permission(self, id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /permissions/{id}/roles. Return [Role]."""
        return self.pages(_at("permissions", id, "roles"), **search)

    @listing(*LIMITED)
    def list_permissions_of_role(self, role_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /roles/{role_id}/permissions. Return [Permission]."""
        return self.pages(_at("roles", role_id, "permissions"), **search)

    @listing(*LIMITED)
    def list_permissions_of_user(self, user_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /permissions/user/{user_id}. Return [Permission]: those of all roles of the user."""
        return self.pages(_at("permissions", "user", user_id), **search)

    def check_access(self, user_id: str, permission_id: str) -> dict:
        """POST /check-access. Return {user_id, permission_id, allowed}."""
        answer = self.request("POST", "/check-access", json={"user_id": user_id, "permission_id": permission_id})
        if not isinstance(answer.get("allowed"), bool):
            raise _bad_answer("the answer is not the JSON it should be")
        return answer

    # -- scopes --

    def create_scope(self, name: str, description: str = "") -> dict:
        """POST /scopes. Return the new Scope."""
        return self.request("POST", "/scopes", json={"name": name, "desc": description})

    def update_scope(self, id: str, name: str | None = None, description: str | None = None) -> dict:
        """PUT /scopes/{id}. Return Scope. What is None stays as it is."""
        return self.request("PUT", _at("scopes", id), json=_given(name=name, desc=description))

    @listing(*SEARCH)
    def list_scopes(self, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /scopes. Return [Scope]."""
        return self.pages("/scopes", **search)

    def get_scope(self, id: str) -> dict:
        """GET /scopes/{id}. Return Scope."""
        return self.request("GET", _at("scopes", id))

    def delete_scope(self, id: str) -> dict:
        """DELETE /scopes/{id}. Return Msg."""
        return self.request("DELETE", _at("scopes", id))

    @listing(*PAGED)
    def list_users_of_scope(self, id: str, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /scopes/{id}/users. Return [User]."""
        return self.pages(_at("scopes", id, "users"), **search)

    @listing(*PAGED)
    def list_clients_of_scope(self, id: str, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /scopes/{id}/clients. Return [Client]."""
        return self.pages(_at("scopes", id, "clients"), **search)

    def assign_scopes_to_user(self, user_id: str, scope_ids: list[str]) -> dict:
        """POST /users/{user_id}/scopes. Return Msg."""
        return self.request("POST", _at("users", user_id, "scopes"), json={"scope_ids": scope_ids})

    @listing(*LIMITED)
    def list_scopes_of_user(self, user_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /users/{user_id}/scopes. Return [Scope]."""
        return self.pages(_at("users", user_id, "scopes"), **search)

    def remove_scope_from_user(self, user_id: str, scope_id: str) -> dict:
        """DELETE /users/{user_id}/scopes/{scope_id}. Return Msg."""
        return self.request("DELETE", _at("users", user_id, "scopes", scope_id))

    def assign_scopes_to_client(self, client_id: str, scope_ids: list[str]) -> dict:
        """POST /clients/{client_id}/scopes. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _at("clients", client_id, "scopes"), json={"scope_ids": scope_ids})

    @listing(*LIMITED)
    def list_scopes_of_client(self, client_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/scopes. Return [Scope]. `client_id` is the internal id."""
        return self.pages(_at("clients", client_id, "scopes"), **search)

    def remove_scope_from_client(self, client_id: str, scope_id: str) -> dict:
        """DELETE /clients/{client_id}/scopes/{scope_id}. Return Msg. `client_id` is the internal id."""
        return self.request("DELETE", _at("clients", client_id, "scopes", scope_id))

    # -- clients --

    def create_client(self, client_id: str, client_secret: str | None = None, *, public: bool = False,
                      display_name: str = "", audience: str = "microauthd", grant_types: list[str] | None = None,
                      scopes: list[str] | None = None, may_introspect: bool | None = None) -> dict:
        """POST /clients. Return the new Client, with `client_secret` when the server made one.

        It makes one for a confidential client without `client_secret`, and never tells it again. `scopes` are names.
        """
        return self.request("POST", "/clients", json=_given(
            client_id=client_id, client_secret=client_secret, display_name=display_name, audience=audience,
            client_type="public" if public else "confidential", grant_types=grant_types, scopes=scopes,
            may_introspect=may_introspect))

    def update_client(self, id: str, client_id: str | None = None, display_name: str | None = None,
                      audience: str | None = None, is_active: bool | None = None, *,
                      grant_types: list[str] | None = None, may_introspect: bool | None = None,
                      is_first_party: bool | None = None, access_token_signed_alg: str | None = None,
                      id_token_signed_response_alg: str | None = None) -> dict:
        """PUT /clients/{id}. Return Client. What is None stays as it is. An algorithm of "" is the server's choice."""
        return self.request("PUT", _at("clients", id), json=_given(
            client_id=client_id, display_name=display_name, audience=audience, is_active=is_active,
            grant_types=grant_types, may_introspect=may_introspect, is_first_party=is_first_party,
            access_token_signed_alg=access_token_signed_alg, id_token_signed_response_alg=id_token_signed_response_alg))

    @listing(*SEARCH)
    def list_clients(self, **search: Unpack[Search]) -> Iterator[list[dict]]:
        """GET /clients. Return [Client]."""
        return self.pages("/clients", **search)

    def get_client(self, id: str) -> dict:
        """GET /clients/{id}. Return Client."""
        return self.request("GET", _at("clients", id))

    def delete_client(self, id: str) -> dict:
        """DELETE /clients/{id}. Return Msg. Ends its sessions."""
        return self.request("DELETE", _at("clients", id))

    def revoke_client(self, id: str) -> dict:
        """POST /clients/{id}/revoke. Return Msg. Ends everything issued to the client."""
        return self.request("POST", _at("clients", id, "revoke"))

    def change_client_secret(self, id: str, new_secret: str | None = None, overlap_seconds: int | None = None) -> dict:
        """POST /clients/secret. Return Msg whose `message` is the new secret; the server makes one when none is given.

        The old secret works for `overlap_seconds` more.
        """
        answer = self.request("POST", "/clients/secret", json=_given(
            client_id=id, new_secret=new_secret, overlap_seconds=overlap_seconds))
        if not isinstance(answer.get("message"), str) or not answer["message"]:
            raise _bad_answer("the answer is not the JSON it should be")
        return answer

    @listing(*LIMITED)
    def list_client_secrets(self, id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{id}/secrets. Return [{id, created_at, expires_at}], never the secrets themselves."""
        return self.pages(_at("clients", id, "secrets"), **search)

    def delete_client_secret(self, id: str, secret_id: str) -> dict:
        """DELETE /clients/{id}/secrets/{secret_id}. Return Msg. It stops working at once."""
        return self.request("DELETE", _at("clients", id, "secrets", secret_id))

    def add_redirect_uri(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/redirect-uris. Return the new ClientUri."""
        return self.request("POST", _at("clients", id, "redirect-uris"), json=uri)

    @listing(*LIMITED)
    def list_redirect_uris(self, client_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/redirect-uris. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_at("clients", client_id, "redirect-uris"), **search)

    def delete_redirect_uri(self, id: str, client_id: str | None = None) -> dict:
        """DELETE /clients/redirect-uris. Return Msg. `id` is that of the record, not the URI."""
        if client_id is None:
            return self.request("DELETE", "/clients/redirect-uris", json=id)
        return self.request("DELETE", _at("clients", client_id, "redirect-uris", id))

    def add_post_logout_uri(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/post-logout-redirect-uris. Return the new ClientUri."""
        return self.request("POST", _at("clients", id, "post-logout-redirect-uris"), json=uri)

    @listing(*LIMITED)
    def list_post_logout_uris(self, client_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/post-logout-redirect-uris. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_at("clients", client_id, "post-logout-redirect-uris"), **search)

    def delete_post_logout_uri(self, client_id: str, id: str) -> dict:
        """DELETE /clients/{client_id}/post-logout-redirect-uris/{id}. Return Msg. `id` is that of the record."""
        return self.request("DELETE", _at("clients", client_id, "post-logout-redirect-uris", id))

    def add_cors_origin(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/cors-origins. Return the new ClientUri."""
        return self.request("POST", _at("clients", id, "cors-origins"), json=uri)

    @listing(*LIMITED)
    def list_cors_origins(self, client_id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/cors-origins. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_at("clients", client_id, "cors-origins"), **search)

    def delete_cors_origin(self, client_id: str, id: str) -> dict:
        """DELETE /clients/{client_id}/cors-origins/{id}. Return Msg. `id` is that of the record."""
        return self.request("DELETE", _at("clients", client_id, "cors-origins", id))

    def list_flags(self, client_id: str) -> dict:
        """GET /clients/{client_id}/options. Return {flag: {is_enabled, options}}. `client_id` is the internal id."""
        answer = self.request("GET", _at("clients", client_id, "options"))
        if not all(isinstance(value, dict) for value in answer.values()):
            raise _bad_answer("the answer is not the JSON it should be")
        return answer

    def set_flag(self, client_id: str, flag: str, enabled: bool) -> dict:
        """POST /client/options/{flag}. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _at("client", "options", flag),
                            form={"client_id": client_id, "enabled": "true" if enabled else "false"})

    def get_flag(self, client_id: str, flag: str) -> bool:
        """GET /client/options/{flag}. Return whether it is on: the Msg's `message` is "True" or "False"."""
        answer = self.request("GET", _at("client", "options", flag), query={"client_id": client_id})
        return str(answer.get("message")).lower() == "true"

    def set_flag_options(self, client_id: str, flag: str, options: str) -> dict:
        """POST /client/options/{flag}/ext. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _at("client", "options", flag, "ext"),
                            form={"client_id": client_id, "options": options})

    def get_flag_options(self, client_id: str, flag: str) -> str:
        """GET /client/options/{flag}/ext. Return the option text, "" when unset."""
        answer = self.request("GET", _at("client", "options", flag, "ext"), query={"client_id": client_id})
        return str(answer.get("message") or "")

    def add_idp(self, id: str, provider_key: str, display_name: str, issuer: str, external_client_id: str,
                scopes: str = "openid email profile") -> dict:
        """POST /clients/{id}/idp. Return the new ExternalIdp."""
        return self.request("POST", _at("clients", id, "idp"), json={
            "provider_key": provider_key, "display_name": display_name, "issuer": issuer,
            "client_identifier": external_client_id, "scopes": scopes})

    def update_idp(self, id: str, idp_id: str, provider_key: str, display_name: str, issuer: str,
                   external_client_id: str, scopes: str = "openid email profile") -> dict:
        """PUT /clients/{id}/idp/{idp_id}. Return ExternalIdp."""
        return self.request("PUT", _at("clients", id, "idp", idp_id), json={
            "provider_key": provider_key, "display_name": display_name, "issuer": issuer,
            "client_identifier": external_client_id, "scopes": scopes})

    @listing(*LIMITED)
    def list_idps(self, id: str, **search: Unpack[Limited]) -> Iterator[list[dict]]:
        """GET /clients/{id}/idp. Return [ExternalIdp]."""
        return self.pages(_at("clients", id, "idp"), **search)

    def get_idp(self, id: str, idp_id: str) -> dict:
        """GET /clients/{id}/idp/{idp_id}. Return ExternalIdp."""
        return self.request("GET", _at("clients", id, "idp", idp_id))

    def delete_idp(self, id: str, idp_id: str) -> dict:
        """DELETE /clients/{id}/idp/{idp_id}. Return Msg."""
        return self.request("DELETE", _at("clients", id, "idp", idp_id))

    # -- sessions and refresh tokens --

    @listing(*SORTED)
    def list_sessions(self, user_id: str | None = None, client_id: str | None = None,
                      **search: Unpack[Sorted]) -> Iterator[list[dict]]:
        """GET /sessions. Return [Session], newest first, of this user and this client only when they are given."""
        return self.pages("/sessions", _given(user_id=user_id, client_id=client_id), **search)

    def get_session(self, id: str) -> dict:
        """GET /sessions/{id}. Return Session. `id` is the token's `jti`."""
        return self.request("GET", _at("sessions", id))

    @listing(*PAGED)
    def list_sessions_of_user(self, user_id: str, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /sessions/user/{user_id}. Return [Session], newest first."""
        return self.pages(_at("sessions", "user", user_id), **search)

    def revoke_session(self, id: str) -> dict:
        """DELETE /sessions/{id}. Return {jti, status, message}."""
        return self.request("DELETE", _at("sessions", id))

    def revoke_token(self, token: str) -> dict:
        """POST /revoke. Return Msg. `token` is one of AUTH, or an admin token."""
        return self.request("POST", "/revoke", json={"token": token})

    def introspect(self, token: str) -> dict:
        """POST /introspect. Return the claims of an AUTH token, with `valid` and `expired`."""
        return self.request("POST", "/introspect", json={"token": token})

    def purge_sessions(self, older_than: int, expired: bool = False, revoked: bool = False) -> dict:
        """POST /sessions/purge. Return Msg. `older_than` in seconds."""
        return self.request("POST", "/sessions/purge", json={
            "older_than_seconds": older_than, "purge_expired": expired, "purge_revoked": revoked})

    @listing(*PAGED)
    def list_refresh_tokens(self, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /refresh-tokens. Return [RefreshToken], newest first."""
        return self.pages("/refresh-tokens", **search)

    @listing(*PAGED)
    def list_refresh_tokens_of_user(self, user_id: str, **search: Unpack[Paged]) -> Iterator[list[dict]]:
        """GET /refresh-tokens/user/{user_id}. Return [RefreshToken], newest first."""
        return self.pages(_at("refresh-tokens", "user", user_id), **search)

    def get_refresh_token(self, id: str) -> dict:
        """GET /refresh-tokens/{id}. Return RefreshToken."""
        return self.request("GET", _at("refresh-tokens", id))

    def revoke_refresh_token(self, id: str) -> dict:
        """DELETE /refresh-tokens/{id}. Return Msg. The login it belongs to ends."""
        return self.request("DELETE", _at("refresh-tokens", id))

    def purge_refresh_tokens(self, older_than: int, expired: bool = False, revoked: bool = False) -> dict:
        """POST /refresh-tokens/purge. Return Msg. `older_than` in seconds."""
        return self.request("POST", "/refresh-tokens/purge", json={
            "older_than_seconds": older_than, "purge_expired": expired, "purge_revoked": revoked})

    # -- audit --

    @listing(*PAGED)
    def list_audit_logs(self, user_id: str | None = None, action: str | None = None, limit: int | None = 100, *,
                        target: str | None = None, since: str | None = None, until: str | None = None,
                        after: str | None = None, offset: int | None = None) -> Iterator[list[dict]]:
        """GET /audit-logs. Return [AuditLog], newest first; with `after` only those with a greater id, oldest first.

        `user_id` is the actor, `action` and `target` are exact, `since` and `until` ISO 8601 or Unix seconds.
        """
        if limit == 0:
            raise BadValue("a limit is at least 1; a negative one means all")
        left = limit if limit is not None and limit > 0 else None
        seen: set = set()
        while True:
            size = PAGE if left is None else min(left, PAGE)
            rows = self.request("GET", "/audit-logs", want=list, query=_given(
                userId=user_id, action=action, target=target, since=since, until=until, after=after, limit=size,
                offset=offset))
            # What is written meanwhile moves the entries on to the next page: some come twice.
            fresh = [row for row in rows[:size] if row.get("id") not in seen]
            yield fresh
            left = None if left is None else left - len(fresh)
            if len(rows) < size or not fresh or left == 0:
                return
            seen = {row.get("id") for row in rows}
            if after is None:
                offset = (offset or 0) + size
            else:
                after = str(rows[-1].get("id"))

    def get_audit_log(self, id: str) -> dict:
        """GET /audit-logs/{id}. Return AuditLog."""
        return self.request("GET", _at("audit-logs", id))

    def verify_audit_logs(self) -> dict:
        """GET /audit-logs/verify. Return {valid, rows, first_seq, last_seq, head, reason}.

        `valid` is whether the hash chain is unbroken.
        """
        answer = self.request("GET", "/audit-logs/verify")
        if not isinstance(answer.get("valid"), bool):
            raise _bad_answer("the answer is not the JSON it should be")
        return answer

    @listing(*LIMITED)
    def export_audit_logs(self, after: str | None = None, limit: int | None = None) -> Iterator[list[dict]]:
        """GET /audit-logs/export. Return [AuditLog], oldest first, of ids greater than `after`: all of them."""
        left = limit
        while left is None or left > 0:
            answer = self.send("GET", "/audit-logs/export", want=bytes, query=_given(
                after=after, limit=EXPORT if left is None else min(left, EXPORT)))
            try:
                rows = [read_json(text) for text in answer.value.split(b"\n") if text.strip()]
            except ValueError:
                rows = [None]
            if not all(isinstance(row, dict) for row in rows):
                raise _bad_answer("the answer is not the NDJSON it should be")
            yield rows if left is None else rows[:left]
            left = None if left is None else left - len(rows)
            before, after = after, answer.headers.get("x-next-after")
            if not after:
                return
            if after == before or not rows:
                raise _bad_answer("the pages of the export go round in a circle", hint="")

    def purge_audit_logs(self, days: int) -> dict:
        """POST /audit-logs/purge. Return Msg. `days` > 0."""
        return self.request("POST", "/audit-logs/purge", json={"older_than_days": days})

    # -- backups --

    def make_backup(self, without_keys: bool = False) -> dict:
        """POST /backup. Return a Backup: `name`, `bytes`, `sha256`, `users`, `clients`, `newest_at`.

        The file stays on the server until `delete_backup`.
        """
        return self.request("POST", "/backup", json={"without_keys": without_keys})

    def read_backup(self, name: str) -> Iterator[bytes]:
        """GET /backup/{name}. Return its octets, a piece at a time."""
        offset = 0
        while True:
            piece = self.send("GET", _at("backup", name), query={"offset": offset}, want=bytes)
            yield piece.value
            next_offset = piece.headers.get("x-next-offset")
            if next_offset is None:
                return
            offset += len(piece.value)
            if not (piece.value and next_offset.isascii() and next_offset.isdigit() and int(next_offset) == offset):
                raise _bad_answer("the pieces of the backup do not follow each other")

    def delete_backup(self, name: str) -> dict:
        """DELETE /backup/{name}. Return Msg."""
        return self.request("DELETE", _at("backup", name))


# == Profile ===================================================================
# ~/.mad_token (the raw JWT), ~/.mad_url (the server that issued it), and the cache of machine tokens. Their owner's
# alone: whoever can plant a file or a link here could steal a token or lend a false one.

def _unsafe(path: str, why: str) -> Refusal:
    return Refusal(LOGIN, "unsafe_file", f"{path} {why}", hint="look at it, then remove it")


def _check_private(path: str, info: os.stat_result) -> None:
    import stat
    if stat.S_ISLNK(info.st_mode):
        raise _unsafe(path, "is a symbolic link")
    if not stat.S_ISREG(info.st_mode):
        raise _unsafe(path, "is not a regular file")
    if info.st_uid != os.geteuid():
        raise _unsafe(path, "belongs to somebody else")


def read_private(path: str) -> str | None:
    """Return the trimmed text of a file that only we can have written, None when absent. Raises Refusal."""
    import stat
    try:
        # Not blocking, or a pipe put here would hold us for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as problem:
        if os.path.islink(path):
            raise _unsafe(path, "is a symbolic link") from None
        raise Refusal(LOGIN, "unsafe_file", f"cannot read {path}: {problem.strerror}") from None
    try:
        info = os.fstat(handle)
        _check_private(path, info)
        if info.st_mode & 0o022:
            raise _unsafe(path, "can be written by others")
        if stat.S_IMODE(info.st_mode) & 0o044:
            os.fchmod(handle, 0o600)  # The original left its files readable to all.
        octets = os.read(handle, MAX_SECRET + 1)
    except OSError as problem:
        raise Refusal(LOGIN, "unsafe_file", f"cannot read {path}: {problem.strerror}") from None
    finally:
        os.close(handle)
    try:
        return octets[:MAX_SECRET].decode("ascii").strip() or None
    except UnicodeDecodeError:
        raise _unsafe(path, "is not what mad wrote") from None


def write_private(path: str, text: str, modified_at: int | None = None) -> None:
    """Put `text` into a file of mode 0600, whole or not at all, whatever the umask. Raises Refusal."""
    folder = os.path.dirname(path)
    name = os.path.basename(path).lstrip(".")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(6).hex()}")
    try:
        try:
            _check_private(path, os.lstat(path))
        except FileNotFoundError:
            pass
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o600)
                file.write(text.encode("ascii"))
                file.flush()
                os.fsync(handle)
                if modified_at is not None:
                    os.utime(handle, (modified_at, modified_at))
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        # Without this a power cut may undo the rename.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as problem:
        raise Refusal(LOGIN, "unsafe_file", f"cannot write {path}: {problem.strerror}") from None


class Profile:
    """The saved login of the home directory: `token` and the `url` of the server that issued it."""

    def __init__(self, home: str | None = None):
        home = home or os.path.expanduser("~")
        self.token_path, self.url_path = os.path.join(home, ".mad_token"), os.path.join(home, ".mad_url")

    def url(self) -> str | None:
        return read_private(self.url_path)

    def token(self) -> str | None:
        return read_private(self.token_path)

    def save(self, token: str, url: str) -> None:
        # In this order, so that no power cut can leave a token beside the address of another server.
        self.forget()
        write_private(self.url_path, url)
        write_private(self.token_path, token)

    def forget(self) -> bool:
        """Remove the token. Return whether there was one."""
        try:
            _check_private(self.token_path, os.lstat(self.token_path))
            os.unlink(self.token_path)
        except FileNotFoundError:
            return False
        except OSError as problem:
            raise Refusal(LOGIN, "unsafe_file", f"cannot remove {self.token_path}: {problem.strerror}") from None
        return True


class TokenCache:
    """Tokens of `mad token get`, a file each. A cache that cannot be trusted or written is no cache, and no error."""

    def __init__(self, url: str, client_id: str, scope: str, secret: str):
        from hashlib import sha256
        from json import dumps
        root = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(root):  # The XDG specification: a relative one is to be ignored.
            root = os.path.join(os.path.expanduser("~"), ".cache")
        self.folder = os.path.join(root, "mad")
        # The secret is part of the name, so that a revoked or mistyped one never gets the token of a good one.
        key = dumps([url, client_id, scope, sha256(secret.encode()).hexdigest()])
        self.path = os.path.join(self.folder, sha256(key.encode("ascii")).hexdigest())

    def _is_ours(self) -> bool:
        import stat
        try:
            info = os.lstat(self.folder)
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077

    def find(self, now: int) -> dict | None:
        """Return the cached token answer with `expires_in` as of `now`, None when there is none that lasts."""
        try:
            text = read_private(self.path) if self._is_ours() else None
            if not text:
                return None
            entry = read_json(text.encode("ascii"))
            answer, stored_at, expires_at = entry["answer"], entry["stored_at"], entry["expires_at"]
            # A clock set back would make an old token look young.
            if not stored_at - CACHE_MARGIN <= now < expires_at - CACHE_MARGIN:
                return None
            return {**_checked_token(answer), "expires_in": int(expires_at - now)}
        except (Refusal, MadError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def store(self, answer: dict, now: int) -> None:
        """Keep an answer that says how long it lasts, and drop the files of tokens that have expired."""
        from json import dumps
        ttl = answer.get("expires_in")
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not CACHE_MARGIN < ttl < 1e9:
            return
        try:
            os.makedirs(os.path.dirname(self.folder), mode=0o700, exist_ok=True)
            try:
                os.mkdir(self.folder, 0o700)
            except FileExistsError:
                pass
            if not self._is_ours():
                return
            expires_at = now + int(ttl)
            # The time stamp is the expiry: sweeping needs no reading.
            write_private(self.path, dumps({"stored_at": now, "expires_at": expires_at, "answer": answer}), expires_at)
            for name in os.listdir(self.folder):
                path = os.path.join(self.folder, name)
                if os.lstat(path).st_mtime < now:
                    os.unlink(path)
        except (OSError, Refusal):
            return


# == Arguments =================================================================
# Long options only, as `--name value`, `--name=value` or `--name:value`; booleans bare or with true/false.
# `@file` where an option could stand is replaced by the words in that file; where a value stands it is the value, so
# that a password may begin with @ (the original took it for a file there too).

class Option:
    """One option of a command.

    `kind` is text, number, flag, list, moment (a date-time), lockout (a date-time, or `permanent`), secret or token
    (`-` reads standard input). `dest` is the parameter that receives the value, `choices` are the allowed values.
    `of` is the collection whose ids it takes: a name is looked up there, and with `loose` an unknown name is passed on
    unchanged. `within` is for an id that is unique only inside another object: the option that names that object, the
    method that lists its parts, the members that count as names. A secret has a second spelling, the flag `stdin`; a
    `required` one is asked for on a terminal: twice, unless it is `known` already.
    """
    __slots__ = ("choices", "dest", "help", "kind", "known", "least", "loose", "metavar", "name", "of", "required",
                 "stdin", "within")

    def __init__(self, name: str | None, help: str, kind: str = "text", *, required: bool = False,
                 dest: str | None = None, of: str | None = None, loose: bool = False,
                 within: tuple[str, Callable, tuple[str, ...]] | None = None, stdin: str | None = None,
                 known: bool = False, metavar: str | None = None, least: int | None = None,
                 choices: tuple[str, ...] = ()):
        # Any: that an option with one of these is used only where it has it, the type cannot say.
        self.name: Any = name
        self.of: Any = of
        self.within: Any = within
        self.stdin: Any = stdin
        self.help, self.kind, self.required, self.loose = help, kind, required, loose
        self.dest = dest or (name or stdin or "").replace("-", "_")
        self.known, self.least, self.choices = known, least, choices
        self.metavar = metavar or "|".join(choices) or {
            "number": "N", "secret": "SECRET", "moment": "MOMENT", "lockout": "MOMENT|permanent"}.get(kind) or (
            "ID|NAME" if of else (name or "").rpartition("-")[2].upper())


LIST = (
    Option("limit", "at most so many in all; a negative number means all, which is what it does without", "number"),
    Option("offset", "leave out so many first", "number", least=0),
    Option("q", "only those in which this text occurs", metavar="TEXT"),
    Option("sort", "by this member; - before it turns the order round", metavar="MEMBER"),
)
COMMON = (
    Option("json", "print one JSON document, also on failure", "flag"),
    Option("quiet", "print ids only, or the one thing that was asked for", "flag"),
)
SERVER = (
    Option("admin-url", "address of the ADMIN server"),
    Option("admin-token", "admin token to use instead of the saved login", "secret"),
)
YES = Option("yes", "do not ask before doing it; where there is no terminal nothing is asked", "flag")


class Command:
    """One row of COMMANDS.

    `name` is the noun and the verb. `call` is called with the options as parameters, after a MadClient; after the
    Shell when `local`; after both when a `verb`. `shape` converts its result before it is printed. `show` returns the
    lines of a result, `quiet` those of --quiet (by default the ids); --json prints the result itself. If `call` has
    `pages`, the command is a list, and is printed page by page; a command that `flows` yields pages too, and prints
    one JSON document a line with --json. An update with `at_least_one` needs an option that is not required.
    `word` names the option that a positional argument is taken for. A command with `danger` is confirmed on a
    terminal: by typing the value of the option it names, or with y when it is "".
    """
    __slots__ = ("at_least_one", "call", "danger", "example", "flows", "help", "local", "name", "options", "quiet",
                 "shape", "show", "verb", "word")

    def __init__(self, name: str, help: str, call: Any, options: tuple[Option, ...], show: Any, example: str = "", *,
                 local: bool = False, verb: bool = False, at_least_one: bool = False,
                 shape: Callable[[Any], Any] | None = None, quiet: Callable[[Any], list[str]] | None = None,
                 flows: bool = False, danger: str | None = None, word: str = ""):
        self.name, self.help, self.call, self.show, self.example = name, help, call, show, example
        self.local, self.verb, self.at_least_one, self.shape, self.quiet = local, verb, at_least_one, shape, quiet
        self.flows, self.danger, self.word = flows, danger, word
        self.options = tuple(options)
        if self.is_list:
            given = [option.name for option in options]
            self.options += tuple(option for option in LIST if option.name in call.takes and option.name not in given)

    @property
    def is_list(self) -> bool:
        return hasattr(self.call, "pages") and not self.flows

    def all_options(self) -> tuple[Option, ...]:
        """Return its options and the common ones."""
        return (self.options + (() if self.danger is None else (YES,)) + (() if self.local else SERVER) + COMMON)


HELP_WORDS = ("-h", "--help", "-?", "/?", "/h")


class Parsed:
    """A parsed command line: `values` by option name, `errors` as sentences, a `hint` on them, `wants_help`."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.errors: list[str] = []
        self.hint, self.wants_help = "", False


def near(word: str, words) -> str:
    """Return the one of `words` that `word` may have been meant to be, or ""."""
    from difflib import get_close_matches
    return (get_close_matches(word, list(words), 1, 0.6) or [""])[0]


def moment(text: str) -> str | None:
    """Return a date-time as ISO 8601 in UTC: one of ISO 8601, in UTC unless it says otherwise, or Unix seconds."""
    from datetime import UTC, datetime
    try:
        if text.isascii() and text.isdigit() and len(text) > 8:
            found = datetime.fromtimestamp(int(text), UTC)
        else:
            found = datetime.fromisoformat(text)
            found = found.astimezone(UTC) if found.tzinfo else found
    except (ValueError, OverflowError, OSError):
        return None
    return found.strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)


def words_in(path: str) -> list[str]:
    """Return the words of a response file: blanks part them, double quotes group them, a line of # is a comment.

    Raises ValueError with a sentence.
    """
    from shlex import shlex
    try:
        with open(path, "rb") as file:
            octets = file.read(MAX_SECRET + 1)
        text = octets.decode("utf-8-sig")
    except OSError as problem:
        raise ValueError(f"cannot read {path}: {problem.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    if len(octets) > MAX_SECRET:
        raise ValueError(f"{path} is too long")
    found = []
    for row in text.splitlines():
        if not row.lstrip().startswith("#"):
            lexer = shlex(row, posix=True)
            lexer.whitespace_split, lexer.commenters, lexer.quotes, lexer.escape = True, "", '"', ""
            try:
                found += list(lexer)
            except ValueError:
                raise ValueError(f"{path} has a quote without its end") from None
    return found


def convert(kind: str, text: str) -> tuple[str | int | bool | None, str]:
    """Return the value that `text` stands for, and the complaint if it stands for none ("" otherwise)."""
    if kind == "flag":
        return text == "true", "" if text in ("true", "false") else "is true or false"
    if kind == "number":
        digits = text.removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) < 16:
            return int(text), ""
        return text, "is a whole number"
    if kind == "lockout" and text.lower() == "permanent":
        return "9999-12-31T23:59:59Z", ""
    if kind in ("moment", "lockout"):
        value = moment(text)
        return value, "" if value else "is an ISO 8601 date-time, such as 2030-01-31T12:00:00Z" + (
            ", or the word permanent" if kind == "lockout" else ", or Unix seconds")
    return text, ""


class ArgumentReader:
    """Reads the arguments of a command from left to right into `parsed`, without checking them as a whole."""

    def __init__(self, command: Command, args: list[str]):
        self.command, self.parsed = command, Parsed()
        self.args, self.position, self.files = list(args), 0, 0
        self.kinds: dict[str, str] = {}
        for option in command.all_options():
            if option.name:
                self.kinds[option.name] = option.kind
            if option.stdin:
                self.kinds[option.stdin] = "flag"

    def take(self) -> str:
        self.position += 1
        return self.args[self.position - 1]

    def peek(self) -> str | None:
        """Return the next argument without taking it, None at the end."""
        return self.args[self.position] if self.position < len(self.args) else None

    def next_is_value(self) -> bool:
        """Whether the next argument exists and does not look like an option."""
        return self.position < len(self.args) and not self.args[self.position].startswith("-")

    def read(self) -> Parsed:
        while self.position < len(self.args):
            arg = self.take()
            if arg in HELP_WORDS:
                self.parsed.wants_help = True
            elif arg == "--":
                self.parsed.errors += [f"unexpected word '{extra}'" for extra in self.args[self.position:]]
                break
            elif arg.startswith("@") and len(arg) > 1:
                self.insert_file(arg[1:])
            elif self.command.word and not arg.startswith("-") and self.command.word not in self.parsed.values:
                self.parsed.values[self.command.word] = arg
            elif arg.startswith("--"):
                self.read_option(arg)
            else:
                complaint = "unknown option" if arg.startswith("-") else "unexpected word"
                self.parsed.errors.append(f"{complaint} '{arg}'")
        return self.parsed

    def insert_file(self, path: str) -> None:
        """Put the words of a response file where it was named. A limit on files ends those that name each other."""
        self.files += 1
        if self.files == 11:
            self.parsed.errors.append("too many files of words")
        if self.files > 10:
            return
        try:
            self.args[self.position:self.position] = words_in(path)
        except ValueError as problem:
            self.parsed.errors.append(str(problem))

    def read_option(self, arg: str) -> None:
        """Read an option with the arguments that are its value."""
        cut = min((i for i in (arg.find("="), arg.find(":")) if i > 0), default=len(arg))
        name, text = arg[2:cut], arg[cut + 1:] if cut < len(arg) else None
        kind = self.kinds.get(name)
        if kind is None:
            self.reject_unknown(name, text is None)
            return
        if kind == "flag":
            if text is None:
                text = self.take() if (self.peek() or "").lower() in ("true", "false") else "true"
            texts = [text.lower()]
        elif text is None and self.peek() is None:
            self.parsed.errors.append(f"--{name} needs a value")
            return
        else:
            # Whatever stands here is the value: passwords may begin with a hyphen.
            texts = [self.take() if text is None else text]
            while kind == "list" and self.next_is_value():
                texts.append(self.take())
        self.store(name, kind, texts)

    def reject_unknown(self, name: str, without_value: bool) -> None:
        self.parsed.errors.append(f"unknown option '--{name}'")
        if guess := near(name, self.kinds):
            self.parsed.hint = f"did you mean --{guess}?"
        # The argument after it is most likely its value, and no second error.
        if without_value and self.next_is_value():
            self.take()

    def store(self, name: str, kind: str, texts: list[str]) -> None:
        """Convert and keep the value of an option: a list grows, anything else is given once."""
        value, complaint = convert(kind, texts[0])
        if complaint:
            self.parsed.errors.append(f"--{name} {complaint}")
        if any("\ud800" <= ch <= "\udfff" for text in texts for ch in text):
            self.parsed.errors.append(f"--{name} is not valid UTF-8")
        if kind == "list":
            self.parsed.values.setdefault(name, []).extend(texts)
        elif name in self.parsed.values:
            self.parsed.errors.append(f"--{name} is given twice")
        else:
            self.parsed.values[name] = value


def check_option(option: Option, values: dict) -> Iterator[str]:
    """Yield what is wrong with the value of one option, or with its absence."""
    given = values.get(option.name)
    if option.kind == "secret" and option.stdin and given is not None:
        if values.get(option.stdin):
            yield f"--{option.name} and --{option.stdin} exclude each other"
        if given == "":
            yield f"--{option.name} is blank"
    if option.required and option.kind != "secret" and given is None:
        yield f"--{option.name} is missing"
    if given is None:
        return
    if option.choices and given.lower() not in option.choices:
        yield f"--{option.name} is one of " + ", ".join(option.choices)
    if (option.of or option.within) and not all(
            item.strip() for item in (given if isinstance(given, list) else [given])):
        yield f"--{option.name} is blank"
    if isinstance(given, int) and option.least is not None and given < option.least:
        yield f"--{option.name} is at least {option.least}"


def check_change(command: Command, values: dict) -> Iterator[str]:
    """Yield the error of an update that changes nothing."""
    optional = [option for option in command.options if not option.required]
    if command.at_least_one and not any(option.name in values or option.stdin in values for option in optional):
        yield "nothing to change: give at least one of " + ", ".join("--" + option.name for option in optional)


def parse(command: Command, args: list[str]) -> Parsed:
    """Read the arguments after the command. Collects every error instead of stopping at the first."""
    parsed = ArgumentReader(command, args).read()
    for option in command.options:
        parsed.errors += check_option(option, parsed.values)
    parsed.errors += check_change(command, parsed.values)
    return parsed


# == Output ====================================================================
# Data to stdout, talk to stderr. Text from the server is escaped: it must not move a cursor or forge a line.

def plain(value) -> str:
    """Return `value` as one line of printable text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        from json import dumps
        text = dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    if text.isprintable():
        return text
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii")
                   if not "\ud800" <= ch <= "\udfff" else f"\\u{ord(ch):04x}" for ch in text)


def cell(member: str, value) -> str:
    """Return a member as a table shows it: stamps as `YYYY-MM-DD HH:MM:SSZ`."""
    text = plain(value)
    if len(text) >= 19 and text[10] == "T" and text.endswith("Z") and member.endswith(("_at", "_until", "timestamp")):
        return text[:10] + " " + text[11:19] + "Z"
    return text


def columns_of(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(ch) else 2 if east_asian_width(ch) in "WF" else 1 for ch in text)


def fit(text: str, width: int) -> str:
    """Return `text` cut to `width` columns, with a mark where it was cut."""
    if columns_of(text) <= width:
        return text
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    mark = "\u2026" if encoding.startswith("utf") else "~"
    while text and columns_of(text) > width - 1:
        text = text[:-1]
    return text + mark if width > 0 else ""


def terminal_width() -> int | None:
    """Return the columns of the terminal on stdout, None when there is none to fit into."""
    try:
        if not sys.stdout.isatty():
            return None
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if columns.isdigit() and int(columns) else os.get_terminal_size(1).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def _titled(spec: str) -> tuple[str, str]:
    """`"title=member"`, or a member whose title is its name in words."""
    title, _, member = spec.rpartition("=")
    return title or member.removeprefix("is_").replace("_", " "), member


def table(what: str, *specs: str):
    """Return a `show` for a list of objects, with a column for each of `specs`.

    `show.lines` is the same for an iterator of objects, of which it keeps only the first PAGE in memory.
    """
    titles, members = zip(*map(_titled, specs), strict=True)

    def lines(rows) -> Iterator[str]:
        from itertools import chain, islice
        # The first rows decide how wide the columns are: the rest of a long list is not there yet.
        rows = ([cell(member, row.get(member)) for member in members] for row in rows)
        first = list(islice(rows, PAGE))
        if not first:
            yield f"(no {what})"
            return
        first.insert(0, [title.upper() for title in titles])
        widths = [max(columns_of(texts[i]) for texts in first) for i in range(len(members))]
        limit = terminal_width()
        if limit:
            # Ids are there to be copied: they give way last.
            for least, chosen in ((6, [i for i, m in enumerate(members) if not m.endswith("id")]),
                                  (1, list(range(len(members))))):
                while sum(widths) + 2 * (len(widths) - 1) > limit:
                    widest = max(chosen, key=lambda i: widths[i], default=None)
                    if widest is None or widths[widest] <= least:
                        break
                    widths[widest] -= 1
        first.insert(1, ["-" * width for width in widths])
        for texts in chain(first, rows):
            if limit:
                texts = [fit(text, width) for text, width in zip(texts, widths, strict=True)]
            padded = (text + " " * (width - columns_of(text)) for text, width in zip(texts, widths, strict=True))
            text = "  ".join(padded).rstrip()
            yield fit(text, limit) if limit else text

    def show(rows: list[dict]) -> list[str]:
        return list(lines(rows))

    show.lines = lines  # type: ignore[attr-defined]
    return show


def fields(*specs: str):
    """Return a `show` for one object: a labelled line for each of `specs` that it has."""
    def show(row: dict) -> list[str]:
        pairs = [(title, cell(member, row[member])) for title, member in map(_titled, specs) if member in row]
        width = max((len(title) for title, _ in pairs), default=0)
        return [(title + ":").ljust(width + 3) + text for title, text in pairs]
    return show


class _Words(dict):
    """Members as text; one that a server left out is blank."""

    def __missing__(self, name):
        return ""


def line(template: str):
    """Return a `show` of one line, `{member}` standing for members of the result."""
    def show(row: dict) -> list[str]:
        return [template.format_map(_Words((name, plain(value)) for name, value in row.items()))]
    return show


def said(row: dict) -> list[str]:
    """Show what the server says it did."""
    return [plain(row.get("message")) or "done"]


def with_secret(show):
    """Return a `show` that puts the secret the object brings, shown this once, before everything else."""
    def show_both(row: dict) -> list[str]:
        secret = row.get("client_secret")
        return (["client secret, shown this once: " + plain(secret)] if secret else []) + show(row)
    return show_both


def ids(result) -> list[str]:
    """Return what --quiet prints of a result."""
    rows = result if isinstance(result, list) else [result]
    return [plain(row["id"]) for row in rows if isinstance(row, dict) and row.get("id")]


def document(value) -> str:
    """Return a value as one line of JSON."""
    from json import dumps
    return dumps(value, separators=(",", ":"))


def documents(rows: list[dict]) -> list[str]:
    """Return the rows as NDJSON."""
    return [document(row) for row in rows]


def tell(kind: str, text: str) -> None:
    """Say something on stderr. Server sentences become lower case without a full stop, as all talk of mad is."""
    text = plain(text)
    if len(text) > 1 and text[0].isupper() and not text[1].isupper():
        text = text[0].lower() + text[1:]
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    try:
        print(f"mad: {kind}: {text}", file=sys.stderr)
    except OSError:
        pass


# == Help ======================================================================
# What the table says, for people, for a README and for shells.

def nouns(commands: tuple[Command, ...]) -> list[str]:
    """Return the first words of the commands, in the order of the table."""
    return list(dict.fromkeys(command.name.split()[0] for command in commands))


def _rows(pairs) -> list[str]:
    pairs = list(pairs)
    width = max(len(left) for left, _ in pairs) if pairs else 0
    return [f"  {left.ljust(width)}  {right}" for left, right in pairs]


def _spellings(option: Option) -> list[tuple[str, str]]:
    """Return the ways to give an option, each with what to say about it."""
    found = []
    if option.name:
        kind = {"flag": " [true|false]", "list": f" {option.metavar} ..."}.get(option.kind, " " + option.metavar)
        must = " (required)" if option.required and (option.kind != "secret" or not option.stdin) else ""
        found.append(("--" + option.name + kind, option.help + must))
    if option.stdin:
        what = option.help if not option.name else "read it from standard input" + (
            "; asked for on a terminal when neither is given" if option.required else "")
        found.append(("--" + option.stdin, what))
    return found


def wrap(text: str, width: int, margin: str) -> list[str]:
    """Return the words of `text` in lines of at most `width` columns."""
    lines = [margin]
    for word in text.split():
        if len(lines[-1]) + len(word) > width and lines[-1] != margin:
            lines.append(margin)
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]


def help_overview(commands: tuple[Command, ...]) -> str:
    """Return the text of `mad --help`."""
    verbs = [(noun, ", ".join(command.name.partition(" ")[2] or "(inspect)" for command in commands
                              if command.name.split()[0] == noun)) for noun in nouns(commands)]
    return "\n".join((
        "usage: mad <noun> <verb> [options]", "", "administers a microauthd; start with: mad session login", "",
        "commands:", *(text for noun, words in verbs for text in ("  " + noun, *wrap(words, 76, "      "))), "",
        "where an id is asked, a name does; @file among the options stands for the words in that file",
        "what cannot be undone is asked about on a terminal, unless --yes is given", "",
        "options of every command:",
        *_rows([*(pair for option in COMMON for pair in _spellings(option)), ("--help", "say more about a command")]),
        "",
        "environment:", *_rows(ENVIRONMENT), "",
        "exit status:", *_rows((str(code), text) for code, text in EXIT_STATUSES), "",
        "for example:", "  mad user create --help"))


def help_command(command: Command) -> str:
    """Return the text of `mad <noun> <verb> --help`."""
    more = () if not command.flows else ("", "prints line by line while it goes; with --json each line is a document")
    if command.danger is not None:
        more = ("", "asks before it does so on a terminal, unless --yes is given; without a terminal it does not ask")
    return "\n".join((
        f"usage: mad {command.name} [options]", "", command.help, *more, "",
        "options:", *_rows(pair for option in command.all_options() for pair in _spellings(option)), "",
        "for example:", "  " + command.example))


def help_noun(commands: tuple[Command, ...], noun: str) -> str:
    """Return the text of `mad <noun> --help`."""
    chosen = [command for command in commands if command.name.split()[0] == noun]
    verbs = ((command.name.partition(" ")[2], command.help) for command in chosen if command.name != noun)
    return "\n".join((
        *(help_command(command) + "\n" for command in chosen if command.name == noun),
        f"usage: mad {noun} <verb> [options]", "",
        "verbs:", *_rows(verbs), "",
        "for example:", "  " + chosen[0].example))



def describe_commands(commands: tuple[Command, ...]) -> list[tuple[str, str, str]]:
    """Return a row for each command: how it is typed, what it does, the request it makes ("" when none of ADMIN).

    What every list takes, and what every command takes, is left out.
    """
    found = []
    for command in commands:
        words = ["mad " + command.name]
        for option in command.options:
            if option not in SERVER and option not in LIST:
                text = " | ".join(left for left, _ in _spellings(option))
                words.append(text if option.required and "|" not in text else f"[{text}]")
        request = (command.call.__doc__ or "").partition(". ")[0].partition(".\n")[0]
        found.append((" ".join(words), command.help,
                      request if request.startswith(("GET /", "POST /", "PUT /", "DELETE /")) else ""))
    return found


def _option_words(command: Command) -> list[str]:
    return [left.partition(" ")[0] for option in command.all_options() for left, _ in _spellings(option)] + ["--help"]


def _word_cases(commands: tuple[Command, ...]) -> list[tuple[str, list[str]]]:
    """Return what may follow each beginning of a command line: `""`, a noun, a whole command."""
    cases: dict = {"": [*nouns(commands), "--help", "--version"]}
    for noun in nouns(commands):
        cases[noun] = [c.name.split()[1] for c in commands if c.name.startswith(noun + " ")] + ["--help"]
    for command in commands:
        cases[command.name] = cases.get(command.name, []) + _option_words(command)
    return list(cases.items())


BASH_HEAD = """# completion of mad for bash
_mad() {
  local words= start=
  [ "$COMP_CWORD" -gt 1 ] && start=${COMP_WORDS[1]}
  [ "$COMP_CWORD" -gt 2 ] && [ "${COMP_WORDS[2]#-}" = "${COMP_WORDS[2]}" ] && start="$start ${COMP_WORDS[2]}"
  case "$start" in
"""
BASH_TAIL = """  esac
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _mad mad"""
ZSH_HEAD = """#compdef mad
_mad() {
  local start=
  local -a found
  (( CURRENT > 2 )) && start=$words[2]
  (( CURRENT > 3 )) && [[ $words[3] != -* ]] && start="$start $words[3]"
  case "$start" in
"""
ZSH_TAIL = """  esac
  compadd -- $found || _files
}
if [ "$funcstack[1]" = "_mad" ]; then _mad "$@"; else compdef _mad mad; fi"""


def complete_bash(commands: tuple[Command, ...]) -> str:
    """Return the completion script for bash."""
    cases = [f"    '{start}') words='{' '.join(words)}' ;;\n" for start, words in _word_cases(commands)]
    return BASH_HEAD + "".join(cases) + BASH_TAIL


def complete_zsh(commands: tuple[Command, ...]) -> str:
    """Return the completion script for zsh."""
    cases = [f"    '{start}') found=({' '.join(words)}) ;;\n" for start, words in _word_cases(commands)]
    return ZSH_HEAD + "".join(cases) + ZSH_TAIL


def complete_fish(commands: tuple[Command, ...]) -> str:
    """Return the completion script for fish."""
    def quoted(text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    lines = ["# completion of mad for fish", "complete -c mad -f",
             "complete -c mad -n __fish_use_subcommand -a " + quoted(" ".join(nouns(commands)))]
    for command in commands:
        noun, _, verb = command.name.partition(" ")
        seen = "__fish_seen_subcommand_from " + noun
        if verb:
            others = " ".join(c.name.split()[1] for c in commands if c.name.startswith(noun + " "))
            lines.append(f"complete -c mad -n '{seen}; and not __fish_seen_subcommand_from {others}'"
                         f" -a {verb} -d {quoted(command.help)}")
            seen += "; and __fish_seen_subcommand_from " + verb
        for option in command.all_options():
            for left, text in _spellings(option):
                takes = "" if option.kind == "flag" or left.endswith("-stdin") else " -r"
                lines.append(f"complete -c mad -n '{seen}' -l {left.split()[0][2:]}{takes} -d {quoted(text)}")
    return "\n".join(lines)


COMPLETIONS = {"bash": complete_bash, "zsh": complete_zsh, "fish": complete_fish}


# == Shell =====================================================================
# Flags win over the environment, the environment over the saved profile.

def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):
        return False


def read_secret(origin: str) -> str:
    """Return the first line of stdin without its end. Raises Refusal when it is empty, long or not UTF-8."""
    try:
        octets = sys.stdin.buffer.readline(MAX_SECRET + 1)
        text = octets.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except (AttributeError, ValueError, OSError):
        raise Refusal(USAGE, "usage", f"{origin} finds no text in UTF-8 on standard input") from None
    if not text or len(octets) > MAX_SECRET:
        raise Refusal(USAGE, "usage", f"{origin} finds {'too much' if text else 'nothing'} on standard input")
    return text


def ask(prompt: str) -> str:
    """Ask on stderr, so that stdout stays clean."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def ask_secret(prompt: str) -> str:
    from getpass import getpass
    try:
        found = getpass(prompt)
    except EOFError:
        found = ""
    if not found:
        raise Refusal(USAGE, "usage", "nothing was typed")
    return found


class Shell:
    """What a running command knows: its option `values`, the table, the environment, the profile."""

    def __init__(self, values: dict[str, Any], commands: tuple[Command, ...]):
        self.commands = commands
        self.values, self.json, self.quiet = values, values.get("json", False), values.get("quiet", False)
        self.profile = Profile()

    # -- addresses --

    def url(self, text: str, origin: str) -> Url:
        """Return a URL fit for tokens, warning when they can be read on the way. Raises Refusal."""
        try:
            url = Url(text)
        except BadValue as problem:
            raise Refusal(USAGE, "bad_url", f"{origin} is {problem}") from None
        if url.scheme == "http" and not url.is_loopback:
            tell("warning", f"secrets and tokens travel in clear to {url.text}; use https")
        return url

    def admin_url(self) -> Url:
        if text := self.values.get("admin-url"):
            return self.url(text, "--admin-url")
        if text := os.environ.get("MAD_ADMIN_URL"):
            return self.url(text, "MAD_ADMIN_URL")
        return self.url(self.profile.url() or ADMIN_URL, self.profile.url_path)

    def auth_url(self) -> Url:
        if text := self.values.get("auth-url"):
            return self.url(text, "--auth-url")
        return self.url(os.environ.get("MAD_AUTH_URL") or AUTH_URL, "MAD_AUTH_URL")

    def issuer(self) -> Url:
        """Return the address of the server that issued the saved token."""
        try:
            return Url(self.profile.url() or ADMIN_URL)
        except BadValue:
            raise _unsafe(self.profile.url_path, "holds no URL") from None

    # -- the token --

    def admin_token(self, url: Url) -> str:
        """Return the token to send to `url`. Raises Refusal: none, expired, or another server's."""
        token = self.values.get("admin-token", os.environ.get("MAD_ADMIN_TOKEN") or None)
        hint = "log in with: mad session login"
        if token is not None:
            token = token.strip()
        else:
            token = self.profile.token()
            if token and url.text != (issuer := self.issuer().text):
                raise Refusal(LOGIN, "foreign_server", f"the saved login is for {issuer}, not for {url.text}",
                              hint="log in there with: mad session login --admin-url " + url.text)
            if token:
                self._check_age(token, hint)
        if not token:
            raise Refusal(LOGIN, "not_logged_in", "not logged in", hint=hint)
        if not is_token(token):
            raise Refusal(LOGIN, "not_logged_in", "the token has characters no token has", hint=hint)
        return token

    @staticmethod
    def _check_age(token: str, hint: str) -> None:
        from time import time
        try:
            expires_at = decode_jwt(token)[1]["exp"] + 0
        except (ValueError, KeyError, TypeError):
            tell("warning", "cannot tell when the saved token expires")
            return
        if expires_at <= time():
            raise Refusal(LOGIN, "token_expired", "the saved login expired at " + utc(expires_at), hint=hint)

    def client(self, url: Url | None = None, token: str | None = None) -> MadClient:
        """Return a client for ADMIN, with the token in force unless another one is given."""
        url = url or self.admin_url()
        return MadClient(url.text, self.admin_token(url) if token is None else token,
                         ca_file=os.environ.get("MAD_CA_FILE") or None)

    # -- questions --

    def secret(self, option: Option) -> str | None:
        """Return the secret an option stands for: given, read from stdin, or asked for on a terminal."""
        if option.name in self.values:
            return self.values[option.name]
        if option.stdin and self.values.get(option.stdin):
            return read_secret("--" + option.stdin)
        if not option.required:
            return None
        if not on_terminal():
            ways = " or ".join("--" + name for name in (option.stdin, option.name) if name)
            raise Refusal(USAGE, "usage", f"{ways} is missing", hint="pipe it in with --" + option.stdin)
        if option.known:
            return ask_secret("password: ")
        first = ask_secret("new password: ")
        if ask_secret("once more: ") != first:
            raise Refusal(USAGE, "usage", "the two passwords differ")
        return first

    def resolve(self, client: MadClient, option: Option, value: str) -> str:
        """Return the id `value` is or names."""
        if is_uuid(value):
            return value.lower()
        try:
            return client.find_id(option.of, value)
        except MadError as problem:
            if problem.status != 404 or isinstance(problem, NoRoute):
                raise
            if option.loose:
                return value
            raise MadError(404, problem.error, f"there is no {option.of[:-1]} '{value}'",
                           hint=f"see: mad {option.of[:-1]} list") from None

    def resolve_within(self, client: MadClient, option: Option, value: str, whole: str | None) -> str:
        """Return the id of the part of `whole` that `value` is or names."""
        if is_uuid(value):
            return value.lower()
        owner, parts, members = option.within
        if whole is None:
            raise Refusal(USAGE, "usage", f"--{option.name} is no id, and to look it up --{owner} is missing")
        for row in client.each(getattr(client, parts.__name__), whole):
            if value in [row.get(member) for member in members] and isinstance(row.get("id"), str):
                return row["id"]
        raise MadError(404, "not_found", f"there is no '{value}' there")

    def confirm(self, command: Command) -> None:
        """Ask whoever sits at the terminal before something is destroyed. Raises Refusal when it shall not be."""
        if command.danger is None or self.values.get("yes") or not on_terminal():
            return
        sys.stderr.write(f"mad {command.name}: {command.help}\n")
        word = (self.values.get(command.danger) or "").strip() if command.danger else ""
        is_confirmed = (ask(f"type {plain(word)} to confirm: ") == word if word
                        else ask("go on? [y/N] ").lower() in ("y", "yes"))
        if not is_confirmed:
            raise Refusal(USAGE, "not_confirmed", "not confirmed; nothing was sent")


# == Verbs =====================================================================
# The commands that are more than one request. Each takes the Shell and its options, and returns what --json prints.

def _name_in(claims: dict) -> str:
    return str(claims.get("username") or claims.get("preferred_username") or "")


def _expiry_in(claims: dict) -> str:
    expires_at = claims.get("exp")
    return utc(expires_at) if isinstance(expires_at, (int, float)) else ""


def session_login(shell: Shell, username: str | None = None, password_stdin: bool = False,
                  totp: str | None = None) -> dict:
    """Exchange name and password for an admin token and save it."""
    url = shell.admin_url()
    # Before anybody types a password: a profile that cannot be written is known now.
    for path in (shell.profile.token_path, shell.profile.url_path):
        try:
            _check_private(path, os.lstat(path))
        except OSError:
            pass
    name = username or ""
    if not name.strip():
        if password_stdin or not on_terminal():
            raise Refusal(USAGE, "usage", "--username is missing",
                          hint="without a terminal, give --username and --password-stdin")
        name = ask("username: ")
        if not name:
            raise Refusal(USAGE, "usage", "nothing was typed")
    if not password_stdin and not on_terminal():
        raise Refusal(USAGE, "usage", "there is no terminal to ask for the password on",
                      hint="pipe it in with --password-stdin")
    password = read_secret("--password-stdin") if password_stdin else ask_secret("password: ")
    client = shell.client(url, token="")
    try:
        answer = client.login(name, password, totp)
    except MadError as problem:
        if problem.status not in (400, 401, 403) or totp or not on_terminal():
            raise
        # The server does not say whether it was the password or a missing code, so the question is always put.
        totp = ask("one-time code (blank if none): ")
        if not totp:
            raise
        answer = client.login(name, password, totp)
    token = answer["access_token"]
    try:
        claims = decode_jwt(token)[1]
    except ValueError:
        raise _bad_answer("the answer has no access token") from None
    shell.profile.save(token, url.text)
    subject = str(claims.get("sub", ""))
    return {"success": True, "sub": subject, "message": f"logged in as {subject} at {url.text}",
            "username": _name_in(claims) or name, "expires_at": _expiry_in(claims), "url": url.text}


def session_logout(shell: Shell) -> dict:
    """Have the saved token revoked, then remove it."""
    token = shell.profile.token()
    if not shell.profile.forget():
        return {"success": True, "message": "not logged in"}
    try:
        # To the server that issued it, whatever address is in force.
        url = shell.url(shell.profile.url() or ADMIN_URL, shell.profile.url_path)
        if token and is_token(token):
            shell.client(url, token).logout()
    except (MadError, Refusal) as problem:
        # 404: a server without the route; 401: the token was dead already.
        if not (isinstance(problem, MadError) and problem.status in (401, 404, 405)):
            tell("warning", f"the server could not be told, so the token stays good until it expires: {problem}")
    return {"success": True, "message": "logged out"}


def session_status(shell: Shell) -> dict:
    """Decode the token in force, without asking the server."""
    url = shell.admin_url()
    token = shell.admin_token(url)
    try:
        claims = decode_jwt(token)[1]
    except ValueError as problem:
        raise Refusal(LOGIN, "bad_token", f"the token cannot be read: {problem}") from None
    roles = claims.get("roles", claims.get("role"))
    roles = [str(role) for role in roles] if isinstance(roles, list) else [str(roles)] if roles else []
    return {"success": True, "sub": str(claims.get("sub", "")), "username": _name_in(claims),
            "role": roles[0] if roles else "(none)", "roles": roles, "expires_at": _expiry_in(claims),
            "token_use": str(claims.get("token_use", "")), "url": url.text}


def client_create(shell: Shell, client_id: str, secret: str | None = None, gen_password: int | None = None,
                  public: bool = False, introspect: bool | None = None, grant: list | None = None,
                  scope: list | None = None, **others) -> dict:
    """POST /clients. Create a client. A secret nobody chose is in the result as `client_secret`, this once."""
    if public and (secret is not None or gen_password is not None):
        raise Refusal(USAGE, "usage", "a public client has no secret")
    generated = None
    if gen_password is not None:
        # 64 letters, so that six bits of each octet choose one without favour.
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        secret = generated = "".join(letters[octet & 63] for octet in os.urandom(gen_password))
    if shell.quiet and not shell.json and not public and (secret is None or generated):
        raise Refusal(USAGE, "usage", "--quiet would lose the secret that is made",
                      hint="use --json, or give one with --secret-stdin")
    client = shell.client().create_client(client_id, secret, public=public, grant_types=grant, scopes=scope,
                                          may_introspect=introspect, **others)
    if generated:
        client["client_secret"] = generated
    return client


def user_totp_enroll(shell: Shell, client: MadClient, id: str, client_id: str | None = None,
                     svg: str | None = None) -> dict:
    """POST /users/{id}/totp/enroll. Make a second-factor secret; put its QR code into a file when one is named."""
    handle = None
    if svg is not None:
        # Before anything is sent: the secret is told once, and the old one may be gone then.
        try:
            handle = os.open(svg, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise Refusal(USAGE, "usage", f"cannot make {svg}: {problem.strerror}") from None
    try:
        answer = client.enroll_totp(id, client_id)
        if not isinstance(answer.get("otpauth_uri"), str):
            raise _bad_answer("the answer is not the JSON it should be")
    except BaseException:
        if handle is not None and svg is not None:
            os.close(handle)
            os.unlink(svg)
        raise
    if handle is not None:
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(str(answer.get("svg") or ""))
        except OSError as problem:
            tell("warning", f"cannot write {svg}: {problem.strerror}")
    if on_terminal() and not shell.json:
        tell("hint", "put it into an authenticator, then confirm it with: "
             f"mad user totp-verify --user-id {shell.values['id']} --code CODE")
    return answer


def show_enrolment(answer: dict) -> list[str]:
    return ["otpauth URI, shown this once: " + plain(answer["otpauth_uri"]),
            "secret, shown this once: " + plain(answer.get("secret"))]


def backup(shell: Shell, client: MadClient, file: str, force: bool = False, without_keys: bool = False) -> dict:
    """POST /backup. Have the server make a backup, fetch it into `file`, and remove it there."""
    from hashlib import sha256
    if os.path.lexists(file) and not force:
        raise Refusal(USAGE, "usage", f"{file} is there already", hint="--force writes over it")
    temporary = f"{file}.{os.getpid()}.new"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise Refusal(USAGE, "usage", f"cannot make {file}: {problem.strerror}") from None
    made = None
    try:
        client.timeout = max(client.timeout, 600)  # A large one is written and read through before the answer.
        made = client.make_backup(without_keys)
        digest = sha256()
        with os.fdopen(handle, "wb", closefd=False) as target:
            for piece in client.read_backup(str(made.get("name"))):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != made.get("sha256"):
            raise _bad_answer("what came is not the backup that was made")
        os.fsync(handle)
        os.rename(temporary, file)
    except OSError as problem:
        raise Refusal(REFUSED, "cannot_write", f"cannot write {file}: {problem.strerror}") from None
    finally:
        os.close(handle)
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        if made is not None:
            try:
                client.delete_backup(str(made.get("name")))
            except MadError as problem:
                tell("warning", f"the server keeps its copy: {problem.message}")
    return made


def _seq(row: dict) -> int:
    number = str(row.get("id"))
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise _bad_answer("the entries of this server have no numbers to go on from", hint="")
    return int(number)


def _wait(seconds: float) -> bool:
    """Wait. Return whether stdout still has a reader, the moment it has none."""
    import time
    try:
        from select import poll
        poller = poll()
        poller.register(sys.stdout.fileno(), 0)  # Errors and hang-ups are told in any case.
    except (ImportError, AttributeError, OSError, ValueError):
        time.sleep(seconds)
        return True
    return not poller.poll(seconds * 1000)


def audit_tail(shell: Shell, client: MadClient, lines: int = 10, interval: int = 1, user_id: str | None = None,
               action: str | None = None, target: str | None = None) -> Iterator[list[dict]]:
    """GET /audit-logs. Yield what is written to the audit log, until nobody reads it any more."""
    def rows_of(**how) -> list[dict]:
        return client.list_audit_logs(user_id, action, target=target, **how)
    rows = rows_of(limit=max(lines, 1))
    after = max(map(_seq, rows), default=0)
    yield rows[:lines][::-1]
    pause, is_down = interval, False
    while _wait(pause):
        pause = interval
        try:
            rows = rows_of(after=str(after), limit=PAGE)
        except MadError as problem:
            # A restarting or busy server is tried again; other failures do not pass by themselves.
            is_down_now = isinstance(problem, Unreachable) and problem.error != "untrusted"
            if not is_down_now and problem.status not in (429, 500, 503):
                raise
            if not is_down:
                tell("warning", str(problem).rstrip(".") + "; trying again")
            is_down, pause = True, max(interval, min(problem.retry_after, 60))
            continue
        if is_down:
            tell("warning", "the server answers again")
            is_down = False
        rows = [row for row in rows if _seq(row) > after]
        after = max(map(_seq, rows), default=after)
        yield rows
        if len(rows) == PAGE:
            pause = 0


def show_entries(rows: list[dict]) -> list[str]:
    return [" ".join([cell("timestamp", row.get("timestamp")), plain(row.get("action"))] + [
        f"{title}={plain(row[member])}" for title, member in (
            ("result", "result"), ("user", "actor_id"), ("target", "target"), ("secondary", "secondary"),
            ("ip", "ip_address")) if row.get(member)])
        for row in rows]


def chain_verdict(answer: dict) -> dict:
    if answer["valid"]:
        rows = plain(answer.get("rows"))
        return {"success": True, "message": f"the audit log is whole: {rows} rows", **answer}
    return {"success": False, "message": plain(answer.get("reason")) or "the audit log was changed",
            "error": "audit_log_changed", **answer}


def token_inspect(shell: Shell, token: str) -> dict:
    """Take a JWT apart. Nothing is verified."""
    try:
        header, payload, signature = decode_jwt(token.strip())
    except ValueError as problem:
        raise Refusal(USAGE, "bad_token", str(problem)) from None
    return {"header": header, "payload": payload, "signature": signature}


def show_token(parts: dict) -> list[str]:
    lines = []
    for title in ("header", "payload"):
        lines += [title.upper(), "-" * len(title)]
        for name, value in parts[title].items():
            is_stamp = name in ("exp", "iat", "nbf") and isinstance(value, int) and not isinstance(value, bool)
            text = utc(value, " UTC") if is_stamp else str(value) if isinstance(value, bool) else plain(value)
            lines.append(f"{plain(name)}: {text}")
        lines.append("")
    return [*lines, "SIGNATURE", "---------", plain(parts["signature"])]


def token_get(shell: Shell, client_id: str | None = None, secret: str | None = None, scope: str | None = None,
              no_cache: bool = False) -> dict:
    """Get an access token for a machine client, from the cache while it lasts."""
    from time import time
    url = shell.auth_url()
    client_id = client_id or os.environ.get("MAD_CLIENT_ID")
    if not client_id:
        raise Refusal(USAGE, "usage", "--client-id is missing", hint="give it, or set MAD_CLIENT_ID")
    secret = secret or os.environ.get("MAD_CLIENT_SECRET")
    if not secret and on_terminal():
        secret = ask_secret("client secret: ")
    if not secret:
        raise Refusal(USAGE, "usage", "the client secret is missing",
                      hint="set MAD_CLIENT_SECRET, or pipe it in with --secret-stdin")
    scope = " ".join((scope or "").split())
    cache = None if no_cache else TokenCache(url.text, client_id, scope, secret)
    if cache and (answer := cache.find(int(time()))):
        return answer
    client = AuthClient(url.text, client_id, secret, ca_file=os.environ.get("MAD_CA_FILE") or None)
    asked_at = int(time())
    try:
        answer = client.client_credentials(scope)
    except MadError as problem:
        if problem.status == 401:
            problem.hint = "check the client id and its secret"
        raise
    if cache:
        cache.store(answer, asked_at)
    return answer


def completion(name: str):
    """Return the verb that makes the completion script of a shell."""
    return lambda shell: {"success": True, "message": COMPLETIONS[name](shell.commands)}


def show_script(result: dict) -> list[str]:
    return [result["message"]]


def show_access_token(answer: dict) -> list[str]:
    return [answer["access_token"]]


def verdict(answer: dict) -> dict:
    return {"success": True, "message": "allowed" if answer["allowed"] else "not allowed", **answer}


def outcome(answer: dict) -> dict:
    return {"success": True, "message": str(answer.get("message") or "done"), **answer}


# == Commands ==================================================================
# Everything mad can do. A new command is a row here and, at most, a method of MadClient.

USER_ID = Option("id", "the user", required=True, of="users")
ROLE_ID = Option("id", "the role", required=True, of="roles")
PERMISSION_ID = Option("id", "the permission", required=True, of="permissions")
SCOPE_ID = Option("id", "the scope", required=True, of="scopes")
CLIENT_ID = Option("id", "the client", required=True, of="clients")
OF_USER = Option("user-id", "the user", required=True, of="users")
OF_ROLE = Option("role-id", "the role", required=True, of="roles")
OF_PERMISSION = Option("permission-id", "the permission", required=True, of="permissions")
OF_SCOPE = Option("scope-id", "the scope", required=True, of="scopes")
OF_SCOPES = Option("scope-id", "the scopes, one or more", "list", required=True, of="scopes", dest="scope_ids")
OF_CLIENT = Option("client-id", "the client", required=True, of="clients")
NAME = Option("name", "its name", required=True)
DESCRIPTION = Option("description", "what it is for", metavar="TEXT")
RENAME = Option("name", "its new name")
FLAG = Option("flag", "ENABLE_TOTP, TOTP_ISSUER, TOKEN_EXPIRATION, REFRESH_TOKEN_EXPIRATION, SESSION_BASED_AUTH "
              "or SESSION_BASED_MAX_AGE", required=True)
RECORD = Option("id", "its id", required=True, metavar="ID")
MAYBE_CLIENT = Option("client-id", "only for this client", of="clients")
IDP_ID = Option("idp-id", "its id or its key", required=True, metavar="ID|KEY",
                within=("id", MadClient.list_idps, ("provider_key",)))
URI = Option("uri", "the URI, exactly as the client will send it", required=True)
CLIENT_RIGHTS = (
    Option("grant", "a grant type it may use, one or more", "list", dest="grant_types"),
    Option("introspect", "may introspect tokens of other clients", "flag", dest="may_introspect"),
    Option("first-party", "is our own, so that nobody is asked for consent", "flag", dest="is_first_party"),
    Option("access-token-signed-alg", "how its access tokens are signed; blank leaves it to the server",
           metavar="ES256|RS256"),
    Option("id-token-signed-response-alg", "how its ID tokens are signed; blank leaves it to the server",
           metavar="ES256|RS256"),
)
IDP = (
    Option("provider-key", "short key, such as google", required=True),
    Option("display-name", "what people read", required=True),
    Option("issuer", "its issuer URL", required=True, metavar="URL"),
    Option("external-client-id", "our client id there", required=True),
    Option("scopes", "what to ask it for (openid email profile)"),
)
PURGE = (
    Option("older-than", "age in seconds", "number", required=True, metavar="SECONDS"),
    Option("expired", "purge what expired before then", "flag"),
    Option("revoked", "purge what was revoked and expired before then", "flag"),
)
WHO_DID = (
    Option("user-id", "who did it", of="users", loose=True), Option("action", "exactly this action"),
    Option("target", "exactly this target"),
)
JWT = Option("token", "the token; - reads standard input", "token", required=True, metavar="JWT")
NEW_SECRET = Option("secret", "better from stdin: an argument is visible to every process", "secret",
                    stdin="secret-stdin")

USER = fields("id", "username", "email", "is_active", "email_verified", "totp_enabled", "lockout_until", "created_at")
ROLE = fields("id", "name", "description", "is_protected")
ROLES = table("roles", "id", "name", "is_protected", "description")
PERMISSIONS = table("permissions", "id", "name")
SCOPE = fields("id", "name", "description=desc", "created_at", "is_active")
SCOPES = table("scopes", "id", "name", "description=desc")
CLIENT = fields("id", "client_id", "display_name", "audience", "client_type", "grant_types", "scopes", "may_introspect",
                "is_first_party", "access_token_signed_alg", "id_token_signed_response_alg", "is_active", "created_at")
USERS = table("users", "id", "username", "email", "is_active")
CLIENTS = table("clients", "id", "client_id", "is_active", "display_name")
REDIRECT_URIS = table("redirect URIs", "id", "redirect_uri")
URIS = table("URIs", "id", "uri")
IDPS = ("id", "key=provider_key", "display_name", "issuer")
FLAGS = table("flags", "flag", "is_enabled", "options")
SESSION = fields("id", "user_id", "username", "client_id", "token_use", "login_method", "is_revoked", "issued_at",
                 "expires_at")
SESSIONS = table("sessions", "id", "user_id", "client_id", "use=token_use", "is_revoked", "expires=expires_at")
REFRESH_TOKENS = table("refresh tokens", "id", "user_id", "is_revoked", "expires=expires_at")
AUDIT = ("id", "user=actor_id", "action", "target", "secondary", "time=timestamp")


def of_client(verb: str, what: str, bound, uri: str) -> tuple:
    """Return the commands for one kind of URI of a client."""
    add, list_, delete = bound
    whole = ("client-id", list_, ("uri", "redirect_uri"))
    return (
        Command("client add-" + verb, "allow a client " + what, add, (CLIENT_ID, URI), line("added {uri} with id {id}"),
                f"mad client add-{verb} --id app --uri {uri}"),
        Command(f"client list-{verb}s", "list what was added with add-" + verb, list_, (OF_CLIENT,), URIS,
                f"mad client list-{verb}s --client-id app"),
        Command("client delete-" + verb, "remove " + what, delete, (
            OF_CLIENT, Option("id", "its id, or the URI itself", required=True, metavar="ID|URI", within=whole),
        ), said, f"mad client delete-{verb} --client-id app --id {uri}", danger=""),
    )


def of_sessions(noun: str) -> tuple:
    """Return the commands on sessions under one of their two nouns."""
    return (
        Command(noun + " list", "list the sessions, newest first", MadClient.list_sessions, (
            Option("user-id", "only those of this user", of="users"),
            Option("client-id", "only those at this client", metavar="ID|NAME"),
        ), SESSIONS, f"mad {noun} list --user-id bob"),
        Command(noun + " get", "show a session", MadClient.get_session, (RECORD,), SESSION,
                f"mad {noun} get --id 019344f2c1d47a5b9a4c3e2d1f0a9b8c"),
        Command(noun + " list-by-user", "list the sessions of a user", MadClient.list_sessions_of_user, (OF_USER,),
                SESSIONS, f"mad {noun} list-by-user --user-id bob"),
        Command(noun + " introspect", "have the server read an AUTH token", MadClient.introspect, (JWT,),
                lambda claims: [f"{plain(name)}: {plain(value)}" for name, value in claims.items()],
                f"mad {noun} introspect --token -"),
        Command(noun + " revoke", "revoke a session and its token", MadClient.revoke_session, (RECORD,), said,
                f"mad {noun} revoke --id 019344f2c1d47a5b9a4c3e2d1f0a9b8c", shape=outcome),
        Command(noun + " purge", "delete the rows of old sessions", MadClient.purge_sessions, PURGE, said,
                f"mad {noun} purge --older-than 86400 --expired", danger=""),
    )


def of_audit(noun: str) -> tuple:
    """Return the commands on the audit log under one of its two nouns."""
    return (
        Command(noun + " list", "list what was done, newest first", MadClient.list_audit_logs, (
            *WHO_DID,
            Option("since", "not before this: ISO 8601 in UTC unless it says otherwise, or Unix seconds", "moment"),
            Option("until", "not after this", "moment"),
            Option("after", "only entries with a greater id; then oldest first", metavar="ID"),
            Option("limit", "at most so many in all (100); a negative number means all", "number"),
        ), table("entries", *AUDIT), f"mad {noun} list --action user_created --since 2030-01-31"),
        Command(noun + " get", "show an entry", MadClient.get_audit_log, (RECORD,),
                fields(*AUDIT, "result", "ip_address", "user_agent", "request_id", "row_sha256"),
                f"mad {noun} get --id 17"),
        Command(noun + " verify", "tell whether the log is whole and nobody changed it", MadClient.verify_audit_logs,
                (), lambda row: [plain(row["message"]), "last entry: " + plain(row.get("last_seq")),
                                 "head: " + plain(row.get("head"))],
                f"mad {noun} verify", shape=chain_verdict),
        Command(noun + " export", "print the whole log as NDJSON, oldest first", MadClient.export_audit_logs, (
            Option("after", "only entries with a greater id", metavar="ID"),
            Option("limit", "at most so many in all", "number", least=1),
        ), documents, f"mad {noun} export > audit.ndjson", flows=True),
        Command(noun + " tail", "follow what is done, until Ctrl-C", audit_tail, (
            *WHO_DID,
            Option("lines", "begin with so many that are there (10)", "number", least=0, metavar="N"),
            Option("interval", "ask every so many seconds (1)", "number", least=1, metavar="SECONDS"),
        ), show_entries, f"mad {noun} tail --lines 50", verb=True, flows=True),
        Command(noun + " purge", "delete old entries", MadClient.purge_audit_logs, (
            Option("days", "older than so many days", "number", required=True, least=1),
        ), said, f"mad {noun} purge --days 365", danger=""),
    )


COMMANDS = (
    # -- session --
    Command("session login", "log in as an administrator and save the token", session_login, (
        Option("admin-url", "address of the ADMIN server"),
        Option("username", "who (asked for on a terminal)"),
        Option("password-stdin", "read the password from standard input", "flag"),
        Option("totp", "one-time code, when a second factor is set up", metavar="CODE"),
    ), said, "mad session login --username admin --password-stdin < password.txt", local=True),
    Command("session logout", "end the saved login", session_logout, (), said,
            "mad session logout", local=True),
    Command("session status", "show who is logged in, and until when", session_status, (
        Option("admin-url", "address of the ADMIN server"),
    ), fields("subject=sub", "username", "roles", "expires=expires_at", "token_use", "url"),
        "mad session status --json", local=True, quiet=lambda status: [plain(status["sub"])]),
    *of_sessions("session"),

    # -- user --
    Command("user create", "create a user", MadClient.create_user, (
        Option("username", "name to log in with", required=True),
        Option("user-email", "e-mail address", required=True, dest="email"),
        Option("user-password", "better from stdin: an argument is visible to every process", "secret", required=True,
               dest="password", stdin="password-stdin", metavar="PASSWORD"),
    ), line("created user {username} with id {id}"),
        "mad user create --username bob --user-email bob@example.org --password-stdin < password.txt"),
    Command("user list", "list the users", MadClient.list_users, (
        Option("is-active", "those who may log in (true), those who may not, or all", choices=("true", "false", "all")),
    ), USERS, "mad user list --is-active all --q example.org --sort -created_at"),
    Command("user get", "show a user", MadClient.get_user, (USER_ID,), USER, "mad user get --id bob"),
    Command("user update", "change name, e-mail or state of a user", MadClient.update_user, (
        USER_ID, Option("username", "new name"), Option("email", "new e-mail address"),
        Option("is-active", "whether the user may log in", "flag"),
    ), USER, "mad user update --id bob --email bob@example.net", at_least_one=True),
    Command("user verify-email", "mark the e-mail address of a user as verified", MadClient.verify_email, (USER_ID,),
            said, "mad user verify-email --id bob"),
    Command("user reset-password", "set a new password", MadClient.reset_password, (
        USER_ID, Option("new-password", "better from stdin: an argument is visible to every process", "secret",
                        required=True, stdin="password-stdin", metavar="PASSWORD"),
    ), said, "mad user reset-password --id bob --password-stdin < password.txt"),
    Command("user deactivate", "keep a user from logging in, and end the user's sessions", MadClient.deactivate_user,
            (USER_ID,), said, "mad user deactivate --id bob"),
    Command("user activate", "let a deactivated user log in again", MadClient.activate_user, (USER_ID,), said,
            "mad user activate --id bob"),
    Command("user delete", "delete a user and everything that is theirs", MadClient.delete_user, (USER_ID,), said,
            "mad user delete --id bob", danger="id"),
    Command("user revoke", "end every session, token and login of a user", MadClient.revoke_user, (USER_ID,), said,
            "mad user revoke --id bob", danger=""),
    Command("user verify-password", "tell whether this is the password of a user", MadClient.verify_password, (
        Option("id", "the user", required=True, dest="user", metavar="ID|NAME"),
        Option("password", "better from stdin: an argument is visible to every process", "secret", required=True,
               stdin="password-stdin", known=True),
        Option("totp", "one-time code, when a second factor is set up", metavar="CODE"),
    ), line("right for {email}, id {user_id}"), "mad user verify-password --id bob --password-stdin < password.txt",
        quiet=lambda row: [plain(row.get("user_id"))]),
    Command("user set-lockout", "lock a user out for a time", MadClient.set_lockout, (
        USER_ID, Option("until", "ISO 8601 date-time, in UTC unless it says otherwise, or permanent", "lockout",
                        required=True, dest="lockout_until"),
    ), said, "mad user set-lockout --id bob --until 2030-01-31T12:00:00Z"),
    Command("user clear-lockout", "end the lockout of a user", MadClient.clear_lockout, (USER_ID,), said,
            "mad user clear-lockout --id bob"),
    Command("user unlock", "end the lockout of a user, as clear-lockout does", MadClient.clear_lockout, (USER_ID,),
            said, "mad user unlock --id bob"),
    Command("user totp-enroll", "make a second-factor secret and show it once", user_totp_enroll, (
        USER_ID, MAYBE_CLIENT, Option("svg", "write its QR code into this new file, which only its owner can read",
                                      metavar="FILE"),
    ), show_enrolment, "mad user totp-enroll --id bob --svg bob.svg", verb=True,
        quiet=lambda answer: [plain(answer["otpauth_uri"])]),
    Command("user totp-qr", "make a second-factor secret, and a QR code on the server", MadClient.generate_totp, (
        USER_ID, MAYBE_CLIENT, Option("output-path", "folder on the server (.)", dest="qr_output_path"),
    ), line("wrote {filename}"), "mad user totp-qr --id bob"),
    Command("user totp-verify", "confirm a second factor with its first code", MadClient.verify_totp, (
        OF_USER, MAYBE_CLIENT, Option("code", "the six digits", required=True),
    ), said, "mad user totp-verify --user-id bob --code 123456"),
    Command("user disable-totp", "remove the second factor of a user", MadClient.disable_totp, (OF_USER, MAYBE_CLIENT),
            said, "mad user disable-totp --user-id bob", danger=""),

    # -- role --
    Command("role create", "create a role", MadClient.create_role, (NAME, DESCRIPTION),
            line("created role {name} with id {id}"), "mad role create --name Operator"),
    Command("role update", "change a role", MadClient.update_role, (ROLE_ID, RENAME, DESCRIPTION), ROLE,
            "mad role update --id Operator --description 'runs the plant'", at_least_one=True),
    Command("role list", "list the roles", MadClient.list_roles, (), ROLES, "mad role list"),
    Command("role get", "show a role", MadClient.get_role, (ROLE_ID,), ROLE, "mad role get --id Operator"),
    Command("role delete", "delete a role", MadClient.delete_role, (ROLE_ID,), said, "mad role delete --id Operator",
            danger="id"),
    Command("role assign", "give a user a role", MadClient.assign_role, (OF_USER, OF_ROLE), said,
            "mad role assign --user-id bob --role-id Operator"),
    Command("role unassign", "take a role from a user", MadClient.unassign_role, (OF_USER, OF_ROLE), said,
            "mad role unassign --user-id bob --role-id Operator"),
    Command("role list-for-user", "list the roles of a user", MadClient.list_roles_of_user, (OF_USER,),
            table("roles", "id", "name"), "mad role list-for-user --user-id bob"),
    Command("role list-users", "list the users who have a role", MadClient.list_users_of_role, (ROLE_ID,), USERS,
            "mad role list-users --id Operator"),
    Command("role set-for-user", "make these the roles of a user, and no others", MadClient.set_roles_of_user, (
        OF_USER, Option("role-id", "the roles, one or more", "list", required=True, of="roles", dest="role_ids"),
    ), said, "mad role set-for-user --user-id bob --role-id Operator Guest"),

    # -- permission --
    Command("permission create", "create a permission", MadClient.create_permission, (NAME,),
            line("created permission {name} with id {id}"), "mad permission create --name door.open"),
    Command("permission update", "rename a permission", MadClient.update_permission, (
        PERMISSION_ID, Option("name", "its new name", required=True)), fields("id", "name"),
        "mad permission update --id door.open --name gate.open"),
    Command("permission list", "list the permissions", MadClient.list_permissions, (), PERMISSIONS,
            "mad permission list"),
    Command("permission get", "show a permission", MadClient.get_permission, (PERMISSION_ID,), fields("id", "name"),
            "mad permission get --id door.open"),
    Command("permission delete", "delete a permission", MadClient.delete_permission, (PERMISSION_ID,), said,
            "mad permission delete --id door.open", danger="id"),
    Command("permission assign", "give a role a permission", MadClient.assign_permission, (OF_ROLE, OF_PERMISSION),
            said, "mad permission assign --role-id Operator --permission-id door.open"),
    Command("permission remove", "take a permission from a role", MadClient.remove_permission,
            (OF_ROLE, OF_PERMISSION), said, "mad permission remove --role-id Operator --permission-id door.open"),
    Command("permission list-for-role", "list the permissions of a role", MadClient.list_permissions_of_role,
            (OF_ROLE,), PERMISSIONS, "mad permission list-for-role --role-id Operator"),
    Command("permission list-roles", "list the roles that have a permission", MadClient.list_roles_of_permission,
            (PERMISSION_ID,), ROLES, "mad permission list-roles --id door.open"),
    Command("permission list-for-user", "list what a user may do", MadClient.list_permissions_of_user, (OF_USER,),
            PERMISSIONS, "mad permission list-for-user --user-id bob"),
    Command("permission check-access", "tell whether a user has a permission", MadClient.check_access,
            (OF_USER, OF_PERMISSION), said, "mad permission check-access --user-id bob --permission-id door.open",
            shape=verdict),

    # -- client --
    Command("client create", "register a client; a secret nobody chose is made and shown once", client_create, (
        Option("client-id", "its public identifier", required=True, metavar="ID"), NEW_SECRET,
        Option("gen-password", "make a secret of this length here", "number", least=8),
        Option("public", "a client that cannot keep a secret, such as a browser application", "flag"),
        Option("display-name", "what people read"),
        Option("audience", "audience of its tokens (microauthd)"),
        Option("grant", "a grant type it may use, one or more", "list"),
        Option("scope", "the name of a scope it may ask for, one or more", "list", metavar="NAME"),
        Option("introspect", "may introspect tokens of other clients", "flag"),
        *SERVER,
    ), with_secret(line("created client {client_id} with id {id}")),
        "mad client create --client-id sensor --grant client_credentials --scope read", local=True),
    Command("client list", "list the clients", MadClient.list_clients, (), CLIENTS, "mad client list"),
    Command("client get", "show a client", MadClient.get_client, (CLIENT_ID,), CLIENT, "mad client get --id sensor"),
    Command("client update", "change a client", MadClient.update_client, (
        CLIENT_ID, Option("client-id", "new public identifier", metavar="ID"),
        Option("display-name", "what people read"), Option("audience", "audience of its tokens"),
        Option("is-active", "whether it may get tokens", "flag"),
        *CLIENT_RIGHTS,
    ), CLIENT, "mad client update --id sensor --display-name 'Sensor 1'", at_least_one=True),
    Command("client change-secret", "give a client a new secret; one is made unless given",
            MadClient.change_client_secret, (
        CLIENT_ID, Option("secret", "better from stdin: an argument is visible to every process", "secret",
                          stdin="secret-stdin", dest="new_secret"),
        Option("overlap", "how long the old secret keeps working", "number", dest="overlap_seconds", metavar="SECONDS",
               least=0),
    ), lambda row: ["the new secret, shown this once: " + plain(row["message"])],
        "mad client change-secret --id sensor --overlap 3600", quiet=said),
    Command("client delete", "delete a client and end its sessions", MadClient.delete_client, (CLIENT_ID,), said,
            "mad client delete --id sensor", danger="id"),
    Command("client secrets", "list the secrets of a client: since when and until when they work",
            MadClient.list_client_secrets, (CLIENT_ID,), table("secrets", "id", "created_at", "expires_at"),
            "mad client secrets --id sensor"),
    Command("client delete-secret", "make a secret of a client work no more", MadClient.delete_client_secret, (
        CLIENT_ID, Option("secret-id", "its id, of mad client secrets", required=True, metavar="ID"),
    ), said, "mad client delete-secret --id sensor --secret-id 0b9c7f0e-5a1c-4f61-9e0e-3f8b8f0f4a11", danger=""),
    Command("client revoke", "end everything issued to a client", MadClient.revoke_client, (CLIENT_ID,), said,
            "mad client revoke --id sensor", danger=""),
    Command("client add-redirect-uri", "allow a client a redirect URI", MadClient.add_redirect_uri, (CLIENT_ID, URI),
            line("added {redirect_uri} with id {id}"),
            "mad client add-redirect-uri --id app --uri https://app.example/callback"),
    Command("client list-redirect-uris", "list the redirect URIs of a client", MadClient.list_redirect_uris,
            (OF_CLIENT,), REDIRECT_URIS, "mad client list-redirect-uris --client-id app"),
    Command("client delete-redirect-uri", "remove a redirect URI", MadClient.delete_redirect_uri, (
        Option("client-id", "the client, needed when the URI is given instead of its id", of="clients"),
        Option("id", "its id, or the URI itself", required=True, metavar="ID|URI",
               within=("client-id", MadClient.list_redirect_uris, ("redirect_uri", "uri"))),
    ), said, "mad client delete-redirect-uri --client-id app --id https://app.example/callback", danger=""),
    *of_client("post-logout-uri", "a URI to send people to after logout", (
        MadClient.add_post_logout_uri, MadClient.list_post_logout_uris, MadClient.delete_post_logout_uri),
        "https://app.example/bye"),
    *of_client("cors-origin", "an origin whose pages may call AUTH as this client", (
        MadClient.add_cors_origin, MadClient.list_cors_origins, MadClient.delete_cors_origin), "https://app.example"),
    Command("client list-flags", "list the features of a client and their values", MadClient.list_flags, (OF_CLIENT,),
            lambda flags: FLAGS([{"flag": name} | value for name, value in flags.items()]),
            "mad client list-flags --client-id app", quiet=lambda flags: [plain(name) for name in flags]),
    Command("client set-flag", "switch a feature of a client", MadClient.set_flag, (
        OF_CLIENT, FLAG, Option("enable", "true or false", "flag", required=True, dest="enabled"),
    ), said, "mad client set-flag --client-id app --flag ENABLE_TOTP --enable true"),
    Command("client get-flag", "tell whether a feature is on", MadClient.get_flag, (OF_CLIENT, FLAG),
            lambda enabled: ["enabled" if enabled else "disabled"],
            "mad client get-flag --client-id app --flag ENABLE_TOTP"),
    Command("client set-flag-options", "set the value of a feature", MadClient.set_flag_options, (
        OF_CLIENT, FLAG, Option("options", "the value", required=True, metavar="VALUE"),
    ), said, "mad client set-flag-options --client-id app --flag TOKEN_EXPIRATION --options 600"),
    Command("client get-flag-options", "show the value of a feature", MadClient.get_flag_options, (OF_CLIENT, FLAG),
            lambda text: [plain(text) or "(none)"],
            "mad client get-flag-options --client-id app --flag TOKEN_EXPIRATION"),
    Command("client add-idp", "add an external identity provider", MadClient.add_idp, (CLIENT_ID, *IDP),
            line("added {provider_key} with id {id}"),
            "mad client add-idp --id app --provider-key google --display-name Google "
            "--issuer https://accounts.google.com --external-client-id 123"),
    Command("client update-idp", "change an external identity provider", MadClient.update_idp,
            (CLIENT_ID, IDP_ID, *IDP), line("updated {provider_key}"),
            "mad client update-idp --id app --idp-id google --provider-key google --display-name Google "
            "--issuer https://accounts.google.com --external-client-id 123"),
    Command("client list-idps", "list the external identity providers", MadClient.list_idps, (CLIENT_ID,),
            table("external providers", *IDPS), "mad client list-idps --id app"),
    Command("client get-idp", "show an external identity provider", MadClient.get_idp, (CLIENT_ID, IDP_ID),
            fields(*IDPS, "client_identifier", "scopes", "created_at"), "mad client get-idp --id app --idp-id google"),
    Command("client delete-idp", "remove an external identity provider", MadClient.delete_idp, (CLIENT_ID, IDP_ID),
            said, "mad client delete-idp --id app --idp-id google", danger=""),
    Command("client assign-scope", "let a client ask for scopes", MadClient.assign_scopes_to_client,
            (OF_CLIENT, OF_SCOPES), said, "mad client assign-scope --client-id sensor --scope-id read write"),
    Command("client list-scopes", "list the scopes of a client", MadClient.list_scopes_of_client, (OF_CLIENT,), SCOPES,
            "mad client list-scopes --client-id sensor"),
    Command("client remove-scope", "take a scope from a client", MadClient.remove_scope_from_client,
            (OF_CLIENT, OF_SCOPE), said, "mad client remove-scope --client-id sensor --scope-id write"),

    # -- scope --
    Command("scope create", "create a scope", MadClient.create_scope, (NAME, DESCRIPTION),
            line("created scope {name} with id {id}"), "mad scope create --name read --description 'read the meters'"),
    Command("scope update", "change a scope", MadClient.update_scope, (SCOPE_ID, RENAME, DESCRIPTION), SCOPE,
            "mad scope update --id read --description 'read all meters'", at_least_one=True),
    Command("scope list", "list the scopes", MadClient.list_scopes, (), SCOPES, "mad scope list"),
    Command("scope get", "show a scope", MadClient.get_scope, (SCOPE_ID,), SCOPE, "mad scope get --id read"),
    Command("scope delete", "delete a scope", MadClient.delete_scope, (SCOPE_ID,), said, "mad scope delete --id read",
            danger="id"),
    Command("scope assign-to-user", "give a user scopes", MadClient.assign_scopes_to_user, (OF_USER, OF_SCOPES), said,
            "mad scope assign-to-user --user-id bob --scope-id read write"),
    Command("scope list-for-user", "list the scopes of a user", MadClient.list_scopes_of_user, (OF_USER,), SCOPES,
            "mad scope list-for-user --user-id bob"),
    Command("scope remove-from-user", "take a scope from a user", MadClient.remove_scope_from_user, (OF_USER, OF_SCOPE),
            said, "mad scope remove-from-user --user-id bob --scope-id write"),
    Command("scope assign-to-client", "let a client ask for scopes", MadClient.assign_scopes_to_client,
            (OF_CLIENT, OF_SCOPES), said, "mad scope assign-to-client --client-id sensor --scope-id read write"),
    Command("scope list-for-client", "list the scopes of a client", MadClient.list_scopes_of_client, (OF_CLIENT,),
            SCOPES, "mad scope list-for-client --client-id sensor"),
    Command("scope remove-from-client", "take a scope from a client", MadClient.remove_scope_from_client,
            (OF_CLIENT, OF_SCOPE), said, "mad scope remove-from-client --client-id sensor --scope-id write"),

    Command("scope list-users", "list the users who have a scope", MadClient.list_users_of_scope, (SCOPE_ID,), USERS,
            "mad scope list-users --id read"),
    Command("scope list-clients", "list the clients that may ask for a scope", MadClient.list_clients_of_scope,
            (SCOPE_ID,), CLIENTS, "mad scope list-clients --id read"),

    # -- sessionctl, refreshtoken, audit --
    *of_sessions("sessionctl"),
    Command("refreshtoken list", "list the refresh tokens, newest first", MadClient.list_refresh_tokens, (),
            REFRESH_TOKENS, "mad refreshtoken list"),
    Command("refreshtoken list-by-user", "list the refresh tokens of a user", MadClient.list_refresh_tokens_of_user,
            (OF_USER,), REFRESH_TOKENS, "mad refreshtoken list-by-user --user-id bob"),
    Command("refreshtoken get", "show a refresh token", MadClient.get_refresh_token, (RECORD,),
            fields("id", "user_id", "client_id", "issued_at", "expires_at", "is_revoked"),
            "mad refreshtoken get --id 019344f2-c1d4-7a5b-9a4c-3e2d1f0a9b8c"),
    Command("refreshtoken revoke", "revoke a refresh token and the login it belongs to", MadClient.revoke_refresh_token,
            (RECORD,), said, "mad refreshtoken revoke --id 019344f2-c1d4-7a5b-9a4c-3e2d1f0a9b8c"),
    *(Command("refreshtoken " + verb, "delete the rows of old refresh tokens", MadClient.purge_refresh_tokens, PURGE,
              said, f"mad refreshtoken {verb} --older-than 86400 --expired", danger="")
      for verb in ("purge", "purge-refresh")),
    *of_audit("audit"),
    *of_audit("auditlog"),

    # -- backup --
    Command("backup", "make a backup of the whole box and fetch it", backup, (
        Option("file", "where to put it; the word after backup says it too", required=True, metavar="FILE"),
        Option("force", "write over a file that is there", "flag"),
        Option("without-keys", "leave keys and settings out: needed where the database is not encrypted", "flag"),
    ), line("{name}: {bytes} bytes, {users} users, {clients} clients"),
        "mad backup box.backup", verb=True, word="file", quiet=lambda made: [plain(made.get("name"))]),

    # -- token, completion --
    Command("token", "take a JWT apart, without verifying it", token_inspect, (JWT,), show_token,
            "mad token get | mad token --token -", local=True),
    Command("token revoke", "end a token", MadClient.revoke_token, (JWT,), said, "mad token revoke --token -"),
    Command("token get", "print an access token for a machine client, cached while it lasts", token_get, (
        Option("auth-url", "address of the AUTH server"), Option("client-id", "the client", metavar="ID"),
        Option(None, "read the client secret from standard input", "secret", stdin="secret-stdin", dest="secret"),
        Option("scope", "what to ask for, separated by blanks"),
        Option("no-cache", "neither use nor keep a cached token", "flag"),
    ), show_access_token,
        "curl -H \"Authorization: Bearer $(mad token get --scope read)\" https://api.example/meters", local=True,
        quiet=show_access_token),
    Command("completion bash", "print the completion script for bash", completion("bash"), (), show_script,
            "mad completion bash > ~/.local/share/bash-completion/completions/mad", local=True, quiet=show_script),
    Command("completion zsh", "print the completion script for zsh", completion("zsh"), (), show_script,
            "mad completion zsh > ~/.zfunc/_mad", local=True, quiet=show_script),
    Command("completion fish", "print the completion script for fish", completion("fish"), (), show_script,
            "mad completion fish > ~/.config/fish/completions/mad.fish", local=True, quiet=show_script),
)


# == Main ======================================================================

NOT_PARAMETERS = {"admin-url", "admin-token", "auth-url"}  # These say where and as whom, and are the Shell's.


def run(command: Command, shell: Shell):
    """Do what a command says and return its result."""
    client = None if command.local else shell.client()
    parameters: dict[str, Any] = {}
    parts = []
    for option in command.options:
        if option.name in NOT_PARAMETERS:
            continue
        value = shell.secret(option) if option.kind == "secret" else shell.values.get(option.name)
        if value is None:
            continue
        if option.kind == "token" and value == "-":
            value = read_secret(f"--{option.name} -")
        if option.choices:
            value = value.lower()
        if option.of and client:
            value = ([shell.resolve(client, option, item) for item in value] if isinstance(value, list)
                     else shell.resolve(client, option, value))
        if option.within:
            parts.append(option)
        parameters[option.dest] = value
    if client:
        for option in parts:
            whole = next((parameters.get(one.dest) for one in command.options if one.name == option.within[0]), None)
            parameters[option.dest] = shell.resolve_within(client, option, parameters[option.dest], whole)
    call = getattr(command.call, "pages", command.call)
    result = call(*([shell] if command.local or command.verb else []), *([client] if client else []), **parameters)
    return command.shape(result) if command.shape else result


def show_result(command: Command, shell: Shell, result) -> int:
    """Print a result in the form that is asked for. Return the exit status it means."""
    if command.flows:
        page_lines = documents if shell.json else (command.quiet or ids) if shell.quiet else command.show
        for page in result:
            for text in page_lines(page):
                print(text)
            sys.stdout.flush()
    elif command.is_list and shell.json:
        # As text, a fifth of what the objects would take; only once all of it is there is it the one document.
        texts = [document(page)[1:-1] for page in result]
        sys.stdout.write("[")
        for number, text in enumerate(texts):
            sys.stdout.write("," + text if number and text else text)
        print("]")
    elif command.is_list:
        lines = ((text for page in result for text in (command.quiet or ids)(page)) if shell.quiet
                 else command.show.lines(row for page in result for row in page))
        for text in lines:
            print(text)
    elif shell.json:
        print(document(result))
    else:
        is_bad = isinstance(result, dict) and result.get("success") is False
        for text in (command.quiet or ids)(result) if shell.quiet else [] if is_bad else command.show(result):
            print(text)
        if is_bad:
            tell("error", result.get("message", ""))
    return REFUSED if isinstance(result, dict) and result.get("success") is False else DONE


def _fail(as_json: bool, exit_status: int, error: str, messages, errors: dict | None = None, hint: str = "") -> int:
    if as_json:
        refusal = {"success": False, "message": "; ".join(messages), "error": error}
        if errors:
            refusal["errors"] = errors
        print(document(refusal))
    for message in messages:
        tell("error", message)
    for name, text in (errors or {}).items():
        tell("error", f"{name}: {text}")
    if hint:
        tell("hint", hint)
    return exit_status


def _run_command(command: Command, words: list[str]) -> int:
    parsed = parse(command, words)
    if parsed.wants_help:
        print(help_noun(COMMANDS, command.name) if " " not in command.name else help_command(command))
        return DONE
    if parsed.errors:
        return _fail("--json" in words or parsed.values.get("json", False), USAGE, "usage", parsed.errors,
                     hint=parsed.hint or f"see: mad {command.name} --help")
    shell = Shell(parsed.values, COMMANDS)
    try:
        shell.confirm(command)
        return show_result(command, shell, run(command, shell))
    except Refusal as problem:
        return _fail(shell.json, problem.exit_status, problem.error, problem.messages, hint=problem.hint)
    except MadError as problem:
        status = UNREACHABLE if isinstance(problem, Unreachable) else LOGIN if problem.status == 401 else REFUSED
        hint = problem.hint
        if not hint and status == LOGIN and command.call not in (session_login, token_get):
            hint = "log in with: mad session login"
        return _fail(shell.json, status, problem.error, [problem.message], problem.errors, hint)
    except BadValue as problem:
        return _fail(shell.json, USAGE, "usage", [str(problem)])
    except UnicodeEncodeError:
        return _fail(shell.json, USAGE, "usage", ["a value in the environment is not valid UTF-8"])


def _dispatch(argv: list[str]) -> int:
    for place in (0, 1):
        if argv[place:] and len(argv[place]) > 1 and argv[place].startswith("@"):
            try:
                argv[place:place + 1] = words_in(argv[place][1:])
            except ValueError as problem:
                return _fail("--json" in argv, USAGE, "usage", [str(problem)])
    if not argv:
        print(help_overview(COMMANDS), file=sys.stderr)
        return USAGE
    if argv[0] in HELP_WORDS:
        print(help_overview(COMMANDS))
        return DONE
    if argv == ["--version"]:
        print(VERSION)
        return DONE
    by_name = {command.name: command for command in COMMANDS}
    noun, verb = argv[0], argv[1] if len(argv) > 1 else ""
    # Whether a list is in the plural is nothing to remember.
    if command := by_name.get(noun + " " + verb) or by_name.get(noun + " " + verb + "s"):
        return _run_command(command, argv[2:])
    if noun in by_name and by_name[noun].word:
        return _run_command(by_name[noun], argv[1:])
    as_json = "--json" in argv
    if noun not in nouns(COMMANDS):
        hint = "options stand after the command: mad <noun> <verb> [options]"
        if not noun.startswith("-"):
            guess = near(noun, nouns(COMMANDS))
            hint = f"did you mean mad {guess}?" if guess else "see: mad --help"
        return _fail(as_json, USAGE, "usage", [f"unknown command '{noun}'"], hint=hint)
    if verb and not verb.startswith(("-", "/")):
        guess = near(verb, [name.partition(" ")[2] for name in by_name if name.startswith(noun + " ")])
        return _fail(as_json, USAGE, "usage", [f"unknown command '{noun} {verb}'"],
                     hint=f"did you mean mad {noun} {guess}?" if guess else f"see: mad {noun} --help")
    if noun in by_name:
        return _run_command(by_name[noun], argv[1:])
    if verb in HELP_WORDS:
        print(help_noun(COMMANDS, noun))
        return DONE
    if verb:
        return _fail(as_json, USAGE, "usage", [f"mad {noun} needs a verb before its options"],
                     hint=f"see: mad {noun} --help")
    print(help_noun(COMMANDS, noun), file=sys.stderr)
    return USAGE


def main(argv: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # A poor locale must not turn a name into a crash.
    try:
        status = _dispatch(list(argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as problem:
        if sys.stdout is None or problem.filename is not None:
            raise
        # Whatever is left in the buffer has nowhere to go; the interpreter must not try again on its way out.
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            pass
        if isinstance(problem, BrokenPipeError):
            return DONE  # The reader, a `head` or a `grep -q`, has seen enough.
        tell("error", f"cannot write the answer: {problem.strerror}")
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
