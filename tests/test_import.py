"""Importing costs nothing that is not used, and every notebook's parameters are what the tools can check."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest

from vitreg_lib.base import ROOT
from vitreg_lib.record import run as record

NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ITEMS = [path for path in NOTEBOOKS if path.relative_to(ROOT).parts[1] != "workshop"]  # exercises are no items
HEAVY = ("torch", "timm", "pandas", "sklearn", "matplotlib", "papermill", "datasets", "numpy")


@pytest.mark.parametrize(
    "code",
    [
        "import vitreg_lib",
        "from vitreg_lib import cli; cli.check = cli.main(['run', 'fig03', '--parameters'])",
        "from vitreg_lib import cli; cli.check = cli.main([])",
    ],
)
def test_a_fresh_import_loads_nothing_heavy(code):
    command = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_modules_are_at_hand_by_their_short_name():
    import vitreg_lib as vr

    assert vr.zoo.load is vr.load
    assert vr.start is record.start
    assert vr.detect is vr.detection.detect
    with pytest.raises(AttributeError, match="vitreg_lib has no 'outlierz'"):
        vr.outlierz  # noqa: B018


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_the_pages_name_only_what_the_library_has(path):
    import vitreg_lib as vr

    for name in re.findall(r"(?<![\w.])vr\.[\w.]+\w", path.read_text()):
        part = vr
        for attribute in name.split(".")[1:]:
            assert hasattr(part, attribute), f"{path.name}: {name}"
            part = getattr(part, attribute)


def test_the_example_for_code_of_ones_own_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "use.md").read_text(), re.DOTALL)[1]
    exec(compile(example.replace("timm:vit_base_patch16_224.dino", "mini-deit3"), "docs/use.md", "exec"), {})  # noqa: S102
    assert re.search(r"(?i)(artifacts|undecided).*\n.*% outliers", capsys.readouterr().out)


def parameters_cell(path) -> str:
    cells = json.loads(path.read_text())["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name} has {len(tagged)} cells tagged parameters"
    return tagged[0]


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
def test_parameters_are_plain_literals_with_a_comment_each(path):
    source = parameters_cell(path)
    comments = {
        t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
    }
    names = []
    for node in ast.parse(source).body:
        assert isinstance(node, ast.Assign), ast.unparse(node)
        assert len(node.targets) == 1
        value = ast.literal_eval(node.value)
        assert type(value) in (str, int, float, bool), f"{ast.unparse(node)}: papermill's plain types"
        assert node.end_lineno in comments, f"{ast.unparse(node)}: a comment says what it means"
        names.append(node.targets[0].id)
    assert names[0] == "profile"
    assert record._assigned(source).keys() == set(names)
    assert record._assigned(source)["profile"] == "mini"


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title_and_starts_a_run_of_its_own_item(path):
    notebook = json.loads(path.read_text())
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    item = path.stem.split("_")[0] if path.parent.name == "paper" else path.stem
    assert f'vr.start("{item}", globals())' in code
    assert "run.claims(" in code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_small_and_say_nothing_of_a_machine(path):
    """No warning, no path of somebody's machine, cells run in order."""
    assert path.stat().st_size < 300_000
    counts = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        counts.append(cell["execution_count"])
        for output in cell["outputs"]:
            assert output.get("name") != "stderr"
            assert output["output_type"] != "error"
            text = json.dumps(
                {k: v for k, v in output.get("data", {"text": output.get("text")}).items() if "image" not in k}
            )
            assert str(ROOT) not in text
            assert "Warning" not in text
    ran = [count for count in counts if count is not None]
    assert ran == list(range(1, len(ran) + 1)) and len(ran) in (0, len(counts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_names_of_the_library_and_of_the_file_beside_it_exists(path, monkeypatch):
    """`vr.NAME.attribute` and `fig05.attribute`, which otherwise fail only when the cell runs."""
    import importlib

    import vitreg_lib as vr

    monkeypatch.syspath_prepend(str(path.parent))
    cells = json.loads(path.read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    tree = ast.parse(re.sub(r"^[%!].*", "", source, flags=re.MULTILINE))
    beside = {p.stem for p in path.parent.glob("*.py")}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in beside:
            assert hasattr(importlib.import_module(node.value.id), node.attr), f"{node.value.id}.{node.attr}"
        inner = node.value
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "vr":
            assert hasattr(getattr(vr, inner.attr), node.attr), f"vr.{inner.attr}.{node.attr}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lines_of_code_fit_a_laptop(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            long = [line for line in "".join(cell["source"]).splitlines() if len(line) > 100]
            assert not long, f"{cell['id']}: {long[0]}"


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
def test_the_figure_begins_on_the_first_screen(path):
    """A window of 900 × 700 pixels shows about 27 lines; a folded cell takes two, a line has 115 letters."""
    above = 0  # lines above the first picture
    for cell in json.loads(path.read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown":
            above += 1 + sum(1 + len(line) // 115 for line in lines if line)
            continue
        above += 2 if cell["metadata"].get("jupyter", {}).get("source_hidden") else 1 + len(lines)
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                assert above <= 26, f"{above} lines before the figure in {cell['id']}: fold cells or move text"
                return
            above += len("".join(output.get("text", "")).splitlines()) + 6 * ("text/html" in output.get("data", {}))
    pytest.fail(f"{path.name} shows no picture")
