"""Does a model have artifacts, and do they hurt? The measurements of this collection on any ViT, on one page.

    vitreg diagnose timm:vit_base_patch16_224.dino
    vitreg diagnose file:weights.pth#vit_small_patch16_224 --images folder/of/photos

The answer rests on norms before the final LayerNorm at every block: a cutoff by the default rule (`outliers`), the
block where outliers appear, their places, and the attention that cls gives them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import plots
from ..base import results, write_atomically
from ..hooks.capture import Capture
from ..measure import attention, maps, outliers
from ..model.model import Model
from ..train import telemetry
from . import report


@dataclass
class Diagnosis:
    """What was found; `numbers` by name as in records, `verdict` in a sentence or two, the norms to draw.

    layer: the block that was judged, the last one with outliers, else the last. captured: norms of all blocks.
    shares: (rows, cols) how often (0 to 1) each place of the grid holds an outlier.
    """

    model: Model
    numbers: dict[str, float | int | None]
    verdict: str
    layer: int
    captured: Capture
    shares: torch.Tensor
    source: str


def diagnose(model: Model, images, progress: bool = False) -> Diagnosis:
    """The `Diagnosis` of a model from an `Images` set of it; a few photos are enough, twenty are better."""
    seen = model.capture(images, "norms", progress=progress)
    norms = seen.patch_norms
    holding = outliers.layers_with_outliers(norms)
    layer = holding[-1] if holding else seen.layers[-1]
    cut = outliers.cutoff(norms[:, layer])
    is_outlier = norms[:, layer] > cut
    shares = is_outlier.float().mean(0).unflatten(0, seen.grid)
    numbers = {
        "outlier_share": is_outlier.float().mean().item(),
        "cutoff": cut if cut < float("inf") else None,
        "norm_ratio": outliers.norm_ratio(norms[:, layer], is_outlier),
        "onset_layer": outliers.onset_layer(norms),
        "blocks": len(seen.layers),
        "median_norm": norms[:, layer].median().item(),
        "largest_norm": norms[:, layer].max().item(),
        "places_in_half_of_the_images": int((shares >= 0.5).sum()),
        "attention_on_outliers": None,
    }
    if holding and model.anatomy.has_cls:
        of_cls, _ = attention.cls_or_mean(model, images)
        on_outliers = maps.attention_on(of_cls, is_outlier.unflatten(1, seen.grid))
        numbers["attention_on_outliers"] = on_outliers.nanmean().item()
    return Diagnosis(model, numbers, _verdict(numbers, bool(holding), layer), layer, seen, shares, images.source)


def _verdict(numbers: dict, has: bool, layer: int) -> str:
    if not has:
        ratio = numbers["largest_norm"] / numbers["median_norm"]
        return (
            f"No artifacts: at none of the {numbers['blocks']} blocks do norms of patch tokens form a second mode with "
            f"at least 0.5 % of the tokens; the largest is {ratio:.1f} times the median."
        )
    text = (
        f"Artifacts: {numbers['outlier_share']:.2%} of the patch tokens after block {layer} lie above "
        f"{numbers['cutoff']:.3g}, with {numbers['norm_ratio']:.1f} times the median norm, "
        f"from block {numbers['onset_layer']} of {numbers['blocks']} on."
    )
    fixed = numbers["places_in_half_of_the_images"]
    if fixed:
        text += f" {fixed} places of the grid hold one in at least half of the images: they sit by position."
    if numbers["attention_on_outliers"] is not None:
        share = f"{numbers['attention_on_outliers']:.0%}"
        text += f" The cls token gives them {share} of its attention to patches in the last block."
    return text + " `vitreg mend` tries to move them to registers at test time."


def page(found: Diagnosis, path: Path | None = None) -> Path:
    """Write the diagnosis as one self-contained page; its path (results/diagnose/<model>.html by default)."""
    import io

    import matplotlib.pyplot as plt

    label = found.model.label
    judged = found.captured.patch_norms[:, found.layer]
    cut = found.numbers["cutoff"] or float("inf")
    table = telemetry.table(found.captured)
    figures = {
        "Norms of patch tokens after every block": plots.norms_by_layer(
            {label: table}, {label: found.numbers["onset_layer"]}
        ),
        f"Norms after block {found.layer}": plots.histograms({label: judged}, {label: cut}),
        "How often a place holds an outlier (0 to 1)": plots.image_grid(
            [(label, [found.shares])], label="share of images", cell=2.5
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
