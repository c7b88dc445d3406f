"""Scenes: the same everywhere, and their ground truth is what one sees."""

from __future__ import annotations

import importlib.util
import re

import clip
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitreg_lib import base
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.data import scenes

FIELDS = ("pixels", "instances", "semantic", "depth", "boxes", "visible", "shape", "colour", "texture", "place")


@pytest.fixture(scope="module")
def batch() -> scenes.Scenes:
    return scenes.render(range(7000, 7160), 96, seed=3)


@given(
    indices=st.lists(st.integers(0, 1 << 41), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 20),
    others=st.integers(0, 40),
)
def test_a_scene_does_not_hang_on_its_batch(indices, seed, others):
    together = scenes.render(torch.tensor([*range(others), *indices]), 64, seed)
    for i, index in enumerate(indices):
        alone = scenes.render(torch.tensor([index]), 64, seed)
        for field in FIELDS:
            assert torch.equal(getattr(together, field)[others + i], getattr(alone, field)[0]), field


def test_a_gpu_which_computes_every_row_gives_the_same_scenes(batch, monkeypatch):
    monkeypatch.setattr(scenes, "_rows", lambda mask: [slice(None)])
    every_row = scenes.render(range(7000, 7160), 96, seed=3)
    for field in FIELDS:
        assert torch.equal(getattr(every_row, field), getattr(batch, field)), field


def test_seeds_and_indices_give_different_scenes():
    pixels = torch.cat([scenes.render(range(8), 64, seed).pixels for seed in (0, 1)])
    differ = torch.cdist(pixels.flatten(1), pixels.flatten(1)) > 1
    assert differ[~torch.eye(16, dtype=torch.bool)].all()


@pytest.mark.parametrize("size", [64, 130, 224])
def test_a_scene_is_the_same_at_any_size(size):
    small, large = scenes.render(range(16), 96), scenes.render(range(16), size)
    for field in ("label", "shape", "colour", "texture", "place", "radius", "background"):
        assert torch.equal(getattr(small, field), getattr(large, field)), field
    assert large.pixels.shape == (16, 3, size, size)
    both = small.visible & large.visible
    torch.testing.assert_close(small.boxes[both] / 96, large.boxes[both] / size, atol=2.5 / 64, rtol=0)


@pytest.mark.parametrize("size", [0, 63, 225])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"size {size} is out of range.*64 to 224"):
        scenes.render(range(1), size)


def test_boxes_equal_those_of_the_instance_masks(batch):
    for i, instances in enumerate(batch.instances.numpy()):
        for k in range(scenes.MAX_OBJECTS):
            rows, cols = np.where(instances == k + 1)
            assert batch.visible[i, k].item() == (len(rows) > 0)
            box = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert batch.boxes[i, k].tolist() == box


def test_semantic_and_depth_follow_the_instances(batch):
    ground = torch.linspace(10, 8, 97)[:-1] - 1 / 96
    for i, instances in enumerate(batch.instances):
        for k in range(scenes.MAX_OBJECTS):
            mask = instances == k + 1
            assert (batch.semantic[i][mask] == batch.shape[i, k] + 1).all()
            assert batch.depth[i][mask].unique().numel() <= 1
        behind = instances == 0
        assert (batch.semantic[i][behind] == 0).all()
        torch.testing.assert_close(batch.depth[i][behind], ground[:, None].expand(96, 96)[behind])


def test_the_nearer_object_wins(batch):
    """Within 0.28 radii of its centre every shape but the ring is solid: there one sees it, or a nearer one."""
    axis = (torch.arange(96) + 0.5) / 96
    checked = 0
    for i in range(len(batch)):
        for k in batch.visible[i].nonzero()[:, 0].tolist():
            if batch.shape[i, k] == scenes.SHAPES.index("ring"):
                continue
            x, y = batch.place[i, k]
            core = (axis[None] - x) ** 2 + (axis[:, None] - y) ** 2 < (0.28 * batch.radius[i, k]) ** 2
            seen = batch.instances[i][core]
            assert ((seen >= 1) & (seen <= k + 1)).all()
            checked += len(seen)
    assert checked > 5000


def test_the_main_object_is_the_first_the_largest_the_nearest_and_never_hidden(batch):
    assert torch.equal(batch.label, batch.shape[:, 0])
    assert (batch.radius[:, :1] > batch.radius[:, 1:]).all()
    for i in range(len(batch)):
        shown = batch.instances[i] == 1
        assert shown.sum() > 0.02 * shown.numel()
        assert batch.depth[i][shown].unique().item() == batch.depth[i].min()
    assert torch.equal(batch.instances.flatten(1).amax(1) > 0, batch.visible.any(1))


def test_pixels_show_the_colours_that_are_named():
    """A plain object is its colour, up to 15 % darker."""
    batch = scenes.render(range(200), 96)
    plain = (batch.texture[:, 0] == scenes.TEXTURES.index("plain")).nonzero()[:, 0]
    for i in plain.tolist():
        inside = torch.nn.functional.avg_pool2d((batch.instances[i] == 1).float()[None], 3, 1, 1)[0] == 1
        colour = batch.pixels[i][:, inside]
        nearest = torch.cdist(
            colour.T / colour.T.norm(dim=1, keepdim=True), scenes._RGB / scenes._RGB.norm(dim=1)[:, None]
        )
        assert (nearest.argmin(1) == batch.colour[i, 0]).all()


def test_captions_follow_the_grammar_and_name_what_is_there(batch):
    noun = rf"a (?:({'|'.join(scenes.TEXTURES[1:])}) )?({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})"
    grammar = re.compile(
        rf"{noun}(?: (left of|right of|above|below) {noun})? on a ({'|'.join(scenes.BACKGROUNDS)}) background"
    )
    for i, caption in enumerate(clip.captions_of(batch)):
        words = grammar.fullmatch(caption).groups()
        named = [(words[:3], 0)]
        others = [k for k in range(1, 5) if batch.visible[i, k]]
        assert bool(others) == (words[3] is not None)
        if others:
            named.append((words[4:7], others[0]))
            dx, dy = (batch.place[i, 0] - batch.place[i, others[0]]).tolist()
            true = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}
            assert true[words[3]]
        for (texture, colour, shape), k in named:
            assert (texture or "plain") == scenes.TEXTURES[batch.texture[i, k]]
            assert colour == scenes.COLOURS[batch.colour[i, k]]
            assert shape == scenes.SHAPES[batch.shape[i, k]]
        assert words[7] == scenes.BACKGROUNDS[batch.background[i]]


def test_every_attribute_is_balanced():
    n = 1600
    batch = scenes.render(range(n), 64)
    for values, names in (
        (batch.shape[:, 0], scenes.SHAPES),
        (batch.colour[:, 0], scenes.COLOURS),
        (batch.texture[:, 0], scenes.TEXTURES),
        (batch.background, scenes.BACKGROUNDS),
    ):
        counts = torch.bincount(values, minlength=len(names))
        expected, spread = n / len(names), (n / len(names)) ** 0.5
        assert (counts - expected).abs().max() < 4 * spread, dict(zip(names, counts.tolist(), strict=True))
    numbers = batch.visible.sum(1)
    assert set(numbers.tolist()) == {1, 2, 3, 4, 5}


def test_pixels_are_in_range_and_plain_backgrounds_uniform(batch):
    assert batch.pixels.dtype == torch.float32
    assert 0 <= batch.pixels.min()
    assert batch.pixels.max() <= 1
    for i in (batch.background == scenes.BACKGROUNDS.index("plain")).nonzero()[:, 0].tolist():
        far = torch.nn.functional.max_pool2d((batch.instances[i] > 0).float()[None], 5, 1, 2)[0] == 0
        assert batch.pixels[i][:, far].std(1).max() < 1e-6


def test_uniform_numbers_are_uniform_and_uncorrelated():
    u = scenes.uniform(torch.arange(20_000), 8, seed=5).double()
    assert 0 <= u.min()
    assert u.max() < 1
    torch.testing.assert_close(u.mean(0), torch.full((8,), 0.5).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(u.var(0), torch.full((8,), 1 / 12).double(), atol=0.003, rtol=0)
    correlation = torch.corrcoef(torch.cat([u[1:].T, u[:-1].T]))  # between draws, and between neighbouring scenes
    assert (correlation - torch.eye(16)).abs().max() < 0.04


@pytest.fixture
def frozen():
    """workflow/scenes.py, which writes the evaluation set."""
    spec = importlib.util.spec_from_file_location("write_scenes", ROOT / "workflow" / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_frozen_set_equals_scenes_rendered_anew(frozen, tmp_path):
    """Loaded as any user of `datasets` would, without a network."""
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(frozen.PATH), split="train", cache_dir=str(tmp_path))
    assert len(table) == frozen.COUNT == 256
    assert table.features["label"].names == list(scenes.SHAPES)
    batch = scenes.render(range(frozen.FIRST, frozen.FIRST + frozen.COUNT), frozen.SIZE)
    captions = clip.captions_of(batch)
    for i in range(0, 256, 5):
        row, visible = table[i], batch.visible[i]
        pixels = np.asarray(row["image"], dtype=np.float32).transpose(2, 0, 1) / 255
        assert np.abs(pixels - batch.pixels[i].numpy()).max() <= 1 / 255
        assert np.array_equal(np.asarray(row["instances"]), batch.instances[i].numpy())
        depth = np.asarray(row["depth"], dtype=np.float32) / frozen.DEPTH_UNIT
        assert np.abs(depth - batch.depth[i].numpy()).max() <= 1 / frozen.DEPTH_UNIT
        assert row["label"] == batch.label[i]
        assert row["caption"] == captions[i]
        assert row["boxes"] == batch.boxes[i][visible].tolist()
        assert row["box_labels"] == batch.shape[i][visible].tolist()


def test_the_frozen_set_is_written_whole_or_not_at_all(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "COUNT", 4)
    path = frozen.write(tmp_path / "few.parquet")
    whole = path.read_bytes()
    monkeypatch.setattr(base.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="few.parquet cannot be written: disk full"):
        frozen.write(path)
    assert path.read_bytes() == whole
