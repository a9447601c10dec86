"""mad, in the order of its sections: wire, clients, saved login, arguments, output, commands, exit statuses.

The journeys against a real server stand in test_flows.
"""

import ast
import base64
import contextlib
import datetime
import dis
import hashlib
import http.server
import inspect
import itertools
import json
import os
import re
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import threading
import time
import types

import mad
import pexpect
import pytest
from box import ROOT
from appliance.base.shared import ChangeMarks
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

TOKEN = (
    "eyJhbGciOiJFUzI1NiJ9."
    + "eyJzdWIiOiJyb290LWlkIiwidXNlcm5hbWUiOiJyb290IiwiZXhwIjo0MTAyNDQ0ODAwLCJpc3MiOiJ4In0"
    + ".AAAA"
)
USER = {
    "id": "8b1c0000-0000-4000-8000-000000000001", "username": "ann", "email": "ann@example.org",
    "created_at": "2026-01-01T00:00:00Z", "lockout_until": None, "is_active": True, "email_verified": False,
    "totp_enabled": False,
}
ENTRY = {
    "id": "7", "actor_id": "root", "action": "user_created", "secondary": None, "target": "ann",
    "timestamp": "2026-01-01T00:00:00Z", "ip_address": "::1", "user_agent": "mad",
}
OK = b"HTTP/1.1 200 OK\r\n"


class Fake(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length).decode()))
        status, body, headers = self.server.answer(self.command, self.path)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json", "Content-Length": str(len(body)),
        }.items() | headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def fake():
    server = Server(("127.0.0.1", 0), Fake)
    server.seen = []
    server.answers = {}
    server.answer = lambda method, path: server.answers.get(
        f"{method} {path.partition('?')[0]}",
        (404, {"success": False, "message": "There is no such thing here.", "error": "not_found"}, {}),
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def raw():
    """A server that responds to every request with the same octets, with `pause` seconds after each if it is set."""
    listeners = []

    def make(octets, pause=0, context=None, family=socket.AF_INET):
        listener = socket.socket(family)
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        listeners.append(listener)
        seen = []

        def serve():
            while True:
                with contextlib.suppress(OSError):
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    with context.wrap_socket(connection, server_side=True) if context else connection as open_:
                        seen.append(open_.recv(65536))
                        for part in [octets[i : i + 1] for i in range(len(octets))] if pause else [octets]:
                            open_.sendall(part)
                            time.sleep(pause)

        threading.Thread(target=serve, daemon=True).start()
        make.seen, make.port = seen, listener.getsockname()[1]
        return f"http://127.0.0.1:{make.port}"

    yield make
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def run(tmp_path, fake):
    def call(*words, input="", **environ):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAD_", "XDG_"))}
        env = (
            clean
            | {"HOME": str(tmp_path), "MAD_ADMIN_URL": fake.url, "MAD_AUTH_URL": fake.url, "MAD_ADMIN_TOKEN": TOKEN}
            | environ
        )
        env = {name: value for name, value in env.items() if value is not None}
        return subprocess.run(
            [sys.executable, "-c", "import sys, mad; sys.exit(mad.main(sys.argv[1:]))", *words], cwd=ROOT, env=env,
            input=input, capture_output=True, text=True, timeout=30,
        )

    return call


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run mad in this process, which takes a hundredth of the time of a new one."""
    for name in [name for name in os.environ if name.startswith(("MAD_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MAD_ADMIN_TOKEN", TOKEN)

    def call(*words, **environ):
        for name, value in environ.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        status = mad.main(list(words))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    return call


def parsed_of(*words, name="client create"):
    return mad.parse(next(command for command in mad.COMMANDS if command.name == name), list(words))


def words_of(command):
    """A command line of the command, with a value for each required option."""
    words = command.name.split()
    for option in command.options:
        if option.required or (
            command.at_least_one and option is next(one for one in command.options if not one.required)
        ):
            value = {"flag": "true", "number": "99", "token": TOKEN}.get(option.kind, USER["id"])
            value = option.choices[0] if option.choices else value
            words += ["--" + option.name, "permanent" if option.name == "until" else value]
    return words


ASKING = [
    command
    for command in mad.COMMANDS
    if not command.name.startswith(("session ", "completion ")) and command.name != "token"
]


# == Wire =======================================================================

def common_name(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def make_certificate(folder, host="localhost"):
    key = ec.generate_private_key(ec.SECP256R1())
    name = common_name(host)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - datetime.timedelta(hours=1), now + datetime.timedelta(hours=1)
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False).add_extension(
        x509.BasicConstraints(True, None), True
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return str(path)


class TestAnswers:
    """RFC 9112: whatever comes back, mad ends in time, with one sentence and no traceback."""

    @pytest.mark.parametrize(
        "octets, message",
        [
            (b"\x16\x03\x01garbage\r\n\r\n", "not an HTTP answer"), (b"[]", "not an HTTP answer"),
            (b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\n[]", "not an HTTP answer"),
            (b"HTTP/1.1 20\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\n[]", "not an HTTP answer"),
            (b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n[]", "not an HTTP answer"),
            (b"HTTP/1.1 2\xb20 OK\r\nContent-Length: 2\r\n\r\n[]", "not an HTTP answer"),  # a digit of Latin-1
            (OK + b"Content-Length 2\r\n\r\n[]", "the head of the answer is malformed"),
            (b"", "the connection was closed without an answer"),
            (OK + b"Content-Length: 10\r\n\r\n[]", "the answer breaks off"),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n[]", "the answer breaks off"),
            (OK + b"Content-Length: -1\r\n\r\n[]", "the head of the answer is malformed"),
            (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]", "the head of the answer is malformed"),
            (OK + b"X: " + b"a" * 200_000, "the head of the answer is too long"),
            (OK + b"Content-Length: 3\r\nContent-Length: 2\r\n\r\n[]", "the head of the answer is malformed"),
            *(
                (OK + b"Content-Length: " + length + b"\r\n\r\n[]", "the head of the answer is malformed")
                for length in (b"\xb2", b"+2", b"9" * 5000)
            ),
            *(
                (OK + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n[]\r\n0\r\n\r\n",
                 "the answer has a malformed chunk")
                for size in (b"zz", b"", b";x=y", b"0x2", b"+2", b"0" * 16 + b"2")
            ),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 200_000 + b"\r\n[]\r\n0\r\n\r\n", "the answer breaks off"),
            # A chunk ends with CRLF, which nothing else may stand in for. RFC 9112 §7.1
            (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]xx0\r\n\r\n", "the answer has a malformed chunk"),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]0\r\n\r\n", "the answer has a malformed chunk"),
            (OK + b"Transfer-Encoding: gzip\r\n\r\n[]", "the answer has an unknown transfer encoding"),
            *(
                (OK + rest, "the answer is not the JSON it should be")
                for rest in (
                    b"\r\n[NaN]", b'\r\n["a"]', b"\r\n{}", b"\r\n" + b"[" * 100_000, b"Content-Length: 0\r\n\r\n",
                )
            ),
            (b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n", "the answer is not the JSON it should be"),
            (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", "a gateway answers that the server cannot be reached (502)"),
        ],
    )
    def test_garbage_is_no_answer(self, here, raw, octets, message):
        done = here("user", "list", "--json", MAD_ADMIN_URL=raw(octets))
        error = "unreachable" if b"502" in octets else "bad_answer"
        hint = "mad: hint: is this the address of a microauthd?\n" if error == "bad_answer" else ""
        assert done.returncode == 4 and json.loads(done.stdout) == {
            "success": False, "message": message, "error": error,
        }
        assert done.stderr == f"mad: error: {message}\n{hint}"

    @pytest.mark.parametrize(
        "octets",
        [
            OK + b"Content-Length: 99999999999\r\n\r\n[", OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n[",
            OK + b"\r\n[" + b" " * (17 << 20),
            OK + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 17,
        ],
    )
    def test_a_huge_one_is_cut_short(self, here, raw, octets):
        assert "longer than 16 MiB" in here("user", "list", MAD_ADMIN_URL=raw(octets)).stderr

    @pytest.mark.parametrize(
        "octets",
        [
            OK + b"\r\n[]", OK + b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\n[\r\n1\r\n]\r\n0\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\n[]extra",
            OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n[]",
            OK + b"Content-Length: 2 \t\r\n\r\n[]", OK + b"CONTENT-LENGTH:2\r\n\r\n[]extra",
            # In any case, and before a length. RFC 9112 §6.1, §6.3
            OK + b"Content-Length: 1\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n",
        ],
    )
    def test_each_kind_of_framing_is_understood(self, here, raw, octets):
        assert json.loads(here("user", "list", "--json", MAD_ADMIN_URL=raw(octets)).stdout) == []

    def test_the_time_is_for_the_whole_answer(self, here, raw, monkeypatch):
        monkeypatch.setattr(mad, "TIMEOUT", 0.3)
        url = raw(OK + b"X: y\r\n" * 100, pause=0.05)
        done = here("user", "list", MAD_ADMIN_URL=url)
        assert (done.returncode, done.stderr) == (4, f"mad: error: no answer from {url} within 0.3 seconds\n"), (
            "each octet comes within the time, all of them do not"
        )

    def test_an_empty_one_says_nothing_was_done(self, here, raw):
        done = here("user", "get", "--id", USER["id"], MAD_ADMIN_URL=raw(OK + b"Content-Length: 0\r\n\r\n"))
        assert done.returncode == 4 and "mad: error: the answer is not the JSON it should be\n" in done.stderr
        done = here("user", "delete", "--id", USER["id"], MAD_ADMIN_URL=raw(b"HTTP/1.1 204 No Content\r\n\r\n"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")

    @pytest.mark.parametrize(
        "command", [command for command in ASKING if command.name != "token get"], ids=lambda command: command.name
    )
    def test_a_token_that_is_not_accepted_needs_a_login(self, here, fake, command):
        fake.answer = lambda *_: (401, {"success": False, "message": "Log in.", "error": "invalid_token"}, {})
        done = here(*words_of(command), MAD_ADMIN_URL=fake.url)
        assert done.returncode == 3 and done.stderr == "mad: error: log in\nmad: hint: log in with: mad session login\n"

    def test_a_redirect_takes_the_token_nowhere(self, here, raw):
        thief = raw(OK + b"\r\n[]")
        stolen = raw.seen
        url = raw(b"HTTP/1.1 307 Over There\r\nLocation: %s/users\r\n\r\n" % thief.encode())
        done = here("user", "list", MAD_ADMIN_URL=url)
        assert done.returncode == 4 and f"{url} redirects elsewhere" in done.stderr and not stolen

    def test_proxies_of_the_environment_are_not_asked(self, here, raw):
        proxy = raw(OK + b"\r\n[]")
        stolen = raw.seen
        done = here(
            "user", "list", MAD_ADMIN_URL=raw(OK + b"\r\n[]"), http_proxy=proxy, HTTP_PROXY=proxy, ALL_PROXY=proxy
        )
        assert done.returncode == 0 and not stolen

    def test_what_the_server_says_of_each_member_is_told(self, here, fake):
        fake.answers["GET /users"] = (
            400,
            {"success": False, "message": "That is wrong.", "error": "bad", "errors": {"email": "It is \x1b[2J none."}},
            {"Retry-After": "7"},
        )
        done = here("user", "list", "--json", MAD_ADMIN_URL=fake.url)
        assert (
            done.stderr
            == "mad: error: that is wrong\nmad: error: email: It is \\x1b[2J none\nmad: hint: try again in 7 seconds\n"
        )
        assert json.loads(done.stdout) == {
            "success": False, "message": "That is wrong.", "error": "bad", "errors": {"email": "It is \x1b[2J none."},
        }


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        [
            "localhost:9041", "ftp://box", "http://", "http://a:b@box", "http://box/?x", "http://[::1",
            "http://box:99999", "http://b\u00fcx", "http://box\r\nX: y", "http://box/a b",
        ],
    )
    def test_what_is_no_base_url_is_bad_usage(self, here, url):
        done = here("user", "list", "--admin-url", url, "--json")
        assert done.returncode == 2 and json.loads(done.stdout)["error"] == "bad_url"

    def test_a_path_and_ipv6_are_kept(self, here, raw):
        raw(OK + b"\r\n[]", family=socket.AF_INET6)
        assert here("user", "list", "--admin-url", f"http://[::1]:{raw.port}/idp/").returncode == 0
        assert raw.seen[0].startswith(b"GET /idp/users HTTP/1.1\r\nHost: [::1]:%d\r\n" % raw.port)

    def test_flags_win_over_environment_and_environment_over_file(self, here, fake, tmp_path):
        fake.answers["GET /users"] = (200, [], {})
        (tmp_path / ".mad_url").write_text("http://127.0.0.1:9")
        assert here("user", "list").returncode == 4
        assert here("user", "list", MAD_ADMIN_URL=fake.url).returncode == 0
        assert here("user", "list", "--admin-url", "http://127.0.0.1:9", MAD_ADMIN_URL=fake.url).returncode == 4
        assert here("user", "list", "--admin-token", "another.one.x", MAD_ADMIN_URL=fake.url).returncode == 0
        assert [headers["Authorization"] for *_, headers, _ in fake.seen] == ["Bearer " + TOKEN, "Bearer another.one.x"]

    @pytest.mark.parametrize(
        "host, warned",
        [
            ("127.0.0.1", False), ("127.9.9.9", False), ("localhost", False), ("[::1]", False),
            ("127.0.0.1.invalid", True), ("box.invalid", True),
        ],
    )
    def test_clear_text_to_another_machine_is_warned_of(self, here, monkeypatch, host, warned):
        def refuse(*_, **__):
            raise ConnectionRefusedError(111, "Connection refused")

        monkeypatch.setattr(socket, "create_connection", refuse)
        assert ("in clear" in here("user", "list", "--admin-url", f"http://{host}:9").stderr) is warned

    def test_an_authority_of_ones_own_needs_no_key_identifiers(self, here, raw, tmp_path, monkeypatch):
        """RFC 5280 §4.2.1.1; Python 3.13 and newer refuse it by default"""
        key, authority = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        at, issuer = datetime.datetime.now(datetime.UTC), common_name("an authority of mine")
        days = (at - datetime.timedelta(1), at + datetime.timedelta(1))
        own = x509.CertificateBuilder(issuer, issuer, authority.public_key(), 1, *days).add_extension(
            x509.BasicConstraints(True, None), True
        )
        (tmp_path / "ca.pem").write_bytes(own.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        leaf = x509.CertificateBuilder(issuer, common_name("localhost"), key.public_key(), 2, *days).add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), False
        )
        (tmp_path / "leaf.pem").write_bytes(
            leaf.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "leaf.pem")
        raw(OK + b"Content-Length: 2\r\n\r\n[]", context=context)
        made = ssl.create_default_context

        def as_python_3_13(**words):
            strict = made(**words)
            strict.verify_flags |= ssl.VERIFY_X509_STRICT
            return strict

        monkeypatch.setattr(ssl, "create_default_context", as_python_3_13)
        done = here(
            "user", "list", "--admin-url", f"https://localhost:{raw.port}", MAD_CA_FILE=str(tmp_path / "ca.pem")
        )
        assert done.returncode == 0, done.stderr

    def test_https_trusts_the_authorities_it_is_told(self, here, raw, tmp_path):
        certificate = make_certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        raw(OK + b"Content-Length: 2\r\n\r\n[]", context=context)
        url = f"https://localhost:{raw.port}"
        done = here("user", "list", "--json", "--admin-url", url)
        assert (
            done.returncode == 4
            and json.loads(done.stdout)["error"] == "untrusted"
            and "MAD_CA_FILE" in done.stderr
            and not raw.seen
        )
        assert here("user", "list", "--admin-url", url, MAD_CA_FILE=certificate).returncode == 0
        done = here("user", "list", "--json", "--admin-url", url.replace("localhost", "127.0.0.1"))
        assert done.returncode == 4 and json.loads(done.stdout)["error"] == "untrusted", "the name counts"
        done = here("user", "list", "--json", "--admin-url", url, MAD_CA_FILE=str(tmp_path / "none"))
        assert done.returncode == 4 and json.loads(done.stdout) == {
            "success": False, "error": "untrusted",
            "message": f"cannot read the authorities in {tmp_path}/none: No such file or directory",
        }


# == ApiClient ==================================================================

class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class TestAtTheMachine:
    """The Unix socket of ADMIN, by which the server knows that mad runs on its machine. unix(7)"""

    US = frozenset((os.geteuid(),))
    OTHERS = frozenset((os.geteuid() + 1,))

    @pytest.fixture
    def beside(self, tmp_path, monkeypatch, fake):
        """A server that listens on admin.sock of the working directory; `fake` answers on TCP."""
        folder = tmp_path / "data"
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name, value in {"HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "MAD_ADMIN_URL": fake.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MAD_ADMIN_SOCKET", raising=False)
        monkeypatch.setattr(mad, "RUNTIME_FOLDER", str(tmp_path / "run"))
        fake.answers["GET /users/x"] = (200, USER | {"username": "over-tcp"}, {})
        server = UnixServer("admin.sock", Fake)
        server.seen, server.status = [], 200
        server.answer = lambda method, path: (server.status, USER | {"username": "at-the-machine"}, {})
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()

    def get(self, capsys, *words):
        status = mad.main(["user", "get", "--id", USER["id"], "--json", *words])
        said = capsys.readouterr()
        return status, json.loads(said.out).get("username"), said.err

    @pytest.fixture(autouse=True)
    def one_user(self, fake):
        fake.answers["GET /users/" + USER["id"]] = (200, USER | {"username": "over-tcp"}, {})

    @pytest.mark.parametrize("url", ["http://127.0.0.1:{}", "https://localhost:{}", "http://[::1]:{}"])
    def test_the_socket_in_this_folder_comes_before_a_loopback_address(self, beside, fake, capsys, url):
        url = url.format(fake.server_port)
        assert self.get(capsys, "--admin-url", url) == (0, "at-the-machine", "")
        assert not fake.seen and beside.seen[0][2]["Host"] == url.partition("://")[2]
        assert beside.seen[0][2]["Authorization"] == "Bearer " + TOKEN

    def test_the_port_is_named_though_the_scheme_implies_it(self, beside, capsys):
        self.get(capsys, "--admin-url", "https://localhost")
        assert beside.seen[0][2]["Host"] == "localhost:443"

    def test_without_one_in_the_folder_that_of_the_service_is_used(self, beside, fake, tmp_path, capsys, monkeypatch):
        os.rename(tmp_path / "data", tmp_path / "run")
        (tmp_path / "data").mkdir()
        monkeypatch.chdir(tmp_path / "data")
        assert self.get(capsys)[1] == "at-the-machine" and not fake.seen
        os.chmod(tmp_path / "run", 0o777)
        assert mad.Context.admin_sockets(mad.Url("http://localhost"))[0][1] == {0, os.geteuid()}

    def test_the_service_user_is_trusted_in_the_folder_that_root_made_for_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        info = types.SimpleNamespace(st_uid=991, st_mode=stat.S_IFDIR | 0o755)

        def lstat(path):
            if path == mad.RUNTIME_FOLDER:
                return info
            raise FileNotFoundError

        monkeypatch.setattr(mad.os, "lstat", lstat)
        sockets = mad.Context.admin_sockets(mad.Url("http://localhost:9041"))
        assert sockets == (("/run/microauthd/admin.sock", {0, os.geteuid(), 991}),)
        info.st_mode |= 0o020
        assert mad.Context.admin_sockets(mad.Url("http://localhost:9041"))[0][1] == {0, os.geteuid()}

    def test_that_of_a_stranger_in_this_folder_is_left_alone_with_a_word(self, monkeypatch, capsys):
        info = types.SimpleNamespace(st_uid=4242, st_mode=stat.S_IFSOCK | 0o666)

        def lstat(path):
            if path == "admin.sock":
                return info
            raise FileNotFoundError

        monkeypatch.setattr(mad.os, "lstat", lstat)
        assert mad.Context.admin_sockets(mad.Url("http://localhost:9041")) == ()
        assert "that of user 4242, and not used" in capsys.readouterr().err

    def test_the_kernel_says_whose_it_is_and_a_stranger_hears_nothing(self, beside, fake):
        with pytest.raises(PermissionError):
            mad.connect_at_machine("admin.sock", self.OTHERS, 3)
        url = mad.Url(fake.url)
        sockets = (("admin.sock", self.OTHERS), ("nothing.sock", self.US))
        answer = mad.exchange(url, "GET", "/users/x", {}, None, 3, None, sockets)
        assert json.loads(answer[2])["username"] == "over-tcp" and not beside.seen

    def test_where_nobody_listens_the_address_is_used(self, beside, capsys):
        beside.shutdown()
        beside.server_close()
        assert os.path.exists("admin.sock") and self.get(capsys) == (0, "over-tcp", "")

    def test_a_server_that_is_not_the_one_that_is_meant_says_so(self, beside, fake, capsys):
        beside.status = 421
        assert self.get(capsys) == (0, "over-tcp", "") and len(beside.seen) == 1
        beside.status = 403
        assert self.get(capsys)[0] == mad.EXIT_REFUSED and len(fake.seen) == 1

    def test_another_machine_is_reached_by_its_address(self, beside):
        assert mad.Context.admin_sockets(mad.Url("https://box.example")) == ()

    def test_one_that_is_named_is_used_alone(self, beside, fake, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MAD_ADMIN_SOCKET", "data/admin.sock")
        assert self.get(capsys, "--admin-url", "https://box.example")[1] == "at-the-machine"
        beside.status = 421
        assert self.get(capsys)[0] == mad.EXIT_REFUSED
        monkeypatch.setenv("MAD_ADMIN_SOCKET", "nothing.sock")
        status, _, said = self.get(capsys)
        assert status == mad.EXIT_UNREACHABLE and "cannot reach nothing.sock: No such file" in said
        monkeypatch.setenv("MAD_ADMIN_SOCKET", "")
        assert self.get(capsys)[1] == "over-tcp" and len(fake.seen) == 1

    def test_its_path_may_be_longer_than_an_address_of_a_socket(self, beside, tmp_path):
        folder = tmp_path / ("long" * 40)
        os.rename(tmp_path / "data", folder)
        mad.connect_at_machine(str(folder / "admin.sock"), self.US, 3).close()


class TestErrors:
    def test_it_raises_what_the_server_says(self, fake):
        client = mad.MadClient(fake.url, TOKEN)
        fake.answers["POST /users"] = (
            409, {"success": False, "message": "The name is taken.", "error": "conflict"}, {},
        )
        with pytest.raises(mad.MadError) as caught:
            client.create_user("ann", "a@b", "correct horse")
        assert (caught.value.status, caught.value.error) == (409, "conflict")

    IDED = {"X-Request-Id": "5d1f33c200000007"}
    AMONG = f"/users/{USER['id']}"

    @pytest.mark.parametrize(
        "answer, told",
        [
            ((409, {"success": False, "message": "The name is taken.", "error": "conflict"}, IDED), "the name is taken"),
            ((401, {"success": False, "message": "Log in.", "error": "invalid_token"}, IDED), "log in"),
            ((403, "not an object", IDED), "the server answers 403"),
            ((502, "not an object", IDED), "a gateway answers that the server cannot be reached (502)"),
            ((404, {}, IDED | {"X-Not-Found": "route"}), f"this server has no GET {AMONG}"),
            ((302, {}, IDED), "redirects elsewhere, which is not followed"),
            ((200, {"success": False, "message": "No."}, IDED), "no"),
            ((200, "not an object", IDED), "the answer is not the JSON it should be"),
        ],
    )
    def test_the_line_of_an_error_ends_with_the_id_by_which_the_servers_log_names_the_request(
        self, here, fake, answer, told
    ):
        lines = {}
        for with_id in (True, False):
            fake.answers["GET " + self.AMONG] = answer if with_id else (
                *answer[:2], {name: value for name, value in answer[2].items() if name != "X-Request-Id"}
            )
            done = here("user", "get", "--id", USER["id"], "--json", MAD_ADMIN_URL=fake.url)
            assert done.returncode != 0
            lines[with_id] = (done.stderr.splitlines()[0], done.stderr.splitlines()[1:], done.stdout)
        assert lines[True] == (lines[False][0] + " (request 5d1f33c200000007)", *lines[False][1:]), "and no other line"
        assert lines[False][0].endswith(told)

    def test_a_name_that_nobody_has_is_told_with_the_request_that_looked_for_it(self, here, fake):
        missing = {"success": False, "message": "There is no such thing here.", "error": "not_found"}
        fake.answer = lambda *_: (404, missing, self.IDED)
        done = here("user", "get", "--id", "nobody", MAD_ADMIN_URL=fake.url)
        assert done.stderr.splitlines()[0] == "mad: error: there is no user 'nobody' (request 5d1f33c200000007)"

    def test_an_id_cannot_drive_a_terminal_and_has_an_end(self, here, fake):
        fake.answers["GET " + self.AMONG] = (409, {"message": "No."}, {"X-Request-Id": "\x1b[2J" + "9" * 5000})
        done = here("user", "get", "--id", USER["id"], MAD_ADMIN_URL=fake.url)
        assert done.stderr == f"mad: error: no (request \\x1b[2J{'9' * 60})\n"

    def test_the_python_bindings_have_the_id_beside_the_message(self, fake):
        fake.answers["POST /users"] = (409, {"message": "The name is taken.", "error": "conflict"}, self.IDED)
        with pytest.raises(mad.MadError) as caught:
            mad.MadClient(fake.url, TOKEN).create_user("ann", "a@b", "correct horse")
        assert (str(caught.value), caught.value.request_id) == ("The name is taken.", "5d1f33c200000007")


class TestPages:
    """RFC 8288 §3: a list is followed by its rel="next"."""

    @pytest.fixture
    def many(self, fake):
        rows = [
            USER | {"id": f"8b1c0000-0000-4000-8000-{number:012}", "username": f"user{number}"}
            for number in range(2500)
        ]

        def answer(method, path):
            query = dict(pair.split("=") for pair in path.partition("?")[2].split("&") if pair)
            limit, offset = int(query.get("limit", 1000)), int(query.get("offset", 0))
            more = (
                {"Link": f'<http://127.0.0.1:9/elsewhere?limit={limit}&offset={offset + limit}>; title="a"; rel="next"'}
                if offset + limit < len(rows)
                else {}
            )
            return fake.answers.get(offset) or (200, rows[offset : offset + limit], more)

        fake.answer, fake.rows = answer, rows
        return fake

    def test_every_row_comes_once_and_in_order(self, here, many):
        ids = [row["id"] for row in many.rows]
        assert here("user", "list", "--quiet", MAD_ADMIN_URL=many.url).stdout.split() == ids
        assert json.loads(here("user", "list", "--json").stdout) == many.rows
        assert [line.split()[0] for line in here("user", "list").stdout.splitlines()[2:]] == ids
        assert [path for _, path, _, _ in many.seen[:3]] == [
            "/users", "/users?limit=1000&offset=1000", "/users?limit=1000&offset=2000",
        ], "never to another path or host"

    def test_a_limit_is_for_the_whole(self, here, many):
        assert (
            json.loads(here("user", "list", "--json", "--limit", "1200", MAD_ADMIN_URL=many.url).stdout)
            == many.rows[:1200]
        )
        assert json.loads(here("user", "list", "--json", "--limit", "2", "--offset", "5").stdout) == many.rows[5:7]
        assert [path for _, path, _, _ in many.seen] == [
            "/users?limit=1000", "/users?limit=1000&offset=1000", "/users?limit=2&offset=5",
        ]
        assert here("user", "list", "--limit", "0").returncode == 2 and len(many.seen) == 3

    def test_a_list_takes_only_what_the_server_heeds_there(self):
        assert parsed_of("--q", "x", name="session list").errors == ["unknown option '--q'"]
        assert parsed_of("--user-id", "x", "--offset", "3", "--limit", "-1", name="role list-users").errors == [
            "unknown option '--user-id'", "--id is missing",
        ]

    def test_what_is_looked_for_goes_along(self, here, many):
        here("user", "list", "--q", "a&b", "--sort", "-created_at", "--is-active", "ALL", MAD_ADMIN_URL=many.url)
        assert many.seen[0][1] == "/users?is_active=all&q=a%26b&sort=-created_at"
        assert here("user", "list", "--is-active", "perhaps").returncode == 2

    def test_a_failure_on_the_way_is_the_one_document(self, here, many):
        many.answers[2000] = (503, {"success": False, "message": "Full.", "error": "unavailable"}, {})
        done = here("user", "list", "--json", MAD_ADMIN_URL=many.url)
        assert done.returncode == 1 and json.loads(done.stdout) == {
            "success": False, "message": "Full.", "error": "unavailable",
        }
        done = here("user", "list", "--quiet")
        assert (done.returncode, len(done.stdout.split()), done.stderr) == (1, 2000, "mad: error: full\n")

    def test_a_circle_ends(self, here, fake):
        fake.answers["GET /users"] = (200, [USER], {"Link": "</users?offset=1>; rel=next"})
        done = here("user", "list", "--json", MAD_ADMIN_URL=fake.url)
        assert done.returncode == 4 and len(fake.seen) == 2 and json.loads(done.stdout) == {
            "success": False, "message": "the pages of the list go round in a circle", "error": "bad_answer",
        }

    def test_rows_can_be_had_one_by_one(self, many):
        admin = mad.MadClient(many.url, TOKEN)
        assert next(admin.each(admin.list_users, q="x"))["username"] == "user0" and len(many.seen) == 1
        assert admin.list_users(limit=3) == many.rows[:3]

    @pytest.mark.parametrize(
        "link, query",
        [
            ('</users?a=1>; rel="next"', "a=1"), ("</users?a=1>;rel=next", "a=1"),
            ('</x?b>; rel="prev", </x?c>; rel="next"', "c"), ('</users?a=1>; rel="prev"', None), ("", None),
            ("nonsense; rel=next", None), ("</users>; rel=next", None),
        ],
    )
    def test_only_what_is_next_is_next(self, link, query):
        assert mad.next_query(link) == query


# == AuthClient =================================================================

class TestAuthClient:
    """The client of the AUTH API. It authenticates as RFC 6749 §2.3.1 says."""

    MADE = {
        "access_token": TOKEN, "token_type": "Bearer", "expires_in": 60, "success": True, "message": "x",
        "active": True,
    }

    @pytest.mark.parametrize(
        "call, request_, form",
        [
            (lambda auth: auth.client_credentials("a b"), "POST /token", "grant_type=client_credentials&scope=a+b"),
            (
                lambda auth: auth.password_login("ann", "h&h", totp="1"), "POST /token",
                "grant_type=password&username=ann&password=h%26h&totp=1",
            ),
            (lambda auth: auth.refresh("r"), "POST /token", "grant_type=refresh_token&refresh_token=r"),
            (
                lambda auth: auth.exchange_code("c", "https://a/b", "v"), "POST /token",
                "grant_type=authorization_code&code=c&redirect_uri=https%3A%2F%2Fa%2Fb&code_verifier=v",
            ),
            (lambda auth: auth.introspect("t"), "POST /introspect", "token=t"),
            (lambda auth: auth.revoke("t"), "POST /revoke", "token=t"),
        ],
    )
    def test_a_client_says_who_it_is(self, fake, call, request_, form):
        fake.answers[request_] = (200, self.MADE, {})
        call(mad.AuthClient(fake.url, "app", "s:", token=TOKEN))
        assert fake.seen[0][3] == form and fake.seen[0][2]["Authorization"] == "Basic YXBwOnMlM0E="
        call(mad.AuthClient(fake.url, "app", token=TOKEN))
        assert fake.seen[1][3] == form + "&client_id=app" and "Authorization" not in fake.seen[1][2], (
            "a public client has no secret, and no token of a user stands for it"
        )

    @pytest.mark.parametrize(
        "call, request_, body",
        [
            (lambda auth: auth.userinfo(), "GET /userinfo", ""), (lambda auth: auth.me(), "GET /me", ""),
            (lambda auth: auth.logout(), "POST /logout", ""), (lambda auth: auth.logout_all(), "POST /logout-all", ""),
            (lambda auth: auth.list_my_sessions(), "GET /me/sessions", ""),
            (lambda auth: auth.list_my_refresh_tokens(), "GET /me/refresh-tokens", ""),
            (lambda auth: auth.list_users(), "GET /users", ""), (lambda auth: auth.get_user("u"), "GET /user/u", ""),
            (lambda auth: auth.create_user("a", "b", "c"), "POST /user", '{"username":"a","email":"b","password":"c"}'),
            (lambda auth: auth.reset_password("u", "p"), "POST /user/u/reset", '{"new_password":"p"}'),
            (lambda auth: auth.deactivate_user("u"), "POST /user/u/deactivate", ""),
        ],
    )
    def test_a_user_is_spoken_for_by_a_token(self, fake, call, request_, body):
        found = [USER] if "sessions" in request_ or "tokens" in request_ or request_ == "GET /users" else USER
        fake.answers[request_] = (200, found, {})
        assert call(mad.MadClient(auth_url=fake.url).auth(token=TOKEN)) == found
        assert fake.seen[0][2]["Authorization"] == "Bearer " + TOKEN and fake.seen[0][3] == body

    def test_what_is_public_is_asked_without_a_token(self, fake):
        for path in ("/jwks.json", "/.well-known/openid-configuration"):
            fake.answers["GET " + path] = (200, {"keys": []}, {})
        auth = mad.AuthClient(fake.url, "app", "s", token=TOKEN)
        assert auth.jwks() == auth.discovery() == {"keys": []} and not any(
            "Authorization" in headers for *_, headers, _ in fake.seen
        )

    def test_nothing_is_sent_for_nobody(self, fake):
        with pytest.raises(mad.BadValue):
            mad.AuthClient(fake.url).client_credentials()
        assert fake.seen == []

    def test_a_change_may_depend_on_what_was_read(self, fake):
        path = "/users/" + USER["id"]
        fake.answers[f"GET {path}"], fake.answers[f"PUT {path}"] = (
            (200, USER, {"ETag": '"7"'}),
            (412, {"success": False, "message": "No.", "error": "precondition_failed"}, {}),
        )
        admin = mad.MadClient(fake.url, TOKEN)
        with pytest.raises(mad.MadError) as caught:
            admin.send(
                "PUT", path, json={"email": "x@y"}, headers={"If-Match": admin.send("GET", path).headers["etag"]}
            )
        assert caught.value.status == 412 and fake.seen[-1][2]["If-Match"] == '"7"'

    @pytest.mark.parametrize("kind", [mad.MadClient, mad.AuthClient])
    def test_every_method_says_its_request_and_its_types(self, kind):
        for name, method in vars(kind).items():
            if not name.startswith("_") and callable(method) and name not in ("auth",):
                assert re.match(r"(GET|POST|PUT|DELETE) /", method.__doc__), name
                hints = getattr(method, "pages", method).__annotations__
                assert "return" in hints and "Return" in method.__doc__, name

    def test_every_method_that_returns_a_list_takes_the_list_of_the_server(self, fake):
        fake.answer = lambda method, path: (
            200, b'{"id": "7"}\n' if "export" in path else [{"id": "7"}], {},
        )
        client, methods = mad.MadClient(fake.url, TOKEN), 0
        for name, method in vars(mad.MadClient).items():
            signature = callable(method) and inspect.signature(method)
            if not name.startswith("_") and signature and "list[dict]" in str(signature.return_annotation):
                words = [
                    "x" for parameter in list(signature.parameters.values())[1:]
                    if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                ]
                assert list(getattr(client, name)(*words)) == [{"id": "7"}], name
                methods += 1
        assert methods > 30


# == MadClient ==================================================================

class TestNamesNoPathCarries:
    @pytest.mark.parametrize(
        "words, path, segment",
        [
            (("scope", "get", "--id", "https://api.example/read"), "/scopes", "https%3A%2F%2Fapi.example%2Fread"),
            (("client", "get", "--id", "a/../b"), "/clients", "a%2F..%2Fb"),
            (("user", "get", "--id", "HOME\\Ann"), "/users", "HOME%5CAnn"), (("role", "get", "--id", "/"), "/roles", "%2F"),
            (("permission", "get", "--id", "a%2Fb"), "/permissions", "a%252Fb"),
        ],
    )
    def test_are_one_segment_of_a_path(self, run, fake, words, path, segment):
        """RFC 3986 §2.2: an encoded slash is data, not a delimiter."""
        fake.answers[f"GET {path}/id-by-name/{segment}"] = (200, {"result": USER["id"]}, {})
        fake.answers[f"GET {path}/{USER['id']}"] = (200, {"id": USER["id"]}, {})
        done = run(*words, "--json")
        assert done.returncode == 0 and json.loads(done.stdout) == {"id": USER["id"]}, done
        assert [seen[1] for seen in fake.seen] == [f"{path}/id-by-name/{segment}", f"{path}/{USER['id']}"]

    def test_one_that_is_not_there_is_said_to_be(self, run, fake):
        fake.answers["GET /roles/id-by-name/a%2Fb"] = (404, {"success": False, "message": "x", "error": "not_found"}, {})
        done = run("role", "get", "--id", "a/b")
        assert (done.returncode, done.stderr) == (
            1, "mad: error: there is no role 'a/b'\nmad: hint: see: mad role list\n",
        )


# == Profile ====================================================================

class TestTheSavedLogin:
    """~/.mad_token is private to its owner, is no symlink, and goes only to the server that issued it."""

    def log_in(self, run, fake, **environ):
        fake.answers["POST /token"] = (
            200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60, "jti": "x"}, {},
        )
        return run(
            "session", "login", "--username", "root", "--password-stdin", input="hush hush\n", MAD_ADMIN_TOKEN=None,
            **environ,
        )

    def test_it_is_private_and_used(self, run, fake, tmp_path):
        mask = os.umask(0)
        try:
            done = self.log_in(run, fake)
        finally:
            os.umask(mask)
        assert done.returncode == 0, done.stderr
        path = tmp_path / ".mad_token"
        assert path.read_text() == TOKEN and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "username=root" in fake.seen[-1][3]
        fake.answers["GET /users"] = (200, [], {})
        assert run("user", "list", MAD_ADMIN_TOKEN=None).returncode == 0
        assert fake.seen[-1][2]["Authorization"] == "Bearer " + TOKEN
        assert "root" in run("session", "status", MAD_ADMIN_TOKEN=None).stdout
        assert run("session", "logout", MAD_ADMIN_TOKEN=None).returncode == 0 and not path.exists()

    def test_it_does_not_go_to_another_server(self, run, fake, tmp_path):
        self.log_in(run, fake)
        before = len(fake.seen)
        done = run("user", "list", MAD_ADMIN_TOKEN=None, MAD_ADMIN_URL=fake.url.replace("127.0.0.1", "localhost"))
        assert done.returncode == 3 and len(fake.seen) == before

    def test_a_symlink_is_refused(self, run, fake, tmp_path):
        (tmp_path / "victim").write_text("precious")
        (tmp_path / ".mad_token").symlink_to(tmp_path / "victim")
        done = self.log_in(run, fake)
        assert done.returncode == 3 and f"{tmp_path}/.mad_token is a symbolic link" in done.stderr and fake.seen == []
        assert (tmp_path / "victim").read_text() == "precious"

    def test_a_refused_login_saves_nothing(self, run, fake, tmp_path):
        fake.answers["POST /token"] = (403, {"success": False, "message": "no", "error": "invalid_grant"}, {})
        done = run("session", "login", "--username", "root", "--password-stdin", input="wrong\n", MAD_ADMIN_TOKEN=None)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "mad: error: no\n")
        assert not list(tmp_path.glob(".mad*"))

    def test_a_terminal_is_asked_and_shows_no_password(self, fake, tmp_path):
        fake.answers["POST /token"] = (
            200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60, "jti": "x"}, {},
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {
            "HOME": str(tmp_path)
        }
        child = pexpect.spawn(
            sys.executable,
            ["-c", "import sys, mad; sys.exit(mad.main(sys.argv[1:]))", "session", "login", "--admin-url", fake.url],
            cwd=str(ROOT), env=env, encoding="utf-8", timeout=60,
        )
        child.expect("(?i)user")
        child.sendline("root")
        child.expect("(?i)password")
        child.waitnoecho()
        child.sendline("hush hush")
        said = child.read()
        child.close()
        assert child.exitstatus == 0 and "hush" not in said


class TestPrivateFiles:
    @pytest.fixture(autouse=True)
    def saved(self, tmp_path, fake):
        fake.answers["GET /users"] = (200, [], {})
        for name, text in ((".mad_token", TOKEN), (".mad_url", fake.url)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o600)

    def listing(self, here, **environ):
        return here("user", "list", MAD_ADMIN_TOKEN=None, **environ)

    def test_are_made_private_under_any_umask(self, tmp_path):
        mask = os.umask(0)
        try:
            mad.Profile(str(tmp_path)).save("a.b.c", "http://box")
        finally:
            os.umask(mask)
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(".mad*")} == {
            ".mad_token": 0o600, ".mad_url": 0o600,
        }, "and nothing is left over"

    @pytest.mark.parametrize("name", [".mad_token", ".mad_url"])
    @pytest.mark.parametrize(
        "make, complaint",
        [
            (lambda path: path.symlink_to("elsewhere"), "is a symbolic link"),
            (lambda path: path.mkdir(), "is not a regular file"),
            (lambda path: os.mkfifo(path), "is not a regular file"),
            (lambda path: (path.write_text(TOKEN), path.chmod(0o666)), "can be written by others"),
            (lambda path: (path.write_bytes(b"\xff"), path.chmod(0o600)), "is not what mad wrote"),
        ],
        ids=["link", "folder", "pipe", "writable", "binary"],
    )
    def test_are_not_read_when_they_are_not_what_mad_wrote(self, here, fake, tmp_path, name, make, complaint):
        (tmp_path / "elsewhere").write_text(TOKEN)
        (tmp_path / name).unlink()
        make(tmp_path / name)
        done = self.listing(here)
        assert done.returncode == 3 and fake.seen == []
        assert done.stderr == f"mad: error: {tmp_path / name} {complaint}\nmad: hint: look at it, then remove it\n"

    def test_a_saved_token_never_stands_beside_the_address_of_another_server(self, tmp_path, monkeypatch):
        """A crash may come after any change of a name in the folder."""
        profile = mad.Profile(str(tmp_path))
        profile.save("old.x.y", "http://old")
        pairs = []

        def watched(change):
            def call(*args):
                change(*args)
                pairs.append((profile.token(), profile.url()))

            return call

        for name in ("unlink", "rename"):
            monkeypatch.setattr(os, name, watched(getattr(os, name)))
        profile.save("new.x.y", "http://new")
        assert pairs == [(None, "http://old"), (None, "http://new"), ("new.x.y", "http://new")]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_are_not_read_when_they_are_somebody_elses(self, here, fake, tmp_path):
        os.chown(tmp_path / ".mad_token", 12345, 12345)
        assert "belongs to somebody else" in self.listing(here).stderr and fake.seen == []

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
    def test_a_token_that_others_can_read_is_not_used(self, here, fake, tmp_path, mode):
        (tmp_path / ".mad_token").chmod(mode)
        done = self.listing(here)
        assert done.returncode == 3 and ".mad_token can be read by others" in done.stderr and fake.seen == []
        assert stat.S_IMODE((tmp_path / ".mad_token").stat().st_mode) == mode, "it must be seen that it was open"

    def test_a_token_that_others_can_read_is_ended_by_logging_out(self, here, fake, tmp_path):
        (tmp_path / ".mad_token").chmod(0o644)
        fake.answers["POST /logout"] = (200, {"success": True, "message": "x"}, {})
        assert here("session", "logout", MAD_ADMIN_TOKEN=None).returncode == 0
        assert not (tmp_path / ".mad_token").exists() and fake.seen[0][:2] == ("POST", "/logout")

    def test_the_address_of_the_server_is_no_secret(self, here, tmp_path):
        (tmp_path / ".mad_url").chmod(0o644)
        assert self.listing(here).returncode == 0

    @pytest.mark.parametrize("mode, status", [(0o600, 0), (0o640, 3), (0o644, 3)])
    def test_a_secret_may_stand_in_a_file_that_nobody_else_can_read(self, run, fake, tmp_path, mode, status):
        path = tmp_path / "secret"
        path.write_text("s%\nmore\n")
        os.chown(path, os.geteuid() or 12345, -1)  # root's file may be for a group: root says so
        path.chmod(mode)
        fake.answers["POST /token"] = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60}, {})
        done = run("token", "get", MAD_CLIENT_ID="a", MAD_CLIENT_SECRET_FILE=str(path))
        assert done.returncode == status and bool(fake.seen) is (status == 0), done.stderr
        both = run("token", "get", MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s", MAD_CLIENT_SECRET_FILE=str(path))
        assert both.returncode == 2 and "both set" in both.stderr

    @pytest.mark.parametrize("name", ["MAD_ADMIN_TOKEN", "MAD_CLIENT_SECRET"])
    def test_a_secret_of_the_environment_is_not_shown_to_others_once_read(self, name):
        code = f"import mad; print(mad.secret_variable({name!r})); print(open('/proc/self/environ').read())"
        environ = {"A": "1", name: "hush", "Z": f"2 {name}=kept", "PYTHONPATH": os.path.dirname(mad.__file__)}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.count("hush") == 1 and done.stdout.startswith("hush\n"), done.stderr
        assert "A=1\0" in done.stdout and f"Z=2 {name}=kept\0" in done.stdout

    def test_a_token_goes_to_the_path_that_issued_it(self, here, fake):
        assert self.listing(here, MAD_ADMIN_URL=fake.url + "/").returncode == 0
        done = self.listing(here, MAD_ADMIN_URL=fake.url + "/elsewhere")
        assert done.returncode == 3 and "--admin-url " + fake.url + "/elsewhere" in done.stderr and len(fake.seen) == 1

    def test_an_expired_login_is_not_sent(self, here, fake, tmp_path):
        (tmp_path / ".mad_token").write_text("e30.eyJleHAiOjF9.x")
        for words in (("user", "list"), ("session", "status")):
            done = here(*words, "--json", MAD_ADMIN_TOKEN=None)
            assert done.returncode == 3 and json.loads(done.stdout)["error"] == "token_expired"
        assert fake.seen == []

    @pytest.mark.parametrize("status, warned", [(200, False), (401, False), (404, False), (500, True)])
    def test_logout_tells_the_issuer_and_forgets_in_any_case(self, here, fake, tmp_path, status, warned):
        fake.answers["POST /logout"] = (status, {"success": status == 200, "message": "x"}, {})
        done = here("session", "logout", "--json", MAD_ADMIN_TOKEN=None, MAD_ADMIN_URL="http://127.0.0.1:9")
        assert (
            done.returncode == 0
            and json.loads(done.stdout)["success"] is True
            and ("stays good" in done.stderr) is warned
        )
        assert not (tmp_path / ".mad_token").exists() and fake.seen[0][:2] == ("POST", "/logout")


class TestTokenCache:
    ANSWER = {"access_token": TOKEN, "expires_in": 100}

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return mad.TokenCache("http://box", "a", "", "s")

    @pytest.mark.parametrize("later, found", [(0, 100), (69, 31), (70, None), (101, None), (-29, 129), (-31, None)])
    def test_a_token_is_good_until_it_has_thirty_seconds_left(self, cache, later, found):
        cache.store(self.ANSWER, 1_000_000)
        answer = cache.find(1_000_000 + later)
        assert (answer and answer["expires_in"]) == found

    def test_what_others_could_have_written_is_not_used(self, cache):
        cache.store(self.ANSWER, 1_000_000)
        assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700 and cache.find(1_000_000)
        os.chmod(cache.folder, 0o777)
        assert cache.find(1_000_000) is None

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o755])
    def test_no_token_is_written_where_others_could_read_or_replace_it(self, cache, mode):
        os.makedirs(cache.folder)
        os.chmod(cache.folder, mode)
        cache.store(self.ANSWER, 1_000_000)
        assert os.listdir(cache.folder) == []

    def test_no_token_is_written_through_a_link(self, cache, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "elsewhere").mkdir(0o700)
        os.symlink(tmp_path / "elsewhere", cache.folder)
        cache.store(self.ANSWER, 1_000_000)
        assert os.listdir(tmp_path / "elsewhere") == []

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "{", '{"answer":{"access_token":"a b"},"stored_at":0,"expires_at":9e9}']
    )
    def test_a_damaged_file_is_no_token(self, cache, text):
        cache.store(self.ANSWER, 1_000_000)
        with open(cache.path, "w") as file:
            file.write(text)
        assert cache.find(1_000_000) is None

    @pytest.mark.parametrize("ttl", [None, True, "100", 30, -1, 1e300])
    def test_a_life_that_is_not_told_is_not_guessed(self, cache, ttl):
        cache.store({"access_token": TOKEN, "expires_in": ttl}, 1_000_000)
        assert cache.find(1_000_000) is None

    def test_expired_ones_are_swept(self, cache):
        cache.store(self.ANSWER, 1_000_000)
        mad.TokenCache("http://box", "b", "", "s").store(self.ANSWER, 2_000_000)
        assert len(os.listdir(cache.folder)) == 1

    def test_no_cache_is_no_failure(self, here, fake, tmp_path):
        fake.answers["POST /token"] = (200, self.ANSWER, {})
        (tmp_path / ".cache").write_text("a file where a folder should be")
        assert (
            here("token", "get", MAD_AUTH_URL=fake.url, MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s").stdout == TOKEN + "\n"
        )

    def test_a_home_that_is_not_there_is_not_made(self, here, fake, tmp_path):
        fake.answers["POST /token"] = (200, self.ANSWER, {})
        home = tmp_path / "home"
        done = here("token", "get", HOME=str(home), MAD_AUTH_URL=fake.url, MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s")
        assert (done.returncode, done.stdout, done.stderr) == (0, TOKEN + "\n", "") and not home.exists()

    @pytest.mark.parametrize("root", ["", "cache", "./cache"])
    def test_a_folder_that_is_not_absolute_is_ignored(self, tmp_path, monkeypatch, root):
        """XDG Base Directory Specification"""
        monkeypatch.setenv("XDG_CACHE_HOME", root)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert mad.TokenCache("http://box", "a", "", "s").folder == str(tmp_path / ".cache" / "mad")

    @pytest.mark.parametrize("other", range(4))
    def test_a_token_is_found_by_who_asks_for_the_same_with_the_same_secret(self, cache, other):
        cache.store(self.ANSWER, 1_000_000)
        asked = ["http://box", "a", "", "s"]
        assert mad.TokenCache(*asked).find(1_000_000)
        asked[other] += "x"
        assert mad.TokenCache(*asked).find(1_000_000) is None

    @pytest.mark.parametrize("ttl, found", [(30, False), (31, True), (999_999_999, True), (1_000_000_000, False)])
    def test_a_life_too_short_to_be_found_or_too_long_to_be_true_is_not_stored(self, cache, ttl, found):
        cache.store(self.ANSWER | {"expires_in": ttl}, 1_000_000)
        assert os.path.exists(cache.path) is found

    def test_a_named_cache_folder_is_made_with_its_parents(self, cache):
        """XDG Base Directory Specification: a folder that does not exist is made, with mode 0700."""
        cache.store(self.ANSWER, 1_000_000)
        assert stat.S_IMODE(os.stat(os.path.dirname(cache.folder)).st_mode) == 0o700 and cache.find(1_000_000)


class TestMarks:
    """A token that was revoked here is not handed out again."""

    TOKENS = tuple(
        "eyJhbGciOiJub25lIn0."
        + base64.urlsafe_b64encode(json.dumps({"jti": jti, "exp": 4102444800}).encode()).decode().rstrip("=")
        + ".AAAA"
        for jti in ("first", "second")
    )

    @pytest.fixture
    def beside(self, here, fake, tmp_path, monkeypatch):
        """Run mad token get in the folder of a server, whose next tokens are TOKENS."""
        monkeypatch.chdir(tmp_path)
        tokens = itertools.cycle(self.TOKENS)
        fake.answer = lambda method, path: (200, {"access_token": next(tokens), "expires_in": 9999}, {})

        def get(*words):
            done = here("token", "get", *words, MAD_AUTH_URL=fake.url, MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s")
            assert done.returncode == 0 and done.stderr == ""
            return self.TOKENS.index(done.stdout.strip())

        get.marks = ChangeMarks("tokens.marks", fake.server_port)
        return get

    @pytest.mark.parametrize("key, asked", [("first", 1), ("", 1), ("another", 0)])
    def test_a_token_is_asked_for_again_when_its_mark_has_changed(self, beside, fake, key, asked):
        assert beside() == beside() == 0 and len(fake.seen) == 1, "a check costs no request"
        beside.marks.touch(key)
        assert beside() == beside() == asked and len(fake.seen) == 1 + asked

    def test_and_after_each_start_of_the_server(self, beside, fake):
        assert beside() == 0
        ChangeMarks("tokens.marks", fake.server_port)
        assert beside() == beside() == 1

    def test_marks_of_another_server_or_of_nobody_known_say_nothing(self, beside, fake, monkeypatch):
        assert beside() == 0
        ChangeMarks("tokens.marks", 1)
        assert beside() == 0
        beside("--no-cache")
        ChangeMarks("tokens.marks", fake.server_port)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        assert mad.Context.marks(mad.Context({}, ()), mad.Url(fake.url)) is not None, "root's are believed"
        os.chown("tokens.marks", 4712, -1)
        assert mad.Context.marks(mad.Context({}, ()), mad.Url(fake.url)) is None

    @pytest.mark.parametrize("content", [b"", b"madmark1", b"x" * 99, b"madmark1" + bytes(90)])
    def test_a_damaged_file_of_marks_is_none(self, beside, content, tmp_path):
        (tmp_path / "tokens.marks").write_bytes(content)
        assert beside() == beside() == 0

    def test_a_token_of_before_is_asked_for_again(self, beside, tmp_path):
        (tmp_path / "tokens.marks").rename(tmp_path / "away")
        assert beside() == 0
        (tmp_path / "away").rename(tmp_path / "tokens.marks")
        assert beside() == 1

    def test_fresh_replaces_what_is_kept_wherever_the_server_is(self, beside, tmp_path):
        (tmp_path / "tokens.marks").unlink()
        assert beside() == 0 and beside("--fresh") == 1 and beside() == 1


class TestBox:
    """Beside a box mad finds it by its mad.conf."""

    @pytest.mark.parametrize(
        "conf, admin, auth",
        [
            ("", "http://localhost:9041", "http://localhost:9040"),
            ("admin-port = 81 # port\nauth-port=80", "http://localhost:81", "http://localhost"),
            ("auth-ip = 0.0.0.0\nadmin-ip = ::1", "http://localhost:9041", "http://localhost:9040"),
            ("auth-ip = 192.0.2.7\nadmin-ip = 2001:db8::7", "http://[2001:db8::7]:9041", "http://192.0.2.7:9040"),
            (
                'auth-ssl-cert = "c.pem"\nadmin-ssl-cert-file = c.pem\nauth-domain = id.example:8443\nadmin-domain = box.local',
                "https://box.local:9041", "https://id.example:9040",
            ),
            ("auth-ssl-cert = c\noidc-issuer = https://id.example:1/auth", "http://localhost:9041", "https://id.example:9040"),
            (
                "tls = self\noidc-issuer = https://box.local:9040\nadmin-domain = box.local\nauth-ip = ::\nadmin-ip = ::",
                "https://box.local:9041", "https://box.local:9040",
            ),
            ("TLS = self # its own", "https://localhost:9041", "https://localhost:9040"),
            ("; auth-port = 1\nauth-port = x\nnonsense", "http://localhost:9041", "http://localhost:9040"),
        ],
    )
    def test_its_ports_and_names(self, tmp_path, monkeypatch, conf, admin, auth):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mad.conf").write_text(conf)
        (tmp_path / "mad.conf").chmod(0o600)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("MAD_ADMIN_URL", "MAD_AUTH_URL", "MAD_CONFIG"):
            monkeypatch.delenv(name, raising=False)
        context = mad.Context({}, ())
        assert (context.admin_url().text, context.auth_url().text) == (admin, auth)

    def test_what_is_said_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("MAD_ADMIN_URL", raising=False)
        (tmp_path / "mad.conf").write_text("admin-port = 81\nauth-port = 80")
        (tmp_path / "mad.conf").chmod(0o600)
        assert mad.Context({}, ()).admin_url().text == "http://localhost:81"
        mad.Profile().save(TOKEN, "http://localhost:82")
        assert mad.Context({}, ()).admin_url().text == "http://localhost:82"
        monkeypatch.setenv("MAD_ADMIN_URL", "http://localhost:83")
        assert mad.Context({}, ()).admin_url().text == "http://localhost:83"
        assert mad.Context({"admin-url": "http://localhost:84"}, ()).admin_url().text == "http://localhost:84"

    @pytest.mark.parametrize("mode, owner", [(0o602, 0), (0o620, 0), (0o600, 4711)])
    def test_a_file_that_others_could_have_written_names_no_server(self, tmp_path, monkeypatch, mode, owner):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mad.conf").write_text("auth-port = 80")
        (tmp_path / "mad.conf").chmod(mode)
        os.chown(tmp_path / "mad.conf", owner, -1)
        assert mad.Box.find() is None

    @pytest.mark.parametrize(
        "path, db_file, folder",
        [
            ("mad.conf", "data/mad.db3", "{here}/data"), ("/etc/microauthd/mad.conf", "", "/var/lib/microauthd"),
            ("/etc/microauthd/mad.conf", "/srv/box/mad.db3", "/srv/box"), ("/opt/box/mad.conf", "mad.db3", "/opt/box"),
        ],
    )
    def test_its_data_folder(self, tmp_path, monkeypatch, path, db_file, folder):
        monkeypatch.chdir(tmp_path)
        assert mad.Box(path, {"db-file": db_file}).folder == folder.format(here=tmp_path)

    @pytest.mark.parametrize("certificate", ["admin-ssl-cert-file = c.pem", "tls = self"])
    def test_its_own_authority_is_trusted_there_and_its_name_need_not_resolve(
        self, here, tmp_path, raw, monkeypatch, certificate
    ):
        monkeypatch.chdir(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(make_certificate(tmp_path, "box.invalid"))
        raw(OK + b"Content-Length: 2\r\n\r\n{}", context=context)
        (tmp_path / "mad.conf").write_text(
            f"{certificate}\nadmin-domain = box.invalid\nadmin-port = {raw.port}\n"
        )
        (tmp_path / "mad.conf").chmod(0o600)
        ask = ("role", "get", "--id", USER["id"], "--json")
        assert "no secure connection" in here(*ask).stderr + here(*ask).stdout
        os.rename(tmp_path / "certificate.pem", tmp_path / "ca.pem")
        assert here(*ask).returncode == 0, here(*ask)
        (tmp_path / "ca.pem").chmod(0o666)
        assert here(*ask).returncode == 4


# == Arguments ==================================================================

class TestArguments:
    @pytest.mark.parametrize("words", [("--id", "ann"), ("--id=ann",), ("--id:ann",)])
    def test_values_in_each_form(self, run, fake, words):
        fake.answers["GET /users/id-by-name/ann"] = (200, {"result": USER["id"]}, {})
        fake.answers["GET /users/" + USER["id"]] = (200, USER, {})
        done = run("user", "get", *words, "--json")
        assert json.loads(done.stdout) == USER, done

    def test_a_value_may_begin_with_hyphens(self, run, fake):
        fake.answers["POST /users"] = (200, USER, {})
        run("user", "create", "--username", "ann", "--user-email", "a@b", "--user-password", "--hush-hush")
        assert json.loads(fake.seen[-1][3])["password"] == "--hush-hush"

    def test_a_password_comes_from_stdin(self, run, fake):
        fake.answers["POST /users"] = (200, USER, {})
        assert (
            run(
                "user", "create", "--username", "ann", "--user-email", "a@b", "--password-stdin", input="from stdin\n"
            ).returncode
            == 0
        )
        assert json.loads(fake.seen[-1][3])["password"] == "from stdin"

    @pytest.mark.parametrize("words, sent", [(["--verified"], True), (["--verified", "false"], False), ([], None)])
    def test_an_address_is_verified_at_creation(self, run, fake, words, sent):
        fake.answers["POST /users"] = (200, USER, {})
        run("user", "create", "--username", "ann", "--user-email", "a@b", "--user-password", "hush", *words)
        assert json.loads(fake.seen[-1][3]).get("email_verified") is sent

    def test_ids_cannot_leave_their_path(self, run, fake):
        run("user", "get", "--id", "../clients?x=#y")
        assert fake.seen[-1][1] == "/users/id-by-name/..%2Fclients%3Fx%3D%23y"
        run("user", "get", "--id", "..?x=#y")
        assert fake.seen[-1][1].startswith("/users/id-by-name/") and not set("?#") & set(fake.seen[-1][1])

    def test_quiet_prints_ids(self, run, fake):
        fake.answers["GET /users"] = (200, [USER], {})
        assert run("user", "list", "--quiet").stdout == USER["id"] + "\n"


class TestOptions:
    @pytest.mark.parametrize(
        "words, found",
        [
            (["--public"], {"public": True}), (["--public", "FALSE"], {"public": False}),
            (["--public:true"], {"public": True}), (["--secret", "--"], {"secret": "--"}),
            (["--secret=a=b:c"], {"secret": "a=b:c"}), (["--secret", "--json"], {"secret": "--json"}),
            (["--secret", "@file"], {"secret": "@file"}),
            (["--grant", "a", "b", "--grant=c"], {"grant": ["a", "b", "c"]}),
            (["--gen-password", "12"], {"gen-password": 12}), (["--display-name", ""], {"display-name": ""}),
            (["--secret", "-h"], {"secret": "-h"}),
        ],
    )
    def test_are_read_as_they_are_meant(self, words, found):
        parsed = parsed_of("--client-id", "x", *words)
        assert parsed.errors == [] and not parsed.help_requested and parsed.options == {"client-id": "x"} | found

    @pytest.mark.parametrize(
        "words, error",
        [
            (["--publi"], "unknown option '--publi'"), (["-p"], "unknown option '-p'"), (["x"], "unexpected word 'x'"),
            (["--", "--public"], "unexpected word '--public'"), (["--secret"], "--secret needs a value"),
            (["--secret="], "--secret is blank"), (["--public=yes"], "--public is true or false"),
            (["--secret", "a", "--secret", "b"], "--secret is given twice"),
            (["--gen-password", "x"], "--gen-password is a whole number"),
            (["--gen-password", "7"], "--gen-password is at least 8"),
            (["--secret", "a", "--secret-stdin"], "--secret and --secret-stdin exclude each other"),
            (["--secret", "\udcff"], "--secret is not valid UTF-8"),
        ],
    )
    def test_are_refused_when_they_are_wrong(self, words, error):
        assert parsed_of("--client-id", "x", *words).errors == [error]

    @pytest.mark.parametrize("name", ["MAD_CLIENT_ID", "MAD_CLIENT_SECRET"])
    def test_a_variable_that_is_not_utf8_is_named(self, here, name):
        environ = {"MAD_CLIENT_ID": "a", "MAD_CLIENT_SECRET": "s", "MAD_AUTH_URL": "https://localhost:1"}
        done = here("token", "get", **(environ | {name: "p\udce9"}))
        assert done.returncode and "Traceback" not in done.stderr and done.stderr.startswith("mad: error: ")
        assert name in done.stderr or "\\udce9" in done.stderr

    def test_one_that_is_wrong_is_not_missing_as_well(self):
        words = ["--id", "ann", "--until", "tomorrow"]
        error, = parsed_of(*words, name="user set-lockout").errors
        assert error.startswith("--until is an ISO 8601 date-time")

    def test_an_update_changes_something(self):
        assert parsed_of("--id", "x", name="user update").errors == [
            "nothing to change: give at least one of --username, --email, --is-active"
        ]
        assert parsed_of("--id", "x", "--is-active=false", name="user update").errors == []

    def test_a_blank_id_does_not_become_every_id(self, here):
        done = here("user", "delete", "--id=")
        assert done.returncode == 2 and done.stderr.startswith("mad: error: --id is blank\n")
        assert here("user", "delete", "--id", "..").stderr == "mad: error: an id or a name is needed here, not '..'\n"

    def test_a_near_word_is_suggested(self, here):
        assert "did you mean --username?" in here("user", "create", "--usrname", "x").stderr
        assert (
            "did you mean mad user list?" in here("user", "lst").stderr
            and "did you mean mad client?" in here("clint").stderr
        )

    def test_a_made_secret_has_the_length_asked_for_and_is_not_lost(self, here, fake):
        fake.answers["POST /clients"] = (200, {"id": USER["id"], "client_id": "door"}, {})
        done = here("client", "create", "--client-id", "door", "--gen-password", "40", "--json", MAD_ADMIN_URL=fake.url)
        secret = json.loads(done.stdout)["client_secret"]
        assert len(secret) == 40 and json.loads(fake.seen[0][3])["client_secret"] == secret
        assert here("client", "create", "--client-id", "door", "--quiet").returncode == 2 and len(fake.seen) == 1
        assert here("client", "create", "--client-id", "door", "--quiet", "--public").stdout == USER["id"] + "\n"

    def test_a_switch_that_is_turned_on_warns_once_it_is(self, here, fake):
        def messages(*words):
            done = here("client", *words, MAD_ADMIN_URL=fake.url)
            return json.loads(fake.seen[-1][3]), done.stderr.splitlines()

        client = {"id": USER["id"], "client_id": "lan", "allow_http_redirects": True, "allow_short_schemes": False}
        path, update = f"/clients/{USER['id']}", ("update", "--id", USER["id"])
        fake.answers |= {at: (200, client, {}) for at in ("POST /clients", "GET " + path, "PUT " + path)}
        body, said = messages("create", "--client-id", "lan", "--allow-http-redirects")
        assert body["allow_http_redirects"] is True and "allow_short_schemes" not in body
        assert len(said) == 1 and said[0].startswith("mad: warning: codes may travel in clear")
        body, said = messages(*update, "--allow-http-redirects", "false", "--allow-short-schemes", "true")
        assert body == {"allow_http_redirects": False, "allow_short_schemes": True}
        assert len(said) == 1 and said[0].startswith("mad: warning: another program may register a short scheme")
        assert messages(*update, "--allow-http-redirects", "false")[1] == []
        shown = here("client", "get", "--id", USER["id"], MAD_ADMIN_URL=fake.url).stdout
        assert "allow http redirects:  yes" in shown and "allow short schemes:   no" in shown
        fake.answers["PUT " + path] = (400, {"success": False, "message": "No.", "error": "invalid_request"}, {})
        assert "warning" not in str(messages(*update, "--allow-http-redirects", "true")[1])


class TestResponseFiles:
    def test_stand_for_their_words_among_the_options(self, tmp_path):
        (tmp_path / "words").write_text('# of ann\n--user-email "ann of home@b"\n\n  --user-password @hush\n')
        parsed = parsed_of("--username", "@ann", f"@{tmp_path}/words", "--json", name="user create")
        assert parsed.errors == [] and parsed.options == {
            "username": "@ann", "user-email": "ann of home@b", "user-password": "@hush", "json": True,
        }

    def test_may_hold_the_command_itself(self, here, fake, tmp_path):
        fake.answers["GET /users"] = (200, [USER], {})
        (tmp_path / "words").write_text("user list --quiet")
        assert here(f"@{tmp_path}/words", MAD_ADMIN_URL=fake.url).stdout == USER["id"] + "\n"

    @pytest.mark.parametrize(
        "content, told",
        [
            (None, "cannot read"), (b"\xff", "is not text"), (b'--q "x', "a quote without its end"),
            (b"x" * 70_000, "too long"), (b"@words", "too many files"),
        ],
    )
    def test_that_are_none_are_bad_usage(self, here, tmp_path, monkeypatch, content, told):
        monkeypatch.chdir(tmp_path)
        if content:
            (tmp_path / "words").write_bytes(content)
        done = here("user", "list", "@words", "--json")
        assert done.returncode == 2 and told in json.loads(done.stdout)["message"]


ORIGINAL = """
session login --admin-url http://localhost:9041 --json
session logout --json
session status --json
user create --username ann --user-email a@b --user-password hush
user totp-qr --id ID --client-id ID --output-path qr
user totp-verify --user-id ID --client-id ID --code 123456
user disable-totp --user-id ID --client-id ID
user update --id ID --username bea --email b@c --is-active
user update --id ID --is-active False
user verify-email --id ID
user reset-password --id ID --new-password hush
user list --admin-token TOKEN --admin-url:http://localhost:9041/
user get --id:ID
user deactivate --id ID
user activate --id ID
user delete --id ID
user set-lockout --id ID --until PERMANENT
user set-lockout --id ID --until 2030-01-31T12:00:00+01:00
user clear-lockout --id ID
role create --name Operator --description x
role create --name=Operator --json
role update --id ID --name x --description y
role list --json=true
role get --id ID
role delete --id ID
role assign --user-id ID --role-id ID
role unassign --role-id ID --user-id ID
permission create --name door
permission update --id ID --name gate
permission list
permission get --id ID
permission delete --id ID
permission assign --role-id ID --permission-id ID
permission remove --role-id ID --permission-id ID
permission list-for-role --role-id ID
permission list-for-user --user-id ID
permission check-access --user-id ID --permission-id ID
scope create --name read
scope update --id ID --description x
scope list
scope get --id ID
scope delete --id ID
scope assign-to-user --user-id ID --scope-id ID ID --scope-id ID
scope list-for-user --user-id ID
scope remove-from-user --user-id ID --scope-id ID
scope assign-to-client --client-id ID --scope-id ID ID
scope list-for-client --client-id ID
scope remove-from-client --client-id ID --scope-id ID
client create --client-id app --secret hush --display-name App --audience api
client create --client-id app --gen-password 32
client update --id ID --client-id new --display-name x --is-active true --audience y
client change-secret --id ID --secret hush
client change-secret --id ID
client list
client get --id ID
client delete --id ID
client add-redirect-uri --id ID --uri https://app.example/callback
client list-redirect-uris --client-id ID
client delete-redirect-uri --id ID
client set-flag --client-id ID --flag ENABLE_TOTP --enable true
client get-flag --client-id ID --flag ENABLE_TOTP
client set-flag-options --client-id ID --flag TOKEN_EXPIRATION --options 600
client get-flag-options --client-id ID --flag TOKEN_EXPIRATION
client add-idp --id ID --provider-key google --display-name Google \
--issuer https://accounts.google.com --external-client-id 1
client update-idp --id ID --idp-id ID --provider-key google --display-name Google \
--issuer https://accounts.google.com --external-client-id 1 --scopes openid
client list-idps --id ID
client delete-idp --id ID --idp-id ID
client assign-scope --client-id ID --scope-id ID ID
client list-scopes --client-id ID
client remove-scope --client-id ID --scope-id ID
sessionctl list
sessionctl introspect --token TOKEN
sessionctl get --id ID
sessionctl list-by-user --user-id ID
sessionctl revoke --id ID
sessionctl purge --older-than 3600 --expired --revoked
refreshtoken list
refreshtoken list-by-user --user-id ID
refreshtoken get --id ID
refreshtoken purge-refresh --older-than 3600 --expired
auditlog list --user-id ID --action user_created --limit -1
auditlog get --id ID
auditlog purge --days 30
token --token TOKEN
"""


class TestTheOriginal:
    @pytest.mark.parametrize("typed", ORIGINAL.strip().splitlines())
    def test_its_command_lines_are_understood(self, typed):
        words = typed.replace("ID", USER["id"]).replace("TOKEN", TOKEN).split()
        command = next(one for one in mad.COMMANDS if one.name in (" ".join(words[:2]), words[0]))
        assert mad.parse(command, words[len(command.name.split()) :]).errors == []

    def test_its_scripts_are_asked_nothing(self, run, fake):
        fake.answers[f"DELETE /users/{USER['id']}"] = (200, {"success": True, "message": "Gone."}, {})
        assert run("user", "delete", "--id", USER["id"], "--json").stdout == '{"success":true,"message":"Gone."}\n'


# == Output =====================================================================

class TestOutput:
    def test_control_characters_are_shown_not_sent(self, run, fake):
        fake.answers["GET /users"] = (200, [USER | {"username": "a\x1b[2Jb\r\n\u202ec"}], {})
        assert "  a\\x1b[2Jb\\r\\n\\u202ec  " in run("user", "list").stdout.splitlines()[2]

    def test_a_secret_that_was_made_is_shown_also_as_json(self, run, fake):
        fake.answers["POST /clients"] = (
            200,
            {
                "id": USER["id"], "client_id": "door", "display_name": "", "is_active": True,
                "created_at": "2026-01-01T00:00:00Z", "audience": "x", "client_secret": "made-by-the-server",
            },
            {},
        )
        assert (
            json.loads(run("client", "create", "--client-id", "door", "--json").stdout)["client_secret"]
            == "made-by-the-server"
        )
        assert "made-by-the-server" in run("client", "create", "--client-id", "door").stdout

    def test_the_inspector(self, run):
        done = run("token", "--token", TOKEN)
        assert done.returncode == 0 and "root-id" in done.stdout and "2100-01-01 00:00:00 UTC" in done.stdout
        done = run("token", "--token", "nonsense")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "mad: error: not a JWT: it has 1 parts instead of three\n"

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_scripts(self, run, shell):
        assert "change-secret" in run("completion", shell).stdout


class TestTables:
    ROWS = [{"id": USER["id"], "username": "a" * 30, "email": "\u6f22" * 30, "is_active": False}]

    @pytest.mark.parametrize("width", [1, 20, 60, 80, 200])
    def test_they_fit_the_terminal(self, monkeypatch, width):
        monkeypatch.setattr(mad, "terminal_width", lambda: width)
        for line in mad.table("users", "id", "username", "email", "is_active")(self.ROWS):
            assert mad.display_width(line) <= width

    def test_an_id_is_cut_last(self, monkeypatch):
        monkeypatch.setattr(mad, "terminal_width", lambda: 80)
        assert USER["id"] in mad.table("users", "id", "username", "email", "is_active")(self.ROWS)[2]

    def test_nothing_is_cut_where_there_is_no_terminal(self, here, fake):
        fake.answers["GET /users"] = (200, self.ROWS, {})
        assert "\u6f22" * 30 in here("user", "list", MAD_ADMIN_URL=fake.url).stdout

    def test_nothing_is_said_of_nobody(self, here, fake):
        fake.answers["GET /users"] = (200, [], {})
        assert here("user", "list", MAD_ADMIN_URL=fake.url).stdout == "(no users)\n"
        assert here("user", "list", "--quiet").stdout == ""


# == Context ====================================================================

class TestRoutes:
    def test_a_missing_route_is_not_told_as_a_missing_thing(self, here, fake):
        fake.answer = lambda *_: (
            404, {"success": False, "message": "No.", "error": "not_found"}, {"X-Not-Found": "route"},
        )
        for words in (("role", "get", "--id", "Boss"), ("role", "get", "--id", USER["id"])):
            done = here(*words, "--json", MAD_ADMIN_URL=fake.url)
            assert done.returncode == 1 and "there is no role" not in done.stderr
            assert json.loads(done.stdout)["error"] == "not_found" and json.loads(done.stdout)["message"].startswith(
                "this server has no GET /roles/"
            )

    def test_a_part_is_known_by_its_name(self, here, fake):
        client, record = "/clients/" + USER["id"], "8b1c0000-0000-4000-8000-000000000002"
        fake.answers = {
            "GET /clients/id-by-name/app": (200, {"result": USER["id"]}, {}),
            f"GET {client}/idp": (200, [{"id": record, "provider_key": "google"}], {}),
            f"DELETE {client}/idp/{record}": (200, {"success": True, "message": "Gone."}, {}),
            f"GET {client}/redirect-uris": (200, [{"id": record, "redirect_uri": "https://a/b"}], {}),
            f"DELETE {client}/redirect-uris/{record}": (200, {"success": True, "message": "Gone."}, {}),
            "DELETE /clients/redirect-uris": (200, {"success": True, "message": "Gone."}, {}),
        }
        assert here("client", "delete-idp", "--id", "app", "--idp-id", "google", MAD_ADMIN_URL=fake.url).returncode == 0
        assert here("client", "delete-redirect-uri", "--id", "https://a/b", "--client-id", "app").returncode == 0
        assert (
            here("client", "delete-redirect-uri", "--id", record).returncode == 0 and fake.seen[-1][3] == f'"{record}"'
        )
        before = len(fake.seen)
        assert here("client", "delete-redirect-uri", "--id", "https://a/b").returncode == 2 and len(fake.seen) == before
        assert (
            here("client", "get-idp", "--id", "app", "--idp-id", "apple").stderr
            == "mad: error: there is no 'apple' there\n"
        )

    def test_a_list_may_be_called_in_the_singular(self, here, fake):
        fake.answers[f"GET /clients/{USER['id']}/cors-origins"] = (200, [], {})
        assert (
            here("client", "list-cors-origin", "--client-id", USER["id"], MAD_ADMIN_URL=fake.url).stdout
            == "(no URIs)\n"
        )

    def test_moments_are_sent_in_utc(self, here, fake):
        fake.answers["GET /audit-logs"] = (200, [], {})
        for typed, sent in (
            ("2030-01-31T12:00:00+01:00", "2030-01-31T11:00:00Z"), ("2030-01-31", "2030-01-31T00:00:00Z"),
            ("1900000000", "2030-03-17T17:46:40Z"),
        ):
            assert here("audit", "list", "--since", typed, MAD_ADMIN_URL=fake.url).returncode == 0
            assert fake.seen[-1][1] == "/audit-logs?since=" + sent.replace(":", "%3A") + "&limit=100"
        assert (
            here("audit", "list", "--until", "soon").returncode
            == here("user", "set-lockout", "--id", "bob", "--until", "soon").returncode
            == 2
        )

    def test_a_password_is_checked_not_chosen(self, fake, tmp_path):
        fake.answers["POST /users/verify-password"] = (
            200, {"valid": True, "user_id": USER["id"], "email": "a@b", "totp_required": False}, {},
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {
            "HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "MAD_ADMIN_URL": fake.url,
        }
        child = pexpect.spawn(
            sys.executable, [str(ROOT / "mad.py"), "user", "verify-password", "--id", "ann"], env=env, encoding="utf-8",
            timeout=60,
        )
        child.expect_exact("password: ")
        child.waitnoecho()
        child.sendline("hush hush")
        assert "right for a@b" in child.read()
        assert json.loads(fake.seen[0][3]) == {"username": "ann", "password": "hush hush"}


class TestConfirmation:
    """Nothing destructive happens on a terminal without the name typed or --yes."""

    @pytest.fixture
    def typed(self, fake, tmp_path):
        fake.answer = lambda method, path: (
            200, {"result": USER["id"]} if method == "GET" else {"success": True, "message": "Gone."}, {},
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {
            "HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "MAD_ADMIN_URL": fake.url,
        }

        def call(words, question=None, answer=""):
            fake.seen.clear()
            child = pexpect.spawn(
                sys.executable, [str(ROOT / "mad.py"), *words.split()], env=env, encoding="utf-8", timeout=60
            )
            if question:
                child.expect_exact(question)
                child.sendline(answer)
            child.expect(pexpect.EOF)
            child.close()
            return child.exitstatus, len(fake.seen)

        return call

    @pytest.mark.parametrize(
        "words, question, answer, ended",
        [
            ("user delete --id bob", "type bob to confirm: ", "bob", (0, 2)),
            ("user delete --id bob", "type bob to confirm: ", "bo", (2, 0)),
            ("user delete --id bob", "type bob to confirm: ", "", (2, 0)),
            ("user delete --id bob --yes", None, "", (0, 2)), ("audit purge --days 3", "go on? [y/N] ", "y", (0, 1)),
            ("audit purge --days 3", "go on? [y/N] ", "", (2, 0)), ("user deactivate --id bob", None, "", (0, 2)),
        ],
    )
    def test_is_asked_for(self, typed, words, question, answer, ended):
        assert typed(words, question, answer) == ended

    def test_what_destroys_is_marked(self):
        marked = {command.name for command in mad.COMMANDS if command.confirm_by is not None}
        destructive = {
            command.name
            for command in mad.COMMANDS
            if command.name.split()[-1].startswith(("delete", "purge", "disable-"))
            or command.name
            in ("user revoke", "client revoke", "session revoke-all", "sessionctl revoke-all", "key revoke", "brand reset")
        }
        assert marked == destructive


class TestConsents:
    """What a user allowed clients is listed and taken back by id or name."""

    BOB, WEB = "0" * 8 + "-0000-4000-8000-" + "0" * 12, "1" * 8 + "-0000-4000-8000-" + "1" * 12

    @pytest.fixture
    def known(self, fake):
        fake.answers |= {
            "GET /users/id-by-name/bob": (200, {"result": self.BOB}, {}),
            "GET /clients/id-by-name/web": (200, {"result": self.WEB}, {}),
            f"GET /users/{self.BOB}/consents": (
                200,
                [
                    {
                        "client_id": "web", "display_name": "The Web", "scopes": ["email", "openid"],
                        "given_at": "2026-05-01T10:00:00Z",
                    }
                ],
                {},
            ),
            f"DELETE /users/{self.BOB}/consents/{self.WEB}": (200, {"success": True, "message": "Revoked."}, {}),
        }

    def test_they_are_listed(self, run, known):
        done = run("user", "consents", "--id", "bob")
        titles, _, row = done.stdout.splitlines()
        assert done.returncode == 0 and titles.split("  ")[0] == "CLIENT ID"
        assert row.split("  ")[0] == "web" and '["email", "openid"]' in row and "2026-05-01 10:00:00Z" in row
        assert json.loads(run("user", "consents", "--id", self.BOB, "--json").stdout)[0]["client_id"] == "web"

    def test_one_is_taken_back(self, run, fake, known):
        done = run("user", "revoke-consent", "--id", "bob", "--client-id", "web")
        assert (done.returncode, done.stderr) == (0, "") and fake.seen[-1][:2] == (
            "DELETE", f"/users/{self.BOB}/consents/{self.WEB}",
        )
        fake.answers.pop(f"DELETE /users/{self.BOB}/consents/{self.WEB}")
        assert run("user", "revoke-consent", "--id", "bob", "--client-id", "web").returncode != 0
        assert run("user", "revoke-consent", "--id", "bob").returncode == 2


class TestTerminal:
    MAD = [sys.executable, str(ROOT / "mad.py")]

    @pytest.fixture
    def env(self, tmp_path):
        return {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {
            "HOME": str(tmp_path)
        }

    @pytest.mark.parametrize("code, status", [("123456", 0), ("", 1)])
    def test_a_code_is_asked_for_once_after_a_refusal(self, fake, env, code, status):
        good = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60}, {})
        fake.answer = lambda method, path: (
            good
            if "totp=123456" in fake.seen[-1][3]
            else (403, {"success": False, "message": "No.", "error": "invalid_grant"}, {})
        )
        child = pexpect.spawn(
            self.MAD[0], [self.MAD[1], "session", "login", "--admin-url", fake.url, "--username", "root"], env=env,
            encoding="utf-8", timeout=60,
        )
        child.expect_exact("password: ")
        child.waitnoecho()
        child.sendline("hush hush")
        child.expect_exact("one-time code (blank if none): ")
        child.sendline(code)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == status and len(fake.seen) == (2 if code else 1)

    def test_ctrl_c_is_silent(self, env):
        child = pexpect.spawn(
            self.MAD[0], [self.MAD[1], "session", "login", "--username", "root"], env=env, encoding="utf-8", timeout=60
        )
        child.expect_exact("password: ")
        child.waitnoecho()
        child.sendintr()
        assert "Traceback" not in child.read()
        child.close()
        assert child.exitstatus == 130

    def test_a_reader_that_has_seen_enough_is_no_failure(self, env):
        done = subprocess.run(
            ["bash", "-c", '"$@" | head -1; echo "${PIPESTATUS[0]}"', "_", *self.MAD, "completion", "fish"], env=env,
            capture_output=True, text=True,
        )
        assert done.stdout == "# completion of mad for fish\n0\n" and done.stderr == ""

    def test_an_answer_that_cannot_be_written_is_one(self, env):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*self.MAD, "completion", "bash"], env=env, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1 and done.stderr == "mad: error: cannot write the answer: No space left on device\n"


# == Handlers ===================================================================

class TestTokenGet:
    def test_it_is_cached_by_secret_and_scope(self, run, fake, tmp_path):
        fake.answers["POST /token"] = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 3600}, {})
        environ = {"MAD_CLIENT_ID": "a:b", "MAD_CLIENT_SECRET": "s%"}
        for _ in range(2):
            done = run("token", "get", **environ)
            assert done.stdout == TOKEN + "\n", done.stderr
        assert len(fake.seen) == 1
        import base64

        assert base64.b64decode(fake.seen[0][2]["Authorization"].split()[1]) == b"a%3Ab:s%25"
        run("token", "get", **(environ | {"MAD_CLIENT_SECRET": "other"}))
        run("token", "get", "--scope", "x", **environ)
        run("token", "get", "--no-cache", **environ)
        assert len(fake.seen) == 4
        for folder, _, names in os.walk(tmp_path / ".cache"):
            assert all(stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600 for name in names)

    def test_a_short_lived_one_is_not_cached(self, run, fake):
        fake.answers["POST /token"] = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 20}, {})
        for _ in range(2):
            run("token", "get", MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s")
        assert len(fake.seen) == 2

    def test_a_refusal_prints_no_token(self, run, fake):
        fake.answers["POST /token"] = (401, {"error": "invalid_client", "error_description": "no"}, {})
        done = run("token", "get", MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == "mad: error: no\nmad: hint: check the client id and its secret\n"


class TestHistory:
    """mad status history"""

    ANSWER = {"from": "2027-01-15T08:00:00Z", "step": 60, "series": {"tokens": [3, 0, None] * 40, "logins": [None] * 120}}

    def test_points_are_added_up_until_they_fit_a_screen_and_a_gap_is_no_zero(self, here, fake):
        fake.answers["GET /status/history"] = 200, self.ANSWER, {}
        done = here("status", "history", "--range", "1d", MAD_ADMIN_URL=fake.url)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and len(lines) == 61
        assert [line.split()[-2:] for line in lines[:4]] == [["TOKENS", "LOGINS"], ["3", "-"], ["3", "-"], ["0", "-"]]
        assert lines[1].startswith("2027-01-15 08:00:00 ") and lines[2].startswith("2027-01-15 08:02:00 ")
        assert fake.seen[0][1] == "/status/history?range=1d"
        assert json.loads(here("status", "history", "--json", MAD_ADMIN_URL=fake.url).stdout) == self.ANSWER

    @pytest.mark.parametrize("answer", [{}, {"from": "x", "step": 1, "series": {}}, ANSWER | {"series": 5}])
    def test_another_answer_is_no_traceback(self, here, fake, answer):
        fake.answers["GET /status/history"] = 200, answer, {}
        done = here("status", "history", MAD_ADMIN_URL=fake.url)
        assert done.returncode == 4 and "no figures" in done.stderr


class TestEnrolment:
    ANSWER = {
        "success": True, "otpauth_uri": "otpauth://totp/x?secret=GEZDGNBV", "secret": "GEZDGNBV",
        "svg": "<svg>\u00fc</svg>",
    }
    PATH = f"POST /users/{USER['id']}/totp/enroll"

    def test_the_secret_is_shown_in_each_form(self, here, fake):
        fake.answers[self.PATH] = (200, self.ANSWER, {})
        words = ("user", "totp-enroll", "--id", USER["id"])
        assert "secret, shown this once: GEZDGNBV" in here(*words, MAD_ADMIN_URL=fake.url).stdout
        assert (
            json.loads(here(*words, "--json").stdout) == self.ANSWER
            and here(*words, "--quiet").stdout == self.ANSWER["otpauth_uri"] + "\n"
        )

    def test_the_picture_is_its_owners(self, here, fake, tmp_path):
        fake.answers[self.PATH] = (200, self.ANSWER, {})
        picture = tmp_path / "ann.svg"
        mask = os.umask(0)
        try:
            assert (
                here(
                    "user", "totp-enroll", "--id", USER["id"], "--svg", str(picture), MAD_ADMIN_URL=fake.url
                ).returncode
                == 0
            )
        finally:
            os.umask(mask)
        assert picture.read_text("utf-8") == self.ANSWER["svg"] and stat.S_IMODE(picture.stat().st_mode) == 0o600
        assert (
            here("user", "totp-enroll", "--id", USER["id"], "--svg", str(picture)).returncode == 2
            and len(fake.seen) == 1
        ), "and never written over: nothing is sent"

    def test_a_refusal_leaves_no_picture(self, here, fake, tmp_path):
        assert (
            here(
                "user", "totp-enroll", "--id", USER["id"], "--svg", str(tmp_path / "ann.svg"), MAD_ADMIN_URL=fake.url
            ).returncode
            == 1
        )
        assert not (tmp_path / "ann.svg").exists()


class TestAudit:
    def test_a_log_that_was_changed_is_a_failure(self, here, fake):
        fake.answers["GET /audit-logs/verify"] = (
            200,
            {"valid": False, "rows": 9, "first_seq": 1, "last_seq": 9, "head": "ab", "reason": "Row 4 was changed."},
            {},
        )
        done = here("audit", "verify", "--json", MAD_ADMIN_URL=fake.url)
        assert (
            done.returncode == 1
            and json.loads(done.stdout)["success"] is False
            and json.loads(done.stdout)["rows"] == 9
        )
        done = here("auditlog", "verify")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "mad: error: row 4 was changed\n")

    def test_an_export_goes_on_where_a_page_ends(self, here, fake):
        pages = {
            "limit=5000": (b'{"id":"1"}\n{"id":"2"}\n', {"X-Next-After": "2"}),
            "after=2&limit=5000": (b'{"id":"3"}\n', {}),
            "limit=1": (b'{"id":"1"}\n{"id":"2"}\n', {"X-Next-After": "2"}),
        }
        fake.answer = lambda method, path: (200, *pages[path.partition("?")[2]])
        assert here("audit", "export", MAD_ADMIN_URL=fake.url).stdout == '{"id":"1"}\n{"id":"2"}\n{"id":"3"}\n'
        assert here("audit", "export", "--limit", "1").stdout == '{"id":"1"}\n'

    def test_a_list_goes_on_by_itself(self, here, fake):
        entries = [ENTRY | {"id": str(number)} for number in range(2100, 0, -1)]

        def answer(method, path):
            query = {
                name: int(value)
                for name, _, value in (pair.partition("=") for pair in path.partition("?")[2].split("&"))
            }
            # A part of 700 numbers is searched, as the server searches a long log: those that begin with 15 are found.
            if "after" in query:
                place = query["after"] + 700
                found = [row for row in reversed(entries) if query["after"] < int(row["id"]) <= place]
                following = f"after={place}" if place < 2100 else ""
            else:
                place = query.get("before", 2101) - 700
                found = [row for row in entries if place <= int(row["id"]) < query.get("before", 2101)]
                following = f"before={place}" if place > 1 else ""
            if "action" in query:
                found = [row for row in found if row["id"].startswith("15")]
            link = {"Link": f'<?limit={query["limit"]}&action=15&{following}>; rel="next"'} if following else {}
            return 200, found[: query["limit"]], link

        fake.answer = answer
        assert [
            row["id"]
            for row in json.loads(here("audit", "list", "--limit", "-1", "--json", MAD_ADMIN_URL=fake.url).stdout)
        ] == [row["id"] for row in entries if int(row["id"]) > 1400 or row["id"].startswith("15")]
        assert len(here("audit", "list", "--quiet").stdout.split()) == 100
        assert here("audit", "list", "--quiet", "--action", "15", "--before", "1000").stdout.split() == [
            *(str(number) for number in range(159, 149, -1)), "15",
        ], "a part in which nothing is found is not the end"
        assert here("audit", "list", "--quiet", "--after", "99", "--action", "15", "--limit", "102").stdout.split() == [
            str(number) for number in (*range(150, 160), *range(1500, 1592))
        ]

    @pytest.mark.parametrize("body", [b"[1]\n", b"<html>", b'{"id":1'])
    def test_an_export_that_is_none_is_refused(self, here, fake, body):
        fake.answers["GET /audit-logs/export"] = (200, body, {})
        done = here("audit", "export", "--json", MAD_ADMIN_URL=fake.url)
        assert done.returncode == 4 and json.loads(done.stdout) == {
            "success": False, "message": "the answer is not the NDJSON it should be", "error": "bad_answer",
        }

    def test_an_actor_that_is_no_user_any_more_is_looked_for_as_it_is_typed(self, here, fake):
        fake.answers["GET /audit-logs"] = (200, [], {})
        assert here("audit", "list", "--user-id", "gone", MAD_ADMIN_URL=fake.url).returncode == 0
        assert [path for _, path, _, _ in fake.seen] == [
            "/users/id-by-name/gone", "/audit-logs?userId=gone&limit=100",
        ]
        fake.answer = lambda *_: (404, {"success": False, "message": "No.", "error": "x"}, {"X-Not-Found": "route"})
        assert here("audit", "list", "--user-id", "gone").returncode == 1, "a missing route is no unknown name"


class TestTail:
    @pytest.fixture
    def follow(self, here, fake, monkeypatch):
        """Run audit tail against these responses, one per request, until the last one."""

        def call(answers, *words):
            answers = list(answers)
            waits = iter([True] * (len(answers) - 1))
            monkeypatch.setattr(mad, "_wait_unless_closed", lambda seconds: next(waits, False))
            fake.answer = lambda *_: answers.pop(0)
            return here("audit", "tail", *words, MAD_ADMIN_URL=fake.url)

        return call

    def test_it_goes_on_after_what_it_has_shown(self, follow, fake):
        done = follow(
            [
                (200, [ENTRY | {"id": "10"}, ENTRY], {}), (200, [ENTRY | {"id": "11"}], {}), (200, [], {}),
                (200, [ENTRY, ENTRY | {"id": "12"}], {}),
            ],
            "--quiet", "--action", "user_created",
        )
        assert done.stdout.split() == ["7", "10", "11", "12"], "oldest first, and nothing twice"
        assert [path.partition("?")[2] for _, path, _, _ in fake.seen] == ["action=user_created&limit=10"] + [
            f"action=user_created&after={after}&limit=1000" for after in (10, 11, 11)
        ]

    def test_what_was_searched_is_not_searched_again(self, follow, fake):
        more = {"X-Next-After": "20007", "Link": '<?after=20007&limit=1000>; rel="next"'}
        done = follow([(200, [ENTRY], {}), (200, [], more), (200, [ENTRY | {"id": "20010"}], {}), (200, [], {})], "--quiet")
        assert done.stdout.split() == ["7", "20010"]
        assert [path.partition("after=")[2].partition("&")[0] for _, path, _, _ in fake.seen] == [
            "", "7", "20007", "20010",
        ]

    def test_a_server_that_starts_anew_is_waited_for(self, follow):
        down = (503, {"success": False, "message": "Later.", "error": "unavailable"}, {"Retry-After": "9"})
        done = follow([(200, [], {}), down, down, (200, [ENTRY], {})], "--quiet")
        assert (done.returncode, done.stdout) == (0, "7\n")
        assert done.stderr == "mad: warning: later; trying again\nmad: warning: the server answers again\n", "said once"

    def test_a_token_that_is_no_longer_good_ends_it(self, follow):
        done = follow(
            [(200, [ENTRY], {}), (401, {"success": False, "message": "Log in.", "error": "invalid_token"}, {})],
            "--json",
        )
        assert done.returncode == 3 and [json.loads(line).get("id") for line in done.stdout.splitlines()] == ["7", None]

    def test_what_it_shows_cannot_drive_a_terminal(self, follow):
        done = follow([(200, [ENTRY | {"target": "a\x1b[2J\nb"}], {})])
        assert done.stdout == "2026-01-01 00:00:00Z user_created user=root target=a\\x1b[2J\\nb ip=::1\n"

    def test_none_are_shown_first_when_none_are_wanted(self, follow):
        assert follow([(200, [ENTRY], {}), (200, [ENTRY | {"id": "8"}], {})], "--lines", "0", "--quiet").stdout == "8\n"

    def test_a_server_that_is_not_there_from_the_start_is_an_error(self, here):
        assert here("audit", "tail", MAD_ADMIN_URL="http://127.0.0.1:9").returncode == 4

    def test_it_ends_with_its_reader(self, fake, tmp_path):
        fake.answers["GET /audit-logs"] = (200, [ENTRY], {})
        env = os.environ | {"HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "MAD_ADMIN_URL": fake.url}
        done = subprocess.run(
            [
                "bash", "-c", '"$@" | head -1; echo "${PIPESTATUS[0]}"', "_", sys.executable, str(ROOT / "mad.py"),
                "audit", "tail", "--quiet", "--interval", "600",
            ],
            env=env, capture_output=True, text=True, timeout=60,
        )
        assert done.stdout == "7\n0\n" and done.stderr == ""

    def test_ctrl_c_ends_it(self, fake, tmp_path):
        fake.answers["GET /audit-logs"] = (200, [ENTRY], {})
        env = os.environ | {"HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "MAD_ADMIN_URL": fake.url}
        child = pexpect.spawn(
            sys.executable, [str(ROOT / "mad.py"), "audit", "tail", "--interval", "600"], env=env, encoding="utf-8",
            timeout=60,
        )
        child.expect_exact("user_created")
        child.sendintr()
        assert "Traceback" not in child.read()
        child.close()
        assert child.exitstatus == 130


class TestBrand:
    BRAND = {
        "name": "North", "color": "#8a3fa0", "text_color": "#ffffff", "contrast": 6.5, "modified_at": None,
        "logo": {"uri": "https://idp.example/pages/logo.ab", "media_type": "image/png", "bytes": 3, "sha256": "ab"},
        "origins": {"name": "set", "color": "option", "logo": "set"},
    }

    @pytest.fixture
    def server(self, fake):
        fake.answer = lambda method, path: (200, self.BRAND, {})
        return fake

    def test_a_picture_is_sent_as_it_is_and_what_is_not_given_stays(self, here, server, tmp_path):
        (tmp_path / "logo.png").write_bytes(b"\x89PNG")
        done = here("brand", "set", "--name", "North", "--logo", str(tmp_path / "logo.png"), MAD_ADMIN_URL=server.url)
        assert done.returncode == 0 and "logo:         image/png, 3 bytes, https://idp.example/pages/logo.ab" in done.stdout
        assert (server.seen[0][0], json.loads(server.seen[0][3])) == ("PUT", {"name": "North", "logo": "iVBORw=="})
        here("brand", "set", "--no-logo", MAD_ADMIN_URL=server.url)
        assert json.loads(server.seen[1][3]) == {"logo": ""}

    WRONG = [
        (["--logo", "{here}/none"], "cannot read"), (["--logo", "{here}"], "cannot read"),
        (["--logo", "{here}/empty"], "is empty"), (["--logo", "{here}/large"], "has more than 40960 bytes"),
        (["--logo", "{here}/empty", "--no-logo"], "cannot both be given"), ([], "nothing to change"),
    ]

    @pytest.mark.parametrize("words, sentence", WRONG)
    def test_what_cannot_be_a_picture_is_not_sent(self, here, server, tmp_path, words, sentence):
        (tmp_path / "empty").write_bytes(b"")
        (tmp_path / "large").write_bytes(bytes(40961))
        done = here("brand", "set", *(word.format(here=tmp_path) for word in words), MAD_ADMIN_URL=server.url)
        assert done.returncode == 2 and sentence in done.stderr and not server.seen

    def test_it_is_shown_and_given_back(self, here, server):
        assert "color:        #8a3fa0" in here("brand", "show", MAD_ADMIN_URL=server.url).stdout
        assert here("brand", "reset", "--yes", MAD_ADMIN_URL=server.url).returncode == 0
        assert [seen[:2] for seen in server.seen] == [("GET", "/brand"), ("DELETE", "/brand")]


class TestBackup:
    """The server makes the backup, mad downloads it in pieces, compares the digest and deletes the server's copy."""

    CONTENT = b"0123456789" * 100

    @pytest.fixture
    def server(self, fake):
        made = {
            "name": "b.backup", "bytes": 1000, "sha256": hashlib.sha256(self.CONTENT).hexdigest(), "users": 2,
            "clients": 1,
        }

        def answer(method, path):
            offset = int(path.partition("=")[2] or 0)
            pieces = (self.CONTENT[offset : offset + 400], {"X-Next-Offset": str(offset + 400)} if offset < 800 else {})
            return 200, *{"POST": (made, {}), "GET": pieces, "DELETE": ({"success": True, "message": ""}, {})}[method]

        fake.answer, fake.made = answer, made
        return fake

    @pytest.mark.parametrize("words", [["box.backup"], ["--file", "box.backup"], ["--without-keys", "box.backup"]])
    def test_it_is_whole_and_private(self, here, server, tmp_path, monkeypatch, words):
        monkeypatch.chdir(tmp_path)
        done = here("backup", *words, MAD_ADMIN_URL=server.url)
        assert (done.returncode, done.stdout) == (0, "b.backup: 1000 bytes, 2 users, 1 clients\n"), done
        (path,) = tmp_path.glob("*backup*")
        assert path.read_bytes() == self.CONTENT and path.stat().st_mode & 0o777 == 0o600
        assert [seen[0] for seen in server.seen] == ["POST", "GET", "GET", "GET", "DELETE"] and json.loads(
            server.seen[0][3]
        ) == {"without_keys": "--without-keys" in words}

    def test_what_is_there_is_kept_unless_forced(self, here, server, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "box.backup").write_text("older")
        done = here("backup", "box.backup", MAD_ADMIN_URL=server.url)
        assert (
            done.returncode == 2
            and "--force" in done.stderr
            and not server.seen
            and (tmp_path / "box.backup").read_text() == "older"
        )
        assert (
            here("backup", "box.backup", "--force").returncode == 0
            and (tmp_path / "box.backup").read_bytes() == self.CONTENT
        )

    @pytest.mark.parametrize(
        "change, status, error, message",
        [
            ({"sha256": "0" * 64}, 4, "bad_answer", "what came is not the backup that was made"),
            ({"name": None}, 1, "not_found", "There is no such thing here."),
        ],
    )
    def test_what_is_not_what_was_made_leaves_no_file(
        self, here, server, tmp_path, monkeypatch, change, status, error, message
    ):
        monkeypatch.chdir(tmp_path)
        server.made |= change
        if not server.made["name"]:
            server.answers = {}
            server.answer = lambda method, path: (
                (200, server.made, {})
                if method == "POST"
                else (404, {"success": False, "message": "There is no such thing here.", "error": "not_found"}, {})
            )
        done = here("backup", "box.backup", "--json", MAD_ADMIN_URL=server.url)
        assert done.returncode == status and not list(tmp_path.glob("*backup*"))
        assert json.loads(done.stdout) == {"success": False, "message": message, "error": error}
        assert server.seen[-1][0] == "DELETE"

    def test_pieces_that_go_round_are_refused(self, here, server, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        whole = server.answer
        server.answer = lambda method, path: (
            (200, b"x", {"X-Next-Offset": "0"}) if method == "GET" else whole(method, path)
        )
        done = here("backup", "box.backup", MAD_ADMIN_URL=server.url)
        assert done.returncode == 4 and not list(tmp_path.glob("*backup*"))
        assert "mad: error: the pieces of the backup do not follow each other\n" in done.stderr


# == Commands ===================================================================

class TestStatus:
    """What needs attention is told to people, and by the exit status to scripts."""

    WELL = {
        "state": "well", "version": "1.0", "since": "2026-11-29T10:00:00Z", "pid": 7,
        "workers": {"expected": 3, "running": 3}, "endpoints": [{"name": "auth", "address": "::1", "port": 9040}],
        "issuer": "https://box.example", "clock": {"state": "right", "now": "2026-11-29T11:00:00Z"},
        "certificate": {"not_after": "2026-12-05T14:00:00Z", "fingerprint": "ab" * 32},
        "last_backup": {"at": "2026-11-28T03:00:00Z", "name": "b.backup", "bytes": 4_200_000, "kind": "schedule"},
        "disk": {"free": 3_100_000_000, "total": 10**10, "database": 41_000_000, "wal": 0, "log": 12}, "attention": [],
    }
    LOW = {"code": "disk_low", "severity": "warning", "since": None, "text": "1 MB is\x1b[2J free", "command": ""}

    def test_of_a_box_that_is_well(self, here, fake):
        fake.answers["GET /status"] = (200, self.WELL, {})
        done = here("status", MAD_ADMIN_URL=fake.url)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines() == [
            "microauthd 1.0 is well", "since:        2026-11-29 10:00:00Z", "processes:    supervisor 7, 3 of 3 others",
            "auth:         http://[::1]:9040", "issuer:       https://box.example",
            "certificate:  until 2026-12-05 14:00:00Z, sha256 abababababababab\u2026",
            "clock:        right, 2026-11-29 11:00:00Z",
            "last backup:  2026-11-28 03:00:00Z b.backup, 4.2 MB, schedule",
            "disk:         3.1 GB of 10.0 GB free; database 41.0 MB, WAL 0 B, log 12 B",
        ], done.stdout

    def test_of_a_box_that_was_restored_and_names_no_file(self, here, fake):
        restored = {"at": "2026-11-28T03:00:00Z", "name": "", "bytes": 0, "kind": "restored"}
        fake.answers["GET /status"] = (200, self.WELL | {"last_backup": restored}, {})
        assert "last backup:  2026-11-28 03:00:00Z, restored\n" in here("status", MAD_ADMIN_URL=fake.url).stdout

    @pytest.mark.parametrize("words", [[], ["--json"], ["--quiet"]])
    def test_of_one_that_needs_attention(self, here, fake, words):
        fake.answers["GET /status"] = (200, self.WELL | {"state": "attention", "attention": [self.LOW]}, {})
        done = here("status", *words, MAD_ADMIN_URL=fake.url)
        assert done.returncode == 1 and done.stderr == "", done
        assert words or done.stdout.endswith("warning: 1 MB is\\x1b[2J free\n")
        assert words != ["--quiet"] or done.stdout == "attention\n"

    @pytest.mark.parametrize("next_at, said", [("2026-11-29T03:00:00Z", "2026-11-29 03:00:00Z"), (None, "soon")])
    def test_it_says_when_the_next_backup_is_made(self, here, fake, next_at, said):
        plan = {"every": 86400, "keep": 7, "next_at": next_at}
        fake.answers["GET /status"] = (200, self.WELL | {"backups": plan}, {})
        assert f"\nnext backup:  {said}, 7 are kept\n" in here("status", MAD_ADMIN_URL=fake.url).stdout

    def test_of_a_server_that_says_less(self, here, fake):
        """One of another release."""
        fake.answers["GET /status"] = (200, {}, {})
        assert here("status", MAD_ADMIN_URL=fake.url).returncode == 0


class TestEveryCommand:
    @pytest.mark.parametrize("command", ASKING, ids=lambda command: command.name)
    def test_a_refusal_is_one_json_document(self, here, fake, command):
        environ = {"MAD_ADMIN_URL": fake.url, "MAD_AUTH_URL": fake.url, "MAD_CLIENT_ID": "a", "MAD_CLIENT_SECRET": "s"}
        done = here(*words_of(command), "--json", **environ)
        assert done.returncode == 1 and json.loads(done.stdout) == {
            "success": False, "message": "There is no such thing here.", "error": "not_found",
        }
        assert len(fake.seen) == 1, "one command is one request"

    @pytest.mark.parametrize(
        "name, usage",
        [
            ("user get", "mad user get --id ID|NAME"),
            (
                "client check-uri",
                "mad client check-uri --id ID|NAME --kind redirect|post_logout|cors_origin --uri URI",
            ),
            ("user reset-password", "mad user reset-password --id ID|NAME [--new-password PASSWORD | --password-stdin]"),
            ("role list", "mad role list [--with permissions,user_count]"),
        ],
    )
    def test_brackets_are_around_what_may_be_left_out(self, name, usage):
        command = next(command for command in mad.COMMANDS if command.name == name)
        assert mad.describe_commands((command,))[0][0] == usage

    @pytest.mark.parametrize(
        "command", [command for command in ASKING if command.name != "token get"], ids=lambda command: command.name
    )
    def test_the_request_is_the_one_it_declares(self, here, fake, command):
        (_, _, request), = mad.describe_commands([command])
        method, _, path = request.partition(" ")
        here(*words_of(command), MAD_ADMIN_URL=fake.url)
        assert fake.seen[0][0] == method and re.fullmatch(
            re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), fake.seen[0][1].partition("?")[0]
        )

    @pytest.mark.parametrize(
        "command", [command for command in ASKING if not command.streams and command.name != "backup"],
        ids=lambda command: command.name,
    )
    def test_it_succeeds_with_names_in_each_form(self, here, fake, command):
        thing = USER | {
            "uri": "bob", "provider_key": "bob", "allowed": True, "valid": True, "ok": True, "url": "https://x", "message": "Done.",
            "otpauth_uri": "otpauth://x", "access_token": TOKEN, "flag": {}, "from": "2027-01-15T08:00:00Z", "step": 60,
            "series": {"tokens": [1]},
        }
        listed = command.is_list or command.options and any(option.parent for option in command.options)
        fake.answer = lambda method, path: (
            200,
            {"result": USER["id"]}
            if "/id-by-name/" in path
            else {"X": {}}
            if path.endswith("/options") and "/clients/" in path
            else ["x"]
            if path.endswith("/actions")
            else [thing]
            if method == "PUT" and path.endswith("/scopes") or path == "/keys/rotate"
            else [thing]
            if listed and method == "GET" and "/idp/" not in path
            else thing, {},
        )
        words = ["bob" if word == USER["id"] else word for word in words_of(command)] + (
            ["--client-id", "bob"] if command.name == "client delete-redirect-uri" else []
        )
        environ = {"MAD_ADMIN_URL": fake.url, "MAD_AUTH_URL": fake.url, "MAD_CLIENT_ID": "a", "MAD_CLIENT_SECRET": "s"}
        for more in ([], ["--quiet"], ["--json"]):
            if more == ["--quiet"] and command.name == "client create":
                continue  # it would lose the secret, and says so
            done = here(*words, *more, **environ)
            assert done.returncode == 0 and done.stderr == "", (more, done)
        assert done.stdout.count("\n") == 1 and json.loads(done.stdout) is not None

    @pytest.mark.parametrize("command", mad.COMMANDS, ids=lambda command: command.name)
    def test_bad_usage_is_one_json_document(self, here, command):
        done = here(*command.name.split(), "--json", "--nonsense")
        document = json.loads(done.stdout)
        assert done.returncode == 2 and document["error"] == "usage"
        assert "unknown option '--nonsense'" in document["message"].split("; ")

    @pytest.mark.parametrize("command", mad.COMMANDS, ids=lambda command: command.name)
    def test_help_has_an_example_and_wins_over_errors(self, here, command):
        done = here(*command.name.split(), "--nonsense", "--help")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: mad {command.name} [opt")
        assert command.help in done.stdout and "mad " + command.name in command.example
        assert f"for example:\n  {command.example}\n" in done.stdout
        for option in command.all_options():
            assert f"\n  --{option.name or option.stdin} " in done.stdout

    def test_names_are_looked_up_and_ids_are_not(self, here, fake):
        fake.answers["GET /users/id-by-name/ann%40home"] = (200, {"result": "u"}, {})
        fake.answers["GET /roles/id-by-name/Boss"] = (200, "r", {})
        fake.answers["POST /roles/assign"] = (200, {"success": True, "message": "Done."}, {})
        assert (
            here("role", "assign", "--user-id", "ann@home", "--role-id", "Boss", MAD_ADMIN_URL=fake.url).returncode == 0
        )
        assert json.loads(fake.seen[-1][3]) == {"user_id": "u", "role_id": "r"} and len(fake.seen) == 3
        done = here("role", "assign", "--user-id", "bob", "--role-id", "Boss")
        assert (
            done.returncode == 1
            and done.stderr == "mad: error: there is no user 'bob'\nmad: hint: see: mad user list\n"
        )


# == Main =======================================================================

class TestExitStatus:
    @pytest.mark.parametrize(
        "answer, status, error, message",
        [
            ((403, {"success": False, "message": "no", "error": "access_denied"}, {}), 1, "access_denied", "no"),
            ((401, {"success": False, "message": "no", "error": "invalid_token"}, {}), 3, "invalid_token", "no"),
            ((200, b"<html>", {}), 4, "bad_answer", "the answer is not the JSON it should be"),
            ((200, b"", {}), 4, "bad_answer", "the answer is not the JSON it should be"),
            (
                (302, b"", {"Location": "http://evil.example/"}), 4, "bad_answer",
                "{url} redirects elsewhere, which is not followed",
            ),
            ((500, b"oops", {}), 1, "http_500", "the server answers 500"),
        ],
    )
    def test_of_a_list_that_fails(self, run, fake, answer, status, error, message):
        fake.answers["GET /users"] = answer
        message = message.format(url=fake.url)
        for words in (("user", "list"), ("user", "list", "--json")):
            done = run(*words)
            assert done.returncode == status and done.stderr.startswith(f"mad: error: {message}\n"), done
            assert "Traceback" not in done.stderr
        assert json.loads(done.stdout) == {"success": False, "message": message, "error": error}
        assert [path for _, path, _, _ in fake.seen] == ["/users", "/users"], "redirects are not followed"

    def test_of_a_list(self, run, fake):
        fake.answers["GET /users"] = (200, [USER], {})
        done = run("user", "list", "--json")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, [USER], "")

    def test_nobody_there(self, run):
        done = run("user", "list", MAD_ADMIN_URL="http://127.0.0.1:9")
        assert (done.returncode, done.stdout) == (4, "") and done.stderr == (
            "mad: error: cannot reach http://127.0.0.1:9: Connection refused\n"
            "mad: hint: is the server running, and is this its address?\n"
        )

    def test_not_logged_in(self, run):
        done = run("user", "list", "--json", MAD_ADMIN_TOKEN=None)
        assert done.returncode == 3 and json.loads(done.stdout) == {
            "success": False, "message": "not logged in", "error": "not_logged_in",
        }

    @pytest.mark.parametrize(
        "words, told",
        [
            ((), "usage: mad <noun> <verb> [options]"), (("nonsense",), "mad: error: unknown command 'nonsense'"),
            (("user", "nonsense"), "mad: error: unknown command 'user nonsense'"),
            (("user", "list", "--nonsense"), "mad: error: unknown option '--nonsense'"),
            (("user", "create"), "mad: error: --username is missing"),
            (("user", "get", "--id"), "mad: error: --id needs a value"),
            (("user", "lis"), "mad: error: unknown command 'user lis'"),
            (("user", "get", "--id", "a", "--id", "b"), "mad: error: --id is given twice"),
            (("user", "--json"), "mad: error: mad user needs a verb before its options"),
            (("user",), "usage: mad user <verb> [options]"),
        ],
    )
    def test_bad_usage(self, run, fake, words, told):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.startswith(told + "\n") and fake.seen == []
        assert done.stdout == ("" if "--json" not in words else json.dumps(
            {"success": False, "message": told.removeprefix("mad: error: "), "error": "usage"}, separators=(",", ":")
        ) + "\n")

    @pytest.mark.parametrize(
        "words, told",
        [
            (("--help",), "usage: mad <noun> <verb> [options]\n"), (("-h",), "usage: mad <noun> <verb> [options]\n"),
            (("user", "--help"), "usage: mad user <verb> [options]\n"),
            (("user", "create", "--help"), "usage: mad user create [options]\n"),
            (("token", "get", "--help"), "usage: mad token get [options]\n"), (("--version",), mad.VERSION + "\n"),
        ],
    )
    def test_help(self, run, words, told):
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(told)


class TestStart:
    def test_a_command_loads_little(self, fake, env_of_nobody):
        fake.answers["GET /users"] = (200, [USER], {})
        slow = {
            "ssl", "argparse", "http.client", "urllib.request", "email", "asyncio", "importlib.metadata", "hashlib",
            "shutil", "typing", "difflib", "datetime", "contextlib",
        }
        code = f"import sys, mad; mad.main(sys.argv[1:]); print(*sorted({slow} & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, "user", "list", "--quiet", "--admin-url", fake.url], cwd=ROOT,
            env=env_of_nobody, capture_output=True, text=True,
        )
        assert done.stdout == USER["id"] + "\n\n", done

    @pytest.fixture
    def env_of_nobody(self, tmp_path):
        return {"HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "PATH": os.environ["PATH"]}


# == Order ======================================================================

class TestOrder:
    """mad.py is read downwards: a definition uses only names defined above it."""

    SOURCE = (ROOT / "mad.py").read_text("utf-8")

    def test_the_contents_are_the_banners(self):
        contents = re.findall(r"^  ([A-Z]\w+) +\S", mad.__doc__.partition("Contents\n")[2], re.M)
        assert contents == re.findall(r"^# == (\w+) =+$", self.SOURCE, re.M)

    def test_a_definition_uses_only_names_defined_above_it(self):
        defined = {}
        for node in ast.parse(self.SOURCE).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined[node.name] = node.lineno
            elif isinstance(node, ast.Assign):
                for name in ast.walk(node):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        defined.setdefault(name.id, node.lineno)
        for node in ast.parse(self.SOURCE).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
                code = compile(ast.Module([node], []), "mad.py", "exec")
                below = {name for name in self.globals_of(code) if defined.get(name, 0) > node.lineno}
                assert not below, f"line {node.lineno} uses {below}"

    def globals_of(self, code):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                yield from self.globals_of(inner)
