"""A training that was killed, stopped, or whose files were harmed goes on as if nothing had been, for every recipe."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitreg_lib import cli
from vitreg_lib.base import UserError
from vitreg_lib.model import weights
from vitreg_lib.train import loop, state

RECIPES = ("deit3", "clip", "dinov2", "mae", "registers")
EXTRA = {
    "registers": dict(model="random:mini-deit3-xxs", cutoff=1.0, teacher="shift"),  # views are drawn anew
    "dinov2": dict(prototypes=32),
    "clip": dict(text_width=16),
}
SMALL = dict(
    size="xxs",
    registers=1,
    image_size=64,
    steps=7,
    batch_size=8,
    warmup=2,
    save_every=3,
    eval_images=16,
    telemetry_images=4,
    drop_path=0.2,  # random, so that the random state must be right too
)


def train(folder, name="deit3", on_step=None, **options):
    torch.set_num_threads(1)  # as in the process that is killed: sums of other threads differ in the last bit
    return loop.train(
        *loop.configure(name, **SMALL | EXTRA.get(name, {}) | options), folder, progress=False, on_step=on_step
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A function: the folder of a recipe's run that nothing interrupted."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            train(made[name], name)
        return made[name]

    return run


def killed(folder, name, where):
    """Train, and die by SIGKILL after a step, or where a file would take its name for the second time."""
    warnings.simplefilter("ignore")
    rename, written = os.replace, []

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source, target):
        written.append(os.path.basename(target))
        if written[-1] == where and written.count(where) == 2:
            kill()
        rename(source, target)

    os.replace = replacing
    train(folder, name, on_step=lambda step, loss: kill() if where == f"step {step}" else None)


POINTS = [("deit3", where) for where in ("step 1", "step 4", "log.csv", "telemetry.parquet")]
POINTS += [(name, where) for name in RECIPES for where in ("step 3", "state.safetensors")]


@pytest.mark.parametrize(("name", "where"), POINTS)
def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path, name, where, assert_same_run):
    """Killed after a step, before and after the first state, and in the middle of saving the second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitreg_lib.train.loop", "timm.models", "torch.distributed.fsdp"])
    process = context.Process(target=killed, args=(tmp_path, name, where))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    kept = "previous" if where == "state.safetensors" else "state"  # the new one was about to take its name
    assert (tmp_path / f"{kept}.safetensors").exists() == (where != "step 1")
    steps = []
    train(tmp_path, name, on_step=lambda step, loss: steps.append(step))
    assert steps == list(range(0 if where == "step 1" else 3, 7))
    assert_same_run(straight(name), tmp_path)


def half_way(folder, name="deit3", step=6):
    """A run that was killed after its state of step 6, with that of step 3 before it."""

    def stop(now, loss):
        if now == step:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(folder, name, on_step=stop)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """One bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, empty, flip])
def test_a_corrupt_state_is_named_and_the_one_before_it_taken(straight, tmp_path, harm, assert_same_run):
    harm(half_way(tmp_path) / "state.safetensors")
    steps = []
    with pytest.warns(UserWarning, match=r"state.safetensors cannot be read .*: going on from .* of step 3"):
        train(tmp_path, on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert_same_run(straight("deit3"), tmp_path)


def test_where_no_state_can_be_read_nothing_is_begun(tmp_path):
    half_way(tmp_path)
    for name in ("state", "previous"):
        flip(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="state.safetensors cannot be read .*; .*previous.safetensors cannot be read"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("config.json", "is not the configuration of a run"),
        ("log.csv", "cannot be read"),
        ("telemetry.parquet", "cannot"),
    ],
)
def test_other_corrupt_files_are_named(tmp_path, file, told):
    empty(half_way(tmp_path) / file)
    with pytest.raises(UserError, match=f"{file}.*{told}"):
        train(tmp_path)


def test_a_state_of_another_model_is_refused(tmp_path, straight):
    half_way(tmp_path)
    (tmp_path / "state.safetensors").write_bytes((straight("mae") / "state.safetensors").read_bytes())
    with pytest.raises(UserError, match="the saved state is of another model"):
        train(tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "write_bytes"])
def test_a_full_disk_keeps_the_last_good_state(straight, tmp_path, monkeypatch, failing, assert_same_run):
    """Simulated: the second state is half written when there is no room left."""
    writer = weights if failing == "save_file" else Path
    calls, real = [], getattr(writer, failing)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if failing == "save_file" else 3):  # config.json, the first log, this one
            [path] = [a for a in arguments if isinstance(a, Path)]
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, failing, full)
        with pytest.raises(UserError, match=r"state of step 6 could not be written \(.*No space left.*Make room, then"):
            train(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    steps = []
    train(tmp_path, on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert_same_run(straight("deit3"), tmp_path)


def press_stop(step, loss):
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", [press_stop, signal.SIGINT, signal.SIGTERM])
def test_the_stop_button_lets_the_step_end_and_says_how_to_go_on(straight, tmp_path, way, assert_same_run):
    """In the picture that `on_step` draws, or anywhere else."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def send(step, loss):
        os.kill(os.getpid(), way)

    with pytest.raises(KeyboardInterrupt) as told:
        train(tmp_path, on_step=way if way is press_stop else send)
    assert str(told.value) == f"stopped after step 1 of 7; go on with: vitreg train --resume {tmp_path}"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    steps = []
    train(tmp_path, on_step=lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_run(straight("deit3"), tmp_path)


def test_resuming_by_the_command(straight, tmp_path, capsys, monkeypatch, assert_same_run):
    """By the run's own configuration; only how it is computed may be told anew."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=press_stop)
    assert cli.main(["train", "--resume", str(tmp_path), "--save-every", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert json.loads(told[: told.rindex("}") + 1])["steps"] == 7
    assert told.endswith(f"weights: {tmp_path / 'model.safetensors'}\n")
    assert_same_run(straight("deit3"), tmp_path)
    assert state.read_config(tmp_path) == replace(state.read_config(straight("deit3")), save_every=2)
    monkeypatch.setattr(loop, "train", lambda *_: press_stop(0, 0))
    assert cli.main(["train", "--resume", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "vitreg: stopped; what was finished is kept\n"
