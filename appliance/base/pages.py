"""The pages for people: the auto-escaped templates of appliance/pages, their texts, brand and style sheet."""

import contextlib
import functools
import hashlib
import io
import re
import xml.parsers.expat
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import bottle
import msgspec

from appliance.base.settings import Options

PAGES = Path(__file__).parents[1] / "pages"
LOGO_TYPES = {"png": "png", "svg": "svg+xml", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}  # by the file's extension

SCRIPTS = ("form_post.js", "pages.js")
PICTURE_SIZE = 65536  # octets: the picture of an application stands in the page itself

# As appliance/dashboard/words.js has them. The first that occurs in the User-Agent counts: Edge and Opera claim to be
# Chrome, which claims to be Safari, and Android claims to be Linux.
BROWSERS = (
    ("Edg/", "Edge"), ("EdgA/", "Edge"), ("EdgiOS/", "Edge"), ("OPR/", "Opera"),
    ("SamsungBrowser/", "Samsung Internet"),
    ("Firefox/", "Firefox"), ("FxiOS/", "Firefox"), ("CriOS/", "Chrome"), ("Chrome/", "Chrome"), ("Safari/", "Safari"),
    ("curl/", "curl"), ("python", "Python"),
)
SYSTEMS = (
    ("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"), ("Windows", "Windows"), ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"), ("Linux", "Linux"),
)

# The surfaces that a button of the brand's colour may lie on: paper, ground, hover, chosen and raised of tokens.css.
LIGHT_SURFACES = ("#ffffff", "#f1f3f5", "#e9ecf0", "#e3ecf9")
DARK_SURFACES = ("#1f2327", "#14171a", "#2a2f35", "#1d3450", "#282d32")


def channels(color: str) -> list[int]:
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours such as #1f5fbf. WCAG 2.2, relative luminance."""

    def luminance(color: str) -> float:
        red, green, blue = (
            channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
            for channel in (value / 255 for value in channels(color))
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def on_brand(brand: str) -> str:
    """Return black or white, whichever has the higher contrast ratio on a colour. WCAG 2.2 §1.4.3"""
    return "#ffffff" if contrast("#ffffff", brand) >= contrast("#000000", brand) else "#000000"


def brand_edge(brand: str, towards: str, surfaces: tuple[str, ...]) -> str:
    """Return the brand's colour, mixed towards another until it stands out 3:1 from every surface. WCAG 2.2 §1.4.11"""
    for step in range(51):
        pairs = zip(channels(brand), channels(towards), strict=True)
        mixed = (round(own + (other - own) * step / 50) for own, other in pairs)
        edge = "#" + "".join(f"{value:02x}" for value in mixed)
        if all(contrast(edge, surface) >= 3 for surface in surfaces):
            return edge
    return towards


def brand_style(color: str) -> bytes:
    """Return the rules that tell a style sheet a colour, such as #1f5fbf, and what is readable on it and around it."""
    light, dark = brand_edge(color, "#000000", LIGHT_SURFACES), brand_edge(color, "#ffffff", DARK_SURFACES)
    return (
        f":root {{ --brand: {color}; --on-brand: {on_brand(color)}; --brand-edge: {light}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ --brand-edge: {dark}; }} }}\n"
    ).encode()


def force_scheme(sheet: bytes, scheme: str) -> bytes:
    """Return a style sheet that looks as if the reader had chosen `light` or `dark`. CSS Media Queries 5 §11.5"""

    def replace(found: re.Match) -> bytes:
        return b"(min-width: 0)" if found[1].decode() == scheme else b"(max-width: 0)"

    forced = re.sub(rb"\(\s*prefers-color-scheme\s*:\s*(light|dark)\s*\)", replace, sheet)
    return forced + f":root {{ color-scheme: {scheme}; }}\n".encode()


class Brand(msgspec.Struct, frozen=True):
    """What the pages carry: the name of the server, a colour such as #1f5fbf, the file name of its picture, or ""."""

    name: str
    color: str
    logo: str  # logo.<12 hex digits of its SHA-256>
    logo_type: str = ""  # its media type


def logo_name(sha256: str) -> str:
    """Return the file name of a picture, which another picture does not have: browsers may keep it for ever."""
    return f"logo.{sha256[:12]}" if sha256 else ""


def check_svg(content: bytes) -> None:
    """Raise ValueError if an SVG picture is malformed, or has a script or what could hide one.

    What it loads from elsewhere is not refused but never comes: browsers fetch nothing for a picture, and its own
    Content-Security-Policy forbids it. SVG 2 §2.2.1
    """
    parser, roots = xml.parsers.expat.ParserCreate(namespace_separator=" "), []

    def begin(name: str, attributes: dict) -> None:
        roots.append(name)
        local = name.rpartition(" ")[2].lower()
        links = [value for key, value in attributes.items() if key.rpartition(" ")[2].lower() == "href"]
        if local in ("script", "foreignobject", "iframe", "handler", "listener"):
            raise ValueError(f"must have no script (an element {local})")
        if any(key.rpartition(" ")[2].lower().startswith("on") for key in attributes):
            raise ValueError("must have no script (an event handler)")
        if any(re.match(r"[\s\x00-\x1f]*(javascript|vbscript)\s*:", link, re.I) for link in links):
            raise ValueError("must have no script (a link to one)")

    def begin_doctype(name: str, system_id: str | None, public_id: str | None, has_internal_subset: bool) -> None:
        if has_internal_subset:  # entities may grow without bound
            raise ValueError("must declare no entities")

    parser.StartElementHandler, parser.StartDoctypeDeclHandler = begin, begin_doctype
    try:
        parser.Parse(content, True)
    except xml.parsers.expat.ExpatError as error:
        raise ValueError(f"must be well-formed SVG (line {error.lineno})") from None
    except (LookupError, UnicodeError):  # of the XML declaration. XML 1.0 §4.3.3
        raise ValueError("must be encoded as UTF-8: the encoding that it declares is not supported") from None
    if roots[0] != "http://www.w3.org/2000/svg svg":
        raise ValueError("must be a PNG, JPEG, WebP or SVG picture")


def picture_type(content: bytes) -> str:
    """Return the media type of a picture by its content; raise ValueError with a sentence if it is none of ours.

    PNG §5.2, JPEG B.1.1.3, RFC 9649 §2.4
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR":
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError("must be a PNG, JPEG, WebP or SVG picture")
    check_svg(content)
    return "image/svg+xml"


def describe_browser(user_agent: str, text: dict) -> str:
    """Return what a User-Agent means to people, such as "Chrome on Linux"; an unknown one as it is, shortened."""
    program, system = (
        next((name for mark, name in known if mark in user_agent), "") for known in (BROWSERS, SYSTEMS)
    )
    if program and system:
        return text["browser_on"].replace("{program}", program).replace("{system}", system)
    return program or user_agent[:40] or text["unknown_browser"]


def describe_age(seconds: int, at: int, text: dict) -> str:
    """Return how long ago the moment `at` is, such as "2 hours ago"; its date in UTC after 30 days."""
    if seconds < 60:
        return text["ago_now"]
    for unit, length, most in (("minutes", 60, 60), ("hours", 3600, 24), ("days", 86400, 31)):
        count = seconds // length
        if count < most:
            return text[f"ago_{unit}"]["one" if count == 1 else "other"].replace("{n}", str(count))
    return text["ago_date"].replace("{date}", datetime.fromtimestamp(at, UTC).date().isoformat())


def text_uri(content: str) -> str:
    """Return a data: URI of plain text. RFC 2397."""
    return "data:text/plain;charset=utf-8;base64," + b64encode(content.encode()).decode()


class Pages:
    """The files of the pages, each read once. Files in `pages-folder` override the bundled ones."""

    def __init__(self, options: Options):
        self.options = options
        self.templates: dict = {}

    @property
    def folders(self) -> list[str]:
        """The folders in which a file of the pages is looked for, in this order."""
        return [*([self.options.pages_folder] if self.options.pages_folder else []), str(PAGES)]

    def file(self, name: str) -> Path:
        custom = Path(self.options.pages_folder) / name if self.options.pages_folder else None
        return custom if custom and custom.is_file() else PAGES / name

    @functools.cached_property
    def texts(self) -> dict:
        """{language: {key: text}} of every language file; English fills in missing texts."""
        english = msgspec.json.decode((PAGES / "en.json").read_bytes())
        folders = [PAGES, *([Path(self.options.pages_folder)] if self.options.pages_folder else [])]
        return {
            path.stem.lower(): english | msgspec.json.decode(path.read_bytes())
            for folder in folders
            for path in sorted(folder.glob("*.json"))
        }

    def choose_language(self, accept_language: str, ui_locales="") -> str:
        """Return the language of a page: ui_locales, else Accept-Language, else English.

        OpenID Connect Core §3.1.2.1, RFC 9110 §12.5.4.
        """
        accepted = []
        for part in accept_language[:200].split(","):
            name, _, quality = part.strip().partition(";q=")
            with contextlib.suppress(ValueError):
                accepted.append((-float(quality or 1), name))
        preferred = [name for quality, name in sorted(accepted, key=lambda pair: pair[0]) if quality]
        for name in [*ui_locales.split(), *preferred]:
            for candidate in (name.lower(), name.lower().partition("-")[0]):
                if candidate in self.texts:
                    return candidate
        return "en"

    @functools.cached_property
    def tokens(self) -> bytes:
        """The style sheet that the login pages and the console begin with, after brand_style(): sizes and colours."""
        return self.file("tokens.css").read_bytes()

    @functools.cached_property
    def sheet(self) -> tuple[str, bytes]:
        """A hash of the style sheet of the pages without the brand, and its content."""
        content = self.tokens + self.file("pages.css").read_bytes()
        return hashlib.sha256(content).hexdigest()[:12], content

    def style_name(self, color: str) -> str:
        """Return the file name of the style sheet for a brand of this colour.

        The name says all that it is made of. So a page finds its sheet at a process that knows another brand already.
        """
        return f"pages.{self.sheet[0]}.{color[1:]}.css"

    def find_style(self, name: str) -> bytes | None:
        """Return the style sheet of this file name, or None."""
        found = re.fullmatch(r"pages\.([0-9a-f]{12})\.([0-9a-f]{6})\.css", name)
        if not found or found[1] != self.sheet[0]:
            return None
        return brand_style("#" + found[2]) + self.sheet[1]

    @property
    def style(self) -> tuple[str, bytes]:
        """The file name of the style sheet for the colour that the options say, and its content."""
        color = self.options.brand_color
        return self.style_name(color), brand_style(color) + self.sheet[1]

    @functools.cached_property
    def option_logo(self) -> tuple[bytes, str]:
        """The picture that the options say, and its media type by the extension; raises OSError."""
        kind = LOGO_TYPES.get(self.options.brand_logo.rpartition(".")[2].lower())
        return (Path(self.options.brand_logo).read_bytes(), f"image/{kind}") if kind else (b"", "")

    def picture(self, name: str) -> str:
        """Return a data: URI of the picture `name`.png, .svg, .jpg, .jpeg or .webp in `pages-folder`/logos, or "".

        Nothing is fetched from elsewhere, and no address of its own tells which pictures there are. RFC 2397
        """
        if not self.options.pages_folder:
            return ""
        for extension, kind in LOGO_TYPES.items():
            path = Path(self.options.pages_folder) / "logos" / f"{quote(name, safe=' ')}.{extension}"
            with contextlib.suppress(OSError):
                if path.stat().st_size <= PICTURE_SIZE:
                    return f"data:image/{kind};base64," + b64encode(path.read_bytes()).decode()
        return ""

    def template(self, name: str) -> bottle.SimpleTemplate:
        template = self.templates.get(name)
        if template is None:
            # What a template includes is found as the template is: the operator's own file first.
            template = self.templates[name] = bottle.SimpleTemplate(
                self.file(f"{name}.html").read_text("utf-8"), lookup=self.folders,
            )
        return template

    def render(self, name: str, **values) -> bytes:
        """Return a page in the common layout, encoded."""
        body = self.template(name).render(**values)
        return self.template("layout").render(body=body, name=name, **values).encode()


def draw_qr(uri: str) -> bytes:
    """Return a QR code as SVG, with error correction level Q."""
    import segno  # late: few requests need it

    image = io.BytesIO()
    segno.make(uri, error="q").save(image, kind="svg", scale=5, xmldecl=True)
    return image.getvalue()
