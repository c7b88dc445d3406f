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

from .drawn import HERE
from .plots import ATTENTION, NORMS, PALETTE, PAPER, picture, styled

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


def by_pair(maps: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Groups for `sheet`: each model without registers together with those that are the same with registers."""
    from .outliers import pairs

    base = pairs(list(maps))
    groups: dict[str, dict] = {name: {name: maps[name]} for name in maps if name not in base}
    for name, without in base.items():
        groups[without][name] = maps[name]
    return list(groups.values())


def _group(columns, group: dict[str, torch.Tensor], cmap: str, scale: str, limits):
    """Draw the maps of one group; the last picture, for a colour bar."""
    drawn = None
    values = torch.stack([m.float().amin((1, 2)) for m in group.values() if m.ndim == 3] or [torch.zeros(1)])
    tops = torch.stack([m.float().amax((1, 2)) for m in group.values() if m.ndim == 3] or [torch.ones(1)])
    for column, (name, maps) in zip(columns.T, group.items(), strict=True):
        column[0].set_title(_wrapped(name), fontsize=8)
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


def _wrapped(name: str) -> str:
    """A model's name on two lines where it is long."""
    for mark in ("+ttr", "-reg", ", ", " "):
        if len(name) > 11 and mark in name and "\n" not in name:
            head, tail = name.split(mark, 1)
            return f"{head},\n{tail}" if mark == ", " else f"{head}\n{mark.strip()}{tail}"
    return name


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
def cost(table: pd.DataFrame, measured: pd.DataFrame | None = None) -> Figure:
    """Figure 12: FLOPs and parameters added by registers, one line a model size; beside them what was measured."""
    panels = 2 if measured is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(2.7 * panels + 0.2, 3.0))
    for number, (key, part) in enumerate(table.groupby(["arch", "patch", "resolution"], sort=False)):
        arch, patch, resolution = key
        name, colour = f"ViT-{arch.capitalize()}/{patch}, {resolution} px", PALETTE[number % len(PALETTE)]
        axes[0].plot(part.registers, part.flops_percent, color=colour, marker=".", label=name)
        axes[1].plot(part.registers, part.params_percent, color=colour, marker=".", label=name)
    axes[0].plot([4, 16], [2, 6], marker="v", color=PAPER, ls="", label="the paper: < 2 % with 4, ≤ 6 % with 16")
    axes[0].set(xlabel="registers", ylabel="FLOPs added (%)")
    axes[1].set(xlabel="registers", ylabel="parameters added (%)", ylim=(0, None))
    if measured is not None:
        axes[2].plot(measured.registers, measured.seconds_percent, color=PALETTE[0], marker=".", label="time")
        axes[2].plot(measured.registers, measured.peak_percent, color=PALETTE[1], marker=".", label="peak memory")
        row = measured.iloc[0]
        axes[2].set_gid(HERE)
        axes[2].axhline(0, color=PAPER, lw=0.8)
        axes[2].set(xlabel="registers", ylabel="measured, added (%)")
        axes[2].set_title(f"this machine ({row.device}):\nViT-{row.arch.capitalize()}/{row.patch}, {row.resolution} px")
        axes[2].legend()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=panels)
    return figure


@styled
def token_flow(grid: tuple[int, int], num_registers: int, has_cls: bool, dim: int, depth: int, name: str) -> Figure:
    """Figure 6: which tokens enter the blocks and which leave the model, drawn from a model's own sizes."""
    figure, axis = plt.subplots(figsize=(7.2, 2.9))
    patches = grid[0] * grid[1]
    kinds = [("cls", int(has_cls), PALETTE[2]), ("register", num_registers, PALETTE[1]), ("patch", patches, PALETTE[0])]
    shown = [(kind, i, colour) for kind, n, colour in kinds for i in range(min(n, 6 if kind == "patch" else 8))]
    gap = 10.0 / max(len(shown) + 1, 8)
    for place, (kind, i, colour) in enumerate(shown):
        x = 0.4 + place * gap
        for y, kept in ((0.0, True), (2.5, kind != "register")):
            style = dict(facecolor=colour if kept else "white", edgecolor=colour, lw=1.2, ls="-" if kept else "--")
            axis.add_patch(
                matplotlib.patches.FancyBboxPatch((x, y), gap * 0.62, 0.5, boxstyle="round,pad=0.04", **style)
            )
        if kind == "register":
            axis.plot([x, x + gap * 0.62], [2.5, 3.0], color=colour, lw=1.2)
        middle = x + gap * 0.31
        for low, high in ((0.58, 1.02), (1.98, 2.42)):
            axis.annotate("", (middle, high), (middle, low), arrowprops=dict(arrowstyle="->", color="#444444", lw=0.8))
        text = {"cls": "cls", "register": f"reg {i + 1}", "patch": f"patch {i + 1}"}[kind]
        axis.text(middle, -0.12, text, ha="center", va="top", fontsize=7)
    right = 0.4 + len(shown) * gap
    axis.add_patch(
        matplotlib.patches.FancyBboxPatch(
            (0.3, 1.1), right - 0.4, 0.8, boxstyle="round,pad=0.04", facecolor="#eeeeee", edgecolor="#444444"
        )
    )
    axis.text((0.3 + right) / 2, 1.5, f"{depth} transformer blocks, width {dim}", ha="center", va="center")
    total = patches + num_registers + int(has_cls)
    for y, text in (
        (0.25, f"… {patches} patches\nin: {total} tokens"),
        (2.75, f"out: {total - num_registers} tokens,\n{num_registers} register{'s' * (num_registers != 1)} dropped"),
    ):
        axis.text(right + 0.05, y, text, va="center", fontsize=8)
    axis.set(xlim=(0, right + 2.4), ylim=(-0.5, 3.2), title=f"{name}: {grid[0]} × {grid[1]} patches")
    axis.axis("off")
    return figure


@styled
def dose(table: pd.DataFrame, panels: dict[str, str], zero: dict[str, float] | None = None) -> Figure:
    """Curves over the number of registers: one panel a measure, one line a kind of intervention.

    table: columns registers, kind and one a measure; `panels`: {measure: its axis label}; `zero`: the untouched model's
    values, drawn as a line.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns + 0.2, 2.2 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (measure, text) in zip(axes.flat, panels.items(), strict=False):
        for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
            # curves often coincide: the first are drawn wide, so that the later ones do not hide them
            style = dict(marker="so^"[number % 3], ms=8 - 2 * number, lw=3.5 - number)
            axis.plot(range(len(part)), part[measure], color=PALETTE[number], label=kind, **style)
        counts = table.registers.unique()
        axis.set_xticks(range(len(counts)), [f"{c:g}" for c in counts])
        if zero and measure in zero:
            axis.axhline(zero[measure], color=PAPER, ls="--", lw=1, label="untouched")
        axis.set(xlabel="registers added", ylabel=text)
        if 0 <= table[measure].min() < 0.5 * table[measure].max():  # else the curves would be flat at the top
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
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
    axis.set_xticks(range(len(table)), [_wrapped(str(name)) for name in table.index])
    axis.grid(axis="x", visible=False)
    axis.set_ylabel(label)
    if len(table.columns) > 1 or line_label:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@styled
def matrix(values: dict[str, torch.Tensor], names: list[str], label: str) -> Figure:
    """Square matrices (K, K) of one number for each pair, side by side, with the numbers written in."""
    figure, axes = plt.subplots(1, len(values), figsize=(2.6 * len(values) + 0.5, 2.7), squeeze=False)
    for axis, (title, square) in zip(axes[0], values.items(), strict=True):
        drawn = axis.imshow(square.cpu(), cmap=COMPONENT, vmin=-1, vmax=1)
        for i, row in enumerate(square.tolist()):
            for j, value in enumerate(row):
                axis.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if abs(value) > 0.7 else "black",
                )
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.grid(False)
        axis.set_title(title)
    figure.colorbar(drawn, ax=axes[0].tolist(), fraction=0.04, label=label)
    return figure


@styled
def discovery(pixels: torch.Tensor, found: dict, patch_sizes: dict[str, int], truth: list | None = None) -> Figure:
    """Figure 13: LOST step by step; a row a model, four panels an image.

    found: {model: `lost.Lost` with intermediates, of the images in pixels (n, 3, h, w)}; truth: boxes of each image.
    Inverse degree (bright: linked to few, the seed crossed); similarity to the seed and expansion, white at 0, where
    LOST cuts; the part that holds the seed, LOST's box (solid) and the true boxes (dashed).
    """
    titles = ("inverse\ndegree", "similarity\nto seed", "seed\nexpansion", "box")
    figure, axes = _rows_of_panels(list(found), len(pixels), titles)
    for row, (name, result) in zip(axes, found.items(), strict=True):
        rows, cols = result.degrees.shape[1:]
        for i, panels in enumerate(row):
            panels[0].imshow(-result.degrees[i].numpy(), cmap=NORMS, interpolation="nearest")
            for axis, values in zip(panels[1:3], (result.seed_similarity[i], result.expansion[i]), strict=True):
                _signed(axis, values)
            for axis in panels[:3]:
                axis.plot(
                    int(result.seeds[i]) % cols, int(result.seeds[i]) // cols, "x", color=PALETTE[1], ms=5, mew=1.6
                )
            image = picture(pixels[i])
            part = result.component[i].repeat_interleave(image.shape[0] // rows, 0)
            part = part.repeat_interleave(image.shape[1] // cols, 1).numpy()[..., None]
            panels[3].imshow(np.where(part, image, 0.65 + 0.35 * image))
            for box in [] if truth is None else truth[i]:
                _box(panels[3], box, PALETTE[0], "--")
            _box(panels[3], result.boxes[i] * patch_sizes[name], PALETTE[1], "-")
    return figure


@styled
def expansions(pixels: torch.Tensor, maps: dict[str, dict[str, torch.Tensor]], spots: dict | None = None) -> Figure:
    """Figure 14: seed expansion from several kinds of features; a row a model, a panel a kind for each image.

    maps: {model: {kind: (images, rows, cols)}}, drawn white at 0; spots: masks of the same shapes, ringed.
    """
    kinds = tuple(next(iter(maps.values())))
    figure, axes = _rows_of_panels(list(maps), len(pixels), ("image", *kinds))
    for row, (name, found) in zip(axes, maps.items(), strict=True):
        for i, panels in enumerate(row):
            panels[0].imshow(picture(pixels[i]))
            for axis, kind in zip(panels[1:], kinds, strict=True):
                _signed(axis, found[kind][i])
                if spots is not None:
                    place = spots[name][kind][i].nonzero()
                    axis.scatter(place[:, 1], place[:, 0], s=30, facecolors="none", edgecolors="black", linewidths=1)
    return figure


def _rows_of_panels(names: list[str], count: int, titles: tuple[str, ...], cell: float = 0.95):
    """(figure, axes (names, images, titles)), bare, names on the left, a gap between images."""
    widths = ([1.0] * len(titles) + [0.12]) * count
    figure = plt.figure(figsize=(cell * sum(widths) + 1.0, cell * len(names) + 0.5))
    grid = figure.subplots(len(names), len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for axis, name in zip(grid[:, 0], names, strict=True):
        axis.set_ylabel(_wrapped(name), rotation=0, ha="right", va="center", fontsize=8)
    axes = grid.reshape(len(names), count, len(titles) + 1)[..., :-1]
    for panels in axes[0]:
        for axis, title in zip(panels, titles, strict=True):
            axis.set_title(title, fontsize=8)
    return figure, axes


def _signed(axis, values: torch.Tensor) -> None:
    """A map in two colours, white at 0."""
    most = float(values.abs().max()) or 1.0
    axis.imshow(values.numpy(), cmap=COMPONENT, vmin=-most, vmax=most, interpolation="nearest")


def _box(axis, box: torch.Tensor, colour: str, style: str) -> None:
    left, top, right, bottom = (float(v) - 0.5 for v in box)
    axis.add_patch(
        matplotlib.patches.Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=colour, ls=style, lw=1.4, clip_on=False
        )
    )
