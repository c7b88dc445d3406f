"""Without against with registers on the same images: intervals, paired scores and verdicts (Fig. 1, 19 to 21).

A pair is a model and the same with registers, told by name: NAME and NAME-regN (trained so) or NAME+ttrN (added at test
time). A score is one number an image, the lower the cleaner.
"""

from __future__ import annotations

import re

import torch


def interval(values: torch.Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high): the middle 95 % of the mean of values (images,) when the images are drawn anew, a bootstrap."""
    values = values.double().cpu()
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def sign_test(without: torch.Tensor, with_registers: torch.Tensor) -> tuple[float, float]:
    """Share of images (0 to 1) whose score is lower with registers, and the one-sided p-value of the paired sign test.

    Scores (images,) of the same images by both models; equal pairs are left out. (NaN, 1) where none is left.
    """
    from scipy.stats import binomtest

    known = without.isfinite() & with_registers.isfinite() & (without != with_registers)
    lower, n = int((with_registers < without)[known].sum()), int(known.sum())
    return (lower / n, float(binomtest(lower, n, 0.5, alternative="greater").pvalue)) if n else (float("nan"), 1.0)


def compare(scores: dict[str, torch.Tensor]):
    """Every pair among `scores` {model: (images,)}: a DataFrame, one row a model with registers.

    Columns: without (the model's name), median_without, median_with, share_lower (of images), p (sign test that the
    score is lower with registers) and p_higher (that it is higher).
    """
    import pandas as pd

    rows = {}
    for name, plain in pairs(list(scores)).items():
        share, p = sign_test(scores[plain], scores[name])
        medians = {"median_without": scores[plain].nanmedian().item(), "median_with": scores[name].nanmedian().item()}
        p_higher = sign_test(scores[name], scores[plain])[1]
        rows[name] = {"without": plain, **medians, "share_lower": share, "p": p, "p_higher": p_higher}
    columns = ["without", "median_without", "median_with", "share_lower", "p", "p_higher"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def judge(compared, kind: str = "-reg", having=None, level: float = 0.05) -> tuple[bool | str | None, str]:
    """(verdict, what was measured) over the pairs of a `kind`, "-reg" or "+ttr", for `run.claim`.

    compared: from `compare`. having: labels of the models that have artifacts. Other pairs are not judged, since
    registers have nothing to remove there; None judges all. Holds where the score is lower with registers in every
    judged pair (p below `level`), fails where it is higher in one, else "undecided"; None where no pair is judged.
    """
    chosen = compared[[kind in name for name in compared.index]]
    if not len(chosen):
        return None, f"no pair of this kind ({'trained with' if kind == '-reg' else 'added'} registers) in this profile"
    text = "; ".join(
        f"{name}: {row.median_without:.3g} to {row.median_with:.3g}, "
        + (f"lower in {row.share_lower:.0%} of the images (p {row.p:.1g})" if row.share_lower >= 0 else "no difference")
        for name, row in chosen.iterrows()
    )
    judged = chosen if having is None else chosen[chosen["without"].isin(list(having))]
    if not len(judged):
        return None, f"without registers no model of a pair has artifacts ({text})"
    return (bool((judged.p < level).all()) or (False if (judged.p_higher < level).any() else "undecided")), text


def pairs(names: list[str]) -> dict[str, str]:
    """{model with registers: the same model without}, by name: NAME-regN or NAME+ttrN after NAME."""
    plain = {name: without_registers(name) for name in names}
    return {name: base for name, base in plain.items() if base != name and base in names}


def without_registers(name: str) -> str:
    """The name of the same model without registers: NAME of NAME-regN and of NAME+ttrN; other names as they are."""
    return re.sub(r"(-reg|\+ttr)\d+$", "", name)
