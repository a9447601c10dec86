"""The pages for people: the auto-escaped templates of appliance/pages, their texts and their style sheet."""

import contextlib
import functools
import hashlib
import io
from pathlib import Path

import bottle
import msgspec

from appliance.base.settings import Options

PAGES = Path(__file__).parents[1] / "pages"
LOGO_TYPES = {"png": "png", "svg": "svg+xml", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}  # by the file's extension


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
    def style(self) -> tuple[str, bytes]:
        """The file name of the style sheet, which contains a hash of it, and its content."""
        brand = self.options.brand_color
        channels = (int(brand[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (
            channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels
        )
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        # Black or white, whichever has the higher contrast ratio. WCAG 2.2 §1.4.3
        on_brand = "#ffffff" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"
        content = f":root {{ --brand: {brand}; --on-brand: {on_brand}; }}\n".encode()
        content += self.file("pages.css").read_bytes()
        return f"pages.{hashlib.sha256(content).hexdigest()[:12]}.css", content

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
