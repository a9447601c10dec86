"""The order of the house: sections, references, state, routes."""

import ast
import builtins
import dis
import re
import types
from pathlib import Path

import mad
import microauthd as m
import pytest

ROOT = Path(m.__file__).parent
# From the ground up: a room may import those that stand before it, and no other.
ROOMS = (
    "appliance.base", "appliance.base.shared", "appliance.base.metrics", "appliance.base.clock", "appliance.base.files", "appliance.base.settings",
    "appliance.base.log", "appliance.base.headers", "appliance.base.peers", "appliance.base.wal",
    "appliance.base.database", "appliance.base.store", "appliance.base.hashing", "appliance.base.keys",
    "appliance.base.tls", "appliance.base.wire", "appliance.base.openapi", "appliance.base.objects",
    "appliance.base.pages", "appliance.base.console", "microauthd", "appliance.rings", "appliance.release",
    "appliance.figures",
    "appliance.backup", "appliance.authority", "appliance.upkeep", "appliance.status", "appliance.machine",
    "appliance.processes", "appliance.recovery", "appliance.upgrade", "appliance.oobe", "appliance.claim", "appliance.help",
    "appliance.service",
    "appliance.commands",
)


def path_of(room):
    path = ROOT / room.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


PROGRAM = {room: path_of(room).read_text("utf-8") for room in ROOMS}


def bound_by(node):
    """The module-level names a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}


def globals_of(code):
    """The names that a code object and those within it look up in the module, as the compiler sees it."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from globals_of(inner)


class Room:
    """One file of the program, as its text has it."""

    def __init__(self, source):
        self.source, self.tree = source, ast.parse(source)
        self.banners = [
            (match[1], source.count("\n", 0, match.start()) + 1)
            for match in re.finditer(r"^# == (.+?) =+$", source, re.M)
        ]
        self.sections = [name for name, _ in self.banners]
        imports = [node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
        # All but the docstring, the imports and `if __name__ == "__main__"`.
        self.statements = [
            node for node in self.tree.body if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr, ast.If))
        ]
        self.defined = {}
        for node in self.statements:
            for name in bound_by(node):
                self.defined.setdefault(name, node.lineno)

    def section_of(self, line):
        return max((number for number, (_, at) in enumerate(self.banners) if at <= line), default=-1)

    def globals_of(self, node):
        return globals_of(compile(ast.Module([node], []), "room", "exec"))


HOUSE = {room: Room(source) for room, source in PROGRAM.items()}
SERVER = HOUSE["microauthd"]


def imports_of(source):
    """The rooms that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ROOMS)
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & set(ROOMS)
            yield from whole or ({node.module} & set(ROOMS))


# How many lines a function may have, and who has more for which reason. How many ways lead through it, ruff counts.
MOST_LINES = 60
LONGER = {"on_headers_complete": "every refusal of a message's framing, in the order in which they are checked"}


class TestHouse:
    """Three floors, and every arrow runs down."""

    def test_every_file_is_a_room(self):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "appliance").rglob("*.py")}
        assert files == {path_of(room).relative_to(ROOT).as_posix() for room in ROOMS} - {"microauthd.py"} | {
            "appliance/__init__.py"  # the picture of the house, and nothing else
        }

    @pytest.mark.parametrize("room", ROOMS)
    def test_a_room_imports_only_what_stands_below(self, room):
        for other in imports_of(PROGRAM[room]):
            assert ROOMS.index(other) < ROOMS.index(room), f"{room} imports {other}"

    @pytest.mark.parametrize("room", [*ROOMS, "mad"])
    def test_a_function_fits_a_page(self, room):
        source = PROGRAM.get(room) or Path(mad.__file__).read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name not in LONGER:
                assert node.end_lineno - node.lineno < MOST_LINES, node.name

    def test_mad_stands_on_the_standard_library(self):
        assert not set(imports_of(Path(mad.__file__).read_text("utf-8")))

    def test_only_the_store_speaks_sql(self):
        speaks = r"\b(SELECT .+ FROM|INSERT INTO|UPDATE \w+\s+SET|DELETE FROM|CREATE TABLE)\b"
        for room in set(ROOMS) - {"appliance.base.store", "appliance.base.database"}:
            for node in ast.walk(ast.parse(PROGRAM[room])):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.search(speaks, node.value, re.S), (room, node.value)

    @pytest.mark.parametrize(
        "word, rooms",
        [
            ("os.fork", {"appliance.processes"}), ("sys.argv", {"appliance.commands"}),
            ("os.environ", {"appliance.commands", "appliance.processes", "appliance.oobe", "appliance.help"}),
            # sd_notify and the journal speak to systemd.
            ("socket.socket", {"appliance.base.wire", "appliance.processes", "appliance.base.log"}),
        ],
    )
    def test_what_only_some_rooms_may_touch(self, word, rooms):
        touching = {
            room
            for room, source in PROGRAM.items()
            for line in source.split("\n")
            if re.search(rf"\b{re.escape(word)}\b", line.partition("#")[0])
        }
        assert touching <= rooms

    @pytest.mark.parametrize("word", ["bottle.request", "bottle.response"])
    def test_only_http_touches_the_request_of_bottle(self, word):
        lines = {
            SERVER.section_of(number)
            for number, line in enumerate(SERVER.source.split("\n"), 1)
            if re.search(rf"\b{re.escape(word)}\b", line.partition("#")[0])
        } - {-1}
        assert {SERVER.sections[number] for number in lines} <= {"HTTP"}


class TestOrder:
    def test_the_contents_are_the_banners(self):
        contents = re.findall(
            r"^    ([A-Z][A-Za-z ]*?)  +\S", m.__doc__.partition("Contents\n")[2].partition("The life")[0], re.M
        )
        assert contents == SERVER.sections

    @pytest.mark.parametrize(
        "name, section", [(name, section) for name, room in HOUSE.items() for section in range(-1, len(room.sections))]
    )
    def test_a_section_uses_only_names_defined_above_its_end(self, name, section):
        room = HOUSE[name]
        for node in room.statements:
            if room.section_of(node.lineno) != section:
                continue
            for used in room.globals_of(node):
                if used in room.defined:
                    assert room.section_of(room.defined[used]) <= section, f"{name}, line {node.lineno} uses {used}"

    @pytest.mark.parametrize("room", [*ROOMS, "mad"])
    def test_a_name_is_defined_above_its_first_use(self, room):
        """Mutual recursion apart: there, each leads back to the other."""
        read = HOUSE.get(room) or Room(Path(mad.__file__).read_text("utf-8"))
        uses = {}
        for node in read.statements:
            for name in bound_by(node):
                uses.setdefault(name, set()).update(set(read.globals_of(node)) & set(read.defined))

        def leads(here, there):
            seen, ahead = set(), [here]
            while ahead:
                name = ahead.pop()
                if name == there:
                    return True
                if name not in seen:
                    seen.add(name)
                    ahead += uses.get(name, ())
            return False

        below = {
            (name, used)
            for name, others in uses.items()
            for used in others
            if read.defined[used] > read.defined[name] and not leads(used, name)
        }
        assert not below

    @pytest.mark.parametrize("name", ROOMS)
    def test_every_name_is_defined_somewhere(self, name):
        room = HOUSE[name]
        own = {"__name__", "__file__", "__doc__", "__module__", "__qualname__", "__annotations__"}
        for node in room.statements:
            inside = set()
            if isinstance(node, ast.ClassDef):  # a class body looks its own names up first
                inside = {
                    bound
                    for part in node.body
                    for bound in bound_by(part) | ({part.target.id} if isinstance(part, ast.AnnAssign) else set())
                }
            known = room.defined.keys() | room.imported | inside | own
            for used in room.globals_of(node):
                assert used in known or hasattr(builtins, used), f"{name}, line {node.lineno}: {used}"


class TestState:
    """No module-level state: threads share the Idp, tests build their own."""

    TABLES = {
        "FLAGS", "LOGO_TYPES", "ERRORS", "OPTION_NAMES", "GRANTS", "STATUS", "METHODS", "HTTP_REFUSALS", "STOPPING", "COMMANDS",
        "SECURITY", "USER_CLAIMS", "ACCOUNT_CHANGES", "AUTH", "ADMIN", "EXTRA_QUESTIONS", "ADVISED_RANGES", "PROPOSED",
    "CONDITIONS", "DEPENDENTS", "AUDIT_FILTERS", "SESSION_FILTERS", "URI_SWITCHES", "CONFUSABLES", "TYPES", "BY_NAME", "FIGURES",
    "HELD_BY_FEW", "HELD_BY_MANY", "HOLDERS",
    "RANGES", "OUTCOMES",
    }

    def mutable(self, room):
        for node in room.statements:
            value = getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
                value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
            ):
                yield from (target.id for target in getattr(node, "targets", None) or [node.target])

    @pytest.mark.parametrize("name", ROOMS)
    def test_what_can_change_is_a_declared_table(self, name):
        assert set(self.mutable(HOUSE[name])) <= self.TABLES

    @pytest.mark.parametrize("name", ROOMS)
    def test_no_function_rebinds_or_changes_a_name_of_the_module(self, name):
        room = HOUSE[name]
        changers = {
            "append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard",
        }
        for function in ast.walk(room.tree):
            if not isinstance(function, (ast.FunctionDef, ast.Lambda)):
                continue
            local = {inner.arg for inner in ast.walk(function) if isinstance(inner, ast.arg)} | {
                inner.id
                for inner in ast.walk(function)
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            }
            for inner in ast.walk(function):
                assert not isinstance(inner, ast.Global), f"line {inner.lineno}"
                target = None
                if isinstance(inner, (ast.Subscript, ast.Attribute)) and isinstance(inner.ctx, (ast.Store, ast.Del)):
                    target = inner.value
                if (
                    isinstance(inner, ast.Call)
                    and isinstance(inner.func, ast.Attribute)
                    and inner.func.attr in changers
                ):
                    target = inner.func.value
                if isinstance(target, ast.Name):
                    shared = target.id in room.defined or target.id in room.imported
                    assert not shared or target.id in local, f"{name}, line {inner.lineno} changes {target.id}"

    def test_what_is_remembered_for_ever_is_a_file_of_the_package(self):
        cached = {
            node.name
            for room in HOUSE.values()
            for node in room.tree.body
            if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(word) for word in node.decorator_list)
        }
        # And one statement for each class of a row: a constant of the program, which no request can change; and which
        # warnings about files a process has printed.
        assert cached <= {"common_passwords", "insert_statement", "warn"}


class TestRoutes:
    @pytest.mark.parametrize(
        "route", m.AUTH.routes + m.ADMIN.routes, ids=lambda route: f"{route.methods[0]} {route.paths[0]}"
    )
    def test_a_route_says_who_what_and_why(self, route):
        assert callable(route.guard) and route.spec.strip() and route.handler.__doc__.strip().endswith(".")

    def test_no_route_is_declared_twice(self):
        for routes in (m.AUTH, m.ADMIN):
            seen = [(method, path) for route in routes.routes for method in route.methods for path in route.paths]
            assert len(seen) == len(set(seen))

    def test_what_strangers_may_call_is_this_and_no_more(self):
        """A new public route is a decision: it is written down here."""
        public = {
            (routes.name, path)
            for routes in (m.AUTH, m.ADMIN)
            for route in routes.routes
            if route.guard is m.anyone
            for path in route.paths
        }
        assert public == {
            *(
                ("auth", path)
                for path in (
                    "/ping", "/version", "/health", "/health/ready", "/jwks.json", "/.well-known/jwks.json",
                    "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server", "/", "/<path:path>",
                    "/openapi.json", "/swagger/v1/swagger.json", "/swagger", "/swagger/rapidoc-min.js", "/authorize",
                    "/login", "/totp", "/login/enrol", "/login/codes", "/login/select", "/login/consent",
                    "/login/other", "/login/cancel",
                    "/pages/<name>", "/end-session", "/logout", "/account", "/login/password", "/login/totp",
                    "/login/finalize", "/auth-session/<jti>", "/invite", "/.well-known/microauthd/ca.pem",
                )
            ),
            *(
                ("admin", path)
                for path in (
                    "/ping", "/version", "/health", "/health/ready", "/token", "/openapi.json",
                    "/swagger/v1/swagger.json", "/swagger", "/swagger/rapidoc-min.js",
                    "/.well-known/microauthd/ca.pem", "/dashboard/session",
                    "/dashboard/", "/dashboard/preview", "/dashboard/files/<version>/<name:path>",
                    "/", "/dashboard", "/Dashboard", "/Login",
                )
            ),
        }

    def test_errors_have_a_status_a_sentence_and_a_source(self):
        for code, (status, sentence, source) in m.ERRORS.items():
            assert (
                re.fullmatch(r"[a-z_]+", code)
                and 400 <= status <= 599
                and re.match(r"(RFC \d+|OpenID Connect Core) §", source)
            )
            assert re.fullmatch(r"""[\x20\x21\x23-\x5b\x5d-\x7e]+\.""", sentence) and "'" not in sentence, (
                "RFC 6749 §5.2: what error_description may hold"
            )

    def test_every_code_that_is_raised_is_in_the_table(self):
        raised = {
            call.args[0].value
            for room in HOUSE.values()
            for call in ast.walk(room.tree)
            if isinstance(call, ast.Call)
            and getattr(call.func, "id", "") == "Problem"
            and call.args
            and isinstance(call.args[0], ast.Constant)
        }
        assert raised <= m.ERRORS.keys()


class TestVersions:
    def test_mad_and_the_server_are_one_release(self):
        assert mad.VERSION == m.VERSION
