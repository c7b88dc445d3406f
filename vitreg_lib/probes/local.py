"""What local information an outlier token holds, against a control that is fair to it (Fig. 5, Table 5).

The paper compares outliers with all normal tokens. Where outliers sit at fixed places or on plain patches, that
compares places and contents. `matched_normal` therefore gives every outlier a partner: the nearest normal token of the
same image. `local_probes` scores both groups, all normal tokens and the border by the three fits of `probes.position`.
Masks are (images, rows, cols) bool; tokens, pixels and similarities (images, patches, …) without prefix tokens.
"""

import torch
from torch import Tensor

from .. import outliers
from .position import position_probe
from .reconstruction import patch_pixels, reconstruction_probe

READABLE = 5  # times chance: from there on a position counts as read
REPORTED = {  # Figure 5b, by the names under which a `local_probes` table is measured
    f"{column}, {group} tokens, trained on all": value
    for column, values in {"accuracy": (0.417, 0.228), "distance": (0.79, 5.09), "l2": (18.38, 25.23)}.items()
    for group, value in zip(("normal", "outlier"), values, strict=True)
}


def matched_normal(is_outlier: Tensor) -> Tensor:
    """Mask (images, rows, cols) of the partners: for each outlier the nearest normal token of its image.

    Among equally near ones first the one as far from the border as the outlier is, then the first by rows. A token that
    is nearest to two outliers is marked once. An image of outliers alone has no partner.
    """
    images, rows, cols = is_outlier.shape
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    row, col = row.flatten(), col.flatten()
    depth = torch.stack([row, col, rows - 1 - row, cols - 1 - col]).amin(0)  # steps from the border
    squared = (row[:, None] - row).square() + (col[:, None] - col).square()
    # one sortable number: distance, then difference of depth, then index
    cost = (squared * rows * cols + (depth[:, None] - depth).abs()) * rows * cols + torch.arange(rows * cols)
    flat = is_outlier.flatten(1).cpu()
    image, place = flat.nonzero().unbind(1)
    blocked = cost[place].masked_fill(flat[image], torch.iinfo(torch.long).max)
    partner = blocked.argmin(1)
    found = ~flat[image, partner]
    matched = torch.zeros_like(flat)
    matched[image[found], partner[found]] = True
    return matched.view(images, rows, cols).to(is_outlier.device)


def same_places(masks: dict[str, Tensor]) -> dict[str, str]:
    """{model without outliers: the first model with outliers on a grid of the same size}, for masks by model.

    A model without outliers is a control at the places where another has them, on the same images.
    """
    own = [name for name, mask in masks.items() if mask.any()]
    lenders = {name: [o for o in own if masks[o].shape == mask.shape] for name, mask in masks.items() if not mask.any()}
    return {name: found[0] for name, found in lenders.items() if found}


def titles(masks: dict[str, Tensor], borrowed: dict[str, str]) -> dict[str, str]:
    """What to write above a model's panel: its share of outliers, or whose places it is looked at in."""
    told = {name: f"{mask.float().mean():.2%} outliers" for name, mask in masks.items()}
    told |= {name: f"places of {owner}" for name, owner in borrowed.items()}
    return {name: f"{name}\n{text}" for name, text in told.items()}


def pixels_of(model, images) -> Tensor:
    """(images, patches, values): the pixels of every patch of an `Images` set as the model sees it, from 0 to 255."""
    return patch_pixels(255 * images.pixels, model.anatomy.patch_size[0])


def groups(is_outlier: Tensor) -> dict[str, Tensor]:
    """Masks (images, patches) of "normal", "outlier", "matched" (`matched_normal`) and "border" (normal ones)."""
    border = torch.ones_like(is_outlier)
    border[:, 1:-1, 1:-1] = False
    masks = {
        "normal": ~is_outlier,
        "outlier": is_outlier,
        "matched": matched_normal(is_outlier),
        "border": border & ~is_outlier,
    }
    return {name: mask.flatten(1) for name, mask in masks.items()}


def local_probes(tokens: Tensor, pixels: Tensor, is_outlier: Tensor, max_tokens: int = 6000, seed: int = 0):
    """Position and reconstruction probes of `groups`: a DataFrame indexed by (group, fit).

    tokens (images, patches, dim), pixels (images, patches, values). Columns: test (tokens scored), accuracy, distance
    (grid cells), chance, l2 (in the unit of the pixels), relative (l2 over that of the best constant patch).
    """
    return _both_probes(tokens, pixels, is_outlier.shape[1:], groups(is_outlier), max_tokens, seed)


def _both_probes(tokens: Tensor, pixels: Tensor, grid, masks: dict[str, Tensor], max_tokens: int, seed: int):
    """The table of `local_probes` for groups given as masks (images, patches)."""
    n, patches, _ = tokens.shape
    options = dict(
        groups={name: mask.flatten() for name, mask in masks.items()},
        image_ids=torch.arange(n).repeat_interleave(patches),
        max_tokens=max_tokens,
        seed=seed,
    )
    x, places = tokens.flatten(0, 1), torch.arange(patches).repeat(n)
    found = position_probe(x, places, tuple(grid), **options).set_index(["group", "fit"])
    drawn = reconstruction_probe(x, pixels.flatten(0, 1), **options).set_index(["group", "fit"])
    return found[["test", "accuracy", "distance", "chance"]].join(drawn[["l2", "relative"]])


def across_registers(
    tokens: dict[str, Tensor], pixels: dict[str, Tensor], masks: dict[str, Tensor], seeds=(0, 1, 2), max_tokens=3000
):
    """Local probes of models without and with registers on the same images (Table 5): (model, group, fit, seed).

    By name: tokens (images, patches, dim), pixels (images, patches, values), outlier masks (images, rows, cols).
    Groups: "normal", the model's own non-outliers, as the paper compares them; "shared", the tokens at places where no
    model of its family (NAME, NAME-regN, NAME+ttrN) has an outlier, so that both are asked about the same patches;
    "places", those at the places where one has. A family without outliers borrows places by `same_places`, for that
    last group alone. Columns as `local_probes`; a seed splits the images and draws the tokens.
    """
    import pandas as pd

    family = {name: outliers.without_registers(name) for name in tokens}
    union = {name: torch.stack([masks[o] for o in masks if family[o] == family[name]]).any(0) for name in tokens}
    borrowed = same_places(union)
    rows = {}
    for name, x in tokens.items():
        parts = {"normal": ~masks[name], "shared": ~union[name]}
        if (places := union[borrowed.get(name, name)]).any():
            parts["places"] = places
        for seed in seeds:
            rows[name, seed] = _both_probes(x, pixels[name], masks[name].shape[1:], parts, max_tokens, seed)
    return pd.concat(rows, names=["model", "seed"]).reorder_levels(["model", "group", "fit", "seed"])


def register_changes(table, group: str = "shared", fit: str = "own"):
    """What registers change in one group of an `across_registers` table: a DataFrame, one row a model with registers.

    right: the smaller of the two accuracies; readable: whether it is at least five times chance, without which equal
    positions mean nothing. points: accuracy with registers less that without, in points; cells: the same of the
    distance; l2_ratio: error with over error without. Means over seeds, paired by seed, and standard deviations (_sd).
    """
    import pandas as pd

    part, rows = table.xs((group, fit), level=("group", "fit")), {}
    for name, base in outliers.pairs(list(part.index.unique("model"))).items():
        one, other = part.loc[name], part.loc[base]
        change = {
            "points": 100 * (one.accuracy - other.accuracy),
            "cells": one.distance - other.distance,
            "l2_ratio": one.l2 / other.l2,
        }
        known = min(one.accuracy.mean(), other.accuracy.mean())
        rows[name] = {"without": base, "right": known, "readable": bool(known >= READABLE * other.chance.mean())} | {
            k: v for c, x in change.items() for k, v in ((c, x.mean()), (f"{c}_sd", x.std()))
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def ratios(table, group: str = "outlier", to: str = "matched"):
    """`group` over `to` for each fit of a `local_probes` table: accuracy, distance, l2, relative; NaN over nothing.

    The distance has half a cell added to both, so that a probe that never errs does not divide by 0.
    """
    columns = ["accuracy", "distance", "l2", "relative"]
    one, other = (table.xs(name, level="group")[columns].copy() for name in (group, to))
    one["distance"], other["distance"] = one["distance"] + 0.5, other["distance"] + 0.5
    return one / other.where(other > 0)


def verdicts(table, alike) -> dict[str, tuple[bool | None, str]]:
    """{"auc", "accuracy", "distance", "l2": (is it as the paper claims of outliers, what was measured)}.

    table of `local_probes` and numbers of `likeness`, of one model. Judged on outlier against matched tokens, each with
    its own fit: the interval of the AUC above one half, accuracy below 0.8, distance above 2, L2 above 1.1 times. None
    for accuracy and distance where normal tokens are right less than five times as often as by chance.
    """
    fair, paper = ratios(table).loc["own"], ratios(table, to="normal").loc["all"]
    right, chance = table.loc[("normal", "own"), ["accuracy", "chance"]]
    blind = (
        f"; not readable: normal tokens {right:.1%} right, {chance:.1%} by chance" if right < READABLE * chance else ""
    )
    found = {"accuracy": fair.accuracy < 0.8, "distance": fair.distance > 2, "l2": fair.l2 > 1.1}
    told = {
        key: f"outlier / matched {fair[key]:.2f}, as the paper compares {paper[key]:.2f}; "
        f"{table.test['outlier', 'own']:.0f} outliers scored" + (blind if key != "l2" else "")
        for key in found
    }
    result = {key: (None if blind and key != "l2" else bool(holds), told[key]) for key, holds in found.items()}
    areas = [f"{alike[k]:.2f} ({alike[k + '_low']:.2f} to {alike[k + '_high']:.2f})" for k in ("auc", "auc_matched")]
    return result | {"auc": (bool(alike["auc_matched_low"] > 0.5), f"AUC {areas[0]}, against matched {areas[1]}")}


def claims(models, masks: dict[str, Tensor], borrowed: dict[str, str], tables: dict, alike):
    """Arguments of `Run.claim` one after the other: C016 to C019 on the first model, then ours on the controls.

    By label: outlier masks, `same_places` of them, `local_probes` tables; alike: `likeness`, one row a model.
    """
    judged = {name: verdicts(table, alike.loc[name]) for name, table in tables.items()}
    first = models[0].label
    for claim, key in {"C016": "auc", "C017": "accuracy", "C018": "distance", "C019": "l2"}.items():
        holds, told = judged[first][key] if masks[first].any() else (None, "no outliers")
        yield claim, holds, f"{first}: {told}"
    texts = {
        "trained": "has no outliers; its tokens know their patch where {} has them",
        "random control": "fresh weights know no less where {} has outliers",
        "mended": "with the outliers of {} moved to added registers, the tokens at their places know their patch again",
        "planted control": "its outliers know less of place and pixels than matched tokens, as planted",
    }
    for model in (m for m in models if m.label in borrowed or (m.is_control and masks[m.label].any())):
        name = model.label
        keys = ("accuracy", "distance", "l2")
        worse = [judged[name][key][0] for key in keys]
        told = "; ".join(f"{key} {ratios(tables[name]).loc['own', key]:.2f}" for key in keys)
        blind = " (position is not readable here)" if None in worse else ""
        holds = not any(worse) if name in borrowed else all(worse)
        text = f"ours: {name}: " + texts[model.role].format(borrowed.get(name, name))
        yield f"control-{name}", holds, f"outlier places / matched: {told}{blind}", text, "none"


def likeness(similarity: Tensor, is_outlier: Tensor, draws: int = 500, seed: int = 0) -> dict[str, float]:
    """How outliers' similarity to their neighbours differs from that of others, with intervals over images.

    similarity (images, patches), as `maps.neighbour_similarity` of the patch embedding. Keys: median_GROUP for each of
    `groups`; auc and auc_matched, the chance that an outlier is more similar than a normal, or than a matched token
    (ties count half), each with _low and _high, the middle 95 % of a bootstrap that draws whole images. Without
    outliers all but the medians of the groups that exist are NaN.
    """
    similarity, masks = similarity.cpu(), groups(is_outlier.cpu())
    result = {f"median_{k}": similarity[m].median().item() if m.any() else float("nan") for k, m in masks.items()}
    images = torch.arange(len(similarity))[:, None].expand_as(similarity)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(similarity), (draws, len(similarity)), generator=generator)
    weights = torch.stack([row.bincount(minlength=len(similarity)) for row in drawn]).double()
    weights = torch.cat([torch.ones(1, len(similarity)).double(), weights])  # the first row is the sample itself
    for key, other in (("auc", "normal"), ("auc_matched", "matched")):
        a, b = masks["outlier"], masks[other]
        values = _auc(similarity[a], similarity[b], weights[:, images[a]], weights[:, images[b]])
        low, high = torch.nanquantile(values[1:], torch.tensor([0.025, 0.975]).double()).tolist()
        result |= {key: values[0].item(), f"{key}_low": low, f"{key}_high": high}
    return result


def _auc(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor) -> Tensor:
    """(draws,) weighted chance that a value of `a` exceeds one of `b`, ties half; NaN where one side weighs nothing."""
    if not len(a) or not len(b):
        return torch.full((len(weight_a),), torch.nan).double()
    order = b.argsort()
    b, below = b[order].contiguous(), torch.nn.functional.pad(weight_b[:, order].cumsum(1), (1, 0))
    a = a.contiguous()
    rank = (below[:, torch.searchsorted(b, a)] + below[:, torch.searchsorted(b, a, right=True)]) / 2
    return (weight_a * rank).sum(1) / (weight_a.sum(1) * below[:, -1])
