"""Figure 19: its verdicts."""

from __future__ import annotations

import pandas as pd

from vitreg_lib.measure import pairs


def claims(models, on_places: dict, having):
    """Arguments of `Run.claim`: C062 on pairs trained with registers, ours on registers added at test time.

    on_places: share of cls attention (images,) at the places of the outliers of the model without registers, by label.
    """
    compared = pairs.compare(on_places, models)
    yield "C062", *pairs.judge(compared, "trained", having)
    text = "registers added at test time lower the attention on the places of outliers"
    yield "ours-on-outliers", *pairs.judge(compared, "test time", having), text, "none"


def by_image(models, on_places: dict) -> pd.DataFrame:
    """The paired comparison of `pairs.compare`, short: the medians of the shares, and the share of images with less."""
    return pairs.compare(on_places, models)[["without", "median_without", "median_with", "share_lower"]]
