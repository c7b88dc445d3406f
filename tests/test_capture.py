"""What `capture` keeps is what the model computes, and the model does not notice."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitreg_lib.hooks.anatomy import dissect
from vitreg_lib.hooks.capture import SITES, capture

KINDS = {  # what is special about it: timm's name and options that keep it small
    "plain": ("vit_tiny_patch16_224", {}),
    "no cls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "registers, no cls": ("vit_tiny_patch16_224", {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}),
    "LayerScale": ("deit3_small_patch16_224", {"embed_dim": 96, "num_heads": 3}),
    "pre-norm CLIP": ("vit_base_patch16_clip_224", {"embed_dim": 96, "num_heads": 3}),
    "patch 14": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 96, "num_heads": 3}),
    "SwiGLU": ("vit_giant_patch14_dinov2", {"embed_dim": 96, "num_heads": 3}),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "rotary and registers": ("vit_small_patch16_dinov3", {}),
}


@functools.cache
def build(kind: str) -> nn.Module:
    """A random model of three blocks; all weights are stirred, so that none is at a special value."""
    name, options = KINDS[kind]
    torch.manual_seed(0)
    size = 56 if "patch14" in name else 64
    model = timm.create_model(name, **{"img_size": size, "depth": 3, "dynamic_img_size": True} | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def pictures(model, n=2, rows=3, cols=5, seed=1):
    height, width = (a * b for a, b in zip((rows, cols), dissect(model).patch_size, strict=True))
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plain_forward(model, x) -> list[torch.Tensor]:
    """Every block's output, by a hook on each block and the model's own forward pass."""
    outputs = []
    handles = [block.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


def hooks_left(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_tokens_equal_a_plain_forward(kind):
    model = build(kind)
    x = pictures(model)
    seen = capture(model, x, ("norms", "tokens"))
    outputs = plain_forward(model, x)
    assert seen.norms.shape == (2, 3, model.num_prefix_tokens + 3 * 5)
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(seen.tokens[layer], output, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(seen.norms[:, layer], output.double().norm(dim=-1).float(), rtol=1e-5, atol=0)


@given(
    kind=st.sampled_from(list(KINDS)),
    n=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layers=st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda layer: layer % 3),
    batch_size=st.integers(1, 6),
)
def test_any_batch_grid_and_layers(kind, n, grid, layers, batch_size):
    model = build(kind)
    x = pictures(model, n, *grid, seed=n)
    seen = capture(model, x, "norms", layers, batch_size=batch_size)
    expected = torch.stack([plain_forward(model, x)[layer].norm(dim=-1) for layer in layers], 1)
    assert seen.grid == grid
    assert seen.layers == tuple(layer % 3 for layer in layers)
    torch.testing.assert_close(seen.norms, expected, rtol=2e-5, atol=0)
    parts = torch.cat([seen.norms[..., : int(seen.has_cls)], seen.register_norms, seen.patch_norms], -1)
    assert torch.equal(parts, seen.norms)
    assert torch.equal(seen.norm_maps.flatten(1), seen.patch_norms[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_rows_sum_to_one_and_make_the_block_output(kind):
    """Rows of all queries times v, through the layer's own projection, are what the attention returned."""
    model = build(kind)
    x = pictures(model, n=1)
    tokens = model.num_prefix_tokens + 15
    returned = []
    attn = model.blocks[1].attn
    last = attn.norm if isinstance(getattr(attn, "norm", None), nn.LayerNorm) else attn.proj
    handle = last.register_forward_pre_hook(lambda m, inputs: returned.append(inputs[0]))
    seen = capture(model, x, ("attention", "v"), layers=1, queries=range(tokens))
    handle.remove()
    rows = seen.attention[1]
    assert rows.shape == (1, dissect(model).num_heads, tokens, tokens)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    torch.testing.assert_close((rows @ seen.v[1]).transpose(1, 2).flatten(2), returned[0], rtol=1e-4, atol=1e-5)


def test_final_is_after_the_final_norm():
    model = build("registers")
    x = pictures(model)
    with torch.no_grad():
        expected = model.norm(plain_forward(model, x)[-1])
    seen = capture(model, x, "final")
    torch.testing.assert_close(seen.final, expected)
    torch.testing.assert_close(seen.patches(seen.final), expected[:, 5:])


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_embedding_is_the_patches_row_by_row(tiny, dynamic):
    model = tiny(img_size=(32, 48), dynamic_img_size=dynamic)
    x = torch.randn(2, 3, 32, 48)
    expected = model.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (images, 6 patches, dim)
    torch.testing.assert_close(capture(model, x, "embedding").embedding, expected.detach())


def test_norms_are_float32_in_a_half_precision_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval().to(torch.bfloat16)
    x = torch.randn(2, 3, 32, 32)  # images as they are loaded: the weights say in what precision they go in
    seen = capture(model, x, ("norms", "tokens"))
    assert seen.norms.dtype == torch.float32 and seen.tokens[1].dtype == torch.bfloat16
    torch.testing.assert_close(seen.norms[:, 1], seen.tokens[1].float().norm(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_hook_is_left(kind):
    model = build(kind)
    capture(model, pictures(model), SITES, queries=[0])
    assert hooks_left(model) == 0


def test_no_hook_is_left_after_an_error(tiny):
    model = tiny()
    model.blocks[0].attn.fused_attn = False
    model.train()

    def fails(x):
        raise RuntimeError("in the middle")

    model.blocks[1].mlp.forward = fails
    with pytest.raises(ValueError, match="in the middle"):
        capture(model, torch.randn(1, 3, 32, 32), SITES)
    assert hooks_left(model) == 0
    assert model.training
    assert model.blocks[0].attn.fused_attn is False
    assert model.blocks[1].attn.fused_attn == timm.layers.use_fused_attn()


def test_the_model_is_left_as_it_came(tiny):
    model = tiny(proj_drop_rate=0.1)
    model.train()
    model.blocks[0].eval()  # a frozen part of a model in training
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].mlp.requires_grad_(False)

    def state():
        modules = {name: (m.training, getattr(m, "fused_attn", None)) for name, m in model.named_modules()}
        return modules, {n: (p.requires_grad, p.grad, p.dtype) for n, p in model.named_parameters()}

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, torch.randn(3, 3, 32, 32), SITES, batch_size=2)
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_unfused_models_give_the_same_rows(tiny):
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    fused = capture(model, x, "attention").attention
    for block in model.blocks:
        block.attn.fused_attn = False
    unfused = capture(model, x, "attention").attention
    torch.testing.assert_close(fused, unfused)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(keep="norm"), "unknown site 'norm'; known are norms, tokens"),
        (dict(layers=2), "layer 2 out of range for 2 blocks (0…1, or -1)"),
        (dict(layers=[0, -3]), "layer -3 out of range for 2 blocks"),
        (dict(keep="attention", queries=[5]), "query 5 out of range for 5 tokens (0…4)"),
        (dict(keep="attention", queries=[-1]), "query -1 out of range"),
        (dict(batch_size=0), "batch_size"),
        (dict(images=torch.randn(1, 3, 30, 32)), "do not divide into patches of 16 x 16"),
        (dict(images=torch.randn(0, 3, 32, 32)), "no images"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(tiny, options, told):
    model = tiny()
    model.forward_features = lambda x: pytest.fail("the model ran")
    with pytest.raises(ValueError) as error:
        capture(model, **{"images": torch.randn(1, 3, 32, 32)} | options)
    assert told in str(error.value)


def test_a_model_that_is_no_vit_is_refused():
    with pytest.raises(
        TypeError,
        match="Linear has no list of equal blocks with attention and no patch embedding: no ViT is recognised",
    ):
        capture(nn.Linear(3, 3), torch.randn(1, 3, 32, 32))


def test_a_capture_does_not_hold_the_model(tiny):
    model = tiny()
    seen = capture(model, torch.randn(1, 3, 32, 32), SITES)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert seen.norms.shape == (1, 2, 5)


def limited(model, most: int) -> list[int]:
    """Let the model run out of memory for batches above `most`; the list of the batches that came through."""
    forward, sizes = model.forward_features, []

    def run(x):
        if len(x) > most:
            raise torch.OutOfMemoryError("too large")
        sizes.append(len(x))
        return forward(x)

    model.forward_features = run
    return sizes


def test_out_of_memory_halves_the_batch_and_goes_on(tiny):
    model, x = tiny(), torch.randn(7, 3, 32, 32)
    expected = capture(model, x).norms
    sizes = limited(model, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = capture(model, x, batch_size=8)
    assert [str(w.message).split(": ")[1] for w in told] == ["going on with 3 images a batch"]  # of 7, not of 8
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(seen.norms, expected)


def test_out_of_memory_with_one_image_is_an_error(tiny):
    model = tiny()
    limited(model, 0)
    with pytest.warns(UserWarning, match="1 images a batch"), pytest.raises(torch.OutOfMemoryError):
        capture(model, torch.randn(2, 3, 32, 32), batch_size=2)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("error")  # a single image cannot be halved: nothing is promised
        capture(model, torch.randn(1, 3, 32, 32))
    assert hooks_left(model) == 0


def test_a_layer_is_found_among_those_captured(tiny):
    seen = capture(tiny(depth=5), torch.randn(1, 3, 32, 32), layers=[1, -1])
    assert [seen.block(layer) for layer in (1, 4, -1, -2)] == [1, 4, 4, 1]
    assert torch.equal(seen.norms_by_kind(1)["cls"], seen.norms[:, 0, 0])
    for layer in (0, -3):
        with pytest.raises(ValueError, match=f"layer {layer} was not captured; captured are 1, 4"):
            seen.block(layer)


def test_attention_without_prefix_tokens_needs_queries(tiny):
    model = tiny(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="say which tokens' attention"):
        capture(model, torch.randn(1, 3, 32, 32), "attention")


def test_layers_are_kept_once_each_and_may_be_numpys(tiny):
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    captured = capture(model, x, layers=[0, 1, -1, 0])
    assert captured.layers == tuple(sorted({0, 1, dissect(model).depth - 1}))
    assert captured.norms.shape[1] == len(captured.layers)
    assert capture(model, x, layers=np.int64(1)).layers == (1,)
    with pytest.raises(ValueError, match="layer none out of range"):
        capture(model, x, layers=[])


def test_attention_written_by_hand_is_refused_in_words_that_help(tiny):
    model = tiny()
    model.blocks[0].attn.forward = lambda x, **_: x
    assert capture(model, torch.randn(1, 3, 32, 32)).norms.isfinite().all()
    with pytest.raises(ValueError, match="did not reach the site 'q' of block 0; capture sees only attention by torch"):
        capture(model, torch.randn(1, 3, 32, 32), "q")
