"""A mixed load on a box, and a ledger of what was acknowledged: what has to be true after any crash.

A fact is acknowledged when the whole of its 2xx answer was read; what was asked and not answered
may be or not be. `mark` says where in time that was: the crash of a test has a place on the same
scale, and only facts done before it are asked for.
"""

import collections
import contextlib
import functools
import http.client
import itertools
import json
import random
import socket
import threading
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from browser import CALLBACK, CHALLENGE, VERIFIER
from box import Answer

PHRASE, OTHER_PHRASE, WRONG = "correct horse battery", "another battery staple", "not the horse at all"
THRESHOLD = 3  # failures that lock
SETTINGS = {  # what the load needs: nothing may be dead because it has expired, and what is spent is dead at once
    "enable_token_refresh": "true", "max_login_failures": THRESHOLD, "seconds_to_reset_login_failures": 86400,
    "failed_password_lockout_duration": 86400, "token_expiration": 86400, "admin_token_expiration": 86400,
    "refresh_token_expiration": 864000, "refresh_token_grace": 0, "audit_log_retention_days": 0,
}


class Lost(Exception):
    """The connection ended before the whole answer was here: what was asked is in doubt."""


class Line:
    """Kept connections to both ports of a box, for one thread."""

    def __init__(self, box):
        self.box, self.connections = box, {}

    def __call__(self, port, method, path, form=None, *, client=None, bearer=None, json_body=None):
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
            connection = self.connections.get(port)
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections[port] = connection
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.getheaders()), response.read())
        except (OSError, http.client.HTTPException) as error:
            if port in self.connections:
                self.connections.pop(port).close()
            raise Lost from error
        if response.will_close:
            self.connections.pop(port).close()
        return answer

    def auth(self, path, form=None, **more):
        return self(self.box.auth_port, "GET" if form is None else "POST", path, form, **more)

    def admin(self, method, path, json_body=None, **more):
        return self(self.box.admin_port, method, path, json_body=json_body, **more)

    def token(self, form, client=None):
        return self.auth("/token", form, client=client or self.box.client)

    def refresh(self, token):
        return self.token({"grant_type": "refresh_token", "refresh_token": token})

    def log_in(self, username, password=PHRASE):
        return self.token({"grant_type": "password", "username": username, "password": password})

    def is_active(self, token):
        return self.auth("/introspect", {"token": token}, client=self.box.client).json["active"]

    def code(self, username):
        """Log somebody in by the headless flow: an authorization code. Raises Lost where a step was refused."""
        asked = {
            "client_id": self.box.client[0], "redirect_uri": CALLBACK, "response_type": "code",
            "scope": "openid offline_access", "code_challenge": CHALLENGE, "code_challenge_method": "S256",
        }
        step = self.auth("/authorize", asked)
        assert step.status == 200, step
        proven = self.auth("/login/password", {"jti": step.json["jti"], "username": username, "password": PHRASE})
        assert proven.status == 200, proven
        done = self.auth("/login/finalize", {"jti": step.json["jti"]})
        assert done.status == 302, done
        return dict(parse_qsl(urlsplit(done.headers["Location"]).query))["code"]

    def exchange(self, code):
        return self.token(
            {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER}
        )

    def close(self):
        for connection in self.connections.values():
            connection.close()


@dataclass
class Fact:
    kind: str
    of: object  # what it is about: a Login, a Person, …
    began: int
    done: int | None = None
    what: dict = field(default_factory=dict)
    rows: list = field(
        default_factory=list
    )  # (action, target or None, a word of its secondary) of the audit rows it has to have

    def stands(self, cut):
        return self.done is not None and self.done <= cut


@dataclass
class Thing:
    """A login or an account, and what was done to it in its order."""

    facts: list = field(default_factory=list)
    what: dict = field(default_factory=dict)

    def standing(self, cut):
        return [fact for fact in self.facts if fact.stands(cut)]

    def is_settled(self, cut):
        """Was nothing in doubt about it at the crash?"""
        return all(fact.stands(cut) or fact.began > cut for fact in self.facts)


class Audit:
    """What is known of the audit log: which words stand in which rows."""

    def __init__(self):
        self.last, self.words, self.counts = 0, set(), collections.Counter()

    def add(self, seq, action, target, secondary):
        self.last = seq
        self.counts[action] += 1
        for word in ("", *secondary.split()):
            self.words |= {(action, target, word), (action, None, word)}

    def missing(self, facts):
        return [
            f"{fact.kind}: no audit row {' '.join(map(str, row))}"
            for fact in facts
            for row in fact.rows
            if row not in self.words
        ]


class Ledger:
    USERS = [f"user{number}" for number in range(4)]

    def __init__(self, box, mark, seed):
        self.box, self.mark, self.random = box, mark, random.Random(seed)
        self.things, self.refused, self.broken, self.ending = [], [], [], threading.Event()
        self.names = itertools.count()
        self.threads = []

    def prepare(self):
        """What the load needs, made before it begins."""
        line = Line(self.box)
        self.bearer = self.box.admin_token()
        for name in self.USERS:
            assert (
                line.admin(
                    "POST", "/users", {"username": name, "email": f"{name}@example.org", "password": PHRASE},
                    bearer=self.bearer,
                ).status
                == 200
            )
        found = line.admin(
            "POST", f"/clients/{self.box.client[0]}/redirect-uris", {"uri": CALLBACK}, bearer=self.bearer
        )
        assert found.status == 201, found
        line.close()

    # -- the load --

    def ask(self, thing, kind, call, good=200, **what):
        """Ask for something and note it: in doubt until the whole answer was read."""
        fact = Fact(kind, thing, self.mark(), what=what)
        thing.facts.append(fact)
        answer = call()
        if answer.status != good:
            thing.facts.remove(fact)
            self.refused.append((kind, answer.status))
            return None
        fact.answer = answer
        fact.done = self.mark()
        return fact

    def begin(self, **what):
        thing = Thing(what=what)
        self.things.append(thing)
        return thing

    def work_people(self, line, dice):
        """Log in, refresh a few times, then end it one way or another, or leave it."""
        login = self.begin(kind="login")
        fact = self.ask(login, "issued", lambda: line.log_in(dice.choice(self.USERS)))
        for _ in range(dice.randrange(1, 6)):
            if fact is None:
                return
            self.note_tokens(fact, "user_token_issued" if fact.kind == "issued" else "refresh_token_used")
            spent = fact.answer.json["refresh_token"]
            fact = self.ask(login, "spent", functools.partial(line.refresh, spent), token=spent)
        if fact:
            self.note_tokens(fact, "refresh_token_used")
            access, refresh = fact.answer.json["access_token"], fact.answer.json["refresh_token"]
            end = dice.choice(["access", "refresh", "both", ""])
            if end in ("access", "both") and (
                fact := self.ask(
                    login, "revoked", lambda: line.auth("/revoke", {"token": access}, client=self.box.client),
                    token=access,
                )
            ):
                fact.rows.append(("token_revoked", None, f"jti={claims_of(access)['jti']}"))
            if end in ("refresh", "both") and (
                fact := self.ask(
                    login, "ended", lambda: line.auth("/revoke", {"token": refresh}, client=self.box.client),
                    token=refresh,
                )
            ):
                fact.rows.append(("refresh_token_revoked", None, f"sid={claims_of(access)['sid']}"))

    def note_tokens(self, fact, action):
        fact.rows.append((action, self.box.client[0], f"jti={fact.answer.json['jti']}"))

    def work_machines(self, line, dice):
        """Machine tokens: most live, some are revoked at once, while their row still waits for its batch."""
        thing = self.begin(kind="machine")
        fact = self.ask(thing, "minted", lambda: line.token({"grant_type": "client_credentials"}))
        if fact and dice.random() < 0.6:
            token, jti = fact.answer.json["access_token"], fact.answer.json["jti"]
            if fact := self.ask(
                thing, "revoked", lambda: line.auth("/revoke", {"token": token}, client=self.box.client), token=token
            ):
                fact.rows.append(("token_revoked", self.box.client[0], f"jti={jti}"))

    def work_codes(self, line, dice):
        login = self.begin(kind="code")
        code = line.code(dice.choice(self.USERS))
        fact = self.ask(login, "exchanged", lambda: line.exchange(code), code=code)
        if fact:
            self.note_tokens(fact, "user_token_issued")

    def work_admins(self, line, dice):
        """An account of its own is made, and one thing is done to it."""
        name = f"person{next(self.names)}"
        person = self.begin(kind="person", name=name)
        fact = self.ask(
            person, "made",
            lambda: line.admin(
                "POST", "/users", {"username": name, "email": f"{name}@example.org", "password": PHRASE},
                bearer=self.bearer,
            ),
        )
        if fact is None:
            return
        id = person.what["id"] = fact.answer.json["id"]
        fact.rows.append(("user_created", name, id))
        order = dice.choice(["deactivated", "reset", "locked", "counted", "user revoked", "client"])
        if order == "deactivated":
            if fact := self.ask(
                person, order, lambda: line.admin("POST", f"/users/{id}/deactivate", bearer=self.bearer)
            ):
                fact.rows.append(("user_deactivated", id, ""))
        elif order == "reset":
            if fact := self.ask(
                person, order,
                lambda: line.admin("POST", f"/users/{id}/reset", {"new_password": OTHER_PHRASE}, bearer=self.bearer),
            ):
                fact.rows.append(("user_password_reset", id, ""))
        elif order in ("locked", "counted"):
            for _ in range(THRESHOLD - (order == "counted")):
                if fact := self.ask(person, "failed", lambda: line.log_in(name, WRONG), good=403):
                    fact.rows.append(("user_login_failed", self.box.client[0], "reason=wrong"))
            if order == "locked" and fact:
                fact.rows.append(("user_locked_out", id, ""))
        elif order == "user revoked":
            if fact := self.ask(person, "issued", lambda: line.log_in(name)):
                tokens = [fact.answer.json["access_token"], fact.answer.json["refresh_token"]]
                if fact := self.ask(
                    person, order, lambda: line.admin("POST", f"/users/{id}/revoke", bearer=self.bearer), tokens=tokens
                ):
                    fact.rows.append(("user_revoked", id, ""))
        else:
            client_id = "client-" + name
            owned = self.begin(kind="client", client_id=client_id)
            fact = self.ask(
                owned, "client made",
                lambda: line.admin(
                    "POST", "/clients",
                    {"client_id": client_id, "client_secret": PHRASE, "grant_types": ["client_credentials"]},
                    bearer=self.bearer,
                ),
            )
            if fact:
                fact.rows.append(("create_client", client_id, fact.answer.json["id"]))
                if fact := self.ask(
                    owned, "secret changed",
                    lambda: line.admin(
                        "POST", "/clients/secret", {"client_id": client_id, "new_secret": OTHER_PHRASE},
                        bearer=self.bearer,
                    ),
                ):
                    fact.rows.append(("client_secret_changed", client_id, ""))

    def start(self, most=None, times=1):
        """Begin the load, of at most so many rounds a thread, and so many times as many threads."""
        self.ending.clear()
        works = times * [
            self.work_people, self.work_people, self.work_machines, self.work_codes, self.work_admins, self.work_admins,
        ]
        self.threads = [
            threading.Thread(target=self.drive, args=(work, random.Random(self.random.random()), most))
            for work in works
        ]
        for thread in self.threads:
            thread.start()

    def drive(self, work, dice, most):
        line = Line(self.box)
        with contextlib.suppress(Lost):
            for _ in range(most) if most else itertools.count():
                if self.ending.is_set():
                    break
                try:
                    work(line, dice)
                except AssertionError as error:  # nothing the load asks for may be refused
                    self.refused.append((work.__name__, str(error)))
        line.close()

    def join(self):
        for thread in self.threads:
            thread.join()

    # -- the checks --

    def read_audit(self, line, audit):
        """Add the rows that came since to what is known of the audit log."""
        while True:
            answer = line.admin("GET", f"/audit-logs?after={audit.last}&limit=1000", bearer=self.bearer)
            assert answer.status == 200, f"the administrator cannot read the audit log: {answer}"
            page = answer.json
            for row in page:
                audit.add(int(row["id"]), row["action"], row["target"], row["secondary"])
            if len(page) < 1000:
                return audit

    def check(self, line, cut, things, audit):
        """Return a sentence for each broken promise. Ends the logins it looks at: each is checked once."""
        wrong = []
        for thing in things:
            wrong += audit.missing(thing.standing(cut))
            wrong += getattr(self, "check_" + thing.what["kind"])(line, cut, thing)
        # Both ways: a change and its row are one transaction.
        there = int(line.admin("GET", "/users?is_active=all&limit=1", bearer=self.bearer).headers["X-Total-Count"])
        if there != audit.counts["user_created"]:
            wrong.append(f"{there} users, but {audit.counts['user_created']} rows that say one was made")
        return wrong

    def check_again(self, line, cut, things, audit):
        """What stays true whatever came after the first look: rights that were taken stay taken, and no row is lost."""
        wrong = []
        for thing in things:
            facts = thing.standing(cut)
            wrong += audit.missing(facts)
            wrong += [
                f"{fact.kind}, and active again"
                for fact in facts
                if fact.kind in ("spent", "revoked", "ended") and line.is_active(fact.what["token"])
            ]
            kinds = [fact.kind for fact in facts]
            if "deactivated" in kinds or kinds.count("failed") >= THRESHOLD:
                found = line.admin("GET", f"/users/{thing.what['id']}", bearer=self.bearer).json
                if found["is_active"] and not found["lockout_until"]:
                    wrong.append("a lockout or a deactivation is forgotten later")
        return wrong

    def check_login(self, line, cut, login):
        wrong, facts = [], login.standing(cut)
        spent = [fact.what["token"] for fact in facts if fact.kind == "spent"]
        ended = any(fact.kind == "ended" for fact in facts)
        revoked = [fact.what["token"] for fact in facts if fact.kind == "revoked"]
        issued = [fact for fact in facts if fact.kind in ("issued", "spent")]
        wrong += ["a revoked token is active" for token in revoked if line.is_active(token)]
        wrong += ["a spent refresh token is active" for token in spent if line.is_active(token)]
        if ended:
            wrong += [
                "a token of an ended login is active"
                for fact in issued
                for name in ("access_token", "refresh_token")
                if line.is_active(fact.answer.json[name])
            ]
        if issued and login.is_settled(cut) and not ended:
            if not revoked and not line.is_active(issued[-1].answer.json["access_token"]):
                wrong.append("an acknowledged access token is forgotten")
            if line.refresh(issued[-1].answer.json["refresh_token"]).status != 200:
                wrong.append("an acknowledged refresh token is forgotten")
        # The newest first: its reuse is what nothing but its own row refuses; it ends the login of the rest.
        wrong += ["a spent refresh token works" for token in reversed(spent) if line.refresh(token).status == 200]
        return wrong

    def check_machine(self, line, cut, thing):
        facts = {fact.kind: fact for fact in thing.standing(cut)}
        if "revoked" in facts:
            return ["a revoked machine token is active"] if line.is_active(facts["revoked"].what["token"]) else []
        if (
            "minted" in facts
            and thing.is_settled(cut)
            and not line.is_active(facts["minted"].answer.json["access_token"])
        ):
            return ["a machine token nobody revoked is dead"]
        return []

    def check_code(self, line, cut, login):
        wrong = []
        for fact in login.standing(cut):
            if not line.is_active(fact.answer.json["access_token"]):
                wrong.append("what a code was given for is forgotten")
            if line.exchange(fact.what["code"]).status == 200:
                wrong.append("a spent code works")
        for fact in login.facts:
            if not fact.stands(cut) and [line.exchange(fact.what["code"]).status for _ in range(2)].count(200) > 1:
                wrong.append("a code works twice")
        return wrong

    def check_person(self, line, cut, person):
        wrong, facts = [], person.standing(cut)
        kinds = [fact.kind for fact in facts]
        if "made" not in kinds:
            return []
        name, id, settled = person.what["name"], person.what["id"], person.is_settled(cut)
        found = line.admin("GET", f"/users/{id}", bearer=self.bearer)
        if found.status != 200 or found.json["username"] != name:
            return [f"the user {name} is forgotten"]
        if "user revoked" in kinds:
            wrong += [
                "a token of a revoked user is active" for token in facts[-1].what["tokens"] if line.is_active(token)
            ]
        failures = kinds.count("failed")
        if failures:
            if settled and failures == THRESHOLD - 1:
                line.log_in(name, WRONG)
                failures += 1
            if failures >= THRESHOLD and (
                line.log_in(name).status == 200
                or not line.admin("GET", f"/users/{id}", bearer=self.bearer).json["lockout_until"]
            ):
                wrong.append("a lockout, or a failure that counts towards it, is forgotten")
        elif "deactivated" in kinds:
            if found.json["is_active"] or line.log_in(name).status == 200:
                wrong.append("a deactivated user is active")
        elif "reset" in kinds:
            if line.log_in(name).status == 200 or line.log_in(name, OTHER_PHRASE).status != 200:
                wrong.append("a new password is forgotten")
        elif settled and line.log_in(name).status != 200:
            wrong.append("the password of a new user is forgotten")
        return wrong

    def check_client(self, line, cut, thing):
        client_id, kinds = thing.what["client_id"], [fact.kind for fact in thing.standing(cut)]
        if not kinds:
            return []
        works = [
            line.token({"grant_type": "client_credentials"}, client=(client_id, secret)).status == 200
            for secret in (PHRASE, OTHER_PHRASE)
        ]
        if "secret changed" in kinds:
            return [] if works == [False, True] else ["the secret of a client, changed, is as before"]
        return [] if any(works) else ["a client is forgotten"]


def claims_of(token):
    import jwt

    return jwt.decode(token, options={"verify_signature": False})
