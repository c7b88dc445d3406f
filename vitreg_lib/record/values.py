"""Values of notebook parameters: converted where the meaning is clear, else refused before anything runs."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

from ..base import UserError

COUNTS = ("n_", "steps", "rounds", "batch_size", "grid_in", "grid_out")  # prefixes of names for which 0 makes no sense


def taken(name: str, default, value):
    """`value` as the type of `default`, where its meaning is clear: 4 for a text is "4", "64" for a number is 64.

    Raises UserError where it is not, for a number that is not finite, and for a negative count.
    """
    kind = type(default)
    try:
        if kind is bool:
            value = {"true": True, "false": False, "0": False, "1": True}[str(value).lower()]
        elif kind is str:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            value = str(value)
        else:
            number = float(value) if not isinstance(value, bool) else math.nan
            if not math.isfinite(number) or (kind is int and number != int(number)):
                raise ValueError
            value = kind(number) if not isinstance(value, int) else kind(value)
    except (ValueError, TypeError, KeyError):
        article = "an" if kind is int else "a"
        raise UserError(
            f"parameter {name} is {value!r} ({type(value).__name__}), but {article} {kind.__name__} is wanted, "
            f"as in {default!r}"
        ) from None
    if kind is int and default >= 0:
        least = 1 if default > 0 and name.startswith(COUNTS) else 0
        if value < least:
            raise UserError(f"parameter {name} is {value}, but at least {least} is wanted")
    return value


def literal(text: str):
    """The number, truth value or text in a typed word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def resolved(name: str, value):
    """A value with absolute paths (images, a table, `file:` models), because the kernel runs in another folder."""
    if name in ("images", "table") and value and Path(str(value)).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    if name == "models" and isinstance(value, str) and "file:" in value:
        return " ".join(_absolute(word) for word in value.split())
    return value


def _absolute(word: str) -> str:
    if not word.startswith("file:"):
        return word
    place, mark, rest = re.fullmatch(r"file:([^#+]*)([#+]?)(.*)", word).groups()
    return f"file:{Path(place).expanduser().resolve()}{mark}{rest}"
