"""The data sets of the paper by name, from this machine or from the hub, and as a model sees them.

`load` looks, in this order, into VITREG_DATA/NAME (the published layout, or the hub's Parquet files), for the small
parts into data/ of VITREG_MODELS, and on the hub. What each name is, its splits, its licence and how to get it stand in
data/datasets.yaml. The columns of what is loaded are those of `formats`.

    part = registry.load("caltech101-small", "test")       # part.data is a datasets.Dataset
    pictures, masks = registry.segmentation("camvid-small", "train", model)
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from ..base import DATA, UserError, env_folder, unknown
from . import formats, images
from . import images as image_sets
from .formats import LAYOUT, read_boxes
from .images import Images, preprocessing
from .scenes import SHAPES


@dataclass
class Part:
    """A split of a data set: its rows, its name, what it is (as records name it), and its entry."""

    data: object  # datasets.Dataset
    name: str
    title: str
    entry: dict

    def __len__(self) -> int:
        return len(self.data)


@functools.cache
def entries() -> dict[str, dict]:
    """The entries of data/datasets.yaml by name."""
    return yaml.safe_load((DATA / "datasets.yaml").read_text())


def entry(name: str) -> dict:
    """The entry of that name; UserError with the nearest ones for another."""
    if name not in entries():
        raise unknown("data set", name, entries(), "See `vitreg data`.")
    return entries()[name]


def folder(name: str) -> Path | None:
    """The local copy of a data set, None without one: VITREG_DATA/NAME, for small parts also data/ of VITREG_MODELS."""
    data, models, small = env_folder("VITREG_DATA"), env_folder("VITREG_MODELS"), entry(name).get("small")
    folders = [data and data / name, models and small and models / "data" / small]
    return next((folder for folder in folders if folder and folder.is_dir()), None)


def state(name: str) -> str:
    """Where a data set would be read from: "VITREG_DATA", "VITREG_MODELS", "hub cache" or "not here"."""
    if place := folder(name):
        return "VITREG_DATA" if place.name == name else "VITREG_MODELS"
    from datasets.config import HF_DATASETS_CACHE

    hub = entry(name).get("hub", {}).get("id", "")
    return "hub cache" if hub and (Path(HF_DATASETS_CACHE) / hub.replace("/", "___").lower()).is_dir() else "not here"


def how(name: str) -> str:
    """One line: how to get a data set."""
    known = entry(name)
    if "small" in known:
        return f"put the folder into VITREG_DATA as {name}, in the layout {known['folder']['layout']}"
    hub = f"by itself from the hub ({known['hub']['id']}), or " if "hub" in known else ""
    return f"{hub}a folder {name} in VITREG_DATA ({known['folder']['layout']})" + (
        f": {known['get']}" if "get" in known else ""
    )


def load(name: str, split: str = "train") -> Part:
    """A split ("train" or "test") of a data set. Raises UserError where it cannot be had or is of another layout."""
    known = entry(name)
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    place = folder(name)
    if place:
        data = _parquet(place, known, split) or formats.read_layout(place, known["folder"], split)
    elif "hub" in known:
        data = _hub(name, known, split)
    else:
        raise UserError(f"{name} ({known['title']}) is not here: {how(name)}")
    classes = f", {_classes(name, data)} of {known['classes']} classes" if "label" in data.features else ""
    return Part(data, name, f"{known['title']}{classes}, {split} {len(data)} images", known)


def _parquet(place: Path, known: dict, split: str):
    """The hub's Parquet files in a local folder, columns renamed to ours; None without any."""
    from datasets import Dataset

    hub = known.get("hub", {"splits": {}})
    found = [f for part in hub["splits"].get(split, split).split("+") for f in formats.parquet_files(place, part)]
    return _renamed(Dataset.from_parquet(found), hub) if found else None


def _hub(name: str, known: dict, split: str):
    from datasets import load_dataset

    from .. import base

    there = known["hub"]
    with base.hub(f"{name} ({known['title']})", how(name)):
        data = load_dataset(there["id"], there.get("config"), split=there["splits"][split])
    return _renamed(data, there)


def _renamed(data, hub: dict):
    for ours in ("image", "label"):
        theirs = hub.get(ours, ours)
        if theirs not in data.column_names:
            raise UserError(f"expected a column {theirs} (of {hub.get('id', 'the hub')}), found {data.column_names}")
        data = data if theirs == ours else data.rename_column(theirs, ours)
    return data.select_columns(["image", "label"])


def _classes(name: str, data) -> int:
    """How many classes the labels hold; refuses a split without labels (a hidden test set) or of one class."""
    labels = set(data.with_format("numpy")["label"][:].tolist())
    if -1 in labels:
        raise UserError(f"{name}: some images have no label (-1), as in a test set whose labels are hidden")
    if len(labels) < 2:
        raise UserError(f"{name} has one class only: nothing to classify")
    return len(labels)


def chosen(part: Part, n: int | None, seed: int = 0) -> list[int]:
    """At most n rows of a part, drawn by `seed`, in order; the same for every model. All of them for None."""
    if n is None or n >= len(part):
        return list(range(len(part)))
    return sorted(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n].tolist())


def squashed(part: Part, model, rows: list[int]) -> Images:
    """Rows of a part as the model sees them, squashed to its square with nothing cut off, so that masks fit."""
    model = dataclasses.replace(model, crop=1.0, crop_mode="squash")
    transform = preprocessing(model, model.input_size)
    pixels = torch.stack([transform(part.data[i]["image"].convert("RGB")) for i in rows])
    return Images(model.normalise(pixels), pixels, [str(i) for i in rows], f"{part.title}, {len(rows)} taken")


def segmentation(name: str, split: str, model, n: int | None = None, seed: int = 0):
    """(`Images`, masks (images, side, side), number of classes) of a segmentation set, or of "scenes".

    Masks are class numbers from 0 at the images' own size, resized without mixing; `formats.IGNORE` (255) has no label.
    Splits of scenes are different scenes: class 0 is the background, the others are shapes.
    """
    if name == "scenes":
        pictures = _scenes(model, split, n, seed)
        return pictures, pictures.scenes.semantic, len(SHAPES) + 1
    part = _of(name, split, "mask", "segmentation")
    rows = chosen(part, n, seed)
    pictures = squashed(part, model, rows)
    side = pictures.x.shape[-1]
    masks = [formats.mask_classes(_plane(part.data[i]["mask"], side), part.entry["folder"]) for i in rows]
    found, classes = torch.stack(masks), part.entry["classes"]
    if (bad := found[(found != formats.IGNORE) & ((found < 0) | (found >= classes))]).numel():
        raise UserError(f"{name}: a mask holds the class {int(bad[0])}, expected 0 to {classes - 1}")
    return pictures, found, classes


def depth(name: str, split: str, model, n: int | None = None, seed: int = 0):
    """(`Images`, depths (images, side, side), largest depth) of a depth set in metres, or of "scenes" in their unit.

    0 where there is no measurement, as `probes.depth` expects it.
    """
    if name == "scenes":
        pictures = _scenes(model, split, n, seed)
        return pictures, pictures.scenes.depth, 10.0
    part = _of(name, split, "depth", "depth")
    rows, spec = chosen(part, n, seed), part.entry["folder"]
    pictures = squashed(part, model, rows)
    side = pictures.x.shape[-1]
    depths = torch.stack([_plane(part.data[i]["depth"], side).float() / spec["unit"] for i in rows])
    return pictures, depths, float(spec["max_depth"])


def boxes(name: str, model, n: int | None = None, seed: int = 0):
    """(`Images`, boxes): those that have an object, and for each its boxes (objects, 4) in the squashed image's pixels.

    As `data.boxes.load` gives them; images without a box are left out and counted in `source`.
    """
    part = _of(name, "train", "boxes", "boxes")
    rows = chosen(part, n, seed)
    keep = [i for i in rows if part.data[i]["boxes"]]
    if not keep:
        raise UserError(f"none of the {len(rows)} images of {name} has a box")
    pictures = squashed(part, model, keep)
    pictures.source = f"{part.entry['title']}, {len(keep)} with boxes, {len(rows) - len(keep)} without left out"
    side, found = pictures.x.shape[-1], []
    for i in keep:
        width, height = (1, 1) if part.entry["folder"]["layout"] == "yolo" else part.data[i]["image"].size
        scale = torch.tensor([side / width, side / height] * 2)
        found.append(torch.tensor(part.data[i]["boxes"]) * scale)
    return pictures, found


def _of(name: str, split: str, column: str, task: str) -> Part:
    part = load(name, split)
    if column not in part.data.column_names:
        fitting = [n for n, e in entries().items() if e["task"] == task]
        raise UserError(f"{name} has no {column} (its task is {part.entry['task']}): use one of {', '.join(fitting)}")
    return part


def _plane(picture, side: int) -> torch.Tensor:
    """(side, side) numbers of a one-channel picture, resized without mixing them."""
    from PIL import Image

    if picture.mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise UserError(f"a picture of mode {picture.mode} is no map of numbers: one channel of 8 or 16 bits is wanted")
    return torch.from_numpy(np.array(picture.resize((side, side), Image.NEAREST)).astype(np.int64))


def _scenes(model, split: str, n: int | None, seed: int) -> Images:
    """Held-out scenes: even hundred thousands train, odd ones test, so that the splits never share one."""
    first = 2 * seed + (split == "test")
    return images.load("scenes", model, n or 200, first)


def load_boxes(source: str, model, n: int, seed: int = 0) -> tuple[image_sets.Images, list[torch.Tensor]]:
    """(`Images`, boxes): up to n images that have an object, and for each its (objects, 4) boxes.

    source: "scenes" (the visible parts of their objects), a set of the registry (voc2007, voc2012, coco20k), a named
    folder such as "coco", or a path. Boxes are left, top, right, bottom in pixels of the image as the model sees it.
    Images without a box are left out and counted in `source`. Raises UserError for another layout, or without any box.
    """
    if source == "scenes":
        images = image_sets.load(source, model, n, seed)
        return images, images.scenes.visible_boxes
    if source in entries():
        return boxes(source, model, n, seed)
    folder = image_sets.named_folder(source) or Path(source).expanduser()
    if not (folder / "images").is_dir() or not (folder / "boxes").is_dir():
        raise UserError(
            f"no images with boxes at {source!r}: {LAYOUT}; a folder named {folder.name} may lie in VITREG_DATA"
        )
    squashed = dataclasses.replace(model, crop=1.0, crop_mode="squash")
    images = image_sets.load(str(folder / "images"), squashed, n, seed)
    side = images.x.shape[-1]
    found = [read_boxes(folder / "boxes" / f"{name}.txt") * side for name in images.names]
    keep = [i for i, boxes in enumerate(found) if len(boxes)]
    if not keep:
        raise UserError(f"none of the {len(found)} images in {source!r} has a box: {LAYOUT}")
    title = f"photos of the folder {folder.name}, {len(keep)} with boxes, {len(found) - len(keep)} without left out"
    names = [images.names[i] for i in keep]
    return image_sets.Images(images.x[keep], images.pixels[keep], names, title), [found[i] for i in keep]
