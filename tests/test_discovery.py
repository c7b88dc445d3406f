"""What figures 13 and 14 add to LOST: spots of a map, the gain of the value projection, steps and expansions."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_lib import attention, lost, maps
from vitreg_lib.data import images
from vitreg_lib.models import zoo


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
        found = maps.spots(x, height=height)
        assert torch.equal(found, torch.stack([naive_spots(m, height) for m in x]))
    assert torch.equal(maps.spots(x.flatten(1), grid=(5, 7)), maps.spots(x).flatten(1))
    hill = torch.exp(-((torch.arange(9) - 4.0) ** 2) / 8)
    hill = hill[:, None] * hill
    assert not maps.spots(hill).any() and not maps.spots(torch.ones(4, 4)).any()
    hill[0, 0] += 2
    assert maps.spots(hill).nonzero().tolist() == [[0, 0]]


def test_value_gain_is_the_projection_written_out():
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 3)
    block = model.module.blocks[-1]
    x = model.capture(pictures, "tokens", layers=-2).tokens[model.anatomy.depth - 2]
    x = block.norm1(x)[:, model.anatomy.num_prefix_tokens :]
    v = x @ block.attn.qkv.weight.chunk(3)[2].T
    wanted = torch.tensor([[math.dist(a, [0.0] * len(a)) for a in row] for row in v.tolist()]) / x.norm(dim=-1)
    found = attention.value_gain(model, pictures)
    assert torch.allclose(found, wanted, atol=1e-5), f"gap {(found - wanted).abs().max():.2g}"
    assert not block.attn._forward_pre_hooks


def test_the_value_projection_of_a_planted_outlier_is_measured_at_its_place(planted):
    pictures = images.load("scenes", planted, 4)
    gain, truth = attention.value_gain(planted, pictures), planted.truth(pictures)
    assert gain.shape == truth.shape and gain[truth].median() < 0.5 * gain[~truth].median()


def test_an_attention_without_a_known_value_projection_is_refused():
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 1)
    attn = model.module.blocks[-1].attn
    qkv, attn.other = attn.qkv, attn.qkv
    del attn.qkv
    try:
        with pytest.raises(TypeError, match="neither qkv nor v_proj"):
            attention.value_gain(model, pictures)
    finally:
        attn.qkv = qkv


def test_steps_take_the_papers_features_and_expansions_are_those_of_steps():
    assert [lost.paper_site(n) for n in ("dinov2-l-reg4", "deit3-b", "mini-clip", "mini-dinov2")] == [
        "k",
        "v",
        "v",
        "k",
    ]
    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 2)
    found = lost.expansions(model, pictures, bias=-0.1)
    for kind, site in (("queries", "q"), ("keys", "k"), ("values", "v")):
        assert torch.equal(found[kind], lost.steps(model, pictures, site, -0.1).expansion)
    assert torch.equal(lost.steps(model, pictures).degrees, lost.steps(model, pictures, "v").degrees)
    with pytest.raises(ValueError, match="choose 'q', 'k' or 'v'"):
        lost.steps(model, pictures, "x")


def test_figures_have_a_row_a_model_and_panels_an_image():
    from vitreg_lib import plots_maps

    model = zoo.load("mini-deit3-xs", "cpu")
    pictures = images.load("scenes", model, 2)
    steps = {"a": lost.steps(model, pictures), "b": lost.steps(model, pictures, "k")}
    truth = [b[v] for b, v in zip(pictures.scenes.boxes, pictures.scenes.visible, strict=True)]
    figure = plots_maps.discovery(pictures.pixels, steps, {"a": 8, "b": 8}, truth)
    assert len(figure.axes) == 2 * 2 * 5  # four panels and a gap
    found = lost.expansions(model, pictures)
    spots = {"a": {kind: maps.spots(m) for kind, m in found.items()}}
    assert len(plots_maps.expansions(pictures.pixels, {"a": found}, spots).axes) == 2 * 5
