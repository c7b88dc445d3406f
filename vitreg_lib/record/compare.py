"""The committed record of an item, data/records/ITEM.json: its numbers, verdicts and drawn figures with profile mini.

A run with that profile and default parameters is compared with it: figures by what they draw (`drawn.compare`), names
and texts by `drawn.same_text`, verdicts exactly, and numbers within a tolerance (`close`). What a clock or
an allocator measured is known by its unit, the spread of a few draws by its name; they are neither kept nor compared.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np

from ..base import DATA, UserError, is_checked, shown, write_atomically

FOLDER = DATA / "records"
MACHINE_UNITS = ("s", "% of s", "% of MiB")  # units of what a clock or an allocator says of this machine
SPREAD = re.compile(r"\b(sd|std)\b")  # in names: of a few draws or splits, which says little by itself
ROUNDING = 1e-4  # numbers below it may be nothing else, and are told apart by no more than the tolerance of it
FEW = 5  # differences that are shown where not all are asked for
# Of the range drawn in a panel. Rounding on another processor moves what is only computed by far less; where a probe
# is trained it may turn one test image of the 96 or more that these notebooks use, which moves a point by about two
# per cent of a panel that spans fifty points. A line that a reader would call another one moves by more.
TOLERANCE = 0.05
THIS_MACHINE = "this machine"  # gid of what shows the time or memory that something took
PARTS = 8  # of a sequence; a picture has 4 x 4
PHOTO = 32  # pixels; a picture with a longer side is a photo
WORDS = ("title", "xlabel", "ylabel", "scales", "ticks", "texts")


def path(item: str) -> Path:
    """Where the item's record is committed."""
    return FOLDER / f"{item}.json"


def digest(record: dict) -> dict:
    """What of a run's record.json is committed: numbers to five digits, verdicts, what the figures draw."""
    measured = [
        [row["name"], row["model"], _short(row["value"])]
        for row in record["measured"]
        if row["unit"] not in MACHINE_UNITS and not SPREAD.search(row["name"])
    ]
    verdicts = [[claim["id"], claim["verdict"]] for claim in record["claims"]]
    return {"item": record["item"], "measured": measured, "verdicts": verdicts, "drawn": record["drawn"]}


def write(record: dict) -> Path:
    """Commit a run's record; other items' files are not touched."""
    write_atomically(path(record["item"]), (_readable(digest(record)) + "\n").encode())
    return path(record["item"])


def differences(record: dict) -> list[str]:
    """What of a run's record differs from the committed one, in words."""
    if not path(record["item"]).exists():
        return [f"nothing is recorded; make refresh NOTEBOOKS={record['item']} writes it"]
    now, before = digest(record), json.loads(path(record["item"]).read_text())
    # sixty steps of training carry rounding on to the verdict on a few images: shares within five points
    least = 1.0 if record["item"].startswith("train_") else ROUNDING
    lines = _numbers(now["measured"], before["measured"], least)
    judged = [dict(side["verdicts"]) for side in (now, before)]
    for claim in judged[1] | judged[0]:
        new, old = (verdicts.get(claim, "absent") for verdicts in judged)
        lines += [f"claim {claim}: {new}, recorded {old}"] if new != old else []
    for name in dict.fromkeys([*before["drawn"], *now["drawn"]]):
        if name not in now["drawn"] or name not in before["drawn"]:
            lines.append(f"{name}: {'not drawn any more' if name in before['drawn'] else 'not recorded'}")
        else:
            lines += [f"{name}, {line}" for line in compare(now["drawn"][name], before["drawn"][name])]
    return lines


def verdict(record: dict, all_of_them: bool = False) -> str:
    """One line where a run agrees with the committed record, else its differences, the first few or all."""
    lines, place, share = differences(record), shown(path(record["item"])), f"{TOLERANCE:.0%}".replace("%", " %")
    if not lines:
        kept = digest(record)
        return (
            f"as recorded: {len(kept['measured'])} numbers and {len(kept['drawn'])} "
            f"figure{'s' * (len(kept['drawn']) != 1)} agree with {place} within {share}"
        )
    few = lines if all_of_them else lines[:FEW]
    rest = len(lines) - len(few)
    more = [f"… and {rest} more: vitreg report {record['item']} --differences"] if rest else []
    return "\n  ".join([f"not as recorded in {place} (tolerance {share}):", *few, *more])


def check(record: dict) -> None:
    """Raise UserError where a run differs from the committed record, if `VITREG_CHECK` asks for it (`make test`)."""
    if is_checked() and differences(record):
        raise UserError(verdict(record))


def close(now: float | None, before: float | None, scale: float) -> bool:
    """Whether two numbers agree: within the tolerance that figures have, of the largest number of that name.

    One rule for all: of shares it forgives a few images of a hundred (a probe trained on another processor, an end of a
    bootstrap interval), of differences near zero what is small beside the others; a block or a neuron more is noticed.
    """
    if now is None or before is None:
        return now is before
    return abs(now - before) <= TOLERANCE * scale


def _numbers(now: list, before: list, least: float = ROUNDING) -> list[str]:
    """Differences of measured numbers, matched by name and model; names may hold numbers, which may differ a little.

    least: the smallest number that the tolerance is a share of.
    """
    new, old = _by_name(now), _by_name(before)
    scales = {}
    for (name, _), rows in old.items():
        scales[name] = max([scales.get(name, least), *(abs(v) for *_, v in rows if v is not None)])
    lines = []
    for key in dict.fromkeys([*old, *new]):
        rows, recorded = new.get(key, []), old.get(key, [])
        if len(rows) != len(recorded):
            name, model, _ = (recorded or rows)[0]
            lines.append(f"{_named(name, model)}: measured {len(rows)} times, recorded {len(recorded)} times")
            continue
        for (name, model, value), (name_before, _, value_before) in zip(rows, recorded, strict=True):
            if not same_text(name, name_before):
                lines.append(f"measured '{name}' for {model}, recorded '{name_before}'")
            elif not close(value, value_before, scales[key[0]]):
                lines.append(f"{_named(name, model)} is {_text(value)}, recorded {_text(value_before)}")
    return lines


def _by_name(rows: list) -> dict[tuple[str, str], list]:
    groups = {}
    for name, model, value in rows:
        groups.setdefault((re.sub(r"-?\d[\d.]*", "#", name), model), []).append((name, model, value))
    return groups


def _named(name: str, model: str) -> str:
    return f"{name} of {model}" if model else name


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _readable(value, indent: str = "") -> str:
    """JSON with a line for each number, verdict and artist, so that the difference of two records is readable."""
    inside = _items(value)
    flat = all(not isinstance(v, dict | list) for v in inside)
    artist = isinstance(value, dict) and all(not isinstance(w, dict | list) for v in inside for w in _items(v))
    if flat or artist:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        parts = [f"{json.dumps(k, ensure_ascii=False)}: {_readable(v, indent + ' ')}" for k, v in value.items()]
    else:
        parts = [_readable(v, indent + " ") for v in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{indent} " + f",\n{indent} ".join(parts) + f"\n{indent}{last}"


def _items(value) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def summary(figure) -> list[dict]:
    """One entry a visible panel of a matplotlib figure, insets and colour bars among them; it can be written as JSON.

    Numbers are rounded to a thousandth of the range drawn in the panel.
    """
    axes = [a for axis in figure.axes for a in (axis, *axis.child_axes) if axis.get_visible() and a.get_visible()]
    axes = [axis for axis in axes if axis.get_gid() != THIS_MACHINE]
    return [_panel(axis) for axis in dict.fromkeys(axes)]


def compare(now: list[dict], before: list[dict], tolerance: float = TOLERANCE) -> list[str]:
    """What differs between two summaries of a figure, one line each; tolerance is a share of the panel's range."""
    if len(now) != len(before):
        return [f"panels: {len(now)}, recorded {len(before)}"]
    lines = []
    for number, (new, old) in enumerate(zip(now, before, strict=True), 1):
        name = (old.get("title") or old.get("ylabel") or "").split("\n")[0]
        place = f"panel {number}" + (f" '{name}'" if name else "")
        lines += [f"{place}: {line}" for line in _panel_differences(new, old, tolerance)]
    return lines


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
    lines = []
    for key in WORDS:
        new, old = now.get(key, ""), before.get(key, "")
        if not same_text(str(new), str(old), tolerance):
            lines.append(f"{key} {new!r}, recorded {old!r}")
    kinds = [[artist["kind"] for artist in panel["drawn"]] for panel in (now, before)]
    if kinds[0] != kinds[1]:
        return [*lines, f"draws {_counted(kinds[0])}; recorded {_counted(kinds[1])}"]
    spans = {key: _span([artist[key][:2] for artist in before["drawn"] if key in artist]) for key in ("x", "y")}
    for number, (new, old) in enumerate(zip(now["drawn"], before["drawn"], strict=True), 1):
        place = f"{old['kind']} {kinds[1][:number].count(old['kind'])}"
        if not same_text(new.get("label", ""), old.get("label", ""), tolerance):
            lines.append(f"{place} is labelled {new.get('label', '')!r}, recorded {old.get('label', '')!r}")
        if new["n"] != old["n"]:
            lines.append(f"{place} draws {new['n']} values, recorded {old['n']}")
            continue
        for key in ("x", "y", "value", "limits"):
            span = spans.get(key) or _span([old.get("limits", [0, 0])])
            if len(new.get(key, [])) != len(old.get(key, [])):
                lines.append(f"{place} has another number of finite {key}")
                continue
            gaps = [abs(a - b) for a, b in zip(new.get(key, []), old.get(key, []), strict=True)]
            if gaps and max(gaps) > tolerance * span:
                worst = gaps.index(max(gaps))
                name = f"{_statistic(worst)} {key}" if key != "limits" else ("lower limit", "upper limit")[worst]
                lines.append(f"{place} has {name} {new[key][worst]:g}, recorded {old[key][worst]:g}")
    return lines


def _statistic(number: int) -> str:
    """What the numbers of `_statistics` are called."""
    if number < 3:
        return ("least", "largest", "mean")[number]
    return f"mean (part {number - 2}) of" if number < 19 else f"middle (part {number - 18}) of"


def _panel(axis) -> dict:
    artists = [*_patches(axis), *map(_line, axis.lines), *map(_collection, axis.collections), *map(_image, axis.images)]
    artists = [artist for artist in artists if artist]
    spans = {k: _span([_ends(artist[k]) for artist in artists if artist.get(k) is not None]) for k in ("x", "y")}
    drawn = []
    for artist in artists:
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
    drawn = []
    for group in together + [[patch] for patch in axis.patches if id(patch) not in grouped]:
        boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in group]
        corners = np.array([box.p0 for box in boxes] + [box.p1 for box in boxes])
        if id(group[0]) in grouped and axis.get_yscale() == "log":
            corners[:, 1] += 1  # bars stand on zero, which a log axis does not have
        label = next((c.get_label() for c in axis.containers if group[0] in c), group[0].get_label())
        drawn.append(_artist(group[0], "bars" if id(group[0]) in grouped else "shape", corners, len(group), label))
    return drawn


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
    if artist.get_gid() == THIS_MACHINE or not artist.get_visible():
        return None
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


def _image(image) -> dict | None:
    """A picture or a mesh; colours count with unequal weights, so that exchanged channels are noticed."""
    if image.get_gid() == THIS_MACHINE or not image.get_visible() or image.get_array() is None:
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
