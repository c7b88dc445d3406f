"""`vitreg train`: its options, which are the fields of `TrainConfig`, and what it does.

The help of a recipe is its module's docstring and its own defaults, both read from the source, so that asking for help
needs no torch.
"""

from __future__ import annotations

import argparse
import ast
import functools
from dataclasses import fields, replace
from pathlib import Path

from ..base import ROOT, UserError, shown
from .config import MACHINE, TrainConfig

RECIPES = {  # what each learns from; its module is told apart by the name
    "deit3": "labels",
    "clip": "captions",
    "dinov2": "images alone: views of a scene, masked patches",
    "mae": "images alone: pixels of masked patches",
    "emergence": "an artificial task, for the study of how artifacts begin",
}
EXAMPLES = """examples:
  vitreg train deit3 --help                               what is special to a recipe, and all options
  vitreg train deit3 --registers 4 --out runs/deit3-reg4
  vitreg train --resume runs/deit3-reg4
  torchrun --nproc-per-node 8 -m vitreg_lib.cli train dinov2 --size b/16 --batch-size 1024

stopped by Ctrl-C, by SIGTERM, or killed: --resume goes on, and ends with the same weights"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give `vitreg train` its recipes and options."""
    command.usage, command.epilog = "vitreg train RECIPE [options]\n       vitreg train --resume DIR", EXAMPLES
    command.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, by its own configuration")
    _add_device(command)
    _add_group(command, "machine", {})
    recipes = command.add_subparsers(dest="recipe", title="recipes", metavar="RECIPE", prog=command.prog)
    for name, learns in RECIPES.items():
        teaching, defaults = _source(name)
        recipe = recipes.add_parser(
            name,
            help=learns,
            usage=f"vitreg train {name} [options]",
            description=teaching,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        recipe.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        recipe.add_argument(
            "--out", metavar="DIR", help="the run's folder (default: runs/RECIPE-SIZE-regREGISTERS-seedSEED)"
        )
        _add_device(recipe)
        for group in dict.fromkeys(f.metadata["group"] for f in fields(TrainConfig)):
            if group not in RECIPES or group == name:
                _add_group(recipe, group, defaults)


def run(chosen: argparse.Namespace) -> None:
    """Train, or go on with a run; prints the result. Under torchrun this process takes its part."""
    import json
    import os

    import torch

    from . import loop, parallel, state

    given = {f.name: getattr(chosen, f.name) for f in fields(TrainConfig) if f.name in vars(chosen)}
    name = given.pop("recipe")
    if chosen.resume:
        folder = Path(chosen.resume)
        if name:
            raise UserError(f"--resume goes on with the run's own configuration: leave {name} out")
        config = replace(state.read_config(folder), **{k: v for k, v in given.items() if k in MACHINE})
        recipe = loop.recipe_of(config)
    elif name:
        config, recipe = loop.configure(name, **given)
        default = f"{name}-{config.size.replace('/', '-')}-reg{config.registers}-seed{config.seed}"
        folder = Path(chosen.out or ROOT / "runs" / default)
    else:
        raise UserError(f"name what to train ({', '.join(RECIPES)}), or --resume DIR; see vitreg train --help")
    device = getattr(chosen, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = loop.train(config, recipe, folder, parallel.start(device))
        if parallel.rank() == 0:
            print(json.dumps(result, indent=1))
            print(f"weights: {shown(folder / 'model.safetensors')}")
    finally:
        if "LOCAL_RANK" in os.environ:
            parallel.stop()


def _add_device(command) -> None:
    command.add_argument("--device", default=argparse.SUPPRESS, help="cpu, cuda … (default: cuda where there is one)")


def _add_group(command, name: str, defaults: dict) -> None:
    group = command.add_argument_group(name if name != "machine" else "machine (may change when a run is resumed)")
    for field in fields(TrainConfig):
        if field.metadata["group"] != name or field.name == "recipe":
            continue
        default = defaults.get(field.name, field.default)
        told = "" if default == "" else f" (default: {default})"
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        options = {"help": field.metadata["help"].replace("%", "%%") + told, "default": argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(flag, type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind], **options)


@functools.cache
def _source(recipe: str) -> tuple[str, dict]:
    """A recipe's docstring and its DEFAULTS, without importing it."""
    tree = ast.parse((Path(__file__).parent / "recipes" / f"{recipe}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DEFAULTS":
            return ast.get_docstring(tree), ast.literal_eval(node.value)
    return ast.get_docstring(tree), {}
