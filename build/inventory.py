"""What the archive holds: its bill of materials (CycloneDX 1.6) and the licences of all of it."""

import json
import re
import sys
import uuid
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from wheels import Contents, Package

ROOT = Path(__file__).resolve().parent.parent

# Packages whose metadata names no SPDX expression; what is written here was read in their licence files.
LICENSES = {
    "bottle": "MIT", "cheroot": "BSD-3-Clause", "prompt-toolkit": "BSD-3-Clause", "questionary": "MIT",
    "segno": "BSD-3-Clause", "sqlcipher3": "Zlib", "wcwidth": "MIT",
}

# C code that is linked into a package and that no document inside it names: package, name, licence, and the pattern
# that finds its version in the compiled module or in the metadata. libffi and http-parser do not tell theirs.
LINKED = (
    ("argon2-cffi-bindings", "argon2", "CC0-1.0 OR Apache-2.0", rb"phc-winner-argon2/commit/([0-9a-f]{40})"),
    ("cffi", "libffi", "MIT", None),
    ("httptools", "http-parser", "MIT", None),
    ("httptools", "llhttp", "MIT", None),
    ("sqlcipher3", "openssl", "Apache-2.0", rb"OpenSSL ([0-9]+\.[0-9]+\.[0-9]+[a-z]?) [0-9]"),
    ("sqlcipher3", "sqlcipher", "BSD-3-Clause", rb"[^0-9.](4\.[0-9]+\.[0-9]+)\0"),
    ("sqlcipher3", "sqlite", "blessing", rb"[^0-9.](3\.[0-9]{2}\.[0-9]+)\0"),
)

UNNAMED = {"libgcc": "GPL-3.0-only WITH GCC-exception-3.1", "openssl": "Apache-2.0"}  # documents inside are silent
VENDORS = {"openssl": "openssl", "sqlcipher": "zetetic", "sqlite": "sqlite"}  # under which advisories know them

# JavaScript and data that are part of our own sources: name, version, licence. appliance/NOTICE has their texts.
VENDORED = (("rapidoc", "9.3.8", "MIT AND BSD-3-Clause"), ("zxcvbn", None, "MIT"))


def license_of(name: str, package: Package) -> str:
    """Return the SPDX expression of a package's licence; end the build if there is none."""
    expression = HeaderParser().parsestr(package.metadata)["License-Expression"] or LICENSES.get(name)
    return expression or sys.exit(f"{name} names no SPDX licence: read its licence, and add it to LICENSES")


def component(name: str, version: str | None, license: str, purl_type: str, **more) -> Component:
    return Component(
        name=name, version=version, type=ComponentType.LIBRARY, bom_ref=f"{purl_type}:{name}@{version or ''}",
        licenses=[LicenseFactory().make_from_string(license)], purl=PackageURL(purl_type, None, name, version), **more,
    )


def linked_into(name: str, package: Package, contents: Contents) -> list[Component]:
    """Return what is linked into the compiled modules of a package."""
    found = {}
    for document in map(json.loads, package.sboms):
        for row in document.get("components", ()):
            if row.get("scope") == "excluded" or row["name"] == name:
                continue  # it runs while the package is built, or is the package itself
            kind = row.get("purl", "pkg:generic").removeprefix("pkg:").partition("/")[0]
            (license,) = row.get("licenses") or [{"expression": UNNAMED.get(row["name"], "NOASSERTION")}]
            expression = license.get("expression") or license["license"].get("id") or license["license"]["name"]
            found[row["name"]] = component(row["name"], row["version"], expression, kind)
    for owner, part, license, pattern in LINKED:
        if owner != name:
            continue
        version = None
        if pattern:
            compiled = [content for path, content in contents.native.items() if path.split("/")[1].startswith(owner)]
            texts = (*compiled, package.metadata.encode())
            versions = {match[1].decode() for text in texts for match in re.finditer(pattern, text)}
            if not versions and any(b"\0libcrypto.so" in content for content in compiled):
                continue  # a build of one's own loads the OpenSSL of the system
            if len(versions) != 1:
                sys.exit(f"{owner}: the version of {part} is not to be read: {sorted(versions)}")
            (version,) = versions
        cpe = f"cpe:2.3:a:{VENDORS[part]}:{part}:{version}:*:*:*:*:*:*:*" if part in VENDORS else None
        found[part] = component(part, version, license, "generic", cpe=cpe)
    for inner in found.values():
        inner.bom_ref.value = f"{name}/{inner.bom_ref.value}"
    return list(found.values())


def expression_of(part: Component) -> str:
    (license,) = part.licenses
    return license.value if isinstance(license, LicenseExpression) else license.id or license.name


def bill_of_materials(version: str, contents: Contents, sha256: str, targets: list[str], made_at: int) -> str:
    """Return the bill of materials of an archive as CycloneDX 1.6 JSON. The same archive gives the same document."""
    archive = component(
        "microauthd", version, "NOASSERTION", "generic", hashes=[HashType.from_composite_str(f"sha256:{sha256}")],
        properties=[Property(name="microauthd:build", value=target) for target in targets],
    )
    archive.type, archive.licenses, archive.purl = ComponentType.APPLICATION, [], None
    parts = [component(*row, "generic", description="part of our own sources") for row in VENDORED]
    for name, package in sorted(contents.packages.items()):
        parts.append(
            component(
                name, package.version, license_of(name, package), "pypi",
                components=linked_into(name, package, contents),
                properties=[
                    Property(name="microauthd:wheel", value=f"{file} sha256:{digest}")
                    for file, digest in sorted(package.wheels.items())
                ],
            )
        )
    bom = Bom(
        components=parts, serial_number=uuid.uuid5(uuid.NAMESPACE_OID, sha256),
        metadata=BomMetaData(component=archive, timestamp=datetime.fromtimestamp(made_at, UTC)),
    )
    bom.register_dependency(archive, parts)
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def licenses(contents: Contents) -> str:
    """Return the licences of all that the archive holds, as plain text: a list of all of it, then every text."""
    rows = []
    for name, package in sorted(contents.packages.items()):
        rows.append(f"{name} {package.version}: {license_of(name, package)}")
        for part in linked_into(name, package, contents):
            rows.append(f"{part.name} {part.version or '(no version)'}, in {name}: {expression_of(part)}")
    for name, version, license in VENDORED:
        rows.append(f"{name} {version or '(no version)'}, in our own sources: {license}")
    chapters = ["\n".join(rows)]
    for name, package in sorted(contents.packages.items()):
        for file, text in package.licenses.items():
            chapters.append(f"== {name} {package.version}, {file}\n\n{text.strip()}")
    chapters.append((ROOT / "appliance" / "NOTICE").read_text().strip())
    return "\n\n".join(chapters) + "\n"
