"""`vitreg measure MODEL`: measure a model and write the file that `model.measured` reads."""

import dataclasses
import datetime
import json
from pathlib import Path

from safetensors.torch import save_file

from ..base import commit, written
from ..measure import detection, maps
from ..model.measured import SIZES, thumbnails
from ..model.model import Model
from ..model.weights import file_sha256


def measure(model: Model, images, last: bool = False) -> dict:
    """The tensors of a file, for an `Images` set. last: attention of the last block alone."""
    observed = detection.observe(model, images)
    blocks = list(observed.by_patches)[-1 if last else 0 :]
    seen = model.capture(images, ("attention", "tokens", "final"), layers=blocks, queries=queries(model, images))
    tensors = {"norms": observed.seen.norms, "thumbnails": thumbnails(images.x)}
    before, after = (seen.patches(tokens) for tokens in (seen.tokens[blocks[-1]], seen.final))
    options = dict(clip=None, grid=seen.grid)
    each = maps.principal_components(before, 3, per_image=True, **options)
    tensors["components"] = each.unflatten(1, seen.grid)
    for name, tokens in (("component", before), ("component_after", after)):
        tensors[name] = maps.principal_components(tokens, 1, **options)[..., 0].unflatten(1, seen.grid)
    tensors |= {f"by_patches.{i}": observed.by_patches[i] for i in blocks}
    return tensors | {f"attention.{i}": at for i, at in seen.attention.items()}


def queries(model: Model, images) -> list[int]:
    """The tokens whose attention is kept: the prefix tokens and the patch at the centre."""
    rows, cols = model.anatomy.grid(images.x)
    prefix = model.anatomy.num_prefix_tokens
    return [*range(prefix), prefix + rows // 2 * cols + cols // 2]


def write(model: Model, images, tensors: dict, path: Path, command: str, **more) -> Path:
    """Write a file of measurements in half precision with its metadata, including `more`; return its path."""
    tensors = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    anatomy = model.anatomy
    facts = {f.name: getattr(model, f.name) for f in dataclasses.fields(Model) if f.name != "module"}
    sizes = {name: getattr(anatomy, name) for name in ("prefix", "depth", "patch_size", *SIZES)}
    source = images.source.split(",")[0]
    photos = {path.stem: file_sha256(path) for path in images.paths}
    metadata = dict(model=facts, anatomy=sizes, source=source, size=images.x.shape[-1], photos=photos)
    metadata |= dict(command=command, commit=commit(), date=datetime.date.today().isoformat()) | more
    metadata["queries"] = queries(model, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})
    return path
