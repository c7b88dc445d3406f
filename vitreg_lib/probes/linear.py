"""Linear probes on frozen features: logistic regression over a whole grid of strengths at once, and ridge regression.

Answers "how much can be read off this token linearly?" (Tables 1, 2a, 4, 6). The objective is scikit-learn's:
`C * sum of losses + |W|^2 / 2`, the bias not penalised, so `strengths` are its `C` and the optimum is the same.
Features are used as they come; `scale` them first when models are compared whose features differ in size.

All strengths are fitted in one call, on the device of the features, as one path (see `_lbfgs`). Features are centred
(the bias takes that up) and rotated to their principal axes: the same optimum, reached sooner.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base import UserError
from ._lbfgs import path

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # for features that `scale` brought to one size
MAX_ITERATIONS = 1000  # of one fit
PARTS = (0.64, 0.16, 0.2)  # shares of the images in training, validation and test
FOLDS = 5  # parts of the images of which each is the test once
DINOV2_STRENGTHS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))  # the grid of DINOv2's own evaluation code


@dataclass
class Fit:
    """Fitted weights (strengths, outputs, dim) and biases (strengths, outputs); of logistic regression also how the fit
    of each strength ended."""

    strengths: Tensor
    weights: Tensor
    biases: Tensor
    objective: Tensor | None = None  # C * sum of losses + |W|^2 / 2
    converged: Tensor | None = None


def fit_logistic(x: Tensor, y: Tensor, strengths=DINOV2_STRENGTHS, tol: float = 1e-6, decades=0.5) -> Fit:
    """The optimum of logistic regression for every strength, on the device of `x`, in float32 or the float64 of `x`.

    x (samples, dim); y (samples,) class numbers for one multinomial model, or (samples, classes) of 0 and 1 for an
    independent binary model per class; strengths: `C` as in scikit-learn, larger is weaker regularisation. A fit stops
    at an estimated distance `tol` from the optimum, relative to the objective. decades: length of a step of the path.
    Raises ValueError for NaN or infinite features, fewer than two classes, a class without samples, a strength <= 0.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    targets = _check(x, y)
    c = torch.as_tensor(strengths, dtype=torch.float64).flatten()
    if not len(c) or not bool((torch.isfinite(c) & (c > 0)).all()):
        raise ValueError(f"strengths must be positive numbers, got {c.tolist()}")
    centre = x.double().mean(0)
    centred = x.double() - centre
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    rotated = torch.cat([(centred @ axes).to(dtype), x.new_ones(len(x), 1, dtype=dtype)], 1)
    variance = torch.cat([variance.clamp_min(0), variance.new_ones(1)]).to(dtype)
    fits = path(rotated, targets, c.tolist(), variance, MAX_ITERATIONS, tol, decades)
    params = torch.stack([fit[0] for fit in fits]).double()
    weights = params[..., :-1] @ axes.T
    biases = params[..., -1] - weights @ centre
    objective = torch.tensor([fit[1] for fit in fits], dtype=torch.float64) * c * len(x)
    return Fit(c, weights.to(dtype), biases.to(dtype), objective, torch.tensor([fit[2] for fit in fits]))


def fit_ridge(x: Tensor, y: Tensor, strengths=(1.0,)) -> Fit:
    """Closed-form ridge regression for every strength: least `sum |y - Wx - b|^2 + strength * |W|^2`.

    x (samples, dim), y (samples, outputs) or (samples,); computed in float64, returned in the dtype of x. One
    eigendecomposition serves all strengths; directions without variance get no weight, so strength 0 is the
    least-norm solution. Raises ValueError for NaN or infinite values, or a negative strength.
    """
    y = y[:, None] if y.ndim == 1 else y
    alphas = torch.as_tensor(strengths, dtype=torch.float64).flatten().to(x.device)
    _check_finite(x, "features")
    _check_finite(y, "targets")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} samples but {len(y)} targets")
    if bool((alphas < 0).any()):
        raise ValueError(f"ridge strengths must not be negative, got {alphas.tolist()}")
    x64, y64 = x.double(), y.double()
    centre, mean = x64.mean(0), y64.mean(0)
    xc = x64 - centre
    values, axes = torch.linalg.eigh(xc.T @ xc)
    cross = axes.T @ (xc.T @ (y64 - mean))  # (dim, outputs)
    floor = values.max().clamp_min(1e-300) * len(values) * torch.finfo(torch.float64).eps
    gain = torch.where(values > floor, 1 / (values + alphas[:, None]).clamp_min(1e-300), 0)  # (strengths, dim)
    weights = (axes @ (gain[:, :, None] * cross)).transpose(1, 2)
    biases = mean - weights @ centre
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return Fit(alphas.cpu(), weights.to(dtype), biases.to(dtype))


def predict(fit: Fit, x: Tensor, index: int) -> Tensor:
    """Logits or values (samples, outputs) for the strength `index`."""
    return x.to(fit.weights.dtype) @ fit.weights[index].T + fit.biases[index]


def accuracy(fit: Fit, x: Tensor, y: Tensor, per_class: bool = False) -> Tensor:
    """Top-1 accuracy (strengths,), 0 to 1; with `per_class` the mean of the accuracies of the classes present in y."""
    y = y.to(x.device)
    right = torch.stack([predict(fit, x, i).argmax(-1) == y for i in range(len(fit.strengths))]).double()
    if per_class:
        right = torch.stack([right[:, y == label].mean(1) for label in y.unique()], 1)
    return right.mean(1).cpu()


def select(fit: Fit, x: Tensor, y: Tensor, score=accuracy) -> int:
    """Index of the best score; of equal ones, that of the strongest regularisation (ours, for stability)."""
    scores = score(fit, x, y)
    best = torch.nonzero(scores == scores.max()).flatten()
    return int(best[fit.strengths[best].argmin()])


def fit_selected(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, strengths=DINOV2_STRENGTHS, score=accuracy, **options
):
    """A `Fit` of one strength, chosen by `score` on validation data, on training and validation data.

    This is DINOv2's protocol for small data sets. options: of `fit_logistic`.
    """
    best = strengths[select(fit_logistic(x, y, strengths, **options), x_val, y_val, score)]
    return fit_logistic(torch.cat([x, x_val]), torch.cat([y, y_val]), [best], **options)


def scale(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All tensors divided by one number, the root mean square of the centred first: strengths then mean the same."""
    size = spread(x)
    return tuple(t / size for t in (x, *others))


def spread(x: Tensor) -> Tensor:
    """The number that `scale` divides by: the root mean square of the centred features (n, dim)."""
    return (x - x.mean(0)).square().mean().sqrt().clamp_min(1e-12)


def split_by_image(image_ids: Tensor, seed: int = 0, fold: int = 0) -> Tensor:
    """The part (0 train, 1 validation, 2 test) of each token, (tokens,); all tokens of an image fall in one part.

    fold: the same images in the same order, another fifth of them for the test: the tests of folds 0 to 4 share none.
    Raises ValueError when there are fewer images than parts.
    """
    ids, inverse = torch.unique(image_ids.cpu(), return_inverse=True)
    if len(ids) < len(PARTS):
        raise ValueError(f"{len(ids)} images cannot be split in {len(PARTS)} parts: give at least one image a part")
    bounds = (np.cumsum(PARTS) * len(ids)).round().astype(int)
    for i in range(len(PARTS)):  # no part empty
        bounds[i] = min(max(bounds[i], i + 1), len(ids) - (len(PARTS) - 1 - i))
    rank = torch.empty(len(ids), dtype=torch.long)
    rank[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))] = torch.arange(len(ids))
    rank = (rank + len(ids) * fold // FOLDS) % len(ids)
    return torch.bucketize(rank, torch.as_tensor(bounds), right=True)[inverse].to(image_ids.device)


def _check(x, y):
    """Targets as the solver wants them: class numbers (samples,), or bool (samples, classes)."""
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"features must be (samples, dim) with a label each, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    _check_finite(x, "features")
    y = y.to(x.device)
    if y.ndim == 2:
        counts = torch.stack([y.bool().sum(0), (~y.bool()).sum(0)]).amin(0)
        if not bool((counts > 0).all()):
            raise ValueError(f"classes {_few(counts == 0)} have only one value in the samples: leave them out")
        return y.bool()
    y = y.long()
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"class numbers start at 0, got {int(y.min())}")
    counts = torch.bincount(y)
    if int((counts > 0).sum()) < 2:
        raise ValueError(f"logistic regression needs two classes at least, the labels hold {int((counts > 0).sum())}")
    if not bool((counts > 0).all()):
        raise ValueError(
            f"classes {_few(counts == 0)} of {len(counts)} have no sample: renumber the labels or add samples"
        )
    return y


def _check_finite(x: Tensor, what: str) -> None:
    bad = ~torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x)
    if bad.any():
        raise ValueError(f"{what} hold NaN or infinite values in {int(bad.sum())} of {len(x)} rows, first {_few(bad)}")


def _few(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten()[:5].tolist()


def held_out(y: Tensor, seed: int, share: float = 0.2) -> Tensor:
    """(images,) which are held out for validation: a share of every class, at random; of the images for many labels."""
    generator = torch.Generator().manual_seed(seed)
    if y.ndim == 2:
        for _ in range(100):  # both values of every class in both parts
            held = torch.rand(len(y), generator=generator) < share
            if all(bool(((part > 0).any(0) & (part == 0).any(0)).all()) for part in (y[held], y[~held])):
                return held
        raise UserError("some class has too few images with it to hold any out: use more images")
    order = torch.randperm(len(y), generator=generator)
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        mine = order[y[order] == label]
        held[mine[: max(1, int(share * len(mine)))]] = True
    return held
