"""Figure 18: its plot by head, and its verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from verdicts import above, specimen

from vitreg_lib.measure.pairs import interval
from vitreg_lib.plots.style import PALETTE, PAPER, styled


@styled
def by_head(lift: dict[str, torch.Tensor]) -> Figure:
    """Bars of each head's lift, one panel a model; lift (heads,), by model label, 1 for even attention."""
    heads = [len(values) for values in lift.values()]
    size = (0.45 * sum(heads) + 0.9 * len(heads) + 0.6, 2.9)
    figure, axes = plt.subplots(1, len(heads), sharey=True, squeeze=False, figsize=size, width_ratios=heads)
    for axis, (name, values) in zip(axes[0], lift.items(), strict=True):
        axis.bar(range(len(values)), values, 0.8, color=PALETTE[0])
        line = axis.axhline(1, color=PAPER, ls="--", lw=1, label="even attention")
        axis.set(title=name, xlabel="head", xticks=range(len(values)))
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("attention on outliers /\ntheir share of patches")
    figure.legend(handles=[line], loc="outside upper center")
    return figure


def gap_between_heads(lift: torch.Tensor) -> tuple[float, float]:
    """(low, high): middle 95 % over images of the largest minus the smallest lift of a head; lift (images, heads).

    The heads with the largest and the smallest lift are chosen on the even images and compared on the odd ones.
    """
    mean = lift[::2].nanmean(0)
    gap = lift[1::2, int(mean.argmax())] - lift[1::2, int(mean.argmin())]
    return interval(gap[gap.isfinite()])


def claims(models, lift: dict[str, torch.Tensor], having):
    """Yields the arguments of `Run.claim`: C060 and C061 on the first trained model with artifacts, then the control.

    lift (images, heads), by model label: attention on outliers over their share of patches; NaN in images without
    outliers. having: labels of the models with artifacts.
    """
    model = specimen(models, having)
    if model is None:
        names = ", ".join(m.label for m in models if m.role == "trained")
        for claim in ("C060", "C061"):
            yield claim, None, f"no trained model here has artifacts: {names}"
    else:
        name, values = model.label, lift[model.label]
        values = values[values.isfinite().all(1)]
        ends = [interval(head) for head in values.T]
        found = ", ".join(f"{m:.1f} ({a:.1f} to {b:.1f})" for m, (a, b) in zip(values.mean(0), ends, strict=True))
        by_head = [above(low, high, 1) for low, high in ends]
        verdict = True if all(v is True for v in by_head) else False if False in by_head else "undecided"
        yield "C060", verdict, f"{name}: {found} times their share"
        low, high = gap_between_heads(values)
        text = f"{name}: {found} times their share; largest minus smallest {low:.1f} to {high:.1f} on the other half"
        yield "C061", above(low, high), text
    for control in (m for m in models if m.role == "planted control"):
        values = lift[control.label].nanmean(0)
        head = int(values.nan_to_num(0).argmax())
        rest = values.sort().values[-2]
        text = f"the head of {control.label} that was made to attend to the artifacts (the last) is found"
        measured = f"head {head}: {values[head]:.1f} times their share, the others at most {rest:.1f}"
        yield f"control-{control.label}", head == len(values) - 1, measured, text, "none"
