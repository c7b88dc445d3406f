"""Local probe for position: can a linear model tell from a patch token where in the image it sits? (Fig. 5b, Table 5)

Multinomial logistic regression from token to grid cell. The paper trains one model and scores it on normal and on
outlier tokens. That is not a fair comparison by itself: a probe that never saw an outlier fails on it because its norm
is new to it, and where outliers sit at fixed places their position is known beforehand. So each group of tokens is
scored by three fits, trained on normal tokens, on all tokens and on the group itself, and groups may overlap: give the
normal tokens at the outliers' places (border, corners) as a group of their own. Train and test share no image.
"""

import torch
from torch import Tensor

from .linear import fit_logistic, fit_ridge, predict, scale, select, split_by_image

POSITION_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_STRENGTHS = tuple(10.0**i for i in range(-2, 8))


def position_probe(
    tokens: Tensor,
    positions: Tensor,
    grid: tuple[int, int],
    groups: dict[str, Tensor],
    image_ids: Tensor,
    normal: str = "normal",
    strengths=POSITION_STRENGTHS,
    max_tokens: int = 20000,
    seed: int = 0,
):
    """A DataFrame with one row for each group and fit: how well positions are read off the group's test tokens.

    tokens (tokens, dim), positions (tokens,) patch index by rows, groups {name: bool (tokens,)}, image_ids (tokens,).
    `normal` names the group that the first fit is trained on. Columns: group, fit ("normal", "all", "own"), train and
    test (tokens used), places (classes that the fit knows), accuracy (0 to 1), distance (mean, in grid cells, from the
    predicted to the true cell), chance (accuracy of always naming the group's commonest training place), strength. At
    most `max_tokens` training tokens a fit, drawn by `seed`; a fit without enough tokens gives NaN. Strength of the
    penalty is chosen on validation images. Raises ValueError for lengths that differ, positions off the grid, NaN.
    """
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < grid[0] * grid[1]:
        raise ValueError(f"positions must lie in 0…{grid[0] * grid[1] - 1} for grid {grid[0]}x{grid[1]}")
    positions = positions.long().to(tokens.device)

    def fit(train, val):
        places = positions[train].unique()  # the classes: places seen in training
        known = val & torch.isin(positions, places)
        if len(places) < 2 or not known.any():
            return None
        number = torch.searchsorted(places, positions.clamp(max=int(places.max())))
        x, x_val, everything = scale(tokens[train].float(), tokens[known].float(), tokens.float())
        model = fit_logistic(x, number[train], strengths, tol=1e-5)
        choice = select(model, x_val, number[known])
        return (
            lambda rows: places[predict(model, everything[rows], choice.index).argmax(-1)],
            len(places),
            choice.strength,
        )

    def score(result, test, own_train):
        if result is None:
            return {}
        place, places, strength = result
        guess, true = place(test), positions[test]
        off = [(a - b).double() for a, b in zip(_cells(guess, grid), _cells(true, grid), strict=True)]
        row = {"accuracy": float((guess == true).double().mean()), "places": places}
        row |= {"distance": float(torch.hypot(*off).mean()), "strength": strength}
        if own_train.any():
            row["chance"] = float((true == positions[own_train].mode().values).double().mean())
        return row

    columns = ["accuracy", "distance", "chance", "places", "strength"]
    return three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed)


def three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed):
    """The table of a local probe: each group scored by the fits trained on normal tokens, on all, and on itself.

    fit(train, val) gives a result or None when there is too little to fit; score(result, test, own_train) a dict with
    some of `columns`. All masks are bool (tokens,). Tokens in no group take no part.
    """
    import pandas as pd

    groups = _check_groups(tokens, groups, image_ids, normal)
    part = split_by_image(image_ids, seed=seed).to(tokens.device)
    everything = torch.stack(list(groups.values())).any(0)
    fits: list = []  # (mask, fit): where masks are the same, one fit serves both

    def fitted(mask):
        for other, known in fits:
            if torch.equal(mask, other):
                return known
        fits.append((mask, _fit(fit, mask, part, max_tokens, seed)))
        return fits[-1][1]

    rows = []
    for name, mask in groups.items():
        test = mask & (part == 2)
        for label, trained_on in (("normal", groups[normal]), ("all", everything), ("own", mask)):
            result, train = fitted(trained_on)
            row = {"group": name, "fit": label, "train": int(train.sum()), "test": int(test.sum())}
            scored = score(result, test, mask & (part == 0)) if test.any() else {}
            rows.append(row | {column: scored.get(column, float("nan")) for column in columns})
    return pd.DataFrame(rows)


def _fit(fit, mask, part, max_tokens, seed):
    train, val = (_draw(mask & (part == i), size, seed) for i, size in ((0, max_tokens), (1, max(1, max_tokens // 4))))
    return (fit(train, val) if train.any() and val.any() else None), train


def _draw(mask: Tensor, size: int, seed: int) -> Tensor:
    """At most `size` of the set entries, drawn at random."""
    index = mask.nonzero().flatten().cpu()
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:size]]
    return torch.zeros_like(mask).index_fill_(0, index.to(mask.device), True)


def _cells(index: Tensor, grid) -> tuple[Tensor, Tensor]:
    return index // grid[1], index % grid[1]


def _check_groups(tokens, groups, image_ids, normal) -> dict[str, Tensor]:
    if normal not in groups:
        raise ValueError(f"no group named {normal!r} among {tuple(groups)}: it is what the first fit is trained on")
    wrong = {name: len(mask) for name, mask in (groups | {"image_ids": image_ids}).items() if len(mask) != len(tokens)}
    if wrong:
        raise ValueError(f"there are {len(tokens)} tokens, but {wrong}")
    return {name: mask.bool().to(tokens.device) for name, mask in groups.items()}


def reconstruction_probe(
    tokens: Tensor,
    pixels: Tensor,
    groups: dict[str, Tensor],
    image_ids: Tensor,
    normal: str = "normal",
    strengths=RIDGE_STRENGTHS,
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
