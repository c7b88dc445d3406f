r"""DeiT-III (Touvron et al. 2022) on real images: what `vitreg train deit3 --data FOLDER` runs.

Binary cross-entropy on the classes, 3-Augment, mixup and CutMix, stochastic depth, LayerScale, LAMB; all timm's. The
defaults are those published for a ViT-B on ImageNet-1k (800 epochs), save that there each image is repeated thrice in
a batch and that training is at 192 pixels, with 20 epochs at 224 after it. For ImageNet-22k, as in the paper, other
settings were published (240 epochs). Neither was run here:

    torchrun --nproc-per-node 8 -m vitreg_lib.cli train deit3 --data imagenet --registers 4 --compile
    torchrun --nproc-per-node 32 -m vitreg_lib.cli train deit3 --data imagenet22k --registers 4 --compile \
        --steps 1660000 --warmup 35000 --learning-rate 1e-3 --weight-decay 0.02 --drop-path 0.1 --loss ce \
        --smoothing 0.1 --mixup 0 --crop rkrr

Images are read by worker processes into pinned memory, ahead of the training. Which image comes when, and how it is
augmented, follows from the seed and its position in the training alone: a resumed run sees what it would have seen.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ..data import formats
from ..data.images import SUFFIXES
from ..errors import UserError, unknown
from ..models import mini
from . import parallel
from .deit3 import MEAN, STD, backbone

__all__ = ["DEFAULTS", "backbone", "build", "evaluate", "loss", "telemetry_images"]

DEFAULTS = dict(
    size="b/16",
    image_size=224,
    steps=500_000,
    batch_size=2048,
    learning_rate=3e-3,
    weight_decay=0.05,
    warmup=3125,
    optimizer="lamb",
    drop_path=0.2,
    eval_images=50_000,
    save_every=1000,
)
LOSSES = ("bce", "ce")
HELD_OUT_EVERY = 20  # where a folder has no val/, every twentieth image is kept for evaluation
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


class Pictures:
    """The images of one split with their class numbers, from a folder of classes or from Parquet files."""

    def __init__(self, root: Path, split: str):
        self.files, self.rows = [], None
        names = SPLITS[split]
        if shards := next((found for name in names if (found := formats.parquet_files(root, name))), None):
            self.rows, self.classes = _parquet(shards)
            return
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        whole = folder is None and not any((root / name).is_dir() for name in SPLITS["train"])
        if whole:
            folder = root
        if folder is None:
            raise UserError(f"{root} has train/ but no val/: put held-out images, a subfolder a class, there")
        self.classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise UserError(
                f"no images in {folder}: a subfolder a class with {', '.join(sorted(SUFFIXES))} is expected, "
                "below train/ and val/, or the hub's files train-*.parquet and validation-*.parquet"
            )
        held_out = [i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(len(found))]
        self.files = [f for f, out in zip(found, held_out, strict=True) if out == (split == "val")] if whole else found

    def __len__(self) -> int:
        return len(self.files) if self.rows is None else len(self.rows)

    def read(self, index: int):
        """(PIL image in RGB, class number)."""
        from PIL import Image

        if self.rows is not None:
            row = self.rows[index]
            return row["image"].convert("RGB"), row["label"]
        path, label = self.files[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label

    def name(self, index: int) -> str:
        return f"row {index}" if self.rows is not None else self.files[index][0].name


class Augmented(Dataset):
    """Training images by position: (pixels, label, position). Each epoch has an order of its own.

    source: what has `read`, `name` and a length; the labelled images of `config.data` if not given. transform: PIL
    image → pixels; DeiT-III's if not given.
    """

    def __init__(self, config, source=None, transform=None):
        self.pictures, self.seed = source or pictures(config.data, "train"), config.seed
        self.transform = transform or self._deit3(config)

    @staticmethod
    def _deit3(config):
        from timm.data import create_transform

        return create_transform(
            config.image_size,
            is_training=True,
            train_crop_mode=config.crop,
            auto_augment=config.augment or None,
            color_jitter=config.color_jitter or None,
            interpolation="bicubic",
            mean=(MEAN,) * 3,
            std=(STD,) * 3,
        )

    def __getitem__(self, position: int):
        epoch, place = divmod(position, len(self.pictures))
        places = order(len(self.pictures), self.seed + 1_000_003 * epoch)
        for attempt in range(100):  # an image that cannot be read is replaced by the next one of the epoch
            index = int(places[(place + attempt) % len(places)])
            try:
                image, label = self.pictures.read(index)
            except (OSError, SyntaxError, ValueError) as error:
                warnings.warn(f"{self.pictures.name(index)} cannot be read and is left out: {error}", stacklevel=2)
                continue
            with seeded(self.seed, position):
                return self.transform(image), label, position
        raise UserError(f"100 images in a row cannot be read, {self.pictures.name(index)} the last of them")


class Stream:
    """Batches by position, read ahead by workers in the order in which the training asks for them."""

    def __init__(self, config, device: str, data: Augmented | None = None):
        self.config, self.device, self.data, self.batches = config, device, data or Augmented(config), None

    def batch(self, step: int):
        """(pixels, labels) of this process's images of the step, on the device; captions as they are."""
        wanted = parallel.batch_range(self.config, step)
        found = None if self.batches is None else next(self.batches, None)
        if found is None or found[2].tolist() != list(wanted):  # at the start, or where micro-batches were halved
            self.batches = iter(self._loader(step))
            found = next(self.batches)
        pixels, labels, _ = found
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
            generator=torch.Generator(),  # or starting it would draw from the training's random state
        )


class _Once:
    """An iterator as something that DataLoader iterates once."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        return self.iterator


@functools.lru_cache(maxsize=1)
def stream(config, device: str) -> Stream:
    """The stream of a training; the same one at every step."""
    return Stream(config, device)


@functools.lru_cache(maxsize=4)
def pictures(data: str, split: str) -> Pictures:
    """A split of the images in a folder, whose listing is read once. Raises UserError where there are none."""
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no folder {data!r} for --data: write the path of one with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    found = Pictures(root, split)
    if split == "val" and found.classes != pictures(data, "train").classes:
        raise UserError(f"{data}: the classes of val/ are not those of train/")
    return found


def build(config) -> torch.nn.Module:
    """A fresh ViT with a linear head for the folder's classes."""
    classes = pictures(config.data, "train").classes
    pictures(config.data, "val")  # what is wrong with it is told before a training, not after
    if config.loss not in LOSSES:
        raise unknown("loss", config.loss, LOSSES)
    if (config.mixup or config.cutmix) and config.batch_size // parallel.world() // config.accumulate % 2:
        raise UserError(
            "mixup and CutMix pair images: the batch of each process must be even (or --mixup 0 --cutmix 0)"
        )
    return mini.build(
        config.size,
        config.registers,
        len(classes),
        config.image_size,
        drop_path_rate=config.drop_path,
        init_values=config.layer_scale or None,
    )


def loss(module, config, step, device):
    """The loss over what is mixed in, and the accuracy on the larger part of it.

    Binary cross-entropy counts every class that is mixed in as wholly present, as DeiT-III does.
    """
    from timm.loss import BinaryCrossEntropy

    pixels, labels = stream(config, str(device)).batch(step)
    target = labels
    if (config.mixup or config.cutmix) and len(pixels) % 2 == 0:
        with seeded(config.seed, parallel.batch_range(config, step).start):
            pixels, target = _mixup(config, module.num_classes)(pixels, labels)
    logits = module(pixels)
    if config.loss == "ce":
        smoothing = config.smoothing if target.ndim == 1 else 0.0  # Mixup has smoothed what it mixed
        value = F.cross_entropy(logits, target, label_smoothing=smoothing)
    else:
        threshold = None if config.smoothing else 0.0
        value = BinaryCrossEntropy(smoothing=config.smoothing, target_threshold=threshold)(logits, target)
    strongest = target.argmax(1) if target.ndim == 2 else target
    return value, {"accuracy": (logits.argmax(1) == strongest).float().mean().item()}


def telemetry_images(config) -> torch.Tensor:
    """The first held-out images of an order that the seed gives."""
    held_out = pictures(config.data, "val")
    chosen = order(len(held_out), config.seed)[: config.telemetry_images].tolist()
    return torch.stack([_centred(config)(held_out.read(i)[0]) for i in chosen])


@torch.no_grad()
def evaluate(module, config, device) -> dict[str, float]:
    """Top-1 accuracy (0 to 1) on the held-out images, `eval_images` of them at most, centre crop."""
    stream.cache_clear()  # ends the workers
    module.eval()
    held_out = pictures(config.data, "val")
    chosen = order(len(held_out), config.seed)[: config.eval_images]
    loader = DataLoader(_Centred(config, chosen), batch_size=64, num_workers=config.workers)
    correct = 0
    for pixels, labels in loader:
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            correct += (module(pixels.to(device)).argmax(1).cpu() == labels).sum().item()
    return {"accuracy": correct / len(chosen)}


class _Centred(Dataset):
    def __init__(self, config, chosen):
        self.pictures, self.chosen, self.transform = pictures(config.data, "val"), chosen, _centred(config)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        image, label = self.pictures.read(int(self.chosen[place]))
        return self.transform(image), label


def _centred(config):
    from timm.data import create_transform

    return create_transform(config.image_size, interpolation="bicubic", mean=(MEAN,) * 3, std=(STD,) * 3, crop_pct=0.95)


@functools.lru_cache(maxsize=2)
def _mixup(config, num_classes: int):
    from timm.data import Mixup

    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int) -> torch.Tensor:
    """A permutation of `count` places that follows from the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _parquet(shards: list[str]):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=shards, split="train")
    if missing := {"image", "label"} - rows.features.keys():
        raise UserError(f"{shards[0]} has no column {sorted(missing)[0]}: image and label are expected")
    names = getattr(rows.features["label"], "names", None) or [str(v) for v in range(max(rows["label"]) + 1)]
    return rows, names


@contextlib.contextmanager
def seeded(seed: int, position: int):
    """Inside, random numbers of Python, numpy and torch follow from (seed, position); after it they are as before."""
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
