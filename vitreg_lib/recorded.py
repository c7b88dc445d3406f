"""The committed record of an item, data/records/ITEM.json: its numbers, verdicts and drawn figures with profile mini.

A run with that profile and default parameters is compared with it: figures by what they draw (`drawn.compare`), names
and texts by `drawn.same_text`, verdicts exactly, and numbers within a tolerance (`close`). What a clock or
an allocator measured is known by its unit, the spread of a few draws by its name; they are neither kept nor compared.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from . import drawn
from .errors import UserError
from .paths import DATA, shown, write_atomically

FOLDER = DATA / "records"
HERE = ("s", "% of s", "% of MiB")  # units of what a clock or an allocator says of this machine
SPREAD = re.compile(r"\b(sd|std)\b")  # in names: of a few draws or splits, which says little by itself
ROUNDING = 1e-4  # numbers below it may be nothing else, and are told apart by no more than the tolerance of it
FEW = 5  # differences that are shown where not all are asked for


def path(item: str) -> Path:
    """Where the item's record is committed."""
    return FOLDER / f"{item}.json"


def digest(record: dict) -> dict:
    """What of a run's record.json is committed: numbers to five digits, verdicts, what the figures draw."""
    measured = [
        [row["name"], row["model"], _short(row["value"])]
        for row in record["measured"]
        if row["unit"] not in HERE and not SPREAD.search(row["name"])
    ]
    verdicts = [[claim["id"], claim["verdict"]] for claim in record["claims"]]
    return {"item": record["item"], "measured": measured, "verdicts": verdicts, "drawn": record["drawn"]}


def write(record: dict) -> Path:
    """Commit a run's record; other items' files are not touched."""
    FOLDER.mkdir(exist_ok=True)
    write_atomically(path(record["item"]), (_readable(digest(record)) + "\n").encode())
    return path(record["item"])


def differences(record: dict) -> list[str]:
    """What of a run's record differs from the committed one, in words."""
    if not path(record["item"]).exists():
        return [f"nothing is recorded; make refresh NOTEBOOKS={record['item']} writes it"]
    now, before = digest(record), json.loads(path(record["item"]).read_text())
    # sixty steps of training carry rounding on to the verdict on a few images: shares within five points
    least = 1.0 if record["item"].startswith("train_") else ROUNDING
    told = _numbers(now["measured"], before["measured"], least)
    judged = [dict(found["verdicts"]) for found in (now, before)]
    for claim in judged[1] | judged[0]:
        new, old = (verdicts.get(claim, "absent") for verdicts in judged)
        told += [f"claim {claim}: {new}, recorded {old}"] if new != old else []
    for name in dict.fromkeys([*before["drawn"], *now["drawn"]]):
        if name not in now["drawn"] or name not in before["drawn"]:
            told.append(f"{name}: {'not drawn any more' if name in before['drawn'] else 'not recorded'}")
        else:
            told += [f"{name}, {line}" for line in drawn.compare(now["drawn"][name], before["drawn"][name])]
    return told


def verdict(record: dict, all_of_them: bool = False) -> str:
    """One line where a run agrees with the committed record, else its differences, the first few or all."""
    told, place, share = differences(record), shown(path(record["item"])), f"{drawn.TOLERANCE:.0%}".replace("%", " %")
    if not told:
        kept = digest(record)
        return (
            f"as recorded: {len(kept['measured'])} numbers and {len(kept['drawn'])} "
            f"figure{'s' * (len(kept['drawn']) != 1)} agree with {place} within {share}"
        )
    few = told if all_of_them else told[:FEW]
    rest = len(told) - len(few)
    more = [f"… and {rest} more: vitreg report {record['item']} --differences"] if rest else []
    return "\n  ".join([f"not as recorded in {place} (tolerance {share}):", *few, *more])


def check(record: dict) -> None:
    """Raise UserError where a run differs from the committed record, if `VITREG_CHECK` asks for it (`make test`)."""
    if os.environ.get("VITREG_CHECK") and differences(record):
        raise UserError(verdict(record))


def close(now: float | None, before: float | None, scale: float) -> bool:
    """Whether two numbers agree: within the tolerance that figures have, of the largest number of that name.

    One rule for all: of shares it forgives a few images of a hundred (a probe trained on another processor, an end of a
    bootstrap interval), of differences near zero what is small beside the others; a block or a neuron more is noticed.
    """
    if now is None or before is None:
        return now is before
    return abs(now - before) <= drawn.TOLERANCE * scale


def _numbers(now: list, before: list, least: float = ROUNDING) -> list[str]:
    """Differences of measured numbers, matched by name and model; names may hold numbers, which may differ a little.

    least: the smallest number that the tolerance is a share of.
    """
    new, old = _by_name(now), _by_name(before)
    scales = {}
    for (name, _), rows in old.items():
        scales[name] = max([scales.get(name, least), *(abs(v) for *_, v in rows if v is not None)])
    told = []
    for key in dict.fromkeys([*old, *new]):
        rows, known = new.get(key, []), old.get(key, [])
        if len(rows) != len(known):
            name, model, _ = (known or rows)[0]
            told.append(f"{_named(name, model)}: measured {len(rows)} times, recorded {len(known)} times")
            continue
        for (name, model, value), (name_before, _, value_before) in zip(rows, known, strict=True):
            if not drawn.same_text(name, name_before):
                told.append(f"measured '{name}' for {model}, recorded '{name_before}'")
            elif not close(value, value_before, scales[key[0]]):
                told.append(f"{_named(name, model)} is {_told(value)}, recorded {_told(value_before)}")
    return told


def _by_name(rows: list) -> dict[tuple[str, str], list]:
    found = {}
    for name, model, value in rows:
        found.setdefault((re.sub(r"-?\d[\d.]*", "#", name), model), []).append((name, model, value))
    return found


def _named(name: str, model: str) -> str:
    return f"{name} of {model}" if model else name


def _told(value: float | None) -> str:
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
