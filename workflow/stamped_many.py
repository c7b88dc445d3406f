"""Many cells and seeds of workflow/stamped.py trained side by side as one batched computation, for a GPU.

    python workflow/stamped_many.py reg4 --out OUT            # all cells with 4 registers, six seeds each

All models of a run have one architecture, so their weights are stacked and a step is a few hundred kernels for all of
them. Cells share the images of their seed. Float32 throughout; the arithmetic is timm's, which a test compares.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "notebooks" / "beyond")]
import sinks  # noqa: E402
import stamped  # noqa: E402

from vitreg_lib.data import scenes  # noqa: E402
from vitreg_lib.train import loop  # noqa: E402
from vitreg_lib.train.config import TrainConfig  # noqa: E402

SEEDS, AHEAD = 6, 1024
PLAIN = {  # cells without registers, and with a start of 0.2 for registers
    "both": {},
    "strong": {"variant": "strong"},
    "decay 0.2": {"weight_decay": 0.2},
    "decay 0.8": {"weight_decay": 0.8},
    "rate 0.005": {"learning_rate": 0.005},
    "rare": {"variant": "rare"},
    "single": {"variant": "single"},
    "strong, rare": {"variant": "strong+rare"},
    "labels 0.1": {"variant": "more-labels"},
}
STARTS = {  # how registers start, and what acts on them
    "start 1e-6": {"register_start": 1e-6},
    "start 0.02": {"register_start": 0.02},
    "start 1": {"register_start": 1.0},
    "start 1, strong": {"register_start": 1.0, "variant": "strong"},
    "decay on registers": {"variant": "register-decay"},
    "start 1, decay on registers": {"variant": "register-decay", "register_start": 1.0},
}
RUNS = {  # name: architecture, cells
    "reg0": (dict(registers=0), PLAIN),
    "reg4": (dict(registers=4), PLAIN | STARTS),
    "reg16": (dict(registers=16), PLAIN | STARTS),
    "reg1": (dict(registers=1), PLAIN | STARTS),
    "reg0-four-blocks": (dict(registers=0, variant="four-blocks"), PLAIN),
    "reg4-four-blocks": (dict(registers=4, variant="four-blocks"), PLAIN | STARTS),
    "reg0-wide": (dict(registers=0, variant="wide"), PLAIN),
    "reg4-wide": (dict(registers=4, variant="wide"), PLAIN | STARTS),
}


def configurations(run: str, steps: int = 0, seeds: int = SEEDS) -> list[tuple[str, TrainConfig]]:
    """(cell, configuration) of all models of a run: a cell's seeds one after the other."""
    shared, cells = RUNS[run]
    found = []
    for cell, options in cells.items():
        variant = "+".join(filter(None, (shared.get("variant"), options.get("variant")))) or "both"
        for seed in range(seeds):
            given = stamped.DEFAULTS | {"register_start": 0.2} | shared | options | {"variant": variant, "seed": seed}
            found.append((cell, TrainConfig(**given | ({"steps": steps, "warmup": 2} if steps else {}))))
    return found


class Many:
    """The stacked weights of modules of one architecture, and AdamW with each model's own rate and decay."""

    def __init__(self, configs: list[TrainConfig], device: str):
        self.configs, self.task = configs, stamped.task(configs[0])
        modules = []
        for config in configs:
            torch.manual_seed(config.seed)
            modules.append(stamped.build(config))
        self.template = modules[0]
        states = [dict(m.named_parameters()) for m in modules]
        self.weights = {k: torch.stack([s[k].detach() for s in states]).to(device) for k in states[0]}
        self.free = [k for k, p in self.template.named_parameters() if p.requires_grad]
        for name in self.free:
            self.weights[name].requires_grad_()
        self.first = {k: torch.zeros_like(self.weights[k]) for k in self.free}
        self.second = {k: torch.zeros_like(self.weights[k]) for k in self.free}
        tasks = [stamped.task(c) for c in configs]
        self.rate = torch.tensor([c.learning_rate for c in configs], device=device)
        decay = torch.tensor([c.weight_decay for c in configs], device=device)
        spared = {"vit.reg_token": torch.tensor([float(t.register_decay) for t in tasks], device=device)}
        matrices = [k for k in self.free if self.template.get_parameter(k).ndim > 1 and not k.endswith(".bias")]
        self.decay = {k: decay * spared.get(k, torch.ones_like(decay)) for k in matrices}
        self.labels = torch.tensor([t.labels for t in tasks], device=device)

    def state(self, model: int) -> dict[str, torch.Tensor]:
        """The weights of one model, on the CPU."""
        return {k: v[model].detach().cpu() for k, v in self.weights.items()}

    def answers(self, patches: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (models, n, 64, 12) and logits (models, n, 24) for flattened patches (models, n, 64, 192)."""
        x = self.linear(patches, "vit.patch_embed.proj") + self.weights["vit.pos_embed"][:, :1]
        count = self.configs[0].registers
        if count:
            registers = self.weights["vit.reg_token"].expand(-1, x.shape[1], -1, -1)
            x = torch.cat([registers, x], 2)
        heads = self.task.heads
        for block in (f"vit.blocks.{i}" for i in range(self.task.depth)):
            qkv = self.linear(self.norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
            q, k, v = qkv.unflatten(3, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
            attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            seen = F.dropout(attention, dropout) @ v
            x = x + self.linear(seen.transpose(2, 3).flatten(3), f"{block}.attn.proj")
            inner = F.gelu(self.linear(self.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + self.linear(inner, f"{block}.mlp.fc2")
        x = self.norm(x, "vit.norm")[:, :, count:]
        return self.linear(x, "vit.head"), self.linear(x.mean(2), "labels")

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x (models, …, in) through each model's own linear layer."""
        weight = self.weights[f"{name}.weight"].flatten(2)
        flat = x.reshape(len(weight), -1, x.shape[-1])
        given = torch.baddbmm(self.weights[f"{name}.bias"][:, None], flat, weight.mT)
        return given.view(*x.shape[:-1], -1)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x (models, n, tokens, dim) through each model's own LayerNorm."""
        weight, bias = (self.weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * weight + bias

    def losses(self, batch: stamped.Batch, dropout: float = 0.1) -> torch.Tensor:
        """(models,) the loss of each on its images; a batch's tensors start with (models, n)."""
        answers, logits = self.answers(patches_of(batch.pixels), dropout)
        error = (answers - batch.answer).square().mean(-1)[:, :, ~stamped.idle(answers.device)].mean((1, 2))
        labels = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").sum(2).mean(1)
        return error + self.labels * labels

    def step(self, number: int, batch: stamped.Batch) -> torch.Tensor:
        """One step of AdamW on all models, gradients clipped model by model; the losses."""
        losses = self.losses(batch)
        free = [self.weights[k] for k in self.free]
        gradients = torch.autograd.grad(losses.sum(), free)
        with torch.no_grad():
            norm = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
            clip = (self.configs[0].clip_grad / (norm + 1e-6)).clamp(max=1.0)
            rate = loop.learning_rate(self.configs[0], number) / self.configs[0].learning_rate * self.rate
            gradients = torch._foreach_mul(gradients, [over(clip, g) for g in gradients])
            first, second = ([part[k] for k in self.free] for part in (self.first, self.second))
            torch._foreach_lerp_(first, gradients, 0.1)
            torch._foreach_mul_(second, 0.999)
            torch._foreach_addcmul_(second, gradients, gradients, 0.001)
            for name, p, m, v in zip(self.free, free, first, second, strict=True):
                if name in self.decay:
                    p.mul_(over(1 - rate * self.decay[name], p))
                length = (v / (1 - 0.999 ** (number + 1))).sqrt().add_(1e-8)
                p.sub_(over(rate, p) * (m / (1 - 0.9 ** (number + 1))) / length)
        return losses.detach()


def over(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(models,) values shaped to be broadcast over x (models, …)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def patches_of(pixels: torch.Tensor) -> torch.Tensor:
    """(…, 64, 192) pixels of each patch, as colour, row, column, from images (…, 3, 64, 64)."""
    grid, side = stamped.GRID, stamped.PATCH
    split = pixels.unflatten(-1, (grid, side)).unflatten(-3, (grid, side))  # …, 3, rows, y, cols, x
    order = split.movedim((-4, -2), (-5, -4))  # …, rows, cols, 3, y, x
    return order.flatten(-3).flatten(-3, -2)


class Images:
    """The batches of each step for all models, from scenes rendered ahead; cells share those of their seed."""

    def __init__(self, configs: list[TrainConfig], device: str):
        self.configs, self.device, self.size = configs, device, configs[0].batch_size
        self.seeds = sorted({c.seed for c in configs})
        self.kinds = {}  # what the images of a model depend on, beside its seed: its models
        for i, config in enumerate(configs):
            t = stamped.task(config)
            self.kinds.setdefault((t.dots, t.share, t.stamp), []).append(i)
        self.ready: list[scenes.Scenes] = []

    def batch(self, step: int) -> stamped.Batch:
        """The images of a step."""
        each = self.size * len(self.seeds)
        ahead = max(1, AHEAD // each)
        if step % ahead == 0 or not self.ready:
            firsts = [(step + s) * self.size + seed * 10**8 for s in range(ahead) for seed in self.seeds]
            index = torch.cat([torch.arange(first, first + self.size) for first in firsts])
            self.ready = scenes.render(index, stamped.SIDE, 0, self.device).split([each] * ahead)
        seen = self.ready[step % ahead]
        parts, order = [], []
        for models in self.kinds.values():
            torch.manual_seed(step)
            made = stamped.draw(self.configs[models[0]], step, seen, self.device)
            of_seed = [self.seeds.index(self.configs[i].seed) for i in models]
            parts.append([x.unflatten(0, (len(self.seeds), -1))[of_seed] for x in vars(made).values()])
            order += models
        back = torch.tensor(order, device=self.device).argsort()
        return stamped.Batch(*(torch.cat(columns)[back] for columns in zip(*parts, strict=True)))


def measure(many: Many, names: list[str], device: str) -> list[dict]:
    """One row a model and layer: what sinks.measure says, what the model has learnt, how alike its registers are."""
    rows, held_out = [], functools.cache(lambda config: stamped.held_out(config, 64, device, part=2))
    for i, (cell, config) in enumerate(zip(names, many.configs, strict=True)):
        world = replace(config, seed=0)  # of which all images are, and the rotation of what is copied
        module = stamped.build(config)
        module.load_state_dict(many.state(i))
        module = module.eval().to(device)
        learnt = stamped.evaluate(module, world, device)
        table = sinks.measure(module.vit, held_out(world).pixels, stamped.idle().expand(64, -1))
        named = dict(cell=cell, seed=config.seed, registers=config.registers, **learnt)
        if config.registers > 1:
            unit = F.normalize(module.vit.reg_token[0].detach(), dim=1)
            named["registers_cosine"] = (unit @ unit.T).fill_diagonal_(-1).max().item()
        rows += table.assign(**named).to_dict("records")
    return rows


def main() -> None:
    """Train a run's models, until the steps are done or the minutes are up, and write rows and weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=3.5)
    chosen = parser.parse_args()
    began, device = time.time(), chosen.device
    cells = configurations(chosen.run, chosen.steps, chosen.seeds)
    names, configs = [c for c, _ in cells], [c for _, c in cells]
    many, images = Many(configs, device), Images(configs, device)
    steps = configs[0].steps
    for step in range(steps):
        losses = many.step(step, images.batch(step))
        if step in (0, 20) or step % 500 == 499:
            print(f"step {step + 1}, {time.time() - began:.0f} s, losses {losses.min():.3f} to {losses.max():.3f}")
            sys.stdout.flush()
        if time.time() - began > 60 * chosen.minutes:
            break
    rows = [row | {"run": chosen.run, "steps": step + 1, "of": steps} for row in measure(many, names, device)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    half = {k: v.detach().half().cpu() for k, v in many.weights.items()}
    torch.save({"configs": [vars(c) for c in configs], "cells": names, "weights": half}, chosen.out / "many.pt")
    (chosen.out / "done.json").write_text(json.dumps(rows))
    print(f"done after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
