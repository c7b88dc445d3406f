"""How registers enter and leave a model (Fig. 6): measurements, the drawing and the verdicts.

Tokens are read and changed at the input of the first block, where the sequence is (cls, registers, patches). This works
for trained registers and for registers added at test time.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from vitreg_lib.hooks.capture import evaluating, hooks
from vitreg_lib.plots.style import PALETTE, styled


def entering(model, images: torch.Tensor, edit: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens that enter the first block, tokens that leave the last), each (images, tokens, dim), of a `zoo.Model`.

    `edit` takes the entering tokens and returns the tokens that enter instead.
    """
    tokens = {}

    def before(block, args, kwargs):
        tokens["in"] = args[0] if edit is None else edit(args[0].clone())
        return (tokens["in"], *args[1:]), kwargs

    def after(block, inputs, output):
        tokens["out"] = output

    anatomy = model.anatomy
    blocks = anatomy.blocks
    first = (blocks[0].register_forward_pre_hook, before, {"with_kwargs": True})
    with evaluating(model.module), hooks(first, (blocks[-1].register_forward_hook, after, {"prepend": True})):
        anatomy.forward(getattr(images, "x", images).to(model.weights))
    return tokens["in"].cpu(), tokens["out"].cpu()


def flow(model, images: torch.Tensor) -> dict[str, int]:
    """Counts: patches, registers, tokens_in (at the first block), tokens_returned, parameters_of_registers."""
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

    kind: "noise" adds to each register noise with the standard deviation of the patch tokens; "permute" rotates the
    order of the registers by one; "image" takes them from the next image. If registers have no position and are the
    same for every image, the last two change nothing.
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


@styled
def token_flow(grid: tuple[int, int], num_registers: int, has_cls: bool, dim: int, depth: int, name: str) -> Figure:
    """Figure 6: which tokens enter the blocks and which leave the model, drawn from a model's own sizes."""
    figure, axis = plt.subplots(figsize=(7.2, 2.9))
    patches = grid[0] * grid[1]
    kinds = [("cls", int(has_cls), PALETTE[2]), ("register", num_registers, PALETTE[1]), ("patch", patches, PALETTE[0])]
    shown = [(kind, i, colour) for kind, n, colour in kinds for i in range(min(n, 6 if kind == "patch" else 8))]
    gap = 10.0 / max(len(shown) + 1, 8)
    for place, (kind, i, colour) in enumerate(shown):
        x = 0.4 + place * gap
        for y, kept in ((0.0, True), (2.5, kind != "register")):
            style = dict(facecolor=colour if kept else "white", edgecolor=colour, lw=1.2, ls="-" if kept else "--")
            axis.add_patch(
                matplotlib.patches.FancyBboxPatch((x, y), gap * 0.62, 0.5, boxstyle="round,pad=0.04", **style)
            )
        if kind == "register":
            axis.plot([x, x + gap * 0.62], [2.5, 3.0], color=colour, lw=1.2)
        middle = x + gap * 0.31
        for low, high in ((0.58, 1.02), (1.98, 2.42)):
            axis.annotate("", (middle, high), (middle, low), arrowprops=dict(arrowstyle="->", color="#444444", lw=0.8))
        text = {"cls": "cls", "register": f"reg {i + 1}", "patch": f"patch {i + 1}"}[kind]
        axis.text(middle, -0.12, text, ha="center", va="top", fontsize=7)
    right = 0.4 + len(shown) * gap
    axis.add_patch(
        matplotlib.patches.FancyBboxPatch(
            (0.3, 1.1), right - 0.4, 0.8, boxstyle="round,pad=0.04", facecolor="#eeeeee", edgecolor="#444444"
        )
    )
    axis.text((0.3 + right) / 2, 1.5, f"{depth} transformer blocks, width {dim}", ha="center", va="center")
    total = patches + num_registers + int(has_cls)
    for y, text in (
        (0.25, f"… {patches} patches\nin: {total} tokens"),
        (2.75, f"out: {total - num_registers} tokens,\n{num_registers} register{'s' * (num_registers != 1)} dropped"),
    ):
        axis.text(right + 0.05, y, text, va="center", fontsize=8)
    axis.set(xlim=(0, right + 2.4), ylim=(-0.5, 3.2), title=f"{name}: {grid[0]} × {grid[1]} patches")
    axis.axis("off")
    return figure


def claims(flow, effects, pairs: dict[str, str]):
    """Yields the arguments of `Run.claim`: C020 to C022 and ours. Tables of `flow` and `effect`, one row a model."""
    added = {name: int(flow.tokens_in[name] - flow.tokens_in[plain]) for name, plain in pairs.items()}
    kept = {name: bool(flow.tokens_returned[name] == flow.tokens_returned[plain]) for name, plain in pairs.items()}
    expected = all(count == flow.registers[name] - flow.registers[pairs[name]] for name, count in added.items())
    text = "; ".join(f"{name}: {count} more tokens" for name, count in added.items())
    yield "C020", bool(expected) if added else None, text or "no pair here"
    text = "; ".join(f"{name}: {flow.tokens_returned[name]} tokens returned" for name in kept)
    yield "C021", all(kept.values()) if kept else None, text or "no pair here"
    text = f"registers of another image change the output by {effects.image.max():.0e}"
    yield "C022", bool((effects.image == 0).all()), text
    measured = f"noise changes the patches by {effects.noise.min():.1%} or more, another order by "
    measured += f"{effects.permute.max():.0e}"
    text = "patches depend on the registers' values, not on their order"
    yield "ours-order", bool((effects.permute < 1e-4).all() and (effects.noise > 1e-3).all()), measured, text, "none"
