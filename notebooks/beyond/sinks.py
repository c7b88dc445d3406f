"""Attention sinks: tokens that take attention and give nothing back.

A head that has nothing to add at a query must still give its attention, which sums to 1, to some key. It may give it
to a token whose value is drained. `measure` asks, at every layer: how much attention do given places take, how long is
what they write into the tokens that look there, and is their norm set apart? After Gu et al. 2024 and Fesser et al.
2026 (arXiv 2606.08105), who call a sink with an update of at most a fifth of the others' length a NOP.
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
    """(images, heads, tokens, dim) what a head writes for a query that looks at one token alone: scale · W_o v.

    v: (images, heads, tokens, head_dim); attn: timm's attention module; scale: LayerScale's (dim,), if there is one.
    """
    heads, head_dim = v.shape[1], v.shape[-1]
    weight = attn.proj.weight.detach().cpu().view(-1, heads, head_dim)  # (dim, heads, head_dim)
    written = torch.einsum("bhtd,ohd->bhto", v.float(), weight.float())
    return written if scale is None else written * scale.detach().cpu()


def length_ratio(updates: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(heads,) mean length of the updates (images, heads, tokens, dim) at `places` / elsewhere."""
    lengths = torch.linalg.vector_norm(updates, dim=-1)
    inside = places[:, None].expand_as(lengths)
    sums = [(lengths * mask).sum((0, 2)) / mask.sum((0, 2)).clamp_min(1) for mask in (inside, ~inside)]
    return sums[0] / sums[1].clamp_min(1e-12)


def spread_ratio(updates: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(heads,) how much the updates at `places` change with the image / how much they do elsewhere.

    An update that is long but the same in every image carries no content: it acts as a bias, and its ratio is 0.
    """
    return length_ratio(updates - updates.mean(0), places)


def measure(model: torch.nn.Module, images: torch.Tensor, places: torch.Tensor | None = None):
    """A DataFrame, one row a layer, of patch norms and of sinks at `places` (images, patches), NaN without them.

    outlier_share, norm_ratio: patches above the layer's own cutoff, and their mean norm / the median. separated_share:
    above three medians. place_norm: mean norm at the places / the median. attention: what patches elsewhere give to the
    places, in the head that gives most, and attention_mean over heads; value_ratio: length of that head's updates from
    there / from other patches; spread_ratio: of their changes with the image. prefix_attention: what patches give to
    cls and registers, in the head that gives most. top_key: the largest mean attention that one patch of an image gets,
    in the head where it is largest; top_norm: that patch's norm / the median; top_in_places: in how many images (0 to
    1) it is one of the places.
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
    """About each image's most attended patch, for attention (images, heads, queries, patches)."""
    largest, which = attention.mean(2).max(-1)  # (images, heads)
    head = int(largest.mean(0).argmax())
    which = which[:, head, None]
    found = {
        "top_key": largest[:, head].mean().item(),
        "top_norm": (norms.gather(1, which).mean() / norms.median()).item(),
    }
    inside = math.nan if places is None else places.gather(1, which).float().mean().item()
    return found | {"top_in_places": inside}
