"""The explorer's page: controls of ipywidgets and one `PatchCanvas` per model, all drawn from `view.look`."""

import base64
import hashlib
import html
import io
import sys
from dataclasses import replace
from pathlib import Path

from ..base import UserError, in_batch, results, shown, write_atomically
from .state import State, Store, fitting
from .view import View, commands, look, scales

MEASURED = "photos"  # the images of the measurements in `model.measured`


class Explorer:
    """The explorer of `widgets.explore`. A notebook shows the page; a batch run shows its picture.

    state: the choices; views: one `View` per model; `choose(layer=3)` changes the state as the controls do; `static()`
    is the page as a matplotlib Figure; `commands` repeat the views in batch.
    """

    def __init__(self, state: State, store: Store):
        self.state, self.store = state, store
        self.page = None
        self.views: list[View] = look(state, store)
        if not in_batch():
            self.page = Page(self)

    def choose(self, **changes) -> None:
        """Change the state and show its views. Raises UserError, without a change, for what the models do not have."""
        state = replace(self.state, **changes)
        self.views = look(state, self.store)
        self.state = state
        if self.page:
            self.page.show()

    @property
    def commands(self) -> str:
        """Shell commands that repeat the views in batch."""
        return commands(self.state, self.views)

    def static(self):
        """The current page as a matplotlib Figure, for export to HTML or PDF and for `save`."""
        import matplotlib.pyplot as plt

        from . import still

        figure = still.explorer(self.views, self.state.shared, self.state.component)
        plt.close(figure)  # so that the notebook shows it once
        return figure

    def save(self) -> list[Path]:
        """Write the page as PNG and SVG under results/explorer/, named by its content."""
        view = self.views[0]
        words = "-".join([*self.state.models, view.forward.image_name, f"block {view.layer}", view.query])
        stem = "".join(c if c.isalnum() or c in "+-" else "_" for c in words) + f"-{_digest(repr(self.state).encode())}"
        paths = [results() / "explorer" / f"{stem}.{kind}" for kind in ("png", "svg")]
        for path in paths:
            write_atomically(path, self._drawn(path.suffix[1:], 150))
        return paths

    def _drawn(self, kind: str, dpi: int) -> bytes:
        buffer = io.BytesIO()
        self.static().savefig(buffer, format=kind, bbox_inches="tight", dpi=dpi)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        if self.page:
            return self.page.box._repr_mimebundle_(include=include, exclude=exclude)
        return {"image/png": base64.b64encode(self._drawn("png", 80)).decode(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(f"{view.label}: {view.title}" for view in self.views)


def keep_upload(name: str, content: bytes) -> Path:
    """Write an uploaded image under results/uploads/, in its own folder, so that a batch run can read it.

    Raises UserError for a file that is no image.
    """
    from ..data import images

    try:
        images.read(io.BytesIO(content))
    except UserError as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from error
    plain = "".join(c if c.isalnum() or c in ".-_" else "_" for c in Path(name).name).lstrip(".") or "image.png"
    path = results() / "uploads" / _digest(content) / plain
    write_atomically(path, content)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


class Page:
    """The controls and canvases of one `Explorer`; `box` is what a notebook shows."""

    def __init__(self, owner: Explorer):
        if "google.colab" in sys.modules:  # Colab shows custom widgets on request only
            from google.colab import output

            output.enable_custom_widget_manager()
        self.owner, self.serial, self.quiet = owner, 0, False
        owner.store.busy = self.busy
        self._make()
        self.box = self._arranged()
        self._listen()
        self.show()

    def _make(self) -> None:
        import ipywidgets as w

        from .canvas import PatchCanvas

        self.source, self.image = _control(w.Dropdown, "Images"), _control(w.Dropdown, "Image")
        self.first, self.second = _control(w.Dropdown, "Model"), _control(w.Dropdown, "Beside")
        self.query, self.component = _control(w.Dropdown, "Query"), _control(w.Dropdown, "PCA")
        self.component.options = [("1 to 3 as RGB", 0)] + [(f"component {n}", n) for n in (1, 2, 3)]
        self.layers, self.heads = w.Box().add_class("vr-wide"), w.Box().add_class("vr-heads").add_class("vr-wide")
        self.layer = None  # in `layers`, made for the models' number of blocks
        self.opacity = _control(w.FloatSlider, "Overlay", min=0, max=1, step=0.05, value=0.7)
        self.shared = w.Checkbox(description="One colour scale for both", indent=False)
        once = {"continuous_update": False}
        self.path = _control(w.Text, "Path", placeholder="path of a folder or an image", **once)
        self.named = _control(w.Text, "Models", placeholder="timm:NAME, file:PATH; one or two", **once)
        self.upload = w.FileUpload(accept="image/*", multiple=False, description="Upload an image")
        self.rule = w.Button(description="Cutoff by rule", tooltip="Let the default rule choose the cutoffs again")
        self.saved = w.Button(description="Save figure", icon="save", tooltip="PNG and SVG under results/explorer")
        self.copied = w.Button(description="Copy batch commands", icon="copy", layout={"width": "auto"})
        self.status, self.why = w.HTML().add_class("vr-status"), w.HTML().add_class("vr-why")
        self.command = w.Textarea(layout={"width": "auto", "display": "none"}, rows=3, disabled=True)
        self.command.add_class("vr-command")
        self.canvases = [PatchCanvas(), PatchCanvas()]

    def _arranged(self):
        import ipywidgets as w

        rows = [self.source, self.image, self.first, self.second, self.layers, self.query, self.opacity]
        rows += [self.heads, self.component, self.shared, self.why]
        actions = [self.rule, self.saved, self.copied, self.status]
        more = [w.Box([self.path, self.upload, self.named]).add_class("vr-more")]
        parts = [w.Box(rows).add_class("vr-controls"), w.Box(actions).add_class("vr-actions"), self.command]
        parts += [*self.canvases, w.Accordion(more, titles=["Other images and models"], selected_index=None)]
        return w.VBox(parts).add_class("vr-explorer")

    def _listen(self) -> None:
        import ipywidgets

        def on(widget, change):
            widget.observe(lambda event: self.attempt(**change(event["new"])), "value")

        on(self.source, lambda value: {"images": value, "image": 0})
        on(self.first, lambda value: {"models": (value, *self.owner.state.models[1:])})
        on(self.second, lambda value: {"models": (self.owner.state.models[0], *([value] if value else []))})
        for name in ("image", "query", "component", "shared"):
            on(getattr(self, name), lambda value, name=name: {name: value})
        on(self.path, lambda value: {"images": value.strip(), "image": 0} if value.strip() else {})
        on(self.named, lambda value: {"models": tuple(value.replace(",", " ").split())} if value.strip() else {})
        self.upload.observe(lambda event: [self._take(f["name"], bytes(f["content"])) for f in event["new"]], "value")
        self.rule.on_click(lambda button: self.attempt(cutoffs=()))
        self.saved.on_click(self._save)
        self.copied.on_click(self._copy)
        for place, canvas in enumerate(self.canvases):
            ipywidgets.jslink((self.opacity, "value"), (canvas, "opacity"))
            canvas.on_msg(lambda _, content, buffers, place=place: self._asked(place, content, buffers))

    def attempt(self, **changes) -> None:
        """`choose`, with defaults for what the models lack; errors are shown on the page."""
        if self.quiet or not changes:
            return
        try:
            if "models" in changes:  # norms of another model are on another scale
                state = replace(self.owner.state, cutoffs=(), **changes)
                if state.images != MEASURED and any(self.owner.store.model(name).replayed for name in state.models):
                    state = replace(state, images=MEASURED, image=0)
                changes = vars(fitting(state, self.owner.store.forwards(state)))
            self.owner.choose(**changes)
            self.status.value = ""
        except (UserError, ValueError) as error:
            self._refuse(error)
            self.show()

    def busy(self, message: str) -> None:
        """Show a spinner with a message until the next view."""
        self.status.value = f'<span class="vr-spin"></span><span role="status">{html.escape(message)}</span>'

    def _refuse(self, error: Exception) -> None:
        self.status.value = f'<span class="vr-error" role="alert">{html.escape(str(error))}</span>'

    def show(self) -> None:
        """Set controls and canvases to the owner's state."""
        from .canvas import message

        views, state = self.owner.views, self.owner.state
        self.quiet = True
        try:
            self._set_controls(state, views)
        finally:
            self.quiet = False
        self.command.layout.display = "none"  # the shown commands belong to an earlier view
        self.serial += 1
        for canvas, view, ranges in zip(self.canvases, views, scales(views, state.shared), strict=False):
            canvas.view = message(view, ranges, state.component, self.serial)
        self.canvases[1].layout.display = None if len(views) > 1 else "none"

    def _set_controls(self, state: State, views: list[View]) -> None:
        images = self.owner.store.images(state.models[0], state.images)[0]
        names = _models(state.models)
        _offer(self.source, _sources(state.images), state.images)
        _offer(self.image, [(name, place) for place, name in enumerate(images.names)], state.image)
        _offer(self.first, names, state.models[0])
        _offer(self.second, [("—", ""), *names], state.models[1] if len(views) > 1 else "")
        queries = sorted((n for view in views for n in view.forward.queries), key=lambda n: n.startswith("patch"))
        _offer(self.query, [(name, name) for name in dict.fromkeys([*queries, state.query])], state.query)
        self.component.value, self.shared.value = state.component, state.shared
        self.shared.layout.display = None if len(views) > 1 else "none"
        self._allow(views)
        self._set_layer(max(view.forward.depth for view in views), state.layer % views[0].forward.depth, state.layer)
        self._set_heads(max(view.forward.num_heads for view in views), state.heads)

    def _allow(self, views: list[View]) -> None:
        """Disable controls for which no shown model has measurements, and give the reason."""
        measured = [view.label for view in views if view.forward.measured]
        were = "was" if len(measured) == 1 else "were"
        images = f"{' and '.join(measured)} {were} measured on the photos alone" if measured else ""
        reasons = dict.fromkeys(("source", "path", "upload"), images)
        for names, panel in ((("query", "opacity"), "attention"), (("component",), "components")):
            missing = all(panel in view.missing for view in views)
            reasons |= dict.fromkeys(names, views[0].missing[panel] if missing else "")
        for name, reason in reasons.items():
            getattr(self, name).disabled = bool(reason)
        self.no_heads = reasons["query"]
        said = "; ".join(reason for reason in dict.fromkeys(reasons.values()) if reason)
        self.why.value = html.escape(f"Grey controls: {said}") if said else ""

    def _set_layer(self, depth: int, last: int, layer: int) -> None:
        import ipywidgets

        if not self.layer or self.layer.max != depth - 1:
            # a new slider for another depth: the page's slider keeps its first maximum for the key End
            self.layer = _control(ipywidgets.IntSlider, "Layer", max=depth - 1, value=depth - 1)
            self.layer.layout.flex = "1"
            self.layer.observe(lambda event: self.attempt(layer=event["new"]), "value")
            self.layers.children = [self.layer]
        self.layer.value = last if layer < 0 else layer

    def _set_heads(self, count: int, heads: tuple[int, ...]) -> None:
        import ipywidgets

        if len(self.heads.children) != count + 2:
            made = [ipywidgets.Label("Heads").add_class("vr-heads-label")]
            for head in [None, *range(count)]:
                text = "mean" if head is None else str(head)
                button = ipywidgets.ToggleButton(description=text, layout={"width": "auto"})
                button.observe(lambda event, head=head: self._toggle(head), "value")
                made.append(button)
            self.heads.children = made
        for head, button in enumerate(self.heads.children[1:], -1):
            tip = "mean of all heads" if head < 0 else f"head {head}: several are averaged"
            button.value = head in heads if head >= 0 else not heads
            button.disabled, button.tooltip = bool(self.no_heads), self.no_heads or tip

    def _toggle(self, head: int | None) -> None:
        if not self.quiet:
            heads = set() if head is None else set(self.owner.state.heads) ^ {head}
            self.attempt(heads=tuple(sorted(heads)))

    def _asked(self, place: int, content: dict, buffers: list) -> None:
        """Handle the message of a canvas."""
        views = self.owner.views
        if place >= len(views):
            return
        if content["kind"] == "query":
            query = "cls"
            if content["query"]:
                here, first = views[place].grid, views[0].grid
                row, col = (int((n + 0.5) / a * b) for n, a, b in zip(content["query"], here, first, strict=True))
                query = f"patch ({row}, {col})"
            self.attempt(query=query)
        elif content["kind"] == "cutoff":
            cutoffs = [*self.owner.state.cutoffs, None, None][: len(views)]
            cutoffs[place] = content["value"]
            self.attempt(cutoffs=tuple(cutoffs))
        elif content["kind"] == "upload":
            self._take(content["name"], bytes(buffers[0]))

    def _take(self, name: str, content: bytes) -> None:
        try:
            path = keep_upload(name, content)
        except UserError as error:
            return self._refuse(error)
        self.attempt(images=str(path), image=0)

    def _save(self, button) -> None:
        self.busy("drawing …")
        paths = self.owner.save()
        self.status.value = f"saved {html.escape(shown(paths[0]))} and .svg"

    def _copy(self, button) -> None:
        self.command.value = self.owner.commands
        self.command.layout.display = None
        self.canvases[0].send({"kind": "copy", "text": self.command.value})
        self.status.value = "copied: this view in batch, and the same measured over many images"


def _control(kind, label: str, **options):
    return kind(description=label, style={"description_width": "54px"}, layout={"width": "auto"}, **options)


def _offer(dropdown, options: list[tuple], value) -> None:
    if list(dropdown.options) != options:
        dropdown.options = options
    dropdown.value = value


def _sources(current: str) -> list[tuple[str, str]]:
    from ..data import images

    sources = ["photos", "scenes"] + (["imagenet"] if images.named_folder("imagenet") else [])
    more = [] if current in sources else [(Path(current).name, current)]
    return [(name, name) for name in sources] + more


def _models(chosen: tuple[str, ...]) -> list[tuple[str, str]]:
    """(label, name) of models: measured real models first, then others with weights on this machine.

    Models without registers are also listed with four registers added at test time.
    """
    from ..model import measured, zoo

    here = []
    for name, entry in zoo.entries().items():
        if zoo.available(name) != "not here":
            here += [name] if "base" in entry else [name, f"{name}+ttr4"]
    replayed = [name for name in measured.names() if name not in here]
    names = [(f"{name} (replayed)", name) for name in replayed] + [(name, name) for name in here]
    return names + [(name, name) for name in chosen if name not in dict(names).values()]
