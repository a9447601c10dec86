"""Fill the tables of README.md and of the manual from the code, so that they cannot drift.

Run without arguments it rewrites the pages; with --check it names those it would change
(exit status 1). A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mad  # noqa: E402
import microauthd  # noqa: E402
from appliance.base.settings import OPTIONS  # noqa: E402
from appliance.commands import COMMANDS  # noqa: E402


# A standard by its name, then its sections: `RFC 6749 §4.1 and §5.2`.
CITATION = re.compile(r"(RFC \d+|OpenID Connect(?: [A-Z][A-Za-z-]+)+) (§[\d.]+(?:(?:, | and )§[\d.]+)*)")


def cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def options():
    rows = []
    for option in OPTIONS:
        default = option.default
        word = (
            {-1: "auto", (): "", True: "true", False: "false"}.get(default, default)
            if not isinstance(default, int) or isinstance(default, bool) or default == -1
            else default
        )
        names = f"`{option.name}`" + "".join(f", `{alias}`" for alias in option.aliases)
        rows.append(
            (
                option.group, names, f"`{word}`" if word != "" else "",
                option.help + (" *Secret: file or environment only.*" if option.secret else ""),
            )
        )
    return table(("Group", "Name", "Default", "Meaning"), rows)


def routes(routes):
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
        return table(("Method", "Path", "Who", "Specification", "What it does"), rows)

    return render


def guard_of(route):
    name = getattr(route.guard, "__qualname__", "").split(".")[0]
    if name == "by_scope":
        return f"scope `{route.guard.scope}`"
    return {
        "anyone": "anyone", "by_client": "client", "by_confidential_client": "confidential client",
        "by_bearer": "access token", "by_admin": "administrator",
        "by_bearer_or_form": "access token, or a form of ours",
    }[name]


def errors():
    return table(
        ("Code", "Status", "What a client is told", "Defined in"),
        [(f"`{code}`", status, told, spec) for code, (status, told, spec) in microauthd.ERRORS.items()],
    )


def is_served(request):
    """Whether ADMIN has the route a command asks for; a command without one works by itself or by a login."""
    method, _, path = request.partition(" ")
    wanted = re.sub(r"\{[^}]*\}", "<>", path.split(" ")[0])
    served = {
        (method, re.sub(r"<[^>]*>", "<>", path))
        for route in microauthd.ADMIN.routes
        for method in route.methods
        for path in route.paths
    }
    return not request or (method, wanted) in served


def commands():
    rows = [(usage, told) for usage, told, request in mad.describe_commands(mad.COMMANDS) if is_served(request)]
    return table(("Command", "What it does"), [(f"`{usage}`", told) for usage, told in rows])


def citations(text):
    """Return the (standard, section) pairs that a text names."""
    return {
        (name, section.strip("§."))
        for name, sections in CITATION.findall(" ".join(text.replace("#", " ").split()))
        for section in re.findall(r"§[\d.]+", sections)
    }


def citing(path, kinds):
    """Yield (name, citations) for each definition of a file that cites a standard, comments and decorators included."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, kinds):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found = citations("\n".join(lines[first - 1 : node.end_lineno]))
            if found:
                yield node.name, found


def standards():
    """A row for each section the program cites: what keeps it, and the tests that cite it or the section around it."""
    functions, tests = {}, {}
    for path in (ROOT / "microauthd.py", *sorted((ROOT / "appliance/base").glob("*.py"))):
        room = "" if path.stem == "microauthd" else f"{path.stem}."
        for name, found in citing(path, (ast.FunctionDef, ast.ClassDef)):
            for key in found:
                functions.setdefault(key, []).append(f"`{room}{name}`")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for name, found in citing(path, ast.ClassDef):
            for key in found:
                tests.setdefault(key, []).append(f"`{path.stem}` {name}")

    def tested(standard, section):
        while section and (standard, section) not in tests:
            section = section.rpartition(".")[0]
        return ", ".join(tests.get((standard, section), ()))

    def order(key):
        standard, section = key
        return standard.startswith("OpenID"), standard, [int(part) for part in section.split(".")]

    rows = [(*key, ", ".join(functions[key]), tested(*key)) for key in sorted(functions, key=order)]
    return table(("Standard", "Section", "In", "Tests"), [(a, f"§{b}", c, d) for a, b, c, d in rows])


def server_commands():
    """The commands of microauthd, as its --help has them."""
    rows = [(f"`{command.title}`", command.summary) for command in COMMANDS.values()]
    return table(("Command", "What it does"), rows)


TABLES = {
    "options": options, "auth": routes(microauthd.AUTH), "admin": routes(microauthd.ADMIN),
    "errors": errors, "mad": commands, "standards": standards, "microauthd": server_commands,
}


def fill(text):
    def replace(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "appliance" / "manual").glob("*.md"))]


def main():
    stale = 0
    for page in pages():
        text = page.read_text("utf-8")
        filled = fill(text)
        if filled == text:
            continue
        if "--check" in sys.argv:
            name = page.relative_to(ROOT)
            print(f"{name}: its tables are not what the code says; run build/readme.py", file=sys.stderr)
            stale = 1
        else:
            page.write_text(filled, "utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
