"""Table 5: local probes of a model without and with registers."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from fig05 import PER_PLACE, READABLE, probe_groups, same_places
from matplotlib.figure import Figure
from torch import Tensor
from verdicts import above, cured, every, over_folds, within

from vitreg_lib.base import UserError
from vitreg_lib.plots.scores import dots
from vitreg_lib.plots.style import PALETTE, PAPER, styled
from vitreg_lib.probes.linear import FOLDS

REPORTED = {"accuracy": (0.663, 0.658), "l2": (15.9, 16.0)}  # Table 5, without and with registers
MARGIN = 2  # points: the tolerance for position; it is 3 % of the paper's accuracy, and at most 3 % of a lower one


@styled
def draw_register_changes(fair, as_paper) -> Figure:
    """Table 5 as dots: the change of position and pixel probes with registers, in two comparisons; bars are intervals.

    fair, as_paper: DataFrames of `register_changes` with the same rows.
    """
    import pandas as pd

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 0.42 * len(fair) + 1.5), sharey=True)
    styles = {"same places": (PALETTE[0], "D"), "as the paper": (PALETTE[4], "o")}
    both = pd.concat(dict(zip(styles, (fair, as_paper), strict=True)), names=["compared", "model"]).reset_index()
    panels = (("points", 0.0, fair.margin, "position right, with − without (points)"),)
    panels += (("l2_ratio", 1.0, [0.05] * len(fair), "pixel error, with / without"),)
    for axis, (column, none, margins, label) in zip(axes, panels, strict=True):
        rows = np.arange(len(fair))
        bands = dict(height=1, left=none - np.array(margins), color=PAPER, alpha=0.12, lw=0)
        axis.barh(rows, 2 * np.array(margins), label="counts as unchanged", **bands)
        axis.axvline(none, color=PAPER, lw=1)
        if not np.isfinite(both[column]).all():
            raise UserError("a probe had too few training tokens for a comparison: raise n_images or max_tokens")
        ends = both.assign(low=both[f"{column}_low"], high=both[f"{column}_high"])
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
    max_tokens: int = 0,
    seed: int = 0,
    folds=range(FOLDS),
):
    """Local probes of models without and with registers on the same images (Table 5).

    The result is a DataFrame indexed by (model, group, fit, fold), with the columns of `local_probes`; each fold tests
    on other images. Dictionaries by model label: tokens (images, patches, dim), pixels (images, patches, values),
    outlier masks (images, rows, cols). pairs: of `pairs.pairs`. Groups: "normal", the model's own non-outliers, as in
    the paper; "shared", the tokens at places where no model of the pair has an outlier, so that both are probed on the
    same patches; "places", the tokens where one of them has an outlier. If no model of the pair has outliers, the group
    "places" uses those of another model (`same_places`). max_tokens: training tokens of a probe; 0: `PER_PLACE` for
    each place, as in Figure 5.
    """
    import pandas as pd

    if not pairs.keys() & tokens.keys():
        raise UserError('Table 5 compares a model with its pair: write models as in "mini-deit3 mini-deit3-reg4"')
    family = {name: pairs.get(name, name) for name in tokens}
    union = {name: torch.stack([masks[o] for o in masks if family[o] == family[name]]).any(0) for name in tokens}
    borrowed = same_places(union)
    rows = {}
    for name, x in tokens.items():
        parts = {"normal": ~masks[name], "shared": ~union[name]}
        if (places := union[borrowed.get(name, name)]).any():
            parts["places"] = places
        for fold in folds:
            most = max_tokens or PER_PLACE * x.shape[1]
            rows[name, fold] = probe_groups(x, pixels[name], masks[name].shape[1:], parts, most, seed, fold)
    return pd.concat(rows, names=["model", "fold"]).reorder_levels(["model", "group", "fit", "fold"])


def register_changes(table, pairs: dict[str, str], group: str = "shared", fit: str = "own"):
    """What registers change in one group of an `across_registers` table: a DataFrame, one row a model with registers.

    right: the smaller of the two accuracies; readable: whether it is at least five times chance (otherwise equal
    accuracies mean nothing); before: the accuracy without registers; margin: the change in points that counts as
    unchanged (`MARGIN`); points: accuracy with
    registers minus accuracy without, in points; cells: the same for the distance; l2_ratio: error with over error
    without. The last three are paired means over the folds, with intervals (_low, _high). No image is in two test sets,
    so these are intervals over images.
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
        right = min(one.accuracy.mean(), other.accuracy.mean())
        rows[name] = {"without": base, "right": right, "readable": bool(right >= READABLE * other.chance.mean())}
        rows[name]["before"] = before = other.accuracy.mean()
        rows[name]["margin"] = MARGIN * min(1.0, before / REPORTED["accuracy"][0])
        for column, values in change.items():
            keys = (column, f"{column}_low", f"{column}_high")
            rows[name] |= dict(zip(keys, over_folds(values), strict=True))
    return pd.DataFrame.from_dict(rows, orient="index")


def measure(run, summary, with_registers) -> None:
    """Put the means and spreads over the folds into the record, with the paper's numbers for its own comparison."""
    for (name, group, fit), row in summary.iterrows():
        for (column, kind), value in row.items():
            beside = REPORTED.get(column) if (group, fit, kind) == ("normal", "all", "mean") else None
            called = f"{column} ({kind} over folds), {group} tokens, trained on {fit}"
            run.measure(called, value, name, paper=beside and beside[name in with_registers])


def claims(models, fair, as_paper, moved, having):
    """Yields the arguments of `Run.claim`: C111 and C112 on a trained pair, the same for other pairs, then ours.

    A pair is judged if its model without registers is in `having`, those with artifacts.
    Our claims ask whether moving the outliers to registers brings information back to their places. fair, as_paper,
    moved: `register_changes` of the groups "shared", "normal" and "places".
    """
    dinov2, (judged, missing) = cured(models, having, "dinov2")[0], cured(models, having)
    name = next(iter(dinov2 or judged), None)
    if name:
        row = fair.loc[name]
        yield "C111", _place_unchanged(row), f"{name}: {_said(row, as_paper.loc[name])}"
        yield "C112", within(row.l2_ratio_low, row.l2_ratio_high, 0.05, 1), f"{name}: {_said(row, as_paper.loc[name])}"
    else:
        yield "C111", None, missing
        yield "C112", None, missing
    for other in (n for n in fair.index if n != name):
        row = fair.loc[other]
        holds = every([_place_unchanged(row), within(row.l2_ratio_low, row.l2_ratio_high, 0.05, 1)])
        measured = _said(row, as_paper.loc[other])
        if row.without not in having:
            holds, measured = None, f"no artifacts without registers: {other} ({measured})"
        text = f"the normal tokens of {other} know as much of their patch as those of {row.without}"
        yield f"same-{other}", holds, measured, text, "none"
    for other, row in moved.iterrows():
        holds = every([above(row.points_low, row.points_high), above(-row.l2_ratio_high, -row.l2_ratio_low, -1)])
        measured = f"at the outliers' places {_numbers(row)}"
        text = f"with the outliers of {row.without} moved to registers, the tokens there know more of their patch"
        yield f"moved-{other}", holds if row.without in having else None, measured, text, "none"


def _place_unchanged(row) -> bool | str | None:
    """Is the position accuracy unchanged? None if the position is not readable."""
    return within(row.points_low, row.points_high, row.margin) if row.readable else None


def _numbers(row) -> str:
    return (
        f"{row.points:+.1f} points ({row.points_low:+.1f} to {row.points_high:+.1f}), "
        f"error × {row.l2_ratio:.2f} ({row.l2_ratio_low:.2f} to {row.l2_ratio_high:.2f})"
    )


def _said(row, as_paper) -> str:
    blind = f"; right without registers {row.before:.1%}, so {row.margin:.2f} points count as unchanged"
    blind = blind if row.readable else f"; position is not readable here ({row.right:.1%} right) and is left out"
    paper = f"as the paper compares {as_paper.points:+.1f} points, × {as_paper.l2_ratio:.2f}"
    return f"{_numbers(row)}; {paper}{blind}"
