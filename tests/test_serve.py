"""The connection loop, over raw sockets. RFC 9112, RFC 9110."""

import contextlib
import ipaddress
import json
import re
import resource
import socket
import ssl
import threading
import time

import microauthd as m
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
            with environ["microauthd.server_object"].blocking() if "microauthd.server_object" in environ else self.server.blocking():
                self.go.wait(10)
        body = b"x" * 3_000_000 if path == "/big" else json.dumps({
            "method": environ["REQUEST_METHOD"], "path": path, "query": environ["QUERY_STRING"], "body": environ["wsgi.input"].read().decode("latin-1"),
            "peer": environ["microauthd.peer"], "scheme": environ["wsgi.url_scheme"],
            "headers": {name: value for name, value in environ.items() if name.startswith("HTTP_")},
        }).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


class Running:
    def __init__(self, **more):
        self.app, self.logged = App(), []
        sock = m.listen("127.0.0.1", 0)
        self.address = sock.getsockname()
        self.server = m.Server("auth", [sock], self.app, log=lambda event, **fields: self.logged.append((event, fields)), **more)
        self.app.server = self.server
        self.server.start()

    def connect(self, timeout=5):
        return socket.create_connection(self.address, timeout=timeout)

    def say(self, *pieces, timeout=5):
        """Send octets, read until the server closes or is silent; what it said."""
        with self.connect(timeout) as sock:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def get(self, path=b"/", headers=b""):
        return self.say(b"GET " + path + b" HTTP/1.1\r\n" + HOST + headers + b"Connection: close\r\n\r\n")

    def seen(self, path=b"/", headers=b""):
        return json.loads(self.get(path, headers).partition(b"\r\n\r\n")[2])


def read_all(sock):
    said = b""
    with contextlib.suppress(OSError):
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
def shared():
    one = Running()
    yield one
    one.server.stop(1)


def post(*headers, body=b"", version=b"1.1"):
    return b"POST / HTTP/" + version + b"\r\n" + HOST + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


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
    "both framings": (400, post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "another coding": (None, post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n")),
    "a coding before chunked": (None, post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    "chunked twice": (400, post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "chunked in HTTP/1.0": (400, post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", version=b"1.0")),
    "an empty chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"\r\nhello\r\n0\r\n\r\n")),
    "a chunk size with 0x": (400, post(b"Transfer-Encoding: chunked", body=b"0x5\r\nhello\r\n0\r\n\r\n")),
    "a signed chunk size": (400, post(b"Transfer-Encoding: chunked", body=b"+5\r\nhello\r\n0\r\n\r\n")),
    "a chunk without its end": (400, post(b"Transfer-Encoding: chunked", body=b"5\r\nhelloXX0\r\n\r\n")),
    "a huge chunk size": (None, post(b"Transfer-Encoding: chunked", body=b"f" * 17 + b"\r\n")),
    "a bare line feed": (400, b"GET / HTTP/1.1\nHost: box\n\n"),
    "a bare carriage return": (400, b"GET / HTTP/1.1\r\nHost: box\rX: y\r\n\r\n"),
    "NUL in a value": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\0b\r\n\r\n"),
    "a control character in a value": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\x01b\r\n\r\n"),
    "obs-fold": (400, b"GET / HTTP/1.1\r\nHost: box\r\nX: a\r\n b\r\n\r\n"),
    "a space before the colon": (400, b"GET / HTTP/1.1\r\nHost : box\r\n\r\n"),
    "a field without a name": (400, b"GET / HTTP/1.1\r\nHost: box\r\n: x\r\n\r\n"),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, b"GET / HTTP/1.1\r\nHost: box\r\nHost: box\r\n\r\n"),
    "a Host that is none": (400, b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n"),
    "an empty Host": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    "two Authorizations": (400, b"GET / HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n"),
    "two Content-Types": (400, post(b"Content-Type: a/b", b"Content-Type: a/b", b"Content-Length: 0")),
    "two Forwardeds": (400, b"GET / HTTP/1.1\r\nHost: box\r\nForwarded: for=a\r\nForwarded: for=b\r\n\r\n"),
    "HTTP/0.9": (None, b"GET /\r\n\r\n"),
    "HTTP/1.2": (None, b"GET / HTTP/1.2\r\nHost: box\r\n\r\n"),
    "the preface of HTTP/2": (None, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "another authority in the target": (400, b"GET http://other/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a scheme that is none of ours": (400, b"GET ftp://box/ HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a fragment": (400, b"GET /#x HTTP/1.1\r\nHost: box\r\n\r\n"),
    "an asterisk": (None, b"OPTIONS * HTTP/1.1\r\nHost: box\r\n\r\n"),
    "CONNECT": (None, b"CONNECT box:80 HTTP/1.1\r\nHost: box:80\r\n\r\n"),
    "TRACE": (501, b"TRACE / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "an unknown method": (None, b"FETCH / HTTP/1.1\r\nHost: box\r\n\r\n"),
    "NUL in the path": (400, b"GET /%00 HTTP/1.1\r\nHost: box\r\n\r\n"),
    "an encoded slash": (400, b"GET /a%2fb HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a backslash": (400, b"GET /a%5cb HTTP/1.1\r\nHost: box\r\n\r\n"),
    "dot segments": (400, b"GET /a/../b HTTP/1.1\r\nHost: box\r\n\r\n"),
    "encoded dot segments": (400, b"GET /a/%2e%2e/b HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a broken percent": (400, b"GET /%zz HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a long request line": (414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: box\r\n\r\n"),
    "a long header": (431, b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 17000 + b"\r\n\r\n"),
    "many headers": (431, b"GET / HTTP/1.1\r\nHost: box\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(70)) + b"\r\n"),
    "a large body announced": (413, post(b"Content-Length: 65537")),
    "a large body in chunks": (413, post(b"Transfer-Encoding: chunked", body=(b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5 + b"0\r\n\r\n")),
    "an expectation": (417, post(b"Expect: miracles", b"Content-Length: 5", body=b"hello")),
    "garbage": (400, bytes(range(128, 228))),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_it_is_refused_logged_and_nothing_after_it_is_served(self, run, case):
        status, octets = REFUSED[case]
        one = run()
        said = one.say(octets + SMUGGLED)
        assert b" 200 " not in said and b"/smuggled" not in said and len(re.findall(rb"^HTTP/1\.1 \d", said, re.M)) <= 1
        if said:
            head, _, body = said.partition(b"\r\n\r\n")
            assert 400 <= int(said.split()[1]) < 600 and b"Connection: close" in head and json.loads(body)["success"] is False
            assert status in (None, int(said.split()[1])) or (case == "an endless Content-Length" and b" 413 " in said)
        (event, fields), *more = one.logged
        assert not more and event == "refused" and fields["peer"] == "127.0.0.1" and fields["reason"] and fields["server"] == "auth"

    def test_tls_on_the_plain_port_is_closed(self, run):
        one = run()
        assert b" 200 " not in one.say(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        assert one.logged

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(min_size=1, max_size=200))
    def test_random_octets_never_please_it(self, shared, octets):
        assert b" 200 " not in shared.say(octets)
        assert not [event for event, _ in shared.logged if event == "error"]


class TestRequests:
    def test_names_with_underscores_are_dropped(self, shared):
        headers = shared.seen(headers=b"X_Forwarded_For: 1.2.3.4\r\nX_Real: 1\r\nX-Real: 2\r\nProxy: evil\r\n")["headers"]
        assert headers == {"HTTP_HOST": "box", "HTTP_X_REAL": "2", "HTTP_CONNECTION": "close"}

    def test_the_path_is_decoded_once(self, shared):
        seen = shared.seen(b"/a%20%c3%a4?x=%2f&y")
        assert seen["path"] == "/a \u00c3\u00a4" and seen["query"] == "x=%2f&y"
        assert shared.seen(b"http://box/a")["path"] == "/a"

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
        assert [json.loads(part.partition(b"\r\n\r\n")[2])["path"] for part in said.split(b"HTTP/1.1 ")[1:]] == [f"/{n}" for n in range(20)]

    def test_keep_alive_and_close(self, shared):
        assert b"Connection: close" not in shared.say(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
        with shared.connect() as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"Connection: close" in read_all(sock)

    def test_head_has_a_length_and_no_body(self, shared):
        said = shared.say(b"HEAD / HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
        assert said.endswith(b"\r\n\r\n") and b"Content-Length: " in said

    def test_100_continue_comes_only_when_the_body_will_be_taken(self, shared):
        with shared.connect() as sock:
            sock.sendall(post(b"Content-Length: 5", b"Expect: 100-continue", b"Connection: close"))
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"hello")
            assert b'"body": "hello"' in read_all(sock)
        assert b"100 Continue" not in shared.say(post(b"Content-Length: 65537", b"Expect: 100-continue"))

    def test_a_bug_of_the_application_tells_nothing(self, run):
        one = run()
        said = one.get(b"/bug")
        assert b" 500 " in said and b"secret" not in said and [event for event, _ in one.logged] == ["error"]


class TestPeer:
    NETS = tuple(map(ipaddress.ip_network, ("127.0.0.1/32", "10.0.0.0/8")))

    @pytest.mark.parametrize("remote, forwarded, peer", [
        ("192.0.2.1", "1.1.1.1", "192.0.2.1"), ("127.0.0.1", None, "127.0.0.1"), ("127.0.0.1", "192.0.2.9", "192.0.2.9"),
        ("127.0.0.1", "1.1.1.1, 192.0.2.9", "192.0.2.9"), ("127.0.0.1", "192.0.2.9, 10.0.0.5", "192.0.2.9"), ("127.0.0.1", "nonsense", "127.0.0.1"),
        ("127.0.0.1", "192.0.2.9, nonsense, 10.0.0.5", "10.0.0.5"), ("::ffff:127.0.0.1", "192.0.2.9", "192.0.2.9"), ("127.0.0.1", "", "127.0.0.1"),
    ])
    def test_the_right_most_untrusted_hop(self, remote, forwarded, peer):
        assert m.prove_peer(remote, forwarded, self.NETS) == peer

    def test_only_trusted_proxies_are_believed(self, run, shared):
        headers = b"X-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: https\r\n"
        assert (shared.seen(headers=headers)["peer"], shared.seen(headers=headers)["scheme"]) == ("127.0.0.1", "http")
        assert "HTTP_X_FORWARDED_FOR" not in shared.seen(headers=headers)["headers"]
        seen = run(trusted_proxies=self.NETS).seen(headers=headers)
        assert (seen["peer"], seen["scheme"]) == ("192.0.2.9", "https")


class TestSlowClients:
    def test_half_a_request_is_told_that_its_time_is_over(self, run):
        one = run(limits=m.Limits(request_seconds=0.3))
        with one.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHo")
            assert b" 408 " in read_all(sock)

    def test_one_octet_at_a_time_does_not_extend_it(self, run):
        one = run(limits=m.Limits(request_seconds=0.5))
        with one.connect() as sock:
            with contextlib.suppress(OSError):
                for octet in b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 100:
                    sock.sendall(bytes([octet]))
                    time.sleep(0.02)
            assert b" 200 " not in read_all(sock)

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

    def test_who_does_not_read_holds_no_thread(self, run):
        one = run()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(one.connect()).sendall(b"GET /big HTTP/1.1\r\nHost: box\r\n\r\n")
            time.sleep(0.2)
            assert b" 200 " in one.get()

    def test_handlers_that_wait_leave_threads_for_the_others(self, run):
        one = run()
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(one.connect()) for _ in range(30)]
            for sock in waiting:
                sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
            time.sleep(0.2)
            assert b" 200 " in one.get()
            one.app.go.set()
            assert all(b" 200 " in read_all(sock) for sock in waiting)


class TestStopping:
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
    return folder


class TestTls:
    def client(self, certificate):
        return ssl.create_default_context(cafile=str(certificate / "ca.pem"))

    @pytest.mark.parametrize("name, password", [("box.pem", None), ("box.p12", "phrase")])
    def test_both_kinds_of_file(self, run, certificate, name, password):
        one = run(tls=m.tls_context(str(certificate / name), None, password))
        with self.client(certificate).wrap_socket(one.connect(), server_hostname="localhost") as sock:
            for _ in range(3):
                sock.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n" + b"y" * 20000)
                said = b""
                while said.count(b"y") < 20000:
                    said += sock.recv(65536)
                assert b'"scheme": "https"' in said

    @pytest.mark.parametrize("name, key, password", [("box.p12", None, "wrong"), ("missing.pem", None, None), ("ca.pem", None, None), ("box.p12", None, None)])
    def test_what_does_not_open_is_a_sentence(self, certificate, name, key, password):
        with pytest.raises(ValueError) as caught:
            m.tls_context(str(certificate / name), key, password)
        assert "\n" not in str(caught.value) and str(certificate / name) in str(caught.value)

    def test_handshakes_that_never_end_hold_nobody_up(self, run, certificate):
        one = run(tls=m.tls_context(str(certificate / "box.pem")), limits=m.Limits(handshake_seconds=1))
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
        assert b" 200 " not in run(tls=m.tls_context(str(certificate / "box.pem"))).get()
