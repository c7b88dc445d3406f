"""Memory of attention maps, for `make bench`: `python -m tests.bench_attention`.

Peak memory of a forward pass of ViT-L/14 at 518 pixels (1,369 patches; three blocks, since a peak is one block's)
that keeps the cls token's attention, over that of a plain forward; goal at most 1.2. Beside it the usual way:
unfused attention and a hook behind the softmax. Bytes of tensors alive at once, so the ratio holds on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import fig12
import torch

from vitreg_lib.hooks.capture import capture, hooks


class _As(torch.nn.Module):
    """A model whose forward is a function of it."""

    def __init__(self, model: torch.nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        self.function(self.model, x)


def usual(model, x) -> None:
    """The whole attention matrix of the last block, as most tools keep it."""
    kept = []
    for block in model.blocks:
        block.attn.fused_attn = False
    last = model.blocks[-1].attn.attn_drop
    with hooks((last.register_forward_hook, lambda module, inputs, output: kept.append(output))):
        model(x)
    for block in model.blocks:
        block.attn.fused_attn = True


def memory() -> Iterator[str]:
    model = fig12.build_vit("l", 14, 518, device="cpu")
    model.blocks = model.blocks[:3]
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    plain = fig12.peak_bytes(model, x)
    ways = {
        "cls attention by capture": lambda m, x: capture(m, x, "attention", layers=-1, queries=[0]),
        "the usual way": usual,
    }
    for name, way in ways.items():
        ratio = fig12.peak_bytes(_As(model, way), x) / plain
        yield f"memory, ViT-L/14 at 518 px, {name}: {ratio:.2f} of a plain forward"


if __name__ == "__main__":
    for line in memory():
        print(line)
