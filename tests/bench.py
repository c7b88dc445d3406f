"""`make bench` (`python -m tests.bench [PART …]`): timings as ratios within one run, into docs/performance.md.

Not a test: nothing is asserted. What is compared takes turns, round by round, and each ratio is the median over rounds:
other work on the machine then weighs on both alike. The parts are `bench_PART.py`; each has `rows()` and may have
`figures()`. A part that is named is run alone and replaces its section of the page; a part without rows, as `gpu` where
there is none, leaves it as it is.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitreg_lib.base import ROOT, write_atomically

PARTS = ("capture", "growth", "probes", "widgets", "start", "train", "gpu")
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

This page is written by `make bench`. Read the ratios, not the times. The two sides of a comparison ran in turns on one
machine, and a ratio of times is the median over rounds. Times depend on the machine and its load, which each section
states.

"""


@dataclass
class Row:
    """A line of the page: what was measured, its value, that beside it, their ratio, and what is wanted of it."""

    what: str
    ours: float
    other: float | None = None
    unit: str = "ms"
    goal: str = ""
    ratio: float | None = None  # where it is not that of the two, as a median over rounds

    def cells(self) -> list[str]:
        """Texts for a table; the ratio is ours by the other."""
        ratio = self.ratio if self.ratio is not None else self.ours / self.other if self.other else None
        values = ["" if value is None else f"{value:,.4g} {self.unit}" for value in (self.ours, self.other)]
        return [self.what, *values, "" if ratio is None else f"{ratio:.3g}", self.goal]


def taking_turns(one: Callable, other: Callable, rounds: int = 11) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the rounds' ratios one / other; who is first changes."""
    seconds: list[tuple[float, float]] = []
    for function in (one, other):
        function()
    for number in range(rounds):
        took = {}
        for function in (one, other) if number % 2 else (other, one):
            began = time.perf_counter()
            function()
            took[function] = time.perf_counter() - began
        seconds.append((took[one], took[other]))
    first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
    return first, second, statistics.median(a / b for a, b in seconds)


def compared(what: str, one: Callable, other: Callable, goal: str = "", rounds: int = 11) -> Row:
    """A `Row` of two functions that take turns."""
    first, second, ratio = taking_turns(one, other, rounds)
    return Row(what, 1e3 * first, 1e3 * second, "ms", goal, ratio)


def machine(part: str) -> str:
    """What the timings of a part rest on, in a sentence."""
    names = {platform.processor()}
    if sys.platform == "linux":
        names = {line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    load = os.getloadavg()[0]
    gpu = f"one {torch.cuda.get_device_name()}" if part == "gpu" and torch.cuda.is_available() else "no GPU used"
    return (
        f"{time.strftime('%Y-%m-%d')}, {' / '.join(sorted(names))}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, {gpu}; the load of the machine was "
        f"{load:.1f} when the measurement began"
    )


def main(chosen: list[str]) -> None:
    """Run the parts (all by default), print their rows, and put each into its place in the page."""
    for part in chosen or PARTS:
        module, rows, about = importlib.import_module(f"tests.bench_{part}"), [], machine(part)
        print(f"{part}: {about}", flush=True)
        for row in module.rows():
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
        if not rows:
            continue
        pictures = module.figures(ROOT / "docs" / "performance") if hasattr(module, "figures") else []
        title, _, text = module.__doc__.partition("\n\n")
        table = ["| | this project | compared with | ratio | goal |", "|---|---|---|---|---|"]
        table += [f"| {' | '.join(row.cells())} |" for row in rows]
        shown = [f"![{caption}](performance/{name})" for name, caption in pictures]
        put(part, [f"## {title.rstrip('.')}", text.strip(), f"Measured {about}.", "\n".join(table), *shown])


def put(part: str, paragraphs: list[str]) -> None:
    """Replace a part's section of the page, which begins with its name in a comment."""
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n(?=<!-- |\Z)", PAGE.read_text() if PAGE.exists() else "", re.S))
    sections[part] = "\n\n".join(paragraphs) + "\n"
    whole = [f"<!-- {name} -->\n{sections[name]}\n" for name in PARTS if name in sections]
    write_atomically(PAGE, (HEAD + "".join(whole)).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
