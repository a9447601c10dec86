"""A box claimed from a telephone: a real browser at the page of the set-up, while somebody else guesses codes."""

import http.client
import threading

import pytest
from playwright.sync_api import expect
from test_browser_login import look
from test_claim import Opened
from test_oobe import PASSWORD, log_in


@pytest.fixture
def opened(tmp_path):
    with Opened(tmp_path) as waiting:
        yield waiting


def guess(port, ending, statuses):
    """Guess codes from another address of loopback until the box is claimed."""
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while not ending.wait(0.05):
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, source_address=("127.0.0.9", 0))
        try:
            connection.request(
                "POST", "/", "code=AAAA-BBBB-CCCC", {"Content-Type": "application/x-www-form-urlencoded"}
            )
            statuses.add(connection.getresponse().status)
        except OSError:
            return
        finally:
            connection.close()


class TestClaim:
    def test_on_a_telephone_without_scripts_while_somebody_guesses(self, opened, chromium, tmp_path):
        ending, statuses = threading.Event(), set()
        guesser = threading.Thread(target=guess, args=(opened.port, ending, statuses))
        guesser.start()
        try:
            page = chromium.new_context(
                viewport={"width": 320, "height": 640}, ignore_https_errors=True, java_script_enabled=False, locale="de-DE",
            ).new_page()
            page.goto(f"https://127.0.0.1:{opened.port}/")
            expect(page.get_by_role("heading")).to_have_text("Diese Box einrichten")
            page.get_by_label("Code der Box").fill(opened.code.lower())
            page.get_by_role("button", name="Weiter").click()
            page.get_by_label("Unter welchem Namen").fill("box.lan")
            page.get_by_label("E-Mail-Adresse").fill("boss@box.example")
            page.get_by_label("Passwort").fill("kurz")
            page.get_by_label("Noch einmal").fill("kurz")
            page.get_by_role("button", name="Einrichten").click()
            expect(page.get_by_role("alert")).to_have_text("Es braucht mindestens 8 Zeichen.")
            page.get_by_label("Passwort").fill(PASSWORD)
            page.get_by_label("Noch einmal").fill(PASSWORD)
            page.get_by_role("button", name="Einrichten").click()
            expect(page.get_by_role("heading")).to_have_text("Diese Box gehört Ihnen", timeout=30000)
            assert page.get_by_role("link").get_attribute("href").startswith("https://box.lan:")
        finally:
            ending.set()
            guesser.join()
        assert opened.process.wait(60) == 0 and log_in(tmp_path)[1].email == "boss@box.example"
        assert statuses == {403, 429}

    @pytest.mark.parametrize("width, scheme", [(320, "light"), (900, "dark")])
    def test_every_step_fits_and_axe_finds_nothing(self, opened, chromium, width, scheme):
        page = chromium.new_context(
            viewport={"width": width, "height": 640}, ignore_https_errors=True, color_scheme=scheme
        ).new_page()
        page.goto(f"https://127.0.0.1:{opened.port}/")
        look(page, f"{scheme}-claim-code")
        page.get_by_label("Claim code").fill(opened.code)
        page.keyboard.press("Enter")
        expect(page.get_by_label("By which name")).to_be_focused()
        look(page, f"{scheme}-claim-questions")
        page.get_by_label("e-mail").fill("boss@box.example")
        page.get_by_label("password?").fill("short")
        page.get_by_label("The same again").fill("longer")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").last).to_be_visible()
        look(page, f"{scheme}-claim-wrong")
        page.get_by_label("By which name").fill("box.lan")
        page.get_by_label("password?").fill(PASSWORD)
        page.get_by_label("The same again").fill(PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text("This box is yours", timeout=30000)
        look(page, f"{scheme}-claim-done")
