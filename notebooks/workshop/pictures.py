"""Figures of the workshop: histograms of norms by block, boxes on images, bars with chance levels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vitreg_lib.plots.style import NORMS, PALETTE, PAPER, bare, draw_box, picture, plain_log, styled


@styled
def crowds(norms: dict[str, torch.Tensor], bins: int = 60) -> Figure:
    """Histograms of patch norms after every block, side by side; white: no token.

    norms: {model: (images, layers, patches)}, one panel a model. Colours are on a log scale, so that one token among
    thousands is visible.
    """
    figure, axes = plt.subplots(1, len(norms), figsize=(3.2 * len(norms) + 0.4, 3.2), squeeze=False)
    for axis, (name, values) in zip(axes[0], norms.items(), strict=True):
        edges = np.geomspace(float(values.min()) * 0.95, float(values.max()) * 1.05, bins + 1)
        counts = np.stack([np.histogram(layer.flatten().numpy(), edges)[0] for layer in values.cpu().unbind(1)], 1)
        shown = np.ma.masked_equal(counts, 0)
        blocks = np.arange(values.shape[1] + 1) - 0.5
        drawn = axis.pcolormesh(blocks, edges, shown, cmap=NORMS + "_r", norm=LogNorm(1, counts.max()))
        axis.set(title=name, xlabel="block (from 0)", yscale="log", xticks=range(values.shape[1]))
        plain_log(axis.yaxis)
        axis.grid(False)
        figure.colorbar(drawn, ax=axis)
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    drawn.colorbar.set_label("tokens")
    return figure


@styled
def shares(values: dict[str, float], label: str, chance: dict[str, float] | None = None) -> Figure:
    """A few shares (0 to 1) as bars with their numbers; a dash at the chance level of each bar named in `chance`."""
    figure, axis = plt.subplots(figsize=(0.95 * len(values) + 2.2, 2.5))
    drawn = axis.bar(list(values), list(values.values()), color=PALETTE[0], width=0.6)
    axis.bar_label(drawn, [f"{value:.2f}" for value in values.values()], fontsize=8, padding=1)
    for place, name in enumerate(values):
        if name in (chance or {}):
            edges = (place - 0.4, place + 0.4)
            axis.plot(edges, [chance[name]] * 2, color=PALETTE[1], ls=(0, (2, 1)), lw=1.6, label="by chance")
    if chance:
        axis.legend(*(part[:1] for part in axis.get_legend_handles_labels()), loc="upper left", bbox_to_anchor=(1, 1))
    axis.set(ylabel=label, ylim=(0, 1.08), xlim=(-0.6, len(values) - 0.4))
    axis.grid(axis="x", visible=False)
    return figure


@styled
def boxes(pixels: torch.Tensor, found: dict[str, torch.Tensor], truth: list[torch.Tensor], columns: int = 4) -> Figure:
    """Images with the true boxes (white, dashed) and one predicted box for each name, in pixels."""
    count = min(len(pixels), 2 * columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.5 * rows + 0.45), squeeze=False)
    for axis in axes.flat:
        bare(axis)
    handles = {}
    for i, axis in zip(range(count), axes.flat, strict=False):
        axis.imshow(picture(pixels[i]))
        for box in truth[i]:
            handles["an object (truth)"] = draw_box(axis, box, color="white", ls="--", lw=1)
        for colour, width, (name, all_boxes) in zip(PALETTE[1:], (2.6, 1.4, 1), found.items(), strict=False):
            handles[name] = draw_box(axis, all_boxes[i], color=colour, lw=width)
    legend = figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=1 + len(found))
    legend.get_frame().set(facecolor=PAPER, alpha=0.35)
    legend.set_frame_on(True)
    return figure
