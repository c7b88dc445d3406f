"""Classification tasks for Tables 1, 4 and 6: images with labels of one or several kinds, for training and test.

    digits, scenes = load("digits scenes")              # or "caltech101-small", "food" … of data/datasets.yaml
    scenes.train, scenes.test                           # `Source`s: rows that any model can be fed from
    scenes.tasks[0].train                               # labels of the training images

Scenes carry many tasks on the same images, each asking for something else (see `SCENES`); none is named after a real
data set. Digits are the real ones of scikit-learn, 8 x 8 pixels, enlarged.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import tables_sets
import torch

from vitreg_lib.base import UserError, unknown
from vitreg_lib.data import scenes, sets
from vitreg_lib.data.images import preprocessing

LEFT_OUT = -1  # label of an image that takes no part in a task
WHOLE_FILES = 1 << 30  # bytes of pictures up to which `digest` reads every byte; beyond it their names and sizes


@dataclass
class Source:
    """Images to extract features from, made or read row by row when a model asks for them.

    title: as records name it. digest: sha256 of what the images are made of. rows: a `datasets.Dataset`, one row an
    image. pixels(batch of rows, model): (n, 3, size, size) in [0, 1] at the model's size.
    """

    title: str
    digest: str
    rows: object
    pixels: object

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Task:
    """Labels of the training and the test images: class numbers (n,), `LEFT_OUT` among them, or (n, classes) of 0, 1.

    name: its short name; about: what it asks for; metric: accuracy, mean per-class accuracy or mean average precision.
    paper: the column of the paper's Table 1 that has it, "" for none.
    """

    name: str
    about: str
    metric: str
    train: torch.Tensor
    test: torch.Tensor
    classes: int
    paper: str = ""


@dataclass
class Problem:
    """Images with the tasks that are asked of them."""

    name: str
    train: Source
    test: Source
    tasks: list[Task]

    @property
    def title(self) -> str:
        return f"{self.train.title} / {self.test.title}"


def load(names: str, n_train: int = 0, n_test: int = 0, seed: int = 0) -> list[Problem]:
    """The problems of these names: scenes, digits, or classification sets of `vitreg data`, separated by spaces.

    "scenes:kind,colour" takes some of the tasks on scenes alone.
    At most `n_train` and `n_test` images of each (0: all; 1000 and 500 scenes), drawn by `seed`. Raises UserError for
    an unknown name and for data that cannot be had.
    """
    own = {"scenes": _scenes, "digits": _digits}
    fitting = [n for n, e in sets.entries().items() if e["task"] in ("classification", "multilabel")]
    found = []
    for name, _, some in (text.partition(":") for text in names.split()):
        if name not in (*own, *fitting):
            raise unknown("classification set", name, [*own, *fitting], "See `vitreg data`.")
        problem = own.get(name, functools.partial(_registered, name))(n_train, n_test, seed)
        for task in some.split(",") if some else ():
            if task not in (known := [t.name for t in problem.tasks]):
                raise unknown(f"task of {name}", task, known)
        problem.tasks = [t for t in problem.tasks if not some or t.name in some.split(",")]
        found.append(problem)
    return found


def reachable(names: str, n_train: int = 0, n_test: int = 0, seed: int = 0) -> tuple[list[Problem], dict[str, str]]:
    """(problems that can be had here, {name of another: why not}). Raises UserError where none can."""
    found, missing = [], {}
    for name in names.split():
        try:
            found += load(name, n_train, n_test, seed)
        except UserError as error:
            missing[name] = str(error)
    if not found:
        raise UserError(next(iter(missing.values()), "no data set was named"))
    return found, missing


def _of_main(attribute: str):
    return lambda s: getattr(s, attribute)[:, 0]


def _kind(s: scenes.Scenes):
    return s.shape[:, 0] * len(scenes.TEXTURES) + s.texture[:, 0]


def _among(names: tuple[str, ...]):
    """Which of these shapes the main object has; images of other shapes are left out."""
    numbers = torch.full((len(scenes.SHAPES),), LEFT_OUT)
    numbers[[scenes.SHAPES.index(name) for name in names]] = torch.arange(len(names))
    return lambda s: numbers[s.shape[:, 0]]


def _count(s: scenes.Scenes):
    return s.visible.sum(1) - 1


def _size(s: scenes.Scenes):
    thirds = torch.tensor([0.24, 0.28])  # of the range of a main object's radius
    return torch.bucketize(s.radius[:, 0].contiguous(), thirds)


def _quarter(s: scenes.Scenes):
    x, y = (s.place[:, 0] > 0.5).long().unbind(1)
    return 2 * y + x


def _relation(s: scenes.Scenes):
    """Where the main object is, seen from the next visible one: left, right, above, below; lone ones are left out."""
    others = s.visible[:, 1:]
    next_one = s.place[torch.arange(len(s)), others.long().argmax(1) + 1]
    dx, dy = (s.place[:, 0] - next_one).unbind(1)
    side = torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())
    return torch.where(others.any(1), side, LEFT_OUT)


def _present(attribute: str, classes: int):
    def labels(s):
        one_hot = torch.nn.functional.one_hot(getattr(s, attribute), classes) * s.visible[..., None]
        return one_hot.amax(1)

    return labels


SCENES = {  # name: (what is asked, classes, labels from the ground truth)
    "shape": ("object class: shape of the main object", 8, _of_main("shape")),
    "kind": ("fine-grained: shape and texture together", 32, _kind),
    "round": ("fine-grained shape: disc, ring or moon", 3, _among(("disc", "ring", "moon"))),
    "colour": ("colour of the main object", 8, _of_main("colour")),
    "texture": ("texture of the main object", 4, _of_main("texture")),
    "background": ("type of background", 4, lambda s: s.background),
    "count": ("how many objects can be seen", 5, _count),
    "size": ("size of the main object, in thirds", 3, _size),
    "place": ("quarter of the image with the main object's centre", 4, _quarter),
    "relation": ("main object left, right, above or below of the next", 4, _relation),
    "shapes": ("which shapes are present", 8, _present("shape", 8)),
    "colours": ("which colours are present", 8, _present("colour", 8)),
}


def _scenes(n_train: int, n_test: int, seed: int) -> Problem:
    from datasets import Dataset

    renderer = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()  # another renderer, other images
    parts, truth = [], []
    for name, n, first in (
        ("train", n_train or 1000, scenes.HELD_OUT + (1 << 30) + 2 * seed * 1_000_000),
        ("test", n_test or 500, scenes.HELD_OUT + (1 << 30) + (2 * seed + 1) * 1_000_000),
    ):
        index = range(first, first + n)
        digest = hashlib.sha256(f"scenes {renderer} {first} {n}".encode()).hexdigest()
        rows = Dataset.from_dict({"index": list(index)})
        parts.append(Source(f"scenes, {name} {n} images", digest, rows, _render))
        truth.append(scenes.render(index, 64))  # labels hardly depend on the size; 64 pixels are quick
    found = []
    for name, (about, classes, of) in SCENES.items():
        metric = "mean average precision" if name in ("shapes", "colours") else "accuracy"
        found.append(Task(name, about, metric, *map(of, truth), classes))
    return Problem("scenes", *parts, found)


def _render(batch: dict, model) -> torch.Tensor:
    return scenes.render(torch.as_tensor(batch["index"]), model.input_size).pixels


def _digits(n_train: int, n_test: int, seed: int) -> Problem:
    from datasets import Dataset
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    n_test = min(n_test or 600, len(order) // 3)
    rows = {"train": order[n_test:][: n_train or None], "test": order[:n_test]}
    parts, labels = [], []
    for name, index in rows.items():
        pixels = torch.tensor(found.images[index], dtype=torch.uint8).flatten(1)  # 0 to 16
        data = Dataset.from_dict({"pixels": pixels.tolist()})
        digest = hashlib.sha256(f"digits {len(index)}".encode() + pixels.numpy().tobytes()).hexdigest()
        parts.append(
            Source(f"digits of scikit-learn (8 x 8, enlarged), {name} {len(index)} images", digest, data, _enlarge)
        )
        labels.append(torch.tensor(found.target[index]))
    return Problem("digits", *parts, [Task("digits", "handwritten digit", "accuracy", *labels, 10)])


def _enlarge(batch: dict, model) -> torch.Tensor:
    small = torch.as_tensor(batch["pixels"]).view(-1, 1, 8, 8).float() / 16
    size = (model.input_size, model.input_size)
    return torch.nn.functional.interpolate(small, size, mode="bilinear").expand(-1, 3, -1, -1)


def _registered(name: str, n_train: int, n_test: int, seed: int) -> Problem:
    parts, labels = [], []
    for split, n in (("train", n_train), ("test", n_test)):
        part = tables_sets.load(name, split)
        rows = sets.chosen(part, n or None, seed)
        data = part.data if len(rows) == len(part) else part.data.select(rows)
        column = "labels" if part.entry["task"] == "multilabel" else "label"
        labels.append(torch.tensor(data[column][:]).long())
        taken = part.title if len(rows) == len(part) else f"{part.title}, {len(rows)} taken"
        parts.append(Source(taken, digest(data), sets.undecoded(data.select_columns(["image"])), _read))
    known = sets.entry(name)
    task = Task(name, known["title"], known["metric"], *labels, known["classes"], known.get("paper", ""))
    return Problem(name, *parts, [task])


def _read(batch: dict, model) -> torch.Tensor:
    transform = preprocessing(model, model.input_size)
    return torch.stack([transform(sets.read_stored(image)) for image in batch["image"]])


def digest(data) -> str:
    """sha256 of the pictures of a Dataset: of their bytes, or of names and sizes where they are more than 1 GiB."""
    stored = sets.undecoded(data)["image"]
    found = hashlib.sha256()
    sizes = [len(row["bytes"]) if row["bytes"] else Path(row["path"]).stat().st_size for row in stored]
    whole = sum(sizes) <= WHOLE_FILES
    for row, size in zip(stored, sizes, strict=True):
        if whole:
            found.update(row["bytes"] or Path(row["path"]).read_bytes())
        else:
            found.update(f"{Path(row['path'] or '').name} {size} ".encode())
    return found.hexdigest()
