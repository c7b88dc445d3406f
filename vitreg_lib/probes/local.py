"""What a patch token still holds of its own patch: its place and its pixels, read linearly (Fig. 5b, Table 5).

The paper trains one probe and scores it on normal and on outlier tokens. That is no fair comparison by itself: a probe
that never saw an outlier fails on it because its norm is new to it, and where outliers sit at fixed places their
position is known beforehand. So each group of tokens is scored by three fits, trained on normal tokens, on all tokens
and on the group itself, and `matched_normal` gives every outlier a partner, the nearest normal token of its image.
Train and test share no image. Masks are (images, rows, cols) bool; tokens and pixels (images, patches, ...) hold no
prefix tokens.
"""

import torch
from torch import Tensor

from .linear import fit_logistic, fit_ridge, predict, scale, select, split_by_image

PER_PLACE = 40  # training tokens that the position probe needs for each place
READABLE = 5  # times chance: from there on a position counts as read
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


def same_places(masks: dict[str, Tensor]) -> dict[str, str]:
    """{model without outliers: the first model with outliers on a grid of the same size}, for masks by model.

    A model without outliers is a control at the places where another has them, on the same images.
    """
    own = [name for name, mask in masks.items() if mask.any()]
    lenders = {name: [o for o in own if masks[o].shape == mask.shape] for name, mask in masks.items() if not mask.any()}
    return {name: owners[0] for name, owners in lenders.items() if owners}


def pixels_of(model, images) -> Tensor:
    """(images, patches, values): the pixels of every patch of an `Images` set as the model sees it, from 0 to 255."""
    return patch_pixels(255 * images.pixels, model.anatomy.patch_size[0])


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


def local_probes(
    tokens: Tensor, pixels: Tensor, is_outlier: Tensor, max_tokens: int = 6000, seed: int = 0, fold: int = 0
):
    """Position and reconstruction probes of `groups`: a DataFrame indexed by (group, fit).

    tokens (images, patches, dim), pixels (images, patches, values). Columns: test (tokens scored), accuracy, distance
    (grid cells), chance, l2 (in the unit of the pixels), relative (l2 over that of the best constant patch).
    """
    return probe_groups(tokens, pixels, is_outlier.shape[1:], groups(is_outlier), max_tokens, seed, fold)


def probe_groups(
    tokens: Tensor, pixels: Tensor, grid, masks: dict[str, Tensor], max_tokens: int, seed: int, fold: int = 0
):
    """The table of `local_probes` for other groups, given as masks (images, patches); `grid` is (rows, cols)."""
    n, patches, _ = tokens.shape
    options = dict(
        groups={name: mask.flatten() for name, mask in masks.items()},
        image_ids=torch.arange(n).repeat_interleave(patches),
        max_tokens=max_tokens,
        seed=seed,
        fold=fold,
    )
    x, places = tokens.flatten(0, 1), torch.arange(patches).repeat(n)
    position = position_probe(x, places, tuple(grid), **options).set_index(["group", "fit"])
    reconstruction = reconstruction_probe(x, pixels.flatten(0, 1), **options).set_index(["group", "fit"])
    return position[["test", "accuracy", "distance", "chance"]].join(reconstruction[["l2", "relative"]])


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
    fold: int = 0,
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
        best = select(model, x_val, number[known])
        return lambda rows: places[predict(model, everything[rows], best.index).argmax(-1)], len(places), best.strength

    def score(result, test, own_train):
        if result is None:
            return {}
        place, places, strength = result
        guess, true = place(test), positions[test]
        down, right = (guess // grid[1] - true // grid[1]).double(), (guess % grid[1] - true % grid[1]).double()
        row = {"accuracy": float((guess == true).double().mean()), "places": places}
        row |= {"distance": float(torch.hypot(down, right).mean()), "strength": strength}
        if own_train.any():
            row["chance"] = float((true == positions[own_train].mode().values).double().mean())
        return row

    columns = ["accuracy", "distance", "chance", "places", "strength"]
    return three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed, fold)


def three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed, fold=0):
    """The table of a local probe: each group scored by the fits trained on normal tokens, on all, and on itself.

    fit(train, val) gives a result or None when there is too little to fit; score(result, test, own_train) a dict with
    some of `columns`. All masks are bool (tokens,). Tokens in no group take no part.
    """
    import pandas as pd

    groups = _check_groups(tokens, groups, image_ids, normal)
    part = split_by_image(image_ids, seed=seed, fold=fold).to(tokens.device)
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
    fold: int = 0,
):
    """A DataFrame with one row for each group and fit: the error of predicting the pixels of the group's test patches.

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
    return three_fits(tokens, groups, image_ids, normal, fit, score, columns, max_tokens, seed, fold)


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Pixels (images, patches, channels * size^2) of every patch, row by row, for images (images, channels, h, w)."""
    if images.shape[-2] % patch_size or images.shape[-1] % patch_size:
        raise ValueError(f"{images.shape[-2]}x{images.shape[-1]} pixels are not whole patches of {patch_size}")
    return torch.nn.functional.unfold(images.float(), patch_size, stride=patch_size).transpose(1, 2)


def _l2(error: Tensor) -> float:
    return float(error.double().norm(dim=-1).mean())
