"""Figure 20: the first component of a model's tokens, and the verdicts."""

from __future__ import annotations

import paired
import torch
from map_scores import moran_i

from vitreg_lib.measure import maps


def first_component(tokens: torch.Tensor, grid: tuple[int, int], clip: float | None = None) -> torch.Tensor:
    """(images, rows, cols) whitened scores of the first principal component of tokens (images, patches, dim)."""
    return maps.principal_components(tokens, 1, clip=clip, grid=grid)[..., 0].unflatten(1, grid)


def components(model, images, layer: int = -1, clip: float | None = None) -> list[torch.Tensor]:
    """`first_component` of a block's tokens, [before, after] the final LayerNorm; a replayed model's is read."""
    if model.replayed:
        kept = [model.kept(name, images) for name in ("component", "component_after")]
        return [values if clip is None else values.clamp(-clip, clip) for values in kept]
    seen = model.capture(images, ("tokens", "final"), layers=layer)
    return [first_component(seen.patches(x), seen.grid, clip) for x in (seen.tokens[seen.layers[0]], seen.final)]


def claims(models, component: dict, after: dict, truths: dict, having):
    """Yields the arguments of `Run.claim`: C063, judged before the final LayerNorm; then ours and the control.

    Dictionaries by model label: component and after, `first_component` before and after the final LayerNorm; truths,
    masks or None. having: labels of the models with artifacts.
    """
    beyond, behind = ({n: (v.abs() > 3).float().mean((1, 2)) for n, v in each.items()} for each in (component, after))
    rough = {name: -moran_i(values) for name, values in component.items()}  # lower is smoother
    yield "C063", *paired.judge(paired.compare(beyond, models), "trained", having)
    text = "registers added at test time leave fewer patches beyond 3 σ"
    yield "ours-beyond", *paired.judge(paired.compare(beyond, models), "test time", having), text, "none"
    text = "the same after the final LayerNorm"
    yield "ours-after-norm", *paired.judge(paired.compare(behind, models), "test time", having), text, "none"
    text = "with added registers neighbours are more alike (minus Moran's I falls)"
    yield "ours-smooth", *paired.judge(paired.compare(rough, models), "test time", having), text, "none"
    for name, truth in truths.items():
        if truth is not None and truth.any():
            values = component[name].flatten(1).abs()
            ratio = (values[truth].mean() / values[~truth].mean()).item()
            text = f"the first component of {name} points at its artifacts"
            yield f"control-{name}", ratio > 2, f"|component| there / elsewhere {ratio:.1f}", text, "none"
