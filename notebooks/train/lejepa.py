r"""Self-supervised training as LeJEPA (Balestriero & LeCun 2025): views agree, and their embeddings are Gaussian.

Each view of a scene must predict the mean embedding of the scene's whole views. This alone would have a trivial
solution, the same embedding for all images. So the embeddings of each view are also compared with a standard normal
distribution, along random directions, by the test of Epps and Pulley (SIGReg). There is no teacher, no prototype and no
mask. At this small size it learns more than DINOv2's loss: see docs/log.md.

    vitreg train lejepa --registers 4
"""

from __future__ import annotations

from operator import attrgetter

import torch
import training_images
import views
from dinov2 import backbone_of, beside_random, tokens
from torch import nn

from vitreg_lib.train import parallel

LEARNS_FROM = "images alone: views of a scene, without a teacher"
OPTIONS = {
    "global_size": (96, "pixels a side of the two whole crops"),
    "local_size": (32, "pixels a side of the small crops"),
    "local_crops": (0, "small crops of each image"),
    "antialias": (True, "resize position embeddings with antialiasing (Figure 10)"),
}
DEFAULTS = {
    "size": "s",
    "steps": 1500,
    "batch_size": 256,
    "learning_rate": 5e-3,
    "weight_decay": 0.04,
}
SEPARABLE = False  # the embeddings of a batch are compared with a distribution
GLOBAL, LOCAL = (0.5, 1.0), (0.15, 0.5)  # shares of the scene's area in whole and small crops
HIDDEN, WIDTH = 256, 64  # widths of the projector and of its output
SLICES, KNOTS, REACH = 256, 17, 3.0  # random directions; points of the characteristic function, from 0 to here
WEIGHT = 0.05  # of SIGReg, lambda in the paper


class LeJEPA(nn.Module):
    """A mini ViT and a projector; views are compared in the projector's output space."""

    def __init__(self, config):
        super().__init__()
        self.vit = backbone_of(config, drop_path_rate=config.drop_path)
        self.projector = nn.Sequential(
            nn.Linear(self.vit.embed_dim, HIDDEN, bias=False),
            nn.BatchNorm1d(HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN, bias=False),
            nn.BatchNorm1d(HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, WIDTH),
        )


build = LeJEPA
backbone = attrgetter("vit")
telemetry_images = training_images.telemetry_images


def loss(module, config, step, device):
    """(1 - lambda) × squared distance of all views to the mean of the whole ones + lambda × SIGReg."""
    batch, index = training_images.batch(config, step, device)
    crops = views.crops(batch, index, config, GLOBAL, LOCAL)
    groups = [torch.cat(part) for part in (crops[:2], crops[2:]) if part]  # crops of one size together
    cls = torch.cat([tokens(module.vit, x, antialias=config.antialias)[:, 0] for x in groups])
    given = module.projector(cls).float().unflatten(0, (len(crops), len(index)))  # (views, n, WIDTH)
    agree = (given - given[:2].mean(0)).square().mean()
    gauss = sigreg(torch.stack([parallel.gather(part) for part in given]))
    return (1 - WEIGHT) * agree + WEIGHT * gauss, {"agree": agree, "sigreg": gauss}


def sigreg(embeddings: torch.Tensor) -> torch.Tensor:
    """Distance of embeddings (views, n, dim) from a standard normal: a scalar, about 1 for a normal sample.

    The mean over views and random directions of n times the squared distance between the characteristic function of
    the projected sample and that of a standard normal, weighted by the latter (Epps and Pulley 1983).
    """
    slices = torch.randn(embeddings.shape[-1], SLICES, device=embeddings.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        along = embeddings @ (slices / slices.norm(dim=0))
    t = torch.linspace(0, REACH, KNOTS, device=embeddings.device)
    normal = (-t.square() / 2).exp()
    weight = normal * 2 * REACH / (KNOTS - 1)  # twice, for the negative half
    weight[[0, -1]] /= 2  # the trapezoidal rule
    at = along[..., None] * t
    distance = (at.cos().mean(1) - normal).square() + at.sin().mean(1).square()
    return (distance @ weight).mean() * embeddings.shape[1]


def evaluate(module, config, device) -> dict[str, float]:
    """As in the recipe dinov2: k-NN accuracy (0 to 1) of the cls token, and the same with random weights."""
    return beside_random(module.vit, config, device)
