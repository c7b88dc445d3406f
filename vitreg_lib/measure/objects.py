"""Unsupervised object discovery with LOST, and its score CorLoc (Table 3, Figs. 13 and 14).

LOST (Simeoni et al. 2021, Sec. 3.2 [recall of its equations]) on the features f of one image's patches:
  (1) graph a_pq = 1 if f_p . f_q >= 0, degree d_p = sum_q a_pq, seed = the patch of lowest degree;
  (2) S = the seed, and the patches among the k of lowest degree with f_q . f_seed >= 0;
  (3) mask m_q = 1 if sum over s in S of f_q . f_s >= 0; the box is that of the mask's part joined to the seed.
The registers paper adds a hand-set bias to the Gram matrix but does not state in which of the lines: see `bias_on`.

`variant="paper"` is the above, `variant="code"` the published code, which differs as `CODE_DIFFERENCES` lists (read in
its source); a tuple of those names applies just these. Boxes are (left, top, right, bottom), ends excluded, in patches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .pairs import interval

CODE_DIFFERENCES = {
    "strict": "all three comparisons are > 0 instead of >= 0",
    "no_self": "a patch's similarity to itself is left out of its degree",
}
# A third difference is not reproduced: the code breaks ties of the degree by an unstable sort, here `ties` decides.
LINES = ("degree", "seed", "mask")
IN_WORDS = {
    "corloc": "CorLoc (images)",
    "positive_share": "Gram entries ≥ 0",
    "whole_share": "box is the whole image (images)",
}
_GRAM_VALUES = {"cpu": 2**20, "cuda": 2**26}  # Gram entries at once: on a CPU as many as fit its cache


@dataclass
class Lost:
    """LOST's box for each image, and intermediates; maps (batch, rows, cols) only with `intermediates=True`."""

    boxes: Tensor  # (batch, 4)
    seeds: Tensor  # (batch,) patch index
    tied_seeds: Tensor  # (batch,) number of patches that share the lowest degree, 1 when the seed is unique
    seed_in_mask: Tensor  # (batch,) False: the mask misses the seed, the box is the seed's patch alone
    positive_share: Tensor  # (batch,) share of Gram entries >= 0, bias included; near 1 the mask is the whole image
    degrees: Tensor | None = None
    seed_similarity: Tensor | None = None
    expansion: Tensor | None = None  # sum over S of the similarities, before the comparison with 0
    selected: Tensor | None = None  # S
    mask: Tensor | None = None
    component: Tensor | None = None

    def shares(self, grid: tuple[int, int]) -> dict[str, float]:
        """Shares of trivial boxes, as means over the images.

        positive_share; tied_share: of images whose seed is not the only patch of lowest degree; whole_share: of images
        whose box is the whole grid.
        """
        whole = self.boxes == self.boxes.new_tensor([0, 0, grid[1], grid[0]])
        return {
            "positive_share": self.positive_share.mean().item(),
            "tied_share": (self.tied_seeds > 1).double().mean().item(),
            "whole_share": whole.all(1).double().mean().item(),
        }


def lost(
    features: Tensor,
    grid: tuple[int, int],
    k: int = 100,
    bias: float = 0.0,
    normalize: bool = False,
    variant: str | tuple[str, ...] = "paper",
    bias_on: tuple[str, ...] = LINES,
    ties: str = "lowest",
    valid: Tensor | None = None,
    intermediates: bool = False,
) -> Lost:
    """The object that LOST finds in each image.

    features (batch, patches, dim) of keys, queries, values or tokens, without prefix tokens; grid (rows, cols); k: size
    of the pool of Eq. 2; bias: added to every Gram entry in the lines named by `bias_on`; normalize: L2-normalise each
    feature first; ties: among equal degrees the "lowest" or the "highest" patch index comes first; valid (batch,
    patches) bool excludes patches, for example outliers. Components are 4-connected. Where the mask misses the seed
    (the code raises an error there) the box is the seed's patch. Raises ValueError for a grid that does not fit, an
    unknown option, NaN features, an image without valid patch.
    """
    rows, cols = _check(features, grid)
    strict, no_self = _differences(variant)
    if ties not in ("lowest", "highest"):
        raise ValueError(f"unknown ties {ties!r}: choose 'lowest' or 'highest'")
    if k < 1 or not set(bias_on) <= set(LINES):
        raise ValueError(f"k must be at least 1 and bias_on be among {LINES}, got {k} and {bias_on}")
    if valid is not None and not bool(valid.any(1).all()):
        raise ValueError(f"image {int((~valid.any(1)).nonzero()[0])} has no valid patch")
    biases = [bias if line in bias_on else 0.0 for line in LINES]
    size = max(1, _GRAM_VALUES.get(features.device.type, 2**20) // (rows * cols) ** 2)
    parts = []
    for i in range(0, len(features), size):
        f, chunk = features[i : i + size], None if valid is None else valid[i : i + size]
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        f = torch.nn.functional.normalize(f, dim=-1) if normalize else f
        parts.append(_lost(f, chunk, k, biases, strict, no_self, ties))
    seeds, tied, share, *maps = (torch.cat(p) for p in zip(*parts, strict=True))
    mask = maps[-1]
    inside = mask.gather(1, seeds[:, None])[:, 0]
    alone = torch.zeros_like(mask).scatter_(1, seeds[:, None], True)
    joined = component(torch.where(inside[:, None], mask, alone).unflatten(1, (rows, cols)), seeds)
    maps = [m.unflatten(1, (rows, cols)) for m in maps] + [joined]
    return Lost(mask_boxes(joined), seeds, tied, inside, share, *(maps if intermediates else [None] * 6))


def mask_boxes(mask: Tensor) -> Tensor:
    """Boxes (batch, 4) = left, top, right, bottom (ends excluded) around the set patches of masks (batch, r, c)."""
    from torchvision.ops import masks_to_boxes

    return masks_to_boxes(mask).long() + torch.tensor([0, 0, 1, 1], device=mask.device)


def _lost(f, valid, k, biases, strict, no_self, ties):
    """Eq. 1 to 3 for features (batch, patches, dim): seeds, ties, positive share, and the maps (batch, patches)."""
    batch, patches, _ = f.shape
    here = torch.arange(batch, device=f.device)
    gram = f @ f.transpose(1, 2)
    above = torch.gt if strict else torch.ge
    edges = above(gram, -biases[0])
    if valid is not None:
        edges &= valid[:, None]
    if no_self:
        edges.diagonal(dim1=1, dim2=2).fill_(False)
    degrees = edges.sum(2, dtype=torch.int32).long()
    most = max(biases, key=abs)
    share = torch.ge(gram, -most).sum((1, 2), dtype=torch.int32).double() / patches**2
    if valid is not None:
        degrees = degrees.masked_fill(~valid, patches + 1)
    rank = torch.arange(patches, device=f.device)
    rank = rank if ties == "lowest" else rank.flip(0)
    pool = (degrees * patches + rank).topk(min(k, patches), 1, largest=False).indices  # degree first, then the tie rule
    seeds = pool[:, 0]
    similarity = gram[here, seeds] + biases[1]
    selected = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, pool, True) & above(similarity, 0)
    if valid is not None:
        selected &= valid
    selected[here, seeds] = True  # even where a negative bias takes its similarity to itself below 0
    weight = selected.to(gram.dtype)
    # Sum before comparing: f_q . (sum of f_s) in one product, with the bias counted once for each s
    expansion = torch.bmm(gram, weight[:, :, None])[:, :, 0] + biases[2] * weight.sum(1, keepdim=True)
    mask = above(expansion, 0)
    if valid is not None:
        mask &= valid
    tied = (degrees == degrees.gather(1, seeds[:, None])).sum(1)
    return seeds, tied, share, degrees, similarity, expansion, selected, mask


def component(mask: Tensor, seeds: Tensor) -> Tensor:
    """The 4-connected part of each mask (batch, rows, cols) that holds its seed, a patch index (batch,) in the mask."""
    from scipy.ndimage import generate_binary_structure, label

    within = np.zeros((3, 3, 3), dtype=int)
    within[1] = generate_binary_structure(2, 1)  # no neighbours in other images
    labels = torch.from_numpy(label(mask.cpu().numpy(), within)[0]).to(mask.device)
    return labels == labels.flatten(1).gather(1, seeds[:, None])[:, :, None]


def _differences(variant) -> tuple[bool, bool]:
    named = {"paper": (), "code": tuple(CODE_DIFFERENCES)}
    chosen = named.get(variant, None) if isinstance(variant, str) else tuple(variant)
    if chosen is None or not set(chosen) <= set(CODE_DIFFERENCES):
        raise ValueError(
            f"unknown variant {variant!r}: choose 'paper', 'code' or names among {tuple(CODE_DIFFERENCES)}"
        )
    return "strict" in chosen, "no_self" in chosen


def _check(features: Tensor, grid) -> tuple[int, int]:
    rows, cols = grid
    if features.ndim != 3 or features.shape[1] != rows * cols or not len(features):
        raise ValueError(
            f"features must be (batch, {rows * cols}, dim) for grid {rows}x{cols}, got {tuple(features.shape)}: "
            "drop the prefix tokens (cls and registers)"
        )
    if not torch.isfinite(features.sum()):  # a quick pass, whose sum may also overflow
        bad = ~torch.isfinite(features).flatten(1).all(1)
        if bad.any():
            raise ValueError(f"features of image {int(bad.nonzero()[0])} hold NaN or infinite values")
    return rows, cols


def features(captured, site: str, layer: int = -1) -> Tensor:
    """Features (images, patches, dim) for `lost` from a `Capture` of q, k or v: heads joined, no prefix tokens."""
    per_head = getattr(captured, site)[captured.block(layer)]  # (images, heads, tokens, head_dim)
    return captured.patches(per_head.transpose(1, 2).flatten(2))


def paper_site(model) -> str:
    """The features that Table 3 uses for a `zoo.Model`: "k" (keys) for DINOv2, "v" (values) for all others."""
    return "k" if model.family == "dinov2" else "v"


def sweep(
    features: dict[str, Tensor], grid: tuple[int, int], truth: list[Tensor], patch_size, biases=(0.0,), **options
):
    """(DataFrame, hits): CorLoc of LOST for every feature and bias, and {(feature, bias): (images,) bool}.

    truth: boxes in pixels; patch_size: as in `in_pixels`; options go to `lost`. Columns: corloc, low, high (`corloc`),
    and those of `Lost.shares`.
    """
    import pandas as pd

    rows, hits = {}, {}
    for name, x in features.items():
        for bias in biases:
            result = lost(x, grid, bias=bias, **options)
            score = corloc(in_pixels(result.boxes, patch_size), truth)
            hits[name, bias] = score.hits
            rows[name, bias] = {"corloc": score.value, "low": score.low, "high": score.high} | result.shares(grid)
    columns = ["corloc", "low", "high", "positive_share", "whole_share", "tied_share"]
    table = pd.DataFrame(list(rows.values()), columns=columns)
    table.index = pd.MultiIndex.from_tuples(rows, names=["feature", "bias"])
    return table, hits


def in_pixels(boxes: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Boxes (..., 4) of `lost` in pixels, for patches of one side or of (height, width)."""
    return boxes * torch.as_tensor(patch_size, device=boxes.device).expand(2).flip(0).repeat(2)


@dataclass
class CorLoc:
    """Share of images with a hit (0 to 1), its bootstrap interval over images, and the hit of each image."""

    value: float
    low: float
    high: float
    hits: Tensor


def corloc(boxes: Tensor, truth: list[Tensor]) -> CorLoc:
    """CorLoc by LOST's rule: a hit is IoU >= 0.5 with any box of the image, difficult and truncated ones included.

    boxes (images, 4) and truth, one (n, 4) for each image, as left, top, right, bottom in the same unit. The interval
    is that of `pairs.interval`. Raises ValueError for an image without boxes: leave it out, as LOST does.
    """
    if len(boxes) != len(truth) or not len(truth):
        raise ValueError(f"{len(boxes)} predicted boxes for {len(truth)} images")
    empty = [i for i, t in enumerate(truth) if not len(t)]
    if empty:
        raise ValueError(f"{len(empty)} images have no box (first: {empty[:5]}): leave them out of CorLoc")
    hits = box_hits(boxes, truth)
    return CorLoc(hits.double().mean().item(), *interval(hits), hits)


def box_hits(boxes: Tensor, truth: list[Tensor]) -> Tensor:
    """(images,) bool, on the CPU: is the IoU of the box (images, 4) with any true box (n, 4) at least 0.5?"""
    padded = torch.nn.utils.rnn.pad_sequence(truth, batch_first=True)  # (images, most boxes, 4), empty ones added
    return (box_iou(boxes[:, None], padded) >= 0.5).any(1).cpu()


def gain(without: Tensor, hits: Tensor) -> tuple[float, float, float]:
    """(points, low, high): CorLoc of `hits` (images,) minus that of `without` on the same images, and its interval."""
    difference = 100 * (hits.double() - without.double())
    return difference.mean().item(), *interval(difference)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (...) of boxes (..., 4), broadcast against each other; 0 where both are empty."""
    a, b = a.double(), b.double().to(a.device)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1) for box in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap).clamp_min(1e-12)


def centred_boxes(sizes: Tensor, area: float = 0.5) -> Tensor:
    """A centred box that covers the share `area` of each image, for sizes (images, 2) = height, width; 1: all of it.

    These boxes are the trivial baselines to show beside every CorLoc.
    """
    height, width = sizes.double().unbind(1)
    margin = (1 - area**0.5) / 2
    return torch.stack([width * margin, height * margin, width * (1 - margin), height * (1 - margin)], 1)
