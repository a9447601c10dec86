"""The first start: the wizard on a pseudo-terminal, the answers file, and kill -9 at every step."""

import os
import re
import signal
import stat
import subprocess
import sys

import microauthd as m
import pexpect
import pyotp
import pytest
from box import CHEAP, ROOT

PASSWORD = "correct horse"
PROGRAM = [sys.executable, str(ROOT / "microauthd.py")]
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("MAD_")} | CHEAP | {"PYTHONDONTWRITEBYTECODE": "1"}

QUICK = (  # (question, answer)
    ("Go through every setting?", "n"), ("Database file?", ""), ("Database passphrase?", "a long phrase"), ("The same again:", "a long phrase"),
    ("user name?", ""), ("e-mail?", "root@box.example"), ("password?", PASSWORD), ("The same again:", PASSWORD), ("second factor", "n"),
    ("client_id of the first service", ""), ("Its audience", ""), ("Its scopes", "a:read"), ("Set it up?", "y"),
)


class Console:
    """A terminal of 80 by 24 that is answered by hand."""

    def __init__(self, folder, *words, term="vt100"):
        self.child = pexpect.spawn(PROGRAM[0], [PROGRAM[1], "setup", *words], cwd=folder, env=ENVIRON | {"TERM": term}, dimensions=(24, 80), encoding="utf-8", timeout=10)
        self.screen = []
        self.child.logfile_read = type("Tape", (), {"write": lambda _, text: self.screen.append(text), "flush": lambda _: None})()

    def answer(self, question, words):
        self.child.expect_exact(question)
        self.child.send(words + "\r")
        # prompt_toolkit draws the line once more when it is accepted
        self.child.expect_exact("\x1b[?2004l")

    def end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus

    @property
    def text(self):
        return "".join(self.screen)


def log_in(folder, username="admin", password=PASSWORD, totp=""):
    """Open what was set up and let the administrator in."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        options = m.load_options({"config": ("mad.conf", "test")}, CHEAP)
        store = m.Store(options.db_file, m.read_database_key(options.db_file, options.db_pass, options.no_db_pass))
        store.open()
        rings = [m.KeyRing(m.read_ring(path, phrase)) for path, phrase in ((options.token_signing_key_file, options.token_signing_key_pass), (options.admin_token_signing_key_file, options.admin_token_signing_key_pass))]
        idp = m.Idp(options, store, *rings, m.Seal(m.read_seal_key(options.seal_key_file)))
        account, _ = m.authenticate_user(idp, m.LOCAL, username, password, totp, admin=True)
        store.close()
        return options, account
    finally:
        os.chdir(here)


def left(folder):
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


class TestWizard:
    @pytest.mark.parametrize("term", ["dumb", "vt100", "linux"])
    def test_the_quick_path(self, tmp_path, term):
        console = Console(tmp_path, term=term)
        for question, words in QUICK:
            console.answer(question, words)
        assert console.end() == 0
        options, account = log_in(tmp_path)
        assert account.email == "root@box.example" and options.enable_token_refresh and options.oidc_issuer == "http://localhost:9040"
        assert left(tmp_path) == {"mad.conf", "mad.db3", "token.pem", "admin_token.pem", "seal.key"}
        assert re.search(r"client_secret  \S{43}", console.text) and "mad token get --client-id app" in console.text
        assert PASSWORD not in console.text and "a long phrase" not in console.text
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", console.text), "no colours"
        assert console.text.isascii()

    def test_answers_are_checked_as_they_are_given(self, tmp_path):
        console = Console(tmp_path, "--quick")
        console.answer("Database file?", "")
        console.answer("Database passphrase?", "short")
        console.answer("at least 8 characters", "a long phrase")
        console.answer("The same again:", "another phrase")
        console.answer("not the same", "")
        console.answer("Really keep the database unencrypted?", "maybe")
        console.answer("please answer yes or no", "yes")
        console.answer("user name?", "\x0b" + "x" * 101)
        console.answer("1 to 100", "\x01\x0bRoot")
        console.answer("e-mail?", "nonsense")
        console.answer("must be an e-mail", "\x01\x0bRoot@Box.example")
        for wrong, sentence in (("short", "at least 8"), ("password123", "most common"), ("root@box.example", "must not be the user name")):
            console.answer("password?", wrong)
            console.child.expect_exact(sentence)
        console.answer("password?", PASSWORD)
        console.answer("The same again:", PASSWORD)
        console.answer("second factor", "")
        console.answer("client_id of the first service", "\x01\x0ba b")
        console.answer("without blank", "\x01\x0bsvc")
        console.answer("Its audience", "")
        console.answer("Its scopes", 'bad"one')
        console.answer("without blank", "\x01\x0b")
        console.answer("Set it up?", "")
        assert console.end() == 0
        options, account = log_in(tmp_path, "root")
        assert options.no_db_pass and not options.db_pass and account.username == "root"

    def test_a_second_factor_is_confirmed_by_a_code(self, tmp_path):
        console = Console(tmp_path, "--quick", term="dumb")
        for question, words in QUICK[1:8]:
            console.answer(question, words)
        console.answer("second factor", "y")
        console.child.expect_exact("authenticator:")
        console.child.expect(r"((?:[A-Z2-7]{4} ?){8})")
        seed = console.child.match[1].replace(" ", "")
        console.answer("The code it shows?", "000000")
        console.answer("not the code", "\x01\x0b" + pyotp.TOTP(seed).now())
        for question, words in QUICK[9:]:
            console.answer(question, words)
        assert console.end() == 0
        with pytest.raises(m.Problem):
            log_in(tmp_path)
        import time

        assert log_in(tmp_path, totp=pyotp.TOTP(seed).at(int(time.time()) + 30))[1].username == "admin"

    def test_the_guided_path_asks_every_option(self, tmp_path):
        console = Console(tmp_path, "--guided")
        for question, words in QUICK[1:4]:
            console.answer(question, words)
        asked = [option for option in m.OPTIONS if option.ask and option.name not in ("db-file", "db-pass", "oidc-client-id")]
        skipped = {"auth-ssl-cert-pass", "admin-ssl-cert-pass", "admin-token-signing-key-length-rsa", "refresh-token-expiration", "refresh-token-purge-days"}
        values = {"auth-port": "9140", "token-expiration": "600", "max-login-failures": "3", "auth-domain": "box.example"}
        for option in asked:
            if option.name in skipped:
                continue
            if option.name == "auth-port":
                console.answer(option.ask, "\x01\x0b70000")
                console.child.expect_exact("from 1 to 65535")
            console.answer(option.ask, "\x01\x0b" + values[option.name] if option.name in values else "")
        for question, words in QUICK[4:]:
            console.answer(question, words)
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert (options.auth_port, options.token_expiration, options.max_login_failures, options.auth_issuer) == (9140, 600, 3, "https://box.example")
        assert options.refresh_token_expiration == 259200, "what was not asked keeps its default"

    @pytest.mark.parametrize("key, status", [("\x03", 130), ("\x04", 1)])
    @pytest.mark.parametrize("number", range(len(QUICK)))
    def test_leaving_at_any_question_leaves_nothing(self, tmp_path, key, status, number):
        console = Console(tmp_path)
        for question, words in QUICK[:number]:
            console.answer(question, words)
        console.child.expect_exact(QUICK[number][0])
        # Ctrl-D deletes forward where there is text, and ends the input on an empty line
        console.child.send("\x01\x0b" + key if key == "\x04" else key)
        assert console.end() == status
        assert os.listdir(tmp_path) == []

    def test_it_refuses_before_any_question_when_it_is_done(self, tmp_path):
        (tmp_path / "mad.db3").write_bytes(b"there")
        console = Console(tmp_path)
        assert console.end() == 1 and "set up already" in console.text and "?" not in console.text

    def test_without_a_terminal_it_says_what_to_do(self, tmp_path):
        done = subprocess.run([*PROGRAM, "setup"], cwd=tmp_path, env=ENVIRON, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 1 and "--answers" in done.stderr and "--demo" in done.stderr and os.listdir(tmp_path) == []


GOOD = '[options]\ndb-pass = "a long phrase"\n[admin]\nusername = "admin"\nemail = "root@box.example"\npassword = "correct horse"\n[client]\nclient_id = "app"\nscopes = ["a:read"]\n'


def unattended(folder, content, *words, input="", mode=0o600):
    path = folder / "answers.toml"
    path.write_text(content)
    path.chmod(mode)
    return subprocess.run([*PROGRAM, "setup", "--answers", str(path), *words], cwd=folder, env=ENVIRON, input=input, capture_output=True, text=True, umask=0)


class TestUnattended:
    def test_from_a_private_file(self, tmp_path):
        done = unattended(tmp_path, GOOD)
        assert done.returncode == 0 and "administrator=admin" in done.stdout and re.search(r"client_secret=\S{43}\n", done.stdout), done.stderr
        log_in(tmp_path)
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    def test_passwords_from_files_or_stdin(self, tmp_path):
        (tmp_path / "one").write_text("a long phrase\n")
        content = GOOD.replace('db-pass = "a long phrase"', f'db-pass-file = "{tmp_path / "one"}"').replace('password = "correct horse"\n', "")
        assert unattended(tmp_path, content, "--admin-password-stdin", input=PASSWORD + "\n", mode=0o644).returncode == 0
        assert log_in(tmp_path)[0].db_pass == "a long phrase"

    @pytest.mark.parametrize("content, mode, sentence", [
        (GOOD, 0o644, "chmod 600"), (GOOD.replace("db-pass", "db-pas"), 0o600, "unknown option 'db-pas'"), (GOOD + "\n[extra]\n", 0o600, "extra"),
        (GOOD.replace('password = "correct horse"', 'password = "short"'), 0o600, "password must have at least 8"), (GOOD.replace("username", "user"), 0o600, "unknown key 'user'"),
        (GOOD.replace('db-pass = "a long phrase"', ""), 0o600, "db-pass"), ("[options]\nnonsense\n", 0o600, "line 2"), (GOOD.replace('"app"', '"a b"'), 0o600, "client_id"),
        (GOOD.replace("[client]", "[client]\naudience = 5"), 0o600, "audience"), (GOOD.replace('scopes = ["a:read"]', 'scopes = ["a b"]'), 0o600, "name"),
        (GOOD.replace("[options]", "[options]\nauth-port = 99999"), 0o600, "auth-port"), (GOOD.replace('"root@box.example"', '"x"'), 0o600, "email"),
    ])
    def test_what_is_wrong_is_a_sentence_and_nothing_is_made(self, tmp_path, content, mode, sentence):
        done = unattended(tmp_path, content, mode=mode)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert left(tmp_path) == {"answers.toml"}

    def test_running_it_again_refuses_and_changes_nothing(self, tmp_path):
        unattended(tmp_path, GOOD)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        done = unattended(tmp_path, GOOD)
        assert done.returncode == 1 and "set up already" in done.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_config_that_is_there_keeps_its_settings(self, tmp_path):
        (tmp_path / "mad.conf").write_text("auth-port = 9999\n")
        assert unattended(tmp_path, GOOD).returncode == 0
        assert log_in(tmp_path)[0].auth_port == 9999


class TestPowerCut:
    """Either no set-up or a whole one."""

    def die(self, tmp_path, monkeypatch, prepare):
        """Set up in a child that kills itself where `prepare` says; returns whether it died."""
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(tmp_path)
                options = m.Options({"config": "mad.conf", "db-pass": "x"}, db_pass="a long phrase", argon2id_time=1, argon2id_memory=8192, argon2id_parallelism=1)
                m.set_up(options, m.Answers("admin", "root@box.example", PASSWORD, client_id="app"), prepare())
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)

    def check(self, tmp_path, died):
        os.chdir(tmp_path)
        m.recover_setup("mad.conf")
        names = left(tmp_path)
        assert names in (set(), {"mad.conf", "mad.db3", "token.pem", "admin_token.pem", "seal.key"}), names
        if names:
            log_in(tmp_path)
        else:
            assert died
            self.die(tmp_path, None, lambda: lambda name: None)
            log_in(tmp_path)
        return bool(names)

    def test_at_every_checkpoint(self, tmp_path, monkeypatch):
        here, outcomes = os.getcwd(), []
        try:
            for number in range(1, 20):
                folder = tmp_path / str(number)
                folder.mkdir()

                def prepare(number=number):
                    count = iter(range(1, 100))
                    return lambda name: os.kill(os.getpid(), signal.SIGKILL) if next(count) == number else None

                died = self.die(folder, monkeypatch, prepare)
                outcomes.append(self.check(folder, died))
                if not died:
                    break
        finally:
            os.chdir(here)
        assert len(outcomes) > 8 and outcomes == sorted(outcomes), "nothing up to a point, everything from there on"

    def test_a_command_beside_a_running_set_up_does_not_harm_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refused = []

        def beside(name):
            done = subprocess.run([*PROGRAM, "options"], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
            refused.append((name, done.returncode, done.stderr))

        options = m.Options({"config": "mad.conf", "db-pass": "x"}, db_pass="a long phrase", argon2id_time=1, argon2id_memory=8192, argon2id_parallelism=1)
        m.set_up(options, m.Answers("admin", "root@box.example", PASSWORD, client_id="app"), beside)
        assert all(status == 1 and "setting up" in said for _, status, said in refused) and len(refused) > 5
        log_in(tmp_path)

    @pytest.mark.parametrize("number", range(1, 14))
    def test_at_every_rename(self, tmp_path, monkeypatch, number):
        here = os.getcwd()
        replace = os.replace

        def prepare():
            count = iter(range(1, 100))

            def dying(*words):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*words)

            m.os.replace = dying
            return lambda name: None

        try:
            self.check(tmp_path, self.die(tmp_path, monkeypatch, prepare))
        finally:
            os.chdir(here)
