"""Figures of probes and scores by group of tokens: densities, dots by group and fit, scores with their intervals."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from .plots import PALETTE, PAPER, styled

GROUPS = {"normal": PALETTE[0], "outlier": PALETTE[1], "matched": PALETTE[2], "border": PALETTE[5]}
FITS = {"normal": "trained on normal", "all": "trained on all", "own": "trained on the group"}


@styled
def densities(values: dict[str, dict[str, torch.Tensor]], label: str, titles: dict[str, str] | None = None) -> Figure:
    """Densities of cosines by group, one panel a model, medians dotted. values: {model: {group: cosines}}.

    The axis is stretched towards 1 (by the logarithm of 1 - cosine), where uniform patches crowd.
    """
    marks = (0, 0.5, 0.9, 0.99, 0.999)
    width = 3.0 * len(values) + 0.8
    figure, axes = plt.subplots(1, len(values), figsize=(width, 2.8), squeeze=False, sharey=True)
    edges = np.linspace(_stretched(-0.6), _stretched(0.9995), 41)
    for axis, (name, found) in zip(axes[0], values.items(), strict=True):
        for group, numbers in found.items():
            x = _stretched(numbers.double().numpy()).clip(edges[0], edges[-1])
            share, _ = np.histogram(x, edges)
            axis.stairs(100 * share / len(x), edges, color=GROUPS[group], label=group, lw=1.5)
            axis.axvline(np.median(x), color=GROUPS[group], ls=":", lw=1.2)
        axis.set_xticks([_stretched(mark) for mark in marks], [f"{mark:g}" for mark in marks])
        axis.set(title=(titles or {}).get(name, name), xlabel=label)
    axes[0, 0].set_ylabel("tokens of the group (%)")
    axes[0, 0].plot([], [], color=PAPER, ls=":", lw=1.2, label="median of the group")
    widest = max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    figure.legend(*widest.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _stretched(cosine):
    return -np.log10(np.maximum(1 - cosine, 1e-6))


@styled
def by_group(tables: dict, columns: dict[str, str], cap: dict[str, float] | None = None, titles=None) -> Figure:
    """Dots of probe scores: a row a column of the tables, a panel a model, groups along x, a marker for each fit.

    tables: {model: DataFrame indexed by (group, fit)}; columns: {column: axis label}; cap: the top of a column's axis,
    where larger values are drawn with the fit's name and their number.
    """
    size = (2.2 * len(tables) + 1.0, 1.9 * len(columns) + 0.6)
    figure, axes = plt.subplots(len(columns), len(tables), figsize=size, squeeze=False, sharey="row")
    for number, (column, label) in enumerate(columns.items()):
        top = (cap or {}).get(column, np.inf)
        for axis, (name, table) in zip(axes[number], tables.items(), strict=True):
            groups = [g for g in table.index.get_level_values("group").unique() if table.loc[g, column].notna().any()]
            over = dict.fromkeys(groups, 0)  # numbers already written beside a group
            for (fit, told), marker, colour in zip(FITS.items(), "soD", (PAPER, PALETTE[4], PALETTE[0]), strict=True):
                values = np.array([table.loc[(group, fit), column] for group in groups])
                axis.plot(groups, values.clip(max=top), marker, color=colour, ms=5, alpha=0.9)
                for group, value in zip(groups, values, strict=True):
                    if value > top:
                        figures = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                        text = f"{told.removeprefix('trained on ')}: {figures}"
                        place = dict(xytext=(-5, -3 - 9 * over[group]), textcoords="offset points", ha="right")
                        axis.annotate(text, (group, top), fontsize=7, color=PAPER, **place)
                        over[group] += 1
            axis.margins(x=0.15)
            axis.tick_params(axis="x", labelsize=7)
            if not number:
                axis.set_title((titles or {}).get(name, name))
        highest = max(min(float(table[column].max()), top) for table in tables.values())
        axes[number, 0].set_ylim(0, 1.08 * highest)
        axes[number, 0].set_ylabel(label)
    figure.legend(axes[0, 0].get_lines()[:3], FITS.values(), loc="outside upper center", ncols=min(3, 1 + len(tables)))
    return figure


@styled
def scores(table, label: str, lines: dict[str, float]) -> Figure:
    """Scores with intervals: a group of dots a model, a colour for each setting; `lines` are baselines with a name.

    table: DataFrame indexed by (model, setting) with columns value, low, high.
    """
    models = list(table.index.get_level_values(0).unique())
    settings = list(table.index.get_level_values(1).unique())
    figure, axis = plt.subplots(figsize=(max(4.5, 1.25 * len(models) + 1.2), 3.2))
    for number, setting in enumerate(settings):
        found = table.xs(setting, level=1).reindex(models)
        x = np.arange(len(models)) + (number - (len(settings) - 1) / 2) * 0.16
        ends = [(found["value"] - found["low"]).clip(lower=0), (found["high"] - found["value"]).clip(lower=0)]
        style = dict(fmt="oDs^"[number % 4], ms=4, lw=1.2, color=PALETTE[number])
        axis.errorbar(x, found["value"], ends, label=setting, **style)
    for style, (name, value) in zip(("--", ":", "-."), lines.items(), strict=False):
        axis.axhline(value, color=PAPER, ls=style, lw=1, label=f"{name}: {value:.0f}")
    axis.set_xticks(
        range(len(models)), [m.replace("+", "\n+").replace("-reg", "\n-reg").replace(":", ":\n") for m in models]
    )
    axis.set(ylabel=label, xlim=(-0.6, len(models) - 0.4), ylim=(min(0, axis.get_ylim()[0]), None))
    axis.grid(axis="x", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def setting_grids(tables: dict, zero: float, label: str = "CorLoc − best baseline (points)") -> Figure:
    """Heat maps of a whole grid of settings: a row a kind of features, a column a model; layers down, biases across.

    tables: {model: DataFrame of `discovery.grid`}, CorLoc 0 to 1; `zero`, drawn white, is what costs nothing.
    """
    first = next(iter(tables.values()))
    kinds = [(site, unit) for site in first.index.unique("site") for unit in first.index.unique("normalised")]
    size = (1.15 * len(tables) + 1.9, 1.05 * len(kinds) + 1.3)
    figure, axes = plt.subplots(len(kinds), len(tables), figsize=size, squeeze=False)
    values = {name: 100 * (table.corloc - zero) for name, table in tables.items()}
    most = max(1.0, max(float(v.abs().max()) for v in values.values()))
    for number, (row, (site, unit)) in enumerate(zip(axes, kinds, strict=True)):
        for axis, (name, found) in zip(row, values.items(), strict=True):
            part = found.xs((site, unit), level=("site", "normalised")).unstack("bias")
            part = part[sorted(part.columns, reverse=True)]
            drawn = axis.imshow(part, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            axis.set_xticks(range(part.shape[1]), [f"{b:g}" for b in part.columns], fontsize=7, rotation=90)
            axis.set_yticks(range(part.shape[0]), part.index, fontsize=7)
            axis.grid(False)
            axis.tick_params(length=0, labelbottom=number == len(kinds) - 1, labelleft=axis is row[0])
            if number == 0:
                axis.set_title(name.replace("+", "\n+").replace("-reg", "\n-reg").replace(", ", ",\n"), fontsize=8)
        told = {"q": "queries", "k": "keys", "v": "values"}[site] + ("\nlength 1" if unit else "\nlengths kept")
        row[0].set_ylabel(f"{told}\nblock", fontsize=7)
        if number == len(kinds) - 1:
            for axis in row:
                axis.set_xlabel("bias", fontsize=7)
    figure.colorbar(drawn, ax=axes.ravel().tolist(), label=label, fraction=0.03, aspect=40, pad=0.02)
    return figure


@styled
def register_changes(fair, as_paper) -> Figure:
    """Table 5 as dots: what registers change in position and in pixels, two comparisons, spread over splits as bars.

    fair, as_paper: DataFrames of `probes.local.register_changes` with the same rows.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 0.42 * len(fair) + 1.5), sharey=True)
    panels = (("points", 0.0, (-2, 2), "position right, with − without (points)"),)
    panels += (("l2_ratio", 1.0, (0.95, 1.05), "pixel error, with / without"),)
    for axis, (column, none, band, label) in zip(axes, panels, strict=True):
        axis.axvspan(*band, color=PAPER, alpha=0.12, lw=0, label="counts as unchanged")
        axis.axvline(none, color=PAPER, lw=1)
        for shift, (name, table) in zip(
            (-0.13, 0.13), (("same places", fair), ("as the paper", as_paper)), strict=True
        ):
            y = np.arange(len(table)) + shift
            colour, marker = (PALETTE[0], "D") if shift < 0 else (PALETTE[4], "o")
            spread = table[f"{column}_sd"]
            axis.errorbar(table[column], y, xerr=spread, fmt=marker, ms=4, lw=1.2, color=colour, label=name)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
    value = {"points": -0.5, "l2_ratio": 16.0 / 15.9}
    for axis, column in zip(axes, value, strict=True):
        axis.plot([value[column]], [-0.75], "v", color=PAPER, clip_on=False, label="the paper's")
    axes[0].set_yticks(range(len(fair)), fair.index)
    axes[0].set_ylim(len(fair) - 0.5, -0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


TASKS = {"accuracy": ("top-1 (%)", 100), "miou": ("mIoU (%)", 100), "rmse": ("depth RMSE", 1)}


@styled
def task_scores(table, change, paper: dict[tuple[str, str], float] | None = None) -> Figure:
    """Table 2a as dots: above, every model's score (bar: standard deviation over seeds); below, what registers change.

    table, change: DataFrames of `probes.scores.table` and `changes` (bar: the middle 95 % of a bootstrap). paper:
    {(model with registers, task): change that the paper reports for its family}, drawn as triangles.
    """
    tasks = [task for task in TASKS if task in table]
    pairs = list(change.index.unique("model"))
    heights = [0.24 * len(table) + 0.3] + ([0.24 * len(pairs) + 0.3] if pairs else [])
    size = (2.5 * len(tasks) + 1.6, sum(heights) + 1.5)
    figure, axes = plt.subplots(len(heights), len(tasks), figsize=size, squeeze=False, height_ratios=heights)
    for column, task in enumerate(tasks):
        (label, factor), axis = TASKS[task], axes[0, column]
        y = np.arange(len(table))
        axis.errorbar(
            factor * table[task], y, xerr=factor * table[f"{task}_sd"], fmt="o", ms=4, lw=1.2, color=PALETTE[0]
        )
        axis.set(
            yticks=y, ylim=(len(table) - 0.5, -0.5), xlabel=label + (", lower is better" if task == "rmse" else "")
        )
        axis.set_yticklabels(table.index if column == 0 else [])
        if not pairs:
            continue
        axis, part = axes[1, column], change.xs(task, level="task").reindex(pairs)
        y = np.arange(len(pairs))
        ends = factor * np.array([part.change - part.low, part.high - part.change]).clip(min=0)
        axis.axvline(0, color=PAPER, lw=1)
        told = "change with registers"
        axis.errorbar(factor * part.change, y, xerr=ends, fmt="D", ms=4, lw=1.2, color=PALETTE[1], label=told)
        known = [
            (factor * (paper or {})[name, task], i) for i, name in enumerate(pairs) if (name, task) in (paper or {})
        ]
        if known:
            axis.plot(*zip(*known, strict=True), "v", color=PAPER, ms=5, label="the paper's change, of its own models")
        axis.set(yticks=y, ylim=(len(pairs) - 0.5, -0.5), xlabel="change of the " + label.replace("(%)", "(points)"))
        axis.set_yticklabels(pairs if column == 0 else [])
    for axis in axes.flat:
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5))
    if pairs:
        handles = [axis.get_legend_handles_labels() for axis in axes[1]]
        figure.legend(*max(handles, key=lambda h: len(h[1])), loc="outside upper center", ncols=2)
    return figure


@styled
def scores_by_registers(ladders: dict) -> Figure:
    """Figure 8, below: the three scores by the number of registers; one line a family, bars: spread over seeds.

    ladders: {family: DataFrame of `probes.scores.table` with a column registers}.
    """
    tasks = [task for task in TASKS if any(task in table for table in ladders.values())]
    counts = sorted({int(c) for table in ladders.values() for c in table.registers})
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 0.2, 2.7), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        label, factor = TASKS[task]
        for number, (name, table) in enumerate(ladders.items()):
            x = np.array([counts.index(int(c)) for c in table.registers]) + 0.06 * (number - (len(ladders) - 1) / 2)
            spread = factor * table[f"{task}_sd"]
            axis.errorbar(x, factor * table[task], spread, marker="o", ms=4, lw=1.2, color=PALETTE[number], label=name)
        axis.set_xticks(range(len(counts)), counts)
        axis.set(xlabel="registers", ylabel=label + ("\n(lower is better)" if task == "rmse" else ""))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
