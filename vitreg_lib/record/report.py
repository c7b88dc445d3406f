"""Verdicts and figures of finished items: in the terminal, or all of a profile on one page."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path

from ..base import UserError, results, shown, write_atomically
from . import run as record


def show(item: str, parameters: dict, differences: bool = False) -> None:
    """Print the verdicts of a finished item, whether it agrees with the committed record (all `differences` or the
    first few), and where its figures and notebook are."""
    from rich.console import Console
    from rich.table import Table

    from . import compare

    made = record.read(item, parameters)
    console = Console(soft_wrap=False)
    table = Table(title=f"{item}: {made['title']} (profile {made['profile']})", title_justify="left", show_lines=True)
    for column in ("claim", "verdict", "measured", "paper"):
        table.add_column(column, overflow="fold")
    for claim in made["claims"]:
        colour, mark = record.VERDICTS[claim["verdict"]]
        verdict = f"[{colour}]{mark} {claim['verdict']}[/]"
        table.add_row(f"{claim['id']} {claim['text']}", verdict, claim["measured"], claim["paper"])
    console.print(table)
    for missing in made["not_reachable_here"]:
        console.print(f"not reachable here: {missing['name']}")
    if record.is_plain(item, parameters):
        print(compare.verdict(made, differences))
    folder = record.folder(item, parameters)
    for figure in made["figures"]:
        print(f"figure: {shown(folder / figure)}.png")
    print(f"notebook: {shown(folder / item)}.ipynb")


def write(profile: str) -> Path:
    """Write results/<profile>/report.html, self-contained; its path. Raises UserError where nothing was made yet."""
    records = [(p.parent, json.loads(p.read_text())) for p in sorted((results() / profile).glob("[!.]*/record.json"))]
    if not records:
        raise UserError(f"nothing made yet in profile {profile}: run `make reproduce-all PROFILE={profile}` first")
    tally = record.tally([claim for _, made in records for claim in made["claims"]])
    values = dict(profile=profile, records=records, tally=tally, verdicts=record.VERDICTS)
    path = results() / profile / "report.html"
    write_atomically(path, page("report", **values).encode())
    return path


def page(name: str, **values) -> str:
    """A self-contained page of HTML from record/pages/NAME.html, which stands on pages/base.html."""
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
    """A PNG, as bytes or as a file, as an address that a page can carry inside."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
