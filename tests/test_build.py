"""build/: what goes into the archive, its bill of materials, its signature."""

import ast
import base64
import errno
import importlib
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from box import ARCHIVE, ROOT
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

sys.path.append(str(ROOT / "build"))

import delta
import elf
import inventory
import pyz
import wheels


class TestStripping:
    """elf(5)"""

    def test_a_module_loses_its_symbols_and_still_loads(self, tmp_path):
        import _cffi_backend

        content = Path(_cffi_backend.__file__).read_bytes()
        stripped = elf.strip(content)
        assert len(stripped) < len(content) and elf.strip(stripped) == stripped
        assert b".shstrtab\0" in stripped and b".symtab\0" not in stripped and b".dynsym\0" in stripped
        (tmp_path / Path(_cffi_backend.__file__).name).write_bytes(stripped)
        script = "import sys; sys.path.insert(0, sys.argv[1]); import _cffi_backend as m; print(m.__file__, m.FFI)"
        done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
        assert done.stdout.startswith(str(tmp_path)), done.stderr

    @pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x02" + bytes(60), b"\x7fELF\x02\x01" + bytes(60)])
    def test_what_is_no_library_is_refused(self, content):
        with pytest.raises(ValueError):
            elf.strip(content)


def main_functions(*names):
    """Functions of build/main.py, which cannot be imported: it runs the program."""
    tree = ast.parse((ROOT / "build" / "main.py").read_text())
    found = [
        node
        for node in tree.body
        if getattr(node, "name", "") in names or (isinstance(node, ast.Assign) and node.targets[0].id == "BLOCK")
    ]
    space = {}
    exec(compile(ast.Module(found, []), "main.py", "exec"), space)
    assert space["BLOCK"] == delta.BLOCK
    return [space[name] for name in names]


class TestUnpacking:
    def test_a_tree_of_an_image_is_removed_though_overlayfs_does_not_rename_it(self, tmp_path, monkeypatch):
        """rename(2): EXDEV, for a folder of a lower layer."""
        (remove_tree,) = main_functions("remove_tree")
        remove_tree.__globals__.update({"errno": errno, "os": os, "shutil": shutil, "tempfile": tempfile})
        (tmp_path / "tree" / "appliance").mkdir(parents=True)

        def refused(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "rename", refused)
        remove_tree(str(tmp_path), str(tmp_path / "tree"))
        assert os.listdir(tmp_path) == []


class TestDeltas:
    @pytest.mark.parametrize(
        "change",
        ["nothing", "a byte", "longer", "shorter", "moved", "moved far", "nothing alike", "empty", "short"],
    )
    def test_a_difference_gives_the_module_back(self, change):
        rng = random.Random(change)
        base = rng.randbytes(50_000)
        content = {
            "nothing": base, "a byte": base[:7000] + b"?" + base[7001:], "longer": base + rng.randbytes(9000),
            "shorter": base[:-9000], "moved": base[:9000] + b"?" * 123 + base[9000:],
            "moved far": base[30_000:] + base[:30_000], "nothing alike": rng.randbytes(50_000), "empty": b"", "short": b"?",
        }[change]
        shifts, difference = delta.make_delta(base, content)
        assert len(difference) == len(content)  # build/main.py compares the sizes of unpacked files with the archive's
        (restore_block,), restored = main_functions("restore_block"), b""
        for shift, at in zip(shifts, range(0, len(content), delta.BLOCK), strict=True):
            restored += restore_block(difference[at : at + delta.BLOCK], at, base, shift)
        assert restored == content
        if change == "moved":
            assert difference.count(0) > 45_000

    def test_every_module_comes_out_of_the_archive_as_it_went_in(self):
        bill = json.loads(ARCHIVE.with_name(ARCHIVE.name + ".cdx.json").read_text())
        tags = [row["value"].split("-", 2) for row in bill["metadata"]["component"]["properties"]]
        targets = [
            wheels.Target(f"{python[0]}.{python[1:]}", *platform.split("-linux-")) for _, python, platform in tags
        ]
        read_blocks, _ = main_functions("read_blocks", "restore_block")
        native = wheels.collect(targets).native
        with zipfile.ZipFile(ARCHIVE) as archive:
            deltas = json.loads(archive.read("deltas.json"))
            for name, content in native.items():
                assert b"".join(read_blocks(archive, "native/" + name, deltas)) == content, name
            kept = {name for name in archive.namelist() if name.startswith("native/")}
        assert kept == {"native/" + name for name in native}

    def test_only_the_first_python_has_a_large_module_whole(self):
        one, other = random.Random(1).randbytes(2 << 20), b"small"
        native = {
            "x/_a.cpython-311-x.so": one, "x/_a.cpython-312-x.so": one[:-1] + b"!", "x/_b.cpython-311-x.so": other,
            "x/_b.cpython-312-x.so": other, "y/_a.cpython-312-y.so": one, "x/_c.abi3.so": one,
        }
        members = dict(pyz.store_native(native))
        deltas = json.loads(members.pop("deltas.json"))
        assert list(deltas) == ["native/x/_a.cpython-312-x.so"]
        assert deltas["native/x/_a.cpython-312-x.so"][0] == "native/x/_a.cpython-311-x.so"
        assert {name for name, content in members.items() if native[name.removeprefix("native/")] == content} == {
            "native/" + name for name in native
        } - set(deltas)


class TestWheels:
    def test_the_files_of_a_wheel_lie_where_pip_would_put_them(self, tmp_path):
        """PEP 427"""
        with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
            for name in ("a.py", "a-1.data/purelib/b.py", "a-1.data/platlib/c.so", "a-1.data/scripts/d", "e/", "e/f.py"):
                wheel.writestr(name, name)
        assert sorted(wheels.read_wheel(tmp_path / "a-1-py3-none-any.whl")) == ["a.py", "b.py", "c.so", "e/f.py"]

    def test_a_file_that_differs_between_pythons_ends_the_build(self):
        files = {}
        for content in (b"1", b"1"):
            wheels.add(files, "a.py", content, "a.whl")
        with pytest.raises(SystemExit, match=r"a\.py of b\.whl differs"):
            wheels.add(files, "a.py", b"2", "b.whl")

    @pytest.mark.parametrize(
        "name, loads",
        [
            ("a.cpython-312-aarch64-linux-gnu.so", True), ("b/a.abi3.so", True), ("a.libs/libgcc_s-0123.so.1", True),
            ("a.cpython-311-aarch64-linux-gnu.so", False), ("a.cpython-312-x86_64-linux-gnu.so", False),
            ("a.cpython-312-aarch64-linux-musl.so", False), ("a.so", False),
        ],
    )
    def test_a_library_is_known_by_its_name(self, name, loads):
        """PEP 3149, PEP 384"""
        assert wheels.is_loadable(wheels.Target("3.12", "aarch64", "gnu"), name) is loads


    def test_a_processor_without_wheels_is_described_by_its_own_names(self, monkeypatch):
        """PEP 3149"""
        monkeypatch.setattr(wheels.sysconfig, "get_config_var", lambda name: ".cpython-311-arm-linux-gnueabihf.so")
        here = wheels.here()
        assert here[1:] == ("arm", "gnueabihf") and here.platform == "arm-linux-gnueabihf"
        assert here.tag == f"cpython-{sys.version_info[0]}{sys.version_info[1]}-arm-linux-gnueabihf"

    def test_wheels_of_ones_own_take_the_place_of_the_locked_ones(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
            for name in ("a.py", "a-1.dist-info/METADATA", "a-1.dist-info/licenses/LICENSE"):
                wheel.writestr(name, name)
        contents = wheels.collect([wheels.here()], sorted(tmp_path.glob("*.whl")))
        assert set(contents.common) == {"a.py", "a-1.dist-info/METADATA"} and not contents.native
        assert contents.packages["a"].licenses == {"LICENSE": "a-1.dist-info/licenses/LICENSE"}


class TestBillOfMaterials:
    """CycloneDX 1.6 (ECMA-424)"""

    @pytest.fixture
    def bill(self):
        return json.loads(ARCHIVE.with_name(ARCHIVE.name + ".cdx.json").read_text())

    def test_it_follows_the_schema(self):
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        text = ARCHIVE.with_name(ARCHIVE.name + ".cdx.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"library"', '"thing"')) is not None

    def test_it_names_every_package_and_what_is_linked_into_it(self, bill):
        named = {row["name"]: row for row in bill["components"]}
        locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "build" / "requirements.lock").read_text(), re.MULTILINE))
        assert set(named) == locked - {"pycparser"} | {"rapidoc", "zxcvbn"}  # pycparser is not in the archive
        assert all(row["licenses"] for row in named.values())
        inner = {(name, part["name"]): part.get("version") for name in named for part in named[name].get("components", ())}
        assert {"openssl", "sqlcipher", "sqlite"} <= {part for name, part in inner if name == "sqlcipher3"}
        assert {"openssl", "pyo3"} <= {part for name, part in inner if name == "cryptography"}
        assert ("cffi", "libffi") in inner and ("argon2-cffi-bindings", "argon2") in inner
        import sqlcipher3

        assert inner["sqlcipher3", "sqlite"] == sqlcipher3.sqlite_version
        from cryptography.hazmat.backends.openssl import backend

        assert inner["cryptography", "openssl"] in backend.openssl_version_text()

    def test_the_licences_name_all_of_it_and_have_the_texts(self, bill):
        with zipfile.ZipFile(ARCHIVE) as archive:
            listed, text = archive.read("site-packages/appliance/LICENSES").decode().split("\n\n", 1)
        for row in bill["components"]:
            version = row.get("version", "(no version)")
            is_ours = row["purl"].startswith("pkg:generic")
            assert f"{row['name']} {version}{', in our own sources' if is_ours else ''}: " in listed
            assert f"== {row['name']} {version}," in text or (is_ours and row["name"] in text.lower())
            for part in row.get("components", ()):
                assert f"\n{part['name']} {part.get('version', '(no version)')}, in {row['name']}: " in listed

    def test_it_belongs_to_this_archive(self, bill):
        (digest,) = bill["metadata"]["component"]["hashes"]
        assert digest == {"alg": "SHA-256", "content": pyz.sha256_of(ARCHIVE)}
        assert ARCHIVE.with_name(ARCHIVE.name + ".sha256").read_text() == f"{digest['content']}  {ARCHIVE.name}\n"

    def test_an_openssl_of_the_system_is_no_part_of_the_archive(self):
        package = wheels.Package("sqlcipher3", "1", "", {}, [], {})
        module = b"%%\0libcrypto.so.3\0" + b"x4.19.0\0" + b"x3.53.4\0"
        contents = wheels.Contents({}, {"p/sqlcipher3/_sqlite3.so": module}, {"sqlcipher3": package})
        parts = {part.name: part.version for part in inventory.linked_into("sqlcipher3", package, contents)}
        assert parts == {"sqlcipher": "4.19.0", "sqlite": "3.53.4"}
        with pytest.raises(SystemExit, match="the version of openssl is not to be read"):
            inventory.linked_into("sqlcipher3", package, wheels.Contents({}, {}, {"sqlcipher3": package}))

    def test_what_documents_inside_a_package_name_is_part_of_it(self):
        """PEP 770"""
        rows = [
            {"name": "a", "version": "1"}, {"name": "cc", "version": "1", "scope": "excluded"},
            {"name": "libgcc", "version": "14", "purl": "pkg:apk/alpine/libgcc@14"}, {"name": "odd", "version": "2"},
            {"name": "pyo3", "version": "3", "purl": "pkg:cargo/pyo3@3", "licenses": [{"license": {"id": "MIT"}}]},
        ]
        package = wheels.Package("a", "1", "", {}, [json.dumps({"components": rows}).encode(), b"{}"], {})
        parts = {part.name: part for part in inventory.linked_into("a", package, wheels.Contents({}, {}, {}))}
        assert sorted(parts) == ["libgcc", "odd", "pyo3"] and parts["pyo3"].purl.type == "cargo"
        assert "GPL" in str(next(iter(parts["libgcc"].licenses)).value)

    def test_a_package_without_a_licence_ends_the_build(self):
        package = wheels.Package("a", "1", "Name: a\nLicense: see below\n", {}, [], {})
        with pytest.raises(SystemExit, match="a names no SPDX licence"):
            inventory.license_of("a", package)


class TestSigning:
    """RFC 8032"""

    @pytest.fixture
    def key(self, tmp_path):
        pyz.make_key(tmp_path / "key")
        return tmp_path / "key"

    def test_a_signature_is_one_line_over_the_digest_of_the_archive(self, tmp_path, key):
        archive = tmp_path / "a.pyz"
        archive.write_bytes(b"an archive")
        pyz.sign(archive, pyz.read_key(key))
        signature = (tmp_path / "a.pyz.sig").read_bytes()
        assert signature.endswith(b"\n") and signature.count(b"\n") == 1
        kind, encoded, _ = (tmp_path / "key.pub").read_text().split(" ", 2)
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(encoded, validate=True))
        message = f"microauthd-archive-v1 {pyz.sha256_of(archive)}\n".encode()
        public.verify(base64.b64decode(signature.strip(), validate=True), message)
        with pytest.raises(InvalidSignature):
            public.verify(base64.b64decode(signature), message.replace(b"v1", b"v2"))
        assert kind == "ed25519" and pyz.read_trusted_keys(tmp_path / "key.pub")

    def test_a_private_key_is_its_owners_and_never_written_over(self, key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        before = key.read_bytes()
        with pytest.raises(SystemExit, match="never written over"):
            pyz.make_key(key)
        assert key.read_bytes() == before

    def test_a_key_with_a_passphrase_asks_for_it(self, tmp_path, monkeypatch):
        secret = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a phrase"),
        )
        (tmp_path / "key").write_bytes(secret)
        monkeypatch.setattr(pyz.getpass, "getpass", lambda question: "a phrase")
        assert pyz.read_key(tmp_path / "key")
        monkeypatch.setattr(pyz.getpass, "getpass", lambda question: "another")
        with pytest.raises(SystemExit, match="cannot be read"):
            pyz.read_key(tmp_path / "key")

    @pytest.mark.parametrize("content", [b"", b"no key", None])
    def test_what_is_no_key_is_refused(self, tmp_path, content):
        if content is not None:
            (tmp_path / "key").write_bytes(content)
        with pytest.raises(SystemExit, match="cannot be read"):
            pyz.read_key(tmp_path / "key")

    KEY = base64.b64encode(bytes(range(32))).decode()

    @pytest.mark.parametrize(
        "line, problem",
        [
            ("", None), ("# a comment", None), (f"ed25519 {KEY}", None), (f"ed25519 {KEY} ann at the bench", None),
            (f"rsa {KEY}", "does not begin"), ("ed25519", "index"), ("ed25519 AAAA", "32"), ("ed25519 ?", "base64|Only"),
        ],
    )
    def test_trusted_keys_are_read_before_they_are_built_in(self, tmp_path, line, problem):
        path = tmp_path / "keys"
        path.write_text(f"ed25519 {self.KEY} first\n{line}\n")
        if problem is None:
            assert pyz.read_trusted_keys(path) == path.read_bytes()
        else:
            with pytest.raises(SystemExit, match=f"line 2, is no trusted key: .*({problem})"):
                pyz.read_trusted_keys(path)

    def test_the_archive_carries_the_keys_it_trusts(self):
        with zipfile.ZipFile(ARCHIVE) as archive:
            assert "site-packages/appliance/trusted-keys" in archive.namelist()


class TestTheBench:
    """It takes too long to be run here, so what it uses of the program is looked for."""

    def test_all_that_it_imports_is_there(self):
        tree = ast.parse((ROOT / "build" / "bench" / "bench.py").read_text())
        imports = [
            (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("appliance", "microauthd")
            for alias in node.names
        ]
        used = [
            ("microauthd", node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "m"
        ]
        assert len(imports) > 5 and len(used) > 5
        missing = [
            name for module, name in [*imports, *used] if not hasattr(importlib.import_module(module), name)
        ]
        assert missing == []
