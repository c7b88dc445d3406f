"""Figures of maps: attention, norms and components on the patches; where outliers sit; what registers cost and do.

As in `plots`: tensors or data frames in, a matplotlib Figure out, unsaved, in the same style. Maps are drawn one square
a patch, never smoothed: an artifact is one patch wide.
"""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .style import ATTENTION, NORMS, PALETTE, PAPER, picture, styled, wrapped

COMPONENT = "RdBu_r"  # colour map of signed maps, white at zero


@styled
def sheet(
    pixels: torch.Tensor | None,
    groups: list[dict[str, torch.Tensor]],
    cmap: str | list[str] = ATTENTION,
    label: str = "",
    scale: str = "each",
    limits: tuple[float, float] | None = None,
    cell: float = 1.15,
) -> Figure:
    """Images down, models across: the image, then a map of each model; models in one group belong together.

    pixels: (n, 3, h, w), or None for no images. groups: {name: (n, rows, cols) or (n, 3, rows, cols) colours}. `scale`
    "each": black to white from the least to the largest value of each map, as in the paper. "group": one scale for all
    maps of a group, with a colour bar of `label`; "image": one for each image in a group. `limits` sets the scale.
    cmap: a colour map, or one for each group.
    """
    count = len(next(iter(groups[0].values())))
    shape = next(iter(groups[0].values())).shape[-2:]
    first = 0 if pixels is None else 1
    widths = [1.0] * first
    for group in groups:
        widths += ([0.12] if widths else []) + [1.0] * len(group)
    bar = scale == "group" or limits is not None
    height = count * cell * min(1.6, shape[0] / shape[1]) + (0.75 if bar else 0.35)
    figure = plt.figure(figsize=(cell * sum(widths) + 0.1, height))
    axes = figure.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.axis("off")
    if first:
        axes[0, 0].set_title("image", fontsize=8)
        for axis, image in zip(axes[:, 0], pixels, strict=False):
            axis.imshow(picture(image))
    place = first
    colours = [cmap] * len(groups) if isinstance(cmap, str) else cmap
    for group, cmap in zip(groups, colours, strict=True):
        place += 1 if place else 0
        columns = axes[:, place : place + len(group)]
        drawn = _group(columns, group, cmap, scale, limits)
        if bar:
            figure.colorbar(
                drawn, ax=columns.ravel().tolist(), location="bottom", label=label, aspect=18 * len(group), pad=0.02
            )
        place += len(group)
    return figure


@styled
def query_view(pixels: torch.Tensor, attention: torch.Tensor, norms: torch.Tensor, query: str, title: str) -> Figure:
    """One image (3, h, w), the attention of one query in multiples of even attention, and the norms, (rows, cols)."""
    figure, axes = plt.subplots(1, 3, figsize=(6.6, 2.7))
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(picture(pixels))
    axes[0].set_title("image")
    for axis, content, cmap, text, unit in (
        (axes[1], attention, ATTENTION, f"attention of {query}", "× even attention"),
        (axes[2], norms, NORMS, "norm", "L2 norm"),
    ):
        low, high = _range(content)
        drawn = axis.imshow(content.cpu(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(text)
        figure.colorbar(drawn, ax=axis, location="bottom", label=unit, aspect=18, pad=0.03)
    figure.suptitle(title, fontsize=9)
    return figure


def by_pair(maps: dict[str, torch.Tensor], pairs: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """Groups for `sheet`: each model together with the same with registers.

    pairs: {model with registers: the same model without}, as `pairs.pairs` gives it.
    """
    groups: dict[str, dict] = {name: {name: maps[name]} for name in maps if name not in pairs}
    for name, without in pairs.items():
        while without in pairs:  # registers added to a model that has its own
            without = pairs[without]
        groups[without][name] = maps[name]
    return list(groups.values())


def _group(columns, group: dict[str, torch.Tensor], cmap: str, scale: str, limits):
    """Draw the maps of one group; the last picture, for a colour bar."""
    drawn = None
    values = torch.stack([m.float().amin((1, 2)) for m in group.values() if m.ndim == 3] or [torch.zeros(1)])
    tops = torch.stack([m.float().amax((1, 2)) for m in group.values() if m.ndim == 3] or [torch.ones(1)])
    for column, (name, maps) in zip(columns.T, group.items(), strict=True):
        column[0].set_title(wrapped(name), fontsize=8)
        for i, (axis, content) in enumerate(zip(column, maps, strict=False)):
            if content.ndim == 3:
                axis.imshow(picture(content), interpolation="nearest")
                continue
            content = content.float().cpu()
            low, high = (
                limits
                or {
                    "each": _range(content),
                    "image": (float(values[:, i].min()), float(tops[:, i].max())),
                    "group": (float(values.min()), float(tops.max())),
                }[scale]
            )
            drawn = axis.imshow(content, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    return drawn


def _range(content: torch.Tensor) -> tuple[float, float]:
    """Least and largest value; a map that is flat but for rounding is drawn in a middle tone."""
    low, high = float(content.min()), float(content.max())
    return (low, high) if high - low > 1e-3 * abs(high) else (low - abs(high), high + abs(high))


@styled
def grids(maps: dict[str, torch.Tensor], label: str, cmap: str = NORMS, shared: bool = True, low=None) -> Figure:
    """One heat map (rows, cols) a name, side by side, and below it the profiles of its columns and of its rows.

    One colour scale for all where `shared`, from `low` (by default the least value). A map of zeros says "none".
    """
    figure, axes = plt.subplots(
        2, len(maps), figsize=(2.2 * len(maps) + 0.5, 3.4), height_ratios=[2.6, 1], squeeze=False
    )
    pool = torch.cat([m.flatten() for m in maps.values()])
    for (above, below), (name, values) in zip(axes.T, maps.items(), strict=True):
        values = values.cpu()
        scale = pool if shared else values
        least = float(scale.min()) if low is None else low
        high = float(scale.max()) if float(scale.max()) > least else least + 1
        drawn = above.imshow(values, cmap=cmap, vmin=least, vmax=high)
        above.set(xticks=[], yticks=[])
        above.set_title(name.replace(", ", "\n"), fontsize=8)
        above.grid(False)
        if not values.any():
            above.text(0.5, 0.5, "none", transform=above.transAxes, color="white", ha="center", va="center")
        elif name == list(maps)[-1] or not shared:
            figure.colorbar(drawn, ax=above, fraction=0.046, pad=0.03, label=label)
        below.plot(values.mean(0), color=PALETTE[0], marker=".", ms=3, label="mean of column")
        below.plot(values.mean(1), color=PALETTE[1], ls="--", label="mean of row")
        below.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=5))
        below.set(xlabel="column or row", ylim=(min(0, float(values.mean(0).min()) * 1.2), None))
    axes[1, 0].set_ylabel("mean")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@styled
def bars(table: pd.DataFrame, label: str, line: float | None = None, line_label: str = "", errors=None) -> Figure:
    """Grouped bars: one group a row of `table`, one colour a column; `errors` a table of the same shape."""
    figure, axis = plt.subplots(figsize=(max(3.6, 0.3 * table.size + 0.6 * len(table) + 1.4), 2.9))
    width = 0.8 / len(table.columns)
    for number, column in enumerate(table.columns):
        x = np.arange(len(table)) + (number - (len(table.columns) - 1) / 2) * width
        error = None if errors is None else errors[column]
        values = table[column].astype(float)
        axis.bar(x, values, width * 0.92, yerr=error, color=PALETTE[number % len(PALETTE)], label=str(column))
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
