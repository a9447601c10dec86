"""The pages of the manual on a terminal."""

import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

# == Manual ====================================================================
# The Markdown of the source tree, which the archive holds too, laid out as plain text.

MANUAL = Path(__file__).parent / "manual"
TITLE = re.compile(r"# (.+?) \N{EN DASH} (.+)")  # the first line of a page: its name, and what it holds
CONTINUED = re.compile(r"(?<=\S)\n {0,3}(?=[^\s#|*-])")  # where a paragraph goes on in the next line


def topics() -> dict[str, str]:
    """Return `{topic: what its page holds}`."""
    found = {}
    for path in MANUAL.glob("*.md"):
        with path.open(encoding="utf-8") as page:
            title = TITLE.fullmatch(page.readline().rstrip("\n"))
        found[path.stem] = title[2] if title else ""
    return dict(sorted(found.items()))


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def lay_out_row(row: str, width: int) -> list[str]:
    """Return a row of a table, its last cell below the others."""
    *cells, last = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1]))
    return [*wrap("  ".join(filter(None, cells)), width), *wrap(last, width, "    ", "    ")]


def lay_out_line(line: str, width: int) -> list[str]:
    if line.startswith("|"):
        return lay_out_row(line, width) if line.strip("|- ") else []
    if line.startswith("## "):
        return [line[3:].upper()]
    if line.startswith("#"):
        return [line.lstrip("# ")]
    if line.startswith("    "):  # code
        return [line]
    return wrap(line, width, rest="  " if line.startswith(("* ", "- ")) else "") or [""]


def lay_out(page: str, width: int) -> str:
    """Return a page of Markdown as plain text: paragraphs filled, tables as lists, links as their text."""
    page = re.sub(r"<!--.*?-->\n", "", page, flags=re.S)
    page = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", page)
    lines = []
    for number, part in enumerate(re.split(r"^```.*\n", page, flags=re.M)):
        if number % 2:  # between two fences
            lines += ["    " + line for line in part.splitlines()]
        else:
            for line in CONTINUED.sub(" ", part).splitlines():
                lines += lay_out_line(line, width)
    return "\n".join(lines) + "\n"


def write(text: str):
    """Write to standard output, whatever its encoding lacks, and although a reader such as head closes it early."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends


def show_topics():
    found = topics()
    width = max(map(len, found))
    lines = [f"  {topic:{width}}  {what_it_holds}" for topic, what_it_holds in found.items()]
    write("\n".join(["usage: microauthd help TOPIC", "", "topics:", *lines]) + "\n")


def show_page(topic: str):
    """Show a page of the manual, in a pager where standard output is a terminal."""
    text = lay_out((MANUAL / f"{topic}.md").read_text("utf-8"), min(100, shutil.get_terminal_size().columns))
    if sys.stdout.isatty():
        import pydoc  # 25 ms of imports, for this alone

        os.environ.setdefault("LESS", "FRX")  # less ends at once where a page fits on the screen
        pydoc.pager(text)
    else:
        write(text)
