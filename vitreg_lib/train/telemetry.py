"""Norms during a training: quantiles and outlier shares of every layer at log-spaced and some evenly spaced steps.

Figure 4(b) shows these. A measurement is one capture of the same held-out images.
"""

import pandas as pd
import torch

from ..hooks.capture import Capture, capture
from ..measure.outliers import separated_share

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)


def measured_steps(total: int, logarithmic: int = 40, even: int = 20) -> list[int]:
    """Steps from 0 to `total`, both included: `logarithmic` of them spaced evenly in the logarithm, `even` evenly.

    The former cover early training, with its fast changes; the latter cover late changes.
    """
    inner = torch.logspace(0, torch.tensor(float(max(total, 1))).log10().item(), logarithmic).round().long().tolist()
    return sorted({0, *inner, *(round(total * (i + 1) / even) for i in range(even)), total})


def measure(model: torch.nn.Module, images: torch.Tensor, step: int) -> pd.DataFrame:
    """One row per layer: step, layer, quantiles q0…q1 of patch norms, `outlier_share`, mean cls and register norms.

    `outlier_share` is here the share of patch tokens above three times their layer's median.
    """
    return table(capture(model, images, "norms", batch_size=64), step)


def table(captured: Capture, step: int = 0) -> pd.DataFrame:
    """The rows of `measure` from captured norms."""
    norms = captured.patch_norms
    flat = norms.transpose(0, 1).flatten(1)
    levels = torch.quantile(flat, torch.tensor(QUANTILES), dim=1).T.tolist()
    shares, cls = separated_share(norms).tolist(), captured.norms[..., : int(captured.has_cls)]
    rows = []
    for i, layer in enumerate(captured.layers):
        row = {"step": step, "layer": layer, "outlier_share": shares[i]}
        row |= {f"q{q:g}": level for q, level in zip(QUANTILES, levels[i], strict=True)}
        for name, part in (("cls_norm", cls), ("register_norm", captured.register_norms)):
            row[name] = part[:, i].mean().item() if part.shape[2] else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)


def shipped(names: str) -> dict[str, pd.DataFrame]:
    """{name: telemetry beside the model's shipped checkpoint}, without models that have none."""
    from ..base import CHECKPOINTS

    paths = {name: CHECKPOINTS / f"{name}.telemetry.parquet" for name in names.split()}
    return {name: pd.read_parquet(path) for name, path in paths.items() if path.exists()}
