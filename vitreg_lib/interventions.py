"""What moving neurons to registers does to a model, by dose and against controls (notebook beyond/test_time_registers).

Measures are of the same images before and after, so differences are paired; places of outliers are those of the
untouched model.
"""

from __future__ import annotations

import torch

from . import lost, maps, mend


def experiment(model, images, found: mend.Found, counts=(0, 1, 2, 4, 8), labels=None, seed: int = 0, more: int = 2):
    """(DataFrame by dose and kind of neurons, {measure: value} of the untouched model).

    Kinds: "found", the neurons of `found`; "found + N next", with the next `more` candidates of its ranking; "random",
    as many others as the first, of equal mean activation. Columns: those of `measure`, and newly_wrong and newly_right,
    how many images lose or gain a right answer.
    """
    import pandas as pd

    seen = model.capture(images, "norms", layers=found.layer)
    is_outlier = seen.patch_norms[:, 0] > found.cutoff
    before, right = measure(model, images, is_outlier, found, labels)
    ranked = list(zip(found.table.block, found.table.neuron, strict=True))
    kinds = {"found": found.neurons}
    if more and len(ranked) > len(found.neurons):
        kinds[f"found + {more} next"] = tuple(ranked[: len(found.neurons) + more])
    kinds["random"] = mend.random_neurons(model, found.neurons, images, seed)
    rows = []
    for kind, neurons in kinds.items():
        for count in counts:
            mended = mend.with_test_time_registers(model, count, neurons)
            after, now = measure(mended, images, is_outlier, found, labels)
            if right is not None:
                after |= {"newly_wrong": int((right & ~now).sum()), "newly_right": int((now & ~right).sum())}
            rows.append({"kind": kind, "registers": count} | after)
    return pd.DataFrame(rows), before


def measure(model, images, is_outlier: torch.Tensor, found: mend.Found, labels=None):
    """({measure: value}, which images are classified right or None).

    outlier_share: patch tokens above the untouched model's cutoff. largest_patch_norm. register_norm: mean of the
    registers, NaN without. attention_on_outliers: cls in the last block, share of its attention on the *places* of the
    untouched model's outliers, NaN without cls. accuracy and cross_entropy where labels are known; on scenes those of
    the main object's colour, which the mini ViTs learn best. corloc: LOST on the last block's keys, L2-normalised, on
    scenes (the published rule: IoU of 0.5 with any object).
    """
    layers = sorted({found.layer, model.anatomy.depth - 1})
    seen = model.capture(images, ("norms", "attention", "k"), layers=layers, queries=[0])
    at = seen.layers.index(found.layer)
    of_cls = seen.patches(seen.attention[layers[-1]][:, :, 0].mean(1))
    on_outliers = maps.attention_on(of_cls, is_outlier, seen.grid, renormalise=False).mean().item()
    result = {
        "outlier_share": (seen.patch_norms[:, at] > found.cutoff).float().mean().item(),
        "largest_patch_norm": seen.patch_norms[:, at].max().item(),
        "register_norm": seen.register_norms[:, at].mean().item() if seen.num_registers else float("nan"),
        "attention_on_outliers": on_outliers if seen.has_cls else float("nan"),
    }
    if images.scenes is not None:
        result["corloc"] = _corloc(seen, images, layers[-1])
    if labels is None:
        return result, None
    with torch.no_grad():
        logits = torch.cat([model.module(x.to(model.weights)).float().cpu() for x in images.x.split(32)])
    if images.scenes is not None:  # mini ViTs have 24 outputs: 8 shapes, 8 colours, 4 textures, 4 backgrounds
        logits, labels = logits[:, 8:16], images.scenes.colour[:, 0]
    right = logits.argmax(1) == labels
    result["accuracy"] = right.float().mean().item()
    result["cross_entropy"] = torch.nn.functional.cross_entropy(logits, labels).item()
    return result, right


def _corloc(seen, images, layer: int) -> float:
    found = lost.lost(lost.features(seen, "k", layer), seen.grid, normalize=True)
    boxes = lost.to_pixels(found.boxes, images.x.shape[-1] // seen.grid[1])
    return lost.corloc(boxes, images.scenes.visible_boxes).value
