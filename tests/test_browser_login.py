"""People at the login pages, in a real browser against the built archive: journeys, keyboard, narrow and dark screens, axe."""

import base64
import hashlib
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

import pyotp
import pytest
from axe_playwright_python.sync_playwright import Axe
from box import Box
from playwright.sync_api import expect
from conftest import PASSWORD

VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
SHOTS = os.environ.get("SCREENSHOTS", "")  # a folder to look at them in


class Application(HTTPServer):
    """The client: it remembers what the browser brought it."""

    def __init__(self):
        self.brought = []
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def callback(self):
        return f"http://127.0.0.1:{self.server_port}/cb"

    @property
    def elsewhere(self):
        """Another site, for a browser."""
        return f"http://localhost:{self.server_port}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=""):
            parts = urlsplit(self.path)
            if parts.path in ("/cb", "/bye"):
                self.server.brought.append(dict(parse_qsl(body or parts.query)))
            if parts.path == "/cb" and "state=away" in (body or parts.query):
                self.send_response(302)
                self.send_header("Location", f"{self.server.elsewhere}/home")
                return self.end_headers()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>app</title><h1>The application</h1>")

        def do_POST(self):
            self.do_GET(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def log_message(self, *words):
            pass


@pytest.fixture(scope="module")
def application():
    server = Application()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def box(tmp_path_factory, application):
    box = Box(tmp_path_factory.mktemp("login") / "data", workers="1", brand_name="The Box", enable_token_refresh="true",
              login_help="Call extension 4711.")
    box.settings["oidc-issuer"] = f"http://127.0.0.1:{box.auth_port}"
    with box:
        bearer = box.admin_token()

        def call(method, path, body=None):
            answer = box.admin(method, path, json_body=body, bearer=bearer)
            assert answer.status == (201 if path.endswith(("-uris", "-origins")) else 200), answer
            return answer.json

        box.call_admin = call
        for name, more in (
            ("web", {}), ("third", {"is_first_party": False, "display_name": "A Third Party"}), ("bank", {}),
        ):
            call(
                "POST", "/clients",
                {"client_id": name, "client_type": "public", "grant_types": ["authorization_code", "refresh_token"]}
                | more,
            )
            call("POST", f"/clients/{name}/redirect-uris", application.callback)
            call("POST", f"/clients/{name}/post-logout-redirect-uris", application.callback.replace("/cb", "/bye"))
        call("POST", "/clients/web/cors-origins", application.callback.removesuffix("/cb"))
        call("POST", "/client/options/ENABLE_TOTP", {"client_id": "bank", "enabled": True})
        yield box


@pytest.fixture
def visit(box, application, chromium, request):
    """Open a browser of one's own: visit(client, javaScriptEnabled=False, ...) is a page at the authorization endpoint."""
    contexts = []
    application.brought.clear()

    def call(client="web", path=None, width=900, scheme="light", **more):
        parameters = {
            k: more.pop(k) for k in ("prompt", "response_mode", "scope", "state", "ui_locales", "max_age") if k in more
        }
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on(
            "console",
            lambda message: (
                page.troubles.append(message.text)
                if message.type == "error" and "favicon" not in message.text and "status of 4" not in message.text
                else None
            ),
        )
        page.url_of = lambda client=client, **changed: (
            f"http://127.0.0.1:{box.auth_port}/authorize?"
            + urlencode(
                {
                    "client_id": client, "redirect_uri": application.callback, "response_type": "code",
                    "scope": "openid profile email", "state": "s", "nonce": "n", "code_challenge": CHALLENGE,
                    "code_challenge_method": "S256",
                }
                | parameters
                | changed
            )
        )
        page.goto(f"http://127.0.0.1:{box.auth_port}{path}" if path else page.url_of())
        return page

    yield call
    for context in contexts:
        for page in context.pages:
            assert getattr(page, "troubles", []) == []
        context.close()


@pytest.fixture
def person(box):
    """Somebody new: the name."""
    names = iter(f"p{os.urandom(4).hex()}" for _ in iter(int, 1))

    def make():
        name = next(names)
        box.call_admin("POST", "/users", {"username": name, "email": f"{name}@example.org", "password": PASSWORD})
        return name

    return make


@pytest.fixture
def with_totp(box, person):
    """Somebody with a second factor: (name, seed). The first code is spent a while ago."""
    def make():
        name = person()
        seed = box.call_admin("POST", f"/users/{name}/totp/enroll", {})["secret"]
        box.call_admin("POST", f"/users/{name}/totp/verify", {"code": pyotp.TOTP(seed).at(time.time() - 30)})
        return name, seed

    return make


def look(page, name):
    """Axe finds nothing serious, the page fits its width; a screenshot where somebody wants to look."""
    page.wait_for_load_state()
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}-{page.viewport_size['width']}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = [
        violation
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert found == [], [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found]


def sign_in(page, name, password=PASSWORD):
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Sign in").click()


def arrived(page, application):
    expect(page.get_by_role("heading")).to_have_text("The application")
    return application.brought[-1]


class TestJourneys:
    def test_sign_in_and_the_tokens(self, box, visit, person, application):
        page = visit()
        expect(page).to_have_title("Sign in - The Box")
        look(page, "sign_in")
        sign_in(page, person())
        brought = arrived(page, application)
        answer = box.auth(
            "/token",
            {
                "grant_type": "authorization_code", "code": brought["code"], "redirect_uri": application.callback,
                "code_verifier": VERIFIER, "client_id": "web",
            },
        )
        assert (
            answer.status == 200 and brought["state"] == "s" and brought["iss"] == f"http://127.0.0.1:{box.auth_port}"
        )

    def test_a_wrong_password_is_said_and_announced_and_the_name_stays(self, visit, person, application):
        page, name = visit(), person()
        sign_in(page, name, "wrong wrong")
        expect(page.get_by_role("alert")).to_contain_text("wrong")
        expect(page.get_by_label("User name")).to_have_value(name)
        expect(page.get_by_label("Password", exact=True)).to_be_focused()
        look(page, "wrong_password")
        page.get_by_label("Password", exact=True).fill(PASSWORD)
        page.keyboard.press("Enter")
        assert arrived(page, application)["code"]

    def test_a_locked_account_hears_the_same(self, box, visit, person):
        page, name, stranger = visit(), person(), visit()
        box.call_admin("POST", f"/users/{name}/set-lockout", {"lockout_until": "9999-12-31T00:00:00Z"})
        sign_in(page, name)
        sign_in(stranger, "nobody-at-all")
        assert page.get_by_role("alert").inner_text() == stranger.get_by_role("alert").inner_text()

    def test_the_second_factor(self, visit, with_totp, application):
        page, (name, seed) = visit(), with_totp()
        sign_in(page, name)
        expect(page.get_by_role("heading")).to_have_text("Second factor")
        look(page, "second_factor")
        page.get_by_label("Code").fill("000000")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("code is wrong")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.keyboard.press("Enter")
        assert arrived(page, application)["code"]

    @pytest.mark.parametrize("pause", [0, 40, *(pytest.param(pause, marks=pytest.mark.long) for pause in (10, 100))])
    def test_a_form_that_is_sent_twice_leads_where_it_led_once(self, box, visit, with_totp, application, pause):
        """A double click: the browser gives the first answer up, perhaps with its cookies, for the second."""
        page, (name, seed) = visit(), with_totp()
        twice = f"() => {{ const form = document.forms[0]; form.submit(); setTimeout(() => form.submit(), {pause}) }}"
        page.get_by_label("User name").fill(name)
        page.get_by_label("Password", exact=True).fill(PASSWORD)
        page.evaluate(twice)
        expect(page.get_by_role("heading")).to_have_text("Second factor")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.evaluate(twice)
        assert arrived(page, application)["code"]
        page.goto(page.url_of(prompt="none"))
        assert "code" in arrived(page, application), "it has the session"

    def test_it_is_set_up_at_login_where_the_client_demands_it_and_a_recovery_code_replaces_it(
        self, visit, person, application
    ):
        page, name = visit("bank"), person()
        sign_in(page, name)
        expect(page.get_by_role("heading")).to_have_text("Set up a second factor")
        look(page, "enrol")
        seed = page.locator(".secret").inner_text().replace(" ", "")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text("Recovery codes")
        look(page, "codes")
        codes = page.locator(".codes code").all_inner_texts()
        assert len(codes) == 10
        page.get_by_role("button", name="I have noted them").click()
        assert arrived(page, application)["code"]
        again = visit("bank")
        sign_in(again, name)
        again.get_by_label("Code").fill(codes[3])
        again.keyboard.press("Enter")
        assert arrived(again, application)["code"]

    def test_consent_and_deny(self, visit, person, application):
        page = visit("third")
        sign_in(page, person())
        expect(page.get_by_role("heading")).to_have_text("Permission")
        look(page, "consent")
        page.get_by_role("button", name="Deny").click()
        assert arrived(page, application)["error"] == "access_denied"
        page.goto(page.url_of())
        page.get_by_role("button", name="Allow").click()
        assert arrived(page, application)["code"]

    def test_one_login_for_all_prompt_none_and_logout(self, box, visit, person, application):
        page, name = visit(), person()
        sign_in(page, name)
        arrived(page, application)
        for changed in ({"client": "web", "prompt": "none"}, {"client": "bank", "prompt": "none"}):
            page.goto(page.url_of(**changed))
            brought = arrived(page, application)
            assert ("code" in brought) is (changed["client"] == "web"), brought
        page.goto(page.url_of(prompt="select_account"))
        look(page, "select")
        page.get_by_role("button", name=f"Continue as {name}").click()
        assert arrived(page, application)["code"]
        page.goto(
            f"http://127.0.0.1:{box.auth_port}/end-session?"
            + urlencode(
                {
                    "client_id": "web", "post_logout_redirect_uri": application.callback.replace("/cb", "/bye"),
                    "state": "out",
                }
            )
        )
        look(page, "sign_out")
        page.get_by_role("button", name="Sign out").click()
        assert arrived(page, application) == {"state": "out"}
        page.goto(page.url_of(prompt="none"))
        assert arrived(page, application)["error"] == "login_required"
        page.goto(f"http://127.0.0.1:{box.auth_port}/logout")
        look(page, "signed_out")

    def test_form_post(self, visit, person, application):
        page = visit(response_mode="form_post")
        sign_in(page, person())
        assert arrived(page, application)["code"] and "?" not in page.url

    def test_a_single_page_application_exchanges_the_code_of_the_fragment(self, box, visit, person, application):
        """keycloak-js fetches with credentials, okta-auth-js with a header field of its own."""
        page = visit(response_mode="fragment")
        sign_in(page, person())
        page.wait_for_url(application.callback + "#*")
        form = {
            "grant_type": "authorization_code", "client_id": "web", "redirect_uri": application.callback,
            "code": dict(parse_qsl(urlsplit(page.url).fragment))["code"], "code_verifier": VERIFIER,
        }
        fetched = page.evaluate(
            """async ([url, form]) => (await (await fetch(url, {
                method: "POST", credentials: "include", body: new URLSearchParams(form),
                headers: {"X-Okta-User-Agent-Extended": "okta-auth-js/8.0.1"},
            })).json()).token_type""",
            [f"http://127.0.0.1:{box.auth_port}/token", form],
        )
        assert fetched == "Bearer"

    def test_the_account_page(self, visit, person, application):
        page, name = visit(path="/account"), person()
        sign_in(page, name)
        expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
        look(page, "account")
        page.get_by_label("Current password").first.fill(PASSWORD)
        page.get_by_label("New password").fill("another battery staple")
        page.get_by_role("button", name="Change password").click()
        expect(page.get_by_role("status")).to_contain_text("password was changed")
        page.get_by_label("Current password").last.fill("another battery staple")
        page.get_by_role("button", name="Turn on").click()
        expect(page.locator(".secret")).to_be_visible()
        look(page, "account_enrol")
        seed = page.locator(".secret").inner_text().replace(" ", "")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".codes code")).to_have_count(10)
        look(page, "account_codes")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading")).to_have_text("Signed out")

    def test_a_callback_may_lead_on_to_another_host(self, visit, with_totp, application):
        page, (name, seed) = visit("third", state="away"), with_totp()
        sign_in(page, name)
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name="Allow").click()
        assert "code" in arrived(page, application) and page.url == f"{application.elsewhere}/home"
        page.goto(page.url_of(state="away", response_mode="form_post", prompt="login"))
        sign_in(page, name)
        page.get_by_label("Code").fill(pyotp.TOTP(seed).at(time.time() + 30))
        page.get_by_role("button", name="Continue").click()
        arrived(page, application)
        assert page.url == f"{application.elsewhere}/home"

    def post(self, page, application, url, **fields):
        """Send a form from a page of another site."""
        page.goto(application.elsewhere)
        with page.expect_navigation():
            page.evaluate("""([url, fields]) => {
                const form = document.createElement("form"); form.method = "post"; form.action = url;
                for (const [name, value] of Object.entries(fields)) { const input = document.createElement("input"); input.name = name; input.value = value; form.append(input); }
                document.body.append(form); HTMLFormElement.prototype.submit.call(form);
            }""", [url, fields])
        page.wait_for_load_state()

    def test_forms_of_another_site_find_the_session_and_do_not_end_it(self, visit, person, application):
        page, name = visit(), person()
        sign_in(page, name)
        arrived(page, application)
        base, _, query = page.url_of().partition("/authorize?")
        for path in ("/logout", "/logout-all", "/end-session", "/account"):
            self.post(page, application, base + path, form="x", action="end_all")
        self.post(page, application, base + "/authorize", **dict(parse_qsl(query)), prompt="none")
        assert "code" in arrived(page, application), "still logged in, and found by a POST"
        self.post(
            page, application, base + "/end-session", client_id="web",
            post_logout_redirect_uri=application.callback.replace("/cb", "/bye"), state="over",
        )
        page.get_by_role("button", name="Sign out").click()
        assert arrived(page, application) == {"state": "over"}
        page.goto(page.url_of(prompt="none"))
        assert arrived(page, application)["error"] == "login_required"

    def test_the_error_page_names_the_request_and_leads_on(self, visit):
        page = visit(path="/authorize?client_id=nobody")
        expect(page.get_by_role("heading")).to_have_text("This did not work")
        assert re.search(r"quote this number.*: [0-9a-f]{8,}", page.locator("main").inner_text())
        look(page, "error")
        page.get_by_role("link", name="Go to your account").click()
        expect(page.get_by_role("heading")).to_have_text("Sign in")

    @pytest.mark.parametrize("scripts", [True, False])
    def test_cancel_not_you_and_forgotten(self, visit, person, with_totp, application, scripts):
        page, (name, _) = visit("third", java_script_enabled=scripts), with_totp()
        page.get_by_text("Forgotten?").click()
        expect(page.get_by_text("Call extension 4711.")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        assert arrived(page, application)["error"] == "access_denied"
        page.go_back()
        sign_in(page, name)
        expect(page.get_by_text(f"Signing in as {name}")).to_be_visible()
        page.get_by_role("button", name="Not you?").click()
        expect(page.get_by_role("heading")).to_have_text("Sign in")
        sign_in(page, person())
        expect(page.get_by_role("heading")).to_have_text("Permission")
        expect(page.get_by_text("A Third Party")).to_be_visible()
        page.get_by_role("button", name="Not you?").click()
        expect(page.get_by_label("Password", exact=True)).to_be_visible()

    def test_a_password_is_shown_while_one_wants_and_hidden_when_it_is_sent(self, visit, person):
        page = visit()
        field = page.get_by_label("Password", exact=True)
        expect(field).to_be_attached()
        field.fill("wrong wrong")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Show password")).to_be_focused()
        page.keyboard.press("Space")
        expect(field).to_have_attribute("type", "text")
        expect(field).to_have_value("wrong wrong")
        page.get_by_role("button", name="Hide password").click()
        expect(field).to_have_attribute("type", "password")
        page.get_by_role("button", name="Show password").click()
        page.evaluate("document.forms[0].addEventListener('submit', e => { e.preventDefault() })")
        page.get_by_label("User name").fill(person())
        page.get_by_label("User name").press("Enter")
        expect(field).to_have_attribute("type", "password")

    def test_recovery_codes_are_copied_saved_and_printed(self, visit, person, application):
        page, name = visit("bank"), person()
        sign_in(page, name)
        seed = page.locator(".secret").inner_text().replace(" ", "")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.keyboard.press("Enter")
        expect(page.locator(".codes code")).to_have_count(10)
        codes = page.locator(".codes code").all_inner_texts()
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("status")).to_have_text("Copied.")
        assert page.evaluate("navigator.clipboard.readText()").split() == codes
        with page.expect_download() as download:
            page.get_by_role("link", name="Save as file").click()
        saved = download.value.path().read_text().split("\n")
        assert download.value.suggested_filename == "recovery-codes.txt" and saved[0] == f"The Box, {name}"
        assert [line for line in saved[1:] if line] == codes
        page.evaluate("window.print = () => { document.title = 'printed' }")
        page.get_by_role("button", name="Print").click()
        expect(page).to_have_title("printed")
        page.emulate_media(media="print")
        assert page.locator(".codes").is_visible() and page.get_by_text(f"The Box, {name}").is_visible()
        assert not page.get_by_role("button").count()

    def test_the_account_page_says_where_and_when(self, visit, person, application):
        page, name = visit(path="/"), person()
        sign_in(page, name)
        expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
        expect(page.locator(".rows")).to_contain_text("Chrome on Linux, this browser")
        expect(page.locator(".rows time")).to_have_text("just now")
        expect(page.locator(".rows time")).to_have_attribute("title", re.compile(r"20[0-9]{2}"))
        page.get_by_label("Current password").first.fill("wrong wrong")
        page.get_by_label("New password").fill("another battery staple")
        page.get_by_role("button", name="Change password").click()
        expect(page.get_by_label("Current password").first).to_be_focused()
        expect(page.get_by_label("Current password").first).to_have_accessible_description(re.compile("is wrong"))
        look(page, "account_wrong")
        page.get_by_role("button", name="Sign out").click()
        page.get_by_role("link", name="Sign in again").click()
        expect(page.get_by_role("heading")).to_have_text("Sign in")


class TestEveryScreen:
    @pytest.mark.parametrize(
        "width, scheme",
        [(320, "dark"), (900, "dark"), (2560, "light"), pytest.param(320, "light", marks=pytest.mark.long)],
    )
    def test_narrow_and_dark(self, visit, person, with_totp, application, width, scheme):
        page, (name, seed) = visit("third", width=width, scheme=scheme), with_totp()
        look(page, f"{scheme}-sign_in")
        sign_in(page, name, "wrong")
        expect(page.get_by_role("alert")).to_be_visible()
        look(page, f"{scheme}-wrong")
        sign_in(page, name)
        expect(page.get_by_role("heading")).to_have_text("Second factor")
        look(page, f"{scheme}-second_factor")
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text("Permission")
        look(page, f"{scheme}-consent")
        page.get_by_role("button", name="Allow").click()
        arrived(page, application)
        account = page.context.new_page()
        account.goto(page.url_of().partition("/authorize")[0] + "/account")
        look(account, f"{scheme}-account")

    def test_without_scripts(self, visit, with_totp, application):
        page, (name, seed) = visit("third", java_script_enabled=False, response_mode="form_post"), with_totp()
        sign_in(page, name)
        page.get_by_label("Code").fill(pyotp.TOTP(seed).now())
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name="Allow").click()
        page.get_by_role("button", name="Continue").click()
        assert arrived(page, application)["code"]

    def test_by_keyboard_alone(self, visit, person, application):
        page = visit("third")
        expect(page.get_by_label("User name")).to_be_focused()
        page.keyboard.type(person())
        page.keyboard.press("Tab")
        page.keyboard.type(PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text("Permission")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Allow")).to_be_focused()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert arrived(page, application)["code"]

    def test_in_another_language(self, visit):
        page = visit(locale="de-DE")
        expect(page.get_by_role("heading")).to_have_text("Anmelden")
        assert page.evaluate("document.documentElement.lang") == "de"

    def test_nobody_elses_site_may_frame_it(self, box, visit, application):
        page = visit(path="/authorize?client_id=nobody")
        page.goto(application.callback.replace("/cb", "/"))
        page.evaluate(
            "url => { const f = document.createElement('iframe'); f.src = url; document.body.append(f) }", page.url_of()
        )
        page.wait_for_timeout(500)
        assert "User name" not in "".join(frame.content() for frame in page.frames[1:])
        page.troubles.clear()


class TestTheDescription:
    def test_it_is_shown_without_a_foreign_origin(self, tmp_path, chromium):
        with Box(tmp_path / "data", workers="0", enable_auth_swagger="true", enable_admin_swagger="true") as box:
            for port, title in ((box.auth_port, "microauthd auth API"), (box.admin_port, "microauthd admin API")):
                page = chromium.new_page()
                troubles, asked = [], []
                page.on(
                    "console",
                    lambda message: (
                        troubles.append(message.text)
                        if message.type == "error" and "favicon" not in message.text and "404" not in message.text
                        else None
                    ),
                )
                page.on("pageerror", lambda error: troubles.append(str(error)))
                page.on("request", lambda request: asked.append(urlsplit(request.url).netloc))
                page.goto(f"http://127.0.0.1:{port}/swagger")
                expect(page.get_by_text(title).first).to_be_visible()
                assert troubles == [] and set(asked) <= {f"127.0.0.1:{port}", ""}
                page.close()
