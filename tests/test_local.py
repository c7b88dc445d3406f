"""Matched tokens, likeness to neighbours and local probes of outliers: cases whose answer is known."""

from __future__ import annotations

import fig05
import pytest
import tab05
import torch

from vitreg_lib.measure import objects
from vitreg_lib.probes import local


def test_the_partner_of_a_corner_is_its_neighbour_on_the_border():
    outlier = torch.zeros(2, 4, 5, dtype=torch.bool)
    outlier[0, 0, 0] = outlier[0, 3, 4] = True
    matched = local.matched_normal(outlier)
    assert matched[0].nonzero().tolist() == [[0, 1], [2, 4]] and not matched[1].any()


def test_partners_are_normal_and_none_is_left_in_an_image_of_outliers():
    outlier = torch.rand(20, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    outlier[3] = True
    matched = local.matched_normal(outlier)
    assert not (matched & outlier).any() and not matched[3].any()
    assert (matched.flatten(1).sum(1) <= outlier.flatten(1).sum(1)).all()


def test_auc_of_likeness_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    outlier = torch.rand(30, 4, 4, generator=generator) > 0.8
    values = (torch.rand(30, 16, generator=generator) + 0.3 * outlier.flatten(1)).round(decimals=1)  # with ties
    found = fig05.likeness(values, outlier, draws=50)
    wanted = roc_auc_score(outlier.flatten().numpy(), values.flatten().numpy())
    assert abs(found["auc"] - wanted) < 1e-9 and found["auc_low"] < wanted < found["auc_high"]
    assert fig05.likeness(values, outlier & False)["auc"] != found["auc"]  # NaN without outliers


def test_tokens_that_lost_their_content_are_worse_than_their_matched_ones():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 16, 3, generator=generator)
    place = 5 * torch.eye(16).expand(40, -1, -1)
    tokens = torch.cat([place, pixels], -1)
    outlier = torch.zeros(40, 4, 4, dtype=torch.bool)
    outlier[:, 1, 1] = outlier[:, 2, 3] = True
    gone = tokens.clone()
    gone[outlier.flatten(1)] = torch.randn(80, 19, generator=generator) * 10
    kept, lost_ = (fig05.ratios(fig05.probes(x, pixels, outlier, 6000)) for x in (tokens, gone))
    assert len(kept) == 5 and (kept.accuracy == 1).all() and lost_.accuracy.mean() < 0.8
    assert lost_.l2.min() > 5 * kept.l2.max()
    assert fig05.same_places({"a": outlier, "b": outlier & False}) == {"b": "a"}


def test_the_gain_pairs_the_images_and_sweep_gives_a_row_a_setting():
    hits = torch.tensor([True, False, True, True])
    assert objects.gain(hits, hits) == (0.0, 0.0, 0.0)
    assert objects.gain(~hits, hits)[0] == 50.0
    features = {"k": torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))}
    for truth, size in (((0, 0, 32, 24), 8), ((0, 0, 64, 24), (8, 16))):
        table, found = objects.sweep(features, (3, 4), [torch.tensor([truth])] * 4, size, (0.0, 100.0))
        assert table.loc[("k", 100.0), ["corloc", "positive_share", "whole_share"]].tolist() == [1, 1, 1]
    boxes = torch.tensor([[1, 0, 3, 2]])
    assert objects.in_pixels(boxes, (8, 16)).tolist() == [[16, 0, 48, 16]]
    assert objects.in_pixels(boxes, 8).tolist() == [[8, 0, 24, 16]]
    assert set(found) == set(table.index)


def test_every_image_is_in_the_test_of_one_fold():
    from vitreg_lib.probes.linear import split_by_image

    ids = torch.arange(43).repeat_interleave(3)
    tested = torch.stack([split_by_image(ids, seed=2, fold=fold) == 2 for fold in range(5)]).long().sum(0)
    assert (tested >= 1).all() and (tested > 1).float().mean() < 0.1  # 43 images are no whole fifths
    for fold in range(5):
        parts = split_by_image(ids, seed=2, fold=fold)
        assert (parts.view(-1, 3) == parts.view(-1, 3)[:, :1]).all() and parts.unique().tolist() == [0, 1, 2]


def test_verdicts_of_local_probes_by_hand():
    """Ratios of 0.5 with little spread hold, around the limit they are undecided, without positions nothing is said."""
    import pandas as pd

    groups, fits = ("normal", "outlier", "matched"), ("normal", "all", "own")
    index = pd.MultiIndex.from_product([groups, fits, range(5)], names=["group", "fit", "fold"])
    table = pd.DataFrame(
        {"accuracy": 0.8, "distance": 0.5, "l2": 10.0, "relative": 0.5, "chance": 0.01, "test": 7}, index
    )
    wobble = 0.02 * torch.arange(-2.0, 3).double().numpy()
    table.loc["outlier", "accuracy"] = [0.4 + w for _ in fits for w in wobble]
    table.loc["outlier", "l2"] = [11.0 + 20 * w for _ in fits for w in wobble]
    alike = {"auc": 0.6, "auc_low": 0.5, "auc_high": 0.7, "auc_matched": 0.4, "auc_matched_low": 0.3}
    alike |= {"auc_matched_high": 0.45}
    judged = fig05.verdicts(table, alike)
    assert judged["accuracy"][0] is True and "0.50 (0.45 to 0.55)" in judged["accuracy"][1]
    assert judged["distance"][0] is False and judged["l2"][0] == "undecided" and judged["auc"][0] is False
    assert "35 outliers scored" in judged["l2"][1]
    assert judged["auc"][1].endswith("against normal tokens, 0.60 (0.50 to 0.70): it would be undecided")
    blind = fig05.verdicts(table.assign(chance=0.5), alike)
    assert blind["accuracy"][0] is None and "not readable" in blind["accuracy"][1] and blind["l2"][0] == "undecided"


def planted_tokens(seed, images=40, worse=0.0):
    """Tokens of 4 x 4 patches that hold place and pixels, `worse` noisier, with two lost ones an image; its mask."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 16, 3, generator=generator)
    place = 5 * torch.eye(16).expand(images, -1, -1)
    tokens = torch.cat([place, pixels], -1)
    noise = torch.randn(images, 16, 19, generator=generator)
    outlier = torch.zeros(images, 4, 4, dtype=torch.bool)
    outlier[:, 0, 0] = outlier[:, 3, 3] = True
    broken = tokens + worse * noise
    broken[outlier.flatten(1)] = 10 * noise[outlier.flatten(1)]
    return tokens, broken, pixels, outlier


def test_across_registers_compares_the_same_places():
    tokens, broken, pixels, outlier = planted_tokens(0)
    models = {"a": broken, "a-reg4": tokens, "b": tokens}
    masks = {"a": outlier, "a-reg4": outlier & False, "b": outlier & False}
    table = tab05.across_registers(models, dict.fromkeys(models, pixels), masks, {"a-reg4": "a"}, 400, folds=(0, 1))
    assert set(table.index.unique("group")) == {"normal", "shared", "places"}
    tested = table.xs(("own", 0), level=("fit", "fold")).test
    assert tested["a-reg4", "normal"] == 8 * 16 and tested["a-reg4", "shared"] == tested["a", "shared"] == 8 * 14
    assert tested["b", "shared"] == 8 * 16 and tested["b", "places"] == 8 * 2  # borrowed places, all its own are normal
    change = tab05.register_changes(table, {"a-reg4": "a", "elsewhere": "a"})
    assert list(change.index) == ["a-reg4"] and change.without["a-reg4"] == "a" and change.readable["a-reg4"]
    assert change.points["a-reg4"] == 0 and abs(change.l2_ratio["a-reg4"] - 1) < 1e-3
    right = table.loc[("a", "shared", "own")].accuracy.mean()
    assert change.margin["a-reg4"] == pytest.approx(min(2, 2 * right / 0.663))
    moved = tab05.register_changes(table, {"a-reg4": "a"}, "places")
    assert moved.points["a-reg4"] > 20 and moved.l2_ratio["a-reg4"] < 0.5


def test_a_worse_model_is_seen_and_noise_is_not_readable():
    tokens, _, pixels, outlier = planted_tokens(1)
    _, noisy, _, _ = planted_tokens(1, worse=3.0)
    masks, pairs = dict.fromkeys(("a", "a+ttr4"), outlier), {"a+ttr4": "a"}
    models, everywhere = {"a": tokens, "a+ttr4": noisy}, dict.fromkeys(masks, pixels)
    table = tab05.across_registers(models, everywhere, masks, pairs, 400, folds=(0, 1))
    change = tab05.register_changes(table, pairs, "normal", "all").loc["a+ttr4"]
    assert change.points < -10 and change.l2_ratio > 2
    blind = {name: torch.randn(40, 16, 19, generator=torch.Generator().manual_seed(2)) for name in masks}
    table = tab05.across_registers(blind, everywhere, masks, pairs, 400, folds=(0, 1))
    change = tab05.register_changes(table, pairs).loc["a+ttr4"]
    right = table.loc[("a", "shared", "own")].accuracy.mean()
    assert not change.readable and change.margin == pytest.approx(2 * right / 0.663) and change.margin < 1


def test_same_masks_are_fitted_once_with_the_same_result():
    from vitreg_lib.probes.local import position_probe

    tokens, _, _, outlier = planted_tokens(3)
    where, ids = torch.arange(16).repeat(40), torch.arange(40).repeat_interleave(16)
    everything = torch.ones(640, dtype=torch.bool)
    few = everything.clone()
    few[:16] = False  # one image less: fitted anew
    groups = {"normal": everything, "again": everything.clone(), "few": few}
    table = position_probe(tokens.flatten(0, 1), where, (4, 4), groups, ids).set_index(["group", "fit"])
    assert table.loc[("again", "own")].equals(table.loc[("normal", "all")])
