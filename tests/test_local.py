"""Matched tokens, likeness to neighbours and local probes of outliers: cases whose answer is known."""

from __future__ import annotations

import torch

from vitreg_lib import lost
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
    found = local.likeness(values, outlier, draws=50)
    wanted = roc_auc_score(outlier.flatten().numpy(), values.flatten().numpy())
    assert abs(found["auc"] - wanted) < 1e-9 and found["auc_low"] < wanted < found["auc_high"]
    assert local.likeness(values, outlier & False)["auc"] != found["auc"]  # NaN without outliers


def test_tokens_that_lost_their_content_are_worse_than_their_matched_ones():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 16, 3, generator=generator)
    place = 5 * torch.eye(16).expand(40, -1, -1)
    tokens = torch.cat([place, pixels], -1)
    outlier = torch.zeros(40, 4, 4, dtype=torch.bool)
    outlier[:, 1, 1] = outlier[:, 2, 3] = True
    gone = tokens.clone()
    gone[outlier.flatten(1)] = torch.randn(80, 19, generator=generator) * 10
    kept, lost_ = (local.ratios(local.local_probes(x, pixels, outlier)).loc["own"] for x in (tokens, gone))
    assert kept.accuracy == 1 and lost_.accuracy < 0.8
    assert lost_.l2 > 5 * kept.l2
    assert local.same_places({"a": outlier, "b": outlier & False}) == {"b": "a"}


def test_the_gain_pairs_the_images_and_sweep_gives_a_row_a_setting():
    hits = torch.tensor([True, False, True, True])
    assert lost.gain(hits, hits) == (0.0, 0.0, 0.0)
    assert lost.gain(~hits, hits)[0] == 50.0
    features = {"k": torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))}
    table, found = lost.sweep(features, (3, 4), [torch.tensor([[0, 0, 32, 24]])] * 4, 8, (0.0, 100.0))
    assert table.loc[("k", 100.0), ["corloc", "positive_share", "whole_share"]].tolist() == [1, 1, 1]
    assert set(found) == set(table.index)
