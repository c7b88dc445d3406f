"""Random kills (`python -m tests.kills [HOW_MANY [SEED [NAME]]]`, 30 by default): none of them changes a result.

A batch, a run and a training are killed with SIGKILL at random moments, all processes of a group at once, and started
again in what they left. What is finished is removed and begun anew. In the end each runs undisturbed and has to equal
one that never was disturbed: records, weights, optimiser and log. It takes minutes and is not part of the tests,
which kill each of the three a few times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from vitreg_lib.base import ROOT

VITREG = [sys.executable, "-m", "vitreg_lib.cli"]
COMMANDS = {
    "batch": [*VITREG, "batch", "{place}/sweep.yaml"],
    "run": [*VITREG, "run", "fig11", "-p", "grid_in", "12", "--quiet"],
    "train": [
        *VITREG,
        "train",
        "deit3",
        "--size",
        "xxs",
        "--steps",
        "60",
        "--batch-size",
        "8",
        "--save-every",
        "10",
        "--out",
        "{own}/run",
    ],
}
SWEEP = "items: [fig11]\nparameters: {grid_in: [9, 10], grid_out: [5]}\n"


def main(count: int = 30, seed: int = 0, *names: str) -> None:
    """Disturb each of the commands, or those named, and compare."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="vitreg-kills-") as place:
        (Path(place) / "sweep.yaml").write_text(SWEEP)
        for name in names or COMMANDS:
            undisturbed, disturbed = (Path(place) / f"{name} {kind}" for kind in ("undisturbed", "disturbed"))
            began = time.monotonic()
            finish(name, undisturbed)
            lasts, killed = time.monotonic() - began, 0
            while killed < count // len(COMMANDS):
                if kill(name, disturbed, chance.uniform(0, lasts)):
                    killed += 1
                else:
                    shutil.rmtree(disturbed)
            finish(name, disturbed)
            compare(undisturbed, disturbed)
            print(f"{name}: killed {killed} times in {lasts:.1f} s or less, then equal", flush=True)


def start(name: str, own: Path) -> subprocess.Popen:
    """One of the commands, its results below `own`, in a process group of its own."""
    own.mkdir(exist_ok=True)
    command = [part.format(place=own.parent, own=own) for part in COMMANDS[name]]
    environment = os.environ | {"VITREG_RESULTS": str(own / "results"), "PYTHONPATH": str(ROOT)}
    log = open(own / "said.log", "a")
    return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)


def finish(name: str, own: Path) -> None:
    if start(name, own).wait():
        raise SystemExit(f"{name} failed:\n{(own / 'said.log').read_text()[-2000:]}")


def kill(name: str, own: Path, seconds: float) -> bool:
    """Whether a command ran for some seconds and was then killed, with its group; False where it was faster."""
    process = start(name, own)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def compare(one: Path, other: Path) -> None:
    """Raises AssertionError where two folders do not hold the same records and weights."""
    records = [
        {path.parent.name: json.loads(path.read_text()) | {"seconds": 0} for path in folder.rglob("record.json")}
        for folder in (one, other)
    ]
    assert records[0] == records[1], "records differ"
    assert records[0] or list(one.rglob("state.safetensors"))
    # not the spare: a training killed between its last state and its end writes that state once more when it goes on
    for path in set(one.rglob("*.safetensors")) - set(one.rglob("previous.safetensors")):
        first, second = load_file(path), load_file(other / path.relative_to(one))
        assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first), f"{path.name} differs"
    for path in one.rglob("log.csv"):
        assert path.read_text() == (other / path.relative_to(one)).read_text(), "logs differ"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
