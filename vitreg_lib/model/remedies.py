"""What a remedy does to a model: empty tokens, registers added at test time, registers trained in.

`effect` compares a model with the same model after a remedy, photo by photo, on photos that the remedy never saw.
`table` tries the two remedies that need no training, the simplest first, and `best` names the one that does better.

    found = vr.mend.find(model)
    vr.remedies.table(model, images, found)                         # a row for NAME, NAME+empty4, NAME+ttr4
    vr.remedies.effect(model, vr.load("file:runs/…/model.safetensors"), images, found.cutoff, found.layer)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..hooks.capture import evaluating
from . import mend

BETTER = 0.01  # shares of outliers that differ by less than this part of the first share are taken for equal
MEANS = ("outliers", "attention_on_outliers", "attention_on_registers", "answers_kl", "same_answer", "features_apart")


@dataclass(frozen=True)
class Seen:
    """What `effect` compares, of one model: norms (images, patches) after a block and attention of cls there (images,
    tokens), None without cls; log probabilities (images, classes), None without classes; features (images, dim)."""

    norms: torch.Tensor
    attention: torch.Tensor | None
    num_prefix_tokens: int
    answers: torch.Tensor | None
    features: torch.Tensor


def see(model, images, layer: int = -1) -> Seen:
    """The `Seen` of a `Model` on normalised images or an `Images` set, in one forward pass."""
    has_cls = model.anatomy.has_cls
    keep = ("norms", "final", "attention") if has_cls else ("norms", "final")
    seen = model.capture(images, keep, layers=layer, queries=[0] if has_cls else None)
    row = seen.attention[seen.layers[-1]][:, :, 0].mean(1).float() if has_cls else None
    features, answers = seen.final[:, 0] if has_cls else seen.patches(seen.final).mean(1), None
    if hasattr(model.module, "forward_head"):  # timm's
        with evaluating(model.module):
            final = seen.final.to(model.weights)
            features = model.module.forward_head(final, pre_logits=True).float().cpu()
            logits = model.module.forward_head(final).float().cpu()
        if model.module.num_classes > 0 and logits.ndim == 2:
            answers = logits.log_softmax(1)
    pooled = features if features.ndim == 2 else features.mean(1)
    return Seen(seen.patch_norms[:, -1], row, seen.num_prefix_tokens, answers, pooled)


def effect(model, remedied, images, cutoff: float, layer: int = -1, labels: torch.Tensor | None = None):
    """A DataFrame with a row a photo: what differs between two models of the same architecture, or their `Seen`.

    outliers, outliers_before: share of patch tokens above `cutoff` after block `layer`. attention_on_outliers,
    …_before: attention of cls in that block (mean over heads) on the places that were outliers in `model`; NaN without
    any. attention_on_registers: on all registers of `remedied`, of whatever kind. answers_kl: Kullback-Leibler
    divergence of the class probabilities, in nats; same_answer: whether the likeliest class stays; both NaN for a model
    without classes. features_apart: 1 - cosine of the pooled features. right, right_before: whether the likeliest class
    is that of `labels` (images,); NaN without labels. Attention is NaN for a model without cls.
    """
    import pandas as pd

    before, after = (m if isinstance(m, Seen) else see(m, images, layer) for m in (model, remedied))
    mask = before.norms > cutoff
    nothing = torch.full((len(mask),), float("nan"))
    first, last = before.answers, after.answers
    named = first is not None
    known = named and labels is not None
    columns = {
        "outliers_before": mask.float().mean(1),
        "outliers": (after.norms > cutoff).float().mean(1),
        "attention_on_outliers_before": _attention_on(before, mask),
        "attention_on_outliers": _attention_on(after, mask),
        "attention_on_registers": _attention_on_registers(after),
        "features_apart": 1 - F.cosine_similarity(before.features, after.features, dim=1),
        "answers_kl": F.kl_div(last, first, reduction="none", log_target=True).sum(1) if named else nothing,
        "same_answer": (first.argmax(1) == last.argmax(1)).float() if named else nothing,
        "right_before": (first.argmax(1) == labels).float() if known else nothing,
        "right": (last.argmax(1) == labels).float() if known else nothing,
    }
    return pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})


def table(model, images, found, registers: int = 4, labels: torch.Tensor | None = None):
    """A DataFrame with a row a remedy, the untouched model first: the means of `effect` over the photos.

    found: what `mend.find` gave for the model. Its cutoff and its block are used for all rows.
    """
    import pandas as pd

    remedied = [
        mend.with_empty_tokens(model, registers),
        mend.with_test_time_registers(model, registers, found.neurons),
    ]
    before = see(model, images, found.layer)
    where = dict(cutoff=found.cutoff, layer=found.layer, labels=labels)
    rows = {model.label or model.name: means(effect(before, before, images, **where))}
    rows |= {m.label: means(effect(before, m, images, **where)) for m in remedied}
    return pd.DataFrame.from_dict(rows, orient="index")


def means(effects) -> dict[str, float]:
    """The means over photos of `effect`'s columns, without those that are NaN throughout; …_before is left out."""
    known = effects.dropna(axis=1, how="all")
    return {name: float(known[name].mean()) for name in (*MEANS, "right") if name in known}


def best(table) -> str:
    """The row of `table` that leaves fewest outliers; among those within 1 % of the share before, the simplest."""
    shares = table.outliers
    return shares.index[(shares <= shares.min() + BETTER * shares.iloc[0]).argmax()]


def _attention_on(seen: Seen, mask: torch.Tensor) -> torch.Tensor:
    if seen.attention is None:
        return torch.full((len(mask),), float("nan"))
    share = (seen.attention[:, seen.num_prefix_tokens :] * mask).sum(1)
    return share.where(mask.any(1), float("nan"))


def _attention_on_registers(seen: Seen) -> torch.Tensor:
    if seen.attention is None or seen.num_prefix_tokens == 1:
        return torch.full((len(seen.norms),), float("nan"))
    return seen.attention[:, 1 : seen.num_prefix_tokens].sum(1)
