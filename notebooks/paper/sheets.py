"""Figures of maps for models that get different images (photos, scenes, textures): one figure for each source."""

from __future__ import annotations

import torch

from vitreg_lib import plots
from vitreg_lib.measure.pairs import pairs as of_models


def draw(run, models, shown: dict, n: int = 4, name: str = "figure", alone: bool = False, **style) -> None:
    """Draw and save one figure for each group of models that get the same images.

    shown: maps (n, rows, cols) of the first n images of `run.examples`, or colours, by model label. The models of a
    pair share one colour scale; with `alone` each model has its own. The first figure is saved as `name`, the others as
    name-scenes, name-textures. style: arguments of `plots.sheet`.
    """
    saved, pairs = False, of_models(models)
    for group in run.by_source(models):
        labels = [m.label for m in group if m.label in shown]
        if not labels:
            continue
        examples, maps = run.examples(group[0], n), {label: shown[label] for label in labels}
        together = {label: base for label, base in pairs.items() if label in maps and base in maps}
        groups = [{label: each} for label, each in maps.items()] if alone else by_pair(maps, together)
        figure = plots.sheet(examples.pixels, groups, **style)
        roles = [m.label + (f" ({m.role})" if m.is_control else "") for m in group if m.label in maps]
        text = f"{run.item}, profile {run.profile}: {', '.join(roles)}; {examples.source}"
        source = examples.source.split(",")[0].split()[0]
        run.save(plots.caption(figure, text), f"{name}-{source}" if saved else name)
        saved = True


def by_pair(maps: dict[str, torch.Tensor], pairs: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """Groups for `plots.sheet`: each model together with its versions with registers.

    pairs: {model with registers: the same model without}, from `pairs.pairs`.
    """
    groups: dict[str, dict] = {name: {name: maps[name]} for name in maps if name not in pairs}
    for name, without in pairs.items():
        while without in pairs:  # registers added to a model that already has registers
            without = pairs[without]
        groups[without][name] = maps[name]
    return list(groups.values())
