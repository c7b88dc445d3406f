"""Figure 14: seed expansion from queries, keys and values, its spots, what the value projection lets through."""

from __future__ import annotations

import math

import pandas as pd
import torch
import torch.nn.functional as F
from fig13 import rows_of_panels, signed
from matplotlib.figure import Figure

from vitreg_lib.hooks.capture import evaluating, hooks
from vitreg_lib.measure import objects, pairs
from vitreg_lib.plots.style import picture, ring, styled


def expansions(model, images, bias: float = 0.0, layer: int = -1, progress: bool = False) -> dict[str, torch.Tensor]:
    """LOST's seed expansion (images, rows, cols) from {"queries", "keys", "values"} of one block, L2-normalised."""
    seen = model.capture(images, ("q", "k", "v"), layers=layer, progress=progress)
    options = dict(bias=bias, normalize=True, intermediates=True)
    kinds = {"queries": "q", "keys": "k", "values": "v"}
    return {k: objects.lost(objects.features(seen, s), seen.grid, **options).expansion for k, s in kinds.items()}


def value_gain(model, images, layer: int = -1) -> torch.Tensor:
    """|W_v x| / |x| of each patch (images, patches), x the normalised input of one block's attention (Fig. 14, C052).

    How much of a token the value projection, without its bias, lets through. Raises TypeError for an attention with
    neither `qkv` nor `v_proj`.
    """
    attention = model.anatomy.attention[model.anatomy.layers(layer)[0]]
    # Eva has both names, and None under the one that it does not use
    if getattr(attention, "v_proj", None) is not None:
        weight = attention.v_proj.weight
    elif getattr(attention, "qkv", None) is not None:
        weight = attention.qkv.weight.chunk(3)[2]
    else:
        raise TypeError(f"{type(attention).__name__} has neither qkv nor v_proj: its value projection is not known")
    gains = []

    def before(module, inputs):
        x = inputs[0].float()
        gains.append(((x @ weight.float().T).norm(dim=-1) / x.norm(dim=-1)).cpu())

    with evaluating(model.module), hooks((attention.register_forward_pre_hook, before)):
        for batch in getattr(images, "x", images).split(32):
            model.module.forward_features(batch.to(weight))
    return torch.cat(gains)[:, model.anatomy.num_prefix_tokens :]


def spots(maps: torch.Tensor, height: float = 1.0) -> torch.Tensor:
    """Where maps (..., rows, cols) have an isolated maximum, bool, of the same shape (definition ours).

    A spot exceeds each of its up to 8 neighbours by more than `height` standard deviations of its own map: a lone
    patch does, a smooth hill or an object of several patches does not. A constant map has none.
    """
    padded = F.pad(maps, (1, 1, 1, 1), value=-math.inf)
    rows, cols = maps.shape[-2:]
    around = [padded[..., i : i + rows, j : j + cols] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    excess = maps - torch.stack(around).amax(0)
    return excess > height * maps.std((-2, -1), correction=0, keepdim=True)


@styled
def draw_expansions(
    pixels: torch.Tensor, maps: dict[str, dict], spots: dict | None = None, outliers: dict | None = None
) -> Figure:
    """Figure 14: seed expansion from several kinds of features; a row a model, a panel a kind for each image.

    maps: {model: {kind: (images, rows, cols)}}, drawn white at 0; spots: masks of the same shapes, ringed; outliers:
    {model: (images, rows, cols) bool}, crossed.
    """
    kinds = tuple(next(iter(maps.values())))
    figure, axes = rows_of_panels(list(maps), len(pixels), ("image", *kinds))
    for row, (name, by_kind) in zip(axes, maps.items(), strict=True):
        for i, panels in enumerate(row):
            panels[0].imshow(picture(pixels[i]))
            for axis, kind in zip(panels[1:], kinds, strict=True):
                signed(axis, by_kind[kind][i])
                if outliers is not None:
                    place = outliers[name][i].nonzero()
                    axis.scatter(place[:, 1], place[:, 0], s=16, marker="x", color="black", linewidths=1)
                if spots is not None:
                    ring(axis, spots[name][kind][i])
    return figure


def spot_table(spots: dict, outlying: dict, base: dict[str, str]):
    """Spots a map and the share of them on outliers, a row a model and kind of features.

    By label: spots, {kind: masks (images, rows, cols)}; outlying, masks of the outliers; base: the model without
    registers, whose outliers count.
    """
    rows = {}
    for name, kinds in spots.items():
        place = outlying.get(base.get(name), outlying[name])
        for kind, mask in kinds.items():
            on = place[mask].float().mean().item() if place.any() and mask.any() else math.nan
            rows[name, kind] = {"spots": mask.sum((1, 2)).float().mean().item(), "on outliers": on}
    return pd.DataFrame(rows).T


def claims(models, spots: dict, filtered: dict[str, float], profile: str):
    """Arguments of `Run.claim`: C048 to C051 on a CLIP model, then the same questions of models with outliers.

    By label: spots, {kind: masks}; filtered, the value gain of outliers over that of normal tokens.
    """
    clip = next((m.label for m in models if m.family == "clip"), None)
    paired = next((n for n, base in pairs.pairs(models, "trained").items() if base == clip), None)
    count = {n: {kind: mask.sum((1, 2)).float() for kind, mask in kinds.items()} for n, kinds in spots.items()}
    for claim, kind in (("C048", "keys"), ("C049", "queries")):
        compared = pairs.compare({n: count[n][kind] for n in (clip, paired) if n}, models)
        missing = (None, f"no CLIP model trained without and with registers in profile {profile}")
        yield claim, *(pairs.judge(compared) if paired else missing)
    mean = {name: {kind: values.mean().item() for kind, values in kinds.items()} for name, kinds in count.items()}
    text = {n: ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()) + " spots a map" for n, kinds in mean.items()}
    fewest = {name: kinds["values"] < min(kinds["keys"], kinds["queries"]) for name, kinds in mean.items()}
    yield "C050", fewest.get(clip), f"{clip}: {text[clip]}" if clip else f"no CLIP model in profile {profile}"
    missing = f"no CLIP model with outliers in profile {profile}"
    known = clip in filtered
    yield "C051", filtered[clip] < 1 if known else None, f"{clip}: {filtered[clip]:.2f}" if known else missing
    for name in (n for n in filtered if n != clip):
        asked = f"{name}, which has outliers, has fewest spots in the values' map"
        yield f"ours-values-{name}", fewest[name], text[name], asked, "none"
        measured = f"median |W_v x| / |x|, outlier / normal: {filtered[name]:.2f}"
        asked = f"the value projection of {name} lets less of an outlier through"
        yield f"ours-filter-{name}", filtered[name] < 1, measured, asked, "none"
