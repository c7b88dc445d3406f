"""What the score of object discovery depends on: LOST in all its settings, and each deviation of its published code.

The paper states neither the bias of Table 3 nor the layer or the normalisation, and its numbers could not be
reproduced. So `grid` runs LOST for every layer, kind of features, normalisation and bias. `honest_best` chooses a
setting on one half of the images and scores it on the other. `code_differences` measures each deviation of the
published code from the equations of LOST's paper separately. Scores are CorLoc, 0 to 1; hits are (images,) bool.
"""

from __future__ import annotations

import itertools
import math

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from vitreg_lib.measure import detection, pairs
from vitreg_lib.measure import objects as L
from vitreg_lib.plots.maps import wrapped
from vitreg_lib.plots.style import styled

FACTORS = ("layer", "site", "normalised", "bias")


def grid(
    model,
    images,
    truth: list[Tensor],
    layers: tuple[int, ...] = (-4, -3, -2, -1),
    sites: str = "qkv",
    biases: tuple[float, ...] = (0.0, -0.25, -0.5, -0.75),
    normalised: tuple[bool, ...] = (True, False),
    valid: Tensor | None = None,
    progress: bool = False,
):
    """(DataFrame, hits): LOST of a `zoo.Model` for every setting.

    truth: boxes in pixels; layers: from 0, or negative from the end; valid (images, patches): patches that are used.
    The index is `FACTORS` (layer from 0); columns corloc, those of `Lost.shares`, low and high (the middle 95 % of a
    bootstrap of corloc over images). hits: {setting: (images,) bool}. Features that are not normalised are divided by
    the root mean square of their norms in the image, so that a bias has the same meaning; at bias 0 this has no effect.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    seen = model.capture(images, tuple(sites), layers=list(layers))
    size = model.anatomy.patch_size
    rows, hits = {}, {}
    pairs = list(itertools.product(seen.layers, sites))
    for layer, site in tqdm(pairs, desc=model.label, disable=not progress, leave=False):
        x = L.features(seen, site, layer).float()
        x = x / x.square().sum(-1).mean(1).sqrt()[:, None, None].clamp_min(1e-12)
        for unit, bias in itertools.product(normalised, biases):
            result = L.lost(x, seen.grid, bias=bias, normalize=unit, valid=valid)
            key = (layer, site, unit, bias)
            hits[key] = L.box_hits(L.in_pixels(result.boxes, size), truth)
            rows[key] = {"corloc": hits[key].double().mean().item()} | result.shares(seen.grid)
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=FACTORS)
    ends = pd.DataFrame([interval(found, 500) for found in hits.values()], index=table.index)[["low", "high"]]
    return table.join(ends), hits


def conditions(model, images) -> dict[str, Tensor | None]:
    """{condition: patches (images, patches) that LOST uses}: all (None); with artifacts also the non-outliers."""
    found = detection.detect(model, images)
    masked = {f"{model.label}, masked": ~found.outliers.mask.flatten(1)} if found.has_artifacts else {}
    return {model.label: None} | masked


def effects(table):
    """Mean CorLoc at every level of every factor of a `grid`: a DataFrame (factor, level) with corloc and spread.

    spread: the largest minus the smallest mean over the levels of a factor; it says how much this choice matters.
    """
    import pandas as pd

    means = {name: table.corloc.groupby(level=name).mean() for name in FACTORS}
    rows = {
        (name, str(level)): {"corloc": value, "spread": by.max() - by.min()}
        for name, by in means.items()
        for level, value in by.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index=["factor", "level"])


def honest_best(hits: dict[tuple, Tensor], seed: int = 0) -> tuple[Tensor, list[tuple]]:
    """(hits (images,), the two settings): each half of the images is scored with the setting chosen on the other half.

    `seed` splits the images in halves. The chosen setting has the most hits in its half (the first of a tie). If the
    best setting of a whole grid were scored on the images that chose it, its score would be too high.
    """
    settings = list(hits)
    table = torch.stack([hits[s] for s in settings])
    if table.shape[1] < 2:
        raise ValueError("one image cannot be halved: at least two are needed")
    order = torch.randperm(table.shape[1], generator=torch.Generator().manual_seed(seed))
    halves = order.chunk(2)
    scored, chosen = torch.zeros(table.shape[1], dtype=torch.bool), []
    for here, there in (halves, halves[::-1]):
        best = int(table[:, here].sum(1).argmax())
        scored[there] = table[best, there]
        chosen.append(settings[best])
    return scored, chosen


def free_boxes(images, truth: list[Tensor]) -> dict[str, Tensor]:
    """Hits (images,) of boxes that ignore the content: the whole image, and a centred box of half its area."""
    sizes = torch.tensor([images.x.shape[-2:]] * len(images.x))
    boxes = {"whole image": L.centred_boxes(sizes, 1.0), "centred box, half the area": L.centred_boxes(sizes)}
    return {name: L.box_hits(guess, truth) for name, guess in boxes.items()}


def scores(hits: dict[str, dict[tuple, Tensor]], cut: dict[str, Tensor], seed: int = 0):
    """CorLoc with its interval, of `honest_best` for every model and of TokenCut: a DataFrame by (model, method)."""
    import pandas as pd

    rows = {(name, "LOST, chosen on other images"): interval(honest_best(h, seed)[0]) for name, h in hits.items()}
    rows |= {(name, "TokenCut"): interval(found) for name, found in cut.items()}
    return pd.DataFrame(rows).T


def measure(run, tables: dict, scores, choices, baselines: dict[str, float]) -> None:
    """Put `scores`, `choices`, every setting of the tables of `grid` and the baselines (%) into the run's record."""
    run.measure_table(scores["value"].unstack()[scores.index.unique(1)].add_prefix("corloc, "))
    run.measure_table(choices.add_prefix("points moved, or share in percent: "))
    for name, table in tables.items():
        for setting, row in table.iterrows():
            run.measure(f"corloc ({row.low:.2f} to {row.high:.2f}), {in_words([setting])}", row.corloc, name)
    for name, value in baselines.items():
        run.measure(f"corloc, {name}", value / 100)


def along_bias(table, site: str):
    """CorLoc and its conditions by the bias, in percent, for one kind of L2-normalised features of the last block."""
    part = table.xs((site, True), level=("site", "normalised"))
    part = part.xs(part.index.unique("layer")[-1], level="layer")[list(L.IN_WORDS)]
    return 100 * part.rename(columns=L.IN_WORDS, index=lambda bias: f"bias {bias:g}")


def in_words(settings: list[tuple]) -> str:
    """Settings of a `grid` in words."""
    return "; ".join(
        f"block {layer}, {site}, {'length 1' if unit else 'lengths kept'}, bias {bias:g}"
        for layer, site, unit, bias in dict.fromkeys(settings)
    )


def choices(tables: dict):
    """How much each choice changes the mean CorLoc of a grid, in points: a DataFrame, one row a model.

    One column a factor; two more are the means over all settings of positive_share and tied_share, in percent.
    """
    import pandas as pd

    rows = {}
    for name, table in tables.items():
        rows[name] = (100 * effects(table).spread.groupby(level="factor", sort=False).first()).to_dict()
        rows[name] |= {column: 100 * table[column].mean() for column in ("positive_share", "tied_share")}
    return pd.DataFrame.from_dict(rows, orient="index")


def interval(hits: Tensor, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """value, low and high: a share of images and the middle 95 % of a bootstrap over them."""
    low, high = pairs.interval(hits, draws, seed)
    return {"value": hits.double().mean().item(), "low": low, "high": high}


def tokencut(model, images, truth: list[Tensor]) -> tuple[Tensor, float]:
    """(hits (images,), tied share) of TokenCut on the keys of a `zoo.Model`'s last block, as published.

    Tied share: the share of images in which several patches have the largest |v|, so that the seed is arbitrary.
    """
    seen = model.capture(images, "k", layers=-1)
    boxes, _, ties = cut(L.features(seen, "k"), seen.grid)
    hits = L.box_hits(L.in_pixels(boxes, model.anatomy.patch_size), truth)
    return hits, (ties > 1).double().mean().item()


def cut(features: Tensor, grid: tuple[int, int], tau: float = 0.2, eps: float = 1e-5):
    """(boxes (batch, 4), second eigenvectors (batch, rows, cols), ties (batch,)) of TokenCut (Wang et al. 2022).

    Edges are 1 if the cosine is above `tau`, else `eps`. The second eigenvector of (D - A) v = lambda D v is split at
    its mean. The side with the largest |v| is the object (its sign becomes positive); the connected component of that
    patch gives the box. ties: how many patches have the largest |v|, up to a relative difference of a millionth; above
    1 the choice among them is arbitrary.
    """
    rows, cols = grid
    boxes, vectors, ties = [], [], []
    for f in normalize(features.float(), dim=-1):
        v = _second_eigenvector(torch.where(f @ f.T > tau, 1.0, eps).double()).to(f.dtype)
        peak = v.abs().argmax()
        ties.append((v.abs() >= (1 - 1e-6) * v.abs().max()).sum())
        side = v > v.mean()
        if not side[peak]:
            v, side = -v, ~side
        joined = L.component(side.reshape(1, rows, cols), peak[None])
        boxes.append(L.mask_boxes(joined))
        vectors.append(v.reshape(1, rows, cols))
    return torch.cat(boxes), torch.cat(vectors), torch.stack(ties)


def _second_eigenvector(weights: Tensor) -> Tensor:
    """Second eigenvector of (D - W) v = lambda D v, by the symmetric form; the CPU computes only this vector."""
    scale = weights.sum(1).rsqrt()
    laplacian = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    laplacian -= scale[:, None] * weights * scale
    if weights.device.type == "cpu":
        from scipy.linalg import eigh

        vector = torch.from_numpy(eigh(laplacian.numpy(), subset_by_index=[1, 1])[1][:, 0])
    else:
        vector = torch.linalg.eigh(laplacian)[1][:, 1]
    return vector * scale


def as_published(model, images, truth: list[Tensor]):
    """`code_differences` on the last block's features that the paper uses for a `zoo.Model`, not normalised."""
    site = L.paper_site(model)
    seen = model.capture(images, site, layers=-1)
    return code_differences(L.features(seen, site), seen.grid, truth, model.anatomy.patch_size)


def code_differences(features: Tensor, shape: tuple[int, int], truth: list[Tensor], patch_size, **options):
    """Each difference between LOST's published code and its paper's equations, with its effect: a DataFrame.

    features (images, patches, dim) on a grid of `shape`; options (bias, normalize) go to `lost`. One row a difference:
    each of `objects.CODE_DIFFERENCES`; the reversed rule for ties (the sort of the code is unstable, so ties can have
    any order); all of these together; and "stop": images whose mask misses the seed have no box (the code raises an
    error). Columns: what, corloc, effect (points), low, high (paired bootstrap), boxes_changed (share of images).
    """
    import pandas as pd

    base = L.lost(features, shape, **options)
    hits = L.box_hits(L.in_pixels(base.boxes, patch_size), truth)
    changes = {name: (text, {"variant": (name,)}) for name, text in L.CODE_DIFFERENCES.items()}
    changes["ties"] = ("equals of lowest degree: the last instead of the first (the code's order is undefined)",)
    changes["ties"] += ({"ties": "highest"},)
    changes["all"] = ("all of these together", {"variant": "code", "ties": "highest"})
    rows = {"equations": {"what": "as in the paper, first of equals", "corloc": hits.double().mean().item()}}
    rows["equations"] |= {"effect": 0.0, "low": 0.0, "high": 0.0, "boxes_changed": 0.0}
    for name, (text, change) in changes.items():
        result = L.lost(features, shape, **options, **change)
        rows[name] = _effect(text, hits, L.box_hits(L.in_pixels(result.boxes, patch_size), truth))
        rows[name]["boxes_changed"] = (result.boxes != base.boxes).any(1).double().mean().item()
    stopped = ~base.seed_in_mask
    rows["stop"] = _effect("no box where the mask misses the seed (the code raises an error)", hits, hits & ~stopped)
    rows["stop"]["boxes_changed"] = stopped.double().mean().item()
    return pd.DataFrame.from_dict(rows, orient="index")


def claims(hits: dict, baseline: tuple[str, Tensor], models, choices, faults, seed: int = 0):
    """Yields the arguments of `Run.claim`, all ours.

    hits: those of `grid`, by model or condition; `seed` splits the images for the choice of a setting. baseline: (name,
    hits) of the best one. models: random controls only serve as baselines. choices: of `choices`. faults: the tables of
    `code_differences` by model, concatenated. A model with registers is compared with the same model without; a model
    with masked outliers with the same model unmasked.
    """
    controls = [model.label for model in models if model.role == "random control"]
    base_of = pairs.pairs(models)
    base_of |= {name: model.label for model in models if (name := f"{model.label}, masked") in hits}
    best = {name: honest_best(found, seed) for name, found in hits.items()}
    free, costs_nothing = baseline
    for name, (found, chosen) in best.items():
        if name not in controls:
            g, low, high = L.gain(costs_nothing, found)
            measured = f"{g:+.0f} points ({low:+.0f} to {high:+.0f}) to {free}; chosen: {in_words(chosen)}"
            text = f"LOST on {name} beats the best baseline with a setting chosen on other images"
            yield f"beats-baseline-{name}", _above(low, high), measured, text, "none"
    for name, base in base_of.items():
        change = compare(hits[base], hits[name])
        g, low, high = L.gain(best[base][0], best[name][0])
        measured = (
            f"best against best {g:+.0f} points ({low:+.0f} to {high:+.0f}); over all settings median "
            f"{change['median']:+.0f}, from {change['worst']:+.0f} to {change['best']:+.0f}, better in "
            f"{change['better']:.0%}"
        )
        text = f"{name} finds more objects than {base}, each at its best setting"
        yield (
            f"gain-{name}",
            _above(low, high),
            measured,
            text,
            "+14 to +20 for DeiT-III and DINOv2, -2 to -3 for OpenCLIP",
        )
    widest = choices[list(FACTORS)].max().sort_values()
    yield (
        "choices",
        bool(widest.max() > 14),
        ", ".join(f"{factor} {points:.0f}" for factor, points in widest.items())
        + " points at most between the means of its levels",
        "a choice that the paper leaves open moves CorLoc by more than the least gain that it reports for "
        "DeiT-III and DINOv2 (14 points)",
        "none",
    )
    faults = faults.drop(index="equations", level=1)
    moved, least, most = faults.effect.abs(), faults.low.min(), faults.high.max()
    beyond = ((faults.low > 5) | (faults.high < -5)).any()  # an interval that lies outside of 5 points
    yield (
        "code",
        False if beyond else -5 < least and most < 5 or "undecided",
        f"at most {moved.max():.0f} points ({moved.idxmax()[1]}, {moved.idxmax()[0]}); intervals from {least:+.0f} to "
        f"{most:+.0f} points",
        "no difference between LOST's code and its equations moves CorLoc by 5 points",
        "none",
    )


def _above(low: float, high: float) -> bool | str:
    return True if low > 0 else False if high < 0 else "undecided"


def _effect(text: str, without: Tensor, hits: Tensor) -> dict:
    effect, low, high = L.gain(without, hits)
    return {"what": text, "corloc": hits.double().mean().item(), "effect": effect, "low": low, "high": high}


def compare(base: dict[tuple, Tensor], other: dict[tuple, Tensor]) -> dict[str, float]:
    """How the CorLoc of a grid changes from `base` to `other`, setting by setting, on the same images, in points.

    Keys: median, worst and best change; better: the share of settings in which it rises (no change counts half).
    """
    keys = base.keys() & other.keys()
    if not keys:
        raise ValueError("the two grids have no setting in common")
    change = torch.tensor([100 * (other[k].double().mean() - base[k].double().mean()).item() for k in sorted(keys)])
    better = (change > 1e-9).double().mean() + (change.abs() <= 1e-9).double().mean() / 2
    values = {"median": change.median(), "worst": change.min(), "best": change.max(), "better": better}
    return {name: value.item() if math.isfinite(value) else math.nan for name, value in values.items()}


@styled
def setting_grids(tables: dict, zero: float, label: str = "CorLoc − best baseline (points)") -> Figure:
    """Heat maps of a grid of settings: one row a kind of features, one column a model; layers down, biases across.

    tables: {model: DataFrame of `grid`}, CorLoc 0 to 1; zero: the CorLoc of the best baseline, drawn white.
    """
    first = next(iter(tables.values()))
    kinds = [(site, unit) for site in first.index.unique("site") for unit in first.index.unique("normalised")]
    size = (1.15 * len(tables) + 1.9, 1.05 * len(kinds) + 1.3)
    figure, axes = plt.subplots(len(kinds), len(tables), figsize=size, squeeze=False)
    values = {name: 100 * (table.corloc - zero) for name, table in tables.items()}
    most = max(1.0, max(float(v.abs().max()) for v in values.values()))
    for number, (row, (site, unit)) in enumerate(zip(axes, kinds, strict=True)):
        for axis, (name, found) in zip(row, values.items(), strict=True):
            part = found.xs((site, unit), level=("site", "normalised")).unstack("bias")
            part = part[sorted(part.columns, reverse=True)]
            drawn = axis.imshow(part, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            axis.set_xticks(range(part.shape[1]), [f"{b:g}" for b in part.columns], fontsize=7, rotation=90)
            axis.set_yticks(range(part.shape[0]), part.index, fontsize=7)
            axis.grid(False)
            axis.tick_params(length=0, labelbottom=number == len(kinds) - 1, labelleft=axis is row[0])
            if number == 0:
                axis.set_title(",\n".join(wrapped(part) for part in name.split(", ")), fontsize=8)
        named = {"q": "queries", "k": "keys", "v": "values"}[site] + ("\nlength 1" if unit else "\nlengths kept")
        row[0].set_ylabel(f"{named}\nblock", fontsize=7)
        if number == len(kinds) - 1:
            for axis in row:
                axis.set_xlabel("bias", fontsize=7)
    figure.colorbar(drawn, ax=axes.ravel().tolist(), label=label, fraction=0.03, aspect=40, pad=0.02)
    return figure
