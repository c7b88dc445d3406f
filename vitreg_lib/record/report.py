"""Verdicts and figures of finished items, in the terminal or on one page for a profile."""

from __future__ import annotations

import base64
import functools
import time
from pathlib import Path

from ..base import UserError, results, shown, write_atomically
from . import run as record
from . import verdicts


def show(item: str, parameters: dict) -> None:
    """Print the verdicts of a finished item and the paths of its figures and notebook."""
    from rich.console import Console
    from rich.table import Table

    made = record.read(item, parameters)
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


def write(profile: str) -> Path:
    """Write results/<profile>/report.html, self-contained except for links to the notebooks beside it; its path.

    A damaged record is named on the page. Raises UserError where there is no result yet.
    """
    place = results() / profile
    made, damaged = [], []
    for path in sorted(place.glob("[!.]*/record.json")):
        try:
            made.append(_entry(path.parent, record.read_folder(path.parent.name.partition("--")[0], path.parent)))
        except UserError as error:
            damaged.append(str(error))
    if not made and not damaged:
        raise UserError(f"nothing made yet in profile {profile}: run `make reproduce-all PROFILE={profile}` first")
    claims = [(entry, claim) for entry in made for claim in entry["record"]["claims"]]
    sides = {
        "Claims of the paper": [pair for pair in claims if pair[1]["id"] in verdicts.reported_claims()],
        "Claims of this collection's own": [pair for pair in claims if pair[1]["id"] not in verdicts.reported_claims()],
    }
    values = dict(profile=profile, made=made, damaged=damaged, sides=sides, verdicts=verdicts.VERDICTS)
    write_atomically(place / "report.html", page("report", **values).encode())
    return place / "report.html"


def _entry(folder: Path, made: dict) -> dict:
    """The page's content for one record: its folder, parameters other than the defaults, date, executed notebook, and
    numbers beside the paper's."""
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


def page(name: str, **values) -> str:
    """A self-contained HTML page from record/pages/NAME.html, which extends pages/base.html."""
    return _templates().get_template(f"{name}.html").render(values)


@functools.cache
def _templates():
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["data_url"] = data_url
    return templates


def data_url(picture: bytes | Path) -> str:
    """A PNG, from bytes or a file, as a data URL to embed in a page."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
