"""Images reach a model as timm would prepare them, the same for every model, and damaged ones are named."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vitreg_lib.base import UserError
from vitreg_lib.data import images
from vitreg_lib.model import zoo
from vitreg_lib.model.model import Model
from vitreg_lib.train import loop, state


def any_model(**options) -> Model:
    return Model("any", torch.nn.Identity(), "", **{"input_size": 64} | options)


@pytest.fixture
def folder(tmp_path):
    """Six small pictures, two of them one folder down."""
    noise = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.jpg", "c.JPEG", "d.bmp", "sub/e.webp", "sub/f.tiff"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (50 + i, 70, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "deit_tiny_patch16_224.fb_in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch16_clip_224.laion2b",
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",  # crop_mode "squash"
        "beit_base_patch16_224.in22k_ft_in22k_in1k",
    ],
)
def test_preprocessing_equals_timms_own(name):
    module = timm.create_model(name, depth=1, embed_dim=48, num_heads=1)
    config = resolve_model_data_config(module)
    model = zoo._with_config(name, module, "", None)
    photo = Image.open(images.find("photos")[0][1]).convert("RGB")
    assert photo.width != photo.height
    pixels = images.preprocessing(model, model.input_size)(photo)[None]
    expected = create_transform(**config, is_training=False)(photo)
    assert model.input_size == config["input_size"][-1]
    torch.testing.assert_close(model.normalise(pixels)[0], expected, atol=1e-5, rtol=0)


def test_photos_that_ship_with_the_packages_are_there():
    loaded = images.load("photos", any_model(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)), 100)
    assert len(loaded) == len(loaded.names) == 10
    assert "photos shipped with scikit-image and scikit-learn, 10 of 10 images" in loaded.source
    assert loaded.x.shape == (10, 3, 64, 64)
    assert 0 <= loaded.pixels.min() < loaded.pixels.max() <= 1
    assert loaded.scenes is None
    expected = (loaded.pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1, 2, 4])[:, None, None]
    torch.testing.assert_close(loaded.x, expected)


def test_scenes_come_with_their_truth_and_are_held_out():
    loaded = images.load("scenes", any_model(), 3, seed=2)
    assert torch.equal(loaded.scenes.pixels, loaded.pixels)
    assert (loaded.scenes.index >= images.SCENES_FROM).all()
    again = images.load("scenes", any_model(), 2, seed=2)
    assert torch.equal(again.pixels, loaded.pixels[:2])
    other = images.load("scenes", any_model(), 3, seed=3)
    assert not set(other.scenes.index.tolist()) & set(loaded.scenes.index.tolist())


def test_textures_are_what_the_task_holds_out(tmp_path):
    """As the model was trained to see them, not normalised; another seed has others; another size is refused."""
    config, recipe = loop.configure("emergence")
    state.save_weights(tmp_path / "tiny.safetensors", recipe.build(config), {})
    model = zoo.load(f"file:{tmp_path / 'tiny.safetensors'}")
    found = images.load("textures", model, 4)
    assert found.x.shape == (4, 3, 12, 12)
    assert found.x.std().item() == pytest.approx(1.0, abs=0.2)
    assert torch.equal(found.x[:2], images.load("textures", model, 2).x)
    assert not torch.equal(found.x, images.load("textures", model, 4, seed=1).x)
    assert (found.pixels.min() >= 0) & (found.pixels.max() <= 1)
    with pytest.raises(UserError, match="textures have 12 pixels a side, this model wants 96; try mini-corners"):
        images.load("textures", zoo.load("mini-random"), 2)


def test_a_folder_is_searched_below_and_drawn_from_by_seed(folder):
    everything = images.load(str(folder), any_model(), 100)
    assert everything.names == ["a", "b", "c", "d", "e", "f"]
    one = images.load(str(folder), any_model(), 3, seed=1)
    again = images.load(str(folder), any_model(input_size=32, crop=0.9), 3, seed=1)
    assert one.names == again.names  # the same for every model
    assert again.x.shape == (3, 3, 32, 32)
    draws = {tuple(images.load(str(folder), any_model(input_size=8), 3, seed=seed).names) for seed in range(6)}
    assert len(draws) > 1
    assert one.source == f"{folder.name}, 3 of 6 images"


@pytest.mark.parametrize("damage", ["truncated", "no picture", "empty"])
def test_a_damaged_image_is_named_and_left_out(folder, damage):
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(
        {"truncated": whole[: len(whole) // 3], "no picture": b"hello", "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match="b.jpg cannot be read and is left out"):
        loaded = images.load(str(folder), any_model(), 100)
    assert loaded.names == ["a", "c", "d", "e", "f"]
    assert len(loaded.x) == 5


def test_a_folder_of_damaged_images_alone_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.warns(UserWarning, match="a.png"), pytest.raises(UserError, match="none of the 1 images in"):
        images.load(str(tmp_path), any_model(), 3)


def test_pictures_without_three_channels_are_read(tmp_path):
    Image.new("L", (40, 40), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (40, 40), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    Image.new("P", (40, 40)).save(tmp_path / "palette.png")
    Image.new("CMYK", (40, 40)).save(tmp_path / "print.jpg")
    assert images.load(str(tmp_path), any_model(), 9).x.shape == (4, 3, 64, 64)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path, no_models):
    with pytest.raises(UserError, match="holds no images"):
        images.load(str(tmp_path), any_model(), 1)
    with pytest.raises(
        UserError,
        match="no images at 'nowhere': write scenes, textures, photos, or the path of an image",
    ):
        images.load("nowhere", any_model(), 1)
    with pytest.raises(UserError, match="VITREG_DATA"):
        images.load("imagenet", any_model(), 1)


def test_a_data_set_by_name_is_looked_up_in_vitreg_data_first(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("models")
    (other / "data" / "imagenet").mkdir(parents=True)
    monkeypatch.setenv("VITREG_MODELS", str(other))
    monkeypatch.delenv("VITREG_DATA", raising=False)
    assert images.named_folder("imagenet") == other / "data" / "imagenet"
    monkeypatch.setenv("VITREG_DATA", str(folder))
    assert images.named_folder("sub") == folder / "sub"
    assert images.named_folder("imagenet") == other / "data" / "imagenet"
    assert images.load("sub", any_model(), 9).names == ["e", "f"]
