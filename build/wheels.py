"""Get the wheels of build/requirements.lock for any Python and processor, and read what the archive needs of them."""

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import elf

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "build" / "requirements.lock"
CACHE = ROOT / "build" / "out" / "wheels"

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
# pip falls back to older tags only where they are named. Nothing newer than glibc 2.28 (RHEL 8, Debian 10) is taken.
TAGS = {
    "gnu": (*(f"manylinux_2_{minor}" for minor in range(28, 16, -1)), "manylinux2014"),
    "musl": ("musllinux_1_2", "musllinux_1_1"),
}

# Not needed at run time. cffi and pycparser are needed at build time only; _cffi_backend is the run-time part.
UNUSED_FILES = re.compile(
    r"(^|/)(__pycache__|tests?|bin|share|cffi|pycparser|pycparser-[^/]*|cheroot/test|prompt_toolkit/contrib)/"
    r"|\.(pyi|c|h|pyx|pxd)$|py\.typed$|direct_url\.json$|/(RECORD|INSTALLER|REQUESTED|WHEEL)$|(^|/)wcwidth/[^/]*\.so$"
    r"|\.dist-info/(sboms/|licenses/|LICENSE|NOTICE|scm_)"
)
LIBRARY = re.compile(r"\.so(\.[0-9]+)*$")


class Target(NamedTuple):
    """One Python on one kind of machine."""

    python: str  # 3.11
    machine: str  # as `uname -m` has it
    libc: str  # "gnu", "musl"; more of it on some processors, such as "gnueabihf"

    @property
    def platform(self) -> str:
        return f"{self.machine}-linux-{self.libc}"

    @property
    def tag(self) -> str:
        """What stands in the name of an extension module. PEP 3149."""
        return f"cpython-{self.python.replace('.', '')}-{self.platform}"


class Package(NamedTuple):
    """A package of the lock, as far as the archive holds it."""

    name: str
    version: str
    metadata: str  # its METADATA
    licenses: dict[str, str]  # file name: text
    sboms: list[bytes]  # CycloneDX documents of what is linked into it. PEP 770
    wheels: dict[str, str]  # file name: SHA-256, in hexadecimal


def here() -> Target:
    """Return the Python that runs this."""
    machine, _, libc = sysconfig.get_config_var("EXT_SUFFIX")[1:-3].split("-", 2)[2].partition("-linux-")
    return Target(f"{sys.version_info.major}.{sys.version_info.minor}", machine, libc)


def locked_hashes() -> set[str]:
    """Return the SHA-256 of every file that the lock allows, in hexadecimal."""
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", LOCK.read_text()))


def download(target: Target) -> list[Path]:
    """Return the wheels of the lock that fit a target. They are kept in build/out/wheels until the lock changes."""
    folder = CACHE / target.tag
    tags = TAGS["musl" if target.libc.startswith("musl") else "gnu"]
    stamp = hashlib.sha256(LOCK.read_bytes() + repr(tags).encode()).hexdigest()
    if (folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp:
        return sorted(folder.glob("*.whl"))
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="tmp.", dir=CACHE))
    abi = "cp" + target.python.replace(".", "")
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--require-hashes", "--only-binary", ":all:", "--requirement", LOCK, "--dest", temporary,
            "--implementation", "cp", "--python-version", target.python, "--abi", abi, "--abi", "abi3", "--abi", "none",
            *(word for tag in tags for word in ("--platform", f"{tag}_{target.machine}")),
        ],
        capture_output=True, text=True,
    )
    if done.returncode:
        shutil.rmtree(temporary)
        sys.exit(f"the packages for {target.tag} cannot be had:\n{done.stdout}{done.stderr}")
    (temporary / "stamp").write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return sorted(folder.glob("*.whl"))


def read_wheel(path: Path) -> dict[str, bytes]:
    """Return the files of a wheel by their names below site-packages; scripts and data files are left out. PEP 427."""
    files = {}
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            inside = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
            if not name.endswith("/") and not re.match(r"[^/]+\.data/", inside):
                files[inside] = wheel.read(name)
    return files


def add(files: dict[str, bytes], name: str, content: bytes, origin: str):
    """Add a file; it must be the same in every wheel that has it."""
    if files.setdefault(name, content) != content:
        sys.exit(f"{name} of {origin} differs from the file of that name of another Python or processor")


class Contents(NamedTuple):
    """What the archive needs of the wheels of all targets."""

    common: dict[str, bytes]  # by name below site-packages
    native: dict[str, bytes]  # stripped extension modules, by PLATFORM/name below site-packages
    packages: dict[str, Package]  # by normalised name


def is_loadable(target: Target, name: str) -> bool:
    """Tell by its name whether a target can load a library: an extension module (PEP 3149, PEP 384) or one it needs."""
    return name.endswith((f".{target.tag}.so", ".abi3.so")) or ".libs/" in name


def describe(path: Path, files: dict[str, bytes], packages: dict[str, Package]):
    """Note a package, its licences and the wheel that it came from."""
    name, version = path.name.split("-")[:2]
    texts = {
        inside.rpartition("/licenses/")[2].rpartition(".dist-info/")[2]: content.decode(errors="replace")
        for inside, content in sorted(files.items())
        if re.search(r"\.dist-info/(licenses/.|(LICEN[CS]E|COPYING|NOTICE|AUTHORS)[^/]*$)", inside)
    }
    metadata = next(content for inside, content in files.items() if inside.endswith(".dist-info/METADATA"))
    sboms = [content for inside, content in sorted(files.items()) if re.search(r"\.dist-info/sboms/.*json$", inside)]
    package = Package(name, version, metadata.decode(), texts, sboms, {})
    package = packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), package)
    package.wheels[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()


def collect(targets: list[Target], own_wheels: list[Path] | None = None) -> Contents:
    """Read the wheels of all targets: `own_wheels`, or else those of the lock."""
    with ThreadPoolExecutor(4) as pool:
        wheels = [own_wheels] if own_wheels else list(pool.map(download, targets))
    hashes = locked_hashes()
    contents = Contents({}, {}, {})
    for target, paths in zip(targets, wheels, strict=True):
        for path in paths:
            if not own_wheels and hashlib.sha256(path.read_bytes()).hexdigest() not in hashes:
                sys.exit(f"{path} is not the file that {LOCK.name} names; remove it")
            files = read_wheel(path)
            used = {name: content for name, content in files.items() if not UNUSED_FILES.search(name)}
            for name, content in used.items():
                if not LIBRARY.search(name):
                    add(contents.common, name, content, path.name)
                elif is_loadable(target, name):
                    add(contents.native, f"{target.platform}/{name}", elf.strip(content), path.name)
                else:
                    sys.exit(f"{name} of {path.name} is not for {target.tag}")
            if used:
                describe(path, files, contents.packages)
    return contents
