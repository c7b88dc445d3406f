"""Figure 17: colours from principal components, and the verdicts."""

from __future__ import annotations

import torch
from verdicts import every, over_images, specimen

from vitreg_lib.measure import maps


def colours(model, images, layer: int = -1) -> torch.Tensor:
    """(images, 3, rows, cols) first three components of each image's tokens after a block, -3 … 3 σ mapped to 0 … 1.

    For a replayed model they are read from disk: those of the last block.
    """
    if model.replayed:
        scores = model.kept("components", images).clamp(-3, 3)
    else:
        seen = model.capture(images, "tokens", layers=layer)
        tokens = seen.patches(seen.tokens[seen.layers[0]])
        scores = maps.principal_components(tokens, 3, per_image=True, grid=seen.grid).unflatten(1, seen.grid)
    return (scores / 6 + 0.5).permute(0, 3, 1, 2)


def claims(groups: list[list], above: dict[str, torch.Tensor], having, truths: dict):
    """Yields the arguments of `Run.claim`: C058 and C059, then the controls.

    groups: models with the same images, from `Run.by_source`. Dictionaries by model label: above, (images, patches) is
    a norm above 3 times the median?; truths, masks or None. having: labels of the models with artifacts.
    """
    shares = {name: over_images(mask) for name, mask in above.items()}
    mae = {m.label: group for group in groups for m in group if "mae" in m.label.split("-")}
    text = "; ".join(f"{name}: {each}" for name, each in shares.items())
    tested = [name for name, group in mae.items() if specimen(group, having)]
    if not mae:
        yield "C058", None, f"no masked autoencoder is at hand. Others: {text}"
    elif not tested:
        names = ", ".join(mae)
        yield "C058", None, f"no trained model has artifacts on the images of {names}, so nothing follows. {text}"
    else:
        yield "C058", every(shares[name].below() for name in tested), text
    yield "C059", None, "needs ImageNet's training set and the probes of tab02"
    for name, truth in truths.items():
        if truth is not None:
            there = truth.float().mean().item()
            text = f"the share of {name} is the share that was put there"
            yield (
                f"control-{name}",
                abs(shares[name].value - there) < 0.005,
                f"{shares[name].value:.2%}, truth {there:.2%}",
                text,
                "none",
            )
