"""What local information an outlier token holds, against a control that is fair to it (Fig. 5, Table 5).

The paper compares outliers with all normal tokens. Where outliers sit at fixed places or on plain patches, that
compares places and contents. `matched_normal` therefore gives every outlier a partner: the nearest normal token of the
same image. `local_probes` scores both groups, all normal tokens and the border by the three fits of `probes.position`.
Masks are (images, rows, cols) bool; tokens, pixels and similarities (images, patches, …) without prefix tokens.
"""

import torch
from torch import Tensor

from .local_fits import patch_pixels, position_probe, reconstruction_probe

READABLE = 5  # times chance: from there on a position counts as read


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
    blocked = cost[place].masked_fill(flat[image], torch.iinfo(torch.long).max)
    partner = blocked.argmin(1)
    found = ~flat[image, partner]
    matched = torch.zeros_like(flat)
    matched[image[found], partner[found]] = True
    return matched.view(images, rows, cols).to(is_outlier.device)


def same_places(masks: dict[str, Tensor]) -> dict[str, str]:
    """{model without outliers: the first model with outliers on a grid of the same size}, for masks by model.

    A model without outliers is a control at the places where another has them, on the same images.
    """
    own = [name for name, mask in masks.items() if mask.any()]
    lenders = {name: [o for o in own if masks[o].shape == mask.shape] for name, mask in masks.items() if not mask.any()}
    return {name: found[0] for name, found in lenders.items() if found}


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


def local_probes(tokens: Tensor, pixels: Tensor, is_outlier: Tensor, max_tokens: int = 6000, seed: int = 0):
    """Position and reconstruction probes of `groups`: a DataFrame indexed by (group, fit).

    tokens (images, patches, dim), pixels (images, patches, values). Columns: test (tokens scored), accuracy, distance
    (grid cells), chance, l2 (in the unit of the pixels), relative (l2 over that of the best constant patch).
    """
    return _both_probes(tokens, pixels, is_outlier.shape[1:], groups(is_outlier), max_tokens, seed)


def _both_probes(tokens: Tensor, pixels: Tensor, grid, masks: dict[str, Tensor], max_tokens: int, seed: int):
    """The table of `local_probes` for groups given as masks (images, patches)."""
    n, patches, _ = tokens.shape
    options = dict(
        groups={name: mask.flatten() for name, mask in masks.items()},
        image_ids=torch.arange(n).repeat_interleave(patches),
        max_tokens=max_tokens,
        seed=seed,
    )
    x, places = tokens.flatten(0, 1), torch.arange(patches).repeat(n)
    found = position_probe(x, places, tuple(grid), **options).set_index(["group", "fit"])
    drawn = reconstruction_probe(x, pixels.flatten(0, 1), **options).set_index(["group", "fit"])
    return found[["test", "accuracy", "distance", "chance"]].join(drawn[["l2", "relative"]])
