"""Build microauthd.pyz: our wheel and the locked packages, packed by shiv, sealed with our own __main__.

usage: pyz.py [--out FILE]

The same sources and lock give the same bytes: modes, times and order are fixed, nothing that knows
where it was built goes in. What is native lies under native/PLATFORM/, so that one file can serve
several Pythons and architectures; today it holds those of the Python that runs this.
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
SHEBANG = b"#!/usr/bin/python3 -I\n"  # isolated: no PYTHON* variables, no user site, no current folder
EPOCH = "1795392000"  # of our wheel; the archive's own times are fixed below

# What nobody needs at run time. `cffi` and `pycparser` only build; `_cffi_backend` runs.
NEEDLESS = re.compile(
    r"(^|/)(__pycache__|tests?|bin|share|cffi|pycparser|pycparser-[^/]*|cheroot/test|prompt_toolkit/contrib)/"
    r"|\.pyi$|py\.typed$|direct_url\.json$|/(RECORD|INSTALLER|REQUESTED)$|\.c$|\.h$|^bin/|(^|/)wcwidth/[^/]*\.so$"
)


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words[:4]))} failed:\n{done.stdout}{done.stderr}")


def build_tree(folder: Path) -> Path:
    """Install the lock and our own wheel into a folder."""
    tree = folder / "tree"
    pip = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--disable-pip-version-check",
        "--target", tree,
    ]
    run(*pip, "--require-hashes", "--only-binary", ":all:", "-r", ROOT / "build" / "requirements.lock")
    source = folder / "source"  # hatchling writes beside what it builds, and reads .gitignore
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "microauthd.py", "mad.py"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("public", "appliance"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheel", cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    run(*pip, wheel)
    for path in sorted(tree.rglob("*")):
        inside = path.relative_to(tree).as_posix()
        if path.is_file() and NEEDLESS.search(inside):
            path.unlink()
    if shutil.which("strip"):
        for path in sorted(tree.rglob("*.so")):
            run("strip", "--strip-unneeded", path)
    return tree


def members_of(packed: Path):
    """Yield (name, content) of what shiv packed, each where it belongs in the sealed archive."""
    with zipfile.ZipFile(packed) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/") or not name.startswith("site-packages/"):
                continue  # shiv's own bootstrap: ours takes its place
            target = f"native/{PLATFORM}/" + name.removeprefix("site-packages/") if name.endswith(".so") else name
            yield target, archive.read(name)


def compile_mad(folder: Path) -> bytes:
    """Compile mad for this Python. Unchecked: there is no source beside it in the archive, and no clock goes in."""
    target = folder / "mad.pyc"
    py_compile.compile(
        str(ROOT / "mad.py"), str(target), dfile="mad.py", doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return target.read_bytes()


def directory_digest(archive) -> bytes:
    """As build/main.py has it: names, sizes and CRCs.

    With the CRCs, which are checked when a member is read, it covers every byte.
    """
    return (
        hashlib.sha256(
            "".join("%s %d %d\n" % (info.filename, info.file_size, info.CRC) for info in archive.infolist()).encode()
        )
        .hexdigest()
        .encode()
    )


def seal(members, target: Path):
    """Write the archive: fixed modes, times and order, a build-id made of all content, and as its comment a digest of
    its directory.
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
        run(
            sys.executable, "-m", "shiv", "--site-packages", build_tree(folder), "-e", "appliance.commands:main",
            "--reproducible", "--no-modify", "-o", packed, env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        )
        members = list(members_of(packed))
        members.append(("__main__.py", (ROOT / "build" / "main.py").read_bytes()))
        members.append((f"pyc/{sys.implementation.cache_tag}/mad.pyc", compile_mad(folder)))
        seal(members, target)
    print(f"{target}  {target.stat().st_size / 1e6:.1f} MB  sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
