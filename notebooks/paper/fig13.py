"""Figure 13: LOST step by step on one block of a model, the plot of its maps, and the verdicts."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import paired
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from verdicts import above, cured, every

from vitreg_lib.data import sets
from vitreg_lib.measure import objects, pairs
from vitreg_lib.plots.maps import COMPONENT, draw_map
from vitreg_lib.plots.style import NORMS, PALETTE, bare, draw_box, picture, styled, wrapped


def pictures(run, model, seed: int = 0) -> tuple:
    """(`Images`, their boxes) of the run; None for the source "photos", whose boxes are not known."""
    if run.source(model) == "photos":
        return run.images(model), None
    return sets.load_boxes(run.at.images, model, run.at.n_images, seed)


def steps(model, images, site: str = "", bias: float = 0.0, layer: int = -1, progress: bool = False) -> objects.Lost:
    """`objects.lost` with its maps, on the q, k or v of one block of a `zoo.Model`, L2-normalised.

    site: q, k or v; "" is `objects.paper_site`. For a replayed model the result is read from disk: that of the last
    block with bias 0. Raises ValueError for another site.
    """
    site = site or objects.paper_site(model)
    if site not in ("q", "k", "v"):
        raise ValueError(f"unknown features {site!r}: choose 'q', 'k' or 'v'")
    if model.replayed:
        parts = {f.name: f"lost.{site}.{f.name}" for f in dataclasses.fields(objects.Lost)}
        return objects.Lost(**{name: model.kept(key, images) for name, key in parts.items()})
    seen = model.capture(images, site, layers=layer, progress=progress)
    return objects.lost(objects.features(seen, site), seen.grid, bias=bias, normalize=True, intermediates=True)


@styled
def discovery(pixels: torch.Tensor, found: dict, patch_sizes: dict[str, int], truth: list | None = None) -> Figure:
    """Figure 13: LOST step by step; one row a model, four panels an image.

    found: {model: `objects.Lost` with intermediates, of the images in pixels (n, 3, h, w)}; truth: boxes of each image.
    Panel 1: inverse degree (bright: linked to few), a cross on the seed. Panels 2 and 3: similarity to the seed and
    expansion, white at 0, the threshold of LOST. Panel 4: the part that contains the seed, LOST's box (solid), the true
    boxes (dashed), and whether LOST's box hits one.
    """
    titles = ("inverse\ndegree", "similarity\nto seed", "seed\nexpansion", "box")
    figure, axes = rows_of_panels(list(found), len(pixels), titles)
    for row, (name, result) in zip(axes, found.items(), strict=True):
        rows, cols = result.degrees.shape[1:]
        for i, panels in enumerate(row):
            panels[0].imshow(-result.degrees[i].numpy(), cmap=NORMS, interpolation="nearest")
            for axis, values in zip(panels[1:3], (result.seed_similarity[i], result.expansion[i]), strict=True):
                signed(axis, values)
            for axis in panels[:3]:
                axis.plot(
                    int(result.seeds[i]) % cols, int(result.seeds[i]) // cols, "x", color=PALETTE[1], ms=5, mew=1.6
                )
            image = picture(pixels[i])
            part = result.component[i].repeat_interleave(image.shape[0] // rows, 0)
            part = part.repeat_interleave(image.shape[1] // cols, 1).numpy()[..., None]
            panels[3].imshow(np.where(part, image, 0.65 + 0.35 * image))
            line = dict(lw=1.4, clip_on=False)
            for box in [] if truth is None else truth[i]:
                draw_box(panels[3], box, edgecolor=PALETTE[0], ls="--", **line)
            box = objects.in_pixels(result.boxes[i], patch_sizes[name])
            draw_box(panels[3], box, edgecolor=PALETTE[1], **line)
            if truth is not None:
                hit = bool(objects.box_hits(box[None], truth[i : i + 1]))
                style = dict(color=PALETTE[2] if hit else PALETTE[1], fontsize=9, fontweight="bold", labelpad=2)
                panels[3].set_xlabel("hit" if hit else "miss", **style)
    marks = {"seed": dict(marker="x", color=PALETTE[1]), "LOST's box": dict(ls="-", color=PALETTE[1])}
    key(figure, axes, marks | ({} if truth is None else {"true box": dict(ls="--", color=PALETTE[0])}))
    return figure


def rows_of_panels(names: list[str], count: int, titles: tuple[str, ...], cell: float = 1.05):
    """(figure, axes (names, images, titles)): axes without ticks, names on the left, a gap between images."""
    widths = ([1.0] * len(titles) + [0.12]) * count
    figure = plt.figure(figsize=(cell * sum(widths) + 1.0, cell * len(names) + 1.3))
    grid = figure.subplots(len(names), len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        bare(axis)
    for axis, name in zip(grid[:, 0], names, strict=True):
        axis.set_ylabel(wrapped(name), rotation=0, ha="right", va="center", fontsize=8)
    axes = grid.reshape(len(names), count, len(titles) + 1)[..., :-1]
    for panels in axes[0]:
        for axis, title in zip(panels, titles, strict=True):
            axis.set_title(title, fontsize=8)
    return figure, axes


def signed(axis, values: torch.Tensor) -> None:
    """Draw a map in two colours, white at 0."""
    most = float(values.abs().max()) or 1.0
    draw_map(axis, values, COMPONENT, Normalize(-most, most))


def key(figure: Figure, axes, marks: dict) -> None:
    """A colour bar for `signed` below the panels, and a legend of the marks {name: marker or line} above them."""
    colours = ScalarMappable(Normalize(-1, 1), COMPONENT)
    shrink = max(0.5, min(1.0, 4 / figure.get_figwidth()))  # the labels of the ticks need three inches
    bar = figure.colorbar(colours, ax=axes.ravel().tolist(), location="bottom", aspect=50, shrink=shrink, pad=0.02)
    bar.set_ticks([-1, 0, 1], labels=["stays out", "0: LOST cuts here", "joins the object"])
    bar.set_label("similarity, of each map")
    lines = [Line2D([], [], **{"ls": "", "mew": 1.4, "ms": 6} | style) for style in marks.values()]
    figure.legend(lines, marks, loc="outside upper center", ncols=4)


def claims(models, compared, roughness: dict, having):
    """Yields the arguments of `Run.claim`: C045 to C047 on trained pairs, ours on registers added at test time.

    roughness: (images,) of LOST's score, by model label; compared: `paired.compare` of it; having: labels of the models
    with artifacts.
    """
    base, drops = pairs.pairs(models), {}
    for claim, family in (("C045", "deit3"), ("C046", "dinov2"), ("", "clip")):
        judged, missing = cured(models, having, family)
        if claim:
            yield claim, *(paired.judge(compared.loc[list(judged)], having=having) if judged else (None, missing))
        if judged:
            name, without = next(iter(judged.items()))
            drop = roughness[without] - roughness[name]
            drops[family] = drop[drop.isfinite()]
    others = [family for family in drops if family != "clip"]
    if "clip" in drops and others:
        answers = [_smaller(drops["clip"], drops[family]) for family in others]
        spans = "; ".join(f"{family} {drop.mean():+.3f}" for family, drop in drops.items())
        yield "C047", every(answers), f"mean drop of the roughness: {spans}"
    else:
        yield "C047", None, "needs a pair of OpenCLIP and another whose models without registers have artifacts"
    for name in (m.label for m in models if m.label in base and m.registers_from == "test time"):
        text = f"registers added at test time smooth the score of {base[name]}"
        yield f"ours-{name}", *paired.judge(compared.loc[[name]], "test time", having), text, "none"


def _smaller(one: torch.Tensor, other: torch.Tensor) -> bool | str:
    """Is the mean of `one` smaller than that of `other`? By the difference of their bootstrap intervals."""
    (low, high), (least, most) = pairs.interval(one), pairs.interval(other)
    return above(least - high, most - low)


def two_pairs(names: list[str], pairs: dict[str, str]) -> list[str]:
    """Names of two pairs, the model without registers first in each; without any pair, the first four names.

    pairs: {model with registers: the same model without}.
    """
    first = {}
    for with_registers, without in pairs.items():
        first.setdefault(without, with_registers)
    return [name for pair in list(first.items())[:2] for name in pair] or names[:4]
