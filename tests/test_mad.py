"""mad: its words, its files, what it says and how it ends. The journeys against a real server stand in test_flows."""

import contextlib
import datetime
import http.server
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import mad
import pexpect
import pytest
from box import ROOT
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

TOKEN = "eyJhbGciOiJFUzI1NiJ9." + "eyJzdWIiOiJyb290LWlkIiwidXNlcm5hbWUiOiJyb290IiwiZXhwIjo0MTAyNDQ0ODAwLCJpc3MiOiJ4In0" + ".AAAA"
USER = {"id": "8b1c0000-0000-4000-8000-000000000001", "username": "ann", "email": "ann@example.org", "created_at": "2026-01-01T00:00:00Z", "lockout_until": None, "is_active": True, "email_verified": False, "totp_enabled": False}


class Fake(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length).decode()))
        status, body, headers = self.server.answer(self.command, self.path)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items() | headers.items():
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
    server.answer = lambda method, path: server.answers.get(f"{method} {path.partition('?')[0]}", (404, {"success": False, "message": "There is no such thing here.", "error": "not_found"}, {}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()



@pytest.fixture
def run(tmp_path, fake):
    def call(*words, input="", **environ):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAD_", "XDG_"))}
        env = clean | {"HOME": str(tmp_path), "MAD_ADMIN_URL": fake.url, "MAD_AUTH_URL": fake.url, "MAD_ADMIN_TOKEN": TOKEN} | environ
        env = {name: value for name, value in env.items() if value is not None}
        return subprocess.run([sys.executable, "-c", "import sys, mad; sys.exit(mad.main(sys.argv[1:]))", *words], cwd=ROOT, env=env, input=input, capture_output=True, text=True, timeout=30)

    return call


class TestExitStatus:
    @pytest.mark.parametrize("answer, status, code", [
        ((200, [USER], {}), 0, None), ((403, {"success": False, "message": "no", "error": "access_denied"}, {}), 1, "access_denied"),
        ((401, {"success": False, "message": "no", "error": "invalid_token"}, {}), 3, None), ((200, b"<html>", {}), 4, None), ((302, b"", {"Location": "http://evil.example/"}), 4, None),
        ((200, b"", {}), 4, None), ((500, b"oops", {}), None, None),
    ])
    def test_of_a_list(self, run, fake, answer, status, code):
        fake.answers["GET /users"] = answer
        for words in (("user", "list"), ("user", "list", "--json")):
            done = run(*words)
            assert done.returncode == status or status is None and done.returncode in (1, 4), done
            assert "Traceback" not in done.stderr
        document = json.loads(done.stdout)
        if status == 0:
            assert document == [USER]
        else:
            assert document["success"] is False and document["message"] and (code is None or document["error"] == code)
        assert all(path.startswith("/") for _, path, _, _ in fake.seen) and len(fake.seen) == 2, "redirects are not followed"

    def test_nobody_there(self, run):
        assert run("user", "list", MAD_ADMIN_URL="http://127.0.0.1:9").returncode == 4

    def test_not_logged_in(self, run):
        done = run("user", "list", "--json", MAD_ADMIN_TOKEN=None)
        assert done.returncode == 3 and json.loads(done.stdout)["success"] is False

    @pytest.mark.parametrize("words", [(), ("nonsense",), ("user", "nonsense"), ("user", "list", "--nonsense"), ("user", "create"), ("user", "get", "--id"), ("user", "lis"), ("user", "get", "--id", "a", "--id", "b")])
    def test_bad_usage(self, run, fake, words):
        done = run(*words)
        assert done.returncode == 2 and done.stdout == "" and done.stderr and fake.seen == []

    @pytest.mark.parametrize("words", [("--help",), ("user", "--help"), ("user", "create", "--help"), ("token", "get", "--help"), ("-h",), ("--version",)])
    def test_help(self, run, words):
        done = run(*words)
        assert done.returncode == 0 and done.stdout


class TestWords:
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
        assert run("user", "create", "--username", "ann", "--user-email", "a@b", "--password-stdin", input="from stdin\n").returncode == 0
        assert json.loads(fake.seen[-1][3])["password"] == "from stdin"

    def test_ids_cannot_leave_their_path(self, run, fake):
        run("user", "get", "--id", "../clients?x=#y")
        assert all(path.startswith("/users/") and "/../" not in path and "?" not in path for _, path, _, _ in fake.seen)

    def test_quiet_prints_ids(self, run, fake):
        fake.answers["GET /users"] = (200, [USER], {})
        assert run("user", "list", "--quiet").stdout == USER["id"] + "\n"


class TestOutput:
    def test_control_characters_are_shown_not_sent(self, run, fake):
        fake.answers["GET /users"] = (200, [USER | {"username": "a\x1b[2Jb\r\n\u202ec"}], {})
        done = run("user", "list")
        assert "\x1b" not in done.stdout and "\u202e" not in done.stdout and "\r" not in done.stdout

    def test_a_secret_that_was_made_is_shown_also_as_json(self, run, fake):
        fake.answers["POST /clients"] = (200, {"id": USER["id"], "client_id": "door", "display_name": "", "is_active": True, "created_at": "2026-01-01T00:00:00Z", "audience": "x", "client_secret": "made-by-the-server"}, {})
        assert json.loads(run("client", "create", "--client-id", "door", "--json").stdout)["client_secret"] == "made-by-the-server"
        assert "made-by-the-server" in run("client", "create", "--client-id", "door").stdout

    def test_the_inspector(self, run):
        done = run("token", "--token", TOKEN)
        assert done.returncode == 0 and "root-id" in done.stdout and "2100-01-01 00:00:00 UTC" in done.stdout
        assert run("token", "--token", "nonsense").returncode != 0

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_scripts(self, run, shell):
        assert "change-secret" in run("completion", shell).stdout


class TestTheSavedLogin:
    """~/.mad_token: its owner's alone, never through a symlink, sent only to the server that issued it."""

    def log_in(self, run, fake, **environ):
        fake.answers["POST /token"] = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60, "jti": "x"}, {})
        return run("session", "login", "--username", "root", "--password-stdin", input="hush hush\n", MAD_ADMIN_TOKEN=None, **environ)

    def test_it_is_private_and_used(self, run, fake, tmp_path):
        os.umask(mask := os.umask(0))
        done = self.log_in(run, fake)
        assert done.returncode == 0, done.stderr
        path = tmp_path / ".mad_token"
        assert path.read_text() == TOKEN and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "username=root" in fake.seen[-1][3] and mask is not None
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
        assert self.log_in(run, fake).returncode == 3
        assert (tmp_path / "victim").read_text() == "precious"

    def test_a_refused_login_saves_nothing(self, run, fake, tmp_path):
        fake.answers["POST /token"] = (403, {"success": False, "message": "no", "error": "invalid_grant"}, {})
        done = run("session", "login", "--username", "root", "--password-stdin", input="wrong\n", MAD_ADMIN_TOKEN=None)
        assert done.returncode in (1, 3) and not (tmp_path / ".mad_token").exists() and "wrong" not in done.stderr

    def test_a_terminal_is_asked_and_shows_no_password(self, fake, tmp_path):
        fake.answers["POST /token"] = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60, "jti": "x"}, {})
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {"HOME": str(tmp_path)}
        child = pexpect.spawn(sys.executable, ["-c", "import sys, mad; sys.exit(mad.main(sys.argv[1:]))", "session", "login", "--admin-url", fake.url], cwd=str(ROOT), env=env, encoding="utf-8", timeout=10)
        child.expect("(?i)user")
        child.sendline("root")
        child.expect("(?i)password")
        child.waitnoecho()
        child.sendline("hush hush")
        said = child.read()
        child.close()
        assert child.exitstatus == 0 and "hush" not in said


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
        assert done.returncode in (1, 3) and done.stdout == "" and "mad: error:" in done.stderr


class TestBinding:
    def test_it_raises_what_the_server_says(self, fake):
        client = mad.MadClient(fake.url, TOKEN)
        fake.answers["POST /users"] = (409, {"success": False, "message": "The name is taken.", "error": "conflict"}, {})
        with pytest.raises(mad.MadError) as caught:
            client.create_user("ann", "a@b", "correct horse")
        assert (caught.value.status, caught.value.error) == (409, "conflict")


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run mad in this process, which takes a hundredth of a new one."""
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


@pytest.fixture
def raw():
    """A server that answers with the given octets, whatever it is asked; `pause` seconds before each of them."""
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


def words_of(command):
    """The words of a command with every option it must have."""
    words = command.name.split()
    for option in command.options:
        if option.required or (command.at_least_one and option is next(one for one in command.options if not one.required)):
            value = {"flag": "true", "number": "99", "token": TOKEN}.get(option.kind, USER["id"])
            words += ["--" + option.name, "permanent" if option.name == "until" else value]
    return words


ASKING = [command for command in mad.COMMANDS if not command.name.startswith(("session ", "completion ")) and command.name != "token"]


class TestAnswers:
    """RFC 9112: whatever comes back, mad ends in time, with one sentence and no traceback."""

    @pytest.mark.parametrize("octets", [
        b"\x16\x03\x01garbage\r\n\r\n", b"", b"[]", OK + b"Content-Length: 10\r\n\r\n[]", OK + b"Content-Length: -1\r\n\r\n[]", OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n[]", OK + b"Transfer-Encoding: gzip\r\n\r\n[]", OK + b"\r\n[NaN]", OK + b'\r\n["a"]', OK + b"\r\n{}",
        OK + b"\r\n" + b"[" * 100_000, OK + b"X: " + b"a" * 200_000, OK + b"Content-Length: 0\r\n\r\n", b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>",
    ])
    def test_garbage_is_no_answer(self, here, raw, octets):
        done = here("user", "list", "--json", MAD_ADMIN_URL=raw(octets))
        assert done.returncode == 4 and json.loads(done.stdout)["success"] is False and done.stderr.count("mad: error: ") == 1

    @pytest.mark.parametrize("octets", [OK + b"Content-Length: 99999999999\r\n\r\n[", OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n[", OK + b"\r\n[" + b" " * (17 << 20)])
    def test_a_huge_one_is_cut_short(self, here, raw, octets):
        assert "longer than 16 MiB" in here("user", "list", MAD_ADMIN_URL=raw(octets)).stderr

    @pytest.mark.parametrize("octets", [
        OK + b"\r\n[]", OK + b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\n[\r\n1\r\n]\r\n0\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\n[]extra",
    ])
    def test_each_kind_of_framing_is_understood(self, here, raw, octets):
        assert json.loads(here("user", "list", "--json", MAD_ADMIN_URL=raw(octets)).stdout) == []

    def test_the_time_is_for_the_whole_answer(self, here, raw, monkeypatch):
        monkeypatch.setattr(mad, "TIMEOUT", 0.3)
        started = time.monotonic()
        done = here("user", "list", MAD_ADMIN_URL=raw(OK + b"X: y\r\n" * 100, pause=0.05))
        assert done.returncode == 4 and "no answer" in done.stderr and time.monotonic() - started < 2

    def test_an_empty_one_says_nothing_was_done(self, here, raw):
        assert here("user", "get", "--id", USER["id"], MAD_ADMIN_URL=raw(OK + b"Content-Length: 0\r\n\r\n")).returncode == 4
        assert here("user", "delete", "--id", USER["id"], MAD_ADMIN_URL=raw(b"HTTP/1.1 204 No Content\r\n\r\n")).returncode == 0

    @pytest.mark.parametrize("command", [command for command in ASKING if command.name != "token get"], ids=lambda command: command.name)
    def test_a_token_that_is_not_accepted_needs_a_login(self, here, fake, command):
        fake.answer = lambda *_: (401, {"success": False, "message": "Log in.", "error": "invalid_token"}, {})
        done = here(*words_of(command), MAD_ADMIN_URL=fake.url)
        assert done.returncode == 3 and done.stderr == "mad: error: log in\nmad: hint: log in with: mad session login\n"

    def test_a_redirect_takes_the_token_nowhere(self, here, raw):
        thief = raw(OK + b"\r\n[]")
        stolen = raw.seen
        done = here("user", "list", MAD_ADMIN_URL=raw(b"HTTP/1.1 307 Over There\r\nLocation: %s/users\r\n\r\n" % thief.encode()))
        assert done.returncode == 4 and not stolen

    def test_proxies_of_the_environment_are_not_asked(self, here, raw):
        proxy = raw(OK + b"\r\n[]")
        stolen = raw.seen
        done = here("user", "list", MAD_ADMIN_URL=raw(OK + b"\r\n[]"), http_proxy=proxy, HTTP_PROXY=proxy, ALL_PROXY=proxy)
        assert done.returncode == 0 and not stolen

    def test_what_the_server_says_of_each_member_is_told(self, here, fake):
        fake.answers["GET /users"] = (400, {"success": False, "message": "That is wrong.", "error": "bad", "errors": {"email": "It is \x1b[2J none."}}, {"Retry-After": "7"})
        done = here("user", "list", "--json", MAD_ADMIN_URL=fake.url)
        assert done.stderr == "mad: error: that is wrong\nmad: error: email: It is \\x1b[2J none\nmad: hint: try again in 7 seconds\n"
        assert json.loads(done.stdout) == {"success": False, "message": "That is wrong.", "error": "bad", "errors": {"email": "It is \x1b[2J none."}}


class TestAddresses:
    @pytest.mark.parametrize("url", ["localhost:9041", "ftp://box", "http://", "http://a:b@box", "http://box/?x", "http://[::1", "http://box:99999", "http://b\u00fcx", "http://box\r\nX: y"])
    def test_what_is_no_base_url_is_bad_usage(self, here, url):
        assert here("user", "list", "--admin-url", url).returncode == 2

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

    @pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("127.9.9.9", False), ("localhost", False), ("[::1]", False), ("127.0.0.1.invalid", True), ("box.invalid", True)])
    def test_clear_text_to_another_machine_is_warned_of(self, here, monkeypatch, host, warned):
        def refuse(*_, **__):
            raise ConnectionRefusedError(111, "Connection refused")

        monkeypatch.setattr(socket, "create_connection", refuse)
        assert ("in clear" in here("user", "list", "--admin-url", f"http://{host}:9").stderr) is warned

    def test_https_trusts_the_authorities_it_is_told(self, here, raw, tmp_path):
        certificate = make_certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        raw(OK + b"Content-Length: 2\r\n\r\n[]", context=context)
        url = f"https://localhost:{raw.port}"
        done = here("user", "list", "--json", "--admin-url", url)
        assert done.returncode == 4 and json.loads(done.stdout)["error"] == "untrusted" and "MAD_CA_FILE" in done.stderr and not raw.seen
        assert here("user", "list", "--admin-url", url, MAD_CA_FILE=certificate).returncode == 0
        assert here("user", "list", "--admin-url", url.replace("localhost", "127.0.0.1")).returncode == 4, "the name counts"
        assert here("user", "list", "--admin-url", url, MAD_CA_FILE=str(tmp_path / "none")).returncode == 4


def make_certificate(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - datetime.timedelta(hours=1), now + datetime.timedelta(hours=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False).add_extension(x509.BasicConstraints(True, None), True)
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return str(path)


class TestEveryCommand:
    @pytest.mark.parametrize("command", ASKING, ids=lambda command: command.name)
    def test_a_refusal_is_one_json_document(self, here, fake, command):
        environ = {"MAD_ADMIN_URL": fake.url, "MAD_AUTH_URL": fake.url, "MAD_CLIENT_ID": "a", "MAD_CLIENT_SECRET": "s"}
        done = here(*words_of(command), "--json", **environ)
        assert done.returncode == 1 and json.loads(done.stdout) == {"success": False, "message": "There is no such thing here.", "error": "not_found"}
        assert len(fake.seen) == 1, "one command is one request"

    @pytest.mark.parametrize("command", mad.COMMANDS, ids=lambda command: command.name)
    def test_bad_usage_is_one_json_document(self, here, command):
        done = here(*command.name.split(), "--json", "--nonsense")
        assert done.returncode == 2 and json.loads(done.stdout)["error"] == "usage"

    @pytest.mark.parametrize("command", mad.COMMANDS, ids=lambda command: command.name)
    def test_help_has_an_example_and_wins_over_errors(self, here, command):
        done = here(*command.name.split(), "--nonsense", "--help")
        assert done.returncode == 0 and "usage: mad " + command.name in done.stdout and command.example in done.stdout

    def test_names_are_looked_up_and_ids_are_not(self, here, fake):
        fake.answers["GET /users/id-by-name/ann%40home"] = (200, {"result": "u"}, {})
        fake.answers["GET /roles/id-by-name/Boss"] = (200, "r", {})
        fake.answers["POST /roles/assign"] = (200, {"success": True, "message": "Done."}, {})
        assert here("role", "assign", "--user-id", "ann@home", "--role-id", "Boss", MAD_ADMIN_URL=fake.url).returncode == 0
        assert json.loads(fake.seen[-1][3]) == {"user_id": "u", "role_id": "r"} and len(fake.seen) == 3
        done = here("role", "assign", "--user-id", "bob", "--role-id", "Boss")
        assert done.returncode == 1 and done.stderr == "mad: error: there is no user 'bob'\nmad: hint: see: mad user list\n"


class TestOptions:
    @staticmethod
    def of(*words, name="client create"):
        return mad.parse(next(command for command in mad.COMMANDS if command.name == name), list(words))

    @pytest.mark.parametrize("words, found", [
        (["--public"], {"public": True}), (["--public", "FALSE"], {"public": False}), (["--public:true"], {"public": True}), (["--secret", "--"], {"secret": "--"}), (["--secret=a=b:c"], {"secret": "a=b:c"}),
        (["--secret", "--json"], {"secret": "--json"}), (["--secret", "@file"], {"secret": "@file"}), (["--grant", "a", "b", "--grant=c"], {"grant": ["a", "b", "c"]}), (["--gen-password", "12"], {"gen-password": 12}),
        (["--display-name", ""], {"display-name": ""}), (["--secret", "-h"], {"secret": "-h"}),
    ])
    def test_are_read_as_they_are_meant(self, words, found):
        parsed = self.of("--client-id", "x", *words)
        assert parsed.errors == [] and not parsed.wants_help and parsed.values == {"client-id": "x"} | found

    @pytest.mark.parametrize("words, error", [
        (["--publi"], "unknown option '--publi'"), (["-p"], "unknown option '-p'"), (["x"], "unexpected word 'x'"), (["--", "--public"], "unexpected word '--public'"), (["--secret"], "--secret needs a value"),
        (["--secret="], "--secret is blank"), (["--public=yes"], "--public is true or false"), (["--secret", "a", "--secret", "b"], "--secret is given twice"), (["--gen-password", "x"], "--gen-password is a whole number"),
        (["--gen-password", "7"], "--gen-password is at least 8"), (["--secret", "a", "--secret-stdin"], "--secret and --secret-stdin exclude each other"), (["--secret", "\udcff"], "--secret is not valid UTF-8"),
    ])
    def test_are_refused_when_they_are_wrong(self, words, error):
        assert self.of("--client-id", "x", *words).errors == [error]

    def test_an_update_changes_something(self):
        assert self.of("--id", "x", name="user update").errors == ["nothing to change: give at least one of --username, --email, --is-active"]
        assert self.of("--id", "x", "--is-active=false", name="user update").errors == []

    def test_a_blank_id_does_not_become_every_id(self, here):
        assert here("user", "delete", "--id=").returncode == here("user", "delete", "--id", "..").returncode == 2

    def test_a_near_word_is_suggested(self, here):
        assert "did you mean --username?" in here("user", "create", "--usrname", "x").stderr
        assert "did you mean mad user list?" in here("user", "lst").stderr and "did you mean mad client?" in here("clint").stderr

    def test_a_made_secret_has_the_length_asked_for_and_is_not_lost(self, here, fake):
        fake.answers["POST /clients"] = (200, {"id": USER["id"], "client_id": "door"}, {})
        done = here("client", "create", "--client-id", "door", "--gen-password", "40", "--json", MAD_ADMIN_URL=fake.url)
        secret = json.loads(done.stdout)["client_secret"]
        assert len(secret) == 40 and json.loads(fake.seen[0][3])["client_secret"] == secret
        assert here("client", "create", "--client-id", "door", "--quiet").returncode == 2 and len(fake.seen) == 1
        assert here("client", "create", "--client-id", "door", "--quiet", "--public").stdout == USER["id"] + "\n"


class TestTables:
    ROWS = [{"id": USER["id"], "username": "a" * 30, "email": "\u6f22" * 30, "is_active": False}]

    @pytest.mark.parametrize("width", [1, 20, 60, 80, 200])
    def test_they_fit_the_terminal(self, monkeypatch, width):
        monkeypatch.setattr(mad, "terminal_width", lambda: width)
        for line in mad.table("users", "id", "username", "email", "is_active")(self.ROWS):
            assert mad.columns_of(line) <= width

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
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(".mad*")} == {".mad_token": 0o600, ".mad_url": 0o600}, "and nothing is left over"

    @pytest.mark.parametrize("name", [".mad_token", ".mad_url"])
    @pytest.mark.parametrize("make", [
        lambda path: path.symlink_to("elsewhere"), lambda path: path.mkdir(), lambda path: os.mkfifo(path), lambda path: (path.write_text(TOKEN), path.chmod(0o666)), lambda path: path.write_bytes(b"\xff"),
    ], ids=["link", "folder", "pipe", "writable", "binary"])
    def test_are_not_read_when_they_are_not_what_mad_wrote(self, here, fake, tmp_path, name, make):
        (tmp_path / "elsewhere").write_text(TOKEN)
        (tmp_path / name).unlink()
        make(tmp_path / name)
        assert self.listing(here).returncode == 3 and fake.seen == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_are_not_read_when_they_are_somebody_elses(self, here, fake, tmp_path):
        os.chown(tmp_path / ".mad_token", 12345, 12345)
        assert "belongs to somebody else" in self.listing(here).stderr and fake.seen == []

    def test_are_closed_when_the_original_left_them_open_to_read(self, here, tmp_path):
        (tmp_path / ".mad_token").chmod(0o644)
        assert self.listing(here).returncode == 0 and stat.S_IMODE((tmp_path / ".mad_token").stat().st_mode) == 0o600

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
        assert done.returncode == 0 and json.loads(done.stdout)["success"] is True and ("stays good" in done.stderr) is warned
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

    @pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"answer":{"access_token":"a b"},"stored_at":0,"expires_at":9e9}'])
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
        assert here("token", "get", MAD_AUTH_URL=fake.url, MAD_CLIENT_ID="a", MAD_CLIENT_SECRET="s").stdout == TOKEN + "\n"


class TestTerminal:
    MAD = [sys.executable, str(ROOT / "mad.py")]

    @pytest.fixture
    def env(self, tmp_path):
        return {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | {"HOME": str(tmp_path)}

    @pytest.mark.parametrize("code, status", [("123456", 0), ("", 1)])
    def test_a_code_is_asked_for_once_after_a_refusal(self, fake, env, code, status):
        good = (200, {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60}, {})
        fake.answer = lambda method, path: good if "totp=123456" in fake.seen[-1][3] else (403, {"success": False, "message": "No.", "error": "invalid_grant"}, {})
        child = pexpect.spawn(self.MAD[0], [self.MAD[1], "session", "login", "--admin-url", fake.url, "--username", "root"], env=env, encoding="utf-8", timeout=10)
        child.expect_exact("password: ")
        child.waitnoecho()
        child.sendline("hush hush")
        child.expect_exact("one-time code (blank if none): ")
        child.sendline(code)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == status and len(fake.seen) == (2 if code else 1)

    def test_ctrl_c_is_silent(self, env):
        child = pexpect.spawn(self.MAD[0], [self.MAD[1], "session", "login", "--username", "root"], env=env, encoding="utf-8", timeout=10)
        child.expect_exact("password: ")
        child.waitnoecho()
        child.sendintr()
        assert "Traceback" not in child.read()
        child.close()
        assert child.exitstatus == 130

    def test_a_reader_that_has_seen_enough_is_no_failure(self, env):
        done = subprocess.run(["bash", "-c", '"$@" | head -1; echo "${PIPESTATUS[0]}"', "_", *self.MAD, "completion", "fish"], env=env, capture_output=True, text=True)
        assert done.stdout == "# completion of mad for fish\n0\n" and done.stderr == ""

    def test_an_answer_that_cannot_be_written_is_one(self, env):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*self.MAD, "completion", "bash"], env=env, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and done.stderr == "mad: error: cannot write the answer: No space left on device\n"


class TestStart:
    def test_a_command_loads_little(self, fake, env_of_nobody):
        fake.answers["GET /users"] = (200, [USER], {})
        code = "import sys, mad; mad.main(sys.argv[1:]); print(*sorted({'ssl', 'argparse', 'http.client', 'urllib.request', 'email', 'asyncio', 'importlib.metadata', 'hashlib', 'shutil', 'typing', 'difflib', 'datetime'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-S", "-c", code, "user", "list", "--quiet", "--admin-url", fake.url], cwd=ROOT, env=env_of_nobody, capture_output=True, text=True)
        assert done.stdout == USER["id"] + "\n\n", done

    @pytest.fixture
    def env_of_nobody(self, tmp_path):
        return {"HOME": str(tmp_path), "MAD_ADMIN_TOKEN": TOKEN, "PATH": os.environ["PATH"]}
