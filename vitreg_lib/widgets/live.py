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
    shown, handles = not in_batch(), []
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:

        def on_step(step: int, loss: float) -> None:
            if step % every == 0:
                _draw(Path(place), config, step, handles)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = loop.train(config, recipe, place, device, progress=shown, on_step=on_step if shown else None)
        log, telemetry = _draw(Path(place), config, config.steps, handles)
        model = zoo.load(f"file:{Path(place) / 'model.safetensors'}")
    return Watched(telemetry, log, result, model)


def _draw(folder: Path, config, step: int, handles: list) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Draw log and telemetry that the loop saved last below the cell, and return them; None before the first save.

    handles: of the figure that is redrawn; empty at first.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    from .. import plots

    log, norms = folder / "log.csv", folder / "telemetry.parquet"
    if not (log.exists() and norms.exists()):
        return None
    state = pd.read_csv(log), pd.read_parquet(norms)
    title = f"{config.name} {config.size or config.model}, {config.registers} registers: step {step} of {config.steps}"
    figure = plots.training(*state, config.steps, title)
    plt.close(figure)
    if handles:
        handles[0].update(figure)
    else:
        handles.append(display(figure, display_id=True))
    return state
