"""The first start: the wizard on a pseudo-terminal, the answers file, and SIGKILL at every step."""

import contextlib
import datetime
import errno
import hashlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
from ipaddress import ip_address
from urllib.parse import urlencode

import microauthd as m
import pexpect
import pyotp
import pytest
import segno
from appliance import oobe
from box import CHEAP, ROOT, free_port
from conftest import Caller
from appliance.base import StartupError
from appliance.base.settings import OPTIONS, Options, load_options
from appliance.base.files import write_durably
from appliance.base.database import read_database_key
from appliance.base.store import Store
from appliance.base.tls import describe_certificate
from appliance.base.keys import read_ring
from appliance.processes import read_seal_key
from appliance.recovery import Answers, FirstClient, open_idp, recover_setup, set_up
from appliance.commands import CommandLine, main, run_setup

PASSWORD = "correct horse"
PHRASE = "a long phrase"
PROGRAM = [sys.executable, str(ROOT / "microauthd.py")]
TERMINAL = ("LANG", "LC_ALL", "LC_CTYPE", "NO_COLOR", "TERM", "LINES", "COLUMNS")  # that of whoever runs the tests
ENVIRON = (
    {name: value for name, value in os.environ.items() if not name.startswith("MAD_") and name not in TERMINAL}
    | CHEAP
)
WHOLE = {"mad.conf", "mad.db3", "token.pem", "admin_token.pem", "seal.key"}
ALL = "\x01\x0b"  # goes to the start of the line and clears it
COLOUR = re.compile(
    r"\x1b\[(?:[0-9;]*;)?(?:[134][0-9]|9[0-7]|10[0-7]|[1-9])(?:;[0-9;]*)?m"
)  # SGR other than reset, ECMA-48 §8.3.117

DATABASE = (("Database file?", ""), ("Database passphrase?", PHRASE), ("The same again:", PHRASE))
ADMINISTRATOR = (
    ("user name?", ""), ("e-mail?", "root@box.example"), ("Administrator's password?", PASSWORD),
    ("The same again:", PASSWORD), ("second factor", "n"),
)
ITSELF = ("Who uses this box", "")
CLIENT = (("client_id of the first service", ""), ("Its audience", ""), ("Its scopes", "a:read"))
QUICK = (
    *DATABASE, ("Go through every setting?", "n"), ITSELF, *ADMINISTRATOR, *CLIENT, ("Set it up?", "y"),
)  # (question, answer)


class Console:
    """A pseudo-terminal of 80 by 24 characters that a test types on."""

    def __init__(self, folder, *words, term="vt100", **environ):
        self.lines = term == "dumb"  # whole lines, as on a terminal that cannot move its cursor
        self.child = pexpect.spawn(
            PROGRAM[0], [PROGRAM[1], "setup", *words], cwd=folder, env=ENVIRON | {"TERM": term} | environ,
            dimensions=(24, 80), encoding="utf-8", timeout=90,
        )
        self.child.delaybeforesend = None
        self.child.ptyproc.delayafterclose = self.child.delayafterclose = 0.01
        self.screen = []
        self.child.logfile_read = type(
            "Tape", (), {"write": lambda _, text: self.screen.append(text), "flush": lambda _: None}
        )()

    def answer(self, question, words):
        self.child.expect(r"\s+".join(map(re.escape, question.split())))  # a sentence may be folded anywhere
        self.child.send((words.replace(ALL, "") if self.lines else words) + "\r")
        if not self.lines:
            # prompt_toolkit draws the line once more when it is accepted
            self.child.expect_exact("\x1b[?2004l")

    def answers(self, pairs):
        for question, words in pairs:
            self.answer(question, words)

    def end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus

    @property
    def text(self):
        return "".join(self.screen)


def log_in(folder, username="admin", password=PASSWORD, totp="", config="mad.conf"):
    """Open the database that was set up, and log the administrator in."""
    with contextlib.chdir(folder):
        options = load_options({"config": (config, "test")}, CHEAP)
        store = Store(options.db_file, read_database_key(options.db_file, options.db_pass, options.no_db_pass))
        store.open()
        auth = m.KeyRing(read_ring(options.token_signing_key_file, options.token_signing_key_pass))
        admin = m.KeyRing(read_ring(options.admin_token_signing_key_file, options.admin_token_signing_key_pass))
        idp = m.Idp(options, store, auth, admin, m.Seal(read_seal_key(options.seal_key_file)))
        try:
            account, _ = m.authenticate_user(idp, m.LOCAL, username, password, totp, admin=True)
        finally:
            store.close()
        return options, account


def left(folder):
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir() if path.is_file()}


def hashes_of_a_box(folder):
    """Those of its files, without the answers."""
    return {name: digest for name, digest in hashes(folder).items() if name != "answers.toml"}


class TestWizard:
    """Each answer is checked at once, and nothing is written before the last one."""

    @pytest.mark.parametrize("term", ["dumb", "linux", pytest.param("vt100", marks=pytest.mark.long)])
    def test_the_quick_path(self, tmp_path, term):
        console = Console(tmp_path, term=term)
        console.answers(QUICK)
        assert console.end() == 0
        options, account = log_in(tmp_path)
        assert account.email == "root@box.example" and options.enable_token_refresh
        assert options.oidc_issuer == "http://localhost:9040" and options.admin_domain_no_ssl
        assert "127.0.0.1:9040, issuer" in console.text
        assert left(tmp_path) == WHOLE
        assert len(re.findall(r"client_secret  \S{43}\r?\n", console.text)) == 1
        for hint in (
            "microauthd.py serve", "mad.py session login", "mad.py token get --client-id app",
            "http://localhost:9041/dashboard/", "Keep the database's passphrase elsewhere",
        ):
            assert hint in console.text
        assert PASSWORD not in console.text and PHRASE not in console.text
        assert not COLOUR.search(console.text) and console.text.isascii()
        assert "\x1b[6n" not in console.text, "never asked where its cursor is"
        if term == "dumb":
            assert "\x1b" not in console.text

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_answers_are_checked_as_they_are_given(self, tmp_path, term):
        (tmp_path / "there").write_bytes(b"")
        console = Console(tmp_path, "--quick", term=term)
        console.answers((
            ("Database file?", ALL + "there"), ("there is there already", ALL + "mad.conf"), ("different files", ALL + "there/mad.db3"), ("is not a folder", ALL + "mad.db3"),
            ("Database passphrase?", "short"), ("at least 8 characters", PHRASE), ("The same again:", "another phrase"), ("not the same", "none"),
            ("Really keep the database unencrypted?", "maybe"), ("please answer yes or no", "no"),
            ("Database file?", ""), ("Database passphrase?", "None"), ("Really keep the database unencrypted?", "yes"),
            ("Who uses", ALL + "everybody"), ("itself or network", ALL + "itself"),
            ("user name?", ALL + "x" * 101), ("1 to 100", ALL + "Root"), ("e-mail?", "nonsense"), ("must be an e-mail", ALL + "Root@Box.example"),
            ("password?", "short"), ("at least 8", "password123"), ("most common", "madadmin1"), ("most common", "root@box.example"), ("must not be the user name", PASSWORD),
            ("The same again:", "something else"), ("not the same", PASSWORD), ("The same again:", PASSWORD), ("second factor", ""),
            ("client_id of the first service", ALL + "a b"), ("without blank", ALL + "svc"), ("Its audience", ""),
            ("Its scopes", 'bad"one'), ("without blank", ALL + "openid"), ("leave it out", '""' if term == "dumb" else ALL), ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, account = log_in(tmp_path, "root")
        assert options.no_db_pass and not options.db_pass and account.username == "root"
        assert PASSWORD not in console.text and "something else" not in console.text

    @pytest.mark.parametrize("term, lang", [("dumb", ""), ("vt100", "C.UTF-8")])
    def test_a_second_factor_is_confirmed_by_a_code(self, tmp_path, term, lang):
        console = Console(tmp_path, "--quick", term=term, LANG=lang)
        console.child.setwinsize(24 if lang else 50, 80)
        console.answers((*DATABASE, ITSELF, *ADMINISTRATOR[:-1], ("second factor", "y")))
        console.child.expect_exact("The code it shows?")
        drawn = console.text[console.text.index("second factor (TOTP)") :].splitlines()
        words = "".join(re.findall(r"(?<![A-Z2-7])(?:[A-Z2-7]{4} ?){4,8}(?![A-Z2-7])", "\n".join(drawn)))
        seed = re.sub(r"\s", "", words)[:32]
        code = segno.make(m.totp_uri(seed, "admin", "localhost"), error="l", micro=False)
        if lang:
            rows = [row[0] for line in drawn if (row := re.search("[\u2580\u2584\u2588 ]{41}", line))]
            assert len(rows) == 21, "it fits on one screen, the question below it"
            dark = [[sign in pair for sign in row] for row in rows for pair in ("\u2584 ", "\u2580 ")][:41]
            border = 2
        else:
            rows = [line for line in drawn if re.fullmatch(r"(##|  ){39}", line)]
            dark = [[row[column] == " " for column in range(0, 78, 2)] for row in rows]
            border = 1
            assert console.text.isascii()
        assert dark == [[bool(module) for module in row] for row in code.matrix_iter(border=border)], (
            "what is drawn is the code"
        )
        console.child.send("000000\r")
        console.answer("not the code", ALL + pyotp.TOTP(seed).now())
        console.answers((*CLIENT, ("with a second factor", "y")))
        assert console.end() == 0 and not COLOUR.search(console.text)
        with pytest.raises(m.Problem):
            log_in(tmp_path)
        assert log_in(tmp_path, totp=pyotp.TOTP(seed).at(int(time.time()) + 30))[1].username == "admin"
        assert seed.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())

    def test_a_slow_answer_does_not_spoil_the_code(self, tmp_path, monkeypatch):
        """RFC 6238 §5.2: a code is valid for its time step. The wizard verifies it; the set-up may take longer."""
        seed, asked, made = m.new_totp_seed(), [], []

        class Slow(oobe.Prompter):
            def write(self, *_):
                pass

            def read(self, question, default="", hidden=False):
                asked.append(question)
                if question == "The code it shows?":
                    return pyotp.TOTP(seed).at(int(time.time()) - 30)  # all but run out
                given = {
                    "e-mail": "root@box.example", "password?": PASSWORD, "passphrase": PHRASE,
                    "again": PHRASE if len(asked) < 5 else PASSWORD, "TOTP": "y", "Its scopes": "",
                }
                return next((words for part, words in given.items() if part in question), default)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(oobe, "prompter_for_terminal", Slow)
        monkeypatch.setattr(m, "new_totp_seed", lambda: seed)
        monkeypatch.setattr("appliance.recovery.set_up", lambda options, answers: made.append(answers) or [])
        assert oobe.run_wizard(Options({"config": "mad.conf"}), ["--quick"]) == 0
        assert (
            made[0].totp_seed == seed
            and m.totp_time_step(seed, made[0].totp_code, int(time.time())) >= int(time.time()) // 30 - 1
        )

    def test_an_application_is_asked_for_what_a_login_needs_and_the_server_judges_each_answer(self, monkeypatch):
        given = {
            "client_id": ["web"], "audience": [""], "scopes": ["a:read"], "no secret": ["y"],
            "grant types": ["client_credentials", "authorization_code password"],
            "after a login": ["http://app.example", "https://app.example/cb https://app.example/cb", "https://app.example/cb"],
            "after a logout": [""], "Whose scripts": ["https://app.example/", "https://app.example"],
        }  # fmt: skip
        told = []

        class Typed(oobe.Prompter):
            def write(self, text="", indent=""):
                told.append(text)

            def read(self, question, default="", hidden=False):
                return next(answers for part, answers in given.items() if part in question).pop(0)

        client = oobe.ask_client(Typed(), oobe.Draft(Options({"config": "mad.conf"})), oobe.QuickAnswers(), True)
        assert client == FirstClient(
            "web", audience="web", scopes=["a:read"], public=True, grants=["authorization_code", "password"],
            redirect_uris=["https://app.example/cb"], cors_origins=["https://app.example"],
        )
        for wrong, sentence in zip(
            told, ["must be among", "must be https", "stands there twice", "in lower case"], strict=True
        ):
            assert sentence in wrong
        assert not any(given.values())

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_answers_typed_ahead_are_taken_and_never_shown(self, tmp_path, term):
        console = Console(tmp_path, "--quick", term=term)
        console.child.expect_exact("Database file?")
        console.child.send("".join(words + "\r" for _, words in (*DATABASE, *QUICK[4:])))
        assert console.end() == 0 and log_in(tmp_path)
        if term != "dumb":  # there the terminal itself shows what arrives while an open question waits
            assert PASSWORD not in console.text and PHRASE not in console.text

    def test_what_config_and_environment_say_is_kept(self, tmp_path):
        (tmp_path / "mad.conf").write_text(f'auth-port = 9999\ndb-pass = "{PHRASE}"\nenable-token-refresh = false\n')
        (tmp_path / "mad.conf").chmod(0o600)
        console = Console(tmp_path, "--quick", MAD_DB_FILE="other.db3")
        console.answers(
            (
                ("Database file?", ALL + "mine.db3"), ("environment MAD_DB_FILE", ALL + "other.db3"), ITSELF, *ADMINISTRATOR,
                *CLIENT, ("Set it up?", ""),
            )
        )
        assert console.end() == 0 and "passphrase?" not in console.text
        options, _ = log_in(tmp_path)
        assert (options.auth_port, options.db_pass, options.enable_token_refresh, options.db_file) == (
            9999, PHRASE, False, "other.db3",
        )

    @pytest.mark.parametrize(
        "term, keys",
        [
            ("vt100", "\x03\x04"), ("dumb", "\x03\x04"),
            *(pytest.param("vt100", key, marks=pytest.mark.long) for key in "\x03\x04"),
        ],
    )
    def test_leaving_at_any_question_leaves_nothing(self, tmp_path, term, keys):
        folders = [tmp_path / str(number) for number in range(len(QUICK))]
        for folder in folders:
            folder.mkdir()
        # all at once: most of the time is theirs to start
        for number, console in enumerate([Console(folder, term=term) for folder in folders]):
            console.answers(QUICK[:number])
            console.child.expect_exact(QUICK[number][0])
            key = keys[number % len(keys)]
            # Ctrl-D deletes forward where there is text, and ends the input on an empty line
            console.child.send(ALL + key if key == "\x04" and term != "dumb" else key)
            assert console.end() == {"\x03": 130, "\x04": 1}[key], QUICK[number]
            assert os.listdir(folders[number]) == [], QUICK[number]
            assert "nothing was written" in console.text.lower()
            assert not COLOUR.search(console.text)

    @pytest.mark.parametrize("term", ["vt100", pytest.param("dumb", marks=pytest.mark.long)])
    def test_no_at_the_review_asks_again_with_the_answers_as_proposals(self, tmp_path, term):
        console = Console(tmp_path, "--quick", term=term)
        console.answers((*DATABASE, *QUICK[4:-1], ("Set it up?", "n"), ("Database file?", "")))
        assert left(tmp_path) == set()
        again = ("empty: as before", "")
        console.answers((
            again, ITSELF, ("user name?", "root"), ("e-mail?", ""), again, ("second factor", ""), ("client_id", ""),
            ("audience", ""), ("scopes", ""), ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, account = log_in(tmp_path, "root")
        assert (options.db_pass, account.email) == (PHRASE, "root@box.example")
        assert "a:read" in console.text.rpartition("first client")[2]

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_one_sign_goes_back_one_question_as_often_as_one_likes(self, tmp_path, term):
        console = Console(tmp_path, "--quick", term=term)
        console.answers((
            ("Database file?", "<"), ("this is the first question", ""), *DATABASE[1:], ITSELF, ("user name?", "rot"), ("e-mail?", "<"), ("user name?", "root"),
            ("e-mail?", "a@box.example"), ("Administrator's password?", PASSWORD), ("The same again:", "<"), ("Administrator's password?", "<"), ("e-mail?", "<"), ("user name?", "boss"), ("e-mail?", "b@box.example"),
            *ADMINISTRATOR[2:], ("client_id of", ALL + "one"), ("audience", "<"), ("client_id of", ALL + "two"), ("audience", ""), ("scopes", ""), ("Set it up?", "<"), ("scopes", "b:read"), ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        assert log_in(tmp_path, "boss")[1].email == "b@box.example"
        assert "two, audience two, scopes b:read" in console.text and "<" not in left(tmp_path)

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_a_step_back_keeps_what_was_answered_as_proposals(self, tmp_path, term):
        console = Console(tmp_path, "--quick", term=term)
        back, kept = "<", ""
        console.answers((
            ("Database file?", ALL + "box.db3"), *DATABASE[1:], ITSELF, ("user name?", ALL + "boss"),
            ("e-mail?", "a@box.example"), *ADMINISTRATOR[2:], ("client_id of", ALL + "one"), ("audience", ""),
            ("scopes", back), ("audience", back), ("client_id of", back), ("second factor", back),
            ("Administrator's password? (empty: as before)", back), ("e-mail?", back), ("user name?", kept), ("e-mail?", kept),
            ("(empty: as before)", kept), ("second factor", ""), ("client_id of", ALL + "two"), ("audience", ""),
            ("scopes", ""), ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0 and (tmp_path / "box.db3").exists()
        assert log_in(tmp_path, "boss")[1].email == "a@box.example"
        assert "two, audience two, scopes none" in console.text, "a proposal that follows from an answer follows it still"

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_on_a_narrow_screen_lines_are_broken_between_words(self, tmp_path, term):
        console = Console(tmp_path, term=term)
        console.child.setwinsize(24, 40)
        console.answers(DATABASE)
        console.child.expect("matter\\)")
        lines = [COLOUR.sub("", line) for line in re.split(r"\r\n|\x1b\[\d*B|\x1b\[[0-9;]*H", console.text)]
        assert any(re.search(r"one is$|\(empty: one is made;$", re.sub(r"\x1b\[[?0-9;]*\w", "", line).rstrip()) for line in lines)
        console.child.close(force=True)

    def test_typing_replaces_what_is_proposed_and_editing_changes_it(self, tmp_path):
        console = Console(tmp_path, "--quick")
        left_arrow, backspace = "\x1b[D", "\x7f"
        console.answers((
            ("Database file?", "box.db3"), *DATABASE[1:], ITSELF, ("user name?", backspace * 5 + "boss"),
            ("e-mail?", "root@box.example"), *ADMINISTRATOR[2:], ("client_id of", left_arrow * 3 + "my"), ("audience", ""),
            ("scopes", ""), ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0 and (tmp_path / "box.db3").exists()
        assert log_in(tmp_path, "boss") and "client_id      myapp" in console.text

    def test_the_line_end_of_what_is_pasted_is_no_part_of_it(self, tmp_path):
        console = Console(tmp_path, "--quick")
        paste = "\x1b[200~{}\r\n\x1b[201~".format
        console.answers((
            DATABASE[0], *((question, paste(PHRASE)) for question, _ in DATABASE[1:]), ITSELF, ("user name?", paste("root")),
            ("e-mail?", paste("root@box.example")), *((question, paste(PASSWORD)) for question, _ in ADMINISTRATOR[2:4]),
            ADMINISTRATOR[4], *CLIENT, ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        assert log_in(tmp_path, "root")[0].db_pass == PHRASE

    @pytest.mark.parametrize("term", ["dumb", "vt100", "linux"])
    def test_a_terminal_that_does_not_bracket_it_may_send_two_signs_for_the_end_of_a_line(self, tmp_path, term):
        console = Console(tmp_path, "--quick", term=term)
        for question, words in (*DATABASE, ("Who uses this box", "itself"), *ADMINISTRATOR, *CLIENT, ("Set it up?", "y")):
            console.child.expect(r"\s+".join(map(re.escape, question.split())))
            console.child.send(words + "\r\n" if words else "\r")
        assert console.end() == 0
        assert log_in(tmp_path)[0].db_pass == PHRASE and "a:read" in console.text.rpartition("first client")[2]

    @pytest.mark.parametrize("term", ["dumb", "vt100"])
    def test_what_it_says_first_fits_the_screen(self, tmp_path, term):
        console = Console(tmp_path, term=term)
        console.child.expect_exact("> Database file?")
        assert max(map(len, console.child.before.split("\x1b")[0].splitlines())) < 80
        console.child.close(force=True)

    def test_enter_may_be_a_line_feed(self, tmp_path):
        console = Console(tmp_path, "--quick")
        for question, words in (*DATABASE, ITSELF, *ADMINISTRATOR, *CLIENT, ("Set it up?", "")):
            console.child.expect(r"\s+".join(map(re.escape, question.split())))
            console.child.send(words + "\n")
            console.child.expect_exact("\x1b[?2004l")
        assert console.end() == 0 and log_in(tmp_path)[0].db_pass == PHRASE

    def test_a_passphrase_is_made_where_none_is_given_and_shown_once(self, tmp_path):
        console = Console(tmp_path, "--quick", term="dumb")
        console.answers((
            DATABASE[0], ("Database passphrase?", ""), ITSELF, ("user name?", "<"), ITSELF, *ADMINISTRATOR, *CLIENT,
            ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        assert re.findall(r"database passphrase  (\S{32})\r", console.text) == [log_in(tmp_path)[0].db_pass]

    @pytest.mark.parametrize("file", ["mad.svg", ""])
    def test_a_code_that_does_not_fit_the_screen_is_offered_as_a_file(self, tmp_path, file):
        (tmp_path / "taken.svg").write_text("another's")
        console = Console(tmp_path, "--quick", term="dumb")
        console.answers((
            *DATABASE, ITSELF, *ADMINISTRATOR[:-1], ("second factor", "y"), ("into an SVG file", "taken.svg"),
            ("is there already", file),
        ))  # fmt: skip
        console.child.expect_exact("The code it shows?")
        seed = re.sub(r"\s", "", re.search(r"into\s+the\s+authenticator:\s+([A-Z2-7 ]{39})", console.text)[1])
        drawn = io.BytesIO()
        segno.make(m.totp_uri(seed, "admin", "localhost"), error="q").save(drawn, kind="svg", scale=5, xmldecl=True)
        written = {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) for path in tmp_path.glob("mad.svg")}
        assert written == ({file: (0o600, drawn.getvalue())} if file else {})
        console.child.send(pyotp.TOTP(seed).now() + "\r")
        console.answers((*CLIENT, ("Set it up?", "")))
        assert console.end() == 0 and left(tmp_path) == WHOLE | {"taken.svg"}
        assert (tmp_path / "taken.svg").read_text() == "another's"
        assert log_in(tmp_path, totp=pyotp.TOTP(seed).at(int(time.time()) + 30))[1].username == "admin"

    @pytest.mark.parametrize("term", ["vt100", pytest.param("dumb", marks=pytest.mark.long)])
    def test_a_box_for_the_network_has_a_name_and_makes_its_certificate(self, tmp_path, term):
        (tmp_path / "mad.conf").write_text("docker = true\nauth-ip = 0.0.0.0\nauth-insecure-http = true\n")
        console = Console(tmp_path, "--quick", term=term)
        console.answers((
            *DATABASE, ("Who uses this box", ""), ("Its certificate", ALL + "mine"), ("own, file or proxy", ALL + "own"),
            ("By which name", ALL + "localhost"), ("by which they reach this one", ALL + "box.lan"), ("/dashboard/?", ""), *ADMINISTRATOR, *CLIENT,
            ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert (options.tls, options.auth_issuer, options.admin_issuer) == ("self", "https://box.lan:9040", "https://box.lan:9041")
        assert not ip_address(options.admin_ip).is_loopback and "https://box.lan:9041/dashboard/" in console.text
        assert describe_certificate((tmp_path / "ca.pem").read_bytes()).sha256 in console.text

    @pytest.mark.parametrize(
        "proxy, ip, insecure", [("127.0.0.1", "127.0.0.1", False), ("192.0.2.7", None, True)]
    )
    def test_a_proxy_in_front_is_believed_and_has_the_port_of_its_own(self, tmp_path, proxy, ip, insecure):
        console = Console(tmp_path, "--quick", term="dumb")
        console.answers((
            *DATABASE, ("Who uses this box", "network"), ("Its certificate", "proxy"), ("Address of the proxy", "nowhere"), ("must be an IP address", proxy),
            ("By which name", "box.example"), *ADMINISTRATOR, *CLIENT, ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert (options.auth_ip if ip else None, options.auth_insecure_http) == (ip, insecure)
        assert (options.auth_issuer, [str(network) for network in options.trusted_proxies]) == ("https://box.example", [proxy + "/32"])

    def test_a_certificate_that_is_there_serves_both_ports(self, tmp_path):
        certificate(tmp_path / "box.pem", "opens the certificate")
        console = Console(tmp_path, "--quick", term="dumb")
        console.answers((
            *DATABASE, ("Who uses this box", "network"), ("Its certificate", "file"), ("AUTH certificate", "box.pem"), ("Its private key", ""), ("certificate's key?", "opens the certificate"),
            ("By which name", "box.example"), ("/dashboard/?", "y"), *ADMINISTRATOR, *CLIENT, ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert options.tls_files("admin") == options.tls_files("auth") == ("box.pem", "", "opens the certificate")
        assert (options.auth_issuer, options.admin_issuer) == ("https://box.example:9040", "https://box.example:9041")

    def test_the_quick_and_the_guided_path_propose_the_same(self, tmp_path):
        drafts = [oobe.Draft(Options({"config": "mad.conf"})) for _ in range(2)]
        guided = oobe.LinePrompter()
        guided.read = lambda question, default="", hidden=False: default
        oobe.ask_options(guided, drafts[1], (*oobe.BEFORE_CLIENT, *oobe.AFTER_CLIENT))
        quick, whole = (draft.complete() for draft in drafts)
        assert [o.name for o in OPTIONS if getattr(quick, o.attribute) != getattr(whole, o.attribute)] == []

    def test_it_refuses_before_any_question_when_it_is_done(self, tmp_path):
        (tmp_path / "mad.db3").write_bytes(b"there")
        console = Console(tmp_path)
        assert console.end() == 1 and "set up already" in console.text and "?" not in console.text
        assert left(tmp_path) == {"mad.db3"} and (tmp_path / "mad.db3").read_bytes() == b"there"

    @pytest.mark.parametrize(
        "words, sentence",
        [
            ([], "--answers FILE, or --demo"), (["--quick", "--guided"], "contradict"),
            (["--admin-password-stdin"], "--answers"), (["--answers", "x", "--quick"], "nothing is asked"),
            (["--answers", "nowhere.toml"], "nowhere.toml"),
            (["--answers", "x", "--admin-password-stdin", "--admin-password-file", "y"], "contradict"),
        ],
    )
    def test_without_a_terminal_it_says_what_to_do(self, tmp_path, words, sentence):
        done = subprocess.run(
            [*PROGRAM, "setup", *words], cwd=tmp_path, env=ENVIRON, stdin=subprocess.DEVNULL, capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 1
            and sentence in done.stderr
            and done.stderr.count("\n") == 1
            and os.listdir(tmp_path) == []
        )


def certificate(path, phrase):
    """Write a self-signed certificate and its encrypted key into one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes as algorithms
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.datetime(2026, 1, 1)
    signed = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    )
    signed = signed.not_valid_before(now).not_valid_after(now + datetime.timedelta(9999)).sign(key, algorithms.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(phrase.encode()),
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + secret)


class TestGuided:
    """The order and the ranges of the original's wizard."""

    ARGON = (
        ("Argon2id passes?", ""), ("Argon2id memory", ""), ("Argon2id lanes?", ""), ("Hash length", ""),
        ("Salt length", ""),
    )

    def test_every_question_of_the_options_is_asked(self):
        asked = {*oobe.CUSTOM_QUESTIONS, *oobe.BEFORE_CLIENT, *oobe.AFTER_CLIENT}
        assert asked == {option.name for option in OPTIONS if option.ask} | set(oobe.EXTRA_QUESTIONS)
        assert set(oobe.ADVISED_RANGES) <= asked and set(oobe.CONDITIONS) <= asked

    @pytest.mark.parametrize("term", ["vt100", pytest.param("dumb", marks=pytest.mark.long)])
    def test_the_whole_path(self, tmp_path, term):
        certificate(tmp_path / "admin.pem", "opens the certificate")
        console = Console(tmp_path, "--config", "box.conf", term=term)
        console.answers((
            *DATABASE, ("Go through every setting?", "y"),
            ("Log file?", ALL + "box.log"),
            ("TOTP QR files", "relative"), ("absolute path", ALL + "/var/qr"), ("audit log?", "y"), ("Days to keep it?", ALL + "10000"), ("from 0 to 9999", ALL + "60"),
            ("that the box makes", "yes"), ("must be self, or empty", ALL),
            ("AUTH address?", ALL + "localhost"), ("IP address", ALL + "127.0.0.1"), ("AUTH port?", ALL + "70000"), ("from 1 to 65535", ALL + "9140"),
            ("host name of AUTH?", ALL + "box.example"), ("AUTH certificate", ""), ("reach AUTH by https", ""),
            ("ADMIN address?", ""), ("ADMIN port?", ALL + "9140"), ("already", ALL + "9141"), ("Host name of ADMIN?", ALL + "box.example"),
            ("ADMIN certificate", "nowhere.pem"), ("no file nowhere.pem", ALL + "admin.pem"), ("Its private key", ""),
            ("certificate's key?", "wrong"), ("ADMIN certificate", ""), ("Its private key", ""), ("certificate's key?", "opens the certificate"),
            ("Argon2id passes?", ALL + "3"), ("MAD_ARGON2ID_TIME", ALL + "1"), *self.ARGON[1:],
            ("AUTH key file?", ALL + "keys/auth.pem"), ("Sign AUTH tokens", "n"), ("RSA bits of AUTH?", ALL + "1024"), ("from 2048 to 16384", ALL + "2048"),
            ("Passphrase of the AUTH keys?", "of the key ring"), ("The same again:", "of the key ring"),
            ("ADMIN key file?", ALL + "keys/auth.pem"), ("different files", ALL + "keys/admin.pem"), ("Sign ADMIN tokens", "y"), ("Passphrase of the ADMIN keys?", ""),
            ("Lifetime of an access token", ALL + "59"), ("from 60 to 604800", ALL + "600"), ("Lifetime of an ADMIN token", ""), ("expired sessions?", ALL + "366"), ("from 0 to 365", ALL + "9"),
            ("revocation", "y"), ("Issue refresh", "y"), ("Lifetime of a refresh token", ALL + "299"), ("from 300 to 2592000", ALL + "300"), ("expired refresh tokens?", ""),
            ("before a lockout?", ALL + "3"), ("count restarts?", ""), ("Seconds of a lockout?", ""),
            ("client_id of the first service", ALL + "svc"), ("Its audience", ALL + "svc-api"), ("Its scopes", "a:read b:read"),
            ("can keep no secret", "n"), ("grant types", "code"), ("grants must be among", ALL + "client_credentials"), ("redirect URIs", ""),
            ("Trusted proxies", "10.0.0.x"), ("IP addresses or networks", ALL + "10.0.0.1, 192.168.7.0/24"), ("example pages", "n"), ("authorization code flow", "n"), ("Remember verified", "n"),
            *ADMINISTRATOR, ("Set it up?", "y"),
        ))  # fmt: skip
        assert console.end() == 0
        assert left(tmp_path) == {"box.conf", "mad.db3", "seal.key", "admin.pem", "keys"} and left(
            tmp_path / "keys"
        ) == {"auth.pem", "admin.pem"}
        options, _ = log_in(tmp_path, config="box.conf")
        expected = {
            "log_file": "box.log", "totp_qr_output_root": "/var/qr", "audit_log_retention_days": 60, "auth_port": 9140, "auth_issuer": "https://box.example", "admin_port": 9141,
            "admin_issuer": "https://box.example:9141", "admin_ssl_cert_pass": "opens the certificate", "prefer_ec_token_signer": False, "token_signing_key_pass": "of the key ring",
            "token_expiration": 600, "token_purge_days": 9, "enable_token_refresh": True, "refresh_token_expiration": 300, "max_login_failures": 3, "enable_pkce": False, "enable_pass_cache": False,
        }  # fmt: skip
        assert {name: getattr(options, name) for name in expected} == expected
        kept = ("pkce_code_lifetime", "pass_cache_duration", "admin_token_signing_key_length_rsa")
        assert [getattr(options, name) for name in kept] == [120, 300, 2048], "what was not asked keeps its default"
        assert [str(network) for network in options.trusted_proxies] == ["10.0.0.1/32", "192.168.7.0/24"]
        assert (
            re.search(r"client_secret  \S{43}\r?\n", console.text)
            and f"microauthd.py serve --config {tmp_path}/box.conf" in console.text
        )
        for secret in (PASSWORD, PHRASE, "opens the certificate", "of the key ring"):
            assert secret not in console.text
        assert not COLOUR.search(console.text) and console.text.isascii()

    def test_plain_http_beyond_the_machine_is_never_a_slip(self, tmp_path):
        console = Console(tmp_path, "--guided", term="dumb")
        console.answers((
            *DATABASE, ("Log file?", '""'), ("TOTP QR files", ""), ("audit log?", "n"),
            ("that the box makes", ""), ("AUTH address?", "0.0.0.0"), ("AUTH port?", ""), ("host name of AUTH?", "box.example"), ("AUTH certificate", ""), ("reach AUTH by https", "n"), ("Allow it?", ""),
            ("Then it needs", ""), ("AUTH address?", "127.0.0.1"), ("AUTH port?", ""), ("host name of AUTH?", "localhost"), ("AUTH certificate", ""), ("reach AUTH by https", "n"),
            ("ADMIN address?", "0.0.0.0"), ("ADMIN port?", ""), ("Host name of ADMIN?", ""), ("ADMIN certificate", ""), ("reach ADMIN by https", ""), ("Allow it?", "y"),
            *self.ARGON, ("AUTH key file?", ""), ("Sign AUTH", ""), ("AUTH keys?", ""), ("ADMIN key file?", ""), ("Sign ADMIN", ""), ("ADMIN keys?", ""),
            ("access token", ""), ("ADMIN token", ""), ("expired sessions", ""), ("revocation", ""), ("Issue refresh", "n"),
            ("before a lockout?", ""), ("restarts?", ""), ("lockout?", ""), ("client_id", '""'), ("proxies", ""), ("example pages", ""), ("code flow", ""), ("Life of", ""), ("Remember", ""), ("Seconds to", ""),
            *ADMINISTRATOR, ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert (options.auth_ip, options.auth_insecure_http, options.admin_ip, options.admin_insecure_http) == (
            "127.0.0.1", False, "0.0.0.0", True,
        )
        assert (
            options.log_file == ""
            and not options.enable_token_refresh
            and options.auth_issuer == "http://localhost:9040"
        )
        assert (options.refresh_token_expiration, options.audit_log_retention_days) == (259200, 30)
        assert "client_secret" not in console.text


    def test_a_box_for_the_network_makes_its_certificate_and_shows_the_fingerprint(self, tmp_path):
        (tmp_path / "mad.conf").write_text("docker = true\n")  # else it is also called what this machine is
        console = Console(tmp_path, "--guided", term="dumb")
        console.answers((
            *DATABASE, ("Log file?", '""'), ("TOTP QR files", ""), ("audit log?", "n"),
            ("that the box makes", "self"), ("AUTH address?", "0.0.0.0"), ("AUTH port?", "9140"), ("host name of AUTH?", "box.lan"),
            ("ADMIN address?", ""), ("ADMIN port?", "9141"), ("Host name of ADMIN?", "box.lan"),
            *self.ARGON, ("AUTH key file?", ""), ("Sign AUTH", ""), ("AUTH keys?", ""), ("ADMIN key file?", ""), ("Sign ADMIN", ""), ("ADMIN keys?", ""),
            ("access token", ""), ("ADMIN token", ""), ("expired sessions", ""), ("revocation", ""), ("Issue refresh", "n"),
            ("before a lockout?", ""), ("restarts?", ""), ("lockout?", ""), ("client_id", '""'), ("proxies", ""), ("example pages", ""), ("code flow", ""), ("Life of", ""), ("Remember", ""), ("Seconds to", ""),
            *ADMINISTRATOR, ("Set it up?", ""),
        ))  # fmt: skip
        assert console.end() == 0
        options, _ = log_in(tmp_path)
        assert (options.tls, options.auth_issuer, options.admin_issuer) == (
            "self", "https://box.lan:9140", "https://box.lan:9141",
        )
        assert describe_certificate((tmp_path / "ca.pem").read_bytes()).sha256 in console.text
        assert describe_certificate((tmp_path / "tls-self.pem").read_bytes()).names == [
            "box.lan", "localhost", "127.0.0.1", "::1",
        ]

    def test_an_issuer_at_localhost_does_not_go_with_an_address_for_others(self, tmp_path):
        console = Console(tmp_path, "--guided", term="dumb")
        console.answers((
            *DATABASE, ("Log file?", '""'), ("TOTP QR files", ""), ("audit log?", "n"), ("that the box makes", "self"),
            ("AUTH address?", "0.0.0.0"), ("AUTH port?", ""), ("host name of AUTH?", "localhost"), ("by which they reach this one", "\x04"),
        ))  # fmt: skip
        assert console.end() == 1 and not (tmp_path / "mad.db3").exists()


GOOD = f"""\
[options]
db-pass = "{PHRASE}"
[admin]
username = "admin"
email = "root@box.example"
password = "{PASSWORD}"
totp = false
[client]
client_id = "app"
scopes = ["a:read"]
"""
APPLICATIONS = GOOD[: GOOD.index("[client]")] + """\
email_verified = true
scopes = ["a:read"]
[[client]]
client_id = "web"
public = true
grants = ["authorization_code", "refresh_token", "password"]
scopes = ["a:read"]
redirect_uris = ["https://app.example/cb", "http://127.0.0.1/cb"]
post_logout_uris = ["https://app.example/"]
cors_origins = ["https://app.example"]
[[client]]
client_id = "svc"
audience = "svc-api"
"""
NO_PASSWORD = GOOD.replace(f'password = "{PASSWORD}"\n', "")


def unattended(folder, content, *words, input="", mode=0o600, **environ):
    path = folder / "answers.toml"
    path.write_text(content)
    path.chmod(mode)
    return subprocess.run(
        [*PROGRAM, "setup", "--answers", str(path), *words], cwd=folder, env=ENVIRON | environ, input=input,
        capture_output=True, text=True, umask=0,
    )


class TestUnattended:
    """--answers FILE: each problem is reported in a sentence, and then nothing is created."""

    def test_from_a_private_file(self, tmp_path):
        content = GOOD.replace("[options]", '[options]\ndb-file = "data/deep/mad.db3"\nseal-key-file = "keys/seal.key"')
        done = unattended(tmp_path, content)
        assert done.returncode == 0 and re.fullmatch(
            r"administrator=admin\nclient_id=app\nclient_secret=\S{43}\n", done.stdout
        ), done.stderr
        options, _ = log_in(tmp_path)
        assert options.enable_token_refresh and options.oidc_issuer == "http://localhost:9040"
        for path in tmp_path.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    def test_secrets_from_files_stdin_or_environment(self, tmp_path):
        for name, content in (("phrase", PHRASE), ("password", PASSWORD), ("secret", "s" * 40)):
            (tmp_path / name).write_text(content + "\n")
            (tmp_path / name).chmod(0o600)
        for number, (content, words, environ) in enumerate((
            (NO_PASSWORD.replace(f'db-pass = "{PHRASE}"', 'db-pass-file = "../phrase"'), ["--admin-password-stdin"], {}),
            (NO_PASSWORD.replace(f'db-pass = "{PHRASE}"', ""), ["--admin-password-file", "../password"], {"MAD_DB_PASS": PHRASE}),
            (NO_PASSWORD.replace("[options]", "").replace(f'db-pass = "{PHRASE}"', 'db-pass-file = "../phrase"').replace("totp", 'password_file = "../password"\ntotp') + 'secret_file = "../secret"\n', [], {}),
        )):  # fmt: skip
            folder = tmp_path / str(number)
            folder.mkdir()
            done = unattended(folder, content, *words, input=PASSWORD + "\n", mode=0o644, **environ)
            assert done.returncode == 0, done.stderr
            assert ("client_secret" in done.stdout) == ("secret_file" not in content), (
                "shown only where it was made here"
            )
            assert log_in(folder)[0].db_pass == PHRASE

    def test_a_file_of_a_secret_that_others_can_read_is_refused_as_the_secret_itself_is(self, tmp_path):
        for name, content in (("phrase", PHRASE), ("password", PASSWORD), ("secret", "s" * 40)):
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o644)
        content = NO_PASSWORD.replace(f'db-pass = "{PHRASE}"', 'db-pass-file = "phrase"') + 'secret_file = "secret"\n'
        for words, more, named in (
            ([], 'password_file = "password"\ntotp', "answers.toml:6: password_file: password"),
            (["--admin-password-file", "password"], "totp", "answers.toml: --admin-password-file: password"),
        ):
            done = unattended(tmp_path, content.replace("totp", more), *words)
            assert done.returncode == 1 and left(tmp_path) == {"answers.toml", "phrase", "password", "secret"}
            for sentence in (named, "answers.toml:2: db-pass-file: phrase", "secret_file: secret"):
                assert f"{sentence} can be read by others: chmod 600" in done.stderr, done.stderr

    def test_keys_that_are_there_are_refused_without_a_word_and_a_second_box_too(self, tmp_path):
        assert unattended(tmp_path, GOOD).returncode == 0
        before = hashes_of_a_box(tmp_path)
        other = GOOD.replace("[options]", '[options]\nseal-key-file = "b"\ntoken-signing-key-file = "c"')
        done = unattended(tmp_path, other, "--db-file", "other.db3")
        assert done.returncode == 1 and "set up already" in done.stderr and hashes_of_a_box(tmp_path) == before
        for path in tmp_path.glob("mad.[dc]*"):
            path.unlink()
        keys = hashes_of_a_box(tmp_path)
        done = unattended(tmp_path, GOOD)
        assert done.returncode == 1 and "token.pem is there already" in done.stderr and hashes_of_a_box(tmp_path) == keys
        assert unattended(tmp_path, GOOD, "--keep-keys").returncode == 0
        assert {name: hashes_of_a_box(tmp_path)[name] for name in ("seal.key", "token.pem")} == {
            name: keys[name] for name in ("seal.key", "token.pem")
        }

    def test_options_may_stand_at_the_top_under_any_of_their_names(self, tmp_path):
        content = 'auth-port = 9140\nadmin-port = "9141"\nenable-token-refresh = false\ntrusted-proxies = ["10.0.0.1", "10.1.0.0/16"]\nargon2-salt-length = 32\n'
        content += 'oidc-client-id = "first"\n' + GOOD[: GOOD.index("[client]")]
        done = unattended(tmp_path, content)
        assert done.returncode == 0 and "client_id=first" in done.stdout, done.stderr
        options, _ = log_in(tmp_path)
        assert (options.auth_port, options.admin_port, options.enable_token_refresh, options.argon2id_salt_length) == (
            9140, 9141, False, 32,
        )
        assert len(options.trusted_proxies) == 2 and options.oidc_issuer == "http://localhost:9140"

    def test_a_box_for_the_network_makes_its_certificate(self, tmp_path):
        content = GOOD.replace(
            "[options]",
            '[options]\ntls = "self"\ntls-names = ["Box.lan", "192.168.7.20"]\nauth-ip = "0.0.0.0"\ndocker = true\n'
            'admin-domain = "box.lan"',
        )
        (tmp_path / "container").mkdir()
        assert unattended(tmp_path / "container", content).returncode == 0, "who reaches a container, its host decides"
        done = unattended(tmp_path, content.replace("docker = true\n", ""))
        assert done.returncode == 1 and "is itself for each of them" in done.stderr and done.stderr.count("\n") == 1
        assert left(tmp_path) == {"answers.toml", "container"}
        done = unattended(tmp_path, content.replace("docker = true", 'auth-domain = "box.lan"'))
        assert done.returncode == 0, done.stderr
        root = describe_certificate((tmp_path / "ca.pem").read_bytes())
        assert f"ca_file={tmp_path}/ca.pem\nca_sha256={root.sha256}\n" in done.stdout
        assert log_in(tmp_path)[0].auth_issuer == "https://box.lan:9040"
        names = describe_certificate((tmp_path / "tls-self.pem").read_bytes()).names
        assert {"box.lan", "192.168.7.20", "localhost"} <= set(names)

    def test_a_browser_application_needs_nothing_of_admin_before_its_first_login(self, tmp_path):
        done = unattended(tmp_path, APPLICATIONS)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"administrator=admin\nclient_id=web\nclient_id=svc\nclient_secret=\S{43}\n", done.stdout)
        options, account = log_in(tmp_path)
        assert account.email_verified
        with contextlib.chdir(tmp_path), contextlib.closing((idp := open_idp(options)).store):
            web, svc = (m.find_client(idp, name) for name in ("web", "svc"))
            assert (web.row.client_type, web.row.audience) == ("public", "web")
            assert set(web.grant_types) == {"authorization_code", "password", "refresh_token"}
            assert (svc.row.client_type, svc.row.audience) == ("confidential", "svc-api")
            auth = Caller(m.App(idp, m.AUTH))
            form = {"grant_type": "password", "client_id": "web", "username": "admin", "password": PASSWORD}
            answer = auth("POST", "/token", form, headers=[("Origin", "https://app.example")])
            assert answer.status == 200 and answer.json["scope"] == "a:read"
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            for uri, status in (("https://app.example/cb", 303), ("http://127.0.0.1:1/cb", 303), ("https://x/", 400)):
                query = {
                    "client_id": "web", "redirect_uri": uri, "response_type": "code", "code_challenge": "c" * 43,
                    "code_challenge_method": "S256",
                }
                assert auth.get("/authorize?" + urlencode(query)).status == status
            assert web.post_logout_redirect_uris == ("https://app.example/",)

    def test_without_a_client_none_is_made(self, tmp_path):
        done = unattended(tmp_path, GOOD[: GOOD.index("[client]")])
        assert done.returncode == 0 and done.stdout == "administrator=admin\n"

    @pytest.mark.parametrize(
        "content, mode, sentences",
        [
            (
                GOOD, 0o644,
                [
                    "answers.toml:2: it holds the secret db-pass and can be read by others: chmod 600",
                    "answers.toml:6: it holds the secret password",
                ],
            ),
            (
                GOOD.replace("db-pass", "db-pas"), 0o600,
                ["answers.toml:2: unknown option 'db-pas'; did you mean 'db-pass'?"],
            ),
            (GOOD + "[extra]\n", 0o600, ["answers.toml:11: unknown table 'extra'"]),
            (GOOD.replace("username", "user"), 0o600, ["answers.toml:4: unknown key 'user'", "[admin] needs username"]),
            (GOOD.replace("false", "true"), 0o600, ["answers.toml:7: totp can only be false"]),
            (GOOD.replace(PASSWORD, "password123"), 0o600, ["answers.toml:6: the password is one of the most common"]),
            (NO_PASSWORD, 0o600, ["the administrator needs a password"]),
            (GOOD.replace(f'db-pass = "{PHRASE}"', ""), 0o600, ["the database needs db-pass"]),
            (GOOD.replace(PHRASE, "short"), 0o600, ["answers.toml:2: db-pass must have at least 8"]),
            (GOOD.replace(PHRASE, "a long\\u2028phrase"), 0o600, ["line separators"]),
            (GOOD.replace("[options]", '[options]\ndb-pass-file = "x"'), 0o600, ["cannot be read", "set twice"]),
            (
                GOOD.replace("[options]", "[options]\nlog-file = {a = 1}\ndb-file = true\nauth-ip = 1.5"), 0o600,
                ["log-file must be", "db-file is not", "auth-ip must be"],
            ),
            (
                GOOD.replace("[options]", "[options]\nauth-port = 99999\nadmin-port = 9040"), 0o600,
                ["answers.toml:2: auth-port must be a whole number", "already"],
            ),
            (GOOD.replace("[options]", '[options]\nauth-ip = "0.0.0.0"'), 0o600, ["is not loopback"]),
            (GOOD.replace("[options]", '[options]\ndb-file = "answers.toml/mad.db3"'), 0o600, ["is not a folder"]),
            (
                GOOD.replace("[options]", "options = 5\n[option]"), 0o600,
                ["options must be a table", "unknown table 'option'"],
            ),
            ("[options]\nnonsense\n", 0o600, ["answers.toml:2: "]), ('a = "', 0o600, ["answers.toml:1: "]),
            ("admin = 3\nclient = 4", 0o600, ["admin must be a table", "client must be a table"]),
            (
                GOOD.replace("root@box.example", "x").replace('"app"', '"a b"').replace("a:read", "a b"), 0o600,
                [":5: the address must be", ":9: the client_id must be", ":10: the scope 'a b' must be one word"],
            ),
            (
                GOOD.replace("[client]", "[client]\naudience = 5"), 0o600,
                ["answers.toml:9: audience in [client] must be a string"],
            ),
            (GOOD.replace('["a:read"]', "[1]"), 0o600, ["list of strings"]),
            (GOOD.replace("a:read", "openid"), 0o600, ["leave it out"]),
            ("# short\n" + GOOD.replace("[client]", '[client]\nsecret_file = "answers.toml"'), 0o600, ["8 to 255"]),
            (
                " # is the secret\n" + GOOD.replace("[client]", '[client]\nsecret_file = "answers.toml"'), 0o600,
                ["the client's secret must not begin or end with a blank"],
            ),
            (GOOD.replace("[client]", "[client]\nsecret_file = 1"), 0o600, ["name of a file"]),
            (
                APPLICATIONS.replace("public = true", 'public = "yes"\ncolour = 1').replace('"svc"', "5")
                .replace('email_verified = true\nscopes = ["a:read"]', 'email_verified = 1\nscopes = ["b:read"]')
                .replace('post_logout_uris = ["https://app.example/"]', 'post_logout_uris = "x"'), 0o600,
                [
                    "answers.toml:8: email_verified in [admin] must be true or false",
                    "answers.toml:9: the scope 'b:read' in [admin] is one of no client",
                    "answers.toml:12: public in [[client]] must be true or false",
                    "answers.toml:13: unknown key 'colour' in [[client]]; it knows client_id, public,",
                    "answers.toml:17: post_logout_uris in [[client]] must be a list of strings",
                    "answers.toml:20: client_id in [[client]] must be a string",
                ],
            ),
            (
                APPLICATIONS.replace("https://app.example/cb", "http://app.example").replace('"svc-api"', '"a"\npublic = true')
                .replace('"password"]', '"implicit"]').replace("127.0.0.1/cb", "127.0.0.1"), 0o600,
                ["answers.toml:13: grants must be among authorization_code, password, refresh_token"],
            ),
            (
                APPLICATIONS.replace('["https://app.example/cb", "', '["http://app.example", "a.b:/", "a.b:/", "')
                .replace("https://app.example/\"", "//x\"").replace('"https://app.example"]', '"https://app.example/"]')
                .replace('"svc"', '"web"'), 0o600,
                [
                    "answers.toml:15: 'http://app.example' in redirect_uris must be https",
                    "answers.toml:15: 'a.b:/' in redirect_uris stands there twice",
                    "answers.toml:16: '//x' in post_logout_uris must be an absolute URI",
                    "answers.toml:17: 'https://app.example/' in cors_origins must be scheme, host and port",
                    "answers.toml:19: the client_id 'web' stands there twice",
                ],
            ),
            (
                APPLICATIONS.replace("public = true", 'public = true\nsecret_file = "x"').replace('client_id = "svc"\n', ""),
                0o600, [":13: a public client has no secret", ":19: client_id must not be empty: leave [[client]] out"],
            ),
            (
                GOOD + 'cors_origins = ["https://app.example"]', 0o600,
                ["answers.toml:11: 'https://app.example' in cors_origins is for public clients"],
            ),
        ],
    )
    def test_what_is_wrong_is_said_and_nothing_is_made(self, tmp_path, content, mode, sentences):
        done = unattended(tmp_path, content, mode=mode)
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
        for sentence in sentences:
            assert sentence in done.stderr
        for line in done.stderr.splitlines():
            assert line.startswith("microauthd: ") and PHRASE not in line and PASSWORD not in line
        assert left(tmp_path) == {"answers.toml"}

    def test_a_passphrase_that_the_environment_would_overrule_is_refused(self, tmp_path):
        done = unattended(tmp_path, GOOD, MAD_DB_PASS="another phrase")
        assert (
            done.returncode == 1
            and "environment MAD_DB_PASS, which overrules" in done.stderr
            and left(tmp_path) == {"answers.toml"}
        )

    def test_running_it_again_refuses_and_changes_nothing(self, tmp_path):
        assert unattended(tmp_path, GOOD).returncode == 0
        before = hashes(tmp_path)
        done = unattended(tmp_path, GOOD)
        assert done.returncode == 1 and "set up already" in done.stderr and done.stdout == ""
        assert hashes(tmp_path) == before

    def test_a_config_that_is_there_keeps_its_settings(self, tmp_path):
        (tmp_path / "mad.conf").write_text("auth-port = 9999\n")
        assert unattended(tmp_path, GOOD).returncode == 0
        assert log_in(tmp_path)[0].auth_port == 9999

    def test_secrets_appear_neither_in_the_log_nor_in_options(self, tmp_path):
        done = unattended(
            tmp_path,
            f"auth-port = {free_port()}\nadmin-port = {free_port()}\nworkers = 0\nlog-level = 'debug'\n" + GOOD,
        )
        assert done.returncode == 0, done.stderr
        secrets = [PASSWORD, PHRASE, re.search("client_secret=(.*)", done.stdout)[1]]
        seen = "".join(
            subprocess.run(
                [*PROGRAM, "options", *words], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True, check=True
            ).stdout
            for words in ([], ["--json"])
        )
        server = subprocess.Popen(
            [*PROGRAM, "serve"], cwd=tmp_path, env=ENVIRON, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "microauthd.log").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
        finally:
            server.terminate()
            seen += server.communicate(timeout=60)[0]
        seen += (tmp_path / "microauthd.log").read_text()
        assert "db-pass" in seen and len(seen) > 1000
        for secret in secrets:
            assert secret not in seen and secret not in done.stderr


class TestPowerCut:
    """A set-up is atomic: after a crash there is none, or a complete one."""

    def die(self, folder, checkpoint=lambda name: None, replace=os.replace, work=None):
        """Set up in a child process, which a hook may kill. Return whether it was killed."""
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(folder)
                os.replace = replace
                options = Options(
                    {"config": "mad.conf", "db-pass": "x"}, db_pass=PHRASE, argon2id_time=1, argon2id_memory=8192,
                    argon2id_parallelism=1,
                )
                (
                    work
                    or (
                        lambda: set_up(
                            options, Answers("admin", "root@box.example", PASSWORD, clients=[FirstClient("app")]), checkpoint
                        )
                    )
                )()
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)

    @staticmethod
    def nth(number, act=lambda *words: None):
        """Return a hook that calls `act`, but kills the process at its nth call."""
        calls = iter(range(1, 1000))

        def hook(*words):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*words)

        return hook

    def check(self, folder, died):
        """Run an ordinary command, which recovers: nothing remains, or a set-up with a working login. Return which."""
        before = os.umask(0o077)
        try:
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
                assert main(["options"]) == 0
        finally:
            os.umask(before)
        names = left(folder)
        assert names in (set(), WHOLE), names
        if not names:
            assert died and not self.die(folder) and left(folder) == WHOLE, "and then a set-up succeeds"
        log_in(folder)
        for name in WHOLE:
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        return bool(names)

    def walk(self, tmp_path, attempt):
        """Kill the process at step 1, 2, … until a try completes. Return what each one left."""
        outcomes = []
        for number in range(1, 40):
            folder = tmp_path / str(number)
            folder.mkdir()
            died = attempt(folder, number)
            outcomes.append(self.check(folder, died))
            if not died:
                return outcomes
        raise AssertionError("it never lived")

    def test_at_every_checkpoint(self, tmp_path):
        outcomes = self.walk(tmp_path, lambda folder, number: self.die(folder, checkpoint=self.nth(number)))
        assert len(outcomes) > 8 and outcomes == sorted(outcomes), "nothing up to a point, everything from there on"

    def test_at_every_rename(self, tmp_path):
        outcomes = self.walk(tmp_path, lambda folder, number: self.die(folder, replace=self.nth(number, os.replace)))
        assert outcomes.count(True) > 5 and outcomes == sorted(outcomes), "the roll-forward among them"

    def test_again_while_the_next_start_clears_up(self, tmp_path):
        def attempt(folder, number):
            committed = self.die(
                folder, checkpoint=lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == "committed" else None
            )
            assert committed and not (folder / "mad.db3").exists()
            return self.die(folder, replace=self.nth(number, os.replace), work=lambda: recover_setup("mad.conf"))

        assert all(self.walk(tmp_path, attempt)), "once committed, always whole"

    def test_a_command_beside_a_running_set_up_does_not_harm_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refused = []

        def beside(name):
            done = subprocess.run([*PROGRAM, "options"], cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
            refused.append((name, done.returncode, done.stderr))

        options = Options(
            {"config": "mad.conf", "db-pass": "x"}, db_pass="a long phrase", argon2id_time=1, argon2id_memory=8192,
            argon2id_parallelism=1,
        )
        set_up(options, Answers("admin", "root@box.example", PASSWORD, clients=[FirstClient("app")]), beside)
        assert all(status == 1 and "setting up" in said for _, status, said in refused) and len(refused) > 5
        log_in(tmp_path)


class TestCommonPasswords:
    """NIST SP 800-63B §5.1.1.2"""

    def test_the_list_holds_what_the_minimum_length_lets_through(self):
        words = (ROOT / "appliance" / "common_passwords.txt").read_text("utf-8").splitlines()
        assert len(words) == len(set(words)) > 5000
        assert all(len(word) >= 8 and word == m.fold(word) and len(word.split()) == 1 for word in words)
        assert {"password", "qwertyuiop", "1qaz2wsx", "microauthd", "madadmin1"} <= set(words)
        assert "MIT" in (ROOT / "appliance" / "NOTICE").read_text("utf-8")


class TestDemo:
    """setup --demo on a disk that returns errors."""

    def test_nothing_is_set_up_in_a_sentence(self, tmp_path, monkeypatch):
        def refused(*_):
            raise PermissionError(errno.EACCES, "Permission denied", "mad.conf.setting-up.lock")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("appliance.recovery.set_up", refused)
        with pytest.raises(StartupError, match="Nothing was written. mad.conf.setting-up.lock: Permission denied"):
            run_setup(Options(), CommandLine({}, [], ["--demo"], {}))

    def test_its_secrets_are_said_where_their_file_cannot_be_written(self, tmp_path, monkeypatch, capsys):
        write = write_durably

        def refused(path, *words):
            if os.path.basename(path) == "demo.env":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, *words)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("appliance.recovery.write_durably", refused)
        with pytest.raises(StartupError, match="it is set up"):
            run_setup(
                load_options({"config-may-be-missing": True}, {"MAD_ARGON2ID_MEMORY": "8192"}),
                CommandLine({}, [], ["--demo"], {}),
            )
        assert "client_secret  " in capsys.readouterr().err and (tmp_path / "mad.db3").exists()
