"""Build microauthd.pyz: our wheel and the locked packages, packed by shiv, with build/main.py as __main__.

usage: pyz.py [--out FILE]

The build is reproducible: modes, times and order are fixed, and no file that contains a build path is included. Native
modules lie under native/PLATFORM/, so that one archive can serve several Python versions and architectures; today it
holds those of the Python that runs this.
"""

import argparse
import hashlib
import io
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = sysconfig.get_config_var("EXT_SUFFIX")[1:-3].split("-", 2)[2]
SHEBANG = b"#!/usr/bin/python3 -I\n"  # isolated mode: no PYTHON* variables, no user site, no current folder
EPOCH = "1795392000"  # the timestamp of files in our wheel; those of the archive are fixed below

# Not needed at run time. cffi and pycparser are needed at build time only; _cffi_backend is the run-time part.
UNUSED_FILES = re.compile(
    r"(^|/)(__pycache__|tests?|bin|share|cffi|pycparser|pycparser-[^/]*|cheroot/test|prompt_toolkit/contrib)/"
    r"|\.pyi$|py\.typed$|direct_url\.json$|/(RECORD|INSTALLER|REQUESTED)$|\.c$|\.h$|^bin/|(^|/)wcwidth/[^/]*\.so$"
)


def run_checked(*command, **options):
    """Run a command, and exit with its output if it fails."""
    done = subprocess.run([str(arg) for arg in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} failed:\n{done.stdout}{done.stderr}")


def build_tree(folder: Path) -> Path:
    """Install the locked packages and our own wheel into a subfolder, and return its path."""
    tree = folder / "tree"
    pip_install = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--disable-pip-version-check",
        "--target", tree,
    ]
    run_checked(*pip_install, "--require-hashes", "--only-binary", ":all:", "-r", ROOT / "build" / "requirements.lock")
    source = folder / "source"  # A copy: hatchling writes files next to the sources, and reads .gitignore.
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "microauthd.py", "mad.py"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("public", "appliance"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run_checked(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheel", cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    run_checked(*pip_install, wheel)
    for path in sorted(tree.rglob("*")):
        inside = path.relative_to(tree).as_posix()
        if path.is_file() and UNUSED_FILES.search(inside):
            path.unlink()
    if shutil.which("strip"):
        for path in sorted(tree.rglob("*.so")):
            run_checked("strip", "--strip-unneeded", path)
    return tree


def archive_members(packed: Path):
    """Yield (name, content) of each file that shiv packed, with its name in our archive."""
    with zipfile.ZipFile(packed) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/") or not name.startswith("site-packages/"):
                continue  # shiv's bootstrap, which build/main.py replaces
            target = f"native/{PLATFORM}/" + name.removeprefix("site-packages/") if name.endswith(".so") else name
            yield target, archive.read(name)


def compile_mad(folder: Path) -> bytes:
    """Compile mad for this Python.

    Unchecked (PEP 552): the archive has no source beside it to compare with, and a timestamp would not be reproducible.
    """
    target = folder / "mad.pyc"
    py_compile.compile(
        str(ROOT / "mad.py"), str(target), dfile="mad.py", doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return target.read_bytes()


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


def write_archive(members, target: Path):
    """Write the archive with fixed modes, times and order.

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
            info.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            info.compress_type = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compresslevel=9)
        archive.comment = directory_digest(archive)
    temporary = target.with_name(target.name + ".new")
    temporary.write_bytes(buffer.getvalue())
    temporary.chmod(0o755)
    temporary.replace(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "out" / "microauthd.pyz")
    target = parser.parse_args().out
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = folder / "packed.pyz"
        run_checked(
            sys.executable, "-m", "shiv", "--site-packages", build_tree(folder), "-e", "appliance.commands:main",
            "--reproducible", "--no-modify", "-o", packed, env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        )
        members = list(archive_members(packed))
        members.append(("__main__.py", (ROOT / "build" / "main.py").read_bytes()))
        members.append((f"pyc/{sys.implementation.cache_tag}/mad.pyc", compile_mad(folder)))
        write_archive(members, target)
    print(f"{target}  {target.stat().st_size / 1e6:.1f} MB  sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
