"""Training images: scenes, or the images of a folder with one subfolder a class (`--data FOLDER`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from vitreg_lib.base import UserError
from vitreg_lib.data import formats, scenes
from vitreg_lib.data.images import SUFFIXES
from vitreg_lib.data.scenes import HELD_OUT, MEAN, STD, targets
from vitreg_lib.train import images, parallel
from vitreg_lib.train.images import HELD_OUT_EVERY, Augmented, Pictures, Stream, order

MARGIN = 8 / 7  # images of a folder are read larger by this factor (256 pixels for 224), so that crops are sharp
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


def batch(config, step: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's images (n, 3, size, size) of a step, in [0, 1], and their positions (n,), on the device."""
    index = parallel.positions(config, step, device)
    if not config.data:
        return images.rendered(config, step, device).pixels, index
    size = round(MARGIN * config.image_size)
    return stream(config, str(device), pictures(config.data, "train"), size).batch(step)[0], index


def held_out(config, first: int, count: int) -> torch.Tensor:
    """Images (n, 3, size, size) in [0, 1] outside the training set: at most `count`, starting with number `first`."""
    if not config.data:
        return scenes.render(range(HELD_OUT + first, HELD_OUT + first + count), config.image_size, config.seed).pixels
    source = pictures(config.data, "val")
    return read(config, source, order(len(source), config.seed)[first : first + count])[0]


def telemetry_images(config) -> torch.Tensor:
    """The held-out images for telemetry, normalised."""
    return (held_out(config, 0, config.telemetry_images) - MEAN) / STD


def held_out_scenes(config, count: int, device="cpu") -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(pixels in [0, 1], labels by attribute) of `count` scenes outside training and telemetry, in batches."""
    first = HELD_OUT + config.telemetry_images
    for index in torch.arange(first, first + count).split(256):
        part = scenes.render(index, config.image_size, config.seed, device)
        yield part.pixels, targets(part)


@functools.lru_cache(maxsize=4)
def pictures(data: str, split: str) -> Pictures:
    """A split, "train" or "val", of the labelled images in a folder; cached.

    Raises UserError if there are no images, or if the classes of the splits differ.
    """
    root = existing(data, "train/CLASS/*.jpg and val/CLASS/*.jpg")
    shards = next((files for name in SPLITS[split] if (files := formats.parquet_files(root, name))), None)
    chosen = _parquet(shards) if shards else _class_folders(root, split)
    if split == "val" and chosen.classes != pictures(data, "train").classes:
        raise UserError(f"{data}: the classes of val/ and train/ differ")
    return chosen


def _parquet(shards: list[str]) -> Pictures:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=shards, split="train")
    if missing := {"image", "label"} - rows.features.keys():
        raise UserError(f"{shards[0]} has no column {sorted(missing)[0]}: image and label are expected")
    names = getattr(rows.features["label"], "names", None) or [str(v) for v in range(max(rows["label"]) + 1)]
    return Pictures(rows, classes=names)


def _class_folders(root: Path, split: str) -> Pictures:
    """Images in SPLIT/CLASS/photo.jpg, or in CLASS/photo.jpg, where every twentieth photo is held out."""
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None and (root / "train").is_dir():
        raise UserError(f"{root} has train/ but no val/: put held-out images there, one subfolder a class")
    classes, files = formats.class_folders(folder or root)
    if not files:
        raise UserError(
            f"no images in {folder or root}: it needs one subfolder a class with {', '.join(sorted(SUFFIXES))}, "
            "below train/ and val/, or the hub's files train-*.parquet and validation-*.parquet"
        )
    if folder is None:
        files = [files[i] for i in every_twentieth(len(files), split)]
    return images.of_files(*map(list, zip(*files, strict=True)), classes)


def existing(data: str, content: str) -> Path:
    """The folder of --data. Raises UserError if it does not exist; `content` says what it should contain."""
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {data!r} for --data: write the path of one with {content}")
    return root


def every_twentieth(count: int, split: str) -> list[int]:
    """Positions of the split: every twentieth for "val", the others for "train"."""
    return [i for i in range(count) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "val")]


def read(config, source: Pictures, places: torch.Tensor) -> tuple[torch.Tensor, list]:
    """(pixels, labels or captions) of the pictures at these places of a source."""
    rows = [source.read(i) for i in places.tolist()]
    return torch.stack([plain(config.image_size)(image) for image, _ in rows]), [label for _, label in rows]


def plain(size: int):
    """A transform PIL image → (3, size, size) in [0, 1]: short side resized, centre cropped."""
    from timm.data import create_transform

    return create_transform(size, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


@functools.lru_cache(maxsize=1)
def stream(config, device: str, source: Pictures, size: int) -> Stream:
    """The stream of a training, cached: images of a source at `size` pixels, not augmented."""
    return Stream(config, device, Augmented(config.seed, source, plain(size)))
