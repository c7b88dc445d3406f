"""`vitreg train`: the command and its options, which are the fields of the recipe's configuration.

A recipe's file is read, not run, for its help (see `train.recipes`): --help needs no torch.
"""

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from ..base import ROOT, UserError
from . import recipes
from .config import MACHINE, TrainConfig

EXAMPLES = """\b
vitreg train deit3 --help                      what is special to a recipe, and all options
vitreg train deit3 --registers 4 --out runs/deit3-reg4
vitreg train --resume runs/deit3-reg4
vitreg train my_recipe.py --steps 500          a recipe of your own: see CONTRIBUTING.md
torchrun --nproc-per-node 8 -m vitreg_lib.cli train dinov2 --size b/16 --batch-size 1024

\b
Stopped by Ctrl-C, by SIGTERM, or killed: --resume goes on, and ends with the same weights."""
ANY_MACHINE = "machine (may change when a run is resumed)"


class Recipes(typer.core.TyperGroup):
    """A command for every recipe, made when it is asked for."""

    def list_commands(self, context) -> list[str]:
        return list(recipes.listed())

    def get_command(self, context, name: str):
        described = recipes.literals(recipes.find(name))

        def run(**options):
            train(name, **options)

        out = f"the run's folder (default: runs/{Path(name).stem}-SIZE-regREGISTERS-seedSEED)"
        options = [f for f in fields(recipes.config_class(name)) if f.name != "recipe"]
        text = described["__doc__"].replace("[", "\\[").replace("\n\n", "\n\n\b\n")
        alone = typer.Typer(add_completion=False)
        alone.command(name, help=text, short_help=described["LEARNS_FROM"])(_takes(run, options, out=out))
        return typer.main.get_command(alone)


app = typer.Typer(
    cls=Recipes, help="Train a ViT; a run that was stopped or killed goes on as if it had not been.", epilog=EXAMPLES
)


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
        module = recipes.load(config.recipe, config.data)
    else:
        config, module = loop.configure(recipe, **given)
        what = (getattr(config, "model", "") or config.size).replace("/", "-").replace(":", "-")
        default = f"{config.name}-{what}-reg{config.registers}-seed{config.seed}"
        folder = Path(out or ROOT / "runs" / default)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = loop.train(config, module, folder, parallel.start(device))
        if parallel.rank() == 0:
            print(json.dumps(result, indent=1))
            print(f"weights: {folder / 'model.safetensors'}")
    except NothingToMend as reason:  # a recipe for a phenomenon that this model does not show
        print(reason)
    finally:
        parallel.stop()


def _resume(context: typer.Context, resume: str | None, **options):
    if context.invoked_subcommand and (resume or any(value is not None for value in options.values())):
        raise UserError(
            f"--resume goes on with the run's own configuration: leave {context.invoked_subcommand} out"
            if resume
            else f"write options after the recipe: vitreg train {context.invoked_subcommand} --help lists them"
        )
    if not context.invoked_subcommand and not resume:
        raise UserError(f"name what to train ({', '.join(recipes.listed())}), or --resume DIR; see vitreg train --help")
    if resume:
        train(None, resume, **options)


def _takes(function, options, **more: str):
    """The function with parameters for typer: `more` (name: help), --device, and these fields of a configuration."""
    more["device"] = "cpu, cuda … (default: cuda where there is one)"
    described = [(name, str, help, ANY_MACHINE) for name, help in more.items()]
    for f in options:
        help = f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})")
        described.append((f.name, type(f.default), help, ANY_MACHINE if f.name in MACHINE else f.metadata["group"]))
    parameters = []
    if "context" in inspect.signature(function).parameters:
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    for name, kind, help, group in described:
        option = typer.Option(help=help.replace("[", "\\["), rich_help_panel=group)
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


_machine = [f for f in fields(TrainConfig) if f.name in MACHINE]
app.callback(invoke_without_command=True)(_takes(_resume, _machine, resume="go on with the run in this folder"))
