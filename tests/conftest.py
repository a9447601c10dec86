"""What tests share, and where it stands.

test_<room or section>.py holds the rules of a room of appliance/ or a section of microauthd.py, as test_store.py and
test_grants.py do. ADMIN has three files: test_admin.py goes noun by noun, test_admin_every_route.py holds what is true of
every route, and test_admin_console.py what a console needs besides. Whole journeys are in test_flows.py and test_browser*.py, the archive in test_pyz.py, the order of the code
in test_module.py, what README and manual say in test_readme.py, and faults/ is for machines that fail.

Here: an Idp on a temporary database with a clock that tests move, both apps called in process, ADMIN called as an
administrator (`call`), a set-up box in this process (`house`, opened with `opened`), one that serves from the archive
(`box`, with the settings that a file calls BOX), a browser (`chromium`), and a machine's clock (`Machine`). A fixture of the same name in a
file is that file's own.
`box.py`: the archive in a folder of its own, on free ports. `browser.py`: a browser without a screen, in process.
`faults/crowd.py`: crowds and patience; `ledger.py`: what was acknowledged; `failing.py`, `losing.py`: layers under a
box that make its machine fail.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import traceback
from urllib.parse import urlencode

import microauthd as m
import pyotp
import pytest
from box import Box
from hypothesis import HealthCheck, settings
from appliance.base.clock import RELEASED_AT, Timekeeper
from appliance.base.settings import Options
from appliance.base.log import Log
from appliance.base.database import derive_key
from appliance.base.store import AuthorizationCode, LoginTransaction, MAD_ADMIN_ROLE_ID, Store
from appliance.base.keys import make_key
from appliance.base.objects import CreateClient, CreateScope, CreateUser
from appliance.machine import MACHINE
from appliance.recovery import Answers, FirstClient, back_up, describe_keys, open_idp, set_up

# No deadline: the box is shared, and what is slow once is not wrong.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# A copied box has the salt and the phrase of the one it was copied from: their key is derived once, for a tenth of a second.
hashlib.pbkdf2_hmac = functools.lru_cache(hashlib.pbkdf2_hmac)

PASSWORD = "correct horse battery"
QUIET_BROWSER = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]
DATABASE_KEY = derive_key("a database phrase", bytes(range(16)))
CHEAP = {"argon2id_memory": 64, "argon2id_time": 1, "argon2id_parallelism": 1}
FILES = ("mad.conf", "mad.db3", "token.pem", "admin_token.pem", "seal.key")
CLAIMS = {
    "iss": "https://idp.example", "sub": "s", "aud": "api", "exp": 4102444800, "iat": 1, "jti": "0" * 32,
    "client_id": "s", "mad": "auth", "token_use": "access",
}
DAY = 86400
YEARS = 10 * 365 * DAY
NOON = RELEASED_AT + 50_000.0


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def in_child(work):
    """Run something in a forked process, which ends with it whatever happens: its wait status, 0 when it returned."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def rings():
    return [make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)], [make_key("ES256", 2048, 0)]


@pytest.fixture(scope="session")
def blank(tmp_path_factory):
    """A fresh database to copy: making one takes longer than a test."""
    path = tmp_path_factory.mktemp("blank") / "blank.db3"
    Store.make(path, DATABASE_KEY, RELEASED_AT).close()
    return path.read_bytes()


@pytest.fixture
def clock():
    return Clock(RELEASED_AT + 1000.0)


@pytest.fixture
def options():
    return Options(**CHEAP, enable_token_refresh=True, oidc_issuer="https://idp.example", admin_domain="localhost", metrics_on_auth=True)


@pytest.fixture
def give_totp():
    """Turn the second factor of somebody on: the seed."""

    def call(idp, account):
        seed = m.new_totp_seed()
        SECRETS.add(seed)
        m.enable_totp(idp, account, seed, pyotp.TOTP(seed).at(idp.now()))
        return seed

    return call


@pytest.fixture
def make_idp(tmp_path, blank, rings, clock):
    """Make an Idp; another one with the same path is the same database after a restart."""
    made = []

    def make(options, path=tmp_path / "mad.db3"):
        if not path.exists():
            path.write_bytes(blank)
        stream = io.StringIO()
        store = Store(path, DATABASE_KEY, log=Log(stream=stream))
        idp = m.Idp(
            options, store, m.KeyRing(rings[0], options.prefer_ec_token_signer), m.KeyRing(rings[1]), m.Seal(bytes(32)),
            clock, store.log, MACHINE,
        )
        idp.stream = stream
        made.append(idp)
        return idp

    yield make
    for idp in made:
        idp.store.close()
        said = idp.stream.getvalue()
        assert 'traceback="Traceback' not in said, said
        assert not [secret for secret in SECRETS if secret in said], "a secret is in the log"


@pytest.fixture
def idp(make_idp, options):
    return make_idp(options)


SECRETS = {PASSWORD}  # what must never be logged: grows with every answer that carries one
CARRY_SECRETS = ("access_token", "refresh_token", "id_token", "client_secret")


class Answered:
    """What a WSGI app answered. Every answer of every test is looked at: no password, no traceback."""

    def __init__(self, status, headers, body, cookies=()):
        self.status, self.headers, self.body, self.cookies = status, headers, body, cookies
        assert PASSWORD.encode() not in body and b"Traceback" not in body, body
        if headers.get("content-type") == "application/json" and body[:1] == b"{":
            SECRETS.update(
                value for name in CARRY_SECRETS if isinstance(value := json.loads(body).get(name), str) and value
            )

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.body[:200]}>"


class Caller:
    """Calls a WSGI app as the server would."""

    def __init__(self, app, host="localhost:9041"):
        self.app, self.host = app, host

    def __call__(
        self, method, path, data=None, *, auth=None, bearer=None, json_body=None, headers=(), peer="192.0.2.7",
        more_environ=(),
    ):
        path, _, query = path.partition("?")
        environ = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query,
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": self.host,
            "REMOTE_ADDR": peer, "wsgi.url_scheme": "http", "wsgi.errors": io.StringIO(), "microauthd.peer": peer,
            "microauthd.server": "test", "microauthd.request_id": "r1", "microauthd.socket": peer,
        } | dict(more_environ)
        body = b""
        if json_body is not None:
            body = json.dumps(json_body).encode() if not isinstance(json_body, bytes) else json_body
            environ["CONTENT_TYPE"] = "application/json"
        elif data is not None:
            body = data if isinstance(data, bytes) else (data if isinstance(data, str) else urlencode(data)).encode()
            environ["CONTENT_TYPE"] = "application/x-www-form-urlencoded"
        if auth:
            environ["HTTP_AUTHORIZATION"] = "Basic " + base64.b64encode(":".join(auth).encode()).decode()
        if bearer:
            environ["HTTP_AUTHORIZATION"] = "Bearer " + bearer
        for name, value in headers:
            environ[
                name if name.isupper() and name.startswith("CONTENT") else "HTTP_" + name.upper().replace("-", "_")
            ] = value
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
        started = []
        chunks = self.app(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
        content = b"".join(chunks)
        return Answered(
            int(started[-1][0][:3]), {name.lower(): value for name, value in started[-1][1]}, content,
            [value for name, value in started[-1][1] if name == "Set-Cookie"],
        )

    def get(self, path, **more):
        return self("GET", path, **more)

    def post(self, path, data=None, **more):
        return self("POST", path, data, **more)


@pytest.fixture
def auth(idp):
    return Caller(m.App(idp, m.AUTH))


@pytest.fixture
def admin(idp):
    return Caller(m.guard_admin(m.App(idp, m.ADMIN), idp))


class Someone:
    def __init__(self, account, password=PASSWORD):
        self.account, self.password = account, password
        self.id, self.username = account.id, account.username


@pytest.fixture
def new_user(idp):
    def make(username, scopes=(), admin=False):
        account = m.create_user(idp, m.LOCAL.acting_as("test"), CreateUser(username, f"{username}@example.org", PASSWORD))
        if scopes:
            m.assign_scopes(idp, m.LOCAL.acting_as("test"), account, scopes)
        if admin:
            idp.store.assign_role(account.id, MAD_ADMIN_ROLE_ID, idp.now())
        return Someone(account)

    return make


@pytest.fixture
def scopes(idp):
    for name in ("api:read", "api:write", "api:secret"):
        m.create_scope(idp, m.LOCAL.acting_as("test"), CreateScope(name))


@pytest.fixture
def new_client(idp, scopes):
    def make(client_id, **more):
        every = None if more.get("client_type") == "public" else list(m.GRANT_TYPES)
        client, secret = m.create_client(
            idp, m.LOCAL.acting_as("test"),
            CreateClient(client_id, **{"scopes": ["api:read", "api:write"], "grant_types": every} | more),
        )
        SECRETS.update({secret} - {""})
        return (client_id, secret)

    return make


@pytest.fixture
def service(new_client):
    """A confidential client with every grant: (client_id, secret)."""
    return new_client("service")


@pytest.fixture
def public(new_client):
    """A public client for people: (client_id, "")."""
    return new_client("spa", client_type="public", grant_types=["password", "refresh_token"])


@pytest.fixture
def alice(new_user, scopes):
    return new_user("alice", ["api:read"])


@pytest.fixture
def root(new_user):
    return new_user("root", admin=True)


@pytest.fixture
def log_in(auth, service):
    """Log a user in by password: the token answer."""

    def call(someone, client=None, **more):
        answer = auth.post(
            "/token", {"grant_type": "password", "username": someone.username, "password": someone.password} | more,
            auth=client or service,
        )
        assert answer.status == 200, answer
        return answer.json

    return call


@pytest.fixture
def bearer(log_in, alice):
    """An access token of alice."""
    return log_in(alice)["access_token"]


@pytest.fixture
def change(idp):
    """Run a statement as another process would, and let every cache know."""

    def call(sql, **parameters):
        with idp.store.transaction(identity=True):
            return idp.store.run(sql, **parameters)

    return call


@pytest.fixture
def admin_token(admin, root):
    answer = admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "test"})
    assert answer.status == 200, answer
    return answer.json["access_token"]


@pytest.fixture
def machine(auth, service):
    answer = auth.post("/token", {"grant_type": "client_credentials"}, auth=service)
    assert answer.status == 200, answer
    return answer.json


@pytest.fixture
def call(admin, admin_token):
    """Call ADMIN as an administrator."""

    def call(method, path, body=None, **more):
        return admin(method, path, bearer=admin_token, json_body=body, **more)

    return call


def options_of(folder, **more):
    config = {"config": str(folder / "mad.conf")} | {name.replace("_", "-"): "test" for name in more}
    return Options(
        config, **CHEAP | {"argon2id_memory": 8192, "db_pass": "a phrase", "oidc_issuer": "https://idp.example"} | more
    )


def made(folder, **more):
    """A set-up box in this process, without a server: its options."""
    options = options_of(folder, **more)
    app = FirstClient("app", scopes=["api:read"], grants=list(m.GRANT_TYPES))
    set_up(options, Answers("root", "root@example.org", PASSWORD, clients=[app]))
    return options


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a box that has just been set up."""
    folder = tmp_path_factory.mktemp("built")
    with contextlib.chdir(folder):
        made(folder)
    return folder


@pytest.fixture
def house(built, tmp_path, monkeypatch):
    """A set-up box in this process, without a server: its options. A copy, for to make keys takes longer."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return options_of(tmp_path)


@pytest.fixture(scope="module")
def box(tmp_path_factory, request):
    """A box that serves, of the built archive, for all tests of a file, with the settings that the file calls BOX."""
    with Box(tmp_path_factory.mktemp("box") / "data", **getattr(request.module, "BOX", {})) as box:
        yield box


@pytest.fixture(scope="module")
def chromium():
    """A browser. One of a file: the loop that drives it would be in the way of tests with a loop of their own."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # a busy machine takes longer than five seconds to show a page
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET_BROWSER)
        yield browser
        browser.close()


class Machine:
    """A machine's clock and the seconds since its boot, each moved by hand."""

    def __init__(self, wall, floor=None):
        self.wall, self.boot = wall, 1000.0
        self.keeper = Timekeeper(floor or int(wall) - 10, lambda: self.wall, lambda: self.boot, lambda: self.boot)

    def pass_(self, seconds, step=0.5):
        """Let time pass, looked at twice a second. Return whether it ever went back."""
        went_back, before = False, self.keeper()
        for _ in range(int(seconds / step)):
            self.wall, self.boot = self.wall + step, self.boot + step
            stepped = self.keeper.update()
            assert stepped or self.keeper() >= before, "time went back"
            went_back, before = went_back or stepped, self.keeper()
        return went_back

    @property
    def now(self):
        return self.keeper()


def fresh_machine(tmp_path, monkeypatch, **more):
    """An empty folder, and the options of somebody who knows nothing but the passphrase."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder, Options(
        {"config": str(folder / "mad.conf"), "db-pass": "environment MAD_DB_PASS"}, db_pass="a phrase", **more
    )


def kids(options):
    """The key identifiers of both rings."""
    return {row["kid"] for row in describe_keys(options)}


def states(folder):
    """The files of a folder: {name: content}, but for locks and what SQLite keeps beside a database."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith((".lock", "-wal", "-shm"))
    }


@pytest.fixture
def backup(house, tmp_path):
    (tmp_path / "out").mkdir()
    back_up(house, str(tmp_path / "out" / "box.backup"))
    return tmp_path / "out" / "box.backup"


def opened(options, clock=None):
    """The Idp of a house, as a command at the machine opens it."""
    idp = open_idp(options)
    if clock:
        idp.clock = clock
    return idp


def under_way(idp, user):
    """Begin a login and issue a code."""
    now = idp.now()
    idp.store.insert(
        AuthorizationCode(
            "c", "app", user, "s", "https://x", "", "", "", "", "", "pwd", now, 1000 * now, now + 60, None, "", 0
        )
    )
    idp.store.insert(LoginTransaction("l", "b", "app", "password", "null", None, "", 0, 0, now, now + 60, 0, ""))


def left(idp):
    """How many codes and logins there are."""
    return [
        idp.store.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("authorization_code", "login_transaction")
    ]
