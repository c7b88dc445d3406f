"""The library's layout: folders import one way, no circles, few names at the root, and what can be used is listed."""

from __future__ import annotations

import ast

import pytest

from vitreg_lib.base import ROOT

LIBRARY = ROOT / "vitreg_lib"
# each may import what stands before it
ORDER = ["base", "hooks", "measure", "data", "model", "probes", "train", "plots", "widgets", "record", "cli"]
FILES = sorted(LIBRARY.rglob("*.py"))


def imports(path) -> list[tuple[str, ...]]:
    """What a file of the library imports of it, at its top or inside functions, as parts below vitreg_lib."""
    package, found = path.relative_to(LIBRARY).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
        found += [(*base, alias.name) for alias in node.names]
    return found


def is_part(parts: tuple[str, ...]) -> bool:
    place = LIBRARY.joinpath(*parts)
    return place.with_suffix(".py").exists() or place.is_dir()


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != LIBRARY or f.stem != "__init__"], ids=str)
def test_imports_run_one_way(path):
    own = path.relative_to(LIBRARY).with_suffix("").parts
    for parts in imports(path):
        assert ORDER.index(parts[0]) <= ORDER.index(own[0]), f"{'.'.join(own)} imports {'.'.join(parts)}"
        assert parts[:3] != ("train", "recipes", "registers"), "a recipe is found by its name, never imported"


def test_no_circle():
    modules = {f.relative_to(LIBRARY).with_suffix("").parts for f in FILES}
    graph = {}
    for path in FILES:
        own = path.relative_to(LIBRARY).with_suffix("").parts
        named = {parts if parts in modules else parts[:-1] for parts in imports(path)}
        graph[own] = {n if n in modules else (*n, "__init__") for n in named} & modules - {own}
    while leaves := {m for m, needs in graph.items() if not needs & graph.keys()}:
        graph = {m: needs for m, needs in graph.items() if m not in leaves}
    assert not graph, f"files import each other in a circle: {sorted('.'.join(m) for m in graph)}"


def test_few_names_at_the_root():
    assert {p.stem for p in LIBRARY.iterdir() if p.name != "__pycache__"} == {*ORDER, "__init__"}


def test_what_can_be_used_is_listed():
    import vitreg_lib as vr

    assert {"start", "load", "capture", "outliers", "plots", "widgets"} <= set(dir(vr))
    for name in dir(vr):
        assert getattr(vr, name) is not None, name


def test_the_picture_of_the_architecture_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    import architecture

    assert {("hooks", "base"), ("model", "hooks"), ("cli", "record")} & set(architecture.edges())
    drawn = architecture.stated(architecture.PICTURE.read_text())
    assert drawn == architecture.edges(), "python workflow/architecture.py draws it anew"
    assert architecture.JOBS.keys() == architecture.PLACES.keys() == {*ORDER, "notebooks", "workflow"}
