"""Local probe for pixels: how well does a linear model redraw a patch from its token? (Fig. 5b, Table 5)

Ridge regression from token to the patch's pixels, penalty chosen on validation images. The paper does not say its pixel
scale (ours is that of the pixels given): compare the ratio between groups. Plain patches are easy to redraw, so
`flat` beside each error is that of the best constant patch, the mean of the fit's training patches. Groups, the three
fits and the split by image are those of `probes.position`.
"""

import torch
from torch import Tensor

from .linear import fit_ridge, predict, scale
from .position import three_fits

STRENGTHS = tuple(10.0**i for i in range(-2, 8))


def reconstruction_probe(
    tokens: Tensor,
    pixels: Tensor,
    groups: dict[str, Tensor],
    image_ids: Tensor,
    normal: str = "normal",
    strengths=STRENGTHS,
    max_tokens: int = 50000,
    seed: int = 0,
):
    """A DataFrame with one row for each group and fit: the error of redrawing the group's test patches.

    tokens (tokens, dim), pixels (tokens, values), groups {name: bool (tokens,)}, image_ids (tokens,). Columns: group,
    fit ("normal", "all", "own"), train and test (tokens used), l2 (mean over patches of the L2 norm of the error, in
    the unit of the pixels), rmse (per value), flat (l2 of the mean training patch), relative (l2 / flat), strength. A
    fit without enough tokens gives NaN. Raises ValueError for lengths that differ, NaN features or pixels.
    """
    if len(pixels) != len(tokens):
        raise ValueError(f"there are {len(tokens)} tokens, but {len(pixels)} patches of pixels")
    pixels = pixels.flatten(1).float().to(tokens.device)

    def fit(train, val):
        if int(train.sum()) < 2:
            return None
        x, x_val, everything = scale(tokens[train].float(), tokens[val].float(), tokens.float())
        model = fit_ridge(x, pixels[train], strengths)
        errors = [_l2(predict(model, x_val, i) - pixels[val]) for i in range(len(model.strengths))]
        best = int(torch.tensor(errors).argmin())
        return lambda rows: predict(model, everything[rows], best), pixels[train].mean(0), float(model.strengths[best])

    def score(result, test, own_train):
        if result is None:
            return {}
        draw, mean, strength = result
        error = draw(test) - pixels[test]
        l2, flat = _l2(error), _l2(mean - pixels[test])
        rmse = float(error.double().square().mean().sqrt())
        return {"l2": l2, "rmse": rmse, "flat": flat, "relative": l2 / max(flat, 1e-12), "strength": strength}

    columns = ["l2", "rmse", "flat", "relative", "strength"]
    return three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed)


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Pixels (images, patches, channels * size^2) of every patch, row by row, for images (images, channels, h, w)."""
    if images.shape[-2] % patch_size or images.shape[-1] % patch_size:
        raise ValueError(f"{images.shape[-2]}x{images.shape[-1]} pixels are not whole patches of {patch_size}")
    return torch.nn.functional.unfold(images.float(), patch_size, stride=patch_size).transpose(1, 2)


def _l2(error: Tensor) -> float:
    return float(error.double().norm(dim=-1).mean())
