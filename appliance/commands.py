"""The command line: main() and one function a command."""

import dataclasses
import json
import os
import socket
import sys

import sqlcipher3

from appliance.base import StartupError
from appliance.base.settings import OPTIONS, Options, config_path, describe_options, load_options, parse_flags
from appliance.base.database import SQLITE_MAGIC, Unavailable, derive_key, read_database_key
from appliance.base.store import Store
from appliance.base.hashing import Hasher
from appliance.base.keys import make_key
from microauthd import (
    AT_JWT, HERE, KeyRing, PUBLIC, Problem, VERSION, as_problem, common_passwords, fold, iso, new_totp_seed, totp_step,
    totp_uri,
)
from appliance.processes import serve
from appliance.recovery import (
    accept_clock, back_up, describe_keys, factory_reset, hold_setup, recover_admin, recover_setup, require_owner,
    restore, revoke_key, rotate_keys, set_up_demo,
)

# == Command line ==============================================================

OWN_FLAGS = {
    "setup": ("--demo", "--admin-password-stdin", "--quick", "--guided"), "options": ("--json",),
    "backup": ("--force", "--without-keys"), "factory-reset": ("--yes",), "keys": ("--json",),
    "admin": ("--password-stdin", "--disable-totp"),
}
OWN_VALUES = {
    "setup": ("--answers", "--admin-password-file"), "keys": ("--ring", "--alg", "--kid"), "admin": ("--username",),
}
OWN_WORDS = {"backup": 1, "restore": 1, "keys": 1, "admin": 1, "clock": 1}  # how many words a command takes

USAGE = """\
usage: microauthd COMMAND [--OPTION VALUE ...]

commands:
  serve              serve AUTH and ADMIN; the first start sets up (default)
  setup              set up: on a terminal by questions, or --answers FILE, or --demo
  mad ...            the operator's command line; see mad --help
  options [--json]   each setting, its value and where it comes from
  version            print the version
  selftest           check that everything the program needs works here
  backup FILE        one file that restores the box; beside a running server (--force writes over FILE,
                     --without-keys leaves keys and settings out: needed where the database is not encrypted)
  restore FILE       put the box back to a backup, all or nothing; the server must be stopped
  factory-reset      overwrite and remove database and keys (--yes does not ask)
  keys list          the signing keys; keys rotate [--ring auth|admin] [--alg ES256|RS256]; keys revoke --kid KID
  admin recover      let an administrator in again: --username NAME [--password-stdin] [--disable-totp]
  clock accept       the clock of this machine is right: go by it at once, where the server holds it for wrong

options (also key = value lines of mad.conf, and MAD_ variables of the environment):
  --config FILE          config file (mad.conf)
  --env-var-prefix WORD  prefix of the variables (MAD_)
"""


def usage() -> str:
    lines = [USAGE.rstrip()]
    for option in OPTIONS:
        if not option.secret:
            lines.append(
                f"  --{option.name}\n        {option.help}"
                + (f" [{option.default}]" if option.default not in ("", (), False, -1) else "")
            )
    lines.append("\nexit status: 0 done, 1 refused or failed, 2 bad usage")
    return "\n".join(lines) + "\n"


def selftest() -> int:
    """Use every part that a wrong machine or a damaged file could break; say what works."""
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
        for alg in ("ES256", "RS256"):
            ring = KeyRing([make_key(alg, 2048, 0)])
            signed = ring.mint(ring.access, AT_JWT, {"sub": "selftest"})
            if ring.verify(signed, AT_JWT) != {"sub": "selftest"}:
                raise ValueError("wrong verdict")
        return "ES256, RS256"

    def second_factor():
        seed = new_totp_seed()
        import pyotp

        if totp_step(seed, pyotp.TOTP(seed).at(1000), 1000) is None:
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


def show_options(options: Options, as_json: bool) -> int:
    described = describe_options(options)
    if as_json:
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


def setup(options: Options, flags: dict, own: list, values: dict) -> int:
    from appliance import oobe

    if "--demo" in own:
        set_up_demo(options, oobe.make)
        return 0
    return oobe.run(options, own, values)


def run_backup(options, words, own, values) -> int:
    done = back_up(options, words[0], "--force" in own, "--without-keys" in own)
    print(
        f"{words[0]}: {done['bytes']} bytes, {done['users']} users, {done['clients']} clients, up to "
        f"{iso(done['newest_at']) or 'the beginning'}, read through after writing"
    )
    if "--without-keys" in own:
        print(
            "microauthd: without keys: token.pem, admin_token.pem, seal.key and mad.conf must be kept elsewhere",
            file=sys.stderr,
        )
    return 0


def run_restore(options, words, own, values) -> int:
    try:
        with open(words[0], "rb") as file:
            is_plain = file.read(16) == SQLITE_MAGIC
    except OSError as error:
        raise StartupError(f"the backup {words[0]} cannot be read: {error.strerror}") from None
    if not options.db_pass and not options.no_db_pass and not is_plain:
        if not sys.stdin.isatty():
            raise StartupError("the passphrase of the backup is needed: in MAD_DB_PASS, or on a terminal")
        import getpass

        options = dataclasses.replace(options, db_pass=getpass.getpass("passphrase of the backup: "))
    done = restore(options, words[0])
    print(
        f"restored what {words[0]} holds, up to {iso(done['newest_at']) or 'the beginning'}; nothing that was "
        "issued before is good any more"
    )
    if not done["knows_revoked"]:
        print(
            "microauthd: warning: the database that was here could not be read: a key revoked since the backup "
            "must be revoked again",
            file=sys.stderr,
        )
    return 0


def run_factory_reset(options, words, own, values) -> int:
    name = socket.gethostname()
    if "--yes" not in own:
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


def run_keys(options, words, own, values) -> int:
    ring, alg = values.get("--ring", ""), values.get("--alg", "")
    if (
        words[0] not in ("list", "rotate", "revoke")
        or ring not in ("", "auth", "admin")
        or alg not in ("", "ES256", "RS256")
        or (words[0] == "revoke") != bool(values.get("--kid"))
    ):
        print(
            "microauthd: keys list | keys rotate [--ring auth|admin] [--alg ES256|RS256] | keys revoke --kid KID",
            file=sys.stderr,
        )
        return 2
    if words[0] == "rotate":
        for kid in rotate_keys(options, [ring] if ring else ["auth", "admin"], [alg] if alg else ()):
            print(kid)
        print(f"microauthd: published now, signing in {options.key_overlap} seconds", file=sys.stderr)
    elif words[0] == "revoke":
        print(
            f"revoked, on {revoke_key(options, values['--kid'])}: no token it signed is good any more; caches "
            "forget it within 300 seconds"
        )
    elif "--json" in own:
        print(json.dumps(describe_keys(options), indent=1))
    else:
        for row in describe_keys(options):
            print(f"{row['port']:5}  {row['alg']}  {row['state']:7}  {iso(row['since']) or 'always':20}  {row['kid']}")
    return 0


def run_clock(options, words, own, values) -> int:
    if words[0] != "accept":
        print("microauthd: clock accept", file=sys.stderr)
        return 2
    done = accept_clock(options)
    print(f"it is {iso(done['now'])}; {done['ended']} things of later times are ended")
    return 0


def run_admin(options, words, own, values) -> int:
    if words[0] != "recover" or not values.get("--username"):
        print("microauthd: admin recover --username NAME [--password-stdin] [--disable-totp]", file=sys.stderr)
        return 2
    if "--password-stdin" in own:
        password = sys.stdin.readline().rstrip("\n")
    elif sys.stdin.isatty():
        import getpass

        password = getpass.getpass("new password: ")
        if getpass.getpass("once more: ") != password:
            raise StartupError("the two passwords differ")
    else:
        raise StartupError("without a terminal the password comes by --password-stdin")
    done = recover_admin(options, values["--username"], password, "--disable-totp" in own)
    print(
        f"administrator {fold(values['--username'])} {done}: a new password, active, no lockout, "
        f"{'no second factor, ' if '--disable-totp' in own else ''}the role MadAdmin; everything issued to the "
        "account before is ended"
    )
    return 0


LOCAL_COMMANDS = {
    "backup": run_backup, "restore": run_restore, "factory-reset": run_factory_reset, "keys": run_keys,
    "admin": run_admin, "clock": run_clock,
}


def first_start(options: Options, flags: dict):
    """There is no database: set up on a terminal where there never was one; else say what to do."""
    keys = [
        path for path in (options.token_signing_key_file, options.admin_token_signing_key_file) if os.path.exists(path)
    ]
    if keys:
        raise StartupError(
            f"the database {options.db_file} is missing, but the signing key {keys[0]} is there: restore the "
            "database, or run setup to begin anew with these keys"
        )
    if options.docker or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StartupError(
            f"there is no database {options.db_file}: run microauthd setup on a terminal, or unattended with "
            "--answers FILE"
        )
    if status := setup(options, flags | {"config-may-be-missing": True}, [], {}):
        raise SystemExit(status)


def run(command: str, argv: list[str]) -> int:
    own = [word for word in argv if word in OWN_FLAGS.get(command, ())]
    values = {}
    rest = []
    words = iter([word for word in argv if word not in own])
    for word in words:
        name, equals, value = word.partition("=")
        if name in OWN_VALUES.get(command, ()):
            values[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if command not in ("serve", "setup", "options", "selftest", "factory-reset", *OWN_WORDS):
        print(f"microauthd: unknown command {command!r}; see microauthd --help", file=sys.stderr)
        return 2
    try:
        flags, words = parse_flags(rest)
    except StartupError as refusal:
        print(f"microauthd: {refusal}", file=sys.stderr)
        return 2
    takes = OWN_WORDS.get(command, 0)
    if len(words) != takes:
        said = f"{words[takes]!r} is not understood" if len(words) > takes else f"{command} needs one more word"
        print(f"microauthd: {said}; see microauthd --help", file=sys.stderr)
        return 2
    if command == "selftest":
        return selftest()
    if "print-effective-config" in flags:
        command = "options"
    if command in ("setup", "restore"):
        flags["config-may-be-missing"] = True
    config = config_path(flags, os.environ)
    recover_setup(config)
    options = load_options(flags, os.environ)
    if command in LOCAL_COMMANDS:
        try:
            require_owner(options)
            if command == "restore":  # holds it itself, against all others
                return run_restore(options, words, own, values)
            with hold_setup(config, beside_others=command != "factory-reset"):
                return LOCAL_COMMANDS[command](options, words, own, values)
        except OSError as error:
            raise StartupError(f"{error.filename or options.db_file}: {error.strerror}") from None
    if command == "options":
        return show_options(options, "--json" in own)
    if command == "setup":
        return setup(options, flags, own, values)
    if not os.path.exists(options.db_file):
        first_start(options, flags)
        options = load_options(flags, os.environ)
    return serve(options)


def open_streams():
    """Open nothing in place of each standard stream that was closed by whoever started us.

    Else the next file would have its number, the database perhaps, and what a library writes to stderr would land in
    it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.path.basename(sys.argv[0]) == "mad":
        argv.insert(0, "mad")
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "serve"
    if command == "mad":
        import mad

        return mad.main(argv)
    if command == "help" or "--help" in argv or "-h" in argv:
        sys.stdout.write(usage())
        return 0
    if command == "version" or "--version" in argv:
        print(f"microauthd {VERSION}")
        return 0
    os.umask(0o077)
    try:
        return run(command, argv)
    except StartupError as refusal:
        print(f"microauthd: {refusal}", file=sys.stderr)
        return 1
    except (Problem, Unavailable) as error:
        problem = as_problem(error)
        print(f"microauthd: {problem.log or problem.message}", file=sys.stderr)
        for member, wrong in (problem.errors or {}).items():
            print(f"microauthd: {member} {wrong}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
