r"""DeiT-III (Touvron et al. 2022) on real images: the recipe of `vitreg train deit3 --data FOLDER`.

Binary cross-entropy on the classes, 3-Augment, mixup and CutMix, stochastic depth, LayerScale and LAMB, all from timm.
The defaults are those published for a ViT-B on ImageNet-1k (800 epochs), with two differences: the published training
repeats each image three times in a batch, and it trains at 192 pixels, followed by 20 epochs at 224. Other settings
were published for ImageNet-22k, which the paper uses (240 epochs). Neither was run here:

    torchrun --nproc-per-node 8 -m vitreg_lib.cli train deit3 --data imagenet --registers 4 --compile
    torchrun --nproc-per-node 32 -m vitreg_lib.cli train deit3 --data imagenet22k --registers 4 --compile \
        --steps 1660000 --warmup 35000 --learning-rate 1e-3 --weight-decay 0.02 --drop-path 0.1 --loss ce \
        --smoothing 0.1 --mixup 0 --crop rkrr

Worker processes read images into pinned memory, ahead of the training. The seed and the position in the training alone
determine each image and its augmentation, so a resumed run gets the same images.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from deit3 import backbone
from torch.utils.data import DataLoader, Dataset
from training_images import pictures

from vitreg_lib.base import UserError, unknown
from vitreg_lib.data.scenes import MEAN, STD
from vitreg_lib.train import parallel
from vitreg_lib.train.images import Augmented, Stream, order, seeded

__all__ = ["DEFAULTS", "backbone", "build", "evaluate", "loss", "telemetry_images"]
DEFAULTS = {
    "size": "b/16",
    "image_size": 224,
    "steps": 500_000,
    "batch_size": 2048,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "warmup": 3125,
    "optimizer": "lamb",
    "drop_path": 0.2,
    "eval_images": 50_000,
    "save_every": 1000,
}
LOSSES = ("bce", "ce")


def build(config) -> torch.nn.Module:
    """A ViT with random weights and a linear head for the folder's classes."""
    classes = pictures(config.data, "train").classes
    pictures(config.data, "val")  # an error in it is raised before the training, not after
    if config.loss not in LOSSES:
        raise unknown("loss", config.loss, LOSSES)
    if (config.mixup or config.cutmix) and config.batch_size // parallel.world() // config.accumulate % 2:
        raise UserError(
            "mixup and CutMix pair images: the batch of each process must be even (or --mixup 0 --cutmix 0)"
        )
    return config.vit(len(classes), drop_path_rate=config.drop_path, init_values=config.layer_scale or None)


def loss(module, config, step, device):
    """(The loss on mixed images, the accuracy for the class with the larger share of each image).

    As in DeiT-III, binary cross-entropy counts every class of a mixed image as fully present.
    """
    from timm.loss import BinaryCrossEntropy

    pixels, labels = stream(config, str(device)).batch(step)
    target = labels
    if (config.mixup or config.cutmix) and len(pixels) % 2 == 0:
        with seeded(config.seed, parallel.batch_range(config, step).start):
            pixels, target = _mixup(config, module.num_classes)(pixels, labels)
    logits = module(pixels)
    if config.loss == "ce":
        smoothing = config.smoothing if target.ndim == 1 else 0.0  # Mixup smooths its targets itself
        value = F.cross_entropy(logits, target, label_smoothing=smoothing)
    else:
        threshold = None if config.smoothing else 0.0
        value = BinaryCrossEntropy(smoothing=config.smoothing, target_threshold=threshold)(logits, target)
    strongest = target.argmax(1) if target.ndim == 2 else target
    return value, {"accuracy": (logits.argmax(1) == strongest).float().mean()}


def telemetry_images(config) -> torch.Tensor:
    """The first held-out images, in an order drawn by the seed."""
    held_out = pictures(config.data, "val")
    chosen = order(len(held_out), config.seed)[: config.telemetry_images].tolist()
    return torch.stack([_centred(config)(held_out.read(i)[0]) for i in chosen])


@functools.lru_cache(maxsize=1)
def stream(config, device: str) -> Stream:
    """Augmented training images; the same stream at every step."""
    from timm.data import create_transform

    transform = create_transform(
        config.image_size,
        is_training=True,
        train_crop_mode=config.crop,
        auto_augment=config.augment or None,
        color_jitter=config.color_jitter or None,
        interpolation="bicubic",
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
    )
    return Stream(config, device, Augmented(config.seed, pictures(config.data, "train"), transform))


def evaluate(module, config, device) -> dict[str, float]:
    """Top-1 accuracy (0 to 1) on at most `eval_images` held-out images, centre crop."""
    stream.cache_clear()  # ends the workers
    held_out = pictures(config.data, "val")
    chosen = order(len(held_out), config.seed)[: config.eval_images]
    loader = DataLoader(_Centred(config, chosen), batch_size=64, num_workers=config.workers)
    correct = 0
    for pixels, labels in loader:
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            correct += (module(pixels.to(device)).argmax(1).cpu() == labels).sum().item()
    return {"accuracy": correct / len(chosen)}


class _Centred(Dataset):
    def __init__(self, config, chosen):
        self.pictures, self.chosen, self.transform = pictures(config.data, "val"), chosen, _centred(config)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        image, label = self.pictures.read(int(self.chosen[place]))
        return self.transform(image), label


def _centred(config):
    from timm.data import create_transform

    return create_transform(config.image_size, interpolation="bicubic", mean=(MEAN,) * 3, std=(STD,) * 3, crop_pct=0.95)


@functools.lru_cache(maxsize=2)
def _mixup(config, num_classes: int):
    from timm.data import Mixup

    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)
