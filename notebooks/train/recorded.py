"""The recorded full training of a model of the repository, shown beside a short live one, and the verdicts on both."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vitreg_lib.model import zoo
from vitreg_lib.plots.norms import bands, quantile_levels
from vitreg_lib.plots.style import PALETTE, PAPER, plain_log, styled
from vitreg_lib.train import telemetry

SHIPPED = {"deit3": "mini-deit3-reg4", "clip": "mini-clip-reg4", "dinov2": "mini-dinov2-reg4", "mae": "mini-mae"}
ATTRIBUTES = 4  # questions asked about each scene: shape, colour, texture, background
MEASURES = {  # the result that judges a recipe: (name, value by chance or the name of its measurement, words)
    "deit3": ("accuracy", 3 / 16, "of the answers about unseen scenes are right"),
    "clip": ("zeroshot", 3 / 16, "of the zero-shot answers about unseen scenes are right"),
    "dinov2": ("knn", "random_knn", "of unseen scenes' attributes are those of their neighbours"),
    "mae": ("error", 1.0, "of the error that painting each patch's mean would make"),
}


def score(recipe: str, result: dict) -> tuple[float, float, str]:
    """(value, value by chance, words) for the result of a training, or an entry of data/models.yaml."""
    name, chance, words = MEASURES[recipe]
    parts = [result[f"{name}_{part}"] for part in ("shape", "colour", "texture", "background") if recipe == "deit3"]
    value = sum(parts) / len(parts) if parts else result[name]
    return value, result[chance] if isinstance(chance, str) else chance, words


def claims(recipe: str, result: dict, steps: int, images: int, detection):
    """Yields the arguments of `Run.claim`: did the live and the recorded training learn, and are there artifacts?

    result: of the live training of `steps` steps, measured on `images` scenes; detection: of the trained model.
    """
    full = zoo.entries()[SHIPPED[recipe]]
    for claim, found, count, text in (
        ("learns", result, steps, "the short training above learns: it does better than chance"),
        ("learns-full", full, full["steps"], f"the full training of {SHIPPED[recipe]} learns"),
    ):
        value, chance, words = score(recipe, found)
        # the four answers about an image count as independent; the error has no interval
        half = 0.0 if recipe == "mae" else 1.96 * math.sqrt(chance * (1 - chance) / (images * ATTRIBUTES))
        gain = chance - value if recipe == "mae" else value - chance
        verdict = True if gain > half else "undecided" if gain >= -half else False
        measured = f"{value:.2f} {words} after {count} steps, {chance:.2f} by chance (± {half:.2f})"
        yield claim, verdict, measured, text, "none"
    verdict = {"artifacts": True, "none": False}.get(detection.answer, "undecided")
    text, paper = "the short training grows artifacts", "only in large models, after a third of a long training"
    yield "outliers", verdict, str(detection), text, paper


@styled
def full_training(recipe: str, steps: int) -> Figure:
    """Norms during the recorded training and, at its end, by block; a line marks the `steps` of the live training."""
    name = SHIPPED[recipe]
    table = telemetry.shipped(name)[name]
    figure, (by_step, by_block) = plt.subplots(1, 2, figsize=(8.4, 2.8))
    last, end = table[table.layer == table.layer.max()], table[table.step == table.step.max()]
    for axis, part, x in ((by_step, last, last.step), (by_block, end, end.layer)):
        bands(axis, x, quantile_levels(part), PALETTE[0])
        for colour, kind in ((PALETTE[2], "cls"), (PALETTE[3], "register")):
            if part[f"{kind}_norm"].notna().any():
                axis.plot(x, part[f"{kind}_norm"], color=colour, ls="-.", label=f"{kind}, mean")
        axis.set_yscale("log")
        plain_log(axis.yaxis)
    by_step.axvline(steps, color=PAPER, ls=":", label="end of the live training")
    by_step.set(xlabel="step", ylabel="L2 norm, last block")
    by_block.set(xlabel="block (from 0)", ylabel=f"L2 norm, step {table.step.max()}")
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def results(recipe: str, live: dict) -> pd.DataFrame:
    """The scores that both the live and the recorded training have, one column each."""
    full = zoo.entries()[SHIPPED[recipe]]
    shared = [name for name in live if name in full and not name.startswith(("seconds", "parameters", "images"))]
    return pd.DataFrame({"live": {k: live[k] for k in shared}, SHIPPED[recipe]: {k: full[k] for k in shared}})
