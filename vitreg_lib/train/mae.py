"""Training by filling in masked patches, as MAE (He et al. 2022): only the visible quarter goes through the encoder.

For Figure 17, which compares the principal components of a masked autoencoder with those of DINOv2. Small.

    vitreg train mae --size m
"""

from __future__ import annotations

import torch
from torch import nn

from ..data import scenes
from ..models import mini
from ..probes.reconstruction import patch_pixels
from . import parallel
from .deit3 import HELD_OUT, MEAN, STD, telemetry_images

__all__ = ["backbone", "build", "evaluate", "loss", "telemetry_images"]

DEFAULTS = {"steps": 500, "batch_size": 128}
DECODER_DIM, DECODER_DEPTH = 48, 2


class MaskedAutoencoder(nn.Module):
    """A mini ViT as the encoder; a decoder that sees its output and mask tokens and gives pixels."""

    def __init__(self, config):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.encoder = mini.build(config.size, config.registers, 0, config.image_size, drop_path_rate=config.drop_path)
        self.enter = nn.Linear(self.encoder.embed_dim, DECODER_DIM)
        self.mask_token = nn.Parameter(torch.zeros(DECODER_DIM))
        self.places = nn.Parameter(0.02 * torch.randn(1, self.encoder.patch_embed.num_patches, DECODER_DIM))
        self.blocks = nn.Sequential(*(Block(DECODER_DIM, num_heads=3, qkv_bias=True) for _ in range(DECODER_DEPTH)))
        self.norm = nn.LayerNorm(DECODER_DIM)
        self.pixels = nn.Linear(DECODER_DIM, 3 * 8 * 8)

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Pixels (n, patches, 192) of every patch from the `visible` ones, indices (n, k)."""
        vit = self.encoder
        x = vit.patch_embed(images).flatten(1, 2) + vit.pos_embed
        x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))
        prefix = [vit.cls_token] + ([vit.reg_token] if vit.reg_token is not None else [])
        x = torch.cat([*(p.expand(len(x), -1, -1) for p in prefix), x], 1)
        x = vit.norm(vit.blocks(vit.norm_pre(x)))[:, vit.num_prefix_tokens :]
        x = self.enter(x)
        full = self.mask_token.to(x.dtype).expand(len(x), self.places.shape[1], -1)
        full = full.scatter(1, visible[..., None].expand(-1, -1, DECODER_DIM), x) + self.places
        return self.pixels(self.norm(self.blocks(full)))


def build(config) -> nn.Module:
    """A fresh encoder with its decoder."""
    return MaskedAutoencoder(config)


def backbone(module):
    """The encoder."""
    return module.encoder


def loss(module, config, step, device):
    """Mean squared error on masked patches; each patch's pixels are normalised by its own mean and deviation."""
    mine = parallel.batch_range(config, step)
    index = torch.arange(mine.start, mine.stop, device=device)
    value, plain = _error(module, config, index, device)
    return value, {"of_mean": (value / plain).item()}


def split(index: torch.Tensor, patches: int, mask_ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of visible and of masked patches (n, …) of images `index`, drawn by image, not by batch."""
    order = scenes.uniform(index, patches, seed * 1009 + 997).argsort(1)
    visible = max(1, round(patches * (1 - mask_ratio)))
    return order[:, :visible], order[:, visible:]


@torch.no_grad()
def evaluate(module, config, device) -> dict[str, float]:
    """`error`: squared error on masked patches of held-out scenes over that of their own means (1: nothing learnt)."""
    module.eval()
    first = HELD_OUT + config.telemetry_images
    parts = torch.arange(first, first + config.eval_images, device=device).split(256)
    errors = torch.tensor([[v.item() for v in _error(module, config, part, device)] for part in parts])
    error, plain = errors.mean(0).tolist()
    return {"error": error / plain}


def _error(module, config, index, device):
    """Squared error on the masked patches, and that of predicting their mean."""
    batch = scenes.render(index, config.image_size, config.seed, device)
    visible, masked = split(index, module.places.shape[1], config.mask_ratio, config.seed)
    target = patch_pixels(batch.pixels, 8)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-4).sqrt()
    said = module((batch.pixels - MEAN) / STD, visible)
    at = masked[..., None].expand(-1, -1, target.shape[2])
    wanted = target.gather(1, at)
    return (said.gather(1, at) - wanted).square().mean(), wanted.square().mean()
