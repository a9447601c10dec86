"""Which release an archive is of, and which release may take the place of which."""

import re
import zipfile

import msgspec

from appliance.base import StartupError
from appliance.base.store import MIGRATIONS
from microauthd import VERSION

# == Release ===================================================================
# An older release has the faults that newer ones mend, and its signature stays good for ever: so whoever gets hold of
# one must not be able to pass it off as an upgrade.

MEMBER = "release.json"  # of the archive, by build/pyz.py: what `version --json` prints
MEMBER_MOST = 4096  # octets
STAGES = ("dev", "a", "b", "rc", "", "post")


class Release(msgspec.Struct, frozen=True):
    version: str
    schema: int  # how many migrations it knows


THIS = Release(VERSION, len(MIGRATIONS))


def version_order(version: str) -> tuple:
    """Return what versions are ordered by. Raises StartupError unless it is one such as 1.2, 1.2.3 or 1.3rc1. PEP 440
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9}){0,9})(?:\.?(dev|a|b|rc|post)([0-9]{1,9}))?", version)
    if not found:
        raise StartupError(f"{version[:60]!r} is no version that could be compared with {VERSION}")
    numbers = [int(word) for word in found[1].split(".")]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return numbers, STAGES.index(found[2] or ""), int(found[3] or 0)


def read_release(archive: str) -> Release | None:
    """Return of which release an archive is, without running it. None if it does not say: it is damaged, or older than
    this member of archives.
    """
    try:
        with zipfile.ZipFile(archive) as file, file.open(MEMBER) as member:
            return msgspec.json.decode(member.read(MEMBER_MOST), type=Release)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None


def get_release(archive: str) -> Release:
    """Return of which release a new archive is. Raises StartupError if it does not say."""
    found = read_release(archive)
    if not found:
        raise StartupError("the new archive does not say of which release it is: it is damaged, or older than this one")
    return found


def check_not_older(installed: Release, new: Release, is_meant: bool):
    """Raise StartupError if a release must not take the place of the one that is installed.

    `is_meant` permits an older one, as long as it can read the database.
    """
    if new.schema < installed.schema:
        raise StartupError(
            f"the new archive is of an older release: it knows schema {new.schema}, and the database has "
            f"{installed.schema}"
        )
    if not is_meant and version_order(new.version) < version_order(installed.version):
        raise StartupError(
            f"{new.version} is older than {installed.version}, which is installed, and lacks what was mended since: "
            "--downgrade says that this is meant"
        )
