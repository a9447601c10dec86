"""The wizard of the first start: asks what a set-up needs, or reads it from an answers file.

It decides nothing: every answer goes through the parser of its option or the server's own checks,
and one call of microauthd.set_up() makes everything or nothing. Until that call nothing is written.

The guided path keeps the order of the original's wizard and its ranges, with these departures: no
environment file (the config file holds everything, and is private), no config path (it is a flag),
no length of the client's secret (it has 256 bits), and a question where plain HTTP would leave the
machine. The source and licence of common_passwords.txt are in NOTICE.
"""

import contextlib
import dataclasses
import io
import ipaddress
import os
import re
import shutil
import stat
import sys
import textwrap
import time
import tomllib

# Serial consoles cannot say where their cursor is; prompt_toolkit need not ask.
os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")

import sqlcipher3

import microauthd
from appliance import recovery
from appliance.base import StartupError
from appliance.base.settings import OPTIONS, OPTION_NAMES, boolean, check_options, did_you_mean, networks, whole
from appliance.base.wire import tls_context
from appliance.recovery import Answers, journal_of

# Asked in words of their own, or by the part about the first client.
BY_HAND = ("db-file", "db-pass", "oidc-client-id")


def listener(side):
    return [
        f"{side}-{name}"
        for name in (
            "ip", "port", "domain", "ssl-cert-file", "ssl-key-file", "ssl-cert-pass", "domain-no-ssl", "insecure-http",
        )
    ]


# The guided path, before and after the first client.
BEFORE_CLIENT = (
    "log-file", "totp-qr-output-root", "enable-audit-logging", "audit-log-retention-days", *listener("auth"), *listener("admin"),
    "argon2id-time", "argon2id-memory", "argon2id-parallelism", "argon2id-hash-length", "argon2id-salt-length",
    "token-signing-key-file", "prefer-ec-token-signer", "token-signing-key-length-rsa", "token-signing-key-pass",
    "admin-token-signing-key-file", "prefer-ec-admin-token-signer", "admin-token-signing-key-length-rsa", "admin-token-signing-key-pass",
    "token-expiration", "admin-token-expiration", "token-purge-days", "enable-token-revocation",
    "enable-token-refresh", "refresh-token-expiration", "refresh-token-purge-days",
    "max-login-failures", "seconds-to-reset-login-failures", "failed-password-lockout-duration",
)  # fmt: skip
AFTER_CLIENT: tuple[str, ...] = (
    "trusted-proxies", "serve-public-auth-files", "enable-pkce", "pkce-code-lifetime", "enable-pass-cache",
    "pass-cache-duration",
)
# An option that has a question and stands in neither is asked all the same, after them.
AFTER_CLIENT += tuple(
    option.name for option in OPTIONS if option.ask and option.name not in (*BY_HAND, *BEFORE_CLIENT, *AFTER_CLIENT)
)

# What the wizard asks although OPTIONS has no question for it: it matters only after another answer.
QUESTIONS = {
    "auth-ssl-key-file": "Its private key (empty: in the same file)?",
    "admin-ssl-key-file": "Its private key (empty: in the same file)?",
    "auth-domain-no-ssl": "Do clients reach AUTH by https, through a TLS proxy?",
    "admin-domain-no-ssl": "Do you reach ADMIN by https, through a TLS proxy?",
    "auth-insecure-http": "Plain HTTP on {ip}: tokens and passwords travel in clear. Allow it?",
    "admin-insecure-http": "Plain HTTP on {ip}: tokens and passwords travel in clear. Allow it?",
}

def exposed(draft, side):
    return not draft[f"{side}-ssl-cert-file"] and not ipaddress.ip_address(draft[f"{side}-ip"]).is_loopback


# Asked only when it matters; what is not asked keeps its value, for the day the feature is turned on.
MATTERS = {
    "auth-ssl-key-file": lambda draft: draft["auth-ssl-cert-file"],
    "admin-ssl-key-file": lambda draft: draft["admin-ssl-cert-file"],
    "auth-ssl-cert-pass": lambda draft: draft["auth-ssl-cert-file"],
    "admin-ssl-cert-pass": lambda draft: draft["admin-ssl-cert-file"],
    "auth-domain-no-ssl": lambda draft: not draft["auth-ssl-cert-file"],
    "admin-domain-no-ssl": lambda draft: not draft["admin-ssl-cert-file"],
    "auth-insecure-http": lambda draft: exposed(draft, "auth"),
    "admin-insecure-http": lambda draft: exposed(draft, "admin"),
    "audit-log-retention-days": lambda draft: draft["enable-audit-logging"],
    "token-signing-key-length-rsa": lambda draft: not draft["prefer-ec-token-signer"],
    "admin-token-signing-key-length-rsa": lambda draft: not draft["prefer-ec-admin-token-signer"],
    "refresh-token-expiration": lambda draft: draft["enable-token-refresh"],
    "refresh-token-purge-days": lambda draft: draft["enable-token-refresh"],
    "pkce-code-lifetime": lambda draft: draft["enable-pkce"],
    "pass-cache-duration": lambda draft: draft["enable-pass-cache"],
}
# Where the wizard advises a narrower range than the option allows.
RANGES = {
    "token-expiration": whole(60, 604800),
    "admin-token-expiration": whole(60, 604800),
    "token-purge-days": whole(0, 365),
    "refresh-token-expiration": whole(300, 2592000),
    "refresh-token-purge-days": whole(0, 365),
}
FILES = ("db-file", "seal-key-file", "token-signing-key-file", "admin-token-signing-key-file")


class Ended(Exception):
    """Input ended before the last question."""


# == Draft =====================================================================


class Draft:
    """The settings as they stand while answers come in: what was chosen over what was resolved before."""

    def __init__(self, options):
        self.options, self.chosen, self.config = options, {}, options.config_file

    def __getitem__(self, name):
        return self.chosen.get(name, getattr(self.options, OPTION_NAMES[name].attribute))

    def overruled(self, name):
        """Return which variable or flag would overrule the config file, or nothing."""
        origin = self.options.origins.get(name, "")
        return origin if origin.startswith(("environment", "flag")) else ""

    def check(self, name, value):
        """Raise ValueError where an answer could have no effect."""
        if (origin := self.overruled(name)) and value != getattr(self.options, OPTION_NAMES[name].attribute):
            raise ValueError(
                f"{name} is set by the {origin}, which overrules the config file: keep that value, or unset it "
                "and begin again"
            )

    def choose(self, name, value):
        self.check(name, value)
        self.chosen[name] = value

    def resolve(self, derived=()):
        """Return Options of all this. Raises StartupError where they contradict each other."""
        chosen = self.chosen | dict(derived)
        values = {OPTION_NAMES[name].attribute: value for name, value in chosen.items()}
        origins = self.options.origins | {"config": self.config} | dict.fromkeys(chosen, "setup")
        settled = dataclasses.replace(self.options, origins=origins, **values)
        check_options(settled)
        return settled

    def settle(self):
        """Return the settings to write: what was chosen, and what a box needs to work at once."""
        derived: dict[str, object] = {}
        origins = self.options.origins | self.chosen
        if "enable-token-refresh" not in origins:
            derived["enable-token-refresh"] = True
        # auth-domain has no port, and a box tried out at home has no proxy that would hide it
        if (
            not self["oidc-issuer"]
            and self["auth-domain"] == "localhost"
            and self.chosen.get("auth-domain-no-ssl", True)
        ):
            derived["oidc-issuer"] = (
                f"{'https' if self['auth-ssl-cert-file'] else 'http'}://localhost:{self['auth-port']}"
            )
        if not self["admin-ssl-cert-file"] and "admin-domain-no-ssl" not in origins:
            derived["admin-domain-no-ssl"] = True
        return self.resolve({name: value for name, value in derived.items() if not self.overruled(name)})


# == Checks ====================================================================
# A check returns what an answer means, or raises ValueError with a sentence. The rules are the server's.


def ruled(rule, what, normal):
    """Return a check by one of the server's rules, which say what is wrong or nothing."""

    def check(answer):
        if wrong := rule(normal(answer)):
            raise ValueError(f"the {what} {wrong}")
        return normal(answer)

    return check


check_username = ruled(microauthd.check_username, "user name", microauthd.fold)
check_email = ruled(microauthd.check_email, "address", microauthd.fold)
check_client_id = ruled(lambda answer: answer and microauthd.check_client_id(answer), "client_id", str.strip)


def check_audience(answer):
    if not answer.isprintable() or len(answer) > 255:
        raise ValueError("the audience must be at most 255 printable characters")
    return answer.strip()


def check_scopes(answer):
    names = [microauthd.normalise(name) for name in answer.replace(",", " ").split()]
    for name in names:
        if wrong := microauthd.check_scope_name(name):
            raise ValueError(f"the scope {name!r} {wrong}")
        if name in microauthd.OIDC_SCOPES:
            raise ValueError(f"{name} is a scope of OpenID Connect, which every client has: leave it out")
    return list(dict.fromkeys(names))


def check_client_secret(answer):
    if answer and not 16 <= len(answer) <= 255:
        raise ValueError("the client's secret must have 16 to 255 characters")
    return answer


def check_passphrase(answer):
    if answer and len(answer) < 8:
        raise ValueError("it must have at least 8 characters")
    return check_printable(answer)


def check_printable(answer):
    # a line separator of any alphabet would end its line of the config file
    if not answer.isprintable():
        raise ValueError("it must not contain control characters or line separators")
    return answer


def check_files_unchanged(path):
    """Refuse a path where no file could be made."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written in {folder}")


def check_option(draft, name, asked=True):
    """Return the check of an option: its own parser, and what its neighbours ask of it.

    Somebody who is `asked` is held to the wizard's ranges and to certificates that are there; an
    answers file may run before they are.
    """
    option = OPTION_NAMES[name]

    def check(answer):
        check_printable(answer)
        try:
            value = option.parse(answer)
            if asked and name in RANGES and value != draft[name]:
                value = RANGES[name](answer)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if name in FILES:
            if not answer:
                raise ValueError(f"{name} must not be empty")
            others = [draft.config, *(draft[other] for other in FILES if other != name)]
            if os.path.abspath(value) in map(os.path.abspath, others):
                raise ValueError("config, keys and database must be different files")
            check_files_unchanged(value)
        if name == "log-file" and value:
            check_files_unchanged(value)
        if name == "db-file" and os.path.lexists(value):
            raise ValueError(f"{value} is there already")
        if name == "admin-port" and (draft["auth-ip"], draft["auth-port"]) == (draft["admin-ip"], value):
            raise ValueError("AUTH listens on this address and port already")
        if name == "argon2id-parallelism" and draft["argon2id-memory"] < 8 * value:
            raise ValueError("argon2id-memory must be at least eight times this")
        if asked and name.endswith("-ssl-cert-file") and value and not os.path.isfile(value):
            raise ValueError(f"there is no file {value}")
        draft.choose(name, value)
        return value

    return check


# == Asking ====================================================================


@contextlib.contextmanager
def echo(on):
    """Have the terminal show what is typed, or not, and then as before."""
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    changed = before[:]
    changed[3] = changed[3] | termios.ECHO if on else changed[3] & ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class Asker:
    """Questions on a terminal, without colours or any character a serial console lacks."""

    def __init__(self):
        from prompt_toolkit.output.color_depth import ColorDepth
        from prompt_toolkit.styles import Style

        os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = ColorDepth.DEPTH_1_BIT.value
        self.style = Style([(name, "noinherit") for name in ("qmark", "question", "answer", "instruction")])

    introduction = "Enter takes what stands there already."

    def say(self, text="", indent=""):
        """Print lines as they are, or one sentence folded to the width of the terminal."""
        width = min(shutil.get_terminal_size().columns, 80) - 1
        print(
            textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
            if indent
            else text, flush=True,
        )

    def read(self, question, default="", hidden=False):
        """Return one answer as it was typed. Raises KeyboardInterrupt or Ended."""
        import questionary

        kind = questionary.password if hidden else questionary.text
        try:
            answer = kind(question, default=default, style=self.style, qmark=">").unsafe_ask()
        except EOFError:
            raise Ended from None
        if answer is None:
            raise KeyboardInterrupt
        return answer

    def ask(self, question, default="", check=str, hidden=False, twice=False):
        """Ask until `check` accepts; it returns what the answer means or raises ValueError with a sentence."""
        while True:
            answer = self.read(question, default, hidden)
            try:
                answer.encode()
                meant = check(answer if hidden else answer.strip())
            except UnicodeEncodeError:
                self.say("that is not UTF-8: the locale of this terminal says otherwise", "  ")
            except (ValueError, StartupError) as error:
                self.say(str(error), "  ")
            else:
                if not twice or not answer or self.read("The same again:", hidden=True) == answer:
                    return meant
                self.say("the two are not the same", "  ")

    def secret(self, question, check=str, twice=False):
        return self.ask(question, "", check, hidden=True, twice=twice)

    def confirm(self, question, default, check=lambda answer: answer):
        """Yes or no, as words: a single key press is easily sent by a console's noise."""

        def meant(answer):
            if answer.lower() not in ("", "y", "yes", "n", "no"):
                raise ValueError("please answer yes or no")
            return check(answer.lower()[0] == "y" if answer else default)

        return self.ask(f"{question} ({'Y/n' if default else 'y/N'})", "", meant)


class LineAsker(Asker):
    """The same by whole lines, where the terminal cannot move its cursor: no escape sequence is sent."""

    introduction = 'Enter takes what stands in brackets; "" stands for an empty answer.'

    def __init__(self):
        pass

    def read(self, question, default="", hidden=False):
        with echo(not hidden):  # set before the question is there, for those who type fast
            sys.stdout.write(f"> {question} " + (f"[{default}] " if default else ""))
            sys.stdout.flush()
            line = sys.stdin.readline()
        if hidden:
            print(flush=True)
        if not line.endswith("\n"):  # the input ended; what stood before it was never sent off
            raise Ended
        line = line[:-1]
        if not hidden and line.strip() == '""':
            return ""
        return line if line or hidden else default


def asker_for_terminal():
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return LineAsker() if os.environ.get("TERM", "") in ("", "dumb", "unknown") else Asker()


def shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


# == The wizard ================================================================


def ask_option(asker, draft, name):
    option, value = OPTION_NAMES[name], draft[name]
    question = QUESTIONS.get(name, option.ask)
    if name.endswith("-ssl-cert-pass"):
        return ask_certificate_passphrase(asker, draft, name)
    if name.endswith("-signing-key-pass"):
        return ask_key_passphrase(asker, draft, name)
    if name.endswith("-domain-no-ssl"):
        side = name.partition("-")[0]
        behind_proxy = not value and draft[f"{side}-domain"] != "localhost"
        return asker.confirm(question, behind_proxy, lambda yes: draft.choose(name, not yes))
    if name.endswith("-insecure-http"):
        side = name.partition("-")[0]
        if not asker.confirm(
            question.format(ip=draft[f"{side}-ip"]), value, lambda yes: draft.choose(name, yes) or yes
        ):
            asker.say("Then it needs a certificate, or an address of loopback.", "  ")
            for again in listener(side):
                if MATTERS.get(again, lambda draft: True)(draft):
                    ask_option(asker, draft, again)
        return None
    if option.parse is boolean:
        return asker.confirm(question, value, lambda yes: draft.choose(name, yes))
    return asker.ask(question, shown(value), check_option(draft, name))


def kept(draft, name):
    return "keeps the one that is set" if draft[name] else "none"


def ask_key_passphrase(asker, draft, name):
    """A ring that is there already must open; the passphrase of a new one is typed twice."""
    path = draft[name.removesuffix("-pass") + "-file"]

    def check(answer):
        value = check_passphrase(answer) or draft[name]
        if os.path.exists(path):
            microauthd.read_ring(path, value)
        draft.check(name, value)
        return value

    draft.choose(
        name,
        asker.secret(f"{OPTION_NAMES[name].ask} (empty: {kept(draft, name)})", check, twice=not os.path.exists(path)),
    )


def ask_certificate_passphrase(asker, draft, name):
    """Then certificate, key and passphrase are complete and are opened as the server will open them."""
    side = name.partition("-")[0]
    files = (f"{side}-ssl-cert-file", f"{side}-ssl-key-file")

    def check(answer):
        value = check_printable(answer) or draft[name]
        try:
            tls_context(draft[files[0]], draft[files[1]] or None, value)
        except ValueError as error:
            asker.say(str(error), "  ")
            return False
        draft.choose(name, value)
        return True

    while not asker.secret(f"{OPTION_NAMES[name].ask} (empty: {kept(draft, name)})", check):
        # which of the three is wrong only the operator knows
        for again in files:
            ask_option(asker, draft, again)
            if not draft[again] and again == files[0]:
                return


def ask_options(asker, draft, names):
    for name in names:
        if MATTERS.get(name, lambda draft: True)(draft):
            ask_option(asker, draft, name)


def ask_database(asker, draft):
    """Where it lives and how it is encrypted; a passphrase that is set already is not asked for."""

    def encrypted(answer):
        if check_passphrase(answer):
            draft.check("db-pass", answer)
        return answer

    def unencrypted(yes):
        if yes:
            draft.choose("no-db-pass", True)
        return yes

    while True:
        asker.ask("Database file?", draft["db-file"], check_option(draft, "db-file"))
        if draft["db-pass"] or draft["no-db-pass"]:
            name = "db-pass" if draft["db-pass"] else "no-db-pass"
            return asker.say(f"{name} is set already, by {draft.options.origins.get(name, 'default')}.", "  ")
        # taken only once it was typed twice: a slip must not stay behind
        if phrase := asker.secret("Database passphrase? (empty: no encryption)", encrypted, twice=True):
            return draft.choose("db-pass", phrase)
        if asker.confirm("Really keep the database unencrypted?", False, unencrypted):
            return None


def ask_client(asker, draft):
    """Return client_id, secret, audience and scopes of the first client; the secret is empty where the server makes
    one.
    """
    client_id = asker.ask("client_id of the first service (empty: none)?", draft["oidc-client-id"], check_client_id)
    if not client_id:
        return "", "", "microauthd", []
    audience = asker.ask(
        "Its audience (the aud of its tokens)?", client_id, lambda answer: check_audience(answer) or client_id
    )
    scopes = asker.ask("Its scopes, separated by blanks (empty: none)?", "", check_scopes)
    return client_id, draft["oidc-client-secret"], audience, scopes


def ask_administrator(asker, draft):
    """Return user name, e-mail, password and TOTP seed."""
    username = asker.ask("Administrator's user name?", "admin", check_username)
    email = asker.ask("Administrator's e-mail?", "", check_email)
    rule = ruled(lambda answer: microauthd.check_new_password(draft.options, answer, username, email), "password", str)
    password = asker.secret("Administrator's password?", rule, twice=True)
    return username, email, password, ask_second_factor(asker, username)


def ask_second_factor(asker, username):
    """Offer TOTP; the seed counts only once a code has shown that an authenticator holds it. RFC 6238."""
    if not asker.confirm("A second factor (TOTP) for the administrator?", False):
        return ""
    seed = microauthd.new_totp_seed()
    asker.say(draw(microauthd.totp_uri(seed, username, "microauthd"), " ".join(re.findall(".{1,4}", seed))))

    def check(answer):
        answer = answer.replace(" ", "")
        if answer and microauthd.totp_step(seed, answer, int(time.time())) is None:
            raise ValueError("that is not the code of this moment; empty goes on without")
        return answer

    return seed if asker.ask("The code it shows?", "", check) else ""


def speaks_utf8():
    """Python takes UTF-8 even where no locale says so (PEP 538, PEP 540): a serial console without one need not."""
    words = os.environ.get
    coerced = words("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8") and words("LANG", "") in ("", "C", "POSIX")
    locale = words("LC_ALL") or ("" if coerced else words("LC_CTYPE")) or words("LANG") or ""
    return locale.lower().replace("-", "").endswith("utf8") and "utf" in (sys.stdout.encoding or "").lower()


def draw(uri, secret):
    """Draw a QR code in characters with the secret beside or below it: half blocks, or two signs a module.

    Light modules are drawn, so that it reads on a dark screen. What is too wide to read is left out.
    """
    import segno

    code = segno.make(uri, error="l", micro=False)
    size, columns = code.symbol_size(border=2)[0], shutil.get_terminal_size().columns
    words = ["Scan this, or type the", "secret into the authenticator:", *textwrap.wrap(secret, 20)]
    if speaks_utf8() and size + 2 + max(map(len, words)) < columns:
        drawing = io.StringIO()
        code.terminal(out=drawing, compact=True, border=2)
        lines = drawing.getvalue().splitlines()
        return "\n".join(
            line + "  " + word for line, word in zip(lines, ["", *words] + [""] * len(lines), strict=False)
        )
    if 2 * (size - 2) < columns:
        lines = ["".join("  " if module else "##" for module in row) for row in code.matrix_iter(border=1)]
        lines += [f"Scan this ({len(lines)} lines), or type the secret into the authenticator:", "  " + secret]
        return "\n".join(lines)
    return "Type the secret into the authenticator:\n  " + secret


def summarise(asker, draft, settled, answers, guided):
    rows = [
        ("config", settled.config_file),
        ("database", f"{settled.db_file}, {'encrypted' if settled.db_pass else 'NOT encrypted'}"),
        ("AUTH", f"{settled.auth_ip}:{settled.auth_port}, issuer {settled.auth_issuer}"),
        ("ADMIN", f"{settled.admin_ip}:{settled.admin_port}"),
        ("administrator", answers.username + (", with a second factor" if answers.totp_seed else "")),
        (
            "first client",
            f"{answers.client_id}, audience {answers.audience}, scopes {' '.join(answers.scopes) or 'none'}"
            if answers.client_id
            else "none",
        ),
    ]
    if guided:  # what differs from the defaults, the rest is as everywhere
        rows += [
            (option.name, shown(draft[option.name]))
            for option in OPTIONS
            if option.name in draft.chosen
            and not option.secret
            and option.name not in BY_HAND
            and draft[option.name] != option.default
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        asker.say(f"  {name:{width}}  {value}")


def wizard(options, flags):
    asker, draft = asker_for_terminal(), Draft(options)
    asker.say(f"microauthd {microauthd.VERSION}: first start. Nothing is written before the last question;")
    asker.say("Ctrl-C leaves everything as it is.\n" + asker.introduction)
    asker.say()
    ask_database(asker, draft)
    guided = (
        "--guided" in flags
        or ("--quick" not in flags
        and asker.confirm("Go through every setting? (no: the few that matter)", False))
    )
    asker.say()
    if guided:
        ask_options(asker, draft, BEFORE_CLIENT)
        client_id, secret, audience, scopes = ask_client(asker, draft)
        ask_options(asker, draft, AFTER_CLIENT)
        username, email, password, seed = ask_administrator(asker, draft)
    else:
        for name in ("token-signing-key", "admin-token-signing-key"):
            if os.path.exists(draft[name + "-file"]):
                # They are kept; better to learn now than after the last question that they do not open.
                microauthd.read_ring(draft[name + "-file"], draft[name + "-pass"])
        username, email, password, seed = ask_administrator(asker, draft)
        client_id, secret, audience, scopes = ask_client(asker, draft)
    answers = Answers(
        username, email, password, totp_seed=seed, client_id=client_id, client_secret=secret, audience=audience,
        scopes=scopes,
    )
    settled = draft.settle()
    asker.say()
    summarise(asker, draft, settled, answers, guided)
    asker.say()
    if not asker.confirm("Set it up?", True):
        asker.say("Nothing was written.")
        return 1
    asker.say("Making keys and database ...")
    if seed:
        import pyotp

        # The person has shown to hold the seed; by now that code may have run out. RFC 6238 §5.2
        answers.totp_code = pyotp.TOTP(seed).now()
    made = make(settled, answers)
    asker.say(f"Done. {draft.config} holds the settings and their secrets: it is yours alone.")
    if made.secret:
        asker.say(
            f"\n  client_id      {made.client_id}\n  client_secret  {made.secret}\n\nThe secret is shown this once."
        )
    with_config = "" if draft.config == "mad.conf" else f" --config {draft.config}"
    asker.say("\nTry next:")
    for command in (
        f"microauthd serve{with_config}", "mad session login",
        f"mad token get --client-id {made.client_id or 'CLIENT'}",
    ):
        asker.say(f"  {command}")
    return 0


def make(settled, answers):
    """Set up; what the disk refuses is a sentence, not a traceback."""
    try:
        return recovery.set_up(settled, answers)
    except OSError as error:
        what = f"{error.filename or 'the disk'}: {error.strerror or error}"
    except sqlcipher3.Error as error:
        what = f"the database {settled.db_file} cannot be made: {error}"
    raise StartupError(f"{ended(settled.config_file)} {what}")


def ended(config):
    """Say what a set-up left that did not return: after its commit the journal stays, and the next run completes it."""
    if os.path.exists(journal_of(config)):
        return "The set-up was being put in place: run microauthd again, and it is completed."
    return "Nothing was written."


# == Unattended ================================================================


def first_line(path, what):
    """Return the first line of a file that holds a secret. Raises ValueError."""
    if not isinstance(path, str):
        raise ValueError(f"{what} must be the name of a file, as a string")
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{what}: {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        ) from None
    if not line:
        raise ValueError(f"{what}: the first line of {path} is empty")
    return line


def word_of(option, value):
    """Return a value of TOML as the text that the option's parser takes."""
    if isinstance(value, bool):
        if option.parse is not boolean:
            raise ValueError(f"{option.name} is not a yes or no")
        return "true" if value else "false"
    if isinstance(value, (str, int)):
        return str(value)
    if option.parse is networks and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    raise ValueError(f"{option.name} must be a string, a whole number, or true or false")


class AnswersFile:
    """An answers file, read once; what is wrong with it is collected, a sentence a problem."""

    TABLES = {  # noqa: RUF012 - never changed
        "admin": ("username", "email", "password", "password_file", "totp"),
        "client": ("client_id", "audience", "scopes", "secret_file"),
    }

    def __init__(self, path):
        self.path, self.problems, self.content = path, [], ""
        try:
            with open(path, "rb") as file:
                self.private = not stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
                self.content = file.read().decode()
            self.document = tomllib.loads(self.content)
        except OSError as error:
            raise StartupError(f"the answers file {path!r} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise StartupError(f"the answers file {path} is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            message, _, at = str(error).partition(" (at ")
            line = re.match("line ([0-9]+)", at)
            raise StartupError(f"{path}:{line[1] if line else len(self.content.splitlines())}: {message}") from None

    def at(self, key, table=""):
        """Return "file:line" of a key, or "file" where its line is written in an unusual way."""
        inside = ""
        for number, line in enumerate(self.content.splitlines(), 1):
            if header := re.match(r"\s*\[\s*\"?([\w-]+)\"?\s*\]", line):
                inside = header[1]
                if table == "" and inside == key:
                    return f"{self.path}:{number}"
            elif inside == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                return f"{self.path}:{number}"
        return self.path

    def wrong(self, sentence, key="", table=""):
        self.problems.append(f"{self.at(key, table) if key else self.path}: {sentence}")

    def try_(self, key, table, check, *words):
        """Return what a check makes of it; note what it says is wrong."""
        try:
            return check(*words)
        except (ValueError, StartupError) as error:
            self.wrong(str(error), key, table)
            return None

    def guard_inline(self, key, table):
        if not self.private:
            self.wrong(
                f"it holds the secret {key} and can be read by others: chmod 600 {self.path}, or name a file that "
                "holds the secret",
                key, table,
            )

    def table(self, name):
        table = self.document.get(name, {})
        if not isinstance(table, dict):
            self.wrong(f"{name} must be a table, [{name}]", name)
            return {}
        for key in table.keys() - set(self.TABLES[name]):
            self.wrong(f"unknown key {key!r} in [{name}]; it knows {', '.join(self.TABLES[name])}", key, name)
        return table

    def strings(self, table, name, keys):
        """Return the strings of a table by key; anything else is noted and left out."""
        found = {}
        for key in keys:
            if key in table and not isinstance(table[key], str):
                self.wrong(f"{key} in [{name}] must be a string", key, name)
            elif key in table:
                found[key] = table[key]
        return found

    def read_options(self, draft):
        """Take the options, of the top of the file and of [options], into the draft."""
        given = [("", key, value) for key, value in self.document.items() if key not in ("options", *self.TABLES)]
        table = self.document.get("options", {})
        if not isinstance(table, dict):
            self.wrong("options must be a table, [options]", "options")
            table = {}
        seen: dict[str, tuple] = {}
        for where, key, value in given + [("options", key, value) for key, value in table.items()]:
            name = "db-pass" if key == "db-pass-file" else OPTION_NAMES[key].name if key in OPTION_NAMES else ""
            if not name:
                what = "table" if isinstance(value, dict) else "option"
                self.wrong(f"unknown {what} {key!r}{did_you_mean(key)}", key, where)
                continue
            if name in seen:
                self.wrong(f"{name} is set twice, by {seen[name]} and {key}", key, where)
                continue
            seen[name] = key
            if OPTION_NAMES[name].secret and key != "db-pass-file":
                self.guard_inline(key, where)

            def take(name=name, key=key, value=value):
                word = first_line(value, key) if key == "db-pass-file" else word_of(OPTION_NAMES[name], value)
                if name == "db-pass":
                    try:
                        check_passphrase(word)
                    except ValueError as error:
                        raise ValueError(str(error).replace("it", "db-pass", 1)) from None
                check_option(draft, name, asked=False)(word)

            self.try_(key, where, take)

    def read_admin(self, draft, flags, values):
        """Return user name, e-mail and password of the administrator."""
        admin = self.table("admin")
        words = self.strings(admin, "admin", ("username", "email", "password"))
        for name in ("username", "email"):
            if name not in admin:
                self.wrong(f"[admin] needs {name}", "admin")
        username = self.try_("username", "admin", check_username, words["username"]) if "username" in words else ""
        email = self.try_("email", "admin", check_email, words["email"]) if "email" in words else ""
        if admin.get("totp", False) is not False:
            self.wrong(
                "totp can only be false: a second factor is confirmed by its owner, so it is turned on after the "
                "set-up",
                "totp", "admin",
            )
        if "--admin-password-stdin" in flags:
            key, password = "", sys.stdin.readline().rstrip("\r\n")
        elif "--admin-password-file" in values:
            key, password = "", self.try_("", "", first_line, values["--admin-password-file"], "--admin-password-file")
        elif "password_file" in admin:
            key, password = (
                "password_file",
                self.try_("password_file", "admin", first_line, admin["password_file"], "password_file"),
            )
        elif "password" in words:
            key, password = "password", words["password"]
            self.guard_inline("password", "admin")
        else:
            self.wrong(
                "the administrator needs a password: password_file in [admin], --admin-password-file or "
                "--admin-password-stdin",
                "admin",
            )
            return username, email, None
        if password is not None:
            rule = ruled(
                lambda answer: microauthd.check_new_password(draft.options, answer, username or "", email or ""),
                "password", str,
            )
            password = self.try_(key, "admin", rule, password)
        return username, email, password

    def read_client(self, draft):
        """Return client_id, secret, audience and scopes; without [client] and oidc-client-id there is no client."""
        client = self.table("client")
        words = self.strings(client, "client", ("client_id", "audience"))
        named = "oidc-client-id" in draft.chosen or "oidc-client-id" in draft.options.origins
        client_id = words.get("client_id", draft["oidc-client-id"] if client or named else "")
        if "client_id" in words and not client_id:
            self.wrong("client_id must not be empty: leave [client] out to make no client", "client_id", "client")
        self.try_("client_id", "client", check_client_id, client_id)
        audience = self.try_("audience", "client", check_audience, words.get("audience", "")) or client_id
        scopes = client.get("scopes", [])
        if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
            self.wrong("scopes in [client] must be a list of strings", "scopes", "client")
            scopes = []
        for scope in scopes:
            if len(scope.split()) != 1:
                self.wrong(
                    f"the scope {scope!r} must be one word: write a list, one scope an entry", "scopes", "client"
                )
        scopes = self.try_("scopes", "client", check_scopes, " ".join(scopes))
        secret = draft["oidc-client-secret"]
        if "secret_file" in client:
            secret = self.try_("secret_file", "client", first_line, client["secret_file"], "secret_file")
        self.try_("secret_file", "client", check_client_secret, secret or "")
        return client_id.strip(), secret or "", audience or "microauthd", scopes or []


def unattended(options, flags, values):
    file, draft = AnswersFile(values["--answers"]), Draft(options)
    file.read_options(draft)
    username, email, password = file.read_admin(draft, flags, values)
    client_id, secret, audience, scopes = file.read_client(draft)
    settled = None
    if not file.problems:
        settled = file.try_("", "", draft.settle)
    for problem in file.problems:
        print(f"microauthd: {problem}", file=sys.stderr)
    if file.problems:
        return 1
    made = make(
        settled,
        Answers(username, email, password, client_id=client_id, client_secret=secret, audience=audience, scopes=scopes),
    )
    print(f"administrator={username}")
    if made.client_id:
        print(f"client_id={made.client_id}")
    if made.secret:
        print(f"client_secret={made.secret}")
    return 0


def check_usage(flags, values):
    if "--answers" not in values:
        for name in ("--admin-password-stdin", "--admin-password-file"):
            if name in flags or name in values:
                raise StartupError(f"{name} goes with --answers FILE; the wizard asks for the password itself")
    elif "--quick" in flags or "--guided" in flags:
        raise StartupError("--quick and --guided are ways to be asked; with --answers FILE nothing is asked")
    if "--quick" in flags and "--guided" in flags:
        raise StartupError("--quick and --guided contradict each other")
    if "--admin-password-stdin" in flags and "--admin-password-file" in values:
        raise StartupError("--admin-password-stdin and --admin-password-file contradict each other")


def run(options, flags, values) -> int:
    """Set up by questions, or by --answers.

    Returns the exit status; raises StartupError or Problem, and then nothing was made.
    """
    if os.path.lexists(options.db_file):
        raise StartupError(f"this is set up already: the database {options.db_file} is there, and is left as it is")
    check_usage(flags, values)
    if "--answers" in values:
        return unattended(options, flags, values)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise StartupError(
            "set-up asks its questions on a terminal, and here is none: use --answers FILE, or --demo for a trial"
        )
    try:
        # Between two questions the terminal would show a password that is typed or pasted ahead.
        with echo(False):
            return wizard(options, flags)
    except KeyboardInterrupt:
        config = options.config_file
        print("\n" + ended(config))
        return 130
    except Ended:
        print()
        raise StartupError("the input ended before the last question; nothing was written") from None
