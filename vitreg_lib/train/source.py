"""Where a training without labels takes its images from: scenes, or the user's own (`--data FOLDER`).

Everything goes by an image's position in the training (see `parallel.batch_range`), as in `folder`, whose reading,
order and prefetching are used here. Images come as they are, in [0, 1]; views and masks are made on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from ..data import scenes
from ..errors import UserError
from . import folder, parallel
from .deit3 import HELD_OUT, MEAN, STD, targets

MARGIN = 8 / 7  # own images are read this much larger than the model's, 256 pixels for 224, so that crops stay sharp
CAPTIONS = ("caption", "text", "txt")  # columns that hold a caption
PICTURES = ("image", "jpg", "jpeg", "png", "webp")  # columns that hold an image


def images(config, step: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's images (n, 3, size, size) of a step, in [0, 1], and their positions (n,), on the device."""
    mine = parallel.batch_range(config, step)
    index = torch.arange(mine.start, mine.stop, device=device)
    if not config.data:
        return scenes.render(index, config.image_size, config.seed, device).pixels, index
    size = round(MARGIN * config.image_size)
    return _stream(config, str(device), folder.pictures(config.data, "train"), size).batch(step)[0], index


def pairs(config, step: int, device) -> tuple[torch.Tensor, list[str]]:
    """This process's images (n, 3, size, size) of a step, in [0, 1], and their captions."""
    if not config.data:
        batch = scenes.render(parallel.batch_range(config, step), config.image_size, config.seed, device)
        return batch.pixels, batch.captions()
    pixels, captions = _stream(config, str(device), captioned(config.data, "train"), config.image_size).batch(step)
    return pixels, list(captions)


def held_out(config, first: int, count: int) -> torch.Tensor:
    """Images (n, 3, size, size) in [0, 1] that are never trained on: `count` from number `first` on, as far as there
    are so many."""
    if not config.data:
        return scenes.render(range(HELD_OUT + first, HELD_OUT + first + count), config.image_size, config.seed).pixels
    source = captioned(config.data, "val") if config.recipe == "clip" else folder.pictures(config.data, "val")
    return _read(config, source, _places(source, config.seed)[first : first + count])[0]


def telemetry_images(config) -> torch.Tensor:
    """The held-out images whose norms are watched, normalised."""
    return (held_out(config, 0, config.telemetry_images) - MEAN) / STD


def asking(config) -> int:
    """How many of the images of `labelled` ask."""
    return min(config.eval_images, len(folder.pictures(config.data, "val"))) if config.data else config.eval_images


def labelled(config, batch_size: int = 256) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Images and labels to look for neighbours: `eval_images` that ask (held out), then twice as many that answer.

    labels: by attribute of a scene, or `class` of a folder, whose answers come from its training images.
    """
    count = config.eval_images
    if not config.data:
        first = HELD_OUT + config.telemetry_images
        for index in torch.arange(first, first + 3 * count).split(batch_size):
            batch = scenes.render(index, config.image_size, config.seed)
            yield batch.pixels, targets(batch)
        return
    for split, wanted in (("val", count), ("train", 2 * count)):
        pictures = folder.pictures(config.data, split)
        for part in _places(pictures, config.seed)[:wanted].split(batch_size):
            pixels, labels = _read(config, pictures, part)
            yield pixels, {"class": torch.tensor(labels)}


class Captioned:
    """Pairs of image and caption from Parquet files or WebDataset shards (.tar with .jpg and .txt), by `datasets`.

    split: "train", or "val" for every twentieth pair, which is held out. Raises UserError for a folder without such
    files or columns.
    """

    def __init__(self, root: Path, split: str):
        from datasets import load_dataset

        kind, files = next(
            ((kind, found) for kind, end in (("parquet", "*.parquet"), ("webdataset", "*.tar"))
             if (found := sorted(map(str, root.rglob(end))))),
            (None, None),
        )  # fmt: skip
        if kind is None:
            raise UserError(f"no pairs in {root}: *.parquet with image and caption, or *.tar with .jpg and .txt wanted")
        rows = load_dataset(kind, data_files=files, split="train")
        columns = [next((n for n in names if n in rows.features), None) for names in (PICTURES, CAPTIONS)]
        if None in columns:
            names = ", ".join(rows.features)
            raise UserError(f"{files[0]} has the columns {names}: {PICTURES[0]} and {CAPTIONS[0]} are expected")
        self.image, self.caption = columns
        last = folder.HELD_OUT_EVERY - 1
        self.rows = rows.select([i for i in range(len(rows)) if (i % (last + 1) == last) == (split == "val")])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int):
        """(PIL image in RGB, caption)."""
        row = self.rows[index]
        return row[self.image].convert("RGB"), row[self.caption]

    def name(self, index: int) -> str:
        return f"pair {index}"


@functools.lru_cache(maxsize=2)
def captioned(data: str, split: str) -> Captioned:
    """The pairs in a folder. Raises UserError where there is none."""
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {data!r} for --data: write the path of one with *.parquet or *.tar files of pairs")
    return Captioned(root, split)


@functools.lru_cache(maxsize=1)
def _stream(config, device: str, source, size: int):
    return folder.Stream(config, device, folder.Augmented(config, source, _plain(size)))


def _plain(size: int):
    """PIL image → (3, size, size) in [0, 1]: short side resized, centre cropped."""
    from timm.data import create_transform

    return create_transform(size, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def _places(source, seed: int) -> torch.Tensor:
    return folder.order(len(source), seed)


def _read(config, source, places):
    """(pixels, labels or captions) of the pictures at these places of a source."""
    read = [source.read(i) for i in places.tolist()]
    return torch.stack([_plain(config.image_size)(image) for image, _ in read]), [label for _, label in read]


def pairs_held_out(config) -> tuple[torch.Tensor, list[str]]:
    """At most `eval_images` pairs of a folder that are never trained on: images in [0, 1] and captions."""
    source = captioned(config.data, "val")
    return _read(config, source, _places(source, config.seed)[: config.eval_images])
