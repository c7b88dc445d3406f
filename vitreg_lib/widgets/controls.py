"""Controls of ipywidgets around the functions of `plots`.

In papermill, nbval or nbconvert (VITREG_BATCH is set), each shows a picture of its default state instead, because an
executed notebook does not keep a widget's state.
"""

from .. import plots
from ..base import in_batch


def interact(draw, **controls):
    """Call `draw(**values)`, which returns a figure, at every change of the controls; batch runs show one picture.

    controls: (widget class name, options) by argument of `draw`, for instance layer=("IntSlider", {"max": 11}).
    """
    import matplotlib.pyplot as plt

    def drawn(**values):
        figure = draw(**values)
        plt.close(figure)  # so that the notebook shows it once
        return figure

    if in_batch():
        return drawn(**{name: options["value"] for name, (_, options) in controls.items()})
    import ipywidgets

    once = {name: {"continuous_update": False} if "Slider" in kind else {} for name, (kind, _) in controls.items()}
    made = {name: getattr(ipywidgets, kind)(**once[name], **options) for name, (kind, options) in controls.items()}
    return ipywidgets.interactive(drawn, {"auto_display": True}, **made)


def token_kinds(captures: dict):
    """Norms of patches, cls and each register, for captures of all layers by model; a slider selects the block."""
    deepest = max(len(capture.layers) for capture in captures.values()) - 1

    def draw(layer):
        return plots.token_kinds({n: c.norms_by_kind(min(layer, len(c.layers) - 1)) for n, c in captures.items()})

    return interact(draw, layer=("IntSlider", {"value": deepest, "min": 0, "max": deepest}))


def explore(
    models="deit-ti deit-ti-trained-reg4",
    images: str = "photos",
    image: int = 0,
    layer: int = -1,
    heads=(),
    query: str = "cls",
    cutoffs: str = "",
    shared: bool = True,
    component: int = 0,
):
    """The explorer: one image through one or two models, with layer, heads, query token and cutoff to choose.

    models: one or two names separated by a space, or a loaded model, or a list of them. A model whose weights are not
    on this machine is replayed on the photos if it was measured (`model.measured`). images: photos, scenes, or the path
    of a folder or an image; image: its number, from 0. layer: a block, negative from the end. heads: numbers as "0 3"
    or (0, 3), empty for the mean of all. query: "cls", "register 2" or "patch (row, col)". cutoffs: norms above which a
    patch is an outlier, one per model, as "150 rule"; empty: the default rule. shared: one colour scale for both
    models. component: 1 to 3, or 0 for the first three as colours.

    Returns a `page.Explorer`: `.state`, `.views` (numbers and maps), `.static()` (a figure). Before it shows anything,
    raises UserError for a layer, head or query that no model has.
    """
    from .page import Explorer
    from .state import State, Store, parse_cutoffs, parse_heads

    store = Store()
    if isinstance(models, str):
        names = models.replace(",", " ").split()
    else:
        names = [store.add(model) for model in (models if isinstance(models, list | tuple) else [models])]
    heads, limits = parse_heads(heads), parse_cutoffs(cutoffs)
    return Explorer(State(tuple(names), images, image, layer, heads, query, limits, shared, component), store)
