"""The data sets of Tables 1, 2, 4 and 6 with their classes, masks or depths, in the layouts they are published in.

`load` looks, in this order, into VITREG_DATA/NAME (the published layout, or the hub's Parquet files), for the small
parts into data/ of VITREG_MODELS, and on the hub. It gives a `datasets.Dataset` with these columns:

    image            datasets.Image, decoded when a row is read
    label            ClassLabel                                      classification
    labels           list of 0 and 1, one a class                    several labels an image
    mask             datasets.Image of class numbers                 segmentation
    depth            datasets.Image of 16-bit numbers                depth

A reader takes (root, spec, split): the folder of a local copy, the `folder` entry of data/datasets.yaml, and "train" or
"test". A folder of another layout gives one UserError that says what was expected where. No pickle is read.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from vitreg_lib.base import UserError, unknown
from vitreg_lib.base import hub as hub_errors
from vitreg_lib.data import formats, sets
from vitreg_lib.data.formats import class_folders, dataset, file_in, folder_in, pictures_in


def load(name: str, split: str = "train") -> sets.Part:
    """A split ("train" or "test") of a data set. Raises UserError where it cannot be had or is of another layout."""
    about, place = sets.entry(name), sets.folder(name)
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    if place:
        data = _parquet(place, about, split) or LAYOUTS[about["folder"]["layout"]](place, about["folder"], split)
    elif "hub" in about:
        data = _hub(name, about, split)
    else:
        raise sets.not_here(name)
    count = _classes(name, data) if "label" in data.features else 0
    some = f", {count} of {about['classes']} classes" if count and count != about["classes"] else ""
    return sets.Part(data, name, f"{about['title']}{some}, {split} {len(data)} images", about)


def _parquet(place: Path, about: dict, split: str):
    """The hub's Parquet files in a local folder, columns renamed to ours; None without any."""
    from datasets import Dataset

    hub = about.get("hub", {"splits": {}})
    parts = hub["splits"].get(split, split).split("+")
    files = [file for part in parts for file in formats.parquet_files(place, part)]
    return _renamed(Dataset.from_parquet(files), hub) if files else None


def _hub(name: str, about: dict, split: str):
    from datasets import load_dataset

    hub = about["hub"]
    with hub_errors(f"{name} ({about['title']})", sets.how(name)):
        data = load_dataset(hub["id"], hub.get("config"), split=hub["splits"][split])
    return _renamed(data, hub)


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


def with_column(name: str, split: str, column: str, task: str) -> sets.Part:
    """`load` of a data set that has the column. Raises UserError, naming the data sets of the `task`, for another."""
    part = load(name, split)
    if column not in part.data.column_names:
        others = [n for n, e in sets.entries().items() if e["task"] == task]
        raise UserError(f"{name} has no {column} (its task is {part.entry['task']}): use one of {', '.join(others)}")
    return part


def imagefolder(root: Path, spec: dict, split: str):
    """SPLIT/CLASS/photo.jpg. `per_class`: n photos of each class, drawn by seed 0, train; the others test."""
    place = folder_in(root, spec[split], "SPLIT/CLASS/photo.jpg")
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
            for number, line in enumerate(file_in(root, name).read_text().splitlines(), 1):
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
        lines = file_in(root, f"{name}.txt").read_text().splitlines()
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
    rows = loadmat(file_in(root, table), squeeze_me=True)["annotations"].reshape(-1)
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

    labels = loadmat(file_in(root, "imagelabels.mat"))["labels"].reshape(-1)
    parts = loadmat(file_in(root, "setid.mat"))
    ids = [int(i) for part in spec[split] for i in parts[part].reshape(-1)]
    files = [root / "jpg" / f"image_{i:05d}.jpg" for i in ids]
    return _classified(root, files, [int(labels[i - 1]) - 1 for i in ids], [str(i + 1) for i in range(labels.max())])


def masks(root: Path, spec: dict, split: str):
    """Two folders: photos, and PNG masks of class numbers under the same names."""
    photos, labels = spec[split]
    expected = f"{photos}/NAME.jpg and {labels}/NAME.png"
    files, marked = pictures_in(folder_in(root, photos, expected)), folder_in(root, labels, expected)
    return dataset(root, {"image": files, "mask": [marked / f"{p.stem}.png" for p in files]}, expected)


def depth(root: Path, spec: dict, split: str):
    """SCENE/rgb_N.jpg with SCENE/sync_depth_N.png beside it, 16 bits, `unit` to the metre."""
    expected = "SCENE/rgb_N.jpg and SCENE/sync_depth_N.png"
    files = sorted(folder_in(root, spec[split], expected).rglob("rgb_*.jpg"))
    depths = [p.with_name(p.name.replace("rgb_", "sync_depth_")).with_suffix(".png") for p in files]
    return dataset(root, {"image": files, "depth": depths}, expected)


def labels_csv(root: Path, spec: dict, split: str):
    """A folder of photos and a table (file, class_index, wnid, name); no split."""
    with open(file_in(root, spec["file"]), newline="") as f:
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
    return dataset(root, {"image": files, "label": labels}, label=ClassLabel(names=classes))


LAYOUTS = formats.LAYOUTS | {f.__name__: f for f in (imagefolder, lists, cub, cars, flowers, masks, depth, labels_csv)}
