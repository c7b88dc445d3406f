"""Starting notebooks.

Four items without earlier results, two at once. Kernels that fork from one process with imported libraries, as in
`make reproduce-all`, are compared with kernels that import the libraries themselves. CPU seconds are those of all
processes. Items that are up to date take longer than the goal.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench import Row
from vitreg_lib.base import ROOT

SWEEP = "items: [fig03, fig07, fig16, tab05]\nparameters: {n_images: [8]}\n"


def rows() -> Iterator[Row]:
    """Wall time and CPU time of the two ways, and of a run in which all is up to date."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "sweep.yaml").write_text(SWEEP)
        forked, plain = (made(Path(place), name, plainly=name == "plain") for name in ("forked", "plain"))
        again = made(Path(place), "forked")
    yield Row("four items: forked kernels vs. started kernels", forked[0], plain[0], "s")
    yield Row("the same, CPU seconds", forked[1], plain[1], "s")
    yield Row("the same items, up to date", again[0], None, "s", "at most 1.5 s")


def made(place: Path, name: str, plainly: bool = False) -> tuple[float, float]:
    """(seconds, CPU seconds) of a sweep into a folder of its own."""
    environment = os.environ | {"VITREG_RESULTS": str(place / name), "PYTHONPATH": str(ROOT)}
    environment |= {"VITREG_PLAIN": "1"} if plainly else {}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "workflow/batch.py", str(place / "sweep.yaml"), "2"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
