"""Generate the tables in README.md and in the manual from the code, so that the two always agree.

usage: readme.py [--check]

It rewrites the pages. With --check it writes nothing, names the pages that are out of date, and exits with status 1 if
there are any. A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mad  # noqa: E402
import microauthd  # noqa: E402
from appliance.base.metrics import METRICS  # noqa: E402
from appliance.base.settings import OPTIONS  # noqa: E402
from appliance.commands import COMMANDS  # noqa: E402

# The name of a standard and its sections, such as `RFC 6749 §4.1 and §5.2`.
CITATION = re.compile(r"(RFC \d+|OpenID Connect(?: [A-Z][A-Za-z-]+)+) (§[\d.]+(?:(?:, | and )§[\d.]+)*)")


def escape_cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(escape_cell, row)) + " |" for row in rows])


def options_table():
    rows = []
    for option in OPTIONS:
        default = option.default
        text = (
            {-1: "auto", (): "", True: "true", False: "false"}.get(default, default)
            if not isinstance(default, int) or isinstance(default, bool) or default == -1
            else default
        )
        names = f"`{option.name}`" + "".join(f", `{alias}`" for alias in option.aliases)
        rows.append(
            (
                option.group, names, f"`{text}`" if text != "" else "",
                option.help + (" *Secret: file or environment only.*" if option.secret else ""),
            )
        )
    return markdown_table(("Group", "Name", "Default", "Meaning"), rows)


def routes_table(routes):
    """Return a function that returns the table of these Routes."""

    def render():
        rows = []
        for route in routes.routes:
            doc = route.handler.__doc__.strip().splitlines()[0]
            only = f" *Only with `{route.option.replace('_', '-')}`.*" if route.option else ""
            rows.append(
                (
                    " ".join(route.methods), ", ".join(f"`{path}`" for path in route.paths), guard_of(route),
                    route.spec, doc + only,
                )
            )
        return markdown_table(("Method", "Path", "Who", "Specification", "What it does"), rows)

    return render


def guard_of(route):
    """Return who may call the route."""
    name = getattr(route.guard, "__qualname__", "").split(".")[0]
    if hasattr(route.guard, "scope"):
        others = {"by_scraper": "`metrics-allow` or ", "by_scraper_or_admin": "administrator, `metrics-allow` or "}
        return f"{others.get(name, '')}scope `{route.guard.scope}`"
    return {
        "anyone": "anyone", "by_client_or_token": "client", "by_confidential_client": "confidential client",
        "by_bearer": "access token", "by_admin": "administrator",
        "by_console": "session at the console",
        "by_bearer_or_form": "access token, or a form of ours",
    }[name]


def errors_table():
    return markdown_table(
        ("Code", "Status", "What a client is told", "Defined in"),
        [(f"`{code}`", status, message, spec) for code, (status, message, spec) in microauthd.ERRORS.items()],
    )


def is_served(request):
    """Whether ADMIN has the route of a command's request; also True for a command without one."""
    method, _, path = request.partition(" ")
    pattern = re.sub(r"\{[^}]*\}", "<>", path.split(" ")[0])
    served = {
        (method, re.sub(r"<[^>]*>", "<>", path))
        for route in microauthd.ADMIN.routes
        for method in route.methods
        for path in route.paths
    }
    return not request or (method, pattern) in served


def mad_table():
    """Return the table of the commands of mad."""
    rows = [
        (f"`{usage}`", help_text)
        for usage, help_text, request in mad.describe_commands(mad.COMMANDS)
        if is_served(request)
    ]
    return markdown_table(("Command", "What it does"), rows)


def citations(text):
    """Return the (standard, section) pairs that a text names."""
    return {
        (name, section.strip("§."))
        for name, sections in CITATION.findall(" ".join(text.replace("#", " ").split()))
        for section in re.findall(r"§[\d.]+", sections)
    }


def cited_by(path, node_types):
    """Yield (name, citations) for each definition in a file that cites a standard.

    Comments inside it and decorators count too.
    """
    text = path.read_text("utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, node_types):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found = citations("\n".join(lines[first - 1 : node.end_lineno]))
            if found:
                yield node.name, found


def standards_table():
    """Return a table with a row for each section that the program cites.

    It names the functions that cite the section, and the tests that cite it or the section that contains it.
    """
    functions, tests = {}, {}
    for path in (ROOT / "microauthd.py", *sorted((ROOT / "appliance/base").glob("*.py"))):
        room = "" if path.stem == "microauthd" else f"{path.stem}."
        for name, found in cited_by(path, (ast.FunctionDef, ast.ClassDef)):
            for key in found:
                functions.setdefault(key, []).append(f"`{room}{name}`")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for name, found in cited_by(path, ast.ClassDef):
            for key in found:
                tests.setdefault(key, []).append(f"`{path.stem}` {name}")

    def tests_of(standard, section):
        while section and (standard, section) not in tests:
            section = section.rpartition(".")[0]
        return ", ".join(tests.get((standard, section), ()))

    def sort_key(key):
        standard, section = key
        return standard.startswith("OpenID"), standard, [int(part) for part in section.split(".")]

    rows = [
        (standard, f"§{section}", ", ".join(functions[standard, section]), tests_of(standard, section))
        for standard, section in sorted(functions, key=sort_key)
    ]
    return markdown_table(("Standard", "Section", "In", "Tests"), rows)


def microauthd_table():
    """Return the table of the commands of microauthd."""
    rows = [(f"`{command.title}`", command.summary) for command in COMMANDS.values()]
    return markdown_table(("Command", "What it does"), rows)


def metrics_table():
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help)
        for metric in METRICS
    ]
    return markdown_table(("Name", "Type", "Labels", "Meaning"), rows)


TABLES = {
    "options": options_table, "auth": routes_table(microauthd.AUTH), "admin": routes_table(microauthd.ADMIN),
    "errors": errors_table, "mad": mad_table, "standards": standards_table, "microauthd": microauthd_table,
    "metrics": metrics_table,
}


def fill(text):
    """Return the page with its tables generated anew."""
    def replace(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "appliance" / "manual").glob("*.md"))]


def main():
    """Return the exit status."""
    status = 0
    for page in pages():
        text = page.read_text("utf-8")
        filled = fill(text)
        if filled == text:
            continue
        if "--check" in sys.argv:
            name = page.relative_to(ROOT)
            print(f"{name}: its tables are not what the code says; run build/readme.py", file=sys.stderr)
            status = 1
        else:
            page.write_text(filled, "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
