"""Training on a folder of images: order and augmentation follow from the position alone; wrong folders are told."""

from __future__ import annotations

import random
from dataclasses import replace

import deit3_folder
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_images import pictures

from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.train import images, loop, parallel, recipes

SMALL = dict(
    size="xxs",
    registers=1,
    image_size=32,
    steps=6,
    batch_size=8,
    warmup=2,
    save_every=2,
    eval_images=16,
    telemetry_images=3,
    workers=0,
    drop_path=0.1,
    layer_scale=0.1,
)
COLOURS = {"amber": (220, 160, 20), "blue": (30, 50, 200), "cyan": (20, 200, 200)}


def paint(path, colour, number):
    noise = np.random.default_rng(number).integers(-20, 20, (40, 52, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(path)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Three classes by colour: 10 images each to train, 4 held out."""
    root = tmp_path_factory.mktemp("painted")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for i in range(14):
            paint(root / ("train" if i < 10 else "val") / name / f"{i}.png", colour, 100 * number + i)
    return root


def configured(data, **options):
    return loop.configure("deit3", data=str(data), **SMALL | options)[0]


def train(data, run, on_step=None, **options):
    config = configured(data, **options)
    return loop.train(config, recipes.load("deit3", config.data), run, progress=False, on_step=on_step)


def fresh_stream(config, device="cpu"):
    deit3_folder.stream.cache_clear()
    return deit3_folder.stream(config, device)


def test_the_protocol_of_deit3_is_the_default():
    config, recipe = loop.configure("deit3", data="somewhere")
    assert recipe is deit3_folder
    assert (config.size, config.image_size, config.optimizer, config.batch_size) == ("b/16", 224, "lamb", 2048)
    assert (config.augment, config.mixup, config.cutmix, config.layer_scale) == ("3a", 0.8, 1.0, 1e-4)
    assert (config.crop, config.loss, config.smoothing) == ("rrc", "bce", 0.0)


def test_colours_are_learnt(painted, tmp_path):
    options = dict(
        steps=40, crop="rkrr", optimizer="adamw", learning_rate=5e-3, mixup=0, cutmix=0, weight_decay=0.0, drop_path=0.0
    )
    result = train(painted, tmp_path, save_every=1000, **options)
    assert result["accuracy"] > 0.9
    assert result["images"] == 320


def test_a_stopped_run_resumes_bit_for_bit(painted, tmp_path):
    """With 3-Augment, mixup, CutMix, stochastic depth, LAMB and an average of the weights, over an epoch's end."""

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(painted, straight, ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(painted, halves, stop, ema=0.9)
    deit3_folder.stream.cache_clear()
    train(painted, halves, ema=0.9)
    for name in ("state.safetensors", "model.safetensors"):
        one, other = load_file(straight / name), load_file(halves / name)
        assert all(torch.equal(one[k], other[k]) for k in one), name


def test_workers_give_what_the_process_itself_gives(painted):
    config = configured(painted)
    with_workers = fresh_stream(replace(config, workers=2))
    alone = fresh_stream(config)
    states = random.getstate(), torch.get_rng_state()
    for step in (0, 1, 4, 5):  # also where steps are left out
        for one, other in zip(with_workers.batch(step), alone.batch(step), strict=True):
            assert torch.equal(one, other)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_micro_batches_are_parts_of_the_batch(painted):
    stream = fresh_stream(configured(painted))
    whole = [stream.batch(step)[0] for step in (0, 1)]
    parts = []
    for step in (0, 1):
        for part in range(2):
            with parallel.micro_batch(part, 2):
                parts.append(stream.batch(step)[0])
    assert torch.equal(torch.cat(parts), torch.cat(whole))


def test_every_epoch_has_every_image_in_an_order_of_its_own(painted):
    orders = [images.order(30, 1_000_003 * epoch).tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1]


def test_without_held_out_images_every_twentieth_is_held_out(tmp_path):
    for name, colour in list(COLOURS.items())[:2]:
        for i in range(20):
            paint(tmp_path / name / f"{i:02}.jpg", colour, i)
    seen = [{row["path"] for row in pictures(str(tmp_path), split).rows["image"]} for split in ("train", "val")]
    assert (len(seen[0]), len(seen[1])) == (38, 2)
    assert not seen[0] & seen[1]


def test_parquet_files_of_the_hub(painted, tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=sorted(COLOURS))})
    for split, name in (("train", "train"), ("val", "validation")):
        files = pictures(str(painted), split).rows
        rows = {"image": [image["path"] for image in files["image"]], "label": list(files["label"])}
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    ours, theirs = (fresh_stream(configured(data)).batch(0) for data in (tmp_path, painted))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_image_that_cannot_be_read_is_named_and_replaced(painted, tmp_path):
    import shutil

    shutil.copytree(painted, tmp_path / "data")
    for path in (tmp_path / "data/train/amber").iterdir():
        path.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"\d.png cannot be read and is left out"):
        pixels, labels = fresh_stream(configured(tmp_path / "data")).batch(0)
    assert len(pixels) == 8
    assert 0 not in labels


@pytest.mark.parametrize(
    ("make", "told"),
    [
        ((), "no folder"),
        (("nothing/",), "no images in .*one subfolder a class"),
        (("train/a/1.png",), "has train/ but no val/"),
        (("train/a/1.png", "val/b/1.png"), "the classes of val/ and train/ differ"),
        (("train/a/1.txt", "val/a/1.txt"), "no images in .*train"),
    ],
)
def test_a_wrong_folder_is_told_before_anything_is_made(tmp_path, capsys, make, told):
    import re

    for name in make:
        paint(tmp_path / "data" / name, (9, 9, 9), 0) if name.endswith("png") else (
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        )
    run = tmp_path / "run"
    assert cli.main(["train", "deit3", "--data", str(tmp_path / "data"), "--size", "xxs", "--out", str(run)]) == 1
    assert re.search(told, capsys.readouterr().err)
    assert not run.exists()


@pytest.mark.parametrize(("name", "smoothing", "cutmix"), [("bce", 0.0, 1.0), ("ce", 0.1, 1.0), ("ce", 0.1, 0.0)])
def test_the_loss_is_the_formula(painted, name, smoothing, cutmix):
    """Against sums written out, on the pixels and the mixed labels that the model is really given."""
    config = configured(painted, loss=name, smoothing=smoothing, mixup=0.0, cutmix=cutmix)
    model, given = deit3_folder.build(config).eval(), []
    model.register_forward_hook(lambda module, arguments, output: given.append((arguments[0], output)))
    value, _ = deit3_folder.loss(model, config, 0, "cpu")
    (pixels, logits), classes = given[0], len(COLOURS)
    plain, labels = fresh_stream(config).batch(0)
    flipped = labels.flip(0)  # timm mixes the batch with itself in reverse
    kept = (pixels == plain).all(1).float().mean((1, 2))  # share of each image that is its own
    if not cutmix:
        assert kept.eq(1).all()
    same = (pixels == plain.flip(0)).all(1).all(2).all(1)
    share = torch.where(same, 0.0, kept)[:, None]
    one_hot = torch.eye(classes) * (1 - smoothing) + smoothing / classes
    target = share * one_hot[labels] + (1 - share) * one_hot[flipped]
    if name == "ce":
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
    else:
        present, p = (target > 0).float(), logits.sigmoid()
        expected = -(present * p.log() + (1 - present) * (1 - p).log()).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_unknown_loss_is_told(painted):
    with pytest.raises(UserError, match="bce"):
        deit3_folder.build(configured(painted, loss="bec"))


def test_odd_batches_cannot_be_mixed(painted):
    with pytest.raises(UserError, match="must be even"):
        deit3_folder.build(configured(painted, batch_size=7))
