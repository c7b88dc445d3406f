"""Figures of the quest for the smallest ViT that needs registers (notebook beyond/emergence)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .plots import PALETTE, _plain_log, styled

WANTED = "#D4AC00"  # a yellow that is seen on white: what would count as emerged
MARKS = ("o", "s", "^", "D", "v", "P")  # layers are told apart by colour and by mark


@styled
def birth(cells: dict[str, pd.DataFrame]) -> Figure:
    """Norm, attention and value of the idle places by training step and layer, one column a cell.

    cells: {label: rows of one cell and seed, as `train.sweep.table`}. Above all the error at triggers and elsewhere.
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
    _plain_log(axes[1, 0].yaxis)
    lines = [axes[row, 0].get_legend_handles_labels() for row in (0, 1)]
    handles, labels = (above + below for above, below in zip(*lines, strict=True))
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


@styled
def cells(verdicts: pd.DataFrame) -> Figure:
    """One line a cell, one point a seed: share of outliers, norm, attention and value at the end of training.

    verdicts: as `train.sweep.verdict`; the yellow line is what counts as emerged.
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
    _plain_log(axes[1].xaxis)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


@styled
def images(batch) -> Figure:
    """Images of a `train.emergence.Batch`, its triggers framed, idle patches crossed, and the answers beside."""
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
