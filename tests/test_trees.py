"""The archive under every Python and processor that can be had here: set up, served, its token verified; installed as a
service, upgraded, taken back, on a disk that fills.

The interpreters of this machine run it as they are; build/trees makes Debian's of 12, 13 and unstable.
"""

import base64
import contextlib
import hashlib
import http.client
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import box as kit
import jwt
import pytest
from box import ANSWERS, ARCHIVE, ROOT, Box
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_upgrade import CHANGES, NEW, repack
from microauthd import VERSION

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


def require_build_for(name, device):
    """Skip unless the archive has a build for the Python of a device."""
    tag = name.removeprefix("python").replace(".", "")
    machine = device.machine
    with zipfile.ZipFile(ARCHIVE) as archive:
        if not any(f".cpython-{tag}-{machine}" in member for member in archive.namelist()):
            pytest.skip(f"{ARCHIVE.name} has no build for {tag}: build/pyz makes one for every machine")


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


# -- a service --

# Lay a layer over a tree, so that it stays as it was, with a small disk for the data, and stay for others to enter. An
# emulated one has a user namespace for a kernel that runs programs of its processor (binfmt_misc of Linux 6.7), which
# only there knows of the emulator ($4): so the program may start others there. The caller writes the maps of its users.
HOLD = """
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mkdir -p "$2/root$3"
mount -t tmpfs -o size=100m,mode=0755 none "$2/root$3"
mount -t tmpfs none "$2/root/tmp"
mount -t tmpfs -o mode=0755 none "$2/root/run"
mount --rbind /proc "$2/root/proc"
mount --rbind /dev "$2/root/dev"
if [ -n "$4" ]; then
    exec unshare --user --mount --propagation slave sh -ec '
        echo; read -r _
        mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
        printf %s "$1" >/proc/sys/fs/binfmt_misc/register
        mount --rbind /proc/sys/fs/binfmt_misc "$2/root/proc/sys/fs/binfmt_misc"
        echo; exec sleep infinity' sh "$4" "$2"
fi
echo; read -r _; echo; exec sleep infinity
"""
# The first octets of a program for aarch64: ELF64, little-endian, EM_AARCH64; ET_EXEC or ET_DYN. elf(5)
MAGIC = {
    "aarch64": r":\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
}
DEVICE_ANSWERS = """
auth-port = {}
admin-port = {}
workers = 1
argon2id-time = 1
argon2id-memory = 8192
argon2id-parallelism = 1
""" + ANSWERS + """audience = "api"
scopes = ["api:read"]
"""


class Device:
    """A Debian that is entered as a machine would run it, with programs that start others."""

    DATA = "/var/lib/microauthd"

    def __init__(self, name, folder):
        tree, machine = ROOT / "build" / "out" / "trees" / name, name.partition("-")[2]
        self.machine, self.is_native = machine, machine == platform.machine()
        emulator = "" if self.is_native else shutil.which(f"qemu-{machine}-static")
        if not (tree / "etc/sv").is_dir():
            pytest.skip(f"there is no tree {name} with runit: build/trees --again makes it")
        if emulator is None or machine not in (platform.machine(), *MAGIC):
            pytest.skip(f"qemu-{machine}-static is missing, or the test does not know its programs")
        self.root, self.slowness = folder / "root", 1 if self.is_native else 20
        for part in ("upper", "work", "root"):
            (folder / part).mkdir()
        rule = "" if self.is_native else f":microauthd:M:{MAGIC[machine]}:{emulator}:F"
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", HOLD, "sh", str(tree), str(folder), self.DATA, rule],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.await_line()
        if rule:
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{self.holder.pid}/{kind}").write_text("0 0 4294967295\n")
        self.holder.stdin.write("\n")
        self.holder.stdin.flush()
        self.await_line()
        spaces = ["--mount"] if self.is_native else ["--user", "--mount", "--preserve-credentials"]
        self.enter = ["nsenter", "--target", str(self.holder.pid), *spaces, "chroot", str(self.root)]
        # What the layer shows from outside: the small disk is mounted in there alone.
        self.inside = Path(f"/proc/{self.holder.pid}/root") / self.root.relative_to("/")

    def await_line(self):
        if not self.holder.stdout.readline():
            pytest.skip(f"a tree cannot be entered like this here: {self.holder.stderr.read()[-300:]}")

    def start(self, *words, **more):
        path = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        command = [*self.enter, "/usr/bin/env", "-i", path, "LC_ALL=C.UTF-8", "HOME=/root", *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **more)

    def run(self, *words):
        """Return (exit status, what was said)."""
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = process.communicate(timeout=1800)[0]
        return process.returncode, said

    def end(self):
        self.holder.kill()
        self.holder.wait(30)
        shutil.rmtree(self.root.parent / "upper", ignore_errors=True)  # 200 MB, which pytest would keep


@pytest.mark.long
class TestService:
    """On a device: installed, supervised by runit, upgraded, taken back, on a disk that fills."""

    @pytest.fixture
    def device(self, request, tmp_path):
        if os.geteuid():
            pytest.skip("entering a tree needs root")
        device = Device(request.param, tmp_path)
        yield device
        device.end()

    def releases(self, folder):
        """Make releases beside the built one in a folder, signed but for one. Return the line of the key."""
        key = Ed25519PrivateKey.generate()
        for name in ("good", "not ready", "a downgrade"):
            target = folder / f"{name.replace(' ', '-')}.pyz"
            repack(target, CHANGES[name])
            line = f"microauthd-archive-v1 {hashlib.sha256(target.read_bytes()).hexdigest()}\n"
            Path(f"{target}.sig").write_bytes(base64.b64encode(key.sign(line.encode())) + b"\n")
        shutil.copy(folder / "good.pyz", folder / "unsigned.pyz")
        return "ed25519 " + base64.b64encode(key.public_key().public_bytes_raw()).decode() + " builder\n"

    def await_ready(self, box, device):
        end = time.monotonic() + 60 * device.slowness
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if box.auth("/health/ready", timeout=60).status == box.admin("GET", "/health").status == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready: {device.run('tail', '-n', '20', device.DATA + '/microauthd.log')}")

    @pytest.mark.parametrize("device", TREES, indirect=True)
    def test_it_is_installed_and_stays_whatever_an_upgrade_or_the_disk_does(self, device, tmp_path):
        python = next(p for p in sorted((device.inside / "usr/bin").glob("python3.*")) if p.name[8:].isdigit())
        require_build_for(python.name, device)
        box = Box(tmp_path)
        served = device.inside / "srv"
        served.mkdir(exist_ok=True)  # unpacked only, the package base-files has not made it
        trusted = self.releases(served)
        shutil.copy(ARCHIVE, served / "microauthd.pyz")
        (served / "answers.toml").write_text(DEVICE_ANSWERS.format(box.auth_port, box.admin_port))
        status, said = device.run(
            "python3", "-I", "/srv/microauthd.pyz", "install", "--yes", "--answers", "/srv/answers.toml"
        )
        assert status == 0 and "write /etc/sv/microauthd/run (0755)" in said, said
        (device.inside / "etc/microauthd/trusted-keys").write_text(trusted)
        (device.inside / "etc/microauthd/trusted-keys").chmod(0o644)
        with open(tmp_path / "runsv.txt", "wb") as output:
            runsv = device.start("runsv", "/etc/sv/microauthd", stdout=output, stderr=output)
        try:
            self.await_ready(box, device)
            self.exercise(box, device)
        finally:
            runsv.terminate()
            runsv.wait(60 * device.slowness)
        said = (tmp_path / "runsv.txt").read_text() + (device.inside / device.DATA[1:] / "microauthd.log").read_text()
        assert "Traceback" not in said and "backup.made" in said, said

    def exercise(self, box, device):
        """Look at a service, upgrade it in every way, and fill its disk."""
        secrets = (device.inside / "etc/microauthd/first-clients.txt").read_text()
        box.client = ("app", re.search("(?m)^client_secret=(.+)$", secrets)[1])
        token = box.token().json["access_token"]

        def is_well(version):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.await_ready(box, device)
            answer = box.auth("/introspect", {"token": token}, client=box.client, timeout=60)
            return answer.json["active"] and box.admin("GET", "/version").json["version"] == version

        status, said = device.run("microauthd", "status")
        assert status in (0, 1) and f"microauthd {VERSION}" in said, said  # 1 before the first backup
        for archive, wait, wanted, sentence in (
            ("unsigned", 1, 1, "--unsigned does without"), ("a-downgrade", 1, 1, "0.0.9 is older than"),
            ("not-ready", 30, 3, f"{VERSION} is in place: n"), ("good", 180, 0, f"{NEW} is in place and ready"),
        ):  # fmt: skip
            wait = str(wait if device.is_native else 10 * wait)
            status, said = device.run("microauthd", "upgrade", f"/srv/{archive}.pyz", "--yes", "--wait", wait)
            assert status == wanted and sentence in said, said
            assert is_well(NEW if archive == "good" else VERSION), archive
        data, filler = device.inside / device.DATA[1:], device.inside / device.DATA[1:] / "filler"
        before = sorted(os.listdir(data))
        room = os.statvfs(data)
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 200_000))
        status, said = device.run("microauthd", "backup", device.DATA + "/full.backup")
        assert status == 1 and re.search("cannot be written: .*full", said), said
        filler.unlink()
        assert sorted(os.listdir(data)) == before and is_well(NEW), "nothing half-written is left"
        status, said = device.run("microauthd", "backup", device.DATA + "/whole.backup")
        assert status == 0 and (data / "whole.backup").exists() and is_well(NEW), said
