"""Compiled blocks, optimisers, and `vitreg train` under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys

import clip
import deit3
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from vitreg_lib.base import ROOT, UserError
from vitreg_lib.train import loop, parallel

SMALL = dict(size="xxs", image_size=64, steps=4, batch_size=8, warmup=1, eval_images=16, telemetry_images=4)


@pytest.fixture(autouse=True)
def asked_anew():
    """Whether this machine compiles is kept for the process: no test may rest on the answer of another."""
    parallel.compiles.cache_clear()
    yield
    parallel.compiles.cache_clear()


def train(folder, name="deit3", **options):
    loop.train(*loop.configure(name, **SMALL | options), folder, progress=False)
    return load_file(folder / "model.safetensors")


def test_where_compiling_fails_training_goes_on_without(tmp_path, monkeypatch):
    plain = train(tmp_path / "plain")

    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("Failed to find a C++ compiler\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile does not work here, going on without: Failed to find a C"):
        compiled = train(tmp_path / "compiled", compile=True)
    assert all(torch.equal(plain[k], compiled[k]) for k in plain)


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones(tmp_path):
    train(tmp_path / "plain")
    train(tmp_path / "compiled", compile=True)
    logs = [pd.read_csv(tmp_path / name / "log.csv").loss for name in ("plain", "compiled")]
    torch.testing.assert_close(*(torch.tensor(log.values) for log in logs), rtol=1e-3, atol=1e-3)
    norms = [pd.read_parquet(tmp_path / name / "telemetry.parquet") for name in ("plain", "compiled")]
    pd.testing.assert_frame_equal(*norms, rtol=1e-2)


def test_blocks_of_all_towers_are_found():
    module = clip.build(loop.configure("clip", size="xs", text_layers=3)[0])
    found = parallel.blocks(module)
    assert found == [*module.visual.blocks, *module.text.transformer.resblocks]


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "sgd"])
def test_optimisers_of_timm(name):
    config = loop.configure("deit3", size="xxs", optimizer=name)[0]
    made = parallel.optimizer(deit3.build(config), config, "cpu")
    decayed = {group["weight_decay"] for group in made.param_groups}
    assert decayed == {0.0, config.weight_decay}


def test_an_unknown_optimiser_is_told():
    config = loop.configure("deit3", size="xxs", optimizer="adamv")[0]
    with pytest.raises(UserError, match="unknown optimiser 'adamv'"):
        parallel.optimizer(deit3.build(config), config, "cpu")


@pytest.mark.slow
def test_torchrun_trains_together_and_tells_the_result_once(tmp_path):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "vitreg_lib.cli", "train", "deit3", *options, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights: ") == 1
    told = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    assert json.loads(told)["images"] == 32
    train(tmp_path / "one")
    logs = [pd.read_csv(tmp_path / name / "log.csv").loss for name in ("one", "two")]
    torch.testing.assert_close(*(torch.tensor(log.values) for log in logs), rtol=1e-3, atol=1e-3)
