"""Figure 14: seed expansion from queries, keys and values, its spots, and the gain of the value projection."""

from __future__ import annotations

import math

import paired
import pandas as pd
import torch
import torch.nn.functional as F
from fig13 import key, rows_of_panels, signed
from map_scores import median
from matplotlib.figure import Figure
from verdicts import WORDS, above, specimen

from vitreg_lib.hooks.capture import evaluating, hooks
from vitreg_lib.measure import objects, pairs
from vitreg_lib.plots.style import picture, ring, styled

CROSS = dict(marker="X", facecolor="white", edgecolor="black", linewidths=0.8)  # of an outlier: seen on any colour


def expansions(model, images, bias: float = 0.0, layer: int = -1, progress: bool = False) -> dict[str, torch.Tensor]:
    """{"queries", "keys", "values": LOST's seed expansion (images, rows, cols)} of one block, from unit features."""
    kinds = {"queries": "q", "keys": "k", "values": "v"}
    if model.replayed:
        return {k: model.kept(f"lost.{s}.expansion", images) for k, s in kinds.items()}
    seen = model.capture(images, ("q", "k", "v"), layers=layer, progress=progress)
    options = dict(bias=bias, normalize=True, intermediates=True)
    return {k: objects.lost(objects.features(seen, s), seen.grid, **options).expansion for k, s in kinds.items()}


def value_gain(model, images, layer: int = -1) -> torch.Tensor:
    """|W_v x| / |x| of each patch (images, patches): the gain of the value projection without its bias (Fig. 14, C052).

    x is the input of one block's attention, after its LayerNorm. Raises TypeError for an attention with neither `qkv`
    nor `v_proj`.
    """
    if model.replayed:
        return model.kept("value_gain", images)
    attention = model.anatomy.attention[model.anatomy.layers(layer)[0]]
    # Eva has both attributes; the one that it does not use is None
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
    """Isolated maxima of maps (..., rows, cols): bool of the same shape (our definition).

    A spot exceeds each of its up to 8 neighbours by more than `height` standard deviations of its map. A single high
    patch is a spot; a smooth hill or an object of several patches is not. A constant map has no spots.
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
    """Figure 14: seed expansion from several kinds of features; one row a model, one panel for each image and kind.

    maps: {model: {kind: (images, rows, cols)}}, white at 0; spots: masks of the same shapes, marked by rings; outliers:
    {model: (images, rows, cols) bool}, marked by crosses.
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
                    axis.scatter(place[:, 1], place[:, 0], s=45, zorder=3, **CROSS)  # larger than a ring, above it
                if spots is not None:
                    ring(axis, spots[name][kind][i])
                rows, cols = by_kind[kind].shape[1:]
                axis.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))  # marks at the border widen the axis
    spot = {"spot": dict(marker="o", color="black", mfc="none")} if spots is not None else {}
    cross = {"norm outlier": dict(marker="X", mfc="white", mec="black", mew=0.8)} if outliers is not None else {}
    key(figure, axes, spot | cross)
    return figure


def spot_table(spots: dict, outlying: dict, base: dict[str, str]):
    """Spots per map, and the share of spots on outliers: a DataFrame, one row a model and kind of features.

    Dictionaries by model label: spots, {kind: masks (images, rows, cols)}; outlying, masks of the outliers; base, the
    same model without registers, whose outliers are used.
    """
    rows = {}
    for name, kinds in spots.items():
        place = outlying.get(base.get(name), outlying[name])
        for kind, mask in kinds.items():
            on = place[mask].float().mean().item() if place.any() and mask.any() else math.nan
            rows[name, kind] = {"spots": mask.sum((1, 2)).float().mean().item(), "on outliers": on}
    return pd.DataFrame(rows).T


def filtered(gains: torch.Tensor, is_outlier: torch.Tensor, draws: int = 500, seed: int = 0):
    """(ratio, low, high): median gain of outliers over that of other patches, with a bootstrap interval over images.

    gains (images, patches) of `value_gain`; is_outlier of the same shape.
    """
    generator, n = torch.Generator().manual_seed(seed), len(gains)

    def ratio(rows):
        value, mask = gains[rows], is_outlier[rows]
        return (median(value[mask]) / median(value[~mask])).item() if mask.any() else math.nan

    drawn = [ratio(torch.randint(n, (n,), generator=generator)) for _ in range(draws)]
    low, high = torch.tensor(drawn).double().nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return ratio(torch.arange(n)), low, high


def claims(models, spots: dict, through: dict, having):
    """Yields the arguments of `Run.claim`: C048 to C050 on CLIP, C051 on the first model with artifacts, then ours.

    spots: {label: {kind: mask (images, rows, cols)}}; through: {label: `filtered`} of models with outliers.
    """
    clip = next((m.label for m in models if m.family == "clip" and m.role == "trained"), None)
    with_registers = next((n for n, base in pairs.pairs(models, "trained").items() if base == clip), None)
    count = {name: {kind: mask.sum((1, 2)).double() for kind, mask in masks.items()} for name, masks in spots.items()}
    missing = f"{clip} has no artifacts" if clip else "no CLIP model is among the models of this item"
    for claim, kind in (("C048", "keys"), ("C049", "queries")):
        if with_registers:
            compared = paired.compare({n: count[n][kind] for n in (clip, with_registers)}, models)
            yield claim, *paired.judge(compared, having=having)
        else:
            yield claim, None, f"no pair {WORDS['clip']} is among the models of this item"
    yield "C050", *(_fewest(count[clip], clip) if clip in having else (None, missing))
    first = specimen(models, having)
    name = first and first.label
    yield "C051", *(_less(through[name], name) if name else (None, "no trained model here has artifacts"))
    for name in (name for name in through if name in having and name != clip):
        text = f"{name}, which has artifacts, has fewest spots in the values' map"
        yield f"ours-values-{name}", *_fewest(count[name], name), text, "none"
        text = f"the value projection of {name} lets less of an outlier through"
        yield f"ours-filter-{name}", *_less(through[name], name), text, "none"


def _fewest(count: dict[str, torch.Tensor], name: str) -> tuple[bool | str, str]:
    """(verdict, measured text): does the map of the values have fewer spots than those of keys and of queries?"""
    other = min(("keys", "queries"), key=lambda kind: count[kind].mean())
    gap = count[other] - count["values"]
    low, high = pairs.interval(gap)
    text = ", ".join(f"{kind} {values.mean():.2f}" for kind, values in count.items())
    return above(
        low, high
    ), f"{name}: {text} spots a map; {other} minus values {gap.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def _less(ratio: tuple[float, float, float], name: str) -> tuple[bool | str, str]:
    value, low, high = ratio
    text = f"{name}: median |W_v x| / |x|, outlier / normal: {value:.2f} ({low:.2f} to {high:.2f})"
    return above(-high, -low, -1), text
