"""Scenes with a stamp and two dots in every patch: what `mini-stamps` learns from (the task: workflow/stamped.py)."""

import math

import torch
import torch.nn.functional as F

SIDE, PATCH = 64, 8  # pixels
GRID = SIDE // PATCH
CORNERS = (0, GRID - 1, GRID * GRID - GRID, GRID * GRID - 1)  # patches that carry no dots
SHARE = 0.25  # of the patches that have exactly one dot


def stamp(pixels: torch.Tensor, generator, amplitude: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes (n, 3, 64, 64) from -1 to 1 and beyond; colours of the patches' quarters (n, 64, 12); dots (n, 2, 64).

    pixels: scenes in [0, 1]. The stamp of a patch is four blocks of normal random colours times `amplitude`, added to
    the scene. Each of its two white dots is there (True) or not. The colours are means without the dots.
    """
    n, device = len(pixels), pixels.device
    colours = torch.randn(n, 3, 2 * GRID, 2 * GRID, generator=generator).to(device)
    stamped = 2 * pixels - 1 + amplitude * F.interpolate(colours, scale_factor=PATCH // 2)
    own = F.avg_pool2d(stamped, PATCH // 2)  # (n, 3, 16, 16)
    own = own.unflatten(3, (GRID, 2)).unflatten(2, (GRID, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    # of two dots exactly one is there with probability 2 p (1 - p) = SHARE
    chance = (1 - math.sqrt(1 - 2 * SHARE)) / 2
    dots = torch.rand(n, 2, GRID, GRID, generator=generator).to(device) < chance
    dots.flatten(2)[..., list(CORNERS)] = False
    for which, first in enumerate((1, 5)):
        for row in (first, first + 1):
            for col in (first, first + 1):
                stamped[:, :, row::PATCH, col::PATCH] += 2.0 * dots[:, which, None]
    return stamped, own, dots.flatten(2)
