"""All that a training run depends on; kept apart so that `vitreg train --help` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """`size` and `registers` choose the mini ViT (see `models.mini`); image_size is in pixels.

    `variant` names what a recipe keeps a table of: a cell of the sweep of `emergence`.
    """

    recipe: str = "deit3"
    variant: str = ""
    size: str = "m"
    registers: int = 0
    image_size: int = 96
    steps: int = 1800
    batch_size: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    optimizer: str = "adamw"
    clip_grad: float = 1.0
    drop_path: float = 0.0
    seed: int = 0
    eval_images: int = 1024
    telemetry_images: int = 64
    save_every: int = 100
