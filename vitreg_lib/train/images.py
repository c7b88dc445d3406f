"""The images of a training: scenes, or the user's own (`--data FOLDER`).

The seed and the position in the training determine each image (see `parallel.batch_range`). Images are in [0, 1]; views
and masks are made on the device.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..base import UserError
from ..data import formats, scenes
from ..data.images import SUFFIXES
from ..data.scenes import HELD_OUT, MEAN, STD, targets
from ..data.sets import read_stored, undecoded
from . import parallel

MARGIN = 8 / 7  # the user's images are read larger by this factor, 256 pixels for 224, so that crops stay sharp
HELD_OUT_EVERY = 20  # where a folder has no val/, every twentieth image is kept for evaluation
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


def images(config, step: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's images (n, 3, size, size) of a step, in [0, 1], and their positions (n,), on the device."""
    mine = parallel.batch_range(config, step)
    index = torch.arange(mine.start, mine.stop, device=device)
    if not config.data:
        return rendered(config, step, device).pixels, index
    size = round(MARGIN * config.image_size)
    return stream(config, str(device), pictures(config.data, "train"), size).batch(step)[0], index


def rendered(config, step: int, device) -> scenes.Scenes:
    """This process's scenes of a step, on the device."""
    return scenes.render(parallel.batch_range(config, step), config.image_size, config.seed, device)


def held_out(config, first: int, count: int) -> torch.Tensor:
    """Images (n, 3, size, size) in [0, 1] outside the training set: at most `count`, from number `first` on."""
    if not config.data:
        return scenes.render(range(HELD_OUT + first, HELD_OUT + first + count), config.image_size, config.seed).pixels
    source = pictures(config.data, "val")
    return read(config, source, order(len(source), config.seed)[first : first + count])[0]


def telemetry_images(config) -> torch.Tensor:
    """The held-out images for telemetry, normalised; a recipe may have its own function of this name."""
    return (held_out(config, 0, config.telemetry_images) - MEAN) / STD


def held_out_scenes(config, count: int, device="cpu") -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(pixels in [0, 1], labels by attribute) of `count` scenes outside training and telemetry, in batches."""
    first = HELD_OUT + config.telemetry_images
    for index in torch.arange(first, first + count).split(256):
        batch = scenes.render(index, config.image_size, config.seed, device)
        yield batch.pixels, targets(batch)


class Pictures:
    """Images, each with its class number or caption: rows of a `datasets.Dataset`, decoded one by one when read."""

    def __init__(self, rows, image: str = "image", label: str = "label", classes: list[str] | None = None):
        self.rows, self.image, self.label, self.classes = undecoded(rows, image), image, label, classes

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int):
        """(PIL image in RGB, class number or caption)."""
        row = self.rows[index]
        return read_stored(row[self.image]), row[self.label]

    def name(self, index: int) -> str:
        """An image's name for messages: its file, or its row."""
        path = self.rows[index][self.image]["path"]
        return Path(path).name if path else f"row {index}"


def unlabelled(paths: list[Path]) -> Pictures:
    """The photos of these files, each with the label 0."""
    from datasets import Dataset

    return Pictures(Dataset.from_dict({"image": list(map(str, paths)), "label": [0] * len(paths)}))


@functools.lru_cache(maxsize=4)
def pictures(data: str, split: str) -> Pictures:
    """A split, "train" or "val", of the labelled images in a folder, which is listed once.

    Raises UserError where there are none, or where the classes of the splits differ.
    """
    root = existing(data, "train/CLASS/*.jpg and val/CLASS/*.jpg")
    shards = next((files for name in SPLITS[split] if (files := formats.parquet_files(root, name))), None)
    chosen = _parquet(shards) if shards else _class_folders(root, split)
    if split == "val" and chosen.classes != pictures(data, "train").classes:
        raise UserError(f"{data}: the classes of val/ are not those of train/")
    return chosen


def _parquet(shards: list[str]) -> Pictures:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=shards, split="train")
    if missing := {"image", "label"} - rows.features.keys():
        raise UserError(f"{shards[0]} has no column {sorted(missing)[0]}: image and label are expected")
    names = getattr(rows.features["label"], "names", None) or [str(v) for v in range(max(rows["label"]) + 1)]
    return Pictures(rows, classes=names)


def _class_folders(root: Path, split: str) -> Pictures:
    """SPLIT/CLASS/photo.jpg, or CLASS/photo.jpg, of which every twentieth photo is held out."""
    from datasets import Dataset

    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None and (root / "train").is_dir():
        raise UserError(f"{root} has train/ but no val/: put held-out images, a subfolder a class, there")
    classes, files = formats.class_folders(folder or root)
    if not files:
        raise UserError(
            f"no images in {folder or root}: a subfolder a class with {', '.join(sorted(SUFFIXES))} is expected, "
            "below train/ and val/, or the hub's files train-*.parquet and validation-*.parquet"
        )
    if folder is None:
        files = [files[i] for i in every_twentieth(len(files), split)]
    paths, labels = map(list, zip(*files, strict=True))
    return Pictures(Dataset.from_dict({"image": paths, "label": labels}), classes=classes)


def existing(data: str, content: str) -> Path:
    """The folder of `--data`. Raises UserError, which says that one with `content` is expected, where there is none."""
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {data!r} for --data: write the path of one with {content}")
    return root


def every_twentieth(count: int, split: str) -> list[int]:
    """Positions of "val", every twentieth, or of "train", the others."""
    return [i for i in range(count) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "val")]


def _plain(size: int):
    """PIL image → (3, size, size) in [0, 1]: short side resized, centre cropped."""
    from timm.data import create_transform

    return create_transform(size, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def read(config, source, places):
    """(pixels, labels or captions) of the pictures at these places of a source."""
    read = [source.read(i) for i in places.tolist()]
    return torch.stack([_plain(config.image_size)(image) for image, _ in read]), [label for _, label in read]


class Augmented(Dataset):
    """Training images by position: (pixels, label, position). Each epoch has an order of its own.

    source: an object with `read`, `name` and a length. transform: PIL image → pixels.
    """

    def __init__(self, seed: int, source, transform):
        self.seed, self.pictures, self.transform = seed, source, transform

    def __getitem__(self, position: int):
        epoch, place = divmod(position, len(self.pictures))
        places = order(len(self.pictures), self.seed + 1_000_003 * epoch)
        for attempt in range(100):  # an image that cannot be read is replaced by the next one of the epoch
            index = int(places[(place + attempt) % len(places)])
            try:
                image, label = self.pictures.read(index)
            except UserError as error:
                warnings.warn(f"{self.pictures.name(index)} cannot be read and is left out: {error}", stacklevel=2)
                continue
            with seeded(self.seed, position):
                return self.transform(image), label, position
        raise UserError(f"100 images in a row cannot be read, {self.pictures.name(index)} the last of them")


class Stream:
    """Batches by position, which workers read ahead in the order of the training."""

    def __init__(self, config, device: str, data: Augmented):
        self.config, self.device, self.data, self.batches = config, device, data, None

    def batch(self, step: int):
        """(pixels, labels) of this process's images of the step, on the device; captions stay text."""
        wanted = parallel.batch_range(self.config, step)
        batch = None if self.batches is None else next(self.batches, None)
        if batch is None or batch[2].tolist() != list(wanted):  # at the start, or where micro-batches were halved
            self.batches = iter(self._loader(step))
            batch = next(self.batches)
        pixels, labels, _ = batch
        if torch.is_tensor(labels):
            labels = labels.to(self.device, non_blocking=True)
        return pixels.to(self.device, non_blocking=True), labels

    def _loader(self, step: int) -> DataLoader:
        workers = self.config.workers
        return DataLoader(
            self.data,
            batch_sampler=_Once(parallel.following(self.config, step)),
            num_workers=workers,
            pin_memory=torch.device(self.device).type == "cuda",
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else its start would draw from the training's random state
        )


class _Once:
    """An iterator as something that DataLoader iterates once."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        return self.iterator


@functools.lru_cache(maxsize=1)
def stream(config, device: str, source, size: int) -> Stream:
    """The stream of a training, the same one at every step: images of a source at `size` pixels, not augmented."""
    return Stream(config, device, Augmented(config.seed, source, _plain(size)))


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int) -> torch.Tensor:
    """A permutation of `count` positions, determined by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def seeded(seed: int, position: int):
    """A context in which (seed, position) seeds Python, numpy and torch; its exit restores their states."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) % 2**64
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.random.default_generator.manual_seed(mixed)  # of the CPU alone: torch.manual_seed would reach into CUDA
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
