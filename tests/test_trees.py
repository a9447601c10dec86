"""The archive under every Python and processor that can be had here: set up, served, its token verified.

The interpreters of this machine run it as they are; build/trees makes Debian's of 12, 13 and unstable.
"""

import contextlib
import platform
import shutil
import subprocess
import sys
import zipfile

import box as kit
import jwt
import pytest
from box import ARCHIVE, ROOT, Box

sys.path.append(str(ROOT / "build"))

import pyz
from wheels import PYTHONS

TREES = [f"{suite}-{machine}" for suite in ("bookworm", "trixie", "sid") for machine in ("x86_64", "aarch64")]

# Enter a tree that sees this machine's /proc and /dev, and the box's folder under the name that it has here. Where the
# processor is another, the emulator ($3) runs each program of the tree; the kernel need not know of it (binfmt_misc).
ENTER = """
tree=$1 folder=$2 emulator=$3
shift 3
mount --rbind /proc "$tree/proc"
mount --rbind /dev "$tree/dev"
mount -t tmpfs none "$tree/tmp"
mkdir -p "$tree$folder"
mount --bind "$folder" "$tree$folder"
if [ -n "$emulator" ]; then
    cp "$emulator" "$tree/tmp/emulator"
    emulator=/tmp/emulator
fi
exec chroot "$tree" $emulator /usr/bin/env -C "$folder" $emulator "$@"
"""


class SlowBox(Box):
    """A box under an emulated processor."""

    def run(self, *words, timeout=1800, **more):
        return super().run(*words, timeout=timeout, **more)


def native_pythons():
    """The (version, command) of each Python of this machine that the archive is built for."""
    for version in PYTHONS:
        for command in pyz.interpreters(version):
            if command[0] != "chroot" and subprocess.run([*command, "-c", ""], capture_output=True).returncode == 0:
                yield version, command
                break
        else:
            yield version, None


def in_tree(name, folder):
    """The command that runs Python in a tree; the test is skipped where that cannot be done."""
    tree = ROOT / "build" / "out" / "trees" / name
    machine = name.partition("-")[2]
    if not tree.is_dir():
        pytest.skip(f"there is no tree {name}: build/trees makes it")
    python = next(path for path in sorted((tree / "usr" / "bin").glob("python3.*")) if path.name[8:].isdigit())
    emulator = "" if machine == platform.machine() else shutil.which(f"qemu-{machine}-static")
    if emulator is None:
        pytest.skip(f"qemu-{machine}-static is missing")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("entering a tree needs root and a mount namespace of its own")
    return ["unshare", "-m", "sh", "-ec", ENTER, "sh", str(tree), str(folder), emulator, f"/usr/bin/{python.name}"]


def require_build(python, folder):
    """Skip unless the archive has a build for an interpreter."""
    script = "from _imp import extension_suffixes; print(extension_suffixes()[0])"
    suffix = subprocess.run([*python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    with zipfile.ZipFile(ARCHIVE) as archive:
        if not any(name.endswith(suffix) for name in archive.namelist()):
            pytest.skip(f"{ARCHIVE.name} has no build for {suffix}: build/pyz makes one for every machine")


def exercise(python, folder, monkeypatch):
    """Selftest, set-up, both ports, a token that verifies offline, the operator's commands, a clean end."""
    require_build(python, folder)
    shutil.copyfile(ARCHIVE, folder / "microauthd.pyz")
    monkeypatch.setattr(kit, "PROGRAM", [*python, "-I", str(folder / "microauthd.pyz")])
    box = SlowBox(folder, workers="1")
    box.environ |= {"MICROAUTHD_CACHE": str(folder / "cache"), "LC_ALL": "C.UTF-8"}
    tested = box.run("selftest")
    assert tested.returncode == 0 and tested.stdout.count("ok ") == 5, tested.stdout + tested.stderr
    with contextlib.ExitStack() as stack:
        stack.push(box.__exit__)
        box.set_up().start(wait=False)
        box.await_ready(900)
        issuer = box.auth("/.well-known/openid-configuration", timeout=300).json["issuer"]
        answer = box.auth("/token", {"grant_type": "client_credentials"}, client=box.client, timeout=300)
        assert answer.status == 200, answer
        keys = jwt.PyJWKSet.from_dict(box.auth("/jwks.json", timeout=300).json)
        token = answer.json["access_token"]
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, keys[header["kid"]].key, algorithms=[header["alg"]], issuer=issuer, audience="api")
        assert claims["sub"] == "app" and header["typ"] == "at+jwt"
        admin = box.admin(
            "POST", "/token", {"username": "root", "password": box.PASSWORD, "client_id": "test"}, timeout=300
        )
        assert admin.status == 200, admin
        fetched = box.mad("token", "get", MAD_CLIENT_ID=box.client[0], MAD_CLIENT_SECRET=box.client[1])
        assert fetched.returncode == 0 and fetched.stdout.count(".") == 2, fetched.stderr
        box.process.terminate()
        assert box.process.wait(300) == 0, box.said()
    assert "Traceback" not in box.said() and "Warning" not in box.said()


class TestInterpreters:
    @pytest.mark.parametrize("version", PYTHONS)
    def test_the_archive_serves_under_each_python_of_this_machine(self, version, tmp_path, monkeypatch):
        python = dict(native_pythons())[version]
        if python is None:
            pytest.skip(f"no Python {version} is here")
        exercise(python, tmp_path, monkeypatch)


@pytest.mark.long
class TestTrees:
    @pytest.mark.parametrize("name", TREES)
    def test_the_archive_serves_under_the_python_of_each_debian(self, name, tmp_path, monkeypatch):
        exercise(in_tree(name, tmp_path), tmp_path, monkeypatch)
