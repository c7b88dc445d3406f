"""The `vitreg` command. `vitreg COMMAND --help` teaches each part."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path

from .base import UserError, absolute_variables, shown, unknown
from .record import run as record
from .train.command import add_arguments as add_training


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, or 1 with one clear line on stderr (a traceback with --debug)."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if not hasattr(chosen, "function"):
        parser.print_help()
        return 2
    try:
        chosen.function(chosen)
        return 0
    except UserError as error:
        if chosen.debug:
            raise
        print(f"vitreg: {error}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"vitreg: {str(stop) or 'stopped; what was finished is kept'}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if chosen.debug:
            raise
        told = " ".join(str(error).split())[:300]
        print(f"vitreg: {type(error).__name__}: {told} (where: --debug)", file=sys.stderr)
    return 1


class _OneLine(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message):
        self.exit(2, f"vitreg: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(
        prog="vitreg",
        description="Look inside vision transformers, as the paper 'Vision Transformers Need Registers' does.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name, function, help, epilog=""):
        command = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.set_defaults(function=function)
        return command

    _for_items(add)
    _for_models(add)
    _for_training(add)
    return parser


def _for_items(add) -> None:
    run = add(
        "run",
        _run,
        "Execute an item's notebook and show the verdicts of its claims.",
        "examples:\n  vitreg run fig04\n  vitreg run fig04 -p n_images 64 -p seed 1\n"
        "  vitreg run fig03 --profile small\n"
        "  vitreg run fig04 --parameters     what can be set",
    )
    run.add_argument("item", help="fig01 … fig21, tab01 … tab06, or the name of another notebook")
    _add_parameters(run)
    run.add_argument("--parameters", action="store_true", dest="list", help="list the item's parameters and stop")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument("--no-report", action="store_true", help="do not show the verdicts")
    report = add("report", _report, "Show verdicts and figures of finished items, or write a page of all.")
    report.add_argument("item", nargs="?", help="one item; without it results/<profile>/report.html is written")
    _add_parameters(report)
    report.add_argument("--differences", action="store_true", help="all differences from the item's committed record")


def _for_models(add) -> None:
    diagnose = add(
        "diagnose",
        _diagnose,
        "Does a model have artifacts, and do they hurt? Prints the answer and writes a page.",
        "examples:\n  vitreg diagnose vit-ti\n  vitreg diagnose timm:vit_base_patch16_224.dino --images my/photos\n"
        "  vitreg diagnose file:weights.pth#vit_small_patch16_224",
    )
    diagnose.add_argument("model", help="a name of `vitreg models`, timm:NAME, file:PATH, random:NAME")
    diagnose.add_argument("--images", default="photos", help="photos (shipped), scenes, or a folder (default: photos)")
    diagnose.add_argument("--n-images", type=int, default=20, help="how many at most (default: 20)")
    models = add("models", _models, "List the models with a name, and whether their weights are on this machine.")
    models.add_argument("name", nargs="?", help="all that is known of one model")
    mend = add(
        "mend",
        _mend,
        "Find what makes a model's outlier tokens and move it to registers added at test time, without training.",
        "examples:\n  vitreg mend vit-ti\n  vitreg mend deit3-s --images folder/of/photos\n"
        "then use NAME+ttr4 wherever a model's name is asked for",
    )
    mend.add_argument("model", help="any name of `vitreg models`, timm:NAME, file:PATH")
    mend.add_argument("--images", default="", help="where neurons are searched: a source of `vitreg data` or a folder")
    mend.add_argument("--n-images", type=int, default=10, help="how many of them (default 10)")
    mend.add_argument("--registers", default="0,1,2,4,8", help="numbers of registers to try (default 0,1,2,4,8)")


def _for_training(add) -> None:
    data = add("data", _data, "List images and data sets: what is ready on this machine, and how to get the rest.")
    data.add_argument("name", nargs="?", help="all that is known of one data set")
    data.add_argument(
        "--write-scenes", action="store_true", help="render the frozen evaluation set data/scenes/eval.parquet anew"
    )
    add_training(add("train", _train, "Train a ViT; a run that was stopped or killed goes on as if it had not been."))
    ship = add("ship", _ship, "Put a finished training run into the zoo of this checkout.")
    ship.add_argument("run", help="the run's folder")
    ship.add_argument("name", help="its name in data/models.yaml")
    ship.add_argument("about", help="one sentence")


def _add_parameters(command) -> None:
    command.add_argument(
        "-p",
        nargs=2,
        metavar=("NAME", "VALUE"),
        action="append",
        default=[],
        dest="pairs",
        help="set a parameter of the notebook",
    )
    command.add_argument(
        "--profile", choices=record.PROFILES, help="mini (offline, the default), small, large or paper"
    )


def given(item: str, pairs: list, profile: str | None) -> dict:
    """Parameters from pairs of name and text and from --profile, typed as the item's notebook declares them."""
    declared = record.declared_parameters(item)
    values = {name: text if isinstance(declared.get(name), str) else _literal(text) for name, text in pairs}
    if values.get("images") and Path(values["images"]).expanduser().exists():
        values["images"] = str(Path(values["images"]).expanduser().resolve())  # where the user stands, not the kernel
    return values | ({"profile": profile} if profile else {})


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _run(chosen) -> None:
    item = record.normal_name(chosen.item)
    if chosen.list:
        for name, default in record.declared_parameters(item).items():
            print(f"{name:20} {default!r}")
        return
    values = given(item, chosen.pairs, chosen.profile)
    parameters = record.check_parameters(item, values)
    execute(item, values, progress=not chosen.quiet)
    if not chosen.no_report:
        show(item, parameters)


def execute(item: str, given: dict, progress: bool = True) -> Path:
    """Run an item's notebook by papermill into its results folder; the executed notebook's path.

    It is written under a temporary name and renamed when all went well; a failed one is kept as *.failed.ipynb.
    Raises UserError when a cell fails, or when the record or a figure is missing afterwards.
    """
    import logging
    import tempfile

    import papermill
    from traitlets.config import Config

    parameters = record.check_parameters(item, given)
    folder = record.folder(item, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, finished = folder / f".{item}.ipynb", folder / f"{item}.ipynb"
    failed = folder / f"{item}.failed.ipynb"
    for earlier in (folder / "record.json", finished, failed):
        earlier.unlink(missing_ok=True)
    os.environ["VITREG_BATCH"] = "1"
    absolute_variables()  # the kernel runs in the notebook's folder
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="vitreg-") as sockets:
        # sockets in a folder of their own: kernels started at the same time cannot race for ports
        transport = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name == "posix" else {}
        try:
            papermill.execute_notebook(
                str(record.notebook(item)),
                str(unfinished),
                parameters=given,
                kernel_name="python3",
                progress_bar=progress,
                start_timeout=180,
                cwd=str(record.notebook(item).parent),  # as JupyterLab and nbval do
                config=Config(KernelManager=transport),
            )
            record.read(item, parameters)
        except BaseException as error:
            (folder / "record.json").unlink(missing_ok=True)
            if unfinished.exists():
                unfinished.replace(failed)
            if not isinstance(error, papermill.PapermillExecutionError):
                raise
            line = f"{error.evalue}" if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise UserError(f"{item}: {line.splitlines()[0]} (cell {error.exec_count}; see {shown(failed)})") from error
        finally:
            unfinished.with_suffix(".tmp").unlink(missing_ok=True)
    return unfinished.replace(finished)


def show(item: str, parameters: dict, differences: bool = False) -> None:
    """Print the verdicts of a finished item, whether it agrees with the committed record (all `differences` or the
    first few), and where its figures and notebook are."""
    from rich.console import Console
    from rich.table import Table

    from .record import compare

    found = record.read(item, parameters)
    console = Console(soft_wrap=False)
    table = Table(title=f"{item}: {found['title']} (profile {found['profile']})", title_justify="left", show_lines=True)
    for column in ("claim", "verdict", "measured", "paper"):
        table.add_column(column, overflow="fold")
    for claim in found["claims"]:
        colour, mark = record.VERDICTS[claim["verdict"]]
        verdict = f"[{colour}]{mark} {claim['verdict']}[/]"
        table.add_row(f"{claim['id']} {claim['text']}", verdict, claim["measured"], claim["paper"])
    console.print(table)
    for missing in found["not_reachable_here"]:
        console.print(f"not reachable here: {missing['name']}")
    if record.is_plain(item, parameters):
        print(compare.verdict(found, differences))
    folder = record.folder(item, parameters)
    for figure in found["figures"]:
        print(f"figure: {shown(folder / figure)}.png")
    print(f"notebook: {shown(folder / item)}.ipynb")


def _report(chosen) -> None:
    if chosen.item:
        item = record.normal_name(chosen.item)
        parameters = record.check_parameters(item, given(item, chosen.pairs, chosen.profile))
        show(item, parameters, chosen.differences)
        return
    from .record.report import write

    print(shown(write(chosen.profile or "mini")))


def _models(chosen) -> None:
    from .model import zoo

    entries = zoo.entries()
    if chosen.name:
        if chosen.name not in entries:
            raise unknown("model", chosen.name, entries)
        for key, value in entries[chosen.name].items():
            print(f"{key:12} {value}")
        return
    for name, entry in entries.items():
        print(f"{name:20} {zoo.available(name):14} {entry.get('about', '')}")
    print("\nalso: timm:NAME, file:PATH, random:NAME, and NAME+ttrN for N registers added at test time")


def _data(chosen) -> None:
    from .data import frozen, images, sets

    if chosen.write_scenes:
        print(shown(frozen.write()))
        return
    if chosen.name:
        for key, value in (sets.entry(chosen.name) | {"here": sets.state(chosen.name)}).items():
            print(f"{key:12} {value}")
        print(f"{'how':12} {sets.how(chosen.name)}")
        return
    print(f"{'scenes':16} always         procedural images with exact ground truth")
    print(
        f"{'photos':16} always         {len(images.find('photos')[0])} photos shipped with scikit-image, scikit-learn"
    )
    for name in ("imagenet", "coco"):
        state = "here" if images.named_folder(name) else "not here"
        print(f"{name:16} {state:14} photos: a folder of that name in VITREG_DATA, or in data/ of VITREG_MODELS")
    print("\ndata sets of the tables (`vitreg data NAME`: splits, licence, citation):")
    for name, known in sets.entries().items():
        state = sets.state(name)
        told = known["title"] + (f", for {known['paper']}" if "paper" in known else "")
        print(f"{name:16} {state:14} {told}" + (f"; {sets.how(name)}" if state == "not here" else ""))


def _diagnose(chosen) -> None:
    from .data import images
    from .model import zoo
    from .record import diagnose

    model = zoo.load(chosen.model)
    found = diagnose.diagnose(model, images.load(chosen.images, model, chosen.n_images), progress=True)
    print(f"{model.name} on {found.source}:\n{found.verdict}\n")
    for name, value in found.numbers.items():
        print(f"{name:30} {'none' if value is None else f'{value:.4g}'}")
    print(f"\npage: {shown(diagnose.page(found))}")


def _mend(chosen) -> None:
    from .data import images
    from .model import mend, zoo

    counts = chosen.registers.split(",")
    if not all(count.strip().isdigit() for count in counts):
        raise UserError(f"--registers {chosen.registers!r}: write numbers separated by commas, such as 0,1,4")
    model = zoo.load(chosen.model)
    searched = images.load(chosen.images, model, chosen.n_images) if chosen.images else mend.handful(model)
    found = mend.find(model, searched)
    print(f"{model.name} on {searched.source}:")
    print(
        f"{found.share_before:.2%} of the patch tokens are outliers after block {found.layer}, "
        f"from block {found.onset} on"
    )
    print(f"{len(found.neurons)} neurons make them (block:neuron): {', '.join(f'{b}:{i}' for b, i in found.neurons)}\n")
    if found.share_after > mend.MENDED * found.share_before:
        print("but moving them removes few of the outliers: this model is not mended this way\n")
    table = mend.doses(model, searched, found, [int(count) for count in counts])
    print(table.round(4).to_string(index=False))


def _train(chosen) -> None:
    from .train import command

    command.run(chosen)


def _ship(chosen) -> None:
    from .train.ship import ship

    print(shown(ship(chosen.run, chosen.name, chosen.about)))


if __name__ == "__main__":
    sys.exit(main())
