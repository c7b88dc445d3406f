"""DINOv2's SGD protocol against torch's own optimiser, and against the optimum by L-BFGS."""

from __future__ import annotations

import itertools

import pytest
import tables_sgd as sgd
import torch

from vitreg_lib.probes import linear


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(120) % 4
    means = torch.randn(4, 10, generator=generator)
    return means[y] + torch.randn(120, 10, generator=generator), y


def test_every_rate_walks_as_torchs_sgd_does(data):
    x, y = data
    rates, steps = (0.01, 0.3), 25
    fit = sgd.fit_sgd(sgd.batches(x, y, 32, seed=3), steps, 10, 4, rates, penalty=0.02, seed=1)
    for i, rate in enumerate(rates):
        layer = torch.nn.Linear(10, 4)
        with torch.no_grad():
            layer.weight.copy_(0.01 * torch.randn(4, 10, generator=torch.Generator().manual_seed(1)))
            layer.bias.zero_()
        groups = [{"params": [layer.weight], "weight_decay": 0.02}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=rate * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for a, b in itertools.islice(sgd.batches(x, y, 32, seed=3), steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(a), b).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(fit.weights[i], layer.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fit.biases[i], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_it_converges_to_the_optimum_of_logistic_regression(data):
    x, y = data
    c = 0.05
    best = linear.fit_logistic(x, y, [c], tol=1e-9)
    fit = sgd.fit_sgd(sgd.batches(x, y, len(x)), 1500, 10, 4, [1.0], penalty=1 / (c * len(x)))

    def objective(w, b):
        loss = torch.nn.functional.cross_entropy(x @ w.T + b, y, reduction="sum")
        return float(c * loss + 0.5 * w.square().sum())

    ours, optimum = objective(fit.weights[0], fit.biases[0]), objective(best.weights[0], best.biases[0])
    assert ours == pytest.approx(optimum, rel=1e-5)
    torch.testing.assert_close(fit.weights[0], best.weights[0].float(), atol=2e-3, rtol=1e-2)
    assert float(linear.accuracy(fit, x, y)[0]) == pytest.approx(float(linear.accuracy(best, x, y)[0]), abs=0.01)


def test_the_rate_is_chosen_on_validation_data(data):
    x, y = data
    fit = sgd.fit_selected(x[:80], y[:80], x[80:], y[80:], steps=60, batch_size=30, rates=(1e-6, 0.5))
    assert fit.strengths.tolist() == [0.5] and fit.weights.shape == (1, 4, 10)


def test_bad_input_is_named(data):
    x, y = data
    with pytest.raises(ValueError, match="NaN or infinite values in batch 0"):
        sgd.fit_sgd([(x.index_fill(0, torch.tensor([3]), float("nan")), y)], 1, 10, 4)
    with pytest.raises(ValueError, match="label 3 is out of range for 3 classes"):
        sgd.fit_sgd([(x, y)], 1, 10, 3)
    with pytest.raises(ValueError, match="1 batches were given for 5 steps"):
        sgd.fit_sgd([(x, y)], 5, 10, 4)
