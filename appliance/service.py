"""Installing the archive as a service of the machine, and taking it away again."""

import contextlib
import errno
import filecmp
import functools
import grp
import json
import os
import pwd
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from appliance.base import StartupError
from appliance.base.files import check_folder, existing_folder, open_owned, read_owned, sync_directory
from appliance.base.settings import OPTION_NAMES, OPTIONS, Options, load_options, write_config
from appliance.release import THIS, check_not_older, read_release
from appliance.help import completion_script, manual_page, topics

# == Layout ====================================================================
# Where things lie. What can be changed is written down at the first installation, so that the next one and uninstall
# find it again.

CONFIG = "/etc/microauthd"
RECORD = CONFIG + "/install.json"
ERRORS = "/var/log/microauthd.err"  # what a start under OpenRC is refused for
UNITS = Path(__file__).parent / "units"
OURS = b"ritten by microauthd install"  # in each file that an installation may replace and remove
SOCKETS = ("microauthd-auth.socket", "microauthd-admin.socket")
SERVICE = "microauthd.service"


class Layout(msgspec.Struct, frozen=True):
    """Where a service lies and whom it runs as. `root` is the folder of the file system that is installed into."""

    prefix: str = "/opt/microauthd"
    user: str = "microauthd"
    data: str = "/var/lib/microauthd"
    sockets: bool = False
    python: str = "/usr/bin/python3"
    root: str = "/"

    def at(self, path: str) -> str:
        """Return where a path of the installed system lies from here."""
        return os.path.join(self.root, path.lstrip("/"))

    @property
    def archive(self) -> str:
        return self.prefix + "/microauthd.pyz"


def check_layout(layout: Layout):
    """Raise StartupError unless the units can name these paths, and the server sees them behind ProtectHome=."""
    other = "; run this command by another Python, such as /usr/bin/python3"
    for name, path, advice in (
        ("--prefix", layout.prefix, ""), ("--data", layout.data, ""), ("the Python", layout.python, other),
    ):
        if re.match(r"/(home|root|tmp|var/tmp|run|dev|proc|sys|etc)(/|$)", path):
            raise StartupError(
                f"{name} cannot be {path}: the service does not see it there, or it does not last{advice}"
            )
        if not re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+", path):
            raise StartupError(
                f"{name} must be an absolute path of letters, digits, and . _ - only, with no name that begins with . "
                f"or -: {path!r}{advice}"
            )
    if os.path.commonpath([layout.prefix, layout.data]) in (layout.prefix, layout.data):
        raise StartupError("--prefix and --data must not lie in each other: the server may write to one alone")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", layout.user) or layout.user == "root":
        raise StartupError(f"--user must be a system user's name, and not root: {layout.user!r}")


def installed_layout(root: str) -> Layout | None:
    """Return how the service was installed, or None where it is not. Raises StartupError."""
    path = Layout(root=root).at(RECORD)
    try:
        return msgspec.convert({**json.loads(read_owned(path)), "root": root}, Layout)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None


def python_of(root: str) -> str:
    """Return the Python that the service is to run by: this one, by the name that an upgrade of the system keeps."""
    name = "/usr/bin/python3"
    if root != "/":
        if not os.path.lexists(os.path.join(root, name.lstrip("/"))):
            raise StartupError(f"{root} has no {name}, by which the service would run")
        return name
    with contextlib.suppress(OSError):
        if os.path.samefile(name, sys.executable):
            return name
    os.close(open_owned(os.path.realpath(sys.executable)))  # root runs it at each start
    return sys.executable


def has_systemd(layout: Layout) -> bool:
    """Return whether systemd is there. Its folder of units is no sign of it: packages put theirs there everywhere."""
    return any(os.path.exists(layout.at(path)) for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd"))


def is_running_systemd(layout: Layout) -> bool:
    """Return whether systemd can be told of it: sd_booted(3)."""
    return layout.root == "/" and os.path.isdir("/run/systemd/system")


# == Steps =====================================================================
# What an installation does, each step said before any is done. A step that finds its work done is left out.


class Step(msgspec.Struct, frozen=True):
    text: str
    do: Callable[[], object]


def run_program(*words: str):
    """Run a program of the machine. Raises StartupError with what it said."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise StartupError(f"{words[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise StartupError(f"{' '.join(words)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def user_of(layout: Layout) -> tuple[int, int, str] | None:
    """Return uid, gid and home folder of the service's user, of the system that is installed into; None without one."""
    if layout.root == "/":
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(layout.user)
            return user.pw_uid, grp.getgrnam(layout.user).gr_gid, user.pw_dir
        return None
    rows: list[list[str]] = []
    for path in ("/etc/passwd", "/etc/group"):
        with contextlib.suppress(OSError), open(layout.at(path)) as file:
            rows += [row for row in (line.split(":") for line in file) if row[0] == layout.user][:1]
    return (int(rows[0][2]), int(rows[1][2]), rows[0][5]) if len(rows) == 2 else None


def ids_of(layout: Layout) -> tuple[int, int] | None:
    """Return uid and gid of user_of()."""
    found = user_of(layout)
    return found[:2] if found else None


def owner_of(layout: Layout, owner: str) -> tuple[int, int]:
    """Return uid and gid: `root`, the service's `user`, or root with its `group`. Raises StartupError."""
    ids = (0, 0) if owner == "root" else ids_of(layout)
    if ids is None:
        raise StartupError(f"there is no user {layout.user} with a group of that name")
    return (0, ids[1]) if owner == "group" else ids


def remove_file(path: str):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def write_file(path: str, content: bytes, mode: int, ids: tuple[int, int]):
    """Write a file of the system, as a whole and on the disk before it has its name."""
    temporary = path + ".new"
    remove_file(temporary)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), *ids)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a disk that is full would stay full
        remove_file(temporary)
        raise
    sync_directory(os.path.dirname(path))


def make_folders(path: str):
    """Make the folders of a file that are missing, for everybody to read, and refuse those that others can write."""
    folder = os.path.dirname(path)
    check_folder(existing_folder(path))
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for folder in reversed(missing):
        os.mkdir(folder, 0o755)
        os.chmod(folder, 0o755)  # noqa: S103 - whatever the umask is


def is_as_wanted(layout: Layout, path: str, mode: int, owner: str) -> bool:
    with contextlib.suppress(OSError, StartupError):
        info = os.lstat(path)
        return (stat.S_IMODE(info.st_mode), (info.st_uid, info.st_gid)) == (mode, owner_of(layout, owner))
    return False


def file_step(layout: Layout, path: str, content: bytes, mode=0o644, owner="root") -> Iterator[Step]:
    """A file that is ours: written where it is missing or different, and left alone where it is somebody else's."""
    target = layout.at(path)
    try:
        with open(target, "rb") as file:
            found = file.read()
    except FileNotFoundError:
        found = None
    if found is not None and OURS in content and OURS not in found:
        raise StartupError(f"{target} is there already, and is no file of an installation: move it away first")
    if found == content and is_as_wanted(layout, target, mode, owner):
        return

    def do():
        make_folders(target)
        write_file(target, content, mode, owner_of(layout, owner))

    yield Step(f"{'write' if found is None else 'write anew'} {path} ({mode:04o})", do)


def folder_step(layout: Layout, path: str, mode: int, owner: str) -> Iterator[Step]:
    target = layout.at(path)
    if os.path.isdir(target) and is_as_wanted(layout, target, mode, owner):
        return

    def do():
        make_folders(target)
        with contextlib.suppress(FileExistsError):
            os.mkdir(target, 0o700)
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchown(descriptor, *owner_of(layout, owner))
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)

    yield Step(f"make the folder {path} ({mode:04o})", do)


def data_step(layout: Layout) -> Iterator[Step]:
    """The folder of the data: of the server, and of nobody else before."""
    target, ids = layout.at(layout.data), ids_of(layout)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        owner = os.lstat(target).st_uid
        # To give a folder away that is in use, such as /srv, would take it from everybody else.
        if owner != (ids[0] if ids else -1) and set(os.listdir(target)) - {"lost+found"}:
            raise StartupError(
                f"{target} belongs to user {owner} and is not empty: name a folder that is for the data alone by "
                f"--data, or if it is that of a box, make the user {layout.user} and give it away by "
                f"chown -R {layout.user}: {target}"
            )
    yield from folder_step(layout, layout.data, 0o700, "user")


def link_step(layout: Layout, path: str, to: str) -> Iterator[Step]:
    target = layout.at(path)
    if os.path.islink(target) and os.readlink(target) == to:
        return
    if os.path.lexists(target):
        raise StartupError(f"{target} is there already, and leads elsewhere: move it away first")

    def do():
        make_folders(target)
        os.symlink(to, target)

    yield Step(f"link {path} to {to}", do)


def user_step(layout: Layout) -> Iterator[Step]:
    """A system user without a login: by whatever this system makes users with."""
    if ids_of(layout):
        return

    def do():
        root = [] if layout.root == "/" else ["--root", layout.root]
        nologin = "/usr/sbin/nologin" if os.path.exists(layout.at("/usr/sbin/nologin")) else "/sbin/nologin"
        if shutil.which("systemd-sysusers") and has_systemd(layout):
            run_program("systemd-sysusers", *(["--root=" + layout.root] if root else []),
                        layout.at("/etc/sysusers.d/microauthd.conf"))
        elif shutil.which("useradd"):
            run_program("useradd", *root, "--system", "--user-group", "--home-dir", layout.data, "--no-create-home",
                        "--shell", nologin, layout.user)  # fmt: skip
        else:  # BusyBox
            change = ["chroot", layout.root] if root else []
            run_program(*change, "addgroup", "-S", layout.user)
            run_program(*change, "adduser", "-S", "-D", "-H", "-h", layout.data, "-s", nologin, "-G", layout.user,
                        layout.user)  # fmt: skip

    yield Step(f"make the system user {layout.user}", do)


# == What is installed =========================================================


def fill(layout: Layout, name: str, **more: str) -> bytes:
    """Return a template of appliance/units with the paths of this installation."""
    words = {
        "PREFIX": layout.prefix, "USER": layout.user, "DATA": layout.data, "PYTHON": layout.python, "CONFIG": CONFIG,
        "ERRORS": ERRORS,
        "SOCKETS": f"Sockets={' '.join(SOCKETS)}\n" if layout.sockets else "", **more,
    }  # fmt: skip
    text = re.sub("@(CREDENTIALS|SOCKETS)@\n", r"@\1@", (UNITS / name).read_text("utf-8"))  # lines, or none
    return re.sub("@([A-Z0-9]+)@", lambda found: words[found[1]], text).encode()


def credential_lines(layout: Layout, makes_passphrase: bool) -> str:
    """Return LoadCredential= of each secret that lies in a file of its own, or will. systemd.exec(5), systemd-creds(1)
    """
    folder, lines = CONFIG + "/credentials", []
    for option in OPTIONS:
        if option.secret and os.path.exists(layout.at(f"{folder}/{option.name}.cred")):
            lines.append(f"LoadCredentialEncrypted={option.name}:{folder}/{option.name}.cred")
        elif option.secret and os.path.exists(layout.at(f"{folder}/{option.name}")):
            lines.append(f"LoadCredential={option.name}:{folder}/{option.name}")
    if makes_passphrase:
        lines.append(f"LoadCredential=db-pass:{folder}/db-pass")
    return "".join(line + "\n" for line in lines)


def settings_of(layout: Layout) -> Options | None:
    """Return the settings of the mad.conf that is installed, or None where there is none."""
    path = layout.at(CONFIG + "/mad.conf")
    return load_options({"config": (path, "")}, {}) if os.path.exists(path) else None


def first_settings(layout: Layout) -> bytes:
    """Return the mad.conf of a new service: absolute paths, the log where the machine keeps its logs, daily backups."""
    wanted = {
        "db-file": "mad.db3", "seal-key-file": "seal.key", "token-signing-key-file": "token.pem",
        "admin-token-signing-key-file": "admin_token.pem", "backup-folder": "backups",
    }  # fmt: skip
    wanted = {name: f"{layout.data}/{file}" for name, file in wanted.items()}
    wanted["log-file"] = "" if has_systemd(layout) else layout.data + "/microauthd.log"
    wanted |= {name: value for name, value in (("backup-every", "daily"), ("backup-keep", "7")) if name in OPTION_NAMES}
    values = {OPTION_NAMES[name].attribute: OPTION_NAMES[name].parse(value) for name, value in wanted.items()}
    return write_config(Options(dict.fromkeys(wanted, "install"), **values)).encode()


def socket_unit(layout: Layout, side: str, answers: dict) -> bytes:
    """Return the socket unit of a port, with the address of mad.conf, or of the answers that will be in it."""
    options = settings_of(layout) or Options()
    given = {**answers, **answers.get("options", {})}
    ip, port = (
        OPTION_NAMES[name].parse(str(given.get(name, getattr(options, OPTION_NAMES[name].attribute))))
        for name in (f"{side}-ip", f"{side}-port")
    )
    address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    return fill(layout, f"microauthd-{side}.socket", ADDRESS=address, V6ONLY="both" if ip == "::" else "ipv6-only")


def needs_passphrase(layout: Layout, answers: dict) -> bool:
    """Return whether a passphrase of the database has to be made: nothing here has one, or says that there is none."""
    options = settings_of(layout)
    given = {**answers, **answers.get("options", {})}
    database = os.path.join(layout.data, options.db_file if options else "mad.db3")
    kept = layout.at(CONFIG + "/credentials/db-pass")
    return not (
        {"db-pass", "db-pass-file", "no-db-pass", "db-key-file"} & given.keys()
        or any(map(os.path.exists, (kept, kept + ".cred", layout.at(database))))
        or (options and (options.db_pass or options.no_db_pass or options.db_key_file))
    )


def text_files(layout: Layout, commands: dict[str, list[str]]) -> dict[str, tuple[bytes, int]]:
    """Return {path: (content, mode)} of every file but units that is ours alone. `commands` are words to complete."""
    import mad  # 20 ms, for this alone

    share = "/usr/local/share"
    files = {
        layout.prefix + "/microauthd": (fill(layout, "microauthd.sh"), 0o755),
        "/usr/local/bin/mad": (fill(layout, "mad.sh"), 0o755),
    }
    places = {
        "bash": share + "/bash-completion/completions/{}", "zsh": share + "/zsh/site-functions/_{}",
        "fish": share + "/fish/vendor_completions.d/{}.fish",
    }  # fmt: skip
    for shell, place in places.items():
        for program, script in (
            ("mad", mad.COMPLETIONS[shell](mad.COMMANDS)), ("microauthd", completion_script(shell, commands)),
        ):  # fmt: skip
            files[place.format(program)] = (f"{script}\n# Written by microauthd install.\n".encode(), 0o644)
    for topic in topics():
        if topic in ("microauthd", "mad", "mad.conf"):
            section = 5 if topic == "mad.conf" else 1
            page = manual_page(topic, section) + '.\\" Written by microauthd install.\n'
            files[f"{share}/man/man{section}/{topic}.{section}"] = (page.encode(), 0o644)
    return files


def unit_files(layout: Layout, answers: dict) -> dict[str, tuple[bytes, int]]:
    """Return {path: (content, mode)} of what starts the service: for systemd, OpenRC or runit, whichever is there."""
    if has_systemd(layout):
        folder, credentials = "/etc/systemd/system/", credential_lines(layout, needs_passphrase(layout, answers))
        files = {
            "/etc/sysusers.d/microauthd.conf": (fill(layout, "sysusers.conf"), 0o644),
            "/etc/tmpfiles.d/microauthd.conf": (fill(layout, "tmpfiles.conf"), 0o644),
            folder + SERVICE: (fill(layout, SERVICE, CREDENTIALS=credentials), 0o644),
        }
        for side in ("auth", "admin") if layout.sockets else ():
            files[f"{folder}microauthd-{side}.socket"] = (socket_unit(layout, side, answers), 0o644)
        return files
    if os.path.exists(layout.at("/sbin/openrc-run")):
        return {"/etc/init.d/microauthd": (fill(layout, "openrc/microauthd"), 0o755)}
    if os.path.isdir(layout.at("/etc/sv")):
        return {"/etc/sv/microauthd/run": (fill(layout, "runit/run"), 0o755)}
    return {}


def links(layout: Layout) -> dict[str, str]:
    """Return {path: what it leads to}: the command on the PATH, and what `systemctl enable` makes."""
    found = {"/usr/local/bin/microauthd": layout.prefix + "/microauthd"}
    if has_systemd(layout):
        wanted = "/etc/systemd/system/{}.wants/"
        found[wanted.format("multi-user.target") + SERVICE] = "/etc/systemd/system/" + SERVICE
        if layout.sockets:
            found |= {wanted.format("sockets.target") + name: "/etc/systemd/system/" + name for name in SOCKETS}
    elif os.path.exists(layout.at("/sbin/openrc-run")):
        found["/etc/runlevels/default/microauthd"] = "/etc/init.d/microauthd"
    return found


# == Installing ================================================================


def read_answers(path: str) -> tuple[bytes, dict]:
    """Return an answers file and what it says. Raises StartupError if the first start could not read what it names."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        document = tomllib.loads(content.decode())
    except OSError as error:
        raise StartupError(f"the answers file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartupError(f"the answers file {path}: {error}") from None
    tables = [table for value in document.values() for table in (value if isinstance(value, list) else [value])]
    for table in [document, *tables]:
        for key, value in table.items() if isinstance(table, dict) else ():
            names_a_file = key.endswith(("password_file", "secret_file", "db-pass-file", "claim_code_file"))
            if names_a_file and not os.path.isabs(str(value)):
                raise StartupError(f"{path}: {key} must be an absolute path: the set-up runs when the service starts")
    return content, document


def archive_step(layout: Layout, source: str, is_downgrade: bool) -> Iterator[Step]:
    """The program. Raises StartupError if it is older than the one that is there: see release.check_not_older()."""
    target = layout.at(layout.archive)
    with contextlib.suppress(OSError):
        if os.path.samefile(source, target) or filecmp.cmp(source, target, shallow=False):
            source = target
    if source == target and is_as_wanted(layout, target, 0o755, "root"):
        return
    if installed := read_release(target):
        check_not_older(installed, read_release(source) or THIS, is_downgrade)

    def do():
        make_folders(target)
        with open(source, "rb") as file:
            write_file(target, file.read(), 0o755, (0, 0))

    yield Step(f"copy {source} to {layout.archive}", do)


def plan(
    layout: Layout, source: str, answers: str, commands: dict[str, list[str]], is_downgrade: bool = False
) -> Iterator[Step]:
    """Yield the steps of an installation, in their order. Raises StartupError, before any of them, where one cannot be.
    """
    content, document = read_answers(answers) if answers else (b"", {})
    units = unit_files(layout, document)
    users = {path: units.pop(path) for path in list(units) if "sysusers" in path}
    for path, (text, mode) in users.items():
        yield from file_step(layout, path, text, mode)
    yield from user_step(layout)
    yield from folder_step(layout, CONFIG, 0o755, "root")
    yield from folder_step(layout, CONFIG + "/credentials", 0o750, "group")
    yield from data_step(layout)
    yield from archive_step(layout, source, is_downgrade)
    yield from folder_step(layout, layout.prefix + "/code", 0o755, "group")  # which may lock what it runs
    if settings_of(layout) is None:
        yield from file_step(layout, CONFIG + "/mad.conf", first_settings(layout), 0o640, "group")
    else:  # as it is, for the server to read
        with open(layout.at(CONFIG + "/mad.conf"), "rb") as file:
            yield from file_step(layout, CONFIG + "/mad.conf", file.read(), 0o640, "group")
    if needs_passphrase(layout, document):
        passphrase = secrets.token_urlsafe(24).encode() + b"\n"
        yield from file_step(layout, CONFIG + "/credentials/db-pass", passphrase, 0o640, "group")
    if answers:
        yield from file_step(layout, CONFIG + "/answers.toml", content, 0o600)
    for path, (text, mode) in {**text_files(layout, commands), **units}.items():
        yield from file_step(layout, path, text, mode)
    for path, to in links(layout).items():
        yield from link_step(layout, path, to)
    record = msgspec.structs.asdict(layout)
    del record["root"]
    yield from file_step(layout, RECORD, json.dumps(record, indent=1).encode() + b"\n")
    if layout.root == "/":
        selftest = functools.partial(run_program, layout.prefix + "/microauthd", "selftest")
        yield Step("unpack the program, and see that it works here", selftest)


@contextlib.contextmanager
def seen_before() -> Iterator[None]:
    """Say of what is looked at for the plan that it cannot be: nothing was done yet. Raises StartupError."""
    try:
        yield
    except OSError as error:
        hint = ": only root can see it" if error.errno == errno.EACCES and os.geteuid() else ""
        raise StartupError(f"{error.filename} cannot be looked at: {error.strerror}{hint}") from None


class Request(msgspec.Struct, frozen=True):
    """What the command line asks for."""

    layout: Layout
    answers: str = ""
    yes: bool = False
    dry_run: bool = False
    purge: bool = False
    downgrade: bool = False


def agree(request: Request, steps: list[Step], question: str) -> bool:
    """Say the steps, and ask on a terminal whether to go on. Raises StartupError where nobody can be asked."""
    for step in steps:
        print(f"  {step.text}")
    if request.dry_run:
        print("nothing was done: --dry-run")
        return False
    if os.geteuid():
        raise StartupError("this needs root: run it by sudo, or look at it with --dry-run")
    if request.yes:
        return True
    if not sys.stdin.isatty():
        raise StartupError("without a terminal --yes says that this is meant; nothing was done")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was done")
        return False
    return True


def carry_out(steps: list[Step]):
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise StartupError(
                f"cannot {step.text}: {error.strerror or error}; what was done before stays, and doing it again goes on"
            ) from None


def is_set_up(layout: Layout) -> bool:
    options = settings_of(layout)
    return options is not None and os.path.exists(layout.at(os.path.join(layout.data, options.db_file)))


def waits_for_claim(layout: Layout) -> bool:
    """Return whether the first start opens a page on which the box is set up."""
    answers = layout.at(CONFIG + "/answers.toml")
    return not is_set_up(layout) and os.path.exists(answers) and read_answers(answers)[1].get("web") is True


def start_service(layout: Layout):
    """Tell systemd of the units, and start or restart the service. Raises StartupError with where to look."""
    waits = waits_for_claim(layout)
    run_program("systemctl", "daemon-reload")
    run_program("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/microauthd.conf")
    try:
        if layout.sockets:  # a socket unit does not start while its service runs on a port of its own
            run_program("systemctl", "stop", SERVICE)
            run_program("systemctl", "start", *SOCKETS)
        run_program("systemctl", "restart", *(["--no-block"] if waits else []), SERVICE)
    except StartupError as error:
        raise StartupError(f"{error}; journalctl -u microauthd tells more") from None
    if waits:
        print(f"microauthd waits to be claimed in a browser: {layout.data}/claim.txt tells where, and the code")
        return
    print("microauthd is running: systemctl status microauthd, journalctl -u microauthd")


def say_how_to_start(layout: Layout):
    """Say what starts the service, where systemd does not."""
    if layout.root != "/":
        print(f"installed into {layout.root}: it starts when that system does")
    elif has_systemd(layout):
        print("systemd is not running here: the service starts when the machine does")
    elif os.path.exists("/sbin/openrc-run"):
        print("start it with rc-service microauthd start")
    elif os.path.isdir("/etc/sv"):
        print("start it with ln -s /etc/sv/microauthd /var/service/, or where this runit looks for services")
    else:
        program = f"{layout.prefix}/microauthd"
        print(
            "there is no systemd, OpenRC or runit here, so nothing starts the server by itself: have the machine run, "
            f"as root, {program} setup --first-start --answers {CONFIG}/answers.toml && {program} serve, which becomes "
            f"{layout.user}"
        )


def install(request: Request, source: str, commands: dict[str, list[str]]) -> int:
    """Install the archive `source` as a service, repair what is installed, or bring it up to date.

    Return the exit status. `commands` are the words that the shells complete: see help.completion_script().
    Raises StartupError, with nothing done where it is of the plan.
    """
    layout = request.layout
    if not source:
        raise StartupError("install copies the archive microauthd.pyz, and this runs from a folder: build/pyz makes it")
    check_layout(layout)
    with seen_before():
        steps = list(plan(layout, source, request.answers, commands, request.downgrade))
    if not agree(request, steps, "Install this?"):
        return 0
    carry_out(steps)
    wrapper = layout.prefix + "/microauthd"
    if any("/credentials/db-pass" in step.text for step in steps):
        print(
            f"the passphrase of the database is in {CONFIG}/credentials/db-pass: keep a copy elsewhere, for without it "
            "no backup can be read"
        )
    can_be_asked = layout.root == "/" and not is_set_up(layout) and not os.path.exists(CONFIG + "/answers.toml")
    if can_be_asked and (request.yes or subprocess.run([wrapper, "setup"]).returncode):
        print("set it up with microauthd setup, and start it after that: it does not serve before")
        return 0
    if is_running_systemd(layout):
        start_service(layout)
    else:
        say_how_to_start(layout)
    return 0


# == Uninstalling ==============================================================


def remove_code(folder: str):
    """Remove the unpacked programs: see build/main.py. Another file in their folder is not ours, and keeps it."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(("tree.", "tmp.")):
            shutil.rmtree(path)
        elif name == ".lock":
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def purge_steps(layout: Layout) -> Iterator[Step]:
    """Yield the steps that remove settings, data and user. Raises StartupError for a folder that is not the server's:
    a mistyped --data would remove what is somebody else's.
    """
    data, user = layout.at(layout.data), user_of(layout)
    if os.path.isdir(data) and os.listdir(data) and os.lstat(data).st_uid != (user[0] if user else -1):
        raise StartupError(f"{data} does not belong to the user {layout.user}: it is no data of this service")
    for path in (layout.data, CONFIG):
        if os.path.isdir(layout.at(path)) and not os.path.islink(layout.at(path)):
            yield Step(f"remove {path} with all that is in it", functools.partial(shutil.rmtree, layout.at(path)))
    if os.path.lexists(layout.at(ERRORS)):
        yield Step(f"remove {ERRORS}", functools.partial(remove_file, layout.at(ERRORS)))
    if user and user[2] == layout.data:  # as user_step() makes it: not one that was there before
        root = [] if layout.root == "/" else ["--root", layout.root]
        name = "userdel" if shutil.which("userdel") else "deluser"
        yield Step(f"remove the user {layout.user}", functools.partial(run_program, name, *root, layout.user))


def removal(layout: Layout, purge: bool, commands: dict[str, list[str]]) -> Iterator[Step]:
    """Yield the steps that take a service away. What somebody else has put in place of a file of ours stays."""
    if is_running_systemd(layout):
        names = [name for name in (SERVICE, *SOCKETS) if os.path.exists("/etc/systemd/system/" + name)]
        if names:
            yield Step(f"stop {' '.join(names)}", functools.partial(run_program, "systemctl", "stop", *names))
    with_sockets = msgspec.structs.replace(layout, sockets=True)
    for path, to in links(with_sockets).items():
        target = layout.at(path)
        if os.path.islink(target) and os.readlink(target) == to:
            yield Step(f"remove {path}", functools.partial(remove_file, target))
    for path in (*unit_files(with_sockets, {}), *text_files(layout, commands)):
        target = layout.at(path)
        with contextlib.suppress(OSError):
            with open(target, "rb") as file:
                is_ours = OURS in file.read()
            if is_ours:
                yield Step(f"remove {path}", functools.partial(remove_file, target))
    # What an upgrade has left: the release before, and of one that was interrupted its copy and its journal.
    for path in (layout.archive, *(layout.archive + end for end in (".previous", ".new", ".upgrade", ".lock")), RECORD):
        if os.path.lexists(layout.at(path)):
            yield Step(f"remove {path}", functools.partial(remove_file, layout.at(path)))
    code = layout.at(layout.prefix + "/code")
    if os.path.isdir(code):
        yield Step(f"remove {layout.prefix}/code", functools.partial(remove_code, code))
    if purge:
        yield from purge_steps(layout)


def uninstall(request: Request, commands: dict[str, list[str]]) -> int:
    """Take the service away; the settings and the data stay, but with `purge`. Return the exit status."""
    layout = request.layout
    check_layout(layout)
    with seen_before():
        steps = list(removal(layout, request.purge, commands))
    if not steps:
        print("nothing of an installation is here")
        return 0
    question = "Remove this, and every account and key with it?" if request.purge else "Remove this?"
    if not agree(request, steps, question):
        return 0
    carry_out(steps)
    with contextlib.suppress(OSError):
        os.rmdir(layout.at(layout.prefix))
    if is_running_systemd(layout):
        run_program("systemctl", "daemon-reload")
    if not request.purge:
        print(f"{layout.data}, {CONFIG} and the user {layout.user} are left as they are: --purge removes them too")
    return 0
