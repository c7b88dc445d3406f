"""What a notebook depends on: the modules that it imports directly or indirectly, and the files of its models."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import yaml

import vitreg_lib
from vitreg_lib.base import CHECKPOINTS, DATA, ROOT
from vitreg_lib.model import names as model_names
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts
from vitreg_lib.train import recipes

LIBRARY = ROOT / "vitreg_lib"
ALWAYS = ("record/run", "model/zoo")  # every notebook uses them through `vr.start` and `run.load`


def inputs(item: str, parameters: dict) -> list[str]:
    """Files whose change makes the item's result stale, relative to the repository."""
    notebook = record.notebook(item)
    files = {notebook, *modules(notebook), *checkpoints(item, parameters)}
    return sorted(str(path.relative_to(ROOT)) for path in files)


def settings(item: str, parameters: dict) -> str:
    """The entries of yaml and csv files on which the item depends, as text: its settings, its models and data sets, and
    the paper's claims that its code names."""
    entry = record.items().get(item, {})
    chosen = {**entry.get("mini", {}), **entry.get(parameters["profile"], {}), "title": entry.get("title")}
    loaded = {name: model_names.entries().get(name) for name in models(item, parameters)}
    notebook = record.notebook(item)
    code = _source(notebook) + "".join(p.read_text() for p in modules(notebook) if p.parent == notebook.parent)
    claims = {name: verdicts.reported_claims().get(name) for name in re.findall(r"\bC\d{3}\b", code)}
    return json.dumps([chosen, loaded, data_sets(item, parameters), claims], sort_keys=True)


def data_sets(item: str, parameters: dict) -> dict[str, dict]:
    """The entries of data/datasets.yaml that the item's settings or parameters name, by name."""
    entry = record.items().get(item, {})
    settings = {**entry.get("mini", {}), **entry.get(parameters["profile"], {})}
    words = " ".join(str(value) for value in [*settings.values(), *parameters.values()]).split()
    known = _data_sets()
    return {word: known[word] for word in words if word in known}


@functools.cache
def _data_sets() -> dict[str, dict]:
    return yaml.safe_load((DATA / "datasets.yaml").read_text())


def checkpoints(item: str, parameters: dict) -> list[Path]:
    """The weights, text towers and telemetry in data/checkpoints of the models that the item loads."""
    names = models(item, parameters)
    names |= {e["random"] for n in names if "random" in (e := model_names.entries().get(n, {}))}
    suffixes = (".safetensors", ".text.safetensors", ".telemetry.parquet")
    files = [CHECKPOINTS / f"{n}{suffix}" for n in sorted(names) for suffix in suffixes]
    return [path for path in files if path.exists()]


def modules(notebook: Path) -> set[Path]:
    """The files that a notebook imports, directly or indirectly, and library modules that it names as `vr.NAME`.

    They are files of the library and files beside the notebook.
    """
    source = _source(notebook)
    waiting = [LIBRARY / f"{name}.py" for name in ALWAYS] + _reached(source, notebook.parent)
    files = {LIBRARY / "__init__.py"}
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += _reached(path.read_text(), path.parent)
    return files


@functools.cache
def _source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"^[%!].*", "", source, flags=re.MULTILINE)  # lines for IPython or the shell


def models(item: str, parameters: dict) -> set[str]:
    """Names of the models that an item loads, without suffixes such as +ttr4."""
    entry = record.items().get(item, {})
    profile = {**entry.get("mini", {}), **entry.get(parameters["profile"], {})}
    named = " ".join(str(parameters.get(k) or v) for k, v in profile.items() if k not in ("images", "n_images"))
    return {model_names.split(name)[0] for name in named.replace(",", " ").split()}


@functools.cache
def _reached(source: str, folder: Path) -> list[Path]:
    """Files of this repository that a source in `folder` uses: it imports them, or names them as `vr.NAME`.

    Imports inside functions and the recipes that it trains with are included. For a package whose __init__.py only
    imports names, the result has the modules that define the used names.
    """
    files = [recipes.find(name) for name in re.findall(r'\brecipe="(\w+)"', source)]
    for name, inside in re.findall(r"\bvr\.(\w+)(?:\.(\w+))?", source):
        file = _file(LIBRARY, vitreg_lib.SHORT.get(name, name).split(":")[0])
        files.append(_collected(file, inside) or file)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            files += [_file(folder, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [folder, *folder.parents][node.level - 1] if node.level else folder
            package = _file(base, node.module or "")
            files.append(None if package and package.stem == "__init__" else package)
            for alias in node.names:
                file = _file(base, ".".join(filter(None, [node.module, alias.name]))) or _collected(package, alias.name)
                used = {_collected(file, inside) for inside in re.findall(rf"\b{alias.name}\.(\w+)", source)}
                files += used - {None} or [file or package]
    return [path for path in files if path]


def _collected(package: Path | None, name: str) -> Path | None:
    """The module from which a package's __init__.py imports a name; None if it does not."""
    if package is None or package.stem != "__init__":
        return None
    for node in ast.parse(package.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            return _file(package.parent, node.module)
    return None


def _file(folder: Path, module: str) -> Path | None:
    """The file of a module, in the library (by its full name) or below `folder`; None for an installed package."""
    if module.split(".")[0] == "vitreg_lib":
        folder = ROOT
    path = folder / module.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None
