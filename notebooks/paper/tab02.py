"""The three tasks of Table 2a and Figure 8 on a frozen model: classes, semantic masks and depth by linear probes.

Features are taken after the final LayerNorm: cls (if the model has one) and the mean patch token for the class, patch
tokens for masks, patch tokens joined with cls for depth. The probes are a logistic regression and the heads of
`tab02_heads`. The test images are fixed. Every seed draws four fifths of the training images and initialises the heads
anew, so the spread over seeds shows the influence of training; `changes` also resamples the test images. Probes train
for fewer steps than the paper's (Oquab et al. 2023): compare models within one run, never with the paper's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tab02_heads
import tab02_sets
import tables_tasks
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vitreg_lib.base import DATA, UserError
from vitreg_lib.data import sets
from vitreg_lib.data.scenes import SHAPES
from vitreg_lib.measure import detection
from vitreg_lib.plots.scores import dots
from vitreg_lib.plots.style import PALETTE, PAPER, styled
from vitreg_lib.probes import linear
from vitreg_lib.probes.linear import held_out

TASKS = {"accuracy": "classification", "miou": "segmentation", "rmse": "depth"}
LOWER_IS_BETTER = ("rmse",)
TOLERANCE = {"accuracy": 0.2, "miou": 0.2, "rmse": 0.002}  # of the claims of Table 2a: points, points, unit of depth
PANELS = {"accuracy": ("top-1 (%)", 100), "miou": ("mIoU (%)", 100), "rmse": ("depth RMSE", 1)}


CLAIMS = {
    (family, task): f"C{85 + 3 * i + j:03d}"
    for i, task in enumerate(TASKS)
    for j, family in enumerate(("deit3", "clip", "dinov2"))
}


@dataclass
class Scores:
    """What each test image contributes to each score.

    parts: by task, (seeds, images, parts) float64. accuracy: 1 if right, else 0; miou: intersection and union of every
    class, (…, 2 * classes), in pixels; rmse: that of the image, NaN without a valid pixel. sources: by task, a
    description of the images. artifacts: by task, whether the model has artifacts on the training and test images, by
    `vr.detect`.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, bool] = field(default_factory=dict)

    def values(self) -> dict[str, Tensor]:
        """{task: (seeds,)}: accuracy and mIoU from 0 to 1, RMSE in the unit of the depths."""
        return {task: SCORE[task](part) for task, part in self.parts.items()}


def _mean_iou(parts: Tensor) -> Tensor:
    inter, union = parts.sum(-2).chunk(2, -1)
    present = union > 0  # classes that are neither predicted nor labelled are left out
    return torch.where(present, inter / union.clamp_min(1), 0).sum(-1) / present.sum(-1)


SCORE = {
    "accuracy": lambda parts: parts[..., 0].mean(-1),
    "miou": _mean_iou,
    "rmse": lambda parts: parts[..., 0].nanmean(-1),
}


def scores(
    model,
    classification: str = "scenes",
    dense: str = "scenes",
    depths: str = "scenes",
    n_train: int = 192,
    n_test: int = 192,
    seeds=(0, 1, 2),
    steps: int = 150,
    bins: int = 16,
    stride: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """`Scores` of a `zoo.Model`; an empty source leaves its task out. A replayed model has stored scores.

    classification: a name of `tables_tasks`; dense and depths: names of `tab02_sets` ("scenes" are the same images for
    all three tasks). At most n_train and n_test images, drawn with `seed`. steps: training steps of the heads, each of
    16 images; bins: of the depth (256 in the paper); stride: masks and depths train on every n-th pixel and are scored
    on all.
    """
    from tqdm.auto import tqdm

    if model.replayed:
        kept = {t: model.kept(f"scores.{t}").double() for t in TASKS if f"scores.{t}" in model.tensors}
        return Scores(kept, model.measured["scores"], model.measured.get("scored_artifacts", {}))
    found, cache = Scores(), {}
    work = [(t, s) for t, s in zip(TASKS, (classification, dense, depths), strict=True) if s]
    if not work:
        raise UserError("no task is left: name a data set for one of classification, dense and depths")
    for task, source in tqdm(work, desc=model.label, disable=not progress, leave=False):
        parts = [
            _load(task, source, split, model, n, seed, cache) for split, n in (("train", n_train), ("test", n_test))
        ]
        found.sources[task] = parts[1].title
        found.artifacts[task] = detection.judge(detection.join([part.observed for part in parts])).has_artifacts
        found.parts[task] = torch.stack([_SCORED[task](*_drawn(parts, s), s, steps, bins, stride) for s in seeds])
    return found


@dataclass
class _Part:
    """Features and labels of one split, on the CPU: cls (n, dim) or None, patches (n, patches, dim), truth (n, …)."""

    title: str
    observed: detection.Observed
    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]
    truth: Tensor
    most: float  # number of classes, or the largest depth

    def take(self, rows: Tensor) -> _Part:
        cls = None if self.cls is None else self.cls[rows]
        return _Part(self.title, self.observed, cls, self.patches[rows], self.grid, self.truth[rows], self.most)


def _drawn(parts: list[_Part], seed: int) -> tuple[_Part, _Part]:
    """Four fifths of the training images, and all test images."""
    n = len(parts[0].truth)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, round(0.8 * n))]
    return parts[0].take(rows), parts[1]


def _load(task: str, source: str, split: str, model, n: int, seed: int, cache: dict) -> _Part:
    """The images of one split with their labels; features of scenes are computed once for all tasks."""
    if source == "scenes":
        if split not in cache:
            pictures, _, classes = tab02_sets.segmentation("scenes", split, model, n, seed)
            cache[split] = (pictures, classes, _features(model, pictures.x))
        pictures, classes, features = cache[split]
        s = pictures.scenes
        truth, most = {"accuracy": (s.label, 0), "miou": (s.semantic, classes), "rmse": (s.depth, 10.0)}[task]
        return _Part(pictures.source, *features, truth, most)
    if task == "accuracy":
        (problem,) = tables_tasks.load(source, n, n, seed)
        part, labels = getattr(problem, split), getattr(problem.tasks[0], split)
        if labels.ndim != 1:
            raise UserError(f"{source} has several labels an image: choose a data set of one")
        pixels = torch.cat([part.pixels(part.rows[i : i + 64], model) for i in range(0, len(part), 64)])
        whole = _Part(part.title, *_features(model, model.normalise(pixels)), labels, problem.tasks[0].classes)
        return whole.take(labels != tables_tasks.LEFT_OUT)
    load = tab02_sets.segmentation if task == "miou" else tab02_sets.depth
    pictures, truth, most = load(source, split, model, n, seed)
    return _Part(pictures.source, *_features(model, pictures.x), truth, most)


def _features(model, x: Tensor):
    """(`Observed` for the detector, cls or None, patches, grid), tokens after the final LayerNorm."""
    observed, seen = zip(*(detection.observe_batch(model, part, ("final",)) for part in x.split(64)), strict=True)
    cls = torch.cat([each.final[:, 0] for each in seen]) if seen[0].has_cls else None
    return detection.join(list(observed)), cls, torch.cat([each.patches(each.final) for each in seen]), seen[0].grid


def _class_scores(train: _Part, test: _Part, seed: int, steps, bins, stride) -> Tensor:
    known = (train.truth.bincount() >= 2).nonzero()[:, 0]  # one image to fit, one to select; other classes are left out
    if len(known) < 2:
        raise UserError(
            f"{train.title}: {len(known)} of the classes have two training images among {len(train.truth)}: at least "
            "two are needed, so raise n_train"
        )
    rows = torch.isin(train.truth, known)
    x, x_test = linear.scale(_pooled(train)[rows], _pooled(test))
    y = torch.searchsorted(known, train.truth[rows])
    held = held_out(y, seed)
    fit = linear.fit_selected(x[~held], y[~held], x[held], y[held], linear.STRENGTHS, tol=1e-5)
    return (known[linear.predict(fit, x_test, 0).argmax(-1)] == test.truth).double()[:, None]


def _pooled(part: _Part) -> Tensor:
    mean = part.patches.mean(1)
    return mean if part.cls is None else torch.cat([part.cls, mean], 1)


def _mask_scores(train: _Part, test: _Part, seed: int, steps: int, bins, stride: int) -> Tensor:
    coarse = train.truth[:, stride // 2 :: stride, stride // 2 :: stride]
    head = tab02_heads.fit_segmentation(train.patches, train.grid, coarse, train.most, steps=steps, lr=1e-2, seed=seed)
    guess = tab02_heads.predict_segmentation(head, test.patches, test.grid, tuple(test.truth.shape[1:]))
    return iou_parts(guess, test.truth, train.most)


def iou_parts(guess: Tensor, masks: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """(images, 2 * classes) float64: pixels in the intersection, then in the union, of every class in every image."""
    labelled = masks != ignore_index
    rows = []
    for g, m, known in zip(guess, masks, labelled, strict=True):
        pairs = torch.bincount(g[known] * num_classes + m[known], minlength=num_classes**2).view(num_classes, -1)
        inter = pairs.diagonal()
        rows.append(torch.cat([inter, pairs.sum(0) + pairs.sum(1) - inter]))
    return torch.stack(rows).double()


def _depth_scores(train: _Part, test: _Part, seed: int, steps: int, bins: int, stride: int) -> Tensor:
    coarse = train.truth[:, stride // 2 :: stride, stride // 2 :: stride]
    x, x_test = (tab02_heads.with_cls(p.patches, p.cls) if p.cls is not None else p.patches for p in (train, test))
    options = dict(max_depth=train.most, upsample=2)
    head = tab02_heads.fit_depth(x, train.grid, coarse, bins=bins, steps=steps, lr=1e-2, seed=seed, **options)
    guess = tab02_heads.predict_depth(head, x_test, test.grid, tuple(test.truth.shape[1:]), **options)
    return tab02_heads.image_rmse(guess, test.truth, train.most)[:, None]


_SCORED = {"accuracy": _class_scores, "miou": _mask_scores, "rmse": _depth_scores}


def table(found: dict[str, Scores]):
    """Mean and standard deviation over seeds of every score: a DataFrame, one row a model, columns TASK and TASK_sd."""
    import pandas as pd

    rows = {}
    for name, result in found.items():
        values = result.values()
        rows[name] = {task: v.mean().item() for task, v in values.items()}
        rows[name] |= {f"{task}_sd": v.std().item() if len(v) > 1 else float("nan") for task, v in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def changes(found: dict[str, Scores], pairs: dict[str, str], draws: int = 1000, seed: int = 0):
    """The change of each score with registers: a DataFrame indexed by (model with registers, task).

    pairs: {model with registers: the same without} (`pairs.pairs`). Columns: without (that model), change (of the mean
    score), low and high (the middle 95 % of a bootstrap over seeds and test images, the same for both models).
    """
    import pandas as pd

    rows = {}
    for name, base in pairs.items():
        for task in (t for t in TASKS if t in found[name].parts and t in found[base].parts):
            one, other = found[name].parts[task], found[base].parts[task]
            generator = torch.Generator().manual_seed(seed)
            seeds, images = one.shape[:2]
            drawn = torch.empty(draws, dtype=torch.float64)
            for i in range(draws):
                s = torch.randint(seeds, (seeds,), generator=generator)[:, None]
                n = torch.randint(images, (images,), generator=generator)
                drawn[i] = (SCORE[task](one[s, n]) - SCORE[task](other[s, n])).mean()
            low, high = drawn.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            change = (SCORE[task](one) - SCORE[task](other)).mean().item()
            rows[name, task] = {"without": base, "change": change, "low": low, "high": high}
    index = pd.MultiIndex.from_tuples(rows, names=["model", "task"])
    return pd.DataFrame(list(rows.values()), index=index, columns=["without", "change", "low", "high"])


def class_iou(found: Scores):
    """IoU of every class over all seeds, as a Series; NaN for a class that is neither predicted nor labelled.

    The index has the names of the classes if datasets.yaml lists them, else their numbers.
    """
    import pandas as pd

    inter, union = found.parts["miou"].sum((0, 1)).chunk(2, -1)
    named = {entry["title"]: entry["class_names"] for entry in sets.entries().values() if "class_names" in entry}
    named["scenes"] = ["background", *SHAPES]
    names = (each for title, each in named.items() if found.sources["miou"].startswith(title))
    return pd.Series((inter / union).numpy(), index=next(names, range(len(inter))))


@styled
def class_dots(table) -> Figure:
    """Scores (%) of each class as dots: a row a row of the table, a colour a column; NaN is left out."""
    rows = table.rename_axis("class").melt(ignore_index=False, var_name="model").reset_index()
    figure, axis = plt.subplots(figsize=(5.6, 0.24 * len(table) + 1.1))
    styles = {name: (PALETTE[i], "oDs^"[i % 4]) for i, name in enumerate(table)}
    dots(axis, rows.assign(low=np.nan, high=np.nan), "value", "class", "model", styles, orient="h", legend="full")
    axis.set(xlabel="IoU (%)", xlim=(-2, 102))
    axis.get_legend().remove()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def reported(registers: bool) -> dict[tuple[str, str], float]:
    """The paper's Table 2a: {(family, task): score}, shares from 0 to 1, for the models without or with registers."""
    import pandas as pd

    families = {"DeiT-III ViT-B": "deit3", "OpenCLIP ViT-B/16": "clip", "DINOv2 ViT-L": "dinov2"}
    metrics = {"top-1": ("accuracy", 100), "mIoU": ("miou", 100), "rmse": ("rmse", 1)}
    rows = pd.read_csv(DATA / "reported" / "table2a.csv")
    found = {}
    for row in rows[(rows.registers > 0) == registers].itertuples():
        task, scale = metrics[row.metric]
        found[families[row.model], task] = row.value / scale
    return found


def judge(change, task: str, tolerance: float) -> tuple[bool | str, str]:
    """(verdict, measured text): True if registers worsen a score by at most `tolerance`, in the unit of the score.

    change: a row of `changes`. "undecided" if the interval contains both answers.
    """
    sign, unit, factor = (-1, "", 1) if task in LOWER_IS_BETTER else (1, " points", 100)
    ends = sorted(sign * factor * change[key] for key in ("low", "high"))
    digits = 3 if task in LOWER_IS_BETTER else 1
    value, low, high = (factor * change[key] for key in ("change", "low", "high"))
    text = f"{value:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})"
    return True if ends[0] >= -tolerance else False if ends[1] < -tolerance else "undecided", text


@styled
def task_scores(table, change, paper: dict[tuple[str, str], float] | None = None) -> Figure:
    """Table 2a as dots: above, the score of every model; below, the change of the score with registers.

    table: of `table`, bars are standard deviations over seeds; change: of `changes`, bars are the middle 95 % of a
    bootstrap. paper: {(model with registers, task): change that the paper reports for its family}, as triangles.
    """
    tasks = [task for task in PANELS if task in table]
    pairs = list(change.index.unique("model"))
    heights = [0.24 * len(table) + 0.3] + ([0.24 * len(pairs) + 0.3] if pairs else [])
    size = (2.5 * len(tasks) + 1.6, sum(heights) + 1.5)
    figure, axes = plt.subplots(len(heights), len(tasks), figsize=size, squeeze=False, height_ratios=heights)
    for column, task in enumerate(tasks):
        (label, factor), axis = PANELS[task], axes[0, column]
        y = np.arange(len(table))
        axis.errorbar(
            factor * table[task], y, xerr=factor * table[f"{task}_sd"], fmt="o", ms=4, lw=1.2, color=PALETTE[0]
        )
        axis.set(
            yticks=y, ylim=(len(table) - 0.5, -0.5), xlabel=label + (", lower is better" if task == "rmse" else "")
        )
        axis.set_yticklabels(table.index if column == 0 else [])
        if not pairs:
            continue
        axis, part = axes[1, column], change.xs(task, level="task").reindex(pairs)
        y = np.arange(len(pairs))
        ends = factor * np.array([part.change - part.low, part.high - part.change]).clip(min=0)
        axis.axvline(0, color=PAPER, lw=1)
        style = dict(fmt="D", ms=4, lw=1.2, color=PALETTE[1], label="change with registers")
        axis.errorbar(factor * part.change, y, xerr=ends, **style)
        asked = {name: i for i, name in enumerate(pairs) if (name, task) in change.index}
        known = [(factor * paper[name, task], i) for name, i in asked.items() if (name, task) in (paper or {})]
        if known:
            axis.plot(*zip(*known, strict=True), "v", color=PAPER, ms=5, label="the paper's change, of its own models")
        axis.set(yticks=y, ylim=(len(pairs) - 0.5, -0.5), xlabel="change of the " + label.replace("(%)", "(points)"))
        axis.set_yticklabels(pairs if column == 0 else [])
    for axis in axes.flat:
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5))
    if pairs:
        handles = [axis.get_legend_handles_labels() for axis in axes[1]]
        figure.legend(*max(handles, key=lambda h: len(h[1])), loc="outside upper center", ncols=2)
    return figure
