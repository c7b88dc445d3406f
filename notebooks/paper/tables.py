"""Classification from a single token: cls, a register, a normal patch, an outlier patch (Tables 1, 4 and 6).

Per image one token of each kind, logistic regression on it, the strength of the penalty chosen on a fifth of the
training images (drawn class by class) and fitted once more on all of them; the score is on the test images. Patch
tokens are drawn anew, for training and test alike, in every draw: mean and standard deviation (ddof 1) over draws. All
kinds are scored on the same images, those that have an outlier.

The paper compares an outlier with a random normal token. `matched` is the fair partner: the normal token nearest to an
outlier (`probes.local`), since outliers at fixed places differ from the average token by their place. A model without
outliers borrows the places of one that has some, on the same images; its tokens there are called by the same names.
For the planted control `planted` is what was put into its outliers, a part of cls before the onset.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass, field

import tables_sgd
import torch
from feature_cache import source_sha256
from tables_tasks import Problem, Source, Task
from tables_tokens import GROUPS, classification_tokens, cutoff_of
from torch import Tensor

from vitreg_lib.base import UserError, remembered
from vitreg_lib.measure import pairs
from vitreg_lib.probes import _lbfgs, linear
from vitreg_lib.probes.linear import held_out

EXACT = 200_000  # training images up to which the optimum is computed; beyond, SGD comes near it
LEAST = 4  # training images that a class must have
_COLUMN = {"register": "registers"}  # of the features, where it has another name than the kind of token


@dataclass
class Classified:
    """table: DataFrame indexed by (model, task, token) with score and sd (0 to 1), draws, train, test, classes, chance,
    metric, features (fingerprints of training and test features, shortened). right: (draws, test images) of 0 and 1 by
    the same index, for scores that are shares of right answers. owner: {model: whose outliers' places are taken}.
    cutoffs: by model and set of images, infinite where no token is an artifact there. about: descriptions of all
    features used, by fingerprint.
    """

    table: object
    right: dict = field(default_factory=dict)
    owner: dict = field(default_factory=dict)
    cutoffs: dict = field(default_factory=dict)
    shares: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)


def classify(
    models, problems, draws: int = 5, strengths=linear.STRENGTHS, seed: int = 0, progress: bool = False
) -> Classified:
    """Scores of every model, task and kind of token: a `Classified`. models of `zoo.load`; problems of `tables_tasks`.

    A replayed model is scored on the sets that it was measured on, from its features there.

    Raises UserError for a task that is left with fewer than two classes.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    found, result = [], Classified(None)
    labels = {m.label: i for i, m in enumerate(models)}
    for model in (m for m in models if m.replayed):
        found += _replayed(model, result, strengths, seed)
    models = [m for m in models if not m.replayed]
    seen: dict = {}  # batches captured for a cutoff, until the tokens are taken from them
    result.cutoffs |= {(m.label, p.name): cutoff_of(m, p.train, seen) for p in problems for m in models}
    lowest = {m.label: min(result.cutoffs[m.label, p.name] for p in problems) for m in models}
    result.owner |= lenders(models, lowest)
    # owners first: others borrow from them
    ordered = sorted(models, key=lambda m: result.owner.get(m.label) != m.label)
    work = [(problem, model) for problem in problems for model in ordered]
    own = {}
    for problem, model in tqdm(work, desc="models and data sets", disable=not progress, leave=False):
        parts = []
        for split in ("train", "test"):
            lender = result.owner.get(model.label)
            places = own.get((problem.name, lender, split)) if lender not in (None, model.label) else None
            source = getattr(problem, split)
            part = classification_tokens(
                model, source, result.cutoffs[model.label, problem.name], draws, seed, places, progress, seen
            )
            own[problem.name, model.label, split] = part
            result.about[part.fingerprint] = part.about
            parts.append(part)
        result.shares[model.label, problem.name] = parts[1].column("is_outlier").double().mean().item()
        rows, right = remembered(
            _about(problem, parts, strengths, seed),
            lambda m=model, p=problem, f=parts: _model_on(m, p, f, strengths, seed),
        )
        found += [row | {"model": model.label} for row in rows]
        result.right |= {(model.label, *key.split("|")): torch.tensor(r).double() for key, r in right.items()}
    found.sort(key=lambda row: labels[row["model"]])  # stable: tasks and tokens stay in their order
    result.table = pd.DataFrame(found).set_index(["model", "task", "token"]).astype({"sd": float})
    return result


@dataclass
class Kept:
    """Columns of a file of measurements, read as `Features` are."""

    columns: dict[str, Tensor]
    fingerprint: str
    about: dict

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def column(self, name: str, rows: Tensor | None = None) -> Tensor:
        return self.columns[name] if rows is None else self.columns[name][rows]


def kept_problem(model, name: str) -> tuple[Problem, list[Kept]]:
    """A labelled set that a replayed model was measured on: (its labels, the columns for training and test)."""
    facts, parts, labels = model.measured["sets"][name], [], []
    for split in ("train", "test"):
        begin = f"set.{name}.{split}."
        columns = {key.removeprefix(begin): model.kept(key) for key in model.tensors if key.startswith(begin)}
        labels.append(columns.pop("labels").long())
        parts.append(Kept(columns, *facts[split]))
    task = Task(name, facts["about"], facts["metric"], *labels, facts["classes"])
    sources = [Source(f"{name}, {len(each)} images", "", [], None) for each in labels]
    return Problem(name, *sources, [task]), parts


def titles(problems, models) -> list[str]:
    """What a figure's scores are of: the problems, and the sets that replayed models were measured on."""
    kept = dict.fromkeys(name for m in models if m.replayed for name in m.measured.get("sets", {}))
    measured = next(m for m in models if m.replayed).label if kept else ""
    return [p.title for p in problems] + ([f"{', '.join(kept)} ({measured} …, replayed)"] if kept else [])


def _replayed(model, result: Classified, strengths, seed: int) -> list[dict]:
    """Rows of the table for a replayed model, computed from its measured features; the rest goes into `result`."""
    found = []
    for name, facts in model.measured.get("sets", {}).items():
        problem, parts = kept_problem(model, name)
        rows, right = _model_on(model, problem, parts, strengths, seed)
        found += [row | {"model": model.label} for row in rows]
        result.right |= {(model.label, *key.split("|")): torch.tensor(r).double() for key, r in right.items()}
        result.about |= {part.fingerprint: part.about for part in parts}
        result.cutoffs[model.label, name] = float("inf") if facts["cutoff"] is None else facts["cutoff"]
        result.owner[model.label], result.shares[model.label, name] = facts["owner"], facts["share"]
    return found


def lenders(models, cutoffs: dict[str, float]) -> dict[str, str]:
    """{model: the model whose outliers' places it is looked at in}: itself, its own base, or the first that has some.

    A model without any lender (no other with outliers on a grid of the same size) is left out.
    """
    grids = {
        m.label: (m.input_size // m.anatomy.patch_size[0], m.input_size // m.anatomy.patch_size[1]) for m in models
    }
    own = [m.label for m in models if cutoffs[m.label] < float("inf")]
    bases = pairs.pairs(models)
    found = {}
    for model in models:
        first = [model.label, bases.get(model.label, ""), *own]
        lender = next((o for o in first if o in own and grids[o] == grids[model.label]), None)
        if lender:
            found[model.label] = lender
    return found


def _about(problem, parts: list, strengths, seed: int) -> dict:
    labels = [[t.name, t.metric, t.paper, t.train.tolist(), t.test.tolist()] for t in problem.tasks]
    return {
        "kind": "classification scores",
        "features": [p.fingerprint for p in parts],
        "labels": hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
        "options": [list(strengths), seed],
        "code": [hashlib.sha256(inspect.getsource(f).encode()).hexdigest() for f in _COMPUTE]
        + [source_sha256(linear.__file__, _lbfgs.__file__, tables_sgd.__file__)],
    }


def _model_on(model, problem, parts: list, strengths, seed: int) -> tuple[list[dict], dict]:
    """(rows of the table, {"task|token": right answers}) for one model on one problem, as plain lists and dicts."""
    kinds = ["cls", "normal", "outlier", "matched", "planted", "register"]
    has = [torch.stack([p.column(f"has_{g}").bool() for g in GROUPS]).all(0) for p in parts]
    if not (has[0].any() and has[1].any()):  # no outliers, own or borrowed: all images, and no such tokens
        has = [torch.ones_like(h) for h in has]
        kinds = ["cls", "normal", "register"]
    rows, right = [], {}
    for task in problem.tasks:
        keep, y, count = usable(task, has)
        for token in kinds:
            if _COLUMN.get(token, token) not in parts[0]:
                continue
            x = [_drawn_tokens(p, token, k) for p, k in zip(parts, keep, strict=True)]
            scored = [one(*(v[:, d] for v in x), *y, task.metric, strengths, seed) for d in range(x[0].shape[1])]
            scores = torch.tensor([s for s, _ in scored], dtype=torch.float64)
            if scored[0][1] is not None:
                right[f"{task.name}|{token}"] = torch.stack([r for _, r in scored]).int().tolist()
            row = {"task": task.name, "token": token, "score": scores.mean().item(), "draws": len(scores)}
            row |= {"sd": scores.std().item() if len(scores) > 1 else None, "classes": count, "metric": task.metric}
            row |= {"train": len(keep[0]), "test": len(keep[1]), "chance": chance(y[1], task.metric)}
            rows.append(row | {"paper": task.paper, "features": " ".join(p.fingerprint[:12] for p in parts)})
    return rows, right


def _drawn_tokens(part, token: str, rows: Tensor) -> Tensor:
    """(images, draws, dim) tokens of a kind; each register is a draw of its own."""
    values = part.column(_COLUMN.get(token, token), rows)
    return values[:, None] if values.ndim == 2 else values


def usable(task, has: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """([training rows, test rows], their labels, number of classes): what of a task is left on the images in `has`.

    Classes without `LEAST` training images are left out, the others renumbered. Raises UserError with fewer than two.
    """
    train, test = task.train, task.test
    if train.ndim == 2:
        keep = [h.nonzero()[:, 0] for h in has]
        counts = train[keep[0]].sum(0)
        some = (counts >= LEAST) & (len(keep[0]) - counts >= LEAST) & test[keep[1]].any(0)
        if not some.any():
            raise UserError(
                f"task {task.name}: no class has {LEAST} training images with and without it: use more images"
            )
        return keep, [train[keep[0]][:, some], test[keep[1]][:, some]], int(some.sum())
    rows = [h & (y >= 0) for h, y in zip(has, (train, test), strict=True)]
    enough = torch.bincount(train[rows[0]], minlength=task.classes) >= LEAST
    if int(enough.sum()) < 2:
        raise UserError(
            f"task {task.name}: {int(enough.sum())} of {task.classes} classes have {LEAST} training images among the "
            f"{int(rows[0].sum())} that are used: two at least are needed, so use more images"
        )
    number = enough.long().cumsum(0) - 1
    keep = [(r & enough[y.clamp(0, len(enough) - 1)]).nonzero()[:, 0] for r, y in zip(rows, (train, test), strict=True)]
    if not len(keep[1]):
        raise UserError(f"task {task.name}: no test image of the {int(enough.sum())} classes is left: use more images")
    return keep, [number[y[k]] for y, k in zip((train, test), keep, strict=True)], int(enough.sum())


def one(x: Tensor, x_test: Tensor, y: Tensor, y_test: Tensor, metric: str, strengths=linear.STRENGTHS, seed: int = 0):
    """(score, right (test images,) or None) of one fit on x (images, dim), chosen on a fifth of it, tested on x_test.

    right is None for several labels an image.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, x_test = (t.to(device) for t in linear.scale(x, x_test))
    validate = held_out(y, seed)
    options = {"tol": 1e-4}
    if metric == "mean average precision":
        options["score"] = tables_sgd.average_precision
    elif metric == "mean per-class accuracy":
        options["score"] = lambda fit, a, b: linear.accuracy(fit, a, b, per_class=True)
    if len(x) > EXACT and y.ndim == 1:
        fit = tables_sgd.fit_selected(x[~validate], y[~validate], x[validate], y[validate], seed=seed)
    else:
        fit = linear.fit_selected(x[~validate], y[~validate], x[validate], y[validate], strengths, **options)
    if y.ndim == 2:
        return float(tables_sgd.average_precision(fit, x_test, y_test)[0]), None
    right = linear.predict(fit, x_test, 0).argmax(-1).cpu() == y_test
    per_class = metric == "mean per-class accuracy"
    return float(linear.accuracy(fit, x_test, y_test, per_class)[0]), right.double()


def chance(y: Tensor, metric: str) -> float:
    """Score of an answer that knows nothing: the commonest class, one in many, the mean share of positives."""
    if metric == "mean average precision":
        return float(y.double().mean())
    if metric == "mean per-class accuracy":
        return 1 / len(y.unique())
    return float(y.bincount().max() / len(y))


_COMPUTE = (_model_on, _drawn_tokens, usable, one, held_out, chance)  # what scores follow from, besides the solvers


def gaps(found: Classified, a: str = "outlier", b: str = "matched", draws: int = 1000, seed: int = 0):
    """Score of token `a` less that of `b` in points: a DataFrame indexed by (model, task) with gap, low, high, sd.

    low, high: the middle 95 % of a bootstrap over test images, paired, of shares of right answers (NaN for average
    precision). sd: the larger standard deviation of the two over draws. Models without one of the tokens are left out.
    """
    import pandas as pd

    rows = {}
    for (model, task), part in found.table.groupby(level=["model", "task"], sort=False):
        part = part.droplevel(["model", "task"])
        if not {a, b} <= set(part.index):
            continue
        low, high = interval(*(found.right.get((model, task, token)) for token in (a, b)), draws, seed)
        gap = 100 * (part.score[a] - part.score[b])
        rows[model, task] = {"gap": gap, "low": low, "high": high, "sd": 100 * part.sd[[a, b]].max()}
    index = pd.MultiIndex.from_tuples(rows, names=["model", "task"])
    return pd.DataFrame(list(rows.values()), index=index, columns=["gap", "low", "high", "sd"])


def interval(a: Tensor | None, b: Tensor | None, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(low, high) in points: the middle 95 % of the difference of right answers (draws, images) over test images.

    A bootstrap; NaN where either is missing, or where they are not of the same images.
    """
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return float("nan"), float("nan")
    return pairs.interval(100 * (a.mean(0) - b.mean(0)), draws, seed)


def over_tasks(gap) -> tuple[float, float, float]:
    """(mean, low, high) of one model's gaps over its tasks: the middle 95 % by Student's t, tasks as the sample."""
    from scipy import stats

    values = gap["gap"]
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * values.std() / n**0.5)
    return mean, mean - half, mean + half


def reported_gaps(paper):
    """The paper's outlier less normal token in points, as `gaps` gives ours: a DataFrame by task with gap and sd."""
    import pandas as pd

    score, sd = (100 * paper[c].unstack("token", sort=False) for c in ("score", "sd"))
    return pd.DataFrame({"gap": score.outlier - score.normal, "sd": sd[["outlier", "normal"]].max(axis=1)})
