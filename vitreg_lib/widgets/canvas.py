"""The clickable panels of one model: an anywidget whose whole state is the view that it draws.

The page side is canvas.js. It sends messages: {kind: "query", query: [row, col] or null for cls}, {kind: "cutoff",
value: norm or null for the rule} and {kind: "upload", name} with the file's bytes.
"""

from pathlib import Path

import anywidget
import matplotlib
import numpy as np
import torch
import traitlets

from ..plots.maps import COMPONENT
from ..plots.style import ATTENTION, NORMS
from .still import SIMILARITY
from .view import View

MAPS = {"attention": ATTENTION, "norms": NORMS, "similarity": SIMILARITY}
PALETTES = (ATTENTION, NORMS, SIMILARITY, COMPONENT)


def palette(name: str) -> bytes:
    """256 RGB colours of a matplotlib colour map."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()


class PatchCanvas(anywidget.AnyWidget):
    """Panels of one model. view: `message` of a `View`. opacity: of the attention over the image, 0 to 1."""

    _esm = Path(__file__).with_name("canvas.js")
    _css = Path(__file__).with_name("canvas.css")
    view = traitlets.Dict().tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)
    palettes = traitlets.Dict({name: palette(name) for name in PALETTES}).tag(sync=True)


def message(view: View, scales: dict[str, tuple[float, float]], component: int, serial: int) -> dict:
    """A `View` as canvas.js draws it: plain values, maps as bytes of float32, pictures as bytes of RGB.

    `serial` numbers the views; the page shows it after it has drawn the view.
    """
    one = component - 1
    components = _floats(view.components[..., one]) if component else _rgb(view.components.nan_to_num() / 6 + 0.5)
    return {
        "serial": serial,
        "label": view.label,
        "image_name": view.forward.image_name,
        "role": view.role,
        "verdict": view.verdict,
        "because": str(view.forward.detection),
        "replayed": bool(view.forward.measured),
        "missing": view.missing,
        "title": view.title,
        "notes": [f"{view.label} {note}" for note in view.notes],
        "query": view.query,
        "patch": list(view.patch) if view.patch else None,
        "grid": list(view.grid),
        "size": list(view.forward.pixels.shape[-2:]),
        "pixels": _rgb(view.forward.pixels.permute(1, 2, 0)),
        "scales": {n: {"palette": MAPS[n], "low": scales[n][0], "high": scales[n][1]} for n in MAPS},
        "share": _floats(view.attention_share),
        "component": component,
        "components": components,
        "cutoff": view.cutoff if view.cutoff < float("inf") else None,
        "by_rule": view.by_rule,
        "budget": None if "attention" in view.missing else view.budget,  # NaN cannot be sent
        **{name: _floats(getattr(view, name)) for name in (*MAPS, "edges", "counts", "set_counts")},
    }


def _floats(values: torch.Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().astype("<f4").tobytes()


def _rgb(colours: torch.Tensor) -> bytes:
    """(..., 3) colours in [0, 1] as bytes."""
    return (colours.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()
