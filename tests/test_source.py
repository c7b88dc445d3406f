"""Training without labels on images of one's own: folders, pairs as Parquet and as WebDataset."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
import training_images
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from vitreg_lib.base import UserError
from vitreg_lib.train import loop, parallel

SMALL = dict(
    size="xxs",
    registers=1,
    image_size=32,
    steps=2,
    batch_size=4,
    warmup=1,
    eval_images=6,
    telemetry_images=2,
    workers=0,
)
OWN = {"dinov2": dict(prototypes=16, global_size=64, local_size=16, local_crops=1)}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30)}


def painted(colour, number):
    noise = np.random.default_rng(number).integers(-20, 20, (40, 52, 3))
    return Picture.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype("uint8"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 8), ("val", 4)):
        for colour in COLOURS:
            (root / split / colour).mkdir(parents=True)
            for i in range(count):
                painted(colour, i).save(root / split / colour / f"{i}.png")
    return root


def captions(i):
    colour = list(COLOURS)[i % 2]
    return painted(colour, i), f"number {i}, {colour}"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    images, texts = zip(*map(captions, range(40)), strict=True)
    features = Features({"image": Image(), "caption": Value("string")})
    Dataset.from_dict({"image": list(images), "caption": list(texts)}, features).to_parquet(root / "train-0.parquet")
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(40):
            image, text = captions(i)
            png = io.BytesIO()
            image.save(png, "png")
            for end, data in (("png", png.getvalue()), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{end}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return root


def configured(recipe, data, **options):
    return loop.configure(recipe, data=str(data), **SMALL | OWN.get(recipe, {}) | options)


@pytest.mark.parametrize("recipe", ["dinov2", "mae"])
def test_trains_on_a_folder_and_measures_on_what_was_held_out(recipe, classes, tmp_path):
    result = loop.train(*configured(recipe, classes), tmp_path, progress=False)
    value = result["knn_class" if recipe == "dinov2" else "error"]
    assert 0 <= value <= 1 if recipe == "dinov2" else value > 0
    assert (tmp_path / "model.safetensors").exists()


def test_neighbours_of_plain_colours_are_of_their_class(classes):
    config, recipe = configured("dinov2", classes, eval_images=8)
    torch.manual_seed(0)
    assert recipe.knn(recipe.build(config).teacher, config, "cpu", neighbours=3)["knn_class"] == 1.0
    assert recipe.query_count(config) == 8


def test_images_follow_from_the_step_alone(classes):
    config, _ = configured("mae", classes, steps=12)  # three epochs of 16
    straight = [training_images.batch(config, step, "cpu") for step in range(9)]
    again, index = training_images.batch(config, 6, "cpu")
    assert torch.equal(again, straight[6][0]) and index.tolist() == list(range(24, 28))
    assert again.shape == (4, 3, 37, 37) and 0 <= again.min() and again.max() <= 1
    epoch = torch.cat([pixels for pixels, _ in straight[:4]])
    assert len({tuple(p.flatten().tolist()) for p in epoch}) == 16  # every training image once
    with parallel.micro_batch(1, 2):
        torch.testing.assert_close(training_images.batch(config, 6, "cpu")[0], again[2:])


@pytest.mark.parametrize("kind", ["parquet", "shards"])
def test_pairs_stay_together(kind, request, tmp_path):
    data = request.getfixturevalue(kind)
    config, recipe = configured("clip", data, steps=10)
    pixels, texts = recipe.pairs(config, 1, "cpu")
    assert pixels.shape == (4, 3, 32, 32)
    for image, text in zip(pixels, texts, strict=True):
        strongest = image.mean((1, 2)).argmax().item()
        assert list(COLOURS)[strongest] in text
    held_out = recipe.held_out(config, 6)[1]
    assert sorted(held_out) == ["number 19, green", "number 39, green"]
    seen = {text for step in range(10) for text in recipe.pairs(config, step, "cpu")[1]}
    assert not seen & set(held_out)
    assert 0 <= loop.train(config, recipe, tmp_path, progress=False)["retrieval"] <= 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("clip", "parquet with image and caption"), ("mae", "no images in"), ("emergence", "makes its own images")],
)
def test_a_folder_with_something_else_is_told(recipe, message, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(UserError, match=message):
        config, module = configured(recipe, tmp_path)
        module.loss(module.build(config), config, 0, "cpu")
    with pytest.raises(UserError, match="makes its own images" if recipe == "emergence" else "no folder"):
        config, module = configured(recipe, tmp_path / "missing")
        module.loss(module.build(config), config, 0, "cpu")
