"""The pages of public/ in a real browser, against the built archive."""

import json

import pytest
from box import Box
from conftest import PASSWORD
from playwright.sync_api import expect

@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(
        tmp_path_factory.mktemp("browser") / "data", serve_public_auth_files="true", workers="1",
        enable_token_refresh="true",
    )
    box.settings["oidc-issuer"] = f"http://127.0.0.1:{box.auth_port}"
    with box:
        bearer = box.admin_token()
        made = box.admin(
            "POST", "/clients",
            json_body={"client_id": "web", "client_type": "public", "grant_types": ["password", "refresh_token"]},
            bearer=bearer,
        )
        assert made.status == 200
        box.new_user("ann", PASSWORD)
        demo = f"http://127.0.0.1:{box.auth_port}/pkce_demo/"
        assert (
            box.admin("POST", "/clients", json_body={"client_id": "spa", "client_type": "public"}, bearer=bearer).status
            == 200
        )
        for kind in ("redirect-uris", "post-logout-redirect-uris"):
            assert box.admin("POST", f"/clients/spa/{kind}", json_body=demo, bearer=bearer).status == 201
        yield box


@pytest.fixture
def page(box, chromium):
    page = chromium.new_page(viewport={"width": 320, "height": 700})
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.goto(f"http://127.0.0.1:{box.auth_port}/login.html")
    yield page
    page.close()


def sign_in(page, password=PASSWORD):
    page.get_by_label("User name").fill("ann")
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Sign in").click()


class TestLoginPage:
    def test_sign_in_refresh_sign_out(self, box, page):
        sign_in(page)
        claims = page.locator("#claims")
        expect(claims).to_contain_text("ann")
        before = claims.inner_text()
        page.get_by_role("button", name="Refresh").click()
        expect(claims).not_to_have_text(before)
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("User name")).to_be_visible()
        assert page.troubles == []

    def test_a_refusal_is_said_in_words_and_announced(self, page):
        sign_in(page, "wrong wrong")
        expect(page.get_by_role("alert")).to_contain_text("That did not work")

    def test_no_token_is_kept_where_a_script_could_find_it_later(self, page):
        sign_in(page)
        expect(page.locator("#claims")).to_contain_text("ann")
        kept = page.evaluate(
            "JSON.stringify([Object.keys(localStorage), Object.keys(sessionStorage), document.cookie])"
        )
        assert json.loads(kept) == [[], [], ""]

    def test_it_fits_320_pixels(self, page):
        sign_in(page)
        expect(page.locator("#claims")).to_contain_text("ann")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


class TestPkceDemo:
    """public/pkce_demo: a single-page application in plain modules."""

    def test_sign_in_userinfo_refresh_renewal_and_sign_out(self, box, chromium):
        page = chromium.new_page(viewport={"width": 320, "height": 800})
        troubles = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "console",
            lambda message: (
                troubles.append(message.text) if message.type == "error" and "favicon" not in message.text else None
            ),
        )
        page.goto(f"http://127.0.0.1:{box.auth_port}/pkce_demo/")
        page.get_by_role("button", name="Sign in").click()
        sign_in(page)
        expect(page.get_by_role("heading", name="Signed in as ann")).to_be_visible()
        assert "code=" not in page.url and "n" in page.locator("#id_token").inner_text()
        before = page.locator("#access_token").inner_text()
        page.get_by_role("button", name="Ask userinfo").click()
        expect(page.locator("#said")).to_contain_text("ann@example.org")
        page.get_by_role("button", name="Refresh").click()
        expect(page.locator("#access_token")).not_to_have_text(before)
        before = page.locator("#access_token").inner_text()
        page.get_by_role("button", name="Renew silently").click()
        expect(page.locator("#access_token")).not_to_have_text(before)
        kept = page.evaluate(
            "JSON.stringify([Object.values(localStorage), Object.values(sessionStorage), document.cookie])"
        )
        assert "eyJ" not in kept and "verifier" not in kept
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_label("User name")).to_be_visible()
        assert troubles == []
        page.close()
