"""Figure 17: colours from principal components, and the verdicts."""

from __future__ import annotations

import torch
from verdicts import specimen

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


def claims(models, share: dict[str, float], having, truths: dict):
    """Yields the arguments of `Run.claim`: C058 and C059, then the controls.

    share: of tokens above 3 times the median, by model label; having: labels of the models with artifacts; truths:
    masks or None, by label.
    """
    mae = [m.label for m in models if "mae" in m.label.split("-")]
    text = "; ".join(f"{name}: {value:.2%}" for name, value in share.items())
    if not mae:
        yield "C058", None, f"no masked autoencoder is at hand. Others: {text}"
    elif specimen(models, having) is None:
        yield "C058", None, f"no other trained model here has artifacts either, so nothing follows. {text}"
    else:
        yield "C058", all(share[name] < 0.001 for name in mae), text
    yield "C059", None, "needs ImageNet's training set and the probes of tab02"
    for name, truth in truths.items():
        if truth is not None:
            there = truth.float().mean().item()
            text = f"the share of {name} is the share that was put there"
            yield (
                f"control-{name}",
                abs(share[name] - there) < 0.005,
                f"{share[name]:.2%}, truth {there:.2%}",
                text,
                "none",
            )
