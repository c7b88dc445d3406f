"""Which model a claim is judged on, and when: one rule for all figures and tables of the paper.

- A claim about artifacts, or about what registers remove, is judged on models that have artifacts by `vr.detect`. Where
  none of the models at hand has any, the claim is "not testable here".
- A claim about a family (DeiT-III, OpenCLIP, DINOv2) is judged on models trained in the same way: with labels, with
  captions, on images alone. The measured text names them.
- A difference inside its interval is "undecided".
- The existence of artifacts can fail only on the paper's own models (profiles large and paper): the paper says itself
  that small models have none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pandas as pd
import torch
from scipy.stats import binomtest, t

from vitreg_lib.base import remembered
from vitreg_lib.measure import detection, outliers
from vitreg_lib.measure.pairs import pairs as of_models

# families of models by the paper's family whose way of training they share
FAMILIES = {"deit3": ("deit3", "deit", "augreg"), "clip": ("clip",), "dinov2": ("dinov2",), "dino": ("dino",)}
WORDS = {"deit3": "trained with labels", "clip": "trained with captions", "dinov2": "trained as DINOv2", "dino": "DINO"}

COPIES = 0.99  # cosine of two registers: above it they are one register, whose maps cannot differ


def of_family(models, family: str) -> list:
    """The trained models among `models` whose training is that of a family of the paper, in order."""
    known = {m.label: m.family for m in models}  # registers trained into a model leave its family as it was
    members = [m for m in models if (m.family or known.get(m.base)) in FAMILIES[family]]
    return [m for m in members if m.role == "trained"]


def detected(run, models, seen: dict, pictures: dict | None = None) -> tuple[dict, set[str]]:
    """({label: `Outliers`}, labels of the models that have artifacts), by `vr.detect` on the run's images.

    pictures: other images, by label.

    seen: captures with norms, by label; the last captured block counts. A model with registers takes the cutoff of its
    pair without; the others have that of `cutoff_after`.
    """
    own, having = {}, set()
    for model in models:
        name = model.label
        answer = judged(model, pictures[name] if pictures else run.images(model))
        last = outliers.find(seen[name], cut=math.inf)
        cut = cutoff_after(answer, last.layer, last.norms)
        own[name] = dataclasses.replace(outliers.find(seen[name], cut=cut), cutoff_from=name)
        having |= {name} if answer.answer == "artifacts" else set()
    pairs = of_models(models)
    found = {name: outliers.find(seen[name], cut=own.get(pairs.get(name), each)) for name, each in own.items()}
    return found, having


class Judged(NamedTuple):
    """What is kept of a `Detection`: its answer, its cutoff, and the block that was judged."""

    answer: str
    cutoff: float
    block: int

    @classmethod
    def of(cls, found: detection.Detection) -> Judged:
        return cls(found.answer, found.outliers.cutoff, found.outliers.layer)


def judged(model, images) -> Judged:
    """`vr.detect` of a model on images; kept, for many notebooks ask it about the same."""
    if model.replayed:  # it has no weights to know it by, and takes no time
        return Judged.of(detection.detect(model, images))
    about = model.fingerprint(images) | {"kind": "detection"}
    return Judged(*remembered(about, lambda: Judged.of(detection.detect(model, images))))


def cutoff_after(answer: Judged, block: int, norms: torch.Tensor) -> float:
    """The norm above which a token of `norms`, after a block, is an outlier; infinite for the answer "none".

    After the judged block it is the detection's own, after another one or if undecided that of the norms alone.
    """
    if answer.answer == "none":
        return math.inf
    return answer.cutoff if (answer.answer, answer.block) == ("artifacts", block) else outliers.cutoff(norms)


def specimen(models, having):
    """The first trained model that has artifacts (its label is in `having`); None without one."""
    return next((m for m in models if m.role == "trained" and m.label in having), None)


def registered(models, pairs: dict[str, str], having, profile: str) -> tuple[list, str]:
    """The models trained with registers whose pair without has artifacts, and what to say where there is none.

    Of the paper's own models (profiles large and paper) the pair need not be at hand: the paper measured it.
    """
    trained = [m for m in models if m.role == "trained" and m.anatomy.num_registers]
    own = profile in ("large", "paper")
    chosen = [m for m in trained if pairs.get(m.label) in having or (own and m.label not in pairs)]
    names = ", ".join(m.label for m in trained)
    reason = f"without registers the pairs of {names} have no artifacts" if names else "no model with trained registers"
    return chosen, reason


def cured(models, having, family: str = "") -> tuple[dict[str, str], str]:
    """({a model trained with registers: the same without}, what to say where there is none): pairs that can be judged.

    Registers were trained from the start or into a finished model, and the model without them has artifacts. family: of
    a claim about one of the paper's families.
    """
    members = [m.label for m in (of_family(models, family) if family else models)]
    found = {name: base for name, base in of_models(models, "trained").items() if name in members}
    kind = WORDS[family] if family else "trained with registers"
    missing = "no artifacts without registers: " + ", ".join(found) if found else f"no pair {kind} is at hand"
    return {name: base for name, base in found.items() if base in having}, missing


def copies(model) -> bool:
    """Are the registers of a model, as they enter the first block, one and the same but for rounding?"""
    registers = getattr(model.module, "reg_token", None)
    if registers is None or registers.shape[1] < 2:
        return False
    unit = torch.nn.functional.normalize(registers[0].double(), dim=-1)
    between = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return bool(between.max() > COPIES)


def exists(found: bool, profile: str) -> bool | None:
    """The verdict on a claim that artifacts exist: absence counts only for the paper's own models."""
    return True if found else (False if profile in ("large", "paper") else None)


def above(low: float, high: float, limit: float = 0.0) -> bool | str:
    """True where the interval lies above the limit, False below it, "undecided" where the limit is inside."""
    return True if low > limit else False if high < limit else "undecided"  # also where there is no interval


def majority(hits) -> bool | str:
    """Is a property, bool (images,), that of most images? By the exact 95 % interval of the share."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95)
    return above(interval.low, interval.high, 0.5)


def within(low: float, high: float, margin: float, centre: float = 0.0) -> bool | str:
    """Is a quantity unchanged: True where its interval lies within the margin, False outside, else "undecided"."""
    if centre - margin <= low and high <= centre + margin:
        return True
    return False if low > centre + margin or high < centre - margin else "undecided"


def every(answers) -> bool | str | None:
    """One verdict on all of some questions: False where one fails, True where all hold, else "undecided"; None of none.

    Questions that could not be asked (None) are left out.
    """
    answers = [a for a in answers if a is not None]
    if not answers:
        return None
    return False if any(a is False for a in answers) else (True if all(a is True for a in answers) else "undecided")


def over_folds(values) -> tuple[float, float, float]:
    """(mean, low, high) of a score over the folds of a cross-validation: the middle 95 % by Student's t.

    The folds test on different images, so the interval is one over images; they share training images, which makes it
    somewhat too narrow (Bengio and Grandvalet 2004).
    """
    values = torch.as_tensor(list(values), dtype=torch.float64)
    values = values[values.isfinite()]
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = float(t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def table(found: dict[str, outliers.Outliers], onsets: dict[str, int | None]):
    """A DataFrame with the numbers of records, one row a model; what needs outliers is empty where there are none."""
    rows = {
        name: {
            "cutoff": each.cutoff if each.cutoff < math.inf else None,
            "outlier_share": each.share,
            "norm_ratio": each.norm_ratio,
            "onset_layer": onsets[name],
            "median_norm": each.norms.median().item(),
            "largest_norm": each.norms.max().item(),
        }
        for name, each in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype({"onset_layer": "Int64"})


def of_detections(found: dict[str, detection.Detection]):
    """`table` of the outliers of detections, and the `support` of these."""
    of = table({n: each.outliers for n, each in found.items()}, {n: each.onset for n, each in found.items()})
    return of.assign(support=[each.support for each in found.values()])


def onsets(found: dict[str, outliers.Outliers], norms: dict[str, torch.Tensor]) -> dict[str, int | None]:
    """{label: the first block with outliers}, from norms (images, layers, patches) of all blocks; None without any."""
    last = {name: each.shape[1] - 1 for name, each in norms.items()}
    return {
        name: outliers.onset_of(norms[name], each.mask.flatten(1), each.cutoff, last[name]) if each.mask.any() else None
        for name, each in found.items()
    }
