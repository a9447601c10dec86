"""The set-up of a box that has no keyboard: a page on the network, for whoever has its claim code.

Two processes share the work. One serves the page, knows the code and nothing else, and is not root where the data is
another user's. The other, which no peer can speak to, has the CA, checks the answers as the wizard does, and calls the
set-up. A pipe leads from one to the other, so that there is one claim at a time, and after the first no other.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from appliance.authority import (
    PreparedAuthority, describe, make_authority, make_certificate, wanted_names,
)
from appliance.base import StartupError
from appliance.base.clock import sleep
from appliance.base.files import read_secret_file, sync_directory, write_durably
from appliance.base.headers import security_headers
from appliance.base.log import Log
from appliance.base.pages import Pages
from appliance.base.peers import networks_of
from appliance.base.settings import Options
from appliance.base.tls import Pair, context_of
from appliance.base.wire import Limits, Server, listen
from appliance.oobe import (
    AnswersFile, Draft, QuickAnswers, check_audience, check_client_id, check_email, check_password, check_scopes,
    check_username, choose_name, choose_passphrase, describe_end, first_client, made_root,
    new_passphrase, passphrase_origin, set_up, setup_words, speaks_tls, use_network, use_own_certificate,
)
from appliance.processes import fork_as, notify
from appliance.recovery import Answers, database_owner, forbid_found_keys, forbid_second_setup
from microauthd import PAGE_POLICY, Problem, Seal, host_without_port, parse_form

OPEN_SECONDS = 3600
CLAIM_FILE = "claim.txt"  # beside the database
# Twelve symbols of five bits, of the 32 that nobody mistakes for another.
SYMBOLS, CODE_LENGTH = "0123456789ABCDEFGHJKMNPQRSTVWXYZ", 12
LIMITS = Limits(connections=256, connections_per_peer=32, body_bytes=16384)
FIELDS = ("name", "username", "email", "password", "again", "passphrase", "client_id", "audience", "scopes")

# == The code ==================================================================


def new_code() -> str:
    """Return a claim code of 60 bits, in groups as people copy them."""
    symbols = "".join(secrets.choice(SYMBOLS) for _ in range(CODE_LENGTH))
    return "-".join(re.findall("....", symbols))


def fold_code(code: str) -> str:
    """Return the symbols of a typed code: case, blanks and hyphens count for nothing, O is 0, I and L are 1."""
    folded = re.sub(r"[\s-]+", "", code).upper()
    return folded.translate({ord("O"): "0", ord("I"): "1", ord("L"): "1"})


def read_code(path: str) -> str:
    """Return the code of a file, that of a label on the device perhaps. Raises StartupError."""
    try:
        code = read_secret_file(path, "the claim code")
    except ValueError as error:
        raise StartupError(str(error)) from None
    if len(fold_code(code)) < CODE_LENGTH:
        raise StartupError(f"the claim code in {path} must have at least {CODE_LENGTH} letters and digits: 60 bits")
    return code


class Guard:
    """Compares codes. A source that was wrong waits longer each time, up to a minute; no other source does.

    A source is what a peer can have many of: an address of IPv4, a /64 of IPv6. RFC 6177 §2

    The right code never waits. The owner may share the source of a guesser, behind a NAT or a proxy of containers, and
    a guesser who asks all the time would use up each moment in which the source may be wrong again. What protects the
    code is its 60 bits: at a thousand guesses a second an hour finds it with a chance below 10^-11.
    """

    MOST, LONGEST = 4096, 60

    def __init__(self, code: str, now: Callable[[], float] = time.monotonic):
        self.digest, self.now = self.digest_of(code), now
        self.lock = threading.Lock()
        self.wrong: dict[str, tuple[int, float]] = {}  # source: how often it was wrong, until when it waits

    def digest_of(self, code: str) -> bytes:
        return hashlib.sha256(fold_code(code).encode()).digest()

    def check(self, peer: str, code: str) -> tuple[bool, int]:
        """Return whether the code is right, and for a wrong one the seconds that its source still has to wait."""
        if hmac.compare_digest(self.digest_of(code), self.digest):
            return True, 0
        source = networks_of(peer)[0]
        with self.lock:
            count, until = self.wrong.get(source, (0, 0.0))
            if (left := until - self.now()) > 0:
                return False, int(left) + 1
            if source not in self.wrong and len(self.wrong) >= self.MOST:
                del self.wrong[min(self.wrong, key=lambda one: self.wrong[one][1])]
            self.wrong[source] = (count + 1, self.now() + min(2**count, self.LONGEST))
            return False, 0


# == The claim =================================================================
# In the process that no peer speaks to.


class Outcome(msgspec.Struct):
    """What came of answers: a sentence for each that is refused, or what the last page shows."""

    errors: dict[str, str] = {}
    problem: str = ""  # a sentence, where the set-up itself failed
    issuer: str = ""
    console: str = ""
    fingerprint: str = ""
    client_id: str = ""
    client_secret: str = ""
    passphrase: str = ""  # that was made
    has_passphrase: bool = False
    will_serve: bool = False


class Claim:
    """The set-up that waits for its answers. `settings` are options that the answers file chose; `will_serve` says
    whether the server starts by itself afterwards.
    """

    def __init__(self, options: Options, settings: dict, keep_keys: bool, will_serve: bool = False):
        self.options, self.settings, self.keep_keys, self.will_serve = options, settings, keep_keys, will_serve
        draft = self.new_draft()
        chosen = draft.resolve()
        seal, now = Seal(os.urandom(32)), int(time.time())
        authority = make_authority(seal, wanted_names(chosen), now)
        self.prepared = PreparedAuthority(authority, seal)
        self.certificate = make_certificate(seal, authority, now)
        self.fingerprint = describe(authority.root).sha256
        self.page_fingerprint = describe(self.certificate.decode()).sha256  # what a browser shows
        self.address, self.port = chosen.auth_ip, chosen.auth_port
        self.asks_passphrase = not passphrase_origin(draft)
        self.client_id = draft["oidc-client-id"]
        self.lines: list[str] = []  # what the console is told at the end
        self.made: list = []

    def new_draft(self) -> Draft:
        """Return a draft of a box for the network, which makes its certificate where it has none."""
        draft = Draft(self.options)
        for name, value in self.settings.items():
            draft.choose(name, value)
        for server in ("auth", "admin"):
            use_network(draft, server)
        if not (speaks_tls(draft, "auth") and speaks_tls(draft, "admin")):
            use_own_certificate(draft)
        return draft

    def read(self, fields: dict[str, str]) -> tuple[Draft, QuickAnswers, str, dict[str, str]]:
        """Return what the fields choose, the passphrase that was made, and a sentence for each that is refused."""
        draft, quick, errors, made = self.new_draft(), QuickAnswers(), {}, []

        def make():
            made.append(new_passphrase())
            return made[0]

        checks: dict[str, Callable[[str], Any]] = {
            "name": lambda answer: choose_name(draft, answer), "username": check_username, "email": check_email,
            "password": lambda answer: check_password(draft, quick)(answer),
            "client_id": check_client_id, "audience": check_audience, "scopes": check_scopes,
        }
        if self.asks_passphrase:
            checks["passphrase"] = lambda answer: choose_passphrase(draft, answer, make)
        for name, check in checks.items():
            try:
                value = check(fields.get(name, "") if "pass" in name else fields.get(name, "").strip())
            except (ValueError, StartupError) as error:
                errors[name] = str(error)
            else:
                if name in QuickAnswers.__struct_fields__:
                    setattr(quick, name, value)
        if "password" not in errors and fields.get("again", "") != fields.get("password", ""):
            errors["again"] = "the two are not the same"
        return draft, quick, made[0] if made else "", errors

    def take(self, fields: dict[str, str]) -> Outcome:
        """Set up with these answers, or say why not."""
        try:
            forbid_second_setup(self.options)
            draft, quick, passphrase, errors = self.read(fields)
            if errors:
                return Outcome(errors)
            options = draft.complete()
            client = first_client(draft, quick)
            answers = Answers(
                quick.username, quick.email, quick.password, clients=[client] if client else [],
                keep_keys=self.keep_keys, prepared_ca=self.prepared,
            )
            self.made = set_up(options, answers)
        except (StartupError, Problem) as error:
            return Outcome(problem=str(error))
        self.lines = describe_end(options, answers, [], will_serve=self.will_serve)
        root = made_root(options)
        return Outcome(
            issuer=options.auth_issuer, console=f"{options.admin_issuer}/dashboard/",
            fingerprint=str(root.sha256) if root else "", client_id=quick.client_id,
            client_secret=self.made[0].secret if self.made else "", passphrase=passphrase,
            has_passphrase=bool(options.db_pass), will_serve=self.will_serve,
        )


# == The page ==================================================================
# In the process of its own.


def translate(table: dict[str, str], sentence: str) -> str:
    """Return the sentence of a table for one that contains its key, `{n}` being any number."""
    for key, text in table.items():
        if found := re.search(re.escape(key).replace(r"\{n\}", "([0-9]+)"), sentence):
            return text.replace("{n}", found[1] if found.groups() else "")
    return sentence


class ClaimPage:
    """The WSGI application: the code, the questions, the end. `hand_over` gives the answers to the other process."""

    def __init__(self, pages: Pages, guard: Guard, claim: Claim, hand_over: Callable[[dict], Outcome], log: Callable):
        self.pages, self.guard, self.hand_over, self.log = pages, guard, hand_over, log
        self.claim = claim
        self.proposals = {"username": QuickAnswers().username, "client_id": claim.client_id}
        self.root = claim.prepared.authority.root.encode()
        self.lock = threading.Lock()
        self.claimed: tuple[dict, Outcome] | None = None  # the answers that the box was set up with, and what came
        self.ended = threading.Event()
        self.pages.style  # noqa: B018 - read here, where the files can be read
        for name in ("claim", "layout"):
            self.pages.template(name)

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        name, style = self.pages.style
        if method not in ("GET", "HEAD", "POST") or (method == "POST" and path != "/"):
            return self.answer(environ, start_response, "405 Method Not Allowed", b"", more=[("Allow", "GET, HEAD")])
        if path == f"/{name}":
            return self.answer(environ, start_response, "200 OK", style, "text/css; charset=utf-8")
        if path == "/ca.pem":
            return self.answer(environ, start_response, "200 OK", self.root, "application/x-pem-file")
        if path != "/":
            return self.answer(environ, start_response, "404 Not Found", b"")
        if method == "POST":
            return self.post(environ, start_response)
        return self.show(environ, start_response)

    def answer(self, environ, start_response, status, body, kind="text/plain; charset=utf-8", more=()):
        headers = [
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), *more,
            *security_headers(PAGE_POLICY),  # without HSTS: nobody trusts this certificate yet
        ]
        start_response(status, headers)
        return [body]

    def show(self, environ, start_response, status="200 OK", step="code", more=(), **values):
        language = self.pages.choose_language(environ.get("HTTP_ACCEPT_LANGUAGE", ""))
        words = setup_words(self.pages, language)
        shown = {
            "language": language, "text": self.pages.texts[language], "words": words, "brand": "microauthd",
            "logo": "", "script": "", "style": "/" + self.pages.style[0], "step": step, "error": "", "errors": {},
            "fields": {}, "code": "", "claim": self.claim,
            "outcome": None,
        }  # fmt: skip
        body = self.pages.render("claim", **(shown | values))
        return self.answer(environ, start_response, status, body, "text/html; charset=utf-8", more)

    def read_fields(self, environ) -> dict[str, str]:
        """Return the form, of which each field is one. Raises Problem."""
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            raise Problem("invalid_request", log="not a form")
        pairs = parse_form(environ["wsgi.input"].read())
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise Problem("invalid_request", log="a field was sent twice")
        return fields

    def post(self, environ, start_response):
        peer = environ["microauthd.peer"]
        try:
            fields = self.read_fields(environ)
        except Problem as problem:
            self.log("claim.refused", peer=peer, reason=problem.log)
            return self.show(environ, start_response, "400 Bad Request", error="unreadable")
        is_right, wait = self.guard.check(peer, fields.get("code", ""))
        if wait:
            more = [("Retry-After", str(wait))]
            return self.show(environ, start_response, "429 Too Many Requests", error="wait", more=more)
        if not is_right:
            self.log("claim.refused", peer=peer, reason="another code")
            return self.show(environ, start_response, "403 Forbidden", error="wrong_code")
        if "username" not in fields:
            host = host_without_port(environ.get("HTTP_HOST", ""))
            proposals = self.proposals | {"name": host}
            return self.show(environ, start_response, step="questions", code=fields["code"], fields=proposals)
        outcome = self.take({name: fields.get(name, "") for name in FIELDS})
        if outcome.errors or outcome.problem:
            self.log("claim.refused", peer=peer, reason=outcome.problem or "answers: " + ", ".join(outcome.errors))
            status = "422 Unprocessable Content" if outcome.errors else "409 Conflict"
            return self.show(
                environ, start_response, status, "questions", code=fields["code"], fields=fields,
                errors=self.translate(environ, outcome.errors), error=outcome.problem,
            )
        if not self.ended.is_set():
            self.log("claimed", "notice", peer=peer)
        self.ended.set()
        return self.show(environ, start_response, step="done", outcome=outcome)

    def take(self, answers: dict[str, str]) -> Outcome:
        """Hand the answers over, one set at a time. After the claim there is no other.

        A form that was sent twice, as by a double click, gets the answer that the first one got: a browser shows the
        last alone, and what was made is shown once.
        """
        with self.lock:
            if self.claimed:
                return self.claimed[1] if answers == self.claimed[0] else Outcome(problem="claimed")
            outcome = self.hand_over(answers)
            if not (outcome.errors or outcome.problem):
                self.claimed = answers, outcome
            return outcome

    def translate(self, environ, errors: dict[str, str]) -> dict[str, str]:
        """Return the sentences in the language of the page, where it has them."""
        words = setup_words(self.pages, self.pages.choose_language(environ.get("HTTP_ACCEPT_LANGUAGE", "")))
        return {name: translate(words["errors"], sentence) for name, sentence in errors.items()}


class Line:
    """The pipe between the two processes: a line of JSON there, a line of JSON back."""

    def __init__(self):
        self.asked, self.asking = os.pipe()
        self.told, self.telling = os.pipe()

    def read(self, descriptor: int) -> bytes:
        """Return a line; b"" where the other process has ended."""
        content = b""
        while not content.endswith(b"\n"):
            piece = os.read(descriptor, 65536)
            if not piece:
                return b""
            content += piece
        return content

    def hand_over(self, fields: dict) -> Outcome:
        """Ask for a claim; one thread at a time."""
        os.write(self.asking, msgspec.json.encode(fields) + b"\n")
        told = self.read(self.told)
        return msgspec.json.decode(told, type=Outcome) if told else Outcome(problem="interrupted")

    def take(self, claim: Claim) -> bool | None:
        """Answer one question. Return whether it was the claim, None if the other process has ended."""
        question = self.read(self.asked)
        if not question:
            return None
        outcome = claim.take(msgspec.json.decode(question, type=dict[str, str]))
        os.write(self.telling, msgspec.json.encode(outcome) + b"\n")
        return not (outcome.errors or outcome.problem)


def serve_page(claim: Claim, guard: Guard, pages: Pages, listening, line: Line, seconds: float):
    """Serve the page until the claim, the end of its time, or that of the other process."""
    os.close(line.asked)
    os.close(line.telling)
    log = Log(stream=sys.stderr)
    page = ClaimPage(pages, guard, claim, line.hand_over, log)
    parent, end = os.getppid(), time.monotonic() + seconds
    tls = context_of(Pair(claim.certificate), "", "")
    server = Server(
        "claim", [listening], page, limits=LIMITS, tls=tls, threads=2, max_threads=8,
        log=lambda event, **fields: log(event, "error" if event == "error" else "info", **fields),
    )
    server.start()
    while time.monotonic() < end and os.getppid() == parent and not page.ended.wait(0.5):
        pass
    if page.ended.is_set():
        sleep(2)  # the style sheet of the last page
    server.stop()


# == Opening it ================================================================


def show(lines: list[str], is_first_start: bool):
    """Show lines where somebody looks, and never where lines are kept: on the console of a service, or the terminal."""
    if not is_first_start:
        if sys.stdout.isatty():
            print("\n".join(lines), flush=True)
        return
    try:
        # The kernel leads it to the screen and to the serial line of console=. console(4)
        with open("/dev/console", "w") as console:
            console.write("\r\n".join(["", *lines, ""]))
    except OSError:
        print("microauthd: there is no console that the claim code could be shown on", file=sys.stderr)


def describe_page(claim: Claim, code: str, where: str) -> list[str]:
    names = [name for name in claim.prepared.authority.names if name not in ("localhost", "127.0.0.1", "::1")]
    return [
        "microauthd waits to be claimed, in a browser, at one of:",
        *(f"  https://{f'[{name}]' if ':' in name else name}:{claim.port}/" for name in names or ["localhost"]),
        f"claim code    {code or 'in ' + where}",
        "SHA-256 fingerprint of its certificate, as the browser shows it:", f"  {claim.page_fingerprint}",
        "and of the root that signed it, ca.pem:", f"  {claim.fingerprint}",
    ]


def wait_for_claim(claim: Claim, line: Line, seconds: float) -> bool:
    """Answer the page until a claim succeeds. Return False when its time is over. Raises StartupError if it died."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        notify("EXTEND_TIMEOUT_USEC=120000000")  # of a service that has begun to start. sd_notify(3)
        if select.select([line.asked], [], [], min(left, 30))[0]:
            is_claimed = line.take(claim)
            if is_claimed is None:
                raise StartupError("the process of the page has ended: nothing was set up; begin again")
            if is_claimed:
                return True
    return False


def open_page(claim: Claim, code: str, where: str, is_first_start: bool, seconds: float = OPEN_SECONDS) -> bool:
    """Open the page for its time. Return whether the box was claimed."""
    folder = os.path.dirname(os.path.abspath(claim.options.db_file))
    try:
        listening = listen(claim.address, claim.port)
    except OSError as error:
        raise StartupError(f"cannot listen on {claim.address}:{claim.port}: {error.strerror}") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the file of the code is removed
    note, pages, line = os.path.join(folder, CLAIM_FILE), Pages(claim.options), Line()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    lines = describe_page(claim, code if not where else "", where)
    write_durably(note, ("\n".join(lines) + "\n").encode())
    try:
        owner = database_owner(claim.options.db_file)
        guard = Guard(code)
        fork_as(owner, lambda: serve_page(claim, guard, pages, listening, line, seconds))
        listening.close()
        os.close(line.asking)
        os.close(line.told)
        show(lines, is_first_start)
        print(f"microauthd: waits to be claimed on port {claim.port}; {note} says how", file=sys.stderr, flush=True)
        is_claimed = wait_for_claim(claim, line, seconds)
        while is_claimed and select.select([line.asked], [], [], 30)[0] and line.read(line.asked):
            pass  # until the page has ended
        return is_claimed
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)


def read_web_answers(answers_file: AnswersFile, draft: Draft) -> str:
    """Put the options of an answers file with `web = true` into the draft. Return the file of the claim code, or "".

    Raises StartupError with everything that is wrong with it.
    """
    document = answers_file.document
    document.pop("web", None)
    where = document.pop("claim_code_file", "")
    if not isinstance(where, str):
        answers_file.add_problem("claim_code_file must be the name of a file, as a string", "claim_code_file")
    for name in ("admin", "client"):
        if name in document:
            answers_file.add_problem(f"{name} is asked by the page of web = true: leave it out", name)
    answers_file.read_options(draft)
    if answers_file.problems:
        raise StartupError("\n".join(answers_file.problems))
    return where


def run(options: Options, flags: list[str], values: dict, seconds: float = OPEN_SECONDS) -> int:
    """Set up by the page: `setup --web`, or a first start whose answers file says `web = true`. Return the exit status.

    Raises StartupError, and then nothing was made.
    """
    forbid_second_setup(options)
    keep_keys, is_first_start = "--keep-keys" in flags, "--first-start" in flags
    forbid_found_keys(options, keep_keys)
    draft, where = Draft(options), values.get("--claim-code-file", "")
    if "--answers" in values:
        answers_file = AnswersFile(values["--answers"])
        where = read_web_answers(answers_file, draft)
    claim = Claim(options, draft.chosen, keep_keys, is_first_start)
    code = read_code(where) if where else new_code()
    if not open_page(claim, code, where, is_first_start, seconds):
        if not is_first_start:
            raise StartupError("nobody has claimed the box in its hour: run setup --web again")
        print("microauthd: nobody has claimed the box in its hour: restart it", file=sys.stderr, flush=True)
        while True:  # a manager would start it again by itself, and nobody has asked for that
            notify("EXTEND_TIMEOUT_USEC=120000000")
            sleep(30)
    if is_first_start:
        folder = os.path.dirname(os.path.abspath(values["--answers"]))
        os.unlink(values["--answers"])
        sync_directory(folder)
    elif sys.stdout.isatty():
        print("\n".join(claim.lines))
    return 0
