"""Figures in one visual style: legible at the width of a notebook cell and of a paper's column, safe for colour-blind
readers, the paper's value as a labelled line, profile and models in the caption.

Every function takes tensors or data frames and returns a matplotlib Figure, unsaved.
"""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

NORMS = "viridis"  # colour map of norms
ATTENTION = "magma"  # colour map of attention
# Okabe and Ito's colours, told apart by all readers
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
PAPER = "#555555"  # lines that show the paper's values

STYLE = {
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "vitreg",
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "figure.constrained_layout.use": True,
}


def styled(function):
    """Draw in the collection's style and leave the reader's own settings as they were."""
    import functools

    @functools.wraps(function)
    def inner(*args, **kwargs):
        with plt.rc_context(STYLE):
            return function(*args, **kwargs)

    return inner


def caption(figure: Figure, text: str) -> Figure:
    """Put a line below the figure: which profile, which models, which images made it."""
    import textwrap

    width = int(figure.get_figwidth() * 17)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=7, color="#444444")
    return figure


def picture(pixels: torch.Tensor) -> np.ndarray:
    """(3, height, width) pixels in [0, 1] as matplotlib wants them."""
    return pixels.clamp(0, 1).permute(1, 2, 0).cpu().numpy()


@styled
def image_grid(
    rows: list[tuple[str, list]],
    columns: list[str] | None = None,
    cmap: str = NORMS,
    scale: str = "row",
    label: str = "norm",
    cell: float = 1.35,
) -> Figure:
    """A grid of pictures with labels on its margins.

    rows: (label, cells); a cell is (3, h, w) pixels, an (r, c) map, or None for an empty place. Maps share a colour
    scale per `scale`: "row", "all" or "each"; the colour bar says `label`.
    """
    count = max(len(cells) for _, cells in rows)
    figure, axes = plt.subplots(len(rows), count, figsize=(cell * count + 1.2, cell * len(rows) + 0.4), squeeze=False)
    maps = [[c for c in cells if c is not None and c.ndim == 2] for _, cells in rows]
    everything = [m for row in maps for m in row]
    for (name, cells), row_axes, row_maps in zip(rows, axes, maps, strict=True):
        drawn = None
        for axis, content in zip(row_axes, list(cells) + [None] * (count - len(cells)), strict=True):
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(False)
            if content is None:
                continue
            if content.ndim == 3:
                axis.imshow(picture(content))
                continue
            pool = {"row": row_maps, "all": everything, "each": [content]}[scale]
            low, high = min(float(m.min()) for m in pool), max(float(m.max()) for m in pool)
            drawn = axis.imshow(content.cpu(), cmap=cmap, vmin=low, vmax=high)
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        if drawn is not None and scale != "each":
            figure.colorbar(drawn, ax=list(row_axes), fraction=0.02, pad=0.01, label=label)
    for axis, title in zip(axes[0], columns or [], strict=False):
        axis.set_title(title, fontsize=8)
    return figure


@styled
def norm_maps(
    pixels, maps: dict[str, torch.Tensor], cutoffs: dict[str, float], outliers: dict[str, torch.Tensor]
) -> Figure:
    """Figure 3, left: images and, for each model, its norm map (images, rows, cols) with outliers ringed."""
    n = min(len(pixels), 4)
    figure, axes = plt.subplots(1 + len(maps), n, figsize=(1.5 * n + 1.3, 1.5 * (1 + len(maps))), squeeze=False)
    for i in range(n):
        axes[0, i].imshow(picture(pixels[i]))
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center", fontsize=8)
    for row, (name, norms) in zip(axes[1:], maps.items(), strict=True):
        high = max(float(norms[:n].max()), 1e-6)
        for i in range(n):
            drawn = row[i].imshow(norms[i].cpu(), cmap=NORMS, vmin=0, vmax=high)
            place = outliers[name][i].view(norms.shape[1:]).nonzero().cpu()
            row[i].scatter(place[:, 1], place[:, 0], s=28, facecolors="none", edgecolors=PALETTE[1], linewidths=1.2)
        row[0].set_ylabel(name.replace(".", ".\n", 1), rotation=0, ha="right", va="center", fontsize=8)
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01, label="L2 norm")
        if cutoffs[name] <= high:
            bar.ax.axhline(cutoffs[name], color=PALETTE[1], lw=1.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    return figure


@styled
def histograms(
    norms: dict[str, torch.Tensor], cutoffs: dict[str, float], paper: str | None = None, columns: int = 3
) -> Figure:
    """Histogram of patch norms for each model, on log axes, with its cutoff and the share of tokens above it."""
    columns = min(columns, len(norms))
    rows = -(-len(norms) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns, 2.3 * rows), squeeze=False, sharey=True)
    for axis, (name, values) in zip(axes.flat, norms.items(), strict=False):
        values = values.flatten().cpu()
        cut = cutoffs[name]
        low, high = max(float(values.min()), 1e-3), max(float(values.max()), min(cut, 1e6) * 1.1)
        edges = np.geomspace(low * 0.95, high * 1.05, 80)
        axis.hist(values.numpy(), bins=edges, color=PALETTE[0])
        axis.axvline(
            float(values.median()), color=PALETTE[2], lw=1, ls=":", label=f"median {float(values.median()):.3g}"
        )
        share = (values > cut).float().mean().item()
        label = f"cutoff {cut:.3g}: {share:.2%} above" if np.isfinite(cut) else "no cutoff: one mode"
        axis.axvline(min(cut, high * 1.04), color=PALETTE[1], lw=1.3, ls="-" if np.isfinite(cut) else "", label=label)
        axis.set(xscale="log", yscale="log", title=name, xlabel="L2 norm of patch tokens")
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28))
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens")
    for axis in axes.flat[len(norms) :]:
        axis.set_visible(False)
    if paper:
        figure.suptitle(paper, fontsize=8, color=PAPER)
    return figure


def _bands(axis, x, levels: dict[float, np.ndarray], colour) -> None:
    """Median line, the middle half and the middle 98 % as bands, the largest value dashed."""
    axis.fill_between(x, levels[0.01], levels[0.99], color=colour, alpha=0.18, lw=0, label="1 to 99 %")
    axis.fill_between(x, levels[0.25], levels[0.75], color=colour, alpha=0.35, lw=0, label="middle half")
    axis.plot(x, levels[0.5], color=colour, label="median")
    axis.plot(x, levels[1.0], color=PALETTE[1], lw=1, ls="--", label="largest")


@styled
def norms_by_layer(tables: dict[str, pd.DataFrame], onsets: dict[str, int | None] | None = None) -> Figure:
    """Figure 4(a): quantiles of patch norms after each block, one panel a model; tables as `telemetry.table`."""
    figure, axes = plt.subplots(1, len(tables), figsize=(2.6 * len(tables) + 0.4, 2.8), squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        levels = {q: table[f"q{q:g}"].to_numpy() for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)}
        _bands(axis, table.layer, levels, PALETTE[0])
        onset = (onsets or {}).get(name)
        if onset is not None:
            axis.axvline(onset, color=PALETTE[2], ls=":", label=f"outliers from block {onset}")
        axis.set(title=name, xlabel="block", yscale="log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=7))
        if onset is not None:
            axis.legend(handles=[axis.lines[-1]], loc="upper left")
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5
    ) if not onsets else _shared_legend(figure, axes[0, 0])
    return figure


def _shared_legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    kept = [(h, l) for h, l in zip(handles, labels, strict=True) if not l.startswith("outliers from")]
    figure.legend(*zip(*kept, strict=True), loc="outside lower center", ncols=4)


@styled
def norms_by_step(tables: dict[str, pd.DataFrame]) -> Figure:
    """Figure 4(b): norms of the last block along training (above) and the share set apart at any block (below)."""
    figure, axes = plt.subplots(2, len(tables), figsize=(3.2 * len(tables) + 0.4, 4.0), squeeze=False, sharex="col")
    for column, (name, table) in zip(axes.T, tables.items(), strict=True):
        last = table[table.layer == table.layer.max()]
        share = last.step / last.step.max()
        levels = {q: last[f"q{q:g}"].to_numpy() for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)}
        _bands(column[0], share, levels, PALETTE[0])
        column[0].set(title=name, yscale="log")
        worst = table.groupby("step").outlier_share.max()
        column[1].plot(worst.index / worst.index.max(), 100 * worst, color=PALETTE[0])
        column[1].axvline(1 / 3, color=PAPER, ls=":")
        column[1].annotate(
            "paper: from 1/3 on",
            (1 / 3, 0.9),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color=PAPER,
            xytext=(3, 0),
            textcoords="offset points",
        )
        column[1].set(xlabel="share of training", ylim=(0, max(1.0, 110 * worst.max())))
        for axis in column[:1]:
            axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0, 0].set_ylabel("L2 norm, last block")
    axes[1, 0].set_ylabel("tokens above 3 × median,\nworst block (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def norms_by_size(norms: dict[str, torch.Tensor]) -> Figure:
    """Figure 4(c): output norms / their median, one violin a model, smallest first; the line at 3 is the cutoff."""
    figure, axis = plt.subplots(figsize=(1.5 * len(norms) + 1.2, 2.8))
    ratios = [(v.flatten() / v.median()).cpu() for v in norms.values()]
    # quantiles would hide the few that matter: bodies show the bulk, points the highest 0.5 %
    bodies = axis.violinplot([r.log10().numpy() for r in ratios], showextrema=False, widths=0.8)
    for body in bodies["bodies"]:
        body.set(facecolor=PALETTE[0], alpha=0.5)
    for place, ratio in enumerate(ratios, 1):
        top = ratio.sort(descending=True).values[: max(1, len(ratio) // 200)].log10()
        spread = place + 0.12 * (torch.rand(len(top), generator=torch.Generator().manual_seed(0)) - 0.5)
        axis.scatter(spread, top, s=3, color=PALETTE[1], linewidths=0)
    axis.axhline(np.log10(3), color=PALETTE[2], ls="--", lw=1, label="3 × median")
    low = min(float(r.min()) for r in ratios)
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50)
        if low * 0.9 <= t <= max(float(r.max()) for r in ratios) * 1.3 or t in (1, 3)
    ]
    axis.set_yticks(np.log10(ticks), [f"{t:g}" for t in ticks])
    axis.set_xticks(range(1, len(norms) + 1), [n.replace(" ", "\n") for n in norms])
    axis.set_ylabel("patch norm / median")
    axis.legend(loc="upper right")
    return figure


@styled
def token_kinds(tables: dict[str, dict[str, torch.Tensor]]) -> Figure:
    """Figure 15: norms of patches, cls and each register apart; one panel a model, {kind: norms}."""
    figure, axes = plt.subplots(1, len(tables), figsize=(2.7 * len(tables) + 0.5, 2.9), squeeze=False, sharey=True)
    for axis, (name, kinds) in zip(axes[0], tables.items(), strict=True):
        for place, (kind, values) in enumerate(kinds.items()):
            colour = PALETTE[0] if kind == "patches" else PALETTE[2] if kind == "cls" else PALETTE[1]
            values = values.flatten().cpu().numpy()
            if len(values) > 1 and np.ptp(values) > 0:
                body = axis.violinplot(np.log10(values), [place], showextrema=False, widths=0.8)["bodies"][0]
                body.set(facecolor=colour, alpha=0.5)
            axis.plot([place - 0.3, place + 0.3], [np.log10(np.median(values))] * 2, color=colour, lw=1.5)
            axis.plot([place], [np.log10(values.max())], marker="_", color=colour, ms=6)
        axis.set_xticks(range(len(kinds)), list(kinds), rotation=45, ha="right")
        axis.set_title(name)
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{10**v:.3g}"))
    axes[0, 0].set_ylabel("L2 norm at the output\n(line: median, tick: largest)")
    return figure
