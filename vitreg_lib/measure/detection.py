"""Does a model have artifacts? One of three answers, from norms and attention, with the measurements behind it.

    detection = vr.detect(model, images)          # this collection has no other verdict on artifacts
    detection.answer                              # "artifacts", "none" or "undecided"
    detection.outliers.mask                       # (images, rows, cols), which tokens; `Outliers` of the judged block
    print(detection)                              # the answer in a sentence or two, with its numbers

The answer combines three measurements: the norm of a patch token, its attention from cls, and its attention from other
patches. Tokens are sorted by norm × ⁴√(attention received); the root is taken because attention spreads four times as
wide as norms. Artifacts are a second mode of that product (`outliers.valleys`) whose tokens are few, get at least three
times an even share of attention, and have the largest norms, 1.5 times the median or more. Kinds of content also make
modes of norms, but without more attention; tokens with much attention need not have a large norm. Without measured
attention, a mode of norms counts from three times the median on, and its absence is no evidence.

The out-of-bag bootstrap tests an answer on other images: 200 times, images are drawn with replacement, the valley is
chosen on the drawn images and tested on those left out. `support` is the share of draws with artifacts there. Notebook
fig03 scores this detector on a panel of models.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import torch

from ..hooks.anatomy import Unmeasurable
from ..hooks.capture import Capture
from .outliers import (
    BINS,
    MINORITY,
    STANDS_OUT,
    Outliers,
    bin_middle,
    histogram,
    onset_of,
    place_share,
    valleys,
)
from .pairs import interval

LIFT = 3.0  # attention received, in even shares: 5 to 20 in models with artifacts, 1 to 2.3 for kinds of content
LARGEST = 0.9  # chance that a token of the second mode has a larger norm than another one (area under the curve)
RATIO, APART = 1.5, 3.0  # mean norm of the second mode / median, with attention measured and without
SURE = 0.9  # share of draws with artifacts: "artifacts" from here on, "none" up to 1 - SURE
FEWEST = 5  # images for "artifacts": with fewer, even "in all of them" allows at 95 % that fewer than half have any
FEWEST_NONE, RAREST = 10, 0.002  # for "none": images, and the share of tokens excluded at 95 % (three times 1 / tokens)
DIP, STANDS = 0.9, 0.5  # of `valleys`: a shallow valley suffices where attention is measured too
FAR, A_TAIL = 5.0, 20  # fewer than 20 tokens beyond five times the median are neither a mode nor a heavy tail
QUERIES = 32  # patches whose attention is measured


@dataclass(frozen=True)
class Observed:
    """The measurements for a detection: norms after every block, and the attention that patch tokens receive.

    seen: a `Capture` of norms. by_cls, by_patches: {block: (images, patches)}, mean over heads, of the cls token and
    of a sample of patches, for the last third of the blocks; empty where not measured.
    """

    seen: Capture
    by_cls: dict[int, torch.Tensor] = field(default_factory=dict)
    by_patches: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def norms(self) -> torch.Tensor:
        """(images, layers, patches)"""
        return self.seen.patch_norms

    def received(self, block: int) -> dict[str, torch.Tensor]:
        """{"cls", "patches": (images, patches)}: attention to the tokens after a block, in even shares.

        It is the attention in the next block; after the last block, in the block itself.
        """
        measured = {"cls": self.by_cls, "patches": self.by_patches}
        maps = {who: each.get(block + 1, each.get(block)) for who, each in measured.items()}
        return {who: at / at.mean(1, keepdim=True) for who, at in maps.items() if at is not None}


@dataclass(frozen=True)
class Detection:
    """The answer ("artifacts", "none", "undecided"), its reason and its numbers.

    outliers: the tokens after the judged block; no token and an infinite cutoff without a second mode. share: of the
    patch tokens (0 to 1), with the ends of its 95 % interval over images. support: share of the draws with artifacts in
    the images left out; NaN for one image. images_needed: number of images for an answer, if "undecided". norm_ratio:
    mean outlier norm / median. lift_cls, lift_patches: attention that outliers receive, in even shares. overlap: share
    of the outliers among as many patches of most attention. onset: the first block from which on they are separated.
    place: share (0 to 1) of the outliers' variance that the place on the grid explains. These six are None where they
    cannot be measured.
    """

    answer: str
    reason: str
    outliers: Outliers
    share: tuple[float, float, float]
    support: float
    images: int
    images_needed: int | None = None
    norm_ratio: float | None = None
    lift_cls: float | None = None
    lift_patches: float | None = None
    overlap: float | None = None
    onset: int | None = None
    place: float | None = None

    @property
    def has_artifacts(self) -> bool:
        return self.answer == "artifacts"

    @property
    def kind(self) -> str | None:
        """ "content-bound" where place explains less than 0.3, "position-bound" from 0.7 on, else "bound to both"."""
        if self.place is None or not self.has_artifacts:
            return None
        return ("content-bound", "bound to both", "position-bound")[(self.place >= 0.3) + (self.place >= 0.7)]

    @property
    def strength(self) -> str | None:
        """ "mild" below five times the median norm, else "strong" (the paper's have ten times)."""
        return None if self.norm_ratio is None else "strong" if self.norm_ratio >= 5 else "mild"

    def __str__(self) -> str:
        if self.norm_ratio is None:
            return f"{'No artifacts' if self.answer == 'none' else 'Undecided'}: {self.reason}."
        first = f"Artifacts, {self.strength} and {self.kind}" if self.has_artifacts else "Undecided"
        value, low, high = self.share
        text = (
            f"{first}: {self.reason}. After block {self.outliers.layer}, {value:.2%} of the patch tokens ({low:.2%} to "
            f"{high:.2%}) have norms above {self.outliers.cutoff:.3g}, on average {self.norm_ratio:.1f} times the "
            "median"
        )
        lifts = {"cls": self.lift_cls, "other patches": self.lift_patches}
        received = [f"{times:.1f} from {who}" for who, times in lifts.items() if times is not None]
        if received:
            text += f"; of attention they get, in even shares, {' and '.join(received)}"
        if self.has_artifacts:
            text += (
                f"; place explains {self.place:.0%} of where they are; they are so far out from block {self.onset} on"
            )
        return text + "."


def detect(model, images) -> Detection:
    """The `Detection` of a `Model` on normalised images (n, 3, height, width) or an `Images` set; one forward pass."""
    return judge(observe(model, images), model.label)


def observe(model, images, progress: bool = False) -> Observed:
    """The `Observed` of a `Model` on images, in batches; attention rows are kept for cls and `QUERIES` patches only."""
    if hasattr(model, "observed"):  # a replayed model reads them from a file
        return model.observed(images)
    from tqdm.auto import tqdm

    x = getattr(images, "x", images)
    return join([observe_batch(model, part)[0] for part in tqdm(x.split(32), disable=not progress, leave=False)])


def observe_batch(model, x: torch.Tensor, keep: tuple[str, ...] = ()) -> tuple[Observed, Capture]:
    """The `Observed` of one batch of normalised images, and the `Capture` with the sites `keep` besides."""
    anatomy = model.anatomy
    rows, cols = anatomy.grid(x)
    prefix, patches, first = anatomy.num_prefix_tokens, rows * cols, int(anatomy.has_cls)
    sample = torch.linspace(0, patches - 1, min(QUERIES, patches)).long() + prefix
    late = range(anatomy.depth - max(1, anatomy.depth // 3), anatomy.depth)
    captured = model.capture(x, ("norms", "attention", *keep), queries=[0] * first + sample.tolist())
    received = {i: captured.attention[i].mean(1)[..., prefix:] for i in late}  # (images, queries, patches)
    by_cls = {i: at[:, 0] for i, at in received.items()} if first else {}
    by_patches = {i: at[:, first:].mean(1) for i, at in received.items()}
    return Observed(
        Capture(captured.layers, captured.grid, captured.prefix, norms=captured.norms), by_cls, by_patches
    ), captured


def join(parts: list[Observed]) -> Observed:
    """The `Observed` of all images from those of batches."""
    first = parts[0]
    cls, others = (
        {i: torch.cat([getattr(part, name)[i] for part in parts]) for i in getattr(first, name)}
        for name in ("by_cls", "by_patches")
    )
    seen = dataclasses.replace(first.seen, norms=torch.cat([part.seen.norms for part in parts]))
    return Observed(seen, cls, others)


def registers_alike(model, images) -> float | None:
    """Largest cosine between two registers after the last block, mean over images; None with fewer than two.

    1 means equal registers: they have no order, so training may leave them copies of each other.
    """
    if model.anatomy.num_registers < 2:
        return None
    captured = model.capture(getattr(images, "x", images)[:8], "tokens", layers=-1)
    unit = torch.nn.functional.normalize(captured.tokens[captured.layers[-1]][:, captured.registers].double(), dim=-1)
    between = (unit @ unit.mT).masked_fill(torch.eye(unit.shape[1], dtype=torch.bool), -1)
    return between.flatten(1).amax(1).mean().item()


def judge(observed: Observed, label: str = "", draws: int = 200) -> Detection:
    """The `Detection` from observed norms and attention. `label` names the model in `Outliers.cutoff_from`.

    It judges the last block with artifacts, else the last block. `draws` are those of the bootstrap. Raises
    Unmeasurable where a norm is not finite.
    """
    if not observed.norms.isfinite().all():
        raise Unmeasurable("norms are not finite: a weight is not, or the model overflows; float32 may help")
    images, depth, _ = observed.norms.shape
    block = last = depth - 1
    found = at_last = _stand_out(observed, last)
    while not found[0] and block:
        found = _stand_out(observed, block := block - 1)
    block, (there, valley, product, sums) = (block, found) if found[0] else (last, at_last)
    support = _support(sums, draws)
    norms = observed.norms[:, block]
    cut = _separating(norms, product > product.median() * bin_middle(valley)) if there else math.inf
    answer, reason, needed = _answer(there, support, norms, bool(observed.received(block)))
    cut = math.inf if answer == "none" else cut
    mask = norms > cut
    outliers = Outliers(*(each.unflatten(1, observed.seen.grid) for each in (mask, norms)), cut, block, label)
    shares = mask.float().mean(1)
    share = (shares.mean().item(), *interval(shares))
    numbers = _numbers(observed, outliers) if mask.any() else {}
    return Detection(answer, reason, outliers, share, support, images, needed, **numbers)


def _numbers(observed: Observed, outliers: Outliers) -> dict:
    """The fields of a `Detection` that describe its outliers."""
    mask = outliers.mask.flatten(1)
    received = observed.received(outliers.layer)
    lifts = {f"lift_{who}": at[mask].mean().item() for who, at in received.items()}
    at = received.get("cls", received.get("patches"))
    if at is not None:
        rank = at.argsort(1, descending=True).argsort(1)
        lifts["overlap"] = (rank < mask.sum(1, keepdim=True))[mask].float().mean().item()
    return lifts | {
        "norm_ratio": outliers.norm_ratio,
        "onset": onset_of(observed.norms, mask, outliers.cutoff, outliers.layer),
        "place": place_share(mask) if len(mask) > 1 else None,
    }


def _answer(there: bool, support: float, norms: torch.Tensor, attended: bool) -> tuple[str, str, int | None]:
    """(answer, reason, number of images needed) for one block."""
    images, patches = norms.shape
    many, carry = (f"{images} images", "carry") if images != 1 else ("1 image", "carries")
    least = max(FEWEST_NONE, math.ceil(3 / RAREST / patches))
    if there and images < FEWEST:
        return "undecided", f"{many} {carry} no verdict, {least} would do", least
    if there and support >= SURE:
        return "artifacts", f"found again in {support:.0%} of the redraws of {many}", None
    if support > 1 - SURE:
        needed = max(least, math.ceil(images * min(4.0, 2 / support)))
        return "undecided", f"found again in {support:.0%} of the redraws of {many}, about {needed} would do", needed
    if images < least:
        return "undecided", f"nothing stands out, but {many} {carry} no verdict, {least} would do", least
    largest, far = (norms.max() / norms.median()).item(), int((norms > FAR * norms.median()).sum())
    if 0 < far < A_TAIL:
        needed = math.ceil(images * A_TAIL / far)
        few = f"{far} tokens of up to {largest:.0f} times the median are too few, about {needed} images would do"
        return "undecided", few, needed
    if not attended:
        return "undecided", f"norms have no second mode from {APART:.0f} times the median on; attention decides", None
    reason = f"no second mode of norm and attention in {many}, the largest norm is {largest:.1f} times the median"
    return "none", reason, None


def _binned(observed: Observed, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, 3 + attentions, BINS) and the product (images, patches) that sorts tokens into the bins.

    Sums over the tokens of a bin: 1, norm in medians, rank of the norm (0 to 1), and attention received, if measured.
    """
    norms = observed.norms[:, block].float()
    received = list(observed.received(block).values())
    usual = torch.stack(received).clamp_min(1e-4).log().mean(0).exp() if received else torch.ones_like(norms)
    product = norms * usual**0.25
    rank = torch.empty(norms.numel(), device=norms.device)
    rank[norms.flatten().argsort()] = torch.arange(norms.numel(), device=norms.device) / norms.numel()
    weights = [torch.ones_like(norms), norms / norms.median(), rank.view_as(norms), *received]
    return histogram(product, torch.stack(weights)).transpose(0, 1).contiguous(), product


def _tests(sums: torch.Tensor, valley: torch.Tensor) -> torch.Tensor:
    """(draws,) bool: whether the tokens beyond the valley (draws,) are artifacts, for sums (draws, 3 + …, BINS)."""
    below = sums.cumsum(2)
    at = valley.clamp_min(0)[:, None, None].expand(-1, sums.shape[1], 1)
    beyond = (below[:, :, -1:] - below.gather(2, at))[:, :, 0]
    count = beyond[:, 0].clamp_min(1e-9)
    share = count / below[:, 0, -1]
    ratio, rank, *lifts = (beyond[:, 1:] / count[:, None]).unbind(1)
    above = (rank - share / 2) / (1 - share)  # Mann and Whitney's U: how often a norm beyond is the larger one
    attended = torch.stack(lifts).mean(0) >= LIFT if lifts else torch.ones_like(share, dtype=torch.bool)
    return (valley >= 0) & (share <= MINORITY) & (above >= LARGEST) & (ratio >= (RATIO if lifts else APART)) & attended


def _stand_out(observed: Observed, block: int) -> tuple[bool, int, torch.Tensor, torch.Tensor]:
    """(whether there are artifacts after a block by all images at once, the valley's bin, product and sums of it)."""
    sums, product = _binned(observed, block)
    total = sums.sum(0, keepdim=True)
    valley, _ = valleys(total[:, 0], STANDS if sums.shape[1] > 3 else STANDS_OUT, DIP)
    return bool(_tests(total, valley)), int(valley), product, sums


def _support(sums: torch.Tensor, draws: int) -> float:
    """Share of draws with artifacts beyond their valley in the images left out; NaN for one image. sums: `_binned`."""
    n = len(sums)
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws, n).scatter_add_(1, drawn, torch.ones(draws, n))
    times = times[(times == 0).any(1)]
    if not len(times):
        return math.nan
    valley, peak = valleys(times @ sums[:, 0], STANDS, DIP)
    left = ((times == 0).float() @ sums.flatten(1)).unflatten(1, sums.shape[1:])
    below, half = left[:, 0].cumsum(1), ((peak - valley) // 2).clamp(1, 8)

    def around(centre):
        ends = (centre + half).clamp(0, BINS - 1), (centre - half - 1).clamp(0, BINS - 1)
        last, first = (below.gather(1, end[:, None])[:, 0] for end in ends)
        return last - first

    denser = around(peak) > around(valley) if sums.shape[1] == 3 else torch.ones_like(valley, dtype=torch.bool)
    return (_tests(left, valley) & denser).float().mean().item()


def _separating(norms: torch.Tensor, group: torch.Tensor) -> float:
    """The norm that best separates the tokens of a group from the others: fewest on the wrong side, their middle."""
    inside, outside = (histogram(norms, part.float()).sum(0).cumsum(0) for part in (group, ~group))
    wrong = inside + outside[-1] - outside
    best = (wrong == wrong.min()).nonzero()[:, 0].float().mean().item()
    return norms.median().item() * bin_middle(best + 0.5)
