"""What a notebook depends on: the library's modules that it reaches, and the files of the models that it loads."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import vitreg_lib
from vitreg_lib.base import CHECKPOINTS, ROOT
from vitreg_lib.model import zoo
from vitreg_lib.record import run as record

LIBRARY = ROOT / "vitreg_lib"
ALWAYS = ("record/run", "model/zoo")  # what every notebook reaches through `vr.start` and `run.load`


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
    names |= {e["random"] for n in names if "random" in (e := zoo.entries().get(n, {}))}
    suffixes = (".safetensors", ".text.safetensors", ".telemetry.parquet")
    files = [CHECKPOINTS / f"{n}{suffix}" for n in sorted(names) for suffix in suffixes]
    return [path for path in files if path.exists()]


def modules(notebook: Path) -> set[Path]:
    """The code that a notebook reaches: library modules named as `vr.NAME`, what it imports, and what that imports.

    A file beside the notebook counts as well as one of the library.
    """
    cells = json.loads(notebook.read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    source = re.sub(r"^[%!].*", "", source, flags=re.MULTILINE)  # lines for IPython or the shell
    waiting = [LIBRARY / f"{name}.py" for name in ALWAYS] + _reached(source, notebook.parent)
    files = {LIBRARY / "__init__.py"}
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += _reached(path.read_text(), path.parent)
    return files


def _bases(item: str, parameters: dict) -> set[str]:
    entry = record.items().get(item, {})
    profile = {**entry.get("mini", {}), **entry.get(parameters["profile"], {})}
    named = " ".join(str(parameters.get(k) or v) for k, v in profile.items() if k not in ("images", "n_images"))
    return {zoo.split(name)[0] for name in named.replace(",", " ").split()}


def _reached(source: str, folder: Path) -> list[Path]:
    """Files of this repository that a source in `folder` imports, at its top or inside functions, or names as `vr.`."""
    names = [vitreg_lib.SHORT.get(name, name).split(":")[0] for name in re.findall(r"\bvr\.(\w+)", source)]
    places = [(LIBRARY, name) for name in names]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            places += [(folder, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [folder, *folder.parents][node.level - 1] if node.level else folder
            places += [
                (base, ".".join(filter(None, [node.module, *part]))) for part in [(), *((a.name,) for a in node.names)]
            ]
    found = [_file(place, name) for place, name in places]
    return [path for path in found if path]


def _file(folder: Path, module: str) -> Path | None:
    """The file of a module: of the library by its full name, else below `folder`; None for what is installed."""
    if module.split(".")[0] == "vitreg_lib":
        folder = ROOT
    path = folder / module.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None
