"""Timings as ratios within one run (`make bench`, or `python -m tests.bench`). Not a test: nothing is asserted.

What is compared takes turns, round by round, and each ratio is the median over rounds: other work on the machine
then weighs on both alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch


def taking_turns(one: Callable, other: Callable, rounds: int = 11) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the rounds' ratios one / other; who is first changes."""
    seconds: list[tuple[float, float]] = []
    for function in (one, other):
        function()
    for number in range(rounds):
        took = {}
        for function in (one, other) if number % 2 else (other, one):
            began = time.perf_counter()
            function()
            took[function] = time.perf_counter() - began
        seconds.append((took[one], took[other]))
    first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
    return first, second, statistics.median(a / b for a, b in seconds)


def told(what: str, first: float, second: float, ratio: float, wanted: str) -> None:
    print(f"{what:58} {first * 1e3:9.1f} ms {second * 1e3:9.1f} ms  ratio {ratio:.3f}  ({wanted})", flush=True)


def importing() -> None:
    """`import vitreg_lib` after torch, as a share of `import torch` alone, in fresh interpreters."""
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import vitreg_lib;"
    code += "c = time.perf_counter(); print(b - a, c - b)"
    pairs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        pairs.append([float(value) for value in done.stdout.split()])
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    told("import vitreg_lib / import torch", ours, theirs, ours / theirs, "at most 0.1")


def capturing(name: str, batch: int, **options) -> None:
    """Capture of norms at all layers against timm's plain forward of the same batch."""
    import timm

    from vitreg_lib.hooks.capture import capture

    model = timm.create_model(name, **options).eval()
    size = model.patch_embed.img_size
    images = torch.randn(batch, 3, *size)

    @torch.no_grad()
    def plain():
        model.forward_features(images)

    label = f"norms at all layers / plain forward, {name.split('.')[0]}, {batch} images"
    told(label, *taking_turns(lambda: capture(model, images, batch_size=batch), plain), "at most 1.05")


def rendering(count: int = 256) -> None:
    """Scenes a second at 96 pixels."""
    from vitreg_lib.data import scenes

    scenes.render(range(64))
    seconds = []
    for number in range(5):
        began = time.perf_counter()
        scenes.render(range(number * count, (number + 1) * count))
        seconds.append(time.perf_counter() - began)
    rate = count / statistics.median(seconds)
    print(f"scenes at 96 pixels: {rate:.0f} a second with {torch.get_num_threads()} threads  (at least 1000 with 2)")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    importing()
    capturing("vit_tiny_patch16_224", 8)
    capturing("vit_small_patch14_reg4_dinov2", 2, img_size=224)
    rendering()
