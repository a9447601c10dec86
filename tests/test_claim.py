"""The set-up on a page: the claim code, the page without a browser, and a box claimed while somebody guesses."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlencode

import pytest
from appliance import claim as c
from appliance import service
from appliance.base import StartupError
from appliance.base.pages import Pages
from appliance.base.settings import Options
from appliance.oobe import made_root
from box import free_port
from test_oobe import ENVIRON, PASSWORD, PROGRAM, log_in, left

GOOD = {
    "name": "box.lan", "username": "Boss", "email": "boss@box.example", "password": PASSWORD, "again": PASSWORD,
    "passphrase": "", "client_id": "app", "audience": "", "scopes": "a:read",
}  # fmt: skip


class TestCode:
    """60 bits, which somebody types from a screen or a label."""

    def test_it_has_sixty_bits_and_no_sign_that_is_mistaken_for_another(self):
        codes = {c.new_code() for _ in range(50)}
        assert len(codes) == 50 and len(set(c.SYMBOLS)) == 32
        for code in codes:
            assert re.fullmatch("([0-9A-HJKMNP-TV-Z]{4}-?){3}", code) and len(c.fold_code(code)) == 12

    @pytest.mark.parametrize("typed", ["0123-45AB-CDEF", "o i234 5abcdef", "OL2345ABCDEF", " 0123-45ab-cdef\r\n"])
    def test_case_blanks_hyphens_and_look_alikes_count_for_nothing(self, typed):
        guard = c.Guard("0123-45AB-CDEF" if "0123" in typed else "0I23-45AB-CDEF")
        assert guard.check("192.0.2.1", typed) == (True, 0)

    def test_a_label_must_have_as_many_signs(self, tmp_path):
        label = tmp_path / "label"
        for content, is_enough in (("ABCD-EFGH-JKM", False), ("A" * 5 + "-" * 9, False), ("abcd efgh jkmn", True)):
            label.write_text(content + "\n")
            label.chmod(0o600)
            with contextlib.nullcontext() if is_enough else pytest.raises(StartupError, match="12 letters"):
                assert c.read_code(str(label)) == content

    def test_a_code_that_others_can_read_is_refused(self, tmp_path):
        (tmp_path / "label").write_text("abcd efgh jkmn\n")
        (tmp_path / "label").chmod(0o644)
        with pytest.raises(StartupError, match="label"):
            c.read_code(str(tmp_path / "label"))


class TestGuard:
    """Wrong codes slow down their own source, and no other."""

    def make(self):
        clock = [1000.0]
        return c.Guard("0123-45AB-CDEF", lambda: clock[0]), clock

    def test_each_wrong_code_doubles_the_wait_up_to_a_minute(self):
        guard, clock = self.make()
        waits = []
        for _ in range(9):
            assert guard.check("192.0.2.1", "wrong") == (False, 0)
            _, wait = guard.check("192.0.2.1", "wrong")
            waits.append(wait - 1)
            clock[0] += wait
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    def test_whoever_shares_the_source_of_a_guesser_gets_in_with_the_right_code(self):
        guard, clock = self.make()
        for _ in range(400):
            guard.check("192.0.2.1", "wrong")
            clock[0] += 0.5
            assert guard.check("192.0.2.1", "0123-45AB-CDEF") == (True, 0)
        assert guard.check("192.0.2.1", "wrong")[1] > 30, "and the guesser goes on waiting"

    @pytest.mark.parametrize(
        "one, other, is_same",
        [("192.0.2.1", "192.0.2.2", False), ("2001:db8::1", "2001:db8::ffff", True), ("2001:db8::1", "2001:db8:0:1::1", False)],
    )
    def test_a_source_is_what_one_peer_can_have_many_of(self, one, other, is_same):
        guard, _ = self.make()
        guard.check(one, "wrong")
        assert guard.check(other, "wrong") == ((False, 2) if is_same else (False, 0))

    def test_a_crowd_of_guessers_takes_a_bounded_memory_and_shuts_nobody_out(self):
        guard, _ = self.make()
        for number in range(c.Guard.MOST + 50):
            guard.check(f"10.0.{number >> 8}.{number & 255}", "wrong")
        assert len(guard.wrong) == c.Guard.MOST
        assert guard.check("192.0.2.9", "0123-45AB-CDEF") == (True, 0)


@pytest.fixture
def waiting(tmp_path):
    """A claim that waits for its answers, in a folder of its own, called box.lan."""
    options = Options(
        {"config": str(tmp_path / "mad.conf"), "docker": "test"}, docker=True, tls_names="box.lan", log_file="",
        db_file=str(tmp_path / "mad.db3"), seal_key_file=str(tmp_path / "seal.key"), argon2id_time=1,
        argon2id_memory=8192, argon2id_parallelism=1, token_signing_key_file=str(tmp_path / "token.pem"),
        admin_token_signing_key_file=str(tmp_path / "admin_token.pem"), token_signing_key_length_rsa=2048,
    )
    return c.Claim(options, {}, False)


class Page:
    """The page, called without a server."""

    def __init__(self, claim, code="0123-45AB-CDEF"):
        self.logged = []
        self.app = c.ClaimPage(
            Pages(claim.options), c.Guard(code), claim, claim.take,
            lambda event, level="info", **fields: self.logged.append((event, level, fields)),
        )

    def __call__(self, method="GET", path="/", fields=None, kind="application/x-www-form-urlencoded", language="en", body=None):
        content = urlencode(fields or {}).encode() if body is None else body
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": "box.lan:9040", "CONTENT_TYPE": kind,
            "HTTP_ACCEPT_LANGUAGE": language, "microauthd.peer": "192.0.2.1", "wsgi.input": io.BytesIO(content),
        }  # fmt: skip
        started = []
        body = b"".join(self.app(environ, lambda status, headers: started.append((int(status[:3]), dict(headers)))))
        return *started[0], body.decode()


class TestPage:
    def test_nothing_is_asked_before_the_code(self, waiting):
        page = Page(waiting)
        status, headers, body = page()
        assert status == 200 and 'name="code"' in body and 'name="username"' not in body
        assert headers["Cache-Control"] == "no-store" and "frame-ancestors 'self'" in headers["Content-Security-Policy"]
        assert "Strict-Transport-Security" not in headers and "<script" not in body
        for fields in ({}, GOOD, GOOD | {"code": "wrong"}):
            status, _, body = Page(waiting)("POST", fields=fields)
            assert status == 403 and 'name="username"' not in body
        assert not os.path.exists(waiting.options.db_file)

    def test_with_the_code_the_name_by_which_it_was_reached_is_proposed(self, waiting):
        status, _, body = Page(waiting)("POST", fields={"code": "0123-45ab-cdef"})
        assert status == 200 and 'value="box.lan"' in body and 'name="passphrase"' in body

    def test_each_field_says_what_a_browser_may_fill_in_and_nothing_of_what_came_is_markup(self, waiting):
        """HTML, autofill: only a password manager's names are given, and a new password is not an old one."""
        came = GOOD | {"code": "0123-45AB-CDEF", "name": '"><b autofocus>', "username": "{{!name}}"}
        body = Page(waiting)("POST", fields=came)[2]
        inputs = re.findall(r'<input id="(\w+)" name="(\w+)" type="(\w+)" value="([^"]*)"([^<>]*)>', body)
        found = {
            name: (kind, re.findall('autocomplete="([^"]*)"', more), " required" in more, " autofocus" in more)
            for identifier, name, kind, _, more in inputs if identifier == name
        }  # fmt: skip
        new = ("password", ["new-password"], True, False)
        optional = ("text", ["off"], False, False)
        assert found == {
            "name": ("text", ["on"], True, True), "username": ("text", ["username"], True, False),
            "email": ("email", ["email"], True, False), "password": new, "again": new, "passphrase": optional,
            "client_id": optional, "audience": optional, "scopes": optional,
        }  # fmt: skip
        assert 'value="&quot;&gt;&lt;b autofocus&gt;"' in body and 'value="{{!name}}"' in body

    @pytest.mark.parametrize(
        "wrong, field, sentence",
        [
            ({"password": "short", "again": "short"}, "password", "at least 8 characters"),
            ({"password": "password123", "again": "password123"}, "password", "most common"),
            ({"password": "boss@box.example", "again": "boss@box.example"}, "password", "must not be the user name"),
            ({"again": "another"}, "again", "not the same"), ({"email": "nonsense"}, "email", "e-mail address"),
            ({"username": ""}, "username", "printable characters"), ({"name": "localhost"}, "name", "itself for each"),
            ({"name": "a b"}, "name", "must be a host name"), ({"client_id": "a b"}, "client_id", "without blank"),
            ({"scopes": "openid"}, "scopes", "leave it out"), ({"passphrase": "short"}, "passphrase", "at least 8"),
        ],
    )  # fmt: skip
    def test_each_answer_is_checked_as_on_the_terminal_and_nothing_is_made(self, waiting, wrong, field, sentence):
        page = Page(waiting)
        status, _, body = page("POST", fields=GOOD | {"code": "0123-45AB-CDEF"} | wrong)
        assert status == 422 and re.search(rf'id="{field}_error" role="alert">[^<]*{sentence}', body)
        assert PASSWORD not in body and not os.path.exists(waiting.options.db_file)
        german = page("POST", fields=GOOD | {"code": "0123-45AB-CDEF"} | wrong, language="de-DE")[2]
        assert sentence not in german and f'id="{field}_error"' in german

    def test_the_claim_makes_a_box_of_the_ca_that_the_page_was_served_by(self, waiting, tmp_path):
        page = Page(waiting)
        root = page(path="/ca.pem")[2]
        status, _, body = page("POST", fields=GOOD | {"code": "0123-45AB-CDEF"})
        assert status == 200 and page.app.ended.is_set()
        options, account = log_in(tmp_path, "boss", config=str(tmp_path / "mad.conf"))
        assert (account.email, options.tls, options.auth_issuer) == ("boss@box.example", "self", "https://box.lan:9040")
        assert options.admin_issuer == "https://box.lan:9041" and 'href="https://box.lan:9041/dashboard/"' in body
        assert (tmp_path / "ca.pem").read_text() == root and waiting.fingerprint in body
        assert options.db_pass in body and len(options.db_pass) == 32 and "Start its server" in body
        assert re.search(r'client_secret <code class="secret">\S{43}<', body)
        logged = json.dumps(page.logged)
        assert all(secret not in logged for secret in ("0123", options.db_pass, PASSWORD))

    def test_a_name_that_the_ca_of_the_page_may_not_sign_for_gets_another_ca(self, waiting, tmp_path):
        page = Page(waiting)
        body = page("POST", fields=GOOD | {"code": "0123-45AB-CDEF", "name": "other.lan"})[2]
        assert (tmp_path / "ca.pem").read_text() != page(path="/ca.pem")[2] and waiting.fingerprint not in body

    def test_there_is_one_claim_ever(self, waiting, tmp_path):
        page = Page(waiting)
        assert page("POST", fields=GOOD | {"code": "0123-45AB-CDEF"})[0] == 200
        status, _, body = page("POST", fields=GOOD | {"code": "0123-45AB-CDEF", "username": "thief"})
        assert status == 409 and "set up already" in body
        with pytest.raises(StartupError, match="set up already"):
            c.run(waiting.options, ["--web"], {})

    def test_two_right_codes_at_once_are_one_claim_and_the_other_is_answered_too(self, waiting):
        page, seen = Page(waiting), []
        real = page.app.hand_over
        begun, go_on = threading.Event(), threading.Event()

        def hand_over(answers):
            seen.append(answers["username"])
            begun.set()
            assert go_on.wait(20)
            return real(answers)

        page.app.hand_over = hand_over
        forms = [GOOD | {"code": "0123-45AB-CDEF"}] * 2 + [GOOD | {"code": "0123-45AB-CDEF", "username": "thief"}]
        answers = {}

        def post(number):
            answers[number] = page("POST", fields=forms[number])

        threads = [threading.Thread(target=post, args=(number,)) for number in range(3)]
        threads[0].start()
        assert begun.wait(20)
        for thread in threads[1:]:
            thread.start()
        go_on.set()
        for thread in threads:
            thread.join(60)
        assert seen == [GOOD["username"]] and [answers[number][0] for number in range(3)] == [200, 200, 409]
        # A double click sends a form twice, and the browser shows the last answer, in which the secrets must be.
        assert answers[0][2] == answers[1][2] and "set up already" in answers[2][2]
        assert [event for event, *_ in page.logged].count("claimed") == 1

    @pytest.mark.parametrize(
        "body, kind", [(b"code=%ff", None), (b"code=1&code=2", None), (b"{}", "application/json"), (b"code=%00", None)]
    )
    def test_what_is_no_form_is_refused_in_a_sentence(self, waiting, body, kind):
        status, _, shown = Page(waiting)("POST", body=body, kind=kind or "application/x-www-form-urlencoded")
        assert status == 400 and "did not work" in shown

    @pytest.mark.parametrize(
        "method, path, status",
        [("GET", "/nowhere", 404), ("POST", "/ca.pem", 405), ("DELETE", "/", 405), ("GET", "/../mad.conf", 404)],
    )
    def test_there_is_nothing_else(self, waiting, method, path, status):
        assert Page(waiting)(method, path)[0] == status


class Opened:
    """`setup --web` in a process, with its port."""

    def __init__(self, folder, *words, first_start=None):
        mode = ["--first-start", "--answers", str(first_start)] if first_start else ["--web"]
        self.folder, self.port = folder, free_port()
        (folder / "mad.conf").write_text("docker = true\ntls-names = box.lan\n")
        (folder / "mad.conf").chmod(0o600)
        self.process = subprocess.Popen(
            [*PROGRAM, "setup", *mode, "--auth-port", str(self.port), "--admin-port", str(free_port()), *words],
            cwd=folder, env=ENVIRON, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.note = folder / "claim.txt"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get()
                return
            time.sleep(0.1)
        raise AssertionError(self.process.communicate()[0])

    def get(self, fields=None):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        data = urlencode(fields).encode() if fields else None
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{self.port}/", data, timeout=60, context=context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def code(self):
        return re.search(r"claim code +(\S+)", self.note.read_text())[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


class TestOpened:
    """The page in its own process, on a real port."""

    def test_a_box_is_claimed_and_the_code_is_in_a_private_file_alone(self, tmp_path):
        with Opened(tmp_path) as opened:
            code = opened.code
            assert stat.S_IMODE(opened.note.stat().st_mode) == 0o600
            status, body = opened.get(GOOD | {"code": code})
            assert status == 200, body
            output = opened.process.communicate(timeout=60)[0]
        assert opened.process.returncode == 0 and not opened.note.exists()
        assert log_in(tmp_path, "boss")[0].auth_issuer == f"https://box.lan:{opened.port}"
        assert code not in output and PASSWORD not in output and "claimed peer=127.0.0.1" in output

    def test_it_ends_with_sigterm_and_leaves_nothing(self, tmp_path):
        with Opened(tmp_path, "--claim-code-file", self.label(tmp_path)) as opened:
            assert "claim code    in label" in opened.note.read_text() and "SECRET" not in opened.note.read_text()
            assert opened.get({"code": "secret 0123 4567 89"})[0] == 200
            opened.process.send_signal(signal.SIGTERM)
            opened.process.communicate(timeout=30)
        assert opened.process.returncode == 143 and left(tmp_path) == {"mad.conf", "label"}
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                opened.get()
            except OSError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the page is still served")

    def label(self, folder):
        (folder / "label").write_text("SECRET-0123-4567-89\n")
        (folder / "label").chmod(0o600)
        return "label"


class TestService:
    """A first start whose answers say web = true."""

    def test_the_answers_go_with_the_claim_and_the_page_says_that_the_server_starts(self, tmp_path):
        answers = tmp_path / "answers.toml"
        answers.write_text("web = true\nmax-login-failures = 7\n")
        with Opened(tmp_path, first_start=answers) as opened:
            status, body = opened.get(GOOD | {"code": opened.code})
            assert status == 200 and "It starts now" in body
            output = opened.process.communicate(timeout=60)[0]
        assert opened.process.returncode == 0 and "claim code" not in output
        assert not answers.exists() and log_in(tmp_path, "boss")[0].max_login_failures == 7

    def test_systemd_is_not_waited_for_while_the_box_waits(self, tmp_path, monkeypatch, capsys):
        layout, ran = service.Layout(root=str(tmp_path)), []
        monkeypatch.setattr(service, "run_program", lambda *words: ran.append(words))
        (tmp_path / "etc/microauthd").mkdir(parents=True)
        answers = tmp_path / "etc/microauthd/answers.toml"
        for content, expected in (("web = true", "--no-block"), ("web = false", "microauthd.service")):
            answers.write_text(content)
            service.start_service(layout)
            assert ran[-1][2] == expected and ("claim.txt" in capsys.readouterr().out) is (expected == "--no-block")

    def test_root_reads_the_root_of_a_box_whose_data_is_another_users(self, waiting, tmp_path):
        waiting.take(GOOD)
        content, owner = (tmp_path / "ca.pem").read_bytes(), 1 if os.geteuid() == 0 else os.geteuid()
        with tempfile.TemporaryDirectory() as folder:
            for path in (folder, folder + "/ca.pem"):
                if path != folder:
                    with open(path, "wb") as file:
                        file.write(content)
                os.chown(path, owner, -1)
            options = dataclasses.replace(waiting.options, db_file=folder + "/mad.db3", tls="self")
            assert made_root(options).sha256 == waiting.fingerprint


class TestTime:
    def test_it_closes_when_its_time_is_over(self, waiting, monkeypatch, capsys, tmp_path):
        forked = []
        monkeypatch.setattr(c, "fork_as", lambda owner, work: forked.append(owner))
        monkeypatch.setattr(c, "listen", lambda ip, port: io.BytesIO())
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(c, "new_code", lambda: "0123-45AB-CDEF")
        # Both ends stay open as if the page lived: nothing is forked here.
        kept = []
        monkeypatch.setattr(os, "close", lambda descriptor, close=os.close: kept.append(descriptor))
        with pytest.raises(StartupError, match="nobody has claimed the box"):
            c.run(waiting.options, ["--web"], {}, seconds=0.01)
        assert forked and not (tmp_path / "claim.txt").exists() and "0123" not in "".join(capsys.readouterr())

    @pytest.mark.parametrize(
        "content, sentence",
        [
            ('web = true\n[admin]\nusername = "a"\n', "admin is asked by the page"), ("web = true\nnonsense = 1\n", "unknown option"),
            ("web = true\nclaim_code_file = 1\n", "claim_code_file must be"), ("web = 1\n", "web must be true or false"),
        ],
    )  # fmt: skip
    def test_an_answers_file_for_the_page_is_checked(self, tmp_path, content, sentence):
        (tmp_path / "answers.toml").write_text(content)
        done = subprocess.run(
            [*PROGRAM, "setup", "--answers", "answers.toml"], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 1 and sentence in done.stderr and left(tmp_path) == {"answers.toml"}
