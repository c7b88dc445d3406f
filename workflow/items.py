"""Items in commands: parameters from the command line, the environment of their kernels, and finished records."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

from vitreg_lib.base import UserError, env_folder, shown
from vitreg_lib.record import run as record


def enter_batch() -> None:
    """Prepare the environment for kernels that run in the notebook's folder.

    Folders in environment variables become absolute, since the user gave them relative to another folder.
    """
    places = ("VITREG_RESULTS", "VITREG_CACHE", "VITREG_MODELS", "VITREG_DATA")
    os.environ.update({name: str(path) for name in places if (path := env_folder(name))}, VITREG_BATCH="1")


def typed(item: str, pairs: list[str], profile: str | None = None) -> dict:
    """Parameters from texts NAME=VALUE and a profile, with the types that the item's notebook declares."""
    declared, given = record.declared_parameters(item), {}
    for name, _, text in (pair.partition("=") for pair in pairs):
        given[name] = _resolved(name, text if isinstance(declared.get(name), str) else _literal(text))
    return given | ({"profile": profile} if profile else {})


def _literal(text: str):
    """A word of the command line as a number, bool or text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _resolved(name: str, value):
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


def read(item: str, parameters: dict) -> dict:
    """The record of a finished run. Raises UserError if there is none or a product is missing."""
    return read_folder(item, record.folder(item, parameters))


def read_folder(item: str, place: Path) -> dict:
    """The record in a folder. Raises UserError if there is none, it is damaged, or a product is missing."""
    path = place / "record.json"
    if not path.exists():
        raise UserError(f"{item} left no record.json: its last cell must call run.claims()")
    try:
        made = json.loads(path.read_text())
        figures, measured = made["figures"], made["measured"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{shown(path)} is damaged: run {item} again") from error
    missing = [f"no {figure}.png" for figure in figures if not (place / f"{figure}.png").exists()]
    if missing or not measured:
        raise UserError(f"{item} left an incomplete record: {missing[0] if missing else 'nothing measured'}")
    return made
