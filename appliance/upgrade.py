"""A new release in place of this one: checked, tried, and taken back if it does not become ready."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from appliance.base import StartupError
from appliance.base.clock import sleep
from appliance.base.files import close_lock, open_lock, open_owned, read_owned, show_path, sync_directory, write_durably
from appliance.base.settings import Options, take_secrets
from appliance.base.wal import forget_mark
from microauthd import HERE, VERSION
from appliance.release import THIS, check_not_older, get_release, read_release
from appliance.backup import backup_files
from appliance.status import TRIAL_SUFFIX, list_children
from appliance.processes import ACCEPTED, GOING_BACK, READY, TRIED, ask_ready, find_server, fork_as, hold_database
from appliance.recovery import COPY_SUFFIX, back_up, hold_setup, require_owner

# == Archive ===================================================================
# What is checked of a new archive before anything changes.

TRUSTED_KEYS = "/etc/microauthd/trusted-keys"
COPY_SIZE = 1 << 20
CHECK_SECONDS = 900  # for the new archive to unpack itself and to check itself, on a slow board; nothing waits for it


def parse_trusted_keys(content: str, where: str) -> list[bytes]:
    """Return the raw public keys of lines `ed25519 BASE64 comment`. Raises StartupError."""
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = base64.b64decode(words[1], validate=True) if words[0] == "ed25519" else b""
        except (ValueError, IndexError):
            key = b""
        if len(key) != 32:
            raise StartupError(f"{where}:{number}: not a line of the form: ed25519 KEY comment")
        keys.append(key)
    return keys


def read_trusted_keys(path: str) -> list[bytes]:
    """Return the public keys that may sign an archive: those of a file, and those that this program was built with."""
    keys: list[bytes] = []
    for name in (path or TRUSTED_KEYS, str(HERE / "appliance" / "trusted-keys")):
        try:
            keys += parse_trusted_keys(read_owned(name).decode("utf-8", "replace"), name)
        except FileNotFoundError:
            if name == path:
                raise StartupError(f"the keys {path} are not there") from None
        except OSError as error:
            raise StartupError(f"the keys {name} cannot be read: {error.strerror}") from None
    return keys


def check_signature(digest: str, signature: bytes, keys: list[bytes]):
    """Raise StartupError unless one of the keys signed the archive with this SHA-256, in hexadecimal.

    `signature` is the base64 of an Ed25519 signature of one line with that digest. RFC 8032 §5.1
    """
    try:
        raw = base64.b64decode(signature.strip(), validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 64:
        raise StartupError("the signature is damaged: it is not the base64 of 64 octets")
    for key in keys:
        with contextlib.suppress(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(key).verify(raw, f"microauthd-archive-v1 {digest}\n".encode())
            return
    raise StartupError(
        "the signature is not of this archive, or by none of the keys that are trusted here"
        if keys else f"no key is trusted here: there is no {TRUSTED_KEYS}"
    )


def copy_archive(source: str, target: str) -> str:
    """Copy an archive beside the installed one, and return the SHA-256 of the copy in hexadecimal.

    What is checked from here on is the copy, which nobody else can change, and the copy is what is installed.
    """
    digest = hashlib.sha256()
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        with (
            open(source, "rb") as archive,
            os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy,
        ):
            while piece := archive.read(COPY_SIZE):
                digest.update(piece)
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:
        raise StartupError(f"{source} cannot be copied to {target}: {error.strerror}") from None
    return digest.hexdigest()


def run_archive(archive: str, *words: str, environ: Mapping[str, str]):
    """Run a command of an archive. Raises StartupError if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", archive, *words], env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise StartupError(f"{words[0]} of the new archive did not end in {CHECK_SECONDS} seconds") from None
    if done.returncode:
        told = (done.stdout + done.stderr).strip().splitlines()
        raise StartupError(f"{words[0]} of the new archive fails: " + " | ".join(told[-3:] or ["it says nothing"]))


def check_program(archive: str, environ: Mapping[str, str]):
    """Run the self-test of a new archive. Raises StartupError if it fails."""
    cache = archive + ".unpacked"
    shutil.rmtree(cache, ignore_errors=True)  # of an upgrade that was killed
    os.mkdir(cache, 0o700)
    try:
        environ = {name: value for name, value in environ.items() if not name.upper().startswith("MAD_")}
        environ |= {"MICROAUTHD_CACHE": cache}
        run_archive(archive, "selftest", environ=environ)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


# == Data ======================================================================
# What is done in the folder of the database, as the user who owns it: root opens nothing there. It runs in a process
# of its own, `upgrade --at-data`, of the old program, which takes one JSON object a line and answers with one. It ends
# with the upgrade, whatever ends that, and its locks with it.

STOP_SECONDS = 30


def copied_files(options: Options) -> list[str]:
    """Return the files that a new release may change: the database first."""
    keys = [path for name, path in backup_files(options).items() if name != "config"]
    return [os.path.abspath(path) for path in (options.db_file, options.db_file + "-wal", *keys)]


def put_back(options: Options):
    """Put the copies back. May be repeated after an interruption. The caller holds the lock of the database."""
    database, *others = copied_files(options)
    forget_mark(database)
    if os.path.exists(database + COPY_SUFFIX):
        for suffix in ("-wal", "-shm"):  # of the database that is replaced
            with contextlib.suppress(FileNotFoundError):
                os.unlink(database + suffix)
    for path in (database, *others):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + COPY_SUFFIX, path)
            sync_directory(os.path.dirname(path))


def remove_copies(options: Options):
    for path in copied_files(options):
        for name in (path + COPY_SUFFIX, path + COPY_SUFFIX + ".new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def read_trial(options: Options) -> bytes:
    """Return the state of an upgrade of the database, empty if there is none."""
    try:
        return read_owned(options.db_file + TRIAL_SUFFIX)[:1]
    except FileNotFoundError:
        return b""


def recover_upgrade(options: Options):
    """Finish going back, if an upgrade was interrupted in that, before the database is opened by a start."""
    if read_trial(options) != GOING_BACK:
        return
    with hold_database(options.db_file), open(options.db_file + TRIAL_SUFFIX, "r+b") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError("an upgrade is going back right now: wait until it is done") from None
        put_back(options)
        # This program serves now, and what it answers counts, whichever of the two it is.
        os.pwrite(state.fileno(), ACCEPTED, 0)
        os.fsync(state.fileno())


def stop_process(pid: int):
    """Send SIGTERM, and wait until the process has ended. Raises StartupError if it does not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError as error:
        raise StartupError(f"the server, process {pid}, cannot be stopped: {error.strerror}") from None
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not select.select([descriptor], [], [], STOP_SECONDS)[0]:
            raise StartupError(f"the server, process {pid}, does not end on SIGTERM")
    except ProcessLookupError:
        pass
    except OSError as error:
        raise StartupError(f"the server, process {pid}, cannot be stopped: {error.strerror}") from None
    finally:
        os.close(descriptor)


class DataSide:
    """The part of an upgrade that works on the data. Each public method is a step, whose keywords come as JSON."""

    def __init__(self, options: Options):
        self.options, self.path = options, options.db_file + TRIAL_SUFFIX
        self.locks, self.database = contextlib.ExitStack(), contextlib.ExitStack()
        self.is_held = self.is_alone = False  # whether each of them is held
        self.state = -1  # descriptor of the file with the state, which is locked

    def enter(self, stack: contextlib.ExitStack, lock: Callable[[], contextlib.AbstractContextManager]):
        """Enter a lock as soon as others leave it. Raises StartupError if they do not."""
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                stack.enter_context(lock())
                return
            except StartupError:
                if time.monotonic() > deadline:
                    raise
                sleep(0.02)

    def keep_others_off(self):
        """Wait until the server has ended, and hold the lock of the database, and that of commands."""
        # The folder of mad.conf may be root's, and takes no lock file then.
        with contextlib.suppress(OSError):
            if not self.is_held:
                self.enter(self.locks, lambda: hold_setup(self.options.config_file))
                self.is_held = True
        if not self.is_alone:
            self.enter(self.database, lambda: hold_database(self.options.db_file))
            self.is_alone = True

    def describe(self) -> dict:
        options = self.options
        require_owner(options)
        size = sum(os.path.getsize(path) for path in copied_files(options) if os.path.exists(path))
        room = os.statvfs(os.path.dirname(os.path.abspath(options.db_file)))
        return {
            "pid": find_server(options.db_file), "size": size, "free": room.f_bavail * room.f_frsize,
            "state": read_trial(options).decode("ascii", "replace"), "database": os.path.abspath(options.db_file),
            "is_container": options.docker, "uid": os.geteuid(),
        }

    def stop(self, pid: int) -> dict:
        """Stop a server that is no unit. Here, since a user can end only what is the user's."""
        stop_process(pid)
        return {}

    def back_up(self) -> dict:
        options = self.options
        folder = os.path.abspath(options.backup_folder or os.path.dirname(os.path.abspath(options.db_file)))
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        path = os.path.join(folder, time.strftime(f"microauthd-before-upgrade-{VERSION}-%Y%m%dT%H%M%SZ.backup"))
        return {"path": path, **back_up(options, path, without_keys=options.no_db_pass, kind="upgrade")}

    def hold(self) -> dict:
        """Wait until the server has ended, keep others off the files, and copy them. They are held until release()."""
        options = self.options
        self.keep_others_off()
        remove_copies(options)
        for path in copied_files(options):
            if os.path.exists(path) and (not path.endswith("-wal") or os.path.getsize(path)):
                with (
                    os.fdopen(open_owned(path), "rb") as source,
                    os.fdopen(
                        os.open(path + COPY_SUFFIX + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
                    ) as copy,
                ):
                    shutil.copyfileobj(source, copy, COPY_SIZE)
                    copy.flush()
                    os.fsync(copy.fileno())
                os.replace(path + COPY_SUFFIX + ".new", path + COPY_SUFFIX)
                sync_directory(os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.state = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.note(TRIED)
        sync_directory(os.path.dirname(os.path.abspath(self.path)))
        return {}

    def note(self, state: bytes):
        os.pwrite(self.state, state, 0)
        os.fsync(self.state)

    def release(self) -> dict:
        """Let a server start."""
        self.database.close()
        self.is_alone = False
        return {}

    def await_ready(self, seconds: float) -> dict:
        """Wait until a server is ready on the database, as long as that. Return its pid, or why it is not ready."""
        deadline, reason = time.monotonic() + seconds, "no server has started"
        while True:
            pid = find_server(self.options.db_file)
            if pid > 0:
                checks, _ = ask_ready(self.options, pid)
                children = self.options.worker_processes + 1 if self.options.worker_processes else 0
                serves = self.state < 0 or os.pread(self.state, 1, 1) == READY
                if all(checks.values()) and serves and len(list_children(pid)) >= children:
                    return {"pid": pid, "reason": ""}
                lacks = sorted(name for name, good in checks.items() if not good) + ([] if serves else ["processes"])
                reason = "not ready: " + ", ".join(lacks)
            if time.monotonic() > deadline:
                return {"pid": 0, "reason": reason}
            sleep(0.1)

    def accept(self) -> dict:
        """Decide that the new release stays. From here on it answers everything, and nothing may go back."""
        self.note(ACCEPTED)
        return {}

    def claim(self) -> dict:
        """Take over the state of an upgrade that was interrupted, and return it: from here on nothing is accepted."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            self.state = open_owned(self.path, os.O_RDWR)
        except FileNotFoundError:
            return {"state": ""}
        while True:
            try:
                fcntl.flock(self.state, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return {"state": os.pread(self.state, 1, 0).decode("ascii", "replace")}
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StartupError("another upgrade is running") from None
                sleep(0.02)

    def go_back(self) -> dict:
        """Put the files back, once the server has ended. They are held until release()."""
        if self.state < 0 and self.claim()["state"].encode() == ACCEPTED:
            raise StartupError("the new release has answered already, and is not taken back")
        self.keep_others_off()
        self.note(GOING_BACK)
        put_back(self.options)
        return {}

    def clear(self) -> dict:
        """Remove the copies and the state: the upgrade is over."""
        remove_copies(self.options)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        if self.state >= 0:
            os.close(self.state)
            self.state = -1
        self.locks.close()
        self.is_held = False
        return self.release()


STEPS = ("describe", "back_up", "stop", "hold", "release", "await_ready", "accept", "claim", "go_back", "clear")


def serve_steps(options: Options) -> int:
    """Run the steps that come on standard input until it ends. Each is answered with `error` or what it returns."""
    side = DataSide(options)
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            if wanted["step"] not in STEPS:
                raise StartupError(f"there is no step {wanted['step']}")
            answer = getattr(side, wanted["step"])(**wanted["with"])
        except (StartupError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


class DataProcess:
    """The process that works on the data. `call()` runs a step there."""

    def __init__(self, archive: str, settings: list[str], environ: Mapping[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-I", archive, "upgrade", "--at-data", "-", *settings], env=dict(environ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,  # Ctrl-C is for the upgrade alone
        )

    def call(self, step: str, **more) -> dict:
        """Run a step; return its result. Raises StartupError."""
        assert self.process.stdin and self.process.stdout
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"step": step, "with": more}).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise StartupError(f"the work on the data ended in the step {step}, with status {self.process.wait()}")
        found = json.loads(answer)
        if "error" in found:
            raise StartupError(found["error"])
        return found

    def await_end(self):
        """Wait in another process than the one that began it, which is dead, until the step that it is in is over."""
        with contextlib.suppress(OSError):
            self.process.stdin and self.process.stdin.close()  # our copy of what tells it to end
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.process.pid)
            select.select([descriptor], [], [])
            os.close(descriptor)

    def end(self):
        with contextlib.suppress(OSError):
            self.process.stdin and self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


# == Server ====================================================================
# How the server runs, so that it can be stopped and started as it was.

# What starts a service again that has ended, by the names of proc_pid_comm(5).
SUPERVISORS = ("runsv", "s6-supervise", "supervise", "supervise-daemo", "supervisord", "daemontools", "dinit", "runit")


class Running(msgspec.Struct):
    """How a server was started. `kind` is unit (of systemd), supervised (something else starts it again), process or
    none (it does not run).
    """

    kind: str
    pid: int = 0
    unit: str = ""
    is_user_unit: bool = False
    sockets: list[str] = []
    argv: list[str] = []
    folder: str = ""
    environ: dict[str, str] = {}  # without secrets
    uid: int = 0
    gid: int = 0
    groups: list[int] = []
    outputs: list[str] = []  # the files that its standard output and error go to, empty for anything else


SYSTEMCTL_SECONDS = 660  # more than TimeoutStartSec= of the unit twice: for what runs before the start, and for that


def systemctl(running: Running, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["systemctl", *(["--user"] if running.is_user_unit else []), *words], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", timeout=SYSTEMCTL_SECONDS,
    )


def find_unit(pid: int) -> Running | None:
    """Return the unit of systemd whose main process this is, or None."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2)[2] for line in file]
    except OSError:
        return None
    for group in groups:
        unit = group.rpartition("/")[2]
        if not unit.endswith(".service") or not shutil.which("systemctl"):
            continue
        running = Running("unit", pid, unit, "/user@" in group)
        shown = systemctl(running, "show", "--property=MainPID,TriggeredBy", unit).stdout.splitlines()
        found = dict(line.split("=", 1) for line in shown if "=" in line)
        if found.get("MainPID") == str(pid):
            running.sockets = [name for name in found.get("TriggeredBy", "").split() if name.endswith(".socket")]
            return running
    return None


def read_status_lines(pid: int) -> dict[str, list[str]]:
    with open(f"/proc/{pid}/status") as file:
        return {line.partition(":")[0]: line.partition(":")[2].split() for line in file}


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    rest = dict(environ)
    take_secrets(rest, "MAD_")
    return rest


def read_environ(pid: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server without its secrets. Raises StartupError for a secret that is not given here.

    The server has overwritten their values, so that no other process can read them.
    """
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = [os.fsdecode(entry).partition("=") for entry in file.read().split(b"\0") if b"=" in entry]
    found = {name: value for name, _, value in pairs}
    rest = without_secrets(found)
    for name in found.keys() - rest.keys():
        if name not in environ:
            raise StartupError(
                f"the server was given {name} in its environment, where no other process can read it: give it to this "
                "command too, or stop the server first, and start it yourself afterwards"
            )
    return rest


def runs_from(archive: str, argv: list[str], folder: str) -> bool:
    for word in argv:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samefile(os.path.join(folder, word), archive):
                return True
    return False


def find_running(pid: int, uid: int, archive: str, environ: Mapping[str, str]) -> Running:
    """Return how a server runs, which a file of the user `uid` names.

    Raises StartupError if it runs from another file or as another user, or cannot be started as it was.
    """
    if pid <= 0:
        if pid:
            raise StartupError("a server runs on the database, in another container: stop it first")
        return Running("none")
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            argv = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        folder, status = os.readlink(f"/proc/{pid}/cwd"), read_status_lines(pid)
        if not runs_from(archive, argv, folder):
            raise StartupError(f"the server that runs, process {pid}, was not started from {archive}: stop it first")
        if int(status["Uid"][1]) != uid:
            raise StartupError(f"process {pid}, the server, runs as user {status['Uid'][1]}, and its data are of {uid}")
        if unit := find_unit(pid):
            return unit
        with open(f"/proc/{status['PPid'][0]}/comm") as file:
            parent = file.read().strip()
        outputs = []
        for number in (1, 2):
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            outputs.append(target if os.path.isabs(target) and os.path.exists(target) else "")
        return Running(
            "supervised" if parent in SUPERVISORS else "process", pid, argv=argv, folder=folder,
            environ=read_environ(pid, environ), uid=int(status["Uid"][1]), gid=int(status["Gid"][1]),
            groups=[int(word) for word in status["Groups"]], outputs=outputs,
        )
    except OSError as error:
        raise StartupError(f"process {pid}, the server, cannot be looked at: {error.strerror}") from None


def stop_unit(running: Running):
    """Stop a unit of systemd, its sockets first: a connection would start it while its files are copied."""
    done = systemctl(running, "stop", *running.sockets, running.unit)
    if done.returncode:
        raise StartupError(f"systemctl stop {running.unit}: {done.stderr.strip() or done.returncode}")


def start_server(running: Running, environ: Mapping[str, str]) -> subprocess.Popen | None:
    """Start the server as it was. Return its process if it is a child of this one. Raises StartupError."""
    if running.kind == "unit":
        systemctl(running, "reset-failed", running.unit)
        done = systemctl(running, "start", *running.sockets, running.unit)
        if done.returncode:
            raise StartupError(f"systemctl start {running.unit}: {done.stderr.strip() or done.returncode}")
    if running.kind != "process":
        return None  # what supervises it starts it
    secrets = {name: environ[name] for name in environ.keys() - without_secrets(environ).keys()}
    changes: dict[str, Any] = {}
    if not os.geteuid() and running.uid:
        changes = {"user": running.uid, "group": running.gid, "extra_groups": running.groups}
    # The user's shell opens the outputs, since root would follow a link that the user could have made.
    script = 'test -w "$1" && exec >>"$1"; test -w "$2" && exec 2>>"$2"; shift 2; exec "$@"'
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *running.outputs, *running.argv], cwd=running.folder,
            env=running.environ | secrets, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, **changes,
        )
    except OSError as error:
        raise StartupError(f"{running.argv[0]} cannot be started: {error.strerror}") from None


# == Upgrade ===================================================================
# The installed file is replaced in one rename. A journal beside it tells the next call what an interrupted one began.


class Journal(msgspec.Struct):
    """What an upgrade has begun."""

    old: str  # versions
    new: str
    running: Running
    started: int = 0  # the process of the new release, where it is no unit: it may not have the database open yet


def is_started(journal: Journal) -> bool:
    """Return whether the process that the upgrade has started runs, and not another one that got its id."""
    argv = journal.running.argv
    with contextlib.suppress(OSError), open(f"/proc/{journal.started}/cmdline", "rb") as file:
        words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        return bool(argv) and words[-len(argv) :] == argv  # below the shell of start_server(), for an instant
    return False


class Upgrade:
    """One call of `microauthd upgrade`, which replaces `archive`. `program` is the file that this process runs from.

    `checkpoint` is called between the steps.
    """

    def __init__(
        self, archive: str, program: str, settings: list[str], environ: Mapping[str, str], wait: int,
        checkpoint: Callable[[str], object] = lambda name: None,
    ):
        self.archive, self.environ, self.wait, self.checkpoint = archive, environ, wait, checkpoint
        self.settings, self.guard, self.guard_pid = settings, -1, 0
        self.staged, self.previous, self.journal = archive + ".new", archive + ".previous", archive + ".upgrade"
        self.data = DataProcess(program, settings, environ)

    # -- before anything changes --

    def check(self, source: str, is_unsigned: bool, keys: str, is_downgrade: bool) -> str:
        """Copy a new archive beside the installed one and check the copy. Return its version. Raises StartupError."""
        signature = b""
        if not is_unsigned:
            try:
                with open(source + ".sig", "rb") as file:
                    signature = file.read(4096)
            except OSError as error:
                raise StartupError(
                    f"the signature {source}.sig cannot be read ({error.strerror}): --unsigned does without one"
                ) from None
        if not os.path.isfile(source):
            raise StartupError(f"there is no file {source}")
        room, needed = os.statvfs(os.path.dirname(self.archive)), os.path.getsize(source)
        if room.f_bavail * room.f_frsize < 6 * needed:  # the copy, and what it is unpacked to
            raise StartupError(f"there is no room for the new archive beside {self.archive}")
        digest = copy_archive(source, self.staged)
        if not is_unsigned:
            check_signature(digest, signature, read_trusted_keys(keys))
        os.chmod(self.staged, os.stat(self.archive).st_mode & 0o777)
        new = get_release(self.staged)
        check_not_older(read_release(self.archive) or THIS, new, is_downgrade)  # before anything of it is run
        check_program(self.staged, self.environ)
        return new.version

    # -- the change --

    def keep_previous(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.previous)
        os.link(self.archive, self.previous)

    def replace(self, source: str):
        """Install a file by one rename, keeping `source` where that is the previous one."""
        if source == self.previous:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.staged)
            os.link(self.previous, self.staged)
        os.replace(self.staged, self.archive)
        sync_directory(os.path.dirname(self.archive))

    def stop(self, running: Running, pid: int):
        """Stop the server, and what would start it again. Raises StartupError."""
        if running.kind == "unit":
            stop_unit(running)
        elif pid > 0 and running.kind != "none":
            self.data.call("stop", pid=pid)

    def start(self, journal: Journal) -> str:
        """Start the server, and wait until it is ready. Return why it is not, if so."""
        running = journal.running
        if running.kind == "none":
            return ""
        try:
            process = start_server(running, self.environ)
        except StartupError as refusal:
            return str(refusal)
        if process:
            journal.started = process.pid
            write_durably(self.journal, msgspec.json.encode(journal))
        deadline = time.monotonic() + self.wait
        while True:
            reason = self.data.call("await_ready", seconds=0.5)["reason"]
            if process and process.poll() is not None:
                return f"the server ended with status {process.returncode}; its log says why"
            if not reason or time.monotonic() > deadline:
                return reason

    def try_new(self, journal: Journal) -> str:
        """Stop the old server, replace the archive, start the new one. Return why it is not ready, if so."""
        self.stop(journal.running, journal.running.pid)
        self.checkpoint("stopped")
        self.data.call("hold")
        self.checkpoint("held")
        self.replace(self.staged)
        self.checkpoint("replaced")
        self.data.call("release")
        self.checkpoint("released")
        failure = self.start(journal)
        self.checkpoint("started")
        return failure

    def take_back(self, journal: Journal) -> str:
        """Put the old archive and the old data back, and start the old server. Return why it is not ready, if so.

        Where the data were not copied yet, they were not changed either.
        """
        found = self.data.call("describe")
        self.stop(journal.running, found["pid"])
        if is_started(journal):
            self.data.call("stop", pid=journal.started)
        self.checkpoint("stopped again")
        if self.data.call("describe")["state"]:
            self.data.call("go_back")
        self.checkpoint("data back")
        if os.path.exists(self.previous):
            self.replace(self.previous)
        self.checkpoint("archive back")
        self.data.call("clear")
        self.checkpoint("cleared")
        failure = self.start(journal)
        self.finish()
        return failure

    def finish(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.journal)
        sync_directory(os.path.dirname(self.archive))

    def run(self, journal: Journal) -> str:
        """Upgrade, or go back. Return why it went back, if so. Raises StartupError if neither could be done."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # from here to the end, whoever closes the terminal
        self.keep_previous()
        write_durably(self.journal, msgspec.json.encode(journal))
        self.leave_guard()
        self.checkpoint("journal")
        try:
            failure = self.try_new(journal)
            if not failure:
                self.data.call("accept")
                self.checkpoint("accepted")
        except (StartupError, OSError, subprocess.SubprocessError) as error:
            failure = str(error)
        if failure:
            again = self.take_back(journal)
            if again:
                raise StartupError(f"{failure}; the old release and its data are back, and not ready: {again}")
            return failure
        self.data.call("clear")
        self.checkpoint("done")
        self.finish()
        return ""

    def resume(self) -> str:
        """Finish what an interrupted upgrade has begun. Return what was done, "" if there was nothing to do."""
        try:
            journal = msgspec.json.decode(read_owned(self.journal), type=Journal)
        except FileNotFoundError:
            return ""
        except (OSError, msgspec.MsgspecError) as error:
            raise StartupError(f"the journal {self.journal} cannot be read: {error}; look at it") from None
        state, is_old = self.data.call("describe")["state"].encode(), os.path.samefile(self.archive, self.previous)
        if state and state != ACCEPTED:  # a new release that serves would accept itself any moment
            state = self.data.call("claim")["state"].encode()
        # Without a state nothing was begun, or all was done but for the journal.
        if state == ACCEPTED or (not state and not is_old):
            self.data.call("clear")
            self.finish()
            how = f"{journal.old} is back" if is_old else "is finished"
            return f"an upgrade from {journal.old} to {journal.new} was interrupted, and {how}"
        failure = self.take_back(journal)
        if failure:
            raise StartupError(f"the old release and its data are back, and its server is not ready: {failure}")
        return f"an upgrade from {journal.old} to {journal.new} was interrupted, and {journal.old} is back"

    def leave_guard(self):
        """Start a process that takes the upgrade back, or finishes it, if this one is killed.

        It waits for the end of a pipe that this process alone holds. A word on that says that nothing is left to do.
        """
        reading, writing = os.pipe()

        def watch():
            os.setsid()  # whoever kills the group of this one, or closes its terminal, leaves that one alone
            os.close(writing)
            if not os.read(reading, 1):
                self.data.await_end()
                self.finish_after_death()

        self.guard, self.guard_pid = writing, fork_as(None, watch)
        os.close(reading)

    def finish_after_death(self):
        """Do what the next call would, by the old program, since the new one may not even run; say what was done."""
        try:
            again = Upgrade(self.archive, self.previous, self.settings, self.environ, self.wait)
            try:
                done = again.resume()
            finally:
                again.end()
        except (StartupError, OSError, subprocess.SubprocessError) as error:
            done = str(error)
        if done:
            print(f"microauthd: {done}", file=sys.stderr, flush=True)

    def end(self):
        """End what works on the data and the guard, and remove the copy of the archive."""
        self.data.end()
        if self.guard >= 0:
            os.write(self.guard, b".")
            os.close(self.guard)
            os.waitpid(self.guard_pid, 0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.staged)


def confirm(plan: str) -> bool:
    """Print what will be done, and ask whether to go on. Raises StartupError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise StartupError(f"{plan}. There is no terminal to ask on: --yes says that this is meant")
    return input(f"{plan}. Go on? [y/N] ").strip().lower() in ("y", "yes")


def describe_restart(running: Running) -> str:
    return {
        "unit": f"the unit {running.unit} is restarted", "process": f"the server, process {running.pid}, is restarted",
        "supervised": f"the server, process {running.pid}, ends, and what supervises it starts it again",
        "none": "no server runs, and none is started",
    }[running.kind]


WENT_BACK, UNDONE = 3, 4  # exit statuses


@contextlib.contextmanager
def hold_archive(archive: str, seconds: float | None = None):
    """Keep other upgrades of an archive off: they have the same copy, whose check would be of another file than the one
    that is installed. Raises StartupError if one runs for longer than that, STOP_SECONDS by default.

    A process that is forked in here holds it too, such as the guard of an upgrade that was killed.
    """
    path, deadline = archive + ".lock", time.monotonic() + (STOP_SECONDS if seconds is None else seconds)
    while True:
        try:
            descriptor = open_lock(path, shared=False)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StartupError(f"another upgrade of {archive} is running") from None
            sleep(0.1)
        except OSError as error:
            raise StartupError(f"{os.path.dirname(archive)} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        close_lock(path, descriptor)


def upgrade_alone(work: Upgrade, source: str, flags: list[str], keys: str) -> int:
    """Do what upgrade() says, while no other upgrade runs."""
    has_begun = True
    try:
        if done := work.resume():
            print(f"{done}; run this again to upgrade")
            return WENT_BACK if done.endswith("is back") else 0
        has_begun = False
        found = work.data.call("describe")
        if found["is_container"]:
            raise StartupError("in a container the image is what is upgraded: docker = true is set")
        running = find_running(found["pid"], found["uid"], work.archive, work.environ)
        if found["free"] < (1 if "--no-backup" in flags else 2) * found["size"] + 16_000_000:
            raise StartupError(f"there is no room for a backup and a copy of the database beside {found['database']}")
        print(f"checking {show_path(source)}", flush=True)  # it unpacks and compiles itself: minutes on a slow board
        version = work.check(source, "--unsigned" in flags, keys, "--downgrade" in flags)
        plan = f"microauthd {VERSION} is replaced by {version} in {work.archive}; {describe_restart(running)}"
        if "--dry-run" in flags:
            print(f"{plan}. Nothing was done")
            return 0
        if "--yes" not in flags and not confirm(plan):
            print("microauthd: nothing was done", file=sys.stderr)
            return 1
        if "--no-backup" not in flags:
            try:
                path = work.data.call("back_up")["path"]
            except StartupError as refusal:
                raise StartupError(f"no backup: {refusal}; --no-backup goes on without one") from None
            print(f"backed up: {show_path(path)}", flush=True)
        has_begun = True
        failure = work.run(Journal(VERSION, version, running))
        if failure:
            print(f"microauthd: {version} was taken back, and {VERSION} is in place: {failure}", file=sys.stderr)
            return WENT_BACK
        print(f"{version} is in place" + (" and ready" if running.kind != "none" else "; start the server"))
        return 0
    except (StartupError, OSError, subprocess.SubprocessError) as error:
        if not has_begun:
            raise
        print(f"microauthd: {error}", file=sys.stderr)
        return UNDONE
    finally:
        work.end()


def upgrade(work: Upgrade, source: str, flags: list[str], keys: str) -> int:
    """Replace the installed archive by another, or go back. Return the exit status. Raises StartupError."""
    try:
        with hold_archive(work.archive):
            return upgrade_alone(work, source, flags, keys)
    finally:
        work.data.end()
