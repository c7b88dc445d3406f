"""What the explorer shows, without its face: from a `State` to numbers and maps, one `View` a model.

    store = Store()
    views = look(State(models=("mini-deit3", "mini-deit3-reg4"), layer=5, query="patch (3, 4)"), store)
    views[0].attention                                  # (rows, cols), multiples of even attention

A state is everything that can be chosen on the page; the same state gives the same views, so a test can compare the
page with the library, and a batch run (`vitreg run explorer -p …`) repeats what was found by hand. `Store` keeps one
image's tokens, queries and keys of all layers, so that another layer, head or query needs no forward pass.
"""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..base import UserError
from ..hooks.capture import Capture, attention_rows
from ..measure import attention, maps, outliers

MAX_IMAGES = 12  # of a source, to choose from; the cutoff by rule is of all their patches
BINS = 48
KEPT_BYTES = 64 << 20  # of captures


@dataclass(frozen=True)
class State:
    """What was chosen; a `View` of each model follows from it.

    models: one or two names. images: a source of `data.images.load`; image: which of it, from 0. layer: a block,
    negative from the end; the last one of a model with fewer blocks. heads: none for all; several are averaged.
    query: "cls", "register 2" (from 1) or "patch (row, col)" on the first model's grid. cutoffs: by model, None or
    absent for the one by rule. shared: one colour scale for both models. component: 1 to 3, 0 for the three as colours.
    """

    models: tuple[str, ...] = ("mini-deit3",)
    images: str = "photos"
    image: int = 0
    layer: int = -1
    heads: tuple[int, ...] = ()
    query: str = "cls"
    cutoffs: tuple[float | None, ...] = ()
    shared: bool = True
    component: int = 0


@dataclass(frozen=True)
class Seen:
    """One image as one model saw it, all layers kept.

    capture: norms, tokens, q and k of the image. set_norms: (layers, patches of all images of the source).
    pixels: (3, height, width) in [0, 1]. truth: (layers, rows, cols) bool where a control has artifacts, else None.
    """

    label: str
    role: str
    capture: Capture
    set_norms: torch.Tensor
    pixels: torch.Tensor
    image_name: str
    truth: torch.Tensor | None


@dataclass(frozen=True)
class View:
    """What is shown of one model. Maps are (rows, cols) float32 on the CPU.

    attention: of the query, in multiples of even attention over the patches; attention_share: the same as shares of
    the query's whole attention. norms: L2 after the block. components: (rows, cols, 3), in standard deviations, cut at
    3. similarity: mean cosine to the 2 to 4 neighbours. cutoff: infinite where the rule finds none. budget: where the
    query's attention goes. edges (BINS + 1,), counts and set_counts (BINS,): histogram of norms, as shares of patches,
    of this image and of all images of the source. notes: where this model cannot follow the state, in words.
    """

    label: str
    role: str
    image_name: str
    pixels: torch.Tensor
    grid: tuple[int, int]
    depth: int
    num_heads: int
    num_registers: int
    layer: int
    heads: tuple[int, ...]
    query: str
    patch: tuple[int, int] | None
    attention: torch.Tensor
    attention_share: torch.Tensor
    norms: torch.Tensor
    components: torch.Tensor
    similarity: torch.Tensor
    cutoff: float
    by_rule: bool
    is_outlier: torch.Tensor
    truth: torch.Tensor | None
    budget: dict[str, float]
    edges: torch.Tensor
    counts: torch.Tensor
    set_counts: torch.Tensor
    notes: tuple[str, ...]

    @property
    def outlier_share(self) -> float:
        """Of the image's patches, 0 to 1."""
        return self.is_outlier.float().mean().item()

    @property
    def ranks(self) -> torch.Tensor:
        """(rows, cols) place of each patch by norm in its image, 1 for the largest."""
        order = self.norms.flatten().argsort(descending=True, stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(1, len(order) + 1)
        return ranks.view(self.grid)

    @property
    def title(self) -> str:
        """Block, heads and query in words."""
        if not self.heads:
            heads = f"mean of {self.num_heads} heads"
        else:
            heads = (
                f"head {self.heads[0]}" if len(self.heads) == 1 else f"mean of heads {', '.join(map(str, self.heads))}"
            )
        return f"block {self.layer} (of 0 to {self.depth - 1}) · {heads} · query {self.query}"


def look(state: State, store: Store) -> list[View]:
    """A `View` of each model. Raises UserError for what none of the models has: a layer, head, register or patch."""
    if not 1 <= len(state.models) <= 2:
        raise UserError(f"{len(state.models)} models: the explorer shows one, or two side by side")
    seen = [store.seen(name, state.images, state.image) for name in state.models]
    _check(state, seen)
    grid = seen[0].capture.grid
    return [view(state, one, place, grid) for place, one in enumerate(seen)]


def fitting(state: State, store: Store) -> State:
    """The state with layer, heads and query at their defaults where none of its models has them."""
    seen = [store.seen(name, state.images, state.image) for name in state.models]
    fits = replace(state, layer=-1, heads=(), query="cls")
    for name in ("layer", "heads", "query"):
        more = replace(fits, **{name: getattr(state, name)})
        try:
            _check(more, seen)
        except UserError:
            continue
        fits = more
    return fits


def view(state: State, seen: Seen, place: int = 0, grid: tuple[int, int] | None = None) -> View:
    """The `View` of one model; `place` is its place in the state, `grid` that on which the state's patch is named."""
    capture, notes = seen.capture, []
    depth, num_heads = len(capture.layers), capture.q[0].shape[1]
    layer = state.layer if state.layer < depth else depth - 1
    if layer != state.layer:
        notes.append(f"has {depth} blocks: the last one is shown")
    layer %= depth
    heads = tuple(head for head in state.heads if head < num_heads)
    if heads != state.heads:
        notes.append(f"has {num_heads} heads: {'the others are left out' if heads else 'their mean is shown'}")
    token, note = query_token(state.query, capture, grid or capture.grid)
    notes += [note] if note else []

    row = attention_rows(capture.q[layer][:, :, [token]].float(), capture.k[layer].float())
    row = row[:, list(heads) if heads else slice(None)].mean(1, keepdim=True)
    asked = replace(capture, queries=(token,), attention={layer: row})
    share = attention.maps(asked, layer)[0, 0]
    norms = attention.on_grid(capture, capture.norms[0, layer])
    cutoff = state.cutoffs[place] if place < len(state.cutoffs) else None
    by_rule = cutoff is None
    cutoff = outliers.cutoff(seen.set_norms[layer]) if by_rule else cutoff
    is_outlier = norms > cutoff
    budget = attention.budget(asked, is_outlier.flatten()[None], layer, token).iloc[0].to_dict()
    patches = capture.patches(capture.tokens[layer])
    scores = maps.principal_components(patches, 3, per_image=True, grid=capture.grid).scores
    high = max(float(seen.set_norms[layer].max()), float(norms.max())) * 1.04
    return View(
        label=seen.label,
        role=seen.role,
        image_name=seen.image_name,
        pixels=seen.pixels,
        grid=capture.grid,
        depth=depth,
        num_heads=num_heads,
        num_registers=capture.num_registers,
        layer=layer,
        heads=heads,
        query=attention.query_names(asked)[0],
        patch=divmod(token - capture.num_prefix_tokens, capture.grid[1])
        if token >= capture.num_prefix_tokens
        else None,
        attention=attention.relative(share),
        attention_share=share,
        norms=norms,
        components=scores[0].unflatten(0, capture.grid),
        similarity=maps.neighbour_similarity(patches.float(), capture.grid)[0].unflatten(0, capture.grid),
        cutoff=cutoff,
        by_rule=by_rule,
        is_outlier=is_outlier,
        truth=None if seen.truth is None else seen.truth[layer],
        budget=budget,
        edges=torch.linspace(0, high, BINS + 1),
        counts=torch.histc(norms.flatten(), BINS, 0, high) / norms.numel(),
        set_counts=torch.histc(seen.set_norms[layer], BINS, 0, high) / seen.set_norms[layer].numel(),
        notes=tuple(notes),
    )


def query_token(query: str, capture: Capture, grid: tuple[int, int]) -> tuple[int, str]:
    """Token position of a query in a model, and a note where the model has no such token and another stands for it.

    A patch on a `grid` other than the model's own is the one at the same place of the image.
    """
    kind, numbers = parse_query(query)
    if kind == "patch":
        row, col = (
            min(int((n + 0.5) / old * new), new - 1) for n, old, new in zip(numbers, grid, capture.grid, strict=True)
        )
        return capture.num_prefix_tokens + row * capture.grid[1] + col, ""
    if kind == "cls" and capture.has_cls:
        return 0, ""
    if kind == "register" and numbers[0] <= capture.num_registers:
        return int(capture.has_cls) + numbers[0] - 1, ""
    missing = f"has no {query}" if kind == "cls" or capture.num_registers else "has no registers"
    return 0, f"{missing}: {attention.query_names(capture, [0])[0]} is shown"


def parse_query(query: str) -> tuple[str, tuple[int, ...]]:
    """("cls", ()), ("register", (2,)) or ("patch", (row, col)). Raises UserError for any other text."""
    found = re.fullmatch(r"(cls)|(register) ?([1-9]\d*)|(patch) ?\( ?(\d+), ?(\d+) ?\)", query.strip())
    if not found:
        raise UserError(f'query {query!r}: write "cls", "register 1" or "patch (row, col)", rows and columns from 0')
    kind, *numbers = [part for part in found.groups() if part is not None]
    return kind, tuple(map(int, numbers))


def parse_heads(heads: str | int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Heads from "0 3", 2 or (0, 3); none for "" and "mean". Raises UserError for what is no head."""
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


def _check(state: State, seen: list[Seen]) -> None:
    """Refuse what no model of the state has, in one line."""
    captures = [one.capture for one in seen]
    deepest = max(len(capture.layers) for capture in captures)
    if not -min(len(capture.layers) for capture in captures) <= state.layer < deepest:
        raise UserError(f"layer {state.layer} out of range for {deepest} blocks (0…{deepest - 1}, or -1)")
    most = max(capture.q[0].shape[1] for capture in captures)
    if wrong := [head for head in state.heads if not 0 <= head < most]:
        raise UserError(f"head {wrong[0]} out of range for {most} heads (0…{most - 1})")
    kind, numbers = parse_query(state.query)
    registers = max(capture.num_registers for capture in captures)
    if kind == "register" and numbers[0] > registers:
        raise UserError(f"query {state.query!r}: registers of {' and '.join(state.models)}: {registers or 'none'}")
    rows, cols = captures[0].grid
    if kind == "patch" and not (numbers[0] < rows and numbers[1] < cols):
        raise UserError(f"patch {numbers} out of range for a grid of {rows} x {cols}, counted from 0")


def scales(views: list[View], shared: bool) -> list[dict[str, tuple[float, float]]]:
    """Least and largest value of the colour scale of each map, by model and name; one for all models where `shared`.

    A map that is flat but for rounding gets a middle tone.
    """
    found = []
    for one in views:
        among = views if shared else [one]
        ranges = {}
        for name in ("attention", "norms", "similarity"):
            low = min(getattr(v, name).min().item() for v in among)
            high = max(getattr(v, name).max().item() for v in among)
            ranges[name] = (low, high) if high - low > 1e-3 * abs(high) else (low - abs(high), high + abs(high) + 1e-9)
        found.append(ranges)
    return found


def table(views: list[View]):
    """What is shown as numbers: a DataFrame, a row a model; shares are of this image's patches, 0 to 1."""
    import pandas as pd

    rows = {}
    for one in views:
        rows[one.label] = {
            "cutoff": one.cutoff,
            "outlier_share": one.outlier_share,
            "norm_ratio": outliers.norm_ratio(one.norms, one.is_outlier),
            "attention_on_outliers": maps.attention_on(one.attention, one.is_outlier).item(),
            "attention_on_prefix_tokens": one.budget["cls"] + one.budget["registers"],
            "largest_attention": one.attention.max().item(),
            "neighbour_similarity": one.similarity.mean().item(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def control_claims(views: list[View]) -> list[tuple[str, bool, str, str, str]]:
    """Arguments of `Run.claim` for each control: do the patches above the cutoff agree with the truth of this image?"""
    claims = []
    for one in views:
        if one.truth is not None:
            told = outliers.score(one.is_outlier, one.truth)
            measured = f"{int(one.is_outlier.sum())} patches above the cutoff, {int(one.truth.sum())} planted"
            text = f"ours: patches of {one.label} above the cutoff are those where artifacts were put (F1 at least 0.9)"
            claims.append((f"control-{one.label}", told["f1"] >= 0.9, measured, text, "none"))
    return claims


def commands(state: State, views: list[View]) -> str:
    """Commands that repeat this view in batch, and that measure the same over many images, to be pasted in a shell."""
    words = {
        "models": " ".join(state.models),
        "images": state.images,
        "image": state.image,
        "layer": state.layer,
        "heads": " ".join(map(str, state.heads)),
        "query": state.query,
        "cutoffs": " ".join("rule" if c is None else f"{c:.6g}" for c in state.cutoffs) if any(state.cutoffs) else "",
    }
    given = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in words.items() if value != "")
    item = "fig09" if parse_query(state.query)[0] == "register" else "fig01"
    models = [n for n, v in zip(state.models, views, strict=True) if item == "fig01" or v.num_registers]
    layer = min(state.layer, *(v.depth - 1 for v in views)) if len(views) > 1 else state.layer
    many = {"models": " ".join(models), "images": state.images, "layer": layer}
    many = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in many.items())
    return f"vitreg run explorer {given}\nvitreg run {item} {many}"


class Store:
    """Models, images and captures that were needed last, so that a change of the state answers at once.

    `busy` is told in words what takes longer, before it begins. At most four models and image sets and `KEPT_BYTES`
    of captures are kept.
    """

    def __init__(self, busy: Callable[[str], None] = lambda message: None):
        self.busy = busy
        self._models, self._sets, self._seen = OrderedDict(), OrderedDict(), OrderedDict()

    def add(self, model) -> str:
        """Keep a loaded `zoo.Model` and return the name by which a state calls it."""
        self._models[model.label] = model
        return model.label

    def model(self, name: str):
        """The `zoo.Model` of that name."""
        from ..model import zoo

        def make():
            self.busy(f"loading {name} …" + (" adding registers takes some seconds" if zoo.split(name)[1] else ""))
            return zoo.load(name)

        return _kept(self._models, name, make, 4)

    def images(self, name: str, source: str):
        """(`Images` as the model of that name sees them, (layers, patches of all) norms)."""
        from ..data import images

        def make():
            model = self.model(name)
            self.busy(f"{name}: norms of the images of {source} …")
            found = images.load(source, model, MAX_IMAGES)
            norms = model.capture(found, "norms").patch_norms
            return found, norms.transpose(0, 1).flatten(1)

        return _kept(self._sets, (name, source), make, 4)

    def seen(self, name: str, source: str, image: int) -> Seen:
        """One image through one model, all layers kept. Raises UserError where there is no such image."""

        def make():
            found, norms = self.images(name, source)
            if not 0 <= image < len(found):
                raise UserError(
                    f"image {image} out of range for the {len(found)} images of {source!r} (0…{len(found) - 1})"
                )
            model = self.model(name)
            self.busy(f"{name}: all layers of {found.names[image]} …")
            one = replace(found, x=found.x[[image]], pixels=found.pixels[[image]], names=[found.names[image]])
            capture = model.capture(one, ("norms", "tokens", "q", "k"))
            truth = model.truth(one)
            truth = None if truth is None else truth[0].view(1, *capture.grid).repeat(len(capture.layers), 1, 1)
            if truth is not None:
                truth[: model.onset or 0] = False  # nothing is there before a planted control's onset
            return Seen(model.label, model.role, capture, norms, found.pixels[image], found.names[image], truth)

        kept = _kept(self._seen, (name, source, image), make, 64)
        while len(self._seen) > 2 and sum(map(_bytes, self._seen.values())) > KEPT_BYTES:
            self._seen.popitem(last=False)
        return kept


def _kept(kept: OrderedDict, key, make: Callable, most: int):
    """`kept[key]`, made where it is missing; the one used longest ago goes when there are too many."""
    if key not in kept:
        value = make()  # first, so that nothing is kept of what fails
        kept[key] = value
        while len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _bytes(seen: Seen) -> int:
    parts = [seen.capture.norms]
    for site in (seen.capture.tokens, seen.capture.q, seen.capture.k):
        parts += site.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in parts)
