"""The files of the console of ADMIN: appliance/dashboard, packed once, under a path that names their version."""

import functools
import gzip
import hashlib
import html
from pathlib import Path

import msgspec

from appliance.base.pages import LOGO_TYPES, Pages

DASHBOARD = Path(__file__).parents[1] / "dashboard"
TYPES = {
    ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
    ".json": "application/json",
}


class ConsoleFile(msgspec.Struct, frozen=True):
    """A file as it is served; `packed` is its content, compressed by gzip."""

    packed: bytes
    content_type: str

    def content(self) -> bytes:
        return gzip.decompress(self.packed)


def pack(content: bytes, content_type: str) -> ConsoleFile:
    return ConsoleFile(gzip.compress(content, 9, mtime=0), content_type)


class Console:
    """The files of the console, read and packed when the first is asked for: most boxes start without anybody there."""

    def __init__(self, pages: Pages):
        self.pages = pages

    @functools.cached_property
    def files(self) -> dict[str, ConsoleFile]:
        """The modules, sheets, words of each language and the logo, by their path below dashboard/files/<version>/."""
        found = {
            path.relative_to(DASHBOARD).as_posix(): pack(path.read_bytes(), TYPES[path.suffix])
            for path in sorted(DASHBOARD.rglob("*")) if path.suffix in TYPES
        }
        found["tokens.css"] = pack(self.pages.tokens, TYPES[".css"])
        for language, texts in self.pages.texts.items():
            words = self.pages.texts["en"]["console"] | texts.get("console", {})
            found[f"words/{language}.json"] = pack(msgspec.json.encode(words), TYPES[".json"])
        logo = self.pages.options.brand_logo
        kind = LOGO_TYPES.get(logo.rpartition(".")[2].lower())
        if kind and Path(logo).is_file():
            found["logo"] = pack(Path(logo).read_bytes(), f"image/{kind}")
        return found

    @functools.cached_property
    def version(self) -> str:
        """A hash of all files, which are one: a module of another version may not fit."""
        whole = hashlib.sha256((DASHBOARD / "index.html").read_bytes())
        for name, file in self.files.items():
            whole.update(f"{name} {hashlib.sha256(file.packed).hexdigest()} ".encode())
        return whole.hexdigest()[:12]

    def find(self, name: str) -> ConsoleFile | None:
        return self.files.get(name)

    def document(self, language: str, box: str) -> bytes:
        """Return the document, in a language of the pages, for a box of this name."""
        values = {
            "version": self.version, "language": language, "languages": " ".join(sorted(self.pages.texts)),
            "logo": "logo" if "logo" in self.files else "", "box": box,
        }
        text = (DASHBOARD / "index.html").read_text("utf-8")
        for name, value in values.items():
            text = text.replace("{" + name + "}", html.escape(value))
        return text.encode()
