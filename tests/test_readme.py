"""README.md and the manual tell the truth: their tables are made from the code, and what they name exists."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import microauthd
from appliance.base.settings import OPTIONS
from appliance.base.wire import Limits
import pexpect
import pytest
from box import ARCHIVE, CHEAP, free_port

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MANUAL = {page.name: page.read_text("utf-8") for page in (ROOT / "appliance" / "manual").glob("*.md")}
PAGES = {"README.md": README, **MANUAL}


class TestTables:
    def test_they_are_what_the_code_says(self):
        done = subprocess.run([sys.executable, ROOT / "build" / "readme.py", "--check"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_every_option_route_and_error_stands_in_them(self):
        for option in OPTIONS:
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

    def test_the_limits_it_names_are_those_of_the_throttle(self):
        rates = microauthd.Throttle.RATES
        named = re.search(
            r"(\d+) at once for one name and then one every (\w+) seconds, (\d+) at once in all and then (\w+) a "
            r"second; so are logins begun, (\d+) and then (\w+) a second.*its ([\d,]+) connections",
            MANUAL["security.md"],
        )
        words = {"one": 1, "two": 2, "three": 3}
        numbers = [words.get(word) or int(word.replace(",", "")) for word in named.groups()]
        assert numbers == [
            rates["name"][0], 1 / rates["name"][1], *rates["peer"], *rates["login of peer"], Limits().connections_per_peer,
        ]

    def test_the_limits_of_refusals_it_names_are_those_of_the_counter(self):
        named = re.search(
            r"(\d+) kinds at once and then (\w+) a minute, of callers that proved a secret or token (\d+) and then "
            r"(\d+), and counts (\d+) and (\d+) kinds at a time;.*by address, (\d+) at once and then (\w+) a second\. No request", MANUAL["security.md"],
        )
        numbers = [{"two": 2, "six": 6}.get(word) or int(word) for word in named.groups()]
        budgets, rates = microauthd.RefusalCounter.BUDGETS, microauthd.Throttle.RATES
        assert numbers == [
            budgets["stranger"][0], 60 * budgets["stranger"][1], budgets["known"][0], 60 * budgets["known"][1],
            budgets["stranger"][2], budgets["known"][2],
            *rates["refusal of peer"],
        ]

    def test_files_it_names_exist(self):
        for page, text in PAGES.items():
            for name in re.findall(r"(?:build|appliance|public|tests)/[a-z_]+\.(?:py|html|lock)", text):
                assert (ROOT / name).exists(), (page, name)

    def test_pages_and_headings_it_links_to_exist(self):
        for page, text in PAGES.items():
            folder = ROOT if page == "README.md" else ROOT / "appliance" / "manual"
            for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", text):
                name, _, heading = target.partition("#")
                path = folder / name if name else folder / page
                assert path.is_file(), (page, target)
                assert not heading or unquote(heading) in anchors(path.read_text("utf-8")), (page, target)

    def test_every_page_of_the_manual_is_linked_from_the_readme(self):
        for page in MANUAL:
            assert f"(appliance/manual/{page})" in README

    def test_no_page_names_what_only_its_authors_had(self):
        for page, text in PAGES.items():
            assert "contract/" not in text, page

    def test_it_is_short_and_begins_with_the_two_commands(self):
        head = README[:900]
        assert "build/run" in head and "build/test" in head
        assert len(README.encode()) <= 12 * 1024


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page, heading):
    """The shell blocks of a section, as they are printed."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.S | re.M)[1]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.S | re.M)


class Terminal:
    """A shell on a terminal of its own. The blocks run in it one after the other, as if pasted."""

    def __init__(self, folder, environ):
        self.said = ""
        self.shell = pexpect.spawn(
            "/bin/bash", ["--noprofile", "--norc"], cwd=str(folder), env=environ, encoding="utf-8",
            codec_errors="replace", timeout=120,
        )

    def run(self, script):
        """Run a script to its end, typing the password that set-up printed where one is asked for; return its output.

        Fails where a command of the script fails.
        """
        start = len(self.said)
        # The marker is typed in two parts, so that the echo of this line does not match it.
        self.shell.sendline(f". {shlex.quote(str(script))}; echo 'the status'' is' $?")
        while True:
            which = self.shell.expect([r"the status is (\d+)", r"(?i)password[^\n]*: ?$"])
            self.said += (self.shell.before + self.shell.after).replace("\r\n", "\n")
            if which == 0:
                break
            self.shell.sendline(re.search(r"^password +(\S+)", self.said, re.M)[1])
        assert self.shell.match[1] == "0", self.said[start:]
        return self.said[start:]

    def close(self):
        """End the shell and what it left running: everything in the session of the terminal."""
        shell = self.shell.pid
        others = {int(name) for name in os.listdir("/proc") if name.isdecimal() and session_of(name) == shell} - {shell}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in others:
                if session_of(pid) == shell:
                    kill(pid, number)
            end = time.monotonic() + 60
            while any(session_of(pid) == shell for pid in others) and time.monotonic() < end:
                time.sleep(0.05)
        self.shell.close(force=True)


def kill(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def session_of(pid):
    """The session a living process belongs to, or None."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


JWT = r"^eyJ\S+\.\S+\.\S+$"


@pytest.mark.skipif(not shutil.which("curl"), reason="the README uses curl")
@pytest.mark.skipif(not ARCHIVE.exists(), reason="no archive is built")
class TestFirstFiveMinutes:
    def test_its_blocks_do_what_they_say(self, tmp_path):
        """Literally, but for the ports, which others may have here, and for `python3`, which is this one."""
        folder, home, programs = tmp_path / "trial", tmp_path / "home", tmp_path / "bin"
        for path in (folder, home, programs):
            path.mkdir(mode=0o700)
        shutil.copyfile(ARCHIVE, folder / "microauthd.pyz")
        python = programs / "python3"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        auth = free_port()
        admin = next(port for port in iter(free_port, None) if port != auth)
        environ = CHEAP | {
            "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home), "TERM": "dumb", "LC_ALL": "C.UTF-8",
            "no_proxy": "localhost", "MAD_AUTH_PORT": str(auth), "MAD_ADMIN_PORT": str(admin),
            "MAD_AUTH_URL": f"http://localhost:{auth}", "MAD_ADMIN_URL": f"http://localhost:{admin}",
            "MICROAUTHD_CACHE": str(ROOT / "build" / "out" / "cache"),
        }

        terminal = Terminal(folder, environ)
        try:
            said = []
            sections = [(README, heading) for heading in ("First five minutes", "First client", "Backup")]
            sections.append((MANUAL["mad.md"], "Python bindings"))
            for page, heading in sections:
                found = blocks(page, heading)
                assert found, heading
                for number, block in enumerate(found):
                    script = tmp_path / f"{heading} {number}.sh"
                    # Stop at the first command that fails, but keep the shell: later blocks use its variables.
                    literal = block.replace(":9040", f":{auth}").replace(":9041", f":{admin}")
                    script.write_text(f"trap 'trap - ERR; return 1' ERR\n{literal}trap - ERR\n")
                    said.append(terminal.run(script))
            set_up, fetched, _, client, _, bindings = said
            assert '"status":"ok"' in set_up
            assert '"access_token"' in fetched and "aud: demo-api" in fetched and "Hello, demo" in fetched
            assert re.search(JWT, client, re.M)
            assert (folder / "box.backup").stat().st_size == (folder / "fetched.backup").stat().st_size > 0
            verifier = {}
            (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)
            exec(example.replace(":9040", f":{auth}"), verifier)
            assert verifier["verify"](re.search(JWT, bindings, re.M)[0])["sub"] == "demo"
            with pytest.raises(verifier["jwt"].InvalidTokenError):  # its audience is another
                verifier["verify"](re.search(JWT, client, re.M)[0])
        finally:
            terminal.close()
