"""The workflow knows what a result hangs on: nothing runs twice for nothing, and nothing stale is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from vitreg_lib import record
from vitreg_lib.paths import ROOT


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
    named = ("__init__", "outliers", "plots", "widgets", "record")
    reached = ("capture", "anatomy", "errors", "paths", "models/zoo", "models/planted", "data/scenes", "data/images")
    for module in named + reached:
        assert f"vitreg_lib/{module}.py" in needed
    for module in ("lost", "posembed", "complexity", "cli", "report", "probes/linear", "train/deit3"):
        assert f"vitreg_lib/{module}.py" not in needed
    assert all((ROOT / path).exists() for path in needed)


def test_a_notebook_depends_on_the_checkpoints_of_its_models(depends):
    needed = inputs(depends, "fig03")
    assert "data/checkpoints/mini-deit3.safetensors" in needed  # also the planted control's base
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
        "fig05": ("probes/local", "probes/position", "probes/reconstruction", "probes/linear"),
        "tab02": ("probes/scores", "probes/zeroshot", "probes/depth"),
        "tab03": ("data/boxes", "lost"),
    }.items():
        assert {f"vitreg_lib/{name}.py" for name in names} <= set(inputs(depends, item)), item


def test_a_notebook_depends_on_the_text_towers_of_its_models(depends):
    assert "data/checkpoints/mini-clip.text.safetensors" in inputs(depends, "tab02", models="mini-clip")


def test_every_way_to_import_is_seen(depends, tmp_path):
    planted = (ROOT / "vitreg_lib/models/planted.py").read_text()
    assert {"capture", "data.scenes", "models.zoo"} <= set(depends._imports(planted, ("models",)))
    source = "import torch\nimport vitreg_lib.lost\nfrom vitreg_lib.probes import local\nfrom vitreg_lib import maps"
    assert depends._imports(source) == ["lost", "probes", "probes.local", "maps"]
    notebook = tmp_path / "some.ipynb"
    notebook.write_text(
        '{"cells": [{"cell_type": "code", "source": ["%matplotlib inline\\n", "vr.data.images.load()"]}]}'
    )
    assert ROOT / "vitreg_lib/data/images.py" in depends.modules(notebook)


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
    with open(place / "vitreg_lib/posembed.py", "a") as f:  # no part of fig07
        f.write("\n# changed\n")
    assert "all is up to date" in reproduce()
    with open(place / "vitreg_lib/outliers.py", "a") as f:
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
