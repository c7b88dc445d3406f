"""The explorer's page: controls of ipywidgets, one `PatchCanvas` a model, all drawn from `explorer.look`."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import sys
from dataclasses import replace
from pathlib import Path

from ..base import UserError, in_batch, results, shown, write_atomically
from . import explorer
from .explorer import State, Store, View


class Explorer:
    """The explorer of `widgets.explore`. Shown by a notebook it is the page, in batch runs its picture.

    state: what is chosen; views: what is shown, a `View` a model; `choose(layer=3)` changes the state as the controls
    do; `static()` is the page as a matplotlib Figure; `commands` repeat it in batch.
    """

    def __init__(self, state: State, store: Store):
        self.state, self.store = state, store
        self.page = None
        self.views: list[View] = explorer.look(state, store)
        if not in_batch():
            self.page = Page(self)

    def choose(self, **changes) -> None:
        """Change the state and show its views; for what the models do not have, UserError, and all stays as it was."""
        state = replace(self.state, **changes)
        self.views = explorer.look(state, self.store)
        self.state = state
        if self.page:
            self.page.show()

    @property
    def commands(self) -> str:
        """`explorer.commands` of what is shown."""
        return explorer.commands(self.state, self.views)

    def static(self):
        """The page as it is now, as a matplotlib Figure: for export to HTML or PDF, and to be saved."""
        import matplotlib.pyplot as plt

        from . import still

        figure = still.explorer(self.views, self.state.shared, self.state.component)
        plt.close(figure)  # so that the notebook shows it once
        return figure

    def save(self) -> list[Path]:
        """Write the page as PNG and SVG under results/explorer/, named by what it shows."""
        folder = results() / "explorer"
        folder.mkdir(parents=True, exist_ok=True)
        view = self.views[0]
        words = "-".join([*self.state.models, view.image_name, f"block {view.layer}", view.query])
        stem = "".join(c if c.isalnum() or c in "+-" else "_" for c in words) + f"-{_digest(repr(self.state).encode())}"
        figure = self.static()
        paths = [folder / f"{stem}.{kind}" for kind in ("png", "svg")]
        for path in paths:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=path.suffix[1:], bbox_inches="tight", dpi=150)
            write_atomically(path, buffer.getvalue())
        return paths

    def _repr_mimebundle_(self, include=None, exclude=None):
        if self.page:
            return self.page.box._repr_mimebundle_(include=include, exclude=exclude)
        buffer = io.BytesIO()
        self.static().savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(f"{view.label}: {view.title}" for view in self.views)


def keep_upload(name: str, content: bytes) -> Path:
    """Write an uploaded image under results/uploads/, in a folder of its own, so that a batch run finds it again.

    Raises UserError for what is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name} cannot be read as an image") from error
    plain = "".join(c if c.isalnum() or c in ".-_" else "_" for c in Path(name).name).lstrip(".") or "image.png"
    path = results() / "uploads" / _digest(content) / plain
    write_atomically(path, content)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


class Page:
    """The controls and canvases of one `Explorer`; `box` is what a notebook shows."""

    def __init__(self, owner: Explorer):
        import ipywidgets as w

        from .patch_canvas import PatchCanvas

        if "google.colab" in sys.modules:  # Colab shows widgets of other makers on request only
            from google.colab import output

            output.enable_custom_widget_manager()
        self.owner, self.serial, self.quiet = owner, 0, False
        owner.store.busy = self.busy

        def control(kind, label, **options):
            return kind(description=label, style={"description_width": "54px"}, layout={"width": "auto"}, **options)

        deferred = {"continuous_update": False}
        self.source, self.image = control(w.Dropdown, "Images"), control(w.Dropdown, "Image")
        self.first, self.second = control(w.Dropdown, "Model"), control(w.Dropdown, "Beside")
        self.layer, self.query = control(w.IntSlider, "Layer"), control(w.Dropdown, "Query")
        self.heads = w.Box().add_class("vr-heads")
        self.opacity = control(w.FloatSlider, "Overlay", min=0, max=1, step=0.05, value=0.7)
        self.component = control(w.Dropdown, "PCA")
        self.component.options = [("1 to 3 as RGB", 0)] + [(f"component {n}", n) for n in (1, 2, 3)]
        self.shared = w.Checkbox(description="One colour scale for both", indent=False)
        self.path = control(w.Text, "Path", placeholder="path of a folder or an image", **deferred)
        self.named = control(w.Text, "Models", placeholder="timm:NAME, file:PATH; one or two", **deferred)
        self.upload = w.FileUpload(accept="image/*", multiple=False, description="Upload an image")
        self.rule = w.Button(description="Cutoff by rule", tooltip="Let the default rule choose the cutoffs again")
        self.saved = w.Button(description="Save figure", icon="save", tooltip="PNG and SVG under results/explorer")
        self.copied = w.Button(description="Copy batch commands", icon="copy", layout={"width": "auto"})
        self.status = w.HTML().add_class("vr-status")
        self.command = w.Textarea(layout={"width": "auto", "display": "none"}, rows=3, disabled=True)
        self.command.add_class("vr-command")
        self.canvases = [PatchCanvas(), PatchCanvas()]

        more = w.Accordion(
            [w.Box([self.path, self.upload, self.named]).add_class("vr-more")], titles=["Other images and models"]
        )
        more.selected_index = None
        rows = [self.source, self.image, self.first, self.second]
        rows += [self.layer.add_class("vr-wide"), self.query, self.opacity]
        rows += [self.heads.add_class("vr-wide"), self.component, self.shared]
        actions = [self.rule, self.saved, self.copied, self.status]
        self.box = w.VBox(
            [
                w.Box(rows).add_class("vr-controls"),
                w.Box(actions).add_class("vr-actions"),
                self.command,
                *self.canvases,
                more,
            ]
        ).add_class("vr-explorer")
        self._listen()
        self.show()

    def _listen(self) -> None:
        import ipywidgets

        def changes(widget, change):
            widget.observe(lambda event: self.attempt(**change(event["new"])), "value")

        changes(self.source, lambda value: {"images": value, "image": 0})
        changes(self.image, lambda value: {"image": value})
        changes(self.first, lambda value: {"models": (value, *self.owner.state.models[1:])})
        changes(self.second, lambda value: {"models": (self.owner.state.models[0], *([value] if value else []))})
        changes(self.layer, lambda value: {"layer": value})
        changes(self.query, lambda value: {"query": value})
        changes(self.component, lambda value: {"component": value})
        changes(self.shared, lambda value: {"shared": value})
        changes(self.path, lambda value: {"images": value.strip(), "image": 0} if value.strip() else {})
        changes(self.named, lambda value: {"models": tuple(value.replace(",", " ").split())} if value.strip() else {})
        self.upload.observe(self._uploaded, "value")
        self.rule.on_click(lambda button: self.attempt(cutoffs=()))
        self.saved.on_click(self._save)
        self.copied.on_click(self._copy)
        for place, canvas in enumerate(self.canvases):
            ipywidgets.jslink((self.opacity, "value"), (canvas, "opacity"))
            canvas.on_msg(lambda _, content, buffers, place=place: self._asked(place, content, buffers))

    def attempt(self, **changes) -> None:
        """`choose`, with what the models lack taken back to the default and errors told on the page."""
        if self.quiet or not changes:
            return
        try:
            if "models" in changes:  # norms of another model are on another scale
                state = explorer.fitting(replace(self.owner.state, cutoffs=(), **changes), self.owner.store)
                changes = vars(state)
            self.owner.choose(**changes)
            self.status.value = ""
        except (UserError, ValueError) as error:
            self.status.value = f'<span class="vr-error" role="alert">{html.escape(str(error))}</span>'
            self.show()

    def busy(self, message: str) -> None:
        """Show a spinner with a message; the next view takes it away."""
        self.status.value = f'<span class="vr-spin"></span><span role="status">{html.escape(message)}</span>'

    def show(self) -> None:
        """Bring controls and canvases to the owner's state."""
        from .patch_canvas import message

        owner, state = self.owner, self.owner.state
        self.quiet = True
        try:
            self._controls(state)
        finally:
            self.quiet = False
        self.command.layout.display = "none"  # commands are those of the view that was copied
        self.serial += 1
        for canvas, view, scales in zip(
            self.canvases, owner.views, explorer.scales(owner.views, state.shared), strict=False
        ):
            canvas.view = message(view, scales, state.component, self.serial)
        self.canvases[1].layout.display = None if len(owner.views) > 1 else "none"

    def _controls(self, state: State) -> None:
        views = self.owner.views
        _offer(self.source, _sources(state.images), state.images)
        _offer(self.image, self._names(state), state.image)
        _offer(self.first, [(name, name) for name in _models(state.models)], state.models[0])
        _offer(
            self.second,
            [("—", "")] + [(name, name) for name in _models(state.models)],
            state.models[1] if len(state.models) > 1 else "",
        )
        self.layer.max = max(view.depth for view in views) - 1
        self.layer.value = state.layer % views[0].depth if state.layer < 0 else state.layer
        registers = max(view.num_registers for view in views)
        queries = ["cls", *(f"register {i + 1}" for i in range(registers))]
        queries += [state.query] if state.query not in queries else []
        _offer(self.query, [(name, name) for name in queries], state.query)
        self.component.value, self.shared.value = state.component, state.shared
        self.shared.layout.display = None if len(views) > 1 else "none"
        self._head_buttons(max(view.num_heads for view in views), state.heads)

    def _head_buttons(self, count: int, heads: tuple[int, ...]) -> None:
        import ipywidgets

        if len(self.heads.children) != count + 2:
            made = [ipywidgets.Label("Heads").add_class("vr-heads-label")]
            for head in [None, *range(count)]:
                text = "mean" if head is None else str(head)
                tip = "mean of all heads" if head is None else f"head {head}: several are averaged"
                button = ipywidgets.ToggleButton(description=text, tooltip=tip, layout={"width": "auto"})
                button.observe(lambda change, head=head: self._head(head, change["new"]), "value")
                made.append(button)
            self.heads.children = made
        for head, button in enumerate(self.heads.children[1:], -1):
            button.value = head in heads if head >= 0 else not heads

    def _head(self, head: int | None, on: bool) -> None:
        if self.quiet:
            return
        heads = set() if head is None else set(self.owner.state.heads) ^ {head}
        self.attempt(heads=tuple(sorted(heads)))

    def _names(self, state: State) -> list[tuple[str, int]]:
        images, _ = self.owner.store.images(state.models[0], state.images)
        return [(name, place) for place, name in enumerate(images.names)]

    def _asked(self, place: int, content: dict, buffers: list) -> None:
        """A message of a canvas."""
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

    def _uploaded(self, change) -> None:
        for file in change["new"]:
            self._take(file["name"], bytes(file["content"]))

    def _take(self, name: str, content: bytes) -> None:
        try:
            path = keep_upload(name, content)
        except UserError as error:
            self.status.value = f'<span class="vr-error" role="alert">{html.escape(str(error))}</span>'
            return
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


def _offer(dropdown, options: list[tuple], value) -> None:
    if list(dropdown.options) != options:
        dropdown.options = options
    dropdown.value = value


def _sources(current: str) -> list[tuple[str, str]]:
    from ..data import images

    sources = ["photos", "scenes"] + (["imagenet"] if images.named_folder("imagenet") else [])
    more = [] if current in sources else [(Path(current).name, current)]
    return [(name, name) for name in sources] + more


def _models(chosen: tuple[str, ...]) -> list[str]:
    """Names of models that are on this machine, those without registers also with four added at test time."""
    from ..model import zoo

    names = []
    for name, entry in zoo.entries().items():
        if zoo.available(name) != "not here":
            names += [name] if "base" in entry else [name, f"{name}+ttr4"]
    return names + [name for name in chosen if name not in names]
