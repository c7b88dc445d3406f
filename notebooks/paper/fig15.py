"""Figure 15: norms by kind of token, published registers by block, and the verdicts."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from verdicts import above, copies, every, over_images, registered

from vitreg_lib.base import env_folder
from vitreg_lib.measure.pairs import pairs as of_models
from vitreg_lib.plots.style import PALETTE, plain_log, styled


def kinds_table(kinds: dict[str, dict[str, torch.Tensor]]):
    """Median, largest value and standard deviation of the norms: a DataFrame, one row a model and kind of token."""
    import pandas as pd

    rows = [
        {"model": model, "kind": kind, "median": v.median().item(), "largest": v.max().item(), "std": v.std().item()}
        for model, table in kinds.items()
        for kind, v in table.items()
    ]
    return pd.DataFrame(rows).set_index(["model", "kind"])


def quantisation(kinds: dict[str, torch.Tensor]) -> float | None:
    """Variance of norms between registers over the variance of one register between images (Fig. 15).

    Above 1 the norms are quantised. None for fewer than two registers.
    """
    registers = [v for kind, v in kinds.items() if kind.startswith("register")]
    if len(registers) < 2:
        return None
    norms = torch.stack(registers)  # (registers, images)
    return _ratio(norms).item()


def _ratio(norms: torch.Tensor) -> torch.Tensor:
    """The variance between registers over that between images, for norms (registers, …, images)."""
    return norms.mean(-1).var(0) / norms.var(-1).mean(0).clamp_min(1e-12)


def quantisation_interval(kinds: dict[str, torch.Tensor], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high): the middle 95 % of `quantisation` in a bootstrap over images."""
    norms = torch.stack([v for kind, v in kinds.items() if kind.startswith("register")]).double().cpu()
    images = norms.shape[1]
    drawn = torch.randint(images, (draws, images), generator=torch.Generator().manual_seed(seed))
    low, high = _ratio(norms[:, drawn]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def published_registers() -> dict[str, torch.Tensor]:
    """{size: norms (blocks, registers)} of the published mean registers of DINOv2 with 4 registers; {} without files.

    The folder `dinov2_registers` of VITREG_MODELS has one file for each size, {block: mean registers (4, dim)}.
    """
    folder = (env_folder("VITREG_MODELS") or Path("nowhere")) / "dinov2_registers"
    found = {}
    for size in ("small", "base", "large", "giant"):
        for path in folder.glob(f"{size}_*.pt"):
            means = torch.load(path, map_location="cpu", weights_only=True)
            found[f"DINOv2-{size}"] = torch.stack([means[block].float().norm(dim=-1) for block in sorted(means)])
    return found


@styled
def registers_by_layer(norms: dict[str, torch.Tensor]) -> Figure:
    """Norms of mean registers (blocks, registers) by block, one panel a model, one line a register."""
    figure, axes = plt.subplots(1, len(norms), figsize=(2.3 * len(norms) + 0.5, 2.5), squeeze=False, sharey=True)
    for axis, (name, values) in zip(axes[0], norms.items(), strict=True):
        for register, line in enumerate(values.T):
            axis.plot(range(len(line)), line, color=PALETTE[register % len(PALETTE)], label=f"register {register + 1}")
        axis.set(title=name, xlabel="block (from 0)", yscale="log")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=7))
    plain_log(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel("norm of the mean register")
    axes[0, 0].legend()
    return figure


def claims(models, kinds: dict, found: dict, quantised: dict, having, profile: str):
    """Yields the arguments of `Run.claim`: C052 to C054 on trained registers, ours on registers added at test time.

    C052 to C054 are judged on the first pair; their texts name what the other pairs would give. Dictionaries by model
    label: kinds, {kind of token: norms}; found, `Outliers`; quantised, `quantisation`. having: labels of the models
    with artifacts.
    """
    pairs = of_models(models)
    judged, missing = registered(models, pairs, having, profile)
    answers = {m.label: answer(m, kinds[m.label], found[m.label], quantised[m.label]) for m in models if m.registers}
    words = {True: "holds", False: "fails", None: "not testable"}
    for claim in ("C052", "C053", "C054"):
        if not judged:
            yield claim, None, missing
            continue
        (name, holds, text), *others = ((m.label, *answers[m.label][claim]) for m in judged)
        others = "; ".join(f"{other} ({words.get(given, given)}) {more}" for other, given, more in others)
        yield claim, holds, f"{name}: {text}" + (f"; others: {others}" if others else "")
    for name in (m.label for m in models if m.role == "mended" and pairs.get(m.label) in having):
        (few, share), (high, norms) = answers[name]["C052"], answers[name]["C053"]
        text = f"in {name} the high norms are in the added registers and no patch token is an outlier"
        yield f"ours-{name}", every([few, high]), f"{name}: {share}; {norms}", text, "none"


def answer(model, kinds: dict[str, torch.Tensor], found, quantised: float | None) -> dict[str, tuple]:
    """{"C052", "C053", "C054": (verdict, measured text)} of one model with registers."""
    few = over_images(found.mask)
    high = max(values.max().item() for kind, values in kinds.items() if kind.startswith("register"))
    top = kinds["patches"].flatten().quantile(0.999).item()
    result = {
        "C052": (few.below(), f"{few} of patch tokens above {found.cutoff:.3g}"),
        "C053": (high > top, f"largest register {high:.3g}, 99.9th percentile of patches {top:.3g}"),
        "C054": (None, "the registers are copies of one another, or there is only one"),
    }
    if not copies(model) and quantised is not None:
        ends = quantisation_interval(kinds)
        text = f"variance between registers / within {quantised:.3g} ({ends[0]:.2g} to {ends[1]:.2g})"
        result["C054"] = (above(*ends, 1), text)
    return result
