"""The images of a training: scenes, or photos that worker processes read ahead.

The seed and the position in the training determine each image (see `parallel.batch_range`). Images are in [0, 1]; views
and masks are made on the device.
"""

import contextlib
import functools
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..base import UserError
from ..data import scenes
from ..data.scenes import HELD_OUT, MEAN, STD
from ..data.sets import read_stored, undecoded
from . import parallel

HELD_OUT_EVERY = 20  # of photos without a split of their own every twentieth is kept for evaluation


def rendered(config, step: int, device) -> scenes.Scenes:
    """This process's scenes of a step, on the device."""
    compiled = config.compile and torch.device(device).type == "cuda" and parallel.compiles(device)
    return scenes.render(parallel.positions(config, step, device), config.image_size, config.seed, device, compiled)


def telemetry_images(config) -> torch.Tensor:
    """Held-out scenes for telemetry, normalised; a recipe may have its own function of this name."""
    held_out = range(HELD_OUT, HELD_OUT + config.telemetry_images)
    return (scenes.render(held_out, config.image_size, config.seed).pixels - MEAN) / STD


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


def of_files(paths: list[Path], labels: list[int] | None = None, classes: list[str] | None = None) -> Pictures:
    """The images of these files; their labels are 0 unless they are given."""
    from datasets import Dataset

    rows = {"image": list(map(str, paths)), "label": labels or [0] * len(paths)}
    return Pictures(Dataset.from_dict(rows), classes=classes)


class Augmented(Dataset):
    """Training images by position: (pixels, label, position). Each epoch has an order of its own.

    source: an object with `read`, `name` and a length, such as `Pictures`. transform: PIL image → pixels.
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
        self.config, self.device, self.data, self.batches = config, device, data, iter(())

    def batch(self, step: int):
        """(pixels, labels) of this process's images of the step, on the device; captions stay text."""
        wanted = parallel.batch_range(self.config, step)
        batch = next(self.batches, None)
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
            batch_sampler=parallel.following(self.config, step),
            num_workers=workers,
            pin_memory=torch.device(self.device).type == "cuda",
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else its start would draw from the training's random state
        )


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
