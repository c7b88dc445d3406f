"""Images of textures on which a small ViT grows artifacts: what `mini-corners` learns from.

An image has 6 x 6 patches of 2 pixels a side. A patch holds 11 normal random numbers and a mark, 0 or 1. The recipe in
notebooks/beyond/emergence.py describes the task, its variants and the marks.
"""

import torch

GRID, PATCH = 6, 2
PATCHES, LENGTH = GRID * GRID, 3 * PATCH * PATCH
HELD_OUT = 1 << 30  # batches from this step on are never trained on
TO_LOOK_AT = 100  # of these, from this part on: images for notebooks
CORNERS = (0, GRID - 1, PATCHES - GRID, PATCHES - 1)
MARKED = 0.25  # share of the patches that are marked, of those that may be


def draw(seed: int, step: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Textures (n, 36, 12) without marks, a number (n, 36) in [0, 1) for each patch, and the generator for more."""
    generator = torch.Generator().manual_seed((seed * 2654435761 + step) % 2**32)  # the CPU's takes 32 bits
    texture = torch.randn(n, PATCHES, LENGTH, generator=generator)
    texture[..., -1] = 0.0
    return texture, torch.rand(n, PATCHES, generator=generator), generator


def marked(chance: torch.Tensor, idle: torch.Tensor, share: float = MARKED) -> torch.Tensor:
    """(n, 36) which patches are marked: by chance, of those with a left neighbour where neither of both is idle."""
    has_left = torch.arange(PATCHES) % GRID > 0
    return has_left & ~idle & ~idle.roll(1, 1) & (chance < share)


def to_images(patches: torch.Tensor) -> torch.Tensor:
    """(n, 3, 12, 12) from the patches' pixels (n, 36, 12), each as colour, row, column."""
    split = patches.view(-1, GRID, GRID, 3, PATCH, PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, GRID * PATCH, GRID * PATCH)


def held_out(n: int, part: int) -> torch.Tensor:
    """(n, 3, 12, 12) images that `mini-corners` was not trained on; another `part` has others."""
    texture, chance, _ = draw(0, HELD_OUT + part, n)
    idle = torch.zeros(n, PATCHES, dtype=torch.bool)
    idle[:, list(CORNERS)] = True
    texture[..., -1] = marked(chance, idle).float()
    return to_images(texture)
