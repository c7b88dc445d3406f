"""Figure 13: the plot of LOST, step by step."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from vitreg_lib.plots.maps import _box, _rows_of_panels, _signed
from vitreg_lib.plots.style import NORMS, PALETTE, picture, styled


@styled
def discovery(pixels: torch.Tensor, found: dict, patch_sizes: dict[str, int], truth: list | None = None) -> Figure:
    """Figure 13: LOST step by step; a row a model, four panels an image.

    found: {model: `lost.Lost` with intermediates, of the images in pixels (n, 3, h, w)}; truth: boxes of each image.
    Inverse degree (bright: linked to few, the seed crossed); similarity to the seed and expansion, white at 0, where
    LOST cuts; the part that holds the seed, LOST's box (solid) and the true boxes (dashed).
    """
    titles = ("inverse\ndegree", "similarity\nto seed", "seed\nexpansion", "box")
    figure, axes = _rows_of_panels(list(found), len(pixels), titles)
    for row, (name, result) in zip(axes, found.items(), strict=True):
        rows, cols = result.degrees.shape[1:]
        for i, panels in enumerate(row):
            panels[0].imshow(-result.degrees[i].numpy(), cmap=NORMS, interpolation="nearest")
            for axis, values in zip(panels[1:3], (result.seed_similarity[i], result.expansion[i]), strict=True):
                _signed(axis, values)
            for axis in panels[:3]:
                axis.plot(
                    int(result.seeds[i]) % cols, int(result.seeds[i]) // cols, "x", color=PALETTE[1], ms=5, mew=1.6
                )
            image = picture(pixels[i])
            part = result.component[i].repeat_interleave(image.shape[0] // rows, 0)
            part = part.repeat_interleave(image.shape[1] // cols, 1).numpy()[..., None]
            panels[3].imshow(np.where(part, image, 0.65 + 0.35 * image))
            for box in [] if truth is None else truth[i]:
                _box(panels[3], box, PALETTE[0], "--")
            _box(panels[3], result.boxes[i] * patch_sizes[name], PALETTE[1], "-")
    return figure
