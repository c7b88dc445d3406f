"""Table 5: local probes of a model without and with registers."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_lib.measure.pairs import pairs as of_models
from vitreg_lib.plots.scores import dots
from vitreg_lib.plots.style import PALETTE, PAPER, styled
from vitreg_lib.probes.local import READABLE, probe_groups, same_places


@styled
def draw_register_changes(fair, as_paper) -> Figure:
    """Table 5 as dots: what registers change in position and in pixels, two comparisons, spread over splits as bars.

    fair, as_paper: DataFrames of `probes.local.register_changes` with the same rows.
    """
    import pandas as pd

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 0.42 * len(fair) + 1.5), sharey=True)
    styles = {"same places": (PALETTE[0], "D"), "as the paper": (PALETTE[4], "o")}
    both = pd.concat(dict(zip(styles, (fair, as_paper), strict=True)), names=["compared", "model"]).reset_index()
    panels = (("points", 0.0, (-2, 2), "position right, with − without (points)"),)
    panels += (("l2_ratio", 1.0, (0.95, 1.05), "pixel error, with / without"),)
    for axis, (column, none, band, label) in zip(axes, panels, strict=True):
        axis.axvspan(*band, color=PAPER, alpha=0.12, lw=0, label="counts as unchanged")
        axis.axvline(none, color=PAPER, lw=1)
        spread = both[f"{column}_sd"]
        ends = both.assign(low=both[column] - spread, high=both[column] + spread)
        dots(axis, ends, column, "model", "compared", styles, orient="h", dodge=0.3, legend="full")
        axis.get_legend().remove()
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
    value = {"points": -0.5, "l2_ratio": 16.0 / 15.9}
    for axis, column in zip(axes, value, strict=True):
        axis.plot([value[column]], [-0.75], "v", color=PAPER, clip_on=False, label="the paper's")
    axes[0].set_ylim(len(fair) - 0.5, -0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def across_registers(
    tokens: dict[str, Tensor],
    pixels: dict[str, Tensor],
    masks: dict[str, Tensor],
    pairs: dict[str, str],
    seeds=(0, 1, 2),
    max_tokens=3000,
):
    """Local probes of models without and with registers on the same images (Table 5): (model, group, fit, seed).

    By label: tokens (images, patches, dim), pixels (images, patches, values), outlier masks (images, rows, cols), and
    `pairs.pairs`. Groups: "normal", the model's own non-outliers, as the paper compares them; "shared", the tokens at
    places where neither it nor its pairs have an outlier, so that both are asked about the same patches;
    "places", those at the places where one has. A family without outliers borrows places by `same_places`, for that
    last group alone. Columns as `local_probes`; a seed splits the images and draws the tokens.
    """
    import pandas as pd

    family = {name: pairs.get(name, name) for name in tokens}
    union = {name: torch.stack([masks[o] for o in masks if family[o] == family[name]]).any(0) for name in tokens}
    borrowed = same_places(union)
    rows = {}
    for name, x in tokens.items():
        parts = {"normal": ~masks[name], "shared": ~union[name]}
        if (places := union[borrowed.get(name, name)]).any():
            parts["places"] = places
        for seed in seeds:
            rows[name, seed] = probe_groups(x, pixels[name], masks[name].shape[1:], parts, max_tokens, seed)
    return pd.concat(rows, names=["model", "seed"]).reorder_levels(["model", "group", "fit", "seed"])


def register_changes(table, pairs: dict[str, str], group: str = "shared", fit: str = "own"):
    """What registers change in one group of an `across_registers` table: a DataFrame, one row a model with registers.

    right: the smaller of the two accuracies; readable: whether it is at least five times chance, without which equal
    positions mean nothing. points: accuracy with registers less that without, in points; cells: the same of the
    distance; l2_ratio: error with over error without. Means over seeds, paired by seed, and standard deviations (_sd).
    """
    import pandas as pd

    part, rows = table.xs((group, fit), level=("group", "fit")), {}
    here = part.index.unique("model")
    for name, base in pairs.items():
        if name not in here or base not in here:
            continue
        one, other = part.loc[name], part.loc[base]
        change = {
            "points": 100 * (one.accuracy - other.accuracy),
            "cells": one.distance - other.distance,
            "l2_ratio": one.l2 / other.l2,
        }
        known = min(one.accuracy.mean(), other.accuracy.mean())
        rows[name] = {"without": base, "right": known, "readable": bool(known >= READABLE * other.chance.mean())} | {
            k: v for c, x in change.items() for k, v in ((c, x.mean()), (f"{c}_sd", x.std()))
        }
    return pd.DataFrame.from_dict(rows, orient="index")


REPORTED = {"accuracy": (0.663, 0.658), "l2": (15.9, 16.0)}  # Table 5, without and with registers


def measure(run, summary, with_registers) -> None:
    """Put means and spreads over the splits into the record, beside the paper's for its own comparison."""
    for (name, group, fit), row in summary.iterrows():
        for (column, kind), value in row.items():
            beside = REPORTED.get(column) if (group, fit, kind) == ("normal", "all", "mean") else None
            called = f"{column} ({kind} over splits), {group} tokens, trained on {fit}"
            run.measure(called, value, name, paper=beside and beside[name in with_registers])


def claims(models, fair, as_paper, moved, profile: str):
    """Arguments of `Run.claim`: C111 and C112 on a pair trained with registers, then ours on all pairs.

    fair, as_paper, moved: `register_changes` in the shared places, of all normal tokens, and at the outliers' places.
    """
    trained = [m for m in models if m.label in of_models(models, "trained")]
    first = next((m for m in trained if m.family == "dinov2"), trained[0] if trained else None)
    controls = {m.label for m in models for base in models if m.base == base.label and base.is_control}
    name, row = (first.label, fair.loc[first.label]) if first else (None, None)
    text = f"{name}: {in_words(row, as_paper.loc[name])}" if first else ""
    missing = f"no pair trained without and with registers in profile {profile}"
    yield "C111", bool(abs(row.points) <= 2) if first and row.readable else None, text or missing
    yield "C112", bool(0.95 <= row.l2_ratio <= 1.05) if first else None, text or missing
    for other in (n for n in fair.index if n != name):
        row = fair.loc[other]
        near = not row.readable or abs(row.points) <= max(2, 2 * row.points_sd)
        asked = f"the normal tokens of {other} know as much of their patch as those of {row.without}"
        asked += " (control)" * (other in controls)
        measured = in_words(row, as_paper.loc[other])
        yield f"same-{other}", bool(near and 0.95 <= row.l2_ratio <= 1.05), measured, asked, "none"
    for other, row in moved.iterrows():
        measured = f"at the outliers' places {row.points:+.1f} ± {row.points_sd:.1f} points, error × {row.l2_ratio:.2f}"
        asked = f"with the outliers of {row.without} moved to registers, the tokens there know more of their patch"
        yield f"moved-{other}", bool(row.points > 2 * row.points_sd and row.l2_ratio < 1), measured, asked, "none"


def in_words(row, uncorrected) -> str:
    """One row of `register_changes` beside that of the paper's comparison."""
    blind = "" if row.readable else f"; position is not readable here ({row.right:.1%} right) and is left out"
    return (
        f"{row.points:+.1f} ± {row.points_sd:.1f} points, error × {row.l2_ratio:.2f} ± {row.l2_ratio_sd:.2f}; "
        f"as the paper compares {uncorrected.points:+.1f} points, × {uncorrected.l2_ratio:.2f}{blind}"
    )
