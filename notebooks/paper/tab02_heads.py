"""Linear heads for segmentation and depth on frozen patch tokens (Table 2a and Fig. 8: ADE20k, NYUd).

The protocol of DINOv2 (Oquab et al. 2023): batch norm and one linear layer on the patch tokens, logits up-sampled
bilinearly to the labels' size, cross-entropy, AdamW at 1e-3 with a short warm-up and linear decay. Two differences: the
number of steps is an argument (DINOv2: 40,000 steps of 16 images), and there is no augmentation, so that features are
extracted once.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

BINS = 256


class LinearHead(nn.Module):
    """Batch norm and a linear layer: patch tokens (batch, patches, dim) -> maps (batch, outputs, rows, cols)."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, outputs)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.linear(self.norm(tokens.flatten(0, 1)))
        return x.reshape(len(tokens), *grid, -1).permute(0, 3, 1, 2)


def fit_segmentation(
    tokens: Tensor,
    grid: tuple[int, int],
    masks: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    steps: int = 500,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
) -> LinearHead:
    """A trained head, on the device of `tokens`, in evaluation mode.

    tokens (images, patches, dim) without prefix tokens; masks (images, height, width) of class numbers, `ignore_index`
    for no label. Raises ValueError for a grid that does not fit, labels out of range, a single class, NaN.
    """
    check_dense(tokens, grid, masks)
    masks = masks.long().to(tokens.device)
    labels = masks[masks != ignore_index].unique()
    if len(labels) < 2:
        raise ValueError(f"segmentation needs at least two classes, the masks hold {labels.tolist()}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels {int(labels.min())}…{int(labels.max())} are out of range for {num_classes} classes")

    def loss(maps, rows):
        maps = interpolate(maps, masks.shape[1:], mode="bilinear", align_corners=False)
        labelled = (masks[rows] != ignore_index).sum().clamp_min(1)  # no label in the batch: loss 0, not NaN
        return cross_entropy(maps, masks[rows], ignore_index=ignore_index, reduction="sum") / labelled

    return train_head(tokens, grid, num_classes, loss, steps, batch_size, lr, seed)


@torch.no_grad()
def predict_segmentation(
    head: LinearHead, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int], batch_size: int = 16
) -> Tensor:
    """Class numbers (images, height, width) for size = (height, width)."""
    maps = (head(t.float(), grid) for t in tokens.split(batch_size))
    return torch.cat([interpolate(m, size, mode="bilinear", align_corners=False).argmax(1) for m in maps])


def train_head(tokens, grid, outputs, loss, steps, batch_size, lr, seed, weight_decay: float = 1e-4) -> LinearHead:
    """A LinearHead trained to minimise `loss(maps, rows)`; batches drawn by `seed`, warm-up over a tenth of steps."""
    with torch.random.fork_rng(devices=[]):  # only the CPU's state: torch.manual_seed would also seed CUDA
        torch.default_generator.manual_seed(seed)
        head = LinearHead(tokens.shape[-1], outputs)
    head = head.to(tokens.device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < min(batch_size, len(tokens)):
                order = torch.randperm(len(tokens), generator=generator)
            rows, order = order[:batch_size].to(tokens.device), order[batch_size:]
            optimizer.zero_grad()
            loss(head(tokens[rows].float(), grid), rows).backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def check_dense(tokens: Tensor, grid: tuple[int, int], labels: Tensor) -> None:
    """Raises ValueError if tokens, grid and labels (images, height, width) do not fit together, or tokens have NaN."""
    patches = grid[0] * grid[1]
    if tokens.ndim != 3 or tokens.shape[1] != patches:
        raise ValueError(
            f"tokens must be (images, {patches}, dim) for grid {grid[0]}x{grid[1]}, got {tuple(tokens.shape)}: "
            "drop the prefix tokens (cls and registers)"
        )
    if labels.ndim != 3 or len(labels) != len(tokens):
        raise ValueError(f"labels must be ({len(tokens)}, height, width), got {tuple(labels.shape)}")
    bad = ~torch.isfinite(tokens).flatten(1).all(1)
    if bad.any():
        raise ValueError(f"tokens of image {int(bad.nonzero()[0])} hold NaN or infinite values")


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
    max_depth; a pixel is valid if 0 < depth <= max_depth; upsample: factor for the maps of the bins, before the mean
    over bins. Raises ValueError for a grid that does not fit, NaN, no valid depth.
    """
    check_dense(tokens, grid, depths)
    depths = depths.float().to(tokens.device)
    valid = _valid(depths, max_depth)
    if not valid.any():
        raise ValueError(f"no pixel has a depth above 0 and up to {max_depth}: check the unit of the depths")

    complete = bool(valid.all())  # then no pixels are selected, which would take a quarter of a step

    def loss(maps, rows):
        depth, truth = _resize(bin_depth(maps, min_depth, max_depth, upsample), depths.shape[1:]), depths[rows]
        there = ... if complete else valid[rows]
        return log_depth_loss(depth[there].flatten(), truth[there].flatten())

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
    """sqrt(var g + 0.15 (mean g)^2), g = log(predicted / depth), of valid pixels (pixels,); 0 for fewer than two."""
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
    """(images, patches, 2 dim): patch tokens (images, patches, dim), each concatenated with its image's cls token."""
    return torch.cat([tokens, cls[:, None].expand(-1, tokens.shape[1], -1)], 2)


def _valid(depths: Tensor, max_depth: float) -> Tensor:
    return torch.isfinite(depths) & (depths > 0) & (depths <= max_depth)


def _resize(depth: Tensor, size) -> Tensor:
    return interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]
