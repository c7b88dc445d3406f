"""Scores of maps with one value per patch (Fig. 1, 2, 8, 13, 16, 19 to 21).

Does a map have peaks or is it smooth, is it wide or local, do two maps agree? The paper shows pictures and names no
measure, so the definitions are ours. Maps are (..., rows, cols) of patches, without cls and registers; results have the
leading axes. The mass of a non-negative map is its sum, so shares of mass do not depend on the map's scale. Without
mass, or without variance, a score is NaN. Variances divide by n. Half precision is computed in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import hypergeom

from vitreg_lib.measure.maps import adjacent


def table(
    attention: dict[str, torch.Tensor],
    is_outlier: dict[str, torch.Tensor] | None = None,
    where: dict[str, torch.Tensor | None] | None = None,
) -> pd.DataFrame:
    """Scores of attention maps {model: (images, rows, cols)}, one row a model.

    peak_ratio: largest over median value, the median over images; peaky_images: share of images in which a patch is
    above 10 times the median, among the patches of `where` (bool, see `background`; None or absent: all patches);
    kurtosis, entropy (at most 1) and total_variation: means over images; attention_on_outliers: mean share of the mass
    on `is_outlier` (images, rows, cols), 0 without outliers.
    """
    rows = {}
    for name, maps in attention.items():
        inside = (where or {}).get(name)
        high = maps > 10 * median(maps.flatten(1))[:, None, None]
        peaky = (high if inside is None else high & inside).flatten(1).any(1)
        rows[name] = {
            "peak_ratio": median(peak_ratio(maps)).item(),
            "peaky_images": peaky.float().mean().item(),
            "kurtosis": kurtosis(maps).mean().item(),
            "entropy": entropy(maps, normalised=True).mean().item(),
            "total_variation": total_variation(maps).mean().item(),
        }
        if is_outlier is not None:
            rows[name]["attention_on_outliers"] = attention_on(maps, is_outlier[name]).mean().item()
    return pd.DataFrame.from_dict(rows, orient="index")


def background(images, grid: tuple[int, int]) -> torch.Tensor | None:
    """(n, rows, cols) bool: patches that contain no part of an object, for scenes; None for photos."""
    if images.scenes is None:
        return None
    on_object = (images.scenes.instances > 0).float()[:, None]
    return F.adaptive_max_pool2d(on_object, tuple(grid))[:, 0] == 0


def attention_on(attn_map: torch.Tensor, is_outlier: torch.Tensor) -> torch.Tensor:
    """Share of a map's attention on outlier tokens, 0 to 1, (...); NaN for a map without attention.

    is_outlier: bool, of the map's shape or broadcast to it. Raises ValueError for negative attention.
    """
    x = mass(attn_map)
    return (x * flat(is_outlier)).sum(-1) / x.sum(-1)


def entropy(maps: torch.Tensor, normalised: bool = False) -> torch.Tensor:
    """Entropy of a map's mass in nats, (...): 0 for one peak, log(patches) for a constant map.

    `normalised` divides by log(patches), so 0 to 1 at any resolution (NaN for a single patch).
    """
    x = mass(maps)
    nats = torch.special.entr(x / x.sum(-1, keepdim=True)).sum(-1)
    return nats / (math.log(x.shape[-1]) or math.nan) if normalised else nats


def peak_ratio(maps: torch.Tensor) -> torch.Tensor:
    """Largest value over the median, (...): 1 is flat; above 10 is a peak in the sense of claims C002 to C004.

    Infinite if the median is 0 and the largest value is not.
    """
    x = flat(maps)
    return x.amax(-1) / median(x)


def kurtosis(maps: torch.Tensor) -> torch.Tensor:
    """Excess kurtosis over patches, fourth moment / variance^2 - 3, (...): 0 for a normal distribution (claim C005)."""
    z = centred(maps)
    variance = z.square().mean(-1)
    return z.pow(4).mean(-1) / variance.square() - 3


def total_variation(maps: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of adjacent patches over the map's standard deviation, (...): a checkerboard gives 2.

    Each horizontal and vertical pair inside the grid counts once; edges do not wrap around. The score does not depend
    on brightness and contrast. A constant map gives 0; a single patch NaN.
    """
    x = flat(maps)
    pairs = adjacent(x.view(*maps.shape, 1))
    mean = torch.cat([(a - b).abs().flatten(-3) for a, b in pairs], dim=-1).mean(-1)
    return torch.where(mean == 0, mean, mean / x.std(-1, correction=0))


def moran_i(maps: torch.Tensor) -> torch.Tensor:
    """Moran's I with up to 4 neighbours, (...): 1 smooth, about 0 (-1/(patches - 1)) noise, -1 a checkerboard.

    The mean product of neighbouring deviations over the variance, the correlation of neighbours (Fig. 13, 20; C063).
    """
    z = centred(maps)
    pairs = adjacent(z.view(*maps.shape, 1))
    products = torch.cat([(a * b).flatten(-3) for a, b in pairs], dim=-1)
    return products.mean(-1) / z.square().mean(-1)


def centred(maps: torch.Tensor) -> torch.Tensor:
    """(..., patches) deviations from the map's mean; exactly 0 in a constant map, even if its mean is rounded."""
    x = flat(maps)
    z = x - x.mean(-1, keepdim=True)
    return torch.where(x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True), 0, z)


class TopOverlap(NamedTuple):
    """overlap (...), 0 to 1; chance (...): of unrelated maps; p_value (...): of each map; pooled_p (): of all maps."""

    overlap: torch.Tensor
    chance: torch.Tensor
    p_value: torch.Tensor
    pooled_p: torch.Tensor


def top_overlap(map_a: torch.Tensor, map_b: torch.Tensor, k: int | torch.Tensor) -> TopOverlap:
    """Share of the k highest patches of one map that are among the k highest of the other (claim C064).

    `k`: one number, or one for each map (...), such as its number of outliers; from 0 (the overlap is NaN) to the
    number of patches. `p_value` is the probability of at least this overlap if the patches of one map are permuted at
    random. It is computed exactly, from the hypergeometric distribution. `pooled_p` is the same for the total over all
    maps, permuted independently. This null hypothesis ignores position: two smooth maps, or two maps that prefer the
    same places in every image, overlap more. Then compare with maps of other images. Ties are broken by position.
    """
    a, b = torch.broadcast_tensors(flat(map_a), flat(map_b))
    patches = a.shape[-1]
    k = torch.as_tensor(k, device=a.device).expand(a.shape[:-1])
    if ((k < 0) | (k > patches)).any():
        raise ValueError(f"k from {k.min().item()} to {k.max().item()} out of range for {patches} patches")
    in_both = (_rank(a) < k[..., None]) & (_rank(b) < k[..., None])
    common, sizes = in_both.sum(-1), k.cpu().numpy()
    p_value = hypergeom.sf(common.cpu().numpy() - 1, patches, sizes, sizes)
    total = np.ones(1)  # the distribution of the sum over maps
    for size in sizes.flat:
        total = np.convolve(total, hypergeom.pmf(np.arange(size + 1), patches, size, size))
    pooled_p = min(total[int(common.sum()) :].sum(), 1.0)
    p_value, pooled_p = (torch.as_tensor(p, dtype=torch.float64, device=a.device) for p in (p_value, pooled_p))
    return TopOverlap(common / k, torch.where(k > 0, k / patches, math.nan), p_value, pooled_p)


def _rank(x: torch.Tensor) -> torch.Tensor:
    """Place of every patch from the highest, 0 first; ties in order of position."""
    return x.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def median(x: torch.Tensor) -> torch.Tensor:
    """Median over the last axis (...); for an even number of values the mean of the middle two, unlike torch."""
    # torch.median takes the lower one, and torch.quantile refuses more than 16 million values
    ordered, last = x.sort(-1).values, x.shape[-1] - 1
    return ordered[..., last // 2].lerp(ordered[..., (last + 1) // 2], 0.5)


def flat(maps: torch.Tensor) -> torch.Tensor:
    """(..., patches) of maps (..., rows, cols), at least float32; bool stays bool."""
    if maps.ndim < 2:
        raise ValueError(f"a map of shape {tuple(maps.shape)}: expected (..., rows, cols)")
    return (
        maps.flatten(-2)
        if maps.dtype == torch.bool
        else maps.flatten(-2).to(torch.promote_types(maps.dtype, torch.float32))
    )


def mass(maps: torch.Tensor) -> torch.Tensor:
    """`flat` of non-negative maps, bool as float32. Raises ValueError for negative values."""
    x = flat(maps)
    x = x.float() if x.dtype == torch.bool else x
    if (x < 0).any():
        raise ValueError(
            f"a map of mass cannot be negative, smallest value {x.min().item():.3g}; shift or clamp it first"
        )
    return x
