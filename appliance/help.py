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


# == Pages for man =============================================================
# The same Markdown as roff. man(7), groff_man(7)


ROFF = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga"})


def roff_text(text: str) -> str:
    """Return a line of Markdown as roff: code and bold in bold, links as their text."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    parts = []
    for number, part in enumerate(text.split("`")):
        part = part.replace("\\|", "|") if number % 2 else re.sub(r"\\([|*_])", r"\1", part)
        part = part.translate(ROFF)
        if number % 2:
            part = f"\\fB{part}\\fR"
        else:
            part = re.sub(r"\*\*(.+?)\*\*", r"\\fB\1\\fR", part)
            part = re.sub(r"(?<!\w)\*(\S.*?)\*(?!\w)", r"\\fI\1\\fR", part)
        parts.append(part)
    line = "".join(parts)
    return "\\&" + line if line[:1] in (".", "\\") and not line.startswith("\\f") else line


def roff_line(line: str) -> list[str]:
    if line.startswith("|"):
        if not line.strip("|- "):
            return []
        *cells, last = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1]))
        return [".TP", roff_text("  ".join(filter(None, cells))) or "\\&", roff_text(last) or "\\&"]
    if line.startswith("## "):
        return [".SH " + roff_text(line[3:].upper())]
    if line.startswith("#"):
        return [".SS " + roff_text(line.lstrip("# "))]
    if line.startswith(("* ", "- ")):
        return [".IP \\(bu 2", roff_text(line[2:])]
    if line.startswith("    "):
        return [".EX", "\\&" + line.replace("\\", "\\e").replace("-", "\\-"), ".EE"]
    return [roff_text(line)] if line.strip() else [".PP"]


def manual_page(topic: str, section: int) -> str:
    """Return a page of the manual for man(1)."""
    page = (MANUAL / f"{topic}.md").read_text("utf-8")
    page = re.sub(r"<!--.*?-->\n", "", page, flags=re.S)
    page = re.sub(r"^\|.*\|\n(?=\|[ |-]+\|$)", "", page, flags=re.M)  # the heads of tables
    first, _, page = page.partition("\n")
    title = TITLE.fullmatch(first)
    told = roff_text(title[2] if title else topic)
    lines = [f'.TH {topic.upper()} {section} "" microauthd', ".SH NAME", f"{topic} \\- {told}", ".SH DESCRIPTION"]
    for number, part in enumerate(re.split(r"^```.*\n", page, flags=re.M)):
        if number % 2:  # between two fences
            code = ["\\&" + line.replace("\\", "\\e").replace("-", "\\-") for line in part.splitlines()]
            lines += [".PP", ".EX", *code, ".EE", ".PP"]
        else:
            for line in CONTINUED.sub(" ", part).splitlines():
                lines += roff_line(line)
    text = "\n".join(lines) + "\n"
    text = text.replace(".EE\n.EX\n", "")
    return re.sub(r"[^\n -~]", lambda found: f"\\[u{ord(found[0]):04X}]", text)  # whatever the locale is


# == Completion ================================================================


def completion_script(shell: str, commands: dict[str, list[str]]) -> str:
    """Return the script that completes the commands of microauthd and the flags of each: {command: its flags}."""
    cases = {"": [*commands, "--help", "--version"], **commands}
    if shell == "bash":
        lines = [f"    '{name}') words='{' '.join(words)}' ;;" for name, words in cases.items()]
        return "\n".join([
            "# completion of microauthd for bash", "_microauthd() {", "  local words= start=",
            "  [ \"$COMP_CWORD\" -gt 1 ] && start=${COMP_WORDS[1]}", "  case \"$start\" in", *lines, "  esac",
            "  COMPREPLY=($(compgen -W \"$words\" -- \"${COMP_WORDS[COMP_CWORD]}\"))", "}",
            "complete -o default -F _microauthd microauthd",
        ])  # fmt: skip
    if shell == "zsh":
        lines = [f"    '{name}') found=({' '.join(words)}) ;;" for name, words in cases.items()]
        return "\n".join([
            "#compdef microauthd", "_microauthd() {", "  local start=", "  local -a found",
            "  (( CURRENT > 2 )) && start=$words[2]", "  case \"$start\" in", *lines, "  esac",
            "  compadd -- $found || _files", "}", "_microauthd \"$@\"",
        ])  # fmt: skip
    lines = ["# completion of microauthd for fish", "complete -c microauthd -f"]
    lines.append(f"complete -c microauthd -n __fish_use_subcommand -a '{' '.join(commands)}'")
    for name, words in commands.items():
        lines += [
            f"complete -c microauthd -n '__fish_seen_subcommand_from {name}' -l {word[2:]}"
            for word in words if word.startswith("--")
        ]  # fmt: skip
    return "\n".join(lines)
