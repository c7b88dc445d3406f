"""What a figure shows, as numbers, so that figures of two runs are compared by the data drawn and not by their bytes.

`summary` describes each panel: its words, its scales, and of every artist the kind, how many values it draws and, for
each coordinate, `[least, largest, mean, means of consecutive parts]`; the parts tell a mirrored or permuted drawing
from the original. Of a photo, whose textures average out, the value in the middle of each part follows. Coordinates
are as placed on the axes (logarithms where the axis is logarithmic), pictures are in their own unit.

Frames, grid lines and legends are left out, and so is a panel or an artist whose gid is `HERE`: what was measured of
this machine is another on the next.
"""

from __future__ import annotations

import math
import re
import warnings

import numpy as np

# Of the range drawn in a panel. Rounding on another processor moves what is only computed by far less; where a probe
# is trained it may turn one test image of the 96 or more that these notebooks use, which moves a point by about two
# per cent of a panel that spans fifty points. A line that a reader would call another one moves by more.
TOLERANCE = 0.05
HERE = "this machine"  # gid of what shows the time or memory that something took
PARTS = 8  # of a sequence; a picture has 4 x 4
PHOTO = 32  # pixels; a picture with a longer side is a photo
WORDS = ("title", "xlabel", "ylabel", "scales", "ticks", "texts")


def summary(figure) -> list[dict]:
    """One entry a visible panel of a matplotlib figure, insets and colour bars among them; it can be written as JSON.

    Numbers are rounded to a thousandth of the range drawn in the panel.
    """
    axes = [a for axis in figure.axes for a in (axis, *axis.child_axes) if axis.get_visible() and a.get_visible()]
    axes = [axis for axis in axes if axis.get_gid() != HERE]
    return [_panel(axis) for axis in dict.fromkeys(axes)]


def compare(now: list[dict], before: list[dict], tolerance: float = TOLERANCE) -> list[str]:
    """What differs between two summaries of a figure, one line each; tolerance is a share of the panel's range."""
    if len(now) != len(before):
        return [f"panels: {len(now)}, recorded {len(before)}"]
    told = []
    for number, (new, old) in enumerate(zip(now, before, strict=True), 1):
        name = (old.get("title") or old.get("ylabel") or "").split("\n")[0]
        place = f"panel {number}" + (f" '{name}'" if name else "")
        told += [f"{place}: {line}" for line in _panel_differences(new, old, tolerance)]
    return told


def same_text(now: str, before: str, tolerance: float = TOLERANCE) -> bool:
    """Whether two texts say the same: words to the letter, numbers within the tolerance.

    Decimal numbers and percentages may also differ by one in the last digit; a number that is part of a name
    (mini-deit3, -reg4) may not differ.
    """
    number = r"(?<![\w.])(?<!\w-)-?\d+\.?\d*(?:e[+-]?\d+)?(?:\s?%)?"
    if re.split(number, now) != re.split(number, before):
        return False
    for new, old in zip(re.findall(number, now), re.findall(number, before), strict=True):
        digits = re.sub(r"e.*", "", old).rstrip(" %").partition(".")[2]
        step = 1.01 * 10.0 ** -len(digits) if digits or "%" in old else 0
        a, b = float(new.rstrip(" %")), float(old.rstrip(" %"))
        if abs(a - b) > max(tolerance * abs(b), step):
            return False
    return True


def _panel_differences(now: dict, before: dict, tolerance: float) -> list[str]:
    told = []
    for key in WORDS:
        new, old = now.get(key, ""), before.get(key, "")
        if not same_text(str(new), str(old), tolerance):
            told.append(f"{key} {new!r}, recorded {old!r}")
    kinds = [[artist["kind"] for artist in panel["drawn"]] for panel in (now, before)]
    if kinds[0] != kinds[1]:
        return [*told, f"draws {_counted(kinds[0])}; recorded {_counted(kinds[1])}"]
    spans = {key: _span([artist[key][:2] for artist in before["drawn"] if key in artist]) for key in ("x", "y")}
    for number, (new, old) in enumerate(zip(now["drawn"], before["drawn"], strict=True), 1):
        place = f"{old['kind']} {kinds[1][:number].count(old['kind'])}"
        if not same_text(new.get("label", ""), old.get("label", ""), tolerance):
            told.append(f"{place} is labelled {new.get('label', '')!r}, recorded {old.get('label', '')!r}")
        if new["n"] != old["n"]:
            told.append(f"{place} draws {new['n']} values, recorded {old['n']}")
            continue
        for key in ("x", "y", "value", "limits"):
            span = spans.get(key) or _span([old.get("limits", [0, 0])])
            if len(new.get(key, [])) != len(old.get(key, [])):
                told.append(f"{place} has another number of finite {key}")
                continue
            gaps = [abs(a - b) for a, b in zip(new.get(key, []), old.get(key, []), strict=True)]
            if gaps and max(gaps) > tolerance * span:
                worst = gaps.index(max(gaps))
                name = f"{_statistic(worst)} {key}" if key != "limits" else ("lower limit", "upper limit")[worst]
                told.append(f"{place} has {name} {new[key][worst]:g}, recorded {old[key][worst]:g}")
    return told


def _statistic(number: int) -> str:
    """What the numbers of `_statistics` are called."""
    if number < 3:
        return ("least", "largest", "mean")[number]
    return f"mean (part {number - 2}) of" if number < 19 else f"middle (part {number - 18}) of"


def _panel(axis) -> dict:
    found = [*_patches(axis), *map(_line, axis.lines), *map(_collection, axis.collections), *map(_image, axis.images)]
    found = [artist for artist in found if artist]
    spans = {k: _span([_ends(artist[k]) for artist in found if artist.get(k) is not None]) for k in ("x", "y")}
    drawn = []
    for artist in found:
        entry = {"kind": artist["kind"]}
        if (label := str(artist["label"])) and not label.startswith("_"):
            entry["label"] = label
        entry["n"] = artist["n"]
        span = spans | ({"value": _span([artist["limits"]])} if "limits" in artist else {})
        entry |= {k: _statistics(artist[k], span[k]) for k in ("x", "y", "value") if artist.get(k) is not None}
        if "limits" in artist:
            entry["limits"] = [_rounded(v, span["value"]) for v in artist["limits"]]
        drawn.append(entry)
    words = {"title": axis.get_title(), "xlabel": axis.get_xlabel(), "ylabel": axis.get_ylabel()}
    words["scales"] = " ".join(scale for scale in (axis.get_xscale(), axis.get_yscale()) if scale != "linear")
    words["ticks"] = _named_ticks(axis.xaxis) + _named_ticks(axis.yaxis)
    words["texts"] = [text.get_text() for text in axis.texts if text.get_text()]
    return {key: text for key, text in words.items() if text} | {"drawn": drawn}


def _line(line) -> dict | None:
    return _artist(line, "line", np.column_stack([np.asarray(v, float) for v in line.get_data(orig=False)]))


def _patches(axis) -> list[dict | None]:
    """Bars that were drawn together, and each other patch by itself, all by their boxes."""
    together = [list(c.patches) for c in axis.containers if hasattr(c, "patches") and c.patches]
    grouped = {id(patch) for bars in together for patch in bars}
    found = []
    for group in together + [[patch] for patch in axis.patches if id(patch) not in grouped]:
        boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in group]
        corners = np.array([box.p0 for box in boxes] + [box.p1 for box in boxes])
        if id(group[0]) in grouped and axis.get_yscale() == "log":
            corners[:, 1] += 1  # bars stand on zero, which a log axis does not have
        label = next((c.get_label() for c in axis.containers if group[0] in c), group[0].get_label())
        found.append(_artist(group[0], "bars" if id(group[0]) in grouped else "shape", corners, len(group), label))
    return found


def _collection(collection) -> dict | None:
    from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh

    if isinstance(collection, QuadMesh):
        return _image(collection)
    if isinstance(collection, PathCollection):
        return _artist(collection, "points", np.ma.filled(collection.get_offsets().astype(float), np.nan))
    kind = {LineCollection: "segments", PolyCollection: "area"}
    kind = next((name for c, name in kind.items() if isinstance(collection, c)), type(collection).__name__)
    vertices = [path.vertices for path in collection.get_paths()]
    return _artist(collection, kind, np.concatenate(vertices) if vertices else np.empty((0, 2)))


def _artist(artist, kind: str, xy: np.ndarray, n: int | None = None, label: str | None = None) -> dict | None:
    """Points (n, 2) as placed on the axes; a coordinate that is not in units of the data (of `axhline`) is left out."""
    axis = artist.axes
    if artist.get_gid() == HERE or not artist.get_visible():
        return None
    transform = artist.get_offset_transform() if kind == "points" else artist.get_transform()
    found = {"kind": kind, "label": artist.get_label() if label is None else label}
    for key, values, scale, inside in zip(
        "xy", xy.T, (axis.xaxis, axis.yaxis), transform.contains_branch_seperately(axis.transData), strict=True
    ):
        if inside:
            with np.errstate(all="ignore"):
                placed = scale.get_transform().transform(values)
            found[key] = placed[np.isfinite(placed) & (placed > -900)]  # -1000: zero on a log axis
    found["n"] = n if n is not None else max((len(found[key]) for key in "xy" if key in found), default=0)
    return found


def _image(image) -> dict | None:
    """A picture or a mesh; colours count with unequal weights, so that exchanged channels are noticed."""
    if image.get_gid() == HERE or not image.get_visible() or image.get_array() is None:
        return None
    values = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)
    limits = list(map(float, image.get_clim()))
    if values.ndim == 3:
        top = 255 if np.asarray(image.get_array()).dtype == np.uint8 else 1
        values, limits = values[..., :3] @ [1 / 6, 2 / 6, 3 / 6] / top, [0.0, 1.0]
    return {"kind": "image", "label": image.get_label(), "n": values.size, "value": values, "limits": limits}


def _statistics(values: np.ndarray, span: float) -> list[float]:
    """[least, largest, mean, means of parts, of a photo also their middles], empty when no value is finite.

    (n,) is taken in 8 parts, (rows, cols) in 4 x 4.
    """
    if not np.isfinite(values).any():
        return []
    if values.ndim == 2:
        parts = [p for row in np.array_split(values, 4) for p in np.array_split(row, 4, axis=1) if p.size]
    else:
        parts = np.array_split(values, min(PARTS, len(values)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a part may be empty of finite values
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


def _span(ends: list[list[float]]) -> float:
    """The range of several [least, largest]; of a single value its size, 1 where there is none."""
    flat = [v for pair in ends for v in pair[:2]]
    if not flat:
        return 1.0
    return max(flat) - min(flat) or abs(flat[0]) or 1.0


def _rounded(value: float, span: float) -> float:
    digits = 3 - math.floor(math.log10(span))
    rounded = round(float(value), digits) + 0.0
    return int(rounded) if digits <= 0 else rounded


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kind} × {kinds.count(kind)}" for kind in dict.fromkeys(kinds)) or "nothing"
