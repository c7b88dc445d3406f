r"""Training by reconstructing masked patches, as MAE (He et al. 2022); the encoder sees only the visible quarter.

It is used in Figure 17, which shows the principal components of a masked autoencoder.

    vitreg train mae --size m
    torchrun --nproc-per-node 8 -m vitreg_lib.cli train mae --size l/16 --data imagenet --image-size 224 \
        --optimizer adamw --learning-rate 2.4e-3 --batch-size 4096 --steps 250000 --warmup 12500    # not run here
"""

from __future__ import annotations

from operator import attrgetter

import torch
import training_images
import views
from dinov2 import with_prefix
from torch import nn

from vitreg_lib.data.scenes import HELD_OUT, MEAN, STD, uniform
from vitreg_lib.model import mini
from vitreg_lib.probes.local import patch_pixels

LEARNS_FROM = "images alone: pixels of masked patches"
OPTIONS = {"mask_ratio": (0.75, "share of patches that are hidden")}
DEFAULTS = {"steps": 500, "batch_size": 128}
GRAPH = True
DECODER = {"dim": 48, "depth": 2, "heads": 3}  # of mini ViTs
FULL_DECODER = {"dim": 512, "depth": 8, "heads": 16}  # MAE's, for full-size ViTs (ti/16 and larger)
SCALE = (0.2, 1.0)  # with --data: share of an image's area in a crop, as in MAE; scenes are not cropped


class MaskedAutoencoder(nn.Module):
    """A mini ViT as the encoder, and a decoder that predicts pixels from the encoder's output and mask tokens."""

    def __init__(self, config):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.encoder = config.vit(drop_path_rate=config.drop_path)
        self.patch_size = self.encoder.patch_embed.patch_size[0]
        decoder = DECODER if config.size in mini.SIZES else FULL_DECODER
        dim, heads = decoder["dim"], decoder["heads"]
        self.enter = nn.Linear(self.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.places = nn.Parameter(0.02 * torch.randn(1, self.encoder.patch_embed.num_patches, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads=heads, qkv_bias=True) for _ in range(decoder["depth"])))
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, 3 * self.patch_size**2)

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Pixels (n, patches, 3 * patch_size^2) of every patch from the `visible` ones, indices (n, k)."""
        vit = self.encoder
        x = vit.patch_embed(images).flatten(1, 2) + vit.pos_embed
        x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))
        x = vit.norm(vit.blocks(vit.norm_pre(with_prefix(vit, x))))[:, vit.num_prefix_tokens :]
        x = self.enter(x)
        full = self.mask_token.to(x.dtype).expand(len(x), self.places.shape[1], -1)
        full = full.scatter(1, visible[..., None].expand_as(x), x) + self.places
        return self.pixels(self.norm(self.blocks(full)))


build = MaskedAutoencoder
backbone = attrgetter("encoder")
telemetry_images = training_images.telemetry_images


def loss(module, config, step, device):
    """Mean squared error on masked patches; each patch's pixels are normalised by its mean and standard deviation."""
    pixels, index = training_images.batch(config, step, device)
    if config.data:
        pixels = views.crop(pixels, index, config.image_size, SCALE, config.seed, 0, lit=False)
    value, plain = _error(module, config, pixels, index)
    return value, {"of_mean": value / plain}


def split(index: torch.Tensor, patches: int, mask_ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of visible and of masked patches (n, …) of the images `index`; they do not depend on the batch."""
    order = uniform(index, patches, seed * 1009 + 997).argsort(1)
    visible = max(1, round(patches * (1 - mask_ratio)))
    return order[:, :visible], order[:, visible:]


def evaluate(module, config, device) -> dict[str, float]:
    """`error`: squared error on masked patches of held-out images, over that of predicting each patch's mean."""
    errors = []
    for first in range(0, config.eval_images, 256):
        pixels = training_images.held_out(config, config.telemetry_images + first, min(256, config.eval_images - first))
        if len(pixels):
            index = torch.arange(len(pixels), device=device) + HELD_OUT + first
            errors.append([value.item() for value in _error(module, config, pixels.to(device), index)])
    error, plain = torch.tensor(errors).mean(0).tolist()
    return {"error": error / plain}


def _error(module, config, images, index):
    """Squared error on the masked patches of images in [0, 1], and that of predicting their mean."""
    visible, masked = split(index, module.places.shape[1], config.mask_ratio, config.seed)
    target = patch_pixels(images, module.patch_size)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-4).sqrt()
    predicted = module((images - MEAN) / STD, visible)
    at = masked[..., None].expand(-1, -1, target.shape[2])
    wanted = target.gather(1, at)
    return (predicted.gather(1, at) - wanted).square().mean(), wanted.square().mean()
