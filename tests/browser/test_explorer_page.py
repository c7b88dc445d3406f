"""The explorer in JupyterLab, as a reader uses it: what the page shows is what the library computes for the choice.

The page says what it draws (`view` of each card): these values are compared with the library's. Colours differ from one
machine to the next, so only their order is compared: a larger value is brighter, at its place. With VITREG_GALLERY=1
(`make gallery`) the screenshots go to docs/gallery/.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitreg_lib.base import NOTEBOOKS, ROOT
from vitreg_lib.widgets import view as explorer
from vitreg_lib.widgets.state import State, Store

pytestmark = pytest.mark.slow
OPENED = State(models=("deit-ti", "deit-ti-trained-reg4"))
DEFAULT = State(models=("planted", "mini-deit3-reg4"), images="scenes")  # of most tests
SENT = """(place) => {  // what one card draws: words, numbers, and its maps as lists
  const { view, dataset } = document.querySelectorAll('.vr-card')[place];
  const plain = (value) => (ArrayBuffer.isView(value) && !(value instanceof DataView) ? [...value] : value);
  const names = ['label', 'title', 'image_name', 'patch', 'grid', 'cutoff', 'by_rule', 'budget', 'scales', 'component',
    'missing', 'attention', 'share', 'norms', 'similarity', 'edges', 'counts', 'set_counts'];
  return Object.fromEntries(names.map((name) => [name, plain(view[name])])); }"""
IS_SHOWN = """(wanted) => wanted.every(([label, title, image, byRule, component], place) => {
  const view = document.querySelectorAll('.vr-card')[place]?.view;
  return view && view.label === label && view.title === title && view.image_name === image && view.by_rule === byRule
    && view.component === component; })"""
COLOURS = """([place, panel]) => {  // the colour at the centre of every patch of one panel
  const card = document.querySelectorAll('.vr-card')[place];
  const canvas = card.querySelector(`canvas[data-panel=${panel}]`);
  const [rows, cols] = card.view.grid;
  const found = [];
  for (let i = 0; i < rows * cols; i++) {
    const [x, y] = [(i % cols + 0.5) * canvas.width / cols, (Math.floor(i / cols) + 0.5) * canvas.height / rows];
    found.push([...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3));
  }
  return found;
}"""
CLOCK = """() => {  // milliseconds from each input to the page's next picture
  window.answers = []; let began = null;
  for (const kind of ['keydown', 'pointerdown', 'pointerup', 'change'])
    document.addEventListener(kind, () => { began = performance.now(); }, true);
  new MutationObserver(() => { if (began !== null) answers.push(performance.now() - began); began = null; })
    .observe(document.querySelector('.vr-card'), { attributes: true, attributeFilter: ['data-serial'] });
}"""


@pytest.fixture(scope="module")
def store():
    """The library's own store of models and captures, for what the page is compared with; real ones are replayed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VITREG_MODELS", raising=False)
        patch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
        yield Store()


@pytest.fixture(scope="module")
def opened(desk):
    """The page as the notebook opens it, all cells run, with the attention map alone on the image (overlay 1), so that
    its colours can be read back."""
    desk.settle()
    slider(desk.page, "Overlay").press("End")
    wait_for_opacity(desk.page, 1)
    return desk


@pytest.fixture(scope="module")
def ready(opened):
    """The page with the planted control beside a mini model, on scenes: all of it is computed."""
    choose(opened, DEFAULT)
    opened.page.evaluate(CLOCK)
    return opened


def slider(page, label: str):
    """The handle of an ipywidgets slider."""
    return page.locator(".vr-explorer .widget-inline-hbox", has_text=label).locator(".noUi-handle")


def control(page, label: str):
    """The control of exactly that label."""
    return page.get_by_label(label, exact=True)


def serial(page) -> int:
    return int(page.locator(".vr-card").first.get_attribute("data-serial"))


def after(desk, act) -> None:
    """Do something and wait until the page has drawn all that follows from it; nothing is on its way then."""
    drawn(desk.page, act)
    desk.settle()


def drawn(page, act) -> None:
    """Do something and wait for the next picture."""
    before = serial(page)
    act()
    page.wait_for_function(f"document.querySelector('.vr-card').dataset.serial > {before}")


def choose(desk, state: State) -> None:
    """Choose two models and their images by the controls."""
    for label, value in zip(("Model", "Beside", "Images"), (*state.models, state.images), strict=True):
        pick(desk, label, value)


def pick(desk, label: str, value: str) -> None:
    """Choose what a control shows as `value`, or as "value (replayed)"."""
    shown = control(desk.page, label)
    options = shown.locator("option").all_inner_texts()
    shown.select_option(value if value in options else f"{value} (replayed)")
    desk.settle()


def number(page, place: int, name: str) -> str:
    return page.locator(".vr-card").nth(place).locator(f"[data-name='{name}']").inner_text()


def wait_for_text(page, place: int, name: str, text: str) -> None:
    """Wait until one card writes the text: what follows the pointer is drawn with the next frame."""
    page.wait_for_function(
        "([place, name, text]) => document.querySelectorAll('.vr-card')[place]"
        ".querySelector(`[data-name='${name}']`).innerText === text",
        arg=[place, name, text],
    )


def assert_shows(page, state: State, store) -> list:
    """Both cards come to show the state; what they draw is what the library's views hold, which are returned."""
    views = explorer.look(state, store)
    wanted = [[v.label, v.title, v.forward.image_name, v.by_rule, state.component] for v in views]
    page.wait_for_function(IS_SHOWN, arg=wanted)
    for place, (view, scales) in enumerate(zip(views, explorer.scales(views, state.shared), strict=True)):
        compare_values(page.evaluate(SENT, place), view, scales)
        compare_words(page, place, view)
        compare_colours(page, place, view, scales)
    return views


def compare_values(sent: dict, view: explorer.View, scales: dict) -> None:
    """What one card draws against one view, number by number."""
    for name in ("norms", "attention", "similarity", "edges", "counts", "set_counts"):
        np.testing.assert_allclose(sent[name], getattr(view, name).flatten(), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(sent["share"], view.attention_share.flatten(), rtol=1e-4, atol=1e-6)
    assert sent["missing"] == view.missing
    assert sent["budget"] == (None if "attention" in view.missing else pytest.approx(view.budget, abs=1e-5))
    assert sent["cutoff"] == (None if math.isinf(view.cutoff) else pytest.approx(view.cutoff, rel=1e-4))
    assert sent["patch"] == (list(view.patch) if view.patch else None)
    for name, limits in scales.items():
        assert [sent["scales"][name]["low"], sent["scales"][name]["high"]] == pytest.approx(limits, rel=1e-4, abs=1e-5)


def compare_words(page, place: int, view: explorer.View) -> None:
    """The numbers that one card writes against one view."""
    count = int(view.is_outlier.sum())
    assert number(page, place, "above").startswith(f"outliers: {count} of {view.norms.numel()} (")
    for name, share in view.budget.items():
        text = number(page, place, f"on-{name}")
        known = "attention" not in view.missing
        assert float(text.split()[0]) == pytest.approx(100 * share, abs=0.1) if known else text == "–"
    for panel in ("attention", "components", "similarity"):
        reason = page.locator(".vr-card").nth(place).locator(f"[data-reason={panel}]")
        assert reason.inner_text() == view.missing.get(panel, "") and reason.is_visible() == (panel in view.missing)
    assert number(page, place, "verdict") == view.verdict and number(page, place, "role") == view.role
    if view.patch:
        row, col = view.patch
        wait_for_text(page, place, "patch", f"Patch ({row}, {col})")
        assert number(page, place, "rank") == rank(view, row, col)
        assert float(number(page, place, "norm")) == pytest.approx(view.norms[row, col].item(), rel=6e-3)
        share = float(number(page, place, "attention").split()[0])
        assert share == pytest.approx(100 * view.attention_share[row, col].item(), rel=6e-3)


def rank(view: explorer.View, row: int, col: int) -> str:
    """The place of a patch by its norm, as a card writes it."""
    return f"{1 + int((view.norms > view.norms[row, col]).sum())} of {view.norms.numel()}"


def compare_colours(page, place: int, view: explorer.View, scales: dict) -> None:
    """Of two patches whose values differ by a tenth of the scale, the larger is brighter; components: by channel."""
    for panel in [name for name in ("attention", "norms", "similarity", "components") if name not in view.missing]:
        shown = np.array(page.evaluate(COLOURS, [place, panel]), dtype=float)
        if panel == "components":
            drawn = [(shown[:, c], view.components[..., c].clamp(-3, 3).flatten().numpy() / 6) for c in range(3)]
        else:
            low, high = scales[panel]
            drawn = [(shown @ [0.2126, 0.7152, 0.0722], getattr(view, panel).flatten().numpy() / (high - low))]
        for brightness, values in drawn:
            wrong = (values[:, None] - values > 0.1) & (brightness[:, None] <= brightness)
            assert not wrong.any(), f"{view.label}, {panel}: {wrong.sum()} pairs of patches are in the wrong order"


def picture(page, name: str, tmp_path: Path) -> None:
    """A screenshot of the explorer as a reader sees it, the map over the image; docs/gallery/ where it is asked for."""
    folder = ROOT / "docs" / "gallery" if os.environ.get("VITREG_GALLERY") else tmp_path
    if over := not page.locator(".vr-explorer .widget-inline-hbox", has_text="Overlay").locator("[disabled]").count():
        overlay(page, 14)
    page.mouse.move(1, 1)
    page.evaluate("document.activeElement.blur()")
    path = folder / f"{name}.png"
    page.locator(".vr-explorer").screenshot(path=path)
    if over:
        overlay(page, 20)
    assert path.stat().st_size > 10_000


def overlay(page, steps: int) -> None:
    """Move the slider of the attention's opacity to `steps` steps of 20."""
    handle = slider(page, "Overlay")
    handle.press("Home")
    for _ in range(steps):
        handle.press("ArrowRight")
    wait_for_opacity(page, steps / 20)


def wait_for_opacity(page, opacity: float) -> None:
    """Wait until both cards are drawn with that opacity of the attention."""
    page.wait_for_function(
        """(wanted) => [...document.querySelectorAll('.vr-card')].every(
            (card) => Math.abs(card.dataset.opacity - wanted) < 1e-6)""",
        arg=opacity,
    )


def click_patch(page, place: int, panel: str, row: int, col: int) -> None:
    canvas = page.locator(".vr-card").nth(place).locator(f"canvas[data-panel={panel}]")
    box = canvas.bounding_box()
    rows, cols = page.evaluate(SENT, place)["grid"]
    canvas.click(position={"x": (col + 0.5) / cols * box["width"], "y": (row + 0.5) / rows * box["height"]})
    page.mouse.move(1, 1)


def reset(desk, store) -> None:
    """Last layer, mean of heads, cls, cutoffs by rule."""
    page = desk.page
    slider(page, "Overlay").press("End")
    wait_for_opacity(page, 1)
    acts = [
        lambda: slider(page, "Layer").press("End"),
        page.get_by_role("button", name="mean", exact=True).click,
        lambda: control(page, "Query").select_option("cls"),
        page.get_by_role("button", name="Cutoff by rule").click,
    ]
    for act in acts:  # one after the other: what follows from one click may undo another that was too early
        act()
        desk.settle()
    assert_shows(page, DEFAULT, store)


def test_it_opens_on_real_models_as_they_were_measured(opened, store, tmp_path):
    views = assert_shows(opened.page, OPENED, store)
    assert not opened.page.locator(".vr-error").count()
    assert views[0].forward.measured and views[0].missing
    assert views[0].is_outlier.sum() > views[1].is_outlier.sum()
    picture(opened.page, "explorer", tmp_path)


def test_what_was_not_measured_is_greyed_and_says_why(opened, store, tmp_path):
    page = opened.page
    pick(opened, "Beside", "—")
    for _ in range(6):
        after(opened, lambda: slider(page, "Layer").press("ArrowLeft"))
    views = assert_shows(page, replace(OPENED, models=OPENED.models[:1], layer=5), store)
    assert set(views[0].missing) == {"attention", "components", "similarity"}
    reasons = "; ".join(views[0].missing[name] for name in ("attention", "components"))
    wanted = f"Grey controls: deit-ti was measured on the photos alone; {reasons}"
    assert page.locator(".vr-why").inner_text() == wanted
    assert all(control(page, label).is_disabled() for label in ("Images", "Query", "PCA"))
    mean = page.get_by_role("button", name="mean", exact=True)
    assert mean.is_disabled() and mean.get_attribute("title") == views[0].missing["attention"]
    picture(page, "explorer-not-measured", tmp_path)
    after(opened, lambda: click_patch(page, 0, "norms", 3, 4))
    refused = page.locator(".vr-error").inner_text()
    assert refused.startswith("attention of patch (3, 4) was not measured") and "VITREG_MODELS" in refused
    after(opened, lambda: slider(page, "Layer").press("End"))
    pick(opened, "Beside", OPENED.models[1])
    assert_shows(page, OPENED, store)


def test_two_kinds_of_artifacts(opened, store, tmp_path):
    """ViT-Ti, whose artifacts sit in the corners, beside DeiT-Ti of the same architecture, whose follow the image."""
    for label, value in (("Model", "vit-ti"), ("Beside", "deit-ti")):
        pick(opened, label, value)
    shared = opened.page.get_by_label("One colour scale for both")
    after(opened, shared.uncheck)
    views = assert_shows(opened.page, State(models=("vit-ti", "deit-ti"), shared=False), store)
    assert [view.verdict for view in views] == ["artifacts: strong, position-bound", "artifacts: mild, content-bound"]
    picture(opened.page, "explorer-vit-ti", tmp_path)
    after(opened, shared.check)


def test_layer_head_and_register_are_followed_by_both_models(ready, store, tmp_path):
    page = ready.page
    reset(ready, store)
    cell = page.locator(".jp-Notebook .jp-mod-active").get_attribute("data-windowed-list-index")
    after(ready, lambda: slider(page, "Layer").press("ArrowLeft"))
    after(ready, lambda: slider(page, "Layer").press("ArrowLeft"))
    state = replace(DEFAULT, layer=5)
    assert_shows(page, state, store)
    after(ready, page.get_by_role("button", name="2", exact=True).click)
    state = replace(state, heads=(2,))
    assert_shows(page, state, store)
    after(ready, page.get_by_role("button", name="4", exact=True).click)
    state = replace(state, heads=(2, 4))
    assert_shows(page, state, store)
    assert number(page, 1, "notes") == "mini-deit3-reg4 has 3 heads: the others are left out"
    after(ready, lambda: control(page, "Query").select_option("register 2"))
    state = replace(state, query="register 2")
    views = assert_shows(page, state, store)
    assert number(page, 0, "notes") == "planted has no registers: cls is shown"
    picture(page, "explorer-register", tmp_path)
    assert views[1].query == "register 2"
    assert page.locator(".jp-Notebook .jp-mod-active").get_attribute("data-windowed-list-index") == cell


def test_a_patch_is_asked_by_click_and_by_arrow_keys(ready, store, tmp_path):
    page = ready.page
    reset(ready, store)
    after(ready, lambda: click_patch(page, 0, "norms", 3, 4))
    assert_shows(page, replace(DEFAULT, query="patch (3, 4)"), store)
    maps = page.locator(".vr-maps").first
    maps.focus()
    for key, patch in (("ArrowRight", "patch (3, 5)"), ("ArrowDown", "patch (4, 5)")):
        after(ready, lambda key=key: page.keyboard.press(key))
        assert_shows(page, replace(DEFAULT, query=patch), store)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    picture(page, "explorer-patch", tmp_path)
    maps.focus()
    after(ready, lambda: page.keyboard.press("Home"))
    assert_shows(page, DEFAULT, store)
    box = page.locator(".vr-card canvas[data-panel=norms]").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 2.5 / 12, box["y"] + box["height"] * 1.5 / 12)
    wait_for_text(page, 0, "patch", "Patch (1, 2)")
    view = explorer.look(DEFAULT, store)[0]
    assert number(page, 0, "rank") == rank(view, 1, 2)
    page.mouse.move(1, 1)


def test_the_cutoff_is_dragged(ready, store, tmp_path):
    page = ready.page
    reset(ready, store)
    histogram = page.locator("canvas[data-panel=histogram]").first
    box = histogram.bounding_box()
    view = explorer.look(DEFAULT, store)[0]
    high = float(view.edges[-1])
    # to the middle of the widest gap among the 10th to 40th norm, so that a fraction of a pixel decides nothing
    largest = view.norms.flatten().sort(descending=True).values[9:40]
    gap = int((largest[:-1] - largest[1:]).argmax())
    norm = (largest[gap] + largest[gap + 1]).item() / 2
    start, end = 0.5 * box["width"], (54 + (400 - 54 - 10) * norm / high) / 400 * box["width"]
    page.mouse.move(box["x"] + start, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + (start + end) / 2, box["y"] + 50, steps=4)
    page.mouse.move(box["x"] + end, box["y"] + 50, steps=4)
    after(ready, page.mouse.up)
    page.mouse.move(1, 1)
    cutoff = page.evaluate(SENT, 0)["cutoff"]
    assert cutoff == pytest.approx(norm, abs=0.02 * high)
    assert float(number(page, 0, "cutoff").split()[1]) == pytest.approx(cutoff, rel=6e-3)
    views = assert_shows(page, replace(DEFAULT, cutoffs=(cutoff, None)), store)
    assert 10 <= views[0].is_outlier.sum() < 40  # more than those by rule
    red, green, blue = page.evaluate(
        """([row, col]) => { const c = document.querySelector('canvas[data-panel=norms]');
        return [...c.getContext('2d').getImageData(col * 24 + 2, row * 24 + 12, 1, 1).data].slice(0, 3); }""",
        views[0].is_outlier.nonzero()[0].tolist(),
    )
    assert blue > green > red, "no light blue ring round an outlier"
    picture(page, "explorer-cutoff", tmp_path)
    histogram.focus()
    after(ready, lambda: page.keyboard.press("ArrowRight"))
    moved = views[0].cutoff + high / 100
    assert float(number(page, 0, "cutoff").split()[1]) == pytest.approx(moved, rel=0.02)
    after(ready, lambda: page.keyboard.press("Home"))
    assert_shows(page, DEFAULT, store)


def test_another_image_and_model_say_that_they_take_a_moment(ready, store):
    page = ready.page
    reset(ready, store)
    page.evaluate("""() => { window.messages = []; new MutationObserver((changes) =>
        changes.forEach(({ addedNodes }) => addedNodes.forEach((node) => messages.push(node.textContent)))
        ).observe(document.querySelector('.vr-status'), { childList: true, subtree: true }); }""")
    after(ready, lambda: control(page, "Image").select_option("scene 3"))
    assert_shows(page, replace(DEFAULT, image=3), store)
    after(ready, lambda: control(page, "Beside").select_option("mini-deit3"))
    state = State(models=("planted", "mini-deit3"), images="scenes", image=3, layer=7)
    assert_shows(page, state, store)
    assert any("loading mini-deit3" in text for text in page.evaluate("messages"))
    assert not page.locator(".vr-spin").count()
    after(ready, lambda: control(page, "Beside").select_option("—"))
    assert page.locator(".vr-card").nth(1).is_hidden()
    after(ready, lambda: control(page, "Beside").select_option("mini-deit3-reg4"))
    after(ready, lambda: control(page, "Image").select_option("scene 0"))
    assert_shows(page, DEFAULT, store)


def test_a_dropped_image_is_shown_and_a_damaged_one_refused(ready):
    page = ready.page
    drop = """([name, size]) => new Promise((done) => {
      const canvas = document.createElement('canvas'); [canvas.width, canvas.height] = [size, size];
      canvas.getContext('2d').fillRect(0, 0, size / 2, size);
      canvas.toBlob((blob) => {
        const data = new DataTransfer();
        data.items.add(new File([size > 1 ? blob : 'no image'], name));
        document.querySelector('.vr-card').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));
        done();
      });
    })"""
    after(ready, lambda: page.evaluate(drop, ["mine.png", 120]))
    assert control(page, "Images").locator("option:checked").inner_text() == "mine.png"
    page.evaluate(drop, ["broken.png", 1])
    page.get_by_text("broken.png cannot be read as an image").wait_for()
    after(ready, lambda: control(page, "Images").select_option("scenes"))


def test_the_batch_commands_are_copied_and_are_the_views_own(ready, store):
    page = ready.page
    reset(ready, store)
    after(ready, lambda: click_patch(page, 0, "attention", 2, 9))
    page.get_by_role("button", name="Copy batch commands").click()
    page.get_by_text("copied: this view").wait_for()
    state = replace(DEFAULT, layer=7, query="patch (2, 9)")
    wanted = explorer.commands(state, explorer.look(state, store))
    assert page.locator(".vr-command textarea").input_value() == wanted
    page.wait_for_function("async (wanted) => await navigator.clipboard.readText() === wanted", arg=wanted)
    assert re.search(r"vitreg run explorer .*-p query 'patch \(2, 9\)'", wanted)


def test_every_control_is_labelled_and_nothing_scrolls_sideways(ready):
    page = ready.page
    unnamed = page.evaluate("""() => [...document.querySelectorAll(
        '.vr-explorer :is(button, select, textarea, input, [tabindex="0"])')].filter((e) => e.offsetParent !== null &&
        !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length ||
          e.innerText?.trim() || e.title || e.closest('.noUi-target, label, [aria-label]'))).map((e) => e.outerHTML)""")
    assert not unnamed
    wide = page.evaluate("""() => {
        const found = [];
        for (let e = document.querySelector('.vr-card'); e; e = e.parentElement)
          if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible') found.push(e.className);
        return found; }""")
    assert not wide


def test_the_dark_theme_is_legible(ready, tmp_path):
    page = ready.page
    theme = "(name) => jupyterapp.commands.execute('apputils:change-theme', { theme: name })"
    page.evaluate(theme, "JupyterLab Dark")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_function("""() => {  // texts and what lies behind them change one after the other
        const linear = (v) => v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
        const colour = (e, what) => getComputedStyle(e)[what].match(/[\\d.]+/g).map(Number);
        const texts = '.vr-title, .vr-panel-title, .vr-key, .vr-legend span, .vr-explorer label';
        return [...document.querySelectorAll(texts)].every((e) => {
          let back = e;
          while (back && (colour(back, 'backgroundColor')[3] ?? 1) === 0) back = back.parentElement;
          const [a, b] = [light(colour(e, 'color')), light(colour(back, 'backgroundColor'))];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) >= 4.5; }); }""")
    picture(page, "explorer-dark", tmp_path)
    page.evaluate(theme, "JupyterLab Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")


def test_two_hundred_changes_leave_the_kernel_as_large_as_before(ready, store):
    page = ready.page
    reset(ready, store)
    page.evaluate("answers.length = 0")
    page.locator(".vr-maps").first.focus()
    steps = ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"]
    after(ready, lambda: page.keyboard.press("ArrowDown"))
    before = ready.lab.kernel_bytes()
    for number in range(200):
        drawn(page, lambda number=number: page.keyboard.press(steps[number % 4]))
    grown = (ready.lab.kernel_bytes() - before) / 2**20
    took = page.evaluate("answers")
    print(
        f"\n{len(took)} changes: answered in {statistics.median(took):.0f} ms in the median, "
        f"{statistics.quantiles(took, n=20)[-1]:.0f} ms for 95 %; the kernel grew by {grown:.1f} MB"
    )
    assert grown <= 100


def test_end_goes_to_the_last_block_of_a_deeper_model(ready):
    """A model of 12 blocks after one of 8: the slider's key End goes to block 11."""
    page = ready.page
    page.get_by_text("Other images and models").click()
    control(page, "Models").fill("random:vit_tiny_patch16_224")
    after(ready, lambda: control(page, "Models").press("Enter"))
    page.get_by_text("Other images and models").click()
    slider(page, "Layer").press("End")
    ready.settle()
    page.locator(".vr-title").first.get_by_text("block 11 (of 0 to 11)").wait_for()


def test_under_batch_it_is_a_picture(tmp_path):
    """nbconvert's HTML of the executed notebook holds the picture, and no widget."""
    out = tmp_path / "explorer.html"
    command = [
        "jupyter",
        "nbconvert",
        "--to",
        "html",
        str(NOTEBOOKS / "explore" / "explorer.ipynb"),
        "--output",
        str(out),
    ]
    subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    )
    page = out.read_text()
    assert "data:image/png;base64," in page
    assert "application/vnd.jupyter.widget-view+json" not in page
