"""The `vitreg` command. `vitreg COMMAND --help` teaches each part."""

import functools
import importlib
import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from .base import IS_REPOSITORY, ROOT, UserError, shown, unknown
from .train.command import app as training

app = typer.Typer(
    help="Look inside vision transformers, as the paper 'Vision Transformers Need Registers' does.",
    rich_markup_mode="rich",
    add_completion=False,
)
app.add_typer(training, name="train")
if IS_REPOSITORY:
    sys.path.append(str(ROOT / "workflow"))
    app.add_typer(importlib.import_module("commands").app)
ANY_MODEL = "a name of `vitreg models`, timm:NAME, file:PATH, random:NAME"
AnyModel = Annotated[str, typer.Argument(help=ANY_MODEL)]

Photos = Annotated[str, typer.Option(help="photos (shipped), scenes, or a folder")]
AtMost = Annotated[int, typer.Option(min=1, help="at most this many")]
Which = Annotated[
    Literal["ema", "raw", "torchscript"],
    typer.Option("--weights", help="averaged or raw, where a file has both; torchscript runs a trusted file's code"),
]
Size = Annotated[
    tuple[int, int] | None, typer.Option("--size", metavar="H W", help="input size in pixels; H alone: a square")
]
Mean = Annotated[tuple[float, float, float] | None, typer.Option("--mean", metavar="R G B", help="of pixels 0 to 1")]
Std = Annotated[tuple[float, float, float] | None, typer.Option("--std", metavar="R G B", help="of pixels 0 to 1")]
Crop = Annotated[float | None, typer.Option("--crop", min=0.1, max=1, help="share of a photo's side that is kept")]


def _load(name: str, weights: Which = "ema", size: Size = None, mean: Mean = None, std: Std = None, crop: Crop = None):
    """The model of that name, loaded with these options."""
    from .model import zoo

    size = size and (size if size[0] != size[1] else size[0])
    given = {key: value for key, value in dict(mean=mean, std=std, crop=crop).items() if value is not None}
    return zoo.load(name, image_size=size, weights=weights, **given)


def loads_models(command):
    """A decorator: the command takes the options of `_load` too, and gets `_load` with these as its argument `load`."""
    own, options = (dict(inspect.signature(each, eval_str=True).parameters) for each in (command, _load))
    del own["load"], options["name"]

    @functools.wraps(command)
    def with_options(**given):
        return command(functools.partial(_load, **{name: given.pop(name) for name in options}), **given)

    with_options.__signature__ = inspect.Signature([*own.values(), *options.values()])
    with_options.__annotations__ = {name: each.annotation for name, each in (own | options).items()}
    return with_options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or another exit code after one line on stderr (a traceback with --debug)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.formatwarning = lambda message, *where, **more: f"{message}\n"  # one line, as errors are
    try:
        command = typer.main.get_command(app)
        with command.make_context("vitreg", _joined(given)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt as stop:
        line, code = str(stop) or "stopped; what was finished is kept", 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        line, code = str(error), 1
        if hasattr(error, "format_message"):  # typer's, for wrong arguments
            context = getattr(error, "ctx", None)
            line, code = f"{error.format_message()} (see {context.command_path if context else 'vitreg'} --help)", 2
            if not IS_REPOSITORY and "No such command" in line:
                line += "; what runs notebooks comes with the repository, not with the package: clone it, make setup"
        elif not isinstance(error, UserError):
            line = f"{type(error).__name__}: {' '.join(line.split())[:300]} (where: --debug)"
    print(f"vitreg: {line}", file=sys.stderr)
    return code


def _joined(arguments: list[str]) -> list[str]:
    """Arguments with `-p NAME VALUE` as `-p NAME=VALUE` and `--size N` as `--size N N`; without --debug."""
    rest, joined = iter(a for a in arguments if a != "--debug"), []
    for argument in rest:
        joined.append(argument)
        if argument == "-p" and (name := next(rest, None)) is not None:
            value = None if "=" in name else next(rest, None)
            joined.append(name if value is None else f"{name}={value}")
        if joined[-2:-1] == ["--size"] and argument.isdigit() and joined[0] != "train":
            other = next(rest, None)  # one number is both sides
            joined += [argument] if other is None else [other] if other.isdigit() else [argument, other]
    return joined


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, debug: Annotated[bool, typer.Option("--debug", help="show an error's traceback")] = False
):
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="\b\nvitreg diagnose vit-ti deit-ti\nvitreg diagnose file:weights.pth#vit_small_patch16_224 --images DIR "
    "--labels\nvitreg diagnose file:my/checkpoints --over-time --images DIR"
)
@loads_models
def diagnose(
    load,
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help=f"{ANY_MODEL}; file:FOLDER of checkpoints")],
    images: Photos = "photos",
    n_images: AtMost = 200,
    labels: Annotated[bool, typer.Option("--labels", help="sub-folders, or a labels.csv, name classes")] = False,
    over_time: Annotated[bool, typer.Option("--over-time", help="checkpoints of one training, in order")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    out: Annotated[Path | None, typer.Option(help="the folder; by default results/diagnose")] = None,
):
    """Has a model artifacts, of what kind, what do they hold, do they hurt, what helps? Writes a page and a report."""
    from .record import diagnose

    names = [each for model in models for each in diagnose.checkpoints(model)]
    if over_time and len(names) < 2:
        raise UserError(
            f"{names[0]}: --over-time needs several checkpoints, in a folder, with steps in their names; the folder of "
            "a vitreg run holds the last weights alone"
        )

    def diagnoses():
        for name in names:
            loaded = load(name)
            each = diagnose.diagnose(loaded, images, n_images, labels, briefly=over_time, progress=True)
            if not as_json:
                print(f"{name} on {each.look.kept.source} ({loaded.preprocessing}):\n{each.verdict}\n")
            yield each

    page, report = diagnose.write(diagnoses(), out, over_time, images)
    if as_json:
        print(report.read_text())
    print(f"page: {page}\nreport: {report}", file=sys.stderr if as_json else sys.stdout)


@app.command(
    epilog="\b\nvitreg measure deit-ti\nvitreg measure file:my.pth#vit_small_patch16_224 --images DIR --out FILE"
)
@loads_models
def measure(
    load,
    model: AnyModel,
    images: Photos = "photos",
    n_images: AtMost = 10,
    out: Annotated[
        Path | None, typer.Option(help="the file; by default in data/measured, or here without the repository")
    ] = None,
):
    """Measure norms, attention and components of a model on a few images, into a file that replays them."""
    from .data import images as image_sets
    from .model import measured

    loaded = load(model)
    pictures = image_sets.load(images, loaded, n_images)
    tensors = measured.measure(loaded, pictures)
    path = out or (measured.FOLDER if IS_REPOSITORY else Path()) / f"{loaded.label}.safetensors"
    command = f"vitreg measure {model} --images {Path(images).name} --n-images {len(pictures)}"
    measured.write(loaded, pictures, tensors, path, command)
    print(f"{shown(path)}: {path.stat().st_size / 1e6:.2f} MB, {pictures.source}, {loaded.preprocessing}")


@app.command(
    epilog="\b\nvitreg mend deit-ti --images DIR --save mended.safetensors\nvitreg diagnose file:mended.safetensors"
)
@loads_models
def mend(
    load,
    model: AnyModel,
    images: Annotated[
        str, typer.Option(help="a source of `vitreg data` or a folder: one half to search, the other to try")
    ] = "",
    n_images: Annotated[int, typer.Option(min=2, help="at most this many")] = 40,
    registers: Annotated[str, typer.Option(help="numbers of registers to try")] = "0,1,2,4,8",
    cutoff: Annotated[float | None, typer.Option(help="norm of an outlier after the last block")] = None,
    save: Annotated[
        Path | None, typer.Option(help="write the mended model: .safetensors (file:FILE loads it), .pt2, or .onnx")
    ] = None,
):
    """Rid a model of its outlier tokens without training: by empty tokens, or by registers at test time.

    With --save the remedy that the name asks for (NAME+ttr4, NAME+empty4, NAME+minus1) is kept, else the one that does
    better. The mean over shifted views is a measurement; no file can hold it."""
    from .model import mend, names, remedies, saved

    if save:
        saved.check(save)
    counts = registers.split(",")
    if not all(count.strip().isdigit() for count in counts):
        raise UserError(f"--registers {registers!r}: write numbers separated by commas, such as 0,1,4")
    base, kind, number = names.split(model)
    loaded = load(base)
    pictures = mend.handful(loaded, images, n_images)
    counts = [*map(int, counts), *([number] if kind == "ttr" else [])]
    try:
        tried = remedies.trial(loaded, pictures.x, cutoff, counts, number if kind == "empty" else 4, progress=True)
    except mend.NothingToMend as nothing:
        print(nothing)
        return
    search, half, best = tried.search, len(pictures) // 2, remedies.best(tried.chosen_on)
    print(f"{loaded.name} on {pictures.source} ({loaded.preprocessing}):\n{half} to search, the others to try.")
    print(f"{search.share_before:.2%} of the patch tokens are outliers after block {search.layer}, from block")
    print(f"{search.onset} on. These neurons make most of them (block:neuron):")
    print(", ".join(f"{block}:{number}" for block, number in search.neurons) + "\n")
    if not search.mends:
        print("but moving them removes few of the outliers: this model is not mended this way\n")
    print(f"what the remedies do and cost on the {len(pictures) - half} other images, the simplest first:")
    print((tried.table.round(3) + 0.0).to_string())  # no -0.0
    print(f"fewest outliers on the first {half}, and of these the features that turn least: {best}")
    if save:
        kind, number = (kind, number) if kind else names.split(best)[1:]
        if not kind:
            raise UserError(f"nothing is saved: no remedy helps; {base}+ttr4 as the name saves one all the same")
        mended = mend.with_added(loaded, kind, number, search.neurons)
        saved.write(mended, save)
        print(f"\n{mended.about}: {save}")


@app.command()
def models(name: Annotated[str, typer.Argument(help="everything about one model")] = ""):
    """List the models with a name, and whether their weights are on this machine."""
    from .model import names

    entries = names.entries()
    if name and name not in entries:
        raise unknown("model", name, entries)
    if name:
        _table(entries[name])
        return
    for name, entry in entries.items():
        print(f"{name:20} {names.available(name):14} {entry.get('about', '')}")
    print(
        "\nalso: timm:NAME, file:PATH, random:NAME; NAME+ttrN for N registers at test time, NAME+emptyN for N zeros, "
        "NAME+minusN without N directions"
    )


@app.command()
def data(name: Annotated[str, typer.Argument(help="everything about one data set")] = ""):
    """List images and data sets: what is ready on this machine, and how to get the rest."""
    from .data import images, sets

    if name:
        _table(sets.entry(name) | {"here": sets.state(name), "how": sets.how(name)})
        return
    photos = len(images.find("photos")[0])
    print(f"{'scenes':16} always         procedural images with exact ground truth")
    about = {"stamps": "scenes with a stamp and dots in every patch", "textures": "random textures"}
    for name, (pixels, model) in images.ONE_SIZE.items():
        print(f"{name:16} always         {about[name]}, for {model} ({pixels} pixels)")
    print(f"{'photos':16} always         {photos} photos shipped with scikit-image, scikit-learn")
    for name in ("imagenet", "coco"):
        state = "here" if images.named_folder(name) else "not here"
        print(f"{name:16} {state:14} photos: a folder of that name in VITREG_DATA, or in data/ of VITREG_MODELS")
    print("\ndata sets of the tables (`vitreg data NAME`: splits, licence, citation):")
    for name, entry in sets.entries().items():
        about = entry["title"] + (f", for {entry['paper']}" if "paper" in entry else "")
        how = f"; {sets.how(name)}" if sets.state(name) == "not here" else ""
        print(f"{name:16} {sets.state(name):14} {about}{how}")


def _table(entry: dict) -> None:
    for key, value in entry.items():
        print(f"{key:12} {value}")


if __name__ == "__main__":
    sys.exit(main())
