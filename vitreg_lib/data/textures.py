"""Images of textures on which a small ViT grows artifacts: the data of the recipe `emergence`, described there."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ..base import unknown

GRID, PATCH = 6, 2
PATCHES, LENGTH = GRID * GRID, 3 * PATCH * PATCH
HELD_OUT = 1 << 30  # batches from this step on are never trained on
TO_LOOK_AT = 100  # of these, from this part on: images for notebooks
CORNERS = (0, GRID - 1, PATCHES - GRID, PATCHES - 1)
CHANGES = {  # what a name in a variant changes
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
    """What a variant asks, and of which ViT.

    idle: which patches never matter: "corners", "corner" (the first), "anywhere" (four random places an image, tinted,
    to be distinguishable) or "none" (a control).
    blank: idle patches hold zeros instead of a texture.
    kind: "copy" or "broadcast". trigger_share: of the patches that may be triggers.
    noise: standard deviation of what is added to the pixels; textures have 1.
    position: amplitude of the waves that position embeddings start from; 0: timm's own start. position_fixed: they stay
    so, as in MAE, instead of being learnt; position_decay: weight decay acts on them.
    attention_dropout: share of attention weights that are dropped.
    """

    idle: str = "corners"
    blank: bool = False
    kind: str = "copy"
    trigger_share: float = 0.25
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


SHIPPED = SimpleNamespace(variant="fixed+dropout+three-blocks+usual-mlp", seed=0)  # what mini-corners was trained on


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
    """What a run's images share: the rotation (12, 12) of what is copied, the hidden direction (12,) of `broadcast`."""
    generator = torch.Generator().manual_seed(7919 + seed)
    return {
        "rotation": torch.linalg.qr(torch.randn(LENGTH, LENGTH, generator=generator))[0],
        "direction": F.normalize(torch.randn(LENGTH, generator=generator), dim=0),
    }


def draw(config, step: int, part: slice = slice(None), device="cpu", count: int = 0) -> Batch:
    """The images of a step, or a `part` of them; `count` of them, by default `config.batch_size`."""
    t, shared, n = task(config), fixed(config.seed), count or config.batch_size
    generator = torch.Generator().manual_seed((config.seed * 2654435761 + step) % 2**32)  # the CPU's takes 32 bits
    texture = torch.randn(n, PATCHES, LENGTH, generator=generator)
    texture[..., -1] = 0.0
    chance = torch.rand(n, PATCHES, generator=generator)
    added = torch.randn(n, PATCHES, LENGTH, generator=generator)
    anywhere = torch.rand(n, PATCHES, generator=generator).topk(4, 1).indices
    idle = torch.zeros(n, PATCHES, dtype=torch.bool)
    if t.idle == "anywhere":
        idle.scatter_(1, anywhere, True)
    elif t.idle != "none":
        idle[:, list(CORNERS[:1] if t.idle == "corner" else CORNERS)] = True
    has_left = torch.arange(PATCHES) % GRID > 0
    trigger = has_left & ~idle & ~idle.roll(1, 1) & (chance < t.trigger_share) & (t.kind == "copy")
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
    parts = (to_images(pixels), texture, trigger, idle, ~idle, answer)
    return Batch(*(x[part].to(device) for x in parts))


def to_images(patches: torch.Tensor) -> torch.Tensor:
    """(n, 3, 12, 12) from the patches' pixels (n, 36, 12), each as colour, row, column."""
    split = patches.view(-1, GRID, GRID, 3, PATCH, PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, GRID * PATCH, GRID * PATCH)


def held_out(config, count: int, device="cpu", part: int = 0) -> Batch:
    """`count` images that are never trained on; another `part` has others."""
    return draw(config, HELD_OUT + part, device=device, count=count)
