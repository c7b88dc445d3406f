"""Attention maps: how chosen query tokens spread their attention over the patches (Fig. 1, 2, 8, 9, 16, 18, 19).

    captured = model.capture(images, ("norms", "attention"), layers=-1)     # rows of cls and registers
    maps = vr.attention.maps(captured)                                      # (images, queries, rows, cols)

`capture` keeps the rows softmax(q kᵀ/√d) of the chosen query tokens. This module averages them over heads, keeps the
patches and arranges them on the grid. The paper states neither layer, head nor query, except "last layer" for Fig. 19;
the defaults are the last block, the mean over heads and the cls token. A row sums to 1 over all keys, so a map sums to
less; `budget` gives the shares of cls and registers.
"""

import torch

from ..hooks.capture import Capture


def maps(
    captured: Capture, layer: int = -1, queries: list[int] | None = None, heads: list[int] | None = None
) -> torch.Tensor:
    """(images, queries, rows, cols) attention on the patches, the mean over `heads` (all by default).

    `layer` is a captured block, negative from the last captured one; `queries` are token positions among those
    captured, all of them by default. Raises ValueError for a layer, query or head that was not captured.
    """
    return on_grid(captured, _rows(captured, layer, queries, heads).mean(1))


def query_names(captured: Capture, queries: list[int] | None = None) -> list[str]:
    """Name of each captured query: cls, register 1 …, patch (row, col)."""
    names = []
    for token in captured.queries if queries is None else queries:
        if token < captured.num_prefix_tokens:
            names.append(captured.prefix[token])
        else:
            row, col = divmod(token - captured.num_prefix_tokens, captured.grid[1])
            names.append(f"patch ({row}, {col})")
    return names


def cls_or_mean(model, images, layer: int = -1, progress: bool = False):
    """A model's attention maps (images, rows, cols) and the `Capture` that holds them.

    The maps are the cls token's at `layer`, mean over heads. Without cls they are the mean of the registers' maps, and
    without any prefix token the mean of all patches' maps.
    """
    x = getattr(images, "x", images)
    rows, cols = model.anatomy.grid(x)
    prefix = model.anatomy.num_prefix_tokens
    queries = [0] if model.anatomy.has_cls else list(range(prefix)) or list(range(rows * cols))
    captured = model.capture(x, ("norms", "attention"), layers=layer, queries=queries, progress=progress)
    return maps(captured).mean(1), captured


def budget(captured: Capture, is_outlier: torch.Tensor | None = None, layer: int = -1, query: int = 0):
    """A DataFrame of shares of one query's attention, which sum to 1, with one row per image.

    Columns: cls, registers, outliers (where `is_outlier` (images, patches) is given) and patches, the others.
    """
    import pandas as pd

    row = _rows(captured, layer, [query])[:, :, 0].mean(1)  # (images, tokens)
    on_patches, own = row[:, captured.num_prefix_tokens :], captured.registers
    others = [place for place in range(captured.num_prefix_tokens) if place not in own]  # cls, dist
    outliers = torch.zeros_like(on_patches, dtype=torch.bool) if is_outlier is None else is_outlier
    shares = {
        "cls": row[:, others].sum(1),
        "registers": row[:, own].sum(1),
        "outliers": (on_patches * outliers).sum(1),
        "patches": (on_patches * ~outliers).sum(1),
    }
    return pd.DataFrame({name: value.double().numpy() for name, value in shares.items()})


def relative(attn_maps: torch.Tensor) -> torch.Tensor:
    """Maps (..., rows, cols) in multiples of even attention over the patches: a uniform map is 1 everywhere."""
    return attn_maps / attn_maps.mean((-2, -1), keepdim=True)


def on_grid(captured: Capture, tokens: torch.Tensor) -> torch.Tensor:
    """(..., tokens) values of all tokens, or (..., patches), as maps (..., rows, cols) of the patches."""
    patches = captured.grid[0] * captured.grid[1]
    return tokens[..., -patches:].unflatten(-1, captured.grid)


def _rows(captured: Capture, layer: int, queries=None, heads=None) -> torch.Tensor:
    """(images, heads, queries, tokens): the captured rows of some queries and heads, all by default."""
    if not captured.attention:
        raise ValueError('no attention was captured: ask capture for "attention"')
    rows = captured.attention[captured.block(layer)]
    if queries is not None:
        if missing := [q for q in queries if q not in captured.queries]:
            queries = ", ".join(map(str, captured.queries[:20]))
            raise ValueError(f"query {missing[0]} was not captured; captured are {queries}")
        rows = rows[:, :, [captured.queries.index(q) for q in queries]]
    if heads is not None:
        if missing := [h for h in heads if not 0 <= h < rows.shape[1]]:
            raise ValueError(f"head {missing[0]} out of range for {rows.shape[1]} heads (0…{rows.shape[1] - 1})")
        rows = rows[:, list(heads)]
    return rows
