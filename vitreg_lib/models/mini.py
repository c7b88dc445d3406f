"""The mini ViTs: timm's own class at sizes that two CPU cores train in minutes to an hour."""

from __future__ import annotations

from torch import nn

SIZES = {  # name: (embed_dim, depth); heads of 16
    "xxs": (16, 2),
    "xs": (16, 4),
    "s": (32, 6),
    "m": (48, 8),
    "l": (64, 8),
}


def build(size: str = "m", registers: int = 0, num_classes: int = 8, image_size: int = 96, **options) -> nn.Module:
    """A fresh mini ViT: patches of 8 pixels, cls token, LayerScale, any image size that patches divide.

    `options` go to timm's VisionTransformer. Raises ValueError for an unknown size.
    """
    from timm.models.vision_transformer import VisionTransformer

    if size not in SIZES:
        raise ValueError(f"unknown mini size {size!r}; known are {', '.join(SIZES)}")
    dim, depth = SIZES[size]
    arguments = dict(
        img_size=image_size,
        patch_size=8,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 16,
        num_classes=num_classes,
        reg_tokens=registers,
        no_embed_class=True,  # registers and cls carry no position, as in the paper
        init_values=0.1,
        dynamic_img_size=True,
    )
    arguments |= options
    model = VisionTransformer(**arguments)
    model.vit_arguments = arguments  # written beside the weights, so that a checkpoint says how to build its model
    return model
