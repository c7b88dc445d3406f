"""Training goes on after any interruption as if there had been none, and what it leaves is whole."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import deit3
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vitreg_lib import base
from vitreg_lib.base import UserError
from vitreg_lib.data import scenes
from vitreg_lib.model import names, weights, zoo
from vitreg_lib.model.weights import file_sha256
from vitreg_lib.train import command, loop, telemetry
from vitreg_lib.train import images as train_images
from workflow import ship

TINY, _ = loop.configure(
    "deit3",
    size="xs",
    registers=1,
    image_size=64,
    steps=10,
    batch_size=8,
    warmup=2,
    save_every=4,
    eval_images=16,
    telemetry_images=4,
    drop_path=0.2,  # random, so that the random state must be right too
)


def train(folder, config=TINY, recipe=deit3, **options):
    return loop.train(config, recipe, folder, "cpu", progress=False, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder)
    return folder


def test_a_finished_run_has_nothing_left_to_do(straight):
    before = load_file(straight / "model.safetensors")
    result = train(straight, on_step=lambda step, loss: pytest.fail("a step was taken"))
    assert result["steps"] == 10
    assert result["images"] == 80
    after = load_file(straight / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not list(straight.glob(".*.tmp"))


def test_the_loss_falls(tmp_path):
    config = replace(TINY, steps=40, registers=0, drop_path=0.0, save_every=1000, learning_rate=5e-3, optimizer="adamw")
    losses = []
    train(tmp_path, config, on_step=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(24 * math.log(2), rel=0.15)  # undecided about 24 labels
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


def test_the_folder_of_another_run_is_refused(straight):
    with pytest.raises(UserError, match="holds a run with another learning_rate, seed; choose another folder"):
        train(straight, replace(TINY, seed=1, learning_rate=1e-3))


def failing_at(step):
    """The recipe, with a loss that is no number at one step."""

    def loss(module, config, now, device):
        value, numbers = deit3.loss(module, config, now, device)
        return (value * float("nan") if now == step else value), numbers

    names = ("build", "backbone", "evaluate")
    return SimpleNamespace(loss=loss, **{name: getattr(deit3, name) for name in names})


def test_a_loss_that_is_no_number_keeps_the_last_good_state(straight, tmp_path, assert_same_run):
    with pytest.raises(FloatingPointError, match="loss is nan at step 7; the last good state is kept"):
        train(tmp_path, recipe=failing_at(7))
    assert all(v.isfinite().all() for v in load_file(tmp_path / "state.safetensors").values())
    train(tmp_path)
    assert_same_run(straight, tmp_path)


def test_tensors_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    weights.write_safetensors(path, {"x": torch.ones(3)}, {"step": "1"})
    before = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(UserError, match="state.safetensors cannot be written: disk full"):
        weights.write_safetensors(path, {"x": torch.zeros(3)}, {"step": "2"})
    assert path.read_bytes() == before


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    config, _ = loop.configure("deit3", steps=1000, warmup=100, learning_rate=1.0)
    rates = [loop.learning_rate(config, step) for step in range(1001)]
    assert rates[0] == 0.01
    assert rates[49] == 0.5
    assert rates[99] == rates[100] == 1
    assert rates[550] == pytest.approx(0.505)
    assert rates[1000] == pytest.approx(0.01)
    assert all(later <= earlier for earlier, later in zip(rates[100:], rates[101:], strict=False))


def test_seeds_make_different_runs(straight, tmp_path):
    train(tmp_path, replace(TINY, seed=5, steps=2))
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(straight / "model.safetensors")
    assert not torch.equal(ours["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])


@pytest.mark.parametrize("total", [1, 2, 10, 1800, 100_000])
def test_telemetry_sees_the_beginning_and_what_begins_late(total):
    steps = telemetry.measured_steps(total)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, total)
    assert len(steps) <= 62
    for earlier, later in zip(steps[1:], steps[2:], strict=False):
        assert later <= max(earlier + 1, 1.36 * earlier + 1)
        assert later - earlier <= total / 20 + 1


def test_telemetry_has_a_row_a_step_and_layer(straight):
    table = pd.read_parquet(straight / "telemetry.parquet")
    levels = [f"q{q:g}" for q in telemetry.QUANTILES]
    assert list(table.columns) == ["step", "layer", "outlier_share", *levels, "cls_norm", "register_norm"]
    assert table[["step", "layer"]].values.tolist() == [[s, l] for s in telemetry.measured_steps(10) for l in range(4)]
    assert (table[levels].diff(axis=1).iloc[:, 1:] >= 0).all().all()
    assert table.notna().all().all()


def test_telemetry_measures_what_capture_does(straight):
    model = zoo.load(f"file:{straight / 'model.safetensors'}", "cpu").module
    images = train_images.telemetry_images(TINY)
    table = telemetry.measure(model, images, 7)
    last = table.iloc[-1]
    with torch.no_grad():
        norms = []
        handle = model.blocks[-1].register_forward_hook(lambda m, i, out: norms.append(out.norm(dim=-1)))
        model(images)
        handle.remove()
    patches = norms[0][:, 2:].flatten()
    assert last["q0.5"] == pytest.approx(patches.quantile(0.5).item(), rel=1e-5)
    assert last["q1"] == pytest.approx(patches.max().item(), rel=1e-5)
    assert last["cls_norm"] == pytest.approx(norms[0][:, 0].mean().item(), rel=1e-5)
    assert last["register_norm"] == pytest.approx(norms[0][:, 1].mean().item(), rel=1e-5)


def test_evaluation_is_on_scenes_that_are_never_trained_on():
    config, _ = loop.configure("deit3")
    assert scenes.HELD_OUT > 1000 * config.steps * config.batch_size


@pytest.fixture
def own_zoo(tmp_path, monkeypatch):
    """A copy of the zoo's files that a test may ship into."""
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    (tmp_path / "data" / "models.yaml").write_text((base.DATA / "models.yaml").read_text())
    for module in (ship, names):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    for module in (ship, names, zoo):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "data" / "checkpoints")
    zoo.entries.cache_clear()
    yield tmp_path / "data"
    monkeypatch.undo()
    zoo.entries.cache_clear()


def test_a_shipped_run_loads_by_its_name(straight, own_zoo):
    before = zoo.entries()
    path = ship.ship(straight, "mini-made-here", "made by a test")
    zoo.entries.cache_clear()
    entry = zoo.entries()["mini-made-here"]
    assert {k: v for k, v in zoo.entries().items() if k != "mini-made-here"} == before
    assert entry["about"] == "made by a test"
    assert entry["sha256"] == file_sha256(path)
    assert (entry["steps"], entry["images"]) == (10, 80)
    assert entry["command"].startswith("vitreg train deit3 --size xs --registers 1 --image-size 64 --drop-path 0.2")
    loaded = zoo.load("mini-made-here", "cpu")
    weights = load_file(straight / "model.safetensors")
    assert all(torch.equal(v.half(), weights[k]) for k, v in loaded.module.state_dict().items())
    assert loaded.anatomy.num_registers == 1
    assert loaded.input_size == 64


def test_shipping_again_replaces_the_entry_alone(straight, own_zoo):
    ship.ship(straight, "mini-deit3", "another one")
    text = (own_zoo / "models.yaml").read_text()
    entries = yaml.safe_load(text)
    before = zoo.entries()
    assert entries.keys() == before.keys()
    assert entries["mini-deit3"]["about"] == "another one"
    assert all(entries[name] == before[name] for name in before if name != "mini-deit3")
    assert text.startswith("# Names of models.")


def test_an_unfinished_run_is_not_shipped(own_zoo, tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        ship.ship(tmp_path, "mini-half", "")
    assert not list((own_zoo / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["deit3", "clip", "dinov2", "mae"])
def test_the_command_of_a_run_makes_the_same_run(name, monkeypatch):
    from vitreg_lib import cli

    given = {}
    monkeypatch.setattr(command, "train", lambda recipe, **options: given.update(options, recipe=recipe))
    config, _ = loop.configure(name, size="xs", registers=1, steps=10, drop_path=0.2, telemetry_images=4)
    if name == "dinov2":
        config = replace(config, antialias=False)
    told = ship.command(asdict(config))
    assert told.startswith(f"vitreg train {name} --size xs --registers 1 --drop-path 0.2 --steps 10")
    assert ("--no-antialias" in told) == (name == "dinov2")
    assert cli.main(told.split()[1:]) == 0
    assert given["recipe"] == name
    options = {k: v for k, v in given.items() if k in asdict(config) and v is not None}
    assert loop.configure(options.pop("recipe"), **options)[0] == config
