"""Measurements of real models in files, which the default figures show where the weights are missing.

    vitreg measure deit-ti                      # `measure` and `write` make data/measured/deit-ti.safetensors
    model = vr.measured.load("deit-ti")         # a `Replayed` model: it answers for the measured photos, from the file
    model.capture(photos, "norms")              # a `Capture`, as of the model itself, to half precision

A file holds, in half precision, for n photos (named as in `Capture` where it has them):

    norms                (n, layers, tokens)              attention.L          (n, heads, queries, tokens)
    by_patches.L         (n, patches)                     thumbnails           (n, 3, 8, 8), which identify the photos
    components           (n, rows, cols, 3), of each photo; component, component_after (n, rows, cols), of all photos

L is each block of the last third, or the last block alone; queries are the prefix tokens and the patch at the centre.
Components are the first principal components of the patch tokens after the last block, whitened, before the final
LayerNorm or after it. workflow/measured.py adds further tensors, which notebooks read by `Replayed.kept`. The metadata
name the model, photos (by sha256), command, commit and date. A file holds no photo.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..base import DATA, UserError, commit, unknown
from ..data.images import sides
from ..hooks.anatomy import Anatomy
from ..hooks.capture import Capture
from ..measure import detection, maps
from . import names as model_names
from . import zoo
from .model import Model, with_facts
from .weights import file_sha256, read_safetensors, write_safetensors

FOLDER = DATA / "measured"
SIZES = ("prefix", "depth", "patch_size", "embed_dim", "num_heads", "head_dim", "channels")  # kept of `Anatomy`
SAME = 0.02  # largest difference of thumbnails' values of the same photo


def names() -> list[str]:
    """Labels of the models with a file in data/measured."""
    return sorted(path.name.removesuffix(".safetensors") for path in FOLDER.glob("*.safetensors"))


def load(name: str) -> Replayed:
    """The replayed model of a label in data/measured, or of a file's path. Raises UserError for a missing file."""
    path = Path(name) if name.endswith(".safetensors") else FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise unknown("measured model", name, names(), "`vitreg measure MODEL` writes such a file.")
    metadata, tensors = read_safetensors(path)
    about = {key: json.loads(value) for key, value in metadata.items()}
    facts = about["model"]
    module = _NoWeights(facts["label"])
    replayed = Replayed(facts["name"], module, facts["sha256"], tensors=tensors, measured=about)
    return with_facts(replayed, facts, which=tuple(facts))


def live_or_replayed(name: str) -> Model:
    """The model of that name if its weights are on this machine, else the replayed model.

    A name without measurements is loaded by `zoo.load`, from the hub if needed.
    """
    base, _, _ = model_names.split(name)
    here = base in model_names.entries() and model_names.available(base) != "not here"
    return load(name) if name in names() and not here else zoo.load(name)


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
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    anatomy = model.anatomy
    facts = {f.name: getattr(model, f.name) for f in dataclasses.fields(Model) if f.name != "module"}
    sizes = {name: getattr(anatomy, name) for name in SIZES}
    source = images.source.split(",")[0]
    photos = {path.stem: file_sha256(path) for path in images.paths}
    metadata = dict(model=facts, anatomy=sizes, source=source, size=images.x.shape[-2:], photos=photos)
    metadata |= dict(command=command, commit=commit(), date=datetime.date.today().isoformat()) | more
    metadata["queries"] = queries(model, images)
    write_safetensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})
    return path


@dataclass
class Replayed(Model):
    """A model without weights, whose methods read a file of measurements. `measured`: the file's metadata."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    measured: dict = field(default_factory=dict, repr=False)
    replayed = True

    @property
    def anatomy(self) -> Anatomy:
        """Sizes of the measured model; the parts are empty modules."""
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in self.measured["anatomy"].items()}
        parts = tuple(nn.Identity() for _ in range(sizes.pop("depth")))
        named = dict(blocks=parts, attention=parts, mlp_out=parts, patch_embed=nn.Identity(), norm=nn.Identity())
        return Anatomy(**named, **sizes, forward=self.module)

    @property
    def weights(self) -> torch.Tensor:
        return torch.zeros(1)

    @property
    def measured_blocks(self) -> tuple[int, ...]:
        """The blocks whose attention is in the file."""
        return tuple(sorted(int(key.split(".")[1]) for key in self.tensors if key.startswith("attention.")))

    def capture(self, images, keep="norms", layers=None, queries=None, **_) -> Capture:
        """A `Capture` of norms and attention of measured photos; UserError, in one line, for what was not measured."""
        keep = (keep,) if isinstance(keep, str) else tuple(keep)
        anatomy, measured = self.anatomy, self.measured["queries"]
        layers = anatomy.layers(layers)
        queries = tuple(range(anatomy.num_prefix_tokens)) if queries is None else tuple(queries)
        missing = [site for site in keep if site not in ("norms", "attention")]
        if "attention" in keep:
            missing += [f"attention of block {i}" for i in layers if i not in self.measured_blocks]
            missing += [f"attention of token {i}" for i in queries if i not in measured]
        if missing:
            raise self._not_measured(missing[0])
        captured = Capture(layers, anatomy.grid(getattr(images, "x", images)), anatomy.prefix, queries)
        if "norms" in keep:
            captured.norms = self.kept("norms", images)[:, list(layers)]
        if "attention" in keep:
            picked = [measured.index(i) for i in queries]
            captured.attention = {i: self.kept(f"attention.{i}", images)[:, :, picked] for i in layers}
        return captured

    def observed(self, images) -> detection.Observed:
        """The measurements that `detect` judges."""
        blocks, first = self.measured_blocks, self.anatomy.num_prefix_tokens
        by_patches = {i: self.kept(f"by_patches.{i}", images) for i in blocks}
        by_cls = {i: self.kept(f"attention.{i}", images).mean(1)[:, 0, first:] for i in blocks}
        return detection.Observed(self.capture(images), by_cls if self.anatomy.has_cls else {}, by_patches)

    def kept(self, name: str, images=None) -> torch.Tensor:
        """The tensor of that name, or its rows for measured photos; UserError where there is none."""
        if name not in self.tensors:
            raise self._not_measured(name)
        tensor = self.tensors[name] if images is None else self.tensors[name][self._rows(images)]
        return tensor.float() if tensor.is_floating_point() else tensor

    def _rows(self, images) -> torch.Tensor:
        """Rows of these photos in the file, by their thumbnails. Raises UserError for any other image."""
        (high, wide), x = sides(self.measured["size"]), getattr(images, "x", images)
        kept = self.tensors["thumbnails"].float().flatten(1)
        if tuple(x.shape[-2:]) != (high, wide):
            raise self._not_measured(f"images of {x.shape[-2]} x {x.shape[-1]} pixels (measured: {high} x {wide})")
        apart, rows = (thumbnails(x).flatten(1)[:, None] - kept).abs().mean(2).min(1)
        if (apart > SAME).any():
            raise self._not_measured("images other than " + self.measured["source"])
        return rows

    def _not_measured(self, what: str) -> UserError:
        return UserError(
            f"{self.label} is replayed from measurements, in which are norms, and attention of cls, registers, centre "
            f"in blocks {', '.join(map(str, self.measured_blocks))}: {what} was not measured; with the weights in "
            "VITREG_MODELS it is computed"
        )


class _NoWeights(nn.Module):
    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def forward(self, *_):
        raise UserError(f"{self.label} is replayed from measurements: its weights are not here, so nothing is computed")


def thumbnails(x: torch.Tensor) -> torch.Tensor:
    """(n, 3, 8, 8) mean of normalised images over an 8 x 8 grid."""
    return F.adaptive_avg_pool2d(x.float(), 8)
