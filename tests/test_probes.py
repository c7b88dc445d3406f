"""Probes reach scikit-learn's optimum, find what was planted in tokens, and refuse what they cannot fit."""

import numpy as np
import pytest
import tab02
import tab02_heads
import tables_sgd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreg_lib.probes import _lbfgs, linear, local

SKLEARN = {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 1000}


def clusters(samples=400, dim=12, classes=5, apart=0.7, seed=0, dtype=torch.float32):
    """Overlapping classes with unequal variances and an offset, as features have."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % classes
    spread = torch.arange(1, dim + 1) ** -1.0
    means = torch.randn(classes, dim, generator=generator) * spread * apart
    x = means[y] + torch.randn(samples, dim, generator=generator) * spread + torch.randn(dim, generator=generator)
    return x.to(dtype), y


def sklearn_objective(model, x, y, c):
    from sklearn.metrics import log_loss

    loss = log_loss(y, model.predict_proba(x), normalize=False)
    return c * loss + 0.5 * float((model.coef_**2).sum())


# ---- logistic regression


def real_features():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:400]).float(), torch.from_numpy(y[:400])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", [clusters, real_features])
def test_softmax_reaches_the_optimum_of_scikit_learn(data, dtype):
    from sklearn.linear_model import LogisticRegression

    x, y = data()
    strengths = [1e-5, 1e-2, 1.0, 1e2]
    fit = linear.fit_logistic(x.to(dtype), y, strengths)
    assert fit.converged.all()
    for i, c in enumerate(strengths):
        model = LogisticRegression(C=c, **SKLEARN).fit(x.double().numpy(), y.numpy())
        theirs = sklearn_objective(model, x.double().numpy(), y.numpy(), c)
        gap = float(fit.objective[i]) / theirs - 1
        assert abs(gap) < 1e-4, f"C {c:g}: objective differs by {gap:.2g}"
        right = (model.predict(x.double().numpy()) == y.numpy()).mean()
        assert abs(float(linear.accuracy(fit, x.to(dtype), y)[i]) - right) <= 1.5 / len(x), f"C {c:g}"
        if c < 10:  # where the optimum is sharp the weights agree too
            assert np.abs(fit.weights[i].numpy() - model.coef_).max() < 0.02 * np.abs(model.coef_).max(), f"C {c:g}"


def test_two_classes_and_one_vs_rest_reach_the_optimum_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, y = clusters(classes=4)
    fit = linear.fit_logistic(x, torch.nn.functional.one_hot(y, 4), [0.1, 10.0])
    for i, c in enumerate([0.1, 10.0]):
        models = [LogisticRegression(C=c, **SKLEARN).fit(x.double().numpy(), (y == k).numpy()) for k in range(4)]
        theirs = sum(sklearn_objective(m, x.double().numpy(), (y == k).numpy(), c) for k, m in enumerate(models))
        assert abs(float(fit.objective[i]) / theirs - 1) < 1e-5
        coef = np.concatenate([m.coef_ for m in models])
        assert np.abs(fit.weights[i].numpy() - coef).max() < 0.01 * np.abs(coef).max()


def test_objective_is_that_of_the_weights_returned():
    x, y = clusters(dtype=torch.float64)
    fit = linear.fit_logistic(x, y, [0.3])
    loss = torch.nn.functional.cross_entropy(linear.predict(fit, x, 0), y, reduction="sum")
    assert float(0.3 * loss + fit.weights[0].square().sum() / 2) == pytest.approx(float(fit.objective[0]), rel=1e-9)


def test_a_strength_alone_gives_what_it_gives_in_a_grid():
    x, y = clusters()
    grid = linear.fit_logistic(x, y, [10.0, 1e-3, 1.0])  # any order
    for i, c in enumerate([10.0, 1e-3, 1.0]):
        alone = linear.fit_logistic(x, y, [c])
        assert float(alone.objective[0]) == pytest.approx(float(grid.objective[i]), rel=1e-5)
    assert grid.objective.argmax() == 0 and grid.strengths.tolist() == [10.0, 1e-3, 1.0]


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 5),
    dim=st.integers(1, 6),
    seed=st.integers(0, 999),
    scale=st.floats(-3, 3),
    several=st.booleans(),
    far=st.floats(0, 3),
)
def test_gradient_is_that_of_finite_differences(classes, dim, seed, scale, several, far):
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(20, dim, generator=generator), torch.ones(20, 1)], 1).double() * 10 ** (scale / 3)
    y = torch.arange(20) % classes
    targets = torch.nn.functional.one_hot(y, classes).bool() if several else y
    w = torch.randn(classes, dim + 1, generator=generator).double() * far
    value, gradient, curvature = _lbfgs.evaluate(x, targets, w, 0.2)
    step = torch.randn(classes, dim + 1, generator=generator).double() * 1e-6
    ahead, behind = (_lbfgs.evaluate(x, targets, w + s, 0.2)[0] for s in (step, -step))
    gap = abs((ahead - behind) / 2 - float((gradient * step).sum()))
    assert gap < 1e-6 * float(gradient.norm() * step.norm()) + 1e-14 * abs(value), f"differs by {gap:.2g}"
    assert (curvature >= 0).all() and (curvature <= 0.25 + 1e-9).all()


def test_the_blocks_of_samples_do_not_change_the_value(monkeypatch):
    x, y = clusters(samples=700, dtype=torch.float64)
    w = torch.randn(5, 12, dtype=torch.float64)
    whole = _lbfgs.evaluate(x, y, w, 0.1)
    monkeypatch.setattr(_lbfgs, "BLOCK", 1)
    for a, b in zip(whole, _lbfgs.evaluate(x, y, w, 0.1), strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-12)


def test_separable_classes_with_hardly_any_penalty_end():
    x, y = clusters(samples=60, dim=10, apart=5.0)
    fit = linear.fit_logistic(x, y, linear.DINOV2_STRENGTHS)
    assert torch.isfinite(fit.objective).all() and torch.isfinite(fit.weights).all()
    assert float(linear.accuracy(fit, x, y)[-1]) == 1.0
    assert (fit.objective.diff() > 0).all()  # a larger C weighs the loss more: the optimum can only rise


def test_constant_features_leave_the_class_shares():
    y = torch.tensor([0, 0, 0, 1])
    fit = linear.fit_logistic(torch.ones(4, 3), y, [1.0])
    shares = linear.predict(fit, torch.ones(1, 3), 0).softmax(-1)[0]
    assert torch.allclose(shares, torch.tensor([0.75, 0.25]), atol=1e-3)


def test_selection_takes_the_strongest_penalty_among_equals():
    fit = linear.Fit(
        torch.tensor([10.0, 0.1, 1.0]),
        torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]], [[-1.0], [1.0]]]),
        torch.zeros(3, 2),
        *[torch.zeros(3)] * 2,
    )
    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    assert linear.accuracy(fit, x, y).tolist() == [1, 1, 0]
    chosen = linear.select(fit, x, y)
    assert chosen == 1


def test_mean_of_classes_differs_from_mean_of_samples():
    fit = linear.Fit(torch.ones(1), torch.zeros(1, 2, 1), torch.tensor([[1.0, 0.0]]), *[torch.zeros(1)] * 2)
    y = torch.tensor([0, 0, 0, 1])
    assert float(linear.accuracy(fit, torch.zeros(4, 1), y)) == 0.75
    assert float(linear.accuracy(fit, torch.zeros(4, 1), y, per_class=True)) == 0.5


def test_selected_fit_uses_training_and_validation_data():
    x, y = clusters(samples=600)
    fit = linear.fit_selected(x[:300], y[:300], x[300:400], y[300:400], [1e-4, 1e-1, 1e2])
    assert fit.strengths[0].item() in (1e-4, 1e-1, 1e2) and fit.weights.shape == (1, 5, 12)
    direct = linear.fit_logistic(x[:400], y[:400], fit.strengths)
    assert torch.equal(fit.weights, direct.weights)


def test_average_precision_by_hand():
    fit = linear.Fit(torch.ones(1), torch.eye(2)[None], torch.zeros(1, 2), *[torch.zeros(1)] * 2)
    x = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[1, 0], [0, 0], [1, 0]])  # ranks 1 and 3: (1/1 + 2/3) / 2; second class never present
    assert float(tables_sgd.average_precision(fit, x, y)) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 0, 2, 2])}, r"classes \[1\] of 3 have no sample"),
        ({"y": torch.zeros(4, dtype=torch.long)}, "two classes at least"),
        ({"y": torch.tensor([-1, 0, 1, 1])}, "start at 0"),
        ({"x": torch.tensor([[0.0], [1.0], [float("nan")], [0.0]])}, r"in 1 of 4 rows, first \[2\]"),
        ({"x": torch.zeros(3, 1)}, "with a label each"),
        ({"strengths": [0.0]}, "positive"),
        ({"y": torch.tensor([[1, 0], [0, 0], [1, 0], [1, 0]])}, r"classes \[1\] have only one value"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    options = {"x": torch.tensor([[0.0], [1.0], [2.0], [3.0]]), "y": torch.tensor([0, 0, 1, 1]), "strengths": [1.0]}
    with pytest.raises(ValueError, match=message):
        linear.fit_logistic(**options | change)


# ---- ridge regression and splits


def test_ridge_equals_scikit_learn():
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator, dtype=torch.float64) + 2
    y = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    fit = linear.fit_ridge(x, y, [0.01, 1.0, 100.0])
    for i, alpha in enumerate([0.01, 1.0, 100.0]):
        model = Ridge(alpha=alpha, solver="cholesky").fit(x.numpy(), y.numpy())
        assert np.abs(linear.predict(fit, x, i).numpy() - model.predict(x.numpy())).max() < 1e-9


def test_ridge_without_penalty_recovers_a_linear_map_from_redundant_features():
    x = torch.randn(50, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)  # a column twice
    y = x[:, :3] @ torch.tensor([[1.0], [2.0], [-1.0]]).double() + 4
    fit = linear.fit_ridge(x, y, [0.0])
    assert torch.allclose(linear.predict(fit, x, 0), y, atol=1e-9)
    assert torch.allclose(fit.weights[0, 0], torch.tensor([0.5, 2, -1, 0.5]).double(), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(images=st.integers(3, 40), each=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_image_is_in_two_parts_and_no_part_is_empty(images, each, seed):
    ids = torch.arange(images).repeat_interleave(each) * 7 + 3
    part = linear.split_by_image(ids, seed=seed)
    assert sorted(part.unique().tolist()) == [0, 1, 2]
    assert all(len(part[ids == i].unique()) == 1 for i in ids.unique())


def test_split_of_100_images_is_64_16_20():
    part = linear.split_by_image(torch.arange(100))
    assert [(part == i).sum().item() for i in range(3)] == [64, 16, 20]
    with pytest.raises(ValueError, match="2 images cannot be split in 3 parts"):
        linear.split_by_image(torch.tensor([1, 1, 2]))


# ---- local probes


def planted_tokens(images=80, grid=(3, 4), seed=0):
    """Tokens that hold their place and pixels; one random "outlier" an image holds neither, but is 20 times as long."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    places = torch.arange(n).repeat(images)
    ids = torch.arange(images).repeat_interleave(n)
    pixels = torch.randn(images * n, 4, generator=generator)
    code = torch.nn.functional.one_hot(places, n).float()
    noise = torch.randn(images * n, n + 4, generator=generator)
    tokens = torch.cat([code, pixels], 1) + 0.1 * noise
    outlier = torch.zeros(images * n, dtype=torch.bool)
    outlier[torch.arange(images) * n + torch.randint(n, (images,), generator=generator)] = True
    tokens[outlier] = 20 * noise[outlier] / noise[outlier].norm(dim=1, keepdim=True)
    groups = {
        "normal": ~outlier,
        "outlier": outlier,
        "half": ~outlier & (torch.rand(len(ids), generator=generator) < 0.5),
    }
    return tokens, places, pixels, ids, groups


def test_position_is_found_in_normal_tokens_and_lost_in_planted_outliers():
    tokens, places, _, ids, groups = planted_tokens()
    table = local.position_probe(tokens, places, (3, 4), groups, ids).set_index(["group", "fit"])
    assert table.loc[("normal", "normal"), "accuracy"] > 0.97 and table.loc[("normal", "normal"), "distance"] < 0.05
    assert (table.loc["outlier", "accuracy"] < 0.5).all() and (table.loc["outlier", "distance"] > 0.8).all()
    assert table.loc[("normal", "normal"), "accuracy"] == table.loc[("normal", "own"), "accuracy"]
    assert table.loc[("half", "own"), "accuracy"] > 0.95
    assert len(table) == 9 and (table["test"] > 0).all()


def test_a_group_that_only_its_own_fit_can_read():
    """Place is written in other dimensions of the loud tokens: what never saw them fails, their own fit does not."""
    tokens, places, _, ids, groups = planted_tokens()
    loud = groups["outlier"]
    code = torch.nn.functional.one_hot(places, 12).float().roll(1, 1)  # the same axes, other meaning
    tokens = torch.cat([tokens, torch.zeros(len(tokens), 1)], 1)
    tokens[loud] = torch.cat([5 * code, torch.zeros(len(code), 4), torch.full((len(code), 1), 20.0)], 1)[loud]
    table = local.position_probe(tokens, places, (3, 4), groups, ids).set_index(["group", "fit"])
    assert table.loc[("outlier", "normal"), "accuracy"] < 0.2
    assert table.loc[("outlier", "own"), "accuracy"] > 0.9


def test_outliers_at_one_place_show_that_their_place_is_known_beforehand():
    tokens, places, _, ids, groups = planted_tokens()
    corners = (places == 0) | (places == 11)
    groups = {"normal": ~corners, "outlier": corners}
    row = local.position_probe(tokens, places, (3, 4), groups, ids).set_index(["group", "fit"]).loc["outlier"]
    assert np.allclose(row["chance"], 0.5) and row.loc["own", "places"] == 2 and row.loc["normal", "places"] == 10
    assert row.loc["normal", "accuracy"] == 0  # that fit does not know these places


def test_distance_is_in_grid_cells():
    """One feature that tells the column only: the row is guessed, and the distance is that of rows."""
    ids = torch.arange(60).repeat_interleave(8)
    places = torch.arange(8).repeat(60)
    tokens = torch.nn.functional.one_hot(places % 4, 4).float()
    group = {"normal": torch.ones(480, dtype=torch.bool)}
    row = local.position_probe(tokens, places, (2, 4), group, ids).iloc[0]
    assert row["accuracy"] == 0.5 and row["distance"] == 0.5


def test_pixels_are_redrawn_from_normal_tokens_only():
    tokens, _, pixels, ids, groups = planted_tokens()
    table = local.reconstruction_probe(tokens, pixels, groups, ids).set_index(["group", "fit"])
    assert table.loc[("normal", "normal"), "relative"] < 0.15
    assert table.loc[("outlier", "own"), "relative"] > 0.9 and table.loc[("outlier", "all"), "relative"] > 0.9
    assert 1.6 < table.loc[("outlier", "own"), "l2"] < 2.2  # the mean length of 4 standard normal values is 1.88


def test_an_empty_group_gives_nan_not_an_error():
    tokens, places, pixels, ids, groups = planted_tokens(images=20)
    groups = {"normal": groups["normal"], "outlier": torch.zeros_like(groups["normal"])}
    for table in (
        local.position_probe(tokens, places, (3, 4), groups, ids),
        local.reconstruction_probe(tokens, pixels, groups, ids),
    ):
        rows = table[table["group"] == "outlier"]
        assert len(rows) == 3 and (rows["test"] == 0).all() and rows.iloc[:, 4:].isna().all(axis=None)


@pytest.mark.parametrize("size, high, wide", [(2, 2, 2), ((2, 2), 2, 2), ((2, 3), 2, 3), ((1, 2), 1, 2)])
def test_patch_pixels_are_those_of_the_patch(size, high, wide):
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches, cols = local.patch_pixels(images, size), 6 // wide
    assert patches.shape == (2, 4 // high * cols, 3 * high * wide)
    second = images[1, :, high : 2 * high, wide : 2 * wide]  # of the second row and column
    assert torch.equal(patches[1, cols + 1], second.flatten())
    for wrong in (4, (2, 4), (3, 2)):
        with pytest.raises(ValueError, match="whole patches of"):
            local.patch_pixels(images, wrong)


def test_local_probes_refuse_what_does_not_belong_together():
    tokens, places, pixels, ids, groups = planted_tokens(images=5)
    with pytest.raises(ValueError, match="no group named 'normal'"):
        local.position_probe(tokens, places, (3, 4), {"all": groups["normal"]}, ids)
    with pytest.raises(ValueError, match=r"60 tokens, but \{'outlier': 3\}"):
        local.position_probe(tokens, places, (3, 4), {"normal": groups["normal"], "outlier": torch.ones(3)}, ids)
    with pytest.raises(ValueError, match="positions must lie in 0…5"):
        local.position_probe(tokens, places, (2, 3), groups, ids)
    with pytest.raises(ValueError, match="NaN"):
        local.position_probe(tokens / 0, places, (3, 4), groups, ids)
    with pytest.raises(ValueError, match="59 patches"):
        local.reconstruction_probe(tokens, pixels[:59], groups, ids)


# ---- dense probes


def dense_scene(images=12, grid=(4, 6), classes=3, seed=0):
    """Tokens that hold the class of their patch; masks of 4x4 pixels a patch."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (images, grid[0] * grid[1]), generator=generator)
    label[:, : grid[1]] = 0
    tokens = (
        torch.nn.functional.one_hot(label, classes).float() * 30 + torch.randn(images, len(label[0]), classes) * 0.1
    )
    masks = label.reshape(images, *grid).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return tokens, label, masks


def mean_iou(predicted, masks, num_classes):
    return tab02.SCORE["miou"](tab02.iou_parts(predicted, masks, num_classes)[None]).item()


def test_segmentation_reads_the_class_of_patches():
    tokens, label, masks = dense_scene()
    head = tab02_heads.fit_segmentation(tokens[:8], (4, 6), masks[:8], 3, steps=80, lr=0.05)
    assert not head.training
    low = tab02_heads.predict_segmentation(head, tokens[8:], (4, 6), (4, 6))
    assert (low.flatten(1) == label[8:]).float().mean() > 0.98
    full = tab02_heads.predict_segmentation(head, tokens[8:], (4, 6), (16, 24))
    assert mean_iou(full, masks[8:], 3) > 0.7
    again = tab02_heads.fit_segmentation(tokens[:8], (4, 6), masks[:8], 3, steps=80, lr=0.05)
    assert torch.equal(head.linear.weight, again.linear.weight)


def test_pixels_without_label_do_not_count():
    tokens, _, masks = dense_scene()
    wrong = masks.clone()
    wrong[:, :4] = 255  # the first row of patches, which is all class 0
    clean = tab02_heads.fit_segmentation(tokens, (4, 6), wrong, 3, steps=20)
    assert torch.isfinite(clean.linear.weight).all()
    predicted = masks.clone()
    predicted[:, :4] = 2
    assert mean_iou(predicted, wrong, 3) == 1.0
    empty = torch.full_like(masks, 255)
    empty[0] = masks[0]  # batches without any label must not give NaN
    assert torch.isfinite(
        tab02_heads.fit_segmentation(tokens, (4, 6), empty, 3, steps=5, batch_size=1).linear.bias
    ).all()


def test_mean_iou_by_hand():
    masks = torch.tensor([[[0, 0, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 1]]])
    assert mean_iou(predicted, masks, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou(predicted, masks, 7) == pytest.approx((1 / 2 + 2 / 3) / 2)  # absent classes are left out
    masks[0, 0, 0] = 255
    assert mean_iou(predicted, masks, 2) == pytest.approx((0 + 2 / 3) / 2)


def test_depth_is_read_from_tokens():
    generator = torch.Generator().manual_seed(0)
    depths = torch.rand(12, 4, 6, generator=generator) * 4 + 1
    smooth = torch.nn.functional.interpolate(depths[:, None], (16, 24), mode="bilinear")[:, 0]
    tokens = torch.cat([depths.reshape(12, 24, 1), torch.randn(12, 24, 3, generator=generator) * 0.1], 2)
    head = tab02_heads.fit_depth(tokens[:8], (4, 6), smooth[:8], steps=120, lr=0.05)
    found = tab02_heads.predict_depth(head, tokens[8:], (4, 6), (16, 24))
    guesses = found, smooth[:8].mean().expand(4, 16, 24)
    error, flat = (tab02_heads.image_rmse(guess, smooth[8:]).mean() for guess in guesses)
    assert found.shape == (4, 16, 24) and error < 0.5 * flat, f"RMSE {error:.3f}, of a constant {flat:.3f}"


def test_depth_of_bins_by_hand():
    maps = torch.full((1, 256, 2, 3), -1.0)
    assert torch.allclose(
        tab02_heads.bin_depth(maps, 0.0, 10.0), torch.full((1, 8, 12), 5.0)
    )  # all bins alike: the middle
    maps[:, 200] = 1e6
    assert torch.allclose(tab02_heads.bin_depth(maps, 0.0, 10.0), torch.full((1, 8, 12), 200 / 255 * 10), atol=1e-3)


def test_depth_loss_by_hand():
    d = torch.tensor([1.0, 2.0, 4.0])
    assert float(tab02_heads.log_depth_loss(d, d)) < 1e-5
    twice = float(tab02_heads.log_depth_loss(2 * d, d, eps=0.0))
    assert twice == pytest.approx(0.15**0.5 * np.log(2), rel=1e-4)  # a wrong scale costs only the mean's share


def test_rmse_is_of_the_valid_pixels_of_each_image():
    depths = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]], [[0.0, float("nan")]]])
    predicted = torch.tensor([[[3.0, 9.0]], [[2.0, 2.0]], [[1.0, 1.0]]])
    error = tab02_heads.image_rmse(predicted, depths)
    assert error[:2].tolist() == [2.0, 0.0] and error[2].isnan()  # the third has no depth


def test_cls_stands_beside_every_patch():
    both = tab02_heads.with_cls(torch.zeros(2, 5, 3), torch.ones(2, 3))
    assert both.shape == (2, 5, 6) and both[..., 3:].eq(1).all() and both[..., :3].eq(0).all()


def test_dense_probes_refuse_what_they_cannot_fit():
    tokens, _, masks = dense_scene()
    with pytest.raises(ValueError, match="drop the prefix tokens"):
        tab02_heads.fit_segmentation(torch.zeros(12, 25, 3), (4, 6), masks, 3)
    with pytest.raises(ValueError, match="at least two classes"):
        tab02_heads.fit_segmentation(tokens, (4, 6), torch.zeros_like(masks), 3)
    with pytest.raises(ValueError, match="out of range for 2 classes"):
        tab02_heads.fit_segmentation(tokens, (4, 6), masks, 2)
    with pytest.raises(ValueError, match="tokens of image 0 hold NaN"):
        tab02_heads.fit_segmentation(tokens * float("nan"), (4, 6), masks, 3)
    with pytest.raises(ValueError, match="labels must be"):
        tab02_heads.fit_segmentation(tokens, (4, 6), masks[:3], 3)
    with pytest.raises(ValueError, match="check the unit of the depths"):
        tab02_heads.fit_depth(tokens, (4, 6), torch.zeros(12, 16, 24))
