"""The explorer's page: controls of ipywidgets, one `PatchCanvas` a model, all drawn from `explorer.look`."""

from __future__ import annotations

import base64
import io
import os

from . import explorer
from .explorer import State, Store, View


class Explorer:
    """The explorer of `widgets.explore`. Shown by a notebook it is the page, in batch runs its picture.

    state: what is chosen; views: what is shown, a `View` a model; `static()`: the page as a matplotlib Figure.
    """

    def __init__(self, state: State, store: Store):
        self.state, self.store = state, store
        self.views: list[View] = explorer.look(state, store)

    def static(self):
        """The page as it is now, as a matplotlib Figure: for export to HTML or PDF, and to be saved."""
        import matplotlib.pyplot as plt

        from . import plots_explorer

        figure = plots_explorer.explorer(self.views, self.state.shared, self.state.component)
        plt.close(figure)  # so that the notebook shows it once
        return figure

    def _repr_mimebundle_(self, include=None, exclude=None):
        buffer = io.BytesIO()
        self.static().savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(f"{view.label}: {view.title}" for view in self.views)


def is_batch() -> bool:
    """Whether pictures stand for widgets: run by papermill, nbval or nbconvert."""
    return bool(os.environ.get("VITREG_BATCH"))
