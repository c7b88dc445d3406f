"""Random weights in every published layout give, loaded by their file, what the model gives that they came from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import vitreg_lib as vr
from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.data import images
from vitreg_lib.hooks.capture import capture
from vitreg_lib.model import added, mini, zoo
from vitreg_lib.model.names import file_parts, split
from vitreg_lib.model.weights import CLIP, IMAGENET, read_weights

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def made(name: str, **options):
    """A model of timm's with random weights, none at a special value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def as_dinov2(model) -> dict:
    """The official names; the position of cls stands in pos_embed, a token for masking beside."""
    state = {k.replace("reg_token", "register_tokens"): v for k, v in model.state_dict().items()}
    if "register_tokens" in state:
        cls = torch.randn(1, 1, model.embed_dim)
        state |= {"cls_token": state["cls_token"] - cls, "pos_embed": torch.cat([cls, state["pos_embed"]], 1)}
    return state | {"mask_token": torch.zeros(1, model.embed_dim)}


def in_chunks(state: dict) -> dict:
    """Blocks in chunks of six, as the training code keeps them, under a teacher with the heads of its losses."""
    named = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 6}.{m[1]}", k): v for k, v in state.items()}
    heads = {f"{kind}_head.mlp.0.weight": torch.zeros(3, 3) for kind in ("dino", "ibot")}
    return {"teacher": {f"backbone.{k}": v for k, v in named.items()} | heads}


def as_dinov3(model) -> dict:
    state = {k.replace("reg_token", "storage_tokens"): v for k, v in model.state_dict().items()}
    state = {re.sub(r"gamma_([12])", r"ls\1.gamma", k): v for k, v in state.items()}
    return state | {"mask_token": torch.zeros(1, model.embed_dim), "rope_embed.periods": torch.ones(16)}


def as_mae(model) -> dict:
    decoder = {"decoder_embed.weight": torch.zeros(8, 192), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    return {"model": model.state_dict() | decoder | {"mask_token": torch.zeros(1, 1, 8)}, "epoch": np.float64(800.0)}


def as_dino(model) -> dict:
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_g": torch.zeros(4, 1)}
    student = {f"module.{k}": torch.zeros_like(v) for k, v in teacher.items()}
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit_tiny"), "epoch": 100}


def as_deit3(model) -> dict:
    return {"model": {re.sub(r"ls([12])\.gamma", r"gamma_\1", k): v for k, v in model.state_dict().items()}}


LAYOUTS = {  # what timm calls it, how it is published, the layout's name, its preprocessing
    "DINOv2": ("vit_small_patch14_dinov2", dict(img_size=518), as_dinov2, "DINOv2", IMAGENET),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=518), as_dinov2, "DINOv2", IMAGENET),
    "DINOv2 in training": (
        "vit_small_patch14_reg4_dinov2",
        dict(img_size=518),
        lambda m: in_chunks(as_dinov2(m)),
        "DINOv2",
        IMAGENET,
    ),
    "DINOv3": ("vit_small_patch16_dinov3", {}, as_dinov3, "DINOv3", IMAGENET),
    "DeiT-III": ("deit3_small_patch16_224", {}, as_deit3, "DeiT-III", IMAGENET),
    "MAE": ("vit_tiny_patch16_224", dict(num_classes=0), as_mae, "MAE", IMAGENET),
    "DINO": ("vit_tiny_patch16_224", dict(num_classes=0), as_dino, "DINO", IMAGENET),
    "timm": ("vit_tiny_patch16_224", dict(num_classes=7), lambda m: m.state_dict(), "timm's", {}),
    "Lightning": (
        "vit_tiny_patch16_224",
        {},
        lambda m: {"state_dict": {f"model._orig_mod.{k}": v for k, v in m.state_dict().items()}, "epoch": 3},
        "timm's",
        {},
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_published_layout_is_loaded_by_its_content(kind, tmp_path):
    name, options, publish, layout, preprocessing = LAYOUTS[kind]
    model, suffix = made(name, **options), ("bin", "pth")[len(kind) % 2]  # the suffix says nothing
    torch.save(publish(model), tmp_path / f"weights.{suffix}")
    loaded = zoo.load(f"file:{tmp_path / f'weights.{suffix}'}", "cpu")
    assert loaded.about.startswith(f"weights in the layout {layout}")
    assert all(getattr(loaded, key) == value for key, value in preprocessing.items())
    size = model.patch_embed.img_size[0] if kind.startswith("DINOv2") else loaded.input_size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x), model(x), rtol=1e-4, atol=1e-4)
    ours, theirs = (capture(m, x, ("tokens", "attention"), layers=-1) for m in (loaded.module, model))
    last = ours.layers[-1]
    torch.testing.assert_close(ours.tokens[last], theirs.tokens[last], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.attention[last], theirs.attention[last], rtol=1e-4, atol=1e-5)


def test_averaged_weights_are_taken_and_raw_ones_on_request(tmp_path):
    model, other = made("vit_tiny_patch16_224"), timm.create_model("vit_tiny_patch16_224").eval()
    path = tmp_path / "run.ckpt"
    torch.save(
        {"state_dict": other.state_dict(), "model_ema": model.state_dict(), "args": argparse.Namespace(a=1)}, path
    )
    averaged, raw = zoo.load(f"file:{path}", "cpu"), zoo.load(f"file:{path}", "cpu", weights="raw")
    assert averaged.about.endswith(", of model_ema") and raw.about.endswith(", of state_dict")
    for loaded, wanted in ((averaged, model), (raw, other)):
        assert torch.equal(loaded.module.cls_token, wanted.cls_token)


def test_torchvisions_file_gives_torchvisions_model(tmp_path):
    torch.manual_seed(0)
    sizes = dict(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=256, num_classes=5)
    model = torchvision.models.VisionTransformer(**sizes).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    loaded = zoo.load(f"file:{tmp_path / 'vit.pth'}", "cpu")
    assert (loaded.input_size, loaded.mean, loaded.interpolation) == (64, IMAGENET["mean"], "bilinear")
    with torch.no_grad():
        assert torch.equal(loaded.module(X), model(X))
    assert loaded.capture(X, "attention").attention[1].shape == (2, 2, 1, 17)


@pytest.fixture
def clip(tmp_path):
    """open_clip's ViT-B-32 made small by its own configuration, and the name under which open_clip then knows it."""
    open_clip = pytest.importorskip("open_clip")
    import json

    vision = dict(image_size=64, layers=2, width=768, patch_size=16)
    text = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=1)
    (tmp_path / "tiny-vit.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    torch.manual_seed(0)
    return open_clip.create_model("tiny-vit").eval()


def test_open_clips_file_is_loaded_into_timm_and_by_open_clip(clip, tmp_path):
    path = tmp_path / "open_clip.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    with pytest.raises(UserError, match="do not fit the architecture: .*; they look like #vit_base_patch16_clip_224"):
        zoo.load(f"file:{path}", "cpu")  # two blocks of twelve
    named = zoo.load(f"open_clip:tiny-vit/{path}", "cpu")
    assert (named.mean, named.input_size, named.family) == (CLIP["mean"], 64, "clip")
    with torch.no_grad():
        torch.testing.assert_close(named.module(X), clip.visual(X))
    assert named.capture(X).grid == (4, 4)
    with pytest.raises(UserError, match="unknown architecture of open_clip 'tiny-vot'.*tiny-vit"):
        zoo.load("open_clip:tiny-vot/laion")
    with pytest.raises(UserError, match="unknown weights of tiny-vit 'laion'"):
        zoo.load("open_clip:tiny-vit/laion")


@pytest.mark.parametrize("openai", [False, True])
def test_a_clip_file_of_full_depth_is_loaded_into_timm(openai, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    visual = dict(image_size=224, layers=12, width=768, head_width=64, patch_size=32)
    text = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=1)
    clip = open_clip.CLIP(512, visual, text, quick_gelu=openai).eval()
    extra = {"input_resolution": torch.tensor(224), "vocab_size": torch.tensor(60)} if openai else {}
    torch.save(clip.state_dict() | extra, tmp_path / "clip.pt")
    loaded = zoo.load(f"file:{tmp_path / 'clip.pt'}", "cpu")
    assert loaded.about == f"weights in the layout {'OpenAI' + chr(39) + 's CLIP' if openai else 'open_clip'}"
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x), clip.visual(x), rtol=1e-4, atol=1e-4)


def test_a_folder_of_transformers_is_loaded_with_its_preprocessing(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16)
    config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=2)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        image_mean=[0.1] * 3, image_std=[0.2] * 3, size={"height": 64, "width": 64}
    )
    processor.save_pretrained(tmp_path)
    loaded = zoo.load(f"hf:{tmp_path}", "cpu")
    assert (loaded.mean, loaded.std, loaded.input_size) == ((0.1,) * 3, (0.2,) * 3, 64)
    assert (loaded.registers, loaded.registers_from, loaded.label) == (2, "trained", f"hf:{tmp_path}")
    with torch.no_grad():
        hidden = model(pixel_values=X, output_hidden_states=True).hidden_states
    torch.testing.assert_close(loaded.capture(X, "tokens").tokens[1], hidden[2], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="hf:no/such: cannot|hf:no/such cannot be had from the hub"):
        zoo.load("hf:no/such")


def test_a_module_of_ones_own_is_a_model():
    module = made("vit_tiny_patch16_224", depth=2)
    module.train()
    model = vr.load(module)
    assert (model.name, model.label, model.mean) == ("VisionTransformer", "VisionTransformer", (0.5, 0.5, 0.5))
    assert model.module is module and module.training and module.cls_token.requires_grad
    assert vr.load(model) is model
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(vr.capture(module, x).norms, capture(module, x).norms)
    assert dataclasses.replace(model, mean=(0, 0, 0)).normalise(x).mean() != model.normalise(x).mean()
    assert (vr.load(vision()).input_size, vr.load(vision()).mean) == (32, IMAGENET["mean"])


def test_a_module_of_ones_own_says_where_its_registers_come_from():
    module = mini.build("xxs", registers=1)
    model, empty, moved = map(vr.load, (module, *(added.add_registers(vision(), n, 2) for n in ([], [(0, 3)]))))
    assert (model.input_size, model.mean, model.registers, model.registers_from) == (96, (0.5,) * 3, 1, "trained")
    assert [(each.role, each.registers, each.registers_from) for each in (empty, moved)] == [
        ("mended", 2, "empty"),
        ("mended", 2, "test time"),
    ]


def vision():
    return torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64)


def test_what_looks_like_registers_or_an_architecture_inside_a_path_is_part_of_it(tmp_path):
    place = tmp_path / "vit+ttr4#best"
    place.mkdir()
    model = made("vit_tiny_patch16_224")
    save_file(model.state_dict(), place / "w.safetensors")
    loaded = zoo.load(f"file:{place / 'w.safetensors'}", "cpu")
    assert torch.equal(loaded.module.cls_token, model.cls_token) and loaded.registers == 0
    named = zoo.load(f"file:{place / 'w.safetensors'}#vit_tiny_patch16_224.augreg_in21k", "cpu")
    assert torch.equal(named.module.cls_token, model.cls_token) and named.mean == (0.5, 0.5, 0.5)
    assert split(f"file:{place}/w.pt+ttr4") == (f"file:{place}/w.pt", "ttr", 4)
    assert file_parts("file:a/b.pt#arch") == (file_parts("file:a/b.pt")[0], "arch")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": {"fc.weight": torch.zeros(3, 3)}}, "no layout of a ViT is recognised; .* begin fc.weight"),
        ({"epoch": 3}, "holds no weights by name"),
    ],
)
def test_what_is_no_vit_is_refused_in_one_line(content, told, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=told) as error:
        zoo.load(f"file:{tmp_path / 'x.pt'}")
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_name_the_nearest(tmp_path):
    save_file(made("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="do not fit the architecture: .*; they look like #vit_tiny_patch16_224"):
        zoo.load(f"file:{tmp_path / 'w.safetensors'}#vit_small_patch16_224")
    assert zoo.load(f"file:{tmp_path / 'w.safetensors'}", "cpu", image_size=96).capture(
        torch.randn(1, 3, 96, 96)
    ).grid == (
        6,
        6,
    )


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    "kind, spec",
    [
        ("transformers", {"class": "CLIPVisionModel", "config": {"hidden_size": 30, "num_attention_heads": 4}}),
        ("transformers", {"config": {}}),
        ("torchvision", {"image_size": 32, "patch_size": 5}),
        ("timm", "vit_tiny_patch16_224"),
    ],
)
def test_metadata_that_contradict_themselves_are_refused_in_a_line(kind, spec, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors", {kind: json.dumps(spec)})
    with pytest.raises(UserError, match=f"w.safetensors: what its metadata say of {kind} builds no model: [^\n]*onto"):
        zoo.load(f"file:{tmp_path / 'w.safetensors'}")


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": {"w": torch.zeros(1)}, "args": Harmful()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(UserError, match="cannot be read as weights only"):
            zoo.load(f"file:{tmp_path / name}")
    assert capsys.readouterr().out == ""


def test_options_of_the_command_line_set_size_and_preprocessing(tmp_path, capsys, results):
    """A checkpoint without a classifier brings ImageNet's mean; each option replaces one thing, and all is shown."""
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    path = tmp_path / "dino+ttr#1.pth"
    torch.save({"state_dict": module.state_dict()}, path)
    name = f"file:{path}#vit_tiny_patch16_224"
    measured = tmp_path / "measured.safetensors"
    options = ["--n-images", "1", "--out", str(measured), "--crop", "0.5", "--size"]
    assert cli.main(["measure", *options, "64", name]) == 0
    assert "64 x 64 pixels" in capsys.readouterr().out
    options += ["64", "96"]
    assert cli.main(["measure", name, *options, "--std", "0.1", "0.2", "0.3"]) == 0
    said = capsys.readouterr().out
    assert (
        "64 x 96 pixels, center crop 0.5, bicubic, mean 0.485, 0.456, 0.406, standard deviation 0.1, 0.2, 0.3" in said
    )
    model = vr.load(name, "cpu", image_size=(64, 96), mean=(0.1, 0.1, 0.1))
    assert (model.mean, model.std) == ((0.1, 0.1, 0.1), (0.229, 0.224, 0.225))
    photo = images.load("photos", model, 1)
    assert photo.x.shape == (1, 3, 64, 96) and model.capture(photo).grid == (4, 6)
    torch.testing.assert_close(photo.x[0, 1], (photo.pixels[0, 1] - 0.1) / 0.224)


def test_torchscript_is_opened_on_request_alone(tmp_path):
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    torch.jit.trace(module, torch.randn(1, 3, 32, 32)).save(tmp_path / "traced.pt")
    with pytest.raises(UserError, match="is a TorchScript archive, which can run code: .* --weights torchscript"):
        read_weights(tmp_path / "traced.pt")
    tensors, _ = read_weights(tmp_path / "traced.pt", "torchscript")
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in module.state_dict().items())
