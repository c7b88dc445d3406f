"""Widgets.

The time that the kernel needs for a change in the explorer, from the message to the returned views, with two mini
models: the median of ten changes, and the slowest. `make test-browser` prints the time of the browser.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from tests.bench import Row
from vitreg_lib import widgets


def rows(models: str = "mini-deit3 mini-deit3-reg4") -> Iterator[Row]:
    """Median and largest time of each kind of change, over ten of each."""
    began = time.perf_counter()
    explorer = widgets.explore(models, "scenes")
    yield Row("the explorer's first page", 1e3 * (time.perf_counter() - began))
    page = explorer.page
    canvas = lambda message: page._asked(0, message, [])  # noqa: E731
    changes = {
        "layer": lambda i: setattr(page.layer, "value", i % 8),
        "head": lambda i: setattr(page.heads.children[2 + i % 3], "value", not page.heads.children[2 + i % 3].value),
        "register": lambda i: setattr(page.query, "value", f"register {1 + i % 4}"),
        "patch": lambda i: canvas({"kind": "query", "query": [i, 5]}),
        "cutoff": lambda i: canvas({"kind": "cutoff", "value": 1.0 + i}),
        "image": lambda i: setattr(page.image, "value", 1 + i),
        "image seen": lambda i: setattr(page.image, "value", 10 - i),
    }
    for name, change in changes.items():
        took = []
        for number in range(10):
            began = time.perf_counter()
            change(number)
            took.append(1e3 * (time.perf_counter() - began))
        yield Row(f"a change of {name}; the slowest", statistics.median(took), max(took), "ms", "at most 100 ms")
