"""The recorded table of `registers_after_training`: averages, figures and verdicts.

A row of the table is one photo in one cell. Values are first averaged over seeds, for each photo. Intervals are those
of the mean over photos, by a bootstrap (`vr.pairs.interval`). Differences are paired: the same photo before and after.
"""

from __future__ import annotations

import ast
import itertools

import matplotlib.pyplot as plt
import pandas as pd
import registers_after_training as experiment
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from vitreg_lib.data import images
from vitreg_lib.measure import pairs
from vitreg_lib.model import measured
from vitreg_lib.plots.maps import draw_map
from vitreg_lib.plots.style import ATTENTION, NORMS, PALETTE, PAPER, picture, plain_log, styled

MODELS = experiment.MODELS
LABELS = {
    "outliers": "outliers (% of patches)",
    "attention_on_outliers": "cls attention on the\nplaces of outliers (%)",
    "attention_on_registers": "cls attention\non registers (%)",
    "right": "right of 100 photos",
    "answers_kl": "change of the answers\n(100 × nats)",
}
ARMS = {"doses": "trained in", "empty": "empty tokens", "ttr": "at test time"}
SHOWN = {"deit-ti": "as it is", "deit-ti+empty4": "4 empty\ntokens", "deit-ti-trained-reg4": "4 registers\ntrained in"}
PHOTOS = ("rocket", "coffee", "astronaut", "retina")  # of the source "photos"; not used in training
RIGHT_LOST = {"deit-ti": 0.02, "vit-ti": 0.04}  # the largest accepted share of photos whose answer becomes wrong


def table() -> pd.DataFrame:
    """All recorded rows; the `attrs` of the table name the models, photos, command and device that made them."""
    return pd.read_parquet(experiment.TABLE)


def neurons(rows: pd.DataFrame, model: str) -> str:
    """The neurons that write a model's outliers, by block, in words."""
    found = sorted(ast.literal_eval(rows.attrs["neurons"][model]))
    blocks = {block: [str(i) for b, i in found if b == block] for block, _ in found}
    return "; ".join(f"block {block}: {', '.join(numbers)}" for block, numbers in blocks.items())


def missing(rows: pd.DataFrame) -> list[dict]:
    """The cells of the experiment that the table does not have."""
    columns = [name for name in experiment.ID if name != "control"]
    runs = rows[columns].drop_duplicates().to_dict("records")
    return [c for c in experiment.cells() if not any(all(run[k] == c[k] for k in c) for run in runs)]


def photos(rows: pd.DataFrame, arm: str, control: str = "", **fixed) -> pd.DataFrame:
    """One row a photo, averaged over seeds, from the rows of one arm whose columns have the values of `fixed`.

    Raises ValueError if the table has no such rows.
    """
    chosen = rows[(rows.arm == arm) & (rows.control == control)]
    for name, value in fixed.items():
        chosen = chosen[chosen[name] == value]
    if chosen.empty:
        raise ValueError(f"the table has no rows of {arm} {control} with {fixed}")
    return chosen.groupby("photo", observed=True)[list(experiment.MEASURES)].mean()


def spread(part: pd.DataFrame, measure: str) -> tuple[float, float, float]:
    """`described` of a measure; for "right" the interval is that of the change, photo by photo."""
    if measure != "right":
        return described(part[measure])
    before = 100 * part.right_before.mean()
    return tuple(before + value for value in described(part.right - part.right_before))


def described(values: pd.Series) -> tuple[float, float, float]:
    """(mean, low, high) over photos, in per cent; photos without a value are left out."""
    known = torch.tensor(values.dropna().to_numpy(), dtype=torch.float64)
    if not len(known):
        return (float("nan"),) * 3
    return tuple(100 * v for v in (known.mean().item(), *pairs.interval(known)))


def means(parts: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row for each {label: rows of `photos`}: means in per cent, the interval of the change in right answers."""
    found = {}
    for label, part in parts.items():
        row = {name: described(part[name])[0] for name in LABELS}
        row["right_low"], row["right_high"] = described(part.right - part.right_before)[1:]
        found[label] = row
    return pd.DataFrame.from_dict(found, orient="index")


def doses(rows: pd.DataFrame) -> pd.DataFrame:
    """`means` for every model, arm and number of registers: "deit-ti, trained in, 4"."""
    found = {}
    for model, (arm, words) in itertools.product(MODELS, ARMS.items()):
        counts = sorted(rows[(rows.arm == arm) & (rows.model == model)].registers.unique())
        found |= {f"{model}, {words}, {n}": photos(rows, arm, model=model, registers=n) for n in counts}
    return means(found)


@styled
def pictures(names=SHOWN, shown=PHOTOS) -> Figure:
    """Norms after the last block, and its attention of cls (mean over heads), of replayed models on four photos.

    names: {name in data/measured: title}. One row a photo, with one scale for its norm maps and one for its attention.
    """
    models = [measured.load(name) for name in names]
    photos_ = images.load("photos", models[0], 10)
    rows = [photos_.names.index(name) for name in shown]
    norms, attention = [], []
    for model in models:
        seen = model.capture(images.load("photos", model, 10), ("norms", "attention"), layers=-1, queries=[0])
        norms.append(seen.patch_norms[rows, 0].unflatten(1, seen.grid))
        cls = seen.attention[seen.layers[-1]][rows, :, 0].mean(1)
        attention.append(seen.patches(cls).unflatten(1, seen.grid))
    widths = [1, 0.08, *[1] * len(names), 0.08, *[1] * len(names)]
    figure, axes = plt.subplots(len(rows), len(widths), figsize=(9.6, 5.6), width_ratios=widths)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(rows, axes, strict=True):
        line[0].imshow(picture(photos_.pixels[row]))
    for first, maps, colours in ((2, norms, NORMS), (3 + len(names), attention, ATTENTION)):
        for i, line in enumerate(axes):
            scale = Normalize(min(m[i].min().item() for m in maps), max(m[i].max().item() for m in maps))
            for each, axis, title in zip(maps, line[first:], names.values(), strict=False):
                draw_map(axis, each[i], colours, scale)
                if not i:
                    axis.set_title(title, fontsize=8)
        words = "norm of patch tokens" if colours == NORMS else "attention of the cls token"
        middle = axes[0, first + len(names) // 2]
        middle.annotate(words, (0.5, 1.42), xycoords="axes fraction", ha="center", annotation_clip=False)
    return figure


@styled
def dose(rows: pd.DataFrame, measures=("outliers", "attention_on_outliers", "right")) -> Figure:
    """Measures by the number of registers, one row a model, one line an arm; bars are intervals over photos."""
    figure, axes = plt.subplots(
        len(MODELS), len(measures), figsize=(2.5 * len(measures) + 0.3, 4.6), squeeze=False, sharex=True
    )
    for model, row in zip(MODELS, axes, strict=True):
        for measure, axis in zip(measures, row, strict=True):
            for i, (arm, words) in enumerate(ARMS.items()):
                counts = [n for n in experiment.DOSES if n or measure != "attention_on_registers"]
                parts = [photos(rows, arm, model=model, registers=n) for n in counts]
                _line(axis, [experiment.DOSES.index(n) for n in counts], parts, measure, i, words, shift=0.1 * (i - 1))
            _before(axis, photos(rows, "doses", model=model, registers=0), measure)
            axis.set_xticks(range(len(experiment.DOSES)), experiment.DOSES)
            axis.set_ylabel(LABELS[measure])
            if measure != "right":
                axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])
        row[0].set_title(model, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("registers")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _line(axis, at, parts, measure: str, number: int, label: str, shift: float = 0.0) -> None:
    """Draw the means of a measure over parts (of `photos`), with bars for their intervals."""
    values = [spread(part, measure) for part in parts]
    centre, low, high = (torch.tensor(v) for v in zip(*values, strict=True))
    style = dict(marker="os^"[number % 3], ms=4, lw=1.2, capsize=2, color=PALETTE[number], label=label)
    axis.errorbar([x + shift for x in at], centre, yerr=torch.stack([centre - low, high - centre]), **style)


def _before(axis, part: pd.DataFrame, measure: str) -> None:
    if f"{measure}_before" in part:
        axis.axhline(100 * part[f"{measure}_before"].mean(), color=PAPER, ls="--", lw=1, label="untouched")


@styled
def grid(rows: pd.DataFrame, measure: str = "outliers") -> Figure:
    """One panel a model: initial registers and teacher by row, trained weights by colour; bars are intervals."""
    from vitreg_lib.train.recipes import registers as recipe

    figure, axes = plt.subplots(1, len(MODELS), figsize=(7.4, 2.7), sharey=True)
    names = [(start, teacher) for teacher in recipe.TEACHERS for start in recipe.STARTS]
    for model, axis in zip(MODELS, axes, strict=True):
        for i, free in enumerate(recipe.FREE):
            for place, (start, teacher) in enumerate(names):
                part = photos(rows, "grid", model=model, start=start, teacher=teacher, free=free)
                mean, low, high = spread(part, measure)
                style = dict(
                    fmt="os^"[i], ms=4, capsize=2, color=PALETTE[i], label=f"free: {free}" if not place else None
                )
                axis.errorbar(mean, place + 0.18 * (i - 1), xerr=[[mean - low], [high - mean]], **style)
        axis.axvline(100 * part.outliers_before.mean(), color=PAPER, ls="--", lw=1, label="untouched")
        axis.set(title=model, xlabel=LABELS[measure], xlim=(0, None))
    axes[0].set_yticks(range(len(names)), [f"{teacher}, starts {start}" for start, teacher in names])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@styled
def steps(rows: pd.DataFrame, measures=("outliers", "right")) -> Figure:
    """Measures by training steps, one row a model, one line a learning rate; bars are intervals over photos."""
    figure, axes = plt.subplots(len(MODELS), len(measures), figsize=(7.0, 4.4), squeeze=False, sharex=True)
    for model, row in zip(MODELS, axes, strict=True):
        mine = rows[(rows.arm == "steps") & (rows.model == model)]
        for measure, axis in zip(measures, row, strict=True):
            for i, rate in enumerate(sorted(mine.learning_rate.unique())):
                counts = sorted(mine[mine.learning_rate == rate].steps.unique())
                parts = [photos(mine, "steps", learning_rate=rate, steps=n) for n in counts]
                _line(axis, [n * 1.04 ** (i - 1) for n in counts], parts, measure, i, f"learning rate {rate:g}")
            _before(axis, photos(mine, "steps"), measure)
            axis.set(xscale="log", ylabel=LABELS[measure])
            axis.set_xticks([25, 50, 100, 300, 1000])
            plain_log(axis.xaxis)
        row[0].set_ylim(bottom=0)
        row[0].set_title(model, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("training steps of 8 photos")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def few(rows: pd.DataFrame) -> pd.DataFrame:
    """`means` by model and number of training photos, over three seeds."""
    counts = {"10": 10, "50": 50, "200": 200, "all": 0}
    models = MODELS
    return means(
        {f"{m}, {word} photos": photos(rows, "photos", model=m, photos=n) for m in models for word, n in counts.items()}
    )


def controls(rows: pd.DataFrame, registers: int = 4) -> pd.DataFrame:
    """`means` by model and replacement of the trained registers (`replaced`), seed 0."""
    found = {}
    for model in MODELS:
        for how in ("", *experiment.CONTROLS):
            part = photos(rows, "doses", control=how, model=model, registers=registers, seed=0)
            found[f"{model}, {how or 'as trained'}"] = part
    return means(found)


def answers(rows: pd.DataFrame) -> pd.DataFrame:
    """`means` by model, weight of the answers in the loss, and steps: 4 registers, one seed, recorded cells."""
    mine = rows[rows.arm == "answers"]
    cells = mine[["model", "answer_weight", "steps"]].drop_duplicates().astype({"model": str})
    chosen = sorted(cells.itertuples(index=False, name=None))
    return means(
        {
            f"{m}, weight {w:g}, {n} steps": photos(rows, "answers", model=m, answer_weight=w, steps=n)
            for m, w, n in chosen
        }
    )


@styled
def glance(rows: pd.DataFrame, registers: int = 4) -> Figure:
    """The criteria, one dot each: outliers and attention that are left, right answers that are lost.

    Bars are intervals over photos. Green: the whole interval meets the criterion (shaded); red: the whole interval does
    not.
    """
    fast = photos(rows, "steps", model="vit-ti", steps=100, learning_rate=1e-4)
    parts = {m: photos(rows, "doses", model=m, registers=registers) for m in MODELS} | {"vit-ti, rate 0.0001": fast}
    without = {m: photos(rows, "doses", model=m, registers=0) for m in MODELS}
    kept = {name: ("outliers", part, 1 / 3, False) for name, part in without.items()}
    panels = {
        "outliers left\n(% of before)": {name: ("outliers", part, 0.1, True) for name, part in parts.items()},
        "attention left on their\nplaces (% of before)": {
            name: ("attention_on_outliers", part, 0.2, True) for name, part in parts.items()
        },
        "right answers lost\n(of 100)": {
            name: ("right", part, RIGHT_LOST[name.split(",")[0]], True) for name, part in parts.items()
        },
        "outliers left without\nregisters (% of before)": kept,
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9.4, 2.3), sharey=True)
    for axis, (label, questions) in zip(axes, panels.items(), strict=True):
        for y, (measure, part, limit, most) in enumerate(questions.values()):
            before, after = part[f"{measure}_before"], part[measure]
            lost = measure == "right"
            base = 1.0 if lost else before.mean()
            value, low, high = (v / base for v in described(before - after if lost else after))
            if not lost:  # the interval of the judged difference, so that bar and verdict agree
                _, low, high = (100 * limit + v / base for v in described(after - limit * before))
            good, bad = (high <= 100 * limit, low > 100 * limit) if most else (low >= 100 * limit, high < 100 * limit)
            colour = PALETTE[2] if good else PALETTE[1] if bad else PAPER
            axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=5, capsize=3, color=colour)
            ends = (-1e3, 100 * limit) if most else (100 * limit, 1e3)
            axis.fill_betweenx([y - 0.4, y + 0.4], *ends, color=PALETTE[2], alpha=0.15, lw=0)
            axis.text(100 * limit, y - 0.42, f"{100 * limit:.0f}", fontsize=7, ha="center", va="bottom", color=PAPER)
        most_left = max(line.get_xdata().max() for line in axis.lines)
        axis.set(xlabel=label, xlim=(-10 if label.startswith("right") else 0, max(12, 1.2 * most_left)))
    axes[0].set_yticks(range(len(parts)), list(parts))
    axes[0].set_ylim(len(parts) - 0.4, -0.7)
    return figure


def bounded(difference: pd.Series) -> bool | str:
    """True if the interval of a mean over photos is below 0, False if it is above, else "undecided"."""
    _, low, high = described(difference)
    return True if high <= 0 else False if low > 0 else "undecided"


def left(part: pd.DataFrame) -> str:
    """Outliers before and after, in words."""
    before, after = described(part.outliers_before)[0], described(part.outliers)[0]
    return f"{before:.2f} % of the patches, then {after:.2f} %: {after / before:.0%} are left"


def _asked(after: pd.DataFrame, model: str, words: str, registers: int, suffix: str = ""):
    """Claims about a model with trained registers: its outliers, the attention there, the right answers."""
    yield (
        f"ours-outliers-{model}{suffix}",
        bounded(after.outliers - after.outliers_before / 10),
        left(after),
        f"{words}: with {registers} registers trained in at most a tenth of the outliers is left",
    )
    attention = described(after.attention_on_outliers_before)[0], described(after.attention_on_outliers)[0]
    yield (
        f"ours-attention-{model}{suffix}",
        bounded(after.attention_on_outliers - after.attention_on_outliers_before / 5),
        f"{attention[0]:.1f} % of cls's attention, then {attention[1]:.1f} %, and on registers "
        f"{described(after.attention_on_registers)[0]:.1f} %",
        f"{words}: the places of outliers keep at most a fifth of cls's attention",
    )
    lost = after.right_before - after.right
    mean, low, high = described(lost)
    yield (
        f"ours-right-{model}{suffix}",
        bounded(lost - RIGHT_LOST[model]),
        f"{100 * after.right_before.mean():.0f} right of {len(after)} photos, then {100 * after.right.mean():.1f}; "
        f"lost {mean:.1f} ({low:.1f} to {high:.1f})",
        f"{words}: at most {100 * RIGHT_LOST[model]:.0f} of 100 photos are lost",
    )


def claims(rows: pd.DataFrame, registers: int = 4):
    """Yields the arguments of `Run.claim`. Thresholds were set before the runs; verdicts use the intervals over photos.

    ViT-Ti is judged a second time at a learning rate that was chosen on the same photos: that of the models with
    registers in data/models.yaml.
    """
    for model in MODELS:
        yield from _asked(photos(rows, "doses", model=model, registers=registers), model, model, registers)
        without = photos(rows, "doses", model=model, registers=0)
        one = photos(rows, "doses", model=model, registers=1)
        yield (
            f"ours-one-{model}",
            bounded(one.outliers - one.outliers_before / 10),
            left(one),
            f"{model}: one register is enough, a tenth is left",
        )
        yield (
            f"ours-control-{model}",
            bounded(without.outliers_before / 3 - without.outliers),
            left(without),
            f"{model}: trained as long without registers it keeps at least a third of the outliers",
        )
    faster = photos(rows, "steps", model="vit-ti", steps=100, learning_rate=1e-4)
    yield from _asked(faster, "vit-ti", "vit-ti, learning rate 0.0001 (chosen on these photos)", 4, "-faster")
    empty = {m: photos(rows, "empty", model=m, registers=registers) for m in MODELS}
    shares = ", ".join(f"{m}: {part.outliers.sum() / part.outliers_before.sum():.0%} left" for m, part in empty.items())
    content, place = empty["deit-ti"], empty["vit-ti"]
    halved, kept = (
        bounded(content.outliers - content.outliers_before / 2),
        bounded(0.9 * place.outliers_before - place.outliers),
    )
    yield (
        "ours-empty",
        False if False in (halved, kept) else "undecided" if "undecided" in (halved, kept) else True,
        shares,
        f"{registers} empty tokens, untrained, halve DeiT-Ti's outliers, which depend on content, and leave nine "
        "tenths of ViT-Ti's, which depend on the place",
    )
