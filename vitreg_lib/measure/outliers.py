"""Which tokens are outliers: norms, cutoffs, masks.

Sec. 2.1 of the paper calls a patch token an outlier when its norm at the output exceeds 150, a number from one model's
histogram that "can vary across models". Here the cutoff is the valley of the model's own histogram. `detection` decides
whether a model has artifacts, from attention too.

Norms are of patch tokens, before the final LayerNorm, in any shape.
"""

import math
from dataclasses import dataclass

import torch

from ..hooks.capture import Capture

BIN, LOWEST, BINS = 0.05, -2.5, 160  # of log(norm / median): width, lowest, number; up to 250 times the median
DIP = 0.8  # a valley is lower than this share of the modes on both sides
STANDS_OUT = 2.0  # the upper mode exceeds the valley by this number of standard errors of a count
MINORITY = 1 / 3  # of the tokens: a larger upper mode is a kind of content (it is that of 40 % in mini-clip)
SEPARATED = 3.0  # times the median, for `separated_share`


def histogram(norms: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(images, BINS) tokens by log(norm / median of all), for norms (images, patches).

    weights (…, images, patches): their sums in the place of the number of tokens, (…, images, BINS).
    """
    bins = (((norms.float() / norms.median()).clamp_min(1e-9).log() - LOWEST) / BIN).long().clamp(0, BINS - 1)
    weights = torch.ones_like(norms) if weights is None else weights
    sums = torch.zeros(*weights.shape[:-1], BINS, device=norms.device)
    return sums.scatter_add_(-1, bins.expand_as(weights), weights.float())


def valleys(
    counts: torch.Tensor, stands_out: float = STANDS_OUT, dip: float = DIP
) -> tuple[torch.Tensor, torch.Tensor]:
    """(valley, peak), the bins (n,) between main and upper mode, and of the upper mode, of histograms (n, BINS).

    The main mode is the highest at or below the median. An upper mode is a bin above a valley that is lower than `dip`
    of both modes, and exceeds it by `stands_out` standard errors of the counts; of several, it is the one that exceeds
    it most. Counts are smoothed by a Gaussian of 1.5 bins (8 % of the norm). -1 where there is no upper mode.
    """
    kernel = torch.exp(-0.5 * (torch.arange(-5, 6, device=counts.device) / 1.5) ** 2)
    kernel /= kernel.sum()
    smooth = torch.nn.functional.conv1d(counts[:, None], kernel[None, None], padding=5)[:, 0]
    bins = torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
    median = (counts.cumsum(1) < counts.sum(1, keepdim=True) / 2).sum(1, keepdim=True)
    main = smooth.masked_fill(bins > median + 1, -1).argmax(1, keepdim=True)
    lowest, valley = smooth.masked_fill(bins < main, torch.inf).cummin(1)
    dips = (lowest < dip * smooth) & (lowest < dip * smooth.gather(1, main)) & (bins > main)
    # the sum of squares of the kernel is the variance of a smoothed count, in counts
    errors = (smooth - lowest) / ((smooth + lowest).clamp_min(1e-12) * kernel.square().sum()).sqrt()
    height, peak = errors.masked_fill(~dips, 0).max(1, keepdim=True)
    first, level = valley.gather(1, peak), lowest.gather(1, peak)
    flat = (bins >= first) & (bins < peak) & (smooth <= level + 1e-4)  # empty bins: the middle of them
    middle = ((bins * flat).sum(1, keepdim=True) / flat.sum(1, keepdim=True).clamp_min(1)).long()
    there = height >= stands_out
    return torch.where(there, middle, -1)[:, 0], torch.where(there, peak, -1)[:, 0]


def bin_middle(valley: float) -> float:
    """The middle of a bin of `histogram`, as a multiple of the median."""
    return math.exp(LOWEST + (valley + 0.5) * BIN)


def cutoff(norms: torch.Tensor) -> float:
    """The norm above which a token counts as an outlier, by the norms alone.

    It is the valley between the main mode of the histogram of log norms and a mode above it (`valleys`). Infinite
    without a valley, or where more than a third of the tokens lie beyond it, because outliers are few. Raises
    ValueError where norms are empty or not finite.
    """
    if norms.numel() == 0 or not norms.isfinite().all():
        raise ValueError("norms are empty or not finite: no cutoff can be chosen")
    valley = valleys(histogram(norms.reshape(1, -1)))[0].item()
    cut = norms.median().item() * bin_middle(valley) if valley >= 0 else math.inf
    return cut if (norms > cut).float().mean() <= MINORITY else math.inf


@dataclass(frozen=True)
class Outliers:
    """Which patch tokens of some images are outliers after one block, and by which cutoff.

    mask: (images, rows, cols) bool. norms: (images, rows, cols), of the same tokens. cutoff: tokens of a larger norm
    are outliers; infinite without a second mode. layer: the block. cutoff_from: label of the model whose norms gave the
    cutoff, "" for a cutoff set by hand or an unnamed model.
    """

    mask: torch.Tensor
    norms: torch.Tensor
    cutoff: float
    layer: int
    cutoff_from: str = ""

    @property
    def share(self) -> float:
        """Share (0 to 1) of the patch tokens that are outliers."""
        return self.mask.float().mean().item()

    @property
    def norm_ratio(self) -> float | None:
        """Mean outlier norm / median patch norm; None without outliers."""
        return (self.norms[self.mask].mean() / self.norms.median()).item() if self.mask.any() else None


def find(captured: Capture, layer: int = -1, cut: float | Outliers | None = None, model: str = "") -> Outliers:
    """The `Outliers` of a capture with norms, after one captured block (negative: from the last captured one).

    `cutoff` computes the cutoff from the same norms, unless `cut` gives it: a number, or the outliers of another model,
    such as the one without registers. `model`: label of the captured model.
    """
    block = captured.block(layer)
    norms = captured.patch_norms[:, captured.layers.index(block)].unflatten(1, captured.grid)
    if isinstance(cut, Outliers):
        cut, model = cut.cutoff, cut.cutoff_from
    elif cut is not None:
        model = ""
    else:
        cut = cutoff(norms)
    return Outliers(norms > cut, norms, cut, block, model)


def onset_of(norms: torch.Tensor, is_outlier: torch.Tensor, cut: float, layer: int) -> int:
    """The first block from which on at least half of the outliers of block `layer` are above the relative cutoff.

    The relative cutoff is cut / median of block `layer`, in medians of each block. norms: (images, layers, patches).
    """
    factor = cut / norms[:, layer].median()
    out = [(at[is_outlier] > factor * at.median()).float().mean() >= 0.5 for at in norms[:, : layer + 1].unbind(1)]
    return max((i + 1 for i, each in enumerate(out) if not each), default=0)


def place_share(is_outlier: torch.Tensor) -> float:
    """Share (0 to 1) of the variance of is_outlier (images, patches) that its place on the grid explains.

    The prediction for each image is the mean of the others, so chance explains nothing. NaN for one image.
    """
    y = is_outlier.float()
    others = (y.sum(0) - y) / (len(y) - 1)
    return max(0.0, 1 - ((y - others).square().sum() / (y - y.mean()).square().sum().clamp_min(1e-12)).item())


def separated_share(norms: torch.Tensor) -> torch.Tensor:
    """(layers,) share of patch tokens above three times their layer's median, for norms (images, layers, patches)."""
    flat = norms.transpose(0, 1).flatten(1)
    return (flat > SEPARATED * flat.median(1, keepdim=True).values).float().mean(1)


def score(flagged: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Precision, recall and F1 of boolean `flagged` against boolean `truth`; 1 where nothing was there or flagged."""
    hits = (flagged & truth).sum().item()
    precision = hits / flagged.sum().item() if flagged.any() else 1.0
    recall = hits / truth.sum().item() if truth.any() else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
