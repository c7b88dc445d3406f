"""Do outliers follow their place or their content? Interventions on a model and its images (ours).

`tests` exchanges position embeddings or contents, flips, shifts or blanks the image, and measures where the outliers
go. Masks are (images, rows, cols) bool; one cutoff, that of the original model, defines all outliers.
"""

import copy
import dataclasses

import torch


def tests(model, images: torch.Tensor, cutoff: float, count: int = 4, layer: int = -1):
    """A DataFrame of what outliers follow when place and content are separated, one row per test.

    follows_place, follows_content: share of outliers at the new position of their place (its position embedding), or of
    their content, where the two differ (NaN if they never do, as for four corners that a flip exchanges). outliers:
    share of outliers in the test over that in the original images (in the last two tests nothing moves). The `count`
    places with most outliers are exchanged with as many inner places with fewest. Raises ValueError without outliers.
    """
    import pandas as pd

    masks = _outliers(model, images, cutoff, layer)  # (images, rows, cols)
    share = masks.double().mean(0)
    if not masks.any():
        raise ValueError(f"{model.label} has no outliers above {cutoff:.3g}: nothing to test")
    rows, cols = share.shape
    often = share.flatten().argsort(descending=True, stable=True)[:count]
    middle = slice(rows // 4, rows - rows // 4), slice(cols // 4, cols - cols // 4)
    inner = torch.full_like(share, 2.0)  # above any share: not to be chosen
    inner[middle] = share[middle]
    inner.view(-1)[often] = 2.0
    seldom = inner.flatten().argsort(stable=True)[:count]
    patch_embed = getattr(model.module, "patch_embed", None)
    has_positions = getattr(model.module, "pos_embed", None) is not None
    has_positions = has_positions and getattr(patch_embed, "num_patches", 0) == rows * cols
    table = {}

    def exchanged(name, masks_after, place_went_to, content_went_to):
        before = share.flatten()[often].mean()
        at = masks_after.double().mean(0).flatten()
        table[name] = {
            "follows_place": (at[place_went_to].mean() / before).item(),
            "follows_content": (at[content_went_to].mean() / before).item(),
            "outliers": (masks_after.double().mean() / masks.double().mean()).item(),
        }

    def moved(name, pixels, carry):
        after = _outliers(model, pixels, cutoff, layer)
        gone = carry(masks)
        stayed, went = masks & ~gone, gone & ~masks  # a token of both says nothing
        table[name] = {
            "follows_place": ((after & stayed).sum() / stayed.sum()).item(),
            "follows_content": ((after & went).sum() / went.sum()).item(),
            "outliers": (after.double().mean() / masks.double().mean()).item(),
        }

    if has_positions:
        swapped = with_positions(model, often, seldom)
        exchanged("position embeddings exchanged", _outliers(swapped, images, cutoff, layer), seldom, often)
    pixels = swap_contents(images, often, seldom, (rows, cols))
    exchanged("contents exchanged", _outliers(model, pixels, cutoff, layer), often, seldom)
    moved("image flipped", images.flip(-1), lambda m: m.flip(-1))
    step = images.shape[-1] // cols
    moved("image shifted by one patch", images.roll(step, -1), lambda m: m.roll(1, -1))
    only = {"follows_place": float("nan"), "follows_content": float("nan")}
    grey = _outliers(model, torch.zeros_like(images[:1]), cutoff, layer).double().mean() / masks.double().mean()
    table["a grey image"] = only | {"outliers": grey.item()}
    if has_positions:
        bare = _outliers(with_positions(model), images, cutoff, layer).double().mean() / masks.double().mean()
        table["no position embeddings"] = only | {"outliers": bare.item()}
    return pd.DataFrame.from_dict(table, orient="index")


def with_positions(model, a: torch.Tensor | None = None, b: torch.Tensor | None = None):
    """A `zoo.Model` whose position embeddings of patches `a` and `b` are exchanged; all are zero without arguments."""
    module = copy.deepcopy(model.module)
    patches = module.patch_embed.num_patches
    prefix = module.pos_embed.shape[1] - patches
    if a is None:
        module.pos_embed.data[:, prefix:] = 0
    else:
        module.pos_embed.data[:, torch.cat([a, b]) + prefix] = module.pos_embed.data[:, torch.cat([b, a]) + prefix]
    return dataclasses.replace(model, module=module)


def swap_contents(images: torch.Tensor, a: torch.Tensor, b: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (n, 3, h, w) in which the pixels of patches `a` and `b` (positions, row by row) are exchanged."""
    rows, cols = grid
    height, width = images.shape[-2] // rows, images.shape[-1] // cols
    out = images.clone()
    for first, second in [*zip(a.tolist(), b.tolist(), strict=True), *zip(b.tolist(), a.tolist(), strict=True)]:
        r, c = divmod(first, cols)
        s, d = divmod(second, cols)
        out[..., r * height : (r + 1) * height, c * width : (c + 1) * width] = images[
            ..., s * height : (s + 1) * height, d * width : (d + 1) * width
        ]
    return out


def _outliers(model, images: torch.Tensor, cutoff: float, layer: int) -> torch.Tensor:
    return model.capture(images, "norms", layers=layer).norm_maps > cutoff
