"""Figure 19: its verdicts."""

from __future__ import annotations

import paired
import pandas as pd


def claims(models, on_places: dict, having):
    """Arguments of `Run.claim`: C062 on pairs trained with registers, ours on registers added at test time.

    on_places: share of cls attention (images,) at the places of the outliers of the model without registers, by label.
    """
    compared = paired.compare(on_places, models)
    yield "C062", *paired.judge(compared, "trained", having)
    text = "registers added at test time lower the attention on the places of outliers"
    yield "ours-on-outliers", *paired.judge(compared, "test time", having), text, "none"


def by_image(models, on_places: dict) -> pd.DataFrame:
    """`paired.compare`, short: the medians of the shares, and the share of images with less."""
    return paired.compare(on_places, models)[["without", "median_without", "median_with", "share_lower"]]
