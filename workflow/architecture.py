"""Draw docs/architecture.svg: which part of the project imports which other part, read from the source files.

python workflow/architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path

from vitreg_lib.base import NOTEBOOKS, ROOT, written

PICTURE = ROOT / "docs" / "architecture.svg"
LIBRARY = ROOT / "vitreg_lib"
JOBS = {  # from the lowest layer to the highest
    "base": "errors, paths, environment, atomic writes",
    "hooks": "the parts of a ViT, and its captured activations",
    "measure": "outliers, attention, maps, objects, pairs",
    "data": "scenes, textures, photos, the paper's data sets",
    "model": "from a name to a model; registers at test time",
    "probes": "what tokens know: linear, local, zero-shot",
    "train": "one training loop for any recipe, stop and resume",
    "plots": "plots that several figures need",
    "widgets": "JupyterLab: explorer, live training",
    "record": "runs, records, verdicts, pages",
    "cli": "the vitreg command",
    "notebooks": "one notebook a figure or table, its code beside it",
    "workflow": "runs notebooks; makes weights, data and pages",
}
PLACES = {  # column and row of a box
    "base": (1, 0),
    "hooks": (0, 1),
    "data": (2, 1),
    "measure": (0, 2),
    "model": (1, 3),
    "plots": (0, 4),
    "probes": (2, 4),
    "train": (1, 5),
    "widgets": (0, 6),
    "record": (1, 7),
    "cli": (0, 8),
    "workflow": (1, 9),
    "notebooks": (2, 8),
}


def edges() -> list[tuple[str, str]]:
    """(importing part, imported part), sorted: folders of the library, the notebooks' files, the workflow."""
    found = set()
    for path in LIBRARY.rglob("*.py"):
        own = path.relative_to(LIBRARY).with_suffix("").parts
        if own[0] != "__init__":
            found |= {(own[0], part) for part in _imported(path, own[:-1])}
    for name, folder in (("notebooks", NOTEBOOKS), ("workflow", ROOT / "workflow")):
        for path in folder.rglob("*.py"):
            found |= {(name, part) for part in _imported(path, None)}
    return sorted((a, b) for a, b in found if a != b and b in JOBS)


def _imported(path: Path, package: tuple[str, ...] | None) -> set[str]:
    """The top-level parts of vitreg_lib that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level and package is not None:
            module = [*package[: len(package) - node.level + 1], *module]
        elif module[:1] == ["vitreg_lib"]:
            module = module[1:]
        else:
            continue
        found |= {module[0]} if module else {alias.name for alias in node.names}
    return found


def stated(picture: str) -> list[tuple[str, str]]:
    """The edges that are listed in the description of the drawn SVG."""
    described = picture.partition("<dc:description>")[2].partition("</dc:description>")[0]
    return [tuple(edge.split(" imports ")) for edge in described.split("; ") if edge]


def draw(path: Path = PICTURE) -> Path:
    """Write the picture; it has no arrow that other arrows imply. Its description lists all edges."""
    import matplotlib.pyplot as plt

    graph = edges()
    needs = {name: {b for a, b in graph if a == name} for name in JOBS}
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "architecture"}):
        figure, axis = plt.subplots(figsize=(10.5, 8))
        boxes = {}
        for name, job in JOBS.items():
            x, y = PLACES[name]
            boxes[name] = plt.Rectangle((x - 0.45, y - 0.34), 0.9, 0.68, facecolor="white", edgecolor="#333333")
            axis.add_patch(boxes[name]).set_zorder(2)
            axis.text(x, y + 0.06, name, ha="center", weight="bold", fontsize=11, zorder=3)
            axis.text(x, y - 0.2, job, ha="center", fontsize=7.5, zorder=3)
        for importing, imported in graph:
            if any(imported in needs[other] for other in needs[importing] - {imported}):
                continue
            arrow = {"arrowstyle": "-|>", "color": "#0072B2", "lw": 1.6, "mutation_scale": 14}
            arrow |= {"patchA": boxes[importing], "patchB": boxes[imported]}
            axis.annotate("", PLACES[imported], PLACES[importing], arrowprops=arrow, zorder=4)
        axis.set(xlim=(-0.5, 2.5), ylim=(-0.5, 9.5))
        axis.axis("off")
        metadata = {"Date": None, "Description": "; ".join(f"{a} imports {b}" for a, b in graph)}
        with written(path) as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight", metadata=metadata)
        plt.close(figure)
    return path


if __name__ == "__main__":
    print(draw().relative_to(ROOT))
