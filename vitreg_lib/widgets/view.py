"""The content of the explorer, without its page: numbers and maps of a `State`, one `View` per model.

store = Store()
views = look(State(models=("mini-deit3", "mini-deit3-reg4"), layer=5, query="patch (3, 4)"), store)
views[0].attention                                  # (rows, cols), multiples of even attention
"""

import shlex
from dataclasses import dataclass, replace

import torch

from ..base import UserError
from ..hooks.capture import Capture
from ..measure import attention, maps
from .state import LIVE, Forward, State, Store, check, parse_query, query_not_measured

BINS = 48


@dataclass(frozen=True)
class View:
    """The numbers and maps of one model. Maps are (rows, cols) float32 on the CPU.

    attention_share: of the query, over all its attention. norms: L2 after the block. components: (rows, cols, 3), in
    standard deviations. similarity: mean cosine to the 2 to 4 neighbours. cutoff: infinite where the rule gives none.
    budget: shares of the query's attention. edges (BINS + 1,), counts and set_counts (BINS,): histogram of norms, as
    shares of patches, of this image and of all images of the source. notes: how this model departs from the state.
    missing: {"attention", "components" or "similarity": why it was not measured}, of a replayed model; the map is NaN.
    """

    forward: Forward
    layer: int
    heads: tuple[int, ...]
    query: str
    patch: tuple[int, int] | None
    attention_share: torch.Tensor
    norms: torch.Tensor
    components: torch.Tensor
    similarity: torch.Tensor
    cutoff: float
    by_rule: bool
    budget: dict[str, float]
    edges: torch.Tensor
    counts: torch.Tensor
    set_counts: torch.Tensor
    notes: tuple[str, ...]
    missing: dict[str, str]

    @property
    def label(self) -> str:
        """The model's short name."""
        return self.forward.label

    @property
    def role(self) -> str:
        """What the model is, and whether it is replayed."""
        return self.forward.role + (", replayed" if self.forward.measured else "")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.forward.capture.grid

    @property
    def attention(self) -> torch.Tensor:
        """(rows, cols) attention of the query, in multiples of even attention over the patches."""
        return attention.relative(self.attention_share)

    @property
    def is_outlier(self) -> torch.Tensor:
        """(rows, cols) whether a patch's norm exceeds the cutoff."""
        return self.norms > self.cutoff

    @property
    def truth(self) -> torch.Tensor | None:
        """(rows, cols) where a control has artifacts after this block; None where unknown."""
        return None if self.forward.truth is None else self.forward.truth[self.layer]

    @property
    def outlier_share(self) -> float:
        """Share of outliers among the image's patches, 0 to 1."""
        return self.is_outlier.float().mean().item()

    @property
    def verdict(self) -> str:
        """The detector's answer for all images of the source, in a few words."""
        detection = self.forward.detection
        words = {"artifacts": f"artifacts: {detection.strength}, {detection.kind}", "none": "no artifacts"}
        return words.get(detection.answer, detection.answer)

    @property
    def title(self) -> str:
        """Block, heads and query in words."""
        chosen = ", ".join(map(str, self.heads))
        several = f"mean of heads {chosen}" if self.heads else f"mean of {self.forward.num_heads} heads"
        heads = f"head {chosen}" if len(self.heads) == 1 else several
        return f"block {self.layer} (of 0 to {self.forward.depth - 1}) · {heads} · query {self.query}"


def look(state: State, store: Store) -> list[View]:
    """A `View` of each model. Raises UserError for what none of the models has: a layer, head, register or patch."""
    if not 1 <= len(state.models) <= 2:
        raise UserError(f"{len(state.models)} models: the explorer shows one, or two side by side")
    forwards = store.forwards(state)
    check(state, forwards)
    return [view(state, one, place, forwards[0].capture.grid) for place, one in enumerate(forwards)]


def view(state: State, forward: Forward, place: int, grid: tuple[int, int]) -> View:
    """The `View` of one model; `place` is its number in the state; the state's patch refers to `grid`."""
    capture = forward.capture
    layer, heads, token, notes = _resolve(state, forward, grid)
    row = forward.row(layer, token)
    missing = _missing(forward, layer, row is None, state.query)
    if missing:
        notes.append(f"was measured on {forward.measured}; {LIVE}")
    row = torch.full((1, forward.num_heads, 1, capture.norms.shape[-1]), torch.nan) if row is None else row
    row = row[:, list(heads) if heads else slice(None)].mean(1, keepdim=True)
    asked = replace(capture, queries=(token,), attention={layer: row})
    norms = attention.on_grid(capture, capture.norms[0, layer])
    cutoff = state.cutoffs[place] if place < len(state.cutoffs) else None
    by_rule, set_norms = cutoff is None, forward.set_norms[layer]
    cutoff = forward.cutoff(layer) if by_rule else cutoff
    components, similarity = _of_tokens(forward, layer)
    high = max(float(set_norms.max()), float(norms.max())) * 1.04
    number = token - capture.num_prefix_tokens
    return View(
        forward,
        layer,
        heads,
        query=attention.query_names(asked)[0],
        patch=divmod(number, capture.grid[1]) if number >= 0 else None,
        attention_share=attention.maps(asked, layer)[0, 0],
        norms=norms,
        components=components,
        similarity=similarity,
        cutoff=cutoff,
        by_rule=by_rule,
        budget=attention.budget(asked, (norms > cutoff).flatten()[None], layer, token).iloc[0].to_dict(),
        edges=torch.linspace(0, high, BINS + 1),
        counts=torch.histc(norms.flatten(), BINS, 0, high) / norms.numel(),
        set_counts=torch.histc(set_norms, BINS, 0, high) / set_norms.numel(),
        notes=tuple(notes),
        missing=missing,
    )


def _of_tokens(forward: Forward, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Components (rows, cols, 3) and neighbour similarity (rows, cols) after a block; NaN where not measured."""
    capture, grid = forward.capture, forward.capture.grid
    if forward.measured:
        unknown = torch.full((*grid, 3), torch.nan)
        return (forward.components if layer == forward.depth - 1 else unknown), unknown[..., 0]
    patches = capture.patches(capture.tokens[layer])
    scores = maps.principal_components(patches, 3, per_image=True, grid=grid)[0]
    return scores.unflatten(0, grid), maps.neighbour_similarity(patches.float(), grid)[0].unflatten(0, grid)


def _missing(forward: Forward, layer: int, attention: bool, query: str) -> dict[str, str]:
    """{missing map: reason} of a replayed model; empty for a live one."""
    if not forward.measured:
        return {}
    missing = {"similarity": "neighbour similarity was not measured"}
    if layer != forward.depth - 1:
        missing["components"] = f"components were measured after block {forward.depth - 1} only"
    if attention:
        blocks = sorted(forward.capture.attention)
        blocks = f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
        has_layer = layer in forward.capture.attention
        only = f"attention was measured in {blocks} only"
        missing["attention"] = query_not_measured(query, forward) if has_layer else only
    return missing


def _resolve(state: State, forward: Forward, grid: tuple[int, int]) -> tuple[int, tuple[int, ...], int, list[str]]:
    """(layer, heads, query token, notes) of a state in one model; notes name substitutes for what it lacks."""
    notes, layer = [], min(state.layer, forward.depth - 1)
    if layer != state.layer:
        notes.append(f"has {forward.depth} blocks: the last one is shown")
    heads = tuple(head for head in state.heads if head < forward.num_heads)
    if heads != state.heads:
        notes.append(f"has {forward.num_heads} heads: {'the others are left out' if heads else 'their mean is shown'}")
    token, note = query_token(state.query, forward.capture, grid)
    return layer % forward.depth, heads, token, notes + [note] * bool(note)


def query_token(query: str, capture: Capture, grid: tuple[int, int]) -> tuple[int, str]:
    """Token position of a query in a model, and a note where another token replaces one that the model lacks.

    For a patch on a `grid` other than the model's own, it is the patch at the same place in the image.
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
        return capture.registers[numbers[0] - 1], ""
    missing = f"has no {query}" if kind == "cls" or capture.num_registers else "has no registers"
    return 0, f"{missing}: {attention.query_names(capture, [0])[0]} is shown"


def scales(views: list[View], shared: bool) -> list[dict[str, tuple[float, float]]]:
    """Least and largest value of the colour scale of each map, by model and name; one for all models where `shared`.

    A map that is flat except for rounding gets a middle tone. NaN is ignored.
    """
    result = []
    for one in views:
        ranges = {}
        for name in ("attention", "norms", "similarity"):
            shown = torch.cat([getattr(v, name).flatten() for v in (views if shared else [one])])
            shown = shown[shown.isfinite()] if shown.isfinite().any() else torch.zeros(1)
            low, high = shown.min().item(), shown.max().item()
            ranges[name] = (low, high) if high - low > 1e-3 * abs(high) else (low - abs(high), high + abs(high) + 1e-9)
        result.append(ranges)
    return result


def commands(state: State, views: list[View]) -> str:
    """Shell commands that repeat this view in batch, and that measure the same over many images."""

    def words(**values) -> str:
        return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in values.items() if value != "")

    cutoffs = " ".join("rule" if c is None else f"{c:.6g}" for c in state.cutoffs) if any(state.cutoffs) else ""
    models, heads = " ".join(state.models), " ".join(map(str, state.heads))
    this = dict(
        models=models, images=state.images, image=state.image, layer=state.layer, heads=heads, query=state.query
    )
    item = "fig09" if parse_query(state.query)[0] == "register" else "fig01"
    having = [v.forward.capture.num_registers > 0 or item == "fig01" for v in views]
    models = " ".join(name for name, has in zip(state.models, having, strict=True) if has)
    layer = min(state.layer, *(v.forward.depth - 1 for v in views)) if len(views) > 1 else state.layer
    many = words(models=models, images=state.images, layer=layer)
    return f"vitreg run explorer {words(**this, cutoffs=cutoffs)}\nvitreg run {item} {many}"
