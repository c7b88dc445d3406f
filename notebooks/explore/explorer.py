"""The explorer's views as numbers, and its verdicts on controls."""

from __future__ import annotations

import pandas as pd

from vitreg_lib.measure import outliers
from vitreg_lib.widgets.view import View


def table(views: list[View]) -> pd.DataFrame:
    """The numbers of the views: a DataFrame, one row a model; shares (0 to 1) are of this image's patches.

    NaN for a replayed model's number that was not measured.
    """
    rows = {}
    for one in views:
        row = one.attention_share
        rows[one.label] = {
            "cutoff": one.cutoff,
            "outlier_share": one.outlier_share,
            "norm_ratio": (one.norms[one.is_outlier].mean() / one.norms.median()).item(),
            "attention_on_outliers": (row[one.is_outlier].sum() / row.sum()).item(),
            "attention_on_prefix_tokens": one.budget["cls"] + one.budget["registers"],
            "largest_attention": one.attention.max().item(),
            "neighbour_similarity": one.similarity.mean().item(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def claims(views: list[View]):
    """Yields the arguments of `Run.claim`: does the query attend to the patches above the cutoff, and, on a control,
    are these patches the planted artifacts of this image?"""
    for one in views:
        if one.is_outlier.any() and "attention" not in one.missing:
            times = one.attention[one.is_outlier].mean().item()
            text = f"ours: patches of {one.label} above the cutoff get at least twice an even share of attention"
            yield f"attended-{one.label}", times >= 2, f"{times:.1f} times, from {one.query}", text, "none"
        if one.truth is not None:
            f1 = outliers.score(one.is_outlier, one.truth)["f1"]
            measured = f"{int(one.is_outlier.sum())} patches above the cutoff, {int(one.truth.sum())} planted"
            text = f"ours: patches of {one.label} above the cutoff are those where artifacts were put (F1 at least 0.9)"
            yield f"control-{one.label}", f1 >= 0.9, measured, text, "none"
