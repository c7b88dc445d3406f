"""Training on a GPU, where there is one: a step as a CUDA graph, scenes, stopping, a loss that is not finite."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from vitreg_lib.data import scenes
from vitreg_lib.train import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SMALL = dict(size="xs", image_size=64, steps=20, batch_size=32, warmup=5, eval_images=64, telemetry_images=8)


def losses(folder, recipe="deit3", device="cuda", **options):
    config, module = loop.configure(recipe, **SMALL | options)
    loop.train(config, module, folder, device, progress=False)
    return pd.read_csv(folder / "log.csv").loss


@pytest.mark.parametrize("recipe", ["deit3", "mae"])
def test_a_graph_trains_as_single_kernels_and_as_a_cpu_in_float32(recipe, tmp_path, monkeypatch):
    captured = []
    capture = loop.capture
    monkeypatch.setattr(loop, "capture", lambda *args: captured.append(args) or capture(*args))
    by_graph = losses(tmp_path / "graph", recipe, drop_path=0.2)
    assert len(captured) == 1
    monkeypatch.setattr(loop.recipes.load(recipe), "GRAPH", False)
    by_kernels = losses(tmp_path / "kernels", recipe, drop_path=0.2)
    assert len(captured) == 1
    torch.testing.assert_close(*(torch.tensor(log.values) for log in (by_graph, by_kernels)), rtol=1e-4, atol=1e-4)
    on_cpu, on_gpu = (losses(tmp_path / device, recipe, device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(*(torch.tensor(log.values) for log in (on_gpu, on_cpu)), rtol=1e-2, atol=1e-2)


def test_a_stopped_run_goes_on_and_its_log_is_whole(tmp_path):
    def stop(step, loss):
        if step == 11:
            raise KeyboardInterrupt

    config, module = loop.configure("deit3", **SMALL, save_every=7)
    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        loop.train(config, module, tmp_path / "stopped", "cuda", progress=False, on_step=stop)
    whole, stopped = losses(tmp_path / "whole", save_every=7), losses(tmp_path / "stopped", save_every=7)
    torch.testing.assert_close(*(torch.tensor(log.values) for log in (stopped, whole)), rtol=1e-3, atol=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match="last good state"):
        losses(tmp_path, optimizer="adamw", learning_rate=1e30, clip_grad=0.0)
    assert not (tmp_path / "state.safetensors").exists()


def test_what_follows_a_training_is_computed_in_full_precision(tmp_path):
    losses(tmp_path)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("compiled", [False, True])
def test_scenes_are_those_of_a_cpu(compiled):
    one = scenes.render(range(64), 96)
    other = scenes.render(torch.arange(64), 96, device="cuda", compiled=compiled)
    assert torch.equal(one.instances, other.instances.cpu()) and torch.equal(one.boxes, other.boxes.cpu())
    torch.testing.assert_close(one.pixels, other.pixels.cpu(), rtol=0, atol=1e-4)
