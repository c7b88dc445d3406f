"""The feature cache: computed once, traced by its fingerprint, and never used when it is not whole."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import feature_cache as features
import pytest
import tables_tasks
import tables_tokens
import torch

from vitreg_lib.base import ROOT, remembered
from vitreg_lib.data import images
from vitreg_lib.model import mini
from vitreg_lib.model.model import Model
from vitreg_lib.probes import local


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = mini.build("xxs", registers=2).eval().requires_grad_(False)
    return Model("random-mini", module, "1" * 64, "random control", input_size=96, label="random-mini")


@pytest.fixture(scope="module")
def source():
    return tables_tasks.load("scenes", 40, 2)[0].train


def counting(source):
    """The source, and a list that grows by the size of each batch that is made anew."""
    seen = []

    def pixels(batch, model):
        made = source.pixels(batch, model)
        seen.append(len(made))
        return made

    return dataclasses.replace(source, pixels=pixels), seen


def test_features_are_what_capture_gives(model, source):
    found = tables_tokens.classification_tokens(model, source, cutoff=0.0, draws=2)
    x = model.normalise(source.pixels(source.rows[:], model))
    seen = model.capture(x, ("norms", "final"), layers=[model.anatomy.depth - 1])
    same = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.column("cls"), seen.final[:, 0], **same)
    torch.testing.assert_close(found.column("registers"), seen.final[:, 1:3], **same)
    torch.testing.assert_close(found.column("mean"), seen.final[:, 3:].mean(1), **same)
    torch.testing.assert_close(found.column("norms"), seen.patch_norms[:, 0], **same)
    rows = torch.tensor([7, 3])
    assert torch.equal(found.column("cls", rows), found.column("cls")[rows])
    assert found.about["model_sha256"] == model.sha256 and found.about["images_sha256"] == source.digest


def test_drawn_tokens_belong_to_their_group_and_do_not_hang_on_the_batch(model, source):
    x = model.normalise(source.pixels(source.rows[:], model))
    seen = model.capture(x, ("norms", "final"), layers=[model.anatomy.depth - 1])
    norms, patches = seen.patch_norms[:, 0], seen.patches(seen.final)
    cut = float(norms.quantile(0.97))
    found = tables_tokens.classification_tokens(model, source, cut, draws=4, seed=1)
    mask = norms > cut
    assert torch.equal(found.column("is_outlier").bool(), mask)
    partners = local.matched_normal(mask.unflatten(1, seen.grid)).flatten(1)
    for name, members in (("normal", ~mask), ("outlier", mask), ("matched", partners)):
        assert torch.equal(found.column(f"has_{name}").bool(), members.any(1))
        drawn = found.column(name)
        for i in members.any(1).nonzero()[:, 0].tolist():
            distance = (drawn[i][:, None] - patches[i][members[i]]).abs().amax(2).amin(1)
            assert distance.max() < 1e-5, name
    assert len(found.column("normal")[0].unique(dim=0)) > 1  # draws differ
    part = dataclasses.replace(source, rows=source.rows.select(range(10)), digest="part")
    some = tables_tokens.classification_tokens(model, part, cut, draws=4, seed=1)
    torch.testing.assert_close(some.column("normal"), found.column("normal")[:10], atol=1e-5, rtol=1e-5)


def test_drawing_is_uniform_over_the_members():
    members = torch.tensor([[False, True, True, False, True]]).expand(3000, -1)
    u = torch.rand(3000, 1, generator=torch.Generator().manual_seed(0)).double()
    count = tables_tokens._drawn(members, u).flatten().bincount(minlength=5)
    assert count[[0, 3]].sum() == 0 and count[[1, 2, 4]].min() > 900
    assert tables_tokens._drawn(torch.zeros(2, 5, dtype=torch.bool), torch.full((2, 1), 0.9).double()).max() <= 4


def test_borrowed_places_are_those_of_the_other_model(model, source):
    owner = tables_tokens.classification_tokens(model, source, cutoff=0.0)
    own = dataclasses.replace(owner)
    other = dataclasses.replace(model, name="other", sha256="2" * 64)
    found = tables_tokens.classification_tokens(other, source, float("inf"), places=own)
    assert (
        torch.equal(found.column("is_outlier"), owner.column("is_outlier")) and found.about["places"] == own.fingerprint
    )
    short = dataclasses.replace(source, rows=source.rows.select(range(5)))
    with pytest.raises(ValueError, match="places of 40 images do not fit 5"):
        tables_tokens.classification_tokens(other, short, 1.0, places=own)


def test_the_same_is_computed_once_and_anything_else_anew(model, source):
    source, made = counting(source)
    first = tables_tokens.classification_tokens(model, source, 1.0)
    count = sum(made)
    again = tables_tokens.classification_tokens(model, source, 1.0)
    assert sum(made) == count == 40 and again.fingerprint == first.fingerprint
    assert torch.equal(again.column("cls"), first.column("cls"))
    others = [
        tables_tokens.classification_tokens(dataclasses.replace(model, sha256="3" * 64), source, 1.0),
        tables_tokens.classification_tokens(dataclasses.replace(model, crop=0.9), source, 1.0),
        tables_tokens.classification_tokens(model, dataclasses.replace(source, digest="other"), 1.0),
        tables_tokens.classification_tokens(model, source, 2.0),
        tables_tokens.classification_tokens(model, source, 1.0, seed=1),
    ]
    assert len({f.fingerprint for f in [first, *others]}) == 6 and sum(made) == 6 * 40


@pytest.mark.parametrize("damage", ["truncated", "no description", "half a description", "flipped bits"])
def test_a_cache_that_is_not_whole_is_computed_anew(model, source, cache, damage):
    source, made = counting(source)
    whole = tables_tokens.classification_tokens(model, source, 1.0).column("cls")
    path, beside = next(cache.glob("*.arrow")), next(cache.glob("*.json"))
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bits":
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(255 - b for b in content[half : half + 8]) + content[half + 8 :])
    elif damage == "no description":
        beside.unlink()
    else:
        beside.write_text(beside.read_text()[:50])
    made.clear()
    assert torch.equal(tables_tokens.classification_tokens(model, source, 1.0).column("cls"), whole)
    assert sum(made) == 40
    made.clear()
    tables_tokens.classification_tokens(model, source, 1.0)
    assert not made


KILLED = """
import time, torch
import feature_cache as features
from datasets import Dataset

def extract(batch, rows):
    print("batch", flush=True)
    if rows[0] >= 64:
        time.sleep(60)
    return {"x": rows.float()[:, None].expand(-1, 1000)}

features.mapped(Dataset.from_dict({"row": list(range(128))}), extract, {"model": "m", "kind": "test"})
"""


def test_killed_on_the_way_nothing_is_taken_for_whole(cache):
    from datasets import Dataset

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT / "notebooks" / "paper", stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        assert process.stdout.readline()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.json"))
    done = []

    def extract(batch, rows):
        done.extend(rows.tolist())
        return {"x": rows.float()[:, None]}

    found = features.mapped(Dataset.from_dict({"row": list(range(128))}), extract, {"model": "m", "kind": "test"})
    assert done == list(range(128)) and torch.equal(found.column("x")[:, 0], torch.arange(128).float())


def test_remembered_results_survive_and_damaged_ones_are_computed_anew(cache):
    calls = []
    compute = lambda: calls.append(1) or {"a": [1, 2.5]}  # noqa: E731
    assert remembered({"k": 1}, compute) == remembered({"k": 1}, compute) == {"a": [1, 2.5]}
    assert len(calls) == 1
    next(cache.glob("*.result.json")).write_text('{"about": {"k"')
    assert remembered({"k": 1}, compute) == {"a": [1, 2.5]} and len(calls) == 2
    remembered({"k": 2}, compute)
    assert len(calls) == 3


def test_a_capture_on_disk_is_the_capture(model, cache):
    pictures = images.load("scenes", model, 5)
    keep, layers = ("norms", "tokens", "embedding"), [0, 1]
    plain = model.capture(pictures, keep, layers=layers)
    for _ in range(2):
        found = features.captured(model, pictures, keep, layers)
        torch.testing.assert_close(found.norms, plain.norms)
        torch.testing.assert_close(found.tokens[1], plain.tokens[1])
        torch.testing.assert_close(found.embedding.flatten(1), plain.embedding.flatten(1))
        assert (found.grid, found.layers, found.num_prefix_tokens) == (
            plain.grid,
            plain.layers,
            plain.num_prefix_tokens,
        )
    assert len(list(cache.glob("*.arrow"))) == 1
    with pytest.raises(ValueError, match="site 'attention' is not kept on disk"):
        features.captured(model, pictures, "attention")


def test_descriptions_hold_no_path(model, source, cache):
    tables_tokens.classification_tokens(model, source, 1.0)
    told = json.loads(next(cache.glob("*.json")).read_text())
    assert "/" not in json.dumps(told["about"]) and told["rows"] == 40
