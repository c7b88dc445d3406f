"""Figure 2: its verdicts."""

from __future__ import annotations

import torch
from verdicts import WORDS, exists, majority, of_family


def peak_is_outlier(attention: torch.Tensor, is_outlier: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """(images,) bool: is the patch with the most attention an outlier by its norm? Maps (images, rows, cols).

    where: bool, the patches that are considered, such as the background; None: all.
    """
    inside = attention if where is None else attention.where(where, torch.tensor(-1.0))
    return is_outlier.flatten(1).gather(1, inside.flatten(1).argmax(1, keepdim=True))[:, 0]


def claims(models, table, peaks: dict, having, profile: str):
    """Yields the arguments of `Run.claim`: C002 to C006, by family, then the controls.

    table: columns `kurtosis` and `outlier_share`, one row a model; peaks: `peak_is_outlier` by model label; having:
    labels of the models with artifacts.
    """
    share = {name: f"{name}: {hits.float().mean():.0%} of the images" for name, hits in peaks.items()}
    for claim, family in {"C002": "deit3", "C003": "clip", "C004": "dinov2"}.items():
        members = [m.label for m in of_family(models, family)]
        judged = [name for name in members if name in having]
        text = "the peak is an outlier in " + "; ".join(share[name] for name in judged or members)
        if judged:
            yield claim, majority(peaks[judged[0]]), text
        else:
            missing = f"no model {WORDS[family]} is at hand"
            yield claim, exists(False, profile) if members else None, f"no artifacts; {text}" if members else missing
    dino = [m.label for m in of_family(models, "dino")]
    others = [name for name in having if name not in dino]
    text = "; ".join(f"{name}: kurtosis {table['kurtosis'][name]:.3g}" for name in table.index)
    if dino and others:
        yield "C005", bool(table["kurtosis"][dino].max() < table["kurtosis"][others].min()), text
    else:
        yield "C005", None, f"{'no other model has artifacts' if dino else 'DINO is not at hand'}. {text}"
    sizes = "; ".join(f"{m.label}: {table.outlier_share[m.label]:.2%} of tokens" for m in models if m.role == "trained")
    yield "C006", None, f"sizes B and L of both families are not at hand. {sizes}"
    for model in (m for m in models if m.is_control):
        has = model.role == "planted control"
        text = f"the peak of the control {model.label} is {'' if has else 'not '}an outlier, as it was made"
        yield f"control-{model.label}", majority(peaks[model.label]) is has, share[model.label], text, "none"
