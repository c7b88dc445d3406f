"""ViTs to train: timm's class at mini sizes, which two CPU cores can train, and at the paper's sizes."""

from torch import nn

from ..base import UserError

SIZES = {  # name: (embed_dim, depth, heads, mlp_ratio)
    "xxs": (16, 2, 1, 4.0),
    "xs": (16, 4, 1, 4.0),
    "s": (32, 6, 2, 4.0),
    "m": (48, 8, 3, 4.0),
    "l": (64, 8, 4, 4.0),
}
FULL = {  # the same, written with the patch: b/16, l/14
    "ti": (192, 12, 3, 4.0),
    "s": (384, 12, 6, 4.0),
    "b": (768, 12, 12, 4.0),
    "l": (1024, 24, 16, 4.0),
    "h": (1280, 32, 16, 4.0),
    "g": (1408, 40, 16, 48 / 11),  # Zhai et al. 2022; DINOv2's g is wider and has a SwiGLU
}


def start_registers(vit: nn.Module, std: float = 0.2) -> None:
    """Initialise a ViT's registers from a normal distribution with standard deviation `std`.

    timm uses 1e-6. Only their values distinguish registers, so with 1e-6 they stay copies of each other; with 0.02 they
    can also end nearly equal (docs/log.md).
    """
    if vit.reg_token is not None:
        nn.init.normal_(vit.reg_token, std=std)


def build(
    size: str = "m",
    registers: int = 0,
    num_classes: int = 8,
    image_size: int = 96,
    register_start: float = 0.2,
    **options,
) -> nn.Module:
    """A fresh ViT: cls token, LayerScale, any image size that patches divide; patches of 8 pixels at mini sizes.

    size: one of `SIZES`, or of `FULL` with the patch's side, as in "b/16". register_start: see
    `start_registers`. `options` go to timm's VisionTransformer.
    Raises UserError for an unknown size.
    """
    from timm.models.vision_transformer import VisionTransformer

    name, _, patch = size.partition("/")
    sizes, patch = (FULL, patch) if "/" in size else (SIZES, "8")
    if name not in sizes or not patch.isdigit():
        raise UserError(
            f"unknown mini size {size!r}; known are {', '.join(SIZES)}, and with a patch's side "
            + ", ".join(f"{name}/16" for name in FULL)
        )
    dim, depth, heads, ratio = sizes[name]
    if image_size % int(patch):
        raise UserError(f"{image_size} pixels a side are not a multiple of the patch's {patch}")
    arguments = dict(
        img_size=image_size,
        patch_size=int(patch),
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=ratio,
        num_classes=num_classes,
        reg_tokens=registers,
        no_embed_class=True,  # registers and cls carry no position, as in the paper
        init_values=0.1,
        dynamic_img_size=True,
    )
    arguments |= options
    model = VisionTransformer(**arguments)
    start_registers(model, register_start)
    model.vit_arguments = arguments  # written beside the weights, so that a checkpoint says how to build its model
    return model
