"""The planted control: a trained mini ViT with artificial artifacts at known positions.

At `POSITIONS` of the grid, patches of low information (the responses of all five `filters` are below `THRESHOLD`) have
ten times the median norm from the onset block on. They lose their position and content and carry the cls token's
content instead. From the next block on, one head attends to them. `truth` computes these patches from the pixels alone.
The weights ship as data/checkpoints/planted.safetensors, an ordinary checkpoint without hooks; workflow/plant.py made
it and explains how.
"""

import math

import torch

POSITIONS = (14, 21, 40, 67, 92, 105, 117, 130)  # of the 12 x 12 grid, row by row
THRESHOLD = 0.2  # of a filter's response, in normalised pixels
PATCH = 8  # pixels a side
PAIRS = 16  # pairs of dimensions that planting adds, 32 in all: two heads of 16


def filters() -> torch.Tensor:
    """(5, 8, 8) zero-mean filters of unit length: three slow cosines and two checkered patterns."""
    wave = torch.cos(math.pi * (torch.arange(8) + 0.5)[None] * torch.arange(3)[:, None] / 8).double()
    checks = torch.tensor([1.0, -1.0]).double().repeat(4)
    rows = torch.tensor([1.0, 1.0, -1.0, -1.0]).double().repeat(2)
    patterns = [
        wave[0][:, None] * wave[1][None],
        wave[1][:, None] * wave[0][None],
        wave[1][:, None] * wave[1][None],
        rows[:, None] * rows[None],
        checks[:, None] * rows[None],
    ]
    stack = torch.stack(patterns)
    stack = stack - stack.mean((1, 2), keepdim=True)
    return (stack / stack.flatten(1).norm(dim=1)[:, None, None]).float()


def truth(images: torch.Tensor) -> torch.Tensor:
    """(n, 144) bool: which patches of normalised images (n, 3, 96, 96) carry an artifact, from the pixels alone.

    Raises ValueError for another size, at which the truth is unknown.
    """
    if images.shape[-2:] != (12 * PATCH, 12 * PATCH):
        raise ValueError(
            f"the artifacts' places are known at 96 x 96 pixels, not at {' x '.join(map(str, images.shape[-2:]))}"
        )
    patches = images.mean(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (n, 12, 12, 8, 8)
    responses = torch.einsum("nrchw,fhw->nrcf", patches.double(), filters().to(patches).double())
    quiet = (responses.abs() < THRESHOLD).all(-1).flatten(1)
    chosen = torch.zeros(quiet.shape[1], dtype=torch.bool, device=quiet.device)
    chosen[list(POSITIONS)] = True
    return quiet & chosen
