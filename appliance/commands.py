"""The command line: main() and one function a command."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import socket
import sys
import textwrap
from collections.abc import Callable, Mapping

import msgspec
import sqlcipher3

from appliance.base import StartupError
from appliance.base.files import check_folder, existing_folder, open_owned, read_stdin_secret, warn
from appliance.base.settings import (
    OPTIONS, Options, config_path, describe_options, load_options, parse_flags,
    setup_variables, take_secrets,
)
from appliance.base.database import SQLITE_MAGIC, Unavailable, derive_key, read_database_key
from appliance.base.store import MIGRATIONS, Store
from appliance.base.hashing import Hasher
from appliance.base.keys import make_key
from appliance.base.objects import iso
from microauthd import (
    AT_JWT, HERE, Idp, KeyRing, LOCAL, PUBLIC, Problem, VERSION, as_problem, common_passwords, fold, new_totp_seed,
    totp_time_step, totp_uri,
)
from appliance.processes import START_SECONDS, ask_ready, change_user, check_limits, find_server, serve
from appliance.authority import describe_authority, describe_ports, keep_certificate, replace_authority
from appliance.status import TRIAL_SUFFIX
from appliance.recovery import (
    accept_clock, accept_log, back_up, describe_keys, describe_log, describe_status, factory_reset, hold_setup,
    journal_place, open_idp, recover_admin, recover_setup, require_owner, restore, revoke_key, rotate_keys,
    set_up_demo,
)
from appliance.help import show_page, show_topics, topics, write

# == Command line ==============================================================

class UsageError(Exception):
    """The command line is wrong. Without words: the command's usage says what it should be."""


class CommandLine(msgspec.Struct):
    """What was typed after the name of a command."""

    settings: dict  # what parse_flags() found: options of the server
    args: list[str]  # words that are no flags
    flags: list[str]  # the command's own flags
    values: dict[str, str]  # its own flags that take a value
    environ: dict[str, str] = {}  # the environment, with the secrets that have left it since


class Flag(msgspec.Struct, frozen=True):
    """A flag that one command alone has. `value` stands for its value; without one it takes none."""

    name: str
    help: str
    value: str = ""


class Command(msgspec.Struct, frozen=True):
    """A command: how it is typed, what its help says, and what runs it."""

    title: str  # as the list of commands has it: its name, and what follows it most often
    summary: str  # one line of that list
    run: Callable[[Options, CommandLine], int] | None = None  # None: it works without settings
    usage: tuple[str, ...] = ("",)  # what may follow the name
    description: str = ""
    flags: tuple[Flag, ...] = ()
    examples: tuple[str, ...] = ()
    args: int = 0  # how many words that are no flags
    statuses: str = ""  # what its exit statuses mean, where they are others than STATUSES says
    failed: int = 1  # the exit status of a refusal
    is_local: bool = False  # works on the files of a box that is set up, beside a running server if need be

    @property
    def name(self) -> str:
        return self.title.split(" ")[0]


def selftest() -> int:
    """Use every part that a wrong machine or a damaged file could break, and print what works."""
    import tempfile

    import segno

    options = Options(db_pass="selftest")

    def database():
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "selftest.db3")
            Store.make(path, derive_key("selftest", os.urandom(16)), 0).close()
            store = Store(path, read_database_key(path, "selftest", False))
            store.open()
            (cipher,) = store.connection.execute("PRAGMA cipher_version").fetchone()
            store.close()
            return f"SQLCipher {cipher}, SQLite {sqlcipher3.sqlite_version}"

    def argon2():
        hasher = Hasher(options)
        if not hasher.verify(hasher.hash("right"), "right") or hasher.verify(hasher.hash("right"), "wrong"):
            raise ValueError("wrong verdict")
        return hasher.parameters().strip("$")

    def tokens():
        claims = {
            "iss": "selftest", "sub": "selftest", "aud": "selftest", "client_id": "selftest", "iat": 1, "exp": 2,
            "jti": "0" * 32, "mad": "auth", "token_use": "access",
        }
        for alg in ("ES256", "RS256"):
            ring = KeyRing([make_key(alg, 2048, 0)])
            signed = ring.mint(ring.access, AT_JWT, claims)
            if ring.verify(signed, AT_JWT) != claims:
                raise ValueError("wrong verdict")
        return "ES256, RS256"

    def second_factor():
        seed = new_totp_seed()
        import pyotp

        if totp_time_step(seed, pyotp.TOTP(seed).at(1000), 1000) is None:
            raise ValueError("wrong verdict")
        segno.make(totp_uri(seed, "selftest", "microauthd"))
        return "TOTP, QR"

    def files():
        if common_passwords().count(b"\n") < 100 or not PUBLIC.is_dir():
            raise ValueError("bundled files are missing")
        return str(HERE)

    failed = 0
    for check in (database, argon2, tokens, second_factor, files):
        try:
            print(f"ok    {check.__name__:14} {check()}")
        except Exception as error:
            failed = 1
            print(f"FAIL  {check.__name__:14} {error!r}")
    return failed


def run_options(options: Options, line: CommandLine) -> int:
    described = describe_options(options)
    if "--json" in line.flags:
        print(json.dumps(described, indent=1))
        return 0
    width = max(map(len, described))
    for name, row in described.items():
        value = (
            ", ".join(row["value"])
            if isinstance(row["value"], list)
            else str(row["value"]).lower()
            if isinstance(row["value"], bool)
            else row["value"]
        )
        print(f"{name:{width}}  {value}  ({row['origin']})")
    return 0


def run_setup(options: Options, line: CommandLine) -> int:
    from appliance import oobe

    check_limits()  # a box that is set up here could not serve

    if "--demo" in line.flags:
        set_up_demo(options, oobe.set_up)
        return 0
    if oobe.is_for_web(options, line.flags, line.values):
        from appliance import claim  # late: hardly any box is claimed

        return claim.run(options, line.flags, line.values)
    return oobe.run(options, line.flags, line.values)


def run_backup(options: Options, line: CommandLine) -> int:
    done = back_up(options, line.args[0], "--force" in line.flags, "--without-keys" in line.flags)
    print(
        f"{line.args[0]}: {done['bytes']} bytes, {done['users']} users, {done['clients']} clients, up to "
        f"{iso(done['newest_at']) or 'the beginning'}, read through after writing"
    )
    if "--without-keys" in line.flags:
        print(
            "microauthd: without keys: token.pem, admin_token.pem, seal.key and mad.conf must be kept elsewhere",
            file=sys.stderr,
        )
    return 0


def ask_secret(question: str) -> str:
    """Ask on the terminal, without showing what is typed. Raises StartupError."""
    import getpass

    try:
        answer = getpass.getpass(question)
        answer.encode()
    except UnicodeError:
        raise StartupError("what was typed is not valid UTF-8: the locale of this terminal says otherwise") from None
    except EOFError:
        raise StartupError("the input ended; nothing was done") from None
    return answer


def run_restore(options: Options, line: CommandLine) -> int:
    try:
        with open(line.args[0], "rb") as file:
            is_plain = file.read(16) == SQLITE_MAGIC
    except OSError as error:
        raise StartupError(f"the backup {line.args[0]} cannot be read: {error.strerror}") from None
    if not (options.db_pass or options.db_key_file or options.no_db_pass or is_plain):
        if not sys.stdin.isatty():
            raise StartupError(
                "the passphrase of the backup is needed, in MAD_DB_PASS or on a terminal, or its key by --db-key-file"
            )
        options = dataclasses.replace(options, db_pass=ask_secret("passphrase of the backup: "))
    done = restore(options, line.args[0])
    print(
        f"restored what {line.args[0]} holds, up to {iso(done['newest_at']) or 'the beginning'}; nothing that was "
        "issued before is good any more"
    )
    if not done["knows_revoked"]:
        print(
            "microauthd: warning: the database that was here could not be read: a key revoked since the backup "
            "must be revoked again",
            file=sys.stderr,
        )
    return 0


def run_factory_reset(options: Options, line: CommandLine) -> int:
    name = socket.gethostname()
    if "--yes" not in line.flags:
        if not sys.stdin.isatty():
            raise StartupError("factory-reset destroys every account and key: --yes says that this is meant")
        if (
            input(
                f"This destroys every account and key of {options.auth_issuer}. Type the name of this machine, "
                f"{name}, to go on: "
            ).strip()
            != name
        ):
            print("microauthd: nothing was done", file=sys.stderr)
            return 1
    for path in factory_reset(options):
        print(f"overwritten and removed: {path}")
    return 0


def run_keys(options: Options, line: CommandLine) -> int:
    ring, alg = line.values.get("--ring", ""), line.values.get("--alg", "")
    if (
        line.args[0] not in ("list", "rotate", "revoke")
        or ring not in ("", "auth", "admin")
        or alg not in ("", "ES256", "RS256")
        or (line.args[0] == "revoke") != bool(line.values.get("--kid"))
    ):
        raise UsageError
    if line.args[0] == "rotate":
        for kid in rotate_keys(options, [ring] if ring else ["auth", "admin"], [alg] if alg else ()):
            print(kid)
        print(f"microauthd: published now, signing in {options.key_overlap} seconds", file=sys.stderr)
    elif line.args[0] == "revoke":
        print(
            f"revoked, on {revoke_key(options, line.values['--kid'])}: no token it signed is good any more; caches "
            "forget it within 300 seconds"
        )
    elif "--json" in line.flags:
        print(json.dumps(describe_keys(options), indent=1))
    else:
        for row in describe_keys(options):
            print(f"{row['port']:5}  {row['alg']}  {row['state']:7}  {iso(row['since']) or 'always':20}  {row['kid']}")
    return 0


def show_certificates(options: Options, idp: Idp, as_json: bool):
    """Print what the ports serve, and the CA of the box. Names that it lacks are named with the remedy."""
    ports, (ca, missing) = describe_ports(options), describe_authority(options, idp.store)
    if as_json:
        print(json.dumps(msgspec.to_builtins({"ports": ports, "ca": ca, "missing": missing}), indent=1))
        return
    if not ports:
        print("both ports speak plain HTTP; tls = self in mad.conf makes a certificate")
    for shown in [*ports, *([ca] if ca else [])]:
        print(f"{shown.use:7} {shown.file}")
        if shown.problem:
            print(f"        {shown.problem}")
        if shown.sha256:
            print(f"        SHA-256 {shown.sha256}\n        ends {iso(shown.not_after)}")
            print(f"        {'may sign for' if shown is ca else 'for'} {', '.join(shown.names)}")
    if missing:
        print(
            f"microauthd: {', '.join(missing)}: the box has this since its CA was made, which may not sign for it. "
            "microauthd certificate new makes another CA; every client must then trust that",
            file=sys.stderr,
        )


def run_certificate(options: Options, line: CommandLine) -> int:
    action = line.args[0]
    if action not in ("show", "renew", "new") or ("--json" in line.flags and action != "show"):
        raise UsageError
    idp = open_idp(options)
    try:
        if action != "show" and options.tls != "self":
            raise StartupError("the box makes its own certificate only with tls = self")
        if action == "new":
            replace_authority(idp, LOCAL.acting_as("machine"))
        elif action == "renew":
            keep_certificate(idp, LOCAL.acting_as("machine"), renew=True)
        show_certificates(options, idp, "--json" in line.flags)
    finally:
        idp.store.close()
    if action != "show":
        print("microauthd: a server that runs here serves it within ten seconds", file=sys.stderr)
    return 0


def run_clock(options: Options, line: CommandLine) -> int:
    if line.args[0] != "accept":
        raise UsageError
    done = accept_clock(options)
    print(f"it is {iso(done['now'])}; {done['ended']} things of later times are ended")
    return 0


def run_log(options: Options, line: CommandLine) -> int:
    if line.args[0] == "status":
        damage = describe_log(options)
        print(damage or "the write-ahead log is whole, as far as anything is known that is not settled")
        return 1 if damage else 0
    if line.args[0] != "accept":
        raise UsageError
    print("settled" if accept_log(options) else "nothing was to be settled")
    return 0


def run_status(options: Options, line: CommandLine) -> int:
    import mad  # late: it is not small, and only this command and its own need it

    pid = find_server(options.db_file)
    checks, local = ask_ready(options, pid) if pid else ({}, "")
    status = describe_status(options, pid, checks, local)
    if "--json" in line.flags:
        print(msgspec.json.format(msgspec.json.encode(status), indent=1).decode())
    else:
        print("\n".join(mad.render_status(msgspec.to_builtins(status))))
    # The Linux Standard Base gives an init script's `status` 3 for stopped and 4 for unknown.
    return 3 if status.state == "stopped" else 1 if status.attention else 0


def run_upgrade(line: CommandLine, environ: Mapping[str, str]) -> int:
    """Replace the archive that this runs from. Root stays root here: the file is its own; see DataSide for the rest."""
    from appliance import upgrade  # late: no server needs it

    program = getattr(sys.modules["__main__"], "ARCHIVE", None)
    if not program:
        raise StartupError("this does not run from an archive, which is what upgrade replaces")
    program = os.path.realpath(program)
    archive = program.removesuffix(".previous")
    check_folder(os.path.dirname(archive))
    os.close(open_owned(archive))
    wait = line.values.get("--wait", str(START_SECONDS))
    if not (wait.isdigit() and 0 < int(wait) <= 86400):
        raise UsageError("--wait takes a number of seconds")
    settings = [f"--{name}={value}" for name, (value, _) in line.settings.items()]
    work = upgrade.Upgrade(archive, program, settings, environ, int(wait))
    return upgrade.upgrade(work, line.args[0], line.flags, line.values.get("--trusted-keys", ""))


def run_upgrade_steps(options: Options, line: CommandLine) -> int:
    from appliance import upgrade  # late: no server needs it

    return upgrade.serve_steps(options)


def run_admin(options: Options, line: CommandLine) -> int:
    if line.args[0] != "recover" or not line.values.get("--username"):
        raise UsageError
    if "--password-stdin" in line.flags:
        password = read_stdin_secret("--password-stdin")
    elif sys.stdin.isatty():
        password = ask_secret("new password: ")
        if ask_secret("once more: ") != password:
            raise StartupError("the two passwords differ")
    else:
        raise StartupError("without a terminal the password comes by --password-stdin")
    done = recover_admin(options, line.values["--username"], password, "--disable-totp" in line.flags)
    print(
        f"administrator {fold(line.values['--username'])} {done}: a new password, active, no lockout, "
        f"{'no second factor, ' if '--disable-totp' in line.flags else ''}the role MadAdmin; everything issued to the "
        "account before is ended"
    )
    return 0


def first_start(options: Options, line: CommandLine):
    """Set up from the environment, or on a terminal, if there never was a database. Raises StartupError saying what to
    do otherwise.
    """
    keys = [
        path for path in (options.token_signing_key_file, options.admin_token_signing_key_file) if os.path.exists(path)
    ]
    if keys:
        raise StartupError(
            f"the database {options.db_file} is missing, but the signing key {keys[0]} is there: restore the "
            "database, or run setup --keep-keys to begin anew with these keys"
        )
    prefix = line.settings.get("env-var-prefix", ("MAD_",))[0]
    if found := setup_variables(prefix, line.environ):
        from appliance import oobe

        status = oobe.run_from_environment(options, found, prefix)
    elif options.docker or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StartupError(
            f"there is no database {options.db_file}: run microauthd setup on a terminal, or unattended with "
            f"--answers FILE; or set {prefix}SETUP_USERNAME, _EMAIL and _PASSWORD_FILE, or {prefix}SETUP_ANSWERS"
        )
    else:
        status = run_setup(options, CommandLine({}, [], ["--then-serve"], {}))
    if status:
        raise SystemExit(status)


def run_serve(options: Options, line: CommandLine) -> int:
    if os.path.exists(options.db_file + TRIAL_SUFFIX):
        from appliance import upgrade  # late: hardly any server needs it

        upgrade.recover_upgrade(options)
    if not os.path.exists(options.db_file):
        first_start(options, line)
        options = load_options(line.settings, line.environ)
    return serve(options)


DOWNGRADE = Flag("--downgrade", "take an older release than the installed one, if it knows the schema of the database")
SERVICE_FLAGS = (
    Flag("--prefix", "where the program lies (/opt/microauthd)", "DIR"),
    Flag("--user", "whom the server runs as (microauthd)", "NAME"),
    Flag("--data", "where its data lies (/var/lib/microauthd)", "DIR"),
    Flag("--root", "work on the file system of another machine, mounted here", "DIR"),
    Flag("--yes", "do not ask"), Flag("--dry-run", "only print what would be done"),
)

AS_JSON = Flag("--json", "print JSON, for programs")

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "serve", "serve AUTH and ADMIN; the first start sets up (default)", run_serve,
            description="Serve AUTH and ADMIN until SIGTERM or Ctrl-C. Where there is no database yet, a start on a "
            "terminal asks the questions of the set-up first. SIGHUP drops the caches and "
            "reads the certificates of the ports again.",
            examples=("serve --config /etc/microauthd/mad.conf", "serve --auth-port 8443 --workers 2"),
        ),
        Command(
            "setup", "set up: on a terminal by questions, or --answers FILE, or --demo", run_setup,
            (
                "[--quick | --guided] [--keep-keys]",
                "--answers FILE [--admin-password-stdin | --admin-password-file FILE] [--keep-keys]",
                "--first-start --answers FILE", "--web [--claim-code-file FILE]", "--demo",
            ),
            "Make the configuration, the database, the keys, the first administrator and the first client: all of it "
            "or nothing. A box that is set up already is left as it is.",
            (
                Flag("--quick", "ask only the few questions that matter"), Flag("--guided", "ask for every setting"),
                Flag("--answers", "set up without questions, from this TOML file", "FILE"),
                Flag("--admin-password-stdin", "read the administrator's password from standard input"),
                Flag("--admin-password-file", "read the administrator's password from a file", "FILE"),
                Flag("--web", "ask on a page of the network, for whoever has the claim code"),
                Flag("--claim-code-file", "take the claim code from this file, instead of making one", "FILE"),
                Flag("--first-start", "for a service: nothing where there is a database or no FILE; removes FILE"),
                Flag("--keep-keys", "take over the keys that are there already; otherwise they are refused"),
                Flag("--demo", "set up a trial: every secret is made and printed once"),
            ),
            ("setup", "setup --answers answers.toml --admin-password-stdin < password", "setup --web", "setup --demo"),
        ),
        Command("mad ...", "the operator's command line; see mad --help"),
        Command(
            "options [--json]", "each setting, its value and where it comes from", run_options, ("[--json]",),
            "Print each setting, its value, and whether it is a default or comes from the config file, the "
            "environment or a flag. A secret is shown as (set).",
            (AS_JSON,), ("options", "MAD_AUTH_PORT=8443 microauthd options --json"),
        ),
        Command(
            "help [TOPIC]", "a page of the manual; without TOPIC, the list of the pages", usage=("[TOPIC]",),
            description="Show a page of the manual: in a pager on a terminal, as plain text otherwise.",
            examples=("help", "help mad.conf", "help recipes | grep -A3 offline_access"),
        ),
        Command(
            "version", "print the version", usage=("[--json]",),
            description="Print the name and the version of the program; as JSON also that of the database's schema.",
            flags=(AS_JSON,), examples=("version", "version --json"),
        ),
        Command(
            "selftest", "check that everything the program needs works here",
            description="Use every part that a wrong machine or a damaged file could break: the encrypted database, "
            "Argon2id, signatures, the second factor and the bundled files. Nothing of the box is touched.",
            examples=("selftest",),
        ),
        Command(
            "status", "how the box is, and what needs attention; the exit status tells it to scripts", run_status,
            ("[--json]",),
            "Print version, processes, ports, issuer, certificates, clock, last backup and disk, and below that what "
            "needs attention, each with the command that helps. Nothing is changed. An administrator is told the same "
            "by mad status and GET /status.",
            (AS_JSON,), ("status", "status --json"), is_local=True, failed=4,
            statuses="exit status: 0 well, 1 needs attention, 2 bad usage, 3 not running, 4 cannot be told",
        ),
        Command(
            "install", "make it a service of this machine, or repair and upgrade that", usage=(
                "[--answers FILE] [--sockets] [--prefix DIR] [--user NAME] [--data DIR] [--root DIR]",
                "[--yes | --dry-run] [--downgrade] ...",
            ),
            description="As root, copy the program, make its user, folders, commands, manual pages and units, and "
            "start the service; each step is printed first. Without --answers the set-up asks its questions on the "
            "terminal. To do it again repairs what is missing or changed; settings and data are left as they are. A "
            "program older than the installed one is refused.",
            flags=(
                Flag("--answers", "set up from this file at the first start of the service", "FILE"),
                Flag("--sockets", "have systemd listen, also on ports below 1024, and keep connections in a restart"),
                DOWNGRADE,
                *SERVICE_FLAGS,
            ),
            examples=("install", "install --answers answers.toml --yes", "install --dry-run"),
        ),
        Command(
            "uninstall", "take the service away; settings and data stay, but with --purge",
            usage=("[--purge] [--prefix DIR] [--user NAME] [--data DIR] [--root DIR] [--yes] [--dry-run]",),
            description="As root, stop the service and remove what install has made. Settings, data and user stay.",
            flags=(Flag("--purge", "remove settings, data and user too"), *SERVICE_FLAGS), examples=("uninstall",),
        ),
        Command(
            "licenses", "the licences of everything this file holds",
            description="Print the licence of each package, library and script that is part of this file: a list, then "
            "every text in full. A checkout has those of its own files only; the packages beside it carry theirs.",
            examples=("licenses", "licenses | head -20"),
        ),
        Command(
            "backup FILE",
            "one file that restores the box; beside a running server (--force writes over FILE, --without-keys "
            "leaves keys and settings out: needed where the database is not encrypted)",
            run_backup, ("FILE [--force] [--without-keys]",),
            "Write a backup and read it through. It is encrypted with the passphrase of the database and holds the "
            "database, the keys and mad.conf.",
            (
                Flag("--force", "write over FILE"),
                Flag("--without-keys", "leave keys and settings out; needed where the database is not encrypted"),
            ),
            ("backup /media/stick/box.backup",), args=1, is_local=True,
        ),
        Command(
            "restore FILE", "put the box back to a backup, all or nothing; the server must be stopped", run_restore,
            ("FILE",),
            "Put database and keys back to a backup. mad.conf comes from the backup where there is none. Nothing "
            "that was issued before is valid any more.",
            examples=("restore /media/stick/box.backup",), args=1, is_local=True,
        ),
        Command(
            "upgrade FILE", "replace the program by a newer archive; goes back by itself if that does not become ready",
            run_upgrade_steps,
            (
                "FILE [--unsigned | --trusted-keys KEYS] [--downgrade] [--yes | --dry-run] ...",
                "FILE ... [--no-backup] [--wait SECONDS]",
                "--at-data -",
            ),
            "Check the signature FILE.sig and the self-test of a newer archive, make a backup, replace the file that "
            "this command runs from, and restart the server. If the new release does not become ready, the old file "
            "and the database as it was at the restart are put back. Nobody's login ends, and nothing that was "
            "answered is lost: until it is ready, the new release answers 503. After an interruption the next call "
            "finishes, or goes back.",
            (
                Flag("--unsigned", "do without a signature"),
                DOWNGRADE,
                Flag("--trusted-keys", "the public keys to trust, instead of /etc/microauthd/trusted-keys", "KEYS"),
                Flag("--dry-run", "check, say what would be done, and change nothing"),
                Flag("--yes", "do not ask"),
                Flag("--no-backup", "make no backup first"),
                Flag("--wait", f"how long the new release may take to be ready [{START_SECONDS}]", "SECONDS"),
                Flag("--at-data", "used by the command itself: do its work on the data"),
            ),
            ("upgrade microauthd-1.1.pyz --dry-run", "sudo microauthd upgrade microauthd-1.1.pyz --yes"), args=1,
            statuses="exit status: 0 done, 1 refused and nothing changed, 2 bad usage, 3 went back, 4 look at it",
        ),
        Command(
            "factory-reset", "overwrite and remove database and keys (--yes does not ask)", run_factory_reset,
            ("[--yes]",),
            "Overwrite and remove the database and the keys. The configuration and the backups stay; the next start "
            "sets up.",
            (Flag("--yes", "do not ask for the name of this machine"),), ("factory-reset",), is_local=True,
        ),
        Command(
            "keys list",
            "the signing keys; keys rotate [--ring auth|admin] [--alg ES256|RS256]; keys revoke --kid KID", run_keys,
            ("list [--json]", "rotate [--ring auth|admin] [--alg ES256|RS256]", "revoke --kid KID"),
            "List the signing keys; publish the next ones, which sign after key-overlap seconds; or end a key that "
            "was stolen, with every token it signed.",
            (
                AS_JSON, Flag("--ring", "rotate the keys of this port only", "auth|admin"),
                Flag("--alg", "rotate the keys of this algorithm only", "ES256|RS256"),
                Flag("--kid", "the key to revoke", "KID"),
            ),
            ("keys list", "keys rotate --ring auth", "keys revoke --kid KID"), args=1, is_local=True,
        ),
        Command(
            "certificate show",
            "what the ports serve, and the box's own CA: file, fingerprint, names, end; certificate renew; certificate "
            "new",
            run_certificate, ("show [--json]", "renew", "new"),
            "Show the certificates of the ports and, with tls = self, the CA of the box. renew makes another "
            "certificate at once, as after its key was read by somebody. new makes another CA, for the names and "
            "addresses that the box has now: every client must then trust its root, ca.pem, instead of the one before.",
            (AS_JSON,), ("certificate show", "certificate new"), args=1, is_local=True,
        ),
        Command(
            "admin recover",
            "let an administrator in again: --username NAME [--password-stdin] [--disable-totp]", run_admin,
            ("recover --username NAME [--password-stdin] [--disable-totp]",),
            "Give an administrator, new or there, a new password, the role MadAdmin and a way in. Everything issued "
            "to the account ends.",
            (
                Flag("--username", "the administrator", "NAME"),
                Flag("--password-stdin", "read the new password from standard input"),
                Flag("--disable-totp", "take the second factor away"),
            ),
            ("admin recover --username root",), args=1, is_local=True,
        ),
        Command(
            "clock accept",
            "the clock of this machine is right: go by it at once, where the server holds it for wrong", run_clock,
            ("accept",),
            "Say that the clock of this machine is right. Whatever was issued at times that are not yet is ended.",
            examples=("clock accept",), args=1, is_local=True,
        ),
        Command(
            "log status",
            "whether the write-ahead log was found damaged; log accept settles that", run_log, ("status", "accept"),
            "Say whether the write-ahead log of the database was found damaged, with exit status 1 then. What was "
            "done last may be undone: look at users, clients and keys. log accept settles it, and ends the reports.",
            (), ("log status", "log accept"), args=1, is_local=True,
        ),
    )
}


# -- help --


def describe(lines: list[tuple[str, str]]) -> list[str]:
    """Return `(what is typed, what it does)` in two columns."""
    shown = []
    for typed, told in lines:
        first, *rest = textwrap.wrap(told, 99, break_on_hyphens=False)
        shown += [f"  {typed:18} {first}", *(" " * 21 + line for line in rest)]
    return shown


def describe_settings() -> list[str]:
    """Return the options of the server that can be flags, each with its help."""
    shown = [
        "options (also key = value lines of mad.conf, and MAD_ variables of the environment):",
        "  --config FILE          config file (mad.conf)",
        "  --env-var-prefix WORD  prefix of the variables (MAD_)",
    ]
    for option in OPTIONS:
        if not option.secret:
            default = f" [{option.default}]" if option.default not in ("", (), False, -1) else ""
            told = textwrap.wrap(option.help + default, 112, break_on_hyphens=False)
            shown += [f"  --{option.name}", *(" " * 8 + line for line in told)]
    return shown


STATUSES = "exit status: 0 done, 1 refused or failed, 2 bad usage"


def usage() -> str:
    """Return the help of the program: its commands and every option."""
    return "\n".join(
        [
            "usage: microauthd COMMAND [--OPTION VALUE ...]", "", "commands:",
            *describe([(command.title, command.summary) for command in COMMANDS.values()]), "",
            "microauthd COMMAND --help says more of a command, microauthd help TOPIC shows a page of the manual.", "",
            *describe_settings(), "", STATUSES, "",
        ]
    )


def example_of(words: str) -> str:
    return "  " + (words if "microauthd " in words else "microauthd " + words)


def command_help(command: Command) -> str:
    """Return the help of one command: usage, description, options, examples."""
    typed = [f"microauthd {command.name} {words}".rstrip() for words in command.usage]
    lines = ["usage: " + "\n       ".join(typed)]
    lines += ["", *textwrap.wrap(command.description, 100, break_on_hyphens=False)]
    if command.flags:
        lines += ["", "options:"]
        lines += [f"  {(flag.name + ' ' + flag.value).rstrip():28} {flag.help}" for flag in command.flags]
    if command.name == "serve":
        lines += ["", *describe_settings()]
    elif command.run:
        lines += ["", "It also takes the options of the server, such as --config FILE: see microauthd help mad.conf."]
    lines += ["", "examples:", *(example_of(words) for words in command.examples), ""]
    lines += [command.statuses or STATUSES, ""]
    return "\n".join(lines)


def show_version(args: list[str]) -> int:
    """Print the version; as JSON also that of the database's schema: what release.json of an archive says of it."""
    if args == ["--json"]:
        print(json.dumps({"name": "microauthd", "version": VERSION, "schema": len(MIGRATIONS)}))
    elif args:
        raise UsageError(f"{args[0]!r} is not understood; see microauthd version --help")
    else:
        print(f"microauthd {VERSION}")
    return 0


def show_help(args: list[str]) -> int:
    """Show the list of the manual's pages, or one of them."""
    if not args:
        show_topics()
        return 0
    if len(args) > 1:
        raise UsageError(f"{args[1]!r} is not understood; see microauthd help --help")
    if args[0] not in topics():
        raise UsageError(f"the manual has no page {args[0]!r}; its pages are: {', '.join(topics())}")
    show_page(args[0])
    return 0


# -- the service --


def run_service(name: str, line: CommandLine) -> int:
    """Install the service, or take it away. Neither is of a box here, so no settings are loaded."""
    # Late: with the modules that only it needs it is 5 % of what a start imports, and no start needs it.
    from appliance.service import Layout, Request, install, installed_layout, python_of, uninstall

    if line.settings:
        raise UsageError(f"{name} takes no options of the server: they belong into /etc/microauthd/mad.conf")
    root = os.path.abspath(line.values.get("--root", "/"))
    layout = installed_layout(root) or Layout(root=root)
    given = {flag[2:]: value for flag, value in line.values.items() if flag in ("--prefix", "--user", "--data")}
    layout = msgspec.structs.replace(layout, **given)
    if name == "install":
        sockets = layout.sockets or "--sockets" in line.flags
        layout = msgspec.structs.replace(layout, sockets=sockets, python=python_of(root))
    request = Request(
        layout, line.values.get("--answers", ""),
        *(flag in line.flags for flag in ("--yes", "--dry-run", "--purge", "--downgrade")),
    )
    commands = {command.name: [*(flag.name for flag in command.flags), "--help"] for command in COMMANDS.values()}
    commands["serve"] += [f"--{option.name}" for option in OPTIONS if not option.secret]
    archive = getattr(sys.modules["__main__"], "ARCHIVE", "")  # of the archive's own start
    archive = os.path.abspath(archive) if archive else ""
    return install(request, archive, commands) if name == "install" else uninstall(request, commands)


def show_licenses(args: list[str]):
    """Print the licences that build/pyz.py collected, or in a checkout those of what lies in it."""
    if args:
        raise UsageError(f"{args[0]!r} is not understood; see microauthd licenses --help")
    collected = HERE / "appliance" / "LICENSES"
    path = collected if collected.exists() else HERE / "appliance" / "NOTICE"
    write(path.read_text("utf-8"))


# -- secrets in the environment --


def wipe_environment(names: set[bytes]):
    """Overwrite the values of variables in what the kernel shows as /proc/PID/environ, here and in every later child.

    To take one out of os.environ is not enough: the strings that execve(2) was given stay on the stack, between
    env_start and env_end of proc_pid_stat(5).
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may contain blanks
        start, end = int(fields[47]), int(fields[48])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            for entry in memory.read(end - start).split(b"\0"):
                name, equals, value = entry.partition(b"=")
                if equals and name in names:
                    memory.seek(start + len(name) + 1)
                    memory.write(bytes(len(value)))
                start += len(entry) + 1
    except (OSError, IndexError, ValueError) as error:
        warn(f"the secrets of the environment stay in /proc/{os.getpid()}/environ: {error}")


def take_environment(settings: dict) -> dict[str, str]:
    """Return a copy of the environment, and remove the secrets from what other processes can see of it."""
    environ = take_secrets(os.environ, settings.get("env-var-prefix", ("MAD_",))[0])
    if taken := {os.fsencode(name) for name in environ.keys() - os.environ.keys()}:
        wipe_environment(taken)
    return environ


# -- the user that a command runs as --


LATE_MODULES = (  # what this program and the standard library import late
    "difflib", "encodings.idna", "getpass", "pyotp", "segno", "subprocess", "tempfile", "termios", "tomllib",
    "appliance.oobe", "appliance.upgrade",
)


def start_anew(environ: dict[str, str]):
    """Start the program in place of this process. Return if this user cannot read it or its interpreter."""
    program = getattr(sys.modules["__main__"], "ARCHIVE", None) or sys.argv[0]
    sys.stdout.flush()
    if os.access(program, os.R_OK) and os.access(sys.executable, os.X_OK):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
    if os.path.isfile(program) and os.access(program, os.R_OK | os.X_OK):
        with contextlib.suppress(OSError):  # by the interpreter that its first line names
            os.execve(program, [program, *sys.argv[1:]], environ)


def become_owner(path: str, environ: dict[str, str]):
    """As root, go on as the user whose folder a file lies in.

    Before anything there is opened: the user could have put it there for root to obey. What the command makes
    belongs to the user, whose server can read it. The program starts anew, so that it lies in a cache of that user;
    where the user cannot read it, this process goes on with what it has loaded. Raises StartupError.
    """
    folder = existing_folder(path)
    info = os.stat(folder)
    if os.geteuid() or not info.st_uid:
        return
    for module in LATE_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    try:
        name, home = change_user(info.st_uid, info.st_gid or info.st_uid)
    except OSError as error:
        raise StartupError(
            f"{folder} belongs to user {info.st_uid}, and root cannot become that user here ({error.strerror}): run "
            "this as that user"
        ) from None
    print(f"microauthd: {folder} belongs to user {info.st_uid}: going on as that user", file=sys.stderr, flush=True)
    if not home or not os.access(home, os.W_OK | os.X_OK):
        home = folder
    changes = {"HOME": home, "USER": name, "LOGNAME": name}
    can_run_this = os.access(HERE / "appliance", os.R_OK | os.X_OK)
    for variable in ("MICROAUTHD_CACHE", "CACHE_DIRECTORY"):
        folder = environ.get(variable, "")
        # That of an installed service is root's, and its program is there for every user to read.
        holds_this = can_run_this and bool(folder) and HERE.is_relative_to(os.path.realpath(folder))
        if not holds_this and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            environ.pop(variable, None)  # it is root's
    start_anew(environ | changes)
    if not os.access(HERE / "appliance", os.R_OK | os.X_OK):
        raise StartupError(f"user {info.st_uid} cannot read this program: put it where that user can")
    os.environ.update(changes)


def become_user(name: str, line: CommandLine, config: str):
    """As root, go on as the user whose folder the config file lies in, or else the database. See become_owner().

    A set-up goes on as root, which may write a config file of root's: see oobe.set_up().
    """
    if not os.geteuid():
        become_owner(config, line.environ)
        if name == "setup":
            return
        if os.path.exists(config) and not os.path.isfile(config):
            return  # a pipe of the shell, which is read once
        settings = line.settings | {"config-may-be-missing": ("", "")}
        become_owner(load_options(settings, line.environ).db_file, line.environ)


# -- running a command --


def read_command_line(command: Command, argv: list[str]) -> CommandLine:
    """Sort what follows the name of a command. Raises UsageError."""
    names = {flag.name for flag in command.flags if not flag.value}
    takes_value = {flag.name for flag in command.flags if flag.value}
    flags = [word for word in argv if word in names]
    values, rest = {}, []
    words = iter([word for word in argv if word not in names])
    for word in words:
        name, equals, value = word.partition("=")
        if name in takes_value:
            values[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    try:
        settings, args = parse_flags(rest)
    except StartupError as refusal:
        raise UsageError(str(refusal)) from None
    if len(args) > command.args:
        raise UsageError(f"{args[command.args]!r} is not understood; see microauthd --help")
    if len(args) < command.args:
        raise UsageError(f"{command.name} needs one more word; see microauthd --help")
    return CommandLine(settings, args, flags, values)


def run_local(name: str, work: Callable[[], int], options: Options) -> int:
    """Run a command that works on the files of a box, as their owner and beside no other that would disturb it."""
    try:
        require_owner(options)
        if name == "restore":  # takes the lock itself, against all others
            return work()
        with hold_setup(journal_place(options), shared=name != "factory-reset"):
            return work()
    except OSError as error:
        raise StartupError(f"{error.filename or options.db_file}: {error.strerror}") from None


def run(name: str, argv: list[str]) -> int:
    """Run a command; return the exit status. Raises UsageError."""
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; see microauthd --help")
    command = COMMANDS[name]
    if "--help" in argv or "-h" in argv:
        write(command_help(command))
        return 0
    if name == "help":
        return show_help(argv)
    if name == "version":
        return show_version(argv)
    if name == "licenses":
        show_licenses(argv)
        return 0
    line = read_command_line(command, argv)
    if name == "selftest":
        return selftest()
    if name in ("install", "uninstall"):
        return run_service(name, line)
    if "print-effective-config" in line.settings:
        command = COMMANDS["options"]
    if name in ("setup", "restore"):
        line.settings["config-may-be-missing"] = True
    if name == "upgrade" and "--at-data" not in line.flags:
        return run_upgrade(line, os.environ)
    line.environ = take_environment(line.settings)
    config = config_path(line.settings, line.environ)
    become_user(name, line, config)
    recover_setup(config, line.settings, line.environ)
    options = load_options(line.settings, line.environ)
    assert command.run
    work = functools.partial(command.run, options, line)
    try:
        return run_local(name, work, options) if command.is_local else work()
    except UsageError:
        raise UsageError(" | ".join(f"{name} {words}" for words in command.usage)) from None


def open_streams():
    """Open /dev/null for each standard stream that the parent process has closed.

    The next file to be opened would take its number, perhaps the database, and what a library writes to stderr would
    go into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def use_utf8():
    """Start the program anew in UTF-8 mode if file names are ASCII here; take and show what is not text all the same.

    They are under LC_ALL=C with PYTHONUTF8=0: the é of a path in the config file would be the name of no file. PEP 540.
    Other encodings, such as that of a Latin-1 locale, have the names that their users see.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    open_streams()
    use_utf8()
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.path.basename(sys.argv[0]) == "mad":
        argv.insert(0, "mad")
    is_named = bool(argv) and not argv[0].startswith("-")
    name = argv.pop(0) if is_named else "serve"
    if name == "mad":
        import mad

        return mad.main(argv)
    if not is_named and ("--help" in argv or "-h" in argv):
        write(usage())
        return 0
    if "--version" in argv:
        print(f"microauthd {VERSION}")
        return 0
    umask = os.umask(0o077)
    try:
        return run(name, argv)
    except UsageError as error:
        print(f"microauthd: {error}", file=sys.stderr)
        return 2
    except StartupError as refusal:
        print(f"microauthd: {refusal}", file=sys.stderr)
        return COMMANDS[name].failed
    except (Problem, Unavailable) as error:
        problem = as_problem(error)
        print(f"microauthd: {problem.log or problem.message}", file=sys.stderr)
        for member, wrong in (problem.errors or {}).items():
            print(f"microauthd: {member} {wrong}", file=sys.stderr)
        return COMMANDS[name].failed
    except KeyboardInterrupt:
        return 130
    finally:
        os.umask(umask)  # that of a caller, who is not always a process that ends now


if __name__ == "__main__":
    sys.exit(main())
