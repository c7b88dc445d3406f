"""Throughput of training (`make bench-train`, or `python -m tests.bench_train`). Nothing is asserted.

Ours is a step of the loop. The plain one is what timm's training script (train.py of its repository) does for a batch
at the same batch size and precision: forward under autocast, loss, backward, clipping, optimiser step. Both train the
same model on the same scenes, rendered in the step, with the recipe's labels and loss. They take turns, and ratios are
medians over rounds. What registers cost is measured on the loop, beside the FLOPs that they add.

On a GPU, ViT-B/16 at 224 pixels follows, with the share of the card's peak that the model's arithmetic makes (MFU).
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import Row, compared, taking_turns
from vitreg_lib.data import scenes
from vitreg_lib.train import images, loop, parallel, recipes, telemetry
from vitreg_lib.train.config import TrainConfig
from vitreg_lib.train.state import Run

deit3 = recipes.load("deit3")
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}  # dense bfloat16


def ours(config: TrainConfig, device: str, steps: int):
    """A function that takes `steps` steps of the loop."""
    module = deit3.build(config).to(device)
    run = Run(module, parallel.optimizer(module, config, device), accumulate=config.accumulate)
    if config.compile:
        parallel.compile_blocks(module, device)
    loss = parallel.Loss(module, deit3, config, device)

    def train():
        for step in range(steps):
            loop._step(run, loss, deit3, config, step, device)

    return train


def plain(config: TrainConfig, device: str, steps: int):
    """A function that takes `steps` steps as timm's training script does."""
    model = deit3.build(config).to(device).train()
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    on_gpu = device == "cuda"

    def train():
        for step in range(steps):
            index = parallel.batch_range(config, step)
            batch = scenes.render(index, config.image_size, config.seed, device)
            target = torch.cat(
                [F.one_hot(t, len(scenes.ATTRIBUTES[name])) for name, t in scenes.targets(batch).items()], 1
            ).float()
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                output = model(batch.pixels * 2 - 1)
                loss = F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            if on_gpu:
                torch.cuda.synchronize()  # as timm's script does after each update

    return train


def flops(config: TrainConfig) -> float:
    """Of forward and backward of one image, by torch's own count on the meta device."""
    with torch.device("meta"):
        model = deit3.build(config).train()
        x = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def show(row: Row) -> None:
    print(" | ".join(row.cells()), flush=True)


def main(config: TrainConfig, device: str, steps: int, rounds: int) -> None:
    images = config.batch_size * steps
    label = f"{steps} steps, {config.size}, {config.batch_size} images"
    both = ours(config, device, steps), plain(config, device, steps)
    way = compared(f"{label}: the loop beside timm's way", *both, "at most 1", rounds)
    first, second = way.ours / 1e3, way.other / 1e3
    show(way)
    show(Row("images a second", images / first, images / second, ""))
    for registers in (4, 16):
        more = replace(config, registers=registers)
        wanted = f"FLOPs {flops(more) / flops(config):.3f}"
        both = ours(more, device, steps), ours(config, device, steps)
        show(compared(f"{label}: {registers} registers beside none", *both, wanted, rounds))
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((p for key, p in PEAK.items() if key in name), None)
        share = f"{flops(config) * images / first / peak:.1%} of the peak of {peak / 1e12:.0f} TFLOP/s" if peak else ""
        print(f"model FLOPs utilisation of {config.size} on {name}: {share or 'unknown peak'}")


def watching(config: TrainConfig, device: str) -> None:
    """Share of the training time that telemetry takes at this size, over a run of the default length."""
    model, watched = deit3.build(config).to(device), images.telemetry_images(config)
    taken = taking_turns(lambda: telemetry.measure(model, watched, 0), ours(config, device, 1), 5)
    count = len(telemetry.measured_steps(config.steps))
    share = count * taken[0] / (config.steps * taken[1])
    print(f"telemetry: {count} measurements in {config.steps} steps take {share:.2%} of the time  (goal: below 1 %)")


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    main(TrainConfig(size="s", batch_size=64), device, steps=1, rounds=7)
    watching(TrainConfig(), device)
    if device == "cuda":
        config = TrainConfig(size="b/16", image_size=224, batch_size=256)
        for compiled in (False, True):
            main(replace(config, compile=compiled), device, steps=10, rounds=int(sys.argv[1]) if sys.argv[1:] else 5)
    else:
        print("no GPU here: the table of ViT-B/16 at 224 pixels was not run")
