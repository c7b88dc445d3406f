"""`make bench` (`python -m tests.bench [PART …]`): timings as ratios within one run, into docs/performance.md.

Not a test: nothing is asserted. What is compared takes turns, round by round, and each ratio is the median over rounds:
other work on the machine then weighs on both alike. The parts are `bench_PART.py`; each has `rows()` and may have
`figures()`. Named parts are only printed.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitreg_lib.base import ROOT

PARTS = ("capture", "growth", "probes", "widgets", "start")
PAGE = ROOT / "docs" / "performance.md"


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


def machine() -> str:
    """What the timings rest on, in a sentence."""
    names = {platform.processor()}
    if sys.platform == "linux":
        names = {line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {' / '.join(sorted(names))}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, no GPU used; the load of the machine was "
        f"{load:.1f} when the measurement began"
    )


def main(chosen: list[str]) -> None:
    """Run the parts, print their rows, and write the page where no part was named."""
    about, sections = machine(), []
    print(about)
    for part in chosen or PARTS:
        module, rows = importlib.import_module(f"tests.bench_{part}"), []
        for row in module.rows():
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
        pictures = module.figures(ROOT / "docs" / "performance") if hasattr(module, "figures") else []
        sections.append(_section(module, rows, pictures))
    if not chosen:
        PAGE.write_text(
            "# Performance\n\n"
            "Written by `make bench`. Read the ratios: what is compared took turns on the same machine, and a ratio of "
            "times is the median over rounds. The times themselves belong to this machine, and to its load.\n\n"
            f"Measured: {about}.\n\n" + "\n\n".join(sections) + "\n"
        )
        print(f"written: {PAGE.relative_to(ROOT)}")


def _section(module, rows: list[Row], pictures: list[tuple[str, str]]) -> str:
    title, _, text = module.__doc__.partition("\n\n")
    table = ["| | here | beside it | ratio | goal |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(row.cells())} |" for row in rows]
    shown = [f"![{caption}](performance/{name})" for name, caption in pictures]
    return "\n\n".join([f"## {title.rstrip('.')}", text.strip(), "\n".join(table), *shown])


if __name__ == "__main__":
    main(sys.argv[1:])
