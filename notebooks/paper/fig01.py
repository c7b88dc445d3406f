"""Figure 1: its verdicts."""

from __future__ import annotations

import paired
from map_scores import top_overlap


def claims(models, pictures: dict, attention: dict, on_places: dict, having):
    """Yields the arguments of `Run.claim`: C001, our claim on added registers, and the controls.

    C001 and ours compare the attention on the places of outliers. Dictionaries by model label: pictures (`Images`);
    attention (images, rows, cols); on_places (images,), the share of attention at the places where the model without
    registers has outliers. having: labels of the models with artifacts.
    """
    compared = paired.compare(on_places, models)
    yield "C001", *paired.judge(compared, "trained", having)
    text = "registers added at test time take attention away from the places of outliers"
    yield "ours-added", *paired.judge(compared, "test time", having), text, "none"
    for model in models:
        truth = model.truth(pictures[model.label])
        if truth is None or not truth.any():
            continue
        maps = attention[model.label]
        overlap = top_overlap(maps, truth.float().view(maps.shape), truth.sum(1))
        found = f"{overlap.overlap.nanmean():.0%} of them, by chance {overlap.chance.nanmean():.0%}"
        text = f"the highest attention of {model.label} is where its artifacts were put, more often than by chance"
        yield f"control-{model.label}", overlap.pooled_p.item() < 0.01, found, text, "none"
