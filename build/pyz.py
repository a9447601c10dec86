"""Build microauthd.pyz: our wheel and the locked packages, packed by shiv, with build/main.py as __main__.

usage: pyz.py [--only HERE | --libc musl] [--out FILE] [--trust FILE] [--sign KEY]
       pyz.py --new-key FILE

One file serves CPython 3.11 to 3.14 on x86_64 and aarch64: native modules lie under native/PLATFORM/, and build/main.py
unpacks those that fit. The build is reproducible: modes, times and order are fixed, and no file that contains a build
path is included. Beside the archive stand its SHA-256, its bill of materials and, if it is signed, its signature.
"""

import argparse
import base64
import getpass
import hashlib
import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

import delta
import inventory
import wheels
from wheels import MACHINES, PYTHONS, ROOT, Target

SHEBANG = b"#!/usr/bin/python3 -I\n"  # isolated mode: no PYTHON* variables, no user site, no current folder
EPOCH = 1795392000  # the timestamp of files in our wheel; those of the archive are fixed below

# Compile the module on standard input. Unchecked (PEP 552): the archive has no source beside it to compare with, and a
# timestamp would not be reproducible.
COMPILE = """
import importlib.util, marshal, sys
source = sys.stdin.buffer.read()
code = compile(source, "mad.py", "exec", dont_inherit=True)
header = importlib.util.MAGIC_NUMBER + b"\\1\\0\\0\\0" + importlib.util.source_hash(source)
sys.stdout.buffer.write(header + marshal.dumps(code))
"""


def run_checked(*command, **options):
    """Run a command, and exit with its output if it fails."""
    done = subprocess.run([str(arg) for arg in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} failed:\n{done.stdout}{done.stderr}")


def build_own_wheel(folder: Path) -> dict[str, bytes]:
    """Return the files of our own wheel."""
    source = folder / "source"  # A copy: hatchling writes files next to the sources, and reads .gitignore.
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "microauthd.py", "mad.py"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("public", "appliance"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run_checked(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheel", cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)},
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    return {name: data for name, data in wheels.read_wheel(wheel).items() if not wheels.UNUSED_FILES.search(name)}


def pack(folder: Path, files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Let shiv pack files below site-packages, and return (name, content) of each as it lies in the archive.

    Only site-packages is taken: build/main.py replaces shiv's bootstrap.
    """
    for name, content in files.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes(content)
    packed = folder / "packed.pyz"
    run_checked(
        sys.executable, "-m", "shiv", "--site-packages", folder / "tree", "-e", "appliance.commands:main",
        "--reproducible", "--no-modify", "-o", packed, env=os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)},
    )
    with zipfile.ZipFile(packed) as archive:
        names = [name for name in archive.namelist() if name.startswith("site-packages/") and not name.endswith("/")]
        return [(name, archive.read(name)) for name in names]


def interpreters(python: str) -> list[list[str]]:
    """Return the commands that may run a Python version here: its name, pyenv's, and that of a tree of build/trees."""
    commands = [[sys.executable]] if sys.version_info[:2] == tuple(map(int, python.split("."))) else []
    name = f"python{python}"
    commands += [[path] for path in [shutil.which(name)] if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    commands += [[str(path)] for path in sorted(pyenv.glob(f"{python}.*/bin/{name}"), reverse=True)]
    trees = (ROOT / "build" / "out" / "trees").glob(f"*-{platform.machine()}")
    found = [tree for tree in sorted(trees) if (tree / "usr/bin" / name).exists()]
    commands += [["chroot", str(tree), "/usr/bin/" + name] for tree in found]
    return commands


def compile_mad(python: str) -> tuple[str, bytes] | None:
    """Compile mad for a Python version, if one is here. Return its name in the archive and the content."""
    source = (ROOT / "mad.py").read_bytes()
    for command in interpreters(python):
        done = subprocess.run([*command, "-I", "-c", COMPILE], input=source, capture_output=True)
        if done.returncode == 0:
            return f"pyc/cpython-{python.replace('.', '')}/mad.pyc", done.stdout
    return None


def store_native(native: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Return the members of the archive that hold native modules, with the large ones as differences: build/delta.py.

    The module of the first Python of a platform is stored whole.
    """
    members, deltas, bases = [], {}, {}
    for name, content in native.items():
        family = re.sub(r"\.cpython-[0-9]+-", ".", name)
        base = bases.setdefault(family, name)
        if base != name and len(content) > 1 << 20:
            shifts, content = delta.make_delta(native[base], content)
            deltas["native/" + name] = ("native/" + base, shifts)
        members.append(("native/" + name, content))
    members.append(("deltas.json", json.dumps(deltas, separators=(",", ":"), sort_keys=True).encode()))
    return members


def directory_digest(archive) -> bytes:
    """Return the digest of names, sizes and CRCs that build/main.py verifies.

    zipfile verifies the CRC of each member that it reads, so together they cover every byte.
    """
    return (
        hashlib.sha256(
            "".join("%s %d %d\n" % (info.filename, info.file_size, info.CRC) for info in archive.infolist()).encode()
        )
        .hexdigest()
        .encode()
    )


def release() -> str:
    """Return what `version --json` prints, so that an archive tells its release without being run."""
    command = [sys.executable, str(ROOT / "microauthd.py"), "version", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_file(target: Path, content: bytes, mode: int):
    """Write a file whole or not at all, with this mode whatever the umask is."""
    temporary = target.with_name(target.name + ".new")
    temporary.write_bytes(content)
    temporary.chmod(mode)
    temporary.replace(target)


def make_archive(members) -> bytes:
    """Return the archive, with fixed modes, times and order.

    `build-id` is a digest of all content, and the comment is a digest of the archive's directory.
    """
    members = sorted(members)
    digest = hashlib.sha256()
    for name, content in members:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    members.append(("build-id", digest.hexdigest()[:20].encode()))
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = (0o100755 if wheels.LIBRARY.search(name) else 0o100644) << 16
            info.compress_type = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compresslevel=9)
        archive.comment = directory_digest(archive)
    return buffer.getvalue()


# -- signatures --


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_key(path: Path):
    """Make an Ed25519 key pair: the private key in `path`, and beside it in .pub its line for a trusted-keys file."""
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
    except FileExistsError:
        sys.exit(f"{path} exists; a key is never written over")
    line = f"ed25519 {base64.b64encode(public).decode()} {getpass.getuser()}@{socket.gethostname()}\n"
    path.with_name(path.name + ".pub").write_text(line)
    print(f"{path}: the private key; keep it off the boxes that it signs for\n{path}.pub: {line}", end="")


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PEM), and ask for its passphrase if it has one."""
    try:
        content = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(content, None)
        except TypeError:  # it is encrypted
            key = serialization.load_pem_private_key(content, getpass.getpass(f"passphrase of {path}: ").encode())
    except (OSError, ValueError) as error:
        sys.exit(f"the key {path} cannot be read: {error}")
    if not isinstance(key, Ed25519PrivateKey):
        sys.exit(f"{path} is no Ed25519 key")
    return key


def sign(archive: Path, key: Ed25519PrivateKey):
    """Write the signature beside an archive: over one line that names the format and the archive's SHA-256."""
    signature = key.sign(f"microauthd-archive-v1 {sha256_of(archive)}\n".encode())
    write_file(archive.with_name(archive.name + ".sig"), base64.b64encode(signature) + b"\n", 0o644)


def read_trusted_keys(path: Path) -> bytes:
    """Return a trusted-keys file: lines `ed25519 BASE64 COMMENT`, empty ones and those that begin with #."""
    try:
        content = path.read_text()
    except (OSError, UnicodeError) as error:
        sys.exit(f"the trusted keys {path} cannot be read: {error}")
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if words[0] != "ed25519":
                raise ValueError("it does not begin with ed25519")
            Ed25519PublicKey.from_public_bytes(base64.b64decode(words[1], validate=True))
        except (IndexError, ValueError) as error:
            sys.exit(f"{path}, line {number}, is no trusted key: {error}")
    return content.encode()


# -- the command --


def build(targets: list[Target], target: Path, trusted: bytes, own_wheels: list[Path] | None):
    """Build the archive and what stands beside it."""
    contents = wheels.collect(targets, own_wheels)
    compiled = {python: compile_mad(python) for python in dict.fromkeys(row.python for row in targets)}
    with tempfile.TemporaryDirectory() as name:
        own = build_own_wheel(Path(name))
        files = contents.common | own
        files["appliance/LICENSES"] = inventory.licenses(contents).encode()
        files["appliance/trusted-keys"] = trusted
        members = pack(Path(name), files)
    members += store_native(contents.native)
    members.append(("__main__.py", (ROOT / "build" / "main.py").read_bytes()))
    members.append(("release.json", release().encode()))
    members += filter(None, compiled.values())
    archive = make_archive(members)
    digest = hashlib.sha256(archive).hexdigest()
    version = re.search(r'^VERSION = "([^"]+)"', (ROOT / "microauthd.py").read_text(), re.MULTILINE)[1]
    bill = inventory.bill_of_materials(version, contents, digest, [row.tag for row in targets], EPOCH)
    target.with_name(target.name + ".sig").unlink(missing_ok=True)  # of the archive that was here before
    write_file(target.with_name(target.name + ".cdx.json"), bill.encode(), 0o644)
    write_file(target.with_name(target.name + ".sha256"), f"{digest}  {target.name}\n".encode(), 0o644)
    write_file(target, archive, 0o755)
    print(f"{target}  {len(archive) / 1e6:.1f} MB  sha256 {digest}")
    if missing := [python for python, found in compiled.items() if not found]:
        print(f"no Python {', '.join(missing)} is here: under it mad is compiled at each call, which takes 100 ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=["HERE"], help="build for this Python on this machine alone")
    which.add_argument("--libc", choices=["gnu", "musl"], default="gnu", help="the C library of the boxes [gnu]")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="with --only HERE: your own wheels")
    parser.add_argument("--out", type=Path, metavar="FILE", help="[build/out/microauthd.pyz, microauthd-musl.pyz]")
    parser.add_argument("--trust", type=Path, metavar="FILE", help="public keys that the archive will trust")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign the archive with an Ed25519 key (PEM)")
    parser.add_argument("--new-key", type=Path, metavar="FILE", help="make a key pair for --sign and --trust, no more")
    args = parser.parse_args()
    if args.new_key:
        return make_key(args.new_key)
    if args.wheels and not args.only:
        parser.error("--wheels goes with --only HERE")
    name = "microauthd-musl.pyz" if args.libc == "musl" else "microauthd.pyz"
    target = args.out or ROOT / "build" / "out" / name
    key = read_key(args.sign) if args.sign else None
    trusted = read_trusted_keys(args.trust) if args.trust else b""
    target.parent.mkdir(parents=True, exist_ok=True)
    targets = [Target(python, machine, args.libc) for machine in MACHINES for python in PYTHONS]
    own_wheels = sorted(args.wheels.glob("*.whl")) if args.wheels else None
    build([wheels.here()] if args.only else targets, target, trusted, own_wheels)
    if key:
        sign(target, key)


if __name__ == "__main__":
    main()
