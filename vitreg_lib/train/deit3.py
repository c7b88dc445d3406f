"""Supervised training on scenes: the class of an image is the shape of its largest object.

After DeiT-III (Touvron et al. 2022): binary cross-entropy over the classes, LayerScale, stochastic depth, cosine
schedule with warm-up. Scenes never repeat, so nothing is augmented.

    vitreg train deit3 --size m --registers 4        # 2 CPU cores: about an hour
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..data import scenes
from ..models import mini

HELD_OUT = 1 << 40  # scenes from this index on are never trained on
MEAN = STD = 0.5


def build(config) -> torch.nn.Module:
    """A fresh mini ViT with a linear head for the eight shapes."""
    return mini.build(
        config.size, config.registers, len(scenes.SHAPES), config.image_size, drop_path_rate=config.drop_path
    )


def backbone(module):
    """The ViT inside the module: itself."""
    return module


def loss(module, config, step, device):
    """Binary cross-entropy against the one-hot class, and the accuracy on the batch."""
    first = step * config.batch_size
    batch = scenes.render(range(first, first + config.batch_size), config.image_size, config.seed, device)
    logits = module((batch.pixels - MEAN) / STD)
    target = F.one_hot(batch.label, logits.shape[1]).to(logits.dtype)
    value = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
    return value, {"accuracy": (logits.argmax(1) == batch.label).float().mean().item()}


def telemetry_images(config) -> torch.Tensor:
    """The held-out scenes whose norms are watched during training."""
    held_out = scenes.render(range(HELD_OUT, HELD_OUT + config.telemetry_images), config.image_size, config.seed)
    return (held_out.pixels - MEAN) / STD


@torch.no_grad()
def evaluate(module, config, device) -> dict[str, float]:
    """Accuracy (0 to 1) on held-out scenes."""
    module.eval()
    first = HELD_OUT + config.telemetry_images
    correct = 0
    for index in torch.arange(first, first + config.eval_images).split(256):
        batch = scenes.render(index, config.image_size, config.seed, device)
        correct += (module((batch.pixels - MEAN) / STD).argmax(1) == batch.label).sum().item()
    return {"accuracy": correct / config.eval_images}
