"""The effect of registers added at test time, by their number, with controls (notebook beyond/test_time_registers).

The same images are measured before and after, so differences are paired. The places of outliers are those of the
unchanged model.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from vitreg_lib.measure import objects
from vitreg_lib.model import mend
from vitreg_lib.model.mend import Neurons, _pixels, handful, mean_activations
from vitreg_lib.plots.style import PALETTE, PAPER, styled


def experiment(model, images, found: mend.Search, counts=(0, 1, 2, 4, 8), labels=None, seed: int = 0, more: int = 2):
    """(DataFrame, {measure: value} of the unchanged model).

    The DataFrame has one row for each kind of neurons and number of registers. Kinds: "found", the neurons of `found`;
    "found + N next", these and the next `more` candidates of its ranking; "random", as many other neurons as "found",
    of equal mean activation. Columns: those of `measure`, newly_wrong and newly_right (how many images get a wrong
    answer instead of a right one, and the reverse).
    """
    import pandas as pd

    seen = model.capture(images, "norms", layers=found.layer)
    is_outlier = seen.patch_norms[:, 0] > found.cutoff
    before, right = measure(model, images, is_outlier, found, labels)
    ranked = list(zip(found.table.block, found.table.neuron, strict=True))
    kinds = {"found": found.neurons}
    if more and len(ranked) > len(found.neurons):
        kinds[f"found + {more} next"] = tuple(ranked[: len(found.neurons) + more])
    kinds["random"] = random_neurons(model, found.neurons, images, seed)
    rows = []
    for kind, neurons in kinds.items():
        for count in counts:
            mended = mend.with_test_time_registers(model, count, neurons)
            after, now = measure(mended, images, is_outlier, found, labels)
            if right is not None:
                after |= {"newly_wrong": int((right & ~now).sum()), "newly_right": int((now & ~right).sum())}
            rows.append({"kind": kind, "registers": count} | after)
    return pd.DataFrame(rows), before


def measure(model, images, is_outlier: torch.Tensor, found: mend.Search, labels=None):
    """({measure: value}, (images,) bool: classified correctly, or None without labels).

    outlier_share: share of patch tokens above the unchanged model's cutoff. largest_patch_norm. register_norm: mean
    over registers, NaN without registers. attention_on_outliers: share of the attention of cls in the last block on the
    *places* of the unchanged model's outliers, NaN without cls. accuracy and cross_entropy: if labels are known and the
    model has a head for them; on scenes for the colour of the main object, which the mini ViTs learn best. corloc: on
    scenes, LOST on the last block's keys, L2-normalised (a hit is an IoU of at least 0.5 with any object).
    """
    layers = sorted({found.layer, model.anatomy.depth - 1})
    seen = model.capture(images, ("norms", "attention", "k"), layers=layers, queries=[0])
    at = seen.layers.index(found.layer)
    of_cls = seen.patches(seen.attention[layers[-1]][:, :, 0].mean(1))
    on_outliers = (of_cls * is_outlier).sum(1).mean().item()
    result = {
        "outlier_share": (seen.patch_norms[:, at] > found.cutoff).float().mean().item(),
        "largest_patch_norm": seen.patch_norms[:, at].max().item(),
        "register_norm": seen.register_norms[:, at].mean().item() if seen.num_registers else float("nan"),
        "attention_on_outliers": on_outliers if seen.has_cls else float("nan"),
    }
    if images.scenes is not None:
        result["corloc"] = _corloc(seen, images, layers[-1])
    question = "imagenet" if images.scenes is None else "colour"
    if labels is None or question not in model.head:
        return result, None
    with torch.no_grad():
        logits = torch.cat([model.module(x.to(model.weights)).float().cpu() for x in images.x.split(32)])
    logits = logits[:, slice(*model.head[question])]
    labels = labels if images.scenes is None else images.scenes.colour[:, 0]
    right = logits.argmax(1) == labels
    result["accuracy"] = right.float().mean().item()
    result["cross_entropy"] = torch.nn.functional.cross_entropy(logits, labels).item()
    return result, right


def _corloc(seen, images, layer: int) -> float:
    found = objects.lost(objects.features(seen, "k", layer), seen.grid, normalize=True)
    boxes = found.boxes * (images.x.shape[-1] // seen.grid[1])
    return objects.corloc(boxes, images.scenes.visible_boxes).value


def random_neurons(model, neurons: Neurons, images=None, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """The control: as many other neurons of the same blocks, of nearly equal mean |activation| over the patches.

    For each neuron, `seed` draws one of the twenty that are nearest in mean activation and not chosen yet.
    """
    x = _pixels(handful(model) if images is None else images)
    blocks = sorted({block for block, _ in neurons})
    everywhere = torch.ones(len(x), math.prod(model.anatomy.grid(x)), dtype=torch.bool)
    means = {b: m[0] for b, m in mean_activations(model.module, x, everywhere, blocks).items()}
    generator = torch.Generator().manual_seed(seed)
    taken, drawn = set(neurons), []
    for block, neuron in neurons:
        near = (means[block] - means[block][neuron]).abs().argsort().tolist()
        near = [i for i in near if (block, i) not in taken][:20]
        choice = (block, near[int(torch.randint(len(near), (1,), generator=generator))])
        taken.add(choice)
        drawn.append(choice)
    return tuple(drawn)


@styled
def dose(table: pd.DataFrame, panels: dict[str, str], zero: dict[str, float] | None = None) -> Figure:
    """Curves over the number of registers: one panel a measure, one line a kind of neurons.

    table: of `experiment`; panels: {measure: axis label}; zero: the values of the unchanged model, drawn as a line.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns + 0.2, 2.2 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (measure, text) in zip(axes.flat, panels.items(), strict=False):
        for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
            # curves often coincide: the first are drawn wide, so that the later ones do not hide them
            style = dict(marker="so^"[number % 3], ms=8 - 2 * number, lw=3.5 - number)
            axis.plot(range(len(part)), part[measure], color=PALETTE[number], label=kind, clip_on=False, **style)
        counts = table.registers.unique()
        axis.set_xticks(range(len(counts)), [f"{c:g}" for c in counts])
        if zero and measure in zero:
            axis.axhline(zero[measure], color=PAPER, ls="--", lw=1, label="untouched")
        axis.set(xlabel="registers added", ylabel=text)
        if 0 <= table[measure].min() < 0.5 * table[measure].max():  # else the curves would be flat at the top
            axis.set_ylim(bottom=0)
        if measure == "accuracy":  # at most 1
            axis.set_ylim(top=min(1.0, axis.get_ylim()[1]))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def record(run, model, table: pd.DataFrame, before: dict[str, float]) -> None:
    """Put an `experiment` into the run's record, in a fixed order."""
    for name, value in before.items():
        run.measure(name, value, model.name)
    for row in table.to_dict("records"):
        kind = "" if row["kind"] == "found" else f" ({row['kind']})"
        for name in (*before, "newly_right", "newly_wrong"):
            if name in row:
                run.measure(name, row[name], f"{model.name}+ttr{row['registers']}{kind}")


def claims(model, found: mend.Search, table: pd.DataFrame, before: dict[str, float], images: int):
    """Yields the arguments of `Run.claim`, all ours. table, before: of `experiment`; images: their number."""
    rows = table.set_index(["kind", "registers"])
    share, removed = before["outlier_share"], rows.outlier_share["found"][1]
    text = "one register added at test time removes at least nine tenths of the outliers"
    reported = "yes, for its models (Jiang et al. 2025)"
    yield "ours-removes", removed < 0.1 * share, f"{share:.2%} without, {removed:.2%} with one register", text, reported
    control = rows.outlier_share["random"][1]
    text = "random neurons of equal mean activation do not remove them"
    yield "ours-control", control > 0.5 * share, f"{control:.2%} with random neurons of equal activation", text, "none"
    attention = rows.attention_on_outliers
    kinds = [kind for kind in table.kind.unique() if kind != "random"]
    measured = "; ".join(f"{kind}: {attention[kind][1]:.1%}" for kind in kinds)
    measured = f"{before['attention_on_outliers']:.1%} of cls's attention untouched; with one register {measured}"
    measured += f"; an even share is {share:.1%}"
    text = "at least nine tenths of the attention leaves the places of outliers (it need not leave with the norm)"
    yield "ours-attention", attention["found"][1] < 0.1 * before["attention_on_outliers"], measured, text, "none"
    norm, text = rows.register_norm["found"][1], "the registers take over the high norm"
    measured = f"mean register norm {norm:.3g}, cutoff {found.cutoff:.3g}"
    yield "ours-takes-over", norm > found.cutoff, measured, text, "yes (Jiang et al. 2025)"
    if "accuracy" in before:
        right = rows.accuracy["found"]
        counts = ", ".join(f"{value:.0%}" for value in right.iloc[1:])
        measured = f"right: {before['accuracy']:.0%} untouched, {right[0]:.0%} silenced, {counts} with 1, 2, 4, 8 "
        measured += f"registers, of {images} images"
        text = "silencing the neurons costs accuracy and registers give some of it back"
        by_design = model.role == "planted control"  # its sink returns nothing, so nothing can be lost
        back = None if by_design else right[0] < before["accuracy"] and right.iloc[1:].max() > right[0]
        prefix = "the control's artifacts carry nothing by design; " * by_design
        yield "ours-gives-back", back, prefix + measured, text, "accuracy is kept (Jiang et al. 2025)"
    if model.role == "planted control":
        first = model.module.blocks[0].mlp.fc1.out_features - 128  # planting added 8 x 16 neurons; 15 of them write
        truth, moved = {(found.onset, first + i) for i in range(15)}, set(found.neurons)
        measured = f"{len(truth & moved)} of {len(truth)} planted neurons, {len(moved - truth)} others"
        yield f"control-{model.label}", moved == truth, measured, "the neurons are those that were planted", "none"
