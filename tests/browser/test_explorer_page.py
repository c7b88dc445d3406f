"""The explorer in JupyterLab, as a reader uses it: what the page shows is what the library computes for the choice.

Pictures are read back from the canvases, numbers from the page's text. With VITREG_GALLERY=1 (`make gallery`) the
screenshots go to docs/gallery/.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitreg_lib.base import NOTEBOOKS, ROOT
from vitreg_lib.widgets import view as explorer
from vitreg_lib.widgets.state import State, Store

pytestmark = pytest.mark.slow
PATIENCE = 60  # seconds for a page on a busy machine; it answers in a tenth of one
DEFAULT = State(models=("planted", "mini-deit3-reg4"), images="scenes")
COLOURS = """([place, panel]) => {  // the colour at the centre of every patch of one panel
  const card = document.querySelectorAll('.vr-card')[place];
  const canvas = card.querySelector(`canvas[data-panel=${panel}]`);
  const [rows, cols] = [12, 12];
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
    """The library's own store of models and captures, for what the page is compared with."""
    return Store()


@pytest.fixture(scope="module")
def ready(desk):
    """The page with the attention map alone on the image (overlay 1), so that its colours can be read back."""
    slider(desk.page, "Overlay").press("End")
    desk.page.evaluate(CLOCK)
    return desk


def slider(page, label: str):
    """The handle of an ipywidgets slider."""
    return page.locator(".vr-explorer .widget-inline-hbox", has_text=label).locator(".noUi-handle")


def control(page, label: str):
    """The control of exactly that label."""
    return page.get_by_label(label, exact=True)


def serial(page) -> int:
    return int(page.locator(".vr-card").first.get_attribute("data-serial"))


def after(page, act) -> None:
    """Do something and wait until the page has drawn what follows from it."""
    before = serial(page)
    act()
    page.wait_for_function(f"document.querySelector('.vr-card').dataset.serial > {before}")


def number(page, place: int, name: str) -> str:
    return page.locator(".vr-card").nth(place).locator(f"[data-name='{name}']").inner_text()


def assert_shows(page, state: State, store) -> list:
    """Both cards come to show the pictures and numbers of the state; the library's views are returned."""
    views, until = explorer.look(state, store), time.monotonic() + PATIENCE
    while True:
        try:
            for place, (view, scales) in enumerate(zip(views, explorer.scales(views, state.shared), strict=True)):
                compare(page, place, view, scales, state.component)
            return views
        except AssertionError:  # what was asked before may still be on its way
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def compare(page, place: int, view: explorer.View, scales: dict, component: int) -> None:
    """One card against one view: the colour of every patch of every panel, and the numbers."""
    from vitreg_lib.widgets.canvas import message, palette

    sent = message(view, scales, component, 0)
    assert number(page, place, "label") == view.label
    assert number(page, place, "title") == view.title
    for panel in ("attention", "norms", "components", "similarity"):
        shown = np.array(page.evaluate(COLOURS, [place, panel]), dtype=int)
        if panel == "components":
            wanted = np.frombuffer(sent["components"], np.uint8).reshape(-1, 3)
        else:
            low, high = scales[panel]
            steps = (255 * (getattr(view, panel).flatten().numpy() - low) / (high - low)).round().clip(0, 255)
            name = sent["scales"][panel]["palette"]
            wanted = np.frombuffer(palette(name), np.uint8).reshape(-1, 3)[steps.astype(int)]
        gap = np.abs(shown - wanted).max()  # a step of a palette, where a value lies between two
        assert gap <= 6, f"{view.label}, {panel}: colours differ by up to {gap} of 255"
    count = int(view.is_outlier.sum())
    assert number(page, place, "above").startswith(f"outliers: {count} of {view.norms.numel()} (")
    for name, share in view.budget.items():
        assert number(page, place, f"on-{name}") == f"{100 * share:.1f} %"
    if view.patch:
        row, col = view.patch
        assert number(page, place, "patch") == f"Patch ({row}, {col})"
        assert number(page, place, "rank") == f"{view.ranks[row, col]} of {view.norms.numel()}"
        assert float(number(page, place, "norm")) == pytest.approx(view.norms[row, col].item(), rel=6e-3)
        share = float(number(page, place, "attention").split()[0])
        assert share == pytest.approx(100 * view.attention_share[row, col].item(), rel=6e-3)


def picture(page, name: str, tmp_path: Path) -> None:
    """A screenshot of the explorer as a reader sees it, the map over the image; docs/gallery/ where it is asked for."""
    folder = ROOT / "docs" / "gallery" if os.environ.get("VITREG_GALLERY") else tmp_path
    overlay(page, 14)
    page.mouse.move(1, 1)
    page.evaluate("document.activeElement.blur()")
    path = folder / f"{name}.png"
    page.locator(".vr-explorer").screenshot(path=path)
    overlay(page, 20)
    assert 10_000 < path.stat().st_size < 300_000


def overlay(page, steps: int) -> None:
    """Move the slider of the attention's opacity to so many steps of 20."""
    handle = slider(page, "Overlay")
    handle.press("Home")
    for _ in range(steps):
        handle.press("ArrowRight")


def click_patch(page, place: int, panel: str, row: int, col: int) -> None:
    canvas = page.locator(".vr-card").nth(place).locator(f"canvas[data-panel={panel}]")
    box = canvas.bounding_box()
    canvas.click(position={"x": (col + 0.5) / 12 * box["width"], "y": (row + 0.5) / 12 * box["height"]})
    page.mouse.move(1, 1)


def reset(page, store) -> None:
    """Layer 7, mean of heads, cls, cutoffs by rule: the notebook's own state."""
    slider(page, "Overlay").press("End")
    slider(page, "Layer").press("End")
    page.get_by_role("button", name="mean", exact=True).click()
    control(page, "Query").select_option("cls")
    page.get_by_role("button", name="Cutoff by rule").click()
    assert_shows(page, DEFAULT, store)


def test_it_opens_with_the_state_of_the_notebook(ready, store, tmp_path):
    assert_shows(ready.page, DEFAULT, store)
    assert not ready.page.locator(".vr-error").count()
    picture(ready.page, "explorer", tmp_path)


def test_layer_head_and_register_are_followed_by_both_models(ready, store, tmp_path):
    page = ready.page
    reset(page, store)
    cell = page.locator(".jp-Notebook .jp-mod-active").get_attribute("data-windowed-list-index")
    after(page, lambda: slider(page, "Layer").press("ArrowLeft"))
    after(page, lambda: slider(page, "Layer").press("ArrowLeft"))
    state = replace(DEFAULT, layer=5)
    assert_shows(page, state, store)
    after(page, page.get_by_role("button", name="2", exact=True).click)
    state = replace(state, heads=(2,))
    assert_shows(page, state, store)
    after(page, page.get_by_role("button", name="4", exact=True).click)
    state = replace(state, heads=(2, 4))
    assert_shows(page, state, store)
    assert number(page, 1, "notes") == "mini-deit3-reg4 has 3 heads: the others are left out"
    after(page, lambda: control(page, "Query").select_option("register 2"))
    state = replace(state, query="register 2")
    views = assert_shows(page, state, store)
    assert number(page, 0, "notes") == "planted has no registers: cls is shown"
    picture(page, "explorer-register", tmp_path)
    assert views[1].query == "register 2"
    assert page.locator(".jp-Notebook .jp-mod-active").get_attribute("data-windowed-list-index") == cell


def test_a_patch_is_asked_by_click_and_by_arrow_keys(ready, store, tmp_path):
    page = ready.page
    reset(page, store)
    after(page, lambda: click_patch(page, 0, "norms", 3, 4))
    assert_shows(page, replace(DEFAULT, query="patch (3, 4)"), store)
    maps = page.locator(".vr-maps").first
    maps.focus()
    for key, patch in (("ArrowRight", "patch (3, 5)"), ("ArrowDown", "patch (4, 5)")):
        after(page, lambda key=key: page.keyboard.press(key))
        assert_shows(page, replace(DEFAULT, query=patch), store)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    picture(page, "explorer-patch", tmp_path)
    maps.focus()
    after(page, lambda: page.keyboard.press("Home"))
    assert_shows(page, DEFAULT, store)
    box = page.locator(".vr-card canvas[data-panel=norms]").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 2.5 / 12, box["y"] + box["height"] * 1.5 / 12)
    assert number(page, 0, "patch") == "Patch (1, 2)"
    view = explorer.look(DEFAULT, store)[0]
    assert number(page, 0, "rank").startswith(f"{view.ranks[1, 2]} of")
    page.mouse.move(1, 1)


def test_the_cutoff_is_dragged(ready, store, tmp_path):
    page = ready.page
    reset(page, store)
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
    after(page, page.mouse.up)
    page.mouse.move(1, 1)
    assert float(number(page, 0, "cutoff").split()[1]) == pytest.approx(norm, rel=0.02)
    views = assert_shows(page, replace(DEFAULT, cutoffs=(norm, None)), store)
    assert 10 <= views[0].is_outlier.sum() < 40  # more than those by rule
    ring = page.evaluate(
        """([row, col]) => { const c = document.querySelector('canvas[data-panel=norms]');
        return [...c.getContext('2d').getImageData(col * 24 + 2, row * 24 + 12, 1, 1).data].slice(0, 3); }""",
        views[0].is_outlier.nonzero()[0].tolist(),
    )
    assert ring == [0x56, 0xB4, 0xE9]
    picture(page, "explorer-cutoff", tmp_path)
    histogram.focus()
    after(page, lambda: page.keyboard.press("ArrowRight"))
    moved = views[0].cutoff + high / 100
    assert float(number(page, 0, "cutoff").split()[1]) == pytest.approx(moved, rel=0.02)
    after(page, lambda: page.keyboard.press("Home"))
    assert_shows(page, DEFAULT, store)


def test_another_image_and_model_say_that_they_take_a_moment(ready, store):
    page = ready.page
    reset(page, store)
    page.evaluate("""() => { window.told = []; new MutationObserver(() =>
        document.querySelectorAll('.vr-spin + span').forEach((e) => told.push(e.textContent))
        ).observe(document.querySelector('.vr-status'), { childList: true, subtree: true }); }""")
    after(page, lambda: control(page, "Image").select_option("scene 3"))
    assert_shows(page, replace(DEFAULT, image=3), store)
    after(page, lambda: control(page, "Beside").select_option("mini-deit3"))
    state = State(models=("planted", "mini-deit3"), images="scenes", image=3, layer=7)
    assert_shows(page, state, store)
    assert any("loading mini-deit3" in text for text in page.evaluate("told"))
    assert not page.locator(".vr-spin").count()
    after(page, lambda: control(page, "Beside").select_option("—"))
    assert page.locator(".vr-card").nth(1).is_hidden()
    after(page, lambda: control(page, "Beside").select_option("mini-deit3-reg4"))
    after(page, lambda: control(page, "Image").select_option("scene 0"))
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
    after(page, lambda: page.evaluate(drop, ["mine.png", 120]))
    assert control(page, "Images").locator("option:checked").inner_text() == "mine.png"
    page.evaluate(drop, ["broken.png", 1])
    page.get_by_text("broken.png cannot be read as an image").wait_for()
    after(page, lambda: control(page, "Images").select_option("scenes"))


def test_the_batch_commands_are_copied_and_are_the_views_own(ready, store):
    page = ready.page
    reset(page, store)
    after(page, lambda: click_patch(page, 0, "attention", 2, 9))
    page.get_by_role("button", name="Copy batch commands").click()
    page.get_by_text("copied: this view").wait_for()
    state = replace(DEFAULT, layer=7, query="patch (2, 9)")
    wanted = explorer.commands(state, explorer.look(state, store))
    assert page.locator(".vr-command textarea").input_value() == wanted
    assert page.evaluate("navigator.clipboard.readText()") == wanted
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
    page.wait_for_timeout(800)
    contrasts = page.evaluate("""() => {
        const linear = (v) => v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
        const colour = (e, what) => getComputedStyle(e)[what].match(/[\\d.]+/g).map(Number);
        const texts = '.vr-title, .vr-panel-title, .vr-key, .vr-legend span, .vr-explorer label';
        return [...document.querySelectorAll(texts)].map((e) => {
          let back = e;
          while (back && (colour(back, 'backgroundColor')[3] ?? 1) === 0) back = back.parentElement;
          const [a, b] = [light(colour(e, 'color')), light(colour(back, 'backgroundColor'))];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }); }""")
    assert min(contrasts) >= 4.5
    picture(page, "explorer-dark", tmp_path)
    page.evaluate(theme, "JupyterLab Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")


def test_two_hundred_changes_leave_the_kernel_as_large_as_before(ready, store):
    page = ready.page
    reset(page, store)
    page.evaluate("answers.length = 0")
    page.locator(".vr-maps").first.focus()
    steps = ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"]
    after(page, lambda: page.keyboard.press("ArrowDown"))
    before = ready.lab.kernel_bytes()
    for number in range(200):
        after(page, lambda number=number: page.keyboard.press(steps[number % 4]))
    grown = (ready.lab.kernel_bytes() - before) / 2**20
    took = page.evaluate("answers")
    print(
        f"\n{len(took)} changes: answered in {statistics.median(took):.0f} ms in the median, "
        f"{statistics.quantiles(took, n=20)[-1]:.0f} ms for 95 %; the kernel grew by {grown:.1f} MB"
    )
    assert grown <= 100


def test_a_real_model_beside_one_without_artifacts(ready, tmp_path):
    """A picture for the gallery: ViT-Ti, which has artifacts, beside DeiT-Ti of the same architecture."""
    page = ready.page
    if not (ROOT.parent / "shared" / "real").is_dir():
        pytest.skip("needs the real small models in ../shared/real, which are not here")
    page.get_by_text("Other images and models").click()
    control(page, "Models").fill("vit-ti deit-ti")
    after(page, lambda: control(page, "Models").press("Enter"))
    page.get_by_text("Other images and models").click()
    after(page, lambda: control(page, "Images").select_option("photos"))
    title = page.locator(".vr-title").first
    title.get_by_text("block 7 (of 0 to 11)").wait_for()
    for layer in range(8, 12):  # End goes to the largest value that the slider once had
        slider(page, "Layer").press("ArrowRight")
        title.get_by_text(f"block {layer} (of 0 to 11)").wait_for()
    picture(page, "explorer-vit-ti", tmp_path)


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
