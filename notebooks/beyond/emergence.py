"""A task on textures for the smallest ViT that needs registers: some patches never matter.

This training task is designed for one question and has no other use. An image is a grid of 6 x 6 patches of 2 x 2
pixels. Each patch holds 11 random numbers, its texture; the twelfth number is a mark, 0 or 1. Every patch must output
its own texture. A *trigger*, a patch whose mark is 1, must output its own texture plus a fixed rotation of its left
neighbour's. So a head that copies is needed at few patches; at all others it must attend to a place where it does no
harm. This is Bigram-Backcopy (Guo et al. 2024) in the form of images. Some patches are *idle*: they look like all
others, but no output is required of them, they are never triggers, and nothing is copied from them. By default the idle
patches are the four corners, since the corners of photos rarely matter. There is no uniform background and, by default,
no cls token. The loss contains neither norms nor attention.

The ViT is a small one of timm: three blocks with the usual MLP, fixed position embeddings of sines and cosines (as in
MAE) and attention dropout. If the copying head forms in a block after the first, a few neurons of an earlier MLP give
the corners a large norm. If it forms in the first block, no MLP comes before it, and there are no outliers. In a ViT of
one block with learned position embeddings, these embeddings have the large norm themselves.

In the task `broadcast` (the two-layer toy model of Fesser et al. 2026) every patch outputs its own texture plus a fixed
rotation of the texture of the patch with the highest score along a hidden direction.

`CHANGES` has the variants, workflow/sweep.py runs them, data/sweeps/emergence.parquet has the results, and the notebook
beyond/emergence.ipynb shows them.

    vitreg train emergence                      # one CPU core: a minute or two
    vitreg train emergence --registers 4
    vitreg train emergence --variant fixed+three-blocks+usual-mlp      # without dropout
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitreg_lib.base import UserError, unknown
from vitreg_lib.data import textures
from vitreg_lib.data.textures import CORNERS, GRID, LENGTH, PATCH, PATCHES
from vitreg_lib.model import mini
from vitreg_lib.train import parallel

LEARNS_FROM = "an artificial task, for the study of how artifacts begin"
OPTIONS = {"variant": ("fixed+dropout+three-blocks+usual-mlp", "names of CHANGES joined by +")}
DEFAULTS = {
    "image_size": 12,
    "steps": 6000,
    "batch_size": 16,
    "learning_rate": 0.01,
    "weight_decay": 0.4,
    "optimizer": "adamw",
    "eval_images": 512,
    "telemetry_images": 32,
    "save_every": 1000,
}
CHANGES = {  # the fields of `Task` that each name in a variant sets
    "corners": {},
    "fixed": {"position_fixed": True},
    "decay": {"position_decay": True},
    "dropout": {"attention_dropout": 0.1},
    "nothing-idle": {"idle": "none"},
    "blank-corners": {"blank": True},
    "anywhere": {"idle": "anywhere"},
    "one-corner": {"idle": "corner"},
    "cls-token": {"cls_token": True},
    "two-blocks": {"depth": 2},
    "three-blocks": {"depth": 3},
    "half-mlp": {"mlp_ratio": 0.5},
    "usual-mlp": {"mlp_ratio": 4.0},
    "layer-scale": {"layer_scale": 0.1},
    "noise": {"noise": 0.3},
    "plain-start": {"position": 0.0},
    "four-heads": {"heads": 4},
    "broadcast": {"kind": "broadcast", "depth": 2},
}


@dataclass(frozen=True)
class Task:
    """The task and the ViT of a variant.

    idle: which patches never matter: "corners", "corner" (the first), "anywhere" (four random places in each image,
    tinted so that the model can distinguish them) or "none" (a control).
    blank: idle patches hold zeros instead of a texture.
    kind: "copy" or "broadcast". trigger_share: share of triggers among the patches that may be triggers.
    noise: standard deviation of the noise added to the pixels; textures have 1.
    position: amplitude of the waves that initialise the position embeddings; 0: timm's initialisation. position_fixed:
    they are not trained, as in MAE; position_decay: weight decay acts on them.
    attention_dropout: share of attention weights that are dropped.
    """

    idle: str = "corners"
    blank: bool = False
    kind: str = "copy"
    trigger_share: float = textures.MARKED
    noise: float = 0.0
    dim: int = 24
    depth: int = 1
    heads: int = 2
    mlp_ratio: float = 0.125
    layer_scale: float = 0.0
    position: float = 1.0
    position_fixed: bool = False
    position_decay: bool = False
    attention_dropout: float = 0.0
    cls_token: bool = False


def task(config) -> Task:
    """The `Task` of `config.variant`: names of `CHANGES` joined by "+". Raises UserError for an unknown one."""
    changes = {}
    for name in config.variant.split("+"):
        if name not in CHANGES:
            raise unknown("variant of emergence", name, CHANGES)
        changes |= CHANGES[name]
    return Task(**changes)


@dataclass
class Batch:
    """pixels (n, 3, 12, 12); texture and answer (n, 36, 12); trigger, idle and asked (n, 36): masks."""

    pixels: torch.Tensor
    texture: torch.Tensor
    trigger: torch.Tensor
    idle: torch.Tensor
    asked: torch.Tensor
    answer: torch.Tensor


@functools.lru_cache(maxsize=8)
def fixed(seed: int) -> dict[str, torch.Tensor]:
    """Constants of a run: the rotation (12, 12) of copied textures, the hidden direction (12,) of `broadcast`."""
    generator = torch.Generator().manual_seed(7919 + seed)
    return {
        "rotation": torch.linalg.qr(torch.randn(LENGTH, LENGTH, generator=generator))[0],
        "direction": F.normalize(torch.randn(LENGTH, generator=generator), dim=0),
    }


def draw(config, step: int, part: slice = slice(None), device="cpu", count: int = 0) -> Batch:
    """The images of a step, or a `part` of them. A step has `count` images, by default `config.batch_size`."""
    t, shared, n = task(config), fixed(config.seed), count or config.batch_size
    texture, chance, generator = textures.draw(config.seed, step, n)
    added = torch.randn(n, PATCHES, LENGTH, generator=generator)
    anywhere = torch.rand(n, PATCHES, generator=generator).topk(4, 1).indices
    idle = torch.zeros(n, PATCHES, dtype=torch.bool)
    if t.idle == "anywhere":
        idle.scatter_(1, anywhere, True)
    elif t.idle != "none":
        idle[:, list(CORNERS[:1] if t.idle == "corner" else CORNERS)] = True
    trigger = textures.marked(chance, idle, t.trigger_share) & (t.kind == "copy")
    texture[..., -1] = trigger.float()
    if t.blank:
        texture[idle] = 0.0
    pixels = texture + t.noise * added
    if t.idle == "anywhere":
        pixels[..., : PATCH * PATCH] += 2.0 * idle[..., None]  # redder
    answer = texture + trigger[..., None] * (texture.roll(1, 1) @ shared["rotation"])
    if t.kind == "broadcast":
        best = (texture @ shared["direction"]).masked_fill(idle, -torch.inf).argmax(1)
        answer = texture + (texture[torch.arange(n), best] @ shared["rotation"])[:, None]
    parts = (textures.to_images(pixels), texture, trigger, idle, ~idle, answer)
    return Batch(*(x[part].to(device) for x in parts))


def held_out(config, count: int, device="cpu", part: int = 0) -> Batch:
    """`count` images that are never used in training; each `part` has different ones."""
    return draw(config, textures.HELD_OUT + part, device=device, count=count)


def build(config) -> torch.nn.Module:
    """A ViT with random weights and an output at every token."""
    if config.data:
        raise UserError(f"data={config.data!r}: emergence makes its own images")
    t = task(config)
    model = answering(t, config, GRID, PATCH)
    if t.position_decay:
        model.no_weight_decay = set  # timm's class names position embeddings, cls and registers
    return model


def answering(t: Task, config, grid: int, patch: int) -> torch.nn.Module:
    """timm's ViT without pooling, of a `Task`'s sizes, for images of `grid` x `grid` patches of `patch` pixels."""
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=t.dim,
        depth=t.depth,
        num_heads=t.heads,
        mlp_ratio=t.mlp_ratio,
        num_classes=LENGTH,
        global_pool="",
        class_token=t.cls_token,
        reg_tokens=config.registers,
        no_embed_class=True,
        init_values=t.layer_scale or None,
        attn_drop_rate=t.attention_dropout,
        weight_init="moco",  # Xavier: at this width, with timm's default of 0.02, the model does not learn to copy
    )
    model = VisionTransformer(**arguments)
    mini.start_registers(model, config.register_start)
    if t.position:
        model.pos_embed.data.copy_(t.position * waves(t.dim, grid))
    model.pos_embed.requires_grad_(not t.position_fixed)
    model.vit_arguments = arguments
    return model


def waves(dim: int, grid: int = GRID) -> torch.Tensor:
    """(grid², dim) sines and cosines of row and column, of mean square 1; they make neighbours easy to learn."""
    frequency = torch.pi / grid * 2.0 ** torch.linspace(-1, 2, dim // 4)
    angle = torch.arange(grid)[:, None] * frequency
    one = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim / 2)
    return torch.cat([one.repeat_interleave(grid, 0), one.repeat(grid, 1)], 1)


def backbone(module):
    """The ViT inside the module: itself."""
    return module


def errors(module, batch: Batch) -> torch.Tensor:
    """(n, 36) mean squared error of each patch's answer; a texture has variance 1."""
    given = module(batch.pixels)[:, module.num_prefix_tokens :]
    return (given - batch.answer).square().mean(-1)


def named(error: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """The mean error at triggers and at the other patches with a required output."""
    others = error[batch.asked & ~batch.trigger].mean()
    return {"trigger_error": error[batch.trigger].mean(), "other_error": others}


def loss(module, config, step, device):
    """(Mean squared error over the patches with a required output, the errors of `named`)."""
    indices = parallel.batch_range(config, step)
    first = indices.start - step * config.batch_size
    batch = draw(config, step, slice(first, first + len(indices)), device)
    error = errors(module, batch)
    # each image has equally many idle patches, so the mean of a batch is the mean over its parts
    return error[batch.asked].mean(), named(error.detach(), batch)


def telemetry_images(config) -> torch.Tensor:
    """The held-out images whose norms are recorded during training."""
    return held_out(config, config.telemetry_images).pixels


def evaluate(module, config, device) -> dict[str, float]:
    """Errors on held-out images, at triggers and at other patches; an output of zeros has the error 1 on a texture."""
    batch = held_out(config, config.eval_images, device, part=1)
    return {name: value.item() for name, value in named(errors(module, batch), batch).items()}
