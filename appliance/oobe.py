"""The wizard of the first start: asks what a set-up needs, or reads it from an answers file.

It decides nothing: every answer goes through the parser of its option or the server's own checks,
and one call of microauthd.set_up() makes everything or nothing. Until that call nothing is written.
"""

import os
import re
import stat
import sys
import tomllib

# Serial consoles cannot say where their cursor is; prompt_toolkit need not ask.
os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")

import microauthd  # noqa: E402
from microauthd import OPTION_NAMES, OPTIONS, Answers, Options, Refusal  # noqa: E402

# Asked by the quick path itself, in words of its own, or by the part about the first client.
QUICK = ("db-file", "db-pass", "oidc-client-id")
# Asked only when another answer makes them matter: option -> (option it hangs on, the answer that asks it).
DEPENDENTS = {
    "auth-ssl-cert-pass": ("auth-ssl-cert-file", bool),
    "admin-ssl-cert-pass": ("admin-ssl-cert-file", bool),
    "audit-log-retention-days": ("enable-audit-logging", bool),
    "admin-token-signing-key-length-rsa": ("prefer-ec-admin-token-signer", lambda answer: not answer),
    "refresh-token-expiration": ("enable-token-refresh", bool),
    "refresh-token-purge-days": ("enable-token-refresh", bool),
    "pkce-code-lifetime": ("enable-pkce", bool),
    "pass-cache-duration": ("enable-pass-cache", bool),
}


class Ended(Exception):
    """Input ended before the last question."""


# == Asking ====================================================================


class Asker:
    """Questions on a terminal, without colours or any character a serial console lacks."""

    def __init__(self):
        from prompt_toolkit.output.color_depth import ColorDepth
        from prompt_toolkit.styles import Style

        os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = ColorDepth.DEPTH_1_BIT.value
        self.style = Style([])

    def say(self, text=""):
        print(text, flush=True)

    def put(self, make, *words, **options):
        question = make(*words, style=self.style, qmark=">", **options)
        try:
            answer = question.unsafe_ask()
        except EOFError:
            raise Ended from None
        if answer is None:
            raise KeyboardInterrupt
        return answer

    def text(self, question, default="", check=lambda answer: None):
        """Ask until `check` accepts; it returns a parsed answer or raises ValueError with a sentence."""
        import questionary

        while True:
            answer = self.put(questionary.text, question, default=default).strip()
            try:
                return check(answer)
            except ValueError as error:
                self.say(f"  {error}")

    def secret(self, question, check=lambda answer: answer, twice=False):
        import questionary

        while True:
            answer = self.put(questionary.password, question)
            try:
                checked = check(answer)
            except ValueError as error:
                self.say(f"  {error}")
                continue
            if twice and answer and self.put(questionary.password, "The same again:") != answer:
                self.say("  the two are not the same")
                continue
            return checked

    def confirm(self, question, default=True):
        """Yes or no, as words: a single key press is easily sent by a console's noise."""

        def check(answer):
            if answer.lower() in ("", "y", "yes", "n", "no"):
                return default if not answer else answer.lower()[0] == "y"
            raise ValueError("please answer yes or no")

        return self.text(f"{question} ({'Y/n' if default else 'y/N'})", check=check)


def parsed(option):
    """Return the check of an option's parser, its sentence made to stand alone."""

    def check(answer):
        try:
            return option.parse(answer)
        except ValueError as error:
            raise ValueError(f"{option.name} {error}") from None

    return check


def shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


def ask_option(asker, option, value):
    if option.secret:
        return asker.secret(f"{option.ask} (empty: none)")
    if option.parse is microauthd.boolean:
        return asker.confirm(option.ask, value)
    return asker.text(option.ask, shown(value), parsed(option))


# == The wizard ================================================================


def check_username(answer):
    name = microauthd.fold(answer)
    if wrong := microauthd.check_username(name):
        raise ValueError(f"the user name {wrong}")
    return name


def check_email(answer):
    if wrong := microauthd.check_email(microauthd.fold(answer)):
        raise ValueError(f"it {wrong}")
    return microauthd.fold(answer)


def check_client_id(answer):
    if answer and (wrong := microauthd.check_client_id(answer)):
        raise ValueError(f"the client_id {wrong}")
    return answer


def check_scopes(answer):
    names = [microauthd.normalise(name) for name in answer.replace(",", " ").split()]
    for name in names:
        if wrong := microauthd.check_scope_name(name):
            raise ValueError(f"{name!r} {wrong}")
    return names


def ask_everything(asker, options, guided):
    """Return (chosen option values by name, Answers)."""
    chosen = {}

    def ask(name):
        chosen[name] = ask_option(asker, OPTION_NAMES[name], getattr(options, OPTION_NAMES[name].attribute))

    def check_database(answer):
        if not answer:
            raise ValueError("the database needs a name")
        if os.path.exists(answer):
            raise ValueError(f"{answer} is there already")
        return answer

    chosen["db-file"] = asker.text("Database file?", options.db_file, check_database)
    if not options.db_pass:
        while True:
            phrase = asker.secret("Database passphrase? (empty: no encryption)", check_passphrase, twice=True)
            if phrase:
                chosen["db-pass"] = phrase
                break
            if asker.confirm("Really keep the database unencrypted?", default=False):
                chosen["no-db-pass"] = True
                break
    if guided:
        for option in OPTIONS:
            if not option.ask or option.name in QUICK or option.name in chosen:
                continue
            if option.name in DEPENDENTS:
                parent, matters = DEPENDENTS[option.name]
                if not matters(chosen.get(parent, getattr(options, OPTION_NAMES[parent].attribute))):
                    continue  # keeps its default, for the day the feature is turned on
            ask(option.name)
    asker.say()
    username = asker.text("Administrator's user name?", "admin", check_username)
    email = asker.text("Administrator's e-mail?", check=check_email)

    def check_password(answer):
        if wrong := microauthd.check_new_password(options, answer, username, email):
            raise ValueError(f"it {wrong}")
        return answer

    password = asker.secret("Administrator's password?", check_password, twice=True)
    seed, code = ask_second_factor(asker, username)
    asker.say()
    client_id = asker.text("client_id of the first service (empty: none)?", options.oidc_client_id, check_client_id)
    audience, scopes = "microauthd", []
    if client_id:
        audience = asker.text("Its audience (the `aud` of its tokens)?", client_id, lambda answer: answer or client_id)
        scopes = asker.text("Its scopes, separated by blanks (empty: none)?", "", check_scopes)
    return chosen, Answers(username, email, password, seed, code, client_id, options.oidc_client_secret, audience, scopes)


def check_passphrase(answer):
    if answer and len(answer) < 8:
        raise ValueError("it must have at least 8 characters")
    if any(ord(letter) < 32 for letter in answer):
        raise ValueError("it must not contain control characters")
    return answer


def ask_second_factor(asker, username):
    """Offer TOTP; the seed counts only once a code has shown that an authenticator holds it."""
    if not asker.confirm("A second factor (TOTP) for the administrator?", default=False):
        return "", ""
    import time

    seed = microauthd.new_totp_seed()
    asker.say(draw(microauthd.totp_uri(seed, username, "microauthd")))
    asker.say("Scan it, or type the secret into the authenticator:")
    asker.say("  " + " ".join(re.findall(".{1,4}", seed)))

    def check(answer):
        if answer and microauthd.totp_step(seed, answer.replace(" ", ""), int(time.time())) is None:
            raise ValueError("that is not the code of this moment; empty goes on without a second factor")
        return answer.replace(" ", "")

    code = asker.text("The code it shows?", check=check)
    return (seed, code) if code else ("", "")


def draw(uri):
    """Draw a QR code in characters: half blocks where the terminal has them, else two signs a module."""
    import io

    import segno

    code = segno.make(uri, error="l", micro=False)
    if "utf" in (sys.stdout.encoding or "").lower() and os.environ.get("TERM") not in ("dumb", "vt100"):
        drawing = io.StringIO()
        upper = {(0, 0): "\u2588", (0, 1): "\u2580", (1, 0): "\u2584", (1, 1): " "}
        rows = [list(row) for row in code.matrix_iter(border=2)]
        rows += [[0] * len(rows[0])] * (len(rows) % 2)
        for top, bottom in zip(rows[::2], rows[1::2], strict=True):
            drawing.write("".join(upper[bool(a), bool(b)] for a, b in zip(top, bottom, strict=True)) + "\n")
        return drawing.getvalue()
    # Light modules are drawn, so that it reads on a dark screen.
    return "\n".join("".join("  " if module else "##" for module in row) for row in code.matrix_iter(border=1))


def settle(options, chosen, quick):
    """Return the settings to write: what was chosen, and what a box needs to work at once."""
    values = {option.attribute: getattr(options, option.attribute) for option in OPTIONS}
    values |= {OPTION_NAMES[name].attribute: value for name, value in chosen.items()}
    derived = {}
    if quick and "enable-token-refresh" not in options.origins:
        derived["enable-token-refresh"] = True
    if not values["oidc_issuer"] and values["auth_domain"] == "localhost" and "auth-domain" not in options.origins:
        scheme = "https" if values["auth_ssl_cert_file"] else "http"
        derived["oidc-issuer"] = f"{scheme}://localhost:{values['auth_port']}"
    if not values["admin_ssl_cert_file"] and "admin-domain-no-ssl" not in options.origins:
        derived["admin-domain-no-ssl"] = True
    values |= {OPTION_NAMES[name].attribute: value for name, value in derived.items()}
    origins = options.origins | {name: "setup" for name in (*chosen, *derived)}
    settled = Options(origins, **values)
    microauthd.check_options(settled)
    return settled


def wizard(options, own):
    asker = Asker()
    asker.say(f"microauthd {microauthd.VERSION}: first start. Nothing is written before the last question;")
    asker.say("Ctrl-C leaves everything as it is. Enter takes what stands there already.")
    asker.say()
    guided = "--guided" in own or "--quick" not in own and asker.confirm("Go through every setting? (no: the few that matter)", default=False)
    chosen, answers = ask_everything(asker, options, guided)
    settled = settle(options, chosen, quick=not guided)
    asker.say()
    config = settled.origins.get("config", "mad.conf")
    for name, value in (
        ("config", config), ("database", f"{settled.db_file}, {'encrypted' if settled.db_pass else 'NOT encrypted'}"),
        ("AUTH", f"{settled.auth_ip}:{settled.auth_port}, issuer {settled.auth_issuer}"), ("ADMIN", f"{settled.admin_ip}:{settled.admin_port}"),
        ("administrator", answers.username + (", with a second factor" if answers.totp_seed else "")), ("first client", answers.client_id or "none"),
    ):
        asker.say(f"  {name:14} {value}")
    asker.say()
    if not asker.confirm("Set it up?"):
        asker.say("Nothing was written.")
        return 1
    asker.say("making keys and database ...")
    made = microauthd.set_up(settled, answers)
    asker.say(f"Done. {config} holds the settings and their secrets: it is yours alone.")
    if made.secret:
        asker.say(f"\n  client_id      {made.client_id}\n  client_secret  {made.secret}\n\nThe secret is shown this once.")
    asker.say("\nTry next:")
    for command in ("microauthd serve", "mad session login", f"mad token get --client-id {made.client_id or 'CLIENT'}"):
        asker.say(f"  {command}")
    return 0


# == Unattended ================================================================


def read_secret_file(path, what):
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{what}: {path} cannot be read: {error}") from None


def table_of(document, name, known, path):
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise Refusal(f"{path}: [{name}] must be a table")
    if unknown := table.keys() - known:
        raise Refusal(f"{path}: unknown key {sorted(unknown)[0]!r} in [{name}]; it knows {', '.join(sorted(known))}")
    return table


def read_answers(path, options, own, values):
    """Return (chosen option values, Answers) of an answers file. Raises Refusal naming what is wrong."""
    try:
        with open(path, "rb") as file:
            private = not stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
            document = tomllib.load(file)
    except OSError as error:
        raise Refusal(f"the answers file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: {error}") from None
    if unknown := document.keys() - {"options", "admin", "client"}:
        raise Refusal(f"{path}: unknown table {sorted(unknown)[0]!r}; it knows [options], [admin] and [client]")

    def inline(name):
        if not private:
            raise Refusal(f"{path} holds the secret {name} and can be read by others: chmod 600 it, or name a file that holds the secret")

    chosen = {}
    for key, value in document.get("options", {}).items():
        if key == "db-pass-file":
            chosen["db-pass"] = read_secret_file(value, key)
            continue
        if key not in OPTION_NAMES:
            raise Refusal(f"{path}: unknown option {key!r}{microauthd.did_you_mean(key)}")
        option = OPTION_NAMES[key]
        if option.secret:
            inline(key)
        word = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            chosen[option.name] = option.parse(word)
        except ValueError as error:
            raise Refusal(f"{path}: {key} {error}") from None
    admin = table_of(document, "admin", {"username", "email", "password", "password_file"}, path)
    if "--admin-password-stdin" in own:
        password = sys.stdin.readline().rstrip("\r\n")
    elif "--admin-password-file" in values:
        password = read_secret_file(values["--admin-password-file"], "--admin-password-file")
    elif "password_file" in admin:
        password = read_secret_file(admin["password_file"], "password_file")
    elif "password" in admin:
        inline("password")
        password = admin["password"]
    else:
        raise Refusal(f"{path}: the administrator needs a password: password_file in [admin], --admin-password-file or --admin-password-stdin")
    for name in ("username", "email"):
        if not isinstance(admin.get(name), str):
            raise Refusal(f"{path}: [admin] needs {name}")
    client = table_of(document, "client", {"client_id", "audience", "scopes", "secret_file"}, path)
    secret = read_secret_file(client["secret_file"], "secret_file") if "secret_file" in client else options.oidc_client_secret
    client_id = client.get("client_id", "")
    scopes = client.get("scopes", [])
    audience = client.get("audience", client_id) or "microauthd"
    if not isinstance(audience, str) or not isinstance(client_id, str) or not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise Refusal(f"{path}: in [client], client_id and audience are strings and scopes a list of strings")
    answers = Answers(admin["username"], admin["email"], password, client_id=client_id, client_secret=secret, audience=audience, scopes=scopes)
    return chosen, answers


def unattended(options, own, values):
    chosen, answers = read_answers(values["--answers"], options, own, values)
    made = microauthd.set_up(settle(options, chosen, quick=True), answers)
    print(f"administrator={microauthd.fold(answers.username)}")
    if made.client_id:
        print(f"client_id={made.client_id}")
    if made.secret:
        print(f"client_secret={made.secret}")
    return 0


def run(options, flags, own, values) -> int:
    """Set up by questions, or by --answers. Returns the exit status; raises Refusal or Problem, and then nothing was made."""
    if os.path.exists(options.db_file):
        raise Refusal(f"this is set up already: the database {options.db_file} is there, and is left as it is")
    if "--answers" in values:
        return unattended(options, own, values)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Refusal("set-up asks its questions on a terminal, and here is none: use --answers FILE, or --demo for a trial")
    try:
        return wizard(options, own)
    except KeyboardInterrupt:
        print("\nNothing was written.")
        return 130
    except Ended:
        raise Refusal("the input ended before the last question; nothing was written") from None
