"""Weights from files: read, checked, and put into a module of timm's."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import nn

from ..base import UserError


def file_sha256(path: Path) -> str:
    """A digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path.name} in {path.parent.name} cannot be read: {_line(error)}") from error


def _read_safetensors(path: Path):
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}
    except Exception as error:  # safetensors raises its own kind, OSError or ValueError
        raise UserError(f"{path.name} is no whole safetensors file: {_line(error)}") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and refused pickles raise several kinds
        raise UserError(f"{path.name} cannot be read as weights only: {_line(error)}") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no weights by name, but a {type(content).__name__}")
    return {re.sub(r"^(module\.|backbone\.)+", "", k): v for k, v in content.items() if torch.is_tensor(v)}


def _at_size(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights whose position embeddings, of a square grid, are interpolated to the module's grid."""
    from timm.layers import resample_abs_pos_embed

    stored, own = tensors.get("pos_embed"), getattr(module, "pos_embed", None)
    if stored is None or own is None or stored.shape[1] == own.shape[1]:
        return tensors
    prefix = own.shape[1] - module.patch_embed.num_patches
    resized = resample_abs_pos_embed(stored, module.patch_embed.grid_size, num_prefix_tokens=prefix)
    return tensors | {"pos_embed": resized}


def _fill(name: str, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load weights; a classifier that is missing or too much is no fault, all else is."""
    try:
        missing, extra = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{name}: the weights do not fit the architecture: {_line(error)}") from error
    wrong = [k for k in [*missing, *extra] if not k.startswith("head")]
    if wrong:
        raise UserError(
            f"{name}: the weights do not fit the architecture: {', '.join(wrong[:4])}{' …' * (len(wrong) > 4)}"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
