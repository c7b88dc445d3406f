"""Parts of the notebook `train_registers`: held-out images, tables before and after, the recorded runs, verdicts."""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib.figure import Figure

from vitreg_lib.base import DATA
from vitreg_lib.data import images
from vitreg_lib.measure import attention, pairs
from vitreg_lib.plots.maps import sheet
from vitreg_lib.plots.style import ATTENTION, NORMS
from vitreg_lib.train.recipes.registers import REPORTED

COLUMNS = {
    "outliers": "outliers (% of patches)",
    "attention_on_outliers": "cls attention on their places (%)",
    "attention_on_registers": "cls attention on registers (%)",
    "answers_kl": "change of answers (100 × nats)",
}


def held_out(run, model) -> images.Images:
    """Images that are not used in training; for the source "photos", the four that the recipe keeps for its report."""
    found = run.images(model)
    if run.source(model) != "photos":
        return found
    return found.at(i for i, name in enumerate(found.names) if name in REPORTED)


def table(effects: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row for each name of {name: `remedies.effect`}: means over images, in per cent."""
    means = {name: 100 * effect[list(COLUMNS)].astype(float).mean() for name, effect in effects.items()}
    return pd.DataFrame(means).T.rename(columns=COLUMNS)


def maps(variants: dict, pictures: images.Images, most: int = 3) -> Figure:
    """Norms after the last block and its attention of cls, for models by name; maps of an image share a scale."""
    seen = {name: attention.cls_or_mean(model, pictures.x[:most]) for name, model in variants.items()}
    norms = {f"norm, {name}": capture.norm_maps for name, (_, capture) in seen.items()}
    cls = {f"attention, {name}": rows for name, (rows, _) in seen.items()}
    return sheet(pictures.pixels[:most], [norms, cls], [NORMS, ATTENTION], "norm or attention")


def recorded(registers: int = 4) -> pd.DataFrame:
    """`table` for the real models of the notebook beyond/registers_after_training, 100 steps, seed 0."""
    rows = pd.read_parquet(DATA / "sweeps" / "registers_after_training.parquet")
    rows = rows[(rows.seed == 0) & (rows.control == "")]
    found = {}
    for model in ("deit-ti", "vit-ti"):
        for words, arm, count in (
            ("as it is", "empty", 0),
            (f"{registers} empty tokens", "empty", registers),
            ("trained, 0 registers", "doses", 0),
            (f"trained, {registers} registers", "doses", registers),
        ):
            found[f"{model}, {words}"] = rows[(rows.model == model) & (rows.arm == arm) & (rows.registers == count)]
    return table(found)


def claims(control: pd.DataFrame, trained: pd.DataFrame, registers: int, patches: int):
    """Yields the arguments of `Run.claim`.

    control, trained: `remedies.effect` of the model trained without and with registers. The thresholds are those of
    beyond/registers_after_training: a claim holds if the whole interval over images meets it, and fails if the whole
    interval does not. patches: number of patches of an image, which defines an even share of attention.
    """
    left = trained.outliers - trained.outliers_before / 10
    yield "ours-outliers", below(left), change(trained, "outliers"), "at most a tenth of the outliers is left", "none"
    words = "trained as long without registers the model keeps at least a third of its outliers"
    kept = control.outliers_before / 3 - control.outliers
    yield "ours-control", below(kept), change(control, "outliers"), words, "none"
    moved = trained.attention_on_outliers - trained.attention_on_outliers_before / 5
    words = "the places of outliers keep at most a fifth of cls's attention"
    yield "ours-attention", below(moved), change(trained, "attention_on_outliers"), words, "none"
    even = registers / (1 + registers + patches)
    given = trained.attention_on_registers
    text = f"{given.mean():.1%} of cls's attention, {even:.1%} if it were even"
    words = "registers take over: cls gives them more than twice an even share of its attention"
    yield "ours-registers", below(2 * even - given) if registers else None, text, words, "none"


def change(effect: pd.DataFrame, name: str) -> str:
    """Means before and after, in words."""
    return f"{effect[f'{name}_before'].mean():.2%}, then {effect[name].mean():.2%}, over {len(effect)} images"


def below(difference: pd.Series) -> bool | str:
    """True if the interval of the mean over images lies at or below 0, False if above, else "undecided"."""
    low, high = pairs.interval(torch.tensor(difference.dropna().to_numpy()))
    return True if high <= 0 else False if low > 0 else "undecided"
