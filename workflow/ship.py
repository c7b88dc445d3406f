"""Add a finished training run to the repository: weights and telemetry to data/checkpoints, an entry to models.yaml.

python workflow/ship.py runs/deit3-m-reg4-seed0 mini-deit3-reg4 "mini ViT, supervised on scenes, 4 registers"
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vitreg_lib.base import CHECKPOINTS, DATA, UserError, shown, write_atomically, written  # noqa: E402
from vitreg_lib.model.weights import file_sha256  # noqa: E402
from vitreg_lib.model.zoo import FACTS  # noqa: E402
from vitreg_lib.train import loop  # noqa: E402
from vitreg_lib.train.config import MACHINE  # noqa: E402


def ship(folder: str | Path, name: str, about: str) -> Path:
    """Add the run in `folder` as `name`; returns the path of the weights. Raises UserError for an unfinished run."""
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
    put(name, target, about, {"command": command(config), **result})
    return target


def put(name: str, weights: Path, about: str, result: dict) -> None:
    """Write the entry of the weights into data/models.yaml; facts of an earlier entry are kept."""
    path = DATA / "models.yaml"
    text = path.read_text()
    old = yaml.safe_load(text).get(name, {})
    facts = {fact: old[fact] for fact in (*FACTS, "looks_at", "input_size") if fact in old}
    entry = {"file": weights.name, "about": about, **facts, "sha256": file_sha256(weights), **result}
    new = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1000)
    lines = text.splitlines(keepends=True)
    start = end = len(lines)
    if old:  # in the place of the old entry, which ends at the next top-level key
        start = lines.index(f"{name}:\n")
        tops = (i for i in range(start + 1, len(lines)) if lines[i].strip() and not lines[i].startswith((" ", "#")))
        end = next(tops, len(lines))
    text = "".join([*lines[:start], new, *lines[end:]])
    write_atomically(path, text.encode())


def command(config: dict) -> str:
    """The `vitreg train` command that repeats this run, with the options that differ from the recipe's defaults.

    Options without an influence on the result are left out.
    """
    default, _ = loop.configure(config["recipe"])
    words = ["vitreg train", config["recipe"]]
    for field in fields(default):
        name, value = field.name, config.get(field.name)
        idle = field.metadata["help"].startswith("with --data") and not config.get("data")
        if name == "recipe" or name in MACHINE or name not in config or idle or value == getattr(default, name):
            continue
        flag = name.replace("_", "-")
        words.append({True: f"--{flag}", False: f"--no-{flag}"}[value] if type(value) is bool else f"--{flag} {value}")
    return " ".join(words)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        print(shown(ship(*sys.argv[1:])))
    except UserError as error:
        sys.exit(str(error))
