"""The set-up of the first start: a wizard on a terminal, or an answers file without one.

It decides nothing by itself: the parser of an option or a check of the server validates each answer, and one call of
recovery.set_up() creates everything or nothing. Nothing is written before that call.

The guided path has the order and the ranges of the original's wizard. It differs where there is no environment file
(the config file holds all settings, and is private), where the config path is a flag, where the client's secret always
has 256 bits, and where it asks before plain HTTP is served to other hosts.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import ipaddress
import os
import re
import secrets
import select
import shlex
import shutil
import stat
import sys
import textwrap
import time
import tomllib

# Do not let prompt_toolkit ask for the cursor position (CPR): a serial console does not respond.
os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")

import msgspec
import sqlcipher3

import microauthd
from appliance import recovery
from appliance.base import StartupError
from appliance.base.files import (
    Identity, check_folder, existing_folder, read_secret_file, read_stdin_secret, sync_directory, write_durably,
)
from appliance.base.pages import Pages, draw_qr
from appliance.base.settings import (
    OPTIONS, OPTION_NAMES, boolean, check_options, did_you_mean, host_names, issuer_obstacle, networks, whole,
)
from appliance.authority import (
    CertificateFile, describe_root, forbid_found_ca, ipv4_addresses, ipv6_addresses, machine_names, proposed_name,
)
from appliance.base.store import SEEDED_SCOPES
from appliance.processes import run_as
from appliance.base.tls import tls_context
from appliance.recovery import (
    Answers, FirstClient, MadeClient, STATE_FILES, check_clients, forbid_found_keys, forbid_second_setup, journal_of, journal_place,
)

# A function of their own asks for these, not ask_option().
CUSTOM_QUESTIONS = ("db-file", "db-pass", "oidc-client-id")


def listener_options(server):
    return [
        f"{server}-{name}"
        for name in (
            "ip", "port", "domain", "ssl-cert-file", "ssl-key-file", "ssl-cert-pass", "domain-no-ssl", "insecure-http",
        )
    ]


# The options of the guided path, before and after the questions about the first client.
BEFORE_CLIENT = (
    "log-file", "totp-qr-output-root", "enable-audit-logging", "audit-log-retention-days",
    "tls", *listener_options("auth"), *listener_options("admin"),
    "argon2id-time", "argon2id-memory", "argon2id-parallelism", "argon2id-hash-length", "argon2id-salt-length",
    "token-signing-key-file", "prefer-ec-token-signer", "token-signing-key-length-rsa", "token-signing-key-pass",
    "admin-token-signing-key-file", "prefer-ec-admin-token-signer", "admin-token-signing-key-length-rsa",
    "admin-token-signing-key-pass",
    "token-expiration", "admin-token-expiration", "token-purge-days", "enable-token-revocation",
    "enable-token-refresh", "refresh-token-expiration", "refresh-token-purge-days",
    "max-login-failures", "seconds-to-reset-login-failures", "failed-password-lockout-duration",
)  # fmt: skip
AFTER_CLIENT: tuple[str, ...] = (
    "trusted-proxies", "serve-public-auth-files", "enable-pkce", "pkce-code-lifetime", "enable-pass-cache",
    "pass-cache-duration",
)
# Any other option with a question is asked after these.
AFTER_CLIENT += tuple(
    option.name for option in OPTIONS
    if option.ask and option.name not in (*CUSTOM_QUESTIONS, *BEFORE_CLIENT, *AFTER_CLIENT)
)

# Questions for options without one in OPTIONS, because they matter only after another answer.
EXTRA_QUESTIONS = {
    "auth-ssl-key-file": "Its private key (empty: in the same file)?",
    "admin-ssl-key-file": "Its private key (empty: in the same file)?",
    "auth-domain-no-ssl": "Do clients reach AUTH by https, through a TLS proxy?",
    "admin-domain-no-ssl": "Do you reach ADMIN by https, through a TLS proxy?",
    "auth-insecure-http": "Plain HTTP on {ip}: tokens and passwords travel in clear. Allow it?",
    "admin-insecure-http": "Plain HTTP on {ip}: tokens and passwords travel in clear. Allow it?",
}


def speaks_tls(draft, server):
    return bool(draft["tls"] or draft[f"{server}-ssl-cert-file"])


def is_for_others(draft, server):
    return not ipaddress.ip_address(draft[f"{server}-ip"]).is_loopback


def is_exposed(draft, server):
    """Whether the server would speak plain HTTP on an address that other hosts can reach."""
    return not speaks_tls(draft, server) and is_for_others(draft, server)


# Conditions for asking. An option that is not asked for keeps its value, in case its feature is enabled later.
CONDITIONS = {
    "auth-ssl-cert-file": lambda draft: not draft["tls"],
    "admin-ssl-cert-file": lambda draft: not draft["tls"],
    "auth-ssl-key-file": lambda draft: draft["auth-ssl-cert-file"],
    "admin-ssl-key-file": lambda draft: draft["admin-ssl-cert-file"],
    "auth-ssl-cert-pass": lambda draft: draft["auth-ssl-cert-file"],
    "admin-ssl-cert-pass": lambda draft: draft["admin-ssl-cert-file"],
    "auth-domain-no-ssl": lambda draft: not speaks_tls(draft, "auth"),
    "admin-domain-no-ssl": lambda draft: not speaks_tls(draft, "admin"),
    "auth-insecure-http": lambda draft: is_exposed(draft, "auth"),
    "admin-insecure-http": lambda draft: is_exposed(draft, "admin"),
    "audit-log-retention-days": lambda draft: draft["enable-audit-logging"],
    "token-signing-key-length-rsa": lambda draft: not draft["prefer-ec-token-signer"],
    "admin-token-signing-key-length-rsa": lambda draft: not draft["prefer-ec-admin-token-signer"],
    "refresh-token-expiration": lambda draft: draft["enable-token-refresh"],
    "refresh-token-purge-days": lambda draft: draft["enable-token-refresh"],
    "pkce-code-lifetime": lambda draft: draft["enable-pkce"],
    "pass-cache-duration": lambda draft: draft["enable-pass-cache"],
}
# The wizard accepts a narrower range than the option.
ADVISED_RANGES = {
    "token-expiration": whole(60, 604800),
    "admin-token-expiration": whole(60, 604800),
    "token-purge-days": whole(0, 365),
    "refresh-token-expiration": whole(300, 2592000),
    "refresh-token-purge-days": whole(0, 365),
}


# What the set-up proposes, on every path, where neither the config file nor anybody says otherwise.
PROPOSED = {"enable-token-refresh": True}


class InputEnded(Exception):
    """The input ended before the last question."""


class StepBack(Exception):
    """The question before is to be asked again."""


class StartOver(Exception):
    """The review was not agreed to: all questions are to be asked again, with the answers as proposals."""


# == Draft =====================================================================


def setup_words(pages, language):
    """Return the words of the set-up in a language; English fills in what is missing."""
    return pages.texts["en"]["setup"] | pages.texts[language].get("setup", {})


class Draft:
    """The settings while questions are being asked: the answers take precedence over the options at the start."""

    def __init__(self, options):
        self.options, self.chosen, self.config = options, {}, options.config_file

    def __getitem__(self, name):
        if name in self.chosen:
            return self.chosen[name]
        if name in PROPOSED and name not in self.options.origins:
            return PROPOSED[name]
        return getattr(self.options, OPTION_NAMES[name].attribute)

    @functools.cached_property
    def words(self):
        """The words of the quick questions, which the page has too."""
        return setup_words(Pages(self.options), "en")

    def overriding_origin(self, name):
        """Return the credential, environment variable or flag that takes precedence over the config file, or ""."""
        origin = self.options.origins.get(name, "")
        return origin if origin.startswith(("credential", "environment", "flag")) else ""

    def check_effective(self, name, value):
        """Raise ValueError if a variable or flag would make this answer ineffective."""
        if (origin := self.overriding_origin(name)) and value != getattr(self.options, OPTION_NAMES[name].attribute):
            raise ValueError(
                f"{name} is set by the {origin}, which overrules the config file: keep that value, or unset it "
                "and begin again"
            )

    def choose(self, name, value):
        self.check_effective(name, value)
        self.chosen[name] = value

    def resolve(self, derived=()):
        """Return Options with the answers and these derived values. Raises StartupError if they are inconsistent."""
        chosen = self.chosen | dict(derived)
        values = {OPTION_NAMES[name].attribute: value for name, value in chosen.items()}
        origins = self.options.origins | {"config": self.config} | dict.fromkeys(chosen, "setup")
        resolved = dataclasses.replace(self.options, origins=origins, **values)
        check_options(resolved)
        return resolved

    def complete(self):
        """Return the Options to write: the answers, and derived values that make the server usable at once."""
        origins = self.options.origins | self.chosen
        derived: dict[str, bool | str] = {name: value for name, value in PROPOSED.items() if name not in origins}
        # The issuer follows from auth-domain, which has no port; no proxy hides the port on localhost, nor where the
        # box itself is reached over TLS.
        is_reached = self["auth-domain"] == "localhost" or (speaks_tls(self, "auth") and is_for_others(self, "auth"))
        if (
            not self["oidc-issuer"]
            and is_reached
            and not re.search(":[0-9]+$", self["auth-domain"])
            and self.chosen.get("auth-domain-no-ssl", True)
        ):
            scheme, port = ("https", 443) if speaks_tls(self, "auth") else ("http", 80)
            derived["oidc-issuer"] = f"{scheme}://{self['auth-domain']}" + (
                "" if self["auth-port"] == port else f":{self['auth-port']}"  # RFC 3986 §6.2.3
            )
            if scheme == "http" and "auth-domain-no-ssl" not in origins:
                derived["auth-domain-no-ssl"] = True
        if not speaks_tls(self, "admin") and "admin-domain-no-ssl" not in origins:
            derived["admin-domain-no-ssl"] = True
        options = self.resolve({name: value for name, value in derived.items() if not self.overriding_origin(name)})
        if problem := issuer_obstacle(options):
            raise StartupError(problem)
        return options


# == Checks ====================================================================
# A check returns the value of an answer, or raises ValueError with a sentence. The rules are those of the server.


def check_by_rule(rule, noun, normalize):
    """Return a check by a rule of the server: a function that returns what is wrong with a value, or nothing."""

    def check(answer):
        if problem := rule(normalize(answer)):
            raise ValueError(f"the {noun} {problem}")
        return normalize(answer)

    return check


check_username = check_by_rule(microauthd.check_username, "user name", microauthd.fold)
check_email = check_by_rule(microauthd.check_email, "address", microauthd.fold)
check_client_id = check_by_rule(lambda answer: answer and microauthd.check_client_id(answer), "client_id", str.strip)
check_client_secret = check_by_rule(
    lambda answer: answer and microauthd.check_client_secret(answer), "client's secret", str
)


def check_audience(answer):
    if not answer.isprintable() or len(answer) > 255:
        raise ValueError("the audience must be at most 255 printable characters")
    return answer.strip()


def check_scopes(answer):
    names = [microauthd.normalise(name) for name in answer.replace(",", " ").split()]
    for name in names:
        if problem := microauthd.check_scope_name(name):
            raise ValueError(f"the scope {name!r} {problem}")
        if name in microauthd.OIDC_SCOPES:
            raise ValueError(f"{name} is a scope of OpenID Connect, which every client has: leave it out")
        if name in microauthd.UNSUPPORTED_OIDC_SCOPES:
            raise ValueError(f"{name} is a scope of OpenID Connect, which no client can have: leave it out")
    return list(dict.fromkeys(names))


def check_printable(answer):
    # A Unicode line separator too would end the line in the config file.
    if not answer.isprintable():
        raise ValueError("it must not contain control characters or line separators")
    return answer


def check_passphrase(answer):
    if answer and len(answer) < 8:
        raise ValueError("it must have at least 8 characters")
    return check_printable(answer)


def check_creatable(path):
    """Raise ValueError if no file can be created at this path."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written in {folder}")


def check_ca(draft):
    """Raise ValueError if a CA of the box would replace files that are there."""
    try:
        forbid_found_ca(dataclasses.replace(draft.options, db_file=draft["db-file"]))
    except StartupError as refusal:
        raise ValueError(str(refusal)) from None


def obstacle_of(draft, domain):
    """Return what issuer_obstacle() says where the issuer is made of this domain."""
    options = dataclasses.replace(
        draft.options, auth_domain=domain, auth_ip=draft["auth-ip"], oidc_issuer=draft["oidc-issuer"]
    )
    return issuer_obstacle(options)


def check_related(draft, name, value):
    """Raise ValueError if a value contradicts what was answered before."""
    if name == "admin-port" and (draft["auth-ip"], draft["auth-port"]) == (draft["admin-ip"], value):
        raise ValueError("AUTH listens on this address and port already")
    if name == "argon2id-parallelism" and draft["argon2id-memory"] < 8 * value:
        raise ValueError("argon2id-memory must be at least eight times this")
    if name == "tls" and value:
        check_ca(draft)


def check_option(draft, name, is_interactive=True):
    """Return a check that parses an option, compares it with related options, and puts it into the draft.

    If `is_interactive`, it also demands the advised range and that a certificate exists. An answers file may be used
    before the certificate is installed.
    """
    option = OPTION_NAMES[name]

    def check(answer):
        check_printable(answer)
        try:
            value = option.parse(answer)
            if is_interactive and name in ADVISED_RANGES and value != draft[name]:
                value = ADVISED_RANGES[name](answer)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if name in STATE_FILES:
            if not answer:
                raise ValueError(f"{name} must not be empty")
            others = [draft.config, *(draft[other] for other in STATE_FILES if other != name)]
            if os.path.abspath(value) in map(os.path.abspath, others):
                raise ValueError("config, keys and database must be different files")
            check_creatable(value)
            # By whom it will be made: see set_up().
            owner = recovery.database_owner(value if name == "db-file" else draft["db-file"])
            try:
                check_folder(existing_folder(value), Identity(owner[0], frozenset(owner[1:])) if owner else None)
            except StartupError as refusal:
                raise ValueError(str(refusal)) from None
        if name == "log-file" and value:
            check_creatable(value)
        if name == "db-file" and os.path.lexists(value):
            raise ValueError(f"{value} is there already")
        check_related(draft, name, value)
        if name == "auth-domain" and is_interactive and (problem := obstacle_of(draft, value)):
            raise ValueError(problem)
        if is_interactive and name.endswith("-ssl-cert-file") and value and not os.path.isfile(value):
            raise ValueError(f"there is no file {value}")
        draft.choose(name, value)
        return value

    return check


# == Quick questions ===========================================================
# What the wizard's quick path and the page of claim.py ask alike: one check for each, and its words in appliance/pages.


class QuickAnswers(msgspec.Struct):
    """The answers to quick questions that are no options."""

    username: str = "admin"
    email: str = ""
    password: str = ""
    client_id: str = ""
    audience: str = ""
    scopes: list[str] = []


def address_for_others():
    """Return the address to listen at for the network: `::` takes IPv4 too, where this machine has any IPv6."""
    return "::" if ipv6_addresses() else "0.0.0.0"  # noqa: S104 - somebody chose the network


def use_network(draft, server):
    """Have a port listen for the network, unless it does already. Raises ValueError: see Draft.check_effective()."""
    if not is_for_others(draft, server):
        draft.choose(f"{server}-ip", address_for_others())


def use_itself(draft):
    for server in ("auth", "admin"):
        if is_for_others(draft, server):
            draft.choose(f"{server}-ip", "127.0.0.1")


def use_own_certificate(draft):
    check_ca(draft)
    draft.choose("tls", "self")


def choose_name(draft, answer, servers=("auth", "admin")):
    """Take the name by which others reach the box; the one of ADMIN has no port, for its own follows."""
    host = microauthd.host_without_port(answer.strip())
    if not host or microauthd.is_loopback_host(host.strip("[]")):
        raise ValueError(f"{host or 'it'} is itself for each of them: give a name by which they reach this one")
    name = check_option(draft, "auth-domain")(answer)
    if "admin" in servers:
        check_option(draft, "admin-domain")(re.sub(":[0-9]+$", "", name))
    return name


def choose_passphrase(draft, answer, make):
    """Take the passphrase of the database. Empty makes one by `make()`; the word none keeps it unencrypted."""
    if answer.strip().lower() == "none":
        draft.choose("no-db-pass", True)
        return
    passphrase = check_passphrase(answer) or make()
    draft.check_effective("db-pass", passphrase)
    draft.choose("db-pass", passphrase)


def passphrase_origin(draft):
    """Return the option that says already how the database is kept, or ""."""
    return next((name for name in ("db-pass", "db-key-file", "no-db-pass") if draft[name]), "")


def check_password(draft, quick):
    return check_by_rule(
        lambda answer: microauthd.check_new_password(draft.options, answer, quick.username, quick.email), "password", str
    )


def first_client(draft, quick):
    """Return the client of quick answers, or None."""
    if not quick.client_id:
        return None
    secret = draft["oidc-client-secret"]
    return FirstClient(quick.client_id, secret, quick.audience or quick.client_id, quick.scopes)


def new_passphrase():
    return secrets.token_urlsafe(24)  # 192 bits


# == Prompts ===================================================================


@contextlib.contextmanager
def terminal_echo(enabled):
    """Turn the echo of the terminal on or off, and restore it afterwards."""
    import termios

    descriptor = sys.stdin.fileno()
    saved = termios.tcgetattr(descriptor)
    attributes = saved[:]
    attributes[3] = attributes[3] | termios.ECHO if enabled else attributes[3] & ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def keep_returns():
    """Have CR arrive as CR also while no question is open, so that LF behind it can be told from Enter.

    terminal_echo(), which is around the whole wizard, restores the terminal. termios(3)
    """
    import termios

    attributes = termios.tcgetattr(sys.stdin.fileno())
    attributes[0] &= ~termios.ICRNL
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, attributes)


def skip_line_feed():
    """Read the second half of CR LF, which the terminal has made a line of its own, from what was pasted.

    Only where it is all that waits: nobody presses Enter twice within 50 ms.
    """
    import fcntl
    import termios

    if select.select([sys.stdin], [], [], 0.05)[0]:
        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        if int.from_bytes(waiting, sys.byteorder) == 1:
            sys.stdin.readline()


def fold(text, indent="", first=None):
    """Break a sentence between words where it is wider than the terminal, `first` before its first line."""
    return textwrap.fill(
        text, min(shutil.get_terminal_size().columns, 80) - 1, initial_indent=indent if first is None else first,
        subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,  # a path stays whole
    )


class Prompter:
    """Asks questions, and remembers the answers: to step back, or to ask all of them again as proposals.

    To step back is to begin again and to give the same answers but the last, without a word. So every question must
    follow from the options and the answers before it; what was made at random meanwhile is kept by keep().
    """

    introduction = ""
    BACK = "<"

    def __init__(self):
        self.taken: list[tuple[str, str]] = []  # questions and accepted answers, in their order
        self.replayed: list[tuple[str, str]] = []  # those still to be given again
        self.earlier: dict[str, str] = {}  # the answers before a step back or the refused review: proposals
        self.unchanged: set[str] = set()  # questions whose answer is what was proposed, which may follow from others
        self.waiting: list[str] = []  # lines for the question that follows the replayed ones
        self.kept: dict[str, str] = {}
        self.files: list[str] = []  # to be removed when the set-up ends

    def read(self, question, default="", hidden=False):
        """Return one answer as it was typed. Raises KeyboardInterrupt or InputEnded."""
        raise NotImplementedError

    def write(self, text="", indent=None):
        """Print lines unchanged, or with an indent one sentence wrapped to the width of the terminal."""
        wrapped = text if indent is None else fold(text, indent)
        if self.replayed:
            self.waiting.append(wrapped)
        else:
            print(wrapped, flush=True)

    def keep(self, name, make):
        """Return what was made for this name in this set-up, and make it if that is the first time."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def propose(self, taken):
        for name, answer in taken:
            if name in self.unchanged:
                self.earlier.pop(name, None)
            else:
                self.earlier[name] = answer

    def step_back(self):
        self.propose(self.taken)
        self.replayed, self.taken = self.taken[:-1], []

    def start_over(self):
        self.propose(self.taken[:-1])  # without the answer to the review
        self.taken = []

    def replay(self, question, check):
        """Return (True, value) if this question is answered as before."""
        if not self.replayed or self.replayed[0][0] != question:
            self.replayed = []
            return False, None
        answer = self.replayed[0][1]
        try:
            value = check(answer)
        except (ValueError, StartupError):
            self.replayed = []
            return False, None
        self.taken.append(self.replayed.pop(0))
        self.waiting = []
        return True, value

    def read_step(self, question, default="", hidden=False):
        """Return an answer that is not a step back. The line end of a pasted one is no part of it."""
        answer = self.read(question, default, hidden).strip("\r\n")
        if answer.strip() == self.BACK:
            if self.taken:
                raise StepBack
            raise ValueError("this is the first question")
        answer.encode()
        return answer if hidden else answer.strip()

    def read_again(self, answer):
        """Return False if somebody steps back from the second input: to the first. Raises ValueError."""
        try:
            if self.read_step("The same again:", hidden=True) != answer:
                raise ValueError("the two are not the same")
        except StepBack:
            return False
        return True

    def ask(self, question, default="", check=str, hidden=False, repeat=False, name="", record=None):
        """Ask until `check` accepts the answer, and return the value that it returns.

        `repeat` asks for a second input of the same answer, always or where it says so of one. `name` identifies the question where its text changes;
        `record` returns the answer to remember where that is not what was typed.
        """
        name = name or question
        is_known, value = self.replay(name, check)
        if is_known:
            return value
        for line in self.waiting:
            print(line, flush=True)
        self.waiting = []
        earlier = "" if record else self.earlier.get(name, "")
        proposed = default if hidden or record else self.earlier.get(name, default)
        if hidden and earlier:
            question = question.partition(" (")[0] + " (empty: as before)"
        while True:
            try:
                answer = self.read_step(question, proposed, hidden)
                is_new = bool(answer)
                if hidden and not answer:
                    answer = earlier
                value = check(answer)
                is_repeated = is_new and (repeat(answer) if callable(repeat) else repeat)
                if is_repeated and not self.read_again(answer):
                    continue
            except UnicodeEncodeError:
                self.write("that is not UTF-8: the locale of this terminal says otherwise", "  ")
            except (ValueError, StartupError) as error:
                self.write(str(error), "  ")
            else:
                self.taken.append((name, record(answer) if record else answer))
                if not (hidden or record):
                    (self.unchanged.add if answer == default else self.unchanged.discard)(name)
                return value

    def ask_secret(self, question, check=str, repeat=False):
        return self.ask(question, "", check, hidden=True, repeat=repeat)

    def confirm(self, question, default, check=lambda answer: answer):
        """Ask for yes or no and Enter: noise on a serial line can produce a single key press."""
        default = self.earlier.get(question, "y" if default else "n") == "y"

        def parse(answer):
            if answer.lower() not in ("", "y", "yes", "n", "no"):
                raise ValueError("please answer yes or no")
            return check(record(answer) == "y")

        def record(answer):
            return answer.lower()[:1] or ("y" if default else "n")

        return self.ask(f"{question} ({'Y/n' if default else 'y/N'})", "", parse, name=question, record=record)


class ScreenPrompter(Prompter):
    """Asks on a terminal, without colours and with characters that a serial console has."""

    introduction = 'Enter takes what stands there already, and typing replaces it; "<" goes back one question.'

    def __init__(self):
        from prompt_toolkit.output.color_depth import ColorDepth
        from prompt_toolkit.styles import Style

        super().__init__()
        os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = ColorDepth.DEPTH_1_BIT.value
        self.style = Style([(name, "noinherit") for name in ("qmark", "question", "answer", "instruction")])
        self.ended_by_return = False  # whether CR ended the last answer
        keep_returns()

    def read(self, question, default="", hidden=False):
        import questionary
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPress
        from prompt_toolkit.keys import Keys

        pressed: list = []
        skipped: list = []  # LF at the beginning, which is no key that somebody has pressed
        line_feeds: list = []
        bindings = KeyBindings()
        is_untouched = Condition(lambda: len(pressed) == len(skipped))

        def insert(event, data):
            if is_untouched():
                event.current_buffer.text = ""
            event.current_buffer.insert_text(data)

        @bindings.add(Keys.ControlJ)
        def end_line(event):
            # The second half of CR LF, from what was pasted without brackets: it belongs to the answer before.
            if self.ended_by_return and not pressed:
                skipped.append(event)
            else:
                line_feeds.append(event)
                event.key_processor.feed(KeyPress(Keys.ControlM, "\r"), first=True)

        @bindings.add(Keys.BracketedPaste)
        def paste(event):
            insert(event, event.data.strip("\r\n"))

        @bindings.add(Keys.Any, filter=is_untouched)
        def replace(event):
            insert(event, event.data)

        kind = questionary.password if hidden else questionary.text
        folded = fold(question, first="> ").removeprefix("> ")  # which is qmark and a blank
        asked = kind(folded, default=default, style=self.style, qmark=">", key_bindings=bindings)
        asked.application.key_processor.after_key_press += pressed.append
        try:
            answer = asked.unsafe_ask()
        except EOFError:
            raise InputEnded from None
        if answer is None:
            raise KeyboardInterrupt
        self.ended_by_return = not line_feeds
        return answer


class LinePrompter(Prompter):
    """Asks line by line without escape sequences, on a terminal that cannot move its cursor."""

    introduction = 'Enter takes what stands in brackets; "" stands for an empty answer, "<" goes back one question.'

    def read(self, question, default="", hidden=False):
        with terminal_echo(not hidden):  # before the question is printed, so that a fast answer is not shown
            sys.stdout.write(fold(question, first="> ") + " " + (f"[{default}] " if default else ""))
            sys.stdout.flush()
            line = sys.stdin.readline()
            if len(line) > 1:
                skip_line_feed()
        if hidden:
            print(flush=True)
        if not line.endswith("\n"):  # The input ended; an incomplete line is no answer.
            raise InputEnded
        line = line[:-1]
        if not hidden and line.strip() == '""':
            return ""
        return line if line or hidden else default


def prompter_for_terminal():
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # it is the terminal
    return LinePrompter() if os.environ.get("TERM", "") in ("", "dumb", "unknown") else ScreenPrompter()


def format_value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


# == The wizard ================================================================


def meaning_of_empty(draft, name):
    """Return what an empty answer to the question for a passphrase means."""
    return "keeps the one that is set" if draft[name] else "none"


def ask_key_passphrase(prompter, draft, name):
    """Ask for the passphrase of a key file: it must open an existing file, and is typed twice for a new one."""
    path = draft[name.removesuffix("-pass") + "-file"]

    def check(answer):
        value = check_passphrase(answer) or draft[name]
        if os.path.exists(path):
            microauthd.read_ring(path, value)
        draft.check_effective(name, value)
        return value

    question = f"{OPTION_NAMES[name].ask} (empty: {meaning_of_empty(draft, name)})"
    draft.choose(name, prompter.ask_secret(question, check, repeat=not os.path.exists(path)))


def ask_option(prompter, draft, name):
    option, value = OPTION_NAMES[name], draft[name]
    question = EXTRA_QUESTIONS.get(name, option.ask)
    if name.endswith("-ssl-cert-pass"):
        return ask_certificate_passphrase(prompter, draft, name)
    if name.endswith("-signing-key-pass"):
        return ask_key_passphrase(prompter, draft, name)
    if name.endswith("-domain-no-ssl"):
        server = name.partition("-")[0]
        behind_proxy = not value and draft[f"{server}-domain"] != "localhost"
        return prompter.confirm(question, behind_proxy, lambda yes: draft.choose(name, not yes))
    if name.endswith("-insecure-http"):
        server = name.partition("-")[0]
        if not prompter.confirm(
            question.format(ip=draft[f"{server}-ip"]), value, lambda yes: draft.choose(name, yes) or yes
        ):
            prompter.write("Then it needs a certificate, or an address of loopback.", "  ")
            for other in ("tls", *listener_options(server)):
                if CONDITIONS.get(other, lambda draft: True)(draft):
                    ask_option(prompter, draft, other)
        return None
    if option.parse is boolean:
        return prompter.confirm(question, value, lambda yes: draft.choose(name, yes))
    if name.endswith("-domain") and value == "localhost" and is_for_others(draft, name.partition("-")[0]):
        value = proposed_name()
    return prompter.ask(question, format_value(value), check_option(draft, name))


def ask_certificate_passphrase(prompter, draft, name):
    """Ask for the passphrase of a TLS key, and load certificate and key with it as the server will."""
    server = name.partition("-")[0]
    files = (f"{server}-ssl-cert-file", f"{server}-ssl-key-file")

    def check(answer):
        value = check_printable(answer) or draft[name]
        try:
            tls_context(draft[files[0]], draft[files[1]], value)
        except ValueError as error:
            prompter.write(str(error), "  ")
            return False
        draft.choose(name, value)
        return True

    while not prompter.ask_secret(f"{OPTION_NAMES[name].ask} (empty: {meaning_of_empty(draft, name)})", check):
        # Any of the three may be wrong, so ask for the files again too.
        for other in files:
            ask_option(prompter, draft, other)
            if not draft[other] and other == files[0]:
                return


def ask_options(prompter, draft, names):
    for name in names:
        if CONDITIONS.get(name, lambda draft: True)(draft):
            ask_option(prompter, draft, name)


def ask_database(prompter, draft):
    """Ask for the file of the database and for its passphrase, unless that is set already."""
    while True:
        prompter.ask("Database file?", draft["db-file"], check_option(draft, "db-file"))
        if name := passphrase_origin(draft):
            return prompter.write(f"{name} is set already, by {draft.options.origins.get(name, 'default')}.", "  ")

        def check(answer):
            if answer.strip().lower() != "none" and check_passphrase(answer):
                draft.check_effective("db-pass", answer)
            return answer

        # Into the draft only after it was typed twice: a mistyped one must not remain there.
        answer = prompter.ask_secret(draft.words["passphrase"], check, lambda typed: typed.strip().lower() != "none")
        if answer.strip().lower() != "none":
            return choose_passphrase(draft, answer, lambda: prompter.keep("passphrase", new_passphrase))
        if prompter.confirm("Really keep the database unencrypted?", False):
            return draft.choose("no-db-pass", True)


def ask_proxy(prompter, draft):
    """Ask where the TLS proxy is. It speaks plain HTTP to AUTH, and is believed who its clients are."""

    def check(answer):
        proxy = ipaddress.ip_address(OPTION_NAMES["auth-ip"].parse(answer))
        if not proxy.is_loopback:
            use_network(draft, "auth")
            draft.choose("auth-insecure-http", True)
        elif is_for_others(draft, "auth") and not draft["auth-insecure-http"]:
            draft.choose("auth-ip", "127.0.0.1")
        if not any(proxy in network for network in draft["trusted-proxies"]):
            draft.choose("trusted-proxies", (*draft["trusted-proxies"], ipaddress.ip_network(proxy)))
        return "proxy"

    known = draft["trusted-proxies"]
    proposed = str(known[0].network_address) if known and known[0].num_addresses == 1 else "127.0.0.1"
    return prompter.ask("Address of the proxy (127.0.0.1: on this machine)?", proposed, check)


def ask_certificate(prompter, draft):
    """Ask for the certificate of a box for the network: the box's own, one that is there, or that of a proxy."""
    kinds = ("own", "file", "proxy")

    def check(answer):
        if answer not in kinds:
            raise ValueError("please answer own, file or proxy")
        if answer != "proxy":
            use_network(draft, "auth")
        if answer == "own" and not draft["auth-ssl-cert-file"]:
            use_own_certificate(draft)
        return answer

    is_proxied = draft["trusted-proxies"] or (draft["auth-insecure-http"] and not speaks_tls(draft, "auth"))
    proposed = "file" if draft["auth-ssl-cert-file"] else "proxy" if is_proxied else "own"
    question = "Its certificate: own (the box makes and renews it), file (one that is there), proxy (a TLS proxy)?"
    kind = prompter.ask(question, proposed, check)
    if kind == "proxy":
        return ask_proxy(prompter, draft)
    while kind == "file" and not draft["auth-ssl-cert-file"]:
        ask_options(prompter, draft, ("auth-ssl-cert-file", "auth-ssl-key-file", "auth-ssl-cert-pass"))
    return kind


def ask_reach(prompter, draft):
    """Ask who uses the box, and for the network by which name and with which certificate."""

    def check(answer):
        if answer not in ("itself", "network"):
            raise ValueError("please answer itself or network")
        if answer == "itself":
            use_itself(draft)
        return answer

    proposed = "network" if is_for_others(draft, "auth") or draft["auth-domain"] != "localhost" else "itself"
    question = "Who uses this box: itself (this machine alone), or the network?"
    if prompter.ask(question, proposed, check) == "itself":
        return
    kind = ask_certificate(prompter, draft)
    found = ", ".join(dict.fromkeys((*machine_names(), *ipv4_addresses())))
    if found:
        prompter.write(f"This machine is called, or is at: {found}", "  ")
    name = draft["auth-domain"] if draft["auth-domain"] != "localhost" else proposed_name()
    prompter.ask(draft.words["name"], name, lambda answer: choose_name(draft, answer, ("auth",)))

    def use_admin(yes):
        if yes:
            use_network(draft, "admin")
            choose_name(draft, draft["auth-domain"])
            for option in ("ssl-cert-file", "ssl-key-file", "ssl-cert-pass"):
                if draft["auth-ssl-cert-file"] and not draft[f"admin-{option}"]:
                    draft.choose(f"admin-{option}", draft[f"auth-{option}"])
        elif is_for_others(draft, "admin"):
            draft.choose("admin-ip", "127.0.0.1")

    if kind != "proxy":
        prompter.confirm("Is it administered over the network too, at /dashboard/?", True, use_admin)


def ask_application(prompter, draft, client):
    """Ask for what an application needs at which people log in: where it runs, and where it leads them."""

    def ask_words(member, question):
        def check(answer):
            words = answer.split()
            changed = msgspec.structs.replace(client, **{member: words or None if member == "grants" else words})
            for _, about, wrong in check_clients(draft.options, [changed]):
                if about == member:
                    raise ValueError(wrong)
            return getattr(changed, member)

        setattr(client, member, prompter.ask(question, "", check))

    client.public = prompter.confirm("Does it run in a browser or on a phone, where it can keep no secret?", False)
    ask_words("grants", "Its ways to get tokens (grant types), separated by blanks (empty: without a password)?")
    ask_words("redirect_uris", "Where do people return after a login (redirect URIs; empty: nobody logs in there)?")
    if client.redirect_uris:
        ask_words("post_logout_uris", "Where may they return after a logout (empty: nowhere)?")
    if client.public:
        ask_words("cors_origins", "Whose scripts may call AUTH, such as https://app.example (origins; empty: none)?")


def ask_client(prompter, draft, quick, is_guided):
    """Return the first client, or None if there is to be none. The guided path asks also where people log in."""
    words = draft.words
    quick.client_id = prompter.ask(words["client_id"], draft["oidc-client-id"], check_client_id)
    if not quick.client_id:
        return None
    quick.audience = prompter.ask(words["audience"], quick.client_id, check_audience)
    quick.scopes = prompter.ask(words["scopes"], "", check_scopes)
    client = first_client(draft, quick)
    if is_guided:
        ask_application(prompter, draft, client)
    if client.public:
        client.secret = ""
    return client


def describe_client(client):
    kind = "public, " if client.public else ""
    uris = "".join(f", {uri}" for uri in client.redirect_uris)
    return f"{client.client_id}, {kind}audience {client.audience}, scopes {' '.join(client.scopes) or 'none'}{uris}"


def terminal_uses_utf8():
    """Whether the locale uses UTF-8.

    The encoding of stdout is not enough: Python uses UTF-8 even in the C locale (PEP 538, PEP 540), in which a serial
    console may not.
    """
    getenv = os.environ.get
    coerced = getenv("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8") and getenv("LANG", "") in ("", "C", "POSIX")
    locale = getenv("LC_ALL") or ("" if coerced else getenv("LC_CTYPE")) or getenv("LANG") or ""
    return locale.lower().replace("-", "").endswith("utf8") and "utf" in (sys.stdout.encoding or "").lower()


def draw_qr_code(uri, secret):
    """Return a QR code as text, with the secret beside or below it, or "" if this terminal is too small for it.

    It has half blocks where the terminal uses UTF-8, otherwise two ASCII characters per module. The light modules are
    drawn, because most terminals are dark.
    """
    import segno

    code = segno.make(uri, error="l", micro=False)
    size, screen = code.symbol_size(border=2)[0], shutil.get_terminal_size()
    caption = ["Scan this, or type the", "secret into the authenticator:", *textwrap.wrap(secret, 20)]
    is_wide = size + 2 + max(map(len, caption)) < screen.columns
    if terminal_uses_utf8() and is_wide and (size + 1) // 2 < screen.lines:
        drawing = io.StringIO()
        code.terminal(out=drawing, compact=True, border=2)
        lines = drawing.getvalue().splitlines()
        return "\n".join(
            line + "  " + text for line, text in zip(lines, ["", *caption] + [""] * len(lines), strict=False)
        )
    if 2 * (size - 2) < screen.columns and size + 1 < screen.lines:
        lines = ["".join("  " if module else "##" for module in row) for row in code.matrix_iter(border=1)]
        lines += ["Scan this, or type the secret into the authenticator:", "  " + secret]
        return "\n".join(lines)
    return ""


def offer_qr_file(prompter, uri, secret):
    """Where the code does not fit the screen, write it to a file for the time of the set-up, or show the secret."""

    def check(path):
        if path and path not in prompter.files:
            check_creatable(path)
            if os.path.lexists(path):
                raise ValueError(f"{path} is there already")
            write_durably(path, draw_qr(uri))
            prompter.files.append(path)
        return path

    prompter.write("The QR code does not fit this screen. The secret, to type into the authenticator:", "")
    prompter.write(secret, "  " if shutil.get_terminal_size().columns > 41 else "")
    question = "Write the QR code into an SVG file, until the set-up ends (a path; empty: no)?"
    if path := prompter.ask(question, "", check):
        prompter.write(f"{os.path.abspath(path)} holds it, and is removed when the set-up ends.", "  ")


def ask_second_factor(prompter, username, issuer_name):
    """Offer TOTP, and return the seed, or "" without one.

    A seed is used only after a code has proved that an authenticator has it. RFC 6238
    """
    if not prompter.confirm("A second factor (TOTP) for the administrator?", False):
        return ""
    seed = prompter.keep("seed", microauthd.new_totp_seed)
    uri, secret = microauthd.totp_uri(seed, username, issuer_name), " ".join(re.findall(".{1,4}", seed))
    if drawing := draw_qr_code(uri, secret):
        prompter.write(drawing)
    else:
        offer_qr_file(prompter, uri, secret)

    def check(answer):
        answer = answer.replace(" ", "")
        # A step back asks for it again when its time is over: it has proved what it had to.
        if answer and answer != prompter.kept.get("code"):
            if microauthd.totp_time_step(seed, answer, int(time.time())) is None:
                raise ValueError("that is not the code of this moment; empty goes on without")
            prompter.kept["code"] = answer
        return answer

    return seed if prompter.ask("The code it shows?", "", check) else ""


def ask_administrator(prompter, draft, quick):
    """Ask for user name, e-mail and password. Return the TOTP seed, or ""."""
    words = draft.words
    quick.username = prompter.ask(words["username"], quick.username, check_username)
    quick.email = prompter.ask(words["email"], "", check_email)
    quick.password = prompter.ask_secret(words["password"], check_password(draft, quick), repeat=True)
    return ask_second_factor(prompter, quick.username, microauthd.box_name(draft.options))


def address_of(options, server):
    """Return address and port as a URL has them. RFC 3986 §3.2.2"""
    ip = getattr(options, f"{server}_ip")
    return f"{f'[{ip}]' if ':' in ip else ip}:{getattr(options, f'{server}_port')}"


def print_summary(prompter, draft, final_options, answers, is_guided):
    rows = [
        ("config", final_options.config_file),
        ("database", f"{final_options.db_file}, {'encrypted' if final_options.db_pass or final_options.db_key_file else 'NOT encrypted'}"),
        ("AUTH", f"{address_of(final_options, 'auth')}, issuer {final_options.auth_issuer}"),
        ("ADMIN", address_of(final_options, "admin")),
        ("administrator", answers.username + (", with a second factor" if answers.totp_seed else "")),
        ("first client", describe_client(answers.clients[0]) if answers.clients else "none"),
    ]
    if is_guided:  # Show only what differs from the defaults.
        rows += [
            (option.name, format_value(draft[option.name]))
            for option in OPTIONS
            if option.name in draft.chosen
            and not option.secret
            and option.name not in CUSTOM_QUESTIONS
            and draft[option.name] != option.default
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        prompter.write(fold(value, " " * 6, f"  {name:{width}}  "))


def describe_outcome(options):
    """Return what an interrupted set-up left: once its journal is committed, the next start completes it."""
    if os.path.exists(journal_of(journal_place(options))):
        return "The set-up was being put in place: run microauthd again, and it is completed."
    return "Nothing was written."


def set_up_here(final_options, answers):
    """Call recovery.set_up(), and turn an error of the disk or the database into a StartupError."""
    try:
        return recovery.set_up(final_options, answers)
    except OSError as error:
        problem = f"{error.filename or 'the disk'}: {error.strerror or error}"
    except sqlcipher3.Error as error:
        problem = f"the database {final_options.db_file} cannot be made: {error}"
    raise StartupError(f"{describe_outcome(final_options)} {problem}")


def set_up(final_options, answers):
    """Make everything of a set-up. As root, for a server that runs as the user whose folder the database will lie in:
    the config file stays root's, and all else is made by that user.

    An interrupted one leaves settings and nothing that they name, so it is repeated. Raises StartupError.
    """
    owner = recovery.database_owner(final_options.db_file)
    if owner is None:
        return set_up_here(final_options, answers)
    forbid_second_setup(final_options)
    for _, _, wrong in check_clients(final_options, answers.clients):
        raise StartupError(wrong)
    recovery.write_settings(final_options, owner[1])
    made = run_as(*owner, lambda: msgspec.json.encode(set_up_here(final_options, answers)))
    return msgspec.json.decode(made, type=list[MadeClient])


def ask_everything(prompter, options, flags):
    """Ask all questions, and show what follows from the answers. Return Options and Answers to set up with.

    Raises StepBack or StartOver, and KeyboardInterrupt or InputEnded.
    """
    draft, quick = Draft(options), QuickAnswers()
    ask_database(prompter, draft)
    is_guided = (
        "--guided" in flags
        or ("--quick" not in flags
        and prompter.confirm("Go through every setting? (no: the few that matter)", False))
    )
    prompter.write()
    if is_guided:
        ask_options(prompter, draft, BEFORE_CLIENT)
        client = ask_client(prompter, draft, quick, is_guided)
        ask_options(prompter, draft, AFTER_CLIENT)
        seed = ask_administrator(prompter, draft, quick)
    else:
        for name in ("token-signing-key", "admin-token-signing-key"):
            if os.path.exists(draft[name + "-file"]):
                # The set-up keeps existing keys. Report now, and not after the last question, that one does not open.
                microauthd.read_ring(draft[name + "-file"], draft[name + "-pass"])
        ask_reach(prompter, draft)
        seed = ask_administrator(prompter, draft, quick)
        client = ask_client(prompter, draft, quick, is_guided)
    answers = Answers(
        quick.username, quick.email, quick.password, totp_seed=seed, clients=[client] if client else [],
        keep_keys="--keep-keys" in flags,
    )
    final_options = draft.complete()
    prompter.write()
    print_summary(prompter, draft, final_options, answers, is_guided)
    prompter.write()
    if not prompter.confirm("Set it up? (no: back to the questions; Ctrl-C leaves)", True):
        raise StartOver
    return final_options, answers


def interview(prompter, options, flags):
    """Ask until the review is agreed to. Return Options and Answers."""
    while True:
        try:
            return ask_everything(prompter, options, flags)
        except StepBack:
            prompter.step_back()
        except StartOver:
            prompter.write("Nothing is written yet. The questions again, with your answers:")
            prompter.start_over()


def made_root(options):
    """Return what describe_root() does, after set_up(): as the user who owns the file, for root believes no other."""
    owner = recovery.database_owner(options.db_file)
    if owner is None:
        return describe_root(options)
    described = run_as(*owner, lambda: msgspec.json.encode(describe_root(options)))
    return msgspec.json.decode(described, type=CertificateFile | None)


SERVICE_CONFIG = "/etc/microauthd/mad.conf"  # of a service: see service.CONFIG


def program_words(options):
    """Return how the program and mad are called here, so that they find this config file."""
    main = sys.modules["__main__"]
    path = getattr(main, "ARCHIVE", "") or getattr(main, "__file__", None) or ""
    config = os.path.abspath(options.config_file)
    flag, variable = f" --config {shlex.quote(config)}", f"MAD_CONFIG={shlex.quote(config)} "
    if config == SERVICE_CONFIG or options.config_file == "mad.conf":
        flag = variable = ""
    if config == SERVICE_CONFIG or not path.endswith((".pyz", "microauthd.py")):
        return f"microauthd {{}}{flag}", f"{variable}mad"
    program = f"python3 {shlex.quote(os.path.relpath(path) if path.startswith(os.getcwd() + '/') else path)}"
    if path.endswith(".py"):
        return f"{program} {{}}{flag}", f"{variable}{program.removesuffix('microauthd.py')}mad.py"
    return f"{program} {{}}{flag}", f"{variable}{program} mad"


def describe_end(options, answers, made, passphrase="", will_serve=False):
    """Return the lines of the end of a set-up: what is shown this once, what is where, and what to do next."""
    lines = [f"Done. {os.path.abspath(options.config_file)} holds the settings and their secrets: it is yours alone."]
    for client in made:
        if client.secret:
            lines += ["", f"  client_id      {client.client_id}", f"  client_secret  {client.secret}", "",
                      "The secret is shown this once."]
    if passphrase:
        lines += ["", f"  database passphrase  {passphrase}", ""]
    if options.db_pass or options.db_key_file:
        what = "the database's passphrase" if options.db_pass else f"{options.db_key_file}, the database's key,"
        lines.append(f"Keep {what} elsewhere too: without it no backup can be read.")
    if root := made_root(options):
        lines += ["", f"Clients trust the box by {root.file}. Its SHA-256 fingerprint:", f"  {root.sha256}"]
    program, mad = program_words(options)
    client_id = next((client.client_id for client in answers.clients if not client.public), "CLIENT")
    is_service = os.path.abspath(options.config_file) == SERVICE_CONFIG
    start = "systemctl start microauthd" if is_service else program.format("serve")
    lines += ["", "The server starts now. Then try:" if will_serve else "Try next:"]
    lines += [] if will_serve else [f"  {start}"]
    lines += [f"  {mad} session login", f"  {mad} token get --client-id {client_id}", ""]
    lines += [f"  {options.auth_issuer}/.well-known/openid-configuration", f"  {options.admin_issuer}/dashboard/"]
    return lines


def run_wizard(options, flags):
    prompter = prompter_for_terminal()
    prompter.write(
        f"microauthd {microauthd.VERSION}: first start. Nothing is written before the last question; "
        "Ctrl-C leaves everything as it is.", "",
    )
    prompter.write(prompter.introduction, "")
    prompter.write()
    try:
        final_options, answers = interview(prompter, options, flags)
        prompter.write("Making keys and database ...")
        if answers.totp_seed:
            import pyotp

            # set_up() verifies a code again, and the one that was typed may have expired. RFC 6238 §5.2
            answers.totp_code = pyotp.TOTP(answers.totp_seed).now()
        made = set_up(final_options, answers)
    finally:
        for path in prompter.files:
            os.unlink(path)
    passphrase = prompter.kept.get("passphrase", "")
    shown = passphrase if passphrase == final_options.db_pass else ""
    for line in describe_end(final_options, answers, made, shown, "--then-serve" in flags):
        is_sentence = line and not line.startswith(" ")  # what is to be copied stays as it is
        prompter.write(line, "" if is_sentence else None)
    return 0


# == Unattended ================================================================


def read_named_secret(draft, path, name):
    """Return the secret in the first line of the file that an answer names. Raises ValueError: see read_secret_file().
    """
    if not isinstance(path, str):
        raise ValueError(f"{name} must be the name of a file, as a string")
    return read_secret_file(path, name, draft["docker"])


def option_text(option, value):
    """Return a TOML value as text for the parser of the option. Raises ValueError."""
    if isinstance(value, bool):
        if option.parse is not boolean:
            raise ValueError(f"{option.name} is not a yes or no")
        return "true" if value else "false"
    if isinstance(value, (str, int)):
        return str(value)
    if option.parse in (networks, host_names) and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    raise ValueError(f"{option.name} must be a string, a whole number, or true or false")


def header_of(name):
    """Return the header of a table that position_of() finds by this name."""
    word, several, _ = name.partition(" ")
    return f"[[{word}]]" if several else f"[{word}]"


class AnswersFile:
    """A parsed answers file. `problems` collects a sentence for each thing that is wrong with it."""

    TABLES = {  # noqa: RUF012 - never changed
        "admin": ("username", "email", "email_verified", "password", "password_file", "scopes", "totp"),
        "client": (
            "client_id", "public", "audience", "grants", "scopes", "redirect_uris", "post_logout_uris", "cors_origins",
            "secret_file",
        ),
    }  # fmt: skip

    def __init__(self, path, document=None):
        """With a document nothing is read; `path` is then what its problems are said to be of."""
        self.path, self.problems, self.content = path, [], ""
        if document is not None:
            self.document, self.is_private = document, True
            return
        try:
            with open(path, "rb") as file:
                self.is_private = not stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
                self.content = file.read().decode()
            self.document = tomllib.loads(self.content)
        except OSError as error:
            raise StartupError(f"the answers file {path!r} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise StartupError(f"the answers file {path} is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            message, _, position = str(error).partition(" (at ")
            line = re.match("line ([0-9]+)", position)
            raise StartupError(f"{path}:{line[1] if line else len(self.content.splitlines())}: {message}") from None

    def position_of(self, key, table=""):
        """Return "file:line" of a key, or "file" if the line is not found because of unusual syntax.

        `table` is its name, of several [[tables]] with the number of the one, from 0, as in "client 1".
        """
        inside, tables = "", collections.Counter[str]()
        for number, line in enumerate(self.content.splitlines(), 1):
            if header := re.match(r"\s*\[(\[?)\s*\"?([\w-]+)\"?\s*\]", line):
                inside = f"{header[2]} {tables[header[2]]}" if header[1] else header[2]
                tables[header[2]] += 1
                if (table == "" and header[2] == key) or (key == table == inside):
                    return f"{self.path}:{number}"
            elif inside == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                return f"{self.path}:{number}"
        return self.path

    def add_problem(self, sentence, key="", table=""):
        self.problems.append(f"{self.position_of(key, table) if key else self.path}: {sentence}")

    def checked(self, key, table, check, *args):
        """Return what the check returns; on an error add a problem and return None."""
        try:
            return check(*args)
        except (ValueError, StartupError) as error:
            self.add_problem(str(error), key, table)
            return None

    def check_inline_secret(self, key, table):
        """Add a problem if others can read the file, because this key holds a secret."""
        if not self.is_private:
            self.add_problem(
                f"it holds the secret {key} and can be read by others: chmod 600 {self.path}, or name a file that "
                "holds the secret",
                key, table,
            )

    def get_table(self, name):
        table = self.document.get(name, {})
        if not isinstance(table, dict):
            self.add_problem(f"{name} must be a table, [{name}]", name)
            return {}
        self.check_keys(table, name)
        return table

    def check_keys(self, table, name):
        """Add a problem for each key that a table does not know."""
        known = self.TABLES[name.partition(" ")[0]]
        for key in table.keys() - set(known):
            self.add_problem(f"unknown key {key!r} in {header_of(name)}; it knows {', '.join(known)}", key, name)

    def get_strings(self, table, name, keys):
        """Return the strings of a table by key, and add a problem for each value of another type."""
        strings = {}
        for key in keys:
            if key in table and not isinstance(table[key], str):
                self.add_problem(f"{key} in {header_of(name)} must be a string", key, name)
            elif key in table:
                strings[key] = table[key]
        return strings

    def get_list(self, table, name, key):
        """Return a list of strings of a table, empty if it is not there, and add a problem for another type."""
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.add_problem(f"{key} in {header_of(name)} must be a list of strings", key, name)
            return []
        return value

    def get_flag(self, table, name, key):
        """Return a true or false of a table, false if it is not there, and add a problem for another type."""
        value = table.get(key, False)
        if not isinstance(value, bool):
            self.add_problem(f"{key} in {header_of(name)} must be true or false", key, name)
        return value is True

    def read_options(self, draft):
        """Put the options of the top level and of [options] into the draft."""
        entries = [
            ("", key, value) for key, value in self.document.items() if key not in ("options", "web", *self.TABLES)
        ]
        table = self.document.get("options", {})
        if not isinstance(table, dict):
            self.add_problem("options must be a table, [options]", "options")
            table = {}
        seen: dict[str, str] = {}
        for section, key, value in entries + [("options", key, value) for key, value in table.items()]:
            name = "db-pass" if key == "db-pass-file" else OPTION_NAMES[key].name if key in OPTION_NAMES else ""
            if not name:
                kind = "table" if isinstance(value, dict) else "option"
                self.add_problem(f"unknown {kind} {key!r}{did_you_mean(key)}", key, section)
                continue
            if name in seen:
                self.add_problem(f"{name} is set twice, by {seen[name]} and {key}", key, section)
                continue
            seen[name] = key
            if OPTION_NAMES[name].secret and key != "db-pass-file":
                self.check_inline_secret(key, section)

            def set_option(name=name, key=key, value=value):
                if key == "db-pass-file":
                    text = read_named_secret(draft, value, key)
                else:
                    text = option_text(OPTION_NAMES[name], value)
                if name == "db-pass":
                    try:
                        check_passphrase(text)
                    except ValueError as error:
                        raise ValueError(str(error).replace("it", "db-pass", 1)) from None
                check_option(draft, name, is_interactive=False)(text)

            self.checked(key, section, set_option)

    def read_admin(self, draft, flags, values):
        """Return user name, e-mail and password of the administrator."""
        admin = self.get_table("admin")
        strings = self.get_strings(admin, "admin", ("username", "email", "password"))
        for name in ("username", "email"):
            if name not in admin:
                self.add_problem(f"[admin] needs {name}", "admin")
        username = email = ""
        if "username" in strings:
            username = self.checked("username", "admin", check_username, strings["username"])
        if "email" in strings:
            email = self.checked("email", "admin", check_email, strings["email"])
        if admin.get("totp", False) is not False:
            self.add_problem(
                "totp can only be false: a second factor is confirmed by its owner, so it is turned on after the "
                "set-up",
                "totp", "admin",
            )
        if "--admin-password-stdin" in flags:
            key, password = "", read_stdin_secret("--admin-password-stdin")
        elif "--admin-password-file" in values:
            name = "--admin-password-file"
            key, password = "", self.checked("", "", read_named_secret, draft, values[name], name)
        elif "password_file" in admin:
            key, password = (
                "password_file",
                self.checked(
                    "password_file", "admin", read_named_secret, draft, admin["password_file"], "password_file"
                ),
            )
        elif "password" in strings:
            key, password = "password", strings["password"]
            self.check_inline_secret("password", "admin")
        else:
            self.add_problem(
                "the administrator needs a password: password_file in [admin], --admin-password-file or "
                "--admin-password-stdin",
                "admin",
            )
            return username, email, None
        if password is not None:
            rule = check_by_rule(
                lambda answer: microauthd.check_new_password(draft.options, answer, username or "", email or ""),
                "password", str,
            )
            password = self.checked(key, "admin", rule, password)
        return username, email, password

    def read_clients(self, draft):
        """Return the clients of [client], or of each [[client]]; without either, one if oidc-client-id is set."""
        given = self.document.get("client", {})
        several = isinstance(given, list)
        if not all(isinstance(table, dict) for table in (given if several else [given])):
            self.add_problem("client must be a table, [client], or several, [[client]]", "client")
            return []
        is_named = "oidc-client-id" in draft.chosen or "oidc-client-id" in draft.options.origins
        if not several:
            return [self.read_client(draft, given, "client")] if given or is_named else []
        return [self.read_client(draft, table, f"client {index}", index) for index, table in enumerate(given)]

    def read_client(self, draft, client, name, index=0):
        """Return a client. oidc-client-id and oidc-client-secret stand for what the first one does not say."""
        self.check_keys(client, name)
        strings = self.get_strings(client, name, ("client_id", "audience"))
        client_id = strings.get("client_id", "" if index else draft["oidc-client-id"])
        if not client_id and ("client_id" in strings or index):
            self.add_problem(f"client_id must not be empty: leave {header_of(name)} out to make no client",
                             "client_id" if "client_id" in strings else name, name)
        self.checked("client_id", name, check_client_id, client_id)
        audience = self.checked("audience", name, check_audience, strings.get("audience", "")) or client_id
        scopes = self.get_list(client, name, "scopes")
        for scope in scopes:
            if len(scope.split()) != 1:
                self.add_problem(
                    f"the scope {scope!r} must be one word: write a list, one scope an entry", "scopes", name
                )
        scopes = self.checked("scopes", name, check_scopes, " ".join(scopes))
        public, secret = self.get_flag(client, name, "public"), ""
        if "secret_file" in client and public:
            self.add_problem("a public client has no secret: leave secret_file out", "secret_file", name)
        elif "secret_file" in client:
            secret = self.checked("secret_file", name, read_named_secret, draft, client["secret_file"], "secret_file")
        elif not index and not public:
            secret = draft["oidc-client-secret"]
        self.checked("secret_file", name, check_client_secret, secret or "")
        uris = {key: self.get_list(client, name, key) for key, _ in recovery.URI_MEMBERS}
        grants = self.get_list(client, name, "grants") if "grants" in client else None
        return FirstClient(client_id.strip(), secret or "", audience, scopes or [], public, grants, **uris)

    def read_rights(self, clients):
        """Return whether the administrator's address is verified, and the scopes of the administrator."""
        admin = self.document.get("admin", {})
        if not isinstance(admin, dict):  # read_admin() has said so
            return False, []
        scopes = self.checked("scopes", "admin", check_scopes, " ".join(self.get_list(admin, "admin", "scopes"))) or []
        known = {name for client in clients for name in client.scopes}.union(name for _, name, _ in SEEDED_SCOPES)
        for scope in scopes:
            if scope not in known:
                self.add_problem(f"the scope {scope!r} in [admin] is one of no client", "scopes", "admin")
        return self.get_flag(admin, "admin", "email_verified"), scopes

    def check_by_services(self, draft, clients):
        """Add a problem for each thing that the services of the server refuse of the clients."""
        several = isinstance(self.document.get("client"), list)
        for index, member, wrong in check_clients(draft.options, clients):
            self.add_problem(wrong, "secret_file" if member == "secret" else member,
                             f"client {index}" if several else "client")


def keep_secrets(made, path):
    """Write the secrets of clients that were made into a new private file: what a service prints goes into its log."""
    lines = [f"client_id={client.client_id}\nclient_secret={client.secret}\n" for client in made if client.secret]
    if lines:
        write_durably(path, "".join(lines).encode())
        print(f"client secrets are in {path}: take them from there, and remove it")


def run_unattended(options, answers_file, flags, values, secrets_file=""):
    draft = Draft(options)
    answers_file.read_options(draft)
    username, email, password = answers_file.read_admin(draft, flags, values)
    clients = answers_file.read_clients(draft)
    email_verified, scopes = answers_file.read_rights(clients)
    if not answers_file.problems:
        answers_file.check_by_services(draft, clients)
    final_options = None
    if not answers_file.problems:
        final_options = answers_file.checked("", "", draft.complete)
    for problem in answers_file.problems:
        print(f"microauthd: {problem}", file=sys.stderr)
    if answers_file.problems:
        return 1
    keep_keys = "--keep-keys" in flags
    made = set_up(
        final_options,
        Answers(username, email, password, email_verified, scopes, clients=clients, keep_keys=keep_keys),
    )
    print(f"administrator={username}")
    for client in made:
        print(f"client_id={client.client_id}")
        if client.secret and not secrets_file:
            print(f"client_secret={client.secret}")
    if secrets_file:
        keep_secrets(made, secrets_file)
    if final_options and (root := made_root(final_options)):
        print(f"ca_file={root.file}\nca_sha256={root.sha256}")
    return 0


SECRETS_FILE = "first-clients.txt"


def run_from_environment(options, variables, prefix) -> int:
    """Set up from variables of the environment, for a container: see SETUP_VARIABLES. Return the exit status."""
    forbid_second_setup(options)
    forbid_found_keys(options, keep_keys=False)
    if "SETUP_PASSWORD" in variables and "SETUP_PASSWORD_FILE" in variables:
        raise StartupError(f"{prefix}SETUP_PASSWORD and {prefix}SETUP_PASSWORD_FILE set the same")
    values = {}
    if "SETUP_PASSWORD_FILE" in variables:
        values["--admin-password-file"] = variables["SETUP_PASSWORD_FILE"]
    members = {"SETUP_USERNAME": "username", "SETUP_EMAIL": "email", "SETUP_PASSWORD": "password"}
    given = {member: variables[name] for name, member in members.items() if name in variables}
    if "SETUP_ANSWERS" in variables:
        if given:
            raise StartupError(f"{prefix}SETUP_ANSWERS goes with no other but {prefix}SETUP_PASSWORD_FILE")
        answers_file = AnswersFile(variables["SETUP_ANSWERS"])
    else:
        missing = [name for name in ("SETUP_USERNAME", "SETUP_EMAIL") if members[name] not in given]
        missing += [] if values or "password" in given else ["SETUP_PASSWORD_FILE"]
        if missing:
            raise StartupError(f"a set-up from the environment needs {', '.join(prefix + name for name in missing)}")
        answers_file = AnswersFile("the environment", {"admin": given})
    folder = os.path.dirname(os.path.abspath(options.db_file))
    return run_unattended(options, answers_file, [], values, os.path.join(folder, SECRETS_FILE))


def run_first_start(options, flags, values) -> int:
    """Set up before the first start of a service, from an answers file that is removed afterwards."""
    path = values["--answers"]
    if os.path.lexists(options.db_file) or not os.path.exists(path):
        return 0
    forbid_found_keys(options, "--keep-keys" in flags)
    folder = os.path.dirname(os.path.abspath(path))
    status = run_unattended(options, AnswersFile(path), flags, values, os.path.join(folder, SECRETS_FILE))
    if not status:
        os.unlink(path)
        sync_directory(folder)
    return status


def check_usage(flags, values):
    if "--answers" not in values:
        if "--first-start" in flags:
            raise StartupError("--first-start goes with --answers FILE")
        for name in ("--admin-password-stdin", "--admin-password-file"):
            if name in flags or name in values:
                raise StartupError(f"{name} goes with --answers FILE; the wizard asks for the password itself")
    elif "--quick" in flags or "--guided" in flags:
        raise StartupError("--quick and --guided are ways to be asked; with --answers FILE nothing is asked")
    if "--quick" in flags and "--guided" in flags:
        raise StartupError("--quick and --guided contradict each other")
    if "--admin-password-stdin" in flags and "--admin-password-file" in values:
        raise StartupError("--admin-password-stdin and --admin-password-file contradict each other")


def is_for_web(options, flags, values) -> bool:
    """Return whether the set-up is asked on a page: see claim.run(). Raises StartupError for a bad command line."""
    if "--web" in flags:
        if "--answers" in values or {"--quick", "--guided", "--first-start"} & set(flags):
            raise StartupError("--web goes with no other way to be asked")
        return True
    if "--claim-code-file" in values:
        raise StartupError("--claim-code-file goes with --web; an answers file has claim_code_file")
    check_usage(flags, values)
    path = values.get("--answers", "")
    if not path or os.path.lexists(options.db_file) or ("--first-start" in flags and not os.path.exists(path)):
        return False
    web = AnswersFile(path).document.get("web", False)
    if not isinstance(web, bool):
        raise StartupError(f"{path}: web must be true or false")
    return web


def run(options, flags, values) -> int:
    """Run the wizard, or with --answers the set-up from that file. Return the exit status.

    Raises StartupError or Problem, and then nothing was created.
    """
    if "--first-start" in flags:
        check_usage(flags, values)
        return run_first_start(options, flags, values)
    forbid_second_setup(options)
    check_usage(flags, values)
    forbid_found_keys(options, "--keep-keys" in flags)
    if "--answers" in values:
        return run_unattended(options, AnswersFile(values["--answers"]), flags, values)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise StartupError(
            "set-up asks its questions on a terminal, and here is none: use --answers FILE, or --demo for a trial"
        )
    try:
        # Otherwise the terminal would show a password that is typed or pasted before its question appears.
        with terminal_echo(False):
            return run_wizard(options, flags)
    except KeyboardInterrupt:
        print("\n" + describe_outcome(options))
        return 130
    except InputEnded:
        print()
        raise StartupError("the input ended before the last question; nothing was written") from None
