"""On a GPU

Training as in the previous section, in bfloat16, with the model's share of the peak FLOPs of the card (model FLOPs
utilisation). Object discovery is compared with the published loop, which processes one image after the other on one
thread of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tests.bench import Row
from tests.bench_probes import published_loop, seconds
from tests.bench_train import beside_timm, flops, registers
from vitreg_lib.measure import objects
from vitreg_lib.train.config import TrainConfig

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}  # dense bfloat16
MINI = TrainConfig()
FULL = [TrainConfig(size=size, image_size=224, batch_size=batch) for size, batch in (("s/16", 512), ("b/16", 256))]
WANTED = {"s/16": "at least 8,000", "b/16": "at least 3,000"}


def training() -> Iterator[Row]:
    """Sizes m, S/16 and B/16, the latter two compiled; what registers cost at B/16."""
    yield from beside_timm(MINI, "cuda", steps=20, rounds=5)
    card = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in card), None)
    for config in FULL:
        config = replace(config, compile=True)
        step, rate = beside_timm(config, "cuda", steps=5, rounds=5)
        yield step
        yield replace(rate, goal=WANTED[config.size])
        if peak:
            shares = (flops(config) * value / peak for value in (rate.ours, rate.other))
            yield Row(f"the same, share of the peak of {peak / 1e12:.0f} TFLOP/s", *shares, "")
    yield from registers(replace(FULL[1], compile=True), "cuda", steps=5, rounds=3)


def discovery() -> Iterator[Row]:
    """LOST on the GPU beside the published loop on the CPU."""
    for side, batch, few in ((14, 4096, 128), (28, 2048, 32), (37, 1024, 16)):
        f = torch.randn(batch, side**2, 384, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 385) ** -0.5
        on_gpu = f.cuda()
        ours = seconds(lambda x=on_gpu, side=side: objects.lost(x, (side, side)), 5) / batch
        torch.set_num_threads(1)
        loop = seconds(lambda x=f[:few], side=side: published_loop(x, (side, side)), 3) / few
        what = f"LOST vs. the published loop, {side} × {side} patches, an image"
        yield Row(what, 1e3 * ours, 1e3 * loop, "ms", "at most 0.05")


def rows() -> Iterator[Row]:
    """Nothing without a GPU."""
    if torch.cuda.is_available():
        yield from training()
        yield from discovery()
