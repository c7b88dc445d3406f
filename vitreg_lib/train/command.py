"""`vitreg train`: the command and its options, which are the fields of `TrainConfig`.

The help of a recipe is its module's docstring and its own defaults, both read from the source, so that --help needs no
torch.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from ..base import ROOT, UserError, local_rank, shown
from .config import TrainConfig

RECIPES = {  # what each learns from; also the name of its module
    "deit3": "labels",
    "clip": "captions",
    "dinov2": "images alone: views of a scene, masked patches",
    "mae": "images alone: pixels of masked patches",
    "lejepa": "images alone: views of a scene, without a teacher",
    "registers": "unlabelled photos: registers into a model that came without",
    "emergence": "an artificial task, for the study of how artifacts begin",
}
EXAMPLES = """\b
vitreg train deit3 --help                      what is special to a recipe, and all options
vitreg train deit3 --registers 4 --out runs/deit3-reg4
vitreg train --resume runs/deit3-reg4
torchrun --nproc-per-node 8 -m vitreg_lib.cli train dinov2 --size b/16 --batch-size 1024

\b
Stopped by Ctrl-C, by SIGTERM, or killed: --resume goes on, and ends with the same weights."""
app = typer.Typer(help="Train a ViT; a run that was stopped or killed goes on as if it had not been.", epilog=EXAMPLES)


def train(recipe: str | None, resume: str | None = None, out: str | None = None, device: str | None = None, **options):
    """Train or resume a run, and print the result. Under torchrun this process computes its part."""
    import json

    import torch

    from ..model.mend import NothingToMend
    from . import loop, parallel, state

    given = {name: value for name, value in options.items() if value is not None}
    if resume:
        folder = Path(resume)
        config = replace(state.read_config(folder), **given)
        module = loop.recipe_of(config)
    else:
        config, module = loop.configure(recipe, **given)
        what = (config.model or config.size).replace("/", "-").replace(":", "-")
        default = f"{recipe}-{what}-reg{config.registers}-seed{config.seed}"
        folder = Path(out or ROOT / "runs" / default)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = loop.train(config, module, folder, parallel.start(device))
        if parallel.rank() == 0:
            print(json.dumps(result, indent=1))
            print(f"weights: {shown(folder / 'model.safetensors')}")
    except NothingToMend as reason:  # a recipe for a phenomenon that this model does not show
        print(reason)
    finally:
        if local_rank() is not None:
            parallel.stop()


def _resume(context: typer.Context, resume: str | None, **options):
    if context.invoked_subcommand and (resume or any(value is not None for value in options.values())):
        raise UserError(
            f"--resume goes on with the run's own configuration: leave {context.invoked_subcommand} out"
            if resume
            else f"write options after the recipe: vitreg train {context.invoked_subcommand} --help lists them"
        )
    if not context.invoked_subcommand and not resume:
        raise UserError(f"name what to train ({', '.join(RECIPES)}), or --resume DIR; see vitreg train --help")
    if resume:
        train(None, resume, **options)


def _takes(function, groups: set[str], defaults: dict, **more: str):
    """The function with options for typer: `more` (name: help), --device, and the fields of these groups."""
    more["device"] = "cpu, cuda … (default: cuda where there is one)"
    options = [(name, str, help, "machine (may change when a run is resumed)") for name, help in more.items()]
    for field in fields(TrainConfig):
        if field.metadata["group"] in groups and field.name != "recipe":
            default = defaults.get(field.name, field.default)
            help = field.metadata["help"] + ("" if default == "" else f" (default: {default})")
            group = field.metadata["group"]
            options.append((field.name, type(field.default), help, options[0][3] if group == "machine" else group))
    parameters = []
    if "context" in inspect.signature(function).parameters:
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    for name, kind, help, group in options:
        option = typer.Option(help=help.replace("[", "\\["), rich_help_panel=group)
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _source(recipe: str) -> tuple[str, dict]:
    """A recipe's docstring and its DEFAULTS, without importing it."""
    tree = ast.parse((Path(__file__).parent / "recipes" / f"{recipe}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DEFAULTS":
            return ast.get_docstring(tree), ast.literal_eval(node.value)
    return ast.get_docstring(tree), {}


def _recipe(name: str):
    def run(**options):
        train(name, **options)

    teaching, defaults = _source(name)
    groups = {f.metadata["group"] for f in fields(TrainConfig)} - RECIPES.keys() | {name}
    out = f"the run's folder (default: runs/{name}-SIZE-regREGISTERS-seedSEED)"
    text = teaching.replace("[", "\\[").replace("\n\n", "\n\n\b\n")
    app.command(name, help=text, short_help=RECIPES[name])(_takes(run, groups, defaults, out=out))


app.callback(invoke_without_command=True)(_takes(_resume, {"machine"}, {}, resume="go on with the run in this folder"))
for _name in RECIPES:
    _recipe(_name)
