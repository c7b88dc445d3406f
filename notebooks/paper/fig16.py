"""Figure 16: scores of average attention maps, a grid of maps, and the verdicts."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from map_scores import entropy, mass
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from verdicts import above, copies, registered

from vitreg_lib.measure.pairs import interval
from vitreg_lib.plots.maps import draw_map
from vitreg_lib.plots.style import NORMS, bare, styled, wrapped

MASS = 0.8  # share of a map's mass; the smaller the area that holds it, the more local the map
LEAST = 0.01  # a preference of less than one point of attention does not count


def border_share(maps: torch.Tensor) -> torch.Tensor:
    """Share of mass on the outermost ring of maps (..., rows, cols), 0 to 1, (...)."""
    x = mass(maps).view(maps.shape)
    return 1 - x[..., 1:-1, 1:-1].sum((-1, -2)) / x.sum((-1, -2))


def upper_share(maps: torch.Tensor) -> torch.Tensor:
    """Share of mass in the upper half of maps (..., rows, cols), 0 to 1, (...); a middle row counts half."""
    rows = mass(maps).view(maps.shape).sum(-1)
    place = torch.arange(rows.shape[-1], device=rows.device) - (rows.shape[-1] - 1) / 2
    return (rows * (0.5 - 0.5 * place.sign())).sum(-1) / rows.sum(-1)


def support_area(maps: torch.Tensor) -> torch.Tensor:
    """Smallest share of patches that together hold 80 % of the map's mass, in (0, 1], (...): small is local."""
    x = mass(maps)
    held = x.double().sort(-1, descending=True).values.cumsum(-1)
    total = held[..., -1:]
    needed = 1 + (held < total * MASS * (1 - 1e-9)).sum(-1)  # the slack keeps rounding from adding a patch
    return torch.where(total[..., 0] > 0, needed / x.shape[-1], math.nan).to(x.dtype)


def scores(average: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """{token: border, upper_half, area_of_80_percent, entropy} of average maps {token: (rows, cols)}."""
    measures = {
        "border": border_share,
        "upper_half": upper_share,
        "area_of_80_percent": support_area,
        "entropy": lambda one: entropy(one, normalised=True),
    }
    return {token: {name: f(one).item() for name, f in measures.items()} for token, one in average.items()}


def leaning(score: torch.Tensor, against: torch.Tensor) -> tuple[int, float, float, float]:
    """(register whose score exceeds the reference most, difference, low, high), the middle 95 % over images.

    score: (images, registers); against: (images, registers), the reference. The register is chosen on the even images;
    the difference and its interval come from the odd ones. On the images that chose it, the largest of several
    differences is large by chance.
    """
    gap = score - against
    chosen = int(gap[::2].mean(0).argmax())
    judged = gap[1::2, chosen]
    return chosen, judged.mean().item(), *interval(judged)


def entropy_gap(attention: torch.Tensor, local: int, draws: int = 200, seed: int = 0) -> tuple[float, float, float]:
    """(gap, low, high): lowest entropy of the other tokens' average maps minus that of token `local`.

    attention: (images, tokens, rows, cols). low and high are the middle 95 % of a bootstrap over images.
    """
    flat = attention.flatten(2).double()
    drawn = torch.randint(len(flat), (draws, len(flat)), generator=torch.Generator().manual_seed(seed))
    weights = torch.stack([row.bincount(minlength=len(flat)) for row in drawn]).double() / len(flat)
    weights = torch.cat([torch.full((1, len(flat)), 1 / len(flat)).double(), weights])
    average = torch.einsum("di,itp->dtp", weights, flat)
    of_each = entropy(average.unflatten(-1, attention.shape[2:]), normalised=True)
    wide = of_each[:, [i for i in range(of_each.shape[1]) if i != local % of_each.shape[1]]]
    gap = wide.amin(1) - of_each[:, local]
    low, high = gap[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return gap[0].item(), low, high


def claims(models, attention: dict, names: dict, pairs: dict[str, str], having, profile: str):
    """Yields the arguments of `Run.claim`: C055 to C057 on trained registers, ours on registers added at test time.

    Dictionaries by model label: attention (images, tokens, rows, cols), the centre patch last; names of these tokens.
    """
    trained, missing = registered(models, pairs, having, profile)
    judged = [m for m in trained if not copies(m)]
    if trained and not judged:
        missing = f"the registers of {trained[0].label} are copies of one another"
    if not judged:
        for claim in ("C055", "C056", "C057"):
            yield claim, None, missing
    else:
        yield from _of_registers(judged[0].label, attention[judged[0].label], names[judged[0].label])
    for model in models:
        if model.role == "mended":
            picked = [i for i, token in enumerate(names[model.label]) if token.startswith("register")]
            spread = border_share(attention[model.label][:, picked].mean(0)).std().item() if len(picked) > 1 else 0
            measured = f"outer ring: standard deviation {spread:.0e} between registers"
            text = f"the added registers of {model.label} are copies and have the same map"
            yield f"ours-{model.label}", spread < 1e-3, measured, text, "none"


def _of_registers(name: str, attention: torch.Tensor, tokens: list[str]):
    registers = [i for i, token in enumerate(tokens) if token.startswith("register")]
    border, upper = border_share(attention), upper_share(attention)
    # without a cls token the registers are compared with the mean of all registers
    other = border[:, [tokens.index("cls")]] if "cls" in tokens else border[:, registers].mean(1, keepdim=True)
    which, gap, low, high = leaning(border[:, registers], other.expand(-1, len(registers)))
    text = (
        f"{name}: register {which + 1} has {100 * gap:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) more of its "
    )
    yield (
        "C055",
        above(low, high, LEAST),
        f"{text}attention on the outer ring than {'cls' if 'cls' in tokens else 'all'}",
    )
    mean = upper[:, registers].mean(1, keepdim=True).expand(-1, len(registers))
    which, gap, low, high = leaning(upper[:, registers], mean)
    text = (
        f"{name}: register {which + 1} has {100 * gap:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) more of its "
    )
    yield "C056", above(low, high, LEAST), f"{text}attention in the upper half than the registers on average"
    gap, low, high = entropy_gap(attention, len(tokens) - 1)
    text = f"{name}: the narrowest map of cls and registers has {gap:+.3f} ({low:+.3f} to {high:+.3f}) more entropy"
    yield "C057", above(low, high), f"{text} than the patch's map"


def by_pair(average: dict[str, dict], pairs: dict[str, str]) -> tuple[list[tuple[str, list]], list[str]]:
    """(rows, columns) for `image_grid`: a row is a model with registers, on its left the same model without.

    average: {label: {token: map}}, the centre patch last; pairs: {model with registers: the same model without}.
    """
    tokens = dict.fromkeys(token for maps in average.values() for token in maps)
    registers, rows = [token for token in tokens if token.startswith("register")], []
    for name in (name for name in average if name not in pairs.values()):
        maps, without = average[name], average.get(pairs.get(name), {})
        if not set(registers) & set(maps):  # a model without registers that has no pair
            maps, without = {}, maps
        both = [[each.get("cls"), [*each.values()][-1] if each else None] for each in (without, maps)]
        rows.append((name, [*both[0], *both[1], *map(maps.get, registers)]))
    two = ["cls", "centre patch"]
    return rows, [f"{token},\nwithout" for token in two] + two + registers


@styled
def image_grid(
    rows: list[tuple[str, list]], columns: list[str] = (), cmap: str = NORMS, label: str = "", cell: float = 1.35
) -> Figure:
    """A grid of pictures with labels on its margins.

    rows: (label, cells); a cell is (3, h, w) pixels, an (r, c) map with its own colour scale, or None for an empty
    place. label: the quantity of the maps; if given, a colour bar is drawn. cell: inches.
    """
    count = max(len(cells) for _, cells in rows)
    figure, axes = plt.subplots(len(rows), count, figsize=(cell * count + 1.2, cell * len(rows) + 0.4), squeeze=False)
    for (name, cells), row_axes in zip(rows, axes, strict=True):
        for axis, content in zip(row_axes, list(cells) + [None] * (count - len(cells)), strict=True):
            bare(axis)
            if content is not None:
                draw_map(axis, content, cmap)
        row_axes[0].set_ylabel(wrapped(name), rotation=0, ha="right", va="center", fontsize=8)
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, fontsize=8)
    if label:
        bar = figure.colorbar(
            ScalarMappable(cmap=cmap), ax=axes.ravel().tolist(), location="bottom", aspect=60, pad=0.02
        )
        bar.set_ticks([0, 1], labels=["least", "largest"])
        bar.set_label(f"{label}, of each map")
    return figure
