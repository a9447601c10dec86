"""A set-up appliance in a folder of its own, on free ports, run from the built archive."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = Path(os.environ.get("MICROAUTHD_PYZ", ROOT / "build" / "out" / "microauthd.pyz"))
PROGRAM = [sys.executable, "-I", str(ARCHIVE)]
BUILT = {}  # what distinguishes boxes: a client, ports, and the files of one that was set up
CHEAP = {"MAD_ARGON2ID_TIME": "1", "MAD_ARGON2ID_MEMORY": "8192", "MAD_ARGON2ID_PARALLELISM": "1"}


# The administrator and the first client of an answers file.
ANSWERS = """
[admin]
username = "root"
email = "root@example.org"
password = "an administrator's phrase"
[client]
client_id = "app"
"""


def free_port():
    """A port nobody has, below those the kernel gives to clients: one of a crowd could have it before the box listens."""
    while True:
        port = random.randrange(10240, 32768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def state_of(pid):
    """proc_pid_stat(5); X when there is none any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def runs(pid):
    """Whether a process has not ended. One without a parent is a zombie until init waits for it, perhaps for seconds."""
    return state_of(pid) not in "ZX"


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.body[:200]}>"


class Box:
    """`settings` are lines of mad.conf. Used as a context manager: set up, started, and ended."""

    PASSWORD = "an administrator's phrase"

    def __init__(self, folder, **settings):
        self.folder = Path(folder)
        self.auth_port = free_port()
        self.admin_port = next(port for port in iter(free_port, None) if port != self.auth_port)
        self.settings = {"auth-port": self.auth_port, "admin-port": self.admin_port, "db-pass": "a database phrase"} | {
            name.replace("_", "-"): value for name, value in settings.items()
        }
        self.environ = (
            {name: value for name, value in os.environ.items() if not name.startswith("MAD_")}
            | CHEAP
            | {"HOME": str(self.folder), "MICROAUTHD_CACHE": str(ROOT / "build" / "out" / "cache")}
        )
        self.process, self.tls = None, None  # a context where both ports speak TLS

    def set_up(self):
        """Run `setup`, or copy what it made for another box with these settings: it takes longer than a start."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # Ports and workers change nothing that `setup` makes but their lines of mad.conf.
        asked = {
            name: value for name, value in self.settings.items() if not name.endswith("-port") and name != "workers"
        }
        environ = {
            name: value for name, value in self.environ.items() if name not in ("HOME", "FAILING_FOLDER", "FAILING_CONTROL")
        }
        wanted = repr((type(self), PROGRAM, sorted(asked.items()), sorted(environ.items())))
        # What it makes may lie elsewhere, or depend on what is there, or the name of the folder is what is tried.
        if "/" in repr(asked) or any(self.folder.iterdir()) or not str(self.folder).isascii():
            return self.run_setup()
        if wanted not in BUILT:
            self.run_setup()
            files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
            BUILT[wanted] = self.client, (self.auth_port, self.admin_port), files
            return self
        self.client, ports, files = BUILT[wanted]
        for name, content in files.items():
            if name == "mad.conf":
                for old, new in zip(ports, (self.auth_port, self.admin_port), strict=True):
                    content = re.sub(rb"\b%d$" % old, b"%d" % new, content, flags=re.MULTILINE)
                line = f"workers = {self.settings['workers']}" if "workers" in self.settings else "# workers = auto"
                content, count = re.subn(rb"(?m)^(# )?workers = .*$", line.encode(), content)
                assert count == 1
            with open(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
        return self

    def run_setup(self):
        conf = self.folder / "mad.conf"
        conf.write_text("".join(f"{name} = {value}\n" for name, value in self.settings.items()))
        conf.chmod(0o600)
        answers = self.folder / "answers.toml"
        answers.write_text(
            f'[admin]\nusername = "root"\nemail = "root@example.org"\n[client]\nclient_id = "app"\naudience = "api"\nscopes = ["api:read", "api:write"]\n'
            'grants = ["authorization_code", "client_credentials", "password", "refresh_token"]\n'
        )
        done = self.run("setup", "--answers", str(answers), "--admin-password-stdin", input=self.PASSWORD + "\n")
        assert done.returncode == 0, done.stderr
        said = dict(line.split("=", 1) for line in done.stdout.splitlines())
        self.client = (said["client_id"], said["client_secret"])
        return self

    def run(self, *words, input=None, timeout=120, **environ):
        return subprocess.run(
            [*PROGRAM, *words], cwd=self.folder, env=self.environ | environ, input=input, capture_output=True,
            text=True, timeout=timeout,
        )

    def mad(self, *words, input=None, **environ):
        return self.run(
            "mad", *words, input=input, MAD_ADMIN_URL=f"http://127.0.0.1:{self.admin_port}",
            MAD_AUTH_URL=f"http://127.0.0.1:{self.auth_port}", **environ,
        )

    def start(self, wait=True):
        self.output = open(self.folder / "output.txt", "ab")
        self.process = subprocess.Popen(
            [*PROGRAM, "serve"], cwd=self.folder, env=self.environ, stdout=self.output, stderr=self.output,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
        if wait:
            self.await_ready()
        return self

    def await_ready(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if (
                    self.call(self.auth_port, "GET", "/health/ready").status == 200
                    and self.call(self.admin_port, "GET", "/health").status == 200
                ):
                    return
            time.sleep(0.02)
        raise AssertionError("not ready: " + self.said())

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.output.close()
        return status

    def kill(self):
        """kill -9 of the supervisor; its children end by themselves."""
        pids = self.pids()
        self.process.kill()
        self.process.wait(60)
        self.output.close()
        end = time.monotonic() + 30
        while any(map(runs, pids[1:])) and time.monotonic() < end:
            time.sleep(0.01)
        return not any(map(runs, pids[1:]))

    def pids(self):
        """The supervisor and its children, in the order they were started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def said(self):
        output = self.folder / "output.txt"
        return (output.read_text() if output.exists() else "") + self.log()

    def log(self):
        path = self.folder / "microauthd.log"
        return path.read_text() if path.exists() else ""

    def call(self, port, method, path, form=None, *, client=None, bearer=None, json_body=None, timeout=60):
        if self.tls:
            connection = http.client.HTTPSConnection("localhost", port, timeout=timeout, context=self.tls)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        headers, body = {}, None
        if form is not None:
            body, headers["Content-Type"] = urlencode(form), "application/x-www-form-urlencoded"
        if json_body is not None:
            body, headers["Content-Type"] = json.dumps(json_body), "application/json"
        if client:
            headers["Authorization"] = "Basic " + b64encode(":".join(client).encode()).decode()
        if bearer:
            headers["Authorization"] = "Bearer " + bearer
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def auth(self, path, form=None, **more):
        return self.call(
            self.auth_port, "GET" if form is None and not more.pop("post", False) else "POST", path, form, **more
        )

    def admin(self, method, path, form=None, **more):
        return self.call(self.admin_port, method, path, form, **more)

    def token(self, **form):
        return self.auth("/token", {"grant_type": "client_credentials"} | form, client=self.client)

    def admin_token(self):
        answer = self.admin("POST", "/token", {"username": "root", "password": self.PASSWORD, "client_id": "test"})
        assert answer.status == 200, answer
        return answer.json["access_token"]

    def new_user(self, username, password="correct horse battery"):
        answer = self.admin(
            "POST", "/users",
            json_body={"username": username, "email": f"{username}@example.org", "password": password},
            bearer=self.admin_token(),
        )
        assert answer.status == 200, answer
        return answer.json

    def log_in(self, username, password="correct horse battery", **form):
        return self.auth(
            "/token", {"grant_type": "password", "username": username, "password": password} | form, client=self.client
        )

    def __enter__(self):
        return self.set_up().start()

    def __exit__(self, *_):
        if self.process and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
