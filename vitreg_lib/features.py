"""Features, extracted once and kept as Arrow on disk: what Tables 1, 4 and 6 and Fig. 5 classify and probe.

Each extraction has a fingerprint, the sha256 of all that it follows from: the model's sha256 and preprocessing, the
digest of the images, the options, and the source of the code that computes it. The same fingerprint is computed once,
by `datasets.map`, into VITREG_CACHE (by default results/cache); a record that names it can be traced to model and data.

A cache is used only with its description beside it (FINGERPRINT.json: rows, bytes, and where it came from), which is
written last: what was killed, truncated or filled up a disk has none, or another size, and is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import outliers
from .capture import SITES, WHOLE, Capture
from .paths import results, write_atomically

GROUPS = ("normal", "outlier", "matched")
CALIBRATION = 256  # images by whose norms a model's cutoff is chosen


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


def cache() -> Path:
    """Where features are kept: VITREG_CACHE, else cache/ of the results."""
    return Path(os.environ.get("VITREG_CACHE") or results() / "cache")


def classification_tokens(
    model, source, cutoff: float, draws: int = 5, seed: int = 0, places: Features | None = None, progress: bool = False
) -> Features:
    """Tokens after the final LayerNorm for probes of the whole image: cls, registers, and drawn patch tokens.

    Columns, for each image: cls (dim); mean (dim) of the patches; registers (registers, dim); norms (patches) before
    the final LayerNorm; is_outlier (patches): norms above `cutoff`, or those of `places`, the features of another model
    on the same images whose places are borrowed; and for each of `GROUPS` `draws` tokens (draws, dim) drawn at random
    with replacement among its members by (seed, row): normal ones, outliers, and `local.matched_normal` partners of
    outliers. Where a group has no member the tokens are zero and `has_GROUP` is False. A planted control also has
    `planted` (7), the part of cls that its outliers were made to carry.
    """
    from .data.scenes import uniform
    from .models import planted
    from .probes.local import matched_normal

    if places is not None and len(places) != len(source):
        raise ValueError(f"places of {len(places)} images do not fit {len(source)} images")
    depth = model.anatomy.depth
    about = described(model, source.digest, len(source)) | {
        "kind": "classification tokens",
        "cutoff": cutoff,
        "draws": draws,
        "seed": seed,
        "places": places.fingerprint if places else "own",
    }

    def extract(batch, rows):
        x = model.normalise(source.pixels(batch, model))
        before = [model.onset - 1] if model.onset else []
        keep = ("norms", "final", "tokens") if before else ("norms", "final")
        seen = model.capture(x, keep, layers=[*before, depth - 1])
        tokens, norms = seen.final.float(), seen.patch_norms[:, -1]
        patches = seen.patches(tokens)
        mask = norms > cutoff if places is None else places.column("is_outlier", rows)
        if mask.shape != norms.shape:
            raise ValueError(f"places on {mask.shape[1]} patches do not fit the {norms.shape[1]} of {model.name}")
        partners = matched_normal(mask.unflatten(1, seen.grid)).flatten(1)
        first = int(seen.has_cls)
        cls = tokens[:, 0] if seen.has_cls else patches.mean(1)  # the mean stands in where there is no cls
        found = {"cls": cls, "mean": patches.mean(1), "norms": norms, "is_outlier": mask}
        if before:
            found["planted"] = planted.content(model, seen.tokens[before[0]][:, 0])
        if seen.num_registers:
            found["registers"] = tokens[:, first : seen.num_prefix_tokens]
        u = uniform(rows, len(GROUPS) * draws, seed).double().view(len(rows), len(GROUPS), draws)
        for number, (name, members) in enumerate(zip(GROUPS, (~mask, mask, partners), strict=True)):
            place = _drawn(members, u[:, number])
            drawn = patches.gather(1, place[..., None].expand(-1, -1, patches.shape[-1]))
            found[f"has_{name}"] = members.any(1)
            found[name] = drawn * members.any(1)[:, None, None]
        return found

    return mapped(source.rows, extract, about, progress)


def cutoff_of(model, source, progress: bool = False) -> float:
    """The model's outlier cutoff at its output by the default rule, on the first images of a source."""
    depth, n = model.anatomy.depth, min(CALIBRATION, len(source))

    def extract(batch, rows):
        x = model.normalise(source.pixels(batch, model))
        return {"norms": model.capture(x, "norms", layers=[depth - 1]).patch_norms[:, -1]}

    about = described(model, source.digest, n) | {"kind": "norms at the output"}
    return outliers.cutoff(mapped(source.rows.select(range(n)), extract, about, progress).column("norms"))


def captured(model, images, keep=("norms",), layers=None, progress: bool = False) -> Capture:
    """`model.capture` of an `Images` set, kept on disk: the same `Capture`, for sites without queries."""
    from datasets import Dataset

    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    known = [site for site in SITES if site != "attention"]
    if bad := [site for site in keep if site not in known]:
        raise ValueError(f"site {bad[0]!r} is not kept on disk; known are {', '.join(known)}")
    layers = model.anatomy.layers(layers)
    digest = hashlib.sha256(images.x.contiguous().numpy().tobytes()).hexdigest()
    about = described(model, digest, len(images)) | {"kind": "capture", "keep": sorted(keep), "layers": list(layers)}

    def extract(batch, rows):
        seen = model.capture(images.x[rows], keep, layers=layers)
        found = {site: getattr(seen, site).float() for site in keep if site in WHOLE}
        return found | {f"{s}.{i}": getattr(seen, s)[i].float() for s in keep if s not in WHOLE for i in layers}

    features = mapped(Dataset.from_dict({"row": list(range(len(images)))}), extract, about, progress)
    anatomy = model.anatomy
    seen = Capture(layers, anatomy.grid(images.x), anatomy.has_cls, anatomy.num_registers)
    for site in keep:
        whole = site in WHOLE
        setattr(seen, site, features.column(site) if whole else {i: features.column(f"{site}.{i}") for i in layers})
    return seen


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
    from datasets import Dataset

    fingerprint, folder = _fingerprint(about), cache()
    path, beside = folder / f"{fingerprint}.arrow", folder / f"{fingerprint}.json"
    shapes: dict[str, list[int]] = {}

    def flat(batch, numbers):
        found = extract(batch, torch.tensor(numbers))
        shapes.update({name: list(value.shape[1:]) for name, value in found.items()})
        return {name: value.reshape(len(value), -1).cpu().numpy() for name, value in found.items()}

    if not _is_whole(path, beside, len(rows)):
        folder.mkdir(parents=True, exist_ok=True)
        with _bars(progress):
            rows.map(
                flat,
                with_indices=True,
                batched=True,
                batch_size=32,
                remove_columns=rows.column_names,
                cache_file_name=str(path),
                load_from_cache_file=False,
                new_fingerprint=fingerprint,
                desc=f"features of {about['model']}",
            )
        size = path.stat().st_size
        description = {"fingerprint": fingerprint, "rows": len(rows), "bytes": size, "shapes": shapes, "about": about}
        write_atomically(beside, json.dumps(description, indent=1).encode())
    stored = json.loads(beside.read_text())["shapes"]
    return Features(Dataset.from_file(str(path)), fingerprint, about, {k: tuple(v) for k, v in stored.items()})


def remembered(about: dict, compute):
    """What `compute()` gives (anything that JSON holds), kept under the fingerprint of `about`."""
    path = cache() / f"{_fingerprint(about)}.result.json"
    try:
        told = json.loads(path.read_text())
        if told["about"] == json.loads(json.dumps(about)):
            return told["result"]
    except (OSError, ValueError, KeyError):
        pass  # not there, or damaged: computed below
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"about": about, "result": result}).encode())
    return json.loads(json.dumps(result))


def _fingerprint(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _is_whole(path: Path, beside: Path, rows: int) -> bool:
    """Whether a cache has its description and is as long as that says."""
    try:
        told = json.loads(beside.read_text())
        return told["rows"] == rows and told["bytes"] == path.stat().st_size
    except (OSError, ValueError, KeyError):
        return False


def _drawn(members: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(images, draws) positions of members (images, patches), picked by u (images, draws) in [0, 1); 0 without any."""
    rank = members.long().cumsum(1)  # the k-th member is the first place whose rank is k
    count = rank[:, -1:]
    wanted = (u * count).long().clamp(max=(count - 1).clamp_min(0)) + 1
    return torch.searchsorted(rank, wanted).clamp_max(members.shape[1] - 1)


def _code() -> str:
    """sha256 of the modules that compute features: another version computes its own."""
    from . import anatomy, capture
    from .probes import local

    return source_sha256(__file__, anatomy.__file__, capture.__file__, local.__file__)


def source_sha256(*files: str) -> str:
    """sha256 of source files, by which a result of older code is told from one of this."""
    found = hashlib.sha256()
    for path in files:
        found.update(Path(path).read_bytes())
    return found.hexdigest()


@contextmanager
def _bars(on: bool):
    """`datasets`' progress bars on or off for a while."""
    from datasets.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if on else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
