"""Figure 9: how much the attention maps of registers differ, its plot, and the verdicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from map_scores import centred
from matplotlib.figure import Figure
from torch.nn.functional import interpolate
from verdicts import COPIES, above, copies, registered

from vitreg_lib.data import sets
from vitreg_lib.measure import attention
from vitreg_lib.measure.pairs import interval
from vitreg_lib.plots.maps import COMPONENT
from vitreg_lib.plots.style import styled

LEAST_SPREAD = 0.01  # share of attention: a smaller spread over objects does not count, even if it is significant


def box_masks(boxes: list[torch.Tensor], size: tuple[int, int], most: int = 2) -> torch.Tensor:
    """(images, most, height, width) bool: the insides of the largest boxes of each image, the largest first."""
    masks = torch.zeros(len(boxes), most, *size, dtype=torch.bool)
    for image, found in enumerate(boxes):
        area = (found[:, 2:] - found[:, :2]).prod(1)
        for k, (left, top, right, bottom) in enumerate(found[area.argsort(descending=True)][:most].round().long()):
            masks[image, k, top:bottom, left:right] = True
    return masks


def objects_of(run, model) -> tuple:
    """(`Images`, masks (images, objects, height, width) of their objects, the largest first; None if not known).

    For scenes the masks are the visible parts of the objects. For photos (the setting `boxes`) they are the insides of
    the two largest boxes.
    """
    if run.source(model) == "scenes":
        pictures = run.images(model)
        scenes = pictures.scenes
        return pictures, torch.stack([scenes.instances == k + 1 for k in range(scenes.visible.shape[1])], 1)
    if not run.settings.get("boxes"):
        return run.images(model), None
    pictures, boxes = sets.load_boxes(run.settings["boxes"], model)
    return pictures, box_masks(boxes, pictures.x.shape[-2:])


def object_mass(model, pictures, masks: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """(images, registers, objects): share of a register's attention on patches that falls on each object's pixels."""
    seen = model.capture(pictures, "attention", layers=layer)
    return mass_on(attention.maps(seen)[:, int(seen.has_cls) :], masks)


def mass_on(attn_maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """`object_mass` of maps (images, registers, rows, cols)."""
    density = interpolate(attn_maps.float(), masks.shape[-2:], mode="nearest")
    density = density / density.sum((-2, -1), keepdim=True)
    return torch.einsum("nrhw,nkhw->nrk", density, masks.float())


def follows(run, model, layer: int, seed: int):
    """`object_spread` of a model's registers; None if objects are not known. A replayed model has stored values."""
    if model.replayed:
        return object_spread(model.kept("objects"), seed) if "objects" in model.tensors else None
    pictures, masks = objects_of(run, model)
    return None if masks is None else object_spread(object_mass(model, pictures, masks, layer), seed)


class Spread(NamedTuple):
    """Of `object_spread`: the spread, its mean when shuffled, the p-value, and the interval of their difference."""

    spread: float
    shuffled: float
    p: float
    low: float
    high: float


def object_spread(mass: torch.Tensor, seed: int = 0, shuffles: int = 200) -> Spread | None:
    """Do registers follow different objects? None for one register.

    mass (images, registers, objects): of `object_mass`; object 0 is the largest of an image. A register's share of each
    object is averaged over the images. The spread is the standard deviation between registers, averaged over the
    objects. For comparison, the registers are shuffled in every image, so that all have the same expected shares. The
    p-value is the share of shuffles with at least the observed spread. The interval is the middle 95 % of a bootstrap
    over images; each draw is compared with a shuffle of itself, because few images alone make a spread.
    """
    if mass.shape[1] < 2:
        return None
    generator = torch.Generator().manual_seed(seed)

    def spread(values):
        return values.mean(0).std(0).mean().item()

    def shuffled(values):
        order = torch.rand(values.shape[:2], generator=generator).argsort(1)
        return spread(values.gather(1, order[..., None].expand_as(values)))

    found, by_chance = spread(mass), [shuffled(mass) for _ in range(shuffles)]
    p = (1 + sum(value >= found - 1e-12 for value in by_chance)) / (1 + shuffles)
    drawn = [mass[torch.randint(len(mass), (len(mass),), generator=generator)] for _ in range(shuffles)]
    gaps = torch.tensor([spread(each) - shuffled(each) for each in drawn], dtype=torch.float64)
    low, high = gaps.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Spread(found, sum(by_chance) / shuffles, p, low, high)


def pairwise_correlation(maps: torch.Tensor) -> torch.Tensor:
    """Pearson correlations between K maps, (..., K, rows, cols) -> (..., K, K) (Fig. 9, claim C033)."""
    return _gram(centred(maps))


def off_diagonal_mean(matrix: torch.Tensor) -> torch.Tensor:
    """Mean of the entries off the diagonal, (..., K, K) -> (...); NaN for K = 1."""
    k = matrix.shape[-1]
    return (matrix.sum((-1, -2)) - matrix.diagonal(dim1=-2, dim2=-1).sum(-1)) / (k * (k - 1) or math.nan)


def _gram(x: torch.Tensor) -> torch.Tensor:
    x = x / x.norm(dim=-1, keepdim=True)
    return x @ x.transpose(-1, -2)


@styled
def matrix(values: dict[str, torch.Tensor], names: dict[str, list[str]], label: str) -> Figure:
    """Square matrices (K, K) of one number for each pair, side by side, with the numbers written in.

    values: {model: matrix}; names: {model: names of its K rows and columns}.
    """
    figure, axes = plt.subplots(1, len(values), figsize=(2.6 * len(values) + 0.5, 2.7), squeeze=False)
    for axis, (title, square) in zip(axes[0], values.items(), strict=True):
        drawn = axis.imshow(square.cpu(), cmap=COMPONENT, vmin=-1, vmax=1)
        for i, row in enumerate(square.tolist()):
            for j, value in enumerate(row):
                axis.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if abs(value) > 0.7 else "black",
                )
        axis.set_xticks(range(len(square)), names[title], rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(square)), names[title], fontsize=7)
        axis.grid(False)
        axis.set_title(title)
    figure.colorbar(drawn, ax=axes[0].tolist(), fraction=0.04, label=label)
    return figure


def claims(models, alike: dict[str, torch.Tensor], spreads: dict, pairs: dict[str, str], having, profile: str):
    """Yields the arguments of `Run.claim`: C033 and C034 on trained registers, ours on registers added at test time.

    Dictionaries by model label: alike (images,), the mean correlation of the registers' maps; spreads, `object_spread`
    or None.
    """
    trained, missing = registered(models, pairs, having, profile)
    judged = [m for m in trained if not copies(m)]
    if trained and not judged:
        missing = f"the registers of {trained[0].label} are copies of one another (cosine above {COPIES})"
    if not judged:
        yield "C033", None, missing
        yield "C034", None, missing
    else:
        name, *others = [m.label for m in judged]
        low, high = interval(alike[name])
        rest = "; ".join(f"{other}: {alike[other].nanmean():.2f}" for other in others)
        text = f"{name}: mean correlation {alike[name].nanmean():.2f} ({low:.2f} to {high:.2f})"
        yield "C033", above(-high, -low, -0.9), text + (f"; others, not judged: {rest}" if rest else "")
        if spreads[name] is None:
            yield "C034", None, "needs images with known objects"
        else:
            rest = "; ".join(f"{other}: {_spread(spreads[other])}" for other in others if spreads[other])
            text = f"{name}: spread over objects {_spread(spreads[name])}"
            verdict = above(spreads[name].low, spreads[name].high, LEAST_SPREAD)
            yield "C034", verdict, text + (f"; others, not judged: {rest}" if rest else "")
    for model in models:
        if model.role == "mended":
            value = alike[model.label].nanmean().item()
            text = f"registers of {model.label}, added as equal zeros, stay copies of each other"
            yield f"ours-{model.label}", value > 0.999, f"mean correlation {value:.4f}", text, "none"


def _spread(of: Spread) -> str:
    gap = f"difference {100 * of.low:+.1f} to {100 * of.high:+.1f} points"
    return f"{of.spread:.3f}, shuffled {of.shuffled:.3f} ({gap}, p {of.p:.2g})"
