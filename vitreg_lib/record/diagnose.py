"""Does a model have artifacts, and do they hurt? The measurements of this collection on any ViT, on one page.

    vitreg diagnose timm:vit_base_patch16_224.dino
    vitreg diagnose file:weights.pth#vit_small_patch16_224 --images folder/of/photos

The answer is that of `measure.detection`: artifacts, none, or undecided, with how many images would decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import plots
from ..base import results, write_atomically
from ..hooks.capture import Capture
from ..measure import detection
from ..model.model import Model
from ..train import telemetry
from . import report

COPIES = 0.99  # cosine from which on two registers are one


@dataclass
class Diagnosis:
    """What a model was found to have; `numbers` by name as in records, None for what there is nothing to measure of.

    verdict: some sentences. detection: the answer with its outliers. captured: norms of all blocks, to draw.
    places: (rows, cols) how often (0 to 1) each place of the grid holds an outlier. source: what the images are.
    """

    model: Model
    detection: detection.Detection
    numbers: dict[str, float | int | None]
    verdict: str
    captured: Capture
    places: torch.Tensor
    source: str


def diagnose(model: Model, images, progress: bool = False) -> Diagnosis:
    """The `Diagnosis` of a model from an `Images` set of it; ten photos can carry an answer, fifty are better."""
    observed = detection.observe(model, images, progress)
    found = detection.judge(observed, model.label)
    mask, norms = found.outliers.mask, found.outliers.norms
    of_cls, any_outlier = observed.received(found.outliers.layer).get("cls"), bool(mask.any())
    alike = detection.registers_alike(model, images)
    numbers = {
        "images": found.images,
        "images_needed": found.images_needed,
        "support": found.support if found.images > 1 else None,
        "outlier_share": found.share[0],
        "outlier_share_low": found.share[1],
        "outlier_share_high": found.share[2],
        "cutoff": found.outliers.cutoff if any_outlier else None,
        "norm_ratio": found.norm_ratio,
        "onset_layer": found.onset,
        "blocks": model.anatomy.depth,
        "median_norm": norms.median().item(),
        "largest_norm": norms.max().item(),
        "explained_by_place": found.place,
        "attention_on_outliers": (of_cls * mask.flatten(1)).mean().item()
        if any_outlier and of_cls is not None
        else None,
        "overlap_of_attention_and_norm": found.overlap,
        "largest_cosine_of_registers": alike,
    }
    verdict = f"{found} {_registers(model.anatomy.num_registers, alike)}".strip()
    if found.has_artifacts and numbers["attention_on_outliers"] is not None:
        verdict += f" The cls token gives them {numbers['attention_on_outliers']:.0%} of its attention to patches."
    if found.has_artifacts:
        verdict += " `vitreg mend` tries to move them to registers at test time."
    return Diagnosis(model, found, numbers, verdict, observed.seen, mask.float().mean(0), images.source)


def _registers(number: int, alike: float | None) -> str:
    """A sentence on whether a model's registers differ; empty for fewer than two."""
    if alike is None:
        return ""
    copies = f"at least two of its {number} registers are copies of each other"
    text = copies if alike >= COPIES else f"its {number} registers differ"
    return f"{text[0].upper()}{text[1:]} (largest cosine between two {alike:.3f})."


def page(found: Diagnosis, path: Path | None = None) -> Path:
    """Write the diagnosis as one self-contained page; its path (results/diagnose/<model>.html by default)."""
    import io

    import matplotlib.pyplot as plt

    label = found.model.label
    outliers = found.detection.outliers
    table = telemetry.table(found.captured)
    figures = {
        "Norms of patch tokens after every block": plots.norms_by_layer({label: table}, {label: found.detection.onset}),
        f"Norms after block {outliers.layer}": plots.histograms({label: outliers.norms}, {label: outliers.cutoff}),
        "How often a place holds an outlier (0 to 1)": plots.sheet(
            None, [{label: found.places[None]}], plots.NORMS, "share of images", "group", cell=2.5
        ),
    }
    pictures = {}
    for title, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, bbox_inches="tight")
        plt.close(figure)
        pictures[title] = buffer.getvalue()
    values = dict(model=found.model, verdict=found.verdict, source=found.source, numbers=found.numbers)
    path = path or results() / "diagnose" / f"{re.sub(r'[^A-Za-z0-9._+-]', '_', found.model.name)}.html"
    write_atomically(path, report.page("diagnose", **values, pictures=pictures).encode())
    return path
