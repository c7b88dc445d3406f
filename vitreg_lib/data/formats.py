"""Readers of data sets in the layouts they are published in: from a folder to a `datasets.Dataset` with lazy images.

Every reader takes (root, spec, split): the folder of a local copy, the `folder` entry of data/datasets.yaml, and
"train" or "test". Columns of the result:

    image            datasets.Image, decoded when a row is read
    label            ClassLabel                                      classification
    labels           list of 0 and 1, one a class                    several labels an image
    mask             datasets.Image of class numbers                 segmentation
    depth            datasets.Image of 16-bit numbers                depth
    boxes            list of [left, top, right, bottom] in pixels (in the layout yolo: shares of the image)
    objects          list of the boxes' class names

A folder of another layout gives one UserError that says what was expected where. No pickle is read.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from ..base import UserError, unknown
from .images import SUFFIXES

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
LAYOUT = "wanted are images/NAME.jpg and boxes/NAME.txt with lines 'class x y width height', shares of the image"


def read_layout(root: Path, spec: dict, split: str):
    """The split of the data set in `root` by the layout that `spec` names."""
    if spec["layout"] not in LAYOUTS:
        raise unknown("layout", spec["layout"], LAYOUTS)
    return LAYOUTS[spec["layout"]](root, spec, split)


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


def imagefolder(root: Path, spec: dict, split: str):
    """SPLIT/CLASS/photo.jpg. `per_class`: n photos of each class, drawn by seed 0, train; the others test."""
    place = _folder(root, spec[split], "SPLIT/CLASS/photo.jpg")
    classes, rows = class_folders(place, spec.get("without", ()))
    if not classes:
        raise UserError(f"{spec[split]}/ in {root.name} has no class folders: expected SPLIT/CLASS/photo.jpg")
    if "per_class" in spec:
        rows = [row for n in range(len(classes)) for row in _drawn([r for r in rows if r[1] == n], spec, split)]
    if empty := set(range(len(classes))) - {number for _, number in rows}:
        raise UserError(
            f"the class folder {spec[split]}/{classes[min(empty)]} in {root.name} holds no image for {split}"
        )
    return _classified(root, *map(list, zip(*rows, strict=True)), classes)


def _drawn(rows: list, spec: dict, split: str) -> list:
    """Of the rows of one class those drawn for training, or the other ones."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    train = set(order[: spec["per_class"]])
    return [row for i, row in enumerate(rows) if (i in train) == (split == "train")]


def lists(root: Path, spec: dict, split: str):
    """Text files with one image a line: its name, put into `images`, and its label: `second` word, `rest`, `folder`."""

    def lines(part):
        for name in spec[part]:
            for number, line in enumerate(_file(root, name).read_text().splitlines(), 1):
                if line.strip():
                    yield name, number, line.strip()

    def parse(name, number, line):
        key, _, rest = line.replace(",", " ").partition(" ") if spec["label"] == "second" else line.partition(" ")
        if spec["label"] == "folder":
            return line.lstrip("/"), str(Path(line.lstrip("/")).parent)
        if not rest.strip():
            raise UserError(f"{name}, line {number} in {root.name}: {line!r} has no label after the image's name")
        return key, rest.strip().split()[0] if spec["label"] == "second" else rest.strip()

    classes = {parse(*line)[1] for line in lines("train")}
    classes = sorted(classes, key=lambda c: (int(c), "") if c.isdigit() else (0, c))
    number = {name: i for i, name in enumerate(classes)}
    rows = [parse(*line) for line in lines(split)]
    if strange := [label for _, label in rows if label not in number]:
        raise UserError(f"{spec[split][0]} in {root.name} has the class {strange[0]!r}, which {spec['train'][0]} lacks")
    return _classified(root, [root / spec["images"].format(k) for k, _ in rows], [number[c] for _, c in rows], classes)


def cub(root: Path, spec: dict, split: str):
    """images.txt, image_class_labels.txt, train_test_split.txt (1 is train) and classes.txt, joined by image id."""

    def table(name):
        lines = _file(root, f"{name}.txt").read_text().splitlines()
        return {key: value.strip() for key, value in (line.split(maxsplit=1) for line in lines if line.strip())}

    images, labels, parts = table("images"), table("image_class_labels"), table("train_test_split")
    classes = dict(sorted(table("classes").items(), key=lambda row: int(row[0])))
    numbers = {key: number for number, key in enumerate(classes)}
    ids = [i for i in images if parts[i] == str(spec[split])]
    files = [root / "images" / images[i] for i in ids]
    return _classified(root, files, [numbers[labels[i]] for i in ids], list(classes.values()))


def cars(root: Path, spec: dict, split: str):
    """Stanford's devkit: a folder of photos, and a MATLAB table with `fname` and `class` (from 1) of each."""
    from scipy.io import loadmat

    place, table = spec[split]
    rows = loadmat(_file(root, table), squeeze_me=True)["annotations"].reshape(-1)
    if "class" not in (rows.dtype.names or ()):
        raise UserError(f"{table} in {root.name} has no classes: the table with labels is wanted")
    labels = [int(row["class"]) - 1 for row in rows]
    meta = root / "devkit" / "cars_meta.mat"
    count = max(labels) + 1
    named = [str(n) for n in loadmat(meta, squeeze_me=True)["class_names"]] if meta.exists() else map(str, range(count))
    return _classified(root, [root / place / str(row["fname"]) for row in rows], labels, list(named))


def flowers(root: Path, spec: dict, split: str):
    """jpg/image_NNNNN.jpg; imagelabels.mat has every image's class (from 1), setid.mat the ids of the parts."""
    from scipy.io import loadmat

    labels = loadmat(_file(root, "imagelabels.mat"))["labels"].reshape(-1)
    parts = loadmat(_file(root, "setid.mat"))
    ids = [int(i) for part in spec[split] for i in parts[part].reshape(-1)]
    files = [root / "jpg" / f"image_{i:05d}.jpg" for i in ids]
    return _classified(root, files, [int(labels[i - 1]) - 1 for i in ids], [str(i + 1) for i in range(labels.max())])


def voc(root: Path, spec: dict, split: str):
    """Pascal VOC: ImageSets/Main/PART.txt, JPEGImages/ID.jpg, Annotations/ID.xml.

    `labels`: which of the classes the image shows, objects marked difficult among them (VOC's own evaluation leaves
    those out). `difficult`: one flag an object. Boxes are turned from VOC's pixel numbers (from 1, inclusive) to edges.
    """
    import xml.etree.ElementTree as ET

    base = root / spec["root"] if (root / spec["root"]).is_dir() else root
    ids = [
        line.split()[0] for line in _file(base, f"ImageSets/Main/{spec[split]}.txt").read_text().splitlines() if line
    ]
    rows: dict[str, list] = {k: [] for k in ("image", "labels", "boxes", "objects", "difficult")}
    for name in ids:
        path = _file(base, f"Annotations/{name}.xml")
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
    return _dataset(root, rows)


def coco(root: Path, spec: dict, split: str):
    """COCO's JSON: images in a folder, boxes [left, top, width, height] in one file. Crowds are left out, as LOST does.

    `only`: a text file with the names of the images to take. COCO has no split here: both give the same.
    """
    path = _file(root, spec["annotations"])
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
        wanted = {line.split("/")[-1].strip() for line in _file(root, spec["only"]).read_text().splitlines()}
        rows = {i: row for i, row in rows.items() if row[0] in wanted}
    files, boxes, objects = zip(*rows.values(), strict=True) if rows else ((), (), ())
    images = [root / spec["images"] / name for name in files]
    return _dataset(root, {"image": images, "boxes": list(boxes), "objects": list(objects)})


def yolo(root: Path, spec: dict, split: str):
    """images/NAME.jpg and boxes/NAME.txt (see `read_boxes`); boxes are shares of the image; no split."""
    expected = "images/NAME.jpg and boxes/NAME.txt"
    _folder(root, spec["boxes"], expected)
    files = _pictures(_folder(root, spec["images"], expected))
    boxes = [read_boxes(root / spec["boxes"] / f"{p.stem}.txt").tolist() for p in files]
    return _dataset(root, {"image": files, "boxes": boxes})


def masks(root: Path, spec: dict, split: str):
    """Two folders: photos, and PNG masks of class numbers under the same names."""
    photos, labels = spec[split]
    expected = f"{photos}/NAME.jpg and {labels}/NAME.png"
    files, marked = _pictures(_folder(root, photos, expected)), _folder(root, labels, expected)
    return _dataset(root, {"image": files, "mask": [marked / f"{p.stem}.png" for p in files]}, expected)


def depth(root: Path, spec: dict, split: str):
    """SCENE/rgb_N.jpg with SCENE/sync_depth_N.png beside it, 16 bits, `unit` to the metre."""
    expected = "SCENE/rgb_N.jpg and SCENE/sync_depth_N.png"
    files = sorted(_folder(root, spec[split], expected).rglob("rgb_*.jpg"))
    depths = [p.with_name(p.name.replace("rgb_", "sync_depth_")).with_suffix(".png") for p in files]
    return _dataset(root, {"image": files, "depth": depths}, expected)


def labels_csv(root: Path, spec: dict, split: str):
    """A folder of photos and a table (file, class_index, wnid, name); no split."""
    with open(_file(root, spec["file"]), newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or not {"file", "class_index"} <= set(rows[0]):
        raise UserError(f"{spec['file']} in {root.name}: expected a table with the columns file and class_index")
    count = max(int(row["class_index"]) for row in rows) + 1
    files, labels = [root / row["file"] for row in rows], [int(row["class_index"]) for row in rows]
    return _classified(root, files, labels, [str(i) for i in range(count)])


def _classified(root: Path, files: list[Path], labels: list[int], classes: list[str]):
    from datasets import ClassLabel

    if len(set(labels)) < 2:
        raise UserError(f"{root.name} has one class only ({classes[0] if classes else 'none'}): nothing to classify")
    return _dataset(root, {"image": files, "label": labels}, label=ClassLabel(names=classes))


def _dataset(root: Path, columns: dict[str, list], expected: str = "", **features):
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


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _folder(root: Path, name: str, expected: str) -> Path:
    if not (root / name).is_dir():
        raise UserError(f"no folder {name}/ in {root.name}: expected {expected} (there is {_here(root)})")
    return root / name


def _file(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise UserError(f"no file {name} in {root.name}, which holds {_here(root)}")
    return root / name


def _here(root: Path) -> str:
    """The first things in a folder, in words."""
    return ", ".join(sorted(p.name for p in root.iterdir())[:5]) if root.is_dir() else "nothing"


LAYOUTS = {f.__name__: f for f in (imagefolder, lists, cub, cars, flowers, voc, coco, yolo, masks, depth, labels_csv)}


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
