"""Figures of Tables 1, 4 and 6: scores and gaps by task, scores by number of registers; a mark a kind of token."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitreg_lib.plots.scores import dots
from vitreg_lib.plots.style import PALETTE, PAPER, styled

TOKENS = {  # colour, marker, what it is called
    "cls": (PALETTE[6], "|", "cls"),
    "normal": (PALETTE[0], "o", "random normal token"),
    "matched": (PALETTE[2], "s", "normal token next to the outlier"),
    "outlier": (PALETTE[1], "D", "outlier (or token at its place)"),
    "register": (PALETTE[3], "^", "register"),
}
ACROSS, FEW = 4, 5  # panels side by side, so that a figure fits a page; up to so many tasks a panel is short
MARKS = {token: (colour, marker) for token, (colour, marker, _) in TOKENS.items()}


@styled
def by_task(tables: dict, label: str = "right (%)") -> Figure:
    """Dots of scores with ± one standard deviation: a panel a table, a row a task, a mark a kind of token.

    tables: {title: DataFrame indexed by (task, token) with score and sd, 0 to 1, and chance where known}.
    """
    figure, axes = _panels([t.index.get_level_values(0).nunique() for t in tables.values()])
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        rows = (100 * table[["score", "sd"]]).rename_axis(["task", "token"]).reset_index()
        tasks = list(rows.task.unique())
        rows = rows.assign(low=rows.score - rows.sd, high=rows.score + rows.sd)
        dots(axis, rows, "score", "task", "token", MARKS, orient="h", dodge=False, markeredgewidth=1.6)
        if "chance" in table:
            chance = table.chance.groupby(level=0, sort=False).first()
            axis.scatter(100 * chance, [tasks.index(t) for t in chance.index], marker="x", s=14, color=PAPER, lw=1)
        axis.set(title=title, xlabel=label, ylim=(len(tasks) - 0.4, -0.6), xlim=(0, 102))
        axis.tick_params(axis="y", length=0, labelsize=8)
    shown = {token for table in tables.values() for token in table.index.unique(1)}
    _legend(
        figure,
        {TOKENS[token][2]: token for token in TOKENS if token in shown},
        any("chance" in t for t in tables.values()),
    )
    return figure


@styled
def gaps_by_task(tables: dict[str, dict], label: str = "outlier less other (points)") -> Figure:
    """Gaps with ± one standard deviation over draws: a panel a title, a row a task, a colour the token compared with.

    tables: {title: {token compared with: DataFrame by task with gap and sd, in points}}.
    """
    figure, axes = _panels([max(len(t) for t in found.values()) for found in tables.values()])
    for axis, (title, found) in zip(axes, tables.items(), strict=True):
        rows = pd.concat(found, names=["token", "task"]).reset_index()
        rows = rows.assign(low=rows.gap - rows.sd, high=rows.gap + rows.sd)
        styles = {token: MARKS[token] for token in found}
        dots(axis, rows, "gap", "task", "token", styles, orient="h", capsize=0.15)
        axis.axvline(0, color=PAPER, lw=0.8)
        axis.set(title=title, xlabel=label, ylim=(rows.task.nunique() - 0.3, -0.7))
        axis.tick_params(axis="y", length=0, labelsize=8)
    _legend(figure, {f"to a {TOKENS[t][2]}": t for t in TOKENS if any(t in found for found in tables.values())})
    return figure


def _panels(counts: list[int]) -> tuple[Figure, list]:
    """(figure, the axis of each panel), from the number of tasks in each. Short panels have rows of their own."""
    groups = [list(group) for _, group in itertools.groupby(counts, lambda count: count <= FEW)]
    lines = [group[i : i + ACROSS] for group in groups for i in range(0, len(group), ACROSS)]
    heights, columns = [0.21 * max(line) + 0.3 for line in lines], max(map(len, lines))
    size = (max(3.6, 2.1 * columns + 0.4), sum(heights) + 0.9 * len(lines))
    options = dict(figsize=size, height_ratios=heights, squeeze=False, sharex=True)
    figure, axes = plt.subplots(len(lines), columns, **options)
    for axis in (axis for row, line in zip(axes, lines, strict=True) for axis in row[len(line) :]):
        axis.remove()
    for axis in figure.axes:  # the lowest row alone has numbers where the axes are shared
        axis.tick_params(labelbottom=True)
    return figure, figure.axes


def _legend(figure: Figure, tokens: dict[str, str], chance: bool = False) -> None:
    """A legend above the panels: {text: kind of token}, and a cross for chance."""
    marks = {text: MARKS[token] for text, token in tokens.items()} | ({"chance": (PAPER, "x")} if chance else {})
    lines = [Line2D([], [], color=colour, marker=marker, ls="none", ms=5) for colour, marker in marks.values()]
    figure.legend(lines, marks, loc="outside upper center", ncols=min(len(lines), 3))


@styled
def by_registers(table, families: dict[str, dict[str, int]], label: str, paper: dict[str, dict[int, float]]) -> Figure:
    """Scores by number of registers: a panel a family of models, a line a kind of token, ± one standard deviation.

    table: DataFrame indexed by (model, token) with score and sd, 0 to 1; families: {title, broken at ", ": {model:
    registers}}; paper: {token: {registers: score in %}}, drawn in a panel of its own.
    """
    count = len(families) + 1
    figure, axes = plt.subplots(1, count, figsize=(1.9 * count + 0.9, 3.0), squeeze=False)
    scores, spread, drawn = table.score.to_dict(), table.sd.to_dict(), {}
    for axis, (title, models) in zip(axes[0], families.items(), strict=False):
        steps = sorted(set(models.values()))
        for token, (colour, marker, name) in TOKENS.items():
            known = sorted((number, model) for model, number in models.items() if (model, token) in scores)
            if known:
                x = [steps.index(number) for number, _ in known]
                y = [100 * scores[model, token] for _, model in known]
                error = [100 * np.nan_to_num(spread[model, token]) for _, model in known]
                style = {"color": colour, "marker": "_" if marker == "|" else marker, "ms": 9 if marker == "|" else 4}
                drawn[name] = axis.errorbar(x, y, error, lw=1, capsize=2, mew=1.6, **style)
        axis.set_xticks(range(len(steps)), steps)
        axis.set(title=title.replace(", ", "\n"), xlabel="registers", xlim=(-0.4, len(steps) - 0.6))
    top = max(axis.get_ylim()[1] for axis in axes[0, :-1])
    for axis in axes[0, :-1]:
        axis.set_ylim(0, top)
    axes[0, 0].set_ylabel(label)
    last = axes[0, -1]
    for token, values in paper.items():
        colour, marker, _ = TOKENS[token]
        last.plot(range(len(values)), list(values.values()), color=colour, marker="_", ms=9, mew=1.6, lw=1)
        last.set_xticks(range(len(values)), list(values))
    last.set(title="paper, Aircraft\n(DINOv2, cls alone legible)", xlabel="registers", ylim=(0, 100), xlim=(-0.4, 1.4))
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=3)
    return figure
