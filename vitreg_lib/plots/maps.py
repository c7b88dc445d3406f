"""Figures of maps: attention, norms and components on the patches; positions of outliers; cost and effect of registers.

Each patch is one square of a map, never smoothed, because an artifact is one patch wide.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import ATTENTION, NORMS, PALETTE, PAPER, bare, picture, ring, styled, wrapped

COMPONENT = "RdBu_r"  # colour map of signed maps, white at zero


@styled
def sheet(
    pixels: torch.Tensor | None,
    groups: list[dict[str, torch.Tensor]],
    cmap: str | list[str] = ATTENTION,
    label: str = "",
    scale: str = "image",
    limits: tuple[float | None, float | None] = (None, None),
    rings: dict[str, torch.Tensor] | None = None,
    cutoffs: dict[str, float] | None = None,
    gamma: float = 1.0,
    cell: float = 1.5,
) -> Figure:
    """Images down, models across: the image, then a map of each model; models of one group (a pair) are adjacent.

    pixels: (n, 3, h, w), or None for no images. groups: {name: (n, rows, cols) or (n, 3, rows, cols) colours}; four
    maps or the maps of one group are side by side, further groups below. `scale`: the maps that share a colour scale:
    "group", all maps of a group; "image", those of one image in a group; "each", none, as in the paper. `limits`: ends
    of every scale. A flat map is grey. rings: {name: (n, rows, cols) bool}, patches to ring; cutoffs: {name: value}, a
    line in the colour bar. gamma below 1 shows small values. cmap: one, or one per group.
    """
    colours = [cmap] * len(groups) if isinstance(cmap, str) else cmap
    bands = _bands(list(zip(groups, colours, strict=True)))
    first = next(iter(groups[0].values()))
    most = max(sum(len(group) for group, _ in band) for band in bands)
    cell = min(cell, 9.6 / (most + (pixels is not None)))
    height = len(first) * cell * min(1.6, first.shape[-2] / first.shape[-1]) + 0.8
    figure = plt.figure(figsize=(cell * (most + (pixels is not None) + 0.15 * len(bands[0])), height * len(bands)))
    numbered = scale == "group" or None not in limits
    for part, band in zip(figure.subfigures(len(bands), 1, squeeze=False)[:, 0], bands, strict=True):
        for group, cmap, columns in _places(part, band, pixels, len(first), most):
            norms = _norms(group, scale, limits, gamma)
            for column, (name, maps) in zip(columns.T, group.items(), strict=True):
                column[0].set_title(wrapped(name), fontsize=8)
                for i, axis in enumerate(column):
                    draw_map(axis, maps[i], cmap, norms[name][i])
                    if rings and name in rings:
                        ring(axis, rings[name][i])
            if norms[name][0] is None:  # colours
                continue
            bar = _bar(part, columns, cmap, norms[name][0], label, None if numbered else scale)
            for cutoff in (cutoffs[name] for name in group if name in (cutoffs or {})):
                if norms[name][0].vmin < cutoff < norms[name][0].vmax:
                    bar.ax.axvline(cutoff, color="black", lw=3.5)
                    bar.ax.axvline(cutoff, color="white", lw=1.5)
    return figure


def _bands(groups: list[tuple], across: int = 4) -> list[list[tuple]]:
    """Groups in rows of at most `across` maps, or of one group that has more."""
    bands, room = [], 0
    for group in groups:
        room -= len(group[0])
        if room < 0:
            bands, room = [*bands, []], max(across - len(group[0]), 0)
        bands[-1].append(group)
    return bands


def _places(figure, band: list[tuple], pixels, count: int, most: int):
    """(group, colour map, axes (images, maps)) of each group of a band; the first column shows the images."""
    first = int(pixels is not None)
    widths = [1.0] * first
    for group, _ in band:
        widths += [0.12] * bool(widths) + [1.0] * len(group)
    widths += [1.0] * (most - sum(len(group) for group, _ in band))  # all bands have cells of one size
    axes = figure.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.axis("off")
    if first:
        axes[0, 0].set_title("image", fontsize=8)
        for axis, image in zip(axes[:, 0], pixels, strict=False):
            axis.imshow(picture(image))
    place = first
    for group, cmap in band:
        place += bool(place)
        yield group, cmap, axes[:, place : place + len(group)]
        place += len(group)


def _norms(group: dict[str, torch.Tensor], scale: str, limits: tuple, gamma: float) -> dict[str, list]:
    """The colour scale of each map of a group, (name, image); None for colours."""
    maps = {name: m.float().cpu() for name, m in group.items() if m.ndim == 3}
    result = {name: [None] * len(m) for name, m in group.items()}
    for name, values in maps.items():
        for i in range(len(values)):
            among = {"each": [values[i]], "image": [m[i] for m in maps.values()], "group": list(maps.values())}[scale]
            low, high = min(float(m.min()) for m in among), max(float(m.max()) for m in among)
            low, high = (end if given is None else given for end, given in zip((low, high), limits, strict=True))
            result[name][i] = PowerNorm(gamma, low, max(high, low + 1e-9))
    return result


def _bar(figure, axes, cmap: str, norm, label: str, scale: str | None):
    """The colour bar below a group: numbers of `norm`, or "least" and "largest" where each map has its own scale."""
    shown = ScalarMappable(PowerNorm(norm.gamma, 0, 1) if scale else norm, cmap)
    bar = figure.colorbar(shown, ax=axes.ravel().tolist(), location="bottom", aspect=16 * axes.shape[1], pad=0.02)
    bar.ax.xaxis.set_major_locator(MaxNLocator(min(4, 1 + axes.shape[1])))
    if scale:
        bar.set_ticks([0, 1], labels=["least", "largest"])
        label += (", " if label else "") + ("of each map" if scale == "each" else "of each image")
    bar.set_label(label)
    return bar


def draw_map(axis, values: torch.Tensor, cmap: str, norm=None) -> None:
    """One map (rows, cols), one square per patch, or colours (3, rows, cols); a flat map is grey."""
    if values.ndim == 3:
        axis.imshow(picture(values), interpolation="nearest")
        return
    values = values.float().cpu()
    if float(values.max() - values.min()) <= 1e-3 * float(values.abs().max()):
        axis.imshow(torch.full_like(values, 0.6), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "flat", transform=axis.transAxes, ha="center", va="center", fontsize=8)
    else:
        axis.imshow(values, cmap=cmap, norm=norm, interpolation="nearest")


@styled
def grids(maps: dict[str, torch.Tensor], label: str, cmap: str = NORMS, shared: bool = True, low=None) -> Figure:
    """One heat map (rows, cols) per name, side by side, above the profiles of its columns and of its rows.

    One colour scale for all where `shared`, from `low` (by default the least value). Maps of zeros are not drawn; a
    line of text names them.
    """
    drawn = {name: values.cpu() for name, values in maps.items() if values.any()} or dict(list(maps.items())[:1])
    size = (2.6 * len(drawn) + 1.2, 3.9)
    figure, axes = plt.subplots(2, len(drawn), figsize=size, height_ratios=[2.8, 1], squeeze=False)
    for (above, below), (name, values) in zip(axes.T, drawn.items(), strict=True):
        among = list(drawn.values()) if shared else [values]
        least = min(float(m.min()) for m in among) if low is None else low
        high = max(float(m.max()) for m in among)
        image = above.imshow(values, cmap=cmap, vmin=least, vmax=high if high > least else least + 1)
        bare(above)
        above.set_title(name.replace(", ", "\n"), fontsize=8)
        if name == list(drawn)[-1] or not shared:
            figure.colorbar(image, ax=above, fraction=0.046, pad=0.03, label=label)
        below.plot(values.mean(0), color=PALETTE[0], marker=".", ms=3, label="mean of column")
        below.plot(values.mean(1), color=PALETTE[1], ls="--", label="mean of row")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        below.set(xlabel="column or row", ylim=(min(0, float(values.mean(0).min()) * 1.2), None))
    axes[1, 0].set_ylabel("mean")
    none = "; ".join(name.replace("\n", " ") for name in maps if not maps[name].any())
    title = textwrap.fill(f"none at any place: {none}" if none else "", int(11 * size[0]))
    handles = axes[1, 0].get_legend_handles_labels()
    figure.legend(*handles, title=title, title_fontsize=8, loc="outside upper center", ncols=2)
    return figure


@styled
def bars(table: pd.DataFrame, label: str, line: float | None = None, line_label: str = "") -> Figure:
    """Grouped bars: one group per row of `table`, one colour per column."""
    figure, axis = plt.subplots(figsize=(max(3.6, 0.3 * table.size + 0.6 * len(table) + 1.4), 2.9))
    width = 0.8 / len(table.columns)
    for number, column in enumerate(table.columns):
        x = np.arange(len(table)) + (number - (len(table.columns) - 1) / 2) * width
        values = table[column].astype(float)
        axis.bar(x, values, width * 0.92, color=PALETTE[number % len(PALETTE)], label=str(column))
        for place, value in zip(x, values, strict=True):
            if not np.isfinite(value):
                axis.text(place, 0, "none", rotation=90, ha="center", va="bottom", fontsize=7, color=PAPER)
    if line is not None:
        axis.axhline(line, color=PAPER, ls="--", lw=1, label=line_label or None)
    axis.set_xticks(range(len(table)), [wrapped(str(name)) for name in table.index])
    axis.grid(axis="x", visible=False)
    axis.set_ylabel(label)
    if len(table.columns) > 1 or line_label:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure
