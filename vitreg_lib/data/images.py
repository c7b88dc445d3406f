"""A set of images, prepared for a model: scenes, textures, photos that ship with other packages, a folder.

`load` turns the name of a source into an `Images` set. Photos go through the model's own preprocessing: resize by its
own interpolation and crop, centre crop, its own mean and standard deviation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..base import UserError, env_folder
from . import scenes, textures

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SCENES_FROM = 1 << 40  # scenes that no shipped model was trained on
_PHOTOS = {  # photos in colour that come with the installed packages
    "astronaut.png": "skimage",
    "chelsea.png": "skimage",
    "coffee.png": "skimage",
    "rocket.jpg": "skimage",
    "motorcycle_left.png": "skimage",
    "retina.jpg": "skimage",
    "hubble_deep_field.jpg": "skimage",
    "ihc.png": "skimage",
    "china.jpg": "sklearn",
    "flower.jpg": "sklearn",
}


@dataclass
class Images:
    """n images as one model sees them.

    x: (n, 3, size, size) normalised. pixels: the same before normalisation, in [0, 1], for display.
    names: one a picture. source: what they are, as records name it. scenes: the ground truth, or None for photos.
    """

    x: torch.Tensor
    pixels: torch.Tensor
    names: list[str]
    source: str
    scenes: scenes.Scenes | None = None

    def __len__(self) -> int:
        return len(self.x)


def load(source: str, model, n: int, seed: int = 0, size: int | None = None) -> Images:
    """`n` images of `source` for a `zoo.Model`, at its own input size or `size` pixels a side.

    source: "scenes"; "textures" (what `mini-corners` learns from); "photos" (those that ship
    with scikit-image and scikit-learn); "imagenet" (a folder of that name in VITREG_DATA, or in data/ of
    VITREG_MODELS); or the path of an image or of a folder, searched below. Where a folder holds more than n images,
    `seed` draws among them; the same seed gives the same images for every model. An image that cannot be read is named
    in a warning and left out. Raises UserError when a source does not exist or holds no readable image.
    """
    size = size or model.input_size
    if source == "scenes":
        first = SCENES_FROM + seed * 100_000
        batch = scenes.render(range(first, first + n), size)
        names = [f"scene {i}" for i in range(n)]
        return Images(model.normalise(batch.pixels), batch.pixels, names, f"scenes, {n} held-out images", batch)
    if source == "textures":
        return _textures(n, seed, size)
    paths, title = find(source)
    chosen = paths[:n]
    if source != "photos":
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [paths[i] for i in sorted(order[:n])]
    pixels, names = _read(chosen, model, size)
    if not names:
        raise UserError(f"none of the {len(chosen)} images in {source} could be read")
    return Images(model.normalise(pixels), pixels, names, f"{title}, {len(names)} of {len(paths)} images")


def _textures(n: int, seed: int, size: int) -> Images:
    """Held-out images of the recipe `emergence`. They are normal numbers, which the model sees as they are."""
    pixels = textures.GRID * textures.PATCH
    if size != pixels:
        raise UserError(f"textures have {pixels} pixels a side, this model wants {size}; try mini-corners")
    first = textures.TO_LOOK_AT + 1000 * seed
    x = torch.cat([textures.held_out(textures.SHIPPED, 64, part=first + i).pixels for i in range(-(-n // 64))])[:n]
    names = [f"textures {i}" for i in range(n)]
    return Images(x, (x / 6 + 0.5).clamp(0, 1), names, f"textures, {n} held-out images")


def labels(images: Images) -> torch.Tensor | None:
    """(n,) class of each image: a scene's shape, or from labels.csv (file, class_index) of its folder; None without."""
    import csv

    if images.scenes is not None:
        return images.scenes.label
    folder = named_folder(images.source.split(",")[0])
    if folder is None or not (folder / "labels.csv").exists():
        return None
    with open(folder / "labels.csv", newline="") as f:
        known = {Path(row["file"]).stem: int(row["class_index"]) for row in csv.DictReader(f)}
    return torch.tensor([known[name] for name in images.names]) if set(images.names) <= set(known) else None


def find(source: str) -> tuple[list[Path], str]:
    """The image files of a source, sorted, and what to call it."""
    if source == "photos":
        return _photos(), "photos shipped with scikit-image and scikit-learn"
    folder = named_folder(source) or Path(source).expanduser()
    if folder.is_file():
        return [folder], folder.name
    if not folder.is_dir():
        raise UserError(
            f"no images at {source!r}: write scenes, textures, photos, or the path of an image or of a folder of images"
            + (" (imagenet: put such a folder into one named by VITREG_DATA)" if source == "imagenet" else "")
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"the folder {source!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    return paths, folder.name


def named_folder(name: str) -> Path | None:
    """The folder of a data set on this machine: VITREG_DATA/name, or data/name of VITREG_MODELS; None without one."""
    models = env_folder("VITREG_MODELS")
    folders = [env_folder("VITREG_DATA"), models and models / "data"]
    return next((folder / name for folder in folders if folder and (folder / name).is_dir()), None)


def _photos() -> list[Path]:
    import skimage
    import sklearn

    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets/images",
    }
    return [path for name, package in _PHOTOS.items() if (path := folders[package] / name).exists()]


def _read(paths: list[Path], model, size: int) -> tuple[torch.Tensor, list[str]]:
    from PIL import Image, UnidentifiedImageError

    transform = preprocessing(model, size)
    pixels, names = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels.append(transform(image.convert("RGB")))
            names.append(path.stem)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            warnings.warn(f"{path.name} cannot be read and is left out: {error}", stacklevel=3)
    return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size), names


def preprocessing(model, size: int):
    """A transform from a PIL image to pixels (3, size, size) in [0, 1]: timm's for evaluation, less normalisation."""
    from timm.data import create_transform

    zero, one = (0.0,) * 3, (1.0,) * 3
    crop = dict(crop_pct=model.crop, crop_mode=model.crop_mode)
    return create_transform((3, size, size), interpolation=model.interpolation, mean=zero, std=one, **crop)
