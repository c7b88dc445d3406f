"""The choices in the explorer, and the captures from which its views are computed.

A `State` holds all choices on the page. The same state gives the same views, so a test can compare the page with the
library, and a batch run (`vitreg run explorer -p …`) repeats choices made by hand. A `Store` keeps tokens, queries and
keys of one image at all blocks, so that another layer, head or query needs no forward pass. For a model without weights
it keeps the measurements (`model.measured`).
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..base import UserError
from ..hooks.capture import Capture, attention_rows
from ..measure import detection
from ..measure.attention import query_names

MAX_IMAGES = 12  # of a source, to choose from; the detector judges all of them
KEPT = 4  # models, image sets and captures; a capture of a ViT-L has 75 MB


@dataclass(frozen=True)
class State:
    """The choices; they determine a `View` of each model.

    models: one or two names. images: a source of `data.images.load`; image: its number, from 0. layer: a block,
    negative from the end; a model with fewer blocks shows its last. heads: empty for all; several are averaged. query:
    "cls", "register 2" (from 1) or "patch (row, col)" on the first model's grid. cutoffs: by model, None or absent for
    the rule. shared: one colour scale for both models. component: 1 to 3, 0 for the three as colours.
    """

    models: tuple[str, ...] = ("deit-ti",)
    images: str = "photos"
    image: int = 0
    layer: int = -1
    heads: tuple[int, ...] = ()
    query: str = "cls"
    cutoffs: tuple[float | None, ...] = ()
    shared: bool = True
    component: int = 0


@dataclass(frozen=True)
class Forward:
    """One image through one model, with all blocks.

    capture: norms, tokens, q and k of the image; norms and the measured attention of a replayed model. set_norms:
    (layers, patches of all images of the source). detection: on these. pixels: (3, height, width) in
    [0, 1]. truth: (layers, rows, cols) bool where a control has artifacts, or None. measured: the date on which a
    replayed model was measured, else "". components: (rows, cols, 3) after its last block. ask: from block and token to
    `row`, by a forward pass, of a model whose attention is not that of q and k alone, as with a bias for positions.
    """

    label: str
    role: str
    capture: Capture
    num_heads: int
    set_norms: torch.Tensor
    detection: detection.Detection
    pixels: torch.Tensor
    image_name: str
    truth: torch.Tensor | None = None
    measured: str = ""
    components: torch.Tensor | None = None
    ask: Callable[[int, int], torch.Tensor] | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.capture.layers)

    def row(self, layer: int, token: int) -> torch.Tensor | None:
        """(1, heads, 1, tokens) attention of a query token in a block; None where it was not measured."""
        capture = self.capture
        if self.ask:
            return self.ask(layer, token)
        if not self.measured:
            return attention_rows(capture.q[layer][:, :, [token]].float(), capture.k[layer].float())
        if layer not in capture.attention or token not in capture.queries:
            return None
        return capture.attention[layer][:, :, [capture.queries.index(token)]]

    @property
    def queries(self) -> list[str]:
        """Names of the measured queries of a replayed model; a live model also takes any patch."""
        return query_names(self.capture, self.capture.queries or range(self.capture.num_prefix_tokens))

    def cutoff(self, layer: int) -> float:
        """The detector's cutoff after its block, the same multiple of the median after others; infinite without any."""
        outliers = self.detection.outliers
        return outliers.cutoff / self.set_norms[outliers.layer].median().item() * self.set_norms[layer].median().item()


def fitting(state: State, forwards: list[Forward]) -> State:
    """The state with defaults for a layer, heads or query that none of its models has.

    forwards: of the state's models.
    """
    fits = replace(state, layer=-1, heads=(), query="cls")
    for name in ("layer", "heads", "query"):
        more = replace(fits, **{name: getattr(state, name)})
        try:
            check(more, forwards)
        except UserError:
            continue
        fits = more
    return fits


def check(state: State, forwards: list[Forward]) -> None:
    """Raise UserError, in one line, for a layer, head, register or patch that none of the state's models has."""
    deepest, most = (max(getattr(one, name) for one in forwards) for name in ("depth", "num_heads"))
    if not -min(one.depth for one in forwards) <= state.layer < deepest:
        raise UserError(f"layer {state.layer} out of range for {deepest} blocks (0…{deepest - 1}, or -1)")
    if wrong := [head for head in state.heads if not 0 <= head < most]:
        raise UserError(f"head {wrong[0]} out of range for {most} heads (0…{most - 1})")
    kind, numbers = parse_query(state.query)
    registers = max(one.capture.num_registers for one in forwards)
    if kind == "register" and numbers[0] > registers:
        raise UserError(f"query {state.query!r}: registers of {' and '.join(state.models)}: {registers or 'none'}")
    if kind == "patch" and not any(not one.measured or state.query in one.queries for one in forwards):
        raise UserError(f"{query_not_measured(state.query, forwards[0])}; {LIVE}")
    rows, cols = forwards[0].capture.grid
    if kind == "patch" and not (numbers[0] < rows and numbers[1] < cols):
        raise UserError(f"patch {numbers} out of range for a grid of {rows} x {cols}, counted from 0")


LIVE = "with its weights in VITREG_MODELS or the hub's cache, all is computed"


def query_not_measured(query: str, forward: Forward) -> str:
    """Why a replayed model has no attention of a query."""
    return f"attention of {query} was not measured, only that of {', '.join(forward.queries)}"


def parse_query(query: str) -> tuple[str, tuple[int, ...]]:
    """("cls", ()), ("register", (2,)) or ("patch", (row, col)). Raises UserError for other text."""
    match = re.fullmatch(r"(cls)|(register) ?([1-9]\d*)|(patch) ?\( ?(\d+), ?(\d+) ?\)", query.strip())
    if not match:
        raise UserError(f'query {query!r}: write "cls", "register 1" or "patch (row, col)", rows and columns from 0')
    kind, *numbers = [part for part in match.groups() if part is not None]
    return kind, tuple(map(int, numbers))


def parse_heads(heads: str | int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Heads from "0 3", 2 or (0, 3); empty for "" and "mean". Raises UserError for other text."""
    heads = (heads,) if isinstance(heads, int) else heads
    words = heads.replace("mean", "").replace(",", " ").split() if isinstance(heads, str) else [str(h) for h in heads]
    if wrong := [word for word in words if not word.isdigit()]:
        raise UserError(f'head {wrong[0]!r}: write numbers from 0, for instance "0 3", or nothing for the mean of all')
    return tuple(sorted({int(word) for word in words}))


def parse_cutoffs(cutoffs: str) -> tuple[float | None, ...]:
    """Cutoffs by model from "150 rule"; none for "". Raises UserError for what is neither a norm nor "rule"."""
    try:
        return tuple(None if word == "rule" else float(word) for word in cutoffs.replace(",", " ").split())
    except ValueError:
        raise UserError(f'cutoffs {cutoffs!r}: a norm or "rule" for each model, for instance "150 rule"') from None


class Store:
    """The most recently used models, images and captures, so that a change of the state needs little work.

    `busy` is called with a message before slow work. The `KEPT` most recently used of each are kept.
    """

    def __init__(self, busy: Callable[[str], None] = lambda message: None):
        self.busy = busy
        self._models, self._sets, self._forwards = OrderedDict(), OrderedDict(), OrderedDict()

    def add(self, model) -> str:
        """Keep a loaded model and return its name in a state: its label, numbered where another model has that."""
        name, number = model.label, 2
        while name in self._models and self._models[name].module is not model.module:
            name, number = f"{model.label} {number}", number + 1
        self._models[name] = replace(model, label=name)
        return name

    def model(self, name: str):
        """The model of that name; replayed if its weights are not on this machine."""
        from ..model import measured, zoo

        def make():
            self.busy(f"loading {name} …" + (" adding registers takes some seconds" if zoo.split(name)[1] else ""))
            return measured.live_or_replayed(name)

        return _kept(self._models, name, make)

    def images(self, name: str, source: str):
        """(`Images` as the model of that name takes them, (layers, patches of all) norms, their `Detection`)."""
        from ..data import images

        def make():
            model = self.model(name)
            self.busy(f"{name}: norms of the images of {source} …")
            batch = images.load(source, model, MAX_IMAGES)
            observed = detection.observe(model, batch)
            return batch, observed.norms.transpose(0, 1).flatten(1), detection.judge(observed, name)

        return _kept(self._sets, (name, source), make)

    def forward(self, name: str, source: str, image: int) -> Forward:
        """One image through one model, with all blocks. Raises UserError where there is no such image."""
        return _kept(self._forwards, (name, source, image), lambda: self._run(name, source, image))

    def forwards(self, state: State) -> list[Forward]:
        """`forward` of each model of a state."""
        return [self.forward(name, state.images, state.image) for name in state.models]

    def _run(self, name: str, source: str, image: int) -> Forward:
        from ..model import measured

        batch, norms, detected = self.images(name, source)
        if not 0 <= image < len(batch):
            count = len(batch)
            raise UserError(f"image {image} out of range for the {count} images of {source!r} (0…{count - 1})")
        model = self.model(name)
        self.busy(f"{name}: all layers of {batch.names[image]} …")
        one = batch.at([image])
        facts = (model.anatomy.num_heads, norms, detected, batch.pixels[image], batch.names[image])
        if model.replayed:
            asked = dict(layers=model.measured_blocks, queries=model.measured["queries"])
            capture = model.capture(one, "attention", **asked)
            capture = replace(model.capture(one), attention=capture.attention, queries=capture.queries)
            date, components = model.measured["date"], model.kept("components", one)[0]
            return Forward(model.label, model.role, capture, *facts, measured=date, components=components)
        some = measured.queries(model, one)  # whose attention says whether q and k alone give it
        capture = model.capture(one, ("norms", "tokens", "q", "k", "attention"), queries=some)
        again = {i: attention_rows(q[:, :, some].float(), capture.k[i].float()) for i, q in capture.q.items()}
        plain = all(torch.allclose(again[i], rows, rtol=1e-3, atol=1e-6) for i, rows in capture.attention.items())
        capture = replace(capture, attention={}, queries=())
        truth = model.truth(one)
        if truth is not None:
            truth = truth[0].view(1, *capture.grid).repeat(len(capture.layers), 1, 1)
            truth[: model.onset or 0] = False  # a planted control has no artifacts before its onset

        def ask(layer: int, token: int) -> torch.Tensor:
            return model.capture(one, "attention", layers=layer, queries=[token]).attention[layer]

        return Forward(model.label, model.role, capture, *facts, truth, ask=None if plain else ask)


def _kept(kept: OrderedDict, key, make: Callable):
    """`kept[key]`, made where it is missing; beyond `KEPT` entries, the least recently used is dropped."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
