"""What a notebook depends on: the library's modules that it reaches, and the files of the models that it loads."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import vitreg_lib
from vitreg_lib import record
from vitreg_lib.models import zoo
from vitreg_lib.paths import CHECKPOINTS, ROOT

LIBRARY = ROOT / "vitreg_lib"
ALWAYS = ("record", "models.zoo")  # what every notebook reaches through `vr.start` and `run.load`


def inputs(item: str, parameters: dict) -> list[str]:
    """Files whose change makes the item's result stale, relative to the repository."""
    notebook = record.notebook(item)
    files = {notebook, *modules(notebook), *checkpoints(item, parameters)}
    return sorted(str(path.relative_to(ROOT)) for path in files)


def settings(item: str, parameters: dict) -> str:
    """The item's settings and its models' entries as text: what of the yaml files this item depends on."""
    entry = record.items().get(item, {})
    chosen = {**entry.get("mini", {}), **entry.get(parameters["profile"], {}), "title": entry.get("title")}
    names = _bases(item, parameters)
    return json.dumps([chosen, {name: zoo.entries().get(name) for name in names}], sort_keys=True)


def checkpoints(item: str, parameters: dict) -> list[Path]:
    """The shipped weights, text towers and telemetry of the models that the item loads."""
    names = _bases(item, parameters)
    names |= {e[k] for n in names if (e := zoo.entries().get(n)) for k in ("planted", "random") if k in e}
    suffixes = (".safetensors", ".text.safetensors", ".telemetry.parquet")
    files = [CHECKPOINTS / f"{n}{suffix}" for n in sorted(names) for suffix in suffixes]
    return [path for path in files if path.exists()]


def modules(notebook: Path) -> set[Path]:
    """The library's files that a notebook reaches: what it names as `vr.NAME` or imports, and all that those import."""
    cells = json.loads(notebook.read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    source = re.sub(r"^[%!].*", "", source, flags=re.MULTILINE)  # lines for IPython or the shell
    short = {**vitreg_lib._SHORT, **vitreg_lib._NESTED}
    waiting = [*ALWAYS, *_imports(source)]
    for name, below in re.findall(r"\bvr\.(\w+)(?:\.(\w+))?", source):
        waiting += [short.get(name, name), f"{name}.{below}"]
    found: set[Path] = {LIBRARY / "__init__.py"}
    while waiting:
        path = _file(waiting.pop())
        if path and path not in found:
            found.add(path)
            waiting += _imports(path.read_text(), path.relative_to(LIBRARY).parent.parts)
    return found


def _bases(item: str, parameters: dict) -> set[str]:
    entry = record.items().get(item, {})
    profile = {**entry.get("mini", {}), **entry.get(parameters["profile"], {})}
    named = " ".join(str(parameters.get(k) or v) for k, v in profile.items() if k not in ("images", "n_images"))
    return {re.sub(r"\+ttr\d+$", "", name) for name in named.replace(",", " ").split()}


def _file(module: str) -> Path | None:
    path = LIBRARY / module.replace(".", "/")
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


def _imports(source: str, package: tuple[str, ...] = ()) -> list[str]:
    """What a source imports of the library, at its top or inside functions, as names below vitreg_lib.

    `package` is where the source lies, for its relative imports.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["vitreg_lib", *package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name.removeprefix("vitreg_lib.") for name in names if name.startswith("vitreg_lib.")]
