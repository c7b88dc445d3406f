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
    anatomy, names = dissect(module), {part: name for name, part in module.named_modules()}
    _check(anatomy, neurons, n)
    additions = {f"{names[anatomy.blocks[0]]}.{ADDED}": torch.zeros(n, anatomy.embed_dim)} if n else {}
    for block in sorted({block for block, _ in neurons}):
        linear = anatomy.mlp_out[block]
        chosen = torch.zeros(linear.in_features, dtype=torch.bool)
        chosen[[neuron for b, neuron in neurons if b == block]] = True
        additions[f"{names[linear]}.{MOVED}"] = chosen
    return with_additions(module, additions)


def remove_directions(module: nn.Module, block: int, axes: torch.Tensor) -> nn.Module:
    """A copy of a ViT whose patch tokens lose their part along orthonormal `axes` (n, dim) before a block runs."""
    names = {part: name for name, part in module.named_modules()}
    return with_additions(module, {f"{names[dissect(module).blocks[block]]}.{REMOVED}": axes})


def of_state(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors that describe what was added, all other tensors) of a state_dict."""
    additions = {k: v for k, v in tensors.items() if k.rpartition(".")[2] in (ADDED, MOVED, REMOVED)}
    return additions, {k: v for k, v in tensors.items() if k not in additions}


def registers_from(module: nn.Module, otherwise: str) -> str:
    """`Model.registers_from` of a module with added tokens: "test time" where neurons move to them, else "empty"."""
    kinds = {name.rpartition(".")[2] for name in of_state(module.state_dict())[0]}
    return "test time" if MOVED in kinds else "empty" if ADDED in kinds else otherwise


def with_additions(module: nn.Module, additions: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a ViT with the buffers {name: tensor} of `of_state`, and with the hooks that use them.

    Raises UserError where a name does not belong to the matching part of this ViT, and as `add_registers` does.
    """
    kinds = {name.rpartition(".")[2] for name in additions}
    if kinds & {ADDED, MOVED} and of_state(module.state_dict())[0]:
        raise UserError("this model is mended already: start from the model without")
    weights = " ".join(name for name, _ in module.named_parameters())
    if ADDED in kinds and ("relative_position" in weights or "rel_pos" in weights):
        raise UserError(
            "this model's attention adds a bias for each pair of places, in which a new token has no place: registers "
            "cannot be added at test time"
        )
    module = copy.deepcopy(module)
    anatomy, parts = dissect(module), dict(module.named_modules())
    matching = {ADDED: anatomy.blocks[:1], MOVED: anatomy.mlp_out, REMOVED: anatomy.blocks}
    n = next((len(value) for name, value in additions.items() if name.endswith(ADDED)), 0)
    where = dict(old=anatomy.num_prefix_tokens, n=n, batch_first=anatomy.batch_first)
    if n:
        _append(module, anatomy, **where)
    for name, value in additions.items():
        place, _, what = name.rpartition(".")
        part = parts.get(place)
        if part not in matching[what]:
            raise UserError(f"{name} belongs to no part of this {type(module).__name__}: the file is of another model")
        like = next(part.parameters())
        part.register_buffer(what, value.to(like if value.is_floating_point() else like.device).contiguous())
        if what == MOVED:
            part.register_forward_pre_hook(functools.partial(_before_second_linear, **where))
        if what == REMOVED:
            _before(part, _without_directions, where)
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


def _append(module: nn.Module, anatomy: Anatomy, old: int, n: int, batch_first: bool) -> None:
    """Feed `n` zero tokens without position into the first block; timm's models count them, others drop them."""
    blocks, where = anatomy.blocks, dict(old=old, n=n, batch_first=batch_first)
    _before(blocks[0], _with_new, where)
    around = [part for part in module.modules() if blocks[0] in set(part.modules())]
    counting = [part for part in around if "num_prefix_tokens" in vars(part)]  # not a wrapper, which passes it on
    if not counting:
        for block in blocks:
            block.register_forward_pre_hook(functools.partial(_without_mask, **where), with_kwargs=True)
        blocks[-1].register_forward_hook(functools.partial(_after_blocks, **where))
        for part in around:
            part.register_forward_hook(functools.partial(_of_hidden_states, old=old, n=n))
    for vit in counting:
        vit.__class__ = _counting(type(vit), n)
    for part in (*counting, *(attn for attn in anatomy.attention if hasattr(attn, "num_prefix_tokens"))):
        part.num_prefix_tokens += n


def _swapped(x: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return x if batch_first else x.transpose(0, 1)


def _before(block: nn.Module, change, where: dict) -> None:
    """Let `change` of (block, tokens, old, n) replace the tokens (batch, tokens, dim) that enter a block."""
    block.register_forward_pre_hook(functools.partial(_before_block, change=change, **where), with_kwargs=True)


def _before_block(block, args, kwargs, *, change, old: int, n: int, batch_first: bool):
    name = None if args else "hidden_states"  # how transformers names it
    x = _swapped(args[0] if args else kwargs[name], batch_first)
    x = _swapped(change(block, x, old, n), batch_first)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


def _with_new(block, x, old: int, n: int):
    new = getattr(block, ADDED).to(x.dtype).expand(x.shape[0], -1, -1)  # len would fix the batch in an export
    return torch.cat([x[:, :old], new, x[:, old:]], 1)


def _without_directions(block, x, old: int, n: int):
    axes, patches = getattr(block, REMOVED).to(x.dtype), x[:, old + n :]
    return torch.cat([x[:, : old + n], patches - (patches @ axes.T) @ axes], 1)


def _without_mask(block, args, kwargs, *, n: int, batch_first: bool, **_):
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


def _of_hidden_states(part, inputs, output, *, old: int, n: int):
    """Drop the new tokens from the hidden states that transformers recorded at the blocks, for a backbone or LLaVA."""
    states, last = (getattr(output, name, None) for name in ("hidden_states", "last_hidden_state"))
    if states and last is not None:
        longer = last.shape[1] + n
        cut = [h if h is None or h.shape[1] != longer else torch.cat([h[:, :old], h[:, old + n :]], 1) for h in states]
        output.hidden_states = tuple(cut)


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
    methods = {name: without_new(name) for name in names}
    methods["__reduce__"] = lambda self: (_empty, (base, n), self.__dict__)  # a pickle cannot import `made` by name
    made = type(f"{base.__name__}WithTestTimeRegisters", (base,), methods)
    return made


def _empty(base: type, n: int) -> nn.Module:
    """An object of a class of `_counting`, still without its state."""
    made = _counting(base, n)
    return made.__new__(made)


def _check(anatomy: Anatomy, neurons: Neurons, n: int) -> None:
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
