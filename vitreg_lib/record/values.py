"""What a parameter of a notebook may be: taken where the meaning is clear, refused in one line before anything runs."""

from __future__ import annotations

import ast
import functools
import math
from pathlib import Path

import yaml

from ..base import DATA, UserError, unknown

COUNTS = ("n_", "steps", "rounds", "batch_size", "grid_in", "grid_out")  # starts of names of which 0 makes no sense
PREFIXES = ("timm:", "random:", "file:", "open_clip:", "hf:")
MOST_REGISTERS = 64


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
    """The number, truth value or text that somebody typed."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def resolved(name: str, value):
    """Paths in a value, of images or of `file:` models, from where the user stands: the kernel runs elsewhere."""
    if name == "images" and value and Path(str(value)).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    if name == "models" and isinstance(value, str) and "file:" in value:
        return " ".join(_absolute(word) for word in value.split())
    return value


def _absolute(word: str) -> str:
    if not word.startswith("file:"):
        return word
    place, mark, architecture = word.removeprefix("file:").partition("#")
    path, plus, registers = place.partition("+ttr")
    return f"file:{Path(path).expanduser().resolve()}{plus}{registers}{mark}{architecture}"


@functools.cache
def model_entries() -> dict[str, dict]:
    """The entries of data/models.yaml by name; reading them needs no torch."""
    return yaml.safe_load((DATA / "models.yaml").read_text())


def is_model(name: str) -> bool:
    """Whether a name has an entry in data/models.yaml, with or without registers added at test time."""
    return name.partition("+ttr")[0] in model_entries()


def check_models(names: str) -> None:
    """Raise UserError for a name of which no model can be made, by names alone: nothing is loaded or looked up."""
    for name in names.replace(",", " ").split():
        base, mended, registers = name.partition("+ttr")
        registers = registers.partition("#")[0]
        if mended and not (registers.isdecimal() and int(registers) <= MOST_REGISTERS):
            raise UserError(f"{name!r}: write +ttrN with N from 0 to {MOST_REGISTERS}, for instance {base}+ttr4")
        if base in model_entries() or base.startswith(("open_clip:", "hf:")):
            continue
        if base.startswith("file:"):
            if not Path(base.removeprefix("file:").partition("#")[0]).expanduser().exists():
                raise UserError(f"{name}: no such file, and no folder with a config.json")
            continue
        import timm

        plain = base.partition(":")[2] if base.startswith(PREFIXES) else base
        if plain not in model_entries() and not timm.is_model(plain.partition(".")[0]):
            known = [*model_entries(), *timm.list_models("*vit*")]
            raise unknown("model", plain, known, "See `vitreg models`.")
