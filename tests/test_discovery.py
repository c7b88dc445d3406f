"""What figures 13 and 14 add to LOST: spots of a map, the gain of the value projection, steps and expansions."""

from __future__ import annotations

import math

import fig13
import fig14
import pytest
import torch
import torchvision

from vitreg_lib.data import images
from vitreg_lib.measure import objects
from vitreg_lib.model import zoo


def naive_spots(x, height):
    """Each patch against its neighbours, in loops."""
    rows, cols = x.shape
    std = x.double().std(correction=0).item()
    found = torch.zeros(rows, cols, dtype=torch.bool)
    for r in range(rows):
        for c in range(cols):
            around = [
                x[i, j].item()
                for i in range(max(0, r - 1), min(rows, r + 2))
                for j in range(max(0, c - 1), min(cols, c + 2))
                if (i, j) != (r, c)
            ]
            found[r, c] = all(x[r, c].item() - v > height * std for v in around)
    return found


def test_spots_are_those_of_a_loop_and_a_hill_has_none():
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    for height in (0.1, 0.5, 1.0):
        found = fig14.spots(x, height=height)
        assert torch.equal(found, torch.stack([naive_spots(m, height) for m in x]))
    hill = torch.exp(-((torch.arange(9) - 4.0) ** 2) / 8)
    hill = hill[:, None] * hill
    assert not fig14.spots(hill).any() and not fig14.spots(torch.ones(4, 4)).any()
    hill[0, 0] += 2
    assert fig14.spots(hill).nonzero().tolist() == [[0, 0]]


def test_value_gain_is_the_projection_written_out():
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 3)
    block = model.module.blocks[-1]
    x = model.capture(pictures, "tokens", layers=-2).tokens[model.anatomy.depth - 2]
    x = block.norm1(x)[:, model.anatomy.num_prefix_tokens :]
    v = x @ block.attn.qkv.weight.chunk(3)[2].T
    wanted = torch.tensor([[math.dist(a, [0.0] * len(a)) for a in row] for row in v.tolist()]) / x.norm(dim=-1)
    found = fig14.value_gain(model, pictures)
    assert torch.allclose(found, wanted, atol=1e-5), f"gap {(found - wanted).abs().max():.2g}"
    assert not block.attn._forward_pre_hooks


def test_the_value_projection_of_a_planted_outlier_is_measured_at_its_place(planted):
    pictures = images.load("scenes", planted, 4)
    gain, truth = fig14.value_gain(planted, pictures), planted.truth(pictures)
    assert gain.shape == truth.shape and gain[truth].median() < 0.5 * gain[~truth].median()


def test_an_attention_without_a_known_value_projection_is_refused():
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 1)
    attn = model.module.blocks[-1].attn
    qkv, attn.other = attn.qkv, attn.qkv
    del attn.qkv
    try:
        with pytest.raises(TypeError, match="neither qkv nor v_proj"):
            fig14.value_gain(model, pictures)
    finally:
        attn.qkv = qkv


def test_steps_take_the_papers_features_and_expansions_are_those_of_steps():
    sites = {
        name: objects.paper_site(zoo.load(name, "cpu")) for name in ("mini-dinov2-reg4", "mini-deit3", "mini-clip")
    }
    assert sites == {"mini-dinov2-reg4": "k", "mini-deit3": "v", "mini-clip": "v"}
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 2)
    found = fig14.expansions(model, pictures, bias=-0.1)
    for kind, site in (("queries", "q"), ("keys", "k"), ("values", "v")):
        assert torch.equal(found[kind], fig13.steps(model, pictures, site, -0.1).expansion)
    assert torch.equal(fig13.steps(model, pictures).degrees, fig13.steps(model, pictures, "v").degrees)
    with pytest.raises(ValueError, match="choose 'q', 'k' or 'v'"):
        fig13.steps(model, pictures, "x")


def test_figures_have_a_row_a_model_and_panels_an_image():
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 2)
    steps = {"a": fig13.steps(model, pictures), "b": fig13.steps(model, pictures, "k")}
    truth = [b[v] for b, v in zip(pictures.scenes.boxes, pictures.scenes.visible, strict=True)]
    figure = fig13.discovery(pictures.pixels, steps, {"a": 8, "b": 8}, truth)
    assert len(figure.axes) == 2 * 2 * 5 + 1  # four panels and a gap; the colour bar
    found = fig14.expansions(model, pictures)
    spots = {"a": {kind: fig14.spots(m) for kind, m in found.items()}}
    assert len(fig14.draw_expansions(pictures.pixels, {"a": found}, spots).axes) == 2 * 5 + 1


def test_hits_of_many_boxes_are_those_of_one_by_one():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * 4
    boxes = torch.cat([corner, corner + 1 + torch.rand(200, 2, generator=generator)], 1).round(decimals=1)
    truth = [boxes[torch.randint(200, (1 + i % 4,), generator=generator)] for i in range(200)]
    pairs = zip(boxes.double(), truth, strict=True)
    wanted = [bool((torchvision.ops.box_iou(b[None], t.double()) >= 0.5).any()) for b, t in pairs]
    assert objects.box_hits(boxes, truth).tolist() == wanted and 0 < sum(wanted) < 200


@pytest.fixture(scope="module")
def swept():
    """A grid of the smallest mini on a few scenes: (model, pictures, truth, table, hits)."""
    import lost_sweep

    from vitreg_lib.data import sets

    model = zoo.load("mini-deit3-xs", "cpu")
    pictures, truth = sets.load_boxes("scenes", model, 12)
    return model, pictures, truth, *lost_sweep.grid(model, pictures, truth, (-2, -1), "kv", (0.0, -0.3))


def test_the_grid_is_lost_setting_by_setting(swept):
    model, pictures, truth, table, hits = swept
    assert len(table) == 2 * 2 * 2 * 2 and set(hits) == set(table.index)
    depth = model.anatomy.depth
    for layer, site, normalised, bias in [(depth - 2, "v", True, -0.3), (depth - 1, "k", False, 0.0)]:
        seen = model.capture(pictures, site, layers=layer)
        result = objects.lost(objects.features(seen, site, layer), seen.grid, bias=bias, normalize=normalised)
        score = objects.corloc(result.boxes * 8, truth)
        row = table.loc[(layer, site, normalised, bias)]
        assert row.low <= row.corloc <= row.high
        assert row.corloc == score.value and torch.equal(hits[layer, site, normalised, bias], score.hits)
        assert (
            abs(row.positive_share - result.positive_share.mean().item()) < 1e-4
        )  # the length scales, rounding may not


def test_a_bias_on_unnormalised_features_is_in_units_of_their_mean_square():
    import lost_sweep

    x = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = x.square().sum(-1).mean().item()
    scaled = objects.lost(x / size**0.5, (3, 4), bias=-0.25)
    assert torch.equal(scaled.boxes, objects.lost(x, (3, 4), bias=-0.25 * size).boxes)
    assert lost_sweep.interval(torch.tensor([True, False]))["value"] == 0.5


def test_the_best_setting_is_chosen_on_other_images():
    import lost_sweep

    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    first, second = order.chunk(2)
    only_first, only_second = (torch.zeros(20, dtype=torch.bool).index_fill_(0, half, True) for half in (first, second))
    scored, chosen = lost_sweep.honest_best({("a",): only_first, ("b",): only_second})
    assert not scored.any() and chosen == [("a",), ("b",)]  # what shines on one half fails on the other
    always = torch.ones(20, dtype=torch.bool)
    assert lost_sweep.honest_best({("a",): only_first, ("c",): always})[0].sum() in (10, 20)
    with pytest.raises(ValueError, match="at least two"):
        lost_sweep.honest_best({("a",): torch.tensor([True])})


def test_code_differences_are_the_variants_and_leaving_out_oneself_changes_nothing(swept):
    import lost_sweep

    model, pictures, truth, *_ = swept
    seen = model.capture(pictures, "v", layers=-1)
    x = objects.features(seen, "v")
    table = lost_sweep.code_differences(x, seen.grid, truth, 8)
    code = objects.lost(x, seen.grid, variant="code", ties="highest")
    assert table.corloc["all"] == objects.corloc(code.boxes * 8, truth).value
    assert table.loc["no_self", ["effect", "boxes_changed"]].tolist() == [0, 0]
    whole = torch.randint(-1, 2, (12, 144, 2), generator=torch.Generator().manual_seed(0)).float()
    assert lost_sweep.code_differences(whole, (12, 12), truth, 8).boxes_changed["strict"] > 0  # exact zeros and ties


def test_effects_and_changes_by_hand(swept):
    import lost_sweep
    import pandas as pd

    *_, table, hits = swept
    found = lost_sweep.effects(table)
    at_zero = table.corloc[[key[3] == 0 for key in table.index]].mean()
    assert found.corloc["bias", "0.0"] == pytest.approx(at_zero)
    by_bias = table.corloc.groupby(level="bias").mean()
    assert found.spread["bias", "0.0"] == pytest.approx(by_bias.max() - by_bias.min())
    assert lost_sweep.compare(hits, hits) == {"median": 0, "worst": 0, "best": 0, "better": 0.5}
    nothing = {key: torch.zeros_like(value) for key, value in hits.items()}
    worst = min(100 * value.double().mean().item() for value in hits.values())
    assert lost_sweep.compare(nothing, hits)["worst"] == pytest.approx(worst)
    with pytest.raises(ValueError, match="no setting in common"):
        lost_sweep.compare(hits, {})
    choices = lost_sweep.choices({"a": table})
    assert choices.loc["a", "bias"] == pytest.approx(100 * found.spread["bias", "0.0"])
    for ends, verdict in (((-3.0, 4.0), True), ((-3.0, 8.0), "undecided"), ((6.0, 9.0), False)):
        faults = pd.DataFrame({"effect": [0.0, 2.0], "low": [0.0, ends[0]], "high": [0.0, ends[1]]})
        faults.index = pd.MultiIndex.from_tuples([("a", "equations"), ("a", "ties")])
        judged = lost_sweep.claims({}, ("box", torch.ones(4)), [], choices, faults)
        assert {claim: holds for claim, holds, *_ in judged}["code"] == verdict
    assert lost_sweep.in_words([(7, "k", True, -0.1)] * 2) == "block 7, k, length 1, bias -0.1"


def test_the_grid_is_drawn(swept):
    import lost_sweep

    *_, table, _ = swept
    figure = lost_sweep.setting_grids({"a": table, "b+ttr4": table}, 0.3)
    assert len(figure.axes) == 2 * 4 + 1  # kinds x models and a colour bar
