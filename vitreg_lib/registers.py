"""How registers enter and leave a model, shown by computation (Fig. 6; claims C020 to C022).

Everything is read off, or changed, at the input of the first block, where the sequence is (cls, registers, patches):
so it works alike for registers that were trained and for those added at test time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .capture import evaluating, hooks


def entering(model, images: torch.Tensor, edit: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens that enter the first block, tokens that leave the last), each (images, tokens, dim), of a `zoo.Model`.

    `edit` takes the entering tokens and returns what enters instead.
    """
    found = {}

    def before(block, args, kwargs):
        found["in"] = args[0] if edit is None else edit(args[0].clone())
        return (found["in"], *args[1:]), kwargs

    def after(block, inputs, output):
        found["out"] = output

    blocks = model.anatomy.blocks
    first = (blocks[0].register_forward_pre_hook, before, {"with_kwargs": True})
    with evaluating(model.module), hooks(first, (blocks[-1].register_forward_hook, after)):
        model.module.forward_features(getattr(images, "x", images).to(model.weights))
    return found["in"].cpu(), found["out"].cpu()


def flow(model, images: torch.Tensor) -> dict[str, int]:
    """Token counts: patches, registers, tokens_in (at the first block), tokens_returned; registers' parameters."""
    anatomy = model.anatomy
    rows, cols = anatomy.grid(getattr(images, "x", images))
    inside, _ = entering(model, images)
    trained = getattr(model.module, "reg_token", None)
    return {
        "patches": rows * cols,
        "registers": anatomy.num_registers,
        "tokens_in": inside.shape[1],
        "tokens_returned": rows * cols + int(anatomy.has_cls),
        "parameters_of_registers": 0 if trained is None else trained.numel(),
    }


def effect(model, images: torch.Tensor, kind: str, seed: int = 0) -> float:
    """Relative change of the patches' output, |new - old| / |old|, when the entering registers are changed.

    kind: "noise" adds to each register noise of a patch token's size; "permute" turns their order by one; "image" takes
    them from the next image. The last two change nothing where registers carry no position and are the same for
    every image.
    """
    anatomy = model.anatomy
    first, prefix = int(anatomy.has_cls), anatomy.num_prefix_tokens
    generator = torch.Generator().manual_seed(seed)

    def edit(x):
        registers = x[:, first:prefix]
        if kind == "noise":
            noise = torch.randn(registers.shape[1:], generator=generator).to(x)
            x[:, first:prefix] = registers + noise * x[:, prefix:].std()
        elif kind == "permute":
            x[:, first:prefix] = registers.roll(1, 1)
        elif kind == "image":
            x[:, first:prefix] = registers.roll(1, 0)
        else:
            raise ValueError(f"unknown change {kind!r}; known are noise, permute, image")
        return x

    old, new = (entering(model, images, change)[1][:, prefix:] for change in (None, edit))
    return ((new - old).norm() / old.norm()).item()
