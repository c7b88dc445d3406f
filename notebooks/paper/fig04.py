"""Figure 4: plots of norms along training and by model size, and its verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from verdicts import above, every, over_images, specimen

from vitreg_lib.plots.norms import bands, quantile_levels
from vitreg_lib.plots.style import PALETTE, PAPER, plain_log, styled

SIZES = {192: "Ti", 384: "S", 768: "B"}  # below Large, by their width


@styled
def norms_by_step(tables: dict[str, pd.DataFrame]) -> Figure:
    """Figure 4(b): norms of the last block along training (above), largest outlier share of any block (below)."""
    figure, axes = plt.subplots(2, len(tables), figsize=(2.3 * len(tables) + 0.6, 4.8), squeeze=False, sharex=True)
    for (upper, lower), (name, table) in zip(axes.T, tables.items(), strict=True):
        last = table[table.layer == table.layer.max()]
        bands(upper, last.step / last.step.max(), quantile_levels(last), PALETTE[0])
        upper.set(title=name, yscale="log")
        plain_log(upper.yaxis)
        worst = table.groupby("step").outlier_share.max()
        lower.plot(worst.index / worst.index.max(), 100 * worst, color=PALETTE[0])
        lower.axvline(1 / 3, color=PAPER, ls=":")
        place = dict(xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points")
        lower.annotate("paper: from 1/3 on", (1 / 3, 0.92), fontsize=7, color=PAPER, **place)
        lower.set(xlabel="share of training", ylim=(0, max(1.0, 115 * worst.max())))
    axes[0, 0].set_ylabel("L2 norm, last block")
    axes[1, 0].set_ylabel("tokens above 3 × median,\nworst block (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@styled
def norms_by_size(norms: dict[str, torch.Tensor]) -> Figure:
    """Figure 4(c): output norms / their median, one violin a model, smallest first; the line at 3 is the cutoff."""
    import seaborn as sns

    figure, axis = plt.subplots(figsize=(1.4 * len(norms) + 1.6, 2.9))
    ratios = {name.replace(" ", "\n"): (v.flatten() / v.median()).cpu() for name, v in norms.items()}
    style = dict(color=PALETTE[5], inner=None, cut=0, density_norm="width", linewidth=0.5, log_scale=True)
    sns.violinplot({name: ratio.numpy() for name, ratio in ratios.items()}, ax=axis, **style)
    # a violin shows the bulk and hides a few outliers: the highest 0.5 % are drawn as points
    for place, ratio in enumerate(ratios.values()):
        top = ratio.sort(descending=True).values[: max(1, len(ratio) // 200)]
        axis.scatter(
            (place + torch.linspace(-0.1, 0.1, len(top))).numpy(),
            top.numpy(),
            s=3,
            color=PALETTE[1],
            linewidths=0,
            zorder=3,
        )
    axis.axhline(3, color=PALETTE[2], ls="--", lw=1, label="3 × median")
    plain_log(axis.yaxis)
    axis.set_ylabel("patch norm / median\n(points: highest 0.5 %)")
    axis.legend(loc="lower right")
    return figure


def share_at(table: pd.DataFrame, part: float) -> float:
    """Outlier share of the last block at the measured step nearest to `part` (0 to 1) of the training."""
    last = table[table.layer == table.layer.max()].reset_index(drop=True)
    return float(last.outlier_share[(last.step - part * last.step.max()).abs().argmin()])


def claims(models, norms: dict, detections: dict, trained: dict, shares: dict, alike: bool):
    """Yields the arguments of `Run.claim`: C012 and C013 on a model with artifacts, C014, C015 and the control.

    C014 is judged on telemetry, C015 on models of several sizes. C015 fails if any trained model narrower than Large
    (1,024) has artifacts, however it was trained. Dictionaries by model label: norms (images, blocks, patches);
    detections; trained, telemetry tables; shares, the outliers' `Share` by size, smallest first. alike: whether the
    sizes were trained in the same way.
    """
    found = {name: (detections[name].onset, values.shape[1]) for name, values in norms.items()}
    having = {name for name, each in detections.items() if each.has_artifacts}
    model = specimen(models, having)
    if model is None:
        for claim in ("C012", "C013"):
            yield claim, None, "no trained model here has outliers in any block"
    else:
        onset, depth = found[model.label]
        text = f"{model.label}: outliers from block {onset} of {depth}, {onset / depth:.0%} of the depth"
        yield "C012", 0.3 <= onset / depth <= 0.5, text
        judged = detections[model.label].outliers
        times = judged.cutoff / judged.norms.median()
        first = norms[model.label][:, : max(1, depth // 4)]
        early = max((over_images(at > times * at.median()) for at in first.unbind(1)), key=lambda each: each.value)
        text = f"{model.label}: in the first quarter of blocks at most {early} of tokens above {times:.1f} × median"
        yield "C013", early.below(), text
    name, table = next(iter(trained.items()))
    final, quarter = share_at(table, 1.0), share_at(table, 1 / 4)
    text = f"{name}: {quarter:.2%} at a quarter, {final:.2%} at the end of training, last block"
    yield "C014", quarter < 0.005 if final >= 0.005 else None, text
    values, listed = list(shares.values()), ", ".join(f"{name} {each}" for name, each in shares.items())
    small = [m for m in models if m.role == "trained" and m.anatomy.embed_dim in SIZES and m.label in having]
    if small:
        text = "; ".join(f"{m.label} ({SIZES[m.anatomy.embed_dim]}) {detections[m.label].share[0]:.2%}" for m in small)
        yield "C015", False, f"smaller than Large, in another training than DINOv2's: {text} of the tokens are outliers"
    elif not alike or len(values) < 3:
        yield "C015", None, f"released DINOv2 S, B and L are distilled from g; here: {listed}"
    elif max(each.value for each in values) < 0.005:
        yield "C015", None, f"no size of the ladder has artifacts: {listed}"
    else:
        yield "C015", every([values[0].below(), above(values[-1].low, values[-1].high, 0.005)]), listed
    for model in (m for m in models if m.role == "planted control"):
        onset = found[model.label][0]
        measured = f"found in block {onset}, planted in block {model.onset}"
        yield "control-onset", onset == model.onset, measured, "the onset of the planted control is found", "none"
