"""The three answers: on controls whose truth is known, on synthetic norms of known shape, on real weights."""

from __future__ import annotations

import math

import pytest
import torch

import vitreg_lib as vr
from vitreg_lib.data import images
from vitreg_lib.hooks.capture import Capture
from vitreg_lib.measure import detection, outliers
from vitreg_lib.measure.detection import Observed
from vitreg_lib.model import zoo


def bulk(n: int, patches: int = 196, spread: float = 0.2, seed: int = 0) -> torch.Tensor:
    return 20 * torch.exp(spread * torch.randn(n, patches, generator=torch.Generator().manual_seed(seed)))


def with_outliers(norms: torch.Tensor, times: float, share: float, seed: int = 1):
    """(norms, mask) with `share` of the tokens at `times` the median."""
    noise = torch.Generator().manual_seed(seed)
    mask = torch.rand(norms.shape, generator=noise) < share
    high = norms.median() * times * torch.exp(0.15 * torch.randn(norms.shape, generator=noise))
    return torch.where(mask, high, norms), mask


def observed(norms: torch.Tensor, mask: torch.Tensor | None = None, lift: float = 1.0) -> Observed:
    """One block with these norms; attention is even but for tokens of `mask`, which get `lift` times as much."""
    noise = torch.Generator().manual_seed(2)
    maps = torch.exp(0.3 * torch.randn(norms.shape, generator=noise))
    if mask is not None:
        maps = torch.where(mask, lift * maps, maps)
    attention = {} if mask is None else {0: maps / maps.sum(1, keepdim=True)}
    return Observed(Capture((0,), (14, 14), (), norms=norms[:, None]), attention, attention)


def test_tokens_apart_in_norm_and_attention_are_artifacts_with_their_numbers():
    norms, mask = with_outliers(bulk(20), 10, 0.02)
    found = detection.judge(observed(norms, mask, 8.0), "a model")
    assert found.answer == "artifacts" and found.support == 1
    assert torch.equal(found.outliers.mask.flatten(1), mask)
    assert found.share[0] == pytest.approx(mask.float().mean().item())
    assert found.share[1] < found.share[0] < found.share[2]
    assert found.norm_ratio == pytest.approx((norms[mask].mean() / norms.median()).item())
    received = observed(norms, mask, 8.0).received(0)["cls"]
    assert found.lift_cls == pytest.approx(received[mask].mean().item()) and found.lift_cls > 5
    assert (found.kind, found.strength, found.onset) == ("content-bound", "strong", 0)
    assert found.outliers.cutoff_from == "a model"


def test_a_mild_second_mode_needs_attention_to_be_artifacts():
    norms, mask = with_outliers(bulk(50, spread=0.12), 2.0, 0.04)
    assert detection.judge(observed(norms, mask, 8.0)).answer == "artifacts"
    assert detection.judge(observed(norms, mask, 1.0)).answer == "none"  # a kind of content
    assert detection.judge(observed(norms)).answer == "undecided"  # attention was not measured


def test_one_mode_is_none_if_attention_was_measured_and_images_suffice():
    norms, nowhere = bulk(20), torch.zeros(20, 196, dtype=torch.bool)
    found = detection.judge(observed(norms, nowhere))
    assert found.answer == "none" and found.outliers.cutoff == math.inf and not found.outliers.mask.any()
    few = detection.judge(observed(norms[:6], nowhere[:6]))
    assert few.answer == "undecided" and few.images_needed == 10


@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_images_carry_no_verdict_and_say_how_many_would(n):
    norms, mask = with_outliers(bulk(n), 20, 0.03)
    found = detection.judge(observed(norms, mask, 8.0))
    assert found.answer == "undecided" and found.images_needed == 10
    assert "None" not in str(found) and "nan" not in str(found)
    assert f"{n} image" in str(found)


@pytest.mark.parametrize("share", [0.001, 0.002, 0.005])
def test_rare_tokens_at_twenty_times_the_median_are_never_denied(share):
    norms, mask = with_outliers(bulk(20), 20, share, seed=3)
    assert mask.any()
    found = detection.judge(observed(norms, mask, 8.0))
    assert found.answer in ("artifacts", "undecided")
    assert found.answer == "artifacts" or found.images_needed > 20


def test_a_heavy_tail_of_one_mode_is_never_artifacts():
    noise = torch.Generator().manual_seed(0)
    for n in (5, 20, 50):
        t3 = torch.randn(n, 196, generator=noise) / (torch.randn(3, n, 196, generator=noise) ** 2).mean(0).sqrt()
        norms, nowhere = 20 * torch.exp(0.15 * t3), torch.zeros(n, 196, dtype=torch.bool)
        assert detection.judge(observed(norms, nowhere)).answer != "artifacts"
        assert detection.judge(observed(norms)).answer != "artifacts"


def test_place_is_what_fixed_places_have_in_common():
    mask = torch.zeros(30, 196, dtype=torch.bool)
    mask[:, [0, 13, 182, 195]] = True
    assert outliers.place_share(mask) == pytest.approx(1)
    anywhere = torch.rand(30, 196, generator=torch.Generator().manual_seed(0)) < 0.02
    assert outliers.place_share(anywhere) == 0
    norms = torch.where(mask, 400.0, bulk(30))
    assert detection.judge(observed(norms, mask, 8.0)).kind == "position-bound"


def test_onset_is_the_block_from_which_on_the_outliers_are_as_far_out():
    low, (high, mask) = bulk(20), with_outliers(bulk(20), 10, 0.02)
    norms = torch.stack([low, high, low, high, high], 1)
    assert outliers.onset_of(norms, mask, 60.0, 4) == 3
    assert outliers.onset_of(norms, mask, 60.0, 1) == 1


def test_the_planted_control_has_them_and_the_random_one_does_not(planted):
    pictures = images.load("scenes", planted, 64)
    found = vr.detect(planted, pictures)
    assert found.answer == "artifacts" and found.onset == planted.onset
    scores = outliers.score(found.outliers.mask.flatten(1), planted.truth(pictures))
    assert min(scores["precision"], scores["recall"]) >= 0.95, scores
    control = zoo.load("mini-random", "cpu")
    assert vr.detect(control, images.load("scenes", control, 64)).answer == "none"


def test_what_is_observed_is_the_attention_of_cls_and_of_a_sample_of_patches(planted):
    x = images.load("scenes", planted, 3).x
    seen = detection.join([detection.observe_batch(planted, part)[0] for part in x.split(2)])
    rows = planted.capture(x, ("norms", "attention"), layers=7, queries=[0]).attention[7].mean(1)[:, 0, 1:]
    assert torch.allclose(seen.by_cls[7], rows, atol=1e-6)
    assert torch.equal(seen.norms, planted.capture(x).patch_norms)
    assert sorted(seen.by_patches) == [6, 7] and seen.by_patches[7].shape == (3, 144)


def test_the_smallest_model_that_grew_them_and_its_twin_with_registers():
    grown, cured = (zoo.load(name, "cpu") for name in ("mini-corners", "mini-corners-reg4"))
    found = vr.detect(grown, images.load("textures", grown, 48))
    assert found.answer == "artifacts" and found.kind == "position-bound" and found.lift_cls is None
    assert vr.detect(cured, images.load("textures", cured, 48)).answer == "none"


def test_deit_ti_has_mild_content_bound_artifacts(real):
    model = zoo.load("deit-ti", "cpu")
    found = vr.detect(model, images.load("imagenet", model, 50))
    assert found.answer == "artifacts" and found.kind == "content-bound" and found.strength == "mild"
    assert found.outliers.cutoff == pytest.approx(21.6, abs=1.5)
    assert 0.035 < found.share[0] < 0.055
    assert found.lift_cls > 5 and found.overlap > 0.7
    assert 6 <= found.onset <= 8


def test_vit_ti_has_strong_position_bound_ones_and_dinov2_s_none(real):
    model = zoo.load("vit-ti", "cpu")
    found = vr.detect(model, images.load("imagenet", model, 20))
    assert (found.answer, found.kind, found.strength, found.onset) == ("artifacts", "position-bound", "strong", 7)
    assert found.share[0] == pytest.approx(0.0203, abs=0.002)
    clean = zoo.load("dinov2-s", "cpu")
    assert vr.detect(clean, images.load("imagenet", clean, 20)).answer == "none"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite_are_never_called_clean(value):
    norms = torch.rand(40, 3, 64) + 1
    norms[0, 2, 5] = value
    seen = Capture((0, 1, 2), (8, 8), ("cls",), norms=torch.cat([norms[..., :1], norms], 2))
    with pytest.raises(ValueError, match="norms are not finite: a weight is not, or the model overflows"):
        detection.judge(Observed(seen))
