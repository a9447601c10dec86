"""mad: its words, its files, what it says and how it ends. The journeys against a real server stand in test_flows."""

import http.server
import json
import os
import stat
import subprocess
import sys
import threading

import mad
import pexpect
import pytest
from box import ROOT

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
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
