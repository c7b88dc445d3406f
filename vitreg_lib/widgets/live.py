"""Train in a notebook with a live picture of the loss, the recipe's numbers and the tokens' norms.

The loop is `train.loop`, which keeps its state in a folder. A stopped cell therefore resumes when it is run again, and
a finished run is shown at once.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..base import in_batch


@dataclass
class Watched:
    """A finished training. telemetry: rows of `train.telemetry`; log: loss and the recipe's numbers, one row per step;
    result: that of `train.loop`; model: the trained backbone, as `vr.load` gives it."""

    telemetry: pd.DataFrame
    log: pd.DataFrame
    result: dict
    model: object


def watch(folder: str | Path = "", every: int = 20, **options) -> Watched:
    """Train as `vitreg train` does, with a live picture; in batch (VITREG_BATCH) only the last picture is drawn.

    folder: for the run's state; empty: a temporary one. options: fields of `TrainConfig`, including `recipe`, which
    replace the recipe's defaults. Raises the errors of `train.loop.train`.
    """
    from ..model import zoo
    from ..train import loop

    config, recipe = loop.configure(**{"save_every": every, **options})
    shown = not in_batch()
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        picture = _Picture(Path(place), config)

        def on_step(step: int, loss: float) -> None:
            if step % every == 0:
                picture.draw(step)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = loop.train(config, recipe, place, device, progress=shown, on_step=on_step if shown else None)
        picture.draw(config.steps)
        log, telemetry = picture.state()
        model = zoo.load(f"file:{Path(place) / 'model.safetensors'}")
    return Watched(telemetry, log, result, model)


class _Picture:
    """The figure below a cell, redrawn from the last state that the loop saved."""

    def __init__(self, folder: Path, config):
        self.folder, self.config, self.handle = folder, config, None

    def state(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Log and telemetry of the last save; None before the first."""
        log, norms = self.folder / "log.csv", self.folder / "telemetry.parquet"
        if not (log.exists() and norms.exists()):
            return None
        return pd.read_csv(log), pd.read_parquet(norms)

    def draw(self, step: int) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        from .. import plots

        if (state := self.state()) is None:
            return
        c = self.config
        title = f"{c.name} {c.size or c.model}, {c.registers} registers: step {step} of {c.steps}"
        figure = plots.training(*state, c.steps, title)
        plt.close(figure)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
