"""Features extracted once and kept on disk as Arrow, for the probes of Tables 1, 4 and 6 and of Fig. 5.

Each extraction has a fingerprint, the sha256 of everything it depends on: the model's sha256 and preprocessing, the
digest of the images, the options, and the source of the code that computes it. `datasets.map` computes it once, into
VITREG_CACHE (by default results/cache); a record that names the fingerprint can be traced to model and data.

A file is used only with its description beside it (FINGERPRINT.json: rows, sha256, what it depends on), which is
written last. A file that was truncated or damaged, or whose computation was killed, is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from datasets.utils import logging

from vitreg_lib.base import cache, fingerprint, write_atomically
from vitreg_lib.hooks import anatomy, capture
from vitreg_lib.hooks.capture import SITES, WHOLE, Capture
from vitreg_lib.probes import local

BATCH = 32  # images at a time


@dataclass
class Features:
    """Tokens of one model on one source, on disk, read when asked for.

    data: a `datasets.Dataset`, one row an image. fingerprint and about: where they come from. shapes: of one row.
    """

    data: object
    fingerprint: str
    about: dict
    shapes: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.data)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def column(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(images, *shape) of a column: all, or those of `rows` (images,) in their order, read from the file."""
        table = self.data if rows is None else self.data.select(rows.tolist())
        stored = table.with_format("arrow")[:][name].combine_chunks()
        values = torch.from_numpy(stored.flatten().to_numpy(zero_copy_only=False).copy())
        return values.view(len(table), *self.shapes[name])


def captured(model, images, keep=("norms",), layers=None, progress: bool = False) -> Capture:
    """`model.capture` of an `Images` set, kept on disk: the same `Capture`, for sites without queries."""
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    sites = [site for site in SITES if site != "attention"]
    if bad := [site for site in keep if site not in sites]:
        raise ValueError(f"site {bad[0]!r} is not kept on disk; known are {', '.join(sites)}")
    layers = model.anatomy.layers(layers)
    digest = hashlib.sha256(images.x.contiguous().numpy().tobytes()).hexdigest()
    about = described(model, digest, len(images)) | {"kind": "capture", "keep": sorted(keep), "layers": list(layers)}

    def extract(_, rows):
        batch = model.capture(images.x[rows], keep, layers=layers)
        whole = {site: getattr(batch, site).float() for site in keep if site in WHOLE}
        return whole | {f"{s}.{i}": getattr(batch, s)[i].float() for s in keep if s not in WHOLE for i in layers}

    features = mapped(Dataset.from_dict({"row": list(range(len(images)))}), extract, about, progress)
    anatomy = model.anatomy
    result = Capture(layers, anatomy.grid(images.x), anatomy.prefix)
    for site in keep:
        whole = site in WHOLE
        setattr(result, site, features.column(site) if whole else {i: features.column(f"{site}.{i}") for i in layers})
    return result


def described(model, digest: str, images: int) -> dict:
    """What features of a model on images follow from, as their description and fingerprint state it."""
    preprocessing = [model.input_size, model.mean, model.std, model.interpolation, model.crop, model.crop_mode]
    return {
        "model": model.name,
        "model_sha256": model.sha256,
        "preprocessing": [list(p) if isinstance(p, tuple) else p for p in preprocessing],
        "images": images,
        "images_sha256": digest,
        "code": _code(),
    }


def mapped(rows, extract, about: dict, progress: bool = False) -> Features:
    """The `Features` described by `about`: read from the cache, or extracted batch by batch by `datasets.map`.

    extract(batch of columns, row numbers (batch,)) gives {name: (batch, …)} of float32 or bool.
    """
    key, folder = fingerprint(about), cache()
    path, beside = folder / f"{key}.arrow", folder / f"{key}.json"
    shapes: dict[str, list[int]] = {}

    def flat(batch, numbers):
        columns = extract(batch, torch.tensor(numbers))
        shapes.update({name: list(value.shape[1:]) for name, value in columns.items()})
        return {name: value.reshape(len(value), -1).cpu().numpy() for name, value in columns.items()}

    if not _is_whole(path, beside, len(rows)):
        folder.mkdir(parents=True, exist_ok=True)
        with _bars(progress):
            rows.map(
                flat,
                with_indices=True,
                batched=True,
                batch_size=BATCH,
                remove_columns=rows.column_names,
                cache_file_name=str(path),
                load_from_cache_file=False,
                new_fingerprint=key,
                desc=f"features of {about['model']}",
            )
        description = {"rows": len(rows), "sha256": _file_sha256(path), "shapes": shapes, "about": about}
        write_atomically(beside, json.dumps(description, indent=1).encode())
    stored = json.loads(beside.read_text())["shapes"]
    return Features(Dataset.from_file(str(path)), key, about, {k: tuple(v) for k, v in stored.items()})


def _is_whole(path: Path, beside: Path, rows: int) -> bool:
    """Whether a cache has its description and the content that it names."""
    try:
        description = json.loads(beside.read_text())
        return description["rows"] == rows and description["sha256"] == _file_sha256(path)
    except (OSError, ValueError, KeyError):
        return False


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code() -> str:
    """sha256 of the modules that compute features: another version computes its own."""
    return source_sha256(__file__, anatomy.__file__, capture.__file__, local.__file__)


def source_sha256(*files: str) -> str:
    """sha256 of source files: a result computed by other code has another fingerprint."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in files)).hexdigest()


@contextmanager
def _bars(on: bool):
    """`datasets`' progress bars on or off for a while."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if on else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
