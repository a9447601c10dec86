"""The order of the house: sections, references, routes."""

import ast
import re
from pathlib import Path

import mad
import microauthd as m
import pytest

SOURCE = Path(m.__file__).read_text("utf-8")
BANNERS = [(match[1], SOURCE.count("\n", 0, match.start()) + 1) for match in re.finditer(r"^# == (.+?) =+$", SOURCE, re.M)]


def section_of(line):
    return max((number for number, (_, at) in enumerate(BANNERS) if at <= line), default=-1)


class TestOrder:
    def test_the_contents_are_the_banners(self):
        contents = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", m.__doc__.partition("Contents\n")[2].partition("The life")[0], re.M)
        assert contents == [name for name, _ in BANNERS]

    def test_references_point_upwards(self):
        tree = ast.parse(SOURCE)
        defined = {}
        for node in tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            for name in names:
                defined.setdefault(name, section_of(node.lineno))
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            here = section_of(node.lineno)
            bound = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
            bound |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and inner.id in bound:
                    continue
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and inner.id in defined:
                    assert defined[inner.id] <= here, f"{node.name} in {BANNERS[here][0]} uses {inner.id} of {BANNERS[defined[inner.id]][0]}"

    def test_only_the_store_speaks_sql(self):
        store = [name for name, _ in BANNERS].index("Store")
        for node in ast.walk(ast.parse(SOURCE)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\b(SELECT .+ FROM|INSERT INTO|UPDATE \w+\s+SET|DELETE FROM|CREATE TABLE)\b", node.value, re.S):
                assert section_of(node.lineno) == store, node.value


class TestRoutes:
    @pytest.mark.parametrize("route", m.AUTH.routes + m.ADMIN.routes, ids=lambda route: f"{route.methods[0]} {route.paths[0]}")
    def test_a_route_says_who_what_and_why(self, route):
        assert route.guard and route.spec and route.handler.__doc__

    def test_no_route_is_declared_twice(self):
        for routes in (m.AUTH, m.ADMIN):
            seen = [(method, path) for route in routes.routes for method in route.methods for path in route.paths]
            assert len(seen) == len(set(seen))


class TestVersions:
    def test_mad_and_the_server_are_one_release(self):
        assert mad.VERSION == m.VERSION
