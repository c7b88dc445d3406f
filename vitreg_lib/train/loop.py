"""The training loop: one function for all recipes.

A recipe is a module with these functions:

    build(config) -> nn.Module                   the module that is trained
    loss(module, config, step, device) -> (loss, {name: number})
    evaluate(module, config, device) -> {name: number}
    telemetry_images(config) -> images whose norms are watched

`backbone(module)`, the timm ViT inside, whose norms the telemetry watches, and, where there is need, `DEFAULTS` (of
TrainConfig), `after_step(module, config, step)` (a teacher that follows) and `companions(module)` (what ships beside
the backbone: {name: state}). Batches are drawn by step number,
and the random state is set from (seed, step) at every step. So a run that was killed and resumed ends with the same
weights, bit for bit on a CPU, as one that was not.

A run's folder holds config.json, state.safetensors (weights, optimiser, step; written to a temporary name and renamed,
the last good one is never lost), telemetry.parquet, log.csv and, at the end, model.safetensors and result.json.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..paths import write_atomically
from . import telemetry
from .config import TrainConfig


def train(
    config: TrainConfig,
    recipe: ModuleType,
    folder: str | Path,
    device: str = "cpu",
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> dict:
    """Train to `config.steps`, going on from the folder's state if there is one; the result as a dictionary.

    Raises UserError where the folder holds a run of another configuration and FloatingPointError when the loss
    is no longer finite (the last good state is kept).
    """
    from timm.optim import create_optimizer_v2
    from tqdm.auto import tqdm

    folder = Path(folder)
    torch.manual_seed(config.seed)
    module = recipe.build(config).to(device)  # refuses an unknown size before a folder is made
    folder.mkdir(parents=True, exist_ok=True)
    _claim_folder(folder, config)
    optimizer = create_optimizer_v2(
        module, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    start, log, norms = _resume(folder, module, optimizer)
    watched = recipe.telemetry_images(config)
    measured_at = set(telemetry.log_steps(config.steps))
    began = time.perf_counter()
    for step in tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not progress, desc="steps"):
        if step in measured_at:
            norms.append(telemetry.measure(recipe.backbone(module), watched, step))
        if step > start and step % config.save_every == 0:
            _save(folder, module, optimizer, step, log, norms)
        loss, numbers = _step(module, recipe, optimizer, config, step, device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}; the last good state is kept in {folder}")
        log.append({"step": step, "loss": loss, **numbers})
        if on_step:
            on_step(step, loss)
    norms.append(telemetry.measure(recipe.backbone(module), watched, config.steps))
    _save(folder, module, optimizer, config.steps, log, norms)
    result = {
        **recipe.evaluate(module, config, device),
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds_of_last_session": round(time.perf_counter() - began),
    }
    settings = {"config": json.dumps(asdict(config))}
    save_weights(folder / "model.safetensors", recipe.backbone(module), settings)
    for name, state in recipe.companions(module).items() if hasattr(recipe, "companions") else ():
        save_tensors(folder / f"model.{name}.safetensors", {k: v.half() for k, v in state.items()}, settings)
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    return result


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _step(module, recipe, optimizer, config, step, device):
    torch.manual_seed((config.seed << 32) + step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group.get("lr_scale", 1.0)
    module.train()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
        loss, numbers = recipe.loss(module, config, step, device)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_grad)
        optimizer.step()
        if hasattr(recipe, "after_step"):
            recipe.after_step(module, config, step)
    return value, numbers


def _claim_folder(folder: Path, config: TrainConfig) -> None:
    path = folder / "config.json"
    wanted = asdict(config)
    if path.exists():
        found = json.loads(path.read_text())
        if found != wanted:
            names = [k for k in wanted if found.get(k) != wanted[k]]
            raise UserError(f"{folder} holds a run with another {', '.join(names)}; choose another folder or delete it")
    write_atomically(path, json.dumps(wanted, indent=1).encode())


def _resume(folder: Path, module, optimizer):
    """(step, log, telemetry) from the folder's state, after loading weights and optimiser; from step 0 without one."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0, [], []
    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    module.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    log = pd.read_csv(folder / "log.csv")
    norms = pd.read_parquet(folder / "telemetry.parquet")
    return step, log[log.step < step].to_dict("records"), [norms[norms.step < step]]


def _save(folder: Path, module, optimizer, step, log, norms) -> None:
    """The state last: what it refers to is then always there."""
    table = pd.concat(norms, ignore_index=True)
    temporary = folder / "telemetry.parquet.tmp"
    table.to_parquet(temporary, index=False)
    os.replace(temporary, folder / "telemetry.parquet")
    write_atomically(folder / "log.csv", pd.DataFrame(log).to_csv(index=False).encode())
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    save_tensors(folder / "state.safetensors", tensors, {"step": str(step)})


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that a half-written one never has its name."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def save_weights(path: Path, model: torch.nn.Module, metadata: dict[str, str], dtype=torch.float16) -> None:
    """A mini ViT's weights in half precision with the arguments that build it, as the zoo ships and loads them."""
    metadata = {**metadata, "vit": json.dumps(model.vit_arguments)}
    save_tensors(path, {k: v.to(dtype) for k, v in model.state_dict().items()}, metadata)
