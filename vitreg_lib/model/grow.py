"""A timm ViT with additional registers; its other weights are unchanged."""

import inspect

import torch
from torch import nn

from ..base import UserError, line
from ..hooks.anatomy import dissect
from .saved import build, how_built


def with_registers(module: nn.Module, tokens: torch.Tensor) -> nn.Module:
    """A timm model with all weights of `module`, and `tokens` (n, dim) as registers after its own.

    timm builds the same with reg_tokens=n (num_reg_tokens in Eva). Where prefix tokens have position embeddings, those
    of the new registers are zero. Raises UserError for an architecture that takes no registers.
    """
    anatomy, (kind, spec) = dissect(module), how_built(module)
    parameters = inspect.signature(type(module).__init__).parameters
    name = next((n for n in ("reg_tokens", "num_reg_tokens") if n in parameters), None)
    if name is None or kind not in ("vit", "timm"):
        raise UserError(f"timm has no registers for {type(module).__name__}: ViTs and Evas of timm's can get them")
    more = {name: anatomy.num_registers + len(tokens)}
    new = build("", kind, spec | (more if kind == "vit" else {"model_args": spec["model_args"] | more}))
    weights = dict(module.state_dict())
    if len(tokens):
        weights["reg_token"] = torch.cat([*([module.reg_token[0]] if anatomy.num_registers else []), tokens])[None]
    places = weights.get("pos_embed")
    if places is not None and places.shape[1] < new.pos_embed.shape[1]:  # prefix tokens have places of their own
        old = anatomy.num_prefix_tokens
        weights["pos_embed"] = torch.cat(
            [places[:, :old], places.new_zeros(1, len(tokens), places.shape[2]), places[:, old:]], 1
        )
    try:
        new.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"timm builds another model than this one: {line(error)}") from error
    return new.train(module.training)
