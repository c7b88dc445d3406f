"""What figures draw, asked of matplotlib: scales, cells, rings, intervals; and whose pictures a run shows."""

from __future__ import annotations

import fig03
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PatchCollection
from PIL import Image

from vitreg_lib import plots
from vitreg_lib.model import zoo
from vitreg_lib.record import run as record


@pytest.fixture(autouse=True)
def closed():
    """Figures of a test do not stay open."""
    yield
    plt.close("all")


def maps(images: int, top: float) -> torch.Tensor:
    """(images, 4, 4) maps that rise from 0 to `top`, each image higher than the one before."""
    return torch.linspace(0, top, 16).view(1, 4, 4) * torch.arange(1, images + 1).view(-1, 1, 1)


def shown(figure) -> dict[str, list]:
    """{title of the column: its pictures, from the top}."""
    columns = {}
    for axis in figure.axes:
        if axis.images:
            left = round(axis.get_subplotspec().colspan.start), axis.figure
            columns.setdefault(left, []).append(axis)
    return {axes[0].get_title(): [axis.images[0] for axis in axes] for axes in columns.values()}


@pytest.mark.parametrize(("scale", "tops"), [("group", [8, 8]), ("image", [4, 8]), ("each", [2, 4])])
def test_a_pair_shares_its_scale(scale, tops):
    figure = plots.sheet(None, [{"a": maps(2, 2.0), "b": maps(2, 4.0)}], scale=scale)
    assert [image.norm.vmax for image in shown(figure)["a"]] == pytest.approx(tops)


def test_a_flat_map_is_grey():
    figure = plots.sheet(None, [{"flat": torch.ones(1, 4, 4), "other": maps(1, 1.0)}])
    assert shown(figure)["flat"][0].get_cmap().name == "gray"
    assert shown(figure)["other"][0].get_cmap().name == plots.ATTENTION


@pytest.mark.parametrize("counts", [[1], [2, 2], [2, 2, 2, 2], [1, 6, 6], [16]])
def test_a_sheet_is_below_a_thousand_pixels_wide_and_draws_every_map(counts):
    pixels = torch.rand(2, 3, 32, 32)
    groups = [{f"{g}-{m}": maps(2, 1.0) for m in range(count)} for g, count in enumerate(counts)]
    figure = plots.sheet(pixels, groups)
    assert figure.get_figwidth() * figure.dpi < 1000
    assert {name for group in groups for name in group} <= shown(figure).keys()


def test_rings_lie_on_the_patches_above_the_cutoff():
    norms = torch.ones(2, 5, 6)
    norms[0, 1, 4] = norms[1, 3, 0] = 9.0
    figure = fig03.norm_maps(torch.rand(2, 3, 20, 24), {"model": norms}, {"model": 5.0})
    rings = [c for axis in figure.axes for c in axis.collections if isinstance(c, PatchCollection)]
    centres = [tuple(path.get_extents().get_points().mean(0)) for ring in rings for path in ring.get_paths()]
    np.testing.assert_allclose(centres, [(4, 1), (0, 3)], atol=1e-6)
    assert {tuple(axis.get_xlim()) for axis in figure.axes if axis.collections} >= {(-0.5, 5.5)}, "no ring widens a map"


def test_grids_leave_out_maps_of_zeros_and_name_them():
    figure = plots.grids({"empty": torch.zeros(4, 4), "full": maps(1, 1.0)[0]}, "share")
    assert set(shown(figure)) == {"full"}
    assert "none at any place: empty" in figure.legends[0].get_title().get_text()


def test_dots_stand_at_their_values_with_their_intervals():
    rows = {("a", "x"): (5.0, 4.0, 7.0), ("b", "x"): (2.0, 1.5, 2.5), ("a", "y"): (3.0, np.nan, np.nan)}
    table = pd.DataFrame(rows, index=["value", "low", "high"]).T
    axis = plots.scores(table, "score", {"chance": 1.0}).axes[0]
    lines = [line.get_ydata() for line in axis.get_lines()]
    assert any(np.allclose(line, [4, 7]) for line in lines), "no interval from 4 to 7"
    assert any(np.allclose(line, [1.5, 2.5]) for line in lines)
    dots = np.concatenate([line for line in lines if len(line) and not np.isnan(line).all()])
    assert {5.0, 2.0, 3.0} <= set(dots.tolist())


def test_pictures_of_a_folder_given_by_hand_are_shown(tmp_path, results):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (100, 100), colour).save(tmp_path / f"{name}.png")
    model = zoo.load("mini-deit3", "cpu")
    own = record.Run("fig01", record.check_parameters("fig01", {"images": str(tmp_path), "models": "mini-deit3"}))
    assert sorted(own.examples(model, 2).names) == ["blue", "red"]
    own.load()
    assert own.caption([model]).startswith("fig01, models and images chosen by hand: mini-deit3; ")
    assert own.caption([model]).endswith(f"{tmp_path.name} (2)") and str(tmp_path) not in own.caption([model])
    plain = record.Run("fig01", record.check_parameters("fig01", {}))
    assert plain.examples(model, 2).names == ["scene 0", "scene 1"]
    assert plain.caption().startswith("fig01, profile mini")
    assert plain.caption([model]) == f"fig01, profile mini: mini-deit3; scenes ({plain.settings['n_images']})"
