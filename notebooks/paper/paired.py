"""Paired comparison of models without and with registers on the same images (Fig. 1, 13, 14, 19, 20).

A pair is a model with registers and the same model without (`pairs.pairs`). A score is one number an image; lower is
cleaner.
"""

from __future__ import annotations

import pandas as pd
import torch
from map_scores import median
from scipy.stats import binomtest

from vitreg_lib.measure.pairs import TRAINED, pairs

MISSING = {"trained": "trained with", "test time": "added"}  # kinds of registers in words
LEVEL = 0.05  # p-values below this decide


def sign_test(without: torch.Tensor, with_registers: torch.Tensor) -> tuple[float, float]:
    """Share of images (0 to 1) whose score is lower with registers, and the one-sided p-value of the paired sign test.

    Scores (images,) of the same images by both models. Images with equal scores are left out; (NaN, 1) if none is left.
    """
    unequal = without.isfinite() & with_registers.isfinite() & (without != with_registers)
    lower, n = int((with_registers < without)[unequal].sum()), int(unequal.sum())
    return (lower / n, float(binomtest(lower, n, 0.5, alternative="greater").pvalue)) if n else (float("nan"), 1.0)


def compare(scores: dict[str, torch.Tensor], models):
    """The scores {label: (images,)} of each pair among `models`: a DataFrame, one row a model with registers.

    Columns: without (label of the model without registers), median_without, median_with, share_lower (of images), p
    (sign test that the score is lower with registers), p_higher (that it is higher) and registers_from. Models without
    scores are left out.
    """
    rows, source = {}, {model.label: model.registers_from for model in models}
    for name, plain in pairs([model for model in models if model.label in scores]).items():
        share, p = sign_test(scores[plain], scores[name])
        without, with_registers = (median(s[~s.isnan()]).item() for s in (scores[plain], scores[name]))
        medians = {"median_without": without, "median_with": with_registers}
        p_higher = sign_test(scores[name], scores[plain])[1]
        rows[name] = {"without": plain, **medians, "share_lower": share, "p": p, "p_higher": p_higher}
        rows[name]["registers_from"] = source[name]
    columns = ["without", "median_without", "median_with", "share_lower", "p", "p_higher", "registers_from"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def judge(compared, registers_from: str = "trained", having=None) -> tuple[bool | str | None, str]:
    """(verdict, measured text) over the pairs of one kind, for `Run.claim`.

    compared: from `compare`. registers_from: "trained" (from the start, or into a finished model) or "test time".
    having: labels of the models that have artifacts; None judges all pairs. Pairs whose model without registers has no
    artifacts are not judged, since registers have nothing to remove there. True if the score is lower with registers
    in every judged pair (p below `LEVEL`), False if it is higher in one, else "undecided"; None if no pair is judged.
    """
    kinds = TRAINED if registers_from == "trained" else (registers_from,)
    chosen = compared[compared.registers_from.isin(kinds)]
    if not len(chosen):
        return None, f"no pair of this kind ({MISSING.get(registers_from, registers_from)} registers) in this profile"
    text = "; ".join(
        f"{name}: {row.median_without:.3g} to {row.median_with:.3g}, "
        + (f"lower in {row.share_lower:.0%} of the images (p {row.p:.1g})" if row.share_lower >= 0 else "no difference")
        for name, row in chosen.iterrows()
    )
    judged = chosen if having is None else chosen[chosen["without"].isin(list(having))]
    if not len(judged):
        return None, f"without registers no model of a pair has artifacts ({text})"
    return (bool((judged.p < LEVEL).all()) or (False if (judged.p_higher < LEVEL).any() else "undecided")), text
