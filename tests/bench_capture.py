"""Looking inside a model.

Capture compared with a plain forward pass of the same images, in time and in peak memory (the largest sum of tensors
that exist at the same time). Memory is measured on ViT-L/14 at 518 pixels with three of its blocks, because the peak is
reached within one block. "The usual way" is unfused attention with a hook after the softmax.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import fig12
import timm
import torch

from tests.bench import Row, compared
from vitreg_lib.data import scenes
from vitreg_lib.hooks.capture import capture, hooks


class As(torch.nn.Module):
    """A model whose forward is a function of it, for `fig12.peak_bytes`."""

    def __init__(self, model: torch.nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model, x)


def rows() -> Iterator[Row]:
    """Time of norms at all layers, memory of attention rows, import, and rendering of scenes."""
    for name, batch in (("vit_tiny_patch16_224", 8), ("vit_small_patch14_reg4_dinov2", 2)):
        model = timm.create_model(name, img_size=224).eval()
        images = torch.randn(batch, 3, *model.patch_embed.img_size)
        plain = torch.no_grad()(lambda model=model, images=images: model.forward_features(images))
        ours = lambda model=model, images=images: capture(model, images, batch_size=len(images))  # noqa: E731
        what = f"norms at all layers vs. a plain forward pass, {name}, {batch} images"
        yield compared(what, ours, plain, "at most 1.05")
    model = fig12.build_vit("l", 14, 518, device="cpu")
    model.blocks = model.blocks[:3]
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    plain = fig12.peak_bytes(model, x) / 2**20
    kept = fig12.peak_bytes(As(model, lambda m, x: capture(m, x, "attention", layers=-1, queries=[0])), x) / 2**20
    yield Row("attention of cls by capture vs. a plain forward pass, peak memory", kept, plain, "MiB", "at most 1.2")
    yield Row("the same in the usual way", fig12.peak_bytes(As(model, usual), x) / 2**20, plain, "MiB")
    yield importing()
    yield rendering()


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


def importing() -> Row:
    """`import vitreg_lib` after torch beside `import torch` alone, in fresh interpreters."""
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import vitreg_lib;"
    code += "c = time.perf_counter(); print(b - a, c - b)"
    pairs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        pairs.append([1e3 * float(value) for value in done.stdout.split()])
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row("import vitreg_lib vs. import torch", ours, theirs, "ms", "at most 0.1")


def rendering(count: int = 256) -> Row:
    """Scenes a second at 96 pixels."""
    scenes.render(range(64))
    seconds = []
    for number in range(5):
        began = time.perf_counter()
        scenes.render(range(number * count, (number + 1) * count))
        seconds.append(time.perf_counter() - began)
    return Row("scenes rendered at 96 pixels", count / statistics.median(seconds), None, "a second")
