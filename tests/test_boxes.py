"""Boxes beside images: YOLO files that the test writes, scenes, and folders of another layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from vitreg_lib.base import UserError
from vitreg_lib.data import sets
from vitreg_lib.measure import objects
from vitreg_lib.model import mini
from vitreg_lib.model.model import Model


@pytest.fixture(scope="module")
def model():
    module = mini.build("xxs").eval().requires_grad_(False)
    return Model("random-mini", module, "0" * 64, input_size=96, crop=0.9, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def folder(tmp_path):
    """Two wide pictures: a white rectangle with its box, and one without boxes."""
    (tmp_path / "images").mkdir()
    (tmp_path / "boxes").mkdir()
    picture = Image.new("RGB", (400, 200))
    picture.paste((255, 255, 255), (100, 50, 300, 150))
    picture.save(tmp_path / "images" / "a.png")
    picture.save(tmp_path / "images" / "b.png")
    (tmp_path / "boxes" / "a.txt").write_text("3 0.5 0.5 0.5 0.5\n\n7 0.1 0.9 0.2 0.2\n")
    return tmp_path


@pytest.mark.parametrize(("size", "box"), [(96, [24.0, 24, 72, 72]), ((64, 96), [24.0, 16, 72, 48])])
def test_boxes_lie_where_the_model_sees_the_objects(folder, model, size, box):
    images, found = sets.load_boxes(str(folder), replace(model, input_size=size), 10)
    assert images.names == ["a"] and "1 without left out" in images.source
    torch.testing.assert_close(found[0][0], torch.tensor(box))
    white = (images.pixels[0].mean(0) > 0.5)[None]
    assert (objects.mask_boxes(white)[0] - found[0][0]).abs().max() <= 1


def test_scenes_give_the_boxes_of_what_is_visible(model):
    images, found = sets.load_boxes("scenes", model, 6)
    assert len(found) == len(images) == 6
    assert all((b[:, 2:] > b[:, :2]).all() and len(b) for b in found)


@pytest.mark.parametrize("line", ["1 0.5 0.5", "1 a b c d", "1 0.9 0.9 0.5 0.5", "1 0.5 0.5 0 0.1"])
def test_a_bad_line_is_named(folder, model, line):
    (folder / "boxes" / "a.txt").write_text(line)
    with pytest.raises(UserError, match="a.txt, line 1"):
        sets.load_boxes(str(folder), model, 10)


def test_a_folder_of_another_layout_or_without_boxes_is_refused(folder, model, tmp_path):
    with pytest.raises(UserError, match="wanted are images/NAME.jpg"):
        sets.load_boxes(str(folder / "images"), model, 10)
    (folder / "boxes" / "a.txt").unlink()
    with pytest.raises(UserError, match="none of the 2 images"):
        sets.load_boxes(str(folder), model, 10)
