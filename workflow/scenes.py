"""Write the evaluation set, 256 scenes, as a Hugging Face dataset in one Parquet file: python workflow/scenes.py

    datasets.load_dataset("parquet", data_files="data/scenes/eval.parquet")

gives image, label (ClassLabel), caption, boxes, box_labels, and instances and depth as pictures. Rendering the scenes
again gives the same pixels. The file is for use outside this project; it also reveals a change of the renderer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitreg_lib.base import DATA, NOTEBOOKS, written
from vitreg_lib.data import scenes

sys.path.insert(0, str(NOTEBOOKS / "train"))
from clip import captions_of  # noqa: E402

PATH = DATA / "scenes" / "eval.parquet"
FIRST, COUNT, SIZE = scenes.HELD_OUT + 50_000, 256, 96
DEPTH_UNIT = 1000  # a depth picture has 16-bit integers, in thousandths of the scene's unit


def write(path: Path = PATH) -> Path:
    """The path of the Parquet file, after rendering the set and writing it atomically."""
    from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

    batch = scenes.render(range(FIRST, FIRST + COUNT), SIZE)
    shapes = ClassLabel(names=list(scenes.SHAPES))
    features = Features(
        image=Image(),
        label=shapes,
        caption=Value("string"),
        boxes=Sequence(Sequence(Value("float32"), length=4)),
        box_labels=Sequence(shapes),
        instances=Image(),
        depth=Image(),
    )
    columns: dict[str, list] = {name: [] for name in features}
    for i, caption in enumerate(captions_of(batch)):
        visible = batch.visible[i]
        columns["image"].append(_picture((batch.pixels[i] * 255).round().to(torch.uint8).permute(1, 2, 0)))
        columns["label"].append(batch.label[i].item())
        columns["caption"].append(caption)
        columns["boxes"].append(batch.boxes[i][visible].tolist())
        columns["box_labels"].append(batch.shape[i][visible].tolist())
        columns["instances"].append(_picture(batch.instances[i].to(torch.uint8)))
        columns["depth"].append(_picture((batch.depth[i] * DEPTH_UNIT).round().to(torch.uint16)))
    with written(path) as temporary:
        Dataset.from_dict(columns, features=features).to_parquet(str(temporary))
    return path


def _picture(array: torch.Tensor):
    from PIL import Image

    return Image.fromarray(array.numpy())


if __name__ == "__main__":
    print(write())
