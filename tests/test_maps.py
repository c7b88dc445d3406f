"""Scores of maps on cases known by hand, against scipy, scikit-learn and slow loops."""

import math

import fig09
import fig16
import map_scores
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreg_lib.measure import maps as m

sides = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)


def random_map(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkerboard(rows=6, cols=8):
    return ((torch.arange(rows)[:, None] + torch.arange(cols)) % 2).float()


def one_peak(rows=6, cols=8, at=(2, 3)):
    peak = torch.zeros(rows, cols)
    peak[at] = 1
    return peak


def border_ring(rows=6, cols=8):
    ring = torch.ones(rows, cols)
    ring[1:-1, 1:-1] = 0
    return ring


CONSTANT = torch.full((6, 8), 0.1)  # 0.1 is not exact in binary: the mean rounds

# name -> scores by hand of constant, one peak, checkerboard, ring, on 6 x 8
BY_HAND = {
    "entropy": (map_scores.entropy, [math.log(48), 0, math.log(24), math.log(24)]),
    "normalised entropy": (
        lambda x: map_scores.entropy(x, normalised=True),
        [1, 0, math.log(24) / math.log(48), math.log(24) / math.log(48)],
    ),
    "support_area": (fig16.support_area, [39 / 48, 1 / 48, 20 / 48, 20 / 48]),  # 38.4 and 19.2 patches, rounded up
    "border_share": (fig16.border_share, [24 / 48, 0, 12 / 24, 1]),
    "upper_share": (fig16.upper_share, [0.5, 1, 0.5, 0.5]),
    "peak_ratio": (map_scores.peak_ratio, [1, math.inf, 2, 2]),  # medians 0.1, 0, 0.5, 0.5
    "kurtosis": (map_scores.kurtosis, [math.nan, (1 - 3 * (1 / 48) * (47 / 48)) / ((1 / 48) * (47 / 48)) - 3, -2, -2]),
    "total_variation": (map_scores.total_variation, [0, 4 / 82 / math.sqrt(47 / 48**2), 2, 20 / 82 / 0.5]),
    "moran_i": (map_scores.moran_i, [math.nan, None, -1, 1 - 2 * 20 / 82]),  # 82 pairs, 20 of them across the ring
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_by_hand(name):
    score, expected = BY_HAND[name]
    maps = torch.stack([CONSTANT, one_peak(), checkerboard(), border_ring()])
    found = score(maps)
    assert found.shape == (4,)
    for value, by_hand in zip(found.tolist(), expected, strict=True):
        if by_hand is not None:
            assert value == pytest.approx(by_hand, rel=1e-5, abs=1e-6, nan_ok=True), (found, expected)


@pytest.mark.parametrize("name", BY_HAND)
@settings(max_examples=15, deadline=None)
@given(rows=sides, cols=sides, seed=seeds)
def test_any_leading_batch_and_scale(name, rows, cols, seed):
    score, _ = BY_HAND[name]
    maps = random_map(2, 3, rows, cols, seed=seed)
    found = score(maps)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    torch.testing.assert_close(found[1, 2], score(maps[1, 2]), equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score(4 * maps), found, equal_nan=True, rtol=1e-4, atol=1e-4)  # no unit
    assert score(maps.bfloat16()).dtype == torch.float32 and score(maps.double()).dtype == torch.float64


def test_kurtosis_equals_scipy():
    from scipy.stats import kurtosis

    maps = normal(5, 7, 9).double() ** 3
    expected = torch.from_numpy(kurtosis(maps.flatten(-2).numpy(), axis=-1))
    torch.testing.assert_close(map_scores.kurtosis(maps), expected)


def test_entropy_equals_scipy():
    from scipy.stats import entropy

    maps = random_map(5, 7, 9).double()
    torch.testing.assert_close(map_scores.entropy(maps), torch.from_numpy(entropy(maps.flatten(-2).numpy(), axis=-1)))


def slow_neighbours(rows, cols, i):
    r, c = divmod(i, cols)
    return [
        (r + dr) * cols + c + dc
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1))
        if 0 <= r + dr < rows and 0 <= c + dc < cols
    ]


@settings(max_examples=25, deadline=None)
@given(rows=sides, cols=sides, seed=seeds)
def test_neighbourhood_scores_equal_slow_loops(rows, cols, seed):
    tokens = normal(rows * cols, 5, seed=seed).double()
    x = tokens[:, 0]
    neighbours = [slow_neighbours(rows, cols, i) for i in range(rows * cols)]
    pairs = [(i, j) for i, near in enumerate(neighbours) for j in near]  # every pair twice
    z = x - x.mean()
    nan = torch.tensor(math.nan, dtype=torch.float64)
    variation = torch.stack([(x[i] - x[j]).abs() for i, j in pairs]).mean() if pairs else nan
    moran = torch.stack([z[i] * z[j] for i, j in pairs]).mean() / z.square().mean() if pairs else nan
    similarity = [
        torch.stack([torch.cosine_similarity(tokens[i], tokens[j], dim=0) for j in near]).mean() if near else nan
        for i, near in enumerate(neighbours)
    ]
    variation = variation / x.std(correction=0)
    torch.testing.assert_close(map_scores.total_variation(x.view(rows, cols)), variation, equal_nan=True)
    torch.testing.assert_close(map_scores.moran_i(x.view(rows, cols)), moran, equal_nan=True)
    torch.testing.assert_close(m.neighbour_similarity(tokens, (rows, cols)), torch.stack(similarity), equal_nan=True)


def test_neighbours_do_not_wrap_round_the_edge():
    tokens = torch.zeros(2, 12, 2)
    tokens[..., 0] = 1
    tokens[:, [3, 7, 11]] = torch.tensor([0.0, 1.0])  # the last column of 3 x 4 is orthogonal to the rest
    similarity = m.neighbour_similarity(tokens, (3, 4)).unflatten(-1, (3, 4))
    assert (similarity[..., 0] == 1).all(), "the first column must not see the last"
    torch.testing.assert_close(similarity[0, :, 2], torch.tensor([2 / 3, 3 / 4, 2 / 3]))
    torch.testing.assert_close(similarity[0, :, 3], torch.tensor([1 / 2, 2 / 3, 1 / 2]))
    with pytest.raises(ValueError, match="13 tokens on a grid"):
        m.neighbour_similarity(torch.zeros(13, 2), (3, 4))


def test_moran_is_high_for_a_ramp_and_about_zero_for_noise():
    ramp = torch.arange(14.0).expand(14, 14)
    noise = normal(4000, 14, 14)
    assert map_scores.moran_i(ramp) > 0.9
    assert map_scores.moran_i(noise).mean().item() == pytest.approx(-1 / 195, abs=0.003)


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-4])
def test_support_of_a_constant_map_is_the_mass(monkeypatch, value):
    constant = torch.full((10, 10), value)
    for percent in range(1, 101):  # rounding must not add a patch
        monkeypatch.setattr(fig16, "MASS", percent / 100)
        assert fig16.support_area(constant).item() == pytest.approx(percent / 100)


def test_a_middle_row_counts_half_to_each_side():
    line = torch.zeros(5, 4)
    line[2] = 1
    assert fig16.upper_share(line) == 0.5
    assert fig16.upper_share(one_peak(5, 4, at=(0, 3))) == 1 and fig16.upper_share(one_peak(5, 4, at=(4, 0))) == 0


def test_everything_is_border_where_there_is_no_inside():
    assert fig16.border_share(torch.ones(2, 8)) == 1 and fig16.border_share(torch.ones(1, 8)) == 1


def test_attention_on_outliers():
    attn = torch.tensor([[0.2, 0.1], [0.1, 0.1]])  # half of the row's attention is on cls and registers
    is_outlier = torch.tensor([[True, False], [False, False]])
    assert map_scores.attention_on(attn, is_outlier).item() == pytest.approx(0.4)
    heads = attn.expand(3, 5, 2, 2)  # (images, heads, rows, cols) with a mask for each image
    assert map_scores.attention_on(heads, is_outlier.expand(3, 1, 2, 2)).shape == (3, 5)
    assert map_scores.attention_on(attn, ~is_outlier).item() == pytest.approx(0.6)
    assert map_scores.attention_on(torch.zeros(2, 2), is_outlier).isnan()


@pytest.mark.parametrize(
    "score",
    [
        map_scores.entropy,
        fig16.support_area,
        fig16.border_share,
        fig16.upper_share,
        lambda x: map_scores.attention_on(x, x > 0),
    ],
)
def test_negative_mass_is_refused(score):
    with pytest.raises(ValueError, match="cannot be negative, smallest value -1"):
        score(torch.tensor([[1.0, -1.0]]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a map of shape \(16,\): expected"):
        map_scores.entropy(torch.ones(16))


def test_top_overlap_by_hand():
    a = torch.arange(12.0).reshape(3, 4)
    same, opposite = map_scores.top_overlap(a, 2 * a + 1, k=3), map_scores.top_overlap(a, -a, k=3)
    assert same.overlap == 1 and opposite.overlap == 0 and same.chance == 0.25
    assert same.p_value.item() == pytest.approx(1 / math.comb(12, 3))  # one triple of 220
    assert opposite.p_value.item() == pytest.approx(1)
    assert same.pooled_p.item() == pytest.approx(same.p_value.item())


def test_top_overlap_p_is_the_permutation_p():
    from scipy.stats import hypergeom

    generator = torch.Generator().manual_seed(0)
    a, b = random_map(3, 4, 5, seed=1), random_map(3, 4, 5, seed=2)
    b[1] = b[1] + a[1]
    k = torch.tensor([4, 7, 10])
    found = map_scores.top_overlap(a, b, k)
    common = (found.overlap * k).round().long()
    exact = hypergeom.sf(common.numpy() - 1, 20, k.numpy(), k.numpy())
    torch.testing.assert_close(found.p_value, torch.from_numpy(exact))
    # the pooled p against brute force: permute the second map's patches, add up the common ones
    draws = torch.stack(
        [(torch.rand(20000, 20, generator=generator).argsort(-1)[:, :n] < n).sum(-1) for n in k.tolist()]
    ).sum(0)
    sampled = (draws >= common.sum()).double().mean().item()
    assert found.pooled_p.item() == pytest.approx(sampled, abs=0.015)


def test_top_overlap_edges():
    a = random_map(2, 3, 3)
    none = map_scores.top_overlap(a, a, k=0)
    assert none.overlap.isnan().all() and none.chance.isnan().all() and none.pooled_p == 1
    every = map_scores.top_overlap(a, a, k=9)
    assert (every.overlap == 1).all() and every.pooled_p.item() == pytest.approx(1)
    with pytest.raises(ValueError, match="k from 10 to 10 out of range for 9 patches"):
        map_scores.top_overlap(a, a, k=10)
    assert map_scores.top_overlap(torch.ones(3, 3), torch.ones(3, 3), k=4).overlap == 1  # ties by position


def test_many_maps_pool_to_a_tiny_p():
    norms = random_map(50, 14, 14, seed=3)
    attn = norms + 0.5 * random_map(50, 14, 14, seed=4)
    assert map_scores.top_overlap(attn, norms, k=4).pooled_p < 1e-20
    unrelated = map_scores.top_overlap(random_map(50, 14, 14, seed=5), norms, k=4).pooled_p
    assert 0.001 < unrelated < 0.999


def test_pairwise_correlation_equals_numpy():
    maps = random_map(2, 4, 5, 6).double()
    flat = maps.flatten(-2).numpy()
    torch.testing.assert_close(fig09.pairwise_correlation(maps)[1], torch.from_numpy(np.corrcoef(flat[1])))
    constant = torch.cat([maps[0], torch.full((1, 5, 6), 0.1, dtype=torch.float64)])
    assert fig09.pairwise_correlation(constant)[-1].isnan().all()


def test_off_diagonal_mean():
    assert fig09.off_diagonal_mean(torch.tensor([[9.0, 1.0], [3.0, 9.0]])) == 2
    assert fig09.off_diagonal_mean(torch.ones(3, 1, 1)).isnan().all()


@pytest.mark.parametrize("shape", [(3, 40, 7), (2, 9, 30)], ids=["tall", "wide"])
def test_principal_components_equal_scikit_learns(shape):
    from sklearn.decomposition import PCA

    tokens = normal(*shape).double() * torch.logspace(0, -1, shape[-1], dtype=torch.float64) + 3
    found = m.principal_components(tokens, n=3, clip=None)
    reference = PCA(3, whiten=True, svd_solver="full").fit(tokens.flatten(0, 1).numpy())
    expected = torch.from_numpy(reference.transform(tokens.flatten(0, 1).numpy())).reshape(*shape[:-1], 3)
    # our sign: the largest loading is positive
    axes = torch.from_numpy(reference.components_)
    expected = expected * axes.gather(1, axes.abs().argmax(1, keepdim=True))[:, 0].sign()
    torch.testing.assert_close(found, expected)
    together = m.principal_components(tokens, n=3, clip=None, per_image=True)
    for i in range(shape[0]):  # per image: each on its own
        torch.testing.assert_close(together[i], m.principal_components(tokens[i], n=3, clip=None))


@pytest.mark.parametrize("per_image", [True, False])
def test_components_never_flip(per_image):
    grid = (6, 8)
    tokens = normal(3, 48, 5) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5])
    inside = torch.zeros(grid)
    inside[1:-1, 2:-2] = 1
    tokens[..., 0] += 20 * inside.flatten()
    for flipped in (tokens, -tokens):
        found = m.principal_components(flipped, n=2, grid=grid, per_image=per_image)
        centre = found.unflatten(-2, grid)[:, 1:-1, 2:-2]
        assert (centre.mean((1, 2)) if per_image else centre.mean((0, 1, 2))).min() > 0
    first, second = (m.principal_components(x, n=2, grid=grid, per_image=per_image) for x in (tokens, -tokens))
    torch.testing.assert_close(first, second)


def test_a_map_that_says_nothing_about_the_centre_falls_back_to_the_loading():
    tokens = normal(16, 3)
    tokens = torch.cat([tokens, -tokens]).reshape(2, 16, 3)
    torch.testing.assert_close(m.principal_components(tokens, n=2, grid=(4, 4)), m.principal_components(tokens, n=2))


def test_scores_are_clipped_in_standard_deviations():
    tokens = normal(1000, 4, seed=1) * 0.1
    tokens[:10, 0] = 100.0  # a spike of 1 %: about 9.9 standard deviations
    unclipped = m.principal_components(tokens, n=2, clip=None)
    assert (unclipped.abs() > 3).float().mean(0)[0].item() == pytest.approx(0.01)
    assert unclipped.std(0)[0].item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(m.principal_components(tokens, n=2), unclipped.clamp(-3, 3))


def test_tokens_without_variance_give_zero_scores():
    found = m.principal_components(torch.ones(2, 9, 4), n=2, grid=(3, 3))
    assert not found.any()
    rank_one = torch.arange(9.0)[:, None] * torch.ones(4)
    assert not m.principal_components(rank_one, n=2)[:, 1].any()


def test_too_many_components_or_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match="n = 5 components of 9 tokens in 4 dimensions"):
        m.principal_components(torch.ones(9, 4), n=5)
    with pytest.raises(ValueError, match="9 tokens on a grid of"):
        m.principal_components(normal(9, 4), n=2, grid=(4, 4))


def test_inputs_are_left_as_they_were():
    maps, tokens = random_map(2, 5, 5), normal(2, 25, 4)
    before = maps.clone(), tokens.clone()
    for score, _ in BY_HAND.values():
        score(maps)
    m.principal_components(tokens, n=2, grid=(5, 5))
    m.neighbour_similarity(tokens, (5, 5))
    map_scores.top_overlap(maps, maps, k=2)
    assert torch.equal(maps, before[0]) and torch.equal(tokens, before[1])
