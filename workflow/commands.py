"""The commands of `vitreg` that need the repository: they run its notebooks and show the results."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from vitreg_lib.base import UserError, results, shown
from vitreg_lib.record import run as record

app = typer.Typer()
Item = Annotated[str, typer.Argument(help="fig01 … fig21, tab01 … tab06, or the name of another notebook")]
Pairs = Annotated[list[str], typer.Option("-p", metavar="NAME VALUE", help="set a parameter; may be repeated")]
Profile = Annotated[Literal[*record.PROFILES] | None, typer.Option(help="mini is offline and the default")]


@app.command(epilog="\b\nvitreg run fig04 -p n_images 64 -p seed 1\nvitreg run fig03 --profile small")
def run(
    item: Item,
    pairs: Pairs = (),
    profile: Profile = None,
    parameters: Annotated[bool, typer.Option("--parameters", help="list the item's parameters and stop")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="do not show the verdicts")] = False,
):
    """Execute an item's notebook and show the verdicts of its claims."""
    item = record.normal_name(item)
    if parameters:
        for name, default in record.declared_parameters(item).items():
            print(f"{name:20} {default!r}")
        return
    import execute
    import items
    import report

    given = items.typed(item, pairs, profile)
    checked = record.check_parameters(item, given)
    try:
        execute.execute(item, given, progress=not quiet)
    except OSError as error:  # no room, no rights
        raise UserError(
            f"{item}: its results cannot be written into {results()} ({error.strerror or error}); make room there, or "
            "name another folder by VITREG_RESULTS"
        ) from error
    if not no_report:
        report.show(item, checked)


@app.command()
def report(
    item: Annotated[str, typer.Argument(help="one item; without it results/<profile>/report.html is written")] = "",
    pairs: Pairs = (),
    profile: Profile = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="show all differences from the item's committed record")
    ] = False,
):
    """Show the verdicts and figures of a finished item, or write a page of all."""
    import items
    import report

    if not item:
        print(shown(report.write(profile or "mini")))
        return
    item = record.normal_name(item)
    report.show(item, record.check_parameters(item, items.typed(item, pairs, profile)), differences)


@app.command()
def fetch(
    item: Annotated[str, typer.Argument(help="one item; without it all items of the paper")] = "",
    profile: Annotated[Literal[*record.PROFILES], typer.Option(help="whose models")] = "small",
):
    """Download the weights and data sets that items need, to run them later without a network."""
    import fetch

    raise typer.Exit(fetch.main(profile, item))


@app.command(epilog="The beginning of workflow/batch.py explains the file and the table.")
def batch(
    sweep: Annotated[str, typer.Argument(help="a YAML file: items, models, parameters")],
    jobs: Annotated[str, typer.Option(help="notebooks at once")] = "2",
    cluster: Annotated[str, typer.Option(help="slurm, or a folder with a config.yaml of Snakemake's options")] = "",
):
    """Run items × models × parameters; write all numbers into one table. Finished runs are not repeated."""
    import batch

    raise typer.Exit(batch.main(sweep, jobs, cluster))
