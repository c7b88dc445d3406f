"""What a module, a processor or a file states about its input is what a loaded model is fed with."""

from __future__ import annotations

import dataclasses
import json

import open_clip
import pytest
import timm
import torch
import transformers
from torchvision.models import VisionTransformer

import vitreg_lib as vr
from vitreg_lib.base import UserError
from vitreg_lib.model import saved, zoo

NARROW = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)


def of_timm(**arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", **dict(img_size=64, depth=2, embed_dim=32, num_heads=2) | arguments
    )


def test_a_module_of_timm_is_fed_at_the_size_that_it_was_built_for():
    assert vr.load(of_timm()).input_size == 64
    model = vr.load(of_timm(dynamic_img_size=True), image_size=96)
    assert model.input_size == 96
    assert vr.load(model, image_size=(64, 96)).input_size == (64, 96)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile, lambda m: torch.nn.ModuleDict({"inner": m})])
def test_a_wrapper_does_not_hide_the_preprocessing(wrap):
    bare, wrapped = vr.load(of_timm()), vr.load(wrap(of_timm()))
    assert wrapped.preprocessing == bare.preprocessing and "mean 0.5" in bare.preprocessing


def test_a_compiled_model_is_captured_and_gets_registers_once():
    compiled = torch.compile(of_timm())
    assert vr.capture(compiled, torch.randn(1, 3, 64, 64)).norms.shape == (1, 2, 17)
    mended = vr.mend.with_test_time_registers(vr.load(compiled), 4, neurons=[(0, 1)])
    assert mended.anatomy.num_prefix_tokens == 5


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        (dict(size={"height": 32, "width": 64}, resample=2), "32 x 64 pixels, squash crop 1, bilinear"),
        (
            dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_center_crop=True, resample=3),
            "32 x 32 pixels, center crop 0.8, bicubic",
        ),
    ],
)
def test_the_processor_beside_a_model_of_transformers_is_followed(processor, words, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(image_size=32, **NARROW)).save_pretrained(tmp_path)
    kind = transformers.CLIPImageProcessor if "crop_size" in processor else transformers.ViTImageProcessor
    kind(**processor).save_pretrained(tmp_path)
    assert vr.load(f"hf:{tmp_path}").preprocessing.startswith(words)
    model = vr.load(f"hf:{tmp_path}", image_size=64)
    assert model.input_size == 64
    assert model.capture(torch.randn(1, 3, 64, 64)).grid == (8, 8)


def test_a_folder_without_weights_is_not_looked_for_in_the_hub(tmp_path):
    transformers.ViTConfig(**NARROW).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be had \(OSError: Error no file named"):
        vr.load(f"hf:{tmp_path}")


@pytest.fixture
def clip(tmp_path):
    """The name of an open_clip model of random weights in a file, trained at 64 pixels."""
    tower = dict(image_size=64, layers=2, width=64, head_width=32, patch_size=16)
    text = dict(context_length=16, vocab_size=64, width=32, heads=2, layers=2)
    (tmp_path / "narrow.json").write_text(json.dumps(dict(embed_dim=32, vision_cfg=tower, text_cfg=text)))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("narrow").state_dict(), tmp_path / "w.pt")
    return f"open_clip:narrow/{tmp_path / 'w.pt'}"


def test_open_clip_says_how_to_resize_and_takes_another_size(clip, monkeypatch):
    create = open_clip.create_model

    def squashing(*args, **options):
        made = create(*args, **options)
        made.visual.preprocess_cfg = {**made.visual.preprocess_cfg, "resize_mode": "squash"}  # as SigLIP's weights say
        return made

    monkeypatch.setattr(open_clip, "create_model", squashing)
    assert vr.load(clip).preprocessing.startswith("64 x 64 pixels, squash crop 1, bicubic")
    model = vr.load(clip, image_size=96)
    assert model.capture(torch.randn(1, 3, 96, 96)).grid == (6, 6) and model.input_size == 96


def test_a_tower_of_mixed_precision_is_fed_in_that_of_its_convolution(clip):
    tower = open_clip.create_model("narrow", precision="bf16").visual
    assert next(tower.parameters()).dtype == torch.float32
    assert vr.capture(tower, torch.randn(1, 3, 64, 64)).norms.shape == (1, 2, 17)


def test_a_file_of_torchvision_takes_another_size(tmp_path):
    torch.save(VisionTransformer(64, 16, 2, 2, 128, 256).state_dict(), tmp_path / "w.pth")
    model = vr.load(f"file:{tmp_path / 'w.pth'}", image_size=96)
    assert model.input_size == 96 and model.capture(torch.randn(1, 3, 96, 96)).grid == (6, 6)


def test_a_random_control_gets_images_of_the_same_size_as_its_model():
    assert zoo.load("random:dinov2-s", "cpu").input_size == zoo.entries()["dinov2-s"]["input_size"] == 224


def test_results_of_two_models_with_equal_weights_are_kept_apart():
    one, other = (vr.load(of_timm(num_heads=heads)) for heads in (2, 4))
    other.module.load_state_dict(one.module.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(one.capture(x).norms, other.capture(x).norms)
    assert one.fingerprint(x) != other.fingerprint(x)
    assert one.fingerprint(x) == dataclasses.replace(one).fingerprint(x)


@pytest.mark.parametrize("arguments", [dict(num_heads=4), dict(global_pool="avg", fc_norm=False)])
def test_a_module_built_with_arguments_of_its_own_is_not_written_as_another(arguments, tmp_path):
    model, path = vr.load(of_timm(**arguments)), tmp_path / "m.safetensors"
    saved.write(model, path)
    with pytest.raises(UserError, match="no name builds a VisionTransformer: build one, then .*onto"):
        zoo.load(f"file:{path}", "cpu")
    again, x = saved.onto(of_timm(**arguments), path).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.module.eval()(x))
