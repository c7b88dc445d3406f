"""Two processes train as one does with the whole batch, and micro-batches as the batch does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from vitreg_lib.base import UserError
from vitreg_lib.train import loop, parallel, state

RECIPES = ("deit3", "clip", "dinov2", "mae")
TINY = dict(
    size="xs",
    registers=2,
    image_size=64,
    optimizer="sgd",  # Adam divides gradients that are nothing but rounding (of the bias of keys) by their own size
    learning_rate=0.1,
    weight_decay=0.05,
    clip_grad=1.0,
    steps=4,
    batch_size=8,
    warmup=1,
    save_every=2,
    eval_images=16,
    telemetry_images=4,
)
OWN = {
    "dinov2": dict(prototypes=64, global_size=64, local_size=32, local_crops=2),
    "clip": dict(text_width=16),
}


def tiny(name: str, **options):
    return loop.configure(name, **TINY | OWN.get(name, {}) | options)


def gradients(config, recipe, steps: int = 2) -> dict[str, torch.Tensor]:
    """Loss and gradients of each of some steps from the start, and the weights after them."""
    torch.manual_seed(config.seed)
    run = loop.prepare(recipe.build(config), recipe, config, "cpu")
    run.loss = parallel.distribute(run.loss, config)
    found = {}
    for step in range(steps):
        names, values = loop.gradients(run, step)
        found |= {f"{step} {name}": value for name, value in zip(names, values, strict=True) if name != "stop"}
        found |= {
            f"{step} gradient of {name}": parallel.full(p.grad).clone()
            for name, p in run.module.named_parameters()
            if p.grad is not None
        }
        loop.take_step(run, step)
    return found | {name: parallel.full(p.detach()).clone() for name, p in run.module.state_dict().items()}


def assert_same(one, other, tolerance=2e-4):
    assert one.keys() == other.keys()
    gaps = {}
    for name, value in one.items():
        scale = value.abs().max().clamp_min(1e-3)
        gaps[name] = ((value - other[name]).abs().max() / scale).item()
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] < tolerance, f"{worst} differs by {gaps[worst]:.2e} of its largest value"


def _rank(rank, world, folder, function, arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    finally:
        parallel.stop()


@pytest.fixture
def together(tmp_path):
    """A function that calls another one in two processes at once and gives what each returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitreg_lib.train.loop", "timm.models", "torch.distributed.fsdp"])

    def call(function, *arguments, world=2):
        folder = tmp_path / f"meeting-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        all = [context.Process(target=_rank, args=(r, world, folder, function, arguments)) for r in range(world)]
        for process in all:
            process.start()
        for process in all:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in all] == [0] * world
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return call


def of_recipe(name, options):
    return gradients(*tiny(name, **options))


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_are_as_one(together, name):
    """Loss, every number, every gradient and the weights after two steps."""
    alone = of_recipe(name, {})
    first, second = together(of_recipe, name, {})
    assert_same(alone, first)
    assert_same(first, second, tolerance=1e-6)
    assert any("gradient of" in key and "reg_token" in key for key in alone)


@pytest.mark.parametrize("name", ["deit3", "mae"])
@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_are_as_the_batch(name, parts):
    """Three do not divide the eight images: each counts by its size. A ratio is not the mean of its parts: left out."""
    found = (of_recipe(name, {}), of_recipe(name, {"accumulate": parts}))
    assert_same(*({key: value for key, value in one.items() if "of_mean" not in key} for one in found))


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_micro_batches_are_refused_where_images_are_compared(name, tmp_path):
    config, recipe = tiny(name, accumulate=2)
    with pytest.raises(UserError, match=f"--accumulate 2: {name} compares the images of a batch"):
        loop.train(config, recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def short_of_memory(recipe, limit: int):
    """The recipe on a device on which more than `limit` images at once do not fit."""

    def loss(module, config, step, device):
        if len(parallel.batch_range(config, step)) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return recipe.loss(module, config, step, device)

    names = ("build", "backbone", "evaluate")
    return SimpleNamespace(
        loss=loss, **{name: getattr(recipe, name) for name in names}, SEPARABLE=getattr(recipe, "SEPARABLE", True)
    )


def test_out_of_memory_halves_the_batch_and_the_step_is_the_same(tmp_path):
    config, recipe = tiny("deit3")
    loop.train(config, recipe, tmp_path / "large", progress=False)
    with pytest.warns(UserWarning, match="out of memory at step 0: going on with [24] micro-batches") as told:
        loop.train(config, short_of_memory(recipe, 2), tmp_path / "small", progress=False)
    assert len([w for w in told if "out of memory" in str(w.message)]) == 2  # once halved, it stays
    large, small = (load_file(tmp_path / name / "state.safetensors") for name in ("large", "small"))
    assert_same(large, small)
    run = loop.prepare(recipe.build(config), recipe, config, "cpu")
    state.load(tmp_path / "small", run)
    assert (run.step, run.accumulate) == (4, 4)  # a resumed run does not have to find out again


def short_on_one_rank(folder, limit):
    """Train where one process alone has less memory; how many micro-batches a step had in the end."""
    config, recipe = tiny("deit3")
    loop.train(config, short_of_memory(recipe, limit) if parallel.rank() else recipe, folder, progress=False)
    run = loop.prepare(recipe.build(config), recipe, config, "cpu")
    state.load(folder, run)
    return {"accumulate": torch.tensor(run.accumulate)}


def test_all_processes_halve_where_one_is_out_of_memory(together, tmp_path):
    """Before the first step, without which the others would wait for ever; the training is that of one process."""
    first, second = together(short_on_one_rank, tmp_path / "two", 2)
    assert first["accumulate"] == second["accumulate"] == 2  # of a share of four images
    loop.train(*tiny("deit3"), tmp_path / "one", progress=False)
    assert_same(*(load_file(tmp_path / name / "state.safetensors") for name in ("one", "two")))


def test_out_of_memory_where_nothing_can_be_halved_is_told(tmp_path):
    config, recipe = tiny("deit3")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="out of memory at step 0 with one image"):
        loop.train(config, short_of_memory(recipe, 0), tmp_path / "one", progress=False)
    config, recipe = tiny("clip")
    with pytest.raises(UserError, match="clip needs its whole batch at once"):
        loop.train(config, short_of_memory(recipe, 2), tmp_path / "clip", progress=False)


def trained(name, folder, options):
    """Train under whatever is started; what is returned and, of this rank, what the loop noted."""
    config, recipe = tiny(name, **options)
    steps = []
    result = loop.train(config, recipe, folder, progress=False, on_step=lambda step, loss: steps.append(step))
    return {"steps": torch.tensor(steps), "finished": torch.tensor(bool(result))}


def stopped(name, folder, options, after):
    """The same, stopped on one rank alone."""
    config, recipe = tiny(name, **options)

    def stop(step, loss):
        if step == after - 1 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        loop.train(config, recipe, folder, progress=False, on_step=stop)
    except KeyboardInterrupt as told:
        return {"told": torch.tensor(list(str(told).encode()))}
    return {}


def test_only_the_first_process_writes_and_a_stopped_one_stops_all(together, tmp_path):
    """A signal that reaches one process while a step ends stops both after the next."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    first, second = together(stopped, "deit3", run, {}, 2)
    assert bytes(first["told"]).startswith(b"stopped after step 3 of 4; go on with: vitreg train --resume")
    assert first["told"].equal(second["told"])
    first, second = together(trained, "deit3", run, {})
    assert first["steps"].tolist() == [3]
    assert (bool(first["finished"]), bool(second["finished"])) == (True, False)
    loop.train(*tiny("deit3"), whole, progress=False)
    assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()} | {"previous.safetensors"}
    assert_same(*(load_file(folder / "state.safetensors") for folder in (run, whole)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("deit3", {"ema": 0.5, "optimizer": "lamb"}), ("dinov2", {})])
def test_a_model_shared_out_over_processes_resumes_to_the_bit(together, tmp_path, name, options):
    """FSDP2: as without it, and stopped and resumed as not stopped. Its state is a plain one."""
    options = {"fsdp": True} | options
    straight, halves, alone = (tmp_path / name for name in ("straight", "halves", "alone"))
    together(trained, name, straight, options)
    together(stopped, name, halves, options, 2)
    first, _ = together(trained, name, halves, options)
    assert first["steps"].tolist() == [3]
    for file in ("state.safetensors", "model.safetensors"):
        one, other = load_file(straight / file), load_file(halves / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    config, recipe = tiny(name, **options | {"fsdp": False})
    loop.train(config, recipe, alone, progress=False)
    weights = [load_file(folder / "model.safetensors") for folder in (straight, alone)]
    assert_same(*({k: v.float() for k, v in found.items()} for found in weights), tolerance=2e-3)  # half precision
    run = loop.prepare(recipe.build(config), recipe, config, "cpu")
    state.load(straight, run)
    assert run.step == 4


def test_sharing_a_model_out_needs_processes(tmp_path):
    config, recipe = tiny("deit3", fsdp=True)
    with pytest.raises(UserError, match="start it with torchrun"):
        loop.train(config, recipe, tmp_path, progress=False)
