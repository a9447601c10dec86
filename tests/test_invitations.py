"""Invitations: a link by which a user chooses a password, once within 24 hours."""

import re
import threading

import microauthd as m
import pyotp
import pytest
from browser import Browser, title
from conftest import CHEAP, PASSWORD, SECRETS
from appliance.base.settings import Options
from appliance.upkeep import purge

NEW_PASSWORD = "another battery staple"
SECRETS.add(NEW_PASSWORD)


@pytest.fixture
def browser(idp):
    return Browser(m.App(idp, m.AUTH))


@pytest.fixture
def invite(call):
    """Invite a user as an administrator: the path of the link."""

    def make(user="alice", purpose="invite"):
        answer = call("POST", f"/users/{user}/invitations", {"purpose": purpose})
        assert answer.status == 200, answer
        SECRETS.add(answer.json["url"].partition("code=")[2])
        return answer.json["url"].removeprefix("https://idp.example")

    return make


@pytest.fixture
def can_log_in(auth, service):
    def ask(password, username="alice", **more):
        body = {"grant_type": "password", "username": username, "password": password} | more
        return auth.post("/token", body, auth=service).status == 200

    return ask


class TestTheLink:
    def test_lets_a_new_user_choose_password_and_second_factor(self, idp, call, browser, invite):
        body = {"username": "bob", "email": "bob@example.org", "without_password": True}
        assert call("POST", "/users", body).status == 200
        path = invite("bob")
        assert title(browser.open(path)) == "Choose your password" and b"bob" in browser.answer.body
        assert title(browser.submit(new_password=NEW_PASSWORD)) == "Set up a second factor"
        seed = re.search(rb'class="secret">([A-Z2-7 ]+)<', browser.answer.body)[1].decode().replace(" ", "")
        SECRETS.add(seed)
        assert title(browser.submit(totp=pyotp.TOTP(seed).at(idp.now()))) == "Recovery codes"
        assert title(browser.submit()) == "Your account" and b"bob@example.org" in browser.answer.body
        assert call("GET", "/users/bob").json["totp_enabled"]

    def test_the_second_factor_may_wait(self, call, browser, invite, alice, can_log_in):
        browser.open(invite())
        browser.submit(new_password=NEW_PASSWORD)
        assert title(browser.submit(button=("skip", "1"))) == "Your account"
        assert not call("GET", "/users/alice").json["totp_enabled"] and can_log_in(NEW_PASSWORD)

    def test_a_reset_asks_for_the_second_factor_that_is_there_and_keeps_it(
        self, idp, call, browser, invite, alice, give_totp, can_log_in
    ):
        seed = give_totp(idp, alice.account)
        browser.open(invite(purpose="reset"))
        assert title(browser.submit(new_password=NEW_PASSWORD)) == "Second factor"
        assert browser.open("/account").status == 200 and title(browser.answer) == "Sign in", "not logged in by the link"
        assert not can_log_in(NEW_PASSWORD)
        idp.clock.pass_(60)
        assert can_log_in(NEW_PASSWORD, totp=pyotp.TOTP(seed).at(idp.now()))

    def test_a_reset_offers_no_second_factor(self, browser, invite, alice):
        browser.open(invite(purpose="reset"))
        assert title(browser.submit(new_password=NEW_PASSWORD)) == "Your account"

    def test_looking_at_it_spends_nothing_and_its_post_spends_it(self, idp, browser, invite, alice, can_log_in):
        path = invite()
        for _ in range(3):
            assert title(browser.open(path)) == "Choose your password"
        form = browser.forms().forms[0]["fields"]
        browser.submit(new_password=NEW_PASSWORD)
        again = browser("POST", "/invite", form | {"new_password": "a third battery staple"})
        assert again.status == 404 and title(again) == "This link works no more"
        assert browser.open(path).status == 404 and can_log_in(NEW_PASSWORD)

    def test_of_two_who_post_it_at_once_one_does(self, idp, invite, alice):
        path = invite()
        browsers = [Browser(m.App(idp, m.AUTH)) for _ in range(4)]
        for one in browsers:
            one.open(path)
        threads = [
            threading.Thread(target=one.submit, kwargs={"new_password": f"{NEW_PASSWORD} {number}"})
            for number, one in enumerate(browsers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(one.answer.status for one in browsers) == [200, 404, 404, 404]

    def test_a_password_that_is_refused_spends_nothing(self, browser, invite, alice, can_log_in):
        browser.open(invite())
        for refused in ("short", "alice@example.org", "password1234", ""):
            answer = browser.submit(new_password=refused)
            assert answer.status == 400 and b'role="alert"' in answer.body and b"password1234" not in answer.body
        browser.submit(new_password=NEW_PASSWORD)
        assert can_log_in(NEW_PASSWORD)

    def test_everything_issued_before_ends_and_the_old_password_with_it(self, auth, browser, invite, alice, bearer, can_log_in):
        browser.open(invite(purpose="reset"))
        browser.submit(new_password=NEW_PASSWORD)
        assert auth.get("/me", bearer=bearer).status == 401 and not can_log_in(alice.password)

    def test_a_locked_account_gets_its_password_and_stays_closed(self, idp, browser, invite, alice, change):
        change("UPDATE account SET lockout_until = :until", until=idp.now() + 600)
        browser.open(invite())
        assert title(browser.submit(new_password=NEW_PASSWORD)) == "Your password is set"
        assert title(browser.open("/account")) == "Sign in"

    def test_another_site_logs_nobody_in_by_a_link_of_its_own(self, idp, browser, invite, alice, can_log_in):
        path = invite()
        thief = Browser(m.App(idp, m.AUTH))
        thief.open(path)
        form = thief.forms().forms[0]["fields"]
        for data in (form, form | {"form": ""}):
            answer = browser("POST", "/invite", data | {"new_password": NEW_PASSWORD})
            assert answer.status == 403 and not can_log_in(NEW_PASSWORD)

    def test_its_pages_speak_german(self, browser, invite, alice):
        browser("GET", invite(), headers=[("Accept-Language", "de")])
        assert title(browser.answer) == "Wählen Sie Ihr Passwort" and "mindestens" in browser.answer.body.decode().lower()

    @pytest.mark.parametrize("code", ["", "x", "x" * 43, "x" * 5000, "%00", "é"])
    def test_nonsense_is_a_page_that_says_so(self, browser, code):
        answer = browser("GET", f"/invite?code={code}")
        assert answer.status in (400, 404) and answer.headers["content-type"].startswith("text/html")


class TestItsEnd:
    """It lives 24 hours, one of a user at a time, and no longer than the credentials that it would replace."""

    def is_alive(self, browser, path):
        return browser.open(path).status == 200

    def test_after_a_day(self, browser, invite, alice, clock, idp):
        path = invite()
        clock.pass_(86399)
        assert self.is_alive(browser, path)
        clock.pass_(1)
        assert not self.is_alive(browser, path)
        clock.pass_(1)
        purge(idp)
        assert idp.store.find_invitation_of(alice.id) is None

    def test_by_another(self, browser, invite, alice):
        first, second = invite(), invite(purpose="reset")
        assert not self.is_alive(browser, first) and self.is_alive(browser, second)

    @pytest.mark.parametrize(
        "method, path, body",
        [
            ("POST", "/users/alice/reset", {"new_password": NEW_PASSWORD}), ("POST", "/users/alice/revoke", None),
            ("POST", "/users/alice/deactivate", None), ("DELETE", "/users/alice", None),
            ("POST", "/users/alice/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"}),
            ("POST", "/users/alice/disable-totp", None), ("DELETE", "/invitations/{id}", None),
        ],
    )
    def test_by_a_change_of_the_credentials(self, idp, call, browser, invite, alice, give_totp, method, path, body):
        give_totp(idp, alice.account)
        link = invite()
        (listed,) = call("GET", "/users/alice/invitations").json
        assert call(method, path.format(id=listed["id"]), body).status == 200
        assert not self.is_alive(browser, link)
        if "/invitations/" in path:
            assert call(method, path.format(id=listed["id"])).status == 404

    def test_by_a_second_factor_and_by_recovery_codes(self, idp, browser, invite, alice, give_totp):
        link = invite()
        give_totp(idp, alice.account)
        assert not self.is_alive(browser, link)
        link = invite()
        m.make_recovery_codes(idp, m.LOCAL, alice.id)
        assert not self.is_alive(browser, link)

    def test_not_by_a_login_or_a_new_address(self, idp, call, browser, invite, alice, log_in):
        link = invite()
        log_in(alice)
        assert call("PUT", "/users/alice", {"email": "new@example.org"}).status == 200
        assert call("POST", "/users/alice/clear-lockout").status == 200
        assert self.is_alive(browser, link)

    def test_by_a_restore(self, idp, browser, invite, alice, change):
        link = invite()
        change("UPDATE meta SET value = :ms WHERE name = 'revoked_before'", ms=str(idp.now_ms()))
        assert not self.is_alive(browser, link)


class TestWhoMakesIt:
    def test_it_is_stored_as_a_hash_and_listed_without_its_link(self, idp, call, invite, alice, root):
        code = invite().partition("code=")[2]
        (listed,) = call("GET", "/users/alice/invitations").json
        assert listed.keys() == {"id", "user_id", "purpose", "created_by", "created_at", "expires_at"}
        assert (listed["created_by"], listed["purpose"]) == (root.id, "invite")
        assert idp.store.find_invitation_of(alice.id).handle_sha256 == m.sha256(code)
        written = " ".join(str(row) for row in idp.store.list_audit(limit=100))
        assert code not in written and "invitation_created" in written

    @pytest.mark.parametrize(
        "user, body, status",
        [("nobody", {}, 404), ("alice", {"purpose": "x"}, 400), ("alice", {"purpose": None}, 400), ("alice", {}, 200)],
    )
    def test_whom_it_is_for_must_exist(self, call, alice, user, body, status):
        answer = call("POST", f"/users/{user}/invitations", body)
        assert answer.status == status
        SECRETS.update({answer.json["url"].partition("code=")[2]} if status == 200 else ())

    def test_an_inactive_user_gets_none(self, call, alice):
        call("POST", "/users/alice/deactivate")
        assert "user_id" in call("POST", "/users/alice/invitations", {}).json["errors"]

    @pytest.fixture
    def help_desk(self, idp, auth, new_client):
        client = new_client("desk", scopes=["admin:reset_passwords"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]

        def ask(user):
            answer = auth.post(f"/user/{user}/invitations", bearer=token, json_body={"purpose": "reset"})
            SECRETS.update({answer.json["url"].partition("code=")[2]} if answer.status == 200 else ())
            return answer

        return ask

    def test_by_a_delegated_scope_within_its_reach_only(self, help_desk, alice, root, new_user):
        new_user("boss", ["admin:provision_users"])
        assert [help_desk(user).status for user in ("alice", "root", "boss", "nobody")] == [200, 403, 403, 404]

    @pytest.mark.parametrize("gained", ["role", "scope"])
    def test_and_not_beyond_it_later(self, idp, call, help_desk, browser, alice, gained):
        link = help_desk("alice").json["url"].removeprefix("https://idp.example")
        browser.open(link)
        if gained == "role":
            call("POST", "/roles/assign", {"user_id": "alice", "role_id": "MadAdmin"})
        else:
            call("POST", "/users/alice/scopes", {"scope_ids": ["admin:provision_users"]})
        assert browser.submit(new_password=NEW_PASSWORD).status == 404

    @pytest.fixture
    def second(self, admin, new_user):
        """Another administrator calls ADMIN."""
        new_user("second", admin=True)
        token = admin.post("/token", {"username": "second", "password": PASSWORD}).json["access_token"]
        return lambda method, path, body=None: admin(method, path, bearer=token, json_body=body)

    # What may befall the administrator who made it, and whether it lives on.
    MAKER = {
        "demoted": ("POST", "/roles/unassign", {"user_id": "root", "role_id": "MadAdmin"}, False),
        "deactivated": ("POST", "/users/root/deactivate", None, False), "deleted": ("DELETE", "/users/root", None, False),
        "a new password": ("POST", "/users/root/reset", {"new_password": NEW_PASSWORD}, True),
        "logged out": ("POST", "/users/root/revoke", None, True),
    }

    @pytest.mark.parametrize("how", MAKER)
    def test_it_ends_with_the_rights_of_the_administrator_who_made_it(self, second, invite, browser, alice, how):
        path, (*request, lives) = invite(), self.MAKER[how]
        assert second(*request).status == 200
        assert (browser.open(path).status == 200) is lives
        assert bool(second("GET", "/users/alice/invitations").json) is lives

    DESK = {
        "the scope is taken": ("DELETE", "/clients/desk/scopes/admin:reset_passwords", None),
        "deactivated": ("PUT", "/clients/desk", {"is_active": False}), "deleted": ("DELETE", "/clients/desk", None),
        "revoked": ("POST", "/clients/desk/revoke", None),
    }

    @pytest.mark.parametrize("how", DESK)
    def test_it_ends_with_the_rights_of_the_client_that_made_it(self, call, help_desk, browser, alice, how):
        path = help_desk("alice").json["url"].removeprefix("https://idp.example")
        assert browser.open(path).status == 200 and call(*self.DESK[how]).status == 200
        assert browser.open(path).status == 404

    @pytest.mark.parametrize("taken", ["admin:reset_passwords", None])
    def test_it_ends_with_the_rights_of_the_user_who_made_it(self, call, auth, new_user, new_client, log_in, browser, alice, taken):
        scopes = ["admin:reset_passwords", "admin:list_users"]
        token = log_in(new_user("ann", scopes), new_client("app", scopes=scopes), scope=" ".join(scopes))["access_token"]
        answer = auth.post("/user/alice/invitations", bearer=token, json_body={})
        SECRETS.add(answer.json["url"].partition("code=")[2])
        path = answer.json["url"].removeprefix("https://idp.example")
        assert browser.open(path).status == 200
        assert call("DELETE", f"/users/ann/scopes/{taken or 'admin:list_users'}").status == 200
        assert browser.open(path).status == (404 if taken else 200)

    def test_where_there_are_no_pages_there_are_no_links(self, make_idp):
        idp = make_idp(Options(**CHEAP, enable_pkce=False))
        paths = m.describe_port(idp, m.ADMIN)["paths"]
        assert not [path for path in paths if "invitations" in path]


class TestWithoutAPassword:
    """POST /users with without_password: nobody knows the password until an invitation sets one."""

    @pytest.mark.parametrize(
        "more, member",
        [
            ({"password": NEW_PASSWORD}, "password"), ({"without_password": False}, "password"),
            ({"without_password": 1}, "without_password"),
        ],
    )
    def test_it_is_said_clearly(self, call, more, member):
        body = {"username": "bob", "email": "bob@example.org", "without_password": True} | more
        assert list(call("POST", "/users", body).json["errors"]) == [member]

    def test_a_delegated_caller_must_send_one(self, auth, new_client):
        client = new_client("desk", scopes=["admin:provision_users"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        body = {"username": "bob", "email": "bob@example.org", "without_password": True}
        assert auth.post("/user", bearer=token, json_body=body).status == 400
