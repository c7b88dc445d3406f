"""The data sets of the paper by name, where they are on this machine, and images with boxes for object discovery.

What each name is, its splits, its licence and how to get it stand in data/datasets.yaml. A local copy lies in
VITREG_DATA/NAME, small parts also in data/ of VITREG_MODELS. Sets with classes, masks or depths are read by
notebooks/paper/tables_sets.py.

    pictures, truth = sets.load_boxes("coco", model, 50)   # Images, and the boxes (objects, 4) of each
"""

import dataclasses
import functools
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from ..base import DATA, UserError, env_folder, unknown
from . import formats, images
from .images import Images, preprocessing, read


@dataclass
class Part:
    """A split of a data set: its rows, its name, its title in records, and its entry in data/datasets.yaml."""

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
    about = entry(name)
    if "small" in about:
        return f"put the folder into VITREG_DATA as {name}, in the layout {about['folder']['layout']}"
    hub = f"by itself from the hub ({about['hub']['id']}), or " if "hub" in about else ""
    source = f": {about['get']}" if "get" in about else ""
    return f"{hub}a folder {name} in VITREG_DATA ({about['folder']['layout']}){source}"


def not_here(name: str) -> UserError:
    """The error for a data set that this machine lacks: it says how to get it."""
    return UserError(f"{name} ({entry(name)['title']}) is not here: {how(name)}")


def chosen(part: Part, n: int | None, seed: int = 0) -> list[int]:
    """At most n rows of a part, drawn by `seed`, in order; the same for every model. All of them for None."""
    if n is None or n >= len(part):
        return list(range(len(part)))
    return sorted(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n].tolist())


def squashed(part: Part, model, rows: list[int]) -> tuple[Images, dict[int, tuple[int, int]]]:
    """(`Images`, {row: (width, height)}) of the rows that can be read, others named in a warning and in `left_out`.

    The images are squashed to the model's square with nothing cut off, so that masks and boxes fit. Raises UserError
    where none can be read.
    """
    model = dataclasses.replace(model, crop=1.0, crop_mode="squash")
    transform, stored = preprocessing(model, model.input_size), undecoded(part.data)
    pixels, sizes, names, left_out = [], {}, [], {}
    for row in rows:
        picture = stored[row]["image"]
        name = Path(picture["path"] or f"{row}").stem
        try:
            image = read_stored(picture)
        except UserError as error:
            left_out[name] = str(error)
            warnings.warn(f"{name} of {part.name} cannot be read and is left out: {error}", stacklevel=3)
            continue
        pixels.append(transform(image))
        sizes[row] = image.size
        names.append(name)
    if not names:
        raise UserError(f"none of the {len(rows)} images of {part.name} could be read")
    x = torch.stack(pixels)
    return Images(model.normalise(x), x, names, f"{part.title}, {len(names)} taken", None, left_out), sizes


def undecoded(data, column: str = "image"):
    """A Dataset whose column of pictures gives what is stored, {"bytes", "path"}, for `read_stored`."""
    from datasets import Image

    return data.cast_column(column, Image(decode=False))


def read_stored(picture: dict):
    """The picture that a Dataset stores, read by `images.read`."""
    return read(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"])


def load_boxes(source: str, model, n: int | None = None, seed: int = 0) -> tuple[Images, list[torch.Tensor]]:
    """(`Images`, boxes): up to n images, those that have an object, and for each its (objects, 4) boxes.

    source: "scenes" (the visible parts of their objects), a data set with boxes (voc2007, voc2012, coco20k), a named
    folder such as "coco", or a path. Boxes are left, top, right, bottom in pixels of the image as the model sees it.
    Images without a box are left out and counted in `source`. Raises UserError for another layout, or without any box.
    """
    if source == "scenes":
        scenes = images.load(source, model, n or 200, seed)
        return scenes, scenes.scenes.visible_boxes
    part = _set_with_boxes(source) if source in entries() else _folder_with_boxes(source)
    rows = chosen(part, n, seed)
    table = part.data.select_columns("boxes").select(rows)["boxes"]
    keep = {row: boxes for row, boxes in zip(rows, table, strict=True) if boxes}
    if not keep:
        raise UserError(f"none of the {len(rows)} images of {part.name!r} has a box: {formats.LAYOUT}")
    pictures, sizes = squashed(part, model, list(keep))
    pictures.source = f"{part.entry['title']}, {len(sizes)} with boxes, {len(rows) - len(keep)} without left out"
    (high, wide), relative = pictures.x.shape[-2:], part.entry["folder"]["layout"] == "yolo"
    scales = [(1, 1) if relative else size for size in sizes.values()]
    scales = [torch.tensor([wide / width, high / height] * 2) for width, height in scales]
    return pictures, [torch.tensor(keep[row]) * scale for row, scale in zip(sizes, scales, strict=True)]


def _set_with_boxes(name: str) -> Part:
    about, place = entry(name), folder(name)
    if about["folder"]["layout"] not in formats.LAYOUTS:
        others = [n for n, e in entries().items() if e["folder"]["layout"] in formats.LAYOUTS]
        raise UserError(f"{name} has no boxes (its task is {about['task']}): use one of {', '.join(others)}")
    if not place:
        raise not_here(name)
    data = formats.LAYOUTS[about["folder"]["layout"]](place, about["folder"], "train")
    return Part(data, name, f"{about['title']}, train {len(data)} images", about)


def _folder_with_boxes(source: str) -> Part:
    """A folder of the user's own with images/ and boxes/."""
    place = images.named_folder(source) or Path(source).expanduser()
    if not (place / "images").is_dir() or not (place / "boxes").is_dir():
        where = f"a folder named {place.name} may lie in VITREG_DATA"
        raise UserError(f"no images with boxes at {source!r}: {formats.LAYOUT}; {where}")
    spec = {"layout": "yolo", "images": "images", "boxes": "boxes"}
    about = {"title": f"photos of the folder {place.name}", "folder": spec, "task": "boxes"}
    return Part(formats.yolo(place, spec, "train"), source, about["title"], about)
