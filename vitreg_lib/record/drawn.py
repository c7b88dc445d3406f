"""The content of a matplotlib figure as numbers and words, kept in records to compare two runs of a notebook.

Each visible panel has an entry with its labels and, for each line, bar, picture …, statistics of its coordinates or
values, rounded to a thousandth of the range drawn in the panel. `workflow/compare.py` compares two such summaries.
"""

import math
import warnings

import numpy as np

THIS_MACHINE = "this machine"  # gid of artists that show measured time or memory
PARTS = 8  # of a sequence; a picture has 4 x 4
PHOTO = 32  # pixels; a picture with a longer side is a photo


def summary(figure) -> list[dict]:
    """One entry per visible panel of a matplotlib figure, with insets and colour bars, ready for JSON."""
    axes = [a for axis in figure.axes if axis.get_visible() for a in (axis, *axis.child_axes) if _counts(a)]
    return [_panel(axis) for axis in dict.fromkeys(axes)]


def _counts(artist) -> bool:
    return artist.get_visible() and artist.get_gid() != THIS_MACHINE


def _panel(axis) -> dict:
    lines, collections, images = (filter(_counts, each) for each in (axis.lines, axis.collections, axis.images))
    artists = [*_patches(axis), *map(_line, lines), *map(_collection, collections), *map(_image, images)]
    spans = {k: extent([_ends(artist[k]) for artist in artists if artist.get(k) is not None]) for k in ("x", "y")}
    drawn = []
    for artist in artists:
        entry = {"kind": artist["kind"]}
        if (label := str(artist["label"])) and not label.startswith("_"):
            entry["label"] = label
        entry["n"] = artist["n"]
        span = spans | ({"value": extent([artist["limits"]])} if "limits" in artist else {})
        entry |= {k: _statistics(artist[k], span[k]) for k in ("x", "y", "value") if artist.get(k) is not None}
        if "limits" in artist:
            entry["limits"] = [_rounded(v, span["value"]) for v in artist["limits"]]
        drawn.append(entry)
    words = {"title": axis.get_title(), "xlabel": axis.get_xlabel(), "ylabel": axis.get_ylabel()}
    words["scales"] = " ".join(scale for scale in (axis.get_xscale(), axis.get_yscale()) if scale != "linear")
    words["ticks"] = _named_ticks(axis.xaxis) + _named_ticks(axis.yaxis)
    words["texts"] = [text.get_text() for text in axis.texts if text.get_text()]
    return {key: text for key, text in words.items() if text} | {"drawn": drawn}


def _line(line) -> dict:
    return _artist(line, "line", np.column_stack([np.asarray(v, float) for v in line.get_data(orig=False)]))


def _patches(axis) -> list[dict]:
    """One entry for bars drawn together and one for each other patch, all by their boxes."""
    together = [list(c.patches) for c in axis.containers if hasattr(c, "patches") and c.patches]
    grouped = {id(patch) for bars in together for patch in bars}
    drawn = []
    groups = together + [[patch] for patch in axis.patches if id(patch) not in grouped]
    for group in (group for group in groups if _counts(group[0])):
        boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in group]
        corners = np.array([box.p0 for box in boxes] + [box.p1 for box in boxes])
        if id(group[0]) in grouped and axis.get_yscale() == "log":
            corners[:, 1] += 1  # bars start at zero, which a log axis does not have
        label = next((c.get_label() for c in axis.containers if group[0] in c), group[0].get_label())
        drawn.append(_artist(group[0], "bars" if id(group[0]) in grouped else "shape", corners, len(group), label))
    return drawn


def _collection(collection) -> dict:
    from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh

    if isinstance(collection, QuadMesh):
        return _image(collection)
    if isinstance(collection, PathCollection):
        return _artist(collection, "points", np.ma.filled(collection.get_offsets().astype(float), np.nan))
    kind = {LineCollection: "segments", PolyCollection: "area"}
    kind = next((name for c, name in kind.items() if isinstance(collection, c)), type(collection).__name__)
    vertices = [path.vertices for path in collection.get_paths()]
    return _artist(collection, kind, np.concatenate(vertices) if vertices else np.empty((0, 2)))


def _artist(artist, kind: str, xy: np.ndarray, n: int | None = None, label: str | None = None) -> dict:
    """Points (n, 2) as placed on the axes; a coordinate that is not in units of the data (of `axhline`) is left out."""
    axis = artist.axes
    transform = artist.get_offset_transform() if kind == "points" else artist.get_transform()
    entry = {"kind": kind, "label": artist.get_label() if label is None else label}
    for key, values, scale, inside in zip(
        "xy", xy.T, (axis.xaxis, axis.yaxis), transform.contains_branch_seperately(axis.transData), strict=True
    ):
        if inside:
            with np.errstate(all="ignore"):
                placed = scale.get_transform().transform(values)
            entry[key] = placed[np.isfinite(placed) & (placed > -900)]  # -1000: zero on a log axis
    entry["n"] = n if n is not None else max((len(entry[key]) for key in "xy" if key in entry), default=0)
    return entry


def _image(image) -> dict:
    """A picture or a mesh; colours count with unequal weights, so that exchanged channels are noticed."""
    values = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)
    limits = list(map(float, image.get_clim()))
    if values.ndim == 3:
        top = 255 if np.asarray(image.get_array()).dtype == np.uint8 else 1
        values, limits = values[..., :3] @ [1 / 6, 2 / 6, 3 / 6] / top, [0.0, 1.0]
    return {"kind": "image", "label": image.get_label(), "n": values.size, "value": values, "limits": limits}


def _statistics(values: np.ndarray, span: float) -> list[float]:
    """[least, largest, mean, means of parts, of a photo also their middles], empty when no value is finite.

    (n,) is divided into 8 parts, (rows, cols) into 4 x 4.
    """
    if not np.isfinite(values).any():
        return []
    if values.ndim == 2:
        parts = [p for row in np.array_split(values, 4) for p in np.array_split(row, 4, axis=1) if p.size]
    else:
        parts = np.array_split(values, min(PARTS, len(values)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a part may have no finite value
        means = [np.nanmean(part) for part in parts]
    if values.ndim == 2 and max(values.shape) > PHOTO:
        means += [part[part.shape[0] // 2, part.shape[1] // 2] for part in parts]
    numbers = [np.nanmin(values), np.nanmax(values), np.nanmean(values), *np.nan_to_num(means)]
    return [_rounded(v, span) for v in numbers]


def _named_ticks(axis) -> list[str]:
    from matplotlib.category import StrCategoryLocator
    from matplotlib.ticker import FixedLocator

    locator = axis.get_major_locator()
    if not isinstance(locator, FixedLocator | StrCategoryLocator):
        return []
    return [text for text in axis.get_major_formatter().format_ticks(locator()) if text]


def _ends(values: np.ndarray) -> list[float]:
    return [float(values.min()), float(values.max())] if len(values) else []


def extent(ends: list[list[float]]) -> float:
    """The range of several [least, largest]; for a single value its magnitude; 1 without values."""
    flat = [v for pair in ends for v in pair[:2]]
    if not flat:
        return 1.0
    return max(flat) - min(flat) or abs(flat[0]) or 1.0


def _rounded(value: float, span: float) -> float:
    digits = 3 - math.floor(math.log10(span))
    rounded = round(float(value), digits) + 0.0
    return int(rounded) if digits <= 0 else rounded
