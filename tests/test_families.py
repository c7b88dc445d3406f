"""ViTs of every library are recognised by their structure, and what is captured is what the library itself says."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from torch import nn

import vitreg_lib as vr
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.hooks.anatomy import describe, dissect
from vitreg_lib.hooks.capture import SITES, capture
from vitreg_lib.model import added, mend, saved, zoo

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REGISTERS = tuple(f"register {i}" for i in range(1, 5))
SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=16)
OF_TRANSFORMERS = {  # class of the configuration: its own options, prefix tokens
    "ViT": ({}, ("cls",)),
    "DeiT": ({}, ("cls", "dist")),
    "Dinov2": ({"mlp_ratio": 2}, ("cls",)),
    "Dinov2WithRegisters": ({"mlp_ratio": 2, "num_register_tokens": 4}, ("cls", *REGISTERS)),
    "DINOv3ViT": ({"num_register_tokens": 4}, ("cls", *REGISTERS)),
    "CLIPVision": ({}, ("cls",)),
    "SiglipVision": ({}, ()),
    "Siglip2Vision": ({"num_patches": 4}, ()),
    "Aimv2Vision": ({}, ()),
    "ViTMAE": ({"mask_ratio": 0.0}, ("cls",)),
    "Beit": ({}, ("cls",)),
    "IJepa": ({}, ()),
}


def stirred(model: nn.Module) -> nn.Module:
    """The model with all weights away from special values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def of_transformers(name: str, implementation: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = SIZES | ({} if name.startswith("Dinov2") else {"intermediate_size": 96}) | OF_TRANSFORMERS[name][0]
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation=implementation)
    torch.manual_seed(0)
    return stirred(getattr(transformers, f"{name}Model")(config))


def of_siglip2(images: torch.Tensor) -> dict[str, torch.Tensor]:
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patches = torch.stack([convert_image_to_patches(image, 16) for image in images])
    grid = torch.tensor([[2, 2]] * len(images))
    return dict(pixel_values=patches, pixel_attention_mask=torch.ones(patches.shape[:2]), spatial_shapes=grid)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_transformers_say_the_same_of_tokens_and_attention(name):
    """Against `output_hidden_states` and, from the eager implementation, `output_attentions`."""
    sdpa, eager = of_transformers(name), of_transformers(name, "eager")
    assert all(torch.equal(a, b) for a, b in zip(sdpa.parameters(), eager.parameters(), strict=True))
    options = {"pixel_values": X} | ({"noise": torch.arange(4.0).expand(2, -1)} if name == "ViTMAE" else {})
    if name == "Siglip2Vision":  # as its own image processor cuts the patches
        options = of_siglip2(X)
    with torch.no_grad():
        theirs = eager(**options, output_hidden_states=True, output_attentions=True)
    prefix = OF_TRANSFORMERS[name][1]
    for model in (sdpa, eager):  # eager attention is fused for the time of the capture
        seen = capture(model, X, SITES, queries=range(len(prefix) + 4))
        assert seen.prefix == prefix and seen.grid == (2, 2)
        for layer in range(3):
            torch.testing.assert_close(seen.tokens[layer], theirs.hidden_states[layer + 1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen.attention[layer], theirs.attentions[layer], rtol=1e-4, atol=1e-5)
        if name not in ("CLIPVision", "IJepa"):  # the first gives no normalised tokens
            torch.testing.assert_close(seen.final, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert eager.config._attn_implementation == "eager"


def test_what_enters_the_second_linear_layer_of_the_mlp_is_kept():
    model = of_transformers("DINOv3ViT")
    seen = capture(model, X, ("mlp", "embedding"))
    expected = []
    handle = model.model.layer[1].mlp.down_proj.register_forward_pre_hook(lambda m, inputs: expected.append(inputs[0]))
    with torch.no_grad():
        model(pixel_values=X)
    handle.remove()
    torch.testing.assert_close(seen.mlp[1], expected[0])
    convolution = model.embeddings.patch_embeddings
    torch.testing.assert_close(seen.embedding, convolution(X).flatten(2).transpose(1, 2).detach())


def rows_of(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    return attention(x, x, x, need_weights=True, average_attn_weights=False)[1]


def of_torchvision() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96)
    return stirred(torchvision.models.VisionTransformer(**sizes))


def of_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=3, width=48, head_width=16, patch_size=16)
    text = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=5)
    return stirred(open_clip.CLIP(24, vision, text))


class Clip(nn.Module):
    """The image tower of OpenAI's CLIP as it was published: blocks take (tokens, batch, dim)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 48, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(48))
        self.positional_embedding = nn.Parameter(torch.randn(5, 48))
        self.ln_pre, self.ln_post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.resblocks = nn.Sequential(*(ClipBlock() for _ in range(3)))
        self.proj = nn.Parameter(torch.randn(48, 24))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.resblocks(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class ClipBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(48, 3), nn.LayerNorm(48), nn.LayerNorm(48)
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


NEURONS = [(0, 5), (1, 5), (1, 20)]
OTHERS = {"torchvision": of_torchvision, "open_clip": of_open_clip, "OpenAI": lambda: stirred(Clip())}


def by_hand(model: nn.Module, n: int) -> torch.Tensor:
    """(images, tokens, dim) after the last block, with n zeros behind the prefix and `NEURONS` moved one by one."""
    anatomy, calls = dissect(model), []
    old, first = anatomy.num_prefix_tokens, anatomy.batch_first
    keep = [
        block.register_forward_pre_hook(lambda b, a, k: calls.append((a, k)), with_kwargs=True)
        for block in anatomy.blocks
    ]
    with torch.no_grad():
        anatomy.forward(X)
    for handle in keep:
        handle.remove()

    def moving(layer, linear):
        def forward(hidden):
            hidden = (hidden if first else hidden.transpose(0, 1)).clone()
            for image in range(len(hidden)):
                for neuron in [i for block, i in NEURONS if block == layer]:
                    hidden[image, old : old + n, neuron] = max(hidden[image, old:, neuron].tolist(), key=abs)
                    hidden[image, old + n :, neuron] = 0
            return nn.functional.linear(hidden if first else hidden.transpose(0, 1), linear.weight, linear.bias)

        return forward

    x = calls[0][0][0] if first else calls[0][0][0].transpose(0, 1)
    x = torch.cat([x[:, :old], torch.zeros(len(x), n, x.shape[-1]), x[:, old:]], 1)
    x = x if first else x.transpose(0, 1)
    with torch.no_grad():
        for layer, (block, (args, kwargs)) in enumerate(zip(anatomy.blocks, calls, strict=True)):
            anatomy.mlp_out[layer].forward = moving(layer, anatomy.mlp_out[layer])
            x = block(x, *args[1:], **kwargs)
            x = x[0] if isinstance(x, tuple) else x
            del anatomy.mlp_out[layer].forward
    return x if first else x.transpose(0, 1)


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        said = dissect(model).forward(X)
    return said if torch.is_tensor(said) else said.last_hidden_state


@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *OTHERS])
def test_registers_are_added_to_models_of_every_library(name, tmp_path):
    """Against a loop over images and neurons; what the library's own heads get has the tokens that it had before."""
    model = OTHERS[name]() if name in OTHERS else of_transformers(name)
    before, prefix = answer(model), dissect(model).prefix
    assert torch.equal(answer(added.add_registers(model, [], 0)), before)
    mended = added.add_registers(model, NEURONS, 2)
    seen = capture(mended, X, ("tokens", "attention", "mlp"))
    assert seen.num_prefix_tokens == len(prefix) + 2 and seen.prefix[: len(prefix)] == prefix
    torch.testing.assert_close(seen.tokens[2], by_hand(model, 2), rtol=1e-4, atol=1e-5)
    after = answer(mended)
    assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(answer(model), before), "the model itself is left as it was"
    if name not in ("open_clip", "OpenAI"):  # the first has no name here, the second no library
        saved.write(vr.load(mended), tmp_path / "mended.safetensors")
        again = vr.load(f"file:{tmp_path}/mended.safetensors", "cpu")
        torch.testing.assert_close(answer(again.module), after, rtol=1e-5, atol=1e-5)
        assert again.role == "mended" and type(again.module) is type(model)


@pytest.mark.parametrize("kind", ["described", "OpenAI"])
def test_a_module_of_ones_own_gets_registers_and_takes_the_file_back(kind, tmp_path):
    prefix = ("cls", "register 1")
    own = lambda: describe(stirred(Own()), **DESCRIPTION, prefix=prefix)  # noqa: E731
    build = {"OpenAI": lambda: stirred(Clip()), "described": own}[kind]
    model = vr.load(build())
    empty = mend.with_empty_tokens(model, 3)
    assert empty.registers == model.registers + 3 and empty.name.endswith("+empty3")
    mended = mend.with_test_time_registers(model, 2, NEURONS)
    tokens = capture(mended.module, X, "tokens").tokens
    torch.testing.assert_close(tokens[max(tokens)], by_hand(model.module, 2), rtol=1e-4, atol=1e-5)
    saved.write(mended, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="no name builds a"):
        vr.load(f"file:{tmp_path}/mine.safetensors")
    fresh = build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    assert torch.equal(answer(saved.onto(fresh, tmp_path / "mine.safetensors")), answer(mended.module))


@pytest.mark.parametrize("wrap", [None, nn.DataParallel, torch.compile, lambda m: nn.ModuleDict({"backbone": m})])
@pytest.mark.parametrize("kind", ["torchvision", "open_clip", "OpenAI"])
def test_attention_of_torchs_own_module_is_captured(kind, wrap):
    """Against the module's own weights, with each block's own input; also inside a wrapper."""
    model = {"torchvision": of_torchvision, "open_clip": of_open_clip, "OpenAI": lambda: stirred(Clip())}[kind]()
    seen = capture(model if wrap is None else wrap(model), X, SITES, queries=range(5))
    visual = model.visual if kind == "open_clip" else model
    blocks = {"torchvision": lambda: visual.encoder.layers, "open_clip": lambda: visual.transformer.resblocks}
    blocks, states = blocks.get(kind, lambda: visual.resblocks)(), []
    handles = [b.register_forward_hook(lambda m, inputs, out: states.append((inputs[0], out))) for b in blocks]
    with torch.no_grad():
        visual(X)
        for layer, (block, (entering, leaving)) in enumerate(zip(blocks, states, strict=True)):
            leaving = leaving.transpose(0, 1) if kind == "OpenAI" else leaving
            torch.testing.assert_close(seen.tokens[layer], leaving, rtol=1e-4, atol=1e-4)
            attention = block.self_attention if kind == "torchvision" else block.attn
            rows = rows_of(attention, block.ln_1(entering))
            torch.testing.assert_close(seen.attention[layer], rows, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert seen.prefix == ("cls",) and seen.mlp[2].shape == (2, 5, 192 if kind == "open_clip" else 96)
    norm = visual.encoder.ln if kind == "torchvision" else visual.ln_post
    torch.testing.assert_close(seen.final, norm(seen.tokens[2]).detach())


OF_TIMM = {  # what was measured wrongly by other means: what is right
    "vit_small_r26_s32_224": ((32, 32), ("cls",), (2, 3)),  # a convolutional stem: a patch is 32 pixels
    "deit_tiny_distilled_patch16_224": ((16, 16), ("cls", "dist"), (4, 6)),
    "cait_xxs24_224": ((16, 16), (), (4, 6)),  # cls joins after the blocks
    "vit_dwee_patch16_reg1_gap_256": ((16, 16), ("register 1",), (4, 6)),
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_grid_and_prefix_are_those_of_the_tokens_that_arrive(name):
    patch, prefix, grid = OF_TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(64, 96), **({} if "_r26_" in name else {"depth": 2})).eval()
    x = torch.randn(1, 3, 64, 96)
    seen = capture(model, x, layers=[0, 1])
    assert (dissect(model).patch_size, seen.prefix, seen.grid) == (patch, prefix, grid)
    assert seen.norms.shape == (1, 2, len(prefix) + grid[0] * grid[1])


def test_naflex_takes_plain_images_of_any_shape():
    """Its embedding adds prefix tokens and positions; the patches are what its projection gives."""
    torch.manual_seed(0)
    model, x = timm.create_model("naflexvit_base_patch16_gap", depth=2).eval(), torch.randn(2, 3, 64, 96)
    seen = capture(model, x, ("tokens", "embedding", "attention"))
    assert (seen.prefix, seen.grid, seen.embedding.shape) == (REGISTERS, (4, 6), (2, 24, 768))
    final, maps = model.forward_intermediates(x, indices=[1], output_fmt="NLC")
    torch.testing.assert_close(seen.patches(seen.tokens[1]), maps[0])
    mended = added.add_registers(model, [(0, 3)], 2)
    assert mended.forward_features(x).shape == (2, 6 + 24, 768) and mended(x).shape == model(x).shape
    assert capture(mended, x).num_registers == 6


def test_attention_that_would_say_nothing_is_refused():
    """Differential attention takes one map from another, talking heads mix them, a gate changes what comes out."""
    x = torch.randn(1, 3, 64, 64)
    twice = timm.create_model("vit_dwee_patch16_reg1_gap_256", img_size=64, depth=2).eval()
    with pytest.raises(ValueError, match="attention of block 0 is computed more than once"):
        capture(twice, x, "attention")
    with pytest.raises(ValueError, match="did not reach the site 'attention'"):
        capture(timm.create_model("cait_xxs24_224", img_size=64, depth=2).eval(), x, "attention", queries=[0])
    gated = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    gated.blocks[0].attn.proj = nn.Sequential(Halved(), gated.blocks[0].attn.proj)
    with pytest.raises(ValueError, match="block 0 is changed before it enters the next layer"):
        capture(gated, x, "attention")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gated.modules())
    sam = timm.create_model("samvit_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, window_size=2)
    with pytest.raises(ValueError, match="block 0 is computed in windows"):
        capture(sam.eval(), x, "attention", queries=[0])


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", ["convit_tiny", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_tokens_that_change_on_the_way_are_refused_in_one_line(name):
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match=r"^a block gives \(1, .* cannot be measured; .*wrongly$"):
        capture(model, torch.randn(1, 3, 224, 224))


def test_another_image_size_is_taken_or_refused_in_one_line():
    """Plain ViTs can be built for it; of others timm refuses some, and a size that fails is no raw error."""
    x = torch.randn(1, 3, 64, 48)
    model = vr.load("random:vit_tiny_patch16_224", "cpu", image_size=(64, 48))
    assert model.capture(x).grid == (4, 3)
    with pytest.raises(UserError, match="davit_tiny is not made for another image size: .*img_size"):
        vr.load("random:davit_tiny", "cpu", image_size=64)
    convit = timm.create_model("convit_tiny", img_size=32, depth=2).eval()
    with pytest.raises(UserError, match=r"fails on images of 64 x 48 pixels: [^\n]*; it takes 32 x 32, and vr\.load"):
        capture(convit, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in convit.modules())


def test_other_channels_are_taken_or_refused():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=4).eval()
    assert capture(model, torch.randn(1, 4, 32, 32)).grid == (2, 2)
    with pytest.raises(ValueError, match="images of 3 channels: this model takes 4"):
        capture(model, X)


@pytest.mark.parametrize("name", ["mixer_s32_224", "resnet18", "mvitv2_tiny"])
def test_what_is_no_vit_is_refused_in_one_line(name):
    with pytest.raises(TypeError, match="no ViT is recognised") as error:
        dissect(timm.create_model(name))
    assert "\n" not in str(error.value)


class Own(nn.Module):
    """A ViT that nobody knows: attention by hand-made names, a linear patch embedding, two tokens in front."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut = nn.Conv2d(3, 24, 8, 8)
        self.extra = nn.Parameter(torch.randn(2, 24))
        self.layers = nn.ModuleList(OwnBlock() for _ in range(2))
        self.last = nn.LayerNorm(24)

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.look, self.think = OwnAttention(), nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))

    def forward(self, x):
        x = x + self.look(x)
        return x + self.think(x)


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.mix(x).view(len(x), -1, 3, 4, 6).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


DESCRIPTION = dict(blocks="layers", attention="look", mlp_out="think.2", norm="last", patch=8, heads=4)


def test_a_model_that_nobody_knows_is_described():
    model = Own().eval()
    with pytest.raises(
        TypeError, match="Own has no list of equal blocks with attention: .* `vr.describe` says by hand"
    ):
        dissect(model)
    assert describe(model, **DESCRIPTION, prefix=("cls", "register 1")) is model
    x = torch.randn(2, 3, 16, 24)
    seen = vr.capture(model, x, SITES, queries=range(8))
    assert (seen.prefix, seen.grid, seen.num_registers) == (("cls", "register 1"), (2, 3), 1)
    with torch.no_grad():
        torch.testing.assert_close(seen.final, model(x))
        inside = model.layers[0](torch.cat([model.extra.expand(2, -1, -1), seen.embedding], 1))
        q, k = (
            (model.layers[0].look.mix(torch.cat([model.extra.expand(2, -1, -1), seen.embedding], 1))[..., :48])
            .view(2, 8, 2, 4, 6)
            .permute(2, 0, 3, 1, 4)
        )
    torch.testing.assert_close(seen.tokens[0], inside)
    torch.testing.assert_close(seen.attention[0], (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1))
    assert seen.mlp[1].shape == (2, 8, 24)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(blocks="blocks"), "Own has no blocks; it has cut, layers, last"),
        (dict(attention="attn"), "OwnBlock has no attn; it has look, think"),
        (dict(heads=None), "look of Own does not say its heads: give heads"),
        (dict(prefix=("register 1", "cls")), 'write "cls", "dist", "register 1" …, which stand in this order'),
        (dict(prefix=("cls", "storage")), 'write "cls", "dist", "register 1"'),
    ],
)
def test_a_description_that_leads_nowhere_is_refused_and_the_model_left_as_it_was(change, told):
    model = describe(Own(), **DESCRIPTION, prefix=("cls", "register 1"))
    before = model.vitreg_description
    with pytest.raises(TypeError, match=told):
        describe(model, **DESCRIPTION | change)
    assert model.vitreg_description == before


def test_a_wrong_description_is_noticed_when_tokens_arrive():
    model = describe(Own().eval(), **DESCRIPTION, prefix=("cls",))
    with pytest.raises(ValueError, match=r"a block gives \(2, 18, 24\), but \(2, 17, 24\) was expected"):
        capture(model, X)


NOT_MEASURED = [name for name, entry in zoo.entries().items() if entry.get("measured") == "not here"]


def test_published_models_say_their_terms_and_what_is_expected():
    assert len(NOT_MEASURED) >= 16
    for name in NOT_MEASURED:
        entry = zoo.entries()[name]
        assert {"timm", "about", "family", "licence", "megabytes", "expected"} <= set(entry), name
        assert timm.get_pretrained_cfg(entry["timm"]).tag == entry["timm"].partition(".")[2], name


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_MEASURED)
def test_a_published_model_that_is_not_here_can_be_measured(name):
    """Its architecture, with random weights: norms, and attention where there is one map a head."""
    entry = zoo.entries()[name]
    model = vr.load(f"random:{entry['timm'].partition('.')[0]}", "cpu")
    assert model.module.pretrained_cfg["architecture"] == entry["timm"].partition(".")[0]
    parameters = sum(p.numel() for p in model.module.parameters())
    assert 4e-6 * parameters == pytest.approx(entry["megabytes"], rel=0.05)
    x = torch.randn(1, 3, model.input_size, model.input_size)
    seen = model.capture(x, ("norms", "final"))
    assert seen.norms.isfinite().all() and seen.norms.shape[1] == model.anatomy.depth
    if name == "vit-dwee":
        with pytest.raises(ValueError, match="more than once"):
            model.capture(x, "attention")
    else:
        rows = model.capture(x, "attention", layers=-1, queries=[0]).attention[model.anatomy.depth - 1]
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))


def test_the_worked_example_of_your_own_vit_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "your-own-vit.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 3 and "vr.describe(" in examples[1]
    namespace = {"__name__": "example"}
    for example in examples:
        exec(compile(example, "docs/your-own-vit.md", "exec"), namespace)  # noqa: S102
    assert "of the patch tokens are outliers after block 3" in capsys.readouterr().out
