"""The pages for people: the auto-escaped templates of appliance/pages, their texts and their style sheet."""

import contextlib
import functools
import hashlib
import io
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
        """The style sheet that the login pages and the console begin with: colours, sizes, spaces, and the brand."""
        brand = self.options.brand_color
        light, dark = brand_edge(brand, "#000000", LIGHT_SURFACES), brand_edge(brand, "#ffffff", DARK_SURFACES)
        content = (
            f":root {{ --brand: {brand}; --on-brand: {on_brand(brand)}; --brand-edge: {light}; }}\n"
            f"@media (prefers-color-scheme: dark) {{ :root {{ --brand-edge: {dark}; }} }}\n"
        )
        return content.encode() + self.file("tokens.css").read_bytes()

    @functools.cached_property
    def style(self) -> tuple[str, bytes]:
        """The file name of the style sheet, which contains a hash of it, and its content."""
        content = self.tokens + self.file("pages.css").read_bytes()
        return f"pages.{hashlib.sha256(content).hexdigest()[:12]}.css", content

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
            template = self.templates[name] = bottle.SimpleTemplate(self.file(f"{name}.html").read_text("utf-8"))
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
