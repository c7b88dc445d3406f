"""Two notebooks of the paper's figures, run to their end in JupyterLab as a reader runs them."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.filter((c) => c.model.type === 'code').map((cell) => {
  const outputs = cell.model.outputs.toJSON();
  return { ran: cell.model.executionCount !== null, kinds: outputs.map((output) => output.output_type),
    pictures: outputs.filter((output) => output.data && output.data['image/png']).length }; })"""
IDLE = "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
SCROLL = """() => { const notebook = jupyterapp.shell.currentWidget.content;  // cells out of sight are not drawn
  notebook.scrollToItem(notebook.widgets.length - 1, 'end'); }"""


@pytest.mark.parametrize(
    ("notebook", "figures", "widget"),
    [
        ("paper/fig01_attention_with_registers.ipynb", 1, ".vr-card[data-serial]"),
        ("paper/fig04_norms_by_layer_training_size.ipynb", 3, ".noUi-handle"),
    ],
)
def test_it_runs_to_its_end(open_notebook, notebook, figures, widget):
    """Every code cell runs, none raises, the figures are shown, and the last widget is there."""
    desk = open_notebook(notebook)
    page = desk.page
    assert not any(cell["ran"] for cell in page.evaluate(CELLS))
    desk.run_all()

    def ended() -> bool:
        cells = page.evaluate(CELLS)
        assert not any("error" in cell["kinds"] for cell in cells), page.inner_text("body")[-600:]
        return all(cell["ran"] for cell in cells) and page.evaluate(IDLE)

    desk.until(ended, "the notebook did not end")
    assert sum(cell["pictures"] for cell in page.evaluate(CELLS)) >= figures
    page.evaluate(SCROLL)
    page.locator(widget).first.wait_for()
    assert not desk.errors, desk.errors
    page.context.close()
