"""The connection loop, over raw sockets. RFC 9112, RFC 9110."""

import concurrent.futures
import contextlib
import errno
import ipaddress
import json
import os
import re
import resource
import select
import socket
import ssl
import stat
import threading
import time
import types

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from appliance.base import wire
from appliance.base.headers import security_headers
from appliance.base.hashing import Busy, HashGate, NameLocks
from appliance.base.tls import tls_context
from appliance.base.wire import (
    HttpRefusal, Limits, SWEEP, Server, _path_info, client_address, find_listener, listen, listen_at_machine,
    listen_shared, pause_listening, peer_user, resume_listening,
)

HOST = b"Host: box\r\n"


class App:
    """Answers what it saw; /wait waits for the event, /bug fails, /big is large."""

    def __init__(self):
        self.go, self.server = threading.Event(), None

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/bug":
            raise RuntimeError("secret detail")
        if path == "/wait":
            with (
                environ["microauthd.server_object"].blocking()
                if "microauthd.server_object" in environ
                else self.server.blocking()
            ):
                self.go.wait(60)
        body = (
            b"x" * 3_000_000
            if path == "/big"
            else json.dumps(
                {
                    "method": environ["REQUEST_METHOD"], "path": path, "query": environ["QUERY_STRING"],
                    "body": environ["wsgi.input"].read().decode("latin-1"), "peer": environ["microauthd.peer"],
                    "scheme": environ["wsgi.url_scheme"], "uid": environ.get("microauthd.uid"), "proxied": environ.get("microauthd.proxied", False),
                    "headers": {name: value for name, value in environ.items() if name.startswith("HTTP_")},
                }
            ).encode()
        )
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


PATIENCE = 9  # seconds: whatever answers does so at once where the machine is free, and the limits are 10 and more


class Running:
    def __init__(self, folder=None, **more):
        self.app, self.logged = App(), []
        sock = listen_at_machine(folder, "admin.sock") if folder else listen("127.0.0.1", 0)
        self.address = f"{folder}/admin.sock" if folder else sock.getsockname()
        self.server = Server(
            "auth", [sock], self.app, log=lambda event, **fields: self.logged.append((event, fields)), **more
        )
        self.app.server = self.server
        self.server.start()

    def await_log(self):
        """Wait for the line about a connection that ended without an answer: it may come after the end."""
        end = time.monotonic() + 30
        while not self.logged and time.monotonic() < end:
            time.sleep(0.02)

    def connect(self, timeout=PATIENCE):
        if isinstance(self.address, str):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout)
            sock.connect(self.address)
            return sock
        return socket.create_connection(self.address, timeout=timeout)

    def say(self, octets, *, end=True, each=None, pause=0.0002, timeout=PATIENCE):
        """Send octets, `each` so many at a time, and perhaps the end; what the server says until it closes. One that stays silent fails the test."""
        with self.connect(timeout) as sock:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(octets), each or len(octets)):
                    sock.sendall(octets[start:start + (each or len(octets))])
                    if each:
                        time.sleep(pause)
                if end:
                    sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def get(self, path=b"/", headers=b""):
        return self.say(b"GET " + path + b" HTTP/1.1\r\n" + HOST + headers + b"Connection: close\r\n\r\n")

    def seen(self, path=b"/", headers=b""):
        return json.loads(self.get(path, headers).partition(b"\r\n\r\n")[2])


def read_all(sock):
    """Read until the other side closes. Raises TimeoutError when it does not."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            said += data
    return said


@pytest.fixture
def run():
    running = []

    def make(**more):
        running.append(Running(**more))
        return running[-1]

    yield make
    for one in running:
        one.app.go.set()
        one.server.stop(1)


@pytest.fixture(scope="module")
def standing():
    one = Running()
    yield one
    one.app.go.set()
    one.server.stop(1)


@pytest.fixture
def shared(standing):
    standing.logged.clear()
    return standing


def statuses(said):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


def post(*headers, body=b"", version=b"1.1"):
    return (
        b"POST / HTTP/" + version + b"\r\n" + HOST + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body
    )


# A second request that must never be answered: what a smuggler wants.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: box\r\n\r\n"
REFUSED = {
    "two Content-Length": (400, post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello")),
    "two different Content-Length": (400, post(b"Content-Length: 5", b"Content-Length: 0", body=b"hello")),
    "a list of Content-Length": (400, post(b"Content-Length: 5, 5", body=b"hello")),
    "a signed Content-Length": (400, post(b"Content-Length: +5", body=b"hello")),
    "a negative Content-Length": (400, post(b"Content-Length: -5", body=b"hello")),
    "a hexadecimal Content-Length": (400, post(b"Content-Length: 0x5", body=b"hello")),
    "an endless Content-Length": (400, post(b"Content-Length: " + b"9" * 40)),
    "an empty Content-Length": (400, post(b"Content-Length: ")),
    "a Content-Length behind a vertical tab": (400, post(b"Content-Length: \x0b5", body=b"hello")),
    "a Content-Length of other digits": (400, post("Content-Length: \u0665".encode(), body=b"hello")),
    "both framings": (400, post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "both framings, the other way round": (
        400, post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"),
    ),
    "an empty coding": (400, post(b"Transfer-Encoding: ", body=b"0\r\n\r\n")),
    "a coding with a tab": (400, post(b"Transfer-Encoding: chunked\t", body=b"0\r\n\r\n")),
    "a coding with a comma": (400, post(b"Transfer-Encoding: chunked,", body=b"0\r\n\r\n")),
    "a coding after chunked": (400, post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n")),
    "both framings and an upgrade": (
        400,
        post(
            b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5", b"Transfer-Encoding: chunked",
            body=b"0\r\n\r\n",
        ),
    ),
    "two Content-Length and an upgrade": (
        400,
        post(
            b"Content-Length: 5", b"Upgrade: h2c", b"Connection: Upgrade", b"Content-Length: 0", body=b"hello",
        ),
    ),
    "a large body announced with an upgrade": (
        413, post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 65537"),
    ),
    "an upgrade with a space before the colon": (
        400, post(b"Connection: Upgrade", b"Upgrade : h2c", b"Content-Length: 5", body=b"hello"),
    ),
    "an upgrade that is folded": (
        400, post(b"Connection: Upgrade", b"Upgrade:\r\n h2c", b"Content-Length: 5", body=b"hello"),
    ),
    "an upgrade that ends with a bare line feed": (
        400, post(b"Connection: Upgrade", b"Upgrade: h2c\nContent-Length: 5", body=b"hello"),
    ),
    "a chunk without its end behind an upgrade": (
        400,
        post(
            b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: chunked", body=b"5\r\nhelloXX0\r\n\r\n",
        ),
    ),
    "many headers with an upgrade": (
        431, post(b"Connection: Upgrade", *[b"Upgrade: h2c"] * 64),
    ),
    "another coding": (501, post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n")),
    "a coding before chunked": (501, post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    "chunked twice": (400, post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "chunked in HTTP/1.0": (400, post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", version=b"1.0")),
    "an empty chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"\r\nhello\r\n0\r\n\r\n")),
    "a chunk size with 0x": (400, post(b"Transfer-Encoding: chunked", body=b"0x5\r\nhello\r\n0\r\n\r\n")),
    "a signed chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"+5\r\nhello\r\n0\r\n\r\n")),
    "a chunk without its end": (400, post(b"Transfer-Encoding: chunked", body=b"5\r\nhelloXX0\r\n\r\n")),
    "a negative chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"-1\r\nhello\r\n0\r\n\r\n")),
    "a chunk size with an underscore": (400, post(b"Transfer-Encoding: chunked", body=b"0_5\r\nhello\r\n0\r\n\r\n")),
    "a chunk size with a space": (400, post(b"Transfer-Encoding: chunked", body=b"5 \r\nhello\r\n0\r\n\r\n")),
    "chunks of bare line feeds": (400, post(b"Transfer-Encoding: chunked", body=b"5\nhello\n0\n\n")),
    "chunks of bare carriage returns": (400, post(b"Transfer-Encoding: chunked", body=b"5\rhello\r0\r\r")),
    "a line feed in a chunk extension": (
        400, post(b"Transfer-Encoding: chunked", body=b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    ),
    "a Content-Length as a trailer": (
        400, post(b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n"),
    ),
    "many trailers": (431, post(b"Transfer-Encoding: chunked", body=b"0\r\n" + b"X: y\r\n" * 70 + b"\r\n")),
    "long chunk extensions": (
        413, post(b"Transfer-Encoding: chunked", body=(b"1;" + b"a" * 4000 + b"\r\nx\r\n") * 100 + b"0\r\n\r\n"),
    ),
    "a huge chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"f" * 17 + b"\r\n")),
    "a bare line feed": (400, b"GET / HTTP/1.1\nHost: box\n\n"),
    "a bare carriage return": (400, b"GET / HTTP/1.1\r\nHost: box\rX: y\r\n\r\n"),
    "a bare line feed after a field": (400, b"GET / HTTP/1.1\r\nHost: box\nX: y\r\n\r\n"),
    "a bare line feed at the end": (400, b"GET / HTTP/1.1\r\nHost: box\r\n\n"),
    "a space before the first field": (400, b"GET / HTTP/1.1\r\n Host: box\r\n\r\n"),
    "a field without a colon": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX\r\n\r\n"),
    "NUL in a name": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX\0: a\r\n\r\n"),
    "a carriage return first": (400, b"\rGET / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "three empty lines first": (400, b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "two spaces in the request line": (400, b"GET  / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a tab in the request line": (400, b"GET\t/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a space after the version": (400, b"GET / HTTP/1.1 \r\nHost: box\r\n\r\n"),
    "a method in lower case": (400, b"get / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "RTSP": (400, b"GET / RTSP/1.0\r\nHost: box\r\n\r\n"),
    "NUL in a value": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\0b\r\n\r\n"),
    "a control character in a value": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\x01b\r\n\r\n"),
    "obs-fold": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\r\n b\r\n\r\n"),
    "a space before the colon": (400, b"GET / HTTP/1.1\r\nHost : box\r\n\r\n"),
    "a field without a name": (400, b"GET / HTTP/1.1\r\nHost: box\r\n: x\r\n\r\n"),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, b"GET / HTTP/1.1\r\nHost: box\r\nHost: box\r\n\r\n"),
    "a Host that is none": (400, b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n"),
    "a Host with a user": (400, b"GET / HTTP/1.1\r\nHost: a@box\r\n\r\n"),
    "a list of Hosts": (400, b"GET / HTTP/1.1\r\nHost: box, box\r\n\r\n"),
    "an empty Host": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    "two Authorizations": (
        400, b"GET / HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
    ),
    "two Content-Types": (400, post(b"Content-Type: a/b", b"Content-Type: a/b", b"Content-Length: 0")),
    "two Origins": (400, b"GET / HTTP/1.1\r\nHost: box\r\nOrigin: https://a\r\nOrigin: https://b\r\n\r\n"),
    "two Content-Types of one proxy": (
        400,
        b"POST / HTTP/1.1\r\nHost: box\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Proto: https\r\n"
        b"Content-Type: a/b\r\nContent-Type: c/d\r\n\r\n",
    ),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nHost: box\r\n\r\n"),
    "HTTP/2.0": (505, b"GET / HTTP/2.0\r\nHost: box\r\n\r\n"),
    "the preface of HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "another authority in the target": (400, b"GET http://other/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a user in the target": (400, b"GET http://a@box/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "another port in the target": (400, b"GET http://box:81/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a target without a slash": (400, b"GET x HTTP/1.1\r\nHost: box\r\n\r\n"),
    "octets beyond ASCII in the target": (400, b"GET /\xc3\xa4 HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a scheme that is none of ours": (400, b"GET ftp://box/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a fragment": (400, b"GET /#x HTTP/1.1\r\nHost: box\r\n\r\n"),
    "an asterisk": (400, b"OPTIONS * HTTP/1.1\r\nHost: box\r\n\r\n"),
    "CONNECT with an upgrade": (
        501, b"CONNECT box:80 HTTP/1.1\r\nHost: box:80\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ),
    "CONNECT": (501, b"CONNECT box:80 HTTP/1.1\r\nHost: box:80\r\n\r\n"),
    "an unknown method": (400, b"FETCH / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "NUL in the path": (400, b"GET /%00 HTTP/1.1\r\nHost: box\r\n\r\n"),
    "an encoded slash": (400, b"GET /a%2fb HTTP/1.1\r\nHost: box\r\n\r\n"),
    "octets of a path that are not UTF-8": (400, b"GET /a%ffb HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a backslash": (400, b"GET /a%5cb HTTP/1.1\r\nHost: box\r\n\r\n"),
    "dot segments": (400, b"GET /a/../b HTTP/1.1\r\nHost: box\r\n\r\n"),
    "encoded dot segments": (400, b"GET /a/%2e%2e/b HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a broken percent": (400, b"GET /%zz HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a long request line": (414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a long header": (431, b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 17000 + b"\r\n\r\n"),
    "many long headers": (431, b"GET / HTTP/1.1\r\nHost: box\r\n" + (b"X: " + b"a" * 5000 + b"\r\n") * 4 + b"\r\n"),
    "many headers": (
        431, b"GET / HTTP/1.1\r\nHost: box\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(70)) + b"\r\n",
    ),
    "a large body announced": (413, post(b"Content-Length: 65537")),
    "a large body in chunks": (
        413, post(b"Transfer-Encoding: chunked", body=(b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5 + b"0\r\n\r\n"),
    ),
    "an expectation": (417, post(b"Expect: miracles", b"Content-Length: 5", body=b"hello")),
    "an expectation twice": (
        400, post(b"Expect: 100-continue", b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"),
    ),
    "garbage": (400, bytes(range(128, 228))),
}


# What programs send over plain http, octet by octet; only the port is another.
CURL = (  # curl 7.88.1: curl --http2 -d …, and the same with -H "Transfer-Encoding: chunked"
    b"POST /token HTTP/1.1\r\nHost: 127.0.0.1:9040\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
)
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n\r\n"
UPGRADES = {  # program: (octets, content)
    "curl": (CURL + b"Content-Length: 29\r\n" + FORM + b"grant_type=client_credentials", "grant_type=client_credentials"),
    "curl, chunked": (
        CURL + b"Transfer-Encoding: chunked\r\n" + FORM + b"1d\r\ngrant_type=client_credentials\r\n0\r\n\r\n",
        "grant_type=client_credentials",
    ),
    "curl, GET": (CURL.replace(b"POST", b"GET") + b"\r\n", ""),
    "JDK": (  # java.net.http.HttpClient of OpenJDK 17.0.15
        b"POST /token HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 29\r\n"
        b"Host: 127.0.0.1:9040\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
        b"Upgrade: h2c\r\nUser-Agent: Java-http-client/17.0.15\r\n" + FORM + b"grant_type=client_credentials",
        "grant_type=client_credentials",
    ),
    "several offers": (
        b"POST /token HTTP/1.1\r\nHost: box\r\nupgrade:foo/1\r\nConnection: upgrade\r\nUPGRADE: TLS/1.3, h2c\r\n"
        b"Content-Length: 5\r\n\r\nhello",
        "hello",
    ),
}


def fields_of(headers):
    return "\r\n".join(f"{name}: {value}" for name, value in headers).encode()


class TestRefusals:
    def check(self, one, case, said):
        head, _, body = said.partition(b"\r\n\r\n")
        assert statuses(said) == [REFUSED[case][0]] and b"/smuggled" not in said
        assert b"Connection: close" in head and json.loads(body)["success"] is False
        assert fields_of(security_headers()) in head
        (event, fields), *more = one.logged
        assert (
            not more
            and event == "refused"
            and fields["peer"] == "127.0.0.1"
            and fields["reason"]
            and fields["server"] == "auth"
        )
        one.logged.clear()

    @pytest.mark.parametrize("case", REFUSED)
    def test_it_is_refused_logged_and_closed_and_nothing_after_it_is_served(self, shared, case):
        self.check(shared, case, shared.say(REFUSED[case][1] + SMUGGLED, end=False))

    @pytest.mark.parametrize("case", [case for case, (_, octets) in REFUSED.items() if len(octets) < 200])
    def test_it_is_refused_too_when_it_comes_octet_by_octet(self, shared, case):
        self.check(shared, case, shared.say(REFUSED[case][1] + SMUGGLED, end=False, each=1))

    @pytest.mark.parametrize("case", [case for case in REFUSED if case != "three empty lines first"])
    def test_it_is_refused_too_behind_a_good_request(self, shared, case):
        said = shared.say(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n" + REFUSED[case][1] + SMUGGLED, end=False)
        assert statuses(said) == [200, REFUSED[case][0]] and b"/smuggled" not in said
        assert [event for event, _ in shared.logged] == ["refused"]

    line = b"GET / HTTP/1.1\r\n"

    @pytest.mark.parametrize(
        "before",
        [
            line + HOST + b"X: " + line + b"\r\n", post(b"Content-Length: 16", body=line),
            post(b"Content-Length: 16", b"X: " + line.strip(), body=line),
            post(b"Transfer-Encoding: chunked", body=b"10\r\n" + line + b"\r\n1;a=b\r\na\r\n0\r\nX: " + line + b"\r\n"),
        ],
        ids=["header", "content", "both", "chunks and trailer"],
    )
    def test_a_request_line_is_not_excused_by_what_stood_before_it(self, shared, before):
        assert statuses(shared.say(before + b"GET  / HTTP/1.1\r\nHost: box\r\n\r\n" + SMUGGLED)) == [200, 400]
        assert statuses(shared.say(before + b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")) == [200, 200]

    @pytest.mark.parametrize(
        "status, reason, octets",
        [
            (413, "content size", post(b"Content-Length: 900000", body=b"x" * 900_000)),
            (431, "header size", b"GET / HTTP/1.1\r\nX: " + b"a" * 900_000),
        ],
    )
    def test_who_goes_on_sending_hears_the_refusal_all_the_same(self, shared, status, reason, octets):
        assert statuses(shared.say(octets)) == [status]
        assert shared.logged[0][1]["reason"] == reason

    def test_tls_on_the_plain_port_is_closed(self, run):
        one = run()
        assert b" 200 " not in one.say(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        assert one.logged

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(min_size=1, max_size=200))
    def test_random_octets_never_please_it_nor_hang_it(self, shared, octets):
        assert all(status >= 400 for status in statuses(shared.say(octets)))
        assert not [event for event, _ in shared.logged if event == "error"]

    words = st.sampled_from(
        [
            b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"GET / HTTP/1.0\r\n", b"Host: box\r\n",
            b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
            b"Upgrade: x\r\nConnection: Upgrade\r\n", b"Expect: 100-continue\r\n", b"\r\n", b"\n", b"\r", b" ", b":",
            b"0", b"5", b"hello", b"\0", b"\xff", b"%",
        ]
    )

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(words, min_size=2, max_size=14).map(b"".join))
    def test_pieces_of_requests_in_any_order_end_it_and_are_no_error(self, shared, octets):
        said = statuses(shared.say(octets))
        assert said.count(200) <= octets.count(b" HTTP/1.") and not set(said) - {100, 200, 400, 413, 417, 431, 501, 505}
        assert not [status for status in said[:-1] if status >= 400], "a refusal is the last word"
        assert not [event for event, _ in shared.logged if event == "error"]


class TestRequests:
    def test_names_with_underscores_are_dropped(self, shared):
        headers = shared.seen(headers=b"X_Forwarded_For: 1.2.3.4\r\nX_Real: 1\r\nX-Real: 2\r\nProxy: evil\r\n")[
            "headers"
        ]
        assert headers == {"HTTP_HOST": "box", "HTTP_X_REAL": "2", "HTTP_CONNECTION": "close"}

    @pytest.mark.parametrize(
        "octets",
        [
            post(b"Content-Length: 65536", body=b"x" * 65536),
            post(b"Transfer-Encoding: CHUNKED", body=b"05;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n"),
            post(b"Content-Length: 0"), post(b"Content-Length: 5 ", body=b"hello"), post(), b"\r\n" + post(),
            b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: [::1]:7000\r\n\r\n",
            b"GET http://BOX/ HTTP/1.1\r\nHost: box\r\n\r\n", b"GET http://box?x HTTP/1.1\r\nHost: box\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: box\r\n" + b"X: a\r\n" * 63 + b"\r\n",
            b"GET /" + b"a" * 8100 + b" HTTP/1.1\r\nHost: box\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 16000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: box\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        ],
    )
    def test_what_is_within_the_rules_is_served(self, shared, octets):
        assert statuses(shared.say(octets)) == [200] and shared.logged == []

    @pytest.mark.parametrize("each", [None, 1])
    @pytest.mark.parametrize("octets, body", UPGRADES.values(), ids=UPGRADES)
    def test_an_offered_upgrade_is_ignored_and_the_next_request_stands_behind_the_content(
        self, shared, octets, body, each
    ):
        """RFC 9110 §7.8."""
        last = b"GET /next HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n"
        said = shared.say(octets * 2 + last, end=False, each=each)
        assert statuses(said) == [200] * 3 and shared.logged == []
        answers = [json.loads(line) for line in re.findall(rb"\r\n\r\n(\{.*?\}\})", said)]
        assert [(answer["path"], answer["body"]) for answer in answers[:2]] == [("/token", body)] * 2
        assert (answers[2]["path"], answers[2]["body"]) == ("/next", "")

    def test_content_that_looks_like_a_request_stays_content_behind_an_offered_upgrade(self, shared):
        head = b"Connection: Upgrade", b"Upgrade: websocket, h2c"
        for octets in (
            post(*head, b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED),
            post(*head, b"Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
        ):
            said = shared.say(octets)
            assert statuses(said) == [200] and json.loads(said.partition(b"\r\n\r\n")[2])["path"] == "/"

    def test_an_upgrade_in_a_trailer_or_without_its_option_of_connection_is_an_unknown_field(self, shared):
        trailer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        for octets in (
            post(b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n"),
            post(b"Upgrade: h2c", b"Content-Length: 5", body=b"hello"),
            post(b"Connection: Upgrade", b"Content-Length: 5", body=b"hello"),
        ):
            assert statuses(shared.say(octets + SMUGGLED)) == [200, 200]

    def test_a_close_beside_an_offered_upgrade_closes(self, shared):
        octets = post(b"Connection: close, Upgrade", b"Upgrade: h2c", b"Content-Length: 5", body=b"hello")
        assert statuses(shared.say(octets + SMUGGLED, end=False)) == [200]
        octets = post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5", body=b"hello", version=b"1.0")
        assert statuses(shared.say(octets + SMUGGLED, end=False)) == [200]

    def test_who_offers_an_upgrade_is_told_to_continue(self, shared):
        with shared.connect() as sock:
            sock.sendall(
                post(b"Connection: Upgrade", b"Upgrade: h2c", b"Expect: 100-continue", b"Content-Length: 5")
            )
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"hello")
            assert b'"body": "hello"' in sock.recv(65536)

    def test_nothing_is_served_behind_a_close(self, shared):
        assert statuses(
            shared.say(b"GET / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n" + SMUGGLED, end=False)
        ) == [200]

    def test_a_trailer_is_never_a_header(self, shared):
        said = shared.say(post(b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\nAuthorization: evil\r\n\r\n"))
        assert json.loads(said.partition(b"\r\n\r\n")[2])["headers"] == {"HTTP_HOST": "box"}

    def test_lists_are_joined_in_their_order(self, shared):
        headers = shared.seen(headers=b"Accept: a\r\nCookie: x=1\r\nAccept: b\r\nCookie: y=2\r\n")["headers"]
        assert (headers["HTTP_ACCEPT"], headers["HTTP_COOKIE"]) == ("a, b", "x=1; y=2")

    @pytest.mark.parametrize(
        "path, decoded",
        [
            (b"/a%2fb/c%2F", "/a\x1fb/c\x1f"), (b"/%2F", "/\x1f"), (b"/a%5Cb", "/a\\b"), (b"/a%252Fb", "/a%2Fb"),
            (b"/a%2F..%2Fb", "/a\x1f..\x1fb"), (b"/..%2F", "/..\x1f"), (b"/a%20%c3%a4%2f", "/a \xc3\xa4\x1f"),
            (b"/a/b", "/a/b"),
        ],
    )
    def test_an_encoded_slash_is_part_of_its_segment_if_the_application_can_tell(self, path, decoded):
        """RFC 3986 §2.2"""
        assert _path_info(path, b"\x1f") == decoded

    @pytest.mark.parametrize(
        "path",
        [
            b"/a%2fb%1f", b"/%1F", b"/a%00", b"/a/%2e%2E/b", b"/a/..", b"/./a", b"/%2e", b"/a\\b", b"/%zz%2f", b"%2F",
            b"/%2f%ff", b"/a%2Fb?c", b"/a%2Fb%", b"/a%2f\x1f",
        ],
    )
    def test_what_else_two_parsers_could_read_as_two_paths_is_refused_there_too(self, path):
        with pytest.raises(HttpRefusal):
            _path_info(path, b"\x1f")

    def test_the_path_is_decoded_once(self, shared):
        seen = shared.seen(b"/a%20%c3%a4?x=%2f&y")
        assert seen["path"] == "/a \u00c3\u00a4" and seen["query"] == "x=%2f&y"
        assert shared.seen(b"http://box/a")["path"] == "/a"

    @pytest.mark.parametrize(
        "framing, body",
        [
            (b"Content-Length: 5", b"hello"),
            (b"Transfer-Encoding: chunked", b"3\r\nhel\r\n2;a\r\nlo\r\n0\r\nT: 1\r\n\r\n"),
        ],
    )
    def test_it_may_be_cut_anywhere_in_two(self, shared, framing, body):
        octets = b"\r\n" + post(framing, b"Connection: close", body=body)
        for cut in range(1, len(octets)):
            with shared.connect() as sock:
                sock.sendall(octets[:cut])
                time.sleep(0.0005)
                sock.sendall(octets[cut:])
                said = read_all(sock)
            assert statuses(said) == [200] and b'"body": "hello"' in said, octets[:cut]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.lists(st.integers(1, 140), max_size=5), chunked=st.booleans())
    def test_where_it_is_cut_does_not_matter(self, shared, cuts, chunked):
        body = b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n" if chunked else b"hello"
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 5"
        octets = b"POST /x?y HTTP/1.1\r\nHost: box\r\n" + framing + b"\r\nConnection: close\r\n\r\n" + body
        places = sorted({0, len(octets), *(cut for cut in cuts if cut < len(octets))})
        with shared.connect() as sock:
            for start, end in zip(places, places[1:]):
                sock.sendall(octets[start:end])
                time.sleep(0.001)
            said = read_all(sock)
        assert said.startswith(b"HTTP/1.1 200 ") and json.loads(said.partition(b"\r\n\r\n")[2])["body"] == "hello"

    def test_pipelined_requests_are_answered_in_their_order(self, shared):
        said = shared.say(b"".join(b"GET /%d HTTP/1.1\r\nHost: box\r\n\r\n" % n for n in range(20)))
        assert [json.loads(part.partition(b"\r\n\r\n")[2])["path"] for part in said.split(b"HTTP/1.1 ")[1:]] == [
            f"/{n}" for n in range(20)
        ]

    def test_keep_alive_and_close(self, shared):
        assert b"Connection: close" not in shared.say(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
        with shared.connect() as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"Connection: close" in read_all(sock)

    def test_head_has_a_length_and_no_body(self, shared):
        said = shared.say(b"HEAD / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
        assert said.endswith(b"\r\n\r\n") and b"Content-Length: " in said

    @pytest.mark.parametrize("method", [b"PATCH", b"TRACE", b"QUERY"])
    def test_a_method_we_know_is_left_to_the_application_which_offers_it_nowhere(self, shared, method):
        """405 with Allow is for what is known, 501 for what is not. RFC 9110 §9.1"""
        said = shared.say(method + b" / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
        assert statuses(said) == [200] and b'"method": "%b"' % method in said

    def test_100_continue_comes_only_when_the_body_will_be_taken(self, shared):
        with shared.connect() as sock:
            sock.sendall(post(b"Content-Length: 5", b"Expect: 100-continue", b"Connection: close"))
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"hello")
            assert b'"body": "hello"' in read_all(sock)
        for too_much in (
            post(b"Content-Length: 65537", b"Expect: 100-continue"),
            post(b"Content-Length: 0", b"Expect: 100-continue"),
        ):
            assert 100 not in statuses(shared.say(too_much))

    def test_100_continue_comes_behind_a_pipelined_request_too(self, shared):
        with shared.connect() as sock:
            sock.sendall(
                b"GET / HTTP/1.1\r\nHost: box\r\n\r\n"
                + post(b"Content-Length: 5", b"Expect: 100-continue", b"Connection: close")
            )
            said = b""
            while b"100 Continue" not in said:
                said += sock.recv(65536)
            sock.sendall(b"hello")
            assert statuses(said + read_all(sock)) == [200, 100, 200]

    def test_a_bug_of_the_application_tells_nothing(self, run):
        one = run()
        said = one.get(b"/bug")
        (request_id,) = re.findall(rb"\r\nX-Request-Id: ([0-9a-f]{16})\r\n", said)
        assert json.loads(said.partition(b"\r\n\r\n")[2]) == {
            "success": False, "message": "The server failed.", "error": "server_error",
            "request_id": request_id.decode(),
        }
        assert fields_of(security_headers()) in said
        assert b" 500 " in said and b"secret" not in said and [event for event, _ in one.logged] == ["error"]

    def test_every_answer_names_its_request(self, shared):
        said = shared.say(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n" * 2 + b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
        names = re.findall(rb"\r\nX-Request-Id: ([0-9a-f]{16})\r\n", said)
        assert len(names) == len(set(names)) == len(statuses(said)) == 3

    def test_blocks_are_bounded(self, run):
        server = run().server
        for number in range(600):
            server._block("200 OK", (("X", str(number)),))
        assert len(server._blocks) <= 256


def pipelined(path, content=None, chunked=False):
    """A request among others, and what the application must see of it."""
    if content is None:
        return b"GET " + path + b" HTTP/1.1\r\nHost: box\r\n\r\n", ("GET", path.decode(), "")
    framing, octets = b"Content-Length: %d" % len(content), content
    if chunked:
        framing, octets = b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\nT: 1\r\n\r\n" % (len(content), content)
    head = b"POST " + path + b" HTTP/1.1\r\nHost: box\r\n" + framing + b"\r\n\r\n"
    return head + octets, ("POST", path.decode(), content.decode())


GET = pipelined(b"/get")
POST = pipelined(b"/post", b"grant_type=x")
CHUNKS = pipelined(b"/chunks", b"a=1", chunked=True)
SEQUENCES = {
    "POST, GET": [POST, GET], "POST, POST": [POST, pipelined(b"/second", b"y")],
    "GET, POST, GET": [GET, POST, pipelined(b"/last")], "chunks, GET": [CHUNKS, GET],
    "POST, chunks, POST": [POST, CHUNKS, pipelined(b"/second", b"y")],
    "content that looks like a request": [pipelined(b"/post", GET[0] + b"\r\n\r\n"), GET],
    "chunks that look like their end": [pipelined(b"/chunks", b"0\r\n\r\n" * 3, chunked=True), GET],
    "no content": [pipelined(b"/post", b""), POST, GET],
}


class TestPipelining:
    """RFC 9112 §9.3.2: a request behind another is its own, wherever the octets are cut."""

    def parse(self, *pieces):
        """What a connection makes of the octets, without a socket: (method, path, content) of each, and the refusal."""
        server = types.SimpleNamespace(limits=Limits(), tls=None, trusted_proxies=(), log=None, name="auth", slash=b"")
        connection = wire.Connection(
            server, socket.socket(), "192.0.2.7", {"SERVER_PROTOCOL": "HTTP/1.1"}, wire.HeaderKeys(False), False, True
        )
        with connection.sock:
            for piece in pieces:
                if connection.refusal is None:
                    connection.feed(piece)
        return [
            (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["wsgi.input"].read().decode())
            for environ, _ in connection.requests
        ], connection.refusal and connection.refusal.reason

    @pytest.mark.parametrize("name", SEQUENCES)
    def test_each_is_found_wherever_it_is_cut(self, name):
        octets, requests = b"".join(one for one, _ in SEQUENCES[name]), [seen for _, seen in SEQUENCES[name]]
        assert self.parse(octets) == (requests, None)
        assert self.parse(*(bytes([octet]) for octet in octets)) == (requests, None)
        for cut in range(1, len(octets)):
            assert self.parse(octets[:cut], octets[cut:]) == (requests, None), octets[:cut]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from([GET, POST, CHUNKS]), max_size=6), st.lists(st.integers(1, 600), max_size=9))
    def test_each_is_found_however_often_it_is_cut(self, sequence, cuts):
        octets = b"".join(one for one, _ in sequence)
        places = sorted({0, len(octets), *(cut for cut in cuts if cut < len(octets))})
        pieces = [octets[start:end] for start, end in zip(places, places[1:])]
        assert self.parse(*pieces) == ([seen for _, seen in sequence], None)

    @pytest.mark.parametrize("case", [case for case, (_, octets) in REFUSED.items() if len(octets) < 200])
    def test_what_is_refused_by_itself_is_refused_behind_content_wherever_it_is_cut(self, case):
        before = POST[0] + CHUNKS[0]
        octets = before + REFUSED[case][1] + SMUGGLED
        for cut in range(1, len(octets)):
            requests, reason = self.parse(octets[:cut], octets[cut:])
            assert requests == [POST[1], CHUNKS[1]] and reason, octets[:cut]

    @pytest.mark.parametrize("name", SEQUENCES)
    def test_each_is_answered_in_its_order(self, shared, name):
        octets = b"".join(one for one, _ in SEQUENCES[name])
        answers = []
        for each in (None, 1, 7):
            said = shared.say(octets, each=each)
            answers.append([json.loads(part.partition(b"\r\n\r\n")[2]) for part in said.split(b"HTTP/1.1 200 OK")[1:]])
        wanted = [seen for _, seen in SEQUENCES[name]]
        for answer in answers:
            assert [(one["method"], one["path"], one["body"]) for one in answer] == wanted

    def test_each_is_answered_wherever_it_is_cut(self, shared):
        octets = GET[0] + POST[0] + CHUNKS[0] + post(b"Content-Length: 1", b"Connection: close", body=b"x")
        for cut in range(1, len(octets)):
            with shared.connect() as sock:
                sock.sendall(octets[:cut])
                time.sleep(0.0005)
                sock.sendall(octets[cut:])
                assert statuses(read_all(sock)) == [200] * 4, octets[:cut]


class TestPeer:
    NETS = tuple(map(ipaddress.ip_network, ("127.0.0.1/32", "10.0.0.0/8")))

    @pytest.mark.parametrize(
        "remote, forwarded, peer",
        [
            ("192.0.2.1", "1.1.1.1", "192.0.2.1"), ("127.0.0.1", None, "127.0.0.1"),
            ("127.0.0.1", "192.0.2.9", "192.0.2.9"), ("127.0.0.1", "1.1.1.1, 192.0.2.9", "192.0.2.9"),
            ("127.0.0.1", "192.0.2.9, 10.0.0.5", "192.0.2.9"), ("127.0.0.1", "nonsense", "127.0.0.1"),
            ("127.0.0.1", "192.0.2.9, nonsense, 10.0.0.5", "10.0.0.5"), ("::ffff:127.0.0.1", "192.0.2.9", "192.0.2.9"),
            ("127.0.0.1", "", "127.0.0.1"),
        ],
    )
    def test_the_right_most_untrusted_hop(self, remote, forwarded, peer):
        assert client_address(remote, forwarded, self.NETS) == peer

    def test_only_trusted_proxies_are_believed(self, run, shared):
        headers = b"X-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: https\r\n"
        assert (shared.seen(headers=headers)["peer"], shared.seen(headers=headers)["scheme"]) == ("127.0.0.1", "http")
        assert "HTTP_X_FORWARDED_FOR" not in shared.seen(headers=headers)["headers"]
        seen = run(trusted_proxies=self.NETS).seen(headers=headers)
        assert (seen["peer"], seen["scheme"]) == ("192.0.2.9", "https")

    # As HAProxy's `http-request add-header` sends them behind a proxy that has set them.
    REPEATED = (
        b"X-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: evil.example\r\n"
        b"Forwarded: for=192.0.2.1;proto=http\r\nX-Forwarded-For: 10.0.0.5\r\nx-forwarded-proto: https\r\n"
        b"X-Forwarded-Host: app.example\r\nForwarded: for=192.0.2.2;proto=https\r\n"
    )

    def test_repeated_fields_of_proxies_are_dropped_where_they_are_not_believed(self, shared):
        seen = shared.seen(headers=self.REPEATED)
        assert (seen["peer"], seen["scheme"], seen["proxied"]) == ("127.0.0.1", "http", True)
        assert seen["headers"] == {"HTTP_HOST": "box", "HTTP_CONNECTION": "close"} and not shared.logged
        assert shared.seen()["proxied"] is False

    def test_repeated_fields_of_a_trusted_proxy_are_one_line_with_commas(self, run):
        """RFC 9110 §5.3."""
        one = run(trusted_proxies=self.NETS)
        seen = one.seen(headers=self.REPEATED)
        assert (seen["peer"], seen["scheme"], seen["proxied"]) == ("192.0.2.9", "https", True)
        assert seen["headers"]["HTTP_X_FORWARDED_FOR"] == "192.0.2.9, 10.0.0.5"
        turned = self.REPEATED.replace(b"https", b"HTTP").replace(b"Proto: http\r", b"Proto: https\r")
        assert one.seen(headers=turned)["scheme"] == "http", "the nearest proxy writes last"

    @pytest.mark.parametrize("lines", [1, 2])
    def test_x_forwarded_host_is_believed_of_nobody(self, run, lines):
        seen = run(trusted_proxies=self.NETS).seen(headers=b"X-Forwarded-Host: evil.example\r\n" * lines)
        assert seen["headers"] == {"HTTP_HOST": "box", "HTTP_CONNECTION": "close"} and seen["proxied"] is True

    @pytest.mark.parametrize(
        "field", [b"Host: box", b"Authorization: Bearer a", b"Content-Length: 0", b"Content-Type: a/b", b"Origin: a"]
    )
    def test_a_trusted_proxy_cannot_repeat_what_is_no_list(self, run, field):
        octets = b"POST / HTTP/1.1\r\nHost: box\r\n" + (field + b"\r\n") * 2 + b"\r\n"
        assert statuses(run(trusted_proxies=self.NETS).say(octets + SMUGGLED, end=False)) == [400]

    def test_a_peer_has_so_many_connections_and_gets_them_back(self, run, monkeypatch):
        monkeypatch.setattr("appliance.base.wire._address", lambda text: ipaddress.ip_address("192.0.2.7"))
        one = run(limits=Limits(connections_per_peer=2))

        def ask(sock):
            with contextlib.suppress(OSError):
                sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
                return statuses(sock.recv(65536))

        first, second, third = one.connect(), one.connect(), one.connect()
        assert [ask(second), ask(third)] == [[200], [200]] and ask(first) in ([], None), "the oldest idle one gave way"
        for sock in (second, third):
            sock.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(0.2)
        fourth = one.connect()
        assert ask(fourth) == [200] and ask(second) in ([], None), "none is idle: the slowest gave way"
        third.sendall(b"Host: box\r\n\r\n")
        assert statuses(third.recv(65536)) == [200]
        for sock in (first, second, third, fourth):
            sock.close()
        time.sleep(0.3)
        with one.connect() as again:
            assert ask(again) == [200]


@pytest.fixture(scope="module")
def hasty():
    one = Running(limits=Limits(request_seconds=0.3, idle_seconds=0.3, send_seconds=0.3))
    yield one
    one.server.stop(1)


class TestSlowClients:
    def test_half_a_request_is_told_that_its_time_is_over(self, run):
        one = run(limits=Limits(request_seconds=0.3))
        with one.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHo")
            assert statuses(read_all(sock)) == [408]
        assert [fields["status"] for _, fields in one.logged] == [408]

    @pytest.mark.parametrize(
        "half",
        [
            b"G", b"GET /\r\n", b"GET / HTTP/1.1\r\nHost: box\r\n\r",
            b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 9\r\n\r\nhal",
            b"POST / HTTP/1.1\r\nHost: box\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
            b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n",
        ],
    )
    def test_every_half_of_a_request_has_the_same_end(self, hasty, half):
        interim = [100] if b"Expect" in half else []
        assert statuses(hasty.say(half, end=False)) == [*interim, 408]

    def test_a_connection_that_says_nothing_is_closed_without_an_answer(self, hasty):
        with hasty.connect() as sock:
            assert read_all(sock) == b""

    def test_one_that_was_answered_is_closed_when_nothing_follows(self, hasty):
        assert statuses(hasty.say(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n", end=False)) == [200]

    def test_one_octet_at_a_time_does_not_extend_it(self, run):
        one = run(limits=Limits(request_seconds=0.5))
        assert statuses(
            one.say(b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 40 + b"\r\n\r\n", each=1, pause=0.02)
        ) == [408]

    def test_a_thousand_half_sent_requests_hold_nobody_up(self, run):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
        one = run()
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                sock = stack.enter_context(one.connect())
                sock.sendall(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 9\r\n\r\nhal")
            for _ in range(50):
                assert b" 200 " in one.get()
            assert threading.active_count() < 30

    BIG = b"GET /big HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n"

    def lazy(self, one, sent=BIG):
        """A connection with little room for what is sent to it: 3 MB do not fit on their way."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect(one.address)
        sock.sendall(sent)
        return sock

    def test_who_does_not_read_holds_no_thread(self, run):
        one = run()
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(self.lazy(one)) for _ in range(20)]
            time.sleep(0.2)
            before = threading.active_count()
            for _ in range(20):
                assert b" 200 " in one.get()
            assert threading.active_count() <= before
            assert len(read_all(slow[0])) > 3_000_000, "it may still read all of it"

    def test_who_never_reads_is_closed(self, hasty):
        with self.lazy(hasty) as sock:
            time.sleep(1.2)
            assert len(read_all(sock)) < 3_000_000

    HALF = b"GET / HTTP/1.1\r\nHost: box\r\n"  # a request under way

    def test_connections_beyond_the_limit_are_closed_and_counted(self, run):
        """Where none waits for its client."""
        one = run(limits=Limits(connections=5))
        with contextlib.ExitStack() as stack:
            within = [stack.enter_context(one.connect()) for _ in range(5)]
            for sock in within:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.3)
            beyond = [stack.enter_context(one.connect()) for _ in range(3)]
            assert [read_all(sock) for sock in beyond] == [b""] * 3
            one.app.go.set()
            assert statuses(read_all(within[0])) == [200]
        one.await_log()
        assert (one.logged[0][1]["reason"], one.logged[0][1]["count"]) == ("too many connections", 3)

    def test_the_oldest_idle_connection_gives_way_to_a_new_one(self, run):
        one = run(limits=Limits(connections=5))
        with contextlib.ExitStack() as stack:
            within = []
            for _ in range(5):
                within.append(stack.enter_context(one.connect()))
                within[-1].sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
                assert statuses(within[-1].recv(65536)) == [200]
            within[0].sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")  # used again: now the second is the oldest
            assert statuses(within[0].recv(65536)) == [200]
            within[2].sendall(self.HALF)
            time.sleep(0.2)
            fresh = [stack.enter_context(one.connect()) for _ in range(2)]
            for sock in fresh:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
                assert statuses(sock.recv(65536)) == [200]
            assert read_all(within[1]) == read_all(within[3]) == b""
            for sock, rest in ((within[0], self.HALF + b"\r\n"), (within[2], b"\r\n")):
                sock.sendall(rest)
                assert statuses(sock.recv(65536)) == [200]
        one.await_log()
        assert one.logged[0][1]["reason"] == "idle connections gave way to new ones"

    def from_addresses(self, monkeypatch, addresses):
        """Let those who connect come from these addresses, one after the other."""
        coming, real = iter(addresses), wire._address
        monkeypatch.setattr("appliance.base.wire._address", lambda text: real(next(coming)))

    @pytest.mark.parametrize("flood", ["2001:db8:1:{:x}::1", "192.0.2.7"], ids=["a site of IPv6", "one address"])
    @pytest.mark.parametrize(
        "sent", [b"", HALF, HALF + b"Content-Length: 9\r\n\r\nuser", BIG],
        ids=["nothing", "half a header", "half a form", "no answer taken"],
    )
    def test_whoever_fills_the_limit_slowly_crowds_out_itself(self, run, monkeypatch, sent, flood):
        """Slowloris: half-sent requests, and answers that nobody reads, of one source. The slow form of another stays."""
        self.from_addresses(
            monkeypatch, ["198.51.100.1", "198.51.100.2", *(flood.format(number) for number in range(30)), "198.51.100.3"]
        )
        one = run(limits=Limits(connections=8))
        with contextlib.ExitStack() as stack:
            idle, slow = (stack.enter_context(one.connect()) for _ in range(2))
            idle.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(idle.recv(65536)) == [200]
            slow.sendall(b"POST / HTTP/1.1\r\nHost: box\r\nContent-Length: 5\r\n\r\nna")
            time.sleep(0.1)
            for _ in range(30):
                stack.enter_context(self.lazy(one, sent))
                time.sleep(0.01)
            fresh = stack.enter_context(one.connect())
            for sock, rest in ((fresh, b"GET / HTTP/1.1\r\nHost: box\r\n\r\n"), (slow, b"me=")):
                sock.sendall(rest)
                assert statuses(sock.recv(65536)) == [200]
            idle.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(idle.recv(65536)) == [200], "and so does its kept connection"
            assert len(one.server.open) <= 8
        assert "slow connections gave way to new ones" in {fields["reason"] for _, fields in one.logged}

    def test_whoever_is_being_answered_counts_as_well(self, run, monkeypatch):
        self.from_addresses(monkeypatch, ["198.51.100.1", *["192.0.2.7"] * 4])
        one = run(limits=Limits(connections=4))
        with contextlib.ExitStack() as stack:
            idle = stack.enter_context(one.connect())
            idle.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(idle.recv(65536)) == [200]
            for sent in (b"GET /wait HTTP/1.1\r\nHost: box\r\n\r\n",) * 2 + (self.HALF,):
                stack.enter_context(one.connect()).sendall(sent)
                time.sleep(0.1)
            stack.enter_context(one.connect())
            time.sleep(0.2)
            idle.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(idle.recv(65536)) == [200]

    def test_where_there_is_room_a_request_may_take_its_time(self, run):
        one = run(limits=Limits(connections=8, request_seconds=5))
        with one.connect() as slow:
            for piece in (b"POST / HTTP/1.1\r\n", b"Host: box\r\nContent-Length: 5\r\n\r\n", b"na", b"me="):
                slow.sendall(piece)
                for _ in range(20):
                    assert b" 200 " in one.get()
            assert statuses(slow.recv(65536)) == [200] and not one.logged

    def test_one_that_speaks_while_others_come_is_heard_first(self, run, monkeypatch):
        """Its event is of the same round as the new connections, to one of which it would have to give way."""
        one, go = run(limits=Limits(connections=2)), threading.Event()
        with contextlib.ExitStack() as stack:
            old = [stack.enter_context(one.connect()) for _ in range(2)]
            time.sleep(0.1)
            poll = one.server._connections._poll
            monkeypatch.setattr(one.server._connections, "_poll", lambda timeout: go.wait(60) and poll(timeout))
            time.sleep(2 * SWEEP)
            new = [stack.enter_context(one.connect()) for _ in range(2)]
            old[0].sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            time.sleep(0.1)
            go.set()
            assert statuses(old[0].recv(65536)) == [200]
            new[1].sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(new[1].recv(65536)) == [200]
            assert not [fields for event, fields in one.logged if event == "error"]
        time.sleep(0.2)
        assert not one.server.open, "each is forgotten when it ends"

    @pytest.mark.parametrize("limits", [Limits(connections=256), Limits(connections_per_peer=256)])
    def test_whoever_opens_many_has_the_idle_ones_looked_for_once_for_several(self, run, monkeypatch, limits):
        monkeypatch.setattr("appliance.base.wire._address", lambda text: ipaddress.ip_address("192.0.2.7"))
        one, counts = run(limits=limits), []
        look = wire.ConnectionManager.close_oldest
        monkeypatch.setattr(
            wire.ConnectionManager, "close_oldest", lambda self, *more: counts.append(look(self, *more)) or counts[-1]
        )
        with contextlib.ExitStack() as stack:
            for _ in range(256 + 10):
                sock = stack.enter_context(one.connect())
            sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert statuses(sock.recv(65536)) == [200]
        assert counts == [5, 5]

    @pytest.mark.parametrize(
        "addresses, taken",
        [
            (["192.0.2.7"] * 4, 2), (["192.0.2.7", "192.0.2.8", "192.0.2.9"], 3),
            ([f"2001:db8:1:1::{number}" for number in range(4)], 2),
            ([f"2001:db8:1:{number}::1" for number in range(8)], 6), (["::ffff:192.0.2.7", "192.0.2.7", "192.0.2.7"], 2),
            ([f"2001:db8:{number}::1" for number in range(8)], 8),
        ],
    )
    def test_a_network_of_ipv6_is_one_peer_and_a_site_has_what_some_of_them_may_have(
        self, run, monkeypatch, addresses, taken
    ):
        """RFC 6177 §2: who has one address of IPv6 has its /64, and a site has up to a /48."""
        self.from_addresses(monkeypatch, addresses)
        one = run(limits=Limits(connections_per_peer=2, peers_per_site=3))
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in addresses:
                socks.append(stack.enter_context(one.connect()))
                socks[-1].sendall(self.HALF)
                time.sleep(0.05)
            time.sleep(0.2)
            assert len(one.server.open) == taken
        time.sleep(0.3)
        assert not one.server._peers, "each is counted down again"

    @pytest.mark.parametrize("many", [30, 100])
    def test_handlers_that_wait_leave_threads_for_the_others(self, run, many):
        one = run()
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(one.connect()) for _ in range(many)]
            for sock in waiting:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            for _ in range(20):
                assert b" 200 " in one.get()
            assert not one.app.go.is_set(), "they all wait still"
            one.app.go.set()
            assert all(b" 200 " in read_all(sock) for sock in waiting)


    def test_more_that_wait_than_there_may_be_threads_are_answered_all_the_same(self, run):
        one = run(threads=2, max_threads=4)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(one.connect()) for _ in range(12)]
            for sock in waiting:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.1)
            one.app.go.set()
            assert all(statuses(read_all(sock)) == [200] for sock in waiting)

    def test_a_refused_sender_is_cut_off_after_a_megabyte(self, run):
        one = run()
        with one.connect(3) as sock:
            sock.sendall(b"GET /\r\n\r\n BAD\r\n\r\n")
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 50_000_000:
                    sent += sock.send(bytes(65536))
            assert sent < 20_000_000, sent


class TestWithoutMemory:
    """For a moment there is none, at the worst place; then there is some again."""

    @pytest.mark.parametrize(
        "where, error",
        [
            ("register_connection", MemoryError()), ("_address", RuntimeError("can't allocate lock")),
            ("Connection", RuntimeError("can't allocate lock")), ("Connection", MemoryError()),
        ],
    )
    def test_connections_that_could_not_be_taken_leave_the_door_open(self, run, monkeypatch, where, error):
        one, failing = run(threads=2, max_threads=4), [0]
        owner = Server if where == "register_connection" else wire

        def fail(*words):
            failing[0] += 1
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(owner, where, fail)
            for _ in range(6):
                with contextlib.suppress(OSError), one.connect(0.3) as sock:
                    sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
                    sock.recv(1)
                time.sleep(SWEEP / 4)
        assert failing[0] > 1
        time.sleep(2 * SWEEP)
        assert all(b" 200 " in one.get() for _ in range(6))
        assert len(one.server.requests._threads) == one.server.requests.min, "a thread that ended is hired again"

    def test_a_thread_that_dies_at_its_birth_holds_up_nobody(self, run, monkeypatch):
        """Thread.start() waits for it for ever."""
        one, born = run(threads=2, max_threads=8), threading.Event()
        started, beats = threading.Thread.start, []
        one.server.beat = lambda: beats.append(time.monotonic())
        monkeypatch.setattr(
            threading.Thread, "start",
            lambda thread: born.wait(20) if thread.name.startswith("auth-") else started(thread),
        )
        try:
            with one.connect() as waiting:
                waiting.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
                time.sleep(0.2)
                assert all(b" 200 " in one.get() for _ in range(6))
                sofar = len(beats)
                time.sleep(3 * SWEEP)
                assert len(beats) <= sofar + 1, "and whoever looks at the beats sees that it does not go on"
                one.app.go.set()
                assert b" 200 " in read_all(waiting)
        finally:
            born.set()


class TestLastThread:
    def test_it_is_told_from_the_one_that_all_wait_for(self, run):
        """Who holds the turn to write waits for the disk and does not say so."""
        one, go, told = run(threads=2, max_threads=3), threading.Event(), []

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/holds":
                go.wait(60)
            elif environ["PATH_INFO"] == "/waits":
                with one.server.blocking() as others:
                    told.append(others)
                    if others:
                        go.wait(60)
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            for path in (b"/holds", b"/waits", b"/waits"):
                sock = stack.enter_context(one.connect())
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
                time.sleep(0.2)
            assert all(b" 200 " in one.get() for _ in range(4)), told
            go.set()
        assert told == [True, False]


class TestTogether:
    """An application that gives an empty part before its status goes on beside others. PEP 3333"""

    @pytest.mark.parametrize(("error", "body"), [(None, b"done"), (RuntimeError("disk"), b"failed")])
    def test_no_answer_is_sent_before_what_it_has_done_is_on_the_disk(self, run, error, body):
        one, ran, go = run(threads=2, max_threads=3), threading.Semaphore(0), threading.Event()

        def app(environ, start_response):
            yield b""
            ran.release()
            given = b"done"
            try:
                yield b""
            except RuntimeError:
                given = b"failed"
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield given

        def run_together(works):
            done = [work() for work in works]
            with one.server.blocking():
                go.wait(60)
            return [error] * len(done)

        one.server.wsgi_app, one.server.run_together = app, run_together
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(10)) for _ in range(5)]
            for sock in socks:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert ran.acquire(timeout=60)
            assert not select.select(socks, [], [], 0.3)[0]
            go.set()
            for sock in socks:
                answer = b""
                while not answer.endswith(body):
                    part = sock.recv(10_000)
                    assert part, answer
                    answer += part
                assert answer.startswith(b"HTTP/1.1 200 ")
            for sock in socks:  # each connection takes its next request
                sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            assert all(read_all(sock).endswith(body) for sock in socks)

    def test_one_that_has_waited_goes_on_while_another_thread_waits_for_requests(self, run, monkeypatch):
        """That thread has the lead, and nothing wakes it: no request comes, and no sweep."""
        monkeypatch.setattr(Server, "expiration_interval", 60)
        one = run(threads=2, max_threads=3)

        def app(environ, start_response):
            with one.server.blocking():
                while one.server.requests._leader is threading.current_thread():
                    time.sleep(0.001)
                time.sleep(0.2)  # the selector waits by now
            yield b""
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield b"done"

        one.server.wsgi_app = app
        assert one.get().endswith(b"done")

    @pytest.mark.parametrize("step", ["go_on", "finish"])
    def test_one_that_cannot_even_be_told_takes_none_along(self, run, monkeypatch, step):
        one, waiting, failed = run(threads=2, max_threads=3), [], []

        def app(environ, start_response):
            yield b""
            if environ["PATH_INFO"] == "/last" and step == "go_on":
                raise RuntimeError
            yield b""
            if environ["PATH_INFO"] == "/last":
                raise RuntimeError
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield b"done"

        write, postpone = one.server._write, one.server.requests.postpone

        def fail(environ, keep, status, headers, body):
            if status.startswith("500"):
                failed.append(status)
                raise MemoryError
            return write(environ, keep, status, headers, body)

        def gather(conn):
            waiting.append(conn)
            if len(waiting) == 3:
                for each in sorted(waiting, key=lambda each: each is not waiting[-1]):
                    postpone(each)

        monkeypatch.setattr(one.server, "_write", fail)
        monkeypatch.setattr(one.server.requests, "postpone", gather)
        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect()) for _ in range(3)]
            for sock, path in zip(socks, (b"/one", b"/two", b"/last"), strict=True):
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
                time.sleep(0.05)
            assert [read_all(sock)[-4:] for sock in socks] == [b"done", b"done", b""] and failed

    def test_one_that_goes_on_alone_is_answered_while_no_thread_is_free_of_requests(self, run):
        """Whoever took it is busy with another request by then: the lead passes on."""
        one, go = run(threads=2, max_threads=3), threading.Event()

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/holds":
                go.wait(60)
            else:
                yield b""
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield b"done"

        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(10)) for _ in range(2)]
            for sock, path in zip(socks, (b"/together", b"/holds"), strict=True):
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            assert read_all(socks[0]).endswith(b"done") and not go.is_set()
            go.set()
            assert read_all(socks[1]).endswith(b"done")


class TestSweep:
    def test_threads_that_were_blocked_at_once_are_kept_until_the_next_sweep(self, run, monkeypatch):
        """Those that write in groups are blocked together and free together: they would end and begin all the time."""
        one, go, seen = run(threads=2, max_threads=20), threading.Event(), []
        pool = one.server.requests
        shrink = pool.shrink

        def record(amount):
            seen.append((len(pool._threads), len(pool._waiting), max(amount, 0)))
            shrink(amount)

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/waits":
                with one.server.blocking():
                    go.wait(60)
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        def await_true(condition):
            end = time.monotonic() + 10
            while not condition() and time.monotonic() < end:
                time.sleep(0.01)
            return condition()

        monkeypatch.setattr(pool, "shrink", record)
        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(10)) for _ in range(6)]
            for sock in socks:
                sock.sendall(b"GET /waits HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            assert await_true(lambda: len(pool._waiting) == 6 and len(pool._threads) == 8)
            go.set()
            assert all(b" 200 " in read_all(sock) for sock in socks)
        assert await_true(lambda: len(pool._threads) == 2)
        assert min(ended for threads, waiting, ended in seen if (threads, waiting) == (8, 0)) < 6


class TestCrowd:
    """More requests than threads, which all wait for the verification of one name."""

    def crowd(self, one, app, count=100):
        one.server.wsgi_app, one.has_come = app, threading.Event()
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(10)) for _ in range(count)]
            for sock in socks:
                sock.sendall(b"GET /of-one HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.1)
            assert b" 200 " in one.get()
            one.has_come.set()
            return [status for sock in socks for status in statuses(read_all(sock))]

    def make_app(self, one, is_right):
        gate, known = HashGate(1), []
        gate.blocking, name_locks = one.server.blocking, NameLocks(gate)

        def app(environ, start_response):
            status = "200 OK"
            try:
                if environ["PATH_INFO"] == "/of-one":
                    with name_locks.hold("client", "app", "127.0.0.1") as name_lock:
                        if not known:
                            with gate.slot("127.0.0.1"), gate.hashing():
                                if not is_right:  # how many of them wait would depend on how fast they are sent
                                    one.has_come.wait(60)
                                time.sleep(0.3 if is_right else 0.02)
                            if is_right:
                                known.append(1)
                            else:
                                name_locks.blame(name_lock, "127.0.0.1")
            except Busy:
                status = "429 Too Many Requests"
            start_response(status, [("Content-Type", "text/plain")])
            return [b""]

        return app

    def test_a_good_one_is_served_whole(self, run):
        one = run(threads=2, max_threads=20)
        assert self.crowd(one, self.make_app(one, True)) == [200] * 100

    def test_150_clients_that_are_all_hashed_first_keep_nobody_else_waiting(self, run):
        """After a start no secret is known yet."""
        one, gate = run(), HashGate(1)
        gate.blocking = one.server.blocking

        def app(environ, start_response):
            if environ["PATH_INFO"].startswith("/client"):
                with gate.slot(environ["PATH_INFO"]), gate.hashing():
                    time.sleep(0.02)
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(10)) for _ in range(150)]
            for number, sock in enumerate(socks):
                sock.sendall(b"GET /client%d HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n" % number)
            for _ in range(40):
                assert b" 200 " in one.get(b"/health")
            assert gate.in_use, "most are still to be hashed"
            assert [statuses(read_all(sock)) for sock in socks] == [[200]] * 150

    def test_what_takes_long_without_saying_so_does_not_hold_up_the_others(self, run):
        """Two that compute, and the one thread that takes requests is not theirs."""
        one = run(threads=4, max_threads=4)
        leave, inside = threading.Event(), threading.Semaphore(0)

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/long":
                inside.release()
                leave.wait(60)
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        one.server.wsgi_app = app
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(20)) for _ in range(2)]
            for sock in socks:
                sock.sendall(b"GET /long HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
                assert inside.acquire(timeout=60)
            for _ in range(10):
                assert b" 200 " in one.get()
            leave.set()
            assert [status for sock in socks for status in statuses(read_all(sock))] == [200, 200]

    def test_one_that_guesses_leaves_threads_to_the_others(self, run):
        one = run(threads=2, max_threads=50)
        said = self.crowd(one, self.make_app(one, False))
        assert said.count(200) + said.count(429) == 100 and said.count(429) >= 50


class TestStopping:
    def test_what_has_begun_to_arrive_is_answered(self, run):
        one = run()
        with one.connect() as sock:
            sock.sendall(b"GET /late HTTP/1.1\r\nHost: b")
            stopped = []
            stopping = threading.Thread(target=lambda: stopped.append(one.server.stop(3)))
            stopping.start()
            time.sleep(0.8)
            sock.sendall(b"ox\r\n\r\n")
            said = read_all(sock)
        stopping.join()
        assert statuses(said) == [200] and b"Connection: close" in said and stopped == [True]

    def test_what_follows_the_last_answer_is_neither_worked_on_nor_answered_by_a_reset(self, run, monkeypatch):
        """RFC 9112 §9.6. A client that pipelines may send long after its last answer, and lose it by a reset."""
        monkeypatch.setattr(wire, "LINGER", 60)
        one, called, more = run(), [], b"POST /more HTTP/1.1\r\nHost: box\r\nContent-Length: 0\r\n\r\n" * 100
        app = one.server.wsgi_app
        one.server.wsgi_app = lambda environ, start: called.append(environ["PATH_INFO"]) or app(environ, start)
        stopping = threading.Thread(target=one.server.stop, args=(60,))
        with one.connect(20) as sock:
            sock.sendall(b"GET /last HTTP/1.1\r\nHost: b")
            time.sleep(0.1)
            stopping.start()
            while not one.server.draining:
                time.sleep(0.01)
            sock.sendall(b"ox\r\n\r\n" + more * 10)
            while time.monotonic() < one.server.draining + 2 * SWEEP:
                time.sleep(0.1)
                sock.sendall(more)  # raises once it is reset
            said = read_all(sock)
        stopping.join(20)
        assert statuses(said) == [200] and called == ["/last"] and not stopping.is_alive()

    def test_a_request_that_never_ends_does_not_hold_the_stop_up(self, run):
        one, stopped = run(limits=Limits(request_seconds=3600)), []
        with one.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n")
            time.sleep(0.1)
            stopping = threading.Thread(target=lambda: stopped.append(one.server.stop(0.5)), daemon=True)
            stopping.start()
            stopping.join(30)
            assert stopped == [False]

    def test_what_is_in_flight_is_answered(self, run):
        one = run()
        with one.connect() as busy, one.connect() as idle:
            busy.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\n\r\n")
            idle.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert b" 200 " in idle.recv(65536)
            time.sleep(0.1)
            threading.Timer(0.3, one.app.go.set).start()
            assert one.server.stop(3) is True
            said = read_all(busy)
            assert b" 200 " in said and b"Connection: close" in said and read_all(idle) == b""
        with pytest.raises(OSError), one.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            assert sock.recv(1)
            raise OSError


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    from test_flows import make_certificate

    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, b"phrase")
    key = serialization.load_pem_private_key((folder / "box.pem").read_bytes(), None)
    sealed = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"phrase")
    )
    (folder / "key.pem").write_bytes(sealed)
    (folder / "sealed.pem").write_bytes(sealed + (folder / "ca.pem").read_bytes())
    (folder / "noise").write_bytes(bytes(range(256)))
    (folder / "other.pem").write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder


class TestTls:
    def client(self, certificate):
        return ssl.create_default_context(cafile=str(certificate / "ca.pem"))

    @pytest.mark.parametrize("name, password", [("box.pem", None), ("box.p12", "phrase")])
    def test_both_kinds_of_file(self, run, certificate, name, password):
        one = run(tls=tls_context(str(certificate / name), "", password or ""))
        with self.client(certificate).wrap_socket(one.connect(), server_hostname="localhost") as sock:
            for _ in range(3):
                sock.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n" + b"y" * 20000)
                said = b""
                while said.count(b"y") < 20000:
                    said += sock.recv(65536)
                assert b'"scheme": "https"' in said

    @pytest.mark.parametrize("name, key", [("sealed.pem", None), ("ca.pem", "key.pem")])
    def test_a_pem_key_may_have_a_passphrase(self, certificate, name, key):
        assert (
            tls_context(str(certificate / name), str(certificate / key) if key else "", "phrase").minimum_version
            == ssl.TLSVersion.TLSv1_2
        )

    @pytest.mark.parametrize(
        "name, key, password, why",
        [
            ("box.p12", None, "wrong", "passphrase"), ("box.p12", None, None, "passphrase"),
            ("sealed.pem", None, "wrong", "passphrase"), ("sealed.pem", None, None, "passphrase"),
            ("ca.pem", "key.pem", "wrong", "passphrase"), ("ca.pem", "key.pem", None, "passphrase"),
            ("missing.pem", None, None, "cannot be read"), ("ca.pem", "missing.pem", None, "cannot be read"),
            ("ca.pem", None, None, "no private key"), ("ca.pem", "other.pem", None, "does not belong"),
            ("noise", None, None, "neither PEM nor PKCS#12"),
        ],
    )
    def test_what_does_not_open_is_a_sentence(self, certificate, name, key, password, why):
        with pytest.raises(ValueError) as caught:
            tls_context(str(certificate / name), str(certificate / key) if key else "", password or "")
        assert why in str(caught.value) and "\n" not in str(caught.value) and str(certificate) in str(caught.value)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_what_is_sent_octet_by_octet_or_with_a_request_behind_it_is_read_whole(self, run, certificate, version):
        one = run(tls=tls_context(str(certificate / "box.pem")))
        context = self.client(certificate)
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(one.connect(), server_hostname="localhost") as sock:
            for octet in b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello":
                sock.sendall(bytes([octet]))
            sock.sendall(
                b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3
                + b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            assert statuses(read_all(sock)) == [200] * 5

    def test_a_refusal_is_told_over_tls(self, run, certificate):
        one = run(tls=tls_context(str(certificate / "box.pem")))
        with self.client(certificate).wrap_socket(one.connect(), server_hostname="localhost") as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + SMUGGLED)
            said = read_all(sock)
        assert statuses(said) == [400] and fields_of(security_headers(scheme="https")) in said

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tls_1_1_is_not_spoken(self, run, certificate):
        one = run(tls=tls_context(str(certificate / "box.pem")))
        context = self.client(certificate)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with one.connect() as sock, pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(sock, server_hostname="localhost")
        one.await_log()
        assert [fields["reason"] for _, fields in one.logged] == ["TLS handshake: UNSUPPORTED_PROTOCOL"]

    def test_handshakes_that_never_end_hold_nobody_up(self, run, certificate):
        one = run(tls=tls_context(str(certificate / "box.pem")), limits=Limits(handshake_seconds=1))
        with contextlib.ExitStack() as stack:
            stuck = [stack.enter_context(one.connect()) for _ in range(200)]
            for sock in stuck[:100]:
                sock.sendall(b"\x16\x03\x01")
            with self.client(certificate).wrap_socket(one.connect(), server_hostname="localhost") as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert b" 200 " in read_all(sock)
            for sock in stuck:
                sock.settimeout(4)
                assert sock.recv(1) == b"", "closed by its deadline"

    def test_plain_http_on_the_tls_port_is_refused(self, run, certificate):
        assert b" 200 " not in run(tls=tls_context(str(certificate / "box.pem"))).get()

    def test_a_handshake_that_drips_is_closed_by_its_deadline(self, run, certificate):
        one = run(tls=tls_context(str(certificate / "box.pem")), limits=Limits(handshake_seconds=0.6))
        with one.connect() as sock:
            sock.sendall(bytes.fromhex("1603010200010001fc0303"))
            end = time.monotonic() + PATIENCE
            with pytest.raises(OSError):
                while time.monotonic() < end:
                    sock.sendall(b"\0")
                    time.sleep(0.1)

    def test_one_that_has_shaken_hands_and_says_nothing_is_closed(self, run, certificate):
        one = run(tls=tls_context(str(certificate / "box.pem")), limits=Limits(idle_seconds=0.4))
        with self.client(certificate).wrap_socket(one.connect(), server_hostname="localhost") as sock:
            sock.settimeout(PATIENCE)
            assert sock.recv(1) == b""


class TestConnections:
    """How many connections there may be, and how many threads."""


    def test_where_many_are_connected_the_idle_go_sooner(self, run):
        one = run(limits=Limits(connections=8, idle_seconds=5))
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(one.connect(4)) for _ in range(5)]
            assert read_all(socks[0]) == b"", "the client would wait for four seconds, and an idle connection has five"

    def test_no_more_threads_than_allowed(self, run):
        one = run(threads=2, max_threads=4)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(one.connect()) for _ in range(12)]
            for sock in waiting:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.4)
            assert len(one.server.requests._threads) <= 4
            one.app.go.set()
            assert all(statuses(read_all(sock)) == [200] for sock in waiting)

    def test_without_more_threads_those_that_are_go_on(self, run, monkeypatch):
        one = run(threads=2, max_threads=8)
        real = threading.Thread.start
        monkeypatch.setattr(
            threading.Thread, "start",
            lambda self: (
                (_ for _ in ()).throw(RuntimeError("can't start new thread"))
                if self.name.startswith("auth")
                else real(self)
            ),
        )
        with one.connect() as waiting:
            waiting.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.2)
            assert b" 200 " in one.get()
            one.app.go.set()
            assert statuses(read_all(waiting)) == [200]


ADDRESSES = ("127.0.0.1", "0.0.0.0", "::1", "::")  # noqa: S104 - what may overlap


def bind_result(action):
    """What binding gives: "bound", or the name of the error."""
    try:
        sockets = action()
    except OSError as error:
        return errno.errorcode[error.errno]
    for sock in sockets if isinstance(sockets, list) else [sockets]:
        sock.close()
    return "bound"


class TestOnePortForOneBox:
    """socket(7): SO_REUSEPORT lets every socket of one user in, whoever made it."""

    @pytest.fixture
    def port(self):
        from box import free_port

        return free_port()

    @pytest.mark.parametrize("second", ADDRESSES)
    @pytest.mark.parametrize("first", ADDRESSES)
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_second_box_is_refused_where_the_addresses_overlap(self, port, first, second, count):
        held = listen_shared(first, port, 2)
        disjoint = {first, second} in ({"127.0.0.1", "::1"}, {"0.0.0.0", "::1"})  # noqa: S104 - ::1 is IPv6 alone
        expected = "bound" if disjoint else "EADDRINUSE"
        try:
            assert bind_result(lambda: listen_shared(second, port, count)) == expected
            assert bind_result(lambda: listen(second, port)) == expected
        finally:
            for sock in held:
                sock.close()
        assert bind_result(lambda: listen_shared(second, port, count)) == "bound"

    def test_each_of_the_sharers_gets_connections_and_the_guard_gets_none(self, port):
        held, clients, served = listen_shared("127.0.0.1", port, 3), [], set()
        for _ in range(200):
            clients.append(socket.create_connection(("127.0.0.1", port)))
            ready = select.select(held, [], [], 5)[0]
            clients.append(ready[0].accept()[0])
            served.add(held.index(ready[0]))
        assert served == {0, 1, 2}
        for sock in reversed(clients):  # the servers' side first, so that the port is full of TIME_WAIT
            sock.close()
        for sock in held:
            sock.close()
        assert bind_result(lambda: listen_shared("127.0.0.1", port, 3)) == "bound"

    def test_of_two_that_start_at_once_at_most_one_gets_the_port(self, port):
        won = 0
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for _ in range(100):
                barrier = threading.Barrier(2)

                def start(barrier=barrier):
                    barrier.wait()
                    try:
                        return listen_shared("127.0.0.1", port, 2)
                    except OSError:
                        return []

                results = [future.result() for future in [pool.submit(start), pool.submit(start)]]
                won += sum(map(bool, results))
                assert sum(map(bool, results)) <= 1
                for sock in sum(results, []):
                    sock.close()
        assert won > 50

    def test_a_port_whose_workers_cannot_start_is_not_taken_by_another_box(self, port):
        held = listen_shared("127.0.0.1", port, 2)
        for _ in range(2):
            for sock in held:
                pause_listening(sock)
                pause_listening(sock)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            assert bind_result(lambda: listen_shared("127.0.0.1", port, 2)) == "EADDRINUSE"
            for sock in held:
                resume_listening(sock)
            with socket.create_connection(("127.0.0.1", port)):
                ready = select.select(held, [], [], 5)[0][0]
                ready.setblocking(True)
                ready.accept()[0].close()
        for sock in held:
            sock.close()

    def test_who_listens_is_named(self, port):
        assert find_listener(port) == 0
        for ip in ("127.0.0.1", "::1"):
            with listen(ip, port):
                assert find_listener(port) == os.getpid()


class TestUnixSocket:
    """unix(7)"""

    def test_the_kernel_says_who_the_peer_is_and_the_rest_is_as_on_tcp(self, run, tmp_path):
        uid = os.geteuid()
        one = run(folder=tmp_path, users={uid}, limits=Limits(connections_per_peer=1))
        seen = one.seen(b"/x", b"X-Real: 1\r\n")
        assert (seen["peer"], seen["uid"], seen["proxied"], seen["scheme"]) == (f"unix:uid={uid}", uid, False, "http")
        assert statuses(one.say(b"GET / HTTP/1.1\r\n\r\n")) == [400]
        assert ("refused", f"unix:uid={uid}") == (one.logged[-1][0], one.logged[-1][1]["peer"])
        with one.connect(), one.connect():
            assert one.seen()["uid"] == uid

    def test_on_tcp_nobody_is_named(self, shared):
        assert shared.seen(headers=b"Microauthd-Uid: 0\r\nmicroauthd.uid: 0\r\n")["uid"] is None

    @pytest.mark.parametrize(
        "field", ["Forwarded", "X-Forwarded-For", "x-forwarded-host", "X-Original-Forwarded-For", "Via", "X-Real-IP"]
    )
    def test_a_peer_that_speaks_for_others_shows_it(self, run, tmp_path, field):
        one = run(folder=tmp_path, users={os.geteuid()})
        assert one.seen(headers=field.encode() + b": 192.0.2.1\r\n")["proxied"] is True

    def test_a_user_that_is_not_served_is_told_before_it_is_read(self, run, tmp_path):
        one = run(folder=tmp_path, users={os.geteuid() + 1})
        said = one.say(b"G", end=False)
        assert statuses(said) == [421] and b"misdirected_request" in said
        assert one.logged[-1][1]["peer"] == f"unix:uid={os.geteuid()}"
        with one.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert statuses(read_all(sock)) == [421]

    def test_nobody_else_may_connect(self, tmp_path):
        for mode in (0o600, 0o666):
            before = os.umask(0o777)
            try:
                sock = listen_at_machine(tmp_path, "admin.sock", mode)
            finally:
                os.umask(before)
            assert stat.S_IMODE(os.lstat(tmp_path / "admin.sock").st_mode) == mode
            sock.close()

    def test_what_a_killed_server_left_is_replaced_and_what_listens_is_not(self, tmp_path):
        listen_at_machine(tmp_path, "admin.sock").close()
        second = listen_at_machine(tmp_path, "admin.sock")
        with pytest.raises(OSError) as caught:
            listen_at_machine(tmp_path, "admin.sock")
        assert caught.value.errno == errno.EADDRINUSE
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/admin.sock")
            assert peer_user(client) == os.geteuid()
        second.close()

    def test_a_listener_whose_queue_is_full_listens(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as full:
            full.bind(f"{tmp_path}/admin.sock")
            full.listen(0)
            with contextlib.ExitStack() as stack:
                for _ in range(3):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect_ex(f"{tmp_path}/admin.sock")
                with pytest.raises(OSError) as caught:
                    listen_at_machine(tmp_path, "admin.sock")
        assert caught.value.errno == errno.EADDRINUSE

    @pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/etc/passwd")])
    def test_a_file_that_is_no_socket_stays(self, tmp_path, make):
        make(tmp_path / "admin.sock")
        with pytest.raises(FileExistsError):
            listen_at_machine(tmp_path, "admin.sock")
        assert os.path.lexists(tmp_path / "admin.sock")

    def test_a_folder_with_a_long_name_has_one_too(self, run, tmp_path):
        folder = tmp_path / ("long" * 40)
        folder.mkdir()
        listen_at_machine(folder, "admin.sock").close()
        listen_at_machine(folder, "admin.sock").close()
        assert stat.S_ISSOCK(os.lstat(folder / "admin.sock").st_mode)
