"""Figures of probes and scores by group of tokens: densities, dots by group and fit, scores with their intervals."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from .style import PALETTE, PAPER, bare, draw_box, picture, styled, wrapped


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
    axis.set_xticks(range(len(models)), ["\n".join(map(wrapped, re.split(r"(?=\+)|(?<=:)", name))) for name in models])
    axis.set(ylabel=label, xlim=(-0.6, len(models) - 0.4), ylim=(min(0, axis.get_ylim()[0]), None))
    axis.grid(axis="x", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def boxes(pixels: torch.Tensor, found: dict[str, torch.Tensor], truth: list[torch.Tensor], columns: int = 4) -> Figure:
    """Images with the true boxes (white, dashed) and one found box an image for each name, in pixels."""
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
