"""Figure 15: norms by kind of token, published registers by block, and the verdicts."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from verdicts import copies, registered

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
    return (norms.mean(1).var() / norms.var(1).mean().clamp_min(1e-12)).item()


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

    Dictionaries by model label: kinds, {kind of token: norms}; found, `Outliers`; quantised, `quantisation`. having:
    labels of the models with artifacts.
    """
    pairs = of_models(models)
    judged, missing = registered(models, pairs, having, profile)
    added = [m for m in models if m.role == "mended" and pairs.get(m.label) in having]
    for model, ids in ((next(iter(judged), None), ("C052", "C053", "C054")), *((m, ()) for m in added)):
        if model is None:
            for claim in ids:
                yield claim, None, missing
            continue
        name = model.label
        high = max(values.max().item() for kind, values in kinds[name].items() if kind.startswith("register"))
        top = kinds[name]["patches"].flatten().quantile(0.999).item()
        share = f"{name}: {found[name].share:.2%} of patch tokens above {found[name].cutoff:.3g}"
        norms = f"{name}: largest register {high:.3g}, 99.9th percentile of patches {top:.3g}"
        if ids:
            yield ids[0], found[name].share < 0.001, share
            yield ids[1], high > top, norms
            if copies(model) or quantised[name] is None:
                yield ids[2], None, f"the registers of {name} are copies of one another, or there is only one"
            else:
                text = f"{name}: variance between registers / within {quantised[name]:.3g}"
                yield ids[2], quantised[name] > 1, text
        else:
            text = f"in {name} the high norms are in the added registers and no patch token is an outlier"
            yield f"ours-{name}", found[name].share < 0.001 and high > top, f"{share}; {norms}", text, "none"
