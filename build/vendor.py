"""Write the libraries of the console to appliance/dashboard/vendor/, from packages that are pinned by their hash.

usage: vendor.py [--check]

`npm pack` fetches each package. Its module is taken as it is, but for three things: imports by a bare name become
relative ones, because an import map would have to stand inline in the document; the reference to a source map goes; and
the licence becomes the first lines. uPlot's own module is not minified, so its script is taken, and exported. `--check`
writes nothing, and exits with 1 if a file differs from the package's.
"""

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "appliance" / "dashboard" / "vendor"
PACKAGES = {  # package and version: (SHA-512 of the archive, {file in it: our name})
    "preact@11.2.0": (
        "/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "hooks.js"},
    ),
    "htm@3.1.1": (
        "983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        {"dist/htm.mjs": "htm.js"},
    ),
    "@preact/signals@2.11.4": (
        "Rb+5RPo9gWSaHtzJeauhHxiC8KP/IF2DEPkHPEOGOnuy2wnJzRqyeLRankUCYd6ADqtxS6GnWGv6Ie343d8aYw==",
        {"dist/signals.mjs": "signals.js"},
    ),
    "@preact/signals-core@1.14.5": (
        "vcRv7Ityz5JVmeiVqIluLFzT/PDS/AlhHUpw3/aUWqcVUs6bDGIPXE/6RSC4evBNWYvnniozg5Syfj33al3gkg==",
        {"dist/signals-core.mjs": "signals-core.js"},
    ),
    "uplot@1.6.32": (
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        {"dist/uPlot.iife.min.js": "uplot.js", "dist/uPlot.min.css": "uplot.css"},
    ),
}
BARE = {
    "preact": "preact.js", "preact/hooks": "hooks.js", "@preact/signals-core": "signals-core.js",
}
APACHE = "Copyright 2018 Google Inc. Licensed under the Apache License, Version 2.0; see htm.js.LICENSE.txt."


def unpack(package: str, integrity: str, folder: Path) -> dict[str, bytes]:
    """Return {path: content} of a package. Exits if its hash is not the pinned one."""
    done = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), package], capture_output=True, text=True,
    )
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        sys.exit(f"npm pack {package} failed:\n{done.stderr}")
    content = archives[0].read_bytes()
    archives[0].unlink()
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != integrity:
        sys.exit(f"{package} has the hash {found}, and {integrity} is pinned")
    (folder / "package.tgz").write_bytes(content)
    with tarfile.open(folder / "package.tgz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        files = {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}
    (folder / "package.tgz").unlink()
    return files


def licence_of(package: str, files: dict[str, bytes]) -> str:
    """Return the first lines of a file: package, version and licence."""
    licence = files["LICENSE"].decode().strip()
    if "Apache License" in licence:
        licence = APACHE
    lines = "\n".join(f" * {line}".rstrip() for line in licence.split("\n"))
    return f"/*! {package}\n{lines}\n */\n"


def adapt(package: str, name: str, content: str, licence: str) -> str:
    """Return a module as it is served."""
    content = re.sub(r"//# sourceMappingURL=\S+\s*$", "", content)
    content = re.sub(
        r"""(\bfrom|\bimport)\s*"([^"./][^"]*)\"""", lambda found: f'{found[1]}"./{BARE[found[2]]}"', content
    )
    if name == "uplot.js":
        content += "\nexport default uPlot;"
    return licence + content.strip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    check = parser.parse_args().check
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        for package, (integrity, wanted) in PACKAGES.items():
            files = unpack(package, integrity, Path(folder))
            for path, name in wanted.items():
                written[name] = adapt(package, name, files[path].decode(), licence_of(package, files))
                if "Apache License" in files["LICENSE"].decode():  # its section 4 asks for a copy
                    written[f"{name}.LICENSE.txt"] = files["LICENSE"].decode()
    there = {path.name: path.read_text("utf-8") for path in VENDOR.glob("*")} if VENDOR.is_dir() else {}
    if check:
        different = sorted(name for name in written.keys() | there.keys() if written.get(name) != there.get(name))
        sys.exit(f"not as in the packages: {', '.join(different)}" if different else 0)
    VENDOR.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        (VENDOR / name).write_text(content, "utf-8")


if __name__ == "__main__":
    main()
