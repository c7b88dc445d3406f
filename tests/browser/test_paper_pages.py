"""Notebooks of the paper in JupyterLab, as a reader uses them: run all, move the widget, and the picture follows."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow
MOVED = {  # what is moved: a slider (by one step), or a dropdown (to another choice)
    "paper/fig02_artifacts_in_attention.ipynb": ("head", "1"),
    "paper/fig03_norm_maps.ipynb": ("times", None),
    "paper/fig11_resizing_gradients.ipynb": ("out", None),
}
SHOWN = tuple(MOVED)
CELLS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].filter((cell) => cell.type === 'code')
    .map((cell) => ({ number: cell.executionCount, outputs: cell.outputs.toJSON() }))"""
TO_THE_WIDGET = """() => { const book = jupyterapp.shell.currentWidget.content;
    return book.scrollToItem(book.widgets.length - 2); }"""
PICTURE = ".jp-OutputArea-output .widget-output img"


@pytest.mark.parametrize("notebook", SHOWN)
def test_all_cells_run_and_the_widget_changes_its_picture(browser, notebook):
    page = browser.page
    browser.run(notebook)
    browser.ended()
    cells = page.evaluate(CELLS)
    assert all(cell["number"] for cell in cells)
    bad = [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not bad, bad
    page.evaluate(TO_THE_WIDGET)
    before = page.locator(PICTURE).last.get_attribute("src")
    label, choice = MOVED[notebook]
    control = page.locator(".jp-OutputArea-output .widget-inline-hbox", has_text=label)
    if choice is None:
        control.locator(".noUi-handle").press("ArrowRight")
    else:
        control.locator("select").select_option(choice)
    page.wait_for_function(
        """([selector, before]) => { const found = [...document.querySelectorAll(selector)];
        return found.length && found.at(-1).src !== before; }""",
        arg=[PICTURE, before],
    )
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
