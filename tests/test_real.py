"""The measurement on real weights, where nobody planted anything: two models with artifacts, one without."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fig15
import items
import pytest
import torch

from vitreg_lib.base import ROOT
from vitreg_lib.data import images
from vitreg_lib.measure import outliers
from vitreg_lib.model import zoo
from vitreg_lib.record import run as record
from vitreg_lib.record import verdicts


def measured(name: str):
    """(output norms, norms at all layers, capture) of 16 photos."""
    model = zoo.load(name, "cpu")
    pictures = images.load("imagenet", model, 16)
    assert len(pictures) == 16
    seen = model.capture(pictures)
    return seen.patch_norms[:, -1], seen.patch_norms, seen


def test_vit_ti_has_artifacts_in_the_four_corners_from_block_7_on(real):
    output, norms, seen = measured("vit-ti")
    cut = outliers.cutoff(output)
    is_outlier = output > cut
    assert is_outlier.float().mean().item() == pytest.approx(0.0203, abs=0.002)
    assert outliers.onset_of(norms, is_outlier, cut, 11) == 7
    assert output.median().item() == pytest.approx(19, abs=1)
    assert output[is_outlier].mean().item() == pytest.approx(470, rel=0.05)
    assert 500 < output.max() < 600
    assert seen.grid == (14, 14)
    corners = torch.zeros(14, 14, dtype=torch.bool)
    corners[::13, ::13] = True
    by_place = is_outlier.float().mean(0)
    assert (by_place[corners.flatten()] > 0.9).all()
    assert (by_place[~corners.flatten()] < 0.1).all()


def test_dinov2_s_is_clean(real):
    output, _, _ = measured("dinov2-s")
    assert not (output > outliers.cutoff(output)).any()
    assert 37 < output.median() < 50
    assert output.max() < 60


def test_after_the_final_norm_little_is_left_to_see(real):
    model = zoo.load("vit-ti", "cpu")
    seen = model.capture(images.load("imagenet", model, 4), ("norms", "final"))
    before = seen.patch_norms[:, -1].max() / seen.patch_norms[:, -1].median()
    final = seen.patches(seen.final).norm(dim=-1)
    after = final.max() / final.median()
    assert before > 20
    assert after < 3


def test_each_model_is_prepared_as_its_own_config_says(real):
    vit, deit, dino = (zoo.load(name, "cpu") for name in ("vit-ti", "deit-ti", "dinov2-s"))
    assert (vit.mean, vit.crop) == ((0.5, 0.5, 0.5), 0.9)
    assert deit.mean == dino.mean == (0.485, 0.456, 0.406)
    assert (vit.input_size, deit.input_size, dino.input_size) == (224, 224, 224)
    assert vit.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_published_registers_are_read_as_what_they_are(real):
    norms = fig15.published_registers()
    assert list(norms) == ["DINOv2-small", "DINOv2-base", "DINOv2-large", "DINOv2-giant"]
    last = {name: values[-1].round().int().tolist() for name, values in norms.items()}
    assert last["DINOv2-small"] == [14, 118, 18, 15]
    assert last["DINOv2-giant"] == [327, 161, 1362, 98]


@pytest.mark.slow
def test_fig03_in_profile_small_says_what_is_known_of_them(real, results):
    command = [sys.executable, "-m", "vitreg_lib.cli", "run", "fig03", "--profile", "small", "-p", "n_images", "16"]
    done = subprocess.run([*command, "--quiet"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    parameters = record.check_parameters("fig03", {"profile": "small", "n_images": 16})
    found = items.read("fig03", parameters)
    assert json.dumps(found)
    values = {(m["model"].split(".")[0], m["name"]): m["value"] for m in found["measured"]}
    vit, deit, dino = "vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_dinov2"
    assert values[vit, "outlier_share"] == pytest.approx(0.0203, abs=0.002)
    assert values[vit, "onset_layer"] == 7
    assert values[dino, "outlier_share"] == 0 and values[dino, "onset_layer"] is None
    assert 0.03 < values[deit, "outlier_share"] < 0.06
    assert {m["role"] for m in found["models"] if m["name"].split(".")[0] in (vit, deit, dino)} == {"trained"}
    assert {c["verdict"] for c in found["claims"]} <= set(verdicts.VERDICTS)
    assert "not reachable here" not in done.stdout
