"""The brand of the pages: name, colour and picture, as options say them and as an administrator changes them."""

import base64
import html
import re

import microauthd as m
import pytest
from appliance.base.database import Unavailable
from appliance.base.objects import LOGO_SIZE
from appliance.base.pages import force_scheme, picture_type
from appliance.base.settings import Options
from conftest import CHEAP, Caller

from test_console import SAME_ORIGIN, Tab

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'><style>rect{fill:red}</style><rect width='8' height='8'/></svg>"
DOCTYPE = b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">\n'
LINKED = SVG.replace(b"<rect", b"<a href='https://example.org/'><circle r='1'/></a><rect", 1)


def encode(content):
    return base64.b64encode(content).decode()


@pytest.fixture
def put(admin, admin_token):
    def call(status=200, headers=(), **members):
        answer = admin("PUT", "/brand", bearer=admin_token, json_body=members, headers=headers)
        assert answer.status == status, answer
        return answer

    return call


@pytest.fixture
def get(admin, admin_token):
    return lambda: admin.get("/brand", bearer=admin_token)


@pytest.fixture
def page(auth):
    return lambda: auth.get("/logout", headers=[("Accept", "text/html")]).body.decode()


def logo_of(page):
    """The path of the picture that a page shows, or None."""
    found = re.search(r'<img src="https://idp.example(/pages/logo[^"]*)"', page)
    return found and found[1]


class TestChanges:
    def test_without_any_it_is_that_of_the_options(self, make_idp, tmp_path, page, get):
        assert get().json == {
            "name": "", "host": "idp.example", "color": "#1f5fbf", "text_color": "#ffffff", "contrast": 6.09, "logo": None,
            "origins": {"name": "option", "color": "option", "logo": "option"}, "modified_at": None,
        }
        assert "<span>idp.example</span>" in page() and logo_of(page()) is None

    def test_each_part_is_changed_alone_and_shown_at_once(self, put, page, auth, get):
        put(name=" North box ")
        assert "<span>North box</span>" in page() and "- North box</title>" in page()
        put(color="8A3FA0")
        sheet = auth.get(re.search(r'href="https://idp.example(/pages/[^"]+\.css)"', page())[1])
        assert sheet.body.startswith(b":root { --brand: #8a3fa0; --on-brand: #ffffff;")
        shown = put(logo=encode(PNG)).json
        assert shown["logo"]["uri"] == "https://idp.example" + logo_of(page()) and shown["logo"]["bytes"] == len(PNG)
        assert shown == get().json and shown["origins"] == {"name": "set", "color": "set", "logo": "set"}
        assert shown["modified_at"] and shown["name"] == "North box"

    def test_null_leaves_a_part_to_the_option_and_blank_is_none(self, make_idp, tmp_path, root, admin_token, options):
        (tmp_path / "logo.svg").write_bytes(SVG)
        idp = make_idp(Options(
            **CHEAP, oidc_issuer="https://idp.example", admin_domain="localhost", brand_name="Of the file",
            brand_color="#ffee00", brand_logo=str(tmp_path / "logo.svg"),
        ))
        admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp))

        def put(**members):
            return admin("PUT", "/brand", bearer=admin_token, json_body=members).json

        assert put()["logo"]["bytes"] == len(SVG) and put()["text_color"] == "#000000"
        changed = put(name="Other", color="#000000", logo="")
        assert (changed["name"], changed["color"], changed["logo"]) == ("Other", "#000000", None)
        assert put(name="")["name"] == "" and idp.brand.name == "idp.example"
        back = put(name=None, color=None, logo=None)
        assert (back["name"], back["color"], back["logo"]["media_type"]) == ("Of the file", "#ffee00", "image/svg+xml")
        assert set(back["origins"].values()) == {"option"}

    REFUSED = [
        ({"name": "x" * 81}, "name", "must be at most 80 printable characters"),
        ({"name": "a\nb"}, "name", "must be at most 80 printable characters"),
        ({"color": "red"}, "color", "must be a colour such as 1f5fbf"),
        ({"color": "#12345"}, "color", "must be a colour such as 1f5fbf"),
        ({"color": "#123456;}"}, "color", "must be a colour such as 1f5fbf"),
        ({"logo": "%%%"}, "logo", "must be base64"),
        ({"logo": encode(b"GIF89a")}, "logo", "must be a PNG, JPEG, WebP or SVG picture"),
        ({"logo": encode(PNG + bytes(LOGO_SIZE))}, "logo", f"must have at most {LOGO_SIZE} octets"),
    ]

    @pytest.mark.parametrize("members, member, sentence", REFUSED)
    def test_what_is_refused_names_its_member_and_changes_nothing(self, put, get, members, member, sentence):
        before = get().json
        errors = put(400, **({"name": "Good"} | members)).json["errors"]
        assert errors == {member: sentence}
        assert get().json == before

    def test_whoever_changes_what_another_changed_meanwhile_is_told(self, put, get):
        """RFC 9110 §13.1.1"""
        tag = get().headers["etag"]
        changed = put(headers=[("If-Match", tag)], name="First")
        assert changed.headers["etag"] == get().headers["etag"] != tag
        put(412, headers=[("If-Match", tag)], name="Second")
        assert get().json["name"] == "First"
        put(headers=[("If-Match", changed.headers["etag"])], name="Second")

    def test_a_reset_leaves_all_to_the_options(self, put, get, admin, admin_token, idp):
        before = get().json
        put(name="Other", logo=encode(PNG))
        stale = [("If-Match", '"0"')]
        assert admin("DELETE", "/brand", bearer=admin_token, headers=stale).status == 412
        assert admin("DELETE", "/brand", bearer=admin_token).status == 200
        assert admin("DELETE", "/brand", bearer=admin_token).status == 200
        assert get().json == before and [row.action for row in idp.store.list_audit("brand_reset")] == ["brand_reset"]

    def test_the_audit_log_says_what_was_changed(self, put, idp, root):
        put(name="Other", color="#000000")
        put(name="Other")
        (row,) = idp.store.list_audit("brand_changed")
        assert (row.actor_id, row.secondary) == (root.id, "name=Other color=#000000")

    def test_only_an_administrator_may(self, admin, machine):
        for method in ("GET", "PUT", "DELETE"):
            body = {"name": "x"} if method == "PUT" else None
            assert admin(method, "/brand", json_body=body).status == 401
            assert admin(method, "/brand", json_body=body, bearer=machine["access_token"]).status == 401

    def test_authenticators_show_the_name_too(self, put, idp):
        put(name="North box")
        assert idp.brand.name == "North box"


class TestProcesses:
    """Another process of the server, which shares the generation."""

    @pytest.fixture
    def other(self, idp, options, make_idp):
        other = make_idp(options)
        other.store.generation = idp.store.generation
        return other

    def test_takes_up_a_change_at_once(self, idp, other, put):
        assert other.brand.name == "idp.example"
        put(name="Changed", color="#800080", logo=encode(PNG))
        assert (other.brand.name, other.brand.color) == ("Changed", "#800080") and other.brand == idp.brand
        assert m.read_logo(other, other.brand.logo) == (PNG, "image/png")

    def test_serves_the_sheet_of_a_page_that_another_made(self, other, put, page):
        old = re.search(r"/pages/(pages\.[^\"]+\.css)", page())[1]
        put(color="#800080")
        new = re.search(r"/pages/(pages\.[^\"]+\.css)", page())[1]
        auth = Caller(m.App(other, m.AUTH))
        assert old != new and auth.get(f"/pages/{old}").status == auth.get(f"/pages/{new}").status == 200

    def test_a_page_without_a_database_has_the_last_brand(self, put, page, idp, monkeypatch):
        put(name="Changed")
        assert "Changed" in page()
        idp.store.generation.bump()
        monkeypatch.setattr(idp.store, "find_brand", lambda: (_ for _ in ()).throw(Unavailable("gone", 1)))
        assert "<span>Changed</span>" in page()


class TestPicture:
    """PNG §5.2, RFC 9649 §2.4"""

    GOOD = [
        (PNG, "image/png"), (b"\xff\xd8\xff\xe0" + bytes(16), "image/jpeg"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8), "image/webp"), (SVG, "image/svg+xml"),
        (b"\xef\xbb\xbf" + SVG, "image/svg+xml"), (DOCTYPE + SVG, "image/svg+xml"), (LINKED, "image/svg+xml"),
        (b"<!-- made by hand -->" + SVG, "image/svg+xml"),
        (b"<?xml version='1.0' encoding='windows-1252'?>" + SVG, "image/svg+xml"),
    ]

    @pytest.mark.parametrize("content, media_type", GOOD)
    def test_is_known_by_its_content_and_not_by_its_name(self, put, auth, content, media_type):
        logo = put(logo=encode(content)).json["logo"]
        answer = auth.get(logo["uri"].removeprefix("https://idp.example"))
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, content, media_type)

    def svg(inner=b"", attributes=b""):
        return b"<svg xmlns='http://www.w3.org/2000/svg'" + attributes + b">" + inner + b"</svg>"

    BAD = [
        (svg(b"<script>alert(1)</script>"), "must have no script (an element script)"),
        (svg(b"<x:script xmlns:x='http://www.w3.org/2000/svg'/>"), "must have no script (an element script)"),
        (svg(b"<foreignObject/>"), "must have no script (an element foreignobject)"),
        (svg(attributes=b" onload='alert(1)'"), "must have no script (an event handler)"),
        (svg(b"<rect ONCLICK='x'/>"), "must have no script (an event handler)"),
        (svg(b"<a href=' java&#115;cript:alert(1)'/>"), "must have no script (a link to one)"),
        (svg(b"<a xmlns:x='http://www.w3.org/1999/xlink' x:href='javascript:1'/>"), "must have no script (a link to one)"),
        (b"<!DOCTYPE svg [<!ENTITY a 'b'>]>" + SVG, "must declare no entities"),
        (SVG[:-3], "must be well-formed SVG"), (b"<", "must be well-formed SVG"),
        (b"<?xml version='1.0' encoding='none'?>" + SVG, "must be encoded as UTF-8"),
        (b"<?xml version='1.0' encoding='rot13'?>" + SVG, "must be encoded as UTF-8"),
        (b"<?xml version='1.0' encoding='idna'?>" + SVG, "must be encoded as UTF-8"),
        (b"<html/>", "must be a PNG, JPEG, WebP or SVG picture"),
        (b"<svg/>", "must be a PNG, JPEG, WebP or SVG picture"), (b"", "must be a PNG, JPEG, WebP or SVG picture"),
        (b"\x89PNG\r\n\x1a\n<script>", "must be a PNG, JPEG, WebP or SVG picture"),
    ]

    @pytest.mark.parametrize("content, sentence", BAD)
    def test_with_a_script_or_of_another_kind_is_refused(self, content, sentence):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            picture_type(content)

    def test_opened_by_itself_it_can_do_nothing(self, put, auth, admin, page, idp):
        put(logo=encode(SVG))
        path = logo_of(page())
        console = f"/dashboard/files/{idp.console.version}/{path.rpartition('/')[2]}"
        for answer in (auth.get(path), admin.get(console)):
            assert answer.headers["content-security-policy"] == (
                "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
            )
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "max-age=31536000" in answer.headers["cache-control"]

    def test_another_one_has_another_address_and_the_old_one_ends(self, put, auth, page):
        put(logo=encode(SVG))
        old = logo_of(page())
        put(logo=encode(PNG))
        assert logo_of(page()) != old and auth.get(old).status == 404
        assert auth.get("/pages/logo").body == PNG and "max-age=300" in auth.get("/pages/logo").headers["cache-control"]
        put(logo="")
        assert auth.get("/pages/logo").status == 404 and logo_of(page()) is None

    def test_of_an_option_that_cannot_be_read_is_none_and_logged_once(self, make_idp, tmp_path):
        idp = make_idp(Options(**CHEAP, oidc_issuer="https://idp.example", brand_logo=str(tmp_path / "gone.png")))
        auth = Caller(m.App(idp, m.AUTH))
        for _ in range(2):
            assert logo_of(auth.get("/logout").body.decode()) is None
            idp.store.generation.bump()
        assert idp.stream.getvalue().count("brand.unreadable") == 1


class TestHostileNames:
    @pytest.mark.parametrize("name", [
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}} % if True:", "'; --", "</title><b>", "&lt;b&gt;",
    ])
    def test_a_name_is_text_on_every_page(self, put, page, admin, name):
        put(name=name)
        shown = re.search(r"<header>.*?<span>(.*?)</span>", page(), re.S)[1]
        box = re.search(r'<meta name="box" content="([^"]*)"', admin.get("/dashboard/").body.decode())[1]
        for text in (shown, box):
            assert html.unescape(text) == name and not set(text) & set("<>\"")


class TestPreview:
    def test_is_the_sign_in_page_with_gaps_which_only_the_console_may_frame(self, admin, put):
        put(name="Saved")
        answer = admin.get("/dashboard/preview?lang=de", headers=[("Accept-Language", "en")])
        policy = answer.headers["content-security-policy"]
        assert answer.status == 200 and "<h1>Anmelden</h1>" in answer.body.decode()
        assert "Saved" not in answer.body.decode() and f"<span>{m.PREVIEW_NAME}</span>" in answer.body.decode()
        assert "form-action 'none'" in policy and "frame-ancestors 'self'" in policy and "script-src" not in policy
        assert answer.headers["x-frame-options"] == "SAMEORIGIN"

    def test_repeats_nothing_of_its_address(self, admin):
        plain = admin.get("/dashboard/preview").body
        assert admin.get("/dashboard/preview?lang=<script>&name=Evil&color=red").body == plain

    @pytest.mark.parametrize("scheme, paper", [("light", "#ffffff"), ("dark", "#1f2327")])
    def test_has_a_sheet_of_any_colour_in_either_scheme(self, admin, idp, scheme, paper):
        answer = admin.get(f"/dashboard/files/{idp.console.version}/login.ffee00.{scheme}.css")
        assert answer.headers["content-type"].startswith("text/css") and b"--brand: #ffee00" in answer.body
        assert b"prefers-color-scheme" not in answer.body and f"color-scheme: {scheme}".encode() in answer.body
        assert force_scheme(b"@media (prefers-color-scheme:dark) and (width > 1px) {}", scheme).startswith(
            b"@media (min-width: 0)" if scheme == "dark" else b"@media (max-width: 0)"
        )

    @pytest.mark.parametrize("name", ["login.ffee00.css", "login.FFEE00.dark.css", "login.ffee0.dark.css", "brand.red.css", "console.red.css"])
    def test_no_other_sheet_is_made(self, admin, idp, name):
        assert admin.get(f"/dashboard/files/{idp.console.version}/{name}").status == 404

    def test_the_console_wears_the_brand_and_a_change_takes_no_module_away(self, admin, put, idp):
        before = idp.console.version
        put(color="#800080", logo=encode(PNG))
        document = admin.get("/dashboard/").body.decode()
        assert f'href="files/{before}/console.800080.css"' in document and idp.console.version == before
        for name in (re.search(r'data-logo="([^"]+)"', document)[1], "brand.800080.css", "console.800080.css", "main.js"):
            assert admin.get(f"/dashboard/files/{before}/{name}").status == 200

    def test_the_console_changes_it_by_its_cookie(self, admin, root):
        tab = Tab(admin)
        tab.sign_in()
        assert tab("PUT", "/brand", {"name": "By the console"}).json["name"] == "By the console"
        assert tab("PUT", "/brand", {"name": "Evil"}, headers=(("Sec-Fetch-Site", "cross-site"),)).status == 403
        assert tab("PUT", "/brand", {"name": "Evil"}, headers=(SAME_ORIGIN,), token="x").status == 403
        assert admin.get("/dashboard/").body.count(b"By the console") == 3  # tag, title and heading
