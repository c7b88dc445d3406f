"""LOST equals its paper's algorithm written out in loops, box by box; CorLoc and TokenCut on cases known by hand."""

import lost_sweep
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreg_lib.measure import objects as L


def naive_lost(f, grid, k, bias=0.0, variant="paper"):
    """Eq. 1 to 3 for one image in plain loops: (box, seed, tied, degrees, S, mask)."""
    rows, cols = grid
    n = rows * cols
    f = f.double().tolist()
    gram = [[sum(a * b for a, b in zip(f[p], f[q], strict=True)) + bias for q in range(n)] for p in range(n)]
    positive = (lambda v: v > 0) if variant == "code" else (lambda v: v >= 0)
    degrees = []
    for p in range(n):
        degrees.append(sum(1 for q in range(n) if positive(gram[p][q]) and not (variant == "code" and p == q)))
    order = sorted(range(n), key=lambda p: (degrees[p], p))
    seed = order[0]
    chosen = [q for q in order[:k] if q == seed or positive(gram[seed][q])]
    mask = [positive(sum(gram[s][q] for s in chosen)) for q in range(n)]
    todo, part = [seed], {seed}
    while todo and mask[seed]:
        r, c = divmod(todo.pop(), cols)
        for i, j in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            q = i * cols + j
            if 0 <= i < rows and 0 <= j < cols and mask[q] and q not in part:
                part.add(q)
                todo.append(q)
    r, c = [q // cols for q in part], [q % cols for q in part]
    box = [min(c), min(r), max(c) + 1, max(r) + 1]
    return box, seed, degrees.count(degrees[seed]), degrees, sorted(chosen), mask


def whole_features(generator, batch, patches, dim):
    """Small whole numbers: Gram matrices are exact, so zeros and ties are met and must be treated alike."""
    return torch.randint(-2, 3, (batch, patches, dim), generator=generator).float()


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("kind", ["whole", "normal"])
def test_boxes_equal_the_naive_algorithm(variant, kind):
    generator = torch.Generator().manual_seed(3)
    for grid, k, bias, dim in [((5, 6), 8, 0.0, 3), ((4, 7), 100, -1.0, 4), ((6, 5), 1, 0.5, 2), ((1, 9), 4, 0.0, 1)]:
        n = grid[0] * grid[1]
        features = whole_features(generator, 40, n, dim)
        if kind == "normal":
            features = torch.randn(40, n, dim, generator=generator, dtype=torch.float64)
        found = L.lost(features, grid, k=k, bias=bias, variant=variant, intermediates=True)
        for i in range(len(features)):
            box, seed, tied, degrees, chosen, mask = naive_lost(features[i], grid, k, bias, variant)
            assert found.degrees[i].flatten().tolist() == degrees
            assert (int(found.seeds[i]), int(found.tied_seeds[i])) == (seed, tied)
            assert found.selected[i].flatten().nonzero().flatten().tolist() == chosen
            assert found.mask[i].flatten().tolist() == mask
            assert found.boxes[i].tolist() == box, f"image {i} of {grid}, k {k}, bias {bias}"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    dim=st.integers(1, 5),
    k=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_the_naive_algorithm(rows, cols, dim, k, seed):
    features = whole_features(torch.Generator().manual_seed(seed), 2, rows * cols, dim)
    found = L.lost(features, (rows, cols), k=k)
    assert found.boxes.tolist() == [naive_lost(f, (rows, cols), k)[0] for f in features]


def one_object(rows=6, cols=8, box=(2, 1, 5, 4)):
    """Background along one axis, an object with the opposite direction: LOST must return its box."""
    f = torch.tensor([1.0, 0.1]).repeat(rows, cols, 1)
    left, top, right, bottom = box
    f[top:bottom, left:right] = torch.tensor([-1.0, 0.1])
    return f.reshape(1, rows * cols, 2), (rows, cols), list(box)


@pytest.mark.parametrize("variant", ["paper", "code", ("strict",), ("no_self",)])
def test_finds_the_object_on_a_plain_background(variant):
    features, grid, box = one_object()
    found = L.lost(features, grid, variant=variant, intermediates=True)
    assert found.boxes[0].tolist() == box
    assert int(found.tied_seeds[0]) == 9 and int(found.seeds[0]) == 1 * 8 + 2
    assert int(L.lost(features, grid, ties="highest").seeds[0]) == 3 * 8 + 4
    assert found.component.sum() == 9
    assert lost_sweep.cut(features, grid)[0][0].tolist() == box


def test_batch_size_does_not_change_the_result(monkeypatch):
    features = torch.randn(9, 30, 4, generator=torch.Generator().manual_seed(0))
    whole = L.lost(features, (5, 6), intermediates=True)
    monkeypatch.setitem(L._GRAM_VALUES, "cpu", 2 * 30**2)
    parts = L.lost(features, (5, 6), intermediates=True)
    assert torch.equal(whole.boxes, parts.boxes) and torch.equal(whole.degrees, parts.degrees)
    alone = torch.cat([L.lost(f[None], (5, 6)).boxes for f in features])
    assert torch.equal(whole.boxes, alone)


def test_all_positive_gram_gives_the_whole_image_and_says_so():
    features = torch.rand(3, 20, 5) + 0.1
    found = L.lost(features, (4, 5))
    assert found.boxes.tolist() == [[0, 0, 5, 4]] * 3
    assert found.positive_share.tolist() == [1.0] * 3
    assert found.shares((4, 5)) == {"positive_share": 1, "tied_share": 1, "whole_share": 1}
    assert found.tied_seeds.tolist() == [20] * 3


def test_bias_reaches_only_the_lines_named():
    features, grid, _ = one_object()
    plain, biased = (L.lost(features, grid, bias=b, intermediates=True) for b in (0.0, -2.0))
    assert int(biased.degrees.max()) == 0 and int(plain.degrees.max()) > 0
    only_mask = L.lost(features, grid, bias=-2.0, bias_on=("mask",), intermediates=True)
    assert torch.equal(only_mask.degrees, plain.degrees) and torch.equal(only_mask.selected, plain.selected)
    shift = only_mask.expansion - plain.expansion
    assert torch.allclose(shift, torch.full_like(shift, -2.0 * int(plain.selected.sum())))


def test_seed_outside_the_mask_gives_its_own_patch_and_a_flag():
    features = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(1))
    found = L.lost(features, (3, 4), bias=-100.0, variant="code")
    r, c = divmod(int(found.seeds[0]), 4)
    assert found.boxes[0].tolist() == [c, r, c + 1, r + 1] and not found.seed_in_mask[0]


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_bias_below_every_similarity_never_gives_the_whole_image(variant):
    """The seed stays in its own expansion set, so that a sum over nothing cannot be taken for 0."""
    features = torch.nn.functional.normalize(torch.randn(20, 24, 5, generator=torch.Generator().manual_seed(4)), dim=-1)
    for bias in (-1.01, -1.5, -10.0):
        found = L.lost(features, (4, 6), bias=bias, variant=variant, intermediates=True)
        assert found.selected.sum((1, 2)).tolist() == [1] * 20
        assert found.selected.flatten(1).gather(1, found.seeds[:, None]).all()
        assert ((found.boxes[:, 2:] - found.boxes[:, :2]) == 1).all() and not found.seed_in_mask.any()


def test_patches_left_out_take_no_part():
    features, grid, box = one_object()
    loud = features.clone()
    loud[0, 0] = torch.tensor([0.0, -50.0])  # one outlier in the corner becomes the seed
    valid = torch.ones(1, 48, dtype=torch.bool)
    valid[0, 0] = False
    assert L.lost(loud, grid).boxes[0].tolist() == [0, 0, 1, 1]
    assert L.lost(loud, grid, valid=valid).boxes[0].tolist() == box


def test_normalising_makes_lengths_irrelevant():
    features = torch.randn(4, 30, 6, generator=torch.Generator().manual_seed(2))
    longer = features * (1 + 9 * torch.rand(4, 30, 1))
    a, b = (L.lost(f, (5, 6), normalize=True, bias=-0.2).boxes for f in (features, longer))
    assert torch.equal(a, b)


def test_half_precision_features_are_computed_in_float32():
    features = torch.randn(2, 30, 6).half()
    assert torch.equal(L.lost(features, (5, 6)).boxes, L.lost(features.float(), (5, 6)).boxes)


def test_tokencut_equals_the_generalised_eigenproblem():
    import numpy as np
    from scipy.linalg import eigh

    features = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(5)) + 0.5
    f = torch.nn.functional.normalize(features[0], dim=-1)
    a = torch.where(f @ f.T > 0.2, 1.0, 1e-5).double().numpy()
    d = np.diag(a.sum(1))
    v = torch.from_numpy(eigh(d - a, d, subset_by_index=[1, 1])[1][:, 0])
    ours = lost_sweep.cut(features, (5, 6))[1].double().flatten()
    gap = 1 - abs(torch.nn.functional.cosine_similarity(v, ours, dim=0))
    assert gap < 1e-5, f"vectors differ by {gap:.2g}"
    assert lost_sweep.cut(one_object()[0], (6, 8))[2].tolist() == [9]  # nine equal patches: any of them may be the seed


def test_iou_and_corloc_by_hand():
    a = torch.tensor([[0, 0, 2, 2]])
    b = torch.tensor([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 1]])
    assert torch.allclose(L.box_iou(a[:, None], b), torch.tensor([[1, 1 / 3, 0, 0.5]], dtype=torch.float64))
    score = L.corloc(torch.tensor([[0, 0, 2, 2]] * 4), [b[:1], b[1:3], b[3:], b])  # IoU of exactly 0.5 is a hit
    assert score.value == 0.75 and score.hits.tolist() == [True, False, True, True]
    assert score.low <= 0.75 <= score.high
    assert score.low == L.corloc(torch.tensor([[0, 0, 2, 2]] * 4), [b[:1], b[1:3], b[3:], b]).low


def test_baselines():
    sizes = torch.tensor([[100, 200], [30, 30]])
    assert L.centred_boxes(sizes, 1.0).tolist() == [[0, 0, 200, 100], [0, 0, 30, 30]]
    half = L.centred_boxes(sizes)
    area = (half[:, 2:] - half[:, :2]).prod(1) / sizes.double().prod(1)
    assert torch.allclose(area, torch.full_like(area, 0.5))
    assert torch.allclose((half[:, :2] + half[:, 2:]) / 2, sizes.flip(1).double() / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (5, 5)}, "drop the prefix tokens"),
        ({"variant": "papre"}, "choose 'paper', 'code'"),
        ({"ties": "random"}, "unknown ties"),
        ({"bias_on": ("degrees",)}, "bias_on"),
        ({"k": 0}, "k must be at least 1"),
        ({"valid": torch.zeros(1, 12, dtype=torch.bool)}, "image 0 has no valid patch"),
    ],
)
def test_bad_options_are_refused(change, message):
    options = {"features": torch.randn(1, 12, 3), "grid": (3, 4)} | change
    with pytest.raises(ValueError, match=message):
        L.lost(**options)


def test_bad_values_are_refused():
    features = torch.randn(2, 12, 3)
    features[1, 4, 0] = float("nan")
    with pytest.raises(ValueError, match="features of image 1 hold NaN"):
        L.lost(features, (3, 4))
    with pytest.raises(ValueError, match="1 images have no box"):
        L.corloc(torch.zeros(1, 4), [torch.zeros(0, 4)])
