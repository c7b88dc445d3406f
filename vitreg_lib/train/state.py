"""The files in the folder of a training run, written so that a good state is never lost.

    config.json                 the configuration, frozen
    state.safetensors           weights, their average, optimiser, step
    previous.safetensors        the state before it, in case the newest cannot be read
    log.csv, telemetry.parquet  a row per step; a row per measured step and layer

Everything is written under a temporary name and renamed. A state carries a checksum of its tensors. One process, DDP
and FSDP write the same file, and each can resume from it.
"""

import json
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn

from ..base import UserError, line, shown, write_atomically, written
from ..model.saved import how_built
from ..model.weights import read_safetensors, write_safetensors
from . import parallel, recipes
from .config import MACHINE, TrainConfig


@dataclass
class Run:
    """A training: what is learnt how and where, and its variables.

    loss: a module from the step to (loss, numbers). ema: the moving average of the weights, or None. accumulate:
    micro-batches per step, doubled when memory runs out. step: optimiser steps taken. log, norms: rows for each step
    and for each measured step.
    """

    recipe: ModuleType
    config: TrainConfig
    device: str
    module: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None = None
    accumulate: int = 1
    step: int = 0
    log: list[dict] = field(default_factory=list)
    norms: list[pd.DataFrame] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def claim(folder: Path, config: TrainConfig) -> None:
    """Make the folder and freeze the configuration in it.

    Raises UserError where it holds a run of another configuration; fields of `config.MACHINE` may differ.
    """
    wanted = asdict(config)
    if (path := folder / "config.json").exists():
        saved = asdict(read_config(folder))
        if names := [k for k in wanted if k not in MACHINE and saved.get(k) != wanted[k]]:
            raise UserError(f"{folder} holds a run with another {', '.join(names)}; choose another folder or delete it")
    write_atomically(path, json.dumps(wanted, indent=1).encode())


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder, without options of other recipes, which older runs hold.

    Raises UserError where there is none or it cannot be read.
    """
    if not (path := folder / "config.json").exists():
        raise UserError(f"{folder} holds no run: no config.json there")
    try:
        saved = json.loads(path.read_text())
        kind = recipes.config_class(saved["recipe"], saved["data"])
        return kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the configuration of a run of this version: {error}") from error


def load(folder: Path, run: Run) -> None:
    """Put the folder's newest readable state into `run`; without a state, `run` is unchanged.

    A warning names a corrupt or truncated state, and the one before it is loaded. Raises UserError when none can be
    read.
    """
    faults = []
    for path in (folder / "state.safetensors", folder / "previous.safetensors"):
        if not path.exists():
            continue
        try:
            tensors, metadata = _read(path)
            break
        except (UserError, KeyError, ValueError) as error:
            faults.append(f"{shown(path)} cannot be read ({line(error)})")
    else:
        if faults:
            raise UserError(f"{'; '.join(faults)}: delete the run's folder and train anew")
        return
    if faults:
        warnings.warn(f"{faults[0]}: going on from the state before it, of step {metadata['step']}", stacklevel=3)
    for prefix, module in _modules(run).items():
        _fill(module, tensors, prefix)
    _fill_optimizer(run.optimizer, tensors)
    run.step, run.accumulate = int(metadata["step"]), max(run.accumulate, int(metadata["accumulate"]))
    try:
        log, norms = pd.read_csv(folder / "log.csv"), pd.read_parquet(folder / "telemetry.parquet")
    except (OSError, ValueError) as error:
        what = f"log.csv or telemetry.parquet of {folder} cannot be read ({error})"
        raise UserError(f"{what}: delete the run's folder and train anew") from error
    run.log, run.norms = log[log.step < run.step].to_dict("records"), [norms[norms.step < run.step]]


def save(folder: Path, run: Run) -> None:
    """Write log, telemetry and, last, the state, which refers to them. Collective under FSDP.

    Raises UserError when it cannot be written; the last good state remains.
    """
    tensors = _tensors(run)
    if parallel.rank():
        return
    try:
        with written(folder / "telemetry.parquet") as temporary:
            pd.concat(run.norms, ignore_index=True).to_parquet(temporary, index=False)
        write_atomically(folder / "log.csv", pd.DataFrame(run.log).to_csv(index=False).encode())
        metadata = {"step": str(run.step), "accumulate": str(run.accumulate), "crc32": _checksum(tensors)}
        write_safetensors(folder / "state.safetensors", tensors, metadata, previous=folder / "previous.safetensors")
    except (UserError, SafetensorError) as error:
        raise UserError(
            f"the state of step {run.step} could not be written ({error}); the last good one is kept. "
            f"Make room, then: vitreg train --resume {folder}"
        ) from error


def save_weights(path: Path, model: nn.Module, metadata: dict[str, str], dtype=torch.float16) -> None:
    """Write a model's weights and the metadata that build it, for the zoo: a mini ViT in half precision, as it ships; a
    model made from released weights in its own precision."""
    kind, spec = how_built(model)
    tensors = {k: v.to(dtype) if kind == "vit" else v for k, v in model.state_dict().items()}
    write_safetensors(path, tensors, {**metadata, kind: json.dumps(spec)})


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of the state by name, as `parallel.gathered` gives them."""
    named = {prefix + k: v for prefix, module in _modules(run).items() for k, v in module.state_dict().items()}
    for number, values in run.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{number}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    for number, group in enumerate(run.optimizer.param_groups):  # where LAMB counts its steps
        named |= {f"group.{number}.{k}": v for k, v in group.items() if torch.is_tensor(v) and k != "lr"}
    return parallel.gathered(named)


def _modules(run: Run) -> dict[str, nn.Module]:
    """Prefix of the names in a state: module."""
    return {"model.": run.module} | ({"ema.": run.ema} if run.ema is not None else {})


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return str(value)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    metadata, tensors = read_safetensors(path)
    if _checksum(tensors) != metadata["crc32"]:
        raise ValueError("its checksum is wrong")
    return tensors, metadata


@torch.no_grad()
def _fill(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = module.state_dict()
    if only := sorted(saved.keys() ^ own.keys()):
        raise UserError(f"the saved state is of another model: {only[0]} is in one alone")
    for name, tensor in own.items():
        tensor.copy_(_like(saved[name], tensor))


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    groups = optimizer.state_dict()["param_groups"]
    for name, value in tensors.items():
        kind, *rest = name.split(".")
        if kind == "optimizer":
            number, key = int(rest[0]), rest[1]
            as_parameter = value.shape == parameters[number].shape
            state.setdefault(number, {})[key] = _like(value, parameters[number]) if as_parameter else value
        elif kind == "group":
            groups[int(rest[0])][rest[1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(value: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """The value, distributed over ranks like the pattern."""
    if not hasattr(pattern, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)
