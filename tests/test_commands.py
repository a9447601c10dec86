"""The command line: exit statuses, usage."""

import os

import pytest
from box import Box
from appliance.commands import main


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
        assert main(argv) == status
        os.umask(mask)
