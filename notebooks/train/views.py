"""Random views of images for self-supervised training: resized crops, flips, changes of brightness and colour.

A view is determined by the seed, the number of the view and the index of the image, through the counter-based random
numbers of the scenes. So it does not depend on batch, process or device, and a resumed run gets the same views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitreg_lib.data.scenes import MEAN, STD, uniform

RATIO = (3 / 4, 4 / 3)  # width to height of a crop, as torchvision's RandomResizedCrop


def crops(pixels: torch.Tensor, index: torch.Tensor, config, whole, small) -> list[torch.Tensor]:
    """Normalised views of images: two of `config.global_size` pixels, then `local_crops` of `local_size`.

    whole, small: (smallest, largest) share of the image's area in a view; the other arguments are those of `crop`.
    """
    kinds = [(config.global_size, whole)] * 2 + [(config.local_size, small)] * config.local_crops
    return [
        (crop(pixels, index, size, scale, config.seed, view) - MEAN) / STD for view, (size, scale) in enumerate(kinds)
    ]


def crop(
    pixels: torch.Tensor,
    index: torch.Tensor,
    size: int,
    scale: tuple[float, float],
    seed: int,
    view: int,
    lit: bool = True,
) -> torch.Tensor:
    """View number `view` (n, 3, size, size) of images (n, 3, h, w) in [0, 1] with the given `index` (n,).

    The view is a box with a share of the image's area within `scale` (smallest, largest), resized bilinearly and
    flipped half of the time. With `lit`, brightness, contrast and the gain of each channel change by at most 20 %, so
    that colours stay recognisable.
    """
    u = uniform(index, 10, seed * 1009 + view + 1)
    cropped = _resize(pixels, *boxes(u, scale), size)
    return light(cropped, u[:, 5:]) if lit else cropped


def boxes(u: torch.Tensor, scale: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and half sides (n, 2: x, y) of crops, in `affine_grid`'s coordinates (-1 to 1), from numbers u (n, 5+).

    The half side in x is negative for a flipped view.
    """
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    low, high = torch.log(torch.tensor(RATIO, device=u.device))
    ratio = torch.exp(low + (high - low) * u[:, 1])
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    centre = (2 * u[:, 2:4] - 1) * (1 - half)
    flip = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    return centre, torch.stack([half[:, 0] * flip, half[:, 1]], 1)


def light(pixels: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Pixels with brightness, contrast and channel gains changed by numbers u (n, 5), by at most 20 % each."""
    change = 0.8 + 0.4 * u[:, :, None, None, None]
    mean = pixels.mean((1, 2, 3), keepdim=True)
    gain = torch.cat([change[:, 2], change[:, 3], change[:, 4]], 1)
    return ((pixels - mean) * change[:, 0] + mean * change[:, 1]).mul(0.5 + 0.5 * gain).clamp(0, 1)


def _resize(pixels, centre, half, size):
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = half[:, 0], half[:, 1], centre
    grid = F.affine_grid(theta, (len(pixels), 3, size, size), align_corners=False)
    return F.grid_sample(pixels, grid, "bilinear", "reflection", align_corners=False)
