"""People, roles, permissions and scopes at the console, in a real browser: who gets in, may what, and is kept out."""

import re
import time
from urllib.parse import urlencode

import pyotp
import pytest
from browser import CHALLENGE
from playwright.sync_api import expect
from test_console_browser import (  # noqa: F401 - fixtures
    HOSTILE, LOOKS, PASSWORD, box, confirm, console, look_around, shoot, sign_in, visit,
)


@pytest.fixture
def room(console, box):  # noqa: F811
    """The console as an administrator: room("#/people"). `room.box` is the box, `room.make(name)` makes a person."""

    def call(path="", **more):
        return console(path, **more)

    def make(name, **members):
        body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD} | members
        return box.call_admin("POST", "/users", body)

    def token(name, password=PASSWORD):
        form = {"grant_type": "password", "username": name, "password": password}
        return box.auth("/token", form, client=box.client)

    call.box, call.make, call.token = box, make, token
    return call


@pytest.fixture(scope="module")
def looked_at(box):  # noqa: F811
    """Somebody who has a session, and a permission, for a look at each place."""
    body = {"username": "looked-at", "email": "looked-at@example.org", "password": PASSWORD}
    box.call_admin("POST", "/users", body)
    box.call_admin("POST", "/permissions", {"name": "look:at"})
    box.log_in("looked-at", PASSWORD)


def done(page, text):
    expect(page.get_by_role("status").filter(has_text=text)).to_be_visible()


def undo(page):
    page.get_by_role("button", name="Undo").last.click()
    done(page, "Taken back.")


class TestInviting:
    def test_a_person_is_made_with_a_link_that_works_once_in_another_browser(self, room, visit):  # noqa: F811
        page = room("#/people")
        page.get_by_role("button", name="Make person").click()
        page.get_by_label("User name").fill("Invited")
        page.get_by_role("button", name="Make person").click()
        card = page.get_by_role("region", name="This link is shown once.")
        link = card.locator("code").inner_text()
        expect(card).to_contain_text("Give it to invited yourself.")
        shoot(page, "invited")
        assert link not in page.url and room.token("invited", "a guess").status == 403

        for _ in range(2):  # it is not spent by being looked at
            other = visit()
            other.goto(link)
        other.locator("[name=new_password]").fill("a phrase of the invited")
        other.locator("[type=submit]").first.click()
        other.wait_for_load_state()
        assert room.token("invited", "a phrase of the invited").status == 200
        again = visit()
        assert again.goto(link).status in (400, 404, 410)

        card.get_by_label("I have it").check()
        card.get_by_role("button", name="Close").click()
        page.reload()
        expect(page.get_by_role("heading", name="invited")).to_be_visible()
        assert link not in page.content()

    def test_what_a_password_must_be_stands_there_before_one_is_refused(self, room):
        page = room("#/people/new")
        page.get_by_label("With a password that you choose").check()
        field = page.get_by_label("Password", exact=True)
        expect(field).to_have_accessible_description(re.compile("At least 8 characters"))
        field.fill("short")
        page.get_by_role("button", name="Show").click()
        expect(field).to_have_attribute("type", "text")
        expect(field).to_have_value("short")

    def test_a_person_is_made_without_a_mouse(self, room):
        page = room("#/people/new")
        page.get_by_label("User name").focus()
        for key in (*"bykeys", "Tab", "Tab", "ArrowDown", "Tab", *"a phrase by keys", "Enter"):
            page.keyboard.press("Space" if key == " " else key)
        expect(page.get_by_role("heading", name="bykeys")).to_be_visible()
        assert room.token("bykeys", "a phrase by keys").status == 200

    def test_another_link_ends_the_one_before(self, room, visit):  # noqa: F811
        room.make("forgetful")
        page = room("#/people/forgetful/profile")
        page.get_by_role("button", name="Invite").click()
        code = page.get_by_role("region", name="This link").locator("code")
        first = code.inner_text()
        page.get_by_role("button", name="Make another link").click()
        expect(code).not_to_have_text(first)
        assert visit().goto(first).status in (400, 404, 410)
        second = code.inner_text()
        page.get_by_role("button", name="End link").click()
        done(page, "The link is ended.")
        expect(code).to_have_count(0)
        assert visit().goto(second).status in (400, 404, 410)


class TestRights:
    def test_a_role_is_made_given_with_undo_and_agrees_with_check_access_and_a_token(self, room):
        person = room.make("worker")
        page = room("#/roles")
        page.get_by_role("button", name="Make role").click()
        page.get_by_label("Name", exact=True).fill("Porter")
        confirm(page, "Make role")
        expect(page.get_by_role("heading", name="Porter")).to_be_visible()
        page.get_by_role("link", name="Roles, permissions, scopes").click()
        page.get_by_role("button", name="Make permission").click()
        page.get_by_label("Name", exact=True).fill("gate:open")
        confirm(page, "Make permission")
        page.get_by_role("link", name="Roles, permissions, scopes").click()
        page.get_by_label("Porter: gate:open").check()
        done(page, "Porter has gate:open now.")
        shoot(page, "matrix")

        page.goto(f"{page.origin}/dashboard/#/people/worker/rights")
        page.get_by_role("checkbox", name="Porter").check()
        expect(page.get_by_role("link", name="gate:open")).to_be_visible()
        undo(page)
        expect(page.get_by_role("checkbox", name="Porter")).not_to_be_checked()
        expect(page.get_by_role("link", name="gate:open")).to_have_count(0)
        assert room.box.call_admin("GET", f"/users/{person['id']}/roles") == []
        page.get_by_role("checkbox", name="Porter").check()
        expect(page.get_by_role("link", name="gate:open")).to_be_visible()

        page.get_by_role("link", name="Check access").click()
        page.get_by_label("Name", exact=True).fill("gate:open")
        page.get_by_role("button", name="Check access").click()
        done(page, "Yes, worker may: gate:open")
        done(page, "Roles: Porter")
        expect(page).to_have_url(re.compile("permission=gate%3Aopen"))
        claims = room.box.call_admin("POST", "/introspect", {"token": room.token("worker").json["access_token"]})
        assert claims["role"] == [room.box.call_admin("GET", "/roles/Porter")["id"]]

        page.goto(f"{page.origin}/dashboard/#/roles/Porter")
        page.get_by_role("button", name="Remove worker").click()
        expect(page.get_by_text("Nobody has it.")).to_be_visible()
        undo(page)
        expect(page.get_by_role("link", name="worker")).to_be_visible()
        page.get_by_label("Add a person by user name").fill("no such person")
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text("There is nobody of this name.")

    def test_a_role_is_described_and_renamed(self, room):
        room.box.call_admin("POST", "/roles", {"name": "old name"})
        page = room("#/roles/old name")
        page.get_by_label("Description").fill("Looks after the gate")
        page.get_by_role("button", name="Save").click()
        done(page, "Saved.")
        expect(page.get_by_role("button", name="Save")).to_be_disabled()
        page.get_by_label("Name", exact=True).fill("new name")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="new name")).to_be_visible()
        assert room.box.call_admin("GET", "/roles/new name".replace(" ", "%20"))["description"] == "Looks after the gate"

    def test_a_scope_is_given_to_a_person_and_taken(self, room):
        room.make("reader")
        page = room("#/people/reader/rights")
        page.get_by_role("checkbox", name="api:read").check()
        done(page, "May be granted api:read now.")
        names = lambda: [row["name"] for row in room.box.call_admin("GET", "/users/reader/scopes")]  # noqa: E731
        assert names() == ["api:read"]
        undo(page)
        assert names() == []


    @pytest.mark.parametrize("kind, name", [("scope", "https://api.example/read?x=1#y"), ("role", HOSTILE), ("permission", HOSTILE)])
    def test_a_name_of_any_characters_has_a_page_and_is_deleted_by_its_name(self, room, kind, name):
        page = room("#/scopes" if kind == "scope" else "#/roles")
        page.get_by_role("button", name=f"Make {kind}").first.click()
        page.get_by_label("Name", exact=True).fill(name)
        confirm(page, f"Make {kind}")
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        page.get_by_role("button", name="Delete …").click()
        page.get_by_role("dialog").get_by_label("Type").fill(name)
        confirm(page, f"Delete {kind}")
        done(page, "is deleted.")
        assert page.locator("main img").count() == 0
        assert name not in [row["name"] for row in room.box.call_admin("GET", f"/{kind}s")]


class TestKeepingOut:
    def test_a_lock_says_why_and_until_when_ends_sessions_and_is_undone(self, room, visit):  # noqa: F811
        room.make("stolen")
        issued = room.token("stolen").json["access_token"]
        page = room("#/people/stolen/profile")
        page.get_by_label("E-mail").fill("half.typed@example.org")
        page.get_by_role("button", name="Lock …").click()
        page.get_by_label("Until when").select_option("for an hour")
        page.get_by_label("Why").fill("telephone was stolen")
        shoot(page, "lock")
        confirm(page, "Lock")
        expect(page.get_by_label("E-mail")).to_have_value("half.typed@example.org")
        assert room.token("stolen").status == 403
        assert not room.box.call_admin("POST", "/introspect", {"token": issued})["active"]
        other = sign_in(visit(path="#/people/stolen"), room.box.new_admin("second"), PASSWORD)
        expect(other.get_by_text("telephone was stolen")).to_be_visible()
        expect(other.get_by_text("by root")).to_be_visible()
        until = room.box.call_admin("GET", "/users/stolen")["lockout_until"]
        other.get_by_role("button", name="Unlock").click()
        expect(other.get_by_text("telephone was stolen")).to_have_count(0)
        assert room.token("stolen").status == 200
        undo(other)
        expect(other.get_by_text("telephone was stolen")).to_be_visible()
        assert room.box.call_admin("GET", "/users/stolen")["lockout_until"] == until
        assert abs(time.mktime(time.strptime(until, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone - time.time() - 3600) < 300

    def test_the_last_administrator_stays_and_is_told_why(self, room):
        for name in [row["username"] for row in room.box.call_admin("GET", "/users?is_admin=true")]:
            if name != "root":
                room.box.call_admin("DELETE", f"/users/{name}")
        page = room("#/people/root/profile")
        page.get_by_role("button", name="Deactivate …").click()
        confirm(page, "Deactivate")
        expect(page.get_by_role("alert")).to_contain_text("This would leave no administrator who can sign in.")
        page.get_by_role("link", name="Rights").click()
        page.get_by_role("checkbox", name="MadAdmin").click()
        expect(page.get_by_role("alert")).to_contain_text("This would leave no administrator who can sign in.")
        expect(page.get_by_role("checkbox", name="MadAdmin")).to_be_checked()

    def test_everything_of_a_person_ends_at_once(self, room):
        room.make("ended")
        issued = room.token("ended").json["access_token"]
        page = room("#/people/ended/sessions")
        expect(page.get_by_role("button", name="End", exact=True).first).to_be_visible()
        page.get_by_role("button", name="End everything …").click()
        expect(page.get_by_role("dialog")).to_contain_text("0 browsers and 2 tokens end at once.")
        confirm(page, "End everything")
        expect(page.get_by_text("No token is alive.")).to_be_visible()
        assert not room.box.call_admin("POST", "/introspect", {"token": issued})["active"]

    def test_a_deletion_wants_the_name_typed(self, room):
        room.make("doomed")
        page = room("#/people/doomed")
        page.get_by_role("button", name="Delete …").click()
        button = page.get_by_role("dialog").get_by_role("button", name="Delete person")
        expect(button).to_be_disabled()
        page.get_by_label("Type doomed to confirm").fill("doomed")
        button.click()
        expect(page.get_by_role("heading", name="People")).to_be_visible()
        assert room.box.call_admin("GET", "/users/doomed", status=404)


class TestPerson:
    def test_a_second_factor_is_set_up_for_somebody_renewed_and_turned_off(self, room):
        room.make("factor-of-two")
        page = room("#/people/factor-of-two/factor")
        page.get_by_role("button", name="Set it up").click()
        seed = page.get_by_label("Seed", exact=True).inner_text()
        page.get_by_label("Code that it shows").fill(pyotp.TOTP(seed).now())
        page.get_by_role("button", name="Turn on").click()
        codes = page.get_by_label("Recovery codes", exact=True)
        first = codes.inner_text()
        page.get_by_role("button", name="New recovery codes").click()
        confirm(page, "New recovery codes")
        expect(codes).not_to_have_text(first)
        expect(page.get_by_text(f"{len(codes.inner_text().split())} recovery codes are left.")).to_be_visible()
        page.get_by_role("button", name="Turn off").click()
        confirm(page, "Turn off")
        expect(page.get_by_text("○ The second factor is off.")).to_be_visible()

    def test_the_change_of_another_is_shown_beside_ones_own(self, room):
        room.make("shared")
        page = room("#/people/shared/profile")
        page.get_by_label("E-mail").fill("mine@example.org")
        room.box.call_admin("PUT", "/users/shared", {"email": "theirs@example.org"})
        page.get_by_role("button", name="Save").click()
        note = page.get_by_role("alert").filter(has_text="Somebody changed this")
        expect(note.get_by_role("row", name="E-mail mine@example.org theirs@example.org")).to_be_visible()
        note.get_by_role("button", name="Take mine").click()
        page.get_by_role("button", name="Save").click()
        done(page, "Saved.")
        assert room.box.call_admin("GET", "/users/shared")["email"] == "mine@example.org"

    def test_a_form_in_which_nothing_is_typed_follows_what_another_changed(self, room):
        room.make("followed")
        page = room("#/people/followed/profile")
        room.box.call_admin("PUT", "/users/followed", {"email": "followed@box.example"})
        page.evaluate("dispatchEvent(new Event('answering'))")  # as after the network was gone
        expect(page.get_by_label("E-mail")).to_have_value("followed@box.example")
        page.get_by_label("User name").fill("Renamed ")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="renamed")).to_be_visible()
        expect(page.get_by_label("User name")).to_have_value("renamed")

    def test_the_history_has_what_was_done_by_and_to_the_person(self, room):
        room.make("watched")
        room.box.call_admin("POST", "/users/watched/set-lockout", {"lockout_until": "9999-12-31T00:00:00Z", "reason": HOSTILE})
        room.token("watched")
        page = room("#/people/watched/history")
        for text in ("made the person", "locked", "failed to sign in"):
            expect(page.get_by_role("cell").filter(has_text=text).first).to_be_visible()
        expect(page.locator("q")).to_have_text(HOSTILE)
        assert page.locator("main img").count() == 0


    def test_what_the_person_agreed_to_is_taken_back_and_a_browser_signed_out(self, room, visit):  # noqa: F811
        room.make("agreeing")
        room.box.call_admin("POST", "/clients", {
            "client_id": "third", "display_name": "Holiday photos", "is_first_party": False, "redirect_uris": [f"http://127.0.0.1:{room.box.admin_port}/ping"],
        })
        query = {
            "client_id": "third", "response_type": "code", "scope": "openid email", "redirect_uri": f"http://127.0.0.1:{room.box.admin_port}/ping",
            "code_challenge": CHALLENGE, "code_challenge_method": "S256",
        }
        person = visit()
        person.goto(f"http://127.0.0.1:{room.box.auth_port}/authorize?{urlencode(query)}")
        person.locator("[name=username]").fill("agreeing")
        person.locator("[name=password]").fill(PASSWORD)
        person.locator("[type=submit]").first.click()
        person.get_by_role("button", name="Allow").click()
        person.wait_for_url("**/ping?code=*")

        page = room("#/people/agreeing/consents")
        expect(page.get_by_role("row").filter(has_text="Holiday photos")).to_contain_text("email")
        page.get_by_role("button", name="Take back").click()
        confirm(page, "Take back")
        expect(page.get_by_text("Agreed to nothing, or was never asked.")).to_be_visible()
        page.get_by_role("navigation", name="Parts of the person").get_by_role("link", name="Sessions").click()
        browser = page.get_by_role("row").filter(has_text="Chrome on Linux")
        expect(browser).to_contain_text("127.0.0.1")
        browser.get_by_role("button", name="End").click()
        expect(page.get_by_text("Signed in at no browser.")).to_be_visible()
        person.goto(f"http://127.0.0.1:{room.box.auth_port}/account")
        expect(person.locator("[name=password]")).to_be_visible()


class TestList:
    def test_it_is_searched_and_filtered_by_its_address_and_walked_by_keys(self, room):
        for number in range(3):
            room.make(f"listed-{number}")
        room.box.call_admin("POST", "/users/listed-1/deactivate")
        page = room("#/people?q=listed-")
        expect(page.get_by_role("row")).to_have_count(4)
        page.get_by_label("State", exact=True).select_option("deactivated")
        expect(page.get_by_role("row")).to_have_count(2)
        page.reload()
        expect(page.get_by_role("row")).to_have_count(2)
        expect(page.get_by_role("row").nth(1)).to_contain_text("listed-1")
        page.get_by_role("button", name="Remove the filter State").click()
        expect(page.get_by_role("row")).to_have_count(4)
        page.locator("a.row").first.focus()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="listed-1").last).to_be_visible()
        page.keyboard.press("/")
        page.keyboard.type("listed-2")
        expect(page.get_by_role("dialog").get_by_role("option").first).to_contain_text("listed-2")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="listed-2").last).to_be_focused()


PLACES = [
    "#/people", "#/people/new", *(f"#/people/looked-at/{tab}" for tab in ("profile", "rights", "sessions", "factor", "consents", "history")),
    "#/roles", "#/roles/MadAdmin", "#/permissions/look:at", "#/scopes", "#/scopes/api:read", "#/check?user=root&permission=look:at",
]


class TestLooks:
    @pytest.mark.parametrize("width, scheme, locale", LOOKS)
    @pytest.mark.usefixtures("looked_at")
    def test_every_place_fits_and_axe_finds_nothing_serious(self, visit, width, scheme, locale):  # noqa: F811
        look_around(visit, PLACES, width, scheme, locale)
