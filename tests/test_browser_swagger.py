"""The page that shows the description of a port, in a real browser against the built archive."""

import pytest
from playwright.sync_api import expect

BOX = {"workers": "1", "enable_auth_swagger": "true", "enable_admin_swagger": "true"}


@pytest.fixture(params=["auth", "admin"])
def shown(box, chromium, request):
    """The page, what it asked for, and what the browser had to say about it."""
    origin = f"http://127.0.0.1:{box.auth_port if request.param == 'auth' else box.admin_port}"
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    page.origin, page.asked, page.troubles, page.port = origin, [], [], request.param
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("requestfailed", lambda asked: page.troubles.append(f"failed: {asked.url}"))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "console",
        lambda said: (
            page.troubles.append(f"{said.text} {said.location['url']}") if said.type in ("error", "warning") else None
        ),
    )
    page.goto(f"{origin}/swagger")
    yield page
    page.close()


class TestSwagger:
    def test_it_shows_what_the_port_serves(self, shown):
        expect(shown.get_by_text(f"microauthd {shown.port} API").first).to_be_visible(timeout=30_000)  # all routes
        path = "/introspect" if shown.port == "auth" else "/audit-logs/verify"
        listed = shown.get_by_text(path, exact=False).first
        listed.click()
        expect(listed).to_be_visible()
        assert shown.troubles == []

    def test_nothing_is_asked_of_anybody_else(self, shown):
        expect(shown.get_by_text(f"microauthd {shown.port} API").first).to_be_visible(timeout=30_000)  # all routes
        shown.wait_for_load_state("networkidle")
        assert {url for url in shown.asked if not url.startswith(("data:", "blob:"))} == {
            f"{shown.origin}/{path}" for path in ("swagger", "swagger/rapidoc-min.js", "openapi.json")
        }

    def test_its_policy_lets_no_foreign_script_run_and_no_text_as_one(self, shown):
        policy = shown.request.get(f"{shown.origin}/swagger").headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe-eval" not in policy
        shown.evaluate(
            """document.body.append(Object.assign(document.createElement('script'), {textContent: "document.title = 'ran'"}))"""
        )
        assert shown.title() == "microauthd API" and any("script-src" in trouble for trouble in shown.troubles)

    def test_a_call_from_the_page_goes_to_where_the_page_came_from_and_nowhere_else(self, shown):
        shown.goto(f"{shown.origin}/swagger#get-/ping")
        shown.get_by_role("button", name="TRY").first.click()
        expect(shown.get_by_text(f"pong from {shown.port}").first).to_be_visible()
        assert shown.troubles == [] and f"{shown.origin}/ping" in shown.asked
        assert shown.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'blocked')") == "blocked"
