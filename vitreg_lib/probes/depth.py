"""Linear depth estimation on frozen patch tokens, scored by RMSE (Table 2a and Fig. 8, NYUd).

The protocol of DINOv2 (Oquab et al. 2023, its released head): patch tokens, with cls beside each if wanted, batch norm,
one linear layer to 256 bins, up-sampled by 4; each bin's weight is relu(logit) + 0.1, normalised, and the depth the
mean of evenly spaced bins; loss of Eigen et al. on log depth, sqrt(var + 0.15 mean^2). Ours: number of steps as an
argument, no augmentation, no gradient loss, and the up-sampling after the linear layer (there before it), which differs
only in the batch norm's statistics.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .segmentation import LinearHead, check_dense, train_head

BINS = 256


def fit_depth(
    tokens: Tensor,
    grid: tuple[int, int],
    depths: Tensor,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    bins: int = BINS,
    steps: int = 500,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    upsample: int = 4,
) -> LinearHead:
    """A trained head, on the device of `tokens`, in evaluation mode.

    tokens (images, patches, dim), see `with_cls`; depths (images, height, width), in the unit of min_depth and
    max_depth; a pixel counts when 0 < depth <= max_depth; upsample: of the bins' maps, before the mean over bins.
    Raises ValueError for a grid that does not fit, NaN, no valid depth.
    """
    check_dense(tokens, grid, depths)
    depths = depths.float().to(tokens.device)
    valid = _valid(depths, max_depth)
    if not valid.any():
        raise ValueError(f"no pixel has a depth above 0 and up to {max_depth}: check the unit of the depths")

    def loss(maps, rows):
        depth = _resize(bin_depth(maps, min_depth, max_depth, upsample), depths.shape[1:])
        return log_depth_loss(depth[valid[rows]], depths[rows][valid[rows]])

    return train_head(tokens, grid, bins, loss, steps, batch_size, lr, seed, weight_decay=0.01)


@torch.no_grad()
def predict_depth(
    head: LinearHead,
    tokens: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    batch_size: int = 16,
    upsample: int = 4,
) -> Tensor:
    """Depths (images, height, width) for size = (height, width)."""
    maps = (head(t.float(), grid) for t in tokens.split(batch_size))
    return torch.cat([_resize(bin_depth(m, min_depth, max_depth, upsample), size) for m in maps])


def bin_depth(maps: Tensor, min_depth: float, max_depth: float, upsample: int = 4) -> Tensor:
    """Depth (batch, rows * upsample, cols * upsample) from the logits of its bins (batch, bins, rows, cols)."""
    maps = interpolate(maps, scale_factor=upsample, mode="bilinear", align_corners=False)
    weights = torch.relu(maps) + 0.1
    centres = torch.linspace(min_depth, max_depth, maps.shape[1], device=maps.device)
    return torch.einsum("bkrc,k->brc", weights, centres) / weights.sum(1)


def log_depth_loss(predicted: Tensor, depths: Tensor, eps: float = 1e-3) -> Tensor:
    """sqrt(var g + 0.15 (mean g)^2) of g = log(predicted / depth), for valid pixels (pixels,); 0 for fewer than two."""
    if len(predicted) < 2:
        return predicted.sum() * 0
    g = torch.log(predicted + eps) - torch.log(depths + eps)
    return (g.var() + 0.15 * g.mean().square()).clamp_min(1e-12).sqrt()


def image_rmse(predicted: Tensor, depths: Tensor, max_depth: float = 10.0) -> Tensor:
    """(images,) float64 RMSE of each image's valid pixels, in the unit of the depths; NaN without a valid pixel."""
    depths = depths.float().to(predicted.device)
    valid = _valid(depths, max_depth)
    squared = torch.where(valid, (predicted - depths).double().square(), 0).sum((1, 2))
    return (squared / valid.sum((1, 2))).sqrt()


def with_cls(tokens: Tensor, cls: Tensor) -> Tensor:
    """Patch tokens (images, patches, dim) with the image's cls token (images, dim) beside each, 2 dim wide."""
    return torch.cat([tokens, cls[:, None].expand(-1, tokens.shape[1], -1)], 2)


def _valid(depths: Tensor, max_depth: float) -> Tensor:
    return torch.isfinite(depths) & (depths > 0) & (depths <= max_depth)


def _resize(depth: Tensor, size) -> Tensor:
    return interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]
