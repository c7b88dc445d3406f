"""Training registers into a model with a live figure (workshop 4)."""

from __future__ import annotations

from vitreg_lib import widgets
from vitreg_lib.base import in_batch, results

SHORT = 12  # steps in batch (VITREG_BATCH): papermill and tests only check that the training runs


def train(model: str = "planted", registers: int = 4, steps: int = 25, seed: int = 0, every: int = 5):
    """Train registers into a model; the figure below the cell is updated every `every` steps.

    In batch, the training has at most `SHORT` steps and uses a temporary folder.
    """
    folder = results() / "workshop" / f"{model}-reg{registers}-{steps}-seed{seed}"
    if in_batch():
        print(f"in batch: {min(steps, SHORT)} of {steps} steps")
        folder, steps = "", min(steps, SHORT)
    options = dict(model=model, registers=registers, steps=steps, seed=seed, eval_images=32, workers=0)
    return widgets.watch(folder, every, recipe="registers", **options)
