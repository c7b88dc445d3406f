"""Does a model have artifacts, of what kind, what do they hold, do they hurt, and what helps? Any ViT, on one page.

    vitreg diagnose timm:vit_base_patch16_224.dino
    vitreg diagnose file:weights.pth --images folder/of/photos --labels
    vitreg diagnose file:my/checkpoints --over-time     # a folder of checkpoints: Figure 4(b) of one's own training

`diagnose` asks the five questions of `answers`; `write` makes a page and a JSON report for one model or several. Beside
each answer are those for two controls with known truth, the planted and the random mini ViT.
"""

import datetime
import functools
import importlib.metadata
import io
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import plots
from ..base import UserError, results, write_atomically, written
from ..data import images as image_sets
from ..measure import detection
from ..model import names, zoo
from ..model.model import Model
from ..plots.norms import bands, quantile_levels
from ..plots.style import bare, draw_box, plain_log
from ..train import telemetry
from .answers import QUESTIONS, Answer, ask
from .look import Look, observe, spread
from .page import PAGES, page

CONTROLS = ("planted", "mini-random")
SCENES = 64  # for the controls
SUFFIXES = set(".safetensors .pt .pth .bin .ckpt".split())


@dataclass
class Diagnosis:
    """The answers to the five questions (the first alone for a run over time), and their measurements."""

    model: Model
    look: Look
    answers: dict[str, Answer]

    @property
    def name(self) -> str:
        """A name short enough for a figure, without characters that a figure reads as a formula."""
        return self.look.model.label.rpartition("/")[2][-32:].replace("$", r"\$")

    @property
    def verdict(self) -> str:
        """The sentences of all answers, one per line."""
        return "\n".join(f"{QUESTIONS[name]} {each.sentence}" for name, each in self.answers.items())

    @property
    def numbers(self) -> dict[str, float | int | None]:
        """The numbers of all answers by name; None where there was nothing to measure."""
        return {name: value for each in self.answers.values() for name, value in each.numbers.items()}


def diagnose(
    model, images="photos", n: int = 200, labelled: bool = False, briefly: bool = False, progress: bool = False
) -> Diagnosis:
    """The `Diagnosis` of a model (`Model`, module or name) on an `Images` set or up to `n` images of a source.

    labelled: sub-folders are classes, unless labels.csv names them. briefly: ask only whether there are artifacts.
    Raises UserError where `labelled` finds no labels.
    """
    from tqdm.auto import tqdm

    model = zoo.load(model)
    with tqdm(desc=f"{model.label}: images", unit="", disable=not progress, leave=False) as bar:
        look = observe(model, images, n, labelled, progress=bar.update)
        if labelled and look.labels is None:
            raise UserError(
                f"no labels in {images!r}: write labels.csv (file, class_index) into it, or put each class into a "
                "folder of its own"
            )
        answers = {}
        for name in list(QUESTIONS)[: 1 if briefly else None]:
            bar.set_description_str(f"{model.label}: {QUESTIONS[name]}")
            answers[name] = ask(name, look)
    return Diagnosis(model, look, answers)


@functools.cache
def controls() -> list[Diagnosis]:
    """The diagnoses of two models with known truth: artifacts planted by hand, and fresh weights."""
    return [diagnose(zoo.load(name, "cpu"), "scenes", SCENES) for name in CONTROLS]


def checkpoints(name: str) -> list[str]:
    """The model's name alone, or those of the checkpoints in file:FOLDER or hf:FOLDER by the numbers in their names.

    A checkpoint is a file of weights or a folder with a config.json. One without a number comes last. The folder of a
    model, in the hub's layout, or of a training run is one model.
    """
    kind, (path, architecture) = name.partition(":")[0], names.file_parts(name.removeprefix("hf:"))
    one = names.in_hub_layout(path, "model_type" if kind == "hf" else "architecture") or "recipe" in names.config(path)
    if kind not in ("file", "hf") or not path.is_dir() or one:
        return [name]
    found = [each for each in path.iterdir() if each.suffix in SUFFIXES or (each / "config.json").exists()]
    if not found:
        raise UserError(f"{name}: no weights in this folder ({', '.join(sorted(SUFFIXES))})")
    found.sort(key=lambda each: (_numbers(each.name) or [math.inf], each.name))
    return [f"{kind}:{each}" + f"#{architecture}" * bool(architecture) for each in found]


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _rows(models: list[dict], norms: list) -> list[dict]:
    """The rows of "over_time": the answer, norms after the last block, and the share, None where it is undecided."""
    rows = []
    for model, step, last in zip(models, _steps([each["name"] for each in models]), norms, strict=True):
        asked = model["questions"]["any_there"]
        row = {"of": model["label"].rpartition("/")[2], "step": step, "answer": asked["answer"]}
        row |= {"largest_norm": last["q1"], "largest_over_median": last["q1"] / last["q0.5"]}
        row |= {"share_above_3_medians": last["outlier_share"]}
        rows.append(row | {name: asked["numbers"][name] for name in ("outlier_share", "onset_layer")})
    return rows


def _in_short(rows: list[dict]) -> str:
    """The answers in order: "Artifacts at step 1; no artifacts at step 40 to 80."; "" without rows."""
    parts = []
    for answer, some in itertools.groupby(rows, lambda row: row["answer"].replace("none", "no artifacts")):
        steps = [row["step"] for row in some]
        parts.append(f"{answer} at step {steps[0]}" + f" to {steps[-1]}" * (len(steps) > 1))
    return "; ".join(parts).capitalize()


def _steps(names: list[str]) -> list[int]:
    """The last number in each checkpoint's name if these increase, else its number in the order."""
    steps = [(_numbers(Path(name.partition("#")[0]).with_suffix("").as_posix()) or [0])[-1] for name in names]
    return steps if all(a < b for a, b in itertools.pairwise(steps)) else list(range(len(steps)))


def _model(each: Diagnosis) -> dict:
    facts = {key: getattr(each.model, key) for key in "name label sha256 role about registers preprocessing".split()}
    facts |= {"blocks": each.model.anatomy.depth, "tokens_kept": len(each.look.kept)}
    asked = {}
    for name, answer in each.answers.items():
        tables = {title: table.reset_index(names="of").to_dict("records") for title, table in answer.tables.items()}
        tables = [{"title": title, "rows": rows} for title, rows in tables.items()]
        parts = dict(answer=answer.answer, sentence=answer.sentence, numbers=answer.numbers, tables=tables)
        asked[name] = {"question": QUESTIONS[name], **parts}
    return facts | {"questions": asked}


def _plain(value):
    """A value as numbers, text, lists and dicts; None replaces numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(
    diagnoses: Iterable[Diagnosis], folder: Path | None = None, time: bool = False, source: str = ""
) -> tuple[Path, Path]:
    """Write the page and the report; their paths, named by model, images and date. Nothing is overwritten.

    For several models it also writes the numbers as a table (.parquet, see `_tidy`). `diagnoses` may be a generator;
    none is kept. folder: results/diagnose by default. source: name of the images in the file names. time: the models
    are checkpoints of one training, in order. Stopped at a later model, it writes what it has before it raises again.

    For every model and control, the report holds five questions with answer, sentence, numbers and tables; a number
    that was not measured is null.
    """
    models, pictures, seen, rows, stop = [], {"": {}}, [], [], None
    try:
        for number, each in enumerate(diagnoses):
            if not models:
                kept, count, pixels = each.look.kept, len(each.look.shares), each.look.kept.pixels[each.look.shown]
            models.append(_model(each))
            pictures[number] = {} if time else _figures(each)
            seen += [(telemetry.table(each.look.observed.seen).iloc[-1], *_on_images(each, None)[:2])] if time else []
    except (KeyboardInterrupt, UserError) as error:
        if not models:
            raise
        stop = error
    if time:
        rows = _rows(models, [last for last, _, _ in seen])
        pictures[""] = {title: _png(figure) for title, figure in _over_time(rows, seen, pixels).items()}
    content = {
        "report": 1,
        "made_by": f"vitreg {importlib.metadata.version('vitreg')}",
        "date": datetime.date.today().isoformat(),
        "images": {"source": kept.source, "number": count, "left_out": kept.left_out},
        "models": models,
        "controls": [] if time else [_model(each) for each in controls()],
        "over_time": rows,
        "over_time_in_short": _in_short(rows),
    }
    content, others = _plain(content), len(models) - 1
    stem = f"{_safe(models[0]['label'])}{f'-and-{others}-more' if others else ''}"
    stem += f"_{_safe(source or kept.source.partition(',')[0])}_{content['date']}"
    path = _unused(folder or results() / "diagnose", stem)
    report, text = path.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, page(PAGES / "diagnose.html", report=content, pictures=pictures).encode())
    write_atomically(report, text.encode())
    if others:
        with written(path.with_suffix(".parquet")) as temporary:
            _tidy(content).to_parquet(temporary)
    if stop:
        raise type(stop)(f"{str(stop) or 'stopped'}; the models before are on this page: {path}") from stop
    return path, report


def _tidy(content: dict):
    """A DataFrame with a row for each model, question and measure; value is NaN where nothing was measured."""
    import pandas as pd

    rows = [
        {"model": model["label"], "sha256": model["sha256"], "images": content["images"]["source"]}
        | {"question": question, "answer": asked["answer"], "measure": name, "value": value}
        for model in content["models"]
        for question, asked in model["questions"].items()
        for name, value in asked["numbers"].items()
    ]
    return pd.DataFrame(rows).astype({"value": "float64"})


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name.rpartition("/")[2]).strip("-.")[:60] or "model"


def _unused(folder: Path, stem: str) -> Path:
    """The path of an HTML file of that stem, or stem-2, stem-3 …, that is not there yet."""
    paths = itertools.chain([f"{stem}.html"], (f"{stem}-{i}.html" for i in itertools.count(2)))
    return next(folder / name for name in paths if not (folder / name).exists())


def _figures(each: Diagnosis) -> dict[str, dict[str, bytes]]:
    """{question: {title: PNG}}: the user's images, and the same measurements of the controls."""
    everyone = {each.name: each} | {f"{control.name}, control": control for control in controls()}
    pixels = each.look.kept.pixels[each.look.shown]
    on_images = {name: _on_images(one, None if one is each else pixels) for name, one in everyone.items()}
    figures = {"any_there": _norms(pixels, on_images, everyone)}
    if each.look.detection.has_artifacts:
        figures["kind"] = _places(everyone)
        figures["held"] = _held(everyone)
        figures["hurt"] = {"Boxes of object discovery (LOST)": _boxes(pixels, each.answers["hurt"].maps)}
        attended = [
            {name: of_cls, f"{name}, left out": of_cls * ~mask}
            for name, (_, mask, of_cls) in on_images.items()
            if of_cls is not None and mask.any()
        ]
        if attended:
            title = "Attention of cls, in even shares, and the same with outliers left out"
            figures["hurt"][title] = plots.sheet(pixels, attended, plots.ATTENTION, "even shares")
        if remedied := each.answers["helps"].maps:
            rings = {name: norms > _cutoff(each) for name, norms in remedied.items()}
            picture = plots.sheet(pixels, [remedied], plots.NORMS, "L2 norm", rings=rings)
            figures["helps"] = {"Norms with each remedy, outliers ringed": picture}
    return {question: {title: _png(figure) for title, figure in some.items()} for question, some in figures.items()}


def _on_images(each: Diagnosis, pixels: torch.Tensor | None) -> tuple:
    """(norms, outliers, attention of cls or None) on the shown images, each (images, rows, cols).

    pixels: of another model's images, which this one gets at its own size. Without artifacts, no patch is an outlier.
    """
    observed, rows, layer = each.look.observed, each.look.rows[each.look.shown], each.look.detection.outliers.layer
    if pixels is not None:
        small = F.interpolate(pixels, image_sets.sides(each.model.input_size), mode="bilinear", antialias=True)
        observed, rows = detection.observe_batch(each.model, each.model.normalise(small))[0], slice(None)
    grid, of_cls = observed.seen.grid, observed.received(layer).get("cls")
    norms = observed.norms[rows, layer].unflatten(1, grid)
    return norms, norms > _cutoff(each), of_cls if of_cls is None else of_cls[rows].unflatten(1, grid)


def _cutoff(each: Diagnosis) -> float:
    return each.look.detection.outliers.cutoff if each.look.detection.has_artifacts else math.inf


def _norms(pixels: torch.Tensor, on_images: dict, everyone: dict[str, Diagnosis]) -> dict:
    """Norms on the shown images, after every block, and their histogram."""
    maps = [{name: norms} for name, (norms, _, _) in on_images.items()]
    rings = {name: mask for name, (_, mask, _) in on_images.items()}
    tables = {name: telemetry.table(each.look.observed.seen) for name, each in everyone.items()}
    onsets = {name: each.numbers["onset_layer"] for name, each in everyone.items()}
    norms = {name: each.look.detection.outliers.norms for name, each in everyone.items()}
    cutoffs = {name: _cutoff(each) for name, each in everyone.items()}
    sheet = dict(label="L2 norm", scale="group", rings=rings, cmap=plots.NORMS)
    return {
        "Norms of patch tokens, outliers ringed": plots.sheet(pixels, maps, **sheet),
        "Norms after every block; the controls' are of scenes": plots.norms_by_layer(tables, onsets),
        "Histograms of norms": plots.histograms(norms, cutoffs),
    }


def _places(everyone: dict[str, Diagnosis]) -> dict:
    """Share of outliers at each place, and whether outliers follow place or content in the interventions."""
    shares = {name: 100 * each.look.detection.outliers.mask.float().mean(0) for name, each in everyone.items()}
    figures = {"How often a place holds an outlier": plots.grids(shares, "images (%)", shared=False, low=0.0)}
    for name, each in everyone.items():
        for table in each.answers["kind"].tables.values():
            columns = {"follows_place": "follows place", "follows_content": "follows content"}
            bars = table[list(columns)].rename(columns=columns).dropna(how="all")
            figures[f"What outliers follow: {name}"] = plots.bars(bars, "share of outliers")
    return figures


def _held(everyone: dict[str, Diagnosis]) -> dict:
    """Bars of what outliers hold, for the model and the controls."""
    import pandas as pd

    titles = {
        "accuracy_": "Images whose class one token names (share)",
        "pixels_error_": "Error of own pixels (of a guess)",
    }
    numbers, figures = pd.DataFrame({name: each.answers["held"].numbers for name, each in everyone.items()}).T, {}
    for prefix, title in titles.items():
        table = numbers.filter(regex=f"^{prefix}").rename(columns=lambda name, start=prefix: name.removeprefix(start))
        table = table.dropna(how="all")
        if table.size:
            figures[title] = plots.bars(table, title.rpartition(" (")[0])
    return figures


@plots.styled
def _boxes(pixels: torch.Tensor, boxes: dict[str, torch.Tensor]):
    """The shown images with a box of each kind (images, 4) in pixels."""
    figure, axes = plots.plt.subplots(1, len(pixels), squeeze=False, figsize=(2.2 * len(pixels), 2.6))
    for i, axis in enumerate(axes[0]):
        axis.imshow(plots.picture(pixels[i]))
        bare(axis)
        for (name, each), colour, dashes in zip(boxes.items(), plots.PALETTE, ("-", "--"), strict=False):
            draw_box(axis, each[i], edgecolor=colour, linestyle=dashes, linewidth=2, label=name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(boxes))
    return figure


def _over_time(rows: list[dict], seen: list[tuple], pixels: torch.Tensor) -> dict:
    """Figure 4(b) of one's own training, and the norms on two images at up to six checkpoints.

    seen: (row of `telemetry.table`, norms and outliers on the shown images) of each checkpoint.
    """
    some = {f"step {rows[i]['step']}": seen[i] for i in spread(len(rows), 6).tolist()}
    relative = {name: norms[:2] / norms.median() for name, (_, norms, _) in some.items()}
    rings = {name: mask[:2] for name, (_, _, mask) in some.items()}
    sheet = dict(label="L2 norm / median", scale="group", rings=rings)
    return {
        "Norms of patch tokens after the last block, and shares": _course(rows, [last for last, _, _ in seen]),
        "Norms on two images, outliers ringed": plots.sheet(pixels[:2], [relative], plots.NORMS, **sheet),
    }


@plots.styled
def _course(rows: list[dict], norms: list):
    """Quantiles of norms, and share of outliers (a gap where that is undecided), by step."""
    import pandas as pd

    table, levels = pd.DataFrame(rows), quantile_levels(pd.DataFrame(norms))
    figure, (left, right) = plots.plt.subplots(1, 2, figsize=(8.4, 3.1))
    bands(left, table.step, levels, plots.PALETTE[0])
    left.set(ylabel="L2 norm", xlabel="step", yscale="log")
    plain_log(left.yaxis)
    right.plot(table.step, 100 * table.share_above_3_medians, marker="o", ms=3, label="above 3 medians")
    shares = 100 * table.outlier_share.astype(float)
    right.plot(table.step, shares, marker="s", ms=3, ls="--", label="outliers (none drawn: undecided)")
    right.set(ylabel="patch tokens (%)", xlabel="step")
    for axis in (left, right):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    plots.plt.close(figure)
    return buffer.getvalue()
