"""The explorer's views as numbers, and its verdicts on controls."""

from __future__ import annotations

import pandas as pd

from vitreg_lib.measure import maps, outliers
from vitreg_lib.widgets.view import View


def table(views: list[View]) -> pd.DataFrame:
    """What is shown as numbers: a DataFrame, a row a model; shares are of this image's patches, 0 to 1."""
    rows = {}
    for one in views:
        rows[one.label] = {
            "cutoff": one.cutoff,
            "outlier_share": one.outlier_share,
            "norm_ratio": outliers.norm_ratio(one.norms, one.is_outlier),
            "attention_on_outliers": maps.attention_on(one.attention, one.is_outlier).item(),
            "attention_on_prefix_tokens": one.budget["cls"] + one.budget["registers"],
            "largest_attention": one.attention.max().item(),
            "neighbour_similarity": one.similarity.mean().item(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def control_claims(views: list[View]) -> list[tuple[str, bool, str, str, str]]:
    """Arguments of `Run.claim` for each control: do the patches above the cutoff agree with the truth of this image?"""
    claims = []
    for one in (view for view in views if view.truth is not None):
        f1 = outliers.score(one.is_outlier, one.truth)["f1"]
        measured = f"{int(one.is_outlier.sum())} patches above the cutoff, {int(one.truth.sum())} planted"
        text = f"ours: patches of {one.label} above the cutoff are those where artifacts were put (F1 at least 0.9)"
        claims.append((f"control-{one.label}", f1 >= 0.9, measured, text, "none"))
    return claims
