"""The set-up journal, backup, restore, rotation, recovery, reset."""

import base64
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import secrets
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import sqlcipher3

from appliance.base import StartupError
from appliance.base.clock import RELEASED_AT, sleep
from appliance.base.files import (
    check_folder, close_lock, existing_folder, make_folder, open_lock, open_owned, read_owned, show_path,
    sync_directory, write_beside, write_durably,
)
from appliance.base.settings import (
    OPTIONS, OPTION_NAMES, Options, check_text, load_options, parse_config, read_config, write_config,
)
from appliance.base.database import Unavailable, database_key, new_database_key
from appliance.base.store import MAD_ADMIN_ROLE_ID, Store
from appliance.base.wal import check_log, forget_mark
from appliance.base.keys import Key, lock_ring, make_key, read_ring, replace_keys, write_ring
from appliance.base.objects import CreateClient, CreateScope, CreateUser, StatusObject, iso
from microauthd import (
    Idp, KeyRing, LOCAL, Problem, Seal, add_uri, assign_scopes, audit, check_new_password, create_client, create_scope,
    create_user, enable_totp, fold, hash_password, normalise, random_handle, reject, remove_qr_files, revoke_user,
    ring_files,
)
from appliance.backup import backup_files, check_copy, write_backup
from appliance.machine import MACHINE
from appliance.authority import PreparedAuthority, forbid_found_ca, keep_certificate, put_authority
from appliance.processes import hold_database, read_seal_key, run_as, touch_marks
from appliance.status import gather_status
from appliance.rings import list_keys, revoke, rotate, rsa_bits_of

# == Setup =====================================================================
# The first start: config, keys, database, administrator and first client, all or nothing. A write-ahead journal.


class FirstClient(msgspec.Struct):
    """A client that a set-up registers. `grants` None is what the server gives; an empty secret makes one."""

    client_id: str
    secret: str = ""
    audience: str = ""  # empty: the client_id
    scopes: list[str] = []
    public: bool = False
    grants: list[str] | None = None
    redirect_uris: list[str] = []
    post_logout_uris: list[str] = []
    cors_origins: list[str] = []


class Answers(msgspec.Struct):
    """What a set-up needs besides options."""

    username: str
    email: str
    password: str
    email_verified: bool = False
    scopes: list[str] = []  # of the administrator: what the clients get when this user logs in there
    totp_seed: str = ""
    totp_code: str = ""
    clients: list[FirstClient] = []
    keep_keys: bool = False  # of keys that are there already: take them over, as somebody said
    prepared_ca: PreparedAuthority | None = None  # of the page that the set-up is done at


class Journal(msgspec.Struct):
    """What a set-up or a restore has begun: its staged files with the paths that they are for."""

    committed: bool  # all of them are complete
    files: list[tuple[str, str]]


class MadeClient(msgspec.Struct):
    """A client that was registered, and its secret where set-up made it: shown once."""

    client_id: str
    secret: str


URI_MEMBERS = (("redirect_uris", "redirect"), ("post_logout_uris", "post_logout"), ("cors_origins", "cors_origin"))


def add_client(idp: Idp, new: FirstClient, refuse: Callable[[str, str], Any]) -> MadeClient:
    """Register a client, its scopes and URIs. `refuse` gets the member and a sentence of each thing that is wrong."""
    caller = LOCAL.acting_as("setup")
    members = {"client_secret": "secret", "grant_types": "grants", "name": "scopes"}  # by what the services call them
    try:
        for name in new.scopes:
            if idp.store.find_scope(normalise(name)) is None:
                create_scope(idp, caller, CreateScope(name))
        client, secret = create_client(idp, caller, CreateClient(
            new.client_id, new.secret or None, audience=new.audience or new.client_id, grant_types=new.grants,
            client_type="public" if new.public else "confidential", scopes=new.scopes,
        ))  # fmt: skip
    except Problem as problem:
        for member, wrong in (problem.errors or {}).items():
            refuse(members.get(member, member), f"{members.get(member, member)} {wrong}")
        if not problem.errors:
            refuse("client_id", f"the client_id {new.client_id!r} stands there twice")
        return MadeClient("", "")
    for member, kind in URI_MEMBERS:
        for uri in getattr(new, member):
            try:
                add_uri(idp, caller, client.client_id, kind, uri)
            except Problem as problem:
                wrong = (problem.errors or {}).get("uri", "stands there twice")
                refuse(member, f"{uri!r} in {member} {wrong}")
    return MadeClient(client.client_id, secret)


def check_clients(options: Options, clients: list[FirstClient]) -> list[tuple[int, str, str]]:
    """Return (index, member, sentence) of each thing that is wrong with the clients of a set-up.

    They are registered in a database in memory, by the services that will register them in that of the box.
    """
    found: list[tuple[int, str, str]] = []
    store = Store("set-up", mode="memory")
    try:
        store.migrate()
        with store.transaction():
            store.seed(0)
        ring = KeyRing([make_key("ES256", 0, 0)])
        cheap = dataclasses.replace(options, argon2id_time=1, argon2id_memory=8192, argon2id_parallelism=1)
        idp = Idp(cheap, store, ring, ring, Seal(bytes(32)))
        for index, client in enumerate(clients):
            problems: list[tuple[str, str]] = []
            add_client(idp, client, lambda *problem: problems.append(problem))  # noqa: B023 - called before it returns
            found += [(index, *problem) for problem in problems]
    finally:
        store.close()
    return found


def refuse_client(member: str, wrong: str):
    raise StartupError(wrong)


def journal_of(place: str) -> str:
    return place + ".setting-up"


def is_writable(config: str) -> bool:
    """Return whether this user can make files beside the config file: in /etc that is root's alone, and it may be
    mounted read-only.
    """
    return os.access(existing_folder(config), os.W_OK | os.X_OK)


def database_owner(db_file: str) -> tuple[int, int] | None:
    """Return uid and gid of the user whose folder the database lies in, where this is root and that is somebody else:
    the user of the service, who makes and moves everything there.
    """
    info = os.stat(existing_folder(db_file))
    return (info.st_uid, info.st_gid) if info.st_uid and not os.geteuid() else None


def journal_place(options: Options) -> str:
    """Return the file beside which the journal lies: the config file, or the database where that is root's and this
    is another's.
    """
    is_ours = is_writable(options.config_file) and database_owner(options.db_file) is None
    return options.config_file if is_ours else os.path.abspath(options.db_file)


def write_journal(place: str, committed: bool, files: list[tuple[str, str]]):
    """Write what a set-up or a restore has begun: pairs of staged and final path, and whether all are complete.

    `place` is journal_place().
    """
    # Escaped to ASCII, where the octets of a path that is not UTF-8 have a form, as lone surrogates; msgspec has none.
    write_durably(journal_of(place), json.dumps({"committed": committed, "files": files}).encode())


@contextlib.contextmanager
def hold_setup(place: str, shared=False):
    """Lock the journal: what looks like an interrupted set-up may be one that still runs.

    `place` is journal_place(); `shared` is for commands that replace no file: several may run, but none beside a
    restore.
    """
    path = journal_of(place) + ".lock"
    try:
        check_folder(os.path.dirname(os.path.abspath(place)))
        descriptor = open_lock(path, shared)
    except BlockingIOError:
        raise StartupError(
            "another process is setting up, restoring or at work on the files here right now: wait until it is done"
        ) from None
    except (OSError, StartupError):
        if not shared:
            raise
        yield  # a folder that takes no lock file, or is not believed, takes no journal either
        return
    try:
        yield
    finally:
        close_lock(path, descriptor)


STATE_FILES = ("db-file", "seal-key-file", "token-signing-key-file", "admin-token-signing-key-file")


def state_files(options: Options) -> list[str]:
    """Return the absolute paths of config, database and keys: the files that a set-up makes and a restore replaces."""
    paths = [getattr(options, OPTION_NAMES[name].attribute) for name in STATE_FILES]
    return [os.path.abspath(path) for path in (options.config_file, *paths, options.db_key_file) if path]


def staged_path(path: str) -> str:
    return os.path.abspath(path) + ".setup"


def read_journal(config: str, options: Options) -> Journal | None:
    """Return the journal, or None if there is none.

    Raises StartupError if somebody else could have written it, and if it names a file that neither the settings in
    force nor the staged config file name: files are removed and replaced by it.
    """
    path = journal_of(journal_place(options))
    try:
        journal = msgspec.convert(json.loads(read_owned(path)), Journal)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StartupError(f"the journal {path} cannot be read: {error}; look at it, then remove it") from None
    named = {*state_files(options)}
    with contextlib.suppress(FileNotFoundError):
        given = read_config(staged_path(config))
        paths = [given[name][0] if name in given else OPTION_NAMES[name].default for name in STATE_FILES]
        paths += [given["db-key-file"][0]] if "db-key-file" in given else []
        named |= {os.path.abspath(name) for name in paths}
    for staged, final in journal.files:
        if final not in named or staged != staged_path(final):
            raise StartupError(
                f"the journal {path} is of a set-up or a restore that did not end, and names {final}, which no option "
                "names: give the options it was begun with, or look at it and remove it"
            )
        check_folder(existing_folder(final))
    return journal


def remove_staged(staged: str):
    for suffix in ("", "-wal", "-shm", "-journal", ".lock", ".new"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged + suffix)


def finish_setup(config: str, options: Options):
    """Finish a set-up that was interrupted after its commit, or undo one that was interrupted before it.

    The journal says which: it lists the staged files and whether all of them were complete.
    """
    place = journal_place(options)
    is_ours = place == options.config_file
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal_of(place) + ".new")  # a journal that was not fully written
    journal = read_journal(config, options)
    if journal is None:
        if is_ours:
            remove_staged(staged_path(config))  # it is written before the journal, and removed after it
        return
    for staged, final in journal.files:
        if journal.committed:
            if os.path.exists(staged):
                os.close(open_owned(staged))
                forget_mark(final)
                for suffix in ("-wal", "-shm"):  # those of the database that is replaced
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(final + suffix)
                os.replace(staged, final)
        elif staged != staged_path(config):  # this one names the others: last
            remove_staged(staged)
        sync_directory(os.path.dirname(os.path.abspath(final)))
    os.unlink(journal_of(place))
    if is_ours:
        remove_staged(staged_path(config))
    sync_directory(os.path.dirname(os.path.abspath(place)))


def recover_setup(config: str, settings: dict | None = None, environ: Mapping[str, str] | None = None):
    """Finish or undo an interrupted set-up. Where nothing is left of one, nothing is locked.

    `settings` and `environ` are those of load_options().
    """
    settings = {"config": (config, ""), **(settings or {}), "config-may-be-missing": ("", "")}
    is_pipe = os.path.exists(config) and not os.path.isfile(config)  # of the shell, which is read once
    if is_pipe or (os.geteuid() and is_writable(config)):
        place, owner = config, None
    else:  # only the settings tell where a journal is that does not lie beside them, and whose
        options = load_options(settings, environ or {})
        place, owner = journal_place(options), database_owner(options.db_file)
    traces = (journal_of(place), staged_path(place))
    if not any(os.path.lexists(path + suffix) for path in traces for suffix in ("", ".new")):
        return

    def finish() -> bytes:
        with hold_setup(place):
            finish_setup(config, load_options(settings, environ or {}))
        return b""

    if owner:
        run_as(*owner, finish)
    else:
        finish()


def stage(options, answers, staged, now, checkpoint) -> list[MadeClient]:
    """Write all files of a set-up under their staging names."""
    rings = (
        (
            options.token_signing_key_file, options.token_signing_key_pass, ["ES256", "RS256"],
            options.token_signing_key_length_rsa,
        ),
        (
            options.admin_token_signing_key_file, options.admin_token_signing_key_pass,
            ["ES256" if options.prefer_ec_admin_token_signer else "RS256"], options.admin_token_signing_key_length_rsa,
        ),
    )
    entries = []
    for path, passphrase, algorithms, rsa_bits in rings:
        if os.path.exists(path):  # keep existing keys: relying parties trust them
            entries.append(read_ring(path, passphrase))
            write_durably(staged[path], read_owned(path))
        else:
            entries.append([make_key(alg, rsa_bits, now) for alg in algorithms])
            write_durably(staged[path], write_ring(entries[-1], passphrase))
        checkpoint(path)
    seal_path = options.seal_key_file
    seal_key = read_seal_key(seal_path) if os.path.exists(seal_path) else os.urandom(32)
    write_durably(staged[seal_path], base64.b64encode(seal_key) + b"\n")
    checkpoint("seal")
    if options.db_key_file in staged:
        write_durably(staged[options.db_key_file], os.urandom(32))
        options = dataclasses.replace(options, db_key_file=staged[options.db_key_file])
    key = new_database_key(options)
    store = Store.make(staged[options.db_file], key, now)
    try:
        checkpoint("database")
        idp = Idp(options, store, KeyRing(entries[0]), KeyRing(entries[1]), Seal(seal_key))
        account = create_user(
            idp, LOCAL.acting_as("setup"),
            CreateUser(answers.username, answers.email, answers.password, email_verified=answers.email_verified),
        )
        with store.transaction():
            store.assign_role(account.id, MAD_ADMIN_ROLE_ID, now)
            audit(idp, LOCAL.acting_as("setup"), "role_assigned", account.id, MAD_ADMIN_ROLE_ID)
        if answers.totp_seed:
            enable_totp(idp, account, answers.totp_seed, answers.totp_code)
        checkpoint("administrator")
        made = [add_client(idp, client, refuse_client) for client in answers.clients]
        if answers.scopes:
            assign_scopes(idp, LOCAL.acting_as("setup"), account, answers.scopes)
        if options.tls == "self":
            put_authority(idp, LOCAL.acting_as("setup"), answers.prepared_ca)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        store.close()
    with open(staged[options.db_file], "rb") as file:
        os.fsync(file.fileno())
    sync_directory(os.path.dirname(staged[options.db_file]))
    checkpoint("staged")
    return made


def forbid_second_setup(options: Options):
    """Raise StartupError where a set-up would leave a database without its settings: this one, or another that the
    config file names.
    """
    named = [options.db_file]
    with contextlib.suppress(FileNotFoundError):
        given = read_config(options.config_file)
        # One that is not named has the default's name, and counts where it lies beside the config file.
        default = os.path.join(os.path.dirname(os.path.abspath(options.config_file)), OPTION_NAMES["db-file"].default)
        named.append(given["db-file"][0] if "db-file" in given else default)
    for path in named:
        if os.path.lexists(path):
            raise StartupError(f"this is set up already: the database {path} is there, and is left as it is")


def forbid_found_keys(options: Options, keep_keys: bool):
    """Raise StartupError if keys are there already: who made them could sign tokens of this box, for ever."""
    for path in (options.token_signing_key_file, options.admin_token_signing_key_file, options.seal_key_file):
        if os.path.lexists(path) and not keep_keys:
            raise StartupError(
                f"the key {path} is there already: whoever made it could sign or unseal in the name of this box; if "
                "you know that it is yours, setup --keep-keys takes it over, otherwise move it away"
            )


def check_settings_are_there(options: Options):
    """Raise StartupError if a set-up that cannot write the config file would leave a box whose settings nobody has."""
    with contextlib.suppress(FileNotFoundError):
        given = read_config(options.config_file)
        lost = [
            option.name
            for option in OPTIONS
            if getattr(options, option.attribute) != option.default
            and option.name not in given
            and not options.origins.get(option.name, "").startswith(("environment ", "credential "))
        ]
        if lost:
            raise StartupError(
                f"{options.config_file} cannot be written by this user, and these settings of the set-up are not in "
                f"it: {', '.join(lost)}"
            )


def write_settings(options: Options, gid: int):
    """As root, write the config file for a server that runs as another user, whose group may read it."""
    path = options.config_file
    check_folder(existing_folder(path))
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o755, exist_ok=True)
    temporary = write_beside(path, write_config(options).encode())
    os.chown(temporary, 0, gid)
    os.chmod(temporary, 0o640)
    os.replace(temporary, path)
    sync_directory(os.path.dirname(os.path.abspath(path)))


def make_certificate_files(options: Options):
    """Make the files of the CA that a set-up has put into the database."""
    key = database_key(options)
    store = Store(options.db_file, key)
    try:
        auth_ring, admin_ring = (
            KeyRing(read_ring(path, passphrase)) for path, passphrase, _ in ring_files(options).values()
        )
        keep_certificate(Idp(options, store, auth_ring, admin_ring, Seal(read_seal_key(options.seal_key_file))))
    finally:
        store.close()


def set_up(options: Options, answers: Answers, checkpoint=lambda name: None) -> list[MadeClient]:
    """Make everything a first start needs; return the clients. Raises StartupError or Problem, and then nothing is.

    Every file is written under a staging name and synced; then the journal says "committed", in
    one rename; then the files take their names. A config file that is not ours to write stays as it is.
    `checkpoint` is called between the steps.
    """
    config, place = options.config_file, journal_place(options)
    for _, member, wrong in check_clients(options, answers.clients):
        refuse_client(member, wrong)
    make_folder(config)
    with hold_setup(place):
        finish_setup(config, options)
        forbid_second_setup(options)
        forbid_found_keys(options, answers.keep_keys)
        if not options.db_pass and not options.no_db_pass and not options.db_key_file:
            raise StartupError(
                "the database needs db-pass or db-key-file, or no-db-pass = true to keep it unencrypted knowingly"
            )
        if options.db_pass and options.no_db_pass:
            raise StartupError("db-pass and no-db-pass contradict each other")
        if options.tls == "self":
            forbid_found_ca(options)
        finals = [
            config, options.seal_key_file, options.token_signing_key_file, options.admin_token_signing_key_file,
            options.db_file,
        ]
        if options.db_key_file and not os.path.exists(options.db_key_file):
            finals.insert(1, options.db_key_file)
        if len({os.path.abspath(path) for path in finals}) != len(finals):
            raise StartupError("config, keys and database must be different files")
        if place != config:
            check_settings_are_there(options)
            finals.remove(config)
        for path in finals:
            make_folder(path)
        staged = {path: staged_path(path) for path in finals}
        now = int(time.time())
        with hold_database(options.db_file):
            files = [(staged[path], os.path.abspath(path)) for path in finals]
            # Before the journal, which names only files that a config file names.
            if place == config:
                write_durably(staged[config], write_config(options).encode())
                checkpoint("config")
            write_journal(place, False, files)
            checkpoint("journal")
            try:
                made = stage(options, answers, staged, now, checkpoint)
            except BaseException:
                finish_setup(config, options)
                raise
            write_journal(place, True, files)
            checkpoint("committed")
            finish_setup(config, options)
    if options.tls == "self":
        # The box is set up: what fails from here on, the first start makes.
        with contextlib.suppress(OSError, StartupError, Unavailable):
            make_certificate_files(options)
    return made


def demo_answers(options: Options) -> tuple[Options, Answers]:
    """Return settings and answers of an unattended trial: every secret is made here."""
    chosen: dict[str, Any] = {"enable_token_refresh": True, "serve_public_auth_files": True}
    if not options.db_pass and not options.no_db_pass and not options.db_key_file:
        chosen["db_pass"] = random_handle()
    if not options.oidc_issuer:
        scheme = "https" if options.tls_files("auth")[0] else "http"
        chosen["oidc_issuer"] = f"{scheme}://localhost:{options.auth_port}"
        chosen["admin_domain_no_ssl"] = not options.tls_files("admin")[0]
    origins = options.origins | {OPTION_NAMES[name.replace("_", "-")].name: "setup" for name in chosen}
    answers = Answers(
        "admin", "admin@localhost", secrets.token_urlsafe(12),
        clients=[FirstClient("demo", audience="demo-api", scopes=["demo:read", "demo:write"])],
    )
    return dataclasses.replace(options, origins=origins, **chosen), answers


def set_up_demo(options: Options, make):
    """Set up a trial and print its secrets once; those of the client are written to demo.env too, for scripts.

    `make` is set_up() whose refusals are sentences.
    """
    options, answers = demo_answers(options)
    (made,) = make(options, answers)
    print(
        f"administrator  {answers.username}\npassword       {answers.password}\nclient_id      "
        f"{made.client_id}\nclient_secret  {made.secret}",
        file=sys.stderr,
    )
    path = os.path.join(os.path.dirname(os.path.abspath(options.config_file)), "demo.env")
    try:
        write_durably(path, f"MAD_CLIENT_ID={made.client_id}\nMAD_CLIENT_SECRET={made.secret}\n".encode())
    except OSError as error:
        raise StartupError(
            f"it is set up, and these are shown once; {path} cannot be written: {error.strerror}"
        ) from None
    print("These are shown once; the client's stand in demo.env, readable by you alone.", file=sys.stderr)


# == Recovery ==================================================================
# At the machine, as the user who owns the files: back up, restore, reset, rotate keys, let an administrator in
# again. None of this can be reached from the network.


@contextlib.contextmanager
def without_server(options: Options):
    """Lock the database to migrate it. Raises StartupError while a server of an older release runs on it."""
    with contextlib.ExitStack() as stack:
        for attempt in range(20):  # another command may be migrating it
            try:
                stack.enter_context(hold_database(options.db_file))
                break
            except StartupError as refusal:
                if attempt == 19:
                    raise StartupError(f"{refusal}, of an older release: restart it first") from None
                sleep(0.1)
        yield


def require_owner(options: Options):
    """Raise StartupError unless the files are this user's, root's too: otherwise the server could not read what a
    command makes. A command run as root has become their owner by now: see become_owner().
    """
    try:
        os.close(open_owned(options.db_file))
    except FileNotFoundError:
        check_folder(existing_folder(options.db_file))
    except OSError as error:
        raise StartupError(f"the database {options.db_file} cannot be read: {error.strerror}") from None


def open_idp(options: Options) -> Idp:
    """Return the identity provider of the files, for a command beside a running server or without one.

    Raises StartupError.
    """
    require_owner(options)
    store = Store(options.db_file, database_key(options))
    try:
        store.open(functools.partial(without_server, options), options.enable_audit_logging)
        store.open_process_write_lock()  # a running server writes all the time
        auth_ring, admin_ring = (
            KeyRing(read_ring(path, passphrase), prefer_ec)
            for path, passphrase, prefer_ec in ring_files(options).values()
        )
        return Idp(options, store, auth_ring, admin_ring, Seal(read_seal_key(options.seal_key_file)), machine=MACHINE)
    except BaseException:
        store.close()
        raise


@contextlib.contextmanager
def hold_folder(folder: str):
    """Lock a folder, so that two backups of one name do not overwrite each other. Raises StartupError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StartupError(f"the folder {folder} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StartupError(f"another backup is being written into {folder}") from None
    finally:
        os.close(descriptor)


def back_up(options: Options, path: str, force=False, without_keys=False, kind="command") -> dict:
    """Write one file that restores the box, at the machine. See write_backup()."""
    idp = open_idp(options)
    try:
        with hold_folder(os.path.dirname(os.path.abspath(path))):
            return write_backup(idp, LOCAL.acting_as("machine"), path, force, without_keys, kind)
    finally:
        idp.store.close()


def read_backup(source: str, key: str) -> dict:
    """Return the files within a backup. Raises StartupError if it is no backup, or does not open."""
    copy = Store(source, key)
    try:
        files = copy.read_backup_files()
    except (Unavailable, sqlcipher3.Error):
        raise StartupError(f"{source} does not open: the passphrase or the key is wrong, or it is damaged") from None
    finally:
        copy.close()
    if files is None:
        raise StartupError(f"{source} is a database, and no backup: the keys are not in it")
    return files


def merge_settings(options: Options, content: bytes, where: str) -> Options:
    """Return the options, and for those that are not set here, the settings of a backup.

    They name the files and hold the passphrases of the keys.
    """
    values = {}
    for name, (value, origin) in parse_config(content.decode("utf-8", "surrogateescape"), where).items():
        if name not in options.origins:
            check_text(value, origin, name)
            try:
                values[OPTION_NAMES[name].attribute] = OPTION_NAMES[name].parse(value)
            except ValueError as error:
                raise StartupError(f"{origin}: {name} {error}") from None
    return dataclasses.replace(options, **values)


def read_present_state(options: Options) -> tuple[set, int, bool]:
    """Return the kids revoked here, the time of the last issue in milliseconds, and whether the database was readable.
    """
    if not os.path.exists(options.db_file):
        return set(), 0, True
    store = None
    try:
        check_log(options.db_file)
        # Read-only: if the backup is refused, nothing may have changed, not even a WAL that a crash left.
        store = Store(options.db_file, database_key(options), mode="ro")
        return store.revoked_kids(), store.last_issued_ms(), not store.find_log_damage(store.connection)
    except (StartupError, Unavailable, sqlcipher3.Error):
        return set(), 0, False
    finally:
        if store:
            store.close()


def stage_backup(options, source, key, names, staged, checkpoint) -> tuple[int, bool]:
    """Write the files of a backup under their staging names.

    Return the time of its newest row, and whether the keys revoked here could be read.
    """
    revoked, issued_here, knows_revoked = read_present_state(options)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged["database"])
    with (
        open(source, "rb") as backup,
        os.fdopen(os.open(staged["database"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        shutil.copyfileobj(backup, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    checkpoint("database")
    check_copy(staged["database"], key)
    store = Store(staged["database"], key)
    try:
        store.open()
        files = store.read_backup_files()  # of the verified copy, not of the source
        assert files is not None
        store.drop_backup_files()
        for name in names:
            write_durably(staged[name], files[name])
            checkpoint(name)
        places = backup_files(options) | {name: staged[name] for name in names}
        revoked |= store.revoked_kids()
        rings, replaced = [], []
        for port_name, (_, passphrase, _) in ring_files(options).items():
            entries = read_ring(places[port_name], passphrase)
            kept = replace_keys(entries, revoked, rsa_bits_of(options, port_name), int(time.time()))
            if kept != entries and port_name in names:  # a ring that stays has lost them already
                replaced += [Key(entry).kid for entry in entries if entry not in kept and Key(entry).kid in revoked]
                write_durably(staged[port_name], write_ring(kept, passphrase))
            rings.append(KeyRing(kept))
        auth_ring, admin_ring = rings
        idp = Idp(options, store, auth_ring, admin_ring, Seal(read_seal_key(places["seal"])))
        newest = store.newest_at()
        if not idp.check_clock():
            raise StartupError(
                "the clock of this machine is behind the newest row of the backup: put it right first, for what "
                "was issued since is to end"
            )
        with store.transaction():
            # Later than anything that this box, or the one the backup was made of, has issued.
            store.put_meta("revoked_before", max(idp.now_ms(), issued_here, store.last_issued_ms()))
            store.revoke_kids(revoked)
            store.delete_logins()
            audit(
                idp, LOCAL.acting_as("machine"), "restored", show_path(os.path.basename(source)),
                f"newest_row={iso(newest)}" + "".join(f" still_revoked={kid}" for kid in replaced),
            )
        store.checkpoint()
    finally:
        store.close()
    return newest, knows_revoked


def restore(options: Options, source: str, checkpoint=lambda name: None) -> dict:
    """Put the box back to a backup, all of it or nothing; the server must not run.

    Everything that was issued before is revoked, and a key that was revoked here stays revoked. The settings of the
    backup are used if there are none here. Return `restored_from`, `newest_at`, and `knows_revoked`: whether the keys
    revoked here could be read. Raises StartupError, and then nothing has changed.
    """
    key = database_key(options, source, is_ours=False)
    config, place = options.config_file, journal_place(options)
    require_owner(options)
    make_folder(config)
    with hold_setup(place):
        finish_setup(config, options)
        files = read_backup(source, key)
        if not os.path.exists(config) and "config" in files:
            if place != config:
                raise StartupError(f"{config} is missing, and this user cannot write it: write it first, as root")
            options = merge_settings(options, files["config"], f"mad.conf in {source}")
            require_owner(options)
        finals = {name: os.path.abspath(file) for name, file in backup_files(options).items()}
        if os.path.exists(config):
            files.pop("config", None)  # this box has settings of its own, and they open this backup
        lost = [
            finals[name] for name in ("seal", "auth", "admin") if name not in files and not os.path.exists(finals[name])
        ]
        if lost:
            raise StartupError(f"{source} was made without keys, and {lost[0]} is not here: bring the keys back first")
        finals = {name: finals[name] for name in finals if name in files} | {
            "database": os.path.abspath(options.db_file)
        }
        for final in finals.values():
            make_folder(final)
        staged = {name: staged_path(final) for name, final in finals.items()}
        placed = [(staged[name], finals[name]) for name in finals]
        with hold_database(options.db_file), contextlib.ExitStack() as ring_locks:
            for path, _, _ in ring_files(options).values():
                ring_locks.enter_context(lock_ring(path))
            if "config" in files:  # before the journal, which names only files that a config file names
                write_durably(staged["config"], files["config"])
            write_journal(place, False, placed)
            checkpoint("journal")
            try:
                newest, knows_revoked = stage_backup(options, source, key, files, staged, checkpoint)
                checkpoint("staged")
            except BaseException:
                finish_setup(config, options)
                raise
            write_journal(place, True, placed)
            checkpoint("committed")
            finish_setup(config, options)
        touch_marks(options)
    return {"restored_from": source, "newest_at": newest, "knows_revoked": knows_revoked}


COPY_SUFFIX = ".before-upgrade"  # of the copies that an upgrade makes of what a new release may change


def factory_reset(options: Options) -> list[str]:
    """Overwrite and remove database and keys, so that the next start sets up. Return the paths that were removed.

    The server must not run. Flash may keep old copies of what is overwritten; the passphrase protects those. If it is
    interrupted, running it again finishes it.
    """
    require_owner(options)
    gone = []
    with hold_database(options.db_file):
        # The keys first: without them the rest opens nothing. The database last: its owner is who may run this again.
        keys = [options.seal_key_file, options.token_signing_key_file, options.admin_token_signing_key_file]
        if options.db_key_file and os.access(os.path.dirname(os.path.abspath(options.db_key_file)), os.W_OK):
            keys.insert(0, options.db_key_file)  # but a credential of systemd, which is not ours to remove
        forget_mark(options.db_file)
        for path in (
            *(key + suffix for key in keys for suffix in (".new", COPY_SUFFIX, "")),
            *((options.self_made_file, options.ca_file) if options.tls == "self" else ()),
            *(options.db_file + suffix for suffix in ("-wal" + COPY_SUFFIX, COPY_SUFFIX, "-wal", "-shm", "")),
        ):
            try:
                with os.fdopen(open_owned(path, os.O_RDWR), "r+b") as file:
                    left = os.fstat(file.fileno()).st_size
                    while left > 0:
                        left -= file.write(os.urandom(min(left, 1 << 20)))
                    file.flush()
                    os.fsync(file.fileno())
            except FileNotFoundError:
                continue
            os.unlink(path)
            sync_directory(os.path.dirname(os.path.abspath(path)))
            gone.append(path)
    return gone


def describe_keys(options: Options) -> list[dict]:
    """Return a row for each signing key: port, alg, kid, state, since (Unix seconds)."""
    return list_keys(options, int(time.time()))


def rotate_keys(options: Options, ports, algorithms=()) -> list[str]:
    """Do what rings.rotate() does, at the machine."""
    idp = open_idp(options)
    try:
        return rotate(idp, LOCAL.acting_as("machine"), ports, algorithms)
    finally:
        idp.store.close()


def revoke_key(options: Options, kid: str) -> str:
    """Do what rings.revoke() does, at the machine."""
    idp = open_idp(options)
    try:
        port_name = revoke(idp, LOCAL.acting_as("machine"), kid)
        touch_marks(options)
        return port_name
    finally:
        idp.store.close()


def accept_clock(options: Options) -> dict:
    """Declare the machine's clock right, whatever was saved under a wrong one; a running server follows in a second.

    What was issued at later times than now is revoked. Return `now` and the number of rows that `ended`.
    """
    idp = open_idp(options)
    try:
        now = idp.now()
        if now < RELEASED_AT:
            raise StartupError(
                f"the clock of this machine says {iso(now)}, which is before this program was made: put it right first"
            )
        with idp.store.transaction():
            ended = idp.store.revoke_future_rows(now, idp.now_ms(), now // 30)
            idp.store.delete_logins()
            idp.store.put_meta("clock", now)
            idp.store.put_meta("clock_accepted", uuid.uuid4())
            audit(idp, LOCAL.acting_as("machine"), "clock_accepted", "", f"ended={ended}")
        for path, passphrase, _ in ring_files(options).values():
            with lock_ring(path):
                entries = read_ring(path, passphrase)
                if any(entry.since > now for entry in entries):  # a later time, which a next key would wait for
                    write_durably(
                        path,
                        write_ring(
                            [msgspec.structs.replace(entry, since=min(entry.since, now)) for entry in entries],
                            passphrase,
                        ),
                    )
    finally:
        idp.store.close()
    return {"now": now, "ended": ended}


def describe_status(options: Options, pid: int, checks: dict[str, bool], local: str) -> StatusObject:
    """Return how the box is, without changing anything: see gather_status(). Raises StartupError.

    The database is opened read-only: nothing is migrated, and a write-ahead log that a crash left stays.
    """
    require_owner(options)
    if not os.path.exists(options.db_file):
        raise StartupError(f"there is no database {options.db_file}: nothing is set up here")
    key, rings = database_key(options), []
    for path, passphrase, _ in ring_files(options).values():
        try:
            rings.append(KeyRing(read_ring(path, passphrase)))
        except StartupError:
            checks = {**checks, "keys": False}
            rings.append(KeyRing([make_key("ES256", 0, 0)]))  # a stand-in, which signs nothing
    # Without a log and a server, a reader would leave an empty log behind. https://www.sqlite.org/uri.html#uriimmutable
    is_still = not pid and not os.path.exists(options.db_file + "-wal")
    store = Store(options.db_file, key, mode="ro&immutable=1" if is_still else "ro")
    try:
        return gather_status(Idp(options, store, rings[0], rings[1], Seal(bytes(32))), pid, checks, local)
    except (Unavailable, sqlcipher3.Error) as error:
        reason = error.log if isinstance(error, Unavailable) else error
        raise StartupError(f"the database {options.db_file} cannot be read: {reason}") from None
    finally:
        store.close()


def describe_log(options: Options) -> str:
    """Return how the write-ahead log was found damaged, if that is not settled yet, "" otherwise."""
    idp = open_idp(options)
    try:
        return idp.store.meta("log_damaged")
    finally:
        idp.store.close()


def accept_log(options: Options) -> bool:
    """Settle that the write-ahead log was damaged: it is reported no longer. Return whether it was."""
    idp = open_idp(options)
    try:
        with idp.store.transaction():
            found = idp.store.settle_log_damage()
            if found:
                audit(idp, LOCAL.acting_as("machine"), "log_accepted")
        return found
    finally:
        idp.store.close()


def recover_admin(options: Options, username: str, password: str, drop_totp=False) -> str:
    """Give an administrator, or a new account, a new password and the role; it is active and not locked.

    Everything issued to the account is revoked. Return `made` or `recovered`.
    """
    idp = open_idp(options)
    try:
        name = fold(username)
        account = idp.store.find_account_by_name(name)
        if account is None:
            account, done = create_user(
                idp, LOCAL.acting_as("machine"), CreateUser(name, "", password, user_email=None)
            ), "made"
        else:
            reject(password=check_new_password(options, password, account.username, account.email))
            done = "recovered"
        password_hash = hash_password(idp, password)
        with idp.store.transaction(identity=True):
            idp.store.set_password_hash(account.id, password_hash, idp.now())
            idp.store.set_account_active(account.id, 1, idp.now())
            idp.store.set_lockout(account.id, 0, idp.now())
            idp.store.assign_role(account.id, MAD_ADMIN_ROLE_ID, idp.now())
            if drop_totp:
                idp.store.clear_totp(account.id, idp.now())
            revoke_user(
                idp, LOCAL.acting_as("machine"), account.id, "admin_recovered",
                done + (" totp=removed" if drop_totp else ""),
            )
        remove_qr_files(idp)
        return done
    finally:
        idp.store.close()
