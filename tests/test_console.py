"""The console of ADMIN: its session, what a cookie may do, fresh proofs, and the files it is made of."""

import ast
import gzip
import html
import json
import posixpath
import re
from pathlib import Path

import microauthd as m
import msgspec
import pyotp
import pytest
from conftest import Caller, PASSWORD, SECRETS
from appliance.base.pages import Brand, DARK_SURFACES, LIGHT_SURFACES, brand_edge, contrast
from appliance.base.settings import Options
from appliance.machine import MACHINE

AGENT = "Mozilla/5.0 (X11; Linux x86_64) a browser"
SAME_ORIGIN = ("Sec-Fetch-Site", "same-origin")
HTML = ("Accept", "text/html,application/xhtml+xml")
IDLE, ABSOLUTE = Options().console_idle_expiration, Options().console_absolute_expiration


class Tab:
    """A tab of a browser in which the console is open: it keeps the cookie and the form token."""

    def __init__(self, admin, peer="192.0.2.7", agent=AGENT):
        self.admin, self.peer, self.agent, self.cookies, self.token = admin, peer, agent, {}, None

    def __call__(self, method, path, body=None, headers=(SAME_ORIGIN,), token=None, **more):
        sent = [("User-Agent", self.agent), *headers]
        if self.cookies:
            sent.append(("Cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items())))
        token = self.token if token is None else token
        if token:
            sent.append(("X-Form-Token", token))
        answer = self.admin(method, path, json_body=body, headers=sent, peer=self.peer, **more)
        for line in answer.cookies:
            name, value = line.partition(";")[0].split("=", 1)
            self.cookies[name] = value
        if answer.status == 200 and path.startswith("/dashboard/session") and method != "DELETE":
            self.token = answer.json["form_token"] if isinstance(answer.json, dict) else self.token
            SECRETS.update(value for name, value in self.cookies.items() if name.endswith("mad-admin"))
        return answer

    def sign_in(self, username="root", password=PASSWORD, totp=""):
        return self("POST", "/dashboard/session", {"username": username, "password": password, "totp": totp})

    def prove(self, password=PASSWORD, totp=""):
        return self("POST", "/dashboard/session/proof", {"password": password, "totp": totp})

    def elsewhere(self, **more):
        """The same cookie and form token, in another hand."""
        tab = Tab(self.admin, **{"peer": self.peer, "agent": self.agent} | more)
        tab.cookies, tab.token = dict(self.cookies), self.token
        return tab


@pytest.fixture
def tab(admin, root):
    tab = Tab(admin)
    assert tab.sign_in().status == 200
    return tab


def error_of(answer):
    return answer.status, answer.json["error"]


def actions(idp, action):
    return [row for row in idp.store.list_audit(limit=1000) if row.action == action]


class TestSigningIn:
    def test_an_administrator_gets_a_cookie_and_a_form_token(self, admin, root, idp, clock):
        answer = Tab(admin).sign_in()
        assert answer.status == 200
        shown = answer.json
        assert shown["user"] == {"id": root.id, "username": "root", "email": "root@example.org"}
        assert len(shown["form_token"]) == 24 and not shown["totp_enabled"]
        assert (shown["idle_at"], shown["expires_at"], shown["proven_until"]) == tuple(
            m.iso(int(clock()) + seconds) for seconds in (IDLE, ABSOLUTE, m.PROOF_TTL)
        )
        (line,) = [line for line in answer.cookies if line.startswith("mad-admin=")]
        assert {"Path=/", "HttpOnly", "SameSite=Strict", f"Max-Age={ABSOLUTE}"} == set(line.split("; ")[1:])
        assert idp.store.value("SELECT count(*) FROM admin_session") == 1
        assert [row.actor_id for row in actions(idp, "console_signed_in")] == [root.id]

    def test_the_database_holds_no_cookie(self, tab, idp):
        (row,) = idp.store.list_admin_sessions(idp.store.find_account_by_name("root").id, idp.now(), IDLE)
        assert row.id_sha256 == m.sha256(tab.cookies["mad-admin"])
        assert tab.cookies["mad-admin"] not in repr(row)

    @pytest.mark.parametrize("how", ["wsgi.url_scheme", "Origin"])
    def test_under_https_no_other_host_can_set_the_cookie(self, idp, root, how):
        app = m.guard_admin(m.App(idp, m.ADMIN), idp)

        def over_tls(environ, start_response):
            if how == "wsgi.url_scheme":
                environ["wsgi.url_scheme"] = "https"
            return app(environ, start_response)

        tab = Tab(Caller(over_tls))
        headers = (SAME_ORIGIN, ("Origin", "https://localhost:9041")) if how == "Origin" else (SAME_ORIGIN,)
        answer = tab("POST", "/dashboard/session", {"username": "root", "password": PASSWORD}, headers=headers)
        (line,) = [line for line in answer.cookies if "mad-admin=" in line]
        assert line.startswith("__Host-mad-admin=") and "; Secure" in line and "SameSite=Strict" in line
        assert tab("GET", "/users").status == 200

    @pytest.mark.parametrize(
        "username, password", [("nobody", PASSWORD), ("root", "wrong"), ("alice", PASSWORD), ("", ""), ("root", "")]
    )
    def test_one_answer_whatever_is_wrong(self, admin, root, alice, username, password):
        answer = Tab(admin).sign_in(username, password)
        assert error_of(answer) == (403, "invalid_grant") and not answer.cookies

    def test_the_second_factor_is_asked_for(self, admin, idp, root, give_totp, clock):
        seed = give_totp(idp, root.account)
        clock.pass_(60)
        assert error_of(Tab(admin).sign_in()) == (403, "invalid_grant")
        tab = Tab(admin)
        code = pyotp.TOTP(seed).at(idp.now())
        assert tab.sign_in(totp=code).json["totp_enabled"]
        assert error_of(Tab(admin).sign_in(totp=code)) == (403, "invalid_grant"), "a code is spent once"

    def test_a_sign_in_ends_the_session_that_the_browser_had(self, tab, idp):
        before = tab.elsewhere()
        assert tab.sign_in().status == 200
        assert tab.cookies["mad-admin"] != before.cookies["mad-admin"]
        assert before("GET", "/users").status == 401

    def test_a_handle_that_was_planted_is_not_taken(self, admin, root):
        tab = Tab(admin)
        tab.cookies["mad-admin"] = "a" * 43
        tab.sign_in()
        assert tab.cookies["mad-admin"] != "a" * 43

    def test_it_takes_json_from_a_page_of_its_own_alone(self, admin, root):
        body = {"username": "root", "password": PASSWORD}
        tab = Tab(admin)
        assert tab("POST", "/dashboard/session", body, headers=[("Sec-Fetch-Site", "none")]).status == 403
        assert tab("POST", "/dashboard/session", body, headers=[]).status == 403
        assert tab("POST", "/dashboard/session", body, headers=[("Origin", "http://localhost:9041")]).status == 200
        form = admin.post("/dashboard/session", body, headers=[SAME_ORIGIN])
        assert error_of(form) == (415, "unsupported_media_type")

    def test_guesses_are_counted_as_everywhere(self, admin, root, idp):
        answers = [Tab(admin).sign_in(password=f"wrong {number}") for number in range(30)]
        assert answers[-1].status == 429 and int(answers[-1].headers["retry-after"]) > 0
        assert idp.store.find_account(root.id).failed_logins or idp.store.find_account(root.id).lockout_until


class TestSession:
    def test_a_reload_takes_up_the_session_of_its_tab(self, tab, root):
        token = tab.token
        shown = tab("GET", "/dashboard/session").json
        assert (shown["form_token"], shown["user"]["id"]) == (token, root.id)

    def test_without_a_cookie_there_is_none(self, admin, tab):
        assert Tab(admin)("GET", "/dashboard/session").status == 401
        assert error_of(Tab(admin)("GET", "/users", token=tab.token)) == (401, "invalid_token")

    def test_it_reads_and_changes_what_an_administrator_may(self, tab, root, idp):
        assert tab("GET", "/users").status == 200
        made = tab("POST", "/roles", {"name": "made"})
        assert made.status == 200 and actions(idp, "role_created")[0].actor_id == root.id

    def test_the_cookie_alone_opens_nothing(self, tab):
        tab.token = ""
        own = ("GET", "/dashboard/session"), ("DELETE", "/dashboard/session")
        for method, path in (("GET", "/users"), ("POST", "/roles"), *own):
            answer = tab(method, path, {"name": "x"} if method == "POST" else None)
            assert answer.status in (401, 403) and answer.status != 200

    def test_the_form_token_cannot_be_made_of_the_cookie(self, tab):
        handle = tab.cookies["mad-admin"]
        for token in (m.form_token(handle.encode(), "console"), m.form_token(b"", f"console {m.sha256(handle)}")):
            assert error_of(tab("GET", "/dashboard/session", token=token)) == (403, "access_denied")

    @pytest.mark.parametrize("token", ["x", "a" * 24, "\u00e9" * 24])
    def test_a_form_token_of_another_session_opens_nothing(self, tab, token):
        assert error_of(tab("GET", "/users", token=token)) == (403, "access_denied")

    SITES = [
        [("Sec-Fetch-Site", "same-site")], [("Sec-Fetch-Site", "cross-site")], [("Sec-Fetch-Site", "none")],
        [("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")],
        [("Origin", "http://localhost:9040")], [("Origin", "null")], [("Origin", "https://evil.example")],
    ]

    @pytest.mark.parametrize("headers", SITES)
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_neither_another_site_nor_another_port_of_this_host_gets_through(self, tab, headers, method):
        answer = tab(method, "/roles", {"name": "x"} if method == "POST" else None, headers=headers)
        assert error_of(answer) == (403, "access_denied")

    def test_what_changes_something_names_where_it_comes_from(self, tab):
        assert tab("GET", "/users", headers=[]).status == 200, "no Sec-Fetch-Site over plain http"
        assert tab("POST", "/roles", {"name": "x"}, headers=[]).status == 403
        assert tab("POST", "/roles", {"name": "x"}, headers=[("Origin", "http://localhost:9041")]).status == 200

    def test_with_a_token_the_cookie_is_not_looked_at(self, tab, admin_token):
        assert tab("GET", "/users", headers=[], bearer=admin_token).status == 200
        assert tab("GET", "/users", bearer="x.y.z").status == 401

    def test_a_cookie_that_came_twice_is_none(self, tab):
        tab.cookies["other"] = "1; mad-admin=" + "b" * 43
        assert tab("GET", "/users").status == 401

    def test_it_ends_when_it_is_idle(self, tab, clock):
        for _ in range(3):
            clock.pass_(IDLE - 61)
            assert tab("GET", "/users").status == 200
        clock.pass_(IDLE)
        assert error_of(tab("GET", "/users")) == (401, "invalid_token")

    def test_what_the_page_fetches_by_itself_is_no_use(self, tab, clock):
        for _ in range(IDLE // 300):
            clock.pass_(300)
            tab("GET", "/users", headers=[SAME_ORIGIN, ("X-Passive", "1")])
        assert tab("GET", "/users").status == 401

    def test_it_ends_however_much_it_is_used(self, tab, clock):
        for _ in range(ABSOLUTE // 1200 - 1):
            clock.pass_(1200)
            assert tab("GET", "/users").status == 200
        clock.pass_(1200)
        assert tab("GET", "/users").status == 401

    def test_its_use_is_written_once_a_minute(self, tab, idp, clock):
        clock.pass_(61)
        before = idp.store.connection.total_changes
        for _ in range(6):
            tab("GET", "/users")
            clock.pass_(9)
        assert idp.store.connection.total_changes - before == 1

    ENDS = {
        "deactivated": lambda idp, root: m.set_user_active(idp, m.LOCAL, root, False),
        "locked by an administrator": lambda idp, root: m.set_lockout(idp, m.LOCAL, root, "2100-01-01T00:00:00Z"),
        "demoted": lambda idp, root: m.unassign_role(idp, m.LOCAL, root, m.MAD_ADMIN_ROLE_ID),
        "no administrator, and nothing else": lambda idp, root: idp.store.run("DELETE FROM user_role"),
        "revoked": lambda idp, root: m.revoke_user(idp, m.LOCAL, root, "user_revoked"),
        "password set by another": lambda idp, root: m.reset_password(idp, m.LOCAL, root, "another battery staple"),
        "deleted": lambda idp, root: m.delete_user(idp, m.LOCAL, root),
        "restored from a backup": lambda idp, root: idp.store.put_meta("revoked_before", idp.now_ms() + 1),
    }

    @pytest.mark.parametrize("how", ENDS)
    def test_what_ends_a_user_ends_it_with_the_next_request(self, tab, idp, new_user, root, how):
        new_user("second", admin=True)
        with idp.store.transaction(identity=True):
            self.ENDS[how](idp, root.id)
        assert error_of(tab("GET", "/users")) == (401, "invalid_token")
        assert tab("GET", "/dashboard/session").status == 401

    def test_signing_out_ends_it_and_clears_the_browser(self, tab, idp):
        answer = tab("DELETE", "/dashboard/session")
        assert answer.status == 200 and answer.headers["clear-site-data"] == '"cache", "storage"'
        assert any(line.startswith("mad-admin=;") and "Max-Age=0" in line for line in answer.cookies)
        assert idp.store.value("SELECT count(*) FROM admin_session") == 0

    def test_logout_ends_it_too(self, tab):
        assert tab("POST", "/logout").status == 200
        assert tab("GET", "/users").status == 401


class TestPlace:
    """Cookies ignore ports: another service of the host receives the cookie, and may use it from elsewhere."""

    @pytest.mark.parametrize("other", [{"peer": "192.0.2.8"}, {"agent": "curl/8"}, {"peer": "2001:db8::1"}])
    def test_from_elsewhere_nothing_goes_without_the_password(self, tab, idp, other):
        thief = tab.elsewhere(**other)
        for method, path, body in (("GET", "/users", None), ("POST", "/roles", {"name": "x"})):
            assert error_of(thief(method, path, body)) == (403, "reauthentication_required")
        assert thief("GET", "/dashboard/session").json["proven_until"] is None
        assert actions(idp, "privileged_request_refused")
        assert tab("GET", "/users").status == 200

    def test_it_is_not_kept_alive_from_elsewhere(self, tab, clock):
        thief = tab.elsewhere(peer="192.0.2.8")
        for _ in range(IDLE // 300):
            clock.pass_(300)
            thief("GET", "/users")
        assert tab("GET", "/users").status == 401

    def test_a_proof_moves_the_session(self, tab):
        there = tab.elsewhere(peer="198.51.100.9")
        assert error_of(there.prove("wrong")) == (403, "invalid_grant")
        assert there("GET", "/users").status == 403
        assert there.prove().json["proven_until"]
        assert there("GET", "/users").status == 200
        assert error_of(tab("GET", "/users")) == (403, "reauthentication_required")

    def test_a_whole_network_of_ipv6_is_one_place(self, admin, root):
        tab = Tab(admin, peer="2001:db8:1:2::1")
        tab.sign_in()
        assert tab.elsewhere(peer="2001:db8:1:2:3:4:5:6")("GET", "/users").status == 200
        assert tab.elsewhere(peer="2001:db8:1:3::1")("GET", "/users").status == 403


NEEDS = [  # (method, path, body), what the path names being somebody with rights, or the console's own user
    ("POST", "/users/root/reset", {"new_password": "another battery staple"}),
    ("PUT", "/users/root", {"email": "new@example.org"}),
    ("POST", "/users/root/deactivate", None), ("POST", "/users/root/revoke", None),
    ("POST", "/users/root/set-lockout", {"lockout_until": "2100-01-01T00:00:00Z"}),
    ("POST", "/users/root/clear-lockout", None), ("POST", "/users/root/verify-email", None),
    ("POST", "/users/alice/totp/enroll", {}), ("POST", "/users/alice/disable-totp", None),
    ("POST", "/users/alice/totp/verify", {"code": "123456"}),
    ("POST", "/roles/assign", {"user_id": "alice", "role_id": "MadAdmin"}),
    ("POST", "/roles/unassign", {"user_id": "root", "role_id": "some"}),
    ("PUT", "/users/alice/roles", [{"id": m.MAD_ADMIN_ROLE_ID}]), ("PUT", "/users/root/roles", {"roles": []}),
    ("POST", "/users/root/scopes", {"ids": ["api:read"]}), ("DELETE", "/users/root/scopes/api:read", None),
    ("DELETE", "/users/alice", None), ("DELETE", "/clients/service", None),
    ("POST", "/audit-logs/purge", {"older_than_days": 1}), ("POST", "/backup", {}),
    ("GET", "/backup/a-name?offset=0", None), ("DELETE", "/backup/a-name", None),
    ("GET", "/backup/a-name?offset=1", None), ("GET", "/backup/a-name?offset=1048576", None),
    ("POST", "/users/root/invitations", {}), ("POST", "/users/alice/recovery-codes", None),
    ("POST", "/scopes/assign-to-user", {"user_id": "root", "scope_id": "api:read"}),
    ("POST", "/scopes/remove-from-user", {"user_id": "root", "scope_id": "api:read"}),
    ("DELETE", "/consents", None), ("DELETE", "/clients/service/consents", None),
    ("POST", "/keys/rotate", {}), ("POST", "/keys/a-kid/revoke", None), ("POST", "/sessions/revoke-all", None),
]
NEEDS_NONE = [
    ("GET", "/users/root", None), ("PUT", "/users/alice", {"email": "new@example.org"}),
    ("POST", "/users/alice/reset", {"new_password": "another battery staple"}),
    ("POST", "/roles/assign", {"user_id": "alice", "role_id": "some"}), ("POST", "/users/alice/deactivate", None),
    ("PUT", "/users/alice/roles", {"roles": [{"id": "some"}]}), ("DELETE", "/roles/some", None),
    ("POST", "/clients/service/revoke", None),
    ("POST", "/users/alice/invitations", {}), ("DELETE", "/users/alice/consents/service", None),
    ("POST", "/scopes/assign-to-user", {"user_id": "alice", "scope_id": "api:read"}),
    ("POST", "/scopes/assign-to-client", {"client_id": "service", "scope_id": "api:read"}),
]


class TestProof:
    @pytest.fixture
    def stale(self, tab, alice, service, clock, monkeypatch, tmp_path):
        """A tab whose last proof is five minutes old."""
        monkeypatch.chdir(tmp_path)  # where the keys are looked for
        assert tab("POST", "/roles", {"name": "some"}).status == 200
        clock.pass_(m.PROOF_TTL)
        return tab

    @pytest.mark.parametrize("method, path, body", NEEDS)
    def test_what_weakens_or_destroys_asks_for_the_password_again(self, stale, method, path, body):
        answer = stale(method, path, body)
        assert error_of(answer) == (403, "reauthentication_required")
        assert "www-authenticate" not in answer.headers
        assert stale.prove().status == 200
        assert stale(method, path, body).json.get("error") != "reauthentication_required"

    @pytest.mark.parametrize("method, path, body", NEEDS_NONE)
    def test_the_rest_does_not(self, stale, method, path, body):
        assert stale(method, path, body).json.get("error") != "reauthentication_required"

    def test_an_access_token_has_a_short_life_of_its_own(self, stale, admin, admin_token, clock):
        clock.pass_(m.PROOF_TTL + 1)
        assert admin("DELETE", "/clients/service", bearer=admin_token).status == 200

    @pytest.fixture
    def fetch(self, idp, tab, clock):
        """Fetch pieces of a backup of three octets, one a piece, with ever older proofs: the octet, or None."""
        def read(idp, name, offset):
            return b"abc"[offset : offset + 1], offset + 1 if offset < 2 else 0

        idp.machine = msgspec.structs.replace(MACHINE, read_backup_piece=read)

        def ask(offset, name="one", tab=tab):
            answer = tab("GET", f"/backup/{name}?offset={offset}")
            clock.pass_(m.PROOF_TTL)
            assert answer.status == 200 or error_of(answer) == (403, "reauthentication_required")
            return answer.body.decode() if answer.status == 200 else None

        return ask

    def test_a_backup_that_one_began_to_fetch_is_fetched_to_its_end(self, fetch, tab):
        assert [fetch(offset) for offset in (0, 1, 1, 2, 2)] == ["a", "b", "b", "c", "c"], "a piece may be lost on its way"
        assert fetch(0) is None and fetch(1) is None

    def test_and_nothing_else_goes_with_it(self, fetch, tab, admin):
        assert fetch(0) == "a"
        other = Tab(admin)
        other.sign_in()
        assert fetch(0, "two", other) == "a"
        assert [fetch(2), fetch(1, "two"), fetch(0), fetch(1)] == [None, None, None, "b"]

    def test_whose_fetch_is_forgotten_is_asked_again(self, fetch, tab, admin, monkeypatch):
        monkeypatch.setattr(m, "FETCHES_MAX", 1)
        assert fetch(0) == "a"
        other = Tab(admin)
        other.sign_in()
        assert fetch(0, "one", other) == "a" and fetch(1) is None
        tab.prove()
        assert fetch(1) == "b"

    def test_a_wrong_password_is_no_proof_and_counts(self, stale, idp, root):
        assert error_of(stale.prove("wrong")) == (403, "invalid_grant")
        # In a browser that its user is known in, which counts by itself.
        assert idp.store.value("SELECT failures FROM device_failure") == 1
        assert error_of(stale("DELETE", "/users/alice")) == (403, "reauthentication_required")

    def test_whoever_has_a_second_factor_proves_both(self, stale, idp, root, give_totp, clock):
        seed = give_totp(idp, root.account)
        clock.pass_(60)
        assert error_of(stale.prove()) == (403, "invalid_grant")
        assert stale.prove(totp=pyotp.TOTP(seed).at(idp.now())).status == 200

    def test_a_proof_needs_the_form_token(self, stale):
        body = {"password": PASSWORD}
        assert stale("POST", "/dashboard/session/proof", body, token="x").status == 403

    def test_a_proof_of_the_future_is_none(self, stale, idp, change):
        change("UPDATE admin_session SET proven_at = :later", later=idp.now() + 3600)
        assert error_of(stale("DELETE", "/users/alice")) == (403, "reauthentication_required")


class TestOwnCredentials:
    """Who changes its own password or second factor stays signed in where it did so, and nowhere else."""

    def test_a_new_password_ends_everything_else(self, tab, admin, root):
        other, token = Tab(admin), admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        other.sign_in()
        SECRETS.add("another battery staple")
        assert tab("POST", "/users/root/reset", {"new_password": "another battery staple"}).status == 200
        assert tab("GET", "/users").status == 200
        assert other("GET", "/users").status == 401 and admin.get("/users", bearer=token).status == 401

    def test_a_second_factor_that_is_set_up_here_ends_everything_else(self, tab, admin, root, idp):
        other = Tab(admin)
        other.sign_in()
        seed = tab("POST", "/users/root/totp/enroll", {}).json["secret"]
        assert tab("POST", "/users/root/totp/verify", {"code": pyotp.TOTP(seed).at(idp.now())}).status == 200
        assert tab("GET", "/dashboard/session").json["totp_enabled"] and other("GET", "/users").status == 401

    def test_a_change_of_somebody_else_keeps_nothing_of_theirs(self, tab, admin, new_user):
        new_user("second", admin=True)
        theirs = Tab(admin)
        theirs.sign_in("second")
        assert tab("POST", "/users/second/reset", {"new_password": "another battery staple"}).status == 200
        assert theirs("GET", "/users").status == 401

    ENDED = {
        "the user": lambda idp, root: m.revoke_user(idp, m.LOCAL, root, "user_revoked"),
        "everybody": lambda idp, root: m.revoke_everything(idp, m.LOCAL),
        "this session": lambda idp, root: idp.store.run("DELETE FROM admin_session"),
    }

    @pytest.mark.parametrize("whose", ENDED)
    def test_what_was_ended_while_the_password_is_hashed_does_not_come_back(self, tab, idp, root, monkeypatch, whose):
        hash_password = m.hash_password

        def hash_slowly(idp, password):
            with idp.store.transaction(identity=True):
                self.ENDED[whose](idp, root.id)
            return hash_password(idp, password)

        monkeypatch.setattr(m, "hash_password", hash_slowly)
        tab("POST", "/users/root/reset", {"new_password": "another battery staple"})
        assert tab("GET", "/users").status == 401

    def test_a_revocation_of_oneself_ends_this_session_too(self, tab):
        assert tab("POST", "/users/root/revoke").status == 200
        assert tab("GET", "/users").status == 401


class TestOwnSessions:
    def test_they_are_listed_with_the_logins_of_programs(self, tab, admin, admin_token, new_user):
        new_user("second", admin=True)
        Tab(admin).sign_in("second")
        rows = tab("GET", "/dashboard/sessions").json
        assert sorted((row["kind"], row["is_current"]) for row in rows) == [("console", True), ("token", False)]
        console = next(row for row in rows if row["is_current"])
        assert (console["ip_address"], console["user_agent"]) == ("192.0.2.7", AGENT)
        by_token = admin.get("/dashboard/sessions", bearer=admin_token).json
        assert {row["id"]: row["is_current"] for row in by_token} == {row["id"]: not row["is_current"] for row in rows}

    def test_one_is_ended_and_no_one_elses(self, tab, admin, admin_token, new_user):
        new_user("second", admin=True)
        theirs = Tab(admin)
        theirs.sign_in("second")
        foreign = theirs("GET", "/dashboard/sessions").json[0]["id"]
        assert tab("DELETE", f"/dashboard/sessions/{foreign}").status == 404
        other = next(row["id"] for row in tab("GET", "/dashboard/sessions").json if not row["is_current"])
        assert tab("DELETE", f"/dashboard/sessions/{other}").status == 200
        assert admin.get("/users", bearer=admin_token).status == 401
        assert theirs("GET", "/users").status == 200

    def test_all_others_are_ended_and_this_one_is_not(self, tab, admin, admin_token):
        other = Tab(admin)
        other.sign_in()
        assert tab("DELETE", "/dashboard/sessions").json["message"] == "2 sessions ended."
        assert other("GET", "/users").status == 401 and admin.get("/users", bearer=admin_token).status == 401
        assert tab("GET", "/users").status == 200


class TestRows:
    """Whatever changes something leaves a row with who did it."""

    DONE = {
        "console_signed_in": lambda tab: tab.sign_in(),
        "console_proven": lambda tab: tab.prove(),
        "console_ended": lambda tab: tab("DELETE", "/dashboard/sessions"),
        "console_signed_out": lambda tab: tab("DELETE", "/dashboard/session"),
    }

    @pytest.mark.parametrize("action", DONE)
    def test_each_act_at_the_console_leaves_one(self, tab, admin, idp, root, action):
        Tab(admin).sign_in()
        before, handle = len(actions(idp, action)), tab.cookies["mad-admin"]
        assert self.DONE[action](tab).status == 200
        rows = actions(idp, action)
        assert len(rows) == before + 1
        assert (rows[0].actor_id, rows[0].target, rows[0].ip_address) == (root.id, root.id, "192.0.2.7")
        assert handle not in repr(rows)

    def test_a_proof_from_elsewhere_says_from_where_the_session_moved(self, tab, idp):
        tab.elsewhere(peer="198.51.100.9").prove()
        assert actions(idp, "console_proven")[0].secondary == "moved_from=192.0.2.7"


class TestFiles:
    @pytest.fixture
    def document(self, admin):
        return admin.get("/dashboard/", headers=[HTML])

    def files(self, idp):
        return [f"/dashboard/files/{idp.console.version}/{name}" for name in idp.console.files]

    @pytest.mark.parametrize("path", ["/", "/dashboard", "/Dashboard", "/Login"])
    def test_the_addresses_of_the_original_lead_a_browser_there(self, admin, path):
        answer = admin.get(path, headers=[HTML])
        assert (answer.status, answer.headers["location"]) == (303, "dashboard/")
        for accept in ("", "*/*", "application/json"):
            answer = admin.get(path, headers=[("Accept", accept)])
            assert error_of(answer) == (404, "not_found") and answer.headers["x-not-found"] == "route"

    @pytest.mark.parametrize("path", ["/nowhere", "/a/b", "/dashboard/x", "/dashboard/dashboard/"])
    def test_an_unknown_address_leads_nowhere(self, admin, path):
        assert error_of(admin.get(path, headers=[HTML])) == (404, "not_found")

    def test_the_document_is_asked_for_again_each_time(self, admin, document):
        assert document.headers["cache-control"] == "no-cache"
        again = admin.get("/dashboard/", headers=[("If-None-Match", document.headers["etag"])])
        assert again.status == 304 and again.body == b""

    def test_its_policy_lets_nothing_in_from_elsewhere(self, document):
        policy = dict(part.split(" ", 1) for part in document.headers["content-security-policy"].split("; "))
        assert policy == {
            "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' blob:",
            "connect-src": "'self'", "frame-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
            "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'",
        }
        assert document.headers["x-frame-options"] == "DENY"
        assert document.headers["cross-origin-opener-policy"] == "same-origin"
        assert document.headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in document.headers["permissions-policy"]

    def test_its_language_is_the_browsers(self, admin):
        german = admin.get("/dashboard/", headers=[("Accept-Language", "de-AT")])
        assert b'<html lang="de"' in german.body and "Accept-Language" in german.headers["vary"]

    def test_everything_it_names_is_there_and_stays(self, admin, idp, document):
        named = re.findall(r'(?:href|src)="([^"#]+)', document.body.decode())
        assert named and all(path.startswith(f"files/{idp.console.version}/") for path in named if not path.startswith("data:"))
        for path in [f"/dashboard/{name}" for name in named if not name.startswith("data:")] + self.files(idp):
            answer = admin.get(path, headers=[("Accept-Encoding", "gzip, br")])
            assert answer.status == 200, path
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert answer.headers["content-encoding"] == "gzip" and "Accept-Encoding" in answer.headers["vary"]
            plain = admin.get(path)
            assert "content-encoding" not in plain.headers and plain.body == gzip.decompress(answer.body)

    @pytest.mark.parametrize("accepted", ["", "br", "gzip;q=0", "br, gzip; q=0.0", "identity"])
    def test_a_client_without_gzip_gets_none(self, admin, idp, accepted):
        answer = admin.get(self.files(idp)[0], headers=[("Accept-Encoding", accepted)])
        assert "content-encoding" not in answer.headers

    @pytest.mark.parametrize("path", ["000000000000/main.js", "{version}/index.html", "{version}/../index.html", "{version}/"])
    def test_nothing_else_is(self, admin, idp, path):
        assert admin.get("/dashboard/files/" + path.format(version=idp.console.version)).status == 404

    def test_it_is_small(self, idp):
        sizes = {name: len(file.packed) for name, file in idp.console.files.items() if not name.startswith("words/")}
        assert sum(sizes.values()) <= 250_000

    def test_a_hostile_name_of_the_box_is_text(self, make_idp, options):
        content = make_idp(options).console.document("en", Brand('<script>"{version}', "#1f5fbf", "")).decode()
        assert "<script>&quot;" not in content and "&lt;script&gt;&quot;{version}" in content


class TestSource:
    """What no other tool looks at: the rules that the modules keep."""

    @pytest.fixture
    def modules(self, idp):
        return {
            name: file.content().decode()
            for name, file in idp.console.files.items() if name.endswith(".js") and not name.startswith("vendor/")
        }

    FORBIDDEN = [
        (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|dangerouslySetInnerHTML|\beval\(|new Function", set()),
        (r"\bfetch\(", {"api.js"}), (r"\bIntl\.|toLocale", {"words.js"}),
        (r"localStorage|indexedDB|document\.cookie", set()), (r"sessionStorage", {"api.js"}),
        (r"https?://(?!www\.w3\.org)", None),
    ]

    @pytest.mark.parametrize("word, where", FORBIDDEN)
    def test_what_only_one_module_does(self, modules, word, where):
        if where is None:  # in comments, and in what is shown as text
            where = {"rooms/connect.js", "parts/form.js"}
        code = {name: re.sub(r"^\s*(//|\*|/\*).*$", "", text, flags=re.M) for name, text in modules.items()}
        assert {name for name, text in code.items() if re.search(word, text)} <= where

    def imported(self, idp, name):
        """The paths of all that a module imports before it runs, and what these import."""
        found, left = set(), [name]
        while left:
            path = left.pop()
            text = idp.console.files[path].content().decode()
            for target in re.findall(r"""\bfrom\s*["'](\.[^"']+)["']""", text):
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
                if target not in found:
                    found.add(target)
                    left.append(target)
        return found

    def test_the_first_view_is_what_the_document_names_and_its_words_stand_in_it(self, admin, idp, modules):
        """A slow network pays for each round: browsers have six connections to a host, and there are two rounds."""
        document = admin.get("/dashboard/", headers=[("Accept-Language", "de")]).body.decode()
        preloaded = set(re.findall(r'modulepreload" href="files/[0-9a-f]+/([^"]+)', document))
        assert preloaded == self.imported(idp, "main.js")
        assert len(re.findall(r'(?:stylesheet|modulepreload)" href=|<script', document)) == 12
        words = json.loads(html.unescape(re.search(r'name="words" content="([^"]+)"', document)[1]))
        needed = set(re.findall(r'\bt\(\s*"([a-z0-9_]+)"', modules["main.js"] + modules["rooms/signin.js"]))
        assert needed - {"session_ended_text", "somebody_else"} <= set(words), "but for those over a room"
        assert words["sign_in"] == "Anmelden" and "Die Konsole wird geladen" in document

    def test_what_comes_after_it_comes_at_once(self, idp, modules):
        ahead = set(re.findall(r'"([^"]+)"', re.search(r"const AHEAD = \[(.*?)\]", modules["main.js"], re.S)[1]))
        assert ahead <= set(modules) and len(ahead) > 10
        first = self.imported(idp, "main.js")
        for name in ("shell.js", "rooms/home.js", "rooms/people.js", "rooms/applications.js"):
            needed = {path for path in self.imported(idp, name) if path.startswith(("parts/", "vendor/"))}
            assert needed <= ahead | first, f"{name} would wait for one after the other"

    def test_every_import_is_a_file(self, modules, idp):
        for name, text in modules.items():
            folder = name.rpartition("/")[0]
            for path in re.findall(r"""(?:from|import|import\()\s*["'](\.[^"']+)["']""", text):
                parts = (folder.split("/") if folder else []) + path.split("/")
                flat = []
                for part in parts:
                    if part == "..":
                        flat.pop()
                    elif part != ".":
                        flat.append(part)
                assert "/".join(flat) in idp.console.files, f"{name} imports {path}"

    def test_every_word_is_there_in_every_language_and_is_used(self, modules, idp):
        english, german = (idp.pages.texts[language]["console"] for language in ("en", "de"))
        assert set(english) == set(german)
        source = "\n".join(modules.values())
        used = set(re.findall(r"""\bt\(\s*["']([a-z0-9_]+)["']""", source))
        assert used <= set(english), sorted(used - set(english))

    REFUSED = [  # (method, path, body): what a form of the console may send
        ("POST", "/users", {"username": ".", "email": "no address", "password": "short"}),
        ("POST", "/users", {"username": "\x07", "password": "p" * 2000}),
        ("POST", "/users", {"username": "b" * 300, "password": "password1234"}),
        ("POST", "/users", {"username": "carolus", "password": "carolus\0carolus"}),
        ("POST", "/users", {"username": "12345678-1234-1234-1234-123456789abc", "password": "carolus carolus"}),
        ("POST", "/users/alice/set-lockout", {"lockout_until": "2000-01-01T00:00:00Z", "reason": "x\x07"}),
        ("POST", "/clients", {"client_id": "a b", "display_name": "\x07"}),
        ("POST", "/clients", {"client_id": "new", "redirect_uris": ["app.example", "https://a/#b", "http://a.example/"]}),
        ("POST", "/clients", {"client_id": "new", "client_type": "public", "cors_origins": ["https://A.example/"]}),
        ("POST", "/clients/service/idp", {"provider_key": "a b", "issuer": "nowhere"}),
        ("POST", "/client/options/TOKEN_EXPIRATION/ext", {"client_id": "service", "options": "soon"}),
        ("POST", "/roles", {"name": "."}), ("POST", "/permissions", {"name": "\x07"}), ("POST", "/scopes", {"name": 'a"b'}),
        ("POST", "/users/alice/recovery-codes", None),
    ]

    @pytest.mark.parametrize("method, path, body", REFUSED)
    def test_what_a_form_is_refused_for_has_words(self, tab, idp, alice, service, method, path, body):
        answer = tab(method, path, body)
        assert answer.status == 400 and answer.json["errors"]
        for text in answer.json["errors"].values():
            said = re.split("[;(]", re.sub(r"^\S+: ", "", text))[0].lower()  # "https://one.example: must …"
            key = "wrong_" + re.sub(r"[^a-z]+", "_", re.sub(r"\d+", "n", said)).strip("_")
            assert key in idp.pages.texts["de"]["console"], (key, text)

    NO_ROOM = {  # route: why no room leads there
        "GET /ping": "it says nothing", "GET /version": "/status has it", "GET /health/ready": "/status has it",
        "GET /": "leads here", "GET /dashboard/": "is the console", "GET /dashboard/files/<version>/<name:path>": "is the console",
        "GET /.well-known/microauthd/ca.pem": "for programs, before they trust the box",
        "POST /token": "for clients with a bearer token", "POST /logout": "for clients with a bearer token",
        "GET /dashboard/preview": "the frame of Settings shows it", "GET /metrics": "for programs; Home draws them", "GET /openapi.json": "Settings leads to the page that shows it",
        "GET /swagger/rapidoc-min.js": "belongs to that page",
        "GET /users/id-by-name/<name>": "a GET by name does it", "GET /roles/id-by-name/<name>": "a GET by name does it",
        "GET /permissions/id-by-name/<name>": "a GET by name does it", "GET /scopes/id-by-name/<name>": "a GET by name does it",
        "GET /clients/id-by-name/<name>": "a GET by name does it", "GET /permissions/retrieve/all": "another name of a list",
        "POST /users/verify-password": "a second sign-in would be a second place to guess at",
        "POST /users/<id>/totp/generate": "writes a file on the box; the room shows the picture",
        "POST /users/<id>/<client_id>/disable-totp": "another name of /users/<id>/disable-totp",
        "POST /users/<id>/verify-email": "PUT /users/<id> does it", "PUT /users/<id>/scopes": "one is given and taken at a time",
        "GET /roles/user/<id>": "another name of /users/<id>/roles", "GET /permissions/user/<id>": "the roles say it, with by which",
        "POST /permissions/assign": "another name of /roles/<id>/permissions",
        "POST /scopes/assign-to-user": "another name of /users/<id>/scopes",
        "POST /scopes/remove-from-user": "another name of /users/<id>/scopes",
        "GET /client/options/<flag>": "/clients/<id>/options has all", "GET /client/options/<flag>/ext": "/clients/<id>/options has all",
        "GET /clients/<id>/idp/<idp_id>": "the list has all of it", "GET /sessions/user/<id>": "/sessions?user_id= goes on behind an id",
    }
    PIECEWISE = {  # route: (module, what makes its path there, for it is not in one piece)
        "POST /users/<id>/totp/enroll": ("parts/factor.js", 'at("totp", "enroll")'),
        "POST /users/<id>/totp/verify": ("parts/factor.js", 'at("totp", "verify")'),
        "DELETE /clients/<id>/scopes/<scope_id>": ("rooms/applications.js", 'send("DELETE", `${base}/${encodeURIComponent(scope.id)}`)'),
        "DELETE /clients/<id>/redirect-uris/<record_id>": ("rooms/applications.js", 'send("DELETE", `${base}/${encodeURIComponent(row.id)}`)'),
        "DELETE /clients/<id>/post-logout-redirect-uris/<record_id>": ("rooms/applications.js", 'at="post-logout-redirect-uris"'),
        "DELETE /clients/<id>/cors-origins/<record_id>": ("rooms/applications.js", 'at="cors-origins"'),
        "PUT /clients/<id>/idp/<idp_id>": ("rooms/applications.js", 'send("PUT", path(...base, row.id), values)'),
        "GET /swagger": ("rooms/settings.js", 'href="../swagger"'),
    }

    def test_every_route_is_reached_from_some_room_or_listed_with_the_reason(self, modules):
        asked = []  # (methods, the segments of a path with {} for what is put in, the module)
        for text in modules.values():
            for line in text.splitlines():
                made = [
                    [part.strip()[1:-1] if part.strip()[0] == '"' else "{}" for part in re.split(r",\s*", parts)]
                    for parts in re.findall(r"\bpath\(((?:[^()]|\([^()]*\))+)\)", line)
                ]
                made += [
                    re.sub(r"\$\{[^}]*\}?", "{}", literal.partition("?")[0]).split("/")
                    for literal in re.findall(r"""["`]/([a-z][^"`\s]*)""", line)
                ]
                methods = set(re.findall(r'"(POST|PUT|DELETE)"', line))
                if not methods or re.search(r"\b(get|all|useList|optional|count)\(", line):
                    methods.add("GET")
                    methods |= set() if re.search(r"\b(get|all|useList|optional|count)\(", line) else {"POST", "PUT", "DELETE"}
                asked += [(methods, segments, text) for segments in made]

        def is_asked(method, path):
            wanted = re.sub(r"<[^>]*>", "{}", path)[1:].split("/")
            return any(
                method in methods and len(segments) == len(wanted) and all(
                    there == here or "{}" in here and (there == "{}" or f'"{there}"' in text)
                    for there, here in zip(wanted, segments, strict=True)
                )
                for methods, segments, text in asked
            )

        missing, stale = [], set(self.NO_ROOM)
        for route in m.ADMIN.routes:
            for method in route.methods:
                name = f"{method} {route.paths[0]}"
                stale.discard(name)
                module, piece = self.PIECEWISE.get(name, ("", ""))
                if not (name in self.NO_ROOM or piece and piece in modules[module] or any(is_asked(method, path) for path in route.paths)):
                    missing.append(name)
        assert (missing, stale) == ([], set())

    def test_every_action_that_is_audited_has_words(self, idp):
        """The actions are the texts that the code gives to a parameter of this name."""
        trees = [ast.parse(file.read_text()) for file in (Path(m.__file__), *Path(m.__file__).parent.glob("appliance/*.py"))]
        calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
        takers = {
            node.name: [argument.arg for argument in node.args.args].index("action")
            for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and "action" in [argument.arg for argument in node.args.args]
        }
        gaps = {"uri": m.URI_KINDS, "scope": ("user", "client")}
        actions = set()
        for call in calls:
            place = takers.get(getattr(call.func, "id", ""), len(call.args))
            for given in call.args[place : place + 1]:
                if isinstance(given, ast.JoinedStr):  # f"{kind}_uri_added"
                    text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in given.values)
                    actions |= {text.format(kind) for kind in gaps["uri" if "uri" in text else "scope"]}
                else:
                    parts = [part.value for part in ast.walk(given) if isinstance(part, ast.Constant)]
                    actions |= {part for part in parts if isinstance(part, str)}
        assert len(actions) > 80 and {"redirect_uri_added", "user_created"} <= actions
        words = idp.pages.texts["en"]["console"]
        assert sorted(action for action in actions if f"action_{action}" not in words) == []

    def test_a_word_has_the_same_gaps_in_every_language(self, idp):
        english, german = (idp.pages.texts[language]["console"] for language in ("en", "de"))

        def gaps(text):
            return set(re.findall(r"\{(\w+)\}", text if isinstance(text, str) else json.dumps(list(text.values()))))

        assert [key for key in english if gaps(english[key]) != gaps(german[key])] == []


class TestTokens:
    @pytest.mark.parametrize("brand", ["#1f5fbf", "#ffffff", "#000000", "#ffd400", "#2ecc71", "#800080", "#777777"])
    def test_the_edge_of_a_brand_stands_out_from_every_surface(self, brand):
        """WCAG 2.2 §1.4.11"""
        light, dark = brand_edge(brand, "#000000", LIGHT_SURFACES), brand_edge(brand, "#ffffff", DARK_SURFACES)
        assert all(contrast(light, surface) >= 3 for surface in LIGHT_SURFACES)
        assert all(contrast(dark, surface) >= 3 for surface in DARK_SURFACES)

    def test_the_surfaces_are_those_of_the_sheet(self, idp):
        light, dark = re.split(r"prefers-color-scheme: dark\) \{\n", idp.pages.tokens.decode())
        for sheet, surfaces in ((light, LIGHT_SURFACES), (dark, DARK_SURFACES)):
            found = re.findall(r"--(?:paper|ground|hover|chosen|raised): (#[0-9a-f]{6})", sheet)
            assert set(found) == set(surfaces)
