"""Administrators at the console, in a real browser against the built archive: journeys, keyboard, narrow screens, axe.

A JavaScript error, a violation of the policy or a serious finding of axe fails each of them.
"""

import os
import re

import pyotp
import pytest
from axe_playwright_python.sync_playwright import Axe
from box import Box
from playwright.sync_api import expect

SHOTS = os.environ.get("SCREENSHOTS", "")  # a folder to look at them in
PASSWORD = "a phrase for the console"
HOSTILE = '<img src=x onerror="document.title=1">../"\U0001f600'


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(
        tmp_path_factory.mktemp("console") / "data", workers="1", brand_name="North box", enable_token_refresh="true",
        enable_token_revocation="true",
    )
    box.settings["oidc-issuer"] = f"http://127.0.0.1:{box.auth_port}"
    with box:
        bearer = box.admin_token()

        def call(method, path, body=None, status=200):
            answer = box.admin(method, path, json_body=body, bearer=bearer)
            assert answer.status == status, answer
            return answer.json

        box.call_admin = call

        def new_admin(name):
            made = call("POST", "/users", {"username": name, "email": f"{name}@example.org", "password": PASSWORD})
            call("POST", "/roles/assign", {"user_id": made["id"], "role_id": "MadAdmin"})
            return name

        box.new_admin = new_admin
        call("POST", "/clients", {"client_id": "web", "redirect_uris": ["https://web.example/cb"]})
        call("POST", "/clients", {"client_id": "hostile", "display_name": HOSTILE})
        for number in range(60):
            call(
                "POST", "/clients",
                {"client_id": f"page-{number:02}", "display_name": f"page-{number:02}", "client_type": "public"},
            )
        yield box


@pytest.fixture
def visit(box, chromium):
    """Open a browser of one's own at the console: visit(width=320, color_scheme="dark", ...) is its page."""
    contexts = []

    def call(width=1280, height=800, path="", **more):
        context = chromium.new_context(viewport={"width": width, "height": height}, **{"locale": "en-GB"} | more)
        contexts.append(context)
        page = context.new_page()
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on(
            "console",
            lambda said: (
                page.troubles.append(said.text)
                if said.type in ("error", "warning") and "status of 4" not in said.text
                else None
            ),
        )
        page.origin = f"http://127.0.0.1:{box.admin_port}"
        page.goto(f"{page.origin}/dashboard/{path}")
        return page

    yield call
    for context in contexts:
        for page in context.pages:
            assert getattr(page, "troubles", []) == []
        context.close()


def sign_in(page, name="root", password=Box.PASSWORD, code=""):
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password", exact=True).fill(password)
    if code:
        page.get_by_label("Code, if you").fill(code)
    page.get_by_role("button", name="Sign in").click()
    return page


@pytest.fixture
def console(visit):
    """A page of the console, signed in as an administrator: console("#/applications")."""

    def call(path="", name="root", password=Box.PASSWORD, **more):
        page = sign_in(visit(path=path, **more), name, password)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.locator(".top")).to_be_visible()
        return page

    return call


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def confirm(page, button):
    page.get_by_role("dialog").get_by_role("button", name=button).click()


class TestSigningIn:
    def test_an_administrator_signs_in_and_out(self, console):
        page = console()
        expect(page.get_by_role("heading", name="Home")).to_be_visible()
        assert page.title() == "Home – North box"
        page.get_by_label("Signed in as root").click()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert not [cookie for cookie in page.context.cookies() if cookie["name"].endswith("mad-admin")]

    @pytest.mark.parametrize("name, password", [("root", "wrong"), ("nobody", "wrong")])
    def test_whatever_is_wrong_one_sentence_says_so_and_the_name_stays(self, visit, name, password):
        page = sign_in(visit(), name, password)
        expect(page.get_by_role("alert")).to_contain_text("That did not work.")
        expect(page.get_by_label("User name")).to_have_value(name)
        expect(page.get_by_label("Password", exact=True)).to_have_value("")
        expect(page.get_by_label("Password", exact=True)).to_be_focused()

    def test_the_addresses_of_the_original_lead_there(self, visit, box):
        page = visit()
        for path in ("/", "/Dashboard", "/dashboard", "/Login"):
            page.goto(page.origin + path)
            expect(page).to_have_url(f"{page.origin}/dashboard/")

    def test_where_one_wanted_to_go_is_kept(self, console):
        page = console("#/applications/web/secrets")
        expect(page.get_by_role("heading", name="web", exact=True)).to_be_visible()
        expect(page.get_by_role("link", name="Secrets")).to_have_attribute("aria-current", "page")

    def test_a_reload_stays_signed_in(self, console):
        page = console("#/me")
        page.reload()
        expect(page.get_by_role("heading", name="My account")).to_be_visible()

    def test_a_second_factor_is_set_up_here_and_asked_for_from_then_on(self, console, visit, box):
        name = box.new_admin("factor")
        page = console("#/me", name, PASSWORD)
        page.get_by_role("button", name="Set it up").click()
        seed = page.get_by_label("Seed", exact=True).inner_text()
        expect(page.get_by_alt_text("QR code")).to_be_visible()
        page.get_by_label("Code that it shows").fill("000000")
        page.get_by_role("button", name="Turn on").click()
        expect(page.get_by_role("alert")).to_contain_text("code is wrong")
        page.get_by_label("Code that it shows").fill(pyotp.TOTP(seed).now())
        page.get_by_role("button", name="Turn on").click()
        expect(page.get_by_text("● The second factor is on.")).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="My account")).to_be_visible()
        other = sign_in(visit(), name, PASSWORD)
        expect(other.get_by_role("alert")).to_contain_text("That did not work.")


class TestSession:
    def test_when_it_ends_in_the_middle_nothing_that_was_typed_is_lost(self, console, box):
        name = box.new_admin("midway")
        page = console("#/applications/web/tokens", name, PASSWORD)
        page.get_by_label("audience").fill("typed-before")
        box.call_admin("POST", f"/users/{name}/revoke")
        page.get_by_role("button", name="Save").first.click()
        card = page.get_by_role("dialog")
        expect(card).to_contain_text("Your session has ended")
        card.get_by_label("Password", exact=True).fill(PASSWORD)
        card.get_by_role("button", name="Sign in", exact=True).click()
        expect(card).to_have_count(0)
        expect(page.get_by_label("audience")).to_have_value("typed-before")
        assert box.call_admin("GET", "/clients/web")["audience"] != "typed-before", "a write waits for the button"
        page.get_by_role("button", name="Save").first.click()
        expect(page.get_by_role("status").filter(has_text="Saved.")).to_be_visible()
        assert box.call_admin("GET", "/clients/web")["audience"] == "typed-before"

    def test_in_another_browser_the_cookie_opens_nothing_until_the_password_does(self, console, chromium, box):
        first = console()
        token = first.evaluate("sessionStorage.getItem('form-token')")
        context = chromium.new_context(user_agent="another browser", locale="en-GB")
        context.add_cookies(first.context.cookies())
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{box.admin_port}/dashboard/#/applications")
        expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        page.evaluate("token => sessionStorage.setItem('form-token', token)", token)
        page.reload()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("another network or another browser")
        assert not page.get_by_role("row").all()
        dialog.get_by_label("Your password").fill(Box.PASSWORD)
        dialog.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("row").first).to_be_visible()
        context.close()

    def test_a_tab_that_is_opened_is_signed_in_by_the_others(self, console):
        page = console()
        other = page.context.new_page()
        other.goto(f"{page.origin}/dashboard/#/applications")
        expect(other.get_by_role("link", name="page-01")).to_be_visible()
        page.close()
        other.evaluate("sessionStorage.clear()")
        other.reload()
        expect(other.get_by_role("button", name="Sign in")).to_be_visible()

    def test_a_page_on_another_port_of_this_host_gets_nothing(self, console, box):
        page = console()
        other = page.context.new_page()
        other.goto(f"http://127.0.0.1:{box.auth_port}/health")
        ask = """async ([url, method]) => {
            const options = { method, credentials: "include", mode: "no-cors" };
            const answer = await fetch(url, options).catch(() => null);
            return answer && [answer.type, await answer.text()];
        }"""
        for path, method in (("/dashboard/session", "GET"), ("/users", "GET"), ("/logout", "POST")):
            answer = other.evaluate(ask, [page.origin + path, method])
            assert answer in (None, ["opaque", ""])
        other.close()
        page.reload()
        expect(page.get_by_role("heading", name="Home")).to_be_visible()

    def test_ones_own_sessions_are_listed_and_the_others_ended(self, console, box):
        name = box.new_admin("twice")
        first, second = console("#/me", name, PASSWORD), console("#/me", name, PASSWORD)
        expect(second.get_by_role("cell", name="this one")).to_have_count(1)
        second.get_by_role("button", name="End my other sessions").click()
        expect(second.get_by_role("button", name="End", exact=True)).to_have_count(0)
        first.get_by_role("link", name="Applications").click()
        expect(first.get_by_role("dialog")).to_contain_text("Your session has ended")


class TestApplications:
    def test_one_is_made_by_what_it_is_and_its_secret_is_shown_once(self, console, box):
        page = console("#/applications")
        page.get_by_role("button", name="Make application").click()
        page.get_by_label("Service", exact=False).first.check()
        page.get_by_label("Name", exact=True).fill("My Sensor")
        expect(page.get_by_label("client_id")).to_have_value("my-sensor")
        page.get_by_role("button", name="Make application").click()
        card = page.get_by_role("region", name="This secret is shown once")
        secret = card.locator("code").inner_text()
        shoot(page, "secret")
        assert box.auth("/token", {"grant_type": "client_credentials"}, client=("my-sensor", secret)).status == 200
        assert secret not in page.url
        expect(card.get_by_role("button", name="Close")).to_be_disabled()
        card.get_by_label("I have stored it").check()
        card.get_by_role("button", name="Close").click()
        expect(card).to_have_count(0)
        page.reload()
        expect(page.get_by_role("heading", name="My Sensor")).to_be_visible()
        assert secret not in page.content()

    def test_a_name_that_is_taken_is_said_and_the_form_stays(self, console):
        page = console("#/applications/new")
        page.get_by_label("Web application").check()
        page.get_by_label("Name", exact=True).fill("web")
        page.get_by_label("Redirect URIs").fill("https://other.example/cb")
        page.get_by_role("button", name="Make application").click()
        expect(page.get_by_role("alert")).to_contain_text("The name is taken.")
        expect(page.get_by_label("Redirect URIs")).to_have_value("https://other.example/cb")

    def test_a_redirect_uri_is_judged_before_it_is_added_and_its_removal_undone(self, console, box):
        page = console("#/applications/web/addresses")
        field = page.get_by_label("Add an address").first
        field.fill("http://web.example/cb")
        expect(page.get_by_text("http is allowed for this computer only.")).to_be_visible()
        expect(page.get_by_role("button", name="Add").first).to_be_disabled()
        field.fill("https://web.example/second")
        expect(page.get_by_text("It would be taken.")).to_be_visible()
        page.get_by_role("button", name="Add").first.click()
        expect(page.get_by_text("https://web.example/second", exact=True)).to_be_visible()
        page.get_by_role("button", name="Remove https://web.example/second").click()
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_text("Taken back.")).to_be_visible()
        kept = box.call_admin("GET", "/clients/web/redirect-uris")
        assert [row["uri"] for row in kept] == ["https://web.example/cb", "https://web.example/second"]

    def test_a_provider_elsewhere_is_added_changed_removed_and_back(self, console, box):
        page = console("#/applications/web/addresses")
        listed = lambda: [row["issuer"] for row in box.call_admin("GET", "/clients/web/idp")]  # noqa: E731
        page.get_by_role("button", name="Add …").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Short name").fill("a b")
        dialog.get_by_role("button", name="Add", exact=True).click()
        expect(dialog.get_by_text("It needs 1 to 50 letters")).to_be_visible()
        dialog.get_by_label("Short name").fill("north")
        dialog.get_by_label("issuer").fill("https://north.example")
        dialog.get_by_role("button", name="Add", exact=True).click()
        expect(page.get_by_text("https://north.example")).to_be_visible()
        page.get_by_role("button", name="Change north").click()
        page.get_by_role("dialog").get_by_label("issuer").fill("https://south.example")
        page.get_by_role("dialog").get_by_role("button", name="Save").click()
        expect(page.get_by_text("https://south.example")).to_be_visible()
        assert listed() == ["https://south.example"]
        page.get_by_role("button", name="Remove north").click()
        expect(page.get_by_text("https://south.example")).to_have_count(0)
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_text("https://south.example")).to_be_visible()
        assert listed() == ["https://south.example"]

    @pytest.mark.parametrize(
        "kind, needs", [("service", {"curl", "mad", "Authlib (Python)"}), ("public", {"oidc-client-ts (browser)", "AppAuth (iOS)"})]
    )
    def test_lines_to_copy_are_there_for_each_kind_with_the_addresses_of_this_box(self, console, box, kind, needs):
        made = {"client_id": f"lines-{kind}"} | (
            {"client_type": "public", "redirect_uris": ["com.example.app:/cb"]} if kind == "public" else {}
        )
        box.call_admin("POST", "/clients", made)
        page = console(f"#/applications/lines-{kind}/connect")
        choice = page.get_by_label("Lines ready to be copied").and_(page.locator("select"))
        expect(choice).to_be_visible()
        names = [name.strip() for name in choice.locator("option").all_inner_texts()]
        assert needs <= set(names) and len(names) >= 4, names
        for at in range(len(names)):
            choice.select_option(str(at))
            lines = page.locator(".copy.lines code").inner_text()
            assert f"lines-{kind}" in lines and f":{box.auth_port}" in lines and "undefined" not in lines, names[at]
            assert kind != "public" or "<SECRET>" not in lines, names[at]

    def test_the_list_of_the_page_beside_neither_orders_nor_turns_that_of_its_tokens(self, console):
        page = console("#/applications/web/who?sort=-created_at&page=2")
        expect(page.get_by_text("Nobody is signed in there.")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)

    def test_a_moment_is_a_date_at_will(self, console):
        page = console("#/applications")
        made = page.locator("td time").first
        expect(made).to_have_text(re.compile("now|ago"))
        page.keyboard.press("/")
        page.keyboard.type("times exactly")
        page.keyboard.press("Enter")
        expect(made).to_have_text(re.compile(r"^\d{1,2} \w{3,4} \d{4}, \d\d:\d\d$"))
        made.click()
        expect(made).to_have_text(re.compile("now|ago"))

    def test_a_preview_proposes_people_and_says_what_would_refuse_them(self, console, box):
        made = box.call_admin("POST", "/users", {"username": "previewed", "email": "p@example.org", "password": PASSWORD})
        box.call_admin("POST", f"/users/{made['id']}/set-lockout", {"lockout_until": "2100-01-01T00:00:00Z"})
        page = console("#/applications/web/preview")
        page.get_by_label("Person").press_sequentially("previ")
        expect(page.locator("datalist option")).to_have_attribute("value", "previewed")
        page.get_by_label("Person").fill("previewed")
        page.get_by_role("button", name="Show").click()
        expect(page.get_by_text("There would be no token: The person is locked.")).to_be_visible()

    def test_a_second_secret_leaves_the_first_one_time(self, console, box):
        made = box.call_admin("POST", "/clients", {"client_id": "rotated"})
        page = console("#/applications/rotated/secrets")
        page.get_by_role("button", name="Make another").click()
        card = page.get_by_role("region", name="This secret is shown once")
        expect(card).to_contain_text(re.compile(r"The earlier secret works until .*\d\d:\d\d\."))
        unused = page.get_by_role("cell").filter(has_text="no use seen")
        expect(unused).to_have_count(2)
        for secret in (made["client_secret"], card.locator("code").inner_text()):
            assert box.auth("/token", {"grant_type": "client_credentials"}, client=("rotated", secret)).status == 200
        page.reload()
        expect(page.get_by_role("button", name="End", exact=True)).to_have_count(2)
        expect(unused).to_have_count(0)
        page.get_by_role("button", name="End", exact=True).last.click()
        expect(page.get_by_role("dialog")).to_contain_text("It was last used now.")

    def test_the_change_of_another_is_shown_beside_ones_own(self, console, box):
        box.call_admin("POST", "/clients", {"client_id": "shared", "display_name": "Before"})
        page = console("#/applications/shared/rights")
        page.get_by_label("Name", exact=True).fill("Mine")
        box.call_admin("PUT", "/clients/shared", {"display_name": "Theirs"})
        page.get_by_role("button", name="Save").click()
        note = page.get_by_role("alert").filter(has_text="Somebody changed this")
        expect(note.get_by_role("row", name="Name Mine Theirs Before")).to_be_visible()
        note.get_by_role("button", name="Take mine").click()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="Mine")).to_be_visible()
        assert box.call_admin("GET", "/clients/shared")["display_name"] == "Mine"

    def test_leaving_with_changes_asks(self, console):
        page = console("#/applications/web/rights")
        page.get_by_label("Name", exact=True).fill("Half typed")
        page.get_by_role("link", name="Home").click()
        expect(page.get_by_role("dialog")).to_contain_text("Leave without saving?")
        confirm(page, "Cancel")
        expect(page.get_by_label("Name", exact=True)).to_have_value("Half typed")
        page.get_by_role("link", name="Home").click()
        confirm(page, "Leave")
        expect(page.get_by_role("heading", name="Home")).to_be_visible()

    def test_a_deletion_wants_the_name_typed(self, console, box):
        box.call_admin("POST", "/clients", {"client_id": "doomed"})
        page = console("#/applications/doomed/danger")
        page.get_by_role("button", name="Delete application").click()
        button = page.get_by_role("dialog").get_by_role("button", name="Delete application")
        expect(button).to_be_disabled()
        page.get_by_label("Type doomed to confirm").fill("doomed")
        button.click()
        expect(page.get_by_role("heading", name="Applications")).to_be_visible()
        assert box.call_admin("GET", "/clients/doomed", status=404)

    def test_with_an_old_proof_the_same_dialog_asks_for_the_password(self, visit, box):
        box.call_admin("POST", "/clients", {"client_id": "proven"})
        page = visit(path="#/applications/proven/danger")

        def age(route):
            """Let the page believe that the password was given long ago."""
            answer = route.fetch()
            body = answer.json() | {"proven_until": "2026-01-01T00:00:00Z"}
            route.fulfill(response=answer, json=body)

        page.route("**/dashboard/session", age)
        sign_in(page)
        page.get_by_role("button", name="Delete application").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Type proven to confirm").fill("proven")
        dialog.get_by_label("Your password").fill("wrong")
        dialog.get_by_role("button", name="Delete application").click()
        expect(dialog.get_by_role("alert")).to_contain_text("wrong")
        assert box.call_admin("GET", "/clients/proven")
        dialog.get_by_label("Your password").fill(Box.PASSWORD)
        dialog.get_by_role("button", name="Delete application").click()
        expect(page.get_by_role("heading", name="Applications")).to_be_visible()
        assert box.call_admin("GET", "/clients/proven", status=404)

    def test_a_list_is_searched_sorted_and_paged_by_its_address(self, console):
        page = console("#/applications")
        expect(page.get_by_role("row")).to_have_count(51)
        page.get_by_role("button", name="Next").click()
        expect(page).to_have_url(re.compile("page=2"))
        page.go_back()
        page.get_by_label("Search applications").fill("page-4")
        expect(page.get_by_role("row")).to_have_count(11)
        page.get_by_role("button", name="Name").click()
        expect(page.get_by_role("row").nth(1)).to_contain_text("page-49")
        page.reload()
        expect(page.get_by_role("row").nth(1)).to_contain_text("page-49")
        page.get_by_label("Search applications").fill("nothing of this name")
        page.get_by_role("button", name="Clear filters").click()
        expect(page.get_by_role("row")).to_have_count(51)

    def test_a_hostile_name_is_text(self, console):
        page = console("#/applications/hostile/connect")
        expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
        page.get_by_role("link", name="Danger").click()
        page.get_by_role("button", name="Delete application").click()
        expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
        assert page.locator("main img, dialog img").count() == 0


class TestKeyboard:
    def test_the_palette_finds_and_opens(self, console):
        page = console()
        page.keyboard.press("/")
        expect(page.get_by_role("combobox", name="Find or do")).to_be_focused()
        page.keyboard.type("page-07")
        expect(page.get_by_role("dialog").get_by_role("option").first).to_contain_text("page-07")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="page-07")).to_be_focused()
        page.keyboard.press("Control+k")
        expect(page.get_by_role("combobox", name="Find or do")).to_be_focused()
        page.keyboard.type("make backup")
        expect(page.get_by_role("dialog").get_by_role("option").first).to_contain_text("Make a backup")
        page.keyboard.press("Control+a")
        page.keyboard.type("my acc")
        expect(page.get_by_role("dialog").get_by_role("option").first).to_contain_text("My account")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)

    def test_rows_are_walked_and_opened(self, console):
        page = console("#/applications")
        page.locator("a.row").first.focus()
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("k")
        wanted = page.locator("a.row").nth(1)
        expect(wanted).to_be_focused()
        name = wanted.locator(".strong").inner_text()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1).last).to_have_text(name)

    def test_an_application_is_made_without_a_mouse(self, console, box):
        page = console("#/applications/new")
        page.get_by_role("radio").first.focus()
        page.keyboard.press("Space")
        for key in ("Tab", *"By keys", "Tab", "Tab", "Enter"):
            page.keyboard.press("Space" if key == " " else key)
        expect(page.get_by_role("region", name="This secret is shown once")).to_be_visible()
        assert box.call_admin("GET", "/clients/by-keys")["grant_types"] == ["client_credentials"]

    def test_one_signs_in_by_keys_and_stands_at_the_heading(self, visit):
        page = visit()
        expect(page.get_by_label("User name")).to_be_focused()
        page.keyboard.type("root")
        page.keyboard.press("Tab")
        page.keyboard.type(Box.PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Home")).to_be_focused()

    def test_when_what_had_the_focus_goes_it_stays_where_that_was(self, console, box):
        box.call_admin("POST", "/clients", {"client_id": "focus"})
        page = console("#/applications/focus/secrets")
        page.get_by_role("button", name="Make another").press("Enter")
        card = page.locator(".secret")
        expect(card).to_be_visible()
        expect(page.get_by_role("button", name="Make another")).to_be_focused()
        card.get_by_label("I have stored it").press("Space")
        card.get_by_role("button", name="Close").press("Enter")
        expect(card).to_have_count(0)
        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
        page.goto(page.origin + "/dashboard/#/applications/focus/rights")
        page.get_by_label("fetches tokens for itself").press("Space")
        page.get_by_role("button", name="Save").press("Enter")
        expect(page.get_by_role("button", name="Save")).to_be_disabled()
        expect(page.locator("main:focus, main *:focus")).to_have_count(1)
        page.get_by_label("Signed in as root").press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        expect(page.get_by_label("Signed in as root")).to_be_focused()

    def test_one_may_skip_to_the_content(self, console):
        page = console("#/applications")
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()


def look_around(visit, places, width, scheme, locale):
    """Sign in and go from place to place: each fits the width and a wide screen, and axe finds nothing serious."""
    page = visit(width, color_scheme=scheme, locale=locale)
    page.locator("[name=username]").fill("root")
    page.locator("[name=password]").fill(Box.PASSWORD)
    page.locator("[type=submit]").click()
    expect(page.locator(".top")).to_be_visible()
    for place in places:
        page.evaluate("place => { location.hash = place }", place)
        page.wait_for_load_state("networkidle")
        for size in (2560, width):  # the layout changes at 640, 1024 and 1440 pixels
            page.set_viewport_size({"width": size, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= size, (place, size)
        found = Axe().run(page).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, (place, [(one["id"], one["nodes"][0]["html"]) for one in serious])
        shoot(page, f"{width}-{scheme}-{re.sub('[^a-z]+', '-', place)}")


LOOKS = [
    (320, "dark", "de-DE"), (1280, "light", "en-GB"), pytest.param(2560, "dark", "en-GB", marks=pytest.mark.long),
]
PLACES = [
    "", "#/applications", "#/applications/new", "#/me",
    *(f"#/applications/web/{tab}" for tab in ("connect", "secrets", "addresses", "rights", "tokens", "preview", "who", "danger")),
]


class TestLooks:
    @pytest.mark.parametrize("width, scheme, locale", LOOKS)
    def test_every_place_fits_and_axe_finds_nothing_serious(self, visit, width, scheme, locale):
        look_around(visit, PLACES, width, scheme, locale)

    def test_the_sign_in_is_alike_at_320_pixels(self, visit):
        page = visit(320, 600)
        expect(page.get_by_role("button", name="Sign in")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert not [one for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")]

    def test_the_menu_of_a_narrow_screen_leads_to_the_rooms(self, console):
        page = console(width=320)
        page.get_by_role("button", name="Menu").click()
        page.get_by_role("dialog").get_by_role("link", name="Applications").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_role("heading", name="Applications")).to_be_visible()

    def test_what_was_done_leaves_the_screen_of_a_telephone_and_never_lies_over_a_button(self, console):
        page = console("#/applications/web/rights", width=360, height=740, has_touch=True, is_mobile=True)
        toast = page.locator(".toast")
        page.get_by_label("fetches tokens for itself").tap()
        page.get_by_role("button", name="Save").tap()
        expect(toast).to_contain_text("Saved")
        box = toast.bounding_box()
        bar = page.locator(".top").bounding_box()
        assert box["y"] + box["height"] <= bar["y"] + bar["height"], "over the bar alone"
        page.touchscreen.tap(box["x"] + 20, box["y"] + 10)  # a finger is gone without saying so
        page.get_by_label("fetches tokens for itself").tap()
        page.get_by_role("button", name="Save").tap()  # fails if anything lies over it
        expect(page.get_by_role("button", name="Save")).to_be_disabled()
        expect(toast.filter(visible=True)).to_have_count(1)
        expect(toast).to_have_count(0, timeout=12000)

    def test_at_400_percent_the_bar_goes_with_the_page_and_lies_over_nothing(self, console):
        """WCAG 2.2 §1.4.10, §2.4.11: 1,280 by 1,024 pixels at 400 % are 320 by 256."""
        page = console("#/applications", width=320, height=256)
        page.locator("a.row").nth(9).focus()
        expect(page.locator("a.row").nth(9)).to_be_in_viewport(ratio=0.9)
        expect(page.locator(".top")).not_to_be_in_viewport()
        page.set_viewport_size({"width": 320, "height": 640})
        for _ in range(12):  # upwards, where the bar would lie
            page.keyboard.press("Shift+Tab")
            assert page.evaluate(
                "[document.activeElement.getBoundingClientRect(), document.querySelector('.top').getBoundingClientRect()]"
                ".map((box, at) => at ? box.bottom : box.top).reduce((top, bar) => top >= bar)"
            )

    def test_what_stands_in_says_what_it_waits_for(self, console):
        page = console()
        page.context.route("**/rooms/keys.js", lambda route: None)  # it does not come
        page.evaluate("location.hash = '#/keys'")
        expect(page.get_by_text("Loading Keys …")).to_be_visible()
        page.context.route("**/vendor/preact.js", lambda route: None)
        other = page.context.new_page()
        other.goto(page.origin + "/dashboard/", wait_until="commit")
        expect(other.get_by_text("Loading the console …")).to_be_visible()

    def test_nothing_is_asked_of_anybody_else(self, visit):
        page = visit()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        sign_in(page)
        expect(page.get_by_role("heading", name="Home")).to_be_visible()
        page.wait_for_load_state("networkidle")
        assert asked and all(url.startswith((page.origin, "blob:")) for url in asked)
        assert page.evaluate("[Object.keys(sessionStorage), localStorage.length]") == [["form-token"], 0]

    def test_when_the_network_goes_it_is_said_and_gone_on_with(self, console):
        page = console("#/applications")
        expect(page.get_by_role("link", name="page-01")).to_be_visible()
        page.context.set_offline(True)
        page.get_by_role("link", name="page-01").click()
        expect(page.get_by_text("The box does not answer since")).to_be_visible()
        page.context.set_offline(False)
        expect(page.get_by_role("heading", name="page-01")).to_be_visible(timeout=15000)
        expect(page.get_by_text("The box does not answer since")).to_have_count(0)
        page.troubles[:] = [said for said in page.troubles if "ERR_INTERNET_DISCONNECTED" not in said]
