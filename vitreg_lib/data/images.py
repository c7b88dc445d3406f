"""Images prepared for a model: procedural ones, photos that ship with other packages, a folder of the user's own.

`load` gives a whole set as `Images`, `stream` the same set batch by batch. Photos go through the model's own
preprocessing: resize with its interpolation, centre crop, mean and standard deviation. `read` is the one place where a
picture file is opened.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..base import UserError, env_folder
from . import scenes, stamps, textures

SUFFIXES = set(".jpg .jpeg .png .bmp .webp .tif .tiff .gif .heic .heif .avif".split())
_PHOTOS = {  # photos in colour that come with the installed packages
    "skimage": "astronaut.png chelsea.png coffee.png rocket.jpg motorcycle_left.png retina.jpg hubble_deep_field.jpg "
    "ihc.png",
    "sklearn": "china.jpg flower.jpg",
}


@dataclass
class Images:
    """n images as one model sees them.

    x: (n, 3, height, width) normalised. pixels: the same before normalisation, in [0, 1], for display.
    names: one per image. source: what they are, as records name it. scenes: the ground truth, or None for photos.
    left_out: {file name: why it could not be read}; in a stream, of all batches so far. paths: of photos, one each.
    """

    x: torch.Tensor
    pixels: torch.Tensor
    names: list[str]
    source: str
    scenes: scenes.Scenes | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def at(self, rows: Iterable[int]) -> Images:
        """The images of these rows."""
        rows = list(rows)
        of = self.scenes and replace(self.scenes, **{k: value[rows] for k, value in vars(self.scenes).items()})
        names, paths = [self.names[i] for i in rows], [self.paths[i] for i in rows if self.paths]
        return replace(self, x=self.x[rows], pixels=self.pixels[rows], names=names, scenes=of, paths=paths)


def load(source: str, model, n: int, seed: int = 0) -> Images:
    """`n` images of `source` for a `zoo.Model`, at its own input size.

    source: "scenes"; "stamps" and "textures" (what `mini-stamps` and `mini-corners` learn from); "photos" (those that
    ship with scikit-image and scikit-learn); "imagenet" (a folder of that name in VITREG_DATA, or in data/ of
    VITREG_MODELS); or the path of an image or of a folder, searched below. Where a folder holds more than n images,
    `seed` draws among them; the same seed gives the same images for every model. An image that cannot be read is named
    in a warning and in `left_out`. Raises UserError when a source does not exist or holds no readable image.
    """
    return next(stream(source, model, n, seed, batch_size=max(n, 1)))


def stream(source: str, model, n: int, seed: int = 0, batch_size: int = 64, first: int = 0) -> Iterator[Images]:
    """The images of `load` as an iterator of `Images` with at most `batch_size` each: memory does not grow with `n`.

    first: leave out the images that `load` gives for n = first.
    """
    size, left_out, any_read = model.input_size, {}, False
    if source in ONE_SIZE and size != ONE_SIZE[source][0]:
        pixels, made_for = ONE_SIZE[source]
        raise UserError(f"{source} have {pixels} pixels a side, this model wants {size}; try {made_for}")
    if source in PROCEDURAL:
        for start in range(first, n, batch_size):
            yield PROCEDURAL[source](model, range(start, min(start + batch_size, n)), n, seed, size)
        return
    paths, title = find(source)
    chosen = paths[first:n]
    if source != "photos":
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [paths[i] for i in sorted(order[first:n])]
    for start in range(0, len(chosen), batch_size):
        pixels, read_paths = _read(chosen[start : start + batch_size], preprocessing(model, size), size, left_out)
        if read_paths:
            any_read, names = True, [path.stem for path in read_paths]
            about = f"{title}, {len(names)} of {len(paths)} images"
            yield Images(model.normalise(pixels), pixels, names, about, None, left_out, read_paths)
    if not any_read and not first:
        raise UserError(f"none of the {len(chosen)} images in {source} could be read")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an input size."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _scenes(model, rows: range, n: int, seed: int, size: int) -> Images:
    if not isinstance(size, int):
        raise UserError(f"scenes are square, this model wants {size[0]} x {size[1]} pixels; try images photos")
    if not 64 <= size <= 224:
        raise UserError(f"scenes have 64 to 224 pixels a side, this model wants {size}; try images textures")
    first = scenes.HELD_OUT + seed * 100_000
    batch = scenes.render(range(first + rows.start, first + rows.stop), size)
    names = [f"scene {i}" for i in rows]
    return Images(model.normalise(batch.pixels), batch.pixels, names, f"scenes, {n} held-out images", batch)


def _textures(model, rows: range, n: int, seed: int, size: int) -> Images:
    """Held-out images of the recipe `emergence`: normal numbers, which the model sees without normalisation."""
    draw = 64
    first, parts = textures.TO_LOOK_AT + 1000 * seed, range(rows.start // draw, -(-rows.stop // draw))
    x = torch.cat([textures.held_out(draw, first + i) for i in parts])
    x = x[rows.start - parts.start * draw :][: len(rows)]
    names = [f"textures {i}" for i in rows]
    return Images(x, (x / 6 + 0.5).clamp(0, 1), names, f"textures, {n} held-out images")


def _stamps(model, rows: range, n: int, seed: int, size: int) -> Images:
    """Held-out scenes with stamps and dots, as the recipe gives them: from -1 to 1, without normalisation."""
    plain = _scenes(model, rows, n, seed, size).scenes
    draws = [torch.Generator().manual_seed(1000 * seed + i) for i in rows]
    x = torch.cat([stamps.stamp(p[None], draw)[0] for p, draw in zip(plain.pixels, draws, strict=True)])
    names = [f"stamped scene {i}" for i in rows]
    return Images(x, (x / 2 + 0.5).clamp(0, 1), names, f"stamps, {n} held-out images", plain)


PROCEDURAL = {"scenes": _scenes, "stamps": _stamps, "textures": _textures}
# those that come in one size: (pixels a side, the model that learns from them)
ONE_SIZE = {"stamps": (stamps.SIDE, "mini-stamps"), "textures": (textures.GRID * textures.PATCH, "mini-corners")}


def labels(images: Images, folders: bool = False) -> torch.Tensor | None:
    """(n,) class of each image: a scene's shape, or from labels.csv (file, class_index) of its folder; None without.

    folders: where there is no labels.csv, the name of the folder that holds a photo is its class, numbered by the names
    of all folders beside it, as torchvision's ImageFolder does; None where one folder holds all photos.
    """
    if images.scenes is not None:
        return images.scenes.label
    if file := _label_file(images):
        with open(file, newline="") as f:
            classes = {Path(row["file"]).with_suffix(""): int(row["class_index"]) for row in csv.DictReader(f)}
        stems = {path.name: label for path, label in classes.items()}
        stems = stems if len(stems) == len(classes) else {}  # else only the folder tells files apart
        inside = [path.relative_to(file.parent).with_suffix("") for path in images.paths]
        found = [classes.get(path, stems.get(path.name)) for path in inside]
        return None if None in found else torch.tensor(found)
    several = folders and len({path.parent for path in images.paths}) > 1
    named = _class_folders(images) if several else []
    return torch.tensor([named.index(path.parent.name) for path in images.paths]) if len(named) > 1 else None


def labels_fit(images: Images, classes: int) -> bool:
    """Whether `labels` number the classes of a head of so many: labels.csv does, folders where they are as many."""
    return _label_file(images) is not None or len(_class_folders(images)) == classes


def _label_file(images: Images) -> Path | None:
    folders = images.paths[0].parents[:2] if images.paths else ()
    return next((folder / "labels.csv" for folder in folders if (folder / "labels.csv").exists()), None)


def _class_folders(images: Images) -> list[str]:
    """Names of the folders beside those that hold the photos; none where these lie in several places."""
    places = {path.parents[1] for path in images.paths}
    return sorted(path.name for path in places.pop().iterdir() if path.is_dir()) if len(places) == 1 else []


def number(source: str, n: int) -> int:
    """How many images `stream` gives for n, those that cannot be read included."""
    return n if source in PROCEDURAL else min(n, len(find(source)[0]))


def counted(source: str, n: int) -> str:
    """A source with the number of its images for n, as "scenes (64)"."""
    return f"{source if source in PROCEDURAL else find(source)[1]} ({number(source, n)})"


def find(source: str) -> tuple[list[Path], str]:
    """The image files of a source, sorted, and what to call it."""
    if source == "photos":
        return _photos(), "photos shipped with scikit-image and scikit-learn"
    folder = named = named_folder(source) or Path(source).expanduser()
    if named_folder(source) and (named / "images").is_dir():  # beside it lie boxes and masks
        folder = named / "images"
    if folder.is_file():
        return [folder], folder.name
    if not folder.is_dir():
        raise UserError(
            f"no images at {source!r}: write {', '.join(PROCEDURAL)}, photos, or the path of an image or of a folder"
            + (" (imagenet: put such a folder into one named by VITREG_DATA)" if source == "imagenet" else "")
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"the folder {source!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    return paths, named.name


def named_folder(name: str) -> Path | None:
    """The folder of a data set on this machine: VITREG_DATA/name, or data/name of VITREG_MODELS; None without one."""
    models = env_folder("VITREG_MODELS")
    folders = [env_folder("VITREG_DATA"), models and models / "data"]
    return next((folder / name for folder in folders if folder and (folder / name).is_dir()), None)


def _photos() -> list[Path]:
    import skimage
    import sklearn

    folders = {"skimage": Path(skimage.__file__).parent / "data"}
    folders["sklearn"] = Path(sklearn.__file__).parent / "datasets/images"
    paths = [folders[package] / name for package, names in _PHOTOS.items() for name in names.split()]
    return [path for path in paths if path.exists()]


def _read(paths: list[Path], transform, size, left_out: dict[str, str]) -> tuple[torch.Tensor, list[Path]]:
    """(pixels (n, 3, height, width), paths) of files that can be read; `left_out` gets the others with the reason."""
    pixels, read_paths = torch.empty(len(paths), 3, *sides(size)), []
    for path in paths:
        try:
            pixels[len(read_paths)] = transform(read(path))
        except UserError as error:
            left_out[path.name] = str(error)
            warnings.warn(f"{path.name} cannot be read and is left out: {error}", stacklevel=4)
            continue
        read_paths.append(path)
    return pixels[: len(read_paths)], read_paths


def read(file):
    """The PIL image in a file (a path or a binary file) as `upright_rgb`; of an animation the first frame.

    Raises UserError with the reason for what cannot be read: a damaged or empty file, no picture, a format that Pillow
    does not know here (HEIC needs the package pillow-heif), more pixels than Pillow's limit.
    """
    from PIL import Image

    if "HEIF" not in Image.OPEN:
        try:
            import pillow_heif

            pillow_heif.register_heif_opener()
        except ImportError:
            pass  # such files are refused below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return upright_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError(str(error) or type(error).__name__) from error


def upright_rgb(image):
    """A PIL image of any mode in RGB with 8 bits a channel, turned as its EXIF data says, what is clear on white.

    Grey values of 16 bits keep their upper 8. Those of 32 bits or floating point span 0 to the least of 1 (floating
    point alone), 255, 65,535 and 2^31 - 1 that holds them all. Raises ValueError for negative or infinite values.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (0 <= low <= high < np.inf):  # also NaN
        raise ValueError(f"its grey values go from {low:g} to {high:g}; from 0 on are expected")
    tops = {"u": (2**16 - 1,), "i": (255, 2**16 - 1, 2**31 - 1), "f": (1, 255, 2**16 - 1, 2**31 - 1)}
    top = next((top for top in tops[values.dtype.kind] if high <= top), high)
    if values.dtype.kind == "f":
        return np.round(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    return (values.astype(np.int64) * 256 // (top + 1)).astype(np.uint8)


def preprocessing(model, size: int | tuple[int, int]):
    """A transform from a PIL image to pixels (3, height, width) in [0, 1]: timm's evaluation, not normalised."""
    from timm.data import create_transform

    zero, one = (0.0,) * 3, (1.0,) * 3
    crop = dict(crop_pct=model.crop, crop_mode=model.crop_mode)
    return create_transform((3, *sides(size)), interpolation=model.interpolation, mean=zero, std=one, **crop)
