"""`make reproduce-…`: let Snakemake run what is stale, then show the verdicts and where the figures are.

python workflow/run.py fig4 --profile mini -p n_images 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from vitreg_lib.base import NOTEBOOKS, ROOT, UserError
from vitreg_lib.record import compare, report
from vitreg_lib.record import run as record


def main() -> int:
    """Check the parameters, run the graph, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("item")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--jobs", default="2")
    parser.add_argument("-p", nargs=2, action="append", default=[], dest="pairs")
    chosen = parser.parse_args()
    try:
        items = paper_items() if chosen.item == "all" else [record.normal_name(chosen.item)]
        given = (
            {}
            if chosen.item == "all"
            else record.typed(items[0], [f"{name}={text}" for name, text in chosen.pairs], chosen.profile)
        )
        checked = {item: record.check_parameters(item, given | {"profile": chosen.profile}) for item in items}
    except UserError as error:
        print(f"vitreg: {error}", file=sys.stderr)
        return 1
    before = {item: written(item, checked[item]) for item in items}
    config = [f"profile={chosen.profile}", f"item={items[0] if len(items) == 1 else 'all'}"]
    # as text, which is all that Snakemake keeps of a value; the Snakefile types it anew
    config.append(f"parameters={json.dumps({k: str(v) for k, v in given.items() if k != 'profile'})}")
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", chosen.jobs, "--nolock"]
    command += ["--rerun-incomplete", "--keep-going", "--quiet", "rules", "progress", "host", "reason"]
    command += ["all", "--config", *config]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        print("vitreg: not everything could be made; the lines above say why", file=sys.stderr)
        return done.returncode
    fresh = [item for item in items if written(item, checked[item]) != before[item]]
    print("all is up to date" if not fresh else f"made: {', '.join(fresh)}")
    if len(items) == 1:
        report.show(items[0], checked[items[0]])
    elif chosen.profile == "mini":
        other = [item for item in items if compare.differences(record.read(item, checked[item]))]
        told = f"as recorded: {len(items) - len(other)} of {len(items)} items agree with data/records"
        print(told + (f"; not {', '.join(other)}: vitreg report ITEM --differences" if other else ""))
    return 0


def paper_items() -> list[str]:
    """All items that have a notebook in notebooks/paper."""
    return [path.stem.split("_")[0] for path in sorted((NOTEBOOKS / "paper").glob("*.ipynb"))]


def written(item: str, parameters: dict) -> float | None:
    """When the item's record was written; None without one."""
    path = record.folder(item, parameters) / "record.json"
    return path.stat().st_mtime if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
