"""Run the cells of the sweep (notebooks/beyond/emergence_sweep.py) that are not yet in the table; can be resumed.

python workflow/sweep.py                    # all
python workflow/sweep.py corners            # one cell, all its seeds
python workflow/sweep.py corners 0 1        # two of its seeds
"""

from __future__ import annotations

import sys

from vitreg_lib.base import NOTEBOOKS, ROOT

sys.path.insert(0, str(NOTEBOOKS / "beyond"))
import emergence_sweep as sweep  # noqa: E402


def main(chosen: list[str]) -> None:
    """Run the chosen cells and seeds (all without a choice), and put their rows into the table."""
    wanted = [name for name in chosen if not name.isdigit()] or sweep.names()
    done = (
        set() if not sweep.TABLE.exists() else set(sweep.table()[["cell", "seed"]].itertuples(index=False, name=None))
    )
    for name in wanted:
        count = next(c["seeds"] for c in sweep.SWEEP if c["cell"] == name)
        for seed in [int(text) for text in chosen if text.isdigit()] or range(count):
            if (name, seed) in done:
                continue
            folder = ROOT / "runs" / "sweep" / f"{name} seed {seed}".replace(" ", "-")
            rows = sweep.run(name, seed, folder, progress=sys.stderr.isatty())
            sweep.record(rows)
            print(sweep.verdict(rows).round(3).to_string(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
