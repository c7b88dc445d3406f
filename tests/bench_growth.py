"""How cost grows.

Three methods on the same images: a plain forward pass; capture of all norms and of the attention of cls at all layers;
and storing every module's output with unfused attention, as TransformerLens's `run_with_cache` does by default. Memory
is the peak of existing tensors, without weights and images. Models are ViTs with random weights. For models larger than
ViT-S, the figure shows the time that follows from their FLOPs and the time of ViT-Ti.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import fig12
import matplotlib.pyplot as plt
import pandas as pd
import torch

from tests.bench import Row, taking_turns
from tests.bench_capture import As
from vitreg_lib.hooks.capture import capture, hooks
from vitreg_lib.plots.style import PALETTE, PAPER, styled

SIDES = (224, 448, 672, 1024)  # pixels; 196, 784, 1764 and 4096 patches of 16 pixels
ROUNDS = {672: 3, 1024: 1}  # where one takes seconds
COUNTS = (10, 100, 1000, 10_000)
PATCH = 16


def ours(model, x):
    """All norms and the attention of cls at all layers."""
    return capture(model, x, ("norms", "attention"), queries=[0], batch_size=8)


def everything(model, x) -> list:
    """The output of every module, with unfused attention."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output)

    for block in model.blocks:
        block.attn.fused_attn = False
    with hooks(*((module.register_forward_hook, keep) for module in model.modules())), torch.no_grad():
        model(x)
    for block in model.blocks:
        block.attn.fused_attn = True
    return kept


@functools.cache
def by_size() -> pd.DataFrame:
    """Seconds and peak MiB of one image in the three ways, over tokens (ViT-Ti) and over models (196 patches)."""
    found = []
    for arch, side in [("ti", side) for side in SIDES] + [("s", 224)]:
        model, x = fig12.build_vit(arch, PATCH, side, device="cpu"), torch.randn(1, 3, side, side)
        plain = torch.no_grad()(lambda model=model, x=x: model(x))
        row = {"arch": arch, "patches": (side // PATCH) ** 2}
        row["gigaflops"] = 2 * fig12.count_macs(arch, PATCH, side, whole=True) / 1e9
        for name, way in (("capture", ours), ("everything", everything)):
            first, second, ratio = taking_turns(functools.partial(way, model, x), plain, ROUNDS.get(side, 7))
            row |= {f"{name} s": first, "plain s": second, f"{name} ratio": ratio}
            row[f"{name} MiB"] = fig12.peak_bytes(As(model, way), x) / 2**20
        row["plain MiB"] = fig12.peak_bytes(model, x) / 2**20
        found.append(row)
    return pd.DataFrame(found)


@functools.cache
def by_count() -> pd.DataFrame:
    """Seconds, and MiB of what is kept at the end, over the number of images, on ViT-Ti/16 at 64 pixels."""
    model, found = fig12.build_vit("ti", PATCH, 64, device="cpu"), []
    for count in COUNTS:
        x = torch.randn(count, 3, 64, 64)
        began = time.perf_counter()
        seen = capture(model, x, ("norms", "attention"), queries=[0], batch_size=64)
        seconds = time.perf_counter() - began
        kept = sum(t.nbytes for t in (seen.norms, *seen.attention.values())) / 2**20
        one = sum(t.nbytes for t in everything(model, x[:1]) if isinstance(t, torch.Tensor)) / 2**20
        found.append({"images": count, "seconds": seconds, "capture MiB": kept, "everything MiB": count * one})
    return pd.DataFrame(found)


def rows() -> Iterator[Row]:
    """The measurements of the two pictures."""
    for row in by_size().to_dict("records"):
        name = f"ViT-{row['arch'].capitalize()}/16, {row['patches']} patches"
        for way, told in (("capture", "capture"), ("everything", "everything kept")):
            first, second = 1e3 * row[f"{way} s"], 1e3 * row["plain s"]
            yield Row(f"{name}: {told} vs. a plain forward pass", first, second, "ms", "", row[f"{way} ratio"])
            yield Row(f"{name}: {told}, peak memory", row[f"{way} MiB"], row["plain MiB"], "MiB")
    for row in by_count().to_dict("records"):
        kept, every = row["capture MiB"], row["everything MiB"]
        yield Row(f"{row['images']:,} images of 64 pixels, captured", row["seconds"], None, "s")
        yield Row(f"{row['images']:,} images, kept by capture vs. everything (extrapolated)", kept, every, "MiB")


@styled
def figures(folder: Path) -> list[tuple[str, str]]:
    """Draw cost over tokens, models and images; (file's name, caption) of each."""
    folder.mkdir(exist_ok=True)
    sizes, tiny = by_size(), by_size().query("arch == 'ti'")
    styles = {"plain": (PAPER, "plain forward"), "capture": (PALETTE[0], "capture")}
    styles |= {"everything": (PALETTE[1], "everything kept")}
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    for name, (colour, label) in styles.items():
        axes[0].plot(tiny.patches, tiny[f"{name} s"], marker=".", color=colour, label=label)
        axes[1].plot(tiny.patches, tiny[f"{name} MiB"], marker=".", color=colour)
    for axis, label in zip(axes, ("seconds an image", "peak memory (MiB)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="patches", ylabel=label)
        axis.set_xticks(tiny.patches, [f"{n:,}" for n in tiny.patches], minor=False)
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(folder / "tokens.svg", metadata={"Date": None})

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    first = sizes[sizes.patches == 196].set_index("arch")
    flops = {arch: 2 * fig12.count_macs(arch, PATCH, 224, whole=True) / 1e9 for arch in ("ti", "s", "b", "l", "g")}
    foretold = {arch: first["plain s"]["ti"] * value / flops["ti"] for arch, value in flops.items()}
    axes[0].plot(flops.values(), foretold.values(), ":", color=PAPER, label="by FLOPs, from ViT-Ti")
    for name, (colour, label) in styles.items():
        axes[0].plot(first.gigaflops, first[f"{name} s"], marker=".", color=colour, label=label)
    for arch, value in flops.items():
        axes[0].annotate(arch.capitalize(), (value, foretold[arch]), xytext=(3, -9), textcoords="offset points")
    axes[0].set(xscale="log", yscale="log", xlabel="GFLOPs of an image at 224 pixels", ylabel="seconds an image")
    axes[0].legend()
    count = by_count()
    for name in ("capture", "everything"):
        axes[1].plot(count.images, count[f"{name} MiB"], marker=".", color=styles[name][0], label=styles[name][1])
    axes[1].set(xscale="log", yscale="log", xlabel="images of 64 pixels", ylabel="kept at the end (MiB)")
    axes[1].legend()
    figure.savefig(folder / "models-images.svg", metadata={"Date": None})
    return [
        ("tokens.svg", "Time and peak memory of one image over the number of patches, ViT-Ti/16"),
        ("models-images.svg", "Left: time over the size of the model. Right: what is kept over the number of images"),
    ]
