"""Verdicts and figures of finished items, in the terminal or on one page for a profile."""

from __future__ import annotations

import time
from pathlib import Path

import compare
import items

from vitreg_lib.base import UserError, results, shown, write_atomically
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts
from vitreg_lib.record.page import page

TEMPLATE = Path(__file__).with_name("report.html")


def show(item: str, parameters: dict, differences: bool = False) -> None:
    """Print a finished item's verdicts, the paths of its figures and notebook, and the differences of its record from
    the committed one: the first few, or with `differences` all."""
    from rich.console import Console
    from rich.table import Table

    made = items.read(item, parameters)
    console = Console(soft_wrap=False)
    table = Table(title=f"{item}: {made['title']} (profile {made['profile']})", title_justify="left", show_lines=True)
    for column in ("claim", "verdict", "measured", "paper"):
        table.add_column(column, overflow="fold")
    for claim in made["claims"]:
        colour, mark = verdicts.VERDICTS[claim["verdict"]]
        verdict = f"[{colour}]{mark} {claim['verdict']}[/]"
        table.add_row(f"{claim['id']} {claim['text']}", verdict, claim["measured"], claim["paper"])
    console.print(table)
    for missing in made["not_reachable_here"]:
        console.print(f"not reachable here: {missing['name']}")
    folder = record.folder(item, parameters)
    for figure in made["figures"]:
        print(f"figure: {shown(folder / figure)}.png")
    print(f"notebook: {shown(folder / item)}.ipynb")
    compare.show(item, parameters, differences)


def write(profile: str) -> Path:
    """The path of results/<profile>/report.html, which is written; it is self-contained except for links to notebooks.

    The page lists damaged records. Raises UserError if there is no result yet.
    """
    place = results() / profile
    made, damaged = [], []
    for path in sorted(place.glob("[!.]*/record.json")):
        try:
            made.append(_entry(path.parent, items.read_folder(path.parent.name.partition("--")[0], path.parent)))
        except UserError as error:
            damaged.append(str(error))
    if not made and not damaged:
        raise UserError(f"nothing made yet in profile {profile}: run `make reproduce-all PROFILE={profile}` first")
    sides = {"Claims of the paper": [], "Claims of this collection's own": []}
    paper, own = sides.values()
    for entry in made:
        for claim in entry["record"]["claims"]:
            (paper if claim["id"] in verdicts.reported_claims() else own).append((entry, claim))
    values = dict(profile=profile, made=made, damaged=damaged, sides=sides, verdicts=verdicts.VERDICTS)
    write_atomically(place / "report.html", page(TEMPLATE, **values).encode())
    return place / "report.html"


def _entry(folder: Path, made: dict) -> dict:
    """The page's content for one record: its folder, parameters that differ from the defaults, date, executed notebook,
    and the numbers that the paper reports, too."""
    item, given = made["item"], made.get("parameters", {})
    try:
        declared = record.declared_parameters(item)
    except UserError:  # of a notebook that is not here
        declared = {}
    return {
        "folder": folder,
        "record": made,
        "differs": {k: v for k, v in given.items() if k != "profile" and declared.get(k) != v},
        "parameters": {**made.get("settings", {}), **{k: v for k, v in given.items() if v not in ("", 0)}},
        "day": time.strftime("%Y-%m-%d", time.localtime((folder / "record.json").stat().st_mtime)),
        "notebook": f"{folder.name}/{item}.ipynb" if (folder / f"{item}.ipynb").exists() else "",
        "reported": [row for row in made["measured"] if row["paper"] is not None],
    }
