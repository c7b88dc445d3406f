"""Figure 5: its plots, the similarity to the neighbours, the local probes, and the verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from verdicts import above, every, over_folds, specimen

from vitreg_lib.plots.scores import dots
from vitreg_lib.plots.style import PALETTE, PAPER, styled
from vitreg_lib.probes.linear import FOLDS
from vitreg_lib.probes.local import groups, patch_pixels, position_probe, reconstruction_probe

PER_PLACE = 40  # training tokens that the position probe needs for each place
READABLE = 5  # times chance: a position counts as readable from this accuracy on
GROUPS = {"normal": PALETTE[0], "outlier": PALETTE[1], "matched": PALETTE[2], "border": PALETTE[5]}
FITS = {"normal": "trained on normal", "all": "trained on all", "own": "trained on the group"}
REPORTED = {  # Figure 5b, by the names under which a `local_probes` table is measured
    f"{column}, {group} tokens, trained on all": value
    for column, values in {"accuracy": (0.417, 0.228), "distance": (0.79, 5.09), "l2": (18.38, 25.23)}.items()
    for group, value in zip(("normal", "outlier"), values, strict=True)
}


@styled
def densities(values: dict[str, dict[str, torch.Tensor]], label: str, titles: dict[str, str] | None = None) -> Figure:
    """Densities of cosines by group, one panel a model, medians dotted. values: {model: {group: cosines}}.

    The axis is stretched near 1 (by the logarithm of 1 - cosine), since uniform patches have cosines close to 1.
    """
    import pandas as pd
    import seaborn as sns

    marks = (0, 0.5, 0.9, 0.99, 0.999)
    width = 3.0 * len(values) + 0.8
    figure, axes = plt.subplots(1, len(values), figsize=(width, 2.8), squeeze=False, sharey=True)
    edges = np.linspace(_stretched(-0.6), _stretched(0.9995), 41)
    for axis, (name, found) in zip(axes[0], values.items(), strict=True):
        x = {group: _stretched(numbers.double().numpy()).clip(edges[0], edges[-1]) for group, numbers in found.items()}
        table = pd.DataFrame(
            [(group, value) for group, numbers in x.items() for value in numbers], columns=["group", "x"]
        )
        style = dict(bins=edges, stat="percent", common_norm=False, element="step", fill=False, lw=1.5, legend=False)
        sns.histplot(table, x="x", hue="group", palette=GROUPS, hue_order=list(x), ax=axis, **style)
        for group, numbers in x.items():
            axis.axvline(np.median(numbers), color=GROUPS[group], ls=":", lw=1.2)
            axis.plot([], [], color=GROUPS[group], lw=1.5, label=group)
        axis.set_xticks([_stretched(mark) for mark in marks], [f"{mark:g}" for mark in marks])
        axis.set(title=(titles or {}).get(name, name), xlabel=label, ylabel="")
    axes[0, 0].set_ylabel("tokens of the group (%)")
    axes[0, 0].plot([], [], color=PAPER, ls=":", lw=1.2, label="median of the group")
    widest = max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    figure.legend(*widest.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _stretched(cosine):
    return -np.log10(np.maximum(1 - cosine, 1e-6))


@styled
def by_group(tables: dict, columns: dict[str, str], cap: dict[str, float] | None = None, titles=None) -> Figure:
    """Dots of probe scores: one row of panels for each score, one column for each model.

    Groups are along x; each fit has a marker. tables: {model: DataFrame indexed by (group, fit)}; columns: {column of
    the tables: axis label}; cap: the top of a column's axis. Larger values are drawn at the top, with their number.
    """
    styles = dict(zip(FITS, zip((PAPER, PALETTE[4], PALETTE[0]), "soD", strict=True), strict=True))
    size = (2.2 * len(tables) + 1.0, 1.9 * len(columns) + 0.6)
    figure, axes = plt.subplots(len(columns), len(tables), figsize=size, squeeze=False, sharey="row")
    for row, (column, label) in zip(axes, columns.items(), strict=True):
        top = (cap or {}).get(column, np.inf)
        for axis, table in zip(row, tables.values(), strict=True):
            shown = table[column].dropna().rename("value").reset_index().assign(low=np.nan, high=np.nan)
            dots(axis, shown.assign(value=shown.value.clip(upper=top)), "value", "group", "fit", styles)
            places = {group: place for place, group in enumerate(shown.group.unique())}
            for group, part in shown[shown.value > top].groupby("group"):
                text = [f"{v:{',.0f' if v >= 100 else '.3g'}}" for v in part.value]
                place = dict(xytext=(0, 4), textcoords="offset points", ha="center", va="bottom")
                axis.annotate("\n".join(text), (places[group], top), fontsize=7, color=PAPER, **place)
            axis.set(xlim=(-0.6, len(places) - 0.4))
            axis.tick_params(axis="x", labelsize=7)
        highest = max(min(float(table[column].max()), top) for table in tables.values())
        row[0].set(ylim=(0, 1.08 * highest), ylabel=label)
    for axis, name in zip(axes[0], tables, strict=True):
        axis.set_title((titles or {}).get(name, name))
    handles = [axes[0, 0].plot([], [], marker, color=colour, ms=4.5)[0] for colour, marker in styles.values()]
    figure.legend(handles, FITS.values(), loc="outside upper center", ncols=min(3, 1 + len(tables)))
    return figure


def titles(masks: dict[str, Tensor], borrowed: dict[str, str]) -> dict[str, str]:
    """The title of each model's panel: its share of outliers, or the model whose outlier places it is measured at."""
    texts = {name: f"{mask.float().mean():.2%} outliers" for name, mask in masks.items()}
    texts |= {name: f"places of {owner}" for name, owner in borrowed.items()}
    return {name: f"{name}\n{text}" for name, text in texts.items()}


def same_places(masks: dict[str, Tensor]) -> dict[str, str]:
    """{model without outliers: the first model with outliers on a grid of the same size}, for masks by model.

    A model without outliers is a control at the places where the other model has outliers, on the same images.
    """
    own = [name for name, mask in masks.items() if mask.any()]
    lenders = {name: [o for o in own if masks[o].shape == mask.shape] for name, mask in masks.items() if not mask.any()}
    return {name: owners[0] for name, owners in lenders.items() if owners}


def pixels_of(model, images) -> Tensor:
    """(images, patches, values): the pixels of every patch of an `Images` set as the model sees it, from 0 to 255."""
    return patch_pixels(255 * images.pixels, model.anatomy.patch_size)


def local_probes(tokens: Tensor, pixels: Tensor, is_outlier: Tensor, max_tokens: int, seed: int = 0, fold: int = 0):
    """Position and reconstruction probes of `groups`: a DataFrame indexed by (group, fit).

    tokens (images, patches, dim), pixels (images, patches, values). Columns: test (tokens scored), accuracy, distance
    (grid cells), chance, l2 (in the unit of the pixels), relative (l2 over that of the best constant patch).
    """
    return probe_groups(tokens, pixels, is_outlier.shape[1:], groups(is_outlier), max_tokens, seed, fold)


def probe_groups(
    tokens: Tensor, pixels: Tensor, grid, masks: dict[str, Tensor], max_tokens: int, seed: int, fold: int = 0
):
    """The table of `local_probes` for other groups, given as masks (images, patches); `grid` is (rows, cols)."""
    n, patches, _ = tokens.shape
    options = dict(
        groups={name: mask.flatten() for name, mask in masks.items()},
        image_ids=torch.arange(n).repeat_interleave(patches),
        max_tokens=max_tokens,
        seed=seed,
        fold=fold,
    )
    x, places = tokens.flatten(0, 1), torch.arange(patches).repeat(n)
    position = position_probe(x, places, tuple(grid), **options).set_index(["group", "fit"])
    reconstruction = reconstruction_probe(x, pixels.flatten(0, 1), **options).set_index(["group", "fit"])
    return position[["test", "accuracy", "distance", "chance"]].join(reconstruction[["l2", "relative"]])


def probes(tokens: Tensor, pixels: Tensor, is_outlier: Tensor, max_tokens: int, seed: int = 0):
    """`local_probes` on each of five folds of the images: a DataFrame indexed by (group, fit, fold).

    max_tokens: training tokens of a probe; 0: enough for the position probe, `PER_PLACE` for each place.
    """
    import pandas as pd

    most = max_tokens or PER_PLACE * is_outlier[0].numel()
    folds = {fold: local_probes(tokens, pixels, is_outlier, most, seed, fold) for fold in range(FOLDS)}
    return pd.concat(folds, names=["fold"]).reorder_levels(["group", "fit", "fold"])


def over_all(table):
    """The means over the folds of a table of `probes`, indexed by (group, fit); `test` is their sum."""
    means = table.groupby(level=["group", "fit"], sort=False).mean()
    return means.assign(test=table.test.groupby(level=["group", "fit"], sort=False).sum())


def ratios(table, group: str = "outlier", to: str = "matched", fit: str = "own"):
    """Scores of `group` divided by those of `to`, in each fold of a table of `probes`; NaN if the latter is 0.

    Columns: accuracy, distance, l2, relative. Half a cell is added to both distances, so that a probe without errors
    does not lead to a division by 0.
    """
    columns = ["accuracy", "distance", "l2", "relative"]
    one, other = (table.xs((name, fit), level=("group", "fit"))[columns].copy() for name in (group, to))
    one["distance"], other["distance"] = one["distance"] + 0.5, other["distance"] + 0.5
    return one / other.where(other > 0)


def verdicts(table, alike) -> dict[str, tuple[bool | str | None, str]]:
    """{"auc", "accuracy", "distance", "l2": (does the paper's claim hold, the measured text)} for one model.

    table: of `probes`; alike: of `likeness`. Outliers are compared with matched tokens, each with its own fit, by
    intervals over images. The claims hold for an AUC above 0.5, and for ratios of accuracy below 0.8, of distance above
    2 and of L2 above 1.1. Accuracy and distance are None if normal tokens are right less than five times as often as by
    chance.
    """
    fair, paper, mean = ratios(table), ratios(table, to="normal", fit="all").mean(), over_all(table)
    right, chance = mean.loc[("normal", "own"), ["accuracy", "chance"]]
    blind = right < READABLE * chance
    result, limits = {}, {"accuracy": (0.8, -1), "distance": (2, 1), "l2": (1.1, 1)}
    for key, (limit, sign) in limits.items():
        value, low, high = over_folds(fair[key])
        holds = above(*sorted((sign * low, sign * high)), sign * limit)
        text = f"outlier / matched {value:.2f} ({low:.2f} to {high:.2f}), as the paper compares {paper[key]:.2f}; "
        text += f"{mean.test['outlier', 'own']:.0f} outliers scored"
        if blind and key != "l2":
            holds, text = None, f"{text}; not readable: normal tokens {right:.1%} right, {chance:.1%} by chance"
        result[key] = (holds, text)
    said = {}
    for key in ("auc_matched", "auc"):
        low, high = alike[f"{key}_low"], alike[f"{key}_high"]
        said[key] = above(low, high, 0.5), f"{alike[key]:.2f} ({low:.2f} to {high:.2f})"
    words = {True: "the claim would hold", False: "it would fail", "undecided": "it would be undecided"}
    text = f"AUC against matched tokens {said['auc_matched'][1]}; as the paper compares, against normal tokens, "
    text += f"{said['auc'][1]}: {words[said['auc'][0]]}"
    return result | {"auc": (said["auc_matched"][0], text)}


def claims(models, masks: dict[str, Tensor], borrowed: dict[str, str], tables: dict, alike):
    """Yields the arguments of `Run.claim`: C016 to C019 on the first trained model with artifacts, then ours.

    Dictionaries by model label: masks of outliers; borrowed, their `same_places`; tables of `probes`. alike:
    `likeness`, one row a model.
    """
    judged = {name: verdicts(table, alike.loc[name]) for name, table in tables.items()}
    first = specimen(models, {name for name, mask in masks.items() if mask.any()})
    for claim, key in {"C016": "auc", "C017": "accuracy", "C018": "distance", "C019": "l2"}.items():
        holds, text = judged[first.label][key] if first else (None, "no trained model here has outliers")
        yield claim, holds, f"{first.label}: {text}" if first else text
    texts = {
        "trained": "has no outliers; its tokens know their patch where {} has them",
        "random control": "fresh weights know no less where {} has outliers",
        "mended": "with the outliers of {} moved to added registers, the tokens at their places know their patch again",
        "planted control": "its outliers know less of place and pixels than matched tokens, as planted",
    }
    for model in (m for m in models if m.label in borrowed or (m.is_control and masks[m.label].any())):
        name, keys = model.label, ("accuracy", "distance", "l2")
        worse = [judged[name][key][0] for key in keys]
        asked = [not w if isinstance(w, bool) else w for w in worse] if name in borrowed else worse
        spans = {key: over_folds(ratios(tables[name])[key]) for key in keys}
        text = "; ".join(f"{key} {value:.2f} ({low:.2f} to {high:.2f})" for key, (value, low, high) in spans.items())
        blind = " (position is not readable here)" if None in worse else ""
        claim = f"{name}: " + texts[model.role].format(borrowed.get(name, name))
        yield f"control-{name}", every(asked), f"outlier places / matched: {text}{blind}", claim, "none"


def likeness(similarity: Tensor, is_outlier: Tensor, draws: int = 500, seed: int = 0) -> dict[str, float]:
    """How the similarity to the neighbours differs between outliers and other tokens, with intervals over images.

    similarity (images, patches): `maps.neighbour_similarity` of the patch embedding. Keys: median_GROUP for each of
    `groups`; auc and auc_matched, the probability that an outlier is more similar to its neighbours than a normal or a
    matched token is (ties count half). Each comes with _low and _high, the middle 95 % of a bootstrap that draws whole
    images. Without outliers, all values are NaN except the medians of groups with tokens.
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
    """(draws,) weighted probability that a value of `a` exceeds one of `b`, ties half; NaN if a side has no weight."""
    if not len(a) or not len(b):
        return torch.full((len(weight_a),), torch.nan).double()
    order = b.argsort()
    b, below = b[order].contiguous(), torch.nn.functional.pad(weight_b[:, order].cumsum(1), (1, 0))
    a = a.contiguous()
    rank = (below[:, torch.searchsorted(b, a)] + below[:, torch.searchsorted(b, a, right=True)]) / 2
    return (weight_a * rank).sum(1) / (weight_a.sum(1) * below[:, -1])
