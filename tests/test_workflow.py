"""The workflow knows what a result hangs on: nothing runs twice for nothing, and nothing stale is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

from vitreg_lib.base import ROOT, UserError
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts


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
    named = ("__init__", "measure/outliers", "plots/norms", "widgets/controls", "record/run")
    reached = ("hooks/capture", "hooks/anatomy", "base", "model/zoo", "model/planted", "data/scenes", "data/images")
    for module in named + reached:
        assert f"vitreg_lib/{module}.py" in needed
    for module in ("measure/objects", "cli", "record/diagnose", "probes/dense", "train/recipes/registers"):
        assert f"vitreg_lib/{module}.py" not in needed
    trains = inputs(depends, "train_mae")
    assert {"notebooks/train/mae.py", "notebooks/train/views.py", "vitreg_lib/probes/local.py"} <= set(trains)
    assert not {"notebooks/train/clip.py", "vitreg_lib/train/recipes/registers.py"} & set(trains)
    assert "vitreg_lib/train/recipes/registers.py" in inputs(depends, "train_registers")
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
        "tab02": ("notebooks/paper/tab02", "vitreg_lib/model/text", "notebooks/paper/tab02_heads"),
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


def test_what_draws_nothing_with_a_helper_does_not_depend_on_it(depends):
    scores = "vitreg_lib/plots/scores.py"
    assert scores in inputs(depends, "tab02")
    for item in ("fig03", "fig12", "fig20"):
        assert scores not in inputs(depends, item)
        assert "vitreg_lib/plots/style.py" in inputs(depends, item)
    source = "from .. import plots\nplots.scores(1)"
    assert depends._reached(source, ROOT / "vitreg_lib" / "widgets") == [ROOT / scores]


def test_settings_hold_the_claims_and_data_sets_that_the_item_names(depends):
    told = json.loads(depends.settings("fig03", record.check_parameters("fig03", {})))
    assert "C007" in told[3]
    assert told[3]["C007"] == verdicts.reported_claims()["C007"]
    assert "C050" not in told[3]
    told = json.loads(depends.settings("tab01", record.check_parameters("tab01", {"sets": "cifar10"})))
    assert told[2]["cifar10"]["title"]


def test_the_graph_needs_no_torch():
    code = "import sys; sys.path.insert(0, 'workflow'); import run, cells, depends\n"
    code += "for cell in cells.of({}): depends.inputs(cell.item, cell.parameters)\n"
    code += "print(*({'torch', 'timm', 'pandas', 'sklearn', 'papermill'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "\n"


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    import run

    return run


def test_parameters_are_split_as_a_shell_would(runner):
    assert runner.pairs_of("n_images=64 seed=1") == [("n_images", "64"), ("seed", "1")]
    text = "models=\"mini-deit3 mini-clip\" rule='a=b' clean='$(touch x)`touch y`{z}'"
    assert runner.pairs_of(text) == [
        ("models", "mini-deit3 mini-clip"),
        ("rule", "a=b"),
        ("clean", "$(touch x)`touch y`{z}"),
    ]
    with pytest.raises(UserError, match="'n_images' is not NAME=VALUE; write PARAMS="):
        runner.pairs_of("n_images")
    with pytest.raises(UserError, match="No closing quotation"):
        runner.pairs_of('models="mini-deit3')


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_jobs_is_refused(runner, capsys, monkeypatch, jobs):
    monkeypatch.setenv("JOBS", jobs)
    assert runner.main(["fig3"]) == 1
    assert capsys.readouterr().err == f"vitreg: JOBS={jobs}: it must be a whole number, 1 or more\n"


def test_an_unknown_cluster_or_one_whose_executor_is_not_there_is_refused(runner, capsys, tmp_path):
    assert runner.main(["fig3", "--cluster", "slurmm"]) == 1
    assert "unknown cluster 'slurmm': did you mean slurm?" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("executor: no-such\n")
    assert runner.main(["fig3", "--cluster", str(tmp_path)]) == 1
    assert "Snakemake's executor no-such is not installed" in capsys.readouterr().err


def test_a_notebook_asks_a_cluster_for_what_its_profile_needs(runner):
    import cells

    assert cells.cell("fig03", "mini", ()).needs == {"mem_mb": 2000}
    assert cells.cell("fig03", "large", ()).needs["gpu"] == 1


def test_parameters_of_all_items_are_refused(runner, capsys, monkeypatch):
    monkeypatch.setenv("PARAMS", "seed=1")
    assert runner.main(["all"]) == 1
    assert "PARAMS need a single item: make reproduce-fig4 PARAMS=seed=…" in capsys.readouterr().err


def test_make_runs_nothing_that_stands_in_its_variables(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / ".ready").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s|" "$@" "$PARAMS" "$PROFILE" "$JOBS"\n')
    python.chmod(0o755)
    typed = "a=$(shell touch pwned) b=$$(touch pwned) c=`touch pwned`; touch pwned"
    command = ["make", "-s", "reproduce-fig4", f"PARAMS={typed}", "PROFILE=$(shell touch pwned)", "JOBS=1;touch pwned"]
    command.append("CLUSTER=$(shell touch pwned)")
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told == f"workflow/run.py|fig4|{typed}|$(shell touch pwned)|1;touch pwned|"
    assert not (tmp_path / "pwned").exists()


RECORD = """
import json, os, pathlib
folder = pathlib.Path(os.environ["VITREG_MAKING"])
(folder / "record.json").write_text(json.dumps({"figures": [], "measured": [VALUE], "title": "", "profile": "small",
    "claims": [], "not_reachable_here": []}))
"""


@pytest.fixture
def small(tmp_path):
    """A checkout in a folder of an awkward name, with notebooks that a test makes, and its workflow as a function."""
    place = tmp_path / "a checkout {b}"
    for folder in ("vitreg_lib", "workflow"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in (ROOT / "data").glob("*.yaml"):
        (place / "data").mkdir(exist_ok=True)
        shutil.copy(path, place / "data")
    shutil.copytree(ROOT / "data" / "reported", place / "data" / "reported")
    (place / "notebooks" / "paper").mkdir(parents=True)

    def write(item: str, *code: str) -> None:
        cells = [nbformat.v4.new_code_cell(cell) for cell in ('profile = "small"  # which\nword = ""  # any', *code)]
        cells[0].metadata["tags"] = ["parameters"]
        for number, cell in enumerate(cells):
            cell["id"] = f"cell-{number}"
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
        nbformat.write(notebook, place / "notebooks" / "paper" / f"{item}_made_up.ipynb")

    def reproduce(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        given = {k: v for k, v in os.environ.items() if not k.startswith("VITREG_")} | {"PYTHONPATH": str(place)}
        command = [sys.executable, "workflow/run.py", *arguments, "--profile", "small"]
        return subprocess.run(command, cwd=place, env=given | environment, capture_output=True, text=True, timeout=300)

    return place, write, reproduce


def measured(place, item: str):
    return json.loads((place / "results" / "small" / item / "record.json").read_text())["measured"]


@pytest.mark.slow
def test_what_fails_is_listed_and_leaves_earlier_results_and_what_is_damaged_is_made_again(small):
    place, write, reproduce = small
    write("fig01", RECORD.replace("VALUE", "1"))
    write("fig02", RECORD.replace("VALUE", "1"))
    done = reproduce("all")
    assert done.returncode == 0, done.stderr
    assert "[2] " in done.stdout and "made; at most" in done.stdout
    assert "made: fig01, fig02" in done.stdout
    assert "all is up to date" in reproduce("all").stdout
    write("fig02", RECORD.replace("VALUE", "2"), "x = 1\nraise ValueError('no {such} layer')")
    write("fig03", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (place / "results" / "small" / "fig01" / "record.json").write_text('{"half')
    done = reproduce("all")
    assert done.returncode != 0
    *lines, killed = done.stderr.splitlines()
    assert lines == [
        "made: fig01",
        "failed: fig02: ValueError: no {such} layer (cell 4; see results/small/fig02/fig02.failed.ipynb)",
    ]
    assert killed.startswith("failed: fig03: its kernel was killed after it had taken")
    assert measured(place, "fig01") == measured(place, "fig02") == [1]
    assert (place / "results/small/fig02/fig02.failed.ipynb").exists()
    # the same item alone, with a parameter of a shell's and Snakemake's characters
    write("fig02", RECORD.replace("VALUE", "word"))
    word = "a {b} $(touch x) 'c' \"d\" = ü"
    done = reproduce("fig2", "-p", "word", word)
    assert done.returncode == 0, done.stderr
    [folder] = (place / "results" / "small").glob("fig02--*")
    assert measured(place, folder.name) == [word]
    assert "all is up to date" in reproduce("fig2", "-p", "word", word).stdout


@pytest.mark.slow
def test_kernels_fork_where_they_can_and_start_plainly_where_they_cannot(small):
    place, write, reproduce = small
    code = "sys = __import__('sys')\n" + RECORD.replace("VALUE", "'timm' in sys.modules, __import__('os').getpid()")
    ways = {"forked": ({}, True), "plain": ({"VITREG_PLAIN": "1"}, False), "killed": ({}, False)}
    for way, (environment, forks) in ways.items():
        if way == "killed":  # the process to fork from ends before it answers
            path = place / "workflow" / "forked.py"
            path.write_text(path.read_text().replace("if not may_fork():", "if True:"))
        for item in ("fig01", "fig02"):
            write(item, code, f"# {way}")
        done = reproduce("all", **environment)
        assert "made: fig01, fig02" in done.stdout, done.stdout + done.stderr
        found = [measured(place, item) for item in ("fig01", "fig02")]
        assert [timm for timm, _ in found] == [forks, forks], way
        assert found[0][1] != found[1][1]


@pytest.mark.slow
def test_forked_kernels_give_the_records_of_plain_ones(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "items: [fig07]\nmodels: [mini-deit3-s]\nparameters: {n_images: [2], seed: [0, 1]}"
    )
    found = []
    for way in ("", "1"):
        environment = os.environ | {"VITREG_RESULTS": str(tmp_path / f"results{way}"), "VITREG_PLAIN": way}
        command = [sys.executable, "workflow/batch.py", str(tmp_path / "sweep.yaml")]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        folders = sorted((tmp_path / f"results{way}" / "mini").glob("fig07--*"))
        records = [json.loads((folder / "record.json").read_text()) | {"seconds": 0} for folder in folders]
        shown = [
            [
                (o.output_type, sorted(o.get("data", {})), o.get("text"))
                for c in notebook.cells
                for o in c.get("outputs", [])
            ]
            for notebook in (nbformat.read(folder / "fig07.ipynb", 4) for folder in folders)
        ]
        assert len(records) == 2 and any("image/png" in kinds for _, kinds, _ in shown[0])
        found.append((records, shown))
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_of_the_same_batch_wait_for_each_other(small, tmp_path):
    place, write, _ = small
    gate = tmp_path / "gate"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists():\n    time.sleep(0.05)"
    write("fig01", wait, RECORD.replace("VALUE", "1"))
    write("fig02", RECORD.replace("VALUE", "1"))
    given = {k: v for k, v in os.environ.items() if not k.startswith("VITREG_")} | {"PYTHONPATH": str(place)}
    command = [sys.executable, "workflow/run.py", "all", "--profile", "small"]
    options = dict(cwd=place, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as first:
        while not list(place.glob("results/.graph/.*.process")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        with subprocess.Popen(command, **options) as second:
            told = second.stderr.readline()
            assert f"the same batch is being made by process {first.pid} since" in told
            gate.touch()
            assert "made: fig01, fig02" in first.communicate(timeout=300)[0]
            assert "all is up to date" in second.communicate(timeout=300)[0]


@pytest.mark.slow
def test_all_and_one_do_not_make_each_others_results_stale(small):
    place, write, reproduce = small
    write("fig01", RECORD.replace("VALUE", "1"))
    assert "made: fig01" in reproduce("all").stdout
    assert "all is up to date" in reproduce("fig1").stdout
    assert "all is up to date" in reproduce("all").stdout


@pytest.mark.slow
def test_what_the_engine_says_is_shown(small):
    place, write, reproduce = small
    write("fig01", RECORD.replace("VALUE", "1"))
    (place / "workflow" / "Snakefile").write_text("rule all:\n    input: 'nowhere'\n")
    done = reproduce("all")
    assert done.returncode != 0
    assert "vitreg: the graph could not be run: " in done.stderr
    assert "nowhere" in done.stderr
    assert "not tried: fig01" in done.stderr


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


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_and_writes_one_table(small):
    place, write, _ = small
    write(
        "fig01", RECORD.replace("VALUE", '{"name": "x", "model": "m", "value": len(word), "unit": "", "paper": None}')
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VITREG_")} | {"PYTHONPATH": str(place)}

    def batch(words: str) -> str:
        (place / "my sweep.yaml").write_text(f"profile: small\nitems: [fig01]\nparameters: {{word: {words}}}\n")
        command = [sys.executable, "-m", "vitreg_lib.cli", "batch", "my sweep.yaml"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "1 of 1 runs made now; 1 numbers: results/small/sweeps/my sweep.parquet" in batch('["a b"]')
    assert "1 of 2 runs made now; 2 numbers" in batch('["a b", "{c}"]')
    import pandas as pd

    table = pd.read_parquet(place / "results" / "small" / "sweeps" / "my sweep.parquet")
    assert list(zip(table["parameter word"], table.value, strict=True)) == [("a b", 3.0), ("{c}", 3.0)]
