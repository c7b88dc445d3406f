"""Figure 7: histograms of norms by pair of models, with a slider for the block, and the verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sheets import by_pair
from verdicts import WORDS, every, exists, of_family, over_images

from vitreg_lib import widgets
from vitreg_lib.measure import outliers
from vitreg_lib.plots.style import PALETTE, PAPER, plain_log, styled


def claims(models, found: dict, pairs: dict[str, str], truths: dict, having, profile: str):
    """Yields the arguments of `Run.claim`: C023 to C028 by family, without and with registers; ours; the controls.

    found: `Outliers` by model label; a model with registers has the cutoff of its pair. truths: bool masks or None;
    having: labels of the models with artifacts.
    """
    shares = {name: over_images(each.mask) for name, each in found.items()}
    change = {name: f"{base}: {shares[base].value:.2%} to {name}: {shares[name]}" for name, base in pairs.items()}
    families = {"dinov2": ("C023", "C024"), "clip": ("C025", "C026"), "deit3": ("C027", "C028")}
    for family, (without, with_registers) in families.items():
        members = [m.label for m in of_family(models, family)]
        plain = [name for name in members if name not in pairs]
        chosen = [name for name in plain if name in having] or plain
        text = "; ".join(f"{name}: {shares[name]}" for name in chosen)
        none = f"no model {WORDS[family]} in this run"
        yield without, exists(bool(set(chosen) & having), profile) if plain else None, text or none
        paired = [name for name in members if name in pairs]
        judged = [name for name in paired if pairs[name] in having]
        text = "; ".join(change[name] for name in judged or paired)
        missing = "no artifacts without registers" if paired else f"no pair {WORDS[family]} in this run"
        vanished = every(shares[name].below() for name in judged)
        yield with_registers, vanished, text if judged else f"{missing}; {text}".strip("; ")
    added = [m.label for m in models if m.role == "mended" and pairs.get(m.label) in having]
    text = "; ".join(change[name] for name in added) or "no such pair with artifacts"
    claim = "no patch token has a high norm once registers are added at test time"
    yield "ours-added", every(shares[name].below() for name in added), text, claim, "none"
    for name, truth in truths.items():
        if truth is not None:
            score = outliers.score(found[name].mask.flatten(1), truth)
            text = f"the tail of {name} is found where it was put, and nowhere else"
            yield f"control-{name}", score["f1"] >= 0.95, f"F1 {score['f1']:.3f}", text, "none"


@styled
def histograms(
    norms: dict[str, torch.Tensor], cutoffs: dict[str, float], pairs: dict[str, str], paper: str = "", columns: int = 3
) -> Figure:
    """Histograms of patch norms on log axes: one panel for a model without registers and its versions with registers.

    Dictionaries by model label: norms, of any shape; cutoffs; pairs, {model with registers: the same without}.
    """
    import seaborn as sns

    groups = by_pair(norms, pairs)
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    size = (3.0 * columns + 0.3, 2.6 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        base, cut = next(iter(group)), cutoffs[next(iter(group))]
        values = {name: each.flatten().cpu().numpy() for name, each in group.items()}
        every_one = np.concatenate([*values.values(), [cut] if np.isfinite(cut) else []])
        style = dict(bins=79, binrange=np.log10([0.95 * every_one.min(), 1.1 * every_one.max()]), log_scale=True)
        for number, (name, each) in enumerate(values.items()):
            look = dict(element="step", fill=number == 0, linewidth=0 if number == 0 else 1, alpha=1)
            colour = PALETTE[5] if number == 0 else (PALETTE[1], PALETTE[2], PALETTE[6])[(number - 1) % 3]
            text = f"{name}, {(each > cut).mean():.2%}" if np.isfinite(cut) else f"{name}, no outliers"
            sns.histplot(x=each, ax=axis, color=colour, label=text, **style, **look)
        if np.isfinite(cut):
            axis.axvline(cut, color=PAPER, lw=1.2, ls="--", label=f"cutoff of {base}, {cut:.3g}")
        axis.set(yscale="log", xlabel="L2 norm of patch tokens", ylabel="")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=7)
        plain_log(axis.xaxis, 6)
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens")
        plain_log(axis.yaxis)
    figure.suptitle(paper, fontsize=8, color=PAPER)
    return figure


def layer_histogram(norms: dict[str, torch.Tensor], found: dict, pairs: dict[str, str] | None = None):
    """A widget: `histograms` of the patch norms after one block; a slider chooses the block.

    norms: (images, layers, patches) by model label; found: `Outliers` by label; pairs: as for `histograms`. In every
    block the cutoff is the same multiple of the median, as for onsets.
    """
    times = {name: each.cutoff / each.norms.median().item() for name, each in found.items()}
    deepest = max(values.shape[1] for values in norms.values()) - 1

    def draw(layer):
        at = {name: values[:, min(layer, values.shape[1] - 1)] for name, values in norms.items()}
        cutoffs = {name: times[name] * values.median().item() for name, values in at.items()}
        return histograms(at, cutoffs, pairs or {}, f"block {layer}")

    return widgets.interact(draw, layer=("IntSlider", {"value": deepest, "min": 0, "max": deepest}))
