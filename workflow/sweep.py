"""Run the cells of the sweep (notebooks/beyond/emergence.py) not yet in the table; stop and go on at any time.

python workflow/sweep.py                    # all
python workflow/sweep.py corners            # one cell, all its seeds
python workflow/sweep.py corners 0 1        # two of its seeds
"""

from __future__ import annotations

import sys

from vitreg_lib.base import NOTEBOOKS, ROOT

sys.path.insert(0, str(NOTEBOOKS / "beyond"))
import emergence  # noqa: E402


def main(chosen: list[str]) -> None:
    """Run what is asked for, and put it into the table."""
    wanted = [name for name in chosen if not name.isdigit()] or emergence.names()
    done = (
        set()
        if not emergence.TABLE.exists()
        else set(emergence.table()[["cell", "seed"]].itertuples(index=False, name=None))
    )
    for name in wanted:
        count = next(c["seeds"] for c in emergence.SWEEP if c["cell"] == name)
        for seed in [int(text) for text in chosen if text.isdigit()] or range(count):
            if (name, seed) in done:
                continue
            folder = ROOT / "runs" / "sweep" / f"{name} seed {seed}".replace(" ", "-")
            rows = emergence.run(name, seed, folder, progress=sys.stderr.isatty())
            emergence.record(rows)
            print(emergence.verdict(rows).round(3).to_string(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
