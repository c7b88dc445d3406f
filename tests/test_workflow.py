"""The workflow knows what a result hangs on: nothing runs twice for nothing, and nothing stale is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from vitreg_lib.base import ROOT
from vitreg_lib.record import run as record


@pytest.fixture
def depends(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    import depends

    return depends


def inputs(depends, item, **given):
    return depends.inputs(item, record.check_parameters(item, given))


def test_a_notebook_depends_on_the_modules_that_it_reaches(depends):
    needed = inputs(depends, "fig03")
    assert "notebooks/paper/fig03_norm_maps.ipynb" in needed
    named = ("__init__", "measure/outliers", "plots/norms", "widgets/interact", "record/run")
    reached = ("hooks/capture", "hooks/anatomy", "base", "model/zoo", "model/planted", "data/scenes", "data/images")
    for module in named + reached:
        assert f"vitreg_lib/{module}.py" in needed
    for module in ("measure/objects", "cli", "record/report", "probes/linear", "train/recipes/clip"):
        assert f"vitreg_lib/{module}.py" not in needed
    assert "notebooks/paper/fig12.py" not in needed
    assert "notebooks/paper/fig12.py" in inputs(depends, "fig12")
    assert all((ROOT / path).exists() for path in needed)


def test_a_notebook_depends_on_the_checkpoints_of_its_models(depends):
    needed = inputs(depends, "fig03")
    assert "data/checkpoints/mini-deit3.safetensors" in needed  # also the random control's architecture
    assert "data/checkpoints/planted.safetensors" in needed
    assert "data/checkpoints/mini-deit3-reg4.safetensors" not in needed
    assert "data/checkpoints/mini-deit3-reg4.safetensors" in inputs(depends, "fig07")
    other = inputs(depends, "fig03", models="mini-deit3-xs+ttr2")
    assert "data/checkpoints/mini-deit3-xs.safetensors" in other
    assert "data/checkpoints/mini-deit3.safetensors" not in other


def test_settings_hold_the_entries_of_the_items_own_models_alone(depends):
    told = depends.settings("fig03", record.check_parameters("fig03", {}))
    assert '"n_images": 64' in told
    assert '"mini-deit3": {' in told
    assert "mini-deit3-reg4" not in told


def test_a_notebook_depends_on_the_modules_that_it_imports_by_name(depends):
    for item, names in {
        "fig05": ("vitreg_lib/probes/local", "vitreg_lib/probes/local", "vitreg_lib/probes/linear"),
        "tab02": ("notebooks/paper/tab02", "vitreg_lib/probes/zeroshot", "vitreg_lib/probes/dense"),
        "tab03": ("vitreg_lib/data/sets", "vitreg_lib/measure/objects"),
    }.items():
        assert {f"{name}.py" for name in names} <= set(inputs(depends, item)), item


def test_a_notebook_depends_on_the_text_towers_of_its_models(depends):
    assert "data/checkpoints/mini-clip.text.safetensors" in inputs(depends, "tab02", models="mini-clip")


def test_every_way_to_import_is_seen(depends, tmp_path):
    (tmp_path / "beside.py").write_text("from vitreg_lib.measure import maps")
    source = "import torch\nimport vitreg_lib.cli\nimport beside\ndef f():\n    from vitreg_lib.probes import local"
    found = {path.relative_to(ROOT).as_posix() for path in depends._reached(source, tmp_path) if ROOT in path.parents}
    assert {"vitreg_lib/cli.py", "vitreg_lib/probes/local.py"} <= found
    assert tmp_path / "beside.py" in depends._reached(source, tmp_path)
    relative = depends._reached("from ..data import scenes\nfrom .zoo import load", ROOT / "vitreg_lib/model")
    assert {ROOT / "vitreg_lib/data/scenes.py", ROOT / "vitreg_lib/model/zoo.py"} <= set(relative)
    notebook = tmp_path / "some.ipynb"
    cell = ["%matplotlib inline\n", "import beside\n", "vr.images.load()"]
    notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell}]}))
    assert {ROOT / "vitreg_lib/data/images.py", ROOT / "vitreg_lib/measure/maps.py"} <= depends.modules(notebook)


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository that a test may change, and a function that runs its workflow."""
    for folder in ("vitreg_lib", "workflow", "notebooks", "data"):
        ignore = shutil.ignore_patterns("__pycache__", "*.tmp", "eval.parquet", "kernel-ipc-*", ".*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)

    def reproduce(*arguments: str) -> str:
        command = [sys.executable, "workflow/run.py", "fig7", "-p", "n_images", "2", "-p", "models", "mini-deit3-s"]
        environment = {k: v for k, v in os.environ.items() if k != "VITREG_RESULTS"} | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return tmp_path, reproduce


@pytest.mark.slow
def test_only_what_changed_runs_again(clone):
    place, reproduce = clone
    told = reproduce()
    assert "made: fig07" in told
    assert "figure: results/mini/fig07--" in told
    assert "all is up to date" in reproduce()
    with open(place / "vitreg_lib/measure/objects.py", "a") as f:  # no part of fig07
        f.write("\n# changed\n")
    assert "all is up to date" in reproduce()
    with open(place / "vitreg_lib/measure/outliers.py", "a") as f:
        f.write("\n# changed\n")
    assert "made: fig07" in reproduce()


@pytest.mark.slow
def test_a_bad_parameter_is_refused_before_the_workflow_starts():
    command = [sys.executable, "workflow/run.py", "fig3", "-p", "n_image", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "vitreg: unknown parameter of fig03 'n_image': did you mean n_images or images?\n"


def test_make_help_lists_every_target():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "reproduce-%", "reproduce-all", "report", "test", "lab", "bench", "clean"):
        assert f"make {target} " in told
