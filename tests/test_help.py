"""microauthd help: the pages of the manual on a terminal."""

import io
import os
import re
import sys
from pathlib import Path

import pexpect
import pytest
from appliance.commands import main
from appliance.help import MANUAL, lay_out, topics

ROOT = Path(__file__).resolve().parent.parent


class TestManual:
    def test_the_list_names_every_page_and_what_it_holds(self, capsys):
        assert main(["help"]) == 0
        shown = dict(re.findall(r"^  (\S+) +(.+)$", capsys.readouterr().out, re.M))
        assert shown == topics() and set(shown) == {path.stem for path in MANUAL.glob("*.md")}
        assert all(shown.values())

    def test_the_readme_says_the_same_of_each_page(self):
        table = re.findall(r"\| \[(.+)\]\(appliance/manual/(.+)\.md\) \| (.+) \|", (ROOT / "README.md").read_text("utf-8"))
        assert {topic: told for _, topic, told in table} == topics()
        for name, topic, _ in table:
            assert (MANUAL / f"{topic}.md").read_text("utf-8").startswith(f"# {name} – ")

    @pytest.mark.parametrize("topic", topics())
    def test_a_page_is_plain_text_when_it_is_read_by_a_program(self, topic, capsys):
        assert main(["help", topic]) == 0
        shown, page = capsys.readouterr().out, (MANUAL / f"{topic}.md").read_text("utf-8")
        assert "<!--" not in shown and "](" not in shown and "\x1b" not in shown
        text = re.sub(r"<!--.*?-->|(?<=\])\([^)]*\)|^```.*?$", " ", page, flags=re.S | re.M)
        assert set(re.findall(r"\w+", shown.upper())) == set(re.findall(r"\w+", text.upper()))

    @pytest.mark.parametrize("argv", [["nonsense"], [""], ["../manual/mad"], ["mad", "mad.conf"], ["-x"]])
    def test_what_is_no_page_is_an_error(self, argv, capsys):
        assert main(["help", *argv]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("microauthd: ") and shown.err.count("\n") == 1

    def test_the_error_lists_the_pages(self, capsys):
        main(["help", "nonsense"])
        assert ", ".join(topics()) in capsys.readouterr().err

    def test_a_terminal_gets_a_pager(self):
        page = pexpect.spawn(
            sys.executable, ["microauthd.py", "help", "security"], cwd=str(ROOT), encoding="utf-8",
            env=os.environ | {"PAGER": "sed s/^/paged:/", "TERM": "xterm"}, timeout=30,
        )
        page.expect(pexpect.EOF)
        page.close()
        assert page.before.startswith("paged:Security model") and page.exitstatus == 0

    def test_letters_that_the_terminal_lacks_are_replaced(self, monkeypatch):
        output = io.TextIOWrapper(io.BytesIO(), "ascii")
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["help", "standards"]) == 0
        output.seek(0)
        assert "RFC 6749  ?3.3" in output.read()

    def test_a_reader_that_closes_early_is_no_error(self):
        child = pexpect.spawn(
            "/bin/bash", ["-c", f"set -o pipefail; {sys.executable} microauthd.py help mad | true; echo status $?"],
            cwd=str(ROOT), encoding="utf-8", timeout=30,
        )
        child.expect(pexpect.EOF)
        assert child.before.strip() == "status 0"


class TestLayout:
    @pytest.mark.parametrize(
        "page, shown",
        [
            ("# A – b\n\n## Part\n", "A – b\n\nPART\n"), ("one\ntwo\n\nthree", "one two\n\nthree\n"),
            ("* one\n  two\n* three", "* one two\n* three\n"), ("see [page](page.md#part).", "see page.\n"),
            ("```sh\na  b\n\n# c\n```\nd", "    a  b\n    \n    # c\nd\n"), ("a\n\n    b  c\n", "a\n\n    b  c\n"),
            ("<!-- table x -->\n| A | B |\n| --- | --- |\n| a\\|b | c |\n<!-- end -->\n", "A\n    B\na|b\n    c\n"),
            ("| a | | b |", "a\n    b\n"), ("one two three four five six seven", "one two three\nfour five six\nseven\n"),
            ("* one two three four", "* one two\n  three four\n"),
        ],
    )
    def test_table(self, page, shown):
        assert lay_out(page, 14) == shown
