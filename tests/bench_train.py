"""Training

A step of the training loop compared with the same step of timm's training script (train.py of its repository), at the
same batch size and precision: forward under autocast, loss, backward, clipping, optimiser step. Both train the same
model on the same scenes, which are rendered in the step, with the recipe's labels and loss. The cost of registers is
measured on the loop and compared with the FLOPs that they add.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import Row, compared, taking_turns
from vitreg_lib.data import scenes
from vitreg_lib.train import graph, images, loop, parallel, recipes, telemetry
from vitreg_lib.train.config import TrainConfig

deit3 = recipes.load("deit3")


def ours(config: TrainConfig, device: str, steps: int):
    """A function that takes the next `steps` steps of the loop."""
    run = loop.prepare(deit3.build(config).to(device), deit3, config, device)
    replay, unread = None, deque()

    def train():
        nonlocal replay
        for step in range(run.step, run.step + steps):
            if step == 1 and graph.possible(run):
                replay = loop.capture(run, step)
            unread.append(loop.take_step(run, step, replay=replay))
            while len(unread) > (device == "cuda"):
                unread.popleft().read()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def plain(config: TrainConfig, device: str, steps: int):
    """A function that takes `steps` steps as timm's training script does."""
    model = deit3.build(config).to(device).train()
    if config.compile:
        parallel.compile_blocks(model, device)
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


def beside_timm(config: TrainConfig, device: str, steps: int, rounds: int) -> Iterator[Row]:
    """The loop beside timm's way: time of a step, and images a second."""
    what = f"a step of {config.batch_size} images of {config.image_size} pixels, size {config.size}"
    what += ", compiled" * config.compile
    row = compared(what, ours(config, device, steps), plain(config, device, steps), "at most 1", rounds)
    row = replace(row, ours=row.ours / steps, other=row.other / steps)
    yield row
    rates = (1e3 * config.batch_size / value for value in (row.ours, row.other))
    yield Row("the same, images a second", *rates, "")


def registers(config: TrainConfig, device: str, steps: int, rounds: int) -> Iterator[Row]:
    """What 4 and 16 registers cost."""
    for count in (4, 16):
        more = replace(config, registers=count)
        added = f"FLOPs {flops(more) / flops(config):.3f}"
        what = f"size {config.size}: {count} registers vs. none"
        row = compared(what, ours(more, device, steps), ours(config, device, steps), added, rounds)
        yield replace(row, ours=row.ours / steps, other=row.other / steps)


def watching(config: TrainConfig, device: str) -> Row:
    """Share of the training time that telemetry takes at this size, over a run of the default length."""
    model, watched = deit3.build(config).to(device), images.telemetry_images(config)
    taken = taking_turns(lambda: telemetry.measure(model, watched, 0), ours(config, device, 1), 5)
    count = len(telemetry.measured_steps(config.steps))
    shares = count * taken[0], config.steps * taken[1]
    return Row(f"{count} measurements of norms vs. {config.steps} steps", *shares, "s", "at most 0.01")


def rows() -> Iterator[Row]:
    """At mini size on the CPU."""
    config = TrainConfig(size="s", batch_size=64)
    yield from beside_timm(config, "cpu", steps=1, rounds=7)
    yield from registers(config, "cpu", steps=1, rounds=7)
    yield watching(TrainConfig(), "cpu")
