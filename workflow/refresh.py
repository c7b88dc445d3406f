"""`make refresh`: execute notebooks in place with the profile mini, as they are committed.

Outputs hold neither progress nor timing, so that two runs on one machine give the same file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import workshop
from nbconvert.preprocessors import ExecutePreprocessor

from vitreg_lib.paths import NOTEBOOKS


def refresh(path: Path) -> None:
    """Execute one notebook and write it back, without widget state or execution times."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["VITREG_BATCH"] = "1"  # no progress bars, and widgets as pictures
    runner = ExecutePreprocessor(timeout=1800, record_timing=False)
    runner.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    workshop.write()  # solutions follow their exercises
    for path in [Path(p) for p in sys.argv[1:]] or sorted(NOTEBOOKS.rglob("*.ipynb")):
        print(f"{path.name} …", flush=True)
        refresh(path)
