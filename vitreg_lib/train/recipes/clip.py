r"""Training on images with captions, as CLIP (Radford et al. 2021; OpenCLIP): each finds the other in the batch.

The image tower is a mini ViT whose head projects the cls token; the text tower, the tokenizer and the loss are
open_clip's. A scene's caption names its main object (texture, colour, shape), one other and where it is, and the kind
of background.

    vitreg train clip --registers 4
    torchrun --nproc-per-node 8 -m vitreg_lib.cli train clip --size b/16 --registers 4 --data PAIRS --image-size 224 \
        --embed-dim 512 --text-width 512 --text-layers 12 --context 77 --optimizer adamw --learning-rate 1e-3 \
        --weight-decay 0.2 --batch-size 4096 --steps 500000 --warmup 2000    # not run here
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn

from ...data.scenes import ATTRIBUTES, MEAN, STD
from ...model.text import TEMPLATES, text_tower, tokenizer
from ...probes import zeroshot
from .. import images, parallel
from . import new_vit

DEFAULTS = {"size": "s", "steps": 800, "batch_size": 128}
SEPARABLE = False  # each image is compared with all captions of the batch


class Clip(nn.Module):
    """Image and text tower and the logarithm of the scale between them, the inverse of CLIP's temperature."""

    def __init__(self, config):
        super().__init__()
        self.visual = new_vit(config, config.embed_dim, drop_path_rate=config.drop_path)
        self.text = text_tower(config.text_width, config.text_layers, config.embed_dim, config.context)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, embed_dim), of length one, of normalised images (n, 3, h, w)."""
        return F.normalize(self.visual(pixels), dim=1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """(n, embed_dim), of length one, of token ids (n, context)."""
        return F.normalize(self.text(text), dim=1)


build = Clip
backbone = attrgetter("visual")  # the image tower


def companions(module) -> dict[str, dict]:
    """The text tower, which ships beside the image tower."""
    return {"text": module.text.state_dict()}


def loss(module, config, step, device):
    """Cross-entropy of finding each image's caption and each caption's image among those of all ranks."""
    from open_clip.loss import ClipLoss

    pixels, captions = images.pairs(config, step, device)
    image = parallel.gather(module.encode_image((pixels - MEAN) / STD))
    text = parallel.gather(module.encode_text(tokenizer(config.context)(captions).to(device)))
    scale = module.logit_scale.clamp(max=math.log(100)).exp()
    value = ClipLoss()(image, text, scale)
    with torch.no_grad():
        correct = (image @ text.T).argmax(1) == torch.arange(len(image), device=device)
    return value, {"accuracy": correct.float().mean().item(), "scale": scale.item()}


def class_embeddings(encode_text, attribute: str, device="cpu") -> torch.Tensor:
    """(classes, embed_dim): the mean of the prompts of each value of an attribute, of length one again."""
    return zeroshot.class_embeddings(
        encode_text, tokenizer(), ATTRIBUTES[attribute], TEMPLATES[attribute], device=device
    )


@torch.no_grad()
def evaluate(module, config, device) -> dict[str, float]:
    """Zero-shot accuracy (0 to 1) on held-out scenes by attribute; `zeroshot` is their mean.

    With pairs of one's own `retrieval`: the share of held-out images whose own caption is the nearest of all.
    """
    module.eval()
    if config.data:
        pixels, captions = images.pairs_held_out(config)
        pictures = [module.encode_image((part.to(device) - MEAN) / STD) for part in pixels.split(64)]
        ids = tokenizer(config.context)(captions).to(device)
        texts = [module.encode_text(part) for part in ids.split(64)]
        nearest = (torch.cat(pictures) @ torch.cat(texts).T).argmax(1).cpu()
        return {"retrieval": (nearest == torch.arange(len(pixels))).float().mean().item()}
    classes = {name: class_embeddings(module.encode_text, name, device) for name in ATTRIBUTES}
    correct = dict.fromkeys(ATTRIBUTES, 0)
    for pixels, labels in images.held_out_scenes(config, config.eval_images, device):
        image = module.encode_image((pixels - MEAN) / STD)
        for name, wanted in labels.items():
            correct[name] += ((image @ classes[name].T).argmax(1) == wanted).sum().item()
    shares = {f"zeroshot_{name}": count / config.eval_images for name, count in correct.items()}
    return {"zeroshot": sum(shares.values()) / len(shares), **shares}
