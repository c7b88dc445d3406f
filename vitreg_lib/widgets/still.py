"""The explorer's page as one still figure: a row of panels for each model."""

import math
import textwrap

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..plots.maps import COMPONENT
from ..plots.style import ATTENTION, NORMS, PALETTE, bare, picture, styled
from .view import View, scales

SIMILARITY = "cividis"  # colour map of neighbour similarity
OUTLIER = PALETTE[5]


@styled
def explorer(views: list[View], shared: bool = True, component: int = 0) -> Figure:
    """Image, attention, norms, components, neighbour similarity and the histogram of norms, one row per model.

    Outliers are ringed on image and norm map; a cross marks the query where it is a patch. `shared`: one colour scale
    for both models. `component`: 1 to 3, or 0 for the three as red, green and blue.
    """
    figure, axes = plt.subplots(
        len(views), 6, figsize=(12.2, 2.75 * len(views)), squeeze=False, width_ratios=[1, 1, 1, 1, 1, 1.35]
    )
    for row, view, ranges in zip(axes, views, scales(views, shared), strict=True):
        _row(figure, row, view, ranges, component)
    return figure


def _bar(figure: Figure, axis, image, label: str) -> None:
    """A colour bar below a panel, inside its margin, so that the panels stay aligned."""
    figure.colorbar(image, cax=axis.inset_axes([0, -0.1, 1, 0.055]), orientation="horizontal").set_label(label, size=8)


def _row(figure: Figure, row, view: View, ranges: dict, component: int) -> None:
    side = view.forward.pixels.shape[-2:]
    row[0].imshow(picture(view.forward.pixels))
    for place in view.is_outlier.nonzero().tolist():
        _square(row[0], *place, side[0] / view.grid[0], side[1] / view.grid[1])
        _square(row[2], *place)
    if view.patch:
        y, x = (n + 0.5 for n in view.patch)
        row[0].plot(x * side[1] / view.grid[1], y * side[0] / view.grid[0], "P", color="white", mec="black", ms=8)
    row[0].set_ylabel(f"{view.label}\n({view.role})\n{view.verdict}", fontsize=9)
    row[0].set_title(view.forward.image_name)
    row[0].set_xlabel("\n".join(view.title.split(" · ")[:2]), fontsize=8)
    drawn = (
        ("attention", f"attention of {view.query}", ATTENTION, "× even"),
        ("norms", "norm", NORMS, "L2 norm"),
        ("similarity", "neighbour similarity", SIMILARITY, "mean cosine"),
    )
    for axis, (name, title, cmap, unit) in zip((row[1], row[2], row[4]), drawn, strict=True):
        axis.set_title(title)
        if name in view.missing:
            _reason(axis, view, name)
            continue
        low, high = ranges[name]
        image = axis.imshow(getattr(view, name), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        _bar(figure, axis, image, unit)
    if "components" in view.missing:
        row[3].set_title("components")
        _reason(row[3], view, "components")
    elif component:
        image = row[3].imshow(view.components[..., component - 1], cmap=COMPONENT, vmin=-3, vmax=3)
        _bar(figure, row[3], image, "σ")
        row[3].set_title(f"component {component}")
    else:
        row[3].imshow((view.components / 6 + 0.5).clamp(0, 1), interpolation="nearest")
        row[3].set_title("components 1 to 3")
        row[3].set_xlabel("red, green, blue: −3 to 3 σ", fontsize=8)
    for axis in row[:5]:
        bare(axis)
    _histogram(row[5], view)


def _reason(axis, view: View, name: str) -> None:
    """An empty panel that says why nothing was measured."""
    axis.set(box_aspect=view.grid[0] / view.grid[1], facecolor="#EEEEEE")
    text = textwrap.fill(view.missing[name], 20)
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", size=8).set_in_layout(False)


def _histogram(axis, view: View) -> None:
    axis.stairs(view.set_counts.numpy(), view.edges.numpy(), fill=True, color="#BBBBBB", label="all images")
    axis.stairs(view.counts.numpy(), view.edges.numpy(), color=PALETTE[0], label="this image")
    axis.set_yscale("function", functions=(lambda v: v.clip(0) ** 0.5, lambda v: v**2))
    axis.set(xlabel="L2 norm", ylim=(0, None))
    axis.set_yticks([0, 0.01, 0.1, 0.3], ["0", "1 %", "10 %", "30 %"])
    if math.isfinite(view.cutoff):
        how = "by rule" if view.by_rule else "by hand"
        axis.axvline(view.cutoff, color=PALETTE[1], label=f"cutoff {view.cutoff:.3g}, {how}")
    axis.set_title(f"outliers: {view.outlier_share:.1%} of patches")
    axis.legend(loc="best", fontsize=7)


def _square(axis, row: int, col: int, height: float = 1.0, width: float = 1.0) -> None:
    """A frame round one patch; heights and widths in units of the picture."""
    offset = 0.5
    place = (col * width - offset, row * height - offset)
    for line, colour in ((2.6, "black"), (1.4, OUTLIER)):
        axis.add_patch(plt.Rectangle(place, width, height, fill=False, ec=colour, lw=line))
