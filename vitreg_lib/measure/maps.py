"""Patch tokens as maps: likeness of neighbours, and principal components.

A map covers the patch tokens only (no cls, no registers): (..., rows, cols), with any leading batch, on any device;
tokens are (..., patches, dim) with `grid=(rows, cols)`. Results drop the map's axes. Half precision is computed in
float32, components in float64 (on Apple's MPS move the tokens to the CPU first). `measure.attention` computes attention
maps, `plots.maps` draws maps; `map_scores` beside the paper's figures scores them.
"""

import torch
import torch.nn.functional as F

Grid = tuple[int, int]


def neighbour_similarity(tokens: torch.Tensor, grid: Grid, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cosine similarity of each patch token to its 2 to 4 neighbours, (..., patches, dim) -> (..., patches).

    -1 to 1; patches at opposite edges are no neighbours (Sec. 2.2, Fig. 5a). A zero token has similarity 0. valid (...,
    patches) bool leaves tokens out; NaN for these and for a token without neighbours.
    """
    if tokens.shape[-2] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[-2]} tokens on a grid of {tuple(grid)}: drop cls and registers first")
    x = F.normalize(_at_least_float32(tokens), dim=-1).unflatten(-2, tuple(grid))
    down, right = ((a * b).sum(-1) for a, b in adjacent(x))
    there = x.new_ones(x.shape[:-1]) if valid is None else valid.unflatten(-1, tuple(grid)).to(x)
    both = [(a * b)[..., 0] for a, b in adjacent(there[..., None])]
    total = _sum_to_both(*(pair * weight for pair, weight in zip((down, right), both, strict=True)))
    return (total / _sum_to_both(*both)).flatten(-2)


def principal_components(
    tokens: torch.Tensor, n: int = 3, clip: float | None = 3.0, per_image: bool = False, grid: Grid | None = None
) -> torch.Tensor:
    """(..., patches, n) scores of the first n principal components of patch tokens (..., patches, dim), whitened.

    Scores are divided by their standard deviation, as in scikit-learn's PCA with `whiten`, over the patches of all
    images together or `per_image` (Fig. 17, 20). `clip`: scores are clipped at this number of standard deviations; None
    clips nothing. Sign: with `grid` the mean score of the central half of rows and columns is positive, so that colours
    never flip; without, or where that mean is 0, the largest loading in absolute value is positive. Components of equal
    variance remain arbitrary. Raises ValueError where n exceeds the dimensions or the patches - 1.
    """
    x = _at_least_float32(tokens).double()
    x = x.reshape(-1, *x.shape[-2:]) if per_image else x.reshape(1, -1, x.shape[-1])
    if not 1 <= n <= min(x.shape[-1], x.shape[-2] - 1):
        raise ValueError(f"n = {n} components of {x.shape[-2]} tokens in {x.shape[-1]} dimensions")
    x = x - x.mean(-2, keepdim=True)
    _, lengths, axes = torch.linalg.svd(x, full_matrices=False)
    std, axes = lengths[:, None, :n] / (x.shape[-2] - 1) ** 0.5, axes[:, :n].mT  # (images, 1, n), (images, dim, n)
    scores = x @ axes
    scores = scores * _component_signs(scores, axes, tokens.shape[-2], grid)[:, None]
    scores = torch.where(std > 1e-6 * std[..., :1], scores / std, 0)  # no variance, no score
    scores = scores if clip is None else scores.clamp(-clip, clip)
    return scores.reshape(*tokens.shape[:-1], n).to(_at_least_float32(tokens).dtype)


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


def adjacent(x: torch.Tensor):
    """(upper, lower) and (left, right) of every adjacent pair of (..., rows, cols, dim)."""
    return (x[..., :-1, :, :], x[..., 1:, :, :]), (x[..., :-1, :], x[..., 1:, :])


def _sum_to_both(down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Adds each pair's value to both of its patches: (..., rows - 1, cols) and (..., rows, cols - 1) -> the grid."""
    vertical = F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0))
    return vertical + F.pad(right, (0, 1)) + F.pad(right, (1, 0))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
