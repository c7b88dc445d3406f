"""Attention sinks: tokens that get much attention and have little effect on the tokens that attend to them.

The attention of a head sums to 1, even if the head has nothing to add at a query. Then it can attend to a token whose
value vector is close to zero. `measure` answers for every layer: how much attention do given places get, how long are
the updates that they write into other tokens, and do their norms stand out? After Gu et al. 2024 and Fesser et al. 2026
(arXiv 2606.08105), who call a sink a NOP if its update has at most a fifth of the length of the others.
"""

from __future__ import annotations

import math

import torch

from vitreg_lib.hooks.anatomy import dissect, layer_scale
from vitreg_lib.hooks.capture import capture
from vitreg_lib.measure.outliers import cutoff, separated_share


def received(attention: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(heads,) share (0 to 1) of attention that queries outside of `places` give to the keys in `places`.

    attention: (images, heads, tokens, tokens) after softmax; places: (images, tokens) bool.
    """
    given = (attention * places[:, None, None]).sum(-1)  # (images, heads, queries)
    outside = ~places[:, None]
    return (given * outside).sum((0, 2)) / outside.sum()


def updates(v: torch.Tensor, attn: torch.nn.Module, scale: torch.Tensor | None = None) -> torch.Tensor:
    """(images, heads, tokens, dim): the update that a head writes if a query attends only to this token: scale · W_o v.

    v: (images, heads, tokens, head_dim); attn: timm's attention module; scale: LayerScale's (dim,), if there is one.
    """
    heads, head_dim = v.shape[1], v.shape[-1]
    weight = attn.proj.weight.detach().cpu().view(-1, heads, head_dim)  # (dim, heads, head_dim)
    written = torch.einsum("bhtd,ohd->bhto", v.float(), weight.float())
    return written if scale is None else written * scale.detach().cpu()


def length_ratio(updates: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(heads,) mean length of the updates (images, heads, tokens, dim) at `places`, divided by that elsewhere."""
    lengths = torch.linalg.vector_norm(updates, dim=-1)
    inside = places[:, None].expand_as(lengths)
    sums = [(lengths * mask).sum((0, 2)) / mask.sum((0, 2)).clamp_min(1) for mask in (inside, ~inside)]
    return sums[0] / sums[1].clamp_min(1e-12)


def spread_ratio(updates: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(heads,) how much the updates at `places` vary between images, divided by how much they vary elsewhere.

    A long update that is the same in every image carries no content: it acts as a bias, and its ratio is 0.
    """
    return length_ratio(updates - updates.mean(0), places)


def measure(model: torch.nn.Module, images: torch.Tensor, places: torch.Tensor | None = None):
    """A DataFrame, one row a layer: patch norms, and attention sinks at `places` (images, patches; NaN without places).

    outlier_share, norm_ratio: share of the patches above the layer's own cutoff, and their mean norm / the median.
    separated_share: share above three medians. largest: largest norm / the median. place_norm: mean norm at the places
    / the median. attention: share of attention from other patches to the places, in the head with the largest share;
    attention_mean: mean over heads. value_ratio: `length_ratio` of that head; spread_ratio: `spread_ratio` of that
    head. prefix_attention: attention from patches to cls and registers, in the head where it is largest. top_key: the
    largest mean attention of a single patch of an image, in the head where it is largest; top_norm: norm of that patch
    / the median; top_in_places: share of images (0 to 1) in which that patch is one of the places.
    """
    import pandas as pd

    anatomy = dissect(model)
    rows, cols = anatomy.grid(images)
    prefix = anatomy.num_prefix_tokens
    queries = range(prefix, prefix + rows * cols)
    seen = capture(model, images, ("norms", "attention", "v"), queries=list(queries))
    found = []
    for layer, norms in zip(seen.layers, seen.patch_norms.unbind(1), strict=True):
        cut, attention = cutoff(norms), seen.attention[layer]
        row = {
            "layer": layer,
            "outlier_share": (norms > cut).float().mean().item(),
            "norm_ratio": (norms[norms > cut].mean() / norms.median()).item(),
            "separated_share": separated_share(norms[:, None]).item(),
            "largest": (norms.max() / norms.median()).item(),
            **_most_attended(attention[..., prefix:], norms, places),
            "prefix_attention": attention[..., :prefix].sum(-1).mean((0, 2)).max().item() if prefix else 0.0,
            **dict.fromkeys(("place_norm", "attention", "attention_mean", "value_ratio", "spread_ratio"), math.nan),
        }
        if places is not None and places.any():
            given = received(attention[..., prefix:], places)
            head = int(given.argmax())
            scale = layer_scale(anatomy.blocks[layer], 1)
            written = updates(seen.v[layer], anatomy.attention[layer], scale)[:, :, prefix:]
            row |= {
                "place_norm": (norms[places].mean() / norms.median()).item(),
                "attention": given[head].item(),
                "attention_mean": given.mean().item(),
                "value_ratio": length_ratio(written, places)[head].item(),
                "spread_ratio": spread_ratio(written, places)[head].item(),
            }
        found.append(row)
    return pd.DataFrame(found)


def _most_attended(attention: torch.Tensor, norms: torch.Tensor, places: torch.Tensor | None) -> dict[str, float]:
    """top_key, top_norm and top_in_places of `measure`, from attention (images, heads, queries, patches)."""
    largest, which = attention.mean(2).max(-1)  # (images, heads)
    head = int(largest.mean(0).argmax())
    which = which[:, head, None]
    found = {
        "top_key": largest[:, head].mean().item(),
        "top_norm": (norms.gather(1, which).mean() / norms.median()).item(),
    }
    inside = math.nan if places is None else places.gather(1, which).float().mean().item()
    return found | {"top_in_places": inside}
