"""Images with boxes around their objects, for object discovery: scenes, or a folder in YOLO's layout.

A folder has images/NAME.jpg and boxes/NAME.txt, one line an object: class, then centre x, centre y, width and height as
shares of the image. Photos are squashed to the model's square, nothing cut off: IoU does not change when an axis is
stretched, and no box is lost.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..errors import UserError
from . import images as image_sets
from . import registry

LAYOUT = "wanted are images/NAME.jpg and boxes/NAME.txt with lines 'class x y width height', shares of the image"


def load(source: str, model, n: int, seed: int = 0) -> tuple[image_sets.Images, list[torch.Tensor]]:
    """(`Images`, boxes): up to n images that have an object, and for each its (objects, 4) boxes.

    source: "scenes" (the visible parts of their objects), a set of the registry (voc2007, voc2012, coco20k), a named
    folder such as "coco", or a path. Boxes are left, top, right, bottom in pixels of the image as the model sees it.
    Images without a box are left out and counted in `source`. Raises UserError for another layout, or without any box.
    """
    if source == "scenes":
        images = image_sets.load(source, model, n, seed)
        return images, images.scenes.visible_boxes
    if source in registry.entries():
        return registry.boxes(source, model, n, seed)
    folder = image_sets.named_folder(source) or Path(source).expanduser()
    if not (folder / "images").is_dir() or not (folder / "boxes").is_dir():
        raise UserError(
            f"no images with boxes at {source!r}: {LAYOUT}; a folder named {folder.name} may lie in VITREG_DATA"
        )
    squashed = dataclasses.replace(model, crop=1.0, crop_mode="squash")
    images = image_sets.load(str(folder / "images"), squashed, n, seed)
    side = images.x.shape[-1]
    found = [read(folder / "boxes" / f"{name}.txt") * side for name in images.names]
    keep = [i for i, boxes in enumerate(found) if len(boxes)]
    if not keep:
        raise UserError(f"none of the {len(found)} images in {source!r} has a box: {LAYOUT}")
    title = f"photos of the folder {folder.name}, {len(keep)} with boxes, {len(found) - len(keep)} without left out"
    names = [images.names[i] for i in keep]
    return image_sets.Images(images.x[keep], images.pixels[keep], names, title), [found[i] for i in keep]


def read(path: Path) -> torch.Tensor:
    """Boxes (objects, 4) of one YOLO file as left, top, right, bottom, shares of the image; none without a file.

    Raises UserError, naming file and line, for a line that is not five numbers or a box outside the image.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    boxes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            _, x, y, width, height = (float(part) for part in line.split())
        except ValueError:
            raise UserError(f"{path.name}, line {number}: {line!r} is not five numbers; {LAYOUT}") from None
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if not (width > 0 and height > 0 and min(box) > -0.01 and max(box) < 1.01):
            raise UserError(f"{path.name}, line {number}: the box {line!r} is not within the image; {LAYOUT}")
        boxes.append([min(max(value, 0.0), 1.0) for value in box])
    return torch.tensor(boxes).reshape(-1, 4)
