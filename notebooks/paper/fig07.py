"""Figure 7: its verdicts, and the histogram with a slider for the block."""

from __future__ import annotations

import torch
from verdicts import WORDS, exists, of_family

from vitreg_lib import plots, widgets
from vitreg_lib.measure import outliers

NO_OUTLIERS = 0.001  # a model with registers counts as free of outliers below this share of the patch tokens


def claims(models, found: dict, pairs: dict[str, str], truths: dict, having, profile: str):
    """Yields the arguments of `Run.claim`: C023 to C028 by family, without and with registers; ours; the controls.

    found: `Outliers` by model label; a model with registers has the cutoff of its pair. truths: bool masks or None;
    having: labels of the models with artifacts.
    """
    share = {name: f"{name}: {each.share:.2%}" for name, each in found.items()}
    families = {"dinov2": ("C023", "C024"), "clip": ("C025", "C026"), "deit3": ("C027", "C028")}
    for family, (without, with_registers) in families.items():
        members = [m.label for m in of_family(models, family)]
        plain = [name for name in members if name not in pairs]
        chosen = [name for name in plain if name in having] or plain
        text = "; ".join(share[name] for name in chosen) or f"no model {WORDS[family]} is at hand"
        yield without, exists(bool(set(chosen) & having), profile) if plain else None, text
        paired = [name for name in members if name in pairs]
        judged = [name for name in paired if pairs[name] in having]
        text = "; ".join(f"{share[pairs[name]]} to {share[name]}" for name in judged or paired)
        missing = "no artifacts without registers" if paired else f"no pair {WORDS[family]} is at hand"
        fewer = all(found[name].share < NO_OUTLIERS for name in judged)
        yield with_registers, fewer if judged else None, text if judged else f"{missing}; {text}".strip("; ")
    added = [m.label for m in models if m.role == "mended" and pairs.get(m.label) in having]
    text = "; ".join(f"{share[pairs[name]]} to {share[name]}" for name in added) or "no such pair with artifacts"
    fewer = all(found[name].share < NO_OUTLIERS for name in added) if added else None
    yield "ours-added", fewer, text, "no patch token has a high norm once registers are added at test time", "none"
    for name, truth in truths.items():
        if truth is not None:
            score = outliers.score(found[name].mask.flatten(1), truth)
            text = f"the tail of {name} is found where it was put, and nowhere else"
            yield f"control-{name}", score["f1"] >= 0.95, f"F1 {score['f1']:.3f}", text, "none"


def layer_histogram(norms: dict[str, torch.Tensor], found: dict):
    """A widget: for each model, the histogram of the patch norms after one block; a slider chooses the block.

    norms: (images, layers, patches) by model label; found: `Outliers` by label. In every block the cutoff is the same
    multiple of the median, as for onsets.
    """
    times = {name: each.cutoff / each.norms.median().item() for name, each in found.items()}
    deepest = max(values.shape[1] for values in norms.values()) - 1

    def draw(layer):
        at = {name: values[:, min(layer, values.shape[1] - 1)] for name, values in norms.items()}
        cutoffs = {name: times[name] * values.median().item() for name, values in at.items()}
        return plots.histograms(at, cutoffs, paper=f"block {layer}", columns=4)

    return widgets.interact(draw, layer=("IntSlider", {"value": deepest, "min": 0, "max": deepest}))
