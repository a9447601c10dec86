"""README.md and the manual tell the truth: their tables are made from the code, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import microauthd

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MANUAL = {page.name: page.read_text("utf-8") for page in (ROOT / "appliance" / "manual").glob("*.md")}
PAGES = {"README.md": README, **MANUAL}


class TestTables:
    def test_they_are_what_the_code_says(self):
        done = subprocess.run([sys.executable, ROOT / "build" / "readme.py", "--check"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_every_option_route_and_error_stands_in_them(self):
        for option in microauthd.OPTIONS:
            assert f"`{option.name}`" in MANUAL["mad.conf.md"]
        for routes in (microauthd.AUTH, microauthd.ADMIN):
            for route in routes.routes:
                assert all(f"`{path}`" in MANUAL["endpoints.md"] for path in route.paths)
        for code in microauthd.ERRORS:
            assert f"`{code}`" in MANUAL["endpoints.md"]


class TestNames:
    def test_functions_it_names_exist(self):
        for name in re.findall(r"`([a-z]+_[a-z_]+)`", MANUAL["security.md"]):
            if not name.isupper():
                assert hasattr(microauthd, name) or name == "max_login_failures", name

    def test_files_it_names_exist(self):
        for page, text in PAGES.items():
            for name in re.findall(r"(?:build|appliance|public|tests)/[a-z_]+\.(?:py|html|lock)", text):
                assert (ROOT / name).exists(), (page, name)

    def test_it_begins_with_the_two_commands(self):
        head = README[:900]
        assert "build/run" in head and "build/test" in head
