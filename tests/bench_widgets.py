"""How long a widget takes to answer, for `make bench`: `python -m tests.bench_widgets`. Nothing is asserted.

The kernel's part of a change in the explorer, from the message to the views that are sent back, on mini models side by
side; the goal is 100 ms in all. The browser's part is in what `make test-browser` prints.
"""

from __future__ import annotations

import statistics
import time

from vitreg_lib import widgets


def main(models: str = "mini-deit3 mini-deit3-reg4") -> None:
    """Median and largest time of each kind of change, over ten of each."""
    began = time.perf_counter()
    explorer = widgets.explore(models, "scenes")
    print(f"explorer, {models}: first page {time.perf_counter() - began:.1f} s", flush=True)
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
        print(f"a change of {name:12} {statistics.median(took):6.1f} ms, at most {max(took):6.1f} ms  (at most 100)")


if __name__ == "__main__":
    main()
