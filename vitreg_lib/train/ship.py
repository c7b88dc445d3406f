"""Put a finished run into the zoo: weights and telemetry into data/checkpoints/, its record into data/models.yaml."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import yaml

from ..base import CHECKPOINTS, DATA, UserError, write_atomically, written
from ..model.weights import file_sha256
from . import loop
from .config import MACHINE, TrainConfig


def ship(folder: str | Path, name: str, about: str) -> Path:
    """Ship the run in `folder` as `name`; the weights' path. Raises UserError for a run that is not finished."""
    folder = Path(folder)
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} holds no finished run: no result.json there")
    config = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    target = CHECKPOINTS / f"{name}.safetensors"
    for source in (*sorted(folder.glob("model*.safetensors")), folder / "telemetry.parquet"):
        place = target.with_name(name + "." + source.name.removeprefix("model."))
        with written(place) as temporary:
            shutil.copyfile(source, temporary)
    entry = {
        "file": target.name,
        "about": about,
        "sha256": file_sha256(target),
        "command": command(config),
        **result,
    }
    path = DATA / "models.yaml"
    entries = yaml.safe_load(path.read_text())
    text = path.read_text()
    if name in entries:  # drop the old entry, up to the next top-level key
        lines = text.splitlines(keepends=True)
        start = lines.index(f"{name}:\n")
        end = next(
            (i for i in range(start + 1, len(lines)) if lines[i].strip() and not lines[i].startswith((" ", "#"))),
            len(lines),
        )
        text = "".join(lines[:start] + lines[end:])
    text = text.rstrip("\n") + "\n" + yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1000)
    write_atomically(path, text.encode())
    return target


def command(config: dict) -> str:
    """The `vitreg train` line that makes this run again: what differs from the recipe's defaults and matters to it."""
    default, _ = loop.configure(config["recipe"])
    told = ["vitreg train", config["recipe"]]
    for field in fields(TrainConfig):
        name, value = field.name, config.get(field.name)
        idle = field.metadata["help"].startswith("with --data") and not config.get("data")
        if name in MACHINE or name not in config or idle or value == getattr(default, name):
            continue
        flag = name.replace("_", "-")
        told.append({True: f"--{flag}", False: f"--no-{flag}"}[value] if type(value) is bool else f"--{flag} {value}")
    return " ".join(told)
