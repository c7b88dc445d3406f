"""Readers of images with boxes, in the layouts they are published in: from a folder to a `datasets.Dataset`.

Every reader takes (root, spec, split): the folder of a local copy, the `folder` entry of data/datasets.yaml, and
"train" or "test". Columns of the result:

    image            datasets.Image, decoded when a row is read
    boxes            list of [left, top, right, bottom] in pixels (in the layout yolo: shares of the image)
    objects          list of the boxes' class names
    labels           list of 0 and 1, one a class (in the layout voc)

A folder of another layout gives one UserError that says what was expected where. No pickle is read.
"""

import json
from pathlib import Path

import torch

from ..base import UserError
from .images import SUFFIXES

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
LAYOUT = "wanted are images/NAME.jpg and boxes/NAME.txt with lines 'class x y width height', shares of the image"


def parquet_files(root: Path, split: str) -> list[str]:
    """The hub's Parquet files of a split (SPLIT-00000-of-….parquet, below root or its data/), sorted."""
    return sorted(str(p) for place in (root, root / "data") for p in place.glob(f"{split}-*.parquet"))


def class_folders(folder: Path, without=()) -> tuple[list[str], list[tuple[str, int]]]:
    """(class names, [(path, class number)]) of the photos CLASS/photo.jpg below a folder, both sorted."""
    from torchvision.datasets.folder import make_dataset

    folders = (p.name for p in folder.iterdir() if p.is_dir())
    classes = sorted(name for name in folders if name not in without and not name.startswith("."))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, make_dataset(folder, numbers, extensions=tuple(SUFFIXES), allow_empty=True) if classes else []


def voc(root: Path, spec: dict, split: str):
    """Pascal VOC: ImageSets/Main/PART.txt, JPEGImages/ID.jpg, Annotations/ID.xml.

    `labels`: which of the classes the image shows, objects marked difficult among them (VOC's own evaluation leaves
    those out). `difficult`: one flag an object. Boxes are turned from VOC's pixel numbers (from 1, inclusive) to edges.
    """
    import xml.etree.ElementTree as ET

    base = root / spec["root"] if (root / spec["root"]).is_dir() else root
    ids = [
        line.split()[0] for line in file_in(base, f"ImageSets/Main/{spec[split]}.txt").read_text().splitlines() if line
    ]
    rows: dict[str, list] = {k: [] for k in ("image", "labels", "boxes", "objects", "difficult")}
    for name in ids:
        path = file_in(base, f"Annotations/{name}.xml")
        try:
            objects = ET.parse(path).getroot().findall("object")
            names = [o.findtext("name") for o in objects]
            edges = [[float(o.findtext(f"bndbox/{e}")) for e in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        except (ET.ParseError, TypeError, ValueError) as error:
            raise UserError(f"Annotations/{name}.xml in {base.name} is no annotation of VOC: {error}") from error
        if strange := set(names) - set(VOC_CLASSES):
            raise UserError(f"Annotations/{name}.xml in {base.name} names {sorted(strange)[0]!r}, no class of VOC")
        rows["image"].append(base / "JPEGImages" / f"{name}.jpg")
        rows["labels"].append([int(c in names) for c in VOC_CLASSES])
        rows["boxes"].append([[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in edges])
        rows["objects"].append(names)
        rows["difficult"].append([int(o.findtext("difficult") or 0) for o in objects])
    return dataset(root, rows)


def coco(root: Path, spec: dict, split: str):
    """COCO's JSON: images in a folder, boxes [left, top, width, height] in one file. Crowds are left out, as LOST does.

    `only`: a text file with the names of the images to take. COCO has no split here: both give the same.
    """
    path = file_in(root, spec["annotations"])
    try:
        table = json.loads(path.read_text())
        names = {c["id"]: c["name"] for c in table["categories"]}
        rows = {i["id"]: (i["file_name"], [], []) for i in table["images"]}
        for a in table["annotations"]:
            if not a.get("iscrowd"):
                x, y, w, h = a["bbox"]
                rows[a["image_id"]][1].append([x, y, x + w, y + h])
                rows[a["image_id"]][2].append(names[a["category_id"]])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{spec['annotations']} in {root.name} is no annotation file of COCO (images, annotations, categories): "
            f"{type(error).__name__} {error}"
        ) from error
    if "only" in spec:
        wanted = {line.split("/")[-1].strip() for line in file_in(root, spec["only"]).read_text().splitlines()}
        rows = {i: row for i, row in rows.items() if row[0] in wanted}
    files, boxes, objects = zip(*rows.values(), strict=True) if rows else ((), (), ())
    images = [root / spec["images"] / name for name in files]
    return dataset(root, {"image": images, "boxes": list(boxes), "objects": list(objects)})


def yolo(root: Path, spec: dict, split: str):
    """images/NAME.jpg and boxes/NAME.txt (see `read_boxes`); boxes are shares of the image; no split."""
    expected = "images/NAME.jpg and boxes/NAME.txt"
    folder_in(root, spec["boxes"], expected)
    files = pictures_in(folder_in(root, spec["images"], expected))
    boxes = [read_boxes(root / spec["boxes"] / f"{p.stem}.txt").tolist() for p in files]
    return dataset(root, {"image": files, "boxes": boxes})


def dataset(root: Path, columns: dict[str, list], expected: str = "", **features):
    """A Dataset whose columns image, mask and depth are pictures in files; the first missing file is named."""
    from datasets import Dataset, Features, Image, Sequence, Value

    expected = f": expected {expected}" if expected else ""
    if not columns["image"]:
        raise UserError(f"no images found in {root.name}{expected}")
    flags = Sequence(Value("int8"))
    kinds = {"image": Image(), "mask": Image(), "depth": Image(), "labels": flags, "difficult": flags}
    kinds |= {"boxes": Sequence(Sequence(Value("float32"))), "objects": Sequence(Value("string")), **features}
    for name in {"image", "mask", "depth"} & set(columns):
        if missing := [Path(p) for p in columns[name] if not Path(p).exists()]:
            first = missing[0].relative_to(root) if missing[0].is_relative_to(root) else missing[0].name
            files = f"{len(missing)} of {len(columns[name])} files"
            raise UserError(f"{first} is missing in {root.name} ({files}){expected}")
        columns[name] = [str(p) for p in columns[name]]
    return Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns}))


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def folder_in(root: Path, name: str, expected: str) -> Path:
    """root/name. Raises UserError, with the expected layout, where there is no such folder."""
    if not (root / name).is_dir():
        raise UserError(f"no folder {name}/ in {root.name}: expected {expected} (there is {_here(root)})")
    return root / name


def file_in(root: Path, name: str) -> Path:
    """root/name. Raises UserError where there is no such file."""
    if not (root / name).is_file():
        raise UserError(f"no file {name} in {root.name}, which holds {_here(root)}")
    return root / name


def _here(root: Path) -> str:
    """The first things in a folder, in words."""
    return ", ".join(sorted(p.name for p in root.iterdir())[:5]) if root.is_dir() else "nothing"


LAYOUTS = {f.__name__: f for f in (voc, coco, yolo)}


def read_boxes(path: Path) -> torch.Tensor:
    """Boxes (objects, 4) of one YOLO file as left, top, right, bottom, shares of the image; none without a file.

    Raises UserError, naming file and line, for a line that is not five numbers or a box outside the image.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    boxes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            _, x, y, width, height = (float(part) for part in line.split())
        except ValueError:
            raise UserError(f"{path.name}, line {number}: {line!r} is not five numbers; {LAYOUT}") from None
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if not (width > 0 and height > 0 and min(box) > -0.01 and max(box) < 1.01):
            raise UserError(f"{path.name}, line {number}: the box {line!r} is not within the image; {LAYOUT}")
        boxes.append([min(max(value, 0.0), 1.0) for value in box])
    return torch.tensor(boxes).reshape(-1, 4)
