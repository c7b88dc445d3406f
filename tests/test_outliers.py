"""The rules on distributions whose answer is known by hand, and on the two controls."""

from __future__ import annotations

import math

import fig15
import pytest
import torch
import verdicts
from hypothesis import given
from hypothesis import strategies as st

from vitreg_lib.data import images
from vitreg_lib.hooks.capture import Capture
from vitreg_lib.measure import outliers, pairs
from vitreg_lib.model import zoo
from vitreg_lib.model.model import Model


def modes(*parts: tuple[float, int], spread: float = 0.12, seed: int = 0) -> torch.Tensor:
    """Norms in log-normal modes, given as (centre, how many)."""
    noise = torch.Generator().manual_seed(seed)
    return torch.cat([c * torch.exp(spread * torch.randn(n, generator=noise)) for c, n in parts])


ONE = modes((20.0, 5000))
TWO = modes((20.0, 4900), (200.0, 100))  # 2 % at ten times the bulk
KINDS_OF_CONTENT = modes((20.0, 3000), (36.0, 2000))  # 40 % within a factor of two
CONSTANT = torch.full((500,), 7.0)


def share(norms: torch.Tensor) -> float:
    return (norms > outliers.cutoff(norms)).float().mean().item()


def test_one_mode_has_no_cutoff():
    assert outliers.cutoff(ONE) == math.inf


def test_the_cutoff_lies_between_two_modes_at_ten_times():
    assert 40 < outliers.cutoff(TWO) < 150
    assert share(TWO) == pytest.approx(0.02)


def test_the_cutoff_lies_between_modes_at_twice_the_median():
    norms = modes((20.0, 4800), (42.0, 200), spread=0.1)
    assert 26 < outliers.cutoff(norms) < 38
    assert share(norms) == pytest.approx(0.04, abs=2e-3)


def test_more_than_a_third_of_the_tokens_are_a_kind_of_content():
    assert outliers.cutoff(KINDS_OF_CONTENT) == math.inf
    assert outliers.cutoff(modes((20.0, 3000), (200.0, 2000))) == math.inf


def test_constant_norms_have_no_outliers():
    assert share(CONSTANT) == 0


def test_a_few_tokens_are_no_mode():
    assert outliers.cutoff(modes((20.0, 9980), (200.0, 20))) < 200
    assert outliers.cutoff(modes((20.0, 9998), (200.0, 2))) == math.inf


def test_valleys_of_many_histograms_are_those_of_each():
    counts = torch.cat([outliers.histogram(norms[None]) for norms in (ONE, TWO)])
    valley, peak = outliers.valleys(counts)
    assert valley[0] == peak[0] == -1
    assert 2 < outliers.bin_middle(valley[1].item()) < 7.5 and 8 < outliers.bin_middle(peak[1].item()) < 12.5


@given(st.floats(1e-3, 1e3))
def test_the_cutoff_follows_the_scale_of_the_norms(scale):
    assert outliers.cutoff(TWO * scale) == pytest.approx(outliers.cutoff(TWO) * scale, rel=0.05)
    assert share(TWO * scale) == pytest.approx(0.02, abs=1e-3)


@given(st.permutations(range(8)))
def test_the_cutoff_does_not_depend_on_order_or_shape(order):
    shuffled = TWO.view(8, -1)[list(order)].view(10, 5, -1)
    assert outliers.cutoff(shuffled) == pytest.approx(outliers.cutoff(TWO))


@pytest.mark.parametrize("norms", [torch.empty(0), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])])
def test_norms_that_are_empty_or_not_finite_have_no_cutoff(norms):
    with pytest.raises(ValueError, match="empty or not finite"):
        outliers.cutoff(norms)


def by_layer(*two_modes: bool) -> torch.Tensor:
    """(10, layers, 500) norms with 2 % of outliers where told."""
    layers = [TWO if is_two else ONE for is_two in two_modes]
    return torch.stack([norms.view(10, 500) for norms in layers], 1)


def test_shares_far_above_the_median_are_each_layers_own():
    assert outliers.separated_share(by_layer(False, True)).tolist() == [0, pytest.approx(0.02)]


def test_score_by_hand():
    found, truth = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]]).bool()
    assert outliers.score(found, truth) == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4)}
    nothing = torch.zeros(4, dtype=torch.bool)
    assert outliers.score(nothing, nothing) == {"precision": 1, "recall": 1, "f1": 1}
    assert outliers.score(found, nothing) == {"precision": 0, "recall": 1, "f1": 0}
    assert outliers.score(nothing, truth) == {"precision": 1, "recall": 0, "f1": 0}


def test_pairs_match_a_model_with_registers_to_the_same_without():
    plain = [Model(name, None, "", label=name) for name in ("a", "timm's b")]
    plain[1].label, plain[1].entry = "b", "b of the zoo"
    options = {"a four": ("a", "trained"), "b one": ("timm's b", "test time"), "b two": ("b of the zoo", "trained")}
    options["c four"] = ("c", "trained")
    models = plain + [Model(n, None, "", label=n, base=b, registers_from=r) for n, (b, r) in options.items()]
    assert pairs.pairs(models) == {"a four": "a", "b one": "b", "b two": "b"}
    assert pairs.pairs(models, "test time") == {"b one": "b"}


def test_norms_are_quantised_when_registers_differ_more_than_images():
    noise = torch.randn(2, 100)
    apart = {"register 1": 10 + noise[0], "register 2": 100 + noise[1], "patches": noise}
    assert fig15.quantisation(apart) > 100
    alike = {"register 1": 10 + noise[0], "register 2": 10 + noise[1]}
    assert fig15.quantisation(alike) < 1
    assert fig15.quantisation({"register 1": noise[0]}) is None
    for kinds, side in ((apart, True), (alike, False)):
        assert verdicts.above(*fig15.quantisation_interval(kinds), 1) is side


@pytest.fixture(scope="module")
def on_planted(planted):
    pictures = images.load("scenes", planted, 64)
    return planted, pictures, planted.capture(pictures).patch_norms


def test_the_default_rule_finds_the_planted_outliers(on_planted):
    model, pictures, norms = on_planted
    output, truth = norms[:, -1], model.truth(pictures)
    found = outliers.score(output > outliers.cutoff(output), truth)
    assert truth.float().mean() > 0.005
    assert min(found["precision"], found["recall"]) >= 0.95, found


def test_the_onset_of_the_planted_outliers_is_where_they_were_planted(on_planted):
    model, _, norms = on_planted
    cut = outliers.cutoff(norms[:, -1])
    assert outliers.onset_of(norms, norms[:, -1] > cut, cut, norms.shape[1] - 1) == model.onset


def test_nothing_is_found_in_the_random_control():
    model = zoo.load("mini-random", "cpu")
    pictures = images.load("scenes", model, 64)
    norms = model.capture(pictures).patch_norms
    assert [share(at) for at in norms.unbind(1)] == [0] * model.anatomy.depth
    assert not model.truth(pictures).any()


def captured(norms: torch.Tensor, prefix: int = 1) -> Capture:
    """A capture of blocks 3 and 4 with these patch norms after block 4, (images, rows, cols)."""
    tokens = torch.cat([torch.full((len(norms), prefix), 999.0), norms.flatten(1)], 1)
    names = ("cls", *(f"register {i}" for i in range(1, prefix)))
    return Capture((3, 4), tuple(norms.shape[1:]), names, norms=torch.stack([tokens.clamp(max=1), tokens], 1))


def test_outliers_are_those_of_the_norms_by_hand():
    norms = TWO[torch.randperm(5000, generator=torch.Generator().manual_seed(1))].view(50, 10, 10)
    found = outliers.find(captured(norms), model="a")
    assert torch.equal(found.norms, norms)
    assert torch.equal(found.mask, norms > outliers.cutoff(norms))
    assert (found.cutoff, found.layer, found.cutoff_from) == (outliers.cutoff(norms), 4, "a")
    assert found.share == pytest.approx(0.02)
    assert found.norm_ratio == pytest.approx((norms[found.mask].mean() / norms.median()).item())
    by_hand = outliers.find(captured(norms), cut=20.0, model="a")
    assert (by_hand.cutoff, by_hand.cutoff_from) == (20.0, "")
    assert 0.3 < by_hand.share < 0.7
    nothing = outliers.find(captured(norms), layer=3, cut=20.0)
    assert not nothing.mask.any() and nothing.norm_ratio is None
