"""Supervised training on scenes: shape, colour and texture of the largest object, and the kind of background.

After DeiT-III (Touvron et al. 2022): binary cross-entropy over all labels (24 here: 8 shapes, 8 colours, 4 textures,
4 backgrounds), LayerScale, stochastic depth, cosine schedule with warm-up. Scenes never repeat, so there is no
augmentation. A first trial with the shapes alone learned nothing: after 300 steps the loss had its initial value.

    vitreg train deit3 --size m --registers 4        # 2 CPU cores: about an hour
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import training_images

from vitreg_lib.data.scenes import ATTRIBUTES, MEAN, STD, targets
from vitreg_lib.train import images

LEARNS_FROM = "labels"
WITH_DATA = "deit3_folder"
OPTIONS = {
    "layer_scale": (1e-4, "with --data: initial value of LayerScale"),
    "augment": ("3a", "with --data: timm's name of an augmentation; 3a is 3-Augment"),
    "loss": ("bce", "with --data: bce (binary cross-entropy), or ce (softmax cross-entropy)"),
    "crop": ("rrc", "with --data: rrc (random resized crop), or rkrr (short side to size, then a random crop)"),
    "color_jitter": (0.3, "with --data: strength of the colour jitter"),
    "mixup": (0.8, "with --data: alpha of mixup, 0 for none"),
    "cutmix": (1.0, "with --data: alpha of CutMix, 0 for none"),
    "smoothing": (0.0, "with --data: label smoothing"),
}
GRAPH = True
NUM_LABELS = sum(map(len, ATTRIBUTES.values()))


def build(config) -> torch.nn.Module:
    """A mini ViT with random weights and a linear head for the 24 labels."""
    return config.vit(NUM_LABELS, drop_path_rate=config.drop_path)


def backbone(module):
    """The ViT inside the module: itself."""
    return module


def loss(module, config, step, device):
    """Binary cross-entropy summed over the labels, and the accuracy of the shape on the batch."""
    batch = images.rendered(config, step, device)
    logits = module((batch.pixels - MEAN) / STD)
    wanted = torch.cat([F.one_hot(t, len(ATTRIBUTES[name])) for name, t in targets(batch).items()], 1).to(logits.dtype)
    value = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()
    return value, {"accuracy": (logits[:, :8].argmax(1) == batch.label).float().mean()}


def evaluate(module, config, device) -> dict[str, float]:
    """Accuracy (0 to 1) on held-out scenes for each attribute; `accuracy` is that of the shape, a scene's class."""
    correct = dict.fromkeys(ATTRIBUTES, 0)
    for pixels, labels in training_images.held_out_scenes(config, config.eval_images, device):
        logits = module((pixels - MEAN) / STD).split([len(names) for names in ATTRIBUTES.values()], 1)
        for part, (name, wanted) in zip(logits, labels.items(), strict=True):
            correct[name] += (part.argmax(1) == wanted).sum().item()
    shares = {f"accuracy_{name}": count / config.eval_images for name, count in correct.items()}
    return {"accuracy": shares["accuracy_shape"], **shares}
