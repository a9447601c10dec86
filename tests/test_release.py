"""Which release may take the place of which: a signature of an old one stays good for ever."""

import json
import subprocess
import sys
import zipfile

import pytest
from box import ROOT
from appliance.base import StartupError
from appliance.base.store import MIGRATIONS
from appliance.release import MEMBER, THIS, Release, check_not_older, get_release, read_release, version_order
from microauthd import VERSION


class TestOrder:
    """PEP 440, "Summary of permitted suffixes and relative ordering"."""

    def test_versions_are_ordered_by_their_numbers_and_what_comes_before_a_release_is_older(self):
        ordered = ["0.9", "0.10", "1.0.dev1", "1.0a2", "1.0a10", "1.0b1", "1.0rc1", "1.0", "1.0.post1", "1.0.1", "1.1", "10.0"]
        for older, newer in zip(ordered, ordered[1:], strict=False):
            assert version_order(older) < version_order(newer), (older, newer)
        assert version_order("1.0") == version_order("1") == version_order("1.0.0")

    @pytest.mark.parametrize("version", ["", "x", "1.", ".1", "1.0+local", "1.0 ", "1.0\n", "١.٢", "-1", "1" * 10, "9." * 99 + "9"])
    def test_what_cannot_be_compared_is_refused(self, version):
        with pytest.raises(StartupError, match="no version"):
            version_order(version)


class TestNotOlder:
    @pytest.mark.parametrize(
        "installed, new, is_meant, said",
        [
            (("1.1", 7), ("1.2", 7), False, ""), (("1.1", 7), ("1.2", 9), False, ""),
            (("1.1", 7), ("1.1", 7), False, ""),  # a repair, or another build
            (("1.1", 7), ("1.0.9", 7), False, "1.0.9 is older than 1.1.*--downgrade"), (("1.1", 7), ("1.0.9", 7), True, ""),
            (("1.1", 7), ("1.1rc1", 7), False, "older"), (("1.1", 7), ("1.0.9", 8), False, "older"),
            # What cannot read the database is refused whatever anybody means.
            (("1.1", 7), ("1.0", 6), True, "knows schema 6, and the database has 7"),
            (("1.1", 7), ("1.2", 6), False, "knows schema 6"), (("1.1", 7), ("nonsense", 7), False, "no version"),
        ],
    )  # fmt: skip
    def test_an_older_one_needs_to_be_meant_and_to_know_the_schema(self, installed, new, is_meant, said):
        if not said:
            return check_not_older(Release(*installed), Release(*new), is_meant)
        with pytest.raises(StartupError, match=said):
            check_not_older(Release(*installed), Release(*new), is_meant)


class TestMember:
    @pytest.mark.parametrize(
        "content",
        [
            b"", b"[]", b'{"version": "1.0"}', b'{"version": 1, "schema": 1}', b'{"version": "1.0", "schema": "1"}',
            b" " * 5000 + b'{"version": "1.0", "schema": 1}', b"\xff", None,
        ],
    )  # fmt: skip
    def test_an_archive_that_does_not_say_is_of_no_release(self, tmp_path, content):
        with zipfile.ZipFile(tmp_path / "a.pyz", "w") as archive:
            archive.writestr("other" if content is None else MEMBER, content or b"")
        assert read_release(str(tmp_path / "a.pyz")) is None
        with pytest.raises(StartupError, match="does not say of which release"):
            get_release(str(tmp_path / "a.pyz"))

    def test_nor_is_what_is_no_archive(self, tmp_path):
        (tmp_path / "a.pyz").write_bytes(b"an older release")
        assert read_release(str(tmp_path / "a.pyz")) is None and read_release(str(tmp_path / "none")) is None

    def test_it_is_what_the_program_says_of_itself(self, tmp_path):
        command = [sys.executable, ROOT / "microauthd.py", "version", "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        with zipfile.ZipFile(tmp_path / "a.pyz", "w") as archive:
            archive.writestr(MEMBER, told)
        assert get_release(str(tmp_path / "a.pyz")) == THIS == Release(VERSION, len(MIGRATIONS)) and json.loads(told)
