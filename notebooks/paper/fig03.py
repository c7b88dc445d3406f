"""Figure 3: its verdicts, and the cutoff on a slider."""

from __future__ import annotations

import math

import torch
from verdicts import of_family, specimen

from vitreg_lib import plots, widgets
from vitreg_lib.measure import outliers


def claims(models, output: dict, table, is_outlier: dict, truths: dict):
    """Arguments of `Run.claim`: C007 to C010 on the first trained model with artifacts, C011, then the controls.

    By label: output, patch norms (images, patches); is_outlier and truths, bool of the same shape (None where the truth
    is not known). table: `outliers.summary`.
    """
    having = set(table.index[table.outlier_share >= outliers.MIN_SHARE])
    model = specimen(models, having)
    none = "; ".join(f"{m.label}: {table.outlier_share[m.label]:.2%}" for m in models if m.role == "trained")
    if model is None:
        for claim in ("C007", "C008", "C009", "C010"):
            yield claim, None, f"no trained model here has artifacts ({none} of tokens above the cutoff)"
    else:
        name, norms, row = model.label, output[model.label], table.loc[model.label]
        yield (
            "C007",
            0.01 <= row.outlier_share <= 0.05,
            f"{name}: {row.outlier_share:.2%} above its cutoff {row.cutoff:.3g}",
        )
        # the paper's 100 is two thirds of its cutoff of 150
        bulk = (norms <= row.cutoff * 100 / 150).float().mean().item()
        yield "C008", bulk > 0.9, f"{name}: {bulk:.1%} of the norms are at most two thirds of the cutoff"
        valley = outliers.cutoff_antimode(norms)
        text = f"a valley at {valley:.3g}" if valley < math.inf else "one mode"
        yield "C009", valley < math.inf, f"{name}: {text} in the histogram of log norms"
        yield "C010", 5 <= row.norm_ratio <= 20, f"{name}: ratio {row.norm_ratio:.1f}"
    dino = of_family(models, "dino")
    shares = {m.label: (output[m.label] > 3 * output[m.label].median()).float().mean().item() for m in dino}
    text = "; ".join(f"{name}: {share:.2%} above 3 × median" for name, share in shares.items())
    yield "C011", all(s < 0.001 for s in shares.values()) if dino else None, text or "DINO is not at hand"
    for model in (m for m in models if m.is_control):
        truth, score = truths[model.label], outliers.score(is_outlier[model.label], truths[model.label])
        text = f"on the control {model.label} the rule finds the known outliers and no others"
        measured = f"precision {score['precision']:.3f}, recall {score['recall']:.3f}, truth {truth.float().mean():.2%}"
        good = min(score["precision"], score["recall"]) >= 0.95
        yield f"control-{model.label}", good, f"{measured} of tokens", text, "none"


def cutoff_slider(images, maps: dict[str, torch.Tensor]):
    """Images and one model's norm maps (n, rows, cols), the tokens above a multiple of its median norm ringed.

    The multiple slides; it starts at 3, on the model whose largest norm stands out most.
    """
    most = {name: (norms.max() / norms.median()).item() for name, norms in maps.items()}

    def draw(model, times):
        norms, cutoff = maps[model], times * maps[model].median().item()
        figure = plots.norm_maps(images.pixels, {model: norms}, {model: cutoff})
        share = (norms > cutoff).float().mean().item()
        figure.suptitle(f"cutoff {times:g} × median = {cutoff:.3g}: {share:.2%} of these tokens above", fontsize=9)
        return figure

    return widgets.interact(
        draw,
        model=("Dropdown", {"value": max(most, key=most.get), "options": list(maps)}),
        times=("FloatSlider", {"value": 3.0, "min": 0.5, "max": 10.0, "step": 0.1}),
    )
