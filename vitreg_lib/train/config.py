"""All that a training run depends on; a file of its own, so that `vitreg train --help` needs no torch.

Every field is an option of `vitreg train` with the help text beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def option(default, help: str, group: str = "recipe"):
    """A field with what `vitreg train --help` says about it, and under which heading."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """The batch size counts the images of one optimiser step, over all processes and micro-batches together.

    Fields of the group "machine" say how a run is computed, not what is learnt: they may change when it is resumed.
    """

    recipe: str = option("deit3", "what is learnt")
    variant: str = option("", "names of CHANGES joined by +", "emergence")

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
    seed: int = option(0, "of weights, images and order", "optimisation")

    prototypes: int = option(1024, "what the heads choose among", "dinov2")
    global_size: int = option(64, "pixels a side of the two whole crops", "dinov2")
    local_size: int = option(32, "pixels a side of the small crops", "dinov2")
    local_crops: int = option(4, "small crops of each image", "dinov2")
    momentum: float = option(0.99, "of the teacher at the start; it rises to 1", "dinov2")
    antialias: bool = option(True, "resize position embeddings with antialiasing (Figure 10)", "dinov2")

    embed_dim: int = option(64, "dimensions in which images and captions meet", "clip")
    text_width: int = option(32, "embed_dim of the text tower", "clip")
    text_layers: int = option(2, "blocks of the text tower", "clip")
    context: int = option(24, "tokens of a caption at most", "clip")

    mask_ratio: float = option(0.75, "share of patches that are hidden", "mae")

    model: str = option("", "the model that gets registers: any name of `vitreg models`", "registers")
    start: str = option("outliers", "of the registers: outliers (what enters block 0 there), or random", "registers")
    teacher: str = option(
        "ttr", "ttr (the model with test-time registers), shift (mean of views), or self", "registers"
    )
    free: str = option(
        "all", "what is trained: all, first (registers and first half of blocks), or registers", "registers"
    )
    cutoff: float = option(0.0, "norm of an outlier after the last block; 0: by the model's own norms", "registers")
    patch_weight: float = option(2.0, "weight of the patch tokens in the loss", "registers")
    answer_weight: float = option(1.0, "weight of the logits (or the pooled features) in the loss", "registers")
    photos: int = option(0, "train on that many photos of the folder only; 0: on all", "registers")
    report: str = option("", "photos for the report: a source or folder; default: those held out", "registers")

    ema: float = option(
        0.0, "decay of a moving average of the weights, which is then what is kept; 0 for none", "optimisation"
    )

    data: str = option(
        "",
        "a folder instead of scenes: train/CLASS/*.jpg and val/CLASS/*.jpg, or the hub's Parquet files; for clip "
        "pairs, as Parquet with image and caption or as WebDataset's .tar; for registers any folder of photos",
        "data",
    )
    layer_scale: float = option(1e-4, "with --data: LayerScale at the start", "deit3")
    augment: str = option("3a", "with --data: an augmentation of timm's, 3a being 3-Augment", "deit3")
    loss: str = option("bce", "with --data: bce, or ce (softmax cross-entropy)", "deit3")
    crop: str = option("rrc", "with --data: rrc, or rkrr (short side to size, then a random crop)", "deit3")
    color_jitter: float = option(0.3, "with --data: strength", "deit3")
    mixup: float = option(0.8, "with --data: alpha of mixup, 0 for none", "deit3")
    cutmix: float = option(1.0, "with --data: alpha of CutMix, 0 for none", "deit3")
    smoothing: float = option(0.0, "with --data: label smoothing", "deit3")

    eval_images: int = option(1024, "held-out images that the result is measured on", "measurement")
    telemetry_images: int = option(64, "held-out images whose token norms are watched", "measurement")

    save_every: int = option(100, "steps between saved states", "machine")
    accumulate: int = option(1, "micro-batches a step, for less memory; the batch stays", "machine")
    compile: bool = option(False, "torch.compile the blocks, where that works", "machine")
    workers: int = option(8, "with --data: processes that read images", "machine")
    fsdp: bool = option(
        False, "share the model out over the processes of torchrun (FSDP2) instead of copying it", "machine"
    )


MACHINE = frozenset(f.name for f in fields(TrainConfig) if f.metadata["group"] == "machine")
