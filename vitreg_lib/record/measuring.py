"""`vitreg measure MODEL`: what a file of measurements holds (`model.measured` reads it) is measured and written."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..base import UserError, commit, written
from ..data import images as image_sets
from ..hooks.capture import Capture
from ..measure import detection, maps
from ..model.measured import SIZES, thumbnails
from ..model.model import Model
from ..model.weights import file_sha256
from ..probes.local import matched_normal


def measure(model: Model, images, labelled: Path | None = None, per_class: int = 8, seed: int = 0) -> dict:
    """The tensors of a file, for an `Images` set; of labelled photos where a folder with train/ and test/ is given."""
    observed, anatomy = detection.observe(model, images), model.anatomy
    blocks = list(observed.by_patches)
    seen = model.capture(images, ("attention", "tokens") if anatomy.num_prefix_tokens else "tokens", layers=blocks)
    parts = maps.principal_components(seen.patches(seen.tokens[blocks[-1]]), 3, grid=seen.grid)
    tensors = {"norms": observed.seen.norms, "thumbnails": thumbnails(images.x)}
    tensors["components"] = parts.scores.unflatten(1, seen.grid)
    tensors |= {f"by_patches.{i}": at for i, at in observed.by_patches.items()}
    tensors |= {f"attention.{i}": at for i, at in seen.attention.items()}
    if labelled is not None:
        cut = detection.judge(observed).outliers.cutoff
        tensors |= _labelled(model, labelled, cut, per_class, torch.Generator().manual_seed(seed))
    return {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}


def _labelled(model: Model, folder: Path, cut: float, per_class: int, noise: torch.Generator) -> dict:
    """features, labels and split of up to `per_class` photos of every class in folder/train and folder/test."""
    features, labels, split = [], [], []
    for part, name in enumerate(("train", "test")):
        classes = sorted(path for path in (folder / name).iterdir() if path.is_dir())
        for label, path in enumerate(classes):
            pictures = image_sets.load(str(path), model, per_class)
            seen = model.capture(pictures, ("norms", "final"))
            features.append(_tokens(seen, cut, noise))
            labels += [label] * len(pictures)
            split += [part] * len(pictures)
    return {"features": torch.cat(features), "labels": torch.tensor(labels), "split": torch.tensor(split)}


def _tokens(seen: Capture, cut: float, noise: torch.Generator) -> torch.Tensor:
    """(images, 4, dim) the tokens `TOKENS` of each image after the final LayerNorm, drawn at random where many."""
    mask = seen.patch_norms[:, -1] > cut
    partner = matched_normal(mask.unflatten(1, seen.grid)).flatten(1)
    patches = seen.patches(seen.final)
    chosen = [seen.final[:, :1] if seen.has_cls else torch.full_like(patches[:, :1], torch.nan)]
    for among in (mask, partner, ~mask):
        drawn = torch.rand(among.shape, generator=noise).masked_fill(~among, -1).argmax(1)
        token = patches[torch.arange(len(patches)), drawn]
        chosen.append(torch.where(among.any(1)[:, None], token, torch.nan)[:, None])
    return torch.cat(chosen, 1)


def write(model: Model, images, tensors: dict, path: Path, command: str) -> Path:
    """Write a file of measurements with its metadata; its path."""
    anatomy = model.anatomy
    facts = {f.name: getattr(model, f.name) for f in dataclasses.fields(Model) if f.name != "module"}
    sizes = {name: getattr(anatomy, name) for name in ("prefix", "depth", "patch_size", *SIZES)}
    source = images.source.split(",")[0]
    metadata = dict(model=facts, anatomy=sizes, source=source, size=images.x.shape[-1], photos=_hashes(images))
    metadata |= dict(command=command, commit=commit(), date=datetime.date.today().isoformat())
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})
    return path


def _hashes(images) -> dict[str, str]:
    """{name: sha256 of its file} of photos; empty for procedural images."""
    if images.scenes is not None or images.source.startswith("textures"):
        return {}
    source = "photos" if images.source.startswith("photos") else images.source.split(",")[0]
    try:
        paths = {path.stem: path for path in image_sets.find(source)[0]}
    except UserError:  # a folder that was given by its path: its name alone does not find it
        return dict.fromkeys(images.names, "")
    return {name: file_sha256(paths[name]) for name in images.names if name in paths}
