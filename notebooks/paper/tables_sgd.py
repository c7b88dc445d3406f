"""DINOv2's linear protocol for ImageNet-size data: a linear layer by SGD, for a grid of learning rates at once.

Its evaluation code [recall]: SGD with momentum 0.9, no weight decay, batches of 1024 for 12,500 steps, cosine decay to
0, 13 learning rates (`LEARNING_RATES`, for 256 images a batch, scaled with the batch), weights drawn with deviation
0.01; cls of the last one or four blocks with or without the mean patch. The rate is chosen on held-out images (there on
the validation set itself). Ours: features are extracted once, without the random crops and flips of the original; one
pass over the data serves all rates, each a parameter group of torch's own optimiser.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from vitreg_lib.probes.linear import accuracy, predict

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass
class SgdFit:
    """Weights (rates, classes, dim) and biases (rates, classes), for `linear.predict` and `linear.accuracy`.

    strengths: the learning rates as given, unscaled. losses: (steps, rates), mean loss of each step's batch.
    """

    strengths: Tensor
    weights: Tensor
    biases: Tensor
    losses: Tensor


def fit_sgd(
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    dim: int,
    num_classes: int,
    rates=LEARNING_RATES,
    momentum: float = 0.9,
    penalty: float = 0.0,
    device: str = "cpu",
    seed: int = 0,
) -> SgdFit:
    """Softmax regression by SGD with momentum for every rate, on the first `steps` batches of (x (n, dim), y (n,)).

    penalty: adds penalty / 2 * |W|^2 to the mean loss, the bias left free (0 in the protocol; 1 / (C n) is
    scikit-learn's). Rates are multiplied by batch size / 256 and fall to 0 by half a cosine. Raises ValueError for NaN
    features, a label out of range, or fewer batches than steps.
    """
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(num_classes, dim, generator=generator).to(device)
    weights = [nn.Parameter(start.clone()) for _ in rates]
    biases = [nn.Parameter(torch.zeros(num_classes, device=device)) for _ in rates]
    groups = [{"params": [w], "rate": rate, "weight_decay": penalty} for w, rate in zip(weights, rates, strict=True)]
    groups += [{"params": [b], "rate": rate} for b, rate in zip(biases, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    losses = []
    for x, y in itertools.islice(batches, steps):
        x, y = x.to(device).float(), y.to(device).long()
        _check(x, y, num_classes, len(losses))
        for group in optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * len(losses) / steps))
            group["lr"] = group["rate"] * len(y) / 256 * fall
        optimizer.zero_grad()
        with torch.enable_grad():
            each = torch.stack([cross_entropy(linear(x, w, b), y) for w, b in zip(weights, biases, strict=True)])
            each.sum().backward()  # no rate sees another's loss
        optimizer.step()
        losses.append(each.detach().cpu())
    if len(losses) < steps:
        raise ValueError(f"{len(losses)} batches were given for {steps} steps")
    fitted = (torch.stack([p.detach() for p in params]) for params in (weights, biases))
    return SgdFit(torch.as_tensor(rates, dtype=torch.float32), *fitted, torch.stack(losses))


def _check(x: Tensor, y: Tensor, num_classes: int, batch: int) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"features hold NaN or infinite values in batch {batch}")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise ValueError(f"label {int(y.max())} is out of range for {num_classes} classes (0…{num_classes - 1})")


def batches(x: Tensor, y: Tensor, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of tensors in memory, epoch after epoch, whole ones only where there is one."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(x))
    while True:
        order = torch.randperm(len(x), generator=generator)
        for i in range(0, len(order) - size + 1, size):
            rows = order[i : i + size].to(x.device)
            yield x[rows], y[rows.to(y.device)]


def fit_selected(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, steps: int = 12_500, batch_size: int = 1024, **options
):
    """The `SgdFit` of the rate that is best on validation data, alone; features in memory on their device."""
    dim, classes = x.shape[1], int(max(y.max(), y_val.max())) + 1
    seed = options.get("seed", 0)
    fit = fit_sgd(batches(x, y, batch_size, seed), steps, dim, classes, device=str(x.device), **options)
    best = [int(accuracy(fit, x_val, y_val).argmax())]
    return SgdFit(fit.strengths[best], fit.weights[best], fit.biases[best], fit.losses[:, best])


def average_precision(fit, x: Tensor, y: Tensor) -> Tensor:
    """Mean average precision (strengths,) for several labels an image, y (samples, classes) of 0 and 1 (Table 1, VOC).

    Classes without a positive sample are left out.
    """
    from sklearn.metrics import average_precision_score

    truth = y.cpu().numpy()
    seen = truth.any(0)
    if not seen.any():
        raise ValueError("no positive label in y: average precision is not defined")
    scores = [predict(fit, x, i).cpu().numpy()[:, seen] for i in range(len(fit.strengths))]
    return torch.tensor([average_precision_score(truth[:, seen], s) for s in scores], dtype=torch.float64)
