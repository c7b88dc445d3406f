"""A figure is compared by what it draws: another line, bar or picture is noticed, the last digit is not."""

from __future__ import annotations

import json

import compare
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitreg_lib.record import drawn

KINDS = (
    "line",
    "bars",
    "sideways",
    "histogram",
    "log",
    "picture",
    "photo",
    "mesh",
    "points",
    "area",
    "violin",
    "errors",
)


def draw(axis, kind, values):
    """One panel of `kind` that shows `values` (n,), positive."""
    x, square = np.arange(len(values)), int(len(values) ** 0.5)
    grid = values[: square**2].reshape(square, square)
    if kind == "line":
        axis.plot(x, values, label="measured")
        axis.axhline(values.max(), label="paper")
    elif kind == "bars":
        axis.bar([f"model {i}" for i in x], values)
    elif kind == "sideways":
        axis.barh(x, values)
    elif kind == "histogram":
        axis.bar(x, np.round(10 * values) * (values > 0.3), width=1)
        axis.set(yscale="log")
    elif kind == "log":
        axis.plot(x, 10 ** (3 * values))
        axis.set(yscale="log")
    elif kind == "picture":
        axis.figure.colorbar(axis.imshow(grid, vmin=0, vmax=1), cax=axis.inset_axes([1.05, 0, 0.05, 1]))
    elif kind == "photo":
        axis.imshow(np.stack([grid, grid / 2, grid / 3], -1))
    elif kind == "mesh":
        axis.pcolormesh(grid)
    elif kind == "points":
        axis.scatter(x, values)
    elif kind == "area":
        axis.fill_between(x, values / 2, values)
    elif kind == "violin":
        axis.violinplot([values, values[::2]], showextrema=False)
    elif kind == "errors":
        axis.errorbar(x, values, values / 10, fmt="o", label="ours")


def of(*panels):
    """The summary of a figure with a panel for each (kind, values)."""
    figure, axes = plt.subplots(1, len(panels), squeeze=False)
    for axis, (kind, values) in zip(axes[0], panels, strict=True):
        draw(axis, kind, np.asarray(values, float))
        axis.set(title=f"{kind} of mini-deit3\nmean 0.53", xlabel="place")
    found = drawn.summary(figure)
    plt.close(figure)
    return found


@pytest.fixture
def values():
    """36 numbers between 0.2 and 1, rising and falling unevenly."""
    rng = np.random.default_rng(0)
    return 0.2 + 0.5 * np.linspace(0, 1, 36) ** 2 + 0.3 * rng.random(36)


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_processor_would_draw_is_the_same(kind, values):
    jitter = 1 + 0.001 * np.random.default_rng(1).uniform(-1, 1, len(values))
    before = of((kind, values))
    assert before[0]["drawn"], "nothing was seen"
    assert compare.compare(of((kind, values)), before) == []
    assert compare.compare(of((kind, values * jitter)), before) == []


@pytest.mark.parametrize("kind", KINDS)
def test_mirrored_shifted_or_changed_data_are_noticed(kind, values):
    before, changed = of((kind, values)), values.copy()
    changed[10:16] = 0.95
    assert compare.compare(of((kind, changed)), before)
    assert compare.compare(of((kind, values * 1.2)), before)
    if kind != "violin":  # has no order
        assert compare.compare(of((kind, values[::-1])), before)


def test_one_bar_and_one_block_of_a_picture_are_noticed(values):
    taller, block = values[:6].copy(), values.reshape(6, 6).copy()
    taller[2] += 0.1
    block[2:4, 2:4] += 0.3
    assert compare.compare(of(("bars", taller)), of(("bars", values[:6])))
    told = compare.compare(of(("picture", block.ravel())), of(("picture", values)))
    assert told and all("panel 1 'picture of mini-deit3': image 1 has" in line for line in told)


def test_a_mirrored_photo_and_exchanged_colours_are_noticed():
    photo = np.random.default_rng(0).random((24, 24, 3)) * np.linspace(0.4, 1, 24)[:, None]

    def shown(pixels):
        figure, axis = plt.subplots()
        axis.imshow(pixels)
        found = drawn.summary(figure)
        plt.close(figure)
        return found

    assert compare.compare(shown((255 * photo).astype("uint8")), shown(photo)) == []
    assert compare.compare(shown(photo[:, ::-1] * np.linspace(0.5, 1, 24)[:, None]), shown(photo))
    assert compare.compare(shown(photo[::-1]), shown(photo))
    tinted = photo * [1, 0.6, 0.3]
    assert compare.compare(shown(tinted[..., ::-1]), shown(tinted))


def test_a_texture_that_averages_out_is_told_from_another():
    rows, columns = np.mgrid[:96, :96]
    stripes, checks = (rows // 5 + columns // 7) % 2, (rows // 4 + columns // 4) % 2
    found = [of(("picture", texture.ravel().astype(float))) for texture in (stripes, checks, stripes[::-1])]
    assert compare.compare(found[1], found[0])
    assert compare.compare(found[2], found[0])


def test_words_are_compared_to_the_letter_and_their_numbers_within_the_tolerance():
    assert compare.same_text("2.03 % above, cutoff 113", "2.04 % above, cutoff 112")
    assert compare.same_text("95 % right", "94 % right")
    assert compare.same_text("mini-deit3\nno outliers", "mini-deit3\nno outliers")
    assert not compare.same_text("2.03 % above", "2.30 % above")
    assert not compare.same_text("outliers from block 3", "outliers from block 4")
    assert not compare.same_text("mini-deit3-reg4", "mini-deit3-reg8")
    assert not compare.same_text("planted+ttr1", "planted+ttr2")
    assert not compare.same_text("mean 0.5", "median 0.5")
    assert not compare.same_text("0.5", "none")


def test_exchanged_labels_and_missing_parts_are_told_in_words(values):
    def figure(*, names=("with", "without"), lines=2, panels=2, title="norms", ticks=("a", "b"), note="paper: 2 %"):
        drawing, axes = plt.subplots(1, panels, squeeze=False)
        for axis in axes[0]:
            for name, shift in list(zip(names, (0, 1), strict=True))[:lines]:
                axis.plot(values + shift, label=name)
            axis.set(title=title, xticks=[0, 35], xticklabels=ticks)
            axis.annotate(note, (0, 0))
        found = drawn.summary(drawing)
        plt.close(drawing)
        return found

    before = figure()
    assert compare.compare(figure(), before) == []
    assert compare.compare(figure(panels=1), before) == ["panels: 1, recorded 2"]
    assert "panel 2 'norms': draws line × 1; recorded line × 2" in compare.compare(figure(lines=1), before)
    assert "panel 1 'norms': line 1 is labelled 'without', recorded 'with'" in compare.compare(
        figure(names=("without", "with")), before
    )
    assert "title 'shares', recorded 'norms'" in compare.compare(figure(title="shares"), before)[0]
    assert "ticks ['b', 'a'], recorded ['a', 'b']" in compare.compare(figure(ticks=("b", "a")), before)[0]
    assert "texts" in compare.compare(figure(note="paper: 12 %"), before)[0]


def test_what_decorates_or_tells_of_this_machine_is_left_out(values):
    figure, (axis, other, hidden) = plt.subplots(1, 3)
    axis.plot(values, label="kept")
    axis.plot(values, gid=drawn.THIS_MACHINE, label="seconds")
    axis.legend()
    axis.grid(True)
    other.set_gid(drawn.THIS_MACHINE)
    hidden.set_visible(False)
    found = drawn.summary(figure)
    plt.close(figure)
    assert [[artist["label"] for artist in panel["drawn"]] for panel in found] == [["kept"]]


def test_a_reference_line_counts_only_where_it_stands(values):
    figure, axis = plt.subplots()
    axis.plot(values / 1000)
    axis.axhline(0.0005)
    axis.axvline(3)
    found = drawn.summary(figure)[0]["drawn"]
    plt.close(figure)
    assert [sorted(artist.keys() & {"x", "y"}) for artist in found] == [["x", "y"], ["y"], ["x"]]


@given(
    st.sampled_from(KINDS),
    st.integers(1, 60),
    st.floats(1e-6, 1e6),
    st.sampled_from([0, 0, np.nan]),
    st.integers(0, 10),
)
def test_any_shape_and_scale_gives_json_that_agrees_with_itself(kind, n, scale, hole, seed):
    values = np.random.default_rng(seed).random(n) * (scale if kind not in ("photo", "log", "violin") else 1) + 1e-6
    if kind in ("line", "picture", "points") and n > 1:
        values[0] += hole
    found = of((kind, values))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert compare.compare(found, again) == []
    if n > 3 and kind in ("line", "bars", "sideways", "points"):
        values[-1] += 1.5 * np.nanmax(values)
        assert compare.compare(of((kind, values)), found)
