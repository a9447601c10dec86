"""The command line: exit statuses, usage."""

import os
import re

import pytest
from box import Box
from appliance.base.settings import OPTIONS
from appliance.commands import COMMANDS, main


class TestBesideARunningServer:
    """The commands as an operator types them."""

    @pytest.mark.parametrize(
        "words",
        [
            ["backup"], ["backup", "a", "b"], ["restore"], ["keys"], ["keys", "turn"], ["keys", "revoke"],
            ["keys", "rotate", "--ring", "x"], ["admin"], ["admin", "recover"], ["admin", "destroy", "--username", "x"],
        ],
    )
    def test_bad_usage_is_two(self, tmp_path, words):
        box = Box(tmp_path / "data").set_up()
        assert box.run(*words).returncode == 2


class TestCommandLine:
    @pytest.mark.parametrize(
        "argv, status",
        [
            (["version"], 0), (["--help"], 0), (["nonsense"], 2), (["serve", "--nonsense"], 2), (["serve", "extra"], 2),
            (["serve", "--db-pass", "x"], 2),
        ],
    )
    def test_exit_statuses(self, argv, status, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        mask = os.umask(0o022)
        try:
            assert main(argv) == status
        finally:
            os.umask(mask)


class TestHelp:
    """Each command says its usage, what it does, its options and examples."""

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "mad"])
    def test_each_has_help_without_doing_anything(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for flag in ("--help", "-h"):
            assert main([name, "--nonsense", flag]) == 0
        shown = capsys.readouterr().out
        command = COMMANDS[name]
        assert shown.startswith(f"usage: microauthd {name}") and command.description and "\nexamples:\n" in shown
        assert all(f"  {flag.name}" in shown for flag in command.flags)
        assert command.summary and not list(tmp_path.iterdir())
        assert all(len(line) <= 120 for line in shown.splitlines())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_flag_of_its_usage_is_explained_and_the_other_way_round(self, name):
        command = COMMANDS[name]
        assert set(re.findall(r"--[a-z-]+", " ".join(command.usage))) == {flag.name for flag in command.flags}

    def test_that_of_mad_is_its_own(self, capsys):
        assert main(["mad", "--help"]) == 0
        assert capsys.readouterr().out.startswith("usage: mad ")

    def test_that_of_serve_has_every_option(self, capsys):
        assert main(["serve", "--help"]) == 0
        shown = capsys.readouterr().out
        assert all((f"  --{option.name}\n" in shown) is not option.secret for option in OPTIONS)

    def test_an_unknown_command_has_none(self, capsys):
        assert main(["nonsense", "--help"]) == 2
        assert "unknown command 'nonsense'" in capsys.readouterr().err
