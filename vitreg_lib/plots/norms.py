"""Figures of token norms: on the image, as histograms, by block, along training, by kind of token."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .style import PALETTE, PAPER, plain_log, styled


@styled
def histograms(
    norms: dict[str, torch.Tensor], cutoffs: dict[str, float], paper: str | None = None, columns: int = 3
) -> Figure:
    """Histogram of patch norms for each model, on log axes, with its cutoff and the share of tokens above it."""
    import seaborn as sns

    figure, axes = _panels(len(norms), columns, sharey=True)
    for axis, (name, values) in zip(axes.flat, norms.items(), strict=False):
        values, cut = values.flatten().cpu(), cutoffs[name]
        highest = max(float(values.max()), cut if np.isfinite(cut) else 0)
        decades = np.log10([float(values.min()) * 0.95, highest * 1.1])
        style = dict(bins=79, binrange=decades, log_scale=True, color=PALETTE[0], alpha=1, linewidth=0)
        sns.histplot(x=values.numpy(), ax=axis, **style)
        axis.axvline(float(values.median()), color=PALETTE[4], lw=1.5, ls=":", label="median")
        text = "one mode: no cutoff"
        if np.isfinite(cut):
            axis.axvline(cut, color=PALETTE[1], lw=1.3, label="cutoff")
            text = f"cutoff {cut:.3g}, {(values > cut).float().mean().item():.2%} above"
        axis.set(yscale="log", title=f"{name}\n{text}", xlabel="L2 norm of patch tokens", ylabel="")
        plain_log(axis.xaxis, 5)
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens")
        plain_log(axis.yaxis)
    lines = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    if paper:
        figure.suptitle(paper, fontsize=8, color=PAPER)
    return figure


def bands(axis, x, levels: dict[float, np.ndarray], colour) -> None:
    """Median line, the middle half and the middle 98 % as bands, the largest value dashed."""
    axis.fill_between(x, levels[0.01], levels[0.99], color=colour, alpha=0.18, lw=0, label="1 to 99 %")
    axis.fill_between(x, levels[0.25], levels[0.75], color=colour, alpha=0.35, lw=0, label="middle half")
    axis.plot(x, levels[0.5], color=colour, label="median")
    axis.plot(x, levels[1.0], color=PALETTE[1], lw=1, ls="--", label="largest")


def quantile_levels(table: pd.DataFrame) -> dict[float, np.ndarray]:
    """Quantiles of norms by their level (0.01 to 1.0), from the columns q0.01 … q1 of `telemetry.table`."""
    return {q: table[f"q{q:g}"].to_numpy() for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)}


@styled
def norms_by_layer(tables: dict[str, pd.DataFrame], onsets: dict[str, int]) -> Figure:
    """Figure 4(a): quantiles of patch norms after each block, one panel per model; tables as `telemetry.table`."""
    figure, axes = _panels(len(tables), 4)
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        bands(axis, table.layer, quantile_levels(table), PALETTE[0])
        onset = onsets.get(name)
        text = "no outliers" if pd.isna(onset) else f"outliers from block {onset} of {len(table)}"
        if not pd.isna(onset):
            axis.axvline(onset, color=PALETTE[2], ls=":")
        axis.set(title=f"{name}\n{text}", xlabel="block (from 0)", yscale="log")
        plain_log(axis.yaxis)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=7))
    for axis in axes[:, 0]:
        axis.set_ylabel("L2 norm of patch tokens")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _panels(count: int, most: int, **options):
    """(figure, axes (rows, columns)) for panels in rows of at most `most`; those beyond `count` are hidden."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns + 0.4, 2.4 * rows + 0.3), squeeze=False, **options
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


@styled
def training(log: pd.DataFrame, telemetry: pd.DataFrame, steps: int, title: str = "") -> Figure:
    """The progress of a training of `steps`: loss, the recipe's own numbers, norms by step and by block.

    log: one row per step, columns `step`, `loss` and the recipe's numbers; telemetry: rows of `telemetry.measure`.
    """
    figure, ((loss, numbers), (by_step, by_block)) = plt.subplots(2, 2, figsize=(8.4, 5.2))
    smooth = log.set_index("step").ewm(span=15).mean()
    loss.plot(log.step, log.loss, color=PALETTE[0], lw=0.6, alpha=0.35)
    loss.plot(smooth.index, smooth.loss, color=PALETTE[0], lw=1.6)
    loss.set(xlabel="step", ylabel="loss", xlim=(0, steps))
    names = [name for name in log.columns if name not in ("step", "loss")]
    for colour, name in zip(PALETTE, names, strict=False):
        numbers.plot(smooth.index, smooth[name], color=colour, label=name.replace("_", " "))
    if names:
        numbers.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
        if smooth[names].min().min() > 0 and smooth[names].max().max() > 20 * smooth[names].max().min():
            numbers.set_yscale("log")  # else the smaller numbers would lie along the bottom
            plain_log(numbers.yaxis)
    numbers.set(xlabel="step", ylabel="on the batch", xlim=(0, steps))

    last = telemetry[telemetry.layer == telemetry.layer.max()]
    bands(by_step, last.step, quantile_levels(last), PALETTE[0])
    for colour, name in ((PALETTE[2], "cls"), (PALETTE[3], "register")):
        if last[f"{name}_norm"].notna().any():
            by_step.plot(last.step, last[f"{name}_norm"], color=colour, ls="-.", label=f"{name}, mean")
    by_step.set(xlabel="step", ylabel="L2 norm, last block", yscale="log", xlim=(0, steps))
    now = telemetry[telemetry.step == telemetry.step.max()]
    bands(by_block, now.layer, quantile_levels(now), PALETTE[0])
    by_block.set(xlabel="block (from 0)", ylabel=f"L2 norm, step {now.step.max()}", yscale="log")
    by_block.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=8))
    for axis in (by_step, by_block):
        plain_log(axis.yaxis)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(title, fontsize=9)
    return figure


@styled
def token_kinds(tables: dict[str, dict[str, torch.Tensor]]) -> Figure:
    """Figure 15: norms of patches, cls and each register; one panel per model, one violin per kind of token, in rows.

    tables: {model: {kind: norms}}. Each violin ends at the least and largest norm; a line marks its median. A kind with
    equal norms in all images is a line.
    """
    import seaborn as sns

    rows = [[]]
    for name, kinds in tables.items():
        if len(rows[-1]) + len(kinds) > 26:
            rows.append([])
        rows[-1] += [name] * (len(kinds) + 1)
    widest = max(map(len, rows))
    figure, axes = plt.subplot_mosaic(
        [row + ["."] * (widest - len(row)) for row in rows],
        figsize=(0.36 * widest + 1.4, 2.6 * len(rows) + 0.4),
        sharey=True,
    )
    style = dict(inner=None, cut=0, density_norm="width", linewidth=0.5, log_scale=True)
    for name, kinds in tables.items():
        axis = axes[name]
        norms = {kind: values.flatten().cpu().numpy() for kind, values in kinds.items()}
        colours = [{"patches": PALETTE[0], "cls": PALETTE[2]}.get(kind, PALETTE[1]) for kind in kinds]
        sns.violinplot(norms, palette=colours, ax=axis, **style)
        for place, values in enumerate(norms.values()):
            axis.plot([place - 0.3, place + 0.3], [np.median(values)] * 2, color="black", lw=1.2)
        axis.tick_params(axis="x", rotation=45)
        axis.set_title(name)
    plain_log(axes[rows[0][0]].yaxis)
    for row in rows:
        axes[row[0]].set_ylabel("L2 norm (line: median)")
    return figure
