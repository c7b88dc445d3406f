"""What every training run depends on; a file of its own, so that `vitreg train --help` needs no torch.

Every field is an option of `vitreg train` with the help text beside it. A recipe adds its own (see `train.recipes`).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path


def option(default, help: str, group: str):
    """A field with what `vitreg train --help` says about it, and under which heading."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """The batch size counts the images of one optimiser step, over all processes and micro-batches together.

    Fields of the group "machine" say how a run is computed, not what is learnt: they may change when it is resumed.
    """

    recipe: str = option("", "what is learnt: a name, or the path of a file", "recipe")

    size: str = option("m", "xxs, xs, s, m, l (patch 8), or ti/16, s/16, b/16, l/16, l/14 …", "model")
    registers: int = option(0, "how many", "model")
    register_start: float = option(0.2, "standard deviation of registers before the training", "model")
    image_size: int = option(96, "pixels a side", "model")
    drop_path: float = option(0.0, "stochastic depth: rate of dropped residual branches in the last block", "model")

    steps: int = option(1500, "optimiser steps", "optimisation")
    batch_size: int = option(96, "images a step, over all processes", "optimisation")
    learning_rate: float = option(
        0.01, "peak, reached after the warm-up and followed by a cosine; adamw wants 0.002", "optimisation"
    )
    weight_decay: float = option(0.05, "not on biases, norms and other vectors", "optimisation")
    warmup: int = option(100, "steps of linear warm-up", "optimisation")
    optimizer: str = option("muon", "any of timm's: muon, adamw, lamb, sgd …", "optimisation")
    clip_grad: float = option(1.0, "largest norm of the gradient, 0 for no limit", "optimisation")
    ema: float = option(
        0.0, "decay of a moving average of the weights, which is then what is kept; 0 for none", "optimisation"
    )
    seed: int = option(0, "of weights, images and order", "optimisation")

    data: str = option(
        "",
        "a folder instead of scenes: train/CLASS/*.jpg and val/CLASS/*.jpg, or the hub's Parquet files; for clip "
        "pairs, as Parquet with image and caption or as WebDataset's .tar; for registers any folder of photos",
        "data",
    )

    eval_images: int = option(1024, "held-out images that the result is measured on", "measurement")
    telemetry_images: int = option(64, "held-out images whose token norms are measured along the way", "measurement")

    save_every: int = option(100, "steps between saved states", "machine")
    accumulate: int = option(1, "micro-batches a step, for less memory; the batch stays", "machine")
    compile: bool = option(False, "torch.compile the blocks, where that works", "machine")
    workers: int = option(8, "with --data: processes that read images", "machine")
    fsdp: bool = option(
        False, "share the model out over the processes of torchrun (FSDP2) instead of copying it", "machine"
    )

    @property
    def name(self) -> str:
        """The recipe's name, without the folder of its file."""
        return Path(self.recipe).stem

    def vit(self, outputs: int = 0, **options):
        """A fresh ViT of this size; `outputs` of its head, 0 for none; `options` go to timm's class."""
        from ..model import mini

        return mini.build(self.size, self.registers, outputs, self.image_size, self.register_start, **options)


MACHINE = frozenset(f.name for f in fields(TrainConfig) if f.metadata["group"] == "machine")
