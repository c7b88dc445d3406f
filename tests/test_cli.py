"""The command: one clear line and a non-zero exit for what is wrong; nothing half-made stays under results/."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import execute
import items
import nbformat
import pytest

from vitreg_lib import cli
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.data import images
from vitreg_lib.record import run as record


def vitreg(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitreg_lib.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)


def failing(capsys, *arguments: str) -> str:
    """The one line that a failing command writes to stderr."""
    code = cli.main(list(arguments))
    told = capsys.readouterr().err
    assert code in (1, 2)
    assert told.startswith("vitreg: ")
    assert told.count("\n") == 1, told
    return told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("run figg03", "unknown item 'figg03': did you mean fig03"),
        ("train deit3 --steps 0", "--steps 0: at least one is needed"),
        ("run fig03 -p n_image 3", "unknown parameter of fig03 'n_image': did you mean n_images"),
        ("run fig03 -p n_images many", "but an int is wanted, as in 0"),
        ("run fig03 -p n_images -5", "parameter n_images is -5, but at least 0 is wanted"),
        ("run fig03 -p models mini-diet3", "unknown model 'mini-diet3': did you mean mini-deit3"),
        ("run fig11_resizing", "unknown item 'fig11_resizing': did you mean fig11_resizing_gradients"),
        ("run fig03 --profile huge", "'huge'"),
        ("run fig03 -p profile huge", "unknown profile 'huge'"),
        ("run", "item"),
        ("runn fig03", "runn"),
        ("models mini-diet3", "unknown model 'mini-diet3': did you mean mini-deit3"),
        ("mend mini-diet3", "unknown model 'mini-diet3': did you mean mini-deit3"),
        ("mend mini-deit3-s --registers many", "write numbers separated by commas"),
        ("mend mini-deit3-s --images nowhere", "no images at 'nowhere'"),
        ("report fig03", "fig03 left no record.json"),
        ("report --profile small", "nothing made yet in profile small"),
        ("train --resume nowhere", "nowhere holds no run"),
        ("train", "name what to train (clip, deit3, "),
        ("train dinov3", "unknown recipe 'dinov3': did you mean dinov2 or deit3?"),
        ("train deit3 --steps many", "Invalid value for '--steps'"),
        ("train deit3 --mask-ratio 0.5", "No such option: --mask-ratio"),
        ("train --resume nowhere deit3", "leave deit3 out"),
        ("train clip --accumulate 2 --out results/test-refused", "--accumulate 2: clip compares the images of a batch"),
        ("train --device cpu deit3", "write options after the recipe"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, results, arguments, told):
    assert told in failing(capsys, *arguments.split())
    assert not list(results.rglob("*.*"))


def test_results_that_cannot_be_written_are_named_in_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITREG_RESULTS", str(tmp_path / "file"))
    assert f"fig06: its results cannot be written into {tmp_path / 'file'} (Not a directory)" in failing(
        capsys, "run", "fig06", "--quiet"
    )


def test_an_unknown_size_is_refused_before_a_folder_is_made(capsys, tmp_path):
    told = failing(capsys, "train", "deit3", "--size", "huge", "--out", str(tmp_path / "run"))
    assert "unknown mini size 'huge'; known are" in told
    assert not (tmp_path / "run").exists()


def test_in_a_process_of_its_own_the_exit_code_and_the_line_are_the_same(results):
    done = vitreg("run", "fig03", "-p", "n_image", "3")
    assert done.returncode == 1
    assert done.stderr == "vitreg: unknown parameter of fig03 'n_image': did you mean n_images or images?\n"
    assert done.stdout == ""
    assert not results.exists()


def test_debug_shows_the_traceback(results):
    done = vitreg("--debug", "run", "fig03", "-p", "n_image", "3")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vitreg_lib.base.UserError: unknown parameter")


def test_without_a_command_help_is_shown(capsys):
    assert cli.main([]) == 2
    assert "Commands" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "report", "diagnose", "mend", "models", "data", "train"])
def test_every_command_has_help(capsys, command):
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"Usage: vitreg {command}")


def test_lists(capsys):
    assert cli.main(["models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("mini-deit3", "planted", "vit-ti", "random:NAME"))
    assert cli.main(["models", "mini-deit3"]) == 0
    assert "vitreg train deit3" in capsys.readouterr().out
    assert cli.main(["run", "fig3", "--parameters"]) == 0
    assert "n_images" in capsys.readouterr().out
    assert cli.main(["data"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{source} " in f"\n{told}" for source in (*images.PROCEDURAL, "photos"))


def test_values_take_the_type_of_the_default():
    pairs = ["n_images=64", "cutoff=150", "models=12", "seed=true"]
    assert items.typed("fig03", pairs, "small") == {
        "n_images": 64,
        "cutoff": 150,
        "models": "12",
        "seed": True,
        "profile": "small",
    }


@pytest.fixture
def made_up(tmp_path, monkeypatch, results):
    """A function that makes a notebook of these code cells, known as the item `made_up`; its results' folder."""

    def make(*cells: str):
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in ('profile = "mini"  # which', *cells)]
        notebook.cells[0].metadata["tags"] = ["parameters"]
        (tmp_path / "notebooks" / "explore").mkdir(parents=True)
        nbformat.write(notebook, tmp_path / "notebooks" / "explore" / "made_up.ipynb")
        return results / "mini" / "made_up"

    monkeypatch.setattr(record, "NOTEBOOKS", tmp_path / "notebooks")
    record.declared_parameters.cache_clear()
    yield make
    record.declared_parameters.cache_clear()


LEAVES_A_RECORD = """
import json, os, pathlib
folder = pathlib.Path(os.environ["VITREG_MAKING"])
(folder / "record.json").write_text(json.dumps({"figures": [], "measured": [1]}))
"""


def test_a_failing_notebook_leaves_the_earlier_results_and_its_failed_copy(made_up, capsys):
    """Also when a record was written before the cell that fails."""
    folder = made_up(LEAVES_A_RECORD, 'raise ValueError("layer 12 out of range\\nsecond line")')
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("of an earlier run")
    told = failing(capsys, "run", "made_up", "--quiet")
    assert told.startswith("vitreg: made_up: ValueError: layer 12 out of range (cell 3; see ")
    assert told.endswith(f"{folder / 'made_up.failed.ipynb'})\n")
    assert sorted(p.name for p in folder.iterdir()) == ["made_up.failed.ipynb", "record.json"]
    assert (folder / "record.json").read_text() == "of an earlier run"


def test_a_notebook_without_a_record_fails(made_up, capsys):
    folder = made_up("done = 1")
    assert "made_up left no record.json: its last cell must call run.claims()" in failing(
        capsys, "run", "made_up", "--quiet"
    )
    assert [p.name for p in folder.iterdir()] == ["made_up.failed.ipynb"]


def test_a_killed_kernel_is_named_with_what_it_took_and_what_helps(made_up, capsys):
    made_up("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    told = failing(capsys, "run", "made_up", "--quiet")
    assert re.search(
        r"made_up: its kernel was killed after it had taken \d+\.\d GiB.*: use JOBS=1, a smaller n_imag", told
    )
    assert re.search(r"see \S+made_up.failed.ipynb", told)


def test_a_long_folder_for_temporary_files_is_too_long_for_sockets(made_up, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = made_up(LEAVES_A_RECORD)
    execute.execute("made_up", {}, progress=False)
    assert (folder / "record.json").exists()


def test_a_notebook_that_ends_well_replaces_what_was_there(made_up):
    folder = made_up(LEAVES_A_RECORD)
    folder.mkdir(parents=True)
    for old in ("made_up.failed.ipynb", "made_up.ipynb", "record.json"):
        (folder / old).write_text("old")
    making = folder.with_name(".made_up.making")  # of a run that was killed
    making.mkdir()
    (making / "record.json").write_text("half")
    assert execute.execute("made_up", {}, progress=False) == folder / "made_up.ipynb"
    assert sorted(p.name for p in folder.iterdir()) == ["made_up.ipynb", "record.json"]
    executed = nbformat.read(folder / "made_up.ipynb", 4)
    assert [c.execution_count for c in executed.cells if c.cell_type == "code"] == [1, 2]
    assert not making.exists()


def test_results_whose_replacement_was_killed_half_way_come_back(tmp_path):
    folder, before = tmp_path / "fig03", tmp_path / ".fig03.before"
    before.mkdir()
    (before / "record.json").write_text("earlier")
    execute._recover(folder)
    assert (folder / "record.json").read_text() == "earlier"
    assert not before.exists()


def test_temporary_folders_of_dead_processes_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, used = tmp_path / f"vitreg-kernel-{dead.pid}-x", tmp_path / f"vitreg-kernel-{os.getpid()}-x"
    left.mkdir()
    used.mkdir()
    with execute.kernel_folder() as place:
        assert place.parent == (tmp_path if len(str(tmp_path)) <= execute.SOCKET_LENGTH else Path("/tmp"))
        assert left.exists() == (place.parent != tmp_path)
        assert used.exists()
    assert not place.exists()


HOLDS = """
import pathlib, sys, time
sys.path.append("workflow")
import execute
with execute.locked(pathlib.Path(sys.argv[1]), "made_up"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_second_run_of_an_item_waits_and_says_for_whom_and_a_dead_one_holds_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "mini" / "made_up"
    first = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout.readline() == "locked\n"
    entered, said = threading.Event(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)  # capfd loses what is written while it is read

    def second():
        with execute.locked(folder, "made_up"):
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    while "waiting for it" not in said.getvalue() and waiting.is_alive():
        time.sleep(0.01)
    assert f"made_up is being made by process {first.pid} since " in said.getvalue()
    assert not entered.is_set()
    first.kill()
    first.wait()
    waiting.join(60)
    assert entered.is_set()


@pytest.mark.slow
def test_plain_papermill_refuses_an_unknown_parameter_before_it_measures(tmp_path, results):
    import papermill

    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(
            str(record.notebook("fig03")),
            str(tmp_path / "out.ipynb"),
            {"n_imagess": 3},
            progress_bar=False,
            cwd=str(record.notebook("fig03").parent),  # where fig03.py is
        )
    assert error.value.ename == "UserError"
    assert "did you mean n_images" in error.value.evalue
    assert not results.exists()


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_taken_for_whole_and_the_next_goes_on(results):
    parameters = {"n_images": 4, "models": "mini-deit3-s"}
    folder = record.folder("fig03", record.check_parameters("fig03", parameters))
    command = [sys.executable, "-m", "vitreg_lib.cli", "run", "fig03", "--quiet", "--no-report"]
    command += ["-p", "n_images", "4", "-p", "models", "mini-deit3-s"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = folder.with_name(f".{folder.name}.making") / "fig03.ipynb"
    until = time.monotonic() + 120
    while time.monotonic() < until and running.poll() is None:
        if unfinished.exists() and '"execution_count": 2' in unfinished.read_text():
            break  # in the middle of its cells
        time.sleep(0.05)
    assert running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (folder / "fig03.ipynb").exists()
    with pytest.raises(UserError, match="left no record.json"):
        items.read("fig03", record.check_parameters("fig03", parameters))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "record.json").read_text())["parameters"]["n_images"] == 4
    assert not unfinished.parent.exists()


@pytest.mark.slow
def test_runs_started_at_the_same_time_do_not_disturb_each_other(results):
    command = [sys.executable, "-m", "vitreg_lib.cli", "run", "fig07", "--quiet", "--no-report", "-p", "n_images", "2"]
    command += ["-p", "models", "mini-deit3-s", "-p", "seed"]
    both = [subprocess.Popen([*command, seed], cwd=ROOT, stderr=subprocess.PIPE, text=True) for seed in "12"]
    for running in both:
        _, told = running.communicate(timeout=300)
        assert running.returncode == 0, told
    assert len(list(results.glob("mini/fig07--*/record.json"))) == 2
