"""Which models a claim is judged on, and when: one rule for all figures and tables of the paper.

- A claim about artifacts, or about what registers remove, is judged on models that have artifacts by `vr.detect`. If
  none of the available models has artifacts, the claim is "not testable here".
- A claim about a family (DeiT-III, OpenCLIP, DINOv2) is judged on models trained in the same way: with labels, with
  captions, on images alone. The measured text names them.
- A claim is "undecided" if the interval of the measured difference contains both answers.
- A claim that artifacts exist can fail only on the paper's own models (profiles large and paper), because the paper
  itself says that small models have none.
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
from vitreg_lib.measure.pairs import interval
from vitreg_lib.measure.pairs import pairs as of_models

# families of models, by the family of the paper that is trained in the same way
FAMILIES = {"deit3": ("deit3", "deit", "augreg"), "clip": ("clip",), "dinov2": ("dinov2",), "dino": ("dino",)}
WORDS = {"deit3": "trained with labels", "clip": "trained with captions", "dinov2": "trained as DINOv2", "dino": "DINO"}

NO_OUTLIERS = 0.001  # a model counts as free of outliers below this share of the patch tokens (claims.csv)
COPIES = 0.99  # two registers with a larger cosine count as copies: their maps cannot differ


def of_family(models, family: str) -> list:
    """The trained models among `models` that were trained in the same way as a family of the paper, in order."""
    known = {m.label: m.family for m in models}  # a model with registers trained into it has the family of its base
    members = [m for m in models if (m.family or known.get(m.base)) in FAMILIES[family]]
    return [m for m in members if m.role == "trained"]


def detected(run, models, seen: dict, pictures: dict | None = None) -> tuple[dict, set[str]]:
    """({label: `Outliers`}, labels of the models that have artifacts), by `vr.detect` on the run's images.

    seen: captures with norms, by label; the outliers are those of the last captured block. pictures: other images to
    detect on, by label. A model with registers uses the cutoff of the same model without; other models use
    `cutoff_after`.
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
    """The parts of a `Detection` that are cached: its answer, its cutoff, and the block that was judged."""

    answer: str
    cutoff: float
    block: int

    @classmethod
    def of(cls, found: detection.Detection) -> Judged:
        return cls(found.answer, found.outliers.cutoff, found.outliers.layer)


def judged(model, images) -> Judged:
    """`vr.detect` of a model on images, cached, because many notebooks need the same answer."""
    if model.replayed:  # it has no weights to identify it, and its detection is fast
        return Judged.of(detection.detect(model, images))
    about = model.fingerprint(images) | {"kind": "detection"}
    return Judged(*remembered(about, lambda: Judged.of(detection.detect(model, images))))


def cutoff_after(answer: Judged, block: int, norms: torch.Tensor) -> float:
    """The norm above which a token is an outlier after `block`, where tokens have `norms`; infinite for "none".

    After the judged block it is the cutoff of the detection. After another block, or if the answer is undecided, it is
    computed from the norms alone.
    """
    if answer.answer == "none":
        return math.inf
    return answer.cutoff if (answer.answer, answer.block) == ("artifacts", block) else outliers.cutoff(norms)


def specimen(models, having):
    """The first trained model that has artifacts (its label is in `having`), or None."""
    return next((m for m in models if m.role == "trained" and m.label in having), None)


def registered(models, pairs: dict[str, str], having, profile: str) -> tuple[list, str]:
    """(models trained with registers whose pair without has artifacts, the reason if there is none).

    For the paper's own models (profiles large and paper) the pair may be missing, because the paper measured it.
    """
    trained = [m for m in models if m.role == "trained" and m.anatomy.num_registers]
    own = profile in ("large", "paper")
    chosen = [m for m in trained if pairs.get(m.label) in having or (own and m.label not in pairs)]
    names = ", ".join(m.label for m in trained)
    reason = f"without registers the pairs of {names} have no artifacts" if names else "no model with trained registers"
    return chosen, reason


def cured(models, having, family: str = "") -> tuple[dict[str, str], str]:
    """({model trained with registers: the same without}, the reason if there is none): the pairs that can be judged.

    Registers were trained from the start or into a finished model, and the model without them has artifacts. family:
    restricts the pairs to one of the paper's families.
    """
    members = [m.label for m in (of_family(models, family) if family else models)]
    found = {name: base for name, base in of_models(models, "trained").items() if name in members}
    kind = WORDS[family] if family else "trained with registers"
    absent = f"no pair {kind} is among the models of this item"
    missing = "no artifacts without registers: " + ", ".join(found) if found else absent
    return {name: base for name, base in found.items() if base in having}, missing


def copies(model) -> bool:
    """Are two registers of a model copies of each other (`COPIES`) as they enter the first block?

    Of a replayed model its file says it; one that does not say it counts as having none.
    """
    if model.replayed:
        return model.measured.get("copies", False)
    registers = getattr(model.module, "reg_token", None)
    if registers is None or registers.shape[1] < 2:
        return False
    unit = torch.nn.functional.normalize(registers[0].double(), dim=-1)
    between = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return bool(between.max() > COPIES)


def exists(found: bool, profile: str) -> bool | None:
    """The verdict on a claim that artifacts exist: their absence counts only for the paper's own models."""
    return True if found else (False if profile in ("large", "paper") else None)


def above(low: float, high: float, limit: float = 0.0) -> bool | str:
    """True if the interval lies above the limit, False if below it, "undecided" if the limit is inside."""
    return True if low > limit else False if high < limit else "undecided"  # "undecided" also for NaN


class Share(NamedTuple):
    """A share of the patch tokens (0 to 1) and its 95 % interval over images; as text "0.26% (0.05 to 0.71)"."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} ({100 * self.low:.2f} to {100 * self.high:.2f})"

    def below(self, limit: float = NO_OUTLIERS) -> bool | str:
        """True if the interval lies below the limit, False if above it, else "undecided"."""
        return above(-self.high, -self.low, -limit)


def over_images(mask: torch.Tensor) -> Share:
    """The `Share` of tokens in a mask (images, …), such as that of an `Outliers`, by a bootstrap of images.

    A bootstrap of images without any outlier has no width, although other images may have some. There, the upper end is
    that of the same images with one outlier in one of them: 3 divided by the number of tokens (the "rule of three"). It
    is the least that such images leave open, and never more than if an outlier had been seen. With several outliers in
    an image, a larger share would be possible.
    """
    of_images = mask.flatten(1).double().mean(1)
    value = of_images.mean().item()
    if value == 0:
        of_images[0] = 1 / mask[0].numel()
    low, high = interval(of_images)
    return Share(value, low if value else 0.0, high)


def majority(hits) -> bool | str:
    """Do most images have a property, hits (images,) bool? By the exact 95 % interval of the share."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95)
    return above(interval.low, interval.high, 0.5)


def within(low: float, high: float, margin: float, centre: float = 0.0) -> bool | str:
    """Is a quantity unchanged? True if its interval lies within the margin, False if outside, else "undecided"."""
    if centre - margin <= low and high <= centre + margin:
        return True
    return False if low > centre + margin or high < centre - margin else "undecided"


def every(answers) -> bool | str | None:
    """One verdict from several: False if one is False, True if all are True, else "undecided".

    None (not testable) is left out; the result is None if nothing is left.
    """
    answers = [a for a in answers if a is not None]
    if not answers:
        return None
    return False if any(a is False for a in answers) else (True if all(a is True for a in answers) else "undecided")


def over_folds(values) -> tuple[float, float, float]:
    """(mean, low, high) of a score over the folds of a cross-validation: the middle 95 % by Student's t.

    The folds test on different images, so this is an interval over images. They share training images, so it is
    somewhat too narrow (Bengio and Grandvalet 2004).
    """
    values = torch.as_tensor(list(values), dtype=torch.float64)
    values = values[values.isfinite()]
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = float(t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def table(found: dict[str, outliers.Outliers], onsets: dict[str, int | None]):
    """The numbers of records: a DataFrame, one row a model; numbers that need outliers are empty without outliers."""
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
    """`table` of the outliers of detections, with a column `support`."""
    of = table({n: each.outliers for n, each in found.items()}, {n: each.onset for n, each in found.items()})
    return of.assign(support=[each.support for each in found.values()])


def onsets(found: dict[str, outliers.Outliers], norms: dict[str, torch.Tensor]) -> dict[str, int | None]:
    """{label: the first block with outliers, None without outliers}, from norms (images, layers, patches)."""
    last = {name: each.shape[1] - 1 for name, each in norms.items()}
    return {
        name: outliers.onset_of(norms[name], each.mask.flatten(1), each.cutoff, last[name]) if each.mask.any() else None
        for name, each in found.items()
    }
