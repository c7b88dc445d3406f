"""Pairs of a model with registers and the same without, its `base`; and the interval of a mean over images."""

import torch

TRAINED = ("trained", "fine-tuned")  # from the start, or into a finished model


def interval(values: torch.Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high): the bootstrap's 95 % interval of the mean of values (images,), over images."""
    values, generator = values.double().cpu(), torch.Generator().manual_seed(seed)
    means, at_once = values.new_empty(draws), 2 * max(1, 2**18 // len(values))  # memory for a million drawn values
    for part in means.split(at_once):
        part[:] = values[torch.randint(len(values), (len(part), len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def pairs(models, registers_from: str = "") -> dict[str, str]:
    """{label of a model with registers: label of the same model without}, of the pairs among models.

    `registers_from` restricts the pairs by the origin of their registers: "trained" (from the start, or into a finished
    model), "test time" …
    """
    kinds = TRAINED if registers_from == "trained" else (registers_from,)
    labels = {model.entry: model.label for model in models if model.role == "trained"}
    labels |= {name: model.label for model in models for name in (model.name, model.label)}
    having = [m for m in models if m.base and m.base in labels and (registers_from == "" or m.registers_from in kinds)]
    return {model.label: labels[model.base] for model in having}
