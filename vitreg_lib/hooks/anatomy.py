"""Where things are in a vision transformer: blocks, tokens, heads, patch grid.

Everything that counts tokens asks here, and the answer comes from the model, never from a literal.
Known families: timm's VisionTransformer and Eva (DeiT, DINO, DINOv2, DINOv3, CLIP, MAE, EVA-02 …).
A token sequence is (cls, registers, patches) in that order, each part possibly empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """Sizes and parts of one model; holds references into the model, never copies.

    blocks: the transformer blocks, block 0 first. attention: each block's attention module.
    mlp: each block's feed-forward module.
    has_cls, num_registers, num_prefix_tokens: cls (0 or 1) + registers = prefix tokens.
    embed_dim, num_heads, head_dim, patch_size = (rows, cols) in pixels.
    """

    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    patch_embed: nn.Module
    norm: nn.Module
    has_cls: bool
    num_registers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    patch_size: tuple[int, int]

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.has_cls) + self.num_registers

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def grid(self, images: torch.Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) of images (batch, 3, height, width).

        Raises ValueError where the sides are not multiples of the patch.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into patches of "
                f"{self.patch_size[0]} x {self.patch_size[1]}; resize them to a multiple"
            )
        return height // self.patch_size[0], width // self.patch_size[1]

    def layers(self, wanted: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
        """Block numbers from 0, with negative ones counted from the end; all blocks for None.

        Raises ValueError for a layer that the model does not have.
        """
        if wanted is None:
            return tuple(range(self.depth))
        wanted = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        for layer in wanted:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"layer {layer} out of range for {self.depth} blocks (0…{self.depth - 1}, or -1)")
        return tuple(layer % self.depth for layer in wanted)


def dissect(model: nn.Module) -> Anatomy:
    """The `Anatomy` of a timm VisionTransformer or Eva model.

    Raises TypeError for a model without blocks, patch embedding and prefix tokens in timm's naming, and for
    blocks without one attention and one feed-forward module.
    """
    parts = ("blocks", "patch_embed", "norm", "num_prefix_tokens", "embed_dim")
    if missing := [part for part in parts if not hasattr(model, part)]:
        raise TypeError(f"{type(model).__name__} has no {', '.join(missing)}: not a ViT in timm's layout")
    blocks = tuple(model.blocks)
    for name in ("attn", "mlp"):
        if not all(hasattr(block, name) for block in blocks):
            raise TypeError(f"{type(blocks[0]).__name__} has no .{name}: blocks of this kind are not known here")
    attention = tuple(block.attn for block in blocks)
    has_cls = getattr(model, "cls_token", None) is not None
    heads = attention[0].num_heads
    return Anatomy(
        blocks=blocks,
        attention=attention,
        mlp=tuple(block.mlp for block in blocks),
        patch_embed=model.patch_embed,
        norm=model.norm,
        has_cls=has_cls,
        num_registers=model.num_prefix_tokens - int(has_cls),
        embed_dim=model.embed_dim,
        num_heads=heads,
        head_dim=getattr(attention[0], "head_dim", model.embed_dim // heads),
        patch_size=tuple(model.patch_embed.patch_size),
    )


def layer_scale(block: nn.Module, branch: int) -> torch.Tensor | None:
    """(dim,) LayerScale of a block's attention (branch 1) or MLP (branch 2); None where it has none.

    A parameter of `ls1`, `ls2` in timm's VisionTransformer, and `gamma_1`, `gamma_2` of the block itself in Eva.
    """
    scale = getattr(getattr(block, f"ls{branch}", None), "gamma", None)
    return getattr(block, f"gamma_{branch}", None) if scale is None else scale
