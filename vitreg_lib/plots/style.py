"""One visual style: legible at the width of a notebook cell, safe for colour-blind readers, with the paper's value as a
labelled line and the profile and models in the caption."""

import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke

# The backend is set here. Set inside `rc_context`, a notebook's would lose its interactive mode when the context ends,
# and the notebook would show only its first figure.
plt.switch_backend(matplotlib.get_backend())

NORMS = "viridis"  # colour map of norms
ATTENTION = "magma"  # colour map of attention
# Okabe and Ito's colours, which colour-blind readers can distinguish
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
PAPER = "#555555"  # lines that show the paper's values
STYLE = {
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "vitreg",
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "figure.constrained_layout.use": True,
}


def styled(function):
    """Draw in the collection's style and leave the reader's own settings as they were."""
    import functools

    @functools.wraps(function)
    def inner(*args, **kwargs):
        with plt.rc_context(STYLE):
            return function(*args, **kwargs)

    return inner


def caption(figure: Figure, text: str) -> Figure:
    """Put a line below the figure: which models and images made it."""
    import textwrap

    width = int(figure.get_figwidth() * 18)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=7, color="#444444")
    return figure


def picture(pixels: torch.Tensor) -> np.ndarray:
    """(3, height, width) pixels in [0, 1] in the layout of matplotlib."""
    return pixels.clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def bare(axis) -> None:
    """Remove ticks, grid and frame, for a picture."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def ring(axis, mask: torch.Tensor, radius: float = 0.62) -> None:
    """Ring the patches of a mask (rows, cols) on a map: white with a dark outline, visible on any colour."""
    circles = [Circle((col, row), radius) for row, col in mask.nonzero().tolist()]
    outline = [withStroke(linewidth=3, foreground="black")]
    style = dict(facecolor="none", edgecolor="white", linewidth=1.3, path_effects=outline, clip_on=False)
    axis.add_collection(PatchCollection(circles, **style), autolim=False)  # else border rings would shrink the map


def draw_box(axis, box: torch.Tensor, **style) -> Rectangle:
    """Draw a box (left, top, right, bottom) given in pixels; picture coordinates refer to the centres of pixels."""
    left, top, right, bottom = (float(edge) - 0.5 for edge in box)
    return axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))


def wrapped(name: str) -> str:
    """A name on two lines where it is long: broken before a plus, after a comma, at a space, or before a last part."""
    if len(name) <= 11 or "\n" in name:
        return name
    for pattern, lines in ((r"(.+)(\+.*)", r"\1\n\2"), (r"(.+?), (.*)", r"\1,\n\2"), (r"(.+?) (.*)", r"\1\n\2")):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, lines, name)
    return re.sub(r"(.+-.+)(-\w{4,})", r"\1\n\2", name)


def plain_log(axis, most: int = 8) -> None:
    """Ticks of a log axis as plain numbers: 1, 2 and 5 times powers of ten, or the powers alone if `most` are exceeded.

    Call it after drawing the data, because the number of ticks depends on the range of the axis.
    """
    low, high = axis.get_view_interval()
    few = 3 * np.log10(high / low) > most
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1,) if few else (1, 2, 5), numticks=most))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
