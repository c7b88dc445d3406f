"""Train a mini ViT in a notebook and watch its loss and its tokens' norms while it learns.

The loop is the collection's own (`train.loop`, recipe deit3): it leaves its state in a folder of `results`, so a cell
that was stopped goes on where it was when it is run again, and a finished run is shown at once.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from .paths import results

SHORT = 12  # steps in batch (VITREG_BATCH): papermill and tests show that it runs, not what is learnt


@dataclass
class Watched:
    """A training that has ended. telemetry: rows of `train.telemetry`; result: what `train.loop` returns."""

    telemetry: pd.DataFrame
    losses: list[float]
    result: dict


def train(
    registers: int = 4, size: str = "xs", steps: int = 800, batch_size: int = 32, seed: int = 0, every: int = 20
) -> Watched:
    """Train a mini ViT on scenes; the picture below the cell is drawn anew every `every` steps.

    `size` is one of `models.mini.SIZES`. In batch no more than `SHORT` steps are made, in a folder that is then gone.
    """
    batch = bool(os.environ.get("VITREG_BATCH"))
    if not batch:
        name = f"{size}-reg{registers}-{steps}x{batch_size}-seed{seed}"
        return _train(results() / "workshop" / name, registers, size, steps, batch_size, seed, every, shown=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"in batch: {min(steps, SHORT)} of {steps} steps")
        return _train(Path(folder), registers, size, min(steps, SHORT), batch_size, seed, every, shown=False)


def _train(folder: Path, registers, size, steps, batch_size, seed, every, shown: bool) -> Watched:
    from .train import deit3, loop
    from .train.config import TrainConfig

    config = TrainConfig(
        size=size,
        registers=registers,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        warmup=min(50, steps // 4),
        eval_images=256,
        telemetry_images=32,
        save_every=every,
    )
    picture = _Picture(folder, steps, f"{size}, {registers} registers")

    def on_step(step: int, loss: float) -> None:
        if step % every == 0:
            picture.draw(step)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = loop.train(config, deit3, folder, device, progress=shown, on_step=on_step if shown else None)
    picture.draw(steps)
    losses, telemetry = picture.state()
    return Watched(telemetry, losses, result)


class _Picture:
    """The figure below a cell, drawn anew in its place from what the loop has saved last."""

    def __init__(self, folder: Path, steps: int, title: str):
        self.folder, self.steps, self.title, self.handle = folder, steps, title, None

    def state(self) -> tuple[list[float], pd.DataFrame | None]:
        """Losses and telemetry of the last save; nothing before the first."""
        log, norms = self.folder / "log.csv", self.folder / "telemetry.parquet"
        if not (log.exists() and norms.exists()):
            return [], None
        return pd.read_csv(log).loss.tolist(), pd.read_parquet(norms)

    def draw(self, step: int) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        from . import plots_workshop

        figure = plots_workshop.training(*self.state(), self.steps, f"{self.title}: step {step} of {self.steps}")
        plt.close(figure)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
