"""The nodes of the Snakemake graph: an item with its parameters, its results folder, and whether these are complete."""

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
    """One run of a notebook. pairs: (name, text) as given by the user; parameters: all parameters, checked."""

    item: str
    profile: str
    pairs: tuple[tuple[str, str], ...]
    parameters: dict

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return record.folder(self.item, self.parameters)

    @property
    def name(self) -> str:
        """The name of its rule: the folder's name, which is different for different parameters."""
        return self.folder.name

    @property
    def mark(self) -> Path:
        """The file whose modification time says when the results were made."""
        return self.folder.with_name(f".{self.folder.name}.made")

    @property
    def log(self) -> Path:
        """The file with its process's stderr."""
        return self.folder.with_name(f".{self.folder.name}.log")

    @property
    def arguments(self) -> list[str]:
        """The arguments of `vitreg run`."""
        given = [part for name, text in self.pairs for part in ("-p", f"{name}={text}")]
        return [self.item, "--profile", self.profile, *given]

    @property
    def needs(self) -> dict[str, int]:
        """The resources that one run requests from a cluster. A notebook of the profile mini takes 1.1 to 1.4 GB. The
        memory for the large models is a guess, not a measurement."""
        return {"mem_mb": 16000, "gpu": 1} if self.profile in ("large", "paper") else {"mem_mb": 2000}

    def fault(self) -> str:
        """Why its results cannot be used; empty if they can."""
        try:
            items.read(self.item, self.parameters)
        except UserError as error:
            return str(error)
        return ""

    def forget_mark_without_results(self) -> None:
        """Remove the mark if the results are missing or damaged, so that they are made again."""
        if self.mark.exists() and self.fault():
            self.mark.unlink()


def paper_items() -> list[str]:
    """All items that have a notebook in notebooks/paper."""
    return [path.stem.split("_")[0] for path in sorted((NOTEBOOKS / "paper").glob("*.ipynb"))]


def cell(item: str, profile: str, pairs) -> Cell:
    """A cell from texts. Raises UserError for an unknown item or parameter, or a value that does not fit."""
    item = record.normal_name(item)
    given = items.typed(item, [f"{name}={text}" for name, text in pairs], profile)
    pairs = tuple((name, str(given[name])) for name, _ in pairs)  # paths are resolved
    return Cell(item, profile, pairs, record.check_parameters(item, given))


def of(config: dict) -> list[Cell]:
    """The cells of Snakemake's configuration: from the file `cells`, or from `item` (default: all) and `profile`."""
    if "cells" in config:
        asked = json.loads(Path(config["cells"]).read_text())
        return [cell(one["item"], one["profile"], one["pairs"]) for one in asked]
    wanted = str(config.get("item", "all"))
    items = paper_items() if wanted == "all" else [wanted]
    return [cell(item, config.get("profile", "mini"), ()) for item in items]


def plain(path: Path) -> str:
    """A path for Snakemake: relative if inside the repository; braces are doubled, since they mark wildcards."""
    path = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
    return path.replace("{", "{{").replace("}", "}}")
