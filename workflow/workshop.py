"""Make the workshop's solution notebooks from the exercises, or check that all is ready and open JupyterLab.

    python workflow/workshop.py             # update notebooks/workshop/solutions/*.ipynb
    python workflow/workshop.py --open      # `make workshop`: print what is ready or missing, then open JupyterLab

Edit the text in the exercises only. Students fill in the cells tagged `answer:NAME`. In the solutions, such a cell is
replaced by the section `# %% NAME` of solutions/answers.py.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import nbformat

from vitreg_lib.base import NOTEBOOKS, ROOT, shown

EXERCISES = NOTEBOOKS / "workshop"
SOLUTIONS = EXERCISES / "solutions"
TAG = "answer:"
BESIDE = 'import sys\n\nsys.path.insert(0, "..")  # checks.py and pictures.py are beside the exercises\n'
NEEDS = (
    "torch",
    "timm",
    "skimage",
    "sklearn",
    "matplotlib",
    "jupyterlab",
    "ipywidgets",
    "anywidget",
    "ipykernel",
)


def answers() -> dict[str, str]:
    """{name: code} of the sections of answers.py."""
    _, *sections = (SOLUTIONS / "answers.py").read_text().split("\n# %% ")
    return {name: code.strip() for name, _, code in (section.partition("\n") for section in sections)}


def answer_of(cell) -> str | None:
    """The name of the answer that belongs into a cell, by its tag; None for other cells."""
    tags = cell.metadata.get("tags", [])
    return next((tag.removeprefix(TAG) for tag in tags if tag.startswith(TAG)), None)


def solved(exercises: nbformat.NotebookNode, filled: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook with all answers filled in and no outputs. Raises KeyError for an answer that is missing."""
    notebook = copy.deepcopy(exercises)
    title = notebook.cells[0]
    title.source = title.source.replace("\n", " (solutions)\n", 1)
    for cell in notebook.cells:
        if name := answer_of(cell):
            cell.source = filled[name]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = cell.source.replace("import checks\n", f"{BESIDE}import checks\n", 1)
        else:
            cell.source = cell.source.replace("](../", "](../../")  # solutions lie one folder deeper
    return notebook


def exercises() -> list[Path]:
    """The exercise notebooks, in order."""
    return sorted(EXERCISES.glob("*.ipynb"))


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Kind and source of every cell, to compare two notebooks."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def write() -> list[Path]:
    """The paths of the solution notebooks that were out of date and are written, without outputs."""
    written = []
    for path in exercises():
        notebook, target = solved(nbformat.read(path, as_version=4), answers()), SOLUTIONS / path.name
        if target.exists() and sources(nbformat.read(target, as_version=4)) == sources(notebook):
            continue
        nbformat.write(notebook, target)
        written.append(target)
    return written


def ready() -> str:
    """One line that lists what is ready; raises UserError if something is missing."""
    import importlib.util

    from vitreg_lib.base import UserError
    from vitreg_lib.data import images
    from vitreg_lib.model import measured, zoo

    if missing := [name for name in NEEDS if not importlib.util.find_spec(name)]:
        raise UserError(f"the workshop needs {', '.join(missing)}: run `make setup` (or rm -rf .venv first)")
    if len(exercises()) < 5:
        raise UserError("notebooks/workshop is incomplete: `git restore notebooks/workshop`")
    for name in ("planted", "mini-random", "mini-deit3", "mini-deit3-reg4"):
        zoo.load(name, "cpu")  # a missing or damaged checkpoint is named here
    photos, _ = images.find("photos")
    real = {name: measured.live_or_replayed(name) for name in ("deit-ti", "vit-ti", "deit-ti-trained-reg4")}
    named = ", ".join(name + (" (replayed)" if model.replayed else "") for name, model in real.items())
    return f"workshop: ready, offline. {len(exercises())} notebooks, 4 mini models, {len(photos)} photos, {named}"


def lab() -> list[str]:
    """The command that opens JupyterLab at the first notebook; its root is the repository, so that links work."""
    first = exercises()[0].relative_to(ROOT).as_posix()
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{first}",
    ]


if __name__ == "__main__":
    from vitreg_lib.base import UserError

    try:
        if "--open" in sys.argv:
            print(ready(), flush=True)
            os.execv(sys.executable, lab())  # replaces this process, so that only JupyterLab gets Ctrl-C
        else:
            for path in write():
                print(f"{shown(path)}: answers filled in")
    except UserError as error:
        sys.exit(f"workshop: {error}")
