"""Numbers that describe a map of one value per patch, and principal components of patch tokens.

Is a map peaky or smooth, wide or local; does it lie on outliers or on the border; do two maps agree? Attention, norms,
similarities and components are all such maps (Fig. 1, 2, 9, 10, 13, 16 to 21). The paper shows pictures and names no
measure, so the definitions are ours. `measure.attention` computes attention maps, `plots.maps` draws maps.

Conventions: a map covers the patch tokens only (no cls, no registers): `(..., rows, cols)`, or `(..., patches)` with
`grid=(rows, cols)`; any leading batch, any device; results drop the map's axes. "Mass" is the sum of a non-negative
map, so shares of mass do not depend on its scale; where there is no mass, or no variance, the score is NaN. Medians
average the two middle values, variances are those of the population. Half precision is computed in float32; some scores
need float64, so on Apple's MPS move the map to the CPU first.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

Grid = tuple[int, int]


def attention_on(
    attn_map: torch.Tensor, is_outlier: torch.Tensor, grid: Grid | None = None, renormalise: bool = True
) -> torch.Tensor:
    """Share of the attention that falls on outlier tokens, 0 to 1, (...).

    `is_outlier`: bool, of the map's shape or broadcast to it. `renormalise` True: of the mass on patches; False: the
    sum itself, which is the share of the query's whole attention where `attn_map` is a row of softmax (the rest is on
    cls and registers).
    """
    x = _mass(attn_map, grid)
    on = (x * _flat(is_outlier, grid)).sum(-1)
    return on / x.sum(-1) if renormalise else on


def attention_lift(attn_map: torch.Tensor, is_outlier: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Share of patch attention on outliers over their share of patches, (...): above 1, more than their due (Fig. 18).

    NaN where a map has no outlier.
    """
    share = _flat(is_outlier, grid).to(torch.float32).mean(-1)
    return attention_on(attn_map, is_outlier, grid) / share


def entropy(maps: torch.Tensor, grid: Grid | None = None, normalised: bool = False) -> torch.Tensor:
    """Entropy of a map's mass in nats, (...): 0 for one peak, log(patches) for a constant map (Fig. 16).

    `normalised` divides by log(patches), so 0 to 1 at any resolution (NaN for a single patch).
    """
    x = _mass(maps, grid)
    nats = torch.special.entr(x / x.sum(-1, keepdim=True)).sum(-1)
    return nats / (math.log(x.shape[-1]) or math.nan) if normalised else nats


def support_area(maps: torch.Tensor, grid: Grid | None = None, mass: float = 0.8) -> torch.Tensor:
    """Smallest share of patches that together hold `mass` of the map, in (0, 1], (...): small is local (Fig. 16)."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass {mass} out of range: above 0, at most 1")
    x = _mass(maps, grid)
    held = x.double().sort(-1, descending=True).values.cumsum(-1)
    total = held[..., -1:]
    needed = 1 + (held < total * mass * (1 - 1e-9)).sum(-1)  # the slack keeps rounding from adding a patch
    return torch.where(total[..., 0] > 0, needed / x.shape[-1], math.nan).to(x.dtype)


def border_share(maps: torch.Tensor, grid: Grid | None = None, width: int = 1) -> torch.Tensor:
    """Share of mass on the outer `width` rings, 0 to 1, (...); a constant map gives the rings' share of patches."""
    x = _mass(maps, grid).unflatten(-1, _grid_of(maps, grid))
    inner = x[..., width : max(width, x.shape[-2] - width), width : max(width, x.shape[-1] - width)]
    return 1 - inner.sum((-1, -2)) / x.sum((-1, -2))


def half_share(maps: torch.Tensor, grid: Grid | None = None, half: str = "upper") -> torch.Tensor:
    """Share of mass in one half, "upper", "lower", "left" or "right", 0 to 1, (...); a middle line counts half."""
    axes = {"upper": (-2, 1), "lower": (-2, -1), "left": (-1, 1), "right": (-1, -1)}
    if half not in axes:
        raise ValueError(f"unknown half {half!r}: one of {', '.join(axes)}")
    axis, side = axes[half]
    x = _mass(maps, grid).unflatten(-1, _grid_of(maps, grid))
    line = x.sum(-1 if axis == -2 else -2)
    place = torch.arange(line.shape[-1], device=line.device) - (line.shape[-1] - 1) / 2
    weight = 0.5 - 0.5 * side * place.sign()
    return (line * weight).sum(-1) / line.sum(-1)


def peak_ratio(maps: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Largest value over the median, (...): 1 is flat; above 10 is a peak in the sense of claims C002 to C004.

    Infinite where the median is 0 and the largest is not.
    """
    x = _flat(maps, grid)
    return x.amax(-1) / median(x)


def kurtosis(maps: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Excess kurtosis over patches, fourth moment / variance^2 - 3, (...): 0 for a normal distribution (claim C005)."""
    z = _centred(_flat(maps, grid))
    variance = z.square().mean(-1)
    return z.pow(4).mean(-1) / variance.square() - 3


def total_variation(maps: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Mean absolute difference of adjacent patches over the map's standard deviation, (...): a checkerboard gives 2.

    Each horizontal and vertical pair inside the grid counts once; nothing wraps round an edge. Brightness and contrast
    do not matter. A constant map gives 0; a single patch NaN.
    """
    x = _flat(maps, grid)
    down, right = _pairs(x.unflatten(-1, _grid_of(maps, grid)).unsqueeze(-1))
    mean = torch.cat([(a - b).abs().flatten(-3) for a, b in (down, right)], dim=-1).mean(-1)
    return torch.where(mean == 0, mean, mean / x.std(-1, correction=0))


def moran_i(maps: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Moran's I with the 4 neighbours that exist, (...): 1 smooth, about 0 (-1/(patches - 1)) noise, -1 a checkerboard.

    The mean product of adjacent deviations over the variance: the neighbour correlation of Fig. 13 and 20 (claim C063).
    """
    z = _centred(_flat(maps, grid))
    down, right = _pairs(z.unflatten(-1, _grid_of(maps, grid)).unsqueeze(-1))
    products = torch.cat([(a * b).flatten(-3) for a, b in (down, right)], dim=-1)
    return products.mean(-1) / z.square().mean(-1)


class TopOverlap(NamedTuple):
    """`overlap` (...) 0 to 1; `chance` (...) of unrelated maps; `p_value` (...) of each map; `pooled_p` () of all."""

    overlap: torch.Tensor
    chance: torch.Tensor
    p_value: torch.Tensor
    pooled_p: torch.Tensor


def top_overlap(
    map_a: torch.Tensor, map_b: torch.Tensor, k: int | torch.Tensor, grid: Grid | None = None
) -> TopOverlap:
    """Share of the k highest patches of one map that are among the k highest of the other (Fig. 9, 21; claim C064).

    `k`: a number or one for each map (...), such as its number of outliers; 0 to patches; with 0 the overlap is NaN.
    `p_value` is the chance of at least this overlap when the patches of one map are permuted at random. That
    distribution is known (hypergeometric), so it is computed exactly and needs no seed; `pooled_p` is the same for the
    total of all maps, permuted independently. The null knows no space: smooth or position-locked maps overlap more
    than it says; compare with maps of other images then. Ties are broken by position.
    """
    import numpy as np
    from scipy.stats import hypergeom

    a, b = torch.broadcast_tensors(_flat(map_a, grid), _flat(map_b, grid))
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


def neighbour_similarity(tokens: torch.Tensor, grid: Grid, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cosine similarity of each patch token to its 2 to 4 neighbours, (..., patches, dim) -> (..., patches).

    -1 to 1; nothing wraps round an edge (Sec. 2.2, Fig. 5a). A zero token has similarity 0. valid (..., patches) bool
    leaves tokens out; NaN for these and for a token without neighbours.
    """
    if tokens.shape[-2] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[-2]} tokens on a grid of {tuple(grid)}: drop cls and registers first")
    x = F.normalize(_at_least_float32(tokens), dim=-1).unflatten(-2, tuple(grid))
    down, right = ((a * b).sum(-1) for a, b in _pairs(x))
    there = x.new_ones(x.shape[:-1]) if valid is None else valid.unflatten(-1, tuple(grid)).to(x)
    both = [(a * b)[..., 0] for a, b in _pairs(there[..., None])]
    total = _sum_to_both(*(pair * weight for pair, weight in zip((down, right), both, strict=True)))
    return (total / _sum_to_both(*both)).flatten(-2)


class Components(NamedTuple):
    """`scores` (..., patches, n); `axes` (n, dim), of length 1; `variance_share` (n,); these two per image if asked."""

    scores: torch.Tensor
    axes: torch.Tensor
    variance_share: torch.Tensor


def principal_components(
    tokens: torch.Tensor,
    n: int = 3,
    whiten: bool = True,
    clip: float | None = 3.0,
    per_image: bool = False,
    grid: Grid | None = None,
) -> Components:
    """First n principal components of patch tokens (..., patches, dim), of all together or `per_image` (Fig. 17, 20).

    `whiten`: scores divided by their standard deviation (n - 1), as scikit-learn's PCA. `clip`: scores cut at this many
    standard deviations, whitened or not; None cuts nothing (`beyond_sigma` needs that). Sign: with `grid` the mean
    score of the central half of rows and columns is positive, so that pictures never flip; without, or where that
    mean is 0, the largest loading in absolute value is positive. Components of equal variance remain arbitrary.
    Raises ValueError where n exceeds the dimensions or the patches - 1.
    """
    x = _at_least_float32(tokens).double()
    x = x.reshape(-1, *x.shape[-2:]) if per_image else x.reshape(1, -1, x.shape[-1])
    if not 1 <= n <= min(x.shape[-1], x.shape[-2] - 1):
        raise ValueError(f"n = {n} components of {x.shape[-2]} tokens in {x.shape[-1]} dimensions")
    x = x - x.mean(-2, keepdim=True)
    variance, axes = _principal_axes(x, n)  # (images, n), (images, dim, n)
    scores = x @ axes
    sign = _component_signs(scores, axes, tokens.shape[-2], grid)
    scores, axes = scores * sign[:, None], (axes * sign[:, None]).transpose(-1, -2)
    std = variance.sqrt()[:, None]  # (images, 1, n)
    scores = torch.where(std > 1e-6 * std[..., :1], scores / std, 0)  # no variance, no score
    scores = scores if clip is None else scores.clamp(-clip, clip)
    scores = scores if whiten else scores * std
    share = variance * (x.shape[-2] - 1) / x.square().sum((-1, -2))[:, None]
    lead = tokens.shape[:-2] if per_image else ()
    results = scores.reshape(*tokens.shape[:-1], n), axes.reshape(*lead, n, -1), share.reshape(*lead, n)
    return Components(*(r.to(_at_least_float32(tokens).dtype) for r in results))


def beyond_sigma(scores: torch.Tensor, sigma: float = 3.0) -> torch.Tensor:
    """Share of patches with a whitened, unclipped score beyond `sigma`, (..., patches, n) -> (..., n) (claim C063)."""
    return (scores.abs() > sigma).to(scores.dtype).mean(-2)


def _principal_axes(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    # eigenvectors of the smaller of covariance (dim, dim) and Gram matrix (tokens, tokens); x centred, float64
    tokens, dim = x.shape[-2:]
    wide = dim > tokens
    matrix = x @ x.transpose(-1, -2) if wide else x.transpose(-1, -2) @ x
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values[..., -n:].flip(-1).clamp(min=0), vectors[..., -n:].flip(-1)
    axes = F.normalize(x.transpose(-1, -2) @ vectors, dim=-2) if wide else vectors
    return values / (tokens - 1), axes


def _component_signs(scores: torch.Tensor, axes: torch.Tensor, patches: int, grid: Grid | None) -> torch.Tensor:
    loading = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))[:, 0]  # (images, n)
    sign = torch.where(loading < 0, -1.0, 1.0).to(scores)
    if grid is None:
        return sign
    if grid[0] * grid[1] != patches:
        raise ValueError(f"{patches} tokens on a grid of {tuple(grid)}: drop cls and registers first")
    on_grid = scores.reshape(len(scores), -1, *grid, scores.shape[-1])
    r, c = grid[0] // 4, grid[1] // 4
    centre = on_grid[:, :, r : grid[0] - r, c : grid[1] - c].mean((1, 2, 3))
    decided = centre.abs() > 1e-6 * scores.std(-2)
    return torch.where(decided, torch.where(centre < 0, -1.0, 1.0).to(scores), sign)


def median(x: torch.Tensor) -> torch.Tensor:
    """Median of the last axis (...); of an even number of values the mean of the two in the middle, unlike torch's."""
    # torch.median takes the lower one, and torch.quantile refuses more than 16 million values
    ordered, last = x.sort(-1).values, x.shape[-1] - 1
    return ordered[..., last // 2].lerp(ordered[..., (last + 1) // 2], 0.5)


def _pairs(x: torch.Tensor):
    """(upper, lower) and (left, right) of every adjacent pair of (..., rows, cols, dim)."""
    return (x[..., :-1, :, :], x[..., 1:, :, :]), (x[..., :-1, :], x[..., 1:, :])


def _sum_to_both(down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Adds each pair's value to both of its patches: (..., rows - 1, cols) and (..., rows, cols - 1) -> the grid."""
    vertical = F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0))
    return vertical + F.pad(right, (0, 1)) + F.pad(right, (1, 0))


def _grid_of(maps: torch.Tensor, grid: Grid | None) -> Grid:
    return tuple(maps.shape[-2:]) if grid is None else tuple(grid)


def _flat(maps: torch.Tensor, grid: Grid | None) -> torch.Tensor:
    """(..., patches), at least float32, bool left as it is."""
    if grid is None:
        if maps.ndim < 2:
            raise ValueError(f"a map of shape {tuple(maps.shape)}: give grid=(rows, cols) with (..., patches)")
        maps = maps.flatten(-2)
    elif maps.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"{maps.shape[-1]} values on a grid of {tuple(grid)}: drop cls and registers first")
    return maps if maps.dtype == torch.bool else _at_least_float32(maps)


def _mass(maps: torch.Tensor, grid: Grid | None) -> torch.Tensor:
    x = _flat(maps, grid)
    x = x.float() if x.dtype == torch.bool else x
    if (x < 0).any():
        raise ValueError(
            f"a map of mass cannot be negative, smallest value {x.min().item():.3g}; shift or clamp it first"
        )
    return x


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: torch.Tensor) -> torch.Tensor:
    z = x - x.mean(-1, keepdim=True)
    # a constant map is exactly 0, whatever its mean rounds to
    return torch.where(x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True), 0, z)


def _rank(x: torch.Tensor) -> torch.Tensor:
    """Place of every patch from the highest, 0 first; ties in order of position."""
    return x.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
