#!/usr/bin/env python3
"""mad: the command line of microauthd, and the Python client that it is built on.

`mad <noun> <verb> [options]` sends one request to the ADMIN server, and one more before it for each name that is given
in place of an id. A command must start fast: it uses less than 35 ms of processor time. Therefore mad imports only the
standard library, neither argparse (7 ms) nor http.client (25 ms) nor contextlib (2 ms), and imports most modules in
the function that needs them.

Contents
  Vocabulary   default addresses, limits, exit statuses
  Errors       MadError (a request failed) and CommandError (mad refuses a command)
  Wire         one HTTP exchange on one connection
  Tokens       decoding a JWT without verifying it
  ApiClient    the base class of the two clients: requests and paginated lists
  AuthClient   a method for each request to AUTH
  MadClient    a method for each request to ADMIN
  Profile      the saved login and the token cache
  Arguments    Option, Command, ArgumentReader, parse()
  Output       tables and lines, with control characters escaped
  Help         help texts, rows for the manual and completion scripts, all generated from COMMANDS
  Context      what a running command can use: options, environment, profile, terminal
  Handlers     the commands that need more than one request
  Commands     COMMANDS, the table of all commands
  Main         main()
"""
from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # Type checkers take it for typing.TYPE_CHECKING, whose import would cost 5 ms.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, ParamSpec, TypedDict, Unpack

    P = ParamSpec("P")
    Sockets = tuple[tuple[str, frozenset[int] | None], ...]
    BoxAddress = tuple[str, str] | None  # the IP address of a box of this machine, and the file of its authority or ""

    class LimitParams(TypedDict, total=False):
        """Parameters of every list: `limit` is the number of rows over all pages."""
        limit: int | None

    class PageParams(LimitParams, total=False):
        """Parameters of a list that may be long: `offset` is the number of rows to skip."""
        offset: int | None

    class SortParams(PageParams, total=False):
        """Parameters of a list that can be sorted: `sort` names a member, with `-` before it for descending order."""
        sort: str | None

    class SearchParams(SortParams, total=False):
        """Parameters of a list that can be searched: `q` is the text to find."""
        q: str | None

# == Vocabulary ================================================================
# Constants that several sections use.

VERSION = "0.1.0"
ADMIN_URL = "http://localhost:9041"
AUTH_URL = "http://localhost:9040"
ADMIN_SOCKET = "admin.sock"        # in the folder where mad runs: beside the database
RUNTIME_FOLDER = "/run/microauthd"  # or in RuntimeDirectory= of the service
MARKS, MARKS_MAGIC = "tokens.marks", b"madmark1"  # beside the socket: see Marks
CONFIG_FILES = ("mad.conf", "/etc/microauthd/mad.conf")  # of a box on this machine, unless MAD_CONFIG names it

EXIT_OK, EXIT_REFUSED, EXIT_USAGE, EXIT_LOGIN, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_STATUSES = (
    (EXIT_OK, "done"),
    (
        EXIT_REFUSED,
        "refused by the server, found to be wrong by audit verify or client check-uri, or status says that something "
        "needs attention",
    ),
    (EXIT_USAGE, "bad usage; nothing was sent"),
    (EXIT_LOGIN, "not logged in: no token, or it expired or was not accepted"),
    (EXIT_UNREACHABLE, "no usable answer: connection, TLS, time-out, or not a microauthd"),
)
ENVIRONMENT = (
    ("MAD_ADMIN_URL", "address of the ADMIN server (" + ADMIN_URL + ")"),
    ("MAD_ADMIN_SOCKET", "its Unix socket, to be used alone; empty: none is used, also not one that is found"),
    ("MAD_ADMIN_TOKEN", "admin token to use instead of the saved login; MAD_ADMIN_TOKEN_FILE names its file"),
    ("MAD_AUTH_URL", "address of the AUTH server (" + AUTH_URL + ")"),
    ("MAD_CLIENT_ID", "client of mad token get"),
    ("MAD_CLIENT_SECRET", "its secret; MAD_CLIENT_SECRET_FILE names its file"),
    ("MAD_CA_FILE", "PEM file of the authorities to trust for https, instead of the system's"),
)

TIMEOUT = 30.0                    # seconds for a whole exchange, so that a server that drips bytes cannot extend it
MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_SECRET_BYTES = 64 * 1024      # the longest file or input line with a secret
PAGE_SIZE = 1000                  # the most rows that the server returns in one response
EXPORT_PAGE_SIZE = 5000           # rows of an export per request, about 3 MB
MAX_REQUEST_ID = 64               # characters of a request id that are shown; those of the server have 16
CACHE_MARGIN = 30                 # seconds a cached token must still be valid, so that it outlives its request


# == Errors ====================================================================
# MadError: a request failed. BadValue and CommandError: mad refuses to send one.

class MadError(Exception):
    """A request that failed.

    `status` is the HTTP status, or 0 without a response. `error` is the machine-readable code (`http_<status>` when
    the server names none), `message` a sentence, `errors` maps each bad member to a sentence, `hint` may be empty.
    `retry_after` is the number of seconds from Retry-After, or 0. `request_id` is the X-Request-Id of the response, by
    which the server's log and audit log name the request; "" without one.
    """

    def __init__(self, status: int, error: str, message: str, errors: dict | None = None, hint: str = "",
                 retry_after: int = 0, request_id: str = ""):
        super().__init__(status, error, message)
        self.status, self.error, self.message, self.errors, self.hint = status, error, message, errors or {}, hint
        self.retry_after, self.request_id = retry_after, request_id

    def __str__(self) -> str:
        return self.message


class Unreachable(MadError):
    """There is no usable response: `error` is `unreachable`, `timeout`, `untrusted` or `bad_answer`."""


class NoRoute(MadError):
    """The server has no such route (404 with `X-Not-Found: route`). The object that was asked for may well exist."""


class BadValue(ValueError):
    """A value that no request can carry: a blank id, an unusable URL, a token with characters that no token has."""


class CommandError(Exception):
    """mad itself refuses a command.

    `exit_status` is that of the process, `error` a machine-readable code, `messages` are one or more sentences, `hint`
    may be empty.
    """

    def __init__(self, exit_status: int, error: str, *messages: str, hint: str = ""):
        super().__init__(*messages)
        self.exit_status, self.error, self.messages, self.hint = exit_status, error, messages, hint


# == Wire ======================================================================
# HTTP/1.1 with one request per connection. Redirects are not followed and proxies are not used: either would send the
# bearer token to a third party.

class Url:
    """A parsed base URL.

    `host` has no brackets, `base` is the path without a trailing slash, `authority` is the value of the Host header,
    `text` is the normalized URL. Raises BadValue. RFC 3986 §3
    """

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
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = self.port == (443 if self.scheme == "https" else 80)
        self.authority = host if default else f"{host}:{self.port}"
        self.text = f"{self.scheme}://{self.authority}{self.base}"

    @property
    def is_loopback(self) -> bool:
        parts = self.host.split(".")
        return self.host in ("localhost", "::1") or (
            len(parts) == 4 and parts[0] == "127" and all(part.isdigit() for part in parts))


def _bad_response(message: str, hint: str = "is this the address of a microauthd?") -> Unreachable:
    return Unreachable(0, "bad_answer", message, hint=hint)


def _parse_status_line(line: str) -> int:
    """Return the status code. RFC 9112 §4"""
    version, _, rest = line.partition(" ")
    code = rest.partition(" ")[0]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isascii() and code.isdigit() and len(code) == 3):
        raise _bad_response("not an HTTP answer")
    return int(code)


def _parse_header_fields(lines: list[str]) -> dict[str, str]:
    """Return the header fields by lower-case name. The last value of a repeated field counts.

    Different values of Content-Length are malformed, because they leave the end of the body open. RFC 9112 §6.3
    """
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or (name == "content-length" and headers.get(name, value) != value):
            raise _bad_response("the head of the answer is malformed")
        headers[name] = value
    return headers


class ResponseReader:
    """Reads one HTTP response from a socket.

    `seconds_left` returns the time until the deadline of the exchange, or raises TimeoutError. Raises Unreachable when
    the response is malformed, incomplete or too long.
    """

    def __init__(self, connection, seconds_left: Callable[[], float]):
        self.connection, self.seconds_left, self.buffer = connection, seconds_left, bytearray()

    def receive(self) -> bool:
        """Call recv() once. Return False at the end of the stream."""
        self.connection.settimeout(self.seconds_left())
        octets = self.connection.recv(65536)
        self.buffer.extend(octets)
        return bool(octets)

    def fill(self, size: int) -> None:
        """Receive until the buffer holds `size` bytes."""
        if size > MAX_BODY_BYTES:
            raise _bad_response(f"the answer is longer than {MAX_BODY_BYTES >> 20} MiB")
        while len(self.buffer) < size:
            if not self.receive():
                raise _bad_response("the answer breaks off")

    def read_head(self) -> list[str]:
        """Remove the lines up to the first blank one from the buffer and return them."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if len(self.buffer) > MAX_HEADER_BYTES:
                raise _bad_response("the head of the answer is too long")
            if not self.receive():
                raise _bad_response("not an HTTP answer" if self.buffer
                                    else "the connection was closed without an answer")
        head = self.buffer[:end].decode("latin-1").split("\r\n")
        del self.buffer[:end + 4]
        return head

    def read(self) -> tuple[int, dict, bytes]:
        """Return status, header fields and body."""
        status = 0
        while status < 200:  # A 1xx response is interim; the final one follows. RFC 9110 §15.2
            head = self.read_head()
            status = _parse_status_line(head[0])
        headers = _parse_header_fields(head[1:])
        return status, headers, b"" if status in (204, 304) else self.read_body(headers)

    def read_body(self, headers: dict) -> bytes:
        """Return the body: chunked, of Content-Length, or up to the end of the stream. RFC 9112 §6.3"""
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise _bad_response("the answer has an unknown transfer encoding")
            return self.read_chunks()
        if (length := headers.get("content-length")) is not None:
            if not (length.isascii() and length.isdigit()) or len(length) > 18:
                raise _bad_response("the head of the answer is malformed")
            self.fill(int(length))
            return bytes(self.buffer[:int(length)])
        while self.receive():
            if len(self.buffer) > MAX_BODY_BYTES:
                self.fill(len(self.buffer))  # It refuses this size.
        return bytes(self.buffer)

    def read_chunks(self) -> bytes:
        """Return the body of a chunked response. Trailer fields are not read. RFC 9112 §7.1"""
        body = bytearray()
        while True:
            while (end := self.buffer.find(b"\r\n")) < 0:
                if len(self.buffer) > 1024 or not self.receive():
                    raise _bad_response("the answer breaks off")
            digits = bytes(self.buffer[:end]).split(b";")[0].strip()
            if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdefABCDEF"):
                raise _bad_response("the answer has a malformed chunk")
            size = int(digits, 16)
            del self.buffer[:end + 2]
            if size == 0:
                return bytes(body)
            # fill() refuses the first number; only the second one is ever waited for.
            self.fill(len(body) + size if len(body) + size > MAX_BODY_BYTES else size + 2)
            body += self.buffer[:size]
            if self.buffer[size:size + 2] != b"\r\n":
                raise _bad_response("the answer has a malformed chunk")
            del self.buffer[:size + 2]


def _wrap_in_tls(connection, host: str, ca_file: str | None, timeout: float, own_ca: str = ""):
    import ssl
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
        if own_ca and not ca_file:
            context.load_verify_locations(own_ca)
    except OSError as problem:
        connection.close()
        raise Unreachable(
            0, "untrusted", f"cannot read the authorities in {ca_file}: {problem.strerror or problem}") from None
    # From Python 3.13 on the default also refuses authorities that lack an extension of RFC 5280 §4.2.1, as many
    # private ones do. Signatures, name and dates are verified without it: one verdict under every Python.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    connection.settimeout(timeout)
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def _unreachable(url_text: str, problem: OSError) -> Unreachable:
    if type(problem).__module__ == "ssl":
        reason = getattr(problem, "verify_message", "") or getattr(problem, "reason", "") or str(problem)
        return Unreachable(0, "untrusted", f"no secure connection to {url_text}: {reason}", hint=(
            "name the authority that signed its certificate in MAD_CA_FILE" if hasattr(problem, "verify_message")
            else "does the server speak TLS on this port?"))
    return Unreachable(0, "unreachable", f"cannot reach {url_text}: {problem.strerror or problem}",
                       hint="is the server running, and is this its address?")


def connect_at_machine(path: str, trusted: frozenset[int] | None, timeout: float):
    """Return a connection to a Unix socket of this machine.

    Raises OSError, also if the process that listens there runs as none of the `trusted` uids: the kernel tells who it
    is (SO_PEERCRED, unix(7)), so that nobody else's socket is ever sent a password or a token.
    """
    import socket
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = None
    try:
        connection.settimeout(timeout)
        if len(os.fsencode(path)) > 107:  # sun_path has no more room; this name of the folder is short
            folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)
            path = f"/proc/self/fd/{folder}/{os.path.basename(path)}"
        connection.connect(path)
        uid = int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        if trusted is not None and uid not in trusted:
            raise PermissionError(1, "it belongs to somebody else")
        return connection
    except BaseException:
        connection.close()
        raise
    finally:
        if folder is not None:
            os.close(folder)


def connect(url: Url, sockets: Sockets, seconds_left: Callable[[], float], ca_file: str | None, box: BoxAddress = None):
    """Return a connection to the server, and whether it is one of the `sockets`. Raises OSError, Unreachable."""
    import socket
    for path, trusted in sockets:
        try:
            return connect_at_machine(path, trusted, seconds_left()), True
        except TimeoutError:
            raise
        except OSError as problem:
            if trusted is None:  # named by the user, who wants no other
                raise Unreachable(0, "unreachable", f"cannot reach {path}: {problem.strerror or problem}",
                                  hint="is the server running, and is this its socket?") from None
    # Bytes: Python passes a str through the IDNA codec, and loading its tables costs 3 ms.
    ip, own_ca = box or (url.host, "")
    address = ip.encode("ascii"), url.port
    connection = socket.create_connection(address, seconds_left())  # type: ignore[arg-type]
    if url.scheme == "https":
        connection = _wrap_in_tls(connection, url.host, ca_file, seconds_left(), own_ca)
    return connection, False


def exchange(url: Url, method: str, target: str, headers: dict, body: bytes | None,
             timeout: float, ca_file: str | None, sockets: Sockets = (),
             box: BoxAddress = None) -> tuple[int, dict, bytes]:
    """Send one request and return the status, the header fields by lower-case name, and the body of the response.

    `target` is the request target, already escaped. `sockets` are tried before the address: the path of each, and the
    uids whose socket it may be, or None for one that is used alone. `box` has the IP address of a box of this machine,
    whose name need not resolve, and the file of its own authority. Raises Unreachable, also when the exchange takes
    more than `timeout` seconds or the response is longer than MAX_HEADER_BYTES and MAX_BODY_BYTES allow.
    """
    from time import monotonic
    deadline = monotonic() + timeout

    def seconds_left() -> float:
        remaining = deadline - monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    url_text = url.text
    connection, is_local = None, False
    try:
        connection, is_local = connect(url, sockets, seconds_left, ca_file, box)
        # The port tells a server that was reached by its socket whether it is the one that is meant.
        host = f"[{url.host}]" if ":" in url.host else url.host
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}:{url.port}" if is_local else "Host: " + url.authority,
                 "Connection: close", "Accept: application/json", "User-Agent: mad/" + VERSION]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None or method != "GET":
            lines.append(f"Content-Length: {len(body) if body else 0}")
        connection.settimeout(seconds_left())
        try:
            connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + (body or b""))
        except (BrokenPipeError, ConnectionResetError):
            pass  # A server may respond and close before it has read the whole request; read that response.
        answer = ResponseReader(connection, seconds_left).read()
    except TimeoutError:
        raise Unreachable(0, "timeout", f"no answer from {url_text} within {timeout:g} seconds") from None
    except OSError as problem:
        raise _unreachable(url_text, problem) from None
    finally:
        if connection is not None:
            connection.close()
    if is_local and answer[0] == 421 and sockets[0][1] is not None:
        # It is the socket of another server of this machine, or not for this user. Nothing was done. RFC 9110 §15.5.20
        return exchange(url, method, target, headers, body, timeout, ca_file, box=box)
    return answer


def read_json(body: bytes):
    """Return the value of a JSON text. Raises ValueError, also for NaN, Infinity and too deep nesting. RFC 8259"""
    import json

    def refuse_constant(name):
        raise ValueError(name)
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# == Tokens ====================================================================
# Decoding only: the server verifies tokens.

def is_token(text: str) -> bool:
    """Whether an Authorization header can carry `text` as a bearer token (b64token). RFC 6750 §2.1"""
    return bool(text) and len(text) <= MAX_SECRET_BYTES and text.isascii() and all(
        ch.isalnum() or ch in "-._~+/=" for ch in text)


def decode_jwt(token: str) -> tuple[dict, dict, str]:
    """Return the header, the claims and the encoded signature of a compact JWS. Nothing is verified.

    Raises ValueError with a sentence. RFC 7515 §3.1
    """
    import binascii
    parts = token.split(".")
    if len(parts) != 3:
        raise ValueError(f"not a JWT: it has {len(parts)} parts instead of three")
    decoded = []
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
        decoded.append(value)
    return decoded[0], decoded[1], parts[2]


def format_utc(seconds: float, mark: str = "Z") -> str:
    """Return Unix seconds as `YYYY-MM-DD HH:MM:SS` followed by `mark`, or as digits when out of range."""
    import time
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + mark
    except (OverflowError, ValueError, OSError):
        return str(seconds)


# == ApiClient =================================================================
# The base class of AuthClient and MadClient. It uses no terminal, file or environment variable.

def _path(*parts: str) -> str:
    """Return a path of these segments, escaped.

    Raises BadValue for an empty segment, which would turn the path of one user into that of all users, and for a dot
    segment.
    """
    from urllib.parse import quote
    for part in parts:
        if not isinstance(part, str) or not part.strip() or part in (".", ".."):
            raise BadValue(f"an id or a name is needed here, not {part!r}")
    return "".join("/" + quote(part, safe="") for part in parts)


PICTURE_MAX = 40960  # octets of the picture of the brand


def _without_none(**members) -> dict:
    """Return the members that are not None: a PUT leaves the absent ones unchanged."""
    return {name: value for name, value in members.items() if value is not None}


def _flag(value: bool | None) -> str | None:
    """Return a flag as a query carries it."""
    return None if value is None else str(value).lower()


def is_uuid(text: str) -> bool:
    """Whether `text` is an id as the server generates them, and not a name."""
    parts = text.split("-")
    return [len(part) for part in parts] == [8, 4, 4, 4, 12] and not "".join(parts).strip("0123456789abcdefABCDEF")


def next_query(link: str) -> str | None:
    """Return the query string of the `rel="next"` target of a Link header, or None on the last page. RFC 8288 §3"""
    for part in link.split(","):
        target, _, parameters = part.strip().partition(">")
        names = [name.strip().lower().replace('"', "") for name in parameters.split(";")]
        if target.startswith("<") and "rel=next" in names and "?" in target:
            return target.partition("?")[2].partition("#")[0]
    return None


LIMIT_PARAMS = ("limit",)
PAGE_PARAMS = (*LIMIT_PARAMS, "offset")
SORT_PARAMS = (*PAGE_PARAMS, "sort")
SEARCH_PARAMS = (*SORT_PARAMS, "q")


def paged_list(*query_params: str) -> Callable[[Callable[P, Iterator[list[dict]]]], Callable[P, list[dict]]]:
    """Turn a method that yields pages into one that returns the rows of all pages in one list.

    The attribute `pages` of the result is the original method, `query_params` names the members of SearchParams that
    this list supports.
    """
    def decorate(method):
        def all_rows(self, *args, **parameters):
            return [row for page in method(self, *args, **parameters) for row in page]
        all_rows.__name__, all_rows.__qualname__ = method.__name__, method.__qualname__
        all_rows.__doc__ = method.__doc__
        all_rows.__wrapped__ = all_rows.pages = method  # type: ignore[attr-defined]
        method.__annotations__["return"] = "list[dict]"  # help() shows the signature of the wrapped method.
        all_rows.query_params = query_params  # type: ignore[attr-defined]
        return all_rows
    return decorate


def _error_of_response(status: int, headers: dict, body, with_token: bool) -> MadError:
    """Return the MadError for a response with a status of 400 or more.

    `body` is its JSON: an Err of ADMIN, or an error response of RFC 6749 §5.2.
    """
    if not isinstance(body, dict):
        if status in (502, 504):
            return Unreachable(status, "unreachable",
                               f"a gateway answers that the server cannot be reached ({status})")
        body = {}
    error = body.get("error")
    error = error if isinstance(error, str) and error else f"http_{status}"
    message = body.get("message") or body.get("error_description")
    if not isinstance(message, str):
        if status == 401 and with_token:
            message = "the token is not accepted"
        elif status == 429:
            message = "too many requests"
        else:
            message = f"the server answers {status} {'' if error.startswith('http_') else error}".strip()
    errors = body.get("errors")
    errors = {str(name): str(text) for name, text in errors.items()} if isinstance(errors, dict) else None
    retry_after = headers.get("retry-after", "")
    retry_after = retry_after if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10 else ""
    hint = f"try again in {retry_after} seconds" if retry_after else ""
    return MadError(status, error, message, errors, hint, int(retry_after or 0))


def _check_token_response(answer: dict) -> dict:
    """Return `answer` if it has a usable access_token."""
    token = answer.get("access_token")
    if not isinstance(token, str) or not is_token(token):
        raise _bad_response("the answer has no access token")
    return answer


def _encode_request(path: str, json, form: dict | None, query: dict | str | None) -> tuple[str, dict, bytes | None]:
    """Return the request target, the header fields that describe the body, and the body (None without one)."""
    headers, body = {}, None
    if query or form is not None:
        from urllib.parse import urlencode
        if query:
            path += "?" + (query if isinstance(query, str) else urlencode(query))
        if form is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urlencode(form).encode("ascii")
    if json is not None:
        from json import dumps
        headers["Content-Type"] = "application/json"
        body = dumps(json, separators=(",", ":")).encode("ascii")
    return path, headers, body


def _decode_response(status: int, headers: dict, octets: bytes, expected: type | tuple[type, ...], with_token: bool):
    """Return the JSON value of a successful response if its type is `expected`. Raises MadError otherwise."""
    if expected is bytes and status < 300:
        return octets
    try:
        value = read_json(octets) if octets else None
    except ValueError:
        value = octets  # No JSON value is bytes, so the type check below refuses it.
    if status >= 400:
        raise _error_of_response(status, headers, value, with_token)
    if expected is dict and status == 204:
        return {"success": True, "message": ""}
    if expected is dict and isinstance(value, dict) and value.get("success") is False:
        raise _error_of_response(status, headers, value, False)
    is_expected = isinstance(value, expected)
    if expected is list:
        is_expected = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if not is_expected:
        raise _bad_response("the answer is not the JSON it should be")
    return value


class Response:
    """A successful response: `status`, `headers` by lower-case name, `value` of its JSON."""
    __slots__ = ("headers", "status", "value")

    def __init__(self, status: int, headers: dict, value):
        self.status, self.headers, self.value = status, headers, value


class ApiClient:
    """Sends requests to the server at `url`, authenticated by the bearer `token` if there is one.

    `sockets` of the machine are tried before that address, and `box` is where it is, as exchange() does.
    """

    sockets: Sockets = ()
    box: BoxAddress = None

    def __init__(self, url: str, token: str | None, ca_file: str | None, timeout: float | None):
        self.url, self.token = url, token
        self.ca_file, self.timeout = ca_file, TIMEOUT if timeout is None else timeout

    def send(self, method: str, path: str, *, json=None, form: dict | None = None, query: dict | str | None = None,
             expected: type | tuple[type, ...] = dict, anonymous: bool = False,
             headers: dict | None = None) -> Response:
        """Send a request and return the Response.

        Its JSON must have the type `expected`; with `bytes` the body is returned unparsed. `path` is already escaped.
        The bearer token is sent unless `anonymous`. Use it where no method fits, for example for an update that must
        not overwrite a concurrent one:

            etag = admin.send("GET", "/users/" + id).headers["etag"]
            admin.send("PUT", "/users/" + id, json={"email": email}, headers={"If-Match": etag})  # or 412
        """
        url = Url(self.url)
        target, all_headers, body = _encode_request(path, json, form, query)
        all_headers = {**(headers or {}), **all_headers}
        with_token = bool(self.token) and not anonymous
        if with_token:
            if not is_token(self.token or ""):
                raise BadValue("the token has characters no token has")
            all_headers["Authorization"] = "Bearer " + (self.token or "")
        if any(not (text.isascii() and text.isprintable()) for item in all_headers.items() for text in item):
            raise BadValue("a header has characters no header has")
        status, received, octets = exchange(url, method, url.base + target, all_headers, body, self.timeout,
                                            self.ca_file, self.sockets, self.box)
        try:
            if 300 <= status < 400:
                raise Unreachable(status, "bad_answer", f"{url.text} redirects elsewhere, which is not followed",
                                  hint="give the address it leads to, if you trust it")
            if status == 404 and received.get("x-not-found") == "route":
                raise NoRoute(404, "not_found", f"this server has no {method} {path}",
                              hint="is it older than this mad, or is the feature switched off there?")
            value = _decode_response(status, received, octets, expected, with_token)
        except MadError as problem:
            problem.request_id = received.get("x-request-id", "")[:MAX_REQUEST_ID]
            raise
        return Response(status, received, value)

    def request(self, method: str, path: str, **arguments):
        """Send a request as `send` does and return only the value of its JSON."""
        return self.send(method, path, **arguments).value

    def pages(self, path: str, query: dict | None = None, *, limit: int | None = None, offset: int | None = None,
              q: str | None = None, sort: str | None = None, page_size: int | None = None) -> Iterator[list[dict]]:
        """Yield a list of objects page by page, at most `limit` rows; without a limit, or with a negative one, all.

        `page_size` is for a list whose pages are small unless more is asked for. A page may be empty though others
        follow: the server searches a long list in parts.
        """
        if limit == 0:
            raise BadValue("a limit is at least 1; a negative one means all")
        rows_left = limit if limit is not None and limit > 0 else None
        page_query: dict | str | None = _without_none(
            **(query or {}), limit=page_size if rows_left is None else min(rows_left, PAGE_SIZE), offset=offset, q=q,
            sort=sort)
        seen_queries = set()
        while True:
            answer = self.send("GET", path, query=page_query, expected=list)
            rows = answer.value if rows_left is None else answer.value[:rows_left]
            # Use only the query of the link: following its authority would send the token to another server.
            page_query = next_query(answer.headers.get("link", ""))
            yield rows
            if rows_left is not None:
                rows_left -= len(rows)
            if not page_query or rows_left == 0:
                return
            if page_query in seen_queries:
                raise _bad_response("the pages of the list go round in a circle", hint="")
            seen_queries.add(page_query)

    def each(self, method, *args, **parameters) -> Iterator[dict]:
        """Yield the rows of a list one by one, with only one page of them in memory.

            for user in admin.each(admin.list_users, q="ann"): ...
        """
        for page in method.__func__.pages(self, *args, **parameters):
            yield from page


# == AuthClient ================================================================
# A method for each request to AUTH.

class AuthClient(ApiClient):
    """The AUTH API of a microauthd, as its clients use it. MadClient is the ADMIN API.

        auth = AuthClient("http://localhost:9040", "app", secret)
        answer = auth.password_login("bob", password, scope="openid email")
        auth.token = answer["access_token"]     # the bearer of userinfo, me, sessions, logout …
        auth.userinfo()["email"]

    `client_id` and `client_secret` authenticate the client where AUTH requires it: by HTTP Basic, or as a public
    client when there is no secret. `token` is the bearer token of the other requests; only the caller sets it. Objects
    are those of MadClient, and Token: `access_token token_type expires_in scope jti`, with `refresh_token` and
    `id_token` if the server issued them. The errors are those of MadClient; at the OAuth endpoints `error` is a code
    of RFC 6749 §5.2.
    """

    def __init__(self, auth_url: str = AUTH_URL, client_id: str | None = None, client_secret: str | None = None, *,
                 token: str | None = None, ca_file: str | None = None, timeout: float | None = None):
        super().__init__(auth_url, token, ca_file, timeout)
        self.client_id, self.client_secret = client_id, client_secret

    @property
    def auth_url(self) -> str:
        return self.url

    def _as_client(self, path: str, **form) -> dict:
        """POST a form with the client's authentication: HTTP Basic, or `client_id` alone for a public client.

        RFC 6749 §2.3.1
        """
        form, headers = _without_none(**form), {}
        if not self.client_id:
            raise BadValue("a client_id is needed here")
        if self.client_secret is None:
            form["client_id"] = self.client_id
        else:
            from binascii import b2a_base64
            from urllib.parse import quote_plus
            # RFC 6749 §2.3.1 form-encodes both before they are joined; otherwise a colon would split them elsewhere.
            pair = quote_plus(self.client_id) + ":" + quote_plus(self.client_secret)
            headers["Authorization"] = "Basic " + b2a_base64(pair.encode("ascii"), newline=False).decode("ascii")
        return self.request("POST", path, form=form, headers=headers, anonymous=True)

    # -- metadata --

    def discovery(self) -> dict:
        """GET /.well-known/openid-configuration. Return the metadata of OpenID Connect Discovery §3."""
        return self.request("GET", "/.well-known/openid-configuration", anonymous=True)

    def jwks(self) -> dict:
        """GET /jwks.json. Return {"keys": […]}, the public keys of AUTH. RFC 7517 §5."""
        return self.request("GET", "/jwks.json", anonymous=True)

    # -- tokens --

    def client_credentials(self, scope: str | None = None) -> dict:
        """POST /token. Return Token, for the client itself. RFC 6749 §4.4."""
        return _check_token_response(self._as_client("/token", grant_type="client_credentials", scope=scope or None))

    def password_login(self, username: str, password: str, scope: str | None = None, totp: str | None = None) -> dict:
        """POST /token. Return Token, for a user. A failed login is 403, whatever was wrong. RFC 6749 §4.3."""
        return _check_token_response(self._as_client("/token", grant_type="password", username=username,
                                                     password=password, scope=scope, totp=totp))

    def exchange_code(self, code: str, redirect_uri: str, code_verifier: str | None = None) -> dict:
        """POST /token. Return Token, for the code that came to `redirect_uri`. RFC 6749 §4.1.3, RFC 7636 §4.5."""
        return _check_token_response(self._as_client("/token", grant_type="authorization_code", code=code,
                                                     redirect_uri=redirect_uri, code_verifier=code_verifier))

    def refresh(self, refresh_token: str, scope: str | None = None) -> dict:
        """POST /token. Return Token with a new `refresh_token`; the old one only serves a retry. RFC 6749 §6."""
        return _check_token_response(self._as_client("/token", grant_type="refresh_token", refresh_token=refresh_token,
                                                     scope=scope))

    def introspect(self, token: str) -> dict:
        """POST /introspect. Return the claims with `active` true, or {"active": false}. RFC 7662 §2."""
        answer = self._as_client("/introspect", token=token)
        if not isinstance(answer.get("active"), bool):
            raise _bad_response("the answer is not the JSON it should be")
        return answer

    def revoke(self, token: str) -> dict:
        """POST /revoke. Return Msg, also for an unknown token. A refresh token's family ends too. RFC 7009 §2."""
        return self._as_client("/revoke", token=token)

    # -- the user of the token --

    def userinfo(self) -> dict:
        """GET /userinfo. Return the claims the scopes of the token open. OpenID Connect Core §5.3."""
        return self.request("GET", "/userinfo")

    def me(self) -> dict:
        """GET /me. Return {sub, email, roles, scopes}."""
        return self.request("GET", "/me")

    @paged_list(*PAGE_PARAMS)
    def list_my_sessions(self, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /me/sessions. Return [Session], newest first."""
        return self.pages("/me/sessions", **search)

    @paged_list(*PAGE_PARAMS)
    def list_my_refresh_tokens(self, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
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

    @paged_list(*SEARCH_PARAMS)
    def list_users(self, **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /users. Return [User]. Scope admin:list_users."""
        return self.pages("/users", **search)

    def get_user(self, id: str) -> dict:
        """GET /user/{id}. Return User. Scope admin:read_user."""
        return self.request("GET", _path("user", id))

    def reset_password(self, id: str, new_password: str) -> dict:
        """POST /user/{id}/reset. Return Msg. Scope admin:reset_passwords."""
        return self.request("POST", _path("user", id, "reset"), json={"new_password": new_password})

    def deactivate_user(self, id: str) -> dict:
        """POST /user/{id}/deactivate. Return Msg. Scope admin:deactivate_users."""
        return self.request("POST", _path("user", id, "deactivate"))


# == MadClient =================================================================
# A method for each request to ADMIN.

class MadClient(ApiClient):
    """The ADMIN API of a microauthd. The method `auth` returns an AuthClient for its AUTH API.

        admin = MadClient("http://localhost:9041")
        admin.token = admin.login("alice", password)["access_token"]
        admin.create_user("bob", "bob@example.org", "correct horse")
        token = admin.auth("sensor", secret).client_credentials()["access_token"]

    Every method sends one request on a connection of its own; a list takes one request per 1,000 rows. Threads may
    share an instance. Objects are dicts with the members of the wire:

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

    Where a method takes an id, the server also accepts the name of an object that has one; `find_id` looks up an id by
    name. Timestamps are ISO 8601 in UTC. Every `list_` method takes `limit` (the number of rows), those of long lists
    also `offset`, those of users, roles, permissions, scopes and clients also `q` (text to find) and `sort` (a member,
    with `-` before it for descending order). It fetches all pages and returns one list; `each` yields the same rows
    without keeping them in memory.

    Raises MadError when the server refuses a request, its subclass Unreachable when there is no usable response, its
    subclass NoRoute when the server lacks the route, and BadValue for a blank id or an unusable URL. Redirects are not
    followed, and proxies are not used.
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
        """Return an AuthClient for the AUTH server of this microauthd. Sends nothing."""
        return AuthClient(self.auth_url, client_id, client_secret, token=token, ca_file=self.ca_file,
                          timeout=self.timeout)

    # -- login --

    def login(self, username: str, password: str, totp: str | None = None) -> dict:
        """POST /token. Return Token: `access_token`, `token_type`, `expires_in`, `jti`. A failed login is 403."""
        form = _without_none(username=username, password=password, client_id="mad", totp=totp)
        token = self.request("POST", "/token", form=form, anonymous=True)
        return _check_token_response(token)

    def logout(self) -> dict:
        """POST /logout. Return Msg. The token is revoked."""
        return self.request("POST", "/logout")

    def find_id(self, collection: str, name: str) -> str:
        """GET /{collection}/id-by-name/{name}. Return the id; an unknown name is 404.

        `collection` is users, roles, permissions, scopes or clients.
        """
        answer = self.request("GET", _path(collection, "id-by-name", name), expected=(dict, str))
        object_id = answer if isinstance(answer, str) else answer.get("result")
        if not isinstance(object_id, str) or not object_id:
            raise _bad_response("the answer is not the JSON it should be")
        return object_id

    # -- users --

    def create_user(self, username: str, email: str, password: str, email_verified: bool | None = None) -> dict:
        """POST /users. Return the new User. Not verified when None."""
        return self.request("POST", "/users", json=_without_none(
            username=username, email=email, password=password, email_verified=email_verified))

    @paged_list(*SEARCH_PARAMS)
    def list_users(self, is_active: str | None = None, is_admin: bool | None = None, locked: bool | None = None,
                   totp: bool | None = None, role: str | None = None, unused_since: str | None = None,
                   **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /users. Return [User]. `is_active`: "true" (when None), "false" or "all".

        `unused_since` is a date-time: those who did not log in since then.
        """
        return self.pages("/users", _without_none(
            is_active=is_active, is_admin=_flag(is_admin), locked=_flag(locked), totp=_flag(totp), role=role,
            unused_since=unused_since), **search)

    def get_user(self, id: str) -> dict:
        """GET /users/{id}. Return User."""
        return self.request("GET", _path("users", id))

    def make_recovery_codes(self, id: str) -> dict:
        """POST /users/{id}/recovery-codes. Return {recovery_codes}, which cannot be read again; others are void."""
        return self.request("POST", _path("users", id, "recovery-codes"))

    def update_user(self, id: str, username: str | None = None, email: str | None = None,
                    is_active: bool | None = None) -> dict:
        """PUT /users/{id}. Return User. A member that is None stays unchanged."""
        return self.request("PUT", _path("users", id),
                            json=_without_none(username=username, email=email, is_active=is_active))

    def verify_email(self, id: str) -> dict:
        """POST /users/{id}/verify-email. Return Msg."""
        return self.request("POST", _path("users", id, "verify-email"))

    def reset_password(self, id: str, new_password: str) -> dict:
        """POST /users/{id}/reset. Return Msg."""
        return self.request("POST", _path("users", id, "reset"), json={"new_password": new_password})

    def deactivate_user(self, id: str) -> dict:
        """POST /users/deactivate/{id}. Return Msg. Ends the sessions of the user."""
        return self.request("POST", _path("users", "deactivate", id))

    def activate_user(self, id: str) -> dict:
        """POST /users/{id}/activate. Return Msg."""
        return self.request("POST", _path("users", id, "activate"))

    def delete_user(self, id: str) -> dict:
        """DELETE /users/{id}. Return Msg. This cannot be undone."""
        return self.request("DELETE", _path("users", id))

    def set_lockout(self, id: str, lockout_until: str, reason: str | None = None) -> dict:
        """POST /users/{id}/set-lockout. Return Msg. `lockout_until` is ISO 8601 in UTC; 9999 is for ever."""
        return self.request("POST", _path("users", id, "set-lockout"),
                            json=_without_none(lockout_until=lockout_until, reason=reason))

    def clear_lockout(self, id: str) -> dict:
        """POST /users/{id}/clear-lockout. Return Msg."""
        return self.request("POST", _path("users", id, "clear-lockout"))

    def verify_password(self, user: str, password: str, totp: str | None = None) -> dict:
        """POST /users/verify-password. Return {valid, user_id, email, totp_required}; a wrong password is 403.

        `user` is an id or a name. No session is created, and a wrong password counts towards the lockout.
        """
        identifier = {"user_id" if is_uuid(user) else "username": user}
        return self.request("POST", "/users/verify-password",
                            json=identifier | _without_none(password=password, totp=totp))

    def create_user_without_password(self, username: str, email: str, email_verified: bool | None = None) -> dict:
        """POST /users. Return the new User, whose password nobody knows: `invite_user` makes a link to choose one."""
        return self.request("POST", "/users", json=_without_none(
            username=username, email=email, email_verified=email_verified, without_password=True))

    def invite_user(self, id: str, purpose: str = "invite") -> dict:
        """POST /users/{id}/invitations. Return {id, user_id, purpose, created_by, created_at, expires_at, url}.

        Whoever has `url` chooses the password of the user, once within 24 hours; it cannot be read again. It replaces
        an earlier one. `purpose` is invite, which also offers a second factor, or reset.
        """
        return self.request("POST", _path("users", id, "invitations"), json={"purpose": purpose})

    @paged_list(*LIMIT_PARAMS)
    def list_invitations_of_user(self, id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /users/{id}/invitations. Return [Invitation]: the living one, without its link."""
        return self.pages(_path("users", id, "invitations"), **search)

    def delete_invitation(self, id: str) -> dict:
        """DELETE /invitations/{id}. Return Msg."""
        return self.request("DELETE", _path("invitations", id))

    def revoke_user(self, id: str) -> dict:
        """POST /users/{id}/revoke. Return Msg. Ends every session, token and login of the user."""
        return self.request("POST", _path("users", id, "revoke"))

    @paged_list(*LIMIT_PARAMS)
    def list_consents_of_user(self, id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /users/{id}/consents. Return [{client_id, display_name, scopes, given_at}]."""
        return self.pages(_path("users", id, "consents"), **search)

    def revoke_consent(self, id: str, client_id: str) -> dict:
        """DELETE /users/{id}/consents/{client_id}. Return Msg. Ends the logins of the user at the client."""
        return self.request("DELETE", _path("users", id, "consents", client_id))

    def generate_totp(self, id: str, client_id: str | None = None, qr_output_path: str = ".") -> dict:
        """POST /users/{id}/totp/generate. Return TotpQr: `success`, `filename`. The server writes the file."""
        return self.request("POST", _path("users", id, "totp", "generate"),
                            json=_without_none(user_id=id, client_id=client_id, qr_output_path=qr_output_path))

    def enroll_totp(self, id: str, client_id: str | None = None) -> dict:
        """POST /users/{id}/totp/enroll. Return {success, otpauth_uri, secret, svg}, which cannot be read again.

        Logins need a code as soon as `verify_totp` has accepted the first one.
        """
        return self.request("POST", _path("users", id, "totp", "enroll"), json=_without_none(client_id=client_id))

    def verify_totp(self, user_id: str, code: str, client_id: str | None = None) -> dict:
        """POST /users/totp/verify. Return Msg. A wrong code is 403."""
        return self.request("POST", "/users/totp/verify",
                            json=_without_none(user_id=user_id, client_id=client_id, code=code))

    def disable_totp(self, user_id: str, client_id: str | None = None) -> dict:
        """POST /users/{user_id}/disable-totp. Return Msg."""
        client = [] if client_id is None else [client_id]
        return self.request("POST", _path("users", user_id, *client, "disable-totp"))

    # -- roles --

    def create_role(self, name: str, description: str = "", is_privileged: bool | None = None) -> dict:
        """POST /roles. Return the new Role."""
        members = _without_none(name=name, description=description, is_privileged=is_privileged)
        return self.request("POST", "/roles", json=members)

    def update_role(self, id: str, name: str | None = None, description: str | None = None,
                    is_privileged: bool | None = None) -> dict:
        """PUT /roles/{id}. Return Role. A member that is None stays unchanged."""
        members = _without_none(name=name, description=description, is_privileged=is_privileged)
        return self.request("PUT", _path("roles", id), json=members)

    @paged_list(*SEARCH_PARAMS)
    def list_roles(self, with_: str | None = None, **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /roles. Return [Role]. `with_` asks for more members: "permissions", "user_count" or both."""
        return self.pages("/roles", _without_none(**{"with": with_}), **search)

    def get_role(self, id: str) -> dict:
        """GET /roles/{id}. Return Role."""
        return self.request("GET", _path("roles", id))

    def delete_role(self, id: str) -> dict:
        """DELETE /roles/{id}. Return Msg."""
        return self.request("DELETE", _path("roles", id))

    def assign_role(self, user_id: str, role_id: str) -> dict:
        """POST /roles/assign. Return Msg."""
        return self.request("POST", "/roles/assign", json={"user_id": user_id, "role_id": role_id})

    def unassign_role(self, user_id: str, role_id: str) -> dict:
        """POST /roles/unassign. Return Msg."""
        return self.request("POST", "/roles/unassign", json={"user_id": user_id, "role_id": role_id})

    def set_roles_of_user(self, user_id: str, role_ids: list[str]) -> dict:
        """PUT /users/{user_id}/roles. Return Msg. Replaces all roles of the user."""
        return self.request("PUT", _path("users", user_id, "roles"), json=[{"id": role_id} for role_id in role_ids])

    @paged_list(*PAGE_PARAMS)
    def list_users_of_role(self, id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /roles/{id}/users. Return [User]."""
        return self.pages(_path("roles", id, "users"), **search)

    @paged_list(*LIMIT_PARAMS)
    def list_roles_of_user(self, user_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /users/{user_id}/roles. Return [{id, name}]."""
        return self.pages(_path("users", user_id, "roles"), {"all": "false"}, **search)

    # -- permissions --

    def create_permission(self, name: str) -> dict:
        """POST /permissions. Return the new Permission."""
        return self.request("POST", "/permissions", json={"name": name})

    def update_permission(self, id: str, name: str) -> dict:
        """PUT /permissions/{id}. Return Permission."""
        return self.request("PUT", _path("permissions", id), json={"name": name})

    @paged_list(*SEARCH_PARAMS)
    def list_permissions(self, **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /permissions. Return [Permission]."""
        return self.pages("/permissions", **search)

    def get_permission(self, id: str) -> dict:
        """GET /permissions/{id}. Return Permission."""
        return self.request("GET", _path("permissions", id))

    def delete_permission(self, id: str) -> dict:
        """DELETE /permissions/{id}. Return Msg."""
        return self.request("DELETE", _path("permissions", id))

    def assign_permission(self, role_id: str, permission_id: str) -> dict:
        """POST /roles/{role_id}/permissions. Return Msg."""
        return self.request("POST", _path("roles", role_id, "permissions"), json={"permission_id": permission_id})

    def remove_permission(self, role_id: str, permission_id: str) -> dict:
        """DELETE /roles/{role_id}/permissions/{permission_id}. Return Msg."""
        return self.request("DELETE", _path("roles", role_id, "permissions", permission_id))

    @paged_list(*LIMIT_PARAMS)
    def list_roles_of_permission(self, id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /permissions/{id}/roles. Return [Role]."""
        return self.pages(_path("permissions", id, "roles"), **search)

    @paged_list(*LIMIT_PARAMS)
    def list_permissions_of_role(self, role_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /roles/{role_id}/permissions. Return [Permission]."""
        return self.pages(_path("roles", role_id, "permissions"), **search)

    @paged_list(*LIMIT_PARAMS)
    def list_permissions_of_user(self, user_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /permissions/user/{user_id}. Return [Permission], those of all roles of the user."""
        return self.pages(_path("permissions", "user", user_id), **search)

    def check_access(self, user_id: str, permission_id: str, explain: bool | None = None) -> dict:
        """POST /check-access. Return {user_id, permission_id, allowed}; with `explain` also `reason` and `by_roles`."""
        answer = self.request("POST", "/check-access", json=_without_none(
            user_id=user_id, permission_id=permission_id, explain=explain))
        if not isinstance(answer.get("allowed"), bool):
            raise _bad_response("the answer is not the JSON it should be")
        return answer

    # -- scopes --

    def create_scope(self, name: str, description: str = "") -> dict:
        """POST /scopes. Return the new Scope."""
        return self.request("POST", "/scopes", json={"name": name, "desc": description})

    def update_scope(self, id: str, name: str | None = None, description: str | None = None) -> dict:
        """PUT /scopes/{id}. Return Scope. A member that is None stays unchanged."""
        return self.request("PUT", _path("scopes", id), json=_without_none(name=name, desc=description))

    @paged_list(*SEARCH_PARAMS)
    def list_scopes(self, **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /scopes. Return [Scope]."""
        return self.pages("/scopes", **search)

    def get_scope(self, id: str) -> dict:
        """GET /scopes/{id}. Return Scope."""
        return self.request("GET", _path("scopes", id))

    def delete_scope(self, id: str) -> dict:
        """DELETE /scopes/{id}. Return Msg."""
        return self.request("DELETE", _path("scopes", id))

    @paged_list(*PAGE_PARAMS)
    def list_users_of_scope(self, id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /scopes/{id}/users. Return [User]."""
        return self.pages(_path("scopes", id, "users"), **search)

    @paged_list(*PAGE_PARAMS)
    def list_clients_of_scope(self, id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /scopes/{id}/clients. Return [Client]."""
        return self.pages(_path("scopes", id, "clients"), **search)

    def assign_scopes_to_user(self, user_id: str, scope_ids: list[str]) -> dict:
        """POST /users/{user_id}/scopes. Return Msg."""
        return self.request("POST", _path("users", user_id, "scopes"), json={"scope_ids": scope_ids})

    @paged_list(*LIMIT_PARAMS)
    def list_scopes_of_user(self, user_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /users/{user_id}/scopes. Return [Scope]."""
        return self.pages(_path("users", user_id, "scopes"), **search)

    def set_scopes_of_user(self, user_id: str, scope_ids: list[str]) -> list[dict]:
        """PUT /users/{user_id}/scopes. Return [Scope]. The user has these scopes afterwards and no others."""
        return self.request("PUT", _path("users", user_id, "scopes"), json={"scope_ids": scope_ids}, expected=list)

    def set_scopes_of_client(self, client_id: str, scope_ids: list[str]) -> list[dict]:
        """PUT /clients/{client_id}/scopes. Return [Scope]. The client has these scopes afterwards and no others."""
        return self.request("PUT", _path("clients", client_id, "scopes"), json={"scope_ids": scope_ids}, expected=list)

    def remove_scope_from_user(self, user_id: str, scope_id: str) -> dict:
        """DELETE /users/{user_id}/scopes/{scope_id}. Return Msg."""
        return self.request("DELETE", _path("users", user_id, "scopes", scope_id))

    def assign_scopes_to_client(self, client_id: str, scope_ids: list[str]) -> dict:
        """POST /clients/{client_id}/scopes. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _path("clients", client_id, "scopes"), json={"scope_ids": scope_ids})

    @paged_list(*LIMIT_PARAMS)
    def list_scopes_of_client(self, client_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/scopes. Return [Scope]. `client_id` is the internal id."""
        return self.pages(_path("clients", client_id, "scopes"), **search)

    def remove_scope_from_client(self, client_id: str, scope_id: str) -> dict:
        """DELETE /clients/{client_id}/scopes/{scope_id}. Return Msg. `client_id` is the internal id."""
        return self.request("DELETE", _path("clients", client_id, "scopes", scope_id))

    # -- clients --

    def create_client(self, client_id: str, client_secret: str | None = None, *, public: bool = False,
                      display_name: str = "", audience: str = "microauthd", grant_types: list[str] | None = None,
                      scopes: list[str] | None = None, may_introspect: bool | None = None,
                      allow_http_redirects: bool | None = None, allow_short_schemes: bool | None = None,
                      is_first_party: bool | None = None, redirect_uris: list[str] | None = None,
                      post_logout_redirect_uris: list[str] | None = None, cors_origins: list[str] | None = None,
                      flags: dict[str, dict] | None = None) -> dict:
        """POST /clients. Return the new Client, with `client_secret` if the server generated one.

        The server generates a secret for a confidential client without `client_secret`; it cannot be read again.
        `scopes` are names. `flags` is {flag: {"is_enabled", "options"}}. If a part is refused, nothing is registered.
        """
        return self.request("POST", "/clients", json=_without_none(
            client_id=client_id, client_secret=client_secret, display_name=display_name, audience=audience,
            client_type="public" if public else "confidential", grant_types=grant_types, scopes=scopes,
            may_introspect=may_introspect, allow_http_redirects=allow_http_redirects,
            allow_short_schemes=allow_short_schemes, is_first_party=is_first_party, redirect_uris=redirect_uris,
            post_logout_redirect_uris=post_logout_redirect_uris, cors_origins=cors_origins, flags=flags))

    def update_client(self, id: str, client_id: str | None = None, display_name: str | None = None,
                      audience: str | None = None, is_active: bool | None = None, *,
                      grant_types: list[str] | None = None, may_introspect: bool | None = None,
                      is_first_party: bool | None = None, access_token_signed_alg: str | None = None,
                      id_token_signed_response_alg: str | None = None, allow_http_redirects: bool | None = None,
                      allow_short_schemes: bool | None = None) -> dict:
        """PUT /clients/{id}. Return Client. A member that is None stays unchanged.

        The algorithm "" stands for the server's default.
        """
        return self.request("PUT", _path("clients", id), json=_without_none(
            client_id=client_id, display_name=display_name, audience=audience, is_active=is_active,
            grant_types=grant_types, may_introspect=may_introspect, is_first_party=is_first_party,
            access_token_signed_alg=access_token_signed_alg, id_token_signed_response_alg=id_token_signed_response_alg,
            allow_http_redirects=allow_http_redirects, allow_short_schemes=allow_short_schemes))

    @paged_list(*SEARCH_PARAMS)
    def list_clients(self, client_type: str | None = None, is_active: bool | None = None,
                     grant_type: str | None = None, **search: Unpack[SearchParams]) -> Iterator[list[dict]]:
        """GET /clients. Return [Client], filtered by what is given."""
        return self.pages("/clients", _without_none(
            client_type=client_type, is_active=_flag(is_active), grant_type=grant_type), **search)

    def get_client(self, id: str) -> dict:
        """GET /clients/{id}. Return Client."""
        return self.request("GET", _path("clients", id))

    def delete_client(self, id: str) -> dict:
        """DELETE /clients/{id}. Return Msg. Ends its sessions."""
        return self.request("DELETE", _path("clients", id))

    def revoke_client(self, id: str) -> dict:
        """POST /clients/{id}/revoke. Return Msg. Revokes every token and ends every session of the client."""
        return self.request("POST", _path("clients", id, "revoke"))

    def preview_tokens(self, id: str, user_id: str | None = None, scope: str | None = None,
                       claims: dict | None = None) -> dict:
        """POST /clients/{id}/preview. Return {refused, obstacles, scopes, consent, access_token, id_token, userinfo}.

        Of the client's own token without `user_id`. Nothing is signed. `claims` is that of OpenID Connect Core §5.5.
        """
        return self.request("POST", _path("clients", id, "preview"), json=_without_none(
            user_id=user_id, scope=scope, claims=claims))

    @paged_list(*PAGE_PARAMS)
    def list_consents_for_client(self, id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /clients/{id}/consents. Return [{user_id, username, scopes, given_at}]."""
        return self.pages(_path("clients", id, "consents"), **search)

    def revoke_consents_for_client(self, id: str) -> dict:
        """DELETE /clients/{id}/consents. Return Msg. Ends every token and login of the client."""
        return self.request("DELETE", _path("clients", id, "consents"))

    def revoke_all_consents(self) -> dict:
        """DELETE /consents. Return Msg. Ends every token and login of the clients that had any."""
        return self.request("DELETE", "/consents")

    def change_client_secret(self, id: str, new_secret: str | None = None, overlap_seconds: int | None = None) -> dict:
        """POST /clients/secret. Return Msg whose `message` is the new secret, generated by the server if not given.

        The old secret remains valid for `overlap_seconds`.
        """
        answer = self.request("POST", "/clients/secret", json=_without_none(
            client_id=id, new_secret=new_secret, overlap_seconds=overlap_seconds))
        if not isinstance(answer.get("message"), str) or not answer["message"]:
            raise _bad_response("the answer is not the JSON it should be")
        return answer

    @paged_list(*LIMIT_PARAMS)
    def list_client_secrets(self, id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{id}/secrets. Return [{id, created_at, expires_at, last_used_at}], no secrets."""
        return self.pages(_path("clients", id, "secrets"), **search)

    def delete_client_secret(self, id: str, secret_id: str) -> dict:
        """DELETE /clients/{id}/secrets/{secret_id}. Return Msg. The secret is invalid at once."""
        return self.request("DELETE", _path("clients", id, "secrets", secret_id))

    def add_redirect_uri(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/redirect-uris. Return the new ClientUri."""
        return self.request("POST", _path("clients", id, "redirect-uris"), json=uri)

    def check_uri(self, id: str, kind: str, uri: str) -> dict:
        """POST /clients/{id}/uris/check. Return {ok, reason, nearest}. Nothing is changed.

        `kind` is redirect, post_logout or cors_origin.
        """
        return self.request("POST", _path("clients", id, "uris", "check"), json={"kind": kind, "uri": uri})

    @paged_list(*LIMIT_PARAMS)
    def list_redirect_uris(self, client_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/redirect-uris. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_path("clients", client_id, "redirect-uris"), **search)

    def delete_redirect_uri(self, id: str, client_id: str | None = None) -> dict:
        """DELETE /clients/redirect-uris. Return Msg. `id` is the id of the record, not the URI."""
        if client_id is None:
            return self.request("DELETE", "/clients/redirect-uris", json=id)
        return self.request("DELETE", _path("clients", client_id, "redirect-uris", id))

    def add_post_logout_uri(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/post-logout-redirect-uris. Return the new ClientUri."""
        return self.request("POST", _path("clients", id, "post-logout-redirect-uris"), json=uri)

    @paged_list(*LIMIT_PARAMS)
    def list_post_logout_uris(self, client_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/post-logout-redirect-uris. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_path("clients", client_id, "post-logout-redirect-uris"), **search)

    def delete_post_logout_uri(self, client_id: str, id: str) -> dict:
        """DELETE /clients/{client_id}/post-logout-redirect-uris/{id}. Return Msg. `id` is the id of the record."""
        return self.request("DELETE", _path("clients", client_id, "post-logout-redirect-uris", id))

    def add_cors_origin(self, id: str, uri: str) -> dict:
        """POST /clients/{id}/cors-origins. Return the new ClientUri."""
        return self.request("POST", _path("clients", id, "cors-origins"), json=uri)

    @paged_list(*LIMIT_PARAMS)
    def list_cors_origins(self, client_id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{client_id}/cors-origins. Return [ClientUri]. `client_id` is the internal id."""
        return self.pages(_path("clients", client_id, "cors-origins"), **search)

    def delete_cors_origin(self, client_id: str, id: str) -> dict:
        """DELETE /clients/{client_id}/cors-origins/{id}. Return Msg. `id` is the id of the record."""
        return self.request("DELETE", _path("clients", client_id, "cors-origins", id))

    def list_flags(self, client_id: str) -> dict:
        """GET /clients/{client_id}/options. Return {flag: {is_enabled, options}}. `client_id` is the internal id."""
        answer = self.request("GET", _path("clients", client_id, "options"))
        if not all(isinstance(value, dict) for value in answer.values()):
            raise _bad_response("the answer is not the JSON it should be")
        return answer

    def set_flag(self, client_id: str, flag: str, enabled: bool) -> dict:
        """POST /client/options/{flag}. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _path("client", "options", flag),
                            form={"client_id": client_id, "enabled": "true" if enabled else "false"})

    def get_flag(self, client_id: str, flag: str) -> bool:
        """GET /client/options/{flag}. Return whether it is on; the `message` of the Msg is "True" or "False"."""
        answer = self.request("GET", _path("client", "options", flag), query={"client_id": client_id})
        return str(answer.get("message")).lower() == "true"

    def set_flag_options(self, client_id: str, flag: str, options: str) -> dict:
        """POST /client/options/{flag}/ext. Return Msg. `client_id` is the internal id."""
        return self.request("POST", _path("client", "options", flag, "ext"),
                            form={"client_id": client_id, "options": options})

    def get_flag_options(self, client_id: str, flag: str) -> str:
        """GET /client/options/{flag}/ext. Return the option text, "" when unset."""
        answer = self.request("GET", _path("client", "options", flag, "ext"), query={"client_id": client_id})
        return str(answer.get("message") or "")

    def add_idp(self, id: str, provider_key: str, display_name: str, issuer: str, external_client_id: str,
                scopes: str = "openid email profile") -> dict:
        """POST /clients/{id}/idp. Return the new ExternalIdp."""
        return self.request("POST", _path("clients", id, "idp"), json={
            "provider_key": provider_key, "display_name": display_name, "issuer": issuer,
            "client_identifier": external_client_id, "scopes": scopes})

    def update_idp(self, id: str, idp_id: str, provider_key: str, display_name: str, issuer: str,
                   external_client_id: str, scopes: str = "openid email profile") -> dict:
        """PUT /clients/{id}/idp/{idp_id}. Return ExternalIdp."""
        return self.request("PUT", _path("clients", id, "idp", idp_id), json={
            "provider_key": provider_key, "display_name": display_name, "issuer": issuer,
            "client_identifier": external_client_id, "scopes": scopes})

    @paged_list(*LIMIT_PARAMS)
    def list_idps(self, id: str, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /clients/{id}/idp. Return [ExternalIdp]."""
        return self.pages(_path("clients", id, "idp"), **search)

    def get_idp(self, id: str, idp_id: str) -> dict:
        """GET /clients/{id}/idp/{idp_id}. Return ExternalIdp."""
        return self.request("GET", _path("clients", id, "idp", idp_id))

    def delete_idp(self, id: str, idp_id: str) -> dict:
        """DELETE /clients/{id}/idp/{idp_id}. Return Msg."""
        return self.request("DELETE", _path("clients", id, "idp", idp_id))

    # -- sessions and refresh tokens --

    @paged_list(*SORT_PARAMS)
    def list_sessions(self, user_id: str | None = None, client_id: str | None = None, living: bool | None = None,
                      ip_address: str | None = None, mad_use: str | None = None, sid: str | None = None,
                      **search: Unpack[SortParams]) -> Iterator[list[dict]]:
        """GET /sessions. Return [Session], newest first, filtered by what is given.

        `living` selects those that are alive, `mad_use` those of auth or admin, `sid` those of a login.
        """
        return self.pages("/sessions", _without_none(
            user_id=user_id, client_id=client_id, living=_flag(living),
            ip_address=ip_address, mad_use=mad_use, sid=sid), **search)

    @paged_list(*PAGE_PARAMS)
    def list_browser_sessions(self, user_id: str | None = None, ip_address: str | None = None,
                              **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /browser-sessions. Return [{id, user_id, username, amr, authenticated_at, last_seen_at, …}]."""
        return self.pages("/browser-sessions", _without_none(user_id=user_id, ip_address=ip_address), **search)

    def end_browser_session(self, id: str) -> dict:
        """DELETE /browser-sessions/{id}. Return Msg. Ends every login at a client that began in that browser."""
        return self.request("DELETE", _path("browser-sessions", id))

    def revoke_everything(self) -> dict:
        """POST /sessions/revoke-all. Return Msg. Ends every session, login and token, the one in use too."""
        return self.request("POST", "/sessions/revoke-all")

    def get_session(self, id: str) -> dict:
        """GET /sessions/{id}. Return Session. `id` is the token's `jti`."""
        return self.request("GET", _path("sessions", id))

    @paged_list(*PAGE_PARAMS)
    def list_sessions_of_user(self, user_id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /sessions/user/{user_id}. Return [Session], newest first."""
        return self.pages(_path("sessions", "user", user_id), **search)

    def revoke_session(self, id: str) -> dict:
        """DELETE /sessions/{id}. Return {jti, status, message}."""
        return self.request("DELETE", _path("sessions", id))

    def list_own_sessions(self) -> list[dict]:
        """GET /dashboard/sessions. Return [ConsoleSession]: the caller's own at the console, and logins for tokens."""
        return self.request("GET", "/dashboard/sessions", expected=list)

    def end_own_session(self, id: str) -> dict:
        """DELETE /dashboard/sessions/{id}. Return Msg."""
        return self.request("DELETE", _path("dashboard", "sessions", id))

    def end_other_sessions(self) -> dict:
        """DELETE /dashboard/sessions. Return Msg. The session of this request stays."""
        return self.request("DELETE", "/dashboard/sessions")

    def revoke_token(self, token: str) -> dict:
        """POST /revoke. Return Msg. `token` is a token of AUTH, or an admin token."""
        return self.request("POST", "/revoke", json={"token": token})

    def introspect(self, token: str) -> dict:
        """POST /introspect. Return the claims of an AUTH token, with `valid` and `expired`."""
        return self.request("POST", "/introspect", json={"token": token})

    def purge_sessions(self, older_than: int, expired: bool = False, revoked: bool = False) -> dict:
        """POST /sessions/purge. Return Msg. `older_than` in seconds."""
        return self.request("POST", "/sessions/purge", json={
            "older_than_seconds": older_than, "purge_expired": expired, "purge_revoked": revoked})

    @paged_list(*PAGE_PARAMS)
    def list_refresh_tokens(self, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /refresh-tokens. Return [RefreshToken], newest first."""
        return self.pages("/refresh-tokens", **search)

    @paged_list(*PAGE_PARAMS)
    def list_refresh_tokens_of_user(self, user_id: str, **search: Unpack[PageParams]) -> Iterator[list[dict]]:
        """GET /refresh-tokens/user/{user_id}. Return [RefreshToken], newest first."""
        return self.pages(_path("refresh-tokens", "user", user_id), **search)

    def get_refresh_token(self, id: str) -> dict:
        """GET /refresh-tokens/{id}. Return RefreshToken."""
        return self.request("GET", _path("refresh-tokens", id))

    def revoke_refresh_token(self, id: str) -> dict:
        """DELETE /refresh-tokens/{id}. Return Msg. Ends the login that it belongs to."""
        return self.request("DELETE", _path("refresh-tokens", id))

    def purge_refresh_tokens(self, older_than: int, expired: bool = False, revoked: bool = False) -> dict:
        """POST /refresh-tokens/purge. Return Msg. `older_than` in seconds."""
        return self.request("POST", "/refresh-tokens/purge", json={
            "older_than_seconds": older_than, "purge_expired": expired, "purge_revoked": revoked})

    # -- audit --

    @paged_list(*PAGE_PARAMS)
    def list_audit_logs(self, user_id: str | None = None, action: str | None = None, limit: int | None = 100, *,
                        target: str | None = None, since: str | None = None, until: str | None = None,
                        after: str | None = None, before: str | None = None, offset: int | None = None,
                        result: str | None = None, ip_address: str | None = None, request_id: str | None = None,
                        about: str | None = None) -> Iterator[list[dict]]:
        """GET /audit-logs. Return [AuditLog], newest first, or those of ids less than `before`.

        With `after` return those of greater ids, oldest first.

        `user_id` is the actor. `action`, `target`, `result`, `ip_address` and `request_id` must match exactly. `about`
        is a user, as actor or as whom an entry is about. `since` and `until` are ISO 8601 or Unix seconds.
        """
        return self.pages("/audit-logs", _without_none(
            userId=user_id, action=action, target=target, since=since, until=until, after=after, before=before,
            result=result, ip_address=ip_address, request_id=request_id, about=about,
        ), limit=limit, offset=offset, page_size=PAGE_SIZE)

    def get_audit_log(self, id: str) -> dict:
        """GET /audit-logs/{id}. Return AuditLog."""
        return self.request("GET", _path("audit-logs", id))

    def list_audit_actions(self) -> list[str]:
        """GET /audit-logs/actions. Return the actions of which the log has, or had, entries."""
        return self.request("GET", "/audit-logs/actions", expected=(list,))

    def verify_audit_logs(self) -> dict:
        """GET /audit-logs/verify. Return {valid, rows, first_seq, last_seq, head, reason}.

        `valid` is whether the hash chain is unbroken.
        """
        answer = self.request("GET", "/audit-logs/verify")
        if not isinstance(answer.get("valid"), bool):
            raise _bad_response("the answer is not the JSON it should be")
        return answer

    @paged_list(*LIMIT_PARAMS)
    def export_audit_logs(self, after: str | None = None, limit: int | None = None,
                          **filters: str | None) -> Iterator[list[dict]]:
        """GET /audit-logs/export. Return [AuditLog], all entries with ids greater than `after`, oldest first.

        `filters` are user_id and those of `list_audit_logs`.
        """
        rows_left = limit
        while rows_left is None or rows_left > 0:
            answer = self.send("GET", "/audit-logs/export", expected=bytes, query=_without_none(
                **filters, after=after,
                limit=EXPORT_PAGE_SIZE if rows_left is None else min(rows_left, EXPORT_PAGE_SIZE)))
            try:
                rows = [read_json(text) for text in answer.value.split(b"\n") if text.strip()]
            except ValueError:
                rows = [None]  # The type check below refuses it.
            if not all(isinstance(row, dict) for row in rows):
                raise _bad_response("the answer is not the NDJSON it should be")
            yield rows if rows_left is None else rows[:rows_left]
            rows_left = None if rows_left is None else rows_left - len(rows)
            previous, after = after, answer.headers.get("x-next-after")
            if not after:
                return
            if after == previous:
                raise _bad_response("the pages of the export go round in a circle", hint="")

    def purge_audit_logs(self, days: int) -> dict:
        """POST /audit-logs/purge. Return Msg. `days` > 0."""
        return self.request("POST", "/audit-logs/purge", json={"older_than_days": days})

    # -- the box --

    def get_status(self) -> dict:
        """GET /status. Return Status: how the box is, and `attention`, what an operator has to settle."""
        return self.request("GET", "/status")

    def get_history(self, series: str | None = None, range: str | None = None) -> dict:
        """GET /status/history. Return {from, step, series: {name: [number or None]}}. `series` are names with commas
        between; `range` is 1h, 1d or 7d.
        """
        return self.request("GET", "/status/history", query=_without_none(series=series, range=range))

    # -- backups --

    @paged_list(*LIMIT_PARAMS)
    def list_keys(self, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /keys. Return [{kid, ring, alg, state, since, signs, signs_from, gone_after}]."""
        return self.pages("/keys", **search)

    def key_impact(self, kid: str) -> dict:
        """GET /keys/{kid}/impact. Return {kid, ring, state, tokens, is_lower_bound, users, clients, cached_seconds}."""
        return self.request("GET", _path("keys", kid, "impact"))

    def rotate_keys(self, ring: str | None = None, alg: str | None = None) -> list[dict]:
        """POST /keys/rotate. Return the new keys, which sign after `key-overlap` seconds."""
        return self.request("POST", "/keys/rotate", json=_without_none(ring=ring, alg=alg), expected=list)

    def revoke_key(self, kid: str) -> dict:
        """POST /keys/{kid}/revoke. Return Msg. No token that the key signed is valid any more."""
        return self.request("POST", _path("keys", kid, "revoke"))

    def make_backup(self, without_keys: bool = False) -> dict:
        """POST /backup. Return a Backup: `name`, `bytes`, `sha256`, `users`, `clients`, `newest_at`.

        The file stays on the server until `delete_backup`.
        """
        return self.request("POST", "/backup", json={"without_keys": without_keys})

    @paged_list(*LIMIT_PARAMS)
    def list_backups(self, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /backup. Return [{name, created_at, bytes, sha256, kind}], newest first."""
        return self.pages("/backup", **search)

    # -- the brand --

    def get_brand(self) -> dict:
        """GET /brand. Return {name, host, color, text_color, contrast, logo, origins, modified_at}."""
        return self.request("GET", "/brand")

    def update_brand(self, **members: str | None) -> dict:
        """PUT /brand: `name`, `color`, `logo` (base64; "" is none). Return Brand. None leaves one to the options."""
        return self.request("PUT", "/brand", json=members)

    def reset_brand(self) -> dict:
        """DELETE /brand. Return Msg. Name, colour and picture are those of the options again."""
        return self.request("DELETE", "/brand")

    @paged_list(*LIMIT_PARAMS)
    def list_options(self, **search: Unpack[LimitParams]) -> Iterator[list[dict]]:
        """GET /options. Return [{name, value, origin, default, group, meaning, is_secret, needs_restart}]."""
        return self.pages("/options", **search)

    def read_backup(self, name: str) -> Iterator[bytes]:
        """GET /backup/{name}. Return the octets of the file, in pieces."""
        offset = 0
        while True:
            piece = self.send("GET", _path("backup", name), query={"offset": offset}, expected=bytes)
            yield piece.value
            next_offset = piece.headers.get("x-next-offset")
            if next_offset is None:
                return
            offset += len(piece.value)
            if not (piece.value and next_offset.isascii() and next_offset.isdigit() and int(next_offset) == offset):
                raise _bad_response("the pieces of the backup do not follow each other")

    def delete_backup(self, name: str) -> dict:
        """DELETE /backup/{name}. Return Msg."""
        return self.request("DELETE", _path("backup", name))


# == Profile ===================================================================
# ~/.mad_token (the raw JWT), ~/.mad_url (the server that issued it), and the token cache. Only their owner may read or
# write them: another user who could place a file or a link here could steal a token or substitute one.

def _unsafe_file(path: str, complaint: str, hint: str = "look at it, then remove it") -> CommandError:
    return CommandError(EXIT_LOGIN, "unsafe_file", f"{path} {complaint}", hint=hint)


def _check_private_file(path: str, info: os.stat_result) -> None:
    """Raise CommandError unless `info` is that of a regular file of ours. `path` is for the message only."""
    import stat
    if stat.S_ISLNK(info.st_mode):
        raise _unsafe_file(path, "is a symbolic link")
    if not stat.S_ISREG(info.st_mode):
        raise _unsafe_file(path, "is not a regular file")
    if info.st_uid != os.geteuid():
        raise _unsafe_file(path, "belongs to somebody else")


def read_private_file(path: str, is_secret: bool = False) -> str | None:
    """Return the stripped text of a file, or None if there is none or it is empty.

    Raises CommandError if another user could have written it, or read it if it `is_secret`: somebody else may have the
    token by now, and to close the file would hide that.
    """
    try:
        # O_NONBLOCK: without it open() would wait for a writer if the path were a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as problem:
        if os.path.islink(path):
            raise _unsafe_file(path, "is a symbolic link") from None
        raise CommandError(EXIT_LOGIN, "unsafe_file", f"cannot read {path}: {problem.strerror}") from None
    try:
        info = os.fstat(descriptor)
        _check_private_file(path, info)
        if info.st_mode & 0o022:
            raise _unsafe_file(path, "can be written by others")
        if is_secret and info.st_mode & 0o044:  # The mad of the original microauthd writes it with mode 0644.
            raise _unsafe_file(path, "can be read by others, who may have the token",
                               hint="mad session logout ends it; then log in again")
        octets = os.read(descriptor, MAX_SECRET_BYTES + 1)
    except OSError as problem:
        raise CommandError(EXIT_LOGIN, "unsafe_file", f"cannot read {path}: {problem.strerror}") from None
    finally:
        os.close(descriptor)
    try:
        return octets[:MAX_SECRET_BYTES].decode("ascii").strip() or None
    except UnicodeDecodeError:
        raise _unsafe_file(path, "is not what mad wrote") from None


def write_private_file(path: str, text: str, modified_at: int | None = None) -> None:
    """Write `text` atomically to a file of mode 0600, independent of the umask. Raises CommandError."""
    folder = os.path.dirname(path)
    name = os.path.basename(path).lstrip(".")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(6).hex()}")
    try:
        try:
            _check_private_file(path, os.lstat(path))
        except FileNotFoundError:
            pass
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)
                file.write(text.encode("ascii"))
                file.flush()
                os.fsync(descriptor)
                if modified_at is not None:
                    os.utime(descriptor, (modified_at, modified_at))
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        # Sync the directory too: otherwise a power cut may undo the rename.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise CommandError(EXIT_LOGIN, "unsafe_file", f"cannot write {path}: {problem.strerror}") from None


def hide_variable(name: str) -> None:
    """Overwrite the value of a variable in what the kernel shows as /proc/PID/environ: the strings that execve(2) was
    given, between env_start and env_end of proc_pid_stat(5). Where there is no /proc, nothing shows them.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[47]), int(fields[48])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            octets = b"\0" + memory.read(end - start)
            at = octets.find(b"\0" + os.fsencode(name) + b"=")
            if at >= 0:
                begin = at + len(os.fsencode(name)) + 2
                memory.seek(start + begin - 1)
                memory.write(bytes(octets.find(b"\0", begin) - begin))
    except (OSError, ValueError, IndexError):
        pass


def secret_variable(name: str) -> str | None:
    """Return the secret in a variable of the environment, or in the first line of the file that NAME_FILE names.

    Raises CommandError if both are set, and if others can read the file: group members may if root says so, as of the
    credentials of systemd.
    """
    value, path = os.environ.get(name), os.environ.get(name + "_FILE")
    if value:
        hide_variable(name)
    if not path:
        return value or None
    if value:
        raise CommandError(EXIT_USAGE, "usage", f"{name} and {name}_FILE are both set")
    import stat
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            if stat.S_ISREG(info.st_mode) and info.st_mode & (0o077 if info.st_uid else 0o037):
                raise CommandError(EXIT_LOGIN, "unsafe_file", f"{name}_FILE: {path} can be read by others",
                                   hint=f"chmod 600 {path}")
            return file.readline(MAX_SECRET_BYTES).decode().strip() or None
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
        raise CommandError(EXIT_USAGE, "usage", f"{name}_FILE: cannot read {path}: {reason}") from None


class Profile:
    """The login saved in the home directory: the token and the URL of the server that issued it."""

    def __init__(self, home: str | None = None):
        home = home or os.path.expanduser("~")
        self.token_path, self.url_path = os.path.join(home, ".mad_token"), os.path.join(home, ".mad_url")

    def url(self) -> str | None:
        return read_private_file(self.url_path)

    def token(self, to_end_it: bool = False) -> str | None:
        return read_private_file(self.token_path, is_secret=not to_end_it)

    def save(self, token: str, url: str) -> None:
        """Replace the saved login. Raises CommandError."""
        # In this order a crash at any moment leaves no token beside the URL of another server.
        self.delete_token()
        write_private_file(self.url_path, url)
        write_private_file(self.token_path, token)

    def delete_token(self) -> bool:
        """Remove the saved token. Return whether there was one. Raises CommandError."""
        try:
            _check_private_file(self.token_path, os.lstat(self.token_path))
            os.unlink(self.token_path)
        except FileNotFoundError:
            return False
        except OSError as problem:
            raise CommandError(EXIT_LOGIN, "unsafe_file",
                               f"cannot remove {self.token_path}: {problem.strerror}") from None
        return True


class Marks:
    """The marks that a server leaves for programs of its machine: what they say of a token changes when it may have
    been revoked.

    24 octets - MARKS_MAGIC, a number of the server's start, its AUTH port - then cells of 8 octets. The first changes
    when a client, its rights or a signing key do, another when a token does whose `jti` leads to it.
    """

    def __init__(self, content: bytes):
        self.content = content

    @classmethod
    def find(cls, port: int, folders: Iterable[tuple[str, frozenset[int]]]) -> Marks | None:
        """Return the marks of the server with that AUTH port, or None. `folders` are where to look, and whose they are
        to be.
        """
        for folder, owners in folders:
            try:
                descriptor = os.open(os.path.join(folder, MARKS), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if os.fstat(descriptor).st_uid not in owners:
                        continue
                    content = os.read(descriptor, 1 << 16)
                finally:
                    os.close(descriptor)
            except OSError:
                continue
            if content[:8] == MARKS_MAGIC and int.from_bytes(content[16:24], "big") == port and len(content) > 64:
                return cls(content)
        return None

    def of(self, answer: dict) -> str:
        """Return what the marks say of the token in a response."""
        from zlib import crc32
        try:
            jti = decode_jwt(answer["access_token"])[1]["jti"].encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            jti = b""  # no token of microauthd
        cell = 24 + 8 * (crc32(jti) % (len(self.content) // 8 - 4) + 1)
        return (self.content[8:16] + self.content[24:32] + self.content[cell:cell + 8]).hex()


class Box:
    """The box of this machine whose mad.conf is found: the URLs of its ports, its IP addresses, its data folder.

    mad.conf is believed only from root and the user who runs mad.
    """

    def __init__(self, path: str, settings: dict[str, str]):
        self.folder = os.path.dirname(os.path.abspath(settings.get("db-file") or "mad.db3"))
        if path != "mad.conf" and not os.path.isabs(settings.get("db-file") or "mad.db3"):
            beside = os.path.dirname(os.path.abspath(path))
            self.folder = "/var/lib/microauthd" if beside == "/etc/microauthd" else beside
        try:  # a folder that a mad.conf which is believed names: that of the service's user, for root
            self.owner = os.stat(self.folder).st_uid
        except OSError:
            self.owner = 0
        self.urls: dict[str, str] = {}
        self.addresses: dict[str, str] = {}  # by URL
        issuer = settings.get("oidc-issuer", "").partition("://")[2].partition("/")[0]
        names = {"auth": issuer or settings.get("auth-domain", ""), "admin": settings.get("admin-domain", "")}
        for side, default in (("auth", "9040"), ("admin", "9041")):
            ip, port = settings.get(side + "-ip") or "127.0.0.1", settings.get(side + "-port") or default
            ip = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip)  # noqa: S104 - every address, of which this is one
            name, colon, end = names[side].rpartition(":")
            host = (name if colon and end.isdigit() else names[side]) or "localhost"
            speaks_tls = bool(settings.get(side + "-ssl-cert-file")) or settings.get("tls") == "self"
            if not speaks_tls:
                host = "localhost" if ip in ("127.0.0.1", "::1") else f"[{ip}]" if ":" in ip else ip
            url = f"{'https' if speaks_tls else 'http'}://{host}:{port}"
            try:
                url = Url(url).text
            except BadValue:
                pass  # its mad.conf is wrong, which the server says better
            self.urls[side] = url
            self.addresses[url] = ip if speaks_tls else ""

    @classmethod
    def find(cls) -> Box | None:
        """Return the box of MAD_CONFIG, of this folder, or of the service; None if there is none that may be read."""
        for path in [os.environ["MAD_CONFIG"]] if os.environ.get("MAD_CONFIG") else CONFIG_FILES:
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    info = os.fstat(file.fileno())
                    if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022 or not info.st_mode & 0o100000:
                        continue
                    return cls(path, cls.read(file))
            except OSError:
                continue
        return None

    @staticmethod
    def read(lines: Iterable[str]) -> dict[str, str]:
        """Return the settings of a mad.conf. What is malformed is the server's to refuse."""
        found = {}
        for line in lines:
            key, equals, value = line.partition("=")
            key, value = key.strip().lower(), value.strip()
            if equals and key[:1] not in "#;":
                quoted = value[:1] == '"' and value.find('"', 1) > 0
                value = value[1:value.find('"', 1)] if quoted else value.partition("#")[0].partition(";")[0].strip()
                found[key + "-file" if key.endswith("-ssl-cert") else key] = value  # the other name of that option
        return found

    def address(self, url: str) -> BoxAddress:
        """Return where a URL of this box is, and the file of its own authority; None if it is no URL of TLS of it."""
        if not self.addresses.get(url):
            return None
        path = os.path.join(self.folder, "ca.pem")
        try:
            info = os.stat(path)
            is_safe = info.st_uid in (0, os.geteuid(), self.owner) and not info.st_mode & 0o022
        except OSError:
            is_safe = False
        return self.addresses[url], path if is_safe else ""


class TokenCache:
    """The cache of `mad token get`, one file per token.

    If its folder or a file is missing, damaged, not writable or accessible to other users, mad works without the cache
    and reports no error.
    """

    def __init__(self, url: str, client_id: str, scope: str, secret: str):
        from hashlib import sha256
        from json import dumps
        root = os.environ.get("XDG_CACHE_HOME", "")
        self.home = None
        if not os.path.isabs(root):  # XDG Base Directory Specification: a relative path must be ignored.
            self.home = os.path.expanduser("~")
            root = os.path.join(self.home, ".cache")
        self.folder = os.path.join(root, "mad")
        # The file name depends on the secret: a replaced or mistyped secret must not find the token of a valid one.
        key = dumps([url, client_id, scope, sha256(secret.encode()).hexdigest()])
        self.path = os.path.join(self.folder, sha256(key.encode("ascii")).hexdigest())

    def _folder_is_private(self) -> bool:
        import stat
        try:
            info = os.lstat(self.folder)
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077

    def find(self, now: int, marks: Marks | None = None) -> dict | None:
        """Return the cached token response with `expires_in` as of `now`, or None if none is valid long enough.

        `marks` are those of the server, if it runs on this machine: they tell whether it may have been revoked.
        """
        try:
            text = read_private_file(self.path) if self._folder_is_private() else None
            if not text:
                return None
            entry = read_json(text.encode("ascii"))
            answer, stored_at, expires_at = entry["answer"], entry["stored_at"], entry["expires_at"]
            # The lower bound detects a clock that was set back, which would make an old token look valid.
            if not stored_at - CACHE_MARGIN <= now < expires_at - CACHE_MARGIN:
                return None
            if marks and marks.of(answer) != entry.get("mark"):
                return None
            return {**_check_token_response(answer), "expires_in": int(expires_at - now)}
        except (CommandError, MadError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def store(self, answer: dict, now: int, marks: Marks | None = None) -> None:
        """Store a token response that has a usable `expires_in`, and delete the files of expired tokens.

        `marks` were read before it was asked for.
        """
        from json import dumps
        ttl = answer.get("expires_in")
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not CACHE_MARGIN < ttl < 1e9:
            return
        if self.home is not None and not os.path.isdir(self.home):
            return  # An account without a home directory, such as that of a daemon: makedirs() would create one.
        try:
            os.makedirs(os.path.dirname(self.folder), mode=0o700, exist_ok=True)
            try:
                os.mkdir(self.folder, 0o700)
            except FileExistsError:
                pass
            if not self._folder_is_private():
                return
            expires_at = now + int(ttl)
            # The file's mtime is set to the expiry, so the loop below need not read the files.
            entry = {"stored_at": now, "expires_at": expires_at, "answer": answer,
                     "mark": marks.of(answer) if marks else None}
            write_private_file(self.path, dumps(entry), expires_at)
            for name in os.listdir(self.folder):
                path = os.path.join(self.folder, name)
                if os.lstat(path).st_mtime < now:
                    os.unlink(path)
        except (OSError, CommandError):
            return


# == Arguments =================================================================
# Options are long: `--name value`, `--name=value` or `--name:value`. A flag takes an optional true or false. An
# argument `@file` in the place of an option is replaced by the arguments in that response file. In the place of a value
# it is taken literally, because a password may begin with @ (the original reads a file there too).

class Option:
    """One option of a command.

    `kind` is text, number, flag, list, moment (a date-time), lockout (a date-time, or `permanent`), secret or token
    (`-` reads standard input). `dest` is the parameter that receives the value, `choices` are the allowed values,
    `minimum` is the least number. `stdin` names the flag that reads a secret from standard input instead. A `required`
    secret is asked for on a terminal, twice unless it `is_existing`, which means that the server checks it.

    Names are replaced by ids. `collection` is where a name is looked up; with `allow_unknown` a name that is not found
    is passed on unchanged. `parent` is for an id within another object: the option that names that object, the method
    that lists its children, and the members of a child that may be given in place of its id.
    """
    __slots__ = ("allow_unknown", "choices", "collection", "dest", "help", "is_existing", "kind", "metavar", "minimum",
                 "name", "parent", "required", "stdin")

    def __init__(self, name: str | None, help: str, kind: str = "text", *, required: bool = False,
                 dest: str | None = None, collection: str | None = None, allow_unknown: bool = False,
                 parent: tuple[str, Callable, tuple[str, ...]] | None = None, stdin: str | None = None,
                 is_existing: bool = False, metavar: str | None = None, minimum: int | None = None,
                 choices: tuple[str, ...] = ()):
        # Any: None where the option has no such attribute; the code that reads them checks another attribute first.
        self.name: Any = name
        self.collection: Any = collection
        self.parent: Any = parent
        self.stdin: Any = stdin
        self.help, self.kind, self.required, self.allow_unknown = help, kind, required, allow_unknown
        self.dest = dest or (name or stdin or "").replace("-", "_")
        self.is_existing, self.minimum, self.choices = is_existing, minimum, choices
        self.metavar = metavar or "|".join(choices) or {
            "number": "N", "secret": "SECRET", "moment": "MOMENT", "lockout": "MOMENT|permanent"}.get(kind) or (
            "ID|NAME" if collection else (name or "").rpartition("-")[2].upper())


LIST_OPTIONS = (
    Option("limit", "at most so many in all; a negative number means all, which is what it does without", "number"),
    Option("offset", "leave out so many first", "number", minimum=0),
    Option("q", "only those in which this text occurs", metavar="TEXT"),
    Option("sort", "by this member; - before it turns the order round", metavar="MEMBER"),
)
COMMON_OPTIONS = (
    Option("json", "print one JSON document, also on failure", "flag"),
    Option("quiet", "print ids only, or the one thing that was asked for", "flag"),
)
SERVER_OPTIONS = (
    Option("admin-url", "address of the ADMIN server"),
    Option("admin-token", "admin token to use instead of the saved login", "secret"),
)
YES_OPTION = Option("yes", "do not ask before doing it; where there is no terminal nothing is asked", "flag")


class Command:
    """One row of COMMANDS.

    `name` is the noun and the verb, `example` a complete command line for --help. `call` receives a MadClient and the
    options as keyword arguments; `with_context` passes the Context before the MadClient, `without_client` passes it in
    place of the MadClient. `transform` converts the result.

    `render` returns the lines to print for a result, `quiet` those for --quiet (by default the ids); --json prints the
    result itself. If `call` has the attribute `pages`, the command is a list and is printed page by page. A command
    that `streams` yields pages too, and prints one JSON document per line with --json.

    `at_least_one` demands one of the options that are not required, so that an update changes something. `positional`
    names the option whose value may be given without its name. `confirm_by` makes the command ask on a terminal: for
    the value of the option that it names, or for y if it is "". `judge` returns the exit status for a result.
    """
    __slots__ = ("at_least_one", "call", "confirm_by", "example", "help", "judge", "name", "options", "positional",
                 "quiet", "render", "streams", "transform", "with_context", "without_client")

    def __init__(self, name: str, help: str, call: Any, options: tuple[Option, ...], render: Any, example: str = "", *,
                 without_client: bool = False, with_context: bool = False, at_least_one: bool = False,
                 transform: Callable[[Any], Any] | None = None, quiet: Callable[[Any], list[str]] | None = None,
                 streams: bool = False, confirm_by: str | None = None, positional: str = "",
                 judge: Callable[[dict], int] | None = None):
        self.name, self.help, self.call, self.render, self.example = name, help, call, render, example
        self.without_client, self.with_context, self.at_least_one = without_client, with_context, at_least_one
        self.transform, self.quiet = transform, quiet
        self.streams, self.confirm_by, self.positional, self.judge = streams, confirm_by, positional, judge
        self.options = tuple(options)
        if self.is_list:
            own_names = [option.name for option in options]
            self.options += tuple(option for option in LIST_OPTIONS
                                  if option.name in call.query_params and option.name not in own_names)

    @property
    def is_list(self) -> bool:
        return hasattr(self.call, "pages") and not self.streams

    def all_options(self) -> tuple[Option, ...]:
        """Return the options of this command and those that every command has."""
        return (self.options + (() if self.confirm_by is None else (YES_OPTION,))
                + (() if self.without_client else SERVER_OPTIONS) + COMMON_OPTIONS)


HELP_FLAGS = ("-h", "--help", "-?", "/?", "/h")


class ParsedArguments:
    """A parsed command line: `options` by name, `errors` as sentences, a `hint` about them, `help_requested`."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.errors: list[str] = []
        self.hint, self.help_requested = "", False


def closest_match(text: str, candidates) -> str:
    """Return the one of `candidates` that is most similar to `text`, or ""."""
    from difflib import get_close_matches
    return (get_close_matches(text, list(candidates), 1, 0.6) or [""])[0]


def parse_date_time(text: str) -> str | None:
    """Return a date-time as ISO 8601 in UTC, or None if it is malformed.

    `text` is ISO 8601, in UTC unless it has an offset, or Unix seconds.
    """
    from datetime import UTC, datetime
    try:
        if text.isascii() and text.isdigit() and len(text) > 8:
            instant = datetime.fromtimestamp(int(text), UTC)
        else:
            instant = datetime.fromisoformat(text)
            instant = instant.astimezone(UTC) if instant.tzinfo else instant
    except (ValueError, OverflowError, OSError):
        return None
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)


def read_response_file(path: str) -> list[str]:
    """Return the arguments in a response file.

    Blanks separate them, double quotes group them, and a line that begins with # is a comment. Raises ValueError with
    a sentence.
    """
    from shlex import shlex
    try:
        with open(path, "rb") as file:
            octets = file.read(MAX_SECRET_BYTES + 1)
        text = octets.decode("utf-8-sig")
    except OSError as problem:
        raise ValueError(f"cannot read {path}: {problem.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    if len(octets) > MAX_SECRET_BYTES:
        raise ValueError(f"{path} is too long")
    args = []
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            lexer = shlex(line, posix=True)
            lexer.whitespace_split, lexer.commenters, lexer.quotes, lexer.escape = True, "", '"', ""
            try:
                args += list(lexer)
            except ValueError:
                raise ValueError(f"{path} has a quote without its end") from None
    return args


def convert_value(kind: str, text: str) -> tuple[str | int | bool | None, str]:
    """Return the value of an option of this kind, and what is wrong with `text` ("" if nothing)."""
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
        value = parse_date_time(text)
        return value, "" if value else "is an ISO 8601 date-time, such as 2030-01-31T12:00:00Z" + (
            ", or the word permanent" if kind == "lockout" else ", or Unix seconds")
    return text, ""


class ArgumentReader:
    """Reads the arguments of a command from left to right into `parsed`. parse() checks the options afterwards."""

    def __init__(self, command: Command, args: list[str]):
        self.command, self.parsed = command, ParsedArguments()
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
        """Whether there is a next argument that does not look like an option."""
        return self.position < len(self.args) and not self.args[self.position].startswith("-")

    def read(self) -> ParsedArguments:
        positional = self.command.positional
        while self.position < len(self.args):
            arg = self.take()
            if arg in HELP_FLAGS:
                self.parsed.help_requested = True
            elif arg == "--":
                self.parsed.errors += [f"unexpected word '{extra}'" for extra in self.args[self.position:]]
                break
            elif arg.startswith("@") and len(arg) > 1:
                self.insert_file(arg[1:])
            elif positional and not arg.startswith("-") and positional not in self.parsed.options:
                self.parsed.options[positional] = arg
            elif arg.startswith("--"):
                self.read_option(arg)
            else:
                complaint = "unknown option" if arg.startswith("-") else "unexpected word"
                self.parsed.errors.append(f"{complaint} '{arg}'")
        return self.parsed

    def insert_file(self, path: str) -> None:
        """Insert the arguments of a response file. The limit of ten files stops files that include each other."""
        self.files += 1
        if self.files == 11:
            self.parsed.errors.append("too many files of words")
        if self.files > 10:
            return
        try:
            self.args[self.position:self.position] = read_response_file(path)
        except ValueError as problem:
            self.parsed.errors.append(str(problem))

    def read_option(self, arg: str) -> None:
        """Read an option and its value from the arguments."""
        name_end = min((i for i in (arg.find("="), arg.find(":")) if i > 0), default=len(arg))
        name, text = arg[2:name_end], arg[name_end + 1:] if name_end < len(arg) else None
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
            # The next argument is the value even if it begins with a hyphen, as a password may.
            texts = [self.take() if text is None else text]
            while kind == "list" and self.next_is_value():
                texts.append(self.take())
        self.store(name, kind, texts)

    def reject_unknown(self, name: str, without_value: bool) -> None:
        self.parsed.errors.append(f"unknown option '--{name}'")
        if guess := closest_match(name, self.kinds):
            self.parsed.hint = f"did you mean --{guess}?"
        # The next argument is most likely the value of the unknown option: skip it rather than report it too.
        if without_value and self.next_is_value():
            self.take()

    def store(self, name: str, kind: str, texts: list[str]) -> None:
        """Convert and store the value of an option. Only a list may be given more than once."""
        value, complaint = convert_value(kind, texts[0])
        if complaint:
            self.parsed.errors.append(f"--{name} {complaint}")
        if any("\ud800" <= ch <= "\udfff" for text in texts for ch in text):
            self.parsed.errors.append(f"--{name} is not valid UTF-8")
        if kind == "list":
            self.parsed.options.setdefault(name, []).extend(texts)
        elif name in self.parsed.options:
            self.parsed.errors.append(f"--{name} is given twice")
        else:
            self.parsed.options[name] = value


def check_option(option: Option, options: dict) -> Iterator[str]:
    """Yield an error for each thing that is wrong with the value of one option, or with its absence."""
    value = options.get(option.name)
    if option.kind == "secret" and option.stdin and value is not None:
        if options.get(option.stdin):
            yield f"--{option.name} and --{option.stdin} exclude each other"
        if value == "":
            yield f"--{option.name} is blank"
    # A value that could not be converted is stored as None, and its error has been told.
    if option.required and option.kind != "secret" and option.name not in options:
        yield f"--{option.name} is missing"
    if value is None:
        return
    if option.choices and value.lower() not in option.choices:
        yield f"--{option.name} is one of " + ", ".join(option.choices)
    if (option.collection or option.parent) and not all(
            item.strip() for item in (value if isinstance(value, list) else [value])):
        yield f"--{option.name} is blank"
    if isinstance(value, int) and option.minimum is not None and value < option.minimum:
        yield f"--{option.name} is at least {option.minimum}"


def check_change(command: Command, options: dict) -> Iterator[str]:
    """Yield an error if an update would change nothing."""
    optional = [option for option in command.options if not option.required]
    if command.at_least_one and not any(option.name in options or option.stdin in options for option in optional):
        yield "nothing to change: give at least one of " + ", ".join("--" + option.name for option in optional)


def parse(command: Command, args: list[str]) -> ParsedArguments:
    """Parse the arguments after the command, and collect all errors instead of stopping at the first."""
    parsed = ArgumentReader(command, args).read()
    for option in command.options:
        parsed.errors += check_option(option, parsed.options)
    parsed.errors += check_change(command, parsed.options)
    return parsed


# == Output ====================================================================
# Data goes to stdout, messages go to stderr. Control characters from the server are escaped: they could move the cursor
# or forge a line.

def printable(value) -> str:
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


def format_cell(member: str, value) -> str:
    """Return a member as text for a table, a timestamp as `YYYY-MM-DD HH:MM:SSZ`."""
    text = printable(value)
    if len(text) >= 19 and text[10] == "T" and text.endswith("Z") and member.endswith(("_at", "_until", "timestamp")):
        return text[:10] + " " + text[11:19] + "Z"
    return text


def display_width(text: str) -> int:
    """Return the number of terminal columns that `text` occupies. Unicode Standard Annex #11"""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(ch) else 2 if east_asian_width(ch) in "WF" else 1 for ch in text)


def truncate(text: str, width: int) -> str:
    """Return `text` cut to `width` columns, ending in an ellipsis if it was cut."""
    if display_width(text) <= width:
        return text
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    mark = "\u2026" if encoding.startswith("utf") else "~"
    while text and display_width(text) > width - 1:
        text = text[:-1]
    return text + mark if width > 0 else ""


def terminal_width() -> int | None:
    """Return the width of the terminal on stdout, or None if stdout is none."""
    try:
        if not sys.stdout.isatty():
            return None
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if columns.isdigit() and int(columns) else os.get_terminal_size(1).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def _title_and_member(spec: str) -> tuple[str, str]:
    """Return title and member of `"title=member"`, or of a member alone, whose name makes the title."""
    title, _, member = spec.rpartition("=")
    return title or member.removeprefix("is_").replace("_", " "), member


def table(noun: str, *specs: str):
    """Return a function that renders a list of objects, with a column for each of `specs`.

    Its attribute `render_rows` does so for an iterator, and keeps only the first PAGE_SIZE rows in memory.
    """
    titles, members = zip(*map(_title_and_member, specs), strict=True)

    def render_rows(rows) -> Iterator[str]:
        from itertools import chain, islice
        # The first page determines the widths of the columns: the rest of a long list has not been fetched yet.
        rows = ([format_cell(member, row.get(member)) for member in members] for row in rows)
        first_page = list(islice(rows, PAGE_SIZE))
        if not first_page:
            yield f"(no {noun})"
            return
        first_page.insert(0, [title.upper() for title in titles])
        widths = [max(display_width(cells[i]) for cells in first_page) for i in range(len(members))]
        limit = terminal_width()
        if limit:
            # Shrink the columns with ids last: ids are meant to be copied.
            for minimum, shrinkable in ((6, [i for i, m in enumerate(members) if not m.endswith("id")]),
                                        (1, list(range(len(members))))):
                while sum(widths) + 2 * (len(widths) - 1) > limit:
                    widest = max(shrinkable, key=lambda i: widths[i], default=None)
                    if widest is None or widths[widest] <= minimum:
                        break
                    widths[widest] -= 1
        first_page.insert(1, ["-" * width for width in widths])
        for cells in chain(first_page, rows):
            if limit:
                cells = [truncate(text, width) for text, width in zip(cells, widths, strict=True)]
            padded = (text + " " * (width - display_width(text)) for text, width in zip(cells, widths, strict=True))
            text = "  ".join(padded).rstrip()
            yield truncate(text, limit) if limit else text

    def render(rows: list[dict]) -> list[str]:
        return list(render_rows(rows))

    render.render_rows = render_rows  # type: ignore[attr-defined]
    return render


def fields(*specs: str):
    """Return a function that renders one object, with a labelled line for each of `specs` that the object has."""
    def render(row: dict) -> list[str]:
        pairs = [(title, format_cell(member, row[member]))
                 for title, member in map(_title_and_member, specs) if member in row]
        width = max((len(title) for title, _ in pairs), default=0)
        return [(title + ":").ljust(width + 3) + text for title, text in pairs]
    return render


class _BlankIfMissing(dict):
    """The members of an object as text; a member that the server omitted is blank."""

    def __missing__(self, name):
        return ""


def line_template(template: str):
    """Return a function that renders one object as one line; `{member}` in `template` stands for a member."""
    def render(row: dict) -> list[str]:
        return [template.format_map(_BlankIfMissing((name, printable(value)) for name, value in row.items()))]
    return render


def render_message(row: dict) -> list[str]:
    """Render the `message` of a Msg."""
    return [printable(row.get("message")) or "done"]


def _size(octets) -> str:
    """Return a number of octets in a unit that a person reads."""
    number, unit = float(octets or 0), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"


def render_status(status: dict) -> list[str]:
    """Render a Status, what needs attention last."""
    state = {"well": "is well", "attention": "needs attention", "stopped": "does not run"}
    workers, clock, disk = (status.get(name) or {} for name in ("workers", "clock", "disk"))
    rows = []
    if pid := printable(status.get("pid")):
        others = f"{printable(workers.get('running'))} of {printable(workers.get('expected'))}"
        rows = [("since", format_cell("since_at", status.get("since"))),
                ("processes", f"supervisor {pid}, {others} others" if workers.get("expected") else pid)]
    for end in status.get("endpoints") or []:
        host = printable(end.get("address"))
        address = f"{'https' if end.get('tls') else 'http'}://{f'[{host}]' if ':' in host else host}:{end.get('port')}"
        rows.append((printable(end.get("name")), printable(end["path"]) if end.get("path") else address))
    rows += [("issuer", printable(status.get("issuer")))]
    for title, member in (("certificate", "certificate"), ("admin certificate", "admin_certificate")):
        if found := status.get(member):
            rows.append((title, f"until {format_cell('not_after_at', found.get('not_after'))}, sha256 "
                                f"{printable(found.get('fingerprint'))[:16]}\u2026"))
    rows.append(("clock", f"{printable(clock.get('state'))}, {format_cell('now_at', clock.get('now'))}"))
    last, plan = status.get("last_backup"), status.get("backups") or {}
    file = f" {printable(last['name'])}, {_size(last.get('bytes'))}" if last and last.get("name") else ""
    rows.append(("last backup", f"{format_cell('made_at', last.get('at'))}{file}, {printable(last.get('kind'))}"
                 if last else "none"))
    if plan.get("every"):
        when = format_cell("next_at", plan.get("next_at")) or "soon"
        rows.append(("next backup", f"{when}, {plan.get('keep')} are kept"))
    rows.append(("disk", f"{_size(disk.get('free'))} of {_size(disk.get('total'))} free; database "
                 f"{_size(disk.get('database'))}, WAL {_size(disk.get('wal'))}, log {_size(disk.get('log'))}"))
    width = max(len(title) for title, _ in rows)
    lines = [f"microauthd {printable(status.get('version'))} {state.get(status.get('state', ''), '')}".rstrip()]
    lines += [(title + ":").ljust(width + 3) + text for title, text in rows]
    for found in status.get("attention") or []:
        since = f" (since {format_cell('since_at', found['since'])})" if found.get("since") else ""
        lines.append(f"{printable(found.get('severity'))}: {printable(found.get('text'))}{since}")
        if found.get("command"):
            lines.append("  see: " + printable(found["command"]))
    return lines


def render_history(answer: dict) -> list[str]:
    """Render figures over time in at most 60 lines: neighbouring points are added up, and a gap counts nothing."""
    from datetime import datetime
    try:
        begin = datetime.fromisoformat(answer["from"]).timestamp()
        step, series = answer["step"] + 0, answer["series"]
        columns = {printable(name): list(points) for name, points in series.items()}
        size = max(1, -(-max(map(len, columns.values())) // 60))
        rows = [["TIME (UTC)", *(name.upper() for name in columns)]]
        for start in range(0, max(map(len, columns.values())), size):
            cells = [format_utc(begin + start * step, "")]
            for points in columns.values():
                known = [point for point in points[start:start + size] if point is not None]
                cells.append(str(sum(known)) if known else "-")
            rows.append(cells)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _bad_response("the answer has no figures in it") from None
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def with_client_secret(render):
    """Return a function that renders a new client secret, if there is one, and then the object."""
    def render_both(row: dict) -> list[str]:
        secret = row.get("client_secret")
        return (["client secret, shown this once: " + printable(secret)] if secret else []) + render(row)
    return render_both


def render_ids(result) -> list[str]:
    """Render the ids of a result, for --quiet."""
    rows = result if isinstance(result, list) else [result]
    return [printable(row["id"]) for row in rows if isinstance(row, dict) and row.get("id")]


def to_json(value) -> str:
    """Return a value as one line of JSON."""
    from json import dumps
    return dumps(value, separators=(",", ":"))


def to_ndjson(rows: list[dict]) -> list[str]:
    """Return the rows as NDJSON."""
    return [to_json(row) for row in rows]


def print_message(kind: str, text: str, request_id: str = "") -> None:
    """Print a message to stderr, in lower case and without a full stop even if the server wrote it.

    `request_id` is that of the response it tells of, or "".
    """
    text = printable(text)
    if len(text) > 1 and text[0].isupper() and not text[1].isupper():
        text = text[0].lower() + text[1:]
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    if request_id:
        text += f" (request {printable(request_id)})"
    try:
        print(f"mad: {kind}: {text}", file=sys.stderr)
    except OSError:
        pass


# == Help ======================================================================
# Texts generated from COMMANDS: help, rows for the manual, completion scripts.

def nouns(commands: tuple[Command, ...]) -> list[str]:
    """Return the nouns of the commands, in the order of the table."""
    return list(dict.fromkeys(command.name.split()[0] for command in commands))


def _two_columns(pairs) -> list[str]:
    pairs = list(pairs)
    width = max(len(left) for left, _ in pairs) if pairs else 0
    return [f"  {left.ljust(width)}  {right}" for left, right in pairs]


def _option_forms(option: Option) -> list[tuple[str, str]]:
    """Return each form of an option on the command line with its help text."""
    forms = []
    if option.name:
        kind = {"flag": " [true|false]", "list": f" {option.metavar} ..."}.get(option.kind, " " + option.metavar)
        suffix = " (required)" if option.required and (option.kind != "secret" or not option.stdin) else ""
        forms.append(("--" + option.name + kind, option.help + suffix))
    if option.stdin:
        help_text = option.help if not option.name else "read it from standard input" + (
            "; asked for on a terminal when neither is given" if option.required else "")
        forms.append(("--" + option.stdin, help_text))
    return forms


def wrap_words(text: str, width: int, margin: str) -> list[str]:
    """Return `text` in lines of at most `width` columns, each beginning with `margin`."""
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
        "commands:", *(text for noun, names in verbs for text in ("  " + noun, *wrap_words(names, 76, "      "))), "",
        "where an id is asked, a name does; @file among the options stands for the words in that file",
        "what cannot be undone is asked about on a terminal, unless --yes is given", "",
        "options of every command:",
        *_two_columns([*(pair for option in COMMON_OPTIONS for pair in _option_forms(option)),
                       ("--help", "say more about a command")]),
        "",
        "environment:", *_two_columns(ENVIRONMENT), "",
        "exit status:", *_two_columns((str(code), text) for code, text in EXIT_STATUSES), "",
        "for example:", "  mad user create --help"))


def help_command(command: Command) -> str:
    """Return the text of `mad <noun> <verb> --help`."""
    remark = () if not command.streams else (
        "", "prints line by line while it goes; with --json each line is a document")
    if command.confirm_by is not None:
        remark = ("", "asks before it does so on a terminal, unless --yes is given; without a terminal it does not ask")
    return "\n".join((
        f"usage: mad {command.name} [options]", "", command.help, *remark, "",
        "options:", *_two_columns(pair for option in command.all_options() for pair in _option_forms(option)), "",
        "for example:", "  " + command.example))


def help_noun(commands: tuple[Command, ...], noun: str) -> str:
    """Return the text of `mad <noun> --help`."""
    chosen = [command for command in commands if command.name.split()[0] == noun]
    verbs = ((command.name.partition(" ")[2], command.help) for command in chosen if command.name != noun)
    return "\n".join((
        *(help_command(command) + "\n" for command in chosen if command.name == noun),
        f"usage: mad {noun} <verb> [options]", "",
        "verbs:", *_two_columns(verbs), "",
        "for example:", "  " + chosen[0].example))



def describe_commands(commands: tuple[Command, ...]) -> list[tuple[str, str, str]]:
    """Return (usage, help, request) for each command; `request` is "" for a command without a request to ADMIN.

    The usage omits the options that every list or every command has. What may be left out is in brackets, a secret too,
    since it is asked for.
    """
    rows = []
    for command in commands:
        parts = ["mad " + command.name]
        for option in command.options:
            if option not in SERVER_OPTIONS and option not in LIST_OPTIONS:
                text = " | ".join(left for left, _ in _option_forms(option))
                parts.append(text if option.required and option.kind != "secret" else f"[{text}]")
        request = (command.call.__doc__ or "").partition(". ")[0].partition(".\n")[0]
        rows.append((" ".join(parts), command.help,
                     request if request.startswith(("GET /", "POST /", "PUT /", "DELETE /")) else ""))
    return rows


def _option_flags(command: Command) -> list[str]:
    flags = [form.partition(" ")[0] for option in command.all_options() for form, _ in _option_forms(option)]
    return [*flags, "--help"]


def _completion_cases(commands: tuple[Command, ...]) -> list[tuple[str, list[str]]]:
    """Return the completions after each beginning of a command line: `""`, a noun, a noun and a verb."""
    cases: dict = {"": [*nouns(commands), "--help", "--version"]}
    for noun in nouns(commands):
        cases[noun] = [c.name.split()[1] for c in commands if c.name.startswith(noun + " ")] + ["--help"]
    for command in commands:
        cases[command.name] = cases.get(command.name, []) + _option_flags(command)
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
    cases = [f"    '{start}') words='{' '.join(words)}' ;;\n" for start, words in _completion_cases(commands)]
    return BASH_HEAD + "".join(cases) + BASH_TAIL


def complete_zsh(commands: tuple[Command, ...]) -> str:
    """Return the completion script for zsh."""
    cases = [f"    '{start}') found=({' '.join(words)}) ;;\n" for start, words in _completion_cases(commands)]
    return ZSH_HEAD + "".join(cases) + ZSH_TAIL


def complete_fish(commands: tuple[Command, ...]) -> str:
    """Return the completion script for fish."""
    def quoted(text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    lines = ["# completion of mad for fish", "complete -c mad -f",
             "complete -c mad -n __fish_use_subcommand -a " + quoted(" ".join(nouns(commands)))]
    for command in commands:
        noun, _, verb = command.name.partition(" ")
        condition = "__fish_seen_subcommand_from " + noun
        if verb:
            verbs = " ".join(c.name.split()[1] for c in commands if c.name.startswith(noun + " "))
            lines.append(f"complete -c mad -n '{condition}; and not __fish_seen_subcommand_from {verbs}'"
                         f" -a {verb} -d {quoted(command.help)}")
            condition += "; and __fish_seen_subcommand_from " + verb
        for option in command.all_options():
            for left, text in _option_forms(option):
                takes = "" if option.kind == "flag" or left.endswith("-stdin") else " -r"
                lines.append(f"complete -c mad -n '{condition}' -l {left.split()[0][2:]}{takes} -d {quoted(text)}")
    return "\n".join(lines)


COMPLETIONS = {"bash": complete_bash, "zsh": complete_zsh, "fish": complete_fish}


# == Context ===================================================================
# Options take precedence over environment variables, and those over the saved profile.

def stdin_is_terminal() -> bool:
    """Whether standard input is a terminal, so that somebody can be asked."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):
        return False


def read_secret_from_stdin(origin: str) -> str:
    """Return the first line of stdin without its line end. Raises CommandError if it is empty, too long or not UTF-8.

    `origin` is the option that asks for it, for the message.
    """
    try:
        octets = sys.stdin.buffer.readline(MAX_SECRET_BYTES + 1)
        text = octets.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except (AttributeError, ValueError, OSError):
        raise CommandError(EXIT_USAGE, "usage", f"{origin} finds no text in UTF-8 on standard input") from None
    if not text or len(octets) > MAX_SECRET_BYTES:
        raise CommandError(EXIT_USAGE, "usage", f"{origin} finds {'too much' if text else 'nothing'} on standard input")
    return text


def prompt_line(prompt: str) -> str:
    """Read a line from stdin. The prompt goes to stderr, because stdout carries data only."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def prompt_secret(prompt: str) -> str:
    from getpass import getpass
    try:
        secret = getpass(prompt)
    except EOFError:
        secret = ""
    if not secret:
        raise CommandError(EXIT_USAGE, "usage", "nothing was typed")
    return secret


class Context:
    """What a running command can use: its options, the table of commands, the environment and the profile."""

    def __init__(self, options: dict[str, Any], commands: tuple[Command, ...]):
        self.commands = commands
        self.options, self.json, self.quiet = options, options.get("json", False), options.get("quiet", False)
        self.profile = Profile()
        self.found_box: tuple[Box | None, ...] = ()

    # -- addresses --

    @property
    def box(self) -> Box | None:
        """The box of this machine, looked for once."""
        if not self.found_box:
            self.found_box = (Box.find(),)
        return self.found_box[0]

    def box_address(self, url: Url) -> BoxAddress:
        """Return where the box of this machine is that `url` means, for https; its own authority is trusted there."""
        return self.box.address(url.text) if url.scheme == "https" and self.box else None

    def url(self, text: str, origin: str) -> Url:
        """Return the URL, with a warning if tokens would travel unencrypted. Raises CommandError.

        `origin` is where the text comes from, for the message.
        """
        try:
            url = Url(text)
        except BadValue as problem:
            raise CommandError(EXIT_USAGE, "bad_url", f"{origin} is {problem}") from None
        if url.scheme == "http" and not url.is_loopback:
            print_message("warning", f"secrets and tokens travel in clear to {url.text}; use https")
        return url

    def admin_url(self) -> Url:
        if text := self.options.get("admin-url"):
            return self.url(text, "--admin-url")
        if text := os.environ.get("MAD_ADMIN_URL"):
            return self.url(text, "MAD_ADMIN_URL")
        if text := self.profile.url():
            return self.url(text, self.profile.url_path)
        return self.url_of_box("admin", ADMIN_URL)

    def auth_url(self) -> Url:
        if text := self.options.get("auth-url"):
            return self.url(text, "--auth-url")
        if text := os.environ.get("MAD_AUTH_URL"):
            return self.url(text, "MAD_AUTH_URL")
        return self.url_of_box("auth", AUTH_URL)

    def url_of_box(self, side: str, default: str) -> Url:
        """Return the URL of a port of this machine's box, where nothing else names one. It does not leave the machine.
        """
        try:
            return Url(self.box.urls[side] if self.box else default)
        except BadValue:
            return Url(default)

    def issuer_url(self) -> Url:
        """Return the URL of the server that issued the saved token. Raises CommandError."""
        try:
            return Url(self.profile.url() or ADMIN_URL)
        except BadValue:
            raise _unsafe_file(self.profile.url_path, "holds no URL") from None

    # -- the token --

    def admin_token(self, url: Url) -> str:
        """Return the token to send to `url`.

        Raises CommandError if there is none, if it has expired, or if another server issued it.
        """
        token = self.options.get("admin-token", secret_variable("MAD_ADMIN_TOKEN"))
        hint = "log in with: mad session login"
        if token is not None:
            token = token.strip()
        else:
            token = self.profile.token()
            if token and url.text != (issuer_url := self.issuer_url().text):
                raise CommandError(EXIT_LOGIN, "foreign_server",
                                   f"the saved login is for {issuer_url}, not for {url.text}",
                                   hint="log in there with: mad session login --admin-url " + url.text)
            if token:
                self._check_expiry(token, hint)
        if not token:
            raise CommandError(EXIT_LOGIN, "not_logged_in", "not logged in", hint=hint)
        if not is_token(token):
            raise CommandError(EXIT_LOGIN, "not_logged_in", "the token has characters no token has", hint=hint)
        return token

    @staticmethod
    def _check_expiry(token: str, hint: str) -> None:
        from time import time
        try:
            expires_at = decode_jwt(token)[1]["exp"] + 0
        except (ValueError, KeyError, TypeError):
            print_message("warning", "cannot tell when the saved token expires")
            return
        if expires_at <= time():
            raise CommandError(EXIT_LOGIN, "token_expired", "the saved login expired at " + format_utc(expires_at),
                               hint=hint)

    @staticmethod
    def runtime_folder() -> list[tuple[str, frozenset[int]]]:
        """Return RUNTIME_FOLDER and the uids whose files there are a server's, or nothing if there is none.

        Only root can make this folder, and does so for the user of the service.
        """
        ours = frozenset((0, os.geteuid()))
        try:
            folder = os.lstat(RUNTIME_FOLDER)
        except OSError:
            return []
        return [(RUNTIME_FOLDER, ours if folder.st_mode & 0o022 else ours | {folder.st_uid})]

    def marks(self, url: Url) -> Marks | None:
        """Return the marks of the server at `url`, if it runs on this machine."""
        ours = frozenset((0, os.geteuid()))
        box = self.found_box[0] if self.found_box else None
        if not url.is_loopback and not (box and url.text in box.urls.values()):
            return None
        folders = [("", ours), *self.runtime_folder()]
        if box:
            folders.append((box.folder, ours | {box.owner}))
        return Marks.find(url.port, folders)

    @staticmethod
    def admin_sockets(url: Url) -> Sockets:
        """Return the Unix sockets by which ADMIN knows that mad runs at the machine, and whose each may be."""
        if (named := os.environ.get("MAD_ADMIN_SOCKET")) is not None:
            return ((named, None),) if named else ()
        if not url.is_loopback or sys.platform != "linux":
            return ()
        ours = frozenset((0, os.geteuid()))
        found = []
        try:
            if (owner := os.lstat(ADMIN_SOCKET).st_uid) in ours:
                found.append((ADMIN_SOCKET, ours))
            else:
                print_message("warning", f"{ADMIN_SOCKET} in this folder is that of user {owner}, and not used; if you "
                              f"trust that user: MAD_ADMIN_SOCKET={ADMIN_SOCKET}")
        except OSError:
            pass
        found += [(os.path.join(folder, ADMIN_SOCKET), owners) for folder, owners in Context.runtime_folder()]
        return tuple(found)

    def client(self, url: Url | None = None, token: str | None = None) -> MadClient:
        """Return a MadClient. By default it has the configured URL and the token that belongs to it."""
        url = url or self.admin_url()
        client = MadClient(url.text, self.admin_token(url) if token is None else token,
                           ca_file=os.environ.get("MAD_CA_FILE") or None)
        client.sockets, client.box = self.admin_sockets(url), self.box_address(url)
        return client

    # -- secrets, ids, confirmation --

    def secret_of(self, option: Option) -> str | None:
        """Return the value of a secret option: as given, read from stdin, or asked for on a terminal."""
        if option.name in self.options:
            return self.options[option.name]
        if option.stdin and self.options.get(option.stdin):
            return read_secret_from_stdin("--" + option.stdin)
        if not option.required:
            return None
        if not stdin_is_terminal():
            ways = " or ".join("--" + name for name in (option.stdin, option.name) if name)
            raise CommandError(EXIT_USAGE, "usage", f"{ways} is missing", hint="pipe it in with --" + option.stdin)
        if option.is_existing:
            return prompt_secret("password: ")
        first = prompt_secret("new password: ")
        if prompt_secret("once more: ") != first:
            raise CommandError(EXIT_USAGE, "usage", "the two passwords differ")
        return first

    def resolve_id(self, client: MadClient, option: Option, value: str) -> str:
        """Return `value` if it is an id, otherwise the id of the object with that name."""
        if is_uuid(value):
            return value.lower()
        try:
            return client.find_id(option.collection, value)
        except MadError as problem:
            if problem.status != 404 or isinstance(problem, NoRoute):
                raise
            if option.allow_unknown:
                return value
            raise MadError(404, problem.error, f"there is no {option.collection[:-1]} '{value}'",
                           hint=f"see: mad {option.collection[:-1]} list", request_id=problem.request_id) from None

    def resolve_child_id(self, client: MadClient, option: Option, value: str, parent_id: str | None) -> str:
        """Return `value` if it is an id, otherwise the id of the child of `parent_id` that `value` names."""
        if is_uuid(value):
            return value.lower()
        parent_option, list_children, members = option.parent
        if parent_id is None:
            raise CommandError(EXIT_USAGE, "usage",
                               f"--{option.name} is no id, and to look it up --{parent_option} is missing")
        for row in client.each(getattr(client, list_children.__name__), parent_id):
            if value in [row.get(member) for member in members] and isinstance(row.get("id"), str):
                return row["id"]
        raise MadError(404, "not_found", f"there is no '{value}' there")

    def confirm(self, command: Command) -> None:
        """Ask for confirmation on a terminal before a destructive command. Raises CommandError if it is denied."""
        if command.confirm_by is None or self.options.get("yes") or not stdin_is_terminal():
            return
        sys.stderr.write(f"mad {command.name}: {command.help}\n")
        expected = (self.options.get(command.confirm_by) or "").strip() if command.confirm_by else ""
        is_confirmed = (prompt_line(f"type {printable(expected)} to confirm: ") == expected if expected
                        else prompt_line("go on? [y/N] ").lower() in ("y", "yes"))
        if not is_confirmed:
            raise CommandError(EXIT_USAGE, "not_confirmed", "not confirmed; nothing was sent")


# == Handlers ==================================================================
# The commands that need more than one request, or none. Each returns the result that --json prints.

def _username_of(claims: dict) -> str:
    return str(claims.get("username") or claims.get("preferred_username") or "")


def _expiry_of(claims: dict) -> str:
    expires_at = claims.get("exp")
    return format_utc(expires_at) if isinstance(expires_at, (int, float)) else ""


def session_login(context: Context, username: str | None = None, password_stdin: bool = False,
                  totp: str | None = None) -> dict:
    """Log in with name and password, and save the admin token."""
    url = context.admin_url()
    # Check the files before anybody types a password.
    for path in (context.profile.token_path, context.profile.url_path):
        try:
            _check_private_file(path, os.lstat(path))
        except OSError:
            pass
    name = username or ""
    if not name.strip():
        if password_stdin or not stdin_is_terminal():
            raise CommandError(EXIT_USAGE, "usage", "--username is missing",
                               hint="without a terminal, give --username and --password-stdin")
        name = prompt_line("username: ")
        if not name:
            raise CommandError(EXIT_USAGE, "usage", "nothing was typed")
    if not password_stdin and not stdin_is_terminal():
        raise CommandError(EXIT_USAGE, "usage", "there is no terminal to ask for the password on",
                           hint="pipe it in with --password-stdin")
    password = read_secret_from_stdin("--password-stdin") if password_stdin else prompt_secret("password: ")
    client = context.client(url, token="")
    try:
        answer = client.login(name, password, totp)
    except MadError as problem:
        if problem.status not in (400, 401, 403) or totp or not stdin_is_terminal():
            raise
        # The response does not tell a wrong password from a missing code, so ask for a code in either case.
        totp = prompt_line("one-time code (blank if none): ")
        if not totp:
            raise
        answer = client.login(name, password, totp)
    token = answer["access_token"]
    try:
        claims = decode_jwt(token)[1]
    except ValueError:
        raise _bad_response("the answer has no access token") from None
    context.profile.save(token, url.text)
    subject = str(claims.get("sub", ""))
    return {"success": True, "sub": subject, "message": f"logged in as {subject} at {url.text}",
            "username": _username_of(claims) or name, "expires_at": _expiry_of(claims), "url": url.text}


def session_logout(context: Context) -> dict:
    """Remove the saved token, and have the server revoke it."""
    token = context.profile.token(to_end_it=True)
    if not context.profile.delete_token():
        return {"success": True, "message": "not logged in"}
    try:
        # The token goes only to the server that issued it, whatever address is configured.
        url = context.url(context.profile.url() or ADMIN_URL, context.profile.url_path)
        if token and is_token(token):
            context.client(url, token).logout()
    except (MadError, CommandError) as problem:
        # 404 and 405: the server has no such route. 401: the token was invalid already.
        if not (isinstance(problem, MadError) and problem.status in (401, 404, 405)):
            print_message("warning",
                          f"the server could not be told, so the token stays good until it expires: {problem}",
                          problem.request_id if isinstance(problem, MadError) else "")
    return {"success": True, "message": "logged out"}


def session_status(context: Context) -> dict:
    """Decode the current token, without a request to the server."""
    url = context.admin_url()
    token = context.admin_token(url)
    try:
        claims = decode_jwt(token)[1]
    except ValueError as problem:
        raise CommandError(EXIT_LOGIN, "bad_token", f"the token cannot be read: {problem}") from None
    roles = claims.get("roles", claims.get("role"))
    roles = [str(role) for role in roles] if isinstance(roles, list) else [str(roles)] if roles else []
    return {"success": True, "sub": str(claims.get("sub", "")), "username": _username_of(claims),
            "role": roles[0] if roles else "(none)", "roles": roles, "expires_at": _expiry_of(claims),
            "token_use": str(claims.get("token_use", "")), "url": url.text}


def warn_about_switches(members: dict) -> None:
    for name, warning in (
        ("allow_http_redirects",
         "codes may travel in clear to http redirect URIs: use them in a trusted network only"),
        ("allow_short_schemes",
         "another program may register a short scheme and receive the codes: prefer one with a dot"),
    ):
        if members.get(name):
            print_message("warning", warning)


def client_update(client: MadClient, id: str, **members) -> dict:
    """PUT /clients/{id}. Change a client, and warn about the switches that are turned on."""
    changed = client.update_client(id, **members)
    warn_about_switches(members)
    return changed


def read_flags(texts: list[str] | None) -> dict[str, dict] | None:
    """Return the flags of a new client: each text is the name of one, or NAME=OPTION."""
    if texts is None:
        return None
    pairs = [text.partition("=") for text in texts]
    return {name.upper(): {"is_enabled": True, "options": option} for name, _, option in pairs}


def client_create(context: Context, client_id: str, secret: str | None = None, gen_password: int | None = None,
                  public: bool = False, introspect: bool | None = None, grant: list | None = None,
                  scope: list | None = None, flag: list | None = None, **members) -> dict:
    """POST /clients. Create a client. The result has `client_secret` if mad or the server generated one."""
    if public and (secret is not None or gen_password is not None):
        raise CommandError(EXIT_USAGE, "usage", "a public client has no secret")
    generated = None
    if gen_password is not None:
        # 64 characters: six bits of a random octet select one of them uniformly.
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        secret = generated = "".join(letters[octet & 63] for octet in os.urandom(gen_password))
    if context.quiet and not context.json and not public and (secret is None or generated):
        raise CommandError(EXIT_USAGE, "usage", "--quiet would lose the secret that is made",
                           hint="use --json, or give one with --secret-stdin")
    client = context.client().create_client(client_id, secret, public=public, grant_types=grant, scopes=scope,
                                            may_introspect=introspect, flags=read_flags(flag), **members)
    warn_about_switches(members)
    if generated:
        client["client_secret"] = generated
    return client


def client_preview(client: MadClient, id: str, claims: str | None = None, **members) -> dict:
    """POST /clients/{id}/preview. Show what a client would get; `claims` is JSON."""
    import json
    try:
        found = None if claims is None else json.loads(claims)
    except ValueError:
        found = claims
    if found is not None and not isinstance(found, dict):
        raise CommandError(EXIT_USAGE, "usage", "--claims is no JSON object")
    return client.preview_tokens(id, claims=found, **members)


def render_preview(preview: dict) -> list[str]:
    """Return the lines for a preview: what is in the way, the scopes, and each token's header and claims."""
    scopes = preview.get("scopes") or {}
    lines = ["refused: " + printable(preview["refused"])] if preview.get("refused") else []
    lines += ["in the way: " + printable(one) for one in preview.get("obstacles") or ()]
    lines.append("granted: " + printable(" ".join(scopes.get("granted") or ()) or "(no scope)"))
    lines += [f"left out: {printable(name)}: {printable(why)}" for name, why in (scopes.get("left_out") or {}).items()]
    if preview.get("consent"):
        lines.append("asked for first: " + printable(" ".join(preview["consent"])))
    for part in ("access_token", "id_token", "userinfo"):
        if preview.get(part):
            lines += [f"{part}, not signed:", "  " + printable(to_json(preview[part]))]
    return lines


def user_totp_enroll(context: Context, client: MadClient, id: str, client_id: str | None = None,
                     svg: str | None = None) -> dict:
    """POST /users/{id}/totp/enroll. Generate a TOTP secret; write its QR code to the file `svg` if it is given."""
    descriptor = None
    if svg is not None:
        # Create the file before the request: the request replaces the old secret, and shows the new one only once.
        try:
            descriptor = os.open(svg, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise CommandError(EXIT_USAGE, "usage", f"cannot make {svg}: {problem.strerror}") from None
    try:
        answer = client.enroll_totp(id, client_id)
        if not isinstance(answer.get("otpauth_uri"), str):
            raise _bad_response("the answer is not the JSON it should be")
    except BaseException:
        if descriptor is not None and svg is not None:
            os.close(descriptor)
            os.unlink(svg)
        raise
    if descriptor is not None:
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(str(answer.get("svg") or ""))
        except OSError as problem:
            print_message("warning", f"cannot write {svg}: {problem.strerror}")
    if stdin_is_terminal() and not context.json:
        print_message("hint", "put it into an authenticator, then confirm it with: "
                      f"mad user totp-verify --user-id {context.options['id']} --code CODE")
    return answer


def render_codes(answer: dict) -> list[str]:
    return [printable(code) for code in answer.get("recovery_codes") or ()]


def render_enrolment(answer: dict) -> list[str]:
    return ["otpauth URI, shown this once: " + printable(answer["otpauth_uri"]),
            "secret, shown this once: " + printable(answer.get("secret"))]


def set_brand(client: MadClient, name: str | None = None, color: str | None = None, logo: str | None = None,
              no_logo: bool = False) -> dict:
    """PUT /brand. What is None stays unchanged. `logo` is the path of a picture."""
    if logo is not None and no_logo:
        raise CommandError(EXIT_USAGE, "usage", "--logo and --no-logo cannot both be given")
    members = _without_none(name=name, color=color, logo="" if no_logo else None)
    if logo is not None:
        from base64 import b64encode
        try:
            with open(logo, "rb") as file:
                picture = file.read(PICTURE_MAX + 1)
        except OSError as problem:
            raise CommandError(EXIT_USAGE, "usage", f"cannot read {logo}: {problem.strerror}") from None
        if not picture or len(picture) > PICTURE_MAX:  # more would not fit into a request
            wrong = f"has more than {PICTURE_MAX} bytes" if picture else "is empty"
            raise CommandError(EXIT_USAGE, "usage", f"the picture {logo} {wrong}")
        members["logo"] = b64encode(picture).decode()
    return client.update_brand(**members)


def flat_brand(brand: dict) -> dict:
    """Return a brand with a sentence in place of its picture."""
    logo, origins = brand.get("logo") or {}, brand.get("origins") or {}
    shown = "{media_type}, {bytes} bytes, {uri}".format_map(_BlankIfMissing(logo)) if logo else "none"
    name = brand.get("name") or f"{brand.get('host')} (the issuer's host)"
    from_where = ", ".join(f"{part}: {origin}" for part, origin in origins.items())
    return {**brand, "name": name, "logo": shown, "from": from_where}


def render_brand(brand: dict) -> list[str]:
    return fields("name", "color", "text color=text_color", "contrast", "logo", "from", "modified at=modified_at")(
        flat_brand(brand))


def backup(context: Context, client: MadClient, file: str, force: bool = False, without_keys: bool = False) -> dict:
    """POST /backup. Have the server make a backup, download it to `file`, and delete the server's copy."""
    from hashlib import sha256
    if os.path.lexists(file) and not force:
        raise CommandError(EXIT_USAGE, "usage", f"{file} is there already", hint="--force writes over it")
    temporary = f"{file}.{os.getpid()}.new"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise CommandError(EXIT_USAGE, "usage", f"cannot make {file}: {problem.strerror}") from None
    created = None
    try:
        client.timeout = max(client.timeout, 600)  # The server writes and verifies the backup before it responds.
        created = client.make_backup(without_keys)
        digest = sha256()
        with os.fdopen(descriptor, "wb", closefd=False) as target:
            for piece in client.read_backup(str(created.get("name"))):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != created.get("sha256"):
            raise _bad_response("what came is not the backup that was made")
        os.fsync(descriptor)
        os.rename(temporary, file)
    except OSError as problem:
        raise CommandError(EXIT_REFUSED, "cannot_write", f"cannot write {file}: {problem.strerror}") from None
    finally:
        os.close(descriptor)
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        if created is not None:
            try:
                client.delete_backup(str(created.get("name")))
            except MadError as problem:
                print_message("warning", f"the server keeps its copy: {problem.message}", problem.request_id)
    return created


def _sequence_number(row: dict) -> int:
    number = str(row.get("id"))
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise _bad_response("the entries of this server have no numbers to go on from", hint="")
    return int(number)


def _wait_unless_closed(seconds: float) -> bool:
    """Wait, and return True afterwards. Return False as soon as the reader of stdout has closed it."""
    import time
    try:
        from select import poll
        poller = poll()
        poller.register(sys.stdout.fileno(), 0)  # poll() reports POLLERR and POLLHUP without being asked for them.
    except (ImportError, AttributeError, OSError, ValueError):
        time.sleep(seconds)
        return True
    return not poller.poll(seconds * 1000)


def follow_audit_log(client: MadClient, after: int, **filters: str | None) -> tuple[list[dict], int, bool]:
    """GET /audit-logs. Return the entries after an id, the id up to which was searched, and whether there are more."""
    answer = client.send("GET", "/audit-logs", expected=list,
                         query=_without_none(**filters, after=str(after), limit=PAGE_SIZE))
    rows = [row for row in answer.value if _sequence_number(row) > after]
    searched = answer.headers.get("x-next-after", "")
    searched = int(searched) if searched.isascii() and searched.isdigit() and len(searched) < 20 else 0
    has_more = bool(next_query(answer.headers.get("link", "")))
    return rows, max([after, searched, *map(_sequence_number, rows)]), has_more


def audit_tail(context: Context, client: MadClient, lines: int = 10, interval: int = 1, user_id: str | None = None,
               action: str | None = None, target: str | None = None, **more: Any) -> Iterator[list[dict]]:
    """GET /audit-logs. Yield new entries of the audit log until the reader of stdout closes it."""
    rows = client.list_audit_logs(user_id, action, max(lines, 1), target=target, **more)
    after = max(map(_sequence_number, rows), default=0)
    yield rows[:lines][::-1]
    pause, is_down = interval, False
    while _wait_unless_closed(pause):
        pause = interval
        try:
            rows, after, has_more = follow_audit_log(
                client, after, userId=user_id, action=action, target=target, **more)
        except MadError as problem:
            # Retry while the server restarts or is busy. Other errors do not go away by themselves.
            is_unreachable = isinstance(problem, Unreachable) and problem.error != "untrusted"
            if not is_unreachable and problem.status not in (429, 500, 503):
                raise
            if not is_down:
                print_message("warning", str(problem).rstrip(".") + "; trying again", problem.request_id)
            is_down, pause = True, max(interval, min(problem.retry_after, 60))
            continue
        if is_down:
            print_message("warning", "the server answers again")
            is_down = False
        yield rows
        if has_more:
            pause = 0


def render_audit_entries(rows: list[dict]) -> list[str]:
    return [" ".join([format_cell("timestamp", row.get("timestamp")), printable(row.get("action"))] + [
        f"{title}={printable(row[member])}" for title, member in (
            ("result", "result"), ("user", "actor_id"), ("target", "target"), ("secondary", "secondary"),
            ("ip", "ip_address")) if row.get(member)])
        for row in rows]


def describe_chain(answer: dict) -> dict:
    if answer["valid"]:
        rows = printable(answer.get("rows"))
        return {"success": True, "message": f"the audit log is whole: {rows} rows", **answer}
    return {"success": False, "message": printable(answer.get("reason")) or "the audit log was changed",
            "error": "audit_log_changed", **answer}


def token_inspect(context: Context, token: str) -> dict:
    """Decode a JWT. Nothing is verified."""
    try:
        header, payload, signature = decode_jwt(token.strip())
    except ValueError as problem:
        raise CommandError(EXIT_USAGE, "bad_token", str(problem)) from None
    return {"header": header, "payload": payload, "signature": signature}


def render_jwt(parts: dict) -> list[str]:
    lines = []
    for title in ("header", "payload"):
        lines += [title.upper(), "-" * len(title)]
        for name, value in parts[title].items():
            is_stamp = name in ("exp", "iat", "nbf") and isinstance(value, int) and not isinstance(value, bool)
            text = (format_utc(value, " UTC") if is_stamp
                    else str(value) if isinstance(value, bool) else printable(value))
            lines.append(f"{printable(name)}: {text}")
        lines.append("")
    return [*lines, "SIGNATURE", "---------", printable(parts["signature"])]


def token_get(context: Context, client_id: str | None = None, secret: str | None = None, scope: str | None = None,
              no_cache: bool = False, fresh: bool = False) -> dict:
    """Return a token response for a machine client, from the cache while the token is valid."""
    from time import time
    url = context.auth_url()
    client_id = client_id or os.environ.get("MAD_CLIENT_ID")
    if not client_id:
        raise CommandError(EXIT_USAGE, "usage", "--client-id is missing", hint="give it, or set MAD_CLIENT_ID")
    secret = secret or secret_variable("MAD_CLIENT_SECRET")
    if not secret and stdin_is_terminal():
        secret = prompt_secret("client secret: ")
    if not secret:
        raise CommandError(EXIT_USAGE, "usage", "the client secret is missing",
                           hint="set MAD_CLIENT_SECRET, or pipe it in with --secret-stdin")
    scope = " ".join((scope or "").split())
    cache = None if no_cache else TokenCache(url.text, client_id, scope, secret)
    marks = context.marks(url) if cache else None
    if cache and not fresh and (answer := cache.find(int(time()), marks)):
        return answer
    client = AuthClient(url.text, client_id, secret, ca_file=os.environ.get("MAD_CA_FILE") or None)
    client.box = context.box_address(url)
    asked_at = int(time())
    try:
        answer = client.client_credentials(scope)
    except MadError as problem:
        if problem.status == 401:
            problem.hint = "check the client id and its secret"
        raise
    if cache:
        cache.store(answer, asked_at, marks)
    return answer


def completion(name: str):
    """Return the handler that returns the completion script for a shell."""
    return lambda context: {"success": True, "message": COMPLETIONS[name](context.commands)}


def render_script(result: dict) -> list[str]:
    return [result["message"]]


def render_access_token(answer: dict) -> list[str]:
    return [answer["access_token"]]


def describe_access(answer: dict) -> dict:
    message = "allowed" if answer["allowed"] else "not allowed"
    if answer.get("reason"):
        message += ": " + " ".join([str(answer["reason"]), *(f"({role})" for role in answer.get("by_roles") or ())])
    return {"success": True, "message": message, **answer}


def describe_uri_verdict(answer: dict) -> dict:
    wrong = f"the URI {answer.get('reason')}"
    if answer.get("nearest"):
        wrong += f"; the nearest that it has is {answer['nearest']}"
    return {**answer, "success": answer.get("ok") is True,
            "message": "the URI would be taken" if answer.get("ok") is True else wrong}


def with_success(answer: dict) -> dict:
    return {"success": True, "message": str(answer.get("message") or "done"), **answer}


# == Commands ==================================================================
# A new command is a row here and, if there is none yet, a method of MadClient.

ID_OF_USER = Option("id", "the user", required=True, collection="users")
ID_OF_ROLE = Option("id", "the role", required=True, collection="roles")
ID_OF_PERMISSION = Option("id", "the permission", required=True, collection="permissions")
ID_OF_SCOPE = Option("id", "the scope", required=True, collection="scopes")
ID_OF_CLIENT = Option("id", "the client", required=True, collection="clients")
USER_ID = Option("user-id", "the user", required=True, collection="users")
ROLE_ID = Option("role-id", "the role", required=True, collection="roles")
PERMISSION_ID = Option("permission-id", "the permission", required=True, collection="permissions")
SCOPE_ID = Option("scope-id", "the scope", required=True, collection="scopes")
SCOPE_IDS = Option("scope-id", "the scopes, one or more", "list", required=True, collection="scopes", dest="scope_ids")
CLIENT_ID = Option("client-id", "the client", required=True, collection="clients")
NAME = Option("name", "its name", required=True)
DESCRIPTION = Option("description", "what it is for", metavar="TEXT")
PRIVILEGED = Option("privileged", "who acts by a delegated scope reaches no user with this role, unless it has it too",
                    "flag", dest="is_privileged")
NEW_NAME = Option("name", "its new name")
FLAG = Option("flag", "ENABLE_TOTP, TOTP_ISSUER, TOKEN_EXPIRATION, REFRESH_TOKEN_EXPIRATION, SESSION_BASED_AUTH "
              "or SESSION_BASED_MAX_AGE", required=True)
RECORD_ID = Option("id", "its id", required=True, metavar="ID")
OPTIONAL_CLIENT_ID = Option("client-id", "only for this client", collection="clients")
IDP_ID = Option("idp-id", "its id or its key", required=True, metavar="ID|KEY",
                parent=("id", MadClient.list_idps, ("provider_key",)))
URI = Option("uri", "the URI, exactly as the client will send it", required=True)
URI_SWITCHES = (
    Option("allow-http-redirects", "may have http redirect URIs of other hosts, if it is confidential", "flag"),
    Option("allow-short-schemes", "may have redirect URIs with a scheme without a dot", "flag"),
)
CLIENT_OPTIONS = (
    Option("grant", "a grant type it may use, one or more", "list", dest="grant_types"),
    Option("introspect", "may introspect tokens of other clients", "flag", dest="may_introspect"),
    Option("first-party", "is our own, so that nobody is asked for consent", "flag", dest="is_first_party"),
    Option("access-token-signed-alg", "how its access tokens are signed; blank leaves it to the server",
           metavar="ES256|RS256"),
    Option("id-token-signed-response-alg", "how its ID tokens are signed; blank leaves it to the server",
           metavar="ES256|RS256"),
    *URI_SWITCHES,
)
IDP_OPTIONS = (
    Option("provider-key", "short key, such as google", required=True),
    Option("display-name", "what people read", required=True),
    Option("issuer", "its issuer URL", required=True, metavar="URL"),
    Option("external-client-id", "our client id there", required=True),
    Option("scopes", "what to ask it for (openid email profile)"),
)
PURGE_OPTIONS = (
    Option("older-than", "age in seconds", "number", required=True, metavar="SECONDS"),
    Option("expired", "purge what expired before then", "flag"),
    Option("revoked", "purge what was revoked and expired before then", "flag"),
)
AUDIT_FILTERS = (
    Option("user-id", "who did it", collection="users", allow_unknown=True), Option("action", "exactly this action"),
    Option("target", "exactly this target"),
    Option("result", "only what succeeded, or what failed", choices=("success", "failure")),
    Option("ip-address", "only what came from this address", metavar="ADDRESS"),
    Option("request-id", "only what one request did", metavar="ID"),
    Option("about", "what a user did, and what was done to the user", collection="users", allow_unknown=True),
)
KID = Option("kid", "the key's identifier", required=True, metavar="KID")
JWT = Option("token", "the token; - reads standard input", "token", required=True, metavar="JWT")
NEW_SECRET = Option("secret", "better from stdin: an argument is visible to every process", "secret",
                    stdin="secret-stdin")

USER_FIELDS = fields("id", "username", "email", "is_active", "email_verified", "totp_enabled", "lockout_until",
                     "lockout_reason", "lockout_by", "totp_locked_until", "recovery_codes_left", "is_admin", "roles",
                     "last_login_at", "created_at")
ROLE_FIELDS = fields("id", "name", "description", "is_protected", "is_privileged")
ROLE_TABLE = table("roles", "id", "name", "is_protected", "description")
PERMISSION_TABLE = table("permissions", "id", "name")
SCOPE_FIELDS = fields("id", "name", "description=desc", "created_at", "is_active")
SCOPE_TABLE = table("scopes", "id", "name", "description=desc")
CLIENT_FIELDS = fields("id", "client_id", "display_name", "audience", "client_type", "grant_types", "scopes",
                       "may_introspect", "is_first_party", "allow_http_redirects", "allow_short_schemes",
                       "access_token_signed_alg", "id_token_signed_response_alg", "is_active", "created_at",
                       "last_token_at")
USER_TABLE = table("users", "id", "username", "email", "is_active")
CLIENT_TABLE = table("clients", "id", "client_id", "is_active", "display_name")
REDIRECT_URI_TABLE = table("redirect URIs", "id", "redirect_uri")
URI_TABLE = table("URIs", "id", "uri")
IDP_MEMBERS = ("id", "key=provider_key", "display_name", "issuer")
FLAG_TABLE = table("flags", "flag", "is_enabled", "options")
SESSION_FIELDS = fields("id", "user_id", "username", "client_id", "token_use", "login_method", "is_revoked",
                        "issued_at", "expires_at", "sid", "scope", "ip_address", "user_agent")
SESSION_TABLE = table("sessions", "id", "user_id", "client_id", "use=token_use", "is_revoked", "expires=expires_at")
REFRESH_TOKEN_TABLE = table("refresh tokens", "id", "user_id", "is_revoked", "expires=expires_at")
AUDIT_MEMBERS = ("id", "user=actor_id", "action", "result", "target", "secondary", "time=timestamp")


def uri_commands(verb: str, description: str, bound, uri: str) -> tuple:
    """Return the commands for one kind of URI of a client."""
    add, list_, delete = bound
    parent = ("client-id", list_, ("uri", "redirect_uri"))
    return (
        Command("client add-" + verb, "allow a client " + description, add, (ID_OF_CLIENT, URI),
                line_template("added {uri} with id {id}"), f"mad client add-{verb} --id app --uri {uri}"),
        Command(f"client list-{verb}s", "list what was added with add-" + verb, list_, (CLIENT_ID,), URI_TABLE,
                f"mad client list-{verb}s --client-id app"),
        Command("client delete-" + verb, "remove " + description, delete, (
            CLIENT_ID, Option("id", "its id, or the URI itself", required=True, metavar="ID|URI", parent=parent),
        ), render_message, f"mad client delete-{verb} --client-id app --id {uri}", confirm_by=""),
    )


def session_commands(noun: str) -> tuple:
    """Return the commands on sessions under one of their two nouns."""
    return (
        Command(noun + " list", "list the sessions, newest first", MadClient.list_sessions, (
            Option("user-id", "only those of this user", collection="users"),
            Option("client-id", "only those at this client", metavar="ID|NAME"),
            Option("living", "only those that are alive", "flag"),
            Option("ip-address", "only those of logins from this address", metavar="ADDRESS"),
            Option("mad-use", "only tokens of this port", choices=("auth", "admin")),
            Option("sid", "only those of this login", metavar="SID"),
        ), SESSION_TABLE, f"mad {noun} list --user-id bob"),
        Command(noun + " get", "show a session", MadClient.get_session, (RECORD_ID,), SESSION_FIELDS,
                f"mad {noun} get --id 019344f2c1d47a5b9a4c3e2d1f0a9b8c"),
        Command(noun + " list-by-user", "list the sessions of a user", MadClient.list_sessions_of_user, (USER_ID,),
                SESSION_TABLE, f"mad {noun} list-by-user --user-id bob"),
        Command(noun + " introspect", "have the server read a token, and tell why it is not active",
                MadClient.introspect, (JWT,),
                lambda claims: [f"{printable(name)}: {printable(value)}" for name, value in claims.items()],
                f"mad {noun} introspect --token -"),
        Command(noun + " revoke", "revoke a session and its token", MadClient.revoke_session, (RECORD_ID,),
                render_message, f"mad {noun} revoke --id 019344f2c1d47a5b9a4c3e2d1f0a9b8c", transform=with_success),
        Command(noun + " browsers", "list who is logged in at a browser, the last used first",
                MadClient.list_browser_sessions, (
            Option("user-id", "only those of this user", collection="users"),
            Option("ip-address", "only those from this address", metavar="ADDRESS"),
        ), table("browser sessions", "id", "username", "ip_address", "last_seen=last_seen_at", "user_agent"),
                f"mad {noun} browsers --user-id bob"),
        Command(noun + " end-browser", "log a browser out, with every login that began in it",
                MadClient.end_browser_session, (RECORD_ID,), render_message, f"mad {noun} end-browser --id "
                "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
        Command(noun + " revoke-all", "end everything ever issued to anybody, your own login too",
                MadClient.revoke_everything, (), render_message, f"mad {noun} revoke-all", confirm_by=""),
        Command(noun + " purge", "delete the rows of old sessions", MadClient.purge_sessions, PURGE_OPTIONS,
                render_message, f"mad {noun} purge --older-than 86400 --expired", confirm_by=""),
    )


def audit_commands(noun: str) -> tuple:
    """Return the commands on the audit log under one of its two nouns."""
    return (
        Command(noun + " list", "list what was done, newest first", MadClient.list_audit_logs, (
            *AUDIT_FILTERS,
            Option("since", "not before this: ISO 8601 in UTC unless it says otherwise, or Unix seconds", "moment"),
            Option("until", "not after this", "moment"),
            Option("after", "only entries with a greater id; then oldest first", metavar="ID"),
            Option("before", "only entries with a smaller id", metavar="ID"),
            Option("limit", "at most so many in all (100); a negative number means all", "number"),
        ), table("entries", *AUDIT_MEMBERS), f"mad {noun} list --action user_created --since 2030-01-31"),
        Command(noun + " actions", "list the actions of which the log has entries", MadClient.list_audit_actions, (),
                lambda actions: [printable(action) for action in actions], f"mad {noun} actions",
                quiet=lambda actions: [printable(action) for action in actions]),
        Command(noun + " get", "show an entry", MadClient.get_audit_log, (RECORD_ID,),
                fields(*AUDIT_MEMBERS, "ip_address", "user_agent", "request_id", "row_sha256"),
                f"mad {noun} get --id 17"),
        Command(noun + " verify", "tell whether the log is whole and nobody changed it", MadClient.verify_audit_logs,
                (), lambda row: [printable(row["message"]), "last entry: " + printable(row.get("last_seq")),
                                 "head: " + printable(row.get("head"))],
                f"mad {noun} verify", transform=describe_chain),
        Command(noun + " export", "print the whole log as NDJSON, oldest first", MadClient.export_audit_logs, (
            *AUDIT_FILTERS, Option("since", "not before this", "moment"), Option("until", "not after this", "moment"),
            Option("after", "only entries with a greater id", metavar="ID"),
            Option("limit", "at most so many in all", "number", minimum=1),
        ), to_ndjson, f"mad {noun} export > audit.ndjson", streams=True),
        Command(noun + " tail", "follow what is done, until Ctrl-C", audit_tail, (
            *AUDIT_FILTERS,
            Option("lines", "begin with so many that are there (10)", "number", minimum=0, metavar="N"),
            Option("interval", "ask every so many seconds (1)", "number", minimum=1, metavar="SECONDS"),
        ), render_audit_entries, f"mad {noun} tail --lines 50", with_context=True, streams=True),
        Command(noun + " purge", "delete old entries", MadClient.purge_audit_logs, (
            Option("days", "older than so many days", "number", required=True, minimum=1),
        ), render_message, f"mad {noun} purge --days 365", confirm_by=""),
    )


COMMANDS = (
    # -- session --
    Command("session login", "log in as an administrator and save the token", session_login, (
        Option("admin-url", "address of the ADMIN server"),
        Option("username", "who (asked for on a terminal)"),
        Option("password-stdin", "read the password from standard input", "flag"),
        Option("totp", "one-time code, when a second factor is set up", metavar="CODE"),
    ), render_message, "mad session login --username admin --password-stdin < password.txt", without_client=True),
    Command("session logout", "end the saved login", session_logout, (), render_message,
            "mad session logout", without_client=True),
    Command("session status", "show who is logged in, and until when", session_status, (
        Option("admin-url", "address of the ADMIN server"),
    ), fields("subject=sub", "username", "roles", "expires=expires_at", "token_use", "url"),
        "mad session status --json", without_client=True, quiet=lambda status: [printable(status["sub"])]),
    Command("session mine", "list your own sessions at the console, and logins of mad", MadClient.list_own_sessions, (),
            table("sessions", "id", "kind", "is_current", "last_seen=last_seen_at", "expires=expires_at", "ip_address"),
            "mad session mine"),
    Command("session end-mine", "end one of your own sessions at the console, or logins of mad",
            MadClient.end_own_session, (RECORD_ID,), render_message,
            "mad session end-mine --id 019344f2c1d47a5b9a4c3e"),
    Command("session end-others", "end all of your own sessions at the console and logins of mad but this one",
            MadClient.end_other_sessions, (), render_message, "mad session end-others"),
    *session_commands("session"),

    # -- user --
    Command("user create", "create a user", MadClient.create_user, (
        Option("username", "name to log in with", required=True),
        Option("user-email", "e-mail address", required=True, dest="email"),
        Option("verified", "the address is known to be theirs", "flag", dest="email_verified"),
        Option("user-password", "better from stdin: an argument is visible to every process", "secret", required=True,
               dest="password", stdin="password-stdin", metavar="PASSWORD"),
    ), line_template("created user {username} with id {id}"),
        "mad user create --username bob --user-email bob@example.org --password-stdin < password.txt"),
    Command("user list", "list the users", MadClient.list_users, (
        Option("is-active", "those who may log in (true), those who may not, or all", choices=("true", "false", "all")),
        Option("is-admin", "only administrators (true), or all others", "flag"),
        Option("locked", "only who is locked out now (true), or is not", "flag"),
        Option("totp", "only who has a second factor (true), or has none", "flag"),
        Option("role", "only who has this role", metavar="ID|NAME"),
        Option("unused-since", "only who did not log in since then", "moment"),
    ), USER_TABLE, "mad user list --is-active all --q example.org --sort -created_at"),
    Command("user get", "show a user", MadClient.get_user, (ID_OF_USER,), USER_FIELDS, "mad user get --id bob"),
    Command("user update", "change name, e-mail or state of a user", MadClient.update_user, (
        ID_OF_USER, Option("username", "new name"), Option("email", "new e-mail address"),
        Option("is-active", "whether the user may log in", "flag"),
    ), USER_FIELDS, "mad user update --id bob --email bob@example.net", at_least_one=True),
    Command("user verify-email", "mark the e-mail address of a user as verified", MadClient.verify_email, (ID_OF_USER,),
            render_message, "mad user verify-email --id bob"),
    Command("user reset-password", "set a new password", MadClient.reset_password, (
        ID_OF_USER, Option("new-password", "better from stdin: an argument is visible to every process", "secret",
                           required=True, stdin="password-stdin", metavar="PASSWORD"),
    ), render_message, "mad user reset-password --id bob --password-stdin < password.txt"),
    Command("user deactivate", "keep a user from logging in, and end the user's sessions", MadClient.deactivate_user,
            (ID_OF_USER,), render_message, "mad user deactivate --id bob"),
    Command("user activate", "let a deactivated user log in again", MadClient.activate_user, (ID_OF_USER,),
            render_message, "mad user activate --id bob"),
    Command("user delete", "delete a user and everything that is theirs", MadClient.delete_user, (ID_OF_USER,),
            render_message, "mad user delete --id bob", confirm_by="id"),
    Command("user revoke", "end every session, token and login of a user", MadClient.revoke_user, (ID_OF_USER,),
            render_message, "mad user revoke --id bob", confirm_by=""),
    Command("user create-without-password", "create a user, to be invited to choose a password",
            MadClient.create_user_without_password, (
        Option("username", "name to log in with", required=True),
        Option("user-email", "e-mail address", required=True, dest="email"),
        Option("verified", "the address is known to be theirs", "flag", dest="email_verified"),
    ), line_template("created user {username} with id {id}"),
        "mad user create-without-password --username bob --user-email bob@example.org"),
    Command("user invite", "make a link by which a user chooses a password, once within 24 hours",
            MadClient.invite_user, (
        ID_OF_USER, Option("purpose", "invite also offers a second factor, reset keeps what there is (invite)",
                           choices=("invite", "reset")),
    ), lambda row: ["the link, shown this once: " + printable(row["url"]),
                    "it works until " + format_cell("expires_at", row.get("expires_at"))],
        "mad user invite --id bob", quiet=lambda row: [printable(row["url"])]),
    Command("user invitations", "show whether a link waits for a user", MadClient.list_invitations_of_user,
            (ID_OF_USER,), table("invitations", "id", "purpose", "created_by", "created_at", "expires_at"),
            "mad user invitations --id bob"),
    Command("user delete-invitation", "make a link that was not used yet work no more", MadClient.delete_invitation,
            (RECORD_ID,), render_message,
            "mad user delete-invitation --id 0b9c7f0e-5a1c-4f61-9e0e-3f8b8f0f4a11", confirm_by=""),
    Command("user consents", "list what a user allowed clients, and since when", MadClient.list_consents_of_user,
            (ID_OF_USER,), table("consents", "client_id", "display_name", "scopes", "given_at"),
            "mad user consents --id bob"),
    Command("user revoke-consent", "take back what a user allowed a client, and end the logins of the user there",
            MadClient.revoke_consent, (ID_OF_USER, CLIENT_ID), render_message,
            "mad user revoke-consent --id bob --client-id web"),
    Command("user verify-password", "tell whether this is the password of a user", MadClient.verify_password, (
        Option("id", "the user", required=True, dest="user", metavar="ID|NAME"),
        Option("password", "better from stdin: an argument is visible to every process", "secret", required=True,
               stdin="password-stdin", is_existing=True),
        Option("totp", "one-time code, when a second factor is set up", metavar="CODE"),
    ), line_template("right for {email}, id {user_id}"),
        "mad user verify-password --id bob --password-stdin < password.txt",
        quiet=lambda row: [printable(row.get("user_id"))]),
    Command("user set-lockout", "lock a user out for a time", MadClient.set_lockout, (
        ID_OF_USER, Option("until", "ISO 8601 date-time, in UTC unless it says otherwise, or permanent", "lockout",
                           required=True, dest="lockout_until"),
        Option("reason", "why, for other administrators", metavar="TEXT"),
    ), render_message, "mad user set-lockout --id bob --until 2030-01-31T12:00:00Z"),
    Command("user clear-lockout", "end the lockout of a user", MadClient.clear_lockout, (ID_OF_USER,), render_message,
            "mad user clear-lockout --id bob"),
    Command("user unlock", "end the lockout of a user, as clear-lockout does", MadClient.clear_lockout, (ID_OF_USER,),
            render_message, "mad user unlock --id bob"),
    Command("user totp-enroll", "make a second-factor secret and show it once", user_totp_enroll, (
        ID_OF_USER, OPTIONAL_CLIENT_ID,
        Option("svg", "write its QR code into this new file, which only its owner can read", metavar="FILE"),
    ), render_enrolment, "mad user totp-enroll --id bob --svg bob.svg", with_context=True,
        quiet=lambda answer: [printable(answer["otpauth_uri"])]),
    Command("user totp-qr", "make a second-factor secret, and a QR code on the server", MadClient.generate_totp, (
        ID_OF_USER, OPTIONAL_CLIENT_ID, Option("output-path", "folder on the server (.)", dest="qr_output_path"),
    ), line_template("wrote {filename}"), "mad user totp-qr --id bob"),
    Command("user totp-verify", "confirm a second factor with its first code", MadClient.verify_totp, (
        USER_ID, OPTIONAL_CLIENT_ID, Option("code", "the six digits", required=True),
    ), render_message, "mad user totp-verify --user-id bob --code 123456"),
    Command("user recovery-codes", "make new recovery codes for a user, and show them once",
            MadClient.make_recovery_codes, (ID_OF_USER,), render_codes, "mad user recovery-codes --id bob",
            quiet=render_codes),
    Command("user disable-totp", "remove the second factor of a user", MadClient.disable_totp,
            (USER_ID, OPTIONAL_CLIENT_ID), render_message, "mad user disable-totp --user-id bob", confirm_by=""),

    # -- role --
    Command("role create", "create a role", MadClient.create_role, (NAME, DESCRIPTION, PRIVILEGED),
            line_template("created role {name} with id {id}"), "mad role create --name Operator"),
    Command("role update", "change a role", MadClient.update_role, (ID_OF_ROLE, NEW_NAME, DESCRIPTION, PRIVILEGED),
            ROLE_FIELDS, "mad role update --id Operator --description 'runs the plant'", at_least_one=True),
    Command("role list", "list the roles", MadClient.list_roles, (
        Option("with", "show more with --json: permissions, user_count or both", dest="with_",
               metavar="permissions,user_count"),
    ), ROLE_TABLE, "mad role list --with permissions,user_count --json"),
    Command("role get", "show a role", MadClient.get_role, (ID_OF_ROLE,), ROLE_FIELDS, "mad role get --id Operator"),
    Command("role delete", "delete a role", MadClient.delete_role, (ID_OF_ROLE,), render_message,
            "mad role delete --id Operator", confirm_by="id"),
    Command("role assign", "give a user a role", MadClient.assign_role, (USER_ID, ROLE_ID), render_message,
            "mad role assign --user-id bob --role-id Operator"),
    Command("role unassign", "take a role from a user", MadClient.unassign_role, (USER_ID, ROLE_ID), render_message,
            "mad role unassign --user-id bob --role-id Operator"),
    Command("role list-for-user", "list the roles of a user", MadClient.list_roles_of_user, (USER_ID,),
            table("roles", "id", "name"), "mad role list-for-user --user-id bob"),
    Command("role list-users", "list the users who have a role", MadClient.list_users_of_role, (ID_OF_ROLE,),
            USER_TABLE, "mad role list-users --id Operator"),
    Command("role set-for-user", "make these the roles of a user, and no others", MadClient.set_roles_of_user, (
        USER_ID,
        Option("role-id", "the roles, one or more", "list", required=True, collection="roles", dest="role_ids"),
    ), render_message, "mad role set-for-user --user-id bob --role-id Operator Guest"),

    # -- permission --
    Command("permission create", "create a permission", MadClient.create_permission, (NAME,),
            line_template("created permission {name} with id {id}"), "mad permission create --name door.open"),
    Command("permission update", "rename a permission", MadClient.update_permission, (
        ID_OF_PERMISSION, Option("name", "its new name", required=True)), fields("id", "name"),
        "mad permission update --id door.open --name gate.open"),
    Command("permission list", "list the permissions", MadClient.list_permissions, (), PERMISSION_TABLE,
            "mad permission list"),
    Command("permission get", "show a permission", MadClient.get_permission, (ID_OF_PERMISSION,), fields("id", "name"),
            "mad permission get --id door.open"),
    Command("permission delete", "delete a permission", MadClient.delete_permission, (ID_OF_PERMISSION,),
            render_message, "mad permission delete --id door.open", confirm_by="id"),
    Command("permission assign", "give a role a permission", MadClient.assign_permission, (ROLE_ID, PERMISSION_ID),
            render_message, "mad permission assign --role-id Operator --permission-id door.open"),
    Command("permission remove", "take a permission from a role", MadClient.remove_permission, (ROLE_ID, PERMISSION_ID),
            render_message, "mad permission remove --role-id Operator --permission-id door.open"),
    Command("permission list-for-role", "list the permissions of a role", MadClient.list_permissions_of_role,
            (ROLE_ID,), PERMISSION_TABLE, "mad permission list-for-role --role-id Operator"),
    Command("permission list-roles", "list the roles that have a permission", MadClient.list_roles_of_permission,
            (ID_OF_PERMISSION,), ROLE_TABLE, "mad permission list-roles --id door.open"),
    Command("permission list-for-user", "list what a user may do", MadClient.list_permissions_of_user, (USER_ID,),
            PERMISSION_TABLE, "mad permission list-for-user --user-id bob"),
    Command("permission check-access", "tell whether a user has a permission", MadClient.check_access,
            (USER_ID, PERMISSION_ID, Option("explain", "tell why, and by which roles", "flag")), render_message,
            "mad permission check-access --user-id bob --permission-id door.open", transform=describe_access),

    # -- client --
    Command("client create", "register a client; a secret nobody chose is made and shown once", client_create, (
        Option("client-id", "its public identifier", required=True, metavar="ID"), NEW_SECRET,
        Option("gen-password", "make a secret of this length here", "number", minimum=8),
        Option("public", "a client that cannot keep a secret, such as a browser application", "flag"),
        Option("display-name", "what people read"),
        Option("audience", "audience of its tokens (microauthd)"),
        Option("grant", "a grant type it may use, one or more; the password grant must be named", "list"),
        Option("scope", "the name of a scope it may ask for, one or more", "list", metavar="NAME"),
        Option("introspect", "may introspect tokens of other clients", "flag"),
        Option("first-party", "is our own (true), so that nobody is asked for consent", "flag", dest="is_first_party"),
        Option("redirect-uri", "where people come back to after login, one or more", "list", dest="redirect_uris"),
        Option("post-logout-uri", "where people may be sent after logout, one or more", "list",
               dest="post_logout_redirect_uris"),
        Option("cors-origin", "an origin whose pages may call AUTH as this client, one or more", "list",
               dest="cors_origins", metavar="ORIGIN"),
        Option("flag", "a feature to switch on, one or more; with its option as NAME=OPTION", "list"),
        *URI_SWITCHES, *SERVER_OPTIONS,
    ), with_client_secret(line_template("created client {client_id} with id {id}")),
        "mad client create --client-id sensor --grant client_credentials --scope read", without_client=True),
    Command("client list", "list the clients", MadClient.list_clients, (
        Option("client-type", "only those of this type", choices=("confidential", "public")),
        Option("is-active", "only those that may get tokens (true), or may not", "flag"),
        Option("grant-type", "only those that may use this grant", metavar="GRANT"),
    ), CLIENT_TABLE, "mad client list --grant-type password"),
    Command("client get", "show a client", MadClient.get_client, (ID_OF_CLIENT,), CLIENT_FIELDS,
            "mad client get --id sensor"),
    Command("client update", "change a client", client_update, (
        ID_OF_CLIENT, Option("client-id", "new public identifier", metavar="ID"),
        Option("display-name", "what people read"), Option("audience", "audience of its tokens"),
        Option("is-active", "whether it may get tokens", "flag"),
        *CLIENT_OPTIONS,
    ), CLIENT_FIELDS, "mad client update --id sensor --display-name 'Sensor 1'", at_least_one=True),
    Command("client change-secret", "give a client a new secret; one is made unless given",
            MadClient.change_client_secret, (
        ID_OF_CLIENT, Option("secret", "better from stdin: an argument is visible to every process", "secret",
                             stdin="secret-stdin", dest="new_secret"),
        Option("overlap", "how long the old secret keeps working", "number", dest="overlap_seconds", metavar="SECONDS",
               minimum=0),
    ), lambda row: ["the new secret, shown this once: " + printable(row["message"])],
        "mad client change-secret --id sensor --overlap 3600", quiet=render_message),
    Command("client delete", "delete a client and end its sessions", MadClient.delete_client, (ID_OF_CLIENT,),
            render_message, "mad client delete --id sensor", confirm_by="id"),
    Command("client secrets", "list the secrets of a client: since when and until when they work, when last used",
            MadClient.list_client_secrets, (ID_OF_CLIENT,),
            table("secrets", "id", "created_at", "expires_at", "last_used_at"), "mad client secrets --id sensor"),
    Command("client delete-secret", "make a secret of a client work no more", MadClient.delete_client_secret, (
        ID_OF_CLIENT, Option("secret-id", "its id, of mad client secrets", required=True, metavar="ID"),
    ), render_message, "mad client delete-secret --id sensor --secret-id 0b9c7f0e-5a1c-4f61-9e0e-3f8b8f0f4a11",
        confirm_by=""),
    Command("client consents", "list what users allowed a client, and since when",
            MadClient.list_consents_for_client, (ID_OF_CLIENT,),
            table("consents", "user_id", "username", "scopes", "given_at"), "mad client consents --id web"),
    Command("client delete-consents", "take back what every user allowed a client, and end its logins and tokens",
            MadClient.revoke_consents_for_client, (ID_OF_CLIENT,), render_message,
            "mad client delete-consents --id web", confirm_by="id"),
    Command("client delete-all-consents", "take back what every user allowed every client, and end their logins",
            MadClient.revoke_all_consents, (), render_message, "mad client delete-all-consents", confirm_by=""),
    Command("client preview", "show what a client would get for a user, or for itself; no token is made",
            client_preview, (
        ID_OF_CLIENT, Option("user-id", "the user who would log in", collection="users"),
        Option("scope", "what the client would ask for, separated by blanks"),
        Option("claims", "the claims parameter of OpenID Connect", metavar="JSON"),
    ), render_preview, "mad client preview --id web --user-id bob --scope 'openid profile'"),
    Command("client revoke", "end everything issued to a client", MadClient.revoke_client, (ID_OF_CLIENT,),
            render_message, "mad client revoke --id sensor", confirm_by=""),
    Command("client add-redirect-uri", "allow a client a redirect URI", MadClient.add_redirect_uri, (ID_OF_CLIENT, URI),
            line_template("added {redirect_uri} with id {id}"),
            "mad client add-redirect-uri --id app --uri https://app.example/callback"),
    Command("client list-redirect-uris", "list the redirect URIs of a client", MadClient.list_redirect_uris,
            (CLIENT_ID,), REDIRECT_URI_TABLE, "mad client list-redirect-uris --client-id app"),
    Command("client delete-redirect-uri", "remove a redirect URI", MadClient.delete_redirect_uri, (
        Option("client-id", "the client, needed when the URI is given instead of its id", collection="clients"),
        Option("id", "its id, or the URI itself", required=True, metavar="ID|URI",
               parent=("client-id", MadClient.list_redirect_uris, ("redirect_uri", "uri"))),
    ), render_message, "mad client delete-redirect-uri --client-id app --id https://app.example/callback",
        confirm_by=""),
    Command("client check-uri", "tell whether a client could be given a URI, and if not, why", MadClient.check_uri, (
        ID_OF_CLIENT, Option("kind", "what it is for", choices=("redirect", "post_logout", "cors_origin"),
                             required=True), URI,
    ), render_message, "mad client check-uri --id app --kind redirect --uri https://app.example/callback",
        transform=describe_uri_verdict),
    *uri_commands("post-logout-uri", "a URI to send people to after logout", (
        MadClient.add_post_logout_uri, MadClient.list_post_logout_uris, MadClient.delete_post_logout_uri),
        "https://app.example/bye"),
    *uri_commands("cors-origin", "an origin whose pages may call AUTH as this client", (
        MadClient.add_cors_origin, MadClient.list_cors_origins, MadClient.delete_cors_origin), "https://app.example"),
    Command("client list-flags", "list the features of a client and their values", MadClient.list_flags, (CLIENT_ID,),
            lambda flags: FLAG_TABLE([{"flag": name} | value for name, value in flags.items()]),
            "mad client list-flags --client-id app", quiet=lambda flags: [printable(name) for name in flags]),
    Command("client set-flag", "switch a feature of a client", MadClient.set_flag, (
        CLIENT_ID, FLAG, Option("enable", "true or false", "flag", required=True, dest="enabled"),
    ), render_message, "mad client set-flag --client-id app --flag ENABLE_TOTP --enable true"),
    Command("client get-flag", "tell whether a feature is on", MadClient.get_flag, (CLIENT_ID, FLAG),
            lambda enabled: ["enabled" if enabled else "disabled"],
            "mad client get-flag --client-id app --flag ENABLE_TOTP"),
    Command("client set-flag-options", "set the value of a feature", MadClient.set_flag_options, (
        CLIENT_ID, FLAG, Option("options", "the value", required=True, metavar="VALUE"),
    ), render_message, "mad client set-flag-options --client-id app --flag TOKEN_EXPIRATION --options 600"),
    Command("client get-flag-options", "show the value of a feature", MadClient.get_flag_options, (CLIENT_ID, FLAG),
            lambda text: [printable(text) or "(none)"],
            "mad client get-flag-options --client-id app --flag TOKEN_EXPIRATION"),
    Command("client add-idp", "add an external identity provider", MadClient.add_idp, (ID_OF_CLIENT, *IDP_OPTIONS),
            line_template("added {provider_key} with id {id}"),
            "mad client add-idp --id app --provider-key google --display-name Google "
            "--issuer https://accounts.google.com --external-client-id 123"),
    Command("client update-idp", "change an external identity provider", MadClient.update_idp,
            (ID_OF_CLIENT, IDP_ID, *IDP_OPTIONS), line_template("updated {provider_key}"),
            "mad client update-idp --id app --idp-id google --provider-key google --display-name Google "
            "--issuer https://accounts.google.com --external-client-id 123"),
    Command("client list-idps", "list the external identity providers", MadClient.list_idps, (ID_OF_CLIENT,),
            table("external providers", *IDP_MEMBERS), "mad client list-idps --id app"),
    Command("client get-idp", "show an external identity provider", MadClient.get_idp, (ID_OF_CLIENT, IDP_ID),
            fields(*IDP_MEMBERS, "client_identifier", "scopes", "created_at"),
            "mad client get-idp --id app --idp-id google"),
    Command("client delete-idp", "remove an external identity provider", MadClient.delete_idp, (ID_OF_CLIENT, IDP_ID),
            render_message, "mad client delete-idp --id app --idp-id google", confirm_by=""),
    Command("client assign-scope", "let a client ask for scopes", MadClient.assign_scopes_to_client,
            (CLIENT_ID, SCOPE_IDS), render_message, "mad client assign-scope --client-id sensor --scope-id read write"),
    Command("client list-scopes", "list the scopes of a client", MadClient.list_scopes_of_client, (CLIENT_ID,),
            SCOPE_TABLE, "mad client list-scopes --client-id sensor"),
    Command("client remove-scope", "take a scope from a client", MadClient.remove_scope_from_client,
            (CLIENT_ID, SCOPE_ID), render_message, "mad client remove-scope --client-id sensor --scope-id write"),

    # -- scope --
    Command("scope create", "create a scope", MadClient.create_scope, (NAME, DESCRIPTION),
            line_template("created scope {name} with id {id}"),
            "mad scope create --name read --description 'read the meters'"),
    Command("scope update", "change a scope", MadClient.update_scope, (ID_OF_SCOPE, NEW_NAME, DESCRIPTION),
            SCOPE_FIELDS, "mad scope update --id read --description 'read all meters'", at_least_one=True),
    Command("scope list", "list the scopes", MadClient.list_scopes, (), SCOPE_TABLE, "mad scope list"),
    Command("scope get", "show a scope", MadClient.get_scope, (ID_OF_SCOPE,), SCOPE_FIELDS, "mad scope get --id read"),
    Command("scope delete", "delete a scope", MadClient.delete_scope, (ID_OF_SCOPE,), render_message,
            "mad scope delete --id read", confirm_by="id"),
    Command("scope assign-to-user", "give a user scopes", MadClient.assign_scopes_to_user, (USER_ID, SCOPE_IDS),
            render_message, "mad scope assign-to-user --user-id bob --scope-id read write"),
    Command("scope list-for-user", "list the scopes of a user", MadClient.list_scopes_of_user, (USER_ID,), SCOPE_TABLE,
            "mad scope list-for-user --user-id bob"),
    Command("scope remove-from-user", "take a scope from a user", MadClient.remove_scope_from_user, (USER_ID, SCOPE_ID),
            render_message, "mad scope remove-from-user --user-id bob --scope-id write"),
    Command("scope assign-to-client", "let a client ask for scopes", MadClient.assign_scopes_to_client,
            (CLIENT_ID, SCOPE_IDS), render_message,
            "mad scope assign-to-client --client-id sensor --scope-id read write"),
    Command("scope list-for-client", "list the scopes of a client", MadClient.list_scopes_of_client, (CLIENT_ID,),
            SCOPE_TABLE, "mad scope list-for-client --client-id sensor"),
    Command("scope remove-from-client", "take a scope from a client", MadClient.remove_scope_from_client,
            (CLIENT_ID, SCOPE_ID), render_message, "mad scope remove-from-client --client-id sensor --scope-id write"),

    Command("scope set-for-user", "make these the scopes of a user, and no others", MadClient.set_scopes_of_user,
            (USER_ID, SCOPE_IDS), SCOPE_TABLE, "mad scope set-for-user --user-id bob --scope-id read write"),
    Command("scope set-for-client", "make these the scopes of a client, and no others",
            MadClient.set_scopes_of_client, (CLIENT_ID, SCOPE_IDS), SCOPE_TABLE,
            "mad scope set-for-client --client-id sensor --scope-id read write"),
    Command("scope list-users", "list the users who have a scope", MadClient.list_users_of_scope, (ID_OF_SCOPE,),
            USER_TABLE, "mad scope list-users --id read"),
    Command("scope list-clients", "list the clients that may ask for a scope", MadClient.list_clients_of_scope,
            (ID_OF_SCOPE,), CLIENT_TABLE, "mad scope list-clients --id read"),

    # -- sessionctl, refreshtoken, audit --
    *session_commands("sessionctl"),
    Command("refreshtoken list", "list the refresh tokens, newest first", MadClient.list_refresh_tokens, (),
            REFRESH_TOKEN_TABLE, "mad refreshtoken list"),
    Command("refreshtoken list-by-user", "list the refresh tokens of a user", MadClient.list_refresh_tokens_of_user,
            (USER_ID,), REFRESH_TOKEN_TABLE, "mad refreshtoken list-by-user --user-id bob"),
    Command("refreshtoken get", "show a refresh token", MadClient.get_refresh_token, (RECORD_ID,),
            fields("id", "user_id", "client_id", "issued_at", "expires_at", "is_revoked"),
            "mad refreshtoken get --id 019344f2-c1d4-7a5b-9a4c-3e2d1f0a9b8c"),
    Command("refreshtoken revoke", "revoke a refresh token and the login it belongs to", MadClient.revoke_refresh_token,
            (RECORD_ID,), render_message, "mad refreshtoken revoke --id 019344f2-c1d4-7a5b-9a4c-3e2d1f0a9b8c"),
    *(Command("refreshtoken " + verb, "delete the rows of old refresh tokens", MadClient.purge_refresh_tokens,
              PURGE_OPTIONS, render_message, f"mad refreshtoken {verb} --older-than 86400 --expired", confirm_by="")
      for verb in ("purge", "purge-refresh")),
    *audit_commands("audit"),
    *audit_commands("auditlog"),

    # -- the box --
    Command("status", "tell how the box is, and what needs attention", MadClient.get_status, (), render_status,
            "mad status", quiet=lambda status: [printable(status.get("state"))],
            judge=lambda status: EXIT_REFUSED if status.get("attention") else EXIT_OK),
    Command("backup", "make a backup of the whole box and fetch it", backup, (
        Option("file", "where to put it; the word after backup says it too", required=True, metavar="FILE"),
        Option("force", "write over a file that is there", "flag"),
        Option("without-keys", "leave keys and settings out: needed where the database is not encrypted", "flag"),
    ), line_template("{name}: {bytes} bytes, {users} users, {clients} clients"),
        "mad backup box.backup", with_context=True, positional="file",
        quiet=lambda created: [printable(created.get("name"))]),

    # -- figures --
    Command("status history", "show how often things happened over time", MadClient.get_history, (
        Option("series", "which, separated by commas: requests, tokens, logins, failures, lockouts (all)"),
        Option("range", "how far back (1d)", choices=("1h", "1d", "7d")),
    ), render_history, quiet=render_history, example="mad status history --series tokens,failures --range 7d"),

    Command("backups list", "list the backups that the server keeps", MadClient.list_backups, (),
            table("backups", "name", "created_at", "bytes", "sha256"), "mad backups list"),
    Command("backups delete", "delete a backup that the server keeps", MadClient.delete_backup, (
        Option("name", "its name, of mad backups list", required=True),
    ), render_message, "mad backups delete --name microauthd-20300131T120000Z-0a1b2c3d.backup", confirm_by="name"),

    # -- option --
    Command("option list", "list every setting, where it is from and what it means", MadClient.list_options, (),
            table("options", "name", "value", "origin", "meaning"), "mad option list"),

    # -- brand --
    Command("brand show", "show the name, colour and picture of the login pages", MadClient.get_brand, (),
            render_brand, "mad brand show"),
    Command("brand set", "change the name, colour or picture of the login pages", set_brand, (
        Option("name", "what people know the server by; blank is the issuer's host"),
        Option("color", "such as 1f5fbf; the text on it is black or white, whichever reads better", metavar="RRGGBB"),
        Option("logo", "a PNG, JPEG, WebP or SVG file of at most 40960 bytes", metavar="FILE"),
        Option("no-logo", "show no picture", "flag"),
    ), render_brand, "mad brand set --name 'North box' --color 8a3fa0 --logo logo.svg", at_least_one=True),
    Command("brand reset", "leave name, colour and picture to the options again", MadClient.reset_brand, (),
            render_message, "mad brand reset", confirm_by=""),

    # -- key --
    Command("key list", "list the keys of both rings: which signs, waits or retires", MadClient.list_keys, (),
            table("keys", "kid", "ring", "alg", "state", "signs", "signs_from", "gone_after"), "mad key list"),
    Command("key impact", "tell what would end if a key were revoked", MadClient.key_impact, (KID,),
            fields("kid", "ring", "state", "tokens", "is_lower_bound", "users", "clients", "cached_seconds"),
            "mad key impact --kid kA3fVZrk9Qx3nYdW2m0cC8s7u1bTq4LhEoJvN5iRwXg"),
    Command("key rotate", "publish a next key beside each that signs", MadClient.rotate_keys, (
        Option("ring", "only of this ring", choices=("auth", "admin")),
        Option("alg", "only of this algorithm, ES256 or RS256"),
    ), lambda keys: [f"{printable(key.get('kid'))} signs from {printable(key.get('signs_from'))}" for key in keys],
        "mad key rotate --ring auth", quiet=lambda keys: [printable(key.get("kid")) for key in keys]),
    Command("key revoke", "revoke a stolen key: what it signed is valid no more", MadClient.revoke_key, (KID,),
            render_message, "mad key revoke --kid kA3fVZrk9Qx3nYdW2m0cC8s7u1bTq4LhEoJvN5iRwXg", confirm_by="kid"),

    # -- token, completion --
    Command("token", "take a JWT apart, without verifying it", token_inspect, (JWT,), render_jwt,
            "mad token get | mad token --token -", without_client=True),
    Command("token revoke", "end a token", MadClient.revoke_token, (JWT,), render_message,
            "mad token revoke --token -"),
    Command("token get", "print an access token for a machine client, cached while it lasts", token_get, (
        Option("auth-url", "address of the AUTH server"), Option("client-id", "the client", metavar="ID"),
        Option(None, "read the client secret from standard input", "secret", stdin="secret-stdin", dest="secret"),
        Option("scope", "what to ask for, separated by blanks"),
        Option("fresh", "fetch a new token, and keep it in place of a cached one", "flag"),
        Option("no-cache", "neither use nor keep a cached token", "flag"),
    ), render_access_token,
        "curl -H \"Authorization: Bearer $(mad token get --scope read)\" https://api.example/meters",
        without_client=True, quiet=render_access_token),
    Command("completion bash", "print the completion script for bash", completion("bash"), (), render_script,
            "mad completion bash > ~/.local/share/bash-completion/completions/mad", without_client=True,
            quiet=render_script),
    Command("completion zsh", "print the completion script for zsh", completion("zsh"), (), render_script,
            "mad completion zsh > ~/.zfunc/_mad", without_client=True, quiet=render_script),
    Command("completion fish", "print the completion script for fish", completion("fish"), (), render_script,
            "mad completion fish > ~/.config/fish/completions/mad.fish", without_client=True, quiet=render_script),
)


# == Main ======================================================================
# From the arguments to the exit status.

CONTEXT_OPTIONS = {"admin-url", "admin-token", "auth-url"}  # The Context reads these; no call receives them.


def run_command(command: Command, context: Context):
    """Call the command with its options and return the result."""
    client = None if command.without_client else context.client()
    arguments: dict[str, Any] = {}
    child_options = []
    for option in command.options:
        if option.name in CONTEXT_OPTIONS:
            continue
        value = context.secret_of(option) if option.kind == "secret" else context.options.get(option.name)
        if value is None:
            continue
        if option.kind == "token" and value == "-":
            value = read_secret_from_stdin(f"--{option.name} -")
        if option.choices:
            value = value.lower()
        if option.collection and client:
            value = ([context.resolve_id(client, option, item) for item in value] if isinstance(value, list)
                     else context.resolve_id(client, option, value))
        if option.parent:
            child_options.append(option)
        arguments[option.dest] = value
    if client:
        for option in child_options:
            parent_id = next((arguments.get(one.dest) for one in command.options if one.name == option.parent[0]), None)
            arguments[option.dest] = context.resolve_child_id(client, option, arguments[option.dest], parent_id)
    call = getattr(command.call, "pages", command.call)
    result = call(*([context] if command.without_client or command.with_context else []),
                  *([client] if client else []), **arguments)
    return command.transform(result) if command.transform else result


def print_result(command: Command, context: Context, result) -> int:
    """Print a result as the options demand. Return the exit status."""
    if command.streams:
        page_lines = to_ndjson if context.json else (command.quiet or render_ids) if context.quiet else command.render
        for page in result:
            for text in page_lines(page):
                print(text)
            sys.stdout.flush()
    elif command.is_list and context.json:
        # Fetch all pages before printing, so that an error prints no half document. JSON text takes a fifth of the
        # memory of the objects.
        pages = [to_json(page)[1:-1] for page in result]
        sys.stdout.write("[")
        for number, text in enumerate(pages):
            sys.stdout.write("," + text if number and text else text)
        print("]")
    elif command.is_list:
        lines = ((text for page in result for text in (command.quiet or render_ids)(page)) if context.quiet
                 else command.render.render_rows(row for page in result for row in page))
        for text in lines:
            print(text)
    elif context.json:
        print(to_json(result))
    else:
        has_failed = isinstance(result, dict) and result.get("success") is False
        render = (command.quiet or render_ids) if context.quiet else command.render
        for text in [] if has_failed and not context.quiet else render(result):
            print(text)
        if has_failed:
            print_message("error", result.get("message", ""))
    if command.judge:
        return command.judge(result)
    return EXIT_REFUSED if isinstance(result, dict) and result.get("success") is False else EXIT_OK


def _report_error(as_json: bool, exit_status: int, error: str, messages, errors: dict | None = None,
                  hint: str = "", request_id: str = "") -> int:
    if as_json:
        body = {"success": False, "message": "; ".join(messages), "error": error}
        if errors:
            body["errors"] = errors
        print(to_json(body))
    for message in messages:
        print_message("error", message, request_id)
    for name, text in (errors or {}).items():
        print_message("error", f"{name}: {text}")
    if hint:
        print_message("hint", hint)
    return exit_status


def parse_and_run(command: Command, args: list[str]) -> int:
    parsed = parse(command, args)
    if parsed.help_requested:
        print(help_noun(COMMANDS, command.name) if " " not in command.name else help_command(command))
        return EXIT_OK
    if parsed.errors:
        return _report_error("--json" in args or parsed.options.get("json", False), EXIT_USAGE, "usage", parsed.errors,
                             hint=parsed.hint or f"see: mad {command.name} --help")
    context = Context(parsed.options, COMMANDS)
    try:
        context.confirm(command)
        return print_result(command, context, run_command(command, context))
    except CommandError as problem:
        return _report_error(context.json, problem.exit_status, problem.error, problem.messages, hint=problem.hint)
    except MadError as problem:
        status = (EXIT_UNREACHABLE if isinstance(problem, Unreachable)
                  else EXIT_LOGIN if problem.status == 401 else EXIT_REFUSED)
        hint = problem.hint
        if not hint and status == EXIT_LOGIN and command.call not in (session_login, token_get):
            hint = "log in with: mad session login"
        return _report_error(context.json, status, problem.error, [problem.message], problem.errors, hint,
                             problem.request_id)
    except BadValue as problem:
        return _report_error(context.json, EXIT_USAGE, "usage", [str(problem)])
    except UnicodeEncodeError:
        names = [name for name, value in os.environ.items()
                 if name.startswith("MAD_") and any("\ud800" <= ch <= "\udfff" for ch in value)]
        complaint = (", ".join(names) or "a value") + " in the environment is not valid UTF-8"
        return _report_error(context.json, EXIT_USAGE, "usage", [complaint])


def _dispatch(argv: list[str]) -> int:
    for position in (0, 1):
        if argv[position:] and len(argv[position]) > 1 and argv[position].startswith("@"):
            try:
                argv[position:position + 1] = read_response_file(argv[position][1:])
            except ValueError as problem:
                return _report_error("--json" in argv, EXIT_USAGE, "usage", [str(problem)])
    if not argv:
        print(help_overview(COMMANDS), file=sys.stderr)
        return EXIT_USAGE
    if argv[0] in HELP_FLAGS:
        print(help_overview(COMMANDS))
        return EXIT_OK
    if argv == ["--version"]:
        print(VERSION)
        return EXIT_OK
    by_name = {command.name: command for command in COMMANDS}
    noun, verb = argv[0], argv[1] if len(argv) > 1 else ""
    # Also accept the singular, as in `client list-redirect-uri`.
    if command := by_name.get(noun + " " + verb) or by_name.get(noun + " " + verb + "s"):
        return parse_and_run(command, argv[2:])
    if noun in by_name and by_name[noun].positional:
        return parse_and_run(by_name[noun], argv[1:])
    as_json = "--json" in argv
    if noun not in nouns(COMMANDS):
        hint = "options stand after the command: mad <noun> <verb> [options]"
        if not noun.startswith("-"):
            guess = closest_match(noun, nouns(COMMANDS))
            hint = f"did you mean mad {guess}?" if guess else "see: mad --help"
        return _report_error(as_json, EXIT_USAGE, "usage", [f"unknown command '{noun}'"], hint=hint)
    if verb and not verb.startswith(("-", "/")):
        guess = closest_match(verb, [name.partition(" ")[2] for name in by_name if name.startswith(noun + " ")])
        return _report_error(as_json, EXIT_USAGE, "usage", [f"unknown command '{noun} {verb}'"],
                             hint=f"did you mean mad {noun} {guess}?" if guess else f"see: mad {noun} --help")
    if noun in by_name:
        return parse_and_run(by_name[noun], argv[1:])
    if verb in HELP_FLAGS:
        print(help_noun(COMMANDS, noun))
        return EXIT_OK
    if verb:
        return _report_error(as_json, EXIT_USAGE, "usage", [f"mad {noun} needs a verb before its options"],
                             hint=f"see: mad {noun} --help")
    print(help_noun(COMMANDS, noun), file=sys.stderr)
    return EXIT_USAGE


def main(argv: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # A locale without UTF-8 must not raise UnicodeEncodeError.
    try:
        status = _dispatch(list(argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as problem:
        if sys.stdout is None or problem.filename is not None:
            raise
        # The buffer still holds text, and the interpreter would fail to flush it again at exit. Let it go to /dev/null.
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            pass
        if isinstance(problem, BrokenPipeError):
            return EXIT_OK  # The reader closed the pipe, as `head` and `grep -q` do when they have read enough.
        print_message("error", f"cannot write the answer: {problem.strerror}")
        return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
