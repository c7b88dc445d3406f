"""Figure 19: its verdicts."""

from __future__ import annotations

import paired
import pandas as pd


def claims(models, on_places: dict, having):
    """Yields the arguments of `Run.claim`: C062 on pairs trained with registers, ours on registers added at test time.

    on_places: by model label, the share of cls attention (images,) at the places where the model without registers has
    outliers.
    """
    compared = paired.compare(on_places, models)
    yield "C062", *paired.judge(compared, "trained", having)
    text = "registers added at test time lower the attention on the places of outliers"
    yield "ours-on-outliers", *paired.judge(compared, "test time", having), text, "none"


def by_image(models, on_places: dict) -> pd.DataFrame:
    """`paired.compare` without its p-values: the medians of both models, and the share of images with a lower value."""
    return paired.compare(on_places, models)[["without", "median_without", "median_with", "share_lower"]]
