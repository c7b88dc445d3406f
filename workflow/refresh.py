"""`make refresh`: execute notebooks in place with the profile mini, to be committed, and write their records.

Outputs contain neither progress bars nor times, so two runs on one machine give the same file. NOTEBOOKS="fig04 tab02"
selects some, by item or path. Several processes may run at once on different notebooks.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import compare
import items
import nbformat
import workshop
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

from vitreg_lib.base import NOTEBOOKS
from vitreg_lib.record import run as record

LARGEST = 295_000  # characters of a notebook; in larger ones, pictures get fewer colours


def refresh(path: Path) -> None:
    """Execute one notebook and write it back, without widget state or execution times; then write its record."""
    notebook = nbformat.read(path, as_version=4)
    item = re.search(r'vr\.start\("(\w+)"', "".join(cell.source for cell in notebook.cells))
    made = item and record.folder(item[1], record.check_parameters(item[1], {})) / "record.json"
    if made:
        made.unlink(missing_ok=True)  # so that the record written below is from this run
    items.enter_batch()  # no progress bars, and widgets as pictures
    runner = ExecutePreprocessor(timeout=1800, record_timing=False)
    runner.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    if len(nbformat.writes(notebook)) > LARGEST:
        _fewer_colours(notebook)
    nbformat.write(notebook, path)
    if made:
        compare.write(json.loads(made.read_text()))


def _fewer_colours(notebook) -> None:
    """Reduce a notebook's pictures to 256 colours, which makes line drawings four times smaller."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                small = io.BytesIO()
                with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                    # a median cut would give rare colours, such as an outlier's, to their more frequent neighbours
                    few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                    few.save(small, "png", optimize=True)
                output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    workshop.write()  # solutions follow their exercises
    chosen = [Path(name) if name.endswith(".ipynb") else record.notebook(name) for name in sys.argv[1:]]
    every = sorted(p for p in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    for path in chosen or every:
        print(f"{path.name} …", flush=True)
        refresh(path)
