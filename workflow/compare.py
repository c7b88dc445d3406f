"""The committed record of an item, data/records/ITEM.json: its numbers, verdicts and drawn figures in the profile mini.

A run with that profile and default parameters is compared with it: figures by the drawn data (`compare`), names and
texts by `same_text`, verdicts exactly, and numbers within a tolerance (`close`). Times and memory (identified by their
unit) and standard deviations over few draws (identified by their name) are neither recorded nor compared.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import items

from vitreg_lib.base import DATA, shown, write_atomically
from vitreg_lib.record import run as runs
from vitreg_lib.record.drawn import extent

FOLDER = DATA / "records"
MACHINE_UNITS = ("s", "% of s", "% of MiB")  # units of times and memory, which depend on the machine
SPREAD = re.compile(r"\b(sd|std)\b")  # in names: standard deviations over few draws or splits
ROUNDING = 1e-4  # smaller numbers may be rounding errors; they are compared as if they had this size
FEW = 5  # differences that are shown by default
# A share of the range drawn in a panel (from zero on a linear axis). Numbers that are only computed differ by far less
# between processors. Where a probe is trained, one of the 64 or more test images may get another answer, which moves a
# point by about two per cent. A difference that a reader would notice in a figure is larger.
TOLERANCE = 0.05
WORDS = ("title", "xlabel", "ylabel", "scales", "ticks", "texts")


def path(item: str) -> Path:
    """The file of the item's committed record."""
    return FOLDER / f"{item}.json"


def digest(record: dict) -> dict:
    """The part of a run's record.json that is committed: numbers to five digits, verdicts, drawn data of figures."""
    measured = [
        [row["name"], row["model"], _short(row["value"])]
        for row in record["measured"]
        if row["unit"] not in MACHINE_UNITS and not SPREAD.search(row["name"])
    ]
    verdicts = [[claim["id"], claim["verdict"]] for claim in record["claims"]]
    return {"item": record["item"], "measured": measured, "verdicts": verdicts, "drawn": record["drawn"]}


def write(record: dict) -> Path:
    """Write the committed record of a run's item; its path."""
    write_atomically(path(record["item"]), (_readable(digest(record)) + "\n").encode())
    return path(record["item"])


def differences(record: dict) -> list[str]:
    """The differences between a run's record and the committed one, in words."""
    if not path(record["item"]).exists():
        return [f"nothing is recorded; make refresh NOTEBOOKS={record['item']} writes it"]
    now, before = digest(record), json.loads(path(record["item"]).read_text())
    trained = record["item"].startswith("train_")
    lines = _numbers(now["measured"], before["measured"], after_training if trained else tolerance)
    judged = [dict(side["verdicts"]) for side in (now, before)]
    for claim in judged[1] | judged[0]:
        new, old = (verdicts.get(claim, "absent") for verdicts in judged)
        # after a training, "undecided" in one of the two records does not count as a difference
        if new != old and not (trained and "undecided" in (new, old)):
            lines.append(f"claim {claim}: {new}, recorded {old}")
    for name in dict.fromkeys([*before["drawn"], *now["drawn"]]):
        if name not in now["drawn"] or name not in before["drawn"]:
            lines.append(f"{name}: {'not drawn any more' if name in before['drawn'] else 'not recorded'}")
        else:
            lines += [f"{name}, {line}" for line in compare(now["drawn"][name], before["drawn"][name])]
    return lines


def verdict(record: dict, every: bool = False) -> str:
    """One line if a run agrees with the committed record, else the first few (or with `every`, all) differences."""
    lines, place, share = differences(record), shown(path(record["item"])), f"{TOLERANCE:.0%}".replace("%", " %")
    if not lines:
        kept = digest(record)
        return (
            f"as recorded: {len(kept['measured'])} numbers and {len(kept['drawn'])} "
            f"figure{'s' * (len(kept['drawn']) != 1)} agree with {place} within {share}"
        )
    few = lines if every else lines[:FEW]
    rest = len(lines) - len(few)
    more = [f"… and {rest} more: vitreg report {record['item']} --differences"] if rest else []
    return "\n  ".join([f"not as recorded in {place} (tolerance {share}):", *few, *more])


def show(item: str, parameters: dict, every: bool = False) -> None:
    """Print the `verdict` on a finished run, if it had the profile mini and default parameters."""
    if parameters == runs.declared_parameters(item) and parameters["profile"] == "mini":
        print(verdict(items.read(item, parameters), every))


def close(now: float | None, before: float | None, allowed: float) -> bool:
    """Whether two numbers differ by at most `allowed`; None agrees only with None."""
    if now is None or before is None:
        return now is before
    return abs(now - before) <= allowed


def tolerance(scale: float) -> float:
    """The allowed difference of a number: `TOLERANCE` times `scale`, the largest recorded number of the same name.

    For shares this allows a few images of a hundred (a probe trained on another processor, an end of a bootstrap
    interval); for numbers near zero, a difference that is small compared with the others of that name. It does not
    allow a difference of one block or one neuron.
    """
    return TOLERANCE * scale


def after_training(scale: float) -> float:
    """The allowed difference after a training in a notebook: ten points for shares, a quarter for other numbers.

    Different rounding gives a different model after a hundred steps: with AVX2 instead of AVX-512 kernels, the best
    attribute of the CLIP notebook changed from 25 to 30 %.
    """
    return 0.1 if scale <= 1 else scale / 4


def _numbers(now: list, before: list, allowed=tolerance) -> list[str]:
    """Differences of measured numbers, matched by name and model. Numbers inside names may differ a little."""
    new, old = _by_name(now), _by_name(before)
    scales = {}
    for (name, _), rows in old.items():
        scales[name] = max([scales.get(name, ROUNDING), *(abs(v) for *_, v in rows if v is not None)])
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
            elif not close(value, value_before, allowed(scales[key[0]])):
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
    """JSON with one line for each number, verdict and artist, so that a diff of two records is readable."""
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


def compare(now: list[dict], before: list[dict], tolerance: float = TOLERANCE) -> list[str]:
    """Differences between two summaries of a figure, one line each; tolerance: a share of the panel's range."""
    if len(now) != len(before):
        return [f"panels: {len(now)}, recorded {len(before)}"]
    lines = []
    for number, (new, old) in enumerate(zip(now, before, strict=True), 1):
        name = (old.get("title") or old.get("ylabel") or "").split("\n")[0]
        place = f"panel {number}" + (f" '{name}'" if name else "")
        lines += [f"{place}: {line}" for line in _panel_differences(new, old, tolerance)]
    return lines


def same_text(now: str, before: str, tolerance: float = TOLERANCE) -> bool:
    """Whether two texts agree: words exactly, numbers within the tolerance.

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
    ends = {key: [artist[key][:2] for artist in before["drawn"] if key in artist] for key in ("x", "y")}
    if "log" not in before.get("scales", ""):
        ends["y"].append([0, 0])  # from zero, as for measured numbers: else a nearly constant curve has a tiny range
    spans = {key: extent(each) for key, each in ends.items()}
    for number, (new, old) in enumerate(zip(now["drawn"], before["drawn"], strict=True), 1):
        place = f"{old['kind']} {kinds[1][:number].count(old['kind'])}"
        if not same_text(new.get("label", ""), old.get("label", ""), tolerance):
            lines.append(f"{place} is labelled {new.get('label', '')!r}, recorded {old.get('label', '')!r}")
        if new["n"] != old["n"]:
            lines.append(f"{place} draws {new['n']} values, recorded {old['n']}")
            continue
        for key in ("x", "y", "value", "limits"):
            span = spans.get(key) or extent([old.get("limits", [0, 0])])
            if len(new.get(key, [])) != len(old.get(key, [])):
                lines.append(f"{place} has another number of finite {key}")
                continue
            gaps = [abs(a - b) for a, b in zip(new.get(key, []), old.get(key, []), strict=True)]
            if gaps and max(gaps) > tolerance * span:
                worst = gaps.index(max(gaps))
                name = f"{_statistic(worst)} {key}" if key != "limits" else ("lower limit", "upper limit")[worst]
                lines.append(f"{place} has {name} {new[key][worst]:g}, recorded {old[key][worst]:g}")
    return lines


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kind} × {kinds.count(kind)}" for kind in dict.fromkeys(kinds)) or "nothing"


def _statistic(number: int) -> str:
    """The name of one of the statistics in a summary."""
    if number < 3:
        return ("least", "largest", "mean")[number]
    return f"mean (part {number - 2}) of" if number < 19 else f"middle (part {number - 18}) of"
