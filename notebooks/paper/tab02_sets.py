"""Images with masks or depths for the dense tasks of Table 2a and Figure 8: data sets by name, or scenes."""

from __future__ import annotations

import numpy as np
import torch
from tables_sets import with_column

from vitreg_lib.base import UserError
from vitreg_lib.data import images, sets
from vitreg_lib.data.images import Images
from vitreg_lib.data.scenes import SHAPES

IGNORE = 255  # pixels without a label


def segmentation(name: str, split: str, model, n: int | None = None, seed: int = 0):
    """(`Images`, masks (images, side, side), number of classes) of a segmentation set, or of "scenes".

    Masks hold class numbers from 0, resized to the model's size by nearest neighbour; `IGNORE` (255) means no label.
    The splits of scenes are different scenes: class 0 is the background, the others are shapes.
    """
    if name == "scenes":
        pictures = _scenes(model, split, n, seed)
        return pictures, pictures.scenes.semantic, len(SHAPES) + 1
    part = with_column(name, split, "mask", "segmentation")
    pictures, planes = _with_planes(part, "mask", model, n, seed)
    masks, classes = mask_classes(planes, part.entry["folder"]), part.entry["classes"]
    if (bad := masks[(masks != IGNORE) & ((masks < 0) | (masks >= classes))]).numel():
        raise UserError(f"{name}: a mask holds the class {int(bad[0])}, expected 0 to {classes - 1}")
    return pictures, masks, classes


def mask_classes(mask: torch.Tensor, spec: dict) -> torch.Tensor:
    """Class numbers from 0, or `IGNORE` for no label, from the numbers of a mask file.

    spec: `background` is a number that is no class and precedes the classes (0 in ADE20k); `ignore` is a number that is
    no class.
    """
    if "background" in spec:
        return torch.where(mask == spec["background"], IGNORE, mask - spec["background"] - 1)
    return torch.where(mask == spec.get("ignore", IGNORE), IGNORE, mask)


def depth(name: str, split: str, model, n: int | None = None, seed: int = 0):
    """(`Images`, depths (images, side, side), largest depth) of a depth set in metres, or of "scenes" in their unit.

    0 means no measurement, as in `tab02_heads.fit_depth`.
    """
    if name == "scenes":
        pictures = _scenes(model, split, n, seed)
        return pictures, pictures.scenes.depth, 10.0
    part = with_column(name, split, "depth", "depth")
    pictures, planes = _with_planes(part, "depth", model, n, seed)
    return pictures, planes.float() / part.entry["folder"]["unit"], float(part.entry["folder"]["max_depth"])


def _with_planes(part, column: str, model, n: int | None, seed: int) -> tuple[Images, torch.Tensor]:
    """(`Images`, planes (images, side, side)): the one-channel pictures of a column, resized by nearest neighbour."""
    from PIL import Image

    pictures, sizes = sets.squashed(part, model, sets.chosen(part, n, seed))
    side, planes = pictures.x.shape[-1], []
    for plane in part.data.select_columns(column).select(list(sizes))[column]:
        if plane.mode not in ("L", "P", "I", "I;16", "I;16B"):
            raise UserError(f"a {column} has the picture mode {plane.mode}; it must have one channel of 8 or 16 bits")
        planes.append(torch.from_numpy(np.array(plane.resize((side, side), Image.NEAREST)).astype(np.int64)))
    return pictures, torch.stack(planes)


def _scenes(model, split: str, n: int | None, seed: int) -> Images:
    """Held-out scenes of a split. Training takes even seeds and testing odd ones, so the splits share no scene."""
    return images.load("scenes", model, n or 200, 2 * seed + (split == "test"))
