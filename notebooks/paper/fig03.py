"""Figure 3: the verdicts, the panel of models on which the detector is tested, and a slider for the cutoff."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from verdicts import above, every, of_family, over_images, specimen, within

from vitreg_lib import plots, widgets
from vitreg_lib.data import images as image_sets
from vitreg_lib.hooks.capture import Capture
from vitreg_lib.measure import detection, outliers
from vitreg_lib.measure.detection import Observed
from vitreg_lib.plots.style import PALETTE, styled

WITH = ("deit-ti", "vit-ti", "mini-corners", "mini-stamps", "planted")
WITHOUT = (
    "dinov2-s",
    "mini-corners-reg4",
    "mini-stamps-reg4",
    "mini-deit3",
    "mini-clip",
    "mini-dinov2",
    "mini-random",
    "random:mini-clip",
)
NUMBERS = (1, 2, 5, 10, 50)  # of images
OTHER_SEED = 1000  # of scenes and textures on which no threshold was set


def claims(models, output: dict, table, is_outlier: dict, truths: dict):
    """Yields the arguments of `Run.claim`: C007 to C010 on the first trained model with artifacts, C011, the controls.

    Dictionaries by model label: output, patch norms (images, patches); is_outlier and truths, bool of the same shape
    (None if the truth is not known). table: `verdicts.table`.
    """
    having = set(table.index[table.cutoff.notna()])
    model = specimen(models, having)
    none = "; ".join(f"{m.label}: {table.outlier_share[m.label]:.2%}" for m in models if m.role == "trained")
    if model is None:
        for claim in ("C007", "C008", "C009", "C010"):
            yield claim, None, f"no trained model here has artifacts ({none} of tokens above the cutoff)"
    else:
        name, norms, row = model.label, output[model.label], table.loc[model.label]
        found = over_images(norms > row.cutoff)
        small = within(found.low, found.high, 0.02, centre=0.03)  # 1 to 5 %
        yield "C007", small, f"{name}: {found} above its cutoff {row.cutoff:.3g}"
        # the paper's 100 is two thirds of its cutoff of 150
        bulk = over_images(norms <= row.cutoff * 100 / 150)
        text = f"{name}: {bulk} of the norms are at most two thirds of the cutoff"
        yield "C008", above(bulk.low, bulk.high, 0.9), text
        valley = outliers.cutoff(norms)
        text = f"a valley at {valley:.3g}" if valley < math.inf else "no valley that stands out"
        yield "C009", True if valley < math.inf else "undecided", f"{name}: {text} in the histogram of log norms"
        yield "C010", 5 <= row.norm_ratio <= 20, f"{name}: ratio {row.norm_ratio:.1f}"
    dino = of_family(models, "dino")
    shares = {m.label: over_images(output[m.label] > 3 * output[m.label].median()) for m in dino}
    text = "; ".join(f"{name}: {each} above 3 × median" for name, each in shares.items())
    yield "C011", every(each.below() for each in shares.values()), text or "DINO is not at hand"
    for model in (m for m in models if m.is_control):
        truth, score = truths[model.label], outliers.score(is_outlier[model.label], truths[model.label])
        text = f"on the control {model.label} the rule finds the known outliers and no others"
        measured = f"precision {score['precision']:.3f}, recall {score['recall']:.3f}, truth {truth.float().mean():.2%}"
        good = min(score["precision"], score["recall"]) >= 0.95
        yield f"control-{model.label}", good, f"{measured} of tokens", text, "none"


def calibration(run, seed: int = 0, draws: int = 5) -> pd.DataFrame:
    """The detector's answers on `draws` random sets of each number of images: a DataFrame, one row a set.

    Columns: model, has (whether the model has artifacts), images (their number), answer. Models come from `run.load`.
    There are only ten photos, so a model on photos has no set of 50.
    """
    panel = {}
    for model in run.load(" ".join((*WITH, *WITHOUT))):
        pictures = image_sets.load(run.source(model), model, 60, seed + OTHER_SEED)
        panel[model.label] = (model.label in WITH, detection.observe(model, pictures))
    panel |= synthetic(seed)
    noise, rows = torch.Generator().manual_seed(seed), []
    for name, (has, observed) in panel.items():
        available = len(observed.norms)
        for number in (n for n in NUMBERS if n <= available):
            for _ in range(draws if number < available else 1):
                some = torch.randperm(available, generator=noise)[:number]
                rows.append((name, has, number, detection.judge(chosen(observed, some), draws=60).answer))
    return pd.DataFrame(rows, columns=["model", "has", "images", "answer"])


def chosen(observed: Observed, some: torch.Tensor) -> Observed:
    """The `Observed` restricted to the images `some`."""
    seen = Capture(observed.seen.layers, observed.seen.grid, observed.seen.prefix, norms=observed.seen.norms[some])
    maps = ({i: at[some] for i, at in each.items()} for each in (observed.by_cls, observed.by_patches))
    return Observed(seen, *maps)


def synthetic(seed: int, n: int = 60) -> dict[str, tuple[bool, Observed]]:
    """{name: (whether some tokens are outliers, norms and attention of n images)}, with distributions of known shape.

    Without outliers: one narrow mode; one mode with a heavy tail (Student's t of the log norms); half of the tokens at
    ten times the norm of the rest. Their attention is even up to noise. With outliers: 0.1, 0.5, 2 and 10 % of the
    tokens have 2, 3, 10 and 50 times the median norm and receive eight times as much attention as others.
    """
    noise = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, 196, generator=noise)

    def observed(log_norms, mask, lift):
        maps = torch.exp(0.3 * normal()) * torch.where(mask, lift, 1.0)
        seen = Capture((0,), (14, 14), (), norms=20 * log_norms.exp()[:, None])
        return Observed(seen, {0: maps / maps.sum(1, keepdim=True)}, {0: maps / maps.sum(1, keepdim=True)})

    nowhere, half = torch.zeros(n, 196, dtype=torch.bool), torch.rand(n, 196, generator=noise) < 0.5
    tail = 0.15 * normal() / torch.stack([normal() for _ in range(3)]).square().mean(0).sqrt()
    shapes = {
        "one narrow mode": (False, observed(0.2 * normal(), nowhere, 1.0)),
        "one mode, heavy tail": (False, observed(tail, nowhere, 1.0)),
        "two kinds of content": (False, observed(0.2 * normal() + math.log(10) * half, nowhere, 1.0)),
    }
    for times in (2, 3, 10, 50):
        for share in (0.001, 0.005, 0.02, 0.1):
            mask = torch.rand(n, 196, generator=noise) < share
            at = torch.where(mask, math.log(times) + 0.15 * normal(), 0.2 * normal())
            shapes[f"{share:.1%} at {times} ×"] = (True, observed(at, mask, 8.0))
    return shapes


def scores(answers: pd.DataFrame) -> pd.DataFrame:
    """Precision, recall, denied and decided (0 to 1) by number of images; NaN if there is no such answer."""
    rows = {}
    for number, part in answers.groupby("images"):
        called, has = part.answer == "artifacts", part.has
        rows[number] = {
            "precision": has[called].mean(),
            "recall": called[has].mean(),
            "denied": (part.answer == "none")[has].mean(),
            "decided": (part.answer != "undecided").mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


@styled
def answers_by_images(answers: pd.DataFrame) -> Figure:
    """Shares of the three answers, one row a model of the panel, one column a number of images."""
    names = list(dict.fromkeys(answers.model))[::-1]
    has = answers.groupby("model").has.first()
    figure, axes = plt.subplots(1, len(NUMBERS), figsize=(9, 0.17 * len(names) + 1.1), sharey=True)
    colours = {"artifacts": PALETTE[1], "undecided": "0.85", "none": PALETTE[0]}
    for axis, number in zip(axes, NUMBERS, strict=True):
        part = answers[answers.images == number]
        shares = pd.crosstab(part.model, part.answer, normalize="index").reindex(names).reindex(columns=list(colours))
        left = 0.0
        for answer, colour in colours.items():
            width = 100 * shares[answer].fillna(0)
            axis.barh(range(len(names)), width, left=left, color=colour, label=answer)
            left = left + width
        axis.set(title=f"{number} image" + "s" * (number > 1), xlim=(0, 100), xlabel="draws (%)")
    axes[0].set_yticks(range(len(names)), [f"{name} ({'has' if has[name] else 'none'})" for name in names], fontsize=6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def cutoff_slider(images, maps: dict[str, torch.Tensor]):
    """A widget: images and one model's norm maps, tokens above a multiple of its median norm ringed.

    maps: norms (n, rows, cols) by model label. A slider sets the multiple; it starts at 3, on the model with the
    largest ratio of largest to median norm.
    """
    most = {name: (norms.max() / norms.median()).item() for name, norms in maps.items()}

    def draw(model, times):
        norms, cutoff = maps[model], times * maps[model].median().item()
        figure = norm_maps(images.pixels, {model: norms}, {model: cutoff})
        share = (norms > cutoff).float().mean().item()
        figure.suptitle(f"cutoff {times:g} × median = {cutoff:.3g}: {share:.2%} of these tokens above", fontsize=9)
        return figure

    return widgets.interact(
        draw,
        model=("Dropdown", {"value": max(most, key=most.get), "options": list(maps)}),
        times=("FloatSlider", {"value": 3.0, "min": 0.5, "max": 10.0, "step": 0.1}),
    )


def norm_maps(pixels: torch.Tensor, maps: dict[str, torch.Tensor], cutoffs: dict[str, float]) -> Figure:
    """Figure 3, left: images and, for each model, its norm map (images, rows, cols) with outliers ringed."""
    groups = [{name: norms[:4].cpu()} for name, norms in maps.items()]
    rings = {name: norms[:4].cpu() > cutoffs[name] for name, norms in maps.items()}
    style = dict(cmap=plots.NORMS, scale="group", label="L2 norm", limits=(0, None))
    return plots.sheet(pixels[:4], groups, rings=rings, cutoffs=cutoffs, **style)


def before_and_after_norm(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]):
    """Largest norm / median norm before and after the final LayerNorm: a DataFrame, one row a model."""
    sides = {"before": before, "after": after}
    ratios = {side: {k: (v.max() / v.median()).item() for k, v in norms.items()} for side, norms in sides.items()}
    return pd.DataFrame(ratios)
