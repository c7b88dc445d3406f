"""Remedies added to a trained ViT: its state_dict records them, and no weight of the model changes.

Buffers, beside the weights of the parts that they change, hold what is added:

    BLOCKS.0.added_registers     (n, dim) zeros: the tokens that enter block 0 behind the prefix tokens
    BLOCKS.L.….moved_neurons     (hidden,) bool, at the second linear layer of an MLP: the neurons whose largest
                                 activation goes from the patches to the new tokens
    BLOCKS.L.removed_directions  (n, dim) orthonormal: patch tokens lose their part along these before block L

Plain functions do the work as forward hooks of these parts. Each part therefore keeps its class, and torch.export and
ONNX's exporter include the functions. timm's models count the new tokens among their prefix tokens, in all outputs.
Models of other libraries drop them after the last block, because their heads and poolings do not handle registers.
"""

import copy
import functools
from collections.abc import Sequence

import torch
from torch import nn

from ..base import UserError
from ..hooks.anatomy import ADDED, Anatomy, dissect

Neurons = Sequence[tuple[int, int]]  # (block, neuron)
MOVED, REMOVED = "moved_neurons", "removed_directions"


def add_registers(module: nn.Module, neurons: Neurons, n: int) -> nn.Module:
    """A copy of a ViT with `n` zero tokens after its prefix tokens; the patches' activations of `neurons` move to them.

    Raises ValueError for a neuron that does not exist, and UserError for attention with a bias for each pair of
    positions, which a new token lacks, and for a model that already has added tokens.
    """
    _check(module, neurons, n)
    module = copy.deepcopy(module)
    anatomy = dissect(module)
    old, first = anatomy.num_prefix_tokens, anatomy.batch_first
    if n:
        _append(module, anatomy, n)
    for block in sorted({block for block, _ in neurons}):
        linear = anatomy.mlp_out[block]
        chosen = torch.zeros(linear.in_features, dtype=torch.bool, device=linear.weight.device)
        chosen[[neuron for b, neuron in neurons if b == block]] = True
        linear.register_buffer(MOVED, chosen)
        linear.register_forward_pre_hook(functools.partial(_before_second_linear, old=old, n=n, batch_first=first))
    return module


def remove_directions(module: nn.Module, block: int, axes: torch.Tensor) -> nn.Module:
    """A copy of a ViT whose patch tokens lose their part along orthonormal `axes` (n, dim) before a block runs."""
    module = copy.deepcopy(module)
    anatomy = dissect(module)
    anatomy.blocks[block].register_buffer(REMOVED, axes.to(next(module.parameters())).contiguous())
    _before(anatomy, block, _without_directions)
    return module


def of_state(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors that describe what was added, all other tensors) of a state_dict."""
    additions = {k: v for k, v in tensors.items() if k.rpartition(".")[2] in (ADDED, MOVED, REMOVED)}
    return additions, {k: v for k, v in tensors.items() if k not in additions}


def again(module: nn.Module, additions: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a ViT with the added tokens that `of_state` read from a model of the same architecture.

    Raises UserError where a name does not belong to the matching part of this ViT.
    """
    anatomy, n, neurons, removed = dissect(module), 0, [], {}
    parts = dict(module.named_modules())
    for name, value in additions.items():
        place, _, what = name.rpartition(".")
        part = parts.get(place)
        if what == ADDED and part is anatomy.blocks[0]:
            n = len(value)
        elif what == MOVED and part in anatomy.mlp_out:
            neurons += [(anatomy.mlp_out.index(part), int(neuron)) for neuron in value.nonzero()]
        elif what == REMOVED and part in anatomy.blocks:
            removed[anatomy.blocks.index(part)] = value
        else:
            raise UserError(f"{name} belongs to no part of this {type(module).__name__}: the file is of another model")
    module = add_registers(module, neurons, n)
    for block, axes in removed.items():
        module = remove_directions(module, block, axes)
    module.load_state_dict(additions, strict=False)
    return module


def move(activations: torch.Tensor, neurons: torch.Tensor, old: int, n: int) -> torch.Tensor:
    """Activations (batch, tokens, hidden) with those of `neurons` (hidden,) moved from the patches to `n` new tokens.

    The tokens are `old` prefix tokens, the new ones and the patches. At each neuron, the new tokens get the image's
    activation of largest magnitude, with its sign, over patches and new tokens; the patches get zero.
    """
    prefix, rest = activations[:, :old], activations[:, old:]
    new, patches = rest[:, :n], rest[:, n:].masked_fill(neurons, 0)
    if n:
        largest = rest.gather(1, rest.abs().argmax(1, keepdim=True))
        new = torch.where(neurons, largest, new)
    return torch.cat([prefix, new, patches], 1)


def _append(module: nn.Module, anatomy: Anatomy, n: int) -> None:
    """Feed `n` zero tokens without position into the first block; timm's models count them, others drop them."""
    blocks, old, first = anatomy.blocks, anatomy.num_prefix_tokens, anatomy.batch_first
    weights = next(blocks[0].parameters())
    blocks[0].register_buffer(ADDED, torch.zeros(n, anatomy.embed_dim, dtype=weights.dtype, device=weights.device))
    _before(anatomy, 0, _with_new)
    around = [part for part in module.modules() if blocks[0] in set(part.modules())]
    counting = [part for part in around if hasattr(part, "num_prefix_tokens")]
    if not counting:
        for block in blocks:
            block.register_forward_pre_hook(functools.partial(_without_mask, n=n, batch_first=first), with_kwargs=True)
        blocks[-1].register_forward_hook(functools.partial(_after_blocks, old=old, n=n, batch_first=first))
    for vit in counting:
        vit.__class__ = _counting(type(vit), n)
    for part in (*counting, *(attn for attn in anatomy.attention if hasattr(attn, "num_prefix_tokens"))):
        part.num_prefix_tokens += n


def _swapped(x: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return x if batch_first else x.transpose(0, 1)


def _before(anatomy: Anatomy, block: int, change) -> None:
    """Let `change`, a function of (block, prefix tokens, patches), replace the tokens that enter a block."""
    place = dict(change=change, old=anatomy.num_prefix_tokens, batch_first=anatomy.batch_first)
    anatomy.blocks[block].register_forward_pre_hook(functools.partial(_before_block, **place), with_kwargs=True)


def _before_block(block, args, kwargs, *, change, old: int, batch_first: bool):
    name = None if args else "hidden_states"  # how transformers names it
    x = _swapped(args[0] if args else kwargs[name], batch_first)
    x = _swapped(torch.cat(change(block, x[:, :old], x[:, old:]), 1), batch_first)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


def _with_new(block, prefix, patches):
    new = getattr(block, ADDED).to(patches.dtype)
    return prefix, new.expand(patches.shape[0], -1, -1), patches  # len would fix the batch in an export


def _without_directions(block, prefix, patches):
    axes = getattr(block, REMOVED).to(patches.dtype)
    return prefix, patches - (patches @ axes.T) @ axes


def _without_mask(block, args, kwargs, *, n: int, batch_first: bool):
    """Drop the mask that transformers makes in an export: it hides nothing and lacks the new tokens."""
    tokens = _swapped(args[0] if args else kwargs["hidden_states"], batch_first).shape[1] - n

    def kept(value):
        is_mask = torch.is_tensor(value) and value.dim() == 4 and value.shape[2:] == (tokens, tokens)
        return None if is_mask else value

    return (*args[:1], *map(kept, args[1:])), {name: kept(value) for name, value in kwargs.items()}


def _after_blocks(block, inputs, output, *, old: int, n: int, batch_first: bool):
    x = _swapped(output[0] if isinstance(output, tuple) else output, batch_first)
    x = _swapped(torch.cat([x[:, :old], x[:, old + n :]], 1), batch_first)
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _before_second_linear(linear, inputs, *, old: int, n: int, batch_first: bool):
    moved = move(_swapped(inputs[0], batch_first), getattr(linear, MOVED), old, n)
    return (_swapped(moved, batch_first), *inputs[1:])


@functools.cache
def _counting(base: type, n: int) -> type:
    """A subclass of a timm class whose prefix tokens include `n` without position embedding or weights.

    Methods that handle position embeddings do not count them; all others do.
    """

    def without_new(name):
        def method(self, *args, **kwargs):
            self.num_prefix_tokens -= n
            try:
                return getattr(super(made, self), name)(*args, **kwargs)
            finally:
                self.num_prefix_tokens += n

        return method

    names = [name for name in ("_pos_embed", "set_input_size") if hasattr(base, name)]
    made = type(f"{base.__name__}WithTestTimeRegisters", (base,), {name: without_new(name) for name in names})
    return made


def _check(module: nn.Module, neurons: Neurons, n: int) -> None:
    anatomy = dissect(module)
    if n < 0:
        raise ValueError(f"{n} registers: 0 or more")
    if neurons and not anatomy.mlp_out:
        raise UserError(f"{type(anatomy.blocks[0]).__name__} has no linear layer after an MLP, where neurons are moved")
    for block, neuron in neurons:
        if not 0 <= block < anatomy.depth:
            raise ValueError(f"block {block} out of range for {anatomy.depth} blocks (0…{anatomy.depth - 1})")
        width = anatomy.mlp_out[block].in_features
        if not 0 <= neuron < width:
            raise ValueError(f"neuron {neuron} out of range for the {width} of block {block} (0…{width - 1})")
    if (n or neurons) and of_state(module.state_dict())[0]:
        raise UserError("this model is mended already: start from the model without")
    if n and any("relative_position" in name or "rel_pos" in name for name, _ in module.named_parameters()):
        raise UserError(
            "this model's attention adds a bias for each pair of places, in which a new token has no place: registers "
            "cannot be added at test time"
        )
