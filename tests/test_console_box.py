"""The rooms of the console that look after the box, in a real browser: sessions, tokens, audit, keys, backups, settings.

A JavaScript error, a violation of the policy or a serious finding of axe fails each of them.
"""

import base64
import hashlib
import json
import re
import threading
from pathlib import Path

import pytest
from box import Box
from playwright.sync_api import expect
from test_console_browser import LOOKS, confirm, console, look_around, shoot, sign_in, visit  # noqa: F401 – fixtures


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    box = Box(
        folder / "data", workers="1", brand_name="North box", enable_token_refresh="true",
        enable_token_revocation="true", backup_folder=folder / "backups",
    )
    box.settings["oidc-issuer"] = f"http://127.0.0.1:{box.auth_port}"
    with box:
        box.bearer = box.admin_token()

        def call(method, path, body=None, status=200):
            answer = box.admin(method, path, json_body=body, bearer=box.bearer)
            assert answer.status == status, answer
            return answer.json

        box.call_admin = call
        box.backups = folder / "backups"
        box.new_user("ann")
        yield box


def is_alive(box, token):
    return box.auth("/introspect", {"token": token}, client=box.client).json["active"]


class TestSessions:
    def test_one_is_ended_and_then_all_of_an_application_and_of_a_person(self, console, box):  # noqa: F811
        tokens = [box.token().json["access_token"] for _ in range(2)]
        person = box.log_in("ann").json["access_token"]
        jti = box.call_admin("POST", "/introspect", {"token": tokens[0]})["jti"]
        page = console(f"#/sessions/{jti}")
        page.get_by_role("button", name="End session").click()
        confirm(page, "End session")
        expect(page.locator("main").get_by_text("ended")).to_be_visible()
        assert [is_alive(box, token) for token in tokens] == [False, True]

        page.goto(f"{page.url.partition('#')[0]}#/sessions")
        page.get_by_label("User name").fill("ann")
        expect(page.get_by_text("1 found").first).to_be_visible()
        assert "q=ann" in page.url
        page.get_by_role("button", name="End all of ann").click()
        confirm(page, "End all")
        expect(page.get_by_text("Nothing matches.")).to_be_visible()
        assert not is_alive(box, person)

        page.get_by_label("Of what").select_option("application")
        page.get_by_label("client_id of the application").fill("app")
        page.get_by_role("button", name="End all of app").click()
        confirm(page, "End all")
        expect(page.get_by_text("Nothing matches.")).to_be_visible()
        assert not is_alive(box, tokens[1])

    def test_all_of_an_address_end(self, console, box):  # noqa: F811
        token = box.log_in("ann").json["access_token"]
        page = console("#/sessions?by=address&q=127.0.0.1")
        page.get_by_role("button", name="End all of 127.0.0.1").click()
        confirm(page, "End all")
        expect(page.get_by_text("Nothing matches.")).to_be_visible()
        assert not is_alive(box, token)
        box.bearer = box.admin_token()

    def test_refresh_tokens_are_listed_by_person(self, console, box):  # noqa: F811
        box.log_in("ann", scope="openid offline_access")
        page = console("#/sessions?what=refresh&q=ann")
        rows = page.get_by_role("row").filter(has_text="living")
        rows.first.get_by_role("button", name="End").click()
        confirm(page, "End session")
        expect(page.get_by_role("row").filter(has_text="ended").first).to_be_visible()

    def test_everything_of_everybody_ends_and_so_does_ones_own_session(self, console, box):  # noqa: F811
        token = box.token().json["access_token"]
        page = console("#/sessions")
        page.get_by_role("button", name="End everybody's").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_role("button", name="End everything")).to_be_disabled()
        dialog.get_by_label("Type everybody to confirm").fill("everybody")
        confirm(page, "End everything")
        expect(page.get_by_role("heading", name="Your session has ended")).to_be_visible()
        assert not is_alive(box, token)
        box.bearer = box.admin_token()


class TestInspector:
    def test_it_says_of_any_text_what_it_is_and_sends_it_to_nobody_else(self, console, box):  # noqa: F811
        asked = []
        page = console("#/inspect")
        page.on("request", lambda request: asked.append(request.url))
        token = box.token().json["access_token"]
        head, claims, signature = token.split(".")

        def packed(members):
            return base64.urlsafe_b64encode(json.dumps(members).encode()).decode().rstrip("=")

        foreign = packed({"iss": "https://elsewhere.example", "sub": "<img src=x onerror=alert(1)>"})
        cases = [
            (token, "It is alive."), (f"{head}.{claims}.{'A' * len(signature)}", "its signature does not fit"),
            (f"{packed({'alg': 'none'})}.{claims}.", "Not alive:"), (f"{head}.{foreign}.{signature}", "Not alive:"),
            ("ü<>{}" * 2000, "it is no token of this box."),
        ]
        for text, verdict in cases:
            page.get_by_label("Token", exact=True).fill(text)
            page.get_by_role("button", name="Is it alive?").click()
            expect(page.locator("main .note").filter(has_text=verdict)).to_be_visible()
        page.get_by_label("Token", exact=True).fill(token)
        page.get_by_role("button", name="Is it alive?").click()
        expect(page.get_by_text("It fits a key of this box.")).to_be_visible()
        page.get_by_role("button", name="Revoke token").click()
        confirm(page, "Revoke token")
        expect(page.get_by_text("it was revoked.")).to_be_visible()
        assert not is_alive(box, token)
        assert asked and all(url.startswith(page.origin) and token not in url for url in asked)
        assert token not in page.url

    def test_a_token_that_is_pasted_into_the_palette_is_inspected(self, console, box):  # noqa: F811
        page = console("#/keys")
        page.keyboard.press("/")
        page.get_by_role("combobox").fill(box.token().json["access_token"])
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Claims")).to_be_visible()
        assert page.url.endswith("#/inspect")


class TestAudit:
    def test_a_long_log_is_searched_on_and_a_button_leads_further(self, console, box):  # noqa: F811
        row = box.call_admin("GET", "/audit-logs?limit=1")
        page = console("#/audit")
        asked = []

        def answer(route):
            """Eleven parts of the log in which nothing is found, and one with a row."""
            place = int((re.search("before=([0-9]+)", route.request.url) or [0, 13])[1])
            asked.append(place)
            link = {"Link": f'<?before={place - 1}&limit=50>; rel="next"'} if place > 2 else {}
            headers = {"X-Total-Count": "0", "X-Total-Count-Relation": "gte"} | link
            route.fulfill(json=[] if place > 2 else row, headers=headers)

        page.route("**/audit-logs?*target=somebody*", answer)
        page.get_by_label("Target", exact=True).fill("somebody")
        expect(page.get_by_text("Nothing found so far.")).to_be_visible()
        assert asked == list(range(13, 3, -1))
        page.get_by_role("button", name="Search further back").click()
        expect(page.locator("tbody tr")).to_have_count(1)
        assert asked[10:] == [3, 2] and "page=3" in page.url
        expect(page.get_by_role("button", name="Next", exact=True)).to_be_disabled()
        page.get_by_role("button", name="To the begin").click()
        expect(page.get_by_text("Nothing found so far.")).to_be_visible()

    def test_it_is_live_pauses_filters_verifies_and_is_taken_away(self, console, box):  # noqa: F811
        page = console("#/audit")
        page.get_by_role("button", name="Watch live").click()
        expect(page.get_by_text("new ones appear by themselves")).to_be_visible()

        def storm():
            for number in range(60):
                box.call_admin("POST", "/scopes", {"name": f"storm:{number}", "description": "of a storm"})

        thread = threading.Thread(target=storm)
        thread.start()
        rows = page.get_by_role("row").filter(has_text="storm:59")
        expect(rows.first).to_be_visible(timeout=20000)
        thread.join()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_text("new ones appear")).to_have_count(0)

        page.get_by_label("Action", exact=True).select_option("create_scope")
        page.get_by_label("Target", exact=True).fill("storm:7")
        page.get_by_label("Who", exact=False).first.fill("root")
        page.get_by_label("Result", exact=True).select_option("success")
        page.get_by_label("Any time").select_option("1h")
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page).to_have_url(re.compile("q=root"))
        assert all(part in page.url for part in ("action=create_scope", "target=storm", "since=1h"))
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        lines = Path(download.value.path()).read_text().splitlines()
        assert [json.loads(line)["target"] for line in lines] == ["storm:7"]

        page.locator("tbody a").first.click()
        expect(page.get_by_role("link", name="Everything of this request")).to_be_visible()
        page.go_back()
        page.get_by_role("button", name="Verify the chain").click()
        expect(page.get_by_text("The chain is whole:")).to_be_visible()

    def test_a_broken_chain_is_said(self, console):  # noqa: F811
        page = console("#/audit")
        page.route("**/audit-logs/verify", lambda route: route.fulfill(json={
            "valid": False, "rows": 5, "first_seq": 1, "last_seq": 5, "head": "", "reason": "row 3 was altered",
        }))
        page.get_by_role("button", name="Verify the chain").click()
        expect(page.get_by_role("status").filter(has_text="row 3 was altered")).to_be_visible()


class TestKeys:
    def test_a_stolen_one_is_revoked_with_its_consequence_named_and_another_waits(self, console, box):  # noqa: F811
        token = box.token().json["access_token"]
        key = next(
            key for key in box.call_admin("GET", "/keys") if key["ring"] == "auth" and "access_token" in key["signs"]
        )
        page = console("#/keys")
        page.get_by_role("row").filter(has_text=key["kid"]).get_by_role("button").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_text(re.compile("living tokens? of"))).to_be_visible()
        expect(dialog.get_by_role("button", name="Revoke key")).to_be_disabled()
        dialog.get_by_label("Type").fill(key["kid"][:8])
        confirm(page, "Revoke key")
        expect(page.get_by_role("row").filter(has_text=key["kid"])).to_have_count(0)
        assert not is_alive(box, token)
        assert is_alive(box, box.token().json["access_token"])

        page.get_by_role("button", name="Rotate keys").last.click()
        confirm(page, "Rotate keys")
        expect(page.get_by_role("cell", name="waits").first).to_be_visible()
        expect(page.get_by_text("One waits to sign already.")).to_be_visible()


class TestBackups:
    def test_one_is_made_fetched_compared_and_removed(self, console, box):  # noqa: F811
        page = console("#/backups")
        page.get_by_role("button", name="Make a backup").click()
        confirm(page, "Make a backup")
        name = re.compile("microauthd-.*backup")
        expect(page.get_by_role("cell", name=name)).to_be_visible()
        file = next(box.backups.iterdir())
        with page.expect_download() as download:
            page.get_by_role("button", name="Fetch").click()
        expect(page.get_by_text("the hashes are the same")).to_be_visible()
        assert Path(download.value.path()).read_bytes() == file.read_bytes()
        expect(page.get_by_text(hashlib.sha256(file.read_bytes()).hexdigest())).to_be_visible()
        page.get_by_role("button", name="Close", exact=True).first.click()
        page.get_by_role("button", name="Remove", exact=True).click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Type").fill(file.name[-15:-7])
        confirm(page, "Remove backup")
        expect(page.get_by_text("No backups yet.")).to_be_visible()
        assert not list(box.backups.iterdir())

    def test_what_breaks_off_goes_on_from_there_and_what_was_altered_is_not_saved(self, console, box):  # noqa: F811
        made = box.call_admin("POST", "/backup", {})
        content, size, broken = (box.backups / made["name"]).read_bytes(), 65536, []

        def piece(route):
            """Answer with pieces of 64 KiB, and fail the second one once."""
            at = int((re.findall(r"offset=(\d+)", route.request.url) or ["0"])[0])
            if at and not broken:
                broken.append(at)
                return route.abort()
            more = {"X-Next-Offset": str(at + size)} if at + size < len(content) else {}
            return route.fulfill(body=content[at : at + size], headers=more, content_type="application/octet-stream")

        page = console("#/backups")
        page.route(f"**/backup/{made['name']}*", piece)
        saved = []
        page.on("download", lambda download: saved.append(download))
        page.get_by_role("button", name="Fetch").click()
        expect(page.get_by_text("It goes on from there.")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("button", name="Go on").click()
        assert Path(download.value.path()).read_bytes() == content
        page.get_by_role("button", name="Close", exact=True).first.click()
        content = content[:70000] + b"?" + content[70001:]
        page.get_by_role("button", name="Fetch").click()
        expect(page.get_by_text("was not saved")).to_be_visible()
        assert len(saved) == 1
        page.troubles[:] = [said for said in page.troubles if "ERR_FAILED" not in said]
        box.call_admin("DELETE", f"/backup/{made['name']}")

    def test_of_a_database_that_is_not_encrypted_the_keys_are_left_out_after_a_question(self, console):  # noqa: F811
        page, sent = console("#/backups"), []

        def refuse_keys(route):
            if route.request.method != "POST":
                return route.continue_()
            sent.append(route.request.post_data_json)
            if sent[-1].get("without_keys"):
                return route.fulfill(json={"name": "microauthd-bare.backup", "bytes": 1000})
            errors = {"without_keys": "the database is not encrypted"}
            return route.fulfill(status=400, json={"success": False, "error": "invalid_request", "errors": errors})

        page.route("**/backup", refuse_keys)
        page.get_by_role("button", name="Make a backup").click()
        confirm(page, "Make a backup")
        expect(page.get_by_role("heading", name="Leave the keys out?")).to_be_visible()
        confirm(page, "Back up without keys")
        expect(page.get_by_text("The backup microauthd-bare.backup is made")).to_be_visible()
        assert sent == [{}, {"without_keys": True}]


class TestSettings:
    def test_every_option_is_found_by_its_name_and_no_secret_shown(self, console, box):  # noqa: F811
        page = console("#/settings")
        rows = page.locator("tbody tr")
        expect(rows.first).to_be_visible()
        assert rows.count() == len(box.call_admin("GET", "/options"))
        expect(page.get_by_role("row").filter(has_text="Passphrase of the database")).to_contain_text(re.compile(r"db-pass\s*set"))
        assert box.settings["db-pass"] not in page.content()
        page.get_by_label("Search options").fill("brand-name")
        expect(page.get_by_role("row").filter(has_text="brand-name")).to_contain_text("North box")

    def test_old_rows_are_deleted_after_a_question(self, console, box):  # noqa: F811
        page = console("#/settings/upkeep")
        card = page.locator("section.card").filter(has_text="Old rows of the audit log")
        card.get_by_label("Older than").fill("400")
        card.get_by_role("button", name="Delete rows").click()
        expect(page.get_by_role("dialog")).to_contain_text("400 days")
        confirm(page, "Delete rows")
        expect(page.get_by_text("0 rows are deleted.")).to_be_visible()


class TestBrand:
    SVG = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'><rect width='8' height='8' fill='#8a3fa0'/></svg>"

    @pytest.fixture(autouse=True)
    def back(self, box):
        yield
        box.call_admin("DELETE", "/brand")

    @staticmethod
    def chosen(page, name, content, kind="image/svg+xml"):
        page.locator("input[type=file]").set_input_files({"name": name, "mimeType": kind, "buffer": content})

    def test_it_is_seen_before_it_is_saved_and_by_everybody_after(self, console, visit, box):  # noqa: F811
        page, hostile = console("#/settings/brand"), "Süd <b>& 'Co'</b>"
        page.get_by_label("Name", exact=True).fill(hostile)
        page.get_by_role("textbox", name="Colour", exact=True).fill("8A3FA0")
        self.chosen(page, "logo.svg", self.SVG)
        preview = page.frame_locator("iframe")
        expect(preview.locator("header span")).to_have_text(hostile)
        expect(preview.locator("button")).to_have_css("background-color", "rgb(138, 63, 160)")
        expect(preview.locator("header img")).to_have_js_property("naturalWidth", 150)
        page.get_by_role("button", name="Dark").click()
        expect(preview.locator("main")).to_have_css("background-color", "rgb(31, 35, 39)")
        page.get_by_role("button", name="Light").click()
        expect(preview.locator("main")).to_have_css("background-color", "rgb(255, 255, 255)")
        assert box.call_admin("GET", "/brand")["name"] == "North box", "nothing is saved yet"
        shoot(page, "brand-proposed")

        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Saved. The next page shows it.")).to_be_visible()
        expect(page.locator(".top bdi").first).to_have_text(hostile)
        expect(page.get_by_role("button", name="Save")).to_be_disabled()
        expect(page.locator(".top")).to_have_css("border-top-color", "rgb(138, 63, 160)")
        login = visit()
        login.goto(f"http://127.0.0.1:{box.auth_port}/account")
        expect(login.locator("header span")).to_have_text(hostile)
        expect(login.locator("header img")).to_have_js_property("naturalWidth", 150)
        expect(login.locator("button[type=submit]")).to_have_css("background-color", "rgb(138, 63, 160)")
        shoot(login, "brand-login")
        login.goto(f"{login.origin}/dashboard/")
        expect(login.locator("header bdi")).to_have_text(hostile)

        page.get_by_role("button", name="Back to mad.conf").click()
        confirm(page, "Back to mad.conf")
        expect(page.get_by_text("The brand is that of mad.conf.")).to_be_visible()
        expect(page.get_by_label("Name", exact=True)).to_have_value("North box")
        expect(page.locator(".top bdi").first).to_have_text("North box")
        expect(page.get_by_role("button", name="Back to mad.conf")).to_have_count(0)

    def test_of_two_administrators_the_second_sees_what_the_first_did(self, console, box):  # noqa: F811
        page = console("#/settings/brand")
        page.get_by_label("Name", exact=True).fill("Mine")
        box.call_admin("PUT", "/brand", {"name": "Theirs", "logo": base64.b64encode(self.SVG).decode()})
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("row").filter(has_text="Mine")).to_contain_text("Theirs")
        shoot(page, "brand-conflict")
        page.get_by_role("button", name="Take mine").click()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Saved. The next page shows it.")).to_be_visible()
        found = box.call_admin("GET", "/brand")
        assert found["name"] == "Mine" and found["logo"]["bytes"] == len(self.SVG)

    def test_what_is_no_picture_is_said_at_its_field_and_a_large_one_made_smaller(self, console, box):  # noqa: F811
        page = console("#/settings/brand")
        self.chosen(page, "bad.svg", self.SVG.replace(b"<rect", b"<script/><rect"))
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("The SVG has a script in it.")).to_be_visible()
        large = base64.b64decode(page.evaluate("""() => {
            const canvas = document.createElement("canvas");
            Object.assign(canvas, { width: 600, height: 400 });
            const image = new ImageData(600, 400);
            let noise = 1;
            for (let at = 0; at < image.data.length; at++) {
              noise = (Math.imul(noise, 1103515245) + 12345) >>> 0;
              image.data[at] = at % 4 === 3 ? 255 : noise >>> 24;
            }
            canvas.getContext("2d").putImageData(image, 0, 0);
            return canvas.toDataURL("image/png").split(",")[1];
        }"""))
        assert len(large) > 40960
        self.chosen(page, "large.png", large, "image/png")
        expect(page.get_by_text("large.png")).to_be_visible()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Saved. The next page shows it.")).to_be_visible()
        assert 0 < box.call_admin("GET", "/brand")["logo"]["bytes"] <= 40960

    def test_by_keyboard_alone(self, console, box):  # noqa: F811
        page = console("#/settings/brand", color_scheme="dark")
        page.get_by_label("Name", exact=True).focus()
        page.keyboard.press("Control+a")
        page.keyboard.type("By keys")
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.type || document.activeElement.tagName"))
            if reached[-1] == "Save":
                break
        assert reached[-1] == "Save" and "Choose a picture" in reached and "IFRAME" not in reached
        page.keyboard.press("Enter")
        expect(page.get_by_text("Saved. The next page shows it.")).to_be_visible()
        assert box.call_admin("GET", "/brand")["name"] == "By keys"


PLACES = [
    "#/sessions", "#/sessions?what=browsers", "#/sessions?what=refresh", "#/inspect", "#/audit", "#/audit/5", "#/keys",
    "#/backups", "#/settings", "#/settings/brand", "#/settings/upkeep",
]


class TestLooks:
    @pytest.mark.parametrize("width, scheme, locale", LOOKS)
    def test_every_place_fits_and_axe_finds_nothing_serious(self, visit, box, width, scheme, locale):  # noqa: F811
        box.token()
        box.log_in("ann", scope="openid offline_access")
        if not box.call_admin("GET", "/backup"):
            box.call_admin("POST", "/backup", {})
        look_around(visit, PLACES, width, scheme, locale)

    def test_a_row_of_each_list_is_reached_and_opened_by_keys(self, console):  # noqa: F811
        page = console("#/audit")
        expect(page.locator("a.row").first).to_be_visible()
        page.locator("a.row").first.focus()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_contain_text("Row")

    def test_a_room_that_is_entered_without_a_network_opens_when_there_is_one(self, console):  # noqa: F811
        page = console("#/settings")
        page.context.set_offline(True)
        page.get_by_role("link", name="Keys").click()
        expect(page.get_by_text("The box does not answer since")).to_be_visible()
        page.context.set_offline(False)
        expect(page.get_by_role("heading", name="Keys")).to_be_visible(timeout=15000)
        page.troubles[:] = [said for said in page.troubles if "ERR_INTERNET_DISCONNECTED" not in said]

    def test_figures_that_cannot_be_drawn_are_a_table(self, visit):  # noqa: F811
        page = visit()
        page.route("**/uplot.js", lambda route: route.abort())
        sign_in(page)
        expect(page.get_by_role("button", name="As a chart").first).to_be_visible()
        page.troubles[:] = [said for said in page.troubles if "ERR_FAILED" not in said]
