"""Figure 1: its verdicts."""

from __future__ import annotations

from vitreg_lib.measure import maps, pairs


def claims(models, pictures: dict, attention: dict, on_places: dict, having):
    """Arguments of `Run.claim`: C001 and ours, by the attention on the places of outliers; then the controls.

    By label: pictures; attention (images, rows, cols); on_places (images,), the share of attention at the places of
    outliers of the model without registers. having: labels of the models with artifacts.
    """
    compared = pairs.compare(on_places, models)
    yield "C001", *pairs.judge(compared, "trained", having)
    text = "registers added at test time take attention away from the places of outliers"
    yield "ours-added", *pairs.judge(compared, "test time", having), text, "none"
    for model in models:
        truth = model.truth(pictures[model.label])
        if truth is None or not truth.any():
            continue
        grid = attention[model.label].shape[1:]
        overlap = maps.top_overlap(attention[model.label].flatten(1), truth.float(), truth.sum(1), grid=grid)
        found = f"{overlap.overlap.nanmean():.0%} of them, by chance {overlap.chance.nanmean():.0%}"
        text = f"the highest attention of {model.label} is where its artifacts were put, more often than by chance"
        yield f"control-{model.label}", overlap.pooled_p.item() < 0.01, found, text, "none"
