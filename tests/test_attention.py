"""Attention maps are the model's own: equal to an explicit softmax, whatever the architecture adds to attention."""

from __future__ import annotations

import fig14
import pytest
import timm
import torch

from vitreg_lib.hooks.capture import capture
from vitreg_lib.measure import attention
from vitreg_lib.model import mini

KINDS = {  # what is special about it: timm's name and options that keep it small
    "plain": ("vit_tiny_patch16_224", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "rope": ("eva02_tiny_patch14_224", {}),
    "rope and registers": ("vit_small_patch16_dinov3", {}),
    "attention bias": ("beit_base_patch16_224", {"embed_dim": 96, "num_heads": 3}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "no cls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
}


def build(kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    options = {"img_size": 56 if "patch14" in name else 64, "depth": 2} | options
    return timm.create_model(name, **options).eval()


def image(model):
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def explicit_attention(model, x, block):
    """The whole attention matrix, from timm's unfused path and a hook on the dropout that follows its softmax."""
    found = []
    attn = model.blocks[block].attn
    fused, attn.fused_attn = attn.fused_attn, False
    handle = attn.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    attn.fused_attn = fused
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_explicit_softmax(kind):
    model = build(kind)
    x = image(model)
    rows, cols = (s // p for s, p in zip(x.shape[-2:], model.patch_embed.patch_size, strict=True))
    tokens = model.num_prefix_tokens + rows * cols
    queries = [*range(model.num_prefix_tokens), tokens - 1]
    seen = capture(model, x, "attention", queries=queries)
    for block in (0, 1):
        expected = explicit_attention(model, x, block)[:, :, queries]
        gap = (seen.attention[block] - expected).abs().max().item()
        assert gap < 1e-5, f"{kind}, block {block}: largest gap {gap:.2e}"
        on_patches = expected[..., model.num_prefix_tokens :].unflatten(-1, (rows, cols))
        assert torch.allclose(attention.maps(seen, block), on_patches.mean(1), atol=1e-5)


def test_softmax_by_hand_on_captured_q_and_k():
    model = build("registers")
    seen = capture(model, image(model), ("q", "k", "attention"), layers=1)
    scores = seen.q[1][:, :, : seen.num_prefix_tokens] @ seen.k[1].transpose(-2, -1) / seen.q[1].shape[-1] ** 0.5
    assert torch.allclose(seen.attention[1], scores.softmax(-1), atol=1e-5)


def seen_of(registers=4, depth_layers=None, queries=None):
    torch.manual_seed(0)
    model = mini.build("xs", registers=registers).eval()
    x = torch.randn(3, 3, 96, 96)
    return capture(model, x, ("norms", "attention"), layers=depth_layers, queries=queries)


def test_budget_sums_to_one_and_counts_outliers():
    seen = seen_of()
    is_outlier = torch.zeros(3, 144, dtype=torch.bool)
    is_outlier[:, 7] = True
    table = attention.budget(seen, is_outlier)
    assert torch.allclose(torch.tensor(table.sum(axis=1).to_numpy()), torch.ones(3).double(), atol=1e-5)
    expected = seen.attention[3][:, :, 0, 5 + 7].mean(1)
    assert torch.allclose(torch.tensor(table.outliers.to_numpy()).float(), expected, atol=1e-6)


def test_chosen_heads_queries_and_names():
    seen = seen_of(registers=2)
    assert attention.query_names(seen) == ["cls", "register 1", "register 2"]
    assert attention.query_names(seen, [3 + 13]) == ["patch (1, 1)"]
    one = attention.maps(seen, 2, queries=[1], heads=[0])
    assert torch.equal(one[:, 0], attention.on_grid(seen, seen.attention[2][:, 0, 1]))


@pytest.mark.parametrize(
    "wrong, named",
    [({"layer": 9}, "layer 9"), ({"queries": [77]}, "query 77"), ({"heads": [5]}, "head 5")],
)
def test_what_was_not_captured_is_refused_with_what_was(wrong, named):
    with pytest.raises(ValueError, match=named):
        attention.maps(seen_of(), **wrong)


def test_map_of_a_model_without_cls_is_the_mean_over_its_patches():
    from vitreg_lib.model.model import Model

    module = build("no cls")
    model = Model("no-cls", module, "0" * 64)
    x = image(module)
    one, seen = attention.cls_or_mean(model, x)
    everything = explicit_attention(module, x, 1).mean((1, 2)).unflatten(-1, (4, 4))
    assert torch.allclose(one, everything, atol=1e-5) and seen.queries == tuple(range(16))


@pytest.mark.parametrize("fused", [True, False])
def test_value_gain_is_the_length_of_the_values_over_that_of_the_input(fused):
    """Of an attention with one matrix for q, k and v, and of one with a matrix each (Eva has both names)."""
    from vitreg_lib.model.model import Model

    torch.manual_seed(0)
    options = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3, "qkv_fused": fused}
    module = timm.create_model("eva02_tiny_patch14_224", **options).eval()
    model, x = Model("eva", module, "0" * 64), image(module)
    given = []
    handle = module.blocks[1].attn.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
    gain = fig14.value_gain(model, x)
    handle.remove()
    attn = module.blocks[1].attn
    weight = attn.qkv.weight[96:] if fused else attn.v_proj.weight
    expected = (given[0] @ weight.T).norm(dim=-1) / given[0].norm(dim=-1)
    torch.testing.assert_close(gain, expected[:, 1:].detach())
