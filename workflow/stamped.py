"""A task on scenes in which some patches never matter: does a small ViT develop artifacts on natural-looking images?

This is the task of notebooks/beyond/emergence.py on scenes of 64 x 64 pixels, with 64 patches of 8 x 8. Each patch has
a stamp, four blocks of random colour added to the scene (which stays visible), and up to two small dots. Every patch
must output the mean colours of its four quarters (twelve numbers). A patch with exactly one dot (a quarter of all) must
also output a fixed rotation of its left neighbour's colours. The four corners have no required output and are never
copied. The mean of the patches must predict the labels of the scene.

docs/log.md has the criteria and the results; the numbers are in data/sweeps/stamped.parquet. This file is a recipe
(`vitreg train workflow/stamped.py`). As a program it trains one seed of a configuration ("cell") in about four minutes
on one core, continues after a stop, and puts its rows into that table:

    python workflow/stamped.py stamped-reg4 1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vitreg_lib.base import DATA, NOTEBOOKS, ROOT, unknown, written  # noqa: E402
from vitreg_lib.data import scenes, stamps  # noqa: E402
from vitreg_lib.data.scenes import ATTRIBUTES, HELD_OUT, targets  # noqa: E402
from vitreg_lib.data.stamps import CORNERS, GRID, PATCH, SIDE  # noqa: E402
from vitreg_lib.train import images, loop, parallel  # noqa: E402

sys.path.insert(0, str(NOTEBOOKS / "beyond"))
import emergence  # noqa: E402

TABLE = DATA / "sweeps" / "stamped.parquet"
PATCHES = GRID * GRID
VIT = emergence.Task(dim=24, depth=3, heads=2, mlp_ratio=4.0, attention_dropout=0.1, position_fixed=True)
STAMP = {"both": 0.5, "strong": 1.0}  # amplitude of the stamps by variant; pixels go from -1 to 1
LABELS = 0.02  # weight of the loss for the scene's labels
LEARNS_FROM = "an artificial task on scenes, for the study of how artifacts begin"
OPTIONS = {"variant": ("both", "both (normal stamps), or strong (stamps of twice the amplitude)")}
DEFAULTS = {
    "image_size": 64,
    "steps": 6000,
    "batch_size": 16,
    "learning_rate": 0.01,
    "weight_decay": 0.4,
    "optimizer": "adamw",
    "eval_images": 512,
    "telemetry_images": 32,
    "save_every": 2000,
}
CELLS = {
    "stamped": {},
    "stamped-reg4": dict(registers=4),
    "stamped-reg4-start1": dict(registers=4, register_start=1.0),
    "stamped-reg4-start1e-6": dict(registers=4, register_start=1e-6),
    "strong": dict(variant="strong"),
    "strong-reg4": dict(variant="strong", registers=4),
}


@dataclass
class Batch:
    """pixels (n, 3, 64, 64), about -1 to 1; trigger (n, 64); answer (n, 64, 12); labels (n, 24)."""

    pixels: torch.Tensor
    trigger: torch.Tensor
    answer: torch.Tensor
    labels: torch.Tensor


def draw(config, step: int, seen: scenes.Scenes, device="cpu") -> Batch:
    """The images of a step, on the scenes `seen`."""
    generator = torch.Generator().manual_seed((config.seed * 2654435761 + step) % 2**32)
    pixels, own, dots = stamps.stamp(seen.pixels, generator, STAMP[config.variant])
    trigger = dots.sum(1) == 1
    may = torch.arange(PATCHES, device=device) % GRID > 0
    trigger &= may & ~idle(device) & ~idle(device).roll(1)
    rotation = emergence.fixed(config.seed)["rotation"].to(device)
    answer = own + trigger[..., None] * (own.roll(1, 1) @ rotation)
    labels = torch.cat([F.one_hot(v, len(ATTRIBUTES[name])) for name, v in targets(seen).items()], 1).float()
    return Batch(pixels, trigger, answer, labels)


def idle(device="cpu") -> torch.Tensor:
    """(64,) bool: patches without a required output, which are never copied."""
    mask = torch.zeros(PATCHES, dtype=torch.bool, device=device)
    mask[list(CORNERS)] = True
    return mask


def held_out(config, count: int, device="cpu", part: int = 0) -> Batch:
    """`count` images that are never used in training; each `part` has different ones."""
    first = HELD_OUT + part * 100_000
    return draw(config, (1 << 30) + part, scenes.render(range(first, first + count), SIDE, config.seed, device), device)


class Stamped(nn.Module):
    """A ViT with an output at every token, and a head for the labels on the mean of the patches."""

    def __init__(self, config):
        super().__init__()
        self.vit = emergence.answering(VIT, config, GRID, PATCH)
        self.labels = nn.Linear(VIT.dim, sum(map(len, ATTRIBUTES.values())))

    def forward(self, pixels):
        """(outputs (n, 64, 12) of the patches, logits (n, 24) of the scene's labels)."""
        tokens = self.vit.forward_features(pixels)[:, self.vit.num_prefix_tokens :]
        return self.vit.head(tokens), self.labels(tokens.mean(1))


def build(config) -> nn.Module:
    """A module with random weights."""
    return Stamped(config)


def backbone(module) -> nn.Module:
    """The ViT."""
    return module.vit


def _losses(module, config, batch: Batch):
    answers, logits = module(batch.pixels)
    error = (answers - batch.answer).square().mean(-1)
    asked = ~idle(error.device)
    labels = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").sum(1).mean()
    return error, error[:, asked].mean() + LABELS * labels, logits


def loss(module, config, step, device):
    """Mean squared error over the patches with a required output, plus the weighted loss for the labels."""
    assert parallel.world() == 1
    batch = draw(config, step, images.rendered(config, step, device), device)
    error, value, _ = _losses(module, config, batch)
    return value, {"trigger_error": error[batch.trigger].mean()}


def telemetry_images(config) -> torch.Tensor:
    """The held-out images whose norms are recorded during training."""
    return held_out(config, config.telemetry_images).pixels


def evaluate(module, config, device) -> dict[str, float]:
    """Explained variance (1 is perfect) of the outputs at triggers and at other patches; accuracy of the labels."""
    batch = held_out(config, config.eval_images, device, part=1)
    error, _, logits = _losses(module, config, batch)
    others = ~batch.trigger & ~idle(device)
    found = {}
    for name, where in (("marked", batch.trigger), ("others", others)):
        found[f"explained_{name}"] = 1 - (error[where].mean() / batch.answer[where].var(0).mean()).item()
    sizes = [len(names) for names in ATTRIBUTES.values()]
    for name, given, wanted in zip(ATTRIBUTES, logits.split(sizes, 1), batch.labels.split(sizes, 1), strict=True):
        found[f"accuracy_{name}"] = (given.argmax(1) == wanted.argmax(1)).float().mean().item()
    return found


def run(cell: str, seed: int, folder: Path) -> pd.DataFrame:
    """One row a block: the results of one seed of a cell, trained in `folder`, and the columns of `sinks.measure`."""
    import sinks
    from safetensors.torch import load_file

    config, recipe = loop.configure(__file__, seed=seed, **CELLS[cell])
    learnt = loop.train(config, recipe, folder, "cpu", progress=sys.stderr.isatty())
    vit = backbone(build(config)).eval()
    vit.load_state_dict(load_file(folder / "model.safetensors"))
    table = sinks.measure(vit, held_out(config, 128, part=2).pixels, idle().expand(128, -1))
    facts = {name: getattr(config, name) for name in ("variant", "seed", "registers", "steps")}
    if config.registers:
        unit = F.normalize(vit.reg_token[0].detach(), dim=1)
        facts |= {"register_start": config.register_start}
        facts |= {"registers_cosine": (unit @ unit.T).fill_diagonal_(-1).max().item()}
    facts |= {name: learnt[name] for name in ("explained_marked", "explained_others", "accuracy_shape")}
    return table.assign(cell=cell, of=config.steps, **facts)


def main(cell: str, seed: int) -> None:
    """Run one seed of a cell, print its rows and put them into the table."""
    if cell not in CELLS:
        raise unknown("cell", cell, CELLS)
    rows, old = run(cell, seed, ROOT / "runs" / "stamped" / f"{cell}-seed{seed}"), pd.read_parquet(TABLE)
    print(rows.round(3).T.to_string())
    rest = old[(old.cell != cell) | (old.seed != seed)]
    with written(TABLE) as temporary:
        pd.concat([rest, rows.reindex(columns=old.columns)], ignore_index=True).to_parquet(temporary, index=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
