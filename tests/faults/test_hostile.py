"""Slow and hostile clients: the others notice nothing, memory is bounded, ADMIN goes on."""

import contextlib
import itertools
import os
import resource
import secrets
import socket
import ssl
import time
import zlib
from base64 import urlsafe_b64encode
from urllib.parse import quote

import pytest
from box import Box
from crowd import (
    ELSEWHERE, HERE, Administrator, Crowd, Memory, Service, await_true, basic, descriptors, many_descriptors, request,
)
from test_flows import make_certificate

LONG = pytest.mark.long
SECONDS = [0.6, pytest.param(30, marks=LONG)]
# Behind a proxy that is not in trusted-proxies, and on the box itself, everybody has one address: what is promised there is the same.
SOURCES = pytest.mark.parametrize("sources", [ELSEWHERE, HERE], ids=["elsewhere", "one address"])
HASHERS = 3 * max(1, len(os.sched_getaffinity(0)) // 2)  # of two workers and ADMIN, two lanes each
CALM = 115_000  # KiB for all processes together: nobody hashes
ROOM = CALM + 32_768 * HASHERS


def start(box):
    """Start a box as systemd and most shells do: 1,024 descriptors, and leave to take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        return box.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        many_descriptors()


def full_cost(box):
    """The default Argon2 cost instead of that of the tests."""
    box.environ = {name: value for name, value in box.environ.items() if not name.startswith("MAD_ARGON2ID")}
    return box


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        box = full_cost(Box(tmp_path_factory.mktemp("hostile") / "data", workers="2"))
        stack.callback(box.__exit__)
        start(box.set_up())
        warm(box)
        yield box
        assert "Traceback" not in box.said()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A box that speaks TLS on both ports."""
    folder = tmp_path_factory.mktemp("sealed")
    make_certificate(folder, b"phrase")
    box = Box(
        folder / "data", workers="2", **{f"{port}_ssl_cert_file": folder / "box.pem" for port in ("auth", "admin")}
    )
    box.tls = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with contextlib.ExitStack() as stack:
        stack.callback(box.__exit__)
        start(box.set_up())
        warm(box)
        yield box
        assert "Traceback" not in box.said()


def warm(box):
    """Let every worker know the secret of the client, as it does while the client is used."""
    for _ in range(24):
        assert box.token().status == 200


@contextlib.contextmanager
def unharmed(box, seconds, room=CALM):
    """Whatever goes on inside: patrons are answered in time, memory is bounded, and afterwards the box is as before.

    How fast they are answered is measured by the long run, with nothing beside it.
    """
    began = [descriptors(pid) for pid in box.pids()]
    patrons = [Service(box, pause=0.005), Service(box, fresh=True, pause=0.005), Administrator(box)]
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(Memory(box))
        for patron in patrons:
            stack.enter_context(patron)
        yield
        await_true(
            lambda: all(len(patron.times) >= least for patron, least in zip(patrons, (10, 10, 1))), 60,
            "somebody is not served any more",
        )
    for patron in patrons:
        assert not patron.bad, (type(patron).__name__, len(patron.bad), len(patron.times), patron.bad[:3])
    for patron in patrons[:2]:
        assert patron.p99() < (1 if seconds > 20 else 10), (patron.fresh, patron.p99())
    assert max(patrons[2].times) < (5 if seconds > 20 else 15), "ADMIN is held up"
    assert memory.most < room, f"{memory.most} KiB"
    # Nothing is kept of a crowd that has gone. SQLite keeps what a thread that has ended had open until another needs it.
    slack = 24 if room == CALM else 100
    await_true(
        lambda: all(descriptors(pid) <= before + slack for pid, before in zip(box.pids(), began)), 30,
        (began, [descriptors(pid) for pid in box.pids()]),
    )


class TestSlowClients:
    HALVES = [
        b"", b"G", b"POST /token HTTP/1.1\r\nHost: b",
        b"POST /token HTTP/1.1\r\nHost: box\r\nContent-Length: 30000\r\n\r\ngrant_type=",
        b"POST /token HTTP/1.1\r\nHost: box\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ngr",
    ]

    @SOURCES
    @pytest.mark.parametrize("port", ["auth_port", "admin_port"])
    @pytest.mark.parametrize("seconds", SECONDS)
    def test_2000_half_sent_requests(self, box, sources, port, seconds):
        with unharmed(box, seconds), Crowd(getattr(box, port), sources) as crowd:
            for half in self.HALVES:
                crowd.hold(400, half)
            assert crowd.living() == 2000, "who turns these away turns others away, too"
            time.sleep(seconds)

    @SOURCES
    @pytest.mark.parametrize("seconds", SECONDS)
    def test_a_byte_a_second(self, box, sources, seconds):
        """Those that say something all the time have no more time than those that say nothing."""
        with unharmed(box, seconds), Crowd(box.auth_port, sources) as crowd:
            crowd.hold(300, b"POST /token HTTP/1.1\r\nHost: box\r\nContent-Length: 60000\r\n\r\n")
            crowd.hold(300, b"GET /ping HTTP/1.1\r\nHost: box\r\nX: ")
            crowd.drip(b"x=1&", min(1, seconds / 3))
            time.sleep(seconds)
            if seconds > 20:
                assert crowd.living() == 0, "a request has 15 seconds, whatever it says"


class TestPipelining:
    """A box answers each of several requests that come together. RFC 9112 §9.3.2"""

    def test_a_request_behind_content_is_answered_wherever_it_is_cut(self, box):
        token = request("POST", "/token", "grant_type=client_credentials", Authorization=basic(box.client))
        octets = token + request("GET", "/ping") + token + request("GET", "/ping", Connection="close")
        for each in (len(octets), 1, *range(60, len(octets), 61)):
            with socket.create_connection(("127.0.0.1", box.auth_port), 5) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(octets), each):
                    sock.sendall(octets[start:start + each])
                said = b""
                while more := sock.recv(65536):
                    said += more
            assert said.count(b"HTTP/1.1 200 ") == 4 and said.count(b'"access_token"') == 2, (each, said)


def segment(content):
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def jwt(header, payload=b"{}"):
    return ".".join(map(segment, (header, payload, b"x" * 64)))


NESTED = b"[" * 100_000
DEEP = b"[" * 20_000  # as much as fits
JSON = "application/json"
P2C = b'{"alg":"PBES2-HS512+A256KW","enc":"A256GCM","p2c":2147483647,"p2s":"c2FsdA"}'
NONE = (
    jwt(b'{"alg":"none","typ":"at+jwt"}', b'{"sub":"root","exp":9999999999,"iss":"http://127.0.0.1"}').rpartition(".")[
        0
    ]
    + "."
)
CODE = (
    "client_id=app&redirect_uri=http%3A%2F%2Flocalhost%2Fcb&response_type=code&scope=openid&code_challenge="
    + "a" * 43
    + "&code_challenge_method=S256&"
)


def bombs_of(client):
    """name: (what is sent, what may be answered). No answer at all is never one of them, nor is any 5xx."""
    own = f"client_id={client[0]}&client_secret={client[1]}&"
    assertion = "grant_type=client_credentials&client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_assertion="
    return {
        "a gigabyte announced and sent": (
            request("POST", "/token").replace(b"Content-Length: 0", b"Content-Length: 1000000000") + bytes(4_000_000),
            {413},
        ),
        "chunks without end": (
            request("POST", "/token").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 200, {413},
        ),
        "chunks of one octet": (
            request("POST", "/token").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + b"1\r\nx\r\n" * 200_000, {413},
        ),
        "chunk extensions without end": (
            request("POST", "/token").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + (b"1;" + b"a" * 4000 + b"\r\nx\r\n") * 1000, {413},
        ),
        "a thousand header fields": (
            b"GET /ping HTTP/1.1\r\nHost: box\r\n"
            + b"".join(b"X-%d: y\r\n" % number for number in range(1000))
            + b"\r\n", {431},
        ),
        "a header line without end": (b"GET /ping HTTP/1.1\r\nHost: box\r\nX: " + b"y" * 4_000_000, {431}),
        "a header name without end": (b"GET /ping HTTP/1.1\r\nHost: box\r\n" + b"y" * 4_000_000, {431}),
        "a request line without end": (b"GET /" + b"y" * 4_000_000, {414, 431}),
        "cookies to the brim": (
            b"GET /account HTTP/1.1\r\nHost: box\r\n"
            + b"Cookie: a=b; a=b; a=b; a=b; a=b; a=b; a=b; a=b; a=b; a=b; a=b; a=b\r\n" * 60
            + b"\r\n", {200, 302, 303, 400, 404},
        ),
        "gzip": (
            request("POST", "/token", zlib.compress(bytes(50_000_000), wbits=31)[:60_000], Content_Encoding="gzip"),
            {400, 415},
        ),
        "nested JSON": (request("POST", "/token", NESTED, content_type=JSON), {413}),
        "nested JSON that fits": (request("POST", "/token", DEEP, content_type=JSON), {401}),
        "nested JSON in a parameter": (
            request("POST", "/authorize", CODE + "claims=" + quote(DEEP.decode())[:60_000]), {400, 413},
        ),
        "nested objects in a parameter": (request("POST", "/authorize", CODE + "claims=" + '{"a":' * 12_000), {400}),
        "a form of 100,000 fields": (request("POST", "/token", "a=&" * 100_000), {413}),
        "a form of as many fields as fit": (
            request("POST", "/token", own + "&".join(f"a{number}" for number in range(10_000))[:60_000]), {400},
        ),
        "a form of nothing but separators": (request("POST", "/token", "&" * 65_000), {400, 401}),
        "a form of percents": (request("POST", "/token", "%" * 65_000), {400, 401}),
        "a parameter that fills the body": (
            request("POST", "/token", own + "grant_type=refresh_token&refresh_token=" + "x" * 65_000), {400},
        ),
        "a secret that fills the body": (
            request("POST", "/token", "grant_type=client_credentials&client_id=nobody&client_secret=" + "x" * 65_000),
            {400, 401, 429},
        ),
        "a scope of ten thousand": (
            request(
                "POST", "/token",
                own + "grant_type=client_credentials&scope=" + "+".join(f"s{number}" for number in range(8_000)),
            ),
            {400},
        ),
        "a huge header in an assertion": (
            request("POST", "/token", assertion + jwt(b'{"alg":"ES256","x":"' + b"y" * 45_000 + b'"}')), {400, 401},
        ),
        "a nested header in an assertion": (request("POST", "/token", assertion + jwt(DEEP)), {400, 401}),
        "a huge header in a hint": (
            request(
                "POST", "/authorize", CODE + "id_token_hint=" + jwt(b'{"alg":"RS256","x":"' + b"y" * 40_000 + b'"}')
            ),
            {200},  # a hint that cannot be verified is none
        ),
        "a nested header in a hint": (request("POST", "/authorize", CODE + "id_token_hint=" + jwt(DEEP)), {200}),
        "a nested hint at logout": (
            request("POST", "/end-session", "id_token_hint=" + jwt(b'{"alg":"RS256","kid":"x"}', DEEP)), {303},
        ),
        "a huge bearer": (
            b"GET /me HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer "
            + jwt(b'{"alg":"ES256","x":"' + b"y" * 11_000 + b'"}').encode()
            + b"\r\n\r\n", {401, 431},
        ),
        "a nested bearer": (
            b"GET /me HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer " + jwt(b"[" * 11_000).encode() + b"\r\n\r\n",
            {401},
        ),
        "a bearer of dots": (
            b"GET /me HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer " + b"." * 15_000 + b"\r\n\r\n", {400, 401},
        ),
        "a bearer without a signature": (
            f"GET /me HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {NONE}\r\n\r\n".encode(), {401},
        ),
        "a JWE of two thousand million rounds": (
            f"GET /me HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {jwt(P2C)}.{segment(b'iv')}.{segment(b'tag')}\r\n\r\n".encode(),
            {401},
        ),
        "the same JWE as a token": (
            request("POST", "/introspect", own + f"token={jwt(P2C)}.{segment(b'iv')}.{segment(b'tag')}"), {200},
        ),
        "the same JWE as an assertion": (
            request("POST", "/token", f"{assertion}{jwt(P2C)}.{segment(b'iv')}.{segment(b'tag')}"), {400, 401},
        ),
        "a nested token": (request("POST", "/introspect", own + "token=" + jwt(DEEP)), {200}),
        "a nested token to revoke": (request("POST", "/revoke", own + "token=" + jwt(b'{"alg":"ES256"}', DEEP)), {200}),
        "Basic that is all colons": (
            request(
                "POST", "/token", "grant_type=client_credentials",
                Authorization="Basic " + urlsafe_b64encode(b":" * 9_000).decode(),
            ),
            {400, 401, 429},
        ),
        "a long name": (
            request("POST", "/token", own + "grant_type=password&username=" + "ﬃ" * 5_000 + "&password=x"),
            {400, 403, 429},
        ),
        "a name of combining marks": (
            request(
                "POST", "/token",
                own + "grant_type=password&password=x&username=a" + quote("\u0301\u0323" * 5_000)[:60_000],
            ),
            {400, 403, 429},
        ),
    }


@pytest.fixture(scope="module")
def bombs(box):
    answer = box.admin(
        "POST", "/clients/app/redirect-uris", json_body={"uri": "http://localhost/cb"}, bearer=box.admin_token()
    )
    assert answer.status == 201, answer
    return bombs_of(box.client)


class TestBombs:
    def worked(self, box):
        """CPU seconds of all processes so far."""
        return sum(
            sum(map(int, open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[11:13])) for pid in box.pids()
        ) / os.sysconf("SC_CLK_TCK")

    def test_each_is_refused_and_costs_nothing(self, box, bombs):
        wrong, bearer = [], box.admin_token()
        kinds = [
            (box.auth_port, bombs),
            (
                box.admin_port,
                {
                    "nested JSON": (
                        request("POST", "/users", DEEP, content_type=JSON, Authorization="Bearer " + bearer), {400},
                    ),
                    "nested objects": (
                        request(
                            "POST", "/users", '{"username":' * 5_000, content_type=JSON,
                            Authorization="Bearer " + bearer,
                        ),
                        {400},
                    ),
                    "a thousand JSON arrays too many": (
                        request("POST", "/users", NESTED, content_type=JSON, Authorization="Bearer " + bearer), {413},
                    ),
                    "a number of digits": (
                        request(
                            "PUT", "/users/x", '{"username":' + "9" * 60_000 + "}", content_type=JSON,
                            Authorization="Bearer " + bearer,
                        ),
                        {400, 404},
                    ),
                    "a query to the brim": (
                        request("GET", "/users?limit=" + "9" * 7_000, Authorization="Bearer " + bearer), {400},
                    ),
                },
            ),
        ]
        for port, kind in kinds:
            crowd = Crowd(port, ELSEWHERE)
            for name, (octets, allowed) in kind.items():
                before = self.worked(box)
                answer, work = crowd.send(octets), self.worked(box) - before
                if answer not in allowed or work > 0.5:
                    wrong.append((name, answer, work))
        assert not wrong, wrong

    @SOURCES
    @pytest.mark.parametrize("seconds", SECONDS)
    def test_all_of_them_at_once(self, box, bombs, sources, seconds):
        with unharmed(box, seconds, room=ROOM), Crowd(box.auth_port, sources) as crowd:
            crowd.keep_sending(itertools.cycle(octets for octets, _ in bombs.values()), threads=4)
            time.sleep(seconds)
            await_true(lambda: len(crowd.answers) > 30, 60, "they are not answered")
        assert None not in crowd.answers and max(crowd.answers) < 500, (
            len(crowd.answers), set(crowd.answers),
        )
        assert not crowd.lost, crowd.lost[:3]


class TestTls:
    HELLO = bytes.fromhex("160301020001 0001fc0303")  # the first octets of a ClientHello of half a kilobyte

    @SOURCES
    @pytest.mark.parametrize("seconds", SECONDS)
    def test_200_handshakes_that_never_end(self, sealed, sources, seconds):
        with unharmed(sealed, seconds), Crowd(sealed.auth_port, sources) as crowd:
            crowd.hold(50, b"")
            crowd.hold(50, b"\x16")
            crowd.hold(50, self.HELLO)
            crowd.hold(50, self.whole_hello())  # the server has signed, and waits for the rest
            assert crowd.living() == 200
            crowd.drip(b"\0", min(1, seconds / 3))
            time.sleep(seconds)
            if seconds > 20:
                assert crowd.living() == 0, "a handshake has ten seconds"

    def whole_hello(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
        return outgoing.read()

    @pytest.mark.parametrize("seconds", SECONDS)
    def test_handshakes_and_noise_again_and_again(self, sealed, seconds):
        """What costs the server most: a signature each."""
        requests = [
            self.whole_hello(), b"\x16\x03\x01\x00\x02\x01\x00", b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            bytes(5000), self.HELLO + bytes(600),
        ]
        with unharmed(sealed, seconds), Crowd(sealed.auth_port, ELSEWHERE) as crowd:

            def run():
                for octets in itertools.cycle(requests):
                    if crowd.ending.wait(0.002):
                        break
                    with contextlib.suppress(OSError), crowd.connect() as sock:
                        sock.sendall(octets)

            for _ in range(2):
                crowd.go(run)
            time.sleep(seconds)


def wrong_secrets(client_ids):
    for client_id in client_ids:
        yield request(
            "POST", "/token", "grant_type=client_credentials",
            Authorization=basic((client_id, secrets.token_urlsafe(24))),
        )


def names():
    while True:
        yield "x" + secrets.token_hex(6)


class TestGuesses:
    """400 a second, at the default cost of a hash; who is guessing may have the address of the patrons."""

    @pytest.mark.parametrize("which, sources, seconds", [
        ("one client", HERE, 1),
        pytest.param("one client", HERE, 30, marks=LONG), pytest.param("any client", ELSEWHERE, 30, marks=LONG),
        pytest.param("one client", ELSEWHERE, 30, marks=LONG), pytest.param("any client", HERE, 30, marks=LONG),
    ])
    def test_400_wrong_secrets_a_second(self, box, which, sources, seconds):
        # Another client, whose secret no worker remembers yet.
        new = ("late" + secrets.token_hex(3), "a secret of a late client")
        made = box.admin(
            "POST", "/clients",
            json_body={"client_id": new[0], "client_secret": new[1], "grant_types": ["client_credentials"]},
            bearer=box.admin_token(),
        )
        assert made.status == 200, made
        warm(box)
        with unharmed(box, seconds, room=ROOM), Crowd(box.auth_port, sources) as crowd:
            # More than is hashed in a second: those who come new stand in line with them, those who are known do not.
            crowd.fire(wrong_secrets(itertools.repeat(box.client[0]) if which == "one client" else names()), 400)
            time.sleep(seconds / 2)
            if which == "one client" or sources is ELSEWHERE:
                self.gets_in(
                    box, new, 8 if seconds > 20 else 60
                )  # else nothing tells it from those who guess: it may have to come again for long
            time.sleep(seconds / 2)
            await_true(lambda: crowd.sent > 200 * seconds, 60 if seconds < 20 else 0, "this machine sends too few")
        assert set(crowd.answers) <= {401, 429}, set(crowd.answers)
        assert not crowd.lost, crowd.lost[:3]

    def gets_in(self, box, client, seconds):
        """A client does what it is told: comes again after Retry-After."""
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            answer = box.auth("/token", {"grant_type": "client_credentials"}, client=client)
            if answer.status == 200:
                return tries
            assert answer.status == 429, answer
            assert time.monotonic() - began < seconds, f"kept out, {tries} times"
            time.sleep(int(answer.headers["Retry-After"]))

    @pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=LONG)])
    def test_64_logins_at_a_time_hash_a_few_at_a_time(self, box, seconds):
        """Each of them asks for 32 MB."""
        requests = (
            request(
                "POST", "/token", f"grant_type=password&username={name}&password=x", Authorization=basic(box.client)
            )
            for name in names()
        )
        with unharmed(box, seconds, room=ROOM), Crowd(box.auth_port, ELSEWHERE) as crowd:
            crowd.keep_sending(requests, threads=64)
            time.sleep(seconds)
            await_true(lambda: 403 in crowd.answers, 60, "no login is answered")
        assert set(crowd.answers) <= {403, 429} and 403 in crowd.answers, set(crowd.answers)
        assert not crowd.lost, crowd.lost[:3]
