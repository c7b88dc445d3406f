"""Where a recipe is, and what its file says without being run, so that `vitreg train --help` needs no torch.

A recipe is a Python file: `registers` here, the others beside their notebooks, or one of the user's own. `train.loop`
lists its functions. These literals at its top are read from the source:

    LEARNS_FROM = "captions"                     for the list of `vitreg train --help`
    DEFAULTS = {"steps": 800}                    other defaults of `TrainConfig`
    OPTIONS = {"embed_dim": (64, "help")}        options of its own: name, default, help
    WITH_DATA = "deit3_folder"                   the file beside it that is run instead where --data is given
"""

import ast
import functools
import importlib.util
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from types import ModuleType

from ...base import IS_REPOSITORY, NOTEBOOKS, ROOT, UserError, unknown
from ..config import TrainConfig, option

LITERALS = {"LEARNS_FROM": "", "DEFAULTS": {}, "OPTIONS": {}, "WITH_DATA": ""}  # and what they are where left out
HERE = Path(__file__).parent
_imported: dict[Path, str] = {}  # the text of each file when it was imported


@functools.cache
def listed() -> dict[str, Path]:
    """The recipes that have a name: {name: file}; without the repository `registers` alone."""
    folders = (HERE, NOTEBOOKS / "train", NOTEBOOKS / "beyond")
    paths = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    return {name: path for name, path in sorted(paths.items()) if "\nLEARNS_FROM = " in path.read_text()}


def find(recipe: str) -> Path:
    """The file of a recipe, by its name or its path. Raises UserError where there is none."""
    if recipe.endswith(".py"):
        for path in (Path(recipe).expanduser().resolve(), ROOT / recipe):
            if path.is_file():
                return path
        raise UserError(f"no recipe {recipe!r}: there is no such file")
    if recipe not in listed():
        elsewhere = "" if IS_REPOSITORY else "; deit3 and the others of the notebooks come with the repository"
        raise unknown("recipe", recipe, listed(), f"or the path of a file of your own, ending in .py{elsewhere}")
    return listed()[recipe]


def literals(path: Path) -> dict:
    """The literals of a recipe's file by name, as listed above, and its docstring as `__doc__`."""
    return _literals(path.read_text())


@functools.cache
def _literals(text: str) -> dict:
    tree = ast.parse(text)
    values = {"__doc__": ast.get_docstring(tree) or "", **LITERALS}
    for node in tree.body:
        if isinstance(node, ast.Assign) and (name := getattr(node.targets[0], "id", "")) in LITERALS:
            values[name] = ast.literal_eval(node.value)
    return values


def config_class(recipe: str, data: str = "") -> type[TrainConfig]:
    """`TrainConfig` with a recipe's own options and its defaults, where it learns from the folder `data` or from none.

    A field `recipe` holds the recipe's name or the path of its file, from the repository's root where it is inside.
    """
    path = find(recipe)
    place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    texts = path.read_text(), _file(path, data).read_text()
    return _config_class(recipe if recipe in listed() else str(place), path.stem, *texts)


@functools.cache
def _config_class(recipe: str, group: str, text: str, text_with_data: str) -> type[TrainConfig]:
    changed = _literals(text_with_data)["DEFAULTS"] | {"recipe": recipe}
    own = [
        (f.name, f.type, field(default=changed[f.name], metadata=f.metadata))
        for f in fields(TrainConfig)
        if f.name in changed
    ]
    for name, (value, help) in _literals(text)["OPTIONS"].items():
        own.append((name, type(value), option(value, help, group)))
    return make_dataclass("TrainConfig", own, bases=(TrainConfig,), frozen=True)


def load(recipe: str, data: str = "") -> ModuleType:
    """The module of a recipe, imported again where its file has changed; what it imports itself is not.

    Its folder joins Python's path, so that it finds the files beside it, and worker processes find it; so does
    notebooks/train, so that recipes can be built on those there.
    """
    path = _file(find(recipe), data)
    if path.parent == HERE:
        return importlib.import_module(f"{__name__}.{path.stem}")
    imported = getattr(sys.modules.get(path.stem), "__file__", path)
    if Path(imported or "").resolve() != path:
        raise UserError(f"{path.name}: another module of that name is imported already; give the recipe another name")
    sys.path[:0] = [folder for folder in map(str, (path.parent, NOTEBOOKS / "train")) if folder not in sys.path]
    text = path.read_text()
    if _imported.get(path, text) != text:
        sys.modules.pop(path.stem, None)
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)  # it tells whole seconds apart only
    _imported[path] = text
    return importlib.import_module(path.stem)


def _file(path: Path, data: str) -> Path:
    other = literals(path)["WITH_DATA"] if data else ""
    return path.with_name(f"{other}.py") if other else path
