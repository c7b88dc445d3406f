"""What a patch token still holds of its own patch: its place and its pixels, read linearly (Fig. 5b, Table 5).

The paper trains one probe and scores it on normal and on outlier tokens. That is no fair comparison by itself: a probe
trained without outliers fails on them because their norm is new to it, and outliers at fixed places give their position
away. So each group of tokens is scored by three fits, trained on normal tokens, on all tokens and on the group itself,
and `matched_normal` gives every outlier a partner, the nearest normal token of its image. No image is both in training
and in test.
"""

import torch
from torch import Tensor

from .linear import fit_logistic, fit_ridge, predict, select, split_by_image, spread

POSITION_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_STRENGTHS = tuple(10.0**i for i in range(-2, 8))


def matched_normal(is_outlier: Tensor) -> Tensor:
    """Mask (images, rows, cols) of the partners: for each outlier the nearest normal token of its image.

    Among equally near ones first the one as far from the border as the outlier is, then the first by rows. A token that
    is nearest to two outliers is marked once. An image of outliers alone has no partner.
    """
    images, rows, cols = is_outlier.shape
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    row, col = row.flatten(), col.flatten()
    depth = torch.stack([row, col, rows - 1 - row, cols - 1 - col]).amin(0)  # steps from the border
    squared = (row[:, None] - row).square() + (col[:, None] - col).square()
    # one sortable number: distance, then difference of depth, then index
    cost = (squared * rows * cols + (depth[:, None] - depth).abs()) * rows * cols + torch.arange(rows * cols)
    flat = is_outlier.flatten(1).cpu()
    image, place = flat.nonzero().unbind(1)
    partner = cost[place].masked_fill(flat[image], torch.iinfo(torch.long).max).argmin(1)
    is_normal = ~flat[image, partner]
    matched = torch.zeros_like(flat)
    matched[image[is_normal], partner[is_normal]] = True
    return matched.view(images, rows, cols).to(is_outlier.device)


def groups(is_outlier: Tensor) -> dict[str, Tensor]:
    """Masks (images, patches) of "normal", "outlier", "matched" (`matched_normal`) and "border" (normal ones)."""
    border = torch.ones_like(is_outlier)
    border[:, 1:-1, 1:-1] = False
    masks = {
        "normal": ~is_outlier,
        "outlier": is_outlier,
        "matched": matched_normal(is_outlier),
        "border": border & ~is_outlier,
    }
    return {name: mask.flatten(1) for name, mask in masks.items()}


def position_probe(
    tokens: Tensor, positions: Tensor, grid: tuple[int, int], groups: dict, image_ids: Tensor, **options
):
    """A DataFrame with one row for each group and fit: how well positions are read off the group's test tokens.

    tokens (tokens, dim), positions (tokens,) patch index by rows, image_ids (tokens,); groups {name: bool (tokens,)}
    with "normal" among them. Columns: group, fit ("normal", "all", "own"), train and test (tokens used), places
    (classes of the fit), accuracy (0 to 1), distance (mean, in grid cells, from the predicted to the true cell), chance
    (accuracy of always naming the group's commonest training place); NaN for a fit without enough tokens. The penalty
    is chosen on validation images. options: max_tokens of a fit, drawn by seed; fold, as in `split_by_image`.
    Raises ValueError for lengths that differ, positions off the grid, NaN.
    """
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < grid[0] * grid[1]:
        raise ValueError(f"positions must lie in 0…{grid[0] * grid[1] - 1} for grid {grid[0]}x{grid[1]}")
    positions = positions.long().to(tokens.device)

    def fit(scaled, train, val):
        places = positions[train].unique()  # the classes: places of training tokens
        val = val & torch.isin(positions, places)
        if len(places) < 2 or not val.any():
            return None
        number = torch.searchsorted(places, positions.clamp(max=int(places.max())))
        model = fit_logistic(scaled(train), number[train], POSITION_STRENGTHS, tol=1e-5, decades=1)  # a sixth quicker
        best = select(model, scaled(val), number[val])
        return lambda x: places[predict(model, x, best).argmax(-1)], len(places)

    def score(result, x, test, own_train):
        read, places = result
        guess, true = read(x), positions[test]
        down, right = (guess // grid[1] - true // grid[1]).double(), (guess % grid[1] - true % grid[1]).double()
        row = {"accuracy": float((guess == true).double().mean()), "places": places}
        row["distance"] = float(torch.hypot(down, right).mean())
        if own_train.any():
            row["chance"] = float((true == positions[own_train].mode().values).double().mean())
        return row

    return _three_fits(tokens, groups, image_ids, fit, score, ["accuracy", "distance", "chance", "places"], **options)


def reconstruction_probe(
    tokens: Tensor, pixels: Tensor, groups: dict[str, Tensor], image_ids: Tensor, max_tokens: int = 50000, **options
):
    """A DataFrame with one row for each group and fit: the error of predicting the pixels of the group's test patches.

    pixels (tokens, values); the other arguments are those of `position_probe`. Columns: group, fit, train, test, l2
    (mean over patches of the L2 norm of the error, in the unit of the pixels), relative (l2 over that of the mean
    training patch). Raises ValueError for lengths that differ, NaN features or pixels.
    """
    if len(pixels) != len(tokens):
        raise ValueError(f"there are {len(tokens)} tokens, but {len(pixels)} patches of pixels")
    pixels = pixels.flatten(1).float().to(tokens.device)

    def fit(scaled, train, val):
        if int(train.sum()) < 2:
            return None
        model, x_val = fit_ridge(scaled(train), pixels[train], RIDGE_STRENGTHS), scaled(val)
        errors = [_l2(predict(model, x_val, i) - pixels[val]) for i in range(len(model.strengths))]
        best = int(torch.tensor(errors).argmin())
        return lambda x: predict(model, x, best), pixels[train].mean(0)

    def score(result, x, test, own_train):
        redrawn, mean = result
        l2 = _l2(redrawn(x) - pixels[test])
        return {"l2": l2, "relative": l2 / max(_l2(mean - pixels[test]), 1e-12)}

    return _three_fits(tokens, groups, image_ids, fit, score, ["l2", "relative"], max_tokens, **options)


def patch_pixels(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Pixels (images, patches, channels * height * width) of every patch, row by row, for images (images, channels,
    rows, cols) and patches of one side or of (height, width)."""
    if (torch.tensor(images.shape[-2:]) % torch.tensor(patch_size)).any():
        raise ValueError(f"{images.shape[-2]}x{images.shape[-1]} pixels are not whole patches of {patch_size}")
    return torch.nn.functional.unfold(images.float(), patch_size, stride=patch_size).transpose(1, 2)


def _three_fits(tokens, groups, image_ids, fit, score, columns, max_tokens: int = 20000, seed: int = 0, fold: int = 0):
    """The table of a local probe: each group scored by the fits trained on normal tokens, on all, and on itself.

    fit(scaled, train, val) gives a result, or None when there is too little to fit; score(result, features of the test
    tokens, test, own_train) gives a dict with some of `columns`. All masks are bool (tokens,); scaled(mask) are the
    features, scaled as the fit's training tokens are. Tokens in no group take no part.
    """
    import pandas as pd

    groups = _check_groups(tokens, groups, image_ids)
    part = split_by_image(image_ids, seed=seed, fold=fold).to(tokens.device)
    everything = torch.stack(list(groups.values())).any(0)
    fits: list = []  # (mask, result, scaled, number of training tokens): fits on the same tokens are one

    def fitted(mask):
        for other, *of_other in fits:
            if torch.equal(mask, other):
                return of_other
        sizes = (max_tokens, max(1, max_tokens // 4))
        train, val = (_draw(mask & (part == i), size, seed) for i, size in enumerate(sizes))

        size = spread(tokens[train].float())

        def scaled(rows):  # a copy of some tokens at a time: all together may take most of the memory
            return tokens[rows].float() / size

        result = fit(scaled, train, val) if train.any() and val.any() else None
        fits.append((mask, result, scaled, int(train.sum())))
        return fits[-1][1:]

    rows = []
    for name, mask in groups.items():
        test = mask & (part == 2)
        for label, trained_on in (("normal", groups["normal"]), ("all", everything), ("own", mask)):
            result, scaled, n_train = fitted(trained_on)
            row = {"group": name, "fit": label, "train": n_train, "test": int(test.sum())}
            possible = result is not None and test.any()
            scored = score(result, scaled(test), test, mask & (part == 0)) if possible else {}
            rows.append(row | {column: scored.get(column, float("nan")) for column in columns})
    return pd.DataFrame(rows)


def _draw(mask: Tensor, size: int, seed: int) -> Tensor:
    """At most `size` of the set entries, drawn at random."""
    index = mask.nonzero().flatten().cpu()
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:size]]
    return torch.zeros_like(mask).index_fill_(0, index.to(mask.device), True)


def _check_groups(tokens, groups, image_ids) -> dict[str, Tensor]:
    if "normal" not in groups:
        raise ValueError(f"no group named 'normal' among {tuple(groups)}: it is what the first fit is trained on")
    wrong = {name: len(mask) for name, mask in (groups | {"image_ids": image_ids}).items() if len(mask) != len(tokens)}
    if wrong:
        raise ValueError(f"there are {len(tokens)} tokens, but {wrong}")
    return {name: mask.bool().to(tokens.device) for name, mask in groups.items()}


def _l2(error: Tensor) -> float:
    return float(error.double().norm(dim=-1).mean())
