"""What the graph is made of: an item with its parameters, where its results go, and whether they are whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import items

from vitreg_lib.base import NOTEBOOKS, ROOT, UserError
from vitreg_lib.record import run as record


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a notebook. pairs: (name, text) as given; parameters: all of them, checked."""

    item: str
    profile: str
    pairs: tuple[tuple[str, str], ...]
    parameters: dict

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return record.folder(self.item, self.parameters)

    @property
    def name(self) -> str:
        """The name of its rule: that of the folder, which differs where parameters differ."""
        return self.folder.name

    @property
    def mark(self) -> Path:
        """The file whose time says when the results were made."""
        return self.folder.with_name(f".{self.folder.name}.made")

    @property
    def log(self) -> Path:
        """What its process wrote to stderr."""
        return self.folder.with_name(f".{self.folder.name}.log")

    @property
    def arguments(self) -> list[str]:
        """Those of `vitreg run`."""
        given = [part for name, text in self.pairs for part in ("-p", f"{name}={text}")]
        return [self.item, "--profile", self.profile, *given]

    @property
    def needs(self) -> dict[str, int]:
        """What one run asks of a cluster. A notebook of the profile mini takes 1.1 to 1.4 GB; those of the large models
        are not measured, so that theirs is a bound to start from."""
        return {"mem_mb": 16000, "gpu": 1} if self.profile in ("large", "paper") else {"mem_mb": 2000}

    def fault(self) -> str:
        """Why its results cannot be used; empty where they can."""
        try:
            items.read(self.item, self.parameters)
        except UserError as error:
            return str(error)
        return ""

    def forget_mark_without_results(self) -> None:
        """Remove the mark where the results that it speaks of are not there or damaged: they are made anew."""
        if self.mark.exists() and self.fault():
            self.mark.unlink()


def paper_items() -> list[str]:
    """All items that have a notebook in notebooks/paper."""
    return [path.stem.split("_")[0] for path in sorted((NOTEBOOKS / "paper").glob("*.ipynb"))]


def cell(item: str, profile: str, pairs) -> Cell:
    """A cell from texts. Raises UserError for what is unknown or does not fit."""
    item = record.normal_name(item)
    given = items.typed(item, [f"{name}={text}" for name, text in pairs], profile)
    pairs = tuple((name, str(given[name])) for name, _ in pairs)  # paths are resolved
    return Cell(item, profile, pairs, record.check_parameters(item, given))


def of(config: dict) -> list[Cell]:
    """The cells that Snakemake's configuration asks for: of a file (`cells`), or `item` and `profile`, default all."""
    if "cells" in config:
        asked = json.loads(Path(config["cells"]).read_text())
        return [cell(one["item"], one["profile"], one["pairs"]) for one in asked]
    wanted = str(config.get("item", "all"))
    items = paper_items() if wanted == "all" else [wanted]
    return [cell(item, config.get("profile", "mini"), ()) for item in items]


def plain(path: Path) -> str:
    """A path for Snakemake: relative to the repository where it lies inside, braces doubled, as it reads wildcards."""
    path = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
    return path.replace("{", "{{").replace("}", "}}")
