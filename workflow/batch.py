"""`vitreg batch sweep.yaml`: run items × models × parameters by Snakemake, put all numbers into one Parquet file.

    profile: mini
    items: [fig03, fig07]
    models: [mini-deit3, mini-clip, "mini-deit3 mini-deit3-reg4"]   # three values; the last one has two models
    parameters:
      seed: [0, 1, 2]

Finished runs are not repeated: after a stop, the same command continues. The table has one row for each measured
number, with the columns item, one for each swept parameter, name, model, value, unit and paper.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import cells
import items
import run
import yaml

from vitreg_lib.base import UserError, results, shown, unknown, written

KEYS = ("profile", "items", "models", "parameters")


def main(path: str, jobs: str = "2", cluster: str = "") -> int:
    """Run a sweep and write its table, even if some runs failed; the exit code."""
    try:
        profile, asked = read(Path(path))
        code, made = run.make(asked, run.count(jobs), cluster or os.environ.get("VITREG_CLUSTER"))
        table = collect(asked)
        target = results() / profile / "sweeps" / f"{Path(path).stem}.parquet"
        with written(target) as temporary:
            table.to_parquet(temporary, index=False)
    except (UserError, OSError) as error:
        print(f"vitreg: {error}", file=sys.stderr)
        return 1
    print(f"{len(made)} of {len(asked)} runs made now; {len(table)} numbers: {shown(target)}")
    print(f"to plot them: notebooks/explore/sweep.ipynb with table = {str(target)!r}")
    return code


def read(path: Path) -> tuple[str, list[cells.Cell]]:
    """(profile, cells) of a sweep's file. Raises UserError if anything is wrong with it."""
    try:
        asked = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict) or not asked.get("items"):
        raise UserError(f"{path}: items are missing; write for example `items: [fig03]`")
    if bad := [key for key in asked if key not in KEYS]:
        raise unknown(f"key of {path.name}", bad[0], KEYS)
    swept = dict(asked.get("parameters") or {})
    if asked.get("models"):
        swept = {"models": asked["models"], **swept}
    values = [value if isinstance(value, list) else [value] for value in swept.values()]
    profile = asked.get("profile", "mini")
    made = [
        cells.cell(item, profile, [(name, str(value)) for name, value in zip(swept, chosen, strict=True)])
        for item in (asked["items"] if isinstance(asked["items"], list) else [asked["items"]])
        for chosen in itertools.product(*values)
    ]
    return profile, list({cell.folder: cell for cell in made}.values())


def collect(asked: list[cells.Cell]):
    """A DataFrame with one row for each measured number of the finished cells."""
    import pandas as pd

    rows = []
    for cell in asked:
        if cell.fault():
            continue
        swept = {f"parameter {name}": cell.parameters[name] for name, _ in cell.pairs}
        rows += [{"item": cell.item, **swept, **row} for row in items.read(cell.item, cell.parameters)["measured"]]
    table = pd.DataFrame(rows)
    for column in ("value", "paper"):
        if column in table:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table.drop(columns="features", errors="ignore")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
