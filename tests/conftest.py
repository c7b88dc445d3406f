"""Shared fixtures: small random models, the real small models where they are, folders that a test may write to.

No test uses a network: the hub's client is offline, and its cache is an empty folder of this session.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_HUB = tempfile.TemporaryDirectory(prefix="vitreg-test-hub-")
os.environ["HF_HOME"] = _HUB.name  # read when the hub's client is imported: before anything else is
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


import matplotlib  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from vitreg_lib.base import ROOT  # noqa: E402

matplotlib.use("Agg")  # not by the environment: kernels of notebooks would inherit it and show nothing

REAL = ROOT.parent / "shared" / "real"

settings.register_profile("vitreg", deadline=None, derandomize=True, max_examples=12)
settings.load_profile("vitreg")


@pytest.fixture
def real(monkeypatch) -> Path:
    """The folder of real small models and photos, which VITREG_MODELS then names; skips where it is absent."""
    if not REAL.is_dir():
        pytest.skip("needs the real small models in ../shared/real, which are not here")
    monkeypatch.setenv("VITREG_MODELS", str(REAL))
    monkeypatch.delenv("VITREG_DATA", raising=False)
    return REAL


@pytest.fixture
def no_models(monkeypatch) -> None:
    """Neither VITREG_MODELS nor VITREG_DATA, nor what lies in the hub's cache or runs/twins of the tests' caller."""
    monkeypatch.delenv("VITREG_MODELS", raising=False)
    monkeypatch.delenv("VITREG_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("vitreg_lib.model.names.TWINS", Path("/nowhere"))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty folder for results."""
    monkeypatch.setenv("VITREG_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture(scope="session")
def planted():
    """The shipped planted control."""
    from vitreg_lib.model import zoo

    return zoo.load("planted", "cpu")


@pytest.fixture
def tiny():
    """A function that builds a small timm model with random weights: tiny(name="vit_tiny_patch16_224", **options)."""
    import timm
    import torch

    def build(name: str = "vit_tiny_patch16_224", seed: int = 0, **options):
        torch.manual_seed(seed)
        defaults = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
        return timm.create_model(name, **defaults | options).eval()

    return build


@pytest.fixture(scope="session")
def assert_same_run():
    """A function: two folders hold the same run, weights, optimiser, telemetry and log, to the bit."""
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    def compare(one, other):
        for name in ("model.safetensors", "state.safetensors"):
            first, second = load_file(one / name), load_file(other / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[k], second[k]) for k in first), name
        first, second = (pd.read_parquet(folder / "telemetry.parquet") for folder in (one, other))
        pd.testing.assert_frame_equal(first, second)
        first, second = (pd.read_csv(folder / "log.csv") for folder in (one, other))
        pd.testing.assert_frame_equal(first, second)

    return compare
