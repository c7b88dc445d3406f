"""What registers cost: parameters, FLOPs, time and memory by their number (Fig. 12, App. B; claims C042 to C044).

There are three independent methods: a formula, torch's FLOP counter on a real timm model on the meta device (no memory,
no arithmetic), and a measurement of time and memory on this machine.

Conventions: N tokens = patches + cls + registers, d = embed_dim. A block takes 12 N d^2 multiply-adds for its linear
layers and 2 N^2 d for attention. The paper does not say whether it counts attention, embedding and head, so these are
arguments. FLOPs are 2 x multiply-adds; norms, softmax, activations and biases are not counted, here or by torch.
Registers have no position embedding (timm's `no_embed_class=True`, where cls has none either), so R registers add R d
parameters. Models are named by size: ti, s, b, l and g, where g is DINOv2's ViT-g with its SwiGLU MLP.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitreg_lib.base import UserError
from vitreg_lib.plots.style import PALETTE, PAPER, styled
from vitreg_lib.record.drawn import THIS_MACHINE

REGISTER_COUNTS = (0, 1, 2, 4, 8, 16)  # of Fig. 8 and 12


class Size(NamedTuple):
    """Shape of a ViT. `swiglu`: packed SwiGLU; its hidden width is such that the MLP costs 8 d^2, like a plain MLP."""

    embed_dim: int
    depth: int
    num_heads: int
    swiglu: bool = False


SIZES = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "g": Size(1536, 40, 24, swiglu=True),
}


def called(row) -> str:
    """The name of a size for readers, from a row of `cost_table` or `measure_cost`: "ViT-L/14, 224 px"."""
    size = row.arch if row.arch == "g" else row.arch.capitalize()  # ViT-G/14 is another, larger model
    return f"ViT-{size}/{row.patch}, {row.resolution} px"


def read_sizes(text: str) -> list[tuple[str, int, int]]:
    """(size, patch, resolution) of each name in a text such as "ti/16/224 l/14/518". Raises UserError for others."""
    found = []
    for name in text.split():
        arch, *numbers = name.split("/")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise UserError(f"{name!r}: write size/patch/resolution, as in ti/16/224")
        found.append((arch, *map(int, numbers)))
        count_params(*found[-1])  # refuses an unknown size and a patch that does not divide the resolution
    if not found:
        raise UserError("no size to count: write size/patch/resolution, as in ti/16/224")
    return list(dict.fromkeys(found))


def read_counts(text: str) -> list[int]:
    """Numbers of registers in a text such as "0 1 4", each once. Raises UserError for other text."""
    if not text.split() or not all(count.isdecimal() for count in text.split()):
        raise UserError(f"registers {text!r}: write numbers from 0 on, as in 0 1 4")
    return list(dict.fromkeys(map(int, text.split())))


def cost_table(
    models: Iterable[tuple[str, int, int]],
    registers: Iterable[int] = REGISTER_COUNTS,
    whole: bool = False,
    attention: bool = True,
    num_classes: int = 0,
):
    """DataFrame of parameters and FLOPs by formula, one row for each (size, patch, resolution) and register count.

    Columns: `arch, patch, resolution, registers, tokens, params, flops, params_percent, flops_percent`; the last two
    are the increase over no registers. `flops`: 2 x multiply-adds of the blocks for one image; `whole` adds patch
    embedding and head. `params`: always of the whole model. `attention` False omits the term 2 N^2 d (Fig. 12).
    """
    import pandas as pd

    rows = []
    for arch, patch, resolution in models:
        base_params = count_params(arch, patch, resolution, 0, num_classes)
        base_flops = 2 * count_macs(arch, patch, resolution, 0, whole, attention, num_classes)
        for n in registers:
            params = count_params(arch, patch, resolution, n, num_classes)
            flops = 2 * count_macs(arch, patch, resolution, n, whole, attention, num_classes)
            tokens = num_patches(patch, resolution) + 1 + n
            percent = [100 * (params / base_params - 1), 100 * (flops / base_flops - 1)]
            rows.append([arch, patch, resolution, n, tokens, params, flops, *percent])
    columns = "arch patch resolution registers tokens params flops params_percent flops_percent".split()
    return pd.DataFrame(rows, columns=columns)


def count_macs(
    arch: str,
    patch: int,
    resolution: int,
    num_registers: int = 0,
    whole: bool = False,
    attention: bool = True,
    num_classes: int = 0,
) -> int:
    """Multiply-adds for one image by formula: per block 12 N d^2, with `attention` also 2 N^2 d (Fig. 12).

    `whole` adds the patch embedding (patches x d x 3 patch^2) and the head (d x num_classes, on the cls token).
    """
    size = _size(arch)
    _check_registers(num_registers)
    patches, d = num_patches(patch, resolution), size.embed_dim
    tokens = patches + 1 + num_registers
    macs = size.depth * (12 * tokens * d**2 + (2 * tokens**2 * d if attention else 0))
    return macs + (patches * d * 3 * patch**2 + d * num_classes if whole else 0)


def count_params(arch: str, patch: int, resolution: int, num_registers: int = 0, num_classes: int = 0) -> int:
    """Parameters of the whole model by formula: blocks, final norm, patch and position embedding, cls, registers, head.

    As timm builds it: no position embedding for cls and registers (the official code has one for cls, d more), no
    LayerScale (2 d a block in the official DINOv2), biases everywhere.
    """
    size = _size(arch)
    _check_registers(num_registers)
    patches, d = num_patches(patch, resolution), size.embed_dim
    # qkv, projection and MLP are 12 d^2; biases 3d + d, then those of the MLP; two LayerNorms 4d
    mlp_biases = _swiglu_hidden(d) + d if size.swiglu else 5 * d
    blocks = size.depth * (12 * d**2 + 4 * d + mlp_biases + 4 * d)
    embedding = 3 * patch**2 * d + d + patches * d + d  # patch embedding, position embedding, cls
    head = d * num_classes + num_classes
    return blocks + embedding + 2 * d + head + num_registers * d


def num_patches(patch: int, resolution: int) -> int:
    """Patches of a square image; raises ValueError if `resolution` is not a positive multiple of `patch`."""
    if patch < 1 or resolution < patch or resolution % patch:
        nearest = max(patch, round(resolution / max(patch, 1)) * patch)
        raise ValueError(f"resolution {resolution} is not a multiple of patch {patch}; nearest: {nearest}")
    return (resolution // patch) ** 2


def build_vit(
    arch: str,
    patch: int,
    resolution: int,
    num_registers: int = 0,
    num_classes: int = 0,
    device: str = "meta",
    seed: int = 0,
) -> torch.nn.Module:
    """timm's VisionTransformer of that size in eval mode, random weights, by default on meta (takes no memory).

    The global random state does not change.
    """
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    size = _size(arch)
    _check_registers(num_registers)
    num_patches(patch, resolution)
    options = {}
    if size.swiglu:
        ratio = _swiglu_hidden(size.embed_dim) / size.embed_dim
        options = {"mlp_ratio": ratio, "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=resolution,
            patch_size=patch,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            reg_tokens=num_registers,
            no_embed_class=True,
            num_classes=num_classes,
            device=device,
            **options,
        )
    return model.eval()


def counted(model: torch.nn.Module, resolution: int) -> dict[str, int]:
    """`{"params", "flops"}` of a timm model for one square image, FLOPs by torch.utils.flop_counter.

    Runs one forward pass on the model's device; on meta it costs nothing. The results must equal `count_params` and
    twice `count_macs(whole=True)`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    image = torch.zeros(1, 3, resolution, resolution, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return {"params": sum(p.numel() for p in model.parameters()), "flops": counter.get_total_flops()}


def measure_cost(
    arch: str,
    patch: int,
    resolution: int,
    registers: Iterable[int] = (0, 4, 16),
    batch_size: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
):
    """DataFrame of forward time and peak memory for each register count, on this machine, random weights.

    Columns: `arch, patch, resolution, registers, batch_size, device, seconds, seconds_percent, peak_mib,
    peak_percent`. Each round runs all counts in turn, after an unmeasured round, so that a slow moment slows all
    equally. `seconds` is the median over rounds, `seconds_percent` the median increase over the first count of the
    same round. `peak_mib`: MiB above weights and input. On CUDA the allocator reports it; elsewhere it is the sum of
    the tensors that exist at the same time, without the workspace inside an operation. All models stay in memory.
    """
    import pandas as pd

    registers = list(registers)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, resolution, resolution, generator=generator).to(device, dtype)
    models = [build_vit(arch, patch, resolution, n, device="cpu", seed=seed).to(device, dtype) for n in registers]
    peaks = [peak_bytes(model, images) / 2**20 for model in models]  # the unmeasured round
    seconds = torch.tensor([[_seconds(model, images) for model in models] for _ in range(rounds)])
    ratios = (seconds / seconds[:, :1]).quantile(0.5, dim=0)
    columns = {
        "arch": arch,
        "patch": patch,
        "resolution": resolution,
        "registers": registers,
        "batch_size": batch_size,
        "device": str(device),
        "seconds": seconds.quantile(0.5, dim=0).tolist(),
        "seconds_percent": (100 * (ratios - 1)).tolist(),
        "peak_mib": peaks,
        "peak_percent": [100 * (peak / peaks[0] - 1) for peak in peaks],
    }
    return pd.DataFrame(columns)


def peak_bytes(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Peak bytes of a forward pass without gradients, not counting weights and images.

    On CUDA from the allocator, which rounds blocks up; elsewhere the largest sum of the storages of operations'
    results that exist at the same time.
    """
    with torch.no_grad():
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            model(images)
            torch.cuda.synchronize(images.device)
            return torch.cuda.max_memory_allocated(images.device) - before
        known = [*model.parameters(), *model.buffers(), images]
        with _LiveBytes(known) as live:
            model(images)
        return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sums the storages of operations' results as long as they exist; those of `known` tensors do not count."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {id(storage): storage for storage in (t.untyped_storage() for t in known)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = id(storage), storage.nbytes()  # torch has one Python object for each storage
        if key in self.seen:
            return
        self.seen[key] = weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.now -= size


def _seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    def wait():
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    with torch.no_grad():
        wait()
        start = time.perf_counter()
        model(images)
        wait()
        return time.perf_counter() - start


def _size(arch: str) -> Size:
    if arch not in SIZES:
        raise ValueError(f"unknown size {arch!r}: one of {', '.join(SIZES)}")
    return SIZES[arch]


def _swiglu_hidden(embed_dim: int) -> int:
    return 2 * 8 * embed_dim // 3  # both halves together; 2 x 4096 at 1536


def _check_registers(num_registers: int) -> None:
    if num_registers < 0:
        raise ValueError(f"{num_registers} registers: 0 or more")


@styled
def cost(table: pd.DataFrame, measured: pd.DataFrame | None = None) -> Figure:
    """Figure 12: FLOPs and parameters added by registers, one line a model size; `measured` adds a third panel."""
    panels = 2 if measured is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(3.3 * panels + 0.2, 3.4))
    ends = {axis: [] for axis in axes[:2]}
    for number, (_, part) in enumerate(table.groupby(["arch", "patch", "resolution"], sort=False)):
        name, colour = called(part.iloc[0]), PALETTE[number % len(PALETTE)]
        for axis, values in zip(axes[:2], (part.flops_percent, part.params_percent), strict=True):
            axis.plot(part.registers, values, color=colour, marker=".")
            ends[axis].append((float(values.iloc[-1]), name, colour))
    for axis, labels in ends.items():
        label_ends(axis, labels, table.registers.max())
    axes[0].plot([4, 16], [2, 6], marker="v", color=PAPER, ls="", label="the paper: < 2 % with 4, ≤ 6 % with 16")
    axes[0].set(xlabel="registers", ylabel="FLOPs added (%)")
    axes[1].set(xlabel="registers", ylabel="parameters added (%)", ylim=(0, None))
    if measured is not None:
        axes[2].plot(measured.registers, measured.seconds_percent, color=PALETTE[0], marker=".", label="time")
        axes[2].plot(measured.registers, measured.peak_percent, color=PALETTE[1], marker=".", label="peak memory")
        row = measured.iloc[0]
        axes[2].set_gid(THIS_MACHINE)
        axes[2].axhline(0, color=PAPER, lw=0.8)
        axes[2].set(xlabel="registers", ylabel="measured, added (%)")
        axes[2].set_title(f"this machine ({row.device}):\n{called(row)}")
        axes[2].legend()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def label_ends(axis, ends: list[tuple[float, str, str]], x: float) -> None:
    """Write the names of lines beside their ends (value, name, colour) at `x`, without overlap."""
    gap, last = 0.075 * max(value for value, *_ in ends), -np.inf
    for value, name, colour in sorted(ends):
        last = max(value, last + gap)
        place = dict(xytext=(x * 1.04, last), va="center", fontsize=7, color=colour, annotation_clip=False)
        axis.annotate(name, (x, value), arrowprops=dict(arrowstyle="-", color=colour, lw=0.5), **place)
    axis.set_xticks(range(0, int(x) + 1, 4))
    axis.set_xlim(right=x * 1.02)


def claims(table: pd.DataFrame):
    """Yields the arguments of `Run.claim`: C042 to C044 and ours, from a `cost_table` with ViT-L/14 at 224 pixels."""
    table = table.assign(model=[called(row) for row in table.itertuples()])
    flops = {n: table[table.registers == n].set_index("model").flops_percent for n in (4, 16)}
    text = {n: "; ".join(f"{name}: {value:.2f} %" for name, value in found.items()) for n, found in flops.items()}
    paper = {n: found.get("ViT-L/14, 224 px") for n, found in flops.items()}
    yield "C042", None if paper[4] is None else bool(paper[4] < 2), text[4]
    yield "C043", None if paper[16] is None else bool(5 <= paper[16] <= 7), text[16]
    most, larger = table.params_percent.max(), table[table.arch != "ti"].params_percent.max()
    text_params = f"at most {most:.3f} %, at 16 registers and the smallest size; {larger:.3f} % from B up"
    yield "C044", bool(most < 0.1), text_params
    over = [name for name, value in flops[4].items() if value >= 2]
    measured = f"2 % or more with 4 registers: {', '.join(over) or 'none'}"
    text = "the bound of 2 % depends on patch and resolution: some models shown exceed it"
    yield "ours-patch", bool(over), measured, text, "none"
