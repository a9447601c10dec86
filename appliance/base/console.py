"""The files of the console of ADMIN: appliance/dashboard, packed once, under a path that names their version."""

import functools
import gzip
import hashlib
import html
import re
from pathlib import Path

import msgspec

from appliance.base.pages import Brand, Pages, brand_style, force_scheme

DASHBOARD = Path(__file__).parents[1] / "dashboard"
TYPES = {
    ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
    ".json": "application/json",
}
# The words that the sign-in needs. They stand in the document, so that it need not wait for those of all rooms.
FRONT = (
    "sign_in", "user_name", "password", "show", "hide", "code_if_any", "sign_in_failed", "loading_console",
    "needs_script", "quote_this", "try_again", "error_429", "error_no_answer", "error_server_error",
)


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
        """The modules, sheets and words of each language, by their path below dashboard/files/<version>/."""
        found = {
            path.relative_to(DASHBOARD).as_posix(): pack(path.read_bytes(), TYPES[path.suffix])
            for path in sorted(DASHBOARD.rglob("*")) if path.suffix in TYPES
        }
        found["tokens.css"] = pack(self.pages.tokens, TYPES[".css"])
        for language in self.pages.texts:
            found[f"words/{language}.json"] = pack(msgspec.json.encode(self.words(language)), TYPES[".json"])
        return found

    def words(self, language: str) -> dict:
        """Return {key: words} of the console in a language of the pages; English fills in what is missing."""
        return self.pages.texts["en"]["console"] | self.pages.texts[language].get("console", {})

    @functools.cached_property
    def version(self) -> str:
        """A hash of all files, which are one: a module of another version may not fit."""
        whole = hashlib.sha256((DASHBOARD / "index.html").read_bytes())
        for name, file in self.files.items():
            whole.update(f"{name} {hashlib.sha256(file.packed).hexdigest()} ".encode())
        return whole.hexdigest()[:12]

    def find(self, name: str) -> ConsoleFile | None:
        """Return a file by its path; the sheets brand., console. and login.<rrggbb> are made of their name.

        The brand is no part of the version: who changes it must not take the modules of an open console away.
        """
        if found := re.fullmatch(r"brand\.([0-9a-f]{6})\.css", name):
            return pack(brand_style("#" + found[1]), TYPES[".css"])
        if found := re.fullmatch(r"console\.([0-9a-f]{6})\.css", name):
            sheet = b"".join(self.files[part].content() for part in ("tokens.css", "console.css"))
            return pack(brand_style("#" + found[1]) + sheet, TYPES[".css"])
        if found := re.fullmatch(r"login\.([0-9a-f]{6})\.(light|dark)\.css", name):
            return pack(force_scheme(brand_style("#" + found[1]) + self.pages.sheet[1], found[2]), TYPES[".css"])
        return self.files.get(name)

    def document(self, language: str, brand: Brand) -> bytes:
        """Return the document, in a language of the pages, for a box of this brand."""
        words = self.words(language)
        values = {
            "version": self.version, "language": language, "languages": " ".join(sorted(self.pages.texts)),
            "logo": brand.logo, "color": brand.color[1:], "box": brand.name,
            "words": msgspec.json.encode({key: words[key] for key in FRONT}).decode(),
            "loading": words["loading_console"], "needs_script": words["needs_script"],
        }
        text = (DASHBOARD / "index.html").read_text("utf-8")
        return re.sub(r"\{(\w+)\}", lambda gap: html.escape(values[gap[1]]), text).encode()
