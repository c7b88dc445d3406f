"""The parts of a vision transformer: blocks, named tokens, heads, patch grid, and the function that runs it.

All code that counts tokens uses this module, which reads the counts from the model. `dissect` recognises a model by its
structure, not by its name: a list of equal blocks with attention, a patch embedding, and parameters of prefix tokens.
It recognises timm's VisionTransformer and Eva, the ViTs of transformers and torchvision, and the image towers of
open_clip and OpenAI's CLIP, also inside a larger model or a wrapper. `describe` names the parts of any other model.

A token sequence is (prefix tokens, patches), the patches row by row. `capture` checks that each block's tokens have
this form.
"""

import inspect
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..base import UserError

PREFIX = {  # names of the parameters of prefix tokens, in the order in which all families put the tokens
    "cls": ("cls_token", "class_token", "class_embedding"),
    "dist": ("dist_token", "distillation_token"),
    "register": ("reg_token", "register_tokens"),
}
ADDED = "added_registers"  # the buffer of block 0 that holds tokens added at test time
HEADS = ("num_heads", "num_attention_heads")
# embeddings of patches that are cut already: their class, and its layer that comes before any position
EMBEDS_CUT = {"NaFlexEmbeds": "proj", "Siglip2VisionEmbeddings": "patch_embedding"}
NORMS = ("norm", "layernorm", "post_layernorm", "ln_post", "encoder.ln", "encoder.norm", "rms_norm")


class Unrecognised(UserError, TypeError):
    """No ViT is recognised in a module."""


class Unmeasurable(UserError, ValueError):
    """A model cannot be measured, or cannot be measured correctly on these images."""


class PrefixTokens:
    """Properties derived from `prefix`, the names of the tokens before the patches: "cls", "dist", "register 1" …"""

    prefix: tuple[str, ...]

    @property
    def has_cls(self) -> bool:
        return "cls" in self.prefix

    @property
    def registers(self) -> list[int]:
        """Positions of the registers among the tokens."""
        return [place for place, name in enumerate(self.prefix) if name.startswith("register")]

    @property
    def num_registers(self) -> int:
        return len(self.registers)

    @property
    def num_prefix_tokens(self) -> int:
        return len(self.prefix)


@dataclass(frozen=True)
class Anatomy(PrefixTokens):
    """Sizes and parts of one model; holds references into the model, never copies.

    blocks: the transformer blocks, block 0 first. attention: each block's attention module. mlp_out: each block's last
    linear layer, which the MLP's activations enter; empty where there is none. patch_embed: gives the patches'
    embeddings, before any position. norm: the final LayerNorm of tokens; None where none is recognised. patch_size:
    (rows, cols) in pixels. channels: number of image channels. batch_first: whether blocks take (batch, tokens, dim),
    else (tokens, batch, dim). forward: runs the model on images.
    """

    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    patch_embed: nn.Module
    norm: nn.Module | None
    prefix: tuple[str, ...]
    embed_dim: int
    num_heads: int
    head_dim: int
    patch_size: tuple[int, int]
    forward: Callable
    channels: int = 3
    batch_first: bool = True

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def grid(self, images: torch.Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) of images (batch, channels, height, width).

        Raises ValueError for another number of channels, and where the sides are not multiples of the patch.
        """
        channels, height, width = images.shape[-3:]
        if channels != self.channels:
            raise Unmeasurable(f"images of {channels} channels: this model takes {self.channels}")
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise Unmeasurable(
                f"images of {height} x {width} pixels do not divide into patches of "
                f"{self.patch_size[0]} x {self.patch_size[1]}; resize them to a multiple"
            )
        return height // self.patch_size[0], width // self.patch_size[1]

    def layers(self, wanted: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
        """Block numbers from 0, each once, with negative ones counted from the end; all blocks for None.

        Raises ValueError for a layer that the model does not have.
        """
        if wanted is None:
            return tuple(range(self.depth))
        wanted = [wanted] if hasattr(wanted, "__index__") else list(wanted)
        if bad := [layer for layer in wanted if not -self.depth <= layer < self.depth] or ([] if wanted else ["none"]):
            raise ValueError(f"layer {bad[0]} out of range for {self.depth} blocks (0…{self.depth - 1}, or -1)")
        return tuple(dict.fromkeys(operator.index(layer) % self.depth for layer in wanted))

    def tokens(self, output, batch: int, grid: tuple[int, int]) -> torch.Tensor:
        """A block's output as (batch, tokens, dim). Raises ValueError where its shape does not match the anatomy."""
        x = output[0] if isinstance(output, tuple) else output
        x = x if self.batch_first or x.dim() != 3 else x.transpose(0, 1)
        expected = (batch, len(self.prefix) + grid[0] * grid[1], self.embed_dim)
        if tuple(x.shape) != expected:
            prefix = " + ".join(filter(None, [", ".join(self.prefix), f"{grid[0]} x {grid[1]} patches"]))
            raise Unmeasurable(
                f"a block gives {tuple(x.shape)}, but {expected} was expected ({prefix}): a model whose tokens or grid "
                "change on the way cannot be measured; `vr.describe` corrects what was recognised wrongly"
            )
        return x


def describe(
    module: nn.Module,
    *,
    blocks: str,
    patch: int | tuple[int, int],
    attention: str = "attn",
    mlp_out: str | None = None,
    prefix: tuple[str, ...] = ("cls",),
    norm: str | None = None,
    patch_embed: str | None = None,
    heads: int | None = None,
    forward: Callable | None = None,
) -> nn.Module:
    """The module itself, with a description for `dissect`, which does not recognise the model without it.

    blocks: name of the list of blocks, as "encoder.layers". attention, mlp_out: names inside a block of the attention
    module and of the linear layer that the MLP's activations enter. patch: side in pixels. prefix: names of the tokens
    before the patches, in order: "cls", "dist", "register 1" … norm, patch_embed: names of the final LayerNorm ("" for
    none) and of the patch convolution, by default the usual names. heads: number of heads, needed where the attention
    module does not state it. forward: a function of (module, images), by default the module's own call. Raises
    TypeError for a name that does not exist.
    """
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    names = dict(blocks=blocks, attention=attention, mlp_out=mlp_out, norm=norm, patch_embed=patch_embed)
    kinds = [name.split()[0] for name in prefix]
    if not set(kinds) <= set(PREFIX) or kinds != sorted(kinds, key=[*PREFIX].index):
        raise Unrecognised(f'prefix {tuple(prefix)}: write "cls", "dist", "register 1" …, which stand in this order')
    named = names | dict(patch=patch, prefix=tuple(prefix), heads=heads, forward=forward)
    _described(module, **named)  # refuses wrong names before the module is changed
    module.vitreg_description = named
    return module


def dissect(model: nn.Module) -> Anatomy:
    """The `Anatomy` of a vision transformer, by its description or by its structure.

    In a larger model, with a text tower, a head or a wrapper, it describes the smallest part that has blocks and a
    patch embedding. Raises TypeError where no part has them.
    """
    if named := getattr(model, "vitreg_description", None):
        return _described(model, **named)
    parts = list(model.named_modules())
    embeddings = [name for name, _ in parts if name.split(".")[-1] == "patch_embed"]
    embeddings += [name for name, part in parts if type(part).__name__ in EMBEDS_CUT]
    embeddings += [name for name, part in parts if cuts_patches(part)]
    lists = [name for name, part in parts if _is_blocks(part)]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if not embeddings or not lists:
        missing = [] if lists else ["no list of equal blocks with attention"]
        missing += [] if embeddings else ["no patch embedding"]
        raise Unrecognised(
            f"{type(model).__name__} has {' and '.join(missing)}: no ViT is recognised in it; `vr.describe` says by "
            "hand where its parts are"
        )
    # the deepest part that holds both; at equal depth the first, because an encoder precedes its decoder
    pairs = [(_common(blocks, embedding), blocks, embedding) for blocks in lists for embedding in embeddings]
    root, blocks, embedding = max(pairs, key=lambda pair: len(pair[0].split(".")) if pair[0] else 0)
    vit = model.get_submodule(root)
    return _anatomy(vit, tuple(model.get_submodule(blocks)), model.get_submodule(embedding))


def cuts_patches(part: nn.Module) -> bool:
    """Whether a layer is a convolution of images that maps each patch by itself: its windows lie side by side."""
    images = isinstance(part, nn.Conv2d) and part.in_channels < 16 and part.groups == 1
    return images and part.kernel_size == part.stride and min(part.stride) > 1 and part.padding in ((0, 0), "valid")


def _is_blocks(part: nn.Module) -> bool:
    """Whether a list holds modules of one class that all have attention in them."""
    if not isinstance(part, nn.ModuleList | nn.Sequential) or not len(part):
        return False
    return len({type(child) for child in part}) == 1 and all(_attention(child) is not None for child in part)


def _attention(block: nn.Module) -> nn.Module | None:
    """The first module in a block that has heads."""
    for part in block.modules():
        if isinstance(next((getattr(part, name) for name in HEADS if hasattr(part, name)), None), int):
            return part
    return None


def _common(one: str, other: str) -> str:
    """Name of the smallest module that contains both named modules."""
    return ".".join(os.path.commonprefix([one.split("."), other.split(".")]))


def _anatomy(vit: nn.Module, blocks: tuple, patch_embed: nn.Module, **given) -> Anatomy:
    """The `Anatomy` of a ViT with these blocks and this patch embedding; `given` fields are used unchanged."""
    attention = given.pop("attention", None) or tuple(map(_attention, blocks))
    heads = given.get("num_heads") or next(getattr(attention[0], name) for name in HEADS if hasattr(attention[0], name))
    convolution = next((part for part in patch_embed.modules() if isinstance(part, nn.Conv2d)), None)
    norm = next((part for name in NORMS if (part := _submodule(vit, name)) is not None), None)
    added = len(getattr(blocks[0], ADDED, ()))
    dim = getattr(vit, "embed_dim", None) or getattr(patch_embed, "embed_dim", None)
    dim = dim or getattr(norm, "normalized_shape", [0])[-1] or convolution.out_channels
    fields = dict(
        blocks=blocks,
        attention=attention,
        mlp_out=_second_linears(blocks, attention, dim),
        patch_embed=getattr(patch_embed, EMBEDS_CUT.get(type(patch_embed).__name__, ""), patch_embed),
        norm=norm,
        prefix=given.pop("prefix") if "prefix" in given else _prefix(vit, added),
        embed_dim=dim,
        num_heads=heads,
        head_dim=getattr(attention[0], "head_dim", None) or dim // heads,
        patch_size=_patch_size(patch_embed),
        forward=_forward(vit),
        channels=convolution.in_channels if convolution is not None else 3,
        batch_first=getattr(attention[0], "batch_first", True),
    )
    registers = sum(name.startswith("register") for name in fields["prefix"])
    fields["prefix"] += tuple(f"register {registers + i + 1}" for i in range(added))
    return Anatomy(**fields | given)


def _described(module, blocks, attention, mlp_out, prefix, patch, norm, patch_embed, heads, forward) -> Anatomy:
    part = tuple(_named(module, blocks))
    embedding = _named(module, patch_embed) if patch_embed else next(filter(cuts_patches, module.modules()), None)
    if embedding is None:
        raise Unrecognised(f"{type(module).__name__} has no patch convolution: name it by patch_embed")
    given = dict(attention=tuple(_named(block, attention) for block in part), prefix=prefix, patch_size=patch)
    if heads or _attention(given["attention"][0]) is None:
        if not heads:
            raise Unrecognised(f"{attention} of {type(module).__name__} does not say its heads: give heads")
        given["num_heads"] = heads
    given |= {"mlp_out": tuple(_named(block, mlp_out) for block in part)} if mlp_out else {}
    given |= {} if norm is None else {"norm": _named(module, norm) if norm else nn.Identity()}
    given["forward"] = module if forward is None else lambda images: forward(module, images)
    return _anatomy(module, part, embedding, **given)


def _named(module: nn.Module, name: str) -> nn.Module:
    part = _submodule(module, name)
    if part is None:
        raise Unrecognised(
            f"{type(module).__name__} has no {name}; it has {', '.join(n for n, _ in module.named_children())}"
        )
    return part


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _prefix(vit: nn.Module, added: int) -> tuple[str, ...]:
    """Names of the prefix tokens, from the parameters that hold them, without tokens added at test time."""
    if hasattr(vit, "blocks_token_only"):
        return ()  # cls joins after the blocks (CaiT)
    held = {name.split(".")[-1]: p for name, p in vit.named_parameters() if not name.startswith("head.")}
    counts = {kind: next((held[n] for n in names if n in held), None) for kind, names in PREFIX.items()}
    names = [kind for kind in ("cls", "dist") if counts[kind] is not None]
    registers = 0 if counts["register"] is None else counts["register"].shape[-2]
    registers = max(registers, getattr(vit, "num_prefix_tokens", 0) - added - len(names))  # timm counts all
    return (*names, *(f"register {i + 1}" for i in range(registers)))


def _patch_size(patch_embed: nn.Module) -> tuple[int, int]:
    """Patch size in pixels, (rows, cols); for a convolutional stem it follows from the grid of the output."""
    image, grid = getattr(patch_embed, "img_size", None), getattr(patch_embed, "grid_size", None)
    if image and grid:
        return tuple(a // b for a, b in zip(image, grid, strict=True))
    size = getattr(patch_embed, "patch_size", None) or getattr(patch_embed, "stride", None)
    if size is None:
        raise Unrecognised(f"{type(patch_embed).__name__} does not say the size of its patches: no ViT is recognised")
    return (size, size) if isinstance(size, int) else tuple(size)


def _second_linears(blocks: tuple, attention: tuple, dim: int) -> tuple[nn.Module, ...]:
    """Each block's last linear layer outside attention with `dim` outputs; empty where a block has none."""
    linears = []
    for block, attn in zip(blocks, attention, strict=True):
        inside = set() if attn is block else set(attn.modules())
        linear = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in inside]
        linears += [m for m in linear if m.out_features == dim][-1:]
    return tuple(linears) if len(linears) == len(blocks) else ()


def _forward(vit: nn.Module) -> Callable:
    """A function that runs the model on images, at least up to its final norm."""
    if hasattr(vit, "forward_features"):
        return vit.forward_features
    accepted = inspect.signature(vit.forward).parameters
    if "pixel_values" not in accepted:
        return vit
    if "spatial_shapes" in accepted:
        return lambda images: vit(**_cut(images, vit.config.patch_size))

    def run(images):
        options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        if "noise" not in accepted:
            return vit(pixel_values=images, **options)
        ratio, vit.config.mask_ratio = vit.config.mask_ratio, 0.0  # a masked autoencoder sees all patches, in order
        try:
            size = vit.embeddings.patch_embeddings.projection.stride
            count = images.shape[-2] // size[0] * (images.shape[-1] // size[1])
            noise = torch.arange(count, device=images.device, dtype=torch.float32).expand(len(images), -1)
            return vit(pixel_values=images, noise=noise, **options)
        finally:
            vit.config.mask_ratio = ratio

    return run


def _cut(images: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """The inputs of SigLIP 2: patches (batch, patches, rows x cols x channels), all of them valid, and their grid."""
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
    grid = torch.tensor([patches.shape[1:3]] * len(images), device=images.device)
    x = patches.flatten(3).flatten(1, 2)
    return dict(pixel_values=x, pixel_attention_mask=x.new_ones(x.shape[:2], dtype=torch.long), spatial_shapes=grid)


def layer_scale(block: nn.Module, branch: int) -> torch.Tensor | None:
    """(dim,) LayerScale of a block's attention (branch 1) or MLP (branch 2); None where it has none.

    It is a parameter of `ls1` or `ls2` in timm's VisionTransformer, of `layer_scale1` … in transformers, and the
    block's own `gamma_1` or `gamma_2` in Eva.
    """
    for name, parameter in ((f"ls{branch}", "gamma"), (f"ls_{branch}", "gamma"), (f"layer_scale{branch}", "lambda1")):
        scale = getattr(getattr(block, name, None), parameter, None)
        if scale is not None:
            return scale
    return getattr(block, f"gamma_{branch}", None)
