"""The sweep over variants of `emergence`: its configurations ("cells"), a function that runs one, and the results.

A cell is a dictionary with a name, a number of seeds, and options of `TrainConfig` that override the recipe's defaults.
To add a cell, add it to `SWEEP` and run workflow/sweep.py, which adds its rows to data/sweeps/emergence.parquet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import emergence
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sinks
from matplotlib.figure import Figure

from vitreg_lib.base import DATA, unknown, written
from vitreg_lib.plots.style import PALETTE, plain_log, styled
from vitreg_lib.train import loop, telemetry
from vitreg_lib.train.config import TrainConfig

TABLE = DATA / "sweeps" / "emergence.parquet"
WATCHED = 64  # held-out images on which sinks are measured
POINTS = 12  # measured steps of a run: 12 log-spaced and 12 evenly spaced
MAIN = "fixed+dropout+three-blocks+usual-mlp"
ONE = {"variant": "decay+dropout"}  # one block, learned position embeddings
FIRST = {"variant": "corners", "steps": 3000}  # the same without weight decay on position embeddings and dropout
SWEEP = [
    {"cell": "three blocks", "seeds": 5},
    {"cell": "three blocks, 4 registers", "registers": 4, "seeds": 5},
    {"cell": "three blocks, 1 register", "registers": 1, "seeds": 3},
    {"cell": "three blocks, nothing idle", "variant": f"{MAIN}+nothing-idle", "seeds": 3},
    {"cell": "three blocks, blank corners", "variant": f"{MAIN}+blank-corners", "seeds": 3},
    {"cell": "three blocks, no dropout", "variant": "fixed+three-blocks+usual-mlp", "seeds": 3},
    {"cell": "three blocks, learnt positions", "variant": "dropout+three-blocks+usual-mlp", "seeds": 3},
    {"cell": "three blocks, decay 0.05", "weight_decay": 0.05, "seeds": 3},
    {"cell": "two blocks", "variant": "fixed+dropout+two-blocks+usual-mlp", "seeds": 3},
    {"cell": "two blocks, 4 registers", "variant": "fixed+dropout+two-blocks+usual-mlp", "registers": 4, "seeds": 3},
    {"cell": "one block", **ONE, "seeds": 5},
    {"cell": "one block, 4 registers", **ONE, "registers": 4, "seeds": 5},
    {"cell": "one block, nothing idle", "variant": "decay+dropout+nothing-idle", "seeds": 3},
    {"cell": "one block, blank corners", "variant": "decay+dropout+blank-corners", "seeds": 3},
    {"cell": "one block, no dropout", "variant": "decay", "seeds": 3},
    {"cell": "one block, no dropout, 4 registers", "variant": "decay", "registers": 4, "seeds": 1},
    {"cell": "one block, positions without decay", "variant": "dropout", "seeds": 2},
    {"cell": "first: corners", **FIRST, "seeds": 3},
    {"cell": "first: 4 registers", **FIRST, "registers": 4, "seeds": 3},
    {"cell": "first: decay 0.05", **FIRST, "weight_decay": 0.05, "seeds": 1},
    {"cell": "first: decay 1", **FIRST, "weight_decay": 1.0, "seeds": 3},
    {"cell": "first: decay 1, 4 registers", **FIRST, "weight_decay": 1.0, "registers": 4, "seeds": 3},
    {"cell": "first: 1 register", **FIRST, "registers": 1, "seeds": 1},
    {"cell": "first: cls token", **FIRST, "variant": "cls-token", "seeds": 1},
    {"cell": "first: nothing idle", **FIRST, "variant": "nothing-idle", "seeds": 1},
    {"cell": "first: blank corners", **FIRST, "variant": "blank-corners", "seeds": 1},
    {"cell": "first: one corner", **FIRST, "variant": "one-corner", "seeds": 1},
    {"cell": "first: anywhere, tinted", **FIRST, "variant": "anywhere", "seeds": 1},
    {"cell": "first: two blocks", **FIRST, "variant": "two-blocks", "seeds": 1},
    {"cell": "first: three blocks", **FIRST, "variant": "three-blocks", "seeds": 1},
    {"cell": "first: usual MLP", **FIRST, "variant": "usual-mlp", "seeds": 1},
    {"cell": "first: LayerScale", **FIRST, "variant": "layer-scale", "seeds": 1},
    {"cell": "first: noise", **FIRST, "variant": "noise", "seeds": 1},
    {"cell": "first: plain start", **FIRST, "variant": "plain-start", "seeds": 1},
    {"cell": "first: four heads", **FIRST, "variant": "four-heads", "seeds": 1},
    {"cell": "first: rate 0.003", **FIRST, "learning_rate": 0.003, "seeds": 1},
    {"cell": "first: broadcast", **FIRST, "variant": "broadcast", "seeds": 1},
]
WANTED = "#D4AC00"  # a yellow that is visible on white: the region that counts as emerged
MARKS = ("o", "s", "^", "D", "v", "P")  # layers differ in colour and in mark


def names() -> list[str]:
    """The cells' names, in the sweep's order."""
    return [cell["cell"] for cell in SWEEP]


def cell(name: str) -> dict:
    """The options of a cell. Raises UserError for an unknown one."""
    found = [c for c in SWEEP if c["cell"] == name]
    if not found:
        raise unknown("cell of the sweep", name, names())
    return {k: v for k, v in found[0].items() if k not in ("cell", "seeds")}


def configuration(name: str, seed: int = 0, **changes) -> TrainConfig:
    """The `TrainConfig` of a cell; `changes` override the cell's options."""
    return loop.configure("emergence", **{**cell(name), "seed": seed, **changes})[0]


def run(
    name: str,
    seed: int,
    folder: str | Path,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    **changes,
) -> pd.DataFrame:
    """The rows of one cell and seed, as in `table`; trains in `folder`, or continues a run that stopped there.

    `changes` are options of TrainConfig that override the cell's: steps=200 gives a short trial.
    """
    folder = Path(folder)
    path = folder / "sinks.parquet"
    config = configuration(name, seed, **changes)
    measured_at = set(telemetry.measured_steps(config.steps, POINTS, POINTS)) - {0}
    batch = emergence.held_out(config, WATCHED, part=2)
    places = batch.idle if batch.idle.any() else None

    def after_step(module, config, step):
        if step + 1 not in measured_at:
            return
        module.eval()  # without dropout; the loop's next step restores the training mode
        error = {k: v.item() for k, v in emergence.named(emergence.errors(module, batch).detach(), batch).items()}
        rows = sinks.measure(module, batch.pixels, places).assign(cell=name, seed=seed, step=step + 1, **error)
        before = pd.read_parquet(path) if path.exists() else rows.iloc[:0]
        rows = pd.concat([before[before.step <= step], rows], ignore_index=True)
        with written(path) as temporary:
            rows.to_parquet(temporary, index=False)

    recipe = SimpleNamespace(**vars(emergence) | {"after_step": after_step})
    loop.train(config, recipe, folder, "cpu", progress, on_step)
    return pd.read_parquet(path)


def table() -> pd.DataFrame:
    """All recorded rows: cell, seed, step, layer, the columns of `sinks.measure`, and the errors of the task."""
    return pd.read_parquet(TABLE)


def record(rows: pd.DataFrame) -> None:
    """Put the rows of a finished run into the table; they replace earlier rows of the same cell and seed."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    if TABLE.exists():
        before = table()
        same = (before.cell == rows.cell.iloc[0]) & (before.seed == rows.seed.iloc[0])
        rows = pd.concat([before[~same], rows], ignore_index=True)
    with written(TABLE) as temporary:
        rows.round(5).to_parquet(temporary, index=False)


def course(rows: pd.DataFrame, name: str, seed: int = 0) -> pd.DataFrame:
    """The rows of one run. Raises UserError if the table has none."""
    found = rows[(rows.cell == name) & (rows.seed == seed)]
    if found.empty:
        runs = rows[["cell", "seed"]].itertuples(index=False, name=None)
        raise unknown("recorded run", f"{name}, seed {seed}", {f"{cell}, seed {number}" for cell, number in runs})
    return found


def verdict(rows: pd.DataFrame, share: float = 0.01, ratio: float = 4.0, drained: float = 0.2) -> pd.DataFrame:
    """One row for each cell and seed, at the last step: a layer with emerged artifacts, else with the most outliers.

    emerged: at least `share` of the patches are above the layer's cutoff, their mean norm is at least `ratio` times the
    median, and their updates have at most `drained` of the length of the others (a NOP in Fesser et al.).
    """
    last = rows[rows.step == rows.groupby(["cell", "seed"]).step.transform("max")]
    emerged = (last.outlier_share >= share) & (last.norm_ratio >= ratio) & (last.value_ratio <= drained)
    order = ["emerged", "outlier_share", "place_norm", "attention"]
    best = last.assign(emerged=emerged).sort_values(order, ascending=False)
    best = best.groupby(["cell", "seed"], sort=False).head(1)
    best = best.sort_values(["cell", "seed"], key=lambda v: v.map(names().index) if v.name == "cell" else v)
    return best.set_index(["cell", "seed"])


def claims(
    verdicts: pd.DataFrame, without: str, having: str, seeds: int = 3
) -> list[tuple[str, bool | None, str, str]]:
    """(id, whether it holds, measured text, claim) for a cell without registers and its control with registers.

    The first claim is the criterion that was set before any run: all its conditions, in at least `seeds` seeds. The
    other claims must hold in every seed. With fewer than `seeds` seeds they are not testable (None), unless one fails.
    """
    plain, control = (verdicts[verdicts.index.get_level_values("cell") == name] for name in (without, having))

    def in_every(holds: pd.Series) -> bool | None:
        return False if not holds.all() else (True if len(holds) >= seeds else None)

    def percent(values: pd.Series) -> str:
        return ", ".join(f"{value:.0%}" for value in values)

    raised = (plain.outlier_share >= 0.01) & (plain.norm_ratio >= 4)
    gone = (control.outlier_share < 0.01) & (control.attention < 0.5 * plain.attention.mean())
    count, all_gone = int(plain.emerged.sum()), in_every(gone)
    of, other = f"by seed of {without!r}", f"by seed of {having!r}"
    ratios = ", ".join("none" if pd.isna(value) else f"{value:.1f}" for value in plain.norm_ratio)
    updates = ", ".join(f"{value:.2f}" for value in plain.value_ratio)
    kept = f"all of it in {count} of {len(plain)} seeds of {without!r}"
    return [
        (
            "ours-emerged",
            False if count < seeds or all_gone is False else all_gone,
            f"{kept}, gone in {gone.sum()} of {len(control)} of {having!r}",
            f"in {seeds} seeds 1 % of the patches are above the cutoff, at four medians, with a fifth of the others' "
            "update; with registers they are not",
        ),
        (
            "ours-sinks",
            in_every(plain.attention >= 0.5),
            f"{percent(plain.attention)} {of}",
            "patches that never matter take at least half of a head's attention, in every seed",
        ),
        (
            "ours-norms",
            in_every(raised),
            f"{percent(plain.outlier_share)} of the patches at {ratios} medians {of}",
            "at least 1 % of the patches lie above the cutoff, at four medians or more, in every seed",
        ),
        (
            "ours-drained",
            in_every(plain.value_ratio <= 0.2),
            f"{updates} {of}",
            "their updates have at most a fifth of the others' length, in every seed",
        ),
        (
            "ours-registers",
            all_gone,
            f"{percent(control.outlier_share)} outliers, attention there {percent(control.attention)} and on registers "
            f"{percent(control.prefix_attention)} {other}",
            "with registers trained in there are no outliers, and less than half of that attention, in every seed",
        ),
    ]


@styled
def birth(cells: dict[str, pd.DataFrame]) -> Figure:
    """Norm, attention and update of the idle places by training step and layer, one column of panels a cell.

    cells: {label: rows of one cell and seed, from `table`}. The top row shows the error at triggers and elsewhere.
    """
    figure, axes = plt.subplots(
        4, len(cells), figsize=(2.1 * len(cells) + 0.9, 5.6), squeeze=False, sharex="col", sharey="row"
    )
    for column, (label, rows) in zip(axes.T, cells.items(), strict=True):
        first = rows[rows.layer == rows.layer.min()]
        column[0].plot(first.step, first.trigger_error, color=PALETTE[1], label="triggers")
        column[0].plot(first.step, first.other_error, color=PALETTE[6], ls="--", label="other patches")
        for layer, part in rows.groupby("layer"):
            style = dict(color=PALETTE[layer % 6], marker=MARKS[layer % 6], ms=3, lw=1.2, label=f"block {layer}")
            column[1].plot(part.step, part.place_norm, **style)
            column[2].plot(part.step, 100 * part.attention, **style)
            column[3].plot(part.step, part.value_ratio, **style)
        column[0].set(title=label, yscale="log")
        column[1].set(yscale="log")
        column[1].axhline(4, color=WANTED, lw=3, alpha=0.6, zorder=0)
        column[3].axhline(0.2, color=WANTED, lw=3, alpha=0.6, zorder=0)
        column[2].axhline(100 * 4 / 36, color="#555555", ls=":", lw=1)
        column[3].set(xlabel="training step")
    for axis, name in zip(
        axes[:, 0],
        (
            "squared error",
            "norm at idle\nplaces / median",
            "attention they\nget (%)",
            "their update /\nthat of others",
        ),
        strict=True,
    ):
        axis.set_ylabel(name)
    axes[3, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(top=max(5.0, axes[1, 0].get_ylim()[1]))
    plain_log(axes[1, 0].yaxis)
    lines = [axes[row, 0].get_legend_handles_labels() for row in (0, 1)]
    handles, labels = (above + below for above, below in zip(*lines, strict=True))
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


@styled
def cells(verdicts: pd.DataFrame) -> Figure:
    """One line a cell, one point a seed: share of outliers, norm, attention and update at the end of training.

    verdicts: from `verdict`; yellow lines are the thresholds for emerged artifacts.
    """
    names = list(dict.fromkeys(verdicts.index.get_level_values("cell")))
    panels = {
        "outlier_share": ("patches above\nthe cutoff (%)", 100, 1.0),
        "norm_ratio": ("their norm / median\n(hollow: largest)", 1, 4.0),
        "attention": ("attention on\nidle places (%)", 100, None),
        "value_ratio": ("their update\n/ that of others", 1, 0.2),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(7.2, 0.2 * len(names) + 1.1), sharey=True)
    for axis, (name, (title, factor, wanted)) in zip(axes, panels.items(), strict=True):
        for place, cell in enumerate(names):
            part = verdicts.loc[[cell]]
            values, hollow = part[name], part[name].isna() & (name == "norm_ratio")
            values = factor * values.mask(hollow, part.largest).to_numpy()
            edges = np.where(part.emerged, PALETTE[1], PALETTE[0])
            faces = np.where(hollow, "white", edges)
            axis.scatter(values, np.full(len(values), place), s=20, c=faces, edgecolors=edges, zorder=3)
        if wanted is not None:
            axis.axvline(wanted, color=WANTED, lw=3, alpha=0.7, zorder=0)
        axis.set_xlabel(title)
    axes[1].set_xscale("log")
    plain_log(axes[1].xaxis)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


@styled
def images(batch) -> Figure:
    """Images of an `emergence.Batch` above their answers; triggers are framed, idle patches crossed."""
    count = len(batch.pixels)
    figure, axes = plt.subplots(2, count, figsize=(1.9 * count + 1.0, 4.0), squeeze=False)
    size = int(batch.trigger.shape[1] ** 0.5)
    for n, (above, below) in enumerate(axes.T):
        for axis, values in ((above, batch.texture[n]), (below, batch.answer[n])):
            pixels = values.view(size, size, 3, 2, 2).permute(0, 3, 1, 4, 2).reshape(2 * size, 2 * size, 3)
            axis.imshow((pixels / 6 + 0.5).clamp(0, 1).numpy(), extent=(0, size, size, 0))
            axis.set(xticks=range(size + 1), yticks=range(size + 1), xticklabels=[], yticklabels=[])
            axis.tick_params(length=0)
            for place in range(size * size):
                row, column = divmod(place, size)
                if batch.idle[n, place]:
                    axis.plot([column + 0.2, column + 0.8], [row + 0.2, row + 0.8], color="k", lw=1.5)
                    axis.plot([column + 0.2, column + 0.8], [row + 0.8, row + 0.2], color="k", lw=1.5)
                if batch.trigger[n, place]:
                    axis.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, ec=PALETTE[1], lw=2))
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    axes[1, 0].set_ylabel("answer", rotation=0, ha="right", va="center")
    return figure
