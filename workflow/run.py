"""`make reproduce-…`: Snakemake runs the items that are not up to date; then their verdicts and figures are shown.

python workflow/run.py fig4 --profile mini -p n_images 64
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import cells
import forked
import items
import yaml
from execute import locked

from vitreg_lib.base import ROOT, UserError, results, shown, unknown, write_atomically

ENGINE = ["snakemake", "all", "-s", "workflow/Snakefile", "--nolock", "--rerun-incomplete", "--keep-going"]


def main(arguments: list[str] | None = None) -> int:
    """Check the parameters, run the graph, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("item")
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "mini")
    parser.add_argument("--jobs", default=os.environ.get("JOBS") or "2")
    parser.add_argument(
        "--cluster", default=os.environ.get("VITREG_CLUSTER"), help="slurm, or a folder with a config.yaml"
    )
    parser.add_argument("-p", nargs=2, action="append", dest="pairs", metavar=("NAME", "VALUE"))
    chosen = parser.parse_args(arguments)
    try:
        pairs = chosen.pairs or pairs_of(os.environ.get("PARAMS", ""))
        jobs = count(chosen.jobs)
        if chosen.item == "all" and pairs:
            raise UserError(f"PARAMS need a single item: make reproduce-fig4 PARAMS={pairs[0][0]}=…")
        names = cells.paper_items() if chosen.item == "all" else [chosen.item]
        asked = [cells.cell(item, chosen.profile, pairs) for item in names]
        code, made = make(asked, jobs, chosen.cluster)
    except (UserError, OSError) as error:
        print(f"vitreg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it waits for another process
        return 130
    if code:
        return code
    print("all is up to date" if not made else f"made: {', '.join(cell.item for cell in made)}")
    _conclude(asked, chosen.profile)
    return 0


def pairs_of(text: str) -> list[tuple[str, str]]:
    """[(name, text)] of PARAMS, NAME=VALUE separated by spaces; a value with spaces is quoted."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"PARAMS={text!r}: {error}") from error
    if bad := [word for word in words if "=" not in word]:
        raise UserError(f"PARAMS: {bad[0]!r} is not NAME=VALUE; write PARAMS='models=\"mini-deit3 mini-clip\" seed=1'")
    return [tuple(word.split("=", 1)) for word in words]


def count(jobs: str) -> int:
    """How many notebooks run at once. Raises UserError unless it is a whole number of at least 1."""
    if not jobs.isdecimal() or int(jobs) < 1:
        raise UserError(f"JOBS={jobs}: it must be a whole number, 1 or more")
    return int(jobs)


def make(asked: list[cells.Cell], jobs: int, cluster: str | None = None) -> tuple[int, list[cells.Cell]]:
    """(exit code, cells made): run the cells that are not up to date, here or on a cluster (see `engine`).

    With several cells, prints a line for each finished one. After an error, prints which cells were made, which failed
    and why, and which were not tried.
    """
    items.enter_batch()
    command = engine(jobs, cluster)  # refuses an unknown cluster
    config = _config(asked)
    several = len(asked) > 1
    start = forked.serving if several and not cluster else nullcontext
    alone = locked(config.with_suffix(""), "the same batch") if several else nullcontext()
    with alone, tempfile.TemporaryFile("w+") as log, start(_environment()) as environment:
        before, began = {cell: written(cell) for cell in asked}, time.time()
        command += ["--config", f"cells={config}"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
        try:
            _watch(process, before) if several else _follow(process, asked[0].log, began)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            code = 130
        made = [cell for cell, earlier in before.items() if written(cell) not in (None, earlier)]
        if code:
            log.seek(0)
            _fail(code, asked, made, began, log.read())
        return code, made


def _config(asked: list[cells.Cell]) -> Path:
    """The file that lists the requested cells for Snakemake; jobs on a cluster can read it, too."""
    text = json.dumps([{"item": cell.item, "profile": cell.profile, "pairs": cell.pairs} for cell in asked]).encode()
    path = results() / ".graph" / f"{hashlib.sha256(text).hexdigest()[:16]}.json"
    write_atomically(path, text)
    return path


def engine(jobs: int, cluster: str | None = None) -> list[str]:
    """The command of Snakemake for `jobs` notebooks at once.

    cluster: a folder of workflow/profiles, or any folder with a config.yaml of Snakemake's options, which names the
    executor. Raises UserError if there is no such file, or if the executor's package is not installed.
    """
    command = [sys.executable, "-m", *ENGINE, "--quiet", "rules", "progress", "host", "reason"]
    if not cluster:
        return [*command, "--cores", str(jobs)]
    own = ROOT / "workflow" / "profiles"
    folder = next((path for path in (own / cluster, Path(cluster).resolve()) if (path / "config.yaml").exists()), None)
    if folder is None:
        hint = "; or name a folder with a config.yaml of Snakemake's options"
        raise unknown("cluster", cluster, [path.name for path in own.iterdir()], hint)
    executor = yaml.safe_load((folder / "config.yaml").read_text())["executor"]
    if not importlib.util.find_spec(f"snakemake_executor_plugin_{executor.replace('-', '_')}"):
        raise UserError(f"Snakemake's executor {executor} is not installed: .venv/bin/pip install -e '.[cluster]'")
    return [*command, "--jobs", str(jobs), "--workflow-profile", str(folder)]


def _environment() -> dict:
    """The environment for Snakemake: unbuffered output, and another cache folder if the home folder is read-only."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if not os.access(Path.home(), os.W_OK):
        environment["XDG_CACHE_HOME"] = str(results() / ".engine")
    return environment


def written(cell: cells.Cell) -> float | None:
    """When the cell's results were made; None if there are none."""
    return cell.mark.stat().st_mtime if cell.mark.exists() else None


def _follow(process: subprocess.Popen, log: Path, began: float) -> None:
    """Show the stderr of a single cell's process (its progress bar) until the engine ends."""
    shown_until, running = 0, True
    while running:
        running = process.poll() is None
        if log.exists() and log.stat().st_mtime >= began:
            with open(log, "rb") as stream:
                stream.seek(shown_until)
                text = stream.read()
            shown_until += len(text)
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()
        if running:
            time.sleep(0.1)


def _watch(process: subprocess.Popen, before: dict) -> None:
    """Print a line for each finished cell, with the remaining time, until the engine ends."""
    waiting, began, done = dict(before), time.monotonic(), 0
    while process.poll() is None:
        for cell, earlier in list(waiting.items()):
            if written(cell) not in (None, earlier):
                del waiting[cell]
                done += 1
                # an upper bound: some of the remaining cells may be up to date
                left = (time.monotonic() - began) / done * len(waiting)
                print(f"[{done}] {cell.name} made; at most {max(1, round(left / 60))} min left", flush=True)
        time.sleep(0.2)


def _fail(code: int, asked: list[cells.Cell], made: list[cells.Cell], began: float, said: str) -> None:
    """Print which cells were made, which failed and why, and which were not tried."""
    failed = {c.name: line for c in asked if c not in made and (line := _last_line(c.log, began))}
    untried = [c.name for c in asked if c not in made and c.name not in failed and (c.fault() or not c.mark.exists())]
    if code == 130:
        print("\nvitreg: stopped; finished results are kept, and the same command continues", file=sys.stderr)
    if made:
        print(f"made: {', '.join(c.name for c in made)}", file=sys.stderr)
    for name, line in failed.items() if code != 130 else ():
        print(f"failed: {line if line.startswith(name.partition('--')[0]) else f'{name}: {line}'}", file=sys.stderr)
    if untried:
        print(f"not tried: {', '.join(untried)}", file=sys.stderr)
    if code != 130 and not failed:
        said = said.replace("Assuming unrestricted shared filesystem usage.", "")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        print(f"vitreg: the graph could not be run: {' / '.join(lines[-4:]) or 'see above'}", file=sys.stderr)


def _last_line(log: Path, began: float) -> str:
    """The last line of a cell's stderr in this run, without the command's name; empty if there is none."""
    if not log.exists() or log.stat().st_mtime < began:
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith("vitreg: ")] or lines[-1:]
    return messages[-1].removeprefix("vitreg: ") if messages else "its process was killed and left no message"


def _conclude(asked: list[cells.Cell], profile: str) -> None:
    """Show the verdicts of a single item, or how many items of the profile mini agree with the committed records."""
    import compare
    import report

    if len(asked) == 1:
        report.show(asked[0].item, asked[0].parameters)
    elif profile == "mini":
        other = [c.item for c in asked if compare.differences(items.read(c.item, c.parameters))]
        line = f"as recorded: {len(asked) - len(other)} of {len(asked)} items agree with data/records"
        print(line + (f"; not {', '.join(other)}: vitreg report ITEM --differences" if other else ""))
        print(f"results: {shown(results() / profile)}")


if __name__ == "__main__":
    sys.exit(main())
